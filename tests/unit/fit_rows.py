# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What iommufd_info returns, as far as memlock_fit reads it, for its tests."""

from __future__ import annotations

from typing import Any

KIB, MIB, GIB = (1024**power for power in range(1, 4))
PAGE = 4096

# What a VM of 64 MiB was seen to pin.
PINNED = 65792 * KIB
QEMU = "/usr/bin/qemu-system-x86_64"
UNIT = "virtqemud.service"

Row = dict[str, Any]


def iommufds(*ioases: int, mode: str | None = "user") -> list[Row]:
    """Iommufds with so many IOASes."""
    return [
        {
            "fd": 30 + index,
            "rlimit_mode": mode,
            "same_as": None,
            "shared_with": [],
            "ioases": [{"ioas_id": each, "huge_pages": True} for each in range(count)],
        }
        for index, count in enumerate(ioases)
    ]


def process(**fields: Any) -> Row:
    """A VM of 64 MiB of the system libvirt, with a device by iommufd."""
    return {
        "pid": 4242,
        "comm": "qemu-system-x86",
        "emulator": QEMU,
        "uid": 64055,
        "user": "libvirt-qemu",
        "name": "vm1",
        "domain": "vm1",
        "domain_uri": "qemu:///system",
        "unit": "machine-qemu-1-vm1.scope",
        "initial_user_namespace": True,
        "memory_bytes": 64 * MIB,
        "memory_pluggable": False,
        "of_devices_bytes": 0,
        "viommu": "none",
        "iommufd_objects": [{"id": "iommufd0", "fd": None}],
        "pinned_bytes": PINNED,
        "locked_bytes": 0,
        "memlock_bytes": 100 * MIB,
        "memlock_unlimited": False,
        "memory_max_bytes": None,
        "memory_max_unlimited": True,
        "memory_max_shared": False,
        "capabilities": {"effective": [], "ambient": []},
        "iommufds": iommufds(1),
        "legacy_containers": [],
        "vdpa_devices": [],
        "vfio_devices": [{"fd": 40, "backend": "iommufd", "as_it_runs": False}],
        "backends": ["iommufd"],
        "holder": False,
        "address_spaces": 1,
        "locks_memory": False,
        "accounting": "user",
        **fields,
    }


def unit(**fields: Any) -> Row:
    """The same in a unit of user vm."""
    return process(**{"uid": 1001, "user": "vm", "domain": None, "domain_uri": None, "unit": "vm1.service", **fields})


def user(**fields: Any) -> Row:
    return {"uid": 64055, "user": "libvirt-qemu", "charged_bytes": PINNED, "uncertain_bytes": 0, **fields}


def of_vm(charged: int = PINNED, unsure: int = 0) -> Row:
    return user(uid=1001, user="vm", charged_bytes=charged, uncertain_bytes=unsure)


def emulator(cap_ipc_lock: bool | None, path: str = QEMU, present: bool = True, version: str | None = "10.0.13") -> Row:
    return {
        "path": path,
        "present": present,
        "known_by": ["place"],
        "cap_ipc_lock": cap_ipc_lock,
        "version": version,
    }


def session(hard: int | None, uid: int = 1001, name: str = "vm") -> Row:
    return {"uid": uid, "user": name, "memlock_hard_bytes": hard, "memlock_hard_unlimited": hard is None}


def libvirt(**fields: Any) -> Row:
    """A libvirt that sets the mode."""
    return {
        "unit": UNIT,
        "user": "libvirt-qemu",
        "uid": 64055,
        "memlock_bytes": 64 * MIB,
        "memlock_unlimited": False,
        "memlock_hard_bytes": 64 * MIB,
        "memlock_hard_unlimited": False,
        "sessions": [session(8 * MIB)],
        "cap_sys_resource": True,
        "passes_cap_ipc_lock": True,
        "supports_iommufd": True,
        "sets_rlimit_mode": True,
        "reason": "libvirt sets it.",
        **fields,
    }


def older(**fields: Any) -> Row:
    """A libvirt that knows no iommufd."""
    return libvirt(**{"sets_rlimit_mode": False, "supports_iommufd": False, "reason": "libvirt is older.", **fields})


def host(**fields: Any) -> Row:
    """A host whose libvirt is an older one and whose emulator has no capability."""
    return {
        "limits_of_view": [],
        "module": "loaded",
        "machine": "x86_64",
        "page_bytes": PAGE,
        "legacy_by_iommufd": False,
        "readiness": [],
        "options": {"rlimit_mode": {"readable": True, "settable": True}},
        "qemu": [emulator(False)],
        "libvirt": older(),
        **fields,
    }


def native(**fields: Any) -> Row:
    """A host whose libvirt sets the mode."""
    return host(libvirt=libvirt(**fields))


def unseen(*what: str) -> list[Row]:
    return [{"what": each, "why": "This is why."} for each in what]


def info(**fields: Any) -> Row:
    """What the module returned on a host with one running VM."""
    narrowed: Row = {"pids": None, "uids": None}
    return {"host": host(), "processes": [process()], "users": [user()], "narrowed": narrowed, **fields}


def idle(**fields: Any) -> Row:
    """What the module returned on a host without VMs."""
    return info(**{"processes": [], "users": [], **fields})


def defined(**fields: Any) -> Row:
    """A domain of 64 GiB of the system libvirt, with a device by an iommufd that libvirt gives it."""
    return {
        "kind": "domain",
        "name": "vm1",
        "manager": "system",
        "path": "/etc/libvirt/qemu/vm1.xml",
        "user": None,
        "uid": None,
        "autostart": True,
        "transient": False,
        "pid": None,
        "memory_bytes": 64 * GIB,
        "memory_max_bytes": None,
        "elastic_bytes": 0,
        "of_devices_bytes": 0,
        "hugepages": False,
        "devices": [device()],
        "viommu": "none",
        "libvirt_counts": 1,
        "hard_limit_bytes": None,
        "memory_max_shared": None,
        "libvirt_locks": False,
        "locks_memory": False,
        "fdgroup": None,
        "emulator": QEMU,
        "memlock_bytes": None,
        "memlock_unlimited": None,
        "cap_ipc_lock": None,
        "launcher_lacks": None,
        "launcher_ends": None,
        "order": [],
        "unread": [],
        "unread_at_boot": [],
        "changed": None,
        **fields,
    }


def device(backend: str = "iommufd", space: str = "the domain's iommufd", **fields: Any) -> Row:
    """A device of a VM that is defined."""
    return {"backend": backend, "space": space, "accounting": None, "as_it_runs": False, "address": None, **fields}


def by_container(**fields: Any) -> Row:
    """The same by the legacy container."""
    return device("legacy", "the legacy container", **fields)


def by_qemu(mode: str | None = "user", **fields: Any) -> Row:
    """The same by an iommufd that libvirt does not see."""
    return device("iommufd", "i", accounting=mode, **fields)


def defined_unit(**fields: Any) -> Row:
    """A unit of user vm with 64 GiB, whose QEMU opens its iommufd itself."""
    row: Row = {
        "kind": "unit",
        "name": "vm1.service",
        "path": "/etc/systemd/system/vm1.service",
        "user": "vm",
        "uid": 1001,
        "devices": [by_qemu()],
        "libvirt_counts": None,
        "memlock_bytes": 66 * GIB,
        "memlock_unlimited": False,
        "cap_ipc_lock": False,
    }
    return defined(**{**row, **fields})
