# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _iommufd
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import (
    RLIMIT_MODE,
)
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel


def test_a_value_that_no_one_knows_is_given_as_it_is() -> None:
    assert RLIMIT_MODE.value(7) == "7"
    with pytest.raises(ValueError, match="not in tuple"):
        RLIMIT_MODE.number("bogus")


@pytest.mark.parametrize("rdev", [os.makedev(1, 3), os.makedev(10, 0), os.makedev(0, 0)])
def test_other_devices_are_not_iommufds(rdev: int) -> None:
    assert _iommufd.iommufd_rdevs({rdev}) == set()


def test_the_number_of_the_misc_device_is_asked_of_sysfs_then_of_proc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "misc").write_text("229 fuse\n123 iommu\n")
    (tmp_path / "dev").write_text("10:124\n")
    real, hidden = open, set()

    def somewhere_else(path: str, mode: str) -> object:
        return real(tmp_path / ("missing" if path in hidden else path.rpartition("/")[2]), mode)

    monkeypatch.setattr(_iommufd, "open", somewhere_else, raising=False)
    monkeypatch.setattr(_iommufd, "_MISC_DEVICES", str(tmp_path))
    assert _iommufd.misc_rdev() == os.makedev(10, 124)
    hidden.add(f"{tmp_path}/iommu/dev")
    assert _iommufd.misc_rdev() == os.makedev(10, 123)
    hidden.add("/proc/misc")
    # Where sysfs is there, it would have it.
    assert _iommufd.misc_rdev() is None
    monkeypatch.setattr(_iommufd, "_MISC_DEVICES", f"{tmp_path}/nowhere")
    hidden.add(f"{tmp_path}/nowhere/iommu/dev")
    with pytest.raises(HostLacks, match=r"not to be had.*ENOENT"):
        _iommufd.misc_rdev()


def test_the_number_of_the_misc_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_iommufd, "misc_rdev", lambda: os.makedev(10, 123))
    assert _iommufd.iommufd_rdevs({os.makedev(1, 3), os.makedev(10, 123)}) == {os.makedev(10, 123)}


@pytest.mark.parametrize("errno_of_get", [0, errno.EINVAL])
def test_a_vfio_container_is_an_iommufd_where_it_answers_as_one(
    monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel, errno_of_get: int
) -> None:
    # /dev/null stands in for the node: what answers the ioctl is the fake kernel.
    monkeypatch.setattr(_iommufd, "VFIO_CONTAINER", os.devnull)
    monkeypatch.setattr(_iommufd, "VFIO_CONTAINER_RDEV", os.stat(os.devnull).st_rdev)
    kernel.without = errno_of_get
    container = os.stat(os.devnull).st_rdev
    assert _iommufd.iommufd_rdevs({container}) == (set() if errno_of_get else {container})


def test_what_merely_has_the_containers_name_is_sent_nothing(
    monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel, tmp_path: Path
) -> None:
    (tmp_path / "vfio").write_bytes(b"")
    monkeypatch.setattr(_iommufd, "VFIO_CONTAINER", str(tmp_path / "vfio"))
    assert _iommufd.iommufd_rdevs({os.makedev(10, 196)}) == set()
    monkeypatch.setattr(_iommufd, "VFIO_CONTAINER", str(tmp_path / "missing"))
    assert _iommufd.iommufd_rdevs({os.makedev(10, 196)}) == set()
    assert kernel.calls == []
