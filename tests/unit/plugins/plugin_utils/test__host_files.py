# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._programs import LAUNCHER
from ansible_collections.virt.iommufd.plugins.plugin_utils import _host_files

Row = dict[str, Any]

OURS = "# Put here by the Ansible role virt.iommufd.iommufd_host, which takes it away again.\n"
QEMU = "/usr/bin/qemu-system-x86_64"
PROGRAM = "/usr/local/libexec/iommufd-host-grant"


@pytest.mark.parametrize(
    ("modules", "lines"), [([], ""), (["iommufd"], "iommufd\n"), (["iommufd", "vfio-pci"], "iommufd\nvfio-pci\n")]
)
def test_kernel_modules(modules: list[str], lines: str) -> None:
    row = {"path": "/etc/modules-load.d/iommufd_host.conf", "content": OURS + lines}
    assert _host_files.modules_file(modules) == row


@pytest.mark.parametrize(
    ("group", "mode", "rights"),
    [
        ("kvm", "0660", 'GROUP="kvm", MODE="0660"'),
        ("kvm", "", 'GROUP="kvm"'),
        ("", "660", 'MODE="660"'),
    ],
)
def test_the_rule_of_udev(group: str, mode: str, rights: str) -> None:
    lines = f'SUBSYSTEM=="misc", KERNEL=="iommu", {rights}\nSUBSYSTEM=="vfio-dev", {rights}\n'
    row = {"path": "/etc/udev/rules.d/80-iommufd_host.rules", "content": OURS + lines}
    assert _host_files.udev_rules(group, mode) == row


APPARMOR = """\
# For a QEMU that opens its iommufd and its devices of VFIO by itself. No line can be spared.
/dev/iommu rw,
/dev/vfio/devices/vfio[0-9]* rw,
/sys/devices/**/vfio-dev/ r,
/sys/devices/**/vfio-dev/vfio[0-9]*/dev r,
"""


def test_apparmor() -> None:
    path = "/etc/apparmor.d/abstractions/libvirt-qemu.d/iommufd_host"
    assert _host_files.apparmor_file() == {"path": path, "content": OURS + APPARMOR}


def test_the_launcher() -> None:
    assert _host_files.launcher() == {"path": "/usr/local/bin/iommufd-exec", "program": "iommufd-exec"}
    assert LAUNCHER == "/usr/local/bin/iommufd-exec"


@pytest.mark.parametrize(
    ("grant", "setting"),
    [
        ({"privilege": "cap_ipc_lock", "value": "ambient"}, "AmbientCapabilities=CAP_IPC_LOCK"),
        ({"privilege": "memlock", "value": 2**30}, "LimitMEMLOCK=1073741824"),
        ({"privilege": "memlock", "value": None}, "LimitMEMLOCK=infinity"),
    ],
)
def test_the_drop_in_of_a_unit(grant: Row, setting: str) -> None:
    row = _host_files.drop_in({**grant, "grantee": "vm@.service"})
    path = "/etc/systemd/system/vm@.service.d/50-iommufd_host.conf"
    assert row == {"path": path, "content": f"{OURS}[Service]\n{setting}\n"}
    assert _host_files.unit_with_drop_in(path) == "vm@.service"


@pytest.mark.parametrize("unit", ["vm1.service", "vm@.service", "vm@1.service", r"a\x2db:c_d-e.f@.service"])
def test_the_unit_of_a_drop_in(unit: str) -> None:
    row = _host_files.drop_in({"privilege": "memlock", "grantee": unit, "value": None})
    assert _host_files.unit_with_drop_in(row["path"]) == unit


@pytest.mark.parametrize(
    "path",
    [
        "",
        "50-iommufd_host.conf",
        "/etc/systemd/system/vm1.service",
        "/etc/systemd/system/vm1.service.d",
        "/etc/systemd/system/vm1.service.d/",
        "/etc/systemd/system/vm1.service.d/override.conf",
        "/etc/systemd/system/vm1.service.d/50-iommufd_hostXconf",
        "/etc/systemd/system/vm1.service.d/50-iommufd_host.conf.bak",
        "/etc/systemd/system/vm1.service.d/50-iommufd_host.conf\n",
        "/etc/systemd/system/vm1.service/50-iommufd_host.conf",
        "/etc/systemd/system/50-iommufd_host.conf",
        "/etc/systemd/system/.d/50-iommufd_host.conf",
        "/etc/systemd/system/.service.d/50-iommufd_host.conf",
        "/etc/systemd/system/vm1.socket.d/50-iommufd_host.conf",
        # Not where the role puts them.
        "/run/systemd/system/vm1.service.d/50-iommufd_host.conf",
        "/opt/etc/systemd/system/vm1.service.d/50-iommufd_host.conf",
        "etc/systemd/system/vm1.service.d/50-iommufd_host.conf",
        "/etc/systemd/system/../system/vm1.service.d/50-iommufd_host.conf",
        "/etc/systemd/system/a/vm1.service.d/50-iommufd_host.conf",
        "/etc/systemd/system/vm1.service.d/a/50-iommufd_host.conf",
        # What systemctl would take for a pattern, or for several names.
        "/etc/systemd/system/*.service.d/50-iommufd_host.conf",
        "/etc/systemd/system/vm?.service.d/50-iommufd_host.conf",
        "/etc/systemd/system/vm[12].service.d/50-iommufd_host.conf",
        "/etc/systemd/system/a.service b.service.d/50-iommufd_host.conf",
        "/etc/systemd/system/a.service\nb.service.d/50-iommufd_host.conf",
        "/etc/systemd/system/ä.service.d/50-iommufd_host.conf",
    ],
)
def test_what_is_no_drop_in_of_ours(path: str) -> None:
    assert _host_files.unit_with_drop_in(path) is None


def test_the_limits_of_users() -> None:
    grants: list[Row] = [
        {"grantee": "alice", "value": 2**30},
        # PAM has no smaller unit, and less than what was asked for would not do.
        {"grantee": "bob", "value": 2**20 + 1},
        {"grantee": "carol", "value": None},
        {"grantee": "alice", "value": 2**30},
    ]
    lines = "# Counted in KiB.\nalice - memlock 1048576\nbob - memlock 1025\ncarol - memlock unlimited\n"
    row = {"path": "/etc/security/limits.d/80-iommufd_host.conf", "content": OURS + lines}
    assert _host_files.limits_file(grants) == row


SERVICE = """\
# A package upgrade replaces an emulator, and its file capability goes with the old one.

[Unit]
Description=Give CAP_IPC_LOCK back to emulators that a package upgrade took it from
StartLimitIntervalSec=0

[Service]
Type=oneshot
# It fails where an emulator was left as it is, and says why; one that is gone needs nothing.
ExecStart=/usr/local/libexec/iommufd-host-grant --until-quiet=30 {emulators}
TimeoutStartSec=10min
# It finds files that root may read, and gives them a capability.
CapabilityBoundingSet=CAP_DAC_READ_SEARCH CAP_SETFCAP
NoNewPrivileges=true
PrivateNetwork=true
RestrictNamespaces=true
RestrictRealtime=true
LockPersonality=true
SystemCallArchitectures=native
UMask=0077
"""

WATCH = """\

[Unit]
Description=Watch emulators that have CAP_IPC_LOCK for package upgrades

[Path]
{watched}

[Install]
WantedBy=paths.target
"""

TIMER = """\

[Unit]
Description=Look now and then whether emulators still have CAP_IPC_LOCK

[Timer]
# At boot, and for what the watch misses.
OnBootSec=5s
OnUnitInactiveSec=5min

[Install]
WantedBy=timers.target
"""


@pytest.mark.parametrize(
    ("emulators", "watched"),
    [
        ({QEMU: QEMU}, [QEMU]),
        # What changes is the file at the end of a link.
        ({"/usr/bin/kvm": QEMU}, ["/usr/bin/kvm", QEMU]),
        ({"/usr/bin/kvm": QEMU, "/opt/q": "/opt/q-1"}, ["/usr/bin/kvm", QEMU, "/opt/q", "/opt/q-1"]),
        # Each once, though two lead there.
        ({"/usr/bin/kvm": QEMU, QEMU: QEMU}, ["/usr/bin/kvm", QEMU]),
    ],
)
def test_what_gives_emulators_their_capability_back(emulators: dict[str, str], watched: list[str]) -> None:
    lines = "\n".join(f"PathChanged={each}" for each in watched)
    units = "/etc/systemd/system/iommufd-host-grant"
    assert _host_files.grant_files(emulators) == [
        {"path": PROGRAM, "program": "iommufd-host-grant"},
        {"path": f"{units}.service", "content": OURS + SERVICE.format(emulators=" ".join(emulators))},
        {"path": f"{units}.path", "content": OURS + WATCH.format(watched=lines)},
        {"path": f"{units}.timer", "content": OURS + TIMER},
    ]
