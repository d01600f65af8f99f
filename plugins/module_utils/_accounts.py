# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a look at a host's processes and devices, and what it comes to for each of its users."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from . import _host_facts
from ._capabilities import CAP_SYS_PTRACE, capability_names
from ._charges import Account, Total, largest_limit, total
from ._process_facts import in_initial_namespace, own_status
from ._survey import Survey, survey

__all__ = ("Accounts", "look_at_accounts")


class Accounts(NamedTuple):
    """What a look has come to: `of` each process that was seen to hold something, and by user the rest.

    `largest` are limits. `nodes` and `vdpa` are the devices of VFIO and vDPA, by number. `blind`: sentences that say
    why this caller sees no processes but some.
    """

    seen: Survey
    nodes: dict[int, _host_facts.VfioNode]
    vdpa: dict[int, str]
    of: dict[int, Account]
    totals: dict[int, Total]
    largest: dict[int, int | None]
    blind: list[str]


def look_at_accounts(uids: Collection[int] = ()) -> Accounts:
    """Looks at all processes. Of these users there are totals in any case. Raises HostLacks."""
    nodes, vdpa = _host_facts.find_vfio_nodes(), _host_facts.find_vdpa_nodes()
    seen = survey({*nodes, *vdpa})
    only_holders = seen.only_holders()
    as_it_runs = {rdev for rdev, node in nodes.items() if node.as_it_runs is not False}
    of = {holder.pid: holder.account(vdpa, as_it_runs, only_holders[holder.pid]) for holder in seen.holders}
    by_user: dict[int, list[Account]] = {uid: [] for uid in (*uids, *seen.others_pinned, *seen.unseen)}
    for account in of.values():
        by_user.setdefault(account.uid, []).append(account)
    # Whose the processes are that were not seen at all is not known.
    blind = _why_blind()
    hidden = bool(blind or seen.hidden)
    totals = {
        uid: total(some, seen.others_pinned.get(uid, 0), hidden or uid in seen.unseen) for uid, some in by_user.items()
    }
    return Accounts(seen, nodes, vdpa, of, totals, {uid: largest_limit(some) for uid, some in by_user.items()}, blind)


def _why_blind() -> list[str]:
    found = []
    if not in_initial_namespace("pid"):
        found.append("This is not the initial pid namespace. Run the task on the host itself.")
    hides = _host_facts.read_hidepid()
    if hides and CAP_SYS_PTRACE not in capability_names(own_status().effective):
        found.append(f"/proc is mounted with {hides}. Run the task as root (become: true).")
    return found
