# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter _host_plan, which decides what the role iommufd_host is to do on a host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..plugin_utils._filters import reporting
from ..plugin_utils._plan import host_plan

DOCUMENTATION = r"""
name: _host_plan
short_description: "[INTERNAL] Decide what the role iommufd_host does on a host"
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Do not use this filter. Only the role C(virt.iommufd.iommufd_host) uses it, and it changes as the role needs.
options:
  _input:
    description: What M(virt.iommufd.iommufd_info) returned, with its default subsets.
    type: dict
    required: true
  config:
    description:
      - The inputs of the role, by their names without C(iommufd_host_).
      - Also C(architecture), as C(uname -m) tells it, C(apparmor), whether AppArmor is enabled, C(libvirt_user), a
        guess at the user of the system libvirt's VMs, and C(restarted), whether libvirt's daemon has just been
        restarted.
    type: dict
    required: true
  check:
    description:
      - What M(virt.iommufd.iommufd_vmm_check) returned for the emulators and units of the host.
      - Without it, the filter judges only privileges, support and the inputs themselves.
    type: dict
"""

EXAMPLES = r"""
# There is none, since only the role uses this filter.
"""

RETURN = r"""
_value:
  description: The plan.
  type: dict
  contains:
    state:
      description: The state that was asked for, V(present) or V(absent).
      type: str
    supported:
      description: Whether the running kernel has iommufd, if need be once its module is loaded.
      type: bool
    kernel:
      description: The release of the running kernel.
      type: str
    errors:
      description: What stands against the plan, each a sentence with the way out; empty if nothing does.
      type: list
      elements: str
    requested:
      description: The strategy that was asked for.
      type: str
    chosen:
      description: The strategy that suits the host, whether its running kernel has iommufd or not.
      type: str
    strategy:
      description: The strategy that is taken, V(native), V(cap_ipc_lock), V(memlock) or V(observe).
      type: str
    certain:
      description: Whether nothing had to be guessed for that choice, and for what it grants.
      type: bool
    why:
      description: Why that strategy.
      type: str
    user:
      description: The user that VMs run as, by which emulators are checked.
      type: str
    emulators:
      description: The emulators of this host whose capabilities are checked.
      type: list
      elements: str
    units_of_vms:
      description: The units that start VMs, by their full names.
      type: list
      elements: str
    other_units:
      description: The units, beside those that were named, of running VMs that have CAP_IPC_LOCK.
      type: list
      elements: str
    bare_units:
      description: The units that were checked and would not get CAP_IPC_LOCK if they were started now.
      type: list
      elements: str
    memlock_users:
      description: The users whose limit is raised.
      type: list
      elements: str
    grants:
      description: What is granted, each with C(privilege), C(grantee), C(means) and C(value).
      type: list
      elements: dict
    files_of_grants:
      description: Those of the files that are a grant to a unit or a user, by their paths.
      type: list
      elements: str
    wanted:
      description: The options of M(virt.iommufd.iommufd_host_apply) that make the host so, by their names.
      type: dict
      contains:
        modules:
          description: The kernel modules that are loaded.
          type: list
          elements: str
        files:
          description: The files, with C(path), and C(content), or C(program) for a program made on the host.
          type: list
          elements: dict
        capabilities:
          description: The emulators that get CAP_IPC_LOCK as a file capability.
          type: list
          elements: str
        nodes:
          description: The device nodes whose owner and mode a udev rule changes, as paths and shell patterns.
          type: list
          elements: str
        group:
          description: The group that the rule gives them.
          type: str
        mode:
          description: The mode that the rule gives them.
          type: str
        blocks:
          description: The files of others in which the role keeps a block, with C(path) and C(devices).
          type: list
          elements: dict
        units:
          description: The systemd units of those files that are enabled and started.
          type: list
          elements: str
        reload:
          description: Whether systemd has not read all files of the units of VMs yet.
          type: bool
    untried:
      description: The emulators that get CAP_IPC_LOCK and do not have it, so that it has to be tried first.
      type: list
      elements: str
    access:
      description: What is done to let QEMU open the device nodes by itself, or why nothing is.
      type: list
      elements: str
    mends_daemon:
      description:
        - Whether libvirt's daemon, which may not set the rlimit mode, may by what is wanted once it is started again.
      type: bool
    policy:
      description: What SELinux is to allow the VMs of libvirt, V(ipc_lock) and V(opens).
      type: list
      elements: str
"""


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"_host_plan": reporting("_host_plan", host_plan)}
