# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bad luck while something is made: whatever happens, it is there whole or not at all, and the next run works."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import store
from progress import LabError, Progress, run

THING = store.Artifact("thing", "one", {"from": "nothing"})


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def build(work: Path) -> Mapping[str, Any]:
    (work / "content").write_text("whole")
    return {"fact": 1}


def check_whole(path: Path) -> None:
    assert (path / "content").read_text() == "whole"
    assert store.manifest(path)["fact"] == 1
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), LabError("no network"), KeyboardInterrupt()],
)
def test_a_build_that_fails(error: BaseException) -> None:
    def fail(work: Path) -> Mapping[str, Any]:
        build(work)
        (work / "build.log").write_text("why")
        raise error

    with pytest.raises(type(error)):
        store.make(THING, fail)
    assert list(THING.path.parent.iterdir()) == []
    assert (store.root() / "logs" / "thing-one.log").read_text() == "why"
    check_whole(store.make(THING, build))


def test_a_build_that_is_killed() -> None:
    child = os.fork()
    if not child:

        def die(work: Path) -> Mapping[str, Any]:
            (work / "content").write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
            return {}

        store.make(THING, die)
        os._exit(1)
    os.waitpid(child, 0)
    [half] = THING.path.parent.iterdir()
    assert half != THING.path
    assert not store.busy()
    check_whole(store.make(THING, build))


def test_what_a_killed_build_had_started_is_waited_for(tmp_path: Path) -> None:
    """It may still write there."""
    ready = tmp_path / "ready"
    child = os.fork()
    if not child:

        def start(work: Path) -> Mapping[str, Any]:
            script = f"touch {ready}; exec sleep 600"
            run(["sh", "-c", f"echo $$ > {tmp_path}/pid; {script}"], work / "build.log", Progress("test"))
            return {}

        store.make(THING, start)
        os._exit(1)
    while not ready.exists():
        os.sched_yield()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert store.busy()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    check_whole(store.make(THING, build))


def test_two_at_once() -> None:
    """One makes it, the other waits for it."""
    made = []

    def once(work: Path) -> Mapping[str, Any]:
        made.append(work)
        other.start()
        return build(work)

    other = threading.Thread(target=store.make, args=(THING, once))
    store.make(THING, once)
    other.join()
    assert len(made) == 1
    check_whole(THING.path)


def test_what_is_of_no_use_is_made_again() -> None:
    path = store.make(THING, build)
    store.discard(THING)
    assert not path.exists()
    check_whole(store.make(THING, build))


def test_the_last_two_of_a_name_are_kept() -> None:
    paths = [store.make(store.Artifact("thing", "one", {"from": number}), build) for number in range(3)]
    assert [path.exists() for path in paths] == [False, True, True]
