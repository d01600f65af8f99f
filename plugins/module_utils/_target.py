# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the process that a task names."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Union

from ._child import NoAnswer, in_child
from ._errors import IommufdError, ProcessGone, error_text, printable
from ._process import Process

if TYPE_CHECKING:
    from ._child import Run
    from ._running import DomainRecord

__all__ = (
    "DomainTarget",
    "PidTarget",
    "PidfileTarget",
    "Target",
    "UnitTarget",
    "escaped",
    "hold_target",
    "look_patiently",
)

_PIDFILE_MAX = 64
# A local file is there in no time, in seconds.
_PATIENCE = 10

# xml.sax.saxutils would do, but imports what speaks HTTP, which costs as much as all of this collection.
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"})


def parse_pid(text: bytes) -> int:
    """The number that a pidfile holds: decimal digits, with white space around them at most.

    Raises IommufdError, whose text continues a sentence about the file.
    """
    if not text.strip():
        raise IommufdError("is empty")
    if not re.fullmatch(rb"\s*[0-9]{1,10}\s*", text):
        raise IommufdError(f"does not hold the id of a process but {printable(text[:_PIDFILE_MAX])!r}")
    return int(text)


class PidTarget(NamedTuple):
    """A process by its id."""

    pid: int

    def __str__(self) -> str:
        return f"Process {self.pid}"

    def resolve(self) -> int:
        """The id."""
        return self.pid

    def check(self, process: Process) -> None:
        """Any process will do."""


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


class Pidfile(NamedTuple):
    """The id in a pidfile, when that was written, in seconds since the epoch, and which file it is."""

    pid: int
    written: float
    device: int
    inode: int


@dataclass(frozen=True)
class PidfileTarget:
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
        if read.written < process.started() - 1:
            raise IommufdError(
                f"{self} is stale: it was written before {process} started, so it meant another process, unless the"
                " clock was set in between. Give the process by pid or unit if it is the one you mean."
            )
        look_patiently(str(self), partial(self._check_writers, process, read))

    def _check_writers(self, process: Process, read: Pidfile) -> None:
        """Raises IommufdError where somebody else can have written the file."""
        # Most tasks name no pidfile, and importing this costs each of them.
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
        return Pidfile(*look_patiently(str(self), self._read))

    def _read(self) -> Pidfile:
        if not os.path.isabs(self.path):
            raise IommufdError(f"{self} is not an absolute path.")
        try:
            fd = _no_link(self.path, os.O_RDONLY)
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise IommufdError(f"{self} is a symbolic link: give the file that it leads to.") from exc
            raise IommufdError(f"{self} cannot be opened ({error_text(exc.errno)}).") from exc
        except ValueError as exc:
            raise IommufdError(f"Pidfile {self.path!r} is no path: {exc}.") from exc
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise IommufdError(f"{self} is not a regular file but {_kind(status.st_mode)}.")
            if status.st_size > _PIDFILE_MAX:
                raise IommufdError(
                    f"{self} is no pidfile: it holds {status.st_size} bytes, and {_PIDFILE_MAX} at most are read."
                )
            text = os.read(fd, _PIDFILE_MAX)
        finally:
            os.close(fd)
        try:
            return Pidfile(parse_pid(text), status.st_mtime, status.st_dev, status.st_ino)
        except IommufdError as exc:
            raise IommufdError(f"{self} {exc}.") from exc


class DomainTarget(NamedTuple):
    """The emulator of a running domain of the system libvirt, by what cannot be renamed or rewritten: see _running."""

    name: str

    def __str__(self) -> str:
        return f"Domain {self.name}"

    def _record(self) -> DomainRecord:
        """What libvirt has recorded of it. Raises IommufdError."""
        # Most tasks name no domain, either.
        from ._running import read_domain_record

        return read_domain_record(self.name)

    def resolve(self) -> int:
        """The id in libvirt's record. Raises IommufdError where there is no such domain, or it is shut off."""
        try:
            return self._record().pid
        except IommufdError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                raise IommufdError(
                    f"No domain {self.name} is running under the system libvirt, which has no record of it. It is shut"
                    " off, or not defined, or belongs to a user's session (`virsh list --all` tells; for a session give"
                    " pid or pidfile)."
                ) from exc
            raise

    def check(self, process: Process) -> None:
        """Raises IommufdError where the process is not the emulator that libvirt started for the domain."""
        record = self._record()
        unit = process.units()[0]
        against = record.contradiction(self.name, process.pid, process.uid, process.started(), unit)
        if against:
            raise IommufdError(f"{process} is not the emulator of domain {self.name}: {against}")


class UnitTarget(NamedTuple):
    """The main process of a systemd unit of the system. `run` is as _systemd has it."""

    name: str
    run: Run

    def __str__(self) -> str:
        return f"Unit {self.name}"

    def resolve(self) -> int:
        """The main process's id. Raises IommufdError where systemd knows none."""
        # Nor a unit.
        from ._systemd import is_unit_name, show_units

        name = self.name
        if not is_unit_name(name):
            raise IommufdError(f"{name!r} is not the name of a systemd unit.")
        if re.search(r"@(\.\w+)?$", name):
            raise IommufdError(f"{self} is a template and has no process: name an instance, such as vm@1.service.")
        shown = show_units(self.run, [name], ("LoadState", "ActiveState", "SubState", "MainPID"))[0]
        if shown.get("LoadState") == "not-found":
            raise IommufdError(
                f"systemd knows no unit {name}: `systemctl list-units --all` tells those that there are."
            )
        state = f"{shown.get('ActiveState')} ({shown.get('SubState')})"
        main_pid = shown.get("MainPID", "")
        if not re.fullmatch(r"[0-9]{1,10}", main_pid):
            raise IommufdError(f"{self} is of a kind that has no main process; it is {state}. Name a service.")
        if main_pid == "0":
            raise IommufdError(f"{self} has no main process now: it is {state}.")
        return int(main_pid)

    def check(self, process: Process) -> None:
        """Systemd answers for it."""


def escaped(text: str) -> str:
    """A text as it stands in XML. libvirt writes a domain's name so into the name of its pidfile (seen with 12.8)."""
    return text.translate(_ENTITIES)


Target = Union[PidTarget, PidfileTarget, DomainTarget, UnitTarget]


@contextlib.contextmanager
def hold_target(target: Target) -> Iterator[Process]:
    """Holds the process that the target names, while the context lasts.

    A process that ends between the answer and the pidfd leaves its id to another one. So the question is asked again
    once the pidfd is there: while that stands for a process that lives, its id means nobody else.
    Raises what Process.hold and the target's methods do, ProcessGone where the second answer differs from the first.
    """
    pid = target.resolve()
    with Process.hold(pid) as process:
        again = target.resolve()
        if again != pid:
            raise ProcessGone(f"{target} named process {pid}, and a moment later {again}. Run the task again.")
        target.check(process)
        # What check learned by the process's id was about this process only if it still lives.
        process.check_alive()
        yield process


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
