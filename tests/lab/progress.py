# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Programs that take long: run with a log, with progress on the terminal, and without leaving anything behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Where the output is not a terminal, a line this often says that the work goes on.
_LINE_EVERY = 15.0
# How long a program that was told to stop may tidy up after itself.
_GRACE = 20.0


class LabError(Exception):
    """What the lab says in place of a result: what is wrong, in one line, and where possible what to do about it."""


class Progress:
    """One line on stderr about one piece of work: what, how far, how long.

    On a terminal the line is rewritten in place, elsewhere repeated now and then.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._shown = 0.0
        self._tty = sys.stderr.isatty()
        self.show("", force=True)

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._start

    def show(self, how_far: str, force: bool = False) -> None:
        """Shows how far the work is, unless it was shown a moment ago."""
        now = time.monotonic()
        if not force and now - self._shown < (0.5 if self._tty else _LINE_EVERY):
            return
        self._shown = now
        text = f"lab: {self._what}: {how_far} ({self.seconds:.0f} s)" if how_far else f"lab: {self._what} ..."
        print(f"\r\033[K{text}" if self._tty else text, end="" if self._tty else "\n", file=sys.stderr, flush=True)

    def done(self, result: str = "done") -> None:
        """Ends the line with the result and the time taken."""
        self.show(result, force=True)
        if self._tty:
            print(file=sys.stderr)


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a text file, indented; empty if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            text = file.read().decode(errors="replace").replace("\r", "")
    except FileNotFoundError:
        return ""
    return "\n".join("    " + line for line in text.splitlines()[-lines:])


def environment(**extra: str) -> Mapping[str, str]:
    """The environment of every program: no translations, and the folders that an ordinary user's PATH leaves out."""
    path = os.environ.get("PATH", os.defpath)
    return {**os.environ, "LC_ALL": "C", "PATH": f"{path}:/usr/local/sbin:/usr/sbin:/sbin", **extra}


def run(
    command: Sequence[str],
    log: Path,
    progress: Progress,
    how_far: Callable[[str], str] | None = None,
    cwd: Path | None = None,
    **extra_env: str,
) -> None:
    """Runs a program to its end, appending what it prints to `log`.

    how_far: makes the progress text from each line that the program prints.
    Raises LabError with the end of the log if it fails. Whatever interrupts the wait ends the program first, with all
    of its children.

    The program inherits descriptors marked inheritable: the lock of the artifact that it helps to make, so that the
    lock lasts as long as anyone writes, even if this process is killed.
    """
    text = "working"
    with log.open("ab") as output:
        output.write(f"+ {' '.join(command)}\n".encode())
        output.flush()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment(**extra_env),
            close_fds=False,
            # A group of its own, so that all of it can be ended at once.
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            pipe = process.stdout.fileno()
            pending = b""
            try:
                while True:
                    if select.select([pipe], [], [], 1.0)[0]:
                        chunk = os.read(pipe, 65536)
                        if not chunk:
                            break
                        output.write(chunk)
                        *lines, pending = (pending + chunk).split(b"\n")
                        for line in lines:
                            if how_far is not None:
                                text = how_far(line.decode(errors="replace"))
                    progress.show(text)
                status = process.wait()
            except BaseException:
                end_group(process)
                raise
    if status != 0:
        raise LabError(f"{command[0]} failed (status {status}), log {log}:\n{tail(log)}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a program that leads a process group, and the group: first by asking, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(_GRACE)
            return
        except subprocess.TimeoutExpired:
            continue
