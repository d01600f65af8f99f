# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What iommufd_host_record remembers and puts back, on a host whose root, systemd and udev are real."""

from __future__ import annotations

import fcntl
import grp
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._capabilities import with_ipc_lock
from ansible_collections.virt.iommufd.plugins.module_utils._record import locked
from ansible_collections.virt.iommufd.plugins.modules import iommufd_host_record
from ansible_collections.virt.iommufd.tests.kernel.harness import CAPABILITIES, VM, Answer, as_user, change_user
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

pytestmark = pytest.mark.once

RECORD = Path("/var/lib/iommufd_host/record.json")
# On the file system that the emulators are on.
PLACE = Path("/opt/iommufd-host-record-test")
EMULATOR = PLACE / "emulator"
SYSTEMD = Path("/etc/systemd/system")
RULE = Path("/etc/udev/rules.d/80-iommufd-host-record-test.rules")
SITES_RULE = RULE.with_name("70-iommufd-host-record-test.rules")
GRANT = "iommufd-host-record-test"
QEMU_CONF = Path("/etc/libvirt/qemu.conf")
BEGIN, END = "# BEGIN iommufd_host\n", "# END iommufd_host\n"
NODE = "/dev/vfio/devices/vfio2"

XATTR = "security.capability"
IPC_LOCK, NET_RAW = 1 << CAPABILITIES["ipc_lock"], 1 << 13


def plain(permitted: int, inheritable: int = 0, effective: bool = True) -> bytes:
    """The extended attribute as setcap writes it."""
    return struct.pack("<5I", 0x02000000 | effective, permitted, inheritable, 0, 0)


def record(**options: Any) -> Answer:
    """The module's answer, which must not be a failure."""
    answered = run(iommufd_host_record, **options)
    assert not answered.get("failed"), answered
    return answered


def shell(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout


def xattr(path: Path = EMULATOR) -> bytes | None:
    """The file capabilities, None without. A set of none is not the same."""
    return os.getxattr(path, XATTR) if XATTR in os.listxattr(path) else None


def set_xattr(value: bytes | None, path: Path = EMULATOR) -> None:
    if value is not None:
        os.setxattr(path, XATTR, value)
    elif xattr(path) is not None:
        os.removexattr(path, XATTR)


def has_ipc_lock() -> bool:
    """Whether an ordinary user who executes the file has it, by what the kernel says of the process."""
    status = shell(*as_user(VM), str(EMULATOR), "/proc/self/status")
    found = re.search("^CapEff:\t([0-9a-f]+)$", status, re.MULTILINE)
    assert found
    return bool(int(found.group(1), 16) & IPC_LOCK)


def tree(*places: Path) -> dict[str, Any]:
    """All that is below some folders: type, mode, owner, group, content, extended attributes."""
    found: dict[str, Any] = {}
    for place in places:
        for path in [place, *place.rglob("*")]:
            status = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            target = os.readlink(path) if path.is_symlink() else None
            xattrs = {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
            }
            found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, content, target, xattrs)
    return found


def units() -> str:
    """The units that systemd has loaded, and what has failed. Which are enabled is to be seen in /etc."""
    return shell("systemctl", "list-units", "--all", "--no-legend", "--no-pager", f"{GRANT}*")


def node() -> tuple[int, int, int]:
    status = os.stat(NODE)
    return status.st_mode & 0o7777, status.st_uid, status.st_gid


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    """An executable to grant to, and a host that is as it was, before and after."""
    before = node()
    assert not RECORD.parent.exists()
    PLACE.mkdir()
    # Each time a new file.
    shutil.copy2("/usr/bin/cat", EMULATOR)
    yield
    left = RECORD.exists()
    run(iommufd_host_record)
    for name in (f"{GRANT}.path", f"{GRANT}.service"):
        subprocess.run(["systemctl", "stop", name], check=False, capture_output=True, timeout=120)
    shutil.rmtree(PLACE)
    os.chown(NODE, *before[1:])
    os.chmod(NODE, before[0])
    assert not (left and RECORD.exists()), "the record could not be put back"


def write(path: Path, content: str) -> str:
    """Writes a file as a role does, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o644)
    return str(path)


def wanted() -> dict[str, list[str]]:
    """All that a role is about to change, one of each kind and more."""
    return {
        "files": [
            *(str(SYSTEMD / f"{GRANT}.{kind}") for kind in ("path", "service")),
            str(SYSTEMD / "ssh.service.d" / "50-iommufd-host-record-test.conf"),
            str(RULE),
            "/etc/iommufd-host-record-test/a/b.conf",
            "/etc/hostname",
        ],
        "capabilities": [str(EMULATOR)],
        "nodes": ["/dev/vfio/devices/*"],
        "blocks": [str(QEMU_CONF)],
        "units": [f"{GRANT}.path"],
    }


def write_units() -> None:
    """A service that grants, as often as something happens to the file."""
    command = f"/bin/sh -c 'getcap {EMULATOR} | grep -q ipc_lock || setcap cap_ipc_lock+ep {EMULATOR}'"
    write(SYSTEMD / f"{GRANT}.service", f"[Service]\nType=oneshot\nExecStart={command}\n")
    path = f"[Path]\nPathChanged={EMULATOR}\n[Install]\nWantedBy=paths.target multi-user.target\n"
    write(SYSTEMD / f"{GRANT}.path", path)


def start_units() -> None:
    # With no more reloads than it takes: each costs seconds.
    shell("systemctl", "enable", "--no-reload", f"{GRANT}.path")
    shell("systemctl", "daemon-reload")
    shell("systemctl", "start", f"{GRANT}.path")


def change_all() -> None:
    """Does what a role would, with the system's own tools."""
    write_units()
    files = wanted()["files"]
    write(Path(files[2]), "[Service]\nAmbientCapabilities=CAP_IPC_LOCK\n")
    write(RULE, 'SUBSYSTEM=="vfio-dev", GROUP="tape", MODE="0664"\n')
    for path in files[4:]:
        write(Path(path), "of the role\n")
    QEMU_CONF.write_text(BEGIN + "cgroup_device_acl = [ '/dev/iommu' ]\n" + END + QEMU_CONF.read_text())
    start_units()
    shell("udevadm", "control", "--reload")
    shell("udevadm", "trigger", "--settle", "--action=change", "--subsystem-match=vfio-dev")


def test_a_host_there_and_back() -> None:
    set_xattr(plain(0, effective=False))
    before, etc = (tree(Path("/etc"), PLACE), units(), node()), tree(Path("/etc"))
    foretold = record(_ansible_check_mode=True, **wanted())
    assert (tree(Path("/etc"), PLACE), units(), node()) == before
    first = record(**wanted())
    assert first["granted"] == foretold["granted"] == [str(EMULATOR)]
    assert first["capabilities"][str(EMULATOR)]["ipc_lock"]
    assert xattr() == plain(IPC_LOCK)
    # Nothing else is changed.
    assert (tree(Path("/etc")), units(), node()) == (etc, *before[1:])
    # QEMU's configuration, as the package brings it, sets nothing.
    assert first["blocks"][str(QEMU_CONF)] == {"exists": True, "content": None, "cgroup_device_acl": None}
    change_all()
    assert has_ipc_lock()
    assert node()[:2] == (0o664, 0)
    changed = tree(Path("/etc"), PLACE)
    second = record(**wanted())
    assert (second["changed"], second["recorded"], second["remembered"]) == (False, [], first["remembered"])
    assert second["units"][f"{GRANT}.path"] == {"exists": True, "enabled": True, "active": True}
    assert second["nodes"][NODE] == {"exists": True, "mode": "0664", "owner": "root", "group": "tape"}
    assert second["blocks"][str(QEMU_CONF)]["content"] == "cgroup_device_acl = [ '/dev/iommu' ]\n"
    foretold = record(_ansible_check_mode=True)
    assert (tree(Path("/etc"), PLACE), RECORD.exists()) == (changed, True)
    back = record()
    assert back["changed"]
    assert back["put_back"] == foretold["put_back"]
    assert (tree(Path("/etc"), PLACE), units(), node()) == before
    assert not has_ipc_lock()
    assert not RECORD.parent.exists()
    # What udev has read is what is there now.
    shell("udevadm", "trigger", "--settle", "--action=change", "--subsystem-match=vfio-dev")
    assert node() == before[2]
    assert record()["put_back"] == []


@pytest.mark.parametrize(
    "before",
    [
        None,
        # What setcap leaves of `=`.
        plain(0, effective=False),
        plain(NET_RAW),
        plain(0, NET_RAW),
        plain(IPC_LOCK, effective=False),
        plain(0, IPC_LOCK, effective=False),
    ],
)
def test_the_bytes_of_an_executable(before: bytes | None) -> None:
    set_xattr(before)
    # The kernel may show it in another form than it was given.
    before = xattr()
    first = record(capabilities=[str(EMULATOR)])
    assert (first["changed"], first["granted"]) == (True, [str(EMULATOR)])
    assert first["capabilities"][str(EMULATOR)]["ours"]
    granted = with_ipc_lock(before)
    assert xattr() == granted
    assert has_ipc_lock()
    second = record(capabilities=[str(EMULATOR)])
    assert (second["changed"], second["granted"]) == (False, [])
    assert second["capabilities"][str(EMULATOR)]["ipc_lock"]
    assert record()["changed"]
    assert xattr() == before
    assert not has_ipc_lock()
    if before is None:
        # It is what setcap writes.
        shell("setcap", "cap_ipc_lock+ep", str(EMULATOR))
        assert xattr() == granted


@pytest.mark.parametrize("granted", [plain(IPC_LOCK | NET_RAW), plain(IPC_LOCK | NET_RAW, effective=False)])
def test_what_somebody_added_stays(granted: bytes) -> None:
    record(capabilities=[str(EMULATOR)])
    set_xattr(granted)
    assert record()["changed"]
    assert xattr() == struct.pack("<5I", struct.unpack_from("<I", granted)[0], NET_RAW, 0, 0, 0)


def test_what_somebody_else_granted_stays() -> None:
    shell("setcap", "cap_ipc_lock=ep", str(EMULATOR))
    answered = record(capabilities=[str(EMULATOR)])
    assert answered["capabilities"][str(EMULATOR)] == {
        "real_path": str(EMULATOR),
        "ipc_lock": True,
        "ours": False,
        "other": [],
    }
    assert not record()["changed"]
    assert has_ipc_lock()


def upgrade(value: bytes | None = None) -> None:
    """As dpkg does: a new file in the place of the old one."""
    new = EMULATOR.with_suffix(".dpkg-new")
    shutil.copy2("/usr/bin/cat", new)
    set_xattr(value, new)
    new.rename(EMULATOR)


def test_an_upgrade_of_the_package() -> None:
    record(capabilities=[str(EMULATOR)])
    # This version comes with a capability of its own.
    upgrade(plain(NET_RAW))
    again = record(capabilities=[str(EMULATOR)])
    assert [each["path"] for each in again["recorded"]] == again["granted"] == [str(EMULATOR)]
    assert xattr() == with_ipc_lock(plain(NET_RAW))
    assert record()["changed"]
    assert xattr() == plain(NET_RAW)
    # With another upgrade, or with its removal, there is nothing to take.
    record(capabilities=[str(EMULATOR)])
    upgrade()
    assert not record()["changed"]
    record(capabilities=[str(EMULATOR)])
    EMULATOR.rename(PLACE / "gone")
    assert not record()["changed"]


def wait_for(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (ended := done()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return ended


def test_a_unit_that_stays_does_not_grant_it_again() -> None:
    kept = {name: wanted()[name][:2] for name in ("files", "units")}
    record(capabilities=[str(EMULATOR)], **kept)
    write_units()
    start_units()
    # It is at work: it grants what is taken away.
    os.utime(EMULATOR)
    assert wait_for(has_ipc_lock, 60)
    shell("systemctl", "stop", f"{GRANT}.service")
    set_xattr(None)
    assert wait_for(has_ipc_lock, 60)
    answered = record(**kept)
    assert answered["units"][f"{GRANT}.path"] == {"exists": True, "enabled": True, "active": False}
    assert not wait_for(has_ipc_lock, 3)


def test_a_unit_whose_file_somebody_has_removed() -> None:
    before = tree(Path("/etc"))
    options = {name: wanted()[name][:2] for name in ("files", "units")}
    record(**options)
    write_units()
    start_units()
    (SYSTEMD / f"{GRANT}.path").unlink()
    assert record()["changed"]
    assert tree(Path("/etc")) == before
    assert f"{GRANT}.path" not in shell("systemctl", "list-units", "--all", "--no-legend", "--no-pager")


@pytest.mark.parametrize("sites_rule", [False, True])
def test_a_node_that_comes_later(sites_rule: bool) -> None:
    device = Path("/sys/class/vfio-dev/vfio2/device").resolve()
    driver = (device / "driver").resolve()
    (driver / "unbind").write_text(device.name)
    try:
        assert not os.path.exists(NODE)
        if sites_rule:
            write(SITES_RULE, 'SUBSYSTEM=="vfio-dev", GROUP="audio", MODE="0640"\n')
        record(files=[str(RULE)], nodes=["/dev/vfio/devices/*"])
        write(RULE, 'SUBSYSTEM=="vfio-dev", GROUP="tape", MODE="0664"\n')
        shell("udevadm", "control", "--reload")
        (driver / "bind").write_text(device.name)
        shell("udevadm", "settle")
        assert node() == (0o664, 0, grp.getgrnam("tape").gr_gid)
        assert record(files=[str(RULE)], nodes=["/dev/vfio/devices/*"])["recorded"] == []
        assert record()["changed"]
        assert node() == ((0o640, 0, grp.getgrnam("audio").gr_gid) if sites_rule else (0o600, 0, 0))
    finally:
        SITES_RULE.unlink(missing_ok=True)
        shell("udevadm", "control", "--reload")
        if not (device / "driver").exists():
            (driver / "bind").write_text(device.name)
            shell("udevadm", "settle")


# What changes something, or has the disk know of it.
CALLS = (
    *("mkdir", "makedirs", "unlink", "rename", "rmdir", "fchown", "fchmod", "chown", "chmod", "fsync"),
    *("setxattr", "removexattr"),
)


def cut_off(at: int, commands: bool, **options: Any) -> bool:
    """Runs the module in a process that kills itself before one of its calls. Gives whether it came to that.

    `commands`: the calls that are counted are the commands it runs, else the system's calls.
    """
    child = os.fork()
    if not child:
        left, module = [at], os.getpid()

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if not left[0]:
                    os.kill(module, signal.SIGKILL)
                    # The call may be that of a child of its own.
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return function(*arguments, **keywords)

            return call

        try:
            target, names = (iommufd_host_record, ("run_command",)) if commands else (os, CALLS)
            for name in names:
                setattr(target, name, counted(getattr(target, name)))
            answered = run(iommufd_host_record, **options)
            os._exit(3 if answered.get("failed") else 0)
        finally:
            os._exit(4)
    _pid, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


SOME = {
    "files": [str(PLACE / "old"), str(PLACE / "a" / "b" / "new")],
    "capabilities": [str(EMULATOR)],
    "blocks": [str(PLACE / "conf"), str(PLACE / "c" / "new")],
    "nodes": [NODE],
}


def change_some() -> None:
    for path in SOME["files"]:
        write(Path(path), "of the role")
    for path in SOME["blocks"]:
        rest = Path(path).read_text() if os.path.exists(path) else ""
        write(Path(path), BEGIN + "x\n" + END + rest)
    set_xattr(with_ipc_lock(xattr()))
    os.chmod(NODE, 0o664)


def items_in_record() -> set[str]:
    return {item["path"] for item in json.loads(RECORD.read_text())["items"]} if RECORD.exists() else set()


def state_of(path: str) -> Any:
    if path == NODE:
        return node()
    return tree(Path(path)).get(path) if os.path.lexists(path) else None


def test_cut_off_anywhere() -> None:
    """Killed before each of its calls, the record names all that is not back, and the next run makes it good."""
    write(PLACE / "old", "old")
    write(PLACE / "conf", "a = 1\nb = 2")
    os.setxattr(PLACE / "old", "user.of.the.file", b"value")
    set_xattr(plain(0, effective=False))
    paths = [path for some in SOME.values() for path in some]
    before = tree(PLACE), node(), {path: state_of(path) for path in paths}

    def check(when: str) -> None:
        assert (tree(PLACE), node()) == before[:2], when
        assert not RECORD.parent.exists(), when

    at = 0
    while cut_off(at, False, **SOME):
        record()
        check(f"record, call {at}")
        assert cut_off(at, False, **SOME)
        record(**SOME)
        assert items_in_record() == set(paths)
        record()
        at += 1
    assert at > 5
    at, killed = 0, True
    while killed:
        record(**SOME)
        change_some()
        killed = cut_off(at, False)
        not_back = {path for path in paths if state_of(path) != before[2][path]}
        assert not_back <= items_in_record(), f"undo, call {at}"
        record()
        check(f"undo, call {at}")
        at += 1
    assert at > 20


def test_cut_off_before_systemd_is_told() -> None:
    before = tree(Path("/etc")), units()
    options = {name: wanted()[name][:2] for name in ("files", "units")}
    record(capabilities=[str(EMULATOR)], **options)
    write_units()
    set_xattr(plain(IPC_LOCK))
    start_units()
    # It shows, disables, stops and forgets both units before that.
    assert cut_off(6, True)
    record()
    assert (tree(Path("/etc")), units(), xattr()) == (*before, None)
    assert not wait_for(has_ipc_lock, 1)


def refused(why: str, **options: Any) -> None:
    before = tree(PLACE, RECORD.parent)
    for check_mode in (True, False):
        answered = run(iommufd_host_record, _ansible_check_mode=check_mode, **options)
        assert answered["failed"]
        assert why in answered["msg"]
        assert tree(PLACE, RECORD.parent) == before


def test_whose_record_is_believed() -> None:
    record(capabilities=[str(EMULATOR)])
    set_xattr(plain(IPC_LOCK))
    for path in (RECORD, RECORD.parent):
        os.chown(path, VM, 0)
        refused(f"{path} is not believed")
        os.chown(path, 0, 0)
        path.chmod(path.stat().st_mode | 0o002)
        refused(f"{path} is not believed")
        path.chmod(path.stat().st_mode & ~0o002)
    content = RECORD.read_bytes()
    RECORD.write_bytes(content[:-10])
    refused(f"The record {RECORD} is damaged")
    RECORD.write_bytes(content)
    with locked(str(RECORD)):
        refused("Another run works with the record")
    assert record()["changed"]
    assert xattr() is None


def test_an_ordinary_user() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            change_user(VM)
            os.write(writer, json.dumps(run(iommufd_host_record)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        answered = json.loads(stream.read())
    os.waitpid(child, 0)
    assert answered["failed"]
    assert answered["msg"] == (
        f"It takes root to put a host back, and this is uid {VM}. Run the task as root (become: true)."
    )


# linux/fs.h
_FS_IOC_SETFLAGS = 0x40086602
_IMMUTABLE = 0x10


def set_flags(path: Path, flags: int) -> None:
    with path.open() as stream:
        fcntl.ioctl(stream, _FS_IOC_SETFLAGS, struct.pack("@l", flags))


def test_a_file_that_cannot_be_removed() -> None:
    path = PLACE / "kept"
    record(files=[str(path)], capabilities=[str(EMULATOR)])
    write(path, "")
    set_xattr(plain(IPC_LOCK))
    set_flags(path, _IMMUTABLE)
    try:
        answered = run(iommufd_host_record)
        assert answered["failed"]
        assert f"{path} could not be put back: EPERM: Operation not permitted." in answered["msg"]
        assert {each["path"] for each in answered["remembered"]} == {str(path), str(EMULATOR)}
        assert has_ipc_lock()
    finally:
        set_flags(path, 0)
    assert record()["changed"]
    assert not path.exists()
    assert not has_ipc_lock()


def test_capabilities_that_cannot_be_read() -> None:
    """An attribute of no bytes, which Python's os.setxattr writes for one, makes a file that nobody can execute."""
    set_xattr(b"")
    for check_mode in (True, False):
        answered = run(iommufd_host_record, capabilities=[str(EMULATOR)], _ansible_check_mode=check_mode)
        assert answered["failed"]
        assert f"Take them away (setcap -r {EMULATOR})." in answered["msg"]
    assert not RECORD.parent.exists()
    shell("setcap", "-r", str(EMULATOR))
    assert record(capabilities=[str(EMULATOR)])["capabilities"][str(EMULATOR)]["ours"]
