# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import json
import os
import pwd
import re
import resource
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _device, _iommufd_exec
from ansible_collections.virt.iommufd.plugins.module_utils._change import Result
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import (
    BUSY,
    CHANGED,
    DENIED,
    FAILED,
    RACED,
    UNCHANGED,
    UNSUPPORTED,
)
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd_exec import (
    NO_IOMMUFD,
    NOT_BECOME,
    NOT_EXECUTABLE,
    NOT_FOUND,
    NOT_SET,
    USAGE,
    Refusal,
    Request,
    fill,
    find_program,
    gets_ipc_lock,
    obstacle,
    parse,
    verdict,
)
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel
from ansible_collections.virt.iommufd.tests.unit.fake_task import (
    ALL,
    IPC_LOCK,
    SETGID,
    SETPCAP,
    SETUID,
    SYS_RESOURCE,
    Executed,
    FakeTask,
)

ROOT = Path(__file__).resolve().parents[4]
TREE = Path(_iommufd_exec.__file__).parents[5]
INFINITY = resource.RLIM_INFINITY
COMMAND = ["qemu", "-object", "iommufd,id=iommufd0,fd={iommufd}"]
VM = pwd.struct_passwd(("vm", "x", 1001, 1001, "", "/home/vm", "/bin/sh"))
TOOR = pwd.struct_passwd(("toor", "x", 0, 0, "", "/root", "/bin/sh"))
GROUPS = [36, 1001]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {}),
        (["--strict"], {"strict": True}),
        (["--user", "vm", "--rlimit-mode=user"], {"user": "vm", "rlimit_mode": "user"}),
        (["--memlock", "100M"], {"memlock": 100 * 2**20}),
        (["--memlock=0"], {"memlock": 0}),
        (["--memlock", "infinity"], {"memlock": INFINITY}),
        (["--memlock", "unlimited"], {"memlock": INFINITY}),
        (["--bounding", "none"], {"bounding": frozenset()}),
        (["--bounding", "CAP_NET_ADMIN,ipc_lock"], {"bounding": frozenset({12, IPC_LOCK})}),
    ],
)
def test_what_the_arguments_ask_for(options: list[str], expected: dict[str, Any]) -> None:
    assert parse([*options, "--", *COMMAND]) == Request(tuple(COMMAND), **expected)


def test_the_first_separator_is_ours_and_the_others_are_the_commands() -> None:
    assert parse(["--strict", "--", "a", "--", "--user", "{iommufd}"]) == Request(
        ("a", "--", "--user", "{iommufd}"), strict=True
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "There is no COMMAND"),
        (["--strict", "--"], "There is no COMMAND"),
        (["--strict", *COMMAND], "unrecognized arguments: qemu"),
        (["--", "qemu", "fd=3"], r"No argument of qemu has \{iommufd\} in it"),
        (["--", "{iommufd}", "fd=3"], r"No argument of \{iommufd\} has"),
        (["--str", "--", *COMMAND], "unrecognized arguments: --str"),
        (["--user", "--", *COMMAND], "--user: expected one argument"),
        (["--rlimit-mode", "none", "--", *COMMAND], "invalid choice: 'none'"),
        (["--memlock", "much", "--", *COMMAND], "--memlock: 'much' is not a size.* Or give infinity"),
        (["--memlock=-1", "--", *COMMAND], "--memlock: '-1' is not a size"),
        (["--memlock", "9E", "--", *COMMAND], "--memlock: '9E' is too large"),
        (["--bounding", "net_admin,all", "--", *COMMAND], "--bounding: 'all' is not a capability"),
        (["--bounding", "", "--", *COMMAND], "--bounding: '' is not a capability"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(Refusal, match=words) as raised:
        parse(arguments)
    assert raised.value.code == USAGE


def test_only_the_placeholder_in_an_argument_is_filled_in() -> None:
    words = ["{iommufd}", "fd={iommufd},again={iommufd}", "{IOMMUFD}", "{ iommufd }", "$HOME %s {}", "\udcff"]
    assert fill(words, 3) == ["{iommufd}", "fd=3,again=3", "{IOMMUFD}", "{ iommufd }", "$HOME %s {}", "\udcff"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("result", "tolerable", "words"),
    [
        (Result(CHANGED, 0, 1), True, "^$"),
        (Result(UNCHANGED, 1, 1), True, "^$"),
        (Result(DENIED, 0, 0, errno.EPERM), True, "CAP_SYS_RESOURCE.*EPERM.*CapabilityBoundingSet="),
        (Result(UNSUPPORTED, None, None, errno.ENOTTY), True, "the ioctl IOMMU_OPTION.*ENOTTY"),
        (Result(UNSUPPORTED, None, None, errno.EOPNOTSUPP), True, "the option rlimit_mode.*EOPNOTSUPP"),
        (Result(FAILED, 0, 0, errno.EINVAL), False, "EINVAL"),
        (Result(BUSY, 0, 0, errno.EBUSY), False, "EBUSY"),
        (Result(RACED, 0, 0), False, "someone else set it"),
    ],
)
def test_what_keeps_the_mode_from_being_set(result: Result, tolerable: bool, words: str, strict: bool) -> None:
    request = Request(("qemu", "{iommufd}"), strict=strict)
    if tolerable and (not strict or words == "^$"):
        assert re.search(words, obstacle(result, request))
        return
    with pytest.raises(Refusal, match=f"{words}.*So qemu is not started") as raised:
        obstacle(result, request)
    assert raised.value.code == NOT_SET


@pytest.mark.parametrize(
    ("mode", "limit", "unlimited", "words"),
    [
        (1, 100 * 2**20, False, "rlimit_mode=process.* to it alone, and held against its RLIMIT_MEMLOCK, 100 MiB"),
        (0, INFINITY, False, "rlimit_mode=user.* charged to its user.* RLIMIT_MEMLOCK, which is unlimited"),
        (1, 4096, True, "rlimit_mode=process.* against no limit, since it has CAP_IPC_LOCK"),
    ],
)
def test_the_line_on_the_accounting(mode: int, limit: int, unlimited: bool, words: str) -> None:
    assert re.search(words, verdict(mode, limit, unlimited))


@pytest.fixture
def task(null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> FakeTask:
    """The process that runs the launcher, on a host with an iommufd and the user vm."""
    fake = FakeTask()
    fake.install(monkeypatch)
    monkeypatch.setattr(_device, "DEVICE", os.devnull)
    monkeypatch.setattr(pwd, "getpwnam", {"vm": VM, "toor": TOOR}.__getitem__)
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: GROUPS)
    # What Python does to signals when it starts.
    monkeypatch.setattr(signal, "signal", lambda number, action: None)
    return fake


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The exit code of the launcher with these options and COMMAND. Raises Executed where it becomes COMMAND."""
    monkeypatch.setattr(sys, "argv", ["iommufd-exec", *options, "--", *COMMAND])
    return _iommufd_exec.main()


def test_a_user_who_has_nothing_but_the_descriptor(
    task: FakeTask, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    task.inheritable = 1 << IPC_LOCK
    with pytest.raises(Executed) as executed:
        run(monkeypatch, "--user", "vm", "--memlock", "100M", "--bounding", "net_admin")
    assert kernel.mode == 1
    assert (task.uids, task.gids, sorted(task.groups)) == ((1001,) * 3, (1001,) * 3, GROUPS)
    assert (task.effective, task.permitted, task.inheritable, task.ambient) == (0, 0, 0, 0)
    assert task.bounding == 1 << 12
    assert task.limit == (100 * 2**20, 100 * 2**20)
    assert "rlimit_mode=process" in capfd.readouterr().err
    # It is none of the standard streams, and the command gets it.
    fd = int(executed.value.words[2].rpartition("=")[2])
    try:
        assert fd > 2
        assert os.get_inheritable(fd)
        assert stat.S_ISCHR(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def test_without_options_nothing_else_is_changed(
    task: FakeTask, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Executed):
        run(monkeypatch)
    assert kernel.mode == 1
    assert task == FakeTask()
    assert "held against no limit" in capfd.readouterr().err


def test_the_mode_that_is_in_force_takes_no_privilege(
    task: FakeTask, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kernel.privileged = False
    with pytest.raises(Executed):
        run(monkeypatch, "--rlimit-mode", "user", "--strict", "--user", "vm")
    said = capfd.readouterr().err
    assert "warning" not in said
    assert "rlimit_mode=user" in said


@pytest.mark.parametrize("without", [0, errno.ENOTTY, errno.EOPNOTSUPP])
def test_what_is_tolerated_is_warned_of_and_strictly_refused(
    task: FakeTask,
    kernel: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    without: int,
) -> None:
    kernel.privileged, kernel.without = False, without
    # Refused before anything else that fails.
    task.effective &= ~(1 << SYS_RESOURCE)
    assert run(monkeypatch, "--user", "vm", "--memlock", "100M", "--strict") == NOT_SET
    assert "So qemu is not started" in capfd.readouterr().err
    assert task.uids == (0, 0, 0)
    with pytest.raises(Executed):
        run(monkeypatch, "--user", "vm")
    said = capfd.readouterr().err
    assert "warning: " in said
    assert "qemu is started all the same" in said
    assert "rlimit_mode=user" in said
    assert task.uids == (1001, 1001, 1001)


def test_who_is_that_user_already_only_loses_capabilities(task: FakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 1 << SYS_RESOURCE
    task.uids, task.gids, task.groups = (1001,) * 3, (1001,) * 3, [36]
    task.effective = task.permitted = task.inheritable = task.ambient = held
    with pytest.raises(Executed):
        run(monkeypatch, "--user", "vm", "--memlock", "100M")
    assert (task.effective, task.permitted, task.inheritable, task.ambient) == (0, 0, 0, 0)
    assert task.limit == (100 * 2**20, 100 * 2**20)


def lacking(*capabilities: int) -> dict[str, Any]:
    return {"effective": ALL & ~sum(1 << each for each in capabilities)}


@pytest.mark.parametrize(
    ("state", "options", "code", "words"),
    [
        ({}, ["--user", "nobody-here"], NOT_BECOME, "--user: This host has no user 'nobody-here'"),
        ({}, ["--user", "toor"], NOT_BECOME, "--user toor would give up nothing"),
        (lacking(SETGID), ["--user", "vm"], NOT_BECOME, "cannot become user vm.*EPERM.*CAP_SETGID"),
        (lacking(SETUID), ["--user", "vm"], NOT_BECOME, "cannot become user vm.*EPERM"),
        ({"stuck": "setresuid"}, ["--user", "vm"], NOT_BECOME, "only in part"),
        ({"stuck": "capabilities"}, ["--user", "vm"], NOT_BECOME, "only in part"),
        ({"stuck": "return"}, ["--user", "vm"], NOT_BECOME, "only in part"),
        (lacking(SYS_RESOURCE), ["--memlock", "100M"], NOT_BECOME, "cannot be set to 104857600 bytes.*LimitMEMLOCK="),
        (lacking(SETPCAP), ["--bounding", "none"], NOT_BECOME, "bounding set cannot be limited.*CAP_SETPCAP"),
        ({"error": errno.ENOENT}, [], NOT_FOUND, "qemu cannot be executed.*ENOENT"),
        ({"error": errno.EACCES}, [], NOT_EXECUTABLE, "qemu cannot be executed.*EACCES"),
        ({"error": errno.E2BIG}, [], NOT_EXECUTABLE, "qemu cannot be executed.*E2BIG"),
    ],
)
def test_whatever_fails_starts_nothing(
    task: FakeTask,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    state: dict[str, Any],
    options: list[str],
    code: int,
    words: str,
) -> None:
    for name, value in state.items():
        setattr(task, name, value)
    assert run(monkeypatch, *options) == code
    said = capfd.readouterr().err
    assert re.search(words, said)
    assert said.splitlines()[-1].startswith("iommufd-exec: ")


def test_a_host_without_the_device(
    task: FakeTask, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for module in (_device, _iommufd_exec):
        monkeypatch.setattr(module, "DEVICE", str(tmp_path / "iommu"))
    assert run(monkeypatch) == NO_IOMMUFD
    said = capfd.readouterr().err
    assert "There is no" in said
    assert said.endswith(" Or does the unit have PrivateDevices=?\n")
    # Where the kernel has none, no unit can help it.
    with monkeypatch.context() as patch:
        patch.setattr(_device, "misc_rdev", lambda: None)
        assert run(patch) == NO_IOMMUFD
    said = capfd.readouterr().err
    assert "This kernel has no iommufd" in said
    assert "PrivateDevices" not in said
    # A link leads wherever its owner wants.
    (tmp_path / "iommu").symlink_to(os.devnull)
    assert run(monkeypatch) == NO_IOMMUFD
    assert "cannot be opened by uid 0 (ELOOP" in capfd.readouterr().err


def test_another_file_is_sent_nothing(
    task: FakeTask,
    kernel: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for path in ("/dev/zero", str(tmp_path / "iommu")):
        (tmp_path / "iommu").write_bytes(b"")
        monkeypatch.setattr(_device, "DEVICE", path)
        assert run(monkeypatch) == NO_IOMMUFD
        assert "is not the kernel's iommufd but something else" in capfd.readouterr().err
    assert kernel.calls == []


def test_a_sandbox_that_hides_the_devices_number(
    task: FakeTask, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def hidden() -> int:
        raise HostLacks("The device number is not to be had.") from FileNotFoundError(2, "No", "/proc/misc")

    monkeypatch.setattr(_device, "misc_rdev", hidden)
    assert run(monkeypatch) == NO_IOMMUFD
    assert capfd.readouterr().err.endswith("is not to be had.\n")


def test_what_was_not_foreseen_has_a_code_of_its_own(
    task: FakeTask, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pwd, "getpwnam", lambda name: 1 / 0)
    assert run(monkeypatch, "--user", "vm") == NOT_BECOME
    assert "not foreseen: ZeroDivisionError" in capfd.readouterr().err


def test_a_word_that_no_program_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' own process goes on, and a program to which one of them writes may end before.
    monkeypatch.setattr(signal, "signal", lambda number, action: None)
    with pytest.raises(Refusal, match="embedded null byte") as raised:
        _iommufd_exec.execute(["/bin/true", "a\0b"], os.open(os.devnull, os.O_RDWR))
    assert raised.value.code == NOT_EXECUTABLE


def test_where_the_program_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("folder", "data", "program", "later"):
        (tmp_path / folder).mkdir()
    (tmp_path / "folder" / "qemu").mkdir()
    for folder, mode in (("data", 0o644), ("program", 0o755), ("later", 0o755)):
        (tmp_path / folder / "qemu").write_bytes(b"")
        (tmp_path / folder / "qemu").chmod(mode)
    folders = [str(tmp_path / name) for name in ("none", "folder", "data", "program", "later")]
    monkeypatch.setenv("PATH", ":".join(folders))
    assert find_program("qemu") == f"{tmp_path}/program/qemu"
    assert find_program("./qemu") == "./qemu"
    assert find_program("none") == "none"


GIVES_IT = struct.pack("<5I", 0x02000001, 1 << IPC_LOCK, 0, 0, 0)


class Kernel(FakeTask):
    """One that also knows NoNewPrivileges."""

    no_new_privs = 0

    def prctl(self, option: int, *arguments: int) -> int:
        return self.no_new_privs if option == 39 else super().prctl(option, *arguments)


@pytest.fixture
def capable(task: FakeTask, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A host where each file gives CAP_IPC_LOCK."""
    kernel = Kernel()
    kernel.install(monkeypatch)
    monkeypatch.setattr(os, "getxattr", lambda _path, _name: GIVES_IT)
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_flag=0))
    return kernel


def test_a_file_that_lifts_the_limit_is_warned_of(
    capable: Kernel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_iommufd_exec, "find_program", "/usr/bin/{}".format)
    with pytest.raises(Executed):
        run(monkeypatch, "--user", "vm")
    warning, accounting = capfd.readouterr().err.splitlines()
    assert warning.startswith("iommufd-exec: warning: the file /usr/bin/qemu gives CAP_IPC_LOCK to qemu")
    assert "setcap -r /usr/bin/qemu" in warning
    assert "held against no limit" in accounting


def test_who_has_the_capability_anyway_is_not_warned(
    capable: Kernel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Executed):
        run(monkeypatch)
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize("option", ["--bounding=none", "--bounding=ipc_lock"])
def test_the_bounding_set_counts_as_it_was_limited(
    capable: Kernel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(Executed):
        run(monkeypatch, "--user", "vm", option)
    assert ("warning" in capfd.readouterr().err) == (option == "--bounding=ipc_lock")


def refuse(number: int) -> Any:
    def fail(_path: str, _name: str) -> bytes:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"getxattr": refuse(errno.ENODATA)}, False),
        ({"getxattr": refuse(errno.ENOENT)}, False),
        ({"getxattr": lambda _path, _name: b"?"}, False),
        ({"getxattr": lambda _path, _name: GIVES_IT.replace(b"\x01", b"\x00", 1)}, False),
        ({"statvfs": lambda _path: SimpleNamespace(f_flag=os.ST_NOSUID)}, False),
    ],
)
def test_whether_a_file_lifts_the_limit(
    capable: Kernel, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: bool
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(os, name, value)
    assert gets_ipc_lock("/usr/bin/qemu") is expected
    capable.no_new_privs = 1
    assert not gets_ipc_lock("/usr/bin/qemu")


def apart(script: str, **settings: Any) -> str:
    """What a program prints that has imported the launcher, away from the tests' own process."""
    code = f"import sys; sys.path[:0] = [{str(TREE)!r}]\nimport json, os\n"
    code += f"from ansible_collections.virt.iommufd.plugins.module_utils import _device, _iommufd_exec\n{script}"
    command = [sys.executable, "-I", "-c", code]
    printed: str = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60, **settings).stdout
    return printed


@pytest.mark.parametrize("given", [{}, {"LC_CTYPE": "C"}, {"LC_ALL": "C", "A": "b=c"}, {"LC_CTYPE": "C.UTF-8"}])
def test_the_environment_is_the_one_that_was_given(given: dict[str, str]) -> None:
    script = "print(json.dumps({os.fsdecode(k): os.fsdecode(v) for k, v in _iommufd_exec.given_environment().items()}))"
    assert json.loads(apart(script, env=given)) == given


BECOME = """
fd = os.open(os.devnull, os.O_RDWR)
other = os.open("/", os.O_RDONLY)
script = '''
import json, os, sys
print(json.dumps([[os.fsencode(word).hex() for word in sys.argv[1:]], sorted(os.listdir("/proc/self/fd"))]))
'''
_iommufd_exec.execute([sys.executable, "-I", "-c", script, "$HOME", "", "a b", os.fsdecode(b"\\xff\\xfe"), "'"], fd)
"""


def test_a_real_program_gets_its_arguments_and_the_descriptor_and_nothing_else() -> None:
    words, descriptors = json.loads(apart(BECOME, stdin=subprocess.DEVNULL))
    assert [bytes.fromhex(word) for word in words] == [b"$HOME", b"", b"a b", b"\xff\xfe", b"'"]
    # The three standard ones, ours, and the one that lists them.
    assert len(descriptors) == 5


def test_a_real_program_does_not_ignore_the_signals_that_python_does() -> None:
    grep = '["grep", "^SigIgn:", "/proc/self/status"]'
    found = apart(f"_iommufd_exec.execute({grep}, os.open(os.devnull, os.O_RDWR))")
    ignored = int(found.split()[1], 16)
    assert not ignored >> signal.SIGPIPE - 1 & 1
    assert not ignored >> signal.SIGXFSZ - 1 & 1


def test_it_needs_no_standard_streams() -> None:
    script = """
import contextlib, fcntl
_device.DEVICE = os.devnull
_device.misc_rdev = lambda: os.stat(os.devnull).st_rdev
out = os.dup(1)
os.closerange(0, 3)
fd = _iommufd_exec.open_device()
_iommufd_exec.say("nobody hears it")
os.write(out, json.dumps([fd > 2, bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)]).encode())
"""
    assert json.loads(apart(script)) == [True, True]


def test_help_says_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(["--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    page = (ROOT / "docs" / "iommufd-exec.8").read_text(encoding="utf-8").replace("\\-", "-")
    options = {word for action in _iommufd_exec.make_parser()._actions for word in action.option_strings}
    codes = {str(code) for code in (USAGE, NO_IOMMUFD, NOT_SET, NOT_BECOME, NOT_EXECUTABLE, NOT_FOUND)}
    for word in options | codes | {"CAP_SYS_RESOURCE", "CAP_SETPCAP", "CAP_SETUID", "CAP_SETGID", "SIGPIPE"}:
        assert word in shown
        assert word in page
    assert len(codes) == 6
    # The page names no option that there is none of.
    assert set(re.findall(r" (--[a-z][a-z-]+)", page.partition("SYNOPSIS")[2])) <= options
