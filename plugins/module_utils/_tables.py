# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the tables of descriptors of a host's processes, each looked at once, and with an end.

Any user may have millions of descriptors, and may have them again in each of thousands of processes.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Container, Iterable

from ._process import DESCRIPTORS_MAX, Descriptors, character_devices_in
from ._syscalls import have_one_table

__all__ = ("CONTAINERS", "LARGE", "TOO_MANY", "TOO_MANY_HOLDERS", "Budget", "Tables", "who_pays")

# Users of containers have ids from here on: those of /etc/subuid from 100000 (login.defs(5), SUB_UID_MIN), those of
# systemd-nspawn from 524288 (systemd.io, UIDS-GIDS). One user may have thousands of them, so they count as one.
CONTAINERS = 2**16

# How much is looked at of all of a user's processes, and of all on the host. A descriptor takes some microseconds.
_DESCRIPTORS_OF_USER = 2**20
_DESCRIPTORS = 2**22

# How many descriptors on devices are told of a process, of all of a user's processes, and of all.
_TOLD_OF_PROCESS = 512
_TOLD_OF_USER = 2**16
_TOLD = 2**18

# How many processes that hold an iommufd or another device are looked at of one user, and of all, and how many devices
# and IOASes of one user's are told. There is no host with so many VMs.
_HOLDERS_OF_USER = 2500
_HOLDERS = 10000
_HELD_OF_USER = 4096
_IOASES_OF_USER = 4096

# Of a larger table it is asked whether it is another process's, too, and so many are kept in mind for that.
LARGE = 4096
_KEPT = 64

TOO_MANY = (
    f"There are too many descriptors. At most {DESCRIPTORS_MAX} are looked at of one process, {_DESCRIPTORS_OF_USER} of"
    f" all of a user's processes, and {_DESCRIPTORS} of all on a host. What is among the others is not seen."
)
TOO_MANY_HOLDERS = (
    f"There are too many processes with an iommufd, or another device that memory is pinned for. At most"
    f" {_HOLDERS_OF_USER} of a user's are looked at, with {_HELD_OF_USER} such devices, and {_HOLDERS} of all."
)


def who_pays(uid: int) -> int:
    """Whose budget is spent by a look at a process of this user: CONTAINERS stands for all users of containers."""
    return min(uid, CONTAINERS)


# In the place of who pays, whom it is beyond: what all have spent.
_ALL = CONTAINERS + 1


class Budget:
    """What was spent so far, by who pays and by all: descriptors looked at and told, holders, and what those hold."""

    def __init__(self) -> None:
        self.descriptors: Counter[int] = Counter()
        self.told: Counter[int] = Counter()
        self.holders: Counter[int] = Counter()
        self.held: Counter[int] = Counter()
        self.ioases: Counter[int] = Counter()
        self.seconds: defaultdict[int, float] = defaultdict(float)

    def to_json(self, payers: Iterable[int]) -> list[list[tuple[int, float]]]:
        """What `load` takes of these, and of all together."""
        some = {*payers, _ALL}
        return [[(payer, each[payer]) for payer in some if payer in each] for each in vars(self).values()]

    def load(self, given: list[list[tuple[int, float]]]) -> None:
        """Takes over what a child has spent, be it on a part of those who pay."""
        for mine, pairs in zip(vars(self).values(), given):
            # A counter's own `update` adds.
            for payer, spent in pairs:
                mine[payer] = spent

    def may_hold(self, payer: int) -> bool:
        """Whether one more process that holds an iommufd or another device is looked at."""
        return (
            self.holders[payer] < _HOLDERS_OF_USER
            and self.held[payer] < _HELD_OF_USER
            and self.holders[_ALL] < _HOLDERS
        )

    def ioases_left(self, payer: int) -> int:
        """How many IOASes may be told still."""
        return max(0, _IOASES_OF_USER - self.ioases[payer])

    def hold(self, payer: int, held: int, ioases: int) -> None:
        """Notes down a process that holds so many iommufds and other devices."""
        for each in (payer, _ALL):
            self.holders[each] += 1
        self.held[payer] += held
        self.ioases[payer] += ioases


class Tables:
    """Looks at tables of descriptors. `wanted` are the numbers of the devices that are looked for."""

    def __init__(self, wanted: Container[int], budget: Budget) -> None:
        self._wanted = wanted
        self._budget = budget
        self._large: list[tuple[int, Descriptors]] = []

    def look(self, pid: int, payer: int, size: int) -> Descriptors:
        """The devices that a process has open. Raises OSError as the look at /proc/PID/fd does.

        `size` is that of its table, FDSize in /proc/PID/status. The process is not held: its id may mean another one by
        now.
        """
        large = size > LARGE
        found = self._twin(pid) if large else None
        if found is None:
            found = self._look(pid, payer)
            if large and len(self._large) < _KEPT:
                self._large.append((pid, found))
        return found

    def _look(self, pid: int, payer: int) -> Descriptors:
        looked, told = self._budget.descriptors, self._budget.told
        most = min(DESCRIPTORS_MAX, _DESCRIPTORS_OF_USER - looked[payer], _DESCRIPTORS - looked[_ALL])
        keep = min(_TOLD_OF_PROCESS, _TOLD_OF_USER - told[payer], _TOLD - told[_ALL])
        folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The kernel has work with each descriptor that it lists, so it is not even asked.
            none = Descriptors({}, 0, more=True)
            found = character_devices_in(folder, most, self._wanted, keep) if min(most, keep) > 0 else none
        finally:
            os.close(folder)
        for each in (payer, _ALL):
            looked[each] += found.looked_at
            told[each] += len(found.devices)
        return found

    def _twin(self, pid: int) -> Descriptors | None:
        """What was found in a table that is this one, too: processes may share one (clone(2), CLONE_FILES)."""
        return next((found for other, found in self._large if have_one_table(pid, other)), None)
