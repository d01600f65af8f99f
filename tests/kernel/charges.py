# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process that pins memory in all ways that the kernel has, one after the other, each with the limit it is told.

Its user is one that nobody had before: the kernel's counter of a user shows nowhere, and what io_uring has pinned is
given back only some time after its process has ended. The numbers below come from the kernel's headers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import json
import mmap
import os
import platform
import resource
import select
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from ansible_collections.virt.iommufd.tests.kernel.harness import PATIENCE, change_user, make_effective
from ansible_collections.virt.iommufd.tests.lab.guest.pinner import (
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FIXED_READABLE_WRITEABLE,
    IOMMU_OPTION,
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_BIND_IOMMUFD,
)

# linux/iommufd.h, linux/vfio.h
IOMMU_IOAS_MAP_FILE = 0x3B8F
IOMMU_IOAS_CHANGE_PROCESS = 0x3B92
VFIO_SET_IOMMU = 0x3B66
VFIO_TYPE1V2_IOMMU = 3
VFIO_GROUP_SET_CONTAINER = 0x3B68
VFIO_GROUP_GET_DEVICE_FD = 0x3B6A
VFIO_IOMMU_MAP_DMA = 0x3B71
VFIO_DMA_MAP_READ_WRITE = 3
VFIO_DEVICE_FEATURE = 0x3B75
VFIO_DEVICE_FEATURE_GET_DMA_BUF = 1 << 16 | 11
# linux/vhost.h, linux/vhost_types.h
VHOST_SET_OWNER = 0xAF01
VHOST_IOTLB_MSG_V2 = 2
VHOST_IOTLB_UPDATE = 2
VHOST_ACCESS_RW = 3
# linux/io_uring.h, and the numbers of its system calls, which are the same everywhere
SYS_IO_URING_SETUP = 425
SYS_IO_URING_REGISTER = 427
IORING_REGISTER_BUFFERS = 0
# linux/perf_event.h
SYS_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
PERF_TYPE_SOFTWARE = 1
PERF_COUNT_SW_DUMMY = 9
PERF_ATTR_SIZE = 128
# linux/if_xdp.h
AF_XDP = 44
SOL_XDP = 283
XDP_UMEM_REG = 4
# asm-generic/socket.h, linux/socket.h
SO_SNDBUFFORCE = 32
SO_ZEROCOPY = 60
MSG_ZEROCOPY = 0x4000000
# Its number is the same everywhere.
SYS_MEMFD_SECRET = 447
# asm-generic/mman-common.h, linux/mman.h; Python has no name for them before 3.13, or none at all.
MAP_FIXED = 0x10
MAP_LOCKED = 0x2000
# rdma/ib_user_verbs.h
IB_USER_VERBS_CMD_GET_CONTEXT = 0
IB_USER_VERBS_CMD_ALLOC_PD = 3
IB_USER_VERBS_CMD_REG_MR = 9
IB_ACCESS_LOCAL_WRITE = 1

CONTAINER = "/dev/vfio/vfio"
INFINITY = 2**64 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_ssize_t
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_users = itertools.count(100000)


class Memory(NamedTuple):
    """Memory that processes may share, as that of a VM often is."""

    file: int
    view: mmap.mmap

    @property
    def size(self) -> int:
        return len(self.view)

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.view))


def _memory(size: int) -> Memory:
    file = os.memfd_create("charges")
    os.ftruncate(file, size)
    return Memory(file, mmap.mmap(file, size))


# What must outlive the call that made it
_kept: list[mmap.mmap] = []
_open: list[socket.socket] = []
# What is needed once for each try, since only root may open it
_MANY = 6

# Pins memory, or raises OSError.
Pinner = Callable[[Memory], None]


class Step(NamedTuple):
    """To pin so many bytes in one way, with a limit, and with or without CAP_IPC_LOCK. `again`: those of the last."""

    way: str
    size: int
    limit: int
    capable: bool = False
    again: bool = False


class Seen(NamedTuple):
    """What came of it: the name of an error, and what the process then has locked and pinned."""

    error: str | None
    locked: int
    pinned: int


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Places:
    """Where in an address space the next mapping goes. All begin above what the IOMMU keeps for itself."""

    def __init__(self) -> None:
        self._next = 2**32

    def take(self, size: int) -> int:
        self._next += size
        return self._next - size


def open_iommufd(mode: str) -> int:
    """A new iommufd, with its mode."""
    iommufd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
    if mode == "process":
        fcntl.ioctl(iommufd, IOMMU_OPTION, bytearray(struct.pack("=IIHHIQ", 24, 0, 0, 0, 0, 1)))
    return iommufd


def attach(iommufd: int, *nodes: str) -> tuple[int, list[int]]:
    """Puts VFIO devices into one new IOAS: its id, and the devices."""
    devices = [os.open(node, os.O_RDWR | os.O_CLOEXEC) for node in nodes]
    for device in devices:
        fcntl.ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, bytearray(struct.pack("=IIiI", 16, 0, iommufd, 0)))
    argument = bytearray(struct.pack("=III", 12, 0, 0))
    fcntl.ioctl(iommufd, IOMMU_IOAS_ALLOC, argument)
    ioas: int = struct.unpack("=III", argument)[2]
    for device in devices:
        fcntl.ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, bytearray(struct.pack("=III", 12, 0, ioas)))
    return ioas, devices


def by_iommufd(iommufd: int, *nodes: str) -> Pinner:
    """Through an IOAS of its own, with these devices."""
    ioas, _devices = attach(iommufd, *nodes)
    places = Places()

    def pin(memory: Memory) -> None:
        what = (memory.address, memory.size, places.take(memory.size))
        argument = struct.pack("=IIIIQQQ", 40, IOMMU_IOAS_MAP_FIXED_READABLE_WRITEABLE, ioas, 0, *what)
        fcntl.ioctl(iommufd, IOMMU_IOAS_MAP, bytearray(argument))

    return pin


def by_dma_buf(iommufd: int, node: str) -> Pinner:
    """The device's own memory instead of the process's: so much of its first region."""
    ioas, [device] = attach(iommufd, node)
    places = Places()

    def pin(memory: Memory) -> None:
        which = (0, os.O_RDWR, 0, 1, 0, memory.size)
        feature = struct.pack("=IIIIIIQQ", 40, VFIO_DEVICE_FEATURE_GET_DMA_BUF, *which)
        _map_file(iommufd, ioas, fcntl.ioctl(device, VFIO_DEVICE_FEATURE, bytearray(feature)), memory.size, places)

    return pin


def by_file(iommufd: int, node: str) -> Pinner:
    """Through an IOAS that is told of the file instead of the address."""
    ioas, _devices = attach(iommufd, node)
    places = Places()
    return lambda memory: _map_file(iommufd, ioas, memory.file, memory.size, places)


def _map_file(iommufd: int, ioas: int, file: int, size: int, places: Places) -> None:
    flags = IOMMU_IOAS_MAP_FIXED_READABLE_WRITEABLE
    argument = struct.pack("=IIIiQQQ", 40, flags, ioas, file, 0, size, places.take(size))
    fcntl.ioctl(iommufd, IOMMU_IOAS_MAP_FILE, bytearray(argument))


def change_process(iommufd: int) -> None:
    """Has this process charged for what an iommufd was told of as files, instead of the one that is."""
    fcntl.ioctl(iommufd, IOMMU_IOAS_CHANGE_PROCESS, bytearray(struct.pack("=II", 8, 0)))


def to_a_child(iommufd: int) -> Pinner:
    """Has a child take over what an iommufd was told of as files, as a new program does in a live update."""

    def move(_memory: Memory) -> None:
        child = os.fork()
        if not child:
            try:
                change_process(iommufd)
            except OSError as exc:
                os._exit(exc.errno or 255)
            os._exit(0)
        number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if number:
            raise OSError(number, os.strerror(number))

    return move


def open_container(*nodes: str) -> tuple[int, list[int]]:
    """A container of /dev/vfio/vfio, whoever provides that, with the groups of these devices, and the devices."""
    container = os.open(CONTAINER, os.O_RDWR | os.O_CLOEXEC)
    groups, devices = [], []
    for node in nodes:
        device = Path("/sys/class/vfio-dev", Path(node).name, "device").resolve()
        group = os.open(f"/dev/vfio/{(device / 'iommu_group').resolve().name}", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(group, VFIO_GROUP_SET_CONTAINER, struct.pack("=i", container))
        groups.append((group, device.name))
    fcntl.ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1V2_IOMMU)
    for group, name in groups:
        devices.append(fcntl.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0")))
    return container, devices


def _map_dma(container: int, address: int, size: int, places: Places) -> None:
    argument = struct.pack("=IIQQQ", 32, VFIO_DMA_MAP_READ_WRITE, address, places.take(size), size)
    fcntl.ioctl(container, VFIO_IOMMU_MAP_DMA, argument)


def by_container(*nodes: str) -> Pinner:
    container, _devices = open_container(*nodes)
    places = Places()
    return lambda memory: _map_dma(container, memory.address, memory.size, places)


def region_by_container(node: str) -> Pinner:
    """The device's own memory instead of the process's."""
    container, [device] = open_container(node)
    places = Places()

    def pin(memory: Memory) -> None:
        region = Memory(device, mmap.mmap(device, memory.size))
        _kept.append(region.view)
        _map_dma(container, region.address, region.size, places)

    return pin


def by_mlock(memory: Memory) -> None:
    _checked(_libc.mlock(ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.size)))


def by_mmap_locked(memory: Memory) -> None:
    """Locked as it is mapped."""
    _kept.append(mmap.mmap(memory.file, memory.size, flags=mmap.MAP_SHARED | MAP_LOCKED))


def by_secret(memory: Memory) -> None:
    """As memory that not even the kernel has mapped."""
    file = _checked(_libc.syscall(SYS_MEMFD_SECRET, 0))
    os.ftruncate(file, memory.size)
    _kept.append(mmap.mmap(file, memory.size))


def in_pieces(pin: Pinner) -> Pinner:
    """No two pages of the memory lie together: it is one page again and again."""

    def pin_pieces(memory: Memory) -> None:
        for address in range(memory.address, memory.address + memory.size, mmap.PAGESIZE):
            what = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED, memory.file, 0)
            assert _checked(_libc.mmap(address, mmap.PAGESIZE, *what)) == address
        pin(memory)

    return pin_pieces


def by_zerocopy() -> Pinner:
    """As what a socket sends without copying it, to one that takes next to nothing, so that it stays."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    sender = socket.create_connection(listener.getsockname())
    sender.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2**24)
    _open.extend([listener, sender])

    def pin(memory: Memory) -> None:
        assert sender.sendmsg([memory.view], [], MSG_ZEROCOPY) == memory.size

    return pin


def by_io_uring(memory: Memory) -> None:
    """As a buffer of a ring of its own."""
    ring = _checked(_libc.syscall(SYS_IO_URING_SETUP, 1, bytes(120)))
    vector = struct.pack("=QQ", memory.address, memory.size)
    _checked(_libc.syscall(SYS_IO_URING_REGISTER, ring, IORING_REGISTER_BUFFERS, vector, 1))


def by_vdpa(node: str) -> Pinner:
    """For a vDPA device that this process owns."""
    device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(device, VHOST_SET_OWNER)
    places = Places()

    def pin(memory: Memory) -> None:
        what = (places.take(memory.size), memory.size, memory.address, VHOST_ACCESS_RW, VHOST_IOTLB_UPDATE)
        os.write(device, struct.pack("=II3QBB38x", VHOST_IOTLB_MSG_V2, 0, *what))

    return pin


def by_perf() -> Pinner:
    """As the buffer of an event, which takes as many pages. All of it counts while kernel.perf_event_mlock_kb is 0."""
    attributes = struct.pack("=IIQ", PERF_TYPE_SOFTWARE, PERF_ATTR_SIZE, PERF_COUNT_SW_DUMMY)
    number = SYS_PERF_EVENT_OPEN[platform.machine()]
    nothing = ctypes.c_ulong(0)
    events = [
        _checked(_libc.syscall(number, attributes.ljust(PERF_ATTR_SIZE, b"\0"), 0, -1, -1, nothing))
        for _each in range(_MANY)
    ]
    return lambda memory: _kept.append(mmap.mmap(events.pop(), memory.size))


def by_af_xdp() -> Pinner:
    """As the memory of a socket for packets."""
    # What a socket has is given back when it is closed, so none of them may be lost.
    sockets = [socket.socket(AF_XDP, socket.SOCK_RAW).detach() for _each in range(_MANY)]

    def pin(memory: Memory) -> None:
        area = struct.pack("=QQIIII", memory.address, memory.size, 4096, 0, 0, 0)
        _checked(_libc.setsockopt(sockets.pop(), SOL_XDP, XDP_UMEM_REG, area, len(area)))

    return pin


def by_rdma(node: str) -> Pinner:
    """As a memory region. A context belongs to the credentials that it was opened with, so each has its own."""

    def pin(memory: Memory) -> None:
        device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        _verb(device, IB_USER_VERBS_CMD_GET_CONTEXT, "=II", b"")
        [domain] = _verb(device, IB_USER_VERBS_CMD_ALLOC_PD, "=I", b"")
        address = memory.address
        region = struct.pack("=QQQII", address, memory.size, address, domain, IB_ACCESS_LOCAL_WRITE)
        _verb(device, IB_USER_VERBS_CMD_REG_MR, "=III", region)

    return pin


def _verb(device: int, command: int, layout: str, arguments: bytes) -> tuple[int, ...]:
    answer = ctypes.create_string_buffer(struct.calcsize(layout))
    request = struct.pack("=Q", ctypes.addressof(answer)) + arguments
    header = struct.pack("=IHH", command, (8 + len(request)) // 4, len(answer) // 4)
    os.write(device, header + request)
    numbers: tuple[int, ...] = struct.unpack(layout, answer.raw)
    return numbers


def _look() -> tuple[int, int]:
    """What this process has locked and pinned."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    locked, pinned = (int(status[name].split()[0]) * 1024 for name in ("VmLck", "VmPin"))
    return locked, pinned


def _take(pinners: dict[str, Pinner], steps: list[Step], user: int) -> list[Seen]:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    change_user(user, "ipc_lock")
    seen = []
    for step in steps:
        if not step.again:
            memory = _memory(step.size)
            _kept.append(memory.view)
        limit = resource.RLIM_INFINITY if step.limit == INFINITY else step.limit
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, resource.RLIM_INFINITY))
        make_effective(*["ipc_lock"] * step.capable)
        try:
            pinners[step.way](memory)
        except OSError as exc:
            error: str | None = errno.errorcode[exc.errno or 0]
        else:
            error = None
        seen.append(Seen(error, *_look()))
    return seen


def _child(prepare: Callable[[], dict[str, Pinner]], steps: list[Step], user: int, writing: int) -> NoReturn:
    try:
        signal.alarm(PATIENCE)
        told = json.dumps(_take(prepare(), steps, user))
    except BaseException:
        told = json.dumps(traceback.format_exc())
    with open(writing, "w", encoding="utf-8") as stream:
        stream.write(told)
    os._exit(0)


def pins(prepare: Callable[[], dict[str, Pinner]], steps: list[Step]) -> list[Seen]:
    """What becomes of these steps in a new process of a new user, for whom root has opened what `prepare` does."""
    reading, writing = os.pipe()
    user = next(_users)
    child = os.fork()
    if not child:
        os.close(reading)
        _child(prepare, steps, user, writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as stream:
        ready, _writing, _wrong = select.select([stream], [], [], PATIENCE)
        told = stream.read() if ready else ""
    _pid, status = os.waitpid(child, 0)
    assert told, f"the process ended without a word: {status}"
    answered = json.loads(told)
    assert isinstance(answered, list), answered
    return [Seen(*each) for each in answered]
