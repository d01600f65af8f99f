# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Descriptors on a FUSE mount whose server does not answer any more."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _process, _syscalls
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import PATIENCE, VM
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

pytestmark = pytest.mark.once

_libc = ctypes.CDLL(None, use_errno=True)

# linux/fuse.h. The few requests that it takes to open the one file of a file system.
LOOKUP, GETATTR, OPEN, INIT, FLUSH, OPENDIR = 1, 3, 14, 26, 25, 27
ENOSYS = 38


def attributes(node: int) -> bytes:
    """`struct fuse_attr`: the root folder is node 1, the file node 2."""
    mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o644
    return struct.pack("=QQQQQQIIIIIIIIII", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, attributes: Callable[[int], bytes] = attributes) -> tuple[int, bytes]:
    """An errno, and the body of the answer. No attribute may be kept, so each stat asks the server anew."""
    if opcode == INIT:
        return 0, struct.pack("=IIIIHHIIHHI28x", 7, 31, 4096, 0, 1, 1, 4096, 1, 0, 0, 0)
    if opcode == LOOKUP:
        return 0, struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + attributes(2)
    if opcode == GETATTR:
        return 0, struct.pack("=QII", 0, 0, 0) + attributes(node)
    if opcode in (OPEN, OPENDIR):
        return 0, struct.pack("=QII", 1, 0, 0)
    return ENOSYS, b""


def serve(fuse: int) -> None:
    while True:
        request = os.read(fuse, 65536)
        _length, opcode, unique, node = struct.unpack_from("=IIQQ", request)
        error, body = answer(opcode, node)
        os.write(fuse, struct.pack("=IiQ", 16 + len(body), -error, unique) + body)


def mount(mount_point: Path, fuse: int, options: str) -> None:
    data = f"fd={fuse},rootmode=40000,{options}".encode()
    assert not _libc.mount(b"fuse", os.fsencode(mount_point), b"fuse", 0, data), os.strerror(ctypes.get_errno())


@pytest.fixture
def server(start: Start, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file on a FUSE mount, and the process that serves it. It ends before those started: else they could not."""
    subprocess.run(["modprobe", "fuse"], check=True)
    mount_point = tmp_path / "fuse"
    mount_point.mkdir()
    fuse = os.open("/dev/fuse", os.O_RDWR)
    mount(mount_point, fuse, "user_id=0,group_id=0,allow_other")
    child = os.fork()
    if not child:
        with contextlib.suppress(OSError):
            serve(fuse)
        os._exit(0)
    os.close(fuse)
    yield mount_point / "file", child
    # The connection's last descriptor goes with the server, and with it whoever waits for an answer.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("asked", [False, True])
def test_a_descriptor_on_a_dead_fuse_mount(
    server: tuple[Path, int], start: Start, told: Told, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pid = server
    vmm = start(0)
    fd = vmm.do("open", str(path), "r")["fd"]
    vmm.open()
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    # That is the danger: it waits for the server.
    looking = [sys.executable, "-I", "-S", "-c", f"import os; os.write(1, b'.'); os.stat('/proc/{vmm.pid}/fd/{fd}')"]
    with subprocess.Popen(looking, stdout=subprocess.PIPE) as waiting:
        assert waiting.stdout
        assert waiting.stdout.read(1) == b"."
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(3)
        waiting.kill()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)  # ends all of it, should the module hang
    borrowed: list[int] = []
    original = _syscalls.pidfd_getfd

    def note(pidfd: int, number: int) -> int:
        borrowed.append(number)
        return original(pidfd, number)

    monkeypatch.setattr(_process, "pidfd_getfd", note)
    try:
        if asked:
            answered = run(pid=vmm.pid, fd=fd, value="process")
            assert f"Descriptor {fd} of " in told(answered)
            assert f"is not an iommufd. It is {path}." in answered["msg"]
            assert vmm.mode == "user"
        else:
            assert run(pid=vmm.pid, value="process")["changed"]
            assert vmm.mode == "process"
    finally:
        signal.alarm(0)
    assert fd not in borrowed


@pytest.fixture
def refusing(start: Start, tmp_path: Path) -> Iterator[Path]:
    """A mount that refuses root: without allow_other nobody but its owner may look at it. It ends as `server` does."""
    subprocess.run(["modprobe", "fuse"], check=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    mount(tmp_path, fuse, f"user_id={VM},group_id={VM}")
    yield tmp_path
    os.close(fuse)
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_descriptor_on_a_mount_that_refuses_root(refusing: Path, start: Start) -> None:
    vmm = start(0)
    vmm.do("open", str(refusing), "path")
    vmm.open()
    with pytest.raises(PermissionError):
        os.stat(refusing)
    assert run(pid=vmm.pid, value="process")["changed"]
    assert vmm.mode == "process"
