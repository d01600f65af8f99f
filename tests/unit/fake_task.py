# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process as the kernel sees it, for tests that may not change users: its ids, capabilities and limit.

What it refuses, and what follows from what, is in capabilities(7), credentials(7) and setrlimit(2). What the launcher
does with it is tested on a real one, too, in tests/kernel/test_launch.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _syscalls

SETGID, SETUID, SETPCAP, IPC_LOCK, SYS_RESOURCE = 6, 7, 8, 14, 24
LAST = 40
ALL = (1 << LAST + 1) - 1

_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 23, 24, 47


class Executed(BaseException):
    """The process has become another program. No `except Exception` comes between."""

    def __init__(self, file: str, words: list[str]) -> None:
        super().__init__(file)
        self.words = words


@dataclass
class FakeTask:
    """Root with every capability, unless told otherwise. `stuck`: what it claims to do and does not."""

    uids: tuple[int, int, int] = (0, 0, 0)
    gids: tuple[int, int, int] = (0, 0, 0)
    groups: list[int] = field(default_factory=lambda: [0])
    effective: int = ALL
    permitted: int = ALL
    inheritable: int = 0
    ambient: int = 0
    bounding: int = ALL
    limit: tuple[int, int] = (2**23, 2**23)
    stuck: str = ""
    # What exec says, 0 for success.
    error: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts it in the place of the kernel."""
        monkeypatch.setattr(os, "getresuid", lambda: self.uids)
        monkeypatch.setattr(os, "getresgid", lambda: self.gids)
        monkeypatch.setattr(os, "geteuid", lambda: self.uids[1])
        monkeypatch.setattr(os, "getgroups", lambda: self.groups)
        for name in ("setgroups", "setresgid", "setresuid", "execvpe"):
            monkeypatch.setattr(os, name, getattr(self, name))
        monkeypatch.setattr(resource, "setrlimit", self.setrlimit)
        monkeypatch.setattr(resource, "getrlimit", lambda _number: self.limit)
        monkeypatch.setattr(_syscalls, "_libc", self)

    def _may(self, capability: int) -> bool:
        return bool(self.effective >> capability & 1)

    def _demand(self, allowed: bool) -> None:
        if not allowed:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def setgroups(self, groups: list[int]) -> None:
        self._demand(self._may(SETGID))
        self.groups = list(groups)

    def setresgid(self, *gids: int) -> None:
        self._demand(self._may(SETGID) or set(gids) <= set(self.gids))
        self.gids = (gids[0], gids[1], gids[2])

    def setresuid(self, *uids: int) -> None:
        self._demand(self._may(SETUID) or set(uids) <= set(self.uids) or self.stuck == "return")
        if self.stuck == "setresuid":
            return
        if 0 in self.uids and 0 not in uids and self.stuck != "capabilities":
            self.effective = self.permitted = self.ambient = 0
        self.uids = (uids[0], uids[1], uids[2])

    def setrlimit(self, number: int, limit: tuple[int, int]) -> None:
        assert number == resource.RLIMIT_MEMLOCK
        self._demand(self._may(SYS_RESOURCE) or 0 <= limit[1] <= self.limit[1])
        self.limit = limit

    def prctl(self, option: int, *arguments: int) -> int:
        if option == _PR_CAP_AMBIENT:
            self.ambient = 0
            return 0
        number = arguments[0]
        if number > LAST:
            return self._refuse(errno.EINVAL)
        if option == _PR_CAPBSET_READ:
            return self.bounding >> number & 1
        assert option == _PR_CAPBSET_DROP
        if not self._may(SETPCAP):
            return self._refuse(errno.EPERM)
        self.bounding &= ~(1 << number)
        return 0

    def syscall(self, *_arguments: object) -> int:
        """keyctl(2), which has a new keyring to give."""
        return 1

    def capget(self, _header: object, words: Any) -> int:
        for place, each in enumerate((self.effective, self.permitted, self.inheritable)):
            words[place], words[place + 3] = each & 0xFFFFFFFF, each >> 32
        return 0

    def capset(self, _header: object, words: Any) -> int:
        if self.stuck == "capabilities":
            return 0
        effective, permitted, inheritable = (low | high << 32 for low, high in zip(words[:3], words[3:]))
        if permitted & ~self.permitted or effective & ~permitted:
            return self._refuse(errno.EPERM)
        self.effective, self.permitted, self.inheritable = effective, permitted, inheritable
        self.ambient &= self.permitted & self.inheritable
        return 0

    def _refuse(self, number: int) -> int:
        ctypes.set_errno(number)
        return -1

    def execvpe(self, file: str, words: list[str], _environment: object) -> NoReturn:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        raise Executed(file, words)
