# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What /proc tells of a process that is held. What parses it is tried in test_parsers.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _process_facts
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import (
    Limit,
    read_arguments,
    read_memory_max,
    read_program,
)


@pytest.mark.parametrize(
    ("there", "told"),
    [
        (b"/usr/bin/qemu", b"/usr/bin/qemu"),
        (b"/usr/bin/qemu (deleted)", b"/usr/bin/qemu"),
        (b"/" + b"x" * 1023, b"/" + b"x" * 1023),
        (b"/" + b"x" * 1024, None),
        (PermissionError(errno.EACCES, "no"), None),
    ],
)
def test_the_path_of_its_program(
    held: Process, monkeypatch: pytest.MonkeyPatch, there: bytes | OSError, told: bytes | None
) -> None:
    def readlink(path: bytes) -> bytes:
        assert path == b"/proc/%d/exe" % held.pid
        if isinstance(there, OSError):
            raise there
        return there

    monkeypatch.setattr(os, "readlink", readlink)
    assert read_program(held) == told


@pytest.mark.parametrize(
    ("text", "count", "whole"),
    [
        (b"", 0, True),
        (b"qemu\0-m\x001G\0", 3, True),
        (b"x\0" * 8192, 8192, True),
        (b"x\0" * 8193, 8192, False),
        (b"qemu\0" + b"x" * 2**18, 1, False),
    ],
)
def test_a_command_line_or_its_beginning(
    held: Process, monkeypatch: pytest.MonkeyPatch, text: bytes, count: int, whole: bool
) -> None:
    monkeypatch.setattr(Process, "read", lambda _self, _name, most: text[:most])
    found = read_arguments(held)
    assert (len(found.words), found.whole) == (count, whole)


@pytest.mark.parametrize(
    ("limited", "others", "shares"),
    [
        ({"vms.slice"}, {}, False),
        ({"vms.slice"}, {"vms.slice/b.service": "populated 1\nfrozen 0\n"}, True),
        # What has ended uses nothing.
        ({"vms.slice"}, {"vms.slice/b.service": "populated 0\nfrozen 0\n"}, False),
        ({"vms.slice"}, {"other.slice": "populated 1\n"}, False),
        # Of the first version, nothing tells.
        ({"vms.slice"}, {"vms.slice/b.service": ""}, True),
        (set(), {"vms.slice/b.service": "populated 1\n"}, False),
        # What is in its unit is its own.
        ({"vms.slice/a.service"}, {"vms.slice/b.service": "populated 1\n"}, False),
        ({"vms.slice/a.service"}, {"vms.slice/a.service/other": "populated 1\n"}, False),
        ({"vms.slice/a.service", "vms.slice"}, {"vms.slice/b.service": "populated 1\n"}, True),
    ],
)
def test_whether_others_use_the_memory_of_its_slice(
    held: Process,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    limited: set[str],
    others: dict[str, str],
    shares: bool,
) -> None:
    own = tmp_path / "vms.slice/a.service/emulator"
    own.mkdir(parents=True)
    (own / "cgroup.procs").touch()
    for group in limited:
        (tmp_path / group / "memory.max").write_text("4096\n")
    for group, events in others.items():
        (tmp_path / group).mkdir(parents=True)
        if events:
            (tmp_path / group / "cgroup.events").write_text(events)
    monkeypatch.setattr(_process_facts, "_CGROUPS", os.fsencode(tmp_path))
    monkeypatch.setattr(Process, "read", lambda _self, _name: b"0::/vms.slice/a.service/emulator\n")
    found = read_memory_max(held)
    assert found is not None
    assert found.shared is shares
    monkeypatch.setattr(Process, "read", lambda _self, _name: b"")
    assert read_memory_max(held) is None


SCOPE = "machine.slice/machine-qemu\\x2d1\\x2dvm1.scope"
V1 = "9:memory:/vm1\n1:name=systemd:/x.service\n0::/x.service\n"


@pytest.mark.parametrize(
    ("text", "limits", "least"),
    [
        # libvirt has its limit on a group within the scope, and the emulator in one within that.
        (f"0::/{SCOPE}/libvirt/emulator\n", {f"{SCOPE}/libvirt": "3072", f"{SCOPE}/libvirt/emulator": "max"}, 3072),
        (f"0::/{SCOPE}/libvirt\n", {f"{SCOPE}/libvirt": "3072", "machine.slice": "2048"}, 2048),
        (f"0::/{SCOPE}\n", {SCOPE: "max"}, None),
        (f"0::/{SCOPE}\n", {}, None),
        ("0::/\n", {}, None),
        ("0::/\n", {"": "4096"}, 4096),
        (V1, {"memory/vm1": "4096", "memory": str(2**63 - 4096)}, 4096),
        (V1.replace(":memory", ":hugetlb,memory,cpu"), {"memory/vm1": str(2**63 - 4096)}, None),
        # Nothing tells of these.
        ("", {}, False),
        ("0::/../x\n", {}, False),
        ("0::/gone (deleted)\n", {"gone": "max"}, False),
    ],
)
def test_how_much_its_control_groups_may_use(
    held: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, limits: dict[str, str], least: int | None
) -> None:
    own = "memory/vm1" if "memory" in text else "" if ".." in text else text.strip().rpartition("::/")[2]
    folder = tmp_path / own
    if "(deleted)" not in text:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").touch()
    for group, limit in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        name = "memory.limit_in_bytes" if group.startswith("memory") else "memory.max"
        (tmp_path / group / name).write_text(f"{limit}\n")
    monkeypatch.setattr(_process_facts, "_CGROUPS", os.fsencode(tmp_path))
    monkeypatch.setattr(Process, "read", lambda _self, _name: text.encode())
    found = read_memory_max(held)
    assert (found and found.limit) == (None if least is False else Limit(least, least))
