# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what else /proc tells of a process that is held: its limit, command line, unit, start."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from ._errors import IommufdError, printable
from ._process import Process, Status, parse_status, read_file

__all__ = (
    "Arguments",
    "Limit",
    "MemoryMax",
    "in_initial_namespace",
    "in_initial_user_namespace",
    "number_in",
    "own_status",
    "parse_cgroup",
    "parse_memlock",
    "read_arguments",
    "read_memlock",
    "read_memory_max",
    "read_program",
    "read_units",
    "started_at",
)

# What is read of a command line. The longest of a VMM has some kilobytes and hundreds of arguments.
_CMDLINE_MAX = 2**18
_ARGUMENTS_MAX = 8192

# How long the path of a program is that is told. Any user may have thousands of processes with long ones.
_PROGRAM_MAX = 1024
_DELETED = b" (deleted)"

# linux/nsfs.h, and include/linux/proc_ns.h before: the inodes of the namespaces that the system began with.
_INITIAL = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}

# systemd.unit(5). A template, which has nothing behind its @, has no processes.
_UNIT = re.compile(rb"[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9:_.\\@-]+)?\.(?:service|scope)")
_UNIT_NAME_MAX = 255

_CGROUPS = b"/sys/fs/cgroup"


class Limit(NamedTuple):
    """A resource limit in bytes, soft and hard; None stands for unlimited."""

    soft: int | None
    hard: int | None


def parse_memlock(text: bytes) -> Limit:
    """Reads RLIMIT_MEMLOCK in the text of /proc/PID/limits. Raises IommufdError where it is not there."""
    found = re.search(rb"^Max locked memory +([0-9]{1,20}|unlimited) +([0-9]{1,20}|unlimited) ", text, re.MULTILINE)
    if not found:
        raise IommufdError(f"/proc/PID/limits cannot be read: {printable(text[:200])!r}.")
    soft, hard = (None if each == b"unlimited" else int(each) for each in found.groups())
    return Limit(soft, hard)


def parse_cgroup(text: bytes) -> tuple[str | None, str | None]:
    """The unit of the system's service manager, and that of a user's, in the text of /proc/PID/cgroup; None without.

    systemd names a unit's control group after it, below those of its slices and of nothing else. Whoever got a group of
    its own, such as a manager of containers, names those below as it likes, after units of the host too.
    """
    found = re.search(rb"^(?:0:|[0-9]+:name=systemd):(/.*)$", text, re.MULTILINE)
    # A name that could be taken for one of the kernel's own files begins with an underscore more (systemd.io,
    # CONTROL_GROUP_INTERFACE).
    parts = (part[part[:1] == b"_" :] for part in found.group(1).split(b"/") if part) if found else iter(())
    unit = _unit_among(parts)
    return unit, _unit_among(parts) if unit and re.fullmatch(r"user@[0-9]+\.service", unit) else None


def _unit_among(parts: Iterator[bytes]) -> str | None:
    """The unit that has the first group in a path which is no slice; None where that is no unit's. Goes up to there."""
    part = next((each for each in parts if not each.endswith(b".slice")), b"")
    return part.decode("ascii") if len(part) <= _UNIT_NAME_MAX and _UNIT.fullmatch(part) else None


def started_at(start_ticks: int) -> float:
    """When a process started, in seconds since the epoch, by the clock as it is set. Given are ticks since boot."""
    return _booted() + start_ticks / os.sysconf("SC_CLK_TCK")


class Arguments(NamedTuple):
    """A command line; with `whole` False, the beginning of one."""

    words: list[bytes]
    whole: bool


def read_arguments(process: Process) -> Arguments:
    """The command line that a process shows. Raises ProcessGone or AccessRefused.

    It may have changed that, and have it lead to gigabytes of its memory (prctl(2), PR_SET_MM_ARG_START).
    """
    text = process.read("cmdline", _CMDLINE_MAX)
    *words, rest = text.split(b"\0", _ARGUMENTS_MAX)
    return Arguments(words, len(text) < _CMDLINE_MAX and b"\0" not in rest)


def read_program(process: Process) -> bytes | None:
    """The path of a process's program, in its mount namespace; None where this caller may not look, or it is too long.

    It is the path that the program had, where another file has taken its place. It counts once `check_alive` has
    passed after it.
    """
    try:
        path = os.readlink(f"/proc/{process.pid}/exe".encode())
    except OSError:
        return None
    # See d_path() in fs/d_path.c.
    path = path[: -len(_DELETED)] if path.endswith(_DELETED) else path
    return path if len(path) <= _PROGRAM_MAX else None


def read_memlock(process: Process) -> Limit:
    """The RLIMIT_MEMLOCK of a process. Raises ProcessGone or AccessRefused."""
    try:
        limits = resource.prlimit(process.pid, resource.RLIMIT_MEMLOCK)
    except OSError:
        # It takes CAP_SYS_RESOURCE for another user's process. The text is for everybody, and takes far longer.
        return parse_memlock(process.read("limits"))
    process.check_alive()
    return Limit(*(None if each == resource.RLIM_INFINITY else each for each in limits))


class MemoryMax(NamedTuple):
    """How much memory the control groups that a process is in may use.

    `limit` is the least of theirs, and so that of all processes in that group. `shared`: whether it is in a slice with
    such a limit that has others in it, too.
    """

    limit: Limit
    shared: bool


def read_memory_max(process: Process) -> MemoryMax | None:
    """What the control groups of a process leave it; None where that was not seen.

    Raises ProcessGone or AccessRefused.
    """
    found = _limited_groups(process)
    if found is None:
        return None
    least = min((each.limit for each in found), default=None)
    slices = [each for each in found if each.path.endswith(b".slice")]
    return MemoryMax(Limit(least, least), any(map(_has_others, slices)))


class _Group(NamedTuple):
    """A control group whose memory is limited. `inner`: the one below it that a process is in, else empty."""

    path: bytes
    inner: bytes
    limit: int


def _has_others(group: _Group) -> bool:
    try:
        below = [each for each in os.scandir(group.path) if each.is_dir() and each.name != group.inner]
    except OSError:
        return True
    return any(_may_have_any(each.path) for each in below)


def _may_have_any(group: bytes) -> bool:
    """Whether there may be processes in a control group, or below it."""
    try:
        return b"populated 0" not in read_file(os.fsdecode(group + b"/cgroup.events"))
    except OSError:
        return True


def _limited_groups(process: Process) -> list[_Group] | None:
    """The control groups of a process whose memory is limited; None where they were not seen."""
    text = process.read("cgroup")
    found = re.search(rb"^[0-9]+:(?:[^:\n]*,)?memory(?:,[^:\n]*)?:(/.*)$", text, re.MULTILINE)
    folder, name = (_CGROUPS, b"memory.max") if found is None else (_CGROUPS + b"/memory", b"memory.limit_in_bytes")
    found = found or re.search(rb"^0::(/.*)$", text, re.MULTILINE)
    parts = found.group(1).split(b"/") if found else [b".."]
    # It may be outside of what is mounted here.
    if b".." in parts or not os.path.exists(b"/".join([folder, *parts, b"cgroup.procs"])):
        return None
    groups = []
    for count in range(len(parts)):
        try:
            group = b"/".join([folder, *parts[1 : count + 1]])
            limit = read_file(os.fsdecode(group + b"/" + name)).strip()
        except FileNotFoundError:
            # The first of all groups has none, nor has one whose memory is not counted.
            continue
        except OSError:
            return None
        # In the first version of control groups, no limit is the largest number of whole pages.
        if limit.isdigit() and int(limit) < 2**62:
            groups.append(_Group(group, b"".join(parts[count + 1 : count + 2]), int(limit)))
    return groups


def read_units(process: Process) -> tuple[str | None, str | None]:
    """The unit of the system's service manager that a process belongs to, and that of its user's."""
    return parse_cgroup(process.read("cgroup"))


def in_initial_user_namespace(process: Process) -> bool | None:
    """Whether a process is in the initial user namespace; None where this caller may not look. Raises ProcessGone."""
    initial = in_initial_namespace("user", process.pid)
    process.check_alive()
    return initial


# It is asked for each process of a host.
@cache
def _booted() -> float:
    """When the system booted, in seconds since the epoch, by the clock as it is set when this is called first."""
    # A busy machine may let this process wait between two readings, which is no difference between the clocks.
    for _attempt in range(20):
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        now = time.time()
        if time.clock_gettime(time.CLOCK_BOOTTIME) - before < 0.001:
            break
    return now - before


def own_status() -> Status:
    """What /proc says of this process."""
    return parse_status(read_file("/proc/self/status"))


def in_initial_namespace(kind: str, pid: int | str = "self") -> bool | None:
    """Whether a process is in the initial namespace of a kind, `pid` or `user`; None where this caller may not look."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}") == f"{kind}:[{_INITIAL[kind]}]"
    except OSError:
        return None


def number_in(text: bytes, name: bytes) -> int:
    """A number in the text of /proc/PID/status, which is asked of every process of a host; -1 where there is none."""
    found = text.find(b"\n" + name + b":")
    if found < 0:
        return -1
    begins = found + len(name) + 2
    word = text[begins : begins + 30].split(None, 1)[:1]
    return int(word[0]) if word and word[0].isdigit() else -1
