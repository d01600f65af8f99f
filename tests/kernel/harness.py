# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process to try the module on, driven step by step, and what the tests need around it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ansible_collections.virt.iommufd.tests.lab.guest.pinner import Pinner, answer

TREE = Path(__file__).resolve().parents[5]
RUN_MODULE = Path(__file__).resolve().with_name("run_module.py")
VM, ALICE = 1001, 1002  # ordinary users of the guest
CONTAINER = "/dev/vfio/vfio"

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_SYS_EXIT = 60
_CLONE_NEWUSER = 0x10000000

Answer = dict[str, Any]


class Acts(Pinner):
    """What a VMM does, and what only a strange or hostile process does."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__()
        self._control = control

    def dup(self, fd: str, times: str) -> Answer:
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
        return {"last": [os.dup(int(fd)) for _each in range(int(times))][-1]}

    def put(self, path: str, fd: str) -> Answer:
        """Puts another open file in the place of a descriptor."""
        other = socket.socket(socket.AF_UNIX).detach() if path == "socket" else os.open(path, os.O_RDONLY)
        os.dup2(other, int(fd), inheritable=False)
        os.close(other)
        return {}

    def swap(self, fd: str, *paths: str) -> NoReturn:
        """Swaps what is behind a descriptor, as fast as it can, for ever."""
        others = [os.dup(int(fd)), socket.socket(socket.AF_UNIX).detach()]
        others += [os.open(path, os.O_RDWR) for path in paths]
        self._control.send(b"{}")
        while True:
            for other in others:
                os.dup2(other, int(fd))

    def rename(self, path: str, *others: str) -> NoReturn:
        """Puts one file after the other at path, as fast as it can, for ever; each keeps a name of its own."""
        self._control.send(b"{}")
        scratch = f"{path}.{os.getpid()}"
        while True:
            for other in others:
                os.link(other, scratch, follow_symlinks=False)
                os.rename(scratch, path)

    def call_itself(self, name: str) -> Answer:
        """Takes a name, given in hexadecimal."""
        Path("/proc/self/comm").write_bytes(bytes.fromhex(name))
        return {}

    def threads(self, count: str) -> Answer:
        """Starts threads that do nothing, and says the id of the last."""
        threading.stack_size(2**18)
        never = threading.Lock()
        never.acquire()
        for _each in range(int(count)):
            last = threading.Thread(target=never.acquire, daemon=True)
            last.start()
        return {"tid": last.native_id}

    def end_leader(self) -> NoReturn:
        """Ends the first thread; another one tells when that has happened, and stays."""
        status = Path(f"/proc/self/task/{os.getpid()}/stat")

        def tell() -> None:
            while b") Z " not in status.read_bytes():
                os.sched_yield()
            self._control.send(b"{}")
            serve(self, self._control)

        threading.Thread(target=tell).start()
        _libc.syscall(_SYS_EXIT, 0)
        raise AssertionError("unreachable")

    def execute(self) -> NoReturn:
        """Becomes another program, which sends back what it is sent; that closes what was opened."""
        for number in (0, 1):
            os.dup2(self._control.fileno(), number)
        os.execv("/bin/cat", ["cat"])

    def enter_namespace(self) -> Answer:
        """Becomes root of a user namespace of its own."""
        uid = os.getuid()
        if _libc.unshare(_CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {uid} 1")
        return {}

    def zombie(self) -> Answer:
        """Leaves a child that has ended unburied, and says its id."""
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        return {"child": child}


def serve(acts: Acts, control: socket.socket) -> None:
    while request := control.recv(65536):
        control.send(json.dumps(answer(acts, json.loads(request))).encode())


class Vmm:
    """A child of the tests that stands in for a VMM. It shares no descriptor with them but the one it is driven by."""

    def __init__(self, user: int = VM) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(60)
        self._ended = False
        self.pid = os.fork()
        if not self.pid:
            try:
                _become(user, theirs)
            finally:
                os._exit(1)
        theirs.close()

    def ask(self, *words: str) -> Answer:
        """The answer to a step; what the kernel refuses is in its `errno`."""
        answered: Answer = json.loads(self._send(json.dumps(words).encode()))
        return answered

    def do(self, *words: str) -> Answer:
        """As `ask`, for a step that must succeed."""
        reply = self.ask(*words)
        assert reply.get("errno") is None, (words, reply)
        return reply

    def _send(self, request: bytes) -> bytes:
        self._control.send(request)
        reply = self._control.recv(2**20)
        assert reply, f"the process ended without an answer to {request!r}"
        return reply

    def open(self, *arguments: str) -> int:
        fd: int = self.do("open", *arguments)["fd"]
        return fd

    @property
    def mode(self) -> str:
        """The rlimit mode in force, as the kernel tells it inside the process."""
        return ["user", "process"][self.do("get")["value"]]

    def execute(self) -> None:
        """Has it become another program, and waits until it has."""
        self._control.send(b'["execute"]')
        assert self._send(b"ping") == b"ping"

    def end(self) -> None:
        """Ends and buries it; once is enough."""
        if not self._ended:
            self._ended = True
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._control.close()


def _become(user: int, control: socket.socket) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.dup2(control.fileno(), 3)
    control.detach()
    os.closerange(4, 65536)
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    # A change of user makes it one that its own user cannot look at, which a program started anew is not.
    _libc.prctl(_PR_SET_DUMPABLE, 1)
    # The change of user has undone that too.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    kept = socket.socket(fileno=3)
    serve(Acts(kept), kept)


@contextlib.contextmanager
def reusing(pid: int) -> Iterator[Vmm]:
    """Another process by an id that has become free."""
    while True:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        vmm = Vmm()
        try:
            if vmm.pid == pid:
                vmm.open()
                yield vmm
                return
            assert not Path(f"/proc/{pid}").exists(), "somebody else has the id"
        finally:
            vmm.end()


def start_ticks(pid: int) -> int:
    """When a process started, in hundredths of a second since boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def as_user(user: int) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def run_apart(prefix: list[str], **options: Any) -> Answer:
    """The module's answer when a program of its own runs it, started by the commands in prefix."""
    python = ["env", f"PYTHONPATH={TREE}", "PYTHONDONTWRITEBYTECODE=1", "python3"]
    command = [*prefix, *python, str(RUN_MODULE), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    answered: Answer = json.loads(done.stdout.splitlines()[-1])
    return answered
