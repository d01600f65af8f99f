# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the iommufds that a process holds, shared with it for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ._errors import IommufdError, NotAnIommufd
from ._iommufd import IommuFd, iommufd_rdevs
from ._process import DESCRIPTORS_MAX, Process, is_path_only, own_character_device

__all__ = (
    "IOMMUFDS_MAX",
    "Swapped",
    "borrow_iommufd",
    "find_iommufds",
)

# How many iommufds of one process are worked on. A VMM has one or two.
IOMMUFDS_MAX = 256


def find_iommufds(process: Process) -> dict[int, int]:
    """The descriptors of the process that are open on an iommufd, whatever the node's name, in rising order.

    With each goes the device number, all of which `borrow_iommufd` takes, so that sysfs is read once for a process.

    Raises AccessRefused or ProcessGone, and IommufdError where there are more than anybody could have looked at.
    Nothing is borrowed or opened for it.
    """
    found = process.character_devices()
    iommufds = iommufd_rdevs(set(found.devices.values()))
    fds = {fd: rdev for fd, rdev in found.devices.items() if rdev in iommufds}
    if found.more or len(fds) > IOMMUFDS_MAX:
        raise IommufdError(
            f"{process} has more descriptors than are looked through ({DESCRIPTORS_MAX}, of which {IOMMUFDS_MAX} may be"
            " iommufds): give the one that is meant by its number."
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
