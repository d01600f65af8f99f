#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_host_record
short_description: Remember how a host was before it is changed, and put it back
description:
  - Keeps a record, on the host itself, of how things were before the role P(virt.iommufd.iommufd_host#role) changes
    them, and puts them back from that record. It is made for that role, which calls it once before it changes anything.
  - B(First) everything that the record holds and that is B(not) listed any more is put back, and the record forgets
    it. Files get their former content, mode, owner and group, or are removed, with the folders that were made for
    them; blocks are cut out; executables get their former file capabilities; device nodes their former permissions;
    units are disabled and stopped. systemd and udev are told where a file of theirs went.
  - B(Then) what is listed and not in the record yet is recorded as it is now. The caller changes it afterwards; but
    O(capabilities) are granted by this module itself.
  - With nothing listed at all, everything is put back, and the record is removed.
  - An executable that has CAP_IPC_LOCK while the record knows nothing of it got it from somebody else. It is reported,
    not recorded, and so never taken away.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  files:
    description:
      - Regular files that the caller is about to write as a whole. They, and folders on the way to them, need not be
        there yet.
      - A symbolic link is refused, and so is a file of more than 1 MiB.
    type: list
    elements: path
    default: []
  capabilities:
    description:
      - Executables that get CAP_IPC_LOCK as a file capability, beside what they have, once they are recorded. Symbolic
        links are followed to the file.
      - One whose other file capabilities are not effective is refused, since CAP_IPC_LOCK could not be added without
        making those effective too; so is any with capabilities for another user namespace, which a user can give to his
        own files.
    type: list
    elements: path
    default: []
  nodes:
    description:
      - Device nodes whose mode, owner or group is to change, as paths or shell patterns such as
        V(/dev/vfio/devices/*). Only the last part of a path may be a pattern.
      - A node that was not there when its path or pattern was recorded, and is put back, becomes what the kernel and
        the rules of udev make of it.
    type: list
    elements: path
    default: []
  blocks:
    description:
      - Files in which the caller keeps a block between the lines C(# BEGIN iommufd_host) and C(# END iommufd_host), as
        M(ansible.builtin.blockinfile) does with C(marker="# {mark} iommufd_host"). Only the block is taken out again,
        whatever else has changed in the file.
      - A file that was not there is removed with the block, if nothing else is in it.
    type: list
    elements: path
    default: []
  units:
    description:
      - systemd units of the caller's own that are about to be enabled and started.
      - To put one back, it is disabled and stopped before anything else is done, and so is the unit that it triggers.
        One that was enabled or active before is so again afterwards.
    type: list
    elements: str
    default: []
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
      - Nothing is recorded, granted or put back; what would be is returned.
  diff_mode:
    support: full
    details:
      - It shows what is put back and what is granted. Of a file with a block it shows the block alone.
  idempotent:
    support: full
requirements:
  - Python 3.9 or later with C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
  - For O(units), systemd. For O(nodes), udev.
notes:
  - B(Privilege.) It takes root.
  - B(Others' folders.) A path is refused where somebody else than root can write any folder or link on the way, or
    what root takes from the file there. That is judged when it is recorded, when it is put back, and once more at the
    moment of each change, by descriptors that nobody can swap. The message names the place and who can write it.
  - B(Cut off.) The record is written before the caller changes anything, and each thing is forgotten only once it is
    back, so a run that was cut off at any point is made good by the next.
  - B(Executables.) Where an executable carries exactly what it had and CAP_IPC_LOCK besides, it gets exactly what it
    had; having no file capabilities and having an empty set of them are told apart. Where somebody has changed its file
    capabilities since, only CAP_IPC_LOCK is taken out. Where it has lost it, as by an upgrade of its package, nothing
    is done.
  - B(Units that stay.) Where CAP_IPC_LOCK is taken from an executable, recorded units that are still listed are
    stopped, but not disabled, so that they do not grant it again by what their files still say. The caller starts them
    once it has written those.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Tells what the host supports and who holds an iommufd.
  - module: virt.iommufd.iommufd_vmm_check
    description: Tells what would void a file capability, before it is granted.
"""

EXAMPLES = r"""
- name: Ensure that the emulator may pin memory without a limit, and that it is known how the host was before
  virt.iommufd.iommufd_host_record:
    capabilities: [/usr/bin/qemu-system-x86_64]
    files: [/etc/modules-load.d/iommufd_host.conf]
  register: record

- name: Ensure that the modules are loaded at boot
  ansible.builtin.copy:
    dest: /etc/modules-load.d/iommufd_host.conf
    content: |
      iommufd
      vfio-pci
    mode: "0644"

- name: Ensure that the host is as it was
  virt.iommufd.iommufd_host_record:
  register: record

- name: Report what was put back
  ansible.builtin.debug:
    var: record.put_back
"""

RETURN = r"""
put_back:
  description:
    - What was put back, or in check mode would be, in sentences.
    - RV(ignore:changed) is true where there is any, or anything in RV(granted). To record something is not a change.
  returned: always
  type: list
  elements: str
  sample:
    - iommufd-host-grant.path is disabled and stopped.
    - /etc/systemd/system/iommufd-host-grant.path is removed.
    - CAP_IPC_LOCK is taken from /usr/bin/qemu-system-x86_64.
granted:
  description:
    - The executables that were given CAP_IPC_LOCK by this run, or in check mode would be, with symbolic links followed.
  returned: always
  type: list
  elements: str
  sample: [/usr/bin/qemu-system-x86_64]
recorded:
  description: What was recorded by this run, or in check mode would be.
  returned: on success
  type: list
  elements: dict
  contains:
    kind:
      description: V(file), V(capability), V(node), V(block) or V(unit).
      type: str
      sample: file
    path:
      description: The path, or the name of the unit. Of a capability, the path with symbolic links followed.
      type: str
      sample: /etc/modules-load.d/iommufd_host.conf
remembered:
  description: Everything that the record holds now, or in check mode would hold, the oldest first.
  returned: on success, and where something could not be put back
  type: list
  elements: dict
  contains:
    kind:
      description: V(file), V(capability), V(node), V(block) or V(unit).
      type: str
      sample: capability
    path:
      description: The path, or the name of the unit. Of a capability, the path with symbolic links followed.
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
files:
  description:
    - Each of O(files) as it is now, by its path.
    - C(missing) are the folders on the way to it that are not there, the outermost first. C(content) is V(null) of what
      is no text or long, C(sha256) is of any content.
  returned: on success
  type: dict
  sample:
    /etc/modules-load.d/iommufd_host.conf:
      exists: true
      content: "iommufd\nvfio-pci\n"
      sha256: 707d5e8b865e40f52bd02d1946add8c6acad7d4fb4b9a2b96ffad7b4621be60a
      mode: "0644"
      owner: root
      group: root
      missing: []
capabilities:
  description:
    - Each of O(capabilities) as it is now, after it was granted, by its path.
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
nodes:
  description: Each of O(nodes) as it is now, by its path. Of a pattern, each node that is there.
  returned: on success
  type: dict
  sample:
    /dev/iommu:
      exists: true
      mode: "0660"
      owner: root
      group: root
blocks:
  description:
    - Each of O(blocks) as it is now, by its path.
    - C(exists) is whether the file is there. C(content) is what is between the two lines, V(null) where they are not
      there. C(cgroup_device_acl) is the list that libvirt's setting of this name has outside of the block, V(null)
      where it is not set.
  returned: on success
  type: dict
  sample:
    /etc/libvirt/qemu.conf:
      exists: true
      content: null
      cgroup_device_acl: [/dev/null, /dev/full, /dev/zero]
units:
  description: Each of O(units) as it is now, by its name.
  returned: on success
  type: dict
  sample:
    iommufd-host-grant.path:
      exists: true
      enabled: true
      active: true
"""

import hashlib
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._capabilities import CAP_IPC_LOCK, parse_file_capabilities
from ..module_utils._child import run_command
from ..module_utils._errors import IommufdError, error_text
from ..module_utils._grant import grant_patiently
from ..module_utils._record import (
    CAPABILITY,
    FILE,
    NODE,
    Item,
    PutBackFailed,
    Record,
    Step,
    View,
    Wanted,
    check_caller,
    locked,
    look,
    new_items,
    put_back,
    shown_capabilities,
    steps_back,
    to_grant,
)
from ..module_utils._states import FileState, NodeState, Run, group_name, owner_name, setting_of, shown, split_block

Row = dict[str, Any]

LISTS = ("files", "capabilities", "nodes", "blocks", "units")

# What is longer is no file that a role writes, and nobody compares it.
CONTENT_MAX = 2**16


def owners(state: FileState | NodeState | None) -> Row:
    """Mode, owner and group, all None where there is nothing."""
    if state is None:
        return {"mode": None, "owner": None, "group": None}
    return {"mode": f"{state.mode:04o}", "owner": owner_name(state.uid), "group": group_name(state.gid)}


def text_of(content: bytes) -> str | None:
    """The content as text; None where it is none, or too long."""
    try:
        return content.decode("utf-8") if len(content) <= CONTENT_MAX else None
    except UnicodeDecodeError:
        return None


def file_row(state: FileState | None, missing: list[str]) -> Row:
    """A file that is written as a whole, and the folders on the way to it that are not there."""
    content = None if state is None else text_of(state.content)
    digest = None if state is None else hashlib.sha256(state.content).hexdigest()
    return {"exists": state is not None, "content": content, "sha256": digest, **owners(state), "missing": missing}


def capability_row(real_path: str, xattr: bytes | None, ours: bool) -> Row:
    """An executable."""
    given = parse_file_capabilities(xattr or b"")
    other = [each for each in dict.fromkeys([*given.permitted, *given.inheritable]) if each != CAP_IPC_LOCK]
    return {"real_path": real_path, "ipc_lock": given.lifts_memlock, "ours": ours, "other": other}


def block_row(state: FileState | None) -> Row:
    """A file with a block."""
    block, rest = split_block(b"" if state is None else state.content)
    return {
        "exists": state is not None,
        "content": None if block is None else block.decode("utf-8", "backslashreplace"),
        "cgroup_device_acl": setting_of(rest.decode("utf-8", "backslashreplace"), "cgroup_device_acl"),
    }


def item_row(item: Item) -> Row:
    """An entry of the record, without the content of a file."""
    shown_state = item.before is not None and item.kind in (FILE, NODE)
    return {"kind": item.kind, "path": item.path, "before": owners(item.state) if shown_state else item.before}


def state_rows(wanted: Wanted, view: View, items: list[Item]) -> Row:
    """All that is listed, as it is."""
    known = {item.key for item in items}
    nodes = {each for path in wanted.nodes for each in (view.matches[path] or [path])}
    return {
        "files": {path: file_row(view.files[path], view.missing[path]) for path in wanted.files},
        "capabilities": {
            path: capability_row(real, view.xattrs.get(real), (CAPABILITY, real) in known)
            for path, real in view.real.items()
        },
        "nodes": {path: {"exists": path in view.nodes, **owners(view.nodes.get(path))} for path in sorted(nodes)},
        "blocks": {path: block_row(view.files[path]) for path in wanted.blocks},
        "units": {
            name: {"exists": unit.exists, "enabled": unit.enabled, "active": unit.active}
            for name, unit in ((name, view.units[name]) for name in wanted.units)
        },
    }


def diff_row(about: str, before: str, after: str) -> Row:
    """One change, for people."""
    return {"before_header": about, "after_header": about, "before": before, "after": after}


def diff_of(steps: list[Step], view: View, grants: dict[str, bytes]) -> list[Row]:
    """What the steps change, and what is granted."""
    rows = [diff_row(step.about, step.before, step.after) for step in steps if step.says]
    return rows + [
        diff_row(path, shown_capabilities(view.xattrs.get(path)), shown_capabilities(xattr))
        for path, xattr in grants.items()
    ]


def work(record: Record, wanted: Wanted, dry_run: bool, run: Run, result: Row) -> None:
    """Puts back what is not wanted any more, records what is new, grants, and fills in the return value.

    Whatever is refused is refused before anything is changed. Raises IommufdError.
    """
    view = look(record.items, wanted, run)
    steps = steps_back(record, wanted, view)
    new = new_items(record, wanted, view)
    grants = to_grant(view)
    # Reading it now fails before anything is changed, where it can't be read.
    state_rows(wanted, view, record.items)
    result["diff"] = diff_of(steps, view, grants)
    if dry_run:
        result["put_back"] = [step.says for step in steps if step.says]
        for step in steps:
            if step.item is not None:
                record.drop(step.item)
    elif steps:
        result["put_back"] = put_back(record, steps, run)
        # A folder that was there a moment ago may be gone with what was in it.
        view = look(record.items, wanted, run)
        new = new_items(record, wanted, view)
        grants = to_grant(view)
    record.add(new)
    if dry_run:
        result["granted"] = [shown(path) for path in grants]
    else:
        keep(record, bool(new))
        for path, xattr in grants.items():
            if grant_patiently(path):
                result["granted"].append(shown(path))
            view.xattrs[path] = xattr
    result["recorded"] = [{"kind": item.kind, "path": item.path} for item in new]
    result.update(state_rows(wanted, view, record.items))


def keep(record: Record, changed: bool) -> None:
    """Writes the record, or removes it with the last thing in it. Raises IommufdError."""
    try:
        if not record.items:
            record.remove()
        elif changed:
            record.save()
    except OSError as exc:
        raise IommufdError(f"The record {record.path} cannot be written ({error_text(exc.errno)}).") from exc


def run_module(module: AnsibleModule, result: Row) -> None:
    """Does what the task asks for, and fills in the return value. Raises IommufdError."""
    check_caller()
    wanted = Wanted.of({name: module.params[name] for name in LISTS})
    (path,) = Wanted.of({"files": [module.params["record"]]}).files
    with locked(path):
        record = Record.load(path)
        try:
            work(record, wanted, module.check_mode, run_command, result)
        finally:
            result["remembered"] = [item_row(item) for item in record.items]


def main() -> NoReturn:
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "list", "elements": "path", "default": []},
            "capabilities": {"type": "list", "elements": "path", "default": []},
            "nodes": {"type": "list", "elements": "path", "default": []},
            "blocks": {"type": "list", "elements": "path", "default": []},
            "units": {"type": "list", "elements": "str", "default": []},
            "record": {"type": "path", "default": "/var/lib/iommufd_host/record.json"},
        },
        supports_check_mode=True,
    )
    result: Row = {"put_back": [], "granted": []}
    try:
        run_module(module, result)
    except IommufdError as exc:
        result["msg"] = str(exc)
        if isinstance(exc, PutBackFailed):
            result["put_back"] = exc.done
    if not module._diff or "msg" in result:
        result.pop("diff", None)
    result["changed"] = bool(result["put_back"] or result["granted"])
    if "msg" in result:
        module.fail_json(**result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
