# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what to change so that a VM fits. Pure functions.

Each remedy was tried on the model: with it alone, the VM fits. The least harmful comes first.
"""

from __future__ import annotations

from ..module_utils._accounting import IOMMUFD, LEGACY, NOTHING, PROCESS, UNLIMITED, USER, Span
from ._fit_case import Case, may_charge_user, settled
from ._fit_host import SESSION, SYSTEM, by_hostdev, emulator, has_contained, knows_iommufd, reckoning, session_of
from ._fit_input import NONE, THE_IOMMUFD
from ._fit_qemu import Clash
from ._fit_xml import CONTAINER, LIBVIRTS
from ._host_info import its_hard_limit

__all__ = ("remedy_of",)


def remedy_of(case: Case) -> str | None:
    """What to change so that the VM fits; None where it does, or where nothing that is known would help."""
    if case.told.fits is True and not case.refused:
        return None
    if case.clash != Clash() and case.refused == case.clash.ends:
        # Nothing helps beside it.
        cure = _one_iommufd(case)
        return f"To make it fit: {cure}." if cure else None
    if case.running is None and case.asked.locked == Span(0, UNLIMITED) and case.steps[0].locked.most:
        told = remedy_of(settled(case, locked=NOTHING))
        return told and f"{told} That is for a VM that locks no memory itself."
    if case.refused and case.starter == SYSTEM:
        return _for_the_daemon(case)
    cures = [
        cure for cure in (_limit(case), _one_iommufd(case), _no_lock(case), _mode(case), _capability(case)) if cure
    ]
    return f"To make it fit: {'; or '.join(cures)}." if cures else None


def _for_the_daemon(case: Case) -> str | None:
    """What lets libvirt start such a domain."""
    libvirt = case.info["host"].get("libvirt") or {}
    it_is = case.refused == case.limit.refused or by_hostdev(case.info, case.asked)
    if case.refused in case.needs and libvirt.get("cap_sys_resource") is False and it_is:
        lines = " and ".join(libvirt.get("drop_in") or ["CapabilityBoundingSet=CAP_SYS_RESOURCE"])
        return (
            f"To make it fit: let libvirt's daemon use CAP_SYS_RESOURCE, and restart it: by {lines} in a drop-in of"
            f" {libvirt.get('unit') or 'its unit'} where that takes it away, or by a policy module of your own where"
            " SELinux denies it."
        )
    return None


def _limit(case: Case) -> str | None:
    """A limit that is large enough, where it can be given."""
    enough = case.told.enough
    if enough >= UNLIMITED or (case.limit.span.least >= enough and not case.refused):
        return None
    next_one = ", for this VM only, since the next one takes still more" if may_charge_user(case) else ""
    if case.running is not None:
        pid = case.running["pid"]
        if case.asked.live_update:
            return f"give the process that takes it over a limit of {enough} bytes{next_one}"
        return f"raise its limit as it runs, until it ends (prlimit --pid {pid} --memlock={enough}:{enough}){next_one}"
    if case.starter == SESSION:
        return _of_the_session(case, enough) + next_one
    if case.starter != SYSTEM:
        return f"raise its limit (LimitMEMLOCK={enough} in its unit){next_one}"
    if (case.info["host"].get("libvirt") or {}).get("cap_sys_resource") is False:
        return None
    return f"raise its limit ({its_hard_limit(enough)}){next_one}"


def _of_the_session(case: Case, enough: int) -> str:
    """A session libvirt refuses <memtune>, and cannot give more than it has."""
    reckoned = reckoning(case.asked, case.asked.memory or 0, True)
    wants = max(enough, reckoned.most if reckoned else 0)
    value = "infinity" if case.asked.libvirt_locks or wants >= UNLIMITED else str(wants)
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
    joined = tuple(
        each._replace(backend=IOMMUFD, holder=first.holder, mode=first.mode) if each in can else each
        for each in devices
    )
    if settled(case, devices=joined).told.fits is not True:
        return None
    how = " (iommufd='yes' in each <hostdev>)" if first.holder == LIBVIRTS else " (one -object iommufd)"
    return f"pass all devices through by one iommufd{how if first.holder != THE_IOMMUFD else ''}"


def _no_lock(case: Case) -> str | None:
    """No memory that the VMM locks itself, where it is sure to lock some."""
    if case.running is not None or case.refused or not case.steps[0].locked.least:
        return None
    if settled(case, locked=NOTHING).told.fits is not True:
        return None
    return "have it lock no memory itself (no mem-lock=on, no <locked/>), as what a device has pinned stays anyway"


def _mode(case: Case) -> str | None:
    """Another mode of its iommufds, where somebody can set it."""
    if case.running is not None or case.refused:
        return None
    options = case.info["host"].get("options") or {}
    if options.get("rlimit_mode", {}).get("readable") is False:
        return None
    modes = {each.mode for vm in case.steps for each in vm.devices if each.backend == IOMMUFD}
    if modes - {PROCESS} and _fits_with(case, PROCESS):
        return _how_to_set(case)
    # What libvirt sets, nobody else can.
    if modes - {USER} and case.starter != SYSTEM and _fits_with(case, USER):
        return "leave its iommufd in the mode user, in which its memory counts for another counter"
    return None


def _fits_with(case: Case, mode: str) -> bool:
    devices = tuple(each._replace(mode=mode) if each.backend == IOMMUFD else each for each in case.steps[0].devices)
    return settled(case, devices=devices).told.fits is True


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
    return (
        "have it charged for itself alone, by setting rlimit_mode=process on its iommufd before its first device"
        " (iommufd-exec, or virt.iommufd.iommufd_option)"
    )


def _capability(case: Case) -> str | None:
    """CAP_IPC_LOCK, which lifts all limits but vDPA's."""
    if case.running is not None or case.refused or case.asked.accounting == NONE:
        return None
    # In another user namespace it does not count.
    if settled(case, capable=True).told.fits is not True or has_contained(case.info, case.owner):
        return None
    if case.starter not in (SYSTEM, SESSION):
        how = "AmbientCapabilities=CAP_IPC_LOCK in its unit"
        return f"give the VMM CAP_IPC_LOCK ({how}), and with it the right to pin all memory"
    path = emulator(case.info, case.asked, case.owner)
    how = f"setcap cap_ipc_lock+ep {path}" if path else "a file capability of its program"
    return f"give the VMM CAP_IPC_LOCK ({how}), and with it the right to pin all memory to whoever may execute that"
