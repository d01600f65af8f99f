# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what running processes are charged for, and what is left of their limits. Pure functions.

What is checked for whom, and what lifts that, is what _accounting has in WAYS.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple, Optional

from ._accounting import IOMMUFD, IOMMUFD_PROCESS, IOMMUFD_USER, LEGACY, MM_LOCKED, MM_PINNED, USER, VDPA, WAYS
from ._iommufd import NONE, PROCESS

__all__ = (
    "Account",
    "Check",
    "Total",
    "account_notes",
    "accounting",
    "charged",
    "checks",
    "decisive",
    "largest_limit",
    "total",
    "way_of",
)

Ways = Optional[frozenset[Optional[str]]]  # at run time: Python 3.9 has no str | None

_COUNTERS = (USER, MM_LOCKED, MM_PINNED)
_BACKENDS = {IOMMUFD_USER: IOMMUFD, IOMMUFD_PROCESS: IOMMUFD}
_LEGACY_ALONE: Ways = frozenset({LEGACY})
_BOTH_MODES: Ways = frozenset({IOMMUFD_USER, IOMMUFD_PROCESS})
_ACCOUNTINGS = {IOMMUFD_USER: USER, IOMMUFD_PROCESS: PROCESS}


class Account(NamedTuple):
    """What is known of a process that matters for what it is charged. Sizes are bytes.

    `ways` are those in which it can pin memory, by their names in WAYS, None in it for an iommufd whose mode is not
    known; None for all of it where its descriptors could not be looked at. `initial`: whether it is in the initial user
    namespace, None where that could not be told. `limit` is the soft RLIMIT_MEMLOCK, None for unlimited. `holder`:
    whether it pins nothing, but holds what another process pins by; None where that could not be told. `locks`: whether
    its command line has it lock its memory itself. `as_it_runs`: whether it may pin more as it runs, without getting
    more memory or devices, since a device of it does so. `changed_user`: whether it was another user, with other
    capabilities, as it pinned what it has. `idle`: whether it has pinned nothing, and nothing in its iommufds either.
    `keeps`: whether it may keep what a VM that has ended had pinned (Survey.keepers).
    """

    pid: int
    uid: int
    ways: Ways
    ipc_lock: bool
    initial: bool | None
    pinned: int
    locked: int
    limit: int | None
    holder: bool | None = False
    locks: bool | None = None
    as_it_runs: bool = False
    changed_user: bool = False
    idle: bool = False
    keeps: bool = False

    @property
    def capable(self) -> bool | None:
        """Whether it had CAP_IPC_LOCK where that counts, as it pinned; None where this cannot be told."""
        if self.ipc_lock:
            return self.initial
        return None if self.changed_user else False


class Check(NamedTuple):
    """A counter that the kernel compares with the limit of a process, for what it pins by these backends.

    `held` is what the counter holds, `headroom` what is left of the limit, None where that is unlimited.
    """

    counter: str
    held: int
    headroom: int | None
    backends: list[str]


class Total(NamedTuple):
    """What a user's processes come to. `limit` is the smallest of those that are charged, None if that is unlimited.

    Where others are charged, those that are idle, or keep something, have no say in that.

    `uncertain` is what others of the user's processes have pinned, and may be charged to the user. `at_risk`: whether
    another process like the largest would not fit into the smallest limit, None where that cannot be told.
    """

    pids: list[int]
    charged: int
    uncertain: int
    largest: int
    limit: int | None
    at_risk: bool | None


def way_of(mode: str | None) -> str | None:
    """How memory is pinned through an iommufd of this mode; None for one that could not be read, or is not known."""
    return {USER: IOMMUFD_USER, PROCESS: IOMMUFD_PROCESS}.get(mode or "")


# Many processes of a host are alike.
@cache
def _checked(ways: Ways, capable: bool | None) -> frozenset[str] | None:
    """Those of the ways for which a counter is checked; None where that cannot be told."""
    if ways is None:
        return None
    found = []
    for name in ways:
        # All ways of an iommufd are alike in that.
        way = WAYS[name or IOMMUFD_USER]
        if way.checks is None or (way.lifts and capable):
            continue
        if name is None or (way.lifts and capable is None):
            return None
        found.append(name)
    return frozenset(found)


@cache
def _accounting(ways: Ways, capable: bool | None) -> str | None:
    checked = _checked(ways, capable)
    if checked is None or not ways:
        return None
    if not checked:
        return NONE
    modes = {_ACCOUNTINGS[name] for name in checked if name in _ACCOUNTINGS} or {PROCESS}
    return modes.pop() if len(modes) == 1 else None


def accounting(account: Account) -> str | None:
    """Who is charged for what the process pins from now on: USER, PROCESS or NONE; None where that cannot be told.

    An iommufd's mode decides. What is checked beside it, or without one, is a counter of the process.
    """
    return _accounting(account.ways, account.capable)


def checks(account: Account, of_user: Total) -> list[Check]:
    """The counters that are known to be checked for what the process pins."""
    found: list[Check] = []
    for counter in () if account.holder else _COUNTERS:
        ways = [name for name in _checked(account.ways, account.capable) or () if WAYS[name].checks == counter]
        if ways:
            held = {USER: of_user.charged, MM_LOCKED: account.locked, MM_PINNED: account.pinned}[counter]
            headroom = None if account.limit is None else account.limit - held
            found.append(Check(counter, held, headroom, sorted({_BACKENDS.get(name, name) for name in ways})))
    return found


def decisive(account: Account, found: list[Check]) -> Check | None:
    """The check that will be the first to refuse; None where there is none, or it cannot be told which."""
    if accounting(account) is None:
        return None
    return min(found, key=lambda check: float("inf") if check.headroom is None else check.headroom, default=None)


def charged(account: Account, check: Check | None) -> int | None:
    """What the process adds to the counter of its decisive check; 0 without one, None where that cannot be told."""
    if account.keeps:
        return None
    if check is None:
        return 0 if account.holder or accounting(account) == NONE else None
    if check.counter == USER and _has(account, VDPA):
        # VmPin has both what its iommufd has pinned and what its vDPA device has, which its user is not charged for.
        return None
    return account.locked if check.counter == MM_LOCKED else account.pinned


def _has(account: Account, *names: str) -> bool:
    """Whether all of these are among the ways of a process."""
    return account.ways is not None and account.ways.issuperset(names)


def total(accounts: Iterable[Account], others_pinned: int = 0, unseen: bool = False) -> Total:
    """What the processes of one user come to; `others_pinned` is what those have pinned that hold nothing of this.

    `unseen`: the user may have others with an iommufd, or be charged for what has no process any more.
    """
    accounts = [each for each in accounts if not each.holder]
    mine = [each for each in accounts if accounting(each) == USER]
    unknown = [each for each in accounts if accounting(each) is None]
    sum_ = sum(each.pinned for each in mine if not _has(each, VDPA)) + sum(
        _by_mode_user(each) or 0 for each in accounts
    )
    uncertain = others_pinned + sum(each.pinned for each in accounts if _is_uncertain(each))
    busy = [each for each in mine if not (each.idle or each.keeps)]
    risk: bool | None = _lacks_room([each for each in busy if each.holder is False], sum_)
    # What will be pinned is not known, so any limit may be too small.
    grows = any(each.as_it_runs for each in (*busy, *unknown)) and _smallest_limit([*busy, *unknown]) is not None
    if not risk and (unseen or grows or _lacks_room([*busy, *unknown], sum_ + uncertain)):
        risk = None
    return Total([each.pid for each in mine], sum_, uncertain, _largest(mine), _smallest_limit(busy or mine), risk)


def _is_uncertain(account: Account) -> bool:
    """Whether its user may be charged for what a process has pinned (VmPin), or for some of it."""
    how = accounting(account)
    if _by_mode_user(account) is not None:
        return False
    # What a legacy container pins is not in VmPin, so it is something else that is.
    return how is None or (how == USER and _has(account, VDPA)) or account.ways == _LEGACY_ALONE


def _by_mode_user(account: Account) -> int | None:
    """What a process with iommufds of both modes has pinned by those in the mode user, which is what VmLck has not.

    None for others, and where it may have locked something itself.
    """
    split = account.ways == _BOTH_MODES and account.capable is False and account.locks is False
    return account.pinned - account.locked if split and account.locked <= account.pinned else None


def _lacks_room(accounts: list[Account], sum_: int) -> bool:
    """Whether another process like the largest of these would not fit into their smallest limit, on top of a sum."""
    limit = _smallest_limit(accounts)
    return limit is not None and sum_ + _largest(accounts) > limit


def _largest(accounts: list[Account]) -> int:
    return max((each.pinned for each in accounts), default=0)


def _smallest_limit(accounts: list[Account]) -> int | None:
    return min((each.limit for each in accounts if each.limit is not None), default=None)


def largest_limit(accounts: Iterable[Account]) -> int | None:
    """The largest limit of some processes; None where one is unlimited, or there are none."""
    limits = [each.limit for each in accounts if not each.holder]
    finite = [each for each in limits if each is not None]
    return max(finite) if finite and len(finite) == len(limits) else None


def account_notes(account: Account, of_user: Total, largest_limit: int | None) -> list[str]:
    """What contradicts the accounting that was read, or why there is none. `largest_limit`: of the user's processes.

    VmPin is what was pinned, however it was accounted; VmLck grows with it only where the process is charged. So a
    capability that came or went after the memory was mapped shows.
    """
    if account.keeps:
        return [
            "No VM that runs accounts for all that it holds. If a VM that has ended had that, what the VM had pinned"
            " stays charged to its user until this process closes it. No file shows to whom, and how much."
        ]
    if account.holder:
        return ["Another process has all that it holds, and it has pinned nothing: it is not counted."]
    how = accounting(account)
    if how is None:
        return [_why_unknown(account), *_later(account)]
    notes = [*_side_by_side(account), *_later(account), *_contradictions(account, how, of_user, largest_limit)]
    if account.holder is None:
        notes.append(
            "It has pinned nothing, and it cannot be told whether it will, or only holds what another process has, too."
        )
    return notes


def _side_by_side(account: Account) -> list[str]:
    """What a capability does not lift, and what comes of several ways in one process, also with another mode."""
    notes = []
    if account.ipc_lock and account.capable is False and account.limit is not None:
        notes.append("It has CAP_IPC_LOCK in a user namespace of its own, as in a container. There it lifts no limit.")
    if _has(account, LEGACY, IOMMUFD_PROCESS) and not account.capable:
        notes.append(
            "It holds a legacy container, too. What it pins by that and what it pins by its iommufd are both added to"
            " VmLck, and compared with one limit."
        )
    if account.locks and not account.capable and (_has(account, LEGACY) or _has(account, IOMMUFD_PROCESS)):
        notes.append(
            "It locks its memory itself (mem-lock=on), too. That is added to VmLck beside what it pins, and compared"
            " with one limit."
        )
    notes += _under_process(account)
    if _has(account, VDPA):
        notes.append(
            "What its vDPA device pins is compared with VmPin, whatever capability it has, and with all that it has"
            " pinned by iommufd. A device that works with virtual addresses, such as one of VDUSE, pins nothing."
        )
    if _has(account, VDPA, IOMMUFD_USER) and accounting(account) == USER:
        notes.append("The kernel does not tell how much of VmPin its user is charged for.")
    return notes


def _under_process(account: Account) -> list[str]:
    """What process accounting would break of a process that it is to cure."""
    beside = ["holds a legacy container"] if _has(account, LEGACY) else []
    beside += ["locks its memory itself (mem-lock=on)"] if account.locks else []
    if not beside or account.capable or account.limit is None or not _has(account, IOMMUFD_USER):
        return []
    return [
        f"It {' and '.join(beside)}, too. That counts in VmLck, where what it pins by its iommufd would count as well"
        f" under process: its limit would have to hold its memory {'three times' if len(beside) > 1 else 'twice'}"
        f"{', and all else that it locks' if account.locks else ''}."
    ]


def _later(account: Account) -> list[str]:
    """What may become of the limit that something is compared with."""
    if not account.as_it_runs or account.limit is None or _checked(account.ways, account.capable) == frozenset():
        return []
    return [
        "It has a device that pins memory as it runs, up to all that its guest has: an mdev, or one of which sysfs does"
        " not tell what it is. What is left of the limit now may not be enough later."
    ]


def _contradictions(account: Account, how: str, of_user: Total, largest_limit: int | None) -> list[str]:
    pinned, locked = account.pinned, account.locked
    if not pinned:
        return []
    if account.ways == _LEGACY_ALONE:
        return [f"It has pinned {pinned} bytes by other means than its legacy container, such as io_uring or RDMA."]
    if how == NONE and locked and _has(account, IOMMUFD_PROCESS) and not _has(account, LEGACY):
        return [
            f"VmLck is {locked} bytes: it was charged for them before it had CAP_IPC_LOCK, or has locked memory by"
            " other means, such as mlock. What it pins from now on is not charged."
        ]
    if how == PROCESS and locked < pinned and not _has(account, VDPA):
        return [
            f"VmLck is {locked} bytes, less than the {pinned} bytes that it has pinned: the rest was pinned while it"
            " had CAP_IPC_LOCK, or by other means than iommufd, such as io_uring or RDMA."
        ]
    if how == USER and not _has(account, VDPA):
        return _contradictions_of_user(account, of_user, largest_limit)
    return []


def _why_unknown(account: Account) -> str:
    if account.ways is None:
        return "It cannot be told whether it holds an iommufd: this caller may not look at its descriptors."
    if not account.ways:
        return (
            "It holds a VFIO device, but neither an iommufd nor a container: it cannot be told how what it pins is"
            " accounted."
        )
    if account.ipc_lock and account.capable is None:
        return (
            "It has CAP_IPC_LOCK, which counts in the initial user namespace only, and this caller may not see in which"
            " it is."
        )
    if account.capable is None:
        return (
            "Its command line has it become another user once it has its devices (-runas, -run-with user=). What it"
            " pinned before is charged to the user that it was, or to nobody, if it had CAP_IPC_LOCK then, as root has."
        )
    if None in account.ways:
        return "The rlimit mode of an iommufd of it could not be read."
    return "Its iommufds differ in their rlimit mode: by which of them it pins decides who is charged for that."


def _contradictions_of_user(account: Account, of_user: Total, largest_limit: int | None) -> list[str]:
    notes = []
    if account.locked >= account.pinned and not _has(account, LEGACY):
        notes.append(
            f"VmLck, {account.locked} bytes, is no less than what it has pinned, {account.pinned} bytes, though that is"
            " charged to its user and does not show there: it has locked memory by other means, such as mlock."
        )
    if account.limit is not None and account.pinned > account.limit:
        notes.append(
            f"It has pinned {account.pinned} bytes, more than its limit of {account.limit} bytes: it had CAP_IPC_LOCK"
            " or a larger limit while it did. So its user may be charged for less than what is given here."
        )
    elif largest_limit is not None and of_user.charged > largest_limit:
        notes.append(
            f"The processes of its user have pinned {of_user.charged} bytes together, more than the limit of any of"
            " them: some had CAP_IPC_LOCK or a larger limit while they did. So the user may be charged for less."
        )
    return notes
