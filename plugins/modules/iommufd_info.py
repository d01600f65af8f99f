#!/usr/bin/python
# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: iommufd_info
short_description: Report who pins memory for devices, how it is accounted, and what the host supports
description:
  - Reports which processes of a host pin memory for devices, who is charged for that memory, which limit counts, and
    how much of that limit is left. Such a process holds an iommufd, a legacy container of VFIO (C(/dev/vfio/vfio)), a
    device or a group of VFIO, or a vDPA device (C(/dev/vhost-vdpa-N)).
  - The kernel charges memory that devices reach through an iommufd in one of three ways, and decides when the memory is
    mapped. Under B(user) accounting, which is the kernel's default, it adds up all processes of a user, and compares
    the sum with the RLIMIT_MEMLOCK of the one process that maps. Under B(process) accounting, it charges each process
    for itself. With B(none), it charges nobody and checks nothing, because the process has CAP_IPC_LOCK in the initial
    user namespace.
  - A legacy container always charges the process, and CAP_IPC_LOCK lifts its limit, too. A vDPA device charges the
    process in another counter, which no capability lifts.
  - Also reports what the host supports, which VMMs it has and with which capabilities, and whether its libvirt sets
    per-process accounting by itself.
  - From this module's return value, the filter P(virt.iommufd.memlock_fit#filter) predicts whether a VM would start
    or could grow.
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
options:
  gather_subset:
    description:
      - What to report.
      - V(host) is what the host supports.
      - V(processes) are the processes that pin memory for devices, or could.
      - V(users) are the users that per-user accounting charges.
      - V(emulators) adds to V(host) what takes seconds or wakes a service, each at most 30 seconds long. The module
        asks every emulator for its version. It asks the system libvirt for the capabilities of a domain, which may
        start libvirt's daemon.
      - V(defined) are the VMs that are defined on the host, whether they run or not.
      - For V(host), the module also asks systemd about libvirt's daemon. It waits at most 90 seconds for each answer.
    type: list
    elements: str
    choices:
      - host
      - processes
      - users
      - emulators
      - defined
    default:
      - host
      - processes
      - users
  pids:
    description:
      - Return only these processes in RV(processes), except those that have ended or hold nothing that memory is pinned
        by.
      - RV(users) is not affected, since a sum over some of a user's processes would be wrong.
    type: list
    elements: int
  users:
    description:
      - Return only these users, and only their processes. Each is a name or an id.
      - RV(users) has each of them, also those to whom nothing is charged.
      - With V(defined) in O(gather_subset), RV(defined) has the VMs that run as one of them, and those of which that is
        unknown. The domains of their own libvirts are there only then.
    type: list
    elements: str
  emulators:
    description:
      - Emulators to report in RV(host.qemu), as absolute paths, beside those that the module finds by itself.
      - RV(host.limits_of_view) names an emulator that is not found within 10 seconds, as on a mount whose server is
        gone.
      - With V(emulators) in O(gather_subset), the module B(executes) them with C(--version), as the user that the task
        runs as. It does not execute one that anybody but root and that user can write; RV(host.limits_of_view) then
        says so.
    type: list
    elements: path
    default: []
extends_documentation_fragment:
  - virt.iommufd._attributes.info_module
requirements:
  - Python 3.9 or later with C(ctypes) on the host; Debian's package C(python3) has it, C(python3-minimal) has not.
notes:
  - B(Privilege.) Any user can run this module, and sees what that user may see. RV(host.limits_of_view) lists the
    rest, with the reason. To see every process, the module needs root with CAP_SYS_PTRACE in the initial user and pid
    namespaces, that is, on the host itself, and C(kernel.yama.ptrace_scope) below 3.
  - B(Definitions.) For V(defined) in O(gather_subset), the module reads the files of the system's libvirt,
    C(/etc/libvirt/qemu) and C(/run/libvirt/qemu), which takes root. It reads those of the users in O(users) as these
    users, C(~/.config/libvirt/qemu) and C(/run/user/UID/libvirt/qemu/run). It follows no symbolic link to a definition,
    and reads at most 4096 definitions of each libvirt, 524288 bytes each and 33554432 together. It asks systemd by
    C(systemctl) and C(busctl) about its services, and has C(systemd-analyze) read systemd's own configuration. It reads
    no file that a service names. What a
    C(/bin/sh) does, and variables from a file, are not understood.
  - B(Nothing is woken.) The module starts no service, asks none but systemd's manager, loads no kernel module and runs
    no emulator. It opens no device but C(/dev/iommu) and C(/dev/vfio/vfio), and these only if the kernel has them
    already. The subset V(emulators) of O(gather_subset) is the exception.
  - B(Estimate.) The kernel does not publish what it has charged to a user. RV(users[].charged_bytes) is the pinned
    memory of the user's processes under per-user accounting. The kernel's counter also holds what io_uring and AF_XDP
    have charged to that user, and what sockets send with MSG_ZEROCOPY; no file shows that. Nor does a file show that a
    process was charged to its user before it got CAP_IPC_LOCK.
  - B(Bounds.) Any user may have descriptors and processes without end, so the module stops at a limit. It looks at
    262144 descriptors, 256 iommufds and 256 nodes of other devices of a process. Of a user, it looks at 1048576
    descriptors, 2500 processes that hold such things, and 4096 of the things. A process may delay the module for 10
    seconds, and one user's processes may do so three times, and again while the module compares what they hold. Names
    are cut at 255 characters. RV(host.limits_of_view) names what the module did not look at, and the accounting of such
    a process is V(null).
  - B(Threads.) Limits, capabilities and descriptors are those of a process's first thread.
seealso:
  - plugin: virt.iommufd.memlock_fit
    plugin_type: filter
    description: Predicts from this module's return value whether a VM would start or could grow.
  - module: virt.iommufd.iommufd_option
    description: Sets or queries the accounting of one process.
  - name: IOMMUFD in the kernel's documentation
    description: What an iommufd, an IOAS and the other objects are.
    link: https://docs.kernel.org/userspace-api/iommufd.html
"""

EXAMPLES = r"""
- name: Look at everything
  virt.iommufd.iommufd_info:
  register: info

- name: Report the VMs whose memory is charged to their user
  ansible.builtin.debug:
    msg: "{{ info.processes | selectattr('accounting', 'equalto', 'user') | map(attribute='name') }}"

- name: Fail where another VM as large as the largest one may not start
  ansible.builtin.assert:
    that: info.users | rejectattr('at_risk', 'false') | length == 0

- name: Look at one user's VMs only
  virt.iommufd.iommufd_info:
    gather_subset: [processes, users]
    users: [libvirt-qemu]

- name: Look at all VMs that are defined, whether they run or not
  virt.iommufd.iommufd_info:
    gather_subset: [host, processes, users, defined]
  register: info

- name: Look at the host, with the versions of its emulators
  virt.iommufd.iommufd_info:
    gather_subset: [host, emulators]
  register: info
"""

RETURN = r"""
host:
  description:
    - What the host supports.
    - Without the subset V(host), it holds RV(host.limits_of_view) alone.
  returned: always
  type: dict
  contains:
    limits_of_view:
      description: What this caller could not see, and why; empty where it saw everything.
      type: list
      elements: dict
      sample:
        - what: descriptors
          why: >-
            uid 1000 cannot look at the descriptors of 12 processes (1, 2, 3, 4, 5, ...): EACCES: Permission denied.
            That takes root with CAP_SYS_PTRACE (become: true) on the host itself, and kernel.yama.ptrace_scope below 3.
      contains:
        what:
          description:
            - V(processes) where there may be processes that this caller does not see at all.
            - V(descriptors) where it is unknown whether some processes hold an iommufd, or what else memory is pinned
              by.
            - V(iommufds) where an iommufd was found but could not be queried, or it is unknown whether it is one.
            - V(users) where the users of processes cannot be told apart.
            - V(domains) where the domains of the system libvirt are unknown.
            - V(charges) where users may be charged for what has no process any more. A VM that has ended leaves that
              behind where another process keeps its iommufd, or a device of it. Only an iommufd that is accounted per
              user does so. No process shows what is in flight in a socket, or kept by a mapping of a device alone;
              the kernel counts it, where RV(host.module) is V(loaded). Where that is V(builtin), it is not seen.
            - V(defined) where VMs may be defined that RV(defined) has not.
            - V(options), V(module), V(emulators) and V(libvirt) where that part of RV(host) is incomplete.
          type: str
          sample: descriptors
        why:
          description: The reason, and what to do to see it.
          type: str
    kernel:
      description: The release of the running kernel.
      returned: when O(gather_subset) has V(host) or V(emulators), as are all below
      type: str
      sample: 6.12.117
    machine:
      description: The host's architecture, as C(uname -m) tells it.
      type: str
      sample: x86_64
    page_bytes:
      description: The size of the kernel's pages, which memory is pinned and charged in.
      type: int
      sample: 4096
    module:
      description:
        - Where the kernel's iommufd is. V(builtin) and V(loaded) can be used now, V(loadable) once the module is
          loaded. V(absent) is a kernel without iommufd.
        - V(null) where that is unknown, for lack of C(/lib/modules).
      type: str
      sample: loaded
    device:
      description: The device node C(/dev/iommu).
      type: dict
      contains:
        path:
          description: Its path.
          type: str
          sample: /dev/iommu
        present:
          description: Whether the path leads to the device that the running kernel has for iommufd.
          type: bool
          sample: true
        rdev:
          description: The device's numbers as the kernel gives them; V(null) where it has none.
          type: str
          sample: "10:125"
        mode:
          description: The permissions of the node; V(null) where there is none, as for the two below.
          type: str
          sample: "0660"
        owner:
          description: The name of its owner, or the id where that has none.
          type: str
          sample: root
        group:
          description: The name of its group, or the id where that has none.
          type: str
          sample: root
    options:
      description: What an iommufd that this caller opens answers.
      type: dict
      contains:
        rlimit_mode:
          description: The option that decides between per-user and per-process accounting.
          type: dict
          contains:
            readable:
              description: Whether this kernel has it; V(null) where C(/dev/iommu) cannot be opened.
              type: bool
              sample: true
            settable:
              description: >-
                Whether B(this caller) could set it, on an iommufd without objects; V(null) where C(/dev/iommu) cannot
                be opened.
              type: bool
              sample: true
    caller:
      description: The user that this module runs as.
      type: dict
      contains:
        uid:
          description: The effective user id of this module.
          type: int
          sample: 0
        initial_user_namespace:
          description: Whether this module is in the initial user namespace. In another one, capabilities do not count.
          type: bool
          sample: true
        capabilities:
          description: Those of this module's effective capabilities that matter to iommufd.
          type: list
          elements: str
          sample: [cap_ipc_lock, cap_sys_ptrace, cap_sys_resource]
    legacy_by_iommufd:
      description:
        - Whether the kernel's iommufd provides C(/dev/vfio/vfio) (CONFIG_IOMMUFD_VFIO_CONTAINER). Then a VM that uses
          VFIO's legacy interface has an iommufd, too, and is charged per process.
        - V(null) where the kernel has no such device yet, or this caller cannot open it.
      type: bool
      sample: false
    readiness:
      description:
        - What has to be there before a VM with iommufd could start, in the order to see to it.
        - It tells nothing of limits and accounting.
      type: list
      elements: dict
      contains:
        what:
          description:
            - V(module) is the kernel's iommufd, V(device) the node C(/dev/iommu), V(iommu) an IOMMU that the kernel
              drives, V(vfio) a driver of VFIO's, V(bound) devices that this driver has, and V(cdev) a node below
              C(/dev/vfio/devices) for each of these.
            - V(kubevirt) is what KubeVirt 1.9 needs on a node. It is there only on a node of Kubernetes.
          type: str
          sample: cdev
        ready:
          description: Whether it is there; V(null) where that is unknown.
          type: bool
          sample: true
        msg:
          description: What is missing, and what to do; empty where it is there.
          type: str
          sample: ""
    yama_ptrace_scope:
      description: The setting C(kernel.yama.ptrace_scope); V(null) where the kernel has no Yama, or it cannot be read.
      type: int
      sample: 1
    iommus:
      description: The names of the IOMMUs that the kernel drives.
      type: list
      elements: str
      sample: [dmar0]
    iommu_groups:
      description: The IOMMU groups, each of which is passed through as a whole.
      type: list
      elements: dict
      contains:
        id:
          description: The group's number.
          type: int
          sample: 3
        devices:
          description: The addresses of its devices.
          type: list
          elements: str
          sample: ["0000:00:03.0"]
    vfio_devices:
      description: The devices that VFIO offers to iommufd, which need Linux 6.6 with CONFIG_VFIO_DEVICE_CDEV.
      type: list
      elements: dict
      contains:
        node:
          description: The path of the device node.
          type: str
          sample: /dev/vfio/devices/vfio0
        address:
          description: The device's address on its bus.
          type: str
          sample: "0000:00:03.0"
        iommu_group:
          description: The number of its IOMMU group; V(null) where it has none.
          type: int
          sample: 3
        mode:
          description: The permissions of the node; V(null) where there is no node, as for the two below.
          type: str
          sample: "0600"
        owner:
          description: The name of the node's owner, or the id where that has none.
          type: str
          sample: root
        group:
          description: The name of the node's group, or the id where that has none.
          type: str
          sample: root
    qemu:
      description:
        - The emulators C(qemu-system-*) in C(/usr/bin), C(/usr/local/bin) and C(/usr/local/sbin), those in
          C(/run/libvirt/nix-emulators), C(/usr/libexec/qemu-kvm), and those of O(emulators).
        - Also those of the system libvirt's domains for the host's architecture, defined or running, which takes root
          to read.
        - Also those that RV(processes) execute, by C(/proc/PID/exe), where the host has the same file at that path, and
          its name has C(qemu) in it.
      type: list
      elements: dict
      contains:
        path:
          description: The path with links resolved; where RV(host.qemu[].writer) is set, the path as given.
          type: str
          sample: /usr/bin/qemu-system-x86_64
        present:
          description:
            - Whether the path is an executable file. Only a path from O(emulators) or from libvirt's domains can be
              missing.
          type: bool
          sample: true
        known_by:
          description:
            - How it was found, one or more of V(place), which is a usual place, V(option), which is O(emulators),
              V(definition), which is that of a domain, V(record), which is libvirt's of a domain that runs, and
              V(process), which executes it.
            - Whoever may hold an iommufd decides which emulator a process executes. So V(process) alone is no reason
              to trust it.
          type: list
          elements: str
          sample: [place, process]
        writer:
          description:
            - The first place on the way to the file that anybody but root can write, be it a folder, a symbolic link or
              the file itself. The module looks at nothing behind it, and takes the file for present.
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
        file_capabilities:
          description:
            - The capabilities that the file gives to whoever executes it.
            - V(null) where it has none, or cannot be looked at.
          type: dict
          contains:
            permitted:
              description: The names of the permitted ones.
              type: list
              elements: str
              sample: [cap_ipc_lock]
            inheritable:
              description: The names of the inheritable ones.
              type: list
              elements: str
              sample: []
            effective:
              description: Whether the process has them in its effective set from the start.
              type: bool
              sample: true
            root_uid:
              description: The root user of the user namespace that they are for; 0 stands for the initial one.
              type: int
              sample: 0
        cap_ipc_lock:
          description:
            - Whether these capabilities lift the limit on pinned memory. They do if they hold CAP_IPC_LOCK for the
              initial user namespace, effective from the start.
            - A VMM does not get it where NoNewPrivs or the bounding set of whoever starts it withhold it.
            - V(null) where they could not be read.
          type: bool
          sample: false
        version:
          description: Its version; V(null) where it prints none, or V(emulators) was not asked for.
          type: str
          sample: 10.0.13
    libvirt:
      description: The system libvirt, whose domains run under C(qemu:///system).
      type: dict
      contains:
        version:
          description:
            - The version, by the name of the library that the running daemon has mapped, or of the installed library.
            - V(null) where there is none, or it is unknown.
          type: str
          sample: 12.8.0
        unit:
          description: The systemd unit of the daemon that drives QEMU; V(null) without one.
          type: str
          sample: virtqemud.service
        pid:
          description: The daemon's process; V(null) where it does not run. It may run only when somebody needs it.
          type: int
          sample: null
        outdated:
          description:
            - Whether C(/etc/libvirt/qemu.conf) has changed since the daemon was started, which reads it only then.
            - V(null) where the daemon does not run, or there is no such file.
          type: bool
          sample: false
        cap_sys_resource:
          description:
            - Whether the daemon has CAP_SYS_RESOURCE, which it needs to set the mode, and may use it. If the daemon
              does not run, whether its unit would give it the capability.
            - SELinux's policy may deny the use of a capability that the process has. Where it is in force, it is asked.
            - V(null) where that is unknown.
          type: bool
          sample: true
        drop_in:
          description:
            - The settings that a drop-in of RV(host.libvirt.unit) has to hold in its section C([Service]) so that the
              daemon gets CAP_SYS_RESOURCE.
            - Empty where the unit's files give it already, or there is no unit. If the daemon lacks it all the same, it
              was started before they were changed, or SELinux denies its use.
          type: list
          elements: str
          sample: []
        taken_by:
          description:
            - The lines of the unit's files that take CAP_SYS_RESOURCE away, and that no later line makes up for. Each
              of them alone would take it. They may be of C(CapabilityBoundingSet=), C(User=), C(DynamicUser=),
              C(SecureBits=), C(AmbientCapabilities=) and C(PrivateUsers=).
            - What the role P(virt.iommufd.iommufd_host#role) gives back in C(zz-iommufd_host.conf) does not count here.
            - V(null) where the files could not be read, or systemd reads them in another way.
          type: list
          elements: dict
          contains:
            path:
              description: The file.
              type: str
              sample: /etc/systemd/system/libvirtd.service.d/10-hard.conf
            line:
              description: The number of the line.
              type: int
              sample: 3
            text:
              description: What it says. What is continued on further lines is joined.
              type: str
              sample: CapabilityBoundingSet=~CAP_SYS_RESOURCE
        unit_outdated:
          description: Whether systemd has not read the unit's files since they were changed.
          type: bool
          sample: false
        needs_restart:
          description:
            - Whether the daemon that runs has CAP_SYS_RESOURCE, and the unit's files take it away; or lacks it, and
              they give it.
          type: bool
          sample: false
        passes_cap_ipc_lock:
          description:
            - Whether an emulator that the daemon starts gets CAP_IPC_LOCK where its file gives it that. It does not
              with C(NoNewPrivileges=), nor where the daemon's bounding set lacks it.
            - V(null) where that is unknown.
          type: bool
          sample: true
        memlock_bytes:
          description:
            - The soft limit RLIMIT_MEMLOCK of the daemon. If the daemon does not run, what its unit would give it. A
              domain has this limit where libvirt does not raise it, as with C(<qemu:commandline>).
            - V(null) where it is unlimited or unknown.
          type: int
          sample: 67108864
        memlock_unlimited:
          description: Whether that limit is unlimited; V(null) where that is unknown.
          type: bool
          sample: false
        memlock_hard_bytes:
          description:
            - Its hard limit. A daemon without CAP_SYS_RESOURCE can give no domain more.
            - V(null) where it is unlimited or unknown.
          type: int
          sample: 67108864
        memlock_hard_unlimited:
          description: Whether the hard limit is unlimited; V(null) where that is unknown.
          type: bool
          sample: false
        user:
          description:
            - The user that domains of the system libvirt run as, unless a domain's own C(<seclabel>) names another.
              It is the user that a running daemon has taken, or else the one that C(/etc/libvirt/qemu.conf) names, or
              else the one that the daemon took when it last ran.
            - V(null) where it is unknown, or has no name here.
          type: str
          sample: libvirt-qemu
        uid:
          description: The id of that user; V(null) where it is unknown.
          type: int
          sample: 64055
        sessions:
          description:
            - The users who may have a libvirt of their own, in the order of their ids. Their service managers run
              (C(user@UID.service)), or libvirt's daemon does.
            - Such a libvirt cannot raise the limit of its domains above its own hard limit.
          type: list
          elements: dict
          contains:
            uid:
              description: The user's id.
              type: int
              sample: 1000
            user:
              description: The user's name; V(null) where the host knows none.
              type: str
              sample: alice
            pid:
              description:
                - The daemon of the user's own libvirt, by its name and user; V(null) where none runs outside of
                  containers. Root's daemon is the system's.
                - Of several daemons, it is the one with the lowest id.
              type: int
              sample: null
            memlock_hard_bytes:
              description:
                - The hard limit RLIMIT_MEMLOCK of that daemon. If none runs, that of the service manager, which starts
                  one. A daemon that was started from a login may have another.
                - V(null) where it is unlimited or unknown. Where several daemons differ in it, it is unknown.
              type: int
              sample: 8388608
            memlock_hard_unlimited:
              description: Whether that limit is unlimited; V(null) where that is unknown.
              type: bool
              sample: false
        supports_iommufd:
          description:
            - Whether it knows C(<driver name='vfio' iommufd='yes'/>) of a domain's devices. The content of its library
              tells, since a distribution may have added it to an older version, or left it out of a newer one.
            - V(null) where the library was not read.
          type: bool
          sample: true
        domain_capabilities_iommufd:
          description:
            - Whether libvirt offers iommufd for a domain's devices, with its default emulator.
            - V(null) where it does not say so, or V(emulators) was not asked for.
          type: bool
          sample: null
        sets_rlimit_mode:
          description:
            - Whether it sets per-process accounting for domains whose devices have C(<driver name='vfio'
              iommufd='yes'/>). libvirt does since 12.1 (C(viriommufd.c) in its source). The content of its library
              tells, and whether its daemon may.
            - V(null) where that is unknown.
          type: bool
          sample: true
        starts_iommufd_domains:
          description:
            - Whether it can start domains whose devices have C(<driver name='vfio' iommufd='yes'/>). A libvirt that
              sets per-process accounting, and may not, starts none.
            - V(null) where that is unknown.
          type: bool
          sample: true
        reason:
          description: Why RV(host.libvirt.sets_rlimit_mode) is what it is.
          type: str
          sample: >-
            libvirt 12.8.0 sets per-process accounting, as all since 12.1.0, and its daemon runs with CAP_SYS_RESOURCE.
        at_boot:
          description:
            - What is so once the daemon has started anew, as after a reboot. C(/etc/libvirt/qemu.conf), the library or
              the unit may have changed since it started.
            - V(null) where the daemon does not run. Then it is as above, unless systemd has not read the unit's files
              since they changed.
          type: dict
          contains:
            user:
              description: As RV(host.libvirt.user); V(null) where it is unknown.
              type: str
              sample: libvirt-qemu
            uid:
              description: As RV(host.libvirt.uid); V(null) where it is unknown.
              type: int
              sample: 64055
            memlock_bytes:
              description: As RV(host.libvirt.memlock_bytes); V(null) where it is unlimited or unknown.
              type: int
              sample: 67108864
            memlock_unlimited:
              description: As RV(host.libvirt.memlock_unlimited); V(null) where it is unknown.
              type: bool
              sample: false
            memlock_hard_bytes:
              description: As RV(host.libvirt.memlock_hard_bytes); V(null) where it is unlimited or unknown.
              type: int
              sample: 67108864
            memlock_hard_unlimited:
              description: As RV(host.libvirt.memlock_hard_unlimited); V(null) where it is unknown.
              type: bool
              sample: false
            cap_sys_resource:
              description: As RV(host.libvirt.cap_sys_resource); V(null) where it is unknown.
              type: bool
              sample: true
            passes_cap_ipc_lock:
              description: As RV(host.libvirt.passes_cap_ipc_lock); V(null) where it is unknown.
              type: bool
              sample: true
            supports_iommufd:
              description: As RV(host.libvirt.supports_iommufd); V(null) where it is unknown.
              type: bool
              sample: true
            starts_iommufd_domains:
              description: As RV(host.libvirt.starts_iommufd_domains); V(null) where it is unknown.
              type: bool
              sample: true
            sets_rlimit_mode:
              description: As RV(host.libvirt.sets_rlimit_mode); V(null) where it is unknown.
              type: bool
              sample: true
            reason:
              description: As RV(host.libvirt.reason).
              type: str
              sample: >-
                libvirt 12.8.0 sets per-process accounting, as all since 12.1.0, and virtqemud.service, when it starts,
                would run with CAP_SYS_RESOURCE.
processes:
  description:
    - The processes that hold an iommufd, a legacy container, a device or group of VFIO, or a vDPA device, in the order
      of their ids.
    - Also processes with pinned memory whose descriptors this caller may not see, since they may hold one.
  returned: when O(gather_subset) has V(processes)
  type: list
  elements: dict
  contains:
    pid:
      description: Its process id, as seen by this module.
      type: int
      sample: 4242
    comm:
      description: Its name. What is not printable in it is escaped, as in all texts here.
      type: str
      sample: qemu-system-x86
    uid:
      description: Its real user id, which is the user that per-user accounting charges.
      type: int
      sample: 64055
    user:
      description: The name of that user; V(null) where the host knows none.
      type: str
      sample: libvirt-qemu
    started:
      description: When it started, in ISO 8601 and UTC, by the clock as it is set now.
      type: str
      sample: "2026-11-22T09:41:07Z"
    emulator:
      description:
        - The path of its program, as in its own mount namespace. It stays the same when another file takes that place.
        - V(null) where this caller may not look, or where it has more than 1024 bytes.
      type: str
      sample: /usr/bin/qemu-system-x86_64
    name:
      description:
        - The name of its guest on its command line (C(-name)); V(null) where there is none. Nobody vouches for it.
      type: str
      sample: vm1
    domain:
      description:
        - The libvirt domain whose emulator it is; V(null) where there is none or it is unknown. For the system libvirt,
          libvirt's own record vouches for it; only root can read that. For a user's session, only the process's command
          line does.
      type: str
      sample: vm1
    domain_uri:
      description: Whose domain that is, V(qemu:///system), or V(qemu:///session) of the process's user; else V(null).
      type: str
      sample: qemu:///system
    unit:
      description:
        - The unit of the system's service manager that it belongs to; V(null) where there is none.
        - The control group tells this. The name of a group below a container's group does not count.
      type: str
      sample: machine-qemu\x2d1\x2dvm1.scope
    user_unit:
      description: The unit of the user's service manager that it belongs to; V(null) where there is none.
      type: str
      sample: null
    initial_user_namespace:
      description:
        - Whether it is in the initial user namespace; V(null) where this caller may not look.
        - Also V(null) where it is not known whether SELinux lets it use the CAP_IPC_LOCK that it has, or a profile of
          AppArmor. Those that libvirt makes for its domains let them.
      type: bool
      sample: true
    memory_bytes:
      description:
        - The memory of QEMU's guest by its command line, be it by C(-m), C(-machine) or a memory backend; that of
          cloud-hypervisor's by C(--memory). Like QEMU, the module rounds C(-m) up to a multiple of 8 KiB. The DIMMs
          that QEMU is started with (C(-device pc-dimm)) are in it. What is plugged or unplugged later does not change
          it.
        - A file for C(-readconfig) is read where its absolute path means the same to this module, and nobody but root
          can write it. What the kernel makes up, as below C(/proc) and C(/sys), is no file.
        - V(null) for other programs, where that is missing or unreadable, where QEMU is started with an C(nvdimm),
          C(virtio-mem) or C(virtio-pmem), and where the command line is longer than 256 KiB or 8192 words.
      type: int
      sample: 67108864
    memory_pluggable:
      description:
        - Whether memory can be plugged or unplugged as the guest runs, by its command line. QEMU has C(maxmem) for
          that, cloud-hypervisor C(hotplug_size). If so, RV(processes[].memory_bytes) may not be what it has by now.
        - V(null) where RV(processes[].memory_bytes) is.
      type: bool
      sample: false
    of_devices_bytes:
      description:
        - What its emulated devices have of memory of their own at most, by its command line, such as video memory and
          memory that is shared. It is pinned beside RV(processes[].memory_bytes) once the guest has turned the device
          on.
        - V(null) where that is unknown, as of an C(ivshmem-doorbell).
      type: int
      sample: 16777216
    viommu:
      description:
        - The IOMMU of its guest by its command line. V(none) is a guest without one. With V(each), each device of the
          guest has an address space of its own.
        - V(null) where devices may differ in that, as with C(bypass_iommu), with bridges of conventional PCI and with a
          nested one. Also V(null) for other programs, and where that is unreadable.
      type: str
      sample: none
    iommufd_objects:
      description:
        - The iommufds on QEMU's command line (C(-object iommufd)). One that QEMU opens itself is open once it has a
          device. What is added or removed later does not change this.
        - V(null) for other programs, where that is unreadable, and where there are more than 16.
      type: list
      elements: dict
      contains:
        id:
          description: Its name, which a device has for C(iommufd=).
          type: str
          sample: iommufd0
        fd:
          description: The descriptor that QEMU has for it from another program; V(null) if QEMU opens it itself.
          type: int
          sample: null
    locks_memory:
      description:
        - Whether QEMU's command line has it lock its memory itself, by C(-overcommit mem-lock=on) or C(-realtime
          mlock=on). Under V(process), that is charged beside what is pinned.
        - V(null) for other programs, where that is unreadable, and where the command line is as long.
      type: bool
      sample: false
    pinned_bytes:
      description: The memory that it has pinned (C(VmPin) in C(/proc/PID/status)), by whatever means.
      type: int
      sample: 67371008
    locked_bytes:
      description: The memory that is charged to it as locked (C(VmLck)), by whatever means.
      type: int
      sample: 0
    memlock_bytes:
      description: The soft limit RLIMIT_MEMLOCK, which the kernel checks against; V(null) where it is unlimited.
      type: int
      sample: 104857600
    memlock_unlimited:
      description: Whether the soft limit is unlimited.
      type: bool
      sample: false
    memlock_hard_bytes:
      description: The hard limit; V(null) where it is unlimited.
      type: int
      sample: 104857600
    memlock_hard_unlimited:
      description: Whether the hard limit is unlimited.
      type: bool
      sample: false
    memory_max_bytes:
      description:
        - How much memory its control group may use, C(memory.max), or a group above that, if that has less. With more,
          the kernel ends the process. libvirt sets it by C(<hard_limit>), systemd by C(MemoryMax=).
        - V(null) where none has such a limit, or it was not seen.
      type: int
      sample: null
    memory_max_unlimited:
      description: Whether no control group limits its memory; V(null) where that was not seen.
      type: bool
      sample: true
    memory_max_shared:
      description:
        - Whether it is in a slice with such a limit that has others in it, too. What these use counts there as well.
        - V(null) where that was not seen.
      type: bool
      sample: false
    capabilities:
      description: Those of its capabilities that matter to iommufd, CAP_IPC_LOCK and CAP_SYS_RESOURCE.
      type: dict
      contains:
        effective:
          description: Those in its effective set, without CAP_IPC_LOCK where SELinux does not let it use that.
          type: list
          elements: str
          sample: []
        permitted:
          description: Those in its permitted set.
          type: list
          elements: str
          sample: []
        bounding:
          description: Those in its bounding set. A capability outside of it cannot come from an executed file either.
          type: list
          elements: str
          sample: [cap_ipc_lock, cap_sys_resource]
        ambient:
          description:
            - Those in its ambient set. A service manager gives such ones. A capability that is in effect and not in it
              came from the executed file, unless the process is root's.
          type: list
          elements: str
          sample: []
    no_new_privs:
      description: Whether file capabilities are ignored when it executes a program.
      type: bool
      sample: false
    backends:
      description:
        - What it has devices by, V(iommufd), V(legacy) or V(vdpa), so far as it has descriptors of that.
        - V(null) where this caller may not look.
      type: list
      elements: str
      sample: [iommufd]
    holder:
      description:
        - Whether it is no VM, but holds copies of what VMs have, as a launcher may. Another process has each of them,
          too, and this one has pinned nothing. It is not counted in RV(users).
        - V(null) where that is unknown. None of those that share it has pinned anything yet, or this caller could not
          compare all. Such a process is counted.
      type: bool
      sample: false
    iommufds:
      description:
        - Its iommufds, in the order of the descriptors; V(null) where this caller may not look.
        - Where the kernel was built so that iommufd provides C(/dev/vfio/vfio), that is an iommufd, too.
      type: list
      elements: dict
      contains:
        fd:
          description: The number of the descriptor in the process.
          type: int
          sample: 30
        same_as:
          description:
            - The lowest descriptor of the process that is the same iommufd, if that is a lower one. Else, or where
              RV(processes[].iommufds[].shared_with) is V(null), it is V(null).
          type: int
          sample: null
        shared_with:
          description:
            - Other processes that hold the same iommufd, at most 16 of them. V(null) where that is unknown.
          type: list
          elements: int
          sample: []
        rlimit_mode:
          description: V(user) or V(process), as the kernel gives it; V(null) where it could not be read.
          type: str
          sample: user
        settable:
          description:
            - Whether the mode can be set now. It can while the iommufd holds no object.
            - V(null) where this caller lacks the privilege that would tell.
          type: bool
          sample: false
        ioases:
          description:
            - Its IOASes, the address spaces that its devices share, in the order of their ids.
            - The module finds them by their ids, up to 1024. Once it has found one, 128 ids in a row that are no IOAS
              end the search. The kernel gives the lowest free ids to objects of all kinds.
          type: list
          elements: dict
          contains:
            ioas_id:
              description: The id of the IOAS.
              type: int
              sample: 2
            huge_pages:
              description: Whether it may map memory in pages larger than the smallest.
              type: bool
              sample: true
        truncated:
          description:
            - Whether there may be IOASes that were not found, because there are some with high ids, or more than the
              module tells.
          type: bool
          sample: false
        msg:
          description: Why it could not be read; empty if it could.
          type: str
          sample: ""
    legacy_containers:
      description: Its legacy containers of VFIO (C(/dev/vfio/vfio)); V(null) where this caller may not look.
      type: list
      elements: dict
      contains:
        fd:
          description: The number of the descriptor in the process.
          type: int
          sample: 32
        same_as:
          description:
            - The lowest descriptor of the process that is the same container, if that is a lower one. Else, or where
              RV(processes[].legacy_containers[].shared_with) is V(null), it is V(null).
          type: int
          sample: null
        shared_with:
          description:
            - Other processes that hold the same container, at most 16 of them. V(null) where that is unknown.
          type: list
          elements: int
          sample: []
    vfio_devices:
      description:
        - The VFIO devices and groups that it holds by a device node, in the order of the descriptors. V(null) where
          this caller may not look.
      type: list
      elements: dict
      contains:
        fd:
          description: The number of the descriptor in the process.
          type: int
          sample: 31
        node:
          description: The path that the host has for it.
          type: str
          sample: /dev/vfio/devices/vfio0
        addresses:
          description: The addresses of the devices behind it, one, or those of a group.
          type: list
          elements: str
          sample: ["0000:00:03.0"]
        backend:
          description:
            - V(iommufd) for a device. For a group, V(legacy) where the process holds a legacy container, else
              V(iommufd) where it holds an iommufd, and V(null) where it holds neither.
          type: str
          sample: iommufd
        as_it_runs:
          description:
            - Whether a device behind it pins memory as the VM runs, as an mdev does. Such a device pins nothing at
              first, and may pin all of the guest's memory later. So RV(processes[].headroom_bytes) is what is left now.
            - If it shares the VM's only address space with a device that is no mdev, it pins nothing more.
            - V(null) where sysfs does not tell.
          type: bool
          sample: false
    vdpa_devices:
      description: The vDPA devices that it holds; V(null) where this caller may not look.
      type: list
      elements: dict
      contains:
        fd:
          description: The number of the descriptor in the process.
          type: int
          sample: 33
        node:
          description: The path that the host has for it.
          type: str
          sample: /dev/vhost-vdpa-0
    address_spaces:
      description:
        - In how many address spaces it can have memory pinned, once in each. These are its IOASes, its legacy
          containers and its vDPA devices; what several descriptors share counts once.
        - V(null) where that is unknown, as with RV(processes[].iommufds[].truncated). So it is where so much is pinned
          that RV(processes[].memory_bytes) could be in one more. Either memory was plugged in then, or there is an IOAS
          that was not found. And so it is where another VM has the same iommufd or legacy container.
      type: int
      sample: 1
    accounting:
      description:
        - Who is charged for what it pins from now on, V(user), V(process) or V(none). The mode of its iommufds decides.
          With a legacy container or a vDPA device and no iommufd, it is V(process).
        - It is V(none) only where nothing is checked. With CAP_IPC_LOCK and a vDPA device, it is V(process).
        - V(null) where that is unknown, which RV(processes[].notes) explains.
      type: str
      sample: user
    counters:
      description:
        - The counters that the kernel compares with the limit when it pins more. Each has to stay within the limit for
          itself.
        - Where RV(processes[].accounting) is V(null), there may be others. Where RV(processes[].holder) is true, there
          are none.
      type: list
      elements: dict
      contains:
        counter:
          description:
            - V(user) is one for all processes of the user, which no file shows. V(mm_locked) is C(VmLck) of the
              process, V(mm_pinned) its C(VmPin).
          type: str
          sample: user
        held_bytes:
          description: What it holds. Of V(user), that is RV(users[].charged_bytes), an estimate.
          type: int
          sample: 67371008
        headroom_bytes:
          description:
            - What is left of the limit; less than 0 where it holds more than the limit allows. V(null) where the limit
              is unlimited.
            - Of V(user), it may be less by up to RV(users[].uncertain_bytes), and by what unseen processes have pinned.
          type: int
          sample: 37486592
        backends:
          description: What the process pins by and has this counter checked for.
          type: list
          elements: str
          sample: [iommufd]
    counter:
      description:
        - The one of RV(processes[].counters) that has the least headroom, and so refuses first.
        - V(null) where there are none, or where RV(processes[].accounting) is V(null).
      type: str
      sample: user
    charged_bytes:
      description:
        - What it contributes to RV(processes[].counter). Under V(user), that is what it has pinned, and else what that
          counter holds. With V(none), or where RV(processes[].holder) is true, it is 0.
        - V(null) where RV(processes[].accounting) is V(null), or where the process has pinned memory by a vDPA device,
          too, which V(user) is not charged for. It is V(null), too, where the user may be charged for what it keeps
          of a VM that has ended.
      type: int
      sample: 67371008
    headroom_bytes:
      description:
        - How much more it could pin now, by RV(processes[].counter). With a device that has
          RV(processes[].vfio_devices[].as_it_runs), it shrinks as the VM runs.
        - V(null) where nothing limits it, or where RV(processes[].accounting) is V(null).
      type: int
      sample: 37486592
    notes:
      description:
        - What contradicts these values or makes them uncertain, what process accounting would break, and whether it has
          a CAP_IPC_LOCK that lifts no limit, in sentences.
      type: list
      elements: str
      sample: []
users:
  description:
    - The users that per-user accounting charges, or may charge, and those of O(users), in the order of their ids.
  returned: when O(gather_subset) has V(users)
  type: list
  elements: dict
  contains:
    uid:
      description: The user's id.
      type: int
      sample: 64055
    user:
      description: The user's name; V(null) where the host knows none.
      type: str
      sample: libvirt-qemu
    pids:
      description: The user's processes with an iommufd that is accounted per user. Others are not charged to the user.
      type: list
      elements: int
      sample: [4242]
    charged_bytes:
      description:
        - The pinned memory of these processes, an estimate of what the kernel has charged to the user.
        - Of a QEMU whose iommufds differ in their mode, and that does not lock memory itself, it is what C(VmLck) has
          not.
      type: int
      sample: 67371008
    uncertain_bytes:
      description:
        - What the user's processes have pinned, if it is unknown whether the user is charged for it. The module cannot
          see their iommufds, or the memory was pinned by other means, such as vDPA, io_uring or RDMA.
        - What a VM that has ended has left behind is not in it. RV(host.limits_of_view) tells of that (V(charges)).
      type: int
      sample: 0
    largest_bytes:
      description: The pinned memory of the largest of these processes.
      type: int
      sample: 67371008
    memlock_bytes:
      description:
        - The smallest soft limit RLIMIT_MEMLOCK of these processes; V(null) where it is unlimited or there are none.
        - Processes whose iommufds hold nothing, and that have pinned nothing, do not count beside others.
      type: int
      sample: 104857600
    memlock_unlimited:
      description: Whether all of them are unlimited.
      type: bool
      sample: false
    headroom_bytes:
      description:
        - How much more the process with the smallest limit could pin; less than 0 where more is charged than that limit
          allows.
        - It may be less by up to RV(users[].uncertain_bytes), and by what unseen processes have pinned, or left behind.
        - V(null) where RV(users[].memlock_bytes) is V(null).
      type: int
      sample: 37486592
    at_risk:
      description:
        - Whether another VM as large as the largest, with the smallest limit, would not fit.
        - V(null) where it would fit by what the module saw, but might not because of RV(users[].uncertain_bytes), or
          because there are, or may be, processes of the user that the module did not see, or charges whose process
          has ended (V(charges) in RV(host.limits_of_view)).
        - It is V(null), too, where it would fit now, but one of the VMs may pin more as it runs
          (RV(processes[].vfio_devices[].as_it_runs)).
      type: bool
      sample: true
defined:
  description:
    - "The VMs that are defined on the host, whether they run or not: the domains of the system's libvirt, the units of
      the system's service manager that start a VMM with a VFIO or vDPA device or an iommufd, and with O(users) the
      domains of their own libvirts."
    - What could not be read or understood is V(null), and RV(defined[].unread) says so. A unit with a VMM that gets no
      such device is not there, nor is one whose program starts a VMM that its command line does not name, unless it
      runs.
    - No password or other text of a definition is returned, but what is listed here.
  returned: when O(gather_subset) has V(defined)
  type: list
  elements: dict
  contains:
    kind:
      description: V(domain) is one of libvirt's, V(unit) one of systemd's.
      type: str
      sample: domain
    name:
      description: The name of the domain, or the full name of the unit.
      type: str
      sample: vm1
    manager:
      description: V(session) for a domain of a user's own libvirt, else V(system).
      type: str
      sample: system
    path:
      description:
        - The file that it was read from. A transient domain has no definition, only libvirt's record that it runs.
        - V(null) for a unit without a file.
      type: str
      sample: /etc/libvirt/qemu/vm1.xml
    user:
      description:
        - The user that its VMM will run as. The one in its C(<seclabel>), the user whose libvirt it is, or that of
          the unit or of C(iommufd-exec).
        - V(null) for a domain that names none, which runs as RV(host.libvirt.user); and where it is unknown, or has no
          name here.
      type: str
      sample: null
    uid:
      description: The id of that user; V(null) for a domain that names none, and where it is unknown.
      type: int
      sample: null
    autostart:
      description:
        - Whether it starts when the host boots, or for a user's own domain, when the user's libvirt does. A unit does
          where what it is wanted by does.
        - V(null) where that is unknown, as of a unit that a timer or a device may start.
      type: bool
      sample: true
    transient:
      description: Whether it is a domain that is gone once it ends; V(null) where its definition cannot be read.
      type: bool
      sample: false
    pid:
      description:
        - The process of its VMM, if it runs. Of a domain, libvirt's record vouches for it.
        - V(null) where it does not run, or that is unknown.
      type: int
      sample: null
    memory_bytes:
      description:
        - The memory that it starts with, with that of its memory devices, as libvirt and QEMU round it up.
        - V(null) where it is unknown.
      type: int
      sample: 68719476736
    memory_max_bytes:
      description: Up to how much it can be grown, C(<maxMemory>) or C(maxmem); V(null) where that is not said.
      type: int
      sample: null
    elastic_bytes:
      description:
        - How much of the memory may be mapped later or never, as that of a virtio-mem device. It is 0 for a unit.
        - V(null) where its definition cannot be read.
      type: int
      sample: 0
    of_devices_bytes:
      description:
        - What its emulated devices have of memory of their own at most, as C(<video>) and C(<shmem>) do. It may be
          pinned beside RV(defined[].memory_bytes).
        - V(null) where that is unknown, as of a C(<shmem>) with a server.
      type: int
      sample: 16777216
    hugepages:
      description: Whether its memory is in huge pages; V(null) where that is unknown.
      type: bool
      sample: false
    devices:
      description:
        - Its devices that have memory pinned.
        - V(null) where they are unknown, or there may be more.
      type: list
      elements: dict
      contains:
        backend:
          description: V(iommufd), V(legacy) or V(vdpa).
          type: str
          sample: iommufd
        space:
          description: The iommufd or the container that it is in. Those with the same text share one.
          type: str
          sample: the domain's iommufd
        accounting:
          description:
            - How its iommufd will be accounted, V(user) or V(process), as far as the definition decides it. With
              C(iommufd-exec), it is what that will set; V(user) where its unit keeps it from that.
            - V(null) where it does not, as for a domain's, which libvirt may set.
          type: str
          sample: null
        as_it_runs:
          description: Whether it pins memory as the VM runs, as an mdev does.
          type: bool
          sample: false
        address:
          description: Its PCI address on the host; V(null) where it has none, or that is not said.
          type: str
          sample: "0000:00:03.0"
    viommu:
      description:
        - V(none) without a vIOMMU. V(each) where each device has an address space of its own behind it.
        - V(null) where that is unknown.
      type: str
      sample: none
    libvirt_counts:
      description:
        - How many times libvirt counts the memory for its limit, 0 where it sets none.
        - V(null) for a unit, and where it is unknown.
      type: int
      sample: 1
    hard_limit_bytes:
      description: The domain's C(<hard_limit>), or C(MemoryMax=) of the unit; V(null) without.
      type: int
      sample: null
    memory_max_shared:
      description:
        - Whether the unit is in a slice with C(MemoryMax=), which is for all that is in there.
        - V(null) for a domain, and where it was not seen.
      type: bool
      sample: null
    libvirt_locks:
      description: Whether the domain has C(<locked/>); V(null) where its definition cannot be read.
      type: bool
      sample: false
    locks_memory:
      description: Whether QEMU's arguments have it lock its memory (C(mem-lock=on)); V(null) where that is unknown.
      type: bool
      sample: false
    fdgroup:
      description: The name under which libvirt expects the iommufd of the domain; V(null) without.
      type: str
      sample: null
    emulator:
      description: The path of its VMM; V(null) where libvirt chooses, or it is unknown.
      type: str
      sample: /usr/bin/qemu-system-x86_64
    memlock_bytes:
      description:
        - The soft RLIMIT_MEMLOCK that the unit or C(iommufd-exec) gives it.
        - V(null) where that is unlimited or unknown, and for a domain, whose limit libvirt reckons.
      type: int
      sample: null
    memlock_unlimited:
      description: Whether that limit is unlimited; V(null) where it is unknown, and for a domain.
      type: bool
      sample: null
    cap_ipc_lock:
      description:
        - Whether the settings of the unit give it CAP_IPC_LOCK, or withhold it.
        - V(null) where the file of its VMM decides, or it is unknown, and for a domain.
      type: bool
      sample: null
    launcher_lacks:
      description:
        - The capabilities that C(iommufd-exec) in front of its VMM takes for what it is asked to do, and that the unit
          does not give it. Without CAP_SYS_RESOURCE it starts the VMM in the mode V(user), unless it has C(--strict).
        - V(null) without C(iommufd-exec).
      type: list
      elements: str
      sample: null
    launcher_ends:
      description: Why C(iommufd-exec) ends without starting the VMM; V(null) where nothing is known of that.
      type: str
      sample: null
    unread:
      description: What of its definition could not be read or understood, in sentences; empty where all was.
      type: list
      elements: str
      sample: []
    unread_at_boot:
      description:
        - What else of it is not known after a reboot, in sentences. systemd has not read its files since they changed,
          or gives it a default limit (C(DefaultLimitMEMLOCK=)) that may be another one then. Or some of its files are
          in C(/run), as of C(systemctl edit --runtime), and gone then.
      type: list
      elements: str
      sample: []
    changed:
      description:
        - Whether all of it may be otherwise after a reboot, since systemd has not read the files of the unit since they
          changed, or some of them are in C(/run).
        - V(null) for a domain.
      type: bool
      sample: null
    order:
      description:
        - The units in RV(defined) that have pinned their memory before it starts, if they start, too. systemd starts it
          after them (C(After=)), and waits until they are in the background (C(Type=forking)). Empty for a domain.
      type: list
      elements: str
      sample: []
narrowed:
  description: The processes and users to which O(pids) and O(users) have narrowed the answer.
  returned: always
  type: dict
  contains:
    pids:
      description: The ids of processes; V(null) where O(pids) was not given.
      type: list
      elements: int
      sample: null
    uids:
      description: The ids of users; V(null) where O(users) was not given.
      type: list
      elements: int
      sample: null
    users:
      description: The id of each user that O(users) names; V(null) where O(users) was not given.
      type: list
      elements: dict
      sample: null
      contains:
        uid:
          description: The id of the user. Several names may have the same.
          type: int
          sample: 64055
        user:
          description: What O(users) calls the user, a name or an id.
          type: str
          sample: libvirt-qemu
"""

import datetime
import os
import pwd
import re
from typing import TYPE_CHECKING, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ..module_utils import _host_facts
from ..module_utils._accounting import IOMMUFD, LEGACY, VDPA
from ..module_utils._accounts import Accounts, look_at_accounts
from ..module_utils._capabilities import (
    CAP_IPC_LOCK,
    CAP_SYS_PTRACE,
    CAP_SYS_RESOURCE,
    capability_names,
)
from ..module_utils._charges import (
    Check,
    Total,
    account_notes,
    accounting,
    charged,
    checks,
    decisive,
)
from ..module_utils._command import run_command
from ..module_utils._device import DEVICE
from ..module_utils._errors import IommufdError, error_text, shown_path
from ..module_utils._foreign import shown_text
from ..module_utils._iommufd import misc_rdev
from ..module_utils._module import Row, finish, memlock_row
from ..module_utils._names import uid_of, user_name
from ..module_utils._process_facts import Limit, in_initial_namespace, own_status
from ..module_utils._running import read_domain_record
from ..module_utils._sharing import Sharing
from ..module_utils._survey import Holder
from ..module_utils._user import find_user

if TYPE_CHECKING:
    from ..module_utils._libvirt import Libvirt

# What of libvirt may be otherwise once its daemon has started anew.
AT_BOOT = (
    *("user", "uid", "memlock_bytes", "memlock_unlimited", "memlock_hard_bytes", "memlock_hard_unlimited"),
    *("cap_sys_resource", "passes_cap_ipc_lock", "supports_iommufd", "starts_iommufd_domains"),
    *("sets_rlimit_mode", "reason"),
)

# How long a command may take that is not systemd's.
SECONDS = 30


class Unseen:
    """What this caller could not see. Each entry is one kind of thing, and why."""

    def __init__(self) -> None:
        self.limits: list[Row] = []

    def note(self, what: str, why: str) -> None:
        """Notes that a kind of thing could not be seen."""
        self.limits.append({"what": what, "why": why})


def host_row(
    unseen: Unseen,
    nodes: dict[int, _host_facts.VfioNode],
    paths: list[str],
    slow: bool,
    executed: dict[int, str],
) -> Row:
    """What the host supports; `slow` with what takes seconds or wakes a service. `executed`: programs by pid.

    `nodes` are those of VFIO.
    """
    # A look at processes alone needs it not, and a module pays for each import on each host anew.
    from ..module_utils import _libvirt
    from ..module_utils._readiness import readiness

    system = os.uname()
    release = system.release
    module = _host_facts.find_module(release)
    if module is None:
        unseen.note("module", f"/lib/modules/{release} is not here: whether a module could be loaded cannot be told.")
    groups = _host_facts.find_iommu_groups()
    device = device_row()
    libvirt = _libvirt.look_at_libvirt(run_command)
    running = _host_facts.find_running(executed)
    if running.more:
        unseen.note("emulators", f"Of what processes execute, only {len(running.programs)} programs were looked at.")
    files = libvirt.files
    emulators = _host_facts.find_emulators(paths, files.emulators, running.programs, files.running)
    checks = readiness(
        module,
        device["present"],
        _host_facts.has_iommu(),
        _host_facts.look_at_vfio(release),
        _host_facts.is_kubernetes_node(),
    )
    return {
        "kernel": shown_text(release),
        "machine": system.machine,
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "module": module,
        "device": device,
        "options": {"rlimit_mode": option_row(unseen, module)},
        "caller": caller_row(),
        "legacy_by_iommufd": _host_facts.ask_vfio_container(),
        "readiness": [each._asdict() for each in checks],
        "yama_ptrace_scope": _host_facts.read_yama_scope(),
        "iommus": _host_facts.find_iommus(),
        "iommu_groups": [{"id": number, "devices": devices} for number, devices in groups.items()],
        "vfio_devices": [vfio_row(each) for each in nodes.values() if not each.of_group],
        "qemu": [emulator_row(unseen, each, slow) for each in emulators],
        "libvirt": libvirt_row(unseen, libvirt, slow),
    }


def device_row() -> Row:
    """The node /dev/iommu."""
    rdev = misc_rdev()
    node = _host_facts.look_at_node(DEVICE)
    return {
        "path": DEVICE,
        "present": node is not None and node.rdev == rdev,
        "rdev": None if rdev is None else f"{os.major(rdev)}:{os.minor(rdev)}",
        **node_row(node),
    }


def node_row(node: _host_facts.Node | None) -> Row:
    """The permissions of a device node."""
    return {name: node and getattr(node, name) for name in ("mode", "owner", "group")}


def option_row(unseen: Unseen, module: str | None) -> Row:
    """What an iommufd of our own answers."""
    scratch = _host_facts.try_iommufd()
    if scratch.msg and module in (_host_facts.BUILTIN, _host_facts.LOADED):
        unseen.note("options", scratch.msg)
    return {"readable": scratch.readable, "settable": scratch.settable}


def caller_row() -> Row:
    """Who asks."""
    mine = capability_names(own_status().effective)
    return {
        "uid": os.geteuid(),
        "initial_user_namespace": bool(in_initial_namespace("user")),
        "capabilities": [each for each in (CAP_IPC_LOCK, CAP_SYS_PTRACE, CAP_SYS_RESOURCE) if each in mine],
    }


def vfio_row(vfio: _host_facts.VfioNode) -> Row:
    """A device that VFIO offers to iommufd."""
    return {
        "node": vfio.path,
        "address": vfio.addresses[0],
        "iommu_group": vfio.iommu_group,
        **node_row(_host_facts.look_at_node(vfio.path)),
    }


def emulator_row(unseen: Unseen, emulator: _host_facts.Emulator, slow: bool) -> Row:
    """An emulator, asked for its version where that is wanted."""
    given = emulator.capabilities
    if emulator.msg:
        unseen.note("emulators", emulator.msg)
    return {
        "path": shown_path(emulator.path),
        "present": emulator.present,
        "known_by": list(emulator.known_by),
        "writer": emulator.writer and emulator.writer._asdict(),
        "file_capabilities": given and given._asdict(),
        "cap_ipc_lock": None if emulator.msg or not emulator.present else given is not None and given.lifts_memlock,
        "version": emulator_version(unseen, emulator) if slow and emulator.present else None,
    }


def emulator_version(unseen: Unseen, emulator: _host_facts.Emulator) -> str | None:
    """The version that an emulator gives when it is executed, which it is not where others can write it."""
    path = shown_path(emulator.path)
    try:
        _host_facts.check_may_be_run(emulator)
    except IommufdError as exc:
        unseen.note("emulators", f"{path} was not asked for its version: {exc}")
        return None
    code, output, errors = run_patiently([emulator.path, "--version"])
    found = re.search(r"version (\S+)", output)
    if code or not found:
        unseen.note("emulators", f"{path} --version gives no version: {said(code, output, errors)}")
        return None
    return shown_text(found.group(1))


def said(code: int, output: str, errors: str) -> str:
    """What a command that failed has said, on one line."""
    text = (errors or output).strip().replace("\n", " ")
    return f"exit code {code}" + (f", {shown_text(text[:400])}" if text else "")


def libvirt_row(unseen: Unseen, libvirt: Libvirt, slow: bool) -> Row:
    """The system libvirt, asked for a domain's capabilities where that is wanted."""
    # As above.
    from ..module_utils import _libvirt

    for msg in libvirt.msgs:
        unseen.note("libvirt", msg)
    offers = None
    if slow and libvirt.unit is not None:
        code, output, errors = run_patiently(["virsh", "--connect=qemu:///system", "domcapabilities"])
        offers = None if code else _libvirt.offers_iommufd(output)
        if offers is None:
            unseen.note("libvirt", f"virsh domcapabilities gives none: {said(code, output, errors)}")
    row = libvirt_row_of(libvirt, offers)
    sessions = [session_row(*each) for each in libvirt.sessions]
    at_boot = libvirt.at_boot
    if at_boot is None:
        return {**row, "sessions": sessions, "at_boot": None}
    # What it has offered may have been another version.
    then = libvirt_row_of(at_boot, offers if at_boot.version == libvirt.version else None)
    return {**row, "sessions": sessions, "at_boot": {key: then[key] for key in AT_BOOT}}


def libvirt_row_of(libvirt: Libvirt, offers: bool | None) -> Row:
    """What a libvirt is and does. `offers`: whether it offers iommufd, as far as that was asked."""
    # As above.
    from ..module_utils import _libvirt

    sets, reason = _libvirt.sets_rlimit_mode(libvirt, offers)
    memlock = libvirt.memlock
    return {
        "version": _libvirt.version_text(libvirt.version),
        "unit": libvirt.unit,
        "pid": libvirt.pid,
        "outdated": libvirt.files.outdated,
        "cap_sys_resource": libvirt.may,
        "drop_in": list(libvirt.drop_in),
        "taken_by": None if libvirt.taken_by is None else [each._asdict() for each in libvirt.taken_by],
        "unit_outdated": libvirt.unit_outdated,
        "needs_restart": libvirt.needs_restart,
        "passes_cap_ipc_lock": libvirt.passes,
        **limit_row("memlock", memlock),
        **limit_row("memlock_hard", memlock),
        "user": libvirt.files.user.name,
        "uid": libvirt.files.user.uid,
        "supports_iommufd": libvirt.files.abilities.offers,
        "domain_capabilities_iommufd": offers,
        "sets_rlimit_mode": sets,
        "starts_iommufd_domains": _libvirt.starts_domains(libvirt, offers),
        "reason": reason,
    }


def session_row(uid: int, user: str | None, memlock: Limit | None, pid: int | None) -> Row:
    """A user who may have a libvirt of his own."""
    return {"uid": uid, "user": user, "pid": pid, **limit_row("memlock_hard", memlock)}


def limit_row(name: str, memlock: Limit | None) -> Row:
    """The soft or the hard one of a pair of limits, None where they are not known."""
    if memlock is None:
        return dict.fromkeys((f"{name}_bytes", f"{name}_unlimited"))
    return memlock_row(memlock.hard if name == "memlock_hard" else memlock.soft, name)


def note_unseen(accounts: Accounts, unseen: Unseen) -> None:
    """Notes down what this caller was kept from by a look at all processes."""
    for why in accounts.blind:
        unseen.note("processes", why)
    if not _host_facts.has_sysfs():
        unseen.note("descriptors", "sysfs is not here, so devices of VFIO and vDPA are not known as such.")
    seen = accounts.seen
    for what, thing, reasons in (
        ("processes", "", seen.hidden),
        ("descriptors", "the descriptors of ", seen.closed),
        ("iommufds", "the iommufds of ", seen.refused),
    ):
        for reason, pids in reasons.items():
            some = ", ".join(map(str, sorted(pids)[:5])) + (", ..." if len(pids) > 5 else "")
            which = f"{thing}{len(pids)} {'processes' if len(pids) > 1 else 'process'} ({some})"
            unseen.note(what, f"uid {os.geteuid()} cannot look at {which}: {reason}")


def note_keepers(accounts: Accounts, unseen: Unseen) -> None:
    """Notes who may keep what VMs that have ended had pinned. Whom that is charged to cannot be seen."""
    seen = accounts.seen
    if accounts.keepers:
        named = [f"{each.comm} ({each.pid})" for each in seen.holders if each.pid in accounts.keepers]
        some = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
        unseen.note(
            "charges",
            f"No VM that runs accounts for all that {some} {'holds' if len(named) == 1 else 'hold'}. If a VM that has"
            " ended had that, what it had pinned stays charged to its user until that is closed, and nothing tells to"
            " whom, and how much. Once it is closed, look again.",
        )
    if accounts.missing:
        counted = f"{accounts.missing} {'iommufds are' if accounts.missing > 1 else 'iommufd is'} open"
        unseen.note(
            "charges",
            f"{counted} that no process was seen to have. A process may keep that in flight in a socket, or by a device"
            " of it, or by nothing but such a device's memory (/proc/PID/maps names /dev/vfio then). If a VM that has"
            " ended had that, what it had pinned stays charged to its user until that is closed, and nothing tells to"
            " whom, and how much. End what may keep it, such as the VM's launcher, and look again.",
        )
    if seen.blind:
        unseen.note(
            "charges",
            f"uid {os.geteuid()} cannot tell which processes keep what VMs that have ended had pinned, which stays"
            " charged to their users. Run the task as root (become: true).",
        )


def process_row(holder: Holder, accounts: Accounts, host_names: Names) -> Row:
    """A process that holds what memory is pinned by."""
    account, sharing = accounts.of[holder.pid], accounts.seen.sharing
    of_user, largest_limit = accounts.totals[holder.status.uid], accounts.largest[holder.status.uid]
    # Which of the address spaces in what several VMs have are its own is not known.
    fds = (*(each.fd for each in holder.iommufds or ()), *holder.containers())
    others = {pid for fd in fds for pid in sharing.shared_with(holder.pid, fd) or ()}
    spaces = host_names.address_spaces(holder, sharing)
    if spaces and any(accounts.of[pid].holder is not True for pid in others):
        spaces = None
    domain, uri = host_names.domain(holder)
    status = holder.status
    checked = checks(account, of_user)
    check = decisive(account, checked)
    return {
        "pid": holder.pid,
        "comm": holder.comm,
        "uid": status.uid,
        "user": holder.user,
        "started": iso8601(holder.started),
        "emulator": None if holder.program is None else shown_text(holder.program),
        "name": None if holder.name is None else shown_text(holder.name),
        "domain": domain,
        "domain_uri": uri,
        "unit": holder.units[0],
        "user_unit": holder.units[1],
        "initial_user_namespace": holder.initial,
        "memory_bytes": holder.memory_bytes,
        "memory_pluggable": holder.memory_pluggable,
        "of_devices_bytes": holder.of_devices,
        "viommu": holder.viommu,
        "iommufd_objects": holder.iommufd_objects
        and [{"id": shown_text(name), "fd": fd} for name, fd in holder.iommufd_objects],
        "locks_memory": holder.locks_memory,
        "pinned_bytes": status.pinned_bytes,
        "locked_bytes": status.locked_bytes,
        **memlock_row(holder.memlock.soft),
        **memlock_row(holder.memlock.hard, "memlock_hard"),
        **limit_row("memory_max", holder.memory_max and holder.memory_max.limit),
        "memory_max_shared": holder.memory_max and holder.memory_max.shared,
        "capabilities": {
            "effective": those_that_matter(status.effective),
            "permitted": those_that_matter(status.permitted),
            "bounding": those_that_matter(status.bounding),
            "ambient": those_that_matter(status.ambient),
        },
        "no_new_privs": status.no_new_privs,
        "backends": host_names.backends(holder),
        "holder": account.holder,
        "iommufds": iommufd_rows(holder, sharing),
        "legacy_containers": container_rows(holder, sharing),
        "vfio_devices": host_names.vfio_devices(holder),
        "vdpa_devices": host_names.vdpa_devices(holder),
        "address_spaces": spaces,
        "accounting": accounting(account),
        "counters": [counter_row(each) for each in checked],
        "counter": check and check.counter,
        "charged_bytes": charged(account, check),
        "headroom_bytes": check and check.headroom,
        "notes": account_notes(account, of_user, largest_limit),
    }


def iommufd_rows(holder: Holder, sharing: Sharing) -> list[Row] | None:
    """The iommufds of a process; None where this caller may not look."""
    if holder.iommufds is None:
        return None
    return [
        {
            "fd": each.fd,
            "same_as": sharing.same_as(holder.pid, each.fd),
            "shared_with": sharing.shared_with(holder.pid, each.fd),
            "rlimit_mode": each.rlimit_mode,
            "settable": each.settable,
            "ioases": [{"ioas_id": ioas_id, "huge_pages": huge_pages} for ioas_id, huge_pages in each.ioases],
            "truncated": each.truncated,
            "msg": each.msg,
        }
        for each in holder.iommufds
    ]


def container_rows(holder: Holder, sharing: Sharing) -> list[Row] | None:
    """The legacy containers of a process; None where this caller may not look."""
    if holder.iommufds is None:
        return None
    return [
        {"fd": fd, "same_as": sharing.same_as(holder.pid, fd), "shared_with": sharing.shared_with(holder.pid, fd)}
        for fd in holder.containers()
    ]


def counter_row(check: Check) -> Row:
    """A counter that is checked for what a process pins."""
    return {
        "counter": check.counter,
        "held_bytes": check.held,
        "headroom_bytes": check.headroom,
        "backends": check.backends,
    }


def those_that_matter(mask: int) -> list[str]:
    """Those of a process's capabilities that matter to how it is accounted."""
    return [each for each in (CAP_IPC_LOCK, CAP_SYS_RESOURCE) if each in capability_names(mask)]


def iso8601(seconds: float) -> str:
    """A time in seconds since the epoch, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Names:
    """What this host calls things: its system libvirt's domains, and the nodes of VFIO and vDPA, by device number."""

    def __init__(self, unseen: Unseen, nodes: dict[int, _host_facts.VfioNode], vdpa: dict[int, str]) -> None:
        self._nodes = nodes
        self._vdpa = vdpa
        self._unseen: Unseen | None = unseen

    def domain(self, holder: Holder) -> tuple[str | None, str | None]:
        """The domain whose emulator a process is, and the URI of the libvirt that it belongs to; None, None without."""
        if holder.name is None:
            return None, None
        name = shown_text(holder.name)
        if self._is_of_system(holder, holder.name):
            return name, "qemu:///system"
        return (name, "qemu:///session") if holder.session else (None, None)

    def _is_of_system(self, holder: Holder, guest: str) -> bool:
        """Whether the system libvirt says so. The command line, which is the process's own to change, only asks."""
        try:
            record = read_domain_record(guest)
        except IommufdError as exc:
            # Else there is no such domain, or the file is not libvirt's.
            if isinstance(exc.__cause__, PermissionError) and self._unseen is not None:
                self._unseen.note("domains", f"The domains of the system libvirt cannot be told: {exc}")
                self._unseen = None
            return False
        return not record.contradiction(guest, holder.pid, holder.status.uid, holder.started, holder.units[0])

    def backends(self, holder: Holder) -> list[str] | None:
        """What a process has devices by; None where this caller may not look."""
        if holder.iommufds is None:
            return None
        rdevs = set(holder.devices.values())
        found = {IOMMUFD} if holder.iommufds else set()
        found |= {LEGACY} if holder.containers() else set()
        found |= {VDPA} if rdevs & self._vdpa.keys() else set()
        by_node = {self._backend(holder, self._nodes[rdev]) for rdev in rdevs & self._nodes.keys()}
        return sorted(found.union(filter(None, by_node)))

    @staticmethod
    def _backend(holder: Holder, node: _host_facts.VfioNode) -> str | None:
        """What a process has a node of VFIO by. A group is of no use without a container or an iommufd."""
        if not node.of_group:
            return IOMMUFD
        return LEGACY if holder.containers() else IOMMUFD if holder.iommufds else None

    def vfio_devices(self, holder: Holder) -> list[Row] | None:
        """The devices and groups of VFIO that a process has open; None where this caller may not look."""
        if holder.iommufds is None:
            return None
        held = ((fd, self._nodes[rdev]) for fd, rdev in holder.devices.items() if rdev in self._nodes)
        return [
            {
                "fd": fd,
                "node": node.path,
                "addresses": node.addresses,
                "backend": self._backend(holder, node),
                "as_it_runs": node.as_it_runs,
            }
            for fd, node in held
        ]

    def address_spaces(self, holder: Holder, sharing: Sharing) -> int | None:
        """How many address spaces a process has; None where that cannot be told."""
        files = [*(each.fd for each in holder.iommufds or ()), *holder.containers()]
        unread = any(each.rlimit_mode is None or each.msg or each.truncated for each in holder.iommufds or ())
        if holder.iommufds is None or holder.more or unread or (len(files) > 1 and holder.pid in sharing.unknown):
            return None
        different = {fd for fd in files if sharing.same_as(holder.pid, fd) is None}
        of_iommufds = sum(len(each.ioases) for each in holder.iommufds if each.fd in different)
        # A vDPA device is open once at most.
        vdpa = {rdev for rdev in holder.devices.values() if rdev in self._vdpa}
        once_more = (of_iommufds + len(vdpa) + 1) * (holder.memory_bytes or 0)
        if of_iommufds and 0 < once_more <= holder.status.pinned_bytes:
            # Memory was plugged in, or there is an IOAS beyond the end of the search.
            return None
        return of_iommufds + len(different.intersection(holder.containers())) + len(vdpa)

    def vdpa_devices(self, holder: Holder) -> list[Row] | None:
        """The vDPA devices that a process has open; None where this caller may not look."""
        if holder.iommufds is None:
            return None
        return [{"fd": fd, "node": self._vdpa[rdev]} for fd, rdev in holder.devices.items() if rdev in self._vdpa]


def user_row(uid: int, of_user: Total) -> Row:
    """A user that per-user accounting charges."""
    return {
        "uid": uid,
        "user": user_name(uid),
        "pids": of_user.pids,
        "charged_bytes": of_user.charged,
        "uncertain_bytes": of_user.uncertain,
        "largest_bytes": of_user.largest,
        "memlock_bytes": of_user.limit,
        "memlock_unlimited": bool(of_user.pids) and of_user.limit is None,
        "headroom_bytes": None if of_user.limit is None else of_user.limit - of_user.charged,
        "at_risk": of_user.at_risk,
    }


def process_and_user_rows(
    unseen: Unseen, nodes: dict[int, _host_facts.VfioNode], pids: list[int] | None, uids: set[int] | None
) -> tuple[list[Row], list[Row], dict[str, list[int]]]:
    """The processes that hold what memory is pinned by, and the users that are charged; and the units with VMMs.

    `nodes` are those of VFIO.
    """
    accounts = look_at_accounts(nodes, uids or ())
    note_unseen(accounts, unseen)
    note_keepers(accounts, unseen)
    seen, totals = accounts.seen, dict(accounts.totals)
    host_names = Names(unseen, nodes, accounts.vdpa)
    processes = []
    for holder in seen.holders:
        uid = holder.status.uid
        if (pids is None or holder.pid in pids) and (uids is None or uid in uids):
            processes.append(process_row(holder, accounts, host_names))
    # In a user namespace, the kernel shows all users that it has no number for there as this one.
    nobody = None if in_initial_namespace("user") else _host_facts.read_overflow_uid()
    if nobody in totals:
        unseen.note("users", f"This is not the initial user namespace: uid {nobody} stands for any user outside of it.")
        del totals[nobody]
    users = [
        user_row(uid, of_user)
        for uid, of_user in sorted(totals.items())
        if (of_user.pids or of_user.charged or of_user.uncertain or uid in seen.unseen if uids is None else uid in uids)
    ]
    return processes, users, vmm_units(accounts)


def vmm_units(accounts: Accounts) -> dict[str, list[int]]:
    """The services that have VMMs with what memory is pinned by, and their ids; without those of libvirt and users."""
    found: dict[str, list[int]] = {}
    for holder in accounts.seen.holders:
        unit = holder.units[0] or ""
        name = (holder.program or "").rpartition("/")[2]
        is_vmm = "qemu" in name or name == "kvm" or name.startswith("cloud-hypervisor")
        foreign = re.fullmatch(r"(libvirtd|virtqemud|user@[0-9]+)\.service", unit)
        if is_vmm and unit.endswith(".service") and not foreign and not accounts.of[holder.pid].holder:
            found.setdefault(unit, []).append(holder.pid)
    return found


def defined_rows(unseen: Unseen, uids: set[int] | None, running: dict[str, list[int]]) -> list[Row]:
    """The VMs that are defined. `running`: as `vmm_units` has it."""
    # Few tasks ask for it.
    from ..module_utils import _libvirt
    from ..module_utils._defined_units import find_defined_units, note_limits_at_boot
    from ..module_utils._definitions import find_domains

    users = []
    # Root's libvirt is the system's.
    for uid in sorted((uids or set()) - {0}):
        try:
            users.append(find_user(pwd.getpwuid(uid).pw_name))
        except (KeyError, OverflowError):
            unseen.note("defined", f"uid {uid} has no home here, where the user's own libvirt would have its domains.")
    domains, msgs = find_domains(users)
    units, more = find_defined_units(run_command, running)
    for msg in (*msgs, *more):
        unseen.note("defined", msg)
    rows = domains + units
    note_limits_at_boot(run_command, rows)
    if uids is None:
        return rows
    usual: set[int | None] = set()
    if any(each["uid"] is None and each["kind"] == "domain" for each in rows):
        files = _libvirt.look_at_libvirt(run_command).files
        usual = {files.user.uid, files.next_user.uid}
    of = [usual if each["uid"] is None and each["kind"] == "domain" else {each["uid"]} for each in rows]
    return [row for row, its in zip(rows, of) if its & {None, *uids}]


def run(params: Row, _check_mode: bool, result: Row) -> None:
    """Looks at all that the task asks for. Raises IommufdError where it asks for a user that is not there."""
    subsets = set(params["gather_subset"])
    for path in params["emulators"]:
        if not os.path.isabs(path) or "\0" in path:
            raise IommufdError(f"{path!r} is not the absolute path of an emulator.")
    names = None if params["users"] is None else {each: uid_of(each) for each in params["users"]}
    uids = None if names is None else set(names.values())
    unseen = Unseen()
    host: Row = {"limits_of_view": unseen.limits}
    result["host"] = host
    result["narrowed"] = {
        "pids": params["pids"],
        "uids": None if uids is None else sorted(uids),
        "users": None if names is None else [{"uid": uid, "user": user} for user, uid in names.items()],
    }
    processes: list[Row] = []
    nodes = _host_facts.find_vfio_nodes()
    if subsets & {"processes", "users", "defined"}:
        processes, users, running = process_and_user_rows(unseen, nodes, params["pids"], uids)
        found = {"processes": processes, "users": users}
        result.update({name: found[name] for name in found if name in subsets})
        if "defined" in subsets:
            result["defined"] = defined_rows(unseen, uids, running)
    if subsets & {"host", "emulators"}:
        executed = {each["pid"]: each["emulator"] for each in processes if each["emulator"] is not None}
        host.update(host_row(unseen, nodes, params["emulators"], "emulators" in subsets, executed))


def run_patiently(words: list[str]) -> tuple[int, str, str]:
    """Runs a command; its exit code is 127 where it cannot be run at all, as the shell has it."""
    try:
        return run_command(words, SECONDS)
    except OSError as exc:
        return 127, "", error_text(exc.errno)


def main() -> NoReturn:
    subsets = ["host", "processes", "users", "emulators", "defined"]
    module = AnsibleModule(
        argument_spec={
            "gather_subset": {"type": "list", "elements": "str", "choices": subsets, "default": subsets[:3]},
            "pids": {"type": "list", "elements": "int"},
            "users": {"type": "list", "elements": "str"},
            "emulators": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    finish(module, run)


if __name__ == "__main__":
    main()
