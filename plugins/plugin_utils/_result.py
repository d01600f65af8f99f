# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what came of a plan of the role iommufd_host, and what is left for the operator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import basename
from typing import Any

from ..module_utils._errors import IommufdError
from ..module_utils._foreign import harmless
from ._host_files import LAUNCHER, unit_with_drop_in

__all__ = ("host_result",)

Row = dict[str, Any]

_RESTART = {
    "domain": "shut domain {name} off and start it again",
    "unit": "restart {unit}",
    None: "end it and start it again",
}


def found_of(
    plan: Mapping[str, Any], info: Mapping[str, Any], applied: Mapping[str, Any], check: Mapping[str, Any]
) -> list[Row]:
    """What somebody else has granted. `applied` knows the role's own grants, by which others' are told apart."""
    found = []
    for path, there in applied["capabilities"].items():
        if _of_others(there):
            found.append({"what": "cap_ipc_lock", "to": path, "why": "The file had it before this role knew of it."})
    # The information is from before what is put back was put back.
    known = {*_taken_from(applied["put_back"]), *plan["wanted"]["capabilities"]}
    known.update(there["real_path"] for there in applied["capabilities"].values())
    for emulator in info["host"]["qemu"]:
        if emulator["cap_ipc_lock"] and emulator["path"] not in known:
            why = "The file has it, and neither this run nor an earlier one granted it."
            found.append({"what": "cap_ipc_lock", "to": emulator["path"], "why": why})
    ours = {grant["to"] for grant in plan["grants"] if grant["by"] == "drop-in" and grant["what"] == "cap_ipc_lock"}
    for unit in check["units"]:
        if unit["ambient_ipc_lock"] and unit["name"] not in ours:
            why = "AmbientCapabilities of the unit has it, and this role did not put it there."
            found.append({"what": "cap_ipc_lock", "to": unit["name"], "why": why})
    return found


def _taken_from(put_back: list[Row]) -> list[str]:
    """The emulators that CAP_IPC_LOCK was taken from."""
    return [each["path"] for each in put_back if each["kind"] == "capability"]


def _dropped_in(changes: list[Row]) -> list[str]:
    """The units whose drop-in was changed."""
    units = [unit_with_drop_in(each["path"]) for each in changes if each["kind"] == "file"]
    return [unit for unit in units if unit is not None]


def _of_others(there: Mapping[str, Any] | None) -> bool:
    """Whether an emulator, as iommufd_host_apply returns it, has CAP_IPC_LOCK from somebody else."""
    return there is not None and there["ipc_lock"] and not there["ours"]


def verified_of(plan: Mapping[str, Any], check: Mapping[str, Any]) -> list[Row]:
    """What was tried on the live host, and whether it came out as the strategy wants it."""
    rows = []
    scratch = check["scratch"]
    rows.append(
        _tried(
            f"The rlimit mode can be set for {plan['user'] or 'root'}, and read back",
            scratch,
            scratch["ok"],
            f"mode {scratch['mode']}",
        )
    )
    granted = {grant["to"]: grant for grant in plan["grants"]}
    for emulator in check["emulators"]:
        wanted = emulator["path"] in granted
        started = emulator["started"]
        who = started["user"] or plan["user"]
        evidence = f"{started['how']} start, CapEff {started['effective']}"
        rows.append(_capability(f"{emulator['path']}, started as {who},", started, wanted, evidence))
    for unit in check["units"]:
        grant, replica = granted.get(unit["name"], {"what": None}), unit["replica"]
        wanted = grant["what"] == "cap_ipc_lock"
        rows.append(_capability(f"A replica of {unit['name']}", replica, wanted, f"CapEff {replica['effective']}"))
        if grant["what"] == "memlock":
            rows.append(_limit(f"A replica of {unit['name']}", replica, grant["value"]))
    for user in check["users"]:
        if user["user"] in granted:
            rows.append(_limit(f"A session of {user['user']}", user, granted[user["user"]]["value"]))
    return rows


def _tried(what: str, tried: Mapping[str, Any], ok: bool, evidence: str, counts: bool = True) -> Row:
    known = tried["attempted"] and not tried["inconclusive"]
    told = tried["msg"] if not known or (not ok and tried["msg"]) else evidence
    unproven = tried["attempted"] and not known
    return {"what": what, "ok": ok if known else None, "evidence": told, "counts": counts, "unproven": unproven}


def _capability(who: str, tried: Mapping[str, Any], wanted: bool, evidence: str) -> Row:
    ok = tried["effective"] is not None and tried["ok"] == wanted
    # A capability that was not granted here is others' to give, and is reported as found.
    return _tried(f"{who} has {'' if wanted else 'no '}CAP_IPC_LOCK", tried, ok, evidence, counts=wanted)


def _limit(who: str, tried: Mapping[str, Any], wanted: int | None) -> Row:
    limit = None if tried["memlock_unlimited"] else tried["memlock_bytes"]
    ok = limit is None or (wanted is not None and limit >= wanted)
    text = "unlimited" if wanted is None else f"{wanted} bytes"
    return _tried(f"{who} may lock {text}", tried, ok, "unlimited" if limit is None else f"{limit} bytes")


def pending_of(plan: Mapping[str, Any], info: Mapping[str, Any], put_back: list[Row]) -> list[Row]:
    """The VMs that still run as they were started before."""
    rows = []
    for process in info["processes"]:
        why = _old(plan, process, put_back)
        if why:
            name = process["domain"] or process["name"] or process["unit"] or process["comm"]
            in_unit = (process["unit"] or "").endswith(".service")
            kind = "domain" if process["domain"] else "unit" if in_unit else None
            todo = f"{why}: {_RESTART[kind].format(name=name, unit=process['unit'])}."
            row = {key: process[key] for key in ("pid", "domain", "unit", "accounting")}
            ours = [grant["to"] for grant in plan["grants"] if grant["by"] == "drop-in"]
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


def _old(plan: Mapping[str, Any], process: Mapping[str, Any], put_back: list[Row]) -> str:
    """Why a VM is not yet as the strategy has it; empty where it is, or the strategy has nothing for it."""
    accounting, concerned = process["accounting"], False
    if plan["strategy"] == "memlock":
        raised = [
            grant["value"]
            for grant in plan["grants"]
            if grant["to"] == process["user"] or _is_of(process["unit"], grant["to"])
        ]
        wanted = raised[0] if raised else 0
        short = not process["memlock_unlimited"] and (wanted is None or process["memlock_bytes"] < wanted)
        if short:
            return f"It runs with a limit of {process['memlock_bytes']} bytes"
    elif plan["strategy"] == "native":
        concerned = process["domain"] is not None
    else:
        concerned = plan["strategy"] == "cap_ipc_lock" and _would_have(process, plan["grants"])
    if accounting == "user" and concerned:
        return "It is charged to its user together with that user's other VMs"
    taken = [{"to": each, "by": "file capability"} for each in _taken_from(put_back)]
    taken += [{"to": each, "by": "drop-in"} for each in _dropped_in(put_back)]
    if accounting == "none" and not plan["grants"] and _would_have(process, taken):
        return "It keeps CAP_IPC_LOCK, which was taken back, until it ends"
    return ""


def _would_have(process: Mapping[str, Any], grants: list[Row]) -> bool:
    """Whether a process would have one of these grants of CAP_IPC_LOCK, were it started now."""
    if process["user"] == "root":
        # It has the capability by itself.
        return False
    for grant in grants:
        if grant["by"] == "drop-in" and _is_of(process["unit"], grant["to"]):
            return True
        # The kernel keeps 15 characters of a name.
        if grant["by"] == "file capability" and basename(grant["to"])[:15] == process["comm"]:
            return True
    return False


def restart_of(info: Mapping[str, Any], applied: Mapping[str, Any], pending: list[Row]) -> Row:
    """What reads anew only when it starts what was changed. Where a unit does not run, systemd leaves it alone."""
    changes = [*applied["put_back"], *applied["made"]]
    libvirt = info["host"]["libvirt"]
    stale = bool(libvirt["pid"]) and any(each["kind"] == "block" for each in changes)
    rewritten = [each for each in applied["made"] if each.get("content")]
    units = _dropped_in([*applied["put_back"], *rewritten])
    units += [each["dropped_in"] for each in pending if each["dropped_in"]]
    patterns = {unit.replace("@.service", "@*.service") for unit in units}
    return {"daemons": [libvirt["unit"]] if stale else [], "units": sorted(patterns)}


def result(
    plan: Mapping[str, Any],
    info: Mapping[str, Any],
    applied: Mapping[str, Any],
    check: Mapping[str, Any],
    restarts: bool,
) -> Row:
    """The whole result, as the filter's RETURN describes it."""
    verified = verified_of(plan, check)
    failed = [
        f"{each['what']}: no ({each['evidence']})." for each in verified if each["ok"] is False and each["counts"]
    ]
    unproven = [
        f"{each['what']}: that is not known ({each['evidence']})."
        for each in verified
        if each["unproven"] and each["counts"]
    ]
    found = found_of(plan, info, applied, check)
    pending = pending_of(plan, info, applied["put_back"])
    todo = [f"{each['name']} (pid {each['pid']}): {each['todo']}" for each in pending]
    restart = restart_of(info, applied, pending)
    if not restarts:
        todo += [
            f"Restart {unit}, which reads qemu.conf only when it starts; VMs go on running meanwhile."
            for unit in restart["daemons"]
        ]
    if any(each["path"] == LAUNCHER and each["gone"] for each in applied["put_back"]):
        todo.append(
            "iommufd-exec is gone, so a unit that has it in ExecStart= does not start any more. Where one has, set"
            " iommufd_host_launcher to true for this host and run the role again."
        )
    if plan["strategy"] == "native":
        todo += [
            f"{each['to']} has CAP_IPC_LOCK, which libvirt does not need here: every user who may run it can pin all"
            f" memory. Take it away, if nothing else wants it: setcap -r {each['to']}."
            for each in found
            if each["to"].startswith("/")
        ]
    return {
        **{key: plan[key] for key in ("supported", "kernel", "requested", "strategy", "certain", "why", "access")},
        "grants": [grant for grant in plan["grants"] if not _of_others(applied["capabilities"].get(grant["to"]))],
        "found": found,
        "verified": [{key: each[key] for key in ("what", "ok", "evidence")} for each in verified],
        "failed": failed,
        "unproven": unproven,
        "pending": pending,
        "todo": todo,
        "put_back": [each["text"] for each in applied["put_back"]],
        "restart": restart,
    }


def host_result(plan: Any, info: Any, applied: Any, check: Any, restarts: bool = False) -> Row:
    """The result, as the filter _host_result returns it. Raises IommufdError where it is not given what it takes."""
    if not all(isinstance(each, Mapping) for each in (plan, info, applied, check)):
        raise IommufdError("It takes a plan of _host_plan, and what the three modules of its options returned.")
    try:
        # The modules give printable texts. A host that is not to be trusted gives what it likes.
        return dict(harmless(result(plan, info, applied, check, restarts)))
    except KeyError as exc:
        raise IommufdError(f"There is no {exc} in its input.") from exc
