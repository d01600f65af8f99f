# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter memlock_forecast, which tells of all VMs that are defined on a host which would start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..plugin_utils._filters import reporting
from ..plugin_utils._forecast import memlock_forecast

DOCUMENTATION = r"""
name: memlock_forecast
short_description: Predict which VMs of a host would start, now and after a reboot
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Predicts, from the return value of M(virt.iommufd.iommufd_info) alone, which of the VMs that are defined on a host
    their limit on pinned memory would let start, why, and what to change.
  - B(Now) is beside the VMs that run. Of one that runs, it is whether that would start again.
  - B(After a reboot), all VMs start that start at boot, and nothing is charged before. What somebody has set of a VM
    that runs is gone then, such as by M(virt.iommufd.iommufd_option). So what counts is the definition of the VM.
    libvirt's daemon has CAP_SYS_RESOURCE as the files of its unit say
    (RV(virt.iommufd.iommufd_info#module:host.libvirt.drop_in)).
  - Of a unit it is taken into account what it keeps C(iommufd-exec) from
    (RV(virt.iommufd.iommufd_info#module:defined[].launcher_lacks)), and its C(MemoryMax=), in which the emulator's own
    memory counts, too. What it has in C(/run), as by C(systemctl --runtime), is gone after a reboot. Where C(PAMName=)
    or a slice with C(MemoryMax=) may decide, it is V(null).
  - Each VM is judged as P(virt.iommufd.memlock_fit#filter) judges it. This filter reckons what the others of its user
    have charged by then.
  - In which order VMs start at boot is not known, except for units that systemd waits for
    (RV(virt.iommufd.iommufd_info#module:defined[].order)). A VM would start if it fits when all others of its user that
    may start before it do so. It would not if it does not fit even when none of them does but those that are certain
    to. Otherwise it is V(null), and the summary tells how many would not start at least and at most.
options:
  _input:
    description:
      - What M(virt.iommufd.iommufd_info) returned, with V(host), V(processes), V(users) and V(defined) in its
        O(virt.iommufd.iommufd_info#module:gather_subset). V(emulators) makes more of it certain.
      - Run the module as root. What it could not see makes the answers uncertain.
    type: dict
    required: true
  move_to:
    description:
      - With V(iommufd), RV(_value.vms[].moved) tells which of the VMs that run or start at boot would start together,
        if all had by iommufd what they have by VFIO's legacy container. Of a domain, that is
        C(<driver name='vfio' iommufd='yes'/>); of a unit, an C(iommufd) of QEMU's own, in the mode C(user), unless it
        has one already.
      - Disks by C(nvme://) and vDPA devices stay as they are.
    type: str
    choices:
      - iommufd
  grow:
    description:
      - What each VM that runs is to get, one at a time. RV(_value.vms[].grown) tells whether that would fit.
    type: dict
    suboptions:
      memory:
        description: The memory that is plugged, as a size such as V(64M).
        type: raw
      devices:
        description: The devices that are plugged, as in O(virt.iommufd.memlock_fit#filter:devices).
        type: list
        elements: dict
  live_update:
    description:
      - Whether to tell, in RV(_value.vms[].live_update), which of the VMs that run could each be taken over by a new
        process with the same limit, as in O(virt.iommufd.memlock_fit#filter:live_update).
    type: bool
    default: false
  known:
    description:
      - What you know of VMs, by their names in C(defined), and which goes before what their definitions say. It is what
        a question says to give, as P(virt.iommufd.memlock_fit#filter) takes it, one or more of C(memory), C(user),
        C(memlock), C(vfio_devices), C(viommu), C(accounting), C(overhead), C(locked), C(devices) and C(cap_ipc_lock).
      - Of a VM whose definition was not understood, it tells all that this may be about. So give what its one VMM has
        in the end, whatever starts that, and always C(devices) or C(vfio_devices).
      - Devices of a domain are libvirt's (C(<hostdev>)), except those in an C(iommufd) with a name.
      - It does not tell of RV(_value.vms[].grown) and RV(_value.vms[].live_update), which are about VMs as they run.
        Of these, ask P(virt.iommufd.memlock_fit#filter).
    type: dict
notes:
  - The mode of an iommufd that somebody else opens and passes to a VM (C(fdgroup), C(fd)) is not known beforehand.
  - It considers the limits and RV(_value.vms[].now.prerequisites), and not whether the host has the memory and the
    devices. Which of them only this boot has is not known, such as a module that was loaded by hand.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Returns what this filter takes.
  - plugin: virt.iommufd.memlock_fit
    plugin_type: filter
    description: Predicts the same of one VM, about which you can tell it more.
  - plugin: virt.iommufd.audit_report
    plugin_type: filter
    description: Shows this of many hosts.
"""

EXAMPLES = r"""
- name: Look at the host, and at the VMs that are defined there
  virt.iommufd.iommufd_info:
    gather_subset: [host, processes, users, emulators, defined]
  register: info

- name: Report which VMs would not come back after a reboot
  ansible.builtin.debug:
    msg: "{{ forecast.reboot.summary }}: {{ forecast.vms | selectattr('reboot') | rejectattr('reboot.starts') }}"
  vars:
    forecast: "{{ info | virt.iommufd.memlock_forecast }}"

- name: Fail unless all of them are certain to come back
  ansible.builtin.assert:
    that: forecast.reboot.at_most == 0
    fail_msg: "{{ forecast.reboot.summary }}"
  vars:
    forecast: "{{ info | virt.iommufd.memlock_forecast }}"

- name: Report what would have to be set before all VMs have their devices by iommufd
  ansible.builtin.debug:
    msg: "{{ forecast.vms | selectattr('moved') | rejectattr('moved.starts') | map(attribute='moved.remedy') }}"
  vars:
    forecast: "{{ info | virt.iommufd.memlock_forecast(move_to='iommufd') }}"

- name: Report what comes back where it is known how much vm1 pins beyond its memory, and locks
  ansible.builtin.debug:
    msg: "{{ (info | virt.iommufd.memlock_forecast(known=known)).reboot.summary }}"
  vars:
    known:
      vm1: {overhead: 256M, locked: 0}

- name: Report whether each VM that runs could get 64 MiB more
  ansible.builtin.debug:
    msg: "{{ (info | virt.iommufd.memlock_forecast(grow={'memory': '64M'})).grown.summary }}"
"""

RETURN = r"""
_value:
  description: The answer.
  type: dict
  contains:
    vms:
      description: The VMs, in the order of C(defined).
      type: list
      elements: dict
      contains:
        vm:
          description: Its domain or its unit.
          type: str
          sample: vm1
        kind:
          description: V(domain) or V(unit).
          type: str
          sample: domain
        manager:
          description: Whose libvirt it is, V(system) or V(session); of a unit, V(system).
          type: str
          sample: system
        user:
          description: Who it runs as. V(null) if unknown.
          type: str
          sample: libvirt-qemu
        running:
          description: Whether it runs. V(null) if unknown.
          type: bool
          sample: false
        autostart:
          description: Whether it starts at boot. V(null) if unknown.
          type: bool
          sample: true
        now:
          description: Whether it would start now, or start again, beside the VMs that run.
          type: dict
          contains: &answer
            starts:
              description:
                - Whether it would, as far as its limit decides. V(null) where that is unknown.
                - Also V(false) where libvirt or the kernel is known not to start it, for another reason.
              type: bool
              sample: false
            reason:
              description: Why, in sentences.
              type: str
              sample: >-
                libvirt is older. QEMU opens the iommufd itself (<qemu:commandline>), and the kernel's default is per
                user. The VM pins 64 GiB and up to 1 GiB beyond that, which is what libvirt allows for. Charged to
                libvirt-qemu on top of 64 GiB, it is at least 63 GiB over the limit of 65 GiB that libvirt gives it and
                ends with -12 (Cannot allocate memory).
            remedy:
              description:
                - What to change so that it fits, the least harmful first. With each of them alone, it would.
                - V(null) where it fits, and where nothing is known that would help.
              type: str
              sample: >-
                To make it fit: raise its limit (<memtune><hard_limit unit='KiB'>136314880</hard_limit></memtune> in the
                domain, 1 GiB of it for the emulator's own memory, since it limits all memory of the VM, too), for this
                VM only, since the next one takes still more.
            question:
              description: The one question that would settle it. V(null) where nothing is to be asked.
              type: str
              sample: null
            counter:
              description: As RV(virt.iommufd.memlock_fit#filter:_value.counter).
              type: str
              sample: user
            accounting:
              description: As RV(virt.iommufd.memlock_fit#filter:_value.accounting).
              type: str
              sample: user
            charged_bytes:
              description: What that counter holds already, at least. The others of its user count that are certain to.
              type: int
              sample: 68719476736
            needed_bytes:
              description: What it adds to that counter at most. V(null) where that is not known.
              type: int
              sample: 69793218560
            limit_bytes:
              description: Its limit. V(null) where it is unlimited or not known.
              type: int
              sample: 69793218560
            limit_unlimited:
              description: Whether it has no limit.
              type: bool
              sample: false
            prerequisites:
              description:
                - What else it needs before it can start at all, in sentences. That is what is missing on the host, and
                  after a reboot what the host may have until then only. It also tells which VMs that run are over
                  limit once this one has started.
              type: list
              elements: str
              sample: []
        reboot:
          description: The same after a reboot. V(null) where it does not start at boot.
          type: dict
          contains: *answer
        moved:
          description: >-
            The same with O(move_to), where all start that run or start at boot. V(null) for others.
          type: dict
          contains: *answer
        grown:
          description: Whether it could get what O(grow) says. V(null) where it does not run.
          type: dict
          contains: *answer
        live_update:
          description: Whether it would survive a live update. V(null) where it does not run.
          type: dict
          contains: *answer
    now:
      description: What C(now) of all VMs comes to.
      type: dict
      contains: &counts
        of:
          description: Of how many VMs this tells.
          type: int
          sample: 1
        "true":
          description: How many are certain to.
          type: int
          sample: 0
        "false":
          description: How many are certain not to.
          type: int
          sample: 1
        unknown:
          description: Of how many it is not known.
          type: int
          sample: 0
        at_least:
          description: How many would not, at least, whatever the order in which they start.
          type: int
          sample: 1
        at_most:
          description: How many would not, at most.
          type: int
          sample: 1
        summary:
          description: The same as a sentence.
          type: str
          sample: 1 of 1 VM would not start now
    reboot:
      description: What C(reboot) comes to.
      type: dict
      contains: *counts
    moved:
      description: What C(moved) comes to. V(null) without O(move_to).
      type: dict
      contains: *counts
    grown:
      description: What C(grown) comes to. V(null) without O(grow).
      type: dict
      contains: *counts
    live_update:
      description: What C(live_update) comes to. V(null) without O(live_update).
      type: dict
      contains: *counts
"""


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"memlock_forecast": reporting("memlock_forecast", memlock_forecast)}
