# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What _accounting says of the kernel, held against the kernel: to the page, on both sides of each limit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, NamedTuple

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
    RDMA,
    UNLIMITED,
    USER,
    VDPA,
    VDPA_VA,
    WAYS,
    Counters,
    Device,
    Kernel,
    Pin,
    Vm,
    added,
    demand,
    exactly,
    least_limit,
    verdict,
    way,
)
from ansible_collections.virt.iommufd.tests.kernel import charges
from ansible_collections.virt.iommufd.tests.kernel.charges import Pinner, Seen, Step, pins
from ansible_collections.virt.iommufd.tests.kernel.harness import DEVICES, PAGE, execute, kernel_config, vdpa_device

# As many pages as perf can have. Few, since each takes its time under emulation; different, so that none is mistaken.
FIRST, SECOND, THIRD = 17 * PAGE, 33 * PAGE, 9 * PAGE
NAME = "charges"

CONFIG = kernel_config().splitlines()
# Tried apart, since vdpa_sim works either with virtual addresses or without.
APART = {VDPA_VA}
# A device's memory can be mapped since 6.19.
LACKING = set() if "CONFIG_VFIO_PCI_DMABUF=y" in CONFIG else {DMA_BUF}
HERE = [name for name in WAYS if name not in APART | LACKING]
KINDS = list(product(HERE, (False, True)))


@pytest.fixture(scope="module")
def kernel(container_is_iommufd: bool) -> Kernel:
    major, minor = Path("/proc/sys/kernel/osrelease").read_text(encoding="ascii").split(".")[:2]
    return Kernel(PAGE, (int(major), int(minor)), container_is_iommufd)


@pytest.fixture(scope="module", autouse=True)
def legacy(container_is_iommufd: bool) -> None:
    if not container_is_iommufd:
        execute("modprobe", "vfio_iommu_type1")


@pytest.fixture(scope="module", autouse=True)
def perf() -> Iterator[None]:
    """Leaves no user any memory for perf that is not counted elsewhere."""
    allowance = Path("/proc/sys/kernel/perf_event_mlock_kb")
    before = allowance.read_text(encoding="ascii")
    allowance.write_text("0", encoding="ascii")
    yield
    allowance.write_text(before, encoding="ascii")


@pytest.fixture(scope="module")
def rdma() -> Iterator[str]:
    """The node of a device that does RDMA over Ethernet, of which there is none but a dummy."""
    execute("modprobe", "--all", "ib_uverbs", "rdma_rxe", "dummy")
    execute("ip", "link", "add", NAME, "type", "dummy")
    try:
        execute("ip", "link", "set", NAME, "up")
        execute("rdma", "link", "add", NAME, "type", "rxe", "netdev", NAME)
        execute("udevadm", "settle")
        devices = Path("/sys/class/infiniband_verbs").glob("uverbs*")
        [name] = [path.name for path in devices if (path / "ibdev").read_text(encoding="ascii").strip() == NAME]
        node = Path("/dev/infiniband", name)
        node.chmod(0o666)
        yield str(node)
    finally:
        execute("ip", "link", "del", NAME)
        execute("modprobe", "--remove", "rdma_rxe", "ib_uverbs", "dummy")


class Opener(NamedTuple):
    """What root opens so that memory can be pinned in one way. `devices`: how many VFIO devices that takes."""

    devices: int
    open: Callable[..., Pinner]


Openers = dict[str, Opener]


def by_new_iommufd(mode: str, *nodes: str) -> Pinner:
    return charges.by_iommufd(charges.open_iommufd(mode), *nodes)


@pytest.fixture(scope="module")
def openers(vdpa: str, rdma: str) -> Openers:
    return {
        IOMMUFD_USER: Opener(1, partial(by_new_iommufd, "user")),
        IOMMUFD_PROCESS: Opener(1, partial(by_new_iommufd, "process")),
        DMA_BUF: Opener(1, lambda node: charges.by_dma_buf(charges.open_iommufd("user"), node)),
        LEGACY: Opener(1, charges.by_container),
        MLOCK: Opener(0, lambda: charges.by_mlock),
        VDPA: Opener(0, lambda: charges.by_vdpa(vdpa)),
        RDMA: Opener(0, lambda: charges.by_rdma(rdma)),
        IO_URING: Opener(0, lambda: charges.by_io_uring),
        PERF: Opener(0, charges.by_perf),
        AF_XDP: Opener(0, charges.by_af_xdp),
    }


def opened(openers: Openers, names: set[str]) -> dict[str, Pinner]:
    """These ways, each with a VFIO device of its own where it takes one."""
    devices = iter(DEVICES)
    return {name: openers[name].open(*(next(devices) for _each in range(openers[name].devices))) for name in names}


Kind = tuple[str, bool]


def expected(kernel: Kernel, kinds: list[tuple[Kind, int]]) -> tuple[list[Step], list[Seen]]:
    """Steps on both sides of each limit, and what should come of them.

    With a byte less than what suffices it is a page too little, and nothing changes.
    """
    counters = Counters()
    steps, seen = [], []
    for (name, capable), size in kinds:
        pin = Pin(way(name, kernel), size)
        enough = least_limit(counters, pin, capable)
        if enough is not None:
            steps.append(Step(name, size, enough - 1, capable))
            seen.append(Seen(pin.way.error, counters.mm_locked, counters.mm_pinned))
        counters = added(counters, pin, capable)
        steps.append(Step(name, size, enough or 0, capable, again=enough is not None))
        seen.append(Seen(None, counters.mm_locked, counters.mm_pinned))
    return steps, seen


# The user's counter shows in what io_uring may have afterwards.
LAST: tuple[Kind, int] = ((IO_URING, False), THIRD)


def by_io_uring(kernel: Kernel) -> int:
    """What the last of them shows as pinned."""
    return THIRD if MM_PINNED in way(IO_URING, kernel).adds else 0


def test_every_way_is_tried(kernel: Kernel) -> None:
    assert {DMA_BUF} - LACKING == ({DMA_BUF} if kernel.release >= (6, 19) else set())
    assert set(HERE) == WAYS.keys() - {VDPA_VA} - LACKING


@pytest.fixture
def vdpa_va() -> Iterator[str]:
    with vdpa_device(use_va=True) as node:
        yield node


# Before those that have the same module loaded for the rest of this file.
@pytest.mark.parametrize("capable", [False, True])
def test_vdpa_with_virtual_addresses(capable: bool, kernel: Kernel, vdpa_va: str) -> None:
    steps, right = expected(kernel, [((VDPA_VA, capable), FIRST), ((MLOCK, False), SECOND), LAST])

    def prepare() -> dict[str, Pinner]:
        return {VDPA_VA: charges.by_vdpa(vdpa_va), MLOCK: charges.by_mlock, IO_URING: charges.by_io_uring}

    assert pins(prepare, steps) == right


@pytest.fixture
def vdpa_of_few_pieces() -> Iterator[str]:
    with vdpa_device(use_va=False, pieces=16) as node:
        yield node


@pytest.mark.parametrize("capable", [False, True])
def test_vdpa_and_memory_in_too_many_pieces(capable: bool, vdpa_of_few_pieces: str) -> None:
    """No limit is in force, and the error is that of a limit."""
    steps = [Step(VDPA, pieces * PAGE, UNLIMITED, capable) for pieces in (17, 16)]
    seen = pins(lambda: {VDPA: charges.in_pieces(charges.by_vdpa(vdpa_of_few_pieces))}, steps)
    assert seen == [Seen("EFAULT", 0, 0), Seen(None, 0, 16 * PAGE)]


@pytest.mark.parametrize("first", KINDS, ids=lambda kind: f"{kind[0]}{'-capable' * kind[1]}")
def test_one_after_the_other(first: Kind, kernel: Kernel, openers: Openers) -> None:
    wrong = []
    for second in KINDS:
        steps, right = expected(kernel, [(first, FIRST), (second, SECOND), LAST])
        seen = pins(partial(opened, openers, {step.way for step in steps}), steps)
        wrong += [(first, second, *each) for each in zip(steps, seen, right) if each[1] != each[2]]
    assert wrong == []


def test_a_devices_memory_in_the_legacy_container(container_is_iommufd: bool) -> None:
    """What is no memory of the host is neither checked nor counted. iommufd's own container does not take it."""
    seen = pins(lambda: {"region": charges.region_by_container(DEVICES[0])}, [Step("region", FIRST, 0)])
    assert seen == [Seen("EFAULT" if container_is_iommufd else None, 0, 0)]


@pytest.mark.parametrize("mode", ["user", "process"])
@pytest.mark.parametrize("capable", [False, True])
def test_memory_that_iommufd_is_given_as_a_file(mode: str, capable: bool, kernel: Kernel) -> None:
    """It is charged as if it was given by its address. Before 6.14 it cannot be."""
    kind = (IOMMUFD_PROCESS if mode == "process" else IOMMUFD_USER, capable)
    steps, right = expected(kernel, [(kind, FIRST), LAST])
    if kernel.release < (6, 14):
        steps, right = [Step(kind[0], FIRST, 2 * FIRST, capable)], [Seen("ENOTTY", 0, 0)]

    def prepare() -> dict[str, Pinner]:
        return {kind[0]: charges.by_file(charges.open_iommufd(mode), DEVICES[0]), IO_URING: charges.by_io_uring}

    assert pins(prepare, steps) == right


@pytest.mark.parametrize("mode", ["user", "process"])
def test_a_live_update(mode: str, kernel: Kernel) -> None:
    """The new process is charged before the old one is relieved, even with CAP_IPC_LOCK, which decides as it is pinned.

    Before 6.14 there is no such thing.
    """
    name = IOMMUFD_PROCESS if mode == "process" else IOMMUFD_USER
    enough = FIRST if mode == "process" else 2 * FIRST
    held = (FIRST if mode == "process" else 0, FIRST)
    of_user = 0 if mode == "process" else FIRST
    steps = [
        Step(name, FIRST, FIRST),
        Step("move", FIRST, enough - 1, again=True),
        Step("move", FIRST, enough - 1, capable=True, again=True),
        Step("move", FIRST, enough, again=True),
        Step(IO_URING, THIRD, of_user + THIRD - 1),
        Step(IO_URING, THIRD, of_user + THIRD, again=True),
    ]
    # What is moved is seen no more, and the user has it all the same.
    told = [None, "ENOMEM", "ENOMEM", None, "ENOMEM", None]
    counted = [held, held, held, (0, 0), (0, 0), (0, by_io_uring(kernel))]
    right = [Seen(error, *each) for error, each in zip(told, counted)]
    if kernel.release < (6, 14):
        steps, right = [Step("move", FIRST, UNLIMITED)], [Seen("ENOTTY", 0, 0)]

    def prepare() -> dict[str, Pinner]:
        iommufd = charges.open_iommufd(mode)
        by_file = charges.by_file(iommufd, DEVICES[0])
        return {name: by_file, "move": charges.to_a_child(iommufd), IO_URING: charges.by_io_uring}

    assert pins(prepare, steps) == right


@pytest.mark.parametrize("mode", ["user", "process"])
def test_a_live_update_from_a_process_that_has_ended(mode: str, kernel: Kernel) -> None:
    """Its user stays charged. What the process was charged cannot be taken: 7.2 does the rest, and says EINVAL."""
    enough = FIRST if mode == "process" else 2 * FIRST
    held = (FIRST, FIRST) if mode == "process" else (0, FIRST)
    steps = [Step(each, FIRST, limit, again=each != mode) for each, limit in ((mode, FIRST), ("move", 2 * FIRST))]
    steps += [Step("take back", FIRST, enough - 1, again=True), Step("take back", FIRST, enough, again=True)]
    told = [None, None, "ENOMEM", "EINVAL" if mode == "process" else None]
    right = [Seen(error, *each) for error, each in zip(told, [held, (0, 0), (0, 0), held])]
    if kernel.release < (6, 14):
        steps, right = [Step("take back", FIRST, UNLIMITED)], [Seen("ENOTTY", 0, 0)]

    def prepare() -> dict[str, Pinner]:
        iommufd = charges.open_iommufd(mode)
        take_back = partial(charges.change_process, iommufd)
        return {
            mode: charges.by_file(iommufd, DEVICES[0]),
            "move": charges.to_a_child(iommufd),
            "take back": lambda _memory: take_back(),
        }

    assert pins(prepare, steps) == right


@pytest.mark.parametrize("other", sorted({IOMMUFD, DMA_BUF} - LACKING))
def test_a_live_update_of_what_is_no_file(other: str, kernel: Kernel) -> None:
    """Neither memory that was given by its address, nor a device's own: then nothing is moved, whatever the limit."""

    def prepare() -> dict[str, Pinner]:
        iommufd = charges.open_iommufd("process")
        by_other = charges.by_dma_buf if other == DMA_BUF else charges.by_iommufd
        return {
            IOMMUFD_PROCESS: charges.by_file(iommufd, DEVICES[0]),
            other: by_other(iommufd, DEVICES[1]),
            "move": charges.to_a_child(iommufd),
        }

    names = [IOMMUFD_PROCESS, other, "move"] if kernel.release >= (6, 14) else ["move"]
    *_pinned, moved = pins(prepare, [Step(each, FIRST, UNLIMITED) for each in names])
    held = FIRST * len(names[:2]) if other == IOMMUFD else FIRST
    assert moved == (Seen("EINVAL", held, held) if kernel.release >= (6, 14) else Seen("ENOTTY", 0, 0))


def test_mlock_with_no_limit_at_all_and_as_memory_is_mapped() -> None:
    """The errors of mlock that are not its usual one."""
    steps = [Step(MLOCK, FIRST, 0), Step("mmap", FIRST, FIRST - 1), Step("mmap", FIRST, FIRST, again=True)]
    seen = pins(lambda: {MLOCK: charges.by_mlock, "mmap": charges.by_mmap_locked}, steps)
    assert seen == [Seen("EPERM", 0, 0), Seen("EAGAIN", 0, 0), Seen(None, FIRST, 0)]


def test_perf_within_its_allowance(kernel: Kernel) -> None:
    """That much is in no counter but perf's own of the user. What is beyond it is in that of the process."""
    allowance = Path("/proc/sys/kernel/perf_event_mlock_kb")
    beyond = SECOND - FIRST
    steps = [
        Step(PERF, SECOND, beyond - 1),
        Step(PERF, SECOND, beyond, again=True),
        Step(IO_URING, THIRD, THIRD - 1),
        Step(IO_URING, THIRD, THIRD, again=True),
    ]
    allowance.write_text(str(FIRST // 1024), encoding="ascii")
    try:
        seen = pins(lambda: {PERF: charges.by_perf(), IO_URING: charges.by_io_uring}, steps)
    finally:
        allowance.write_text("0", encoding="ascii")
    told = ["EPERM", None, "ENOMEM", None]
    counted = [0, beyond, beyond, beyond + by_io_uring(kernel)]
    assert seen == [Seen(error, 0, pinned) for error, pinned in zip(told, counted)]


def test_what_is_sent_without_copying_it(kernel: Kernel) -> None:
    """It is held against the user's sum and in it, with two pages more, which may be needed at its ends."""
    counted = FIRST + 2 * PAGE
    steps = [
        Step("zerocopy", FIRST, counted - 1),
        Step("zerocopy", FIRST, counted, again=True),
        Step(IO_URING, THIRD, counted + THIRD - 1),
        Step(IO_URING, THIRD, counted + THIRD, again=True),
    ]
    seen = pins(lambda: {"zerocopy": charges.by_zerocopy(), IO_URING: charges.by_io_uring}, steps)
    right = [Seen("ENOBUFS", 0, 0), Seen(None, 0, 0), Seen("ENOMEM", 0, 0), Seen(None, 0, by_io_uring(kernel))]
    assert seen == right


def test_secret_memory(kernel: Kernel) -> None:
    """It is in no counter, and no limit is in its way."""
    steps = [Step("secret", FIRST, 0), Step(IO_URING, THIRD, THIRD)]
    seen = pins(lambda: {"secret": charges.by_secret, IO_URING: charges.by_io_uring}, steps)
    assert seen == [Seen(None, 0, 0), Seen(None, 0, by_io_uring(kernel))]


def told_by_the_kernel(log: int) -> Iterator[str]:
    """The lines of its log from where it was left on."""
    while True:
        try:
            yield os.read(log, 8192).decode().partition(";")[2].splitlines()[0]
        except BlockingIOError:
            return


@pytest.mark.parametrize("name", [LEGACY, IOMMUFD_USER, IOMMUFD_PROCESS, VDPA])
def test_what_the_kernels_log_says(name: str, openers: Openers, container_is_iommufd: bool) -> None:
    """Of the legacy container alone, which memory was refused for what limit."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    seen = pins(partial(opened, openers, {name}), [Step(name, FIRST, PAGE)])
    assert seen == [Seen(WAYS[name].error, 0, 0)]
    lines = [line for line in told_by_the_kernel(log) if re.search("memlock|exceed|limit|pin_pages", line, re.I)]
    os.close(log)
    legacy = name == LEGACY and not container_is_iommufd
    assert lines == [f"vfio_pin_pages_remote: RLIMIT_MEMLOCK ({PAGE}) exceeded"] * legacy


BY_USER = Device(IOMMUFD, "a", USER)
BY_PROCESS = Device(IOMMUFD, "a", PROCESS)
OTHER_BY_USER = Device(IOMMUFD, "b", USER)
OTHER_BY_PROCESS = Device(IOMMUFD, "b", PROCESS)
CONTAINER = Device(LEGACY, "a")
OTHER_CONTAINER = Device(LEGACY, "b")
DPA = Device(VDPA)
MEMORY = exactly(FIRST)


def vm(*devices: Device, **other: Any) -> Vm:
    known = {"memory": MEMORY, "beyond": NOTHING, "locked": NOTHING, "limit": exactly(UNLIMITED)}
    known |= {"held_user": NOTHING, "held_mm_locked": NOTHING, "held_mm_pinned": NOTHING}
    return Vm(
        **{"devices": devices, "user": "", "capable": False, "viommu": NO_VIOMMU, "ordered": True, **known, **other}
    )


# What VMs are, with how many address spaces. Each pins the same memory once for each of them, as QEMU does.
VMS = [
    (1, vm(BY_USER)),
    (1, vm(BY_USER, BY_USER, BY_USER)),
    (1, vm(BY_USER, BY_USER, BY_USER, viommu=NESTED)),
    (3, vm(BY_USER, BY_USER, BY_USER, viommu=EACH)),
    (1, vm(BY_PROCESS, BY_PROCESS)),
    (2, vm(BY_PROCESS, BY_PROCESS, viommu=EACH)),
    (2, vm(BY_PROCESS, BY_PROCESS, viommu=EACH, capable=True)),
    (2, vm(BY_USER, OTHER_BY_USER)),
    (2, vm(BY_PROCESS, OTHER_BY_PROCESS)),
    (2, vm(BY_USER, OTHER_BY_PROCESS)),
    (1, vm(CONTAINER, CONTAINER)),
    (2, vm(CONTAINER, CONTAINER, viommu=EACH)),
    (2, vm(CONTAINER, OTHER_CONTAINER)),
    (2, vm(CONTAINER, OTHER_CONTAINER, capable=True)),
    (2, vm(BY_USER, CONTAINER)),
    (2, vm(BY_PROCESS, CONTAINER)),
    (2, vm(CONTAINER, BY_PROCESS)),
    (3, vm(CONTAINER, OTHER_CONTAINER, BY_PROCESS)),
    (2, vm(BY_USER, DPA)),
    (2, vm(DPA, BY_USER)),
    (2, vm(BY_PROCESS, DPA, capable=True)),
    (2, vm(DPA, BY_PROCESS, capable=True)),
    (2, vm(CONTAINER, DPA)),
    (4, vm(BY_USER, OTHER_BY_PROCESS, CONTAINER, DPA)),
    (1, vm(BY_USER, locked=MEMORY)),
    (1, vm(BY_PROCESS, locked=MEMORY)),
    (1, vm(CONTAINER, locked=MEMORY)),
    (1, vm(DPA, locked=MEMORY)),
    (2, vm(BY_USER, CONTAINER, locked=MEMORY, capable=True)),
    # Another program of the same user, or the VM itself before it grew
    (1, vm(BY_USER, held_user=MEMORY, held_mm_pinned=MEMORY)),
    (1, vm(BY_PROCESS, held_user=MEMORY, held_mm_pinned=MEMORY)),
    (2, vm(BY_PROCESS, DPA, held_user=MEMORY, held_mm_pinned=MEMORY)),
    (2, vm(CONTAINER, DPA, held_user=MEMORY, held_mm_pinned=MEMORY)),
]


def realized(asked: Vm, node_of_vdpa: str) -> dict[str, Pinner]:
    """Opens what the VM has: its address spaces by their number, in the order in which it pins for them."""
    nodes = iter(DEVICES)
    iommufds: dict[str, int] = {}
    spaces: dict[tuple[str, str], list[str]] = {}
    modes = {each.holder: each.mode for each in asked.devices if each.backend == IOMMUFD}
    for number, device in enumerate(asked.devices):
        alone = f"/{number}" if asked.viommu == EACH or device.backend == VDPA else ""
        spaces.setdefault((device.backend, device.holder + alone), []).append(
            node_of_vdpa if device.backend == VDPA else next(nodes)
        )
    pinners: dict[str, Pinner] = {MLOCK: charges.by_mlock, IO_URING: charges.by_io_uring}
    for number, ((backend, name), members) in enumerate(spaces.items()):
        if backend == IOMMUFD:
            holder = name.partition("/")[0]
            if holder not in iommufds:
                iommufds[holder] = charges.open_iommufd(modes[holder] or "")
            pinners[str(number)] = charges.by_iommufd(iommufds[holder], *members)
        elif backend == LEGACY:
            pinners[str(number)] = charges.by_container(*members)
        else:
            [member] = members
            pinners[str(number)] = charges.by_vdpa(member)
    return pinners


def steps_of(asked: Vm, spaces: int, limit: int) -> list[Step]:
    """What it pins, in its order, with this limit. What is held already is pinned before, without one."""
    memory, capable = asked.memory.most, bool(asked.capable)
    names = [MLOCK] * bool(asked.locked.most) + [str(number) for number in range(spaces)]
    steps = [Step(IO_URING, memory, UNLIMITED)] if asked.held_user.most else []
    return steps + [Step(name, memory, limit, capable, again=number > 0) for number, name in enumerate(names)]


@pytest.mark.parametrize(("spaces", "asked"), VMS)
def test_vms(spaces: int, asked: Vm, kernel: Kernel, vdpa: str) -> None:
    enough = verdict(asked, kernel).enough
    # With the capability nothing may be too little.
    for limit in sorted({max(enough - 1, 0), enough}):
        told = verdict(asked._replace(limit=exactly(limit)), kernel)
        assert (told.fits, told.question) == (limit == enough, None)
        steps = steps_of(asked, spaces, limit)
        seen = pins(partial(realized, asked, vdpa), steps)
        refused = [(step.way, each.error) for step, each in zip(steps, seen) if each.error]
        if told.fits:
            assert refused == []
            locked, pinned = (demand(asked, kernel)[name].most for name in (MM_LOCKED, MM_PINNED))
            assert (seen[-1].locked, seen[-1].pinned) == (locked, pinned + asked.held_mm_pinned.most)
        else:
            way_refused, error = refused[0]
            assert error == told.error
            assert (way_refused == MLOCK) is (told.way == MLOCK)
