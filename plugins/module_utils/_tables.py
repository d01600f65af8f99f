# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the tables of descriptors of a host's processes, each looked at once, and with an end.

Any user may have millions of descriptors, and may have them again in each of thousands of processes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container

from ._process import DESCRIPTORS_MAX, Descriptors, character_devices_in, share_descriptors

__all__ = ("LARGE", "TOO_MANY", "Tables")

# How many descriptors are looked at of all of a user's processes, and of all on the host. Each takes some microseconds.
_OF_USER = 2**20
_OF_ALL = 2**22

# How many of a process are told, of all of a user's processes, and of all.
_TOLD = 512
_TOLD_OF_USER = 2**16
_TOLD_OF_ALL = 2**18

# Of a larger table it is asked whether it is another process's, too, and so many are kept in mind for that.
LARGE = 4096
_KEPT = 64

TOO_MANY = (
    f"There are too many descriptors. At most {DESCRIPTORS_MAX} are looked at of one process, {_OF_USER} of all of a"
    f" user's processes, and {_OF_ALL} of all on a host. An iommufd among the others is not seen."
)


class Tables:
    """Looks at tables of descriptors. `wanted` are the numbers of the devices that are looked for."""

    def __init__(self, wanted: Container[int]) -> None:
        self._wanted = wanted
        self._spent: Counter[int] = Counter()
        self._told: Counter[int] = Counter()
        self._large: list[tuple[int, Descriptors]] = []

    def look(self, pid: int, uid: int, size: int) -> Descriptors:
        """The devices that a process of the user has open. Raises OSError as the look at /proc/PID/fd does.

        `size` is that of its table, FDSize in /proc/PID/status. The process is not held: its id may mean another one by
        now.
        """
        large = size > LARGE
        found = self._twin(pid) if large else None
        if found is None:
            found = self._look(pid, uid)
            if large and len(self._large) < _KEPT:
                self._large.append((pid, found))
        return found

    def _look(self, pid: int, uid: int) -> Descriptors:
        most = min(DESCRIPTORS_MAX, _OF_USER - self._spent[uid], _OF_ALL - sum(self._spent.values()))
        keep = min(_TOLD, _TOLD_OF_USER - self._told[uid], _TOLD_OF_ALL - sum(self._told.values()))
        folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The kernel has work with each descriptor that it lists, so it is not even asked.
            none = Descriptors({}, 0, more=True)
            found = character_devices_in(folder, most, self._wanted, keep) if min(most, keep) > 0 else none
        finally:
            os.close(folder)
        self._spent[uid] += found.looked_at
        self._told[uid] += len(found.devices)
        return found

    def _twin(self, pid: int) -> Descriptors | None:
        """What was found in a table that is this one, too: processes may share one (clone(2), CLONE_FILES)."""
        return next((found for other, found in self._large if share_descriptors(pid, other)), None)
