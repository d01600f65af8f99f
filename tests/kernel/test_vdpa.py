# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a vDPA device pins is held against the limit with what an iommufd pins, and no capability lifts that."""

from __future__ import annotations

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import DEVICES, MIB, PAGE, VM, Vmm

SIZE = 24 * MIB


@pytest.fixture
def owner(vdpa: str, start: Start) -> Vmm:
    """A process of an ordinary user that has the device. Its limit is what it maps here."""
    vmm = start()
    vmm.limit(SIZE)
    vmm.do("vdpa", vdpa)
    return vmm


@pytest.fixture
def mighty_owner(vdpa: str, start: Start) -> Vmm:
    """Such a process with CAP_IPC_LOCK in the initial user namespace, and no other capability."""
    vmm = start(0)
    vmm.limit(SIZE)
    vmm.do("vdpa", vdpa)
    vmm.do("become", str(VM), "ipc_lock")
    assert int(vmm.do("look")["cap_eff"], 16) == 1 << 14
    return vmm


def test_it_is_pinned_and_not_locked(owner: Vmm) -> None:
    owner.do("vdpa_map", str(SIZE))
    seen = owner.do("look")
    assert (seen["vm_pin_kb"], seen["vm_lck_kb"]) == (SIZE // 1024, 0)


@pytest.mark.parametrize("who", ["owner", "mighty_owner"])
def test_beyond_the_limit_is_refused(who: str, request: pytest.FixtureRequest) -> None:
    vmm: Vmm = request.getfixturevalue(who)
    vmm.limit(SIZE - PAGE)
    assert vmm.ask("vdpa_map", str(SIZE))["errno"] == "EFAULT"
    assert vmm.do("look")["vm_pin_kb"] == 0
    vmm.limit(SIZE)
    vmm.do("vdpa_map", str(SIZE))


def test_what_an_iommufd_has_pinned_counts_too(mighty_owner: Vmm) -> None:
    """The capability lifts the limit for the iommufd, but its memory fills that of the vDPA device all the same."""
    mighty_owner.open()
    mighty_owner.do("attach", DEVICES[0])
    mighty_owner.do("pin", str(SIZE))
    assert mighty_owner.ask("vdpa_map", str(SIZE))["errno"] == "EFAULT"
    mighty_owner.limit(2 * SIZE - PAGE)
    assert mighty_owner.ask("vdpa_map", str(SIZE))["errno"] == "EFAULT"
    mighty_owner.limit(2 * SIZE)
    mighty_owner.do("vdpa_map", str(SIZE))
    seen = mighty_owner.do("look")
    assert (seen["vm_pin_kb"], seen["vm_lck_kb"]) == (2 * SIZE // 1024, 0)
