# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.plugin_utils._zipapp import INTERPRETER, zipapp


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """The program, started by the Python of this test as its first line would start another."""
    path = tmp_path / "iommufd-exec"
    path.write_bytes(zipapp())
    return [sys.executable, INTERPRETER.split()[1], str(path)]


def test_it_is_the_same_each_time_and_names_its_interpreter() -> None:
    assert zipapp() == zipapp()
    assert zipapp().startswith(b"#!/usr/bin/python3 -IS\n")


def test_nothing_in_it_depends_on_when_and_how_it_was_packed() -> None:
    for entry in zipfile.ZipFile(io.BytesIO(zipapp())).infolist():
        assert entry.date_time == (1980, 1, 1, 0, 0, 0)
        assert entry.compress_type == zipfile.ZIP_STORED
        assert (entry.create_system, entry.external_attr >> 16) == (3, 0o100644)


def test_it_holds_all_that_it_imports(program: list[str], tmp_path: Path) -> None:
    # Whatever else there is of the same names is not to be taken.
    for name in ("iommufd_exec.py", "argparse.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit(99)")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "argparse.py")}
    done = subprocess.run(
        [*program, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: iommufd-exec [OPTION...] -- COMMAND")
    assert sorted(os.listdir(tmp_path)) == ["argparse.py", "iommufd-exec", "iommufd_exec.py", "sitecustomize.py"]


def test_its_exit_codes_are_its_own(program: list[str]) -> None:
    done = subprocess.run([*program, "--", "qemu"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 121
    assert done.stderr.startswith("iommufd-exec: No argument of qemu has {iommufd} in it")
