# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains of the system's and of a user's libvirt, with devices passed through, and processes that pose as one."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, MIB, VM, Answer, as_user, change_user
from ansible_collections.virt.iommufd.tests.kernel.info import check_process, limits, look, look_within, process, user
from ansible_collections.virt.iommufd.tests.kernel.test_domains import STATE, hostdev, knows_iommufd, virsh

__all__ = ("knows_iommufd",)

NAME, SHOWN = "kernel-test \u202e=b \u00e9'&<", "kernel-test \\u202e=b \u00e9'&<"
# The system's AppArmor bears neither of the two characters.
MORE = ',guest="c'
DOMAIN = """
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>16</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
  {more}
</domain>
"""
# What an older libvirt needs: QEMU opens /dev/iommu and the device by itself.
PASSED_BY_HAND = """
<qemu:commandline>
  <qemu:arg value='-object'/><qemu:arg value='iommufd,id=iommufd0'/>
  <qemu:arg value='-device'/><qemu:arg value='vfio-pci,host={},iommufd=iommufd0,bus=pcie.0,addr=0x10'/>
</qemu:commandline>
"""
SCOPE = "kernel-test-session.scope"
CACHE = "libvirt/qemu/capabilities"


def address(device: int) -> str:
    return Path(f"/sys/class/vfio-dev/vfio{device}/device").resolve().name


def scope_of(pid: int) -> str:
    done = subprocess.run(["ps", "-o", "unit=", "-p", str(pid)], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def system_domain(knows_iommufd: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int | None]:
    """The process of a domain of the system libvirt; None where that cannot pass a device through by iommufd."""
    if not knows_iommufd:
        yield None
        return
    path = tmp_path_factory.mktemp("domain") / "domain.xml"
    path.write_text(DOMAIN.format(name=escape(NAME), devices=hostdev(address(1)), more=""))
    virsh("create", "--paused", str(path))
    try:
        # libvirt writes some characters of the name otherwise there.
        [pidfile] = STATE.glob("kernel-test *.pid")
        yield int(pidfile.read_text())
    finally:
        virsh("destroy", NAME)


@pytest.fixture(scope="module")
def session_domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The process of a domain of a user's own libvirt, which is started for it."""
    home = tmp_path_factory.mktemp("alice")
    # What the system's libvirt has found out about the emulators would take this one the same many seconds.
    with contextlib.suppress(FileNotFoundError):
        shutil.copytree(f"/var/cache/{CACHE}", home / ".cache" / CACHE)
    path = home / "domain.xml"
    path.write_text(DOMAIN.format(name=escape(NAME + MORE), devices="", more=PASSED_BY_HAND.format(address(0))))
    for each in (*home.parents[:2], home):
        each.chmod(0o755)
    subprocess.run(["chown", "-R", f"{ALICE}:{ALICE}", str(home)], check=True)
    scope = ["systemd-run", "--quiet", "--scope", "--collect", f"--unit={SCOPE}", "prlimit", f"--memlock={100 * MIB}"]
    alone = ["env", "-i", f"HOME={home}", f"PATH={os.environ['PATH']}"]
    create = ["virsh", "--connect=qemu:///session", "create", "--paused", str(path)]
    try:
        done = subprocess.run([*scope, *as_user(ALICE), *alone, *create], capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        [pidfile] = home.glob(".cache/libvirt/qemu/run/kernel-test*.pid")
        yield int(pidfile.read_text())
    finally:
        subprocess.run(["systemctl", "stop", SCOPE], check=True)


def check_guest(row: Answer, device: int) -> None:
    check_process(row, row["pid"])
    assert row["memory_bytes"] == 16 * MIB < row["pinned_bytes"]
    assert [each["addresses"] for each in row["vfio_devices"]] == [[address(device)]]
    assert (row["comm"], row["emulator"]) == ("qemu-system-x86", "/usr/bin/qemu-system-x86_64")
    assert (row["locks_memory"], row["holder"], row["address_spaces"]) == (False, False, 1)
    assert row["memory_pluggable"] is False
    assert row["unit"] == scope_of(row["pid"])


def test_a_domain_of_the_system(system_domain: int | None) -> None:
    if system_domain is None:
        assert not [each for each in look()["processes"] if each["domain_uri"] == "qemu:///system"]
        return
    answered = look()
    row = process(answered, system_domain)
    check_guest(row, 1)
    assert row["user"] == "libvirt-qemu"
    assert row["unit"].startswith("machine-qemu")
    # libvirt has set the mode: the process is charged, as its VmLck shows.
    assert row["accounting"] == "process"
    assert row["charged_bytes"] == row["locked_bytes"] == row["pinned_bytes"]
    assert row["uid"] not in [each["uid"] for each in answered["users"]]
    assert row["notes"] == []


def test_the_emulator_of_a_domain_of_the_system(system_domain: int | None) -> None:
    """It is known by libvirt's record and by the process, too, where a domain runs and its process is reported."""
    [row] = [each for each in look("host processes")["host"]["qemu"] if each["path"] == "/usr/bin/qemu-system-x86_64"]
    assert row["known_by"] == ["place"] + ["record", "process"] * (system_domain is not None)


def test_the_name_of_a_domain_of_the_system(system_domain: int | None) -> None:
    if system_domain is not None:
        row = process(look(), system_domain)
        assert (row["name"], row["domain"], row["domain_uri"]) == (SHOWN, SHOWN, "qemu:///system")


def test_a_domain_of_a_users_session(session_domain: int) -> None:
    answered = look()
    row = process(answered, session_domain)
    check_guest(row, 0)
    assert (row["name"], row["domain"], row["domain_uri"]) == (SHOWN + MORE, SHOWN + MORE, "qemu:///session")
    assert (row["user"], row["unit"], row["memlock_bytes"]) == ("alice", SCOPE, 100 * MIB)
    assert (row["accounting"], row["locked_bytes"]) == ("user", 0)
    assert row["headroom_bytes"] == user(answered, ALICE)["headroom_bytes"] == 100 * MIB - row["pinned_bytes"]


def own_libvirt(answered: Answer) -> Answer:
    """What is told of the user's own libvirt."""
    [row] = [each for each in answered["host"]["libvirt"]["sessions"] if each["uid"] == ALICE]
    assert isinstance(row, dict)
    return row


def test_the_limit_of_a_users_own_libvirt(session_domain: int) -> None:
    """Its daemon was not started by the user's service manager, and has another limit than that."""
    row = own_libvirt(look("host"))
    daemon = row["pid"]
    hard = {"memlock_hard_bytes": 100 * MIB, "memlock_hard_unlimited": False}
    assert row == {"uid": ALICE, "user": "alice", "pid": daemon, **hard}
    assert Path(f"/proc/{daemon}/comm").read_text().strip() in ("virtqemud", "libvirtd")
    assert (scope_of(daemon), daemon != session_domain) == (SCOPE, True)
    manager = f"user@{ALICE}.service"
    subprocess.run(["systemctl", "start", manager], check=True)
    try:
        assert own_libvirt(look("host")) == row
        # Its own, whatever its emulators have.
        resource.prlimit(daemon, resource.RLIMIT_MEMLOCK, (MIB, 50 * MIB))
        for answered in (look("host"), look_within(partial(change_user, ALICE), "host")):
            assert own_libvirt(answered) == {**row, "memlock_hard_bytes": 50 * MIB}
    finally:
        resource.prlimit(daemon, resource.RLIMIT_MEMLOCK, (100 * MIB, 100 * MIB))
        subprocess.run(["systemctl", "stop", manager], check=True)


def test_what_an_ordinary_user_sees_of_domains(session_domain: int, system_domain: int | None) -> None:
    answered = look_within(partial(change_user, ALICE))
    row = process(answered, session_domain)
    assert (row["domain"], row["domain_uri"]) == (SHOWN + MORE, "qemu:///session")
    if system_domain is not None:
        row = process(answered, system_domain)
        # libvirt's record of a domain is for root alone.
        assert (row["name"], row["domain"], row["domain_uri"]) == (SHOWN, None, None)
        assert row["accounting"] is None
        assert "domains" in limits(answered)


@pytest.fixture(scope="module")
def poser() -> Iterator[str]:
    """A Python that goes by the name of an emulator."""
    path = Path("/opt/qemu-system-posing")
    shutil.copy(os.path.realpath(sys.executable), path)
    yield str(path)
    path.unlink()


@contextlib.contextmanager
def posing(*arguments: bytes, python: str = sys.executable) -> Iterator[int]:
    """A process of an ordinary user that holds an iommufd and shows a command line of its own choice."""
    program = b"import os, sys; os.open('/dev/iommu', os.O_RDWR); os.write(1, b'.'); os.read(0, 1)"
    command = [*map(os.fsencode, as_user(VM)), os.fsencode(python), b"-I", b"-S", b"-c", program, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holding:
        assert holding.stdout
        assert holding.stdout.read(1) == b"."
        try:
            yield holding.pid
        finally:
            holding.kill()


@pytest.fixture
def state() -> Path:
    """The folder of the system libvirt, which is made with the first connection."""
    virsh("list")
    return STATE


RECORD = """<domstatus pid='{pid}'><domain id='1000000'><name>{name}</name>
<seclabel model='dac'><label>+{uid}:+{uid}</label></seclabel></domain></domstatus>"""


@pytest.mark.once
@pytest.mark.parametrize(
    ("owner", "change", "named"),
    [
        # What root has written there is libvirt's.
        (0, {}, True),
        (VM, {}, False),
        (0, {"name": "kernel-test-other"}, False),
        (0, {"pid": 1}, False),
        (0, {"uid": ALICE}, False),
    ],
)
def test_a_process_that_poses_as_a_domain(state: Path, owner: int, change: dict[str, object], named: bool) -> None:
    name = "kernel-test-posing"
    record = state / f"{name}.xml"
    with posing(b"-name", b"guest=kernel-test-posing,debug-threads=on") as pid:
        try:
            assert process(look(), pid)["domain"] is None
            record.write_text(RECORD.format(**{"pid": pid, "name": name, "uid": VM, **change}))
            os.chown(record, owner, owner)
            row = process(look(), pid)
            assert row["name"] == name
            assert (row["domain"], row["domain_uri"]) == ((name, "qemu:///system") if named else (None, None))
            os.utime(record, (0, 0))
            assert process(look(), pid)["domain"] is None
        finally:
            record.unlink()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "name", "memory"),
    [
        ([b"-name", b"guest=\x1b[31mred\r\n\xe2\x80\xae\xff", b"-m", b"size=1G"], r"\x1b[31mred\r\n\u202e\xff", 2**30),
        ([b"-name", b"vm1", b"-m", b"64"], "vm1", 64 * MIB),
        ([b"--name", b"guest=", b"-m", b"1.5G"], "", 1536 * MIB),
        ([b"-name"], None, None),
        ([b"-name", b"a" * 4000, b"-m", b"9" * 100], "a" * 255 + "...", None),
        ([b"-m", b"size=999999999999999999T,slots=1"], None, None),
        ([b"-m", b"-1"], None, None),
        ([b"", b"-name", b"", b"-m", b""], "", None),
    ],
)
def test_hostile_command_lines(poser: str, arguments: list[bytes], name: str | None, memory: int | None) -> None:
    with posing(*arguments, python=poser) as pid:
        row = process(look(), pid)
        assert (row["name"], row["memory_bytes"], row["locks_memory"]) == (name, memory, False)
        assert (row["domain"], row["domain_uri"]) == (None, None)
        assert row["emulator"] == poser


def test_the_program_of_a_process(poser: str) -> None:
    arguments = [b"-m", b"64", b"-overcommit", b"mem-lock=on"]
    with posing(*arguments, python=poser) as pid:
        assert process(look(), pid)["locks_memory"] is True
        # A package's upgrade puts another file there.
        shutil.copy(poser, f"{poser}.new")
        os.rename(f"{poser}.new", poser)
        assert os.readlink(f"/proc/{pid}/exe") == f"{poser} (deleted)"
        assert process(look(), pid)["emulator"] == poser
    # Nobody knows what another program means by that.
    with posing(*arguments) as pid:
        row = process(look(), pid)
        assert row["emulator"] == os.path.realpath(sys.executable)
        assert (row["memory_bytes"], row["locks_memory"]) == (None, None)


@pytest.mark.once
@pytest.mark.parametrize("path", ["/etc/kernel-test.cfg", "/tmp/kernel-test.cfg", "/run/kernel-test-fifo", "/dev/zero"])
def test_a_file_of_settings(poser: str, path: str) -> None:
    """It is read where root alone decides what it is. What is something else ends no look."""
    config = Path(path)
    made = not config.exists()
    if "fifo" in path:
        os.mkfifo(config)
    elif made:
        config.write_text('[memory]\n  size = "48"\n')
    try:
        if path.startswith("/tmp"):
            os.chown(config, VM, VM)
        with posing(b"-readconfig", os.fsencode(path), python=poser) as pid:
            row = process(look(), pid)
            assert row["memory_bytes"] == (48 * MIB if path.startswith("/etc") else None)
            assert row["locks_memory"] is (False if path.startswith("/etc") else None)
    finally:
        if made:
            config.unlink()
