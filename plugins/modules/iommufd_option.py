#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_option
short_description: Set or query an option of a running process's iommufd
description:
  - Sets or queries an option of an iommufd that B(another process) holds, such as the iommufd of a running VMM.
  - Memory that devices reach through an iommufd is pinned. By default, the kernel charges it to the B(user). It adds up
    what all processes of the user have pinned, and compares the sum with the RLIMIT_MEMLOCK of the one process that
    maps. So the second VM of a user fails with C(-12 (Cannot allocate memory)), though each VM is within its limit.
  - With O(option=rlimit_mode) set to V(process), the kernel charges each process for itself. The process still needs a
    RLIMIT_MEMLOCK of its own memory and somewhat more.
  - The mode can be set only while the iommufd holds no object, that is, before the first device is bound to it. It ends
    with the iommufd, so set it again after each start of the VM.
  - The module shares the descriptor with the process by C(pidfd_getfd), uses it, and closes it at once. It touches
    nothing else in the process, and does not stop the process.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  fd:
    description:
      - The number of the descriptor in the process, as C(ls -l /proc/PID/fd) shows it.
      - If not given, the module works on every iommufd of the process.
    type: int
  option:
    description:
      - The option, by the kernel's name for it in lower case.
      - V(rlimit_mode) is how the memory that the iommufd pins is accounted.
      - V(huge_pages) is whether an IOAS may map memory in pages larger than the smallest. Each IOAS has its own value.
    type: str
    choices:
      - rlimit_mode
      - huge_pages
    default: rlimit_mode
  value:
    description:
      - The value that the option is to have. If not given, the option is only queried.
      - For O(option=rlimit_mode), V(user) charges the user for all of the user's processes together. That is how each
        iommufd starts. V(process) charges the process alone; C(VmLck) in C(/proc/PID/status) shows the charge.
      - For O(option=huge_pages), a boolean. Each IOAS starts with V(true). The kernel refuses V(false) once memory is
        mapped for a device.
    type: str
  ioas_id:
    description:
      - The id of the IOAS for O(option=huge_pages). If not given, the module works on every IOAS of the iommufd.
    type: int
  tolerate:
    description:
      - Outcomes that give a warning instead of a failure. The iommufd then stays as it is, so the value that is
        returned can differ from O(value). With an empty list, each of them is a failure.
      - V(unsupported) is a kernel without the ioctl (ENOTTY) or without the option (EOPNOTSUPP).
      - V(denied) is a caller without CAP_SYS_RESOURCE in the initial user namespace (EPERM).
      - V(busy) is an iommufd that holds objects already (EBUSY).
      - A wrong value is always a failure.
    type: list
    elements: str
    choices:
      - unsupported
      - denied
      - busy
    default:
      - unsupported
      - denied
extends_documentation_fragment:
  - virt.iommufd._attributes
  - virt.iommufd._target
attributes:
  check_mode:
    details:
      - To learn whether the rlimit mode could be set, the module sends the kernel a value that the kernel is sure to
        reject. That changes nothing.
      - For huge pages, the kernel offers no such way. So check mode predicts that they can be turned off.
requirements:
  - Linux 6.2 or later, built with CONFIG_IOMMUFD, with the kernel module C(iommufd) loaded.
  - Python 3.9 or later with C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
notes:
  - B(Privilege.) To share a descriptor, the module needs ptrace access to the process. That is root with CAP_SYS_PTRACE
    for any process but one's own, and C(kernel.yama.ptrace_scope) below 3. To set the rlimit mode, it also needs
    CAP_SYS_RESOURCE in the initial user namespace. Querying does not need CAP_SYS_RESOURCE.
  - B(EBUSY.) An object is a device that is bound to the iommufd, or an IOAS, the address space that its devices share.
    libvirt binds the devices before the domain runs, so O(domain) is for a query.
    An iommufd that holds an object answers EBUSY to every change of its rlimit mode. A VMM that opens C(/dev/iommu) by
    itself binds its first device at once. Restart such a VM with an iommufd that was opened and set before the VM had
    it. Or start it with an iommufd but without its VFIO devices (QEMU's C(-object iommufd,id=iommufd0,fd=9)), and
    hot-plug these once this module has set it. Or grant CAP_IPC_LOCK to the VMM, which lifts its limit. The module
    never sets the value that is already in force, so you can ask for it at any time.
  - B(Borrowed descriptors.) The module never opens C(/proc/PID/fd/N), since that would make a new iommufd and change
    the wrong one. By its device number, it makes sure that the shared descriptor is an iommufd. Then it asks for the
    value, probes whether it may be set, sets it, and reads it back. It sends nothing to any other file of the process.
    If the process ends meanwhile, its pinned memory lives on until the module closes the descriptor. The module holds
    it for one or a few ioctls, and closes it on every path.
  - B(Containers.) The host reaches a process in a container by the process id on the host, whatever the device node is
    called in the container. From inside a container, the module sees only that container's processes. Root of a user
    namespace does not have the privilege to set the rlimit mode.
  - B(Ad hoc.) C(ansible hypervisors --become -m virt.iommufd.iommufd_option -a 'unit=vm1.service value=process'). The
    short name C(iommufd_option) takes the setting C(library) in C(ansible.cfg), with the folder C(plugins/modules) of
    the installed collection.
  - B(Several descriptors.) Two descriptors of a process can lead to one iommufd. Check mode predicts that both change.
    Outside of check mode, the module finds the second one unchanged.
seealso:
  - name: IOMMUFD in the kernel's documentation
    description: What an iommufd, an IOAS and the other objects are.
    link: https://docs.kernel.org/userspace-api/iommufd.html
  - name: pidfd_getfd(2)
    description: The system call that shares the descriptor, and the access it takes.
    link: https://man7.org/linux/man-pages/man2/pidfd_getfd.2.html
"""

EXAMPLES = r"""
- name: Charge the memory that a process pins to the process itself
  virt.iommufd.iommufd_option:
    pid: 4242
    value: process

- name: Charge a QEMU that was started with -pidfile for itself
  virt.iommufd.iommufd_option:
    pidfile: /run/vm1.pid
    value: process

- name: Charge the VM of a systemd unit for itself, and fail wherever that cannot be done
  virt.iommufd.iommufd_option:
    unit: vm1.service
    value: process
    tolerate: []

- name: Charge the VM in a scope, such as that of a VM of Proxmox, for itself
  virt.iommufd.iommufd_option:
    unit: 100.scope
    value: process

- name: Charge the VM in a unit of a user's own service manager for itself
  virt.iommufd.iommufd_option:
    user_unit: vm3.service
    user: alice
    value: process

- name: Check that a libvirt domain is charged for itself
  virt.iommufd.iommufd_option:
    domain: vm1
  register: accounting
  failed_when: accounting is failed or accounting.value != 'process'

- name: Keep small pages in every IOAS of a process that has not mapped its memory yet
  virt.iommufd.iommufd_option:
    unit: vm2.service
    option: huge_pages
    value: false

- name: Find the running domains of the system libvirt
  ansible.builtin.find:
    paths: /run/libvirt/qemu
    patterns: '*.xml'
  register: records

- name: Read how each of them is accounted, except those without an iommufd
  virt.iommufd.iommufd_option:
    domain: "{{ item.path | basename | splitext | first }}"
  loop: "{{ records.files }}"
  loop_control:
    label: "{{ item.path }}"
  register: all_domains
  failed_when: all_domains is failed and all_domains.msg is not search('holds no iommufd|cannot hold an iommufd')
"""

RETURN = r"""
process:
  description: The process that was worked on.
  returned: when there is such a process
  type: dict
  contains:
    pid:
      description: Its process id, as seen by this module.
      type: int
      sample: 4242
    comm:
      description: Its name. What is not printable in it is escaped.
      type: str
      sample: qemu-system-x86
    uid:
      description: Its real user id, which is the user that per-user accounting charges.
      type: int
      sample: 64055
    user:
      description: The name of that user; null where the host knows none.
      type: str
      sample: libvirt-qemu
option:
  description: The option that was asked for.
  returned: always
  type: str
  sample: rlimit_mode
value:
  description:
    - The value that is in force now, or in check mode would be. A boolean for O(option=huge_pages).
    - V(null) where the iommufds of the process differ, or where it could not be read.
  returned: when there is an iommufd
  type: raw
  sample: process
truncated:
  description:
    - Whether there may be IOASes that were not found. The module tries the ids 1 to 1024. The kernel gives the lowest
      free ids to objects of all kinds. So this is V(true) where the module found an IOAS in the upper half.
  returned: when O(option=huge_pages)
  type: bool
  sample: false
iommufds:
  description: What became of each iommufd, or of each IOAS, in the order of the descriptors and of the ids.
  returned: when there is an iommufd
  type: list
  elements: dict
  contains:
    fd:
      description: The number of the descriptor in the process.
      type: int
      sample: 9
    ioas_id:
      description: The id of the IOAS; V(null) for an option of the whole iommufd.
      type: int
      sample: null
    before:
      description: The value before; V(null) where it could not be read. A boolean for O(option=huge_pages).
      type: raw
      sample: user
    after:
      description: The value now, or in check mode as it would be; V(null) where it could not be read.
      type: raw
      sample: process
    outcome:
      description:
        - V(changed) where this module set the value.
        - V(unchanged) for a query, for a value that was in force, and where somebody else set it first.
        - V(unsupported), V(denied) and V(busy), which O(tolerate) explains.
        - V(raced) where the value was set, but somebody else then set another one.
        - V(failed) for everything else.
      type: str
      sample: changed
    msg:
      description: Why the value could not be read or set, and what to do; empty if it could.
      type: str
      sample: ""
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.parsing.convert_bool import boolean

# Ansible keeps nothing compiled, so each file that is imported costs each task on each host anew. What a query by pid
# does not need is imported by what needs it.
from ..module_utils._borrow import borrow_iommufd, find_iommufds
from ..module_utils._errors import (
    DescriptorGone,
    IommufdError,
    NotAnIommufd,
)
from ..module_utils._iommufd import (
    CHANGED,
    FAILED,
    HUGE_PAGES,
    RLIMIT_MODE,
    UNCHANGED,
    IommuFd,
    Option,
    misc_rdev,
)
from ..module_utils._module import Row, finish
from ..module_utils._process import Process
from ..module_utils._task_target import TARGET_OPTIONS, TARGETS, work_at_target

if TYPE_CHECKING:
    from ..module_utils._change import Result

UINT32_MAX = 2**32 - 1

# A process may have hundreds of iommufds, and thousands of IOASes. All of them are in the return value.
LABELS_MAX = 20
WARNINGS_MAX = 10

OPTIONS = {option.name: option for option in (RLIMIT_MODE, HUGE_PAGES)}


def number_of(option: Option, value: str | None) -> int | None:
    """The kernel's number of the value, None for a query. Raises IommufdError where the option has no such value."""
    if value is None:
        return None
    try:
        return option.number(boolean(value) if option is HUGE_PAGES else value)
    except (TypeError, ValueError) as exc:
        choices = "a boolean" if option is HUGE_PAGES else " or ".join(str(each) for each in option.values)
        raise IommufdError(f"value {value!r} is not one of {option.name}: give {choices}.") from exc


class Job(NamedTuple):
    """What is to be done with each iommufd: `wanted` is the kernel's number of the value, None for a query."""

    option: Option
    ioas_id: int | None
    wanted: int | None
    dry_run: bool

    def on(self, iommufd: IommuFd, fd: int, subject: str) -> tuple[list[Row], bool]:
        """Does it on one iommufd, or on its IOASes; a row for each, and whether there may be more IOASes."""
        if not self.option.per_ioas:
            return [self._change(iommufd, fd, None, subject)], False
        if self.ioas_id is not None:
            return [self._change(iommufd, fd, self.ioas_id, subject)], False
        ioases = iommufd.ioases()
        if ioases.errno:
            from ..module_utils._change import unread

            return [self._explained(fd, None, unread(ioases.errno), subject)], False
        return [self._change(iommufd, fd, each, subject) for each in ioases.ids], ioases.truncated

    def _change(self, iommufd: IommuFd, fd: int, ioas_id: int | None, subject: str) -> Row:
        if self.wanted is None:
            found = iommufd.get(self.option, ioas_id or 0)
            if not found.errno:
                return self.row(fd, ioas_id, found.value, found.value, UNCHANGED)
        from ..module_utils._change import change

        result = change(iommufd, self.option, self.wanted, ioas_id or 0, self.dry_run)
        return self._explained(fd, ioas_id, result, subject if ioas_id is None else f"IOAS {ioas_id} of {subject}")

    def _explained(self, fd: int, ioas_id: int | None, result: Result, subject: str) -> Row:
        from ..module_utils._change import explain

        msg = explain(result, subject, self.option, self.wanted)
        return self.row(fd, ioas_id, result.before, result.after, result.outcome, msg)

    def row(
        self, fd: int, ioas_id: int | None, before: int | None, after: int | None, outcome: str, msg: str = ""
    ) -> Row:
        """One descriptor's part of the return value, or one IOAS's."""
        return {
            "fd": fd,
            "ioas_id": ioas_id,
            "before": None if before is None else self.option.value(before),
            "after": None if after is None else self.option.value(after),
            "outcome": outcome,
            "msg": msg,
        }


def job_of(params: Row, dry_run: bool) -> Job:
    """What the task asks for. Raises IommufdError where its options do not go together."""
    option = OPTIONS[params["option"]]
    ioas_id = params["ioas_id"]
    if ioas_id is not None and not option.per_ioas:
        raise IommufdError(f"ioas_id goes with option=huge_pages: {option.name} is an option of the whole iommufd.")
    if ioas_id is not None and not 0 < ioas_id <= UINT32_MAX:
        raise IommufdError(f"{ioas_id} is not the id of an IOAS: ids count from 1.")
    return Job(option, ioas_id, number_of(option, params["value"]), dry_run)


def work_on(fd: int | None, job: Job, process: Process) -> Row:
    """Does the job on the descriptor that was asked for, or on each iommufd of the process: `rows` and `truncated`.

    What goes wrong with one is told in its row and keeps nobody from the next. Raises IommufdError where there is
    nothing to work on.
    """
    rows: list[Row] = []
    truncated = False
    without_ioas = 0
    fds, rdevs = [] if fd is None else [fd], None
    if fd is None:
        held = find_iommufds(process)
        fds, rdevs = list(held), set(held.values())
    for each in fds:
        try:
            with borrow_iommufd(process, each, rdevs) as iommufd:
                some, more = job.on(iommufd, each, f"iommufd {each} of {process}")
            rows += some
            truncated |= more
            without_ioas += not some
        except IommufdError as exc:
            # A process may well close one of its descriptors while we look, unless it is the one that was asked for.
            if fd is not None or not isinstance(exc, (DescriptorGone, NotAnIommufd)):
                rows.append(job.row(each, job.ioas_id, None, None, FAILED, str(exc)))
    if not rows:
        raise IommufdError(nothing_to_work_on(process, bool(without_ioas)))
    return {"rows": rows, "truncated": truncated}


def nothing_to_work_on(process: Process, without_ioas: bool) -> str:
    """Why no row came of the process. `without_ioas`: it has iommufds, but they hold no IOAS."""
    if without_ioas:
        return (
            f"The iommufds of {process} hold no IOAS, and huge_pages belongs to an IOAS. A VMM makes one when it"
            " attaches its first device."
        )
    if misc_rdev() is None:
        return (
            f"{process} cannot hold an iommufd, because this host's kernel offers none: load its module (modprobe"
            " iommufd), or boot a kernel that has it (CONFIG_IOMMUFD, since Linux 6.2)."
        )
    return (
        f"{process} holds no iommufd. A VMM opens one no earlier than its first VFIO device needs it, and only if it"
        " was told to use iommufd instead of the VFIO container."
    )


def report(rows: list[Row], tolerate: list[str]) -> Row:
    """What the rows come to: `changed`, `value`, `iommufds`, `diff`, `warnings`, and `msg` where it is a failure."""
    values = {each["after"] for each in rows}
    troubled = [each for each in rows if each["outcome"] not in (CHANGED, UNCHANGED)]
    failed = [each for each in troubled if each["outcome"] not in tolerate]
    tolerated = [each["msg"] for each in troubled if each["outcome"] in tolerate]
    changed = [each for each in rows if each["outcome"] == CHANGED]
    result: Row = {
        "changed": bool(changed),
        "value": values.pop() if len(values) == 1 else None,
        "iommufds": rows,
        "diff": {side: {label(each): each[side] for each in rows} for side in ("before", "after")},
        "warnings": tolerated,
    }
    if not troubled:
        return result
    from ..module_utils._foreign import first_of

    if len(tolerated) > WARNINGS_MAX:
        result["warnings"] = [first_of(tolerated)]
    if failed:
        result["msg"] = first_of([each["msg"] for each in failed]) + also(changed)
    return result


def also(changed: list[Row]) -> str:
    """What was changed though the rest has failed, as a sentence to add; empty if nothing was."""
    more = f" and {len(changed) - LABELS_MAX} more" if len(changed) > LABELS_MAX else ""
    labels = ", ".join(label(each) for each in changed[:LABELS_MAX])
    return f" Changed all the same: {labels}{more}." if changed else ""


def label(each: Row) -> str:
    """What a row is about, in a few words."""
    ioas = "" if each["ioas_id"] is None else f"IOAS {each['ioas_id']} of "
    return f"{ioas}iommufd {each['fd']}"


def run(params: Row, check_mode: bool, result: Row) -> None:
    """Does what the task asks for, and fills in the return value. Raises IommufdError."""
    result["option"] = params["option"]
    job = job_of(params, check_mode)
    answer = work_at_target(params, partial(work_on, params["fd"], job), result)
    if job.option.per_ioas:
        result["truncated"] = answer["truncated"]
    result.update(report(answer["rows"], params["tolerate"]))


def main() -> NoReturn:
    module = AnsibleModule(
        argument_spec={
            **TARGET_OPTIONS,
            "fd": {"type": "int"},
            "option": {"type": "str", "choices": list(OPTIONS), "default": RLIMIT_MODE.name},
            "value": {"type": "str"},
            "ioas_id": {"type": "int"},
            "tolerate": {
                "type": "list",
                "elements": "str",
                "choices": ["unsupported", "denied", "busy"],
                "default": ["unsupported", "denied"],
            },
        },
        mutually_exclusive=[tuple(TARGETS)],
        required_one_of=[tuple(TARGETS)],
        required_together=[("user_unit", "user")],
        supports_check_mode=True,
    )
    finish(module, run)


if __name__ == "__main__":
    main()
