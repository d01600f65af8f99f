# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the verdict on a VM, from its row of iommufd_info, and its remedy. Pure functions.

A field that is null is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..module_utils._accounting import IOMMUFD, LEGACY, MM_PINNED, VDPA
from ..module_utils._iommufd import NONE, PROCESS, USER
from ..module_utils._size import human_size
from . import _audit_words as words
from ._audit_words import AT_RISK, LATER, NOT_LIMITED, OK, OVER_LIMIT, UNKNOWN
from ._fit_qemu import moment
from ._host_info import as_it_runs, capability_for, daemon_is_barred, its_hard_limit

__all__ = ("called", "charges_user", "pins_as_it_runs", "remedy_of", "verdict_of")

Row = Mapping[str, Any]

SYSTEM = "qemu:///system"


def charges_user(process: Row) -> bool:
    """Whether what it pins counts for its user, together with others."""
    return any(each["counter"] == USER for each in process["counters"])


def pins_as_it_runs(process: Row) -> bool:
    """Whether it may pin more without getting more, as an mdev does.

    Where a device has all pinned, no other pins more.
    """
    runs = as_it_runs(process["vfio_devices"] or ())
    return any(runs) and (all(runs) or process["address_spaces"] != 1)


def all_it_may_pin(process: Row) -> int | None:
    """What it has pinned and locked once all its memory is, in each address space; None where that is not known."""
    memory, spaces = process["memory_bytes"], process["address_spaces"]
    if memory is None or spaces is None or process["memory_pluggable"] is not False:
        return None
    # Numbers both, whatever a host returned: a text that is multiplied may take all memory.
    return int(memory) * int(spaces + (process["locks_memory"] is not False))


def verdict_of(process: Row, user: Row | None, one_grows: bool = False) -> str:
    """The verdict on a process. `user`: the row of its user, None without that subset.

    `one_grows`: whether one that is charged to that user pins more as it runs.
    """
    left = process["headroom_bytes"]
    if process["accounting"] is None and left is None:
        return UNKNOWN
    if left is None:
        return NOT_LIMITED if process["accounting"] == NONE or process["memlock_unlimited"] else UNKNOWN
    # Who has pinned nothing is over no limit, whatever others of the user have.
    if left < 0 and (process["pinned_bytes"] or not charges_user(process)):
        return OVER_LIMIT
    if process["accounting"] is None:
        return UNKNOWN
    verdict = verdict_by_user(user, one_grows) if charges_user(process) else verdict_by_itself(process)
    return LATER if verdict == OK and vdpa_lacks(process) is not None else verdict


def vdpa_lacks(process: Row) -> int | None:
    """The limit that it needs once its guest turns a vDPA device on, where that has not pinned and it has less.

    QEMU pins for one by then, and VmPin holds that and what each iommufd pins.
    """
    memory, spaces, limit = process["memory_bytes"], process["address_spaces"], process["memlock_bytes"]
    if VDPA not in (process["backends"] or ()) or memory is None or spaces is None or limit is None:
        return None
    # A legacy container counts elsewhere.
    most = int(memory) * max(int(spaces) - len(process.get("legacy_containers") or ()), 1)
    return most if max(process["pinned_bytes"], limit) < most else None


def verdict_by_user(user: Row | None, one_grows: bool) -> str:
    """The verdict where the user's counter holds what is pinned now."""
    if user is None:
        return LATER if one_grows else OK
    if user["at_risk"] is None:
        return LATER if one_grows and not user["uncertain_bytes"] else UNKNOWN
    return AT_RISK if user["at_risk"] else OK


def verdict_by_itself(process: Row) -> str:
    """The verdict where its own counter holds what is pinned now."""
    most, limit = all_it_may_pin(process), process["memlock_bytes"]
    return LATER if pins_as_it_runs(process) and (most is None or limit < most) else OK


def remedy_of(verdict: str, process: Row, user: Row | None, libvirt: Row) -> str:
    """What to do about a verdict, or what would settle it, in one sentence; "" where there is nothing to do."""
    if verdict == UNKNOWN:
        return what_settles(process, user)
    most = vdpa_lacks(process) if verdict == LATER else None
    if most is not None:
        return f"{words.once_turned_on(raise_to(most, process, libvirt))}."
    if verdict == LATER:
        return f"{words.later(what_holds_all(process, libvirt), charges_user(process))}."
    if verdict == AT_RISK or (verdict == OVER_LIMIT and process["counter"] == USER):
        until_then = words.UNTIL_THEN if verdict == OVER_LIMIT else ""
        return f"{charge_for_itself(process, libvirt)}{until_then}."
    return f"{more_limit(process, libvirt)}." if verdict == OVER_LIMIT else ""


def what_settles(process: Row, user: Row | None) -> str:
    iommufds = process["iommufds"]
    if process["accounting"] is not None and user and charges_user(process):
        more = user["uncertain_bytes"]
        return words.uncertain(human_size(more), called(process)) if more else words.ALL_CLOSED
    if iommufds is None or process["initial_user_namespace"] is None:
        return words.ALL_SEEN_BY_ROOT
    modes = {each["rlimit_mode"] for each in iommufds}
    return words.ONE_MODE if modes == {USER, PROCESS} else words.SEE_NOTES


def what_holds_all(process: Row, libvirt: Row) -> str:
    """What to do before a counter has to hold what it does not hold yet."""
    if charges_user(process):
        return charge_for_itself(process, libvirt)
    most = all_it_may_pin(process)
    return words.RAISE_TO_ALL if most is None else raise_to(most, process, libvirt)


def charge_for_itself(process: Row, libvirt: Row) -> str:
    """How the VM is charged for itself from its next start on. VmLck then holds what it pins and what it locks."""
    how, grows = who_sets_the_mode(process, libvirt), pins_as_it_runs(process)
    least = max(process["pinned_bytes"] + process["locked_bytes"], (grows and all_it_may_pin(process)) or 0)
    least += moment(process["pinned_bytes"] - (process["memory_bytes"] or 0)) if process["locks_memory"] else 0
    limit = process["memlock_bytes"]
    enough = limit is None or least <= limit
    told = how if enough else words.raise_first(least, limit_of(process, least), how)
    by_daemon = how == words.BY_LIBVIRT if enough else process["domain_uri"] == SYSTEM
    return once_it_may(libvirt, told) if by_daemon else told


def who_sets_the_mode(process: Row, libvirt: Row) -> str:
    modes = [(each["rlimit_mode"], each["settable"]) for each in process["iommufds"] or ()]
    if modes and all(mode == PROCESS or settable for mode, settable in modes):
        return words.BY_IOMMUFD_OPTION
    if process["initial_user_namespace"] is False:
        return words.BY_WHOEVER_MAY
    uri = process["domain_uri"]
    if uri is None:
        return words.BY_IOMMUFD_EXEC
    if uri != SYSTEM:
        return words.BY_IOMMUFD_DOMAIN
    if daemon_is_barred(libvirt):
        return words.BY_LIBVIRT
    sets, may = libvirt.get("sets_rlimit_mode"), libvirt.get("cap_sys_resource")
    if sets is False:
        return words.BY_LIBVIRT_OR_CAPABILITY
    return words.BY_LIBVIRT if sets and may else words.BY_LIBVIRT_PERHAPS


def once_it_may(libvirt: Row, told: str) -> str:
    """What libvirt's daemon can do once it has CAP_SYS_RESOURCE: before that, it gets it where it lacks it."""
    if libvirt.get("cap_sys_resource") is not False:
        return told
    settings = libvirt.get("drop_in")
    return words.first(capability_for(libvirt["unit"], settings) if settings else None, told)


def more_limit(process: Row, libvirt: Row) -> str:
    """What to do where a counter of the process itself holds more than its limit."""
    first = raise_to(process["memlock_bytes"] - process["headroom_bytes"], process, libvirt)
    if process["counter"] == MM_PINNED:
        return first + words.VDPA_ALONE
    # Both pin the memory, and both count in VmLck.
    both = {IOMMUFD, LEGACY} <= set(process["backends"] or ())
    return first + (words.PINNED_ONCE if both else "")


def raise_to(least: int, process: Row, libvirt: Row) -> str:
    told = words.raise_limit(least, limit_of(process, least))
    return once_it_may(libvirt, told) if process["domain_uri"] == SYSTEM else told


def limit_of(process: Row, least: int) -> str:
    """Where its limit comes from, and what to write there for so many bytes."""
    if process["domain_uri"] == SYSTEM:
        # It limits the guest's memory, too, of which not all need be charged yet.
        return f"by {its_hard_limit(max(least, process['memory_bytes'] or 0))}"
    return words.where_limit_is(process["domain_uri"], process["uid"], process["unit"], process["user_unit"])


def called(process: Row) -> str:
    """The name of its user, or the id where that has none."""
    return process["user"] or str(process["uid"])
