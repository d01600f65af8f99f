# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _errors
from ansible_collections.virt.iommufd.plugins.plugin_utils._zipapp import EXEC, GRANT, INTERPRETER, Program, zipapp

PROGRAMS = pytest.mark.parametrize("program", [EXEC, GRANT], ids=lambda program: program.name)


def install(program: Program, folder: Path) -> list[str]:
    """The program, started by the Python of this test as its first line would start another."""
    path = folder / program.name
    path.write_bytes(zipapp(program))
    return [sys.executable, INTERPRETER.split()[1], str(path)]


@PROGRAMS
def test_it_is_the_same_each_time_and_names_its_interpreter(program: Program) -> None:
    assert zipapp(program) == zipapp(program)
    assert zipapp(program).startswith(b"#!/usr/bin/python3 -IS\n")


@PROGRAMS
def test_nothing_in_it_depends_on_when_and_how_it_was_packed(program: Program) -> None:
    for entry in zipfile.ZipFile(io.BytesIO(zipapp(program))).infolist():
        assert entry.date_time == (1980, 1, 1, 0, 0, 0)
        assert entry.compress_type == zipfile.ZIP_STORED
        assert (entry.create_system, entry.external_attr >> 16) == (3, 0o100644)


@PROGRAMS
def test_it_holds_all_that_it_imports_and_no_more(program: Program) -> None:
    """Also what is imported only when it is needed."""
    folder = Path(_errors.__file__).parent
    found: set[str] = set()
    new = {program.main}
    while new:
        found |= new
        texts = [(folder / f"{name}.py").read_text() for name in new]
        new = {name for text in texts for name in re.findall(r"^ *from \.(\w+) import", text, re.MULTILINE)} - found
    assert set(program.modules) == found


@PROGRAMS
def test_it_runs_from_anywhere(program: Program, tmp_path: Path) -> None:
    # Whatever else there is of the same names is not to be taken.
    others = {f"{program.name.replace('-', '_')}.py", "argparse.py", "sitecustomize.py"}
    for name in others:
        (tmp_path / name).write_text("raise SystemExit(99)")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "argparse.py")}
    done = subprocess.run(
        [*install(program, tmp_path), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {program.name} ")
    assert set(os.listdir(tmp_path)) == {*others, program.name}


def run(program: Program, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*install(program, folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_its_exit_codes_are_its_own(tmp_path: Path) -> None:
    done = run(EXEC, tmp_path, "--", "qemu")
    assert done.returncode == 121
    assert done.stderr.startswith("iommufd-exec: No argument of qemu has {iommufd} in it")


def test_what_may_not_be_granted(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = run(GRANT, tmp_path, f"{tmp_path}/emulator")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"iommufd-host-grant: {tmp_path}/emulator cannot be trusted: ")
    assert run(GRANT, tmp_path).returncode == 2
