# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pwd
import resource
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._child import in_child
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._names import group_name, owner_name
from ansible_collections.virt.iommufd.plugins.module_utils._syscalls import prctl
from ansible_collections.virt.iommufd.plugins.module_utils._user import (
    User,
    be_private,
    become,
    find_user,
    groups_of,
    has_ids,
)

VM = User("vm", 1001, 1002, "/home/vm")


def test_find_user() -> None:
    found = pwd.getpwuid(0)
    assert find_user(found.pw_name) == User(found.pw_name, 0, found.pw_gid, found.pw_dir, found.pw_shell)


@pytest.mark.parametrize("name", ["nobody-of-this-name", "", "a\0b"])
def test_there_is_no_such_user(name: str) -> None:
    with pytest.raises(IommufdError, match=r"^This host has no user '.*': give the name of one that it has\.$"):
        find_user(name)


def test_names_of_ids() -> None:
    assert (owner_name(0), group_name(0)) == ("root", "root")
    assert (owner_name(2**31 - 7), group_name(2**31 - 7)) == ("2147483641", "2147483641")
    assert owner_name(2**31) == group_name(2**31) == str(2**31)


def test_the_runtime_folder() -> None:
    assert VM.runtime_folder == "/run/user/1001"


def test_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: {("vm", 1002): [36]}[name, gid])
    assert groups_of(VM) == {36, 1002}


@pytest.mark.parametrize(
    ("uids", "gids", "expected"),
    [
        ((1001, 1001, 1001), (1002, 1002, 1002), True),
        ((1001, 1001, 0), (1002, 1002, 1002), False),
        ((0, 1001, 1001), (1002, 1002, 1002), False),
        ((1001, 1001, 1001), (1002, 0, 1002), False),
    ],
)
def test_who_has_its_ids(
    monkeypatch: pytest.MonkeyPatch, uids: tuple[int, ...], gids: tuple[int, ...], expected: bool
) -> None:
    monkeypatch.setattr(os, "getresuid", lambda: uids)
    monkeypatch.setattr(os, "getresgid", lambda: gids)
    assert has_ids(VM) is expected


def test_the_steps_to_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[Any, ...]] = []
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *given, name=name: order.append((name, *given)))
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 36])
    become(VM)
    assert order == [("setgroups", [36, 1002]), ("setresgid", 1002, 1002, 1002), ("setresuid", 1001, 1001, 1001)]


def test_who_is_private() -> None:
    def look() -> list[int]:
        # PR_SET_DUMPABLE to 1, as it is after a change of user where fs.suid_dumpable is 1; PR_GET_DUMPABLE.
        assert not prctl(4, 1)
        assert prctl(3)
        be_private()
        return [prctl(3), *resource.getrlimit(resource.RLIMIT_CORE)]

    assert in_child(None, look, 30) == [0, 0, 0]
