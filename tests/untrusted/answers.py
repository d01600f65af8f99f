# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the collection's modules answer, in tests, on a host where others choose every text that others can choose."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

__all__ = ("ARITHMETIC", "DROP_IN", "HARMLESS", "UNIT", "Texts", "answers")

Row = dict[str, Any]

# What a template makes of {{ 7 * 191 }}, which is short enough to be cut nowhere.
ARITHMETIC = "1337"
# What is to be seen of it.
HARMLESS = "7*191"

# It clears a screen, sets a title, feigns a line of Ansible's, and turns the direction of what follows.
CONTROLS = "\x1b[2J\x1b]0;x\x07\r\nok: [localhost] => feigned\u202e\x9b2J\x7f\b\t\u2028"


class Texts:
    """Texts that would touch the file `mark` if they were templated, and the terminal if they were printed as is."""

    def __init__(self, mark: Path) -> None:
        expression = f"{{{{ lookup('pipe', 'touch {mark}') }}}}"
        statement = f"{{% set x = lookup('ansible.builtin.pipe', 'touch {mark}') %}}"
        self.expression = expression
        printable = ["{{7*191}}", expression, statement, f"!unsafe {expression}"]
        self._printable = itertools.cycle(printable)
        self._any = itertools.cycle([*printable, f"{CONTROLS}{expression}{statement}{CONTROLS}"])

    def fill(self, given: Any) -> Any:
        """The same with one of the texts in the place of each `*`, and one that is printable in that of each `?`."""
        if isinstance(given, str):
            for sign, texts in (("*", self._any), ("?", self._printable)):
                given = given.replace(sign, next(texts)) if sign in given else given
            return given
        if isinstance(given, dict):
            return {self.fill(key): self.fill(value) for key, value in given.items()}
        return [self.fill(each) for each in given] if isinstance(given, list) else given


QEMU = "/usr/bin/qemu-system-x86_64"
UNIT = "vm1.service"
DROP_IN = f"/etc/systemd/system/{UNIT}.d/50-iommufd_host.conf"


def process(accounting: str | None, **fields: Any) -> Row:
    """A VM that runs."""
    return {
        "pid": 4242,
        "comm": "*",
        "uid": 64055,
        "user": "*",
        "started": "*",
        "emulator": "*",
        "name": "*",
        "domain": "*",
        "domain_uri": "*",
        "unit": "*",
        "user_unit": "*",
        "initial_user_namespace": True,
        "memory_bytes": 67108864,
        "memory_pluggable": False,
        "of_devices_bytes": 0,
        "viommu": "none",
        "iommufd_objects": [{"id": "iommufd0", "fd": None}],
        "locks_memory": False,
        "pinned_bytes": 67371008,
        "locked_bytes": 0,
        "memlock_bytes": 104857600,
        "memlock_unlimited": False,
        "accounting": accounting,
        "backends": ["iommufd", "*"],
        "holder": False,
        "counter": accounting,
        "counters": [{"counter": "*", "held_bytes": 67371008, "headroom_bytes": 37486592, "backends": ["*"]}],
        "charged_bytes": 67371008,
        "headroom_bytes": 37486592,
        "iommufds": [{"fd": 9, "rlimit_mode": "user", "settable": False, "ioases": [], "msg": "*"}],
        "legacy_containers": [],
        "vfio_devices": [{"fd": 10, "node": "*", "addresses": ["*"], "backend": "iommufd", "as_it_runs": True}],
        "vdpa_devices": [{"fd": 11, "node": "*"}],
        "address_spaces": 1,
        "notes": ["*", "*"],
        **fields,
    }


# The name of the emulator, by which the role knows whose capability a VM would have.
COMM = "qemu-system-x86"


def info(module: str = "loaded") -> Row:
    """What iommufd_info returns."""
    emulator = {"present": True, "known_by": ["place"], "file_capabilities": None, "version": "*"}
    host = {
        "limits_of_view": [{"what": "*", "why": "*"}],
        "readiness": [{"what": "*", "ready": ready, "msg": "*"} for ready in (False, None) for _number in range(5)],
        "kernel": "*",
        "machine": "*",
        "module": module,
        "device": {"path": "*", "present": module != "absent", "rdev": "*", "mode": "*", "owner": "*", "group": "*"},
        "options": {"rlimit_mode": {"readable": True, "settable": True}},
        "caller": {
            "uid": 0,
            "initial_user_namespace": True,
            "capabilities": ["cap_ipc_lock", "cap_sys_ptrace", "cap_sys_resource"],
        },
        "legacy_by_iommufd": False,
        "yama_ptrace_scope": 1,
        "iommus": ["*"],
        "iommu_groups": [{"id": 1, "devices": ["*"]}],
        "vfio_devices": [{"node": "*", "address": "*", "iommu_group": 1, "mode": "*", "owner": "*", "group": "*"}],
        "qemu": [
            {"path": QEMU, "writer": None, "cap_ipc_lock": False, **emulator},
            {"path": "*", "writer": {"place": "*", "who": "*"}, "cap_ipc_lock": True, **emulator},
        ],
        "libvirt": {
            "version": "11.3.0",
            # One of the two that there are; systemd gives the name.
            "unit": "libvirtd.service",
            "pid": 812,
            "outdated": True,
            "cap_sys_resource": True,
            "drop_in": ["*"],
            "taken_by": [{"path": "*", "line": 1, "text": "*"}],
            "unit_outdated": False,
            "needs_restart": False,
            "memlock_bytes": 67108864,
            "memlock_unlimited": False,
            "user": "*",
            "uid": 64055,
            "sessions": [
                {"uid": 1000, "user": "*", "pid": 813, "memlock_hard_bytes": 8388608, "memlock_hard_unlimited": False}
            ],
            "supports_iommufd": False,
            "domain_capabilities_iommufd": None,
            "sets_rlimit_mode": False,
            "starts_iommufd_domains": False,
            "reason": "*",
        },
    }
    processes = [
        # Of each text that may be a VM's name there is one that is.
        *(process("user") for _number in range(5)),
        *(process("user", domain=None) for _number in range(5)),
        *(process("user", domain=None, name=None) for _number in range(5)),
        *(process(None, domain=None, name=None, unit=None) for _number in range(5)),
        *(process("user", comm=COMM) for _number in range(5)),
        *(process("user", comm=COMM, domain=None, name=None) for _number in range(5)),
        # What is taken back leaves the VMs that have it as they are.
        *(process("none", comm=COMM) for _number in range(5)),
        *(process("none", domain=None, holder=True) for _number in range(5)),
        # Of what is said of where a limit is raised, too.
        *(process("process", headroom_bytes=-1, domain_uri=None, unit="*.service") for _number in range(5)),
        *(process("process", headroom_bytes=-1, domain_uri=None, user_unit="*.service") for _number in range(5)),
    ]
    charge = {"charged_bytes": 67371008, "uncertain_bytes": 0, "memlock_bytes": 104857600, "memlock_unlimited": False}
    users = [{"uid": 64055, "user": "*", "pids": [4242], "at_risk": True, **charge}]
    narrowed = {"pids": None, "uids": None}
    return {"changed": False, "host": host, "processes": processes, "users": users, "narrowed": narrowed}


def check(ok: bool | None, obstacles: bool = False) -> Row:
    """What iommufd_vmm_check returns where something was started; `ok`: with the capability that was granted.

    None is what is not known.
    """
    capability = {
        "attempted": True,
        "inconclusive": ok is None,
        "ok": ok,
        "effective": "0000000000004000" if ok else "*",
        "msg": "*",
    }
    limits = {"memlock_bytes": 2**20, "memlock_unlimited": False}
    emulator = {
        "path": QEMU,
        "real_path": "*",
        "present": True,
        "writer": {"place": "*", "who": "*"} if obstacles else None,
        "is_emulator": True,
        "conditions_of": "*",
        "obstacles": ["*"] if obstacles else [],
        "trial": {"attempted": True, "inconclusive": False, "ok": True, "effective": "*", "msg": "*"},
        "started": {**capability, "how": "*", "user": "*"},
    }
    unit = {
        "name": UNIT,
        "main": UNIT,
        "present": True,
        "outdated": False,
        "user": "*",
        "ambient_ipc_lock": False,
        "file_ipc_lock": False,
        "obstacles": [],
        "replica": {**capability, **limits, "user": "*"},
    }
    allowed = {"attempted": True, "inconclusive": False, "ok": True, "msg": "*"}
    # What is of another form than a label is refused, as is a text in `msg`: that is what the role ends with.
    label = "system_u:object_r"
    selinux = {
        "domains": [{"context": "system_u:system_r:svirt_t:s0", "ipc_lock": allowed, "opens": allowed}],
        "labels": {
            **dict.fromkeys(("/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/vfio"), f"{label}:vfio_device_t:s0"),
            "/dev/iommufd_host-no-such-node": f"{label}:device_t:s0",
        },
        "sysfs": f"{label}:sysfs_t:s0",
        "msg": "*" if obstacles else "",
    }
    return {
        "changed": False,
        "selinux": selinux,
        "emulators": [emulator],
        "units": [unit],
        "users": [],
        "try_iommufd": {"attempted": True, "inconclusive": False, "ok": True, "mode": "process", "msg": "*"},
    }


def applied() -> Row:
    """What iommufd_host_apply returns; the stub makes a row of each of these for what it is asked for."""
    # The role tells these texts as they are, when it takes back what it granted.
    put_back = [
        {"kind": "file", "path": "*", "text": "?", "gone": True},
        {"kind": "file", "path": "/etc/systemd/system/*.d/50-iommufd_host.conf", "text": "?", "gone": False},
        {"kind": "capability", "path": QEMU, "text": f"CAP_IPC_LOCK is taken from {QEMU}.", "gone": False},
        {"kind": "capability", "path": "*", "text": "CAP_IPC_LOCK is taken from ?.", "gone": False},
    ]
    made = [
        {"kind": "file", "path": "*", "text": "?", "content": True, "before": "*"},
        # What a host says that a file held goes back to the host.
        {"kind": "file", "path": DROP_IN, "text": "?", "content": True, "before": "*\n*\n"},
        {"kind": "block", "path": "*", "text": "?"},
        {"kind": "unit", "path": "*", "text": "?"},
    ]
    return {
        "changed": True,
        "put_back": put_back,
        "made": made,
        "stranded": ["*"],
        "recorded": [{"kind": "file", "path": "*"}],
        "remembered": [{"kind": "file", "path": "*", "before": {"mode": "*"}}],
        "each": {"capabilities": {"real_path": "?", "ipc_lock": True, "ours": True}},
    }


def answers(texts: Texts, module: str = "loaded", ok: bool | None = True, obstacles: bool = False) -> Row:
    """The answers of all modules, by their names."""
    filled = texts.fill(
        {
            "iommufd_info": info(module),
            "iommufd_vmm_check": check(ok, obstacles),
            "iommufd_host_apply": applied(),
        }
    )
    assert isinstance(filled, dict)
    return {**filled, "done": {"changed": True, "msg": "done"}}
