# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what this host calls its users and groups."""

from __future__ import annotations

import os
import pwd
import re
from functools import cache

from ._errors import IommufdError, printable

__all__ = (
    "group_name",
    "owner_name",
    "uid_of",
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


def uid_of(user: str) -> int:
    """The id of a user given by name or id. Raises IommufdError where the host has no such user."""
    try:
        # A name of digits is not a name: useradd(8) refuses it, and systemd too.
        uid = int(user) if re.fullmatch("[0-9]{1,10}", user) else pwd.getpwnam(user).pw_uid
        # The last number stands for no user at all.
        return range(2**32 - 1)[uid]
    except (IndexError, KeyError, ValueError) as exc:
        raise IommufdError(f"This host has no user {user!r}: give users by the names or ids that it has.") from exc


def group_name(gid: int) -> str:
    """The group's name, or the id where it has none."""
    # A query needs no group, and each import costs each of them.
    import grp

    try:
        return printable(os.fsencode(grp.getgrgid(gid).gr_name))
    except KeyError:
        return str(gid)
