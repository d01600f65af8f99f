# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the files that the role iommufd_host writes, in the form that its module takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os.path import basename
from typing import Any

from ..module_utils._device import DEVICE
from ..module_utils._policy import CONTAINER, NO_NODE, POLICY_FILE, VFIO_DEVICE
from ..module_utils._programs import EXEC, GRANT, LAUNCHER
from ..module_utils._unit_files import DROP_IN

__all__ = (
    "apparmor_file",
    "daemon_drop_in",
    "drop_in",
    "grant_files",
    "is_of_daemon",
    "launcher",
    "limits_file",
    "modules_file",
    "policy_file",
    "type_of",
    "udev_rules",
    "unit_with_drop_in",
)

Row = dict[str, Any]

_MODULES_FILE = "/etc/modules-load.d/iommufd_host.conf"
_UDEV_FILE = "/etc/udev/rules.d/80-iommufd_host.rules"
_LIMITS_FILE = "/etc/security/limits.d/80-iommufd_host.conf"
_APPARMOR_FILE = "/etc/apparmor.d/abstractions/libvirt-qemu.d/iommufd_host"
_UNITS = "/etc/systemd/system"
_DROP_IN = "50-iommufd_host.conf"
_GRANT_PROGRAM = "/usr/local/libexec/iommufd-host-grant"

# Only what is the name of a service reaches systemctl, which takes some others for patterns.
_DROP_IN_PATH = re.compile(rf"{re.escape(_UNITS)}/([A-Za-z0-9:_.\\@-]+\.service)\.d/{re.escape(_DROP_IN)}")

_OURS = "Put here by the Ansible role virt.iommufd.iommufd_host, which takes it away again."


def modules_file(modules: Iterable[str]) -> Row:
    """What loads kernel modules at boot."""
    return _file(_MODULES_FILE, modules)


def udev_rules(group: str, mode: str) -> Row:
    """The rule that lets a group at the device nodes. Either may be empty."""
    rights = [f'{name}="{value}"' for name, value in (("GROUP", group), ("MODE", mode)) if value]
    matches = ('SUBSYSTEM=="misc", KERNEL=="iommu"', 'SUBSYSTEM=="vfio-dev"')
    return _file(_UDEV_FILE, [", ".join([match, *rights]) for match in matches])


def apparmor_file() -> Row:
    """What AppArmor has to allow a QEMU of libvirt's that opens its iommufd and its devices of VFIO by itself."""
    lines = [
        "# For a QEMU that opens its iommufd and its devices of VFIO by itself. No line can be spared.",
        "/dev/iommu rw,",
        "/dev/vfio/devices/vfio[0-9]* rw,",
        "/sys/devices/**/vfio-dev/ r,",
        "/sys/devices/**/vfio-dev/vfio[0-9]*/dev r,",
    ]
    return _file(_APPARMOR_FILE, lines)


def policy_file(selinux: Mapping[str, Any], opens: bool) -> Row:
    """What SELinux's policy has to allow a QEMU of libvirt's that has CAP_IPC_LOCK, and, if it opens its nodes, those.

    What a policy knows no type for is left out, also by one that comes later: no upgrade of it fails on this.
    """
    labels = selinux["labels"]
    vfio = type_of(labels[CONTAINER])
    known = (vfio, type_of(labels[NO_NODE]))
    # A node that has only what any node has gets the label of VFIO's. These patterns are nobody else's, so they are in
    # conflict with no other rule; and one for the very path goes before them.
    patterns = {DEVICE: "/dev/(iommu)", VFIO_DEVICE: "/dev/vfio/devices/(vfio)[0-9]+"}
    ours = [patterns[path] for path in patterns if type_of(labels[path]) in known] if opens else []
    nodes = dict.fromkeys(vfio if type_of(labels[path]) in known else type_of(labels[path]) for path in patterns)
    lines = []
    if ours:
        user, role = labels[CONTAINER].split(":")[:2]
        lines = ["(optional iommufd_host_labels"]
        lines += [f'  (filecon "{each}" char ({user} {role} {vfio} ((s0) (s0))))' for each in ours] + [")"]
    for domain in dict.fromkeys(type_of(each["context"]) for each in selinux["domains"]):
        lines += [f"(optional iommufd_host_{domain}", f"  (allow {domain} self (capability (ipc_lock)))"]
        if opens:
            sysfs = type_of(selinux["sysfs"])
            lines += [f"  (allow {domain} {node} (chr_file (getattr ioctl map open read write)))" for node in nodes]
            # There it finds the node of a device.
            lines += [f"  (allow {domain} {sysfs} (lnk_file (getattr read)))"]
            lines += [f"  (allow {domain} {sysfs} (file (getattr open read)))"]
        lines += [")"]
    return _file(POLICY_FILE, lines, comment=";")


def type_of(label: str) -> str:
    """The type in a context of SELinux's."""
    return label.split(":")[2]


def launcher() -> Row:
    """The launcher, which is made on the host."""
    return {"path": LAUNCHER, "program": EXEC}


def drop_in(grant: Mapping[str, Any]) -> Row:
    """What gives a unit the capability, or another limit."""
    limit = "infinity" if grant["value"] is None else grant["value"]
    setting = "AmbientCapabilities=CAP_IPC_LOCK" if grant["privilege"] == "cap_ipc_lock" else f"LimitMEMLOCK={limit}"
    return _file(f"{_UNITS}/{grant['grantee']}.d/{_DROP_IN}", ["[Service]", setting])


def daemon_drop_in(unit: str, settings: Iterable[str]) -> Row:
    """What gives libvirt's daemon CAP_SYS_RESOURCE back. Nothing that takes it away may be read after it."""
    return _file(f"{_UNITS}/{unit}.d/{DROP_IN}", ["[Service]", *settings])


def is_of_daemon(path: str) -> bool:
    """Whether a file is that."""
    return basename(path) == DROP_IN


def unit_with_drop_in(path: str) -> str | None:
    """The unit that a file is a drop-in of the role for; None where it is another file."""
    found = _DROP_IN_PATH.fullmatch(path)
    return found[1] if found else None


def limits_file(grants: Iterable[Mapping[str, Any]]) -> Row:
    """What raises users' limits for their sessions. PAM counts in KiB."""
    limits = {
        grant["grantee"]: "unlimited" if grant["value"] is None else (grant["value"] + 1023) // 1024 for grant in grants
    }
    return _file(_LIMITS_FILE, ["# Counted in KiB.", *(f"{user} - memlock {limit}" for user, limit in limits.items())])


def grant_files(emulators: Mapping[str, str]) -> list[Row]:
    """What gives emulators their capability back, by their paths and those without symbolic links."""
    program = {"path": _GRANT_PROGRAM, "program": GRANT}
    # What changes is the file at the end of a link.
    watched = dict.fromkeys(each for pair in emulators.items() for each in pair)
    service = [
        "# A package upgrade replaces an emulator, and its file capability goes with the old one.",
        "",
        "[Unit]",
        "Description=Give CAP_IPC_LOCK back to emulators that a package upgrade took it from",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=oneshot",
        "# It fails where an emulator was left as it is, and says why; one that is gone needs nothing.",
        f"ExecStart={_GRANT_PROGRAM} --until-quiet=30 {' '.join(emulators)}",
        "TimeoutStartSec=10min",
        "# It finds files that root may read, and gives them a capability.",
        "CapabilityBoundingSet=CAP_DAC_READ_SEARCH CAP_SETFCAP",
        "NoNewPrivileges=true",
        "PrivateNetwork=true",
        "RestrictNamespaces=true",
        "RestrictRealtime=true",
        "LockPersonality=true",
        "SystemCallArchitectures=native",
        "UMask=0077",
    ]
    watch = [
        "",
        "[Unit]",
        "Description=Watch emulators that have CAP_IPC_LOCK for package upgrades",
        "",
        "[Path]",
        *(f"PathChanged={each}" for each in watched),
        "",
        "[Install]",
        "WantedBy=paths.target",
    ]
    timer = [
        "",
        "[Unit]",
        "Description=Look now and then whether emulators still have CAP_IPC_LOCK",
        "",
        "[Timer]",
        "# At boot, and for what the watch misses.",
        "OnBootSec=5s",
        "OnUnitInactiveSec=5min",
        "",
        "[Install]",
        "WantedBy=timers.target",
    ]
    kinds = {"service": service, "path": watch, "timer": timer}
    return [program, *(_file(f"{_UNITS}/{GRANT}.{kind}", lines) for kind, lines in kinds.items())]


def _file(path: str, lines: Iterable[str], comment: str = "#") -> Row:
    return {"path": path, "content": "".join(f"{line}\n" for line in (f"{comment} {_OURS}", *lines))}
