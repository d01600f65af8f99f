# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Inputs of which one thing is of another type than it should be, for tests of what a hostile host may send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError

__all__ = ("count_refused",)

OTHERS: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, float("nan"), "x", "\udcff", [], [None], [[]], {}, {"a": 1})


def _with_another_type(given: Any) -> Iterator[Any]:
    """The same with something else in the place of each value in it, one at a time, or of all of it."""
    yield from OTHERS
    if isinstance(given, dict):
        for name, value in given.items():
            yield from ({**given, name: other} for other in _with_another_type(value))
    elif isinstance(given, list):
        yield from _one_of_another_type(given)


def _one_of_another_type(given: list[Any]) -> Iterator[list[Any]]:
    """The same list with something else in one of its items."""
    for index, value in enumerate(given):
        yield from ([*given[:index], other, *given[index + 1 :]] for other in _with_another_type(value))


def count_refused(work: Callable[..., Any], inputs: list[Any]) -> int:
    """How many such calls are refused in words. The others return, whatever they do; nothing else may be raised."""
    refused = 0
    for arguments in _one_of_another_type(inputs):
        try:
            work(*arguments)
        except IommufdError:
            refused += 1
    return refused
