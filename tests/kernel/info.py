# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module iommufd_info, and holds every answer against its documentation and against what the kernel says."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.virt.iommufd.plugins.modules import iommufd_info
from ansible_collections.virt.iommufd.tests.kernel.harness import CAPABILITIES, Answer, Vmm, run_apart, run_within
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

TYPES = {"str": str, "int": int, "bool": bool, "list": list, "dict": dict}
# The field before them says when they are null.
AS_ABOVE = [f"host.{each}" for each in ("device.owner", "device.group", "vfio_devices.owner", "vfio_devices.group")]
AS_ABOVE += ["host.options.rlimit_mode.settable"]
SUBSETS = {"host": ["host", "emulators"], "processes": ["processes"], "users": ["users"], "defined": ["defined"]}


@dataclass
class Field:
    """A return value as documented."""

    kind: str = ""
    elements: str = ""
    nullable: bool = False


def documented() -> dict[str, Field]:
    """The return values by their paths. There is no YAML in the guest: fields begin at every fourth column."""
    fields: dict[str, Field] = {}
    path: list[str] = []
    for line in iommufd_info.RETURN.splitlines():
        found = re.match(r"( *)(\w+):(?: (.*))?$", line)
        if found and len(found.group(1)) % 4 == 0:
            path[len(found.group(1)) // 4 :] = [found.group(2)]
        field = fields.setdefault(".".join(path), Field(nullable=".".join(path) in AS_ABOVE))
        field.nullable |= "V(null)" in line
        if found and found.group(2) == "type":
            field.kind = found.group(3)
        if found and found.group(2) == "elements":
            field.elements = found.group(3)
    return fields


FIELDS = documented()


def check_value(value: Any, path: str, kind: str, nullable: bool) -> None:
    if value is None:
        assert nullable, f"{path} is null, which is not documented"
        return
    # A boolean is an integer, to Python.
    assert isinstance(value, TYPES[kind]), (path, value)
    assert isinstance(value, bool) == (kind == "bool"), (path, value)
    if isinstance(value, str):
        assert value.isprintable(), (path, value)
    elif isinstance(value, list):
        for each in value:
            check_value(each, path, FIELDS[path].elements, nullable=False)
    elif isinstance(value, dict):
        inner = {each.rpartition(".")[2] for each in FIELDS if each.rpartition(".")[0] == path}
        assert set(value) <= inner, f"{path} has {set(value) - inner}, which is not documented"
        assert set(value) == inner or path == "host", f"{path} lacks {inner - set(value)}"
        for name, each in value.items():
            field = FIELDS[f"{path}.{name}"]
            check_value(each, f"{path}.{name}", field.kind, field.nullable)


def check_answer(answered: Answer, subset: list[str]) -> Answer:
    """Every field is documented, of the type that was documented, and printable; nothing is said to have changed."""
    assert not answered.get("failed"), answered
    assert answered["changed"] is False
    wanted = {name for name, of in SUBSETS.items() if set(of) & set(subset)} | {"host", "narrowed"}
    assert set(answered) - {"changed", "warnings", "invocation", "deprecations"} == wanted
    assert set(answered["host"]) == ({"limits_of_view"} if not set(subset) & {"host", "emulators"} else set_of_host())
    for name in wanted:
        check_value(answered[name], name, FIELDS[name].kind, nullable=False)
    return answered


def set_of_host() -> set[str]:
    return {each.split(".")[1] for each in FIELDS if re.fullmatch(r"host\.\w+", each)}


def look(subset: str = "processes users", **options: Any) -> Answer:
    """The module's answer to root. A subset that is not asked for costs no time."""
    subsets = subset.split()
    return check_answer(run(iommufd_info, gather_subset=subsets, **options), subsets)


def look_apart(prefix: list[str], subset: str = "processes users", **options: Any) -> Answer:
    """The same from a program of its own, started by the commands in prefix."""
    subsets = subset.split()
    return check_answer(run_apart(prefix, "iommufd_info", gather_subset=subsets, **options), subsets)


def look_within(prepare: Callable[[], object], subset: str = "processes users", **options: Any) -> Answer:
    """The same from a child of this process that has prepared itself."""
    subsets = subset.split()
    return check_answer(run_within(prepare, iommufd_info, gather_subset=subsets, **options), subsets)


def process(answered: Answer, pid: int) -> Answer:
    """The one row of a process."""
    rows: list[Answer] = [each for each in answered["processes"] if each["pid"] == pid]
    assert len(rows) == 1, answered
    return rows[0]


def user(answered: Answer, uid: int) -> Answer:
    """The one row of a user."""
    rows: list[Answer] = [each for each in answered["users"] if each["uid"] == uid]
    assert len(rows) == 1, answered
    return rows[0]


def limits(answered: Answer) -> dict[str, str]:
    """What could not be seen, and why."""
    found: dict[str, str] = {}
    for each in answered["host"]["limits_of_view"]:
        found[each["what"]] = found.get(each["what"], "") + each["why"]
    return found


def status_of(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    return {key: value.strip() for key, _colon, value in (line.partition(":") for line in text.splitlines())}


def check_process(row: Answer, pid: int) -> None:
    """Whatever has a plain source outside the module agrees with it."""
    status = status_of(pid)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    assert row["pid"] == pid
    assert row["uid"] == int(status["Uid"].split()[0])
    assert row["pinned_bytes"] == int(status["VmPin"].split()[0]) * 1024
    assert row["locked_bytes"] == int(status["VmLck"].split()[0]) * 1024
    assert row["memlock_bytes"] == (None if soft == resource.RLIM_INFINITY else soft)
    assert row["memlock_unlimited"] == (soft == resource.RLIM_INFINITY)
    assert row["memlock_hard_bytes"] == (None if hard == resource.RLIM_INFINITY else hard)
    assert row["memlock_hard_unlimited"] == (hard == resource.RLIM_INFINITY)
    assert row["no_new_privs"] == (status["NoNewPrivs"] == "1")
    for name, field in (("effective", "CapEff"), ("permitted", "CapPrm"), ("bounding", "CapBnd")):
        mask = int(status[field], 16)
        assert row["capabilities"][name] == [f"cap_{each}" for each, bit in CAPABILITIES.items() if mask >> bit & 1]


def check_counters(row: Answer) -> None:
    """The counters are those of `/proc`, and what is said of the charge is said of the one with the least headroom."""
    limit = row["memlock_bytes"]
    held = {"mm_locked": row["locked_bytes"], "mm_pinned": row["pinned_bytes"]}
    for each in row["counters"]:
        assert each["held_bytes"] == held.get(each["counter"], each["held_bytes"])
        assert each["headroom_bytes"] == (None if limit is None else limit - each["held_bytes"])
        assert each["backends"]
    if row["counter"] is None:
        assert row["headroom_bytes"] is None
        assert row["accounting"] in (None, "none") or not row["counters"]
        return
    [decisive] = [each for each in row["counters"] if each["counter"] == row["counter"]]
    assert row["headroom_bytes"] == decisive["headroom_bytes"]
    assert limit is None or row["headroom_bytes"] == min(each["headroom_bytes"] for each in row["counters"])


def look_at(vmm: Vmm) -> Answer:
    """The row of a process, which agrees with what the kernel and the process itself say."""
    row = process(look(), vmm.pid)
    check_process(row, vmm.pid)
    check_counters(row)
    itself = vmm.do("look")
    assert row["pinned_bytes"] == itself["vm_pin_kb"] * 1024
    assert row["locked_bytes"] == itself["vm_lck_kb"] * 1024
    return row
