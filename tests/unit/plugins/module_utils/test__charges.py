# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import (
    IOMMUFD_PROCESS,
    IOMMUFD_USER,
    LEGACY,
    VDPA,
)
from ansible_collections.virt.iommufd.plugins.module_utils._charges import (
    Account,
    Check,
    Total,
    account_notes,
    accounting,
    charged,
    checks,
    decisive,
    largest_limit,
    total,
    way_of,
)

MIB = 2**20


def account(*modes: str | None, **other: Any) -> Account:
    known = {"pid": 1, "uid": 1001, "ipc_lock": False, "initial": True, "pinned": 24 * MIB, "locked": 0}
    return Account(**{"ways": frozenset(map(way_of, modes)), "limit": 40 * MIB, **known, **other})


def having(*ways: str | None, **other: Any) -> Account:
    return account(**{"ways": frozenset(ways), **other})


def deciding(who: Account, of_user: Total | None = None) -> Check | None:
    return decisive(who, checks(who, of_user or total([who])))


@pytest.mark.parametrize(
    ("who", "how", "charge"),
    [
        (account("user"), "user", 24 * MIB),
        (account("process", locked=25 * MIB), "process", 25 * MIB),
        (account("user", ipc_lock=True), "none", 0),
        (account("process", ipc_lock=True), "none", 0),
        # Root of a container without privilege: its capabilities count in there only.
        (account("user", ipc_lock=True, initial=False), "user", 24 * MIB),
        (account("process", ipc_lock=True, initial=False), "process", 0),
        (account("user", ipc_lock=True, initial=None), None, None),
        (account("user", initial=None), "user", 24 * MIB),
        (account("user", "process"), None, None),
        # A mode that this collection does not know is like one that could not be read.
        (account("2"), None, None),
        (account(None), None, None),
        (account(None, ipc_lock=True), "none", 0),
        (account(ways=None), None, None),
        (account(ways=None, ipc_lock=True), None, None),
        # Without an iommufd it is the process that is charged.
        (having(LEGACY, locked=25 * MIB), "process", 25 * MIB),
        (having(LEGACY, ipc_lock=True), "none", 0),
        (having(VDPA), "process", 24 * MIB),
        (having(VDPA, ipc_lock=True), "process", 24 * MIB),
        (having(VDPA, ipc_lock=True, initial=None), "process", 24 * MIB),
        (having(LEGACY, VDPA, locked=26 * MIB), "process", 26 * MIB),
        (having(LEGACY, VDPA, ipc_lock=True, initial=None), None, None),
        # Beside one, its mode decides, as long as that is not lifted.
        (having(IOMMUFD_USER, LEGACY), "user", 24 * MIB),
        (having(IOMMUFD_PROCESS, LEGACY, VDPA), "process", 24 * MIB),
        (having(IOMMUFD_USER, VDPA, ipc_lock=True), "process", 24 * MIB),
        # Nobody knows how much of VmPin is the user's.
        (having(IOMMUFD_USER, VDPA, limit=None), "user", None),
        (having(None, LEGACY), None, None),
        # A device of VFIO alone.
        (having(), None, None),
    ],
)
def test_who_is_charged(who: Account, how: str | None, charge: int | None) -> None:
    assert accounting(who) == how
    assert charged(who, deciding(who)) == charge


@pytest.mark.parametrize(
    ("who", "counters"),
    [
        (account("user"), [Check("user", 24 * MIB, 16 * MIB, ["iommufd"])]),
        (account("process", locked=25 * MIB), [Check("mm_locked", 25 * MIB, 15 * MIB, ["iommufd"])]),
        (account("user", limit=None), [Check("user", 24 * MIB, None, ["iommufd"])]),
        (account("user", ipc_lock=True), []),
        (account(None), []),
        (account(ways=None), []),
        (having(), []),
        (having(LEGACY, locked=MIB), [Check("mm_locked", MIB, 39 * MIB, ["legacy"])]),
        (having(VDPA, ipc_lock=True), [Check("mm_pinned", 24 * MIB, 16 * MIB, ["vdpa"])]),
        (having(IOMMUFD_PROCESS, LEGACY, locked=MIB), [Check("mm_locked", MIB, 39 * MIB, ["iommufd", "legacy"])]),
    ],
)
def test_which_counters_are_checked(who: Account, counters: list[Check]) -> None:
    assert checks(who, total([who])) == counters
    assert deciding(who) == (counters[0] if counters else None)


@pytest.mark.parametrize(
    ("who", "decides"),
    [
        (having(IOMMUFD_USER, LEGACY, locked=24 * MIB), "user"),
        (having(IOMMUFD_USER, LEGACY, locked=25 * MIB), "mm_locked"),
        (having(IOMMUFD_PROCESS, VDPA, locked=23 * MIB), "mm_pinned"),
        (having(IOMMUFD_PROCESS, VDPA, locked=25 * MIB), "mm_locked"),
        # What of VmPin is the user's is not known, but no more than all of it.
        (having(IOMMUFD_USER, VDPA), "mm_pinned"),
        (having(IOMMUFD_USER, LEGACY, VDPA, limit=None), "user"),
    ],
)
def test_the_counter_with_the_least_headroom_decides(who: Account, decides: str) -> None:
    check = deciding(who)
    assert check is not None
    assert check.counter == decides


def test_counters_of_iommufds_that_differ() -> None:
    who = account("user", "process", locked=MIB)
    assert [each.counter for each in checks(who, total([who]))] == ["user", "mm_locked"]
    assert deciding(who) is None


def headroom(who: Account, of_user: Total) -> int | None:
    check = deciding(who, of_user)
    return check and check.headroom


def test_the_users_total() -> None:
    some = [
        account("user", pid=1),
        account("user", pid=2, pinned=8 * MIB, limit=64 * MIB),
        account("user", pid=3, pinned=MIB, limit=None),
        account("process", pid=4, locked=24 * MIB, limit=MIB),
        account("user", pid=5, ipc_lock=True, limit=MIB),
        account(ways=None, pid=6, pinned=3 * MIB),
    ]
    of_user = total(some, others_pinned=MIB)
    assert of_user.pids == [1, 2, 3]
    assert (of_user.charged, of_user.uncertain, of_user.largest) == (33 * MIB, 4 * MIB, 24 * MIB)
    assert of_user.limit == 40 * MIB
    assert of_user.at_risk is True
    assert [headroom(each, of_user) for each in some] == [7 * MIB, 31 * MIB, None, -23 * MIB, None, None]
    assert largest_limit(some[:2]) == 64 * MIB
    assert largest_limit(some) is None
    assert largest_limit([]) is None


def test_what_a_user_is_not_charged_for() -> None:
    some = [
        having(LEGACY, pid=1, pinned=0, locked=MIB, limit=MIB),
        having(VDPA, pid=2, limit=MIB),
        having(LEGACY, VDPA, pid=3, limit=MIB),
        having(IOMMUFD_USER, VDPA, pid=4, ipc_lock=True, limit=MIB),
    ]
    assert total(some) == total([])
    # What a legacy container pins is not in VmPin.
    assert total([having(LEGACY, pinned=MIB)]).uncertain == MIB


def test_what_a_user_may_be_charged_for_beside_a_vdpa_device() -> None:
    of_user = total([having(IOMMUFD_USER, VDPA, limit=64 * MIB)])
    assert (of_user.pids, of_user.charged, of_user.uncertain, of_user.largest) == ([1], 0, 24 * MIB, 24 * MIB)
    assert of_user.at_risk is False
    assert total([having(IOMMUFD_USER, VDPA)]).at_risk is None


@pytest.mark.parametrize(
    ("other", "charged_", "uncertain"),
    [
        ({"locks": False, "locked": 8 * MIB}, 16 * MIB, 0),
        ({"locks": False, "locked": 0}, 24 * MIB, 0),
        ({"locks": False, "locked": 24 * MIB}, 0, 0),
        # VmLck may have more than what was pinned.
        ({"locks": None, "locked": 8 * MIB}, 0, 24 * MIB),
        ({"locks": True, "locked": 8 * MIB}, 0, 24 * MIB),
        ({"locks": False, "locked": 25 * MIB}, 0, 24 * MIB),
        ({"locks": False, "locked": 8 * MIB, "changed_user": True}, 0, 24 * MIB),
        ({"locks": False, "locked": 8 * MIB, "ipc_lock": True, "initial": None}, 0, 24 * MIB),
        ({"locks": False, "locked": 8 * MIB, "ipc_lock": True}, 0, 0),
    ],
)
def test_what_a_user_is_charged_for_by_iommufds_of_both_modes(
    other: dict[str, Any], charged_: int, uncertain: int
) -> None:
    of_user = total([account("user", "process", **other)])
    assert (of_user.pids, of_user.charged, of_user.uncertain) == ([], charged_, uncertain)
    for beside in (LEGACY, VDPA):
        assert total([having(IOMMUFD_USER, IOMMUFD_PROCESS, beside, **other)]).charged == 0


def test_a_holder_is_not_counted() -> None:
    one, copy = account("user"), account("user", pid=2, pinned=0, limit=MIB, holder=True)
    of_user = total([one, copy])
    assert of_user == total([one])
    assert largest_limit([one, copy]) == 40 * MIB
    assert (accounting(copy), checks(copy, of_user), charged(copy, None)) == ("user", [], 0)
    (note,) = account_notes(copy, of_user, 40 * MIB)
    assert "it is not counted" in note


def test_what_may_be_a_holder_makes_nothing_certain() -> None:
    one, idle = account("user", limit=64 * MIB), account("user", pid=2, pinned=0, limit=47 * MIB, holder=None)
    of_user = total([one, idle])
    assert (of_user.pids, of_user.limit, of_user.at_risk) == ([1, 2], 47 * MIB, None)
    assert total([one, idle._replace(holder=False)]).at_risk is True
    assert total([one, idle._replace(holder=True)]).at_risk is False
    (note,) = account_notes(idle, of_user, 64 * MIB)
    assert "cannot be told whether it will, or only holds" in note


def test_what_is_kept_of_a_vm_that_has_ended_is_charged_to_nobody_knows_whom() -> None:
    one, keeper = account("user", limit=64 * MIB), account("user", pid=2, pinned=0, limit=MIB, keeps=True)
    of_user = total([one, keeper], unseen=True)
    assert (of_user.pids, of_user.charged, of_user.limit, of_user.at_risk) == ([1, 2], 24 * MIB, 64 * MIB, None)
    assert charged(keeper, deciding(keeper, of_user)) is None
    assert charged(keeper._replace(ipc_lock=True), None) is None
    (note,) = account_notes(keeper, of_user, 64 * MIB)
    assert "stays charged to its user until this process closes it" in note


@pytest.mark.parametrize("holder", [False, None])
def test_who_holds_nothing_is_no_risk(holder: bool | None) -> None:
    one, idle = account("user", limit=64 * MIB), account("user", pid=2, pinned=0, limit=MIB, idle=True, holder=holder)
    of_user = total([one, idle])
    assert (of_user.pids, of_user.limit, of_user.at_risk) == ([1, 2], 64 * MIB, False)
    alone = total([idle])
    assert (alone.limit, alone.at_risk) == (MIB, False)


def test_nobody_is_charged() -> None:
    of_user = total([])
    assert (of_user.pids, of_user.charged, of_user.largest, of_user.limit) == ([], 0, 0, None)
    assert of_user.at_risk is False
    assert total([], unseen=True).at_risk is None


@pytest.mark.parametrize(("limit", "risk"), [(48 * MIB, False), (48 * MIB - 1, True), (None, False)])
def test_another_one_as_large_just_fits_or_does_not(limit: int | None, risk: bool) -> None:
    assert total([account("user", limit=limit)]).at_risk is risk


@pytest.mark.parametrize(
    ("others", "others_pinned", "unseen", "risk"),
    [
        ([], 0, False, False),
        ([], 0, True, None),
        # What others of the user's have pinned may be charged, too.
        ([], 16 * MIB, False, False),
        ([], 16 * MIB + 4096, False, None),
        ([account(None, pinned=16 * MIB, limit=None)], 0, False, False),
        ([account(None, pinned=16 * MIB, limit=None)], 4096, False, None),
        # One that may be charged may be the largest, or the one with the smallest limit.
        ([account(None, pinned=20 * MIB + 4096, limit=None)], 0, False, None),
        ([account(None, pinned=0, limit=48 * MIB)], 0, False, False),
        ([account(None, pinned=0, limit=48 * MIB - 1)], 0, False, None),
        ([account(ways=None, pinned=0, limit=48 * MIB - 1)], 0, False, None),
        ([account("process", limit=MIB)], 0, False, False),
        # What is certain stays so.
        ([account("user", pinned=20 * MIB)], 0, True, True),
    ],
)
def test_another_one_might_not_fit(others: list[Account], others_pinned: int, unseen: bool, risk: bool | None) -> None:
    one = account("user", limit=64 * MIB)
    assert total([one, *others], others_pinned, unseen).at_risk is risk


@pytest.mark.parametrize(
    ("who", "note"),
    [
        (account("user"), ""),
        (account("user", pinned=0, locked=4096), ""),
        (account("user", locked=24 * MIB - 1), ""),
        (account("user", locked=24 * MIB), "has locked memory by other means, such as mlock"),
        (account("user", pinned=41 * MIB), "more than its limit of 41943040 bytes: it had CAP_IPC_LOCK or a larger"),
        (account("process", locked=24 * MIB), ""),
        (account("process", locked=30 * MIB), ""),
        (account("process", locked=MIB), "the rest was pinned while it had CAP_IPC_LOCK"),
        (account("user", ipc_lock=True), ""),
        (account("user", ipc_lock=True, locked=24 * MIB), ""),
        (account("process", ipc_lock=True, locked=MIB), "VmLck is 1048576 bytes: it was charged for them before"),
        (account("user", ipc_lock=True, initial=False), "of its own, as in a container. There it lifts no limit"),
        (account("process", ipc_lock=True, initial=False, locked=24 * MIB), "There it lifts no limit"),
        (account("user", ipc_lock=True, initial=False, limit=None), ""),
        (account("user", ipc_lock=True, initial=None), "this caller may not see in which it is"),
        (account("user", changed_user=True), "has it become another user once it has its devices"),
        (account("process", changed_user=True), "has it become another user once it has its devices"),
        (account("user", changed_user=True, ipc_lock=True), ""),
        (account("user", "process"), "Its iommufds differ in their rlimit mode"),
        (account(None), "The rlimit mode of an iommufd of it could not be read"),
        (account(ways=None), "this caller may not look at its descriptors"),
        (having(), "It holds a VFIO device, but neither an iommufd nor a container"),
        (having(LEGACY, pinned=0, locked=MIB), ""),
        (having(LEGACY), "by other means than its legacy container, such as io_uring"),
        # What process accounting would break.
        (having(IOMMUFD_USER, LEGACY, locked=24 * MIB), "under process: its limit would have to hold its memory twice"),
        (having(IOMMUFD_USER, LEGACY, locked=24 * MIB, limit=None), ""),
        (having(IOMMUFD_USER, LEGACY, locked=24 * MIB, ipc_lock=True), ""),
        (having(IOMMUFD_PROCESS, LEGACY, locked=48 * MIB), "both added to VmLck, and compared with one limit"),
        (having(IOMMUFD_PROCESS, LEGACY, locked=24 * MIB, ipc_lock=True), ""),
        (account("process", locked=48 * MIB, locks=True), "It locks its memory itself (mem-lock=on), too"),
        (having(LEGACY, pinned=0, locks=True), "It locks its memory itself (mem-lock=on), too"),
        (account("user", locks=True), "It locks its memory itself (mem-lock=on), too. That counts in VmLck"),
        (account("user", locks=True, ipc_lock=True), ""),
        (account("process", locked=24 * MIB, locks=True, ipc_lock=True, pinned=0), ""),
        (having(VDPA), "compared with VmPin, whatever capability it has"),
        (having(IOMMUFD_PROCESS, VDPA, locked=12 * MIB), "compared with VmPin, whatever capability it has"),
        (having(IOMMUFD_USER, VDPA, ipc_lock=True), "compared with VmPin, whatever capability it has"),
    ],
)
def test_what_contradicts_the_accounting(who: Account, note: str) -> None:
    notes = account_notes(who, total([who]), largest_limit([who]))
    assert len(notes) == (1 if note else 0)
    assert note in "".join(notes)


def test_all_three_that_count_in_one_counter_under_process() -> None:
    one = having(IOMMUFD_USER, LEGACY, locked=24 * MIB, locks=True)
    first, second = account_notes(one, total([one]), largest_limit([one]))
    assert first.startswith("It locks its memory itself (mem-lock=on), too. That is added to VmLck")
    assert second.startswith("It holds a legacy container and locks its memory itself (mem-lock=on), too.")
    assert second.endswith("hold its memory three times, and all else that it locks.")


@pytest.mark.parametrize(
    ("who", "notes"),
    [
        (account("user", as_it_runs=True), 1),
        (account("process", locked=24 * MIB, as_it_runs=True), 1),
        (having(LEGACY, pinned=0, as_it_runs=True), 1),
        # Nothing is held against a limit.
        (account("user", limit=None, as_it_runs=True), 0),
        (account("user", ipc_lock=True, as_it_runs=True), 0),
        (account(None, as_it_runs=True), 2),
    ],
)
def test_what_is_pinned_as_it_runs(who: Account, notes: int) -> None:
    told = account_notes(who, total([who]), largest_limit([who]))
    assert len(told) == notes
    assert [note for note in told if "pins memory as it runs" in note] == told[-1:]


@pytest.mark.parametrize(
    ("others", "risk"),
    [
        ([], False),
        ([account("user", pid=2, pinned=4096, limit=None, as_it_runs=True)], None),
        ([account(None, pid=2, pinned=0, limit=None, as_it_runs=True)], None),
        # The user is not charged for these.
        ([account("process", pid=2, as_it_runs=True)], False),
        ([account("user", pid=2, ipc_lock=True, as_it_runs=True)], False),
        ([account("user", pid=2, pinned=0, holder=True, as_it_runs=True)], False),
        # What is certain stays so.
        ([account("user", pid=2, pinned=20 * MIB, as_it_runs=True)], True),
    ],
)
def test_another_one_might_not_fit_later(others: list[Account], risk: bool | None) -> None:
    assert total([account("user", limit=64 * MIB), *others]).at_risk is risk


def test_none_of_them_has_a_limit() -> None:
    assert total([account("user", limit=None, as_it_runs=True)]).at_risk is False


def test_what_is_not_known_beside_a_vdpa_device() -> None:
    one = having(IOMMUFD_USER, VDPA, pinned=41 * MIB)
    first, second = account_notes(one, total([one]), largest_limit([one]))
    assert "compared with VmPin" in first
    assert "does not tell how much of VmPin its user is charged for" in second


def test_more_is_pinned_together_than_any_of_them_may() -> None:
    two = [account("user", pid=1), account("user", pid=2)]
    for each in two:
        (note,) = account_notes(each, total(two), largest_limit(two))
        assert "have pinned 50331648 bytes together, more than the limit of any of them" in note
