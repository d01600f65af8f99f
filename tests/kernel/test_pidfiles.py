# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pidfiles, which are input from whoever can write them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._pidfile import PidfileTarget
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, VM, Vmm, change_user, run_within
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

pytestmark = pytest.mark.once


@pytest.fixture
def place(vmm: Vmm) -> Callable[..., Path]:
    """Makes a pidfile of the process, in a new folder."""

    def write(folder: Path, owner: int = 0, folder_owner: int = 0, folder_mode: int = 0o755) -> Path:
        folder.mkdir()
        path = folder / "pid"
        path.write_text(f"{vmm.pid}\n")
        os.chown(path, owner, owner)
        os.chown(folder, folder_owner, folder_owner)
        folder.chmod(folder_mode)
        return path

    return write


@pytest.mark.parametrize(
    "kept",
    [{}, {"owner": VM}, {"owner": VM, "folder_owner": VM}, {"folder_mode": 0o1777}],
)
def test_a_pidfile_that_can_be_trusted(vmm: Vmm, tmp_path: Path, place: Callable[..., Path], kept: Any) -> None:
    assert run(pidfile=str(place(tmp_path / "run", **kept)), value="process")["changed"]
    assert vmm.mode == "process"


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"owner": ALICE}, "run/pid can be written by user alice (uid 1002)"),
        ({"owner": VM, "folder_owner": ALICE}, "run can be written by user alice (uid 1002)"),
        ({"folder_owner": ALICE}, "run can be written by user alice (uid 1002)"),
        ({"folder_mode": 0o777}, "run can be written by everybody"),
        ({"folder_mode": 0o775}, "run can be written by group root"),
    ],
)
def test_a_pidfile_that_somebody_else_can_write(
    vmm: Vmm, tmp_path: Path, place: Callable[..., Path], told: Told, kept: Any, words: str
) -> None:
    message = told(run(pidfile=str(place(tmp_path / "run", **kept)), value="process"))
    assert "cannot be trusted" in message
    assert words in message
    assert f"(pid {vmm.pid}) belongs to uid 1001" in message
    assert vmm.mode == "user"


def test_a_stale_pidfile(vmm: Vmm, tmp_path: Path, place: Callable[..., Path], told: Told) -> None:
    path = place(tmp_path / "run")
    written = path.stat().st_mtime - 3600
    os.utime(path, (written, written))
    assert "is stale: it was written before" in told(run(pidfile=str(path), value="process"))
    assert vmm.mode == "user"


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**30)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_text(" \n"), "is empty"),
        (lambda path: path.write_text("vmm\x1b[31m\n"), r"does not hold the id of a process but 'vmm\\x1b[31m\\n'"),
        (lambda path: path.write_text("1 2\n"), "does not hold the id of a process"),
        (lambda path: path.write_text("-1\n"), "does not hold the id of a process"),
        (lambda path: path.mkdir(), "is not a regular file but a folder"),
        (os.mkfifo, "is not a regular file but a FIFO"),
        (lambda path: path.symlink_to("/run/vmm.pid"), "is a symbolic link"),
        (make_huge, "it holds 1073741824 bytes, and 64 at most are read"),
        (lambda path: None, "cannot be opened (ENOENT: No such file or directory)"),
    ],
)
def test_what_is_no_pidfile(tmp_path: Path, told: Told, make: Callable[[Path], object], words: str) -> None:
    path = tmp_path / "pid"
    make(path)
    answered = run(pidfile=str(path), value="process")
    assert words in told(answered)
    assert "process" not in answered


def test_a_pidfile_that_the_caller_may_not_read(vmm: Vmm, place: Callable[..., Path], told: Told) -> None:
    path = place(Path("/run/kernel-test"))
    try:
        path.chmod(0o600)
        answered = run_within(partial(change_user, ALICE), pidfile=str(path), value="process")
        assert "cannot be opened (EACCES: Permission denied)" in told(answered)
    finally:
        path.unlink()
        path.parent.rmdir()


@pytest.mark.parametrize("step", ["resolve", "check"])
@pytest.mark.parametrize(
    ("swap", "words"),
    [
        (lambda path: path.symlink_to("/proc/self/fd/0"), "is a symbolic link"),
        (os.mkfifo, "is not a regular file but a FIFO"),
        (lambda path: None, "(ENOENT: No such file or directory)"),
    ],
)
def test_a_pidfile_that_is_swapped_between_the_readings(
    vmm: Vmm,
    tmp_path: Path,
    place: Callable[..., Path],
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    swap: Callable[[Path], object],
    words: str,
) -> None:
    path = place(tmp_path / "run")
    original = getattr(PidfileTarget, step)
    calls: list[int] = []

    def hooked(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if step == "resolve" else 1):
            path.unlink()
            swap(path)
        return original(*args)

    monkeypatch.setattr(PidfileTarget, step, hooked)
    assert words in told(run(pidfile=str(path), value="process"))
    assert vmm.mode == "user"


def test_a_pidfile_that_changes_between_the_readings(
    vmm: Vmm,
    start: Start,
    tmp_path: Path,
    place: Callable[..., Path],
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = place(tmp_path / "run")
    other = start()
    other.open()
    original = PidfileTarget.resolve

    def hooked(target: PidfileTarget) -> int:
        pid = original(target)
        path.write_text(str(other.pid))
        return pid

    monkeypatch.setattr(PidfileTarget, "resolve", hooked)
    message = told(run(pidfile=str(path), value="process"))
    assert f"named process {vmm.pid}, and a moment later {other.pid}" in message
    assert vmm.mode == other.mode == "user"


def test_a_user_swaps_a_pidfile_all_the_time(vmm: Vmm, start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Between a pidfile of the own process, one of somebody else's, a symbolic link to that, and a FIFO."""
    alice = start(ALICE)
    alice.open()
    folder = Path("/run/kernel-test")
    folder.mkdir()
    try:
        others = [folder / name for name in ("own", "other", "link", "fifo")]
        others[0].write_text(str(alice.pid))
        others[1].write_text(str(vmm.pid))
        others[2].symlink_to("other")
        os.mkfifo(others[3])
        for path in (folder, *others):
            os.chown(path, ALICE, ALICE, follow_symlinks=False)
        swapper = start(ALICE)
        swapper.do("rename", str(folder / "pid"), *map(str, others))
        seen = set()
        for turn in range(3000):
            answered = run(pidfile=str(folder / "pid"), value="process")
            if "failed" in answered:
                seen.add(answered["msg"])
            else:
                assert answered["process"]["pid"] == alice.pid
            if turn >= 50 and len(seen) >= 3:
                break
        swapper.end()
        assert len(seen) >= 3
        known = "symbolic link|but a FIFO|cannot be trusted|a moment later|cannot be (opened|looked up)|was replaced"
        assert [message for message in seen if not re.search(known, message)] == []
        assert vmm.mode == "user"
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
