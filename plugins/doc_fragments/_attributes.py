# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    """The attributes of this collection's modules: each module says only what differs."""

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and predict what it would change without changing anything.
    support: full
  diff_mode:
    description: Returns what has changed, or in check mode would change, when in diff mode.
    support: full
  idempotent:
    description: A second run with the same options does nothing.
    support: full
  platform:
    description: The operating systems that the module runs on.
    platforms: linux
    support: full
"""

    # For a module that changes nothing, in place of the above.
    INFO_MODULE = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and predict what it would change without changing anything.
    support: full
    details:
      - This module changes nothing.
  diff_mode:
    description: Returns what has changed, or in check mode would change, when in diff mode.
    support: none
    details:
      - This module changes nothing.
  idempotent:
    description: A second run with the same options does nothing.
    support: full
  platform:
    description: The operating systems that the module runs on.
    platforms: linux
    support: full
"""
