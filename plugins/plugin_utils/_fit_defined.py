# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the VMs that are defined on a host, as memlock_fit would be asked about each.

The functions are pure. They raise IommufdError with the text that a user reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
)
from ..module_utils._errors import IommufdError
from ..module_utils._foreign import boolean, member, number, one_of, or_none, text, texts
from ..module_utils._size import SIZE_MAX
from ._fit_host import OTHER, SESSION, SYSTEM
from ._fit_input import AUTO, EVERYTHING, NONE, THE_IOMMUFD, Asked, Info, asked_of, bounded
from ._fit_xml import CONTAINER, LIBVIRTS, Defined

__all__ = ("Definition", "definitions", "moved", "told_of")

DOMAIN = "domain"
UNIT = "unit"

# More than any host has; the module returns fewer.
ROWS_MAX = 2**16
TEXTS_MAX = 4096
UID_MAX = 2**32 - 1

_AGAIN = "give what virt.iommufd.iommufd_info of this version returned, with defined in gather_subset"
_size = or_none(lambda given: number(given, SIZE_MAX))
_flag = or_none(boolean)
_name = or_none(text)


class Definition(NamedTuple):
    """A VM that is defined. `asked`: as memlock_fit would be asked about it; None where too much is in it for that.

    `autostart`: whether it starts at boot, None if unknown. `pid`: of its running VMM. `after`: the units that it
    starts after. `unread`: what of its definition was not understood, in sentences, and `unread_at_boot`: what else may
    be otherwise after a reboot; `changed`: all of it.
    """

    name: str
    kind: str
    manager: str
    user: str | None
    uid: int | None
    autostart: bool | None
    pid: int | None
    after: tuple[str, ...]
    unread: tuple[str, ...]
    unread_at_boot: tuple[str, ...]
    changed: bool
    asked: Asked | None


def definitions(info: Info) -> list[Definition]:
    """The rows of `defined`, checked."""
    if "defined" not in info:
        raise IommufdError(
            "The input lacks defined: run virt.iommufd.iommufd_info with defined, host, processes and users in"
            " gather_subset."
        )
    rows = info["defined"]
    if not isinstance(rows, (list, tuple)):
        raise IommufdError(f"defined: a {type(rows).__name__} is no list of VMs: {_AGAIN}.")
    if len(rows) > ROWS_MAX:
        raise IommufdError(f"defined: it has more than {ROWS_MAX} VMs: run virt.iommufd.iommufd_info with users.")
    emulators = {row["path"]: row for row in info["host"].get("qemu") or () if row["present"]}
    return [_definition(f"defined[{index}]", row, emulators) for index, row in enumerate(rows)]


def _definition(place: str, row: Any, emulators: Mapping[str, Mapping[str, Any]]) -> Definition:
    if not isinstance(row, Mapping):
        raise IommufdError(f"{place}: a {type(row).__name__} is no VM: {_AGAIN}.")
    try:
        found = _Fields(dict(row))
        asked, reason = _asked(found, emulators)
    except IommufdError as exc:
        raise IommufdError(f"{place}: {exc}: {_AGAIN}.") from exc
    return Definition(
        name=found.name,
        kind=found.kind,
        manager=found.manager,
        user=found.user,
        uid=found.uid,
        autostart=found.autostart,
        pid=found.pid,
        after=found.order,
        unread=(*found.unread, *([reason] if reason else [])),
        unread_at_boot=found.unread_at_boot,
        changed=found.changed,
        asked=asked,
    )


class _Fields:
    """The fields of a row, each of its type."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.kind = member(row, "kind", one_of(DOMAIN, UNIT))
        self.name = member(row, "name", text)
        self.manager = member(row, "manager", or_none(one_of(SYSTEM, SESSION))) or SYSTEM
        self.user = member(row, "user", _name)
        self.uid = member(row, "uid", or_none(lambda given: number(given, UID_MAX)))
        self.autostart = member(row, "autostart", _flag)
        self.pid = member(row, "pid", or_none(number))
        self.memory = member(row, "memory_bytes", _size)
        self.elastic = member(row, "elastic_bytes", _size) or 0
        self.of_devices = member(row, "of_devices_bytes", _size)
        self.hugepages = member(row, "hugepages", _flag)
        self.devices: tuple[Device, ...] = member(row, "devices", _devices)
        self.viommu = member(row, "viommu", or_none(one_of(NO_VIOMMU, EACH, NESTED)))
        self.counted = member(row, "libvirt_counts", _size)
        self.hard_limit = member(row, "hard_limit_bytes", _size)
        self.shared = bool(member(row, "memory_max_shared", _flag))
        self.libvirt_locks = bool(member(row, "libvirt_locks", _flag))
        self.locks_memory = member(row, "locks_memory", _flag)
        self.fdgroup = member(row, "fdgroup", _name)
        self.emulator = member(row, "emulator", _name)
        self.memlock = member(row, "memlock_bytes", or_none(number))
        self.unlimited = member(row, "memlock_unlimited", _flag)
        self.capable = member(row, "cap_ipc_lock", _flag)
        self.lacks = member(row, "launcher_lacks", _texts)
        self.ends = member(row, "launcher_ends", _name) or ""
        self.order: tuple[str, ...] = member(row, "order", _texts)
        self.unread = member(row, "unread", texts(TEXTS_MAX))
        self.unread_at_boot = member(row, "unread_at_boot", texts(TEXTS_MAX))
        self.changed = bool(member(row, "changed", _flag))

    @property
    def owner(self) -> int | str | None:
        """Whom it runs as. An id may go by a name that the host's files do not tell."""
        return self.user if self.uid is None else self.uid


def _texts(given: object) -> tuple[str, ...]:
    return () if given is None else texts(TEXTS_MAX)(given)


def _devices(given: object) -> tuple[Device, ...]:
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)):
        raise IommufdError(f"is no list but a {type(given).__name__}")
    return tuple(map(_device, given))


def _device(given: object) -> Device:
    backend = member(given, "backend", one_of(IOMMUFD, LEGACY, VDPA))
    space = member(given, "space", or_none(text)) or ""
    mode = member(given, "accounting", or_none(one_of(USER, PROCESS)))
    runs = member(given, "as_it_runs", boolean)
    return Device(backend, "" if backend == VDPA else space, mode if backend == IOMMUFD else None, runs)


def _asked(row: _Fields, emulators: Mapping[str, Mapping[str, Any]]) -> tuple[Asked | None, str]:
    """The VM as memlock_fit is asked about it; or why it cannot be."""
    try:
        return (_of_domain(row) if row.kind == DOMAIN else _of_unit(row, emulators)), ""
    except IommufdError as exc:
        return None, str(exc)


def _of_domain(row: _Fields) -> Asked:
    its = Defined(
        # What tells it from another one decides nothing, so that those that are alike are judged once.
        name="",
        memory=row.memory or 0,
        devices=row.devices,
        viommu=row.viommu,
        counted=row.counted,
        hard_limit=row.hard_limit,
        locked=row.libvirt_locks,
        mem_lock=row.locks_memory,
        user=None,
        fdgroup=row.fdgroup,
        emulator=row.emulator,
        elastic=min(row.elastic, row.memory or 0),
        of_devices=row.of_devices,
        hugepages=row.hugepages,
    )
    asked = asked_of(
        **dict.fromkeys(("memory", "viommu", "overhead", "locked", "devices", "grow", "cap_ipc_lock")),
        user=row.owner,
        memlock="libvirt",
        vfio_devices=1,
        accounting=AUTO,
        domain_xml=its,
        live_update=False,
    )
    return asked._replace(starter=row.manager, memory=row.memory)


def _of_unit(row: _Fields, emulators: Mapping[str, Mapping[str, Any]]) -> Asked:
    # Root may have it without that.
    its_file = emulators.get(row.emulator or "", {}).get("cap_ipc_lock") if row.uid else None
    return Asked(
        memory=row.memory,
        user=row.owner,
        devices=bounded(row.devices),
        viommu=row.viommu,
        limit=UNLIMITED if row.unlimited else row.memlock,
        libvirt_locks=False,
        locked=Span(0, UNLIMITED) if row.locks_memory is None else EVERYTHING if row.locks_memory else NOTHING,
        told_of_locks=True,
        overhead=None,
        accounting=AUTO,
        counted=None,
        domain=None,
        grow=None,
        live_update=False,
        capable=its_file if row.capable is None else row.capable,
        starter=OTHER,
        emulator=row.emulator,
        of_devices=row.of_devices,
        group=row.hard_limit,
        shared=row.shared,
        lacks=row.lacks,
        ends=row.ends,
    )


def moved(asked: Asked) -> Asked:
    """The same VM with an iommufd in the place of the legacy container; a disk by nvme:// keeps its own."""
    there = next((each for each in asked.devices if each.backend == IOMMUFD), None)
    # Without a descriptor QEMU opens it, and nobody has the time to set its mode.
    of_unit = Device(IOMMUFD, THE_IOMMUFD, USER)
    new = there or (of_unit if asked.starter == OTHER else Device(IOMMUFD, LIBVIRTS))
    devices = tuple(
        new._replace(as_it_runs=each.as_it_runs) if each.holder == CONTAINER else each for each in asked.devices
    )
    domain = asked.domain and asked.domain._replace(devices=devices)
    return asked._replace(devices=devices, domain=domain)


# What may be told of a VM beside its definition, by the names that memlock_fit has for it, and what that is here.
_OF_DEVICES = ("devices", "counted")
_TOLD = {
    "memory": ("memory",),
    "user": ("user",),
    "memlock": ("limit",),
    "vfio_devices": _OF_DEVICES,
    "viommu": ("viommu",),
    "accounting": ("accounting",),
    "overhead": ("overhead",),
    "locked": ("libvirt_locks", "locked", "told_of_locks"),
    "devices": _OF_DEVICES,
    "cap_ipc_lock": ("capable",),
}


def told_of(its: Definition, given: Any) -> Definition:
    """The VM with what is told of it, which goes before what its definition says."""
    if not isinstance(given, Mapping) or not given or not given.keys() <= _TOLD.keys():
        raise IommufdError(f"{given!r:.60} is nothing to be told of a VM: give one or more of {', '.join(_TOLD)}.")
    if its.asked is None:
        raise IommufdError(f"nothing helps there: {its.unread[0]}")
    if its.unread and not its.asked.devices and not {"devices", "vfio_devices"} & given.keys():
        raise IommufdError(f"give devices, too, or vfio_devices: {its.unread[0]}")
    asked = _with_told(its.asked, given)
    user, uid = (str(given["user"]), None) if "user" in given else (its.user, its.uid)
    # Of one whose files have changed, all of it may be otherwise.
    then = its.unread_at_boot if its.changed or "memlock" not in given else ()
    return its._replace(unread=(), unread_at_boot=then, asked=asked, user=user, uid=uid)


def _with_told(asked: Asked, given: Mapping[str, Any]) -> Asked:
    viommu = given.get("viommu", asked.viommu)
    fixed = {"memory": 1, "memlock": "libvirt", "vfio_devices": 1, "accounting": AUTO, "live_update": False}
    names = ("user", "overhead", "locked", "devices", "domain_xml", "grow", "cap_ipc_lock")
    told = asked_of(**{**dict.fromkeys(names), **fixed, **given, "viommu": viommu})
    new = asked._replace(**{field: getattr(told, field) for name in given for field in _TOLD[name]})
    if asked.domain is not None and new.devices is told.devices:
        # Without a name, it is libvirt that opens it. Others it does not see.
        libvirts = [each.holder == THE_IOMMUFD for each in new.devices if each.backend == IOMMUFD]
        devices = tuple(each._replace(holder=LIBVIRTS) if each.holder == THE_IOMMUFD else each for each in new.devices)
        counted = told.counted if all(libvirts) and viommu is not None else None
        new = new._replace(devices=devices, counted=counted, domain=asked.domain._replace(devices=devices))
    if asked.starter != OTHER or told.accounting == AUTO:
        return new
    if told.accounting == NONE:
        return new._replace(capable=True)
    modes = {IOMMUFD: told.accounting}
    return new._replace(devices=tuple(each._replace(mode=each.mode or modes.get(each.backend)) for each in new.devices))
