# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: from what iommufd_info returned for many hosts, a report as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from ..module_utils._errors import IommufdError
from ..module_utils._iommufd import USER
from ..module_utils._size import human_size
from ._host_info import UNSEEN

__all__ = ("audit_report",)

# Printed by Ansible as YAML, a line is set in by six columns, and may be quoted: that fits a terminal of 80.
WIDTH = 72

OVER_LIMIT = "over limit"
AT_RISK = "at risk"
UNKNOWN = "unknown"
OK = "ok"
NOT_LIMITED = "not limited"

# The verdicts on VMs, the worst first.
VERDICTS = (OVER_LIMIT, AT_RISK, UNKNOWN, OK, NOT_LIMITED)

NO_IOMMUFD = {"absent": "no iommufd in this kernel", "loadable": "iommufd is not loaded"}

HEADER = ("VM", "user", "accounting", "pinned", "limit", "headroom", "verdict")
NUMBERS = ("pinned", "limit", "headroom")

Row = dict[str, Any]


def describe_host(result: Any) -> Row:
    """What the report's data tells of a host, from whatever came back from it."""
    if not isinstance(result, Mapping):
        return without_answer("failed", "There is no result of this host.")
    for status in ("unreachable", "failed"):
        if result.get(status):
            return without_answer(status, str(result.get("msg", "")))
    if result.get("skipped"):
        return without_answer("failed", "The task was skipped on this host.")
    if "processes" not in result:
        return without_answer("failed", "The result lacks processes: run virt.iommufd.iommufd_info with that subset.")
    at_risk = {user["uid"]: user["at_risk"] for user in result.get("users", [])}
    vms = [describe_vm(process, at_risk) for process in result["processes"]]
    limits = list(result["host"]["limits_of_view"])
    hidden = any(limit["what"] in UNSEEN for limit in limits)
    host = result["host"]
    status, (verdict, summary) = "ok", sum_up(vms, hidden)
    if not vms and host.get("module", "") in NO_IOMMUFD:
        status, verdict, summary = "no_iommufd", "no iommufd", NO_IOMMUFD[host["module"]]
    elif not vms and host.get("module", "") is None:
        verdict, summary = UNKNOWN, f"{summary}; whether the kernel has iommufd is unknown"
    return {"status": status, "msg": "", "limits_of_view": limits, "vms": vms, "verdict": verdict, "summary": summary}


def without_answer(status: str, msg: str) -> Row:
    """What is told of a host that could not be looked at."""
    summary = f"{status}: {msg}" if msg else status
    return {"status": status, "msg": msg, "limits_of_view": [], "vms": [], "verdict": status, "summary": summary}


def describe_vm(process: Mapping[str, Any], at_risk: Mapping[int, bool | None]) -> Row:
    """What the report's data tells of a process; `at_risk`: of users, whether the next VM would not fit, if known."""
    called = (process[field] for field in ("domain", "name", "unit"))
    return {
        "vm": next(filter(None, called), f"{process['comm']} ({process['pid']})"),
        "pid": process["pid"],
        "user": process["user"] or str(process["uid"]),
        "accounting": process["accounting"],
        "pinned_bytes": process["pinned_bytes"],
        "limit_bytes": process["memlock_bytes"],
        "limit_unlimited": process["memlock_unlimited"],
        "headroom_bytes": process["headroom_bytes"],
        "verdict": verdict_of(process, at_risk),
        "notes": list(process["notes"]),
    }


def verdict_of(process: Mapping[str, Any], at_risk: Mapping[int, bool | None]) -> str:
    if process["accounting"] is None:
        return UNKNOWN
    if process["headroom_bytes"] is None:
        return NOT_LIMITED
    if process["headroom_bytes"] < 0:
        return OVER_LIMIT
    # Without the subset users there is no word on that.
    risk = at_risk.get(process["uid"], False) if process["accounting"] == USER else False
    return UNKNOWN if risk is None else AT_RISK if risk else OK


def sum_up(vms: list[Row], hidden: bool) -> tuple[str, str]:
    """The verdict on a host, and a few words on it. `hidden`: there may be VMs that were not seen."""
    if not vms:
        return (UNKNOWN, "no VMs seen, but not all processes could be looked at") if hidden else ("no VMs", "no VMs")
    groups = []
    for verdict in VERDICTS:
        names = [vm["vm"] for vm in vms if vm["verdict"] == verdict]
        named = f": {', '.join(names)}" if verdict in (OVER_LIMIT, AT_RISK, UNKNOWN) else ""
        groups += [f"{len(names)} {verdict}{named}"] if names else []
    worst = min((vm["verdict"] for vm in vms), key=VERDICTS.index)
    count = f"{len(vms)} VM{'s' if len(vms) > 1 else ''}"
    return worst, f"{count}, {'; '.join(groups)}" + ("; there may be more" if hidden else "")


def plain(text: Any) -> str:
    """A text as one line that moves no cursor: space is a blank, and the rest is printable ASCII or escaped."""
    words = " ".join(str(text).split())
    return "".join(char if " " <= char <= "~" else char.encode("unicode_escape").decode("ascii") for char in words)


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def show_host(name: str, host: Row) -> list[str]:
    """The table of a host, or what is told in its place, and below it what is uncertain."""
    texts = [f"{vm['vm']}: {note}" for vm in host["vms"] for note in vm["notes"]]
    texts += [f"Not all seen ({limit['what']}): {limit['why']}" for limit in host["limits_of_view"]]
    lines = show_vms(host["vms"]) if host["vms"] else wrap(plain(host["summary"]), WIDTH)
    return [cut(plain(name), WIDTH), *lines, *(line for text in texts for line in wrap(plain(text), WIDTH)), ""]


def sum_up_host(name: str, host: Row) -> str:
    """A line on a host, in which a long name leaves room for what is told."""
    summary = plain(host["summary"])
    return cut(f"{cut(plain(name), max(WIDTH // 2, WIDTH - len(summary) - len(': ')))}: {summary}", WIDTH)


def show_vms(vms: list[Row]) -> list[str]:
    """A table, in which the names of VMs and users make room for the other columns."""
    rows = [HEADER, *(show_vm(vm) for vm in vms)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    room = WIDTH - sum(widths[2:]) - len("  ") * (len(HEADER) - 1)
    widths[1] = min(widths[1], max(room - widths[0], room // 2))
    widths[0] = min(widths[0], room - widths[1])
    lines = []
    for row in rows:
        cells = (
            cut(cell, width).rjust(width) if title in NUMBERS else cut(cell, width).ljust(width)
            for cell, width, title in zip(row, widths, HEADER)
        )
        lines.append(cut("  ".join(cells).rstrip(), WIDTH))
    return lines


def show_vm(vm: Row) -> tuple[str, ...]:
    return (
        plain(vm["vm"]),
        plain(vm["user"]),
        plain(vm["accounting"] or "?"),
        short_size(vm["pinned_bytes"]),
        "none" if vm["limit_unlimited"] else short_size(vm["limit_bytes"]),
        "-" if vm["headroom_bytes"] is None else short_size(vm["headroom_bytes"]),
        vm["verdict"],
    )


def short_size(count: int) -> str:
    """A size as in a unit's LimitMEMLOCK=, such as "64.2M"."""
    number, unit = human_size(count).split()
    return number + unit[0].rstrip("b")


def tell(name: str, result: Any) -> tuple[Row, list[str]]:
    """What is told of one host, as data and as text. A result that makes no sense spoils the report of no other."""
    try:
        host = describe_host(result)
        return host, show_host(name, host)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as exc:
        msg = f"The result is not what this version of virt.iommufd.iommufd_info returns ({exc!r:.100})."
        host = without_answer("failed", msg)
        return host, show_host(name, host)


def audit_report(results: Any) -> Row:
    """The report, as the filter of that name returns it. Raises IommufdError where its input is no dictionary."""
    if not isinstance(results, Mapping):
        raise IommufdError(
            "The input is not a dictionary: give it the names of hosts with what"
            " virt.iommufd.iommufd_info returned for each."
        )
    told = {str(name): tell(name, result) for name, result in results.items()}
    return {
        "hosts": {name: host for name, (host, _lines) in told.items()},
        "lines": [
            *(line for _host, lines in told.values() for line in lines),
            *(sum_up_host(name, host) for name, (host, _lines) in told.items()),
        ],
    }
