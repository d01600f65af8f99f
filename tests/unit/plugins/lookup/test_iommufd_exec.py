# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from ansible import constants
from ansible.errors import AnsibleLookupError
from ansible_collections.virt.iommufd.plugins.lookup.iommufd_exec import LookupModule
from ansible_collections.virt.iommufd.plugins.module_utils._programs import EXEC, zipapp


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where Ansible puts what is gone when it ends."""
    monkeypatch.setattr(constants, "DEFAULT_LOCAL_TMP", str(tmp_path))
    return tmp_path


def test_it_is_packed_once(folder: Path) -> None:
    (path,) = LookupModule().run([])
    assert Path(path).parent == folder
    assert Path(path).read_bytes() == zipapp(EXEC)
    made = Path(path).stat()
    assert LookupModule().run([]) == [path]
    assert Path(path).stat().st_ino == made.st_ino
    assert [each.name for each in folder.iterdir()] == [Path(path).name]
    assert stat.S_IMODE(made.st_mode) == 0o700


def test_it_takes_nothing(folder: Path) -> None:
    with pytest.raises(AnsibleLookupError, match="takes no terms"):
        LookupModule().run(["iommufd-exec"])
    with pytest.raises(AnsibleLookupError, match="no options"):
        LookupModule().run([], dest="/usr/bin")
    assert not list(folder.iterdir())
