# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMs that are defined, from text to row. What a real libvirt and systemd make of it is in tests/kernel."""

from __future__ import annotations

import os
import pwd
import time
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import EACH, NO_VIOMMU, PROCESS, USER
from ansible_collections.virt.iommufd.plugins.module_utils._defined_rows import (
    Definition,
    domain_row,
    masked_row,
    may_start_vmm,
    unit_row,
)
from ansible_collections.virt.iommufd.plugins.module_utils._user import User

GIB = 2**30
PATH = "/etc/libvirt/qemu/vm1.xml"
QEMU = "/usr/bin/qemu-system-x86_64"
ALICE = User("alice", 1002, 1002, "/home/alice")
FULL = """
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm1</name>
  <maxMemory slots='16' unit='GiB'>64</maxMemory>
  <memory unit='GiB'>8</memory>
  <memoryBacking><hugepages/><locked/></memoryBacking>
  <memtune><hard_limit unit='GiB'>20</hard_limit></memtune>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <iommufd enabled='yes' fdgroup='vm1'/>
  <seclabel type='static' model='dac'><label>root:root</label></seclabel>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <hostdev mode='subsystem' type='pci'><source><address domain='0' bus='0x3b' slot='2' function='7'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='mdev' model='vfio-pci'><driver iommufd='no'/>
      <source><address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>
    <interface type='network'><source network='default'/></interface>
    <interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>
    <graphics type='vnc' passwd='secret-of-vnc'/>
    <memory model='virtio-mem'><target><size unit='GiB'>2</size></target></memory>
  </devices>
</domain>
"""
PLAIN = "<domain type='kvm'><name>vm1</name><memory unit='GiB'>1</memory><devices/></domain>"


def domain(text: str | bytes, passing: set[str] | None = frozenset(), **other: Any) -> dict[str, Any]:  # type: ignore[assignment]
    text = text.encode() if isinstance(text, str) else text
    return domain_row(Definition("vm1", PATH, text, **other), passing)


def device(backend: str, space: str, *, as_it_runs: bool = False, **other: Any) -> dict[str, Any]:
    rest = {"accounting": None, "address": None, **other}
    return {"backend": backend, "space": space, "as_it_runs": as_it_runs, **rest}


def test_a_domain_with_everything() -> None:
    row = domain(FULL, autostart=True, pid=4242)
    assert row == {
        "kind": "domain",
        "name": "vm1",
        "manager": "system",
        "path": PATH,
        "user": "root",
        "uid": 0,
        "autostart": True,
        "transient": False,
        "pid": 4242,
        "memory_bytes": 8 * GIB,
        "memory_max_bytes": 64 * GIB,
        "elastic_bytes": 2 * GIB,
        "of_devices_bytes": 0,
        "hugepages": True,
        "devices": [
            device("iommufd", "the domain's iommufd", address="0000:3b:02.7"),
            device("legacy", "the legacy container", as_it_runs=True),
            device("vdpa", ""),
        ],
        "viommu": NO_VIOMMU,
        "libvirt_counts": 2,
        "hard_limit_bytes": 20 * GIB,
        "memory_max_shared": None,
        "libvirt_locks": True,
        "locks_memory": False,
        "fdgroup": "vm1",
        "emulator": QEMU,
        "memlock_bytes": None,
        "memlock_unlimited": None,
        "cap_ipc_lock": None,
        "launcher_lacks": None,
        "launcher_ends": None,
        "unread": [],
        "unread_at_boot": [],
        "changed": None,
        "order": [],
    }
    assert "secret" not in str(row)


def test_a_plain_domain() -> None:
    row = domain(PLAIN, autostart=False)
    told = ("user", "uid", "pid", "memory_max_bytes", "hard_limit_bytes", "fdgroup", "emulator")
    assert [row[key] for key in told] == [None] * 7
    assert (row["devices"], row["libvirt_counts"], row["elastic_bytes"]) == ([], 0, 0)
    assert (row["hugepages"], row["libvirt_locks"], row["locks_memory"]) == (False, False, False)
    assert (row["autostart"], row["transient"], row["unread"]) == (False, False, [])


def test_a_domain_of_a_users_own_libvirt_is_the_users() -> None:
    row = domain(FULL, owner=ALICE)
    assert (row["manager"], row["user"], row["uid"]) == ("session", "alice", 1002)


def test_a_transient_domain_is_in_its_record() -> None:
    row = domain(f"<domstatus state='running' pid='7'>{FULL}</domstatus>", transient=True, pid=7)
    assert (row["memory_bytes"], row["transient"], row["pid"], row["unread"]) == (8 * GIB, True, 7, [])


def test_a_user_that_the_host_does_not_know() -> None:
    row = domain(FULL.replace("root:root", "no-such-user:kvm"))
    assert (row["user"], row["uid"]) == ("no-such-user", None)
    assert row["unread"] == ["Its <seclabel> has user no-such-user, whom this host does not know."]


def argued(*words: str) -> str:
    """The domain with these arguments for QEMU."""
    arguments = "".join(f"<qemu:arg value='{each}'/>" for each in words)
    return FULL.replace("</domain>", f"<qemu:commandline>{arguments}</qemu:commandline></domain>")


def test_arguments_for_qemu_of_a_domain() -> None:
    row = domain(argued("-device", "vfio-pci,host=01:00.0,iommufd=x", "-object", "iommufd,id=x"))
    assert row["devices"][-1] == device("iommufd", "x", accounting=USER, address="0000:01:00.0")
    assert domain(argued("-global", "ICH9-LPC.disable_s3=1"))["unread"] == []
    for words in (["-readconfig", "/etc/a"], ["-set", "device.a.b=c"], ["-global", "vfio-pci.iommufd=x"]):
        row = domain(argued(*words))
        assert (row["devices"], row["viommu"], row["locks_memory"]) == (None, None, None)
        assert row["unread"] == [f"{PATH} does not tell what {words[0]} has QEMU do."]
    row = domain(FULL.replace("</domain>", "<qemu:override/></domain>"))
    assert (row["devices"], row["unread"]) == (None, [f"{PATH} does not tell what <qemu:override> changes."])


@pytest.mark.parametrize(
    ("passing", "is_known"), [(set(), True), ({"other"}, True), ({"default"}, False), (None, False)]
)
def test_a_network_may_pass_a_device_through(passing: set[str] | None, is_known: bool) -> None:
    row = domain(FULL, passing)
    assert (row["devices"] is not None, row["libvirt_counts"] is not None) == (is_known, is_known)
    words = "Whether the interface in network default passes a device through is not known."
    assert row["unread"] == ([] if is_known else [words])


def test_a_viommu() -> None:
    placed = FULL.replace("</source>", "</source><address type='pci' bus='1'/>")
    assert domain(placed.replace("<devices>", "<devices><iommu model='intel'/>"))["viommu"] == EACH
    nested = domain(placed.replace("<devices>", "<devices><iommu model='smmuv3'><driver accel='on'/></iommu>"))
    assert nested["viommu"] is None
    assert "address space of its own" in nested["unread"][0]


PASSED = "<hostdev mode='subsystem' type='pci'/>"
BOMB = """<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><domain><name>&b;</name></domain>"""
OUTSIDE = """<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/shadow">]><domain><name>&a;</name></domain>"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "it has a DOCTYPE"),
        (OUTSIDE, "it has a DOCTYPE"),
        ("", "it is no XML"),
        ("<domain><name>vm1</name>", "it is no XML"),
        (PLAIN.encode().replace(b"vm1", b"vm\xff1"), "it is no XML"),
        (PLAIN.encode("utf-16"), "it is no XML"),
        ("<network><name>vm1</name></network>", "it is no domain"),
        ("<domstatus><name>vm1</name></domstatus>", "it is no domain"),
        (PLAIN.replace("vm1", "vm2"), "it is that of domain vm2, so that libvirt does not load it"),
        (PLAIN.replace("vm1", ""), "it is that of domain"),
        (PLAIN.replace(">1<", ">much<"), "its <memory> is no number"),
        (
            PLAIN.replace("<devices/>", "<devices>" + PASSED * 1025 + "</devices>"),
            "devices",
        ),
        (PLAIN.replace("<devices/>", "<a/>" * 2**18), "elements and attributes"),
        ("<a>" * 100000, "it is no XML"),
    ],
)
def test_what_is_no_definition(text: str | bytes, words: str) -> None:
    """Nothing of it is told but the file's name, and why."""
    began = time.monotonic()
    row = domain(text, autostart=True, pid=5)
    assert time.monotonic() - began < 10
    [why] = row["unread"]
    assert why.startswith(f"{PATH} cannot be read: ")
    assert words in why
    assert {key for key, value in row.items() if value is not None} == {
        *("kind", "name", "manager", "path", "unread", "unread_at_boot", "order")
    }


def test_a_hostile_name_is_shown_in_one_line() -> None:
    name = os.fsdecode(b"a\n\x1b\xff")
    row = domain_row(Definition(name, f"/x/{name}.xml", b"", "it is no regular file"), set())
    assert row["name"] == "a\\n\\x1b\\xff"
    assert row["unread"] == ["/x/a\\n\\x1b\\xff.xml cannot be read: it is no regular file."]


SETTINGS: dict[str, Any] = {
    "FragmentPath": "/etc/systemd/system/vm1.service",
    "User": "root",
    "MainPID": 0,
    "LimitMEMLOCKSoft": 2**33,
    "CapabilityBoundingSet": 2**41 - 1,
    "AmbientCapabilities": 0,
    "NoNewPrivileges": False,
    "PrivateUsers": False,
    "RestrictNamespaces": 0x7E020080,
    "SystemCallFilter": [False, []],
    "RestrictAddressFamilies": [False, []],
}
IPC_LOCK = 1 << 14
NOBODY = pwd.getpwnam("nobody")
BASIC = (QEMU, "-m", "8G")
ALL_BUT = {name: (2**41 - 1) & ~(1 << bit) for name, bit in (("resource", 24), ("setuid", 7), ("setpcap", 8))}
RESOURCE, SETIDS = 1 << 24, 1 << 6 | 1 << 7
AS_NOBODY: dict[str, Any] = {"User": "nobody", "AmbientCapabilities": RESOURCE}
OWN = ("-object", "iommufd,id=i", "-device", "vfio-pci,host=0000:01:00.0,iommufd=i")


def settings(words: tuple[str, ...], flags: tuple[str, ...] = (), **other: Any) -> dict[str, Any]:
    return {**SETTINGS, "ExecStartEx": [[words[0], list(words), list(flags), 0, 0, 0, 0, 0, 0, 0]], **other}


def unit(words: tuple[str, ...], flags: tuple[str, ...] = (), pids: tuple[int, ...] = (), **other: Any) -> Any:
    return unit_row("vm1.service", settings(words, flags, **other), pids)


def test_a_unit_with_everything() -> None:
    words = (*BASIC, *OWN, "-m", "maxmem=32G,slots=4", "-overcommit", "mem-lock=on", "-mem-path", "/dev/hugepages/a")
    row = unit((*words, "-device", "intel-iommu", "-device", "vfio-pci,host=02:00.1"), User="nobody", MainPID=99)
    assert row == {
        "kind": "unit",
        "name": "vm1.service",
        "manager": "system",
        "path": "/etc/systemd/system/vm1.service",
        "user": "nobody",
        "uid": NOBODY.pw_uid,
        "autostart": None,
        "transient": False,
        "pid": 99,
        "memory_bytes": 8 * GIB,
        "memory_max_bytes": 32 * GIB,
        "elastic_bytes": 0,
        "of_devices_bytes": 16 * 2**20,
        "hugepages": True,
        "devices": [
            device("iommufd", "i", accounting=USER, address="0000:01:00.0"),
            device("legacy", "the legacy container", address="0000:02:00.1"),
        ],
        "viommu": EACH,
        "libvirt_counts": None,
        "hard_limit_bytes": None,
        "memory_max_shared": None,
        "libvirt_locks": False,
        "locks_memory": True,
        "fdgroup": None,
        "emulator": QEMU,
        "memlock_bytes": 2**33,
        "memlock_unlimited": False,
        "cap_ipc_lock": None,
        "launcher_lacks": None,
        "launcher_ends": None,
        "unread": [],
        "unread_at_boot": [],
        "changed": False,
        "order": [],
    }


def test_files_that_systemd_has_not_read() -> None:
    """What it has of them is not what counts after a reboot, and counts until then."""
    row = unit((*BASIC, *OWN), NeedDaemonReload=False)
    assert (row["unread_at_boot"], row["changed"]) == ([], False)
    for words in ((*BASIC, *OWN), ("/usr/local/bin/vm",)):
        row = unit(words, pids=(7,), NeedDaemonReload=True)
        assert (row["unread"] == []) == (words[0] == BASIC[0])
        assert row["changed"] is True
        assert row["unread_at_boot"] == [
            "The files of vm1.service have changed since systemd read them, and count after a reboot: run systemctl"
            " daemon-reload."
        ]


@pytest.mark.parametrize(
    ("other", "gone"),
    [
        ({}, ""),
        ({"DropInPaths": ["/etc/systemd/system/vm1.service.d/a.conf"]}, ""),
        ({"DropInPaths": ["/etc/a.conf", "/run/systemd/system/vm1.service.d/b.conf"]}, "vm1.service.d/b.conf says"),
        ({"DropInPaths": ["/run/systemd/system.control/vm1.service.d/50-a.conf"]}, "system.control/vm1.service.d/50-a"),
        ({"DropInPaths": ["/run/systemd/generator/vm1.service.d/a.conf"]}, "systemd/generator/vm1.service.d/a.conf"),
        ({"FragmentPath": "/run/systemd/transient/vm1.service"}, "What /run/systemd/transient/vm1.service says in vm1"),
    ],
)
def test_what_a_reboot_empties(other: dict[str, Any], gone: str) -> None:
    row = unit((*BASIC, *OWN), **other)
    assert row["unread"] == []
    assert (len(row["unread_at_boot"]), row["changed"]) == ((1, True) if gone else (0, False))
    assert gone in "".join(row["unread_at_boot"])


@pytest.mark.parametrize(
    ("words", "flags", "other", "is_known"),
    [
        ("", (), {"User": "nobody"}, False),
        # Without a user it is root's session.
        ("", (), {}, False),
        ("", ("no-setuid",), {"User": "nobody"}, True),
        ("", ("privileged",), {"User": "nobody"}, True),
        ("iommufd-exec --memlock 1G --", (), AS_NOBODY, True),
        ("iommufd-exec --memlock 1G --", (), {"User": "nobody", "LimitMEMLOCK": GIB}, False),
        ("iommufd-exec --", (), AS_NOBODY, False),
    ],
)
def test_pam_may_set_another_limit(words: str, flags: tuple[str, ...], other: dict[str, Any], is_known: bool) -> None:
    given = ("-object", "iommufd,id=i,fd={iommufd}", "-device", "vfio-pci,host=01:00.0,iommufd=i")
    row = unit((*words.split(), *BASIC, *given), flags, PAMName="login", **other)
    assert (row["unread"] == []) is is_known
    assert is_known or "vm1.service has a session of PAM (PAMName=)" in row["unread"][0]


@pytest.mark.parametrize(
    ("text", "is_vmm"),
    [
        (f"[Service]\nExecStart={QEMU} -m 1G -device vfio-pci,host=01:00.0\n", True),
        (f"[Service]\nExecStart = -+{QEMU} -m 1G \\\n  -device vfio-pci,host=01:00.0\n", True),
        (
            f"ExecStartPre=/bin/true\nExecStart=/usr/bin/iommufd-exec -- {QEMU} -object iommufd,id=i,fd={{iommufd}}\n",
            True,
        ),
        (f"ExecStart={QEMU} $OPTIONS\n", True),
        (f"ExecStart=/bin/sh -c 'exec {QEMU} -device vfio-pci,host=01:00.0'\n", True),
        (f"ExecStart={QEMU} -m 1G\n", False),
        ("ExecStart=/usr/bin/qemu-ga --method=vfio\n", False),
        (f"#ExecStart={QEMU} -m 1G -device vfio-pci,host=01:00.0\nExecStart=\n", False),
        ("", False),
    ],
)
def test_a_unit_that_is_masked_until_the_next_reboot(text: str, is_vmm: bool) -> None:
    row = masked_row("vm1.service", "/usr/lib/systemd/system/vm1.service", text)
    assert (row is not None) is is_vmm
    if row is not None:
        assert (row["name"], row["devices"], row["user"], row["changed"]) == ("vm1.service", None, None, True)
        assert row["unread"] == [
            "vm1.service is masked until the next reboot (systemctl mask --runtime), and starts a VMM by"
            " /usr/lib/systemd/system/vm1.service then: run systemctl unmask --runtime, and look again."
        ]


def test_the_launcher_in_front() -> None:
    given = ("-object", "iommufd,id=i,fd={iommufd}", "-device", "vfio-pci,host=01:00.0,iommufd=i")
    launcher = ("/usr/local/sbin/iommufd-exec", "--user", "nobody", "--memlock", "66G")
    row = unit((*launcher, "--", *BASIC, *given))
    assert (row["user"], row["uid"], row["memlock_bytes"]) == ("nobody", NOBODY.pw_uid, 66 * GIB)
    assert [each["accounting"] for each in row["devices"]] == [PROCESS]
    assert (row["emulator"], row["memory_bytes"], row["cap_ipc_lock"], row["unread"]) == (QEMU, 8 * GIB, None, [])
    row = unit(
        (launcher[0], "--rlimit-mode", "user", "--memlock", "infinity", "--bounding", "none", "--", *BASIC, *given)
    )
    assert [each["accounting"] for each in row["devices"]] == [USER]
    assert (row["user"], row["memlock_bytes"], row["memlock_unlimited"]) == ("root", None, True)
    assert row["cap_ipc_lock"] is False
    # Each iommufd by its name, and a device that it opens.
    objects = ("-object", "iommufd,id=a,fd={iommufd:a}", "-object", "iommufd,id=i,fd={iommufd}")
    devices = ("-device", "vfio-pci,id=v,fd={01:00.0},iommufd=a", "-device", "vfio-pci,host=02:00.0,iommufd=i")
    row = unit((launcher[0], "--device", "0000:01:00.0", "--", *BASIC, *objects, *devices))
    assert [(each["space"], each["accounting"], each["address"]) for each in row["devices"]] == [
        ("a", PROCESS, "0000:01:00.0"),
        ("i", PROCESS, "0000:02:00.0"),
    ]
    assert row["unread"] == []
    # A device from elsewhere is at a place that nobody knows.
    row = unit((launcher[0], "--", *BASIC, *objects, "-device", "vfio-pci,id=v,fd=9,iommufd=a"))
    assert [(each["accounting"], each["address"]) for each in row["devices"]] == [(PROCESS, None)]
    # From elsewhere, nobody knows which mode it has.
    row = unit((*BASIC, "-object", "iommufd,id=i,fd=9", "-device", "vfio-pci,host=01:00.0,iommufd=i"))
    assert [each["accounting"] for each in row["devices"]] == [None]


@pytest.mark.parametrize(
    ("options", "flags", "other", "expected"),
    [
        ("", (), {}, (PROCESS, [], None)),
        ("", (), {"User": "nobody"}, (USER, ["cap_sys_resource"], None)),
        ("", (), {"User": "nobody", "NoNewPrivileges": True}, (USER, ["cap_sys_resource"], None)),
        ("", (), AS_NOBODY, (PROCESS, [], None)),
        ("", (), {**AS_NOBODY, "NoNewPrivileges": True}, (PROCESS, [], None)),
        ("", (), {"CapabilityBoundingSet": ALL_BUT["resource"]}, (USER, ["cap_sys_resource"], None)),
        ("", (), {**AS_NOBODY, "PrivateUsers": True}, (USER, ["cap_sys_resource"], None)),
        ("", (), {"PrivateUsersEx": "identity"}, (USER, ["cap_sys_resource"], None)),
        ("", (), {"DynamicUser": True}, (USER, ["cap_sys_resource"], None)),
        ("", ("no-setuid",), {"User": "nobody"}, (PROCESS, [], None)),
        ("", ("no-setuid",), {"DynamicUser": True}, (PROCESS, [], None)),
        ("", ("privileged",), {"PrivateUsers": True, "CapabilityBoundingSet": 0}, (PROCESS, [], None)),
        ("--rlimit-mode user", (), {"User": "nobody"}, (USER, [], None)),
        ("--strict", (), {"User": "nobody"}, (USER, ["cap_sys_resource"], "rlimit_mode=process, as --strict demands")),
        ("--strict --rlimit-mode user", (), {"User": "nobody"}, (USER, [], None)),
        # A limit that is no more than the hard one takes nothing.
        ("--memlock 1G", (), {"User": "nobody", "LimitMEMLOCK": GIB}, (USER, ["cap_sys_resource"], None)),
        ("--memlock 2G", (), {"User": "nobody", "LimitMEMLOCK": GIB}, (USER, ["cap_sys_resource"], "--memlock")),
        ("--memlock 2G", (), {**AS_NOBODY, "LimitMEMLOCK": GIB}, (PROCESS, [], None)),
        ("--memlock infinity", (), {"User": "nobody", "LimitMEMLOCK": GIB}, (USER, ["cap_sys_resource"], "--memlock")),
        ("--memlock infinity", (), {"User": "nobody", "LimitMEMLOCK": 2**64 - 1}, (USER, ["cap_sys_resource"], None)),
        # To become another user takes something, too, and to become one that it is takes nothing.
        ("--user nobody", (), AS_NOBODY, (PROCESS, [], None)),
        ("--user nobody", (), {"CapabilityBoundingSet": ALL_BUT["setuid"]}, (PROCESS, ["cap_setuid"], "user nobody")),
        (
            "--user nobody",
            (),
            {"User": "daemon", "AmbientCapabilities": RESOURCE},
            (PROCESS, ["cap_setgid", "cap_setuid"], "user nobody"),
        ),
        ("--user nobody", (), {"User": "daemon", "AmbientCapabilities": RESOURCE | SETIDS}, (PROCESS, [], None)),
        ("--user nobody", (), {**AS_NOBODY, "Group": "kvm"}, (PROCESS, ["cap_setgid", "cap_setuid"], "user nobody")),
        ("--user root", (), {}, (PROCESS, [], "--user root would give up nothing")),
        (
            "--bounding none",
            (),
            {"CapabilityBoundingSet": ALL_BUT["setpcap"]},
            (PROCESS, ["cap_setpcap"], "--bounding"),
        ),
        ("--bounding sys_resource", (), {"CapabilityBoundingSet": RESOURCE}, (PROCESS, [], None)),
    ],
)
def test_what_a_unit_keeps_the_launcher_from(
    options: str, flags: tuple[str, ...], other: dict[str, Any], expected: tuple[str, list[str], str | None]
) -> None:
    given = ("-object", "iommufd,id=i,fd={iommufd}", "-device", "vfio-pci,host=01:00.0,iommufd=i")
    row = unit(("/usr/bin/iommufd-exec", *options.split(), "--", *BASIC, *given), flags, **other)
    mode, lacks, ends = expected
    assert ([each["accounting"] for each in row["devices"]], row["launcher_lacks"]) == ([mode], lacks)
    assert row["launcher_ends"] == ends if ends is None else ends in row["launcher_ends"]
    assert all("DynamicUser" in each for each in row["unread"])


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ("", {"CapabilityBoundingSet": None}),
        ("", {"SecureBits": 1}),
        ("--memlock 2G", {"SecureBits": 1}),
        ("--user nobody", {"PrivateUsers": True}),
    ],
)
def test_it_is_not_known_what_the_launcher_may(options: str, other: dict[str, Any]) -> None:
    given = ("-object", "iommufd,id=i,fd={iommufd}", "-device", "vfio-pci,host=01:00.0,iommufd=i")
    row = unit(("/usr/bin/iommufd-exec", *options.split(), "--", *BASIC, *given), **other)
    assert row["launcher_ends"] is None
    assert all(each.startswith("Whether iommufd-exec has CAP_") for each in row["unread"])
    assert row["unread"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("/usr/bin/iommufd-exec", "--no-such", "--", QEMU, "{iommufd}"), "unrecognized arguments: --no-such"),
        (("/usr/bin/iommufd-exec", "--help"), "iommufd-exec is asked for help"),
        (("/usr/bin/iommufd-exec", "--", "/bin/sh", "-c", "{iommufd}"), "/bin/sh starts the VMM, in words of its own"),
        (("/bin/sh", "-c", f"exec {QEMU} -m 1G -device vfio-pci,host=01:00.0"), "/bin/sh starts the VMM"),
        (("/usr/bin/numactl", "-N0", QEMU, "-device", "vfio-pci,host=01:00.0"), "/usr/bin/numactl starts the VMM"),
        ((*BASIC, "$OPTIONS"), "how many words $OPTIONS stands for is not known"),
        ((*BASIC, "-device", "vfio-pci,host=${ADDRESS}"), "the value of $ADDRESS is not known"),
    ],
)
def test_a_command_that_is_not_understood(words: tuple[str, ...], why: str) -> None:
    row = unit(words)
    assert row["unread"] == [row["unread"][0]]
    assert row["unread"][0].startswith("What vm1.service starts is not understood: ")
    assert why in row["unread"][0]
    assert (row["devices"], row["memory_bytes"], row["user"], row["memlock_bytes"]) == (None,) * 4


def test_variables_are_replaced_where_their_values_are_certain() -> None:
    words = ("-m", "${SIZE}", *OWN, "-name", "$$a")
    known: dict[str, Any] = {"Environment": ["SIZE=4G", "OTHER=a=b"]}
    assert unit((QEMU, *words), **known)["memory_bytes"] == 4 * GIB
    others: list[dict[str, Any]] = [{"EnvironmentFiles": [["/etc/default/vm", True]]}, {"PassEnvironment": ["SIZE"]}]
    for other in others:
        assert "the value of $SIZE is not known" in unit((QEMU, *words), **known, **other)["unread"][0]
    # A file of variables does not matter to a command without any.
    assert unit((*BASIC, *OWN), EnvironmentFiles=[["/etc/default/vm", True]])["unread"] == []
    literal = unit((*BASIC, *OWN, "-name", "$NAME"), ("no-env-expand",))
    assert literal["unread"] == []


@pytest.mark.parametrize(
    "words",
    [
        ("/usr/sbin/virtqemud", "--timeout", "120"),
        ("/usr/bin/qemu-ga",),
        ("/sbin/modprobe", "-a", "kvm", "vfio-pci"),
        ("/bin/chmod", "666", "/dev/kvm", "/dev/vfio/vfio"),
        BASIC,
        (*BASIC, "-netdev", "user,id=n", "-global", "ICH9-LPC.disable_s3=1"),
        ("/usr/bin/cloud-hypervisor", "--memory", "size=1G"),
        ("/bin/sh", "-c", f"{QEMU} --version"),
    ],
)
def test_a_unit_that_starts_no_vm_with_devices(words: tuple[str, ...]) -> None:
    assert unit(words) is None


def test_a_unit_whose_process_tells_more_than_its_command() -> None:
    row = unit(("/usr/local/bin/start-vms",), pids=(7,))
    assert (row["pid"], row["devices"], row["user"]) == (7, None, None)
    assert "none of its words is a VMM's" in row["unread"][0]
    row = unit(BASIC, pids=(7,), MainPID=6)
    assert (row["pid"], row["devices"], row["memory_bytes"]) == (7, None, 8 * GIB)
    assert row["unread"] == ["vm1.service has a process with devices, which its command line does not have."]
    row = unit((*BASIC, *OWN), pids=(7, 8), MainPID=7)
    assert (row["pid"], row["unread"]) == (None, ["vm1.service has several VMMs."])
    several = {"ExecStartEx": [[QEMU, [*BASIC, *OWN], []], [QEMU, [*BASIC, *OWN], []]]}
    row = unit_row("vm1.service", {**SETTINGS, **several}, ())
    assert row is not None
    assert "several commands" in row["unread"][0]


def test_what_is_in_a_file_for_qemu_is_not_read() -> None:
    row = unit((QEMU, "-readconfig", "/etc/vm1.cfg"))
    assert (row["devices"], row["viommu"], row["memory_bytes"], row["locks_memory"]) == (None,) * 4
    assert "The command line does not tell what -readconfig has QEMU do." in row["unread"]


@pytest.mark.parametrize(
    ("words", "hugepages"),
    [
        ((), False),
        (("-mem-path", "/dev/hugepages"), True),
        (("-mem-path", "/mnt/pages"), None),
        (("-object", "memory-backend-memfd,id=m,size=1G,hugetlb=on"), True),
        (("-object", "memory-backend-memfd,id=m,size=1G,hugetlb=off"), False),
        (("-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages/x"), True),
        (("-object", "memory-backend-file,id=m,size=1G,mem-path=/srv/x"), None),
        (("-object", "memory-backend-ram,id=m,size=1G"), False),
    ],
)
def test_huge_pages_of_a_unit(words: tuple[str, ...], hugepages: bool | None) -> None:
    assert unit((*BASIC, *OWN, *words))["hugepages"] is hugepages


@pytest.mark.parametrize(
    ("words", "viommu"),
    [
        ((), NO_VIOMMU),
        (("-device", "virtio-iommu-pci"), EACH),
        (("-machine", "virt,iommu=smmuv3"), EACH),
        (("-device", "arm-smmuv3,accel=on"), None),
        (("-device", "intel-iommu", "-device", "pcie-pci-bridge,id=b"), None),
    ],
)
def test_the_viommu_of_a_unit(words: tuple[str, ...], viommu: str | None) -> None:
    row = unit((*BASIC, *OWN, *words))
    assert row["viommu"] == viommu
    assert bool(row["unread"]) == (viommu is None)


def test_other_devices_of_a_unit() -> None:
    row = unit((*BASIC, "-netdev", "vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0"))
    assert row["devices"] == [device("vdpa", "")]
    row = unit((*BASIC, "-drive", "file=nvme://0000:44:00.0/1"))
    assert [each["backend"] for each in row["devices"]] == ["legacy"]
    # The devices may come by hot-plug.
    assert unit((*BASIC, "-object", "iommufd,id=i"))["devices"] == []
    assert "several VMMs" not in str(unit((*BASIC, *OWN))["unread"])


def test_cloud_hypervisor() -> None:
    words = ("/usr/bin/cloud-hypervisor", "--memory", "size=4G,hugepages=on", "--device")
    row = unit((*words, "path=/sys/bus/pci/devices/0000:01:00.0/", "path=/sys/bus/mdev/devices/u", "--vdpa", "path=/a"))
    assert (row["memory_bytes"], row["hugepages"], row["viommu"], row["unread"]) == (4 * GIB, True, NO_VIOMMU, [])
    assert row["devices"] == [
        device("legacy", "the legacy container", address="0000:01:00.0"),
        device("legacy", "the legacy container", as_it_runs=True),
        device("vdpa", ""),
    ]
    assert unit((*words, "path=/sys/bus/pci/devices/0000:01:00.0/,iommu=on"))["viommu"] is None
    assert unit((*words, "path=/sys/x", "--platform", "iommufd=on"))["devices"] is None


@pytest.mark.parametrize(
    ("flags", "other", "expected"),
    [
        ((), {}, ("root", 0, True)),
        ((), {"User": ""}, ("root", 0, True)),
        ((), {"User": "nobody"}, ("nobody", NOBODY.pw_uid, None)),
        ((), {"User": str(NOBODY.pw_uid)}, ("nobody", NOBODY.pw_uid, None)),
        ((), {"User": "no-such-user"}, ("no-such-user", None, None)),
        (("privileged",), {"User": "nobody", "NoNewPrivileges": True, "CapabilityBoundingSet": 0}, ("root", 0, True)),
        (("no-setuid",), {"User": "nobody"}, ("root", 0, True)),
        ((), {"User": "nobody", "AmbientCapabilities": IPC_LOCK}, ("nobody", NOBODY.pw_uid, True)),
        ((), {"User": "nobody", "NoNewPrivileges": True}, ("nobody", NOBODY.pw_uid, False)),
        ((), {"User": "nobody", "ProtectClock": True}, ("nobody", NOBODY.pw_uid, False)),
        ((), {"User": "nobody", "SystemCallFilter": [True, ["read"]]}, ("nobody", NOBODY.pw_uid, False)),
        ((), {"User": "nobody", "RestrictNamespaces": 0}, ("nobody", NOBODY.pw_uid, False)),
        ((), {"NoNewPrivileges": True, "ProtectClock": True}, ("root", 0, True)),
        ((), {"SecureBits": 1}, ("root", 0, None)),
        ((), {"CapabilityBoundingSet": (2**41 - 1) & ~IPC_LOCK}, ("root", 0, False)),
        ((), {"PrivateUsers": True}, ("root", 0, False)),
        ((), {"PrivateUsersEx": "self"}, ("root", 0, False)),
        ((), {"User": "a", "DynamicUser": True}, (None, None, None)),
    ],
)
def test_who_a_unit_runs_as_and_with_what(flags: tuple[str, ...], other: dict[str, Any], expected: object) -> None:
    row = unit((*BASIC, *OWN), flags, **other)
    assert (row["user"], row["uid"], row["cap_ipc_lock"]) == expected
    assert bool(row["unread"]) == (row["uid"] is None)


def test_the_limit_of_a_unit() -> None:
    row = unit((*BASIC, *OWN), LimitMEMLOCKSoft=2**64 - 1)
    assert (row["memlock_bytes"], row["memlock_unlimited"]) == (None, True)
    for most, expected in ((2**64 - 1, None), (GIB, GIB), (0, 0)):
        assert unit((*BASIC, *OWN), MemoryMax=most)["hard_limit_bytes"] == expected
    bare = settings((*BASIC, *OWN))
    del bare["LimitMEMLOCKSoft"]
    row = unit_row("vm1.service", bare, ())
    assert row is not None
    assert (row["memlock_bytes"], row["memlock_unlimited"]) == (None, None)


def test_which_units_are_looked_at() -> None:
    assert may_start_vmm("{ path=/usr/bin/qemu-system-x86_64 ; argv[]=a }")
    assert may_start_vmm("{ path=/bin/sh ; argv[]=sh -c bind-vfio }")
    assert not may_start_vmm("{ path=/usr/sbin/sshd ; argv[]=sshd -D }")


def test_memory_of_emulated_devices() -> None:
    size = "<size unit='M'>64</size>"
    shared = domain(PLAIN.replace("<devices/>", f"<devices><shmem name='s'>{size}</shmem></devices>"))
    assert shared["of_devices_bytes"] == 64 * 2**20
    served = domain(PLAIN.replace("<devices/>", "<devices><shmem name='s'><server/></shmem></devices>"))
    assert (served["of_devices_bytes"], served["unread"]) == (None, [])
    words = ("-nodefaults", "-object", "memory-backend-ram,id=m,size=64M", "-device", "ivshmem-plain,memdev=m")
    assert unit((*BASIC, *OWN, *words))["of_devices_bytes"] == 64 * 2**20
