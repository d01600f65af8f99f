# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: `iommufd-exec`, which opens and sets an iommufd and becomes the VMM that gets it.

What is asked for and what is said of it are `parse`, `fill` and `verdict`, which touch nothing; `launch` does it, from
the step that needs most privilege to the one that needs none. Whatever fails before the last starts nothing.

On a host it runs as a zipapp that module_utils/_programs.py makes of this file and those that it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import re
import resource
import signal
import stat
import struct
import sys
import termios
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, NoReturn

from ._capabilities import CAP_IPC_LOCK, capability_names, parse_file_capabilities, read_xattr
from ._change import Result, change, explain
from ._device import DEVICE, open_iommufd
from ._errors import AccessRefused, IommufdError, error_text
from ._iommufd import CHANGED, DENIED, PROCESS, RLIMIT_MODE, UNCHANGED, UNSUPPORTED, USER, IommuFd
from ._size import human_size, parse_size
from ._syscalls import (
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    PR_GET_NO_NEW_PRIVS,
    drop_capabilities,
    leave_keyring,
    own_capabilities,
    prctl,
)
from ._user import User, become, find_user, groups_of, has_ids

__all__ = ("main",)

NAME = "iommufd-exec"
PLACEHOLDER = "{iommufd}"
_ADDRESS = r"(?:[0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7]"
_PLACEHOLDERS = re.compile(rf"\{{(iommufd(?::[^{{}}]*)?|{_ADDRESS})\}}")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_IOMMUFD_NAME = re.compile(r"iommufd(?::[\w.-]+)?", re.ASCII)

# What names the session of the caller, where another user has no business. Libraries find the user's own bus there.
_OF_A_SESSION = (b"XDG_RUNTIME_DIR", b"DBUS_SESSION_BUS_ADDRESS")

PCI_DEVICES = "/sys/bus/pci/devices"
_DEV = "/dev"
# Below that, each in the one before.
_NODES = ("vfio", "devices")
# VFIO_DEVICE_BIND_IOMMUFD, with argsz, flags, iommufd and out_devid, as linux/vfio.h has it.
_BIND_IOMMUFD = 0x3B76

# Exit codes: away from those of VMMs, which begin at 0, and from systemd's own, from 200. The last two are the shell's.
USAGE = 121
NOT_OPENED = 122
NOT_SET = 123
NOT_BECOME = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127

_DESCRIPTION = f"""\
Opens {DEVICE}, has the kernel charge what is pinned through it to the process alone, gives up root, and becomes
COMMAND, which is given the descriptor. It is meant for a systemd unit's ExecStart=, in front of a VMM that takes a
descriptor, such as QEMU:

  {NAME} --user vm --memlock 66G --device 0000:01:00.0 -- qemu-system-x86_64 -m 64G \\
      -object iommufd,id=iommufd0,fd={PLACEHOLDER} \\
      -device vfio-pci,id=vfio0,fd={{0000:01:00.0}},iommufd=iommufd0

Everything behind the first -- is COMMAND and its arguments. They are passed on as they are, by no shell; only
{PLACEHOLDER} in an argument becomes the number of the descriptor, and {{ADDRESS}} that of a --device. {PLACEHOLDER} has
to occur, or {{iommufd:NAME}}: each NAME is an iommufd of its own. COMMAND is looked for in PATH.
"""

_EPILOG = f"""\
what COMMAND gets:
  The descriptors that its arguments name, which are the only ones that are opened for it, and all that {NAME} was
  given itself: environment, folder, descriptors, process id. Nothing of {NAME} stays behind. SIGPIPE and SIGXFSZ have
  their defaults. With --user it has neither the controlling terminal nor the session keyring of its caller, and HOME,
  USER, LOGNAME and SHELL are the user's. So is XDG_RUNTIME_DIR, if there is /run/user/UID; if not, it is removed.
  DBUS_SESSION_BUS_ADDRESS is removed.

how it is accounted:
  One line on standard error tells. With rlimit_mode=process the kernel charges the process for itself, and checks its
  own RLIMIT_MEMLOCK. With user, which is the kernel's default, it adds up all processes of the user and holds the sum
  against the limit of the one that pins more. A COMMAND with CAP_IPC_LOCK has no limit at all; a warning says so where
  COMMAND's own file gives it that capability.
  To set process takes CAP_SYS_RESOURCE in the initial user namespace. Where that is missing, or the kernel lacks the
  option, a warning says so and COMMAND is started per user; with --strict it is not started.

what it takes:
  {DEVICE}, so Linux 6.2 with CONFIG_IOMMUFD, and its module loaded. CAP_SYS_RESOURCE for the mode, and to raise a hard
  limit. CAP_SETPCAP for --bounding. CAP_SETUID and CAP_SETGID for --user, unless the user and groups are that user's
  already, as in a unit with User= and AmbientCapabilities=CAP_SYS_RESOURCE: then it only gives up the capabilities.
  For --device, Linux 6.6 with CONFIG_VFIO_DEVICE_CDEV, and nodes that the caller can open, as root can. USER has to be
  able to open a VFIO device that COMMAND opens by itself.

exit codes, if COMMAND is not started:
  {USAGE}  the arguments are wrong
  {NOT_OPENED}  {DEVICE} or a --device is not there, or in use, or cannot be opened, or is something else
  {NOT_SET}  the rlimit mode could not be set, and --strict was given or the kernel's answer has no known meaning
  {NOT_BECOME}  USER, the limit or the bounding set could not be had, or something unforeseen happened
  {NOT_EXECUTABLE}  COMMAND was found but could not be executed
  {NOT_FOUND}  COMMAND was not found
Otherwise the exit code is COMMAND's.
"""

# The kernel has 64 bits for them and names for some 40.
_CAPABILITIES = {name: number for number in range(64) for name in capability_names(1 << number)}

_UNLIMITED = ("infinity", "unlimited")


class Refusal(IommufdError):
    """Why nothing is started, and the exit code that says so."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Request(NamedTuple):
    """What the arguments ask for. None is "leave it as it is".

    `memlock` is in bytes, or resource.RLIM_INFINITY; `bounding` has the numbers of the capabilities that may stay;
    `devices` the PCI addresses of those that are opened for the command, as the kernel writes them.
    """

    command: tuple[str, ...]
    rlimit_mode: str = PROCESS
    user: str | None = None
    memlock: int | None = None
    bounding: frozenset[int] | None = None
    strict: bool = False
    devices: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(USAGE, f"{message}. See {NAME} --help.")


def _memlock(text: str) -> int:
    return resource.RLIM_INFINITY if text in _UNLIMITED else parse_size(text)


def _bounding(text: str) -> frozenset[int]:
    words = [] if text == "none" else text.lower().split(",")
    numbers = [_CAPABILITIES.get(word if word.startswith("cap_") else f"cap_{word}") for word in words]
    for word, number in zip(words, numbers):
        if number is None:
            raise IommufdError(f"{word!r} is not a capability: give names such as cap_net_admin, or none.")
    return frozenset(number for number in numbers if number is not None)


def make_parser() -> argparse.ArgumentParser:
    """What reads the options, those in front of "--"."""
    made = _Parser(
        prog=NAME,
        usage=f"{NAME} [OPTION...] -- COMMAND ... {PLACEHOLDER} ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--rlimit-mode",
        choices=(PROCESS, USER),
        default=PROCESS,
        help="whom the kernel charges for pinned memory (default: process)",
    )
    made.add_argument("--user", help="become this user, with the user's groups and no capabilities; not root")
    made.add_argument(
        "--memlock",
        metavar="SIZE",
        help="set RLIMIT_MEMLOCK, soft and hard: bytes, or such as 66G in 1024s, or infinity (default: leave it)",
    )
    made.add_argument(
        "--bounding",
        metavar="CAPS",
        help="drop all other capabilities from the bounding set: names with commas in between, or none"
        " (default: leave it)",
    )
    made.add_argument(
        "--device",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="open this PCI device of VFIO, such as 0000:01:00.0, for {ADDRESS} in an argument; again for another",
    )
    made.add_argument("--strict", action="store_true", help="do not start COMMAND where the mode cannot be set")
    return made


def pci_address(text: str) -> str | None:
    """A PCI address as the kernel writes it, with its domain; None where the text is none."""
    if not re.fullmatch(_ADDRESS, text):
        return None
    domain, bus, rest = f"0:{text}".lower().split(":")[-3:]
    return f"{int(domain, 16):04x}:{bus}:{rest}"


def _device(text: str) -> str:
    address = pci_address(text)
    if address is None:
        raise Refusal(USAGE, f"--device: {text!r} is not a PCI address, such as 0000:01:00.0. lspci -D lists them.")
    return address


def placeholders(command: Sequence[str]) -> dict[str, str]:
    """What each placeholder in a command's arguments stands for, in their order: an iommufd's name, or an address."""
    found = (each for word in command[1:] for each in _PLACEHOLDERS.finditer(word))
    return {each[0]: pci_address(each[1]) or each[1] for each in found}


def is_iommufd(name: str) -> bool:
    """Whether a placeholder stands for an iommufd."""
    return pci_address(name) is None


def _check_placeholders(command: Sequence[str], devices: Sequence[str]) -> None:
    """Raises Refusal where a placeholder stands for nothing, or nothing stands for what is opened."""
    found = placeholders(command)
    if not any(is_iommufd(name) for name in found.values()):
        raise Refusal(
            USAGE,
            f"No argument of {command[0]} has {PLACEHOLDER} in it, so it would not get the descriptor and open one of"
            f" its own. QEMU takes it as -object iommufd,id=iommufd0,fd={PLACEHOLDER}.",
        )
    for text, name in found.items():
        if is_iommufd(name):
            if not _IOMMUFD_NAME.fullmatch(name):
                raise Refusal(USAGE, f"{text} names no iommufd: a NAME has letters, digits, and any of _ . - in it.")
        elif name not in devices:
            raise Refusal(USAGE, f"{text} is not opened: give --device {name}, too.")
    for each in devices:
        if each not in found.values():
            raise Refusal(
                USAGE,
                f"No argument of {command[0]} has {{{each}}} in it, so it would not get --device {each}. QEMU takes it"
                f" as -device vfio-pci,id=vfio0,fd={{{each}}},iommufd=iommufd0.",
            )


def parse(arguments: Sequence[str]) -> Request:
    """What the arguments ask for. Raises Refusal; for --help it prints that and raises SystemExit."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = make_parser().parse_args(list(arguments[:end]))
    command = tuple(arguments[end + 1 :])
    if not command:
        raise Refusal(USAGE, f"There is no COMMAND: it stands behind --. See {NAME} --help.")
    devices = tuple(dict.fromkeys(_device(each) for each in given.device))
    _check_placeholders(command, devices)
    try:
        memlock = None if given.memlock is None else _memlock(given.memlock)
    except IommufdError as exc:
        raise Refusal(USAGE, f"--memlock: {exc} Or give infinity.") from exc
    try:
        bounding = None if given.bounding is None else _bounding(given.bounding)
    except IommufdError as exc:
        raise Refusal(USAGE, f"--bounding: {exc}") from exc
    return Request(command, given.rlimit_mode, given.user, memlock, bounding, given.strict, devices)


def fill(command: Sequence[str], fds: Mapping[str, int]) -> list[str]:
    """The command as it is executed: with a descriptor's number where an argument asks for it. `fds`: by name."""
    names = placeholders(command)
    return [command[0], *(_PLACEHOLDERS.sub(lambda found: str(fds[names[found[0]]]), word) for word in command[1:])]


def obstacle(result: Result, request: Request) -> str:
    """What kept the mode from being set, "" for nothing. Raises Refusal where the command is not to be started then."""
    if result.outcome in (CHANGED, UNCHANGED):
        return ""
    why = explain(result, DEVICE, RLIMIT_MODE, RLIMIT_MODE.number(request.rlimit_mode))
    if result.outcome == DENIED:
        why = (
            f"{RLIMIT_MODE.name}={request.rlimit_mode} takes CAP_SYS_RESOURCE in the initial user namespace, which"
            f" {NAME} lacks ({error_text(result.errno)}). Start it as root, outside of any container, by a unit whose"
            " CapabilityBoundingSet= does not leave that out."
        )
    if request.strict or result.outcome not in (DENIED, UNSUPPORTED):
        raise Refusal(NOT_SET, f"{why} So {request.command[0]} is not started.")
    return why


def verdict(mode: int, limit: int, unlimited: bool) -> str:
    """How the command will be accounted, in the rlimit mode of that number.

    `limit` is its RLIMIT_MEMLOCK in bytes, `unlimited` whether it has CAP_IPC_LOCK, which lifts that.
    """
    words = (
        "rlimit_mode=user: the memory that it pins is charged to its user, with that of the user's other processes",
        "rlimit_mode=process: the memory that it pins is charged to it alone",
    )[mode]
    if unlimited:
        return f"{words}, and held against no limit, since it has {CAP_IPC_LOCK.upper()}."
    size = "which is unlimited" if limit == resource.RLIM_INFINITY else human_size(limit)
    return f"{words}, and held against its RLIMIT_MEMLOCK, {size}."


def lifted(command: str, path: str) -> str:
    """What is said of a command that has no limit because its file gives it CAP_IPC_LOCK."""
    return (
        f"the file {path} gives {CAP_IPC_LOCK.upper()} to {command}, which lifts its limit. To keep the limit, take the"
        f" file's capabilities away (setcap -r {path}), or have them ignored by NoNewPrivileges=yes in the unit."
    )


def say(text: str) -> None:
    """A line on standard error, which need not be there."""
    with contextlib.suppress(OSError):
        os.write(2, f"{NAME}: {text}\n".encode(errors="backslashreplace"))


def open_device() -> int:
    """A new iommufd: a descriptor that is none of the standard ones, and close-on-exec. Raises Refusal."""
    try:
        fd = open_iommufd()
    except IommufdError as exc:
        hint, cause = "", exc.__cause__
        if isinstance(cause, FileNotFoundError) and cause.filename == DEVICE:
            # The kernel has the device, and the node is missing.
            hint = " Or does the unit have PrivateDevices=?"
        elif isinstance(exc, AccessRefused):
            hint = " A unit needs DeviceAllow=, too."
        raise Refusal(NOT_OPENED, f"{exc}{hint}") from exc
    return _above_standard(fd)


def _above_standard(fd: int) -> int:
    if fd > 2:
        return fd
    # Started without standard streams. A VMM would take it for one of them.
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def open_vfio(address: str) -> int:
    """The device of VFIO at a PCI address: a descriptor as that of open_device. Raises Refusal."""
    name, number = find_vfio(address)
    path = _path(name)
    try:
        fd = _above_standard(_open_node(name, number))
    except OSError as exc:
        hint = {
            errno.ENOENT: "its node is missing. Or does the unit have PrivateDevices=?",
            errno.EBUSY: "another process uses it. End that one, or take another device.",
        }.get(exc.errno or 0, "see to its owner and mode, and that a unit has DeviceAllow= for it.")
        raise Refusal(
            NOT_OPENED,
            f"{address} ({path}) cannot be opened by uid {os.geteuid()} ({error_text(exc.errno)}): {hint}",
        ) from exc
    group = _link_name(address, "iommu_group")
    others = {each: _link_name(each, "driver") for each in _devices_of(address) if each != address}
    nodes = {path, f"{_DEV}/vfio/{group}", *(_path(node) for each in others for node in _nodes(each))}
    # The kernel opens it for several, and binds it for one. Names in /proc are whatever a user's own mounts make them.
    pids = [str(pid) for pid in islice(_holders(nodes), 3)]
    foreign = [f"{each} (driver {driver})" for each, driver in others.items() if not _leaves_alone(driver)]
    if (pids or foreign) and not can_bind(name, number):
        os.close(fd)
        raise Refusal(NOT_OPENED, f"{address} ({path}) {_in_use(group, foreign, pids)}")
    return fd


def _leaves_alone(driver: str) -> bool:
    """Whether a device of that driver, "" for none, leaves its IOMMU group to VFIO (driver_managed_dma in Linux)."""
    return not driver or "vfio" in driver or driver in ("pcieport", "pci-stub")


def _in_use(group: str, foreign: Sequence[str], pids: Sequence[str]) -> str:
    """Why a device cannot be bound, and what to do."""
    if foreign:
        return (
            f"is in IOMMU group {group} with {', '.join(foreign)}, and the kernel gives a device to a VM only where no"
            " device of its group has another driver than VFIO's: bind these to vfio-pci, too, or unbind them, once"
            " nothing on the host uses them. Or take another device."
        )
    return (
        f"is in use, probably by process {' or '.join(pids)}, which has it, or another device of its IOMMU group"
        f" {group}, open. End that one, or take another device."
    )


def can_bind(name: str, number: int) -> bool:
    """Whether the device with that node can be bound by one more, which resets it. Raises OSError, and Refusal."""
    fd = _open_node(name, number)
    try:
        iommufd = open_device()
        try:
            fcntl.ioctl(fd, _BIND_IOMMUFD, struct.pack("=IIiI", 16, 0, iommufd, 0))
        except OSError as exc:
            # By its node, by its group's, or because its group is another's. What else there is, the command will tell.
            return exc.errno not in (errno.EINVAL, errno.EBUSY, errno.EPERM)
        finally:
            os.close(iommufd)
    finally:
        os.close(fd)
    return True


def _link_name(address: str, link: str) -> str:
    """What a link of a PCI device leads to, "" where there is none."""
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"{PCI_DEVICES}/{address}/{link}"))
    return ""


def _path(node: str) -> str:
    """Where a node of VFIO is."""
    return "/".join((_DEV, *_NODES, node))


def _devices_of(address: str) -> list[str]:
    """The devices of a PCI device's IOMMU group, which a VM has all or none of."""
    return _names(f"{address}/iommu_group/devices")


def _nodes(address: str) -> list[str]:
    """The nodes of VFIO that a PCI device has: one, where it is bound and the kernel has them."""
    return _names(f"{address}/vfio-dev")


def _names(folder: str) -> list[str]:
    """What is in a folder of a PCI device. Nothing is, where there is no such folder."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.listdir(f"{PCI_DEVICES}/{folder}"))
    return []


def find_vfio(address: str) -> tuple[str, int]:
    """The name and the number of the node that VFIO has for a PCI device. Raises Refusal."""
    folder = f"{PCI_DEVICES}/{address}"
    if not os.path.isdir(folder):
        raise Refusal(NOT_OPENED, f"This host has no PCI device {address}: lspci -D lists those that it has.")
    driver = _link_name(address, "driver")
    names = _nodes(address)
    if not names and "vfio" not in driver:
        bound = f"bound to the driver {driver}" if driver else "bound to no driver"
        raise Refusal(
            NOT_OPENED,
            f"{address} is {bound}, and not to VFIO's: bind it (driverctl set-override {address} vfio-pci), once"
            " nothing on the host uses it.",
        )
    try:
        with open(f"{folder}/vfio-dev/{names[0]}/dev", encoding="ascii") as stream:
            major, minor = stream.read().split(":")
    except (IndexError, FileNotFoundError) as exc:
        raise Refusal(
            NOT_OPENED,
            f"{address} is bound to {driver or 'VFIO'}, and has no node of its own: that takes Linux 6.6 with"
            " CONFIG_VFIO_DEVICE_CDEV. On this kernel a VMM can have it only by the group, without --device.",
        ) from exc
    return names[0], os.makedev(int(major), int(minor))


def _open_node(name: str, number: int) -> int:
    """The node of that name and device number, close-on-exec. Raises OSError, and Refusal where it is another one.

    On the way there is nothing that anybody but root can write.
    """
    folder = os.open("/", _FOLDER)
    try:
        for each in (_DEV, *_NODES):
            inner = os.open(each, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
            status = os.fstat(folder)
            if status.st_uid != 0 or status.st_mode & 0o022:
                raise Refusal(
                    NOT_OPENED,
                    f"{_DEV}/{'/'.join(_NODES)} is not root's alone: nothing is opened there. See to the owner"
                    f" and the mode of {each}.",
                )
        # To open a node that is another one may do something already.
        _check_node(os.stat(name, dir_fd=folder, follow_symlinks=False), name, number)
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        _check_node(os.fstat(fd), name, number)
    except Refusal:
        os.close(fd)
        raise
    return fd


def _check_node(status: os.stat_result, name: str, number: int) -> None:
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != number:
        raise Refusal(
            NOT_OPENED,
            f"{_DEV}/{'/'.join(_NODES)}/{name} is not the device that sysfs has there, but something else: it is not"
            " given to anything.",
        )


def _holders(paths: set[str]) -> Iterator[int]:
    """The other processes that have any of these open, as far as this one may see."""
    for pid in (int(each) for each in os.listdir("/proc") if each.isdigit()):
        if pid == os.getpid():
            continue
        # A link's text only: what it leads to may be on a file system that answers nobody.
        if not paths.isdisjoint(_descriptors(f"/proc/{pid}/fd")):
            yield pid


def _descriptors(folder: str) -> Iterator[str]:
    """What the descriptors of a process are called. One that ends meanwhile has nothing any more."""
    with contextlib.suppress(OSError):
        for each in os.listdir(folder):
            with contextlib.suppress(OSError):
                yield os.readlink(f"{folder}/{each}")


def find_unprivileged(name: str) -> User:
    """The user of that name. Raises Refusal."""
    try:
        user = find_user(name)
    except IommufdError as exc:
        raise Refusal(NOT_BECOME, f"--user: {exc}") from exc
    if user.uid == 0:
        raise Refusal(NOT_BECOME, f"--user {name} would give up nothing. To keep root, leave it out.")
    return user


def limit_memlock(size: int) -> None:
    """Sets RLIMIT_MEMLOCK, soft and hard. Raises Refusal."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, size))
    except (OSError, ValueError) as exc:
        raise Refusal(
            NOT_BECOME,
            f"RLIMIT_MEMLOCK cannot be set to {size} bytes ({exc}): to raise the hard limit takes CAP_SYS_RESOURCE. Or"
            " leave --memlock out and set LimitMEMLOCK= in the unit.",
        ) from exc


def limit_bounding(kept: frozenset[int]) -> None:
    """Drops every capability from the bounding set that is not to be kept. Raises Refusal."""
    try:
        for number in _CAPABILITIES.values():
            if number not in kept and _is_in_bounding_set(number):
                prctl(PR_CAPBSET_DROP, number)
    except OSError as exc:
        raise Refusal(
            NOT_BECOME, f"The bounding set cannot be limited ({error_text(exc.errno)}): that takes CAP_SETPCAP."
        ) from exc


def _is_in_bounding_set(number: int) -> bool:
    """Whether this process may get a capability. False for one that the kernel does not know."""
    with contextlib.suppress(OSError):
        return bool(prctl(PR_CAPBSET_READ, number))
    return False


def find_program(command: str) -> str:
    """The file that a command is, as execvpe finds it."""
    if os.path.dirname(command):
        return command
    paths = (os.path.join(folder, command) for folder in os.get_exec_path())
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), command)


def gets_ipc_lock(path: str) -> bool:
    """Whether this process gets CAP_IPC_LOCK by executing that file."""
    try:
        given = parse_file_capabilities(read_xattr(path) or b"")
        ignored = os.statvfs(path).f_flag & os.ST_NOSUID
    except (OSError, IommufdError):
        # One that is not there is told of when it is executed.
        return False
    if ignored or not given.lifts_memlock:
        return False
    # Outside of the bounding set it is not given, and the kernel does not execute the file at all.
    return _is_in_bounding_set(_CAPABILITIES[CAP_IPC_LOCK]) and not prctl(PR_GET_NO_NEW_PRIVS)


def _is(user: User) -> bool:
    """Whether this process is that user's already, by each of its ids and groups."""
    return has_ids(user) and {user.gid, *os.getgroups()} == groups_of(user)


def leave_terminal() -> None:
    """Gives up the controlling terminal, into which the user could type commands for root (TIOCSTI). Raises OSError."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        # There is none, as in a unit.
        return
    # Where this process leads the session, that sends SIGHUP to it (ioctl_tty(2)).
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fcntl.ioctl(terminal, termios.TIOCNOTTY)
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(terminal)


def give_up_root(user: User) -> None:
    """Becomes the user, with the user's groups, no capability, and no way back. Raises Refusal.

    Sources: credentials(7), capabilities(7). The bounding set stays. Root's terminal and keys are left, too.
    """
    try:
        leave_terminal()
        leave_keyring()
        if not _is(user):
            become(user)
        # A change of user clears these by itself, but for the inheritable ones, and unless securebits tell otherwise.
        drop_capabilities()
    except OSError as exc:
        raise Refusal(
            NOT_BECOME,
            f"{NAME}, uid {os.geteuid()}, cannot become user {user.name} ({error_text(exc.errno)}): start it as root"
            " with CAP_SETUID and CAP_SETGID, or as that user with the user's groups.",
        ) from exc
    if not _is(user) or any(own_capabilities()) or _can_return():
        raise Refusal(NOT_BECOME, f"{NAME} became user {user.name} only in part: the kernel did not do as it said.")


def _can_return() -> bool:
    """Whether there is a way back to root."""
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        return False
    return True


def given_environment() -> dict[bytes, bytes]:
    """The environment that this program was given.

    Where the locale is C, Python puts another one into LC_CTYPE for its children (PEP 538), in isolated mode too.
    """
    given = dict(os.environb)
    name = b"LC_CTYPE"
    with contextlib.suppress(OSError), open("/proc/self/environ", "rb") as stream:
        lines = [line.partition(b"=") for line in stream.read().split(b"\0")]
        given.pop(name, None)
        given.update({key: value for key, _equals, value in lines if key == name})
    return given


def environment_of(user: User) -> dict[bytes, bytes]:
    """The variables that are a user's."""
    found = {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell}
    with contextlib.suppress(OSError):
        status = os.lstat(user.runtime_folder)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == user.uid:
            found["XDG_RUNTIME_DIR"] = user.runtime_folder
    return {os.fsencode(name): os.fsencode(value) for name, value in found.items()}


def execute(command: Sequence[str], fds: Iterable[int], user: User | None = None) -> NoReturn:
    """Becomes the command, which gets the descriptors, and the environment of the user. Raises Refusal."""
    for fd in fds:
        os.set_inheritable(fd, True)
    environment = given_environment()
    if user is not None:
        for name in _OF_A_SESSION:
            environment.pop(name, None)
        environment.update(environment_of(user))
    # Python ignores these, which a program that it becomes would, too.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as exc:
        code = NOT_FOUND if exc.errno in (errno.ENOENT, errno.ENOTDIR) else NOT_EXECUTABLE
        raise Refusal(code, f"{command[0]} cannot be executed ({error_text(exc.errno)}).") from exc
    except ValueError as exc:
        raise Refusal(NOT_EXECUTABLE, f"{command[0]!r} cannot be executed: {exc}.") from exc


def launch(request: Request) -> NoReturn:
    """Does what is asked for and becomes the command. Raises Refusal, and then the process is of no more use."""
    user = None if request.user is None else find_unprivileged(request.user)
    fds: dict[str, int] = {}
    for name in filter(is_iommufd, placeholders(request.command).values()):
        if name not in fds:
            fds[name] = open_device()
            result = change(IommuFd(fds[name]), RLIMIT_MODE, RLIMIT_MODE.number(request.rlimit_mode))
            warning = obstacle(result, request)
    for address in request.devices:
        fds[address] = open_vfio(address)
    if request.memlock is not None:
        limit_memlock(request.memlock)
    if request.bounding is not None:
        limit_bounding(request.bounding)
    if user is not None:
        give_up_root(user)
    if warning:
        say(f"warning: {warning} {request.command[0]} is started all the same.")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    has_it = CAP_IPC_LOCK in capability_names(own_capabilities().effective)
    program = find_program(request.command[0])
    gets_it = not has_it and gets_ipc_lock(program)
    if gets_it:
        say(f"warning: {lifted(request.command[0], program)}")
    # A kernel without the option charges the user.
    say(verdict(result.after or 0, limit, unlimited=has_it or gets_it))
    execute(fill(request.command, fds), fds.values(), user)


def main() -> int:
    """Runs the program; returns an exit code only if the command was not started."""
    try:
        launch(parse(sys.argv[1:]))
    except Refusal as exc:
        say(str(exc))
        return exc.code
    except IommufdError as exc:
        say(str(exc))
        return NOT_OPENED
    except Exception as exc:
        # A traceback's exit code would be taken for the command's.
        say(f"Nothing was started, for a reason that was not foreseen: {exc!r}.")
        return NOT_BECOME
