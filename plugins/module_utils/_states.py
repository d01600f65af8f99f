# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what files, device nodes, executables and units are like, and making them so again.

What reads here changes nothing. What changes something may be cut off at any instruction: it can be done again, and
then comes to the same end. Both go by descriptors, below folders that only root can write: whatever somebody makes of
another folder, nothing of root's is read or written through it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Callable, NamedTuple

from ._capabilities import read_xattr, write_xattr
from ._errors import IommufdError, error_text, shown_path
from ._names import group_name, owner_name
from ._paths import Place, entries, reopen, sync, walk

__all__ = (
    "BEGIN",
    "END",
    "FileState",
    "NodeState",
    "capability_in",
    "device_of",
    "is_unfinished",
    "kernels_node",
    "make_folder",
    "matching_nodes",
    "missing_folders",
    "node_state",
    "open_file",
    "read_file_state",
    "remove_file",
    "remove_unfinished",
    "set_capability",
    "set_capability_in",
    "set_node",
    "setting_of",
    "split_block",
    "write_file_state",
)

BEGIN = b"# BEGIN iommufd_host"
END = b"# END iommufd_host"

# A file that is to be remembered is a file of settings. Something larger is a mistake.
_LARGEST = 2**20

# What a new file gets until it is complete; one that an interrupted run has left is written over.
_NEW = ".iommufd_host-new"

# The extended attributes that are a file's own. Others are the kernel's to keep: those of IMA and EVM, for two.
_KEPT_XATTRS = ("security.selinux", "system.posix_acl_access", "user.")

_SYS_CHAR = "/sys/dev/char"


class FileState(NamedTuple):
    """All of a regular file that is put back: `mode` without the type of the file, `xattrs` by name."""

    content: bytes
    mode: int
    uid: int
    gid: int
    xattrs: Mapping[str, bytes] = MappingProxyType({})

    def to_json(self) -> dict[str, Any]:
        """The form that a record holds."""
        return {
            "content": base64.b64encode(self.content).decode("ascii"),
            "mode": f"{self.mode:04o}",
            "uid": self.uid,
            "gid": self.gid,
            "xattrs": {name: value.hex() for name, value in self.xattrs.items()},
        }

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> FileState:
        """What `to_json` has made. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            base64.b64decode(given["content"], validate=True),
            int(given["mode"], 8),
            int(given["uid"]),
            int(given["gid"]),
            {name: bytes.fromhex(value) for name, value in given["xattrs"].items()},
        )


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Has an error say what could not be read."""
    try:
        yield
    except OSError as exc:
        raise IommufdError(f"{shown_path(path)} cannot be read ({error_text(exc.errno)}).") from exc


def read_file_state(path: str, *, own: bool = True) -> FileState | None:
    """The regular file at path; None where there is nothing.

    Raises IommufdError where something else is there, a symbolic link too, and where it cannot be read; Untrusted where
    somebody else than root can write a folder on the way, or, unless `own` is False, the file itself.
    """
    with _reading(path), walk(path, changes=True, judge_last=own) as place:
        _check_leads_on(path, place)
        if place.found is None or place.status is None:
            return None
        if not stat.S_ISREG(place.status.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(place.status.st_mode) else "no regular file"
            raise IommufdError(f"{shown_path(path)} is {kind}, which is left alone: move it away, or do without it.")
        with open(reopen(place.found), "rb") as stream:
            fd = stream.fileno()
            status = os.fstat(fd)
            content = stream.read(_LARGEST + 1)
            if len(content) > _LARGEST:
                raise IommufdError(
                    f"{shown_path(path)} has {status.st_size} bytes, and a file of settings has at most {_LARGEST}."
                )
            xattrs = {name: os.getxattr(fd, name) for name in _xattr_names(fd) if name.startswith(_KEPT_XATTRS)}
    return FileState(content, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, xattrs)


def _check_leads_on(path: str, place: Place) -> None:
    """Raises IommufdError where a folder is a link that leads nowhere, so that none can be made in its place."""
    if place.dangling:
        raise IommufdError(
            f"{shown_path(path)} is behind a symbolic link that leads to {shown_path(place.real_path)}, which is not"
            " there."
        )


def _xattr_names(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return []
        raise


def missing_folders(path: str) -> list[str]:
    """The folders on the way to path that are not there, the outermost first. Raises as `read_file_state` does."""
    with _reading(path), walk(path, changes=True, judge_last=False) as place:
        _check_leads_on(path, place)
        count = len(place.missing)
    folders = [path]
    for _each in range(count):
        folders.insert(0, os.path.dirname(folders[0]))
    return folders[:-1]


def make_folder(path: str, mode: int) -> None:
    """Makes a folder that is not there yet, in one that is. Raises OSError and IommufdError."""
    with walk(path, changes=True) as place:
        if place.missing:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if place.found is None:
            mask = os.umask(0)
            try:
                os.mkdir(place.name, mode, dir_fd=place.folder)
            finally:
                os.umask(mask)
            sync(place.folder)


def write_file_state(path: str, state: FileState, check: Callable[[str], None] | None = None) -> None:
    """Puts a file in the place of whatever has its name, in one step. Missing folders are made.

    `check` gets the path of the new file before, and raises IommufdError where it is to stay out. Raises OSError; and
    IommufdError where somebody else than root can write a folder on the way.
    """
    for folder in missing_folders(path):
        make_folder(folder, 0o755)
    with walk(path, changes=True, judge_last=False) as place:
        new = place.name + _NEW
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=place.folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(new, flags, 0o600, dir_fd=place.folder)
        with open(fd, "wb") as stream:
            stream.write(state.content)
            stream.flush()
            os.fchown(fd, state.uid, state.gid)
            for name, value in state.xattrs.items():
                os.setxattr(fd, name, value)
            # Last, as a change of the owner clears some of it.
            os.fchmod(fd, state.mode)
            os.fsync(fd)
        if check:
            try:
                check(os.path.join(os.path.dirname(path), new))
            except IommufdError:
                os.unlink(new, dir_fd=place.folder)
                raise
        os.rename(new, place.name, src_dir_fd=place.folder, dst_dir_fd=place.folder)
        sync(place.folder)


def remove_file(path: str, folders: Sequence[str]) -> None:
    """Removes a file, and those of the folders, given from the outermost, that are empty then. Raises OSError.

    Raises IommufdError where somebody else than root can write a folder on the way.
    """
    _remove(path, (_NEW, ""))
    for folder in reversed(folders):
        try:
            with walk(folder, changes=True, judge_last=False) as place:
                if place.found is not None:
                    os.rmdir(place.name, dir_fd=place.folder)
                    sync(place.folder)
        except OSError as exc:
            # Somebody else has put something into it, or has put something else in its place.
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                return
            raise


def is_unfinished(path: str) -> bool:
    """Whether a run that was cut off has left a new file next to this one. Raises as `read_file_state` does."""
    with _reading(path), walk(path + _NEW, changes=True, judge_last=False) as place:
        return place.found is not None


def remove_unfinished(path: str) -> None:
    """Removes what a run that was cut off has left of a new file. Raises as `remove_file` does."""
    _remove(path, (_NEW,))


def _remove(path: str, suffixes: Sequence[str]) -> None:
    # A file in the place of a folder is somebody else's.
    with contextlib.suppress(NotADirectoryError), walk(path, changes=True, judge_last=False) as place:
        for suffix in () if place.missing else suffixes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place.name + suffix, dir_fd=place.folder)
                sync(place.folder)


class NodeState(NamedTuple):
    """Who may open a device node."""

    mode: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"mode {self.mode:04o}, {owner_name(self.uid)}:{group_name(self.gid)}"


@contextlib.contextmanager
def _node(path: str) -> Iterator[tuple[int, os.stat_result] | None]:
    """The character device at path, open with O_PATH, and its status; None where there is nothing.

    Whoever may write the device itself is of no interest. Raises IommufdError where there is something else, and where
    somebody else than root can write a folder on the way.
    """
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(walk(path, judge_last=False))
        except NotADirectoryError:
            yield None
            return
        except OSError as exc:
            raise IommufdError(f"{shown_path(path)} cannot be looked at ({error_text(exc.errno)}).") from exc
        if place.found is None or place.status is None:
            yield None
            return
        if not stat.S_ISCHR(place.status.st_mode):
            raise IommufdError(f"{shown_path(path)} is no device node of a character device.")
        yield place.found, place.status


def node_state(path: str) -> NodeState | None:
    """The character device at path; None where there is nothing. Raises IommufdError where there is something else."""
    with _node(path) as found:
        if found is None:
            return None
        status = found[1]
        return NodeState(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def matching_nodes(pattern: str) -> list[str]:
    """The paths that a path stands for whose last part may be a shell pattern: what is there now, in order.

    Raises IommufdError where somebody else than root can write a folder on the way.
    """
    folder, name = os.path.split(pattern)
    try:
        with walk(pattern, judge_last=False) as place:
            there = [] if place.missing else entries(place.folder)
    except NotADirectoryError:
        return []
    except OSError as exc:
        raise IommufdError(f"{shown_path(folder)} cannot be looked at ({error_text(exc.errno)}).") from exc
    # As a shell does, with those that are hidden.
    hidden = name.startswith(".")
    return sorted(
        os.path.join(folder, each)
        for each in there
        if each == name or (fnmatch.fnmatchcase(each, name) and each.startswith(".") <= hidden)
    )


def kernels_node(path: str) -> NodeState:
    """What the kernel gives the node of this device when it makes it, before any rule of udev's.

    It says so in the device's uevent, drivers/base/core.c, and where it says nothing uses 0600, root:root
    (drivers/base/devtmpfs.c).
    """
    text = ""
    with _node(path) as found:
        rdev = found[1].st_rdev if found else 0
    uevent = f"{_SYS_CHAR}/{os.major(rdev)}:{os.minor(rdev)}/uevent"
    with contextlib.suppress(OSError), open(uevent, encoding="ascii") as stream:
        text = stream.read()
    said = dict(re.findall(r"^(DEVMODE|DEVUID|DEVGID)=([0-9]+)$", text, re.MULTILINE))
    return NodeState(int(said.get("DEVMODE", "600"), 8), int(said.get("DEVUID", "0")), int(said.get("DEVGID", "0")))


def device_of(path: str) -> str:
    """What the node leads to: the device's folder in sysfs, which names the bus and the place; "" where it is gone.

    Of a device without one, its number.
    """
    with _node(path) as found:
        if not found:
            return ""
        rdev = found[1].st_rdev
    return os.path.realpath(f"{_SYS_CHAR}/{os.major(rdev)}:{os.minor(rdev)}")


def set_node(path: str, state: NodeState) -> None:
    """Sets who may open a device node. One that is gone needs nothing. Raises OSError and IommufdError."""
    with _node(path) as found:
        if found is not None:
            # The very one that was judged: these calls know no other way to a descriptor that is open with O_PATH.
            node = f"/proc/self/fd/{found[0]}"
            os.chown(node, state.uid, state.gid)
            os.chmod(node, state.mode)


class OpenFile(NamedTuple):
    """A regular file that is open for reading, its mode, and its path without symbolic links."""

    fd: int
    mode: int
    real_path: str


@contextlib.contextmanager
def open_file(path: str) -> Iterator[OpenFile]:
    """The regular file that a path leads to, also through symbolic links.

    Raises FileNotFoundError where there is none, other OSErrors; and Untrusted where somebody else than root can write
    it or anything on the way.
    """
    with walk(path, follow=True, program=True) as place:
        if place.found is None or place.status is None or not stat.S_ISREG(place.status.st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        fd = reopen(place.found)
        try:
            yield OpenFile(fd, os.fstat(fd).st_mode, place.real_path)
        finally:
            os.close(fd)


def capability_in(fd: int, path: str) -> bytes | None:
    """The extended attribute `security.capability` of a file that is open; None without. `path` is for messages.

    Raises IommufdError where it cannot be read.
    """
    try:
        return read_xattr(fd)
    except OSError as exc:
        remedy = f" Take them away (setcap -r {shown_path(path)})." if exc.errno == errno.EINVAL else ""
        raise IommufdError(
            f"The capabilities of {shown_path(path)} cannot be read ({error_text(exc.errno)}).{remedy}"
        ) from exc


def set_capability_in(fd: int, xattr: bytes | None) -> None:
    """Gives a file that is open exactly this extended attribute, for good; None takes it away. Raises OSError."""
    write_xattr(fd, xattr)
    os.fsync(fd)


def set_capability(path: str, xattr: bytes | None) -> None:
    """Gives a file exactly this extended attribute; None takes it away. Raises as `open_file` does."""
    with open_file(path) as file:
        set_capability_in(file.fd, xattr)


def split_block(content: bytes) -> tuple[bytes | None, bytes]:
    """What a file holds between the lines BEGIN and END, None where it has none, and all the rest of the file.

    Raises IommufdError where one of the lines is missing.
    """
    block: bytes | None = None
    inside: list[bytes] | None = None
    rest: list[bytes] = []
    for line in content.splitlines(keepends=True):
        text = line.rstrip(b"\r\n")
        if text in (BEGIN, END):
            if (text == BEGIN) != (inside is None):
                break
            block, inside = (block, []) if inside is None else ((block or b"") + b"".join(inside), None)
        else:
            (rest if inside is None else inside).append(line)
    else:
        if inside is None:
            return block, b"".join(rest)
    raise IommufdError(
        f"It has one of the lines '{BEGIN.decode()}' and '{END.decode()}' without the other, so it cannot be told where"
        " the block ends: put both right, or remove them with what is ours in between."
    )


# One value of a list: a comment, a string, or what ends the list. See virConfParseList in libvirt's src/util/virconf.c.
_IN_LIST = re.compile(r"#[^\n]*|\"([^\"\n]*)\"|'([^'\n]*)'|(\])")


def setting_of(text: str, name: str) -> list[str] | None:
    """The list that a setting has in a configuration file of libvirt's; None where it is not set, or no list.

    Of several, the first is the one that counts, as it is for libvirt.
    """
    found = re.search(rf"^[ \t]*{re.escape(name)}[ \t]*=[ \t]*\[", text, re.MULTILINE)
    if not found:
        return None
    values: list[str] = []
    for each in _IN_LIST.finditer(text, found.end()):
        if each.group(3):
            return values
        values += [value for value in each.groups()[:2] if value is not None]
    return None
