# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The contract, kept by the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _uapi
from ansible_collections.virt.iommufd.tests.kernel.contract import Contract
from ansible_collections.virt.iommufd.tests.kernel.harness import CONTAINER, VM, kernel_config
from ansible_collections.virt.iommufd.tests.lab.guest.pinner import Pinner


def send(fd: int, argument: _uapi.IommuOption) -> int:
    try:
        fcntl.ioctl(fd, _uapi.IOMMU_OPTION, argument)
    except OSError as exc:
        return exc.errno or errno.EIO
    return 0


class RealKernel:
    """The kernel that this runs on, and an iommufd of this process."""

    def __init__(self) -> None:
        self.vmm = Pinner()
        self.fd: int = self.vmm.open()["fd"]
        config = kernel_config()
        self.legacy_container = "CONFIG_IOMMUFD_VFIO_CONTAINER=y" not in config

    def send(self, argument: _uapi.IommuOption) -> int:
        return send(self.fd, argument)

    def send_unprivileged(self, argument: _uapi.IommuOption) -> int:
        child = os.fork()
        if not child:
            os.setuid(VM)
            os._exit(send(self.fd, argument))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def send_to(self, where: str, argument: _uapi.IommuOption) -> int:
        path = {"null": os.devnull, "container": CONTAINER, "path": "/dev/iommu"}[where]
        fd = os.open(path, os.O_RDWR | (os.O_PATH if where == "path" else 0))
        try:
            return send(fd, argument)
        finally:
            os.close(fd)

    def alloc(self) -> int:
        ioas: int = self.vmm.alloc()["ioas_id"]
        return ioas

    def destroy(self, ioas: int) -> None:
        self.vmm.destroy(str(ioas))

    def map(self) -> int:
        ioas = self.alloc()
        self.vmm.map("1")
        return ioas

    def map_for_device(self) -> int:
        ioas: int = self.vmm.attach("/dev/vfio/devices/vfio0")["ioas_id"]
        self.vmm.map("1")
        return ioas

    def close(self) -> None:
        for fd in (*self.vmm._devices, self.fd):
            os.close(fd)


class TestKernel(Contract):
    """Every claim of the contract."""

    @pytest.fixture
    def subject(self) -> Iterator[RealKernel]:
        kernel = RealKernel()
        yield kernel
        kernel.close()
