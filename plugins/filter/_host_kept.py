# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter _host_kept, which tells what of a plan stays after a failed verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..plugin_utils._filters import reporting
from ..plugin_utils._kept import host_kept

DOCUMENTATION = r"""
name: _host_kept
short_description: "[INTERNAL] Tell what of a plan stays after a failed verification"
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Do not use this filter. Only the role C(virt.iommufd.iommufd_host) uses it, and it changes as the role needs.
  - Where something is not as it should be, all grants go. Where that is only not known, those go that the same run has
    made, and what was in force before stays, because a user of the host can see to it that nothing is known.
options:
  _input:
    description: The plan, as P(virt.iommufd._host_plan#filter) returned it.
    type: dict
    required: true
  applied:
    description: What M(virt.iommufd.iommufd_host_apply) returned for the plan.
    type: dict
    required: true
  failed:
    description: Whether something is known not to be as it should be.
    type: bool
    required: true
"""

EXAMPLES = r"""
# There is none, since only the role uses this filter.
"""

RETURN = r"""
_value:
  description: What stays, in the form of RV(virt.iommufd._host_plan#filter:_value.wanted).
  type: dict
  contains:
    modules:
      description: The kernel modules that are loaded.
      type: list
      elements: str
    files:
      description: The files that stay. Those of grants hold what they held before the run.
      type: list
      elements: dict
    capabilities:
      description: The emulators that keep CAP_IPC_LOCK as a file capability.
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
"""


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"_host_kept": reporting("_host_kept", host_kept)}
