# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import pty

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _syscalls
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import own_status
from ansible_collections.virt.iommufd.plugins.module_utils._syscalls import (
    character_device,
    compare_files,
    have_one_table,
    own_capabilities,
    pidfd_getfd,
    pidfd_open,
    prctl,
)


def test_prctl() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        prctl(2**20)
    # PR_SET_DUMPABLE to what it is.
    assert prctl(4, 1) == 0


def test_a_device_is_told_by_its_number() -> None:
    assert character_device(os.devnull) == os.stat(os.devnull).st_rdev
    assert character_device("/") is None
    with pytest.raises(FileNotFoundError):
        character_device("/nowhere")


def test_a_c_library_without_statx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as musl before 1.2.5."""
    monkeypatch.setattr(_syscalls, "_statx", getattr(object(), "statx", _syscalls._no_statx))
    with pytest.raises(HostLacks, match=r"^This host's C library has no statx, .* upgrade the host\.$"):
        character_device(os.devnull)


def test_the_own_capabilities_are_those_that_proc_tells() -> None:
    own, status = own_capabilities(), own_status()
    assert (own.effective, own.permitted) == (status.effective, status.permitted)


def test_a_descriptor_is_shared() -> None:
    pidfd = pidfd_open(os.getpid())
    theirs, ours = pty.openpty()
    try:
        shared = pidfd_getfd(pidfd, theirs)
        assert os.fstat(shared).st_ino == os.fstat(theirs).st_ino
        assert not os.get_inheritable(shared)
        os.close(shared)
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            pidfd_getfd(pidfd, 2**20)
        assert caught.value.errno == errno.EBADF
    finally:
        for each in (pidfd, theirs, ours):
            os.close(each)


def test_whose_descriptors_are_the_same() -> None:
    assert have_one_table(os.getpid(), os.getpid())
    assert not have_one_table(os.getpid(), os.getppid())


def test_open_files_have_an_order() -> None:
    fds = [os.open(os.devnull, os.O_RDONLY) for _each in range(3)]
    copy = os.dup(fds[0])
    pid = os.getpid()
    try:
        assert compare_files(pid, fds[0], pid, copy) == 0
        compared = {(one, other): compare_files(pid, one, pid, other) for one in fds for other in fds if one != other}
        assert all({compared[one, other], compared[other, one]} == {1, 2} for one, other in compared)
        below = [sum(compared[one, other] == 2 for other in fds if one != other) for one in fds]
        assert sorted(below) == [0, 1, 2]
        with pytest.raises(OSError, match="Bad file descriptor"):
            compare_files(pid, fds[0], pid, 2**20)
    finally:
        for each in (*fds, copy):
            os.close(each)
