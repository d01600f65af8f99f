# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process to look at, and a kernel that answers for it; a device node."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest
from ansible.module_utils.common import warnings
from ansible_collections.virt.iommufd.plugins.module_utils import (
    _control_group,
    _device,
    _host_facts,
    _iommufd,
    _named_target,
    _paths,
    _survey,
    _task_target,
)
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel

# Opens what the tests look for under numbers that they know, says so, and waits until its standard input is closed.
CHILD = """
import os, sys
os.dup2(os.open("/dev/null", os.O_RDONLY), 50)
os.dup2(os.open("/dev/null", os.O_PATH), 51)
os.dup2(os.pipe()[0], 52)
os.dup2(os.open(sys.argv[1], os.O_RDONLY), 53)
os.dup2(os.open("/dev/zero", os.O_RDONLY), 54)
os.dup2(os.open("/dev/zero", os.O_PATH), 55)
os.closerange(3, 50)
os.write(1, b"ready")
sys.stdin.read()
"""


# A value that is longer is no name for a test.
_NAME = 200


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a test for the length of a long value: pytest hands the name to each child, and execve() takes no more than

    128 KiB. Only pytest 9 sees to that, which Python 3.9 cannot have.
    """
    return f"{argname} of {len(val)}" if isinstance(val, (bytes, str)) and len(val) > _NAME else None


@pytest.fixture(autouse=True)
def our_own_files_are_trusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever runs the tests stands for root, and makes no files that others can write.

    In a sandbox, root's files may belong to somebody else, as the root folder tells.
    """
    monkeypatch.setattr(_paths, "_TRUSTED", (0, os.geteuid(), os.stat("/").st_uid))
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(autouse=True)
def systemd_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: what systemctl says is the tests' own."""
    monkeypatch.setattr(_named_target, "_SYSTEMD", "/")


@pytest.fixture(autouse=True)
def no_warning_of_another_test() -> None:
    """Ansible keeps a module's warnings for the process, which on a host is the module's own."""
    warnings._global_warnings.clear()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running process, with 50 /dev/null, 51 the same with O_PATH, 52 a pipe, 53 a file of ten bytes, 54 /dev/zero,

    and 55 the same with O_PATH.
    """
    (tmp_path / "ten").write_bytes(b"0123456789")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "ten")]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ready"
        yield process
        if process.stdin is not None:
            process.stdin.close()


@pytest.fixture
def held(child: subprocess.Popen[bytes]) -> Iterator[Process]:
    """The child, held by a pidfd."""
    with Process.hold(child.pid) as process:
        yield process


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """Answers every ioctl, here: what would be done in a child, out of its sight, is done in its place."""
    fake = FakeKernel()
    monkeypatch.setattr(fcntl, "ioctl", fake.ioctl)
    monkeypatch.setattr(_task_target, "in_child", lambda _user, work, _seconds: through_json(work()))
    monkeypatch.setattr(_survey, "ask_child", lambda _user, work, _seconds: (through_json(each) for each in work()))
    return fake


def through_json(value: Any) -> Any:
    """What comes of a child's answer on its way."""
    return json.loads(json.dumps(value))


@pytest.fixture
def null_is_iommufd(monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel) -> FakeKernel:
    """Makes /dev/null pass for an iommufd, which the kernel answers for."""
    for module in (_control_group, _device, _iommufd):
        monkeypatch.setattr(module, "misc_rdev", lambda: os.stat(os.devnull).st_rdev)
    return kernel


@pytest.fixture
def alone(null_is_iommufd: FakeKernel, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """The child is the only process of the host, and what it has open on /dev/null an iommufd."""
    monkeypatch.setattr(_survey, "misc_rdev", _iommufd.misc_rdev)
    monkeypatch.setattr(_survey, "_pids", lambda: iter([child.pid]))
    monkeypatch.setattr(_host_facts, "count_iommufds", lambda: 0)
    return null_is_iommufd


@pytest.fixture
def terminal() -> Iterator[str]:
    """A device node that belongs to the caller."""
    ours, theirs = pty.openpty()
    yield os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)
