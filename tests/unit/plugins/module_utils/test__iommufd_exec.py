# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import fcntl
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
    NOT_BECOME,
    NOT_EXECUTABLE,
    NOT_FOUND,
    NOT_OPENED,
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
from ansible_collections.virt.iommufd.plugins.module_utils._user import User
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
        (["--device", "01:00.0", "--device=0000:01:00.0"], {"devices": ("0000:01:00.0",)}),
        (["--bounding", "CAP_NET_ADMIN,ipc_lock"], {"bounding": frozenset({12, IPC_LOCK})}),
    ],
)
def test_what_the_arguments_ask_for(options: list[str], expected: dict[str, Any]) -> None:
    command = [*COMMAND, "-device", "vfio-pci,fd={01:00.0},iommufd=iommufd0"] if "devices" in expected else COMMAND
    assert parse([*options, "--", *command]) == Request(tuple(command), **expected)


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
        (["--device", "vfio0", "--", *COMMAND], "--device: 'vfio0' is not a PCI address"),
        (["--device", "01:00.0", "--", *COMMAND], r"has \{0000:01:00.0\} in it, so it would not get --device"),
        (["--", *COMMAND, "fd={01:00.0}"], r"\{01:00.0\} is not opened: give --device 0000:01:00.0, too"),
        (["--device", "01:00.0", "--", "a", "{01:00.0}"], r"No argument of a has \{iommufd\} in it"),
        (["--", *COMMAND, "{iommufd:}"], r"\{iommufd:\} names no iommufd"),
        (["--", *COMMAND, "{iommufd:a b}"], r"\{iommufd:a b\} names no iommufd"),
        (["--bounding", "", "--", *COMMAND], "--bounding: '' is not a capability"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(Refusal, match=words) as raised:
        parse(arguments)
    assert raised.value.code == USAGE


def test_only_the_placeholder_in_an_argument_is_filled_in() -> None:
    others = ["{IOMMUFD}", "{ iommufd }", "$HOME %s {}", "{1:0.0}", "\udcff"]
    words = ["{iommufd}", "fd={iommufd},again={iommufd}", "{iommufd:b}{0A:00.1}", "{0000:0a:00.1}", *others]
    fds = {"iommufd": 3, "iommufd:b": 4, "0000:0a:00.1": 5}
    assert fill(words, fds) == ["{iommufd}", "fd=3,again=3", "45", "5", *others]


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


def run(monkeypatch: pytest.MonkeyPatch, *options: str, more: tuple[str, ...] = ()) -> int:
    """The exit code of the launcher with these options and COMMAND. Raises Executed where it becomes COMMAND."""
    monkeypatch.setattr(sys, "argv", ["iommufd-exec", *options, "--", *COMMAND, *more])
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


def test_each_named_iommufd_is_one_that_is_set(
    task: FakeTask, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real = _iommufd_exec.open_device

    def opens() -> int:
        kernel.mode = 0
        opened.append(real())
        return opened[-1]

    monkeypatch.setattr(_iommufd_exec, "open_device", opens)
    with pytest.raises(Executed) as executed:
        run(monkeypatch, more=("{iommufd:b}", "{iommufd:b}", "{iommufd:c}"))
    try:
        assert len(opened) == 3
        assert kernel.calls.count((0, 1)) == 3
        assert executed.value.words[3:] == [str(opened[each]) for each in (1, 1, 2)]
    finally:
        for fd in opened:
            os.close(fd)


@pytest.fixture
def pci(task: FakeTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What sysfs has of 0000:01:00.0, whose node of VFIO is /dev/null, which nobody else has open."""
    folder = tmp_path / "0000:01:00.0"
    (folder / "vfio-dev" / "null").mkdir(parents=True)
    status = os.stat(os.devnull).st_rdev
    (folder / "vfio-dev" / "null" / "dev").write_text(f"{os.major(status)}:{os.minor(status)}\n")
    (folder / "driver").symlink_to("../../../bus/pci/drivers/vfio-pci")
    monkeypatch.setattr(_iommufd_exec, "PCI_DEVICES", str(tmp_path))
    monkeypatch.setattr(_iommufd_exec, "_NODES", ())
    monkeypatch.setattr(_iommufd_exec, "_holders", lambda paths: iter(()))
    return folder


DEVICE = ("--device", "01:00.0")
GETS_IT = ("-device", "vfio-pci,id=a,fd={01:00.0},iommufd=iommufd0")


def test_a_device_is_opened_before_root_is_given_up(pci: Path, task: FakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    uids: list[Any] = []
    real = _iommufd_exec.open_vfio

    def opens(address: str) -> int:
        uids.append(task.uids)
        return real(address)

    monkeypatch.setattr(_iommufd_exec, "open_vfio", opens)
    with pytest.raises(Executed) as executed:
        run(monkeypatch, *DEVICE, "--user", "vm", more=GETS_IT)
    assert uids == [(0, 0, 0)]
    assert task.uids == (1001,) * 3
    fd = int(re.fullmatch(r"vfio-pci,id=a,fd=(\d+),iommufd=iommufd0", executed.value.words[4])[1])  # type: ignore[index]
    iommufd = int(executed.value.words[2].rpartition("=")[2])
    try:
        assert fd > 2
        assert fd != iommufd
        assert os.get_inheritable(fd)
        assert os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev
    finally:
        os.close(fd)
        os.close(iommufd)


def unbound(pci: Path) -> None:
    (pci / "vfio-dev" / "null" / "dev").unlink()
    (pci / "vfio-dev" / "null").rmdir()
    (pci / "vfio-dev").rmdir()
    (pci / "driver").unlink()


def bound_to_another(pci: Path) -> None:
    unbound(pci)
    (pci / "driver").symlink_to("../drivers/nvme")


def without_a_class(pci: Path) -> None:
    unbound(pci)
    (pci / "driver").symlink_to("../drivers/vfio-pci")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda pci: pci.rename(pci.with_name("gone")), "This host has no PCI device 0000:01:00.0"),
        (unbound, "bound to no driver, and not to VFIO's.*driverctl set-override 0000:01:00.0 vfio-pci"),
        (bound_to_another, "bound to the driver nvme, and not to VFIO's.*driverctl set-override"),
        (without_a_class, "bound to vfio-pci, and has no node of its own.*CONFIG_VFIO_DEVICE_CDEV"),
        (lambda pci: (pci / "vfio-dev" / "null" / "dev").unlink(), "no node of its own.*CONFIG_VFIO_DEVICE_CDEV"),
        (lambda pci: (pci / "vfio-dev" / "null" / "dev").write_text("1:5\n"), "/null is not the device that sysfs has"),
        (lambda pci: (pci / "vfio-dev" / "null").rename(pci / "vfio-dev" / "gone-0"), r"ENOENT.*PrivateDevices="),
    ],
)
def test_what_is_wrong_with_a_device(
    pci: Path,
    task: FakeTask,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    spoil: Any,
    words: str,
) -> None:
    spoil(pci)
    assert run(monkeypatch, *DEVICE, "--user", "vm", more=GETS_IT) == NOT_OPENED
    assert re.search(words, capfd.readouterr().err)
    assert task.uids == (0, 0, 0)


def test_a_device_is_not_opened_where_somebody_else_can_write(
    pci: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_iommufd_exec, "_DEV", str(pci))
    pci.chmod(0o777)
    (pci / "null").symlink_to(os.devnull)
    assert run(monkeypatch, *DEVICE, more=GETS_IT) == NOT_OPENED
    assert "is not root's alone: nothing is opened there" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EBUSY, "EBUSY.*another process uses it"), (errno.EACCES, "EACCES.*owner and mode.*DeviceAllow=")],
)
def test_a_device_that_the_kernel_does_not_open(
    pci: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int, words: str
) -> None:
    def refused(_name: str, _number: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_iommufd_exec, "_open_node", refused)
    assert run(monkeypatch, *DEVICE, more=GETS_IT) == NOT_OPENED
    assert re.search(words, capfd.readouterr().err)


@pytest.fixture
def group(pci: Path, tmp_path: Path) -> Path:
    """The IOMMU group of that device, 7, with another one of VFIO's and a bridge. What is put there is in it, too."""
    found = tmp_path / "iommu_groups" / "7" / "devices"
    (pci / "iommu_group").symlink_to(found.parent)
    (tmp_path / "0000:01:00.1" / "vfio-dev" / "vfio9").mkdir(parents=True)
    (tmp_path / "0000:00:1c.0").mkdir()
    found.mkdir(parents=True)
    for name, driver in (("0000:01:00.0", ""), ("0000:01:00.1", "vfio-pci"), ("0000:00:1c.0", "pcieport")):
        (found / name).symlink_to(tmp_path / name)
        if driver:
            (tmp_path / name / "driver").symlink_to(f"../drivers/{driver}")
    return found


def binds(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """What the kernel answers to the ioctl that binds a device."""
    bind = fcntl.ioctl

    def ioctl(fd: int, request: int, argument: Any) -> Any:
        if request != 0x3B76:
            return bind(fd, request, argument)
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBUSY, errno.EPERM, errno.EIO, 0])
def test_a_device_that_is_in_use_is_refused_with_its_user(
    group: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    looked: list[set[str]] = []

    def holders(paths: set[str]) -> list[int]:
        looked.append(paths)
        return [123]

    monkeypatch.setattr(_iommufd_exec, "_holders", holders)
    binds(monkeypatch, number)
    if number not in (errno.EINVAL, errno.EBUSY, errno.EPERM):
        # A name may be another file's, and what is open need not be bound.
        with pytest.raises(Executed):
            run(monkeypatch, *DEVICE, more=GETS_IT)
        return
    assert run(monkeypatch, *DEVICE, more=GETS_IT) == NOT_OPENED
    said = capfd.readouterr().err
    assert "is in use, probably by process 123, which has it, or another device of its IOMMU group 7, open" in said
    assert looked == [{"/dev/null", "/dev/vfio/7", "/dev/vfio9"}]


@pytest.mark.parametrize(("driver", "number"), [("ahci", errno.EPERM), ("ahci", 0), ("", errno.EPERM)])
def test_a_device_whose_group_is_not_vfios_alone(
    group: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], driver: str, number: int
) -> None:
    other = group.parents[2] / "0000:01:00.2"
    other.mkdir()
    (group / other.name).symlink_to(other)
    if driver:
        (other / "driver").symlink_to(f"../drivers/{driver}")
    binds(monkeypatch, number)
    if not (driver and number):
        # What the kernel lets a VM have is given, and without a reason nothing is tried.
        with pytest.raises(Executed):
            run(monkeypatch, *DEVICE, more=GETS_IT)
        return
    assert run(monkeypatch, *DEVICE, more=GETS_IT) == NOT_OPENED
    said = capfd.readouterr().err
    assert "is in IOMMU group 7 with 0000:01:00.2 (driver ahci), and the kernel gives" in said
    assert "bind these to vfio-pci, too" in said


def test_who_holds_a_node(tmp_path: Path) -> None:
    path = tmp_path / "node"
    path.touch()
    with path.open():
        # This process does not count.
        assert list(_iommufd_exec._holders({str(path)})) == []
        with path.open("w") as out, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) as process:
            assert list(_iommufd_exec._holders({str(path)})) == [process.pid]
            process.communicate()


@pytest.mark.parametrize("there", [True, False])
def test_the_environment_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool) -> None:
    user = User("vm", os.getuid(), 1001, "/home/vm", "/bin/zsh")
    monkeypatch.setattr(User, "runtime_folder", str(tmp_path / "run"))
    if there:
        (tmp_path / "run").mkdir()
    executed: list[dict[bytes, bytes]] = []

    def execute(file: str, words: list[str], environment: dict[bytes, bytes]) -> None:
        executed.append(environment)
        raise Executed(file, words)

    monkeypatch.setattr(os, "execvpe", execute)
    monkeypatch.setattr(signal, "signal", lambda number, action: None)
    given = {b"HOME": b"/root", b"A": b"b", b"XDG_RUNTIME_DIR": b"/run/user/0"}
    given[b"DBUS_SESSION_BUS_ADDRESS"] = b"unix:path=/run/user/0/bus"
    monkeypatch.setattr(_iommufd_exec, "given_environment", lambda: dict(given))
    with pytest.raises(Executed):
        _iommufd_exec.execute(["qemu"], [], user)
    own = {b"HOME": b"/home/vm", b"USER": b"vm", b"LOGNAME": b"vm", b"SHELL": b"/bin/zsh", b"A": b"b"}
    runtime = {b"XDG_RUNTIME_DIR": os.fsencode(tmp_path / "run")} if there else {}
    assert executed == [{**own, **runtime}]
    # A folder of somebody else's is not the user's.
    stranger = user._replace(uid=os.getuid() + 1)
    assert b"XDG_RUNTIME_DIR" not in _iommufd_exec.environment_of(stranger)


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
    assert run(monkeypatch) == NOT_OPENED
    said = capfd.readouterr().err
    assert "There is no" in said
    assert said.endswith(" Or does the unit have PrivateDevices=?\n")
    # Where the kernel has none, no unit can help it.
    with monkeypatch.context() as patch:
        patch.setattr(_device, "misc_rdev", lambda: None)
        assert run(patch) == NOT_OPENED
    said = capfd.readouterr().err
    assert "This kernel has no iommufd" in said
    assert "PrivateDevices" not in said
    # A link leads wherever its owner wants.
    (tmp_path / "iommu").symlink_to(os.devnull)
    assert run(monkeypatch) == NOT_OPENED
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
        assert run(monkeypatch) == NOT_OPENED
        assert "is not the kernel's iommufd but something else" in capfd.readouterr().err
    assert kernel.calls == []


def test_a_sandbox_that_hides_the_devices_number(
    task: FakeTask, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def hidden() -> int:
        raise HostLacks("The device number is not to be had.") from FileNotFoundError(2, "No", "/proc/misc")

    monkeypatch.setattr(_device, "misc_rdev", hidden)
    assert run(monkeypatch) == NOT_OPENED
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
        _iommufd_exec.execute(["/bin/true", "a\0b"], [os.open(os.devnull, os.O_RDWR)])
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
_iommufd_exec.execute([sys.executable, "-I", "-c", script, "$HOME", "", "a b", os.fsdecode(b"\\xff\\xfe"), "'"], [fd])
"""


def test_a_real_program_gets_its_arguments_and_the_descriptor_and_nothing_else() -> None:
    words, descriptors = json.loads(apart(BECOME, stdin=subprocess.DEVNULL))
    assert [bytes.fromhex(word) for word in words] == [b"$HOME", b"", b"a b", b"\xff\xfe", b"'"]
    # The three standard ones, ours, and the one that lists them.
    assert len(descriptors) == 5


def test_a_real_program_does_not_ignore_the_signals_that_python_does() -> None:
    grep = '["grep", "^SigIgn:", "/proc/self/status"]'
    found = apart(f"_iommufd_exec.execute({grep}, [os.open(os.devnull, os.O_RDWR)])")
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
    codes = {str(code) for code in (USAGE, NOT_OPENED, NOT_SET, NOT_BECOME, NOT_EXECUTABLE, NOT_FOUND)}
    for word in options | codes | {"CAP_SYS_RESOURCE", "CAP_SETPCAP", "CAP_SETUID", "CAP_SETGID", "SIGPIPE"}:
        assert word in shown
        assert word in page
    assert len(codes) == 6
    # The page names no option that there is none of.
    assert set(re.findall(r" (--[a-z][a-z-]+)", page.partition("SYNOPSIS")[2])) <= options
