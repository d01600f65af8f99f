# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A kernel's IOMMU_OPTION for tests that run without one: what drivers/iommu/iommufd does, in Python."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass, field

from ansible_collections.virt.iommufd.plugins.module_utils import _uapi


@dataclass
class FakeKernel:
    """One iommufd as the kernel sees it. Put `ioctl` in place of fcntl.ioctl.

    `mapped` has the IOASes in which memory is mapped for a device. `without` is the errno of a kernel that lacks the
    ioctl (ENOTTY) or the option (EOPNOTSUPP). `calls` has every (op, value) that was sent. `before_set` is called
    before a SET of a value that exists, `after_set` after it, for tests in which somebody else is at work.
    """

    mode: int = 0
    ioases: dict[int, int] = field(default_factory=dict)
    mapped: set[int] = field(default_factory=set)
    privileged: bool = True
    without: int = 0
    calls: list[tuple[int, int]] = field(default_factory=list)
    before_set: object = None
    after_set: object = None

    def ioctl(self, fd: int, request: int, argument: _uapi.IommuOption) -> int:
        assert request == _uapi.IOMMU_OPTION
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.calls.append((argument.op, argument.val64))
        setting = argument.op == _uapi.IOMMU_OPTION_OP_SET and argument.val64 in (0, 1)
        if setting and callable(self.before_set):
            self.before_set(self)
        error = self.without or self._option(argument)
        if error:
            raise OSError(error, os.strerror(error))
        if setting and callable(self.after_set):
            self.after_set(self)
        return 0

    def _option(self, argument: _uapi.IommuOption) -> int:
        if argument.size < 24:
            return errno.EINVAL
        if argument.reserved:
            return errno.EOPNOTSUPP
        if argument.option_id == _uapi.IOMMU_OPTION_RLIMIT_MODE:
            return self._rlimit_mode(argument)
        if argument.option_id == _uapi.IOMMU_OPTION_HUGE_PAGES:
            return self._huge_pages(argument)
        return errno.EOPNOTSUPP

    def _rlimit_mode(self, argument: _uapi.IommuOption) -> int:
        if argument.object_id:
            return errno.EOPNOTSUPP
        if argument.op == _uapi.IOMMU_OPTION_OP_GET:
            argument.val64 = self.mode
            return 0
        if argument.op != _uapi.IOMMU_OPTION_OP_SET:
            return errno.EOPNOTSUPP
        if not self.privileged:
            return errno.EPERM
        if self.ioases:
            return errno.EBUSY
        if argument.val64 not in (0, 1):
            return errno.EINVAL
        self.mode = argument.val64
        return 0

    def _huge_pages(self, argument: _uapi.IommuOption) -> int:
        if argument.object_id not in self.ioases:
            return errno.ENOENT
        if argument.op == _uapi.IOMMU_OPTION_OP_GET:
            argument.val64 = self.ioases[argument.object_id]
            return 0
        if argument.op != _uapi.IOMMU_OPTION_OP_SET:
            return errno.EOPNOTSUPP
        on = self.ioases[argument.object_id]
        if argument.val64 not in (0, 1) or (argument.val64 < on and argument.object_id in self.mapped):
            return errno.EINVAL
        self.ioases[argument.object_id] = argument.val64
        return 0
