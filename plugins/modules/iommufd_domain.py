#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_domain
short_description: Start a libvirt domain with an iommufd that is opened and set for it
description:
  - Starts a domain of a user's own libvirt (C(qemu:///session)) with an iommufd whose memory accounting is per process.
    That libvirt runs without privilege, so it cannot set the accounting itself. Without this module, the second domain
    of a user fails with error -12, C(Cannot allocate memory), though each domain is within its limit.
  - As root, the module opens an iommufd and sets it. A child that has become the user connects to the user's libvirt,
    hands the descriptor over, and starts the domain. Nothing else runs as root.
  - If the domain runs already, the module only looks at it. An iommufd that is in use cannot be set any more.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  name:
    description:
      - The name of the domain. It must be defined.
      - Its XML must say that it gets its iommufd from somebody else, by a line below C(<domain>) such as
        C(<iommufd enabled='yes' fdgroup='iommufd'/>). The group can have any name. With that line, libvirt passes all
        its PCI devices through by iommufd, except those with C(<driver iommufd='no'/>).
    type: str
    required: true
  user:
    description:
      - The user whose libvirt it is, and who the child becomes. Required for C(qemu:///session).
      - The user's service manager must run, as it does at all times with C(loginctl enable-linger USER). The user must
        be allowed to open the VFIO devices of the domain.
    type: str
  uri:
    description:
      - Which libvirt it is, V(qemu:///session) or V(qemu:///system). Only a libvirt of the same host can take a
        descriptor.
      - The default is V(qemu:///session) if O(user) is given, otherwise V(qemu:///system).
      - The system libvirt sets the accounting itself since 12.1, if its daemon runs with CAP_SYS_RESOURCE. It needs
        this module only for a domain that gets its iommufd from somebody else, or if the daemon lacks the privilege.
    type: str
  state:
    description:
      - The state to start the domain in. The module leaves a domain as it is that runs or is paused already.
    type: str
    choices:
      - running
      - paused
    default: running
  rlimit_mode:
    description:
      - How the memory that the iommufd pins is to be accounted.
      - V(process) charges the emulator alone; C(VmLck) in C(/proc/PID/status) shows the charge.
      - V(user) charges the user for all of the user's processes together. That is how each iommufd starts.
    type: str
    choices:
      - process
      - user
    default: process
  timeout:
    description:
      - How many seconds libvirt may take to answer or to start the domain, from 1 to 86400. Pinning much memory takes
        time.
      - After that time the task fails, but libvirt may still start the domain.
    type: int
    default: 600
extends_documentation_fragment:
  - virt.iommufd._attributes
attributes:
  check_mode:
    details:
      - The module asks libvirt, so a daemon that waits behind its socket wakes up. It does not tell the user's service
        manager to start one. Where that would be needed, it reports no more than that, and that it would start the
        domain.
      - The module tries on an iommufd of its own whether the accounting could be set.
requirements:
  - Linux 6.2 or later, built with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, with the kernel module C(iommufd) loaded.
  - libvirt 12.2 or later, or an older one into which a distribution has taken C(<iommufd fdgroup=...>), and its Python
    binding for the Python that Ansible uses on the host. That is the package C(python3-libvirt) of Debian, Ubuntu,
    Fedora and Red Hat. Whether libvirt knows that element is told by what it says of the domain, else by its library
    and schemas, and by its version only where these cannot be read.
  - systemd, for a user's libvirt that does not run yet.
notes:
  - B(Privilege.) The module needs root (C(become=true)) with CAP_SYS_RESOURCE in the initial user namespace. It also
    needs ptrace access to the emulator, to read the accounting at the end.
  - B(The limit.) libvirt limits what the emulator may lock to the domain's memory and 1 GiB. RV(domain.memlock_bytes)
    tells what else counts. Without privilege, it can do that only within the daemon's own RLIMIT_MEMLOCK, which is that
    of the user's service manager. So C(LimitMEMLOCK=) of C(user@UID.service) must suffice for the domain that needs
    most. The module reads the daemon's limit before it starts anything.
  - B(What libvirt does not count.) With O(rlimit_mode=process), the memory of a domain counts twice in the emulator's
    C(VmLck) if one device is passed through by iommufd and another one by the legacy container (C(<driver
    iommufd='no'/>)). So it does if QEMU locks its memory itself. Then the limit can be too small, and QEMU would end
    with error -12. For a vDPA device, C(VmPin) is checked in every mode and with every capability. The module refuses
    to start a domain that is certain not to fit, and says what to change. It starts a domain of which that is not
    certain, such as one whose emulator may have CAP_IPC_LOCK.
  - B(The daemon.) The module starts no daemon itself, since that daemon would have root's limits and be in Ansible's
    control group. The user's service manager starts it. Of the user's units C(virtqemud.socket), C(virtqemud.service),
    C(libvirtd.socket) and C(libvirtd.service), it starts the first that exists. If there is none, C(systemd-run) makes
    a transient service.
  - B(The next boot.) libvirt cannot start such a domain by itself, so C(virsh autostart) does not work. A systemd unit
    can, with C(iommufd-exec) and C(virsh), without Ansible. The last examples have such a unit for all domains of a
    user.
  - B(Who holds the iommufd.) Once the task has ended, only the emulator does.
  - B(The devices.) A user's libvirt cannot bind a device to C(vfio-pci), nor open a node that the user may not open. So
    prepare both beforehand, and set C(managed='no') in the domain's XML.
seealso:
  - module: virt.iommufd.iommufd_option
    description: Reads the accounting of a domain that runs, or sets that of a VMM that has no device yet.
  - module: virt.iommufd.iommufd_info
    description: Tells how all of a host's VMs are accounted, and what still fits.
  - name: virDomainFDAssociate
    description: The function of libvirt that hands the descriptor over.
    link: https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainFDAssociate
  - name: user@.service(5)
    description: A user's service manager, its drop-ins and limits.
    link: https://man7.org/linux/man-pages/man5/user@.service.5.html
"""

EXAMPLES = r"""
# What user vm's own libvirt needs.

- name: Find the user's id
  ansible.builtin.getent:
    database: passwd
    key: vm

- name: Ensure that there is a folder for settings of the user's service manager
  ansible.builtin.file:
    path: /etc/systemd/system/user@{{ ansible_facts['getent_passwd'].vm[1] }}.service.d
    state: directory
    mode: "0755"

- name: Ensure that the user's domains of up to 3 GiB may lock their memory
  ansible.builtin.copy:
    content: |
      [Service]
      LimitMEMLOCK=4G
    dest: /etc/systemd/system/user@{{ ansible_facts['getent_passwd'].vm[1] }}.service.d/memlock.conf
    mode: "0644"

- name: Ensure that systemd reads these settings (restart a service manager that runs already)
  ansible.builtin.systemd_service:
    daemon_reload: true

- name: Ensure that the user's service manager always runs
  ansible.builtin.command:
    cmd: loginctl enable-linger vm
    creates: /var/lib/systemd/linger/vm

- name: Ensure that VFIO devices belong to the user
  ansible.builtin.copy:
    content: |
      SUBSYSTEM=="vfio-dev", OWNER="vm", MODE="0600"
    dest: /etc/udev/rules.d/80-vfio-vm.rules
    mode: "0644"
  register: rule

- name: Ensure that devices that are bound already belong to the user, too
  ansible.builtin.command:
    cmd: udevadm trigger --settle --subsystem-match=vfio-dev
  when: rule is changed

# Start domains of the user's own libvirt, charged for themselves.

- name: Start a domain
  virt.iommufd.iommufd_domain:
    name: vm1
    user: vm

- name: Start another one, and leave it paused
  virt.iommufd.iommufd_domain:
    name: vm2
    user: vm
    state: paused

# Start the two at each boot, without Ansible, with what the role iommufd_host installs for iommufd_host_launcher.

- name: Ensure that the user's service manager can start libvirt when somebody asks for it
  ansible.builtin.copy:
    content: "{{ item.value }}"
    dest: /etc/systemd/user/{{ item.key }}
    mode: "0644"
  loop: "{{ units | dict2items }}"
  loop_control:
    label: "{{ item.key }}"
  vars:
    units:
      libvirtd.socket: |
        [Socket]
        ListenStream=%t/libvirt/libvirt-sock
        SocketMode=0700
      libvirtd.service: |
        [Service]
        Type=notify
        ExecStart=/usr/sbin/libvirtd --timeout 120
        KillMode=process

- name: Ensure that there is a unit for any domain of the user
  ansible.builtin.copy:
    content: |
      [Unit]
      Description=Domain %i of user vm
      Requires=user@{{ uid }}.service
      After=user@{{ uid }}.service

      [Service]
      Type=oneshot
      RemainAfterExit=yes
      User=vm
      Environment=XDG_RUNTIME_DIR=/run/user/{{ uid }} LIBVIRT_AUTOSTART=0
      # The socket cannot be started while libvirt runs without it, and then need not.
      ExecStartPre=-systemctl --user start libvirtd.socket
      ExecStart=+/usr/local/bin/iommufd-exec --user vm --strict -- \
          virsh --connect qemu:///session "dom-fd-associate %i iommufd {iommufd}; start %i"

      [Install]
      WantedBy=multi-user.target
    dest: /etc/systemd/system/domain-of-vm@.service
    mode: "0644"
  vars:
    uid: "{{ ansible_facts['getent_passwd'].vm[1] }}"

- name: Ensure that both domains start at each boot
  ansible.builtin.systemd_service:
    name: domain-of-vm@{{ item }}.service
    enabled: true
    daemon_reload: true
  loop:
    - vm1
    - vm2
"""

RETURN = r"""
libvirt:
  description: The libvirt that was asked.
  returned: when it answered
  type: dict
  contains:
    uri:
      description: Its URI.
      type: str
      sample: qemu:///session
    version:
      description: The version of its daemon.
      type: str
      sample: 12.8.0
    pid:
      description: The process of its daemon; V(null) for the system libvirt, and for a domain that runs already.
      type: int
      sample: 2121
    memlock_bytes:
      description:
        - The hard RLIMIT_MEMLOCK of its daemon; V(null) where there is no limit, and where RV(libvirt.pid) is V(null).
      type: int
      sample: 4294967296
    memlock_unlimited:
      description: Whether the daemon has no such limit; V(null) where RV(libvirt.pid) is V(null).
      type: bool
      sample: false
    started:
      description:
        - The unit that the user's service manager started, since no libvirt answered; V(null) if one answered.
      type: str
      sample: libvirtd.service
domain:
  description: The domain as it is now, or in check mode as it would be.
  returned: when libvirt knows it, or in check mode when libvirt does not run
  type: dict
  contains:
    name:
      description: Its name.
      type: str
      sample: vm1
    uuid:
      description: Its UUID; V(null) in check mode when libvirt does not run.
      type: str
      sample: 8e3ae1bb-0f0e-4a0f-8f55-1a8f0b2a1c51
    state:
      description: Its state, in libvirt's words, such as V(running), V(paused) or V(shut off).
      type: str
      sample: running
    memlock_bytes:
      description:
        - The limit on locked memory that libvirt gives to its emulator, as this module computes it. V(null) for no
          limit, and where RV(domain.memlock_unlimited) is V(null).
        - That is the domain's C(<hard_limit>). Without it, the memory, times the C(<hostdev>) of VFIO if there is an
          C(<iommu>), plus the memory once more for each vDPA device and each NVMe disk, plus 1 GiB.
      type: int
      sample: 2214592512
    memlock_unlimited:
      description:
        - Whether libvirt sets no limit, as for C(<memoryBacking><locked/></memoryBacking>). V(null) in check mode when
          libvirt does not run, and for POWER with KVM, where libvirt reckons otherwise.
      type: bool
      sample: false
process:
  description: The domain's emulator.
  returned: when the domain runs, not in check mode before it is started
  type: dict
  contains:
    pid:
      description: Its process id.
      type: int
      sample: 4242
    comm:
      description: Its name.
      type: str
      sample: qemu-system-x86
    uid:
      description: Its real user id.
      type: int
      sample: 1001
    user:
      description: The name of that user; V(null) where the host knows none.
      type: str
      sample: vm
rlimit_mode:
  description:
    - How the memory that the emulator's iommufd pins is accounted now, or in check mode would be. V(null) where its
      iommufds differ, or it has none.
  returned: when the domain runs, or would run in check mode
  type: str
  sample: process
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._accounting import UNLIMITED
from ..module_utils._change import Result, explain
from ..module_utils._child import NoAnswer, in_child
from ..module_utils._device import new_iommufd
from ..module_utils._domain_start import (
    Daemon,
    DomainSeen,
    Endpoint,
    NoDaemon,
    Started,
    check_fit,
    check_limit,
    check_startable,
    dotted_version,
    foretell_changes,
    is_session,
    look_at_daemon,
    look_at_domain,
    set_mode,
    start_domain,
)
from ..module_utils._domain_xml import reckoned_limit
from ..module_utils._errors import IommufdError
from ..module_utils._iommufd import BUSY, CHANGED, RLIMIT_MODE, UNCHANGED
from ..module_utils._module import Row, finish, memlock_row
from ..module_utils._user import find_user

URIS = ("qemu:///session", "qemu:///system")
SHUT_OFF = "shut off"
# A day. What is much longer is beyond what the system calls take.
TIMEOUT_MAX = 86400


def libvirt_of(params: Row) -> Endpoint:
    """The libvirt that the task names. Raises IommufdError where its options do not go together."""
    user = None if params["user"] is None else find_user(params["user"])
    uri = params["uri"] or URIS[user is None]
    if uri.partition("?")[0] not in URIS:
        raise IommufdError(f"uri {uri} is not {' or '.join(URIS)}: only a libvirt of this host can take a descriptor.")
    if user is None and is_session(uri):
        raise IommufdError(f"{uri} is a user's own libvirt: give user, too.")
    return Endpoint(uri, user)


def check_name(name: str) -> None:
    """Raises IommufdError where no domain can have that name: libvirt makes files of it."""
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise IommufdError(f"{name!r} is not the name of a domain: it is a name, not a path.")


def check_timeout(seconds: int) -> None:
    """Raises IommufdError where that is no time to wait."""
    if not 1 <= seconds <= TIMEOUT_MAX:
        raise IommufdError(f"timeout {seconds} is out of range: give 1 to {TIMEOUT_MAX} seconds.")


def limit_row(reckoned: int | None) -> Row:
    """What libvirt reckons for a domain, None for what is not known."""
    if reckoned is None:
        return {"memlock_bytes": None, "memlock_unlimited": None}
    return memlock_row(None if reckoned >= UNLIMITED else reckoned)


class DomainTask:
    """One run of the module: what it was asked for, and the return value as it comes together."""

    def __init__(self, params: Row, dry_run: bool, result: Row) -> None:
        self.name: str = params["name"]
        self.state: str = params["state"]
        self.mode: str = params["rlimit_mode"]
        self.wanted = RLIMIT_MODE.number(self.mode)
        self.seconds: int = params["timeout"]
        self.dry_run = dry_run
        self.result = result
        check_name(self.name)
        check_timeout(self.seconds)
        self.libvirt = libvirt_of(params)

    def run(self) -> None:
        """Does what the task asks for, and fills in the return value. Raises IommufdError."""
        seen = self._meet()
        if seen is None:
            self._foretell(None, None)
        elif seen.active:
            self._domain(seen, seen.state)
            self._compare(self._look_at_emulator(), started=False)
        else:
            self._domain(seen, seen.state)
            self._start(seen)

    def _meet(self) -> DomainSeen | None:
        """What libvirt says of the domain, once it runs; None where it does not, and must not be started."""
        started = None
        try:
            seen = self._look()
        except NoDaemon as exc:
            session = self.libvirt.session
            if session is None:
                raise
            if self.dry_run:
                self.result["warnings"] = [f"{exc}. So no more can be told than that libvirt would be started first."]
                return None
            # Nearly always one runs, and to import this costs each task.
            from ..module_utils._daemon import start_daemon, unit_from_json

            started = unit_from_json(self._as_user(partial(start_daemon, self.libvirt.uri, session.name)))
            seen = self._look()
        self.result["libvirt"] = {
            "uri": self.libvirt.uri,
            "version": dotted_version(seen.version),
            "pid": None,
            "memlock_bytes": None,
            "memlock_unlimited": None,
            "started": started,
        }
        return seen

    def _look(self) -> DomainSeen:
        unprivileged = self.libvirt.session is not None
        return DomainSeen.from_json(self._as_user(partial(look_at_domain, self.libvirt.uri, self.name, unprivileged)))

    def _as_user(self, work: Any, keep: Iterable[int] = ()) -> Any:
        return in_child(self.libvirt.user, work, self.seconds, tuple(keep))

    def _domain(self, seen: DomainSeen | None, state: str) -> None:
        self.result["domain"] = {
            "name": self.name,
            "uuid": seen and seen.uuid,
            "state": state,
            **limit_row(None if seen is None else reckoned_limit(seen.definition)),
        }

    def _start(self, seen: DomainSeen) -> None:
        fdgroup = check_startable(self.name, self.libvirt, seen)
        check_fit(self.name, self.libvirt, seen, self._read_limit(seen), self.mode)
        if self.dry_run:
            self._foretell(seen, seen.state)
            return
        with new_iommufd() as fd:
            self._check(set_mode(fd, self.wanted, dry_run=False))
            paused = self.state == "paused"
            try:
                answer = self._as_user(partial(start_domain, self.libvirt.uri, self.name, fdgroup, fd, paused), [fd])
                became = Started.from_json(answer)
            except NoAnswer as exc:
                raise IommufdError(
                    f"{exc} libvirt may still start domain {self.name}: look again (virsh --connect"
                    f" {self.libvirt.uri} domstate {self.name}), or run this task again."
                ) from exc
        self._domain(seen, became.state)
        if became.started:
            self.result["changed"] = True
            self._diff(seen.state, self.result["domain"]["state"])
        self._compare(self._look_at_emulator(), became.started)

    def _read_limit(self, seen: DomainSeen) -> Daemon | None:
        """Reads the limit of a user's daemon. Raises IommufdError where libvirt would fail for it."""
        target, session = self.libvirt.daemon(), self.libvirt.session
        if target is None or session is None:
            return None
        daemon = look_at_daemon(target)
        self.result["libvirt"].update(pid=daemon.pid, **memlock_row(daemon.hard))
        check_limit(self.name, session, daemon, seen.definition)
        return daemon

    def _foretell(self, seen: DomainSeen | None, state: str | None) -> None:
        """What would happen, but for what only the start itself can tell. Raises IommufdError."""
        with new_iommufd() as fd:
            self._check(set_mode(fd, self.wanted, dry_run=True))
        self.result["changed"] = True
        self.result["rlimit_mode"] = self.mode
        self._domain(seen, self.state)
        self._diff(state or SHUT_OFF, self.state)

    def _check(self, result: Result) -> None:
        """Raises IommufdError where a new iommufd could not be set."""
        if result.outcome not in (CHANGED, UNCHANGED):
            said = explain(result, "A new iommufd", RLIMIT_MODE, self.wanted)
            raise IommufdError(f"{said} Domain {self.name} was not started.")

    def _diff(self, before: str, after: str) -> None:
        self.result["diff"] = {
            "before": {"state": before, "rlimit_mode": None},
            "after": {"state": after, "rlimit_mode": self.mode},
        }

    def _look_at_emulator(self) -> list[tuple[str, Result]]:
        process, found = foretell_changes(self.libvirt.emulator_of(self.name), self.wanted)
        self.result["process"] = process
        modes = {None if each.before is None else str(RLIMIT_MODE.value(each.before)) for _name, each in found}
        self.result["rlimit_mode"] = modes.pop() if len(modes) == 1 else None
        return found

    def _compare(self, found: list[tuple[str, Result]], started: bool) -> None:
        """Raises IommufdError where the emulator is not accounted as it should be."""
        way = "Shut it off, and run this task again to start it."
        if not found:
            raise IommufdError(
                f"Domain {self.name} {'was started' if started else 'runs already'}, but its emulator holds no iommufd:"
                f" its devices are passed through by the VFIO container, or it has none. {way}"
            )
        for subject, result in found:
            if result.outcome == CHANGED:
                raise IommufdError(
                    f"Domain {self.name}: {subject} is not accounted as asked for, but holds no object yet, so that"
                    f" virt.iommufd.iommufd_option can still set it."
                )
            if result.outcome != UNCHANGED:
                also = f" {way}" if result.outcome == BUSY else ""
                raise IommufdError(
                    f"Domain {self.name} {'was started' if started else 'runs already'}."
                    f" {explain(result, subject, RLIMIT_MODE, self.wanted)}{also}"
                )


def run(params: Row, check_mode: bool, result: Row) -> None:
    """Does what the task asks for, and fills in the return value. Raises IommufdError."""
    DomainTask(params, check_mode, result).run()


def main() -> NoReturn:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "user": {"type": "str"},
            "uri": {"type": "str"},
            "state": {"type": "str", "choices": ["running", "paused"], "default": "running"},
            "rlimit_mode": {"type": "str", "choices": ["process", "user"], "default": "process"},
            "timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    finish(module, run)


if __name__ == "__main__":
    main()
