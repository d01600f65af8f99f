# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the processes of a unit's control group, and which of them is the one that is meant.

What counts is what the kernel says of each process, in /proc/PID/cgroup: the files of a control group may lie under a
mount of the user whom it was given to, and who moves processes among its groups meanwhile could hide them there.

Who can put a process into a group (cgroups(7), "Delegation"): root, and whoever was given a group that has both the
place where the process was and the place where it goes. So what is in a unit of the system was started by it, or put
there by root. In a user's manager, whoever is the user may put together what is in a unit.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable, NamedTuple

from ._errors import DescriptorGone, HostLacks, IommufdError, ProcessGone
from ._host_facts import find_vdpa_nodes
from ._iommufd import VFIO_CONTAINER_RDEV, iommufd_rdevs, misc_rdev
from ._process import DESCRIPTORS_MAX, Process, read_file
from ._sharing import Descriptor, Owner, compare
from ._tables import who_pays

__all__ = (
    "IOMMUFD",
    "PINNING",
    "Member",
    "Sought",
    "choose",
    "choose_among",
    "find_members",
    "find_process",
    "group_texts",
    "is_below",
)

# It is there where all controllers are of the second version, and not where there are both.
_UNIFIED = "/sys/fs/cgroup/cgroup.controllers"

# How long all processes may keep us, in seconds. A host has some thousands, and each takes a fraction of a millisecond.
_SECONDS = 20
_TOLD_MAX = 10


class Sought(NamedTuple):
    """What the process that is looked for holds. `limit`: it is its own limit that counts, so a copy will not do."""

    what: str
    limit: bool


IOMMUFD = Sought("an iommufd", limit=False)
PINNING = Sought("an iommufd, VFIO's legacy container or a vDPA device", limit=True)


class Member(NamedTuple):
    """A process of a control group, and what it holds of what is sought: descriptors, and their device numbers.

    `held` is None where this caller could not look, which `why` explains; `uid` may be unknown then.
    """

    pid: int
    name: str
    uid: int | None
    held: dict[int, int] | None
    pins: bool = False
    start_ticks: int = 0
    why: str = ""

    def __str__(self) -> str:
        return self.name


Belongs = Callable[[bytes], bool]


def is_below(group: bytes, text: bytes) -> bool:
    """Whether a process is in a control group, or in one below it, by the text of its /proc/PID/cgroup."""
    found = re.search(rb"^0::(/.*)$", text, re.MULTILINE)
    return found is not None and (found.group(1) + b"/").startswith(group + b"/")


def find_process(subject: str, main: int, belongs: Belongs, sought: Sought) -> int | None:
    """The process of a unit that is meant: see `choose`. `main` is its main process, 0 without; None if it has none.

    Raises IommufdError. Where it cannot be looked at, the main process is taken for it: whoever works on it tells why.
    """
    if main:
        first = _look(main, sought)
        if first is None or first.held is None or (first.held and (first.pins or not sought.limit)):
            return main
        if not sought.limit and misc_rdev() is None:
            return main
    members = find_members(subject, belongs, sought)
    return choose_among(subject, members, sought, main) if members else None


def choose_among(subject: str, members: Sequence[Member], sought: Sought, main: int = 0) -> int:
    """What `choose` says of these, once they have been compared."""
    return choose(subject, main, members, _copies(members), sought)


def choose(
    subject: str, main: int, members: Sequence[Member], copies: Mapping[int, bool | None], sought: Sought
) -> int:
    """The one of a unit's processes that is meant. Raises IommufdError, which names them, where that cannot be told.

    It is the main one, if that holds what is sought, or else the only one that does. Where none does, it is the only
    one, or for a limit the main one. `copies`: of those that hold something, whether it is another one's, too, who has
    pinned memory by it; None if unknown. A process that has no more is not the one.
    """
    holders = [each for each in members if each.held and copies.get(each.pid) is not True]
    unseen = [each for each in members if each.held is None]
    if any(each.pid == main and not (sought.limit and copies.get(main, False) is None) for each in holders):
        return main
    if len(holders) == 1 and not unseen:
        return holders[0].pid
    if holders or unseen:
        found = f"{_listed(holders) or 'none that could be looked at'} hold{'s' if len(holders) < 2 else ''}"
        hidden = f" {_listed(unseen)} could not be looked at: {unseen[0].why}" if unseen else ""
        raise IommufdError(
            f"It cannot be told which process of {subject} is meant. Of its processes, {found} {sought.what}.{hidden}"
            " Give the one that is meant by pid."
        )
    if main and (sought.limit or len(members) < 2):
        return main
    if len(members) == 1:
        return members[0].pid
    raise IommufdError(
        f"None of the {len(members)} processes of {subject} holds {sought.what}: {_listed(members)}. A VMM opens one no"
        " earlier than its first VFIO device needs it. Give the one that is meant by pid."
    )


def _listed(members: Sequence[Member]) -> str:
    more = f" and {len(members) - _TOLD_MAX} more" if len(members) > _TOLD_MAX else ""
    return ", ".join(map(str, members[:_TOLD_MAX])) + more


def find_members(subject: str, belongs: Belongs, sought: Sought) -> list[Member]:
    """The processes whose control group is meant. One that ends meanwhile is left out. Raises IommufdError."""
    if not os.path.exists(_UNIFIED):
        raise HostLacks(
            f"The processes of {subject} cannot be looked through: this host has control groups of the first version,"
            " or of both. Give the one that is meant by pid or pidfile."
        )
    deadline = time.monotonic() + _SECONDS
    members = []
    for pid, text in group_texts():
        if time.monotonic() > deadline:
            raise IommufdError(
                f"The processes of {subject} could not be looked through within {_SECONDS} seconds. Give the one that"
                " is meant by pid."
            )
        if belongs(text):
            member = _look(pid, sought, belongs)
            members += [] if member is None else [member]
    return members


def group_texts() -> Iterator[tuple[int, bytes]]:
    """The processes of this host, and what the kernel says of the control group of each. Raises HostLacks."""
    if _group_of(1) is None:
        raise HostLacks(
            "/proc hides processes of others from this caller, so it cannot be told which are in a control group. Run"
            " the task as root (become: true), on the host itself."
        )
    for pid in _pids():
        text = _group_of(pid)
        if text is not None:
            yield pid, text


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _group_of(pid: int) -> bytes | None:
    """What the kernel says of the control groups of a process; None where it has ended, or is hidden."""
    with contextlib.suppress(OSError):
        return read_file(f"/proc/{pid}/cgroup")
    return None


def _look(pid: int, sought: Sought, belongs: Belongs | None = None) -> Member | None:
    """A process and what it holds; None where it has ended, or is in another control group by now."""
    try:
        with Process.hold(pid) as process:
            text = _group_of(pid)
            process.check_alive()
            if belongs is not None and not (text and belongs(text)):
                return None
            try:
                held, why = _held(process, sought), ""
            except ProcessGone:
                raise
            except IommufdError as exc:
                held, why = None, str(exc)
            # What a legacy container pins shows in VmLck alone.
            container = VFIO_CONTAINER_RDEV in (held or {}).values()
            pins = process.status.pinned_bytes > 0 or (container and process.status.locked_bytes > 0)
            return Member(pid, str(process), process.uid, held, pins, process.start_ticks, why)
    except ProcessGone:
        return None
    except IommufdError as exc:
        return Member(pid, f"process {pid}", None, None, why=str(exc))


def _held(process: Process, sought: Sought) -> dict[int, int]:
    """What a process holds of what is sought. Raises IommufdError where that could not be seen."""
    found = process.character_devices()
    rdevs = set(found.devices.values())
    wanted = iommufd_rdevs(rdevs) if rdevs else set()
    if rdevs and sought.limit:
        wanted |= {VFIO_CONTAINER_RDEV, *find_vdpa_nodes()}
    held = {}
    for fd, rdev in found.devices.items():
        # What was opened with O_PATH has no driver behind it.
        with contextlib.suppress(DescriptorGone):
            if rdev in wanted and not process.is_path_only(fd):
                held[fd] = rdev
    if found.more and not held:
        raise IommufdError(f"{process} has more than the {DESCRIPTORS_MAX} descriptors that are looked at.")
    return held


def _copies(members: Sequence[Member]) -> dict[int, bool | None]:
    """Of processes that hold something, where there are several, whether each has nothing but what VMMs have, too."""
    holders = [each for each in members if each.held]
    if len(holders) < 2:
        return {}
    sharing = compare(
        Descriptor(each.pid, fd, rdev, each.start_ticks, who_pays(each.uid or 0))
        for each in holders
        for fd, rdev in (each.held or {}).items()
    )
    return sharing.holders([Owner(each.pid, list(each.held or ()), each.pins) for each in holders], ())
