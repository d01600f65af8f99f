# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: from what iommufd_info returned for many hosts, a report as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..module_utils._accounting import LEGACY
from ..module_utils._errors import IommufdError
from ._audit_words import (
    DEFINED_UNSEEN,
    FAILED,
    FORECAST_UNKNOWN,
    NO_IOMMUFD,
    NO_IOMMUFD_BY_MODULE,
    NO_VMS,
    NO_VMS_SEEN,
    NOT_READY,
    OK,
    TROUBLES,
    UNKNOWN,
    UNREACHABLE,
    VERDICTS,
    counted,
)
from ._forecast import memlock_forecast
from ._host_info import NONSENSE, UNSEEN
from ._remedy import called, charges_user, pins_as_it_runs, remedy_of, verdict_of
from ._report_text import show_end, show_forecast, show_forecasts, show_host

__all__ = ("audit_report",)

Row = dict[str, Any]

# What the report has of memlock_forecast's answer on a VM.
FORECAST = ("vm", "kind", "manager", "user", "running", "autostart", "now", "reboot")


def describe_host(result: Any) -> Row:
    """What the report's data tells of a host, from whatever came back from it."""
    if not isinstance(result, Mapping):
        return without_answer(FAILED, "There is no result of this host.")
    for status in (UNREACHABLE, FAILED):
        if result.get(status):
            return without_answer(status, str(result.get("msg", "")))
    if result.get("skipped"):
        return without_answer(FAILED, "The task was skipped on this host.")
    if "processes" not in result:
        return without_answer(FAILED, "The result lacks processes: run virt.iommufd.iommufd_info with that subset.")
    host = result["host"]
    users = {user["uid"]: user for user in result.get("users", [])}
    libvirt = host.get("libvirt") or {}
    growing = {each["uid"] for each in result["processes"] if charges_user(each) and pins_as_it_runs(each)}
    vms, holders = [], []
    for process in result["processes"]:
        if process["holder"]:
            holders.append(describe_holder(process))
        else:
            vms.append(describe_vm(process, users, libvirt, process["uid"] in growing))
    limits = list(host["limits_of_view"])
    not_ready = [each for each in host.get("readiness") or () if each["ready"] is not True]
    hidden = any(limit["what"] in UNSEEN for limit in limits)
    status, (verdict, summary) = OK, sum_up(vms, hidden)
    module = host.get("module", "")
    if not vms and module in NO_IOMMUFD_BY_MODULE:
        status, verdict, summary = "no_iommufd", NO_IOMMUFD, NO_IOMMUFD_BY_MODULE[module]
    elif not vms and module is None:
        verdict, summary = UNKNOWN, f"{summary}; whether the kernel has iommufd is unknown"
    lacking = [each["what"] for each in not_ready if each["ready"] is False]
    if lacking and verdict != NO_IOMMUFD:
        verdict = NOT_READY if verdict == NO_VMS else verdict
        summary = f"{summary}; {NOT_READY}: {', '.join(lacking)}"
    return {
        "status": status,
        "msg": "",
        "limits_of_view": limits,
        "not_ready": not_ready,
        "vms": vms,
        "holders": holders,
        "verdict": verdict,
        "summary": summary,
    }


def without_answer(status: str, msg: str) -> Row:
    """What is told of a host that could not be looked at."""
    return {
        "status": status,
        "msg": msg,
        "limits_of_view": [],
        "not_ready": [],
        "vms": [],
        "holders": [],
        "verdict": status,
        "summary": f"{status}: {msg}" if msg else status,
    }


def describe_vm(
    process: Mapping[str, Any], users: Mapping[int, Any], libvirt: Mapping[str, Any], one_grows: bool
) -> Row:
    """What the report's data tells of a process. `users`: the rows of users, by their ids.

    `one_grows`: whether one that is charged to its user pins more as it runs.
    """
    name = name_of(process)
    user = users.get(process["uid"])
    verdict = verdict_of(process, user, one_grows)
    backends = process["backends"]
    # The legacy container counts in VmLck alone.
    locked = process["locked_bytes"] if LEGACY in (backends or ()) else 0
    return {
        "vm": name,
        "pid": process["pid"],
        "user": called(process),
        "backends": None if backends is None else list(backends),
        "accounting": process["accounting"],
        "counter": process["counter"],
        "pinned_bytes": max(process["pinned_bytes"], locked),
        "limit_bytes": process["memlock_bytes"],
        "limit_unlimited": process["memlock_unlimited"],
        "headroom_bytes": process["headroom_bytes"],
        "verdict": verdict,
        "remedy": remedy_of(verdict, process, user, libvirt),
        "notes": list(process["notes"]),
    }


def describe_holder(process: Mapping[str, Any]) -> Row:
    """What it tells of one that is no VM, but has copies of what a VM has."""
    backends = process["backends"]
    return {
        # Its command line may have the name of a guest, which it has started.
        "name": itself(process),
        "pid": process["pid"],
        "user": called(process),
        "backends": None if backends is None else list(backends),
    }


def name_of(process: Mapping[str, Any]) -> str:
    return next(filter(None, (process[field] for field in ("domain", "name", "unit"))), itself(process))


def itself(process: Mapping[str, Any]) -> str:
    return f"{process['comm']} ({process['pid']})"


def sum_up(vms: list[Row], hidden: bool) -> tuple[str, str]:
    """The verdict on a host, and a few words on it. `hidden`: there may be VMs that were not seen."""
    if not vms:
        return (UNKNOWN, NO_VMS_SEEN) if hidden else (NO_VMS, NO_VMS)
    groups = []
    for verdict in VERDICTS:
        names = [vm["vm"] for vm in vms if vm["verdict"] == verdict]
        named = f": {', '.join(names)}" if verdict in TROUBLES else ""
        groups += [f"{len(names)} {verdict}{named}"] if names else []
    worst = min((vm["verdict"] for vm in vms), key=VERDICTS.index)
    return worst, f"{counted(len(vms), 'VM')}, {'; '.join(groups)}" + ("; there may be more" if hidden else "")


def describe_forecast(result: Any, host: Row) -> Row:
    """What the report's data tells of the VMs that are defined on a host, from whatever came back from it."""
    if host["status"] in (FAILED, UNREACHABLE):
        return without_forecast(host["msg"], host["summary"])
    try:
        told = memlock_forecast(result)
        hidden = any(limit["what"] in DEFINED_UNSEEN for limit in result["host"]["limits_of_view"])
        counts = {kind: told[kind] for kind in ("now", "reboot")}
        vms = [{name: value for name, value in vm.items() if name in FORECAST} for vm in told["vms"]]
    except (IommufdError, *NONSENSE) as exc:
        msg = str(exc) if isinstance(exc, IommufdError) else f"What is defined makes no sense ({exc!r:.100})."
        return without_forecast(msg, f"{FORECAST_UNKNOWN}: {msg}")
    kind = "now" if counts["now"]["at_most"] and not counts["reboot"]["at_most"] else "reboot"
    summary = counts[kind]["summary"] + ("; there may be more" if hidden else "")
    trouble = hidden or counts[kind]["at_most"] > 0
    return {"msg": "", "vms": vms, **counts, "trouble": trouble, "summary": summary}


def without_forecast(msg: str, summary: str) -> Row:
    """What is told where nothing is known of what is defined."""
    return {"msg": msg, "vms": [], "now": None, "reboot": None, "trouble": True, "summary": summary}


def tell(name: str, result: Any, forecast: bool) -> tuple[Row, list[str]]:
    """What is told of one host, as data and as text. A result that makes no sense spoils the report of no other."""
    try:
        host = describe_host(result)
        lines = show_host(name, host)
    except NONSENSE as exc:
        msg = f"The result is not what this version of virt.iommufd.iommufd_info returns ({exc!r:.100})."
        host = without_answer(FAILED, msg)
        lines = show_host(name, host)
    if not forecast:
        return host, lines
    host = {**host, "forecast": describe_forecast(result, host)}
    # The last line is an empty one.
    return host, [*lines[:-1], *show_forecast(host), *lines[-1:]]


def audit_report(results: Any, forecast: Any = False) -> Row:
    """The report, as the filter of that name returns it. Raises IommufdError where it is not given what it takes."""
    if not isinstance(results, Mapping):
        raise IommufdError(
            "The input is not a dictionary: give it the names of hosts with what"
            " virt.iommufd.iommufd_info returned for each."
        )
    if not isinstance(forecast, bool):
        raise IommufdError(f"forecast: {forecast!r:.60} is neither true nor false.")
    told = {str(name): tell(name, result, forecast) for name, result in results.items()}
    hosts = {name: host for name, (host, _lines) in told.items()}
    end = show_end(hosts, show_forecasts(hosts) if forecast else [])
    return {"hosts": hosts, "lines": [*(line for _host, lines in told.values() for line in lines), *end], "end": end}
