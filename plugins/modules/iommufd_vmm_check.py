#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_vmm_check
short_description: "[INTERNAL] Tell how the VMMs of a host would run, and prove it by starting one"
description:
  - Only the role P(virt.iommufd.iommufd_host#role) uses this module. Its options and return values may change at any
    time.
  - Tells what would keep CAP_IPC_LOCK from emulators and services. On request it starts them for a moment, as a user,
    and reads in C(/proc) what they run with. Whatever it started has ended when it returns.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  emulators:
    description: Emulators, as absolute paths. Symbolic links are followed.
    type: list
    elements: path
    default: []
  user:
    description: The user of O(trial), O(try_iommufd), and O(start) without O(domain), which require it.
    type: str
  units:
    description: systemd services that start a VMM. Of a template, an instance is asked for.
    type: list
    elements: str
    default: []
  users:
    description: Users whose RLIMIT_MEMLOCK is read in a new session, which C(runuser) opens.
    type: list
    elements: str
    default: []
  trial:
    description: Whether to execute, in place of each emulator, a copy of C(cat) beside it that has CAP_IPC_LOCK.
    type: bool
    default: false
  start:
    description: Whether to start each emulator without a machine, and a transient service like each unit.
    type: bool
    default: false
  domain:
    description: Whether O(start) has libvirt start each emulator, in a domain that is paused and has no devices.
    type: bool
    default: false
  uri:
    description: The system libvirt of this host, as C(virsh --connect) takes it.
    type: str
    default: qemu:///system
  try_iommufd:
    description: Whether to set an iommufd of its own to per-process accounting, and to read that back as O(user).
    type: bool
    default: false
extends_documentation_fragment:
  - virt.iommufd._attributes.info_module
attributes:
  check_mode:
    details:
      - What would be started is not.
requirements:
  - Python 3.9 or later with C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
  - systemd for O(units); C(virsh) for O(domain); C(runuser) for O(users).
notes:
  - B(Privilege.) Root is needed for all that is started, and for O(users) and O(try_iommufd), but not for the rest.
  - B(Verdicts.) A user may stop, end or limit what runs as that user. So only what was seen counts. What was not seen
    is tried three times. Then RV(ignore:ok) is V(null), and RV(ignore:inconclusive) is V(true).
  - B(Others' files.) What somebody else than root can write is neither executed nor copied. It is an obstacle.
"""

EXAMPLES = r"""
- name: Check how the emulator would run
  virt.iommufd.iommufd_vmm_check:
    emulators: [/usr/bin/qemu-system-x86_64]
"""

RETURN = r"""
selinux:
  description: What SELinux's policy has for the VMs of the system libvirt. V(null) on a host without SELinux.
  returned: always
  type: dict
  contains:
    domains:
      description: The contexts in which libvirt may run them. None where the policy knows of no libvirt.
      type: list
      elements: dict
      contains:
        context:
          description: The context, without the categories of a VM.
          type: str
        ipc_lock:
          description: With O(start), whether such a VM may use CAP_IPC_LOCK, in the form of RV(try_iommufd).
          type: dict
        opens:
          description: The same of whether it may open C(/dev/iommu).
          type: dict
    labels:
      description: What the policy wants for nodes of these paths. Empty where that is not known.
      type: dict
    sysfs:
      description: The label of C(/sys).
      type: str
    msg:
      description: Why less is known; empty otherwise.
      type: str
emulators:
  description: The emulators, in the order of O(emulators).
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: The path as given.
      type: str
    real_path:
      description: The path with symbolic links followed.
      type: str
    present:
      description: Whether it is there.
      type: bool
    writer:
      description: What somebody else than root can write, of the file and all on the way. V(null) where only root can.
      type: dict
      contains:
        place:
          description: The first such folder, symbolic link or file. Nothing behind it is looked at.
          type: str
        who:
          description: Who can write it.
          type: str
    is_emulator:
      description: Whether it is an executable ELF file.
      type: bool
    conditions_of:
      description: Under whose bounding set and NoNewPrivileges emulators are executed here.
      type: str
    obstacles:
      description: What would void a file capability of the emulator, or have it do harm; each a sentence.
      type: list
      elements: str
    trial:
      description: The outcome of O(trial).
      type: dict
      contains:
        attempted:
          description: Whether it was tried.
          type: bool
        ok:
          description: Whether it had CAP_IPC_LOCK in effect. V(null) where nothing is known.
          type: bool
        inconclusive:
          description: Whether it was tried, and nothing was seen that tells.
          type: bool
        effective:
          description: Its effective capabilities, as C(/proc) shows them. V(null) where it did not run.
          type: str
        msg:
          description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
          type: str
    started:
      description: The outcome of O(start).
      type: dict
      contains:
        attempted:
          description: Whether it was tried.
          type: bool
        ok:
          description: Whether it had CAP_IPC_LOCK in effect. V(null) where nothing is known.
          type: bool
        inconclusive:
          description: Whether it was tried, and nothing was seen that tells.
          type: bool
        how:
          description: V(domain) or V(bare), by O(domain).
          type: str
        user:
          description: The user that it ran as. V(null) where it did not run, or the user has no name.
          type: str
        effective:
          description: Its effective capabilities, as C(/proc) shows them. V(null) where it did not run.
          type: str
        memlock_bytes:
          description: Its RLIMIT_MEMLOCK, soft. V(null) where that is unlimited or not known.
          type: int
        memlock_unlimited:
          description: Whether that is unlimited.
          type: bool
        msg:
          description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
          type: str
units:
  description: The services, in the order of O(units).
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: The name as given.
      type: str
    main:
      description: The name that systemd has it under, which is another one where RV(units[].name) is an alias.
      type: str
    present:
      description: Whether systemd has it.
      type: bool
    outdated:
      description: Whether its files have changed since systemd read them.
      type: bool
    user:
      description:
        - Its user. V(null) where systemd makes one up for each start, or has no such unit.
        - If the user of a template is named after the instance, it is that of one that runs, and V(null) without one.
      type: str
    ambient_ipc_lock:
      description: Whether CAP_IPC_LOCK is one of its ambient capabilities.
      type: bool
    file_ipc_lock:
      description: Whether the file of its program gives CAP_IPC_LOCK.
      type: bool
    obstacles:
      description: What would void CAP_IPC_LOCK of the service, or keep it from starting; each a sentence.
      type: list
      elements: str
    replica:
      description: The outcome of O(start).
      type: dict
      contains:
        attempted:
          description: Whether it was tried.
          type: bool
        ok:
          description: Whether it had CAP_IPC_LOCK in effect. V(null) where nothing is known.
          type: bool
        inconclusive:
          description: Whether it was tried, and nothing was seen that tells.
          type: bool
        user:
          description: The user that it ran as. V(null) where it did not run, or the user has no name.
          type: str
        effective:
          description: Its effective capabilities, as C(/proc) shows them. V(null) where it did not run.
          type: str
        memlock_bytes:
          description: Its RLIMIT_MEMLOCK, soft. V(null) where that is unlimited or not known.
          type: int
        memlock_unlimited:
          description: Whether that is unlimited.
          type: bool
        msg:
          description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
          type: str
users:
  description: The users, in the order of O(users).
  returned: always
  type: list
  elements: dict
  contains:
    user:
      description: The name as given.
      type: str
    present:
      description: Whether this host has that user.
      type: bool
    attempted:
      description: Whether it was tried.
      type: bool
    ok:
      description: Whether there was a session. V(null) where nothing is known.
      type: bool
    inconclusive:
      description: Whether it was tried, and nothing was seen that tells.
      type: bool
    memlock_bytes:
      description: Its RLIMIT_MEMLOCK, soft. V(null) where that is unlimited or not known.
      type: int
    memlock_unlimited:
      description: Whether that is unlimited.
      type: bool
    msg:
      description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
      type: str
try_iommufd:
  description: The outcome of O(try_iommufd).
  returned: always
  type: dict
  contains:
    attempted:
      description: Whether it was tried.
      type: bool
    ok:
      description: Whether O(user) saw per-process accounting. V(null) where nothing is known.
      type: bool
    inconclusive:
      description: Whether it was tried, and nothing was seen that tells.
      type: bool
    mode:
      description: The rlimit mode that O(user) saw. V(null) where none was seen.
      type: str
    msg:
      description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
      type: str
"""

import os
from functools import partial
from typing import Callable, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ..module_utils import _vmm_look, _vmm_trial
from ..module_utils._capabilities import CAP_IPC_LOCK
from ..module_utils._child import Interrupted, insist
from ..module_utils._command import run_command
from ..module_utils._device import DEVICE
from ..module_utils._errors import AccessRefused, IommufdError, shown_path
from ..module_utils._iommufd import PROCESS
from ..module_utils._module import Row, finish, memlock_row
from ..module_utils._policy import look_at_policy
from ..module_utils._process import Status
from ..module_utils._selinux import Verdict, lets_open, lets_use
from ..module_utils._user import User, find_user
from ..module_utils._vmm_look import Conditions, Program, Unit

NOT_ASKED = "It was not asked for."
CHECK_MODE = "Not run in check mode."

UNTRIED = {"attempted": False, "ok": None, "inconclusive": False}
STARTED = {"user": None, "effective": None, "memlock_bytes": None, "memlock_unlimited": False}


def _user_of_vms(name: str) -> User:
    try:
        return find_user(name)
    except IommufdError as exc:
        raise IommufdError(f"{exc} Name in iommufd_host_user the user that VMs run as here.") from exc


class CheckTask:
    """What was asked for. `user` is None where none is given."""

    def __init__(self, params: Row, check_mode: bool) -> None:
        self.params = params
        self._check_mode = check_mode
        as_user = [name for name in ("trial", "try_iommufd") if params[name]]
        if params["start"] and params["emulators"] and not params["domain"]:
            as_user.append("start")
        if as_user and not params["user"]:
            raise IommufdError(f"{as_user[0]} takes user: the name of the user that emulators run as on this host.")
        # One that is not there is told of at once, not when something is to be started.
        self.user: User | None = _user_of_vms(params["user"]) if params["user"] else None
        starts = [name for name in ("trial", "start", "try_iommufd", "users") if params[name]]
        if starts and not check_mode and os.geteuid() != 0:
            raise AccessRefused(
                f"uid {os.geteuid()} cannot be asked for {starts[0]}, which takes root: run the task with become: true."
            )

    def needed_user(self) -> User:
        """The user, without whom nothing is started. Raises IommufdError."""
        if self.user is None:
            raise IommufdError("It takes user: the name of the user that emulators run as on this host.")
        return self.user

    def attempt(self, name: str, nothing: Row, act: Callable[[], Row]) -> Row:
        """What came of an option: the row that `act` gives, or `nothing` and why."""
        if not self.params[name]:
            return {**nothing, **UNTRIED, "msg": NOT_ASKED}
        if self._check_mode:
            return {**nothing, **UNTRIED, "msg": CHECK_MODE}
        tried = {**nothing, "attempted": True, "inconclusive": False}
        try:
            return {**tried, "msg": "", **insist(act)}
        except Interrupted as exc:
            return {**tried, "ok": None, "inconclusive": True, "msg": str(exc)}
        except IommufdError as exc:
            return {**tried, "ok": False, "msg": str(exc)}


def effective(status: Status) -> str:
    """A process's effective capabilities as the kernel writes them."""
    return f"{status.effective:016x}"


def seen_row(seen: _vmm_trial.ProcessSeen) -> Row:
    """What was started. Raises Interrupted where it is not known whether it may use what it has."""
    void = _vmm_look.has_ipc_lock(seen.status.effective) and not seen.lifts_memlock
    policy = verdict_row(seen.policy) if _vmm_look.has_ipc_lock(seen.status.effective) else {"msg": ""}
    elsewhere = "It has CAP_IPC_LOCK in a user namespace of its own, which lifts no limit of the host's."
    return {
        "ok": seen.lifts_memlock,
        "user": seen.user,
        "effective": effective(seen.status),
        **memlock_row(seen.memlock.soft),
        "msg": policy["msg"] or (elsewhere if void else ""),
    }


def check_emulator(task: CheckTask, program: Program, under: Conditions) -> Row:
    """An emulator, and what came of starting it."""

    def check() -> None:
        if program.writer or not program.is_program:
            raise IommufdError(_vmm_look.emulator_obstacles(program, under)[0])

    def trial() -> Row:
        check()
        status = _vmm_trial.try_copy(program, under, task.needed_user())
        ok = _vmm_look.has_ipc_lock(status.effective)
        return {"ok": ok, "effective": effective(status), "msg": "" if ok else "It ran, but without CAP_IPC_LOCK."}

    def started() -> Row:
        check()
        if task.params["domain"]:
            # Few tasks have it start a domain.
            from ..module_utils import _vmm_domain

            patient = partial(run_command, seconds=_vmm_domain.LIBVIRT_SECONDS)
            return seen_row(_vmm_domain.start_bare_domain(patient, task.params["uri"], program))
        return seen_row(_vmm_trial.start_emulator(program, under, task.needed_user()))

    return {
        "path": shown_path(program.path),
        "real_path": shown_path(program.real_path),
        "present": program.present,
        "writer": program.writer and program.writer._asdict(),
        "is_emulator": program.is_program,
        "conditions_of": under.read_from,
        "obstacles": _vmm_look.emulator_obstacles(program, under),
        "trial": task.attempt("trial", {"effective": None}, trial),
        "started": task.attempt("start", {**STARTED, "how": "domain" if task.params["domain"] else "bare"}, started),
    }


def check_unit(task: CheckTask, unit: Unit) -> Row:
    """A service, and what came of starting one like it."""
    program = unit.program

    def replica() -> Row:
        if not unit.present or program is None or program.writer:
            raise IommufdError(_vmm_look.unit_obstacles(unit)[0])
        # Few tasks have it start a unit's replica.
        from ..module_utils import _vmm_replica

        return seen_row(_vmm_replica.start_replica(run_command, unit))

    if unit.unknown and unit.program is not None:
        # Nobody has its user.
        tried: Row = {**STARTED, **UNTRIED, "msg": unit.unknown}
    else:
        tried = task.attempt("start", STARTED, replica)
    return {
        "name": unit.name,
        "main": unit.main,
        "present": unit.present,
        "outdated": unit.outdated,
        "user": unit.user,
        "ambient_ipc_lock": _vmm_look.has_ipc_lock(unit.ambient),
        "file_ipc_lock": bool(program and program.capabilities and program.capabilities.lifts_memlock),
        "obstacles": _vmm_look.unit_obstacles(unit),
        "replica": tried,
    }


def check_user(task: CheckTask, name: str) -> Row:
    """A user's limit."""
    nothing: Row = {"user": name, "present": False, "memlock_bytes": None, "memlock_unlimited": False}
    try:
        user = find_user(name)
    except IommufdError as exc:
        return {**nothing, **UNTRIED, "msg": str(exc)}

    def session() -> Row:
        return {"ok": True, **memlock_row(_vmm_trial.open_session(user).soft)}

    return task.attempt("users", {**nothing, "present": True}, session)


def check_iommufd(task: CheckTask) -> Row:
    """What came of setting an iommufd."""

    def try_iommufd() -> Row:
        mode = _vmm_trial.try_mode(task.needed_user())
        return {"ok": mode == PROCESS, "mode": mode}

    return task.attempt("try_iommufd", {"mode": None}, try_iommufd)


def check_selinux(task: CheckTask) -> Row | None:
    """SELinux's policy."""
    policy = look_at_policy(run_command)
    if policy is None:
        return None

    def judged(ask: Callable[[], Verdict]) -> Row:
        return task.attempt("start", {}, lambda: verdict_row(ask()))

    domains = [
        {
            "context": context,
            "ipc_lock": judged(partial(lets_use, CAP_IPC_LOCK, partial(str, context))),
            "opens": judged(partial(lets_open, DEVICE, context)),
        }
        for context in policy.contexts
    ]
    return {"domains": domains, "labels": policy.labels, "sysfs": policy.sysfs, "msg": policy.msg}


def verdict_row(verdict: Verdict) -> Row:
    """What SELinux allows. Raises Interrupted where that is not known."""
    if verdict.allowed is None:
        raise Interrupted(f"{verdict.why}.")
    return {"ok": verdict.allowed, "msg": f"{verdict.why}." if verdict.why else ""}


def run(params: Row, check_mode: bool, result: Row) -> None:
    """Looks at all that was asked for, and tries it. Raises IommufdError where the task asks for what cannot be."""
    task = CheckTask(params, check_mode)
    # Everything is looked at before anything is started.
    programs = [_vmm_look.look_at_program(path) for path in params["emulators"]]
    units = [_vmm_look.look_at_unit(run_command, name) for name in params["units"]]
    under = _vmm_look.look_at_conditions(run_command) if programs else None
    result["emulators"] = [check_emulator(task, each, under) for each in programs] if under else []
    result["units"] = [check_unit(task, each) for each in units]
    result["users"] = [check_user(task, each) for each in params["users"]]
    result["try_iommufd"] = check_iommufd(task)
    result["selinux"] = check_selinux(task)


def main() -> NoReturn:
    module = AnsibleModule(
        argument_spec={
            "emulators": {"type": "list", "elements": "path", "default": []},
            "user": {"type": "str"},
            "units": {"type": "list", "elements": "str", "default": []},
            "users": {"type": "list", "elements": "str", "default": []},
            "trial": {"type": "bool", "default": False},
            "start": {"type": "bool", "default": False},
            "domain": {"type": "bool", "default": False},
            "uri": {"type": "str", "default": "qemu:///system"},
            "try_iommufd": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    finish(module, run)


if __name__ == "__main__":
    main()
