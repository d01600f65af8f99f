# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _iommufd, _task_target
from ansible_collections.virt.iommufd.plugins.module_utils._child import NoAnswer
from ansible_collections.virt.iommufd.plugins.modules import iommufd_option
from ansible_collections.virt.iommufd.tests.kernel.run_module import run as run_module
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel

Run = Callable[..., "dict[str, Any]"]


@pytest.fixture
def run(child: subprocess.Popen[bytes]) -> Run:
    """Runs the module on the child; the answer is the JSON that it prints."""

    def run_on_child(**options: Any) -> dict[str, Any]:
        given = {key: value for key, value in {"pid": child.pid, **options}.items() if value is not None}
        return run_module(iommufd_option, **given)

    return run_on_child


def test_query(run: Run, null_is_iommufd: FakeKernel, child: subprocess.Popen[bytes]) -> None:
    answer = run(fd=50)
    assert not answer["changed"]
    assert answer["option"] == "rlimit_mode"
    assert answer["value"] == "user"
    assert answer["process"]["pid"] == child.pid
    assert answer["iommufds"] == [
        {"fd": 50, "ioas_id": None, "before": "user", "after": "user", "outcome": "unchanged", "msg": ""}
    ]
    assert "diff" not in answer


def test_every_iommufd_is_worked_on_and_what_is_not_one_is_passed_over(run: Run, null_is_iommufd: FakeKernel) -> None:
    # 51 is the same device, opened with O_PATH.
    answer = run(value="process")
    assert [each["fd"] for each in answer["iommufds"]] == [50]
    assert answer["changed"]
    assert answer["value"] == "process"
    assert null_is_iommufd.mode == 1


@pytest.mark.parametrize("check", [False, True])
def test_set_in_real_mode_and_in_check_mode(run: Run, null_is_iommufd: FakeKernel, check: bool) -> None:
    answer = run(fd=50, value="process", _ansible_check_mode=check, _ansible_diff=True)
    assert answer["changed"]
    assert answer["diff"] == {"before": {"iommufd 50": "user"}, "after": {"iommufd 50": "process"}}
    assert null_is_iommufd.mode == (0 if check else 1)


@pytest.mark.parametrize(
    ("state", "outcome", "tolerated"),
    [
        ({"without": errno.ENOTTY}, "unsupported", True),
        ({"privileged": False}, "denied", True),
        ({"ioases": {1: 1}}, "busy", False),
    ],
)
def test_tolerate(run: Run, null_is_iommufd: FakeKernel, state: dict[str, Any], outcome: str, tolerated: bool) -> None:
    for name, value in state.items():
        setattr(null_is_iommufd, name, value)
    answer = run(fd=50, value="process")
    assert answer.get("failed", False) is not tolerated
    assert not answer.get("changed")
    assert answer["iommufds"][0]["outcome"] == outcome
    answer = run(fd=50, value="process", tolerate=[outcome])
    assert "failed" not in answer
    assert answer["iommufds"][0]["outcome"] == outcome
    assert answer["iommufds"][0]["msg"] in str(answer["warnings"])
    answer = run(fd=50, value="process", tolerate=[])
    assert answer["failed"]
    assert answer["msg"] == answer["iommufds"][0]["msg"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pid": 0}, "0 is not the id of a process"),
        ({"pid": -5}, "-5 is not the id of a process"),
        ({"option": "huge_pages", "value": "process"}, "value 'process' is not one of huge_pages: give a boolean"),
        ({"ioas_id": 1}, "ioas_id goes with option=huge_pages"),
        ({"option": "huge_pages", "ioas_id": 0}, "0 is not the id of an IOAS"),
        ({"option": "huge_pages", "ioas_id": 2**32 + 1}, "4294967297 is not the id of an IOAS"),
        ({"unit": "a.service"}, "mutually exclusive"),
        ({"pid": None}, "one of the following is required"),
        ({"pid": None, "pidfile": "/dev/null"}, "Pidfile /dev/null is not a regular file"),
        ({"pid": None, "domain": "../x"}, "a name, not a path"),
        ({"pid": None, "unit": "vm@.service"}, "is a template"),
        ({"pid": None, "user_unit": "vm.service"}, "are required together"),
        ({"user": "vm"}, "are required together"),
        ({"pid": None, "user_unit": "vm@.service", "user": "root"}, "is a template"),
        ({"pid": None, "user_unit": "vm.service", "user": "no such"}, "This host has no user 'no such'"),
        ({"fd": 52}, "Descriptor 52 .* is not an iommufd. It is pipe:"),
        ({"fd": 51}, "O_PATH"),
        ({"fd": 60}, "has no descriptor 60"),
        ({"fd": 50, "value": "bogus"}, "value 'bogus' is not one of rlimit_mode: give user or process"),
    ],
)
def test_bad_input(run: Run, null_is_iommufd: FakeKernel, options: dict[str, Any], words: str) -> None:
    answer = run(**options)
    assert answer["failed"]
    assert re.search(words, answer["msg"])
    assert null_is_iommufd.calls == []


@pytest.mark.parametrize(
    ("target", "seconds"),
    [
        ({}, 60),
        ({"pid": None, "unit": "vm1.service"}, 120),
        ({"pid": None, "user_unit": "vm1.service", "user": "vm"}, 120),
    ],
)
def test_a_unit_has_systemds_time_besides(
    run: Run, monkeypatch: pytest.MonkeyPatch, target: dict[str, Any], seconds: int
) -> None:
    def wait(_user: None, _work: object, waited: float) -> None:
        assert waited == seconds
        raise NoAnswer

    monkeypatch.setattr(_task_target, "in_child", wait)
    assert f"keeps whoever looks at it waiting, for more than {seconds} seconds" in run(**target)["msg"]


@pytest.mark.parametrize(("rdev", "words"), [(os.makedev(10, 123), "holds no iommufd"), (None, "modprobe iommufd")])
def test_a_process_without_an_iommufd(run: Run, monkeypatch: pytest.MonkeyPatch, rdev: int | None, words: str) -> None:
    for module in (_iommufd, iommufd_option):
        monkeypatch.setattr(module, "misc_rdev", lambda: rdev)
    answer = run()
    assert answer["failed"]
    assert words in answer["msg"]
    assert answer["process"]["comm"].startswith("python")


@pytest.mark.parametrize("check", [False, True])
def test_huge_pages_of_every_ioas(run: Run, null_is_iommufd: FakeKernel, check: bool) -> None:
    null_is_iommufd.ioases = {1: 1, 3: 0, 4: 1}
    null_is_iommufd.mapped = {4}
    answer = run(fd=50, option="huge_pages", value="no", _ansible_check_mode=check, _ansible_diff=True)
    assert answer["changed"]
    assert answer["truncated"] is False
    assert [(each["ioas_id"], each["before"], each["outcome"]) for each in answer["iommufds"]] == [
        (1, True, "changed"),
        (3, False, "unchanged"),
        (4, True, "changed" if check else "failed"),
    ]
    if check:
        assert null_is_iommufd.ioases == {1: 1, 3: 0, 4: 1}
        assert answer["value"] is False
        assert answer["diff"]["before"]["IOAS 1 of iommufd 50"] is True
    else:
        assert answer["failed"]
        assert "no memory is mapped" in answer["msg"]
        assert answer["msg"].endswith("Changed all the same: IOAS 1 of iommufd 50.")
        assert null_is_iommufd.ioases == {1: 0, 3: 0, 4: 1}


def test_huge_pages_of_one_ioas(run: Run, null_is_iommufd: FakeKernel) -> None:
    null_is_iommufd.ioases = {1: 1, 2: 1}
    answer = run(fd=50, option="huge_pages", ioas_id=2, value=False)
    assert answer["changed"]
    assert answer["value"] is False
    assert null_is_iommufd.ioases == {1: 1, 2: 0}
    answer = run(fd=50, option="huge_pages", ioas_id=7)
    assert answer["failed"]
    assert "IOAS 7 of iommufd 50" in answer["msg"]
    assert "no IOAS of this id" in answer["msg"]


def test_huge_pages_without_an_ioas(run: Run, null_is_iommufd: FakeKernel) -> None:
    answer = run(fd=50, option="huge_pages")
    assert answer["failed"]
    assert "hold no IOAS" in answer["msg"]


def test_huge_pages_on_a_kernel_without_the_option(run: Run, null_is_iommufd: FakeKernel) -> None:
    null_is_iommufd.without = errno.EOPNOTSUPP
    answer = run(fd=50, option="huge_pages", value=True)
    assert "failed" not in answer
    assert answer["iommufds"][0]["outcome"] == "unsupported"
    assert "the option huge_pages" in str(answer["warnings"])


def rows(count: int, outcome: str, msg: str) -> list[dict[str, Any]]:
    return [
        {"fd": fd, "ioas_id": None, "before": "user", "after": "user", "outcome": outcome, "msg": msg}
        for fd in range(count)
    ]


def test_no_more_is_told_at_once_than_can_be_read() -> None:
    failed = iommufd_option.report([*rows(256, "failed", "No. " + "a" * 500), *rows(25, "changed", "")], [])
    assert "There are 246 more like these." in failed["msg"]
    assert failed["msg"].endswith(", iommufd 18, iommufd 19 and 5 more.")
    assert len(failed["msg"]) < 5000
    assert len(failed["iommufds"]) == 281
    tolerated = iommufd_option.report(rows(256, "denied", "No."), ["denied"])
    assert tolerated["warnings"] == [f"{'No. ' * 10}There are 246 more like these."]
    assert "msg" not in tolerated
    assert iommufd_option.report(rows(10, "denied", "No."), ["denied"])["warnings"] == ["No."] * 10


# A query of one iommufd by its process's id, with /dev/null for the device. What is loaded meanwhile is printed, also
# what is in a child.
QUERY = """
import fcntl, json, os, subprocess, sys

from ansible_collections.virt.iommufd.plugins.modules import iommufd_option
from ansible_collections.virt.iommufd.plugins.module_utils import _iommufd, _task_target

def loaded():
    return [name.rpartition(".")[2] for name in sys.modules if ".iommufd.plugins.module_utils." in name]

# It answers GET with 0, by which the argument is filled already.
fcntl.ioctl = lambda *_given: 0
_iommufd.misc_rdev = lambda: os.makedev(1, 3)
also = _task_target.in_child(None, loaded, 60)
_task_target.in_child = lambda _user, work, _seconds: work()
null = open(os.devnull)
with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stderr=null) as process:
    names = ("pid", "pidfile", "domain", "unit", "user_unit", "user", "fd", "value", "ioas_id")
    params = {**dict.fromkeys(names), "option": "rlimit_mode", "tolerate": [], "pid": process.pid}
    result = {}
    iommufd_option.run(params, False, result)
print(json.dumps([result["value"], sorted({*loaded(), *also})]))
"""


def test_a_query_by_pid_loads_few_files() -> None:
    """Ansible has each of them compiled on each host for each task, so one more is one too many."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", QUERY], env=environment, stdout=subprocess.PIPE, check=True).stdout
    value, files = json.loads(printed)
    assert value == "user"
    assert files == [
        "_borrow",
        "_child",
        "_errors",
        "_iommufd",
        "_module",
        "_names",
        "_process",
        "_syscalls",
        "_target",
        "_task_target",
        "_uapi",
    ]
