# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter audit_report, which makes the report of the playbook audit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..plugin_utils._filters import reporting
from ..plugin_utils._report import audit_report

DOCUMENTATION = r"""
name: audit_report
short_description: Report how the running VMs of many hosts are accounted, and what to do where they are at risk
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Makes a report of what M(virt.iommufd.iommufd_info) returned for each of many hosts, as data and as text.
  - The playbook C(virt.iommufd.audit) prints and writes this report.
options:
  _input:
    description:
      - The names of hosts, and for each what a task with M(virt.iommufd.iommufd_info) registered, also a failure.
      - Its O(virt.iommufd.iommufd_info#module:gather_subset) must have V(processes), and should have V(host) and
        V(users), as by default. What a result lacks is unknown.
    type: dict
    required: true
  forecast:
    description:
      - Whether to tell, too, which of the VMs that are defined on each host would start, now and after a reboot, as
        P(virt.iommufd.memlock_forecast#filter) does.
      - The results must have V(host), V(processes), V(users) and V(defined) for that. Of a host whose result lacks one
        of these, the report says so.
    type: bool
    default: false
notes:
  - In the text, everything but printable ASCII is escaped, so that no name of a VM can fool a terminal. A text that is
    too long for its column ends with C(...). The data holds it in full.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Returns what this filter takes, and explains the numbers.
  - plugin: virt.iommufd.memlock_fit
    plugin_type: filter
    description: Predicts whether a VM would start or could grow on one host.
  - plugin: virt.iommufd.memlock_forecast
    plugin_type: filter
    description: Predicts which VMs of one host would start.
"""

EXAMPLES = r"""
- name: Report how the VMs of all hypervisors are accounted
  hosts: hypervisors
  become: true
  gather_facts: false
  tasks:
    - name: Look at the host
      virt.iommufd.iommufd_info:
      register: info
      ignore_errors: true
      ignore_unreachable: true

    - name: Report what was found
      ansible.builtin.debug:
        msg: >-
          {{ (dict(ansible_play_hosts_all | zip(ansible_play_hosts_all | map('extract', hostvars, 'info')))
             | virt.iommufd.audit_report).lines }}
      run_once: true
"""

RETURN = r"""
_value:
  description: The report.
  type: dict
  contains:
    hosts:
      description: The report as data, by the name of the host.
      type: dict
      contains:
        status:
          description:
            - V(ok) for a host that the module could look at, V(failed) or V(unreachable) for another.
            - V(no_iommufd) for one without VMs whose kernel has no iommufd, or has not loaded its module. With VMs of
              other backends, it is V(ok).
          type: str
          sample: ok
        msg:
          description: Why the module could not look at the host; empty if it could.
          type: str
          sample: ""
        limits_of_view:
          description: What was not seen there, as in RV(virt.iommufd.iommufd_info#module:host.limits_of_view).
          type: list
          elements: dict
        not_ready:
          description:
            - What must be there before a VM with iommufd can start, and is not, or may not be, as in
              C(host.readiness) of M(virt.iommufd.iommufd_info).
          type: list
          elements: dict
        vms:
          description: The processes that hold an iommufd, a legacy container or a vDPA device, or may hold one.
          type: list
          elements: dict
          contains:
            vm:
              description: Its libvirt domain, else what it calls its guest, else its systemd unit, else its name.
              type: str
              sample: vm1
            pid:
              description: Its process id.
              type: int
              sample: 4242
            user:
              description: The name of its user, or the id where that has none.
              type: str
              sample: libvirt-qemu
            backends:
              description: What it has its devices by, V(iommufd), V(legacy) or V(vdpa); V(null) if unknown.
              type: list
              elements: str
              sample: [iommufd]
            accounting:
              description: Who is charged for what it pins, V(user), V(process) or V(none); V(null) if unknown.
              type: str
              sample: user
            counter:
              description:
                - The counter that is full next. V(user) is that of its user. V(mm_locked) and V(mm_pinned) are its own,
                  which C(/proc/PID/status) has as C(VmLck) and C(VmPin).
                - V(null) where none is checked, or where that is unknown.
              type: str
              sample: user
            pinned_bytes:
              description: The memory that it has pinned, also by the legacy container.
              type: int
              sample: 67371008
            limit_bytes:
              description: Its soft limit RLIMIT_MEMLOCK; V(null) where it is unlimited.
              type: int
              sample: 104857600
            limit_unlimited:
              description: Whether that limit is unlimited.
              type: bool
              sample: false
            headroom_bytes:
              description: How much more it could pin; V(null) where nothing limits it, and where that is unknown.
              type: int
              sample: 37486592
            verdict:
              description:
                - V(over limit) where a counter holds more than its limit allows, so that it cannot pin anything more.
                - V(at risk) where it is charged to its user, and another VM as large as the user's largest would not
                  fit.
                - V(may fail later) where all fits now, but it, or another VM that is charged to the same user, has a
                  device that pins memory as it runs, such as an mdev, or may have one, and its limit does not, or may
                  not, hold all that may be pinned then. So does a vDPA device that its guest has not turned on.
                - V(unknown) where its accounting is unknown, or whether another VM would fit.
                - V(not limited) where nothing limits it, because it has CAP_IPC_LOCK or its limit is unlimited.
                - V(ok) otherwise. What is charged is within its limit.
              type: str
              sample: at risk
            remedy:
              description:
                - What to do where it is V(over limit), V(at risk) or V(may fail later), in one sentence.
                - A C(<hard_limit>) in it is 1 GiB larger than what is charged. libvirt limits with it all memory of the
                  VM, and so the emulator's own, too.
                - For V(unknown), what would tell. Empty otherwise.
              type: str
              sample: >-
                At its next start have libvirt set the rlimit mode: name iommufd by <driver name='vfio' iommufd='yes'/>
                in its <hostdev>, and not in <qemu:commandline>.
            notes:
              description: What makes these values uncertain, in sentences.
              type: list
              elements: str
              sample: []
        holders:
          description:
            - Processes that are no VMs. Another process has all that they hold, and they have pinned nothing, as a
              launcher that keeps its copy of a VM's iommufd.
          type: list
          elements: dict
          contains:
            name:
              description: The name of the process, and its id.
              type: str
              sample: launcher (812)
            pid:
              description: Its process id.
              type: int
              sample: 812
            user:
              description: The name of its user, or the id where that has none.
              type: str
              sample: root
            backends:
              description: What it holds, as that of a VM.
              type: list
              elements: str
              sample: [iommufd]
        verdict:
          description:
            - The first of V(over limit), V(at risk), V(may fail later), V(unknown), V(ok) and V(not limited) that one
              of its VMs has.
            - V(no VMs) where it has none, V(unknown) where it may have some that were not seen, or V(not ready) where
              it has none and one with iommufd could not start.
            - V(no iommufd), V(failed) or V(unreachable) as in RV(_value.hosts.status).
          type: str
          sample: at risk
        summary:
          description: The same in a few words.
          type: str
          sample: "3 VMs, 2 at risk: vm1, vm2; 1 not limited"
        forecast:
          description: Which of the VMs that are defined there would start. Only with O(forecast).
          type: dict
          contains:
            msg:
              description: Why that is not known; empty if it is.
              type: str
              sample: ""
            vms:
              description:
                - C(vm), C(kind), C(manager), C(user), C(running), C(autostart), C(now) and C(reboot) of each, as in
                  RV(virt.iommufd.memlock_forecast#filter:_value.vms).
              type: list
              elements: dict
            now:
              description: >-
                How many would start now, as in RV(virt.iommufd.memlock_forecast#filter:_value.now). V(null) if unknown.
              type: dict
            reboot:
              description: >-
                The same after a reboot, as in RV(virt.iommufd.memlock_forecast#filter:_value.reboot).
              type: dict
            trouble:
              description: Whether one would not start or need not, or whether that is not known.
              type: bool
              sample: true
            summary:
              description: The same in a few words.
              type: str
              sample: 3 of 7 VMs would not come back after a reboot
    lines:
      description:
        - The report as text, no line longer than 72 characters. First it has a table for each host, and below that what
          to do, what is uncertain, and what the host lacks. With O(forecast), a table of the VMs that are defined
          there follows. RV(_value.end) is the end.
      type: list
      elements: str
      sample:
        - kvm1
        - VM   backend  counter  pinned  limit  headroom  verdict
        - vm1  iommufd  user      64.2M   100M     35.8M  at risk
        - All of user libvirt-qemu.
        - "vm1: At its next start have libvirt set the rlimit mode: name iommufd by"
        - <driver name='vfio' iommufd='yes'/> in its <hostdev>, and not in
        - <qemu:commandline>.
        - ""
        - "1 host with 1 VM: 1 at risk"
        - "kvm1: 1 VM, 1 at risk: vm1"
        - "1 VM: At its next start have libvirt set the rlimit mode: name iommufd"
        - by <driver name='vfio' iommufd='yes'/> in its <hostdev>, and not in
        - <qemu:commandline>.
    end:
      description:
        - The end of it, which fits a screen of 24 lines for any number of hosts. It counts the hosts by their verdicts,
          has a line for each of the worst, and counts the rest. Then it tells what to do for most VMs.
        - With O(forecast), it also tells how many VMs would not come back after a reboot, of all hosts, and of each of
          the worst that has something to tell.
      type: list
      elements: str
      sample:
        - "1 host with 1 VM: 1 at risk"
        - "kvm1: 1 VM, 1 at risk: vm1"
        - "1 VM: At its next start have libvirt set the rlimit mode: name iommufd"
        - by <driver name='vfio' iommufd='yes'/> in its <hostdev>, and not in
        - <qemu:commandline>.
"""


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"audit_report": reporting("audit_report", audit_report)}
