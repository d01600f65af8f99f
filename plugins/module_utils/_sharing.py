# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: which descriptors, of one process or of several, are one open file.

A launcher may keep its copy of what it has passed to a VMM, and a fork has a copy of everything. kcmp(2) tells that
without anything being shared. It also tells an order of open files, so that each descriptor is compared with some files
of our own first, and with others only where these two come to the same place. So nobody who swaps what is behind a
descriptor meanwhile can have others compared with less care, and ten thousand are sorted in seconds.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cmp_to_key, partial
from itertools import islice
from typing import Any, NamedTuple

from ._child import ask_child
from ._errors import IommufdError
from ._process import parse_stat, read_file
from ._syscalls import compare_files

__all__ = ("SHARED_WITH_MAX", "Descriptor", "Owner", "Sharing", "compare")

# As many of a kind are compared with each other, and not with files of our own.
_FEW = 8
# The most files of our own. A process may usually have 1024.
_OWN_MAX = 512

# How many others are told that share a file. One user may share it among thousands.
SHARED_WITH_MAX = 16

# In seconds: how long one process may keep us, and all together. How often a user's processes may.
_PATIENCE = 10
_SECONDS = 60
_HANGS_OF_USER = 3
# After so many seconds, a child tells that it is still at work.
_PULSE = 0.5

# Two indexes in a list of descriptors, which child and parent share; -1 is none.
_POSITION = struct.Struct("=qq")


class Descriptor(NamedTuple):
    """A descriptor of a process. `kind`: what it is open on; those of different kinds are never one file.

    `payer` is who pays for the time that it takes.
    """

    pid: int
    fd: int
    kind: int
    start_ticks: int
    payer: int


class Sharing:
    """What was found out: sets of descriptors that are one open file each, as pairs of process and number.

    `unknown` are processes of which that is not known. Of all others, what is in no set is in no other one's hands.
    """

    def __init__(self, files: Iterable[list[tuple[int, int]]] = (), unknown: Iterable[int] = ()) -> None:
        self.files = [sorted(file) for file in files]
        self.unknown = set(unknown)
        # Of each file, the processes that have it, each with its lowest descriptor.
        self._lowest: list[dict[int, int]] = [{} for _each in self.files]
        for file, lowest in zip(self.files, self._lowest):
            for pid, fd in file:
                lowest.setdefault(pid, fd)
        self._file_of = {each: lowest for file, lowest in zip(self.files, self._lowest) for each in file}

    def same_as(self, pid: int, fd: int) -> int | None:
        """The lowest descriptor of the process that is the same file, if it is a lower one."""
        lowest = self._file_of.get((pid, fd), {}).get(pid, fd)
        return lowest if lowest < fd else None

    def shared_with(self, pid: int, fd: int) -> list[int] | None:
        """Other processes that have the same file, or some of them where there are many; None where that is unknown."""
        if pid in self.unknown:
            return None
        some = islice(self._file_of.get((pid, fd), ()), SHARED_WITH_MAX + 1)
        return [other for other in some if other != pid][:SHARED_WITH_MAX]

    def count(self, descriptors: Iterable[Descriptor]) -> int:
        """How many open files these are, without those of which that is not known."""
        known = [(each.pid, each.fd) for each in descriptors if each.pid not in self.unknown]
        return len({id(self._file_of[each]) if each in self._file_of else each for each in known})

    def holders(self, owners: Sequence[Owner], doubtful: Container[int]) -> dict[int, bool | None]:
        """Of each process, whether it has nothing but what VMMs have, too; None where that cannot be told.

        One that has pinned memory is a VMM. So is one that has something alone, unless it is `doubtful` whether it has.
        Where several have the same and none of them is a VMM so far, any of them may become one.
        """
        found: dict[int, bool | None] = {}
        for each in owners:
            if each.pins:
                found[each.pid] = False
            elif each.fds is None or each.pid in self.unknown:
                found[each.pid] = None
            elif not all(len(self._file_of.get((each.pid, fd), ())) > 1 for fd in each.fds):
                found[each.pid] = None if each.pid in doubtful else False
        of_vmms = {id(lowest) for lowest in self._lowest if any(found.get(pid) is False for pid in lowest)}
        for each in owners:
            if each.pid not in found:
                files = {id(self._file_of[each.pid, fd]) for fd in each.fds or ()}
                found[each.pid] = True if files <= of_vmms else None
        return found


class Owner(NamedTuple):
    """A process with what it holds, None where that is not all known. `pins`: whether it has pinned memory."""

    pid: int
    fds: list[int] | None
    pins: bool


def compare(descriptors: Iterable[Descriptor]) -> Sharing:
    """Which of them are one open file.

    It is done in a child, since the kernel holds a lock while a process executes a program, as long as that likes.
    """
    left = _comparable(descriptors)
    unknown: set[int] = set()
    hangs: Counter[int] = Counter()
    deadline = time.monotonic() + _SECONDS
    # Where the child is, which it cannot tell any more once it hangs.
    position = mmap.mmap(-1, _POSITION.size)
    while left:
        _POSITION.pack_into(position, 0, -1, -1)
        try:
            with contextlib.closing(ask_child(None, partial(_answers, left, position), _PATIENCE)) as said:
                for answer in said:
                    if answer is not None:
                        files, lost = answer
                        found = [[(left[index].pid, left[index].fd) for index in file] for file in files]
                        return Sharing(found, unknown | {left[index].pid for index in lost})
                    if time.monotonic() > deadline:
                        break
        except IommufdError:
            pass
        culprits = [left[index] for index in _POSITION.unpack_from(position) if index >= 0]
        hangs.update({each.payer for each in culprits})
        pids = {each.pid for each in culprits}
        for each in left:
            if not culprits or hangs[each.payer] >= _HANGS_OF_USER or time.monotonic() > deadline:
                pids.add(each.pid)
        unknown |= pids
        left = _comparable(each for each in left if each.pid not in pids)
    return Sharing([], unknown)


def _comparable(descriptors: Iterable[Descriptor]) -> list[Descriptor]:
    """Those of kinds of which there are others."""
    of_kind: defaultdict[int, list[Descriptor]] = defaultdict(list)
    for each in descriptors:
        of_kind[each.kind].append(each)
    return [each for some in of_kind.values() if len(some) > 1 for each in some]


def _answers(descriptors: Sequence[Descriptor], position: mmap.mmap) -> Iterator[Any]:
    """The life of a child: None as long as it works, then which are one file, and which could not be compared."""
    comparison = _Comparison(descriptors, position)
    of_kind: defaultdict[int, list[int]] = defaultdict(list)
    for index, each in enumerate(descriptors):
        of_kind[each.kind].append(index)
    for some in of_kind.values():
        yield from comparison.sort(some)
    yield [comparison.files(), sorted(comparison.lost)]


class _Comparison:
    """Descriptors, by their indexes, on the way to be sorted. `lost` are those that cannot be compared."""

    def __init__(self, descriptors: Sequence[Descriptor], position: mmap.mmap) -> None:
        self._all = descriptors
        self._position = position
        self._pid = os.getpid()
        self._own: list[int] = []
        self._files: list[list[int]] = []
        self._pulse = time.monotonic() + _PULSE
        self.lost: set[int] = set()

    def sort(self, indexes: list[int]) -> Iterator[None]:
        """Finds out which of these are one file."""
        places: defaultdict[int, list[int]] = defaultdict(list)
        self._open_own(0 if len(indexes) <= _FEW else len(indexes) // 8)
        for index in indexes:
            with contextlib.suppress(OSError):
                places[self._place(index)].append(index)
            yield from self._pulses()
        for some in places.values():
            yield from self._compare(some)

    def files(self) -> list[list[int]]:
        """Which are one file. A process that has another start by now is another one, by the same id."""
        found = []
        for file in self._files:
            if len(file) > 1:
                kept = [index for index in file if self._is_the_same(index)]
                self.lost.update(set(file) - set(kept))
                found += [kept] if len(kept) > 1 else []
        return found

    def _open_own(self, count: int) -> None:
        """Has so many files of our own, or nearly, in order."""
        with contextlib.suppress(OSError):
            while len(self._own) < min(count, _OWN_MAX) or not self._own:
                self._own.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
        self._own.sort(key=cmp_to_key(self._compare_own))

    def _compare_own(self, one: int, other: int) -> int:
        return (0, -1, 1)[compare_files(self._pid, one, self._pid, other)]

    def _place(self, index: int) -> int:
        """How many of our own files are below it. Raises OSError where the kernel does not tell."""
        each = self._all[index]
        _POSITION.pack_into(self._position, 0, index, -1)
        low, high = 0, len(self._own)
        try:
            while low < high:
                middle = (low + high) // 2
                if compare_files(self._pid, self._own[middle], each.pid, each.fd) == 1:
                    low = middle + 1
                else:
                    high = middle
        except OSError:
            self.lost.add(index)
            raise
        return low

    def _compare(self, indexes: list[int]) -> Iterator[None]:
        """Finds out which of these are one file, by comparing each with one descriptor of each file that is known."""
        known: list[list[int]] = []
        for index in indexes:
            file = next((file for file in known if self._is_one(file[0], index)), None)
            if file is not None:
                file.append(index)
            elif index not in self.lost:
                known.append([index])
            yield from self._pulses()
        self._files += known

    def _is_one(self, first: int, second: int) -> bool:
        one, other = self._all[first], self._all[second]
        if first in self.lost or second in self.lost:
            return False
        _POSITION.pack_into(self._position, 0, first, second)
        try:
            return compare_files(one.pid, one.fd, other.pid, other.fd) == 0
        except OSError:
            # Whichever it is, it is noted.
            for index in (first, second):
                with contextlib.suppress(OSError):
                    self._place(index)
            return False

    def _is_the_same(self, index: int) -> bool:
        each = self._all[index]
        with contextlib.suppress(OSError, IommufdError):
            return parse_stat(read_file(f"/proc/{each.pid}/stat")).start_ticks == each.start_ticks
        return False

    def _pulses(self) -> Iterator[None]:
        if time.monotonic() > self._pulse:
            self._pulse = time.monotonic() + _PULSE
            yield None
