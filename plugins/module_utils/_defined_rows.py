# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a VM that is defined, as iommufd_info tells it. Text comes in, and a row goes out.

Nothing here touches the host but its user database. What is not understood is None in the row, and a sentence in its
`unread` says so.
"""

from __future__ import annotations

import os
import pwd
import re
import resource
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

from ._accounting import EACH, IOMMUFD, LEGACY, NO_VIOMMU, PROCESS, USER, VDPA, Device
from ._capabilities import CAP_IPC_LOCK, CAP_SYS_RESOURCE, capability_names
from ._domain_xml import CONTAINER, Commandline, Described, read_domain
from ._errors import IommufdError
from ._foreign import parse_xml, shown_text
from ._libvirt_files import VmUser, parse_user
from ._module import Row, memlock_row
from ._names import user_name
from ._qemu import look_at_guest
from ._user import User

__all__ = ("Definition", "domain_row", "masked_row", "may_start_vmm", "unit_row")

# All that a row has, in its order.
_KEYS = (
    *("kind", "name", "manager", "path", "user", "uid", "autostart", "transient", "pid"),
    *("memory_bytes", "memory_max_bytes", "elastic_bytes", "of_devices_bytes", "hugepages", "devices", "viommu"),
    *("libvirt_counts", "hard_limit_bytes", "memory_max_shared", "libvirt_locks", "locks_memory", "fdgroup"),
    *("emulator", "memlock_bytes", "memlock_unlimited", "cap_ipc_lock", "launcher_lacks", "launcher_ends"),
    *("unread", "unread_at_boot", "changed", "order"),
)
_DEVICES_MAX = 1024

# See qemuDomainObjRestore() in libvirt's src/qemu/qemu_driver.c.
_SAVED = (
    "{} has a managed save, and is started as it was then, whatever is defined now: virsh managedsave-dumpxml tells"
    " that, and virsh managedsave-remove has it started as it is defined."
)
_LAUNCHER = "iommufd-exec"
_HYPERVISOR = "cloud-hypervisor"
_EMULATOR = re.compile(r"qemu|qemu-kvm|kvm|qemu-system-[\w.-]+")
# The same in a line of a shell, or behind a program that starts another one. /dev/kvm is none.
_NAMED = re.compile(
    r"(?:^|[\s/;&|'\"({=])(?:qemu-system-[\w.-]+|qemu-kvm|cloud-hypervisor\S*|iommufd-exec)(?![\w/-])"
    r"|(?<!/dev)/kvm(?![\w/-])"
)
_PASSED = re.compile(r"vfio|vdpa|iommufd|nvme://|driver[\"']?[=:] *[\"']?nvme")
_MAY_BE = re.compile(r"qemu|kvm|cloud-hypervisor|iommufd-exec|vfio|vdpa")
_VARIABLE = re.compile(r"\$\$|\$\{(\w+)\}")
_BRIDGES = re.compile(r"\b(?:pci-bridge|pcie-pci-bridge|i82801b11-bridge|dmi-to-pci-bridge)\b")
_INFINITY = 2**64 - 1
# With any of these, and a user other than root, systemd sets NoNewPrivileges by itself: see systemd.exec(5).
# fmt: off
_IMPLY_NO_NEW_PRIVILEGES = (
    "DynamicUser", "LockPersonality", "MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock", "ProtectHostname",
    "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "RestrictRealtime", "RestrictSUIDSGID",
)
# fmt: on


class Definition(NamedTuple):
    """A domain's definition, or the record of one that runs, as it was read; `problem` is why it could not be.

    `name` is that of the file, without its suffix. `owner`: whose libvirt it is, None for the system's. `pid`: the
    domain's process, None where it has none, or which one is unknown. `saved`: whether it has a managed save.
    """

    name: str
    path: str
    text: bytes
    problem: str = ""
    autostart: bool | None = None
    transient: bool = False
    pid: int | None = None
    owner: User | None = None
    saved: bool = False


def _blank(kind: str, name: str, manager: str, path: str | None) -> Row:
    row: Row = dict.fromkeys(_KEYS)
    lists: Row = {"unread": [], "unread_at_boot": [], "order": []}
    return {**row, "kind": kind, "name": shown_text(name), "manager": manager, "path": path, **lists}


def domain_row(definition: Definition, passing: Collection[str] | None) -> Row:
    """A domain. `passing`: libvirt's networks that pass a device through; None where they are not known."""
    path = shown_text(definition.path)
    row = _blank("domain", definition.name, "session" if definition.owner else "system", path)
    try:
        if definition.problem:
            raise IommufdError(definition.problem)
        described = _described(definition)
    except IommufdError as exc:
        row["unread"] = [f"{path} cannot be read: {str(exc).rstrip('.')}."]
        return row
    user, problem = _domain_user(definition, described)
    defined = described.defined
    networks = [shown_text(each) for each in described.networks if passing is None or each in passing]
    row["unread"] = [
        *([problem] if problem else []),
        *(f"{path} does not tell {each}." for each in described.unread),
        *(f"Whether the interface in network {each} passes a device through is not known." for each in networks),
        *([_SAVED.format(row["name"])] if definition.saved else []),
    ]
    row.update(
        user=user.name,
        uid=user.uid,
        autostart=definition.autostart,
        transient=definition.transient,
        pid=definition.pid,
        memory_bytes=defined.memory,
        memory_max_bytes=described.memory_max,
        elastic_bytes=defined.elastic,
        of_devices_bytes=defined.of_devices,
        hugepages=defined.hugepages,
        # An argument that was not understood may add a device, or have one by another way.
        devices=None if networks or not described.whole else device_rows(defined.devices, described.places),
        viommu=defined.viommu,
        libvirt_counts=None if networks else defined.counted,
        hard_limit_bytes=defined.hard_limit,
        libvirt_locks=defined.locked,
        locks_memory=defined.mem_lock,
        fdgroup=None if defined.fdgroup is None else shown_text(defined.fdgroup),
        emulator=None if defined.emulator is None else shown_text(defined.emulator),
    )
    return row


def _described(definition: Definition) -> Described:
    """What the text says. Raises IommufdError, whose text says why it cannot be read."""
    try:
        root = parse_xml(definition.text)
    except IommufdError as exc:
        raise IommufdError(f"it {exc}") from exc
    found = root.find("domain") if root.tag == "domstatus" else root
    described = read_domain(root if found is None else found)
    # See virDomainObjListLoadConfig() in src/conf/virdomainobjlist.c.
    if described.defined.name != shown_text(definition.name):
        raise IommufdError(f"it is that of domain {described.defined.name}, so that libvirt does not load it")
    if len(described.defined.devices) > _DEVICES_MAX:
        raise IommufdError(f"it has more than {_DEVICES_MAX} devices")
    return described


def _domain_user(definition: Definition, described: Described) -> tuple[VmUser, str]:
    """Who a domain runs as, and what is wrong with that. None is whom libvirt runs domains as by itself."""
    if definition.owner is not None:
        return VmUser(shown_text(definition.owner.name), definition.owner.uid), ""
    if described.defined.user is None:
        return VmUser(), ""
    user = parse_user(described.defined.user)
    unknown = f"Its <seclabel> has user {described.defined.user}, whom this host does not know."
    return user, unknown if user.uid is None else ""


def device_rows(devices: Sequence[Device], places: Sequence[str | None]) -> list[Row]:
    """Devices that pin."""
    return [
        {
            "backend": device.backend,
            "space": device.holder,
            "accounting": device.mode,
            "as_it_runs": device.as_it_runs,
            "address": place,
        }
        for device, place in zip(devices, places)
    ]


def may_start_vmm(commands: str) -> bool:
    """Whether it is worth a closer look what a unit starts, by the text that systemd shows of it."""
    return _MAY_BE.search(commands) is not None


class _Command(NamedTuple):
    """A command of a unit: its program, the words behind that, and the flags that systemd has for it."""

    program: str
    arguments: list[str]
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.program.rpartition("/")[2]

    @property
    def starts_vmm(self) -> bool:
        """Whether it is a VMM or a launcher, or has words that name one and may have to do with devices."""
        named = self.is_about_devices and _NAMED.search(self.words) is not None
        return self.is_vmm or self.name == _LAUNCHER or named

    @property
    def is_about_devices(self) -> bool:
        """Whether it has words that may have to do with devices."""
        return "$" in self.words or "-readconfig" in self.words or _PASSED.search(self.words) is not None

    @property
    def words(self) -> str:
        """All of it in one line."""
        return " ".join([self.program, *self.arguments])

    @property
    def is_vmm(self) -> bool:
        """Whether it is a VMM itself."""
        return self.name.startswith(_HYPERVISOR) or _EMULATOR.fullmatch(self.name) is not None


class _Launch(NamedTuple):
    """What a unit's command comes to. None is what its unit says; `bounding` has the numbers of capabilities.

    `given`: as Commandline has it. `strict`: whether nothing is started where the mode cannot be set.
    """

    command: _Command
    given: Mapping[str, str] = MappingProxyType({})
    user: str | None = None
    memlock: int | None = None
    bounding: frozenset[int] | None = None
    strict: bool = False


def unit_row(name: str, shown: Mapping[str, Any], pids: Sequence[int]) -> Row | None:
    """A unit that starts a VMM, None where it starts none that pins. `shown`: all properties that systemd has of it.

    `pids`: its processes that are VMMs and hold what memory is pinned by.
    """
    row = _blank("unit", name, "system", shown_text(shown["FragmentPath"]) if shown.get("FragmentPath") else None)
    unread: list[str] = row["unread"]
    commands = [each for each in _commands(shown) if each.starts_vmm]
    if not commands and not pids:
        return None
    row.update(transient=False, elastic_bytes=0, libvirt_locks=False)
    row["changed"] = bool(shown.get("NeedDaemonReload"))
    if row["changed"]:
        row["unread_at_boot"] = [
            f"The files of {name} have changed since systemd read them, and count after a reboot: run systemctl"
            " daemon-reload."
        ]
    files = [shown.get("FragmentPath") or "", *(shown.get("DropInPaths") or [])]
    of_this_boot = [shown_text(each) for each in files if each.startswith("/run/")]
    if of_this_boot:
        row["changed"] = True
        row["unread_at_boot"].append(
            f"What {', '.join(of_this_boot)} says in {name} is gone after a reboot, unless something makes it anew:"
            " have it in /etc/systemd/system."
        )
    if len(pids) > 1:
        unread.append(f"{name} has several VMMs.")
    row["pid"] = pids[0] if len(pids) == 1 else None
    try:
        launch = _as_far_as_it_may(row, _launch(commands, shown), shown)
        pins = _take_command(row, launch)
    except IommufdError as exc:
        unread.append(f"What {name} starts is not understood: {str(exc).rstrip('.')}.")
        return row
    if not pins:
        if not pids:
            return None
        unread.append(f"{name} has a process with devices, which its command line does not have.")
        row["devices"] = None
    if not pids:
        row["pid"] = shown.get("MainPID") or None
    _take_settings(row, launch, shown)
    return row


def masked_row(name: str, path: str, text: str) -> Row | None:
    """A unit that is masked until the next reboot, None where its file does not look as if it started a VMM that pins.

    `text` is what stands in that file.
    """
    lines = re.findall(r"^[ \t]*ExecStart[ \t]*=[-@:+!|\s]*(\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    commands = [_Command(*_first(line)) for line in lines]
    if not any(each.starts_vmm and each.is_about_devices for each in commands):
        return None
    row = _blank("unit", name, "system", shown_text(path))
    row.update(transient=False, elastic_bytes=0, libvirt_locks=False, changed=True)
    row["unread"] = [
        f"{row['name']} is masked until the next reboot (systemctl mask --runtime), and starts a VMM by {row['path']}"
        " then: run systemctl unmask --runtime, and look again."
    ]
    return row


def _first(line: str) -> tuple[str, list[str]]:
    program, *words = (each.strip("\"'") for each in line.split())
    return program, words


def _commands(shown: Mapping[str, Any]) -> Iterator[_Command]:
    for path, words, flags, *_rest in shown.get("ExecStartEx") or shown.get("ExecStart") or []:
        # Before systemd 243 there is but one flag.
        yield _Command(path, list(words[1:]), tuple(flags) if isinstance(flags, list) else ())


def _launch(commands: Sequence[_Command], shown: Mapping[str, Any]) -> _Launch:
    """What is started in the end. Raises IommufdError where that is not understood."""
    if len(commands) != 1:
        raise IommufdError("it has several commands that may be VMMs" if commands else "none of its words is a VMM's")
    command = _expand(commands[0], shown)
    launch = _Launch(command)
    if command.name == _LAUNCHER:
        launch = _launched(command)
    if not launch.command.is_vmm:
        raise IommufdError(f"{shown_text(launch.command.program)} starts the VMM, in words of its own")
    return launch


def _launched(command: _Command) -> _Launch:
    # It has many imports, and is on few hosts.
    from ._iommufd_exec import is_iommufd, parse, placeholders

    options = list(takewhile(lambda word: word != "--", command.arguments))
    if any(word.startswith("-h") or word == "--help" for word in options):
        raise IommufdError(f"{_LAUNCHER} is asked for help")
    request = parse(command.arguments)
    program, *arguments = request.command
    given = {
        text: request.rlimit_mode if is_iommufd(name) else name for text, name in placeholders(request.command).items()
    }
    inner = _Command(program, arguments, command.flags)
    return _Launch(inner, given, request.user, request.memlock, request.bounding, request.strict)


class _Step(NamedTuple):
    """What a launcher does, the capabilities that it takes for that, and whether it ends without them."""

    does: str
    takes: tuple[str, ...]
    ends: bool = True


def _as_far_as_it_may(row: Row, launch: _Launch, shown: Mapping[str, Any]) -> _Launch:
    """A launcher with the mode that it can set. What its unit keeps it from goes into the row."""
    if not launch.given:
        return launch
    row["launcher_lacks"] = []
    if launch.user is not None and _user(launch.user).uid == 0:
        row["launcher_ends"] = f"{_LAUNCHER} ends without starting it, as --user {launch.user} would give up nothing."
    for step in _steps(launch, shown):
        found = {each: _launcher_has(each, launch.command.flags, shown) for each in step.takes}
        names = " and ".join(each.upper() for each in step.takes)
        if None in found.values():
            row["unread"].append(f"Whether {_LAUNCHER} has {names}, which it takes to {step.does}, is not known.")
        if False in found.values():
            row["launcher_lacks"] += [each for each in step.takes if found[each] is False]
            without = f"{_LAUNCHER} ends without starting it: its unit does not give it {names}, which it takes to"
            row["launcher_ends"] = row["launcher_ends"] or (f"{without} {step.does}." if step.ends else None)
    row["launcher_lacks"] = sorted(set(row["launcher_lacks"]))
    if CAP_SYS_RESOURCE not in row["launcher_lacks"]:
        return launch
    return launch._replace(given={key: USER if each == PROCESS else each for key, each in launch.given.items()})


def _steps(launch: _Launch, shown: Mapping[str, Any]) -> Iterator[_Step]:
    """What a launcher is asked to do that takes a capability."""
    if PROCESS in launch.given.values():
        mode = "set rlimit_mode=process"
        yield _Step(f"{mode}, as --strict demands" if launch.strict else mode, (CAP_SYS_RESOURCE,), launch.strict)
    if launch.memlock is not None:
        wanted = _INFINITY if launch.memlock == resource.RLIM_INFINITY else launch.memlock
        if wanted > shown.get("LimitMEMLOCK", 0):
            yield _Step("raise its hard limit to what --memlock says", (CAP_SYS_RESOURCE,))
    kept = -1 if launch.bounding is None else sum(1 << number for number in launch.bounding)
    if (shown.get("CapabilityBoundingSet") or 0) & ~kept:
        yield _Step("drop what --bounding does not name", ("cap_setpcap",))
    own = _user(_unit_user(launch.command.flags, shown))
    groups = shown.get("Group") or shown.get("SupplementaryGroups") or shown.get("DynamicUser")
    if launch.user is not None and (groups or own.uid is None or own != _user(launch.user)):
        yield _Step(f"become user {shown_text(launch.user)} with that user's groups", ("cap_setuid", "cap_setgid"))


def _launcher_has(name: str, flags: Collection[str], shown: Mapping[str, Any]) -> bool | None:
    """Whether a launcher has a capability by its unit, CAP_SYS_RESOURCE in the initial user namespace."""
    if "privileged" in flags:
        return True
    if _is_outside(shown):
        # In its own namespace it may have the others.
        return False if name == CAP_SYS_RESOURCE else None
    bounding = shown.get("CapabilityBoundingSet")
    if bounding is None or name not in capability_names(bounding):
        return None if bounding is None else False
    user = _unit_user(flags, shown)
    if _user(user).uid == 0 and not (shown.get("DynamicUser") and not _is_as_root(flags)):
        # securebits(7) could keep it from root.
        return None if shown.get("SecureBits") else True
    # It is a script, which no file gives a capability.
    return name in capability_names(shown.get("AmbientCapabilities") or 0)


def _expand(command: _Command, shown: Mapping[str, Any]) -> _Command:
    """The command with the variables in its words replaced, as systemd does it: see systemd.service(5).

    Raises IommufdError where the value of one is not known. A file of variables is not read, and may set any.
    """
    if "no-env-expand" in command.flags:
        return command
    known: dict[str, str] = {}
    if not shown.get("EnvironmentFiles") and not shown.get("PassEnvironment"):
        known = dict(each.split("=", 1) for each in shown.get("Environment") or [] if "=" in each)

    def value_of(found: re.Match[str]) -> str:
        if found[1] is None:
            return "$"
        if found[1] not in known:
            raise IommufdError(f"the value of ${found[1]} is not known")
        return known[found[1]]

    words = []
    for word in command.arguments:
        if re.fullmatch(r"\$\w+", word):
            raise IommufdError(f"how many words {shown_text(word)} stands for is not known")
        words.append(_VARIABLE.sub(value_of, word))
    return command._replace(arguments=words)


def _take_command(row: Row, launch: _Launch) -> bool:
    """Takes over what a VMM's words say; returns whether it may have something to pin by."""
    command = launch.command
    row["emulator"] = shown_text(command.program) if command.program.startswith("/") else None
    # What is in a file is not read: it may be another one by the time that the unit starts.
    guest = look_at_guest(os.fsencode(command.program), [os.fsencode(each) for each in command.arguments], _no_file)
    row.update(memory_bytes=guest.memory, locks_memory=guest.locks, memory_max_bytes=guest.memory_max)
    row["of_devices_bytes"] = guest.of_devices
    unread: list[str] = row["unread"]
    if guest.memory is None:
        unread.append(f"How much memory {command.name} starts with is not on its command line, or not understood.")
    if guest.changes_user:
        unread.append(f"{command.name} becomes another user once it has its devices.")
    look = _take_hypervisor if command.name.startswith(_HYPERVISOR) else _take_emulator
    return look(row, launch)


def _no_file(_path: bytes) -> None:
    return None


def _take_emulator(row: Row, launch: _Launch) -> bool:
    arguments = launch.command.arguments
    found = Commandline(arguments, launch.given)
    row["hugepages"] = found.hugepages
    row["unread"] += [f"The command line does not tell {each}." for each in found.unread]
    if len(found.devices) > _DEVICES_MAX:
        raise IommufdError(f"it has more than {_DEVICES_MAX} devices")
    row["devices"] = None if found.unread else device_rows(found.devices, found.places)
    is_known = not (found.unread or found.may_nest or "ppc64" in launch.command.name)
    if found.viommu:
        is_known = is_known and not _BRIDGES.search(" ".join(arguments))
    row["viommu"] = (EACH if found.viommu else NO_VIOMMU) if is_known else None
    if not is_known and not found.unread:
        row["unread"].append("Whether each device behind its vIOMMU has an address space of its own is not known.")
    return bool(found.devices or found.iommufds or "-readconfig" in arguments or "--readconfig" in arguments)


def _take_hypervisor(row: Row, launch: _Launch) -> bool:
    """The words of cloud-hypervisor, whose options take several values: see docs/vfio.md in its source."""
    devices: list[Device] = []
    places: list[str | None] = []
    unread: list[str] = row["unread"]
    for option, value in _values(launch.command.arguments):
        if option == "--device":
            found = re.search(r"path=/sys/bus/pci/devices/([0-9a-f:.]+)", value)
            devices.append(Device(LEGACY, CONTAINER, None, found is None))
            places.append(found and found[1])
        elif option == "--vdpa":
            devices.append(Device(VDPA))
            places.append(None)
        elif option == "--memory":
            row["hugepages"] = "hugepages=on" in value
            if "hotplug_" in value:
                unread.append("How much memory may be plugged in is not understood.")
    words = " ".join(launch.command.arguments)
    by_iommufd = IOMMUFD in words
    if by_iommufd:
        unread.append("What cloud-hypervisor does with an iommufd is not known.")
    row["devices"] = None if by_iommufd else device_rows(devices, places)
    row["viommu"] = None if "iommu=on" in words or by_iommufd else NO_VIOMMU
    if "iommu=on" in words:
        unread.append("Which devices are behind the vIOMMU of cloud-hypervisor is not understood.")
    return bool(devices) or by_iommufd


def _values(arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    option = ""
    for word in arguments:
        if word.startswith("--"):
            option, equals, word = word.partition("=")
            if not equals:
                continue
        yield option, word


def _take_settings(row: Row, launch: _Launch, shown: Mapping[str, Any]) -> None:
    """Takes over what a unit's settings say of the process."""
    given = _unit_user(launch.command.flags, shown)
    user = _user(launch.user or given)
    if shown.get("DynamicUser") and not _is_as_root(launch.command.flags) and launch.user is None:
        user = VmUser()
        row["unread"].append(f"{row['name']} has a user that systemd makes up when it starts (DynamicUser=).")
    elif user.uid is None:
        row["unread"].append(f"{row['name']} has user {user.name}, whom this host does not know.")
    row.update(user=user.name, uid=user.uid)
    sets_limit = launch.memlock is not None and CAP_SYS_RESOURCE not in row["launcher_lacks"]
    if shown.get("PAMName") and not _is_as_root(launch.command.flags) and not sets_limit:
        row["unread"].append(
            f"{row['name']} has a session of PAM (PAMName=), which may set another limit on locked memory than the unit"
            " (pam_limits)."
        )
    soft = shown.get("LimitMEMLOCKSoft", shown.get("LimitMEMLOCK"))
    if launch.memlock is not None:
        row.update(memlock_row(None if launch.memlock == resource.RLIM_INFINITY else launch.memlock))
    elif isinstance(soft, int):
        row.update(memlock_row(None if soft == _INFINITY else soft))
    most = shown.get("MemoryMax", _INFINITY)
    row["hard_limit_bytes"] = None if most == _INFINITY else most
    row["cap_ipc_lock"] = _cap_ipc_lock(launch, user, given, shown)


def _is_as_root(flags: Collection[str]) -> bool:
    """Whether a command runs as root, whatever its unit's user is."""
    # "!!" counts only on kernels without ambient capabilities.
    return bool({"privileged", "no-setuid"} & set(flags))


def _unit_user(flags: Collection[str], shown: Mapping[str, Any]) -> str:
    """The user that systemd gives to a command, "" for root."""
    return "" if _is_as_root(flags) else str(shown.get("User") or "")


def _is_outside(shown: Mapping[str, Any]) -> bool:
    """Whether a unit has a user namespace of its own."""
    return bool(shown.get("PrivateUsers") or shown.get("PrivateUsersEx", "no") not in ("no", ""))


def _user(name: str) -> VmUser:
    """A user by name or id, root without."""
    try:
        found = pwd.getpwnam(name or "root")
        return VmUser(shown_text(found.pw_name), found.pw_uid)
    except (KeyError, ValueError):
        known = re.fullmatch("[0-9]{1,10}", name) and int(name) < 2**32 - 1
        return VmUser(user_name(int(name)), int(name)) if known else VmUser(shown_text(name), None)


def _cap_ipc_lock(launch: _Launch, user: VmUser, given: str, shown: Mapping[str, Any]) -> bool | None:
    """Whether the VMM has CAP_IPC_LOCK by its unit; None: if its file gives it that, as far as is known."""
    if "privileged" in launch.command.flags and launch.user is None and launch.bounding is None:
        return True
    bounding = shown.get("CapabilityBoundingSet")
    if bounding is None or user.uid is None:
        return None
    dropped = launch.bounding is not None and not any(CAP_IPC_LOCK in capability_names(1 << n) for n in launch.bounding)
    if _is_outside(shown) or dropped or CAP_IPC_LOCK not in capability_names(bounding):
        return False
    if user.uid == 0:
        # securebits(7) could keep it from root.
        return None if shown.get("SecureBits") else True
    # The launcher gives up all that it has, and what is ambient too.
    if launch.user is None and CAP_IPC_LOCK in capability_names(shown.get("AmbientCapabilities") or 0):
        return True
    withheld = shown.get("NoNewPrivileges") or (given not in ("", "root", "0") and _is_confined(shown))
    return False if withheld else None


def _is_confined(shown: Mapping[str, Any]) -> bool:
    filters = [shown.get(name) for name in ("SystemCallFilter", "RestrictAddressFamilies")]
    # [whether it is a list of what is allowed, the names]
    filtered = any(found and (found[0] or found[1]) for found in filters)
    namespaces = shown.get("RestrictNamespaces", _INFINITY)
    # By its default, all kinds of namespaces are allowed.
    restricted = namespaces not in (_INFINITY, 0x7E020080, 0x7E020000)
    architectures = bool(shown.get("SystemCallArchitectures"))
    return filtered or restricted or architectures or any(shown.get(name) for name in _IMPLY_NO_NEW_PRIVILEGES)
