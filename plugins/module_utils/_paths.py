# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the way to a file, gone in steps that nobody can swap, and who could write there.

Each part of a path is opened in the folder before it and judged as what was opened. What is done afterwards is done to
these descriptors, so it does not matter what lies at the path by then.

Where a part is on another mount than the folder before it, the mount is judged first, by what the kernel has of it: a
user's own has any owner and mode that the user would like it to have, or a server that never answers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Collection, Iterator
from typing import NamedTuple

from ._errors import IommufdError, shown_path
from ._names import group_name, user_name

__all__ = (
    "Place",
    "Untrusted",
    "Writer",
    "check_writers",
    "entries",
    "is_made_up",
    "mount_id",
    "reopen",
    "sync",
    "walk",
    "writer_of",
)

# Whose files are believed where root takes something from them.
_TRUSTED: Collection[int] = (0,)

# As many as Linux follows, see path_resolution(7).
_SYMLINKS_MAX = 40

_TO_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

_MOUNTINFO = "/proc/self/mountinfo"

# What is on these was written here, under the kernel's eyes. On any other, somebody may have brought it along.
_BEGIN_EMPTY = ("devtmpfs", "proc", "ramfs", "sysfs", "tmpfs")

# What is on these is nobody's file: the kernel makes it up whenever it is read.
# fmt: off
_MADE_UP = (
    "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "efivarfs", "fusectl", "nfsd", "proc", "pstore",
    "resctrl", "rpc_pipefs", "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs",
)
# fmt: on


class Writer(NamedTuple):
    """A place on the way to a file, and who can write there that should not."""

    place: str
    who: str


class Untrusted(IommufdError):
    """Somebody who is not trusted can decide what is at a path. `writer` tells where, and who."""

    def __init__(self, message: str, writer: Writer) -> None:
        super().__init__(message)
        self.writer = writer


class Place(NamedTuple):
    """Where a path leads. Its descriptors are open as long as the walk's context lasts.

    `folder` is the last folder that is there, open with O_PATH; `missing` are the names of those that are not, the
    outermost first. `name` is that of the last part, `found` what was found there, open with O_PATH, and `status` its
    status; None where there is nothing. `real_path` is the path without links. `dangling`: the first part that is
    missing is not one of the path, but of a link that leads there.
    """

    folder: int
    name: str
    real_path: str
    missing: tuple[str, ...] = ()
    found: int | None = None
    status: os.stat_result | None = None
    dangling: bool = False


@contextlib.contextmanager
def walk(
    path: str,
    trusted: Collection[int] | None = None,
    *,
    follow: bool = False,
    changes: bool = False,
    judge_last: bool = True,
    program: bool = False,
) -> Iterator[Place]:
    """Goes along an absolute path, and stops at the first place that somebody else can write than the trusted users.

    Nothing behind such a place is touched: it may be a mount whose server never answers. Writers are the owners of
    each folder and link and of the file itself, and whom the mode lets write; an access control list shows there too,
    as the group's bits. In a sticky folder such as /tmp others can neither replace nor remove what is not theirs, so
    they count only for what is not there, and where the caller `changes` what is at the path. A writer is also the
    user of a FUSE mount, and where the path is that of a `program`, to be executed or given capabilities, whoever has
    mounted a file system nosuid: users bring theirs along in this way, on a stick for one, with files of any owner.

    `trusted`: user ids; None is root. `follow`: also a link in the last part. `judge_last` False: whoever may write
    what the path leads to, such as a device node, is of no interest.
    Raises Untrusted; OSError where the way ends before the last part for another reason than that nothing is there;
    and IommufdError where the path is not absolute.
    """
    if not path.startswith("/") or "\0" in path:
        raise IommufdError(f"{path!r} is not an absolute path.")
    with contextlib.closing(_Walk(path, _TRUSTED if trusted is None else trusted, program)) as walker:
        yield walker.go(follow, changes, judge_last)


def check_writers(path: str, trusted: Collection[int] | None = None) -> None:
    """Raises as `walk` does of a program; what is not there is nobody's."""
    with walk(path, trusted, follow=True, program=True):
        pass


def writer_of(path: str, trusted: Collection[int] | None = None) -> Writer | None:
    """The first place on the way to a program that somebody else can write; None without one. Raises OSError."""
    try:
        check_writers(path, trusted)
    except Untrusted as exc:
        return exc.writer
    return None


def reopen(found: int, flags: int = os.O_RDONLY) -> int:
    """Opens the very file that was found, whatever lies at its path by now, without waiting for anybody."""
    return os.open(f"/proc/self/fd/{found}", flags | os.O_NONBLOCK | os.O_CLOEXEC)


def is_made_up(found: int) -> bool:
    """Whether the kernel makes up what was found as it is read, or does not tell. Raises OSError and IommufdError.

    To read that is to do something: it takes messages away from others (/proc/kmsg), or has a device answer (sysfs).
    """
    mount = parse_mount(_read(_MOUNTINFO), mount_id(found))
    return mount is None or mount.kind in _MADE_UP


def entries(folder: int) -> list[str]:
    """The names in a folder that is open with O_PATH. Raises OSError."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def sync(folder: int) -> None:
    """Has the disk know which names a folder has that is open with O_PATH. Raises OSError."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Walk:
    """A walk in progress: the folder that it has come to, and what it has open."""

    def __init__(self, path: str, trusted: Collection[int], program: bool) -> None:
        self._path = path
        self._trusted = trusted
        self._program = program
        self._folder = -1
        self._where = "/"
        self._found = -1
        # The mount that the folder is on.
        self._mount = b""
        # Who can add names to the folder, beside the trusted users.
        self._adds = ""

    def close(self) -> None:
        """Closes what is open."""
        for fd in (self._folder, self._found):
            if fd >= 0:
                os.close(fd)
        self._folder = self._found = -1

    def go(self, follow: bool, changes: bool, judge_last: bool) -> Place:
        """See `walk`."""
        self._enter_root()
        # The next one is at the end. With each, whether it is of a link.
        parts = [(part, False) for part in _parts(self._path)]
        links = 0
        while True:
            part, of_link = parts.pop()
            here = self._here(part)
            if self._adds and changes and not parts:
                raise self._untrusted(self._where, self._adds)
            try:
                fd = self._open(part, last=not parts)
            except FileNotFoundError:
                return self._nothing([part, *(each for each, _of_link in reversed(parts))], of_link)
            self._found = fd
            mount = mount_id(fd)
            if mount != self._mount:
                self._judge_mount(here, mount)
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode) and (parts or follow):
                self._judge(here, status)
                links += 1
                if links > _SYMLINKS_MAX:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self._path)
                lead = os.readlink("", dir_fd=fd)
                self._leave()
                if lead.startswith("/"):
                    self._enter_root()
                parts += [(each, True) for each in _parts(lead)]
                continue
            if not parts:
                if judge_last or stat.S_ISLNK(status.st_mode):
                    self._judge(here, status)
                return Place(self._folder, part, here, (), fd, status)
            if not stat.S_ISDIR(status.st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self._path)
            self._found = -1
            self._enter(fd, here, mount)

    def _here(self, part: str) -> str:
        if part == ".":
            return self._where
        return os.path.dirname(self._where) if part == ".." else os.path.join(self._where, part)

    def _open(self, part: str, last: bool) -> int:
        if not last:
            # What is mounted on demand is so only where a folder is asked for.
            with contextlib.suppress(NotADirectoryError):
                return os.open(part, _TO_LOOK | os.O_DIRECTORY, dir_fd=self._folder)
        return os.open(part, _TO_LOOK, dir_fd=self._folder)

    def _nothing(self, names: list[str], of_link: bool) -> Place:
        """The place that is not there. `names` are the parts that are left."""
        if self._adds:
            raise self._untrusted(self._where, self._adds)
        if {".", ".."} & set(names):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._path)
        return Place(self._folder, names[-1], os.path.join(self._where, *names), tuple(names[:-1]), dangling=of_link)

    def _enter_root(self) -> None:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # Whoever has mounted that is root's equal.
        self._enter(root, "/", mount_id(root))

    def _enter(self, folder: int, where: str, mount: bytes) -> None:
        if self._folder >= 0:
            os.close(self._folder)
        self._folder, self._where, self._mount = folder, where, mount
        status = os.fstat(folder)
        self._judge(where, status)
        self._adds = _other_writers(status)

    def _leave(self) -> None:
        os.close(self._found)
        self._found = -1

    def _judge_mount(self, here: str, number: bytes) -> None:
        """Raises Untrusted where a mount is somebody's who is not trusted. Only the kernel is asked.

        Something on it has to be open, so that its number is not another's by now.
        """
        mount = parse_mount(_read(_MOUNTINFO), number)
        if mount is None:
            raise self._untrusted(here, "whoever has mounted it, which the kernel does not tell")
        if mount.uid is not None and mount.uid not in self._trusted:
            raise self._untrusted(here, f"{_user(mount.uid)}, whose FUSE mount it is")
        if self._program and mount.nosuid and mount.kind not in _BEGIN_EMPTY:
            raise self._untrusted(here, f"whoever has brought the {mount.kind} that is mounted there nosuid")

    def _judge(self, here: str, status: os.stat_result) -> None:
        if status.st_uid not in self._trusted:
            raise self._untrusted(here, _user(status.st_uid), status)
        # A link's own mode means nothing.
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if not stat.S_ISLNK(status.st_mode) and not sticky and _other_writers(status):
            raise self._untrusted(here, _other_writers(status), status)

    def _untrusted(self, here: str, who: str, status: os.stat_result | None = None) -> Untrusted:
        place = shown_path(here)
        remedy = f"chown -h root {place}"
        if status is None:
            remedy = ""
        elif not stat.S_ISLNK(status.st_mode):
            remedy = f"chown root {place}; chmod go-w {place}"
        remedy = f"make it root's alone ({remedy}), or name another path" if remedy else "name another path"
        return Untrusted(
            f"{shown_path(self._path)} cannot be trusted: {place} can be written by {who}. If that is not meant to be,"
            f" {remedy}.",
            Writer(place, who),
        )


def mount_id(fd: int) -> bytes:
    """The number of the mount that a descriptor of ours is on, as mountinfo has it. Raises IommufdError and OSError.

    The kernel alone tells that. Whatever else is asked of what is there, the server of a mount may never answer.
    """
    found = re.search(rb"^mnt_id:\s*([0-9]+)$", _read(f"/proc/self/fdinfo/{fd}"), re.MULTILINE)
    if not found:
        raise IommufdError("The kernel does not tell which mount a file is on.")
    return found.group(1)


def _read(path: str) -> bytes:
    with open(path, "rb", 0) as stream:
        return stream.read()


class Mount(NamedTuple):
    """What the kernel has of a mount: the type of its file system, and of FUSE the user who serves it."""

    kind: str
    nosuid: bool
    uid: int | None = None


def parse_mount(mountinfo: bytes, number: bytes) -> Mount | None:
    """The mount of that number in the text of /proc/self/mountinfo; None where it has none, or is not understood.

    See proc_pid_mountinfo(5). Its fields have no spaces: the kernel writes these, as other odd bytes, as backslash and
    three octal digits, and no number, type or option that counts here has any. Of FUSE the user is always told:
    fuse_show_options() in fs/fuse/inode.c.
    """
    # Each line ends so, and the kernel leaves the others that Python takes for an end as they are in a name.
    for line in mountinfo.split(b"\n"):
        fields = line.split(b" ")
        if fields[0] != number:
            continue
        with contextlib.suppress(ValueError, IndexError):
            dash = fields.index(b"-", 6)
            kind = fields[dash + 1].decode("ascii")
            nosuid = b"nosuid" in fields[5].split(b",")
            if not re.fullmatch(r"fuse(blk)?(\..*)?", kind):
                return Mount(kind, nosuid)
            users = [each[8:] for each in fields[dash + 3].split(b",") if each.startswith(b"user_id=")]
            if len(users) == 1 and users[0].isdigit():
                return Mount(kind, nosuid, int(users[0]))
        return None
    return None


def _parts(path: str) -> list[str]:
    """The parts of a path, the last one first; of the root, one that leads nowhere else."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")] or ["."]


def _user(uid: int) -> str:
    name = user_name(uid)
    return f"user {name} (uid {uid})" if name else f"uid {uid}"


def _other_writers(status: os.stat_result) -> str:
    """Whom the mode lets write, beside the owner; nothing where it lets nobody."""
    if not status.st_mode & _OTHERS_WRITE:
        return ""
    if status.st_mode & stat.S_IWOTH:
        return "everybody"
    return f"group {group_name(status.st_gid)}"
