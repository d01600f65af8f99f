# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: one iommufd: its options, its IOASes, and the device numbers that it can have."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterable
from typing import NamedTuple, Union

from ._errors import HostLacks, error_text
from ._uapi import (
    IOMMU_OPTION,
    IOMMU_OPTION_HUGE_PAGES,
    IOMMU_OPTION_OP_GET,
    IOMMU_OPTION_OP_SET,
    IOMMU_OPTION_RLIMIT_MODE,
    IommuOption,
)

__all__ = (
    "BUSY",
    "CHANGED",
    "DENIED",
    "FAILED",
    "HUGE_PAGES",
    "NONE",
    "PROCESS",
    "RLIMIT_MODE",
    "UNCHANGED",
    "UNSUPPORTED",
    "USER",
    "VFIO_CONTAINER",
    "VFIO_CONTAINER_RDEV",
    "Answer",
    "Ioases",
    "IommuFd",
    "Option",
    "iommufd_rdevs",
    "misc_rdev",
    "vfio_container_is_iommufd",
)

# How what a process pins is accounted: by the rlimit mode of its iommufd, or not at all, as with CAP_IPC_LOCK.
USER = "user"
PROCESS = "process"
NONE = "none"

Value = Union[str, bool]  # at run time: Python 3.9 has no str | bool

# Outcomes. The first two are success.
CHANGED = "changed"
UNCHANGED = "unchanged"
UNSUPPORTED = "unsupported"
DENIED = "denied"
BUSY = "busy"
RACED = "raced"
FAILED = "failed"

# A value that no option has. See IommuFd.probe.
_NO_VALUE = 2**64 - 1

VFIO_CONTAINER = "/dev/vfio/vfio"
_MISC_MAJOR = 10
_MISC_DEVICES = "/sys/class/misc"
VFIO_CONTAINER_RDEV = os.makedev(_MISC_MAJOR, 196)

# The highest id that is asked for when IOASes are looked for. Ids are the lowest free ones (xa_alloc() in
# _iommufd_object_alloc()), and a VM has a few objects for each of its devices.
_IOAS_ID_MAX = 1024


class Option(NamedTuple):
    """An option as the kernel numbers it and as users call it: `values[n]` is the name of the kernel's value n.

    `per_ioas`: each IOAS has it of its own, so that its calls name one. `probeable`: the kernel looks at privilege and
    objects before it looks at the value, so that a probe tells.
    """

    name: str
    option_id: int
    values: tuple[Value, ...]
    per_ioas: bool
    probeable: bool

    def value(self, number: int) -> Value:
        """The name of the kernel's value; one that this collection does not know is given as a number's text."""
        return self.values[number] if number < len(self.values) else str(number)

    def number(self, value: Value) -> int:
        """The kernel's number of a value. Raises ValueError where the option has no such value."""
        return self.values.index(value)


RLIMIT_MODE = Option("rlimit_mode", IOMMU_OPTION_RLIMIT_MODE, (USER, PROCESS), per_ioas=False, probeable=True)
HUGE_PAGES = Option("huge_pages", IOMMU_OPTION_HUGE_PAGES, (False, True), per_ioas=True, probeable=False)


class Answer(NamedTuple):
    """What the kernel said to one IOMMU_OPTION: an errno, 0 if it did as asked, and for GET the value."""

    errno: int = 0
    value: int = 0


class Ioases(NamedTuple):
    """The ids of an iommufd's IOASes. `errno` is what kept them from being listed, 0 if nothing did.

    `truncated`: there may well be more, since the ids in use come near the last one that was tried.
    """

    ids: list[int]
    truncated: bool
    errno: int = 0


class IommuFd:
    """An iommufd behind a descriptor of this process, its own or a borrowed one. It neither opens nor closes it.

    Whoever makes one has checked that the descriptor is an iommufd (`iommufd_rdevs`): other drivers answer the same
    ioctl number with errors that would be taken for the kernel's word on iommufd.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def _send(self, option: Option, op: int, value: int, object_id: int) -> Answer:
        argument = IommuOption(
            size=IommuOption.SIZE, option_id=option.option_id, op=op, object_id=object_id, val64=value
        )
        try:
            fcntl.ioctl(self._fd, IOMMU_OPTION, argument)
        except OSError as exc:
            return Answer(errno=exc.errno or errno.EIO)
        return Answer(value=argument.val64)

    def get(self, option: Option, object_id: int = 0) -> Answer:
        """The option's value. `object_id` is the IOAS's id for an option that each IOAS has of its own."""
        return self._send(option, IOMMU_OPTION_OP_GET, 0, object_id)

    def set(self, option: Option, value: int, object_id: int = 0) -> Answer:
        """Sets the option to the kernel's number of a value."""
        return self._send(option, IOMMU_OPTION_OP_SET, value, object_id)

    def probe(self, option: Option) -> Answer:
        """Whether the option could be set now, without setting it; 0 where the kernel gives no way to tell.

        For the rlimit mode the kernel checks privilege, then objects, then the value. A SET of a value that does not
        exist is therefore refused with EPERM where this caller may not, with EBUSY where the iommufd holds objects, and
        with EINVAL where only the value was wrong. Source: iommufd_option_rlimit_mode() in ioas.c.
        """
        return self.set(option, _NO_VALUE) if option.probeable else Answer()

    def ioases(self, gap: int = _IOAS_ID_MAX) -> Ioases:
        """The IOASes, found by asking for an option that each has, from the id 1 up. It takes a millisecond or two.

        `gap`: so many ids in a row that are none, after one that is, end the search. Whoever has one beyond that once
        had more objects than that, all at the same time.
        """
        ids: list[int] = []
        last = 0
        # One argument for all calls, and no Answer for each: most ids are none.
        argument = IommuOption(size=IommuOption.SIZE, option_id=HUGE_PAGES.option_id, op=IOMMU_OPTION_OP_GET)
        for object_id in range(1, _IOAS_ID_MAX + 1):
            argument.object_id = object_id
            try:
                fcntl.ioctl(self._fd, IOMMU_OPTION, argument)
            except OSError as exc:
                if exc.errno != errno.ENOENT:
                    return Ioases([], False, exc.errno or errno.EIO)
                if ids and object_id - last >= gap:
                    break
            else:
                ids.append(object_id)
                last = object_id
        return Ioases(ids, last > _IOAS_ID_MAX // 2)


def iommufd_rdevs(seen: Iterable[int]) -> set[int]:
    """Which of the device numbers of open character devices are those of an iommufd, on the running kernel.

    The node's name proves nothing, since anybody's container may have one of its own making. The number of the misc
    device is dynamic and stands in sysfs. /dev/vfio/vfio is an iommufd where the kernel was built so
    (CONFIG_IOMMUFD_VFIO_CONTAINER) and the legacy container elsewhere; nothing but a try on one of our own tells, which
    is made only when that number was seen.
    """
    numbers = {rdev for rdev in (misc_rdev(),) if rdev is not None}
    if VFIO_CONTAINER_RDEV in seen and vfio_container_is_iommufd():
        numbers.add(VFIO_CONTAINER_RDEV)
    return numbers.intersection(seen)


def misc_rdev() -> int | None:
    """The device number of /dev/iommu as the kernel gives it; None where it has none, as without the module iommufd."""
    with contextlib.suppress(OSError), open(f"{_MISC_DEVICES}/iommu/dev", "rb") as stream:
        return parse_dev(stream.read())
    # A sandbox may hide either.
    try:
        with open("/proc/misc", "rb") as stream:
            return parse_misc(stream.read())
    except OSError as exc:
        # As with ProcSubset=pid of a systemd unit. Where sysfs lists the misc devices, it would list this one.
        if os.path.isdir(_MISC_DEVICES):
            return None
        raise HostLacks(
            f"The device number of /dev/iommu is not to be had: there is none in sysfs, and /proc/misc cannot be read"
            f" ({error_text(exc.errno)}). Run the task on the host itself."
        ) from exc


def parse_dev(text: bytes) -> int:
    """The device number in a file `dev` of sysfs, such as "10:123". Raises HostLacks for any other text."""
    found = re.fullmatch(rb"([0-9]{1,7}):([0-9]{1,7})\n?", text)
    if not found:
        raise HostLacks(f"sysfs gives {text[:40]!r} as the device number of /dev/iommu, which is none.")
    return os.makedev(int(found.group(1)), int(found.group(2)))


def parse_misc(text: bytes) -> int | None:
    """The device number of iommu in the text of /proc/misc, whose lines are a minor number and a name; None without."""
    found = re.search(rb"^ *([0-9]{1,7}) iommu$", text, re.MULTILINE)
    return os.makedev(_MISC_MAJOR, int(found.group(1))) if found else None


def vfio_container_is_iommufd() -> bool | None:
    """Whether a VFIO container that we open ourselves answers as an iommufd does; None where there is none to open."""
    try:
        fd = os.open(VFIO_CONTAINER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != VFIO_CONTAINER_RDEV:
            return None
        return not IommuFd(fd).get(RLIMIT_MODE).errno
    finally:
        os.close(fd)
