# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the processes of this host that hold an iommufd, and what they hold."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ._budget import Account
from ._capabilities import CAP_IPC_LOCK, names
from ._errors import DescriptorGone, IommufdError, NotAnIommufd, ProcessGone, error_text
from ._iommufd import (
    HUGE_PAGES,
    RLIMIT_MODE,
    UNSUPPORTED,
    IommuFd,
    can_be_set,
    decide,
    explain,
    iommufd_rdevs,
    misc_rdev,
)
from ._process import Limit, Process, Status, character_devices_in, parse_stat, parse_status, read_file
from ._target import borrow_iommufd

__all__ = ("HeldIommufd", "Holder", "Survey", "survey")

# A VMM has an IOAS among its first objects, and the ids of all objects are the lowest free ones. Each id that is tried
# is a system call, for each VMM of the host.
_IOAS_GAP = 32

# As the kernel writes it. A process without memory has no such line.
_NOTHING_PINNED = b"\nVmPin:\t       0 kB\n"

_CURE = "That takes root with CAP_SYS_PTRACE (become: true) on the host itself, and kernel.yama.ptrace_scope below 3."
_LEADERLESS = "The first thread has ended while others run on, which puts the descriptors out of reach."

# Threads end one after the other when a process does, within this many seconds after it was told to.
_ENDING = 0.1
# include/linux/sched.h, in the flags of /proc/PID/task/TID/stat.
_PF_EXITING = 0x00000004


class HeldIommufd(NamedTuple):
    """An iommufd of a process. `ioases` are pairs of an id and whether that uses huge pages, None if unknown.

    `rlimit_mode` is None where it could not be read, which `msg` explains; `settable` where the caller may not know.
    """

    fd: int
    rlimit_mode: str | None
    settable: bool | None
    ioases: list[tuple[int, bool | None]]
    msg: str = ""


class Holder(NamedTuple):
    """A process that holds an iommufd, or, with `iommufds` None, may hold one: it does not let this caller look.

    `devices` are the character devices it has open, by descriptor.
    """

    pid: int
    comm: str
    user: str | None
    started: float
    status: Status
    memlock: Limit
    units: tuple[str | None, str | None]
    initial: bool | None
    arguments: list[bytes]
    devices: dict[int, int]
    iommufds: list[HeldIommufd] | None

    def account(self) -> Account:
        """What matters for what it is charged. Memory is pinned through an IOAS, so iommufds with one decide."""
        modes = None
        if self.iommufds is not None:
            used = [each for each in self.iommufds if each.ioases or each.rlimit_mode is None] or self.iommufds
            modes = frozenset(each.rlimit_mode for each in used)
        return Account(
            pid=self.pid,
            uid=self.status.uid,
            modes=modes,
            ipc_lock=CAP_IPC_LOCK in names(self.status.effective),
            initial=self.initial,
            pinned=self.status.pinned_bytes,
            locked=self.status.locked_bytes,
            limit=self.memlock.soft,
        )


Reasons = dict[str, list[int]]


@dataclass
class Survey:
    """What was seen. `others_pinned`: by user, what processes without an iommufd have pinned.

    The rest is what this caller was kept from, each a reason and the processes: `hidden` from looking at them at all,
    `closed` from looking at their descriptors, `refused` from sharing an iommufd. `leaderless` are those whose first
    thread has ended, until it is known whether the others will too.
    """

    holders: list[Holder] = field(default_factory=list)
    others_pinned: dict[int, int] = field(default_factory=dict)
    hidden: Reasons = field(default_factory=dict)
    closed: Reasons = field(default_factory=dict)
    refused: Reasons = field(default_factory=dict)
    leaderless: list[int] = field(default_factory=list)


def survey() -> Survey:
    """Looks at all processes in /proc. One that ends meanwhile is left out. Raises HostLacks."""
    if misc_rdev() is None:
        # Nobody can hold one.
        return Survey()
    result = Survey()
    seen: dict[int, dict[int, int]] = {}
    closed: dict[int, str] = {}
    for pid in _pids():
        try:
            seen[pid] = _character_devices(pid)
        except PermissionError as exc:
            closed[pid] = _reason(exc)
        except (FileNotFoundError, ProcessLookupError):
            continue
    rdevs = iommufd_rdevs(set().union(*(devices.values() for devices in seen.values())))
    for pid, devices in seen.items():
        if rdevs.isdisjoint(devices.values()) or not _add_holder(result, pid, devices, rdevs):
            _add_other(result, pid)
    for pid, error in closed.items():
        _add_closed(result, pid, error)
    _add_leaderless(result)
    result.holders.sort(key=lambda holder: holder.pid)
    return result


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _character_devices(pid: int) -> dict[int, int]:
    """The character devices of a process that is not held: a hint, since the id may soon mean another one."""
    folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return character_devices_in(folder)
    finally:
        os.close(folder)


def _add_holder(result: Survey, pid: int, devices: dict[int, int], rdevs: set[int]) -> bool:
    """Adds the process if it holds an iommufd still; False where it does not."""
    try:
        with Process.hold(pid) as process:
            fds = [fd for fd, rdev in devices.items() if rdev in rdevs]
            held = list(_held_iommufds(result, process, fds, rdevs))
            if not held:
                return False
            result.holders.append(_holder(process, _still_open(process, devices), held))
    except ProcessGone:
        pass
    except IommufdError as exc:
        # Without its first thread it shows no iommufd either.
        return _add_hidden(result, pid, exc)
    return True


def _add_hidden(result: Survey, pid: int, exc: IommufdError) -> bool:
    """Adds a process that cannot be held; False where its first thread has ended, and that is the reason."""
    with contextlib.suppress(OSError, IommufdError):
        status = _status(pid)
        if status and status.leaderless:
            return False
    result.hidden.setdefault(_reason(exc), []).append(pid)
    return True


def _still_open(process: Process, devices: dict[int, int]) -> dict[int, int]:
    """Those of the devices that it has still: they were seen before it was held, and may have been another one's."""
    found = {}
    for fd, rdev in devices.items():
        with contextlib.suppress(DescriptorGone):
            if process.character_device(fd) == rdev:
                found[fd] = rdev
    return found


def _held_iommufds(result: Survey, process: Process, fds: list[int], rdevs: set[int]) -> Iterator[HeldIommufd]:
    refused = ""
    for fd in fds:
        try:
            with borrow_iommufd(process, fd, rdevs) as iommufd:
                held = _ask(iommufd, fd, f"iommufd {fd} of {process}")
        except (DescriptorGone, NotAnIommufd):
            continue
        except ProcessGone:
            raise
        except IommufdError as exc:
            held = HeldIommufd(fd, None, None, [], str(exc))
            refused = _reason(exc)
        yield held
    if refused:
        result.refused.setdefault(refused, []).append(process.pid)


def _ask(iommufd: IommuFd, fd: int, subject: str) -> HeldIommufd:
    answer = iommufd.get(RLIMIT_MODE)
    result = decide(answer, None, answer)
    # A kernel without the option charges the user.
    number = 0 if result.outcome == UNSUPPORTED else result.before
    mode = None if number is None else str(RLIMIT_MODE.value(number))
    settable = can_be_set(iommufd.probe(RLIMIT_MODE))
    # What can be set holds no object, and so no IOAS.
    ids = [] if settable else iommufd.ioases(_IOAS_GAP).ids or iommufd.ioases().ids
    pages = [iommufd.get(HUGE_PAGES, each) for each in ids]
    ioases = [(ioas_id, None if each.errno else bool(each.value)) for ioas_id, each in zip(ids, pages)]
    return HeldIommufd(fd, mode, settable, ioases, explain(result, subject, RLIMIT_MODE, None))


def _holder(process: Process, devices: dict[int, int], iommufds: list[HeldIommufd] | None) -> Holder:
    return Holder(
        pid=process.pid,
        comm=process.comm,
        user=process.user,
        started=process.started(),
        status=process.status,
        memlock=process.memlock(),
        units=process.units(),
        initial=process.in_initial_user_namespace(),
        arguments=process.arguments(),
        devices=devices,
        iommufds=iommufds,
    )


def _add_other(result: Survey, pid: int) -> None:
    """Counts what a process without an iommufd has pinned."""
    try:
        text = _status_text(pid)
        # So it is with nearly all processes of a host, and to take the whole text apart costs as much as to read it.
        status = None if text is None or _NOTHING_PINNED in text else parse_status(text)
    except (PermissionError, IommufdError) as exc:
        result.hidden.setdefault(_reason(exc), []).append(pid)
        return
    if status and status.leaderless:
        result.leaderless.append(pid)
    if status and status.pinned_bytes:
        result.others_pinned[status.uid] = result.others_pinned.get(status.uid, 0) + status.pinned_bytes


def _add_closed(result: Survey, pid: int, error: str) -> None:
    """Counts a process whose descriptors this caller may not look at, and adds it if it has pinned memory."""
    try:
        status = _status(pid)
        if status and status.leaderless:
            result.leaderless.append(pid)
        # Kernel threads, and what is about to end, have no descriptors.
        if not status or not status.has_memory:
            return
        result.closed.setdefault(error, []).append(pid)
        if status.pinned_bytes:
            with Process.hold(pid) as process:
                result.holders.append(_holder(process, {}, None))
    except ProcessGone:
        pass
    except (PermissionError, IommufdError) as exc:
        result.hidden.setdefault(_reason(exc), []).append(pid)


def _add_leaderless(result: Survey) -> None:
    """Counts those whose first thread has ended while others run on. One that ends as a whole looks so for a moment."""
    if result.leaderless:
        time.sleep(_ENDING)
    lingering = [pid for pid in result.leaderless if _lingers(pid)]
    if lingering:
        result.closed.setdefault(_LEADERLESS, []).extend(lingering)


def _lingers(pid: int) -> bool:
    """Whether a thread of the process is not about to end."""
    folder = f"/proc/{pid}/task"
    with contextlib.suppress(OSError):
        for thread in os.listdir(folder):
            with contextlib.suppress(OSError):
                if not parse_stat(read_file(f"{folder}/{thread}/stat")).flags & _PF_EXITING:
                    return True
    return False


def _status(pid: int) -> Status | None:
    """What is said of a process that is not held; None where it has ended. Raises PermissionError."""
    text = _status_text(pid)
    return None if text is None else parse_status(text)


def _status_text(pid: int) -> bytes | None:
    try:
        return read_file(f"/proc/{pid}/status")
    except (FileNotFoundError, ProcessLookupError):
        return None


def _reason(exc: Exception) -> str:
    """The kernel's word where there is one, which is the same for many processes, and the way out."""
    cause = exc if isinstance(exc, OSError) else exc.__cause__
    return f"{error_text(cause.errno)}. {_CURE}" if isinstance(cause, OSError) else str(exc)
