# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains of the guest's system libvirt. Where that knows iommufd, one has a device passed through."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Told
from ansible_collections.virt.iommufd.tests.kernel.harness import PATIENCE, Vmm, as_user
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

NAME = "kernel-test"
STATE = Path("/run/libvirt/qemu")
DOMAIN = """
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  {before}
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
  {arguments}
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


def described(name: str, devices: str = "", before: str = "", arguments: str = "") -> str:
    """The XML of a domain."""
    return DOMAIN.format(name=name, devices=devices, before=before, arguments=arguments)


def hostdev(address: str) -> str:
    """The device at that address, passed through. An older libvirt does so by the legacy container."""
    domain, bus, rest = address.split(":")
    return HOSTDEV.format(domain, bus, *rest.split("."))


def first_device() -> str:
    """The address of the first of the guest's devices that are there to be passed through."""
    for device in sorted(Path("/sys/bus/pci/devices").iterdir()):
        if (device / "device").read_text().strip() == "0x11e8":
            return device.name
    raise AssertionError("the guest has no such device")


@pytest.fixture(scope="module")
def knows_iommufd() -> bool:
    """Whether this libvirt passes devices through by iommufd."""
    return "<enum name='iommufd'" in virsh("domcapabilities", "--virttype", "qemu")


@pytest.fixture(scope="module")
def domain(knows_iommufd: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running domain whose processor has not started yet."""
    path = tmp_path_factory.mktemp("domain") / "domain.xml"
    path.write_text(described(NAME, hostdev(first_device()) if knows_iommufd else ""))
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


def test_a_record_that_means_another_process(vmm: Vmm, domain: str, told: Told) -> None:
    record, ghost = (STATE / f"{each}.xml" for each in (domain, "kernel-test-ghost"))
    text = record.read_text()
    try:
        ghost.write_text(text)
        assert f"libvirt's record of the domain is that of domain {domain}" in told(run(domain="kernel-test-ghost"))
        # Root itself may write what it likes, but the emulator's control group is still the other domain's.
        named = text.replace(f"<name>{domain}</name>", "<name>kernel-test-ghost</name>")
        ghost.write_text(re.sub(r"(<domain [^>]*\bid=')[0-9]+'", r"\g<1>1000000'", named))
        message = told(run(domain="kernel-test-ghost"))
        assert "but libvirt has recorded number 1000000 for the domain" in message
        ghost.write_text(re.sub(r"(<domstatus [^>]*\bpid=')[0-9]+'", rf"\g<1>{vmm.pid}'", named))
        assert "libvirt runs that as uid" in told(run(domain="kernel-test-ghost", value="process"))
        os.utime(ghost, (0, 0))
        assert "so it is stale" in told(run(domain="kernel-test-ghost", value="process"))
    finally:
        ghost.unlink()
    assert vmm.mode == "user"


OTHER = "kernel-test-other"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[str]:
    """Another running domain, without a device."""
    path = tmp_path / "domain.xml"
    path.write_text(described(OTHER))
    virsh("create", "--paused", str(path))
    try:
        yield OTHER
    finally:
        virsh("destroy", OTHER)


# What the emulators' user can do in the folder, which is that user's here: rename root's files, and put others there.
SWAP = """
import os, sys
os.chdir(sys.argv[1])
for suffix in sys.argv[4:]:
    names = [f"{each}.{suffix}" for each in sys.argv[2:4]]
    os.rename(names[0], "swapped")
    os.rename(names[1], names[0])
    os.rename("swapped", names[1])
"""


def swap(user: int, first: str, second: str, *suffixes: str) -> None:
    command = [*as_user(user), sys.executable, "-c", SWAP, str(STATE), first, second, *suffixes]
    subprocess.run(command, check=True, timeout=PATIENCE)


@pytest.mark.once
@pytest.mark.parametrize("suffixes", [["pid"], ["xml"], ["pid", "xml"]])
def test_the_emulators_user_renames_what_is_recorded(domain: str, other: str, told: Told, suffixes: list[str]) -> None:
    """Neither domain is ever taken for the other."""
    owner = STATE.stat().st_uid
    assert owner, "the folder is root's here, so that nobody else can rename anything in it"
    pids = {name: int((STATE / f"{name}.pid").read_text()) for name in (domain, other)}
    swap(owner, domain, other, *suffixes)
    try:
        for name, pid in pids.items():
            answered = run(domain=name)
            if "xml" in suffixes:
                assert "so it was renamed" in told(answered)
                assert "process" not in answered
            else:
                assert answered["process"]["pid"] == pid
    finally:
        swap(owner, domain, other, *suffixes)


def test_a_mount_in_the_place_of_a_record(domain: str, told: Told, tmp_path: Path) -> None:
    """As the emulators' user can make one of FUSE, whose server never answers. It is refused, not read."""
    copy = tmp_path / "copy.xml"
    copy.write_bytes((STATE / f"{domain}.xml").read_bytes())
    for there, place in ((copy, STATE / f"{domain}.xml"), (tmp_path, STATE)):
        subprocess.run(["mount", "--bind", str(there), str(place)], check=True)
        try:
            assert f"{place} is not libvirt's: something is mounted there" in told(run(domain=domain))
        finally:
            subprocess.run(["umount", str(place)], check=True)


def test_a_process_that_shows_another_ones_command_line(domain: str) -> None:
    """A process of the emulators' user, with libvirt's pidfile of another domain and a command line that suits it."""
    owner = STATE.stat().st_uid
    pidfile = STATE / f"{domain}.pid"
    kept = pidfile.read_bytes()
    posing = [*as_user(owner), sys.executable, "-c", "import time; print('.', flush=True); time.sleep(60)"]
    with subprocess.Popen([*posing, "-name", f"guest={domain}"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            # As if it were another domain's that was renamed: root's file, with another id in it.
            pidfile.write_text(str(process.pid))
            assert run(domain=domain)["process"]["pid"] == int(kept)
        finally:
            pidfile.write_bytes(kept)
            process.kill()


def test_a_domain_that_is_shut_off(told: Told) -> None:
    assert "No domain kernel-test-none is running under the system libvirt" in told(run(domain="kernel-test-none"))


@pytest.mark.parametrize("name", ["../x", "..", "a/b"])
def test_a_path_instead_of_a_name(told: Told, name: str) -> None:
    assert "is not the name of a domain: it is a name, not a path" in told(run(domain=name))
