# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the record of how a host was, and what it takes to put it back.

What to do is worked out by `steps_back` and `new_items`, which touch nothing, from the record, what is wanted and a
`View` of the host. `look` makes the view, and `put_back` does the steps.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Callable, Protocol

from ._capabilities import CAP_IPC_LOCK, parse_file_capabilities, with_ipc_lock, without_ipc_lock
from ._child import NoAnswer, in_child
from ._errors import AccessRefused, IommufdError, error_text
from ._grant import decide
from ._paths import Untrusted, reopen, walk
from ._states import (
    BEGIN,
    END,
    FileState,
    NodeState,
    Run,
    UnitState,
    capability_in,
    command,
    kernels_node,
    make_folder,
    matching_nodes,
    missing_folders,
    node_state,
    open_file,
    read_file_state,
    remove_file,
    set_capability,
    set_node,
    shown,
    split_block,
    unit_states,
    write_file_state,
)

__all__ = (
    "BLOCK",
    "CAPABILITY",
    "FILE",
    "KINDS",
    "NODE",
    "UNIT",
    "Item",
    "PutBackFailed",
    "Record",
    "RecordUnusable",
    "Step",
    "View",
    "Wanted",
    "check_caller",
    "has_ipc_lock",
    "locked",
    "look",
    "new_items",
    "put_back",
    "shown_capabilities",
    "steps_back",
    "to_grant",
)

FILE = "file"
CAPABILITY = "capability"
NODE = "node"
BLOCK = "block"
UNIT = "unit"
KINDS = (FILE, CAPABILITY, NODE, BLOCK, UNIT)

_VERSION = 1

# Where a changed file has to be told to somebody, and to whom.
_SYSTEMD = "systemd"
_UDEV = "udev"
_TOLD = {"/etc/systemd/system/": _SYSTEMD, "/etc/udev/rules.d/": _UDEV}

# Where these two have a socket or folder while they run.
_SYSTEMD_RUNS = "/run/systemd/system"
_UDEV_RUNS = "/run/udev/control"

# Only root can make a file there. How long a run waits for another, in seconds.
_LOCK = "/run/iommufd_host.lock"
_LOCK_PATIENCE = 10

# The user whose record is believed, and who may act on it.
_ROOT = 0

# What makes a shell pattern.
_MAGIC = re.compile(r"[*?[]")

# All paths are looked at within so many seconds, each emulator within so many more. Local ones are there in no time.
_PATIENCE = 30

_UNIT_NAME = re.compile(r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]*\.(service|path|timer|socket)")


class RecordUnusable(IommufdError):
    """The record is not one that this release may act on."""


class PutBackFailed(IommufdError):
    """Something could not be put back. `done` tells what was, before that."""

    def __init__(self, message: str, done: list[str]) -> None:
        super().__init__(message)
        self.done = done


@dataclass(frozen=True)
class Item:
    """One thing that the record remembers.

    `before` is how it was: of a file its FileState as JSON; of a capability the extended attribute as hexadecimal
    digits in `xattr`; of a node `mode`, `uid` and `gid`; of a unit `enabled` and `active`. None is what was not there.
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
    """The record in its file. `reloads` are those that have yet to be told of files that were put back."""

    path: str
    items: list[Item] = field(default_factory=list)
    reloads: list[str] = field(default_factory=list)

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
            raise RecordUnusable(f"The record {shown(path)} cannot be read ({error_text(exc.errno)}).") from exc
        try:
            given = json.loads(content)
            version = given["version"]
            if version == _VERSION:
                record.items = [Item.from_json(each) for each in given["items"]]
                record.reloads = [each for each in _TOLD.values() if each in given["reloads"]]
                return record
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise RecordUnusable(
                f"The record {shown(path)} is damaged ({type(exc).__name__}: {exc}). Bring it back from a backup. Or"
                " put back by hand what it still names, remove it, and run this again."
            ) from exc
        raise RecordUnusable(
            f"The record {shown(path)} is of version {version!r}, and this release knows version {_VERSION} only. Run"
            " this with the release that has written it."
        )

    def save(self) -> None:
        """Writes the record in one step. Raises OSError, and IommufdError where others could write it."""
        make_folder(self.folder, 0o700)
        content = {"version": _VERSION, "items": [item.to_json() for item in self.items], "reloads": self.reloads}
        text = json.dumps(content, indent=1).encode("ascii") + b"\n"
        write_file_state(self.path, FileState(text, 0o600, os.geteuid(), os.getegid()))

    def remove(self) -> None:
        """Removes the record, and its folder if nothing else is in it. Raises OSError."""
        remove_file(self.path, [self.folder])

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
            f"It takes root to put a host back, and this is uid {os.geteuid()}. Run the task as root (become: true)."
        )


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
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
            f"The record {shown(path)} cannot be kept: {shown(os.path.dirname(folder))} is no folder that is there"
            f" ({error_text(number)})."
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
                    f"Another run works with the record {shown(path)} at this moment, and holds {_LOCK}. Run this again"
                    " once it is done."
                ) from exc
        time.sleep(0.1)


@dataclass(frozen=True)
class Wanted:
    """What the caller is about to change, by paths, and by the names of units. `nodes` may be shell patterns."""

    files: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    @classmethod
    def of(cls, lists: dict[str, list[str]]) -> Wanted:
        """Checks what was listed. Raises IommufdError where it is no clean absolute path, or no unit.

        A pattern of nodes may be one only in its last part: its folder is one that can be judged.
        """
        wanted = cls(**{name: tuple(dict.fromkeys(some)) for name, some in lists.items()})
        for path in (*wanted.files, *wanted.capabilities, *wanted.nodes, *wanted.blocks):
            # Normalising away a ".." would go by another way than the kernel, where a folder is a link.
            if not path.startswith("/") or "\0" in path or os.path.normpath(path) != path:
                raise IommufdError(
                    f"{path!r} is no absolute path in its shortest form, such as /etc/libvirt/qemu.conf."
                )
        for path in wanted.nodes:
            if _MAGIC.search(os.path.dirname(path)):
                raise IommufdError(f"{path!r} may be a pattern in its last part only, such as /dev/vfio/devices/*.")
        both = set(wanted.files) & set(wanted.blocks)
        if both:
            raise IommufdError(f"{shown(min(both))} is listed as a whole file and for a block in it: choose one.")
        for name in wanted.units:
            if not _UNIT_NAME.fullmatch(name):
                raise IommufdError(f"{name!r} is not the name of a systemd service, path, timer or socket.")
        return wanted


@dataclass(frozen=True)
class View:
    """What is on the host, of all that is wanted or remembered.

    `files` holds those of blocks too. `real` leads from a listed executable to the file behind it, and `xattrs` from
    there to its extended attribute, with no entry where it is gone. `nodes` are those that are there, and
    `kernels_nodes` what the kernel makes of them. `matches` are the nodes that a listed path or pattern stands for now.
    `missing` are the folders on the way to a file that are not there.
    """

    files: dict[str, FileState | None] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    real: dict[str, str] = field(default_factory=dict)
    xattrs: dict[str, bytes | None] = field(default_factory=dict)
    nodes: dict[str, NodeState] = field(default_factory=dict)
    kernels_nodes: dict[str, NodeState] = field(default_factory=dict)
    matches: dict[str, list[str]] = field(default_factory=dict)
    units: dict[str, UnitState] = field(default_factory=dict)


def look(items: list[Item], wanted: Wanted, run: Run) -> View:
    """Looks at all that is wanted or remembered.

    Raises IommufdError where something is not what it has to be; Untrusted where somebody else than root can write a
    folder on the way, or something whose content is taken.
    """
    view = View()
    remembered = {kind: [item.path for item in items if item.kind == kind] for kind in KINDS}
    blocks = {*wanted.blocks, *remembered[BLOCK]}
    # The content of what is written as a whole is taken only once, before it is.
    own = {*wanted.files, *blocks} - set(remembered[FILE])
    files = list(dict.fromkeys((*wanted.files, *wanted.blocks, *remembered[FILE], *remembered[BLOCK])))
    _check_reachable([*files, *wanted.nodes, *remembered[NODE]])
    for path in files:
        view.files[path] = state = read_file_state(path, own=path in own)
        view.missing[path] = missing_folders(path)
        if state is not None and path in blocks:
            # Where the block ends must be known before anything is changed.
            with _about(path):
                split_block(state.content)
    for path in wanted.capabilities:
        found = _patiently(partial(_look_at_executable, path, True), path)
        if found is None:
            raise IommufdError(f"{shown(path)} is no executable file, so it cannot get CAP_IPC_LOCK.")
        view.real[path], xattr = found
        view.xattrs[view.real[path]] = xattr
    for path in remembered[CAPABILITY]:
        found = None if path in view.xattrs else _patiently(partial(_look_at_executable, path, False), path)
        if found is not None:
            view.xattrs[path] = found[1]
    for path in (*wanted.nodes, *remembered[NODE]):
        view.matches[path] = matching_nodes(path)
        for each in view.matches[path]:
            node = node_state(each)
            if node is not None:
                view.nodes[each] = node
                view.kernels_nodes[each] = kernels_node(each)
    view.units.update(unit_states(list(dict.fromkeys([*wanted.units, *remembered[UNIT]])), run))
    return view


def _check_reachable(paths: list[str]) -> None:
    """Goes along all paths, in a child with a time limit: each may be on a mount that does not answer.

    Raises IommufdError where somebody else than root can write on the way. What is not there is told of later.
    """

    def go() -> None:
        for path in paths:
            with contextlib.suppress(OSError), walk(path, judge_last=False):
                pass

    try:
        in_child(None, go, _PATIENCE)
    except NoAnswer as exc:
        places = ", ".join(sorted({shown(os.path.dirname(path)) for path in paths}))
        raise IommufdError(
            f"Not all of these were found within {_PATIENCE} seconds: {places}. Is there a mount whose server is gone?"
        ) from exc


def _patiently(act: Callable[[], Any], path: str) -> tuple[str, bytes | None] | None:
    """What `_look_at_executable` gives, from a child with a time limit."""
    try:
        found = in_child(None, act, _PATIENCE)
    except NoAnswer as exc:
        raise IommufdError(
            f"{shown(path)} was not found within {_PATIENCE} seconds. Is it on a mount whose server is gone?"
        ) from exc
    return None if found is None else (found[0], None if found[1] is None else bytes.fromhex(found[1]))


def _look_at_executable(path: str, executable: bool) -> tuple[str, str | None] | None:
    """The path without links, and the extended attribute in hexadecimal; None where there is no file.

    `executable`: and where it is none. Raises IommufdError where it cannot be read, or can be written by others.
    """
    try:
        with open_file(path) as file:
            if executable and not file.mode & 0o111:
                return None
            xattr = capability_in(file.fd, path)
            return file.real_path, None if xattr is None else xattr.hex()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise IommufdError(f"{shown(path)} cannot be looked at ({error_text(exc.errno)}).") from exc


def to_grant(view: View) -> dict[str, bytes]:
    """Which of the listed executables are to be given CAP_IPC_LOCK, and the attribute that each gets.

    Raises IommufdError where one cannot be given it alone.
    """
    found = {}
    for path in view.real.values():
        with _about(path):
            xattr = decide(view.xattrs.get(path))
        if xattr is not None:
            found[path] = xattr
    return found


def has_ipc_lock(xattr: bytes | None) -> bool:
    """Whether a file gives CAP_IPC_LOCK on this host in any way. Raises IommufdError where the form is not known.

    What is for another user namespace was never granted here, and is left as it is.
    """
    given = parse_file_capabilities(xattr or b"")
    return not given.root_uid and CAP_IPC_LOCK in (*given.permitted, *given.inheritable)


def _is_wanted(item: Item, wanted: Wanted, view: View) -> bool:
    if item.kind == NODE:
        # A device that was unplugged is still meant by the pattern that it was found by.
        return any(item.path == each or fnmatch.fnmatchcase(item.path, each) for each in wanted.nodes)
    listed = {
        FILE: wanted.files,
        BLOCK: wanted.blocks,
        UNIT: wanted.units,
        CAPABILITY: [view.real[path] for path in wanted.capabilities],
    }
    return item.path in listed[item.kind]


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
    """Has an error say which file it is about."""
    try:
        yield
    except IommufdError as exc:
        raise IommufdError(f"{shown(path)}: {exc}") from exc


def new_items(record: Record, wanted: Wanted, view: View) -> list[Item]:
    """What is wanted and not remembered yet, as it is now.

    An executable that has lost what was granted, as by an upgrade of its package, is remembered anew. One that has
    CAP_IPC_LOCK while the record knows nothing of it has it from somebody else, and is not remembered. Raises
    IommufdError where an executable could not get CAP_IPC_LOCK without more.
    """
    known = {item.key: item for item in record.items}
    found = [_new_file(FILE, path, record, view) for path in wanted.files]
    found += [_new_file(BLOCK, path, record, view) for path in wanted.blocks]
    for path in wanted.nodes:
        # What comes after its pattern was remembered has come under the caller's own rule: it was no such node before.
        if (NODE, path) not in known:
            found += [_new_node(each, view) for each in [path, *view.matches[path]]]
    found += [_new_unit(name, view.units[name]) for name in wanted.units]
    new = {item.key: item for item in found if item.key not in known}
    for path in view.real.values():
        with _about(path):
            item = _new_capability(known.get((CAPABILITY, path)), path, view.xattrs.get(path))
        if item:
            new[item.key] = item
    return list(new.values())


def _new_file(kind: str, path: str, record: Record, view: View) -> Item:
    state = view.files[path]
    before = None if state is None else state.to_json() if kind == FILE else {}
    # A folder that another item has brought goes with the last of the items in it.
    others = {folder for item in record.items for folder in item.folders if path.startswith(f"{folder}/")}
    return Item(kind, path, before, tuple(sorted({*view.missing[path], *others}, key=len)))


def _new_node(path: str, view: View) -> Item:
    state = view.nodes.get(path)
    before = None if state is None else {"mode": f"{state.mode:04o}", "uid": state.uid, "gid": state.gid}
    return Item(NODE, path, before)


def _new_unit(name: str, unit: UnitState) -> Item:
    return Item(UNIT, name, {"enabled": unit.enabled, "active": unit.active} if unit.exists else None)


def _new_capability(known: Item | None, path: str, xattr: bytes | None) -> Item | None:
    if known and (has_ipc_lock(xattr) or known.state == xattr):
        return None
    if not known and parse_file_capabilities(xattr or b"").lifts_memlock:
        return None
    # Raises where it cannot be granted alone.
    with_ipc_lock(xattr)
    return Item(CAPABILITY, path, {"xattr": None if xattr is None else xattr.hex()})


class Effect(Protocol):
    """A change of the host, which can be made again without harm."""

    def make(self, run: Run) -> None:
        """Raises OSError or IommufdError."""


@dataclass(frozen=True)
class WriteFile:
    """Makes a file what it was."""

    path: str
    state: FileState

    def make(self, run: Run) -> None:
        """See Effect."""
        write_file_state(self.path, self.state)


@dataclass(frozen=True)
class RemoveFile:
    """Removes a file, and the folders that were made for it."""

    path: str
    folders: tuple[str, ...]

    def make(self, run: Run) -> None:
        """See Effect."""
        remove_file(self.path, self.folders)


@dataclass(frozen=True)
class SetCapability:
    """Gives an executable the extended attribute that it had."""

    path: str
    xattr: bytes | None

    def make(self, run: Run) -> None:
        """See Effect."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            set_capability(self.path, self.xattr)


@dataclass(frozen=True)
class SetNode:
    """Lets the same ones open a node as before. `by_rules`: what udev's rules make of it counts."""

    path: str
    state: NodeState
    by_rules: bool

    def make(self, run: Run) -> None:
        """See Effect."""
        set_node(self.path, self.state)
        if self.by_rules and os.path.exists(_UDEV_RUNS):
            command(run, "udevadm", "trigger", "--settle", "--action=change", self.path)


@dataclass(frozen=True)
class StopUnit:
    """Stops a unit and the units that it starts, so that nothing is done again that is put back."""

    name: str
    triggers: tuple[str, ...]
    disable: bool

    def make(self, run: Run) -> None:
        """See Effect."""
        if self.disable:
            # systemd is told once, when all files are back.
            command(run, "systemctl", "disable", "--no-reload", "--", self.name)
        for each in (self.name, *self.triggers):
            command(run, "systemctl", "stop", "--", each)
            # So that no failure of a unit that is no more stays in the list. A unit that is not loaded has none.
            with contextlib.suppress(IommufdError):
                command(run, "systemctl", "reset-failed", "--", each)


@dataclass(frozen=True)
class StartUnit:
    """Enables and starts a unit that was enabled and active before."""

    name: str
    before: UnitState

    def make(self, run: Run) -> None:
        """See Effect."""
        if self.before.enabled:
            command(run, "systemctl", "enable", "--", self.name)
        if self.before.active:
            command(run, "systemctl", "start", "--", self.name)


@dataclass(frozen=True)
class Reload:
    """Has systemd and udev read their files again. One that does not run needs no telling."""

    whom: tuple[str, ...]

    def make(self, run: Run) -> None:
        """See Effect."""
        if _SYSTEMD in self.whom and os.path.exists(_SYSTEMD_RUNS):
            command(run, "systemctl", "daemon-reload")
        if _UDEV in self.whom and os.path.exists(_UDEV_RUNS):
            command(run, "udevadm", "control", "--reload")


@dataclass(frozen=True)
class Step:
    """One step of putting back, of the thing named `about`.

    `effect` None is nothing to do. `says` is what the user reads, nothing where nothing changes; `before` and `after`
    are for the diff. `item` is done with, once the step is made.
    """

    about: str
    effect: Effect | None = None
    says: str = ""
    before: str = ""
    after: str = ""
    item: Item | None = None


def steps_back(record: Record, wanted: Wanted, view: View) -> list[Step]:
    """What is to be done to put back whatever the record holds and nobody wants any more, in this order.

    The units first, since they might do again what is put back; the nodes after udev has read its rules again.
    Raises IommufdError where it cannot be told how.
    """
    gone = [item for item in reversed(record.items) if not _is_wanted(item, wanted, view)]
    of = {kind: [item for item in gone if item.kind == kind] for kind in KINDS}
    units = [_stop(item, view.units[item.path]) for item in of[UNIT]]
    files = [_file_back(item, view.files[item.path]) for item in of[FILE]]
    files += [_block_back(item, view.files[item.path]) for item in of[BLOCK]]
    capabilities = [_capability_back(item, view.xattrs) for item in of[CAPABILITY]]
    if any(step.effect for step in capabilities):
        units += _pauses([item.path for item in record.items if item.kind == UNIT and item not in gone], view)
    told = {whom for step in files if step.says for place, whom in _TOLD.items() if step.about.startswith(place)}
    told |= {_SYSTEMD for step in units if isinstance(step.effect, StopUnit) and step.effect.disable}
    reloads = tuple(sorted({*record.reloads, *told}))
    reload = [Step("systemd and udev", Reload(reloads))] if reloads else []
    nodes = [step for item in of[NODE] for step in _nodes_back(item, record, view)]
    starts = [_start(item) for item in of[UNIT] if _was_in_use(item)]
    return [*units, *files, *capabilities, *reload, *nodes, *starts]


def _was_in_use(item: Item) -> bool:
    return item.state is not None and (item.state.enabled or item.state.active)


def _stop(item: Item, now: UnitState) -> Step:
    # The item of a unit that has to be started again stays until then.
    done = None if _was_in_use(item) else item
    if not (now.enabled or now.active):
        return Step(item.path, item=done)
    effect = StopUnit(item.path, now.triggers, disable=True)
    after = replace(now, enabled=False, active=False)
    return Step(item.path, effect, f"{item.path} is disabled and stopped.", str(now), str(after), done)


def _start(item: Item) -> Step:
    effect = StartUnit(item.path, item.state)
    return Step(item.path, effect, f"{item.path} is {item.state} again.", after=str(item.state), item=item)


def _pauses(names: list[str], view: View) -> list[Step]:
    """Stops units that stay: they may be the ones that would grant again what is taken, by what their files say now."""
    return [
        Step(
            name,
            StopUnit(name, view.units[name].triggers, disable=False),
            f"{name} is stopped until it is started with what it has to do now.",
            str(view.units[name]),
            str(replace(view.units[name], active=False)),
        )
        for name in names
        if view.units[name].active
    ]


def _text(content: bytes) -> str:
    """A file for the diff, where the bytes of a program would only be in the way."""
    if b"\0" in content:
        return f"({len(content)} bytes that are no text)\n"
    return content.decode("utf-8", "backslashreplace")


def _file_back(item: Item, now: FileState | None) -> Step:
    before: FileState | None = item.state
    content = "" if now is None else _text(now.content)
    if before is None:
        # Where the file is gone folders may be left: a run was cut off between them.
        says = "" if now is None else f"{item.path} is removed."
        return Step(item.path, RemoveFile(item.path, item.folders), says, content, item=item)
    if now == before:
        return Step(item.path, item=item)
    effect = WriteFile(item.path, before)
    return Step(item.path, effect, f"{item.path} is what it was.", content, _text(before.content), item)


def _block_back(item: Item, now: FileState | None) -> Step:
    remove = RemoveFile(item.path, item.folders)
    if now is None:
        return Step(item.path, remove if item.before is None else None, item=item)
    with _about(item.path):
        block, rest = split_block(now.content)
    if block is None:
        return Step(item.path, item=item)
    # With nothing else in it, a file that was made for the block has no reader.
    effect = remove if item.before is None and not rest else WriteFile(item.path, replace(now, content=rest))
    # The rest of the file may hold a password, which nobody needs to see here.
    text = _text(b"\n".join((BEGIN, block + END, b"")))
    return Step(item.path, effect, f"The block of iommufd_host is removed from {item.path}.", text, item=item)


def _capability_back(item: Item, xattrs: dict[str, bytes | None]) -> Step:
    if item.path not in xattrs:
        return Step(item.path, item=item)
    now = xattrs[item.path]
    with _about(item.path):
        if now is None or now == item.state or not has_ipc_lock(now):
            # Never granted, or lost since, as by an upgrade of the package.
            return Step(item.path, item=item)
        # What somebody has added or taken away since stays so.
        xattr = item.state if now == _granted(item.state) else without_ipc_lock(now)
        sides = (shown_capabilities(now), shown_capabilities(xattr))
    return Step(item.path, SetCapability(item.path, xattr), f"CAP_IPC_LOCK is taken from {item.path}.", *sides, item)


def _granted(before: bytes | None) -> bytes | None:
    """What the attribute became when CAP_IPC_LOCK was granted; None where it could not be."""
    with contextlib.suppress(IommufdError):
        return with_ipc_lock(before)
    return None


def shown_capabilities(xattr: bytes | None) -> str:
    """What a file gives, for the diff."""
    if xattr is None:
        return ""
    given = parse_file_capabilities(xattr)
    return (
        f"permitted: {', '.join(given.permitted)}\ninheritable: {', '.join(given.inheritable)}\n"
        f"effective: {str(given.effective).lower()}\n"
    )


def _nodes_back(item: Item, record: Record, view: View) -> list[Step]:
    if item.before is not None:
        aims = {item.path: item.state}
        says = "{} is open to the same ones as before: {}."
    else:
        own = {each.path for each in record.items if each.kind == NODE and each.before is not None}
        aims = {path: view.kernels_nodes[path] for path in view.matches[item.path] if path not in own}
        says = "{} is as the kernel and the rules of udev make it: {}, if there is no other rule."
    steps = []
    for path, aim in aims.items():
        now = view.nodes.get(path)
        if now not in (None, aim):
            effect = SetNode(path, aim, by_rules=item.before is None)
            steps.append(Step(path, effect, says.format(path, aim), str(now), str(aim)))
    return [*steps, Step(item.path, item=item)]


def put_back(record: Record, steps: list[Step], run: Run) -> list[str]:
    """Makes the steps, and has the record forget each thing once it is back. Gives what was done, in sentences.

    Whenever this is cut off, the record still names all that is not back. Raises PutBackFailed.
    """
    done: list[str] = []
    reloads = [whom for step in steps if isinstance(step.effect, Reload) for whom in step.effect.whom]
    step = Step(record.path)
    try:
        if reloads != record.reloads:
            record.reloads = reloads
            record.save()
        for step in steps:
            if step.effect is not None:
                step.effect.make(run)
            if step.item is not None:
                record.drop(step.item)
                record.save()
            if isinstance(step.effect, Reload):
                record.reloads = []
                record.save()
            done += [step.says] if step.says else []
    except (OSError, IommufdError) as exc:
        raise PutBackFailed(_failure(step, exc, done, record), done) from exc
    return done


def _failure(step: Step, exc: Exception, done: list[str], record: Record) -> str:
    why = error_text(exc.errno) if isinstance(exc, OSError) else str(exc).rstrip(".")
    before = " ".join(done) or "Nothing was put back before that."
    return (
        f"{shown(step.about)} could not be put back: {why}. {before} The record {shown(record.path)} still names what"
        " is not back: remove the cause, and run this again."
    )
