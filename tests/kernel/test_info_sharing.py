# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who has a copy of what another process has: launchers, forks, and descriptors that are one file."""

from __future__ import annotations

import resource
from functools import partial

import pytest
from ansible_collections.virt.iommufd.plugins.modules import iommufd_option
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
    change_user,
)
from ansible_collections.virt.iommufd.tests.kernel.info import limits, look, look_at, look_within, process, user
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

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
        # Before it has pinned anything, it could be one that keeps what a VM had that has ended.
        assert (real["charged_bytes"], real["headroom_bytes"]) == (size or None, LIMIT - size)
        assert ["No VM that runs accounts for all" in note for note in real["notes"]] == [True] * (not size)
        [row] = answered["users"]
        assert (row["uid"], row["pids"], row["memlock_bytes"]) == (VM, [vmm.pid], LIMIT)
        assert row["at_risk"] is (False if size else None)
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


def look_once_the_rest_is_pinned(other: Vmm) -> Answer:
    """Has the user's other VM pin what one that has ended has left of the limit, to the page; and looks."""
    other.open()
    other.do("attach", DEVICES[1])
    assert other.ask("pin", str(4 * MIB + PAGE))["errno"] == "ENOMEM"
    other.do("pin", str(4 * MIB))
    return look()


@pytest.mark.parametrize("uid", [0, VM, ALICE])
@pytest.mark.parametrize("kept", [slice(2), slice(1, 2)], ids=["iommufd and device", "device"])
def test_what_a_vm_that_has_ended_has_left_behind(start: Start, uid: int, kept: slice) -> None:
    """Its user stays charged, to the page, whoever keeps that."""
    vmm, keeper, other = start(), start(0), start()
    for each in (vmm, other):
        each.limit(LIMIT)
    fds = [vmm.open()]
    vmm.do("attach", DEVICES[0])
    vmm.do("pin", str(6 * MIB))
    fds.append(process(look(), vmm.pid)["vfio_devices"][0]["fd"])
    for fd in fds[kept]:
        keeper.do("take", str(vmm.pid), str(fd))
    keeper.limit(MIB)
    keeper.do("become", str(uid))
    answered = look()
    assert process(answered, keeper.pid)["holder"] is True
    assert "charges" not in limits(answered)
    vmm.end()
    answered = look_once_the_rest_is_pinned(other)
    row = process(answered, keeper.pid)
    assert (row["charged_bytes"], row["pinned_bytes"]) == (None, 0)
    assert ["stays charged to its user until this process closes it" in note for note in row["notes"]] == [True]
    assert f" ({keeper.pid}) holds." in limits(answered)["charges"]
    assert (user(answered, VM)["memlock_bytes"], user(answered, VM)["at_risk"]) == (LIMIT, None)
    # Whoever is asked about
    assert "charges" in limits(look(users=["vm"]))
    keeper.end()
    other.do("pin", str(6 * MIB))
    assert "charges" not in limits(look())


@pytest.mark.parametrize("kept", ["in flight", "mapped"])
def test_what_a_vm_that_has_ended_has_left_where_no_process_shows_it(start: Start, kept: str) -> None:
    vmm, keeper, other = start(), start(0), start()
    for each in (vmm, other):
        each.limit(LIMIT)
    iommufd = vmm.open()
    vmm.do("attach", DEVICES[0])
    vmm.do("pin", str(6 * MIB))
    device = process(look(), vmm.pid)["vfio_devices"][0]["fd"]
    fds = [iommufd, device] if kept == "in flight" else [device]
    copies = [str(keeper.do("take", str(vmm.pid), str(fd))["fd"]) for fd in fds]
    keeper.do("keep_in_flight" if kept == "in flight" else "keep_mapped", *copies)
    # What a VM that runs has is seen with that.
    assert "charges" not in limits(look())
    vmm.end()
    answered = look_once_the_rest_is_pinned(other)
    assert keeper.pid not in [each["pid"] for each in answered["processes"]]
    assert limits(answered)["charges"].startswith("1 iommufd is open that no process was seen to have.")
    assert (user(answered, VM)["memlock_bytes"], user(answered, VM)["at_risk"]) == (LIMIT, None)
    keeper.end()
    other.do("pin", str(6 * MIB))
    answered = look()
    assert "charges" not in limits(answered)
    assert user(answered, VM)["at_risk"] is True


def test_every_iommufd_that_is_open_is_seen(start: Start, container_is_iommufd: bool) -> None:
    """The kernel counts open files. Whatever there is more of, or less, is no iommufd that was not seen."""
    vmm, other = start(), start(ALICE)
    fd = vmm.open()
    vmm.do("dup", str(fd), "3")
    for each in (vmm, other):
        each.open(CONTAINER)
        each.open("/dev/iommu", "path")
        each.open()
        each.do("fork")
    for device in DEVICES[:2]:
        vmm.do("attach", device)
    vmm.do("pin", str(MIB))
    # Each is counted, as an iommufd is.
    queues = [vmm.do("queue")["fd"] for _each in range(2)]
    vmm.do("dup", str(queues[0]), "3")
    seen = [iommufd for row in look()["processes"] for iommufd in row["iommufds"]]
    assert len(seen) == 12 + container_is_iommufd * 4
    assert "charges" not in limits(look())
    # A copy of a queue is none of its own.
    vmm.do("keep_in_flight", str(fd))
    assert "charges" not in limits(look())


@pytest.mark.parametrize("mode", ["process", "legacy"])
def test_what_has_left_nothing_behind(start: Start, mode: str) -> None:
    """What the process was charged for ends with it."""
    vmm, keeper, other = start(0), start(0), start()
    for each in (vmm, other):
        each.limit(LIMIT)
    if mode == "process":
        fd = vmm.open()
        assert run(iommufd_option, pid=vmm.pid, fd=fd, value=mode)["changed"]
        vmm.do("become", str(VM))
        vmm.do("attach", DEVICES[0])
        vmm.do("pin", str(6 * MIB))
    else:
        vmm.do("attach_container", DEVICES[0])
        vmm.do("become", str(VM))
        vmm.do("map_in_container", str(6 * MIB))
    row = process(look(), vmm.pid)
    fds = [each["fd"] for name in ("iommufds", "legacy_containers", "vfio_devices") for each in row[name]]
    assert len(fds) == 2
    for fd in fds:
        keeper.do("take", str(vmm.pid), str(fd))
    keeper.do("become", str(VM))
    vmm.end()
    assert "charges" not in limits(look())
    other.open()
    other.do("attach", DEVICES[1])
    other.do("pin", str(10 * MIB))
    assert other.ask("pin", str(PAGE))["errno"] == "ENOMEM"


def test_who_holds_nothing_is_no_risk(start: Start) -> None:
    """An iommufd in which there is nothing, such as a launcher opens, with a small limit."""
    vmm, idle = start(), start()
    vmm.limit(LIMIT)
    vmm.open()
    vmm.do("attach", DEVICES[0])
    vmm.do("pin", str(4 * MIB))
    idle.limit(MIB)
    idle.open()
    idle.do("fork")
    row = user(look(), VM)
    assert (row["memlock_bytes"], row["headroom_bytes"], row["at_risk"]) == (LIMIT, 6 * MIB, False)


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
    assert user(answered, VM)["at_risk"] is False
    vmm.do("attach", DEVICES[0])
    answered = look()
    assert [process(answered, each.pid)["holder"] for each in (launcher, vmm)] == [True, False]
    # That is how it looks, too, where the VM has ended that had pinned.
    assert user(answered, VM)["at_risk"] is None
    vmm.do("pin", str(PAGE))
    assert user(look(), VM)["at_risk"] is False


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
    # Either may have pinned in the legacy ones, or both. An iommufd that is empty has none.
    assert process(answered, vmm.pid)["address_spaces"] == (0 if container_is_iommufd else None)


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
    answered = look_within(partial(change_user, VM))
    assert process(answered, launcher.pid)["holder"] is None
    assert [each["pid"] for each in answered["processes"]] == [launcher.pid]
