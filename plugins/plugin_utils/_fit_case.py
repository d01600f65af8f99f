# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the VM that memlock_fit is asked about, as the model has it, and what becomes of it.

The functions are pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..module_utils._accounting import (
    EACH,
    IOMMUFD,
    LEGACY,
    NOTHING,
    UNKNOWN,
    UNLIMITED,
    USER,
    VDPA,
    Device,
    Kernel,
    Span,
    Verdict,
    Vm,
    address_spaces,
    demand,
    exactly,
    verdict,
)
from ..module_utils._errors import IommufdError
from ..module_utils._size import human_size
from ._fit_host import (
    GIB,
    OTHER,
    SESSION,
    SYSTEM,
    Accounting,
    Limit,
    accounting_of,
    candidates,
    knows_iommufd,
    limit_of,
    prerequisites,
    refusal,
    session_of,
    starter_of,
    system_user,
)
from ._fit_input import Asked, Info, Owner, owner_of
from ._fit_qemu import Clash, clash, moment
from ._fit_xml import CONTAINER, LIBVIRTS
from ._host_info import OF_EMULATOR, as_it_runs

__all__ = (
    "FILE_BACKED",
    "GROUP",
    "PAGE",
    "ROOM",
    "SHARED",
    "SIGHT",
    "STARTS",
    "WHICH",
    "Case",
    "at_best",
    "beyond_at_most",
    "doubted",
    "judge",
    "kernels",
    "may_charge_user",
    "new_vm",
    "ordered",
    "plus",
    "settled",
    "spaces",
    "user_of",
)

# The smallest and the largest page that a Linux host with iommufd has.
PAGES = (2**12, 2**16)

# What there is beside the memory and that of emulated devices: firmware, ROMs and tables, with room.
FIRMWARE = 2**28

# How many pins may be counted out for one answer, some dozen times: some seconds.
COUNTED_MAX = 2**14

_BY_MANAGER = (
    "The libvirt of user {} does not run. The limit is that of one which the user's service manager starts (systemctl"
    " --user, or virt.iommufd.iommufd_domain): one that is started from a login has the limit of the login."
)
FILE_BACKED = (
    "A live update takes Linux 6.14, QEMU 10.1 and KVM. The VM's memory must be that of a file (memory-backend-memfd or"
    " memory-backend-file, with share=on), and nothing of a device's own may be mapped (where QEMU 11"
    " does, vfio-pci with x-no-mmap=on does not): the kernel moves no other to another process."
)

# Beside those of the model, what may have to be asked: the size of a page, whether libvirt would start the domain,
# what a VM that runs holds, which iommufd a device gets, whether its control group has a limit, whether that has room
# for the emulator, and what others use of it.
PAGE = "page"
STARTS = "starts"
SIGHT = "sight"
WHICH = "which"
GROUP = "group"
ROOM = "room"
SHARED = "shared"


class Case(NamedTuple):
    """All that an answer is made of.

    `steps`: what becomes of the VM, one after the other, each as the model has it. `pins`: what it pins, in words.
    `told`: the outcome. `refused`: why it would not be started at all, else "". `needs`: what is not there that it must
    have. `running`: the row of a VM that runs already. `clash`: what its QEMU does, whatever the limit. `doubt`: what
    has to be asked, whatever the limit, before it may be told to fit. `once`: what it takes beside the emulator's own
    memory, however often it pins that.
    """

    info: Info
    asked: Asked
    owner: Owner
    starter: str | None
    limit: Limit
    accounting: Accounting
    steps: tuple[Vm, ...]
    pins: str
    told: Verdict
    refused: str
    needs: list[str]
    running: Mapping[str, Any] | None = None
    clash: Clash = Clash()
    doubt: str | None = None
    once: int = 0


def kernels(info: Info) -> tuple[Kernel, ...]:
    """The host's kernel, once for each size that its pages may have."""
    page, legacy = info["host"].get("page_bytes"), info["host"].get("legacy_by_iommufd")
    # Nothing that is asked here depends on the release.
    return tuple(Kernel(each, (0, 0), legacy) for each in ((page,) if page else PAGES))


def spaces(vm: Vm) -> int:
    """How many times it pins its memory, at most."""
    return len(address_spaces(vm._replace(viommu=vm.viommu or EACH)))


def _countable(vm: Vm, kernel: Kernel) -> bool:
    """Whether all that may be can be counted out in a moment."""
    iommufds = {each.holder for each in vm.devices if each.backend == IOMMUFD and each.mode is None}
    unknown = [vm.capable is None, vm.viommu is None, kernel.legacy_by_iommufd is None]
    unknown += [any(each.as_it_runs for each in vm.devices)]
    worlds: int = 2 ** (len(iommufds) + sum(unknown)) * (1 if vm.ordered else 6)
    return worlds * max(spaces(vm), 1) <= COUNTED_MAX


def judge(info: Info, steps: tuple[Vm, ...]) -> Verdict:
    """What becomes of a VM in these steps: the first that is refused, or may be, else the one that comes closest.

    Raises IommufdError where too little is known of too much.
    """
    if not all(_countable(vm, kernel) for vm in steps for kernel in kernels(info)):
        raise IommufdError("Too little is known of so many devices: give accounting, or devices with the mode of each.")
    each_kernel = [_in_order([verdict(vm, kernel) for vm in steps]) for kernel in kernels(info)]
    if len({told.fits for told in each_kernel}) == 1:
        return max(each_kernel, key=lambda told: told.enough)
    return max(each_kernel, key=lambda told: told.enough)._replace(fits=None, question=PAGE)


def _in_order(verdicts: list[Verdict]) -> Verdict:
    fits = [each.fits for each in verdicts]
    outcome = False if False in fits else None if None in fits else True
    likely = [each for each in verdicts if each.fits is outcome]
    chosen = likely[0] if outcome is not True else max(likely, key=lambda each: each.enough)
    return chosen._replace(enough=max(each.enough for each in verdicts))


def at_best(case: Case) -> Verdict:
    """What becomes of the VM if all amounts that are not known are as good as they may be."""
    names = ("memory", "beyond", "locked", "held_user", "held_mm_locked", "held_mm_pinned")
    best = []
    for vm in case.steps:
        least: dict[str, Any] = {name: exactly(getattr(vm, name).least) for name in names}
        best.append(vm._replace(**least, limit=exactly(vm.limit.most)))
    return judge(case.info, tuple(best))


def may_charge_user(case: Case) -> bool:
    """Whether what it pins may be charged to its user."""
    return any(
        each.backend == IOMMUFD and each.mode in (USER, None) and not vm.capable
        for vm in case.steps
        for each in vm.devices
    )


def settled(case: Case, **changes: Any) -> Case:
    """The same VM with another limit, other devices or another capability, and what becomes of that."""
    steps = tuple(vm._replace(**changes) for vm in case.steps)
    if case.running is None:
        steps = _steps(case.asked, steps[0], case.info)
    return case._replace(steps=steps, told=doubted(judge(case.info, steps), case.doubt))


def doubted(told: Verdict, question: str | None) -> Verdict:
    """The verdict where something has to be asked before it may be true."""
    # A larger <hard_limit> settles what else is open about the limit, too, if that can be told and given.
    if question == ROOM and told.fits is None and (told.enough >= UNLIMITED or told.question == "limit"):
        return told
    return told if question is None or told.fits is False else told._replace(fits=None, question=question)


def _as_libvirt_has_it(info: Info, asked: Asked) -> Asked:
    """The VM, whose devices an older libvirt has by the legacy container: it ignores an iommufd='yes'."""
    if asked.domain is None or knows_iommufd(info) is not False:
        return asked
    legacy = (each._replace(backend=LEGACY, holder=CONTAINER) for each in asked.devices)
    had = zip(asked.devices, legacy)
    return asked._replace(devices=tuple(other if each.holder == LIBVIRTS else each for each, other in had))


def new_vm(info: Info, asked: Asked, owner: Owner | None = None) -> Case:
    """A VM that is to start. `owner`: its user, where something else is charged to that than the input says."""
    asked = _as_libvirt_has_it(info, asked)
    owner = owner or user_of(info, asked)
    starter = starter_of(info, asked, owner)
    memory = _memory(asked)
    limit = limit_of(info, asked, owner, starter, memory.most if memory != UNKNOWN else 0)
    if memory == UNKNOWN and starter != OTHER and not _is_set(asked):
        limit = limit._replace(span=Span(limit.span.least, UNLIMITED), words="a limit that is not known")
    accounting = accounting_of(info, asked, owner, starter)
    vm = Vm(
        memory=memory,
        devices=_with_mode(asked.devices, accounting.mode),
        user=owner.name or "",
        limit=limit.span,
        limit_by=limit.words,
        capable=accounting.capable,
        viommu=asked.viommu,
        ordered=ordered(asked, asked.devices),
        held_user=owner.held(),
        held_mm_locked=NOTHING,
        held_mm_pinned=NOTHING,
    )
    vm, pins = _beyond(info, asked, vm)
    steps = _steps(asked, vm._replace(locked=_locked(asked, vm)), info)
    refused, needs = refusal(info, asked, starter), prerequisites(info, asked.devices)
    by_qemu = clash(candidates(info, asked), steps[0].devices, asked.viommu)
    once = _once(steps[0])
    hard = asked.domain.hard_limit if asked.domain else asked.group
    tight = hard is not None and hard < once + OF_EMULATOR
    # With CAP_IPC_LOCK it locks what it likes, which counts there all the same.
    locks = hard is not None and vm.capable and steps[0].locked.most >= UNLIMITED
    of_group = ROOM if tight else SHARED if asked.shared or (starter == SYSTEM and _in_slice(info)) else None
    doubt = STARTS if refused is None else "locked" if locks else of_group
    told = doubted(judge(info, steps), by_qemu.question or doubt)
    no_iommufd = any(each.backend == IOMMUFD for each in asked.devices) and info["host"].get("module") == "absent"
    refused = refused or limit.refused or asked.ends or ("This host's kernel has no iommufd." if no_iommufd else "")
    needs = [*needs, *([refused] if refused and refused not in needs else [])]
    refused = refused or by_qemu.ends
    needs += [FILE_BACKED] if asked.live_update else []
    needs += [_BY_MANAGER.format(owner.name)] if asked.limit is None and _is_of_manager(info, owner, starter) else []
    rest = (None, by_qemu, doubt, once)
    return Case(info, asked, owner, starter, limit, accounting, steps, pins, told, refused, needs, *rest)


def user_of(info: Info, asked: Asked) -> Owner:
    """The user that a VM runs as that is to start."""
    by_system = asked.user is None and asked.starter in (None, SYSTEM)
    return owner_of(info, system_user(info) if by_system else asked.user)


def _memory(asked: Asked) -> Span:
    """What is pinned once for each address space. Of what QEMU may map later or never, a definition tells."""
    if asked.memory is None:
        return UNKNOWN
    elastic = asked.domain.elastic if asked.domain is not None and asked.starter is not None else 0
    return Span(asked.memory - elastic, asked.memory)


def _in_slice(info: Info) -> bool:
    """Whether the system libvirt's domains share a slice whose memory is limited, as its next one then does."""
    rows = (row for row in info["processes"] if row.get("memory_max_shared") and row.get("holder") is not True)
    return any(row.get("domain_uri") == "qemu:///system" for row in rows)


def _is_set(asked: Asked) -> bool:
    """Whether libvirt's limit does not depend on the memory."""
    return asked.libvirt_locks or (asked.domain is not None and asked.domain.hard_limit is not None)


def _once(vm: Vm) -> int:
    """What it takes beside the emulator's own memory. What it locks is all of that, where it is known."""
    return max(vm.memory.most + vm.beyond.most, vm.locked.most if vm.locked.most < UNLIMITED else 0)


def _with_mode(devices: tuple[Device, ...], mode: str | None) -> tuple[Device, ...]:
    return tuple(each._replace(mode=each.mode or mode) if each.backend == IOMMUFD else each for each in devices)


def ordered(asked: Asked, devices: tuple[Device, ...]) -> bool:
    """Whether the order in which devices pin is known, or the same. It is not for vDPA, unless that is named last."""
    backends = [each.backend for each in devices]
    if VDPA not in backends or set(backends) == {VDPA}:
        return True
    return asked.domain is None and VDPA not in backends[: -backends.count(VDPA)]


def _beyond(info: Info, asked: Asked, vm: Vm) -> tuple[Vm, str]:
    """The VM with what it pins beyond its memory, each time that it pins that; and all of it in words."""
    times = max(spaces(vm), 1)
    size = human_size(vm.memory.most * times) if vm.memory != UNKNOWN else "an amount that is not known"
    most = (vm.viommu is None and times > 1) or any(each.as_it_runs for each in vm.devices)
    most |= vm.memory.least < vm.memory.most and vm.memory != UNKNOWN
    pins = f"{'up to ' if most else ''}{size}" + (
        f" ({human_size(vm.memory.most)} in each of {times} address spaces)" if times > 1 and asked.memory else ""
    )
    # What others pin proves nothing of this one, which may have other devices, except that it may be as much.
    shown = _measured(info)
    if asked.overhead is not None:
        beyond = exactly(-(-asked.overhead // times))
        pins += f" and {human_size(asked.overhead)} beyond that" if asked.overhead else ""
    elif asked.of_devices is None:
        beyond = UNKNOWN
        pins += " and what its emulated devices have of memory of their own, which is not known"
    else:
        allowed = beyond_at_most(asked.of_devices, times)
        beyond = Span(0, max(allowed, shown))
        why = "which is what libvirt allows for" if allowed * times <= GIB else "with what its emulated devices have"
        why = "as running VMs do" if shown > allowed else why
        pins += f" and up to {human_size(max(beyond.most * times, GIB))} beyond that, {why}"
    return vm._replace(
        beyond=beyond
    ), f"The VM pins {pins}." if vm.devices else "The VM has no device that pins memory."


def beyond_at_most(of_devices: int, times: int = 1) -> int:
    """What a VM pins beyond its memory in each of so many address spaces, with so much memory of emulated devices."""
    return max(GIB // times, of_devices + FIRMWARE // times if of_devices else 0)


def _measured(info: Info) -> int:
    """The most that a running VM pins beyond its memory, however much that is; 0 where no VM shows it."""
    found = []
    for row in info["processes"]:
        pinned = None
        if row.get("backends") == ["iommufd"]:
            pinned = row["pinned_bytes"]
        elif row.get("backends") == ["legacy"] and row.get("locks_memory") is False:
            pinned = row["locked_bytes"]
        # With a second address space, it may have pinned its memory a second time; an mdev pins anything up to all.
        runs = any(as_it_runs(row.get("vfio_devices") or ()))
        alone = row.get("address_spaces") == 1 and not runs
        if pinned and alone and row.get("holder") is not True and row["memory_bytes"]:
            found.append(pinned - row["memory_bytes"])
    return max(found, default=0)


def _locked(asked: Asked, vm: Vm) -> Span:
    """What the VMM locks itself, if only for a moment: all that it has is no less than its memory."""
    least, most = asked.locked
    if most in (0, UNLIMITED):
        return Span(min(least, vm.memory.least), most)
    # mlockall() compares huge pages, too, which are not in VmLck then.
    most += moment(vm.beyond.most) + (vm.memory.most if least < vm.memory.most else 0)
    return Span(least, min(most, UNLIMITED))


def _is_of_manager(info: Info, owner: Owner, starter: str | None) -> bool:
    """Whether the limit is that of a user's service manager, since no daemon of that user's libvirt runs."""
    session = session_of(info, owner) if starter == SESSION else None
    return session is not None and session.get("pid") is None


def _steps(asked: Asked, vm: Vm, info: Info) -> tuple[Vm, ...]:
    """The start; then the live update, in which the new process is charged before the old one is not any more."""
    if not asked.live_update or asked.grow is not None:
        return (vm,)
    adds = demand(vm, kernels(info)[0])[USER]
    return (vm, vm._replace(held_user=plus(vm.held_user, adds)))


def plus(one: Span, other: Span) -> Span:
    return Span(min(one.least + other.least, UNLIMITED), min(one.most + other.most, UNLIMITED))
