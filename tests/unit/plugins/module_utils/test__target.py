# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _target
from ansible_collections.virt.iommufd.plugins.module_utils._errors import (
    DescriptorGone,
    IommufdError,
    NotAnIommufd,
    ProcessGone,
)
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import RLIMIT_MODE, Answer
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._target import (
    DomainTarget,
    PidfileTarget,
    PidTarget,
    Swapped,
    Target,
    UnitTarget,
    borrow_iommufd,
    emulator_uid,
    find_iommufds,
    hold_target,
    parse_pid,
    writers,
)
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel


def test_iommufds_are_found_by_what_is_behind_them(held: Process, null_is_iommufd: FakeKernel) -> None:
    assert set(find_iommufds(held)) == {50, 51}
    assert null_is_iommufd.calls == []


def test_an_iommufd_is_borrowed(held: Process, null_is_iommufd: FakeKernel) -> None:
    null_is_iommufd.mode = 1
    with borrow_iommufd(held, 50) as iommufd:
        assert iommufd.get(RLIMIT_MODE) == Answer(value=1)


@pytest.mark.parametrize(
    ("fd", "exception", "words"),
    [
        (51, NotAnIommufd, "O_PATH"),
        (52, NotAnIommufd, r"not an iommufd. It is pipe:\["),
        (53, NotAnIommufd, "not an iommufd. It is /.*/ten"),
        (60, DescriptorGone, "no descriptor 60"),
        (-1, DescriptorGone, "-1"),
    ],
)
def test_anything_else_is_refused_and_sent_nothing(
    held: Process, null_is_iommufd: FakeKernel, fd: int, exception: type[Exception], words: str
) -> None:
    with pytest.raises(exception, match=words), borrow_iommufd(held, fd):
        pass
    assert null_is_iommufd.calls == []


def test_a_descriptor_that_is_swapped_before_it_is_borrowed_is_sent_nothing(
    held: Process, null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the first look, 53 is what it will never be again.
    monkeypatch.setattr(Process, "character_device", lambda *_args: os.stat(os.devnull).st_rdev)
    with pytest.raises(Swapped, match="/ten"), borrow_iommufd(held, 53):
        pass
    assert null_is_iommufd.calls == []
    # To close it could take for ever.
    left = [name for name in os.listdir("/proc/self/fd") if own_link(name) == own_link("53", held.pid)]
    assert len(left) == 1
    os.close(int(left[0]))


def own_link(name: str, pid: int | str = "self") -> str:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/{pid}/fd/{name}")
    return ""


def test_a_borrowed_iommufd_is_closed_on_every_path(held: Process, null_is_iommufd: FakeKernel) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with borrow_iommufd(held, 50):
        assert len(os.listdir("/proc/self/fd")) == before + 1
    with pytest.raises(ZeroDivisionError), borrow_iommufd(held, 50):
        raise ZeroDivisionError
    with pytest.raises(NotAnIommufd), borrow_iommufd(held, 51):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_iommufds_than_are_worked_on(
    held: Process, null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_target, "IOMMUFDS_MAX", 2)
    assert set(find_iommufds(held)) == {50, 51}
    monkeypatch.setattr(_target, "IOMMUFDS_MAX", 1)
    with pytest.raises(IommufdError, match=r"has more descriptors than are looked through .* 1 on iommufds"):
        find_iommufds(held)
    some = held.character_devices()._replace(more=True)
    monkeypatch.setattr(Process, "character_devices", lambda _process: some)
    with pytest.raises(
        IommufdError, match=r"has more descriptors than are looked through \(262144, 8192 on devices, 1 "
    ):
        find_iommufds(held)


def test_a_descriptor_that_is_closed_while_it_is_shared_was_set_for_nobody(
    held: Process, null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert null_is_iommufd
    with pytest.raises(NotAnIommufd), borrow_iommufd(held, 50):
        monkeypatch.setattr(Process, "character_device", lambda *_args: None)


def test_a_device_that_is_no_iommufd_is_not_even_borrowed(held: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_target, "iommufd_rdevs", lambda _seen: set())
    monkeypatch.setattr(Process, "borrow", lambda *_args: pytest.fail("borrowed"))
    with pytest.raises(NotAnIommufd), borrow_iommufd(held, 50):
        pass


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
    monkeypatch.setattr(_target, "writers", lambda _path: {0: "/", os.getuid(): "/here"})


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


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({0: "/", 4711: "/home/mallory"}, "/home/mallory can be written by uid 4711"),
        ({0: "/", -1: "/srv/shared"}, "/srv/shared can be written by a group or everybody"),
    ],
)
def test_a_pidfile_that_somebody_else_can_write_does_not_count(
    pidfile: Path, monkeypatch: pytest.MonkeyPatch, found: dict[int, str], words: str
) -> None:
    monkeypatch.setattr(_target, "writers", lambda _path: found)
    with pytest.raises(IommufdError, match=words):
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


def test_the_file_that_was_read_is_judged_and_not_what_lies_there(
    pidfile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_target, "writers", lambda _path: {0: "/"})
    pidfile.chmod(0o666)
    with pytest.raises(IommufdError, match="can be written by a group or everybody"):
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


def test_writers_are_whoever_can_decide_what_the_file_says(tmp_path: Path) -> None:
    for folder in ("mine", "shared", "sticky"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pid").touch()
    (tmp_path / "shared").chmod(0o775)
    (tmp_path / "sticky").chmod(0o1777)
    (tmp_path / "way").symlink_to("shared")
    (tmp_path / "absolute").symlink_to(tmp_path / "shared")
    (tmp_path / "loop").symlink_to("loop")
    assert writers(f"{tmp_path}/mine/pid").get(-1) is None
    assert writers(f"{tmp_path}/mine/pid")[os.getuid()]
    assert writers(f"{tmp_path}/sticky/pid").get(-1) is None
    for path in ("shared/pid", "way/pid", "absolute/pid", "shared/../mine/pid", "way/../mine/./pid"):
        assert writers(f"{tmp_path}/{path}")[-1] == f"{tmp_path}/shared"
    (tmp_path / "mine" / "pid").chmod(0o1666)
    assert writers(f"{tmp_path}/mine/pid")[-1] == f"{tmp_path}/mine/pid"
    with pytest.raises(IommufdError, match="too many symbolic links"):
        writers(f"{tmp_path}/loop/pid")
    with pytest.raises(IommufdError, match=r"cannot be looked up .ENOENT"):
        writers(f"{tmp_path}/missing/pid")


STATUS = """
<domstatus state='running' pid='%d'><domain type='kvm' id='1'>
  <seclabel type='dynamic' model='apparmor'><label>libvirt-0815</label></seclabel>
  <seclabel type='dynamic' model='dac'><label>%s</label></seclabel>
</domain></domstatus>
"""


@pytest.mark.parametrize(
    ("label", "uid"), [("+64055:+64055", 64055), ("107:107", 107), ("qemu:qemu", None), ("", None)]
)
def test_the_emulators_user_is_read_from_libvirts_record(label: str, uid: int | None) -> None:
    assert emulator_uid((STATUS % (42, label)).encode()) == uid


def test_a_record_that_is_no_xml_is_refused() -> None:
    with pytest.raises(IommufdError, match="no XML"):
        emulator_uid(b"<domstatus")


@pytest.fixture
def libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Libvirt's state folder, which counts as root's."""
    monkeypatch.setattr(_target, "_LIBVIRT_STATE", str(tmp_path))
    monkeypatch.setattr(_target, "_LIBVIRT_UID", os.getuid())
    return tmp_path


@pytest.fixture
def emulator() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line is that of the domain vm1's emulator."""
    command = ["sh", "-c", "echo ready; read line", "-name", "guest=vm1,debug-threads=on"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def test_a_domains_emulator_is_held(libvirt: Path, emulator: subprocess.Popen[bytes]) -> None:
    (libvirt / "vm1.pid").write_text(str(emulator.pid))
    (libvirt / "vm1.xml").write_text(STATUS % (emulator.pid, f"+{os.getuid()}:+{os.getgid()}"))
    assert holds(DomainTarget("vm1")) == emulator.pid
    (libvirt / "vm1.xml").write_text(STATUS % (emulator.pid, "+4711:+4711"))
    with pytest.raises(IommufdError, match="libvirt runs that as uid 4711"):
        holds(DomainTarget("vm1"))
    (libvirt / "vm1.xml").unlink()
    with pytest.raises(IommufdError, match="libvirt's record of the domain, cannot be read"):
        holds(DomainTarget("vm1"))
    (libvirt / "vm2.pid").write_text(str(emulator.pid))
    with pytest.raises(IommufdError, match=r"not the emulator of domain vm2: .* is vm1\. .* is stale"):
        holds(DomainTarget("vm2"))
    (libvirt / "vm3.pid").write_text(str(os.getpid()))
    with pytest.raises(IommufdError, match="on its command line is none"):
        holds(DomainTarget("vm3"))


@pytest.mark.parametrize("suffix", ["pid", "xml"])
def test_a_record_that_is_not_libvirts_does_not_count(
    libvirt: Path, emulator: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    (libvirt / "vm1.pid").write_text(str(emulator.pid))
    (libvirt / "vm1.xml").write_text(STATUS % (emulator.pid, f"+{os.getuid()}:+{os.getgid()}"))
    real, theirs = os.fstat, os.stat(libvirt / f"vm1.{suffix}").st_ino

    def somebody_elses(fd: int) -> os.stat_result:
        status = real(fd)
        return os.stat_result([*status[:4], 4711, *status[5:]]) if status.st_ino == theirs else status

    monkeypatch.setattr(os, "fstat", somebody_elses)
    with pytest.raises(IommufdError, match=f"vm1.{suffix} is not libvirt's: it belongs to uid 4711"):
        holds(DomainTarget("vm1"))


def test_a_domain_that_is_shut_off_is_refused(libvirt: Path) -> None:
    with pytest.raises(IommufdError, match=r"No domain vm1 is running.*shut off"):
        holds(DomainTarget("vm1"))
    (libvirt / "vm1.pid").touch()
    with pytest.raises(IommufdError, match="is empty"):
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

    with pytest.raises(IommufdError, match=r"systemctl does not run .ENOENT"):
        holds(UnitTarget("vm.service", missing))
    with pytest.raises(IommufdError, match=r"Failed to connect to bus\\x1b"):
        holds(unit("vm.service", "", 1, "Failed to connect to bus\x1b[2J\n"))
