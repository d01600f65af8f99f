# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What `iommufd_info` returns on many hosts, made of what it returned on one: recorded.json, of the guest `fallback`.

There, three VMs ran, each accounted in another way. Each host gets as many VMs as are asked for, and hardware as
large as a server's. Most are well. Of a hundred, a few are not, in each way that the report knows.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

__all__ = ("ailment", "fleet")

RECORDED = Path(__file__).with_name("recorded.json")
GROUPS = 64
DEVICES = 16

# What is the matter with the first hosts of each hundred.
AILING = ("at risk", "at risk", "over limit", "unknown", "not ready", "no iommufd", "no VMs", "failed", "unreachable")

Row = dict[str, Any]


def fleet(hosts: int, vms: int) -> dict[str, Row]:
    """The results by the names of the hosts."""
    recorded = json.loads(RECORDED.read_text("utf-8"))
    return {f"kvm{number:04}": host(recorded, number, vms) for number in range(hosts)}


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
    by_user, by_process, _by_nobody = result["processes"]
    there["iommu_groups"] = [dict(there["iommu_groups"][0], id=each) for each in range(GROUPS)]
    there["vfio_devices"] = [dict(there["vfio_devices"][0], iommu_group=each) for each in range(DEVICES)]
    user["at_risk"] = what == "at risk"
    if what == "not ready":
        there["readiness"] = [{"what": "iommu", "ready": False, "msg": "The IOMMU is off: turn it on."}]
    if what == "no iommufd":
        there["module"] = "absent"
    model = by_user if what == "at risk" else by_process
    bare = what in ("not ready", "no iommufd", "no VMs")
    result["processes"] = [vm(model, what, number, each) for each in range(0 if bare else vms)]
    return result


def vm(model: Row, what: str, host_number: int, number: int) -> Row:
    """One of its VMs, the first of which has what is the matter with the host."""
    made = {**copy.deepcopy(model), "name": f"vm{host_number}-{number}", "pid": 4242 + number}
    # What was not told yet when that was recorded.
    counter = {"user": "user", "process": "mm_locked"}[model["accounting"]]
    counted = {"counter": counter, "held_bytes": model["charged_bytes"], "headroom_bytes": model["headroom_bytes"]}
    made.update(holder=False, backends=["iommufd"], counter=counter, counters=[{**counted, "backends": ["iommufd"]}])
    if number == 0 and what == "over limit":
        made["headroom_bytes"] = -4096
    if number == 0 and what == "unknown":
        made.update(accounting=None, headroom_bytes=None, notes=["Its iommufds differ in their rlimit mode."])
    return made
