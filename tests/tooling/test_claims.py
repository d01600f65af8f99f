# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Each claim of tests/CLAIMS.md names proofs that are there, and nothing that proves something is left out of it."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADER = "| claim | proof |\n| --- | --- |\n"
# A path with the name of a test, or with that of a task, or alone.
PROOF = re.compile(r'`([^`:]+)(?:::(\w+))?`(?: "([^"]+)")?')


def proven(text: str) -> list[str]:
    """The rows of the tables of claims and proofs."""
    return [row for table in text.split(HEADER)[1:] for row in table.partition("\n\n")[0].splitlines()]


@functools.cache
def names(path: Path) -> set[str]:
    """The functions and classes of a Python file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)}


def complaints(row: str) -> list[str]:
    """What is wrong with a row."""
    cells = re.fullmatch(r"\| ([^|]+) \| ([^|]+) \|", row)
    if not cells or set(PROOF.sub("", cells[2]).split("; ")) != {""}:
        return [f"not a claim and its proofs: {row}"]
    found = []
    for name, test, task in PROOF.findall(cells[2]):
        path = ROOT / name
        if not path.is_file():
            found.append(f"no file {name}")
        elif test and test not in names(path):
            found.append(f"no {test} in {name}")
        elif task and not re.search(rf'(?m)^ *- name: "?{re.escape(task)}"?(?: #.*)?$', path.read_text("utf-8")):
            found.append(f"no task {task!r} in {name}")
    return found


def unnamed(rows: list[str]) -> set[str]:
    """The test files of tests/kernel and the Molecule scenarios that are in no row."""
    paths = {Path(name) for row in rows for name, _test, _task in PROOF.findall(row)}
    files = {path.relative_to(ROOT) for path in ROOT.glob("tests/kernel/test_*.py")}
    scenarios = {path.parent.relative_to(ROOT) for path in ROOT.glob("extensions/molecule/*/molecule.yml")}
    assert files
    assert scenarios
    return {str(each) for each in files | scenarios if not any(path.is_relative_to(each) for path in paths)}


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """The list itself."""
    return proven((ROOT / "tests" / "CLAIMS.md").read_text("utf-8"))


def test_each_proof_is_there(rows: list[str]) -> None:
    assert len(rows) >= 80
    assert [each for row in rows for each in complaints(row)] == []


def test_no_test_and_no_scenario_is_left_out(rows: list[str]) -> None:
    assert unnamed(rows) == set()


RIGHT = "`tests/tooling/test_claims.py::test_each_proof_is_there`"


@pytest.mark.parametrize(
    ("proof", "words"),
    [
        ("`tests/kernel/test_nothing.py::test_user`", "no file tests/kernel/test_nothing.py"),
        ("`tests/kernel/test_setting.py::test_nothing`", "no test_nothing in tests/kernel/test_setting.py"),
        ('`extensions/molecule/fit/verify.yml` "Verify"', "no task 'Verify' in extensions/molecule/fit/verify.yml"),
        ("`tests/bench`", "no file tests/bench"),
        ("It is so.", "not a claim and its proofs"),
        (f"{RIGHT}; and more", "not a claim and its proofs"),
        (f"{RIGHT} | {RIGHT}", "not a claim and its proofs"),
    ],
)
def test_a_wrong_row_is_told(proof: str, words: str) -> None:
    """A control: that these are told shows that the other tests can fail."""
    (right, wrong) = proven(f"# List\n\n{HEADER}| It holds. | {RIGHT} |\n| It holds. | {proof} |\n\n## More\n")
    assert complaints(right) == []
    (told,) = complaints(wrong)
    assert words in told


def test_what_is_left_out_is_told(rows: list[str]) -> None:
    """Likewise."""
    kept = [row for row in rows if "test_launch.py" not in row and "molecule/fit/" not in row]
    assert {"tests/kernel/test_launch.py", "extensions/molecule/fit"} <= unnamed(kept)
