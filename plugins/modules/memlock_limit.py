#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: memlock_limit
short_description: Set or query the RLIMIT_MEMLOCK of a running process
description:
  - Sets or queries the limit on locked memory, RLIMIT_MEMLOCK, of B(another process) as it runs, such as a VMM.
  - The kernel compares what a process pins for devices with this limit whenever memory is mapped, in every mode of an
    iommufd and by VFIO's legacy container. So a VM that could not get a device or memory for
    C(-12 (Cannot allocate memory)) can, once its limit is raised.
  - The limit ends with the process. RV(next_start) says what gives it to the next one.
  - It is the soft limit that counts. The hard one is how far the process may raise that by itself.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  value:
    description:
      - The soft limit that the process is to have, in bytes, as a size such as V(64G), or V(unlimited). If neither it
        nor O(hard) is given, the limit is only queried.
      - A size counts in 1024s, unless it is written with C(B), such as V(64GB).
    type: str
  hard:
    description:
      - The hard limit that the process is to have, written like O(value). If not given, it stays, and is raised to
        O(value) where it is less than that.
    type: str
  force:
    description:
      - Whether to lower the soft limit below what is charged already, or where that cannot be told. The process keeps
        what it has pinned, but can pin nothing more, and fails as soon as its guest changes what is mapped.
    type: bool
    default: false
extends_documentation_fragment:
  - virt.iommufd._attributes
  - virt.iommufd._target
attributes:
  check_mode:
    details:
      - Whether an LSM would forbid the change cannot be foretold.
requirements:
  - Python 3.9 or later with C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
notes:
  - B(Privilege.) It takes root with CAP_SYS_RESOURCE, and CAP_SYS_PTRACE only for what is charged, which is asked where
    the limit is lowered. To raise the hard limit, CAP_SYS_RESOURCE must be that of the initial user namespace. Querying
    takes no privilege.
  - B(Several VMs of a user.) With an iommufd in the mode V(user), the sum over all processes of the user is compared
    with the limit of the one that maps. So the limit of one VM may have to hold the memory of all. Setting the mode by
    M(virt.iommufd.iommufd_option) before the VM has its devices is the better cure.
  - B(No limit of libvirt's.) libvirt gives a running domain another limit when a device is plugged in or out by it,
    and so may undo what was set.
  - B(No limit of a control group's.) C(<hard_limit>) of a domain is the limit of its control group, too, which counts
    all memory of the VM and of its emulator, and ends a VM that takes more. So a larger RLIMIT_MEMLOCK does not help a
    domain that has it. First raise that, to 1 GiB more than what the VM will have, by C(virsh memtune vm1 --hard-limit
    KIB --live). That leaves RLIMIT_MEMLOCK as it is. C(MemoryMax=) of a unit ends a VM as well.
  - B(Processes that end.) The kernel takes the id of a process. The module makes sure that the process lived before
    and after. Should it have ended in between, and its id be another one's, the module puts back what that one had.
seealso:
  - module: virt.iommufd.iommufd_info
  - plugin: virt.iommufd.memlock_fit
    plugin_type: filter
  - name: prlimit(2)
    description: The system call that sets the limit, and the privilege it takes.
    link: https://man7.org/linux/man-pages/man2/prlimit.2.html
"""

EXAMPLES = r"""
- name: Let a VM that runs pin 68 GiB, until it ends
  virt.iommufd.memlock_limit:
    pid: 4242
    value: 68G

- name: See how much the VM of a systemd unit may lock
  virt.iommufd.memlock_limit:
    unit: vm1.service
  register: limit

- name: Let the VM in a unit of a user's own service manager pin 68 GiB
  virt.iommufd.memlock_limit:
    user_unit: vm3.service
    user: alice
    value: 68G

- name: Lift the limit of a domain
  virt.iommufd.memlock_limit:
    domain: vm1
    value: unlimited
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
      description: Its real user id.
      type: int
      sample: 64055
    user:
      description: The name of that user; null where the host knows none.
      type: str
      sample: libvirt-qemu
memlock_bytes:
  description: The soft limit that is in force now, or in check mode would be; null where there is none.
  returned: when it could be read
  type: int
  sample: 73014444032
memlock_unlimited:
  description: Whether there is no soft limit.
  returned: when it could be read
  type: bool
  sample: false
memlock_hard_bytes:
  description: The hard limit; null where there is none.
  returned: when it could be read
  type: int
  sample: 73014444032
memlock_hard_unlimited:
  description: Whether there is no hard limit.
  returned: when it could be read
  type: bool
  sample: false
counters:
  description:
    - What the kernel compares with the limit, as in RV(virt.iommufd.iommufd_info#module:processes[].counters).
    - Null where that cannot be told.
  returned: when O(value) is less than what was in force, and O(force) was not given
  type: list
  elements: dict
  contains:
    counter:
      description: The counter, V(user), V(mm_locked) or V(mm_pinned).
      type: str
      sample: user
    held_bytes:
      description: What it holds.
      type: int
      sample: 4294967296
next_start:
  description: What the limit does not survive, and what would give it to the next process.
  returned: when it could be read
  type: str
  sample: The limit ends with the process. For the next one, LimitMEMLOCK= in a drop-in of vm1.service gives it at the
    next start.
"""

from functools import partial
from typing import NoReturn, Optional

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._errors import IommufdError, ProcessGone
from ..module_utils._memlock import (
    Asked,
    check_settable,
    is_less,
    limit_after,
    lost_at,
    parse_limit,
    set_memlock,
    shown_limit,
)
from ..module_utils._module import Row, finish, memlock_row
from ..module_utils._process import Process
from ..module_utils._process_facts import Limit, read_memlock, read_units
from ..module_utils._task_target import TARGET_OPTIONS, TARGETS, work_at_target

# A process by its id and its start, in ticks.
Identity = tuple[int, int]
# What is known of what it is charged: the counters that are compared with its limit, None where that cannot be told.
Known = Optional[list[Row]]


def limit_rows(limit: Limit) -> Row:
    """A limit as it is returned."""
    return {**memlock_row(limit.soft), **memlock_row(limit.hard, "memlock_hard")}


def refusal(name: str, after: Limit, counters: Known) -> str | None:
    """Why a soft limit is not lowered so; None where nothing speaks against it."""
    if counters is None:
        return (
            f"It cannot be told what {name} is charged, so its limit is not lowered: with less than that it could pin"
            " nothing more. virt.iommufd.iommufd_info says what was not seen. force=true lowers it all the same."
        )
    most = max(counters, key=lambda each: each["held_bytes"], default=None)
    if most is None or not is_less(after.soft, most["held_bytes"]):
        return None
    return (
        f"{name} is charged {most['held_bytes']} bytes (counter {most['counter']}), and with a limit of"
        f" {shown_limit(after.soft)} it could pin nothing more. force=true lowers it all the same."
    )


def counters_of(process: Row, identity: Identity) -> Known:
    """What is compared with the limit of a process that was looked at; None where that cannot be told."""
    # A look at all processes of the host: it takes long, and is only for who lowers a limit.
    from ..module_utils._accounting import USER
    from ..module_utils._accounts import look_at_accounts
    from ..module_utils._charges import accounting, checks
    from ..module_utils._host_facts import find_vfio_nodes

    accounts = look_at_accounts(find_vfio_nodes())
    seen = accounts.seen
    holder = next((each for each in seen.holders if (each.pid, each.start_ticks) == identity), None)
    if holder is None:
        return None if accounts.hidden else [held("mm_locked", process["locked_bytes"])]
    account = accounts.of[holder.pid]
    of_user = accounts.totals[account.uid]
    uncertain = of_user.uncertain or accounts.hidden or account.uid in seen.unseen
    if accounting(account) is None or (accounting(account) == USER and uncertain):
        return None
    return [held("mm_locked", account.locked), *(held(each.counter, each.held) for each in checks(account, of_user))]


def held(counter: str, size: int) -> Row:
    """A counter and what it holds."""
    return {"counter": counter, "held_bytes": size}


def work_on(asked: Asked, force: bool, dry_run: bool, known: list[Known], identity: Identity, process: Process) -> Row:
    """Sets the limit of a process, or only looks where that is all, or where it is not known what it is charged.

    In the answer `lowers` says so: it is to be asked again, with that as the only one in `known`, and the `identity`.
    """
    mine = (process.pid, process.start_ticks)
    if known and identity != mine:
        raise ProcessGone(f"{process} is another process than a moment ago. Run the task again.")
    now = read_memlock(process)
    unit, user_unit = read_units(process)
    process.check_alive()
    after = limit_after(now, asked)
    answer: Row = {"now": now, "after": now, "units": [unit, user_unit], "identity": mine}
    answer["locked_bytes"] = process.status.locked_bytes
    if after == now:
        return answer
    if is_less(after.soft, now.soft) and not force:
        if not known:
            return {**answer, "lowers": True}
        why = refusal(str(process), after, known[0])
        if why:
            return {**answer, "refused": why}
    check_settable(process, now, after)
    if not dry_run:
        set_memlock(process, after)
        after = read_memlock(process)
    return {**answer, "after": after}


def run(params: Row, check_mode: bool, result: Row) -> None:
    """Does what the task asks for, and fills in the return value. Raises IommufdError."""
    asked = Asked(params["value"], params["hard"])
    for name in ("value", "hard"):
        if params[name] is not None:
            parse_limit(name, params[name])
    work = partial(work_on, asked, params["force"], check_mode)
    answer = work_at_target(params, partial(work, [], (0, 0)), result, limit=True)
    if answer.get("lowers"):
        identity = (answer["identity"][0], answer["identity"][1])
        result["counters"] = counters_of(answer, identity)
        answer = work_at_target(params, partial(work, [result["counters"]], identity), result, limit=True)
    before, after = limit_rows(Limit(*answer["now"])), limit_rows(Limit(*answer["after"]))
    result.update(after)
    result["changed"] = before != after
    result["diff"] = {"before": before, "after": after}
    result["next_start"] = lost_at(answer["units"], params["domain"] is not None)
    if "refused" in answer:
        raise IommufdError(answer["refused"])


def main() -> NoReturn:
    module = AnsibleModule(
        argument_spec={
            **TARGET_OPTIONS,
            "value": {"type": "str"},
            "hard": {"type": "str"},
            "force": {"type": "bool", "default": False},
        },
        mutually_exclusive=[tuple(TARGETS)],
        required_one_of=[tuple(TARGETS)],
        required_together=[("user_unit", "user")],
        supports_check_mode=True,
    )
    finish(module, run)


if __name__ == "__main__":
    main()
