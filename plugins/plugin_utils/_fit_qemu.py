# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what QEMU does, beside the kernel, that decides whether a VM runs. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..module_utils._accounting import EACH, IOMMUFD, LEGACY, NO_VIOMMU, Device
from ._fit_xml import CONTAINER

__all__ = ("BOTH_BACKENDS", "MOMENT", "QEMU", "Clash", "clash", "moment")

# How much more than in the end a QEMU that locks its memory may lock for a moment. It locks once the guest's memory is
# mapped. Of each block that it maps after that, it reserves the size and 2 MiB, and maps it over that, and the kernel
# counts both: qemu_ram_mmap() in its util/mmap-alloc.c. Tried on 10.0 and 11.1, with guests of 64 and 256 MiB: that
# took 3 MiB, for its tables of ACPI, 12 MiB with a display of 16 MiB, 60 MiB with one of 64 MiB, and more than 200 MiB
# with one of 256 MiB.
MOMENT = 128 * 2**20
_ALIGNED = 2 * 2**20

# What has to be asked: which release it is.
QEMU = "qemu"

# QEMU takes each container in an address space for one of the kind that it adds, and from some release on ends where
# one is of the other. Tried: 10.0 runs such a VM and 11.1 ends it, on Linux 6.12 and on 7.2, whoever provides
# /dev/vfio/vfio, and in either order of the devices; with a vIOMMU, 11.1 runs it.
_RUNS_BEFORE = (10, 1)
_ENDS_FROM = (11, 0)

BOTH_BACKENDS = (
    "QEMU 11 ends a VM that has an iommufd and a legacy container in one address space, whatever its limit"
    " (VFIO_IOMMU_LEGACY: Object is not an instance)."
)


def moment(beyond: int) -> int:
    """How much more that is of a QEMU with so much beside its guest's memory, all of which may be one block."""
    return max(MOMENT, beyond + _ALIGNED)


class Clash(NamedTuple):
    """What QEMU does about devices: why it `ends` the VM, else "", and what to ask where that cannot be told."""

    ends: str = ""
    question: str | None = None


def clash(emulators: Iterable[Mapping[str, Any]], devices: tuple[Device, ...], viommu: str | None) -> Clash:
    """Whether QEMU ends a VM with these devices.

    `emulators`: those that it may run in, as iommufd_info tells of them.
    """
    # A disk by nvme:// has a container that QEMU keeps apart.
    backends = {each.backend for each in devices if each.backend == IOMMUFD or each.holder == CONTAINER}
    if not {IOMMUFD, LEGACY} <= backends or viommu == EACH:
        return Clash()
    ends = {_ends(each.get("version")) for each in emulators}
    if ends == {False}:
        return Clash()
    if ends != {True}:
        return Clash(question=QEMU)
    return Clash(BOTH_BACKENDS) if viommu == NO_VIOMMU else Clash(question="viommu")


def _ends(version: str | None) -> bool | None:
    """Whether that release ends such a VM."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", version or "")
    if not found:
        return None
    release = (int(found[1]), int(found[2]))
    return False if release < _RUNS_BEFORE else True if release >= _ENDS_FROM else None
