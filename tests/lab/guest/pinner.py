# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A stand-in for a VMM: a process that opens an iommufd, attaches a VFIO device and pins memory, one step at a time.

    pinner start NAME [--user USER] [--limit SIZE] [--apart] [STEP [+ STEP]...]
    pinner ask NAME STEP [+ STEP]...
    pinner stop NAME...

STEP is a command of the class Pinner and its arguments, such as `open + attach /dev/vfio/devices/vfio0 + map 24`. The
process is a systemd unit of its own; with --apart it runs in other pid and mount namespaces than the rest. Printed is a
JSON list with an answer to each step.

Every answer holds `pid` as the asker sees it, and `errno`, the name of what the kernel refused the step with or null.
The numbers below come from linux/iommufd.h and linux/vfio.h. They are written down here a second time on purpose, so
that what the collection's own modules say can be held against a process that shares no line with them.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, NoReturn

IOMMU_IOAS_ALLOC = 0x3B81
IOMMU_IOAS_MAP = 0x3B85
IOMMU_DESTROY = 0x3B80
IOMMU_OPTION = 0x3B87
IOMMU_IOAS_MAP_FIXED_READABLE_WRITEABLE = 1 | 2 | 4
VFIO_DEVICE_BIND_IOMMUFD = 0x3B76
VFIO_DEVICE_ATTACH_IOMMUFD_PT = 0x3B77

SOCKETS = Path("/run/pinner")
UNIT = "pinner-{}.service"
OPTIONS = {"rlimit_mode": 0, "huge_pages": 1}
SET, GET = 0, 1


class Pinner:
    """What the process holds. Each public method is a command; its arguments are the words that followed it."""

    def __init__(self) -> None:
        self._iommufd = -1
        self._devices: list[int] = []
        self._memory: list[mmap.mmap] = []
        self._iova = 0
        self._ioas_id = 0

    def look(self) -> dict[str, Any]:
        """The process's own view: its /proc/self/status, and what its descriptors are open on."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        links = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                links[name] = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:  # the one that listdir itself was reading from
                continue
        return {
            "vm_lck_kb": int(status["VmLck"].split()[0]),
            "vm_pin_kb": int(status["VmPin"].split()[0]),
            "uid": int(status["Uid"].split()[0]),
            "cap_eff": status["CapEff"].strip(),
            "fds": links,
        }

    def open(self, path: str = "/dev/iommu", flags: str = "rw") -> dict[str, Any]:
        """Opens a file: a character device becomes the iommufd to work with, anything is merely held with `path`."""
        fd = os.open(path, {"rw": os.O_RDWR, "r": os.O_RDONLY, "path": os.O_PATH}[flags] | os.O_CLOEXEC)
        if flags == "rw":
            self._iommufd = fd
        return {"fd": fd}

    def hold_socket(self) -> dict[str, Any]:
        """Opens a socket and holds it."""
        return {"fd": socket.socket(socket.AF_UNIX).detach()}

    def close(self, fd: str) -> dict[str, Any]:
        os.close(int(fd))
        return {}

    def get(self, option: str = "rlimit_mode", object_id: str = "0") -> dict[str, Any]:
        """What the kernel answers *inside* this process."""
        return {"value": self._option(option, GET, 0, int(object_id))}

    def set(self, option: str, value: str, object_id: str = "0") -> dict[str, Any]:
        self._option(option, SET, int(value), int(object_id))
        return {}

    def _option(self, option: str, operation: int, value: int, object_id: int) -> int:
        argument = bytearray(struct.pack("=IIHHIQ", 24, OPTIONS[option], operation, 0, object_id, value))
        fcntl.ioctl(self._iommufd, IOMMU_OPTION, argument)
        answer: int = struct.unpack("=IIHHIQ", argument)[5]
        return answer

    def alloc(self) -> dict[str, Any]:
        """Makes an IOAS, which is an object."""
        argument = bytearray(struct.pack("=III", 12, 0, 0))
        fcntl.ioctl(self._iommufd, IOMMU_IOAS_ALLOC, argument)
        self._ioas_id = struct.unpack("=III", argument)[2]
        return {"ioas_id": self._ioas_id}

    def destroy(self, object_id: str) -> dict[str, Any]:
        fcntl.ioctl(self._iommufd, IOMMU_DESTROY, struct.pack("=II", 8, int(object_id)))
        return {}

    def attach(self, cdev: str) -> dict[str, Any]:
        """Opens a VFIO device, binds it to the iommufd and attaches it to a new IOAS, as QEMU does."""
        device = os.open(cdev, os.O_RDWR | os.O_CLOEXEC)
        self._devices.append(device)
        fcntl.ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, bytearray(struct.pack("=IIiI", 16, 0, self._iommufd, 0)))
        self.alloc()
        fcntl.ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, bytearray(struct.pack("=III", 12, 0, self._ioas_id)))
        return {"ioas_id": self._ioas_id}

    def map(self, mib: str) -> dict[str, Any]:
        """Maps that many MiB in the newest IOAS, which pins them if a device is attached to it."""
        size = int(mib) * 2**20
        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        argument = struct.pack(
            "=IIIIQQQ",
            40,
            IOMMU_IOAS_MAP_FIXED_READABLE_WRITEABLE,
            self._ioas_id,
            0,
            address,
            size,
            self._iova,
        )
        fcntl.ioctl(self._iommufd, IOMMU_IOAS_MAP, bytearray(argument))
        self._memory.append(memory)
        self._iova += size
        return {}


def answer(pinner: Pinner, words: list[str]) -> dict[str, Any]:
    """Does one step; what the kernel refuses is part of the answer, what the asker got wrong ends the process."""
    command: Callable[..., dict[str, Any]] = getattr(pinner, words[0])
    try:
        return {"errno": None, **command(*words[1:])}
    except OSError as exc:
        return {"errno": errno.errorcode[exc.errno or 0]}


def serve(name: str) -> NoReturn:
    pinner = Pinner()
    (SOCKETS / name).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(SOCKETS / name))
        listener.listen()
        while True:
            connection, _address = listener.accept()
            with connection:
                while request := connection.recv(65536):
                    connection.send(json.dumps(answer(pinner, json.loads(request))).encode())


def start(name: str, user: str, limit: str, apart: bool) -> None:
    """Starts the process as a transient unit, in the way that a host starts its VMMs."""
    SOCKETS.mkdir(mode=0o1777, exist_ok=True)
    SOCKETS.chmod(0o1777)
    (SOCKETS / name).unlink(missing_ok=True)
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
    namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"] if apart else []
    unit = ["systemd-run", "--quiet", "--collect", f"--unit={UNIT.format(name)}", f"--property=LimitMEMLOCK={limit}"]
    # SIGTERM ends neither the first process of a pid namespace nor unshare, which systemd would wait 90 s for.
    unit += ["--property=KillSignal=SIGKILL"] if apart else []
    subprocess.run([*unit, "--", *namespaces, *become, __file__, "serve", name], check=True)


def connect(name: str) -> socket.socket:
    """Waits for a process that has only just been started."""
    deadline = time.monotonic() + 60
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(SOCKETS / name))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return connection


def ask(name: str, steps: list[list[str]]) -> None:
    with connect(name) as connection:
        # The kernel says who listens, in the numbers of the asker's pid namespace.
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", credentials)[0]
        answers = []
        for words in steps:
            connection.send(json.dumps(words).encode())
            reply = connection.recv(2**20)
            if not reply:
                sys.exit(f"{name}: the process ended without an answer to {words}")
            answers.append({"pid": pid, **json.loads(reply)})
    print(json.dumps(answers))


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("start", "ask", "stop", "serve"):
        subparser = commands.add_parser(command)
        subparser.add_argument("name", nargs="+" if command == "stop" else None)
        if command == "start":
            subparser.add_argument("--user", default="vm")
            subparser.add_argument("--limit", default="40M")
            subparser.add_argument("--apart", action="store_true")
        if command in ("start", "ask"):
            subparser.add_argument("steps", nargs="*")
    arguments = parser.parse_args(words)
    if arguments.command == "serve":
        serve(arguments.name)
    if arguments.command == "stop":
        subprocess.run(["systemctl", "stop", *map(UNIT.format, arguments.name)], check=False)
        return
    if arguments.command == "start":
        start(arguments.name, arguments.user, arguments.limit, arguments.apart)
    steps = " ".join(arguments.steps)
    ask(arguments.name, [step.split(" ") for step in steps.split(" + ")] if steps else [["look"]])


if __name__ == "__main__":
    main(sys.argv[1:])
