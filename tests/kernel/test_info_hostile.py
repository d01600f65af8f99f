# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hosts whose processes are strange, or mean harm. Whoever looks is always answered, and never with a wrong word."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _survey
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, CONTAINER, DEVICES, MIB, PATIENCE, VM, Vmm
from ansible_collections.virt.iommufd.tests.kernel.info import limits, look, look_at, process, user
from ansible_collections.virt.iommufd.tests.kernel.test_fuse import refusing, server

pytestmark = pytest.mark.once

__all__ = ("refusing", "server")


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends all of it, should the module hang."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)


def test_a_descriptor_on_a_dead_fuse_mount(server: tuple[Path, int], start: Start, alarm: None) -> None:
    path, pid = server
    vmm = start(0)
    vmm.do("open", str(path), "r")
    fd = vmm.open()
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert [each["fd"] for each in look_at(vmm)["iommufds"]] == [fd]


def test_an_emulator_on_a_dead_fuse_mount(server: tuple[Path, int], alarm: None) -> None:
    path, pid = server
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    answered = look("host", emulators=[str(path)])
    [row] = [each for each in answered["host"]["qemu"] if each["path"] == str(path)]
    assert (row["present"], row["cap_ipc_lock"]) == (False, None)
    assert f"{path} was not found within 10 seconds" in limits(answered)["emulators"]


def test_a_descriptor_on_a_mount_that_refuses_root(refusing: Path, start: Start) -> None:
    vmm = start(0)
    vmm.do("open", str(refusing), "path")
    fd = vmm.open()
    answered = look()
    assert [each["fd"] for each in process(answered, vmm.pid)["iommufds"]] == [fd]
    assert answered["host"]["limits_of_view"] == []


def test_a_process_with_100000_descriptors(start: Start, alarm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # All are looked at, however busy this machine is. On one that is not, that is a matter of seconds.
    monkeypatch.setattr(_survey, "_PATIENCE", PATIENCE)
    vmm = start(0)
    fd = vmm.open()
    assert vmm.do("dup", str(vmm.do("hold_socket")["fd"]), "100000")["last"] >= 100000
    last = vmm.open()
    [first, second] = process(look(), vmm.pid)["iommufds"]
    assert (first["fd"], second["fd"]) == (fd, last)


def test_a_process_that_holds_one_iommufd_many_times(start: Start, alarm: None) -> None:
    vmm = start()
    fd = vmm.open()
    vmm.do("attach", DEVICES[0])
    vmm.do("pin", str(MIB))
    vmm.do("dup", str(fd), "200")
    row = look_at(vmm)
    assert len(row["iommufds"]) == 201
    assert (row["accounting"], row["charged_bytes"]) == ("user", MIB)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"a\n) R 1 [x]\xff", r"a\n) R 1 [x]\xff"),
        (b"\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        (b"\xe2\x80\xae\xe2\x80\xa8\xc3\xa9", "\\u202e\\u2028\u00e9"),
        (b"\nUid:\t0\t0\t0", r"\nUid:\t0\t0\t0"),
        (b"x\nVmPin: 9 kB", r"x\nVmPin: 9 kB"),
    ],
)
def test_a_process_with_a_strange_name(vmm: Vmm, name: bytes, shown: str) -> None:
    vmm.do("call_itself", name.hex())
    row = process(look(), vmm.pid)
    assert (row["comm"], row["uid"], row["pinned_bytes"]) == (shown, VM, 0)


def start_churn() -> subprocess.Popen[bytes]:
    """Processes that open the node and end, as fast as they can, in a group of their own."""
    loop = "while :; do (exec 9<>/dev/iommu) & sh -c 'exec 9<>/dev/iommu; exec true'; wait; done"
    return subprocess.Popen(["setpriv", "--pdeathsig=KILL", "sh", "-c", loop], start_new_session=True)


def test_who_has_an_iommufd_for_a_moment_is_not_missed(alarm: None) -> None:
    """What the kernel counts is never held against what was seen by then."""
    churn = start_churn()
    try:
        for _turn in range(10):
            assert look()["host"]["limits_of_view"] == []
        assert churn.poll() is None
    finally:
        os.killpg(churn.pid, signal.SIGKILL)
        churn.wait()


def test_processes_that_come_and_go(start: Start, alarm: None) -> None:
    """Some open and close, some end, some swap what is behind their descriptors: all as fast as they can."""
    stays = start(ALICE)
    fd = stays.open()
    swappers = [start(0), start()]
    for each in swappers:
        each.do("swap", str(each.open()), os.devnull, CONTAINER)
    churn = start_churn()
    seen: set[int] = set()
    try:
        for _turn in range(6):
            answered = look()
            assert [each["fd"] for each in process(answered, stays.pid)["iommufds"]] == [fd]
            assert user(answered, ALICE)["pids"] == [stays.pid]
            # Who was not kept from looking is told of nothing but of those that were caught at it.
            limits = [each["why"] for each in answered["host"]["limits_of_view"]]
            caught = [why for why in limits if "It puts other files in the place" in why]
            uncounted = [why for why in limits if "open that no process was seen to have" in why]
            # Those may have more, also where they were not caught.
            assert len(caught) + len(uncounted) == len(limits)
            assert str(stays.pid) not in re.findall("[0-9]+", " ".join(limits))
            for each in answered["processes"]:
                # What a swapper puts in the place of its iommufd may be a container.
                assert each["iommufds"] or each["legacy_containers"]
                assert all(one["rlimit_mode"] in ("user", "process") for one in each["iommufds"])
            seen |= {each["pid"] for each in answered["processes"]}
        # Those two keep the iommufd under another number, too.
        assert {each.pid for each in swappers} <= seen
        assert churn.poll() is None
    finally:
        os.killpg(churn.pid, signal.SIGKILL)
        churn.wait()


def test_zombies_and_kernel_threads(vmm: Vmm) -> None:
    child = vmm.do("zombie")["child"]
    answered = look()
    assert [each["pid"] for each in answered["processes"]] == [vmm.pid]
    assert Path(f"/proc/{child}").exists()
    assert answered["host"]["limits_of_view"] == []


def test_a_process_whose_first_thread_has_ended(start: Start) -> None:
    vmm = start()
    vmm.open()
    vmm.do("attach", DEVICES[0])
    vmm.do("pin", str(MIB))
    vmm.do("end_leader")
    answered = look()
    # Its descriptors are out of reach, so it must be among what could not be seen.
    assert str(vmm.pid) in limits(answered)["descriptors"]
    # What it has pinned is not, since the other threads show it.
    row = user(answered, VM)
    assert (row["pids"], row["uncertain_bytes"], row["at_risk"]) == ([], MIB, None)


def test_a_process_of_many_threads(start: Start) -> None:
    vmm = start(0)
    fd = vmm.open()
    thread = vmm.do("threads", "100")["tid"]
    answered = look(pids=[vmm.pid, thread])
    assert [each["pid"] for each in answered["processes"]] == [vmm.pid]
    assert process(answered, vmm.pid)["iommufds"][0]["fd"] == fd


def test_a_descriptor_that_a_child_has_inherited(start: Start) -> None:
    vmm = start()
    fd = vmm.open()
    vmm.do("attach", DEVICES[0])
    vmm.do("pin", str(MIB))
    child = vmm.do("fork")["child"]
    answered = look()
    assert [each["pid"] for each in answered["processes"]] == [vmm.pid, child]
    assert process(answered, child)["iommufds"][0]["fd"] == fd
    assert [process(answered, each)["charged_bytes"] for each in (vmm.pid, child)] == [MIB, 0]
    assert user(answered, VM)["charged_bytes"] == MIB
