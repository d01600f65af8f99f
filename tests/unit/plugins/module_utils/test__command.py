# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import signal
import time

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _command
from ansible_collections.virt.iommufd.plugins.module_utils._command import run_command


def test_a_command() -> None:
    script = "echo out; echo err >&2; echo $HOME; exit 3"
    assert run_command(["sh", "-c", script], 30) == (3, "out\n\n", "err\n")
    code, output, _errors = run_command(["sh", "-c", "read -r line < /proc/$$/stat; set -- $line; echo $6 $$"], 30)
    session, pid = map(int, output.split())
    assert (code, session) == (0, pid)
    with pytest.raises(FileNotFoundError):
        run_command(["/no/such"], 30)
    with pytest.raises(FileNotFoundError):
        run_command(["no-such"], 30)
    with pytest.raises(PermissionError):
        run_command(["/etc/passwd"], 30)
    with pytest.raises(OSError, match="Invalid argument"):
        run_command(["true", "\0"], 30)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_command_has_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    ours = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(ours, True)
    # Without a pipe of the shell's own, which would have the number under which it has read the folder.
    script = "for fd in /proc/$$/fd/*; do readlink $fd; done"
    try:
        assert [each[:5] for each in run_command(["sh", "-c", script], 30)[1].split()] == ["/dev/", "pipe:", "pipe:"]
        assert "SECRET" not in run_command(["env"], 30)[1]
        assert run_command(["env"], 30, {"A": "1", "PATH": "/usr/bin:/bin"})[1] == "A=1\nPATH=/usr/bin:/bin\n"
    finally:
        os.close(ours)
    # SIGPIPE ends it, as it would at a prompt.
    ignored = int(run_command(["grep", "^SigIgn:", "/proc/self/status"], 30)[1].split()[1], 16)
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


@pytest.mark.parametrize("before", [True, False])
def test_a_command_that_is_never_executed(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    """As where it lies on a mount whose server does not answer."""
    if before:
        monkeypatch.setattr(_command, "isolate", lambda: time.sleep(60))
    else:
        monkeypatch.setattr(os, "execvpe", lambda *_given: time.sleep(60))
    began = time.monotonic()
    assert run_command(["true"], 1) == (124, "", "It took longer than 1 seconds, and was ended.")
    assert time.monotonic() - began < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("script", "code", "told"),
    [
        ("echo so far; sleep 60", 124, "It took longer than 1 seconds, and was ended."),
        ("exec >&- 2>&-; sleep 60", 124, "It took longer than 1 seconds, and was ended."),
        ("sleep 60 & echo child", 124, "It took longer"),
        ("trap '' TERM; sleep 60; sleep 60", 124, "It took longer"),
        ("exec cat /dev/zero", 125, "It said more than 4194304 bytes"),
        ("kill -KILL $$", -9, ""),
        ("kill -STOP $$", 124, "It took longer"),
    ],
)
def test_a_command_that_does_not_end_well(script: str, code: int, told: str) -> None:
    began = time.monotonic()
    ended, _output, errors = run_command(["sh", "-c", script], 1)
    assert (ended, told in errors) == (code, True)
    assert time.monotonic() - began < 30


def test_what_fails_before_a_command_is_not_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_keep: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(_command, "close_all_but", fail)
    with pytest.raises(OSError, match="Invalid argument"):
        run_command(["true"])
