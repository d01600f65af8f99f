#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_host_apply
short_description: "[INTERNAL] Make a host as the role iommufd_host wants it, and put back what is not wanted"
description:
  - Only the role P(virt.iommufd.iommufd_host#role) uses this module. Its options and return values may change at any
    time.
  - First, it puts back everything that is recorded and not listed any more. Then it records how the rest is, and makes
    what is listed. With nothing listed, it puts everything back, and removes the record. Kernel modules stay loaded.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  modules:
    description: Kernel modules to load.
    type: list
    elements: str
    default: []
  files:
    description: Regular files to write as a whole. They belong to root. A file of more than 1 MiB is refused.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The path.
        type: path
        required: true
      content:
        description: The text of the file, which gets the mode 0644.
        type: str
      program:
        description: The program of this collection to install. It has to start before it gets its name.
        type: str
        choices: [iommufd-exec, iommufd-host-grant]
  capabilities:
    description: Executables that get CAP_IPC_LOCK as a file capability. Symbolic links are followed.
    type: list
    elements: path
    default: []
  nodes:
    description: Device nodes that a udev rule among O(files) changes, as paths. The last part may be a pattern.
    type: list
    elements: path
    default: []
  group:
    description: The group that the rule gives to O(nodes). If empty, any will do.
    type: str
    default: ""
  mode:
    description: The mode that the rule gives to O(nodes), octal. If empty, any will do.
    type: str
    default: ""
  blocks:
    description: Configuration files of libvirt's QEMU driver that get a block which sets C(cgroup_device_acl).
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The path.
        type: path
        required: true
      devices:
        description: Device nodes to add to those that the file or libvirt names already.
        type: list
        elements: str
        required: true
  units:
    description: systemd units, with files among O(files), to enable and start.
    type: list
    elements: str
    default: []
  reload:
    description: Whether systemd is to read its files again in any case.
    type: bool
    default: false
  record:
    description: The file that holds the record. Only root may be able to write it, and all folders above it.
    type: path
    default: /var/lib/iommufd_host/record.json
extends_documentation_fragment:
  - virt.iommufd._attributes
attributes:
  check_mode:
    details:
      - Whether a program starts is not tried.
  diff_mode:
    details:
      - Of a file with a block, the diff shows the block alone.
requirements:
  - Python 3.9 or later with C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
  - For O(units), systemd. For O(nodes), udev. For O(modules), C(modprobe). For a module of SELinux's policy among
    O(files), C(semodule) and C(restorecon).
notes:
  - B(Privilege.) It takes root.
  - B(Others' folders.) A path is refused where somebody else than root can write a folder or link on the way, or what
    root takes from the file there.
  - B(Cut off.) The record is written before anything is changed, so the next run makes good a run that was cut off.
  - B(Executables.) What somebody else has granted is reported, and never taken away. An executable whose other file
    capabilities are not effective, or are for another user namespace, is refused.
"""

EXAMPLES = r"""
- name: Put the host back as it was
  virt.iommufd.iommufd_host_apply:
"""

RETURN = r"""
put_back:
  description: What was put back, or in check mode would be.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: V(file), V(capability), V(node), V(block), V(unit) or V(module).
      type: str
    path:
      description: The path with symbolic links followed, or the name of the unit or module.
      type: str
    text:
      description: The same for people, a sentence.
      type: str
    gone:
      description: Whether it is a file that is no more.
      type: bool
made:
  description: What was made as wanted, or in check mode would be.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: V(file), V(capability), V(node), V(block), V(unit) or V(module).
      type: str
    path:
      description: The path with symbolic links followed, or the name of the unit or module.
      type: str
    text:
      description: The same for people, a sentence.
      type: str
    content:
      description: Of a file, whether it held something else before.
      type: bool
    before:
      description: What a file held. V(null) where there was none, or no text of 64 KiB at most.
      type: str
recorded:
  description: What this run recorded, or in check mode would record.
  returned: on success
  type: list
  elements: dict
  contains:
    kind:
      description: V(file), V(capability), V(node), V(block), V(unit) or V(module).
      type: str
    path:
      description: The path with symbolic links followed, or the name of the unit or module.
      type: str
remembered:
  description: Everything that the record holds now, or in check mode would hold, the oldest first.
  returned: on success, and where something could not be put back
  type: list
  elements: dict
  contains:
    kind:
      description: V(file), V(capability), V(node), V(block), V(unit) or V(module).
      type: str
    path:
      description: The path with symbolic links followed, or the name of the unit or module.
      type: str
    before:
      description: How it was. V(null) where there was nothing. The content of a file is left out.
      type: dict
capabilities:
  description: Each of O(capabilities) as it is now, or in check mode would be. C(ours) is whether the record has it.
  returned: on success
  type: dict
  sample: {/usr/bin/kvm: {real_path: /usr/bin/qemu-system-x86_64, ipc_lock: true, ours: true}}
stranded:
  description: Services whose files start C(/usr/local/bin/iommufd-exec), where that is not there.
  returned: on success
  type: list
  elements: str
"""

import os
from typing import NoReturn

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._apply import after, steps_on
from ..module_utils._capabilities import parse_file_capabilities, with_ipc_lock
from ..module_utils._command import run_command
from ..module_utils._errors import IommufdError, error_text, shown_path
from ..module_utils._module import Row, finish
from ..module_utils._names import group_name, owner_name
from ..module_utils._policy import SEMODULE
from ..module_utils._programs import LAUNCHER, PROGRAMS, find_services_with, zipapp
from ..module_utils._record import CAPABILITY, FILE, NODE, Item, Record, check_caller, lock_record
from ..module_utils._states import FileState, NodeState
from ..module_utils._steps import Grant, RemoveFile, Step, StepFailed, WriteFile, make_steps, note_due
from ..module_utils._systemd import Run
from ..module_utils._undo import new_items, steps_back
from ..module_utils._wanted import View, Wanted, WantedFile, check_path, look_at_host

# It compiles the whole policy: ten seconds on most hosts.
POLICY_SECONDS = 600

# What is longer is no file that a role writes, and nobody compares it.
CONTENT_MAX = 2**16


def wanted_by(params: Row) -> Wanted:
    """What the task lists. Raises IommufdError."""
    files = {each["path"]: wanted_file(each) for each in params["files"]}
    wanted = Wanted(
        modules=tuple(dict.fromkeys(params["modules"])),
        files=files,
        capabilities=tuple(dict.fromkeys(params["capabilities"])),
        nodes=tuple(dict.fromkeys(params["nodes"])),
        group=params["group"],
        mode=params["mode"],
        blocks={each["path"]: tuple(each["devices"]) for each in params["blocks"]},
        units=tuple(dict.fromkeys(params["units"])),
        reload=params["reload"],
    )
    wanted.check()
    return wanted


def wanted_file(given: Row) -> WantedFile:
    """A file as it is to be."""
    if given["program"] is not None:
        return WantedFile(zipapp(given["program"]), 0o755, program=True)
    return WantedFile(given["content"].encode("utf-8", "surrogateescape"), 0o644)


def owners(state: FileState | NodeState) -> Row:
    """Mode, owner and group."""
    return {"mode": f"{state.mode:04o}", "owner": owner_name(state.uid), "group": group_name(state.gid)}


def text_of(content: bytes) -> str | None:
    """The content as text; None where it is none, or too long."""
    try:
        return content.decode("utf-8") if len(content) <= CONTENT_MAX else None
    except UnicodeDecodeError:
        return None


def capability_row(real_path: str, xattr: bytes | None, ours: bool) -> Row:
    """An executable."""
    given = parse_file_capabilities(xattr or b"")
    return {"real_path": shown_path(real_path), "ipc_lock": given.lifts_memlock, "ours": ours}


def thing_row(kind: str, path: str) -> Row:
    """A thing of the host's."""
    return {"kind": kind, "path": shown_path(path)}


def item_row(item: Item) -> Row:
    """An entry of the record, without the content of a file."""
    before = owners(item.state) if item.before is not None and item.kind in (FILE, NODE) else item.before
    return {**thing_row(item.kind, item.path), "before": before}


def capability_rows(view: View, steps: list[Step], items: list[Item]) -> Row:
    """The listed executables, once the steps are made."""
    known = {item.key for item in items}
    granted = {step.path for step in steps if isinstance(step.effect, Grant)}
    now = {real: view.xattrs.get(real) for real in view.real.values()}
    now.update({real: with_ipc_lock(now[real]) for real in granted})
    return {path: capability_row(real, now[real], (CAPABILITY, real) in known) for path, real in view.real.items()}


def change_row(step: Step) -> Row:
    """What a step has changed."""
    return {**thing_row(step.kind, step.path), "text": shown_path(step.says)}


def back_row(step: Step) -> Row:
    """The same of a step that put something back."""
    return {**change_row(step), "gone": isinstance(step.effect, RemoveFile)}


def made_row(step: Step, view: View) -> Row:
    """The same of a step that made something as it is to be."""
    row = change_row(step)
    # Where only a block is ours the rest may hold a password, which is nobody's business here.
    if step.kind == FILE and isinstance(step.effect, WriteFile):
        now = view.files[step.path]
        row["content"] = now is None or now.content != step.effect.state.content
        row["before"] = None if now is None else text_of(now.content)
    return row


def diff_row(step: Step) -> Row:
    """One change, for people."""
    return {"before_header": step.path, "after_header": step.path, "before": step.before, "after": step.after}


def make_wanted(record: Record, wanted: Wanted, dry_run: bool, run: Run, result: Row) -> None:
    """Puts back what is not wanted any more, records what is new, makes it, and fills in the return value.

    Whatever is refused is refused before anything is changed. Raises IommufdError.
    """
    view = look_at_host(record.items, wanted, run)
    back = steps_back(record, wanted, view)
    new = new_items(record, wanted, view)
    on = steps_on(wanted, after(back, view), record.due)
    diff = [diff_row(step) for step in (*back, *on) if step.says and (step.before or step.after)]
    if dry_run:
        result["put_back"] = [back_row(step) for step in back if step.says]
        result["made"] = [made_row(step, view) for step in on if step.says]
        for step in back:
            if step.item is not None:
                record.drop(step.item)
        record.add(new)
    else:
        if back:
            put_back(record, back, run, result)
            # A folder that was there a moment ago may be gone with what was in it.
            view = look_at_host(record.items, wanted, run)
            new = new_items(record, wanted, view)
            on = steps_on(wanted, view, record.due)
        record.add(new)
        keep(record, note_due(record, on) or bool(new))
        make(record, on, view, run, result)
        # What is due still is due to nothing that is wanted. Of a record that holds nothing, only that was written.
        old, record.due = record.due, []
        keep(record, bool(old))
    result["recorded"] = [thing_row(item.kind, item.path) for item in new]
    result["capabilities"] = capability_rows(view, on, record.items)
    result["diff"] = diff


def put_back(record: Record, steps: list[Step], run: Run, result: Row) -> None:
    """Makes the steps back. Raises IommufdError."""
    try:
        result["put_back"] = [back_row(step) for step in make_steps(record, steps, run)]
    except StepFailed as exc:
        result["put_back"] = [back_row(step) for step in exc.done]
        before = " ".join(step.says for step in exc.done) or "Nothing was put back before that."
        raise IommufdError(
            f"{exc.path} could not be put back: {exc.why}. {before} The record {shown_path(record.path)} still names"
            " what is not back: remove the cause, and run this again."
        ) from exc


def make(record: Record, steps: list[Step], view: View, run: Run, result: Row) -> None:
    """Makes the steps on. Raises IommufdError."""
    try:
        result["made"] = [made_row(step, view) for step in make_steps(record, steps, run)]
    except StepFailed as exc:
        result["made"] = [made_row(step, view) for step in exc.done]
        before = " ".join(step.says for step in exc.done) or "Nothing was changed before that."
        raise IommufdError(
            f"{exc.path} could not be made what it is to be: {exc.why}. {before} The record {shown_path(record.path)}"
            " names how all of it was: remove the cause and run this again, or have it put back (iommufd_host_state:"
            " absent)."
        ) from exc


def keep(record: Record, changed: bool) -> None:
    """Writes the record, or removes it with the last thing in it. Raises IommufdError."""
    try:
        if not record.items and not record.due:
            record.remove()
        elif changed:
            record.save()
    except OSError as exc:
        raise IommufdError(f"The record {record.path} cannot be written ({error_text(exc.errno)}).") from exc


def stranded(wanted: Wanted, back: list[Row]) -> list[str]:
    """The services that start the launcher, where that is not there, or in check mode would not be."""
    gone = any(each["path"] == LAUNCHER and each["gone"] for each in back)
    there = LAUNCHER in wanted.files or (os.path.exists(LAUNCHER) and not gone)
    return [] if there else [shown_path(name) for name in find_services_with(LAUNCHER)]


def run_patiently(words: list[str]) -> tuple[int, str, str]:
    """Runs a command, with the time that it may take."""
    return run_command(words, POLICY_SECONDS) if words[0] == SEMODULE else run_command(words)


def run(params: Row, check_mode: bool, result: Row) -> None:
    """Does what the task asks for, and fills in the return value. Raises IommufdError."""
    result.update(put_back=[], made=[])
    check_caller()
    wanted = wanted_by(params)
    path = params["record"]
    check_path(path)
    with lock_record(path):
        record = Record.load(path)
        try:
            make_wanted(record, wanted, check_mode, run_patiently, result)
            result["stranded"] = stranded(wanted, result["put_back"])
        finally:
            result["changed"] = bool(result["put_back"] or result["made"])
            result["remembered"] = [item_row(item) for item in record.items]


def main() -> NoReturn:
    module = AnsibleModule(
        argument_spec={
            "modules": {"type": "list", "elements": "str", "default": []},
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str"},
                    "program": {"type": "str", "choices": list(PROGRAMS)},
                },
                "required_one_of": [("content", "program")],
                "mutually_exclusive": [("content", "program")],
            },
            "capabilities": {"type": "list", "elements": "path", "default": []},
            "nodes": {"type": "list", "elements": "path", "default": []},
            "group": {"type": "str", "default": ""},
            "mode": {"type": "str", "default": ""},
            "blocks": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "devices": {"type": "list", "elements": "str", "required": True},
                },
            },
            "units": {"type": "list", "elements": "str", "default": []},
            "reload": {"type": "bool", "default": False},
            "record": {"type": "path", "default": "/var/lib/iommufd_host/record.json"},
        },
        supports_check_mode=True,
    )
    finish(module, run)


if __name__ == "__main__":
    main()
