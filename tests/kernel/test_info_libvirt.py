# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told of libvirt by its files and its limits, as its daemon and its domains themselves show it."""

from __future__ import annotations

import glob
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._command import run_command
from ansible_collections.virt.iommufd.plugins.module_utils._libvirt import PROPERTIES, daemon_unit_of
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import show_units
from ansible_collections.virt.iommufd.plugins.module_utils._unit_files import find_lack, read_lines
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, MIB, VM, Answer, mount_privately
from ansible_collections.virt.iommufd.tests.kernel.info import limits, look, look_within, status_of
from ansible_collections.virt.iommufd.tests.kernel.test_domains import knows_iommufd, virsh
from ansible_collections.virt.iommufd.tests.kernel.test_info_host import libvirt, systemctl
from ansible_collections.virt.iommufd.tests.kernel.test_info_units import USER

__all__ = ("knows_iommufd",)

CONF = Path("/etc/libvirt/qemu.conf")
NAME = "kernel-test-defined"
QEMU = "/usr/bin/qemu-system-x86_64"
DOMAIN = f"""
<domain type='qemu'>
  <name>{NAME}</name>
  <memory unit='MiB'>16</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><emulator>{QEMU}</emulator></devices>
</domain>
"""
SAVED = Path("/var/lib/libvirt/qemu/save")
ABILITIES = (b" iommufd='", b"failed to set memory accounting for iommufd", b"Set iommufd rlimit mode to ")


@pytest.fixture
def unit() -> Iterator[str]:
    """The unit of libvirt's daemon, whose settings the test may change; it does not run."""
    name: str = libvirt()["unit"]
    folders = [Path(f"/run/systemd/system/{each}.d") for each in (name, "user@.service")]
    systemctl("stop", name)
    try:
        yield name
    finally:
        for folder in folders:
            (folder / "kernel-test.conf").unlink(missing_ok=True)
        systemctl("daemon-reload")
        systemctl("stop", name)


def drop_in(name: str, setting: str) -> None:
    path = Path(f"/run/systemd/system/{name}.d/kernel-test.conf")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"[Service]\n{setting}\n")
    systemctl("daemon-reload")


def abilities(found: Answer) -> tuple[object, ...]:
    return tuple(found[name] for name in ("supports_iommufd", "sets_rlimit_mode", "starts_iommufd_domains"))


def test_libvirt_by_what_its_library_holds(unit: str, knows_iommufd: bool, tmp_path: Path) -> None:
    """A copy without the feature, or with it, in the place of the library, with the same name and so version."""
    [path] = {os.path.realpath(each) for each in glob.glob("/usr/lib/*/libvirt.so.0")}
    text = Path(path).read_bytes()
    for each in ABILITIES:
        assert (each in text) == knows_iommufd
        text = text.replace(each, b"x" * len(each))
    (tmp_path / "without").write_bytes(text)
    (tmp_path / "with").write_bytes(text + b"\0".join(ABILITIES))
    assert abilities(libvirt()) == (knows_iommufd,) * 3
    for name, has in (("without", False), ("with", True)):
        replace = partial(mount_privately, str(tmp_path / name), path)
        answered = look_within(replace, "host")
        assert limits(answered) == {}
        assert abilities(answered["host"]["libvirt"]) == (has,) * 3
        # A daemon that runs goes on with the one that it has mapped.
        systemctl("start", unit)
        assert abilities(look_within(replace, "host")["host"]["libvirt"]) == (knows_iommufd,) * 3
        systemctl("stop", unit)


def user_of_the_daemon(unit: str) -> int:
    """Whom libvirt has taken for its domains: one of the folders that it gives to that user when it starts."""
    systemctl("start", unit)
    # It answers once it has.
    virsh("list")
    return SAVED.stat().st_uid


def test_the_user_of_libvirts_domains(unit: str) -> None:
    before = CONF.read_bytes()
    try:
        usual = user_of_the_daemon(unit)
        assert (libvirt()["uid"], libvirt()["user"]) == (usual, "libvirt-qemu")
        systemctl("stop", unit)
        assert libvirt()["uid"] == usual
        # The first one counts, and neither a comment nor a list.
        acl = "cgroup_device_acl = ['/dev/null', '/dev/zero', '/dev/urandom', '/dev/ptmx',\n'user']"
        CONF.write_text(f"#user = 'root'\n{acl}\nuser = '+{VM}' # vm\nuser = 'alice'\n")
        assert (libvirt()["uid"], libvirt()["user"]) == (VM, "vm")
        assert user_of_the_daemon(unit) == VM == libvirt()["uid"]
        # The daemon has not read that yet.
        CONF.write_text("user = 'alice'\n")
        answered = look("host")
        assert answered["host"]["libvirt"]["uid"] == VM
        assert answered["host"]["libvirt"]["at_boot"]["uid"] == ALICE
        assert "qemu.conf has user alice, and the daemon took vm when it started" in limits(answered)["libvirt"]
        systemctl("stop", unit)
        assert libvirt()["uid"] == ALICE
        # Whose they would be without a user in there cannot be told: libvirt's folder is still vm's.
        CONF.write_text("")
        assert (libvirt()["uid"], libvirt()["user"]) == (None, None)
    finally:
        CONF.write_bytes(before)
        # It gives its folders back.
        systemctl("stop", unit)
        user_of_the_daemon(unit)
    assert libvirt()["uid"] == usual


def test_whether_the_daemon_has_read_its_configuration(unit: str) -> None:
    assert libvirt()["outdated"] is None
    systemctl("start", unit)
    assert libvirt()["outdated"] is False
    # Within a second it might have been before the start.
    time.sleep(1.5)
    CONF.touch()
    assert libvirt()["outdated"] is True
    systemctl("restart", unit)
    assert libvirt()["outdated"] is False


def test_a_libvirt_in_a_container(unit: str, tmp_path: Path) -> None:
    """Its daemon is seen, but has another file system than the host, as a container's has."""
    program = "import os, time; os.chroot(os.environ['ROOT']); time.sleep(600)"
    code = f"open('/proc/self/comm', 'w').write('libvirtd'); {program}"
    with subprocess.Popen([sys.executable, "-c", code], env={"ROOT": str(tmp_path)}) as daemon:
        try:
            root = Path(f"/proc/{daemon.pid}/root")
            while not os.path.samefile(root, tmp_path):
                time.sleep(0.1)
            found = libvirt()
            assert (found["unit"], found["sets_rlimit_mode"], found["uid"]) == (None, None, None)
            assert found["reason"].startswith("libvirt runs in no unit of this host, perhaps in a container")
            # That of the host itself goes before it while it runs.
            systemctl("start", unit)
            assert libvirt()["unit"] == unit
            systemctl("stop", unit)
        finally:
            daemon.kill()
    assert libvirt()["unit"] == unit
    drop_in(unit, "ExecStart=\nExecStart=/usr/bin/sleep infinity\nType=exec")
    systemctl("start", unit)
    found = libvirt()
    assert (found["unit"], found["sets_rlimit_mode"]) == (None, None)
    assert found["reason"].startswith(f"{unit} runs something that has libvirt elsewhere")


def known_by(answered: Answer) -> list[str]:
    """How the usual emulator is known."""
    [row] = [each for each in answered["host"]["qemu"] if each["path"] == QEMU]
    ways: list[str] = row["known_by"]
    return ways


def test_the_emulators_of_domains(tmp_path: Path) -> None:
    """As libvirt itself writes a definition, and a record."""
    assert known_by(look("host")) == ["place"]
    path = tmp_path / "domain.xml"
    path.write_text(DOMAIN)
    virsh("define", str(path))
    try:
        assert known_by(look("host")) == ["place", "definition"]
        virsh("start", "--paused", NAME)
        assert known_by(look("host")) == ["place", "definition", "record"]
        # It has no definition any more, and runs on.
        virsh("undefine", NAME)
        assert known_by(look("host")) == ["place", "record"]
        virsh("destroy", NAME)
        assert known_by(look("host")) == ["place"]
    finally:
        for words in (["undefine"], ["destroy"]):
            subprocess.run(["virsh", "--connect=qemu:///system", *words, NAME], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("setting", "passes"),
    [("", True), ("NoNewPrivileges=yes", False), ("CapabilityBoundingSet=~CAP_IPC_LOCK", False)],
)
def test_whether_an_emulator_gets_what_its_file_gives(unit: str, setting: str, passes: bool) -> None:
    if setting:
        drop_in(unit, setting)
    assert libvirt()["passes_cap_ipc_lock"] is passes
    systemctl("start", unit)
    found = libvirt()
    assert found["passes_cap_ipc_lock"] is passes
    status = status_of(found["pid"])
    assert passes == (status["NoNewPrivs"] == "0" and bool(int(status["CapBnd"], 16) >> 14 & 1))


def test_the_limit_of_libvirts_daemon(unit: str) -> None:
    drop_in(unit, f"LimitMEMLOCK={32 * MIB}:{48 * MIB}")
    found = libvirt()
    assert (found["pid"], found["memlock_bytes"], found["memlock_unlimited"]) == (None, 32 * MIB, False)
    assert (found["memlock_hard_bytes"], found["memlock_hard_unlimited"]) == (48 * MIB, False)
    systemctl("start", unit)
    found = libvirt()
    assert resource.prlimit(found["pid"], resource.RLIMIT_MEMLOCK) == (32 * MIB, 48 * MIB)
    assert (found["memlock_bytes"], found["memlock_unlimited"]) == (32 * MIB, False)
    assert (found["memlock_hard_bytes"], found["memlock_hard_unlimited"]) == (48 * MIB, False)
    # Its own, whatever its unit says.
    resource.prlimit(found["pid"], resource.RLIMIT_MEMLOCK, (24 * MIB, 48 * MIB))
    assert libvirt()["memlock_bytes"] == 24 * MIB
    systemctl("stop", unit)
    drop_in(unit, "LimitMEMLOCK=infinity")
    found = libvirt()
    assert (found["memlock_bytes"], found["memlock_unlimited"]) == (None, True)
    assert (found["memlock_hard_bytes"], found["memlock_hard_unlimited"]) == (None, True)


HARD = "CapabilityBoundingSet=~CAP_SYS_RESOURCE"


def old_and_new(found: Answer) -> tuple[object, ...]:
    """Whether the daemon has CAP_SYS_RESOURCE, whether its files would lack it, and what is known of their age."""
    return found["cap_sys_resource"], bool(found["drop_in"]), found["unit_outdated"], found["needs_restart"]


def test_a_daemon_that_runs_with_old_settings(unit: str) -> None:
    folder = Path(f"/run/systemd/system/{unit}.d")
    hard, ours = folder / "kernel-test.conf", folder / "zz-iommufd_host.conf"
    taken_by = [{"path": str(hard), "line": 3, "text": HARD}]
    systemctl("start", unit)
    try:
        # Nobody has told systemd.
        folder.mkdir(exist_ok=True)
        hard.write_text(f"[Service]\n# Hardened.\n{HARD}\n")
        found = libvirt()
        assert (old_and_new(found), found["taken_by"]) == ((True, True, True, True), taken_by)
        systemctl("daemon-reload")
        assert old_and_new(libvirt()) == (True, True, False, True)
        systemctl("restart", unit)
        found = libvirt()
        assert (old_and_new(found), found["taken_by"]) == ((False, True, False, False), taken_by)
        # What it needs, as the role writes it.
        ours.write_text("\n".join(["[Service]", *found["drop_in"], ""]))
        systemctl("daemon-reload")
        found = libvirt()
        assert (old_and_new(found), found["taken_by"]) == ((False, False, False, True), taken_by)
        systemctl("restart", unit)
        found = libvirt()
        assert (old_and_new(found), found["taken_by"]) == ((True, False, False, False), taken_by)
        # It takes nothing from a unit that has everything.
        hard.unlink()
        systemctl("daemon-reload")
        systemctl("restart", unit)
        found = libvirt()
        assert (old_and_new(found), found["taken_by"]) == ((True, False, False, False), [])
        assert status_of(found["pid"])["CapBnd"] == status_of(1)["CapBnd"]
    finally:
        ours.unlink(missing_ok=True)


# What a drop-in says, and then another.
SETTINGS = (
    ["CapabilityBoundingSet=~CAP_KILL"],
    [HARD],
    ["CapabilityBoundingSet=~ cap_sys_resource no_such"],
    ["CapabilityBoundingSet=~24"],
    ["CapabilityBoundingSet=CAP_KILL"],
    ["CapabilityBoundingSet="],
    ["CapabilityBoundingSet=~CAP_SYS_RESOURCE", "CapabilityBoundingSet=~"],
    ["CapabilityBoundingSet=~CAP_KILL", "CapabilityBoundingSet=CAP_CHOWN"],
    ["CapabilityBoundingSet=CAP_KILL", "CapabilityBoundingSet=CAP_SYS_RESOURCE"],
    ['CapabilityBoundingSet="~CAP_KILL"'],
    ["CapabilityBoundingSet=~CAP_KILL \\", "# CapabilityBoundingSet=", " CAP_SYS_RESOURCE"],
    ["CapabilityBoundingSet=~CAP_KILL \\\\", "CAP_SYS_RESOURCE"],
    ["User=vm"],
    ["User=vm", "User="],
    ["User=vm", "AmbientCapabilities=CAP_SYS_RESOURCE"],
    ["User=vm", "AmbientCapabilities=CAP_SYS_RESOURCE", "AmbientCapabilities="],
    ["DynamicUser=yes"],
    ["SecureBits=noroot"],
    ["SecureBits=noroot", "SecureBits=keep-caps"],
    ["SecureBits=noroot", "SecureBits="],
    ["SecureBits=noroot", "AmbientCapabilities=CAP_SYS_RESOURCE"],
    ["PrivateUsers=yes"],
    ["PrivateUsers=yes", "PrivateUsers=no"],
)


def test_settings_are_understood_as_systemd_does() -> None:
    """Also once they are followed by what would give the capability back."""
    names = [f"kernel-test-{number}.service" for number in range(len(SETTINGS))]
    folder = Path("/run/systemd/system")
    paths = {name: folder / f"{name}.d" for name in names}
    try:
        for name, lines in zip(names, SETTINGS):
            (folder / name).write_text("[Service]\nType=oneshot\nExecStart=grep -q . /proc/self/status\n")
            paths[name].mkdir()
            (paths[name] / "10.conf").write_text("\n".join(["[Service]", *lines, ""]))
        systemctl("daemon-reload")
        lacks = []
        for unit, lines in zip(map(daemon_unit_of, show_units(run_command, names, PROPERTIES)), SETTINGS):
            lack = find_lack(read_lines(unit.shown))
            assert (lack.settings, bool(lack.lines)) == (unit.drop_in, bool(unit.drop_in)), lines
            lacks.append(lack)
            (paths[unit.name] / "zz.conf").write_text("\n".join(["[Service]", *lack.settings, ""]))
        # Each answer is among them.
        assert len({lack.settings for lack in lacks}) == 4
        systemctl("daemon-reload")
        for unit, lines in zip(map(daemon_unit_of, show_units(run_command, names, PROPERTIES)), SETTINGS):
            assert (unit.drop_in, find_lack(read_lines(unit.shown))) == ((), ((), ())), lines
    finally:
        for name in names:
            (folder / name).unlink(missing_ok=True)
            shutil.rmtree(paths[name], ignore_errors=True)
        systemctl("daemon-reload")


def test_the_limits_of_sessions(unit: str) -> None:
    assert ALICE not in [each["uid"] for each in libvirt()["sessions"]]
    drop_in("user@.service", f"LimitMEMLOCK={24 * MIB}")
    manager = f"user@{ALICE}.service"
    try:
        systemctl("start", manager)
        [row] = [each for each in libvirt()["sessions"] if each["uid"] == ALICE]
        hard = {"memlock_hard_bytes": 24 * MIB, "memlock_hard_unlimited": False}
        assert row == {"uid": ALICE, "user": "alice", "pid": None, **hard}
        # Its own, whatever its unit says. What it starts gets no more, whatever that asks for.
        pid = int(systemctl("show", "-P", "MainPID", manager))
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (MIB, 16 * MIB))
        [row] = [each for each in libvirt()["sessions"] if each["uid"] == ALICE]
        assert row["memlock_hard_bytes"] == 16 * MIB
        start = [
            "systemd-run",
            "--user",
            "--quiet",
            "--collect",
            "--unit=kernel-test",
            "--property=LimitMEMLOCK=infinity",
        ]
        subprocess.run([*USER, *start, "--", "sleep", "infinity"], check=True)
        show = ["systemctl", "--user", "show", "-P", "MainPID", "kernel-test.service"]
        pid = int(subprocess.run([*USER, *show], capture_output=True, check=True).stdout)
        assert resource.prlimit(pid, resource.RLIMIT_MEMLOCK)[1] == 16 * MIB
    finally:
        systemctl("stop", manager)
