# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the host supports, as the kernel, the files and the programs themselves tell it."""

from __future__ import annotations

import glob
import grp
import json
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    VM,
    Answer,
    Vmm,
    as_user,
    change_user,
    enter_user_namespace,
    mount_privately,
)
from ansible_collections.virt.iommufd.tests.kernel.info import limits, look, look_within
from ansible_collections.virt.iommufd.tests.kernel.test_callers import yama
from ansible_collections.virt.iommufd.tests.kernel.test_host import NODE, no_iommufd, node

__all__ = ("no_iommufd", "node", "yama")

RELEASE = os.uname().release
NEEDED = ["module", "device", "iommu", "vfio", "bound", "cdev"]
AS_VM = partial(change_user, VM)


def modules() -> set[str]:
    return {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}


def folder(path: str) -> list[str]:
    return sorted(os.listdir(path))


def permissions(path: Path) -> dict[str, str]:
    status = path.stat()
    owner, group = pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid).gr_name
    return {"mode": oct(stat.S_IMODE(status.st_mode))[2:].zfill(4), "owner": owner, "group": group}


def test_a_host_with_everything(container_is_iommufd: bool) -> None:
    answered = look("host")
    host = answered["host"]
    assert host["legacy_by_iommufd"] is container_is_iommufd
    assert [(each["what"], each["msg"]) for each in host["readiness"] if each["ready"]] == [
        (each, "") for each in NEEDED
    ]
    assert host["limits_of_view"] == []
    assert host["kernel"] == RELEASE
    assert (host["module"], "iommufd" in modules()) == ("loaded", True)
    rdev = Path("/sys/class/misc/iommu/dev").read_text().strip()
    assert host["device"] == {"path": "/dev/iommu", "present": True, "rdev": rdev, **permissions(NODE)}
    assert host["options"] == {"rlimit_mode": {"readable": True, "settable": True}}
    capabilities = ["cap_ipc_lock", "cap_sys_ptrace", "cap_sys_resource"]
    assert host["caller"] == {"uid": 0, "initial_user_namespace": True, "capabilities": capabilities}
    assert host["iommus"] == folder("/sys/class/iommu") != []
    groups = {
        int(each): folder(f"/sys/kernel/iommu_groups/{each}/devices") for each in folder("/sys/kernel/iommu_groups")
    }
    assert host["iommu_groups"] == [{"id": number, "devices": groups[number]} for number in sorted(groups)]
    for each in host["vfio_devices"]:
        name = each["node"].rpartition("/")[2]
        device = Path(f"/sys/class/vfio-dev/{name}/device").resolve()
        group = int((device / "iommu_group").resolve().name)
        path = Path("/dev/vfio/devices") / name
        assert each == {"node": str(path), "address": device.name, "iommu_group": group, **permissions(path)}
    assert [each["node"] for each in host["vfio_devices"]] == sorted(glob.glob("/dev/vfio/devices/*")) != []
    emulators = {os.path.realpath(each) for each in glob.glob("/usr/bin/qemu-system-*")}
    assert {each["path"] for each in host["qemu"]} == emulators
    assert all(each["present"] and each["version"] is None for each in host["qemu"])


def test_permissions_of_the_node() -> None:
    before = NODE.stat()
    try:
        os.chown(NODE, VM, 4000001)
        NODE.chmod(0o1640)
        device = look("host")["host"]["device"]
        assert (device["mode"], device["owner"], device["group"]) == ("1640", "vm", "4000001")
    finally:
        os.chown(NODE, before.st_uid, before.st_gid)
        NODE.chmod(stat.S_IMODE(before.st_mode))


def test_an_ordinary_user() -> None:
    host = look_within(AS_VM, "host")["host"]
    assert host["options"] == {"rlimit_mode": {"readable": True, "settable": False}}
    assert host["caller"] == {"uid": VM, "initial_user_namespace": True, "capabilities": []}


def test_an_ordinary_user_who_may_not_open_the_node() -> None:
    before = stat.S_IMODE(NODE.stat().st_mode)
    try:
        NODE.chmod(0o600)
        answered = look_within(AS_VM, "host")
    finally:
        NODE.chmod(before)
    assert answered["host"]["options"] == {"rlimit_mode": {"readable": None, "settable": None}}
    assert answered["host"]["device"]["mode"] == "0600"
    assert "/dev/iommu cannot be opened by uid 1001 (EACCES: Permission denied)" in limits(answered)["options"]


def test_root_of_a_user_namespace() -> None:
    host = look_within(enter_user_namespace, "host")["host"]
    assert host["caller"]["initial_user_namespace"] is False
    assert host["caller"]["capabilities"] == ["cap_ipc_lock", "cap_sys_ptrace", "cap_sys_resource"]
    assert host["options"]["rlimit_mode"] == {"readable": True, "settable": False}


@pytest.mark.parametrize("scope", [0, 1, 2])
def test_yama(yama: Path, scope: int) -> None:
    yama.write_text(str(scope))
    assert look("host")["host"]["yama_ptrace_scope"] == scope


def test_a_kernel_without_iommufd(no_iommufd: None, tmp_path: Path) -> None:
    before = modules()
    # One that was made by hand stays, when the module's own goes.
    NODE.unlink(missing_ok=True)
    answered = look("host processes users")
    host = answered["host"]
    assert host["module"] == "loadable"
    nothing = {"present": False, "rdev": None, "mode": None, "owner": None, "group": None}
    assert host["device"] == {"path": "/dev/iommu", **nothing}
    assert host["options"] == {"rlimit_mode": {"readable": None, "settable": None}}
    assert host["vfio_devices"] == answered["processes"] == answered["users"] == []
    # Modules that are not here at all, and those of a kernel that has no iommufd.
    hidden = look_within(partial(mount_privately, str(tmp_path), "/usr/lib/modules"), "host")
    assert hidden["host"]["module"] is None
    assert f"/lib/modules/{RELEASE} is not here" in limits(hidden)["module"]
    (tmp_path / RELEASE).mkdir()
    dep = Path(f"/lib/modules/{RELEASE}/modules.dep").read_text()
    without = [line for line in dep.splitlines(keepends=True) if "/iommufd.ko" not in line.partition(":")[0]]
    assert len(without) == len(dep.splitlines()) - 1
    (tmp_path / RELEASE / "modules.dep").write_text("".join(without))
    absent = look_within(partial(mount_privately, str(tmp_path), "/usr/lib/modules"), "host")
    assert absent["host"]["module"] == "absent"
    # A node that would have the kernel load a module, should anybody open it.
    os.mknod(NODE, stat.S_IFCHR | 0o666, os.makedev(10, 200))
    try:
        assert look("host")["host"]["device"]["present"] is False
        assert modules() == before
        with open(NODE, "rb"):
            assert "tun" in modules() - before
    finally:
        NODE.unlink()
        subprocess.run(["modprobe", "--remove", "tun"], check=True)


def lacking(host: Answer) -> dict[str, str]:
    """What the host is said to lack, and the words."""
    return {each["what"]: each["msg"] for each in host["readiness"] if each["ready"] is not True}


def test_a_host_that_lacks_something(no_iommufd: None, container_is_iommufd: bool) -> None:
    """Thing after thing is done as the module says, until nothing is left."""
    drivers = Path("/sys/bus/pci/drivers/vfio-pci")
    host = look("host")["host"]
    assert list(lacking(host)) == ["module", "device", "vfio", "bound"]
    assert host["legacy_by_iommufd"] is None
    assert "modprobe iommufd" in lacking(host)["module"]
    subprocess.run(["modprobe", "iommufd"], check=True)
    assert list(lacking(look("host")["host"])) == ["vfio", "bound"]
    assert "modprobe vfio-pci" in lacking(host)["vfio"]
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    host = look("host")["host"]
    assert list(lacking(host)) == ["bound"]
    assert host["legacy_by_iommufd"] is container_is_iommufd
    (drivers / "new_id").write_text("1234 11e8")
    subprocess.run(["udevadm", "settle"], check=True)
    assert lacking(look("host")["host"]) == {}
    # A node that is not there.
    [path, *_others] = sorted(Path("/dev/vfio/devices").iterdir())
    device = path.stat().st_rdev
    path.unlink()
    try:
        address = Path(f"/sys/class/vfio-dev/{path.name}/device").resolve().name
        assert f"no node below /dev/vfio/devices for {address}:" in lacking(look("host")["host"])["cdev"]
    finally:
        os.mknod(path, stat.S_IFCHR | 0o600, device)
    for each in drivers.glob("0000:*"):
        (drivers / "unbind").write_text(each.name)
    (drivers / "remove_id").write_text("1234 11e8")


@pytest.mark.parametrize("kind", ["removed", "a regular file", "another device", "a FIFO", "a link to it"])
def test_another_thing_at_the_place_of_the_node(vmm: Vmm, node: Path, kind: str) -> None:
    rdev = node.stat().st_rdev
    before = modules()
    node.unlink()
    if kind == "a regular file":
        node.write_text("not a device")
    elif kind == "another device":
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 200))
    elif kind == "a FIFO":
        os.mkfifo(node)
    elif kind == "a link to it":
        os.mknod("/dev/kernel-test", stat.S_IFCHR, rdev)
        node.symlink_to("/dev/kernel-test")
    try:
        answered = look("host processes")
    finally:
        Path("/dev/kernel-test").unlink(missing_ok=True)
    present = kind == "a link to it"
    device = answered["host"]["device"]
    assert (device["present"], device["rdev"]) == (present, f"{os.major(rdev)}:{os.minor(rdev)}")
    assert (device["mode"] is None) == (kind not in ("another device", "a link to it"))
    assert answered["host"]["module"] == "loaded"
    assert answered["host"]["options"]["rlimit_mode"]["readable"] is (True if present else None)
    words = "There is no /dev/iommu" if kind == "removed" else "/dev/iommu is not the kernel's iommufd"
    assert present or words in limits(answered)["options"]
    # Who holds one does not depend on it.
    assert [each["pid"] for each in answered["processes"]] == [vmm.pid]
    assert modules() == before


@pytest.fixture
def store() -> Iterator[Path]:
    """A folder where files keep their capabilities and may be executed, by anybody."""
    path = Path("/var/lib/kernel-test")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def has_ipc_lock(program: Path) -> bool:
    """Whether the program, a grep, really has the capability when an ordinary user executes it."""
    command = [*as_user(VM), str(program), "CapEff", "/proc/self/status"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return bool(int(done.stdout.split()[1], 16) >> 14 & 1)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([], None),
        (["cap_ipc_lock+ep"], (["cap_ipc_lock"], [], True, 0)),
        (["cap_ipc_lock,cap_net_admin+eip"], (["cap_net_admin", "cap_ipc_lock"],) * 2 + (True, 0)),
        (["cap_ipc_lock+p"], (["cap_ipc_lock"], [], False, 0)),
        (["cap_ipc_lock+ei"], ([], ["cap_ipc_lock"], True, 0)),
        (["cap_net_admin+ep"], (["cap_net_admin"], [], True, 0)),
        (["-n", "100000", "cap_ipc_lock+ep"], (["cap_ipc_lock"], [], True, 100000)),
        (["="], ([], [], False, 0)),
    ],
)
def test_capabilities_of_an_emulator(
    store: Path, given: list[str], shown: tuple[list[str], list[str], bool, int] | None
) -> None:
    program = store / "qemu"
    shutil.copy("/bin/grep", program)
    if given:
        subprocess.run(["setcap", *given, str(program)], check=True)
    link = store / "link"
    link.symlink_to("qemu")
    [row] = [each for each in look("host", emulators=[str(link)])["host"]["qemu"] if each["path"] == str(program)]
    fields = ("permitted", "inheritable", "effective", "root_uid")
    assert row["file_capabilities"] == (None if shown is None else dict(zip(fields, shown)))
    assert row["cap_ipc_lock"] == has_ipc_lock(program)


def test_an_emulator_on_a_mount_that_has_capabilities_ignored(store: Path) -> None:
    program = store / "qemu"
    shutil.copy("/bin/grep", program)
    subprocess.run(["setcap", "cap_ipc_lock+ep", str(program)], check=True)
    try:
        for lifts, options in ((True, "bind"), (None, "remount,bind,nosuid")):
            subprocess.run(["mount", "-o", options, str(store), str(store)], check=True)
            rows = look("host", emulators=[str(program)])["host"]["qemu"]
            [row] = [each for each in rows if each["path"] == str(program)]
            assert (row["cap_ipc_lock"], has_ipc_lock(program)) == (lifts, bool(lifts))
    finally:
        subprocess.run(["umount", str(store)], check=True)


def test_emulators_that_are_none(store: Path) -> None:
    (store / "folder").mkdir()
    (store / "file").write_text("")
    (store / "dangling").symlink_to("nowhere")
    os.mkfifo(store / "fifo", 0o777)
    names = ["folder", "file", "dangling", "fifo", "missing", "\x1b[31mred\u202e\n"]
    rows = look("host", emulators=[str(store / name) for name in names])["host"]["qemu"]
    mine = [each for each in rows if each["path"].startswith(str(store))]
    shown = ["folder", "file", "nowhere", "fifo", "missing", r"\x1b[31mred\u202e\n"]
    assert [each["path"] for each in mine] == [str(store / name) for name in shown]
    assert not any(each["present"] for each in mine)


def test_an_emulator_that_the_caller_may_not_look_at(store: Path) -> None:
    program = store / "qemu"
    shutil.copy("/bin/grep", program)
    subprocess.run(["setcap", "cap_ipc_lock+ep", str(program)], check=True)
    store.chmod(0o700)
    answered = look_within(AS_VM, "host", emulators=[str(program)])
    [row] = [each for each in answered["host"]["qemu"] if each["path"] == str(program)]
    assert row["cap_ipc_lock"] is None
    assert str(program) in limits(answered)["emulators"]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_nothing_is_executed_unless_it_is_asked_for(store: Path) -> None:
    given = [script(store / "qemu", f"touch {store}/executed; echo 'QEMU emulator version 9.9.9 (Debian)'")]
    answered = look("host", emulators=given)
    assert [each["version"] for each in answered["host"]["qemu"] if each["path"] == given[0]] == [None]
    assert not (store / "executed").exists()


VERSIONS = {
    "good": ("echo 'QEMU emulator version 9.9.9 (Debian)'", "9.9.9"),
    "hostile": (r"printf 'version 1\033[31m\342\200\256\377\nversion 2'", r"1\x1b[31m\u202e\xff"),
    "mute": ("exit 0", None),
    "broken": (r"printf 'no \033[31m\n' >&2; exit 3", None),
    "dead": ("kill -9 $$", None),
    "no program": ("#", None),
}


@pytest.fixture(scope="module")
def emulators() -> Iterator[tuple[Path, Answer]]:
    """The answer with all that takes long, for emulators of many kinds."""
    path = Path("/var/lib/kernel-test-emulators")
    path.mkdir()
    given = [script(path / name, text) for name, (text, _version) in VERSIONS.items()]
    (path / "no program").write_bytes(b"\x7fELF, but not really")
    try:
        # The module waits for half a minute, and a daemon that is only just started may take longer here.
        subprocess.run(["virsh", "domcapabilities"], stdout=subprocess.DEVNULL, check=True)
        yield path, look("emulators", emulators=given)
    finally:
        shutil.rmtree(path)


def test_versions_of_emulators(emulators: tuple[Path, Answer]) -> None:
    folder, answered = emulators
    rows = {each["path"]: each["version"] for each in answered["host"]["qemu"]}
    for name, (_text, version) in VERSIONS.items():
        assert rows.pop(str(folder / name)) == version
        assert version or f"{folder / name} --version gives no version: exit code" in limits(answered)["emulators"]
    for path, version in rows.items():
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        assert shown.split()[3] == version


def test_what_libvirt_offers(emulators: tuple[Path, Answer]) -> None:
    shown = subprocess.run(["virsh", "domcapabilities"], capture_output=True, text=True, check=True).stdout
    libvirt = emulators[1]["host"]["libvirt"]
    says_so = shown.partition("<enum name='iommufd'>")[2].partition("</enum>")[0]
    assert (libvirt["domain_capabilities_iommufd"] is True) == ("<value>yes</value>" in says_so)


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=True).stdout


def libvirt() -> Answer:
    found: Answer = look("host")["host"]["libvirt"]
    return found


def check_libvirt(found: Answer, may: bool) -> None:
    """The version is that of its own program; it sets the mode since 12.1, with the capability that it takes."""
    version = subprocess.run(["virsh", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    assert (found["version"], found["cap_sys_resource"]) == (version, may)
    sets = [int(each) for each in version.split(".")][:2] >= [12, 1]
    assert found["sets_rlimit_mode"] is (sets and may)
    if not sets:
        assert found["reason"].startswith(f"libvirt {version} does not set per-process accounting: 12.1.0 is the first")
    elif not may:
        assert "without CAP_SYS_RESOURCE" in found["reason"]
    pid = int(systemctl("show", "-P", "MainPID", found["unit"]))
    assert found["pid"] == (pid or None)
    if pid:
        effective = Path(f"/proc/{pid}/status").read_text().partition("CapEff:")[2].split()[0]
        assert may == bool(int(effective, 16) >> 24 & 1)


# systemd takes seconds to read its units again, so this is one test.
def test_the_daemon_of_libvirt() -> None:
    unit = libvirt()["unit"]
    assert unit in ("libvirtd.service", "virtqemud.service")
    drop_in = Path(f"/run/systemd/system/{unit}.d/kernel-test.conf")
    drop_in.parent.mkdir(exist_ok=True)
    try:
        for setting in ("", "CapabilityBoundingSet=~CAP_SYS_RESOURCE", "PrivateUsers=yes"):
            if setting:
                drop_in.write_text(f"[Service]\n{setting}\n")
                systemctl("daemon-reload")
            # While its socket listens, all the same.
            systemctl("stop", unit)
            found = libvirt()
            assert found["pid"] is None
            check_libvirt(found, may=not setting)
            assert found["taken_by"] == [{"path": str(drop_in), "line": 2, "text": setting}] * bool(setting)
            if setting != "PrivateUsers=yes":
                systemctl("start", unit)
                found = libvirt()
                assert found["pid"]
                check_libvirt(found, may=not setting)
    finally:
        drop_in.unlink(missing_ok=True)
        systemctl("daemon-reload")
        systemctl("stop", unit)


def test_a_host_without_systemd_and_libvirt(tmp_path: Path) -> None:
    (tmp_path / "systemctl").write_text("#!/bin/sh\nprintf 'no \\033[31mbus\\n' >&2\nexit 1\n")
    (tmp_path / "systemctl").chmod(0o755)
    answered = look_within(partial(mount_privately, str(tmp_path / "systemctl"), "/usr/bin/systemctl"), "host")
    found = answered["host"]["libvirt"]
    assert (found["unit"], found["pid"], found["cap_sys_resource"], found["sets_rlimit_mode"]) == (None,) * 4
    assert r"no \x1b[31mbus" in limits(answered)["libvirt"]
    assert json.dumps(answered).isascii()


def test_what_an_ordinary_user_sees_of_libvirt(start: Start) -> None:
    unit = libvirt()["unit"]
    systemctl("start", unit)
    try:
        answered = look_within(AS_VM, "host")
        found = answered["host"]["libvirt"]
        check_libvirt(found, may=True)
        # Its memory map is closed to others.
        assert "The version that the running daemon has mapped" in limits(answered)["libvirt"]
    finally:
        systemctl("stop", unit)
