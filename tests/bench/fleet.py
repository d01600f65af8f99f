# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What `iommufd_info` returns on many hosts, made of what it returned on one: recorded.json, of the guest `fallback`.

There, three VMs ran, each accounted in another way. Each host gets as many VMs as are asked for, of all kinds, a
launcher, and hardware as large as a server's. Most are well. Of a hundred, a few are not, in each way that the report
knows.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ..unit.fit_rows import GIB, by_qemu, defined, defined_unit, device, emulator, older

__all__ = ("ailment", "fleet")

RECORDED = Path(__file__).with_name("recorded.json")
GROUPS = 64
DEVICES = 16

# What is the matter with the first hosts of each hundred.
AILING = (
    *("at risk", "at risk", "over limit", "may fail later", "unknown"),
    *("not ready", "no iommufd", "no VMs", "failed", "unreachable"),
)

Row = dict[str, Any]

# What the module has come to tell since that was recorded, as it tells it of these VMs: one QEMU, which has an iommufd
# that no other process has, and a device that is no mdev.
SINCE: Row = {
    "emulator": "/usr/bin/qemu-system-x86_64",
    "locks_memory": False,
    "memory_pluggable": False,
    "of_devices_bytes": 0,
    "viommu": "none",
    "iommufd_objects": [{"id": "iommufd0", "fd": None}],
    "backends": ["iommufd"],
    "holder": False,
    "legacy_containers": [],
    "vdpa_devices": [],
    "address_spaces": 1,
}
SINCE_OF_IOMMUFD: Row = {"same_as": None, "shared_with": [], "truncated": False}
SINCE_OF_DEVICE: Row = {"backend": "iommufd", "as_it_runs": False}
COUNTERS = {"user": "user", "process": "mm_locked", "none": None}


def fleet(hosts: int, vms: int, definitions: int = 0) -> dict[str, Row]:
    """The results by the names of the hosts. `definitions`: how many VMs are defined on each, if it told that."""
    recorded = json.loads(RECORDED.read_text("utf-8"))
    results = {f"kvm{number:04}": host(recorded, number, vms) for number in range(hosts)}
    for number, result in enumerate(results.values() if definitions else ()):
        if "host" in result:
            result["host"].update(legacy_by_iommufd=False, libvirt=older(), qemu=[emulator(False)])
            result["defined"] = [definition(number, each) for each in range(definitions)]
    return results


def definition(host_number: int, number: int) -> Row:
    """One of the VMs that are defined: domains and units, most charged to their user, of sizes that differ by host."""
    name, size = f"vm{host_number}-{number}", (1 + number + host_number % 7) * GIB
    if number % 3 == 2:
        return defined_unit(name=f"{name}.service", memory_bytes=size)
    limit = None if number % 2 else 40 * GIB
    devices = [by_qemu() if number % 3 else device()]
    return defined(name=name, memory_bytes=size, hard_limit_bytes=limit, devices=devices, pid=4242 + number)


def ailment(number: int) -> str:
    """What is the matter with one of them, in the words of the report."""
    return AILING[number % 100] if number % 100 < len(AILING) else "ok"


def host(recorded: Row, number: int, vms: int) -> Row:
    """The result of one of them."""
    what = ailment(number)
    if what in ("failed", "unreachable"):
        return {what: True, "msg": f"It was {what}, for a reason that takes some words to tell."}
    result = copy.deepcopy(recorded)
    there, (user,) = result["host"], result["users"]
    by_user, by_process, by_nobody = (complete(process) for process in result["processes"])
    kinds = [by_process, by_user, by_nobody, by_legacy(by_process), by_vdpa(by_process)]
    there["iommu_groups"] = [dict(there["iommu_groups"][0], id=each) for each in range(GROUPS)]
    there["vfio_devices"] = [dict(there["vfio_devices"][0], iommu_group=each) for each in range(DEVICES)]
    user["at_risk"] = what == "at risk"
    if what == "not ready":
        there["readiness"] = [{"what": "iommu", "ready": False, "msg": "The IOMMU is off: turn it on."}]
    if what == "no iommufd":
        there["module"] = "absent"
    bare = what in ("not ready", "no iommufd", "no VMs")
    models = [by_user if what == "at risk" else kinds[each % len(kinds)] for each in range(0 if bare else vms)]
    result["processes"] = [vm(model, what, number, each) for each, model in enumerate(models)]
    if not bare:
        result["processes"].append(launcher(by_user))
    return result


def complete(process: Row) -> Row:
    """A recorded process with what the module tells today. In this one place, what is recorded is added to."""
    iommufds = [{**each, **SINCE_OF_IOMMUFD} for each in process["iommufds"]]
    devices = [{**each, **SINCE_OF_DEVICE} for each in process["vfio_devices"]]
    return counted({**process, **SINCE, "iommufds": iommufds, "vfio_devices": devices}, COUNTERS[process["accounting"]])


def counted(process: Row, counter: str | None) -> Row:
    """A process with the one counter that is checked for it, or none."""
    held, left = process["charged_bytes"], process["headroom_bytes"]
    row = {"counter": counter, "held_bytes": held, "headroom_bytes": left, "backends": process["backends"]}
    return {**process, "counter": counter, "counters": [row] if counter else []}


def by_legacy(process: Row) -> Row:
    """The same VM with the legacy container, as the scenario audit has one: it counts in VmLck alone."""
    devices = [{**each, "node": "/dev/vfio/5", "backend": "legacy"} for each in process["vfio_devices"]]
    container: Row = {"fd": 9, "same_as": None, "shared_with": []}
    more = {"backends": ["legacy"], "iommufds": [], "legacy_containers": [container], "vfio_devices": devices}
    return counted({**process, **more, "pinned_bytes": 0}, "mm_locked")


def by_vdpa(process: Row) -> Row:
    """The same VM with a vDPA device, as tests/kernel/test_info_backends.py has one: it counts in VmPin alone."""
    more = {"backends": ["vdpa"], "iommufds": [], "vfio_devices": [], "locked_bytes": 0}
    return counted({**process, **more, "vdpa_devices": [{"fd": 11, "node": "/dev/vhost-vdpa-0"}]}, "mm_pinned")


def launcher(process: Row) -> Row:
    """What keeps a copy of a VM's iommufd, as the scenario audit has one."""
    more = {"comm": "launcher", "name": None, "unit": "launcher.service", "pid": 812, "holder": True}
    nothing = {"pinned_bytes": 0, "locked_bytes": 0, "charged_bytes": 0, "headroom_bytes": None}
    notes = ["Another process has all that it holds, and it has pinned nothing: it is not counted."]
    return counted({**process, **more, **nothing, "vfio_devices": [], "notes": notes}, None)


def vm(model: Row, what: str, host_number: int, number: int) -> Row:
    """One of its VMs, the first of which has what is the matter with the host."""
    made = {**copy.deepcopy(model), "name": f"vm{host_number}-{number}", "pid": 4242 + number}
    if number == 0 and what == "over limit":
        made["headroom_bytes"] = -4096
    if number == 0 and what == "may fail later":
        made["vfio_devices"][0]["as_it_runs"] = True
        made["memory_bytes"] = made["memlock_bytes"] * 2
    if number == 0 and what == "unknown":
        unknown: Row = {
            "accounting": None,
            "counter": None,
            "counters": [],
            "charged_bytes": None,
            "headroom_bytes": None,
        }
        made.update(unknown, notes=["Its iommufds differ in their rlimit mode."])
    return made
