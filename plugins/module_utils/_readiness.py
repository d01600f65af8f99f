# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: from facts, what a host still lacks before a VM with iommufd could start."""

from __future__ import annotations

from typing import NamedTuple

from ._host_facts import ABSENT, LOADABLE, Vfio

__all__ = ("Readiness", "readiness")


class Readiness(NamedTuple):
    """One thing that has to be there. `ready` None: it is not known. `msg`: what is missing, and what to do."""

    what: str
    ready: bool | None
    msg: str


def readiness(module: str | None, present: bool, iommu: bool | None, vfio: Vfio, kubernetes: bool) -> list[Readiness]:
    """What has to be there, in the order in which it is seen to.

    `module` is where iommufd is, `present` whether /dev/iommu is there, and `iommu` whether the kernel drives an IOMMU,
    None where sysfs is hidden. That hides drivers and devices, too.
    """
    found = [
        _module(module),
        _device(module, present),
        _iommu(iommu),
        _vfio(vfio, iommu is not None),
        _bound(vfio, iommu is not None),
        _cdev(vfio),
    ]
    return [*found, _kubevirt(present, found[-1].ready)] if kubernetes else found


def _module(module: str | None) -> Readiness:
    if module is None:
        return Readiness("module", None, "Whether this kernel has a module iommufd cannot be told.")
    if module == ABSENT:
        return Readiness("module", False, "This kernel has no iommufd: boot one that was built with CONFIG_IOMMUFD.")
    if module == LOADABLE:
        msg = (
            "The module iommufd is not loaded: run modprobe iommufd, and name it in /etc/modules-load.d for each boot."
        )
        return Readiness("module", False, msg)
    return Readiness("module", True, "")


def _device(module: str | None, present: bool) -> Readiness:
    if present:
        return Readiness("device", True, "")
    if module in (None, ABSENT, LOADABLE):
        return Readiness("device", False, "There is no /dev/iommu before the module iommufd is loaded.")
    return Readiness("device", False, "/dev/iommu is missing though the kernel has iommufd, as in a container.")


def _iommu(iommu: bool | None) -> Readiness:
    if iommu is None:
        return Readiness("iommu", None, "Whether the kernel drives an IOMMU cannot be told, since sysfs is not here.")
    if iommu:
        return Readiness("iommu", True, "")
    return Readiness(
        "iommu",
        False,
        "The kernel drives no IOMMU: switch it on in the firmware (VT-d, AMD-Vi, SMMU), and on an Intel processor boot"
        " with intel_iommu=on.",
    )


def _vfio(vfio: Vfio, seen: bool) -> Readiness:
    if vfio.driver or vfio.bound:
        return Readiness("vfio", True, "")
    if not seen:
        return Readiness("vfio", None, "Whether a driver of VFIO's is there cannot be told, since sysfs is not here.")
    msg = "No driver of VFIO's is there: run modprobe vfio-pci, and name it in /etc/modules-load.d for each boot."
    return Readiness("vfio", False, msg)


def _bound(vfio: Vfio, seen: bool) -> Readiness:
    if vfio.bound:
        return Readiness("bound", True, "")
    if not seen:
        return Readiness("bound", None, "Which devices are bound to VFIO cannot be told, since sysfs is not here.")
    return Readiness(
        "bound",
        False,
        "No device is bound to VFIO: bind those that VMs are to get, as by driverctl set-override ADDRESS vfio-pci."
        " libvirt does it itself for a <hostdev> with managed='yes', when the domain starts.",
    )


def _cdev(vfio: Vfio) -> Readiness:
    takes = "that takes Linux 6.6 or later with CONFIG_VFIO_DEVICE_CDEV, and an IOMMU"
    if vfio.without_node:
        some = ", ".join(vfio.without_node[:5]) + (", ..." if len(vfio.without_node) > 5 else "")
        return Readiness("cdev", False, f"There is no node below /dev/vfio/devices for {some}: {takes}.")
    if vfio.bound or vfio.offers_nodes:
        return Readiness("cdev", True, "")
    if vfio.offers_nodes is None:
        return Readiness(
            "cdev", None, f"Whether devices get nodes below /dev/vfio/devices shows once one is bound: {takes}."
        )
    return Readiness("cdev", False, f"This kernel makes no nodes below /dev/vfio/devices: {takes}.")


def _kubevirt(present: bool, cdev: bool | None) -> Readiness:
    """What KubeVirt 1.9 stumbles over on a node."""
    msgs = []
    if not present:
        msgs.append(
            "KubeVirt's feature gate IOMMUFD leaves a node without /dev/iommu unschedulable, and loads no module by"
            " itself: load iommufd."
        )
    if cdev is False:
        msgs.append("KubeVirt 1.9.0 passes no device through where the kernel makes no nodes below /dev/vfio/devices.")
    ready = False if msgs else None if cdev is None else True
    if ready is None:
        msgs.append(
            "KubeVirt 1.9.0 takes nodes below /dev/vfio/devices, and it is not known whether there would be any."
        )
    return Readiness("kubevirt", ready, " ".join(msgs))
