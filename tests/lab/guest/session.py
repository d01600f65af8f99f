# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains that get their iommufd from somebody else, of the system libvirt or of the user vm's own.

    session define < DOMAINS    has libvirt know these, and starts the user's libvirt if it does not run
    session plain NAME...       starts these of the user's, each with an iommufd that nobody has set
    session look NAME...        what libvirt and /proc tell of these of the user's
    session end NAME...         ends those of the user's that run, and waits until they are gone
    session daemon              what /proc tells of the user's libvirt
    session stop                ends the user's libvirt, as if nobody had needed it for a while
    session boot UNIT...        waits until the boot is over: how many there were of this kernel, and these units

DOMAINS is a JSON list of objects with the fields of the class Domain. Printed is a JSON list with what became of each,
in the words of libvirt, QEMU and /proc. No line is shared with the collection.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USER = pwd.getpwnam("vm")
RUNTIME = f"/run/user/{USER.pw_uid}"
STATE = Path(RUNTIME, "libvirt/qemu/run")
LOG = Path(USER.pw_dir, ".cache/libvirt/qemu/log")
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin",
    "HOME": USER.pw_dir,
    "XDG_RUNTIME_DIR": RUNTIME,
    "LIBVIRT_AUTOSTART": "0",
}
SESSION, SYSTEM = "qemu:///session", "qemu:///system"
DAEMON = "libvirtd.service"

XML = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  {iommufd}
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <hostdev mode='subsystem' type='pci' managed='no'>
      <source><address domain='0x{0}' bus='0x{1}' slot='0x{2}' function='0x{3}'/></source>
    </hostdev>
    {devices}
  </devices>
</domain>
"""


@dataclass(frozen=True)
class Domain:
    """A domain. `device` is one of VFIO's, such as vfio0; `iommufd` and `devices` are more of its XML."""

    name: str
    device: str
    memory_mib: int = 64
    iommufd: str = "<iommufd enabled='yes' fdgroup='iommufd'/>"
    devices: str = ""
    uri: str = SESSION

    def xml(self) -> str:
        address = Path(f"/sys/class/vfio-dev/{self.device}/device").resolve().name
        return XML.format(*address.replace(".", ":").split(":"), **vars(self))


def as_user(*command: str, check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command as the user, with the user's groups and an environment of the user's."""
    words = ["setpriv", f"--reuid={USER.pw_uid}", f"--regid={USER.pw_gid}", "--init-groups", *command]
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=check, **options)


def virsh(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return as_user("virsh", "--quiet", "--connect", SESSION, *words, **options)


def define(domains: list[Domain]) -> None:
    """Has libvirt know domains. The user's libvirt is started if it does not run."""
    if virsh("version").returncode:
        run = ("systemd-run", "--user", "--quiet", "--collect", "--service-type=notify", f"--unit={DAEMON}")
        as_user(*run, "--property=KillMode=process", "/usr/sbin/libvirtd", check=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        commands: dict[str, list[str]] = {SESSION: [], SYSTEM: []}
        for domain in domains:
            path = Path(folder, f"{domain.name}.xml")
            path.write_text(domain.xml())
            commands[domain.uri].append(f"define {path}")
        virsh("; ".join(commands[SESSION]), check=True)
        subprocess.run(["virsh", "--quiet", "; ".join(commands[SYSTEM])], check=True)


def plain(name: str) -> dict[str, Any]:
    """Starts a domain as anybody could: root opens an iommufd, and does not set it."""
    fd = os.open("/dev/iommu", os.O_RDWR)
    done = virsh(f"dom-fd-associate {name} iommufd {fd}; start --paused {name}", pass_fds=[fd])
    os.close(fd)
    log = LOG / f"{name}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return {**look(name), "error": done.stderr.strip(), "log": lines[-3:]}


def look(name: str) -> dict[str, Any]:
    """What is known of a domain: libvirt's word for its state, and what /proc tells of its emulator."""
    asked = virsh("domstate", name)
    pidfile = STATE / f"{name}.pid"
    found = {"name": name, "state": asked.stdout.strip() or None, "running": pidfile.exists()}
    return {**found, **process(int(pidfile.read_text()))} if pidfile.exists() else found


def process(pid: int) -> dict[str, Any]:
    """What /proc tells of a process. `beside` are the others that have an iommufd open."""
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    limits = [line.split() for line in (folder / "limits").read_text().splitlines()]
    # Max locked memory  SOFT  HARD  bytes
    memlock = next(words[3:5] for words in limits if words[:3] == ["Max", "locked", "memory"])
    return {
        "pid": pid,
        "comm": status["Name"].strip(),
        "user": pwd.getpwuid(int(status["Uid"].split()[0])).pw_name,
        "pinned": int(status["VmPin"].split()[0]) * 1024,
        "locked": int(status["VmLck"].split()[0]) * 1024,
        "limits": [None if each == "unlimited" else int(each) for each in memlock],
        "effective": int(status["CapEff"], 16),
        "cgroup": (folder / "cgroup").read_text().strip(),
        "iommufds": holders().count(pid),
        "beside": [each for each in holders() if each != pid],
    }


def holders() -> list[int]:
    """The processes that have an iommufd open, once for each descriptor."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target == "/dev/iommu":
            found.append(int(link.parts[2]))
    return found


def end(name: str) -> dict[str, Any]:
    """Ends a domain, if it runs, and waits until its memory is free."""
    before = look(name)
    if before["running"]:
        virsh("destroy", name, check=True)
        while os.path.exists(f"/proc/{before['pid']}"):
            time.sleep(0.1)
    return look(name)


def boot(units: list[str]) -> dict[str, Any]:
    """What has become of units at the last boot of the system on the same kernel."""

    def systemctl(*words: str) -> list[str]:
        return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False).stdout.split()

    systemctl("is-system-running", "--wait")
    count = systemctl("show", "--property=SoftRebootsCount", "--value")
    return {"count": count, "units": systemctl("is-active", *units)}


def main() -> None:
    command, *names = sys.argv[1:]
    answer: Any = None
    if command == "define":
        define([Domain(**description) for description in json.load(sys.stdin)])
    elif command == "boot":
        answer = boot(names)
    elif command == "daemon":
        answer = process(int((STATE / "driver.pid").read_text()))
    elif command == "stop":
        answer = as_user("systemctl", "--user", "stop", DAEMON, check=True).returncode
    else:
        answer = [{"plain": plain, "look": look, "end": end}[command](name) for name in names]
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
