# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains of the system libvirt with passed-through devices, as far as they go without a disk: paused.

    domains start < DOMAINS    starts these, one after the other, whether or not one of them fails
    domains look NAME...       what libvirt and /proc tell of these
    domains end NAME...        ends those that run, and waits until they are gone

DOMAINS is a JSON list of objects with the fields of the class Domain. Printed is a JSON list with what became of each,
in the words of libvirt, QEMU and /proc. No line is shared with the collection.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAP_IPC_LOCK = 14

PIDFILE = "/run/libvirt/qemu/{}.pid"
LOG = "/var/log/libvirt/qemu/{}.log"

XML = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  {limit}
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    {devices}
  </devices>
  {commandline}
</domain>
"""
LIMIT = "<memtune><hard_limit unit='MiB'>{0}</hard_limit></memtune>"
# libvirt opens the device and the iommufd, and hands them over. It can from 12.1 on.
HOSTDEV = """\
<hostdev mode='subsystem' type='pci' managed='no'>
  <driver name='vfio' iommufd='yes'/>
  <source><address domain='0x{0}' bus='0x{1}' slot='0x{2}' function='0x{3}'/></source>
</hostdev>
"""
# libvirt knows of nothing, and QEMU opens both.
COMMANDLINE = """\
<qemu:commandline>
  <qemu:arg value='-object'/>
  <qemu:arg value='iommufd,id=iommufd0'/>
  <qemu:arg value='-device'/>
  <qemu:arg value='vfio-pci,host={0},iommufd=iommufd0,bus=pcie.0,addr=0x10'/>
</qemu:commandline>
"""


@dataclass(frozen=True)
class Domain:
    """A domain. `device` of VFIO, such as vfio0, `opened_by` emulator or libvirt; the limit on what it may lock.

    With no limit of its own, None, it has that of libvirt's daemon.
    """

    name: str
    device: str
    opened_by: str = "emulator"
    memory_mib: int = 64
    limit_mib: int | None = 100

    def xml(self) -> str:
        address = Path(f"/sys/class/vfio-dev/{self.device}/device").resolve().name
        devices = commandline = ""
        if self.opened_by == "libvirt":
            devices = HOSTDEV.format(*address.replace(".", ":").split(":"))
        else:
            commandline = COMMANDLINE.format(address)
        limit = LIMIT.format(self.limit_mib) if self.limit_mib else ""
        return XML.format(**vars(self), limit=limit, devices=devices, commandline=commandline)


def start(domain: Domain) -> dict[str, Any]:
    """Starts a domain: what became of it, and, if it failed, what libvirt and QEMU say about that."""
    log = Path(LOG.format(domain.name))
    log.unlink(missing_ok=True)
    began = time.monotonic()
    create = ["virsh", "--quiet", "create", "--paused", "/dev/stdin"]
    done = subprocess.run(create, input=domain.xml(), capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "error": done.stderr.strip()}
    if done.returncode:
        # What libvirt leaves out of its message for its length; its own lines in there name no emulator with a colon.
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        found["log"] = [line for line in lines if "qemu-system-x86_64: " in line]
    return {**look(domain.name), **found}


def look(name: str) -> dict[str, Any]:
    """What is known of a domain: libvirt's word for its state, and what /proc tells of its emulator."""
    asked = subprocess.run(["virsh", "domstate", name], capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"name": name, "state": asked.stdout.strip() or None, "running": asked.returncode == 0}
    if asked.returncode:
        return found
    pid = int(Path(PIDFILE.format(name)).read_text())
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    limits = [line.split() for line in (process / "limits").read_text().splitlines()]
    # Max locked memory  SOFT  HARD  bytes
    limit = next(words[3] for words in limits if words[:3] == ["Max", "locked", "memory"])
    label = (process / "attr/current").read_bytes().rstrip(b"\0\n").decode()
    return {
        **found,
        "pid": pid,
        "user": pwd.getpwuid(int(status["Uid"].split()[0])).pw_name,
        "pinned": int(status["VmPin"].split()[0]) * 1024,
        "locked": int(status["VmLck"].split()[0]) * 1024,
        "limit": None if limit == "unlimited" else int(limit),
        "effective": status["CapEff"].strip(),
        "ipc_lock": bool(int(status["CapEff"], 16) >> CAP_IPC_LOCK & 1),
        "label": label,
    }


def end(name: str) -> dict[str, Any]:
    """Ends a domain, if it runs, and waits until its memory is free."""
    before = look(name)
    if before["running"]:
        subprocess.run(["virsh", "--quiet", "destroy", name], check=True)
        while os.path.exists(f"/proc/{before['pid']}"):
            time.sleep(0.1)
    return look(name)


def main() -> None:
    command, *words = sys.argv[1:]
    if command == "start":
        print(json.dumps([start(Domain(**description)) for description in json.load(sys.stdin)]))
    else:
        print(json.dumps([{"look": look, "end": end}[command](name) for name in words]))


if __name__ == "__main__":
    main()
