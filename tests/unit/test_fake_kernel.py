# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _uapi
from ansible_collections.virt.iommufd.tests.kernel.contract import Contract
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel


class Fake:
    """The fake kernel, with its iommufd behind a descriptor of /dev/null."""

    def __init__(self, legacy_container: bool) -> None:
        self.legacy_container = legacy_container
        self.kernel = FakeKernel()
        self.fd = os.open(os.devnull, os.O_RDWR)

    def _send(self, kernel: FakeKernel, fd: int, argument: _uapi.IommuOption) -> int:
        try:
            kernel.ioctl(fd, _uapi.IOMMU_OPTION, argument)
        except OSError as exc:
            return exc.errno or errno.EIO
        return 0

    def send(self, argument: _uapi.IommuOption) -> int:
        return self._send(self.kernel, self.fd, argument)

    def send_unprivileged(self, argument: _uapi.IommuOption) -> int:
        self.kernel.privileged = False
        try:
            return self.send(argument)
        finally:
            self.kernel.privileged = True

    def send_to(self, where: str, argument: _uapi.IommuOption) -> int:
        container = FakeKernel(without=errno.EINVAL) if self.legacy_container else FakeKernel(mode=1)
        kernel = {"null": FakeKernel(without=errno.ENOTTY), "container": container, "path": self.kernel}[where]
        fd = os.open(os.devnull, os.O_RDWR | (os.O_PATH if where == "path" else 0))
        try:
            return self._send(kernel, fd, argument)
        finally:
            os.close(fd)

    def alloc(self) -> int:
        ioas = len(self.kernel.ioases) + 1
        self.kernel.ioases[ioas] = 1
        return ioas

    def destroy(self, ioas: int) -> None:
        del self.kernel.ioases[ioas]

    def map(self) -> int:
        return self.alloc()

    def map_for_device(self) -> int:
        ioas = self.alloc()
        self.kernel.mapped.add(ioas)
        return ioas


@pytest.mark.parametrize("legacy_container", [True, False])
class TestFakeKernel(Contract):
    @pytest.fixture
    def subject(self, legacy_container: bool) -> Iterator[Fake]:
        fake = Fake(legacy_container)
        yield fake
        os.close(fake.fd)
