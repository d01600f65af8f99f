# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: one process, held so that its pid cannot come to mean another, and its descriptors.

What is shared with a process here is shared by pidfd_getfd(2) and by nothing else. To open /proc/PID/fd/N of a device
node makes a *new* open file: an option set on that is set with success and changes nothing for the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import sys
from collections.abc import Container, Iterator
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple

from ._errors import AccessRefused, DescriptorGone, HostLacks, IommufdError, ProcessGone, error_text, printable
from ._names import user_name
from ._syscalls import character_device, pidfd_getfd, pidfd_open

__all__ = (
    "DESCRIPTORS_MAX",
    "Descriptors",
    "Process",
    "Status",
    "character_devices_in",
    "is_path_only",
    "own_character_device",
    "parse_stat",
    "parse_status",
    "read_file",
)

# How many descriptors of one process are looked at. A limit of a million is common; a VMM has some hundreds.
DESCRIPTORS_MAX = 2**18

# How much of a file is read at once, in bytes.
_READ_AT_ONCE = 16384

# What is read of /proc/PID/fdinfo/N, in bytes: the flags are on its second line. Of an epoll or inotify descriptor,
# hundreds of megabytes may follow.
_FDINFO_MAX = 256

# The largest C int: a pid or descriptor beyond it would reach the kernel cut to another one.
_INT_MAX = 2**31 - 1

_STATUS_FIELDS = (
    b"State",
    b"Threads",
    b"Uid",
    b"VmSize",
    b"VmPin",
    b"VmLck",
    b"CapEff",
    b"CapPrm",
    b"CapBnd",
    b"CapAmb",
    b"NoNewPrivs",
)

# The first Linux that has a system call.
_SINCE = {"pidfd_open": "5.3", "pidfd_getfd": "5.6", "statx": "4.11"}

# include/linux/sched.h. Kernel threads have no memory, but neither has a process that is about to end.
_PF_KTHREAD = 0x00200000


_NAME = attrgetter("name")


class Descriptors(NamedTuple):
    """What was found in a table of descriptors: those on character devices, in rising order, and their device numbers.

    `looked_at` is how many descriptors were looked at, `more` whether there are others, which were not.
    """

    devices: dict[int, int]
    looked_at: int
    more: bool


def character_devices_in(
    folder: int, most: int = DESCRIPTORS_MAX, wanted: Container[int] | None = None, keep: int = DESCRIPTORS_MAX
) -> Descriptors:
    """The descriptors of a process that are open on character devices, by its folder /proc/PID/fd, which is open here.

    `most` is how many are looked at, and `keep` how many are told; `wanted` are the device numbers that are told, all
    without it. A descriptor that is closed while this looks is left out. Raises PermissionError, HostLacks, or
    FileNotFoundError where the process has ended.
    """
    found: dict[int, int] = {}
    count = 0
    readlink = os.readlink
    with os.scandir(folder) as entries:
        # There may be millions: they are not listed at once. A call more for each costs as much as all of this.
        for count, name in enumerate(map(_NAME, islice(entries, most)), 1):
            try:
                # What is on no file system (a socket, a pipe, an eventfd) is called `type:[...]`, and is no device.
                if readlink(name, dir_fd=folder)[0] not in "/(":
                    continue
            except PermissionError:
                raise
            except OSError as exc:
                # A path too long to be told may lead to a device all the same. Else it is closed, or the process has
                # ended.
                if exc.errno != errno.ENAMETOOLONG:
                    continue
            try:
                rdev = character_device(name, folder)
            except OSError as exc:
                if exc.errno == errno.ENOSYS:
                    raise HostLacks(_no_system_call("statx")) from exc
                # On a FUSE mount, which refuses everybody but its owner, root too; on a network mount that is no more;
                # or closed by now. Whatever it is, it is no device.
                continue
            if rdev is not None and (wanted is None or rdev in wanted):
                if len(found) == keep:
                    return Descriptors(dict(sorted(found.items())), count - 1, more=True)
                found[int(name)] = rdev
        more = count == most and next(entries, None) is not None
    return Descriptors(dict(sorted(found.items())), count, more)


def read_file(path: str, most: int = sys.maxsize, in_one: bool = False) -> bytes:
    """A file of /proc, or the beginning of it.

    `in_one`: the kernel makes it as a whole (single_open() in fs/seq_file.c), so a read that is not filled is the last.
    """
    # A file object costs several times what the kernel takes for a file of /proc, and there are many to read.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = b""
        while len(text) < most and (more := os.read(fd, min(_READ_AT_ONCE, most - len(text)))):
            text += more
            if in_one and len(more) < _READ_AT_ONCE:
                break
        return text
    finally:
        os.close(fd)


class Status(NamedTuple):
    """What /proc/PID/status says.

    `uid` is the real user id. `has_memory`: memory is given up early at the end. `leaderless`: the first thread has
    ended while others run on, and the process shows neither descriptors nor memory. `pinned_bytes` and
    `locked_bytes` are VmPin and VmLck. The capability sets are those of the first thread, as numbers with a bit
    for each.
    """

    uid: int
    has_memory: bool
    leaderless: bool
    pinned_bytes: int
    locked_bytes: int
    effective: int
    permitted: int
    bounding: int
    no_new_privs: bool
    ambient: int = 0


def parse_status(text: bytes) -> Status:
    """Reads the text of /proc/PID/status, in which the kernel escapes the process's name. See proc_pid_status(5).

    Raises IommufdError where that is not what it is.
    """
    fields = {}
    for name in _STATUS_FIELDS:
        # This is asked of every process of a host, and a regular expression takes eight times as long.
        words = text.partition(b"\n" + name + b":")[2][:100].split(None, 1)
        if words:
            fields[name] = words[0]
    try:
        return Status(
            uid=int(fields[b"Uid"]),
            has_memory=b"VmSize" in fields,
            leaderless=fields.get(b"State") == b"Z" and int(fields.get(b"Threads", 1)) > 1,
            # A process without memory has no such lines.
            pinned_bytes=int(fields.get(b"VmPin", 0)) * 1024,
            locked_bytes=int(fields.get(b"VmLck", 0)) * 1024,
            effective=int(fields[b"CapEff"], 16),
            permitted=int(fields[b"CapPrm"], 16),
            bounding=int(fields[b"CapBnd"], 16),
            no_new_privs=fields.get(b"NoNewPrivs") == b"1",
            ambient=int(fields.get(b"CapAmb", b"0"), 16),
        )
    except (KeyError, ValueError) as exc:
        raise IommufdError(f"/proc/PID/status cannot be read: {printable(text[:200])!r}.") from exc


class Stat(NamedTuple):
    """What /proc/PID/stat says: name, state's letter, the kernel's flags, and the start in clock ticks since boot."""

    comm: bytes
    state: str
    flags: int
    start_ticks: int


def parse_stat(text: bytes) -> Stat:
    """Reads the text of /proc/PID/stat: fields 2, 3, 9 and 22 of proc_pid_stat(5).

    The name in parentheses may hold anything, parentheses too; behind the last one nothing is the process's to choose.
    Raises IommufdError where the text is something else.
    """
    before, _parenthesis, after = text.rpartition(b")")
    comm, fields = before.partition(b"(")[2], after.split()
    try:
        return Stat(comm, fields[0].decode("ascii"), int(fields[6]), int(fields[19]))
    except (IndexError, ValueError) as exc:
        raise IommufdError(f"/proc/PID/stat cannot be read: {printable(text[:200])!r}.") from exc


def parse_pidfd(text: bytes) -> int:
    """The process that a pidfd stands for, from /proc/self/fdinfo: -1 once it was reaped.

    It is numbered as in the pid namespace that /proc is mounted for, 0 where it is not in that. Raises IommufdError.
    """
    found = re.search(rb"^Pid:\s*(-?[0-9]{1,10})$", text, re.MULTILINE)
    if not found:
        raise IommufdError(f"/proc/self/fdinfo of a pidfd cannot be read: no Pid in {printable(text[:200])!r}.")
    return int(found.group(1))


def parse_flags(text: bytes) -> int:
    """The flags that a descriptor was opened with, in the text of /proc/PID/fdinfo/N. Raises IommufdError."""
    found = re.search(rb"^flags:\s*([0-7]{1,16})$", text, re.MULTILINE)
    if not found:
        raise IommufdError(f"/proc/PID/fdinfo cannot be read: no flags in {printable(text[:200])!r}.")
    return int(found.group(1), 8)


def _yama() -> str:
    try:
        return "kernel.yama.ptrace_scope is " + read_file("/proc/sys/kernel/yama/ptrace_scope").decode("ascii").strip()
    except OSError:
        return "Yama is not in this kernel"


class Process(NamedTuple):
    """A running process, held by a pidfd from `Process.hold` on.

    `status` is what it was when the process was held; `user` is the name of its user here, None where it has none.
    `comm` is escaped to be printable. `pidfd` is a descriptor of ours, which a child needs to look at the process, too.
    """

    pid: int
    comm: str
    user: str | None
    status: Status
    start_ticks: int
    pidfd: int

    def __str__(self) -> str:
        return f"{self.comm} (pid {self.pid})"

    @property
    def uid(self) -> int:
        """The real user id, whose counter the kernel charges under per-user accounting.

        See current_user() at iopt_alloc_pages() in drivers/iommu/iommufd/pages.c.
        """
        return self.status.uid

    def describe(self) -> dict[str, Any]:
        """Who it is, as modules return it."""
        return {"pid": self.pid, "comm": self.comm, "uid": self.uid, "user": self.user}

    @classmethod
    @contextlib.contextmanager
    def hold(cls, pid: int) -> Iterator[Process]:
        """Holds the process `pid` by a pidfd while the context lasts.

        Raises ProcessGone where there is none or it has ended, HostLacks where the system call is not to be had,
        AccessRefused where it is forbidden, and IommufdError where the number is not that of a process.
        """
        if not 0 < pid <= _INT_MAX:
            raise IommufdError(f"{pid} is not the id of a process: ids count from 1.")
        try:
            pidfd = pidfd_open(pid)
        except OSError as exc:
            if exc.errno in (errno.EINVAL, errno.ENOENT):
                raise IommufdError(
                    f"{pid} is a thread, not a process: give its process, Tgid in /proc/{pid}/status."
                ) from exc
            refused = (
                f"pidfd_open of process {pid} is refused ({error_text(exc.errno)}): look for a seccomp filter of a"
                " container or a service around Ansible. Run the task on the host itself."
            )
            raise _error(exc, "pidfd_open", f"process {pid}", ProcessGone(_gone(pid)), refused) from exc
        try:
            yield cls._look_at(pid, pidfd)
        finally:
            os.close(pidfd)

    @classmethod
    def _look_at(cls, pid: int, pidfd: int) -> Process:
        # System calls count pids in the caller's namespace, /proc in the one that it was mounted for.
        if parse_pidfd(read_file(f"/proc/self/fdinfo/{pidfd}")) not in (pid, -1):
            raise AccessRefused(_hidden(pid))
        status = parse_status(_read_of(pid, pidfd, "status"))
        stat_ = parse_stat(_read_of(pid, pidfd, "stat"))
        process = cls(pid, printable(stat_.comm), user_name(status.uid), status, stat_.start_ticks, pidfd)
        process.check_alive()
        if stat_.state == "Z":
            raise IommufdError(
                f"The first thread of {process} has ended while others run on: its descriptors are out of reach."
            )
        if stat_.flags & _PF_KTHREAD:
            raise IommufdError(f"{process} is a kernel thread: it has no descriptors.")
        if not status.has_memory:
            raise ProcessGone(f"{process} is about to end.")
        return process

    def check_alive(self) -> None:
        """Raises ProcessGone once the process has ended; before that, whatever was read by its pid was its own."""
        if _has_ended(self.pidfd):
            raise ProcessGone(_gone(self.pid, self.comm))

    def read(self, name: str, most: int = sys.maxsize) -> bytes:
        """A file of the process in /proc, or the beginning of it.

        Raises ProcessGone, AccessRefused, or IommufdError for what is neither, as where memory is short.
        """
        try:
            text = read_file(f"/proc/{self.pid}/{name}", most)
        except OSError as exc:
            self.check_alive()
            refused = self._refused(f"read its {name}", exc)
            raise _error(exc, "read", f"{name} of {self}", AccessRefused(refused), refused) from exc
        self.check_alive()
        return text

    def character_devices(self) -> Descriptors:
        """The descriptors that are open on character devices: their numbers, and the device numbers behind them.

        A descriptor that is closed while this looks is left out. Raises AccessRefused or ProcessGone.
        """
        try:
            folder = os.open(f"/proc/{self.pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                found = character_devices_in(folder)
            finally:
                os.close(folder)
        except OSError as exc:
            gone, refused = ProcessGone(_gone(self.pid, self.comm)), self._refused("look at its descriptors", exc)
            raise _error(exc, "scandir", f"the descriptors of {self}", gone, refused) from exc
        self.check_alive()
        return found

    def character_device(self, fd: int) -> int | None:
        """The device number behind descriptor `fd`, None where it is no character device. Never waits for a server.

        Raises DescriptorGone, AccessRefused, HostLacks or ProcessGone.
        """
        path = f"/proc/{self.pid}/fd/{fd}"
        try:
            return character_device(path)
        except OSError as exc:
            if exc.errno in (errno.EPERM, errno.EACCES):
                # A FUSE mount refuses everybody but its owner, root too. Where the link can be read, it was not ptrace.
                with contextlib.suppress(OSError):
                    os.readlink(path)
                    return None
            elif exc.errno not in (errno.ENOENT, errno.ESRCH, errno.ENOSYS):
                # A file on a network mount that is no more, for one: whatever it is, it is no device.
                return None
            self.check_alive()
            gone, refused = DescriptorGone(self._no_descriptor(fd)), self._refused("look at its descriptors", exc)
            raise _error(exc, "statx", f"descriptor {fd} of {self}", gone, refused) from exc

    def is_path_only(self, fd: int) -> bool:
        """Whether descriptor `fd` was opened with O_PATH, as the kernel tells it without anything being shared.

        Raises DescriptorGone, and what `read` does.
        """
        try:
            return parse_flags(self.read(f"fdinfo/{fd}", _FDINFO_MAX)) & os.O_PATH != 0
        except IommufdError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                raise DescriptorGone(self._no_descriptor(fd)) from exc
            raise

    def link(self, fd: int) -> str:
        """What descriptor `fd` is open on, as the kernel names it, escaped to be printable."""
        try:
            return printable(os.fsencode(os.readlink(f"/proc/{self.pid}/fd/{fd}")))
        except OSError:
            return "closed by now"

    def borrow(self, fd: int) -> int:
        """A descriptor of ours that shares the open file behind the process's `fd`. The caller closes it.

        While it is open it keeps what the file holds alive, pinned memory included, even if the process ends. To close
        it may take for ever: a file on a FUSE mount asks its server (FUSE_FLUSH), and no signal ends that.
        Raises DescriptorGone, ProcessGone, AccessRefused, HostLacks, or IommufdError for what none of these says.
        """
        if not 0 <= fd <= _INT_MAX:
            raise DescriptorGone(f"{fd} is not the number of a descriptor: they count from 0.")
        try:
            return pidfd_getfd(self.pidfd, fd)
        except OSError as exc:
            if exc.errno == errno.EBADF:
                raise DescriptorGone(self._no_descriptor(fd)) from exc
            gone, refused = ProcessGone(_gone(self.pid, self.comm)), self._refused(f"share its descriptor {fd}", exc)
            raise _error(exc, "pidfd_getfd", f"descriptor {fd} of {self}", gone, refused) from exc

    def _no_descriptor(self, fd: int) -> str:
        return f"{self} has no descriptor {fd}: `ls -l /proc/{self.pid}/fd` shows those it has."

    def _refused(self, what: str, exc: OSError) -> str:
        return (
            f"{self} does not let this caller (uid {os.geteuid()}) {what} ({error_text(exc.errno)}). That takes"
            f" what ptrace takes: root with CAP_SYS_PTRACE (become: true), Yama below 3 ({_yama()}), and neither an LSM"
            " such as AppArmor or SELinux nor a seccomp filter or container around Ansible that forbids it."
        )


def own_character_device(fd: int) -> int | None:
    """The device number behind a descriptor of ours, None where it is no character device. Never waits for a server."""
    with contextlib.suppress(OSError):
        return character_device(f"/proc/self/fd/{fd}")
    return None


def is_path_only(fd: int) -> bool:
    """Whether a descriptor of ours was opened with O_PATH: it names a file but cannot reach its driver."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH)


def _read_of(pid: int, pidfd: int, name: str) -> bytes:
    """A file of the process in /proc. Raises ProcessGone, or AccessRefused where /proc hides the process."""
    try:
        return read_file(f"/proc/{pid}/{name}")
    except OSError as exc:
        if _has_ended(pidfd):
            raise ProcessGone(_gone(pid)) from exc
        hidden = _hidden(pid)
        raise _error(exc, "read", f"{name} of process {pid}", AccessRefused(hidden), hidden) from exc


def _hidden(pid: int) -> str:
    return (
        f"/proc hides process {pid} from this caller (uid {os.geteuid()}): it is mounted with hidepid, or for another"
        " pid namespace. Run the task as root with CAP_SYS_PTRACE, on the host itself."
    )


def _has_ended(pidfd: int) -> bool:
    """Whether the process has ended, be it a zombie still: that is when a pidfd becomes readable (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _gone(pid: int, comm: str = "") -> str:
    if comm:
        return f"{comm} (pid {pid}) has ended."
    return f"There is no process with the id {pid}: it has ended, or belongs to another pid namespace."


def _no_system_call(name: str) -> str:
    return (
        f"The system call {name} is not to be had (ENOSYS): it takes Linux {_SINCE[name]}, or a seccomp filter (of a"
        " container or a service) hides it. Run the task on the host itself."
    )


def _error(exc: OSError, call: str, of: str, gone: IommufdError, refused: str) -> IommufdError:
    """What the errno of a call on a process or a descriptor means: that it is `gone`, that it is `refused`, or else."""
    if exc.errno in (errno.ENOENT, errno.ESRCH):
        return gone
    if exc.errno in (errno.EPERM, errno.EACCES):
        return AccessRefused(refused)
    if exc.errno == errno.ENOSYS and call in _SINCE:
        return HostLacks(_no_system_call(call))
    return IommufdError(f"{call} of {of} failed ({error_text(exc.errno)}).")
