# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: an iommufd of our own, by a new open file of /dev/iommu."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from ._errors import AccessRefused, HostLacks, NotAnIommufd, error_text
from ._iommufd import misc_rdev

__all__ = ("DEVICE", "new_iommufd", "open_iommufd")

DEVICE = "/dev/iommu"

_CURE = "load the module iommufd (modprobe iommufd), or boot a kernel that was built with CONFIG_IOMMUFD."


def open_iommufd(follow: bool = False) -> int:
    """A descriptor of a new iommufd, close-on-exec. The caller closes it. `follow`: also where the node is a link.

    Opened is only the node of the device that the kernel has now: another one could have it load a module. Raises
    HostLacks where there is none, NotAnIommufd where the node is something else, and AccessRefused.
    """
    rdev = misc_rdev()
    if rdev is None:
        raise HostLacks(f"This kernel has no iommufd: {_CURE}")
    try:
        # In /dev, which the kernel itself keeps: nobody's server is waited for.
        status = os.stat(DEVICE, follow_symlinks=follow)
        if not stat.S_ISLNK(status.st_mode):
            _check_is_device(status, rdev)
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except FileNotFoundError as exc:
        raise HostLacks(
            f"There is no {DEVICE}: {_CURE} Where the kernel has it, the node is missing, as in a container."
        ) from exc
    except OSError as exc:
        raise AccessRefused(
            f"{DEVICE} cannot be opened by uid {os.geteuid()} ({error_text(exc.errno)}): see to its owner and mode, or"
            " run this as root, outside of any container."
        ) from exc
    try:
        _check_is_device(os.fstat(fd), rdev)
    except NotAnIommufd:
        os.close(fd)
        raise
    return fd


def _check_is_device(status: os.stat_result, rdev: int) -> None:
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != rdev:
        raise NotAnIommufd(f"{DEVICE} is not the kernel's iommufd but something else, so nothing was sent to it.")


@contextlib.contextmanager
def new_iommufd(follow: bool = False) -> Iterator[int]:
    """The same, closed when the context ends."""
    fd = open_iommufd(follow)
    try:
        yield fd
    finally:
        os.close(fd)
