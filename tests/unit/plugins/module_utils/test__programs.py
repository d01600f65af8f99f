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
from ansible_collections.virt.iommufd.plugins.module_utils import _errors, _programs
from ansible_collections.virt.iommufd.plugins.module_utils._programs import (
    EXEC,
    GRANT,
    INTERPRETER,
    LAUNCHER,
    PROGRAMS,
    find_services_with,
    zipapp,
)

EACH = pytest.mark.parametrize("program", PROGRAMS)
MODULE_UTILS = "ansible_collections/virt/iommufd/plugins/module_utils"

# Where a module runs, its module_utils are in a zip file, and nothing else of the collection is there.
FROM_A_ZIP_FILE = """
import sys
sys.path[:0] = [sys.argv[1]]
from ansible_collections.virt.iommufd.plugins.module_utils import _programs
assert _programs.__file__.startswith(sys.argv[1] + "/"), _programs.__file__
sys.stdout.buffer.write(_programs.zipapp(sys.argv[2]))
"""


def install(program: str, folder: Path) -> list[str]:
    """The program, started by the Python of this test as its first line would start another."""
    path = folder / program
    path.write_bytes(zipapp(program))
    return [sys.executable, INTERPRETER.split()[1], str(path)]


def files_of(program: str) -> dict[str, bytes]:
    """What is packed, by its names."""
    with zipfile.ZipFile(io.BytesIO(zipapp(program))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_their_names() -> None:
    assert PROGRAMS == (EXEC, GRANT) == ("iommufd-exec", "iommufd-host-grant")


@EACH
def test_it_is_the_same_each_time_and_names_its_interpreter(program: str) -> None:
    assert zipapp(program) == zipapp(program)
    assert zipapp(program).startswith(b"#!/usr/bin/python3 -IS\n")


@EACH
def test_nothing_in_it_depends_on_when_and_how_it_was_packed(program: str) -> None:
    entries = zipfile.ZipFile(io.BytesIO(zipapp(program))).infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    for entry in entries:
        assert entry.date_time == (1980, 1, 1, 0, 0, 0)
        assert entry.compress_type == zipfile.ZIP_STORED
        assert (entry.create_system, entry.external_attr >> 16) == (3, 0o100644)


@EACH
def test_it_holds_all_that_it_imports_and_no_more(program: str) -> None:
    """Also what is imported only when it is needed."""
    folder, package = Path(_errors.__file__).parent, program.replace("-", "_")
    files = files_of(program)
    main = re.findall(rf"^from {package}\.(\w+) import main$", files.pop("__main__.py").decode(), re.MULTILINE)
    assert files.pop(f"{package}/__init__.py") == b""
    found: set[str] = set()
    new = set(main)
    assert len(new) == 1
    while new:
        found |= new
        texts = [(folder / f"{name}.py").read_text() for name in new]
        new = {name for text in texts for name in re.findall(r"^ *from \.(\w+) import", text, re.MULTILINE)} - found
    assert files == {f"{package}/{name}.py": (folder / f"{name}.py").read_bytes() for name in found}


@EACH
def test_it_can_be_made_where_ansible_runs_a_module(program: str, tmp_path: Path) -> None:
    """Of what is in the zip file that Ansible sends, to the same bytes as here."""
    with zipfile.ZipFile(tmp_path / "sent.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        parts = MODULE_UTILS.split("/")
        for count in range(1, len(parts) + 1):
            archive.writestr("/".join([*parts[:count], "__init__.py"]), b"")
        for path in Path(_errors.__file__).parent.glob("*.py"):
            archive.write(path, f"{MODULE_UTILS}/{path.name}")
    done = subprocess.run(
        [sys.executable, "-I", "-c", FROM_A_ZIP_FILE, str(tmp_path / "sent.zip"), program],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == zipapp(program)
    assert os.listdir(tmp_path) == ["sent.zip"]


@EACH
def test_it_runs_from_anywhere(program: str, tmp_path: Path) -> None:
    # Whatever else there is of the same names is not to be taken.
    others = {f"{program.replace('-', '_')}.py", "argparse.py", "sitecustomize.py"}
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
    assert done.stdout.startswith(f"usage: {program} ")
    assert set(os.listdir(tmp_path)) == {*others, program}


def run(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
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


def test_the_services_that_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_programs, "_UNIT_FILES", (str(tmp_path / "none"), str(tmp_path)))
    (tmp_path / "vm@.service.d").mkdir()
    for name, text in {
        "a.service": f"[Service]\nExecStart={LAUNCHER} --user vm -- qemu\n",
        "b.service": f"ExecStartPre = -+{LAUNCHER}\n",
        "vm@.service.d/x.conf": f"ExecStart=\nExecStart={LAUNCHER} \\\n  -- qemu\n",
        # Others, a comment, and what is none.
        "c.service": f"ExecStart={LAUNCHER}-old --user vm\n#ExecStart={LAUNCHER} a\nDescription={LAUNCHER}\n",
        "d.socket": f"ExecStart={LAUNCHER}\n",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "e.service").symlink_to("/nowhere")
    assert find_services_with(LAUNCHER) == ["a.service", "b.service", "vm@.service"]
    os.mkfifo(tmp_path / "f.service")
    monkeypatch.setattr(_programs, "_PATIENCE", 0.3)
    assert find_services_with(LAUNCHER) == []
