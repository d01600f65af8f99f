# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter memlock_fit, which predicts whether one more VM would start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..plugin_utils._filters import reporting
from ..plugin_utils._fit import memlock_fit

DOCUMENTATION = r"""
name: memlock_fit
short_description: Predict whether one more VM would fit into its limit on pinned memory
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Predicts, from the return value of M(virt.iommufd.iommufd_info) alone, whether the limit on pinned memory would let
    one more VM with a passed-through device start on that host, and why. If not, it says what to change.
  - Sizes are numbers of bytes, or texts such as V(64G), V(64GiB), V(65536M) and V(1.5G). K, M, G, T, P and E count in
    1024s, as do KiB, MiB and so on; kB, MB and so on count in 1000s, as in libvirt. Case does not matter.
options:
  _input:
    description:
      - What M(virt.iommufd.iommufd_info) returned, with at least V(processes) and V(users) in its
        O(virt.iommufd.iommufd_info#module:gather_subset). With V(host), as by default, O(accounting=auto) knows more.
      - If you gave O(virt.iommufd.iommufd_info#module:users), O(user) must be among them.
      - Run the module as root. What it could not see makes the answer uncertain.
    type: dict
    required: true
  memory:
    description: The memory of the VM, as a size.
    type: raw
    required: true
  user:
    description:
      - The user that the VMM will run as, by name or by id.
      - If the input does not know the user, the filter assumes that nothing is charged to that user.
    type: raw
    required: true
  memlock:
    description:
      - The soft limit RLIMIT_MEMLOCK that the VMM will have, as a size.
      - V(unlimited) or V(infinity) means no limit.
      - V(libvirt) means the limit that libvirt gives to a domain without C(<hard_limit>). That is O(memory), with
        O(viommu) times O(vfio_devices), and 1 GiB.
      - If O(user) is libvirt's, C(libvirt-qemu) or C(qemu), and libvirt is known not to set per-process accounting, the
        limit V(libvirt) is unknown. libvirt raises the limit only for a C(<hostdev>). A domain that names iommufd in
        C(<qemu:commandline>) has the limit of libvirt's daemon. So give the C(<hard_limit>) of the domain, or
        C(LimitMEMLOCK) of the daemon. Only a VM with CAP_IPC_LOCK needs neither.
    type: raw
    default: libvirt
  vfio_devices:
    description: How many devices are passed through to the VM. The number matters only with O(viommu).
    type: int
    default: 1
  viommu:
    description:
      - Whether the VM has an IOMMU of its own. Each device then has an address space of its own, and the VM pins its
        memory once for each device.
    type: bool
    default: false
  accounting:
    description:
      - Who will be charged for what the VM pins.
      - V(user) is what the kernel does if nobody sets anything.
      - V(process) is a VM whose iommufd is set so before its first device, as libvirt does since 12.1.
      - V(none) is a VMM that has CAP_IPC_LOCK, so that nothing is charged and no limit is checked.
      - V(auto) finds out. If all emulators for the host's own architecture have CAP_IPC_LOCK, so has the VM. If O(user)
        is libvirt's, C(libvirt-qemu) or C(qemu), and libvirt sets per-process accounting, the VM gets that. Otherwise
        it will be as all running VMs of O(user) are, or per user if there are none. If they differ, or not all of them
        were seen, it may be as any of them is, or per user.
      - Where the host has no emulator for its own architecture, or the input does not tell that, all of its emulators
        count.
      - Where that leaves several possibilities open, all are looked at, and the answer is definite if they agree.
    type: str
    choices:
      - auto
      - user
      - process
      - none
    default: auto
  overhead:
    description:
      - What the VM pins beyond its memory, such as firmware and video memory, in all of its address spaces, as a size.
      - If given, the filter takes it as exact, and rounds the sum with O(memory) up to whole pages. How large they
        are is in the input if V(host) was gathered. Without that, pages may have 4 to 64 KiB.
      - If not given, it may be anything up to the most that a running VM of the input pins beyond its memory, with
        O(viommu) times O(vfio_devices). The filter ignores VMs with more than one IOAS, since they may have pinned
        their memory more than once. It also ignores VMs that pin over 1 GiB beyond their memory, since these probably
        got more memory after their start.
      - If no VM remains, it may be anything up to 1 GiB, which is what libvirt adds to a domain's memory.
    type: raw
notes:
  - The kernel does not publish what it has charged to a user. For per-user accounting, the filter relies on the
    estimate RV(virt.iommufd.iommufd_info#module:users[].charged_bytes).
  - The filter considers the limit alone, and not whether the host has the memory and the devices.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Returns what this filter takes.
  - plugin: virt.iommufd.audit_report
    plugin_type: filter
    description: Reports how the running VMs of many hosts are accounted.
"""

EXAMPLES = r"""
- name: Look at the host
  virt.iommufd.iommufd_info:
  register: info

- name: Fail unless another libvirt domain of 64 GiB is sure to start
  ansible.builtin.assert:
    that: fit.fits is true
    fail_msg: "{{ fit.reason }} {{ fit.remedy }}"
  vars:
    fit: "{{ info | virt.iommufd.memlock_fit(memory='64G', user='libvirt-qemu') }}"

- name: Report whether a VM in a unit with User=vmm and LimitMEMLOCK=66G would start
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(memory='64G', user='vmm', memlock='66G') }}"

- name: Report whether two devices and an IOMMU of its own would be too much for a VM that is charged for itself
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(memory='64G', user=64055, memlock='100G', **devices) }}"
  vars:
    devices:
      vfio_devices: 2
      viommu: true
      accounting: process
"""

RETURN = r"""
_value:
  description: The answer.
  type: dict
  contains:
    fits:
      description: Whether the VM would start. V(null) where that is unknown.
      type: bool
      sample: false
    accounting:
      description:
        - How the VM would be accounted, V(user), V(process) or V(none), which is what CAP_IPC_LOCK leads to.
        - V(null) where several of them are possible. The numbers below are then those of the first that is.
      type: str
      sample: user
    needed:
      description: What the VM pins at most, in bytes.
      type: int
      sample: 69793218560
    charged:
      description: What is charged against the limit already, in bytes. For V(process) and V(none) that is 0.
      type: int
      sample: 67371008
    limit:
      description: The limit in bytes. V(null) where it is unlimited or not known.
      type: int
      sample: 69793218560
    headroom:
      description: What is left of the limit, in bytes. V(null) where it is unlimited, not known or not checked.
      type: int
      sample: 69725847552
    reason:
      description: Why, in sentences.
      type: str
      sample: >-
        The running VMs of libvirt-qemu are accounted per user. The VM pins 64 GiB and 1 GiB beyond that. Charged to
        libvirt-qemu on top of 64.2 MiB, it is 64.2 MiB over its limit of 65 GiB and ends with -12 (Cannot allocate
        memory).
    remedy:
      description: What would make the answer certain, and what to change so that the VM fits. V(null) where it fits.
      type: str
      sample: >-
        To make it fit: have it charged for itself alone, which libvirt 12.1 or later does for devices with <driver
        name='vfio' iommufd='yes'/> if its daemon has CAP_SYS_RESOURCE; or give the VMM CAP_IPC_LOCK (setcap
        cap_ipc_lock+ep /usr/bin/qemu-system-x86_64), and with it the right to pin all memory to whoever may execute
        that; or raise its limit (<memtune><hard_limit unit='KiB'>69271808</hard_limit></memtune> in the domain, 1 GiB
        of it for the emulator's own memory), for this VM only, since the next one takes still more.
"""


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"memlock_fit": reporting("memlock_fit", memlock_fit)}
