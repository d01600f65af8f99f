# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _named_target, _paths, _pidfile, _running
from ansible_collections.virt.iommufd.plugins.module_utils._errors import (
    IommufdError,
    ProcessGone,
)
from ansible_collections.virt.iommufd.plugins.module_utils._named_target import DomainTarget, UnitTarget
from ansible_collections.virt.iommufd.plugins.module_utils._paths import Place, Untrusted, Writer
from ansible_collections.virt.iommufd.plugins.module_utils._pidfile import PidfileTarget, parse_pid
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._target import PidTarget, Target, hold_target


@pytest.mark.parametrize(("text", "pid"), [(b"42", 42), (b"42\n", 42), (b" 42\r\n", 42), (b"0", 0)])
def test_a_pidfile_holds_a_number(text: bytes, pid: int) -> None:
    assert parse_pid(text) == pid


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"running", "'running'"),
        (b"42 43", "'42 43'"),
        (b"-42", "'-42'"),
        (b"4\0002", "x00"),
        (b"\xd9\xa1", "process but"),
        (b"42" * 20, "process but"),
    ],
)
def test_anything_else_is_no_pidfile(text: bytes, words: str) -> None:
    with pytest.raises(IommufdError, match=words):
        parse_pid(text)


@pytest.fixture
def pidfile(tmp_path: Path, child: subprocess.Popen[bytes]) -> Path:
    """A pidfile of the child, in a folder of its user. The folders above are made to count as root's."""
    path = tmp_path / "child.pid"
    path.write_text(f"{child.pid}\n")
    return path


@pytest.fixture
def only_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folders of this machine are like, only we can write to them."""

    @contextlib.contextmanager
    def walk(path: str, _trusted: object) -> Iterator[Place]:
        yield Place(-1, "", path, status=os.stat(path))

    monkeypatch.setattr(_paths, "walk", walk)


def holds(target: Target) -> int:
    with hold_target(target) as process:
        return process.pid


def test_a_process_is_held_by_its_pid(child: subprocess.Popen[bytes]) -> None:
    assert holds(PidTarget(child.pid)) == child.pid


@pytest.mark.usefixtures("only_mine")
def test_a_process_is_held_by_its_pidfile(pidfile: Path, child: subprocess.Popen[bytes]) -> None:
    assert holds(PidfileTarget(str(pidfile))) == child.pid


def test_what_is_no_pidfile_is_refused_by_name(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("running\n")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("text")
    with open(tmp_path / "huge", "wb") as stream:
        stream.truncate(2**30)
    for name, words in {
        "empty": "is empty",
        "text": "does not hold the id of a process but 'running",
        "folder": "not a regular file but a folder",
        "fifo": "not a regular file but a FIFO",
        "link": "is a symbolic link",
        "huge": "holds 1073741824 bytes",
        "missing": "cannot be opened .ENOENT",
        "nul\0": "is no path",
    }.items():
        with pytest.raises(IommufdError, match=words):
            holds(PidfileTarget(str(tmp_path / name)))
    for path, words in {"/dev/null": "a character device", "relative.pid": "not an absolute path"}.items():
        with pytest.raises(IommufdError, match=words):
            holds(PidfileTarget(path))


@pytest.mark.usefixtures("only_mine")
def test_a_pidfile_older_than_its_process_is_stale(pidfile: Path) -> None:
    os.utime(pidfile, (0, os.stat(pidfile).st_mtime - 60))
    with pytest.raises(IommufdError, match="is stale"):
        holds(PidfileTarget(str(pidfile)))


def test_a_pidfile_that_somebody_else_can_write_does_not_count(
    pidfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(*_arguments: object) -> Any:
        raise Untrusted("", Writer("/home/mallory", "uid 4711"))

    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    pidfile = pidfile.rename(tmp_path / "shared" / "pid")
    with pytest.raises(IommufdError, match=f"cannot be trusted: {tmp_path}/shared can be written by everybody"):
        holds(PidfileTarget(str(pidfile)))
    monkeypatch.setattr(_paths, "walk", walk)
    with pytest.raises(IommufdError, match=r"/home/mallory can be written by uid 4711, but .* belongs to uid"):
        holds(PidfileTarget(str(pidfile)))


@pytest.mark.usefixtures("only_mine")
def test_a_pidfile_that_changes_before_it_is_checked_does_not_count(
    pidfile: Path, child: subprocess.Popen[bytes]
) -> None:
    target = PidfileTarget(str(pidfile))
    with Process.hold(child.pid) as process:
        pidfile.write_text("1\n")
        with pytest.raises(ProcessGone, match=f"named process {child.pid}, and a moment later 1"):
            target.check(process)


def test_the_file_that_was_read_is_the_one_that_is_judged(pidfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = PidfileTarget(str(pidfile))
    read = target.read()
    status = pidfile.stat()
    assert (read.written, read.device, read.inode) == (status.st_mtime, status.st_dev, status.st_ino)
    monkeypatch.setattr(PidfileTarget, "read", lambda _self: read._replace(inode=read.inode + 1))
    with pytest.raises(ProcessGone, match="was replaced while it was read"):
        holds(target)
    monkeypatch.setattr(PidfileTarget, "read", lambda _self: read)
    pidfile.chmod(0o666)
    with pytest.raises(IommufdError, match=r"child\.pid can be written by everybody"):
        holds(target)
    pidfile.unlink()
    with pytest.raises(ProcessGone, match="was replaced"):
        holds(target)


def test_a_pidfile_that_is_not_to_be_had_in_time(pidfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pidfile, "_PATIENCE", 0)
    with pytest.raises(IommufdError, match=r"child\.pid could not be looked at within 0 seconds\. Is it on a mount"):
        PidfileTarget(str(pidfile)).resolve()


def test_a_pidfile_that_cannot_be_looked_up(pidfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(*_arguments: object) -> Any:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(_paths, "walk", walk)
    with pytest.raises(IommufdError, match=r"cannot be looked up .EACCES"):
        holds(PidfileTarget(str(pidfile)))


class Changing:
    """A target that names another process each time it is asked."""

    def __init__(self, *pids: int) -> None:
        self.pids = list(pids)

    def resolve(self) -> int:
        return self.pids.pop(0)

    def check(self, process: Process) -> None:
        raise AssertionError(f"{process} must not have come so far")


def test_a_target_that_changes_between_the_readings_is_refused(child: subprocess.Popen[bytes]) -> None:
    target: Any = Changing(child.pid, os.getpid())
    with pytest.raises(ProcessGone, match=f"named process {child.pid}, and a moment later {os.getpid()}"):
        holds(target)


STATUS = """
<domstatus state='running' pid='%d'><domain type='kvm' id='1'><name>%s</name>
  <seclabel type='dynamic' model='dac'><label>%s</label></seclabel>
</domain></domstatus>
"""
ME = f"+{os.getuid()}:+{os.getgid()}"


@pytest.fixture
def libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Libvirt's folder, whose files count as root's."""
    monkeypatch.setattr(_running, "_FOLDER", str(tmp_path))
    monkeypatch.setattr(_running, "_LIBVIRT_UID", os.getuid())
    return tmp_path


@pytest.fixture
def emulators() -> Iterator[dict[str, int]]:
    """Two processes of one user, whose command lines are those of emulators of vm1 and of vm2."""
    with contextlib.ExitStack() as stack:
        pids = {}
        for name in ("vm1", "vm2"):
            command = ["sh", "-c", "echo ready; read line", "-name", f"guest={name},debug-threads=on"]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            )
            assert process.stdout is not None
            process.stdout.readline()
            pids[name] = process.pid
        yield pids


def write(folder: Path, name: str, pid: int, label: str = ME) -> None:
    """Libvirt's record of a domain, and the pidfile beside it."""
    (folder / f"{name}.pid").write_text(str(pid))
    (folder / f"{name}.xml").write_text(STATUS % (pid, name, label))


def test_a_domains_emulator_is_held(libvirt: Path, emulators: dict[str, int]) -> None:
    write(libvirt, "vm1", emulators["vm1"])
    assert holds(DomainTarget("vm1")) == emulators["vm1"]
    write(libvirt, "vm1", emulators["vm1"], "+4711:+4711")
    with pytest.raises(IommufdError, match="libvirt runs that as uid 4711"):
        holds(DomainTarget("vm1"))
    (libvirt / "vm1.xml").write_text("<domstatus")
    with pytest.raises(IommufdError, match=r"vm1.xml is no record of libvirt's: it is no XML"):
        holds(DomainTarget("vm1"))


def test_a_domain_whose_files_were_renamed_to_another_ones(libvirt: Path, emulators: dict[str, int]) -> None:
    write(libvirt, "vm1", emulators["vm1"])
    write(libvirt, "vm2", emulators["vm2"])
    for suffix in ("pid", "xml"):
        (libvirt / f"vm1.{suffix}").rename(libvirt / f"vm2.{suffix}")
    # The user of the emulators can have the command line agree with that, too, as vm2's does.
    with pytest.raises(
        IommufdError, match=r"is not the emulator of domain vm2: .* is that of domain vm1, so it was re"
    ):
        holds(DomainTarget("vm2"))
    with pytest.raises(IommufdError, match="No domain vm1 is running"):
        holds(DomainTarget("vm1"))


def test_a_pidfile_that_was_renamed_is_not_believed(libvirt: Path, emulators: dict[str, int]) -> None:
    write(libvirt, "vm1", emulators["vm1"])
    (libvirt / "vm1.pid").write_text(str(emulators["vm2"]))
    assert holds(DomainTarget("vm1")) == emulators["vm1"]


def test_a_record_that_was_kept_for_a_later_process(libvirt: Path, emulators: dict[str, int]) -> None:
    write(libvirt, "vm1", emulators["vm1"])
    os.utime(libvirt / "vm1.xml", (0, time.time() - 60))
    with pytest.raises(IommufdError, match="was written before that process started, so it is stale"):
        holds(DomainTarget("vm1"))


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (
            r"machine-qemu\x2d2\x2dvm2.scope",
            r"it is in machine-qemu\\x2d2\\x2dvm2.scope, but libvirt has recorded number 1",
        ),
        (r"machine-qemu\x2d11\x2dvm1.scope", "libvirt has recorded number 1 for the domain"),
        (r"machine-qemu\x2d1\x2dvm1.scope", ""),
        (r"virt\x2dmachine-qemu\x2d2\x2dvm2.scope", ""),
        ("libvirtd.service", ""),
        (None, ""),
    ],
)
def test_the_control_group_has_to_be_the_domains(
    libvirt: Path, emulators: dict[str, int], monkeypatch: pytest.MonkeyPatch, unit: str | None, words: str
) -> None:
    write(libvirt, "vm1", emulators["vm1"])
    monkeypatch.setattr(_named_target, "read_units", lambda _process: (unit, None))
    if words:
        with pytest.raises(IommufdError, match=words):
            holds(DomainTarget("vm1"))
    else:
        assert holds(DomainTarget("vm1")) == emulators["vm1"]


def test_a_domain_that_is_shut_off_is_refused(libvirt: Path) -> None:
    (libvirt / "vm1.pid").write_text("1")
    with pytest.raises(IommufdError, match=r"No domain vm1 is running.*shut off"):
        holds(DomainTarget("vm1"))


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc/passwd", "a/b", "/run/vm1.pid", "vm\0"])
def test_a_domain_is_a_name_and_not_a_path(name: str) -> None:
    with pytest.raises(IommufdError, match="a name, not a path"):
        holds(DomainTarget(name))


def unit(name: str, output: str = "", code: int = 0, errors: str = "") -> UnitTarget:
    """A unit of which systemctl says that."""
    return UnitTarget(name, lambda _command: (code, output, errors))


def test_a_units_main_process_is_held(child: subprocess.Popen[bytes]) -> None:
    assert holds(unit("vm@1.service", f"LoadState=loaded\nMainPID={child.pid}\n")) == child.pid


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("LoadState=not-found\nActiveState=inactive\nSubState=dead\nMainPID=0\n", "systemd knows no unit vm.service"),
        (
            "LoadState=loaded\nActiveState=active\nSubState=exited\nMainPID=0\n",
            r"no main process now.*active \(exited\)",
        ),
        ("LoadState=loaded\nActiveState=active\nSubState=running\n", "of a kind that has no main process"),
        ("", "of a kind that has no main process"),
    ],
)
def test_a_unit_without_a_main_process_is_refused(output: str, words: str) -> None:
    with pytest.raises(IommufdError, match=words):
        holds(unit("vm.service", output))


@pytest.mark.parametrize("name", ["vm@.service", "vm@"])
def test_a_template_is_refused(name: str) -> None:
    with pytest.raises(IommufdError, match="is a template"):
        holds(unit(name))


@pytest.mark.parametrize("name", ["", "--host=elsewhere", "vm*.service", "/dev/sda", "a b", "vm\n.service"])
def test_what_is_no_units_name_is_not_asked_for(name: str) -> None:
    with pytest.raises(IommufdError, match="not the name of a systemd unit"):
        holds(unit(name))


def test_systemd_may_not_answer() -> None:
    def missing(_command: list[str]) -> tuple[int, str, str]:
        raise FileNotFoundError(errno.ENOENT, "systemctl")

    with pytest.raises(IommufdError, match=r"systemctl cannot be run .ENOENT"):
        holds(UnitTarget("vm.service", missing))
    with pytest.raises(IommufdError, match=r"Failed to connect to bus\\x1b"):
        holds(unit("vm.service", "", 1, "Failed to connect to bus\x1b[2J\n"))
