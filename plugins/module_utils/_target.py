# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a task names: a process, and the iommufds it holds."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Callable, Union

from ._errors import AccessRefused, IommufdError, NotAnIommufd, ProcessGone, error_text
from ._iommufd import IommuFd, iommufd_rdevs
from ._process import DESCRIPTORS_MAX, DEVICES_MAX, Process, is_path_only, own_character_device, printable
from ._qemu import guest_name

__all__ = (
    "IOMMUFDS_MAX",
    "DomainTarget",
    "PidTarget",
    "PidfileTarget",
    "Swapped",
    "Target",
    "UnitTarget",
    "borrow_iommufd",
    "escaped",
    "find_iommufds",
    "hold_target",
    "running_domains",
)

_PIDFILE_MAX = 64

# How many iommufds of one process are worked on. A VMM has one or two.
IOMMUFDS_MAX = 256
_SYMLINKS_MAX = 40

# Where the system libvirt keeps the pidfile and the record of every domain that runs. The folder may belong to the user
# of the emulators, who could put files of their own there, but none of root's.
_LIBVIRT_STATE = "/run/libvirt/qemu"
_LIBVIRT_UID = 0

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


@dataclass(frozen=True)
class PidTarget:
    """A process by its id."""

    pid: int

    def __str__(self) -> str:
        return f"Process {self.pid}"

    def resolve(self) -> int:
        """The id."""
        return self.pid

    def check(self, process: Process) -> None:
        """Any process will do."""


@dataclass(frozen=True)
class PidfileTarget:
    """A process by a file that holds its id, and that only root or the process's own user can have written."""

    path: str

    def __str__(self) -> str:
        return f"Pidfile {self.path}"

    def resolve(self) -> int:
        """The id in the file. Raises IommufdError for any file that is not a pidfile."""
        return self.read()[0]

    def check(self, process: Process) -> None:
        """Raises IommufdError where the file does not speak for the process: it is older, or somebody else's."""
        found = writers(self.path)
        pid, status = self.read()
        if pid != process.pid:
            raise ProcessGone(f"{self} named process {process.pid}, and a moment later {pid}. Run the task again.")
        # Of the very file that was read, too, whatever lies at the path by now.
        _add_writers(found, self.path, status)
        # A process writes the file after it has started; the second is for the clock's slewing and a tick's length.
        if status.st_mtime < process.started() - 1:
            raise IommufdError(
                f"{self} is stale: it was written before {process} started, so it meant another process, unless the"
                " clock was set in between. Give the process by pid or unit if it is the one you mean."
            )
        for uid, place in sorted(found.items()):
            if uid not in (0, process.uid):
                who = f"uid {uid}" if uid >= 0 else "a group or everybody"
                raise IommufdError(
                    f"{self} cannot be trusted: {place} can be written by {who}, but {process} belongs to"
                    f" uid {process.uid}. Keep the file where only root can write, or give the process by pid or unit."
                )

    def read(self) -> tuple[int, os.stat_result]:
        """The id in the file, and the status of the very file that it was read from. Raises as resolve does."""
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
            return parse_pid(text), status
        except IommufdError as exc:
            raise IommufdError(f"{self} {exc}.") from exc


@dataclass(frozen=True)
class DomainTarget:
    """The emulator of a running domain of the system libvirt."""

    name: str

    def __str__(self) -> str:
        return f"Domain {self.name}"

    def resolve(self) -> int:
        """The id in libvirt's pidfile. Raises IommufdError where there is no such domain, or it is shut off."""
        if not self.name or "/" in self.name or "\0" in self.name or self.name in (".", ".."):
            raise IommufdError(f"{self.name!r} is not the name of a domain: it is a name, not a path.")
        try:
            pid, status = PidfileTarget(self._file("pid")).read()
        except IommufdError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                raise IommufdError(
                    f"No domain {self.name} is running under the system libvirt: there is no {self._file('pid')}."
                    " It is shut off, or not defined, or belongs to a user's session (`virsh list --all` tells; for a"
                    " session give pid or pidfile)."
                ) from exc
            raise
        self._check_owner("pid", status)
        return pid

    def check(self, process: Process) -> None:
        """Raises IommufdError where the process is not the emulator that libvirt started for the domain."""
        guest = guest_name(process.arguments())
        if guest != os.fsencode(self.name):
            shown = "none" if guest is None else printable(guest)
            raise IommufdError(
                f"{process} is not the emulator of domain {self.name}: the guest on its command line is {shown}."
                f" {self._file('pid')} is stale."
            )
        try:
            with open(self._file("xml"), "rb", opener=_no_link) as stream:
                self._check_owner("xml", os.fstat(stream.fileno()))
                uid = emulator_uid(stream.read())
        except OSError as exc:
            raise IommufdError(
                f"{self._file('xml')}, libvirt's record of the domain, cannot be read ({error_text(exc.errno)})."
            ) from exc
        if uid is not None and uid != process.uid:
            raise IommufdError(
                f"{process} is not the emulator of domain {self.name}: libvirt runs that as uid {uid}, and this is"
                f" uid {process.uid}."
            )

    def _check_owner(self, suffix: str, status: os.stat_result) -> None:
        if status.st_uid != _LIBVIRT_UID:
            raise IommufdError(
                f"{self._file(suffix)} is not libvirt's: it belongs to uid {status.st_uid}, not to root."
            )

    def _file(self, suffix: str) -> str:
        path = f"{_LIBVIRT_STATE}/{self.name}.{suffix}"
        if suffix == "pid" and not os.path.lexists(path):
            return f"{_LIBVIRT_STATE}/{escaped(self.name)}.{suffix}"
        return path


@dataclass(frozen=True)
class UnitTarget:
    """The main process of a systemd unit of the system.

    `run` runs a command and gives its exit code, output and errors, as AnsibleModule.run_command does.
    """

    name: str
    run: Callable[[list[str]], tuple[int, str, str]] = field(repr=False)

    def __str__(self) -> str:
        return f"Unit {self.name}"

    def resolve(self) -> int:
        """The main process's id. Raises IommufdError where systemd knows none."""
        name = self.name
        if not re.fullmatch(r"[A-Za-z0-9:_.\\@-]+", name) or name.startswith("-"):
            raise IommufdError(f"{name!r} is not the name of a systemd unit.")
        if re.search(r"@(\.\w+)?$", name):
            raise IommufdError(f"{self} is a template and has no process: name an instance, such as vm@1.service.")
        shown = self._show("LoadState", "ActiveState", "SubState", "MainPID")
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

    def _show(self, *properties: str) -> dict[str, str]:
        """Some properties, as `systemctl show` gives them; one that a unit of this kind does not have is left out."""
        command = ["systemctl", "show", "--no-pager", *(f"--property={name}" for name in properties), "--", self.name]
        try:
            code, output, errors = self.run(command)
        except OSError as exc:
            raise IommufdError(
                f"{self} cannot be asked for: systemctl does not run ({error_text(exc.errno)})."
            ) from exc
        if code:
            raise IommufdError(
                f"systemctl cannot tell about unit {self.name}: {printable(os.fsencode(errors.strip()))}"
            )
        return {key: value for key, _equals, value in (line.partition("=") for line in output.splitlines())}


def escaped(text: str) -> str:
    """A text as it stands in XML. libvirt writes a domain's name so into the name of its pidfile (seen with 12.8)."""
    return text.translate(_ENTITIES)


def running_domains() -> dict[int, str]:
    """The emulators of the system libvirt's running domains, by libvirt's own pidfiles: ids, and the files' names.

    Raises AccessRefused where this caller may not look. A file that is not root's is not libvirt's, and left out.
    """
    found = {}
    refused = ""
    try:
        files = [name for name in os.listdir(_LIBVIRT_STATE) if name.endswith(".pid") and name != "driver.pid"]
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise AccessRefused(f"{_LIBVIRT_STATE} cannot be looked at ({error_text(exc.errno)}).") from exc
    for name in files:
        try:
            pid, status = PidfileTarget(f"{_LIBVIRT_STATE}/{name}").read()
        except IommufdError as exc:
            # Else it is a domain that has just ended, or something that is not libvirt's.
            if isinstance(exc.__cause__, PermissionError):
                refused = printable(os.fsencode(str(exc)))
            continue
        if status.st_uid == _LIBVIRT_UID:
            found[pid] = printable(os.fsencode(name[: -len(".pid")]))
    if refused and not found:
        raise AccessRefused(refused)
    return found


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


def find_iommufds(process: Process) -> list[int]:
    """The descriptors of the process that are open on an iommufd, whatever the node's name, in rising order.

    Raises AccessRefused or ProcessGone, and IommufdError where there are more than anybody could have looked at.
    Nothing is borrowed or opened for it.
    """
    found = process.character_devices()
    iommufds = iommufd_rdevs(set(found.devices.values()))
    fds = [fd for fd, rdev in found.devices.items() if rdev in iommufds]
    if found.more or len(fds) > IOMMUFDS_MAX:
        raise IommufdError(
            f"{process} has more descriptors than are looked through ({DESCRIPTORS_MAX}, {DEVICES_MAX} on devices,"
            f" {IOMMUFDS_MAX} on iommufds): give the one that is meant by its number."
        )
    return fds


class Swapped(NotAnIommufd):
    """The process has put something else in the place of its iommufd, which is shared now and stays open."""


@contextlib.contextmanager
def borrow_iommufd(process: Process, fd: int, rdevs: set[int] | None = None) -> Iterator[IommuFd]:
    """The process's iommufd `fd`, shared while the context lasts. `rdevs`: the device numbers of an iommufd, if known.

    It is for a child (`_child.in_child`), whose end nobody waits for. What turns out to be no iommufd once it is shared
    stays open there: to close it may take for ever, as its server likes it. An iommufd has no such thing.
    Raises NotAnIommufd where it is something else, Swapped where the process has put that in its place between one look
    and the next. Raises what Process.borrow and Process.character_device do.
    """
    # Before it is borrowed, so that what was never an iommufd is not shared at all.
    rdev = process.character_device(fd)
    if rdevs is None:
        rdevs = set() if rdev is None else iommufd_rdevs({rdev})
    _check_is_iommufd(process, fd, rdev, rdevs)
    borrowed = process.borrow(fd)
    # The check that counts: nobody but us can swap what is behind a descriptor of ours.
    try:
        _check_is_iommufd(process, fd, own_character_device(borrowed), rdevs)
    except NotAnIommufd as exc:
        raise Swapped(str(exc)) from exc
    try:
        if is_path_only(borrowed):
            raise NotAnIommufd(
                f"Descriptor {fd} of {process} was opened with O_PATH: it names {process.link(fd)}, but has no iommufd"
                " behind it."
            )
        yield IommuFd(borrowed)
        # While we share it, it outlives the process and its descriptor: what was done to it then was done for nobody.
        process.check_alive()
        _check_is_iommufd(process, fd, process.character_device(fd), rdevs)
    finally:
        os.close(borrowed)


def _check_is_iommufd(process: Process, fd: int, rdev: int | None, rdevs: set[int]) -> None:
    if rdev not in rdevs:
        raise NotAnIommufd(f"Descriptor {fd} of {process} is not an iommufd. It is {process.link(fd)}.")


def writers(path: str) -> dict[int, str]:
    """Who can decide what the file at path says: user ids, -1 for a group or everybody, each with a place to write.

    That is whoever can write the file, or any folder in which a part of the path is looked up, also on the way through
    symbolic links. In a sticky folder such as /tmp only a file's owner can replace it, so that adds nobody.
    Raises IommufdError where the path leads nowhere.
    """
    found: dict[int, str] = {}
    folder, parts = "/", _parts(path)
    links = 0
    try:
        _add_writers(found, "/", os.lstat("/"))
        while parts:
            part = parts.pop(0)
            here = os.path.dirname(folder) if part == ".." else os.path.join(folder, part)
            status = os.lstat(here)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _SYMLINKS_MAX:
                    raise IommufdError(f"{path} goes through too many symbolic links.")
                # Not its mode, which is always 0777, but its owner can replace it, even in a sticky folder.
                found.setdefault(status.st_uid, here)
                lead = os.readlink(here)
                folder = "/" if lead.startswith("/") else folder
                parts = _parts(lead) + parts
            else:
                folder = here
                _add_writers(found, here, status)
    except OSError as exc:
        raise IommufdError(f"{path} cannot be looked up ({error_text(exc.errno)}).") from exc
    return found


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _add_writers(found: dict[int, str], path: str, status: os.stat_result) -> None:
    found.setdefault(status.st_uid, path)
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        found.setdefault(-1, path)


def emulator_uid(status_xml: bytes) -> int | None:
    """The user id that libvirt runs the emulator as, from its status file; None where it did not choose one.

    It is in the label of the security model `dac`, such as `+64055:+64055`. Raises IommufdError for any other text.
    """
    # Only domains need it, and a module pays for each import on each host anew.
    import xml.etree.ElementTree as ET

    try:
        root = ET.fromstring(status_xml)
    except (ET.ParseError, ValueError, LookupError) as exc:
        raise IommufdError(f"libvirt's record of the domain is no XML: {exc}.") from exc
    label = root.findtext("domain/seclabel[@model='dac']/label")
    found = re.match(r"\+?([0-9]{1,10}):", label or "")
    return int(found.group(1)) if found else None


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
