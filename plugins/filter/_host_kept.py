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
  - What the same run has granted goes. What an earlier run has granted and proven stays, since what has failed now may
    have another cause, and a user of the host can see to it that nothing is known.
  - Of that, the grants of emulators and units go that could not be started with them.
options:
  _input:
    description: The plan, as P(virt.iommufd._host_plan#filter) returned it.
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
"""

EXAMPLES = r"""
# There is none, since only the role uses this filter.
"""

RETURN = r"""
_value:
  description:
    - What stays, with the fields of RV(virt.iommufd._host_plan#filter:_value.wanted).
    - Its files of grants hold what they held before the run.
  type: dict
"""


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"_host_kept": reporting("_host_kept", host_kept)}
