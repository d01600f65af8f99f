# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a task names: a process, and the iommufds it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ._errors import NotAnIommufd
from ._iommufd import IommuFd, iommufd_rdevs
from ._process import Process, character_device, is_path_only

__all__ = (
    "borrow_iommufd",
    "find_iommufds",
)


def find_iommufds(process: Process) -> list[int]:
    """The descriptors of the process that are open on an iommufd, whatever the node's name, in rising order.

    Raises AccessRefused or ProcessGone. Nothing is borrowed or opened for it.
    """
    devices = process.character_devices()
    iommufds = iommufd_rdevs(set(devices.values()))
    return [fd for fd, rdev in devices.items() if rdev in iommufds]


@contextlib.contextmanager
def borrow_iommufd(process: Process, fd: int) -> Iterator[IommuFd]:
    """The process's iommufd `fd`, shared while the context lasts.

    Raises NotAnIommufd where it is something else, also if the process puts that in its place between one look and the
    next. Raises what Process.borrow and Process.character_device do.
    """
    # Before it is borrowed, because closing a descriptor on a dead mount may wait for its server for ever.
    _check_is_iommufd(process, fd, process.character_device(fd))
    with process.borrow(fd) as borrowed:
        # The check that counts: nobody but us can swap what is behind a descriptor of ours.
        _check_is_iommufd(process, fd, character_device(f"/proc/self/fd/{borrowed}"))
        if is_path_only(borrowed):
            raise NotAnIommufd(
                f"Descriptor {fd} of {process} was opened with O_PATH: it names {process.link(fd)}, but has no iommufd"
                " behind it."
            )
        yield IommuFd(borrowed)


def _check_is_iommufd(process: Process, fd: int, rdev: int | None) -> None:
    if rdev is None or not iommufd_rdevs({rdev}):
        raise NotAnIommufd(f"Descriptor {fd} of {process} is not an iommufd. It is {process.link(fd)}.")
