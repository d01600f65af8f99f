# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter _host_result, which tells what came of a plan of the role iommufd_host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..plugin_utils._filters import reporting
from ..plugin_utils._result import host_result

DOCUMENTATION = r"""
name: _host_result
short_description: "[INTERNAL] Tell what the role iommufd_host has done on a host"
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Do not use this filter. Only the role C(virt.iommufd.iommufd_host) uses it, and it changes as the role needs.
options:
  _input:
    description: The plan, as P(virt.iommufd._host_plan#filter) returned it.
    type: dict
    required: true
  info:
    description: What M(virt.iommufd.iommufd_info) returned, with its default subsets.
    type: dict
    required: true
  applied:
    description: What M(virt.iommufd.iommufd_host_apply) returned for the plan.
    type: dict
    required: true
  check:
    description: What M(virt.iommufd.iommufd_vmm_check) returned once the plan was carried out.
    type: dict
    required: true
  restarts:
    description: Whether the role itself restarts what has to be restarted.
    type: bool
    default: false
"""

EXAMPLES = r"""
# There is none, since only the role uses this filter.
"""

RETURN = r"""
_value:
  description: The result, which the role makes its fact C(iommufd_host_result).
  type: dict
  contains:
    state:
      description: V(present) or V(absent).
      type: str
    supported:
      description: Whether the running kernel has iommufd, if need be once its module is loaded.
      type: bool
    kernel:
      description: The release of the running kernel.
      type: str
    requested:
      description: The strategy that was asked for.
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
    access:
      description: What is done to let QEMU open the device nodes by itself, or why nothing is.
      type: list
      elements: str
    grants:
      description: What this run or an earlier one has granted, by C(privilege), C(grantee), C(means) and C(value).
      type: list
      elements: dict
    found:
      description: What somebody else has granted, with C(privilege), C(grantee) and C(why). It is never removed.
      type: list
      elements: dict
    verified:
      description: What was tried on the live host, with the keys C(what), C(ok) and C(evidence). V(null) is not known.
      type: list
      elements: dict
    failed:
      description: Those that are not so, as sentences.
      type: list
      elements: str
    unproven:
      description: Those of which nothing is known though they were tried, as sentences.
      type: list
      elements: str
    pending:
      description: The VMs that still run under the old accounting.
      type: list
      elements: dict
      contains:
        pid:
          description: Its process id.
          type: int
        name:
          description: Its libvirt domain, else what it calls its guest, else its unit, else its name.
          type: str
        domain:
          description: Its libvirt domain; V(null) without one.
          type: str
        unit:
          description: Its systemd unit; V(null) without one.
          type: str
        accounting:
          description: Who is charged, V(user), V(process) or V(none); V(null) if unknown.
          type: str
        todo:
          description: What to do about it.
          type: str
        dropped_in:
          description: Its unit, where that has a drop-in of the role's; V(null) otherwise.
          type: str
    todo:
      description: What the operator still has to do, each a sentence.
      type: list
      elements: str
    put_back:
      description: What this run put back of what an earlier one had done, each a sentence.
      type: list
      elements: str
    restart:
      description: What reads what has changed only when it starts.
      type: dict
      contains:
        daemons:
          description: Daemons, by the names of their units.
          type: list
          elements: str
        units:
          description: Units with a drop-in of the role's, or patterns of systemctl's for the instances of a template.
          type: list
          elements: str
"""


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"_host_result": reporting("_host_result", host_result)}
