# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many processes that hold what a VMM holds: `python3 -I -S crowd.py COUNT VMMS [ARGUMENT...]`, until its input ends.

Printed, once all are there, are the ids of the first VMMS, which hold an iommufd; the rest are the host's other
processes. It needs root. A VMM has opened /dev/iommu by itself and made an IOAS in it, as it has from its first device
on: without one the iommufd could still be set, and nobody would have to look for IOASes. Each process has 50
descriptors and no more:

- 1 iommufd, and what is no VMM another eventfd in its place;
- 2 of /dev/null, for the standard error and for /dev/kvm, a character device that none of this is about;
- 3 regular files, for the firmware, its variables and a disk image, and 1 memfd for the guest's memory;
- the 2 ends of a pipe;
- 5 sockets, for the monitor, a console and the network;
- 36 eventfds, of which a VMM has one or two for each queue of each device.

Each maps 50 files in 5 pieces each, as many as the guest's own QEMU, whose libraries they are. The collection does not
look at those, but lsof does, and a comparison with processes that map nothing would flatter it.

Each belongs to a user that is not root, is called as QEMU is, and has its command line if that is given as arguments:
nobody but /proc reads them. All are forks of a small Python and share most of its memory, since 2,000 have to fit into
2 GiB: a process takes 0.6 MiB, half of it the kernel's. So what a fork does is kept short, for the sake of what it
would have to copy.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import itertools
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path

DESCRIPTORS = 50
USER = 1001  # a plain user of the guest
COMM = b"qemu-system-x86"
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
FILES = 50
IOMMU_IOAS_ALLOC = 0x3B81
# struct iommu_ioas_alloc: its size, no flags, and room for the id.
ALLOC = struct.pack("=III", 12, 0, 0)


def map_files() -> None:
    """Maps the libraries as the dynamic linker would, unread: headers, code, constants, and two kinds of data."""
    mmap = ctypes.CDLL(None, use_errno=True).mmap
    mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    mmap.restype = ctypes.c_void_p
    read, write, execute, private, size = 1, 2, 4, 2, 8192
    libraries = [path for path in sorted(LIBRARIES.glob("*.so.*")) if not path.is_symlink()]
    for path in itertools.islice(libraries, FILES):
        fd = os.open(path, os.O_RDONLY)
        for protection in (read, read | execute, read, read, read | write):
            if mmap(None, size, protection, private, fd, 0) in (None, 2**64 - 1):
                raise OSError(ctypes.get_errno(), f"mmap of {path}")
        os.close(fd)


def become(ready: int, vmm: bool) -> None:
    """Opens what a VMM holds, in place of what was open here, and waits for ever."""
    os.closerange(0, DESCRIPTORS)
    os.pipe()
    os.open("/dev/null", os.O_RDWR)
    os.open("/dev/null", os.O_RDWR)
    if vmm:
        fcntl.ioctl(os.open("/dev/iommu", os.O_RDWR), IOMMU_IOAS_ALLOC, ALLOC)
    os.open("/etc/passwd", os.O_RDONLY)
    os.open("/etc/group", os.O_RDONLY)
    os.open("/etc/hosts", os.O_RDONLY)
    os.memfd_create("ram")
    for _each in range(5):
        socket.socket(socket.AF_UNIX).detach()
    # Always the lowest number that is free.
    while os.eventfd(0) < DESCRIPTORS - 1:
        pass
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    os.close(ready)
    while True:
        signal.pause()


def main() -> None:
    count, vmms = map(int, sys.argv[1:3])
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NPROC, (max(soft, count + 1000), max(hard, count + 1000)))
    map_files()
    Path("/proc/self/comm").write_bytes(COMM)
    gc.disable()
    gc.freeze()
    # The last process that is ready closes it; one that fails says why.
    reader, writer = os.pipe()
    ready = fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, DESCRIPTORS)
    os.close(writer)
    pids: list[int] = []
    try:
        for number in range(count):
            pid = os.fork()
            if not pid:
                try:
                    become(ready, number < vmms)
                except OSError as exc:
                    os.write(ready, f"{exc}\n".encode())
                finally:
                    os._exit(1)
            pids.append(pid)
        os.close(ready)
        error = os.read(reader, 4096)
        if error:
            sys.exit(f"A process could not become what it should: {error.decode()}")
        print(*pids[:vmms], flush=True)
        sys.stdin.buffer.read()
    finally:
        for pid in pids:
            # Until it is waited for, its id means nobody else.
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
