# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _memlock, _task_target
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit
from ansible_collections.virt.iommufd.plugins.modules import memlock_limit
from ansible_collections.virt.iommufd.tests.kernel.run_module import run as run_module

Run = Callable[..., "dict[str, Any]"]
MIB = 2**20


def limits(pid: int) -> tuple[int, int]:
    return resource.prlimit(pid, resource.RLIMIT_MEMLOCK)


@pytest.fixture
def pid(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> int:
    """A process with a limit of 2 MiB, and 4 MiB at most, of which nothing else is known."""
    resource.prlimit(child.pid, resource.RLIMIT_MEMLOCK, (2 * MIB, 4 * MIB))
    monkeypatch.setattr(_task_target, "in_child", lambda _user, work, _seconds: work())
    monkeypatch.setattr(memlock_limit, "counters_of", lambda _process, _identity: None)
    return child.pid


def run(pid: int, **options: Any) -> dict[str, Any]:
    return run_module(memlock_limit, pid=pid, **options)


def test_set_and_query(pid: int) -> None:
    answer = run(pid, value="3M", _ansible_diff=True)
    told = {
        "memlock_bytes": 3 * MIB,
        "memlock_unlimited": False,
        "memlock_hard_bytes": 4 * MIB,
        "memlock_hard_unlimited": False,
    }
    assert answer["changed"]
    assert {name: answer[name] for name in told} == told == answer["diff"]["after"]
    assert answer["diff"]["before"]["memlock_bytes"] == 2 * MIB
    assert answer["process"]["pid"] == pid
    assert limits(pid) == (3 * MIB, 4 * MIB)
    again = run(pid)
    assert (again["changed"], again["memlock_bytes"], "counters" in again) == (False, 3 * MIB, False)


def test_what_is_charged_is_asked_only_where_the_limit_is_lowered(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = run(pid, value="1M")
    assert answer["failed"]
    assert "It cannot be told what" in answer["msg"]
    assert (answer["counters"], answer["memlock_bytes"]) == (None, 2 * MIB)
    for held, fits in ((MIB + 1, False), (MIB, True)):
        rows = [{"counter": "user", "held_bytes": held}, {"counter": "mm_locked", "held_bytes": 0}]
        monkeypatch.setattr(memlock_limit, "counters_of", lambda _process, _identity, rows=rows: rows)
        answer = run(pid, value="1M", _ansible_check_mode=True)
        assert (answer.get("failed", False), answer["changed"]) == (not fits, fits)
        assert answer["counters"] == rows
        assert fits or f"is charged {held} bytes (counter user)" in answer["msg"]
    assert limits(pid) == (2 * MIB, 4 * MIB)
    monkeypatch.setattr(memlock_limit, "counters_of", None)
    assert run(pid, value="1M", force=True)["changed"]
    assert run(pid, value="2M")["changed"]


def test_another_process_by_then(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlock_limit, "counters_of", lambda _process, _identity: [])
    began = vars(memlock_limit)["work_at_target"]

    def later(*given: Any, **more: Any) -> Any:
        answer = began(*given, **more)
        return {**answer, "identity": (answer["identity"][0], answer["identity"][1] - 1)}

    monkeypatch.setattr(memlock_limit, "work_at_target", later)
    assert "is another process than a moment ago" in run(pid, value="1M")["msg"]
    assert limits(pid) == (2 * MIB, 4 * MIB)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "may not set the limit of .* CAP_SYS_RESOURCE"),
        (errno.ESRCH, "has ended"),
        (errno.EINVAL, "could not be set .EINVAL"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_what_the_kernel_refuses(
    pid: int, monkeypatch: pytest.MonkeyPatch, number: int, words: str, check: bool
) -> None:
    class Refusing:
        RLIMIT_MEMLOCK, RLIM_INFINITY = resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY

        @staticmethod
        def prlimit(*_given: object) -> tuple[int, int]:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_memlock, "resource", Refusing)
    answer = run(pid, value="3M", _ansible_check_mode=check)
    assert answer["failed"]
    assert re.search(words, answer["msg"])
    assert limits(pid) == (2 * MIB, 4 * MIB)


def test_to_raise_the_hard_limit_takes_a_capability(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memlock, "capability_names", lambda _mask: [])
    assert "failed" not in run(pid, value="4M", _ansible_check_mode=True)
    assert "may not set the limit" in run(pid, value="5M", _ansible_check_mode=True)["msg"]
    assert limits(pid) == (2 * MIB, 4 * MIB)


def test_a_process_by_the_limit_that_it_has() -> None:
    assert memlock_limit.limit_rows(Limit(None, None)) == {
        "memlock_bytes": None,
        "memlock_unlimited": True,
        "memlock_hard_bytes": None,
        "memlock_hard_unlimited": True,
    }
