# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter audit_report: from what iommufd_info returned for many hosts, a report as data and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import wrap
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.virt.iommufd.plugins.module_utils._size import human_size
from ansible_collections.virt.iommufd.plugins.plugin_utils._views import UNSEEN

DOCUMENTATION = r"""
name: audit_report
short_description: Report how the running VMs of many hosts are accounted
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Makes a report of what M(virt.iommufd.iommufd_info) returned for each of many hosts, as data and as text.
  - The playbook C(virt.iommufd.audit) prints and writes this report.
options:
  _input:
    description:
      - The names of hosts, and for each what a task with M(virt.iommufd.iommufd_info) registered, also a failure.
      - Its O(virt.iommufd.iommufd_info#module:gather_subset) must have V(processes), and should have V(host) and
        V(users), as by default.
    type: dict
    required: true
notes:
  - In the text, everything but printable ASCII is escaped, so that no name of a VM can fool a terminal. A text that is
    too long for its column ends with C(...). The data holds it in full.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Returns what this filter takes, and explains the numbers.
  - plugin: virt.iommufd.memlock_fit
    plugin_type: filter
    description: Predicts whether one more VM would fit on one host.
"""

EXAMPLES = r"""
- name: Report how the VMs of all hypervisors are accounted
  hosts: hypervisors
  become: true
  gather_facts: false
  tasks:
    - name: Look at the host
      virt.iommufd.iommufd_info:
      register: info
      ignore_errors: true
      ignore_unreachable: true

    - name: Report what was found
      ansible.builtin.debug:
        msg: >-
          {{ (dict(ansible_play_hosts_all | zip(ansible_play_hosts_all | map('extract', hostvars, 'info')))
             | virt.iommufd.audit_report).lines }}
      run_once: true
"""

RETURN = r"""
_value:
  description: The report.
  type: dict
  contains:
    hosts:
      description: The report as data, by the name of the host.
      type: dict
      contains:
        status:
          description:
            - V(ok) for a host that the module could look at, V(failed) or V(unreachable) for another.
            - V(no_iommufd) for one whose kernel has no iommufd, or has not loaded its module.
          type: str
          sample: ok
        msg:
          description: Why the module could not look at the host; empty if it could.
          type: str
          sample: ""
        limits_of_view:
          description: What was not seen there, as in RV(virt.iommufd.iommufd_info#module:host.limits_of_view).
          type: list
          elements: dict
        vms:
          description: The processes that hold an iommufd, or may hold one.
          type: list
          elements: dict
          contains:
            vm:
              description: Its libvirt domain, else what it calls its guest, else its systemd unit, else its name.
              type: str
              sample: vm1
            pid:
              description: Its process id.
              type: int
              sample: 4242
            user:
              description: The name of its user, or the id where that has none.
              type: str
              sample: libvirt-qemu
            accounting:
              description: Who is charged for what it pins, V(user), V(process) or V(none); V(null) if unknown.
              type: str
              sample: user
            pinned_bytes:
              description: The memory that it has pinned.
              type: int
              sample: 67371008
            limit_bytes:
              description: Its soft limit RLIMIT_MEMLOCK; V(null) where it is unlimited.
              type: int
              sample: 104857600
            limit_unlimited:
              description: Whether that limit is unlimited.
              type: bool
              sample: false
            headroom_bytes:
              description: How much more it could pin; V(null) where nothing limits it, and where that is unknown.
              type: int
              sample: 37486592
            verdict:
              description:
                - V(over limit) where more is charged than its limit allows, so that it cannot pin anything more.
                - V(at risk) where it is charged to its user, and another VM as large as the user's largest would not
                  fit.
                - V(unknown) where its accounting is unknown, or whether another VM would fit.
                - V(not limited) where nothing limits it, because it has CAP_IPC_LOCK or its limit is unlimited.
                - V(ok) otherwise. What is charged is within its limit.
              type: str
              sample: at risk
            notes:
              description: What makes these values uncertain, in sentences.
              type: list
              elements: str
              sample: []
        verdict:
          description:
            - The first of V(over limit), V(at risk), V(unknown), V(ok) and V(not limited) that one of its VMs has.
            - V(no VMs) where it has none, or V(unknown) where it may have some that were not seen.
            - V(no iommufd), V(failed) or V(unreachable) as in RV(_value.hosts.status).
          type: str
          sample: at risk
        summary:
          description: The same in a few words.
          type: str
          sample: "3 VMs, 2 at risk: vm1, vm2; 1 not limited"
    lines:
      description: The report as text, a table for each host and then a line for each, none longer than 72 characters.
      type: list
      elements: str
      sample:
        - kvm1
        - VM   user          accounting  pinned  limit  headroom  verdict
        - vm1  libvirt-qemu  user         64.2M   100M     35.8M  at risk
        - ""
        - "kvm1: 1 VM, 1 at risk: vm1"
"""

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
        "verdict": judge(process, at_risk),
        "notes": list(process["notes"]),
    }


def judge(process: Mapping[str, Any], at_risk: Mapping[int, bool | None]) -> str:
    if process["accounting"] is None:
        return UNKNOWN
    if process["headroom_bytes"] is None:
        return NOT_LIMITED
    if process["headroom_bytes"] < 0:
        return OVER_LIMIT
    # Without the subset users there is no word on that.
    risk = at_risk.get(process["uid"], False) if process["accounting"] == "user" else False
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
    """The filter."""
    if not isinstance(results, Mapping):
        raise AnsibleFilterError(
            "audit_report: The input is not a dictionary: give it the names of hosts with what"
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


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"audit_report": audit_report}
