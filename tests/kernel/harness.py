# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process to try the module on, driven step by step, and what the tests need around it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import json
import mmap
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ansible_collections.virt.iommufd.plugins.modules import iommufd_option
from ansible_collections.virt.iommufd.tests.kernel.run_module import run
from ansible_collections.virt.iommufd.tests.lab.guest.pinner import (
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FIXED_READABLE_WRITEABLE,
    Pinner,
    answer,
)
from ansible_collections.virt.iommufd.tests.lab.guest.pinner import main as run_pinner

TREE = Path(__file__).resolve().parents[5]
RUN_MODULE = Path(__file__).resolve().with_name("run_module.py")
VM, ALICE = 1001, 1002  # ordinary users of the guest
CONTAINER = "/dev/vfio/vfio"

# Emulated on a busy machine, all takes long. What takes longer than this hangs.
PATIENCE = 600

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
# Keeps Python's lock during a call.
_libc_alone = ctypes.PyDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_DROP = 24
# x86-64 has numbers of its own for the older calls; the others have those of asm-generic/unistd.h.
_SYS_EXIT, _SYS_CAPSET = (60, 126) if os.uname().machine == "x86_64" else (93, 91)
_SYS_CLONE3 = 435
_SYS_PIDFD_GETFD = 438
_SYS_IO_URING_SETUP = 425
_SYS_IO_URING_REGISTER = 427
_IORING_REGISTER_BUFFERS = 0
_IORING_UNREGISTER_BUFFERS = 1
# linux/iommufd.h
_IOMMU_FAULT_QUEUE_ALLOC = 0x3B8E
# linux/vhost.h, linux/vhost_types.h
_VHOST_SET_OWNER = 0xAF01
_VHOST_IOTLB_MSG_V2 = 2
_VHOST_IOTLB_UPDATE = 2
_VHOST_IOTLB_BATCH_BEGIN = 5
_VHOST_IOTLB_BATCH_END = 6
_VHOST_ACCESS_RW = 3
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNS = 0x00020000
_MS_BIND = 0x1000
_MS_REC_PRIVATE = 0x4000 | 0x40000

PAGE = mmap.PAGESIZE
MIB = 2**20
DEVICES = [f"/dev/vfio/devices/vfio{number}" for number in range(3)]
# linux/capability.h
CAPABILITIES = {"ipc_lock": 14, "sys_resource": 24}
SYS_PTRACE = 19

Answer = dict[str, Any]


def kernel_config() -> str:
    """How the kernel that runs here was configured, with the modules that the lab has built for it."""
    return Path("/lib/modules", os.uname().release, "config").read_text(encoding="ascii")


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _capset(permitted: int, effective: int) -> None:
    """Sets the capabilities of this thread; the inheritable ones are none."""
    low = struct.pack("=3I", effective & 0xFFFFFFFF, permitted & 0xFFFFFFFF, 0)
    high = struct.pack("=3I", effective >> 32, permitted >> 32, 0)
    _checked(_libc.syscall(_SYS_CAPSET, struct.pack("=Ii", 0x20080522, 0), low + high))


def _permitted() -> int:
    found = re.search("^CapPrm:\t([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found.group(1), 16)


def make_effective(*names: str) -> None:
    """Makes these of this thread's permitted capabilities effective, and no others."""
    _capset(_permitted(), _mask(names))


def drop_capability(number: int) -> None:
    """Takes a capability from this process and what it executes, as setpriv(1) does by the bounding set."""
    _checked(_libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0))
    left = _permitted() & ~(1 << number)
    _capset(left, left)


def _mask(names: tuple[str, ...]) -> int:
    return sum(1 << CAPABILITIES[name] for name in names)


class Acts(Pinner):
    """What a VMM does, and what only a strange or hostile process does."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__()
        self._control = control

    def dup(self, fd: str, times: str) -> Answer:
        resource.setrlimit(resource.RLIMIT_NOFILE, (131072, 131072))
        return {"last": [os.dup(int(fd)) for _each in range(int(times))][-1]}

    def put(self, path: str, fd: str) -> Answer:
        """Puts another open file in the place of a descriptor."""
        other = socket.socket(socket.AF_UNIX).detach() if path == "socket" else os.open(path, os.O_RDONLY)
        os.dup2(other, int(fd), inheritable=False)
        os.close(other)
        return {}

    def put_at_signal(self, path: str, fd: str) -> Answer:
        """Does so at SIGUSR1, which a child of the tests can send, that has nothing else of theirs."""
        signal.signal(signal.SIGUSR1, lambda _number, _frame: self.put(path, fd))
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
        enter_user_namespace()
        return {}

    def become(self, user: str, *capabilities: str) -> Answer:
        """Becomes a user that keeps these capabilities, permitted and effective, and no others."""
        _libc.prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
        _capset(_mask(capabilities), _mask(capabilities))
        return {}

    def become_partly(self, real: str, effective: str) -> Answer:
        """Takes a real and another effective user."""
        os.setgroups([])
        os.setresgid(int(real), int(effective), int(effective))
        os.setresuid(int(real), int(effective), int(effective))
        return {}

    def undumpable(self) -> Answer:
        """Keeps everybody but root from looking at it, as a file capability does."""
        _libc.prctl(_PR_SET_DUMPABLE, 0)
        return {}

    def effective(self, *capabilities: str) -> Answer:
        """Makes these of its permitted capabilities effective, and no others."""
        make_effective(*capabilities)
        return {}

    def pin(self, size: str) -> Answer:
        """As `map`, but so many bytes."""
        memory = mmap.mmap(-1, int(size))
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        flags = IOMMU_IOAS_MAP_FIXED_READABLE_WRITEABLE
        argument = struct.pack("=IIIIQQQ", 40, flags, self._ioas_id, 0, address, len(memory), self._iova)
        fcntl.ioctl(self._iommufd, IOMMU_IOAS_MAP, bytearray(argument))
        self._memory.append(memory)
        self._iova += len(memory)
        return {}

    def mlock(self, size: str) -> Answer:
        """Locks so many bytes of memory, by no means of iommufd."""
        memory = mmap.mmap(-1, int(size))
        self._memory.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        _checked(_libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(memory))))
        return {}

    def register_buffer(self, size: str) -> Answer:
        """Pins so many bytes as a buffer of an io_uring of its own."""
        ring = _checked(_libc.syscall(_SYS_IO_URING_SETUP, 1, bytes(120)))
        memory = mmap.mmap(-1, int(size))
        self._memory.append(memory)
        vector = struct.pack("=QQ", ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory))
        _checked(_libc.syscall(_SYS_IO_URING_REGISTER, ring, _IORING_REGISTER_BUFFERS, vector, 1))
        return {"ring": ring}

    def unregister_buffer(self, ring: str) -> Answer:
        """Has the kernel give back what it pinned for an io_uring, which after the end of a process takes its time."""
        _checked(_libc.syscall(_SYS_IO_URING_REGISTER, int(ring), _IORING_UNREGISTER_BUFFERS, None, 0))
        return {}

    def vdpa(self, path: str) -> Answer:
        """Opens a vDPA device and becomes its owner."""
        self._vdpa = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._vdpa_iova = 0
        fcntl.ioctl(self._vdpa, _VHOST_SET_OWNER)
        return {}

    def vdpa_map(self, size: str) -> Answer:
        """Maps so many bytes for the vDPA device. It gets all pieces of them at once, in a batch."""
        memory = mmap.mmap(-1, int(size))
        self._memory.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for kind in (_VHOST_IOTLB_BATCH_BEGIN, _VHOST_IOTLB_UPDATE, _VHOST_IOTLB_BATCH_END):
            what = (self._vdpa_iova, len(memory), address, _VHOST_ACCESS_RW)
            update = what if kind == _VHOST_IOTLB_UPDATE else (0, 0, 0, 0)
            os.write(self._vdpa, struct.pack("=II3QBB38x", _VHOST_IOTLB_MSG_V2, 0, *update, kind))
        self._vdpa_iova += len(memory)
        return {}

    def attach_container(self, cdev: str) -> Answer:
        """Opens a container and the group of a device, as only root may, and has the container ready to map memory."""
        from ansible_collections.virt.iommufd.tests.kernel import charges

        self._by_container = charges.by_container(cdev)
        return {}

    def map_in_container(self, size: str) -> Answer:
        """Maps so many bytes in the container, which pins them."""
        from ansible_collections.virt.iommufd.tests.kernel.charges import Memory

        memory = mmap.mmap(-1, int(size))
        self._memory.append(memory)
        self._by_container(Memory(-1, memory))
        return {}

    def take(self, pid: str, fd: str) -> Answer:
        """Has a copy of another process's iommufd as its own, as one that was passed to it, which takes root."""
        pidfd = os.pidfd_open(int(pid))
        self._iommufd = _checked(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, int(fd), 0))
        os.close(pidfd)
        return {"fd": self._iommufd}

    def keep_in_flight(self, *fds: str) -> Answer:
        """Keeps open files in a socket alone, as if they were never received."""
        self._socket_pair = socket.socketpair(socket.AF_UNIX)
        socket.send_fds(self._socket_pair[0], [b"x"], list(map(int, fds)))
        for fd in fds:
            os.close(int(fd))
        return {}

    def keep_mapped(self, fd: str) -> Answer:
        """Keeps a device by a mapping of its first region alone."""
        address = _libc.mmap(None, ctypes.c_size_t(PAGE), mmap.PROT_READ, mmap.MAP_SHARED, int(fd), ctypes.c_long(0))
        _checked(-1 if address == ctypes.c_void_p(-1).value else 0)
        os.close(int(fd))
        return {}

    def queue(self) -> Answer:
        """Makes a queue of faults of the iommufd, which is an open file of its own."""
        argument = bytearray(struct.pack("=4I", 16, 0, 0, 0))
        fcntl.ioctl(self._iommufd, _IOMMU_FAULT_QUEUE_ALLOC, argument)
        return {"fd": struct.unpack("=4I", argument)[3]}

    def fork(self) -> Answer:
        """Leaves a child that lives as long as this process, with all its descriptors, and says its id."""
        child = os.fork()
        if not child:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            while True:
                signal.pause()
        return {"child": child}

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

    def __init__(self, user: int = VM, pid: int = 0) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(PATIENCE)
        self._ended = False
        self.pid = _fork_as(pid) if pid else os.fork()
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

    def limit(self, size: int) -> None:
        """Sets its RLIMIT_MEMLOCK, soft and hard."""
        resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK, (size, size))

    def end(self) -> None:
        """Ends and buries it; once is enough."""
        if not self._ended:
            self._ended = True
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._control.close()


def change_user(user: int, *capabilities: str) -> None:
    """Makes this process an ordinary user's, as a program that the user has started is, or that has capabilities."""
    _libc.prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    _capset(_mask(capabilities), _mask(capabilities))
    # A change of user makes it one that its own user cannot look at.
    _libc.prctl(_PR_SET_DUMPABLE, 1)


def mount_privately(source: str, target: str, kind: str = "", options: str = "") -> None:
    """Mounts something in a mount namespace of this process's own; without a kind it binds a path."""
    _checked(_libc.unshare(_CLONE_NEWNS))
    _checked(_libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None))
    flags = 0 if kind else _MS_BIND
    _checked(_libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, options.encode() or None))


def enter_user_namespace() -> None:
    """Makes this process root of a user namespace of its own."""
    uid = os.getuid()
    _checked(_libc.unshare(_CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {uid} 1")


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


def _fork_as(pid: int) -> int:
    """As os.fork, with an id of choice for the child, which must be free: see clone(2), struct clone_args."""
    ids = (ctypes.c_int * 1)(pid)
    arguments = (ctypes.c_uint64 * 11)()
    # exit_signal, set_tid, set_tid_size
    arguments[4], arguments[8], arguments[9] = signal.SIGCHLD, ctypes.addressof(ids), 1
    return _checked(_libc_alone.syscall(_SYS_CLONE3, arguments, ctypes.sizeof(arguments)))


@contextlib.contextmanager
def reusing(pid: int) -> Iterator[Vmm]:
    """Another process by an id that has become free."""
    vmm = Vmm(pid=pid)
    try:
        vmm.open()
        yield vmm
    finally:
        vmm.end()


def start_ticks(pid: int) -> int:
    """When a process started, in hundredths of a second since boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def as_user(user: int) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def without_call(call: str, error: str, output: Path) -> list[str]:
    """What starts a program to which a seccomp filter refuses a system call, and prints what it has written to output.

    Not by `systemd-run --pipe`: SELinux keeps the bus from passing a pipe on.
    """
    script = 'systemd-run --quiet --wait --collect --property=StandardOutput=truncate:"$@"; cat "$1"'
    filtered = [f"--property=SystemCallFilter=~{call}", f"--property=SystemCallErrorNumber={error}"]
    return ["sh", "-ec", script, "sh", str(output), *filtered]


def run_apart(prefix: list[str], module: str = "iommufd_option", /, **options: Any) -> Answer:
    """A module's answer when a program of its own runs it, started by the commands in prefix."""
    python = ["env", f"PYTHONPATH={TREE}", "PYTHONDONTWRITEBYTECODE=1", "python3"]
    command = [*prefix, *python, str(RUN_MODULE), json.dumps(options), module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    answered: Answer = json.loads(done.stdout.splitlines()[-1])
    return answered


def run_within(prepare: Callable[[], object], module: ModuleType = iommufd_option, /, **options: Any) -> Answer:
    """A module's answer in a child of this process that has prepared itself, which is sooner there than a new program.

    Ansible's own modules take ten times as long to be imported as Python takes to start.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            prepare()
            answered = run(module, **options)
        except BaseException as exc:
            answered = {"failed": True, "msg": repr(exc)}
        with os.fdopen(writing, "w") as stream:
            json.dump(answered, stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told: Answer = json.load(stream)
    os.waitpid(child, 0)
    return told


def pinner(*words: str) -> Any:
    """What the lab's program answers to its last step. Only to start something it has to be a program."""
    if words[0] == "start":
        text = subprocess.run(["pinner", *words], check=True, capture_output=True, timeout=PATIENCE, text=True).stdout
    else:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run_pinner(list(words))
        text = printed.getvalue()
    return json.loads(text or "[null]")[-1]


def execute(*words: str) -> None:
    """Runs a command, which must succeed."""
    subprocess.run(words, check=True, timeout=PATIENCE)


@contextlib.contextmanager
def vdpa_device(use_va: bool, pieces: int = 65536) -> Iterator[str]:
    """The node of a simulated vDPA device, which has memory pinned, or with `use_va` uses virtual addresses.

    `pieces`: how many contiguous ones of memory vhost_vdpa takes. It is 2048 by default, of the device, too, and memory
    of more pieces is refused like memory beyond the limit.
    """
    name = "kernel-test"
    execute("modprobe", "vdpa_sim", f"use_va={int(use_va)}", "max_iotlb_entries=65536")
    execute("modprobe", "vhost_vdpa", f"max_iotlb_entries={pieces}")
    execute("modprobe", "vdpa_sim_net")
    try:
        execute("vdpa", "dev", "add", "name", name, "mgmtdev", "vdpasim_net")
        execute("udevadm", "settle")
        [device] = Path("/sys/bus/vdpa/devices", name).glob("vhost-vdpa-*")
        node = Path("/dev", device.name)
        node.chmod(0o666)
        yield str(node)
        execute("vdpa", "dev", "del", name)
    finally:
        execute("modprobe", "--remove", "vdpa_sim_net", "vdpa_sim", "vhost_vdpa")
