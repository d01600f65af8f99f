# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the verdict on a VM, from its row of iommufd_info, and its remedy. Pure functions.

A field that an answer lacks, or that is null there, is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..module_utils._accounting import IOMMUFD, LEGACY, MM_LOCKED, MM_PINNED
from ..module_utils._iommufd import NONE, PROCESS, USER
from ..module_utils._size import human_size
from . import _audit_words as words
from ._audit_words import AT_RISK, NOT_LIMITED, OK, OVER_LIMIT, UNKNOWN

__all__ = ("counter_of", "remedy_of", "verdict_of")

Row = Mapping[str, Any]


def counter_of(process: Row) -> str | None:
    """The counter of a process that is full next; None where none is checked, or it is unknown.

    Whoever does not tell it knows of iommufd alone, where the accounting decides.
    """
    told = process.get("counter")
    return {USER: USER, PROCESS: MM_LOCKED}.get(process["accounting"]) if told is None else told


def charges_user(process: Row) -> bool:
    """Whether what it pins counts for its user, together with others."""
    counters = process.get("counters") or ()
    return process["accounting"] == USER or any(each["counter"] == USER for each in counters)


def verdict_of(process: Row, user: Row | None) -> str:
    """The verdict on a process. `user`: the row of its user, None without that subset."""
    left = process["headroom_bytes"]
    if process["accounting"] is None and left is None:
        return UNKNOWN
    if left is None:
        return NOT_LIMITED if process["accounting"] == NONE or process["memlock_unlimited"] else UNKNOWN
    if left < 0:
        return OVER_LIMIT
    if process["accounting"] is None:
        return UNKNOWN
    risk = user["at_risk"] if user else False
    if risk is False or not charges_user(process):
        return OK
    return UNKNOWN if risk is None else AT_RISK


def remedy_of(verdict: str, process: Row, user: Row | None, libvirt: Row) -> str:
    """What to do about a verdict, or what would settle it, in one sentence; "" where there is nothing to do."""
    if verdict == UNKNOWN:
        return what_settles(process, user)
    if verdict == AT_RISK or (verdict == OVER_LIMIT and counter_of(process) == USER):
        until_then = words.UNTIL_THEN if verdict == OVER_LIMIT else ""
        return f"{charge_for_itself(process, libvirt)}{until_then}."
    return f"{more_limit(process)}." if verdict == OVER_LIMIT else ""


def what_settles(process: Row, user: Row | None) -> str:
    iommufds = process.get("iommufds")
    if process["accounting"] is not None and user and charges_user(process):
        more = user.get("uncertain_bytes")
        return words.uncertain(human_size(more), called(process)) if more else words.ALL_SEEN_BY_ROOT
    if iommufds is None or process.get("initial_user_namespace", True) is None:
        return words.ALL_SEEN_BY_ROOT
    modes = {each["rlimit_mode"] for each in iommufds}
    return words.ONE_MODE if modes == {USER, PROCESS} else words.SEE_NOTES


def charge_for_itself(process: Row, libvirt: Row) -> str:
    """How the VM is charged for itself from its next start on. VmLck then holds what it pins and what it locks."""
    how = who_sets_the_mode(process, libvirt)
    least = process["pinned_bytes"] + process["locked_bytes"]
    limit = process["memlock_bytes"]
    return how if limit is None or least <= limit else words.raise_first(least, limit_of(process), how)


def who_sets_the_mode(process: Row, libvirt: Row) -> str:
    modes = [(each["rlimit_mode"], each["settable"]) for each in process.get("iommufds") or ()]
    if modes and all(mode == PROCESS or settable for mode, settable in modes):
        return words.BY_IOMMUFD_OPTION
    if process.get("initial_user_namespace") is False:
        return words.BY_WHOEVER_MAY
    uri = process.get("domain_uri")
    if uri is None:
        return words.BY_IOMMUFD_EXEC
    if uri != "qemu:///system":
        return words.BY_IOMMUFD_DOMAIN
    sets, may = libvirt.get("sets_rlimit_mode"), libvirt.get("cap_sys_resource")
    if sets is False or may is False:
        return words.BY_LIBVIRT_OR_CAPABILITY
    return words.BY_LIBVIRT if sets and may else words.BY_LIBVIRT_PERHAPS


def more_limit(process: Row) -> str:
    """What to do where a counter of the process itself holds more than its limit."""
    least = process["memlock_bytes"] - process["headroom_bytes"]
    first = words.raise_limit(least, limit_of(process))
    if counter_of(process) == MM_PINNED:
        return first + words.VDPA_ALONE
    # Both pin the memory, and both count in VmLck.
    both = {IOMMUFD, LEGACY} <= set(process.get("backends") or ())
    return first + (words.PINNED_ONCE if both else "")


def limit_of(process: Row) -> str:
    units = process["unit"], process.get("user_unit")
    return words.where_limit_is(process.get("domain_uri"), process["uid"], *units)


def called(process: Row) -> str:
    """The name of its user, or the id where that has none."""
    return process["user"] or str(process["uid"])
