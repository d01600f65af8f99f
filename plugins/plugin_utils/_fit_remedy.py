# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what to change so that a VM fits. Pure functions.

Each remedy was tried on the model, or by asking again: with it alone, the VM fits. The least harmful comes first.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ..module_utils._accounting import IOMMUFD, LEGACY, NOTHING, PROCESS, UNLIMITED, USER, Device, Span, exactly
from ._fit_case import GROUP, ROOM, Case, may_charge_user, new_vm, settled
from ._fit_host import (
    OTHER,
    SESSION,
    SYSTEM,
    by_hostdev,
    candidates,
    emulator,
    has_contained,
    is_root,
    knows_iommufd,
    raised,
    reckoning,
    session_of,
)
from ._fit_input import NONE, THE_IOMMUFD
from ._fit_qemu import Clash
from ._fit_running import is_short, prlimit
from ._fit_words import question_of
from ._fit_xml import CONTAINER, LIBVIRTS
from ._host_info import OF_EMULATOR, capability_for, its_hard_limit, kib_with_room

__all__ = ("remedy_of",)


def remedy_of(case: Case) -> str | None:
    """What to change so that the VM fits; None where it does, or where nothing that is known would help."""
    if case.told.fits is True and not case.refused:
        return None
    if case.refused and case.starter == SYSTEM and case.refused != case.clash.ends:
        return _for_the_daemon(case)
    if case.refused and case.refused == case.asked.ends:
        return f"To have it started: {_for_the_launcher(case)}." if case.asked.lacks else None
    if case.clash != Clash() and case.refused == case.clash.ends:
        # Nothing helps beside it.
        cures = [_one_iommufd(case)]
    elif case.running is None and case.asked.locked == Span(0, UNLIMITED) and case.steps[0].locked.most:
        told = remedy_of(settled(case, locked=NOTHING))
        return told and f"{told} That is for a VM that locks no memory itself."
    else:
        cures = [
            _without_memtune(case),
            _limit(case),
            _one_iommufd(case),
            _no_lock(case),
            _mode(case),
            _capability(case),
        ]
    if any(cures):
        return f"To make it fit: {'; or '.join(filter(None, cures))}."
    missing = case.clash.question or case.doubt
    if missing is None or case.told.fits is not False or case.refused:
        return None
    asks = question_of(case._replace(told=case.told._replace(fits=None, question=missing)))
    return f"What would make it fit depends on this: {asks}"


def _for_the_daemon(case: Case) -> str | None:
    """What lets libvirt start such a domain."""
    libvirt = case.info["host"].get("libvirt") or {}
    it_is = case.refused == case.limit.refused or by_hostdev(case.info, case.asked)
    if case.refused not in case.needs or libvirt.get("cap_sys_resource") is not False or not it_is:
        return None
    if libvirt.get("drop_in"):
        return f"To make it fit: give {capability_for(libvirt['unit'], libvirt['drop_in'])}."
    return (
        "To make it fit: let libvirt's daemon use CAP_SYS_RESOURCE, by a restart where its unit was changed since it"
        " started, or by a policy module of your own where SELinux denies that."
    )


def _without_memtune(case: Case) -> str | None:
    """No <hard_limit>, where it is for that alone that a libvirt starts no domain."""
    domain = case.asked.domain
    if domain is None or domain.hard_limit is None or not case.refused or case.refused != case.limit.refused:
        return None
    again = new_vm(case.info, case.asked._replace(domain=domain._replace(hard_limit=None)), case.owner)
    return None if again.refused or again.told.fits is not True else "leave out its <hard_limit>"


def _limit(case: Case) -> str | None:
    """A limit that is large enough, where it can be given."""
    enough = case.told.enough
    if case.running is not None:
        return _limit_as_it_runs(case, case.running)
    if case.doubt == ROOM and case.asked.starter == OTHER:
        return _both_of_a_unit(case)
    if case.doubt == ROOM:
        # That is what it is raised for.
        case, enough = case._replace(doubt=None), max(enough, case.once)
    elif case.limit.span.least >= enough and not case.refused:
        return None
    if enough >= UNLIMITED:
        return None
    next_one = ", for this VM only, since the next one takes still more" if may_charge_user(case) else ""
    # To a domain's <hard_limit> its_hard_limit() adds what the emulator itself uses.
    wants = _wants_of_session(case) if case.starter == SESSION else enough + OF_EMULATOR * (case.starter == SYSTEM)
    limit = raised(case.info, case.asked, case.owner, case.starter, wants)
    # A daemon that may not give so much may not start the domain.
    barred = limit.refused or (case.starter == SYSTEM and limit.span.least < wants)
    if barred or case.refused not in ("", case.limit.refused):
        return None
    if settled(case, limit=limit.span).told.fits is not True:
        return None
    if case.starter == SESSION:
        return _of_the_session(case, wants) + next_one
    has_one = case.asked.domain is not None and case.asked.domain.hard_limit is not None
    how = its_hard_limit(enough) if case.starter == SYSTEM or has_one else _of_its_unit(case, enough)
    return f"raise its limit ({how}){next_one}"


def _both_of_a_unit(case: Case) -> str | None:
    """More memory for its control group, and a larger limit where that is too small, too."""
    beside = settled(case._replace(doubt=None))
    if beside.told.fits is True:
        return _room_of_unit(case.once)
    limit = _limit(beside)
    return limit and f"{_room_of_unit(case.once)}, and {limit}"


def _of_its_unit(case: Case, enough: int) -> str:
    """The limit of a unit. One of a user's service manager gets no more than that may give, without a word."""
    how, owner = f"LimitMEMLOCK={enough} in its unit", case.owner
    session = session_of(case.info, owner) or {}
    may = session.get("memlock_hard_unlimited") or (session.get("memlock_hard_bytes") or 0) >= enough
    # A daemon that runs may have the limit of a login.
    if is_root(owner) or (may and session.get("pid") is None):
        return how
    units = (row.get("user_unit") for row in case.info["processes"] if row["uid"] == owner.uid)
    its = next((f", such as {each}," for each in units if each and each.endswith(".service")), "")
    uid = "UID" if owner.uid is None else owner.uid
    return (
        f"{how}; for one{its} that {owner.name}'s own service manager starts, also in a drop-in of user@{uid}.service,"
        " which is restarted then"
    )


def _limit_as_it_runs(case: Case, row: Mapping[str, Any]) -> str | None:
    """Larger limits, of its control group and on locked memory, as far as they are too small."""
    enough = case.told.enough
    low = case.limit.span.least < enough
    room = _room(case, row) if case.doubt == ROOM or (case.doubt == GROUP and low) else ""
    raised_ = case._replace(doubt=None) if room else case
    if enough >= UNLIMITED or not (room or low) or settled(raised_, limit=exactly(enough)).told.fits is not True:
        return None
    next_one = ", for this VM only, since the next one takes still more" if may_charge_user(case) else ""
    return ", and then ".join(filter(None, [room, _as_it_runs(case, row) + next_one if low else ""]))


def _room(case: Case, row: Mapping[str, Any]) -> str:
    """How its control group gets room, which else ends a VM whose limit on locked memory is raised."""
    kib = kib_with_room(case.once)
    if case.starter != SYSTEM:
        return _room_of_unit(case.once)
    size = kib if case.once < UNLIMITED else "KIB"
    how = f"virsh memtune {shlex.quote(str(row['domain']))} --hard-limit {size} --live"
    return f"raise its <hard_limit>{', if it has one' if case.doubt == GROUP else ''} ({how})"


def _room_of_unit(once: int) -> str:
    least = kib_with_room(once)
    return f"let its control group use {least} KiB (MemoryMax= of its unit or of its slices, whichever is less)"


def _as_it_runs(case: Case, row: Mapping[str, Any]) -> str:
    enough = case.told.enough
    how = prlimit(row, enough)
    if case.asked.live_update:
        also = f", and the one that runs, too ({how})" if is_short(row, enough) else ""
        return f"give the process that takes it over a limit of {enough} bytes{also}"
    return f"raise its limit as it runs, until it ends ({how})"


def _wants_of_session(case: Case) -> int:
    """What the hard limit of a session libvirt must be, which is no less than what it reckons for the VM."""
    reckoned = reckoning(case.asked, case.asked.memory or 0, True)
    return UNLIMITED if case.asked.libvirt_locks else max(case.told.enough, reckoned.most if reckoned else 0)


def _of_the_session(case: Case, wants: int) -> str:
    """A session libvirt refuses <memtune>, and cannot give more than it has."""
    value = "infinity" if wants >= UNLIMITED else str(wants)
    session = session_of(case.info, case.owner)
    uid = case.owner.uid if case.owner.uid is not None else session and session["uid"]
    unit = f"user@{uid}.service" if uid is not None else f"user@UID.service of {case.owner.name}"
    # One that was started from a login is not ended by that.
    pid = session and session.get("pid")
    daemon = f", and end libvirt's daemon, process {pid}, if it still runs then" if pid is not None else ""
    return (
        f"raise the limit of {case.owner.name}'s service manager (LimitMEMLOCK={value} in a drop-in of {unit}, and"
        f" restart that{daemon})"
    )


def _one_iommufd(case: Case) -> str | None:
    """One address space for all devices that can share one."""
    if case.running is not None or case.refused != case.clash.ends:
        return None
    devices = case.steps[0].devices
    can = [each for each in devices if each.backend == IOMMUFD or (each.backend == LEGACY and each.holder == CONTAINER)]
    if len({(each.backend, each.holder) for each in can}) < 2 or not any(each.backend == IOMMUFD for each in can):
        return None
    first = next(each for each in can if each.backend == IOMMUFD)
    joined = tuple(each._replace(backend=IOMMUFD, holder=first.holder) if each in can else each for each in devices)
    # libvirt has the mode that it has, and sets no other.
    modes = [first.mode] if case.starter == SYSTEM else [USER, PROCESS] if _has_modes(case) else [USER]
    works = [mode for mode in modes if _fits_with(case, mode, joined)]
    if not works:
        return None
    how = " (iommufd='yes' in each <hostdev>)" if first.holder == LIBVIRTS else " (one -object iommufd)"
    in_mode = f", in the mode {works[0]}" if works != modes else ""
    return f"pass all devices through by one iommufd{how if first.holder != THE_IOMMUFD else ''}{in_mode}"


def _no_lock(case: Case) -> str | None:
    """No memory that the VMM locks itself, where it is sure to lock some."""
    if case.running is not None or case.refused or not case.steps[0].locked.least:
        return None
    if settled(case, locked=NOTHING).told.fits is not True:
        return None
    return "have it lock no memory itself (no mem-lock=on, no <locked/>), as what a device has pinned stays anyway"


def _mode(case: Case) -> str | None:
    """Another mode of its iommufds, where somebody can set it."""
    if case.running is not None or case.refused or not _has_modes(case):
        return None
    modes = {each.mode for vm in case.steps for each in vm.devices if each.backend == IOMMUFD}
    if modes - {PROCESS} and _fits_with(case, PROCESS):
        return _how_to_set(case)
    # What libvirt sets, nobody else can.
    if modes - {USER} and case.starter != SYSTEM and _fits_with(case, USER):
        return "leave its iommufd in the mode user, in which its memory counts for another counter"
    return None


def _has_modes(case: Case) -> bool:
    """Whether the kernel has the mode process, as far as that is known."""
    options = case.info["host"].get("options") or {}
    return options.get("rlimit_mode", {}).get("readable") is not False


def _fits_with(case: Case, mode: str | None, devices: tuple[Device, ...] = ()) -> bool:
    """Whether it would fit, were its iommufds in that mode, with these devices in the place of its own."""
    devices = devices or case.steps[0].devices
    having = tuple(each._replace(mode=mode) if each.backend == IOMMUFD else each for each in devices)
    return settled(case, devices=having).told.fits is True


def _how_to_set(case: Case) -> str | None:
    """How the mode process is set, by who starts the VM."""
    if case.starter == SYSTEM:
        if knows_iommufd(case.info) is not True:
            return None
        return (
            "have it charged for itself alone, which this host's libvirt does for devices with <driver name='vfio'"
            " iommufd='yes'/>"
        )
    if case.starter == SESSION:
        return "have it charged for itself alone (virt.iommufd.iommufd_domain, which needs libvirt 12.2 or later)"
    if case.asked.lacks:
        return f"have it charged for itself alone: {_for_the_launcher(case)}"
    return (
        "have it charged for itself alone, by setting rlimit_mode=process on its iommufd before its first device"
        " (iommufd-exec, or virt.iommufd.iommufd_option if another program than QEMU opens it)"
    )


def _for_the_launcher(case: Case) -> str:
    """What lets iommufd-exec do what it is asked for."""
    names = [each.upper() for each in case.asked.lacks]
    return (
        f"give iommufd-exec {' and '.join(names)} (AmbientCapabilities={' '.join(names)} in its unit, where that has"
        " User=, and no CapabilityBoundingSet= or PrivateUsers= in it that takes them away)"
    )


def _capability(case: Case) -> str | None:
    """CAP_IPC_LOCK, which lifts all limits but vDPA's."""
    if case.running is not None or case.refused or case.asked.accounting == NONE:
        return None
    # In another user namespace it does not count.
    if settled(case, capable=True).told.fits is not True or has_contained(case.info, case.owner):
        return None
    if case.starter not in (SYSTEM, SESSION):
        # Root has all that is not taken away.
        kept = "no CapabilityBoundingSet= or PrivateUsers= in its unit that takes it away"
        how = kept if is_root(case.owner) else f"AmbientCapabilities=CAP_IPC_LOCK in its system unit, and {kept}"
        return f"give the VMM CAP_IPC_LOCK ({how}), and with it the right to pin all memory"
    rows = candidates(case.info, case.asked)
    if rows and all(each["cap_ipc_lock"] for each in rows):
        # Whoever starts the VM withholds what its file gives.
        return None
    path = emulator(case.info, case.asked, case.owner)
    how = f"setcap cap_ipc_lock+ep {path}" if path else "a file capability of its program"
    return f"give the VMM CAP_IPC_LOCK ({how}), and with it the right to pin all memory to whoever may execute that"
