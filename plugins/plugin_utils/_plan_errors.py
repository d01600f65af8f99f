# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what stands against a plan of the role iommufd_host, each a sentence with the way out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import basename
from typing import Any

from ..module_utils._errors import IommufdError
from ..module_utils._policy import CONTAINER, NO_NODE
from ..module_utils._size import parse_size
from ..module_utils._unit_files import DROP_IN
from ._host_files import type_of
from ._host_info import daemon_cure, daemon_is_barred, given_back, has_iommufd

__all__ = (
    "check_errors",
    "daemon_errors",
    "input_errors",
    "is_name",
    "memlock_bytes",
    "mends_daemon",
    "policy_errors",
    "privilege_errors",
    "strategy_errors",
    "support_errors",
    "writer_errors",
)

_NO_IOMMUFD = (
    "Kernel {kernel} has no iommufd: it was built without CONFIG_IOMMUFD. Debian's kernels are; Red Hat's and those of"
    " Ubuntu 26.04 have it. Boot a kernel that has it: Linux 6.2 or later, and 6.6 with CONFIG_VFIO_DEVICE_CDEV for"
    " devices of VFIO. Or set iommufd_host_required to false, to have this reported instead."
)

_ITSELF = " Or set iommufd_host_libvirt_unit to true, and the role writes such a drop-in itself."


def memlock_bytes(value: object) -> int | None:
    """A limit in bytes, None for unlimited. Raises IommufdError."""
    return None if value in ("infinity", "unlimited") else parse_size(value, minimum=1)


def input_errors(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the inputs themselves, whatever the host."""
    errors = [
        f"{path!r} in iommufd_host_emulators is not an absolute path of letters, digits and any of ._+@- alone."
        for path in config["emulators"]
        # It goes into files of systemd, to which other characters mean something.
        if not re.fullmatch(r"(/[A-Za-z0-9._+@-]+)+", path)
    ]
    errors += [
        f"{name!r} in iommufd_host_units is not the name of a service unit, such as vm1.service or vm@.service."
        for name in config["units"]
        if not re.fullmatch(r"[A-Za-z0-9:_.\\@-]{1,240}", name) or re.search(r"\.(?!service$)[a-z]+$", name)
    ]
    if config["device_mode"] and not re.fullmatch("0?[0-7]{3}", config["device_mode"]):
        errors.append(f"iommufd_host_device_mode, {config['device_mode']!r}, is not an octal mode such as 0660.")
    for name in ("device_group", "user"):
        if config[name] and not is_name(config[name]):
            errors.append(f"iommufd_host_{name}, {config[name]!r}, is not a name.")
    return errors


def is_name(text: str) -> bool:
    """Whether that can be the name of a user or a group. It goes into files of udev's, among others."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?", text) is not None


def privilege_errors(caller: Mapping[str, Any]) -> list[str]:
    """What the one who runs the role lacks to configure the host and to prove it."""
    if caller["uid"] != 0:
        return [
            f"The role has to run as root on the host, and runs as uid {caller['uid']}: set become: true, for a user"
            " who may become root there."
        ]
    if not caller["initial_user_namespace"]:
        return [
            "The role has to run in the host's initial user namespace, outside of any container: the capabilities of"
            " another one count for nothing here."
        ]
    needed = {
        "cap_sys_resource": "to set the rlimit mode",
        "cap_sys_ptrace": "to look at VMs that run",
    }
    return [
        f"Root lacks {capability.upper()} here, which it takes {purpose}: run the role outside of any container or"
        " sandbox."
        for capability, purpose in needed.items()
        if capability not in caller["capabilities"]
    ]


def writer_errors(host: Mapping[str, Any], emulators: list[str]) -> list[str]:
    """Which emulators can be written by somebody else than root, who could make anything of what is granted."""
    written = {each["path"]: each["writer"] for each in host["qemu"] if each["writer"]}
    return [
        f"The emulator {path} cannot be trusted: {written[path]['place']} can be written by {written[path]['who']}, who"
        " would get with it whatever is granted. Have it and all folders on the way to it be root's alone, or name"
        " others in iommufd_host_emulators."
        for path in emulators
        if path in written
    ]


def check_errors(check: Mapping[str, Any], emulators: list[str], units: list[str], strategy: str) -> list[str]:
    """What stands against a grant to these emulators and units, as they are on the host."""
    errors = []
    looked = {each["path"]: each for each in check["emulators"]}
    for path in emulators:
        emulator = looked[path]
        if not emulator["present"]:
            errors.append(f"There is no emulator {path}: name those of this host in iommufd_host_emulators.")
        elif emulator["writer"]:
            errors += emulator["obstacles"]
        elif not emulator["is_emulator"]:
            errors.append(
                f"{path} is not an emulator: name executables in iommufd_host_emulators, not scripts or folders."
            )
        elif strategy == "cap_ipc_lock":
            errors += emulator["obstacles"]
    errors += [
        f"This host has no user {each['user']!r}: name those that it has in iommufd_host_memlock_users."
        for each in check["users"]
        if not each["present"]
    ]
    for unit in check["units"]:
        if not unit["present"]:
            why = " ".join(unit["obstacles"]) or f"systemd has no unit {unit['name']}."
            errors.append(f"{why} Name in iommufd_host_units what starts the VMs of this host.")
        elif strategy == "cap_ipc_lock":
            errors += unit["obstacles"]
    return errors


def policy_errors(selinux: Mapping[str, Any] | None, opens: bool) -> list[str]:
    """What keeps SELinux's policy from letting a QEMU of libvirt's use CAP_IPC_LOCK, and open its nodes."""
    if not selinux or not selinux["domains"]:
        return []
    labels = selinux["labels"]
    if selinux["msg"]:
        return [f"{selinux['msg']} The role takes semodule, matchpathcon and restorecon there: install them."]
    contexts = [*labels.values(), selinux["sysfs"], *(each["context"] for each in selinux["domains"])]
    odd = [each for each in contexts if not re.fullmatch(r"\w+:\w+:\w+(:s0)?", each, re.ASCII)]
    if odd:
        return [f"The policy of SELinux has a label of a form that is not known here: {odd[0]!r}."]
    if opens and type_of(labels[CONTAINER]) == type_of(labels[NO_NODE]):
        return [
            f"SELinux's policy has no type for VFIO's nodes: {CONTAINER} would be {labels[CONTAINER]}, as any node."
            " QEMU is not let at all that has this: leave iommufd_host_qemu_access out, or add a type to the policy."
        ]
    return []


def support_errors(host: Mapping[str, Any]) -> list[str]:
    """That the running kernel has no iommufd, not even in a module."""
    return [] if has_iommufd(host) else [_NO_IOMMUFD.format(kernel=host["kernel"])]


def mends_daemon(config: Mapping[str, Any], libvirt: Mapping[str, Any]) -> bool:
    """Whether a daemon that may not set the mode may set it by what the role does, and once it is started again.

    `restarted` of the config: it has just been.
    """
    if not config["libvirt_unit"] or config["restarted"] or not daemon_is_barred(libvirt):
        return False
    return bool(given_back(libvirt) if libvirt["drop_in"] else libvirt["needs_restart"] or libvirt["unit_outdated"])


def daemon_errors(config: Mapping[str, Any], libvirt: Mapping[str, Any]) -> list[str]:
    """What keeps the role from giving libvirt's daemon back what its unit's files take away, where it is to do that."""
    if not config["libvirt_unit"] or not libvirt["supports_iommufd"]:
        return []
    unit, lines = libvirt["unit"], libvirt["taken_by"]
    if lines is None:
        return [
            f"iommufd_host_libvirt_unit is not to be had: which lines of its files take CAP_SYS_RESOURCE from {unit} is"
            " not known, and so not what gives it back. host.libvirt and host.limits_of_view of iommufd_info tell more."
        ]
    return [
        f"'{each['path']}:{each['line']}: {each['text']}' would take away what the role gives {unit} in {DROP_IN},"
        f" since it is read later: give {each['path']} a name that sorts before {DROP_IN}."
        for each in lines
        # What is not in a drop-in is read first. Who the daemon runs as may stand anywhere.
        if "service.d/" in each["path"]
        if basename(each["path"]) > DROP_IN and not each["text"].startswith(("User=", "DynamicUser=", "SecureBits="))
    ]


def strategy_errors(
    strategy: str, config: Mapping[str, Any], libvirt: Mapping[str, Any], emulators: list[str]
) -> list[str]:
    """What keeps the strategy from being carried out."""
    if strategy == "native" and daemon_is_barred(libvirt):
        if mends_daemon(config, libvirt):
            return []
        itself = "" if config["libvirt_unit"] or not libvirt["drop_in"] else _ITSELF
        return [
            f"{daemon_cure(libvirt)}{itself} CAP_IPC_LOCK of the emulator would be of no use, since libvirt itself"
            " fails. Then run the role again. If libvirt is to start no such domain, set iommufd_host_strategy to"
            " observe, or name in iommufd_host_units what starts the VMs of this host."
        ]
    if strategy == "native" and libvirt["sets_rlimit_mode"] is False:
        return [f"The strategy native is not to be had: {libvirt['reason']} Set iommufd_host_strategy to auto."]
    if strategy == "cap_ipc_lock" and not config["units"] and not emulators:
        return [
            "There is nothing to grant CAP_IPC_LOCK to: this host has no emulator for its own architecture, or libvirt"
            " runs elsewhere. Name some in iommufd_host_emulators, or units in iommufd_host_units."
        ]
    if strategy != "memlock":
        return []
    errors = []
    if not config["units"] and not config["memlock_users"]:
        errors.append(
            "The strategy memlock needs to know whose limit to raise: name units in iommufd_host_units, or users in"
            " iommufd_host_memlock_users."
        )
    try:
        memlock_bytes(config["memlock"])
    except IommufdError as exc:
        errors.append(f"iommufd_host_memlock: {exc} Or give infinity.")
    return errors
