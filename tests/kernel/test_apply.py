# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What iommufd_host_apply makes, remembers and puts back, on a host whose root, systemd and udev are real."""

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
from ansible_collections.virt.iommufd.plugins.module_utils import _child, _wanted
from ansible_collections.virt.iommufd.plugins.module_utils._capabilities import with_ipc_lock
from ansible_collections.virt.iommufd.plugins.module_utils._record import lock_record
from ansible_collections.virt.iommufd.plugins.modules import iommufd_host_apply
from ansible_collections.virt.iommufd.tests.kernel.conftest import in_this_process
from ansible_collections.virt.iommufd.tests.kernel.harness import CAPABILITIES, VM, Answer, as_user, change_user
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

pytestmark = pytest.mark.once

RECORD = Path("/var/lib/iommufd_host/record.json")
# On the file system that the emulators are on.
PLACE = Path("/opt/iommufd-host-apply-test")
EMULATOR = PLACE / "emulator"
SYSTEMD = Path("/etc/systemd/system")
RULE = Path("/etc/udev/rules.d/80-iommufd-host-apply-test.rules")
SITES_RULE = RULE.with_name("70-iommufd-host-apply-test.rules")
GRANT = "iommufd-host-apply-test"
QEMU_CONF = Path("/etc/libvirt/qemu.conf")
BEGIN, END = "# BEGIN iommufd_host\n", "# END iommufd_host\n"
NODE = "/dev/vfio/devices/vfio2"
PROGRAM = PLACE / "program"
# Of a driver that no device here has.
MODULE = "dummy"

XATTR = "security.capability"
IPC_LOCK, NET_RAW = 1 << CAPABILITIES["ipc_lock"], 1 << 13


def plain(permitted: int, inheritable: int = 0, effective: bool = True) -> bytes:
    """The extended attribute as setcap writes it."""
    return struct.pack("<5I", 0x02000000 | effective, permitted, inheritable, 0, 0)


def apply(**options: Any) -> Answer:
    """The module's answer, which must not be a failure."""
    answered = run(iommufd_host_apply, **options)
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
    run(iommufd_host_apply)
    for name in (f"{GRANT}.path", f"{GRANT}.service"):
        subprocess.run(["systemctl", "stop", name], check=False, capture_output=True, timeout=120)
    subprocess.run(["modprobe", "--remove", MODULE], check=True, capture_output=True, timeout=120)
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


def file(path: Path, content: str) -> dict[str, str]:
    return {"path": str(path), "content": content}


def unit_files(path: Path = EMULATOR) -> dict[str, Any]:
    """A service that grants, as often as something happens to the file."""
    command = f"/bin/sh -c 'getcap {path} | grep -q ipc_lock || setcap cap_ipc_lock+ep {path}'"
    watch = f"[Path]\nPathChanged={path}\n[Install]\nWantedBy=paths.target multi-user.target\n"
    return {
        "files": [
            file(SYSTEMD / f"{GRANT}.path", watch),
            file(SYSTEMD / f"{GRANT}.service", f"[Service]\nType=oneshot\nExecStart={command}\n"),
        ],
        "units": [f"{GRANT}.path"],
    }


def rule() -> dict[str, Any]:
    """A rule of udev, and the nodes that it is about."""
    text = 'SUBSYSTEM=="vfio-dev", GROUP="tape", MODE="0664"\n'
    return {"files": [file(RULE, text)], "nodes": ["/dev/vfio/devices/*"], "group": "tape", "mode": "0664"}


def wanted() -> dict[str, Any]:
    """One of each kind and more."""
    return {
        **rule(),
        **unit_files(),
        "files": [
            *unit_files()["files"],
            file(SYSTEMD / "ssh.service.d" / "50-iommufd-host-apply-test.conf", "[Service]\nLimitMEMLOCK=77M\n"),
            *rule()["files"],
            file(Path("/etc/iommufd-host-apply-test/a/b.conf"), "of the role\n"),
            file(Path("/etc/hostname"), "of-the-role\n"),
            {"path": str(PROGRAM), "program": "iommufd-host-grant"},
        ],
        "modules": ["vfio-pci", MODULE],
        "capabilities": [str(EMULATOR)],
        "blocks": [{"path": str(QEMU_CONF), "devices": ["/dev/iommu"]}],
    }


def is_loaded() -> bool:
    return MODULE in Path("/proc/modules").read_text().split()


def paths_of(rows: list[dict[str, Any]], kind: str) -> list[str]:
    return [each["path"] for each in rows if each["kind"] == kind]


def test_a_host_there_and_back() -> None:
    set_xattr(plain(0, effective=False))
    before = (tree(Path("/etc"), PLACE), units(), node())
    foretold = apply(_ansible_check_mode=True, **wanted())
    assert (tree(Path("/etc"), PLACE), units(), node(), is_loaded()) == (*before, False)
    first = apply(**wanted())
    assert (first["made"], first["recorded"]) == (foretold["made"], foretold["recorded"])
    assert paths_of(first["made"], "module") == [MODULE]
    assert paths_of(first["made"], "file") == [each["path"] for each in wanted()["files"]]
    assert first["capabilities"][str(EMULATOR)]["ipc_lock"]
    # By what the system says of itself.
    assert is_loaded()
    assert xattr() == plain(IPC_LOCK)
    assert has_ipc_lock()
    assert node() == (0o664, 0, grp.getgrnam("tape").gr_gid)
    for each in wanted()["files"][:-1]:
        path = Path(each["path"])
        assert (path.read_text(), path.stat().st_mode & 0o7777, path.stat().st_uid) == (each["content"], 0o644, 0)
    assert PROGRAM.stat().st_mode & 0o7777 == 0o755
    # It cannot be given what is no executable.
    assert subprocess.run([PROGRAM, "/etc/passwd"], check=False, capture_output=True, timeout=120).returncode == 1
    assert shell("systemctl", "show", "--property=LimitMEMLOCK", "ssh.service") == f"LimitMEMLOCK={77 * 2**20}\n"
    told = shell("systemctl", "show", "--property=UnitFileState,ActiveState", f"{GRANT}.path").split()
    assert sorted(told) == ["ActiveState=active", "UnitFileState=enabled"]
    # QEMU's configuration, as the package brings it, sets nothing.
    block, rest = QEMU_CONF.read_text().split(END)
    assert (block.splitlines()[0] + "\n", rest) == (BEGIN, before[0][str(QEMU_CONF)][3].decode())
    assert '"/dev/kvm",' in block
    assert '"/dev/iommu",' in block
    changed = tree(Path("/etc"), PLACE)
    second = apply(**wanted())
    assert (second["changed"], second["recorded"], second["remembered"]) == (False, [], first["remembered"])
    assert tree(Path("/etc"), PLACE) == changed
    foretold = apply(_ansible_check_mode=True)
    assert (tree(Path("/etc"), PLACE), RECORD.exists()) == (changed, True)
    back = apply()
    assert back["changed"]
    assert back["put_back"] == foretold["put_back"]
    assert (tree(Path("/etc"), PLACE), units(), node()) == before
    assert not has_ipc_lock()
    assert not RECORD.parent.exists()
    # What udev has read is what is there now.
    shell("udevadm", "trigger", "--settle", "--action=change", "--subsystem-match=vfio-dev")
    assert node() == before[2]
    assert apply()["put_back"] == []


def test_what_somebody_has_changed_is_made_again() -> None:
    apply(**wanted())
    Path("/etc/hostname").chmod(0o600)
    os.chmod(NODE, 0o600)
    shell("systemctl", "stop", f"{GRANT}.path")
    PROGRAM.write_text("#!/bin/sh\n")
    again = apply(**wanted())
    assert paths_of(again["made"], "file") == ["/etc/hostname", str(PROGRAM)]
    assert [each["content"] for each in again["made"] if each["kind"] == "file"] == [False, True]
    assert paths_of(again["made"], "unit") == [f"{GRANT}.path"]
    assert node()[0] == 0o664
    assert shell("systemctl", "is-active", f"{GRANT}.path") == "active\n"
    assert not apply(**wanted())["changed"]


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
    first = apply(capabilities=[str(EMULATOR)])
    assert (first["changed"], paths_of(first["made"], "capability")) == (True, [str(EMULATOR)])
    assert first["capabilities"][str(EMULATOR)]["ours"]
    granted = with_ipc_lock(before)
    assert xattr() == granted
    assert has_ipc_lock()
    second = apply(capabilities=[str(EMULATOR)])
    assert (second["changed"], second["made"]) == (False, [])
    assert second["capabilities"][str(EMULATOR)]["ipc_lock"]
    assert apply()["changed"]
    assert xattr() == before
    assert not has_ipc_lock()
    if before is None:
        # It is what setcap writes.
        shell("setcap", "cap_ipc_lock+ep", str(EMULATOR))
        assert xattr() == granted


@pytest.mark.parametrize("granted", [plain(IPC_LOCK | NET_RAW), plain(IPC_LOCK | NET_RAW, effective=False)])
def test_what_somebody_added_stays(granted: bytes) -> None:
    apply(capabilities=[str(EMULATOR)])
    set_xattr(granted)
    assert apply()["changed"]
    assert xattr() == struct.pack("<5I", struct.unpack_from("<I", granted)[0], NET_RAW, 0, 0, 0)


def test_what_somebody_else_granted_stays() -> None:
    shell("setcap", "cap_ipc_lock=ep", str(EMULATOR))
    answered = apply(capabilities=[str(EMULATOR)])
    assert answered["capabilities"][str(EMULATOR)] == {"real_path": str(EMULATOR), "ipc_lock": True, "ours": False}
    assert not apply()["changed"]
    assert has_ipc_lock()


def upgrade(value: bytes | None = None) -> None:
    """As dpkg does: a new file in the place of the old one."""
    new = EMULATOR.with_suffix(".dpkg-new")
    shutil.copy2("/usr/bin/cat", new)
    set_xattr(value, new)
    new.rename(EMULATOR)


def test_an_upgrade_of_the_package() -> None:
    apply(capabilities=[str(EMULATOR)])
    # This version comes with a capability of its own.
    upgrade(plain(NET_RAW))
    again = apply(capabilities=[str(EMULATOR)])
    assert [each["path"] for each in again["recorded"]] == [str(EMULATOR)]
    assert paths_of(again["made"], "capability") == [str(EMULATOR)]
    assert xattr() == with_ipc_lock(plain(NET_RAW))
    assert apply()["changed"]
    assert xattr() == plain(NET_RAW)
    # With another upgrade, or with its removal, there is nothing to take.
    apply(capabilities=[str(EMULATOR)])
    upgrade()
    assert not apply()["changed"]
    apply(capabilities=[str(EMULATOR)])
    EMULATOR.rename(PLACE / "gone")
    assert not apply()["changed"]


def wait_for(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (ended := done()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return ended


def test_a_unit_that_stays_does_not_grant_it_again() -> None:
    apply(capabilities=[str(EMULATOR)], **unit_files())
    # It is at work: it grants what is taken away.
    set_xattr(None)
    assert wait_for(has_ipc_lock, 60)
    shell("systemctl", "stop", f"{GRANT}.service")
    answered = apply(**unit_files(PLACE / "other"))
    assert f"{GRANT}.path is stopped until it is started with what it has to do now." in [
        each["text"] for each in answered["put_back"]
    ]
    assert paths_of(answered["made"], "unit") == [f"{GRANT}.path"]
    assert shell("systemctl", "is-active", f"{GRANT}.path") == "active\n"
    assert not wait_for(has_ipc_lock, 3)


def test_a_unit_whose_file_somebody_has_removed() -> None:
    before = tree(Path("/etc"))
    apply(**unit_files())
    (SYSTEMD / f"{GRANT}.path").unlink()
    assert apply()["changed"]
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
        apply(**rule())
        (driver / "bind").write_text(device.name)
        shell("udevadm", "settle")
        assert node() == (0o664, 0, grp.getgrnam("tape").gr_gid)
        again = apply(**rule())
        assert (again["changed"], again["recorded"]) == (False, [])
        assert apply()["changed"]
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
            target, names = (iommufd_host_apply, ("run_command",)) if commands else (os, CALLS)
            for name in names:
                setattr(target, name, counted(getattr(target, name)))
            answered = run(iommufd_host_apply, **options)
            os._exit(3 if answered.get("failed") else 0)
        finally:
            os._exit(4)
    _pid, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


SOME: dict[str, Any] = {
    "files": [file(PLACE / "old", "of the role"), file(PLACE / "a" / "b" / "new", "of the role")],
    "capabilities": [str(EMULATOR)],
    "blocks": [{"path": str(PLACE / name), "devices": ["/dev/iommu"]} for name in ("conf", "c/new")],
    "nodes": [NODE],
}
SOME_PATHS = [*(each["path"] for name in ("files", "blocks") for each in SOME[name]), str(EMULATOR), NODE]


def items_in_record() -> set[str]:
    return {item["path"] for item in json.loads(RECORD.read_text())["items"]} if RECORD.exists() else set()


def state_of(path: str) -> Any:
    if path == NODE:
        return node()
    return tree(Path(path)).get(path) if os.path.lexists(path) else None


def rebind(*devices: str) -> None:
    """Has VFIO let go of PCI devices, and take them in this order. The kernel gives each the lowest free number."""
    driver = Path("/sys/bus/pci/drivers/vfio-pci")
    for act in ("unbind", "bind"):
        for each in devices:
            (driver / act).write_text(each)
    shell("udevadm", "settle")


def test_another_device_gets_the_name() -> None:
    """What the node of one was open to is nothing that the next one's node is to be open to."""
    first, second = "/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"
    devices = [Path(f"/sys/class/vfio-dev/vfio{number}/device").resolve().name for number in (0, 1)]
    before = [os.stat(each).st_mode & 0o777 for each in (first, second)]
    assert before[0] != 0o600
    try:
        apply(**{**rule(), "nodes": ["/dev/vfio/devices/vfio*"]})
        rebind(*reversed(devices))
        assert Path("/sys/class/vfio-dev/vfio0/device").resolve().name == devices[1]
        apply()
        assert not RECORD.exists()
        assert os.stat(first).st_mode & 0o777 == 0o600
    finally:
        rebind(*devices)
        for each, mode in zip((first, second), before):
            os.chmod(each, mode)


def test_cut_off_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each of its calls, the record names all that is not back, and the next run makes it good."""
    # Its children only look, and are not there when it is killed. There would be four in each of hundreds of runs.
    for place in (_child, _wanted):
        monkeypatch.setattr(place, "in_child", in_this_process)
    write(PLACE / "old", "old")
    write(PLACE / "conf", "a = 1\nb = 2")
    os.setxattr(PLACE / "old", "user.of.the.file", b"value")
    set_xattr(plain(0, effective=False))
    before = tree(PLACE), node(), {path: state_of(path) for path in SOME_PATHS}

    def check(when: str) -> None:
        assert (tree(PLACE), node()) == before[:2], when
        assert not RECORD.parent.exists(), when

    def not_back() -> set[str]:
        return {path for path in SOME_PATHS if state_of(path) != before[2][path]}

    apply(**SOME)
    made = tree(PLACE)
    apply()
    at, killed = 0, True
    while killed:
        killed = cut_off(at, False, **SOME)
        assert not_back() <= items_in_record(), f"on, call {at}"
        if at % 2:
            apply(**SOME)
            assert tree(PLACE) == made, f"on, call {at}"
            assert items_in_record() == set(SOME_PATHS)
        apply()
        check(f"on, call {at}")
        at += 1
    assert at > 20
    at, killed = 0, True
    while killed:
        apply(**SOME)
        # As a rule of the caller's would.
        os.chmod(NODE, 0o664)
        killed = cut_off(at, False)
        assert not_back() <= items_in_record(), f"undo, call {at}"
        apply()
        check(f"undo, call {at}")
        at += 1
    assert at > 20


def test_cut_off_before_systemd_is_told() -> None:
    before = tree(Path("/etc")), units()
    options = {"capabilities": [str(EMULATOR)], **unit_files()}
    # It shows the unit and enables it before that.
    assert cut_off(2, True, **options)
    apply(**options)
    assert shell("systemctl", "is-active", f"{GRANT}.path") == "active\n"
    shell("systemctl", "stop", f"{GRANT}.service")
    # It shows, disables, stops and forgets the unit before that.
    assert cut_off(6, True)
    apply()
    assert (tree(Path("/etc")), units(), xattr()) == (*before, None)
    assert not wait_for(has_ipc_lock, 1)


def refused(why: str, **options: Any) -> None:
    before = tree(PLACE, RECORD.parent)
    for check_mode in (True, False):
        answered = run(iommufd_host_apply, _ansible_check_mode=check_mode, **options)
        assert answered["failed"]
        assert why in answered["msg"]
        assert tree(PLACE, RECORD.parent) == before


def test_whose_record_is_believed() -> None:
    apply(capabilities=[str(EMULATOR)])
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
    with lock_record(str(RECORD)):
        refused("Another run works with the record")
    assert apply()["changed"]
    assert xattr() is None


def test_an_ordinary_user() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            change_user(VM)
            os.write(writer, json.dumps(run(iommufd_host_apply)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        answered = json.loads(stream.read())
    os.waitpid(child, 0)
    assert answered["failed"]
    assert answered["msg"] == (
        f"It takes root to change a host and to put it back, and this is uid {VM}. Run the task as root (become: true)."
    )


# linux/fs.h
_FS_IOC_SETFLAGS = 0x40086602
_IMMUTABLE = 0x10


def set_flags(path: Path, flags: int) -> None:
    with path.open() as stream:
        fcntl.ioctl(stream, _FS_IOC_SETFLAGS, struct.pack("@l", flags))


def test_a_file_that_cannot_be_removed() -> None:
    path = PLACE / "kept"
    apply(files=[file(path, "")], capabilities=[str(EMULATOR)])
    set_flags(path, _IMMUTABLE)
    try:
        answered = run(iommufd_host_apply)
        assert answered["failed"]
        assert f"{path} could not be put back: EPERM: Operation not permitted." in answered["msg"]
        assert {each["path"] for each in answered["remembered"]} == {str(path), str(EMULATOR)}
        assert has_ipc_lock()
    finally:
        set_flags(path, 0)
    assert apply()["changed"]
    assert not path.exists()
    assert not has_ipc_lock()


def test_capabilities_that_cannot_be_read() -> None:
    """An attribute of no bytes, which Python's os.setxattr writes for one, makes a file that nobody can execute."""
    set_xattr(b"")
    for check_mode in (True, False):
        answered = run(iommufd_host_apply, capabilities=[str(EMULATOR)], _ansible_check_mode=check_mode)
        assert answered["failed"]
        assert f"Take them away (setcap -r {EMULATOR})." in answered["msg"]
    assert not RECORD.parent.exists()
    shell("setcap", "-r", str(EMULATOR))
    assert apply(capabilities=[str(EMULATOR)])["capabilities"][str(EMULATOR)]["ours"]
