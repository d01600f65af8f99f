# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Units of the guest's systemd."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from ansible_collections.virt.iommufd.plugins.modules import memlock_limit
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, DEVICES, MIB, PATIENCE, as_user, pinner
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

NAME = "kernel-test"
EXITED = "kernel-test-exited.service"
UNIT, SCOPE = f"{NAME}.service", f"{NAME}.scope"
AS_ALICE = [*as_user(ALICE), "env", f"XDG_RUNTIME_DIR=/run/user/{ALICE}"]


@pytest.fixture
def service() -> Iterator[str]:
    """A service that holds an iommufd."""
    try:
        pinner("start", NAME, "open")
        yield f"pinner-{NAME}.service"
    finally:
        pinner("stop", NAME)


def test_a_service(service: str) -> None:
    answered = run(unit=service, value="process")
    assert answered["changed"]
    assert answered["process"]["user"] == "vm"
    assert pinner("ask", NAME, "get") == {"pid": answered["process"]["pid"], "errno": None, "value": 1}


@pytest.fixture
def exited() -> Iterator[str]:
    """A service whose process has done its work."""
    lasting = ["--property=Type=oneshot", "--property=RemainAfterExit=yes"]
    subprocess.run(["systemd-run", "--quiet", f"--unit={EXITED}", *lasting, "true"], check=True)
    yield EXITED
    subprocess.run(["systemctl", "stop", EXITED], check=True)


def test_a_service_whose_process_has_ended(exited: str, told: Told) -> None:
    assert f"Unit {exited} has no main process now: it is active (exited)" in told(run(unit=exited))


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        ("emergency.service", "has no main process now: it is inactive (dead)"),
        ("vm@.service", "is a template and has no process: name an instance"),
        ("kernel-test-none.service", "systemd knows no unit kernel-test-none.service"),
        ("system.slice", "is of a kind that has no main process; it is active (active)"),
        ("init.scope", "systemd (pid 1) holds no iommufd"),
        ("kernel-test-none.scope", "systemd knows no unit kernel-test-none.scope"),
        ("-H", "'-H' is not the name of a systemd unit"),
    ],
)
def test_units_without_a_process(told: Told, unit: str, words: str) -> None:
    assert words in told(run(unit=unit, value="process"))


Run = Callable[..., None]


@pytest.fixture
def start_unit() -> Iterator[Run]:
    """Starts a unit with these words of systemd-run; what comes first is who starts it. Stops it at the end."""
    started: list[tuple[list[str], subprocess.Popen[bytes]]] = []
    sockets = Path("/run/pinner")
    sockets.mkdir(exist_ok=True)
    sockets.chmod(0o1777)

    def start_one(unit: str, *words: str, before: list[str] | None = None) -> None:
        how = ["--user"] if before else []
        how += ["--scope"] if unit.endswith(".scope") else []
        command = [*(before or []), "systemd-run", *how, "--quiet", "--collect", f"--unit={unit}", *words]
        stop = [*(before or []), "systemctl", *(["--user"] if before else []), "stop", unit]
        # A scope runs in this process's own child.
        started.append((stop, subprocess.Popen(command)))

    yield start_one
    for stop, process in started:
        # It may have ended by itself.
        subprocess.run(stop, check=False)
        process.wait(PATIENCE)
    for each in sockets.glob(f"{NAME}*"):
        each.unlink()


NESTED = """
g=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/payload
mkdir -p $g
sh -c "echo \\$\\$ > $g/cgroup.procs && exec pinner serve kernel-test"
true
"""


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (UNIT, ["sh", "-c", f"pinner serve {NAME}; true"]),
        # As conmon does it, and a manager of containers.
        (UNIT, ["--property=Delegate=yes", "sh", "-c", NESTED]),
        # One that has no main process.
        (UNIT, ["--property=Type=forking", "sh", "-c", f"pinner serve {NAME} & sleep 600 & true"]),
        (SCOPE, ["pinner", "serve", NAME]),
        (SCOPE, ["sh", "-c", f"pinner serve {NAME}; true"]),
    ],
)
def test_a_process_that_is_not_the_main_one(start_unit: Run, told: Told, unit: str, words: list[str]) -> None:
    start_unit(unit, *words)
    pid = pinner("ask", NAME, "look")["pid"]
    assert "iommufd" in told(run(unit=unit, value="process"))
    pinner("ask", NAME, "open")
    answered = run(unit=unit, value="process")
    assert (answered["changed"], answered["process"]["pid"]) == (True, pid)
    assert pinner("ask", NAME, "get")["value"] == 1
    assert not run(unit=unit, value="process")["changed"]
    assert run(memlock_limit, unit=unit, value="77M", hard="77M", force=True)["process"]["pid"] == pid
    assert resource.prlimit(pid, resource.RLIMIT_MEMLOCK) == (77 * MIB, 77 * MIB)


def test_a_vm_as_proxmox_starts_it(start_unit: Run) -> None:
    start_unit(SCOPE, "--slice=qemu", "pinner", "serve", NAME)
    pid = pinner("ask", NAME, "open")["pid"]
    folder = Path("/run/kernel-test-server")
    folder.mkdir()
    try:
        (folder / "100.pid").write_text(f"{pid}\n")
        for target in ({"unit": SCOPE}, {"pidfile": "/var/run/kernel-test-server/100.pid"}):
            assert run(**target)["process"]["pid"] == pid
            assert run(memlock_limit, **target)["process"]["pid"] == pid
    finally:
        (folder / "100.pid").unlink()
        folder.rmdir()


@pytest.mark.once
def test_two_processes_that_may_be_meant(start_unit: Run, told: Told) -> None:
    names = [f"{NAME}-{each}" for each in "ab"]
    start_unit(UNIT, "sh", "-c", " ".join(f"pinner serve {each} &" for each in names) + " wait")
    pids = [pinner("ask", each, "open")["pid"] for each in names]
    for answered in (run(unit=UNIT, value="process"), run(memlock_limit, unit=UNIT, value="77M")):
        message = told(answered)
        assert "It cannot be told which process of Unit kernel-test.service is meant" in message
        assert all(f"pinner (pid {pid})" in message for pid in pids)
        assert "Give the one that is meant by pid" in message
        assert not answered["changed"]
    assert [pinner("ask", each, "get")["value"] for each in names] == [0, 0]
    assert run(pid=pids[1], value="process")["changed"]
    os.kill(pids[0], 9)
    answered = run(unit=UNIT)
    assert (answered["value"], answered["process"]["pid"]) == ("process", pids[1])


def group_of(pid: int) -> Path:
    """The folder of a process's control group."""
    return Path("/sys/fs/cgroup" + Path(f"/proc/{pid}/cgroup").read_text().partition("0::")[2].strip())


def put_into(group: Path, pid: int, prefix: list[str]) -> bool:
    """Whether somebody could put a process into a control group."""
    words = [*prefix, "sh", "-c", f"echo {pid} > {group}/cgroup.procs"]
    return subprocess.run(words, check=False, capture_output=True, timeout=PATIENCE).returncode == 0


@pytest.mark.once
def test_a_copy_does_not_count_once_memory_is_pinned(start: Start, start_unit: Run, told: Told) -> None:
    start_unit(SCOPE, "pinner", "serve", NAME)
    group = group_of(pinner("ask", NAME, "look")["pid"])
    vmm = start()
    vmm.limit(64 * MIB)
    vmm.open()
    copy = vmm.do("fork")["child"]
    assert all(put_into(group, pid, []) for pid in (copy, vmm.pid))
    # Any of them may become the VM.
    assert f"(pid {copy})" in told(run(memlock_limit, unit=SCOPE, value="77M"))
    vmm.do("attach", DEVICES[0])
    vmm.do("map", "2")
    assert run(memlock_limit, unit=SCOPE, value="77M")["process"]["pid"] == vmm.pid
    assert run(unit=SCOPE)["process"]["pid"] == vmm.pid


@pytest.mark.once
def test_processes_that_come_and_go(start_unit: Run) -> None:
    start_unit(UNIT, "sh", "-c", f"pinner serve {NAME} & while :; do /bin/true; done")
    pid = pinner("ask", NAME, "open")["pid"]
    for _each in range(5):
        assert run(unit=UNIT)["process"]["pid"] == pid


@pytest.mark.usefixtures("lingering")
@pytest.mark.parametrize("unit", [UNIT, SCOPE])
def test_a_unit_of_a_user(start_unit: Run, told: Told, unit: str) -> None:
    start_unit(unit, "sh", "-c", f"pinner serve {NAME}; true", before=AS_ALICE)
    pid = pinner("ask", NAME, "open")["pid"]
    answered = run(user_unit=unit, user="alice", value="process")
    assert (answered["changed"], answered["process"]["pid"], answered["process"]["user"]) == (True, pid, "alice")
    assert pinner("ask", NAME, "get")["value"] == 1
    assert not run(user_unit=unit, user=str(ALICE), value="process")["changed"]
    answered = run(memlock_limit, user_unit=unit, user="alice", value="77M")
    assert resource.prlimit(pid, resource.RLIMIT_MEMLOCK)[0] == 77 * MIB
    assert unit in answered["next_start"]
    message = told(run(user_unit="no-such", user="alice"))
    assert "Unit no-such of user alice has no process now" in message
    assert unit in message
    # It is none of the system's, nor of another user's.
    assert f"systemd knows no unit {unit}" in told(run(unit=unit))
    assert "service manager runs no units" in told(run(user_unit=unit, user="vm"))


@pytest.mark.once
@pytest.mark.usefixtures("lingering")
def test_a_unit_of_a_user_with_the_name_of_one_of_the_systems(start_unit: Run) -> None:
    names = {None: f"{NAME}-system", ALICE: f"{NAME}-alice"}
    start_unit(UNIT, "sh", "-c", f"pinner serve {names[None]}; true")
    start_unit(UNIT, "sh", "-c", f"pinner serve {names[ALICE]}; true", before=AS_ALICE)
    systems, hers = (pinner("ask", name, "open")["pid"] for name in names.values())
    # She cannot put it into the system's.
    assert not put_into(group_of(systems), hers, as_user(ALICE))
    assert run(unit=UNIT)["process"]["pid"] == systems
    assert run(user_unit=UNIT, user="alice")["process"]["pid"] == hers


@pytest.mark.once
@pytest.mark.usefixtures("lingering")
def test_a_process_of_roots_that_a_user_has_put_into_a_unit(start: Start, start_unit: Run, told: Told) -> None:
    """What sudo(8) starts for a user is in a control group that the user may take it from."""
    start_unit(UNIT, "pinner", "serve", NAME, before=AS_ALICE)
    other = f"{NAME}-other"
    start_unit(f"{other}.service", "pinner", "serve", other, before=AS_ALICE)
    mine, others = (pinner("ask", name, "look")["pid"] for name in (NAME, other))
    roots = start(0)
    roots.open()
    before = resource.prlimit(roots.pid, resource.RLIMIT_MEMLOCK)
    assert put_into(group_of(others), roots.pid, [])
    assert put_into(group_of(mine), roots.pid, as_user(ALICE))
    assert group_of(roots.pid) == group_of(mine)
    os.kill(others, 9)
    message = told(run(user_unit=UNIT, user="alice", value="process"))
    assert "holds no iommufd" in message
    assert f"(pid {mine})" in message
    pinner("ask", NAME, "open")
    assert run(user_unit=UNIT, user="alice", value="process")["process"]["pid"] == mine
    assert run(memlock_limit, user_unit=UNIT, user="alice", value="77M")["process"]["pid"] == mine
    os.kill(mine, 9)
    for answered in (
        run(user_unit=UNIT, user="alice", value="process"),
        run(memlock_limit, user_unit=UNIT, user="alice", value="77M"),
    ):
        assert f"(pid {roots.pid}) is of root. Whoever is the user may have put it there" in told(answered)
    assert roots.mode == "user"
    assert resource.prlimit(roots.pid, resource.RLIMIT_MEMLOCK) == before
    roots.end()
