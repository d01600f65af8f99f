# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: commands, each with a deadline and with nothing of ours but what it is given."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Optional

from ._child import NoAnswer, bury, close_all_but, end, end_with, environment, is_child, isolate, spawn

__all__ = (
    "COMMAND_SECONDS",
    "run_command",
    "start_command",
)

# A command of systemd's or udev's answers in milliseconds; a busy host gets so long, in seconds.
COMMAND_SECONDS = 90

# What a command may say. The longest, libvirt's capabilities of a domain, has some 100 kB.
_OUTPUT_MAX = 2**22

# A command's standard input, output and errors: descriptors of ours, or None for /dev/null.
Streams = tuple[Optional[int], Optional[int], Optional[int]]

# As timeout(1) gives it, and as systemd names it.
_TIMED_OUT = 124
_TOO_MUCH = 125
_LATE = "took longer than {seconds:.0f} seconds, and was ended"


def start_command(
    words: Sequence[str],
    streams: Streams,
    variables: Mapping[str, str] | None = None,
    seconds: float = COMMAND_SECONDS,
    keep: Collection[int] = (),
) -> int:
    """Starts a command as we are, in a session of its own, and gives its process, which is to be ended by `end`.

    It has an environment of its own, or `variables`; no descriptors of ours but the streams and those to `keep`.
    Raises OSError where it cannot be executed, and NoAnswer where that takes longer than `seconds`, as on a mount whose
    server does not answer; it has ended then.
    """
    reading, writing = os.pipe()
    variables = environment(None) if variables is None else variables
    # This is the process that becomes a command, such as systemctl. It is who we are, since the command does our work,
    # but has nothing of ours beside that: neither session nor descriptors. It ends by itself or by `end`, and with us
    # as long as it has not become the command.
    pid = spawn(partial(_execute, os.getpid(), words, streams, variables, keep, writing))
    os.close(writing)
    runs = False
    try:
        # Its end is closed by what is executed.
        if not select.select([reading], [], [], max(0.0, seconds))[0]:
            raise NoAnswer(f"{words[0]} was not executed within {seconds:.0f} seconds.")
        failure = os.read(reading, 64)
        if failure:
            raise OSError(int(failure), os.strerror(int(failure)), words[0])
        runs = True
    finally:
        os.close(reading)
        if not runs:
            end(pid)
    return pid


def _execute(
    parent: int,
    words: Sequence[str],
    streams: Streams,
    variables: Mapping[str, str],
    keep: Collection[int],
    report: int,
) -> None:
    """The process becomes the command, or writes into the pipe what failed."""
    try:
        end_with(parent)
        # A child of ours has a session already, and what it runs is to end with it.
        if not is_child():
            isolate()
        close_all_but({report, *keep, *(each for each in streams if each is not None)})
        for standard, stream in enumerate(streams):
            if stream is not None:
                os.dup2(stream, standard)
        for fd in keep:
            os.set_inheritable(fd, True)
        # Python ignores these, and what is executed would, too.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(words[0], list(words), dict(variables))
    except BaseException as exc:
        # There is a zero byte in a word, for one. What is not told here would look like the command's own answer.
        failure = exc.errno if isinstance(exc, OSError) else None
        os.write(report, str(failure or errno.EINVAL).encode())


def run_command(
    words: Sequence[str], seconds: float = COMMAND_SECONDS, variables: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Runs a command as we are, and gives its exit code, output and errors. Raises OSError where it cannot be run.

    It has an environment of its own, or `variables`, and neither input nor terminal. One that takes longer than
    `seconds` is ended with all that it has started in its session, and its exit code is 124, as timeout(1) has it; of
    one that says too much, 125. That of one that a signal ended is the signal's number, less than 0.
    """
    deadline = time.monotonic() + seconds
    # AnsibleModule.run_command, as subprocess, waits without an end for a command that cannot be executed or killed.
    with contextlib.ExitStack() as stack:
        output, writing_output = os.pipe()
        errors, writing_errors = os.pipe()
        stack.callback(os.close, output)
        stack.callback(os.close, errors)
        try:
            pid = start_command(words, (None, writing_output, writing_errors), variables, seconds)
        except NoAnswer:
            return _TIMED_OUT, "", f"It {_LATE.format(seconds=seconds)}."
        finally:
            os.close(writing_output)
            os.close(writing_errors)
        status = None
        try:
            said, complaints, trouble = _drain(output, errors, deadline)
            status = None if trouble else bury(pid, deadline - time.monotonic())
        finally:
            if status is None:
                end(pid)
    if status is None:
        code, why = trouble or (_TIMED_OUT, _LATE)
        return code, said, f"{complaints}It {why.format(seconds=seconds)}."
    return os.waitstatus_to_exitcode(status), said, complaints


def _drain(output: int, errors: int, deadline: float) -> tuple[str, str, tuple[int, str] | None]:
    """What comes out of two pipes until both are closed, and what kept us from hearing all of it: a code, and words."""
    said = {output: b"", errors: b""}
    open_ = set(said)
    trouble = None
    while open_ and not trouble:
        ready = select.select(open_, [], [], max(0.0, deadline - time.monotonic()))[0]
        for each in ready:
            more = os.read(each, 65536)
            said[each] += more
            if not more:
                open_.remove(each)
        if not ready:
            trouble = (_TIMED_OUT, _LATE)
        elif sum(map(len, said.values())) > _OUTPUT_MAX:
            trouble = (_TOO_MUCH, f"said more than {_OUTPUT_MAX} bytes, and was ended")
    text = [each.decode("utf-8", "surrogateescape") for each in said.values()]
    return text[0], text[1], trouble
