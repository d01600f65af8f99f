# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the system libvirt, and whether it sets the rlimit mode of its domains.

Nothing here connects to libvirt, whose daemon that would start.
"""

from __future__ import annotations

import glob
import os
import re
from functools import partial
from typing import Callable, NamedTuple

from ._capabilities import CAP_SYS_RESOURCE, capability_names
from ._errors import IommufdError, ProcessGone
from ._foreign import parse_xml
from ._process import Process
from ._process_facts import in_initial_user_namespace
from ._selinux import Verdict, context_of, context_of_service, lets_use
from ._systemd import Run, show_units

__all__ = (
    "DaemonUnit",
    "Libvirt",
    "daemon_unit_of",
    "library_version",
    "look_at_libvirt",
    "offers_iommufd",
    "sets_rlimit_mode",
    "version_text",
)

Version = tuple[int, int, int]

# libvirt's NEWS, and src/util/viriommufd.c.
_SETS_SINCE = (12, 1, 0)

# The daemon that drives QEMU, in the new arrangement and in the old one. Each is started by its socket.
_DAEMONS = ("virtqemud", "libvirtd")
_PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "MainPID",
    "User",
    "CapabilityBoundingSet",
    "AmbientCapabilities",
    "PrivateUsers",
    "SELinuxContext",
)

# libvirt's QEMU driver keeps it while it runs, wherever that is.
_DRIVER_PID = "/run/libvirt/qemu/driver.pid"

_LIBRARIES = ("/usr/lib/*/libvirt.so.0.*", "/usr/lib64/libvirt.so.0.*", "/usr/lib/libvirt.so.0.*")


def version_text(version: Version | None) -> str | None:
    """A version as libvirt writes it."""
    return None if version is None else ".".join(map(str, version))


def library_version(text: bytes) -> Version | None:
    """The version in the highest file name of libvirt's library, `libvirt.so.0.MAJOR * 1000 + MINOR.MICRO`, in a text.

    See so_version in libvirt's meson.build.
    """
    found = re.findall(rb"/libvirt\.so\.0\.([0-9]{4,7})\.([0-9]{1,4})\b", text)
    return max(((*divmod(int(first), 1000), int(micro)) for first, micro in found), default=None)


class DaemonUnit(NamedTuple):
    """What systemd says of a unit: `may` is whether it would run with CAP_SYS_RESOURCE, None where that is not said.

    `context` is the SELinux context that it sets for what it starts; it may be empty.
    """

    name: str
    there: bool
    active: bool
    pid: int
    initial: bool
    may: bool | None
    context: str = ""


def daemon_unit_of(shown: dict[str, str]) -> DaemonUnit:
    """A unit by what systemd shows of it."""
    pid = shown.get("MainPID", "0")
    bounding = shown.get("CapabilityBoundingSet")
    # Root gets all of the bounding set; anybody else what is ambient.
    given = bounding if shown.get("User", "") in ("", "root", "0") else shown.get("AmbientCapabilities")
    initial = shown.get("PrivateUsers", "no") == "no"
    return DaemonUnit(
        name=shown.get("Id", ""),
        there=shown.get("LoadState") == "loaded",
        active=shown.get("ActiveState") == "active",
        pid=int(pid) if re.fullmatch(r"[0-9]{1,10}", pid) else 0,
        initial=initial,
        may=None if given is None else initial and CAP_SYS_RESOURCE in given.split(),
        # With a minus, a context that cannot be had is no failure.
        context=shown.get("SELinuxContext", "").lstrip("-"),
    )


class Libvirt(NamedTuple):
    """The system libvirt. `installed` is the version of the library on disk, `version` that of the running daemon.

    Where the daemon does not run, or its memory map cannot be read, they are the same. None is what cannot be told,
    and `msg` tells why; `pid` is None where it does not run, and `unit` where there is none. `may` is whether the
    daemon has CAP_SYS_RESOURCE and may use it, and `why` what SELinux has to do with that.
    """

    version: Version | None
    installed: Version | None
    unit: str | None
    pid: int | None
    may: bool | None
    msg: str = ""
    why: str = ""


def look_at_libvirt(run: Run) -> Libvirt:
    """Looks at the library, and asks systemd for the daemon. `run` is as _systemd has it."""
    files = (path.encode("utf-8", "surrogateescape") for pattern in _LIBRARIES for path in glob.glob(pattern))
    installed = library_version(b"\n".join(files))
    services = [f"{daemon}.{kind}" for daemon in _DAEMONS for kind in ("service", "socket")]
    try:
        units = [daemon_unit_of(shown) for shown in show_units(run, services, _PROPERTIES)]
    except IommufdError as exc:
        return Libvirt(installed, installed, None, None, None, str(exc))
    unit = _choose(units)
    if unit is None:
        # In a chroot it says nothing and succeeds.
        msg = "" if all(each.name for each in units) else "systemd tells nothing of libvirt's daemon."
        if os.path.exists(_DRIVER_PID):
            msg = f"libvirt runs in no unit of this host, perhaps in a container: there is {_DRIVER_PID}."
        return Libvirt(installed, installed, None, None, None, msg)
    if not unit.pid:
        may, why = _would_be_left(run, unit)
        return Libvirt(installed, installed, unit.name, None, may, why=why)
    try:
        with Process.hold(unit.pid) as daemon:
            initial = in_initial_user_namespace(daemon)
            may = CAP_SYS_RESOURCE in capability_names(daemon.status.effective)
            may = may and (unit.initial if initial is None else initial)
            may, why = _left(may, partial(context_of, unit.pid))
            running, msg = installed, ""
            try:
                running = library_version(daemon.read("maps")) or installed
            except ProcessGone:
                raise
            except IommufdError as exc:
                # It runs all the same.
                msg = f"The version that the running daemon has mapped: {exc}"
            return Libvirt(running, installed, unit.name, unit.pid, may, msg, why)
    except IommufdError as exc:
        may, why = _would_be_left(run, unit)
        return Libvirt(installed, installed, unit.name, None, may, str(exc), why)


def _left(may: bool | None, context: Callable[[], str]) -> Verdict:
    """What SELinux leaves of a capability that a daemon has, which it may not use all the same."""
    verdict = Verdict(False) if may is False else lets_use(CAP_SYS_RESOURCE, context)
    return Verdict(verdict.allowed and may, verdict.why)


def _would_be_left(run: Run, unit: DaemonUnit) -> Verdict:
    return _left(unit.may, lambda: unit.context or context_of_service(_program_of(run, unit)))


def _program_of(run: Run, unit: DaemonUnit) -> str:
    """What a unit starts. Raises IommufdError."""
    # Asked for alone, since its words may have empty lines, as those between units are.
    started = show_units(run, [unit.name], ("ExecStart",))[0].get("ExecStart", "")
    found = re.match(r"\{ path=(\S+) ;", started)
    if not found:
        raise IommufdError(f"systemd does not tell what {unit.name} starts.")
    return found[1]


def _choose(units: list[DaemonUnit]) -> DaemonUnit | None:
    """The daemon's unit: the one that runs, or else whose socket waits, or else the first that is there."""
    sockets = {unit.name.rpartition(".")[0] for unit in units if unit.active and unit.name.endswith(".socket")}
    services = [unit for unit in units if unit.there and unit.name.endswith(".service")]

    def rank(unit: DaemonUnit) -> tuple[bool, bool]:
        return unit.pid == 0, unit.name.rpartition(".")[0] not in sockets

    return min(services, key=rank, default=None)


def sets_rlimit_mode(libvirt: Libvirt, offers: bool | None) -> tuple[bool | None, str]:
    """Whether libvirt sets per-process accounting for its domains, None where that cannot be told; and why.

    `offers` is whether it offers iommufd for a domain's devices, None where it was not asked.
    """
    if libvirt.unit is None:
        if libvirt.msg:
            return None, libvirt.msg
        return False, "There is no system libvirt that drives QEMU here."
    if libvirt.version is None:
        return None, "The version of libvirt cannot be told: its library, libvirt.so.0, is not at a usual place."
    sets, what = _does(libvirt, libvirt.version, offers)
    behind = ""
    if libvirt.installed and libvirt.installed != libvirt.version:
        behind = f" {version_text(libvirt.installed)} is installed, but its daemon was not restarted since."
    return sets, f"libvirt {version_text(libvirt.version)} {what}{behind}"


def _does(libvirt: Libvirt, version: Version, offers: bool | None) -> tuple[bool | None, str]:
    """Whether a libvirt of that version sets it, and what it does, as the rest of a sentence."""
    since = version_text(_SETS_SINCE)
    if version < _SETS_SINCE and offers:
        return None, f"offers iommufd for a device, though {since} is the first that sets per-process accounting."
    if version < _SETS_SINCE:
        return False, f"does not set per-process accounting: {since} is the first that does."
    if offers is False:
        return False, "could set per-process accounting, but does not offer iommufd for the devices of a domain here."
    if libvirt.may is None:
        return (
            None,
            "sets per-process accounting if its daemon has CAP_SYS_RESOURCE and may use it, which cannot be told."
            f"{f' {libvirt.why}.' if libvirt.why else ''}",
        )
    who = "its daemon runs" if libvirt.pid else f"{libvirt.unit}, which does not run now, would run"
    if not libvirt.may and libvirt.why:
        return (
            False,
            f"cannot set per-process accounting: {who} with CAP_SYS_RESOURCE, but {libvirt.why}."
            " Allow it in a policy module of your own.",
        )
    if not libvirt.may:
        return (
            False,
            f"cannot set per-process accounting: {who} without CAP_SYS_RESOURCE in the initial user namespace.",
        )
    return True, f"sets per-process accounting, as all since {since}, and {who} with CAP_SYS_RESOURCE."


def offers_iommufd(domain_capabilities: str) -> bool | None:
    """Whether the text of `virsh domcapabilities` offers iommufd for a device; None where it is no such text."""
    try:
        root = parse_xml(domain_capabilities)
    except IommufdError:
        return None
    return "yes" in [value.text for value in root.iterfind("devices/hostdev/enum[@name='iommufd']/value")]
