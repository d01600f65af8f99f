# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _policy
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._policy import (
    VmPolicy,
    follow_policy_file,
    is_loaded,
    look_at_policy,
)

SVIRT, TCG = "system_u:system_r:svirt_t:s0", "system_u:system_r:svirt_tcg_t:s0"
SYSFS = "system_u:object_r:sysfs_t:s0"
INSTALL = "semodule --priority=400 --install={}"
REMOVE = "semodule --priority=400 --remove=iommufd_host"
LIST = "semodule --list-modules=full"


class Host:
    """The folders of a host with SELinux, its policy's modules, and what was run there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules = "100 virt    pp\n400 iommufd_host2 cil\n100 iommufd_host cil\n"
        self.ran: list[str] = []
        self.labels = {"/sys": SYSFS}
        (root / "config").write_text("# SELINUXTYPE=mls\nSELINUX=enforcing\nSELINUXTYPE=targeted\n")
        (root / "targeted").mkdir()
        (root / "targeted/virtual_domain_context").write_text(f"{SVIRT}\n{TCG}\n")

    def run(self, words: list[str]) -> tuple[int, str, str]:
        self.ran.append(" ".join(words))
        if words[0] == "matchpathcon":
            return 0, f"label of {words[-1]}\n", ""
        return 0, self.modules if words[0] == "semodule" else "", ""

    def label(self, path: str, _name: str) -> bytes:
        if path not in self.labels:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return self.labels[path].encode() + b"\0"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(_policy, "_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(_policy, "_CONTEXTS", f"{tmp_path}/{{}}/virtual_domain_context")
    monkeypatch.setattr(_policy, "POLICY_FILE", str(tmp_path / "iommufd_host.cil"))
    monkeypatch.setattr(_policy, "is_enabled", lambda: True)
    monkeypatch.setattr(_policy, "matching_nodes", lambda pattern: [pattern.replace("*", "vfio0")])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/sbin/{name}")
    monkeypatch.setattr(os, "getxattr", made.label)
    return made


def test_what_the_policy_has_for_vms(host: Host) -> None:
    nodes = ["/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/vfio", "/dev/iommufd_host-no-such-node"]
    assert look_at_policy(host.run) == VmPolicy([SVIRT, TCG], {each: f"label of {each}" for each in nodes}, SYSFS)
    assert host.ran == [f"matchpathcon -n -m chr_file {each}" for each in nodes]


def test_a_policy_that_knows_no_libvirt(host: Host) -> None:
    (host.root / "targeted/virtual_domain_context").unlink()
    assert look_at_policy(host.run) == VmPolicy([], {}, SYSFS)
    (host.root / "config").write_text("SELINUX=enforcing\n")
    assert look_at_policy(host.run) == VmPolicy([], {}, SYSFS)
    assert host.ran == []


def test_what_cannot_be_told_says_so(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    del host.labels["/sys"]
    found = look_at_policy(host.run)
    assert found == VmPolicy(
        [SVIRT, TCG], {}, "", "SELinux's policy for libvirt's VMs cannot be read (ENODATA: No data available)."
    )
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    found = look_at_policy(host.run)
    assert found == VmPolicy([SVIRT, TCG], {}, "", "There is no semodule, which adds to SELinux's policy.")
    (host.root / "config").unlink()
    found = look_at_policy(host.run)
    assert found is not None
    assert "cannot be read (ENOENT" in found.msg


def test_a_host_without_selinux(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_policy, "is_enabled", lambda: False)
    assert look_at_policy(host.run) is None


def test_the_module_is_the_one_of_that_name_and_priority(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_loaded(host.run)
    host.modules += "400 iommufd_host      cil         \n"
    assert is_loaded(host.run)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert not is_loaded(host.run)


def test_the_module_follows_its_file(host: Host) -> None:
    # The first is a VM's that runs, by its categories.
    host.labels["/dev/iommu"] = "system_u:object_r:svirt_image_t:s0:c1,c2"
    host.labels["/dev/vfio/devices/vfio0"] = "system_u:object_r:device_t:s0"
    file = Path(_policy.POLICY_FILE)
    file.write_text("(optional iommufd_host)\n")
    follow_policy_file(host.run)
    assert host.ran == [INSTALL.format(file), "restorecon /dev/vfio/devices/vfio0"]
    file.unlink()
    host.modules += "400 iommufd_host cil\n"
    host.ran.clear()
    follow_policy_file(host.run)
    assert host.ran == [LIST, REMOVE, "restorecon /dev/vfio/devices/vfio0"]


def test_after_a_cut_only_the_labels_are_left(host: Host) -> None:
    host.labels["/dev/iommu"] = "system_u:object_r:vfio_device_t:s0"
    follow_policy_file(host.run)
    assert host.ran == [LIST, "restorecon /dev/iommu"]


def test_a_module_that_the_policy_does_not_take(host: Host) -> None:
    Path(_policy.POLICY_FILE).write_text("(")
    with pytest.raises(IommufdError, match=r"'semodule .*' failed: Bad"):
        follow_policy_file(lambda words: (1, "", "Bad"))
