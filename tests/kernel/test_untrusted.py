# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What local users make of paths and files that root is told of: none of it turns root against the host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._programs import GRANT, zipapp
from ansible_collections.virt.iommufd.plugins.modules import iommufd_host_apply, iommufd_info, iommufd_vmm_check
from ansible_collections.virt.iommufd.tests.kernel.conftest import Told
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    ALICE,
    CAPABILITIES,
    PATIENCE,
    Answer,
    Vmm,
    as_user,
    change_user,
)
from ansible_collections.virt.iommufd.tests.kernel.run_module import run
from ansible_collections.virt.iommufd.tests.kernel.test_fuse import FLUSH, INIT, answer, mount

pytestmark = pytest.mark.once

# On the file system that the emulators are on; the folder of an ordinary user is in it.
PLACE = Path("/opt/iommufd-untrusted-test")
HERS = PLACE / "alice"
EMULATOR = PLACE / "emulator"
PROGRAM = Path("/usr/local/libexec/iommufd-host-grant-test")
RECORD = Path("/var/lib/iommufd_host/record.json")
UNIT = Path("/run/systemd/system/iommufd-untrusted-test.service")

XATTR = "security.capability"
IPC_LOCK = 1 << CAPABILITIES["ipc_lock"]
GRANTED = struct.pack("<5I", 0x02000001, IPC_LOCK, 0, 0, 0)


@pytest.fixture(autouse=True)
def _host() -> Iterator[None]:
    """A place for emulators, a folder of an ordinary user in it, and the program that the role installs."""
    had_folder = PROGRAM.parent.exists()
    PROGRAM.parent.mkdir(exist_ok=True)
    PROGRAM.write_bytes(zipapp(GRANT))
    PROGRAM.chmod(0o755)
    PLACE.mkdir()
    shutil.copy2("/usr/bin/cat", EMULATOR)
    HERS.mkdir()
    os.chown(HERS, ALICE, ALICE)
    yield
    shutil.rmtree(PLACE)
    PROGRAM.unlink()
    if not had_folder:
        PROGRAM.parent.rmdir()
    UNIT.unlink(missing_ok=True)
    assert not RECORD.parent.exists()


def alice(script: str, *arguments: str | Path) -> None:
    """Has the ordinary user do something."""
    command = [*as_user(ALICE), "sh", "-ec", script, "sh", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def xattr(path: Path) -> bytes | None:
    return os.getxattr(path, XATTR) if XATTR in os.listxattr(path) else None


def grant(*paths: Path) -> subprocess.CompletedProcess[str]:
    """What the unit runs."""
    return subprocess.run([str(PROGRAM), *map(str, paths)], capture_output=True, text=True, timeout=120, check=False)


def info(path: Path, *subsets: str) -> tuple[Answer, str]:
    """The row of an emulator, and what limits the view of emulators."""
    answered = run(iommufd_info, gather_subset=["host", *subsets], emulators=[str(path)])
    assert not answered.get("failed"), answered
    [row] = [each for each in answered["host"]["qemu"] if each["path"] == str(path)]
    limits = [each["why"] for each in answered["host"]["limits_of_view"] if each["what"] == "emulators"]
    return row, " ".join(limits)


def check(path: Path, **options: Any) -> Answer:
    answered = run(iommufd_vmm_check, emulators=[str(path)], **options)
    assert not answered.get("failed"), answered
    row: Answer = answered["emulators"][0]
    return row


def test_the_program_grants() -> None:
    (PLACE / "link").symlink_to(EMULATOR)
    done = grant(PLACE / "link", PLACE / "gone")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"iommufd-host-grant: {PLACE}/link has got CAP_IPC_LOCK.\n",
        "",
    )
    assert xattr(EMULATOR) == GRANTED
    assert grant(EMULATOR).stdout == ""


def test_a_capability_that_a_user_gave_to_his_own_file() -> None:
    """For his user namespace. Where its text is written again, by setcap, it is the host's, and he is root here."""
    mine = HERS / "mine"
    alice('cp /usr/bin/python3 "$1"; unshare --user --map-root-user setcap cap_setuid,cap_sys_admin=ep "$1"', mine)
    before = xattr(mine)
    assert before is not None
    assert struct.unpack("<6I", before)[5] == ALICE
    # That is the trap: it looks like the host's own.
    shown = subprocess.run(["getcap", str(mine)], capture_output=True, text=True, check=True)
    assert shown.stdout == f"{mine} cap_setuid,cap_sys_admin=ep\n"
    done = grant(mine)
    assert done.returncode == 1
    assert f"{HERS} can be written by user alice (uid {ALICE})" in done.stderr
    assert xattr(mine) == before
    # Where only root can write, root has put it there; it is left and reported all the same.
    os.setxattr(EMULATOR, XATTR, before)
    done = grant(EMULATOR)
    assert done.returncode == 1
    assert done.stderr == (
        f"iommufd-host-grant: {EMULATOR}: Its capabilities (cap_setuid, cap_sys_admin) are for the user namespace of"
        f" uid {ALICE} only, and CAP_IPC_LOCK, which has to be for the initial one, would give them there too. It is"
        " left as it is.\n"
    )
    assert xattr(EMULATOR) == before
    answered = run(iommufd_host_apply, capabilities=[str(EMULATOR)])
    assert answered["failed"]
    assert f"are for the user namespace of uid {ALICE} only" in answered["msg"]
    assert xattr(EMULATOR) == before


def test_a_recorded_emulator_that_got_a_users_capability() -> None:
    """What was granted and then replaced is not granted again by more than what it was."""
    assert [each["path"] for each in run(iommufd_host_apply, capabilities=[str(EMULATOR)])["made"]] == [str(EMULATOR)]
    theirs = struct.pack("<6I", 0x03000001, 1 << 7, 0, 0, 0, ALICE)
    os.setxattr(EMULATOR, XATTR, theirs)
    assert grant(EMULATOR).returncode == 1
    assert run(iommufd_host_apply, capabilities=[str(EMULATOR)])["failed"]
    assert xattr(EMULATOR) == theirs
    assert not run(iommufd_host_apply)["changed"]
    assert xattr(EMULATOR) == theirs


def her_file(kind: str) -> tuple[Path, Path]:
    """A path that she has a hand in, and the place where."""
    if kind == "file":
        EMULATOR.chmod(0o777)
        return EMULATOR, EMULATOR
    if kind == "group":
        os.chown(EMULATOR, 0, ALICE)
        EMULATOR.chmod(0o775)
        return EMULATOR, EMULATOR
    if kind == "acl":
        subprocess.run(["setfacl", "--modify", f"user:{ALICE}:rwx", str(EMULATOR)], check=True)
        return EMULATOR, EMULATOR
    if kind == "owner":
        os.chown(EMULATOR, ALICE, 0)
        return EMULATOR, EMULATOR
    if kind == "folder":
        shutil.copy2("/usr/bin/cat", HERS / "emulator")
        HERS.chmod(0o777)
        return HERS / "emulator", HERS
    if kind == "link":
        (PLACE / "link").symlink_to(EMULATOR)
        os.chown(PLACE / "link", ALICE, ALICE, follow_symlinks=False)
        return PLACE / "link", PLACE / "link"
    # On the way of a link that is root's.
    alice('ln -s /opt/iommufd-untrusted-test "$1"', HERS / "way")
    (PLACE / "link").symlink_to(HERS / "way" / "emulator")
    return PLACE / "link", HERS


@pytest.mark.parametrize("kind", ["file", "group", "acl", "owner", "folder", "link", "way"])
def test_an_emulator_that_somebody_else_can_write(kind: str) -> None:
    """Each refuses it by itself, and names the place."""
    path, place = her_file(kind)
    real = Path(os.path.realpath(path))
    assert run(iommufd_host_apply, capabilities=[str(path)], _ansible_check_mode=True)["failed"]
    answered = run(iommufd_host_apply, capabilities=[str(path)])
    assert answered["failed"]
    said = f"{path} cannot be trusted: {place} can be written by "
    assert said in answered["msg"]
    assert (answered["changed"], answered["made"]) == (False, [])
    row, limits = info(path)
    assert row["writer"]["place"] == str(place)
    assert said + row["writer"]["who"] in limits
    assert (row["cap_ipc_lock"], row["file_capabilities"]) == (None, None)
    checked = check(path, trial=True, start=True, user="nobody")
    assert checked["writer"] == row["writer"]
    assert len(checked["obstacles"]) == 1
    assert checked["obstacles"][0].startswith(said)
    for name in ("trial", "started"):
        assert (checked[name]["ok"], checked[name]["effective"]) == (False, None)
        assert checked[name]["msg"].startswith(said)
    done = grant(path)
    assert done.returncode == 1
    assert said in done.stderr
    assert xattr(real) is None


def test_an_emulator_that_was_replaced_since() -> None:
    """Granted while it was root's, and somebody else's by now: neither granted again, nor given what it had."""
    assert [each["path"] for each in run(iommufd_host_apply, capabilities=[str(EMULATOR)])["made"]] == [str(EMULATOR)]
    PLACE.chmod(0o777)
    try:
        alice('mv "$1" "$1.old"; cp /usr/bin/cat "$1"; chmod 0777 "$1"', EMULATOR)
        assert grant(EMULATOR).returncode == 1
        assert xattr(EMULATOR) is None
        for options in ({"capabilities": [str(EMULATOR)]}, {}):
            answered = run(iommufd_host_apply, **options)
            assert answered["failed"]
            assert f"{PLACE} can be written by everybody" in answered["msg"]
            assert not answered["changed"]
        assert xattr(EMULATOR) is None
    finally:
        PLACE.chmod(0o755)
        EMULATOR.with_suffix(".old").rename(EMULATOR)
    assert run(iommufd_host_apply)["changed"]
    assert xattr(EMULATOR) is None


def test_an_emulator_of_somebody_else_is_not_executed_by_root() -> None:
    marker = PLACE / "executed"
    path = HERS / "emulator"
    alice(f'printf "#!/bin/sh\\ntouch {marker}\\necho version 1.0\\n" > "$1"; chmod 0755 "$1"', path)
    row, limits = info(path, "emulators")
    assert not marker.exists()
    assert row["version"] is None
    assert f"{path} was not asked for its version: {path} cannot be trusted: {HERS} can be written by" in limits
    # Root's own is.
    mine = PLACE / "mine"
    shutil.copy(path, mine)
    mine.chmod(0o755)
    assert info(mine, "emulators")[0]["version"] == "1.0"
    assert marker.exists()


@pytest.mark.parametrize("setting", ["ExecStart", "ExecStartPre"])
def test_a_unit_with_a_program_of_somebody_else(setting: str) -> None:
    shutil.copy2("/usr/bin/cat", HERS / "program")
    lines = {"ExecStart": "/bin/true", setting: HERS / "program"}
    UNIT.write_text("[Service]\n" + "".join(f"{key}={value}\n" for key, value in lines.items()))
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    answered = run(iommufd_vmm_check, units=[UNIT.name], start=True)
    [unit] = answered["units"]
    assert [
        f"starts {HERS}/program, which cannot be trusted: {HERS} can be written by" in each
        for each in unit["obstacles"]
    ] == [True]
    if setting == "ExecStart":
        assert unit["replica"]["ok"] is False
        assert "which cannot be trusted" in unit["replica"]["msg"]


def victim() -> Path:
    """A file of root's that nobody else can write."""
    folder = PLACE / "victim"
    folder.mkdir(exist_ok=True)
    path = folder / "conf"
    path.write_text("of root")
    path.chmod(0o600)
    return path


def swap(folder: Path, target: Path) -> None:
    """She moves a folder away and puts a link to another one in its place."""
    alice('mv "$1" "$1.moved"; ln -s "$2" "$1"', folder, target)


def of_role(path: Path | str) -> list[dict[str, str]]:
    """A file as the role wants it."""
    return [{"path": str(path), "content": "of the role"}]


def test_a_folder_that_is_somebody_elses_when_it_is_recorded() -> None:
    block = {"path": f"{HERS}/a/conf", "devices": ["/dev/iommu"]}
    for options in ({"files": of_role(f"{HERS}/a/conf")}, {"blocks": [block]}, {"nodes": [f"{HERS}/*"]}):
        answered = run(iommufd_host_apply, **options)
        assert answered["failed"]
        assert f"{HERS} can be written by user alice (uid {ALICE})" in answered["msg"]
    assert run(iommufd_host_apply, record=f"{HERS}/lib/record.json")["failed"]
    assert not (HERS / "lib").exists()


@pytest.mark.parametrize("existed", [True, False])
def test_a_folder_that_was_swapped_since(existed: bool) -> None:
    """What is put back goes to no other folder than the one that was recorded."""
    kept = victim()
    folder = PLACE / "settings"
    folder.mkdir()
    path = folder / "conf"
    if existed:
        path.write_text("mine now")
    assert not run(iommufd_host_apply, files=of_role(path)).get("failed")
    # By a mistake of whoever administers the host, the folders become hers.
    for each in (PLACE, folder):
        os.chown(each, ALICE, ALICE)
    swap(folder, kept.parent)
    try:
        answered = run(iommufd_host_apply)
        assert answered["failed"]
        assert f"{PLACE} can be written by user alice (uid {ALICE})" in answered["msg"]
        assert (answered["changed"], answered["put_back"]) == (False, [])
        assert (kept.read_text(), kept.stat().st_mode & 0o777, os.listdir(kept.parent)) == ("of root", 0o600, ["conf"])
        # The link alone, in a folder that is root's again.
        os.chown(PLACE, 0, 0)
        answered = run(iommufd_host_apply)
        assert answered["failed"]
        assert f"{folder} can be written by user alice" in answered["msg"]
        assert kept.read_text() == "of root"
    finally:
        os.chown(PLACE, 0, 0)
        folder.unlink()
        folder.with_suffix(".moved").rename(folder)
        os.chown(folder, 0, 0)
    assert run(iommufd_host_apply)["changed"]
    assert path.exists() == existed
    assert kept.read_text() == "of root"


def test_a_folder_that_is_swapped_all_the_time() -> None:
    """While files are put back: what is judged is what is used."""
    kept = victim()
    folder = PLACE / "settings"
    folder.mkdir()
    path = folder / "conf"
    swapping = (
        "while :; do mv settings settings.moved; ln -s victim settings; rm settings; mv settings.moved settings; done"
    )
    refused = 0
    for _turn in range(15):
        if not path.exists():
            path.write_text("old")
        assert not run(iommufd_host_apply, files=of_role(path)).get("failed")
        os.chown(PLACE, ALICE, ALICE)
        command = [*as_user(ALICE), "sh", "-c", swapping]
        with subprocess.Popen(
            command, cwd=PLACE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as swapper:
            time.sleep(0.05)
            refused += bool(run(iommufd_host_apply).get("failed"))
            os.killpg(swapper.pid, signal.SIGKILL)
        os.chown(PLACE, 0, 0)
        if folder.is_symlink():
            folder.unlink()
        if not folder.exists():
            folder.with_suffix(".moved").rename(folder)
        assert not run(iommufd_host_apply).get("failed")
        assert (kept.read_text(), os.listdir(kept.parent)) == ("of root", ["conf"])
    assert refused == 15


@pytest.fixture
def dead() -> Iterator[Path]:
    """A mount of root's whose server answers nothing but that it is there, and then nothing at all."""
    subprocess.run(["modprobe", "fuse"], check=True)
    mount_point = PLACE / "dead"
    mount_point.mkdir()
    fuse = os.open("/dev/fuse", os.O_RDWR)
    mount(mount_point, fuse, "user_id=0,group_id=0,allow_other")
    yield mount_point / "emulator"
    # With it goes whoever waits for an answer.
    os.close(fuse)
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def wait(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """Has the modules wait so long for a file."""
    for module, name in (("_host_facts", "_PATIENCE"), ("_vmm_look", "_LOOK_PATIENCE"), ("_wanted", "_PATIENCE")):
        monkeypatch.setattr(f"ansible_collections.virt.iommufd.plugins.module_utils.{module}.{name}", seconds)


@pytest.mark.parametrize("link", [False, True])
def test_a_mount_whose_server_does_not_answer(dead: Path, link: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wait(monkeypatch, 1)
    path = dead
    if link:
        path = PLACE / "link"
        path.symlink_to(dead)
    began = time.monotonic()
    row, limits = info(path)
    assert (row["present"], row["cap_ipc_lock"]) == (False, None)
    assert f"{path} was not found within 1 seconds" in limits
    answered = run(iommufd_vmm_check, emulators=[str(path)])
    assert answered["failed"]
    assert f"{path} was not found within 1 seconds" in answered["msg"]
    for options in ({"capabilities": [str(path)]}, {"files": of_role(f"{dead.parent}/conf")}):
        answered = run(iommufd_host_apply, **options)
        assert answered["failed"]
        assert "within 1 seconds" in answered["msg"]
    assert time.monotonic() - began < 30


def test_a_mount_of_an_ordinary_user_is_not_even_asked(
    start_fuse: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wait takes longer than all of this does on a busy machine.
    wait(monkeypatch, PATIENCE)
    mount_point = HERS / "mnt"
    alice('mkdir "$1"', mount_point)
    start_fuse(mount_point)
    began = time.monotonic()
    path = mount_point / "emulator"
    assert info(path)[0]["writer"]["place"] == str(HERS)
    assert check(path)["writer"]["place"] == str(HERS)
    assert run(iommufd_host_apply, capabilities=[str(path)])["failed"]
    assert time.monotonic() - began < PATIENCE


@pytest.fixture
def start_fuse() -> Iterator[Callable[[Path], None]]:
    """Mounts what does not answer."""
    subprocess.run(["modprobe", "fuse"], check=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    mounted: list[Path] = []

    def start(mount_point: Path) -> None:
        mount(mount_point, fuse, f"user_id={ALICE},group_id={ALICE},allow_other")
        mounted.append(mount_point)

    yield start
    os.close(fuse)
    for mount_point in mounted:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


# linux/fuse.h: what FUSE asks besides to read a file, and what it wants no answer to.
READ = 15
UNANSWERED = (2, 42)


def claims_root(request: bytes, content: bytes) -> tuple[int, bytes]:
    """An errno and an answer. There is a file of each name, with this content: root's, 0755, and written just now."""

    def attributes(node: int) -> bytes:
        kind = stat.S_IFDIR if node == 1 else stat.S_IFREG
        times = [0, int(time.time()) + 60, 0, 0, 0, 0]
        return struct.pack("=3Q3Q3I7I", node, len(content), 1, *times, kind | 0o755, 1, 0, 0, 0, 4096, 0)

    _length, opcode, _unique, node = struct.unpack_from("=IIQQ", request)
    if opcode == READ:
        offset, size = struct.unpack_from("=QI", request, 48)
        return 0, content[offset : offset + size]
    return (0, b"") if opcode == FLUSH else answer(opcode, node, attributes)


def serve_as_alice(fuse: int, noted: int, content: bytes, deaf: bool) -> None:
    """Notes what it is asked, each by one byte."""
    os.setsid()
    change_user(ALICE)
    while True:
        request = os.read(fuse, 2**18)
        _length, opcode, unique = struct.unpack_from("=IIQ", request)
        os.write(noted, bytes([opcode]))
        if opcode not in UNANSWERED and not deaf:
            error, body = claims_root(request, content)
            os.write(fuse, struct.pack("=IiQ", 16 + len(body), -error, unique) + body)


@pytest.fixture
def her_mount() -> Iterator[Callable[..., Callable[[], set[int]]]]:
    """Mounts on her folder what a process of hers serves, as fusermount(1) does where users may let others see it.

    Gives what tells what that process was asked.
    """
    subprocess.run(["modprobe", "fuse"], check=True)
    with contextlib.ExitStack() as stack:

        def start(content: str, deaf: bool = False) -> Callable[[], set[int]]:
            fuse = os.open("/dev/fuse", os.O_RDWR)
            mount(HERS, fuse, f"user_id={ALICE},group_id={ALICE},allow_other")
            stack.callback(subprocess.run, ["umount", "--lazy", str(HERS)], check=True)
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            server = os.fork()
            if not server:
                try:
                    serve_as_alice(fuse, writing, content.encode(), deaf)
                finally:
                    os._exit(1)
            stack.callback(os.waitpid, server, 0)
            stack.callback(os.kill, server, signal.SIGKILL)
            stack.callback(os.close, reading)
            os.close(fuse)
            os.close(writing)

            def asked() -> set[int]:
                with contextlib.suppress(BlockingIOError):
                    return set(os.read(reading, 65536))
                return set()

            return asked

        yield start


WHOSE = f"user alice (uid {ALICE}), whose FUSE mount it is"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_users_mount_that_claims_to_be_roots(
    her_mount: Callable[..., Callable[[], set[int]]], deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server says what owner and mode a file has, and root would execute what it likes."""
    # Whoever waits for her runs into the alarm.
    wait(monkeypatch, 2 * PATIENCE)
    marker = PLACE / "executed"
    asked = her_mount(f"#!/bin/sh\ntouch {marker}\necho version 1.0\n", deaf)
    path = HERS / "emulator"
    (PLACE / "link").symlink_to(path)
    signal.alarm(PATIENCE)
    try:
        for each in (path, PLACE / "link"):
            row, limits = info(each, "emulators")
            assert row["writer"] == {"place": str(HERS), "who": WHOSE}
            assert row["version"] is None
            assert f"{HERS} can be written by {WHOSE}" in limits
            assert check(each, start=True, trial=True, user="nobody")["writer"] == row["writer"]
            answered = run(iommufd_host_apply, capabilities=[str(each)])
            assert answered["failed"]
            assert f"{HERS} can be written by {WHOSE}" in answered["msg"]
            granted = grant(each)
            assert (granted.returncode, "within" in granted.stderr) == (1, False)
        assert run(iommufd_host_apply, files=of_role(f"{HERS}/conf"))["failed"]
    finally:
        signal.alarm(0)
    assert not marker.exists()
    # The kernel itself has told the server who it is.
    assert asked() <= {INIT}
    if not deaf:
        # That is the trap.
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o755)


def test_a_pidfile_on_such_a_mount(her_mount: Callable[..., Callable[[], set[int]]], vmm: Vmm, told: Told) -> None:
    her_mount(f"{vmm.pid}\n")
    message = told(run(pidfile=str(HERS / "pid"), value="process"))
    assert f"{HERS} can be written by {WHOSE}, but " in message
    assert vmm.mode == "user"


def test_a_program_that_was_brought_along() -> None:
    """On what users may mount, as a stick, it has any owner that they have given it elsewhere."""
    marker = PLACE / "executed"
    stick = PLACE / "stick"
    stick.mkdir()
    path = stick / "emulator"
    path.write_text(f"#!/bin/sh\ntouch {marker}\necho version 1.0\n")
    path.chmod(0o755)
    subprocess.run(["mount", "--bind", str(stick), str(stick)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,nosuid,nodev", str(stick)], check=True)
        row, _limits = info(path, "emulators")
        assert row["writer"]["place"] == str(stick)
        assert row["writer"]["who"].startswith("whoever has brought the ")
        assert row["version"] is None
        assert check(path, start=True, user="nobody")["started"]["ok"] is False
        assert run(iommufd_host_apply, capabilities=[str(path)])["failed"]
        assert grant(path).returncode == 1
    finally:
        subprocess.run(["umount", str(stick)], check=True)
    assert not marker.exists()
    # It is the mount alone that is wrong with it.
    assert info(path, "emulators")[0]["version"] == "1.0"
    assert marker.exists()
