# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The limit of a process that runs, by memlock_limit. What becomes of it is asked of the kernel."""

from __future__ import annotations

import contextlib
import re
import resource
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _memlock
from ansible_collections.virt.iommufd.plugins.module_utils._errors import ProcessGone
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit
from ansible_collections.virt.iommufd.plugins.modules import memlock_limit
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    ALICE,
    CAPABILITIES,
    DEVICES,
    MIB,
    PATIENCE,
    VM,
    Vmm,
    change_user,
    drop_capability,
    enter_user_namespace,
    pinner,
    run_within,
)
from ansible_collections.virt.iommufd.tests.kernel.run_module import run
from ansible_collections.virt.iommufd.tests.kernel.test_qemu import MEMORY, Vm, address

SMALL, LARGE = 8 * MIB, 64 * MIB
INFINITY = resource.RLIM_INFINITY
UNIT = "kernel-test-memlock"


def limits(pid: int) -> tuple[int, int]:
    """Soft and hard, as the kernel has them."""
    return resource.prlimit(pid, resource.RLIMIT_MEMLOCK)


def set_limits(pid: int, soft: int, hard: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (soft, hard))


@pytest.fixture
def attached(start: Start) -> Vmm:
    """One that has a device and pins nothing yet, with a small limit."""
    vmm = start()
    set_limits(vmm.pid, SMALL, SMALL)
    vmm.open()
    vmm.do("attach", DEVICES[0])
    return vmm


@pytest.mark.parametrize("mode", ["user", "process"])
def test_what_did_not_fit_is_pinned(start: Start, mode: str) -> None:
    vmm = start()
    set_limits(vmm.pid, SMALL, SMALL)
    vmm.open()
    if mode == "process":
        assert run(pid=vmm.pid, value="process")["changed"]
    vmm.do("attach", DEVICES[0])
    assert vmm.ask("map", "24")["errno"] == "ENOMEM"
    answered = run(memlock_limit, pid=vmm.pid, value="64M", _ansible_diff=True)
    assert (answered["changed"], answered["memlock_bytes"], answered["memlock_hard_bytes"]) == (True, LARGE, LARGE)
    assert answered["diff"]["before"]["memlock_bytes"] == SMALL
    assert answered["diff"]["after"]["memlock_bytes"] == LARGE
    assert answered["next_start"].startswith("The limit ends with the process.")
    assert limits(vmm.pid) == (LARGE, LARGE)
    vmm.do("map", "24")
    answered = run(memlock_limit, pid=vmm.pid, value="64M")
    assert (answered["changed"], answered.get("failed", False)) == (False, False)


def test_a_query_and_a_check_change_nothing(attached: Vmm) -> None:
    before = limits(attached.pid)
    answered = run(memlock_limit, pid=attached.pid)
    assert (answered["changed"], answered["memlock_bytes"]) == (False, SMALL)
    answered = run(memlock_limit, pid=attached.pid, value="unlimited", _ansible_check_mode=True)
    assert (answered["changed"], answered["memlock_bytes"], answered["memlock_unlimited"]) == (True, None, True)
    assert limits(attached.pid) == before
    assert run(memlock_limit, pid=attached.pid, value="unlimited")["changed"]
    assert limits(attached.pid) == (INFINITY, INFINITY)


@pytest.mark.parametrize(
    ("asked", "after"),
    [
        ({"value": SMALL // 2}, (SMALL // 2, 2 * SMALL)),
        ({"value": 2 * SMALL}, (2 * SMALL, 2 * SMALL)),
        ({"value": 2 * SMALL + 1}, (2 * SMALL + 1, 2 * SMALL + 1)),
        ({"hard": "unlimited"}, (SMALL, INFINITY)),
        ({"value": "16M", "hard": "32M"}, (16 * MIB, 32 * MIB)),
        ({"hard": SMALL}, (SMALL, SMALL)),
    ],
)
def test_soft_and_hard(start: Start, asked: dict[str, Any], after: tuple[int, int]) -> None:
    vmm = start()
    set_limits(vmm.pid, SMALL, 2 * SMALL)
    given = {name: str(value) for name, value in asked.items()}
    for check in (True, False):
        answered = run(memlock_limit, pid=vmm.pid, **given, _ansible_check_mode=check)
        told = [answered["memlock_bytes"], answered["memlock_hard_bytes"]]
        assert [INFINITY if each is None else each for each in told] == list(after)
    assert limits(vmm.pid) == after


@pytest.mark.parametrize("mode", ["user", "process"])
def test_less_than_what_is_charged(start: Start, mode: str) -> None:
    """In the mode user, what another process of the user has pinned is charged beside it."""
    others = [start(), start()]
    for vmm, cdev in zip(others, DEVICES):
        set_limits(vmm.pid, LARGE, LARGE)
        vmm.open()
        if mode == "process":
            assert run(pid=vmm.pid, value="process")["changed"]
        vmm.do("attach", cdev)
        vmm.do("map", "16")
    vmm = others[0]
    held = (32 if mode == "user" else 16) * MIB
    answered = run(memlock_limit, pid=vmm.pid, value=str(held - 1))
    assert answered["failed"]
    assert f"is charged {held} bytes (counter {'user' if mode == 'user' else 'mm_locked'})" in answered["msg"]
    assert (answered["memlock_bytes"], limits(vmm.pid)) == (LARGE, (LARGE, LARGE))
    answered = run(memlock_limit, pid=vmm.pid, value=str(held - 1), _ansible_check_mode=True)
    assert answered["failed"]
    assert run(memlock_limit, pid=vmm.pid, value=str(held))["changed"]
    assert limits(vmm.pid) == (held, LARGE)
    assert run(memlock_limit, pid=vmm.pid, value=str(held - 1), force=True)["changed"]
    # It keeps what it has, and gets nothing more.
    assert vmm.ask("map", "1")["errno"] == "ENOMEM"
    assert limits(vmm.pid) == (held - 1, LARGE)


def test_a_limit_that_is_charged_for_what_it_has_locked(start: Start) -> None:
    """It holds nothing that devices pin by, and VmLck is compared with its limit all the same."""
    vmm = start()
    set_limits(vmm.pid, LARGE, LARGE)
    vmm.do("mlock", str(SMALL))
    answered = run(memlock_limit, pid=vmm.pid, value=str(SMALL - 1))
    assert answered["failed"]
    assert f"is charged {SMALL} bytes (counter mm_locked)" in answered["msg"]
    assert run(memlock_limit, pid=vmm.pid, value=str(SMALL))["changed"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"value": "much"}, "value: 'much' is not a size: give bytes .*, or unlimited"),
        ({"value": "-1"}, "value: '-1' is not a size"),
        ({"hard": "16E"}, "hard: '16E' is too large"),
        ({"value": "32M", "hard": "16M"}, "hard, 16777216 bytes, is less than value, 33554432 bytes"),
        ({"hard": "1M"}, "hard, 1048576 bytes, is less than the soft limit, which stays without value"),
        ({"pid": 4194303}, "no process with the id 4194303"),
        ({"pid": 2}, "is a kernel thread"),
        ({"unit": "no-such.service", "pid": None}, "no-such.service"),
    ],
)
def test_bad_input(attached: Vmm, asked: dict[str, Any], words: str) -> None:
    options = {name: value for name, value in {"pid": attached.pid, **asked}.items() if value is not None}
    answered = run(memlock_limit, **options)
    assert answered["failed"]
    assert re.search(words, answered["msg"]), answered["msg"]
    assert limits(attached.pid) == (SMALL, SMALL)


def test_callers_who_may_not(attached: Vmm) -> None:
    """A user may do what setrlimit(2) lets the process itself do, and root without the capability no more."""
    alice, vm = partial(change_user, ALICE), partial(change_user, VM)
    root = partial(drop_capability, CAPABILITIES["sys_resource"])
    for prepare, value, check in (
        (alice, "4M", False),
        (vm, "16M", False),
        (vm, "16M", True),
        (root, "16M", False),
        (root, "16M", True),
        (enter_user_namespace, "16M", False),
        (enter_user_namespace, "16M", True),
    ):
        asked = {"pid": attached.pid, "value": value, "force": True, "_ansible_check_mode": check}
        answered = run_within(prepare, memlock_limit, **asked)
        assert answered["failed"], (prepare, answered)
        assert "may not set the limit" in answered["msg"], answered["msg"]
        assert "CAP_SYS_RESOURCE" in answered["msg"]
    assert limits(attached.pid) == (SMALL, SMALL)
    assert run_within(vm, memlock_limit, pid=attached.pid, value="4M", force=True)["changed"]
    assert limits(attached.pid) == (4 * MIB, SMALL)
    # Whoever may not set it may look.
    assert run_within(alice, memlock_limit, pid=attached.pid)["memlock_bytes"] == 4 * MIB


def test_one_that_has_ended_meanwhile(attached: Vmm, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id may be another process's by the time that the kernel takes it. That one keeps what it has."""
    other = start()
    set_limits(other.pid, SMALL, SMALL)
    with Process.hold(attached.pid) as process:
        taken = process._replace(pid=other.pid)

        def end_first(pid: int, kind: int, *new: tuple[int, int]) -> tuple[int, int]:
            attached.end()
            return resource.prlimit(pid, kind, *new)

        class Meanwhile:
            RLIMIT_MEMLOCK, RLIM_INFINITY = resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY
            prlimit = staticmethod(end_first)

        monkeypatch.setattr(_memlock, "resource", Meanwhile)
        with pytest.raises(ProcessGone, match="has ended"):
            _memlock.set_memlock(taken, Limit(LARGE, LARGE))
    assert limits(other.pid) == (SMALL, SMALL)


@pytest.fixture
def unit() -> Iterator[int]:
    """The main process of a unit, which has a device."""
    try:
        pid = pinner("start", UNIT, "--user", "vm", "--limit", "8M", "open", "+", "attach", DEVICES[0])["pid"]
        assert isinstance(pid, int)
        yield pid
    finally:
        pinner("stop", UNIT)


def test_a_unit(unit: int) -> None:
    name = f"pinner-{UNIT}.service"
    assert pinner("ask", UNIT, "map", "24")["errno"] == "ENOMEM"
    answered = run(memlock_limit, unit=name, value="64M")
    assert (answered["changed"], answered["process"]["pid"], answered["process"]["user"]) == (True, unit, "vm")
    assert f"LimitMEMLOCK= in a drop-in of {name}" in answered["next_start"]
    assert pinner("ask", UNIT, "map", "24")["errno"] is None


@contextlib.contextmanager
def monitor(path: Path, vm: Vm) -> Iterator[Any]:
    """Has QEMU do something: its answer, a row a command, without what it says by itself."""
    deadline = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(PATIENCE)
        # It is there a moment before anybody listens.
        while control.connect_ex(str(path)):
            assert vm.runs, vm.said
            assert time.monotonic() < deadline
            time.sleep(0.2)
        lines = control.makefile("rw")

        def ask(command: str) -> str:
            lines.write(command + "\n")
            lines.flush()
            while '"return"' not in (line := lines.readline()) and '"error"' not in line:
                assert line, vm.said
            return line

        ask('{"execute": "qmp_capabilities"}')
        yield ask


@pytest.mark.host
def test_a_device_that_did_not_fit_is_plugged(tmp_path: Path) -> None:
    """QEMU runs on without the device that it could not have, and has it once its limit is raised."""
    path = tmp_path / "monitor"
    tmp_path.chmod(0o777)
    for each in (tmp_path.parent, tmp_path.parent.parent):
        each.chmod(0o755)
    words = ["-S", "-m", "64", "-object", "iommufd,id=iommufd0", "-device", "pcie-root-port,id=rp,chassis=1"]
    words += ["-qmp", f"unix:{path},server=on,wait=off"]
    plug = (
        '{"execute": "device_add", "arguments": {"driver": "vfio-pci", "id": "device", "bus": "rp",'
        f' "host": "{address(DEVICES[0])}", "iommufd": "iommufd0"}}}}'
    )
    with Vm(tmp_path / "log", *words, limit=f"--memlock={MEMORY // 2}") as vm, monitor(path, vm) as ask:
        refused = ask(plug)
        assert "-12 (Cannot allocate memory)" in refused + vm.said
        assert '"error"' in refused
        assert vm.runs
        assert run(memlock_limit, pid=vm.process.pid, value="80M")["changed"]
        assert '"return"' in ask(plug)
        vm.wait_until_counted("VmPin", MEMORY)
