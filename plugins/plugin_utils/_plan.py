# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: from what a host is and what is asked for, what the role iommufd_host is to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..module_utils._errors import IommufdError
from ..module_utils._foreign import harmless
from ..module_utils._iommufd import NONE
from ..module_utils._policy import POLICY_FILE
from ._host_files import (
    apparmor_file,
    daemon_drop_in,
    drop_in,
    grant_files,
    launcher,
    limits_file,
    modules_file,
    policy_file,
    udev_rules,
)
from ._host_info import (
    NONSENSE,
    daemon_is_barred,
    given_back,
    has_iommufd,
    has_libvirt,
    is_elsewhere,
    nonsense,
    own_emulators,
)
from ._plan_errors import (
    check_errors,
    daemon_errors,
    input_errors,
    is_name,
    memlock_bytes,
    mends_daemon,
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
    "libvirt_unit": False,
    "restarted": False,
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
        return _plan(harmless(info["host"]), harmless(info["processes"]), {**_DEFAULTS, **config}, harmless(check))
    except NONSENSE as exc:
        raise nonsense(exc) from exc


def _plan(host: Row, processes: list[Row], config: Row, check: Row | None) -> Row:
    libvirt = host["libvirt"]
    usual = config["emulators"] or _seen(own_emulators(host["qemu"], config["architecture"]), host)
    known = config["emulators"] or _known_emulators(host, usual, check)
    named = [unit_name(name) for name in config["units"]]
    units = _main_names(named, check)
    bare = []
    if check is not None:
        bare = [each["main"] for each in check["units"] if each["present"] and not _gets_ipc_lock(each)]
        check = {**check, "units": [each for each in check["units"] if each["name"] in named]}
    wrong = input_errors(config)
    user, guessed = _user(config, libvirt, check, processes, known)
    config = {**config, "user": user}
    choice = choose(config, libvirt, known or _missing(host["qemu"]))
    chosen = choice.strategy
    selinux = check["selinux"] if check and has_libvirt(libvirt) else None
    access = _access(config, libvirt, guessed, selinux)
    granted = known if choice.strategy == "cap_ipc_lock" and _are_granted(config, libvirt) else []
    emulators = granted or usual
    if granted:
        unsure = " ".join(filter(None, (guessed, "" if config["emulators"] else _left_out(host["qemu"], granted))))
        choice = choice._replace(certain=choice.certain and not unsure, why=f"{choice.why} {unsure}".strip())
    # Its policy may let no VM of libvirt's use the capability, or open a node.
    policy = selinux if selinux and selinux["domains"] and (granted or access.opens) else None
    errors = (
        wrong
        or privilege_errors(host["caller"])
        or support_errors(host)
        or strategy_errors(choice.strategy, config, libvirt, granted) + writer_errors(host, emulators) + access.errors
        or daemon_errors(config, libvirt)
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
        "other_units": _other_units(processes, named),
        "bare_units": bare,
        "memlock_users": config["memlock_users"] if choice.strategy == "memlock" else [],
        "grants": grants,
        "files_of_grants": [each["path"] for each in _files_of_grants(grants)],
        "wanted": wanted,
        "untried": [path for path in wanted["capabilities"] if path not in have],
        "access": access.said,
        "mends_daemon": mends_daemon(config, libvirt),
        "policy": [*(["ipc_lock"] if granted else []), *(["opens"] if access.opens else [])] if policy else [],
    }


def unit_name(name: str) -> str:
    """A unit's name with its type, as systemctl takes it without."""
    return name if name.endswith(".service") else f"{name}.service"


def _main_names(units: list[str], check: Row | None) -> list[str]:
    """Units by the names that systemd has them under, which their processes are known by, too; each once."""
    main = {each["name"]: each["main"] for each in check["units"]} if check else {}
    return list(dict.fromkeys(main.get(name, name) for name in units))


def _gets_ipc_lock(unit: Row) -> bool:
    return bool(unit["ambient_ipc_lock"] or unit["file_ipc_lock"])


def _other_units(processes: list[Row], named: list[str]) -> list[str]:
    """The units, beside those that are named, of VMs that have CAP_IPC_LOCK, maybe from an earlier run."""
    having = {str(each["unit"]) for each in processes if each["accounting"] == NONE and each["user"] != "root"}
    return sorted(each for each in having - {*named} if re.fullmatch(r"(?!-)[A-Za-z0-9:_.\\@-]{1,240}\.service", each))


def _seen(emulators: list[str], host: Row) -> list[str]:
    """Those of the emulators that are libvirt's. Where it is elsewhere, it has others, which need none of this host's.

    But what has the capability already may have it from an earlier run, which had seen more, and keeps it.
    """
    having = [each["path"] for each in host["qemu"] if each["cap_ipc_lock"]]
    return [path for path in emulators if not is_elsewhere(host["libvirt"]) or path in having]


def _missing(qemu: list[Row]) -> list[str]:
    """The emulators of defined domains that are not there. They may be replaced just now, and nothing is taken back."""
    return [each["path"] for each in qemu if "definition" in each["known_by"] and not each["present"]]


def _left_out(qemu: list[Row], granted: list[str]) -> str:
    """That domains run in emulators which get nothing: once they end, the next run would take it back again."""
    others = [each["path"] for each in qemu if "record" in each["known_by"] and each["path"] not in granted]
    if not others:
        return ""
    return f"A domain that is defined nowhere runs in {', '.join(others)}: name it in iommufd_host_emulators, too."


def _known_emulators(host: Row, usual: list[str], check: Row | None) -> list[str]:
    """The host's own emulators, and those that libvirt's domains have. A script that leads to one of them is none."""
    defined = [each["path"] for each in host["qemu"] if each["present"] and "definition" in each["known_by"]]
    found = list(dict.fromkeys([*usual, *_seen(defined, host)]))
    looked = {each["path"]: each for each in check["emulators"]} if check else {}
    scripts = [path for path in found if path in looked and _is_script(looked[path])]
    return [path for path in found if path not in scripts] or found


def _is_script(emulator: Row) -> bool:
    return emulator["present"] and not emulator["writer"] and not emulator["is_emulator"]


def _user(config: Row, libvirt: Row, check: Row | None, processes: list[Row], emulators: list[str]) -> tuple[str, str]:
    """The user that VMs run as; and that this is a guess, as a sentence with the way out, empty where it is none.

    It is the one that is given; else whom libvirt shows to have, or its VMs run as; else that of the first unit that
    has one, or of the VMs that run.
    """
    if config["user"]:
        return str(config["user"]), ""
    if has_libvirt(libvirt):
        shown = [libvirt["user"]] if libvirt["uid"] is not None else _users(processes, domain_uri=["qemu:///system"])
        guess = "root" if is_elsewhere(libvirt) else config["libvirt_user"]
    else:
        shown = [each["user"] for each in check["units"] if each["user"]] if check else []
        shown = shown[:1] or ([] if config["units"] else _users(processes, emulator=emulators))
        guess = "root"
    # It is also a group's, in a file of udev's.
    if len(shown) == 1 and shown[0] and (is_name(shown[0]) or not has_libvirt(libvirt)):
        return shown[0], ""
    # A unit tells itself as whom it runs.
    units_alone = config["units"] and not config["emulators"] and not has_libvirt(libvirt)
    why = f"That VMs run as {guess} is a guess: name in iommufd_host_user the user that they run as here."
    return guess, "" if units_alone else why


def _users(processes: list[Row], **fields: list[str]) -> list[str]:
    """The users of the VMs that have one of these values in each field, each user once."""
    return list(dict.fromkeys(each["user"] for each in processes if all(each[key] in fields[key] for key in fields)))


def choose(config: Row, libvirt: Row, emulators: list[str]) -> Choice:
    """The strategy that is asked for, or the one that suits the host."""
    if config["state"] == "absent":
        return Choice("observe", True, "iommufd_host_state is absent.")
    if config["strategy"] != "auto":
        certain = config["strategy"] != "native" or libvirt["sets_rlimit_mode"] is not None
        return Choice(config["strategy"], certain, f"It was asked for.{'' if certain else ' ' + libvirt['reason']}")
    return _choose_by_host(config, libvirt, emulators)


def _choose_by_host(config: Row, libvirt: Row, emulators: list[str]) -> Choice:
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
    if not named and not emulators:
        return Choice(
            "observe",
            False,
            f"{reason} Which emulators its VMs have is not known, and nothing is granted to a guess: name them in"
            " iommufd_host_emulators, or in iommufd_host_units what starts the VMs of this host.",
        )
    if sets:
        why = "But that is of no use to the units and emulators that were named."
    elif is_elsewhere(libvirt):
        why = (
            "So CAP_IPC_LOCK is granted to what was named, and stays where it is, but nothing else gets it: name in"
            " iommufd_host_emulators, or in iommufd_host_units, what starts the VMs of this host."
        )
    elif sets is None:
        why = "So CAP_IPC_LOCK is granted to be on the safe side, and may be more than is needed."
    elif there and not emulators and not daemon_is_barred(libvirt):
        why = "Which emulators its VMs have is not known, so these get nothing: name them in iommufd_host_emulators."
        return Choice("cap_ipc_lock", False, f"{reason} {why}")
    else:
        why = ""
    return Choice("cap_ipc_lock", sets is not None, f"{reason} {why}".strip())


def _are_granted(config: Row, libvirt: Row) -> bool:
    """Whether emulators get CAP_IPC_LOCK: those that were named; or where libvirt may start VMs without the mode."""
    if config["emulators"]:
        return True
    libvirts = has_libvirt(libvirt) and not libvirt["sets_rlimit_mode"] and not daemon_is_barred(libvirt)
    return not config["units"] or libvirts


def _access(config: Row, libvirt: Row, guessed: str, selinux: Row | None) -> Access:
    """Whether QEMU is to be let at the device nodes. `guessed`: who its user is would be a guess."""
    if not config["qemu_access"]:
        return Access(False, [], [])
    if libvirt["unit"] is None:
        error = "iommufd_host_qemu_access is for the system libvirt, and there is none here: leave it out."
        return Access(False, [], [error])
    if libvirt["supports_iommufd"]:
        # For such devices, QEMU opens no node by itself.
        said = f"Nothing: libvirt {libvirt['version']} opens the device nodes itself and passes them to QEMU."
        return Access(False, [said], [])
    if guessed and not config["device_group"]:
        return Access(False, [], [f"iommufd_host_qemu_access is for the user that VMs run as. {guessed}"])
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
    libvirt = host["libvirt"]
    mends = config["libvirt_unit"] and bool(libvirt["supports_iommufd"])
    given = given_back(libvirt) if mends else ()
    files += [daemon_drop_in(libvirt["unit"], given)] if given else []
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
        "reload": bool(mends and libvirt["unit_outdated"])
        or (any(unit["outdated"] for unit in check["units"]) if check else False),
    }
