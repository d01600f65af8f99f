# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what this host calls its users and groups."""

from __future__ import annotations

import os
import pwd
from functools import cache

from ._errors import printable

__all__ = (
    "group_name",
    "owner_name",
    "user_name",
)


@cache
def user_name(uid: int) -> str | None:
    """The name that this host has for a user; None where it has none."""
    try:
        return printable(os.fsencode(pwd.getpwuid(uid).pw_name))
    except KeyError:
        return None


def owner_name(uid: int) -> str:
    """The user's name, or the id where it has none."""
    return user_name(uid) or str(uid)


def group_name(gid: int) -> str:
    """The group's name, or the id where it has none."""
    # A query needs no group, and each import costs each of them.
    import grp

    try:
        return printable(os.fsencode(grp.getgrgid(gid).gr_name))
    except KeyError:
        return str(gid)
