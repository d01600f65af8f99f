# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.plugin_utils import _host_files
from ansible_collections.virt.iommufd.plugins.plugin_utils._kept import host_kept
from ansible_collections.virt.iommufd.tests.unit.filter_docs import documented_fields
from ansible_collections.virt.iommufd.tests.unit.wrong import count_refused

Row = dict[str, Any]

KVM, QEMU, OTHER = "/usr/bin/kvm", "/usr/bin/qemu-system-x86_64", "/opt/qemu"
REAL = {KVM: QEMU, QEMU: QEMU, OTHER: OTHER}
UNITS = ["iommufd-host-grant.path", "iommufd-host-grant.timer"]
MODULES: Row = _host_files.modules_file(["iommufd"])
LAUNCHER: Row = _host_files.launcher()
DROP_IN: Row = _host_files.drop_in({"privilege": "memlock", "grantee": "vm1.service", "value": 2**30})
LIMITS: Row = _host_files.limits_file([{"grantee": "alice", "value": 2**30}])


def of_emulators(*emulators: str) -> list[Row]:
    """The files that give emulators their capability back."""
    return _host_files.grant_files({path: REAL[path] for path in emulators})


WATCH = of_emulators()[2]


def plan(*grants: Row, emulators: tuple[str, ...] = ()) -> Row:
    """A plan; of its fields, those that matter here. `grants`: the files that are one to a unit or a user."""
    return {
        "files_of_grants": [each["path"] for each in grants],
        "wanted": {
            "modules": ["iommufd"],
            "files": [MODULES, LAUNCHER, *grants, *(of_emulators(*emulators) if emulators else [])],
            "capabilities": list(emulators),
            "nodes": ["/dev/iommu"],
            "group": "kvm",
            "mode": "0660",
            "blocks": [{"path": "/etc/libvirt/qemu.conf", "devices": ["/dev/iommu"]}],
            "units": UNITS if emulators else [],
            "reload": False,
        },
    }


def before(path: str) -> str:
    return f"{path} before\n"


def applied(*new: tuple[str, str], others: str = "", written: tuple[Row, ...] = (DROP_IN, LIMITS)) -> Row:
    """What iommufd_host_apply returned.

    `new`: what this run has recorded; `others`: an emulator that somebody else has given the capability; `written`:
    files that the run has written over what they held.
    """
    files = (MODULES, WATCH, *written)
    made: list[Row] = [{"kind": "file", "path": each["path"], "before": before(each["path"])} for each in files]
    return {
        "recorded": [{"kind": kind, "path": path} for kind, path in new],
        "capabilities": {path: {"real_path": to, "ours": path != others} for path, to in REAL.items()},
        "made": [{"kind": "module", "path": "iommufd"}, {"kind": "capability", "path": QEMU}, *made],
    }


def started(path: str, ok: bool | None, effective: str | None, present: bool = True) -> Row:
    return {"path": path, "present": present, "started": {"ok": ok, "effective": effective}}


def replica(name: str, ok: bool | None, effective: str | None, present: bool = True) -> Row:
    return {"name": name, "present": present, "replica": {"ok": ok, "effective": effective}}


def check(*rows: Row) -> Row:
    """What iommufd_vmm_check returned."""
    return {"emulators": [row for row in rows if "path" in row], "units": [row for row in rows if "name" in row]}


WITHOUT = "0000000000000000"


def restored(*files: Row) -> list[Row]:
    return [{"path": each["path"], "content": before(each["path"])} for each in files]


def test_what_does_not_start_with_its_grant_loses_it() -> None:
    """The grant may be why, and every start of a VM would fail."""
    made = plan(DROP_IN, LIMITS, emulators=(QEMU,))
    found = host_kept(made, applied(), check(started(QEMU, False, None), replica("vm1.service", False, None)))
    # The rest is no grant of theirs, and stays as it is wanted.
    files = [MODULES, LAUNCHER, *restored(LIMITS)]
    assert found == {**made["wanted"], "files": files, "capabilities": [], "units": []}
    assert found.keys() == documented_fields("_host_plan")["wanted"]["contains"].keys()
    assert found["nodes"] == ["/dev/iommu"]
    assert [each["path"] for each in found["blocks"]] == ["/etc/libvirt/qemu.conf"]


@pytest.mark.parametrize(
    "row",
    [
        # It runs without the capability, or nothing is known.
        started(QEMU, False, WITHOUT),
        started(QEMU, None, None),
        replica("vm1.service", False, WITHOUT),
        replica("vm1.service", None, None),
        # It is being replaced, perhaps.
        started(QEMU, False, None, present=False),
        replica("vm1.service", False, None, present=False),
        # One that nothing was granted to.
        started(OTHER, False, None),
        replica("vm2.service", False, None),
    ],
)
def test_what_an_earlier_run_has_granted_and_proven_stays(row: Row) -> None:
    found = host_kept(plan(DROP_IN, LIMITS, emulators=(QEMU,)), applied(), check(row))
    assert found["files"] == [MODULES, LAUNCHER, *restored(DROP_IN, LIMITS), *of_emulators(QEMU)]
    assert (found["capabilities"], found["units"]) == ([QEMU], UNITS)


def test_what_was_in_force_before_stays() -> None:
    made = plan(DROP_IN, LIMITS, emulators=(QEMU,))
    found = host_kept(made, applied(), {})
    files = [MODULES, LAUNCHER, *restored(DROP_IN, LIMITS), *of_emulators(QEMU)]
    assert found == {**made["wanted"], "files": files}
    assert (found["capabilities"], found["units"]) == ([QEMU], UNITS)
    assert found["nodes"] == ["/dev/iommu"]
    assert [each["path"] for each in found["blocks"]] == ["/etc/libvirt/qemu.conf"]


def test_what_this_run_has_granted_goes() -> None:
    new = [("capability", QEMU), ("file", DROP_IN["path"]), ("file", WATCH["path"]), ("unit", UNITS[0])]
    found = host_kept(plan(DROP_IN, LIMITS, emulators=(KVM,)), applied(*new), {})
    assert (found["capabilities"], found["units"]) == ([], [])
    assert found["files"] == [MODULES, LAUNCHER, *restored(LIMITS)]


def test_one_of_two_emulators_is_new() -> None:
    """What gives the capability back must forget the one, and may be new itself."""
    new = [("capability", OTHER), ("file", of_emulators()[0]["path"]), ("unit", UNITS[1])]
    found = host_kept(plan(emulators=(KVM, OTHER)), applied(*new), {})
    assert (found["capabilities"], found["units"]) == ([KVM], UNITS)
    assert found["files"] == [MODULES, LAUNCHER, *of_emulators(KVM)]
    # It goes on watching the file behind a link.
    watch = [each["content"] for each in found["files"] if each["path"] == WATCH["path"]]
    assert f"PathChanged={KVM}\nPathChanged={QEMU}\n" in watch[0]
    assert OTHER not in str(found)


def test_what_others_have_granted_is_not_ours_to_keep() -> None:
    found = host_kept(plan(emulators=(QEMU,)), applied(others=QEMU), {})
    assert (found["files"], found["capabilities"], found["units"]) == ([MODULES, LAUNCHER], [], [])


def test_a_file_that_held_no_text() -> None:
    """Nor any that somebody had removed: it stays as it was written."""
    known = applied()
    (row,) = [each for each in known["made"] if each["path"] == LIMITS["path"]]
    row["before"] = None
    assert host_kept(plan(LIMITS), known, {})["files"] == [MODULES, LAUNCHER, LIMITS]


def test_a_file_that_the_run_did_not_write() -> None:
    """It is as it was wanted already."""
    found = host_kept(plan(DROP_IN, LIMITS), applied(written=(LIMITS,)), {})
    assert found["files"] == [MODULES, LAUNCHER, DROP_IN, *restored(LIMITS)]


@pytest.mark.parametrize("arguments", [(None, {}, {}), ({}, None, {}), ({}, {}, None), ({}, {}, {})])
def test_other_input(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(IommufdError, match=r"^(It takes|There is no) "):
        host_kept(*arguments)


def test_what_is_of_another_type_is_taken_or_refused() -> None:
    """In no other way, whatever it is."""
    inputs: list[Any] = [plan(DROP_IN, LIMITS, emulators=(QEMU,)), applied(), {"emulators": [], "units": []}]
    assert count_refused(host_kept, inputs) > 50
