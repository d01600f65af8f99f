# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the processes of this host that hold an iommufd, and what they hold."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ._budget import Account
from ._capabilities import CAP_IPC_LOCK, names
from ._child import answers, in_child
from ._errors import DescriptorGone, IommufdError, NotAnIommufd, ProcessGone, error_text
from ._iommufd import (
    HUGE_PAGES,
    RLIMIT_MODE,
    UNSUPPORTED,
    VFIO_CONTAINER_RDEV,
    IommuFd,
    can_be_set,
    decide,
    explain,
    iommufd_rdevs,
    misc_rdev,
)
from ._process import Limit, Process, Status, number_in, parse_stat, parse_status, read_file
from ._qemu import guest_memory, guest_name, is_session_domain
from ._tables import LARGE, TOO_MANY, Tables
from ._target import IOMMUFDS_MAX, Swapped, borrow_iommufd

__all__ = ("HeldIommufd", "Holder", "Survey", "survey")

# A VMM has an IOAS among its first objects, and the ids of all objects are the lowest free ones. Each id that is tried
# is a system call, for each VMM of the host.
_IOAS_GAP = 32

# How many IOASes of a process are told, how many of its device nodes, and how much of a name.
_IOASES_MAX = 1024
_NODES_MAX = 256
_NAME_MAX = 255

# How many processes that hold an iommufd are looked at of one user, and of all, and how many iommufds. There is no host
# with so many VMs.
_OF_USER = 2500
_OF_ALL = 10000
_IOMMUFDS_OF_USER = 4096

# In seconds: how long one process may keep us, and all together. How often one user's processes may, and all.
_PATIENCE = 10
_SECONDS = 300
_STRIKES_OF_USER = 3
_STRIKES_OF_ALL = 32

# As the kernel writes it. A process without memory has no such line.
_NOTHING_PINNED = b"\nVmPin:\t       0 kB\n"

_CURE = "That takes root with CAP_SYS_PTRACE (become: true) on the host itself, and kernel.yama.ptrace_scope below 3."
_LEADERLESS = "The first thread has ended while others run on, which puts the descriptors out of reach."
_TOO_MANY_IOMMUFDS = f"It has more than {IOMMUFDS_MAX} iommufds, or IOASes, than are looked at."
_TOO_MANY_HOLDERS = (
    f"There are too many processes with an iommufd. At most {_OF_USER} of a user's are looked at, with"
    f" {_IOMMUFDS_OF_USER} iommufds, and {_OF_ALL} of all."
)
_SWAPS = "It puts other files in the place of its iommufds while they are looked at."
_HANGS = "Processes of its user keep whoever looks at their iommufds waiting, or put other files in their place."

# Threads end one after the other when a process does, within this many seconds after it was told to.
_ENDING = 0.1
# How many threads of a process are looked at, whether they are about to end.
_THREADS_MAX = 1000
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

    `name`, `memory_bytes` and `session` are what its command line says of its guest, the name decoded as file names
    are. `devices` are the device nodes that it has open of those that were asked for, by descriptor. `more`: it has
    iommufds, or descriptors, that were not looked at.
    """

    pid: int
    comm: str
    user: str | None
    started: float
    status: Status
    memlock: Limit
    units: tuple[str | None, str | None]
    initial: bool | None
    name: str | None
    memory_bytes: int | None
    session: bool
    devices: dict[int, int]
    iommufds: list[HeldIommufd] | None
    more: bool

    def account(self) -> Account:
        """What matters for what it is charged. Memory is pinned through an IOAS, so iommufds with one decide."""
        modes = None
        if self.iommufds is not None:
            used = [each for each in self.iommufds if each.ioases or each.rlimit_mode is None] or self.iommufds
            # One that was not looked at may have any mode.
            modes = frozenset([each.rlimit_mode for each in used] + [None] * self.more)
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

    def to_json(self) -> list[Any]:
        """What `from_json` takes. JSON has neither named tuples nor numbers as keys."""
        return [*self, list(self.devices.items())]

    @classmethod
    def from_json(cls, given: list[Any]) -> Holder:
        """What `to_json` has made, in a child of this caller's own."""
        *values, devices = given
        row = cls(*values)
        iommufds = row.iommufds
        if iommufds is not None:
            held = [HeldIommufd(*each) for each in iommufds]
            iommufds = [each._replace(ioases=[(pair[0], pair[1]) for pair in each.ioases]) for each in held]
        return row._replace(
            status=Status(*row.status),
            memlock=Limit(*row.memlock),
            units=(row.units[0], row.units[1]),
            devices=dict(devices),
            iommufds=iommufds,
        )


Reasons = dict[str, list[int]]


@dataclass
class Survey:
    """What was seen. `others_pinned`: by user, what processes have pinned of which no iommufd was looked at.

    `unseen`: the users of such processes that may hold one all the same.
    The rest is what was not seen, each a reason and the processes: `hidden` as a whole, `closed` their descriptors, or
    some of them, and `refused` their iommufds. `leaderless` are those whose first thread has ended, until it is known
    whether the others will too.
    """

    holders: list[Holder] = field(default_factory=list)
    others_pinned: dict[int, int] = field(default_factory=dict)
    unseen: set[int] = field(default_factory=set)
    hidden: Reasons = field(default_factory=dict)
    closed: Reasons = field(default_factory=dict)
    refused: Reasons = field(default_factory=dict)
    leaderless: list[int] = field(default_factory=list)


class Candidate(NamedTuple):
    """A process that seems to hold an iommufd. `devices` None: it does not let this caller look at its descriptors.

    `more`: it has descriptors that were not looked at.
    """

    pid: int
    uid: int
    devices: dict[int, int] | None
    more: bool = False


def survey(nodes: Collection[int] = ()) -> Survey:
    """Looks at all processes in /proc. One that ends meanwhile is left out. Raises HostLacks.

    `nodes` are the numbers of other devices of which it is told who has them open beside an iommufd.
    """
    misc = misc_rdev()
    if misc is None:
        # Nobody can hold one.
        return Survey()
    result = Survey()
    tables = Tables({misc, VFIO_CONTAINER_RDEV, *nodes})
    found = [each for pid, text in _small_first(result) if (each := _look_at_table(result, tables, pid, text))]
    # Whether /dev/vfio/vfio is an iommufd is found out only where somebody has it open.
    open_ = {rdev for each in found for rdev in (each.devices or {}).values()}
    rdevs = iommufd_rdevs(open_ & {misc, VFIO_CONTAINER_RDEV})
    candidates = [each for each in found if each.devices is None or not rdevs.isdisjoint(each.devices.values())]
    for each in found:
        if each.devices is not None and rdevs.isdisjoint(each.devices.values()):
            _add_other(result, each.pid)
    _look_at_all(result, candidates, rdevs, nodes)
    _add_leaderless(result)
    result.holders.sort(key=lambda holder: holder.pid)
    return result


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _small_first(result: Survey) -> Iterator[tuple[int, bytes]]:
    """All processes and what is said of them, those with large tables of descriptors last, and of these the smaller.

    How much is looked at has an end, and nobody who fills tables is to keep others' from being looked at.
    """
    large = []
    for pid in _pids():
        text = _status_text_of(result, pid)
        size = 0 if text is None else number_in(text, b"FDSize")
        if size > LARGE:
            large.append((size, pid))
        elif text is not None:
            yield pid, text
    for _size, pid in sorted(large):
        text = _status_text_of(result, pid)
        if text is not None:
            yield pid, text


def _status_text_of(result: Survey, pid: int) -> bytes | None:
    try:
        return _status_text(pid)
    except PermissionError as exc:
        result.hidden.setdefault(_reason(exc), []).append(pid)
        return None


def _look_at_table(result: Survey, tables: Tables, pid: int, text: bytes) -> Candidate | None:
    """The process, if it has one of the devices open, or does not let this caller look but has pinned memory.

    It is not held, so this is a hint: its id may mean another one by now.
    """
    uid = number_in(text, b"Uid")
    try:
        found = tables.look(pid, uid, number_in(text, b"FDSize"))
    except PermissionError as exc:
        return Candidate(pid, uid, None) if _add_closed(result, pid, text, _reason(exc)) else None
    except (FileNotFoundError, ProcessLookupError):
        return None
    if found.more:
        result.closed.setdefault(TOO_MANY, []).append(pid)
    if found.devices:
        return Candidate(pid, uid, found.devices, found.more)
    if found.more:
        result.unseen.add(uid)
    _add_other(result, pid, text)
    return None


class Answer(NamedTuple):
    """What came of a look at a candidate, good for JSON. `holder` is as Holder.to_json makes it, None without one.

    Then `gone` tells that the process has ended, and `hidden` why it could not be held, if one of these is so.
    `refused` is why an iommufd could not be shared. `swapped`: something else was shared in its place, which may take
    for ever to close, so whoever has it looks at nobody else.
    """

    holder: list[Any] | None = None
    gone: bool = False
    hidden: str = ""
    refused: str = ""
    swapped: bool = False


def _look_at_all(result: Survey, candidates: list[Candidate], rdevs: set[int], nodes: Collection[int]) -> None:
    """Looks at the candidates in children, which nobody waits for where they hang. Nearly always one does for all."""
    deadline = time.monotonic() + _SECONDS
    waiting = _within_bounds(result, candidates, rdevs)
    strikes: Counter[int] = Counter()
    while waiting:
        culprit = waiting[0]
        reason = ""
        if strikes[culprit.uid] >= _STRIKES_OF_USER or sum(strikes.values()) >= _STRIKES_OF_ALL:
            reason = _HANGS
        elif time.monotonic() > deadline:
            reason = f"No time was left for it after {_SECONDS} seconds."
        if reason:
            _leave_out(result, waiting.popleft(), reason)
            continue
        work = partial(_look_at_each, list(waiting), rdevs, nodes)
        try:
            with contextlib.closing(answers(None, work, _PATIENCE)) as said:
                for given in said:
                    culprit = waiting.popleft()
                    answer = Answer(*given)
                    _add_answer(result, culprit, answer)
                    if answer.swapped or time.monotonic() > deadline:
                        # It has nothing to say any more, or must not; and its own end may take for ever.
                        break
        except IommufdError as exc:
            # Whoever is the first now is the one that the child was at.
            culprit = waiting.popleft()
            _leave_out(result, culprit, _reason(exc))
        strikes[culprit.uid] += 1


def _within_bounds(result: Survey, candidates: list[Candidate], rdevs: set[int]) -> deque[Candidate]:
    """Those candidates that are looked at. What the others have pinned is counted."""
    waiting: deque[Candidate] = deque()
    of_user: Counter[int] = Counter()
    iommufds: Counter[int] = Counter()
    for each in candidates:
        if of_user[each.uid] >= _OF_USER or iommufds[each.uid] >= _IOMMUFDS_OF_USER or len(waiting) >= _OF_ALL:
            _leave_out(result, each, _TOO_MANY_HOLDERS)
        else:
            waiting.append(each)
        of_user[each.uid] += 1
        iommufds[each.uid] += min(IOMMUFDS_MAX, sum(rdev in rdevs for rdev in (each.devices or {}).values()))
    return waiting


def _leave_out(result: Survey, candidate: Candidate, reason: str) -> None:
    result.refused.setdefault(reason, []).append(candidate.pid)
    result.unseen.add(candidate.uid)
    _add_other(result, candidate.pid)


def _add_answer(result: Survey, candidate: Candidate, answer: Answer) -> None:
    if answer.holder is not None:
        result.holders.append(Holder.from_json(answer.holder))
    elif answer.hidden:
        result.hidden.setdefault(answer.hidden, []).append(candidate.pid)
    elif not answer.gone:
        _add_other(result, candidate.pid)
    if answer.refused:
        result.refused.setdefault(answer.refused, []).append(candidate.pid)
        if answer.holder is None:
            result.unseen.add(candidate.uid)


def _look_at_each(candidates: list[Candidate], rdevs: set[int], nodes: Collection[int]) -> Iterator[Answer]:
    """The life of a child: what comes of each candidate, up to one that has had it share what may never close."""
    for each in candidates:
        answer = _look_at(each, rdevs, nodes)
        yield answer
        if answer.swapped:
            return


def _look_at(candidate: Candidate, rdevs: set[int], nodes: Collection[int]) -> Answer:
    """What there is to be told of a candidate."""
    swapped = False
    try:
        with Process.hold(candidate.pid) as process:
            if candidate.devices is None:
                return Answer(_holder(process, {}, None, more=False).to_json())
            fds = [fd for fd, rdev in candidate.devices.items() if rdev in rdevs]
            held, refused, swapped = _held_iommufds(process, fds[:IOMMUFDS_MAX], rdevs)
            if not held:
                return Answer(refused=refused, swapped=swapped)
            many = len(fds) > IOMMUFDS_MAX or sum(len(each.ioases) for each in held) > _IOASES_MAX
            devices = _still_open(process, candidate.devices, nodes)
            holder = _holder(process, devices, _cut(held), candidate.more or many or swapped)
            return Answer(holder.to_json(), refused=refused or (_TOO_MANY_IOMMUFDS if many else ""), swapped=swapped)
    except ProcessGone:
        return Answer(gone=True, swapped=swapped)
    except IommufdError as exc:
        # Without its first thread it shows no iommufd either.
        return Answer(hidden="" if _is_leaderless(candidate.pid) else _reason(exc), swapped=swapped)


def _is_leaderless(pid: int) -> bool:
    with contextlib.suppress(OSError, IommufdError):
        status = _status(pid)
        return status is not None and status.leaderless
    return False


def _still_open(process: Process, devices: dict[int, int], nodes: Collection[int]) -> dict[int, int]:
    """Those of the nodes that it has still: they were seen before it was held, and may have been another one's."""
    found: dict[int, int] = {}
    for fd, rdev in devices.items():
        if rdev in nodes and len(found) < _NODES_MAX:
            with contextlib.suppress(DescriptorGone):
                if process.character_device(fd) == rdev:
                    found[fd] = rdev
    return found


def _held_iommufds(process: Process, fds: list[int], rdevs: set[int]) -> tuple[list[HeldIommufd], str, bool]:
    """Its iommufds, why one could not be shared, and whether it has put something else in the place of one."""
    found: list[HeldIommufd] = []
    refused = ""
    for fd in fds:
        try:
            with borrow_iommufd(process, fd, rdevs) as iommufd:
                held = _ask(iommufd, fd, f"iommufd {fd} of {process}")
        except Swapped:
            return found, _SWAPS, True
        except (DescriptorGone, NotAnIommufd):
            continue
        except ProcessGone:
            raise
        except IommufdError as exc:
            held = HeldIommufd(fd, None, None, [], str(exc))
            refused = _reason(exc)
        found.append(held)
    return found, refused, False


def _cut(held: list[HeldIommufd]) -> list[HeldIommufd]:
    """The iommufds with no more IOASes than are told."""
    left = _IOASES_MAX
    found = []
    for each in held:
        found.append(each._replace(ioases=each.ioases[:left]))
        left -= len(found[-1].ioases)
    return found


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


def _holder(process: Process, devices: dict[int, int], iommufds: list[HeldIommufd] | None, more: bool) -> Holder:
    # What the process may have changed at will, and to any length: it is not kept.
    arguments = process.arguments()
    guest = guest_name(arguments)
    return Holder(
        pid=process.pid,
        comm=process.comm,
        user=process.user,
        started=process.started(),
        status=process.status,
        memlock=process.memlock(),
        units=process.units(),
        initial=process.in_initial_user_namespace(),
        name=None if guest is None else _shortened(os.fsdecode(guest)),
        memory_bytes=guest_memory(arguments),
        session=is_session_domain(arguments),
        devices=devices,
        iommufds=iommufds,
        more=more,
    )


def _shortened(name: str) -> str:
    """A name that is no longer than any that a file may have, as libvirt's domains have files."""
    return name if len(name) <= _NAME_MAX else f"{name[:_NAME_MAX]}..."


def _add_other(result: Survey, pid: int, text: bytes | None = None) -> None:
    """Counts what a process without an iommufd has pinned. `text` is what was said of it, if it was asked for."""
    try:
        text = text or _status_text(pid)
        # So it is with nearly all processes of a host, and to take the whole text apart costs as much as to read it.
        status = None if text is None or _NOTHING_PINNED in text else parse_status(text)
    except (PermissionError, IommufdError) as exc:
        result.hidden.setdefault(_reason(exc), []).append(pid)
        return
    if status and status.leaderless:
        result.leaderless.append(pid)
    if status and status.pinned_bytes:
        result.others_pinned[status.uid] = result.others_pinned.get(status.uid, 0) + status.pinned_bytes


def _add_closed(result: Survey, pid: int, text: bytes, error: str) -> bool:
    """Counts a process whose descriptors this caller may not look at; True where it has pinned memory."""
    try:
        status = parse_status(text)
    except IommufdError as exc:
        result.hidden.setdefault(str(exc), []).append(pid)
        return False
    if status.leaderless:
        result.leaderless.append(pid)
    # Kernel threads, and what is about to end, have no descriptors.
    if not status.has_memory:
        return False
    result.closed.setdefault(error, []).append(pid)
    return bool(status.pinned_bytes)


def _add_leaderless(result: Survey) -> None:
    """Counts those whose first thread has ended while others run on. One that ends as a whole looks so for a moment."""
    if not result.leaderless:
        return
    time.sleep(_ENDING)
    pids = result.leaderless
    try:
        lingering = in_child(None, lambda: [(pid, *found) for pid in pids if (found := _lingers(pid))], _PATIENCE)
    except IommufdError as exc:
        # One that keeps us waiting is not known to end, and nothing is known of what the others have pinned.
        result.hidden.setdefault(str(exc), []).extend(pids)
        return
    for pid, uid, pinned in lingering:
        result.closed.setdefault(_LEADERLESS, []).append(pid)
        result.unseen.add(uid)
        if pinned:
            result.others_pinned[uid] = result.others_pinned.get(uid, 0) + pinned


def _lingers(pid: int) -> tuple[int, int] | None:
    """The user of a process, and what it has pinned, by a thread that is not about to end; None without one."""
    folder = f"/proc/{pid}/task"
    with contextlib.suppress(OSError):
        for thread in os.listdir(folder)[:_THREADS_MAX]:
            with contextlib.suppress(OSError):
                if not parse_stat(read_file(f"{folder}/{thread}/stat")).flags & _PF_EXITING:
                    status = parse_status(read_file(f"{folder}/{thread}/status"))
                    return status.uid, status.pinned_bytes
    return None


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
