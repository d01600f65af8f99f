# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _unit_files
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._unit_files import Line, find_lack, parse_lines, read_lines

BOTH = ("CapabilityBoundingSet=~CAP_SYS_RESOURCE", "CapabilityBoundingSet=CAP_SYS_RESOURCE")
AMBIENT = ("AmbientCapabilities=CAP_SYS_RESOURCE",)
INITIAL = ("PrivateUsers=no",)


def bounding(*values: str) -> list[str]:
    return [f"CapabilityBoundingSet={each}" for each in values]


@pytest.mark.parametrize(
    ("texts", "taking", "settings"),
    [
        ([], [], ()),
        (bounding("~CAP_SYS_RESOURCE"), [0], BOTH),
        (bounding("~cap_kill cap_sys_resource", "~CAP_CHOWN"), [0], BOTH),
        # By its number, and among what is no capability.
        (bounding("~ NO_SUCH 24"), [0], BOTH),
        (bounding("~CAP_SYS_RESOURCE", "~CAP_SYS_RESOURCE CAP_KILL"), [0, 1], BOTH),
        # All that is not in a list goes, where nothing was taken before.
        (bounding("CAP_KILL"), [0], BOTH),
        (bounding("CAP_KILL", "CAP_CHOWN"), [0, 1], BOTH),
        (bounding("CAP_KILL", "CAP_SYS_RESOURCE"), [], ()),
        (bounding("CAP_SYS_RESOURCE", "CAP_KILL"), [], ()),
        (bounding("~CAP_KILL", "CAP_CHOWN"), [], ()),
        (bounding("~CAP_KILL", "CAP_KILL", "CAP_CHOWN"), [2], BOTH),
        # An empty value takes all, and a mere ~ gives all.
        (bounding(""), [0], BOTH),
        (bounding("~CAP_SYS_RESOURCE", ""), [0, 1], BOTH),
        (bounding("CAP_SYS_RESOURCE", ""), [1], BOTH),
        (bounding("", "~"), [], ()),
        (bounding("~CAP_SYS_RESOURCE", "~"), [], ()),
        # Of what systemd does not know, nothing is left but that it is a list.
        (bounding('"~CAP_KILL"'), [0], BOTH),
        # What the role writes is right wherever it is read, also where nothing is taken any more.
        ([*bounding("~CAP_SYS_RESOURCE"), *BOTH], [], ()),
        ([*bounding("CAP_KILL"), *BOTH], [], ()),
        ([*bounding(""), *BOTH], [], ()),
        ([*BOTH, *bounding("~CAP_SYS_RESOURCE")], [2], BOTH),
        # Whoever is not root has what is ambient.
        (["User=libvirt"], [0], AMBIENT),
        (["User=libvirt", "User="], [], ()),
        (["User=libvirt", "User=root"], [], ()),
        (["DynamicUser=yes"], [0], AMBIENT),
        (["DynamicUser=yes", "DynamicUser=no"], [], ()),
        (["SecureBits=noroot noroot-locked"], [0], AMBIENT),
        (["SecureBits=noroot", "SecureBits="], [], ()),
        (["SecureBits=noroot", "SecureBits=keep-caps"], [], ()),
        (["SecureBits=noroot-locked"], [], ()),
        (["User=libvirt", *AMBIENT], [], ()),
        (["User=libvirt", *AMBIENT, "AmbientCapabilities=~CAP_SYS_RESOURCE"], [0, 2], AMBIENT),
        (["AmbientCapabilities=CAP_KILL", "User=libvirt"], [1], AMBIENT),
        (["AmbientCapabilities="], [], ()),
        (["User=libvirt", *bounding("~CAP_SYS_RESOURCE")], [1, 0], (*BOTH, *AMBIENT)),
        (["PrivateUsers=yes"], [0], INITIAL),
        (["PrivateUsers=self"], [0], INITIAL),
        (["PrivateUsers=yes", "PrivateUsers=False"], [], ()),
        (["PrivateUsers=true", *bounding("")], [1, 0], (*BOTH, *INITIAL)),
    ],
)
def test_what_takes_the_capability_away_and_what_gives_it_back(
    texts: list[str], taking: list[int], settings: tuple[str, ...]
) -> None:
    lines = [Line("/a", number, text) for number, text in enumerate(texts)]
    found = find_lack(lines)
    assert [each.line for each in found.lines] == taking
    assert found.settings == settings
    # Once that is read, nothing lacks.
    given = [Line("/z", number, text) for number, text in enumerate(found.settings)]
    assert find_lack([*lines, *given]) == ((), ())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"[Service]\nUser=a\n", [(2, "User=a")]),
        (b"\xef\n[Service]\r\n  User = a b \r\n", [(3, "User=a b")]),
        # Other sections and settings, and what is commented out.
        (b"User=a\n[Unit]\nUser=a\n[Service]\n#User=a\n ;User=a\nUsers=a\nLimitMEMLOCK=1\n[Install]\nUser=a\n", []),
        # What is continued, over comments; an escaped backslash does not continue anything.
        (b"[Service]\n\nUser=a \\\n# User=b \\\n  b \\\n;\n\nUser=c\n", [(3, "User=a b"), (8, "User=c")]),
        (b"[Service]\nUser=a\\\\\nUser=b\n", [(2, "User=a\\\\"), (3, "User=b")]),
        (b"[Service]\nUser=a \\", [(2, "User=a")]),
        (b"[Service]\nUser=\x1b[31m\xff\n", [(2, "User=\\x1b[31m\\xff")]),
    ],
)
def test_the_lines_of_a_file(text: bytes, found: list[tuple[int, str]]) -> None:
    assert parse_lines("/a", text) == [Line("/a", *each) for each in found]


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Where an administrator has drop-ins of a unit."""
    made = [tmp_path / name / "a.service.d" for name in ("etc", "run")]
    for each in made:
        each.mkdir(parents=True)
    monkeypatch.setattr(_unit_files, "_FOLDERS", [str(each.parent) for each in made])
    return made


def write(path: Path, value: str) -> str:
    path.write_text(f"[Service]\nUser={value}\n", "utf-8")
    return str(path)


def test_the_files_of_a_unit_in_their_order(folders: list[Path], tmp_path: Path) -> None:
    etc, run = folders
    unit = write(tmp_path / "a.service", "unit")
    known = [write(tmp_path / "b c.conf", "known"), str(tmp_path / "gone.conf")]
    shown = {"Id": "a.service", "FragmentPath": unit, "DropInPaths": f'"{known[0]}" {known[1]}'}
    write(run / "a.conf", "new")
    assert [each.text for each in read_lines(shown)] == ["User=unit", "User=known"]
    # What systemd has not read yet is known to nobody but the folders.
    shown["NeedDaemonReload"] = "yes"
    assert [each.text for each in read_lines(shown)] == ["User=unit", "User=new", "User=known"]
    write(etc / "z.conf", "last")
    assert read_lines(shown)[-1] == Line(str(etc / "z.conf"), 2, "User=last")
    assert read_lines({"Id": "a.service"}) == ()


def test_files_that_cannot_be_read(folders: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unit = write(tmp_path / "a.service", "unit")
    with pytest.raises(IommufdError, match="words that are not understood"):
        read_lines({"Id": "a.service", "DropInPaths": '"'})
    with pytest.raises(IommufdError, match=r"a\.service\.d cannot be read \(EISDIR"):
        read_lines({"FragmentPath": str(folders[0])})
    with pytest.raises(IommufdError, match="There are 65 of them"):
        read_lines({"DropInPaths": " ".join(f"/{number}" for number in range(65))})
    monkeypatch.setattr(_unit_files, "_FILE_MAX", 10)
    with pytest.raises(IommufdError, match="larger than 10 bytes"):
        read_lines({"FragmentPath": unit})


def test_a_file_that_nobody_answers_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.service")
    monkeypatch.setattr(_unit_files, "_PATIENCE", 0.2)
    with pytest.raises(IommufdError, match=r"The files of a\.service were not read within 0\.2 seconds"):
        read_lines({"Id": "a.service", "FragmentPath": str(tmp_path / "a.service")})
