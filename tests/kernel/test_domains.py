# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains of the guest's system libvirt. Where that knows iommufd, one has a device passed through."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Told
from ansible_collections.virt.iommufd.tests.kernel.harness import PATIENCE, Vmm
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

NAME = "kernel-test"
STATE = Path("/run/libvirt/qemu")
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
</domain>
"""
HOSTDEV = """
<hostdev mode='subsystem' type='pci' managed='no'>
  <driver name='vfio' iommufd='yes'/>
  <source><address domain='0x{}' bus='0x{}' slot='0x{}' function='0x{}'/></source>
</hostdev>
"""


def virsh(*words: str) -> str:
    done = subprocess.run(["virsh", *words], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def hostdev() -> str:
    """The first of the guest's devices that are there to be passed through."""
    for device in sorted(Path("/sys/bus/pci/devices").iterdir()):
        if (device / "device").read_text().strip() == "0x11e8":
            domain, bus, rest = device.name.split(":")
            return HOSTDEV.format(domain, bus, *rest.split("."))
    raise AssertionError("the guest has no such device")


@pytest.fixture(scope="module")
def knows_iommufd() -> bool:
    """Whether this libvirt passes devices through by iommufd."""
    return "<enum name='iommufd'" in virsh("domcapabilities", "--virttype", "qemu")


@pytest.fixture(scope="module")
def domain(knows_iommufd: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running domain whose processor has not started yet."""
    path = tmp_path_factory.mktemp("domain") / "domain.xml"
    path.write_text(DOMAIN.format(name=NAME, devices=hostdev() if knows_iommufd else ""))
    virsh("define", str(path))
    try:
        virsh("start", "--paused", NAME)
        try:
            yield NAME
        finally:
            virsh("destroy", NAME)
    finally:
        virsh("undefine", NAME)


def test_a_running_domain(domain: str, knows_iommufd: bool, told: Told) -> None:
    answered = run(domain=domain, value="process")
    assert answered["process"]["comm"] == "qemu-system-x86"
    assert answered["process"]["user"] == "libvirt-qemu"
    assert answered["process"]["pid"] == int((STATE / f"{domain}.pid").read_text())
    if knows_iommufd:
        # libvirt has set it, and it is busy, so nothing is sent.
        assert [each["outcome"] for each in answered["iommufds"]] == ["unchanged"]
        assert answered["value"] == "process"
        busy = run(domain=domain, value="user")
        assert "holds objects already" in told(busy)
        assert busy["value"] == "process"
    else:
        assert "holds no iommufd. A VMM opens one no earlier than its first VFIO device needs it" in told(answered)


def test_a_pidfile_that_means_another_process(vmm: Vmm, domain: str, told: Told) -> None:
    ghost = STATE / "kernel-test-ghost.pid"
    try:
        ghost.write_text(str(vmm.pid))
        message = told(run(domain="kernel-test-ghost", value="process"))
        assert f"(pid {vmm.pid}) is not the emulator of domain kernel-test-ghost" in message
        assert "kernel-test-ghost.pid is stale" in message
        ghost.write_text((STATE / f"{domain}.pid").read_text())
        message = told(run(domain="kernel-test-ghost", value="process"))
        assert f"the guest on its command line is {domain}" in message
    finally:
        ghost.unlink()
    assert vmm.mode == "user"


def test_a_domain_that_is_shut_off(told: Told) -> None:
    assert "No domain kernel-test-none is running under the system libvirt" in told(run(domain="kernel-test-none"))


@pytest.mark.parametrize("name", ["../x", "..", "a/b"])
def test_a_path_instead_of_a_name(told: Told, name: str) -> None:
    assert "is not the name of a domain: it is a name, not a path" in told(run(domain=name))
