# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _libvirt
from ansible_collections.virt.iommufd.plugins.module_utils._errors import AccessRefused, IommufdError, ProcessGone
from ansible_collections.virt.iommufd.plugins.module_utils._libvirt import (
    Libvirt,
    Session,
    daemon_unit_of,
    find_daemons,
    library_version,
    look_at_libvirt,
    mapped_libraries,
    offers_iommufd,
    sets_rlimit_mode,
    starts_domains,
)
from ansible_collections.virt.iommufd.plugins.module_utils._libvirt_files import (
    NOTHING_READ,
    Abilities,
    LibvirtFiles,
    VmUser,
)
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit, read_memlock
from ansible_collections.virt.iommufd.plugins.module_utils._selinux import Verdict
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import Run, parse_units

HOSTDEV = "<devices><hostdev><enum name='iommufd'>%s</enum></hostdev></devices>"
ALL = "cap_chown cap_sys_resource cap_ipc_lock"


def unit(name: str, **properties: str) -> str:
    shown = {"LoadState": "loaded", "ActiveState": "inactive", "MainPID": "0", "User": "", "PrivateUsers": "no"}
    shown |= {"LimitMEMLOCK": "67108864", "LimitMEMLOCKSoft": "8388608"}
    shown |= {"CapabilityBoundingSet": ALL, "AmbientCapabilities": "", **properties}
    return "".join(f"{key}={value}\n" for key, value in {"Id": name, **shown}.items())


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (b"/usr/lib/x86_64-linux-gnu/libvirt.so.0.11003.0", (11, 3, 0)),
        (b"7f00-7f01 r--p 0 fe:00 1 /usr/lib64/libvirt.so.0.12008.1 (deleted)\n", (12, 8, 1)),
        (b"/usr/lib/libvirt.so.0.12000.0\n/usr/lib/libvirt.so.0.12010.0\n", (12, 10, 0)),
        (b"/usr/lib/libvirt.so.0\n/usr/lib/libvirt-qemu.so.0.12008.0\n", None),
        (b"", None),
    ],
)
def test_the_version_is_in_the_librarys_name(text: bytes, version: tuple[int, int, int] | None) -> None:
    assert library_version(text) == version


BOTH = ("CapabilityBoundingSet=~CAP_SYS_RESOURCE", "CapabilityBoundingSet=CAP_SYS_RESOURCE")
AMBIENT = "AmbientCapabilities=CAP_SYS_RESOURCE"


@pytest.mark.parametrize(
    ("properties", "may", "cure"),
    [
        ({}, True, ()),
        ({"User": "root"}, True, ()),
        ({"CapabilityBoundingSet": "cap_chown"}, False, BOTH),
        ({"User": "libvirt"}, False, (AMBIENT,)),
        ({"User": "libvirt", "CapabilityBoundingSet": ""}, False, (*BOTH, AMBIENT)),
        ({"User": "libvirt", "AmbientCapabilities": "cap_sys_resource"}, True, ()),
        # SECBIT_NOROOT, as systemd shows it, and may show it once.
        ({"SecureBits": "1"}, False, (AMBIENT,)),
        ({"SecureBits": "keep-caps noroot"}, False, (AMBIENT,)),
        ({"SecureBits": "2"}, True, ()),
        ({"SecureBits": "1", "AmbientCapabilities": "cap_sys_resource"}, True, ()),
        ({"PrivateUsers": "yes"}, False, ("PrivateUsers=no",)),
        ({"PrivateUsers": "yes", "CapabilityBoundingSet": ""}, False, (*BOTH, "PrivateUsers=no")),
    ],
)
def test_what_a_unit_would_run_with(properties: dict[str, str], may: bool, cure: tuple[str, ...]) -> None:
    (shown,) = parse_units(unit("virtqemud.service", **properties))
    assert (daemon_unit_of(shown).may, daemon_unit_of(shown).drop_in) == (may, cure)


@pytest.mark.parametrize(
    ("properties", "memlock"),
    [
        ({}, Limit(8388608, 67108864)),
        ({"LimitMEMLOCK": "infinity"}, Limit(8388608, None)),
        ({"LimitMEMLOCK": "[not set]"}, None),
    ],
)
def test_the_limit_that_a_unit_would_give(properties: dict[str, str], memlock: Limit | None) -> None:
    (shown,) = parse_units(unit("virtqemud.service", **properties))
    assert daemon_unit_of(shown).memlock == memlock
    assert look_at_libvirt(answer(unit("virtqemud.service", **properties))).memlock == memlock


def test_what_systemd_does_not_say_of_a_unit() -> None:
    found = daemon_unit_of({})
    assert (found.may, found.drop_in, found.memlock) == (None, (), None)


@pytest.mark.parametrize(
    ("properties", "passes"),
    [
        ({}, None),
        ({"NoNewPrivileges": "no"}, True),
        ({"NoNewPrivileges": "yes"}, False),
        ({"NoNewPrivileges": "no", "CapabilityBoundingSet": "cap_chown"}, False),
        ({"NoNewPrivileges": "no", "PrivateUsers": "yes"}, False),
    ],
)
def test_whether_what_a_unit_starts_gets_what_its_file_gives(properties: dict[str, str], passes: bool | None) -> None:
    (shown,) = parse_units(unit("virtqemud.service", **properties))
    assert daemon_unit_of(shown).passes is passes
    assert look_at_libvirt(answer(unit("virtqemud.service", **properties))).passes is passes


HARD = "CapabilityBoundingSet=~CAP_SYS_RESOURCE"
# The reason of a libvirt that may not.
MAY_NOT = "cannot set per-process accounting"


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize(
    ("files", "shown", "has", "lacks", "takes", "reason"),
    [
        # Taken away, given back by the role, and given back by somebody else.
        ({"10.conf": HARD}, "", False, True, True, f"{MAY_NOT}: .*10.conf:2: {HARD}' takes the capability away."),
        ({"10.conf": HARD, "zz-iommufd_host.conf": "\n".join(BOTH)}, ALL, True, False, True, "CAP_SYS_RESOURCE."),
        ({"10.conf": HARD, "20.conf": "\n".join(BOTH)}, ALL, True, False, False, "CAP_SYS_RESOURCE."),
        # The role gives it back, and somebody takes it away after that.
        (
            {"10.conf": HARD, "zz-iommufd_host.conf": "\n".join(BOTH), "zzz.conf": HARD},
            "",
            False,
            True,
            True,
            f"{MAY_NOT}: .*10.conf:2: {HARD}' and '.*/zzz.conf:2: {HARD}' take the capability away.",
        ),
    ],
)
def test_what_the_files_of_its_unit_take(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    runs: bool,
    files: dict[str, str],
    shown: str,
    has: bool,
    lacks: bool,
    takes: bool,
    reason: str,
) -> None:
    found = look_at_files(monkeypatch, tmp_path, files, runs and has, CapabilityBoundingSet=shown, MainPID=pid_of(runs))
    assert (found.may, bool(found.drop_in), bool(found.taken_by)) == (has, lacks, takes)
    assert re.search(reason, sets_rlimit_mode(found._replace(**KNOWN), None)[1])
    assert not found.needs_restart


# What libvirt's own files tell of a libvirt that sets the mode.
KNOWN: dict[str, Any] = {"version": (12, 8, 0), "installed": (12, 8, 0), "files": LibvirtFiles(Abilities(True, True))}


def pid_of(runs: bool) -> str:
    return str(os.getpid()) if runs else "0"


def look_at_files(
    monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str], has: bool, **properties: str
) -> Libvirt:
    """Looks at a unit with these drop-ins, whose daemon, if it runs, has the capability or not."""
    monkeypatch.setattr(_libvirt, "capability_names", lambda _mask: ("cap_sys_resource",) if has else ())
    monkeypatch.setattr(_libvirt, "in_initial_user_namespace", lambda _process: True)
    monkeypatch.setattr(_libvirt, "lets_use", lambda _capability, _context: Verdict(True, ""))
    for name, text in files.items():
        (folder / name).write_text(f"[Service]\n{text}\n", "utf-8")
    paths = " ".join(str(folder / name) for name in sorted(files))
    return look_at_libvirt(answer(unit("libvirtd.service", DropInPaths=paths, **properties)))


@pytest.mark.parametrize(
    ("files", "shown", "outdated", "has", "lacks", "needs_restart", "reason"),
    [
        # Its unit was mended, and systemd has read that, or not; or was hardened since the daemon was started.
        ({}, ALL, "no", False, False, True, "Its unit would give it the capability: restart the daemon"),
        ({"10.conf": ""}, "", "yes", False, False, True, "run systemctl daemon-reload, and restart the daemon."),
        ({"10.conf": HARD}, "", "no", True, True, True, f"At a later start it will lack that: .*10.conf:2: {HARD}'"),
        ({"10.conf": HARD}, ALL, "yes", True, True, True, f"At a later start it will lack that: .*10.conf:2: {HARD}'"),
    ],
)
def test_a_daemon_that_runs_with_old_settings(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    files: dict[str, str],
    shown: str,
    outdated: str,
    has: bool,
    lacks: bool,
    needs_restart: bool,
    reason: str,
) -> None:
    properties = {"CapabilityBoundingSet": shown, "NeedDaemonReload": outdated, "MainPID": pid_of(True)}
    found = look_at_files(monkeypatch, tmp_path, files, has, **properties)
    assert (found.may, bool(found.drop_in), found.needs_restart) == (has, lacks, needs_restart)
    assert found.unit_outdated == (outdated == "yes")
    assert re.search(reason, sets_rlimit_mode(found._replace(**KNOWN), None)[1])


@pytest.mark.parametrize("files", [{"10.conf": ""}, {"10.conf": "CapabilityBoundingSet=~CAP_KILL"}])
def test_lines_that_are_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str]) -> None:
    """systemd shows something else than its files say, or they cannot be read."""
    found = look_at_files(monkeypatch, tmp_path, files, False, CapabilityBoundingSet="")
    assert (found.drop_in, found.taken_by) == (BOTH, None)
    assert "systemd reads its files in another way" in found.msgs[-1]
    (tmp_path / "10.conf").unlink()
    (tmp_path / "10.conf").mkdir()
    found = look_at_files(monkeypatch, tmp_path, {}, False, CapabilityBoundingSet="", FragmentPath=str(tmp_path))
    assert (found.drop_in, found.taken_by) == (BOTH, None)
    assert "cannot be read (EISDIR" in found.msgs[-1]
    assert sets_rlimit_mode(found._replace(**KNOWN), None)[1].endswith("iommufd='yes'.")


def test_a_unit_that_lacks_nothing_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_libvirt, "read_lines", pytest.fail)
    found = look_at_libvirt(answer(unit("libvirtd.service", DropInPaths="/a/10.conf")))
    assert (found.drop_in, found.taken_by, found.unit_outdated, found.needs_restart) == ((), (), False, False)


def test_the_context_that_a_unit_sets() -> None:
    (shown,) = parse_units(unit("virtqemud.service", SELinuxContext="-a:b:c"))
    assert daemon_unit_of(shown).context == "a:b:c"


def answer(*units: str) -> Run:
    return lambda _command: (0, "\n".join(units), "")


@pytest.mark.parametrize(
    ("units", "chosen"),
    [
        ([unit("virtqemud.service"), unit("libvirtd.service")], "virtqemud.service"),
        (
            [unit("virtqemud.service"), unit("libvirtd.service"), unit("libvirtd.socket", ActiveState="active")],
            "libvirtd.service",
        ),
        ([unit("virtqemud.service", LoadState="not-found"), unit("libvirtd.service")], "libvirtd.service"),
        ([unit("libvirtd.socket", ActiveState="active")], None),
        ([], None),
    ],
)
def test_which_daemon_drives_qemu(units: list[str], chosen: str | None) -> None:
    assert look_at_libvirt(answer(*units)).unit == chosen


def test_a_running_daemon_is_looked_at_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "read", lambda _self, name: b"/lib/libvirt.so.0.12008.0" if name == "maps" else b"")
    running = unit("virtqemud.service", MainPID=str(os.getpid()), CapabilityBoundingSet="")
    found = look_at_libvirt(answer(unit("libvirtd.service"), running))
    assert (found.unit, found.pid, found.version) == ("virtqemud.service", os.getpid(), (12, 8, 0))
    assert found.may is not None
    assert found.passes is not None
    # Its own limit, and not that of its unit.
    with Process.hold(os.getpid()) as process:
        assert found.memlock == read_memlock(process)
        monkeypatch.setattr(_libvirt, "started_at", lambda _ticks: 7.5)
        asked = read_by(monkeypatch)
        look_at_libvirt(answer(running))
        # What one that starts anew would be is told by what is on disk.
        assert [started for _libraries, started in asked] == [7.5, None]


MAPS = b"""\
7f0000000000-7f0000001000 r--p 00000000 fe:00 1    /usr/lib/libc.so.6
00400000-7f0000003000 r-xp 00000000 fe:00 2    /usr/lib/x86_64-linux-gnu/libvirt.so.0.12008.0%s
7f0000004000-7f0000005000 r-xp 00000000 fe:00 3    /usr/lib/x86_64-linux-gnu/libvirt-qemu.so.0.12008.0
"""


def test_a_daemon_that_starts_anew(prefixes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has what is on disk by then, what its unit gives it, and the user that qemu.conf names."""
    library = os.path.realpath(prefixes / "usr/lib/x86/libvirt.so.0")

    def read(libraries: Sequence[str], started: float | None) -> LibvirtFiles:
        sets = list(libraries) == [library]
        assert (started is None) is sets
        return LibvirtFiles(Abilities(sets, sets), VmUser("vm", 7), VmUser("root", 0))

    monkeypatch.setattr(_libvirt, "read_libvirt_files", read)
    monkeypatch.setattr(_libvirt, "mapped_libraries", lambda pid, _maps: [f"/proc/{pid}/map_files/1-2"])
    unit_ = unit("virtqemud.service", MainPID=str(os.getpid()), CapabilityBoundingSet="cap_kill", LimitMEMLOCK="7")
    found = look_at_libvirt(answer(unit_))
    then = found.at_boot
    assert then is not None
    assert (found.files.abilities.sets, found.files.user.name) == (False, "vm")
    assert (then.version, then.pid, then.may, then.files.abilities.sets) == ((12, 8, 0), None, False, True)
    assert (then.files.user, then.memlock) == (VmUser("root", 0), Limit(8388608, 7))
    # Nothing of the unit counts that systemd has not read.
    changed = look_at_libvirt(answer(f"{unit_}NeedDaemonReload=yes\n")).at_boot
    assert changed is not None
    assert (changed.may, changed.memlock, changed.passes, changed.files.user.uid) == (None, None, None, 0)
    # One that does not run is like that already.
    monkeypatch.setattr(_libvirt, "read_libvirt_files", lambda *_args: LibvirtFiles())
    assert look_at_libvirt(answer(unit("virtqemud.service"))).at_boot is None
    waits = look_at_libvirt(answer(unit("virtqemud.service", NeedDaemonReload="yes")))
    assert waits.at_boot is not None


@pytest.mark.parametrize("gone", [b"", b" (deleted)"])
def test_the_library_that_a_daemon_has_mapped(gone: bytes) -> None:
    """Also where a package has replaced the file since."""
    assert mapped_libraries(7, MAPS % gone) == ["/proc/7/map_files/400000-7f0000003000"]
    assert mapped_libraries(7, b"") == []


def read_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float | None]]:
    """What libvirt's files are read by: the libraries, and when the daemon that runs was started."""
    asked: list[tuple[list[str], float | None]] = []

    def read(libraries: Sequence[str], started: float | None) -> LibvirtFiles:
        asked.append((list(libraries), started))
        return LibvirtFiles(Abilities(True, True), msgs=("Something.",))

    monkeypatch.setattr(_libvirt, "read_libvirt_files", read)
    return asked


@pytest.fixture
def prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with libvirt in `usr` and in `local`."""
    for name, version in (("usr/lib/x86", "12008.0"), ("local/lib64", "11003.0")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"libvirt.so.0.{version}").touch()
        # What is left of an older version is not what is used.
        (tmp_path / name / "libvirt.so.0.13000.0").touch()
        (tmp_path / name / "libvirt.so.0").symlink_to(f"libvirt.so.0.{version}")
    monkeypatch.setattr(_libvirt, "_PREFIXES", (str(tmp_path / "usr"),))
    return tmp_path


def test_the_library_on_disk(prefixes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = read_by(monkeypatch)
    found = look_at_libvirt(answer(unit("virtqemud.service")))
    assert (found.version, found.installed, found.msgs) == ((12, 8, 0), (12, 8, 0), ("Something.",))
    assert asked == [([f"{prefixes}/usr/lib/x86/libvirt.so.0.12008.0"], None)]


def test_one_library_of_several(prefixes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one beside the program that the unit starts."""
    asked = read_by(monkeypatch)
    monkeypatch.setattr(_libvirt, "_PREFIXES", (f"{prefixes}/usr", f"{prefixes}/local"))
    started = f"ExecStart={{ path={prefixes}/local/sbin/virtqemud ; argv[]=virtqemud ; }}\n"

    def run(words: list[str]) -> tuple[int, str, str]:
        return 0, started if "--property=ExecStart" in words else unit("virtqemud.service"), ""

    assert look_at_libvirt(run).version == (11, 3, 0)
    assert asked == [([f"{prefixes}/local/lib64/libvirt.so.0.11003.0"], None)]
    # Somewhere else altogether.
    monkeypatch.setattr(_libvirt, "_PREFIXES", ())
    assert look_at_libvirt(run).version == (11, 3, 0)
    # Where that is not told, all of them are read, and what they differ in is not known.
    monkeypatch.setattr(_libvirt, "_PREFIXES", (f"{prefixes}/usr", f"{prefixes}/local"))
    assert look_at_libvirt(answer(unit("virtqemud.service"))).msgs[0].startswith("Which library libvirt's daemon would")
    assert len(asked[-1][0]) == 2


@pytest.mark.parametrize(
    ("units", "daemons", "other_root", "maps", "words"),
    [
        # Root's own, as by hand, or in a container whose processes are seen.
        (
            [],
            {0: [41, 42]},
            (),
            b"",
            "libvirt runs in no unit of this host, perhaps in a container: there is process 41.",
        ),
        ([unit("virtqemud.service")], {0: [41, 42]}, (42,), b"", "perhaps in a container: there is process 42."),
        # It has just been started by its socket, or users have their own.
        ([unit("virtqemud.service")], {0: [41]}, (), b"", ""),
        ([], {7: [41]}, (41,), b"", ""),
        # The unit has a container, or starts one.
        (
            [unit("a.service", MainPID="40", ActiveState="active")],
            {},
            (40,),
            b"/libvirt.so.0",
            "a.service runs something",
        ),
        ([unit("a.service", MainPID="40", ActiveState="active")], {}, (), b"/libc.so.6\n", "a.service runs something"),
        ([unit("a.service", MainPID="40", ActiveState="activating")], {}, (40,), b"/libc.so.6\n", ""),
        ([unit("a.service", MainPID="40", ActiveState="active")], {0: [41]}, (41,), b"/libvirt.so.0.12", ""),
    ],
)
def test_a_libvirt_that_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
    prefixes: Path,
    units: list[str],
    daemons: dict[int, list[int]],
    other_root: tuple[int, ...],
    maps: bytes,
    words: str,
) -> None:
    """Neither the library nor the configuration of this host tell of it."""
    read_by(monkeypatch)
    process = SimpleNamespace(read=lambda _name: maps)
    monkeypatch.setattr(_libvirt, "find_daemons", lambda: daemons)
    monkeypatch.setattr(_libvirt, "_has_other_root", lambda pid: pid in other_root)
    monkeypatch.setattr(
        _libvirt, "_by_unit", lambda _run, unit, _libraries: Libvirt((1, 2, 3), None, unit.name, 1, True)
    )
    monkeypatch.setattr(_libvirt, "_sessions", lambda _managers, _daemons: [])
    monkeypatch.setattr(_libvirt, "Process", SimpleNamespace(hold=lambda _pid: contextlib.nullcontext(process)))
    found = look_at_libvirt(answer(*(units or [unit("virtqemud.service", LoadState="not-found")])))
    if not words:
        assert "container" not in " ".join(found.msgs)
        return
    assert words in found.msgs[0]
    assert (found.unit, found.version, found.files) == (None, None, NOTHING_READ)
    assert sets_rlimit_mode(found, None) == (None, found.msgs[0])


def test_a_process_in_another_root(tmp_path: Path) -> None:
    assert not _libvirt._has_other_root(os.getpid())
    assert not _libvirt._has_other_root(2**31 - 1)
    if os.getuid():
        return
    pid = os.fork()
    if not pid:
        os.chroot(tmp_path)
        while True:
            signal.pause()
    try:
        deadline = time.monotonic() + 30
        while not _libvirt._has_other_root(pid):
            assert time.monotonic() < deadline
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_host_without_libvirt_has_none_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_libvirt, "_PREFIXES", ())
    monkeypatch.setattr(_libvirt, "read_libvirt_files", pytest.fail)
    assert look_at_libvirt(answer(unit("virtqemud.service", LoadState="not-found"))).msgs == ()


def test_what_users_may_raise_a_limit_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is that of the service manager which runs, whatever its unit says."""
    read_by(monkeypatch)
    none = unit("virtqemud.service", LoadState="not-found")
    managers = [
        unit("user@4294967294.service", MainPID=str(os.getpid()), ActiveState="active", LimitMEMLOCK="1"),
        unit("user@0.service", MainPID=str(os.getpid()), ActiveState="active"),
        unit("user@7.service", MainPID="2147483647"),
        unit("user@8.service", MainPID="0"),
    ]
    with Process.hold(os.getpid()) as process:
        memlock = read_memlock(process)
    found = look_at_libvirt(answer(none, *managers))
    assert found.sessions == (Session(0, "root", memlock), Session(4294967294, None, memlock))
    # None of them is libvirt's daemon.
    assert (found.unit, found.msgs) == (None, ())

    def refuse(_process: Process) -> Limit:
        raise AccessRefused("It is hidden.")

    monkeypatch.setattr(_libvirt, "read_memlock", refuse)
    assert look_at_libvirt(answer(none, *managers)).sessions[0] == Session(0, "root", None)


def of_daemons(monkeypatch: pytest.MonkeyPatch, daemons: dict[int, Limit | None], uid: int = 7) -> tuple[Session, ...]:
    """The sessions of a host where daemons of that user run, with these limits, beside the user's service manager."""

    @contextlib.contextmanager
    def hold(pid: int) -> Iterator[Any]:
        if pid == 99:
            raise ProcessGone("It has ended.")
        yield SimpleNamespace(pid=pid, uid=0 if pid == 98 else uid, comm="libvirtd" if pid < 97 else "virsh")

    def memlock(process: Any) -> Limit:
        found = Limit(1, 2) if process.pid == 1 else daemons[process.pid]
        if found is None:
            raise AccessRefused("It is hidden.")
        return found

    read_by(monkeypatch)
    monkeypatch.setattr(_libvirt, "user_name", lambda _uid: None)
    monkeypatch.setattr(_libvirt, "find_daemons", lambda: {uid: list(daemons)})
    monkeypatch.setattr(_libvirt, "read_memlock", memlock)
    monkeypatch.setattr(_libvirt, "Process", SimpleNamespace(hold=hold))
    return look_at_libvirt(answer(unit("virtqemud.service"), unit("user@7.service", MainPID="1"))).sessions


LOW, HIGH = Limit(4096, 8388608), Limit(4096, None)


@pytest.mark.parametrize(
    ("daemons", "memlock", "pid"),
    [
        ({}, Limit(1, 2), None),
        ({20: LOW}, LOW, 20),
        ({20: HIGH}, HIGH, 20),
        ({20: None}, None, 20),
        ({20: LOW, 21: LOW}, LOW, 20),
        ({20: LOW, 21: HIGH}, None, 20),
        ({20: LOW, 21: None}, None, 20),
        # Too many to look at.
        (dict.fromkeys(range(20, 20 + 9), LOW), None, 20),
        # Those have ended, and the ids of two are others'.
        ({97: HIGH, 98: HIGH, 99: HIGH}, Limit(1, 2), None),
        ({20: LOW, 97: HIGH, 98: HIGH, 99: HIGH}, LOW, 20),
    ],
)
def test_a_daemon_of_a_user_has_a_limit_of_its_own(
    monkeypatch: pytest.MonkeyPatch, daemons: dict[int, Limit | None], memlock: Limit | None, pid: int | None
) -> None:
    """As one that was started from a login."""
    assert of_daemons(monkeypatch, daemons) == (Session(7, None, memlock, pid),)


def test_a_daemon_of_a_user_without_a_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_daemons(monkeypatch, {20: LOW}, uid=6)[0] == Session(6, None, LOW, 20)


@pytest.fixture
def named() -> Iterator[Callable[[str, int], int]]:
    """Processes of a name and a user, which is not root's: that one's daemon is the system's."""
    pids = []

    def start(name: str, uid: int) -> int:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                Path("/proc/self/comm").write_text(name)
                if os.getuid() != uid:
                    os.setuid(uid)
                os.write(writing, b".")
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        pids.append(pid)
        os.close(writing)
        assert os.read(reading, 1) == b"."
        os.close(reading)
        return pid

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_who_seems_to_be_a_daemon_of_a_users_own(
    named: Callable[[str, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name and the user. It is none where there is no libvirt."""
    uid = os.getuid() or 4711
    contained: list[tuple[str, str]] = []
    monkeypatch.setattr(_libvirt, "in_initial_namespace", lambda kind, pid: (kind, pid) not in contained)
    pids = [named(name, uid) for name in ("virtqemud", "libvirtd", "virtqemud-x", "qemu-kvm")]
    assert [each for each in find_daemons().get(uid, []) if each in pids] == pids[:2]
    if not os.getuid():
        assert named("libvirtd", 0) in find_daemons()[0]
    # What a container has is of no concern to the host.
    for kind in ("pid", "user"):
        contained[:] = [(kind, str(pids[0]))]
        assert pids[0] not in find_daemons().get(uid, [])
        assert pids[1] in find_daemons()[uid]
    pids += [named("virtqemud", uid) for _each in range(9)]
    assert len(find_daemons()[uid]) == 9
    monkeypatch.setattr(_libvirt, "_PREFIXES", ())
    monkeypatch.setattr(_libvirt, "find_daemons", lambda: {uid: pids})
    assert look_at_libvirt(answer(unit("virtqemud.service", LoadState="not-found"))).sessions == ()


@pytest.mark.parametrize("error", [AccessRefused, IommufdError])
def test_its_memory_map_cannot_be_read(monkeypatch: pytest.MonkeyPatch, error: type[IommufdError]) -> None:
    def refuse(_self: Process, _name: str) -> bytes:
        raise error("It is hidden.")

    monkeypatch.setattr(Process, "read", refuse)
    found = look_at_libvirt(answer(unit("virtqemud.service", MainPID=str(os.getpid()))))
    assert found.version == found.installed
    assert found.pid == os.getpid()
    assert found.msgs[0] == "The version that the running daemon has mapped: It is hidden."


def test_it_has_just_ended() -> None:
    found = look_at_libvirt(answer(unit("virtqemud.service", MainPID="2147483647")))
    assert found.pid is None
    assert found.may is True


def test_it_ends_while_its_files_are_read(monkeypatch: pytest.MonkeyPatch, prefixes: Path) -> None:
    """Its library was to be read by its id, which means nothing then, or another process."""
    library = prefixes / "usr/lib/x86/libvirt.so.0.12008.0"
    asked: list[list[str]] = []
    ended: list[bool] = []

    def read(libraries: Sequence[str], _started: float | None) -> LibvirtFiles:
        asked.append(list(libraries))
        ended.append(True)
        return LibvirtFiles(Abilities(True, len(asked) > 1))

    def check(process: Process) -> None:
        if ended:
            raise ProcessGone(f"{process} has ended.")

    pid = os.getpid()
    monkeypatch.setattr(_libvirt, "read_libvirt_files", read)
    monkeypatch.setattr(_libvirt, "mapped_libraries", lambda pid, _maps: [f"/proc/{pid}/map_files/1-2"])
    monkeypatch.setattr(Process, "check_alive", check)
    found = look_at_libvirt(answer(unit("virtqemud.service", MainPID=str(pid))))
    assert asked == [[f"/proc/{pid}/map_files/1-2"], [str(library)]]
    assert (found.pid, found.files.abilities.sets) == (None, True)
    assert found.msgs[0].endswith("has ended.")


@pytest.mark.parametrize("daemon", ["not running", "running", "just ended"])
@pytest.mark.parametrize(("allowed", "may"), [(True, True), (False, False), (None, None)])
def test_what_selinux_leaves(
    monkeypatch: pytest.MonkeyPatch, daemon: str, allowed: bool | None, may: bool | None
) -> None:
    pid = {"not running": 0, "running": os.getpid(), "just ended": 2147483647}[daemon]
    monkeypatch.setattr(_libvirt, "capability_names", lambda _mask: ("cap_sys_resource",))
    monkeypatch.setattr(_libvirt, "lets_use", lambda _capability, _context: Verdict(allowed, "so it is"))
    monkeypatch.setattr(_libvirt, "in_initial_user_namespace", lambda _process: True)
    found = look_at_libvirt(answer(unit("virtqemud.service", MainPID=str(pid))))
    assert (found.may, found.why) == (may, "so it is")


@pytest.mark.parametrize(
    ("started", "context"),
    [
        ("ExecStart={ path=/usr/sbin/virtqemud ; argv[]=/usr/sbin/virtqemud -a\n\n-b ; }\n", "/usr/sbin/virtqemud"),
        ("", "IommufdError"),
    ],
)
def test_what_a_unit_starts_is_asked_for_alone(monkeypatch: pytest.MonkeyPatch, started: str, context: str) -> None:
    def run(words: list[str]) -> tuple[int, str, str]:
        return 0, started if "--property=ExecStart" in words else unit("virtqemud.service"), ""

    def lets_use(_capability: str, context: Callable[[], str]) -> Verdict:
        try:
            return Verdict(None, context())
        except IommufdError as exc:
            return Verdict(None, type(exc).__name__)

    monkeypatch.setattr(_libvirt, "lets_use", lets_use)
    monkeypatch.setattr(_libvirt, "context_of_service", lambda program: program)
    assert look_at_libvirt(run).why == context


def test_what_a_daemon_has_not_selinux_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_libvirt, "lets_use", pytest.fail)
    found = look_at_libvirt(answer(unit("virtqemud.service", CapabilityBoundingSet="")))
    assert (found.may, found.why) == (False, "")


@pytest.mark.parametrize("fails", [True, False])
def test_systemd_may_not_answer(fails: bool) -> None:
    def run(_command: list[str]) -> tuple[int, str, str]:
        if fails:
            raise FileNotFoundError(2, "no")
        return 1, "", "Failed to connect\n"

    assert "systemd cannot be asked" in look_at_libvirt(run).msgs[0]


def libvirt(version: Any = (12, 8, 0), can: bool | None = True, **other: Any) -> Libvirt:
    """A libvirt of that version. `can`: what its library has."""
    files = LibvirtFiles(Abilities(can, can))
    fields = {"installed": version, "unit": "virtqemud.service", "pid": 7, "may": True, "files": files}
    return Libvirt(**{**fields, **other, "version": version})


@pytest.mark.parametrize(
    ("found", "offers", "sets", "starts", "reason"),
    [
        (
            libvirt(),
            None,
            True,
            True,
            "libvirt 12.8.0 sets per-process accounting, as all since 12.1.0, and its daemon runs with"
            " CAP_SYS_RESOURCE.",
        ),
        (libvirt((12, 1, 0)), True, True, True, "12.1.0 sets per-process accounting"),
        (
            libvirt((12, 0, 9), can=False),
            None,
            False,
            False,
            "libvirt 12.0.9 does not set per-process accounting: 12.1.0 is the first that does.",
        ),
        # A distribution has taken the feature into an older version, or left it out of a newer one.
        (
            libvirt((11, 10, 0)),
            None,
            True,
            True,
            "libvirt 11.10.0 sets per-process accounting, though 12.1.0 was the first release that did, and its daemon",
        ),
        (
            libvirt((12, 8, 0), can=False),
            None,
            False,
            False,
            "libvirt 12.8.0 does not set per-process accounting: its library has nothing that does, though 12.1.0 was",
        ),
        (
            libvirt((12, 0, 9), files=LibvirtFiles(Abilities(True, False))),
            None,
            False,
            True,
            "libvirt 12.0.9 does not set per-process accounting",
        ),
        (
            libvirt((12, 0, 9), can=False),
            True,
            None,
            False,
            "libvirt 12.0.9 offers iommufd for a device, but its library has nothing that sets per-process accounting.",
        ),
        (
            libvirt((11, 3, 0), can=False, installed=(12, 8, 0)),
            None,
            False,
            False,
            "12.8.0 is installed, but its daemon was not",
        ),
        (
            libvirt(pid=None),
            None,
            True,
            True,
            "virtqemud.service, when it starts, would run with CAP_SYS_RESOURCE",
        ),
        (
            libvirt(may=False, drop_in=BOTH),
            None,
            False,
            False,
            "libvirt 12.8.0 cannot set per-process accounting: its daemon runs without CAP_SYS_RESOURCE in the initial"
            " user namespace. So it starts no domain whose devices have iommufd='yes'.",
        ),
        # It was started before its unit was changed.
        (libvirt(may=False), None, False, False, "Its unit would give it the capability: restart the daemon, or run"),
        (libvirt(may=False, pid=None), None, False, False, "would run without CAP_SYS_RESOURCE"),
        (
            libvirt(may=None),
            None,
            None,
            None,
            "libvirt 12.8.0 sets per-process accounting if its daemon has CAP_SYS_RESOURCE",
        ),
        (
            libvirt(may=False, why="SELinux's policy denies sys_resource to a:b:c"),
            None,
            False,
            False,
            "its daemon runs with CAP_SYS_RESOURCE, but SELinux's policy denies sys_resource to a:b:c. Allow it",
        ),
        (libvirt(may=None, why="SELinux is silent"), None, None, None, "which cannot be told. SELinux is silent."),
        (libvirt(), False, False, False, "libvirt 12.8.0 could set per-process accounting, but does not offer iommufd"),
        (libvirt(None, can=None), None, None, None, "The version of libvirt cannot be told"),
        (libvirt(None), None, True, True, "libvirt sets per-process accounting, as all since 12.1.0"),
        # The version alone proves nothing.
        (libvirt(can=None), None, None, None, "libvirt 12.8.0 may set per-process accounting: its library, which"),
        (libvirt(unit=None), None, False, False, "There is no system libvirt"),
        (libvirt(unit=None, msgs=("systemd is not here.",)), None, None, None, "systemd is not here."),
    ],
)
def test_whether_it_sets_the_mode(
    found: Libvirt, offers: bool | None, sets: bool | None, starts: bool | None, reason: str
) -> None:
    said, why = sets_rlimit_mode(found, offers)
    assert said is sets
    assert reason in why
    assert starts_domains(found, offers) is starts


@pytest.mark.parametrize(
    ("text", "offers"),
    [
        (f"<domainCapabilities>{HOSTDEV % '<value>yes</value>'}</domainCapabilities>", True),
        (f"<domainCapabilities>{HOSTDEV % ''}</domainCapabilities>", False),
        ("<domainCapabilities/>", False),
        ("error: no", None),
    ],
)
def test_what_it_offers(text: str, offers: bool | None) -> None:
    assert offers_iommufd(text) is offers
