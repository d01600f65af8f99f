# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _tables
from ansible_collections.virt.iommufd.plugins.module_utils._process import (
    Descriptors,
    character_devices_in,
)
from ansible_collections.virt.iommufd.plugins.module_utils._syscalls import have_one_table
from ansible_collections.virt.iommufd.plugins.module_utils._tables import CONTAINERS, LARGE, Budget, Tables, who_pays

NULL = os.stat(os.devnull).st_rdev


def test_what_is_looked_for(child: subprocess.Popen[bytes]) -> None:
    assert set(Tables({NULL}, Budget()).look(child.pid, 7, 64).devices) >= {50, 51}
    assert Tables({NULL + 1}, Budget()).look(child.pid, 7, 64).devices == {}


def test_nobody_there() -> None:
    with pytest.raises(FileNotFoundError):
        Tables({NULL}, Budget()).look(2**31 - 1, 7, 64)


@pytest.mark.parametrize("name", ["_DESCRIPTORS_OF_USER", "_DESCRIPTORS"])
def test_an_end_to_all_looks(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    count = Tables({NULL}, Budget()).look(child.pid, 7, 64).looked_at
    monkeypatch.setattr(_tables, name, count + 2)
    tables = Tables({NULL}, Budget())
    assert not tables.look(child.pid, 7, 64).more
    assert (tables.look(child.pid, 7, 64).looked_at, tables.look(child.pid, 7, 64)) == (2, Descriptors({}, 0, True))
    # One user's are not another's.
    assert tables.look(child.pid, 8, 64).looked_at == (count if name == "_DESCRIPTORS_OF_USER" else 0)


def test_a_large_table_is_looked_at_once(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    look = character_devices_in

    def note(*given: Any) -> Descriptors:
        looked.append(child.pid)
        return look(*given)

    monkeypatch.setattr(_tables, "character_devices_in", note)
    tables = Tables({NULL}, Budget())
    # A process has the same table as itself.
    assert tables.look(child.pid, 7, LARGE + 1) == tables.look(child.pid, 7, LARGE + 1)
    assert len(looked) == 1
    tables.look(os.getpid(), 7, LARGE + 1)
    tables.look(child.pid, 7, LARGE)
    assert len(looked) == 3


def test_who_shares_a_table(child: subprocess.Popen[bytes]) -> None:
    assert have_one_table(child.pid, child.pid)
    assert not have_one_table(child.pid, os.getpid())
    assert not have_one_table(child.pid, 2**31 - 1)


def test_an_end_to_what_is_told(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tables, "_TOLD_OF_PROCESS", 1)
    monkeypatch.setattr(_tables, "_TOLD_OF_USER", 2)
    tables = Tables({NULL}, Budget())
    assert [len(tables.look(child.pid, 7, 64).devices) for _each in range(3)] == [1, 1, 0]
    found = tables.look(child.pid, 8, 64)
    assert (len(found.devices), found.more) == (1, True)


def test_an_end_to_what_is_told_of_all(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tables, "_TOLD_OF_PROCESS", 1)
    monkeypatch.setattr(_tables, "_TOLD", 2)
    tables = Tables({NULL}, Budget())
    # Where a text names no user, -1 pays, and is one of them.
    assert [len(tables.look(child.pid, payer, 64).devices) for payer in (-1, 7, 8)] == [1, 1, 0]


def test_who_pays() -> None:
    assert [who_pays(uid) for uid in (0, 1000, 65535, 65536, 100_000, 2**32 - 2)] == [0, 1000, 65535, *[CONTAINERS] * 3]


def test_a_budget_goes_to_a_child_and_back() -> None:
    spent = Budget()
    spent.hold(7, 2, 3)
    spent.descriptors[8] = 5
    spent.seconds[9] = 0.5
    other = Budget()
    other.hold(7, 1, 1)
    other.load(json.loads(json.dumps(spent.to_json({7, 8, 9, 10}))))
    assert vars(other) == vars(spent)
    # Of those alone that are asked for. What others have spent is known.
    spent.seconds.update({8: 0.25, 9: 0.75})
    other.load(json.loads(json.dumps(spent.to_json({9}))))
    assert other.seconds == {9: 0.75}
    assert other.descriptors == spent.descriptors
    assert (other.ioases_left(7), other.ioases_left(8)) == (4093, 4096)
