# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The collections come out of the wheel that carries them, whole and alone."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import fetch_collections
import pytest

ROOT = Path(__file__).resolve().parents[2]


def wheel(place: Path) -> Path:
    """A wheel with three collections, the name of one of which begins like another's."""
    path = place / "ansible-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("community/general/a", "community/general/b/c", "community/general_2/a", "other/general/a"):
            archive.writestr(f"ansible_collections/{name}", name)
    return path


def test_one_collection_is_unpacked(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    folder = fetch_collections.unpack(wheel(tmp_path), "community.general", tree)
    assert folder == tree / "ansible_collections" / "community" / "general"
    files = {str(path.relative_to(folder)): path.read_text() for path in tree.rglob("*") if path.is_file()}
    assert files == {"a": "community/general/a", "b/c": "community/general/b/c"}


def test_a_collection_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"ansible-1-.* does not carry the collection ansible\.posix"):
        fetch_collections.unpack(wheel(tmp_path), "ansible.posix", tmp_path)


def test_what_the_collection_depends_on_is_fetched() -> None:
    galaxy = (ROOT / "galaxy.yml").read_text(encoding="utf-8")
    (section,) = re.findall(r"^dependencies:\n((?:  .+\n)+)", galaxy, re.MULTILINE)
    assert tuple(re.findall(r"^  ([\w.]+):", section, re.MULTILINE)) == fetch_collections.COLLECTIONS
