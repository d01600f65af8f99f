# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.modules import iommufd_host_apply
from ansible_collections.virt.iommufd.plugins.plugin_utils import _plan
from ansible_collections.virt.iommufd.plugins.plugin_utils._plan import host_plan
from ansible_collections.virt.iommufd.tests.unit.filter_docs import documented_fields
from ansible_collections.virt.iommufd.tests.unit.wrong import count_refused

APPLY = Path(__file__).resolve().parents[4] / "roles" / "iommufd_host" / "tasks" / "apply.yml"

Row = dict[str, Any]

QEMU = "/usr/bin/qemu-system-x86_64"


def libvirt(unit: str | None, version: str | None, sets: bool | None, reason: str, **fields: Any) -> Row:
    found = {"unit": unit, "version": version, "sets_rlimit_mode": sets, "reason": reason}
    found |= {"user": None, "uid": None}
    abilities: Row = {"supports_iommufd": sets, "starts_iommufd_domains": sets, "cap_sys_resource": True, "drop_in": []}
    unit_files = {"taken_by": [], "unit_outdated": False, "needs_restart": False}
    return {**found, **abilities, **unit_files, **fields}


OLD = libvirt("libvirtd.service", "11.3.0", False, "libvirt 11.3.0 does not.")
NEW = libvirt("virtqemud.service", "12.8.0", True, "libvirt 12.8.0 does.")
UNSURE = libvirt("virtqemud.service", "12.8.0", None, "It cannot be told.")
# Of one in a container, or whose unit starts a container, there is nothing here.
CONTAINER = libvirt(None, None, None, "It runs in a container.")
NO_LIBRARY = libvirt("virtqemud.service", None, None, "Its library is not here.")
NO_LIBVIRT = libvirt(None, None, False, "There is no system libvirt.", cap_sys_resource=None)
# It sets the mode and may not.
BARRED = libvirt(
    "virtqemud.service",
    "12.8.0",
    False,
    "libvirt 12.8.0 may not.",
    supports_iommufd=True,
    cap_sys_resource=False,
    drop_in=["CapabilityBoundingSet=~CAP_SYS_RESOURCE", "CapabilityBoundingSet=CAP_SYS_RESOURCE"],
    taken_by=[{"path": "/a/10.conf", "line": 2, "text": "CapabilityBoundingSet=~CAP_SYS_RESOURCE"}],
)
ROOT = {
    "uid": 0,
    "initial_user_namespace": True,
    "capabilities": ["cap_ipc_lock", "cap_sys_ptrace", "cap_sys_resource"],
}


def info(libvirt: Row, **host: Any) -> Row:
    """What iommufd_info returned on a host; of its fields, those that matter here."""
    fields = {
        "kernel": "6.12.107",
        "module": "loaded",
        "device": {"path": "/dev/iommu", "present": True},
        "caller": ROOT,
        "vfio_devices": [{"node": "/dev/vfio/devices/vfio20"}],
        "qemu": [
            {"path": QEMU, "present": True, "writer": None, "cap_ipc_lock": False},
            {"path": "/usr/bin/qemu-system-i386", "present": True, "writer": None, "cap_ipc_lock": False},
        ],
        "libvirt": libvirt,
    }
    found = {**fields, **host}
    found["qemu"] = [{"known_by": ["place"], **row} for row in found["qemu"]]
    return {"host": found, "processes": host.get("processes", [])}


def emulator(path: str = QEMU, **fields: Any) -> Row:
    found = {"real_path": path, "present": True, "writer": None, "is_emulator": True, "obstacles": []}
    return {"path": path, **found, **fields}


def unit(name: str, **fields: Any) -> Row:
    return {
        "name": name,
        "main": name,
        "ambient_ipc_lock": False,
        "file_ipc_lock": False,
        "present": True,
        "user": "vm",
        "outdated": False,
        "obstacles": [],
        **fields,
    }


def check(*rows: Row, selinux: Row | None = None) -> Row:
    """What iommufd_vmm_check returned."""
    kinds = {"emulators": "path", "units": "name", "users": "user"}
    found: Row = {kind: [row for row in rows if next(iter(row)) == key] for kind, key in kinds.items()}
    return {**found, "selinux": selinux}


def plan(libvirt: Row, *rows: Row, host: Row | None = None, selinux: Row | None = None, **config: Any) -> Row:
    """The plan for a host with that libvirt. Units that are asked for are there, unless they are in `rows`."""
    config = {"architecture": "x86_64", "user": "libvirt-qemu", **config}
    named = {row.get("path", row.get("name")) for row in rows}
    units = [_plan.unit_name(name) for name in config.get("units", [])]
    others = [emulator(path) for path in [QEMU, *config.get("emulators", [])] if path not in named]
    others += [unit(name) for name in units if name not in named]
    return host_plan(info(libvirt, **(host or {})), config, check(*rows, *others, selinux=selinux))


def paths(made: Row) -> list[str]:
    return [each["path"] for each in made["wanted"]["files"]]


def content(made: Row, path: str) -> list[str]:
    """The lines of a file of the plan, without the first, which says whose it is."""
    (found,) = [each["content"] for each in made["wanted"]["files"] if each["path"] == path]
    assert found.endswith("\n")
    (ours, *lines) = found.splitlines()
    assert ours.startswith("# Put here by the Ansible role virt.iommufd.iommufd_host")
    return list(lines)


@pytest.mark.parametrize(
    ("libvirt", "rows", "config", "user"),
    [
        (OLD, [], {}, "libvirt-qemu"),
        (UNSURE, [unit("vm1.service")], {"units": ["vm1"]}, "libvirt-qemu"),
        (OLD, [], {"user": "alice"}, "alice"),
        # What libvirt shows goes before what it has on hosts of this distribution.
        ({**OLD, "user": "vm", "uid": 7}, [], {}, "vm"),
        ({**OLD, "user": "vm", "uid": 7}, [], {"user": "alice"}, "alice"),
        # A user that the host does not have, one without a name, and what is no name.
        ({**OLD, "user": "vm"}, [], {}, "libvirt-qemu"),
        ({**OLD, "uid": 7}, [], {}, "libvirt-qemu"),
        ({**OLD, "user": 'x", RUN+="rm', "uid": 7}, [], {}, "libvirt-qemu"),
        # Without libvirt there is no user of that name.
        (NO_LIBVIRT, [], {}, "root"),
        (NO_LIBVIRT, [unit("vm1.service")], {"units": ["vm1"]}, "vm"),
        (NO_LIBVIRT, [unit("a.service", user=None), unit("b.service")], {"units": ["a", "b"]}, "vm"),
        (NO_LIBVIRT, [unit("vm1.service")], {"units": ["vm1"], "user": "alice"}, "alice"),
    ],
)
def test_the_user_of_vms(libvirt: Row, rows: list[Row], config: Row, user: str) -> None:
    config = {"user": "", "libvirt_user": "libvirt-qemu", **config}
    assert plan(libvirt, *rows, **config)["user"] == user


FILE = {"privilege": "cap_ipc_lock", "grantee": QEMU, "means": "file capability", "value": "ep"}
DROP_IN = {"privilege": "cap_ipc_lock", "grantee": "vm1.service", "means": "drop-in", "value": "ambient"}

MODULES_FILE = "/etc/modules-load.d/iommufd_host.conf"
UDEV_FILE = "/etc/udev/rules.d/80-iommufd_host.rules"
APPARMOR_FILE = "/etc/apparmor.d/abstractions/libvirt-qemu.d/iommufd_host"
DROP_IN_FILE = "/etc/systemd/system/vm1.service.d/50-iommufd_host.conf"
PROGRAM = "/usr/local/libexec/iommufd-host-grant"
GRANT_FILES = [PROGRAM, *(f"/etc/systemd/system/iommufd-host-grant.{kind}" for kind in ("service", "path", "timer"))]

# What a host is to have where something stands against the plan.
NOTHING: Row = {
    **{name: [] for name in ("modules", "files", "capabilities", "nodes", "blocks", "units")},
    "group": "",
    "mode": "",
    "reload": False,
}


@pytest.mark.parametrize(
    ("libvirt", "config", "strategy", "certain", "grants"),
    [
        (OLD, {}, "cap_ipc_lock", True, [FILE]),
        (OLD, {"fallback": "observe"}, "observe", True, []),
        (OLD, {"units": ["vm1"]}, "cap_ipc_lock", True, [FILE, DROP_IN]),
        (OLD, {"strategy": "observe"}, "observe", True, []),
        (OLD, {"strategy": "cap_ipc_lock"}, "cap_ipc_lock", True, [FILE]),
        (NEW, {}, "native", True, []),
        (NEW, {"fallback": "observe"}, "native", True, []),
        (NEW, {"strategy": "native"}, "native", True, []),
        (NEW, {"strategy": "cap_ipc_lock"}, "cap_ipc_lock", True, [FILE]),
        # Units that were named are no domains of libvirt, whose emulator gets nothing.
        (NEW, {"units": ["vm1.service"]}, "cap_ipc_lock", True, [DROP_IN]),
        (NEW, {"units": ["vm1"], "emulators": [QEMU]}, "cap_ipc_lock", True, [FILE, DROP_IN]),
        (UNSURE, {}, "cap_ipc_lock", False, [FILE]),
        (UNSURE, {"units": ["vm1"]}, "cap_ipc_lock", False, [FILE, DROP_IN]),
        (UNSURE, {"fallback": "observe"}, "observe", False, []),
        (UNSURE, {"strategy": "native"}, "native", False, []),
        # Nothing is granted to a guess.
        (CONTAINER, {}, "observe", False, []),
        (CONTAINER, {"fallback": "observe"}, "observe", False, []),
        (CONTAINER, {"units": ["vm1"]}, "cap_ipc_lock", False, [DROP_IN]),
        (CONTAINER, {"emulators": [QEMU]}, "cap_ipc_lock", False, [FILE]),
        (CONTAINER, {"strategy": "native"}, "native", False, []),
        (NO_LIBRARY, {}, "observe", False, []),
        (NO_LIBRARY, {"emulators": [QEMU]}, "cap_ipc_lock", False, [FILE]),
        (OLD, {"architecture": "vax"}, "observe", False, []),
        (OLD, {"architecture": "vax", "units": ["vm1"]}, "cap_ipc_lock", False, [DROP_IN]),
        (BARRED, {"architecture": "vax", "units": ["vm1"]}, "cap_ipc_lock", True, [DROP_IN]),
        (NO_LIBVIRT, {"units": ["vm1"]}, "cap_ipc_lock", True, [DROP_IN]),
        (NO_LIBVIRT, {"emulators": [QEMU]}, "cap_ipc_lock", True, [FILE]),
        (NO_LIBVIRT, {}, "observe", False, []),
        (NO_LIBVIRT, {"strategy": "cap_ipc_lock"}, "cap_ipc_lock", True, [FILE]),
        # libvirt's emulator gets nothing by itself, since that would not help.
        (BARRED, {"fallback": "observe"}, "observe", True, []),
        (BARRED, {"strategy": "observe"}, "observe", True, []),
        (BARRED, {"units": ["vm1"]}, "cap_ipc_lock", True, [DROP_IN]),
        (BARRED, {"emulators": [QEMU]}, "cap_ipc_lock", True, [FILE]),
        (BARRED, {"strategy": "cap_ipc_lock"}, "cap_ipc_lock", True, [FILE]),
        # One that lacks the capability and does not set the mode is as any other that does not.
        ({**OLD, "cap_sys_resource": False}, {}, "cap_ipc_lock", True, [FILE]),
    ],
)
def test_strategies(libvirt: Row, config: Row, strategy: str, certain: bool, grants: list[Row]) -> None:
    made = plan(libvirt, **config)
    assert made["errors"] == []
    assert (made["strategy"], made["certain"], made["grants"]) == (strategy, certain, grants)
    assert made["requested"] == config.get("strategy", "auto")
    assert made["why"].endswith(".")
    wanted = made["wanted"]
    assert wanted["capabilities"] == [grant["grantee"] for grant in grants if grant["means"] == "file capability"]
    # What comes back after an upgrade is watched where there is something that an upgrade drops.
    watched = ["iommufd-host-grant.path", "iommufd-host-grant.timer"]
    assert wanted["units"] == (watched if wanted["capabilities"] else [])
    assert made["files_of_grants"] == ([DROP_IN_FILE] if DROP_IN in grants else [])
    of_emulators = GRANT_FILES if wanted["capabilities"] else []
    assert paths(made) == [MODULES_FILE, *made["files_of_grants"], *of_emulators]
    assert set(wanted) == set(NOTHING)
    documented = documented_fields("_host_plan")
    assert made.keys() == documented.keys()
    assert wanted.keys() == documented["wanted"]["contains"].keys()


@pytest.mark.parametrize(
    ("libvirt", "config"),
    [(CONTAINER, {}), (NO_LIBRARY, {}), (CONTAINER, {"launcher": True}), (OLD, {"architecture": "v"})],
)
def test_what_is_not_known_is_asked_for(libvirt: Row, config: Row) -> None:
    made = plan(libvirt, **config)
    assert (made["strategy"], made["certain"], made["emulators"]) == ("observe", False, [])
    assert made["why"].startswith(libvirt["reason"])
    assert "iommufd_host_emulators" in made["why"]
    assert "iommufd_host_units" in made["why"]
    # Where it is asked for, it is an error.
    (error,) = plan(libvirt, **config, strategy="cap_ipc_lock")["errors"]
    assert "iommufd_host_emulators" in error


VMS = [{"user": "vm", "unit": None, "accounting": "user", "domain_uri": "qemu:///system", "emulator": "/usr/bin/q"}]
GUESS: Row = {"user": "", "libvirt_user": "libvirt-qemu"}


@pytest.mark.parametrize(
    ("libvirt", "config", "processes", "user", "certain"),
    [
        (OLD, GUESS, [], "libvirt-qemu", False),
        (OLD, {"user": "alice"}, VMS, "alice", True),
        ({**OLD, "user": "alice", "uid": 7}, GUESS, VMS, "alice", True),
        # As its VMs run, and no session's.
        (OLD, GUESS, VMS * 2, "vm", True),
        (
            OLD,
            GUESS,
            [{**VMS[0], "domain_uri": "qemu:///session"}, {**VMS[0], "domain_uri": None}],
            "libvirt-qemu",
            False,
        ),
        (OLD, GUESS, [*VMS, {**VMS[0], "user": "alice"}], "libvirt-qemu", False),
        (OLD, GUESS, [{**VMS[0], "user": None}], "libvirt-qemu", False),
        # Nothing is granted to whom it is started as.
        (NEW, GUESS, [], "libvirt-qemu", True),
        (OLD, {**GUESS, "fallback": "observe"}, [], "libvirt-qemu", True),
        (NO_LIBVIRT, {"user": "", "units": ["vm1"]}, [], "vm", True),
        (NO_LIBVIRT, {"user": "", "emulators": ["/usr/bin/q"]}, [], "root", False),
        (NO_LIBVIRT, {"user": "", "emulators": ["/usr/bin/q"]}, VMS, "vm", True),
        (NO_LIBVIRT, {"user": "", "emulators": [QEMU]}, VMS, "root", False),
    ],
)
def test_a_guess_is_not_certain(libvirt: Row, config: Row, processes: list[Row], user: str, certain: bool) -> None:
    """It would be verified as somebody whom nothing is granted to."""
    made = plan(libvirt, host={"processes": processes}, **config)
    assert (made["user"], made["certain"]) == (user, certain)
    guess = f"That VMs run as {user} is a guess: name in iommufd_host_user the user that they run as here."
    assert (guess in made["why"]) is not certain


def test_devices_are_not_opened_to_a_guess() -> None:
    (error,) = plan(OLD, qemu_access=True, **GUESS)["errors"]
    assert "name in iommufd_host_user" in error
    assert plan(OLD, qemu_access=True, device_group="kvm", **GUESS)["errors"] == []
    assert plan(OLD, qemu_access=True, host={"processes": VMS}, **GUESS)["wanted"]["group"] == "vm"


def test_what_is_wanted_are_the_options_of_the_module() -> None:
    """All of them but where the record is, and the role passes each."""
    options = set(yaml.safe_load(iommufd_host_apply.DOCUMENTATION)["options"]) - {"record"}
    assert set(NOTHING) == options
    (task,) = yaml.safe_load(APPLY.read_text("utf-8"))
    passed = {name: f"{{{{ __iommufd_host_wanted.{name} }}}}" for name in options}
    assert task["virt.iommufd.iommufd_host_apply"] == passed


@pytest.mark.parametrize("config", [{}, {"strategy": "native"}, {"launcher": True}])
def test_a_daemon_that_sets_the_mode_and_may_not(config: Row) -> None:
    """It starts no domain with iommufd, whatever the emulator has, so the capability is no way out."""
    made = plan(BARRED, **config)
    (error,) = made["errors"]
    assert error.startswith(
        "libvirt 12.8.0 may not. Give virtqemud.service CAP_SYS_RESOURCE: put the lines '[Service]',"
        " 'CapabilityBoundingSet=~CAP_SYS_RESOURCE', 'CapabilityBoundingSet=CAP_SYS_RESOURCE' into"
        " /etc/systemd/system/virtqemud.service.d/zz-sys-resource.conf"
    )
    for word in (
        "daemon-reload",
        "restart virtqemud.service",
        "Or set iommufd_host_libvirt_unit to true",
        "CAP_IPC_LOCK",
        "iommufd_host_strategy to observe",
    ):
        assert word in error
    assert (made["chosen"], made["grants"], made["wanted"]) == ("native", [], NOTHING)
    # Where the unit lacks nothing, the reason says what does.
    (error,) = plan({**BARRED, "drop_in": [], "reason": "SELinux denies it. Allow it."}, **config)["errors"]
    assert error.startswith("SELinux denies it. Allow it. CAP_IPC_LOCK of the emulator would be of no use")
    assert plan(BARRED, state="absent", **config)["errors"] == []


LIBVIRTS_DROP_IN = "/etc/systemd/system/virtqemud.service.d/zz-iommufd_host.conf"
# The daemon of BARRED once the role has written its drop-in, before it is started again and after that.
WRITTEN = {**BARRED, "drop_in": [], "needs_restart": True}
MENDED = {**NEW, "taken_by": BARRED["taken_by"]}


@pytest.mark.parametrize(
    ("libvirt", "config", "mends"),
    [
        (BARRED, {}, True),
        (BARRED, {"strategy": "observe"}, True),
        (BARRED, {"units": ["vm1"]}, True),
        (WRITTEN, {}, True),
        # A second run does not take for granted what the first has given.
        (MENDED, {}, False),
        # It was hardened since it was started.
        ({**MENDED, "drop_in": BARRED["drop_in"], "needs_restart": True}, {}, False),
    ],
)
def test_what_was_taken_from_the_daemon_is_given_back(libvirt: Row, config: Row, mends: bool) -> None:
    made = plan(libvirt, libvirt_unit=True, **config)
    assert (made["errors"], made["mends_daemon"], made["grants"][1:]) == ([], mends, [])
    assert content(made, LIBVIRTS_DROP_IN) == ["[Service]", *BARRED["drop_in"]]
    assert LIBVIRTS_DROP_IN not in made["files_of_grants"]
    assert LIBVIRTS_DROP_IN not in paths(plan(MENDED, **config))
    assert LIBVIRTS_DROP_IN not in paths(plan(libvirt, state="absent", libvirt_unit=False))


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (["User=libvirt"], ["AmbientCapabilities=CAP_SYS_RESOURCE"]),
        (["SecureBits=noroot"], ["AmbientCapabilities=CAP_SYS_RESOURCE"]),
        (["PrivateUsers=yes"], ["PrivateUsers=no"]),
        (["CapabilityBoundingSet=", "PrivateUsers=yes"], [*BARRED["drop_in"], "PrivateUsers=no"]),
    ],
)
def test_what_is_missing_is_given_back_and_nothing_else(texts: list[str], lines: list[str]) -> None:
    taken = [{"path": "/a/zzz.conf", "line": number, "text": text} for number, text in enumerate(texts)]
    assert content(plan({**BARRED, "taken_by": taken}, libvirt_unit=True), LIBVIRTS_DROP_IN) == ["[Service]", *lines]


@pytest.mark.parametrize(
    "libvirt",
    [NEW, OLD, NO_LIBVIRT, UNSURE, {**OLD, "taken_by": BARRED["taken_by"], "cap_sys_resource": False}],
)
def test_where_nothing_lacks_nothing_is_given(libvirt: Row) -> None:
    made = plan(libvirt, libvirt_unit=True)
    assert (made["errors"], made["mends_daemon"], made["wanted"]["reload"]) == ([], False, False)
    assert LIBVIRTS_DROP_IN not in paths(made)


def test_a_daemon_that_has_to_be_restarted() -> None:
    """Its unit would give it the capability: that is no failure where the role may do something about it."""
    mended = {**WRITTEN, "taken_by": []}
    assert plan(mended)["errors"]
    made = plan(mended, libvirt_unit=True)
    assert (made["errors"], made["mends_daemon"], made["wanted"]["reload"]) == ([], True, False)
    # systemd has not read that yet.
    unread = {**mended, "needs_restart": False, "unit_outdated": True}
    made = plan(unread, libvirt_unit=True)
    assert (made["errors"], made["mends_daemon"], made["wanted"]["reload"]) == ([], True, True)
    # It has been restarted, and lacks it all the same: it runs in a container, say.
    (error,) = plan(mended, libvirt_unit=True, restarted=True)["errors"]
    assert error.startswith("libvirt 12.8.0 may not. CAP_IPC_LOCK of the emulator would be of no use")


def test_what_no_drop_in_cures() -> None:
    """SELinux's policy denies it, whether or not the unit gives it."""
    denied = {**BARRED, "drop_in": [], "reason": "SELinux denies it. Allow it."}
    for libvirt in (denied, {**denied, "taken_by": []}):
        (error,) = plan(libvirt, libvirt_unit=True)["errors"]
        assert error.startswith("SELinux denies it. Allow it. CAP_IPC_LOCK of the emulator would be of no use")
        assert "iommufd_host_libvirt_unit" not in error


@pytest.mark.parametrize(
    ("path", "text", "late"),
    [
        ("/etc/systemd/system/virtqemud.service.d/zzz.conf", "CapabilityBoundingSet=~CAP_SYS_RESOURCE", True),
        ("/run/systemd/system/service.d/zzz.conf", "PrivateUsers=yes", True),
        ("/etc/systemd/system/virtqemud.service.d/zz-a.conf", "PrivateUsers=yes", False),
        # It is read first, and whoever the daemon runs as, it gets what is ambient.
        ("/etc/systemd/system/zzz.service", "PrivateUsers=yes", False),
        ("/etc/systemd/system/virtqemud.service.d/zzz.conf", "User=libvirt", False),
    ],
)
def test_what_is_read_after_the_drop_in_of_the_role(path: str, text: str, late: bool) -> None:
    for libvirt in (BARRED, MENDED):
        made = plan({**libvirt, "taken_by": [{"path": path, "line": 7, "text": text}]}, libvirt_unit=True)
        errors = [f"'{path}:7: {text}' would take away what the role gives virtqemud.service in zz-iommufd_host.conf"]
        assert [each.partition(", since")[0] for each in made["errors"]] == (errors if late else [])


def test_lines_that_are_not_known() -> None:
    (error,) = plan({**BARRED, "taken_by": None}, libvirt_unit=True)["errors"]
    assert "Give virtqemud.service CAP_SYS_RESOURCE: put the lines" in error
    assert "iommufd_host_libvirt_unit" not in error
    # What an earlier run has given may be all that it has.
    (error,) = plan({**NEW, "taken_by": None}, libvirt_unit=True)["errors"]
    assert "which lines of its files take CAP_SYS_RESOURCE from virtqemud.service is not known" in error
    assert plan({**NEW, "taken_by": None})["errors"] == []


def test_a_limit_for_units_and_users() -> None:
    made = plan(OLD, strategy="memlock", memlock="1.5G", units=["vm@.service"], memlock_users=["alice"])
    assert made["errors"] == []
    assert made["grants"] == [
        {"privilege": "memlock", "grantee": "vm@.service", "means": "drop-in", "value": 3 * 2**29},
        {"privilege": "memlock", "grantee": "alice", "means": "limits.d", "value": 3 * 2**29},
    ]
    assert made["files_of_grants"] == [
        "/etc/systemd/system/vm@.service.d/50-iommufd_host.conf",
        "/etc/security/limits.d/80-iommufd_host.conf",
    ]
    assert paths(made) == [MODULES_FILE, *made["files_of_grants"]]
    assert content(made, made["files_of_grants"][0]) == ["[Service]", "LimitMEMLOCK=1610612736"]
    assert content(made, made["files_of_grants"][1])[-1] == "alice - memlock 1572864"
    assert made["memlock_users"] == ["alice"]
    assert plan(OLD, strategy="memlock", memlock="infinity", units=["a"])["grants"][0]["value"] is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"strategy": "native"}, "native is not to be had: libvirt 11.3.0 does not."),
        ({"strategy": "memlock", "memlock": "1G"}, "whose limit to raise"),
        ({"strategy": "memlock", "memlock": "much", "units": ["a"]}, "iommufd_host_memlock: 'much' is not a size"),
        ({"strategy": "memlock", "units": ["a"]}, "iommufd_host_memlock: '' is not a size"),
        ({"strategy": "memlock", "memlock": "0", "units": ["a"]}, "too small"),
        ({"emulators": ["qemu"]}, "'qemu' in iommufd_host_emulators is not an absolute path"),
        ({"emulators": ["/opt/my qemu"]}, "'/opt/my qemu' in iommufd_host_emulators is not"),
        ({"units": ["../vm"]}, "'../vm' in iommufd_host_units is not the name of a service unit"),
        ({"units": ["vm.socket"]}, "'vm.socket' in iommufd_host_units is not"),
        ({"units": ["vm 1"]}, "is not the name of a service unit"),
        ({"device_mode": "rw"}, "iommufd_host_device_mode, 'rw', is not an octal mode"),
        ({"device_group": 'x", RUN+="rm'}, "iommufd_host_device_group"),
        ({"user": "a b"}, "iommufd_host_user, 'a b', is not a name"),
        ({"architecture": "vax", "strategy": "cap_ipc_lock"}, "no emulator for its own architecture"),
    ],
)
def test_what_cannot_be_asked_for(config: Row, words: str) -> None:
    made = plan(OLD, **config)
    assert words in " ".join(made["errors"])
    assert (made["grants"], made["files_of_grants"], made["wanted"]) == ([], [], NOTHING)


@pytest.mark.parametrize(
    ("row", "config", "words"),
    [
        (emulator("/opt/q", present=False), {"emulators": ["/opt/q"]}, "There is no emulator /opt/q"),
        (emulator("/opt/q", is_emulator=False), {"emulators": ["/opt/q"]}, "/opt/q is not an emulator"),
        (emulator(obstacles=["It would not work."]), {}, "It would not work."),
        (
            {"user": "bob", "present": False},
            {"strategy": "memlock", "memlock": "1G", "memlock_users": ["bob"]},
            "This host has no user 'bob'",
        ),
        (
            unit("vm1.service", present=False),
            {"units": ["vm1"]},
            "systemd has no unit vm1.service. Name in iommufd_host_u",
        ),
        (
            unit("vm1.service", present=False, obstacles=["It is masked."]),
            {"units": ["vm1"]},
            "It is masked. Name in iomm",
        ),
        (unit("vm1.service", obstacles=["It would not work."]), {"units": ["vm1"]}, "It would not work."),
    ],
)
def test_what_stands_against_a_grant(row: Row, config: Row, words: str) -> None:
    assert words in " ".join(plan(OLD, row, **config)["errors"])


def test_a_unit_by_another_of_its_names() -> None:
    """Its processes are known by the one that systemd has it under, and so is its drop-in."""
    rows = [unit("alias.service", main="vm1.service"), unit("a@.service", main="vm@.service")]
    made = plan(OLD, *rows, units=["alias", "a@", "vm1"], emulators=[])
    assert made["units_of_vms"] == ["vm1.service", "vm@.service"]
    assert [each["grantee"] for each in made["grants"]][1:] == ["vm1.service", "vm@.service"]
    assert made["files_of_grants"][0] == DROP_IN_FILE


def test_units_that_an_earlier_run_had_granted_to() -> None:
    """They are looked at, and nothing else is made of them."""
    vm = {"user": "vm", "accounting": "none", "domain_uri": None, "emulator": "/usr/bin/q"}
    names = ["old.service", "vm1.service", "x.scope", "-H.service", "a b.service", None]
    processes = [{**vm, "unit": name} for name in names]
    processes += [{**vm, "unit": "a.service", "accounting": "user"}, {**vm, "unit": "b.service", "user": "root"}]
    rows = [unit("old.service", obstacles=["No."], outdated=True), unit("gone.service", present=False)]
    rows += [unit("vm1.service", ambient_ipc_lock=True), unit("c.service", file_ipc_lock=True)]
    made = plan(OLD, *rows, host={"processes": processes}, units=["vm1"])
    assert (made["other_units"], made["bare_units"], made["errors"]) == (["old.service"], ["old.service"], [])
    assert (made["units_of_vms"], made["wanted"]["reload"]) == (["vm1.service"], False)


def test_what_stands_against_a_grant_only() -> None:
    """An obstacle to a capability is none where none is granted."""
    assert plan(NEW, emulator(obstacles=["It would not work."]))["errors"] == []
    assert (
        plan(OLD, unit("a.service", obstacles=["No."]), strategy="memlock", memlock="1G", units=["a"])["errors"] == []
    )


@pytest.mark.parametrize(
    ("caller", "words"),
    [
        ({"uid": 1002}, "runs as uid 1002: set become: true"),
        ({"initial_user_namespace": False}, "initial user namespace"),
        ({"capabilities": ["cap_sys_ptrace"]}, "Root lacks CAP_SYS_RESOURCE"),
        ({"capabilities": ["cap_sys_resource"]}, "Root lacks CAP_SYS_PTRACE"),
    ],
)
def test_privileges(caller: Row, words: str) -> None:
    made = plan(OLD, host={"caller": {**ROOT, **caller}})
    assert [words in each for each in made["errors"]] == [True]


def test_a_kernel_without_iommufd() -> None:
    made = plan(OLD, host={"module": "absent", "device": {"path": "/dev/iommu", "present": False}})
    assert made["supported"] is False
    for word in ("Kernel 6.12.107", "CONFIG_IOMMUFD", "Debian", "Ubuntu 26.04", "Red Hat", "iommufd_host_required"):
        assert word in made["errors"][0]


@pytest.mark.parametrize(
    ("module", "present"), [("loadable", False), ("builtin", True), (None, True), ("loaded", False)]
)
def test_a_kernel_with_iommufd(module: str | None, present: bool) -> None:
    made = plan(OLD, host={"module": module, "device": {"path": "/dev/iommu", "present": present}})
    assert (made["supported"], made["errors"]) == (True, [])


VFIO, GENERIC = "system_u:object_r:vfio_device_t:s0", "system_u:object_r:device_t:s0"
POLICY_FILE = "/usr/local/share/iommufd_host.cil"


def policy(*types: str, iommu: str = GENERIC, device: str = VFIO, container: str = VFIO, msg: str = "") -> Row:
    """What iommufd_vmm_check tells of SELinux: by default as Debian's policy has it."""
    names = ["/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/vfio", "/dev/iommufd_host-no-such-node"]
    return {
        "domains": [{"context": f"system_u:system_r:{each}:s0"} for each in types],
        "labels": {} if msg else dict(zip(names, (iommu, device, container, GENERIC))),
        "sysfs": "" if msg else "system_u:object_r:sysfs_t:s0",
        "msg": msg,
    }


def module_of(made: Row) -> list[str]:
    """The lines of the module of SELinux's policy, without the first; none where there is none."""
    found = [each["content"].splitlines() for each in made["wanted"]["files"] if each["path"] == POLICY_FILE]
    assert [lines[0] for lines in found] == len(found) * [
        "; Put here by the Ansible role virt.iommufd.iommufd_host, which takes it away again."
    ]
    return [line for lines in found for line in lines[1:]]


LOCKS = ["(optional iommufd_host_svirt_t", "  (allow svirt_t self (capability (ipc_lock)))"]
SYSFS = [
    "  (allow svirt_t sysfs_t (lnk_file (getattr read)))",
    "  (allow svirt_t sysfs_t (file (getattr open read)))",
]


def test_the_capability_where_there_is_selinux() -> None:
    made = plan(OLD, selinux=policy("svirt_t"))
    assert (made["errors"], made["policy"]) == ([], ["ipc_lock"])
    assert module_of(made) == [*LOCKS, ")"]
    # Nobody gets the capability by that.
    assert POLICY_FILE not in made["files_of_grants"]


@pytest.mark.parametrize(
    ("iommu", "device", "labels", "types"),
    [
        # Debian's policy, and the same with the module that we have added.
        (GENERIC, VFIO, ["/dev/(iommu)", "/dev/vfio/devices/(vfio)[0-9]+"], ["vfio_device_t"]),
        (VFIO, VFIO, ["/dev/(iommu)", "/dev/vfio/devices/(vfio)[0-9]+"], ["vfio_device_t"]),
        # Fedora's.
        (
            "system_u:object_r:iommu_device_t:s0",
            GENERIC,
            ["/dev/vfio/devices/(vfio)[0-9]+"],
            ["iommu_device_t", "vfio_device_t"],
        ),
        ("system_u:object_r:iommu_device_t:s0", "system_u:object_r:cdev_t:s0", [], ["iommu_device_t", "cdev_t"]),
    ],
)
def test_the_nodes_where_there_is_selinux(iommu: str, device: str, labels: list[str], types: list[str]) -> None:
    """Nothing is allowed for the type that any node has."""
    made = plan(OLD, selinux=policy("svirt_t", iommu=iommu, device=device), qemu_access=True)
    assert (made["errors"], made["policy"]) == ([], ["ipc_lock", "opens"])
    labelled = [f'  (filecon "{each}" char (system_u object_r vfio_device_t ((s0) (s0))))' for each in labels]
    allowed = [f"  (allow svirt_t {each} (chr_file (getattr ioctl map open read write)))" for each in types]
    assert module_of(made) == [
        *(["(optional iommufd_host_labels", *labelled, ")"] if labels else []),
        *[*LOCKS, *allowed, *SYSFS, ")"],
    ]
    assert made["access"][-1] == f"SELinux lets QEMU open them: {POLICY_FILE}"


def test_each_type_of_libvirts_has_its_part() -> None:
    """So that one that the policy knows no more takes nothing from the other."""
    made = plan(OLD, selinux=policy("svirt_t", "svirt_tcg_t", "svirt_t"))
    assert [each for each in module_of(made) if "optional" in each] == [
        "(optional iommufd_host_svirt_t",
        "(optional iommufd_host_svirt_tcg_t",
    ]


@pytest.mark.parametrize(
    ("libvirt", "selinux", "config"),
    [
        (OLD, policy(), {"qemu_access": True}),
        (OLD, None, {"qemu_access": True}),
        (OLD, policy("svirt_t"), {"strategy": "observe"}),
        (NEW, policy("svirt_t"), {"qemu_access": True}),
        (NO_LIBVIRT, policy("svirt_t"), {"units": ["vm1"]}),
        # What is wrong there matters to nobody.
        (NEW, policy("svirt_t", msg="There is no semodule."), {}),
    ],
)
def test_a_host_that_needs_no_module(libvirt: Row, selinux: Row | None, config: Row) -> None:
    made = plan(libvirt, selinux=selinux, **config)
    assert (made["errors"], module_of(made), made["policy"]) == ([], [], [])


@pytest.mark.parametrize(
    ("selinux", "error"),
    [
        (policy("svirt_t", msg="There is no semodule."), "There is no semodule. The role takes semodule"),
        (policy("svirt_t", container=GENERIC), "SELinux's policy has no type for VFIO's nodes"),
        (policy("svirt_t", iommu="u:r:t_t) (allow:s0"), "has a label of a form that is not known here: 'u:r:t_t) (al"),
        (policy("svirt_t) (allow"), "has a label of a form that is not known here: 'system_u:system_r:svirt_t) (al"),
        (policy("svirt_t", iommu="u:r:t_t:s0-s1:c0"), "has a label of a form that is not known here"),
        (policy("svirt_t", iommu="<<none>>"), "has a label of a form that is not known here"),
    ],
)
def test_a_policy_that_is_not_added_to(selinux: Row, error: str) -> None:
    made = plan(OLD, selinux=selinux, qemu_access=True)
    (told,) = made["errors"]
    assert error in told
    assert made["wanted"]["files"] == []


def test_access_for_an_older_libvirt() -> None:
    made = plan(OLD, qemu_access=True, apparmor=True)
    assert made["errors"] == []
    assert paths(made)[:3] == [MODULES_FILE, UDEV_FILE, APPARMOR_FILE]
    wanted = made["wanted"]
    assert (wanted["group"], wanted["mode"]) == ("libvirt-qemu", "0660")
    assert content(made, UDEV_FILE)[0] == 'SUBSYSTEM=="misc", KERNEL=="iommu", GROUP="libvirt-qemu", MODE="0660"'
    assert [each["path"] for each in wanted["blocks"]] == ["/etc/libvirt/qemu.conf"]
    assert wanted["nodes"] == ["/dev/iommu", "/dev/vfio/devices/*"]
    devices = wanted["blocks"][0]["devices"]
    assert devices[0] == "/dev/iommu"
    assert devices[1:17] == [f"/dev/vfio/devices/vfio{number}" for number in range(16)]
    assert devices[17:] == ["/dev/vfio/devices/vfio20"]
    # None of it is a grant to somebody.
    assert made["files_of_grants"] == []
    assert len(made["access"]) == 3
    assert APPARMOR_FILE in made["access"][2]
    assert APPARMOR_FILE not in paths(plan(OLD, qemu_access=True))
    # What is asked for by name goes before what the access takes.
    wanted = plan(OLD, qemu_access=True, device_group="kvm", device_mode="0666")["wanted"]
    assert (wanted["group"], wanted["mode"]) == ("kvm", "0666")


def test_access_that_is_not_needed_or_not_possible() -> None:
    made = plan(NEW, qemu_access=True, apparmor=True)
    assert made["errors"] == []
    wanted = made["wanted"]
    assert (wanted["blocks"], wanted["nodes"], wanted["group"], wanted["mode"]) == ([], [], "", "")
    assert paths(made) == [MODULES_FILE]
    assert made["access"] == ["Nothing: libvirt 12.8.0 opens the device nodes itself and passes them to QEMU."]
    # What it can do decides, and not its version.
    assert plan({**NEW, "supports_iommufd": False}, qemu_access=True)["wanted"]["blocks"] != []
    assert plan({**OLD, "supports_iommufd": True}, qemu_access=True)["wanted"]["blocks"] == []
    assert "there is none here" in plan(NO_LIBVIRT, qemu_access=True, units=["a"])["errors"][0]


def test_rights_of_the_device_nodes() -> None:
    made = plan(OLD, device_group="kvm", device_mode="0660")
    assert paths(made)[1] == UDEV_FILE
    assert (made["wanted"]["group"], made["wanted"]["mode"]) == ("kvm", "0660")
    assert content(made, UDEV_FILE)[0] == 'SUBSYSTEM=="misc", KERNEL=="iommu", GROUP="kvm", MODE="0660"'
    for made in (plan(OLD, device_group="kvm"), plan(OLD, device_mode="0660")):
        assert made["wanted"]["nodes"] == ["/dev/iommu", "/dev/vfio/devices/*"]
    assert plan(OLD)["wanted"]["nodes"] == []


def test_kernel_modules() -> None:
    made = plan(NEW)
    assert made["wanted"]["modules"] == ["iommufd", "vfio-pci"]
    assert content(made, MODULES_FILE) == ["iommufd", "vfio-pci"]
    made = plan(NEW, modules=["iommufd"])
    assert made["wanted"]["modules"] == ["iommufd"]
    assert content(made, MODULES_FILE) == ["iommufd"]


def test_systemd_reads_again_what_it_has_not_read() -> None:
    """A run that was cut off after it had written a drop-in has told nobody."""
    assert plan(OLD, units=["vm1"])["wanted"]["reload"] is False
    rows = [unit("vm1.service"), unit("vm2.service", outdated=True)]
    assert plan(OLD, *rows, units=["vm1", "vm2"])["wanted"]["reload"] is True
    # By what iommufd_info tells alone, that is not known yet.
    assert host_plan(info(OLD), {"architecture": "x86_64"})["wanted"]["reload"] is False


def test_emulators_that_libvirt_knows_of() -> None:
    """Those of its domains beside the usual ones. What somebody merely executes does not count."""
    rows: list[Row] = [
        {"path": "/usr/local/sbin/qemu", "present": True, "known_by": ["definition", "process"]},
        {"path": "/home/vm/qemu-system-x86_64", "present": True, "known_by": ["process"]},
        {"path": "/opt/gone", "present": False, "known_by": ["definition"]},
    ]
    rows = [{**row, "writer": None, "cap_ipc_lock": False} for row in rows]
    assert host_plan(info(OLD, qemu=rows), {"architecture": "x86_64"})["emulators"] == ["/usr/local/sbin/qemu"]
    rows.append({"path": QEMU, "present": True, "writer": None, "cap_ipc_lock": False})
    both = [QEMU, "/usr/local/sbin/qemu"]
    assert host_plan(info(OLD, qemu=rows), {"architecture": "x86_64"})["emulators"] == both
    # Nothing is granted to those that are defined where libvirt needs nothing.
    assert host_plan(info(NEW, qemu=rows), {"architecture": "x86_64"})["emulators"] == [QEMU]
    # The one that is to be trusted was named to the module as well.
    rows[-1]["known_by"] = ["option"]
    named = {"architecture": "x86_64", "emulators": [QEMU]}
    assert host_plan(info(OLD, qemu=rows), named)["emulators"] == [QEMU]
    # Whom somebody else could make what he likes is told of, unless nothing is granted.
    rows[0]["writer"] = {"place": "/usr/local/sbin", "who": "group staff"}
    (error,) = host_plan(info(OLD, qemu=rows), {"architecture": "x86_64"})["errors"]
    assert error.startswith("The emulator /usr/local/sbin/qemu cannot be trusted")
    assert host_plan(info(NEW, qemu=rows), {"architecture": "x86_64"})["errors"] == []


def test_an_emulator_that_is_not_always_known() -> None:
    """A run that sees less takes nothing from what an earlier one has granted."""
    rows: list[Row] = [{"path": QEMU, "present": True, "writer": None, "cap_ipc_lock": True}]
    for libvirt in (CONTAINER, NO_LIBRARY):
        made = plan(libvirt, host={"qemu": rows})
        assert (made["strategy"], made["certain"], made["wanted"]["capabilities"]) == ("cap_ipc_lock", False, [QEMU])
        assert "stays where it is, but nothing else gets it: name in iommufd_host_emulators" in made["why"]
        rows.append(
            {"path": "/opt/q", "present": True, "writer": None, "cap_ipc_lock": False, "known_by": ["definition"]}
        )
        assert plan(libvirt, host={"qemu": rows})["wanted"]["capabilities"] == [QEMU]
        rows.pop()
    # One that is just being replaced.
    gone = {"path": QEMU, "present": False, "writer": None, "cap_ipc_lock": None, "known_by": ["definition"]}
    (error,) = plan(OLD, host={"qemu": [gone]})["errors"]
    assert "no emulator for its own architecture" in error
    assert plan(NEW, host={"qemu": [gone]})["errors"] == []
    # That of a domain that is defined nowhere is not known any more once that ends.
    rows.append({"path": "/opt/q", "present": True, "writer": None, "cap_ipc_lock": False, "known_by": ["record"]})
    made = plan(OLD, host={"qemu": rows})
    assert (made["strategy"], made["certain"], made["wanted"]["capabilities"]) == ("cap_ipc_lock", False, [QEMU])
    assert "A domain that is defined nowhere runs in /opt/q: name it in iommufd_host_emulators, too." in made["why"]
    rows[1]["known_by"] = ["definition", "record"]
    made = plan(OLD, emulator("/opt/q"), host={"qemu": rows})
    assert (made["certain"], made["wanted"]["capabilities"]) == (True, [QEMU, "/opt/q"])


def test_a_script_in_front_of_an_emulator() -> None:
    script = "/usr/local/bin/qemu-system-x86_64"
    rows = [{"path": path, "present": True, "writer": None, "cap_ipc_lock": False} for path in (script, QEMU)]
    row = emulator(script, is_emulator=False)
    made = plan(OLD, row, host={"qemu": rows})
    assert (made["wanted"]["capabilities"], made["errors"]) == ([QEMU], [])
    assert "is not an emulator" in plan(OLD, row, host={"qemu": rows[:1]})["errors"][0]
    assert "is not an emulator" in plan(OLD, row, host={"qemu": rows}, emulators=[script, QEMU])["errors"][0]


def test_an_emulator_of_another_name() -> None:
    rows = [{"path": "/usr/libexec/qemu-kvm", "present": True}, {"path": QEMU, "present": False}]
    host = {"qemu": [{**row, "writer": None, "cap_ipc_lock": False} for row in rows]}
    made = host_plan(info(OLD, **host), {"architecture": "x86_64"})
    assert made["emulators"] == ["/usr/libexec/qemu-kvm"]
    power = {"qemu": [{"path": "/usr/bin/qemu-system-ppc64", "present": True, "writer": None, "cap_ipc_lock": False}]}
    assert host_plan(info(OLD, **power), {"architecture": "ppc64le"})["emulators"] == ["/usr/bin/qemu-system-ppc64"]


@pytest.mark.parametrize("arguments", [(None, {}), ({}, None), ({}, {}), ({"host": {}}, {}, []), ({"host": {}}, {})])
def test_other_input(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(IommufdError, match=r"^(It takes|There is no) "):
        host_plan(*arguments)


def test_the_launcher_is_a_file_of_the_plan_where_it_is_asked_for() -> None:
    path = "/usr/local/bin/iommufd-exec"
    assert path not in paths(plan(OLD))
    made = plan(NO_LIBVIRT, launcher=True)
    assert {"path": path, "program": "iommufd-exec"} in made["wanted"]["files"]
    # It takes no grant.
    assert (made["strategy"], made["certain"], made["grants"]) == ("observe", True, [])
    assert made["files_of_grants"] == []
    # What libvirt starts does not use it.
    assert plan(OLD, launcher=True)["grants"] == [FILE]


def test_what_grants_again_is_a_program_of_our_own() -> None:
    made = plan(OLD)
    assert {"path": PROGRAM, "program": "iommufd-host-grant"} in made["wanted"]["files"]
    assert f"ExecStart={PROGRAM} --until-quiet=30 {QEMU}" in content(made, GRANT_FILES[1])
    assert f"PathChanged={QEMU}" in content(made, GRANT_FILES[2])
    assert PROGRAM not in paths(plan(NEW))


def test_an_emulator_behind_a_link_is_watched_at_both_ends() -> None:
    made = plan(OLD, emulator("/usr/bin/kvm", real_path=QEMU), emulators=["/usr/bin/kvm"])
    assert made["wanted"]["capabilities"] == ["/usr/bin/kvm"]
    assert f"ExecStart={PROGRAM} --until-quiet=30 /usr/bin/kvm" in content(made, GRANT_FILES[1])
    lines = content(made, GRANT_FILES[2])
    assert [line for line in lines if line.startswith("PathChanged=")] == [
        "PathChanged=/usr/bin/kvm",
        f"PathChanged={QEMU}",
    ]


def test_what_a_host_answers_adds_no_line_to_a_file() -> None:
    """Nor does it move a cursor; but the lines of a file stay lines."""
    hostile = f"{QEMU}\n[Service]\nExecStart=/bin/sh\x1b[2J"
    made = plan(OLD, emulator(real_path=hostile), host={"kernel": hostile})
    lines = content(made, GRANT_FILES[2])
    assert "[Service]" not in lines
    shown = f"{QEMU}\\n[Service]\\nExecStart=/bin/sh\\x1b[2J"
    assert f"PathChanged={shown}" in lines
    assert made["kernel"] == shown


WRITER = {"place": "/opt/vm", "who": "user alice (uid 1002)"}
SAYS = "The emulator {} cannot be trusted: /opt/vm can be written by user alice (uid 1002), who would get with it"


@pytest.mark.parametrize("config", [{}, {"strategy": "observe"}, {"strategy": "cap_ipc_lock"}])
def test_an_emulator_that_others_can_write(config: Row) -> None:
    """By what iommufd_info tells alone."""
    config = {"architecture": "x86_64", **config}
    host = {"qemu": [{"path": QEMU, "present": True, "writer": WRITER, "cap_ipc_lock": False}]}
    made = host_plan(info(OLD, **host), config)
    assert [each.startswith(SAYS.format(QEMU)) for each in made["errors"]] == [True]
    assert (made["grants"], made["files_of_grants"], made["wanted"]) == ([], [], NOTHING)
    # Another one is nobody's concern.
    other = {"path": "/opt/vm/q", "present": True, "writer": WRITER, "cap_ipc_lock": False}
    host = {"qemu": [other, *info(OLD)["host"]["qemu"]]}
    assert host_plan(info(OLD, **host), config)["errors"] == []
    made = host_plan(info(OLD, **host), {**config, "emulators": ["/opt/vm/q"]})
    assert [each.startswith(SAYS.format("/opt/vm/q")) for each in made["errors"]] == [True]


@pytest.mark.parametrize("strategy", ["observe", "cap_ipc_lock"])
def test_an_emulator_that_others_can_write_since(strategy: str) -> None:
    """By what iommufd_vmm_check tells, whatever iommufd_info has found a moment ago."""
    row = emulator("/opt/q", writer=WRITER, is_emulator=False, obstacles=["/opt/q cannot be trusted."])
    made = plan(OLD, row, emulators=["/opt/q"], strategy=strategy)
    assert (made["errors"], made["grants"]) == (["/opt/q cannot be trusted."], [])


@pytest.mark.parametrize("module", ["loaded", "absent"])
def test_nothing_is_planned_for_the_state_absent(module: str) -> None:
    host = {"module": module, "device": {"path": "/dev/iommu", "present": module == "loaded"}}
    made = host_plan(info(OLD, **host), {"state": "absent", "strategy": "cap_ipc_lock"})
    assert (made["state"], made["requested"], made["strategy"]) == ("absent", "cap_ipc_lock", "observe")
    assert (made["certain"], made["why"]) == (True, "iommufd_host_state is absent.")
    assert (made["grants"], made["files_of_grants"], made["untried"], made["access"]) == ([], [], [], [])
    assert (made["wanted"]["capabilities"], made["wanted"]["units"]) == ([], [])


def test_a_kernel_without_iommufd_takes_no_strategy() -> None:
    absent = {"module": "absent", "device": {"path": "/dev/iommu", "present": False}}
    made = host_plan(info(OLD, **absent), {"architecture": "x86_64", "strategy": "cap_ipc_lock"})
    assert (made["state"], made["supported"], made["wanted"]) == ("present", False, NOTHING)
    assert (made["requested"], made["chosen"], made["strategy"]) == ("cap_ipc_lock", "cap_ipc_lock", "observe")
    assert [made["why"]] == made["errors"]
    assert made["why"].startswith("Kernel 6.12.107 has no iommufd: ")
    # It tells all that is wrong.
    made = host_plan(info(OLD, **absent), {"device_mode": "8", "user": "a b"})
    assert (len(made["errors"]), made["why"]) == (2, " ".join(made["errors"]))


def test_what_has_the_capability_already_is_not_tried() -> None:
    assert plan(OLD)["untried"] == [QEMU]
    host = {"qemu": [{"path": QEMU, "present": True, "writer": None, "cap_ipc_lock": True}]}
    made = plan(OLD, host=host, emulators=[QEMU, "/opt/q"])
    assert (made["wanted"]["capabilities"], made["untried"]) == ([QEMU, "/opt/q"], ["/opt/q"])
    assert plan(OLD, strategy="observe")["untried"] == []


def test_a_user_that_a_host_names_is_no_input() -> None:
    """What is wrong with it is not told as if somebody had asked for it."""
    made = plan(NO_LIBVIRT, unit("a.service", user="a b"), units=["a"], user="")
    assert (made["user"], made["errors"]) == ("a b", [])


def test_what_is_of_another_type_is_taken_or_refused() -> None:
    """In no other way, whatever it is."""
    inputs: list[Any] = [
        info(OLD, processes=[]),
        {"architecture": "x86_64", "units": ["a"]},
        check(emulator(), unit("a.service")),
    ]
    assert count_refused(host_plan, inputs) > 50
