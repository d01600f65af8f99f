# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Callers who may not do everything. Each runs the module in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    ALICE,
    CAPABILITIES,
    SYS_PTRACE,
    VM,
    Vmm,
    change_user,
    drop_capability,
    enter_user_namespace,
    mount_privately,
    run_apart,
    run_within,
    without_call,
)
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


@pytest.fixture
def yama() -> Iterator[Path]:
    """Yama's setting, put back afterwards."""
    before = YAMA.read_text()
    yield YAMA
    YAMA.write_text(before)


@pytest.mark.parametrize("scope", [1, 2])
def test_root_under_yama(vmm: Vmm, yama: Path, scope: int) -> None:
    yama.write_text(str(scope))
    assert run(pid=vmm.pid, value="process")["changed"]
    assert vmm.mode == "process"


def test_a_user_under_yama(vmm: Vmm, yama: Path, told: Told) -> None:
    yama.write_text("1")
    answered = run_within(partial(change_user, VM), pid=vmm.pid, value="process")
    message = told(answered)
    assert "does not let this caller (uid 1001) share its descriptor" in message
    assert "kernel.yama.ptrace_scope is 1" in message
    assert vmm.mode == "user"


def test_a_user_on_the_own_process(vmm: Vmm, yama: Path, told: Told) -> None:
    yama.write_text("0")
    answered = run_within(partial(change_user, VM), pid=vmm.pid, value="process")
    assert "takes CAP_SYS_RESOURCE in the initial user namespace" in told(answered)
    assert "failed" not in answered
    assert not answered["changed"]
    assert [each["outcome"] for each in answered["iommufds"]] == ["denied"]
    assert vmm.mode == "user"


def refused(answered: dict[str, object], message: str, uid: int) -> None:
    assert answered["failed"]
    assert f"does not let this caller (uid {uid}) look at its descriptors (EACCES: Permission denied)" in message
    assert "root with CAP_SYS_PTRACE (become: true)" in message


def test_a_user_on_another_users_process(vmm: Vmm, told: Told) -> None:
    answered = run_within(partial(change_user, ALICE), pid=vmm.pid, value="process")
    refused(answered, told(answered), ALICE)
    assert vmm.mode == "user"


def test_root_without_cap_sys_ptrace(vmm: Vmm, told: Told) -> None:
    answered = run_within(partial(drop_capability, SYS_PTRACE), pid=vmm.pid, value="process")
    refused(answered, told(answered), 0)
    assert vmm.mode == "user"


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("tolerate", [["denied"], []])
def test_root_without_cap_sys_resource(vmm: Vmm, told: Told, tolerate: list[str], check: bool) -> None:
    without = partial(drop_capability, CAPABILITIES["sys_resource"])
    assert run_within(without, pid=vmm.pid)["value"] == "user"
    answered = run_within(without, pid=vmm.pid, value="process", tolerate=tolerate, _ansible_check_mode=check)
    message = told(answered)
    assert "takes CAP_SYS_RESOURCE in the initial user namespace" in message
    assert "CAP_IPC_LOCK" in message
    assert (answered["changed"], answered["value"]) == (False, "user")
    assert answered.get("failed", False) == (not tolerate)
    assert [each["outcome"] for each in answered["iommufds"]] == ["denied"]
    assert vmm.mode == "user"


def test_root_of_a_user_namespace(vmm: Vmm, told: Told) -> None:
    answered = run_within(enter_user_namespace, pid=vmm.pid, value="process")
    refused(answered, told(answered), 0)
    assert vmm.mode == "user"


def test_root_of_the_user_namespace_that_the_process_is_in(start: Start, told: Told) -> None:
    vmm = start()
    vmm.do("enter_namespace")
    vmm.open()
    answered = run_apart(["nsenter", "--user", f"--target={vmm.pid}"], pid=vmm.pid, value="process")
    assert "takes CAP_SYS_RESOURCE in the initial user namespace" in told(answered)
    assert answered["process"]["uid"] == 0
    assert [each["outcome"] for each in answered["iommufds"]] == ["denied"]
    assert vmm.mode == "user"
    # From outside nothing about it is special.
    assert run(pid=vmm.pid, value="process")["changed"]
    assert vmm.mode == "process"


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("pidfd_getfd", "EPERM", "nor a seccomp filter"),
        ("pidfd_getfd", "ENOSYS", "The system call pidfd_getfd is not to be had (ENOSYS)"),
        ("pidfd_open", "EPERM", "is refused (EPERM: Operation not permitted): look for a seccomp filter"),
        ("pidfd_open", "ENOSYS", "The system call pidfd_open is not to be had (ENOSYS)"),
    ],
)
def test_a_seccomp_filter(vmm: Vmm, told: Told, tmp_path: Path, call: str, error: str, words: str) -> None:
    answered = run_apart(without_call(call, error, tmp_path / "answer"), pid=vmm.pid, value="process")
    assert words in told(answered)
    assert answered["failed"]
    assert vmm.mode == "user"


@pytest.mark.parametrize("level", [1, 2])
def test_hidepid(vmm: Vmm, told: Told, level: int) -> None:
    def prepare() -> None:
        mount_privately("proc", "/proc", "proc", f"hidepid={level}")
        change_user(ALICE)

    answered = run_within(prepare, pid=vmm.pid, value="process")
    assert f"/proc hides process {vmm.pid} from this caller (uid 1002): it is mounted with hidepid" in told(answered)
    assert vmm.mode == "user"


def test_a_proc_of_another_pid_namespace(told: Told) -> None:
    # Process 1 of the new namespace is the module's own; that of the /proc it sees is the host's init.
    answered = run_apart(["unshare", "--pid", "--fork"], pid=1)
    assert "/proc hides process 1" in told(answered)
    assert "for another pid namespace" in answered["msg"]
    assert "process" not in answered
