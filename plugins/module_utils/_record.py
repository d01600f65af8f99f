# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the record of how a host was before it was changed, in its file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ._errors import AccessRefused, IommufdError, error_text, shown_path
from ._paths import Untrusted, reopen, walk
from ._states import FileState, NodeState, make_folder, remove_file, write_file_state
from ._systemd import UnitState

__all__ = (
    "BLOCK",
    "CAPABILITY",
    "FILE",
    "KINDS",
    "MODULE",
    "NODE",
    "RELABEL",
    "RELOAD",
    "RESTART",
    "SELINUX",
    "SYSTEMD",
    "UDEV",
    "UNIT",
    "Item",
    "Record",
    "RecordUnusable",
    "check_caller",
    "lock_record",
)

FILE = "file"
CAPABILITY = "capability"
NODE = "node"
BLOCK = "block"
UNIT = "unit"
# What is never put back, and so never recorded.
MODULE = "module"
KINDS = (FILE, CAPABILITY, NODE, BLOCK, UNIT)

_VERSION = 1

# Who may have to be told of a file that was changed.
SYSTEMD = "systemd"
UDEV = "udev"
SELINUX = "selinux"

# What is still to be done once a change is made, and cannot be seen of the host afterwards: to have one of these read
# its files, to start a unit anew, to give a file its label.
RELOAD = "reload"
RESTART = "restart"
RELABEL = "relabel"

# Only root can make a file there. How long a run waits for another, in seconds.
_LOCK = "/run/iommufd_host.lock"
_LOCK_PATIENCE = 10

# The user whose record is believed, and who may act on it.
_ROOT = 0


class RecordUnusable(IommufdError):
    """The record is not one that this release may act on."""


class Item(NamedTuple):
    """One thing that the record remembers.

    `before` is how it was: of a file its FileState as JSON; of a capability the extended attribute as hexadecimal
    digits in `xattr`; of a node `mode`, `uid`, `gid` and the `device` that it led to; of a unit `enabled` and `active`.
    None is what was not there.
    A node that was not there, or a pattern of nodes, stands for all nodes of this name that come later. Of a block,
    only whether its file was there matters. `folders` were missing then, the outermost first.
    """

    kind: str
    path: str
    before: dict[str, Any] | None
    folders: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.path

    @property
    def state(self) -> Any:
        """`before` as what it stands for: a FileState, a NodeState, the bytes of the xattr, a UnitState, or None.

        Raises KeyError, TypeError, ValueError or AttributeError where it is none of these.
        """
        return _state_of(self.kind, self.before)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Item:
        """One entry of the record. Raises as `state` does where it is none."""
        item = cls(given["kind"], given["path"], given["before"], tuple(given["folders"]))
        paths = item.folders if item.kind == UNIT else (item.path, *item.folders)
        if item.kind not in KINDS or not all(map(os.path.isabs, paths)):
            raise ValueError(item.kind)
        # What could not be put back later is told now, before anything is.
        _state_of(item.kind, item.before)
        return item

    def to_json(self) -> dict[str, Any]:
        """The form that the record holds."""
        return {"kind": self.kind, "path": self.path, "before": self.before, "folders": list(self.folders)}


def _state_of(kind: str, before: Any) -> Any:
    if before is None or kind == BLOCK:
        return None
    if kind == FILE:
        return FileState.from_json(before)
    if kind == NODE:
        return NodeState(int(before["mode"], 8), int(before["uid"]), int(before["gid"]))
    if kind == UNIT:
        return UnitState(True, bool(before["enabled"]), bool(before["active"]))
    return None if before["xattr"] is None else bytes.fromhex(before["xattr"])


@dataclass
class Record:
    """The record in its file. `due` is what is still to be done for a change that was made: what, and to which."""

    path: str
    items: list[Item] = field(default_factory=list)
    due: list[tuple[str, str]] = field(default_factory=list)

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)

    @classmethod
    def load(cls, path: str) -> Record:
        """The record at path, an empty one where there is none. Raises RecordUnusable."""
        record = cls(path)
        try:
            with walk(path, changes=True) as place:
                if place.found is None or place.status is None:
                    return record
                if not stat.S_ISREG(place.status.st_mode):
                    raise RecordUnusable(_not_believed(path))
                with open(reopen(place.found), "rb") as stream:
                    content = stream.read()
        except Untrusted as exc:
            raise RecordUnusable(_not_believed(*exc.writer)) from exc
        except OSError as exc:
            raise RecordUnusable(f"The record {shown_path(path)} cannot be read ({error_text(exc.errno)}).") from exc
        try:
            given = json.loads(content)
            version = given["version"]
            if version == _VERSION:
                record.items = [Item.from_json(each) for each in given["items"]]
                record.due = [(str(what), str(thing)) for what, thing in given["due"]]
                return record
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise RecordUnusable(
                f"The record {shown_path(path)} is damaged ({type(exc).__name__}: {exc}). Bring it back from a backup."
                " Or put back by hand what it still names, remove it, and run this again."
            ) from exc
        raise RecordUnusable(
            f"The record {shown_path(path)} is of version {version!r}, and this release knows version {_VERSION} only."
            " Run this with the release that has written it."
        )

    def save(self) -> None:
        """Writes the record in one step. Raises OSError, and IommufdError where others could write it."""
        make_folder(self.folder, 0o700)
        content = {"version": _VERSION, "items": [item.to_json() for item in self.items], "due": self.due}
        text = json.dumps(content, indent=1).encode("ascii") + b"\n"
        write_file_state(self.path, FileState(text, 0o600, os.geteuid(), os.getegid()))

    def remove(self) -> None:
        """Removes the record, and its folder if nothing else is in it. Raises OSError."""
        remove_file(self.path, [self.folder])

    def due_for(self, what: str) -> list[str]:
        """To which of them something is still to be done."""
        return [thing for each, thing in self.due if each == what]

    def add(self, items: list[Item]) -> None:
        """Remembers items, each in the place of what was remembered of the same thing."""
        keys = {item.key for item in items}
        self.items = [item for item in self.items if item.key not in keys] + items

    def drop(self, item: Item) -> None:
        """Forgets an item."""
        self.items = [each for each in self.items if each.key != item.key]


def _not_believed(place: str, who: str = "") -> str:
    why = f", which {who} can write" if who else ""
    return (
        f"{place} is not believed{why}: the record is a regular file, and it and all folders above it must be root's"
        " and writable by nobody else. Find out who has written it. If it is right, mend the permissions (chown root"
        f" {place}; chmod go-w {place})."
    )


def check_caller() -> None:
    """Raises AccessRefused unless root asks."""
    if os.geteuid() != _ROOT:
        raise AccessRefused(
            f"It takes root to change a host and to put it back, and this is uid {os.geteuid()}. Run the task as root"
            " (become: true)."
        )


@contextlib.contextmanager
def lock_record(path: str) -> Iterator[None]:
    """Keeps others from working with the record at path meanwhile. Raises IommufdError where somebody does for long.

    What is locked is a file that nobody else may open: whoever can open a file or folder can lock it, for ever.
    """
    _check_can_be_kept(path)
    try:
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise IommufdError(f"{_LOCK} cannot be opened ({error_text(exc.errno)}).") from exc
    try:
        _lock(fd, path)
        yield
    finally:
        os.close(fd)


def _check_can_be_kept(path: str) -> None:
    """Raises IommufdError where there is no folder for the record's folder, or others can write there."""
    folder = os.path.dirname(path)
    try:
        with walk(folder, changes=True) as place:
            number = errno.ENOENT if place.missing or place.dangling else 0
    except Untrusted as exc:
        raise RecordUnusable(_not_believed(*exc.writer)) from exc
    except OSError as exc:
        number = exc.errno or errno.EIO
    if number:
        raise IommufdError(
            f"The record {shown_path(path)} cannot be kept: {shown_path(os.path.dirname(folder))} is no folder that is"
            f" there ({error_text(number)})."
        )


def _lock(fd: int, path: str) -> None:
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as exc:
            if time.monotonic() > deadline:
                raise IommufdError(
                    f"Another run works with the record {shown_path(path)} at this moment, and holds {_LOCK}. Run this"
                    " again once it is done."
                ) from exc
        time.sleep(0.1)
