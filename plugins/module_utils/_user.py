# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a user of this host, and how a process becomes that user."""

from __future__ import annotations

import os
import pwd
import resource
from typing import NamedTuple

from ._errors import IommufdError
from ._syscalls import PR_SET_DUMPABLE, prctl

__all__ = (
    "User",
    "become",
    "find_user",
    "forbid_core",
    "groups_of",
    "has_ids",
    "impersonate",
)


class User(NamedTuple):
    """A user of this host, as its user database has it."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str = "/bin/sh"

    @property
    def runtime_folder(self) -> str:
        """Where the user's service manager and daemons have their sockets, by file-hierarchy(7)."""
        return f"/run/user/{self.uid}"


def find_user(name: str) -> User:
    """The user of that name. Raises IommufdError where this host has none."""
    try:
        found = pwd.getpwnam(name)
    except (KeyError, ValueError) as exc:
        raise IommufdError(f"This host has no user {name!r}: give the name of one that it has.") from exc
    return User(found.pw_name, found.pw_uid, found.pw_gid, found.pw_dir, found.pw_shell or "/bin/sh")


def groups_of(user: User) -> set[int]:
    """All groups of the user, the first one too."""
    return {user.gid, *os.getgrouplist(user.name, user.gid)}


def has_ids(user: User) -> bool:
    """Whether this process is that user's already, by each of its user and group ids."""
    return os.getresuid() == (user.uid,) * 3 and os.getresgid() == (user.gid,) * 3


def become(user: User) -> None:
    """Makes this process the user's, with all of the user's groups and no way back. Raises OSError.

    A change of all three user ids from root's empties the permitted, effective and ambient capability sets, unless the
    securebits tell otherwise (capabilities(7)).
    """
    # Once it is another user it may not change its groups.
    os.setgroups(sorted(groups_of(user)))
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def be_private() -> None:
    """Keeps this process, until it executes something, from the other processes of the user that it has become.

    They can neither trace it nor read its memory, in which there is what it had as root, and it leaves no core dump. By
    itself a change of user does that only where fs.suid_dumpable is not 1. Raises OSError.
    """
    prctl(PR_SET_DUMPABLE, 0)
    forbid_core()


def impersonate(user: User, memory: int | None = None) -> None:
    """Makes this process the user's, and private, unless it is the user's already. Raises OSError.

    `memory`: how much it may take then, in bytes.
    """
    if has_ids(user):
        return
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    become(user)
    be_private()


def forbid_core() -> None:
    """Keeps this process, and what it executes, from leaving a core dump."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
