# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""CONTRIBUTING.md names each file of the tree and no other, and what it says of places and floors is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import sandbox
from test_claims import PROOF, names

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
FILES = sandbox.project_files(ROOT)
# Here each file has a row of its own. Elsewhere a row may stand for a folder.
BY_NAME = ("playbooks/", "plugins/", "roles/", "tests/kernel/", "tests/tooling/")
UTILS = "plugins/module_utils/"


def mapped(text: str) -> list[str]:
    """The names in the map, as paths from the root."""
    found, folder = [], ""
    for line in text.partition("\n## The map\n")[2].splitlines():
        if title := re.fullmatch(r"### `(.+/)`", line):
            folder = title[1].removeprefix("./")
        elif row := re.fullmatch(r"\| `([^`]+)` \| [^|]+ \|", line):
            found.append(folder + row[1])
    return found


def floors(text: str) -> dict[str, int]:
    """The floor of each file of module_utils, by its name in imports."""
    found, floor = {}, 0
    for line in text.partition(f"### `{UTILS}`\n")[2].partition("\n### ")[0].splitlines():
        if title := re.match(r"\*\*Floor (\d+)\*\*: ", line):
            floor = int(title[1])
        elif row := re.match(r"\| `(.+)\.py` \|", line):
            found[row[1].replace("/", ".")] = floor
    return found


def imported(path: Path) -> set[str]:
    """What a file of module_utils imports of the others, at the top or late."""
    found = set()
    package = path.relative_to(ROOT / UTILS).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            stem = ".".join(part for part in base if part)
            modules = [stem] if node.module else []
            found |= {*modules, *(f"{stem}.{each.name}".lstrip(".") for each in node.names)}
    return found


def wrong_rows(rows: list[str], files: list[str]) -> list[str]:
    """What is wrong with the map: files without a row, rows without a file or twice, and folders in place of files."""
    found = [f"no row for {name}" for name in files if not any(covers(row, name) for row in rows)]
    found += [f"no file for the row {row}" for row in rows if not any(covers(row, name) for name in files)]
    found += [f"two rows for {row}" for row in sorted(set(rows)) if rows.count(row) > 1]
    return found + [f"a folder, not its files: {row}" for row in rows if row.endswith("/") and row.startswith(BY_NAME)]


def covers(row: str, name: str) -> bool:
    """Whether a row is that of a file, or of a folder around it."""
    return name.startswith(row) if row.endswith("/") else name == row


def wrong_floors(text: str) -> list[str]:
    """Each import that does not go to a lower floor."""
    floor_of = floors(text)
    return [
        f"{name} (floor {floor}) imports {other} (floor {floor_of[other]})"
        for name, floor in floor_of.items()
        for other in sorted(imported(ROOT / UTILS / f"{name.replace('.', '/')}.py") & floor_of.keys())
        if floor_of[other] >= floor
    ]


def wrong_places(text: str) -> list[str]:
    """What the answers to "Where is ...?" name and the tree does not have."""
    section = text.partition("\n## Where is ...?\n")[2].partition("\n## ")[0]
    found = []
    for name, function, _task in PROOF.findall(section):
        path = ROOT / name
        if "/" not in name:
            continue
        if not path.is_file():
            found.append(f"no file {name}")
        elif function and function not in names(path):
            found.append(f"no {function} in {name}")
    return found


def test_each_file_is_in_the_map_and_the_map_names_no_other() -> None:
    rows = mapped(TEXT)
    assert len(rows) > 100
    assert wrong_rows(rows, FILES) == []


def test_imports_go_to_lower_floors() -> None:
    assert len(floors(TEXT)) == len(list((ROOT / UTILS).rglob("*.py")))
    assert wrong_floors(TEXT) == []


def test_each_place_is_there() -> None:
    assert len(re.findall(r"`[^`]+\.py::\w+`", TEXT)) > 10
    assert wrong_places(TEXT) == []


def test_no_file_that_it_names_is_missing() -> None:
    """In the text before the map, such as in the steps to add something."""
    named = set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|yml|rst))[`:]", TEXT.partition("\n## The map\n")[0]))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("| `noxfile.py` |", "| `nofile.py` |", ["no row for noxfile.py", "no file for the row nofile.py"]),
        ("| `CLAIMS.md` |", "| `CLAIMS.md` | twice |\n| `CLAIMS.md` |", ["two rows for tests/CLAIMS.md"]),
        ("### `plugins/lookup/`", "### `plugins/`", ["no row for plugins/lookup/iommufd_exec.py"]),
    ],
)
def test_a_wrong_map_is_told(old: str, new: str, words: list[str]) -> None:
    """A control: that these are told shows that the other tests can fail."""
    assert TEXT.count(old) == 1
    told = wrong_rows(mapped(TEXT.replace(old, new)), FILES)
    assert set(words) <= set(told)


def test_a_wrong_floor_or_place_is_told() -> None:
    """Likewise."""
    lowest = TEXT.replace("**Floor 2**", "**Floor 1**")
    assert any(each.startswith("_iommufd (floor 1) imports _errors (floor 1)") for each in wrong_floors(lowest))
    renamed = TEXT.replace("_change.py::explain`", "_change.py::explains`")
    assert wrong_places(renamed) == ["no explains in plugins/module_utils/_change.py"]
    folder = [*(row for row in mapped(TEXT) if not row.startswith("plugins/modules/")), "plugins/modules/"]
    assert wrong_rows(folder, FILES) == ["a folder, not its files: plugins/modules/"]
