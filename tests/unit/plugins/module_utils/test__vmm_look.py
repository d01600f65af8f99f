# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _libvirt, _vmm_look
from ansible_collections.virt.iommufd.plugins.module_utils._capabilities import with_ipc_lock
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._paths import Writer
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit, own_status
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import Run
from ansible_collections.virt.iommufd.plugins.module_utils._vmm_look import (
    Conditions,
    FileSystem,
    Program,
    emulator_obstacles,
    has_ipc_lock,
    instance_of,
    is_qemu,
    look_at_conditions,
    look_at_own_conditions,
    look_at_program,
    look_at_unit,
    parse_mount_point,
    unit_obstacles,
)

# A program that is root's alone wherever the tests run, which their Python need not be.
SHELL = "/bin/sh"
IPC_LOCK = 1 << 14
NET_ADMIN = struct.pack("<5I", 0x02000001, 1 << 12, 0, 0, 0)
NOTHING = struct.pack("<5I", 0x02000000, 0, 0, 0, 0)
QEMU = Program("/q", "/usr/bin/qemu-system-x86_64", True, True, FileSystem("/", nosuid=False, read_only=False))
GOOD = Conditions("libvirtd.service", IPC_LOCK, no_new_privs=False, initial=True)


def changed(thing: Any, /, **other: Any) -> Any:
    return thing._replace(**other)


def shown(**properties: str) -> str:
    usual = {"LoadState": "loaded", "DynamicUser": "no"}
    usual |= {"CapabilityBoundingSet": "cap_chown cap_ipc_lock", "NoNewPrivileges": "no", "PrivateUsers": "no"}
    usual |= {"LimitMEMLOCK": "8388608", "LimitMEMLOCKSoft": "4194304", "AmbientCapabilities": "", "SecureBits": "0"}
    return "".join(f"{key}={value}\n" for key, value in {**usual, **properties}.items())


def answering(output: str, code: int = 0, errors: str = "") -> Run:
    return lambda _command, **_data: (code, output, errors)


def test_has_ipc_lock() -> None:
    assert [has_ipc_lock(mask) for mask in (0, IPC_LOCK, ~IPC_LOCK, 2**64 - 1)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("content", "mode", "is_program"),
    [
        (b"\x7fELF\2\1\1" + bytes(9) + b"\3\0", 0o755, True),
        (b"\x7fELF\2\2\1" + bytes(9) + b"\0\2", 0o755, True),
        (b"\x7fELF\2\1\1" + bytes(9) + b"\3\0", 0o644, False),
        # An object file and a core.
        (b"\x7fELF\2\1\1" + bytes(9) + b"\1\0", 0o755, False),
        (b"\x7fELF\2\1\1" + bytes(9) + b"\4\0", 0o755, False),
        (b"\x7fELF", 0o755, False),
        (b"#!/bin/sh\nexec qemu-system-x86_64\n", 0o755, False),
        (b"", 0o755, False),
    ],
)
def test_what_can_be_an_emulator(tmp_path: Path, content: bytes, mode: int, is_program: bool) -> None:
    path = tmp_path / "qemu-system-of-the-test"
    path.write_bytes(content)
    path.chmod(mode)
    link = tmp_path / "link"
    link.symlink_to(path)
    found = look_at_program(str(link))
    assert (found.path, found.real_path, found.present) == (str(link), str(path), True)
    assert (found.is_program, is_qemu(found)) == (is_program, is_program)
    assert found.xattr is None
    assert found.capabilities is None


def test_where_it_lies() -> None:
    place = look_at_program(SHELL).file_system
    assert place
    flags = os.statvfs(SHELL).f_flag
    assert (place.nosuid, place.read_only) == (bool(flags & os.ST_NOSUID), bool(flags & os.ST_RDONLY))
    assert place.mount_point
    assert os.path.realpath(SHELL).startswith(place.mount_point)


@pytest.mark.parametrize("path", ["/nothing-of-this-name", "/etc/passwd/below", "{}/loop"])
def test_what_is_not_there(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert not look_at_program(path.format(tmp_path)).present


def test_a_folder_is_no_program() -> None:
    assert not look_at_program("/usr").is_program


@pytest.mark.parametrize("path", ["qemu-system-x86_64", "", "/usr/bin/q\0"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(IommufdError, match="is not an absolute path"):
        look_at_program(path)


def refusing(number: int) -> Any:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(number, "no")

    return refuse


@pytest.mark.parametrize(
    ("where", "name", "number", "message"),
    [
        (_vmm_look, "walk", errno.EACCES, "cannot be looked at .EACCES"),
        (os, "getxattr", errno.EIO, "The capabilities of .* cannot be read .EIO"),
    ],
)
def test_what_may_not_be_looked_at(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, message: str
) -> None:
    monkeypatch.setattr(where, name, refusing(number))
    with pytest.raises(IommufdError, match=message):
        look_at_program(SHELL)


def test_what_others_can_write(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    # It would wait for somebody who writes.
    os.mkfifo(tmp_path / "theirs" / "fifo", 0o755)
    path = f"{tmp_path}/theirs/fifo"
    found = look_at_program(path)
    assert found == Program(path, path, True, writer=Writer(f"{tmp_path}/theirs", "everybody"))
    assert emulator_obstacles(found, GOOD) == [
        f"{path} cannot be trusted: {tmp_path}/theirs can be written by everybody, who would get with it whatever is"
        " granted. Have it be root's alone, with all folders on the way."
    ]


def test_nobody_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo", 0o755)
    assert not look_at_program(f"{tmp_path}/fifo").is_program
    monkeypatch.setattr(_vmm_look, "_LOOK_PATIENCE", 0.2)
    monkeypatch.setattr(_vmm_look, "_look_at_path", lambda _path: os.open(f"{tmp_path}/fifo", os.O_RDONLY))
    with pytest.raises(IommufdError, match=r"fifo was not found within 0\.2 seconds"):
        look_at_program(f"{tmp_path}/fifo")


def test_what_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vmm_look, "reopen", refusing(errno.EACCES))
    with pytest.raises(IommufdError, match=r"cannot be read .EACCES"):
        look_at_program(SHELL)


@pytest.mark.parametrize(("number", "xattr"), [(errno.ENODATA, None), (errno.EOPNOTSUPP, None), (errno.EINVAL, b"")])
def test_attributes_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, number: int, xattr: bytes | None) -> None:
    monkeypatch.setattr(os, "getxattr", refusing(number))
    assert look_at_program(SHELL).xattr == xattr


MOUNTINFO = rb"""19 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
31 19 0:27 / /tmp rw,nosuid,nodev shared:15 - tmpfs tmpfs rw
131 19 0:28 / /srv/a\040b\134 rw - ext4 /dev/x rw
"""


@pytest.mark.parametrize(
    ("fdinfo", "mount_point"),
    [
        (b"pos:\t0\nflags:\t012100000\nmnt_id:\t19\nino:\t7\n", "/"),
        (b"pos:\t0\nmnt_id:\t31\n", "/tmp"),
        (b"mnt_id:\t131\n", r"/srv/a b\\".replace("\\\\", "\\")),
        (b"mnt_id:\t1\n", None),
        (b"mnt_id:\t9\n", None),
        (b"", None),
    ],
)
def test_mount_points(fdinfo: bytes, mount_point: str | None) -> None:
    assert parse_mount_point(MOUNTINFO, fdinfo) == mount_point


def test_own_conditions() -> None:
    own = own_status()
    found = look_at_own_conditions()
    assert (found.read_from, found.bounding, found.no_new_privs) == ("this caller", own.bounding, own.no_new_privs)


def of_libvirt(monkeypatch: pytest.MonkeyPatch, unit: str | None, pid: int | None) -> None:
    monkeypatch.setattr(_libvirt, "look_at_libvirt", lambda _run: _libvirt.Libvirt(None, None, unit, pid, None))


def test_the_conditions_are_those_of_libvirts_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    of_libvirt(monkeypatch, "libvirtd.service", os.getpid())
    found = look_at_conditions(answering(""))
    assert found == changed(look_at_own_conditions(), read_from=f"libvirtd.service (pid {os.getpid()})")


@pytest.mark.parametrize("pid", [None, 2**31 - 1])
def test_the_conditions_are_those_of_its_unit(monkeypatch: pytest.MonkeyPatch, pid: int | None) -> None:
    of_libvirt(monkeypatch, "libvirtd.service", pid)
    assert look_at_conditions(answering(shown())) == Conditions("libvirtd.service", IPC_LOCK | 1, False, True)
    narrow = shown(CapabilityBoundingSet="cap_chown cap_of_tomorrow", NoNewPrivileges="yes", PrivateUsers="yes")
    assert look_at_conditions(answering(narrow)) == Conditions("libvirtd.service", 1, True, False)


def test_the_conditions_are_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    of_libvirt(monkeypatch, None, None)
    assert look_at_conditions(answering("")).read_from == "this caller"


@pytest.mark.parametrize(
    ("program", "under", "words"),
    [
        (QEMU, GOOD, []),
        (QEMU, changed(GOOD, initial=None), []),
        (changed(QEMU, present=False), GOOD, ["There is no /q."]),
        (changed(QEMU, is_program=False), GOOD, ["/q is no executable program"]),
        (
            changed(QEMU, file_system=FileSystem("/srv", True, False)),
            GOOD,
            ["/q gives no capabilities: the file system at /srv is mounted nosuid"],
        ),
        (
            changed(QEMU, file_system=FileSystem(None, False, True)),
            GOOD,
            ["/q cannot be given capabilities: its file system is mounted read-only"],
        ),
        (QEMU, changed(GOOD, bounding=1), ["not in the bounding set of libvirtd.service: /q with that capability"]),
        (QEMU, changed(GOOD, no_new_privs=True), ["libvirtd.service runs with NoNewPrivileges"]),
        (QEMU, changed(GOOD, initial=False), ["libvirtd.service is in a user namespace of its own"]),
        (
            changed(QEMU, is_program=False, file_system=FileSystem("/", True, True)),
            Conditions("this caller", 0, True, False),
            ["no executable", "nosuid", "read-only", "bounding set", "NoNewPrivileges", "user namespace"],
        ),
    ],
)
def test_obstacles_of_a_file_capability(program: Program, under: Conditions, words: list[str]) -> None:
    found = emulator_obstacles(program, under)
    assert len(found) == len(words)
    for sentence, word in zip(found, words):
        assert word in sentence
        assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("vm1.service", "vm1.service"),
        ("vm@.service", "vm@iommufd-host-check.service"),
        ("vm@1.service", "vm@1.service"),
        (r"a\x2db:c_d.service", r"a\x2db:c_d.service"),
    ],
)
def test_what_systemd_is_asked_for(name: str, asked: str) -> None:
    assert instance_of(name) == asked


@pytest.mark.parametrize("name", ["vm1", "-H.service", "a/b.service", "a b.service", "vm.scope", ".service\n", ""])
def test_names_that_are_no_services(name: str) -> None:
    with pytest.raises(IommufdError, match="is not the name of a systemd service"):
        instance_of(name)


EXEC = "{{ path={} ; argv[]={} -S ; ignore_errors=no ; pid=0 }}"


def test_a_service() -> None:
    path = SHELL
    command = EXEC.format(path, path)
    asked = []

    def systemd(words: list[str], **_data: Any) -> tuple[int, str, str]:
        asked.append(words[-1])
        return 0, shown(ExecStart=command, User="vm"), ""

    found = look_at_unit(systemd, "vm@.service")
    assert (found.name, asked) == ("vm@.service", ["vm@iommufd-host-check.service"])
    assert (found.present, found.user) == (True, "vm")
    assert found.program == look_at_program(path)
    assert (found.bounding, found.ambient) == (IPC_LOCK | 1, 0)
    assert (found.settings["NoNewPrivileges"], found.private_users) == ("no", False)
    assert found.memlock == Limit(4194304, 8388608)


REPLICATED = "iommufd-host-check"


@pytest.mark.parametrize(
    ("properties", "user", "program"),
    [
        ({"User": REPLICATED}, None, SHELL),
        ({"SupplementaryGroups": f"kvm {REPLICATED}"}, "root", SHELL),
        ({}, "root", None),
    ],
)
@pytest.mark.parametrize("runs", [True, False])
def test_a_template_whose_instance_says_what_runs(
    properties: dict[str, str], user: str | None, program: str | None, runs: bool
) -> None:
    """An instance that runs tells; where none does, nobody knows."""
    command = EXEC.format(program or f"/opt/{REPLICATED}/vmm", f"-name {REPLICATED}")
    asked = []

    def systemd(words: list[str]) -> tuple[int, str, str]:
        asked.append(words[-1])
        if words[-1] == r"vm\\x2da@*.service":
            return 0, "Id=vm\\x2da@alice.service\n\nId=vm\\x2da@bob.service\n" if runs else "\n", ""
        if words[-1] == r"vm\x2da@alice.service":
            return 0, shown(Id=words[-1], ExecStart=EXEC.format(SHELL, ""), User="alice"), ""
        return 0, shown(Id=words[-1], ExecStart=command, **properties), ""

    found = look_at_unit(systemd, r"vm\x2da@.service")
    assert (found.main, found.present) == (r"vm\x2da@.service", True)
    assert asked[0] == rf"vm\x2da@{REPLICATED}.service"
    assert len(asked) == 2 + runs
    if runs:
        assert (found.user, found.program, found.unknown) == ("alice", look_at_program(SHELL), "")
        assert unit_obstacles(found) == []
        return
    assert (found.user, found.program) == (user, program and look_at_program(program))
    assert found.unknown.endswith(r"Name instances in iommufd_host_units, such as vm\x2da@1.service.")
    assert unit_obstacles(found) == ([] if program else [found.unknown])


def test_only_the_arguments_are_named_after_the_instance() -> None:
    text = shown(ExecStart=EXEC.format(SHELL, f"-name {REPLICATED}"), User="vm")
    found = look_at_unit(answering(text), "vm@.service")
    assert (found.user, found.unknown) == ("vm", "")


@pytest.mark.parametrize(
    ("name", "main", "shows"),
    [
        ("a.service", "vm.service", "vm.service"),
        ("a@.service", f"vm@{REPLICATED}.service", "vm@.service"),
        ("a.service", "vm@1.service", "vm@1.service"),
        ("a.service", "../vm.service", "a.service"),
        ("a.service", "", "a.service"),
    ],
)
def test_the_name_that_systemd_has_a_unit_under(name: str, main: str, shows: str) -> None:
    assert look_at_unit(answering(shown(Id=main)), name).main == shows


def test_another_service() -> None:
    text = shown(
        DynamicUser="yes",
        AmbientCapabilities="cap_ipc_lock",
        PrivateUsers="yes",
        NoNewPrivileges="yes",
        LimitMEMLOCK="infinity",
        LimitMEMLOCKSoft="18446744073709551615",
    )
    found = look_at_unit(answering(text), "vm.service")
    assert (found.present, found.user, found.program) == (True, None, None)
    assert (found.ambient, found.settings["NoNewPrivileges"], found.private_users) == (IPC_LOCK, "yes", True)
    assert found.memlock == Limit(None, None)


def test_all_that_a_service_runs(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    text = shown(
        ExecStart=EXEC.format("/bin/sh", "-c { path=/no ; argv[]=x ; }"), ExecStartPre=EXEC.format("/bin/true", "")
    )
    text += f"ExecStartPre={EXEC.format(f'{tmp_path}/prepare', '')}\nExecStop={EXEC.format('/bin/sh', '')}\n"
    found = look_at_unit(answering(text), "vm.service")
    assert found.program
    assert found.program.path == "/bin/sh"
    assert [each.path for each in found.helpers] == ["/bin/true", f"{tmp_path}/prepare"]
    assert [each.writer for each in found.helpers] == [None, Writer(str(tmp_path), "everybody")]
    assert f"{tmp_path}/prepare, which cannot be trusted" in unit_obstacles(found)[-1]


def test_a_service_of_an_older_systemd() -> None:
    text = shown().replace("LimitMEMLOCKSoft", "Unknown").replace("PrivateUsers=no\n", "")
    found = look_at_unit(answering(text), "vm.service")
    assert found.memlock == Limit(8388608, 8388608)
    assert found.private_users is False
    assert found.user == "root"


def test_systemd_does_not_answer() -> None:
    def missing(_command: list[str]) -> tuple[int, str, str]:
        raise FileNotFoundError(errno.ENOENT, "no")

    for run, why in (
        (missing, "ENOENT"),
        (answering("", 1, "Failed to\nconnect to bus\n"), "vm.service: Failed to connect to bus."),
        (answering("", 124), "exit code 124"),
        # In a chroot it says nothing.
        (answering(""), "tells nothing of vm.service"),
    ):
        with pytest.raises(IommufdError, match=why):
            look_at_unit(run, "vm.service")


UNIT = changed(look_at_unit(answering(shown(User="vm")), "vm.service"), program=QEMU)
THEIRS = Program("/opt/vm/q", "/opt/vm/q", True, writer=Writer("/opt/vm", "user alice (uid 1002)"))


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (UNIT, []),
        (changed(UNIT, settings={**UNIT.settings, "NoNewPrivileges": "yes"}), []),
        (changed(UNIT, load_state="not-found"), ["systemd has no unit vm.service."]),
        (changed(UNIT, load_state="masked"), ["systemd cannot start vm.service: its unit is masked."]),
        (changed(UNIT, program=None), ["vm.service starts no program"]),
        (changed(UNIT, program=Program("/q", "/q", present=False)), ["vm.service starts /q, which is not there"]),
        (
            changed(UNIT, program=THEIRS),
            ["vm.service starts /opt/vm/q, which cannot be trusted: /opt/vm can be written by"],
        ),
        (changed(UNIT, helpers=(QEMU, THEIRS)), ["vm.service starts /opt/vm/q, which cannot be trusted"]),
        (changed(UNIT, bounding=1), ["has a CapabilityBoundingSet without CAP_IPC_LOCK"]),
        (changed(UNIT, private_users=True), ["vm.service has PrivateUsers"]),
        (changed(UNIT, program=changed(QEMU, xattr=b"")), ["that the kernel does not understand"]),
        (changed(UNIT, program=changed(QEMU, xattr=NOTHING)), ["takes ambient capabilities from it"]),
        (changed(UNIT, program=changed(QEMU, xattr=NET_ADMIN)), ["`setcap -r /usr/bin/qemu-system-x86_64` removes"]),
        (changed(UNIT, program=changed(QEMU, xattr=b"\1\2\3\4\5")), ["takes ambient capabilities from it"]),
        # It gives what the ambient set would.
        (changed(UNIT, program=changed(QEMU, xattr=with_ipc_lock(None))), []),
        (
            changed(UNIT, program=changed(QEMU, xattr=NOTHING), bounding=0, private_users=True),
            ["CapabilityBoundingSet", "PrivateUsers", "ambient"],
        ),
    ],
)
def test_obstacles_of_an_ambient_capability(unit: _vmm_look.Unit, words: list[str]) -> None:
    found = unit_obstacles(unit)
    assert len(found) == len(words)
    for sentence, word in zip(found, words):
        assert word in sentence
        assert sentence.endswith(".")
