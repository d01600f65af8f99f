# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what came of a plan of the role iommufd_host, and what is left for the operator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import basename
from typing import Any, NamedTuple

from ..module_utils._errors import IommufdError
from ..module_utils._foreign import harmless
from ..module_utils._iommufd import NONE, USER
from ..module_utils._policy import POLICY_FILE
from ..module_utils._programs import LAUNCHER
from ._host_files import is_of_daemon, type_of, unit_with_drop_in
from ._host_info import NONSENSE, daemon_cure, daemon_is_barred, daemon_takers, nonsense

__all__ = ("host_result",)

Row = dict[str, Any]

# What the result has as the plan has it.
_OF_PLAN = ("state", "supported", "kernel", "requested", "strategy", "certain", "why", "access")

_ANEW = {
    "domain": "shut domain {name} off and start it again",
    "unit": "restart {unit}",
    None: "end it and start it again",
}


class Tried(NamedTuple):
    """What was tried on the live host; whether it is so, None where that is not known; and what shows that.

    `counts`: the strategy wants it so. `unproven`: it was tried, and nothing is known.
    """

    what: str
    ok: bool | None
    evidence: str
    counts: bool
    unproven: bool


def host_result(plan: Any, info: Any, applied: Any, check: Any, restarts: bool = False) -> Row:
    """The result, as the filter _host_result returns it. Raises IommufdError where it is not given what it takes."""
    if not all(isinstance(each, Mapping) for each in (plan, info, applied, check)):
        raise IommufdError("It takes a plan of _host_plan, and what the three modules of its options returned.")
    try:
        # The modules give printable texts. A host that is not to be trusted gives what it likes.
        return dict(harmless(_result(plan, info, applied, check, restarts)))
    except NONSENSE as exc:
        raise nonsense(exc) from exc


def _result(plan: Any, info: Any, applied: Any, check: Any, restarts: bool) -> Row:
    verified = [] if plan["state"] == "absent" else _verified(plan, check)
    wrong = [each for each in verified if each.counts and each.ok is False]
    unproven = [each for each in verified if each.counts and each.unproven]
    found = _found(plan, info, applied, check)
    pending = _pending(plan, info, applied["put_back"])
    libvirt = info["host"]["libvirt"]
    restart = _restart(plan, libvirt, applied, pending)
    todo = [f"{each['name']} (pid {each['pid']}): {each['todo']}" for each in pending]
    return {
        **{key: plan[key] for key in _OF_PLAN},
        "grants": [grant for grant in plan["grants"] if not _of_others(applied["capabilities"].get(grant["grantee"]))],
        "found": found,
        "verified": [{"what": each.what, "ok": each.ok, "evidence": each.evidence} for each in verified],
        "failed": [f"{each.what}: no ({each.evidence})." for each in wrong],
        "unproven": [f"{each.what}: that is not known ({each.evidence})." for each in unproven],
        "pending": pending,
        "todo": [
            *todo,
            *_todo_for_daemon(plan, libvirt, restarts),
            *([] if restarts or not _has_new_block(libvirt, applied) else _todo_for_daemons(restart["daemons"])),
            *_todo_for_launcher(applied["put_back"], applied["stranded"]),
            *_todo_for_policy(applied["put_back"]),
            *(_todo_for_found(found) if plan["chosen"] == "native" else []),
        ],
        "put_back": [each["text"] for each in applied["put_back"]],
        "restart": restart,
    }


def _todo_for_daemon(plan: Row, libvirt: Row, restarts: bool) -> list[str]:
    """What is left to do so that libvirt's daemon runs as its unit has it, and may set the mode."""
    unit, there = libvirt["unit"], plan["state"] == "present"
    if plan["mends_daemon"]:
        # Where it does not run, or the role may restart it, nothing is left to do.
        left = bool(libvirt["pid"]) and not restarts
        return [f"Restart {unit}, which starts no domain with iommufd before; VMs go on running meanwhile."] * left
    if there and daemon_is_barred(libvirt):
        return [daemon_cure(libvirt)]
    if not libvirt["supports_iommufd"] or not libvirt["needs_restart"] or not libvirt["cap_sys_resource"]:
        return []
    still = f"{unit} still runs with CAP_SYS_RESOURCE, which {daemon_takers(libvirt)} takes from it at its next start."
    if there:
        return [f"{still} From then on it starts no domain with iommufd, unless iommufd_host_libvirt_unit is true."]
    return [f"{still} Restart it; VMs go on running meanwhile."]


def _todo_for_daemons(daemons: list[str]) -> list[str]:
    return [
        f"Restart {unit}, which reads qemu.conf only when it starts; VMs go on running meanwhile." for unit in daemons
    ]


def _todo_for_launcher(put_back: list[Row], stranded: list[str]) -> list[str]:
    if stranded:
        return [
            f"{LAUNCHER} is not there, so these do not start any more: {', '.join(stranded)}. Set iommufd_host_launcher"
            " to true for this host and run the role again, or change their commands."
        ]
    if not any(each["path"] == LAUNCHER and each["gone"] for each in put_back):
        return []
    return [
        "iommufd-exec is gone, so a unit that has it in ExecStart= does not start any more. Where one has, set"
        " iommufd_host_launcher to true for this host and run the role again."
    ]


def _todo_for_policy(put_back: list[Row]) -> list[str]:
    if not any(each["path"] == POLICY_FILE and each["gone"] for each in put_back):
        return []
    # It is asked at each use of what is open.
    return [
        "The role's module of SELinux's policy is gone, and what it allowed is refused to VMs that run, too: shut off"
        " each domain that has opened its device nodes by itself, or that needs CAP_IPC_LOCK."
    ]


def _todo_for_found(found: list[Row]) -> list[str]:
    return [
        f"{each['grantee']} has CAP_IPC_LOCK, which libvirt does not need here: every user who may run it can pin all"
        f" memory. Take it away, if nothing else wants it: setcap -r {each['grantee']}."
        for each in found
        if each["grantee"].startswith("/")
    ]


def _found(plan: Row, info: Row, applied: Row, check: Row) -> list[Row]:
    """What somebody else has granted. `applied` knows the role's own grants, by which others' are told apart."""
    found = []
    for path, there in applied["capabilities"].items():
        if _of_others(there):
            found.append(
                {"privilege": "cap_ipc_lock", "grantee": path, "why": "The file had it before this role knew of it."}
            )
    # The information is from before what is put back was put back.
    known = {*_taken_from(applied["put_back"]), *plan["wanted"]["capabilities"]}
    known.update(there["real_path"] for there in applied["capabilities"].values())
    for emulator in info["host"]["qemu"]:
        if emulator["cap_ipc_lock"] and emulator["path"] not in known:
            why = "The file has it, and neither this run nor an earlier one granted it."
            found.append({"privilege": "cap_ipc_lock", "grantee": emulator["path"], "why": why})
    ours = {
        grant["grantee"]
        for grant in plan["grants"]
        if grant["means"] == "drop-in" and grant["privilege"] == "cap_ipc_lock"
    }
    for unit in check["units"]:
        if unit["ambient_ipc_lock"] and unit["name"] not in ours:
            why = "AmbientCapabilities of the unit has it, and this role did not put it there."
            found.append({"privilege": "cap_ipc_lock", "grantee": unit["name"], "why": why})
    return found


def _taken_from(put_back: list[Row]) -> list[str]:
    """The emulators that CAP_IPC_LOCK was taken from."""
    return [each["path"] for each in put_back if each["kind"] == "capability"]


def _dropped_in(changes: list[Row]) -> list[str]:
    """The units whose drop-in was changed."""
    units = [unit_with_drop_in(each["path"]) for each in changes if each["kind"] == "file"]
    return [unit for unit in units if unit is not None]


def _of_others(there: Row | None) -> bool:
    """Whether an emulator, as iommufd_host_apply returns it, has CAP_IPC_LOCK from somebody else."""
    return there is not None and there["ipc_lock"] and not there["ours"]


def _verified(plan: Row, check: Row) -> list[Tried]:
    """What was tried on the live host, and whether it came out as the strategy wants it."""
    granted = {grant["grantee"]: grant for grant in plan["grants"]}
    return [
        _mode(plan["user"] or "root", check["try_iommufd"]),
        *(_emulator(each, plan["user"], each["path"] in granted) for each in check["emulators"]),
        *(_policy(each, name) for each in (check["selinux"] or {"domains": []})["domains"] for name in plan["policy"]),
        *(tried for each in check["units"] for tried in _unit(each, granted.get(each["name"]))),
        *(
            _limit(f"A session of {each['user']}", each, granted[each["user"]]["value"])
            for each in check["users"]
            if each["user"] in granted
        ),
    ]


def _mode(user: str, tried: Row) -> Tried:
    what = f"The rlimit mode can be set for {user}, and read back"
    return _tried(what, tried, tried["ok"], f"mode {tried['mode']}")


def _emulator(emulator: Row, user: str, wanted: bool) -> Tried:
    started = emulator["started"]
    who = f"{emulator['path']}, started as {started['user'] or user},"
    return _capability(who, started, wanted, f"{started['how']} start, CapEff {started['effective']}")


def _policy(domain: Row, name: str) -> Tried:
    what = {"ipc_lock": "use CAP_IPC_LOCK", "opens": "open /dev/iommu"}[name]
    told = "the policy in force"
    return _tried(f"SELinux lets {type_of(domain['context'])} {what}", domain[name], domain[name]["ok"], told)


def _unit(unit: Row, grant: Row | None) -> list[Tried]:
    who, replica, what = f"A replica of {unit['name']}", unit["replica"], grant and grant["privilege"]
    rows = [_capability(who, replica, what == "cap_ipc_lock", f"CapEff {replica['effective']}")]
    return [*rows, _limit(who, replica, grant["value"])] if grant and what == "memlock" else rows


def _tried(what: str, tried: Row, ok: bool, evidence: str, counts: bool = True) -> Tried:
    known = tried["attempted"] and not tried["inconclusive"]
    told = tried["msg"] if not known or (not ok and tried["msg"]) else evidence
    return Tried(what, ok if known else None, told, counts, unproven=tried["attempted"] and not known)


def _capability(who: str, tried: Row, wanted: bool, evidence: str) -> Tried:
    ok = tried["effective"] is not None and tried["ok"] == wanted
    # A capability that was not granted here is others' to give, and is reported as found.
    return _tried(f"{who} has {'' if wanted else 'no '}CAP_IPC_LOCK", tried, ok, evidence, counts=wanted)


def _limit(who: str, tried: Row, wanted: int | None) -> Tried:
    limit = None if tried["memlock_unlimited"] else tried["memlock_bytes"]
    ok = limit is None or (wanted is not None and limit >= wanted)
    text = "unlimited" if wanted is None else f"{wanted} bytes"
    return _tried(f"{who} may lock {text}", tried, ok, "unlimited" if limit is None else f"{limit} bytes")


def _pending(plan: Row, info: Row, put_back: list[Row]) -> list[Row]:
    """The VMs that still run as they were started before."""
    rows = []
    ours = [grant["grantee"] for grant in plan["grants"] if grant["means"] == "drop-in"]
    for process in info["processes"]:
        why = _old(plan, process, info["host"]["qemu"], put_back)
        if why:
            name = process["domain"] or process["name"] or process["unit"] or process["comm"]
            in_unit = (process["unit"] or "").endswith(".service")
            kind = "domain" if process["domain"] else "unit" if in_unit else None
            todo = f"{why}: {_ANEW[kind].format(name=name, unit=process['unit'])}."
            row = {key: process[key] for key in ("pid", "domain", "unit", "accounting")}
            dropped_in = process["unit"] if any(_is_of(process["unit"], each) for each in ours) else None
            rows.append({**row, "name": name, "todo": todo, "dropped_in": dropped_in})
    return rows


def _is_of(unit: str | None, name: str) -> bool:
    """Whether a unit is the one of that name, or an instance of it where it is a template.

    An instance reaches systemctl, which takes some names for patterns, so it has nothing in it that no unit's has.
    """
    prefix, at, suffix = name.partition("@")
    if not at or suffix != ".service":
        return unit == name
    return unit is not None and bool(re.fullmatch(re.escape(prefix) + r"@[A-Za-z0-9:_.\\@-]+\.service", unit))


def _old(plan: Row, process: Row, qemu: list[Row], put_back: list[Row]) -> str:
    """Why a VM is not yet as the strategy has it; empty where it is, or the strategy has nothing for it."""
    if plan["strategy"] == "memlock" and _is_short(process, plan["grants"]):
        return f"It runs with a limit of {process['memlock_bytes']} bytes"
    if process["accounting"] == USER and _is_cured(plan, process):
        return "It is charged to its user together with that user's other VMs"
    if (
        process["accounting"] == NONE
        and not _would_have(process, plan["grants"])
        and _has_lost(process, plan, qemu, put_back)
    ):
        return "It keeps CAP_IPC_LOCK, which it would not get now, until it ends"
    return ""


def _has_lost(process: Row, plan: Row, qemu: list[Row], put_back: list[Row]) -> bool:
    """Whether a process that has CAP_IPC_LOCK has it from what is no more; by an earlier run, too."""
    files, units = _taken_from(put_back), _dropped_in(put_back)
    gives = {each["path"]: each["cap_ipc_lock"] for each in qemu}.get(process["emulator"], False)
    if gives is False:
        units += plan["bare_units"]
        # What libvirt starts has it from its file, and from nothing else.
        files += [process["emulator"]] if process["domain"] is not None and process["emulator"] else []
    taken = [{"grantee": each, "means": "file capability", "privilege": "cap_ipc_lock"} for each in files]
    taken += [{"grantee": each, "means": "drop-in", "privilege": "cap_ipc_lock"} for each in units]
    return _would_have(process, taken)


def _is_short(process: Row, grants: list[Row]) -> bool:
    """Whether a process has less than the limit that was raised for its user or unit."""
    raised = [
        each["value"]
        for each in grants
        if each["grantee"] == process["user"] or _is_of(process["unit"], each["grantee"])
    ]
    if not raised or process["memlock_unlimited"]:
        return False
    return raised[0] is None or process["memlock_bytes"] < raised[0]


def _is_cured(plan: Row, process: Row) -> bool:
    """Whether a process, were it started now, would not be charged to its user."""
    if plan["strategy"] == "native":
        return process["domain"] is not None
    return plan["strategy"] == "cap_ipc_lock" and _would_have(process, plan["grants"])


def _would_have(process: Row, grants: list[Row]) -> bool:
    """Whether a process would have one of these grants of CAP_IPC_LOCK, were it started now."""
    if process["user"] == "root":
        # It has the capability by itself.
        return False
    for grant in grants:
        if grant["privilege"] != "cap_ipc_lock":
            continue
        if grant["means"] == "drop-in" and _is_of(process["unit"], grant["grantee"]):
            return True
        # The kernel keeps 15 characters of a name.
        if grant["means"] == "file capability" and basename(grant["grantee"])[:15] == process["comm"]:
            return True
    return False


def _has_new_block(libvirt: Row, applied: Row) -> bool:
    """Whether what libvirt's daemon reads only when it starts was changed: now, by an earlier run, or somebody else."""
    changes = (*applied["put_back"], *applied["made"])
    return bool(libvirt["outdated"]) or any(each["kind"] == "block" for each in changes)


def _restart(plan: Row, libvirt: Row, applied: Row, pending: list[Row]) -> Row:
    """What reads anew only when it starts what was changed. Where a unit does not run, systemd leaves it alone."""
    # What the role has given the daemon by its unit, and takes away again.
    taken = any(is_of_daemon(each["path"]) for each in applied["put_back"]) and libvirt["taken_by"] != []
    taken = taken and libvirt["cap_sys_resource"] is not False
    stale = bool(libvirt["pid"]) and (_has_new_block(libvirt, applied) or plan["mends_daemon"] or taken)
    rewritten = [each for each in applied["made"] if each.get("content")]
    units = _dropped_in([*applied["put_back"], *rewritten])
    units += [each["dropped_in"] for each in pending if each["dropped_in"]]
    patterns = {unit.replace("@.service", "@*.service") for unit in units}
    return {"daemons": [libvirt["unit"]] if stale else [], "units": sorted(patterns)}
