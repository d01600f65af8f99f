# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the system calls that Python has no function for. Nothing else calls the C library.

Whatever the kernel refuses is an OSError with the kernel's errno.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from typing import Callable, NamedTuple, NoReturn

from ._errors import HostLacks

__all__ = (
    "PR_CAPBSET_DROP",
    "PR_CAPBSET_READ",
    "PR_GET_NO_NEW_PRIVS",
    "PR_SET_DUMPABLE",
    "PR_SET_NO_NEW_PRIVS",
    "PR_SET_PDEATHSIG",
    "character_device",
    "compare_files",
    "drop_capabilities",
    "have_one_table",
    "leave_keyring",
    "own_capabilities",
    "pidfd_getfd",
    "pidfd_open",
    "prctl",
)

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

# The same on all architectures that KVM runs on but mips. Python's os has no pidfd_getfd, and pidfd_open only where it
# was built against recent headers.
_PIDFD_OPEN = 434
_PIDFD_GETFD = 438

# Those that differ, and else the number of asm-generic/unistd.h, as on arm64, riscv and loongarch.
_KCMP = {"x86_64": 312, "i386": 349, "i686": 349, "armv7l": 378, "armv8l": 378, "ppc64le": 354, "s390x": 343}
_KCMP_GENERIC = 272
_KEYCTL = {"x86_64": 250, "i386": 288, "i686": 288, "armv7l": 311, "armv8l": 311, "ppc64le": 271, "s390x": 280}
_KEYCTL_GENERIC = 219

# linux/kcmp.h, linux/keyctl.h, linux/capability.h
_KCMP_FILE = 0
_KCMP_FILES = 2
_KEYCTL_JOIN_SESSION_KEYRING = 1
_CAPABILITY_VERSION_3 = 0x20080522

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_TYPE = 0x1
_STATX_INO = 0x100


class Statx(ctypes.Structure):
    """`struct statx` of linux/stat.h, as far as it is read here, and room for the rest of its 256 bytes."""

    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("_to_mode", ctypes.c_uint8 * 24),
        ("stx_mode", ctypes.c_uint16),
        ("_to_ino", ctypes.c_uint8 * 2),
        ("stx_ino", ctypes.c_uint64),
        ("_to_rdev", ctypes.c_uint8 * 88),
        ("stx_rdev_major", ctypes.c_uint32),
        ("stx_rdev_minor", ctypes.c_uint32),
        ("stx_dev_major", ctypes.c_uint32),
        ("stx_dev_minor", ctypes.c_uint32),
        ("_to_end", ctypes.c_uint8 * 112),
    )


def _no_statx(*_given: object) -> NoReturn:
    raise HostLacks("This host's C library has no statx, which takes glibc 2.28 or musl 1.2.5: upgrade the host.")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_statx: Callable[..., int] = getattr(_libc, "statx", _no_statx)

# One for all calls: to make it takes as long as the call.
_STATX = Statx()
_STATX_REFERENCE = ctypes.byref(_STATX)


def _checked(result: int) -> int:
    """The result of a C function that returns -1 and sets errno. Raises OSError in that case."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(number: int, *arguments: int) -> int:
    return _checked(_libc.syscall(*map(ctypes.c_long, (number, *arguments))))


def pidfd_open(pid: int) -> int:
    """A descriptor that stands for a process."""
    return _syscall(_PIDFD_OPEN, pid, 0)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Shares descriptor `fd` of the process; the new one is close-on-exec."""
    return _syscall(_PIDFD_GETFD, pidfd, fd, 0)


# There may be thousands to compare, and to convert each argument takes as long as the call.
_kcmp = ctypes.CFUNCTYPE(ctypes.c_long, *(ctypes.c_long,) * 6, use_errno=True)(("syscall", _libc))
_kcmp_number = _KCMP.get(os.uname().machine, _KCMP_GENERIC)


def have_one_table(pid: int, other: int) -> bool:
    """Whether two processes have the same table of descriptors; False where the kernel does not tell. See kcmp(2)."""
    with contextlib.suppress(OSError):
        return not _checked(_kcmp(_kcmp_number, pid, other, _KCMP_FILES, 0, 0))
    return False


def compare_files(pid: int, fd: int, other: int, other_fd: int) -> int:
    """0 where two descriptors, each of a process, are one open file; else 1 or 2, which put open files in an order.

    1 says that the first comes before the other. The order lasts until the next boot. See kcmp(2).
    """
    return _checked(_kcmp(_kcmp_number, pid, other, _KCMP_FILE, fd, other_fd))


def character_device(path: str, folder: int = _AT_FDCWD) -> int | None:
    """The device number of the character device that path leads to, None where it is something else.

    stat(2) of a descriptor on a FUSE or network mount asks that mount's server and may wait for it for ever.
    AT_STATX_DONT_SYNC makes do with what the kernel knows, and a file's type and device number never change. Raises
    HostLacks where the C library has no statx.
    """
    _checked(_statx(folder, path.encode(), _AT_STATX_DONT_SYNC, _STATX_TYPE, _STATX_REFERENCE))
    if not stat.S_ISCHR(_STATX.stx_mode):
        return None
    return os.makedev(_STATX.stx_rdev_major, _STATX.stx_rdev_minor)


def file_id(path: str) -> tuple[int, int, int]:
    """What tells the file that path leads to from any other: its device, and its number there.

    Like `character_device`, it waits for no server, and raises OSError and HostLacks.
    """
    _checked(_statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_INO, _STATX_REFERENCE))
    return _STATX.stx_dev_major, _STATX.stx_dev_minor, _STATX.stx_ino


def prctl(option: int, value: int = 0) -> int:
    """Asks something of this process, or sets it."""
    return _checked(_libc.prctl(option, value, 0, 0, 0))


def leave_keyring() -> None:
    """Gives this process a session keyring of its own, an empty one: whoever has root's can use root's keys.

    See keyctl_join_session_keyring(3).
    """
    try:
        _syscall(_KEYCTL.get(os.uname().machine, _KEYCTL_GENERIC), _KEYCTL_JOIN_SESSION_KEYRING, 0)
    except OSError as exc:
        # A kernel without keys has none to give away. A filter that refuses this call refuses all others of it, too.
        if exc.errno not in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
            raise


class CapabilitySets(NamedTuple):
    """A process's sets of capabilities, as numbers with a bit for each."""

    effective: int
    permitted: int
    inheritable: int


def _header() -> ctypes.Array[ctypes.c_uint32]:
    """`struct __user_cap_header_struct` of this process."""
    return (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)


def own_capabilities() -> CapabilitySets:
    """Those of this process. See capget(2)."""
    # `struct __user_cap_data_struct` has them in this order: once with the lower half of each, once with the upper one.
    words = (ctypes.c_uint32 * 6)()
    _checked(_libc.capget(_header(), words))
    return CapabilitySets(*(low | high << 32 for low, high in zip(words[:3], words[3:])))


def drop_capabilities() -> None:
    """Empties all sets of this process but the bounding set. See capset(2), and PR_CAP_AMBIENT in prctl(2)."""
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _checked(_libc.capset(_header(), (ctypes.c_uint32 * 6)()))
