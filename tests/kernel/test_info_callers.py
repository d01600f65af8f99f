# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Callers who may not see everything: they are told what they see, and what they do not."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    ALICE,
    CAPABILITIES,
    DEVICES,
    MIB,
    SYS_PTRACE,
    VM,
    Vmm,
    as_user,
    change_user,
    drop_capability,
    enter_user_namespace,
    mount_privately,
    without_call,
)
from ansible_collections.virt.iommufd.tests.kernel.info import (
    limits,
    look,
    look_apart,
    look_within,
    process,
    status_of,
)
from ansible_collections.virt.iommufd.tests.kernel.test_callers import yama

__all__ = ("yama",)

ALL = "host processes users"


def pinning(vmm: Vmm, device: int = 0) -> Vmm:
    vmm.open()
    vmm.do("attach", DEVICES[device])
    vmm.do("pin", str(MIB))
    return vmm


@pytest.fixture
def vms(start: Start) -> Vmm:
    return pinning(start(VM))


@pytest.fixture
def alices(start: Start) -> Vmm:
    return pinning(start(ALICE), 1)


def seen_partly(answered: dict[str, object], pid: int) -> None:
    """A process with pinned memory is there, but what it holds cannot be told."""
    row = process(answered, pid)
    assert (row["iommufds"], row["accounting"], row["charged_bytes"], row["headroom_bytes"]) == (None,) * 4
    assert row["pinned_bytes"] == MIB
    assert [len(row["notes"]), row["vfio_devices"]] == [1, None]


def others() -> set[int]:
    """The processes of users other than alice that have memory and so may have descriptors."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = status_of(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "VmSize" in status and status["Uid"].split()[0] != str(ALICE):
            found.add(int(name))
    return found


def test_an_ordinary_user(vms: Vmm, alices: Vmm) -> None:
    # The host's own processes come and go, such as udev's workers; some time none does meanwhile.
    for _attempt in range(20):
        before = others()
        answered = look_within(partial(change_user, ALICE), ALL)
        closed = limits(answered)["descriptors"]
        counted = sum(map(int, re.findall(r"of (\d+) process", closed)))
        # Kernel threads are not among them.
        if others() == before and counted == len(before):
            break
    else:
        pytest.fail(f"{counted} processes are told, and there are {len(before)}")
    seen_partly(answered, vms.pid)
    row = process(answered, alices.pid)
    assert (row["accounting"], row["charged_bytes"], row["iommufds"][0]["settable"]) == ("user", MIB, None)
    assert "EACCES: Permission denied" in closed
    assert "become: true" in closed
    # While libvirt's daemon runs, what it has mapped is not for everybody to see.
    assert set(limits(answered)) <= {"charges", "descriptors", "domains", "libvirt"}
    assert "cannot tell which processes keep what VMs that have ended had pinned" in limits(answered)["charges"]


@pytest.mark.parametrize("scope", [1, 2])
def test_root_under_yama(vms: Vmm, yama: Path, scope: int) -> None:
    yama.write_text(str(scope))
    answered = look(ALL)
    assert process(answered, vms.pid)["accounting"] == "user"
    assert answered["host"]["limits_of_view"] == []


def test_a_user_under_yama(alices: Vmm, yama: Path) -> None:
    yama.write_text("1")
    answered = look_within(partial(change_user, ALICE), ALL)
    row = process(answered, alices.pid)
    assert (row["accounting"], row["charged_bytes"]) == (None, None)
    [iommufd] = row["iommufds"]
    assert (iommufd["rlimit_mode"], iommufd["settable"], iommufd["ioases"]) == (None, None, [])
    assert "kernel.yama.ptrace_scope is 1" in iommufd["msg"]
    assert ["could not be read" in note for note in row["notes"]] == [True]
    assert "kernel.yama.ptrace_scope below 3" in limits(answered)["iommufds"]
    assert str(alices.pid) in limits(answered)["iommufds"]
    assert answered["users"][0]["uncertain_bytes"] == MIB


def test_root_without_cap_sys_ptrace(vms: Vmm) -> None:
    answered = look_within(partial(drop_capability, SYS_PTRACE), ALL)
    seen_partly(answered, vms.pid)
    assert "uid 0 cannot look at the descriptors of" in limits(answered)["descriptors"]
    assert answered["host"]["caller"]["capabilities"] == ["cap_ipc_lock", "cap_sys_resource"]


def test_root_without_cap_sys_resource(vms: Vmm) -> None:
    answered = look_within(partial(drop_capability, CAPABILITIES["sys_resource"]), ALL)
    row = process(answered, vms.pid)
    assert (row["accounting"], row["iommufds"][0]["settable"]) == ("user", None)
    assert answered["host"]["options"]["rlimit_mode"] == {"readable": True, "settable": False}
    assert answered["host"]["limits_of_view"] == []


def test_root_of_a_user_namespace(vms: Vmm, alices: Vmm) -> None:
    answered = look_within(enter_user_namespace, ALL)
    for each in (vms, alices):
        seen_partly(answered, each.pid)
    assert answered["host"]["caller"]["initial_user_namespace"] is False
    assert "descriptors" in limits(answered)
    # The kernel shows all users but root as one that they are not; nobody is charged for all of them.
    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    assert [each for each in answered["users"] if each["uid"] == overflow] == []


@pytest.mark.parametrize("level", ["1", "2", "invisible", "ptraceable"])
def test_hidepid(vms: Vmm, alices: Vmm, level: str) -> None:
    def prepare() -> None:
        mount_privately("proc", "/proc", "proc", f"hidepid={level}")
        change_user(ALICE)

    answered = look_within(prepare, ALL)
    assert process(answered, alices.pid)["accounting"] == "user"
    if level == "1":
        assert str(vms.pid) in limits(answered)["processes"] or "hidepid" in limits(answered)["processes"]
    else:
        assert f"hidepid={'invisible' if level == '2' else level}" in limits(answered)["processes"]
    assert vms.pid not in [each["pid"] for each in answered["processes"]]


def test_root_under_hidepid(vms: Vmm) -> None:
    answered = look_within(partial(mount_privately, "proc", "/proc", "proc", "hidepid=2"))
    assert process(answered, vms.pid)["accounting"] == "user"
    assert answered["host"]["limits_of_view"] == []


def test_another_pid_namespace(vms: Vmm) -> None:
    answered = look_apart(["unshare", "--pid", "--fork", "--mount-proc"], ALL)
    assert "This is not the initial pid namespace" in limits(answered)["processes"]
    assert answered["processes"] == []


def test_the_proc_of_another_pid_namespace(vms: Vmm) -> None:
    answered = look_apart(["unshare", "--pid", "--fork"], ALL)
    assert "processes" in limits(answered)
    assert [each for each in answered["processes"] if each["accounting"]] == []


@pytest.mark.once
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize(("call", "what"), [("pidfd_getfd", "iommufds"), ("pidfd_open", "processes")])
def test_a_seccomp_filter(vms: Vmm, tmp_path: Path, call: str, error: str, what: str) -> None:
    answered = look_apart(without_call(call, error, tmp_path / "answer"))
    assert error in limits(answered)[what]
    assert str(vms.pid) in limits(answered)[what]
    if what == "iommufds":
        row = process(answered, vms.pid)
        assert (row["accounting"], row["pinned_bytes"], row["iommufds"][0]["rlimit_mode"]) == (None, MIB, None)
        assert error in row["iommufds"][0]["msg"]


def test_ordinary_user_by_a_program_of_its_own(alices: Vmm) -> None:
    answered = look_apart(as_user(ALICE), ALL)
    assert process(answered, alices.pid)["accounting"] == "user"
