# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What users are charged: sums over their processes, and what of it is sure. Every claim is tried on the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Callable

import pytest
from ansible_collections.virt.iommufd.plugins.modules import iommufd_info
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    ALICE,
    DEVICES,
    MIB,
    PAGE,
    VM,
    Answer,
    Vmm,
    change_user,
)
from ansible_collections.virt.iommufd.tests.kernel.info import (
    limits,
    look,
    look_at,
    look_within,
    process,
    status_of,
    user,
)
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

NOTHING = {"pids": [], "charged_bytes": 0, "uncertain_bytes": 0, "largest_bytes": 0, "memlock_bytes": None}
NOTHING |= {"memlock_unlimited": False, "headroom_bytes": None, "at_risk": False}


def pinning(vmm: Vmm, device: int, size: int, limit: int = 10 * MIB, mode: str = "user") -> Vmm:
    vmm.limit(limit)
    fd = vmm.open()
    if mode == "process":
        assert run(pid=vmm.pid, fd=fd, value=mode)["changed"]
    vmm.do("attach", DEVICES[device])
    if size:
        vmm.do("pin", str(size))
    return vmm


Register = Callable[[Vmm, int], None]


@pytest.fixture
def register(start: Start) -> Iterator[Register]:
    """Has a process pin so many bytes by io_uring, until the test is over and before the process ends."""
    registered: list[tuple[Vmm, int]] = []

    def register_one(vmm: Vmm, size: int) -> None:
        registered.append((vmm, vmm.do("register_buffer", str(size))["ring"]))

    yield register_one
    for vmm, ring in registered:
        vmm.do("unregister_buffer", str(ring))


def pinned_by(vmm: Vmm) -> int:
    return int(status_of(vmm.pid)["VmPin"].split()[0]) * 1024


def test_sums(start: Start) -> None:
    small = pinning(start(), 0, 2 * MIB, limit=10 * MIB)
    large = pinning(start(), 1, 3 * MIB, limit=12 * MIB)
    other = pinning(start(), 2, 4 * MIB, limit=8 * MIB, mode="process")
    idle = start(ALICE)
    idle.open()
    idle.limit(-1)
    answered = look()
    assert [each["pid"] for each in answered["processes"]] == sorted(each.pid for each in (small, large, other, idle))
    assert [each["uid"] for each in answered["users"]] == [VM, ALICE]
    assert user(answered, VM) == {
        "uid": VM,
        "user": "vm",
        "pids": sorted([small.pid, large.pid]),
        "charged_bytes": pinned_by(small) + pinned_by(large),
        "uncertain_bytes": 0,
        "largest_bytes": 3 * MIB,
        "memlock_bytes": 10 * MIB,
        "memlock_unlimited": False,
        "headroom_bytes": 5 * MIB,
        "at_risk": False,
    }
    alices = {**NOTHING, "uid": ALICE, "user": "alice", "pids": [idle.pid], "memlock_unlimited": True}
    assert user(answered, ALICE) == alices
    # The kernel's own sum.
    assert small.ask("pin", str(5 * MIB + PAGE))["errno"] == "ENOMEM"
    small.do("pin", str(5 * MIB))


@pytest.mark.parametrize("size", [10 * MIB // 3 // PAGE * PAGE, 10 * MIB // 3 // PAGE * PAGE + PAGE])
def test_another_vm_is_at_risk(start: Start, size: int) -> None:
    pinning(start(), 0, size)
    assert user(look(), VM)["at_risk"] is False
    pinning(start(), 1, size)
    at_risk = user(look(), VM)["at_risk"]
    third = pinning(start(), 2, 0)
    assert at_risk == (third.ask("pin", str(size))["errno"] == "ENOMEM") == (3 * size > 10 * MIB)


def test_another_vm_as_large_as_fits_to_the_page(start: Start) -> None:
    pinning(start(), 0, 5 * MIB)
    assert user(look(), VM)["at_risk"] is False
    second = pinning(start(), 1, 5 * MIB)
    row = user(look(), VM)
    assert (row["at_risk"], row["headroom_bytes"]) == (True, 0)
    assert second.ask("pin", str(PAGE))["errno"] == "ENOMEM"


def test_what_io_uring_has_pinned_is_uncertain(start: Start, register: Register) -> None:
    other = start()
    other.limit(10 * MIB)
    register(other, 3 * MIB)
    assert pinned_by(other) == 3 * MIB
    assert user(look(), VM) == {**NOTHING, "uid": VM, "user": "vm", "uncertain_bytes": 3 * MIB}
    vmm = pinning(start(), 0, 2 * MIB)
    answered = look()
    row = user(answered, VM)
    assert (row["charged_bytes"], row["headroom_bytes"], row["uncertain_bytes"]) == (2 * MIB, 8 * MIB, 3 * MIB)
    assert [each["pid"] for each in answered["processes"]] == [vmm.pid]
    # Here the kernel has charged it to the user.
    assert vmm.ask("pin", str(5 * MIB + PAGE))["errno"] == "ENOMEM"
    vmm.do("pin", str(5 * MIB))
    assert vmm.ask("pin", str(PAGE))["errno"] == "ENOMEM"


def test_what_the_process_itself_has_pinned_by_io_uring_is_charged(start: Start, register: Register) -> None:
    vmm = pinning(start(), 0, 2 * MIB)
    register(vmm, 3 * MIB)
    row = look_at(vmm)
    assert (row["pinned_bytes"], row["charged_bytes"], row["headroom_bytes"]) == (5 * MIB, 5 * MIB, 5 * MIB)
    assert vmm.ask("pin", str(5 * MIB + PAGE))["errno"] == "ENOMEM"
    vmm.do("pin", str(5 * MIB))


def test_what_it_has_pinned_by_io_uring_is_not_charged_to_the_process(start: Start, register: Register) -> None:
    vmm = pinning(start(), 0, 2 * MIB, mode="process")
    register(vmm, 3 * MIB)
    row = look_at(vmm)
    assert (row["pinned_bytes"], row["charged_bytes"], row["headroom_bytes"]) == (5 * MIB, 2 * MIB, 8 * MIB)
    assert ["other means than iommufd, such as io_uring" in note for note in row["notes"]] == [True]
    assert vmm.ask("pin", str(8 * MIB + PAGE))["errno"] == "ENOMEM"
    vmm.do("pin", str(8 * MIB))


def test_what_another_user_may_not_look_at_is_uncertain(start: Start) -> None:
    vmm, idle = pinning(start(), 0, 2 * MIB), start()
    idle.open()
    answered = look_within(partial(change_user, ALICE))
    row = process(answered, vmm.pid)
    assert (row["iommufds"], row["accounting"], row["charged_bytes"], row["headroom_bytes"]) == (None,) * 4
    assert (row["pinned_bytes"], row["memlock_bytes"], row["uid"]) == (2 * MIB, 10 * MIB, VM)
    assert row["initial_user_namespace"] is None
    assert ["It cannot be told whether it holds an iommufd" in note for note in row["notes"]] == [True]
    assert [each["pid"] for each in answered["processes"]] == [vmm.pid]
    # Nor may it see who keeps what a VM that has ended had pinned.
    unknown = {**NOTHING, "uncertain_bytes": 2 * MIB, "at_risk": None}
    assert answered["users"] == [{**unknown, "uid": VM, "user": "vm"}]
    assert "EACCES: Permission denied" in limits(answered)["descriptors"]
    assert "uid 1002" in limits(answered)["descriptors"]


def test_a_sum_of_what_is_seen_and_what_is_not(start: Start) -> None:
    seen = pinning(start(), 0, 2 * MIB)
    unseen = pinning(start(), 1, 3 * MIB)
    unseen.do("undumpable")
    answered = look_within(partial(change_user, VM))
    assert process(answered, seen.pid)["accounting"] == "user"
    assert process(answered, unseen.pid)["accounting"] is None
    row = user(answered, VM)
    assert (row["charged_bytes"], row["uncertain_bytes"], row["headroom_bytes"]) == (2 * MIB, 3 * MIB, 8 * MIB)
    # To root there is no difference.
    assert user(look(), VM)["charged_bytes"] == 5 * MIB


@pytest.mark.parametrize("given", ["vm", "1001"])
def test_a_user_by_name_and_by_id(start: Start, given: str) -> None:
    vmm, other = start(), start(ALICE)
    for each in (vmm, other):
        each.open()
    answered = look(users=[given])
    assert [each["pid"] for each in answered["processes"]] == [vmm.pid]
    assert [each["user"] for each in answered["users"]] == ["vm"]
    assert answered["narrowed"] == {"pids": None, "uids": [VM], "users": [{"uid": VM, "user": given}]}
    assert look(users=[given], pids=[other.pid])["processes"] == []


def test_users_without_a_process() -> None:
    answered = look(users=["alice", "root", "4000000"])
    rows = [{**NOTHING, "uid": uid, "user": name} for uid, name in ((0, "root"), (ALICE, "alice"), (4000000, None))]
    assert answered["users"] == rows
    assert answered["processes"] == []
    assert look(users=[])["users"] == []


@pytest.mark.parametrize(
    "given", ["nobody-of-that-name", "", "-1", "vm\0", "1001 ", "\x1b[31mvm", "\u202evm", "9" * 11, "9" * 10, "\udcff"]
)
def test_an_unknown_user(told: Told, given: str) -> None:
    answered = run(iommufd_info, users=["vm", given])
    assert answered["failed"], answered
    assert "This host has no user" in told(answered)
    assert answered["msg"].isprintable()


def test_pids_narrow_the_processes_but_not_the_sums(start: Start) -> None:
    first, second = pinning(start(), 0, 2 * MIB), pinning(start(), 1, 3 * MIB)
    answered = look(pids=[second.pid, 1, 2**31 - 1, -1])
    assert [each["pid"] for each in answered["processes"]] == [second.pid]
    assert process(answered, second.pid)["headroom_bytes"] == 5 * MIB
    assert user(answered, VM)["pids"] == sorted([first.pid, second.pid])
    assert user(answered, VM)["charged_bytes"] == 5 * MIB
    assert answered["narrowed"] == {"pids": [second.pid, 1, 2**31 - 1, -1], "uids": None, "users": None}
    assert look(pids=[])["processes"] == []


def test_each_subset_for_itself(start: Start) -> None:
    vmm = start()
    vmm.open()
    assert process(look("processes"), vmm.pid)["accounting"] == "user"
    assert user(look("users"), VM)["pids"] == [vmm.pid]
    assert "module" in look("host")["host"]
    check: Answer = look(_ansible_check_mode=True)
    assert process(check, vmm.pid)["accounting"] == "user"


def test_a_user_without_a_name(start: Start) -> None:
    vmm = start(0)
    vmm.do("become", "4000001")
    assert "4000001" not in Path("/etc/passwd").read_text()
    vmm.open()
    answered = look()
    assert (process(answered, vmm.pid)["uid"], process(answered, vmm.pid)["user"]) == (4000001, None)
    assert user(answered, 4000001)["user"] is None


def test_the_real_user_is_the_one_that_is_charged(start: Start) -> None:
    vmm = start(0)
    vmm.do("become_partly", str(VM), str(ALICE))
    other = pinning(start(ALICE), 1, 4 * MIB)
    pinning(vmm, 0, 2 * MIB)
    answered = look()
    assert process(answered, vmm.pid)["uid"] == VM
    assert user(answered, VM)["charged_bytes"] == 2 * MIB
    # The kernel too keeps them apart.
    vmm.do("pin", str(8 * MIB))
    other.do("pin", str(6 * MIB))
