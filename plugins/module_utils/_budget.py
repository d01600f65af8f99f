# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: who is charged for pinned memory, and what is left of the limit. Pure functions.

The rules are those of drivers/iommu/iommufd/pages.c: iopt_alloc_pages() chooses who is charged when memory is mapped,
by capable(CAP_IPC_LOCK) and then by the iommufd's rlimit mode; incr_user_locked_vm() and update_mm_locked_vm() charge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ._iommufd import NONE, PROCESS, USER

__all__ = (
    "Account",
    "Total",
    "account_notes",
    "accounting",
    "charged",
    "headroom",
    "largest_limit",
    "total",
)


class Account(NamedTuple):
    """What is known of a process that matters for what it is charged. Sizes are bytes.

    `modes` are the rlimit modes of its iommufds, None in it for one that could not be read; None for all of it where
    its descriptors could not be looked at. `initial`: whether it is in the initial user namespace, None where that
    could not be told. `limit` is the soft RLIMIT_MEMLOCK, None for unlimited.
    """

    pid: int
    uid: int
    modes: frozenset[str | None] | None
    ipc_lock: bool
    initial: bool | None
    pinned: int
    locked: int
    limit: int | None


class Total(NamedTuple):
    """What a user's processes come to. `limit` is the smallest of those that are charged, None if that is unlimited.

    `uncertain` is what others of the user's processes have pinned, and may be charged to the user. `at_risk`: whether
    another process like the largest would not fit into the smallest limit, None where that cannot be told.
    """

    pids: list[int]
    charged: int
    uncertain: int
    largest: int
    limit: int | None
    at_risk: bool | None


def accounting(account: Account) -> str | None:
    """Who is charged for what the process pins from now on: USER, PROCESS or NONE; None where that cannot be told."""
    if account.modes is None:
        return None
    if account.ipc_lock and account.initial:
        return NONE
    if account.ipc_lock and account.initial is None:
        return None
    # A mode that this collection does not know is like one that could not be read.
    return next(iter(account.modes)) if account.modes in ({USER}, {PROCESS}) else None


def charged(account: Account) -> int | None:
    """What the process contributes to the charge; None where that cannot be told."""
    return {USER: account.pinned, PROCESS: account.locked, NONE: 0, None: None}[accounting(account)]


def total(accounts: Iterable[Account], others_pinned: int = 0, unseen: bool = False) -> Total:
    """What the processes of one user come to; `others_pinned` is what those without an iommufd have pinned.

    `unseen`: the user may have others with an iommufd.
    """
    accounts = list(accounts)
    mine = [each for each in accounts if accounting(each) == USER]
    unknown = [each for each in accounts if accounting(each) is None]
    sum_ = sum(each.pinned for each in mine)
    uncertain = others_pinned + sum(each.pinned for each in unknown)
    risk: bool | None = _lacks_room(mine, sum_)
    if not risk and (unseen or _lacks_room([*mine, *unknown], sum_ + uncertain)):
        risk = None
    return Total([each.pid for each in mine], sum_, uncertain, _largest(mine), _smallest_limit(mine), risk)


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
    limits = [each.limit for each in accounts]
    finite = [each for each in limits if each is not None]
    return max(finite) if finite and len(finite) == len(limits) else None


def headroom(account: Account, of_user: Total) -> int | None:
    """How much more the process could pin; None where nothing limits it, or where that cannot be told."""
    how = accounting(account)
    if how in (None, NONE) or account.limit is None:
        return None
    return account.limit - (account.locked if how == PROCESS else of_user.charged)


def account_notes(account: Account, of_user: Total, largest_limit: int | None) -> list[str]:
    """What contradicts the accounting that was read, or why there is none. `largest_limit`: of the user's processes.

    VmPin is what was pinned, however it was accounted; VmLck grows with it only where the process is charged. So a
    capability that came or went after the memory was mapped shows.
    """
    how = accounting(account)
    pinned, locked = account.pinned, account.locked
    if how is None:
        return [_why_unknown(account)]
    if not pinned:
        return []
    if how == NONE and locked and PROCESS in (account.modes or ()):
        return [
            f"VmLck is {locked} bytes: it was charged for them before it had CAP_IPC_LOCK, or has locked memory by"
            " other means, such as mlock. What it pins from now on is not charged."
        ]
    if how == PROCESS and locked < pinned:
        return [
            f"VmLck is {locked} bytes, less than the {pinned} bytes that it has pinned: the rest was pinned while it"
            " had CAP_IPC_LOCK, or by other means than iommufd, such as io_uring or RDMA."
        ]
    if how == USER:
        return _contradictions_of_user(account, of_user, largest_limit)
    return []


def _why_unknown(account: Account) -> str:
    if account.modes is None:
        return "It cannot be told whether it holds an iommufd: this caller may not look at its descriptors."
    if account.ipc_lock:
        return (
            "It has CAP_IPC_LOCK, which counts in the initial user namespace only, and this caller may not see in which"
            " it is."
        )
    if account.modes - {USER, PROCESS}:
        return "The rlimit mode of an iommufd of it could not be read."
    return "Its iommufds differ in their rlimit mode, and the kernel does not tell what was pinned through which."


def _contradictions_of_user(account: Account, of_user: Total, largest_limit: int | None) -> list[str]:
    notes = []
    if account.locked >= account.pinned:
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
