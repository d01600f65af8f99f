# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _daemon, _device, _domain_start, _libvirt_files
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import (
    IOMMUFD,
    NO_VIOMMU,
    UNLIMITED,
    VDPA,
    Device,
)
from ansible_collections.virt.iommufd.plugins.module_utils._daemon import start_daemon
from ansible_collections.virt.iommufd.plugins.module_utils._device import new_iommufd
from ansible_collections.virt.iommufd.plugins.module_utils._domain_start import (
    Daemon,
    DomainSeen,
    Endpoint,
    NoDaemon,
    SessionDaemon,
    SessionDomain,
    check_fit,
    check_limit,
    check_startable,
    device_obstacles,
    dotted_version,
    gives_nothing,
    log_end,
    log_file,
    look_at_daemon,
    look_at_domain,
    parse_definition,
    pins_for_vdpa,
    start_domain,
)
from ansible_collections.virt.iommufd.plugins.module_utils._domain_xml import LIBVIRTS, Defined, reckoned_limit
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._named_target import DomainTarget
from ansible_collections.virt.iommufd.plugins.module_utils._pidfile import PidfileTarget
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import own_status
from ansible_collections.virt.iommufd.plugins.module_utils._target import PidTarget, hold_target
from ansible_collections.virt.iommufd.plugins.module_utils._user import User
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel
from ansible_collections.virt.iommufd.tests.unit.fake_libvirt import FakeDomain, FakeLibvirt

GIB = 2**30
SESSION, SYSTEM = "qemu:///session", "qemu:///system"
VM = User("vm", 1001, 1002, "/home/vm")

DEVICE = """
<hostdev mode='subsystem' type='pci' managed='no'>{}
  <source><address domain='0x0000' bus='0x00' slot='0x0{}' function='0x1'/></source>
</hostdev>
"""


MDEV = "<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source/></hostdev>"
VDPA_NET = "<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>"
NVME = "<disk type='nvme'><source type='pci'/></disk>"


def xml(devices: str = DEVICE.format("", 5), more: str = "<iommufd enabled='yes' fdgroup='g'/>") -> str:
    memory = "<memory unit='KiB'>1048576</memory>"
    return f"<domain type='qemu'><name>vm1</name>{memory}{more}<devices>{devices}</devices></domain>"


@pytest.fixture
def libvirt(monkeypatch: pytest.MonkeyPatch) -> FakeLibvirt:
    """A libvirt with the domain vm1, shut off."""
    fake = FakeLibvirt({"vm1": FakeDomain(xml())})
    monkeypatch.setitem(sys.modules, "libvirt", fake)
    return fake


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (xml(), ("g", ("0000:00:05.1",), 2 * GIB)),
        (xml(more=""), (None, (), 2 * GIB)),
        (xml(more="<iommufd enabled='no' fdgroup='g'/>"), (None, (), 2 * GIB)),
        (xml(more="<iommufd enabled='yes'/>"), (None, ("0000:00:05.1",), 2 * GIB)),
        # what a device says itself counts more
        (
            xml(DEVICE.format("<driver name='vfio' iommufd='yes'/>", 5), ""),
            (None, ("0000:00:05.1",), 2 * GIB),
        ),
        (xml(DEVICE.format("<driver iommufd='no'/>", 5)), ("g", (), 2 * GIB)),
        (xml(DEVICE.format("<driver name='vfio'/>", 5)), ("g", ("0000:00:05.1",), 2 * GIB)),
        # several, and a network card of an interface
        (
            xml(
                DEVICE.format("", 5)
                + DEVICE.format("", "A").replace("hostdev", "interface").replace("'pci'", "'hostdev'")
            ),
            ("g", ("0000:00:05.1", "0000:00:0a.1"), 2 * GIB),
        ),
        (xml(DEVICE.format("", 5) * 2 + "<iommu model='intel'/>"), ("g", ("0000:00:05.1",) * 2, 3 * GIB)),
        # what is no such device
        (
            xml("<hostdev mode='subsystem' type='usb'/><hostdev mode='capabilities' type='pci'/>"),
            ("g", (), 0),
        ),
        (xml("<hostdev mode='subsystem' type='pci'/>"), ("g", (), 2 * GIB)),
        (xml(DEVICE.format("", "x")), ("g", (), 2 * GIB)),
        # what else decides on the limit
        (
            xml(more="<memtune><hard_limit unit='KiB'>4</hard_limit></memtune>"),
            (None, (), 4096),
        ),
        (xml(more="<memoryBacking><locked/></memoryBacking>"), (None, (), UNLIMITED)),
        # what libvirt counts beside <hostdev>, and devices with both backends, which it counts as one
        (xml(DEVICE.format("", 5) + VDPA_NET * 2 + NVME), ("g", ("0000:00:05.1",), 5 * GIB)),
        (xml(MDEV, ""), (None, (), 2 * GIB)),
        (xml(DEVICE.format("", 5) + DEVICE.format("<driver iommufd='no'/>", 6)), ("g", ("0000:00:05.1",), 2 * GIB)),
        # which reckons otherwise
        (xml(more="<os><type arch='ppc64le'>hvm</type></os>").replace("'qemu'", "'kvm'"), (None, (), None)),
    ],
)
def test_definition(text: str, expected: tuple[str | None, tuple[str, ...], int | None]) -> None:
    found = parse_definition(text)
    assert (found.fdgroup, found.addresses, reckoned_limit(found)) == expected


@pytest.mark.parametrize("text", ["", "<domain/>", "<domain><memory>much</memory></domain>", "<domain"])
def test_what_is_no_definition(text: str) -> None:
    with pytest.raises(IommufdError, match=r"^libvirt's description of the domain cannot be read"):
        parse_definition(text)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "<memory unit='KiB'>{}</memory>".format("9" * 400),
            r"its <memory> is not from 0 to 9007199254740991 but '999",
        ),
        ("<memory unit='KiB'>{}</memory>".format("9" * 5000), r"its <memory> is no number but '999"),
        ("<memory unit='KiB'>-1</memory>", "its <memory> is no number but '-1'"),
        ("<memory unit='KiB'>\u0661</memory>", "its <memory> is no number"),
        ("<memory unit='KiB'>9007199254740992</memory>", "its <memory> is not from 0"),
        ("<memory>4</memory><memtune><hard_limit>1e9</hard_limit></memtune>", "its <memtune/hard_limit> is no number"),
        ("<!DOCTYPE a><memory>4</memory>", "it has a DOCTYPE"),
        ("<memory>4</memory>" + "<a/>" * 2**18, "it has more than 262144 elements"),
    ],
)
def test_a_definition_that_is_not_to_be_believed(more: str, words: str) -> None:
    with pytest.raises(IommufdError, match=f"^libvirt's description of the domain cannot be read: {words}"):
        parse_definition(f"<domain>{more}</domain>")


def test_whatever_a_libvirt_says_of_a_domain() -> None:
    """A definition, or our own error: of a domain's XML in which pieces were swapped, doubled or left out."""
    chance = random.Random(20)
    text = xml(DEVICE.format("<driver name='vfio' iommufd='yes'/>", 5) * 2 + "<iommu model='intel'/>")
    pieces = re.findall(r"<[^>]*>|[^<]+", text)
    nasty = [
        "9" * 400,
        "9" * 5000,
        "-1",
        "1e9",
        "\u0661",
        "\0",
        "&lol;",
        "]]>",
        "<!DOCTYPE a>",
        "<memory>",
        "'",
        "\ud800",
    ]
    read = refused = 0
    for _attempt in range(5000):
        spoilt = list(pieces)
        for _change in range(chance.randrange(1, 4)):
            at = chance.randrange(len(spoilt))
            spoilt[at : at + chance.randrange(2)] = [chance.choice([*pieces, *nasty])] * chance.randrange(3)
        try:
            need = reckoned_limit(parse_definition("".join(spoilt)))
            read += need == UNLIMITED or (need is not None and 0 <= need < 2**63)
        except IommufdError as exc:
            refused += str(exc).startswith("libvirt's description of the domain cannot be read: ")
    # Each was one of the two, and both have happened.
    assert read + refused == 5000
    assert min(read, refused) > 100


def test_no_definition_needs_more_than_any_size() -> None:
    definition = f"<domain><memory>{2**53 - 1}</memory><devices>{DEVICE.format('', 5) * 3}<iommu/></devices></domain>"
    assert reckoned_limit(parse_definition(definition)) == 2**63 - 1


def test_an_address_of_any_length_is_none() -> None:
    assert parse_definition(xml(DEVICE.format("", "f" * 5000))).addresses == ()
    assert parse_definition(xml(DEVICE.format("", "\u0661"))).addresses == ()


def defined(fdgroup: str | None, addresses: tuple[str, ...], **changes: Any) -> Defined:
    """A domain of 1 GiB with one device by iommufd."""
    devices = (Device(IOMMUFD, LIBVIRTS),)
    found = Defined("vm1", GIB, devices, NO_VIOMMU, 1, None, False, False, None, fdgroup, None, addresses=addresses)
    return found._replace(**changes)


SEEN = DomainSeen(12_008_000, "u-u-i-d", False, "shut off", defined("g", ("0000:00:05.1",)), ("No way.",))


def test_what_was_seen_crosses_over_to_another_process() -> None:
    assert DomainSeen.from_json(json.loads(json.dumps(SEEN.to_json()))) == SEEN
    bare = SEEN._replace(definition=defined(None, (), devices=(), viommu=None, counted=None), obstacles=())
    assert DomainSeen.from_json(json.loads(json.dumps(bare.to_json()))) == bare


def test_more_devices_than_any_domain_has() -> None:
    definition = parse_definition(xml(DEVICE.format("", 5) * 2000))
    assert (len(definition.addresses), len(definition.devices)) == (256, 256)
    assert reckoned_limit(definition) == reckoned_limit(parse_definition(xml()))
    seen = SEEN._replace(definition=definition, obstacles=("No way.",) * 512)
    assert DomainSeen.from_json(json.loads(json.dumps(seen.to_json()))) == seen
    for change in (
        {"obstacles": ["No."] * 513},
        {"definition": {**seen.to_json()["definition"], "addresses": ["a"] * 257}},
    ):
        with pytest.raises(IommufdError, match=r"has more than [0-9]+ texts\.$"):
            DomainSeen.from_json({**seen.to_json(), **change})


def test_not_all_obstacles_are_told() -> None:
    seen = SEEN._replace(obstacles=("a" * 4000,) * 512)
    with pytest.raises(IommufdError, match=r"\.\.\. There are 502 more like these\.$") as raised:
        check_startable("vm1", Endpoint(SESSION, VM), seen)
    assert len(str(raised.value)) < 4300


DEFINITION = SEEN.to_json()["definition"]
ROW = DEFINITION["devices"][0]


@pytest.mark.parametrize(
    "change",
    [
        {"version": "x"},
        {"definition": 3},
        {"obstacles": None},
        {"definition": {}},
        {"pinning_vdpa": 257},
        {"plain": None},
        {"definition": {**DEFINITION, "devices": "a"}},
        {"definition": {**DEFINITION, "devices": [ROW] * 257}},
        {"definition": {**DEFINITION, "devices": [{**ROW, "backend": "other"}]}},
        {"definition": {**DEFINITION, "devices": [{**ROW, "backend": []}]}},
        {"definition": {**DEFINITION, "devices": [{**ROW, "mode": "none"}]}},
        {"definition": {**DEFINITION, "memory": -1}},
        {"definition": {**DEFINITION, "hard_limit": 10**30}},
    ],
)
def test_what_another_process_made_up(change: dict[str, Any]) -> None:
    with pytest.raises(IommufdError, match="cannot be read"):
        DomainSeen.from_json({**SEEN.to_json(), **change})
    with pytest.raises(IommufdError, match="cannot be read"):
        DomainSeen.from_json([])


def test_what_another_process_says_is_safe_to_print() -> None:
    assert DomainSeen.from_json({**SEEN.to_json(), "state": "\x1b[31m\udc80"}).state == "\\x1b[31m\\x80"


def test_version() -> None:
    assert dotted_version(12_008_001) == "12.8.1"


@pytest.mark.parametrize("unprivileged", [False, True])
def test_look(libvirt: FakeLibvirt, unprivileged: bool) -> None:
    seen = DomainSeen.from_json(look_at_domain(SESSION, "vm1", unprivileged))
    assert seen.version == libvirt.version
    assert seen.uuid == "8e3ae1bb-0f0e-4a0f-8f55-1a8f0b2a1c51"
    assert (seen.active, seen.state) == (False, "shut off")
    assert seen.definition == defined("g", ("0000:00:05.1",))
    assert (seen.pinning_vdpa, seen.plain) == (0, False)
    assert seen.obstacles == (("This host has no PCI device 0000:00:05.1.",) if unprivileged else ())
    assert libvirt.opened == [SESSION]
    assert libvirt.closed == 1
    # By default the library prints every error.
    assert libvirt.handler is not None
    libvirt.handler(None, ())


@pytest.mark.parametrize(("number", "word"), [(1, "running"), (3, "paused"), (99, "99")])
def test_look_at_one_that_runs(libvirt: FakeLibvirt, number: int, word: str) -> None:
    libvirt.domains["vm1"].number = number
    seen = DomainSeen.from_json(look_at_domain(SESSION, "vm1", True))
    assert (seen.active, seen.state, seen.obstacles) == (True, word, ())


def test_no_such_domain(libvirt: FakeLibvirt) -> None:
    with pytest.raises(IommufdError, match=r"^There is no domain vm2 at qemu:///session: define it first"):
        look_at_domain(SESSION, "vm2", True)
    assert libvirt.closed == 1


def test_another_error_of_libvirts(libvirt: FakeLibvirt) -> None:
    libvirt.failing["lookupByName"] = libvirt.libvirtError(1, "out of \x07 order")
    with pytest.raises(IommufdError, match=r"^libvirt \(qemu:///session\) says: out of \\x07 order$"):
        look_at_domain(SESSION, "vm1", True)
    assert libvirt.closed == 1


def test_nobody_answers(libvirt: FakeLibvirt) -> None:
    libvirt.failing["open"] = libvirt.libvirtError(38, "Failed to connect socket")
    with pytest.raises(NoDaemon, match=r"^libvirt does not answer at qemu:///session: Failed to connect socket$"):
        look_at_domain(SESSION, "vm1", True)


def test_the_binding_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(IommufdError, match=r"install the package python3-libvirt"):
        look_at_domain(SESSION, "vm1", True)


@pytest.mark.parametrize(("paused", "state"), [(False, "running"), (True, "paused")])
def test_start(libvirt: FakeLibvirt, paused: bool, state: str) -> None:
    assert start_domain(SESSION, "vm1", "g", 7, paused) == {"state": state, "started": True}
    assert libvirt.domains["vm1"].associated == {"g": [7]}
    assert libvirt.closed == 1


@pytest.mark.parametrize("call", ["FDAssociate", "createWithFlags"])
def test_a_start_that_fails(libvirt: FakeLibvirt, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    libvirt.failing[call] = libvirt.libvirtError(1, "qemu: -12 (Cannot allocate memory)")
    log = tmp_path / ".cache/libvirt/qemu/log/vm1.log"
    log.parent.mkdir(parents=True)
    log.write_text("qemu: of yesterday\n")
    libvirt.before_failure = lambda: log.write_text(log.read_text() + "qemu: of today\n")
    said = "Domain vm1 did not start. libvirt says: qemu: -12 (Cannot allocate memory)."
    with pytest.raises(IommufdError, match=f"^{re.escape(said)} The end of {log}: qemu: of today$"):
        start_domain(SESSION, "vm1", "g", 7, False)
    assert libvirt.closed == 1


def test_a_start_for_which_somebody_was_quicker(libvirt: FakeLibvirt) -> None:
    # Whether it is accounted as asked for is looked at afterwards.
    libvirt.domains["vm1"].number = 1
    assert start_domain(SESSION, "vm1", "g", 7, True) == {"state": "running", "started": False}


LOG = b"""\
2026-11-24 13:00:00.000+0000: starting up libvirt version: 12.8.0, package: 1, hostname: lab
LC_ALL=C \\
PATH=/usr/bin \\
/usr/bin/qemu-system-x86_64 \\
-name guest=vm1 \\
-msg timestamp=on
2026-11-24T13:00:01Z qemu-system-x86_64: -device x: failed

2026-11-24 13:00:01.500+0000: shutting down, reason=\x1bfailed
"""


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "vm1.log"
    assert log_end(str(log), 0, "") == ""
    log.write_bytes(LOG)
    qemu = "2026-11-24T13:00:01Z qemu-system-x86_64: -device x: failed"
    libvirt = r"2026-11-24 13:00:01.500+0000: shutting down, reason=\x1bfailed"
    assert log_end(str(log), 0, "") == f" The end of {log}: {qemu} | {libvirt}"
    # libvirt often repeats what QEMU said
    assert log_end(str(log), 0, f"it said: {qemu}") == f" The end of {log}: {libvirt}"
    assert log_end(str(log), len(LOG), "") == ""
    log.write_bytes(b"x\n" * 100_000)
    assert log_end(str(log), 0, "") == f" The end of {log}: x | x | x | x | x"


def test_where_logs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/vm")
    assert log_file(SESSION, "a") == "/home/vm/.cache/libvirt/qemu/log/a.log"
    assert log_file(SYSTEM + "?x", "a") == "/var/log/libvirt/qemu/a.log"


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sysfs: 0000:00:01.0 is vfio0, 0000:00:02.0 has no driver, 0000:00:03.0 has one of its own."""
    (tmp_path / "0000:00:01.0/vfio-dev/vfio0").mkdir(parents=True)
    (tmp_path / "0000:00:02.0").mkdir()
    (tmp_path / "0000:00:03.0").mkdir()
    (tmp_path / "drivers/edu").mkdir(parents=True)
    (tmp_path / "0000:00:03.0/driver").symlink_to(tmp_path / "drivers/edu")
    monkeypatch.setattr(_domain_start, "_PCI_DEVICES", str(tmp_path))
    monkeypatch.setattr(_domain_start, "_VFIO_NODES", str(tmp_path))
    return tmp_path


def test_a_device_that_may_be_used(devices: Path) -> None:
    (devices / "vfio0").write_text("")
    assert list(device_obstacles(("0000:00:01.0",))) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0000:00:02.0", "^PCI device 0000:00:02.0 is without a driver: root has to bind it to vfio-pci"),
        ("0000:00:03.0", "^PCI device 0000:00:03.0 is driven by edu: root has to bind it to vfio-pci"),
        ("0000:00:04.0", "^This host has no PCI device 0000:00:04.0"),
        ("0000:00:01.0", r"^PCI device 0000:00:01.0 is /.*/vfio0 \(ENOENT.*\), which uid [0-9]+ may not open"),
    ],
)
def test_a_device_that_may_not_be_used(devices: Path, address: str, words: str) -> None:
    (said,) = device_obstacles((address,))
    assert re.search(words, said)


def test_a_device_that_belongs_to_somebody_else(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (devices / "vfio0").write_text("")
    (devices / "vfio0").chmod(0o400)
    # To root everything is open.
    monkeypatch.setattr(os, "access", lambda *_given: False)
    (said,) = device_obstacles(("0000:00:01.0",))
    assert re.search(r"vfio0 \(mode 0400, owner \S+\), which uid [0-9]+ may not open for reading and writing", said)


class FakeSystemd:
    """Answers for `systemctl --user` and `systemd-run --user`: `units` are those that the user has."""

    def __init__(self, libvirt: FakeLibvirt) -> None:
        self.libvirt = libvirt
        self.units: set[str] = set()
        self.ending: set[str] = set()
        self.commands: list[list[str]] = []
        self.failing: tuple[int, str] | None = None
        self.failures = 99
        self.answers = True

    def run(self, command: tuple[str, ...], variables: dict[str, str]) -> tuple[int, str, str]:
        # It leads to the user's service manager.
        assert variables["XDG_RUNTIME_DIR"]
        words = list(command)
        self.commands.append(words)
        if "show" in words:
            shown = "\n\n".join(map(self.show, words[6:]))
            # As of a transient service whose last process ends while it is looked at.
            self.units -= self.ending
            return 0, shown, ""
        self.failures -= 1
        if self.failing and self.failures >= 0:
            return self.failing[0], "", self.failing[1]
        if self.answers:
            self.libvirt.failing.clear()
        return 0, "", ""

    def show(self, unit: str) -> str:
        return f"Id={unit}\nLoadState={'loaded' if unit in self.units else 'not-found'}"


@pytest.fixture
def systemd(libvirt: FakeLibvirt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSystemd:
    """The service manager of the user vm, whose libvirt does not run."""
    fake = FakeSystemd(libvirt)
    libvirt.failing["open"] = libvirt.libvirtError(38, "no socket")
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemd/private").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(_daemon, "run_command", fake.run)
    monkeypatch.setattr(shutil, "which", lambda name, path: f"/usr/sbin/{name}" if name == "libvirtd" else None)
    monkeypatch.setattr(_daemon, "_PATIENCE", 0.1)
    monkeypatch.setattr(_daemon, "_PAUSE", 0)
    return fake


@pytest.mark.parametrize(
    ("units", "chosen"),
    [
        ({"libvirtd.service", "libvirtd.socket"}, "libvirtd.socket"),
        ({"libvirtd.service", "virtqemud.service"}, "virtqemud.service"),
    ],
)
def test_the_daemon_is_started_by_a_unit_of_the_user(systemd: FakeSystemd, units: set[str], chosen: str) -> None:
    systemd.units = units
    assert start_daemon(SESSION, "vm") == chosen
    assert systemd.commands[1:] == [["systemctl", "--user", "start", "--", chosen]]


def test_the_daemon_is_started_as_a_transient_service(systemd: FakeSystemd) -> None:
    assert start_daemon(SESSION, "vm") == "libvirtd.service"
    (command,) = systemd.commands[1:]
    assert command[:2] == ["systemd-run", "--user"]
    assert command[-3:] == ["--", "/usr/sbin/libvirtd", "--timeout=120"]
    assert "--unit=libvirtd.service" in command
    assert "--property=KillMode=process" in command


def test_a_transient_service_that_is_gone_before_it_can_be_started_again(systemd: FakeSystemd) -> None:
    systemd.units = systemd.ending = {"libvirtd.service"}
    systemd.failing, systemd.failures = (5, "Unit libvirtd.service not found."), 1
    assert start_daemon(SESSION, "vm") == "libvirtd.service"
    shown, started, again, ran = systemd.commands
    assert shown == again
    assert (started[2], ran[0]) == ("start", "systemd-run")


def test_a_transient_service_that_was_made_meanwhile(systemd: FakeSystemd) -> None:
    systemd.failing, systemd.failures = (1, "Unit libvirtd.service was already loaded or has a fragment file."), 2
    assert start_daemon(SESSION, "vm") == "libvirtd.service"
    assert [command[0] for command in systemd.commands] == ["systemctl", "systemd-run"] * 3


def test_somebody_else_has_started_the_daemon(systemd: FakeSystemd, libvirt: FakeLibvirt) -> None:
    systemd.failing = (1, "Unit libvirtd.service already exists.")
    libvirt.before_failure = libvirt.failing.clear
    assert start_daemon(SESSION, "vm") is None


def test_no_service_manager(systemd: FakeSystemd, tmp_path: Path) -> None:
    (tmp_path / "systemd/private").unlink()
    with pytest.raises(NoDaemon, match=r"loginctl enable-linger vm"):
        start_daemon(SESSION, "vm")
    assert systemd.commands == []


def test_no_daemon_is_installed(systemd: FakeSystemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name, path: None)
    with pytest.raises(NoDaemon, match=r"^This host has no libvirt daemon .* no virtqemud and no libvirtd"):
        start_daemon(SESSION, "vm")


@pytest.mark.parametrize(("errors", "words"), [("Job  failed\n", "failed: Job failed$"), ("", "failed: exit code 3$")])
def test_a_unit_that_does_not_start(systemd: FakeSystemd, errors: str, words: str) -> None:
    systemd.failing = (3, errors)
    with pytest.raises(NoDaemon, match=words):
        start_daemon(SESSION, "vm")


def test_a_unit_that_does_not_answer(systemd: FakeSystemd) -> None:
    systemd.answers = False
    words = r"^The service manager of user vm has started libvirtd.service, but libvirt does not answer .*: no socket$"
    with pytest.raises(NoDaemon, match=words):
        start_daemon(SESSION, "vm")


def test_a_host_without_systemd(systemd: FakeSystemd, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_given: Any, **_options: Any) -> None:
        raise FileNotFoundError(2, "no")

    monkeypatch.setattr(_daemon, "run_command", fail)
    with pytest.raises(NoDaemon, match=r"systemctl cannot be run \(ENOENT"):
        start_daemon(SESSION, "vm")


@pytest.mark.parametrize("uri", [SESSION, SYSTEM])
def test_where_the_emulator_and_the_daemon_are_found(uri: str) -> None:
    libvirt = Endpoint(uri, VM)
    if uri == SYSTEM:
        assert (libvirt.session, libvirt.daemon()) == (None, None)
        assert libvirt.emulator_of("vm1") == DomainTarget("vm1")
    else:
        assert libvirt.session == VM
        folder = "/run/user/1001/libvirt/qemu/run"
        assert libvirt.daemon() == SessionDaemon(f"{folder}/driver.pid", 1001)
        assert libvirt.emulator_of("vm1") == SessionDomain(f"{folder}/vm1.pid", 1001, "vm1")
        assert libvirt.emulator_of("a&b") == SessionDomain(f"{folder}/a&amp;b.pid", 1001, "a&b")


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The pid of a process that looks like the emulator of the domain a&b; its pidfile is where libvirt has it."""
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "-name", "guest=a&b,debug=on"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.read(1)
        folder = tmp_path / "libvirt/qemu/run"
        folder.mkdir(parents=True)
        # As it is with the umask of many a user, whose folder in /run is closed to everybody else.
        folder.chmod(0o775)
        for name in ("a&b", "other", "driver"):
            (folder / f"{name}.pid").write_text(str(process.pid))
        monkeypatch.setattr(User, "runtime_folder", str(tmp_path))
        yield process.pid
        process.stdin.close()


ME = VM._replace(uid=os.getuid())
OTHER = VM._replace(uid=os.getuid() + 1)


def test_the_emulator_and_the_daemon_of_a_user(emulator: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_target(SessionDomain.of(ME, "a&b")) as process:
        assert process.pid == emulator
    monkeypatch.setattr(_domain_start, "DAEMONS", (process.comm,))
    with hold_target(SessionDaemon.of(ME)) as process:
        assert process.pid == emulator


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (lambda: SessionDomain.of(ME, "other"), "is not the emulator of domain other of uid .*/other.pid is stale"),
        (lambda: SessionDomain.of(OTHER, "a&b"), "is not the emulator of domain a&b of uid .*/a&b.pid is stale"),
        (lambda: SessionDaemon.of(ME), "is not libvirt's daemon of uid .*/driver.pid is stale"),
    ],
)
def test_a_pidfile_that_names_another_process(emulator: int, target: Callable[[], PidfileTarget], words: str) -> None:
    with pytest.raises(IommufdError, match=words), hold_target(target()):
        pass


def test_a_daemon_of_somebody_else(emulator: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_target(SessionDomain.of(ME, "a&b")) as process:
        monkeypatch.setattr(_domain_start, "DAEMONS", (process.comm,))
    with pytest.raises(IommufdError, match="is not libvirt's daemon of uid"), hold_target(SessionDaemon.of(OTHER)):
        pass


def test_what_can_be_started() -> None:
    assert check_startable("vm1", Endpoint(SESSION, VM), SEEN._replace(obstacles=())) == "g"


LINE = r"edit vm1\): <iommufd enabled='yes' fdgroup='iommufd'/>"


@pytest.mark.parametrize(
    ("uri", "change", "words"),
    [
        (SESSION, {"definition": defined(None, ("d",))}, LINE + "$"),
        (SYSTEM, {"definition": defined(None, ("d",))}, LINE + " Or start it as any other: the system libvirt"),
        (SESSION, {"definition": defined("g", ())}, r"has no PCI device that is passed through by iommufd"),
        (
            SESSION,
            {"definition": defined("g", ("d",), hard_limit=GIB)},
            r"^Domain vm1 has a <memtune><hard_limit>, which a user's own libvirt refuses: take it out",
        ),
        (SESSION, {}, r"^Domain vm1 cannot be started\. No way\.$"),
    ],
)
def test_what_cannot_be_started(uri: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(IommufdError, match=words):
        check_startable("vm1", Endpoint(uri, VM), SEEN._replace(**change))


UNSAID = SEEN._replace(definition=defined(None, ("d",)), obstacles=())


@pytest.mark.parametrize(
    ("version", "takes", "words"),
    [
        # a backport, and a release without it: its files count
        (11_010_000, True, LINE),
        (12_008_000, False, "^libvirt 12.8.0 takes no iommufd from others: its files have nothing that does, and 12.2"),
        (11_003_000, False, "^libvirt 11.3.0 takes no iommufd from others: its files have nothing that does, and 12.2"),
        # nothing but the version is known
        (12_002_000, None, LINE),
        (
            12_001_999,
            None,
            r"^libvirt 12.1.999 takes no iommufd from others: 12.2.0 is the first that does\. That is told by its ver",
        ),
    ],
)
@pytest.mark.parametrize("uri", [SESSION, SYSTEM])
def test_whether_libvirt_takes_an_iommufd(
    monkeypatch: pytest.MonkeyPatch, uri: str, version: int, takes: bool | None, words: str
) -> None:
    monkeypatch.setattr(_libvirt_files, "takes_iommufd", lambda _libraries: takes)
    seen = UNSAID._replace(version=version)
    with pytest.raises(IommufdError, match=words):
        check_startable("vm1", Endpoint(uri, VM), seen)
    # What a domain says that libvirt has not left out, libvirt knows, whatever else tells.
    assert check_startable("vm1", Endpoint(uri, VM), seen._replace(definition=defined("g", ("d",)))) == "g"


def daemon(hard: int | None, may: bool = False, gives: bool = False) -> Daemon:
    return Daemon(42, "libvirtd (pid 42)", hard, may, gives)


def of_need(need: int | None) -> Defined:
    """A domain of which libvirt reckons so much."""
    found = defined("g", ("d",), memory=(need or GIB) - GIB, locked=need == UNLIMITED)
    return found._replace(counted=None) if need is None else found


@pytest.mark.parametrize(
    ("limit", "need", "may"),
    [
        (2 * GIB, 2 * GIB, False),
        (None, UNLIMITED, False),
        (None, GIB, False),
        (0, 2 * GIB, True),
        (0, UNLIMITED, True),
        # Whatever libvirt will reckon.
        (0, None, False),
    ],
)
def test_a_limit_that_is_enough(limit: int | None, need: int | None, may: bool) -> None:
    check_limit("vm1", VM, daemon(limit, may), of_need(need))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            of_need(2 * GIB),
            r"is 8 MiB, but domain vm1 takes 2 GiB by .* LimitMEMLOCK=2147483648 in a drop-in of user@1001\.service",
        ),
        (
            of_need(2 * GIB)._replace(counted=3),
            "vm1 takes 4 GiB by libvirt's reckoning, which is 3 times its memory and 1 GiB",
        ),
        (of_need(UNLIMITED), r"vm1 takes none at all, because of <locked/>\. .* LimitMEMLOCK=infinity in"),
    ],
)
def test_a_limit_that_is_too_low(found: Defined, words: str) -> None:
    with pytest.raises(
        IommufdError, match=r"^RLIMIT_MEMLOCK of libvirtd \(pid 42\), the libvirt of user vm, " + ".*" + words
    ):
        check_limit("vm1", VM, daemon(2**23), found)


def test_a_daemon_that_is_looked_at() -> None:
    found = look_at_daemon(PidTarget(os.getpid()))
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    assert (found.pid, found.hard) == (os.getpid(), None if hard == resource.RLIM_INFINITY else hard)
    assert found.title.endswith(f"(pid {os.getpid()})")
    own = own_status()
    assert (found.may, found.gives) == (bool(own.effective & 1 << 24), bool(own.permitted & 1 << 14))


MIXED = xml(DEVICE.format("", 5) + DEVICE.format("<driver iommufd='no'/>", 6)).replace("1048576", "2097152")


def starting(text: str, **changes: Any) -> DomainSeen:
    """What was seen of a domain whose emulator gives no capability."""
    return SEEN._replace(definition=parse_definition(text), obstacles=(), plain=True, **changes)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (
            SESSION,
            "Domain vm1 was not started: its memory of 2 GiB counts twice in VmLck, for an iommufd that charges per"
            " process and VFIO's legacy container. That takes 4 GiB at least, and its limit on locked memory is 3 GiB."
            " Pass all of its PCI devices through by iommufd (without <driver iommufd='no'/>), or start it with"
            " rlimit_mode=user.",
        ),
        (
            SYSTEM,
            " start it with rlimit_mode=user, or give it <memtune><hard_limit unit='KiB'>5242880</hard_limit>"
            "</memtune>, which is the limit of its control group, too.",
        ),
    ],
)
def test_a_domain_that_would_not_fit(monkeypatch: pytest.MonkeyPatch, uri: str, words: str) -> None:
    monkeypatch.setattr(_domain_start, "vms_are_no_roots", lambda: True)
    given = daemon(8 * GIB) if uri == SESSION else None
    with pytest.raises(IommufdError) as raised:
        check_fit("vm1", Endpoint(uri, VM), starting(MIXED), given, "process")
    assert words in str(raised.value)
    check_fit("vm1", Endpoint(uri, VM), starting(MIXED), given, "user")


def with_arguments(words: str) -> str:
    """A domain of 2 GiB with arguments for QEMU."""
    qemu = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
    arguments = "".join(f"<qemu:arg value='{each}'/>" for each in words.split())
    text = xml().replace("<domain", f"<domain {qemu}").replace("1048576", "2097152")
    return text.replace("</domain>", f"<qemu:commandline>{arguments}</qemu:commandline></domain>")


def test_a_domain_whose_memory_qemu_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much that is beside its memory is not known."""
    monkeypatch.setattr(_domain_start, "vms_are_no_roots", lambda: True)
    text = with_arguments("-overcommit mem-lock=on-fault")
    with pytest.raises(IommufdError) as raised:
        check_fit("vm1", Endpoint(SYSTEM, VM), starting(text), None, "process")
    assert str(raised.value).endswith(
        " Have QEMU lock no memory itself (no mem-lock=on, no <locked/>), or start it with rlimit_mode=user, or give it"
        " no limit, by <memoryBacking><locked/></memoryBacking> without <hard_limit>."
    )


def test_a_domain_that_only_no_limit_helps() -> None:
    """A session libvirt gives what it reckons, however much its daemon has."""
    text = with_arguments("-drive file=nvme://0000:01:00.0/1 -drive file=nvme://0000:02:00.0/1")
    with pytest.raises(IommufdError) as raised:
        check_fit("vm1", Endpoint(SESSION, VM), starting(text), daemon(8 * GIB), "user")
    assert str(raised.value).endswith(
        " Give it no limit, by <memoryBacking><locked/></memoryBacking>, and user@1001.service LimitMEMLOCK=infinity."
    )


@pytest.mark.parametrize(
    ("uri", "change"),
    [
        # A capability may lift what is checked.
        (SESSION, {"plain": False}),
        (SESSION, {"gives": True}),
        (SESSION, {"uid": 0}),
        (SYSTEM, {"plain": False}),
        (SYSTEM, {"root": True}),
        (SYSTEM, {"user": "other"}),
    ],
)
def test_a_domain_that_may_fit(monkeypatch: pytest.MonkeyPatch, uri: str, change: dict[str, Any]) -> None:
    monkeypatch.setattr(_domain_start, "vms_are_no_roots", lambda: "root" not in change)
    seen = starting(MIXED)._replace(plain=change.get("plain", True))
    seen = seen._replace(definition=seen.definition._replace(user=change.get("user")))
    given = daemon(8 * GIB, gives="gives" in change) if uri == SESSION else None
    check_fit("vm1", Endpoint(uri, VM._replace(uid=change.get("uid", 1001))), seen, given, "process")


@pytest.mark.parametrize("owner", [0, 64055, None])
def test_whose_the_vms_of_the_system_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: int | None) -> None:
    def look(path: str) -> os.stat_result:
        assert path == "/var/lib/libvirt/qemu"
        if owner is None:
            raise FileNotFoundError(2, "no")
        return os.stat_result((0o40750, 1, 1, 1, owner, 0, 0, 0, 0, 0))

    monkeypatch.setattr(_domain_start, "os", SimpleNamespace(stat=look))
    assert _domain_start.vms_are_no_roots() is (owner == 64055)


@pytest.fixture
def vdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes /dev/null a vDPA device at that place in sysfs."""
    monkeypatch.setattr(_domain_start, "_CHARACTER_DEVICES", str(tmp_path))
    monkeypatch.setattr(_domain_start, "_SIMULATOR", str(tmp_path / "use_va"))

    def make(place: str) -> None:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / "1:3").symlink_to(tmp_path / place)

    return make


@pytest.mark.parametrize(
    ("place", "use_va", "pins"),
    [
        ("devices/pci0000:00/0000:00:04.0/vdpa0/vhost-vdpa-0", "", True),
        ("devices/virtual/vduse/vdpa0/vhost-vdpa-0", "", False),
        # It is another device by now.
        ("devices/virtual/mem/null", "", False),
        ("devices/vdpasim_net/vdpa0/vhost-vdpa-0", "N\n", True),
        ("devices/vdpasim_blk/vdpa0/vhost-vdpa-0", "Y\n", False),
        ("devices/vdpasim_net/vdpa0/vhost-vdpa-0", "", False),
    ],
)
def test_a_vdpa_device_that_pins(
    vdpa: Callable[[str], None], tmp_path: Path, place: str, use_va: str, pins: bool
) -> None:
    vdpa(place)
    if use_va:
        (tmp_path / "use_va").write_text(use_va)
    assert pins_for_vdpa("/dev/null") is pins
    assert pins_for_vdpa(str(tmp_path)) is False
    assert pins_for_vdpa("/nonexistent") is pins_for_vdpa("\0") is pins_for_vdpa("") is False


def test_a_vdpa_device_that_sysfs_does_not_have(vdpa: Callable[[str], None]) -> None:
    assert pins_for_vdpa("/dev/null") is False


def test_an_executable_that_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu"
    program.write_bytes(b"\x7fELF...")
    assert gives_nothing(str(program))
    program.chmod(0o4755)
    assert not gives_nothing(str(program))
    program.chmod(0o755)
    for given in (b"", b"\1" * 20):
        monkeypatch.setattr(_domain_start, "read_xattr", lambda _fd, given=given: given)
        assert not gives_nothing(str(program))
    monkeypatch.setattr(_domain_start, "read_xattr", lambda _fd: None)
    program.write_bytes(b"#!/bin/sh\nexec qemu")
    assert not gives_nothing(str(program))
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/nonexistent", "\0"):
        assert not gives_nothing(str(path))


def test_what_is_seen_of_a_domain_with_vdpa(
    libvirt: FakeLibvirt, vdpa: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    vdpa("devices/pci0000:00/0000:00:04.0/vdpa0/vhost-vdpa-0")
    net = VDPA_NET.replace("/dev/vhost-vdpa-0", "/dev/null")
    libvirt.domains["vm1"].xml = xml(DEVICE.format("", 5) + net * 2 + f"<emulator>{sys.executable}</emulator>")
    seen = DomainSeen.from_json(look_at_domain(SYSTEM, "vm1", False))
    assert (seen.pinning_vdpa, seen.plain) == (2, True)
    assert [each.backend for each in seen.definition.devices] == [IOMMUFD, VDPA, VDPA]
    # Nothing of it matters to one that runs.
    libvirt.domains["vm1"].number = 1
    seen = DomainSeen.from_json(look_at_domain(SYSTEM, "vm1", False))
    assert (seen.pinning_vdpa, seen.plain) == (0, False)


@pytest.fixture
def device(null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """Every new iommufd is /dev/null, which the kernel answers for."""
    monkeypatch.setattr(_device, "DEVICE", os.devnull)
    return null_is_iommufd


def test_a_new_iommufd(device: FakeKernel) -> None:
    with new_iommufd() as fd:
        assert _domain_start.set_mode(fd, 1, dry_run=True).outcome == "changed"
        assert device.mode == 0
        assert _domain_start.set_mode(fd, 1, dry_run=False).outcome == "changed"
        assert device.mode == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/nonexistent", HostLacks, r"^There is no /nonexistent: load the module iommufd"),
        ("/proc/self/exe", IommufdError, r"^/proc/self/exe cannot be opened by uid [0-9]+ \(E"),
        ("/dev/zero", IommufdError, r"^/dev/zero is not the kernel's iommufd"),
        ("/proc/self/comm", IommufdError, r"^/proc/self/comm is not the kernel's iommufd"),
    ],
)
def test_what_is_no_iommufd(
    device: FakeKernel, monkeypatch: pytest.MonkeyPatch, path: str, error: type[Exception], words: str
) -> None:
    monkeypatch.setattr(_device, "DEVICE", path)
    with pytest.raises(error, match=words), new_iommufd():
        pass
    assert device.calls == []
