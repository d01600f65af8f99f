# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: an option of an iommufd, queried or set, from errno to outcome to words.

What to do is decided by `decide` and judged by `judge`, which touch nothing; `change` carries it out. Check mode takes
the same way and stops before the one call that changes something.

The meaning of each errno was read in drivers/iommu/iommufd (main.c, ioas.c) and measured on Linux 6.12 and 7.x.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from ._errors import error_text
from ._iommufd import BUSY, CHANGED, DENIED, FAILED, RACED, RLIMIT_MODE, UNCHANGED, UNSUPPORTED, Answer, IommuFd, Option

__all__ = (
    "Result",
    "can_be_set",
    "change",
    "decide",
    "explain",
    "judge",
    "unread",
)


class Result(NamedTuple):
    """What became of one option of one iommufd. `errno` is the one that led to the outcome, 0 if none did.

    `before` and `after` are the kernel's numbers, None where they could not be read. In a dry run, `after` is what a
    real run would have left.
    """

    outcome: str
    before: int | None
    after: int | None
    errno: int = 0


def _refusal(error: int) -> str:
    """The outcome that an errno of SET means."""
    return {
        errno.ENOTTY: UNSUPPORTED,
        errno.EOPNOTSUPP: UNSUPPORTED,
        errno.EPERM: DENIED,
        errno.EBUSY: BUSY,
    }.get(error, FAILED)


def unread(error: int) -> Result:
    """What a query or a change comes to where the option cannot even be read."""
    # Reading takes no privilege, so EPERM here is somebody's filter and says nothing of CAP_SYS_RESOURCE.
    outcome = _refusal(error)
    return Result(outcome if outcome == UNSUPPORTED else FAILED, None, None, error)


def decide(before: Answer, wanted: int | None, probe: Answer | None = None) -> Result:
    """What is to be done about an option, and so what check mode foretells. CHANGED stands for "send the SET".

    `before` is the answer to GET, `wanted` the kernel's number of the value, None for a query. `probe` is the answer
    to `IommuFd.probe`: EINVAL, or 0 where the option cannot be probed, says nothing against a SET. None: not probed.
    """
    if before.errno:
        return unread(before.errno)
    if wanted is None or before.value == wanted:
        return Result(UNCHANGED, before.value, before.value)
    if probe is None or probe.errno in (0, errno.EINVAL):
        return Result(CHANGED, before.value, wanted)
    return Result(_refusal(probe.errno), before.value, before.value, probe.errno)


def judge(before: Answer, wanted: int, refusal: int, after: Answer) -> Result:
    """What a change came to: `refusal` is the errno that stopped it, 0 if SET succeeded; `after` is a GET after it.

    The reading decides, not the SET: whoever else sets the same iommufd at the same time may have been quicker.
    """
    if after.errno:
        return Result(FAILED, before.value, None, after.errno)
    if after.value == wanted:
        return Result(UNCHANGED if refusal else CHANGED, before.value, after.value)
    return Result(_refusal(refusal) if refusal else RACED, before.value, after.value, refusal)


def can_be_set(probe: Answer) -> bool | None:
    """Whether the answer to `IommuFd.probe` says that the option can be set now; None where it does not tell."""
    return {errno.EINVAL: True, errno.EBUSY: False}.get(probe.errno)


def change(iommufd: IommuFd, option: Option, wanted: int | None, object_id: int = 0, dry_run: bool = False) -> Result:
    """Queries the option (`wanted` None) or brings it to the wanted value; a dry run foretells what that would do.

    GET comes first, and there is no SET of the value already in force: a busy iommufd answers EBUSY even to that.
    """
    before = iommufd.get(option, object_id)
    if before.errno or wanted is None or before.value == wanted:
        return decide(before, wanted)
    foretold = decide(before, wanted, iommufd.probe(option))
    if dry_run and foretold.outcome == CHANGED:
        return foretold
    refusal = foretold.errno or iommufd.set(option, wanted, object_id).errno
    return judge(before, wanted, refusal, iommufd.get(option, object_id))


_HINTS = {
    ("huge_pages", errno.ENOENT): (" It has no IOAS of this id: a query without ioas_id lists those it has."),
    ("huge_pages", errno.EINVAL): (
        " The kernel turns huge pages off only while no memory is mapped for a device: do it before the VM maps any,"
        " or restart the VM."
    ),
}


def explain(result: Result, subject: str, option: Option, wanted: int | None) -> str:
    """The sentence that tells a user what kept the option from being read or set, and what to do; "" for success.

    `subject` names what was looked at, such as "iommufd 30 of qemu-system-x86 (pid 4242)".
    """
    if result.outcome in (CHANGED, UNCHANGED):
        return ""
    error = error_text(result.errno)
    asked = option.name if wanted is None else f"{option.name}={option.value(wanted)}"
    stays = "" if result.after is None else f" It stays with {option.name}={option.value(result.after)}."
    if result.outcome == UNSUPPORTED:
        missing = "the ioctl IOMMU_OPTION" if result.errno == errno.ENOTTY else f"the option {option.name}"
        consequence = ": its pinned memory is accounted per user" if option is RLIMIT_MODE else ""
        return f"{subject}: this kernel does not have {missing} ({error}){consequence}."
    if result.outcome == DENIED:
        return (
            f"{subject}: {asked} takes CAP_SYS_RESOURCE in the initial user namespace, which this caller lacks"
            f" ({error}).{stays} Run the task as root with that capability, outside of any container; or grant"
            " CAP_IPC_LOCK to the VMM, which lifts its limit on pinned memory altogether."
        )
    if result.outcome == BUSY:
        return (
            f"{subject} holds objects already, and while it does its accounting cannot change ({error}).{stays} Set it"
            " before the first device is attached: restart the VM with an iommufd that is set beforehand; or grant"
            " CAP_IPC_LOCK to the VMM, which lifts its limit on pinned memory altogether."
        )
    if result.outcome == RACED and result.after is not None:
        return (
            f"{subject}: {asked} was set, but {option.name}={option.value(result.after)} is in force now: someone else"
            " set it in between. Make sure that only one program sets it."
        )
    hint = _HINTS.get((option.name, result.errno), "")
    return f"{subject}: {asked} failed ({error}).{stays}{hint}"
