# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a process that a task names by a pidfile."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Collection
from functools import partial
from typing import Any, Callable, NamedTuple

from ._child import NoAnswer, in_child
from ._errors import IommufdError, ProcessGone, error_text, printable
from ._process import Process
from ._process_facts import started_at

__all__ = (
    "Pidfile",
    "PidfileTarget",
    "look_patiently",
    "parse_pid",
    "read_pidfile",
)

_PIDFILE_MAX = 64

# A local file is there in no time, in seconds.
_PATIENCE = 10


def look_patiently(what: str, look: Callable[[], Any], keep: Collection[int] = ()) -> Any:
    """What a look at something of another user's comes to, in a child, since it may last for ever. Raises IommufdError.

    `what` names it; `keep` is as for in_child.
    """
    try:
        return in_child(None, look, _PATIENCE, keep)
    except NoAnswer as exc:
        raise IommufdError(
            f"{what} could not be looked at within {_PATIENCE} seconds. Is it on a mount whose server does not answer?"
        ) from exc


def parse_pid(text: bytes) -> int:
    """The number that a pidfile holds: decimal digits, with white space around them at most.

    Raises IommufdError, whose text continues a sentence about the file.
    """
    if not text.strip():
        raise IommufdError("is empty")
    if not re.fullmatch(rb"\s*[0-9]{1,10}\s*", text):
        raise IommufdError(f"does not hold the id of a process but {printable(text[:_PIDFILE_MAX])!r}")
    return int(text)


class Pidfile(NamedTuple):
    """The id in a pidfile, when that was written, in seconds since the epoch, and which file it is."""

    pid: int
    written: float
    device: int
    inode: int


class PidfileTarget(NamedTuple):
    """A process by a file that holds its id, and that only root or the process's own user can have written."""

    path: str

    def __str__(self) -> str:
        return f"Pidfile {self.path}"

    def resolve(self) -> int:
        """The id in the file. Raises IommufdError for any file that is not a pidfile."""
        return self.read().pid

    def check(self, process: Process) -> None:
        """Raises IommufdError where the file does not speak for the process: it is older, or somebody else's."""
        read = self.read()
        if read.pid != process.pid:
            raise ProcessGone(f"{self} named process {process.pid}, and a moment later {read.pid}. Run the task again.")
        # A process writes the file after it has started; the second is for the clock's slewing and a tick's length.
        if read.written < started_at(process.start_ticks) - 1:
            raise IommufdError(
                f"{self} is stale: it was written before {process} started, so it meant another process, unless the"
                " clock was set in between. Give the process by pid or unit if it is the one you mean."
            )
        look_patiently(str(self), partial(self._check_writers, process, read))

    def _check_writers(self, process: Process, read: Pidfile) -> None:
        """Raises IommufdError where somebody else can have written the file."""
        # What trusts the folder as a whole needs it not, as _domain_start.
        from ._paths import Untrusted, walk

        try:
            with walk(self.path, (0, process.uid)) as place:
                found = place.status
        except Untrusted as exc:
            raise IommufdError(
                f"{self} cannot be trusted: {exc.writer.place} can be written by {exc.writer.who}, but {process}"
                f" belongs to uid {process.uid}. Keep the file where only root can write, or give the process by pid or"
                " unit."
            ) from exc
        except OSError as exc:
            raise IommufdError(f"{self} cannot be looked up ({error_text(exc.errno)}).") from exc
        if found is None or (found.st_dev, found.st_ino) != (read.device, read.inode):
            raise ProcessGone(f"{self} was replaced while it was read. Run the task again.")

    def read(self) -> Pidfile:
        """What the file says, and which one it is. Raises as resolve does."""
        return read_pidfile(self.path)


def read_pidfile(path: str) -> Pidfile:
    """What a pidfile says, and which one it is. Raises IommufdError for any file that is not a pidfile."""
    return Pidfile(*look_patiently(f"Pidfile {path}", partial(_read_regular, path)))


def _read_regular(path: str) -> Pidfile:
    subject = f"Pidfile {path}"
    if not os.path.isabs(path):
        raise IommufdError(f"{subject} is not an absolute path.")
    try:
        fd = _no_link(path, os.O_RDONLY)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise IommufdError(f"{subject} is a symbolic link: give the file that it leads to.") from exc
        raise IommufdError(f"{subject} cannot be opened ({error_text(exc.errno)}).") from exc
    except ValueError as exc:
        raise IommufdError(f"Pidfile {path!r} is no path: {exc}.") from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise IommufdError(f"{subject} is not a regular file but {_kind(status.st_mode)}.")
        if status.st_size > _PIDFILE_MAX:
            raise IommufdError(
                f"{subject} is no pidfile: it holds {status.st_size} bytes, and {_PIDFILE_MAX} at most are read."
            )
        text = os.read(fd, _PIDFILE_MAX)
    finally:
        os.close(fd)
    try:
        return Pidfile(parse_pid(text), status.st_mtime, status.st_dev, status.st_ino)
    except IommufdError as exc:
        raise IommufdError(f"{subject} {exc}.") from exc


def _no_link(path: str, flags: int) -> int:
    """Opens a file without being led elsewhere by a link in its place, or waiting for the other end of a FIFO."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    return "a socket"
