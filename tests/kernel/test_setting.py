# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The option set, queried and set back; the kernel is asked inside the target."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    ALICE,
    CONTAINER,
    Vmm,
    change_user,
    pinner,
    run_apart,
    run_within,
)
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

APART = "kernel-test-apart"
# What is asked for, whether in check mode, and the mode before and after it; in check mode `after` is foretold.
STEPS = (
    (None, False, "user", "user"),
    ("process", True, "user", "process"),
    ("process", False, "user", "process"),
    ("process", False, "process", "process"),
    (None, True, "process", "process"),
    ("user", True, "process", "user"),
    ("user", False, "process", "user"),
)


def test_set_query_and_set_back(vmm: Vmm) -> None:
    """An option that is set on anything but the target's own iommufd does not show there."""
    [fd] = [int(number) for number, path in vmm.do("look")["fds"].items() if path == "/dev/iommu"]
    for value, check, before, after in STEPS:
        asked = {"value": value} if value else {}
        answered = run(pid=vmm.pid, _ansible_check_mode=check, _ansible_diff=True, **asked)
        assert (answered["changed"], answered["value"]) == (before != after, after)
        assert (answered["process"]["pid"], answered["process"]["user"]) == (vmm.pid, "vm")
        [row] = answered["iommufds"]
        outcome = "changed" if before != after else "unchanged"
        assert (row["fd"], row["before"], row["after"], row["outcome"]) == (fd, before, after, outcome)
        assert list(answered["diff"]["before"].values()) == [before]
        assert list(answered["diff"]["after"].values()) == [after]
        assert vmm.mode == (before if check else after)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("tolerated", [True, False])
def test_a_busy_iommufd(start: Start, told: Told, check: bool, tolerated: bool) -> None:
    # Root's, as nobody else is told more than that it may not.
    vmm = start(0)
    vmm.open()
    vmm.do("alloc")
    # The kernel refuses even the value in force.
    assert [vmm.ask("set", "rlimit_mode", value)["errno"] for value in "01"] == ["EBUSY", "EBUSY"]
    tolerate = {"tolerate": ["busy"]} if tolerated else {}
    answered = run(pid=vmm.pid, value="process", _ansible_check_mode=check, **tolerate)
    assert (answered["changed"], answered.get("failed", False)) == (False, not tolerated)
    assert [row["outcome"] for row in answered["iommufds"]] == ["busy"]
    message = told(answered)
    assert "holds objects already" in message
    assert tolerated or "before the first device is attached" in message


def test_the_value_in_force_takes_one_ioctl(vmm: Vmm, tmp_path: Path) -> None:
    vmm.do("alloc")
    log = tmp_path / "strace.log"
    traced = ["strace", "--follow-forks", "--trace=ioctl,pidfd_open,pidfd_getfd", f"--output={log}"]
    answered = run_apart(traced, pid=vmm.pid, value="user")
    assert (answered["changed"], answered["iommufds"][0]["outcome"]) == (False, "unchanged")
    lines = log.read_text().splitlines()
    assert len([line for line in lines if "pidfd_getfd" in line]) == 1
    # By number where strace does not know it by name. It succeeds on what holds objects, so it was a GET.
    [ioctl] = [line for line in lines if "ioctl" in line and ("IOMMU_OPTION" in line or "0x3b, 0x87" in line)]
    assert ioctl.endswith("= 0")


@pytest.fixture
def apart() -> Iterator[int]:
    """A process of another user, in pid and mount namespaces of its own, that holds an iommufd."""
    try:
        pid = pinner("start", APART, "--user", "alice", "--apart", "open")["pid"]
        assert isinstance(pid, int)
        for name in ("pid", "mnt"):
            assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
        yield pid
    finally:
        pinner("stop", APART)


def test_a_process_in_other_namespaces(apart: int) -> None:
    answered = run(pid=apart, value="process")
    assert (answered["changed"], answered["process"]["user"]) == (True, "alice")
    assert pinner("ask", APART, "get")["value"] == 1


def test_an_iommufd_by_another_name_which_is_gone(start: Start) -> None:
    """A container makes its own device node, with any name, and may unlink it once it is open."""
    node = Path("/dev/kernel-test-disk")
    os.mknod(node, stat.S_IFCHR, Path("/dev/iommu").stat().st_rdev)
    vmm = start(0)
    fd = vmm.open(str(node))
    node.unlink()
    answered = run(pid=vmm.pid, value="process")
    assert (answered["changed"], [row["fd"] for row in answered["iommufds"]]) == (True, [fd])
    assert vmm.do("look")["fds"][str(fd)] == f"{node} (deleted)"
    assert vmm.mode == "process"


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"pid": 4194303}, "no process with the id 4194303"),
    ({"pid": 0}, "0 is not the id of a process"),
    ({"pid": -1}, "-1 is not the id of a process"),
    ({"fd": 99}, "has no descriptor 99"),
    ({"fd": "null"}, "not an iommufd. It is /dev/null"),
    ({"fd": "path"}, "opened with O_PATH"),
    ({"fd": "container"}, f"not an iommufd. It is {CONTAINER}"),
    ({"fd": "socket"}, "not an iommufd. It is socket:"),
    ({"value": "bogus"}, "give user or process"),
)


def test_bad_input(vmm: Vmm, start: Start, told: Told, container_is_iommufd: bool) -> None:
    """Each is a failure that names the thing, and changes nothing."""
    fds: dict[str | int, int] = {
        "null": vmm.do("open", os.devnull, "r")["fd"],
        "path": vmm.do("open", "/dev/iommu", "path")["fd"],
        "socket": vmm.do("hold_socket")["fd"],
    }
    if not container_is_iommufd:
        fds["container"] = vmm.do("open", CONTAINER, "r")["fd"]
    for options, words in (*BAD, ({"pid": start().pid}, "holds no iommufd")):
        if options.get("fd") == "container" and container_is_iommufd:
            # It is an iommufd there, which another test shows.
            continue
        asked = {"pid": vmm.pid, "value": "process", **options}
        if "fd" in asked:
            asked["fd"] = fds.get(asked["fd"], asked["fd"])
        answered = run(**asked)
        assert answered["failed"], asked
        assert not answered.get("changed"), asked
        assert words in told(answered)
    answered = run_within(partial(change_user, ALICE), pid=vmm.pid, value="process")
    for words in ("CAP_SYS_PTRACE", "ptrace_scope", "seccomp"):
        assert words in told(answered)
    assert vmm.mode == "user"
