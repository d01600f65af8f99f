# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Puts a host in one situation after the other: what iommufd_info tells of each, and which VMs then start.

    situations < SITUATIONS
    situations look < DEFINED    what runs of these

SITUATIONS is a JSON list of objects. `do` are commands for the shell, and `running` are VMs as vmm has them, which run
then, and no other. `define` is what the host gets, each a domain, of `user`'s own libvirt if it names one, or a `unit`;
what is in it fills the blanks of `templates` (`memory`: 64), `files` are beside it, and with `boot` it is to start at
boot. `options` are iommufd_info's. `tries` is what is started beside all that, one after the other: a `vm` of vmm's, a
`plug`, which are the arguments of `vmm plug`, or a `domain` that is not defined, its XML, with `user`; or, in the place
of the list, `defined` for all that is. In a text, <address vfio='vfio0'/> stands for the address of that device, and so
does host=vfio0. `undo` are commands again.

Printed is a JSON list with `info`, `running` and `tried` of each, or `error`, where one could not be brought about. The
module is read from /opt/tree. It is all in one program since each task of Ansible's takes seconds here, and so
does each start of what imports Ansible's own modules.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

TREE = "/opt/tree"
LOGS = {"system": "/var/log/libvirt/qemu", "session": "/home/{}/.cache/libvirt/qemu/log"}
PIDS = {"system": "/run/libvirt/qemu", "session": "/run/user/{}/libvirt/qemu/run"}


def shell(commands: list[str]) -> None:
    for each in commands:
        subprocess.run(["sh", "-e", "-c", each], check=True, stdout=sys.stderr)


@cache
def vmm() -> ModuleType:
    """The program vmm, whose name has no suffix."""
    loader = SourceFileLoader("vmm", shutil.which("vmm") or "vmm")
    spec = spec_from_loader("vmm", loader)
    assert spec
    module = module_from_spec(spec)
    # Its data classes look for it.
    sys.modules["vmm"] = module
    loader.exec_module(module)
    return module


def told_by_module(options: dict[str, Any]) -> Any:
    """What iommufd_info tells. It is run in a child each time, and so keeps nothing of the last one."""
    if TREE not in sys.path:
        sys.path.insert(0, TREE)
    collection = "ansible_collections.virt.iommufd"
    module = import_module(f"{collection}.plugins.modules.iommufd_info")
    run_module = import_module(f"{collection}.tests.kernel.run_module")
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            try:
                json.dump(run_module.run(module, **options), file)
                file.flush()
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise ValueError("iommufd_info has failed")
        file.seek(0)
        return json.load(file)


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


def with_devices(text: str) -> str:
    """A text in which devices of VFIO are named as such, with where they are."""
    text = re.sub("vfio='(vfio[0-9]+)'", attributes, text)
    return re.sub("(?<=host=)vfio[0-9]+", lambda match: address(match[0]), text)


class Libvirt:
    """The system's libvirt, or a user's own."""

    def __init__(self, user: str | None) -> None:
        self._words, self._options = ["virsh", "--quiet", "--connect=qemu:///system"], dict[str, Any]()
        folders = [LOGS["system"], PIDS["system"]]
        if user is not None:
            owner = pwd.getpwnam(user)
            runtime = f"/run/user/{owner.pw_uid}"
            who = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--init-groups"]
            self._words = [*who, "virsh", "--quiet", "--connect=qemu:///session"]
            self._options = {"env": {"PATH": os.environ["PATH"], "HOME": owner.pw_dir, "XDG_RUNTIME_DIR": runtime}}
            folders = [LOGS["session"].format(user), PIDS["session"].format(owner.pw_uid)]
        self._logs, self._pids = map(Path, folders)

    def ask(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """What virsh says."""
        return subprocess.run([*self._words, *words], text=True, capture_output=True, check=check, **self._options)

    def give(self, xml: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """What virsh says to a file of XML."""
        # Whoever it is may read it.
        with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
            file.write(xml)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            return self.ask(*words, file.name, check=check)

    def pid(self, name: str) -> int | None:
        """The process of a domain that runs."""
        try:
            return int((self._pids / f"{name}.pid").read_text())
        except FileNotFoundError:
            return None

    def try_domain(self, name: str, xml: str | None) -> dict[str, Any]:
        """Starts a domain and ends it: what became of it, and, if it failed, what libvirt and QEMU say about that."""
        log = self._logs / f"{name}.log"
        log.unlink(missing_ok=True)
        if xml is None:
            done = self.ask("start", "--paused", name, check=False)
        else:
            done = self.give(xml, "create", "--paused", check=False)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        said = [line for line in lines if re.search("qemu-system-x86_64: | is not an instance of type ", line)]
        found = {"name": name, "started": done.returncode == 0, "output": "\n".join([*said, done.stderr.strip()])}
        if done.returncode == 0:
            pid = self.pid(name)
            if pid is None:
                raise ValueError(f"libvirt has started {name}, and has no process of it")
            found.update(look(pid))
            self.ask("destroy", name)
            wait_for_end(pid)
        return found


def wait_for_end(pid: int) -> None:
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.1)


def define(each: dict[str, Any], templates: dict[str, str]) -> None:
    """Gives the host a unit or a domain."""
    text = with_devices(templates["unit" if "unit" in each else "domain"].format_map(Blanks({"memory": 64, **each})))
    for name, content in each.get("files", {}).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    if "unit" in each:
        # NAME@INSTANCE.service is made of a template.
        Path("/etc/systemd/system", re.sub("@[^.]+", "@", each["unit"])).write_text(text)
        shell(["systemctl daemon-reload", *([f"systemctl --quiet enable {each['unit']}"] if "boot" in each else [])])
        return
    libvirt = Libvirt(each.get("user"))
    libvirt.give(text, "define")
    if "boot" in each:
        libvirt.ask("autostart", each["name"])


class Blanks(dict[str, Any]):
    """What fills the blanks of a template: nothing, where that is not said."""

    def __missing__(self, _key: str) -> str:
        return ""


def of_unit(name: str) -> int | None:
    """The main process of a unit that is active."""
    show = ["systemctl", "show", "--property=MainPID", "--value", name]
    return int(subprocess.run(show, text=True, stdout=subprocess.PIPE, check=True).stdout) or None


def try_unit(name: str) -> dict[str, Any]:
    """Starts a unit and stops it: what became of it, and, if it failed, what it said."""
    since = time.time()
    started = subprocess.run(["systemctl", "start", name], capture_output=True, check=False).returncode == 0
    pid = of_unit(name)
    found: dict[str, Any] = {"name": name, "started": started, "output": ""}
    if started and pid is not None:
        found.update(look(pid))
    if not started:
        subprocess.run(["journalctl", "--sync"], check=True)
        said = ["journalctl", "--output=cat", f"--since=@{since:.6f}", f"--unit={name}"]
        found["output"] = subprocess.run(said, text=True, stdout=subprocess.PIPE, check=True).stdout
    shell([f"systemctl stop {name}", f"systemctl reset-failed {name} || true"])
    return found


def look_at(each: dict[str, Any]) -> dict[str, Any]:
    """Whether what is defined runs, and what /proc tells of it."""
    pid = of_unit(each["unit"]) if "unit" in each else Libvirt(each.get("user")).pid(each["name"])
    return {"name": each.get("unit", each["name"]), "started": pid is not None, **({} if pid is None else look(pid))}


def attempts(tries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Starts what is to be tried, one after the other."""
    found: list[dict[str, Any]] = []
    for is_vm, some in groupby(tries, lambda each: "vm" in each):
        each_try = list(some)
        found += vmm().run("try", [each["vm"] for each in each_try]) if is_vm else map(attempt, each_try)
    return found


def attempt(each: dict[str, Any]) -> dict[str, Any]:
    """Starts a domain or a unit, or gives a VM memory."""
    if "plug" in each:
        plugged: dict[str, Any] = vmm().plug(*map(str, each["plug"]))
        return plugged
    if "unit" in each:
        return try_unit(each["unit"])
    libvirt = Libvirt(each.get("user"))
    if "domain" not in each:
        return libvirt.try_domain(each["name"], None)
    (name,) = re.findall("<name>(.*?)</name>", each["domain"])
    return libvirt.try_domain(name, with_devices(each["domain"]))


def run(situation: dict[str, Any]) -> dict[str, Any]:
    """One situation, and the next is looked at, too, if it fails."""
    try:
        return in_order(situation)
    except (OSError, ValueError, subprocess.CalledProcessError) as exc:
        return {"name": situation["name"], "error": f"{exc} {getattr(exc, 'stderr', None) or ''}".strip()}


def in_order(situation: dict[str, Any]) -> dict[str, Any]:
    """One situation, from its beginning to its end."""
    shell(situation.get("do", []))
    defined = situation.get("define", [])
    for each in defined:
        define(each, situation["templates"])
    running = vmm().run("only", situation.get("running", []))
    info = told_by_module(situation.get("options", {}))
    tries = situation.get("tries", [])
    tried = attempts(defined if tries == "defined" else tries)
    shell(situation.get("undo", []))
    return {"name": situation["name"], "info": info, "running": running, "tried": tried}


if __name__ == "__main__":
    print(json.dumps([(look_at if sys.argv[1:] == ["look"] else run)(each) for each in json.load(sys.stdin)]))
