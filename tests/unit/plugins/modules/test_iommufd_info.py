# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import mmap
import os
import pwd
import subprocess
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
import yaml
from ansible_collections.virt.iommufd.plugins.module_utils import (
    _accounts,
    _defined_units,
    _definitions,
    _host_facts,
    _iommufd,
    _libvirt,
)
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._libvirt_files import NOTHING_READ, Abilities, VmUser
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit
from ansible_collections.virt.iommufd.plugins.module_utils._running import DomainRecord
from ansible_collections.virt.iommufd.plugins.module_utils._sharing import Sharing
from ansible_collections.virt.iommufd.plugins.module_utils._survey import HeldIommufd, survey
from ansible_collections.virt.iommufd.plugins.modules import iommufd_info
from ansible_collections.virt.iommufd.tests.kernel.run_module import run as run_module
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel
from ansible_collections.virt.iommufd.tests.unit.returned import check_returned

Run = Callable[..., "dict[str, Any]"]


@pytest.fixture
def run() -> Run:
    """Runs the module."""
    return partial(run_module, iommufd_info)


DOMAIN = "<domain type='kvm'><name>{0}</name><memory>1048576</memory><devices>{1}</devices></domain>"
HOSTDEV = "<hostdev mode='subsystem' type='pci'/>"


def test_every_field_is_documented_and_there(
    run: Run, alone: FakeKernel, child: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone.ioases = {2: 1}
    folder = tmp_path / "definitions"
    folder.mkdir()
    (folder / "vm1.xml").write_text(DOMAIN.format("vm1", HOSTDEV))
    monkeypatch.setattr(_definitions, "_FOLDER", str(folder))
    subsets = ["host", "processes", "users", "defined"]
    answer = run(gather_subset=subsets, emulators=[str(tmp_path / "qemu")])
    documented = yaml.safe_load(iommufd_info.RETURN)
    for name, value in documented.items():
        check_returned(value, answer[name], name, null_is_told=False)
    assert [each["pid"] for each in answer["processes"]] == [child.pid]
    assert [each["uid"] for each in answer["users"]] in ([os.getuid()], [])
    assert [each["name"] for each in answer["defined"] if each["kind"] == "domain"] == ["vm1"]
    assert set(run()) == set(answer) - {"defined"}
    assert not answer["changed"]
    assert answer["host"]["machine"] == os.uname().machine
    assert answer["host"]["page_bytes"] == mmap.PAGESIZE


def row(kind: str, name: str, uid: int | None) -> dict[str, Any]:
    return {"kind": kind, "name": name, "uid": uid}


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gives the rows of a host, and keeps what was asked for."""
    asked: list[Any] = []
    domains = [row("domain", "usual", None), row("domain", "of-root", 0), row("domain", "of-7", 7)]
    units = [row("unit", "root.service", 0), row("unit", "unknown.service", None)]

    def find_domains(users: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
        asked.append([each.uid for each in users])
        return domains, ["No definitions."]

    def find_units(_run: object, running: object) -> tuple[list[dict[str, Any]], list[str]]:
        asked.append(running)
        return units, ["No units."]

    monkeypatch.setattr(_definitions, "find_domains", find_domains)
    monkeypatch.setattr(_defined_units, "find_defined_units", find_units)
    monkeypatch.setattr(
        _defined_units, "note_limits_at_boot", lambda _run, rows: [each.update(unread_at_boot=["?"]) for each in rows]
    )
    return asked


def test_vms_that_are_defined(run: Run, alone: FakeKernel, definitions: list[Any]) -> None:
    answer = run(gather_subset=["defined"])
    assert [each["unread_at_boot"] for each in answer["defined"]] == [["?"]] * 5
    assert set(answer["host"]) == {"limits_of_view"}
    assert "processes" not in answer
    # Nobody's own libvirt is looked at unless that is asked for.
    assert definitions == [[], {}]
    assert [each["why"] for each in answer["host"]["limits_of_view"] if each["what"] == "defined"] == [
        "No definitions.",
        "No units.",
    ]


@pytest.mark.parametrize(
    ("usual", "then", "names"),
    [
        (0, 0, ["usual", "of-root", "root.service", "unknown.service"]),
        (7, 7, ["of-root", "root.service", "unknown.service"]),
        # It is this one's after a reboot.
        (7, 0, ["usual", "of-root", "root.service", "unknown.service"]),
        # Whose it is cannot be told, so it may be this one's.
        (None, 7, ["usual", "of-root", "root.service", "unknown.service"]),
        (7, None, ["usual", "of-root", "root.service", "unknown.service"]),
    ],
)
def test_vms_of_some_users(
    run: Run,
    alone: FakeKernel,
    definitions: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    usual: int | None,
    then: int | None,
    names: list[str],
) -> None:
    files = NOTHING_READ._replace(user=VmUser(None, usual), next_user=VmUser(None, then))
    libvirt = _libvirt.Libvirt(None, None, None, None, None, files=files)
    monkeypatch.setattr(_libvirt, "look_at_libvirt", lambda _run: libvirt)
    answer = run(gather_subset=["defined"], users=["root", "nobody", "4294967294"])
    assert [each["name"] for each in answer["defined"]] == names
    assert definitions[0] == [pwd.getpwnam("nobody").pw_uid]
    assert any("uid 4294967294 has no home here" in each["why"] for each in answer["host"]["limits_of_view"])


@pytest.mark.parametrize(
    ("unit", "program", "holder", "found"),
    [
        ("vm1.service", "/usr/bin/qemu-system-x86_64", False, True),
        ("vm1.service", "/usr/libexec/qemu-kvm", None, True),
        ("vm1.service", "/usr/bin/cloud-hypervisor", False, True),
        ("vm1.service", "/usr/bin/dpdk-app", False, False),
        ("vm1.service", None, False, False),
        # A launcher that holds copies of what its VMs have.
        ("vm1.service", "/usr/bin/qemu-launcher", True, False),
        ("machine-qemu.scope", "/usr/bin/qemu-system-x86_64", False, False),
        ("virtqemud.service", "/usr/bin/qemu-system-x86_64", False, False),
        ("user@1000.service", "/usr/bin/qemu-system-x86_64", False, False),
        (None, "/usr/bin/qemu-system-x86_64", False, False),
    ],
)
def test_units_with_vms(unit: str | None, program: str | None, holder: bool | None, found: bool) -> None:
    held = SimpleNamespace(pid=7, units=(unit, None), program=program)
    accounts: Any = SimpleNamespace(seen=SimpleNamespace(holders=[held]), of={7: SimpleNamespace(holder=holder)})
    assert iommufd_info.vmm_units(accounts) == ({unit: [7]} if found else {})


def test_emulators_that_run(
    run: Run, alone: FakeKernel, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the processes that are reported."""
    asked: list[list[int]] = []

    def find(executed: dict[int, str]) -> _host_facts.Running:
        asked.append(list(executed))
        return _host_facts.Running({"/opt/vm/qemu": (1,)}, bool(executed))

    monkeypatch.setattr(_host_facts, "find_running", find)
    limits = run()["host"]["limits_of_view"]
    run(gather_subset=["host"])
    assert asked == [[child.pid], []]
    assert "Of what processes execute, only 1 programs were looked at." in [each["why"] for each in limits]


def test_narrowed_to_users(run: Run, alone: FakeKernel, child: subprocess.Popen[bytes]) -> None:
    answer = run(gather_subset=["processes", "users"], users=["root", "4294967294"])
    users = [{"uid": 0, "user": "root"}, {"uid": 4294967294, "user": "4294967294"}]
    assert answer["narrowed"] == {"pids": None, "uids": [0, 4294967294], "users": users}
    assert [each["uid"] for each in answer["users"]] == [0, 4294967294]
    assert answer["users"][1]["memlock_unlimited"] is False
    assert len(answer["processes"]) == (os.getuid() == 0)
    assert set(answer["host"]) == {"limits_of_view"}


def test_narrowed_to_processes(run: Run, alone: FakeKernel, child: subprocess.Popen[bytes]) -> None:
    assert run(gather_subset=["processes"], pids=[os.getpid()])["processes"] == []
    answer = run(gather_subset=["processes"], pids=[child.pid])
    assert [each["pid"] for each in answer["processes"]] == [child.pid]
    assert "users" not in answer


def test_no_such_user(run: Run) -> None:
    answer = run(users=["nobody-of-this-name"])
    assert answer["failed"]
    assert answer["msg"].startswith("This host has no user 'nobody-of-this-name'")


def test_what_takes_seconds_is_asked_on_demand(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = tmp_path / "qemu"
    emulator.write_text("#!/bin/sh\necho QEMU emulator version 11.1.3 of '(Debian)'\n")
    emulator.chmod(0o755)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nprintf 'no \\033[1m' >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(_host_facts, "_EMULATORS", ())
    paths = [str(emulator), str(broken)]
    assert [each["version"] for each in run(gather_subset=["host"], emulators=paths)["host"]["qemu"]] == [None, None]
    host = run(gather_subset=["emulators"], emulators=paths)["host"]
    assert [each["version"] for each in host["qemu"]] == ["11.1.3", None]
    (why,) = [each["why"] for each in host["limits_of_view"] if each["what"] == "emulators"]
    assert why == f"{broken} --version gives no version: exit code 3, no \\x1b[1m"


def test_an_emulator_of_somebody_else_is_not_executed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = tmp_path / "theirs" / "qemu"
    emulator.parent.mkdir()
    emulator.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\necho version 1.0\n")
    emulator.chmod(0o755)
    emulator.parent.chmod(0o777)
    monkeypatch.setattr(_host_facts, "_EMULATORS", ())
    host = run(gather_subset=["emulators"], emulators=[str(emulator)])["host"]
    (row,) = host["qemu"]
    assert (row["path"], row["present"], row["version"], row["cap_ipc_lock"]) == (str(emulator), True, None, None)
    assert row["writer"] == {"place": str(emulator.parent), "who": "everybody"}
    first, second = (each["why"] for each in host["limits_of_view"] if each["what"] == "emulators")
    assert first.startswith(f"{emulator} cannot be trusted: {emulator.parent} can be written by everybody.")
    assert second.startswith(f"{emulator} was not asked for its version: {emulator} cannot be trusted")
    assert not (tmp_path / "executed").exists()


def test_how_long_a_command_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iommufd_info, "run_command", lambda _words, given: (0, str(given), ""))
    assert iommufd_info.run_patiently(["/opt/q", "--version"]) == (0, "30", "")


@pytest.mark.parametrize(("code", "offers"), [(0, False), (1, None)])
def test_the_domain_capabilities(monkeypatch: pytest.MonkeyPatch, code: int, offers: bool | None) -> None:
    unit = "Id=virtqemud.service\nLoadState=loaded\nCapabilityBoundingSet=cap_sys_resource\n"
    unit += "ExecStart={ path=/nowhere/sbin/virtqemud ; }\n"

    def answer(command: list[str], _seconds: float = 90) -> tuple[int, str, str]:
        return (code, "<domainCapabilities/>", "no") if "virsh" in command else (0, unit, "")

    view = iommufd_info.Unseen()
    monkeypatch.setattr(iommufd_info, "run_command", answer)
    row = iommufd_info.libvirt_row(view, _libvirt.look_at_libvirt(answer), True)
    assert row["domain_capabilities_iommufd"] is offers
    assert bool(view.limits) is (offers is None)
    assert row["cap_sys_resource"] is True


@pytest.mark.parametrize("known", [True, False])
def test_limits_that_libvirt_may_raise_to(known: bool) -> None:
    memlock = Limit(8388608, None) if known else None
    found = _libvirt.Libvirt(None, None, "virtqemud.service", None, True, memlock=memlock)
    sessions = (_libvirt.Session(7, "vm", memlock), _libvirt.Session(8, None, memlock, 9))
    row = iommufd_info.libvirt_row(iommufd_info.Unseen(), found._replace(sessions=sessions), False)
    assert (row["memlock_bytes"], row["memlock_unlimited"]) == ((8388608, False) if known else (None, None))
    hard = {"memlock_hard_bytes": None, "memlock_hard_unlimited": True if known else None}
    alone, beside = ({"uid": 7, "user": "vm", "pid": None, **hard}, {"uid": 8, "user": None, "pid": 9, **hard})
    assert row["sessions"] == [alone, beside]


def test_what_libvirt_is_once_its_daemon_has_started_anew() -> None:
    def row(found: _libvirt.Libvirt) -> Any:
        return iommufd_info.libvirt_row(iommufd_info.Unseen(), found, False)

    now = _libvirt.Libvirt((12, 0, 0), (12, 8, 0), "virtqemud.service", 7, True, files=NOTHING_READ)
    assert row(now)["at_boot"] is None
    files = NOTHING_READ._replace(abilities=Abilities(True, True), user=VmUser("vm", 1001))
    then = row(now._replace(at_boot=now._replace(version=(12, 8, 0), pid=None, may=False, files=files)))["at_boot"]
    assert tuple(then) == iommufd_info.AT_BOOT
    assert (then["user"], then["uid"], then["cap_sys_resource"], then["memlock_bytes"]) == ("vm", 1001, False, None)
    assert (then["supports_iommufd"], then["sets_rlimit_mode"]) == (True, False)
    assert "virtqemud.service, when it starts, would run without CAP_SYS_RESOURCE" in then["reason"]


def test_what_is_not_seen(run: Run, alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str) -> DomainRecord:
        raise IommufdError("/run/libvirt/qemu is closed.") from PermissionError()

    for module in (_accounts, iommufd_info):
        monkeypatch.setattr(module, "in_initial_namespace", lambda _kind: False)
    monkeypatch.setattr(iommufd_info, "read_domain_record", refuse)
    monkeypatch.setattr(_host_facts, "read_hidepid", lambda: "hidepid=2")
    monkeypatch.setattr(_accounts, "capability_names", lambda _mask: [])
    seen = survey()
    seen.holders = [each._replace(name="vm1") for each in seen.holders]
    seen.closed = {"EACCES: Permission denied.": [1, 2, 3, 4, 5, 6]}
    monkeypatch.setattr(_accounts, "survey", lambda _nodes: seen)
    limits = run(gather_subset=["processes"])["host"]["limits_of_view"]
    assert [each["what"] for each in limits] == ["processes", "processes", "descriptors", "domains"]
    assert "the descriptors of 6 processes (1, 2, 3, 4, 5, ...): EACCES: Permission denied." in limits[2]["why"]


def test_devices_are_not_seen_without_sysfs(run: Run, alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_accounts, iommufd_info):
        monkeypatch.setattr(module, "in_initial_namespace", lambda _kind: True)
    monkeypatch.setattr(_host_facts, "read_hidepid", lambda: "")
    before = run(gather_subset=["processes"])["host"]["limits_of_view"]
    monkeypatch.setattr(_host_facts, "_SYS", "/nowhere")
    after = run(gather_subset=["processes"])["host"]["limits_of_view"]
    assert [each["what"] for each in after if each not in before] == ["descriptors"]


@pytest.mark.parametrize(
    ("unseen", "hidden", "at_risk"),
    [
        (set(), {}, False),
        ({os.getuid()}, {}, None),
        ({os.getuid() + 1}, {}, False),
        # It may be anybody's.
        (set(), {"EACCES: Permission denied.": [1]}, None),
    ],
)
def test_nobody_is_called_safe_who_was_not_seen_whole(
    run: Run,
    alone: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    unseen: set[int],
    hidden: dict[str, list[int]],
    at_risk: bool | None,
) -> None:
    for module in (_accounts, iommufd_info):
        monkeypatch.setattr(module, "in_initial_namespace", lambda _kind: True)
    monkeypatch.setattr(_host_facts, "read_hidepid", lambda: "")
    seen = survey()
    (holder,) = seen.holders
    bare = holder.status._replace(effective=0)
    seen.holders = [holder._replace(memlock=Limit(2**40, 2**40), status=bare)]
    (seen.unseen, seen.hidden) = (unseen, hidden)
    monkeypatch.setattr(_accounts, "survey", lambda _nodes: seen)
    rows = {each["uid"]: each["at_risk"] for each in run(gather_subset=["users"])["users"]}
    assert rows == {os.getuid(): at_risk, **dict.fromkeys(unseen)}


@pytest.mark.parametrize("blind", [False, True])
def test_what_a_vm_that_has_ended_may_have_left_behind(
    run: Run, alone: FakeKernel, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    monkeypatch.setattr(iommufd_info, "in_initial_namespace", lambda _kind: True)
    monkeypatch.setattr(_host_facts, "read_hidepid", lambda: "")
    seen = survey()
    (holder,) = seen.holders
    kept = [] if blind else [HeldIommufd(9, "user", False, [(2, True)])]
    seen.holders = [holder._replace(iommufds=kept, devices={}, status=holder.status._replace(effective=0))]
    seen.blind = blind
    monkeypatch.setattr(_accounts, "survey", lambda _nodes: seen)
    answer = run(gather_subset=["processes", "users"], users=["root", "4711"])
    (limit,) = answer["host"]["limits_of_view"]
    assert limit["what"] == "charges"
    said = "cannot tell which processes keep" if blind else f" ({holder.pid}) holds. If a VM that has ended had that, "
    assert said in limit["why"]
    # Whoever it is
    assert [each["at_risk"] for each in answer["users"]] == [None, None]


@pytest.mark.parametrize(
    ("counts", "queues", "missing"),
    [
        ([2, 2], 0, 1),
        ([4, 3], 0, 2),
        ([3, 4], 1, 1),
        ([1, 1], 0, 0),
        # Of somebody who has come or gone meanwhile
        ([1, 2], 0, 0),
        ([2, 1], 0, 0),
        ([3, 3, 2, 3, 1], 0, 0),
        ([3, 3, 3, 2, 3], 0, 1),
        ([3, 3], 2, 0),
        ([2, 2], 2, 0),
        # Built in
        ([0, 0, 0], 0, 0),
    ],
)
def test_what_is_open_that_no_process_shows(
    run: Run,
    alone: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    counts: list[int],
    queues: int,
    missing: int,
) -> None:
    for module in (_accounts, iommufd_info):
        monkeypatch.setattr(module, "in_initial_namespace", lambda _kind: True)
    monkeypatch.setattr(_host_facts, "read_hidepid", lambda: "")
    monkeypatch.setattr(_host_facts, "count_iommufds", chain(counts, repeat(counts[-1])).__next__)
    monkeypatch.setattr(_accounts, "_PAUSE", 0)
    monkeypatch.setattr(_accounts, "count_queues", lambda _holders: queues)
    seen = survey()
    (holder,) = seen.holders
    seen.holders = [holder._replace(memlock=Limit(2**40, 2**40), status=holder.status._replace(effective=0))]
    monkeypatch.setattr(_accounts, "survey", lambda _nodes: seen)
    answer = run(gather_subset=["users"], users=[str(os.getuid()), "4711"])
    limits = [each for each in answer["host"]["limits_of_view"] if each["what"] == "charges"]
    words = ["1 iommufd is open", "2 iommufds are open"][missing - 1 :][:1] if missing else []
    assert [each["why"].partition(" that no process was seen")[0] for each in limits] == words
    assert [each["at_risk"] for each in answer["users"]] == [None if missing else False] * 2


@pytest.mark.parametrize(
    ("name", "session", "record", "domain"),
    [
        ("vm1", False, {}, ("vm1", "qemu:///system")),
        # What the process shows is its own to change, and what files are called that of the emulators' user.
        ("vm1", False, {"name": "vm2"}, (None, None)),
        ("vm1", False, {"pid": 1}, (None, None)),
        ("vm1", False, {"uid": 4711}, (None, None)),
        ("vm1", False, {"written": 0.0}, (None, None)),
        ("vm1", True, None, ("vm1", "qemu:///session")),
        ("vm1", False, None, (None, None)),
        ("a/b", False, {}, (None, None)),
        (None, True, {}, (None, None)),
        ("\udcff\x1b", True, {}, ("\\xff\\x1b", "qemu:///session")),
    ],
)
def test_whose_domain(
    alone: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    session: bool,
    record: dict[str, Any] | None,
    domain: tuple[str | None, str | None],
) -> None:
    (holder,) = survey().holders
    there = DomainRecord(holder.pid, 1, "vm1", None, holder.started + 1)._replace(**record or {})

    def read(asked: str) -> DomainRecord:
        if record is None or "/" in asked:
            raise IommufdError("There is none.")
        return there

    monkeypatch.setattr(iommufd_info, "read_domain_record", read)
    names = iommufd_info.Names(iommufd_info.Unseen(), {}, {})
    assert names.domain(holder._replace(name=name, session=session)) == domain


CONTAINER = _iommufd.VFIO_CONTAINER_RDEV
IOMMUFDS = [HeldIommufd(9, "user", None, [])]


@pytest.mark.parametrize(
    ("iommufds", "devices", "backends", "of_vfio"),
    [
        (IOMMUFDS, {}, ["iommufd"], []),
        (IOMMUFDS, {4: 1}, ["iommufd"], ["iommufd"]),
        ([], {4: 1}, ["iommufd"], ["iommufd"]),
        # A group is had by whichever there is.
        (IOMMUFDS, {4: 2}, ["iommufd"], ["iommufd"]),
        ([], {3: CONTAINER, 4: 2}, ["legacy"], ["legacy"]),
        (IOMMUFDS, {3: CONTAINER, 4: 1, 5: 2}, ["iommufd", "legacy"], ["iommufd", "legacy"]),
        ([], {4: 2}, [], [None]),
        ([], {4: 3}, ["vdpa"], []),
        (IOMMUFDS, {3: CONTAINER, 4: 3}, ["iommufd", "legacy", "vdpa"], []),
        (None, {}, None, None),
    ],
)
def test_by_what_it_has_devices(
    alone: FakeKernel,
    iommufds: list[HeldIommufd] | None,
    devices: dict[int, int],
    backends: list[str] | None,
    of_vfio: list[str | None] | None,
) -> None:
    holder = survey().holders[0]._replace(iommufds=iommufds, devices=devices)
    nodes = {
        1: _host_facts.VfioNode("/dev/vfio/devices/vfio0", ["a"], 5, False, False),
        2: _host_facts.VfioNode("/dev/vfio/5", ["a", "b"], 5, True, None),
    }
    names = iommufd_info.Names(iommufd_info.Unseen(), nodes, {3: "/dev/vhost-vdpa-0"})
    assert names.backends(holder) == backends
    rows, of_vdpa = names.vfio_devices(holder), names.vdpa_devices(holder)
    assert (None if rows is None else [each["backend"] for each in rows]) == of_vfio
    runs = [{1: False, 2: None}[rdev] for rdev in devices.values() if rdev in nodes]
    assert [each["as_it_runs"] for each in rows or ()] == runs
    expected = [{"fd": 4, "node": "/dev/vhost-vdpa-0"}] if devices.get(4) == 3 else []
    assert of_vdpa == (None if iommufds is None else expected)


ONE = HeldIommufd(9, "user", False, [(2, True)])
TWO = HeldIommufd(10, "user", False, [(2, True), (3, True)])


@pytest.mark.parametrize(
    ("fields", "spaces"),
    [
        ({"iommufds": [ONE]}, 1),
        ({"iommufds": [ONE, TWO]}, 3),
        # 11 is the same as 10.
        ({"iommufds": [ONE, TWO, TWO._replace(fd=11)]}, 3),
        ({"iommufds": [HeldIommufd(9, "user", True, [])]}, 0),
        ({"iommufds": [], "devices": {10: CONTAINER, 11: CONTAINER}}, 1),
        ({"iommufds": [ONE], "devices": {3: CONTAINER, 4: 2, 5: 3, 6: 3, 7: 1}}, 3),
        ({"iommufds": [ONE._replace(rlimit_mode=None)]}, None),
        ({"iommufds": [ONE._replace(msg="This kernel does not have it.")]}, None),
        ({"iommufds": [ONE], "more": True}, None),
        ({"iommufds": [ONE._replace(truncated=True)]}, None),
        ({"iommufds": None}, None),
        # 1 could not be compared.
        ({"iommufds": [ONE], "pid": 1}, 1),
        ({"iommufds": [ONE, TWO], "pid": 1}, None),
    ],
)
def test_how_many_address_spaces(alone: FakeKernel, fields: dict[str, Any], spaces: int | None) -> None:
    holder = survey().holders[0]._replace(**{"devices": {}, **fields})
    names = iommufd_info.Names(iommufd_info.Unseen(), {}, {3: "/dev/vhost-vdpa-0"})
    assert names.address_spaces(holder, Sharing([[(holder.pid, 11), (holder.pid, 10)]], [1])) == spaces


@pytest.mark.parametrize(
    ("as_it_runs", "limit", "at_risk", "notes"),
    [(False, 2**40, False, 0), (True, 2**40, None, 1), (None, 2**40, None, 1), (True, None, False, 0)],
)
def test_a_device_that_pins_as_it_runs(
    run: Run,
    alone: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    as_it_runs: bool | None,
    limit: int | None,
    at_risk: bool | None,
    notes: int,
) -> None:
    """Whether it fits now says nothing of later."""
    zero = os.stat("/dev/zero").st_rdev
    node = _host_facts.VfioNode("/dev/vfio/devices/vfio0", ["a"], None, False, as_it_runs)
    monkeypatch.setattr(_host_facts, "find_vfio_nodes", lambda: {zero: node})
    for module in (_accounts, iommufd_info):
        monkeypatch.setattr(module, "in_initial_namespace", lambda _kind: True)
    monkeypatch.setattr(_host_facts, "read_hidepid", lambda: "")
    seen = survey({zero})
    (holder,) = seen.holders
    seen.holders = [holder._replace(memlock=Limit(limit, limit), status=holder.status._replace(effective=0))]
    monkeypatch.setattr(_accounts, "survey", lambda _nodes: seen)
    answer = run(gather_subset=["processes", "users"])
    (row,) = answer["processes"]
    assert [each["as_it_runs"] for each in row["vfio_devices"]] == [as_it_runs]
    assert (row["accounting"], row["headroom_bytes"]) == ("user", limit)
    assert ["pins memory as it runs" in note for note in row["notes"]] == [True] * notes
    assert [each["at_risk"] for each in answer["users"]] == [at_risk]


@pytest.mark.parametrize(
    ("memory", "pinned", "fields", "spaces"),
    [
        (2**30, 2**31 - 1, {}, 1),
        # Either memory was plugged in, or there is an IOAS that was not found.
        (2**30, 2**31, {}, None),
        (None, 2**31, {}, 1),
        (2**30, 2**31, {"iommufds": [TWO]}, 2),
        (2**30, 3 * 2**30, {"iommufds": [TWO]}, None),
        (2**30, 2**31, {"devices": {5: 3}}, 2),
        # All of these are seen by their descriptors.
        (2**30, 2**31, {"iommufds": [], "devices": {5: CONTAINER}}, 1),
    ],
)
def test_more_is_pinned_than_they_hold(
    alone: FakeKernel, memory: int | None, pinned: int, fields: dict[str, Any], spaces: int | None
) -> None:
    (holder,) = survey().holders
    status = holder.status._replace(pinned_bytes=pinned)
    holder = holder._replace(**{"status": status, "memory_bytes": memory, "devices": {}, "iommufds": [ONE], **fields})
    names = iommufd_info.Names(iommufd_info.Unseen(), {}, {3: "/dev/vhost-vdpa-0"})
    assert names.address_spaces(holder, Sharing()) == spaces


def test_times() -> None:
    assert iommufd_info.iso8601(0.5) == "1970-01-01T00:00:00Z"
