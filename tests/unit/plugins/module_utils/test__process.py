# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The processes here are real ones of this machine; only refusals that its kernel does not utter are made up."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _process
from ansible_collections.virt.iommufd.plugins.module_utils._errors import (
    AccessRefused,
    DescriptorGone,
    HostLacks,
    IommufdError,
    ProcessGone,
)
from ansible_collections.virt.iommufd.plugins.module_utils._process import (
    Descriptors,
    Process,
    character_devices_in,
    is_path_only,
    own_character_device,
)

NULL = os.stat(os.devnull).st_rdev


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def refuse(number: int) -> object:
    def system_call(*_args: int) -> int:
        raise OSError(number, os.strerror(number))

    return system_call


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_process_is_described(held: Process, child: subprocess.Popen[bytes]) -> None:
    assert held.pid == child.pid
    assert held.uid == os.getuid()
    assert held.comm.startswith("python")
    assert str(held) == f"{held.comm} (pid {child.pid})"


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**32 + 1])
def test_a_number_that_is_no_process_id_is_refused(pid: int) -> None:
    with pytest.raises(IommufdError, match=f"{pid} is not the id of a process"), Process.hold(pid):
        pass


def test_a_process_that_has_ended_is_gone(child: subprocess.Popen[bytes]) -> None:
    end(child)
    with pytest.raises(ProcessGone, match=f"no process with the id {child.pid}"), Process.hold(child.pid):
        pass


def test_a_process_that_ends_while_it_is_held_is_gone(held: Process, child: subprocess.Popen[bytes]) -> None:
    end(child)
    with pytest.raises(ProcessGone, match="has ended"):
        held.check_alive()
    with pytest.raises(ProcessGone, match="has ended"):
        held.character_devices()
    with pytest.raises(ProcessGone, match="has ended"):
        held.character_device(50)
    with pytest.raises(ProcessGone, match="has ended"):
        held.borrow(50)


def test_character_devices_are_found_by_number(held: Process) -> None:
    found = held.character_devices()
    devices = found.devices
    assert (found.looked_at >= 4, found.more) == (True, False)
    assert devices[50] == devices[51] == NULL
    assert 52 not in devices
    assert held.character_device(50) == NULL
    assert held.character_device(52) is None
    assert held.link(50) == "/dev/null"
    assert held.link(60) == "closed by now"


def test_a_borrowed_descriptor_shares_the_open_file(held: Process) -> None:
    # An open of /proc/PID/fd/53 would bring the same file, but another position in it.
    borrowed = held.borrow(53)
    try:
        os.lseek(borrowed, 4, os.SEEK_SET)
        assert "pos:\t4\n" in Path(f"/proc/{held.pid}/fdinfo/53").read_text()
        assert not os.get_inheritable(borrowed)
    finally:
        os.close(borrowed)


def test_a_descriptor_opened_with_o_path_is_known(held: Process) -> None:
    plain, path_only = held.borrow(50), held.borrow(51)
    try:
        assert not is_path_only(plain)
        assert is_path_only(path_only)
    finally:
        os.close(plain)
        os.close(path_only)


def test_no_more_descriptors_are_looked_at_than_asked_for(held: Process) -> None:
    folder = os.open(f"/proc/{held.pid}/fd", os.O_RDONLY)
    try:
        all_ = character_devices_in(folder)
        # 0, 1 and 2 are pipes, and the lowest come first.
        assert character_devices_in(folder, 3) == Descriptors({}, 3, True)
        assert character_devices_in(folder, 4) == Descriptors({50: NULL}, 4, True)
        assert character_devices_in(folder, all_.looked_at) == all_
        assert character_devices_in(folder, wanted={NULL + 1}) == Descriptors({}, all_.looked_at, False)
    finally:
        os.close(folder)


def test_holding_a_process_leaves_no_descriptor(child: subprocess.Popen[bytes]) -> None:
    before = open_descriptors()
    with pytest.raises(ZeroDivisionError), Process.hold(child.pid):
        raise ZeroDivisionError
    assert open_descriptors() == before


@pytest.mark.parametrize("fd", [60, -1, 2**31, 2**32 + 50])
def test_a_descriptor_that_is_not_there_is_gone(held: Process, fd: int) -> None:
    with pytest.raises(DescriptorGone, match=str(fd)):
        held.borrow(fd)


@pytest.mark.parametrize(
    ("number", "exception", "words"),
    [
        (errno.EPERM, AccessRefused, ["CAP_SYS_PTRACE", "ptrace_scope|Yama is not", "AppArmor", "seccomp", "EPERM"]),
        (errno.EACCES, AccessRefused, ["CAP_SYS_PTRACE", "EACCES"]),
        (errno.ESRCH, ProcessGone, ["has ended"]),
        (errno.EBADF, DescriptorGone, ["no descriptor 50", "ls -l /proc/"]),
        (errno.ENOSYS, HostLacks, ["pidfd_getfd", "5.6", "seccomp"]),
        (errno.EMFILE, IommufdError, ["EMFILE", "descriptor 50"]),
    ],
)
def test_what_pidfd_getfd_refuses(
    held: Process, monkeypatch: pytest.MonkeyPatch, number: int, exception: type[Exception], words: list[str]
) -> None:
    monkeypatch.setattr(_process, "pidfd_getfd", refuse(number))
    for word in words:
        with pytest.raises(exception, match=word):
            held.borrow(50)


@pytest.mark.parametrize(
    ("number", "exception", "words"),
    [
        (errno.EINVAL, IommufdError, ["42 is a thread"]),
        (errno.ENOENT, IommufdError, ["42 is a thread"]),
        (errno.ENOSYS, HostLacks, ["pidfd_open", "5.3"]),
        (errno.EPERM, AccessRefused, ["seccomp", "EPERM"]),
        (errno.EMFILE, IommufdError, ["process 42", "EMFILE"]),
    ],
)
def test_what_pidfd_open_refuses(
    monkeypatch: pytest.MonkeyPatch, number: int, exception: type[Exception], words: list[str]
) -> None:
    monkeypatch.setattr(_process, "pidfd_open", refuse(number))
    for word in words:
        with pytest.raises(exception, match=word), Process.hold(42):
            pass


@pytest.mark.parametrize("method", ["character_devices", "character_device"])
def test_what_proc_refuses(held: Process, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    for name in ("scandir", "readlink"):
        monkeypatch.setattr(os, name, refuse(errno.EACCES))
    monkeypatch.setattr(_process, "character_device", refuse(errno.EACCES))
    with pytest.raises(AccessRefused, match="CAP_SYS_PTRACE"):
        getattr(held, method)(*([] if method == "character_devices" else [50]))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_descriptor_that_its_file_system_refuses_to_tell_of_is_no_device(
    held: Process, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(_process, "character_device", refuse(number))
    assert held.character_devices().devices == {}
    assert held.character_device(50) is None
    assert own_character_device(0) is None


def test_statx_may_be_hidden(held: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_process, "character_device", refuse(errno.ENOSYS))
    with pytest.raises(HostLacks, match="statx"):
        held.character_devices()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EPERM])
def test_proc_may_hide_the_process(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = _process.read_file

    def read(path: str) -> bytes:
        if path.startswith(f"/proc/{child.pid}/"):
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(_process, "read_file", read)
    with pytest.raises(AccessRefused, match=f"/proc hides process {child.pid}"), Process.hold(child.pid):
        pass


@pytest.mark.parametrize(
    ("name", "text", "exception", "words"),
    [
        ("fdinfo", b"Pid:\t7\n", AccessRefused, "for another pid namespace"),
        ("stat", b"1 (a) Z " + b"0 " * 40, IommufdError, "first thread of .* has ended"),
        ("stat", b"1 (a) S 0 0 0 0 0 2129984 " + b"0 " * 40, IommufdError, "is a kernel thread"),
        (
            "status",
            b"Name:\tvm\nUid:\t1\t1\t1\t1\nCapPrm:\t0\nCapEff:\t0\nCapBnd:\t0\n",
            ProcessGone,
            "is about to end",
        ),
    ],
)
def test_processes_that_cannot_hold_an_iommufd(
    child: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: bytes,
    exception: type[Exception],
    words: str,
) -> None:
    real = _process.read_file
    monkeypatch.setattr(_process, "read_file", lambda path: text if name in path.split("/") else real(path))
    with pytest.raises(exception, match=words), Process.hold(child.pid):
        pass


def test_what_was_opened_with_o_path(held: Process) -> None:
    assert [held.is_path_only(fd) for fd in (50, 51)] == [False, True]
    with pytest.raises(DescriptorGone):
        held.is_path_only(4711)


def test_what_is_said_of_a_descriptor_has_no_end(held: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may put an epoll descriptor in the place of a device, with a line for each of millions of others."""
    read: list[int] = []

    def read_file(path: str, most: int = 2**30) -> bytes:
        read.append(most)
        return (b"pos:\t0\nflags:\t010000002\n" + b"tfd:        4 events:       19\n" * 1000)[:most]

    monkeypatch.setattr(_process, "read_file", read_file)
    assert held.is_path_only(50)
    assert max(read) <= 4096
