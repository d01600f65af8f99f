# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Processes that are not what one expects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import Vmm
from ansible_collections.virt.iommufd.tests.kernel.run_module import run


def test_a_zombie(vmm: Vmm, told: Told) -> None:
    child = vmm.do("zombie")["child"]
    answered = run(pid=child, value="process")
    assert f"(pid {child}) has ended" in told(answered)


def test_a_kernel_thread(told: Told) -> None:
    assert "kthreadd (pid 2) is a kernel thread: it has no descriptors" in told(run(pid=2, value="process"))


def test_no_such_process(told: Told) -> None:
    # Beyond the largest that there can be.
    assert "There is no process with the id 2147483647" in told(run(pid=2**31 - 1))


@pytest.mark.once
def test_a_process_of_4000_threads(start: Start, told: Told) -> None:
    vmm = start(0)
    vmm.open()
    thread = vmm.do("threads", "4000")["tid"]
    assert len(os.listdir(f"/proc/{vmm.pid}/task")) > 4000
    assert run(pid=vmm.pid, value="process")["changed"]
    assert vmm.mode == "process"
    answered = run(pid=thread, value="user")
    assert f"{thread} is a thread, not a process" in told(answered)
    assert vmm.mode == "process"


def test_a_process_whose_first_thread_has_ended(vmm: Vmm, told: Told) -> None:
    vmm.do("end_leader")
    answered = run(pid=vmm.pid, value="process")
    assert "has ended while others run on: its descriptors are out of reach" in told(answered)
    assert vmm.mode == "user"


@pytest.mark.once
def test_a_process_with_20000_descriptors(start: Start) -> None:
    vmm = start(0)
    fd = vmm.open()
    last = vmm.do("dup", str(fd), "1")["last"]
    assert vmm.do("dup", "0", "20000")["last"] >= 20000
    answered = run(pid=vmm.pid, value="process")
    assert [(each["fd"], each["outcome"]) for each in answered["iommufds"]] == [(fd, "changed"), (last, "unchanged")]
    assert vmm.mode == "process"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"a\n) R 1 [x]\xff", r"a\n) R 1 [x]\xff"),
        (b"\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        (b"\xe2\x80\xae\xe2\x80\xa8\xc3\xa9", "\\u202e\\u2028\u00e9"),
        (b"\nUid:\t0\t0\t0", r"\nUid:\t0\t0\t0"),
    ],
)
def test_a_process_with_a_strange_name(vmm: Vmm, told: Told, tmp_path: Path, name: bytes, shown: str) -> None:
    vmm.do("call_itself", name.hex())
    pidfile = tmp_path / "pid"
    pidfile.write_text(str(vmm.pid))
    answered = run(pidfile=str(pidfile), value="process")
    assert answered["process"] == {"pid": vmm.pid, "comm": shown, "uid": 1001, "user": "vm"}
    assert answered["process"]["comm"].isprintable()
    assert vmm.mode == "process"
    failure = told(run(pid=vmm.pid, fd=1000))
    assert failure.startswith(f"{shown} (pid {vmm.pid}) has no descriptor 1000")
    assert failure.isprintable()
