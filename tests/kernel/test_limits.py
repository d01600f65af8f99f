# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What limit systemd and libvirt give, as the guide has it: to the byte, of domains that have not run yet."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.harness import MIB, VM
from ansible_collections.virt.iommufd.tests.kernel.test_domains import STATE, described, hostdev, knows_iommufd, virsh
from ansible_collections.virt.iommufd.tests.kernel.test_info_domains import address
from ansible_collections.virt.iommufd.tests.kernel.test_info_host import libvirt, systemctl

__all__ = ("knows_iommufd",)

pytestmark = pytest.mark.host

NAME = "kernel-test-limits"
MEMORY, MORE = 64 * MIB, 1024 * MIB
# The guest's own IOMMU has 39 bits.
IOMMU = "<iommu model='intel'><driver caching_mode='on' aw_bits='39'/></iommu>"
INFINITY = resource.RLIM_INFINITY
# The devices are of the older PCI, for which there is a place on such a bridge alone.
PLACE = "".join(
    f"<controller type='pci' model='{each}'/>" for each in ("pcie-root", "pcie-root-port", "pcie-to-pci-bridge")
)


def hostdevs(*numbers: int) -> str:
    """These of them, each in a place of its own. Behind a bridge of the older PCI they would share an address space."""
    place = "<address type='pci' domain='0' bus='0' slot='{}' function='0'/></hostdev>"
    return "".join(hostdev(address(each)).replace("</hostdev>", place.format(16 + each)) for each in numbers)


def for_qemu(*words: str) -> str:
    """What libvirt hands on and does not look at."""
    arguments = "".join(f"<qemu:arg value='{each}'/>" for each in words)
    return f"<qemu:commandline>{arguments}</qemu:commandline>"


@contextmanager
def started(path: Path, before: str = "", devices: str = "", arguments: str = "") -> Iterator[int]:
    """The process of a domain that has not run yet."""
    path.write_text(described(NAME, devices, before, arguments))
    virsh("create", "--paused", str(path))
    try:
        yield int((STATE / f"{NAME}.pid").read_text())
    finally:
        virsh("destroy", NAME)


def counted(pid: int, name: str) -> int:
    """What it has pinned (VmPin) or locked (VmLck)."""
    [line] = re.findall(f"^{name}:.*", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(line.split()[1]) * 1024


def limit(pid: int) -> int:
    return resource.prlimit(pid, resource.RLIMIT_MEMLOCK)[0]


def memory_of_groups(pid: int) -> set[str]:
    """How much memory the control groups that a process is in may have, from its own on up."""
    path = Path("/sys/fs/cgroup", Path(f"/proc/{pid}/cgroup").read_text().rpartition("::/")[2].strip())
    # The innermost ones share the memory of those above.
    files = [each / "memory.max" for each in (path, *path.parents) if Path("/sys/fs/cgroup") in each.parents]
    return {each.read_text().strip() for each in files if each.exists()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "domain.xml"


def test_the_limit_by_systemds_default() -> None:
    """Nothing in the guest has changed it, and neither of these units says anything about it."""
    for unit in ("ssh.service", f"user@{VM}.service"):
        assert "LimitMEMLOCK" not in systemctl("cat", unit)
        assert systemctl("show", "-P", "LimitMEMLOCK", unit) == f"{8 * MIB}\n"


def test_a_hard_limit_is_the_control_groups_too(file: Path) -> None:
    hard = "<memtune><hard_limit unit='MiB'>300</hard_limit></memtune>"
    with started(file, before=hard, devices=hostdevs(0)) as pid:
        assert limit(pid) == 300 * MIB
        assert memory_of_groups(pid) == {"max", str(300 * MIB)}


def test_a_hard_limit_that_is_raised_as_the_domain_runs(file: Path, tmp_path: Path) -> None:
    """It is the control group's at once, and that of locked memory with the next device."""
    device = tmp_path / "device.xml"
    device.write_text(hostdev(address(0)))
    hard = "<memtune><hard_limit unit='MiB'>300</hard_limit></memtune>"
    with started(file, before=hard, devices=PLACE) as pid:
        virsh("memtune", NAME, "--hard-limit", str(400 * 1024), "--live")
        assert memory_of_groups(pid) == {"max", str(400 * MIB)}
        assert limit(pid) == 300 * MIB
        virsh("attach-device", "--live", NAME, str(device))
        assert limit(pid) == 400 * MIB


def test_locked_memory_has_no_limit(file: Path) -> None:
    with started(file, before="<memoryBacking><locked/></memoryBacking>") as pid:
        assert limit(pid) == INFINITY


@pytest.mark.parametrize(("iommu", "times"), [("", 1), (IOMMU, 3)], ids=["alone", "behind-an-iommu"])
def test_devices(iommu: str, times: int, file: Path) -> None:
    with started(file, devices=hostdevs(0, 1, 2) + iommu) as pid:
        assert limit(pid) == times * MEMORY + MORE
        assert memory_of_groups(pid) == {"max"}


@pytest.mark.parametrize(("numbers", "times"), [((), 1), ((0,), 2)])
def test_a_vdpa_device(numbers: tuple[int, ...], times: int, file: Path, vdpa: str) -> None:
    interface = f"<interface type='vdpa'><source dev='{vdpa}'/><model type='virtio'/></interface>"
    with started(file, devices=hostdevs(*numbers) + interface) as pid:
        assert limit(pid) == times * MEMORY + MORE


def test_without_any_of_them_it_is_the_daemons(file: Path, knows_iommufd: bool) -> None:
    """Also where it is QEMU that is told of iommufd, as with an older libvirt. A newer one hides the node from it."""
    with started(file, arguments="" if knows_iommufd else for_qemu("-object", "iommufd,id=iommufd0")) as pid:
        assert limit(pid) == libvirt()["memlock_bytes"]


def test_an_iommu_that_libvirt_does_not_see(file: Path, knows_iommufd: bool) -> None:
    arguments = for_qemu("-device", "intel-iommu,caching-mode=on,aw-bits=39")
    with started(file, devices=hostdevs(0, 1), arguments=arguments) as pid:
        assert limit(pid) == MEMORY + MORE
        assert counted(pid, "VmLck") >= 2 * MEMORY
        # The legacy container does not fill it.
        assert (counted(pid, "VmPin") >= 2 * MEMORY) is knows_iommufd


def test_a_device_that_is_plugged(file: Path, tmp_path: Path) -> None:
    device = tmp_path / "device.xml"
    device.write_text(hostdev(address(0)))
    with started(file, devices=PLACE) as pid:
        before = limit(pid)
        virsh("attach-device", "--live", NAME, str(device))
        assert before < limit(pid) == MEMORY + MORE
