# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what is to be remembered of a host, and what it takes to put it back.

All of it touches nothing.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Container

from ._capabilities import CAP_IPC_LOCK, parse_file_capabilities, with_ipc_lock, without_ipc_lock
from ._errors import IommufdError
from ._record import BLOCK, CAPABILITY, FILE, KINDS, NODE, RELOAD, SYSTEMD, UNIT, Item, Record
from ._states import BEGIN, END, FileState, split_block
from ._steps import (
    FollowRules,
    RemoveFile,
    RemoveUnfinished,
    SetCapability,
    SetNode,
    StartUnit,
    Step,
    StopUnit,
    WriteFile,
    reload_for,
    shown_capabilities,
    shown_content,
)
from ._systemd import UnitState
from ._wanted import View, Wanted, about

__all__ = (
    "gives_ipc_lock",
    "new_items",
    "steps_back",
)


def gives_ipc_lock(xattr: bytes | None) -> bool:
    """Whether a file gives CAP_IPC_LOCK on this host in any way. Raises IommufdError where the form is not known.

    What is for another user namespace was never granted here, and is left as it is.
    """
    given = parse_file_capabilities(xattr or b"")
    return not given.root_uid and CAP_IPC_LOCK in (*given.permitted, *given.inheritable)


def _is_wanted(item: Item, wanted: Wanted, view: View) -> bool:
    if item.kind == NODE:
        # A device that was unplugged is still meant by the pattern that it was found by.
        return any(item.path == each or fnmatch.fnmatchcase(item.path, each) for each in wanted.nodes)
    listed: dict[str, Container[str]] = {
        FILE: wanted.files,
        BLOCK: wanted.blocks,
        UNIT: wanted.units,
        CAPABILITY: [view.real[path] for path in wanted.capabilities],
    }
    return item.path in listed[item.kind]


def new_items(record: Record, wanted: Wanted, view: View) -> list[Item]:
    """What is wanted and not remembered yet, as it is now.

    An executable that has lost what was granted, as by an upgrade of its package, is remembered anew. One that has
    CAP_IPC_LOCK while the record knows nothing of it has it from somebody else, and is not remembered. Raises
    IommufdError where an executable could not get CAP_IPC_LOCK without more.
    """
    known = {item.key: item for item in record.items}
    found = [_new_file(FILE, path, record, view) for path in wanted.files]
    found += [_new_file(BLOCK, path, record, view) for path in wanted.blocks]
    for path in wanted.nodes:
        # What comes after its pattern was remembered has come under the caller's own rule: it was no such node before.
        if (NODE, path) not in known:
            found += [_new_node(each, view) for each in [path, *view.matches[path]]]
    found += [_new_unit(name, view.units[name]) for name in wanted.units]
    new = {item.key: item for item in found if item.key not in known}
    for path in view.real.values():
        with about(path):
            item = _new_capability(known.get((CAPABILITY, path)), path, view.xattrs.get(path))
        if item:
            new[item.key] = item
    return list(new.values())


def _new_file(kind: str, path: str, record: Record, view: View) -> Item:
    state = view.files[path]
    before = None if state is None else state.to_json() if kind == FILE else {}
    # A folder that another item has brought goes with the last of the items in it.
    others = {folder for item in record.items for folder in item.folders if path.startswith(f"{folder}/")}
    return Item(kind, path, before, tuple(sorted({*view.missing[path], *others}, key=len)))


def _new_node(path: str, view: View) -> Item:
    state = view.nodes.get(path)
    if state is None:
        return Item(NODE, path, None)
    # The kernel gives the next device whatever number is free, and its node the name.
    device = view.devices[path]
    return Item(NODE, path, {"mode": f"{state.mode:04o}", "uid": state.uid, "gid": state.gid, "device": device})


def _new_unit(name: str, unit: UnitState) -> Item:
    return Item(UNIT, name, {"enabled": unit.enabled, "active": unit.active} if unit.exists else None)


def _new_capability(known: Item | None, path: str, xattr: bytes | None) -> Item | None:
    if known and (gives_ipc_lock(xattr) or known.state == xattr):
        return None
    if not known and parse_file_capabilities(xattr or b"").lifts_memlock:
        return None
    # Raises where it cannot be granted alone.
    with_ipc_lock(xattr)
    return Item(CAPABILITY, path, {"xattr": None if xattr is None else xattr.hex()})


def steps_back(record: Record, wanted: Wanted, view: View) -> list[Step]:
    """What is to be done to put back whatever the record holds and nobody wants any more, in this order.

    The units first, since they might do again what is put back; the nodes after udev has read its rules again.
    Raises IommufdError where it cannot be told how.
    """
    gone = [item for item in reversed(record.items) if not _is_wanted(item, wanted, view)]
    of = {kind: [item for item in gone if item.kind == kind] for kind in KINDS}
    units = [_stop(item, view.units[item.path]) for item in of[UNIT]]
    files = [_file_back(item, view.files[item.path]) for item in of[FILE]]
    files += [_block_back(item, view.files[item.path]) for item in of[BLOCK]]
    capabilities = [_capability_back(item, view.xattrs) for item in of[CAPABILITY]]
    if any(step.effect for step in capabilities):
        units += _pauses([item.path for item in record.items if item.kind == UNIT and item not in gone], view)
    disabled = [SYSTEMD for step in units if isinstance(step.effect, StopUnit) and step.effect.disable]
    reload = reload_for(files, *record.due_for(RELOAD), *disabled)
    nodes = [step for item in of[NODE] for step in _nodes_back(item, record, view)]
    starts = [_start(item) for item in of[UNIT] if _was_in_use(item)]
    return [*units, *files, *capabilities, *reload, *nodes, *starts]


def _was_in_use(item: Item) -> bool:
    return item.state is not None and (item.state.enabled or item.state.active)


def _stop(item: Item, now: UnitState) -> Step:
    # The item of a unit that has to be started again stays until then.
    done = None if _was_in_use(item) else item
    if not (now.enabled or now.active):
        return Step(item.kind, item.path, item=done)
    effect = StopUnit(item.path, now.triggers, disable=True)
    after = now._replace(enabled=False, active=False)
    return Step(item.kind, item.path, effect, f"{item.path} is disabled and stopped.", str(now), str(after), done)


def _start(item: Item) -> Step:
    effect = StartUnit(item.path, item.state)
    return Step(item.kind, item.path, effect, f"{item.path} is {item.state} again.", after=str(item.state), item=item)


def _pauses(names: list[str], view: View) -> list[Step]:
    """Stops units that stay: they may be the ones that would grant again what is taken, by what their files say now."""
    return [
        Step(
            UNIT,
            name,
            StopUnit(name, view.units[name].triggers, disable=False),
            f"{name} is stopped until it is started with what it has to do now.",
            str(view.units[name]),
            str(view.units[name]._replace(active=False)),
        )
        for name in names
        if view.units[name].active
    ]


def _file_back(item: Item, now: FileState | None) -> Step:
    before: FileState | None = item.state
    content = "" if now is None else shown_content(now.content)
    if before is None:
        # Where the file is gone folders may be left: a run was cut off between them.
        says = "" if now is None else f"{item.path} is removed."
        return Step(item.kind, item.path, RemoveFile(item.path, item.folders), says, content, item=item)
    if now == before:
        return Step(item.kind, item.path, RemoveUnfinished(item.path), item=item)
    effect = WriteFile(item.path, before)
    return Step(
        item.kind, item.path, effect, f"{item.path} is what it was.", content, shown_content(before.content), item
    )


def _block_back(item: Item, now: FileState | None) -> Step:
    remove = RemoveFile(item.path, item.folders)
    untouched = Step(item.kind, item.path, RemoveUnfinished(item.path), item=item)
    if now is None:
        return Step(item.kind, item.path, remove, item=item) if item.before is None else untouched
    with about(item.path):
        block, rest = split_block(now.content)
    if block is None:
        return untouched
    # With nothing else in it, a file that was made for the block has no reader.
    effect = remove if item.before is None and not rest else WriteFile(item.path, now._replace(content=rest))
    # The rest of the file may hold a password, which nobody needs to see here.
    text = shown_content(b"\n".join((BEGIN, block + END, b"")))
    says = f"The block of iommufd_host is removed from {item.path}."
    return Step(item.kind, item.path, effect, says, text, item=item)


def _capability_back(item: Item, xattrs: dict[str, bytes | None]) -> Step:
    if item.path not in xattrs:
        return Step(item.kind, item.path, item=item)
    now = xattrs[item.path]
    with about(item.path):
        if now is None or now == item.state or not gives_ipc_lock(now):
            # Never granted, or lost since, as by an upgrade of the package.
            return Step(item.kind, item.path, item=item)
        # What somebody has added or taken away since stays so.
        xattr = item.state if now == _granted(item.state) else without_ipc_lock(now)
        sides = (shown_capabilities(now), shown_capabilities(xattr))
    says = f"CAP_IPC_LOCK is taken from {item.path}."
    return Step(item.kind, item.path, SetCapability(item.path, xattr), says, *sides, item)


def _granted(before: bytes | None) -> bytes | None:
    """What the attribute became when CAP_IPC_LOCK was granted; None where it could not be."""
    with contextlib.suppress(IommufdError):
        return with_ipc_lock(before)
    return None


def _nodes_back(item: Item, record: Record, view: View) -> list[Step]:
    rules = None
    if item.before is not None and view.devices.get(item.path) in (None, item.before.get("device")):
        aims = {item.path: item.state}
        says = "{} is open to the same ones as before: {}."
    else:
        own = {each.path for each in record.items if each.kind == NODE and each.before is not None} - {item.path}
        aims = {path: view.kernels_nodes[path] for path in view.matches[item.path] if path not in own}
        says = "{} is as the kernel and the rules of udev make it: {}, if there is no other rule."
        # Also where a run was cut off before.
        rules = FollowRules(tuple(aims)) if aims else None
    steps = []
    for path, aim in aims.items():
        now = view.nodes.get(path)
        if now not in (None, aim):
            steps.append(Step(NODE, path, SetNode(path, aim), says.format(path, aim), str(now), str(aim)))
    return [*steps, Step(item.kind, item.path, rules, item=item)]
