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
  - Memory that devices reach through an iommufd is pinned. By default the kernel charges it to the B(user) and checks
    the sum over all processes of that user against the RLIMIT_MEMLOCK of the one process that maps, so the second VM
    of a user whose VMs each have a limit of their own fails with C(-12 (Cannot allocate memory)).
  - With O(option=rlimit_mode) set to V(process), each process is charged for itself.
  - The mode can be set only while the iommufd holds no object, that is, before the first device is bound to it.
  - The descriptor is shared with the process by C(pidfd_getfd), used and closed at once. Nothing else in the process is
    touched, and it is not stopped.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  pid:
    description:
      - The process that holds the iommufd.
    type: int
    required: true
  fd:
    description:
      - The number of the descriptor in the process, as C(ls -l /proc/PID/fd) shows it.
      - If not given, every iommufd of the process is worked on.
    type: int
  option:
    description:
      - The option, by the kernel's name for it in lower case.
      - V(rlimit_mode) is how the memory that the iommufd pins is accounted.
    type: str
    choices:
      - rlimit_mode
    default: rlimit_mode
  value:
    description:
      - The value that the option is to have. If not given, the option is only queried.
      - V(user) charges the user, over all of the user's processes. It is what the kernel starts with.
      - V(process) charges the process, which shows as C(VmLck) in C(/proc/PID/status).
    type: str
    choices:
      - user
      - process
  tolerate:
    description:
      - Outcomes that are reported with a warning instead of a failure. The iommufd stays as it is.
      - V(unsupported) is a kernel without the ioctl or without the option.
      - V(denied) is a caller without CAP_SYS_RESOURCE in the initial user namespace.
      - V(busy) is an iommufd that holds objects already.
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
  - virt.iommufd.attributes
attributes:
  check_mode:
    support: full
    details:
      - Whether the mode could be set is asked of the kernel with a value that it is sure to reject, which changes
        nothing.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - Linux 6.2 or later for iommufd, with the module C(iommufd) loaded.
  - Python's C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
notes:
  - To share a descriptor takes ptrace access to the process, that is, root with CAP_SYS_PTRACE for any process but
    one's own, and C(kernel.yama.ptrace_scope) below 3.
  - To set the mode also takes CAP_SYS_RESOURCE in the initial user namespace. To query it does not.
  - An iommufd that holds an object, be it a bound device or an IOAS, answers EBUSY to every change, and VMMs that open
    C(/dev/iommu) themselves bind their first device at once. Such a VM has to be restarted with an iommufd that was set
    before. The value already in force is never set again, so asking for it is fine at any time.
  - While this module holds the descriptor, the memory pinned through it outlives the process, if that ends just then.
    It is held for one or a few ioctls.
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

- name: Read how a process is accounted
  virt.iommufd.iommufd_option:
    pid: 4242
  register: accounting

- name: Set the mode, and fail wherever that cannot be done
  virt.iommufd.iommufd_option:
    pid: 4242
    fd: 9
    value: process
    tolerate: []
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
    - The value that is in force now, in check mode the one that would be.
    - V(null) where the iommufds of the process differ, or where it could not be read.
  returned: when there is such a process
  type: str
  sample: process
iommufds:
  description: What became of each iommufd, in the order of their descriptors.
  returned: when there is such a process
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
      description: The value before; V(null) where it could not be read.
      type: str
      sample: user
    after:
      description: The value now, in check mode the one that it would be; V(null) where it could not be read.
      type: str
      sample: process
    outcome:
      description:
        - V(changed), or V(unchanged) also for a query.
        - V(unsupported), V(denied) and V(busy), which O(tolerate) explains.
        - V(raced) where the value was set, but somebody else then set another one.
        - V(failed) for everything else.
      type: str
      sample: changed
    msg:
      description: What kept it from being read or set, and what to do; empty if nothing did.
      type: str
      sample: ""
"""

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.virt.iommufd.plugins.module_utils._errors import (
    DescriptorGone,
    IommufdError,
    NotAnIommufd,
)
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import (
    CHANGED,
    FAILED,
    RLIMIT_MODE,
    UNCHANGED,
    Option,
    Result,
    explain,
)
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._target import borrow_iommufd, find_iommufds

OPTIONS = {option.name: option for option in (RLIMIT_MODE,)}

Row = dict[str, Any]


def row(fd: int, option: Option, result: Result, msg: str) -> Row:
    """One descriptor's part of the return value."""

    def name(number: int | None) -> Any:
        return None if number is None else option.value(number)

    return {
        "fd": fd,
        "ioas_id": None,
        "before": name(result.before),
        "after": name(result.after),
        "outcome": result.outcome,
        "msg": msg,
    }


def work(process: Process, fd: int | None, option: Option, wanted: int | None, dry_run: bool) -> list[Row]:
    """Queries or changes the option of the descriptor that was asked for, or of each iommufd of the process.

    What goes wrong with one is told in its row and keeps nobody from the next. Raises IommufdError where there is no
    iommufd to work on.
    """
    rows: list[Row] = []
    for each in find_iommufds(process) if fd is None else [fd]:
        try:
            with borrow_iommufd(process, each) as iommufd:
                result = iommufd.change(option, wanted, dry_run=dry_run)
        except IommufdError as exc:
            # A process may well close one of its descriptors while we look, unless it is the one that was asked for.
            if fd is not None or not isinstance(exc, (DescriptorGone, NotAnIommufd)):
                rows.append(row(each, option, Result(FAILED, None, None), str(exc)))
        else:
            rows.append(row(each, option, result, explain(result, f"iommufd {each} of {process}", option, wanted)))
    if not rows:
        raise IommufdError(
            f"{process} holds no iommufd. A VMM opens one no earlier than its first VFIO device needs it, and only if"
            " it was told to use iommufd instead of the VFIO container."
        )
    return rows


def report(rows: list[Row], tolerate: list[str]) -> dict[str, Any]:
    """What the rows come to: `changed`, `value`, `iommufds`, `diff`, `warnings`, and `msg` where it is a failure."""
    values = {each["after"] for each in rows}
    troubled = [each for each in rows if each["outcome"] not in (CHANGED, UNCHANGED)]
    failed = [each for each in troubled if each["outcome"] not in tolerate]
    changed = [each for each in rows if each["outcome"] == CHANGED]
    result: dict[str, Any] = {
        "changed": bool(changed),
        "value": values.pop() if len(values) == 1 else None,
        "iommufds": rows,
        "diff": {side: {f"iommufd {each['fd']}": each[side] for each in rows} for side in ("before", "after")},
        "warnings": [each["msg"] for each in troubled if each not in failed],
    }
    if failed:
        done = f" Changed all the same: iommufd {', '.join(str(each['fd']) for each in changed)}." if changed else ""
        result["msg"] = " ".join(each["msg"] for each in failed) + done
    return result


def main() -> NoReturn:
    module = AnsibleModule(
        argument_spec={
            "pid": {"type": "int", "required": True},
            "fd": {"type": "int"},
            "option": {"type": "str", "choices": list(OPTIONS), "default": RLIMIT_MODE.name},
            "value": {"type": "str", "choices": list(RLIMIT_MODE.values)},
            "tolerate": {
                "type": "list",
                "elements": "str",
                "choices": ["unsupported", "denied", "busy"],
                "default": ["unsupported", "denied"],
            },
        },
        supports_check_mode=True,
    )
    option = OPTIONS[module.params["option"]]
    value = module.params["value"]
    wanted = None if value is None else option.number(value)
    result: dict[str, Any] = {"option": option.name}
    try:
        with Process.hold(module.params["pid"]) as process:
            result["process"] = {
                "pid": process.pid,
                "comm": process.comm,
                "uid": process.uid,
                "user": process.user,
            }
            rows = work(process, module.params["fd"], option, wanted, module.check_mode)
    except IommufdError as exc:
        module.fail_json(msg=str(exc), **result)
    result.update(report(rows, module.params["tolerate"]))
    for warning in result.pop("warnings"):
        module.warn(warning)
    if not module._diff:
        del result["diff"]
    if "msg" in result:
        module.fail_json(**result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
