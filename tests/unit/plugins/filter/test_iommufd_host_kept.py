# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.virt.iommufd.plugins.filter import iommufd_host_kept as plugin
from ansible_collections.virt.iommufd.plugins.filter.iommufd_host_kept import iommufd_host_kept

Row = dict[str, Any]

KVM, QEMU, OTHER = "/usr/bin/kvm", "/usr/bin/qemu-system-x86_64", "/opt/qemu"
UNITS = ["iommufd-host-grant.path", "iommufd-host-grant.timer"]
MODULES: Row = {"path": "/etc/modules-load.d/iommufd_host.conf", "grants": False, "template": "m"}
DROP_IN: Row = {"path": "/etc/vm1.d/50.conf", "grants": True, "template": "d", "grant": {"to": "vm1.service"}}
LIMITS: Row = {"path": "/etc/limits.conf", "grants": True, "template": "l", "raised": []}
WATCH: Row = {"path": "/etc/grant.path", "grants": True, "template": "p"}
PROGRAM: Row = {"path": "/usr/local/libexec/grant", "grants": True, "template": None}


def plan(*files: Row, emulators: tuple[str, ...] = ()) -> Row:
    """A plan; of its fields, those that matter here."""
    return {
        "files": [MODULES, *({**each, "emulators": list(emulators)} if each == WATCH else each for each in files)],
        "capabilities": list(emulators),
        "units": UNITS if emulators else [],
        "nodes": ["/dev/iommu"],
        "blocks": ["/etc/libvirt/qemu.conf"],
    }


def record(*new: tuple[str, str], others: str = "") -> Row:
    """What iommufd_host_record returned; `others`: an emulator that somebody else has given the capability."""
    real = {KVM: QEMU, QEMU: QEMU, OTHER: OTHER}
    files = (MODULES, DROP_IN, LIMITS, WATCH, PROGRAM)
    return {
        "recorded": [{"kind": kind, "path": path} for kind, path in new],
        "capabilities": {path: {"real_path": to, "ours": path != others} for path, to in real.items()},
        "files": {each["path"]: {"content": f"{each['path']} before"} for each in files},
    }


def restored(*files: Row) -> list[Row]:
    return [{"path": each["path"], "content": f"{each['path']} before"} for each in files]


def paths(*files: Row) -> list[str]:
    return [each["path"] for each in (MODULES, *files)]


def test_what_has_failed_leaves_no_grant() -> None:
    found = iommufd_host_kept(plan(DROP_IN, LIMITS, WATCH, PROGRAM, emulators=(QEMU,)), record(), failed=True)
    assert found == {
        "files": paths(),
        "capabilities": [],
        "nodes": ["/dev/iommu"],
        "blocks": ["/etc/libvirt/qemu.conf"],
        "units": [],
        "rewritten": [],
        "restored": [],
    }


def test_what_was_in_force_before_stays() -> None:
    found = iommufd_host_kept(plan(DROP_IN, LIMITS, WATCH, PROGRAM, emulators=(QEMU,)), record(), failed=False)
    assert found == {
        "files": paths(DROP_IN, LIMITS, WATCH, PROGRAM),
        "capabilities": [QEMU],
        "nodes": ["/dev/iommu"],
        "blocks": ["/etc/libvirt/qemu.conf"],
        "units": UNITS,
        "rewritten": [{**WATCH, "emulators": [QEMU]}],
        "restored": restored(DROP_IN, LIMITS),
    }


def test_what_this_run_has_granted_goes() -> None:
    new = [("capability", QEMU), ("file", DROP_IN["path"]), ("file", WATCH["path"]), ("unit", UNITS[0])]
    found = iommufd_host_kept(plan(DROP_IN, LIMITS, WATCH, PROGRAM, emulators=(KVM,)), record(*new), failed=False)
    assert (found["files"], found["capabilities"], found["units"]) == (paths(LIMITS), [], [])
    assert (found["rewritten"], found["restored"]) == ([], restored(LIMITS))


def test_one_of_two_emulators_is_new() -> None:
    """What gives the capability back must forget the one, and may be new itself."""
    new = [("capability", OTHER), ("file", PROGRAM["path"]), ("unit", UNITS[1])]
    found = iommufd_host_kept(plan(WATCH, PROGRAM, emulators=(KVM, OTHER)), record(*new), failed=False)
    assert (found["files"], found["capabilities"], found["units"]) == (paths(WATCH, PROGRAM), [KVM], UNITS)
    assert found["rewritten"] == [{**WATCH, "emulators": [KVM]}]


def test_what_others_have_granted_is_not_ours_to_keep() -> None:
    made = plan(WATCH, emulators=(QEMU,))
    found = iommufd_host_kept(made, record(others=QEMU), failed=False)
    assert (found["files"], found["capabilities"], found["units"]) == (paths(), [], [])


def test_a_file_that_holds_no_text() -> None:
    known = record()
    known["files"][LIMITS["path"]]["content"] = None
    found = iommufd_host_kept(plan(LIMITS), known, failed=False)
    assert (found["files"], found["restored"]) == (paths(LIMITS), [])


@pytest.mark.parametrize("arguments", [(None, {}, False), ({}, None, False), ({}, {}, None), ({}, {}, False)])
def test_other_input(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(AnsibleFilterError, match="iommufd_host_kept"):
        iommufd_host_kept(*arguments)


def test_what_ansible_finds() -> None:
    assert plugin.FilterModule().filters() == {"iommufd_host_kept": iommufd_host_kept}
