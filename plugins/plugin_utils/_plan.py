# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: from what a host is and what is asked for, what the role iommufd_host is to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..module_utils._errors import IommufdError
from ..module_utils._foreign import harmless
from ..module_utils._policy import POLICY_FILE
from ._host_files import (
    apparmor_file,
    drop_in,
    grant_files,
    launcher,
    limits_file,
    modules_file,
    policy_file,
    udev_rules,
)
from ._host_info import daemon_is_barred, has_iommufd, has_libvirt, own_emulators
from ._plan_errors import (
    check_errors,
    input_errors,
    is_name,
    memlock_bytes,
    policy_errors,
    privilege_errors,
    strategy_errors,
    support_errors,
    writer_errors,
)

__all__ = ("host_plan", "unit_name")

Row = dict[str, Any]

_QEMU_CONF = "/etc/libvirt/qemu.conf"
# What gives emulators their capability back, of grant_files.
_GRANT_UNITS = ("iommufd-host-grant.path", "iommufd-host-grant.timer")
# As shell patterns.
_NODES = ["/dev/iommu", "/dev/vfio/devices/*"]
# Devices come and go, and qemu.conf takes no patterns; libvirt leaves out of cgroup_device_acl what is not there.
_VFIO_NODES = [f"/dev/vfio/devices/vfio{number}" for number in range(16)]

_DEFAULTS: Row = {
    "state": "present",
    "strategy": "auto",
    "fallback": "cap_ipc_lock",
    "emulators": [],
    "units": [],
    "user": "",
    "libvirt_user": "",
    "memlock": "",
    "memlock_users": [],
    "modules": ["iommufd", "vfio-pci"],
    "device_group": "",
    "device_mode": "",
    "qemu_access": False,
    "launcher": False,
    "architecture": "",
    "apparmor": False,
}

_NOTHING: Row = {
    **{name: [] for name in ("modules", "files", "capabilities", "nodes", "blocks", "units")},
    "group": "",
    "mode": "",
    "reload": False,
}


class Choice(NamedTuple):
    """A strategy, whether it was chosen without a guess, and why."""

    strategy: str
    certain: bool
    why: str


class Access(NamedTuple):
    """Whether QEMU is to be let at the device nodes, what is said of that, and what stands against it."""

    opens: bool
    said: list[str]
    errors: list[str]


def host_plan(info: object, config: object, check: object = None) -> Row:
    """The plan, as the filter _host_plan returns it. Raises IommufdError where it is not given what it takes."""
    if not isinstance(info, Mapping) or not isinstance(config, Mapping) or not isinstance(check, (Mapping, type(None))):
        raise IommufdError("It takes what virt.iommufd.iommufd_info returned, and the inputs of the role as config.")
    try:
        # The modules give printable texts. A host that is not to be trusted gives what it likes. What is made of that
        # may have lines: files do.
        return _plan(harmless(info["host"]), {**_DEFAULTS, **config}, harmless(check))
    except KeyError as exc:
        raise IommufdError(f"There is no {exc} in its input.") from exc


def _plan(host: Row, config: Row, check: Row | None) -> Row:
    libvirt = host["libvirt"]
    emulators = config["emulators"] or own_emulators(host["qemu"], config["architecture"])
    units = [unit_name(name) for name in config["units"]]
    wrong = input_errors(config)
    config = {**config, "user": _user(config, libvirt, check)}
    choice = choose(config, libvirt)
    chosen = choice.strategy
    selinux = check["selinux"] if check and has_libvirt(libvirt) else None
    access = _access(config, libvirt, selinux)
    granted = emulators if choice.strategy == "cap_ipc_lock" and _are_granted(config, libvirt) else []
    # Its policy may let no VM of libvirt's use the capability, or open a node.
    policy = selinux if selinux and selinux["domains"] and (granted or access.opens) else None
    errors = (
        wrong
        or privilege_errors(host["caller"])
        or support_errors(host)
        or strategy_errors(choice.strategy, config, libvirt, emulators) + writer_errors(host, emulators) + access.errors
        or ([] if check is None else check_errors(check, config["emulators"] or granted, units, choice.strategy))
        or policy_errors(policy, access.opens)
    )
    if config["state"] == "present" and not has_iommufd(host):
        choice = choice._replace(strategy="observe", why=" ".join(errors))
    grants = [] if errors else _grants(choice.strategy, granted, units, config)
    wanted = _NOTHING if errors else _wanted(grants, config, access.opens, host, check)
    if policy and not errors:
        wanted = {**wanted, "files": [*wanted["files"], policy_file(policy, access.opens)]}
    have = [each["path"] for each in host["qemu"] if each["cap_ipc_lock"]]
    return {
        "state": config["state"],
        "supported": has_iommufd(host),
        "kernel": host["kernel"],
        "errors": errors,
        "requested": config["strategy"],
        "chosen": chosen,
        **choice._asdict(),
        "user": config["user"],
        # Where units alone start VMs, nothing depends on the host's own.
        "emulators": emulators if granted or not units or has_libvirt(libvirt) else config["emulators"],
        "units_of_vms": units,
        "memlock_users": config["memlock_users"] if choice.strategy == "memlock" else [],
        "grants": grants,
        "files_of_grants": [each["path"] for each in _files_of_grants(grants)],
        "wanted": wanted,
        "untried": [path for path in wanted["capabilities"] if path not in have],
        "access": access.said,
        "policy": [*(["ipc_lock"] if granted else []), *(["opens"] if access.opens else [])] if policy else [],
    }


def unit_name(name: str) -> str:
    """A unit's name with its type, as systemctl takes it without."""
    return name if name.endswith(".service") else f"{name}.service"


def _user(config: Row, libvirt: Row, check: Row | None) -> str:
    """The user that VMs run as: the one that is given, else libvirt's, else that of the first unit that has one.

    libvirt's is the one that it shows to have, else the one that it has on hosts of this distribution.
    """
    if config["user"] or has_libvirt(libvirt):
        shown = libvirt["user"] if libvirt["uid"] is not None and is_name(libvirt["user"] or "") else ""
        return str(config["user"] or shown or config["libvirt_user"])
    users = [each["user"] for each in check["units"] if each["user"]] if check else []
    return users[0] if users else "root"


def choose(config: Row, libvirt: Row) -> Choice:
    """The strategy that is asked for, or the one that suits the host."""
    if config["state"] == "absent":
        return Choice("observe", True, "iommufd_host_state is absent.")
    if config["strategy"] != "auto":
        certain = config["strategy"] != "native" or libvirt["sets_rlimit_mode"] is not None
        return Choice(config["strategy"], certain, f"It was asked for.{'' if certain else ' ' + libvirt['reason']}")
    return _choose_by_host(config, libvirt)


def _choose_by_host(config: Row, libvirt: Row) -> Choice:
    reason, sets, there = libvirt["reason"], libvirt["sets_rlimit_mode"], has_libvirt(libvirt)
    named = bool(config["units"] or config["emulators"])
    if sets and not named:
        return Choice("native", True, reason)
    if not there and not named and config["launcher"]:
        return Choice("observe", True, f"{reason} What starts VMs with iommufd-exec has each charged for itself.")
    if not there and not named:
        return Choice(
            "observe",
            False,
            f"{reason} Neither units nor emulators were named either, so there is nothing to grant anything to: name in"
            " iommufd_host_units what starts the VMs of this host.",
        )
    if config["fallback"] == "observe":
        return Choice("observe", sets is not None, f"{reason} And iommufd_host_fallback is observe.")
    if daemon_is_barred(libvirt) and not named:
        # No capability of the emulator's would help. What would is said as an error.
        return Choice("native", True, reason)
    if sets:
        why = "But that is of no use to the units and emulators that were named."
    elif sets is None:
        why = "So CAP_IPC_LOCK is granted to be on the safe side, and may be more than is needed."
    else:
        why = ""
    return Choice("cap_ipc_lock", sets is not None, f"{reason} {why}".strip())


def _are_granted(config: Row, libvirt: Row) -> bool:
    """Whether emulators get CAP_IPC_LOCK: those that were named; or where libvirt may start VMs without the mode."""
    libvirts = has_libvirt(libvirt) and not libvirt["sets_rlimit_mode"] and not daemon_is_barred(libvirt)
    return bool(config["emulators"]) or not config["units"] or libvirts


def _access(config: Row, libvirt: Row, selinux: Row | None) -> Access:
    """Whether QEMU is to be let at the device nodes."""
    if not config["qemu_access"]:
        return Access(False, [], [])
    if libvirt["unit"] is None:
        error = "iommufd_host_qemu_access is for the system libvirt, and there is none here: leave it out."
        return Access(False, [], [error])
    if libvirt["supports_iommufd"]:
        # For such devices, QEMU opens no node by itself.
        said = f"Nothing: libvirt {libvirt['version']} opens the device nodes itself and passes them to QEMU."
        return Access(False, [said], [])
    steps = [
        f"udev gives the device nodes to group {config['device_group'] or config['user']}",
        f"cgroup_device_acl in {_QEMU_CONF} has the device nodes",
    ]
    if config["apparmor"]:
        steps.append(f"AppArmor lets QEMU open them: {apparmor_file()['path']}")
    if selinux and selinux["domains"]:
        steps.append(f"SELinux lets QEMU open them: {POLICY_FILE}")
    return Access(True, steps, [])


def _grants(strategy: str, capabilities: list[str], units: list[str], config: Row) -> list[Row]:
    """What is granted, to whom and by what means. A limit's value is in bytes, None for unlimited."""
    if strategy == "cap_ipc_lock":
        given = [
            {"privilege": "cap_ipc_lock", "grantee": path, "means": "file capability", "value": "ep"}
            for path in capabilities
        ]
        return given + [
            {"privilege": "cap_ipc_lock", "grantee": unit, "means": "drop-in", "value": "ambient"} for unit in units
        ]
    if strategy != "memlock":
        return []
    limit = memlock_bytes(config["memlock"])
    raised = [{"privilege": "memlock", "grantee": unit, "means": "drop-in", "value": limit} for unit in units]
    return raised + [
        {"privilege": "memlock", "grantee": user, "means": "limits.d", "value": limit}
        for user in config["memlock_users"]
    ]


def _files_of_grants(grants: list[Row]) -> list[Row]:
    """The files that are a grant to a unit or a user."""
    raised = [grant for grant in grants if grant["means"] == "limits.d"]
    drop_ins = [drop_in(grant) for grant in grants if grant["means"] == "drop-in"]
    return drop_ins + ([limits_file(raised)] if raised else [])


def _wanted(grants: list[Row], config: Row, opens: bool, host: Row, check: Row | None) -> Row:
    """What the host is to have, as iommufd_host_apply takes it."""
    group, mode = config["device_group"], config["device_mode"]
    if opens:
        group, mode = group or config["user"], mode or "0660"
    granted = [grant["grantee"] for grant in grants if grant["means"] == "file capability"]
    nodes = list(_NODES) if group or mode else []
    devices = [_NODES[0], *dict.fromkeys([*_VFIO_NODES, *(each["node"] for each in host["vfio_devices"])])]
    files = [modules_file(config["modules"])]
    files += [udev_rules(group, mode)] if nodes else []
    files += [launcher()] if config["launcher"] else []
    files += [apparmor_file()] if opens and config["apparmor"] else []
    files += _files_of_grants(grants)
    real = {each["path"]: each["real_path"] for each in check["emulators"]} if check else {}
    files += grant_files({path: real.get(path, path) for path in granted}) if granted else []
    return {
        "modules": config["modules"],
        "files": files,
        "capabilities": granted,
        "nodes": nodes,
        "group": group,
        "mode": mode,
        "blocks": [{"path": _QEMU_CONF, "devices": devices}] if opens else [],
        "units": list(_GRANT_UNITS) if granted else [],
        "reload": any(unit["outdated"] for unit in check["units"]) if check else False,
    }
