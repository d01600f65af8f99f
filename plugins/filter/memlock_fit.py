# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter memlock_fit, which predicts whether a VM would start or could grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..plugin_utils._filters import reporting
from ..plugin_utils._fit import memlock_fit

DOCUMENTATION = r"""
name: memlock_fit
short_description: Predict whether a VM would fit into its limit on pinned memory
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Predicts, from the return value of M(virt.iommufd.iommufd_info) alone, whether the limit on pinned memory would let
    a VM with passed-through devices start on that host, and why. If not, it says what to change. It does the same for a
    VM that runs and is to grow, or is to be live-updated.
  - The kernel has three counters for pinned memory, the user's sum, C(VmLck) and C(VmPin), and compares each with the
    limit of the process that pins more. The filter counts iommufd, VFIO's legacy container, vDPA and memory that the
    VMM locks itself, as R(Sizing the limit,ansible_collections.virt.iommufd.docsite.sizing) tells.
  - The answer is V(true) or V(false) only where everything that decides was seen or given. Otherwise it is V(null), and
    RV(_value.question) is the one question that would settle it.
  - Sizes are numbers of bytes, or texts such as V(64G), V(64GiB), V(65536M) and V(1.5G). K, M, G, T, P and E count in
    1024s, as do KiB, MiB and so on; kB, MB and so on count in 1000s, as in libvirt. Case does not matter.
options:
  _input:
    description:
      - What M(virt.iommufd.iommufd_info) returned, with at least V(processes) and V(users) in its
        O(virt.iommufd.iommufd_info#module:gather_subset). With V(host), as by default, much more is known.
      - If you gave O(virt.iommufd.iommufd_info#module:users), O(user) must be among them.
      - Run the module as root. What it could not see makes the answer uncertain.
    type: dict
    required: true
  memory:
    description:
      - The memory of the VM, as a size. Needed unless O(domain_xml) or O(grow) tells it.
      - It is rounded up to a multiple of 8 KiB, as QEMU does with C(-m). libvirt rounds what O(domain_xml) says up to
        whole MiB or more, which the filter does, too. QEMU does not round a memory backend up, so for one of another
        size that is a page or two too much.
      - With O(grow), it is all memory that the VM has now, with what was plugged. What does not explain what it has
        pinned is refused.
    type: raw
  user:
    description:
      - The user that the VMM will run as, by name or by id.
      - Without it, it is a domain of the system libvirt, and runs as that runs its VMs, or as O(domain_xml) says.
      - If it is the one that the system libvirt runs its VMs as, the VM is taken for a domain of the system libvirt.
        For any other one, with O(domain_xml) or with V(libvirt) as O(memlock), it is taken for a domain of that user's
        own libvirt (C(qemu:///session)).
      - A name that the input does not know may be that of any user in it. So where users are charged and it matters
        to which of them the name belongs, RV(_value.fits) is V(null). Give the id then, or the name in
        O(virt.iommufd.iommufd_info#module:users). To an id that the input does not know, nothing is charged.
    type: raw
  memlock:
    description:
      - The soft limit RLIMIT_MEMLOCK that the VMM will have, as a size. It counts more than what O(domain_xml) says.
      - V(unlimited) or V(infinity) means no limit.
      - V(libvirt) means the limit that libvirt gives to the domain. That is C(<hard_limit>) of O(domain_xml). Without
        O(domain_xml), the domain has neither C(<hard_limit>) nor C(<locked/>), and nothing that locks memory.
      - Where libvirt does not see the devices, since it knows no iommufd or they are in C(<qemu:commandline>), that is
        the limit of its daemon. A user's own libvirt cannot raise the limit above its own hard limit.
    type: raw
    default: libvirt
  vfio_devices:
    description:
      - How many devices are passed through to the VM, all by one iommufd. The number matters only with O(viommu).
      - O(devices) and O(domain_xml) count more.
    type: int
    default: 1
  devices:
    description:
      - The devices that are passed through to the VM, where they are not all had by one iommufd.
      - Their order matters only for vDPA. A vDPA device is refused if the others pin before it. Where all vDPA devices
        come last, they are taken to pin last; otherwise the order is not known.
    type: list
    elements: dict
    suboptions:
      backend:
        description:
          - V(iommufd), V(legacy) for VFIO's legacy container, V(vdpa), V(nvme) for a disk by C(nvme://), or V(mdev)
            for a mediated device. That pins nothing at first, and up to all memory as it runs.
          - A vDPA device is taken for one that pins. One that works with virtual addresses, as those of VDUSE do, does
            not; leave it out.
          - Where the limit is too small for one, the VM does not end. It runs on without that device.
        type: str
        required: true
        choices:
          - iommufd
          - legacy
          - vdpa
          - nvme
          - mdev
      iommufd:
        description: A name for its iommufd, if the VM has several. A V(mdev) with one is had by iommufd.
        type: str
      mode:
        description: The mode of its iommufd, where it differs from O(accounting).
        type: str
        choices:
          - user
          - process
  viommu:
    description:
      - Whether the VM has an IOMMU of its own. With V(each), each device has an address space of its own, and the VM
        pins its memory once for each device. With V(nested), the host's IOMMU walks the tables of the VM's, and the
        memory is pinned once. Booleans stand for V(each) and V(none).
      - Without it, it is what O(domain_xml) or the running VM shows, and otherwise V(none).
      - Only O(domain_xml) tells whether libvirt knows of it. Without that, libvirt's limit is uncertain with several
        devices.
    type: raw
  accounting:
    description:
      - Who will be charged for what the VM pins by iommufd.
      - V(user) is what the kernel does if nobody sets anything.
      - V(process) is a VM whose iommufd is set so before its first device, as libvirt does since 12.1.
      - V(none) is a VMM that has CAP_IPC_LOCK in the initial user namespace. In another one, as containers may have, it
        does not count. For a VM with V(none), only vDPA is held against the limit.
      - V(auto) finds out. For a domain of the system libvirt, it is what that libvirt does. If all emulators for the
        host's own architecture have CAP_IPC_LOCK, so has such a domain, unless libvirt's daemon withholds it
        (RV(virt.iommufd.iommufd_info#module:host.libvirt.passes_cap_ipc_lock)), or one that runs has not got it.
      - Otherwise it will be as all running VMs of O(user) are, and is unknown if there are none. A VM without an
        iommufd has CAP_IPC_LOCK if all these have it. An ambient capability that a unit gives to its VMM is not seen,
        unless such a VM runs. Nor is it seen whether a unit withholds what the emulator's file gives, as
        C(NoNewPrivileges=) does. So with such a file it is unknown, unless such a VM runs.
      - That a running VM of root has no CAP_IPC_LOCK, as in a container, says nothing of the next one. Then it is
        unknown, unless libvirt starts that. Give O(cap_ipc_lock).
      - Where the host has no emulator for its own architecture, or the input does not tell that, all of its emulators
        count.
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
      - If given, the filter takes it as exact, and rounds it up to whole pages. Of the memory QEMU pins whole pages
        alone, and not the part of one at its end. How large pages are is in the input if V(host) was gathered. Without
        that, they may have 4 to 64 KiB.
      - If not given, it may be anything up to 1 GiB, which is what libvirt adds to a domain's memory. Less is not taken
        for certain, since a VM with another display or other emulated devices pins more, some of it only once its guest
        runs.
      - What emulated devices have of memory of their own, as C(<video>) and C(<shmem>) of O(domain_xml), or
        C(ivshmem-plain) of a command line, may be as much in each address space, with 256 MiB for firmware and the
        like. Where that is more than 1 GiB, it counts instead. Where it is unknown how much they have, as of a
        C(<shmem>) with a server, the filter asks for it where it decides. libvirt's own limit does not count it.
      - Where a running VM of the input pins more than that beyond its memory, it may be as much, for each address
        space. VMs with several address spaces are ignored, since they pin their memory more than once.
    type: raw
  locked:
    description:
      - What the VMM locks itself (C(-overcommit mem-lock=on) of QEMU), as a size. That is all that it has mapped, so
        read C(VmLck) of such a VM without a device, once it has started. V(0) is a VM that locks none.
      - It is in C(VmLck), with what the legacy container and an iommufd in the mode V(process) pin, so the same memory
        may count twice.
      - As it starts, QEMU locks more for a moment, up to the largest of its blocks of memory once more. Where the limit
        is within 128 MiB above what it needs otherwise, or within all of O(overhead) and 2 MiB if that is more,
        RV(_value.fits) is V(null).
      - V(true) means C(<locked/>) of libvirt, for which that gives no limit at all.
      - If not given, O(domain_xml) tells. Without that, a domain with libvirt's limit is taken to lock none, which
        RV(_value.reason) says. With another limit, it may be any amount.
    type: raw
  domain_xml:
    description:
      - The XML of a libvirt domain, as C(virsh dumpxml) prints it. Memory, devices, virtual IOMMU, C(<hard_limit>),
        C(<locked/>), the user in C(<seclabel>), C(<shmem>), C(<video>) and the arguments in C(<qemu:commandline>) are
        read.
      - Where it was not started yet, and several devices lack an C(<address>), it is not known whether libvirt puts
        them behind one bridge. So with an C(<iommu>), it is not known how many address spaces they have.
      - C(<hard_limit>) is the limit of the domain's control group, too, in which all of the emulator's memory counts.
        Where it leaves less than 1 GiB for that beside the memory and O(overhead), RV(_value.fits) is not V(true).
      - What C(<interface type='network'>) comes to is not known before the start. It counts as no device.
    type: str
  grow:
    description:
      - A VM that runs, and what it is to get. O(viommu), O(overhead), O(locked) and O(memlock) hold for it, too; what
        they do not say is read from the running VM. Of O(locked), it matters only whether there is any.
      - A QEMU that locks its memory locks what is plugged twice for a moment, and up to a page more. Huge pages have up
        to 1 GiB. Where the limit is within that, RV(_value.fits) is V(null).
      - libvirt raises the limit of its domains when they get memory or a device, unless they have C(<hard_limit>), or
        all devices in C(<qemu:commandline>). So give O(memlock), where the present limit does not suffice.
      - Where its control group has a limit (RV(virt.iommufd.iommufd_info#module:processes[].memory_max_bytes)), such as
        C(<hard_limit>), and that leaves less than 1 GiB for the emulator beside all memory, RV(_value.fits) is not
        V(true). Nor is it so for a domain of the system libvirt where that limit was not seen, nor where others are in
        a slice with such a limit, too (RV(virt.iommufd.iommufd_info#module:processes[].memory_max_shared)). Where its
        domains are in such a slice, it is not so for its next one either.
      - What it pins in one of its address spaces is what it pins at least in one that it gets, whatever O(memory) and
        O(overhead) are. So memory that was plugged before counts, though no command line has it.
      - Where memory can be plugged, and no address space shows how much was, as before the first device, the filter
        asks for O(memory). That is all that it has by then.
      - What its emulated devices have of memory of their own
        (RV(virt.iommufd.iommufd_info#module:processes[].of_devices_bytes)), and is not pinned yet, may come as its
        guest runs. RV(_value.fits) is V(true) only where the limit holds that, too.
      - QEMU 10 pins for a vDPA device once the guest's driver turns it on, and unpins when that turns it off. Where
        C(VmPin) does not show that it has pinned, RV(_value.fits) is V(true) only where the limit holds that, too, and
        otherwise V(null).
    type: dict
    suboptions:
      vm:
        description: Its domain, its unit, its name, or its process id.
        type: str
        required: true
      memory:
        description: The memory that is plugged, as a size.
        type: raw
      devices:
        description:
          - The devices that are plugged, as in O(devices). Without a name, they join the iommufd that it has.
          - As V(iommufd), give the C(id) that it has on the VM's command line, or the descriptor of one that the VM has
            (RV(virt.iommufd.iommufd_info#module:processes[].iommufds)). V(new), or a name that the VM has not, is an
            iommufd without a device. Where several may be meant, the filter asks.
          - Where devices may bypass the VM's IOMMU (C(bypass_iommu)), or share an address space behind a bridge of
            conventional PCI, the filter asks for O(viommu), which is that of the new devices.
        type: list
        elements: dict
  live_update:
    description:
      - Whether the VM of O(grow) is to be taken over by a new process with the same limit (C(cpr-transfer) of QEMU), or
        whether a new VM must be able to, later. The kernel charges the new process before it relieves the old one, and
        QEMU has the old one charged once more in between, so both need the limit. C(cpr-exec) of QEMU is not meant.
    type: bool
    default: false
  cap_ipc_lock:
    description:
      - Whether the VMM has CAP_IPC_LOCK in the initial user namespace, where O(accounting) does not tell that.
      - If not given, a VM with V(user) or V(process) as O(accounting) has it not. One of root may have it,
        whatever the running VMs of root have. A unit can take it away by C(CapabilityBoundingSet=), for one.
    type: bool
notes:
  - The kernel does not publish what it has charged to a user. For per-user accounting, the filter relies on the
    estimate RV(virt.iommufd.iommufd_info#module:users[].charged_bytes), and RV(_value.reason) says how much would be
    left for what no file shows. Where VMs that have ended may have left charges behind, the answer is V(null). What
    they left where no process shows it is known of only where the kernel's iommufd is a module.
  - QEMU 11 ends a VM that has an iommufd and a legacy container in one address space, whatever its limit. For such a VM
    the filter needs the versions of the emulators. V(emulators) in O(virt.iommufd.iommufd_info#module:gather_subset)
    has them gathered.
  - The filter considers the limits and RV(_value.prerequisites), and not whether the host has the memory and the
    devices.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Returns what this filter takes.
  - plugin: virt.iommufd.memlock_forecast
    plugin_type: filter
    description: Predicts the same of all VMs that are defined on a host, now and after a reboot.
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
    fail_msg: "{{ fit.reason }} {{ fit.question or fit.remedy }}"
  vars:
    fit: "{{ info | virt.iommufd.memlock_fit(memory='64G') }}"

- name: Report whether a VM in a unit with User=vmm and LimitMEMLOCK=66G would start
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(memory='64G', user='vmm', memlock='66G', locked=0) }}"

- name: Report whether two devices and an IOMMU of its own would be too much for a VM that is charged for itself
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(memory='64G', user=64055, memlock='100G', **devices) }}"
  vars:
    devices:
      vfio_devices: 2
      viommu: each
      accounting: process
      locked: 0

- name: Report whether one device by iommufd and one by the legacy container go together
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(memory='64G', user='vmm', memlock='66G', locked=0, devices=devices) }}"
  vars:
    devices:
      - {backend: iommufd, mode: process}
      - {backend: legacy}

- name: Read the definition of a domain
  ansible.builtin.command: virsh --readonly dumpxml --inactive vm1
  register: definition
  changed_when: false

- name: Report whether it would start
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(domain_xml=definition.stdout) }}"

- name: Report whether each VM that runs could get 8 GiB more
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(grow={'vm': item.pid, 'memory': '8G'}) }}"
  loop: "{{ info.processes | rejectattr('holder') }}"
  loop_control:
    label: "{{ item.name }}"
"""

RETURN = r"""
_value:
  description: The answer.
  type: dict
  contains:
    fits:
      description:
        - Whether the VM would start, or could grow, as far as its limit decides. V(null) where that is unknown.
        - Also V(false) where libvirt or the kernel is known not to start it, for another reason.
        - A VM with a mediated device that fits at its start, and may not as it runs, is unknown.
      type: bool
      sample: false
    counter:
      description:
        - Which counter refuses the VM, or comes closest to it. V(user) is the sum of the user, V(mm_locked) is
          C(VmLck) and V(mm_pinned) is C(VmPin) of the VM's process.
        - V(null) where none is checked, or it may be several.
      type: str
      sample: user
    accounting:
      description:
        - How the VM would be accounted, V(user), V(process) or V(none), where no check is left. Without an iommufd, it
          is V(process).
        - V(null) where several of them are possible.
      type: str
      sample: user
    charged:
      description: What that counter holds already, in bytes. For a VM that starts, a counter of its process holds 0.
      type: int
      sample: 67371008
    needed:
      description:
        - What the VM adds to that counter at most, in bytes, with all that it gets. In a live update, that is what must
          be free for it. Where it is not one counter, the most that it adds to any.
        - V(null) where that is not known.
      type: int
      sample: 69793218560
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
        The running VMs of vm are accounted per user. The VM pins 64 GiB and 1 GiB beyond that. Charged to vm on top of
        64.2 MiB, it is 64.2 MiB over its limit of 65 GiB and ends with -12 (Cannot allocate memory).
    remedy:
      description:
        - What to change so that the VM fits, the least harmful first. With each of them alone, it would.
        - Where what would help depends on what is not known, it says on what.
        - V(null) where it fits, and where nothing is known that would help.
      type: str
      sample: >-
        To make it fit: raise its limit (LimitMEMLOCK=69860589568 in its unit; for one that vm's own service
        manager starts, also in a drop-in of user@1001.service, which is restarted then), for this VM only,
        since the next one takes still more; or have it charged for itself alone, by setting rlimit_mode=process
        on its iommufd before its first device (iommufd-exec, or virt.iommufd.iommufd_option if another program
        than QEMU opens it); or give the VMM CAP_IPC_LOCK (AmbientCapabilities=CAP_IPC_LOCK in its system unit,
        and no CapabilityBoundingSet= or PrivateUsers= in its unit that takes it away), and with it the right to
        pin all memory.
    prerequisites:
      description:
        - What is missing on the host, of what such a VM must have before it can start at all, in sentences. Except for
          what makes RV(_value.fits) false, that somebody may still see to.
        - Also which running VMs of the same user are over limit once it has what it pins, as
          P(virt.iommufd.audit_report#filter) calls that, and how to avoid that. They end when their guests reboot.
      type: list
      elements: str
      sample: []
    question:
      description: The one question that would settle it, and what answers it. V(null) where nothing is to be asked.
      type: str
      sample: null
"""


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"memlock_fit": reporting("memlock_fit", memlock_fit)}
