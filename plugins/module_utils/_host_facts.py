# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a host offers, read without waking, loading or starting anything."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from ._capabilities import FileCapabilities, parse_file_capabilities, read_xattr
from ._change import can_be_set
from ._child import NoAnswer, ask_child, in_child
from ._device import new_iommufd
from ._errors import HostLacks, IommufdError, error_text, shown_path
from ._iommufd import RLIMIT_MODE, IommuFd, misc_rdev, vfio_container_is_iommufd
from ._names import group_name, owner_name
from ._paths import Untrusted, Writer, check_writers, walk
from ._syscalls import file_id

__all__ = (
    "ABSENT",
    "BUILTIN",
    "LOADABLE",
    "LOADED",
    "Emulator",
    "Node",
    "OwnIommufd",
    "Running",
    "Vfio",
    "VfioNode",
    "ask_vfio_container",
    "check_may_be_run",
    "count_iommufds",
    "find_emulators",
    "find_iommu_groups",
    "find_iommus",
    "find_module",
    "find_running",
    "find_vdpa_nodes",
    "find_vfio_nodes",
    "has_iommu",
    "has_sysfs",
    "is_kubernetes_node",
    "look_at_node",
    "look_at_vfio",
    "read_hidepid",
    "read_overflow_uid",
    "read_yama_scope",
    "try_iommufd",
)

BUILTIN = "builtin"
LOADED = "loaded"
LOADABLE = "loadable"
ABSENT = "absent"

_SYS = "/sys"
_MODULES = "/lib/modules"
_NODES = "/dev/vfio/devices"
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"
_MOUNTINFO = "/proc/self/mountinfo"
# A local file is there in no time.
_PATIENCE = 10
# libvirt takes those of the daemon's PATH, which systemd sets, by their names: see virQEMUCapsFindBinaryForArch().
_EMULATORS = (
    "/usr/local/sbin/qemu-system-*",
    "/usr/local/bin/qemu-system-*",
    "/usr/bin/qemu-system-*",
    "/usr/libexec/qemu-kvm",
    # NixOS, where nothing is in /usr/bin.
    "/run/libvirt/nix-emulators/qemu-*",
)
_KUBELET = "/var/lib/kubelet"
# How many programs of processes are looked at, and of how many processes each.
_RUNNING_MAX = 32
_PIDS_MAX = 3

# How an emulator is known: at a usual place, by an option of the task, from a process, from a domain's definition, from
# what libvirt has recorded of a domain that runs.
PLACE = "place"
OPTION = "option"
PROCESS = "process"
DEFINITION = "definition"
RECORD = "record"


class Node(NamedTuple):
    """A device node: its device number, and its permissions with the names of those that they are for."""

    rdev: int
    mode: str
    owner: str
    group: str


def look_at_node(path: str) -> Node | None:
    """The character device at path; None where there is none."""
    try:
        # In /dev, which the kernel itself keeps: nobody's server is waited for.
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISCHR(status.st_mode):
        return None
    return Node(
        status.st_rdev, f"{stat.S_IMODE(status.st_mode):04o}", owner_name(status.st_uid), group_name(status.st_gid)
    )


def find_module(release: str) -> str | None:
    """Where iommufd is: BUILTIN, LOADED, LOADABLE or ABSENT; None where the modules' folder of the kernel is not here.

    `release` is the running kernel's. The lists in the folder are depmod's, see modules.builtin(5) and modules.dep(5).
    """
    if os.path.exists(f"{_SYS}/module/iommufd/initstate"):
        # What is built in has a folder there at most for its parameters.
        return LOADED
    if misc_rdev() is not None:
        return BUILTIN
    folder = f"{_MODULES}/{release}"
    for name, state in (("modules.builtin", BUILTIN), ("modules.dep", LOADABLE)):
        with contextlib.suppress(OSError), open(f"{folder}/{name}", "rb") as stream:
            if re.search(rb"^\S*/iommufd\.ko(\.\w+)?(:|$)", stream.read(), re.MULTILINE):
                return state
    return ABSENT if os.path.exists(f"{folder}/modules.dep") else None


def count_iommufds() -> int:
    """How many iommufds are open, and queues of theirs, whoever has them; 0 where iommufd is no module of its own."""
    folder = f"{_SYS}/module/iommufd"
    users = len(_entries(f"{folder}/holders"))
    # Each open file takes the module once, wherever it is kept, as does each module that uses this one.
    return int(_text(f"{folder}/refcnt") or users) - users


class OwnIommufd(NamedTuple):
    """What an iommufd of our own answers. None where it could not be opened, for the reason in `msg`."""

    readable: bool | None
    settable: bool | None
    msg: str


def try_iommufd() -> OwnIommufd:
    """Opens an iommufd and asks for its rlimit mode, and whether this caller may set that. It is closed at once."""
    try:
        with new_iommufd(follow=True) as fd:
            iommufd = IommuFd(fd)
            readable = not iommufd.get(RLIMIT_MODE).errno
            return OwnIommufd(readable, readable and bool(can_be_set(iommufd.probe(RLIMIT_MODE))), "")
    except IommufdError as exc:
        return OwnIommufd(None, None, str(exc))


def read_yama_scope() -> int | None:
    """The setting kernel.yama.ptrace_scope; None where the kernel has no Yama."""
    with contextlib.suppress(OSError, ValueError), open(_YAMA, "rb") as stream:
        return int(stream.read())
    return None


def read_hidepid() -> str | None:
    """The option of the mount at /proc that hides other users' processes, such as `hidepid=invisible`; None without."""
    # proc(5): 0 and off hide nothing.
    with contextlib.suppress(OSError), open(_MOUNTINFO, "rb") as stream:
        found = re.search(rb"^\S+ \S+ \S+ / /proc .* - proc .*\b(hidepid=(?!0|off)\w+)", stream.read(), re.MULTILINE)
        return found.group(1).decode("ascii") if found else None
    return None


def read_overflow_uid() -> int:
    """The user id that the kernel shows for users that a user namespace has no number for."""
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/kernel/overflowuid", "rb") as stream:
        return int(stream.read())
    return 65534


def find_iommus() -> list[str]:
    """The names of the IOMMUs that the kernel drives."""
    return _entries(f"{_SYS}/class/iommu")


def find_iommu_groups() -> dict[int, list[str]]:
    """The devices of each IOMMU group, by their addresses."""
    folder = f"{_SYS}/kernel/iommu_groups"
    return {int(each): _entries(f"{folder}/{each}/devices") for each in sorted(_entries(folder), key=int)}


def _entries(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(os.listdir(folder))
    return []


def has_sysfs() -> bool:
    """Whether sysfs is here, without which no device is found."""
    return os.path.isdir(f"{_SYS}/kernel")


def has_iommu() -> bool | None:
    """Whether the kernel drives an IOMMU: some device is in a group of one. None where sysfs is hidden."""
    if not has_sysfs():
        return None
    # vfio_noiommu_group_alloc() in drivers/vfio/group.c makes groups without an IOMMU, and names them so.
    names = (_text(f"{_SYS}/kernel/iommu_groups/{number}/name") for number in find_iommu_groups())
    return any(name != b"vfio-noiommu\n" for name in names)


def ask_vfio_container() -> bool | None:
    """Whether iommufd provides /dev/vfio/vfio; None where the kernel has none, or this caller cannot open it."""
    # To open the node of a device that the kernel does not have would have it load a module.
    return vfio_container_is_iommufd() if os.path.exists(f"{_SYS}/class/misc/vfio/dev") else None


class Vfio(NamedTuple):
    """VFIO on this host. `driver`: vfio-pci is there; `bound` are the devices that a driver of VFIO's has.

    `without_node` are those of them that have no node of their own, which iommufd takes. `offers_nodes`: whether the
    kernel was built to make such nodes, None where that is not known.
    """

    driver: bool
    bound: list[str]
    without_node: list[str]
    offers_nodes: bool | None


def look_at_vfio(release: str) -> Vfio:
    """What VFIO has. `release` is the running kernel's."""
    folder = f"{_SYS}/bus/pci/drivers/vfio-pci"
    bound = [each for each in _entries(folder) if os.path.exists(f"{folder}/{each}/vendor")]
    having = []
    for name in _entries(f"{_SYS}/class/vfio-dev"):
        address = os.path.basename(os.path.realpath(f"{_SYS}/class/vfio-dev/{name}/device"))
        # A driver of a device's own, such as nvgrace-gpu-vfio-pci, binds it, too.
        bound.append(address)
        if os.path.exists(f"{_NODES}/{name}"):
            having.append(address)
    bound = sorted(set(bound))
    config = _text(f"{_MODULES}/{release}/config")
    offers = None if config is None else b"\nCONFIG_VFIO_DEVICE_CDEV=y\n" in config
    return Vfio(os.path.isdir(folder), bound, [each for each in bound if each not in having], offers)


def is_kubernetes_node() -> bool:
    """Whether a kubelet has been at work here."""
    return os.path.isdir(_KUBELET)


def _text(path: str) -> bytes | None:
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return stream.read()
    return None


class VfioNode(NamedTuple):
    """A device node of VFIO: of one device, or of a group under the older interface. `iommu_group` None: has none.

    `as_it_runs`: whether a device behind it pins memory as it runs, as an mdev does; None where sysfs does not tell.
    """

    path: str
    addresses: list[str]
    iommu_group: int | None
    of_group: bool
    as_it_runs: bool | None


def find_vfio_nodes() -> dict[int, VfioNode]:
    """The device nodes that VFIO has made, by their device numbers. See drivers/vfio/{device_cdev,group}.c."""
    found = {}
    groups = find_iommu_groups()
    group_of = {address: number for number, devices in groups.items() for address in devices}
    for name in _entries(f"{_SYS}/class/vfio-dev"):
        device = f"{_SYS}/class/vfio-dev/{name}/device"
        address = os.path.basename(os.path.realpath(device))
        rdev = _rdev(f"{_SYS}/class/vfio-dev/{name}/dev")
        if rdev is not None:
            runs = _pin_as_they_run([device])
            found[rdev] = VfioNode(f"{_NODES}/{name}", [address], group_of.get(address), False, runs)
    for name in _entries(f"{_SYS}/class/vfio"):
        rdev = _rdev(f"{_SYS}/class/vfio/{name}/dev")
        number = re.fullmatch(r"(?:noiommu-)?([0-9]+)", name)
        if rdev is not None and number:
            group = int(number.group(1))
            devices = groups.get(group, [])
            runs = _pin_as_they_run([f"{_SYS}/kernel/iommu_groups/{group}/devices/{each}" for each in devices])
            found[rdev] = VfioNode(f"/dev/vfio/{name}", devices, group, True, runs)
    return found


def _pin_as_they_run(devices: list[str]) -> bool | None:
    """Whether one of some devices, by their folders, is an mdev. None where that cannot be told, or there is none."""
    found = set()
    for folder in devices:
        bus = None
        with contextlib.suppress(OSError):
            # vfio_register_emulated_iommu_dev(), whose devices pin page by page, is called for those on this bus alone.
            bus = os.path.basename(os.readlink(f"{folder}/subsystem"))
        found.add(None if bus is None else bus == "mdev")
    return True if True in found else None if None in found or not found else False


def find_vdpa_nodes() -> dict[int, str]:
    """The device nodes of vDPA by their device numbers, for devices that programs drive. See drivers/vhost/vdpa.c."""
    found = {}
    folder = f"{_SYS}/bus/vdpa/devices"
    for device in _entries(folder):
        for name in _entries(f"{folder}/{device}"):
            rdev = _rdev(f"{folder}/{device}/{name}/dev") if name.startswith("vhost-vdpa-") else None
            if rdev is not None:
                found[rdev] = f"/dev/{name}"
    return found


def _rdev(path: str) -> int | None:
    """The device number in a file `dev` of sysfs; None where a device is gone, or has no node."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as stream:
        major, minor = map(int, stream.read().split(b":"))
        return os.makedev(major, minor)
    return None


class Emulator(NamedTuple):
    """An emulator. `capabilities` are those that its file gives; None where it gives none, or `msg` tells why not.

    `writer`: who can write it, or a place on the way to it, beside root. Nothing behind that place is looked at, and
    `path` is the one that was given. `known_by` are the ways in which it was found.
    """

    path: str
    present: bool
    capabilities: FileCapabilities | None = None
    msg: str = ""
    writer: Writer | None = None
    known_by: tuple[str, ...] = ()


class _Hint(NamedTuple):
    """A path that may be an emulator's, and how it is known. `pids`: processes that execute what they have there."""

    path: str
    known_by: str
    pids: tuple[int, ...] = ()


class Running(NamedTuple):
    """The programs that look like emulators, by their paths as the processes have them, and some that execute each.

    `more`: there are others.
    """

    programs: dict[str, tuple[int, ...]]
    more: bool = False


def find_running(executed: Mapping[int, str]) -> Running:
    """What processes execute, each path once. Users choose what they execute, and how many, so it has bounds.

    `executed`: the path of the program of each process, by its id.
    """
    programs: dict[str, tuple[int, ...]] = {}
    more = False
    for pid, path in executed.items():
        # A VMM that is not QEMU, or a launcher, holds an iommufd, too.
        if "qemu" not in os.path.basename(path):
            continue
        if path in programs or len(programs) < _RUNNING_MAX:
            programs[path] = (*programs.get(path, ()), pid)[:_PIDS_MAX]
        else:
            more = True
    return Running(programs, more)


def find_emulators(
    given: Sequence[str],
    defined: Sequence[str] = (),
    running: Mapping[str, Sequence[int]] = MappingProxyType({}),
    recorded: Sequence[str] = (),
) -> list[Emulator]:
    """The emulators at the usual places, those given, defined for domains, recorded, and running, each file once.

    `running` is as `find_running` gives it. Nothing is executed. It is done in a child, since a path may lead to a
    mount whose server does not answer for ever.
    """
    usual = sorted(path for pattern in _EMULATORS for path in glob.glob(pattern))
    left = [_Hint(path, PLACE) for path in usual] + [_Hint(path, OPTION) for path in given]
    left += [_Hint(path, DEFINITION) for path in defined] + [_Hint(path, RECORD) for path in recorded]
    left += [_Hint(path, PROCESS, tuple(pids)) for path, pids in running.items()]
    found: dict[str, Emulator] = {}
    while left:
        try:
            for each in ask_child(None, partial(_look_at_emulators, left), _PATIENCE):
                if each is not None:
                    _add(found, _from_json(each), left[0])
                left = left[1:]
            break
        except NoAnswer:
            hint, *left = left
            path = hint.path
            msg = f"{shown_path(path)} was not found within {_PATIENCE} seconds. Is it on a mount whose server is gone?"
            if hint.pids:
                # Whoever has a process execute that may have others keep us waiting, too.
                left = []
                msg += " Nothing else that runs was looked at after that."
            _add(found, Emulator(path, False, None, msg), hint)
    return list(found.values())


def _add(found: dict[str, Emulator], emulator: Emulator, hint: _Hint) -> None:
    """Adds an emulator, or that it is known in one more way."""
    known = found.setdefault(emulator.path, emulator)
    found[emulator.path] = known._replace(known_by=tuple(dict.fromkeys((*known.known_by, hint.known_by))))


def _look_at_emulators(hints: list[_Hint]) -> Iterator[Any]:
    """What is at these paths, in the form that it comes from a child in; None for what is not meant."""
    for path, _known_by, pids in hints:
        yield _look_at_running(path, pids) if pids else _look_at_emulator(path)


def _from_json(given: Any) -> Emulator:
    path, present, capabilities, msg, writer, _known_by = given
    return Emulator(
        path,
        present,
        capabilities and FileCapabilities(*capabilities),
        msg,
        None if writer is None else Writer(*writer),
    )


def _look_at_running(path: str, pids: Sequence[int]) -> Emulator | None:
    """What processes execute; None where that is another file than the one here, as in a container."""
    emulator = _look_at_emulator(path)
    # What it is is not looked at where somebody else decides that.
    if emulator.writer is not None or any(_executes(pid, emulator.path) for pid in pids):
        return emulator
    return None


def _executes(pid: int, path: str) -> bool:
    with contextlib.suppress(OSError, HostLacks):
        return file_id(f"/proc/{pid}/exe") == file_id(path)
    return False


def _look_at_emulator(path: str) -> Emulator:
    try:
        with walk(path, follow=True, program=True) as place:
            status = place.status
            if place.found is None or status is None or not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
                return Emulator(place.real_path, present=False)
            return _with_capabilities(place.real_path, place.found)
    except Untrusted as exc:
        return Emulator(path, True, None, f"{exc} It was not looked at.", exc.writer)
    except PermissionError as exc:
        return Emulator(path, False, None, f"{shown_path(path)} cannot be looked at ({error_text(exc.errno)}).")
    except OSError:
        return Emulator(path, present=False)


def _with_capabilities(path: str, found: int) -> Emulator:
    try:
        # A file that may be executed cannot always be read.
        xattr = read_xattr(f"/proc/self/fd/{found}")
        return Emulator(path, True, None if xattr is None else parse_file_capabilities(xattr))
    except IommufdError as exc:
        return Emulator(path, True, None, f"{shown_path(path)}: {exc}")
    except OSError as exc:
        return Emulator(
            path, True, None, f"The capabilities of {shown_path(path)} cannot be read ({error_text(exc.errno)})."
        )


def check_may_be_run(emulator: Emulator) -> None:
    """Raises IommufdError where somebody else than root and this caller can write an emulator."""
    if emulator.writer is None:
        return
    try:
        in_child(None, partial(check_writers, emulator.path, (0, os.geteuid())), _PATIENCE)
    except NoAnswer as exc:
        raise IommufdError(f"{shown_path(emulator.path)} was not found within {_PATIENCE} seconds.") from exc
