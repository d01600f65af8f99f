# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Puts a host in one situation after the other: what iommufd_info tells of each, and which VMs then start.

    situations < SITUATIONS

SITUATIONS is a JSON list of objects. `do` are commands for the shell, and `running` are VMs as vmm has them, which run
then, and no other. `options` are iommufd_info's. `tries` is what is started beside them, one after the other: a `vm` of
vmm's, a `plug`, which are the arguments of `vmm plug`, or a `domain` of libvirt's, its XML, with `user` for that user's
own libvirt. In the XML, <address vfio='vfio0'/> stands for the address of that device, and so does host=vfio0. `undo`
are commands again.

Printed is a JSON list with `info`, `running` and `tried` of each, or `error`, where one could not be brought about. The
module is read from /opt/tree. It is all in one program since each task of Ansible's takes seconds here.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any

TREE = "/opt/tree"
LOGS = {"system": "/var/log/libvirt/qemu", "session": "/home/{}/.cache/libvirt/qemu/log"}
PIDS = {"system": "/run/libvirt/qemu", "session": "/run/user/{}/libvirt/qemu/run"}


def shell(commands: list[str]) -> None:
    for each in commands:
        subprocess.run(["sh", "-e", "-c", each], check=True, stdout=sys.stderr)


def told(*words: str, given: Any = None, **options: Any) -> Any:
    """What a program answers in JSON."""
    text = None if given is None else json.dumps(given)
    return json.loads(
        subprocess.run(words, input=text, text=True, stdout=subprocess.PIPE, check=True, **options).stdout
    )


def look(pid: int) -> dict[str, Any]:
    """What /proc tells of an emulator of libvirt's."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    limits = [line.split() for line in (process / "limits").read_text().splitlines()]
    # Max locked memory  SOFT  HARD  bytes
    limit = next(words[3] for words in limits if words[:3] == ["Max", "locked", "memory"])
    return {
        "uid": int(status["Uid"].split()[0]),
        "pinned": int(status["VmPin"].split()[0]) * 1024,
        "locked": int(status["VmLck"].split()[0]) * 1024,
        "limit": None if limit == "unlimited" else int(limit),
        "ipc_lock": bool(int(status["CapEff"], 16) >> 14 & 1),
    }


def address(device: str) -> str:
    """Where a device of VFIO, such as vfio0, is on its bus."""
    return Path(f"/sys/class/vfio-dev/{device}/device").resolve().name


def attributes(match: re.Match[str]) -> str:
    """The attributes of a device's address in libvirt's XML."""
    words = re.split("[:.]", address(match[1]))
    return " ".join(f"{name}='0x{word}'" for name, word in zip(("domain", "bus", "slot", "function"), words))


def try_domain(xml: str, user: str | None) -> dict[str, Any]:
    """Starts a domain and ends it: what became of it, and, if it failed, what libvirt and QEMU say about that."""
    xml = re.sub("vfio='(vfio[0-9]+)'", attributes, xml)
    xml = re.sub("(?<=host=)vfio[0-9]+", lambda match: address(match[0]), xml)
    (name,) = re.findall("<name>(.*?)</name>", xml)
    virsh, options = ["virsh", "--quiet", "--connect=qemu:///system"], dict[str, Any]()
    folders = [LOGS["system"], PIDS["system"]]
    if user is not None:
        owner = pwd.getpwnam(user)
        runtime = f"/run/user/{owner.pw_uid}"
        who = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--init-groups"]
        virsh = [*who, "virsh", "--quiet", "--connect=qemu:///session"]
        options = {"env": {"PATH": os.environ["PATH"], "HOME": owner.pw_dir, "XDG_RUNTIME_DIR": runtime}}
        folders = [LOGS["session"].format(user), PIDS["session"].format(owner.pw_uid)]
    log, pidfile = Path(folders[0], f"{name}.log"), Path(folders[1], f"{name}.pid")
    log.unlink(missing_ok=True)
    # Whoever it is may read it.
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(xml)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        command = [*virsh, "create", "--paused", file.name]
        done = subprocess.run(command, text=True, capture_output=True, check=False, **options)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if re.search("qemu-system-x86_64: | is not an instance of type ", line)]
    found = {"name": name, "started": done.returncode == 0, "output": "\n".join([*said, done.stderr.strip()])}
    if done.returncode == 0:
        pid = int(pidfile.read_text())
        found.update(look(pid))
        subprocess.run([*virsh, "destroy", name], check=True, stdout=sys.stderr, **options)
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.1)
    return found


def attempts(tries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Starts what is to be tried, one after the other. Each start of Python takes a second or more."""
    found: list[dict[str, Any]] = []
    for is_vm, some in groupby(tries, lambda each: "vm" in each):
        each_try = list(some)
        found += told("vmm", "try", given=[each["vm"] for each in each_try]) if is_vm else map(attempt, each_try)
    return found


def attempt(each: dict[str, Any]) -> dict[str, Any]:
    """Starts a domain, or gives a VM memory."""
    if "plug" in each:
        plugged: dict[str, Any] = told("vmm", "plug", *map(str, each["plug"]))
        return plugged
    return try_domain(each["domain"], each.get("user"))


def run(situation: dict[str, Any]) -> dict[str, Any]:
    """One situation, and the next is looked at, too, if it fails."""
    try:
        return in_order(situation)
    except (OSError, ValueError, subprocess.CalledProcessError) as exc:
        return {"name": situation["name"], "error": str(exc)}


def in_order(situation: dict[str, Any]) -> dict[str, Any]:
    """One situation, from its beginning to its end."""
    shell(situation.get("do", []))
    running = told("vmm", "only", given=situation.get("running", []))
    module = [
        sys.executable,
        f"{TREE}/ansible_collections/virt/iommufd/tests/kernel/run_module.py",
        json.dumps(situation.get("options", {})),
        "iommufd_info",
    ]
    info = told(*module, env={**os.environ, "PYTHONPATH": TREE})
    tried = attempts(situation.get("tries", []))
    shell(situation.get("undo", []))
    return {"name": situation["name"], "info": info, "running": running, "tried": tried}


if __name__ == "__main__":
    print(json.dumps([run(each) for each in json.load(sys.stdin)]))
