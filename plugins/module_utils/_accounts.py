# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a look at a host's processes and devices, and what it comes to for each of its users."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

from . import _host_facts
from ._capabilities import CAP_SYS_PTRACE, capability_names
from ._charges import Account, Total, largest_limit, total
from ._process_facts import in_initial_namespace, own_status
from ._survey import Survey, count_queues, survey

__all__ = ("Accounts", "look_at_accounts")

# How often, and after how many seconds each, iommufds are counted again that no process was seen to have.
_RECOUNTS = 50
_PAUSE = 0.02


class Accounts(NamedTuple):
    """What a look has come to: `of` each process that was seen to hold something, and by user the rest.

    `largest` are limits, `vdpa` the devices of vDPA by number, and `keepers` who may keep what VMs that have ended had
    pinned. `missing`: how many iommufds are open beyond those that were seen. `blind`: sentences that say why this
    caller sees no processes but some. `hidden`: whether users may be charged for what was not seen.
    """

    seen: Survey
    vdpa: dict[int, str]
    of: dict[int, Account]
    totals: dict[int, Total]
    largest: dict[int, int | None]
    keepers: set[int]
    missing: int
    blind: list[str]
    hidden: bool


def look_at_accounts(nodes: Mapping[int, _host_facts.VfioNode], uids: Collection[int] = ()) -> Accounts:
    """Looks at all processes. `nodes` are those of VFIO. Of these users there are totals anyway. Raises HostLacks."""
    vdpa = _host_facts.find_vdpa_nodes()
    before = _host_facts.count_iommufds()
    seen = survey({*nodes, *vdpa})
    after = _host_facts.count_iommufds()
    only_holders = seen.only_holders()
    as_it_runs = {rdev for rdev, node in nodes.items() if node.as_it_runs is not False}
    keepers = seen.keepers(nodes, only_holders)
    of = {
        each.pid: each.account(vdpa, as_it_runs, only_holders[each.pid], each.pid in keepers) for each in seen.holders
    }
    by_user: dict[int, list[Account]] = {uid: [] for uid in (*uids, *seen.others_pinned, *seen.unseen)}
    for account in of.values():
        by_user.setdefault(account.uid, []).append(account)
    blind = _why_blind()
    # Whose the processes are that were not seen at all is not known, nor who is charged for those that have ended.
    hidden = bool(blind or seen.hidden or seen.blind or keepers)
    # Beside any of these, it would tell nothing new.
    missing = 0 if hidden else _missing(seen, before, after)
    hidden = hidden or missing > 0
    totals = {
        uid: total(some, seen.others_pinned.get(uid, 0), hidden or uid in seen.unseen) for uid, some in by_user.items()
    }
    largest = {uid: largest_limit(some) for uid, some in by_user.items()}
    return Accounts(seen, vdpa, of, totals, largest, keepers, missing, blind, hidden)


def _missing(seen: Survey, before: int, after: int) -> int:
    """How many iommufds are open beyond those that were seen, which a socket or a mapping may keep.

    What is opened or closed while all processes are looked at is only in one of the kernel's counts.
    """
    least, known = min(before, after), seen.count_iommufds()
    if least > known:
        # The kernel counts their queues, too.
        known += count_queues(seen.holders)
    for _attempt in range(_RECOUNTS):
        if least <= known:
            return 0
        # Programs have one for a moment, as this one itself.
        time.sleep(_PAUSE)
        least = min(least, _host_facts.count_iommufds())
    return max(0, least - known)


def _why_blind() -> list[str]:
    found = []
    if not in_initial_namespace("pid"):
        found.append("This is not the initial pid namespace. Run the task on the host itself.")
    hides = _host_facts.read_hidepid()
    if hides and CAP_SYS_PTRACE not in capability_names(own_status().effective):
        found.append(f"/proc is mounted with {hides}. Run the task as root (become: true).")
    return found
