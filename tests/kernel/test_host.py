# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hosts whose /dev/iommu is not what it should be, or that have none. Everything is put back afterwards."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import Vmm
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

NODE = Path("/dev/iommu")
MODULES = ("vfio_pci", "vfio_iommu_type1", "vfio", "iommufd")


@pytest.fixture
def node(vmm: Vmm) -> Iterator[Path]:
    """The node, which the process has opened already and which the test may take away."""
    before = NODE.stat()
    yield NODE
    NODE.unlink(missing_ok=True)
    os.mknod(NODE, stat.S_IFCHR, before.st_rdev)
    NODE.chmod(stat.S_IMODE(before.st_mode))


@pytest.mark.parametrize(
    "replace",
    [
        lambda path: None,
        lambda path: path.write_text("not a device"),
        lambda path: path.symlink_to("/dev/null"),
        lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    ],
    ids=["removed", "a regular file", "a symbolic link", "another device"],
)
def test_the_node_is_of_no_account(vmm: Vmm, node: Path, replace: Callable[[Path], object]) -> None:
    node.unlink()
    replace(node)
    assert run(pid=vmm.pid, value="process")["changed"]
    assert vmm.mode == "process"


@pytest.mark.parametrize("kind", ["a regular file", "another device"])
def test_a_process_that_has_opened_a_false_node(start: Start, node: Path, told: Told, kind: str) -> None:
    node.unlink()
    if kind == "a regular file":
        node.write_text("not a device")
    else:
        os.mknod(node, stat.S_IFCHR, os.makedev(1, 3))
    other = start(0)
    fd = other.open()
    assert "holds no iommufd" in told(run(pid=other.pid, value="process"))
    assert f"Descriptor {fd} of " in told(run(pid=other.pid, fd=fd, value="process"))


@pytest.fixture
def no_iommufd() -> Iterator[None]:
    """A kernel without iommufd: the module is unloaded, with those that need it."""
    loaded = [name for name in MODULES if Path("/sys/module", name).exists()]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (NODE, *Path("/dev/vfio/devices").iterdir())}
    subprocess.run(["modprobe", "--remove", *loaded], check=True)
    try:
        assert not Path("/sys/module/iommufd").exists()
        yield
    finally:
        subprocess.run(["modprobe", "--all", *reversed(loaded)], check=True)
        Path("/sys/bus/pci/drivers/vfio-pci/new_id").write_text("1234 11e8")
        subprocess.run(["udevadm", "settle"], check=True)
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_kernel_without_iommufd(no_iommufd: None, start: Start, told: Told) -> None:
    vmm = start()
    held = vmm.do("open", os.devnull, "r")["fd"]
    message = told(run(pid=vmm.pid, value="process"))
    assert "cannot hold an iommufd, because this host's kernel offers none" in message
    assert "load its module (modprobe iommufd)" in message
    assert "is not an iommufd. It is /dev/null" in told(run(pid=vmm.pid, fd=held, value="process"))
