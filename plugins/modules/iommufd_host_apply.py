#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_host_apply
short_description: Make a host as the role iommufd_host wants it, and put back what is not wanted
description:
  - Makes a host what the role P(virt.iommufd.iommufd_host#role) wants it to be. Before it changes anything it records,
    on the host itself, how that was, and it puts back from that record what is not wanted any more. It is made for that
    role, which calls it once.
  - B(First) everything that the record holds and that is B(not) listed any more is put back, and the record forgets
    it. Files get their former content, mode, owner and group, or are removed, with the folders that were made for
    them; blocks are cut out; executables get their former file capabilities; device nodes their former permissions;
    units are disabled and stopped. systemd and udev are told where a file of theirs went.
  - B(Then) what is listed and not in the record yet is recorded as it is now, and made as it is to be. Kernel modules
    are loaded, capabilities granted, files written, and once systemd and udev were told of those, units are enabled and
    started.
  - With nothing listed at all, everything is put back, and the record is removed. Kernel modules stay loaded.
  - An executable that has CAP_IPC_LOCK while the record knows nothing of it got it from somebody else. It is reported,
    not recorded, and so never taken away.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  modules:
    description: Kernel modules that are loaded, where they are neither loaded nor built in.
    type: list
    elements: str
    default: []
  files:
    description:
      - Regular files that are written as a whole. They belong to root. Folders on the way are made with mode 0755.
      - A symbolic link is refused, and so is a file of more than 1 MiB.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The path.
        type: path
        required: true
      content:
        description: What it holds.
        type: str
      program:
        description:
          - A program of this collection that it is, with mode 0755. It is made on the host, and has to start there with
            C(--help) before it gets its name.
        type: str
        choices: [iommufd-exec, iommufd-host-grant]
  capabilities:
    description:
      - Executables that get CAP_IPC_LOCK as a file capability, beside what they have. Symbolic links are followed to
        the file.
      - One whose other file capabilities are not effective is refused, since CAP_IPC_LOCK could not be added without
        making those effective too; so is any with capabilities for another user namespace, which a user can give to his
        own files.
    type: list
    elements: path
    default: []
  nodes:
    description:
      - Device nodes whose mode, owner or group is changed by a rule of udev that is among O(files), as paths or shell
        patterns such as V(/dev/vfio/devices/*). Only the last part of a path may be a pattern.
      - Where the rule is written, or some node is not as O(group) and O(mode) say, udev applies its rules anew.
      - A node that was not there when its path or pattern was recorded, and is put back, becomes what the kernel and
        the rules of udev make of it.
    type: list
    elements: path
    default: []
  group:
    description: The group that the rule gives to O(nodes). Without it, any will do.
    type: str
    default: ""
  mode:
    description: The mode that the rule gives to O(nodes), octal. Without it, any will do.
    type: str
    default: ""
  blocks:
    description:
      - Configuration files of libvirt's QEMU driver that get a block at their beginning, between the lines
        C(# BEGIN iommufd_host) and C(# END iommufd_host), which sets C(cgroup_device_acl). Only the block is taken out
        again, whatever else has changed in the file.
      - A file that was not there is removed with the block, if nothing else is in it.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The path.
        type: path
        required: true
      devices:
        description: Device nodes that the setting has beside those that the rest of the file gives it, or libvirt.
        type: list
        elements: str
        required: true
  units:
    description:
      - systemd units, with files among O(files), that are enabled and started. One whose file is written is restarted.
      - To put one back, it is disabled and stopped before anything else is done, and so is the unit that it triggers.
        One that was enabled or active before is so again afterwards.
    type: list
    elements: str
    default: []
  reload:
    description: Whether systemd is to read its files again in any case.
    type: bool
    default: false
  record:
    description:
      - The file that holds the record. It is made with mode 0600, and its folder, if that is missing, with 0700. The
        folder is removed with the record, if nothing else is in it.
      - A record is refused that is not root's or that others may write, and so are all folders above it.
    type: path
    default: /var/lib/iommufd_host/record.json
extends_documentation_fragment:
  - virt.iommufd.attributes
attributes:
  check_mode:
    support: full
    details:
      - Nothing is changed; what would be is returned. Whether a program starts is not tried.
  diff_mode:
    support: full
    details:
      - It shows what is put back, written and granted. Of a file with a block it shows the block alone.
  idempotent:
    support: full
requirements:
  - Python 3.9 or later with C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
  - For O(units), systemd. For O(nodes), udev. For O(modules), C(modprobe).
notes:
  - B(Privilege.) It takes root.
  - B(Others' folders.) A path is refused where somebody else than root can write any folder or link on the way, or
    what root takes from the file there. That is judged when it is recorded, when it is put back, and once more at the
    moment of each change, by descriptors that nobody can swap. The message names the place and who can write it.
  - B(Cut off.) The record is written before anything is changed, and each thing is forgotten only once it is back, so a
    run that was cut off at any point is made good by the next.
  - B(Executables.) Where an executable carries exactly what it had and CAP_IPC_LOCK besides, it gets exactly what it
    had; having no file capabilities and having an empty set of them are told apart. Where somebody has changed its file
    capabilities since, only CAP_IPC_LOCK is taken out. Where it has lost it, as by an upgrade of its package, nothing
    is done.
  - B(Units that stay.) Where CAP_IPC_LOCK is taken from an executable, recorded units that are still listed are
    stopped first, so that they do not grant it again by what their files still say.
  - B(SELinux.) New files get the label that the policy has for their path, if C(restorecon) is there.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Tells what the host supports and who holds an iommufd.
  - module: virt.iommufd.iommufd_vmm_check
    description: Tells what would void a file capability, before it is granted.
"""

EXAMPLES = r"""
- name: Ensure that the emulator may pin memory without a limit, and that the modules are loaded, now and at boot
  virt.iommufd.iommufd_host_apply:
    modules: [iommufd, vfio-pci]
    files:
      - path: /etc/modules-load.d/iommufd_host.conf
        content: |
          iommufd
          vfio-pci
    capabilities: [/usr/bin/qemu-system-x86_64]

- name: Ensure that the host is as it was
  virt.iommufd.iommufd_host_apply:
  register: applied

- name: Report what was put back
  ansible.builtin.debug:
    var: applied.put_back
"""

RETURN = r"""
put_back:
  description:
    - What was put back, or in check mode would be.
    - RV(ignore:changed) is true where there is any, or anything in RV(made). To record something is not a change.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: V(file), V(capability), V(node), V(block), V(unit) or V(module).
      type: str
      sample: file
    path:
      description: The path, or the name of the unit or module. Of a capability, the path with symbolic links followed.
      type: str
      sample: /etc/modules-load.d/iommufd_host.conf
    text:
      description: The same for people, a sentence.
      type: str
      sample: /etc/modules-load.d/iommufd_host.conf is removed.
    gone:
      description: Whether it is a file that is no more.
      type: bool
      sample: true
made:
  description: What was made as it is to be, or in check mode would be.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: As in RV(put_back[].kind).
      type: str
      sample: capability
    path:
      description: As in RV(put_back[].path).
      type: str
      sample: /usr/bin/qemu-system-x86_64
    text:
      description: As in RV(put_back[].text).
      type: str
      sample: /usr/bin/qemu-system-x86_64 has got CAP_IPC_LOCK.
    content:
      description: Of a file, whether it held something else before, and not only had another mode or owner.
      type: bool
      sample: true
    before:
      description: What a file held, V(null) where there was none, or no text of 64 KiB at most.
      type: str
      sample: null
recorded:
  description: What was recorded by this run, or in check mode would be.
  returned: on success
  type: list
  elements: dict
  contains:
    kind:
      description: As in RV(put_back[].kind).
      type: str
      sample: file
    path:
      description: As in RV(put_back[].path).
      type: str
      sample: /etc/modules-load.d/iommufd_host.conf
remembered:
  description: Everything that the record holds now, or in check mode would hold, the oldest first.
  returned: on success, and where something could not be put back
  type: list
  elements: dict
  contains:
    kind:
      description: As in RV(put_back[].kind).
      type: str
      sample: capability
    path:
      description: As in RV(put_back[].path).
      type: str
      sample: /usr/bin/qemu-system-x86_64
    before:
      description:
        - How it was. V(null) where there was nothing.
        - Of a V(file) and a V(node) C(mode), C(owner) and C(group); of a V(capability) C(xattr), the extended attribute
          C(security.capability) as hexadecimal digits, V(null) where there was none; of a V(unit) C(enabled) and
          C(active); of a V(block) nothing but that the file was there.
      type: dict
      sample: {xattr: null}
capabilities:
  description:
    - Each of O(capabilities) as it is now, or in check mode would be, by its path.
    - C(real_path) is the path with symbolic links followed. C(ipc_lock) is whether whoever executes the file has
      CAP_IPC_LOCK at once. C(ours) is whether the record knows the file, so that what was granted will be taken back;
      where it is V(false), somebody else has granted it. C(other) are the file's other capabilities.
  returned: on success
  type: dict
  sample:
    /usr/bin/kvm:
      real_path: /usr/bin/qemu-system-x86_64
      ipc_lock: true
      ours: true
      other: []
"""

from typing import NoReturn

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._apply import after, steps_on
from ..module_utils._capabilities import CAP_IPC_LOCK, parse_file_capabilities, with_ipc_lock
from ..module_utils._child import Run, run_command
from ..module_utils._errors import IommufdError, error_text, shown_path
from ..module_utils._module import Row, finish
from ..module_utils._programs import PROGRAMS, zipapp
from ..module_utils._record import CAPABILITY, FILE, NODE, Item, Record, check_caller, lock_record
from ..module_utils._states import FileState, NodeState
from ..module_utils._steps import Grant, RemoveFile, Step, StepFailed, WriteFile, make_steps, note_due
from ..module_utils._undo import new_items, steps_back
from ..module_utils._user import group_name, owner_name
from ..module_utils._wanted import View, Wanted, WantedFile, check_path, look_at_host

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
    other = [each for each in dict.fromkeys([*given.permitted, *given.inheritable]) if each != CAP_IPC_LOCK]
    return {"real_path": shown_path(real_path), "ipc_lock": given.lifts_memlock, "ours": ours, "other": other}


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
            make_wanted(record, wanted, check_mode, run_command, result)
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
