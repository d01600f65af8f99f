# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a VMM of this host would run with, and what would keep CAP_IPC_LOCK from it.

Everything here only reads. What starts a VMM to prove it is in _vmm_trial.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from functools import partial
from typing import Any, NamedTuple

from . import _libvirt
from ._capabilities import CAP_IPC_LOCK, XATTR, FileCapabilities, capability_names, parse_file_capabilities, read_xattr
from ._child import NoAnswer, in_child
from ._errors import IommufdError, ProcessGone, error_text, printable
from ._paths import Untrusted, Writer, reopen, walk, writer_of
from ._process import Process, read_file
from ._process_facts import Limit, in_initial_namespace, in_initial_user_namespace, own_status
from ._systemd import Run, is_unit_name, show_units

__all__ = (
    "REPLICA",
    "Conditions",
    "FileSystem",
    "Program",
    "Unit",
    "emulator_obstacles",
    "has_ipc_lock",
    "is_qemu",
    "look_at_conditions",
    "look_at_program",
    "look_at_unit",
    "unit_obstacles",
)

# So long may take what is on this host, in seconds.
_LOOK_PATIENCE = 10

# What everything that is started for a look is called, also the instance of a template that is asked for.
REPLICA = "iommufd-host-check"

_NUMBERS = {name: number for number, name in enumerate(capability_names(2**64 - 1))}

# elf.h: programs are of the first type, or of the second if they can be loaded anywhere.
_ELF_TYPES = (2, 3)

_UNIT_PROPERTIES = (
    "Id",
    "LoadState",
    "ExecStart",
    "User",
    "Group",
    "SupplementaryGroups",
    "DynamicUser",
    "CapabilityBoundingSet",
    "AmbientCapabilities",
    "NoNewPrivileges",
    "PrivateUsers",
    "SecureBits",
    "NeedDaemonReload",
    "LimitMEMLOCK",
    "LimitMEMLOCKSoft",
)

# What may be named after the instance of a template, beside the program.
_OF_INSTANCE = ("User", "Group", "SupplementaryGroups")

# What a unit runs beside its program.
_HELPERS = ("ExecCondition", "ExecStartPre", "ExecStartPost", "ExecReload", "ExecStop", "ExecStopPost")

_OF_NONE = (
    "What {name} runs, or as whom, is named after its instance, and none of its instances runs now. Name instances in"
    " iommufd_host_units, such as {instance}."
)

# What systemd calls unlimited, in newer and in older releases.
_INFINITY = ("infinity", "18446744073709551615")


def has_ipc_lock(mask: int) -> bool:
    """Whether a set of capabilities has CAP_IPC_LOCK."""
    return bool(mask >> _NUMBERS[CAP_IPC_LOCK] & 1)


def _mask(text: str) -> int:
    """The set of capabilities that systemd gives by their names."""
    return sum(1 << _NUMBERS[name] for name in set(text.split()) if name in _NUMBERS)


class FileSystem(NamedTuple):
    """Where a program lies. `mount_point` is None where the kernel does not tell it to this caller."""

    mount_point: str | None
    nosuid: bool
    read_only: bool


class Program(NamedTuple):
    """A program at a path. `real_path` is where symbolic links lead; `xattr` its attribute security.capability.

    `is_program`: it is a regular file, executable, in the form of ELF. Only such a one can have capabilities; a script
    is read by another program, which has none. `xattr` is None without one, which is not the same as an empty one.
    `writer`: who can write it, or a place on the way to it, beside root. Nothing behind that place is looked at, and
    `real_path` is the path itself.
    """

    path: str
    real_path: str
    present: bool
    is_program: bool = False
    file_system: FileSystem | None = None
    xattr: bytes | None = None
    writer: Writer | None = None

    @property
    def capabilities(self) -> FileCapabilities | None:
        """What the file gives, None where it gives nothing that is understood here."""
        try:
            return None if self.xattr is None else parse_file_capabilities(self.xattr)
        except IommufdError:
            return None


def look_at_program(path: str) -> Program:
    """Looks at the file at an absolute path. Raises IommufdError where this caller may not, or the path is none.

    It is done in a child, since a path may lead to a mount whose server does not answer for ever.
    """
    if not os.path.isabs(path) or "\0" in path:
        raise IommufdError(f"{path!r} is not an absolute path.")
    try:
        found = in_child(None, partial(_look_at_path, path), _LOOK_PATIENCE)
    except NoAnswer as exc:
        raise IommufdError(_not_found(path)) from exc
    real_path, present, is_program, file_system, xattr, writer = found
    return Program(
        path,
        real_path,
        present,
        is_program,
        None if file_system is None else FileSystem(*file_system),
        None if xattr is None else bytes.fromhex(xattr),
        None if writer is None else Writer(*writer),
    )


def _not_found(path: str) -> str:
    return f"{path} was not found within {_LOOK_PATIENCE} seconds. Is it on a mount whose server is gone?"


def _look_at_path(path: str) -> list[Any]:
    """What there is to know of a program, beside the path: in the form that it comes from a child in."""
    try:
        with walk(path, follow=True, program=True) as place:
            if place.found is None or place.status is None:
                return [place.real_path, False, False, None, None, None]
            return [place.real_path, True, *_look_at_file(path, place.found, place.status), None]
    except Untrusted as exc:
        return [path, True, False, None, None, exc.writer]
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return [path, False, False, None, None, None]
        raise IommufdError(f"{path} cannot be looked at ({error_text(exc.errno)}).") from exc


def _look_at_file(path: str, found: int, status: os.stat_result) -> list[Any]:
    """Whether it is a program, its file system, and its attribute in hexadecimal."""
    flags = os.statvfs(found).f_flag
    mount_point = parse_mount_point(read_file("/proc/self/mountinfo"), read_file(f"/proc/self/fdinfo/{found}"))
    file_system = FileSystem(mount_point, bool(flags & os.ST_NOSUID), bool(flags & os.ST_RDONLY))
    executable = stat.S_ISREG(status.st_mode) and bool(status.st_mode & 0o111)
    xattr = _xattr(path, found)
    return [executable and _is_elf(path, found), file_system, None if xattr is None else xattr.hex()]


def _is_elf(path: str, found: int) -> bool:
    try:
        with open(reopen(found), "rb") as stream:
            head = stream.read(18)
    except OSError as exc:
        raise IommufdError(f"{path} cannot be read ({error_text(exc.errno)}).") from exc
    if len(head) < 18 or head[:4] != b"\x7fELF":
        return False
    order = ">" if head[5] == 2 else "<"
    return struct.unpack_from(f"{order}H", head, 16)[0] in _ELF_TYPES


def _xattr(path: str, found: int) -> bytes | None:
    try:
        return read_xattr(f"/proc/self/fd/{found}")
    except OSError as exc:
        if exc.errno == errno.EINVAL:
            return b""
        raise IommufdError(f"The capabilities of {path} cannot be read ({error_text(exc.errno)}).") from exc


def parse_mount_point(mountinfo: bytes, fdinfo: bytes) -> str | None:
    """Where a descriptor's mount is, by the text of /proc/self/mountinfo and of its fdinfo; None where it is not told.

    The mount is named by its number, not by a path, over which another one may lie. See proc_pid_mountinfo(5).
    """
    number = re.search(rb"^mnt_id:\s*([0-9]+)$", fdinfo, re.MULTILINE)
    line = number and re.search(rb"^%s \S+ \S+ \S+ (\S+) " % number.group(1), mountinfo, re.MULTILINE)
    if not line:
        return None
    plain = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found.group(1), 8) & 0xFF]), line.group(1))
    return printable(plain)


def is_qemu(program: Program) -> bool:
    """Whether a program is QEMU's, by its name: it is then started as one."""
    name = os.path.basename(program.real_path)
    return program.is_program and (name == "qemu-kvm" or name.startswith("qemu-system-"))


class Conditions(NamedTuple):
    """Under what a VMM is executed: `read_from` is whom.

    `bounding` is the bounding set. `initial`: in the initial user namespace; None where that cannot be told.
    """

    read_from: str
    bounding: int
    no_new_privs: bool
    initial: bool | None


def look_at_own_conditions() -> Conditions:
    """Those of this process."""
    own = own_status()
    return Conditions("this caller", own.bounding, own.no_new_privs, in_initial_namespace("user"))


def look_at_conditions(run: Run) -> Conditions:
    """Those under which libvirt executes an emulator, or else this caller would.

    The running daemon is looked at itself, one that waits for its socket by its unit. It is not woken.
    """
    libvirt = _libvirt.look_at_libvirt(run)
    if libvirt.unit is None:
        return look_at_own_conditions()
    if libvirt.pid is not None:
        try:
            with Process.hold(libvirt.pid) as daemon:
                of = f"{libvirt.unit} (pid {libvirt.pid})"
                status = daemon.status
                return Conditions(of, status.bounding, status.no_new_privs, in_initial_user_namespace(daemon))
        except ProcessGone:
            pass
    shown = _show(run, libvirt.unit)
    return Conditions(
        libvirt.unit,
        _mask(shown.get("CapabilityBoundingSet", "")),
        shown.get("NoNewPrivileges") == "yes",
        shown.get("PrivateUsers", "no") == "no",
    )


def emulator_obstacles(program: Program, under: Conditions) -> list[str]:
    """What would void a file capability of the program under these conditions, or have it break the program."""
    path = program.path
    if not program.present:
        return [f"There is no {path}."]
    if program.writer:
        return [f"{path} cannot be trusted: {_written(program.writer)}"]
    found = []
    if not program.is_program:
        found.append(f"{path} is no executable program: a script or a folder gives no capabilities to anybody.")
    place = program.file_system
    where = f"the file system at {place.mount_point}" if place and place.mount_point else "its file system"
    if place and place.nosuid:
        found.append(f"{path} gives no capabilities: {where} is mounted nosuid.")
    if place and place.read_only:
        found.append(f"{path} cannot be given capabilities: {where} is mounted read-only.")
    if not has_ipc_lock(under.bounding):
        found.append(
            f"CAP_IPC_LOCK is not in the bounding set of {under.read_from}: {path} with that capability could not be"
            " executed there at all (EPERM), so every start of a VM would fail."
        )
    if under.no_new_privs:
        found.append(f"{under.read_from} runs with NoNewPrivileges, which has file capabilities ignored in silence.")
    if under.initial is False:
        found.append(
            f"{under.read_from} is in a user namespace of its own, where CAP_IPC_LOCK lifts no limit of the host's."
        )
    return found


def _written(writer: Writer) -> str:
    return (
        f"{writer.place} can be written by {writer.who}, who would get with it whatever is granted. Have it be root's"
        " alone, with all folders on the way."
    )


class Unit(NamedTuple):
    """What systemd says of a service, and of the program that it starts.

    `name` is what was asked for, `main` the name that systemd has it under. `user` is None where systemd
    makes one up or has no such unit, and `program` where the unit starts none. `outdated`: its files have
    changed since systemd read them. `settings` are systemd's properties as it shows them. `helpers` are the other
    programs that it runs, with the same capabilities. `unknown`: why it is not known what it runs, or as whom: that is
    named after an instance. What is not known then is None.
    """

    name: str
    load_state: str
    user: str | None
    program: Program | None
    bounding: int
    ambient: int
    private_users: bool
    outdated: bool
    memlock: Limit
    settings: dict[str, str]
    helpers: tuple[Program, ...] = ()
    main: str = ""
    unknown: str = ""

    @property
    def present(self) -> bool:
        """Whether systemd has it."""
        return self.load_state == "loaded"


def instance_of(name: str) -> str:
    """The name to ask systemd for: of a template, an instance. Raises IommufdError where it is no name of a service."""
    if not is_unit_name(name, "service"):
        raise IommufdError(f"{name!r} is not the name of a systemd service, such as vm.service or vm@.service.")
    return re.sub(r"@\.service$", f"@{REPLICA}.service", name)


def look_at_unit(run: Run, name: str) -> Unit:
    """Asks systemd for a service, which starts nothing. Raises IommufdError where it does not answer."""
    shown = _show(run, instance_of(name))
    main = shown.get("Id", "").replace(f"@{REPLICA}.", "@.")
    main = main if is_unit_name(main, "service") else name
    unknown = ""
    if any(REPLICA in each for each in (*_paths_in(shown.get("ExecStart", "")), *map(shown.get, _OF_INSTANCE)) if each):
        # An instance that there is tells for all of them.
        loaded = _loaded_instance(run, main)
        shown = _show(run, loaded) if loaded else shown
        unknown = "" if loaded else _OF_NONE.format(name=name, instance=main.replace("@.", "@1."))
    paths = [path for path in _paths_in(shown.get("ExecStart", "")) if REPLICA not in path]
    helpers = [*paths[1:], *(path for name in _HELPERS for path in _paths_in(shown.get(name, "")))]
    load_state = shown.get("LoadState", "")
    nobody = load_state != "loaded" or shown.get("DynamicUser") == "yes" or REPLICA in shown.get("User", "")
    hard = _size_in(shown.get("LimitMEMLOCK", ""))
    soft = _size_in(shown["LimitMEMLOCKSoft"]) if "LimitMEMLOCKSoft" in shown else hard
    return Unit(
        name=name,
        load_state=load_state,
        user=None if nobody else shown.get("User") or "root",
        program=look_at_program(paths[0]) if paths else None,
        bounding=_mask(shown.get("CapabilityBoundingSet", "")),
        ambient=_mask(shown.get("AmbientCapabilities", "")),
        private_users=shown.get("PrivateUsers", "no") != "no",
        outdated=shown.get("NeedDaemonReload") == "yes",
        memlock=Limit(soft, hard),
        settings=shown,
        helpers=tuple(_look_for_writer(path) for path in dict.fromkeys(helpers) if path not in paths[:1]),
        main=main,
        unknown=unknown,
    )


def _loaded_instance(run: Run, template: str) -> str | None:
    """An instance of a template that systemd has at work; None where there is none."""
    # It takes the name for a pattern.
    pattern = template.replace("\\", "\\\\").replace("@.", "@*.")
    names = show_units(run, [pattern], ("Id",))[0].get("Id", "").split()
    return next((name for name in names if is_unit_name(name, "service")), None)


def _look_for_writer(path: str) -> Program:
    """A program of which nothing matters but who can write it. Raises IommufdError where nobody answers."""

    def look() -> Writer | None:
        try:
            return writer_of(path)
        except OSError:
            return None

    try:
        found = in_child(None, look, _LOOK_PATIENCE)
    except NoAnswer as exc:
        raise IommufdError(_not_found(path)) from exc
    return Program(path, path, present=True, writer=None if found is None else Writer(*found))


def _paths_in(commands: str) -> list[str]:
    """The programs of a unit's commands, as systemd shows them."""
    return re.findall(r"^\{ path=(/.*?) ; argv\[\]=", commands, re.MULTILINE)


def _size_in(text: str) -> int | None:
    return None if text in _INFINITY or not text.isdigit() else int(text)


def _show(run: Run, unit: str) -> dict[str, str]:
    """The properties of a unit as systemd shows them. Raises IommufdError where it does not answer."""
    shown = show_units(run, [unit], (*_UNIT_PROPERTIES, *_HELPERS))[0]
    if "LoadState" not in shown:
        raise IommufdError(f"systemd tells nothing of {unit}. Is this a chroot?")
    return shown


def unit_obstacles(unit: Unit) -> list[str]:
    """What would void AmbientCapabilities=CAP_IPC_LOCK of a service, or keep it from starting."""
    if unit.load_state == "not-found":
        return [f"systemd has no unit {unit.name}."]
    if not unit.present:
        return [f"systemd cannot start {unit.name}: its unit is {unit.load_state}."]
    if unit.program is None:
        return [unit.unknown or f"{unit.name} starts no program."]
    found = []
    program = unit.program
    if not program.present:
        found.append(f"{unit.name} starts {program.path}, which is not there.")
    found += [
        f"{unit.name} starts {each.path}, which cannot be trusted: {_written(each.writer)}"
        for each in (program, *unit.helpers)
        if each.writer
    ]
    if not has_ipc_lock(unit.bounding):
        found.append(
            f"{unit.name} has a CapabilityBoundingSet without CAP_IPC_LOCK, which takes that out of its"
            " AmbientCapabilities too."
        )
    if unit.private_users:
        found.append(
            f"{unit.name} has PrivateUsers: it runs in a user namespace of its own, where CAP_IPC_LOCK lifts no limit"
            " of the host's."
        )
    if program.xattr == b"":
        found.append(
            f"{program.real_path}, which {unit.name} starts, has an attribute {XATTR} that the kernel does not"
            f" understand, so it cannot be executed. `setfattr -x {XATTR} {program.real_path}` removes it."
        )
    elif program.xattr is not None and not (program.capabilities and program.capabilities.lifts_memlock):
        found.append(
            f"{program.real_path}, which {unit.name} starts, has an attribute {XATTR}, if an empty one, so the kernel"
            f" takes ambient capabilities from it. `setcap -r {program.real_path}` removes it."
        )
    return found
