# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.plugin_utils._result import host_result
from ansible_collections.virt.iommufd.tests.unit.filter_docs import documented_fields
from ansible_collections.virt.iommufd.tests.unit.wrong import count_refused

Row = dict[str, Any]

QEMU = "/usr/bin/qemu-system-x86_64"
FILE = {"privilege": "cap_ipc_lock", "grantee": QEMU, "means": "file capability", "value": "ep"}
DROP_IN = {"privilege": "cap_ipc_lock", "grantee": "vm1.service", "means": "drop-in", "value": "ambient"}
TEMPLATE = {**DROP_IN, "grantee": "vm@.service"}
RAISED = {"privilege": "memlock", "grantee": "vm1.service", "means": "drop-in", "value": 2**30}
USERS = {"privilege": "memlock", "grantee": "alice", "means": "limits.d", "value": 2**30}
WITH, WITHOUT = "0000000000004000", "0000000000000000"


def drop_in_of(unit: str) -> str:
    return f"/etc/systemd/system/{unit}.d/50-iommufd_host.conf"


def removed(path: str) -> Row:
    """A file that was put back by removing it."""
    return {"kind": "file", "path": path, "text": f"{path} is removed.", "gone": True}


TAKEN = {"kind": "capability", "path": QEMU, "text": f"CAP_IPC_LOCK is taken from {QEMU}.", "gone": False}
DROPPED = removed(drop_in_of("vm1.service"))


def written(path: str, content: bool = True) -> Row:
    """A file that was written; `content`: with another content, and not only another mode."""
    return {"kind": "file", "path": path, "text": f"{path} is written.", "content": content, "before": ""}


def block(text: str, **fields: Any) -> Row:
    return {"kind": "block", "path": "/etc/libvirt/qemu.conf", "text": text, **fields}


def plan(strategy: str, *grants: Row) -> Row:
    """A plan without errors; of its fields, those that matter here."""
    return {
        "state": "present",
        "supported": True,
        "kernel": "6.12.107",
        "requested": "auto",
        "chosen": strategy,
        "strategy": strategy,
        "certain": True,
        "why": "So it is.",
        "user": "libvirt-qemu",
        "access": [],
        "bare_units": [],
        "mends_daemon": False,
        "policy": [],
        "grants": list(grants),
        "wanted": {"capabilities": [grant["grantee"] for grant in grants if grant["means"] == "file capability"]},
    }


def process(**fields: Any) -> Row:
    """A VM that runs, as iommufd_info returns it."""
    return {
        "pid": 4242,
        "comm": "qemu-system-x86",
        "user": "libvirt-qemu",
        "name": "guest1",
        "domain": "vm1",
        "unit": "machine-qemu.scope",
        "emulator": QEMU,
        "accounting": "user",
        "memlock_bytes": 2**20,
        "memlock_unlimited": False,
        **fields,
    }


def info(*processes: Row, capable: bool = False, libvirt: int | None = 812) -> Row:
    """What iommufd_info returned; `libvirt`: the process id of the system libvirt's daemon, None where none runs."""
    host = {
        "qemu": [{"path": QEMU, "cap_ipc_lock": capable}],
        "libvirt": {
            "unit": "libvirtd.service",
            "pid": libvirt,
            "outdated": libvirt and False,
            "reason": "It may not.",
            "drop_in": ["A=b"],
            "taken_by": [{"path": "/a/10.conf", "line": 2, "text": "A=b"}],
            "needs_restart": False,
            "supports_iommufd": True,
            "starts_iommufd_domains": True,
            "cap_sys_resource": True,
        },
    }
    return {"host": host, "processes": list(processes)}


def applied(*put_back: Row, made: tuple[Row, ...] = (), ours: bool | None = None) -> Row:
    """What iommufd_host_apply returned; `ours`: whose capability the emulator has, None where it was not asked for."""
    there = {QEMU: {"real_path": QEMU, "ipc_lock": True, "ours": ours, "other": []}}
    capabilities = {} if ours is None else there
    return {"put_back": list(put_back), "made": list(made), "capabilities": capabilities, "stranded": []}


def started(has: bool, /, **fields: Any) -> Row:
    """An emulator that was started, with the capability or without."""
    done = {
        "attempted": True,
        "inconclusive": False,
        "how": "bare",
        "ok": has,
        "user": "libvirt-qemu",
        "effective": WITH if has else WITHOUT,
        "msg": "",
    }
    return {"path": QEMU, "started": {**done, **fields}}


def replica(has: bool, /, **fields: Any) -> Row:
    """A unit whose replica was started."""
    limits = {"memlock_bytes": 2**20, "memlock_unlimited": False}
    done = {
        "attempted": True,
        "inconclusive": False,
        "ok": has,
        "effective": WITH if has else WITHOUT,
        "msg": "",
        **limits,
    }
    return {"name": "vm1.service", "ambient_ipc_lock": has, "replica": {**done, **fields}}


def check(*rows: Row, try_iommufd: bool | None = True) -> Row:
    """What iommufd_vmm_check returned; nothing was started where `try_iommufd` is None."""
    return {
        "emulators": [row for row in rows if "path" in row],
        "units": [row for row in rows if "name" in row],
        "users": [row for row in rows if "present" in row],
        "selinux": None,
        "try_iommufd": {
            "attempted": try_iommufd is not None,
            "inconclusive": False,
            "ok": try_iommufd,
            "mode": "process" if try_iommufd else None,
            "msg": "Not so.",
        },
    }


def session(limit: int | None) -> Row:
    """A user whose session was opened."""
    limits = {"memlock_bytes": limit, "memlock_unlimited": limit is None}
    return {"user": "alice", "present": True, "attempted": True, "inconclusive": False, "msg": "", **limits}


@pytest.mark.parametrize(
    ("made", "row", "ok", "failed"),
    [
        (plan("cap_ipc_lock", FILE), started(True), True, ""),
        (plan("cap_ipc_lock", FILE), started(False), False, f"{QEMU}, started as libvirt-qemu, has CAP_IPC_LOCK: no"),
        (plan("native"), started(False), True, ""),
        # What others have granted is reported, and no failure.
        (plan("native"), started(True), False, ""),
        (plan("cap_ipc_lock", DROP_IN), replica(True), True, ""),
        (plan("cap_ipc_lock", DROP_IN), replica(False), False, "A replica of vm1.service has CAP_IPC_LOCK: no"),
        (plan("observe"), replica(False), True, ""),
        (plan("observe"), replica(True), False, ""),
        (plan("memlock", RAISED), replica(False, memlock_bytes=2**30), True, ""),
        (plan("memlock", RAISED), replica(False), False, "may lock 1073741824 bytes: no (1048576 bytes)."),
        (plan("memlock", RAISED), replica(False, memlock_unlimited=True), True, ""),
        (plan("memlock", {**RAISED, "value": None}), replica(False), False, "may lock unlimited: no (1048576 bytes)."),
        (plan("memlock", USERS), session(2**30), True, ""),
        (plan("memlock", USERS), session(None), True, ""),
        (plan("memlock", USERS), session(2**29), False, "A session of alice may lock 1073741824 bytes: no"),
    ],
)
def test_what_was_verified(made: Row, row: Row, ok: bool, failed: str) -> None:
    found = host_result(made, info(), applied(), check(row))
    assert found["verified"][0]["what"] == "The rlimit mode can be set for libvirt-qemu, and read back"
    assert found["verified"][0]["ok"] is True
    assert found["verified"][-1]["ok"] is ok
    assert failed in " ".join(found["failed"])
    assert bool(failed) == bool(found["failed"])
    assert set(found["verified"][0]) == {"what", "ok", "evidence"}


def test_a_mode_that_cannot_be_set_is_a_failure() -> None:
    found = host_result(plan("observe"), info(), applied(), check(try_iommufd=False))
    assert found["failed"] == ["The rlimit mode can be set for libvirt-qemu, and read back: no (Not so.)."]


def test_what_was_not_tried_is_neither() -> None:
    row = started(False, attempted=False, effective=None, msg="not run in check mode")
    found = host_result(plan("cap_ipc_lock", FILE), info(), applied(), check(row, try_iommufd=None))
    assert [each["ok"] for each in found["verified"]] == [None, None]
    assert found["verified"][1]["evidence"] == "not run in check mode"
    assert found["failed"] == []
    assert found["unproven"] == []


UNKNOWN: Row = {"ok": None, "inconclusive": True, "effective": None, "msg": "It was ended by signal 9."}


@pytest.mark.parametrize(
    ("made", "row", "unproven"),
    [
        (plan("cap_ipc_lock", FILE), started(False, **UNKNOWN), f"{QEMU}, started as libvirt-qemu, has CAP_IPC_LOCK"),
        (plan("cap_ipc_lock", DROP_IN), replica(False, **UNKNOWN), "A replica of vm1.service has CAP_IPC_LOCK"),
        (plan("memlock", RAISED), replica(False, **UNKNOWN), "A replica of vm1.service may lock 1073741824 bytes"),
        (plan("memlock", USERS), {**session(None), **UNKNOWN}, "A session of alice may lock 1073741824 bytes"),
        # Nothing was granted, so that nothing has to be proven.
        (plan("native"), started(False, **UNKNOWN), ""),
        (plan("observe"), replica(False, **UNKNOWN), ""),
    ],
)
def test_what_is_not_known(made: Row, row: Row, unproven: str) -> None:
    found = host_result(made, info(), applied(), check(row))
    assert found["failed"] == []
    expected = [f"{unproven}: that is not known (It was ended by signal 9.)."] if unproven else []
    assert found["unproven"] == expected
    assert found["verified"][-1]["ok"] is None
    assert found["verified"][-1]["evidence"] == "It was ended by signal 9."


@pytest.mark.parametrize(
    ("fields", "ok", "evidence", "failed", "unproven"),
    [
        ({"ok": True, "msg": ""}, True, "the policy in force", [], []),
        (
            {"ok": False, "msg": "Denied."},
            False,
            "Denied.",
            [
                "SELinux lets svirt_t use CAP_IPC_LOCK: no (Denied.).",
                "SELinux lets svirt_t open /dev/iommu: no (Denied.).",
            ],
            [],
        ),
        (
            {"ok": None, "inconclusive": True, "msg": "It is."},
            None,
            "It is.",
            [],
            [
                "SELinux lets svirt_t use CAP_IPC_LOCK: that is not known (It is.).",
                "SELinux lets svirt_t open /dev/iommu: that is not known (It is.).",
            ],
        ),
        ({"ok": None, "attempted": False, "msg": "Not run."}, None, "Not run.", [], []),
    ],
)
def test_what_selinux_allows(
    fields: Row, ok: bool | None, evidence: str, failed: list[str], unproven: list[str]
) -> None:
    row = {"attempted": True, "inconclusive": False, **fields}
    domains = [{"context": "system_u:system_r:svirt_t:s0", "ipc_lock": row, "opens": row}]
    checked = {**check(), "selinux": {"domains": domains}}
    found = host_result({**plan("observe"), "policy": ["ipc_lock", "opens"]}, info(), applied(), checked)
    told = [
        (each["ok"], each["evidence"]) for each in found["verified"] if each["what"].startswith("SELinux lets svirt_t ")
    ]
    assert told == [(ok, evidence)] * 2
    assert (found["failed"], found["unproven"]) == (failed, unproven)
    # What the role does not want of it, it does not tell.
    found = host_result(plan("observe"), info(), applied(), checked)
    assert [each for each in found["verified"] if "SELinux" in each["what"]] == []


def test_a_mode_that_is_not_known() -> None:
    unknown = check()
    unknown["try_iommufd"].update(UNKNOWN, mode=None)
    found = host_result(plan("observe"), info(), applied(), unknown)
    assert (found["failed"], len(found["unproven"])) == ([], 1)


LARGE = {**RAISED, "value": 2**20}
BY_UNIT = process(accounting="none", domain=None, unit="vm1.service", comm="vmm")


@pytest.mark.parametrize(
    ("made", "held", "put_back", "todo"),
    [
        (plan("cap_ipc_lock", FILE), process(), [], "shut domain vm1 off and start it again"),
        (plan("cap_ipc_lock", FILE), process(domain=None, unit="vm1.service"), [], "restart vm1.service"),
        (plan("cap_ipc_lock", FILE), process(domain=None), [], "end it and start it again"),
        (plan("cap_ipc_lock", FILE), process(comm="vmm"), [], ""),
        (plan("cap_ipc_lock", FILE), process(user="root"), [], ""),
        (plan("cap_ipc_lock", DROP_IN), process(domain=None, unit="vm1.service"), [], "restart vm1.service"),
        # Nothing is granted to it, so it would be started again for nothing.
        (plan("cap_ipc_lock", DROP_IN), process(domain=None, unit="vm2.service"), [], ""),
        (plan("native"), process(), [], "shut domain vm1 off and start it again"),
        (plan("native"), process(domain=None, unit="vm1.service"), [], ""),
        (plan("native"), process(accounting="process"), [], ""),
        (plan("cap_ipc_lock", FILE), process(accounting="none"), [], ""),
        (plan("observe"), process(), [], ""),
        (
            plan("memlock", RAISED),
            process(unit="vm1.service", domain=None),
            [],
            "limit of 1048576 bytes: restart vm1.service",
        ),
        (plan("memlock", RAISED), process(unit="vm1.service", memlock_bytes=2**30), [], ""),
        (plan("memlock", RAISED), process(unit="vm1.service", memlock_bytes=None, memlock_unlimited=True), [], ""),
        (
            plan("memlock", {**RAISED, "grantee": "vm@.service"}),
            process(unit="vm@1.service", domain=None),
            [],
            "restart vm@1",
        ),
        (plan("memlock", {**RAISED, "grantee": "vm@.service"}), process(unit="vm.service", domain=None), [], ""),
        (plan("memlock", USERS), process(user="alice", unit=None, domain=None), [], "end it and start it again"),
        (plan("memlock", RAISED), process(unit="other.service"), [], ""),
        (plan("observe"), process(accounting="none"), [TAKEN], "keeps CAP_IPC_LOCK"),
        (plan("observe"), process(accounting="none", comm="pinner", domain=None), [TAKEN], ""),
        (plan("observe"), process(accounting="none", unit="vm1.service"), [DROPPED], "keeps CAP_IPC_LOCK"),
        (plan("observe"), process(accounting="none", unit="vm2.service", domain=None), [DROPPED], ""),
        (plan("observe"), process(accounting="none", user="root"), [TAKEN], ""),
        # By an earlier run.
        (plan("observe"), process(accounting="none"), [], "keeps CAP_IPC_LOCK"),
        (plan("observe"), process(accounting="none", emulator=None), [], ""),
        (plan("observe"), process(accounting="none", domain=None), [], ""),
        (plan("observe"), process(accounting="none", user="root"), [], ""),
        (plan("cap_ipc_lock", DROP_IN), process(accounting="none"), [], "keeps CAP_IPC_LOCK"),
        ({**plan("observe"), "bare_units": ["vm1.service"]}, BY_UNIT, [], "keeps CAP_IPC_LOCK"),
        ({**plan("memlock", LARGE), "bare_units": ["vm1.service"]}, BY_UNIT, [], "keeps CAP_IPC_LOCK"),
        ({**plan("cap_ipc_lock", DROP_IN), "bare_units": ["vm1.service"]}, BY_UNIT, [], ""),
        ({**plan("observe"), "bare_units": ["vm2.service"]}, BY_UNIT, [], ""),
    ],
)
def test_what_still_runs_as_before(made: Row, held: Row, put_back: list[Row], todo: str) -> None:
    found = host_result(made, info(held), applied(*put_back), check())
    assert len(found["pending"]) == bool(todo)
    if todo:
        (row,) = found["pending"]
        assert todo in row["todo"]
        assert (row["pid"], row["accounting"]) == (4242, held["accounting"])
        assert f"(pid 4242): {row['todo']}" in found["todo"][0]
    assert found["put_back"] == [each["text"] for each in put_back]


def test_what_has_the_capability_as_it_would_get_it() -> None:
    assert (
        host_result(plan("observe"), info(process(accounting="none"), capable=True), applied(), check())["pending"]
        == []
    )


@pytest.mark.parametrize(
    ("made", "unit", "dropped_in"),
    [
        (plan("cap_ipc_lock", FILE), "vm1.service", None),
        (plan("cap_ipc_lock", FILE, DROP_IN), "vm1.service", "vm1.service"),
        (plan("cap_ipc_lock", TEMPLATE), "vm@1.service", "vm@1.service"),
        (plan("cap_ipc_lock", TEMPLATE), r"vm@a\x2db:c_d@e.service", r"vm@a\x2db:c_d@e.service"),
        # Only what the plan names is restarted, and nothing that systemctl would take for a pattern.
        (plan("cap_ipc_lock", FILE, DROP_IN), "sshd.service", None),
        (plan("cap_ipc_lock", FILE, DROP_IN), "vm*.service", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), "vm@.service", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), "vm@*.service", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), "vm@[a-z].service", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), "vm@1.service sshd.service", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), "vm@1.service\nsshd.service", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), "vm@1.scope", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), "vm@1", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), "vmx@1.service", None),
        (plan("cap_ipc_lock", FILE, TEMPLATE), None, None),
    ],
)
def test_what_a_restart_of_its_unit_would_cure(made: Row, unit: str | None, dropped_in: str | None) -> None:
    found = host_result(made, info(process(unit=unit)), applied(), check())
    (row,) = found["pending"]
    assert row["dropped_in"] == dropped_in
    assert found["restart"]["units"] == ([dropped_in] if dropped_in else [])


@pytest.mark.parametrize(
    ("known", "units"),
    [
        (applied(), []),
        (applied(made=(written(drop_in_of("vm1.service")),)), ["vm1.service"]),
        # What it holds is what it held, so that a unit which runs has it.
        (applied(made=(written(drop_in_of("vm1.service"), content=False),)), []),
        (applied(DROPPED), ["vm1.service"]),
        (applied(DROPPED, made=(written(drop_in_of("vm1.service")),)), ["vm1.service"]),
        (
            applied(removed(drop_in_of("b.service")), made=(written(drop_in_of("a.service")),)),
            ["a.service", "b.service"],
        ),
        # A pattern of systemctl's for all instances.
        (applied(removed(drop_in_of("vm@.service"))), ["vm@*.service"]),
        (applied(removed(drop_in_of("vm@1.service"))), ["vm@1.service"]),
        # Neither other files nor other things with such a path.
        (applied(removed("/etc/systemd/system/vm1.service.d/override.conf")), []),
        (applied(removed("/etc/systemd/system/iommufd-host-grant.service")), []),
        (applied({**DROPPED, "kind": "node"}), []),
        (applied(removed(drop_in_of("*.service"))), []),
        (applied(TAKEN, made=({"kind": "unit", "path": "vm1.service", "text": "vm1.service is enabled."},)), []),
    ],
)
def test_units_to_restart(known: Row, units: list[str]) -> None:
    for restarts in (False, True):
        found = host_result(plan("observe"), info(), known, check(), restarts)
        assert found["restart"] == {"daemons": [], "units": units}


def test_a_unit_that_still_runs_as_before_is_restarted_once() -> None:
    held = [process(unit="vm@1.service"), process(unit="vm1.service"), process(unit="vm1.service", domain=None)]
    known = applied(made=(written(drop_in_of("vm1.service")),))
    found = host_result(plan("cap_ipc_lock", FILE, DROP_IN, TEMPLATE), info(*held), known, check())
    assert found["restart"]["units"] == ["vm1.service", "vm@1.service"]


def test_what_goes_with_the_launcher() -> None:
    gone = removed("/usr/local/bin/iommufd-exec")
    (todo,) = host_result(plan("observe"), info(), applied(gone), check())["todo"]
    assert "does not start any more" in todo
    # What cannot start is told of by later runs, too.
    known = {**applied(), "stranded": ["a.service", "vm@.service"]}
    (todo,) = host_result(plan("observe"), info(), known, check())["todo"]
    assert "so these do not start any more: a.service, vm@.service. Set iommufd_host_launcher to true" in todo
    assert host_result(plan("observe"), info(), {**known, "put_back": [gone]}, check())["todo"] == [todo]
    # Somebody else's file that was there before is there again.
    back = {**gone, "text": "/usr/local/bin/iommufd-exec is what it was.", "gone": False}
    assert host_result(plan("observe"), info(), applied(back), check())["todo"] == []


def test_what_goes_with_the_module_of_the_policy() -> None:
    gone = removed("/usr/local/share/iommufd_host.cil")
    (todo,) = host_result(plan("observe"), info(), applied(gone), check())["todo"]
    assert "refused to VMs that run, too: shut off each domain" in todo


def test_what_others_have_granted() -> None:
    made = plan("cap_ipc_lock", FILE)
    assert host_result(made, info(capable=True), applied(ours=True), check())["found"] == []
    (found,) = host_result(made, info(capable=True), applied(ours=False), check())["found"]
    assert (found["privilege"], found["grantee"]) == ("cap_ipc_lock", QEMU)
    assert host_result(made, info(capable=True), applied(ours=True), check())["grants"] == [FILE]
    assert host_result(made, info(capable=True), applied(ours=False), check())["grants"] == []
    left = host_result(plan("native"), info(capable=True), applied(), check())
    assert [each["grantee"] for each in left["found"]] == [QEMU]
    assert f"setcap -r {QEMU}" in left["todo"][0]
    # Nor is it needed where the kernel has no iommufd.
    left = host_result({**plan("observe"), "chosen": "native"}, info(capable=True), applied(), check())
    assert f"setcap -r {QEMU}" in left["todo"][0]
    # What this run has put back was there when the host was looked at.
    assert host_result(plan("native"), info(capable=True), applied(TAKEN), check())["found"] == []
    (found,) = host_result(plan("observe"), info(), applied(), check(replica(True)))["found"]
    assert found["grantee"] == "vm1.service"
    assert host_result(plan("cap_ipc_lock", DROP_IN), info(), applied(), check(replica(True)))["found"] == []


def test_daemons_to_restart() -> None:
    for known in (applied(made=(block("It is there."),)), applied(block("It is removed.", gone=False))):
        found = host_result(plan("observe"), info(), known, check())
        assert found["restart"] == {"daemons": ["libvirtd.service"], "units": []}
        assert found["todo"] == [
            "Restart libvirtd.service, which reads qemu.conf only when it starts; VMs go on running meanwhile."
        ]
        # The role does it by itself.
        found = host_result(plan("observe"), info(), known, check(), restarts=True)
        assert (found["restart"]["daemons"], found["todo"]) == (["libvirtd.service"], [])
        # One that does not run reads it when it starts.
        found = host_result(plan("observe"), info(libvirt=None), known, check())
        assert (found["restart"]["daemons"], found["todo"]) == ([], [])
    assert host_result(plan("observe"), info(), applied(DROPPED, TAKEN), check())["restart"]["daemons"] == []


def test_a_daemon_that_an_earlier_run_has_left_to_be_restarted() -> None:
    """Until it was."""
    looked = info()
    looked["host"]["libvirt"]["outdated"] = True
    found = host_result(plan("observe"), looked, applied(), check())
    assert found["restart"]["daemons"] == ["libvirtd.service"]
    assert found["todo"][0].startswith("Restart libvirtd.service, which reads qemu.conf only when it starts")
    found = host_result(plan("observe"), looked, applied(), check(), restarts=True)
    assert (found["restart"]["daemons"], found["todo"]) == (["libvirtd.service"], [])
    found = host_result(plan("observe"), info(), applied(), check())
    assert (found["restart"]["daemons"], found["todo"]) == ([], [])


def test_a_daemon_that_sets_the_mode_and_may_not() -> None:
    """Where that is no failure, it is left to do."""
    looked = info()
    looked["host"]["libvirt"] |= {"starts_iommufd_domains": False, "cap_sys_resource": False}
    (todo,) = host_result(plan("observe"), looked, applied(), check())["todo"]
    assert todo.startswith("It may not. Give libvirtd.service CAP_SYS_RESOURCE: put the lines '[Service]', 'A=b' into")
    assert host_result({**plan("observe"), "state": "absent"}, looked, applied(), check())["todo"] == []
    # Whatever else it is restarted for.
    known = applied(made=(block("It is there."),))
    assert host_result(plan("observe"), looked, known, check(), restarts=True)["todo"] == [todo]


LIBVIRTS_DROP_IN = "/etc/systemd/system/libvirtd.service.d/zz-iommufd_host.conf"
STILL = "libvirtd.service still runs with CAP_SYS_RESOURCE, which '/a/10.conf:2: A=b' takes from it at its next start."


def test_a_daemon_that_gets_its_capability_back() -> None:
    made = {**plan("native"), "mends_daemon": True}
    looked = info()
    looked["host"]["libvirt"] |= {"starts_iommufd_domains": False, "cap_sys_resource": False}
    # Also where an earlier run has written its drop-in.
    for known in (applied(), applied(made=(written(LIBVIRTS_DROP_IN),))):
        found = host_result(made, looked, known, check())
        (todo,) = found["todo"]
        assert todo.startswith("Restart libvirtd.service, which starts no domain with iommufd before")
        assert found["restart"] == {"daemons": ["libvirtd.service"], "units": []}
        assert host_result(made, looked, known, check(), restarts=True)["todo"] == []
        # One that does not run has it when it starts.
        looked["host"]["libvirt"]["pid"] = None
        found = host_result(made, looked, known, check())
        assert (found["restart"]["daemons"], found["todo"]) == ([], [])
        looked["host"]["libvirt"]["pid"] = 7


def test_a_daemon_whose_capability_is_taken_back() -> None:
    known = applied(removed(LIBVIRTS_DROP_IN))
    looked = info()
    assert host_result(plan("native"), looked, known, check())["restart"]["daemons"] == ["libvirtd.service"]
    # Looked at after that, and in later runs.
    looked["host"]["libvirt"]["needs_restart"] = True
    for each in (known, applied()):
        found = host_result(plan("native"), looked, each, check())
        (todo,) = found["todo"]
        assert todo.startswith(f"{STILL} From then on it starts no domain with iommufd, unless")
        found = host_result({**plan("observe"), "state": "absent"}, looked, each, check())
        assert found["todo"] == [f"{STILL} Restart it; VMs go on running meanwhile."]
    # It has nothing that could be taken by a restart.
    nothing: list[Row] = [{"taken_by": []}, {"cap_sys_resource": False}, {"pid": None}]
    for fields in nothing:
        looked = info()
        looked["host"]["libvirt"] |= fields
        assert host_result(plan("native"), looked, known, check())["restart"]["daemons"] == []


def test_the_documented_fields() -> None:
    documented = documented_fields("_host_result")
    found = host_result(plan("cap_ipc_lock", FILE), info(process()), applied(), check(started(True)))
    assert found.keys() == documented.keys()
    assert [each.keys() for each in found["pending"]] == [documented["pending"]["contains"].keys()]
    assert found["restart"].keys() == documented["restart"]["contains"].keys()
    for part in ("grants", "verified"):
        assert {f"C({name})" in documented[part]["description"] for row in found[part] for name in row} == {True}


def test_what_a_host_answers_moves_no_cursor() -> None:
    row = {**TAKEN, "text": "It is\x1b[2J\ntaken."}
    found = host_result(plan("observe"), info(), applied(row), check())
    assert found["put_back"] == [r"It is\x1b[2J\ntaken."]


@pytest.mark.parametrize("arguments", [(None, {}, {}, {}), ({}, {}, [], {}), ({}, {}, {}, None), ({}, {}, {}, {})])
def test_other_input(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(IommufdError, match=r"^(It takes|There is no) "):
        host_result(*arguments)


def test_nothing_is_verified_where_the_host_is_put_back() -> None:
    """Not even that nothing was tried."""
    found = host_result({**plan("observe"), "state": "absent"}, info(), applied(TAKEN), check(try_iommufd=None))
    assert (found["state"], found["verified"], found["failed"], found["unproven"]) == ("absent", [], [], [])
    assert found["put_back"] == [TAKEN["text"]]


def test_what_is_of_another_type_is_taken_or_refused() -> None:
    """In no other way, whatever it is."""
    inputs: list[Any] = [plan("cap_ipc_lock", FILE, RAISED), info(process()), applied(DROPPED), check(started(True))]
    assert count_refused(host_result, inputs) > 50
