# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: VMs that start in an order that is known in part, or not at all. Pure functions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heappop, heappush

# Of more, no order is known: it would take too much memory.
_ORDERED_MAX = 1000

__all__ = ("at_least_fail", "at_most_fail", "before_each")


def before_each(names: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[set[int], set[int]]]:
    """Of each, by its name and those that it starts after: the numbers of those before it, and of those after it.

    In a circle, which systemd breaks somewhere, no order is known.
    """
    if sum(bool(after) for _name, after in names) > _ORDERED_MAX:
        return [(set(), set()) for _each in names]
    numbers = {name: index for index, (name, _after) in enumerate(names)}
    direct = [
        {numbers[name] for name in after if name in numbers} - {index} for index, (_name, after) in enumerate(names)
    ]
    before: list[set[int]] = [set() for _each in names]
    after_it: list[set[int]] = [set() for _each in names]
    waits_for = [len(each) for each in direct]
    followers: list[list[int]] = [[] for _each in names]
    for index, each in enumerate(direct):
        for earlier in each:
            followers[earlier].append(index)
    ready = [index for index, count in enumerate(waits_for) if not count]
    while ready:
        index = ready.pop()
        for earlier in direct[index]:
            before[index] |= before[earlier] | {earlier}
        for earlier in before[index]:
            after_it[earlier].add(index)
        for follower in followers[index]:
            waits_for[follower] -= 1
            if not waits_for[follower]:
                ready.append(follower)
    return list(zip(before, after_it))


def at_least_fail(jobs: Sequence[tuple[int, int]]) -> int:
    """How many fail at least, one after the other in the best order.

    Each adds an amount to a sum, and fails where the sum is then more than it takes; one that fails adds nothing. So it
    is the least number of jobs that are late on one machine, by the algorithm of Moore and Hodgson.
    """
    kept: list[int] = []
    sum_ = late = 0
    for amount, takes in sorted(jobs, key=lambda job: job[1]):
        heappush(kept, -amount)
        sum_ += amount
        if sum_ > takes:
            sum_ += heappop(kept)
            late += 1
    return late


def at_most_fail(jobs: Sequence[tuple[int, int]]) -> int:
    """How many fail at most, one after the other in the worst order.

    Where so many have started, they add up to no more than the largest of all do, and the rest has failed on that.
    """
    amounts = sorted((amount for amount, _takes in jobs), reverse=True)
    spare = sorted(takes - amount for amount, takes in jobs)
    sum_ = 0
    for started, amount in enumerate([0, *amounts]):
        sum_ += amount
        if bisect_left(spare, sum_) >= len(jobs) - started:
            return len(jobs) - started
    return 0
