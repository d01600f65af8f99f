# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the system libvirt, and whether it sets the rlimit mode of its domains.

Beside it, what libvirt's daemons of users may raise a limit to. Nothing here connects to libvirt, whose daemon that
would start.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Callable, NamedTuple

from ._capabilities import CAP_IPC_LOCK, CAP_SYS_RESOURCE, capability_names
from ._errors import HostLacks, IommufdError, ProcessGone
from ._foreign import parse_xml
from ._libvirt_files import NOTHING_READ, LibvirtFiles, read_libvirt_files
from ._names import user_name
from ._process import Process, parse_status, read_file
from ._process_facts import Limit, in_initial_namespace, in_initial_user_namespace, read_memlock, started_at
from ._selinux import Verdict, context_of, context_of_service, lets_use
from ._syscalls import file_id
from ._systemd import Run, show_units
from ._unit_files import DROP_IN, Line, find_lack, missing_settings, read_lines

__all__ = (
    "PROPERTIES",
    "DaemonUnit",
    "Libvirt",
    "Session",
    "daemon_unit_of",
    "find_daemons",
    "installed_libraries",
    "library_version",
    "look_at_libvirt",
    "offers_iommufd",
    "sets_rlimit_mode",
    "starts_domains",
    "version_text",
)

Version = tuple[int, int, int]

# The first release that sets the mode: libvirt's NEWS, and src/util/viriommufd.c. What a distribution has is another
# question, which the library itself answers.
_SETS_SINCE = (12, 1, 0)

# The daemon that drives QEMU, in the new arrangement and in the old one. Each is started by its socket.
_DAEMONS = ("virtqemud", "libvirtd")
# How many daemons of a user are looked at. There may be one for each runtime folder.
_DAEMONS_OF_USER = 8
PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "MainPID",
    "User",
    "CapabilityBoundingSet",
    "AmbientCapabilities",
    "NoNewPrivileges",
    "PrivateUsers",
    "SecureBits",
    "SELinuxContext",
    "LimitMEMLOCK",
    "LimitMEMLOCKSoft",
    "FragmentPath",
    "DropInPaths",
    "NeedDaemonReload",
)
# The service managers of users, which start libvirt's daemons of users.
_MANAGERS = "user@*.service"
_MANAGER = re.compile(r"user@([0-9]{1,10})\.service")

# libvirt's QEMU driver keeps it while it runs, wherever that is.
_DRIVER_PID = "/run/libvirt/qemu/driver.pid"

# Below where libvirt was installed to.
_LIBRARIES = ("lib/*/libvirt.so.0", "lib64/libvirt.so.0", "lib/libvirt.so.0")
_PREFIXES = ("/usr", "/usr/local")


_GIVEN = " Its unit would give it the capability: restart the daemon, or run it outside of any container."


def version_text(version: Version | None) -> str | None:
    """A version as libvirt writes it."""
    return None if version is None else ".".join(map(str, version))


def library_version(text: bytes) -> Version | None:
    """The version in the highest file name of libvirt's library, `libvirt.so.0.MAJOR * 1000 + MINOR.MICRO`, in a text.

    See so_version in libvirt's meson.build.
    """
    found = re.findall(rb"/libvirt\.so\.0\.([0-9]{4,7})\.([0-9]{1,4})\b", text)
    return max(((*divmod(int(first), 1000), int(micro)) for first, micro in found), default=None)


class DaemonUnit(NamedTuple):
    """What systemd says of a unit: `may` is whether it would run with CAP_SYS_RESOURCE, None where that is not said.

    `drop_in` has the settings that would give it that; none where it would have it already. `memlock` is its limit on
    locked memory, None where that is not said. `context` is the SELinux context that it sets for what it starts; it may
    be empty. `passes`: whether what it starts gets CAP_IPC_LOCK where a file gives that, None where that is not said.
    `shown` is all of what systemd says.
    """

    name: str
    there: bool
    active: bool
    pid: int
    initial: bool
    may: bool | None
    drop_in: tuple[str, ...] = ()
    memlock: Limit | None = None
    context: str = ""
    passes: bool | None = None
    shown: Mapping[str, str] = MappingProxyType({})

    @property
    def outdated(self) -> bool:
        """Whether its files have changed since systemd read them."""
        return self.shown.get("NeedDaemonReload") == "yes"


def daemon_unit_of(shown: dict[str, str]) -> DaemonUnit:
    """A unit by what systemd shows of it."""
    pid = shown.get("MainPID", "0")
    bounding, ambient = shown.get("CapabilityBoundingSet"), shown.get("AmbientCapabilities")
    # Root gets all of the bounding set; anybody else what is ambient, and so does root with SECBIT_NOROOT.
    bits = shown.get("SecureBits", "0")
    noroot = int(bits) & 1 if re.fullmatch("[0-9]{1,9}", bits) else "noroot" in bits.split()
    is_root = shown.get("User", "") in ("", "root", "0") and not noroot
    given = bounding if is_root else ambient
    initial = shown.get("PrivateUsers", "no") == "no"
    taken = bounding is not None and CAP_SYS_RESOURCE not in bounding.split()
    by_ambient = not is_root and CAP_SYS_RESOURCE not in (ambient or "").split()
    drop_in = missing_settings(taken, by_ambient, not initial)
    says = shown.get("NoNewPrivileges"), bounding
    return DaemonUnit(
        name=shown.get("Id", ""),
        there=shown.get("LoadState") == "loaded",
        active=shown.get("ActiveState") == "active",
        pid=int(pid) if re.fullmatch(r"[0-9]{1,10}", pid) else 0,
        initial=initial,
        may=None if given is None else not drop_in,
        drop_in=drop_in,
        memlock=_limit_of(shown),
        # With a minus, a context that cannot be had is no failure.
        context=shown.get("SELinuxContext", "").lstrip("-"),
        passes=None if None in says else says[0] == "no" and CAP_IPC_LOCK in (bounding or "").split() and initial,
        shown=shown,
    )


def _limit_of(shown: dict[str, str]) -> Limit | None:
    values = [shown.get(name, "") for name in ("LimitMEMLOCKSoft", "LimitMEMLOCK")]
    if not all(re.fullmatch("[0-9]{1,20}|infinity", each) for each in values):
        return None
    return Limit(*(None if each == "infinity" else int(each) for each in values))


class Session(NamedTuple):
    """A user who may have a libvirt of his own, and the limit on locked memory that it cannot go beyond.

    That is the limit of its daemon `pid`, or, where none runs, of the service manager that would start one. None is a
    user without a name, no daemon, and a limit that cannot be told: it is hidden, or several daemons differ in it.
    """

    uid: int
    user: str | None
    memlock: Limit | None
    pid: int | None = None


class Libvirt(NamedTuple):
    """The system libvirt. `installed` is the version of the library on disk, `version` that of the running daemon.

    Where the daemon does not run, or its memory map cannot be read, they are the same. None is what cannot be told,
    and `msgs` tell why; `pid` is None where it does not run, and `unit` where there is none. `may` is whether the
    daemon has CAP_SYS_RESOURCE and may use it, `why` what SELinux has to do with that, and `drop_in` the settings that
    would have its unit give it. `memlock` is the daemon's limit on locked memory, or what its unit would give it.
    `passes` is whether an emulator that it starts gets CAP_IPC_LOCK where its file gives that. `taken_by` are the lines
    of the unit's files that take CAP_SYS_RESOURCE away, were there no drop-in of the role's; `unit_outdated`: systemd
    has not read those files since they were changed. `has` is whether the daemon that runs has the capability, whatever
    SELinux leaves of it. `at_boot` is the same with a daemon that has started anew; None where that is no other.
    """

    version: Version | None
    installed: Version | None
    unit: str | None
    pid: int | None
    may: bool | None
    msgs: tuple[str, ...] = ()
    why: str = ""
    drop_in: tuple[str, ...] = ()
    memlock: Limit | None = None
    files: LibvirtFiles = NOTHING_READ
    sessions: tuple[Session, ...] = ()
    passes: bool | None = None
    taken_by: tuple[Line, ...] | None = ()
    unit_outdated: bool = False
    has: bool | None = None
    at_boot: Libvirt | None = None

    @property
    def needs_restart(self) -> bool:
        """Whether its daemon runs with CAP_SYS_RESOURCE and the unit's files take it away, or the other way round."""
        return self.pid is not None and self.has is not None and self.has == bool(self.drop_in)


def look_at_libvirt(run: Run) -> Libvirt:
    """Looks at libvirt's files, and asks systemd for the daemon. `run` is as _systemd has it."""
    libraries = installed_libraries()
    installed = _version_of(libraries)
    services = [f"{daemon}.{kind}" for daemon in _DAEMONS for kind in ("service", "socket")]
    try:
        shown = show_units(run, [*services, _MANAGERS], PROPERTIES)
    except IommufdError as exc:
        return _by_files(Libvirt(installed, installed, None, None, None, (str(exc),)), libraries)
    managers = [each for each in shown if _MANAGER.fullmatch(each.get("Id", ""))]
    units = [daemon_unit_of(each) for each in shown if each not in managers]
    unit = _choose(units)
    daemons = find_daemons()
    msg = _elsewhere(unit, daemons.pop(0, []))
    if msg:
        # Its files are not those of this host.
        found = Libvirt(None, installed, None, None, None, (msg,))
    elif unit is None:
        # In a chroot it says nothing and succeeds.
        msg = "" if units and all(each.name for each in units) else "systemd tells nothing of libvirt's daemon."
        found = _by_files(Libvirt(installed, installed, None, None, None, (msg,) if msg else ()), libraries)
    else:
        drop_in, taken_by, msgs = _lack_of(unit)
        found = _by_unit(run, unit, libraries)
        found = found._replace(
            drop_in=drop_in, taken_by=taken_by, unit_outdated=unit.outdated, msgs=(*found.msgs, *msgs)
        )
        if found.pid or unit.outdated:
            found = found._replace(at_boot=_anew(run, unit, libraries, found))
    # Where there is no libvirt, whatever is called so is something else.
    return found._replace(sessions=tuple(_sessions(managers, daemons if libraries or unit is not None else {})))


def _elsewhere(unit: DaemonUnit | None, pids: list[int]) -> str:
    """That libvirt runs where neither this host's units nor its files tell of it; empty where that is not seen.

    `pids` are what seem to be daemons of root's. One that is asked for just now may have been started since.
    """
    if unit is not None and unit.pid:
        # Until it is active it may yet be about to become the daemon.
        kept = unit.active and (_has_other_root(unit.pid) or not _has_libvirt(unit.pid))
        return f"{unit.name} runs something that has libvirt elsewhere, perhaps in a container." if kept else ""
    others = [pid for pid in pids if unit is None or _has_other_root(pid)]
    sign = f"process {others[0]}" if others else _DRIVER_PID if unit is None and os.path.exists(_DRIVER_PID) else ""
    return f"libvirt runs in no unit of this host, perhaps in a container: there is {sign}." if sign else ""


def _has_other_root(pid: int) -> bool:
    """Whether a process has another file system than this one, as in a container or an image, as far as that shows."""
    with contextlib.suppress(OSError, HostLacks):
        return file_id(f"/proc/{pid}/root") != file_id("/")
    return False


def _has_libvirt(pid: int) -> bool:
    """Whether a process has loaded libvirt's library, as its daemon has; also where that is hidden."""
    with contextlib.suppress(IommufdError), Process.hold(pid) as process:
        maps = process.read("maps")
        return not maps or b"/libvirt.so.0" in maps
    return True


def _lack_of(unit: DaemonUnit) -> tuple[tuple[str, ...], tuple[Line, ...] | None, tuple[str, ...]]:
    """What a unit's files lack; the lines that take it away, None where they are not known; and why they are not."""
    # What systemd shows is the sum of its lines, but for what it has not read, and for what the role gives back.
    if not (unit.drop_in or unit.outdated or DROP_IN in unit.shown.get("DropInPaths", "")):
        return (), (), ()
    try:
        lines = read_lines(unit.shown)
    except IommufdError as exc:
        return unit.drop_in, None, (f"Which lines take CAP_SYS_RESOURCE from {unit.name} is not known: {exc}",)
    drop_in = find_lack(lines).settings
    if drop_in != unit.drop_in and not unit.outdated:
        msg = (
            f"Which lines take CAP_SYS_RESOURCE from {unit.name} is not known: systemd reads its files in another way."
        )
        return unit.drop_in, None, (msg,)
    others = [line for line in lines if os.path.basename(line.path) != DROP_IN]
    return drop_in, find_lack(others).lines, ()


def _by_unit(run: Run, unit: DaemonUnit, libraries: list[str]) -> Libvirt:
    """What can be told of a libvirt whose daemon is in a unit."""
    if not unit.pid:
        return _by_rest(run, unit, libraries)
    try:
        with Process.hold(unit.pid) as daemon:
            seen = in_initial_user_namespace(daemon)
            initial = unit.initial if seen is None else seen
            has = CAP_SYS_RESOURCE in capability_names(daemon.status.effective) and initial
            # As execve(2) has it.
            passes = CAP_IPC_LOCK in capability_names(daemon.status.bounding) and initial
            passes = passes and not daemon.status.no_new_privs
            may, why = _left(has, partial(context_of, unit.pid))
            installed = running = _version_of(libraries)
            used = libraries
            msgs: tuple[str, ...] = ()
            try:
                maps = daemon.read("maps")
                running = library_version(maps) or installed
                used = mapped_libraries(unit.pid, maps) or libraries
            except ProcessGone:
                raise
            except IommufdError as exc:
                # It runs all the same.
                msgs = (f"The version that the running daemon has mapped: {exc}",)
            found = Libvirt(running, installed, unit.name, unit.pid, may, msgs, why, memlock=read_memlock(daemon))
            found = _by_files(found._replace(passes=passes, has=has), used, started_at(daemon.start_ticks))
            # It ends by itself where it has nothing to do. What was found by its id since may be another one's.
            daemon.check_alive()
            return found
    except IommufdError as exc:
        found = _by_rest(run, unit, libraries)
        return found._replace(msgs=(str(exc), *found.msgs))


def _by_rest(run: Run, unit: DaemonUnit, libraries: list[str]) -> Libvirt:
    """What can be told of a libvirt whose daemon does not run."""
    may, why = _would_be_left(run, unit)
    msgs: tuple[str, ...] = ()
    if len(libraries) != 1:
        try:
            program = os.path.realpath(_program_of(run, unit))
            libraries = _libraries_below(os.path.dirname(os.path.dirname(program))) or libraries
        except IommufdError as exc:
            msgs = (f"Which library libvirt's daemon would use: {exc}",)
    version = _version_of(libraries)
    found = Libvirt(version, version, unit.name, None, may, msgs, why, memlock=unit.memlock, passes=unit.passes)
    return _by_files(found, libraries)


def _anew(run: Run, unit: DaemonUnit, libraries: list[str], now: Libvirt) -> Libvirt:
    """What can be told of a libvirt whose daemon starts anew. `now` is what is told of the one that there is."""
    found = _by_rest(run, unit, libraries)
    found = found._replace(drop_in=now.drop_in, files=found.files._replace(user=now.files.next_user))
    return found._replace(may=None, why="", memlock=None, passes=None) if unit.outdated else found


def _by_files(libvirt: Libvirt, libraries: list[str], started: float | None = None) -> Libvirt:
    """The same, with what libvirt's files tell. Where there is no libvirt, there are none."""
    if not libraries and libvirt.unit is None:
        return libvirt
    files = read_libvirt_files(libraries, started)
    return libvirt._replace(files=files, msgs=(*libvirt.msgs, *files.msgs))


def installed_libraries() -> list[str]:
    """The files of libvirt's library at the usual places."""
    return [path for prefix in _PREFIXES for path in _libraries_below(prefix)]


def _libraries_below(prefix: str) -> list[str]:
    """The files of libvirt's library that a program below there may use, without links."""
    paths = (path for pattern in _LIBRARIES for path in glob.glob(f"{glob.escape(prefix)}/{pattern}"))
    return list(dict.fromkeys(map(os.path.realpath, paths)))


def _version_of(libraries: list[str]) -> Version | None:
    return library_version("\n".join(libraries).encode("utf-8", "surrogateescape"))


def mapped_libraries(pid: int, maps: bytes) -> list[str]:
    """Paths by which the very library can be read that a process has mapped, as its /proc/PID/maps shows it.

    It is another one than the file at its path where that was replaced meanwhile, or in another mount namespace.
    """
    found = re.search(rb"^([0-9a-f]+)-([0-9a-f]+) .*/libvirt\.so\.0\.[0-9.]+(?: \(deleted\))?$", maps, re.MULTILINE)
    return [f"/proc/{pid}/map_files/{int(found[1], 16):x}-{int(found[2], 16):x}"] if found else []


def _sessions(managers: list[dict[str, str]], daemons: dict[int, list[int]]) -> list[Session]:
    """The users whose service managers run, or a libvirt of their own: see daemon_unit_of and find_daemons.

    What a service manager has started has its hard limit, or a lower one, and may raise its soft one up to that. What
    was started from a login, and not by the service manager, has that of the login.
    """
    found: dict[int, Session] = {}
    for shown in managers:
        unit, name = daemon_unit_of(shown), _MANAGER.fullmatch(shown["Id"])
        if name is not None and unit.pid:
            with contextlib.suppress(ProcessGone):
                uid = int(name[1])
                found[uid] = Session(uid, user_name(uid), _memlock_of(unit.pid))
    for uid, pids in daemons.items():
        limits: dict[int, Limit | None] = {}
        for pid in pids:
            with contextlib.suppress(ProcessGone):
                limits[pid] = _memlock_of(pid, uid)
        if limits:
            pid = min(limits)
            several = len(set(limits.values())) > 1 or len(pids) > _DAEMONS_OF_USER
            found[uid] = Session(uid, user_name(uid), None if several else limits[pid], pid)
    return sorted(found.values(), key=lambda each: each.uid)


def _memlock_of(pid: int, uid: int | None = None) -> Limit | None:
    """The limit of a process, None where it is not shown to this caller. `uid`: it is to be that user's daemon.

    Raises ProcessGone where there is none.
    """
    try:
        with Process.hold(pid) as process:
            if uid is not None and (process.uid != uid or process.comm not in _DAEMONS):
                raise ProcessGone(f"{process} is not libvirt's daemon of uid {uid}, which has ended.")
            return read_memlock(process)
    except ProcessGone:
        raise
    except IommufdError:
        return None


def find_daemons() -> dict[int, list[int]]:
    """What seem to be libvirt's daemons, by user: what is called so. Root's may be in a container, no other's is.

    Anybody may call a process so, to the harm of what is told of himself alone: of each user, only some are told.
    """
    names = {f"{each}\n".encode() for each in _DAEMONS}
    found: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IommufdError):
            if read_file(f"/proc/{name}/comm", in_one=True) not in names:
                continue
            uid = parse_status(read_file(f"/proc/{name}/status", in_one=True)).uid
            # A container has a libvirt of its own, and may have any number of users.
            contained = any(in_initial_namespace(kind, name) is False for kind in ("pid", "user"))
            if not (uid and contained) and len(found.get(uid, ())) <= _DAEMONS_OF_USER:
                found.setdefault(uid, []).append(int(name))
    return found


def _left(may: bool | None, context: Callable[[], str]) -> Verdict:
    """What SELinux leaves of a capability that a daemon has, which it may not use all the same."""
    verdict = Verdict(False) if may is False else lets_use(CAP_SYS_RESOURCE, context)
    return Verdict(verdict.allowed and may, verdict.why)


def _would_be_left(run: Run, unit: DaemonUnit) -> Verdict:
    return _left(unit.may, lambda: unit.context or context_of_service(_program_of(run, unit)))


def _program_of(run: Run, unit: DaemonUnit) -> str:
    """What a unit starts. Raises IommufdError."""
    # Asked for alone, since its words may have empty lines, as those between units are.
    started = show_units(run, [unit.name], ("ExecStart",))[0].get("ExecStart", "")
    found = re.match(r"\{ path=(\S+) ;", started)
    if not found:
        raise IommufdError(f"systemd does not tell what {unit.name} starts.")
    return found[1]


def _choose(units: list[DaemonUnit]) -> DaemonUnit | None:
    """The daemon's unit: the one that runs, or else whose socket waits, or else the first that is there."""
    sockets = {unit.name.rpartition(".")[0] for unit in units if unit.active and unit.name.endswith(".socket")}
    services = [unit for unit in units if unit.there and unit.name.endswith(".service")]

    def rank(unit: DaemonUnit) -> tuple[bool, bool]:
        return unit.pid == 0, unit.name.rpartition(".")[0] not in sockets

    return min(services, key=rank, default=None)


def sets_rlimit_mode(libvirt: Libvirt, offers: bool | None) -> tuple[bool | None, str]:
    """Whether libvirt sets per-process accounting for its domains, None where that cannot be told; and why.

    `offers` is whether it offers iommufd for a domain's devices, None where it was not asked.
    """
    if libvirt.unit is None:
        if libvirt.msgs:
            return None, libvirt.msgs[0]
        return False, "There is no system libvirt that drives QEMU here."
    if libvirt.version is None and libvirt.files.abilities.sets is None:
        return None, "The version of libvirt cannot be told: its library, libvirt.so.0, is not at a usual place."
    sets, what = _does(libvirt, offers)
    behind = ""
    if libvirt.version and libvirt.installed and libvirt.installed != libvirt.version:
        behind = f" {version_text(libvirt.installed)} is installed, but its daemon was not restarted since."
    return sets, f"{_called(libvirt)} {what}{behind}"


def _called(libvirt: Libvirt) -> str:
    return f"libvirt {version_text(libvirt.version)}" if libvirt.version else "libvirt"


def _does(libvirt: Libvirt, offers: bool | None) -> tuple[bool | None, str]:
    """Whether a libvirt sets it, and what it does, as the rest of a sentence."""
    since = version_text(_SETS_SINCE)
    can = libvirt.files.abilities.sets
    if can is None:
        return None, "may set per-process accounting: its library, which would tell, was not read."
    if not can and offers:
        return None, "offers iommufd for a device, but its library has nothing that sets per-process accounting."
    if not can:
        first = f"{since} is the first that does"
        if libvirt.version and libvirt.version >= _SETS_SINCE:
            first = f"its library has nothing that does, though {since} was the first that had"
        return False, f"does not set per-process accounting: {first}."
    if offers is False:
        return False, "could set per-process accounting, but does not offer iommufd for the devices of a domain here."
    if libvirt.may is None:
        return (
            None,
            "sets per-process accounting if its daemon has CAP_SYS_RESOURCE and may use it, which cannot be told."
            f"{f' {libvirt.why}.' if libvirt.why else ''}",
        )
    who = "its daemon runs" if libvirt.pid else f"{libvirt.unit}, when it starts, would run"
    if not libvirt.may and libvirt.why:
        return (
            False,
            f"cannot set per-process accounting: {who} with CAP_SYS_RESOURCE, but {libvirt.why}."
            " Allow it in a policy module of your own.",
        )
    if not libvirt.may:
        return (
            False,
            f"cannot set per-process accounting: {who} without CAP_SYS_RESOURCE in the initial user namespace. So it"
            f" starts no domain whose devices have iommufd='yes'.{_why_it_lacks(libvirt)}",
        )
    older = libvirt.version and libvirt.version < _SETS_SINCE
    as_all = f"though {since} was the first release that did" if older else f"as all since {since}"
    return True, f"sets per-process accounting, {as_all}, and {who} with CAP_SYS_RESOURCE.{_will_lack(libvirt)}"


def _why_it_lacks(libvirt: Libvirt) -> str:
    """Why a daemon lacks the capability, and what to do where it is not the unit's files that take it away."""
    if libvirt.drop_in:
        return f" {_shown_lines(libvirt)} the capability away." if libvirt.taken_by else ""
    if libvirt.unit_outdated:
        return (
            " Its unit's files would give it the capability now: run systemctl daemon-reload, and restart the daemon."
        )
    return _GIVEN


def _will_lack(libvirt: Libvirt) -> str:
    if not libvirt.drop_in:
        return ""
    return f" At a later start it will lack that: {_shown_lines(libvirt)} the capability away."


def _shown_lines(libvirt: Libvirt) -> str:
    """The lines that take the capability away, as the beginning of a sentence."""
    lines = libvirt.taken_by or ()
    shown = " and ".join(f"'{line}'" for line in lines) or f"{libvirt.unit}"
    return f"{shown} take{'' if len(lines) > 1 else 's'}"


def starts_domains(libvirt: Libvirt, offers: bool | None) -> bool | None:
    """Whether libvirt starts a domain whose devices have iommufd='yes', None where that cannot be told.

    One that sets the mode fails where it may not: see virIOMMUFDOpenDevice() in src/util/viriommufd.c.
    """
    knows, sets = libvirt.files.abilities
    if libvirt.unit is None:
        return None if libvirt.msgs else False
    if knows is False or offers is False:
        return False
    if knows is None or sets is None:
        return None
    return libvirt.may if sets else True


def offers_iommufd(domain_capabilities: str) -> bool | None:
    """Whether the text of `virsh domcapabilities` offers iommufd for a device; None where it is no such text."""
    try:
        root = parse_xml(domain_capabilities)
    except IommufdError:
        return None
    return "yes" in [value.text for value in root.iterfind("devices/hostdev/enum[@name='iommufd']/value")]
