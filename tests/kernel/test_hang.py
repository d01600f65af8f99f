# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Holders that keep whoever looks at them waiting, by a file on a FUSE mount: in the place of an iommufd, just in time.

A process that swaps the two as fast as it can has that luck now and then. Here it is told when.

To close such a file asks its server (FUSE_FLUSH), and the wait for that answer ends with no signal, SIGKILL included.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _child, _process, _syscalls, _task_target
from ansible_collections.virt.iommufd.plugins.module_utils._child import NoAnswer, in_child
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import PATIENCE, Vmm
from ansible_collections.virt.iommufd.tests.kernel.info import limits, look, process
from ansible_collections.virt.iommufd.tests.kernel.run_module import run
from ansible_collections.virt.iommufd.tests.kernel.test_fuse import FLUSH, answer, mount


def serve_but_flush(fuse: int, friend: int, note: int) -> None:
    """Answers every request but a FLUSH by anybody but the friend, which it notes down and leaves unanswered."""
    while True:
        request = os.read(fuse, 65536)
        _length, opcode, unique, node, _uid, _gid, pid = struct.unpack_from("=IIQQIII", request)
        error, body = answer(opcode, node)
        if opcode == FLUSH and pid != friend:
            os.write(note, b"%d\n" % pid)
            continue
        # ENOSYS would have the kernel never ask again.
        error = 0 if opcode == FLUSH else error
        os.write(fuse, struct.pack("=IiQ", 16 + len(body), -error, unique) + body)


class Trap(NamedTuple):
    """A process with an iommufd `fd` and a file on its FUSE mount, and who waits for that file's server so far."""

    vmm: Vmm
    fd: int
    notes: int
    file: Path

    def caught(self) -> list[int]:
        """The processes that wait for the server."""
        with contextlib.suppress(BlockingIOError):
            return [int(pid) for pid in os.read(self.notes, 65536).split()]
        return []


@pytest.fixture
def trap(start: Start, tmp_path: Path) -> Iterator[Trap]:
    """A trap that is set. When it ends, so does everybody's wait: the connection goes with its server."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Should the module hang, all of it ends.
    signal.alarm(PATIENCE)
    subprocess.run(["modprobe", "fuse"], check=True)
    mount_point = tmp_path / "fuse"
    mount_point.mkdir()
    fuse = os.open("/dev/fuse", os.O_RDWR)
    mount(mount_point, fuse, "user_id=0,group_id=0,allow_other")
    notes, note = os.pipe()
    os.set_blocking(notes, False)
    vmm = start(0)
    fd = vmm.open()
    server = os.fork()
    if not server:
        with contextlib.suppress(OSError):
            serve_but_flush(fuse, vmm.pid, note)
        os._exit(0)
    os.close(fuse)
    os.close(note)
    try:
        yield Trap(vmm, fd, notes, mount_point / "file")
    finally:
        vmm.end()
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)
        os.close(notes)
        signal.alarm(0)
        # Those that were left behind are ours, and end now.
        deadline = time.monotonic() + 3
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    time.sleep(0.05)


def is_stuck(pid: int) -> bool:
    """Whether a process does not end though it is killed."""
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")


@pytest.fixture
def sprung(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> Trap:
    """The trap, with the file put in the place of the iommufd that was found there, just before it is shared."""
    share = _syscalls.pidfd_getfd
    trap.vmm.do("put_at_signal", str(trap.file), str(trap.fd))

    def share_what_is_there_now(pidfd: int, fd: int) -> int:
        if f"\nPid:\t{trap.vmm.pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text():
            os.kill(trap.vmm.pid, signal.SIGUSR1)
            while os.readlink(f"/proc/{trap.vmm.pid}/fd/{fd}") != str(trap.file):
                time.sleep(0.01)
        return share(pidfd, fd)

    monkeypatch.setattr(_process, "pidfd_getfd", share_what_is_there_now)
    return trap


@pytest.mark.parametrize("asked", [False, True])
def test_an_iommufd_that_cannot_be_closed(sprung: Trap, asked: bool) -> None:
    began = time.monotonic()
    answered = run(pid=sprung.vmm.pid, value="process", **({"fd": sprung.fd} if asked else {}))
    took = time.monotonic() - began
    caught = sprung.caught()
    # It was asked about an iommufd, and said what it was; or that was not the one.
    assert not asked or "is not an iommufd. It is " in answered["msg"]
    assert took < 30
    # What waits was left behind, and is not this process.
    assert caught
    assert os.getpid() not in caught
    assert all(is_stuck(pid) for pid in caught)


def test_a_look_at_a_host_goes_on_behind_one_that_hangs(sprung: Trap, start: Start) -> None:
    honest = start()
    honest.open()
    began = time.monotonic()
    answered = look("processes")
    assert time.monotonic() - began < 60
    assert sprung.caught()
    assert "puts other files in the place of its iommufds" in limits(answered)["iommufds"]
    rows = {each["pid"]: each for each in answered["processes"]}
    assert rows[honest.pid]["accounting"] == "user"
    # With one that was not to be seen, nobody knows how it is accounted.
    assert sprung.vmm.pid not in rows or rows[sprung.vmm.pid]["accounting"] is None


def test_a_child_that_cannot_be_killed_is_not_waited_for(trap: Trap, tmp_path: Path) -> None:
    def fall_for_it() -> None:
        os.close(os.open(tmp_path / "fuse/file", os.O_RDONLY))

    began = time.monotonic()
    with pytest.raises(NoAnswer):
        in_child(None, fall_for_it, 1)
    assert time.monotonic() - began < 1 + 2 * _child._ENDING + 10
    (caught,) = trap.caught()
    assert is_stuck(caught)


@pytest.fixture
def stuck(trap: Trap) -> int:
    """A process with an iommufd that executes a program, and never comes to it.

    The kernel closes descriptors then, and waits for FLUSH of the one that is on the trap's mount. Meanwhile it holds
    what whoever looks into /proc has to wait for, exec_update_lock.
    """
    pid = os.fork()
    if not pid:
        os.set_inheritable(os.open("/dev/iommu", os.O_RDWR), True)
        os.open(trap.file, os.O_RDONLY)
        os.execv("/bin/true", ["true"])
    deadline = time.monotonic() + PATIENCE / 2
    while pid not in trap.caught():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # It ends with the server of the trap, whose fixture waits for it.
    return pid


def test_a_process_that_is_stuck_in_executing_a_program(
    stuck: int, start: Start, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    honest = start()
    honest.open()
    # That is the danger, on kernels that hold the lock meanwhile: 6.18 does, 6.12 does not.
    looking = [sys.executable, "-I", "-S", "-c", f"import os; os.write(1, b'.'); open('/proc/{stuck}/maps').read()"]
    with subprocess.Popen(looking, stdout=subprocess.PIPE) as waiting:
        assert waiting.stdout
        assert waiting.stdout.read(1) == b"."
        try:
            waiting.wait(3)
            hangs = False
        except subprocess.TimeoutExpired:
            hangs = True
        waiting.kill()
    began = time.monotonic()
    answered = look("processes")
    assert time.monotonic() - began < 60
    assert process(answered, honest.pid)["accounting"] == "user"
    monkeypatch.setattr(_task_target, "_SECONDS", 3)
    result = run(pid=stuck, value="process")
    if hangs:
        assert "keeps whoever looks at it waiting" in limits(answered)["descriptors"]
        assert str(stuck) in limits(answered)["descriptors"]
        assert "keeps whoever looks at it waiting" in told(result)
    else:
        assert process(answered, stuck)["iommufds"]
        assert result["changed"]
