# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _selinux
from ansible_collections.virt.iommufd.plugins.module_utils._selinux import (
    context_of_service,
    is_enabled,
    lets_open,
    lets_use,
)

DAEMON = "system_u:system_r:virtd_t:s0"
# The policy's number of sys_resource among the permissions of a capability, and the bit of that number
NUMBER, BIT = 25, 1 << 24


@pytest.fixture
def selinuxfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a host where SELinux is in force. Questions are answered by what a test puts in the place."""
    for name, text in {
        "enforce": "1",
        "class/capability/index": "5",
        "class/process/index": "2",
        "class/capability/perms/sys_resource": str(NUMBER),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_selinux, "_SELINUXFS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "allowed", "why"),
    [
        (f"{BIT:x} ffffffff 0 ffffffff 7 0", True, ""),
        (f"{~BIT & 0xFFFFFFFF:x} ffffffff 0 ffffffff 7 0", False, f"SELinux's policy denies sys_resource to {DAEMON}"),
        # Its domain is permissive, so what the policy denies is done all the same.
        ("0 ffffffff 0 ffffffff 7 1", True, ""),
        ("what?", None, "is of a form that is not known here"),
        ("", None, "is of a form that is not known here"),
    ],
)
def test_the_policy_is_asked(
    selinuxfs: Path, monkeypatch: pytest.MonkeyPatch, answer: str, allowed: bool | None, why: str
) -> None:
    asked = []

    def ask(*question: object) -> bytes:
        asked.append(question)
        return answer.encode()

    monkeypatch.setattr(_selinux, "_ask", ask)
    verdict = lets_use("cap_sys_resource", lambda: DAEMON)
    assert verdict.allowed is allowed
    assert why in verdict.why
    assert asked == [("access", DAEMON, DAEMON, 5)]


def test_what_may_not_be_asked_is_not_known(selinuxfs: Path) -> None:
    def refuse() -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    assert lets_use("cap_sys_resource", refuse) == (
        None,
        "SELinux is in force, and its policy cannot be asked for sys_resource (EACCES: Permission denied)",
    )
    # The policy has no such permission.
    assert lets_use("cap_of_tomorrow", lambda: DAEMON).allowed is None


@pytest.mark.parametrize(
    ("allowed", "flags", "verdict", "denied"),
    [
        (0b11111, 0, True, ""),
        (0b10011, 0, False, "SELinux's policy denies write, ioctl to "),
        # Its domain is permissive.
        (0, 1, True, ""),
    ],
)
def test_whether_a_node_may_be_opened(
    selinuxfs: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, flags: int, verdict: bool, denied: str
) -> None:
    kind = selinuxfs / "class/chr_file"
    (kind / "perms").mkdir(parents=True)
    (kind / "index").write_text("11")
    for number, name in enumerate(["open", "read", "write", "ioctl", "map"], 1):
        (kind / "perms" / name).write_text(str(number))
    asked = []

    def ask(*question: object) -> bytes:
        asked.append(question)
        return f"{allowed:x} ffffffff 0 ffffffff 7 {flags}".encode()

    monkeypatch.setattr(_selinux, "_ask", ask)
    monkeypatch.setattr(os, "getxattr", lambda _path, _name: b"system_u:object_r:device_t:s0\0")
    told = lets_open("/dev/iommu", "system_u:system_r:svirt_t:s0")
    assert told.allowed is verdict
    assert told.why.startswith(denied)
    assert not denied or told.why.endswith("svirt_t:s0 on /dev/iommu, which is system_u:object_r:device_t:s0")
    assert asked == [("access", "system_u:system_r:svirt_t:s0", "system_u:object_r:device_t:s0", 11)]


def test_a_node_that_is_not_there_is_not_known(selinuxfs: Path) -> None:
    assert lets_open("/dev/iommufd_host-no-such-node", DAEMON).allowed is None


def test_whether_it_is_there(selinuxfs: Path) -> None:
    (selinuxfs / "enforce").write_text("0")
    assert is_enabled()
    (selinuxfs / "enforce").unlink()
    assert not is_enabled()


@pytest.mark.parametrize("enforce", ["0", None])
def test_without_selinux_in_force_nothing_is_asked(selinuxfs: Path, enforce: str | None) -> None:
    (selinuxfs / "enforce").unlink()
    if enforce:
        (selinuxfs / "enforce").write_text(enforce)
    assert lets_use("cap_sys_resource", pytest.fail) == (True, "")


def test_whether_it_is_in_force_may_not_be_readable(selinuxfs: Path) -> None:
    (selinuxfs / "enforce").unlink()
    (selinuxfs / "enforce").symlink_to("enforce")
    allowed, why = lets_use("cap_sys_resource", pytest.fail)
    assert allowed is None
    assert why.startswith("Whether SELinux is in force cannot be read (ELOOP")


def test_the_context_that_a_service_would_have(selinuxfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(*question: object) -> bytes:
        asked.append(question)
        return DAEMON.encode() + b"\0"

    monkeypatch.setattr(_selinux, "_ask", ask)
    monkeypatch.setattr(_selinux, "context_of", lambda pid: f"context of {pid}")
    monkeypatch.setattr(os, "getxattr", lambda path, name: f"{name} of {os.path.realpath(path)}\0".encode())
    program = os.path.realpath("/bin/sh")
    assert context_of_service("/bin/sh") == DAEMON
    assert asked == [("create", "context of 1", f"security.selinux of {program}", 2)]


def test_a_program_is_not_waited_for_for_ever(selinuxfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selinux, "_PATIENCE", 0.1)
    monkeypatch.setattr(os, "getxattr", lambda _path, _name: time.sleep(60))
    allowed, why = lets_use("cap_sys_resource", lambda: context_of_service("/bin/sh"))
    assert allowed is None
    assert "the context is not known: The process that does this as root got no answer within" in why


def test_a_program_that_is_not_there(selinuxfs: Path) -> None:
    allowed, why = lets_use("cap_sys_resource", lambda: context_of_service("/usr/sbin/virt-no-such"))
    assert allowed is None
    assert why.endswith("There is no /usr/sbin/virt-no-such")
