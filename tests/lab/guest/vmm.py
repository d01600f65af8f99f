# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real VMs with passed-through devices: QEMU, paused, each a systemd unit with its own limit and accounting.

    vmm only < VMS    ends every VM, then starts these and leaves them running
    vmm more < VMS    starts these beside those that run, and leaves them running
    vmm try < VMS     starts and ends one after the other, beside those that run
    vmm plug NAME WHAT [LIMIT]    gives one that runs WHAT by its monitor, and before that a limit, as prlimit takes it
    vmm units VERB UNIT...    has systemctl start, restart or show what the host's own units run, one after the other
    vmm contain UNIT...    has systemctl start the host's own units whose VMM is in a container, one after the other

WHAT is how many MiB of memory, or a device of VFIO, which it gets by an iommufd of its own. VMS is a JSON list of
objects with the fields of the class Vm. Printed is a JSON list of what became of each, in the words of QEMU and of
/proc. The numbers of the ioctl come from linux/iommufd.h: no line is shared with the collection.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

IOMMU_OPTION = 0x3B87
RLIMIT_MODE, SET, PER_PROCESS = 0, 0, 1
CAP_IPC_LOCK = 14

FOLDER = Path("/run/vmm")
UNIT = "vmm-{}.service"


@dataclass(frozen=True)
class Vm:
    """A VM. `limit` is its RLIMIT_MEMLOCK in bytes, `accounting` as the collection calls it, `devices` of VFIO.

    `accounting` may be `mixed`: the first iommufd per user, and the second per process. `apart`: whether each of
    `devices` is in an iommufd of its own. `legacy`: devices that it has by the legacy container. `mlock`: whether QEMU
    locks its memory. `no_new_privs`: whether its unit keeps it from what its file would give. `display`: whether it has
    one, and runs, as is needed for its guest to turn that on. `grows`: whether `vmm plug` may give it something, and
    `plugged`: how many MiB it gets so at once. `kept`: whether what starts it keeps a copy of its iommufd, with a limit
    of 8 MiB. `bounded`: whether its unit takes CAP_IPC_LOCK away from all that it runs. `hard`: its hard limit, if that
    is another one. `waits`: whether it has an iommufd already where it has no device. `memory_bytes`: the size of a
    backend that its memory has in the place of `memory_mib`.
    """

    name: str
    limit: int
    accounting: str
    devices: tuple[str, ...]
    user: str = "vm"
    memory_mib: int = 64
    viommu: bool = False
    # Without it, CAP_IPC_LOCK has to come from the emulator's file.
    ambient: bool = True
    apart: bool = False
    legacy: tuple[str, ...] = ()
    mlock: bool = False
    no_new_privs: bool = False
    display: bool = False
    grows: bool = False
    kept: bool = False
    plugged: int = 0
    bounded: bool = False
    hard: int = 0
    waits: bool = False
    memory_bytes: int = 0

    @property
    def pidfile(self) -> Path:
        return FOLDER / f"{self.name}.pid"

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    @property
    def said(self) -> Path:
        """What it says once it is in the background, where its errors go nowhere otherwise."""
        return FOLDER / f"{self.name}.said"

    @property
    def monitor(self) -> Path:
        return FOLDER / f"{self.name}.qmp"

    def iommufds(self) -> list[tuple[str, list[str]]]:
        """The properties of each iommufd, and its devices. Who sets the mode has opened it; otherwise QEMU does."""
        groups = [[each] for each in self.devices] if self.apart else [list(self.devices)]
        groups = groups if self.devices or self.waits else []
        given = {"process": len(groups), "mixed": 1}.get(self.accounting, 1 if self.kept else 0)
        # The last ones are given.
        first = len(groups) - given
        fds = ["" if index < first else f",fd={3 + index - first}" for index in range(len(groups))]
        return [(f"iommufd,id=iommufd{index}{fds[index]}", devices) for index, devices in enumerate(groups)]

    def emulator(self) -> list[str]:
        """QEMU's command line. Its parent ends once all devices are there, or with the reason why they are not."""
        # The host's own emulated IOMMU has 39 bits, and the VM's may have no more.
        iommu = ["-device", "intel-iommu,caching-mode=on,aw-bits=39"] if self.viommu else []
        more: list[str] = []
        for index, (iommufd, devices) in enumerate(self.iommufds()):
            more += ["-object", iommufd]
            for each in devices:
                more += ["-device", f"vfio-pci,host={address(each)},iommufd=iommufd{index}"]
        for each in self.legacy:
            more += ["-device", f"vfio-pci,host={address(each)}"]
        if self.grows:
            more += ["-device", "pcie-root-port,id=free"]
            more += ["-qmp", f"unix:{self.monitor},server=on,wait=off"]
        if self.grows or self.display:
            more += ["-d", "unimp", "-D", str(self.said)]
        if self.mlock:
            more += ["-overcommit", "mem-lock=on"]
        memory = ["-m", f"{self.memory_mib},slots=1,maxmem=1G" if self.grows else str(self.memory_mib)]
        if self.memory_bytes:
            backend = f"memory-backend-ram,id=ram,size={self.memory_bytes}"
            memory = ["-object", backend, "-machine", "memory-backend=ram"]
        return [
            # What it keeps translated code in is locked, too.
            *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,tb-size=16" if self.mlock else "tcg"),
            *memory,
            *("-name", f"guest={self.name}", "-display", "none", "-nodefaults"),
            *(("-vga", "std") if self.display else ("-S",)),
            *("-daemonize", "-pidfile", str(self.pidfile)),
            *iommu,
            *more,
        ]

    def unit(self) -> list[str]:
        """The command that starts it, and ends once that has worked or failed."""
        limit = f"{self.limit}:{self.hard or self.limit}"
        settings = {"PIDFile": self.pidfile, "StandardError": f"truncate:{self.log}", "LimitMEMLOCK": limit}
        words = self.emulator()
        given = sum(",fd=" in iommufd for iommufd, _devices in self.iommufds())
        if self.accounting in ("process", "mixed"):
            # Only root may set the mode.
            words = [__file__, "become", self.user, str(given), *words]
        else:
            words = [__file__, "keep", *words] if self.kept else words
            settings["User"] = self.user
        if self.accounting == "none" and self.ambient:
            settings["AmbientCapabilities"] = "CAP_IPC_LOCK"
        if self.no_new_privs:
            settings["NoNewPrivileges"] = "yes"
        if self.bounded:
            settings["CapabilityBoundingSet"] = "~CAP_IPC_LOCK"
        return [
            *("systemd-run", "--quiet", "--collect", "--service-type=forking", f"--unit={UNIT.format(self.name)}"),
            *(f"--property={name}={value}" for name, value in settings.items()),
            "--",
            *words,
        ]


def address(device: str) -> str:
    """Where a device of VFIO, such as vfio0, is on its bus."""
    return Path(f"/sys/class/vfio-dev/{device}/device").resolve().name


def become(user: str, count: int, words: list[str]) -> NoReturn:
    """Opens iommufds as descriptors from 3 on, sets their mode, gives up root and turns into the VMM."""
    opened = [os.open("/dev/iommu", os.O_RDWR) for _each in range(count)]
    for fd, each in enumerate(opened, 3):
        os.dup2(each, fd)
        os.set_inheritable(fd, True)
        fcntl.ioctl(fd, IOMMU_OPTION, bytearray(struct.pack("=IIHHIQ", 24, RLIMIT_MODE, SET, 0, 0, PER_PROCESS)))
    os.execvp("setpriv", ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *words])


def keep(words: list[str]) -> NoReturn:
    """Opens an iommufd as descriptor 3 and turns into the VMM, while a child keeps the descriptor and does nothing."""
    os.dup2(os.open("/dev/iommu", os.O_RDWR), 3)
    os.set_inheritable(3, True)
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 * 2**20, 8 * 2**20))
        while True:
            signal.pause()
    os.execvp(words[0], words)


def parts(what: str) -> list[tuple[str, dict[str, Any]]]:
    """The commands of QEMU's monitor that give it memory or a device."""
    if what.startswith("vfio"):
        device = {"driver": "vfio-pci", "id": "more", "host": address(what), "iommufd": "another", "bus": "free"}
        return [("object-add", {"qom-type": "iommufd", "id": "another"}), ("device_add", device)]
    backend = {"qom-type": "memory-backend-ram", "id": "more", "size": int(what) * 2**20}
    return [("object-add", backend), ("device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": "more"})]


def plug(name: str, what: str, limit: str | None = None) -> dict[str, Any]:
    """Gives a VM memory or a device; whether it has `started` to use that, and whether it still `runs`."""
    pid = int((FOLDER / f"{name}.pid").read_text())
    if limit is not None:
        subprocess.run(["prlimit", f"--pid={pid}", f"--memlock={limit}"], check=True)
    before = pinned(pid)
    commands = [{"execute": command, "arguments": arguments} for command, arguments in parts(what)]
    # One that ends meanwhile breaks the connection.
    done = subprocess.run(
        ["qmp", str(FOLDER / f"{name}.qmp")], input=json.dumps(commands), capture_output=True, text=True, check=False
    )
    # What an earlier attempt has left of the first one may be there already.
    refused = done.returncode != 0 or "error" in json.loads(done.stdout)[-1]
    deadline = time.monotonic() + 10
    while pinned(pid) == before and not refused and time.monotonic() < deadline:
        time.sleep(0.1)
    # An end takes a moment.
    time.sleep(1)
    output = (FOLDER / f"{name}.said").read_text() + done.stdout + done.stderr
    # It runs on where a device is refused, or memory that it cannot lock.
    runs = pinned(pid) is not None
    found = {"name": name, "output": output, "started": runs and not refused, "runs": runs}
    return {**found, **(look(pid) if found["started"] else {})}


def start(vm: Vm) -> dict[str, Any]:
    """Starts a VM; what became of it, beside which other VMs."""
    beside = sorted(file.stem for file in FOLDER.glob("*.pid") if Path("/proc", file.read_text().strip()).exists())
    vm.pidfile.unlink(missing_ok=True)
    vm.log.unlink(missing_ok=True)
    done = subprocess.run(vm.unit(), capture_output=True, text=True, check=False)
    # Without a line of QEMU's it was systemd that refused.
    output = vm.log.read_text() if vm.log.exists() else done.stderr
    found = {"name": vm.name, "beside": beside, "started": done.returncode == 0, "output": output}
    if found["started"] and vm.display:
        found.update(runs_on(vm, int(vm.pidfile.read_text())))
    if found["started"] and vm.plugged:
        return {**found, **plug(vm.name, str(vm.plugged))}
    return {**found, **look(int(vm.pidfile.read_text()))} if found["started"] else found


def runs_on(vm: Vm, pid: int) -> dict[str, Any]:
    """Whether a VM runs on once its guest has turned on the display, which has more memory pinned, and what it says."""
    before, deadline = pinned(pid), time.monotonic() + 20
    while before is not None and pinned(pid) == before and time.monotonic() < deadline:
        time.sleep(0.2)
    # An end takes a moment.
    time.sleep(1)
    return {"started": pinned(pid) is not None, "output": vm.said.read_text()}


def ask(verb: str, unit: str) -> dict[str, Any]:
    """Has systemctl do something with a unit, whose errors go to UNIT.log; what became of it."""
    done = subprocess.run(["systemctl", verb, unit], capture_output=True, text=True, check=False)
    main_pid = ["systemctl", "show", "--property=MainPID", "--value", unit]
    pid = int(subprocess.run(main_pid, capture_output=True, text=True, check=True).stdout)
    log = FOLDER / f"{unit}.log"
    found = {"unit": unit, "done": done.returncode == 0, "output": log.read_text() if log.exists() else ""}
    return {**found, "started": pid != 0, **(look(pid) if pid else {})}


def contain(unit: str) -> dict[str, Any]:
    """Starts a unit whose main process is not its VMM, and waits until that has pinned its memory, or it ended."""
    found, vmm, deadline = ask("start", unit), None, time.monotonic() + 120
    active = ["systemctl", "is-active", "--quiet", unit]
    while vmm is None and time.monotonic() < deadline and subprocess.run(active, check=False).returncode == 0:
        time.sleep(0.5)
        # One that is about to fail may have pinned something smaller.
        vmm = next((pid for pid in processes(unit) if (pinned(pid) or 0) >= Vm.memory_mib * 2**20), None)
    log = (FOLDER / f"{unit}.log").read_text()
    return {**found, "done": vmm is not None, "output": log, **(look(vmm) if vmm else {})}


def processes(unit: str) -> list[int]:
    """The processes of a unit. One that has ended has none."""
    group = ["systemctl", "show", "--property=ControlGroup", "--value", unit]
    name = subprocess.run(group, capture_output=True, text=True, check=True).stdout.strip()
    listed = Path(f"/sys/fs/cgroup{name}/cgroup.procs")
    return [int(pid) for pid in listed.read_text().split()] if name and listed.exists() else []


def look(pid: int) -> dict[str, Any]:
    """What /proc tells of a process."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    limits = [line.split() for line in (process / "limits").read_text().splitlines()]
    # Max locked memory  SOFT  HARD  bytes
    limit = next(int(words[3]) for words in limits if words[:3] == ["Max", "locked", "memory"])
    return {
        "pid": pid,
        "uid": int(status["Uid"].split()[0]),
        "pinned": int(status["VmPin"].split()[0]) * 1024,
        "locked": int(status["VmLck"].split()[0]) * 1024,
        "limit": limit,
        "ipc_lock": bool(int(status["CapEff"], 16) >> CAP_IPC_LOCK & 1),
    }


def pinned(pid: int) -> int | None:
    """What a process has pinned; None of one that ends, which has no memory any more."""
    try:
        return int(look(pid)["pinned"])
    except (OSError, KeyError, StopIteration):
        return None


def end(pattern: str) -> None:
    """Ends VMs, and waits until their memory is free."""
    subprocess.run(["systemctl", "stop", UNIT.format(pattern)], check=True)


def make_folder() -> None:
    """Makes the folder that VMs of any user write to."""
    FOLDER.mkdir(exist_ok=True)
    FOLDER.chmod(0o1777)


def run(command: str, descriptions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Does `only`, `more` or `try`."""
    make_folder()
    if command == "only":
        end("*")
    answers = []
    for description in descriptions:
        vm = Vm(**description)
        answers.append(start(vm))
        if command == "try" and answers[-1]["started"]:
            end(vm.name)
    return answers


def main() -> None:
    command, *words = sys.argv[1:]
    if command == "become":
        become(words[0], int(words[1]), words[2:])
    if command == "keep":
        keep(words)
    make_folder()
    answers: Any
    if command == "plug":
        answers = plug(*words)
    elif command == "units":
        answers = [ask(words[0], unit) for unit in words[1:]]
    elif command == "contain":
        answers = [contain(unit) for unit in words]
    else:
        answers = run(command, json.load(sys.stdin))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
