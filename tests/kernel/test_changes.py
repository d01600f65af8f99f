# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The target changes while it is worked on: it ends, is replaced, loses or swaps a descriptor, or is set by others."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _borrow, _change, _iommufd, _process
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import IommuFd
from ansible_collections.virt.iommufd.plugins.module_utils._pidfile import PidfileTarget
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import started_at
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import CONTAINER, Answer, Vmm, reusing, start_ticks
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("in_place")]

# What the module does, in this order: the function that does it, and which of its calls it is.
STEPS: dict[str, tuple[Any, str, int]] = {
    "resolve": (PidfileTarget, "resolve", 1),
    "hold": (_process, "pidfd_open", 1),
    "resolve again": (PidfileTarget, "resolve", 2),
    "check the pidfile": (PidfileTarget, "check", 1),
    "find": (Process, "character_devices", 1),
    "look": (_borrow, "_check_is_iommufd", 1),
    "borrow": (_process, "pidfd_getfd", 1),
    "check": (_borrow, "_check_is_iommufd", 2),
    "get": (IommuFd, "get", 1),
    "probe": (IommuFd, "probe", 1),
    "set": (IommuFd, "_send", 3),
    "get again": (IommuFd, "get", 2),
    "judge": (_change, "judge", 1),
}

Before = Callable[[str, Callable[[], object]], None]


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[Before]:
    """Has something done right before a step; fails if the module never came to that step."""
    came: dict[str, bool] = {}

    def hook(step: str, act: Callable[[], object]) -> None:
        owner, name, wanted = STEPS[step]
        original = getattr(owner, name)
        calls = 0
        came[step] = False

        def hooked(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == wanted:
                came[step] = True
                act()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, hooked)

    yield hook
    assert all(came.values()), came


@pytest.fixture
def pidfile(vmm: Vmm, tmp_path: Path) -> Path:
    """The pidfile of the process, as old as one can be that is not stale: 1 s of leeway less some ticks."""
    path = tmp_path / "vmm.pid"
    path.write_text(f"{vmm.pid}\n")
    with Process.hold(vmm.pid) as process:
        written = started_at(process.start_ticks) - 0.95
    os.utime(path, (written, written))
    return path


def test_every_step_in_its_order(vmm: Vmm, pidfile: Path, before: Before) -> None:
    order: list[str] = []
    for step in STEPS:
        before(step, lambda step=step: order.append(step))  # type: ignore[misc]
    assert run(pidfile=str(pidfile), value="process")["value"] == "process"
    assert order == list(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_the_target_exits(vmm: Vmm, pidfile: Path, before: Before, told: Told, step: str) -> None:
    before(step, vmm.end)
    answered = run(pidfile=str(pidfile), value="process")
    assert "has ended" in told(answered)
    assert not answered.get("changed")


@pytest.mark.parametrize("step", STEPS)
def test_the_target_exits_and_another_process_takes_its_id(
    vmm: Vmm, pidfile: Path, before: Before, told: Told, step: str
) -> None:
    pid, started = vmm.pid, start_ticks(vmm.pid)
    others: list[Any] = []

    def replace() -> None:
        vmm.end()
        # One that starts within a tick or two would be as old as the pidfile may be.
        while True:
            other = reusing(pid)
            others.append(other)
            bystander = other.__enter__()
            if start_ticks(pid) > started + 10:
                break
            others.pop().__exit__(None, None, None)
        others.append(bystander)

    before(step, replace)
    try:
        answered = run(pidfile=str(pidfile), value="process")
        assert others[1].pid == pid
        assert others[1].mode == "user"
        message = told(answered)
        assert ("is stale" if step in ("resolve", "hold") else "has ended") in message
    finally:
        others[0].__exit__(None, None, None)


@pytest.mark.parametrize("act", ["closes", "executes"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("asked", [True, False])
def test_the_target_loses_the_descriptor(
    vmm: Vmm, pidfile: Path, before: Before, told: Told, step: str, act: str, asked: bool
) -> None:
    if asked and step == "find":
        # Nobody looks for a descriptor that was asked for, so this is the case of the step after it.
        step = "look"
    fd = max(int(number) for number, link in vmm.do("look")["fds"].items() if link == "/dev/iommu")
    before(step, vmm.execute if act == "executes" else lambda: vmm.do("close", str(fd)))
    answered = run(pidfile=str(pidfile), value="process", **({"fd": fd} if asked else {}))
    assert (f"has no descriptor {fd}" if asked else "holds no iommufd") in told(answered)
    assert not answered.get("changed")


@pytest.mark.parametrize(
    ("path", "link"), [(os.devnull, "/dev/null"), ("socket", "socket:"), ("/etc/passwd", "/etc/passwd")]
)
@pytest.mark.parametrize("step", ["look", "borrow"])
def test_the_target_swaps_the_descriptor(vmm: Vmm, before: Before, told: Told, step: str, path: str, link: str) -> None:
    fd = vmm.open()
    before(step, lambda: vmm.do("put", path, str(fd)))
    answered = run(pid=vmm.pid, fd=fd, value="process")
    assert f"is not an iommufd. It is {link}" in told(answered)


@pytest.fixture
def strict_ioctl(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fails the test when an ioctl is sent to anything but an iommufd; has the number of those sent."""
    rdevs = {os.stat("/dev/iommu").st_rdev}
    if _iommufd.vfio_container_is_iommufd():
        rdevs.add(os.stat(CONTAINER).st_rdev)
    # The one question that goes to another file goes to one that the module has opened itself.
    monkeypatch.setattr(_iommufd, "vfio_container_is_iommufd", lambda: os.stat(CONTAINER).st_rdev in rdevs)
    sent = [0]
    original = fcntl.ioctl

    def ioctl(fd: int, request: int, argument: Any) -> int:
        assert os.fstat(fd).st_rdev in rdevs
        sent[0] += 1
        answered: int = original(fd, request, argument)
        return answered

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return sent


@pytest.mark.parametrize("asked", [True, False])
def test_a_hostile_target_swaps_the_descriptor_all_the_time(start: Start, strict_ioctl: list[int], asked: bool) -> None:
    vmm = start(0)
    fd = vmm.open()
    vmm.do("swap", str(fd), os.devnull, CONTAINER)
    seen = {"set": 0, "refused": 0}
    for turn in range(3000):
        wanted = ["process", "user"][turn % 2]
        answered = run(pid=vmm.pid, value=wanted, **({"fd": fd} if asked else {}))
        rows = {each["fd"]: each for each in answered["iommufds"]}
        # Beside the one that it swaps the target keeps the iommufd under another number.
        assert asked or any(number != fd for number in rows)
        assert all(each["after"] in (wanted, None) for each in rows.values())
        if fd in rows and rows[fd]["after"]:
            seen["set"] += 1
        else:
            assert not asked or "is not an iommufd" in answered["msg"]
            seen["refused"] += 1
        if turn >= 100 and min(seen.values()) >= 10:
            break
    assert min(seen.values()) >= 10
    assert strict_ioctl[0] >= 10


def test_somebody_else_sets_it_in_between(start: Start, before: Before, told: Told) -> None:
    vmm = start(0)
    fd = vmm.open()
    before("get again", lambda: vmm.do("set", "rlimit_mode", "0"))
    answered = run(pid=vmm.pid, fd=fd, value="process")
    assert answered["iommufds"][0]["outcome"] == "raced"
    assert not answered["changed"]
    assert answered["value"] == vmm.mode == "user"
    assert "someone else set it in between" in told(answered)


def test_somebody_else_makes_it_busy_in_between(vmm: Vmm, before: Before, told: Told) -> None:
    before("set", lambda: vmm.do("alloc"))
    answered = run(pid=vmm.pid, value="process")
    assert answered["iommufds"][0]["outcome"] == "busy"
    assert answered["value"] == vmm.mode == "user"
    assert "holds objects already" in told(answered)


ROUNDS = 60


def rival(vmm: Vmm, fd: int, wanted: str, ready: int, go: int, out: int) -> None:
    """Runs the module time and again, and writes what it said, and which values it had the kernel set."""
    original = fcntl.ioctl
    log: list[tuple[int, int]] = []

    def ioctl(borrowed: int, request: int, argument: Any) -> int:
        original(borrowed, request, argument)
        log.append((argument.op, argument.val64))
        return 0

    fcntl.ioctl = ioctl  # type: ignore[assignment]
    os.write(ready, b".")
    os.read(go, 1)
    answers = []
    for _round in range(ROUNDS):
        log.clear()
        answers.append((run(pid=vmm.pid, fd=fd, value=wanted), [tuple(each) for each in log]))
    with os.fdopen(out, "w") as stream:
        json.dump(answers, stream)


def check_truth(answered: Answer, log: list[list[int]], wanted: str) -> str:
    """That an answer says what its run did; its outcome."""
    names = ["user", "process"]
    (only,) = answered["iommufds"]
    sets = [value for operation, value in log if operation == 0]
    gets = [value for operation, value in log if operation == 1]
    assert only["before"] == names[gets[0]]
    assert only["after"] == names[gets[-1]] == answered["value"]
    outcome: str = only["outcome"]
    assert answered["changed"] == (outcome == "changed")
    assert sets == ([] if outcome == "unchanged" else [names.index(wanted)])
    assert (only["after"] == wanted) == (outcome != "raced")
    assert answered.get("failed", False) == (outcome == "raced")
    return outcome


def test_two_runs_at_once_each_tell_what_they_did(vmm: Vmm) -> None:
    fd = vmm.open()
    ready, go = os.pipe(), os.pipe()
    children = []
    for wanted in ("user", "process"):
        out = os.pipe()
        child = os.fork()
        if not child:
            try:
                rival(vmm, fd, wanted, ready[1], go[0], out[1])
                os._exit(0)
            finally:
                os._exit(1)
        os.close(out[1])
        children.append((wanted, child, out[0]))
    assert [os.read(ready[0], 1) for _each in children] == [b".", b"."]
    os.write(go[1], b"..")
    outcomes = []
    for wanted, child, out_read in children:
        with os.fdopen(out_read) as stream:
            answers = json.loads(stream.read() or "[]")
        assert os.waitpid(child, 0)[1] == 0
        assert len(answers) == ROUNDS
        outcomes += [check_truth(answered, log, wanted) for answered, log in answers]
    for each in (*ready, *go):
        os.close(each)
    assert outcomes.count("changed") > 1
    assert set(outcomes) <= {"changed", "unchanged", "raced"}
    assert vmm.mode in ("user", "process")
