# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the words of the audit. What they are said of is decided elsewhere.

Each remedy is one sentence that is true wherever it is given, and names no VM, so that VMs can share it.
"""

from __future__ import annotations

from ..module_utils._accounting import MM_LOCKED, MM_PINNED, USER

__all__ = (
    "ALL_CLOSED",
    "ALL_SEEN_BY_ROOT",
    "AT_RISK",
    "BY_IOMMUFD_DOMAIN",
    "BY_IOMMUFD_EXEC",
    "BY_IOMMUFD_OPTION",
    "BY_LIBVIRT",
    "BY_LIBVIRT_OR_CAPABILITY",
    "BY_LIBVIRT_PERHAPS",
    "BY_WHOEVER_MAY",
    "COUNTERS",
    "DEFINED_UNSEEN",
    "FAILED",
    "FORECAST_HEADER",
    "FORECAST_NUMBERS",
    "FORECAST_TITLE",
    "FORECAST_UNKNOWN",
    "HEADER",
    "HOST_VERDICTS",
    "LATER",
    "NOT_LIMITED",
    "NOT_READY",
    "NO_IOMMUFD",
    "NO_IOMMUFD_BY_MODULE",
    "NO_VMS",
    "NO_VMS_SEEN",
    "NUMBERS",
    "OK",
    "ONE_MODE",
    "OVER_LIMIT",
    "PINNED_ONCE",
    "RAISE_TO_ALL",
    "SEE_NOTES",
    "TROUBLES",
    "UNKNOWN",
    "UNREACHABLE",
    "UNTIL_THEN",
    "VDPA_ALONE",
    "VERDICTS",
    "counted",
    "first",
    "fleet_forecast",
    "holder",
    "later",
    "of_user",
    "once_turned_on",
    "raise_first",
    "raise_limit",
    "readiness",
    "uncertain",
    "where_limit_is",
)

OVER_LIMIT = "over limit"
AT_RISK = "at risk"
LATER = "may fail later"
UNKNOWN = "unknown"
OK = "ok"
NOT_LIMITED = "not limited"

# The verdicts on VMs, the worst first.
VERDICTS = (OVER_LIMIT, AT_RISK, LATER, UNKNOWN, OK, NOT_LIMITED)

FAILED = "failed"
UNREACHABLE = "unreachable"
NOT_READY = "not ready"
NO_IOMMUFD = "no iommufd"
NO_VMS = "no VMs"

# The verdicts on hosts, the worst first. Those with a VM that is in trouble, or may be, are always named.
HOST_VERDICTS = (
    *(OVER_LIMIT, AT_RISK, LATER, UNKNOWN, FAILED, UNREACHABLE),
    *(NOT_READY, NO_IOMMUFD, OK, NOT_LIMITED, NO_VMS),
)
TROUBLES = (OVER_LIMIT, AT_RISK, LATER, UNKNOWN)

NO_IOMMUFD_BY_MODULE = {"absent": "no iommufd in this kernel", "loadable": "iommufd is not loaded"}
NO_VMS_SEEN = "no VMs seen, but not all processes could be looked at"

# The counters as a table has them: two have a name in /proc/PID/status.
COUNTERS = {USER: "user", MM_LOCKED: "VmLck", MM_PINNED: "VmPin"}

HEADER = ("VM", "user", "backend", "counter", "pinned", "limit", "headroom", "verdict")
NUMBERS = ("pinned", "limit", "headroom")

# Of the forecast. What is not seen of these may be one more VM, or may count for one.
DEFINED_UNSEEN = ("defined", "processes", "descriptors")
FORECAST_TITLE = "Of the VMs that are defined, would each start now, and after a reboot?"
FORECAST_HEADER = ("VM", "now", "reboot", "counter", "charged", "needed", "limit")
FORECAST_NUMBERS = ("charged", "needed", "limit")
FORECAST_UNKNOWN = "what would start is not known"

# How a VM comes to be charged for itself, by what starts it.
BY_IOMMUFD_OPTION = (
    "Set the rlimit mode process by the module iommufd_option before its first device, as its iommufd holds nothing yet"
)
BY_LIBVIRT = (
    "At its next start have libvirt set the rlimit mode: name iommufd by <driver name='vfio' iommufd='yes'/> in its"
    " <hostdev>, and not in <qemu:commandline>"
)
BY_LIBVIRT_OR_CAPABILITY = (
    "Have a libvirt of 12.1 or later whose daemon has CAP_SYS_RESOURCE set the rlimit mode, or the role iommufd_host"
    " grant CAP_IPC_LOCK to its QEMU"
)
BY_LIBVIRT_PERHAPS = (
    "Have libvirt set the rlimit mode; whether it can here is unknown, and host.libvirt.reason of iommufd_info tells"
    " why"
)
BY_IOMMUFD_DOMAIN = (
    "At its next start use the module iommufd_domain, which sets the rlimit mode (libvirt 12.2 or later)"
)
BY_IOMMUFD_EXEC = (
    "At its next start put iommufd-exec in front of its VMM, which must take a descriptor, and is then charged for"
    " itself"
)
BY_WHOEVER_MAY = (
    "At its next start give it an iommufd on which a process of the host with CAP_SYS_RESOURCE has set the rlimit mode"
)
# Where no unit takes it away.
DAEMON_GETS_IT = (
    "Let libvirt's daemon use CAP_SYS_RESOURCE: restart it if it is older than what its unit says now, and allow that"
    " where SELinux denies it"
)
RAISE_TO_ALL = (
    "Raise its RLIMIT_MEMLOCK to all memory of its guest, once for each address space; prlimit does that at once"
)
UNTIL_THEN = "; until then, prlimit raises its limit at once"

PINNED_ONCE = ", or give all its devices one iommufd, which pins the memory once unless the VM has an IOMMU of its own"
VDPA_ALONE = ": for vDPA, neither the rlimit mode nor CAP_IPC_LOCK helps"

# What would settle what is unknown.
ALL_SEEN_BY_ROOT = (
    "To know, audit as root on the host itself, with kernel.yama.ptrace_scope below 3: limits_of_view has what was not"
    " seen."
)
ALL_CLOSED = (
    "To know, audit as root on the host itself, and have closed what limits_of_view names under charges: what a VM that"
    " has ended left behind there may be charged to its user."
)
ONE_MODE = (
    "To know, give all its devices one iommufd: the kernel does not tell what was pinned through which of several."
)
SEE_NOTES = "To know, see the notes on it, and host.limits_of_view of iommufd_info."


def uncertain(size: str, user: str) -> str:
    """What settles whether another VM of a user fits, beside other processes that have pinned so much."""
    return f"To know, find out whether user {user} is charged for {size} that its other processes have pinned."


def where_limit_is(uri: str | None, uid: int, unit: str | None, user_unit: str | None) -> str:
    """What gives a VM its RLIMIT_MEMLOCK, if it is no domain of the system libvirt."""
    if uri is not None:
        return f"by LimitMEMLOCK= of user@{uid}.service"
    if user_unit is not None and user_unit.endswith(".service"):
        return f"by LimitMEMLOCK= of {user_unit} and, where that has less, of user@{uid}.service"
    if user_unit is None and unit is not None and unit.endswith(".service"):
        return f"by LimitMEMLOCK= of {unit}, unless what runs there sets it, as iommufd-exec --memlock does"
    return "where it is started"


def raise_limit(least: int, where: str) -> str:
    """What to do where the limit is too small for what is charged."""
    return f"Raise its RLIMIT_MEMLOCK to {least} bytes or more, {where}; prlimit does that at once"


def raise_first(least: int, where: str, then: str) -> str:
    """The same where the limit must hold what is charged once something else is done."""
    return f"Raise its RLIMIT_MEMLOCK to {least} bytes or more, {where}; then {within(then)}"


def first(capability: str | None, then: str) -> str:
    """What libvirt's daemon does once it has CAP_SYS_RESOURCE. `capability`: what to give to which unit, if any is."""
    get = f"Give {capability}" if capability else DAEMON_GETS_IT
    return f"{get}; then {within(then)}"


def later(what: str, of_user: bool) -> str:
    """What to do where what is charged fits now, and need not later."""
    who = "a VM of its user" if of_user else "it"
    return f"It fits now, and may fail later, since {who} may pin more as it runs, as with an mdev: {within(what)}"


def once_turned_on(what: str) -> str:
    """What to do where a vDPA device has not pinned so far."""
    may = "its vDPA device may fail once its guest turns that on, unless that works with virtual addresses"
    return f"It fits now, and {may}: {within(what)}{VDPA_ALONE}"


def within(sentence: str) -> str:
    """A sentence as a part of another one."""
    return sentence[:1].lower() + sentence[1:]


def holder(name: str, user: str) -> str:
    """A line on a process that is no VM."""
    return (
        f"No VM, but a holder: {name} of user {user} has copies of what another process uses, and has pinned nothing."
    )


def of_user(name: str) -> str:
    """What stands below a table in which all are of one user."""
    return f"All of user {name}."


def readiness(ready: bool | None) -> str:
    """What a line begins with on something that must be there before a VM with iommufd can start."""
    return "Unknown whether ready" if ready is None else "Not ready"


def fleet_forecast(of: int, least: int, most: int, unknown: int) -> str:
    """How many VMs of all hosts would not come back. `unknown`: of how many hosts that is not known."""
    if unknown and not of:
        return f"Whether VMs would come back after a reboot is not known of {counted(unknown, 'host')}"
    how_many = str(least) if least == most else f"{least} to {most}"
    besides = f"; not known of {counted(unknown, 'host')}" if unknown else ""
    return f"{how_many} of {counted(of, 'VM')} would not come back after a reboot{besides}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
