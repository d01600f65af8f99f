# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bad luck of the lab's guests, with a real one: each ends with a clear error or none, and the next `up` works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import store

LAB = Path(store.__file__).parent
GUEST = "fallback"
# In seconds, far more than anything here takes on a busy machine
PATIENCE = 900
PANIC = "echo c > /proc/sysrq-trigger"


class Lab:
    """A run of the lab with guests of its own."""

    def __init__(self, **environment: str) -> None:
        instance = f"{os.environ.get('LAB_INSTANCE', '')}.machine"
        self._environment: Mapping[str, str] = {**os.environ, "LAB_INSTANCE": instance, **environment}

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(LAB), *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self._environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        output, errors = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def do(self, *words: str) -> subprocess.CompletedProcess[str]:
        """As `run`, for what must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done

    def state(self) -> dict[str, str]:
        """What the guest does."""
        [row] = [each for each in json.loads(self.do("status", "--json").stdout) if each["name"] == GUEST]
        return dict(row)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """The lab, with no guest up."""
    run = Lab()
    run.do("down", GUEST)
    yield run
    run.do("down", GUEST)


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[Lab]:
    """The lab with a cache of its own: the guest's saved state is a copy, and all else the real one's."""
    Lab().do("build", GUEST)
    cache = tmp_path / "virt-iommufd-lab"
    cache.mkdir()
    for kind in ("kernel", "root", "key"):
        (cache / kind).symlink_to(store.root() / kind)
    newest = max((store.root() / "booted").glob(f"{GUEST}-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    shutil.copytree(newest.parent, cache / "booted" / newest.parent.name)
    run = Lab(XDG_CACHE_HOME=str(tmp_path))
    yield run
    run.do("down", GUEST)


def test_a_guest_that_panics(lab: Lab) -> None:
    lab.do("up", GUEST)
    assert lab.run("ssh", PANIC).returncode != 0
    deadline = time.monotonic() + PATIENCE
    while lab.state()["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert lab.state()["state"] == "died"
    refused = lab.run("ssh", "true")
    assert refused.returncode == 1
    assert f"lab: guest {GUEST} has died, the end of {lab.state()['console_log']}:" in refused.stderr
    assert "Kernel panic - not syncing: sysrq triggered crash" in refused.stderr
    lab.do("up", GUEST)
    assert lab.state()["state"] == "running"
    lab.do("ssh", "true")


def test_a_saved_state_that_is_damaged(own_cache: Lab, tmp_path: Path) -> None:
    [disk] = tmp_path.glob("virt-iommufd-lab/booted/*/disk.qcow2")
    os.truncate(disk, disk.stat().st_size // 2)
    done = own_cache.do("up", GUEST)
    assert f"lab: guest {GUEST}: its saved state is thrown away and made again: " in done.stderr
    own_cache.do("ssh", "true")
    own_cache.do("down", GUEST)
    again = own_cache.do("up", GUEST)
    assert "thrown away" not in again.stderr
    assert "restoring" in again.stderr
    own_cache.do("ssh", "true")


def test_two_ups_at_once(lab: Lab) -> None:
    both = [lab.start("up", GUEST) for _each in range(2)]
    told = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(f"guest {GUEST} is up already" in each for each in told) == [False, True]
    folder = os.path.dirname(lab.state()["console_log"])
    assert working_in(folder) == [int(lab.state()["pid"])]
    lab.do("ssh", "true")


def working_in(folder: str) -> list[int]:
    """The emulators in a folder: those that QEMU runs from there."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd") == folder and "qemu-system" in os.readlink(path / "exe"):
                found.append(int(path.name))
        except OSError:
            # It has ended, or is somebody else's.
            continue
    return found
