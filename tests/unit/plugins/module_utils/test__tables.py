# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _tables
from ansible_collections.virt.iommufd.plugins.module_utils._process import (
    Descriptors,
    character_devices_in,
    share_descriptors,
)
from ansible_collections.virt.iommufd.plugins.module_utils._tables import LARGE, Tables

NULL = os.stat(os.devnull).st_rdev


def test_what_is_looked_for(child: subprocess.Popen[bytes]) -> None:
    assert set(Tables({NULL}).look(child.pid, 7, 64).devices) >= {50, 51}
    assert Tables({NULL + 1}).look(child.pid, 7, 64).devices == {}


def test_nobody_there() -> None:
    with pytest.raises(FileNotFoundError):
        Tables({NULL}).look(2**31 - 1, 7, 64)


@pytest.mark.parametrize("name", ["_OF_USER", "_OF_ALL"])
def test_an_end_to_all_looks(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    count = Tables({NULL}).look(child.pid, 7, 64).looked_at
    monkeypatch.setattr(_tables, name, count + 2)
    tables = Tables({NULL})
    assert not tables.look(child.pid, 7, 64).more
    assert (tables.look(child.pid, 7, 64).looked_at, tables.look(child.pid, 7, 64)) == (2, Descriptors({}, 0, True))
    # One user's are not another's.
    assert tables.look(child.pid, 8, 64).looked_at == (count if name == "_OF_USER" else 0)


def test_a_large_table_is_looked_at_once(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    look = character_devices_in

    def note(*given: Any) -> Descriptors:
        looked.append(child.pid)
        return look(*given)

    monkeypatch.setattr(_tables, "character_devices_in", note)
    tables = Tables({NULL})
    # A process has the same table as itself.
    assert tables.look(child.pid, 7, LARGE + 1) == tables.look(child.pid, 7, LARGE + 1)
    assert len(looked) == 1
    tables.look(os.getpid(), 7, LARGE + 1)
    tables.look(child.pid, 7, LARGE)
    assert len(looked) == 3


def test_who_shares_a_table(child: subprocess.Popen[bytes]) -> None:
    assert share_descriptors(child.pid, child.pid)
    assert not share_descriptors(child.pid, os.getpid())
    assert not share_descriptors(child.pid, 2**31 - 1)


def test_an_end_to_what_is_told(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tables, "_TOLD", 1)
    monkeypatch.setattr(_tables, "_TOLD_OF_USER", 2)
    tables = Tables({NULL})
    assert [len(tables.look(child.pid, 7, 64).devices) for _each in range(3)] == [1, 1, 0]
    found = tables.look(child.pid, 8, 64)
    assert (len(found.devices), found.more) == (1, True)
