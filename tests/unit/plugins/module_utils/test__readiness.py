# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._host_facts import Vfio
from ansible_collections.virt.iommufd.plugins.module_utils._readiness import readiness

READY: dict[str, Any] = {
    "module": "loaded",
    "present": True,
    "iommu": True,
    "vfio": Vfio(True, ["a"], [], None),
    "kubernetes": True,
}


def vfio(**fields: Any) -> dict[str, Any]:
    return {"vfio": READY["vfio"]._replace(**fields)}


def test_all_that_has_to_be_there() -> None:
    found = readiness(**READY)
    assert [each.what for each in found] == ["module", "device", "iommu", "vfio", "bound", "cdev", "kubevirt"]
    assert {(each.ready, each.msg) for each in found} == {(True, "")}
    assert readiness(**{**READY, "kubernetes": False}) == found[:-1]


@pytest.mark.parametrize(
    ("facts", "lacking"),
    [
        ({"module": "builtin"}, {}),
        ({"module": "loadable", "present": False}, {"module": False, "device": False, "kubevirt": False}),
        ({"module": "absent", "present": False}, {"module": False, "device": False, "kubevirt": False}),
        ({"module": None, "present": False}, {"module": None, "device": False, "kubevirt": False}),
        ({"present": False}, {"device": False, "kubevirt": False}),
        ({"iommu": False}, {"iommu": False}),
        ({"iommu": None}, {"iommu": None}),
        (vfio(driver=False, bound=[]), {"vfio": False, "bound": False, "cdev": None, "kubevirt": None}),
        (
            {**vfio(driver=False, bound=[]), "iommu": None},
            {"iommu": None, "vfio": None, "bound": None, "cdev": None, "kubevirt": None},
        ),
        # A driver of the device's own.
        (vfio(driver=False), {}),
        (vfio(bound=[]), {"bound": False, "cdev": None, "kubevirt": None}),
        (vfio(bound=[], offers_nodes=True), {"bound": False}),
        (vfio(bound=[], offers_nodes=False), {"bound": False, "cdev": False, "kubevirt": False}),
        (vfio(without_node=["a"]), {"cdev": False, "kubevirt": False}),
        # What is there counts for more than what the kernel was built with.
        (vfio(offers_nodes=False), {}),
    ],
)
def test_what_is_missing(facts: dict[str, Any], lacking: dict[str, bool | None]) -> None:
    found = [each for each in readiness(**{**READY, **facts}) if each.ready is not True]
    assert {each.what: each.ready for each in found} == lacking
    assert all(each.msg.endswith(".") for each in found)


def test_many_devices_without_a_node() -> None:
    names = [f"0000:00:0{number}.0" for number in range(7)]
    cdev = readiness(**{**READY, **vfio(bound=names, without_node=names)})[5]
    assert "for 0000:00:00.0, 0000:00:01.0, 0000:00:02.0, 0000:00:03.0, 0000:00:04.0, ...: that takes" in cdev.msg
