# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who has a copy of what another process has: launchers, forks, and descriptors that are one file."""

from __future__ import annotations

import resource

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    ALICE,
    CONTAINER,
    DEVICES,
    MIB,
    PAGE,
    VM,
    Answer,
    Vmm,
    as_user,
)
from ansible_collections.virt.iommufd.tests.kernel.info import look, look_apart, look_at, process, user

LIMIT = 10 * MIB


def launched(start: Start, launcher: Vmm, fd: int, limit: int = LIMIT) -> Vmm:
    """A process of an ordinary user, to whom a launcher has passed its iommufd."""
    vmm = start(0)
    vmm.limit(limit)
    vmm.do("take", str(launcher.pid), str(fd))
    vmm.do("become", str(VM))
    return vmm


def shared_with(row: Answer) -> list[list[int]]:
    return [each["shared_with"] for each in row["iommufds"]]


@pytest.mark.parametrize("uid", [0, VM, ALICE])
def test_a_launcher_that_keeps_its_copy(start: Start, uid: int) -> None:
    """It has a small limit, with which it would be the user's smallest."""
    launcher = start(0)
    launcher.limit(MIB)
    launcher.do("become", str(uid))
    fd = launcher.open()
    vmm = launched(start, launcher, fd)
    vmm.do("attach", DEVICES[0])
    for size in (0, 2 * MIB):
        if size:
            vmm.do("pin", str(size))
        answered = look()
        kept, real = (process(answered, each.pid) for each in (launcher, vmm))
        assert (kept["holder"], real["holder"]) == (True, False)
        assert (shared_with(kept), shared_with(real)) == ([[vmm.pid]], [[launcher.pid]])
        assert (kept["counters"], kept["counter"], kept["charged_bytes"], kept["headroom_bytes"]) == ([], None, 0, None)
        assert ["it is not counted" in note for note in kept["notes"]] == [True]
        assert (real["charged_bytes"], real["headroom_bytes"], real["notes"]) == (size, LIMIT - size, [])
        [row] = answered["users"]
        assert (row["uid"], row["pids"], row["memlock_bytes"], row["at_risk"]) == (VM, [vmm.pid], LIMIT, False)
    assert vmm.ask("pin", str(8 * MIB + PAGE))["errno"] == "ENOMEM"
    vmm.do("pin", str(8 * MIB))


def test_a_launcher_of_several_vms(start: Start) -> None:
    launcher = start()
    fds = [launcher.open() for _each in range(2)]
    vmms = [launched(start, launcher, fd) for fd in fds]
    for vmm, device in zip(vmms, DEVICES):
        vmm.do("attach", device)
    answered = look()
    assert process(answered, launcher.pid)["holder"] is True
    assert shared_with(process(answered, launcher.pid)) == [[each.pid] for each in vmms]
    assert user(answered, VM)["pids"] == sorted(each.pid for each in vmms)
    # Once it has one of its own, it may become a VM.
    launcher.open()
    assert process(look(), launcher.pid)["holder"] is False


def test_a_fork_of_a_vmm(start: Start) -> None:
    vmm = start()
    vmm.limit(LIMIT)
    vmm.open()
    vmm.do("attach", DEVICES[0])
    vmm.do("pin", str(2 * MIB))
    child = vmm.do("fork")["child"]
    resource.prlimit(child, resource.RLIMIT_MEMLOCK, (MIB, MIB))
    answered = look()
    assert [process(answered, each)["holder"] for each in (vmm.pid, child)] == [False, True]
    assert (user(answered, VM)["pids"], user(answered, VM)["memlock_bytes"]) == ([vmm.pid], LIMIT)


def test_nobody_has_pinned_anything_yet(start: Start) -> None:
    """Which of the two is the VMM, only the future will tell."""
    launcher = start()
    launcher.limit(MIB)
    fd = launcher.open()
    vmm = launched(start, launcher, fd)
    other = start()
    other.limit(LIMIT)
    other.open()
    other.do("attach", DEVICES[1])
    other.do("pin", str(2 * MIB))
    answered = look()
    for each in (launcher, vmm):
        row = process(answered, each.pid)
        assert (row["holder"], row["accounting"]) == (None, "user")
        assert ["it cannot be told whether it will" in note for note in row["notes"]] == [True]
    assert user(answered, VM)["pids"] == sorted(each.pid for each in (launcher, vmm, other))
    assert user(answered, VM)["at_risk"] is None
    vmm.do("attach", DEVICES[0])
    answered = look()
    assert [process(answered, each.pid)["holder"] for each in (launcher, vmm)] == [True, False]
    assert user(answered, VM)["at_risk"] is False


def test_descriptors_of_one_process(start: Start) -> None:
    vmm = start()
    fd = vmm.open()
    vmm.do("attach", DEVICES[0])
    copy = vmm.do("dup", str(fd), "1")["last"]
    row = look_at(vmm)
    assert [(each["fd"], each["same_as"]) for each in row["iommufds"]] == [(fd, None), (copy, fd)]
    assert (shared_with(row), row["address_spaces"], row["holder"]) == ([[], []], 1, False)
    other = vmm.open()
    vmm.do("alloc")
    vmm.do("alloc")
    row = look_at(vmm)
    assert [each["same_as"] for each in row["iommufds"]] == [None, fd, None]
    assert row["iommufds"][2]["fd"] == other
    assert row["address_spaces"] == 3


def test_containers(start: Start, container_is_iommufd: bool) -> None:
    vmm = start()
    fd = vmm.open(CONTAINER)
    copy = vmm.do("dup", str(fd), "1")["last"]
    other = vmm.open(CONTAINER)
    child = vmm.do("fork")["child"]
    answered = look()
    name = "iommufds" if container_is_iommufd else "legacy_containers"
    rows = [process(answered, each)[name] for each in (vmm.pid, child)]
    for row, sharer in zip(rows, (child, vmm.pid)):
        assert [each["fd"] for each in row] == [fd, copy, other]
        assert [each["same_as"] for each in row] == [None, fd, None]
        assert [each["shared_with"] for each in row] == [[sharer]] * 3
    assert process(answered, vmm.pid)["address_spaces"] == (0 if container_is_iommufd else 2)


def test_many(start: Start) -> None:
    """Each with an iommufd of its own, and every other one with a copy of it."""
    vmms = [start() for _each in range(24)]
    for each in vmms:
        each.open()
    children = {each.pid: each.do("fork")["child"] for each in vmms[::2]}
    answered = look()
    for each in vmms:
        expected = [[children[each.pid]]] if each.pid in children else [[]]
        assert shared_with(process(answered, each.pid)) == expected
    for parent, child in children.items():
        assert shared_with(process(answered, child)) == [[parent]]


def test_somebody_who_swaps_meanwhile(start: Start) -> None:
    """Others are compared all the same."""
    honest = start(ALICE)
    honest.open()
    child = honest.do("fork")["child"]
    hostile = [start() for _each in range(2)]
    for each in hostile:
        first, second = each.open(), each.open()
        each.do("dup", str(second), "10")
        each.do("swap", str(first), "/dev/iommu")
    for _turn in range(4):
        answered = look()
        assert shared_with(process(answered, honest.pid)) == [[child]]
        assert shared_with(process(answered, child)) == [[honest.pid]]


def test_what_an_ordinary_user_can_tell(start: Start) -> None:
    launcher = start()
    fd = launcher.open()
    vmm = launched(start, launcher, fd)
    vmm.do("attach", DEVICES[0])
    # Its own, as far as they let their user look.
    answered = look_apart(as_user(VM))
    assert process(answered, launcher.pid)["holder"] is None
    assert [each["pid"] for each in answered["processes"]] == [launcher.pid]
