# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A host that SELinux confines, laid out as those of Red Hat's family: the lab's guest `selinux`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.harness import CAPABILITIES, DEVICES, Answer
from ansible_collections.virt.iommufd.tests.kernel.info import look, status_of
from ansible_collections.virt.iommufd.tests.kernel.test_domains import STATE, described, virsh

NAME = "kernel-test"
EMULATOR = "/usr/libexec/qemu-kvm"
DAEMON = "system_u:system_r:virtd_t:s0"
DOMAINS = "system_u:system_r:svirt_t:s0:c1,c2"
SELINUX = Path("/sys/fs/selinux")


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def context(pid: int) -> str:
    return Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n")


def allowed(subject: str, path: str) -> set[str]:
    """What the policy in force lets a process of that context do with a device node."""
    kind = SELINUX / "class" / "chr_file"
    fd = os.open(SELINUX / "access", os.O_RDWR)
    try:
        os.write(fd, f"{subject} {said('stat', '--format=%C', path)} {(kind / 'index').read_text()}".encode())
        mask = int(os.pread(fd, 4096, 0).split()[0], 16)
    finally:
        os.close(fd)
    return {each.name for each in (kind / "perms").iterdir() if mask >> (int(each.read_text()) - 1) & 1}


@pytest.fixture
def daemon() -> Iterator[int]:
    """The process of libvirt's daemon, which is stopped afterwards."""
    said("systemctl", "start", "libvirtd.service")
    try:
        yield int(said("systemctl", "show", "-P", "MainPID", "libvirtd.service"))
    finally:
        said("systemctl", "stop", "libvirtd.service")


@contextlib.contextmanager
def permissive() -> Iterator[None]:
    said("setenforce", "0")
    try:
        yield
    finally:
        said("setenforce", "1")


def libvirt() -> Answer:
    found: Answer = look("host")["host"]["libvirt"]
    return found


def test_it_is_in_force() -> None:
    assert said("getenforce") == "Enforcing"
    assert Path("/sys/kernel/security/lsm").read_text().split(",").count("selinux") == 1
    assert context(1) == "system_u:system_r:init_t:s0"


def test_every_file_is_labelled_as_the_policy_wants() -> None:
    """Those of the packages, and the kernel's modules. What is made since may have what its folder gives it."""
    folders = ["/boot", "/etc", "/home", "/opt", "/root", "/srv", "/usr", "/var", "/"]
    wrong = said("restorecon", "-n", "-v", "-R", *folders[:-1]) + said("restorecon", "-n", "-v", *folders)
    assert not wrong
    assert said("stat", "--format=%C", said("modinfo", "--field=filename", "iommufd")).endswith(":modules_object_t:s0")


def test_a_domain_is_confined(daemon: int, tmp_path: Path) -> None:
    assert context(daemon) == DAEMON
    path = tmp_path / "domain.xml"
    path.write_text(described(NAME))
    virsh("create", "--paused", str(path))
    try:
        pid = int((STATE / f"{NAME}.pid").read_text())
        assert re.fullmatch(r"system_u:system_r:svirt_t:s0:c\d+,c\d+", context(pid))
        assert str(Path(f"/proc/{pid}/exe").readlink()) == EMULATOR
        assert said("ps", "-o", "user=,group=", "-p", str(pid)).split() == ["qemu", "qemu"]
    finally:
        virsh("destroy", NAME)


def test_what_an_emulator_may_open_by_itself() -> None:
    assert {"open", "read", "write"} <= allowed(DOMAINS, "/dev/null")
    for path in ("/dev/iommu", *DEVICES):
        assert not {"open", "read", "write", "ioctl"} & allowed(DOMAINS, path)


def test_the_emulator_is_a_file_of_its_own() -> None:
    """As a file capability needs it."""
    status = Path(EMULATOR).lstat()
    assert (status.st_mode, status.st_uid, status.st_nlink) == (0o100755, 0, 1)
    assert not list(Path("/usr/bin").glob("qemu-system-*"))
    assert f"<path>{EMULATOR}</path>" in virsh("domcapabilities", "--virttype", "qemu")


def test_what_the_daemon_has_and_may_not_use(daemon: int, tmp_path: Path) -> None:
    """It cannot raise its domains' limits; and so it is told, whether the daemon runs or not."""
    assert int(status_of(daemon)["CapEff"], 16) >> CAPABILITIES["sys_resource"] & 1
    path = tmp_path / "domain.xml"
    path.write_text(described(NAME, before="<memtune><hard_limit unit='GiB'>1</hard_limit></memtune>"))
    done = subprocess.run(["virsh", "create", "--paused", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode
    assert re.search(r"cannot limit locked memory of process \d+.*: Operation not permitted", done.stderr)
    assert re.search(r"avc: +denied +\{ sys_resource \} .*:virtd_t:.* tclass=capability ", said("dmesg"))
    for _runs in (True, False):
        found = libvirt()
        assert (found["cap_sys_resource"], found["sets_rlimit_mode"]) == (False, False)
        with permissive():
            assert libvirt()["cap_sys_resource"] is True
        said("systemctl", "stop", "libvirtd.service")
    assert libvirt()["pid"] is None
