# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who is charged for memory that is really pinned. What iommufd_info claims, the process then tries out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import CONTAINER, DEVICES, MIB, PAGE, VM, Vmm, change_user
from ansible_collections.virt.iommufd.tests.kernel.info import limits, look, look_at, look_within, process, user
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

# Small, since every page takes its time under emulation.
SIZE = MIB // 4
LIMIT = 40 * SIZE


def ready(vmm: Vmm, device: int = 0, mode: str = "user", limit: int = LIMIT) -> Vmm:
    """Has it a limit, a mode that root has set before the first object, and a device."""
    vmm.limit(limit)
    fd = vmm.open()
    if mode == "process":
        assert run(pid=vmm.pid, fd=fd, value="process")["changed"]
    assert vmm.mode == mode
    vmm.do("attach", DEVICES[device])
    return vmm


def pins(vmm: Vmm, size: int) -> None:
    """It gets so much more pinned, to the page."""
    before = vmm.do("look")["vm_pin_kb"]
    vmm.do("pin", str(size))
    assert vmm.do("look")["vm_pin_kb"] - before == size // 1024


def has_headroom(vmm: Vmm, size: int) -> None:
    """It gets that much, and not one page more."""
    assert vmm.ask("pin", str(size + PAGE))["errno"] == "ENOMEM"
    if size:
        pins(vmm, size)
    assert vmm.ask("pin", str(PAGE))["errno"] == "ENOMEM"


def test_user(start: Start) -> None:
    vmm = ready(start())
    pins(vmm, 24 * SIZE)
    row = look_at(vmm)
    assert (row["accounting"], row["charged_bytes"], row["headroom_bytes"]) == ("user", 24 * SIZE, 16 * SIZE)
    assert (row["pinned_bytes"], row["locked_bytes"], row["notes"]) == (24 * SIZE, 0, [])
    assert [(each["counter"], each["backends"]) for each in row["counters"]] == [("user", ["iommufd"])]
    has_headroom(vmm, 16 * SIZE)


def test_user_over_two_processes(start: Start) -> None:
    first, second = ready(start(), 0, limit=LIMIT), ready(start(), 1, limit=32 * SIZE)
    pins(first, 20 * SIZE)
    pins(second, 4 * SIZE)
    answered = look()
    rows = [process(answered, each.pid) for each in (first, second)]
    assert [each["accounting"] for each in rows] == ["user", "user"]
    assert [each["headroom_bytes"] for each in rows] == [16 * SIZE, 8 * SIZE]
    assert user(answered, VM)["headroom_bytes"] == 8 * SIZE
    has_headroom(second, 8 * SIZE)
    assert look_at(first)["headroom_bytes"] == 8 * SIZE
    has_headroom(first, 8 * SIZE)
    # Now there is more than the second one's limit allows, and nobody has broken a rule.
    assert look_at(second)["headroom_bytes"] == user(look(), VM)["headroom_bytes"] == -8 * SIZE
    assert look_at(first)["notes"] == look_at(second)["notes"] == []


def test_process(start: Start) -> None:
    first, second = (ready(start(), number, "process") for number in (0, 1))
    for each in (first, second):
        pins(each, 24 * SIZE)
        row = look_at(each)
        assert (row["accounting"], row["charged_bytes"], row["headroom_bytes"]) == ("process", 24 * SIZE, 16 * SIZE)
        assert (row["pinned_bytes"], row["locked_bytes"], row["notes"]) == (24 * SIZE, 24 * SIZE, [])
        assert [(each["counter"], each["backends"]) for each in row["counters"]] == [("mm_locked", ["iommufd"])]
    assert look()["users"] == []
    has_headroom(second, 16 * SIZE)
    assert look_at(first)["headroom_bytes"] == 16 * SIZE


def test_process_with_memory_that_is_locked_by_other_means(start: Start) -> None:
    vmm = ready(start(), mode="process")
    pins(vmm, 24 * SIZE)
    vmm.do("mlock", str(4 * SIZE))
    row = look_at(vmm)
    assert (row["pinned_bytes"], row["charged_bytes"], row["headroom_bytes"]) == (24 * SIZE, 28 * SIZE, 12 * SIZE)
    has_headroom(vmm, 12 * SIZE)


def test_user_with_memory_that_is_locked_by_other_means(start: Start) -> None:
    vmm = ready(start())
    pins(vmm, 8 * SIZE)
    vmm.do("mlock", str(12 * SIZE))
    row = look_at(vmm)
    assert (row["charged_bytes"], row["headroom_bytes"]) == (8 * SIZE, 32 * SIZE)
    assert ["has locked memory by other means" in note for note in row["notes"]] == [True]
    has_headroom(vmm, 32 * SIZE)


@pytest.mark.parametrize("mode", ["user", "process"])
@pytest.mark.parametrize("uid", [VM, 0])
def test_none(start: Start, mode: str, uid: int) -> None:
    vmm = start(0)
    vmm.do("become", str(uid), "ipc_lock")
    ready(vmm, mode=mode, limit=SIZE)
    pins(vmm, 8 * SIZE)
    row = look_at(vmm)
    assert row["capabilities"]["effective"] == ["cap_ipc_lock"]
    assert row["initial_user_namespace"] is True
    assert (row["accounting"], row["charged_bytes"], row["headroom_bytes"]) == ("none", 0, None)
    assert (row["iommufds"][0]["rlimit_mode"], row["notes"]) == (mode, [])
    assert (row["counters"], row["counter"]) == ([], None)
    assert look()["users"] == []
    pins(vmm, 8 * SIZE)


def test_root_without_the_capability(start: Start) -> None:
    vmm = start(0)
    vmm.do("become", "0", "sys_resource")
    ready(vmm)
    pins(vmm, 24 * SIZE)
    row = look_at(vmm)
    assert (row["user"], row["accounting"], row["headroom_bytes"]) == ("root", "user", 16 * SIZE)
    assert user(look(), 0)["pids"] == [vmm.pid]
    has_headroom(vmm, 16 * SIZE)


def test_a_capability_that_is_only_permitted(start: Start) -> None:
    vmm = start(0)
    vmm.do("become", str(VM), "ipc_lock")
    vmm.do("effective")
    ready(vmm)
    row = look_at(vmm)
    assert row["capabilities"]["permitted"] == ["cap_ipc_lock"]
    assert (row["accounting"], row["headroom_bytes"]) == ("user", LIMIT)
    has_headroom(vmm, LIMIT)


@pytest.mark.parametrize("mode", ["user", "process"])
def test_every_capability_of_a_user_namespace(start: Start, mode: str) -> None:
    vmm = start()
    vmm.do("enter_namespace")
    ready(vmm, mode=mode)
    pins(vmm, 24 * SIZE)
    row = look_at(vmm)
    assert row["capabilities"]["effective"] == ["cap_ipc_lock", "cap_sys_resource"]
    assert row["initial_user_namespace"] is False
    assert (row["uid"], row["accounting"], row["headroom_bytes"]) == (VM, mode, 16 * SIZE)
    assert ["There it lifts no limit" in note for note in row["notes"]] == [True]
    has_headroom(vmm, 16 * SIZE)


def test_the_iommufd_and_the_device_of_a_process(start: Start) -> None:
    vmm = start()
    fd = vmm.open()
    [row] = look_at(vmm)["iommufds"]
    alone: dict[str, Any] = {"same_as": None, "shared_with": []}
    whole: dict[str, Any] = {"truncated": False, "msg": ""}
    assert row == {"fd": fd, **alone, "rlimit_mode": "user", "settable": True, "ioases": [], **whole}
    ioas = vmm.do("attach", DEVICES[1])["ioas_id"]
    other = vmm.do("alloc")["ioas_id"]
    vmm.do("set", "huge_pages", "0", str(other))
    row = look_at(vmm)
    ioases = [{"ioas_id": ioas, "huge_pages": True}, {"ioas_id": other, "huge_pages": False}]
    iommufd = {"fd": fd, **alone, "rlimit_mode": "user", "settable": False, "ioases": ioases, **whole}
    assert (row["iommufds"], row["address_spaces"]) == ([iommufd], 2)
    links = vmm.do("look")["fds"]
    address = Path("/sys/class/vfio-dev/vfio1/device").resolve().name
    held = [int(number) for number, link in links.items() if link == DEVICES[1]]
    device = {"fd": held[0], "node": DEVICES[1], "addresses": [address], "backend": "iommufd", "as_it_runs": False}
    assert (row["vfio_devices"], row["backends"]) == ([device], ["iommufd"])
    assert (row["legacy_containers"], row["vdpa_devices"]) == ([], [])
    # The mode can change again once the last object is gone, which a device that is bound is, too.
    vmm.do("destroy", str(other))
    assert look_at(vmm)["iommufds"][0]["settable"] is False


def test_objects_with_ids_far_apart(start: Start) -> None:
    vmm = start()
    fd = vmm.open()
    ids = [vmm.do("alloc")["ioas_id"] for _each in range(50)]
    for each in ids[1:-1]:
        vmm.do("destroy", str(each))
    row = look_at(vmm)
    [iommufd] = row["iommufds"]
    assert (iommufd["fd"], iommufd["truncated"], row["address_spaces"]) == (fd, False, 2)
    assert [each["ioas_id"] for each in iommufd["ioases"]] == [ids[0], ids[-1]]
    assert ids[-1] - ids[0] == 49


def test_iommufds_with_different_modes(start: Start) -> None:
    vmm = start()
    ready(vmm, 0)
    pins(vmm, 8 * SIZE)
    ready(vmm, 1, "process")
    pins(vmm, 4 * SIZE)
    answered = look()
    row = process(answered, vmm.pid)
    assert [each["rlimit_mode"] for each in row["iommufds"]] == ["user", "process"]
    assert (row["pinned_bytes"], row["locked_bytes"]) == (12 * SIZE, 4 * SIZE)
    assert (row["accounting"], row["charged_bytes"], row["headroom_bytes"]) == (None, None, None)
    assert ([each["counter"] for each in row["counters"]], row["counter"]) == (["user", "mm_locked"], None)
    assert ["differ in their rlimit mode" in note for note in row["notes"]] == [True]
    assert user(answered, VM)["uncertain_bytes"] == 12 * SIZE
    assert user(answered, VM)["charged_bytes"] == 0


@pytest.mark.parametrize("used", ["user", "process"])
def test_an_iommufd_that_nothing_is_pinned_through(start: Start, used: str) -> None:
    vmm = start()
    other = vmm.open()
    if used == "user":
        assert run(pid=vmm.pid, fd=other, value="process")["changed"]
    ready(vmm, 0, used)
    pins(vmm, 24 * SIZE)
    row = look_at(vmm)
    assert len({each["rlimit_mode"] for each in row["iommufds"]}) == 2
    assert (row["accounting"], row["headroom_bytes"]) == (used, 16 * SIZE)
    has_headroom(vmm, 16 * SIZE)


@pytest.fixture
def another_node() -> Iterator[Path]:
    """A node of another name, as a container makes one."""
    path = Path("/dev/kernel-test")
    os.mknod(path, stat.S_IFCHR | 0o666, os.stat("/dev/iommu").st_rdev)
    path.chmod(0o666)
    yield path
    path.unlink(missing_ok=True)


def test_another_node(start: Start, another_node: Path) -> None:
    vmm = start()
    fd = vmm.open(str(another_node))
    another_node.unlink()
    [row] = look_at(vmm)["iommufds"]
    assert (row["fd"], row["rlimit_mode"], row["settable"]) == (fd, "user", True)


def test_a_descriptor_that_only_names_the_node(start: Start) -> None:
    vmm = start()
    for path in ("/dev/iommu", CONTAINER, DEVICES[0]):
        vmm.open(path, "path")
    assert look()["processes"] == []
    fd = vmm.open()
    assert [each["fd"] for each in look_at(vmm)["iommufds"]] == [fd]


def test_a_capability_dropped_after_it_pinned_under_process(start: Start) -> None:
    vmm = start(0)
    vmm.do("become", str(VM), "ipc_lock")
    ready(vmm, mode="process")
    pins(vmm, 8 * SIZE)
    assert look_at(vmm)["notes"] == []
    vmm.do("effective")
    row = look_at(vmm)
    assert (row["accounting"], row["pinned_bytes"], row["charged_bytes"]) == ("process", 8 * SIZE, 0)
    assert ["the rest was pinned while it had CAP_IPC_LOCK" in note for note in row["notes"]] == [True]
    assert row["headroom_bytes"] == LIMIT
    has_headroom(vmm, LIMIT)


def test_a_capability_gained_after_it_pinned_under_process(start: Start) -> None:
    vmm = start(0)
    vmm.do("become", str(VM), "ipc_lock")
    vmm.do("effective")
    ready(vmm, mode="process")
    pins(vmm, 24 * SIZE)
    assert look_at(vmm)["accounting"] == "process"
    vmm.do("effective", "ipc_lock")
    row = look_at(vmm)
    assert (row["accounting"], row["headroom_bytes"], row["locked_bytes"]) == ("none", None, 24 * SIZE)
    assert ["charged for them before it had CAP_IPC_LOCK" in note for note in row["notes"]] == [True]
    pins(vmm, 24 * SIZE)
    # With more pinned that was not charged, VmLck still shows what was.
    row = look_at(vmm)
    assert (row["accounting"], row["pinned_bytes"], row["locked_bytes"]) == ("none", 48 * SIZE, 24 * SIZE)
    assert row["notes"] != []


def test_a_capability_lost_after_it_pinned_under_user(start: Start) -> None:
    first = start(0)
    first.do("become", str(VM), "ipc_lock")
    ready(first, 0)
    pins(first, 24 * SIZE)
    second = ready(start(), 1)
    pins(second, 24 * SIZE)
    first.do("effective")
    # Each has less than its limit, but together they could not have got it.
    assert user(look(), VM)["charged_bytes"] == 48 * SIZE
    for each in (first, second):
        row = look_at(each)
        assert (row["accounting"], row["headroom_bytes"]) == ("user", -8 * SIZE)
        assert ["have pinned 12582912 bytes together" in note for note in row["notes"]] == [True]
    first.do("effective", "ipc_lock")
    assert look_at(second)["notes"] == []
    pins(first, 24 * SIZE)
    first.do("effective")
    assert ["more than its limit of 10485760 bytes" in note for note in look_at(first)["notes"]] == [True]
    # The kernel's own sum is what the notes warn of.
    has_headroom(second, 16 * SIZE)


def test_an_unprivileged_look_at_the_own_process(start: Start) -> None:
    first, second = ready(start()), start()
    second.open()
    answered = look_within(partial(change_user, VM))
    rows = [process(answered, each.pid) for each in (first, second)]
    assert [each["iommufds"][0]["settable"] for each in rows] == [None, None]
    assert [each["accounting"] for each in rows] == ["user", "user"]
    assert [len(each["iommufds"][0]["ioases"]) for each in rows] == [1, 0]
    assert rows[0]["initial_user_namespace"] is True
    assert "descriptors" in limits(answered)


def test_limits_that_differ(start: Start) -> None:
    unlimited, limited = ready(start(), 0, limit=-1), ready(start(), 1)
    pins(limited, SIZE)
    pins(unlimited, 47 * SIZE)
    answered = look()
    row = process(answered, unlimited.pid)
    assert (row["accounting"], row["memlock_unlimited"], row["headroom_bytes"]) == ("user", True, None)
    assert row["notes"] == process(answered, limited.pid)["notes"] == []
    assert process(answered, limited.pid)["headroom_bytes"] == user(answered, VM)["headroom_bytes"] == -8 * SIZE
    has_headroom(limited, 0)
    pins(unlimited, 4 * SIZE)
