# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the exceptions that modules turn into fail_json, and what makes a text fit for them.

The text of each is what a user reads: it names the thing, says what is wrong, and what to do about it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

__all__ = (
    "AccessRefused",
    "CommandFailed",
    "DescriptorGone",
    "HostLacks",
    "IommufdError",
    "NotAnIommufd",
    "ProcessGone",
    "error_text",
    "printable",
    "shown_path",
)

# Linux gives two names to one number, and Python's table has the one that the kernel does not use.
_NAMES = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}


def error_text(number: int | None) -> str:
    """An errno's name and text, such as "EPERM: Operation not permitted"."""
    number = number or 0
    return f"{_NAMES.get(number, number)}: {os.strerror(number)}"


def printable(raw: bytes) -> str:
    """Text of any bytes that is safe on one line of a terminal: what is no printable ASCII or UTF-8 is escaped."""
    text = raw.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def shown_path(path: str) -> str:
    """A path as it may be shown."""
    return printable(os.fsencode(path))


class IommufdError(Exception):
    """Whatever keeps this collection from doing what it was asked to."""


class ProcessGone(IommufdError):
    """There is no such process, or it has ended in the meantime."""


class DescriptorGone(IommufdError):
    """The process has no such descriptor, or has closed it in the meantime."""


class NotAnIommufd(IommufdError):
    """The descriptor is something else, so nothing was sent to it."""


class AccessRefused(IommufdError):
    """The caller may not look at the process or share its descriptors."""


class HostLacks(IommufdError):
    """This kernel, or the sandbox around the caller, does not offer what is needed."""


class CommandFailed(IommufdError):
    """A command has failed. `said` is what it said of that, on one line."""

    def __init__(self, words: Sequence[str], said: str) -> None:
        self.said = said
        super().__init__(f"'{' '.join(words)}' failed: {said}")
