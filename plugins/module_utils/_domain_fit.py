# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: whether a domain that is to be started is certain not to fit into its limit.

The functions are pure. What is not known counts as whatever is best for the domain, so that none is refused on a guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ._accounting import (
    IOMMUFD,
    LEGACY,
    MM_LOCKED,
    MM_PINNED,
    NO_VIOMMU,
    NOTHING,
    PROCESS,
    USER,
    VDPA,
    WAYS,
    Device,
    Kernel,
    Verdict,
    Vm,
    address_spaces,
    exactly,
    verdict,
    way_of,
)
from ._domain_xml import CONTAINER, LIBVIRTS, Defined, reckoned_limit
from ._size import human_size

__all__ = ("Refusal", "Start", "refusal")

# What libvirt adds to a domain's memory, for what the emulator pins beside that.
_MARGIN = 2**30

_NAMES = {USER: "what its user is charged", MM_LOCKED: "VmLck", MM_PINNED: "VmPin"}
_TIMES = {1: "once", 2: "twice"}


class Start(NamedTuple):
    """What decides beside the XML, as far as it was seen.

    `mode`: of the iommufd that the domain is given. `capable`: whether the emulator will have CAP_IPC_LOCK, None if
    unknown. `pinning_vdpa`: how many of its vDPA devices are known to pin its memory. `page`: the size of a page.
    """

    mode: str
    capable: bool | None
    pinning_vdpa: int
    page: int


class Refusal(NamedTuple):
    """Why the kernel will not let the emulator pin what it must, as the rest of a sentence about the domain.

    `cures`: what would help, as sentences, beside a higher limit. `enough`: a limit that would do, None where none is
    sure to, since QEMU locks more than the domain's memory.
    """

    reason: str
    cures: tuple[str, ...]
    enough: int | None


def refusal(defined: Defined, start: Start) -> Refusal | None:
    """Why the domain will not fit; None where that is not certain."""
    vm = _at_best(defined, start)
    told = None if vm is None else _told(vm, start)
    if vm is None or told is None or told.fits is not False:
        return None
    spaces, counter = _spaces_of(vm, told.counter)
    often = sum(spaces.values())
    takes, vdpa = f"{human_size(told.enough)} at least", ""
    if any(each.backend == VDPA for each in vm.devices):
        # What is pinned after it is not compared with its counter, and QEMU's order is not known.
        takes = f"up to {human_size(told.enough)}"
        vdpa = " For a vDPA device that is checked in every mode and with every capability."
    reason = (
        f"its memory of {human_size(vm.memory.least)} counts {_TIMES.get(often, f'{often} times')} in {counter}, for"
        f" {_listed(spaces)}. That takes {takes}, and its limit on locked memory is {human_size(vm.limit.least)}.{vdpa}"
    )
    return Refusal(reason, tuple(_cures(defined, start)), None if vm.locked.most else told.enough + _MARGIN)


def _told(vm: Vm, start: Start) -> Verdict:
    return verdict(vm, Kernel(start.page, (0, 0)))


def _at_best(defined: Defined, start: Start) -> Vm | None:
    """The domain with all that is not known as good as it may be; None where nothing is known of its limit.

    libvirt gives an emulator the limit that it reckons, also where its daemon has a higher one.
    """
    limit = reckoned_limit(defined)
    if not limit:
        return None
    memory = max(defined.memory - defined.elastic, 0)
    # A device that pins as it runs does not keep the domain from starting.
    passed = [each for each in defined.devices if each.backend != VDPA and not each.as_it_runs]
    given = [each._replace(mode=start.mode) if each.holder == LIBVIRTS else each for each in passed]
    known = [each for each in given if each.backend != IOMMUFD or each.mode]
    return Vm(
        memory=exactly(memory),
        devices=(*known, *[Device(VDPA)] * start.pinning_vdpa),
        user="",
        limit=exactly(limit),
        capable=start.capable,
        beyond=NOTHING,
        locked=exactly(memory if defined.locked or defined.mem_lock else 0),
        viommu=defined.viommu or NO_VIOMMU,
        held_user=NOTHING,
        held_mm_locked=NOTHING,
        held_mm_pinned=NOTHING,
    )


def _spaces_of(vm: Vm, counter: str | None) -> tuple[Counter[str], str]:
    """What the memory counts for in a counter, in words, and the counter."""
    found: Counter[str] = Counter()
    if vm.locked.most and counter in (MM_LOCKED, None):
        found["memory that QEMU locks itself"] += 1
    for device, *_others in address_spaces(vm):
        if counter is None or counter in WAYS[way_of(device)].adds:
            found[_thing(device)] += 1
    return found, "what the kernel checks" if counter is None else _NAMES[counter]


def _thing(device: Device) -> str:
    if device.backend == IOMMUFD:
        return f"an iommufd that charges per {device.mode}"
    if device.backend == VDPA:
        return "a vDPA device"
    return "VFIO's legacy container" if device.holder == CONTAINER else "a disk by nvme://"


def _listed(things: Counter[str]) -> str:
    """The things, with how often each is there."""
    words = [thing if number == 1 else f"{thing} ({number} times)" for thing, number in things.items()]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _cures(defined: Defined, start: Start) -> Iterator[str]:
    """What to do, tried on the model."""
    by_iommufd = tuple(
        each._replace(backend=IOMMUFD, holder=LIBVIRTS) if each == Device(LEGACY, CONTAINER) else each
        for each in defined.devices
    )
    if by_iommufd != defined.devices and _may_help(defined._replace(devices=by_iommufd), start):
        yield "pass all of its PCI devices through by iommufd (without <driver iommufd='no'/>)"
    if (defined.locked or defined.mem_lock) and _may_help(defined._replace(locked=False, mem_lock=False), start):
        yield "have QEMU lock no memory itself (no mem-lock=on, no <locked/>)"
    if start.mode == PROCESS and _may_help(defined, start._replace(mode=USER)):
        yield "start it with rlimit_mode=user"


def _may_help(defined: Defined, start: Start) -> bool:
    vm = _at_best(defined, start)
    return vm is not None and _told(vm, start).fits is not False
