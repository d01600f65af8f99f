# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what filters make of what iommufd_info could not see."""

from __future__ import annotations

__all__ = ("UNSEEN",)

# What stands in limits_of_view where there may be VMs that were not seen: processes as a whole, their descriptors, or
# their iommufds.
UNSEEN = ("processes", "descriptors", "iommufds")
