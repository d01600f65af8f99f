# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a VM that runs and is to grow, or to be taken over by another process. Pure functions."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from os.path import basename
from typing import Any, NamedTuple

from ..module_utils._accounting import (
    EACH,
    IOMMUFD,
    LEGACY,
    NO_VIOMMU,
    NOTHING,
    PROCESS,
    UNKNOWN,
    UNLIMITED,
    USER,
    VDPA,
    Device,
    Span,
    Verdict,
    Vm,
    demand,
    exactly,
)
from ..module_utils._errors import IommufdError
from ..module_utils._size import human_size
from ._audit_words import OVER_LIMIT
from ._fit_case import (
    FILE_BACKED,
    GROUP,
    ROOM,
    SHARED,
    SIGHT,
    WHICH,
    Case,
    beyond_at_most,
    doubted,
    judge,
    kernels,
    may_charge_user,
    ordered,
    plus,
    spaces,
)
from ._fit_host import GIB, OTHER, SYSTEM, Accounting, Limit, capability_of, own_charge, prerequisites
from ._fit_input import NEW, OF_IOMMUFD, THE_IOMMUFD, Asked, Growth, Info, owner_of
from ._fit_qemu import MOMENT, QEMU, Clash, clash, moment
from ._fit_xml import CONTAINER
from ._host_info import OF_EMULATOR, as_it_runs

__all__ = ("Beside", "held_to_their_users", "is_short", "over_limit_then", "prlimit", "running_vm")

# Machines that have no IOMMU by themselves, as QEMU has them: those of POWER and s390x have one.
_WITHOUT_IOMMU = ("x86_64", "i386", "i686", "aarch64", "arm", "armv7l", "riscv64", "loongarch64")
_ITSELF = (
    "Others of the same user may turn on devices with memory of their own. This VM then ends when its guest reboots,"
    " unless it has a limit of {} bytes."
)
# How many VMs a sentence names.
NAMED_MAX = 5


def is_short(row: Mapping[str, Any], enough: int) -> bool:
    """Whether a process that runs has too small a limit."""
    return not row["memlock_unlimited"] and row["memlock_bytes"] < enough


def prlimit(row: Mapping[str, Any], enough: int) -> str:
    """The command that gives it one that is enough. A hard limit that is high enough is left as it is."""
    roomy = row.get("memlock_hard_unlimited") or (row.get("memlock_hard_bytes") or 0) >= enough
    return f"prlimit --pid {row['pid']} --memlock={enough}:{'' if roomy else enough}"


# More than what the firmware and the ROMs of a VM have for themselves, so that no device's memory is taken for theirs.
FIRMWARE_MAX = 2**24


def _find(info: Info, name: str) -> Mapping[str, Any]:
    """The VM that runs, by its domain, its name, its unit or its process id."""
    rows = [row for row in info["processes"] if row.get("holder") is not True]
    for known in ("domain", "unit", "name", "pid"):
        found = [row for row in rows if row.get(known) is not None and str(row[known]) == name]
        if len(found) == 1:
            return dict(found[0])
        if found:
            pids = ", ".join(str(row["pid"]) for row in found[:5])
            raise IommufdError(f"grow: {len(found)} VMs are called {name!r:.60} (pids {pids}): give the pid of one.")
    raise IommufdError(
        f"grow: no VM that runs is called {name!r:.60}: give its domain, its unit, its name or its pid. A VM without"
        " a device may not be seen: ask about it as a new VM, by memory and memlock."
    )


def running_vm(info: Info, asked: Asked, grow: Growth, row: Mapping[str, Any] | None = None) -> Case:
    """What becomes of a VM that runs. `row`: what the input tells of it, where it was looked up already."""
    row = row or _find(info, grow.vm)
    owner = owner_of(info, row["uid"])
    starter = SYSTEM if row.get("domain_uri") == "qemu:///system" else OTHER
    limit = _its_limit(asked, row, starter)
    held = _held(row, _holders(info))
    held, off = (None, ()) if held is None else _turned_off(asked, row, held)
    memory = asked.memory if asked.memory is not None else _memory(row, held or ())
    if asked.viommu is None and _has_no_iommu(info, row, held or ()):
        asked = asked._replace(viommu=NO_VIOMMU)
    vm = Vm(
        memory=NOTHING,
        devices=held or (),
        user=owner.name or "",
        limit=limit.span,
        limit_by=limit.words,
        capable=capability_of(row),
        beyond=NOTHING,
        locked=NOTHING,
        viommu=NO_VIOMMU,
        ordered=ordered(asked, held or ()),
        held_user=owner.held(),
        held_mm_locked=exactly(row["locked_bytes"]),
        held_mm_pinned=exactly(row["pinned_bytes"]),
    )
    steps: list[Vm] = []
    pins: list[str] = []
    unsure = None
    by_qemu = Clash()
    if asked.live_update:
        steps.append(_taken_over(asked, row, vm, memory))
        pins.append(f"The process that takes {_name(row)} over pins what it has anew, once for each address space.")
    if grow.memory:
        steps += _with_memory(asked, row, vm, grow.memory)
        pins.append(f"{_name(row)} gets {human_size(grow.memory)}, {_where(len(vm.devices))}.")
        pins += ["It locks its memory, and for a moment twice what it gets."] if steps[-1].locked.least else []
        vm = _after(vm, steps[-1], info)
    if grow.devices:
        gets, unsure = _with_devices(asked, grow, row, vm, memory)
        steps.append(gets)
        by_qemu = _clash(info, asked, grow, row, vm.devices)
        what = f"{len(grow.devices)} devices" if len(grow.devices) > 1 else "a device"
        pins.append(f"{_name(row)} gets {what}, for which it pins its memory {_times(spaces(gets))}.")
    takes = bool(grow.memory or asked.live_update or (steps and steps[-1].devices))
    if takes and off:
        steps.append(_once_turned_on(asked, grow, row, _after(steps[-1], steps[-1], info), held or (), off))
        pins.append("Its vDPA device may have pinned nothing so far, and pins all memory once its guest turns it on.")
    if not steps:
        raise IommufdError("grow: what is it to get? Give memory or devices, or live_update.")
    told = judge(info, tuple(steps))
    size = asked.memory or row["memory_bytes"]
    hidden = (
        grow.memory and size and _may_have_more(row, vm.devices, size + (asked.overhead or 0), _its_own(asked, row))
    )
    # Of what its devices have nothing is known until that is said, too.
    beyond = asked.overhead is None and row.get("of_devices_bytes") is None
    if hidden and not beyond and asked.memory is not None and told.fits is not False and not _is_free(told, limit):
        raise IommufdError(
            f"memory: {_name(row)} has more pinned than {human_size(asked.memory)} explain, in the address spaces that"
            " were seen: give all memory that it has now, with what was plugged, and overhead, if it pins much beside."
        )
    once = plus(_next_space(asked, row, vm.devices, memory), exactly(grow.memory)).most
    # What is pinned already is in its control group.
    doubt = SIGHT if held is None else "memory" if hidden and not _is_free(told, limit) else by_qemu.question
    doubt = doubt or (_doubted_group(row, starter, once) if takes else None)
    doubt = "beyond" if doubt == "memory" and beyond else doubt
    if held is None:
        told = told._replace(fits=None, question=SIGHT, counter=None, way=None)
    elif unsure and told.fits is not True:
        told = told._replace(fits=None, question=unsure)
    # Whether it has room does not settle what its limit on locked memory leaves open.
    told = told if told.fits is None and doubt in (GROUP, ROOM, SHARED) else doubted(told, doubt)
    accounting = Accounting(None, vm.capable, f"{_name(row)} runs as {owner.name}, as process {row['pid']}.")
    needs = prerequisites(info, grow.devices)
    if asked.live_update:
        needs = [*needs, FILE_BACKED]
        if limit.span.least >= told.enough and is_short(row, told.enough):
            how = prlimit(row, told.enough)
            needs.append(f"The process that runs needs a limit of {told.enough} bytes, too ({how}).")
    said = " ".join(pins)
    rest = (said, told, by_qemu.ends, needs, row, by_qemu, doubt, once)
    return Case(info, asked, owner, starter, limit, accounting, tuple(steps), *rest)


def _taken_over(asked: Asked, row: Mapping[str, Any], vm: Vm, memory: int | None) -> Vm:
    """The new process of a live update, which is charged before the old one is not any more."""
    size = _one_space(asked, row, vm.devices, memory)
    # What the old one has locked may be pinned, too.
    all_ = Span(min(size.least, row["locked_bytes"]), max(size.most, row["locked_bytes"]))
    locked = _locks(asked, row, all_, moment(size.most - min(memory or 0, size.most)))
    return vm._replace(memory=size, locked=locked, held_mm_locked=NOTHING, held_mm_pinned=NOTHING)


def _with_memory(asked: Asked, row: Mapping[str, Any], vm: Vm, memory: int) -> list[Vm]:
    """What becomes of it: a QEMU that locks its memory locks the new twice, before it has that pinned."""
    come = _to_come(asked, row, vm.devices, _memory(row, vm.devices) if asked.memory is None else asked.memory)
    # What settles it is asked for.
    size, beyond = (exactly(memory), come) if asked.overhead is None else (plus(exactly(memory), come), NOTHING)
    plugged = vm._replace(memory=size, beyond=beyond, locked=_locks(asked, row, exactly(memory)))
    # As a multiple of its pages, of which huge ones have up to 1 GiB.
    twice = vm._replace(devices=(), locked=_locks(asked, row, exactly(2 * memory), GIB))
    return [twice, plugged] if twice.locked.most else [plugged]


def _with_devices(
    asked: Asked, grow: Growth, row: Mapping[str, Any], vm: Vm, memory: int | None
) -> tuple[Vm, str | None]:
    """The VM that gets devices, and what is to be asked where what it pins for them is a guess."""
    new, viommu, unsure = _new_spaces(asked, grow, row, vm.devices)
    total, beyond = plus(_next_space(asked, row, vm.devices, memory), exactly(grow.memory)), NOTHING
    times = spaces(vm._replace(devices=new, viommu=viommu))
    if times and not grow.memory:
        # What comes in the address spaces that it has is counted with the new.
        come = _to_come(asked, row, vm.devices, memory)
        total = plus(total, Span(*(-(-each * len(vm.devices) // times) for each in come)))
    if asked.overhead is None and memory is not None:
        # So it is asked for, where it decides.
        known = memory + grow.memory
        total, beyond = exactly(known), Span(total.least - known, total.most - known)
    gets = vm._replace(devices=new, memory=total, beyond=beyond, viommu=viommu, ordered=ordered(asked, new))
    return gets._replace(locked=_locks(asked, row, NOTHING)), unsure


def _once_turned_on(
    asked: Asked, grow: Growth, row: Mapping[str, Any], vm: Vm, held: tuple[Device, ...], off: tuple[Device, ...]
) -> Vm:
    """The VM whose guest turns on vDPA devices. `held`: what has pinned before it got anything."""
    memory = asked.memory if asked.memory is not None else _memory(row, held)
    total, beyond = plus(_next_space(asked, row, held, memory), exactly(grow.memory)), NOTHING
    if asked.overhead is None and memory is not None:
        known = memory + grow.memory
        total, beyond = exactly(known), Span(total.least - known, total.most - known)
    return vm._replace(devices=off, memory=total, beyond=beyond, locked=NOTHING, ordered=True)


def _clash(info: Info, asked: Asked, grow: Growth, row: Mapping[str, Any], held: tuple[Device, ...]) -> Clash:
    """What its QEMU does about devices of another backend than those that it has."""
    there = {each.backend for each in held}
    if {IOMMUFD, LEGACY} <= there:
        # It runs with both.
        return Clash()
    emulators = [each for each in info["host"].get("qemu") or () if each["path"] == row.get("emulator")]
    iommufds = len(_distinct(row))
    devices = (*(each._replace(holder=CONTAINER) if each.backend == LEGACY else each for each in held), *grow.devices)
    told = clash(emulators, devices, asked.viommu or _seen_viommu(row, held, iommufds))
    # The container that is there may be that of a disk by nvme://, which QEMU keeps apart.
    return Clash(question=QEMU) if told.ends and LEGACY in there else told


def _where(times: int) -> str:
    if times > 1:
        return f"in each of {times} address spaces"
    return "in its address space" if times else "which nothing pins"


def _name(row: Mapping[str, Any]) -> str:
    return str(row.get("domain") or row.get("name") or row.get("unit") or row["comm"])


def _locks(asked: Asked, row: Mapping[str, Any], size: Span, more: int = MOMENT) -> Span:
    """What a VM that runs locks itself of such an amount of memory, and more for a moment: all or nothing."""
    locks = row.get("locks_memory")
    if locks is None and row["locked_bytes"] == 0:
        # mlockall() counts all that a process has mapped, at once.
        locks = False
    if asked.locked.least or not asked.locked.most:
        locks = asked.locked.least > 0
    most = min(size.most + more, UNLIMITED)
    return Span(0, most) if locks is None else Span(size.least, most) if locks else NOTHING


def _its_limit(asked: Asked, row: Mapping[str, Any], starter: str) -> Limit:
    """The limit of a VM that runs. libvirt raises that of its domains when they get memory or a device."""
    if asked.limit is not None:
        words = "no limit" if asked.limit == UNLIMITED else f"a limit of {human_size(asked.limit)}"
        return Limit(exactly(asked.limit), words)
    if row["memlock_unlimited"]:
        return Limit(exactly(UNLIMITED), "no limit")
    now = row["memlock_bytes"]
    if starter == SYSTEM and not asked.live_update:
        # It has either a <hard_limit>, which stays, or what libvirt reckons anew for the devices that it sees.
        return Limit(Span(now, UNLIMITED), f"its limit of {human_size(now)}, which libvirt may raise")
    return Limit(exactly(now), f"its limit of {human_size(now)}")


def _holders(info: Info) -> set[int]:
    """The processes that have what VMs have, and are none."""
    return {each["pid"] for each in info["processes"] if each.get("holder") is True}


def _held(row: Mapping[str, Any], holders: Container[int]) -> tuple[Device, ...] | None:
    """A device for each address space of a process, None where they were not seen."""
    iommufds, legacy, vdpa = (row.get(name) for name in ("iommufds", "legacy_containers", "vdpa_devices"))
    if iommufds is None or legacy is None or vdpa is None:
        return None
    # Whether two are the same is not always known.
    if any(len(rows) > 1 and any(each.get("shared_with") is None for each in rows) for rows in (iommufds, legacy)):
        return None
    # Of those in what several VMs have, some are another's.
    if any(pid not in holders for each in (*iommufds, *legacy) for pid in each.get("shared_with") or ()):
        return None
    # There may be more address spaces than were found.
    if any(each.get("truncated") for each in iommufds):
        return None
    # Which device is in which of them is not known.
    runs = any(as_it_runs(row.get("vfio_devices") or ()))
    found = [
        Device(IOMMUFD, f"{each['fd']} {ioas['ioas_id']}", each["rlimit_mode"], runs)
        for each in iommufds
        if each.get("same_as") is None
        for ioas in each["ioases"]
    ]
    found += [Device(LEGACY, f"container {each['fd']}", None, runs) for each in legacy if each.get("same_as") is None]
    return (*found, *(Device(VDPA) for _each in vdpa))


def _turned_off(
    asked: Asked, row: Mapping[str, Any], held: tuple[Device, ...]
) -> tuple[tuple[Device, ...], tuple[Device, ...]]:
    """The devices that have pinned, and those of vDPA that may not have, as many as VmPin allows for.

    QEMU 10 pins for one when the guest's driver turns it on, and unpins when that resets it.
    """
    rest = tuple(each for each in held if each.backend != VDPA)
    vdpa, spaces = len(held) - len(rest), sum(each.backend == IOMMUFD for each in rest)
    on = 0
    # An mdev may have pinned anything.
    if vdpa and not any(each.as_it_runs for each in rest):
        size = _size_of_one(asked, row, rest)
        pinned = row["pinned_bytes"]
        may_be = (each for each in range(vdpa + 1) if _is_within(pinned, size, spaces + each))
        on = next(may_be, 0)
    return rest + (Device(VDPA),) * on, (Device(VDPA, as_it_runs=True),) * (vdpa - on)


def _is_within(pinned: int, size: Span, spaces: int) -> bool:
    """Whether so much may be what is pinned in so many address spaces."""
    return size.least * spaces <= pinned <= size.most * spaces


def _size_of_one(asked: Asked, row: Mapping[str, Any], rest: tuple[Device, ...]) -> Span:
    """What a process has pinned in one address space, by VmLck or by its memory."""
    locked = sum(each.backend == LEGACY or each.mode == PROCESS for each in rest)
    # With CAP_IPC_LOCK, an iommufd leaves that alone.
    if locked and row["locked_bytes"] and row.get("locks_memory") is False:
        size = row["locked_bytes"] // locked
        # They may differ in what lies between devices.
        return Span(size - size // 8, size + size // 8)
    memory, own = asked.memory or row["memory_bytes"] or 0, row.get("of_devices_bytes")
    if not memory or (asked.memory is None and row["memory_pluggable"] is not False):
        return Span(memory, UNLIMITED)
    beyond = asked.overhead if asked.overhead is not None else GIB if own is None else own + FIRMWARE_MAX
    return Span(memory, memory + beyond)


def _memory(row: Mapping[str, Any], held: tuple[Device, ...]) -> int | None:
    """Its memory by its command line; None where it may have another one by now, and no address space shows that."""
    memory: int | None = row["memory_bytes"]
    if memory is None or row["memory_pluggable"] is False:
        return memory
    # An mdev has not pinned all.
    shows = bool(held) and not any(each.as_it_runs for each in held)
    return memory if shows and any(pinned >= memory * spaces for pinned, spaces in _counted(row, held)) else None


def _one_space(asked: Asked, row: Mapping[str, Any], held: tuple[Device, ...], memory: int | None) -> Span:
    """What a process has pinned in one address space."""
    if held and all(each.backend == IOMMUFD and not each.as_it_runs for each in held):
        return exactly(row["pinned_bytes"] // len(held))
    return _next_space(asked, row, held, memory)


def _next_space(asked: Asked, row: Mapping[str, Any], held: tuple[Device, ...], memory: int | None) -> Span:
    """What a process pins in one more address space: no less than in those that it has, which show what was plugged."""
    if memory is None:
        return UNKNOWN
    own = row.get("of_devices_bytes")
    most = UNLIMITED if own is None else memory + beyond_at_most(own)
    told = Span(memory, most) if asked.overhead is None else exactly(memory + asked.overhead)
    seen = _seen(row, held)
    later = plus(exactly(seen), _to_come(asked, row, held, memory))
    if _may_have_more(row, held, memory, _its_own(asked, row)):
        return Span(told.least, max(told.most, seen))
    by_iommufd = {each.backend for each in held} == {IOMMUFD}
    if by_iommufd and seen >= memory and asked.overhead is None:
        return later
    # What it was started with may be gone since.
    less = by_iommufd and len(held) == 1 and seen < memory and asked.memory is None and not held[0].as_it_runs
    return Span(seen if less else max(told.least, seen), max(told.most, later.most))


def _to_come(asked: Asked | None, row: Mapping[str, Any], held: tuple[Device, ...], memory: int | None) -> Span:
    """What the guest may have pinned in each address space yet, by turning on devices with memory of their own.

    `asked`: what is told of this VM, None for another one.
    """
    own, told = row.get("of_devices_bytes"), asked and asked.overhead
    most: int = min((each for each in (own, told) if each is not None), default=UNLIMITED)
    if memory is None or ((asked is None or asked.memory is None) and row["memory_pluggable"] is not False):
        # What is pinned may be what was plugged.
        return Span(0, most)
    beyond = _seen(row, held) - memory
    if told is not None:
        return exactly(max(min(most, told - beyond), 0))
    return NOTHING if beyond >= max(most, FIRMWARE_MAX) else Span(0, most)


def _its_own(asked: Asked, row: Mapping[str, Any]) -> int:
    """What may explain what it has pinned beside memory that was told: its devices' own."""
    return 0 if asked.memory is None or asked.overhead is not None else row.get("of_devices_bytes") or 0


def _seen(row: Mapping[str, Any], held: tuple[Device, ...]) -> int:
    """What is pinned in one address space."""
    return max((amount // spaces for amount, spaces in _counted(row, held)), default=0)


def _counted(row: Mapping[str, Any], held: tuple[Device, ...]) -> list[tuple[int, int]]:
    """What VmPin and VmLck hold, and for how many address spaces."""
    pinned = sum(each.backend in (IOMMUFD, VDPA) for each in held)
    locked = sum(each.backend == LEGACY or (each.backend == IOMMUFD and each.mode != USER) for each in held)
    # What a process locks itself may be anything.
    found = [(row["pinned_bytes"], pinned), (row["locked_bytes"], locked if row.get("locks_memory") is False else 0)]
    return [each for each in found if each[1]]


def _is_free(told: Verdict, limit: Limit) -> bool:
    """Whether there is no limit to reach."""
    return told.limit is None or limit.span.least >= UNLIMITED


def _doubted_group(row: Mapping[str, Any], starter: str, once: int) -> str | None:
    """What has to be asked of its control group, which ends it where it takes more than that may."""
    most = row.get("memory_max_bytes")
    if most is None:
        # For libvirt that is <hard_limit>, which many domains have.
        return None if row.get("memory_max_unlimited") or starter != SYSTEM else GROUP
    if once >= UNLIMITED:
        return "memory"
    return ROOM if most < once + OF_EMULATOR else SHARED if row.get("memory_max_shared") else None


def _may_have_more(row: Mapping[str, Any], held: tuple[Device, ...], memory: int, own: int = 0) -> bool:
    """Whether so much is pinned that memory was plugged, or that there is an address space that was not found.

    `own`: what devices may have of memory of their own in each.
    """
    return any(amount >= memory * (spaces + 1) + own * spaces for amount, spaces in _counted(row, held))


def _after(vm: Vm, gets: Vm, info: Info) -> Vm:
    """The VM with what its counters hold once it has got memory."""
    adds = demand(gets, kernels(info)[0])
    names = ("user", "mm_locked", "mm_pinned")
    held: dict[str, Any] = {f"held_{name}": plus(getattr(vm, f"held_{name}"), adds[name]) for name in names}
    return vm._replace(**held)


def _times(number: int) -> str:
    return "no further time" if not number else "once more" if number == 1 else f"{number} times more"


def _new_spaces(
    asked: Asked, grow: Growth, row: Mapping[str, Any], held: tuple[Device, ...]
) -> tuple[tuple[Device, ...], str | None, str | None]:
    """The new devices that make an address space, the vIOMMU that they are behind, and what is to be asked of that."""
    iommufds = _distinct(row)
    viommu = asked.viommu or _seen_viommu(row, held, len(iommufds))
    new: list[Device] = []
    unsure = None
    for device in grow.devices:
        may_be = _its_iommufds(row, device) if device.backend == IOMMUFD else ()
        # Whether it joins an address space that is there, which may depend on the iommufd that it gets.
        joins = {bool(each and each["ioases"]) for each in may_be}
        joins = {any(each.backend == LEGACY for each in held)} if device.holder == CONTAINER else joins or {False}
        modes: set[str | None] = {each["rlimit_mode"] if each else None for each in may_be}
        alike = len(modes) < 2 or device.mode is not None
        unsure = unsure or (None if alike and (len(joins) == 1 or viommu == EACH) else WHICH)
        if joins == {True} and viommu not in (EACH, None):
            continue
        unsure = unsure or ("viommu" if True in joins and viommu is None else None)
        new.append(device._replace(mode=device.mode or (next(iter(modes)) if len(modes) == 1 else None)))
    # At worst, each has an address space of its own.
    return tuple(new), viommu or EACH, unsure or ("viommu" if viommu is None and len(new) > 1 else None)


def _distinct(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in row["iommufds"] or () if each.get("same_as") is None]


def _its_iommufds(row: Mapping[str, Any], device: Device) -> Sequence[Mapping[str, Any] | None]:
    """Those of a VM's iommufds that a device may get; None is one that QEMU has not opened so far."""
    named = _so_named(row, device.holder)
    modes = (device.mode, None)
    return [each for each in named if not each or not device.mode or each["rlimit_mode"] in modes] or named


def _so_named(row: Mapping[str, Any], holder: str) -> Sequence[Mapping[str, Any] | None]:
    """The same, by the name alone."""
    iommufds, objects = _distinct(row), row.get("iommufd_objects")
    name = holder.removeprefix(OF_IOMMUFD)
    if not iommufds or name == NEW:
        return [None]
    # No id is a number, and one may be open twice.
    first = [
        each["fd"] if each.get("same_as") is None else each["same_as"]
        for each in row["iommufds"]
        if name == str(each["fd"])
    ]
    by_fd = [each for each in iommufds if each["fd"] in first]
    if by_fd:
        return by_fd
    if objects is None:
        return [*iommufds, None]
    fds = {each["fd"]: each["id"] for each in objects if each["fd"] is not None}
    unnamed = [each for each in iommufds if each["fd"] not in fds]
    waiting = [each["id"] for each in objects if each["fd"] is None]
    # Those that QEMU opens itself are open once they have a device.
    closed: list[None] = [None] if len(waiting) > len(unnamed) else []
    if holder == THE_IOMMUFD:
        return [*iommufds, *closed]
    its = [each for each in iommufds if fds.get(each["fd"]) == name]
    if its:
        return its
    if name in waiting:
        return [*unnamed, *closed] if unnamed else [None]
    # It is none of the command line's, but may have been added since.
    return [*unnamed, None] if len(unnamed) > len(waiting) else [None]


def _has_no_iommu(info: Info, row: Mapping[str, Any], held: tuple[Device, ...]) -> bool:
    """Whether its command line gives it no IOMMU, and its machine has none of its own accord."""
    program = basename(row.get("emulator") or "")
    machine = program.rpartition("qemu-system-")[2] if "qemu-system-" in program else info["host"].get("machine")
    more = sum(each.backend == IOMMUFD for each in held) > len(_distinct(row))
    return row.get("viommu") == NO_VIOMMU and machine in _WITHOUT_IOMMU and not more


def _seen_viommu(row: Mapping[str, Any], held: tuple[Device, ...], iommufds: int) -> str | None:
    """What the address spaces of a VM that runs tell of an IOMMU of its own.

    None where they tell nothing, and where by its command line its devices may differ in that.
    """
    by_command_line = row.get("viommu")
    shared = sum(each.backend == IOMMUFD for each in held)
    if shared > iommufds and by_command_line is not None:
        return EACH
    devices = sum(each.get("backend") == IOMMUFD for each in row["vfio_devices"])
    return NO_VIOMMU if devices > shared >= 1 and by_command_line == NO_VIOMMU else None


class Beside(NamedTuple):
    """A VM that runs, and is or may be charged to its user's sum as it maps memory. `yet`: what it may add to that."""

    row: Mapping[str, Any]
    yet: int


def held_to_their_users(info: Info) -> dict[int | None, list[Beside]]:
    """The VMs that are so charged, by their user."""
    holders = _holders(info)
    found: dict[int | None, list[Beside]] = {}
    for row in info["processes"]:
        backends = row.get("backends")
        by_iommufd = "memlock_bytes" in row and (backends is None or IOMMUFD in backends)
        if by_iommufd and any(own_charge(row)):
            found.setdefault(row["uid"], []).append(Beside(row, _yet_to_charge(row, holders)))
    return found


def over_limit_then(case: Case, running: Iterable[Beside], pid: int | None = None) -> list[str]:
    """Which other VMs of its user are over their limit by what the VM adds to the user's sum, in sentences.

    QEMU maps some of a guest's memory anew as that reboots, and ends where the kernel refuses that. `running`: those
    of its user. `pid`: of the VM that is started anew.
    """
    if case.refused or case.told.fits is False or not may_charge_user(case):
        return []
    own = pid if case.running is None else case.running["pid"]
    held = case.owner.held()
    least, most = held
    # A new process of a live update is charged for a moment only.
    new = case.asked.live_update and case.running is not None
    for vm in case.steps[1 if new else 0 : 1 if case.running is None else None]:
        adds = [demand(vm, kernel)[USER] for kernel in kernels(case.info)]
        least, most = least + min(each.least for each in adds), most + max(each.most for each in adds)
    running = [each for each in running if each.row["pid"] != own]
    # Any of them may turn on more, which counts for all.
    later = most + sum(each.yet for each in running)
    limited = [each.row for each in running if each.row["memlock_bytes"] is not None]
    others = [row for row in limited if held.least <= row["memlock_bytes"] < later]
    certain = [row["memlock_bytes"] < least and own_charge(row)[0] > 0 for row in others]
    sure, unsure = ([row for row, is_ in zip(others, certain) if is_ is wanted] for wanted in (True, False))
    if most >= UNLIMITED:
        # Where so little is known, that is asked about.
        later, unsure = later - most + least, []
    said = f"{OVER_LIMIT.capitalize()} then"
    told = [*_over_limit(said, sure, later), *_over_limit(f"Perhaps {said.lower()}", unsure, later)]
    return [*told, _ITSELF.format(later)] if most < later and case.limit.span.least < later else told


def _yet_to_charge(row: Mapping[str, Any], holders: Container[int]) -> int:
    """What a VM that runs may add to its user's sum yet, by turning on devices with memory of their own."""
    if not row.get("of_devices_bytes"):
        return 0
    held = _held(row, holders) or ()
    spaces = sum(each.backend == IOMMUFD and each.mode != PROCESS for each in held)
    return max(spaces, 1) * _to_come(None, row, held, row["memory_bytes"]).most


def _over_limit(said: str, rows: list[Mapping[str, Any]], enough: int) -> list[str]:
    if not rows:
        return []
    names = ", ".join(f"{_name(row)} ({row['pid']})" for row in rows[:NAMED_MAX])
    names += f" and {len(rows) - NAMED_MAX} more" if rows[NAMED_MAX:] else ""
    return [
        f"{said}, by the sum of the same user: {names}. Such a VM ends when its guest reboots, or turns on a device"
        f" with memory of its own, as QEMU maps memory then: first give it a limit of {enough} bytes"
        f" ({prlimit(rows[0], enough)})."
    ]
