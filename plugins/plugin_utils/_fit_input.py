# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what memlock_fit is given, checked. Pure functions.

They raise IommufdError with the text that a user reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ansible.module_utils.parsing.convert_bool import boolean

from ..module_utils._accounting import (
    EACH,
    IOMMUFD,
    LEGACY,
    NESTED,
    NO_VIOMMU,
    NOTHING,
    PROCESS,
    UNLIMITED,
    USER,
    VDPA,
    Device,
    Span,
    exactly,
)
from ..module_utils._errors import IommufdError
from ..module_utils._qemu import RAM_UNIT
from ..module_utils._size import parse_size, whole
from ._fit_xml import CONTAINER, DEVICES_MAX, IOMMUFDS_MAX, Defined, parse_domain
from ._host_info import UNSEEN

__all__ = (
    "AUTO",
    "EVERYTHING",
    "NEW",
    "NONE",
    "OF_IOMMUFD",
    "THE_IOMMUFD",
    "Asked",
    "Growth",
    "Info",
    "Owner",
    "asked_of",
    "bounded",
    "checked",
    "owner_of",
)

Info = Mapping[str, Any]

AUTO = "auto"
NONE = "none"
ACCOUNTINGS = (AUTO, USER, PROCESS, NONE)
BACKENDS = ("iommufd", "legacy", "vdpa", "nvme", "mdev")

# All that a VMM has mapped, as an amount that it locks.
EVERYTHING = Span(UNLIMITED, UNLIMITED)

# What devices are in that name no other.
THE_IOMMUFD = "the VM's iommufd"
# What others are called in, before their name, and the name of one that no VM has so far.
OF_IOMMUFD = "iommufd "
NEW = "new"

# What the result of a task says where it has nothing to say of the host.
TROUBLES = ("unreachable", "failed", "skipped")


class Owner(NamedTuple):
    """The user that the VMM will run as, and what is charged to it under per-user accounting.

    `uid` is None for a name that the input does not know, which may be that of any user who is charged. `name` is None
    where the user itself is not known. `unsure` may be charged too. `hidden`: there may be more, since there may be
    processes that were not seen. `partly`: it may have VMs that were not seen, or not whole. `left_behind`: it may be
    charged for VMs that have ended.
    """

    name: str | None
    uid: int | None
    charged: int
    unsure: int
    hidden: bool
    partly: bool
    left_behind: bool = False

    def held(self) -> Span:
        """What the user's counter holds."""
        return Span(self.charged, UNLIMITED if self.hidden or self.left_behind else self.charged + self.unsure)


class Growth(NamedTuple):
    """A VM that runs, by one of its names, and what it is to get."""

    vm: str
    memory: int
    devices: tuple[Device, ...]


class Asked(NamedTuple):
    """The VM that is asked about, as the task or its XML tells it. None, or a Span, is what neither tells.

    `memory` in bytes. `limit`: its RLIMIT_MEMLOCK, None for what libvirt gives it. `libvirt_locks`: <locked/>.
    `locked`: what the VMM locks itself, and `told_of_locks`: whether that was told. `overhead`: what it pins beyond its
    memory, in all. `counted`: how many times libvirt counts the memory, None for a reckoning of its own. `domain`: the
    XML. `grow`: the VM that this is about, if it runs already. `live_update`: whether that, or this one once it runs,
    is to be taken over by another process. `capable`: whether the VMM has CAP_IPC_LOCK. Of a VM that is defined on the
    host, which memlock_forecast asks about, `starter` is who starts it, and `emulator` the path of a unit's VMM.
    `of_devices`: what emulated devices have of memory of their own, as in Defined. `group`: the limit of all memory
    of a unit, None without, and `shared`: whether it is in a slice with such a limit. `lacks`: the capabilities that an
    iommufd-exec in front of it takes and has not, and `ends`: why that does not start it, else "".
    """

    memory: int | None
    user: Any
    devices: tuple[Device, ...]
    viommu: str | None
    limit: int | None
    libvirt_locks: bool
    locked: Span
    told_of_locks: bool
    overhead: int | None
    accounting: str
    counted: Span | None
    domain: Defined | None
    grow: Growth | None
    live_update: bool
    capable: bool | None
    starter: str | None = None
    emulator: str | None = None
    of_devices: int | None = 0
    group: int | None = None
    shared: bool = False
    lacks: tuple[str, ...] = ()
    ends: str = ""


def checked(info: Any) -> Info:
    """The input, if it is what iommufd_info returned."""
    trouble = next(filter(info.get, TROUBLES), None) if isinstance(info, Mapping) else None
    if trouble:
        # Whatever it is, it is told on one line.
        msg = ascii(str(info.get("msg", "no message")))[1:-1]
        raise IommufdError(
            f"The input is the result of a task that was {trouble} ({msg:.1000}), which tells nothing of the host:"
            " leave such hosts out."
        )
    if not isinstance(info, Mapping) or not {"host", "narrowed"} <= info.keys():
        raise IommufdError("The input is not what virt.iommufd.iommufd_info returned: give what the task registered.")
    missing = [subset for subset in ("processes", "users") if subset not in info]
    if missing:
        raise IommufdError(
            f"The input lacks {' and '.join(missing)}: run virt.iommufd.iommufd_info with {' and '.join(missing)} in"
            " gather_subset."
        )
    return info


def owner_of(info: Info, user: Any) -> Owner:
    """The user that is asked about, as the input knows it; None for one that nobody knows."""
    unseen = {each["what"] for each in info["host"]["limits_of_view"]}
    hidden = "processes" in unseen
    if user is None:
        return Owner(None, None, 0, 0, True, True)
    text = str(user).strip()
    known = isinstance(user, (int, str)) and not isinstance(user, bool)
    # No id has more digits, and no name is made of digits alone.
    if not known or not text.isprintable() or not text or text.startswith("-") or (text.isdigit() and len(text) > 10):
        raise IommufdError(f"user: {user!r:.60} is not a user: give a name or an id.")
    libvirt = info["host"].get("libvirt") or {}
    rows = (*info["users"], *info["processes"], *(libvirt.get("sessions") or ()))
    rows = (*rows, {"uid": libvirt.get("uid"), "user": libvirt.get("user")}, {"uid": 0, "user": "root"})
    # Here a user may go by another name.
    rows = (*rows, *(info["narrowed"].get("users") or ()))
    uids = (row["uid"] for row in rows if row["user"] == text and row["uid"] is not None)
    uid = int(text) if text.isdecimal() else next(uids, None)
    name = next(
        (row["user"] for row in rows if uid is not None and row["uid"] == uid and row["user"] is not None), text
    )
    narrowed = info["narrowed"]["uids"]
    if narrowed is not None and uid not in narrowed:
        raise IommufdError(
            f"user: the input tells of other users than {text}: run virt.iommufd.iommufd_info without users, or with"
            " this one among them."
        )
    if uid is None:
        # Several names may have one uid, and some uids have a name that the host's files do not tell.
        charged, unsure = 0, max((row["charged_bytes"] + row["uncertain_bytes"] for row in info["users"]), default=0)
    else:
        charges = [row for row in info["users"] if row["uid"] == uid]
        charged, unsure = (sum(row[each] for row in charges) for each in ("charged_bytes", "uncertain_bytes"))
    return Owner(
        name=name,
        uid=uid,
        charged=charged,
        unsure=unsure,
        # What processes have pinned whose descriptors or iommufds were not seen is in uncertain_bytes.
        hidden=hidden,
        partly=hidden or bool(unsure and unseen.intersection(UNSEEN)),
        left_behind="charges" in unseen,
    )


def asked_of(
    memory: Any,
    user: Any,
    memlock: Any,
    vfio_devices: Any,
    viommu: Any,
    accounting: Any,
    overhead: Any,
    locked: Any,
    devices: Any,
    domain_xml: Any,
    grow: Any,
    live_update: Any,
    cap_ipc_lock: Any,
) -> Asked:
    """The VM that the parameters describe."""
    if accounting not in ACCOUNTINGS:
        raise IommufdError(f"accounting: {accounting!r:.60} is unknown: give {', '.join(ACCOUNTINGS)}.")
    domain = None if domain_xml is None else parse_domain(domain_xml)
    growth = None if grow is None else _growth(grow)
    if domain is not None and growth is not None:
        raise IommufdError("domain_xml and grow: a VM that runs is not asked about by its XML: give one of them.")
    if memory is None and domain is None and growth is None:
        raise IommufdError("memory: give the memory of the VM, or domain_xml, or grow.")
    own_viommu = _viommu(viommu)
    if domain is not None:
        has, viommu_ = domain.devices, own_viommu or domain.viommu
        if devices is not None:
            raise IommufdError("domain_xml and devices: the XML tells of the devices: give one of them.")
    else:
        has = _so_many(vfio_devices) if devices is None else _devices("devices", devices)
        viommu_ = own_viommu or (None if growth else NO_VIOMMU)
    locks, amount = _locked(locked, domain, memlock if growth is None else None)
    return Asked(
        memory=domain and domain.memory if memory is None else _memory(memory, growth is not None),
        user=user if user is not None or domain is None else domain.user,
        devices=bounded(has),
        viommu=viommu_,
        limit=None if memlock == "libvirt" else _limit(memlock),
        libvirt_locks=locks,
        locked=amount,
        told_of_locks=locked is not None or domain is not None,
        overhead=None if overhead is None else _size("overhead", overhead),
        accounting=accounting,
        counted=_counted(domain, has, viommu_),
        domain=domain,
        grow=growth,
        live_update=_boolean("live_update", live_update),
        capable=None if cap_ipc_lock is None else _boolean("cap_ipc_lock", cap_ipc_lock),
        of_devices=0 if domain is None else domain.of_devices,
    )


def _size(name: str, value: Any, minimum: int = 0) -> int:
    """The bytes of a parameter."""
    try:
        return parse_size(value, minimum)
    except IommufdError as exc:
        raise IommufdError(f"{name}: {exc}") from exc


def _memory(value: Any, runs: bool) -> int:
    """The guest's memory: what a VM that runs has, or what QEMU makes of what it is given."""
    size = _size("memory", value, 1)
    return size if runs else whole(size, RAM_UNIT)


def _boolean(name: str, value: Any) -> bool:
    try:
        return bool(boolean(value))
    except TypeError:
        raise IommufdError(f"{name}: {value!r:.60} is not a boolean: give true or false.") from None


def _limit(memlock: Any) -> int:
    return UNLIMITED if memlock in ("unlimited", "infinity") else _size("memlock", memlock)


def _viommu(value: Any) -> str | None:
    """NO_VIOMMU, EACH or NESTED; None where it was not given."""
    if value is None or value in (EACH, NESTED, NO_VIOMMU):
        return None if value is None else str(value)
    try:
        return EACH if boolean(value) else NO_VIOMMU
    except TypeError:
        raise IommufdError(f"viommu: {value!r:.60} is unknown: give none, each or nested.") from None


def _locked(value: Any, domain: Defined | None, memlock: Any) -> tuple[bool, Span]:
    """Whether libvirt has the VM locked, and what the VMM locks itself, up to UNLIMITED for all that it has."""
    if isinstance(value, bool) or str(value).strip().lower() in ("true", "false", "yes", "no"):
        locks = _boolean("locked", value)
        return locks, EVERYTHING if locks else NOTHING
    if value is not None:
        return False, exactly(_size("locked", value))
    if domain is not None:
        if domain.locked or domain.mem_lock:
            return domain.locked, EVERYTHING
        return False, NOTHING if domain.mem_lock is False else Span(0, UNLIMITED)
    # libvirt's own limit is that of a VM without <locked/>.
    return False, NOTHING if memlock == "libvirt" else Span(0, UNLIMITED)


def _so_many(vfio_devices: Any) -> tuple[Device, ...]:
    """So many devices by one iommufd."""
    text = str(vfio_devices).strip()
    if isinstance(vfio_devices, bool) or not re.fullmatch("0{0,9}[1-9][0-9]{0,3}", text):
        raise IommufdError(f"vfio_devices: {vfio_devices!r:.60} is not a number of devices: give 1 to 9999.")
    return (Device(IOMMUFD, THE_IOMMUFD),) * int(text)


def _devices(name: str, given: Any) -> tuple[Device, ...]:
    """The devices of a list of dictionaries."""
    if not isinstance(given, (list, tuple)) or len(given) > DEVICES_MAX:
        raise IommufdError(f"{name}: give a list of up to {DEVICES_MAX} dictionaries with backend, iommufd and mode.")
    return tuple(_device(f"{name}[{index}]", each, index) for index, each in enumerate(given))


def _device(name: str, given: Any, index: int) -> Device:
    if not isinstance(given, Mapping) or not given.keys() <= {"backend", "iommufd", "mode"}:
        raise IommufdError(f"{name}: {given!r:.60} is no device: give backend, and iommufd and mode where it has them.")
    backend, iommufd, mode = (given.get(each) for each in ("backend", "iommufd", "mode"))
    if backend not in BACKENDS:
        raise IommufdError(f"{name}: backend {backend!r:.60} is unknown: give {', '.join(BACKENDS)}.")
    if mode not in (None, USER, PROCESS):
        raise IommufdError(f"{name}: mode {mode!r:.60} is unknown: give user or process.")
    by_iommufd = backend == "iommufd" or (backend == "mdev" and (iommufd is not None or mode is not None))
    if not by_iommufd and (iommufd is not None or mode is not None):
        raise IommufdError(f"{name}: a device by {backend} is in no iommufd: leave out iommufd and mode.")
    holder = THE_IOMMUFD if iommufd is None else f"{OF_IOMMUFD}{iommufd!s:.60}"
    if by_iommufd:
        return Device(IOMMUFD, holder, mode, backend == "mdev")
    if backend == "vdpa":
        return Device(VDPA)
    # A disk by nvme:// has a container of its own.
    return Device(LEGACY, f"nvme {index}" if backend == "nvme" else CONTAINER, None, backend == "mdev")


def bounded(devices: tuple[Device, ...]) -> tuple[Device, ...]:
    """The devices, if they are in no more iommufds than a VM has, each of which has one mode."""
    modes: dict[str, set[str]] = {}
    for each in devices:
        if each.backend == IOMMUFD:
            modes.setdefault(each.holder, set()).update(filter(None, [each.mode]))
    if len(modes) > IOMMUFDS_MAX:
        raise IommufdError(f"The VM has {len(modes)} iommufds, and memlock_fit counts {IOMMUFDS_MAX} at most.")
    for holder, its in modes.items():
        if len(its) > 1:
            raise IommufdError(f"devices: {holder} has two modes: give it one, or give another iommufd.")
    return tuple(each._replace(mode=next(iter(modes.get(each.holder, ())), each.mode)) for each in devices)


def _counted(domain: Defined | None, devices: tuple[Device, ...], viommu: str | None) -> Span | None:
    """How many times libvirt counts the memory. Without the XML it is not known whether that has an <iommu>."""
    if domain is not None:
        return None if domain.counted is None else exactly(domain.counted)
    nvme = sum(each.holder.startswith("nvme ") for each in devices)
    vdpa = sum(each.backend == VDPA for each in devices)
    passed = len(devices) - nvme - vdpa
    least, most = min(passed, 1), passed if viommu not in (NO_VIOMMU, None) else min(passed, 1)
    return Span(least + nvme + vdpa, most + nvme + vdpa)


def _growth(given: Any) -> Growth:
    if not isinstance(given, Mapping) or "vm" not in given or not given.keys() <= {"vm", "memory", "devices"}:
        raise IommufdError(f"grow: {given!r:.60} is no VM that grows: give vm, and memory or devices or both.")
    memory, devices = given.get("memory"), given.get("devices")
    return Growth(
        str(given["vm"]).strip(),
        0 if memory is None else _size("grow.memory", memory),
        () if devices is None else bounded(_devices("grow.devices", devices)),
    )
