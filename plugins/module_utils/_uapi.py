# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what linux/iommufd.h says of IOMMU_OPTION. Numbers and layouts, no behaviour.

The numbers are part of the kernel's ABI and the same on every architecture. A test compiles the header of the
lab's kernels and compares all of them with what the compiler sees.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

__all__ = (
    "IOMMU_OPTION",
    "IOMMU_OPTION_HUGE_PAGES",
    "IOMMU_OPTION_OP_GET",
    "IOMMU_OPTION_OP_SET",
    "IOMMU_OPTION_RLIMIT_MODE",
    "IommuOption",
)

# _IO(IOMMUFD_TYPE, IOMMUFD_CMD_OPTION): the argument's size is not part of the number, but of the struct.
IOMMU_OPTION = 0x3B87

# enum iommufd_option
IOMMU_OPTION_RLIMIT_MODE = 0
IOMMU_OPTION_HUGE_PAGES = 1

# enum iommufd_option_ops
IOMMU_OPTION_OP_SET = 0
IOMMU_OPTION_OP_GET = 1


class IommuOption(ctypes.Structure):
    """`struct iommu_option`: the argument of IOMMU_OPTION. `val64` goes in for SET and comes out of GET."""

    SIZE: ClassVar[int]
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("option_id", ctypes.c_uint32),
        ("op", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
        ("object_id", ctypes.c_uint32),
        ("val64", ctypes.c_uint64),
    )


IommuOption.SIZE = ctypes.sizeof(IommuOption)
