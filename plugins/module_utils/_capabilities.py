# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: capabilities by their names, those of a process and those that a file gives."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from ._errors import IommufdError

__all__ = (
    "CAP_IPC_LOCK",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RESOURCE",
    "IPC_LOCK",
    "XATTR",
    "FileCapabilities",
    "capability_mask",
    "capability_names",
    "parse_file_capabilities",
    "read_xattr",
    "with_ipc_lock",
    "without_ipc_lock",
    "write_xattr",
)

# linux/capability.h, from 0 up.
# fmt: off
_NAMES = (
    "cap_chown", "cap_dac_override", "cap_dac_read_search", "cap_fowner", "cap_fsetid", "cap_kill", "cap_setgid",
    "cap_setuid", "cap_setpcap", "cap_linux_immutable", "cap_net_bind_service", "cap_net_broadcast", "cap_net_admin",
    "cap_net_raw", "cap_ipc_lock", "cap_ipc_owner", "cap_sys_module", "cap_sys_rawio", "cap_sys_chroot",
    "cap_sys_ptrace", "cap_sys_pacct", "cap_sys_admin", "cap_sys_boot", "cap_sys_nice", "cap_sys_resource",
    "cap_sys_time", "cap_sys_tty_config", "cap_mknod", "cap_lease", "cap_audit_write", "cap_audit_control",
    "cap_setfcap", "cap_mac_override", "cap_mac_admin", "cap_syslog", "cap_wake_alarm", "cap_block_suspend",
    "cap_audit_read", "cap_perfmon", "cap_bpf", "cap_checkpoint_restore",
)
# fmt: on

# Where a file keeps them.
XATTR = "security.capability"

# It lifts every limit on pinned and locked memory.
CAP_IPC_LOCK = "cap_ipc_lock"
# It takes this one to look into another process.
CAP_SYS_PTRACE = "cap_sys_ptrace"
# It takes this one to set the rlimit mode.
CAP_SYS_RESOURCE = "cap_sys_resource"

# linux/capability.h: the revision is in the first word's highest byte, and says how many pairs of words follow.
_REVISION_MASK = 0xFF000000
_OLD = 0x01000000
_PLAIN = 0x02000000
_WITH_ROOT_UID = 0x03000000
_FORMS = {_OLD: "<3I", _PLAIN: "<5I", _WITH_ROOT_UID: "<6I"}
_NO_ROOT_UID: dict[int, tuple[int, ...]] = {_OLD: (0,), _PLAIN: (0,), _WITH_ROOT_UID: ()}
_EFFECTIVE = 0x1

# Its bit in a set.
IPC_LOCK = 1 << _NAMES.index(CAP_IPC_LOCK)


@cache
def capability_names(mask: int) -> tuple[str, ...]:
    """The names of the capabilities in a set, in the kernel's order. One that has no name here is given by number."""
    numbers = (number for number in range(mask.bit_length()) if mask >> number & 1)
    return tuple(_NAMES[number] if number < len(_NAMES) else f"cap_{number}" for number in numbers)


def capability_mask(names: Iterable[str]) -> int:
    """The set of the capabilities of these names or numbers, as far as there are such."""
    numbers = {**{str(number): number for number in range(63)}, **{name: place for place, name in enumerate(_NAMES)}}
    return sum({1 << numbers[name] for name in names if name in numbers})


class FileCapabilities(NamedTuple):
    """What a file gives to whoever executes it. `root_uid`: root of the user namespace that it is meant for."""

    permitted: list[str]
    inheritable: list[str]
    effective: bool
    root_uid: int

    @property
    def lifts_memlock(self) -> bool:
        """Whether a process that executes the file has CAP_IPC_LOCK at once, where the kernel asks for it."""
        return self.effective and CAP_IPC_LOCK in self.permitted and self.root_uid == 0


def parse_file_capabilities(xattr: bytes) -> FileCapabilities:
    """Reads the extended attribute `security.capability`, `struct vfs_ns_cap_data` of linux/capability.h.

    An empty one, which some tools leave, gives nothing. Raises IommufdError where it is something else.
    """
    found = _unpack(xattr)
    permitted, inheritable = (list(capability_names(each)) for each in (found.permitted, found.inheritable))
    return FileCapabilities(permitted, inheritable, found.effective, found.root_uid)


def read_xattr(file: int | str) -> bytes | None:
    """The extended attribute of a file, by its path or a descriptor; None without. Raises OSError.

    That is EINVAL for an attribute that the kernel does not understand, be it only empty: it does not give it away, and
    does not execute the file.
    """
    try:
        return os.getxattr(file, XATTR)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def write_xattr(fd: int, xattr: bytes | None) -> None:
    """Gives a file that is open exactly this extended attribute; None takes it away. Raises OSError."""
    if xattr is not None:
        os.setxattr(fd, XATTR, xattr)
    elif XATTR in os.listxattr(fd):
        os.removexattr(fd, XATTR)


class _Sets(NamedTuple):
    """The numbers that the extended attribute holds; the sets are bit masks."""

    permitted: int
    inheritable: int
    effective: bool
    root_uid: int


def _unpack(xattr: bytes) -> _Sets:
    if not xattr:
        return _Sets(0, 0, False, 0)
    try:
        magic = struct.unpack_from("<I", xattr)[0]
        revision = magic & _REVISION_MASK
        if magic & ~(_REVISION_MASK | _EFFECTIVE):
            raise ValueError("a flag of tomorrow")
        # Of exactly this length, as the kernel wants it.
        *words, root_uid = struct.unpack(_FORMS[revision], xattr)[1:] + _NO_ROOT_UID[revision]
    except (KeyError, ValueError, struct.error) as exc:
        raise IommufdError(f"security.capability has a form that is not known: {xattr[:24].hex()}.") from exc
    permitted = sum(word << 32 * index for index, word in enumerate(words[::2]))
    inheritable = sum(word << 32 * index for index, word in enumerate(words[1::2]))
    return _Sets(permitted, inheritable, bool(magic & _EFFECTIVE), root_uid)


def _pack(sets: _Sets) -> bytes:
    low = 0xFFFFFFFF
    magic = (_WITH_ROOT_UID if sets.root_uid else _PLAIN) | (_EFFECTIVE if sets.effective else 0)
    words = [sets.permitted & low, sets.inheritable & low, sets.permitted >> 32, sets.inheritable >> 32]
    return struct.pack("<5I", magic, *words) + (struct.pack("<I", sets.root_uid) if sets.root_uid else b"")


def with_ipc_lock(xattr: bytes | None) -> bytes:
    """The extended attribute that gives CAP_IPC_LOCK too, permitted and effective; None is a file without one.

    The bytes are those that setcap(8) writes. Raises IommufdError where the form is not known, and where it would give
    more than that: one bit says for all of a file's capabilities whether they are effective, and one user id says for
    which user namespace all of them are. What is for another one than the initial one is never touched: the owner of
    a file gives it that in a user namespace of his own, and says with it nothing about this host.
    """
    sets = _unpack(xattr or b"")
    if sets.root_uid:
        given = ", ".join(capability_names(sets.permitted | sets.inheritable)) or "nothing"
        raise IommufdError(
            f"Its capabilities ({given}) are for the user namespace of uid {sets.root_uid} only, and CAP_IPC_LOCK,"
            " which has to be for the initial one, would give them there too."
        )
    others = ", ".join(capability_names((sets.permitted | sets.inheritable) & ~IPC_LOCK))
    if others and not sets.effective:
        raise IommufdError(
            f"It has {others} that are not effective, and CAP_IPC_LOCK, which has to be, would make them effective too."
        )
    return _pack(_Sets(sets.permitted | IPC_LOCK, sets.inheritable, True, 0))


def without_ipc_lock(xattr: bytes) -> bytes | None:
    """The extended attribute that gives no CAP_IPC_LOCK and all else as before; None where nothing else is left.

    Raises IommufdError where the form is not known.
    """
    sets = _unpack(xattr)
    left = sets._replace(permitted=sets.permitted & ~IPC_LOCK, inheritable=sets.inheritable & ~IPC_LOCK)
    return _pack(left) if left.permitted or left.inheritable else None
