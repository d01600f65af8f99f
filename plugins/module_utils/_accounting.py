# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what the kernel charges for pinned memory, and whether a VM fits. Pure functions.

The kernel has three counters for pinned memory: one for each user, and two for each process (its mm). Whoever pins adds
to some of them, and has one compared with the RLIMIT_MEMLOCK that the process has at that moment. WAYS tells who does
what. tests/kernel/test_charges.py holds that, and the verdicts, against the kernel, to the page.

Sizes are bytes. CAP_IPC_LOCK counts where it is effective in the initial user namespace, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations, product
from typing import Any, NamedTuple

__all__ = (
    "AF_XDP",
    "DMA_BUF",
    "EACH",
    "IOMMUFD",
    "IOMMUFD_PROCESS",
    "IOMMUFD_USER",
    "IO_URING",
    "LEGACY",
    "MLOCK",
    "MM_LOCKED",
    "MM_PINNED",
    "NESTED",
    "NOTHING",
    "NO_VIOMMU",
    "PERF",
    "PROCESS",
    "QUESTIONS",
    "RDMA",
    "UNKNOWN",
    "UNLIMITED",
    "USER",
    "VDPA",
    "VDPA_VA",
    "WAYS",
    "Counters",
    "Device",
    "Kernel",
    "Pin",
    "Span",
    "Verdict",
    "Vm",
    "Way",
    "added",
    "address_spaces",
    "demand",
    "exactly",
    "least_limit",
    "verdict",
    "way",
    "way_of",
)

# The counters: user_struct.locked_vm; mm_struct.locked_vm, which /proc shows as VmLck; mm_struct.pinned_vm (VmPin).
USER = "user"
MM_LOCKED = "mm_locked"
MM_PINNED = "mm_pinned"

IOMMUFD_USER = "iommufd_user"
IOMMUFD_PROCESS = "iommufd_process"
DMA_BUF = "dma_buf"
LEGACY = "legacy"
MLOCK = "mlock"
VDPA = "vdpa"
VDPA_VA = "vdpa_va"
RDMA = "rdma"
IO_URING = "io_uring"
PERF = "perf"
AF_XDP = "af_xdp"


class Way(NamedTuple):
    """One way to pin memory, and what the kernel does about it.

    `adds`: the counters that it adds to. `adds_with`: those that it adds to with CAP_IPC_LOCK. `checks`: the counter
    that is compared with RLIMIT_MEMLOCK, None where none is. `lifts`: whether CAP_IPC_LOCK lifts that. `error`: what
    comes out where the counter would pass the limit.
    """

    adds: frozenset[str]
    adds_with: frozenset[str]
    checks: str | None
    lifts: bool
    error: str


def _way(adds: str, adds_with: str, checks: str | None = None, lifts: bool = True, error: str = "ENOMEM") -> Way:
    return Way(frozenset(adds.split()), frozenset(adds_with.split()), checks, lifts, error)


# The functions named are those of Linux 6.12 and 7.2, on which each row was tried: vDPA by vdpa_sim, RDMA by rxe, and
# DMA_BUF on 7.2 alone. Read and not tried: VDUSE, perf_event_paranoid.
# The capability is asked for where the memory is mapped, unless another function is said to. Each limit is
# rlimit(RLIMIT_MEMLOCK) in whole pages, of the process that maps.
WAYS = {
    # iommu/iommufd/pages.c: iopt_alloc_pages() asks for the capability, incr_user_locked_vm() checks, and
    # do_update_pinned() adds. The user is the real one, and the limit is read when the pages are pinned.
    IOMMUFD_USER: _way("user mm_pinned", "mm_pinned", USER),
    # The same with update_mm_locked_vm(). A /dev/vfio/vfio that iommufd provides begins like this, see vfio_compat.c.
    IOMMUFD_PROCESS: _way("mm_locked mm_pinned", "mm_pinned", MM_LOCKED),
    # iommu/iommufd/pages.c: iopt_alloc_dmabuf_pages(), for a device's memory (6.19 and later).
    DMA_BUF: _way("", ""),
    # vfio/vfio_iommu_type1.c: vfio_pin_pages_remote() checks, vfio_lock_acct() adds. Reserved pages, such as those of a
    # device's memory, are neither checked nor added.
    LEGACY: _way("mm_locked", "mm_locked", MM_LOCKED),
    # mm/mlock.c: do_mlock(). With a limit of 0 it is EPERM, and EAGAIN of memory that is locked as it is mapped.
    MLOCK: _way("mm_locked", "mm_locked", MM_LOCKED),
    # vhost/vdpa.c: vhost_vdpa_pa_map() checks, vhost_vdpa_map() adds. vhost_chr_write_iter() makes EFAULT of any error.
    # EFAULT is also what comes of more than 2048 pieces of memory (max_iotlb_entries of vdpa_sim and vhost_vdpa).
    VDPA: _way("mm_pinned", "mm_pinned", MM_PINNED, lifts=False, error="EFAULT"),
    # vhost/vdpa.c: vhost_vdpa_va_map(), for devices that work with virtual addresses, such as those of VDUSE.
    VDPA_VA: _way("", ""),
    # infiniband/core/umem.c: ib_umem_get().
    RDMA: _way("mm_pinned", "mm_pinned", MM_PINNED),
    # io_uring/rsrc.c: io_buffer_account_pin(), for registered buffers. The capability is asked for when the ring is
    # made, by io_uring_create(). What it leads to depends on the kernel, see way(). Some kernels charge the ring itself
    # to the user, too: 6.18 does, 6.12 and 7.2 do not.
    IO_URING: _way("user mm_pinned", "", USER),
    # kernel/events/core.c: perf_mmap(), for what is beyond kernel.perf_event_mlock_kb. What is within it is in a sum of
    # the user's that perf alone has. kernel.perf_event_paranoid=-1 lifts the check, too.
    PERF: _way("mm_pinned", "mm_pinned", MM_PINNED, error="EPERM"),
    # net/xdp/xdp_umem.c: xdp_umem_account_pages().
    AF_XDP: _way("user", "", USER, error="ENOBUFS"),
}
# MSG_ZEROCOPY adds to the user's counter, too, and is held against it (ENOBUFS). memfd_secret() adds to none. No VMM is
# known to use them for its guest's memory.

# What a device is had by. In the place of IOMMUFD_USER and IOMMUFD_PROCESS stands IOMMUFD with a mode.
IOMMUFD = "iommufd"
PROCESS = "process"

# What a VM has for an IOMMU of its own: none, one that gives each device an address space of its own, or one whose
# tables the host's IOMMU walks itself.
NO_VIOMMU = "none"
EACH = "each"
NESTED = "nested"

# RLIM_INFINITY
UNLIMITED = 2**64 - 1


class Span(NamedTuple):
    """An amount that is known to lie between two, which are the same where it is known."""

    least: int
    most: int


UNKNOWN = Span(0, UNLIMITED)
NOTHING = Span(0, 0)


def exactly(amount: int) -> Span:
    return Span(amount, amount)


class Counters(NamedTuple):
    """What the three counters hold, of a process and its user."""

    user: int = 0
    mm_locked: int = 0
    mm_pinned: int = 0


class Pin(NamedTuple):
    """So much memory, pinned in one way."""

    way: Way
    size: int


class Kernel(NamedTuple):
    """What of a host's kernel decides. `page`: the size of a page, by sysconf. `release`: two numbers of its version.

    `legacy_by_iommufd`: whether iommufd provides /dev/vfio/vfio, None if unknown.
    """

    page: int
    release: tuple[int, int]
    legacy_by_iommufd: bool | None = None


class Device(NamedTuple):
    """A device that is passed through to a VM.

    `backend`: IOMMUFD, LEGACY, VDPA or VDPA_VA. `holder`: a name for the iommufd or the container it is in, which
    devices share; a disk by nvme:// is LEGACY, in a container of its own. `mode`: USER or PROCESS, that of its iommufd,
    None if unknown. `as_it_runs`: it pins nothing at first, and anything up to all memory later, as an mdev does.
    """

    backend: str
    holder: str = ""
    mode: str | None = None
    as_it_runs: bool = False


class Vm(NamedTuple):
    """A VM that runs, is defined, or is asked about. What is left out is unknown.

    `memory`: what is pinned once for each address space. `beyond`: what is pinned beside it in each, such as firmware.
    `devices`: if `ordered`, in the order in which they pin. `limit`: its soft RLIMIT_MEMLOCK, or UNLIMITED, and
    `limit_by`: who gives it that. `capable`: whether it has CAP_IPC_LOCK. `locked`: what it locks itself, by mlock,
    before any device. `viommu`: NO_VIOMMU, EACH or NESTED. `held_...`: what the counters hold already. For a VM that
    grows, `memory` is what it gets, and they hold what it has.
    """

    memory: Span
    devices: tuple[Device, ...]
    user: str
    limit: Span = UNKNOWN
    limit_by: str = ""
    capable: bool | None = None
    beyond: Span = UNKNOWN
    locked: Span = UNKNOWN
    viommu: str | None = None
    ordered: bool = False
    held_user: Span = UNKNOWN
    held_mm_locked: Span = UNKNOWN
    held_mm_pinned: Span = UNKNOWN


class Verdict(NamedTuple):
    """Whether a VM fits, None where that cannot be told, and then the one question of QUESTIONS that would settle it.

    Of all that may be, the rest tells the worst. `way`, `counter`, `held`, `size`, `limit`, `error`: the first pin that
    the kernel refuses, or the one that comes closest; None where nothing is checked, and of the first two and `error`
    where it may be several. `enough`: the limit that suffices.
    """

    fits: bool | None
    question: str | None
    way: str | None
    counter: str | None
    held: int | None
    size: int | None
    limit: int | None
    error: str | None
    enough: int


# What may be unknown, with what to ask. Of several that would settle it alone, the first is asked.
QUESTIONS = {
    "capable": "Has the VMM CAP_IPC_LOCK, effective and in the initial user namespace?",
    "mode": "Which mode has the iommufd, user or process?",
    "legacy_by_iommufd": "Does this kernel's iommufd provide /dev/vfio/vfio (CONFIG_IOMMUFD_VFIO_CONTAINER)?",
    "viommu": "Has the VM an IOMMU of its own, and is that a nested one?",
    "limit": "Which RLIMIT_MEMLOCK has the VMM when it maps memory?",
    "held_user": "How much is charged to the user already?",
    "held_mm_locked": "How much has the process locked already (VmLck)?",
    "held_mm_pinned": "How much has the process pinned already (VmPin)?",
    "locked": "How much memory does the VMM lock itself?",
    "memory": "How much memory has the VM?",
    "beyond": "How much does the VM pin beyond its memory?",
    "later": "How much do devices pin that pin as they run?",
    "order": "In which order do the devices pin?",
}

_AMOUNTS = ("limit", "held_user", "held_mm_locked", "held_mm_pinned", "locked", "memory", "beyond")


def way(name: str, kernel: Kernel) -> Way:
    """How this kernel has it, by its name in WAYS."""
    found = WAYS[name]
    if name == LEGACY and kernel.legacy_by_iommufd:
        return WAYS[IOMMUFD_PROCESS]
    # In 6.12 io_account_mem() is called for a ring without a user, too. In 7.2 it is not; 7.1 was not looked at.
    if name == IO_URING and kernel.release < (7, 2):
        return found._replace(adds_with=frozenset({MM_PINNED}))
    return found


def added(counters: Counters, pin: Pin, capable: bool) -> Counters:
    """What the counters hold after a pin that succeeds."""
    adds = pin.way.adds_with if capable else pin.way.adds
    return Counters(*[held + pin.size if name in adds else held for name, held in zip(Counters._fields, counters)])


def least_limit(counters: Counters, pin: Pin, capable: bool) -> int | None:
    """The smallest RLIMIT_MEMLOCK with which the pin succeeds, None where none is too small."""
    if pin.way.checks is None or (capable and pin.way.lifts):
        return None
    held: int = getattr(counters, pin.way.checks)
    return held + pin.size


class _Outcome(NamedTuple):
    """What becomes of a VM of which all is known. `way` and the rest are those of Verdict."""

    fits: bool
    way: str | None
    counter: str | None
    held: int
    size: int
    limit: int
    enough: int


def address_spaces(vm: Vm) -> list[list[Device]]:
    """The devices of each address space, in the order in which they pin. The memory is pinned once for each.

    Without an IOMMU of its own, or with a nested one, a VM has one for each iommufd and each container. With another
    one each device has its own, as one of vDPA always has.
    """
    spaces: dict[tuple[str, str | int], list[Device]] = {}
    for number, device in enumerate(vm.devices):
        shares = device.backend in (IOMMUFD, LEGACY) and vm.viommu != EACH
        spaces.setdefault((device.backend, device.holder if shares else number), []).append(device)
    return list(spaces.values())


def way_of(device: Device) -> str:
    """The name of the way in which its memory is pinned, where its mode is known."""
    if device.backend == IOMMUFD:
        return IOMMUFD_PROCESS if device.mode == PROCESS else IOMMUFD_USER
    return device.backend


def _pins(vm: Vm, kernel: Kernel, later: bool) -> Iterator[tuple[str, int]]:
    """What a VM of which all is known pins, in its order: each way by its name, and how much. `later`: when it runs."""
    if vm.locked.most:
        yield MLOCK, _whole_pages(vm.locked.most, kernel)
    size = _mapped(vm.memory.most, kernel) + _whole_pages(vm.beyond.most, kernel)
    spaces = address_spaces(vm)
    runs = [all(device.as_it_runs for device in devices) for devices in spaces]
    for wanted in (False, True) if later else (False,):
        for (device, *_others), as_it_runs in zip(spaces, runs):
            if as_it_runs is wanted:
                yield way_of(device), size


def _whole_pages(size: int, kernel: Kernel) -> int:
    return -(-size // kernel.page) * kernel.page


def _mapped(size: int, kernel: Kernel) -> int:
    """What is pinned of a guest's memory: QEMU leaves out the part of a page that may be at its end.

    Source: vfio_listener_region_add() in its hw/vfio, and vhost_vdpa_listener_region_add() in hw/virtio/vhost-vdpa.c.
    """
    return size if size >= UNLIMITED else size // kernel.page * kernel.page


def _outcome(vm: Vm, kernel: Kernel, later: bool) -> _Outcome:
    """What becomes of a VM of which all is known: the first pin that is refused, else the one that comes closest."""
    unlimited = vm.limit.least >= UNLIMITED
    limit = UNLIMITED if unlimited else vm.limit.least // kernel.page * kernel.page
    counters = Counters(vm.held_user.most, vm.held_mm_locked.most, vm.held_mm_pinned.most)
    refused: _Outcome | None = None
    closest = _Outcome(True, None, None, 0, 0, limit, 0)
    for name, size in _pins(vm, kernel, later):
        pin = Pin(way(name, kernel), size)
        enough = least_limit(counters, pin, bool(vm.capable))
        if enough is not None:
            each = _Outcome(unlimited or enough <= limit, name, pin.way.checks, enough - size, size, limit, enough)
            refused = refused or (None if each.fits else each)
            closest = max(closest, each, key=lambda outcome: outcome.enough)
        # As if it had succeeded: what comes next tells which limit would be enough for all.
        counters = added(counters, pin, bool(vm.capable))
    return (refused or closest)._replace(enough=closest.enough)


def _unknown(vm: Vm, kernel: Kernel) -> dict[str, list[Any]]:
    """What is not known and may decide, by its name in QUESTIONS, with what it may be: amounts at best and worst."""
    found: dict[str, list[Any]] = {}
    if vm.capable is None:
        found["capable"] = [False, True]
    holders = sorted({device.holder for device in vm.devices if device.backend == IOMMUFD and device.mode is None})
    if holders:
        found["mode"] = [tuple(zip(holders, modes)) for modes in product((USER, PROCESS), repeat=len(holders))]
    backends = {device.backend for device in vm.devices}
    if kernel.legacy_by_iommufd is None and LEGACY in backends:
        found["legacy_by_iommufd"] = [False, True]
    if vm.viommu is None:
        found["viommu"] = [NO_VIOMMU, EACH]
    for name in _AMOUNTS:
        amount: Span = getattr(vm, name)
        if amount.least != amount.most:
            found[name] = sorted(amount, reverse=name == "limit")
    if any(device.as_it_runs for device in vm.devices):
        found["later"] = [False, True]
    if not vm.ordered and len(backends) > 1:
        found["order"] = list(permutations(sorted(backends)))
    return found


def _worlds(unknown: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """All that may be, as answers to what is not known.

    Of amounts, all at best and all at worst suffice: what is in between never fits where the best does not, nor is it
    refused earlier than the worst, or later than the best.
    """
    amounts = {name: answers for name, answers in unknown.items() if name in _AMOUNTS}
    others = {name: answers for name, answers in unknown.items() if name not in _AMOUNTS}
    for answers in product(*others.values()):
        for end in (0, -1) if amounts else (0,):
            yield {**dict(zip(others, answers)), **{name: ends[end] for name, ends in amounts.items()}}


def _settled(vm: Vm, kernel: Kernel, answers: dict[str, Any]) -> tuple[Vm, Kernel, bool]:
    """The VM and the kernel with answers to all that was not known, and whether devices pin later, too."""
    # Of each VM this is asked many times, and mostly little of it is unknown.
    if not answers:
        return vm, kernel, False
    devices = vm.devices
    if "mode" in answers:
        modes = dict(answers["mode"])
        devices = tuple(each._replace(mode=each.mode or modes.get(each.holder)) for each in devices)
    if "order" in answers:
        devices = tuple(sorted(devices, key=lambda device: answers["order"].index(device.backend)))
    amounts: dict[str, Any] = {name: exactly(answers[name]) for name in _AMOUNTS if name in answers}
    known = {name: answers[name] for name in ("capable", "viommu") if name in answers}
    if "legacy_by_iommufd" in answers:
        kernel = kernel._replace(legacy_by_iommufd=answers["legacy_by_iommufd"])
    return vm._replace(devices=devices, **amounts, **known), kernel, answers.get("later", False)


@lru_cache(maxsize=256)
def demand(vm: Vm, kernel: Kernel) -> dict[str, Span]:
    """What the VM adds to each counter, at least and at most."""
    ends = []
    for answers in _worlds(_unknown(vm, kernel)):
        known, its_kernel, later = _settled(vm, kernel, answers)
        counters = Counters()
        for name, size in _pins(known, its_kernel, later):
            counters = added(counters, Pin(way(name, its_kernel), size), bool(known.capable))
        ends.append(counters)
    return {name: Span(min(amounts), max(amounts)) for name, amounts in zip(Counters._fields, zip(*ends))}


@lru_cache(maxsize=1024)
def verdict(vm: Vm, kernel: Kernel) -> Verdict:
    """Whether the VM fits into its limit: true or false only where all that may be agrees."""
    unknown = _unknown(vm, kernel)
    outcomes = _outcomes(vm, kernel, unknown)
    certain = len({outcome.fits for outcome in outcomes}) == 1
    worst = max(outcomes, key=lambda outcome: (not outcome.fits, outcome.held + outcome.size))
    # What is not the same in all of those that end like the worst is not told.
    alike = [each for each in outcomes if each.fits is worst.fits and each.way]
    name = worst.way if len({each.way for each in alike}) == 1 else None
    counter = worst.counter if len({each.counter for each in alike}) == 1 else None
    errors = {way(each.way, kernel).error for each in alike if each.way and not worst.fits}
    checked = worst.way is not None
    return Verdict(
        fits=worst.fits if certain else None,
        question=None if certain else _question(vm, kernel, unknown),
        way=name,
        counter=counter,
        held=worst.held if checked else None,
        size=worst.size if checked else None,
        limit=worst.limit if checked else None,
        error=errors.pop() if len(errors) == 1 else None,
        enough=max(outcome.enough for outcome in outcomes),
    )


def _outcomes(vm: Vm, kernel: Kernel, unknown: dict[str, list[Any]]) -> list[_Outcome]:
    return [_outcome(*_settled(vm, kernel, answers)) for answers in _worlds(unknown)]


def _question(vm: Vm, kernel: Kernel, unknown: dict[str, list[Any]]) -> str:
    """What to ask first: what settles it alone, else what may."""

    def certain(name: str) -> list[bool]:
        """For each answer, whether it settles the matter."""
        settled = [_outcomes(vm, kernel, {**unknown, name: [answer]}) for answer in unknown[name]]
        return [len({outcome.fits for outcome in outcomes}) == 1 for outcomes in settled]

    names = [name for name in QUESTIONS if name in unknown]
    answered = {name: certain(name) for name in names}
    settling = [name for name in names if all(answered[name])]
    deciding = [name for name in names if any(answered[name])]
    return (settling or deciding or names)[0]
