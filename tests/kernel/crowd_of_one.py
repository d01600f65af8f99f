# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One user who has as many processes with as many descriptors of one iommufd as a host lets him.

    python3 -I -S crowd_of_one.py DESCRIPTORS SHARED COPIES -name GUEST

opens an iommufd and makes that many descriptors of it, and then so many processes that share this one table, and so
many with a copy of their own. It prints their number once they are there, and waits for ever. It is to run in a unit,
with which all of them end. A process takes no memory to speak of: all share the first one's.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import struct
import sys

USER = 1001
_IOMMU_IOAS_ALLOC = 0x3B81
_CLONE_VM, _CLONE_FILES, _SIGCHLD = 0x100, 0x400, 17


# x86-64, `long spawn(long flags, long count)`: makes processes that wait for ever, by clone(2). They run on their
# parent's stack, which works since they touch none: all they do is to call pause(2).
_SPAWN = bytes.fromhex(
    "4989f8"  # mov r8, rdi: the flags
    "4989f1"  # mov r9, rsi: how many
    "4d85c9"  # next: test r9, r9
    "7426"  # jz done
    "4c89c7"  # mov rdi, r8
    "31f6"  # xor esi, esi: no stack of its own
    "31d2"  # xor edx, edx
    "4d31d2"  # xor r10, r10
    "b838000000"  # mov eax, 56: clone
    "0f05"  # syscall, which leaves r8 and r9 as they are
    "4885c0"  # test rax, rax
    "7407"  # jz child
    "7810"  # js failed
    "49ffc9"  # dec r9
    "ebde"  # jmp next
    "b822000000"  # child: mov eax, 34: pause
    "0f05"  # syscall
    "ebf7"  # jmp child
    "31c0"  # done: xor eax, eax
    "c3"  # failed: ret
)


def main() -> None:
    descriptors, shared, copies = map(int, sys.argv[1:4])
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors + 64, descriptors + 64))
    iommufd = os.open("/dev/iommu", os.O_RDWR)
    fcntl.ioctl(iommufd, _IOMMU_IOAS_ALLOC, bytearray(struct.pack("=III", 12, 0, 0)))
    for _each in range(descriptors):
        os.dup(iommufd)
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(_SPAWN)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    spawn = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long)(start)
    for flags, count in ((_CLONE_FILES, shared), (0, copies)):
        error = spawn(_CLONE_VM | flags | _SIGCHLD, count)
        if error:
            sys.exit(f"clone: {os.strerror(-error)}")
    print(shared + copies, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
