#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_vmm_check
short_description: Tell with which limits and capabilities a VMM would run, and prove it by starting one
description:
  - Tells what would keep CAP_IPC_LOCK from the VMMs of a host, be it given as a capability of the emulator's file or as
    an ambient capability of a systemd service.
  - A process with CAP_IPC_LOCK may pin as much memory as there is, so that a VM's RLIMIT_MEMLOCK does not matter. But a
    file capability is ignored in silence on a file system that is mounted nosuid or under NoNewPrivileges, and where it
    is not in the bounding set the emulator cannot be executed at all, so that every VM of the host would fail to start.
  - With O(trial), that is tried with a harmless program, before the emulator gets the capability.
  - With O(start), the emulator itself is started for a moment, and with it a service like each of O(units), to read in
    C(/proc) what they really run with. Whatever was started has ended when the module returns.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  emulators:
    description:
      - Emulators, as absolute paths. Symbolic links are followed.
    type: list
    elements: path
    default: []
  user:
    description:
      - The name of the user that O(trial), O(start) without O(domain), and O(scratch) run as, such as V(libvirt-qemu)
        on Debian and V(qemu) on Red Hat. They require it.
      - A user that the host does not have is a failure in any case.
    type: str
  units:
    description:
      - The names of systemd services of the system that start a VMM, such as V(vm1.service).
      - Of a template, V(vm@.service), systemd is asked for the instance C(vm@iommufd-host-check.service).
    type: list
    elements: str
    default: []
  users:
    description:
      - The names of users whose RLIMIT_MEMLOCK is told as it is in a new session, by C(runuser), for which PAM reads
        C(/etc/security/limits.d).
    type: list
    elements: str
    default: []
  trial:
    description:
      - Whether to execute a copy of C(cat) that has CAP_IPC_LOCK, and what else the emulator has, as O(user), with the
        bounding set and NoNewPrivileges of RV(emulators[].conditions), for each of O(emulators).
      - The copy is made in the emulator's folder, so that it is on the same mount, but it gets no name there. Nobody
        else can execute it, and it is gone with the module whatever happens.
    type: bool
    default: false
  start:
    description:
      - Whether to start each of O(emulators), and a transient service with the same user, capabilities and limits as
        each of O(units).
      - The emulator, which has to be one of QEMU's, is executed as O(user) under RV(emulators[].conditions), without a
        machine and stopped. It is looked at once it is up, that is when it greets on QMP, and then killed. See
        O(domain) for the way of libvirt.
      - The service executes the unit's own program if that is one of QEMU's, likewise without a machine. Else it
        executes C(sleep), since it cannot be known how another program would be started without consequences.
    type: bool
    default: false
  domain:
    description:
      - Whether O(start) has libvirt start a domain with the emulator, paused, instead of executing that itself. That is
        the proof for hosts whose VMs libvirt starts, because it is libvirt who decides what an emulator runs with.
      - The domain is transient, has 64 MiB of memory and no devices, and is called C(iommufd-host-check-) and a number.
        It is destroyed on every path, by libvirt itself if the module is killed. Hooks of libvirt are run for it.
      - libvirt's daemon is started if it does not run. It may take a minute to find out what an emulator can.
    type: bool
    default: false
  uri:
    description:
      - The system libvirt of this host, as C(virsh --connect) takes it.
    type: str
    default: qemu:///system
  scratch:
    description:
      - Whether to open C(/dev/iommu), set that iommufd to per-process accounting, and read it back in a process of
        O(user) that shares it, as libvirt does for an emulator.
    type: bool
    default: false
extends_documentation_fragment:
  - virt.iommufd.attributes
attributes:
  check_mode:
    support: full
    details:
      - Everything that does not start anything is done as always. What would be started is not.
  diff_mode:
    support: none
    details:
      - It changes nothing.
  idempotent:
    support: full
requirements:
  - Python 3.9 or later with C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
  - systemd for O(units); C(virsh) for O(domain); C(runuser) for O(users).
notes:
  - B(Privilege.) It takes root for all that is started, and for O(users) and O(scratch). All else is told to anybody.
  - B(Verdicts.) What is started runs as a user, who may stop and end it, lower its limits, and open so many sessions
    that PAM refuses one more. So only what was seen counts, a process with what it has, or one that the kernel refuses
    to execute since its file, its folder or the bounding set does not let it. Where one has ended, failed, was stopped,
    or was not heard of in time before it was seen, it is tried again, three times in all; then RV(ignore:ok) is
    V(null), RV(ignore:inconclusive) is V(true), and RV(ignore:msg) tells why. What runs as root and has failed by
    itself counts, too, since nobody else can have seen to that.
  - B(Security modules.) What is started without libvirt is not confined as libvirt would confine it. With O(domain) it
    is.
  - B(Others' files.) An emulator that somebody else than root can write, or a folder or link on the way to it, is
    neither executed nor copied, and is told in RV(emulators[].obstacles) with that place. So is each program of a unit
    in RV(units[].obstacles). What is behind such a place is not even looked at. A user's FUSE mount is such a place,
    and a mount with C(nosuid) that somebody may have brought files along on; a tmpfs begins empty. What is not found
    within 10 seconds, as on a mount whose server is gone, fails the module.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Tells which emulators and VMs of a host have CAP_IPC_LOCK now.
  - name: capabilities(7)
    description: How the capabilities of a file, of a process and the bounding set work together at execve().
    link: https://man7.org/linux/man-pages/man7/capabilities.7.html
"""

EXAMPLES = r"""
- name: Look at what would keep CAP_IPC_LOCK from the emulator
  virt.iommufd.iommufd_vmm_check:
    emulators: [/usr/bin/qemu-system-x86_64]
  register: check

- name: Fail where a file capability would be void or do harm
  ansible.builtin.assert:
    that: check.emulators | map(attribute='obstacles') | flatten | length == 0
    fail_msg: "{{ check.emulators | map(attribute='obstacles') | flatten }}"

- name: Try it with another program first
  virt.iommufd.iommufd_vmm_check:
    emulators: [/usr/bin/qemu-system-x86_64]
    user: libvirt-qemu
    trial: true

- name: Prove that libvirt starts the emulator with CAP_IPC_LOCK
  virt.iommufd.iommufd_vmm_check:
    emulators: [/usr/bin/qemu-system-x86_64]
    start: true
    domain: true
  register: proof
  failed_when: not proof.emulators[0].started.ok

- name: Look at what a service that starts a VMM runs with
  virt.iommufd.iommufd_vmm_check:
    units: [vm1.service, vm@.service]
    start: true

- name: Look at a user's limit of locked memory
  virt.iommufd.iommufd_vmm_check:
    users: [alice]
"""

RETURN = r"""
emulators:
  description: The emulators, in the order of O(emulators).
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: As it was given.
      type: str
      sample: /usr/bin/qemu-system-x86_64
    real_path:
      description: Where that leads.
      type: str
      sample: /usr/bin/qemu-system-x86_64
    present:
      description: Whether there is anything.
      type: bool
      sample: true
    writer:
      description:
        - The first place on the way to the file that somebody else than root can write, be it a folder, a symbolic link
          or the file itself. Nothing behind it is looked at, nothing is started, and the file counts as present.
        - V(null) where only root decides what the file is, as it should be.
      type: dict
      contains:
        place:
          description: The path of that place.
          type: str
          sample: /opt/vm
        who:
          description: Who can write it, a user, a group or everybody.
          type: str
          sample: user alice (uid 1002)
    is_emulator:
      description: Whether it can be an emulator. That is a regular file, executable, in the form of ELF, no script.
      type: bool
      sample: true
    file_system:
      description: Where it lies. V(null) where it is not there.
      type: dict
      contains:
        mount_point:
          description: Where its file system is mounted. V(null) where that cannot be told.
          type: str
          sample: /
        nosuid:
          description: Whether it is mounted nosuid, which has file capabilities ignored.
          type: bool
          sample: false
        read_only:
          description: Whether it is mounted read-only.
          type: bool
          sample: false
    conditions:
      description: Under what emulators are executed here.
      type: dict
      contains:
        read_from:
          description: Whose they are. That is libvirt's daemon, its unit where it does not run, or else this caller.
          type: str
          sample: libvirtd.service (pid 812)
        bounding_ipc_lock:
          description: Whether CAP_IPC_LOCK is in the bounding set.
          type: bool
          sample: true
        no_new_privs:
          description: Whether NoNewPrivileges is in force, which has file capabilities ignored.
          type: bool
          sample: false
        initial_user_namespace:
          description: Whether that is in the initial user namespace. V(null) where it cannot be told.
          type: bool
          sample: true
    obstacles:
      description: What would void a file capability of the emulator, or have it do harm; each a sentence.
      type: list
      elements: str
      sample: []
    trial:
      description: What came of O(trial).
      type: dict
      contains:
        attempted:
          description: Whether it was tried.
          type: bool
          sample: true
        ok:
          description: Whether the copy had CAP_IPC_LOCK. V(null) where it was not tried, or nothing is known.
          type: bool
          sample: true
        inconclusive:
          description: Whether it was tried and nothing was seen that tells. See the notes.
          type: bool
          sample: false
        effective:
          description: Its effective capabilities, as C(/proc) shows them. V(null) where it could not be executed.
          type: str
          sample: "0000000000004000"
        msg:
          description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
          type: str
          sample: ""
    started:
      description: What came of O(start).
      type: dict
      contains:
        attempted:
          description: Whether it was tried.
          type: bool
          sample: true
        how:
          description: V(domain) or V(bare), by O(domain).
          type: str
          sample: domain
        ok:
          description:
            - Whether it had CAP_IPC_LOCK in effect, in the initial user namespace.
            - V(null) where it was not tried, or nothing is known. V(false) also where the kernel refuses to execute it,
              and then RV(emulators[].started.effective) is V(null).
            - With O(domain), what libvirt does not start is never V(false), since libvirt does not tell apart what
              failed and what was killed.
          type: bool
          sample: true
        inconclusive:
          description: Whether it was tried and nothing was seen that tells. See the notes.
          type: bool
          sample: false
        user:
          description: The user that it ran as. V(null) where it did not run.
          type: str
          sample: libvirt-qemu
        effective:
          description: Its effective capabilities. V(null) where it did not run.
          type: str
          sample: "0000000000004000"
        memlock_bytes:
          description: Its RLIMIT_MEMLOCK, soft. V(null) where that is unlimited, or it did not run.
          type: int
          sample: 1140850688
        memlock_unlimited:
          description: Whether its RLIMIT_MEMLOCK was unlimited.
          type: bool
          sample: false
        msg:
          description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
          type: str
          sample: ""
units:
  description: The services, in the order of O(units).
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: As it was given.
      type: str
      sample: vm@.service
    instance:
      description: What systemd was asked for.
      type: str
      sample: vm@iommufd-host-check.service
    present:
      description: Whether systemd has it.
      type: bool
      sample: true
    load_state:
      description: What systemd says of its unit file.
      type: str
      sample: loaded
    outdated:
      description: Whether its files have changed since systemd read them, so that C(systemctl daemon-reload) is due.
      type: bool
      sample: false
    active:
      description: Whether it is active.
      type: bool
      sample: false
    pid:
      description: Its main process. V(null) where it has none.
      type: int
      sample: 4242
    user:
      description: Its user. V(null) where systemd makes one up for each start (C(DynamicUser)), or has no such unit.
      type: str
      sample: vm
    exec:
      description: The program that it starts first. V(null) where it starts none.
      type: str
      sample: /usr/bin/qemu-system-x86_64
    bounding_ipc_lock:
      description: Whether CAP_IPC_LOCK is in its bounding set.
      type: bool
      sample: true
    ambient_ipc_lock:
      description: Whether CAP_IPC_LOCK is one of its ambient capabilities.
      type: bool
      sample: false
    no_new_privs:
      description: Whether it has C(NoNewPrivileges). Ambient capabilities are not affected by that.
      type: bool
      sample: false
    private_users:
      description: Whether it runs in a user namespace of its own (C(PrivateUsers)).
      type: bool
      sample: false
    memlock_bytes:
      description: Its C(LimitMEMLOCK), soft. V(null) where that is unlimited.
      type: int
      sample: 8388608
    memlock_unlimited:
      description: Whether its C(LimitMEMLOCK) is unlimited.
      type: bool
      sample: false
    file_capability:
      description: Whether the program has an attribute security.capability, be it an empty one.
      type: bool
      sample: false
    obstacles:
      description:
        - What would void CAP_IPC_LOCK as an ambient capability, or keep the service from starting; each a sentence.
      type: list
      elements: str
      sample: []
    replica:
      description: What came of O(start).
      type: dict
      contains:
        attempted:
          description: Whether it was tried.
          type: bool
          sample: true
        ok:
          description:
            - As RV(emulators[].started.ok), V(null) where it was not tried, or nothing is known.
          type: bool
          sample: true
        inconclusive:
          description: Whether it was tried and nothing was seen that tells. See the notes.
          type: bool
          sample: false
        user:
          description: The user that it ran as. V(null) where it did not run, or the user has no name here.
          type: str
          sample: vm
        effective:
          description: Its effective capabilities. V(null) where it did not run.
          type: str
          sample: "0000000000004000"
        memlock_bytes:
          description: Its RLIMIT_MEMLOCK, soft. V(null) where that is unlimited, or it did not run.
          type: int
          sample: 8388608
        memlock_unlimited:
          description: Whether its RLIMIT_MEMLOCK was unlimited.
          type: bool
          sample: false
        msg:
          description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
          type: str
          sample: ""
users:
  description: The users, in the order of O(users).
  returned: always
  type: list
  elements: dict
  contains:
    user:
      description: As it was given.
      type: str
      sample: alice
    present:
      description: Whether this host has that user.
      type: bool
      sample: true
    attempted:
      description: Whether it was tried.
      type: bool
      sample: true
    ok:
      description: V(true) where there was a session. V(null) where it was not tried, or there was none.
      type: bool
      sample: true
    inconclusive:
      description: Whether it was tried and there was no session, so that nothing is known of the limit. See the notes.
      type: bool
      sample: false
    memlock_bytes:
      description: RLIMIT_MEMLOCK in the session, soft. V(null) where that is unlimited, or there was none.
      type: int
      sample: 8388608
    memlock_unlimited:
      description: Whether RLIMIT_MEMLOCK was unlimited.
      type: bool
      sample: false
    msg:
      description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
      type: str
      sample: ""
scratch:
  description: What came of O(scratch).
  returned: always
  type: dict
  contains:
    attempted:
      description: Whether it was tried.
      type: bool
      sample: true
    ok:
      description: Whether O(user) saw per-process accounting. V(null) where it was not tried, or nothing is known.
      type: bool
      sample: true
    inconclusive:
      description: Whether it was tried and nothing was seen that tells. See the notes.
      type: bool
      sample: false
    mode:
      description: The rlimit mode that O(user) saw. V(null) where none was seen.
      type: str
      sample: process
    msg:
      description: Why it was not tried, what is wrong, or why nothing is known; empty otherwise.
      type: str
      sample: ""
"""

import os
from functools import partial
from typing import Callable, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ..module_utils import _vmm, _vmm_start
from ..module_utils._child import Interrupted, insist, run_command
from ..module_utils._errors import AccessRefused, IommufdError, shown_path
from ..module_utils._module import Row, finish, memlock_row
from ..module_utils._process import Status
from ..module_utils._user import User, find_user
from ..module_utils._vmm import Conditions, Program, Unit

NOT_ASKED = "It was not asked for."
CHECK_MODE = "Not run in check mode."

UNTRIED = {"attempted": False, "ok": None, "inconclusive": False}
STARTED = {"user": None, "effective": None, "memlock_bytes": None, "memlock_unlimited": False}


class CheckTask:
    """What was asked for. `user` is None where none is given."""

    def __init__(self, params: Row, check_mode: bool) -> None:
        self.params = params
        self._check_mode = check_mode
        as_user = [name for name in ("trial", "scratch") if params[name]]
        if params["start"] and params["emulators"] and not params["domain"]:
            as_user.append("start")
        if as_user and not params["user"]:
            raise IommufdError(f"{as_user[0]} takes user: the name of the user that emulators run as on this host.")
        # One that is not there is told of at once, not when something is to be started.
        self.user: User | None = find_user(params["user"]) if params["user"] else None
        starts = [name for name in ("trial", "start", "scratch", "users") if params[name]]
        if starts and not check_mode and os.geteuid() != 0:
            raise AccessRefused(
                f"uid {os.geteuid()} cannot be asked for {starts[0]}, which takes root: run the task with become: true."
            )

    def needed_user(self) -> User:
        """The user, without whom nothing is started. Raises IommufdError."""
        if self.user is None:
            raise IommufdError("It takes user: the name of the user that emulators run as on this host.")
        return self.user

    def tried(self, name: str, nothing: Row, act: Callable[[], Row]) -> Row:
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


def seen_row(seen: _vmm_start.ProcessSeen) -> Row:
    """What was started."""
    void = _vmm.has_ipc_lock(seen.status.effective) and not seen.lifts_memlock
    return {
        "ok": seen.lifts_memlock,
        "user": seen.user,
        "effective": effective(seen.status),
        **memlock_row(seen.memlock.soft),
        "msg": "It has CAP_IPC_LOCK in a user namespace of its own, which lifts no limit of the host's."
        if void
        else "",
    }


def check_emulator(task: CheckTask, program: Program, under: Conditions) -> Row:
    """An emulator, and what came of starting it."""
    place = program.file_system

    def check() -> None:
        if program.writer or not program.is_program:
            raise IommufdError(_vmm.emulator_obstacles(program, under)[0])

    def trial() -> Row:
        check()
        status = _vmm_start.try_copy(program, under, task.needed_user())
        ok = _vmm.has_ipc_lock(status.effective)
        return {"ok": ok, "effective": effective(status), "msg": "" if ok else "It ran, but without CAP_IPC_LOCK."}

    def started() -> Row:
        check()
        if task.params["domain"]:
            # Few tasks have it start a domain.
            from ..module_utils import _vmm_domain

            patient = partial(run_command, seconds=_vmm_domain.LIBVIRT_SECONDS)
            return seen_row(_vmm_domain.start_bare_domain(patient, task.params["uri"], program))
        return seen_row(_vmm_start.start_emulator(program, under, task.needed_user()))

    return {
        "path": shown_path(program.path),
        "real_path": shown_path(program.real_path),
        "present": program.present,
        "writer": program.writer and program.writer._asdict(),
        "is_emulator": program.is_program,
        "file_system": place and place._asdict(),
        "conditions": {
            "read_from": under.read_from,
            "bounding_ipc_lock": _vmm.has_ipc_lock(under.bounding),
            "no_new_privs": under.no_new_privs,
            "initial_user_namespace": under.initial,
        },
        "obstacles": _vmm.emulator_obstacles(program, under),
        "trial": task.tried("trial", {"effective": None}, trial),
        "started": task.tried("start", {**STARTED, "how": "domain" if task.params["domain"] else "bare"}, started),
    }


def check_unit(task: CheckTask, unit: Unit) -> Row:
    """A service, and what came of starting one like it."""
    program = unit.program

    def replica() -> Row:
        if not unit.present or program is None or program.writer:
            raise IommufdError(_vmm.unit_obstacles(unit)[0])
        # Few tasks have it start a unit's replica.
        from ..module_utils import _vmm_replica

        return seen_row(_vmm_replica.start_replica(run_command, unit))

    return {
        "name": unit.name,
        "instance": unit.instance,
        "present": unit.present,
        "load_state": unit.load_state,
        "outdated": unit.outdated,
        "active": unit.active,
        "pid": unit.pid,
        "user": unit.user,
        "exec": program and shown_path(program.path),
        "bounding_ipc_lock": _vmm.has_ipc_lock(unit.bounding),
        "ambient_ipc_lock": _vmm.has_ipc_lock(unit.ambient),
        "no_new_privs": unit.no_new_privs,
        "private_users": unit.private_users,
        **memlock_row(unit.memlock.soft),
        "file_capability": program is not None and program.xattr is not None,
        "obstacles": _vmm.unit_obstacles(unit),
        "replica": task.tried("start", STARTED, replica),
    }


def check_user(task: CheckTask, name: str) -> Row:
    """A user's limit."""
    nothing: Row = {"user": name, "present": False, "memlock_bytes": None, "memlock_unlimited": False}
    try:
        user = find_user(name)
    except IommufdError as exc:
        return {**nothing, **UNTRIED, "msg": str(exc)}

    def session() -> Row:
        return {"ok": True, **memlock_row(_vmm_start.open_session(user).soft)}

    return task.tried("users", {**nothing, "present": True}, session)


def check_iommufd(task: CheckTask) -> Row:
    """What came of setting an iommufd."""

    def scratch() -> Row:
        mode = _vmm_start.try_mode(task.needed_user())
        return {"ok": mode == "process", "mode": mode}

    return task.tried("scratch", {"mode": None}, scratch)


def run(params: Row, check_mode: bool, result: Row) -> None:
    """Looks at all that was asked for, and tries it. Raises IommufdError where the task asks for what cannot be."""
    task = CheckTask(params, check_mode)
    # Everything is looked at before anything is started.
    programs = [_vmm.look_at_program(path) for path in params["emulators"]]
    units = [_vmm.look_at_unit(run_command, name) for name in params["units"]]
    under = _vmm.look_at_conditions(run_command) if programs else None
    result["emulators"] = [check_emulator(task, each, under) for each in programs] if under else []
    result["units"] = [check_unit(task, each) for each in units]
    result["users"] = [check_user(task, each) for each in params["users"]]
    result["scratch"] = check_iommufd(task)


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
            "scratch": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    finish(module, run)


if __name__ == "__main__":
    main()
