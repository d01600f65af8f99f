# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who pins memory by other means than an iommufd, or beside one. What iommufd_info claims is tried on the kernel."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    ALICE,
    CONTAINER,
    DEVICES,
    MIB,
    PAGE,
    VM,
    Vmm,
    change_user,
)
from ansible_collections.virt.iommufd.tests.kernel.info import look, look_at, look_within, process, user
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

# Small, since every page takes its time under emulation.
SIZE = MIB // 4
LIMIT = 40 * SIZE


@pytest.fixture(scope="module", autouse=True)
def legacy(container_is_iommufd: bool) -> str:
    """What the container of VFIO is here."""
    if container_is_iommufd:
        return "iommufd"
    subprocess.run(["modprobe", "vfio_iommu_type1"], check=True)
    return "legacy"


def prepared(vmm: Vmm, *steps: tuple[str, ...], capabilities: tuple[str, ...] = ()) -> Vmm:
    """Does what only root may, and becomes an ordinary user."""
    vmm.limit(LIMIT)
    for step in steps:
        vmm.do(*step)
    vmm.do("become", str(VM), *capabilities)
    return vmm


def counters(row: dict[str, Any]) -> dict[str, tuple[int, list[str]]]:
    """What is left of each, and for what."""
    return {each["counter"]: (each["headroom_bytes"], each["backends"]) for each in row["counters"]}


def has_headroom(vmm: Vmm, step: str, size: int, error: str = "ENOMEM") -> None:
    """It gets that much by a step, and not one page more."""
    assert vmm.ask(step, str(size + PAGE))["errno"] == error
    vmm.do(step, str(size))
    assert vmm.ask(step, str(PAGE))["errno"] == error


def test_a_container_alone(start: Start, legacy: str) -> None:
    vmm = prepared(start(0), ("attach_container", DEVICES[0]))
    vmm.do("map_in_container", str(24 * SIZE))
    row = look_at(vmm)
    assert (row["user"], row["backends"], row["accounting"], row["counter"]) == ("vm", [legacy], "process", "mm_locked")
    assert (row["charged_bytes"], row["locked_bytes"], row["headroom_bytes"]) == (24 * SIZE, 24 * SIZE, 16 * SIZE)
    assert row["pinned_bytes"] == (0 if legacy == "legacy" else 24 * SIZE)
    assert (counters(row), row["notes"]) == ({"mm_locked": (16 * SIZE, [legacy])}, [])
    group = Path("/sys/class/vfio-dev", Path(DEVICES[0]).name, "device/iommu_group").resolve().name
    [device] = row["vfio_devices"]
    assert (device["node"], device["backend"], device["as_it_runs"]) == (f"/dev/vfio/{group}", legacy, False)
    links = vmm.do("look")["fds"]
    held = [int(number) for number, link in links.items() if link == CONTAINER]
    assert [each["fd"] for each in row["legacy_containers" if legacy == "legacy" else "iommufds"]] == held
    assert look()["users"] == []
    has_headroom(vmm, "map_in_container", 16 * SIZE)


def test_a_container_with_the_capability(start: Start, legacy: str) -> None:
    vmm = prepared(start(0), ("attach_container", DEVICES[0]), capabilities=("ipc_lock",))
    vmm.do("map_in_container", str(LIMIT + PAGE))
    row = look_at(vmm)
    assert (row["backends"], row["accounting"], row["counters"], row["headroom_bytes"]) == ([legacy], "none", [], None)
    assert (row["charged_bytes"], row["notes"]) == (0, [])


@pytest.mark.parametrize("mode", ["user", "process"])
def test_a_container_beside_an_iommufd(start: Start, legacy: str, mode: str) -> None:
    vmm = start(0)
    fd = vmm.open()
    if mode == "process":
        assert run(pid=vmm.pid, fd=fd, value="process")["changed"]
    prepared(vmm, ("attach", DEVICES[0]), ("attach_container", DEVICES[1]))
    vmm.do("pin", str(12 * SIZE))
    vmm.do("map_in_container", str(12 * SIZE))
    row = look_at(vmm)
    assert row["backends"] == sorted({"iommufd", legacy})
    if mode == "process":
        assert (row["accounting"], row["counter"]) == ("process", "mm_locked")
        assert counters(row) == {"mm_locked": (16 * SIZE, row["backends"])}
        told = ["both added to VmLck" in note for note in row["notes"]]
        assert told == ([True] if legacy == "legacy" else [])
        assert vmm.ask("pin", str(16 * SIZE + PAGE))["errno"] == "ENOMEM"
        has_headroom(vmm, "map_in_container", 16 * SIZE)
        assert vmm.ask("pin", str(PAGE))["errno"] == "ENOMEM"
    elif legacy == "legacy":
        assert (row["accounting"], row["counter"]) == ("user", "user")
        # Under process, which cures others, both would be in one counter, as above.
        told = ["under process: its limit would have to hold its memory twice" in note for note in row["notes"]]
        assert told == [True]
        assert counters(row) == {"user": (28 * SIZE, ["iommufd"]), "mm_locked": (28 * SIZE, ["legacy"])}
        assert user(look(), VM)["charged_bytes"] == 12 * SIZE
        # Neither counts in the other's counter.
        has_headroom(vmm, "pin", 28 * SIZE)
        has_headroom(vmm, "map_in_container", 28 * SIZE)
    else:
        # Two iommufds of different modes.
        assert (row["accounting"], row["counter"]) == (None, None)


@pytest.mark.parametrize("capabilities", [(), ("ipc_lock",)])
def test_a_vdpa_device_alone(start: Start, vdpa: str, capabilities: tuple[str, ...]) -> None:
    vmm = prepared(start(0), ("vdpa", vdpa), capabilities=capabilities)
    vmm.do("vdpa_map", str(24 * SIZE))
    row = look_at(vmm)
    assert (row["backends"], row["accounting"], row["counter"]) == (["vdpa"], "process", "mm_pinned")
    assert (row["charged_bytes"], row["pinned_bytes"], row["locked_bytes"]) == (24 * SIZE, 24 * SIZE, 0)
    assert counters(row) == {"mm_pinned": (16 * SIZE, ["vdpa"])}
    assert [each["node"] for each in row["vdpa_devices"]] == [vdpa]
    assert ["whatever capability it has" in note for note in row["notes"]] == [True]
    assert look()["users"] == []
    has_headroom(vmm, "vdpa_map", 16 * SIZE, "EFAULT")


def test_a_vdpa_device_beside_an_iommufd_of_mode_user(start: Start, vdpa: str) -> None:
    vmm = start(0)
    vmm.open()
    prepared(vmm, ("attach", DEVICES[0]), ("vdpa", vdpa))
    vmm.do("pin", str(12 * SIZE))
    vmm.do("vdpa_map", str(12 * SIZE))
    answered = look()
    row = process(answered, vmm.pid)
    assert (row["backends"], row["accounting"], row["counter"]) == (["iommufd", "vdpa"], "user", "mm_pinned")
    # The kernel does not tell which part of it the user is charged for.
    assert counters(row) == {"user": (40 * SIZE, ["iommufd"]), "mm_pinned": (16 * SIZE, ["vdpa"])}
    assert (user(answered, VM)["charged_bytes"], user(answered, VM)["uncertain_bytes"]) == (0, 24 * SIZE)
    assert user(answered, VM)["pids"] == [vmm.pid]
    has_headroom(vmm, "vdpa_map", 16 * SIZE, "EFAULT")
    has_headroom(vmm, "pin", 28 * SIZE)


def test_a_vdpa_device_beside_an_iommufd_with_the_capability(start: Start, vdpa: str) -> None:
    """The capability lifts the limit for the iommufd, and not for the vDPA device."""
    vmm = start(0)
    vmm.open()
    prepared(vmm, ("attach", DEVICES[0]), ("vdpa", vdpa), capabilities=("ipc_lock",))
    vmm.do("pin", str(24 * SIZE))
    row = look_at(vmm)
    assert (row["accounting"], row["counter"], row["charged_bytes"]) == ("process", "mm_pinned", 24 * SIZE)
    assert counters(row) == {"mm_pinned": (16 * SIZE, ["vdpa"])}
    assert look()["users"] == []
    has_headroom(vmm, "vdpa_map", 16 * SIZE, "EFAULT")
    vmm.do("pin", str(LIMIT))


def test_a_device_alone(start: Start) -> None:
    """Through its device it still has the iommufd that it closed, and nobody can tell its mode."""
    vmm = start()
    fd = vmm.open()
    vmm.limit(LIMIT)
    vmm.do("attach", DEVICES[0])
    vmm.do("pin", str(SIZE))
    vmm.do("close", str(fd))
    row = look_at(vmm)
    assert (row["backends"], row["iommufds"], row["accounting"], row["counters"]) == (["iommufd"], [], None, [])
    assert [each["node"] for each in row["vfio_devices"]] == [DEVICES[0]]
    assert ["neither an iommufd nor a container" in note for note in row["notes"]] == [True]
    assert user(look(), VM)["uncertain_bytes"] == SIZE


def test_a_container_that_pins_nothing_yet(start: Start, legacy: str) -> None:
    vmm = start()
    fd = vmm.open(CONTAINER)
    row = look_at(vmm)
    assert (row["backends"], row["accounting"], row["locked_bytes"]) == ([legacy], "process", 0)
    assert [each["fd"] for each in row["legacy_containers" if legacy == "legacy" else "iommufds"]] == [fd]


def test_what_another_user_may_not_look_at(start: Start, vdpa: str) -> None:
    """A vDPA device shows in VmPin. What it is, is not to be seen."""
    vmm = prepared(start(0), ("vdpa", vdpa))
    vmm.do("vdpa_map", str(SIZE))
    row = process(look_within(partial(change_user, ALICE)), vmm.pid)
    fields = ("backends", "iommufds", "legacy_containers", "vfio_devices", "vdpa_devices", "accounting", "counter")
    assert [row[each] for each in fields] == [None] * len(fields)
    assert row["counters"] == []
