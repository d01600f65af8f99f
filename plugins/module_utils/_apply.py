# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what it takes to make a host what it is to be. All of it touches nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from ._grant import attribute_for_grant
from ._policy import POLICY_FILE
from ._record import BLOCK, CAPABILITY, FILE, MODULE, NODE, RELABEL, RESTART, SELINUX, SYSTEMD, UDEV, UNIT
from ._states import BEGIN, END, FileState, NodeState, setting_of, split_block
from ._steps import (
    EnableUnit,
    FollowRules,
    Grant,
    LoadModule,
    Relabel,
    RemoveUnfinished,
    RunUnit,
    Step,
    StopUnit,
    WriteFile,
    reload_for,
    shown_capabilities,
    shown_content,
)
from ._systemd import UnitState
from ._wanted import View, Wanted, WantedFile, about

__all__ = (
    "after",
    "steps_on",
)

# Whose files are, by user and group.
_ROOT = 0
_ROOTS_GROUP = 0
# A file that there was none of, for a block.
_NEW = FileState(b"", 0o600, _ROOT, _ROOTS_GROUP)
_LABEL = "security.selinux"
_UNIT_FILES = "/etc/systemd/system"

_ACL = "cgroup_device_acl"
# What libvirt's QEMU driver allows where cgroup_device_acl is not set: qemu_cgroup.c, defaultDeviceACL.
_DEVICE_ACL = (
    "/dev/null",
    "/dev/full",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/dev/ptmx",
    "/dev/kvm",
    "/dev/userfaultfd",
)


def after(steps: list[Step], view: View) -> View:
    """What the host would look like once these steps were made, as far as it matters for what comes next."""
    units = dict(view.units)
    for step in steps:
        if isinstance(step.effect, StopUnit):
            now = units[step.path]
            units[step.path] = now._replace(active=False, enabled=now.enabled and not step.effect.disable)
    return replace(view, units=units)


def steps_on(wanted: Wanted, view: View, due: Iterable[tuple[str, str]] = ()) -> list[Step]:
    """What is to be done so that the host has what is wanted, in this order, and what is `due` since an earlier run.

    What grants anything by itself comes after all that it reads. Raises IommufdError where it cannot be told how.
    """
    modules = [_load(name) for name in wanted.modules if name not in view.modules]
    grants = [step for path in view.real.values() for step in _grant(path, view.xattrs.get(path))]
    files = [step for path, file in wanted.files.items() for step in _write(path, file, view)]
    files += [step for path, nodes in wanted.blocks.items() for step in _write_block(path, nodes, view)]
    units = [step for name in wanted.units for step in _enable(name, view.units[name])]
    runs = [step for name in wanted.units for step in _run(name, view.units[name], files, due)]
    told = [UDEV] if _nodes_without_rule(wanted, view) else []
    told += [SYSTEMD] if wanted.reload or units else []
    told += [SELINUX] if POLICY_FILE in wanted.files and not view.loaded else []
    reload = reload_for(files, *told)
    follow = Step(NODE, "device nodes", FollowRules(wanted.nodes))
    rules = [follow for step in reload if wanted.nodes and _tells(step, UDEV)]
    return [*modules, *grants, *files, *_relabel(files, view, due), *units, *reload, *rules, *runs]


def _tells(step: Step, whom: str) -> bool:
    return whom in getattr(step.effect, "whom", ())


def _load(name: str) -> Step:
    return Step(MODULE, name, LoadModule(name), f"The kernel module {name} is loaded.", after=f"{name}\n")


def _grant(path: str, xattr: bytes | None) -> list[Step]:
    with about(path):
        granted = attribute_for_grant(xattr)
    if granted is None:
        return []
    sides = (shown_capabilities(xattr), shown_capabilities(granted))
    return [Step(CAPABILITY, path, Grant(path), f"{path} has got CAP_IPC_LOCK.", *sides)]


def _write(path: str, file: WantedFile, view: View) -> list[Step]:
    now = view.files[path]
    # What else a file has, such as its label, is its own.
    state = (now or _NEW)._replace(content=file.content, mode=file.mode, uid=_ROOT, gid=_ROOTS_GROUP)
    if now == state:
        return _clean(FILE, path, view)
    sides = ("" if now is None else _shown(now, state), _shown(state, now))
    says = f"{path} is {'made' if now is None else 'written'}."
    return [Step(FILE, path, WriteFile(path, state, file.program), says, *sides)]


def _clean(kind: str, path: str, view: View) -> list[Step]:
    """Where a run was cut off, and nothing is to be written now."""
    return [Step(kind, path, RemoveUnfinished(path))] if path in view.unfinished else []


def _shown(state: FileState, other: FileState | None) -> str:
    """A file for the diff, with its owner and mode where they differ."""
    rights = NodeState(state.mode, state.uid, state.gid)
    differ = other is not None and rights != NodeState(other.mode, other.uid, other.gid)
    return (f"{rights}\n" if differ else "") + shown_content(state.content)


def _write_block(path: str, nodes: tuple[str, ...], view: View) -> list[Step]:
    now = view.files[path]
    with about(path):
        block, rest = split_block((now or _NEW).content)
    there = setting_of(rest.decode("utf-8", "backslashreplace"), _ACL) or _DEVICE_ACL
    text = _block(list(dict.fromkeys((*there, *nodes))))
    state = (now or _NEW)._replace(content=b"%s\n%s%s\n%s" % (BEGIN, text, END, rest))
    if now == state:
        return _clean(BLOCK, path, view)
    # The rest of the file may hold a password, which nobody needs to see here.
    sides = ("" if block is None else shown_content(block), shown_content(text))
    return [Step(BLOCK, path, WriteFile(path, state), f"{path} has the block of iommufd_host.", *sides)]


def _block(nodes: list[str]) -> bytes:
    lines = [
        "# libvirt takes the first setting of a name, which is this one. It holds what the next one does, too.",
        f"{_ACL} = [",
        *(f'  "{node}",' for node in nodes),
        "]",
    ]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def _relabel(files: list[Step], view: View, due: Iterable[tuple[str, str]]) -> list[Step]:
    """New files get the label of their place; those that were there keep theirs."""
    old = [path for what, path in due if what == RELABEL and view.files.get(path) is not None]
    new = [step.path for step in files if isinstance(step.effect, WriteFile) and _LABEL not in step.effect.state.xattrs]
    folders = [folder for path in new for folder in view.missing[path]]
    paths = tuple(dict.fromkeys((*folders, *new, *old)))
    return [Step(FILE, paths[-1], Relabel(paths))] if paths else []


def _nodes_without_rule(wanted: Wanted, view: View) -> list[str]:
    """The nodes that the rule is not in force for: a run that was cut off after it had written it has told nobody."""
    nodes = {path for pattern in wanted.nodes for path in view.matches[pattern]}
    return [path for path in sorted(nodes) if path in view.nodes and not _follows(view.nodes[path], wanted, view)]


def _follows(node: NodeState, wanted: Wanted, view: View) -> bool:
    same_mode = not wanted.mode or node.mode & 0o777 == int(wanted.mode, 8)
    return same_mode and view.gid in (None, node.gid)


def _enable(name: str, now: UnitState) -> list[Step]:
    if now.enabled:
        return []
    return [Step(UNIT, name, EnableUnit(name), f"{name} is enabled.", f"{now}\n", f"{now._replace(enabled=True)}\n")]


def _run(name: str, now: UnitState, files: list[Step], due: Iterable[tuple[str, str]]) -> list[Step]:
    rewritten = os.path.join(_UNIT_FILES, name) in {step.path for step in files if step.says}
    if now.active and not rewritten and (RESTART, name) not in due:
        return []
    says = f"{name} is started{' anew' if now.active else ''}."
    sides = (f"{now}\n", f"{now._replace(active=True)}\n") if not now.active else ("", "")
    return [Step(UNIT, name, RunUnit(name, now.active), says, *sides)]
