# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the model says of VMs. That the kernel does so too is shown by tests/kernel/test_charges.py."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import (
    AF_XDP,
    DMA_BUF,
    EACH,
    IO_URING,
    IOMMUFD,
    IOMMUFD_PROCESS,
    IOMMUFD_USER,
    LEGACY,
    MLOCK,
    MM_LOCKED,
    MM_PINNED,
    NESTED,
    NO_VIOMMU,
    NOTHING,
    PERF,
    PROCESS,
    QUESTIONS,
    RDMA,
    UNKNOWN,
    UNLIMITED,
    USER,
    VDPA,
    VDPA_VA,
    WAYS,
    Counters,
    Device,
    Kernel,
    Pin,
    Span,
    Vm,
    added,
    demand,
    exactly,
    least_limit,
    verdict,
    way,
)

MIB = 2**20
M64, M100 = exactly(64 * MIB), exactly(100 * MIB)
KERNEL = Kernel(4096, (6, 12), legacy_by_iommufd=False)
BY_IOMMUFD = KERNEL._replace(legacy_by_iommufd=True)

BY_USER = Device(IOMMUFD, "iommufd0", USER)
BY_PROCESS = Device(IOMMUFD, "iommufd0", PROCESS)
ANY_MODE = Device(IOMMUFD, "iommufd0")
CONTAINER = Device(LEGACY, "container0")
NVME = Device(LEGACY, "nvme0")
MDEV = Device(LEGACY, "container0", as_it_runs=True)
DPA = Device(VDPA)
# All of a VM that is known, unless a test says otherwise
KNOWN = {
    "capable": False,
    "beyond": NOTHING,
    "locked": NOTHING,
    "viommu": NO_VIOMMU,
    "ordered": True,
    "held_user": NOTHING,
    "held_mm_locked": NOTHING,
    "held_mm_pinned": NOTHING,
}


def vm(*devices: Device, **other: Any) -> Vm:
    return Vm(**{"memory": M64, "devices": devices, "limit": M100, "user": "vm", **KNOWN, **other})


# Way, with CAP_IPC_LOCK: what it adds to, what is checked
RULES = [
    (IOMMUFD_USER, False, {USER, MM_PINNED}, USER),
    (IOMMUFD_USER, True, {MM_PINNED}, None),
    (IOMMUFD_PROCESS, False, {MM_LOCKED, MM_PINNED}, MM_LOCKED),
    (IOMMUFD_PROCESS, True, {MM_PINNED}, None),
    (DMA_BUF, False, set(), None),
    (DMA_BUF, True, set(), None),
    (LEGACY, False, {MM_LOCKED}, MM_LOCKED),
    (LEGACY, True, {MM_LOCKED}, None),
    (MLOCK, False, {MM_LOCKED}, MM_LOCKED),
    (MLOCK, True, {MM_LOCKED}, None),
    (VDPA, False, {MM_PINNED}, MM_PINNED),
    (VDPA, True, {MM_PINNED}, MM_PINNED),
    (VDPA_VA, False, set(), None),
    (VDPA_VA, True, set(), None),
    (RDMA, False, {MM_PINNED}, MM_PINNED),
    (RDMA, True, {MM_PINNED}, None),
    (IO_URING, False, {USER, MM_PINNED}, USER),
    (IO_URING, True, {MM_PINNED}, None),
    (PERF, False, {MM_PINNED}, MM_PINNED),
    (PERF, True, {MM_PINNED}, None),
    (AF_XDP, False, {USER}, USER),
    (AF_XDP, True, set(), None),
]


@pytest.mark.parametrize(("name", "capable", "adds", "checks"), RULES)
def test_what_a_way_adds_to_and_what_is_checked(name: str, capable: bool, adds: set[str], checks: str | None) -> None:
    before = Counters(1, 2, 3)
    pin = Pin(way(name, KERNEL), 10)
    after = added(before, pin, capable)
    assert {each for each in Counters._fields if getattr(after, each) != getattr(before, each)} == adds
    assert {getattr(after, each) - getattr(before, each) for each in adds} <= {10}
    assert least_limit(before, pin, capable) == (None if checks is None else getattr(before, checks) + 10)


def test_every_way_has_its_rules() -> None:
    assert [name for name, _capable, _adds, _checks in RULES[::2]] == list(WAYS)


@pytest.mark.parametrize(("release", "adds"), [((6, 12), {MM_PINNED}), ((7, 2), set()), ((10, 0), set())])
def test_io_uring_with_the_capability_depends_on_the_kernel(release: tuple[int, int], adds: set[str]) -> None:
    assert way(IO_URING, Kernel(4096, release)).adds_with == adds


# A VM of 64 MiB that pins in these ways, one after the other: the counter that refuses it with a limit of 100 MiB, to
# which way, and the limit that would be enough, in MiB.
FIT = [
    (vm(), None, None, 0),
    (vm(BY_USER), None, None, 64),
    (vm(BY_PROCESS), None, None, 64),
    (vm(CONTAINER), None, None, 64),
    (vm(DPA), None, None, 64),
    # Two devices in one address space, then in two
    (vm(BY_USER, BY_USER), None, None, 64),
    (vm(CONTAINER, CONTAINER), None, None, 64),
    (vm(CONTAINER, NVME), MM_LOCKED, LEGACY, 128),
    (vm(BY_USER, BY_USER._replace(holder="iommufd1")), USER, IOMMUFD_USER, 128),
    (vm(BY_USER, BY_PROCESS._replace(holder="iommufd1")), None, None, 64),
    (vm(BY_USER, BY_USER, viommu=EACH), USER, IOMMUFD_USER, 128),
    (vm(BY_PROCESS, BY_PROCESS, BY_PROCESS, viommu=EACH), MM_LOCKED, IOMMUFD_PROCESS, 192),
    (vm(CONTAINER, CONTAINER, viommu=EACH), MM_LOCKED, LEGACY, 128),
    (vm(*[BY_PROCESS] * 8, viommu=NESTED), None, None, 64),
    (vm(DPA, DPA), MM_PINNED, VDPA, 128),
    (vm(*[Device(VDPA_VA)] * 3), None, None, 0),
    # One by iommufd and one by the legacy container: process mode breaks what runs with user mode.
    (vm(BY_USER, CONTAINER), None, None, 64),
    (vm(BY_PROCESS, CONTAINER), MM_LOCKED, LEGACY, 128),
    (vm(CONTAINER, BY_PROCESS), MM_LOCKED, IOMMUFD_PROCESS, 128),
    # Every iommufd adds to what vDPA checks, whatever the mode and the capability. The other way round it does not.
    (vm(BY_USER, DPA), MM_PINNED, VDPA, 128),
    (vm(BY_PROCESS, DPA), MM_PINNED, VDPA, 128),
    (vm(BY_PROCESS, DPA, capable=True), MM_PINNED, VDPA, 128),
    (vm(CONTAINER, DPA), None, None, 64),
    (vm(DPA, BY_USER), None, None, 64),
    (vm(DPA, BY_PROCESS), None, None, 64),
    # What the VMM locks itself
    (vm(BY_USER, locked=M64), None, None, 64),
    (vm(BY_PROCESS, locked=M64), MM_LOCKED, IOMMUFD_PROCESS, 128),
    (vm(CONTAINER, locked=M64), MM_LOCKED, LEGACY, 128),
    (vm(BY_USER, locked=exactly(101 * MIB)), MM_LOCKED, MLOCK, 101),
    (vm(DPA, locked=M64), None, None, 64),
    # With the capability nothing else is checked.
    (vm(BY_USER, CONTAINER, NVME, capable=True, limit=NOTHING, locked=M64), None, None, 0),
    # What the user and the process have already
    (vm(BY_USER, held_user=exactly(36 * MIB)), None, None, 100),
    (vm(BY_USER, held_user=exactly(37 * MIB)), USER, IOMMUFD_USER, 101),
    (vm(BY_PROCESS, held_user=M64, held_mm_pinned=M64), None, None, 64),
    (vm(BY_PROCESS, held_mm_locked=exactly(37 * MIB)), MM_LOCKED, IOMMUFD_PROCESS, 101),
    (vm(DPA, held_mm_pinned=exactly(37 * MIB)), MM_PINNED, VDPA, 101),
    # What it pins beyond its memory, once for each address space
    (vm(BY_USER, beyond=exactly(36 * MIB)), None, None, 100),
    (vm(BY_USER, beyond=exactly(37 * MIB)), USER, IOMMUFD_USER, 101),
    (vm(BY_USER, BY_USER, beyond=exactly(MIB), limit=exactly(128 * MIB), viommu=EACH), USER, IOMMUFD_USER, 130),
    # The first that is refused, and not the one that needs most
    (vm(CONTAINER, NVME, DPA, held_mm_pinned=exactly(200 * MIB)), MM_LOCKED, LEGACY, 264),
    (vm(*[BY_USER] * 3, viommu=EACH, limit=exactly(UNLIMITED)), None, None, 192),
]


@pytest.mark.parametrize(("asked", "counter", "refused", "enough"), FIT)
def test_whether_it_fits(asked: Vm, counter: str | None, refused: str | None, enough: int) -> None:
    told = verdict(asked, KERNEL)
    assert told.question is None
    assert told.fits is (counter is None)
    assert told.enough == enough * MIB
    if counter is not None:
        assert refused is not None
        assert (told.counter, told.way, told.error) == (counter, refused, WAYS[refused].error)
        assert told.held is not None
        assert told.size is not None
        assert told.limit == asked.limit.least < told.held + told.size
    else:
        assert told.error is None
    # To the page
    assert verdict(asked._replace(limit=exactly(told.enough)), KERNEL).fits is True
    if told.enough:
        assert verdict(asked._replace(limit=exactly(told.enough - 1)), KERNEL).fits is False


def test_the_closest_is_told_where_all_fits() -> None:
    told = verdict(vm(BY_USER, CONTAINER, held_user=exactly(8 * MIB)), KERNEL)
    assert (told.way, told.counter, told.held, told.size) == (IOMMUFD_USER, USER, 8 * MIB, 64 * MIB)
    assert (told.limit, told.enough) == (100 * MIB, 72 * MIB)
    told = verdict(vm(BY_USER, capable=True), KERNEL)
    assert (told.way, told.counter, told.held, told.size, told.limit) == (None, None, None, None, None)


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_pages(page: int) -> None:
    """Of the guest's memory whole pages are pinned. What is beyond that, or locked, is rounded up, the limit down."""
    kernel = KERNEL._replace(page=page)
    part = exactly(10 * page + 1)
    asked = vm(BY_USER, memory=part, beyond=exactly(1), limit=exactly(11 * page + 1))
    told = verdict(asked, kernel)
    assert (told.fits, told.size, told.limit, told.enough) == (True, 11 * page, 11 * page, 11 * page)
    assert verdict(asked._replace(limit=exactly(11 * page - 1)), kernel).fits is False
    for device in (BY_USER, BY_PROCESS, CONTAINER, DPA):
        told = verdict(vm(device, memory=part), kernel)
        assert (told.size, told.enough) == (10 * page, 10 * page)
    assert verdict(vm(memory=part, locked=part), kernel).enough == 11 * page


def test_a_container_that_iommufd_provides() -> None:
    told = verdict(vm(CONTAINER, DPA), BY_IOMMUFD)
    assert (told.fits, told.counter) == (False, MM_PINNED)
    assert verdict(vm(CONTAINER, capable=True, limit=NOTHING), BY_IOMMUFD).fits is True
    assert demand(vm(CONTAINER, capable=True), BY_IOMMUFD)[MM_LOCKED] == NOTHING
    assert demand(vm(CONTAINER, capable=True), KERNEL)[MM_LOCKED] == M64


# What is not known: the question that settles it, and the counter in question, None where there are several.
UNSETTLED = [
    (vm(BY_USER, capable=None, held_user=M64), "capable", USER),
    (vm(ANY_MODE, held_user=M64), "mode", USER),
    (vm(ANY_MODE, CONTAINER), "mode", MM_LOCKED),
    (vm(ANY_MODE, ANY_MODE._replace(holder="iommufd1")), "mode", None),
    (vm(CONTAINER, locked=NOTHING, viommu=None), None, MM_LOCKED),
    (vm(CONTAINER, CONTAINER, viommu=None), "viommu", MM_LOCKED),
    (vm(BY_USER, limit=UNKNOWN), "limit", USER),
    (vm(BY_USER, limit=Span(63 * MIB, 64 * MIB)), "limit", USER),
    (vm(BY_USER, limit=Span(64 * MIB, 65 * MIB)), None, USER),
    (vm(BY_USER, limit=Span(1, 63 * MIB)), None, USER),
    (vm(BY_USER, held_user=UNKNOWN), "held_user", USER),
    (vm(BY_USER, held_user=UNKNOWN, limit=exactly(UNLIMITED)), None, USER),
    (vm(BY_PROCESS, held_user=UNKNOWN), None, MM_LOCKED),
    (vm(BY_PROCESS, locked=UNKNOWN), "locked", MM_LOCKED),
    (vm(BY_PROCESS, held_mm_locked=UNKNOWN), "held_mm_locked", MM_LOCKED),
    (vm(DPA, held_mm_pinned=UNKNOWN), "held_mm_pinned", MM_PINNED),
    (vm(BY_USER, memory=UNKNOWN), "memory", USER),
    (vm(BY_USER, beyond=Span(0, 2**30)), "beyond", USER),
    (vm(BY_USER, beyond=Span(0, 36 * MIB)), None, USER),
    (vm(MDEV), None, MM_LOCKED),
    (vm(MDEV, NVME), "later", MM_LOCKED),
    (vm(MDEV, CONTAINER), None, MM_LOCKED),
    (vm(BY_USER, DPA, ordered=False), "order", MM_PINNED),
    (vm(BY_USER, CONTAINER, ordered=False), None, None),
    # What decides is asked, and not whatever else is not known.
    (vm(BY_USER, capable=None, locked=UNKNOWN, limit=exactly(UNLIMITED)), None, None),
    (vm(ANY_MODE, capable=None, held_user=M64, beyond=Span(0, MIB)), "capable", USER),
    (vm(BY_PROCESS, DPA, capable=None, limit=UNKNOWN), "limit", None),
    # None settles it alone.
    (vm(BY_USER, held_user=Span(0, 40 * MIB), limit=Span(60 * MIB, 110 * MIB)), "limit", USER),
]


@pytest.mark.parametrize(("asked", "question", "counter"), UNSETTLED)
def test_what_is_not_known(asked: Vm, question: str | None, counter: str | None) -> None:
    told = verdict(asked, KERNEL)
    assert (told.question, told.counter) == (question, counter)
    assert (told.fits is None) is (question is not None)
    assert question is None or question in QUESTIONS


def test_what_is_left_out_is_unknown() -> None:
    told = verdict(Vm(M64, (ANY_MODE, CONTAINER), "vm"), Kernel(4096, (6, 12)))
    assert (told.fits, told.question) == (None, "capable")
    told = verdict(Vm(M64, (ANY_MODE, CONTAINER), "vm", M100, capable=False), Kernel(4096, (6, 12)))
    assert told.fits is None
    found = demand(Vm(M64, (ANY_MODE, CONTAINER), "vm", locked=NOTHING, beyond=NOTHING), Kernel(4096, (6, 12)))
    assert found == {USER: Span(0, 64 * MIB), MM_LOCKED: Span(0, 128 * MIB), MM_PINNED: Span(64 * MIB, 128 * MIB)}


def test_a_container_of_which_the_kernel_is_not_known() -> None:
    kernel = KERNEL._replace(legacy_by_iommufd=None)
    assert verdict(vm(CONTAINER, DPA), kernel).question == "legacy_by_iommufd"
    assert verdict(vm(CONTAINER), kernel).fits is True
    assert verdict(vm(BY_USER), kernel).fits is True


# A VM that grows: what it gets, and what it holds; then a live update, where the new process is charged before the old
# one is not any more.
GROWTH = [
    (vm(BY_USER, memory=exactly(36 * MIB), held_user=M64, held_mm_pinned=M64), True),
    (vm(BY_USER, memory=exactly(37 * MIB), held_user=M64, held_mm_pinned=M64), False),
    (vm(BY_PROCESS, memory=exactly(36 * MIB), held_mm_locked=M64, held_mm_pinned=M64), True),
    (vm(BY_PROCESS, memory=exactly(37 * MIB), held_mm_locked=M64, held_mm_pinned=M64), False),
    (vm(BY_USER, held_user=M64), False),
    (vm(BY_PROCESS, held_user=NOTHING), True),
]


@pytest.mark.parametrize(("asked", "fits"), GROWTH)
def test_a_vm_that_grows_or_is_updated(asked: Vm, fits: bool) -> None:
    assert verdict(asked, KERNEL).fits is fits


DEMAND = [
    (vm(BY_USER), (64, 64), (0, 0), (64, 64)),
    (vm(BY_PROCESS, CONTAINER), (0, 0), (128, 128), (64, 64)),
    (vm(BY_PROCESS, CONTAINER, DPA, capable=True), (0, 0), (64, 64), (128, 128)),
    (vm(ANY_MODE), (0, 64), (0, 64), (64, 64)),
    (vm(BY_USER, BY_USER, viommu=None, capable=None), (0, 128), (0, 0), (64, 128)),
    (vm(MDEV, locked=exactly(MIB)), (0, 0), (1, 65), (0, 0)),
    (vm(), (0, 0), (0, 0), (0, 0)),
]


@pytest.mark.parametrize(("asked", "user", "mm_locked", "mm_pinned"), DEMAND)
def test_demand(asked: Vm, user: tuple[int, int], mm_locked: tuple[int, int], mm_pinned: tuple[int, int]) -> None:
    found = demand(asked, KERNEL)
    assert list(found) == [USER, MM_LOCKED, MM_PINNED]
    assert [tuple(each) for each in found.values()] == [
        (least * MIB, most * MIB) for least, most in (user, mm_locked, mm_pinned)
    ]


AMOUNTS = ["memory", "beyond", "limit", "locked", "held_user", "held_mm_locked", "held_mm_pinned"]


def any_vm(chance: random.Random) -> Vm:
    """A VM of which some amounts are known to lie between others."""
    kinds = [BY_USER, BY_PROCESS, ANY_MODE, CONTAINER, NVME, MDEV, DPA, BY_USER._replace(holder="iommufd1")]
    ends = {name: sorted(chance.randrange(80) * MIB for _each in range(2)) for name in AMOUNTS}
    amounts: dict[str, Any] = {
        name: Span(*(pair if chance.randrange(2) else pair[:1] * 2)) for name, pair in ends.items()
    }
    return Vm(
        devices=tuple(chance.choice(kinds) for _each in range(chance.randrange(1, 4))),
        user="vm",
        capable=chance.choice([False, True, None]),
        viommu=chance.choice([NO_VIOMMU, EACH, NESTED, None]),
        ordered=chance.choice([False, True]),
        **amounts,
    )


@pytest.mark.parametrize("seed", range(8))
def test_what_is_certain_is_so_for_every_amount_in_between(seed: int) -> None:
    chance = random.Random(seed)
    certain = 0
    for _each in range(20):
        asked = any_vm(chance)
        told = verdict(asked, KERNEL)
        certain += told.fits is not None
        for _other in range(10):
            amounts: dict[str, Any] = {name: exactly(chance.randint(*getattr(asked, name))) for name in AMOUNTS}
            other = verdict(asked._replace(**amounts), KERNEL)
            assert told.fits in (None, other.fits)
            assert other.enough <= told.enough
            if told.fits is False and told.counter:
                assert other.counter == told.counter
                assert told.way in (None, other.way)
                assert told.error in (None, other.error)
            whole, others = demand(asked, KERNEL), demand(asked._replace(**amounts), KERNEL)
            assert all(
                whole[name].least <= others[name].least <= others[name].most <= whole[name].most for name in others
            )
    assert certain


GIB = 2**30
SIZING = Path(__file__).resolve().parents[4] / "docs" / "docsite" / "rst" / "sizing.rst"


def test_the_examples_of_the_guide() -> None:
    """Each "needs NUMBER GiB" of its examples, in their order, is what the model calls enough."""
    asked = [
        vm(BY_USER, memory=exactly(64 * GIB), held_user=exactly(64 * GIB)),
        vm(BY_PROCESS, memory=exactly(64 * GIB), held_user=exactly(64 * GIB)),
        vm(BY_PROCESS, BY_PROCESS, BY_PROCESS, memory=exactly(32 * GIB), viommu=EACH),
        vm(BY_PROCESS, BY_PROCESS, BY_PROCESS, memory=exactly(32 * GIB), viommu=NESTED),
        vm(BY_PROCESS, DPA, NVME, memory=exactly(16 * GIB)),
        vm(BY_PROCESS, DPA, NVME, memory=exactly(16 * GIB), capable=True),
        vm(BY_PROCESS, DPA, NVME, memory=exactly(16 * GIB), locked=exactly(16 * GIB)),
    ]
    examples = SIZING.read_text(encoding="utf-8").partition("\nThree examples\n")[2]
    told = re.findall(r"needs?(?:\s+a\s+limit\s+of)?\s+\*\*(\d+)\s+GiB", examples)
    assert [int(number) * GIB for number in told] == [verdict(each, KERNEL).enough for each in asked]
