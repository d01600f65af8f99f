# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter iommufd_host_plan: from what a host is and what is asked for, what the role iommufd_host is to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os.path import basename
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._foreign import harmless
from ansible_collections.virt.iommufd.plugins.module_utils._size import parse_size
from ansible_collections.virt.iommufd.plugins.plugin_utils._host_files import (
    apparmor_file,
    drop_in,
    grant_files,
    launcher,
    limits_file,
    modules_file,
    udev_rules,
)

DOCUMENTATION = r"""
name: iommufd_host_plan
short_description: Tell what the role iommufd_host would do on a host
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Decides, from what a host is and from what is asked for, which strategy the role C(virt.iommufd.iommufd_host) takes,
    what it writes and grants, and what stands against it. It touches nothing, so check mode and a real run share it.
options:
  _input:
    description: What M(virt.iommufd.iommufd_info) returned, with all of its default subsets.
    type: dict
    required: true
  config:
    description:
      - The inputs of the role, by their names without C(iommufd_host_).
      - Also C(architecture), the host's as C(uname -m) tells it, C(apparmor), whether AppArmor is enabled, and
        C(libvirt_user), whom the distribution has the VMs of the system libvirt run as.
    type: dict
    required: true
  check:
    description:
      - What M(virt.iommufd.iommufd_vmm_check) returned for the emulators and units of the host.
      - Without it, only privileges, support and the inputs themselves are judged.
    type: dict
seealso:
  - module: virt.iommufd.iommufd_info
    description: Returns what this filter takes.
  - plugin: virt.iommufd.iommufd_host_result
    plugin_type: filter
    description: Tells what came of the plan.
"""

EXAMPLES = r"""
- name: Look at the host
  virt.iommufd.iommufd_info:
  register: info

- name: Report which strategy the role would take, and why
  ansible.builtin.debug:
    msg: "{{ plan.strategy }}: {{ plan.why }}"
  vars:
    plan: "{{ info | virt.iommufd.iommufd_host_plan(config={'strategy': 'auto', 'architecture': 'x86_64'}) }}"
"""

RETURN = r"""
_value:
  description: The plan.
  type: dict
  contains:
    supported:
      description: Whether the running kernel has iommufd, if need be once its module is loaded.
      type: bool
      sample: true
    kernel:
      description: The release of the running kernel.
      type: str
      sample: 6.12.107
    errors:
      description: What stands against the plan, each a sentence with the way out; empty if nothing does.
      type: list
      elements: str
    requested:
      description: The strategy that was asked for.
      type: str
      sample: auto
    strategy:
      description: The strategy that is taken, V(native), V(cap_ipc_lock), V(memlock) or V(none).
      type: str
      sample: cap_ipc_lock
    certain:
      description: Whether nothing had to be guessed for that choice.
      type: bool
      sample: true
    why:
      description: Why that strategy.
      type: str
      sample: libvirt 11.3.0 does not set the mode.
    user:
      description: The user that VMs run as, by which emulators are checked.
      type: str
      sample: libvirt-qemu
    emulators:
      description: The emulators of this host whose capabilities are checked.
      type: list
      elements: str
      sample: [/usr/bin/qemu-system-x86_64]
    grants:
      description: What is granted, to whom, and by what means, with the keys C(what), C(to), C(by) and C(value).
      type: list
      elements: dict
    files_of_grants:
      description: Those of the files that are a grant to a unit or a user, by their paths.
      type: list
      elements: str
    wanted:
      description: The options of the internal module that makes the host so, by their names.
      type: dict
      contains:
        modules:
          description: The kernel modules that are loaded.
          type: list
          elements: str
        files:
          description:
            - The files that the role writes, with the keys C(path), and C(content), or C(program) for a program of this
              collection that is made on the host.
          type: list
          elements: dict
        capabilities:
          description: The emulators that get CAP_IPC_LOCK as a file capability.
          type: list
          elements: str
          sample: [/usr/bin/qemu-system-x86_64]
        nodes:
          description: The device nodes whose owner and mode a udev rule changes, as paths and shell patterns.
          type: list
          elements: str
        group:
          description: The group that the rule gives them.
          type: str
        mode:
          description: The mode that the rule gives them.
          type: str
        blocks:
          description:
            - The files of others in which the role keeps a block of its own, with the keys C(path) and C(devices), the
              device nodes that C(cgroup_device_acl) must have beside what it has.
          type: list
          elements: dict
        units:
          description: The systemd units of those files that are enabled and started.
          type: list
          elements: str
        reload:
          description: Whether systemd has not read all files of the units of VMs yet.
          type: bool
    access:
      description: What is done to let QEMU open the device nodes by itself, or why nothing is.
      type: list
      elements: str
"""

Row = dict[str, Any]

# uname -m, where the name of QEMU's emulator is another one.
_EMULATOR_OF = {"ppc64le": "ppc64", "i686": "i386", "armv7l": "arm"}
_QEMU_CONF = "/etc/libvirt/qemu.conf"
# What gives emulators their capability back, of grant_files.
_GRANT_UNITS = ("iommufd-host-grant.path", "iommufd-host-grant.timer")
# As shell patterns.
_NODES = ["/dev/iommu", "/dev/vfio/devices/*"]
# The first libvirt that passes descriptors to QEMU, which then opens no node by itself: its NEWS.
_PASSES_DESCRIPTORS = (12, 1)
# Devices come and go, and qemu.conf takes no patterns; libvirt leaves out of cgroup_device_acl what is not there.
_VFIO_NODES = [f"/dev/vfio/devices/vfio{number}" for number in range(16)]

_DEFAULTS: Row = {
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

_NO_IOMMUFD = (
    "Kernel {kernel} has no iommufd: it was built without CONFIG_IOMMUFD. Debian's kernels are; Red Hat's and those of"
    " Ubuntu 26.04 have it. Boot a kernel that has it: Linux 6.2 or later, and 6.6 with CONFIG_VFIO_DEVICE_CDEV for"
    " devices of VFIO. Or set iommufd_host_required to false, to have this reported instead."
)


@dataclass(frozen=True)
class Choice:
    """A strategy, whether it was chosen without a guess, and why."""

    strategy: str
    certain: bool
    why: str


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


def unit_name(name: str) -> str:
    """A unit's name with its type, as systemctl takes it without."""
    return name if name.endswith(".service") else f"{name}.service"


def own_emulators(host: Mapping[str, Any], given: list[str], architecture: str) -> list[str]:
    """The emulators that are given, else those of the host that run guests of its own architecture."""
    if given:
        return given
    own = {"qemu-kvm", qemu_for(architecture)}
    return [each["path"] for each in host["qemu"] if each["present"] and basename(each["path"]) in own]


def qemu_for(architecture: str) -> str:
    """The name of QEMU's program for an architecture, as uname -m tells it."""
    return f"qemu-system-{_EMULATOR_OF.get(architecture, architecture)}"


def is_there(libvirt: Mapping[str, Any]) -> bool:
    """Whether there is, or may be, a system libvirt."""
    return libvirt["unit"] is not None or libvirt["sets_rlimit_mode"] is None


def user_of(config: Mapping[str, Any], libvirt: Mapping[str, Any], check: Mapping[str, Any] | None) -> str:
    """The user that VMs run as: the one that is given, else libvirt's, else that of the first unit that has one."""
    if config["user"] or is_there(libvirt):
        return str(config["user"] or config["libvirt_user"])
    users = [each["user"] for each in check["units"] if each["user"]] if check else []
    return users[0] if users else "root"


def choose(config: Mapping[str, Any], libvirt: Mapping[str, Any]) -> Choice:
    """The strategy that is asked for, or the one that suits the host."""
    requested, reason = config["strategy"], str(libvirt["reason"])
    there, sets = is_there(libvirt), libvirt["sets_rlimit_mode"]
    named = bool(config["units"] or config["emulators"])
    if requested != "auto":
        certain = requested != "native" or sets is not None
        return Choice(requested, certain, f"It was asked for.{'' if certain else ' ' + reason}")
    if sets and not named:
        return Choice("native", True, reason)
    if not there and not named and config["launcher"]:
        return Choice("none", True, f"{reason} What starts VMs with iommufd-exec has each charged for itself.")
    if not there and not named:
        return Choice(
            "none",
            False,
            f"{reason} Neither units nor emulators were named either, so there is nothing to grant anything to: name in"
            " iommufd_host_units what starts the VMs of this host.",
        )
    if config["fallback"] == "none":
        return Choice("none", sets is not None, f"{reason} And iommufd_host_fallback is none.")
    if sets:
        return Choice(
            "cap_ipc_lock", True, f"{reason} But that is of no use to the units and emulators that were named."
        )
    guess = (
        " So CAP_IPC_LOCK is granted to be on the safe side, and may be more than is needed." if sets is None else ""
    )
    return Choice("cap_ipc_lock", sets is not None, reason + guess)


def are_granted(config: Mapping[str, Any], libvirt: Mapping[str, Any]) -> bool:
    """Whether emulators get CAP_IPC_LOCK: those that were named; or where libvirt may start VMs without the mode."""
    libvirts = is_there(libvirt) and not libvirt["sets_rlimit_mode"]
    return bool(config["emulators"]) or not config["units"] or libvirts


def strategy_errors(
    config: Mapping[str, Any], choice: Choice, host: Mapping[str, Any], emulators: list[str]
) -> list[str]:
    """What keeps the strategy from being carried out."""
    libvirt = host["libvirt"]
    if choice.strategy == "native" and libvirt["sets_rlimit_mode"] is False:
        return [f"The strategy native is not to be had: {libvirt['reason']} Set iommufd_host_strategy to auto."]
    if choice.strategy == "cap_ipc_lock" and not config["units"] and not emulators:
        return [
            "There is nothing to grant CAP_IPC_LOCK to: this host has no emulator for its own architecture. Name some"
            " in iommufd_host_emulators, or units in iommufd_host_units."
        ]
    if choice.strategy != "memlock":
        return []
    errors = []
    if not config["units"] and not config["memlock_users"]:
        errors.append(
            "The strategy memlock needs to know whose limit to raise: name units in iommufd_host_units, or users in"
            " iommufd_host_memlock_users."
        )
    try:
        memlock(config["memlock"])
    except IommufdError as exc:
        errors.append(f"iommufd_host_memlock: {exc} Or give infinity.")
    return errors


def memlock(value: object) -> int | None:
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
        if config[name] and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?", config[name]):
            errors.append(f"iommufd_host_{name}, {config[name]!r}, is not a name.")
    return errors


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
            errors.append(
                f"systemd knows no unit {unit['name']}: name in iommufd_host_units what starts the VMs of this host."
            )
        elif strategy == "cap_ipc_lock":
            errors += unit["obstacles"]
    return errors


def access(config: Mapping[str, Any], libvirt: Mapping[str, Any]) -> tuple[bool, list[str], list[str]]:
    """Whether QEMU is to be let at the device nodes; what is said of that; and what stands against it."""
    if not config["qemu_access"]:
        return False, [], []
    if libvirt["unit"] is None:
        return False, [], ["iommufd_host_qemu_access is for the system libvirt, and there is none here: leave it out."]
    version = tuple(int(part) for part in (libvirt["version"] or "0").split(".")[:2])
    if version >= _PASSES_DESCRIPTORS:
        return (
            False,
            [f"Nothing: libvirt {libvirt['version']} opens the device nodes itself and passes them to QEMU."],
            [],
        )
    said = [f"udev gives the device nodes to group {config['device_group'] or config['user']}"]
    said.append(f"cgroup_device_acl in {_QEMU_CONF} has the device nodes")
    if config["apparmor"]:
        said.append(f"AppArmor lets QEMU open them: {apparmor_file()['path']}")
    return True, said, []


def grants_of(choice: Choice, capabilities: list[str], units: list[str], config: Mapping[str, Any]) -> list[Row]:
    """What is granted, to whom and by what means. A limit's value is in bytes, None for unlimited."""
    if choice.strategy == "cap_ipc_lock":
        given = [{"what": "cap_ipc_lock", "to": path, "by": "file capability", "value": "ep"} for path in capabilities]
        return given + [{"what": "cap_ipc_lock", "to": unit, "by": "drop-in", "value": "ambient"} for unit in units]
    if choice.strategy != "memlock":
        return []
    limit = memlock(config["memlock"])
    raised = [{"what": "memlock", "to": unit, "by": "drop-in", "value": limit} for unit in units]
    return raised + [
        {"what": "memlock", "to": user, "by": "limits.d", "value": limit} for user in config["memlock_users"]
    ]


def files_of_grants(grants: list[Row]) -> list[Row]:
    """The files that are a grant to a unit or a user."""
    raised = [grant for grant in grants if grant["by"] == "limits.d"]
    drop_ins = [drop_in(grant) for grant in grants if grant["by"] == "drop-in"]
    return drop_ins + ([limits_file(raised)] if raised else [])


def wanted_of(
    grants: list[Row], config: Mapping[str, Any], opens: bool, host: Mapping[str, Any], check: Mapping[str, Any] | None
) -> Row:
    """What the host is to have, as the internal module takes it."""
    group, mode = config["device_group"], config["device_mode"]
    if opens:
        group, mode = group or config["user"], mode or "0660"
    there = [each["node"] for each in host["vfio_devices"]]
    granted = [grant["to"] for grant in grants if grant["by"] == "file capability"]
    nodes = list(_NODES) if group or mode else []
    files = [modules_file(config["modules"])]
    files += [udev_rules(group, mode)] if nodes else []
    files += [launcher()] if config["launcher"] else []
    files += [apparmor_file()] if opens and config["apparmor"] else []
    files += files_of_grants(grants)
    real = {each["path"]: each["real_path"] for each in check["emulators"]} if check else {}
    files += grant_files({path: real.get(path, path) for path in granted}) if granted else []
    return {
        "modules": config["modules"],
        "files": files,
        "capabilities": granted,
        "nodes": nodes,
        "group": group,
        "mode": mode,
        "blocks": [{"path": _QEMU_CONF, "devices": [_NODES[0], *dict.fromkeys(_VFIO_NODES + there)]}] if opens else [],
        "units": list(_GRANT_UNITS) if granted else [],
        "reload": any(unit["outdated"] for unit in check["units"]) if check else False,
    }


def plan(info: Mapping[str, Any], config: Mapping[str, Any], check: Mapping[str, Any] | None) -> Row:
    """The whole plan, as RETURN describes it."""
    host = info["host"]
    config = {**_DEFAULTS, **config}
    supported = host["module"] != "absent" or host["device"]["present"]
    emulators = own_emulators(host, config["emulators"], config["architecture"])
    units = [unit_name(name) for name in config["units"]]
    choice = choose(config, host["libvirt"])
    wrong = input_errors(config)
    config["user"] = user_of(config, host["libvirt"], check)
    opens, said, access_errors = access(config, host["libvirt"])
    errors = wrong or privilege_errors(host["caller"])
    if not errors and not supported:
        errors = [_NO_IOMMUFD.format(kernel=host["kernel"])]
    if not errors:
        errors = strategy_errors(config, choice, host, emulators) + writer_errors(host, emulators) + access_errors
    capabilities = emulators if choice.strategy == "cap_ipc_lock" and are_granted(config, host["libvirt"]) else []
    if not errors and check is not None:
        errors = check_errors(check, config["emulators"] or capabilities, units, choice.strategy)
    grants = [] if errors else grants_of(choice, capabilities, units, config)
    return {
        "supported": supported,
        "kernel": host["kernel"],
        "errors": errors,
        "requested": config["strategy"],
        **vars(choice),
        "user": config["user"],
        # Where units alone start VMs, nothing depends on the host's own.
        "emulators": emulators if capabilities or not units or is_there(host["libvirt"]) else config["emulators"],
        "units_of_vms": units,
        "memlock_users": config["memlock_users"] if choice.strategy == "memlock" else [],
        "grants": grants,
        "files_of_grants": [each["path"] for each in files_of_grants(grants)],
        "wanted": _NOTHING if errors else wanted_of(grants, config, opens, host, check),
        "access": said,
    }


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> Mapping[str, Callable[..., Row]]:
        return {"iommufd_host_plan": iommufd_host_plan}


def iommufd_host_plan(info: object, config: object, check: object = None) -> Row:
    """The filter. Raises AnsibleFilterError where it is not given what it takes."""
    if not isinstance(info, Mapping) or not isinstance(config, Mapping) or not isinstance(check, (Mapping, type(None))):
        raise AnsibleFilterError(
            "iommufd_host_plan takes what virt.iommufd.iommufd_info returned, and the inputs of the role as config."
        )
    try:
        # The modules give printable texts. A host that is not to be trusted gives what it likes. What is made of that
        # may have lines: files do.
        return plan({"host": harmless(info["host"])}, config, harmless(check))
    except KeyError as exc:
        raise AnsibleFilterError(f"iommufd_host_plan: there is no {exc} in its input.") from exc
