# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Inputs of which one thing is of another type than it should be, for tests of what a hostile host may send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ("with_another_type",)

OTHERS: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, float("nan"), "x", "\udcff", [], [None], [[]], {}, {"a": 1})


def with_another_type(given: Any) -> Iterator[Any]:
    """The same with something else in the place of each value in it, one at a time, or of all of it."""
    yield from OTHERS
    if isinstance(given, dict):
        for name, value in given.items():
            yield from ({**given, name: other} for other in with_another_type(value))
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from ([*given[:index], other, *given[index + 1 :]] for other in with_another_type(value))
