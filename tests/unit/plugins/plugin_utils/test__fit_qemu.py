# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which VMs QEMU ends whatever their limit. The scenario fit runs each kind in QEMU 10.0 and 11.1."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.plugin_utils._fit import memlock_fit
from ansible_collections.virt.iommufd.tests.unit.fit_rows import Row, emulator, host, idle, info, iommufds, of_vm, unit

BOTH = [{"backend": "iommufd"}, {"backend": "legacy"}]
NVME = [{"backend": "iommufd"}, {"backend": "nvme"}]
# Of no other VM of 64 MiB does it say so.
ENOUGH: Row = {"memory": "64M", "user": "vm", "memlock": "4G", "accounting": "user", "overhead": 0, "locked": 0}


def asked(*versions: str | None, **given: Any) -> Row:
    emulators = [emulator(False, f"/usr/bin/qemu-{index}", version=each) for index, each in enumerate(versions)]
    return memlock_fit(idle(host=host(qemu=emulators)), **{**ENOUGH, "viommu": "none", "devices": BOTH, **given})


@pytest.mark.parametrize(
    ("versions", "fits"),
    [
        pytest.param(["10.0.13"], True, id="an older one"),
        pytest.param(["8.2.0"], True, id="a much older one"),
        pytest.param(["11.1.3"], False, id="a newer one"),
        pytest.param(["12.0.50"], False, id="a still newer one"),
        pytest.param(["10.1.0"], None, id="not tried"),
        pytest.param(["10.2.1"], None, id="not tried either"),
        pytest.param([None], None, id="not told"),
        pytest.param(["of today"], None, id="no version"),
        pytest.param(["10.0.13", "11.1.3"], None, id="one of each"),
        pytest.param(["11.1.3", "11.2.0"], False, id="two newer ones"),
        pytest.param([], None, id="none"),
    ],
)
def test_an_iommufd_beside_a_legacy_container(versions: list[str | None], fits: bool | None) -> None:
    answer = asked(*versions)
    assert answer["fits"] is fits
    assert (answer["question"] is None) is (fits is not None)
    if fits is None:
        assert answer["question"].startswith("Which release of QEMU is it?")
        assert "It may be ended, whatever its limit" in answer["reason"]
    if fits is not True:
        # No limit, mode or capability helps.
        assert answer["remedy"] == "To make it fit: pass all devices through by one iommufd."


def test_why_it_ends() -> None:
    answer = asked("11.1.3", memlock="1M")
    assert answer["reason"].startswith("QEMU 11 ends a VM that has an iommufd and a legacy container in one address")
    assert (answer["fits"], answer["counter"]) == (False, None)
    # Nor would it fit by one.
    assert answer["remedy"] is None


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        pytest.param({"viommu": "each"}, True, id="each in an address space of its own"),
        pytest.param({"viommu": "nested"}, None, id="nested"),
        pytest.param({"devices": NVME}, True, id="a container that QEMU keeps apart"),
        pytest.param({"devices": BOTH[:1] * 2}, True, id="iommufd alone"),
        pytest.param({"devices": BOTH[1:] * 2}, True, id="legacy alone"),
        pytest.param({"devices": [{"backend": "iommufd"}, {"backend": "vdpa"}]}, True, id="vDPA"),
        pytest.param({"accounting": "none"}, False, id="whatever the capability"),
    ],
)
def test_what_newer_ones_do(given: Row, fits: bool | None) -> None:
    assert asked("11.1.3", **given)["fits"] is fits


def test_what_has_to_be_asked_of_a_newer_one() -> None:
    assert asked("11.1.3", viommu="nested")["question"].startswith("Has the VM an IOMMU of its own")


@pytest.mark.parametrize(
    ("version", "given", "fits"),
    [
        ("10.0.13", {}, True),
        ("11.1.3", {"viommu": "none"}, False),
        ("11.1.3", {"viommu": "each"}, True),
        # Its command line has no IOMMU.
        ("11.1.3", {}, False),
        (None, {}, None),
    ],
)
def test_a_vm_that_runs_and_gets_the_other(version: str | None, given: Row, fits: bool | None) -> None:
    path = "/usr/bin/qemu-system-x86_64"
    data = info(
        host=host(qemu=[emulator(False, path, version=version), emulator(False, "/opt/qemu", version="11.0.0")]),
        processes=[unit(emulator=path, iommufds=iommufds(1))],
        users=[of_vm()],
    )
    grow = {"vm": "vm1.service", "devices": [{"backend": "legacy"}]}
    assert memlock_fit(data, grow=grow, memlock="4G", overhead=0, **given)["fits"] is fits


def test_what_runs_with_both_already() -> None:
    legacy: list[Row] = [{"fd": 31, "same_as": None, "shared_with": []}]
    path = "/usr/bin/qemu-system-x86_64"
    row = unit(emulator=path, iommufds=iommufds(1), legacy_containers=legacy, backends=["iommufd", "legacy"])
    data = info(host=host(qemu=[emulator(False, path, version="11.1.3")]), processes=[row], users=[of_vm()])
    grow = {"vm": "vm1.service", "devices": [{"backend": "legacy"}]}
    assert memlock_fit(data, grow=grow, memlock="4G", overhead=0, viommu="none")["fits"] is True
