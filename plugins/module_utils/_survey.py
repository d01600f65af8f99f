# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the processes of this host that hold what memory is pinned by, and what they hold."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
import struct
import time
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ._accounting import LEGACY, VDPA
from ._borrow import IOMMUFDS_MAX, Swapped, borrow_iommufd
from ._capabilities import CAP_IPC_LOCK, IPC_LOCK, capability_names
from ._change import can_be_set, change, explain
from ._charges import Account, way_of
from ._child import ask_child, in_child
from ._errors import DescriptorGone, HostLacks, IommufdError, NotAnIommufd, ProcessGone, error_text
from ._iommufd import (
    HUGE_PAGES,
    PROCESS,
    RLIMIT_MODE,
    UNSUPPORTED,
    VFIO_CONTAINER,
    VFIO_CONTAINER_RDEV,
    Ioases,
    IommuFd,
    iommufd_rdevs,
    misc_rdev,
)
from ._process import Descriptors, Process, Status, parse_stat, parse_status, read_file
from ._process_facts import (
    Limit,
    MemoryMax,
    in_initial_user_namespace,
    number_in,
    read_arguments,
    read_memlock,
    read_memory_max,
    read_program,
    read_units,
    started_at,
)
from ._qemu import Guest, guest_name, is_session_domain, look_at_guest
from ._selinux import context_of, lets_use
from ._sharing import Descriptor, Owner, Sharing, compare
from ._tables import CONTAINERS, LARGE, TOO_MANY, TOO_MANY_HOLDERS, Budget, Tables, who_pays

__all__ = ("HeldIommufd", "Holder", "Survey", "count_queues", "survey")

# A VMM has an IOAS among its first objects, and the ids of all objects are the lowest free ones. An IOAS beyond such a
# hole takes that so many objects, of some 40 devices, were there at a time and are gone. Each id that is tried is a
# system call, a microsecond with all that Python does: for a VMM, a fifth of all else that is looked at.
_IOAS_GAP = 128

# How many IOASes of a process are told, how many of its device nodes, and how much of a name.
_IOASES_MAX = 1024
_NODES_MAX = IOMMUFDS_MAX
_NAME_MAX = 255

# What is read of a file that a command line names, in bytes.
_CONFIG_MAX = 2**16

# In seconds: how long one process may keep us, what that counts when it does, how long all of a user's processes may,
# and how long all together.
_PATIENCE = 10
_PENALTY = 20
_OF_USER = 60
_SECONDS = 300

# After so many processes, so many that hold an iommufd, or so many seconds, a child tells what it has seen.
_BATCH = 256
_HOLDERS_AT_ONCE = 16
_PULSE = 0.5

# What iommufds are open on, in the place of a device number: they may have two. And their queues, which have none.
_IOMMUFD = -1
_QUEUE = -2

# How /proc/PID/fd shows a queue of faults or events. See drivers/iommu/iommufd/eventq.c.
_NAME_OF_QUEUES = "anon_inode:[iommufd-"
# How a process is confined, as security/apparmor/procattr.c shows it. In the modes that do not end so, a profile denies
# nothing. Those that libvirt makes for its domains have `capability ipc_lock`.
_PROFILE = "/proc/{}/attr/apparmor/current"
_ENFORCED = (b" (enforce)", b" (kill)", b" (mixed)")
_OF_LIBVIRT = re.compile(rb"libvirt-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12} \(enforce\)")

# An index in a list of processes, which child and parent share.
_POSITION = struct.Struct("=q")

# As the kernel writes it. A process without memory has no such line.
_NOTHING_PINNED = b"\nVmPin:\t       0 kB\n"

_CURE = "That takes root with CAP_SYS_PTRACE (become: true) on the host itself, and kernel.yama.ptrace_scope below 3."
_LEADERLESS = "The first thread has ended while others run on, which puts the descriptors out of reach."
_TOO_MANY_IOMMUFDS = (
    f"It has more iommufds, IOASes or device nodes than are looked at, which are {IOMMUFDS_MAX} iommufds and as many"
    " nodes of a process."
)
_UNKNOWN_CONTAINER = (
    f"It has {VFIO_CONTAINER} open, which is either VFIO's legacy container or an iommufd. This caller may not open it,"
    " and so cannot tell which. It is given as a legacy container."
)
_SWAPS = "It puts other files in the place of its iommufds while they are looked at."
_KEEPS_WAITING = (
    f"It, or another process of its user, keeps whoever looks at it waiting. All of a user's may do so for {_OF_USER}"
    f" seconds, and all on a host for {_SECONDS}."
)

# Threads end one after the other when a process does, within this many seconds after it was told to.
_ENDING = 0.1
# How many threads of a process are looked at, whether they are about to end.
_THREADS_MAX = 1000
# include/linux/sched.h, in the flags of /proc/PID/task/TID/stat.
_PF_EXITING = 0x00000004


class HeldIommufd(NamedTuple):
    """An iommufd of a process. `ioases` are pairs of an id and whether that uses huge pages, None if unknown.

    `rlimit_mode` is None where it could not be read, which `msg` explains; `settable` where the caller may not know.
    `truncated`: there may well be more IOASes.
    """

    fd: int
    rlimit_mode: str | None
    settable: bool | None
    ioases: list[tuple[int, bool | None]]
    msg: str = ""
    truncated: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be mapped in it: it has no IOAS."""
        return self.rlimit_mode is not None and not self.ioases and not self.truncated


class Holder(NamedTuple):
    """A process that holds what memory is pinned by, or, with `iommufds` None, may: it does not let this caller look.

    `name`, `memory_bytes`, `memory_pluggable`, `of_devices`, `locks_memory`, `changes_user`, `session`, `updatable`,
    `viommu` and `iommufd_objects` are what its command line says, as Guest has it, and `program` the path of its
    program, None where that is unknown. Paths and names are decoded as file names are. `devices` are the device nodes
    that it has open, by descriptor: those that were asked for, and legacy containers. `more`: it has iommufds, or
    descriptors, that were not looked at. `memory_max`: as read_memory_max has it.
    """

    pid: int
    comm: str
    user: str | None
    start_ticks: int
    status: Status
    memlock: Limit
    units: tuple[str | None, str | None]
    initial: bool | None
    program: str | None
    name: str | None
    memory_bytes: int | None
    memory_pluggable: bool | None
    of_devices: int | None
    locks_memory: bool | None
    changes_user: bool
    session: bool
    devices: dict[int, int]
    iommufds: list[HeldIommufd] | None
    more: bool
    memory_max: MemoryMax | None = None
    updatable: bool = False
    viommu: str | None = None
    iommufd_objects: list[tuple[str, int | None]] | None = None

    @property
    def started(self) -> float:
        """When it started, in seconds since the epoch."""
        return started_at(self.start_ticks)

    def containers(self) -> list[int]:
        """The descriptors of its legacy containers."""
        return [fd for fd, rdev in self.devices.items() if rdev == VFIO_CONTAINER_RDEV]

    def descriptors(self) -> Iterator[Descriptor]:
        """What others may have, too."""
        payer = who_pays(self.status.uid)
        for each in self.iommufds or ():
            yield Descriptor(self.pid, each.fd, _IOMMUFD, self.start_ticks, payer)
        for fd, rdev in self.devices.items():
            yield Descriptor(self.pid, fd, rdev, self.start_ticks, payer)

    def owner(self) -> Owner:
        """What matters for whether it is a VMM, or only has what VMMs have."""
        fds = None if self.iommufds is None or self.more else [each.fd for each in self.descriptors()]
        # What a legacy container pins shows in VmLck alone.
        pins = self.status.pinned_bytes or (self.containers() and self.status.locked_bytes)
        return Owner(self.pid, fds, bool(pins))

    def may_keep(self, vfio: Container[int]) -> list[int]:
        """The descriptors behind which there may be what a user is charged for. `vfio`: the numbers of VFIO's nodes.

        An iommufd keeps its tables, and what is pinned for these, where it is kept itself. A device keeps its iommufd.
        """
        if not self.iommufds and not self.containers():
            return [fd for fd, rdev in self.devices.items() if rdev in vfio]
        return [each.fd for each in self.iommufds or () if not each.is_empty and each.rlimit_mode != PROCESS]

    def account(
        self,
        vdpa: Container[int],
        as_it_runs: Container[int] = (),
        holder: bool | None = False,
        keeps: bool = False,
    ) -> Account:
        """What matters for what it is charged; `holder` and `keeps` are Account's.

        `vdpa` are the numbers of vDPA devices, and `as_it_runs` those of VFIO's nodes of devices that pin as they run,
        or may. Memory is pinned through an IOAS, so iommufds with one decide.
        """
        ways = None
        if self.iommufds is not None:
            used = [each for each in self.iommufds if each.ioases or each.rlimit_mode is None] or self.iommufds
            # One that was not looked at may have any mode.
            ways = {way_of(each.rlimit_mode) for each in used} | ({None} if self.more else set())
            ways.update([LEGACY] if self.containers() else [])
            ways.update(VDPA for rdev in self.devices.values() if rdev in vdpa)
        return Account(
            pid=self.pid,
            uid=self.status.uid,
            ways=None if ways is None else frozenset(ways),
            ipc_lock=CAP_IPC_LOCK in capability_names(self.status.effective),
            initial=self.initial,
            pinned=self.status.pinned_bytes,
            locked=self.status.locked_bytes,
            limit=self.memlock.soft,
            holder=holder,
            locks=self.locks_memory,
            changed_user=self.changes_user,
            as_it_runs=self._pins_as_it_runs(vdpa, as_it_runs),
            idle=self._is_idle(),
            keeps=keeps,
        )

    def _is_idle(self) -> bool:
        empty = all(each.is_empty for each in self.iommufds or ())
        return bool(self.iommufds) and empty and not (self.devices or self.more or self.status.pinned_bytes)

    def _pins_as_it_runs(self, vdpa: Container[int], as_it_runs: Container[int]) -> bool:
        """Whether it may pin more as it runs. Where a device has all memory pinned, no other one pins more of it."""
        nodes = [rdev for rdev in self.devices.values() if rdev != VFIO_CONTAINER_RDEV and rdev not in vdpa]
        runs = [rdev in as_it_runs for rdev in nodes]
        spaces = len(self.containers()) + sum(len(each.ioases) for each in self.iommufds or ())
        return any(runs) and (all(runs) or self.more or spaces != 1)

    def to_json(self) -> list[Any]:
        """What `from_json` takes. JSON has neither named tuples nor numbers as keys."""
        return [*self, list(self.devices.items())]

    @classmethod
    def from_json(cls, given: list[Any]) -> Holder:
        """What `to_json` has made, in a child of this caller's own."""
        *values, devices = given
        row = cls(*values)
        iommufds = row.iommufds
        if iommufds is not None:
            held = [HeldIommufd(*each) for each in iommufds]
            iommufds = [each._replace(ioases=[(pair[0], pair[1]) for pair in each.ioases]) for each in held]
        objects = row.iommufd_objects
        return row._replace(
            status=Status(*row.status),
            iommufd_objects=None if objects is None else [(each[0], each[1]) for each in objects],
            memlock=Limit(*row.memlock),
            units=(row.units[0], row.units[1]),
            memory_max=row.memory_max and MemoryMax(Limit(*row.memory_max[0]), row.memory_max[1]),
            devices=dict(devices),
            iommufds=iommufds,
        )


Reasons = dict[str, list[int]]


@dataclass
class Survey:
    """What was seen. `others_pinned`: by user, what processes have pinned of which no such thing was looked at.

    `unseen`: the users of such processes that may hold some all the same. The rest is what was not seen, each a reason
    and the processes: `hidden` as a whole, `closed` their descriptors, or some of them, and `refused` their iommufds.
    `leaderless` are those whose first thread has ended, until it is known whether the others will too, and `large`
    those that wait for the end, with the sizes of their tables. `blind`: this caller is kept from some processes.
    `sharing`: which of what they hold is the same.
    """

    holders: list[Holder] = field(default_factory=list)
    others_pinned: dict[int, int] = field(default_factory=dict)
    unseen: set[int] = field(default_factory=set)
    hidden: Reasons = field(default_factory=dict)
    closed: Reasons = field(default_factory=dict)
    refused: Reasons = field(default_factory=dict)
    leaderless: list[int] = field(default_factory=list)
    large: list[tuple[int, int]] = field(default_factory=list)
    blind: bool = False
    sharing: Sharing = field(default_factory=Sharing)

    def only_holders(self) -> dict[int, bool | None]:
        """Of each process, whether it is no VMM but holds what VMMs have, such as a launcher; None if unknown.

        Others may have the same who were not seen: the user's own, root's, or anybody's where this caller is `blind`.
        """
        lost = {each.status.uid for each in self.holders if each.pid in self.sharing.unknown}
        unseen = self.unseen | lost
        doubtful = {each.pid for each in self.holders if self.blind or self.hidden or unseen & {each.status.uid, 0}}
        return self.sharing.holders([each.owner() for each in self.holders], doubtful)

    def keepers(self, vfio: Container[int], only_holders: Mapping[int, bool | None]) -> set[int]:
        """Those that may keep what a VM that has ended had pinned, which stays charged to the user who mapped it.

        They hold what no VM that runs accounts for. `vfio`: the numbers of VFIO's nodes. `only_holders`: what that has
        answered, since another process has all that a mere holder has.
        """
        rows = {each.pid: each for each in self.holders}

        def is_in_use(holder: Holder, fd: int) -> bool:
            others = self.sharing.shared_with(holder.pid, fd)
            # A VM that starts has pinned nothing yet, as has one whose devices pin as it runs.
            its_own = others == [] and holder.memory_bytes is not None and self._spaces_of(holder) < 2
            # Nor has one that a process was to take over, which has ended with the charge.
            its_own = its_own and not holder.updatable
            return its_own or any(self._accounts_for_all(rows[each]) for each in (holder.pid, *(others or ())))

        candidates = [each for each in self.holders if only_holders[each.pid] is not True]
        return {each.pid for each in candidates if not all(is_in_use(each, fd) for fd in each.may_keep(vfio))}

    def count_iommufds(self) -> int:
        """How many iommufds were seen, at least."""
        all_ = (each for holder in self.holders for each in holder.descriptors())
        return self.sharing.count(each for each in all_ if each.kind == _IOMMUFD)

    def _spaces_of(self, holder: Holder) -> int:
        """How many different iommufds a process has in which there is something, each with a space that it may pin in.

        Without an IOMMU in its guest, QEMU pins in every one of its spaces. One that it does not may be another's.
        """
        used = [each for each in holder.iommufds or () if not each.is_empty]
        different = [each for each in used if self.sharing.same_as(holder.pid, each.fd) is None]
        spaces = sum(len(each.ioases) for each in different) if holder.viommu == "none" else 0
        return max(len(different), spaces)

    def _accounts_for_all(self, holder: Holder) -> bool:
        """Whether it has pinned what there may be behind all of them. It may have been given one beside its own."""
        pinned, count, memory = holder.status.pinned_bytes, self._spaces_of(holder), holder.memory_bytes or 0
        # After a live update that has failed, it may have pinned some of it anew.
        least = count * memory if count > 1 else memory // 2 if holder.updatable else 0
        return pinned > 0 and pinned >= least

    def to_json(self) -> list[Any]:
        """What `add` takes."""
        holders = [each.to_json() for each in self.holders]
        pinned = list(self.others_pinned.items())
        unseen = list(self.unseen)
        reasons = [self.hidden, self.closed, self.refused]
        return [holders, pinned, unseen, *reasons, self.leaderless, self.large, self.blind]

    def add(self, given: list[Any]) -> None:
        """Adds what another survey came to, which a child of this caller's own has made."""
        holders, pinned, unseen, hidden, closed, refused, leaderless, large, blind = given
        self.blind = self.blind or blind
        self.holders += [Holder.from_json(each) for each in holders]
        for uid, size in pinned:
            self.others_pinned[uid] = self.others_pinned.get(uid, 0) + size
        for mine, others in ((self.hidden, hidden), (self.closed, closed), (self.refused, refused)):
            for reason, pids in others.items():
                mine.setdefault(reason, []).extend(pids)
        self.unseen.update(unseen)
        self.leaderless += leaderless
        self.large.extend((size, pid) for size, pid in large)


def survey(nodes: Collection[int] = ()) -> Survey:
    """Looks at all processes in /proc. One that ends meanwhile is left out. Raises HostLacks.

    `nodes` are the numbers of the devices of VFIO and vDPA, of which it is told who has them open.
    """
    result = Survey()
    if misc_rdev() is None and not nodes and not _may_have_containers():
        # Nobody can hold anything.
        return result
    look = partial(_look_at_all, result, Budget(), nodes, time.monotonic() + _SECONDS)
    # What containers have comes last, and large tables of descriptors after all others: nobody is to keep others from
    # being seen.
    look(sorted(_pids(), key=_is_of_container), is_last=False)
    if result.large:
        look([pid for _size, pid in sorted(result.large, key=lambda each: (_is_of_container(each[1]), each))], True)
    _add_leaderless(result)
    result.holders.sort(key=lambda holder: holder.pid)
    result.sharing = compare(descriptor for holder in result.holders for descriptor in holder.descriptors())
    return result


def count_queues(holders: Iterable[Holder]) -> int:
    """How many queues of iommufds they have, or of some of them where they have descriptors without end."""
    found = list(_queues(holders, time.monotonic() + _PATIENCE))
    return compare(found).count(found)


def _queues(holders: Iterable[Holder], deadline: float) -> Iterator[Descriptor]:
    for holder in holders:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{holder.pid}/fd") as entries:
            for each in entries:
                if time.monotonic() > deadline:
                    return
                with contextlib.suppress(OSError):
                    if os.readlink(each.path).startswith(_NAME_OF_QUEUES):
                        payer = who_pays(holder.status.uid)
                        yield Descriptor(holder.pid, int(each.name), _QUEUE, holder.start_ticks, payer)


def _may_have_containers() -> bool:
    """Whether this kernel has VFIO's containers, which takes sysfs to rule out."""
    return os.path.exists("/sys/class/misc/vfio") or not os.path.isdir("/sys/class/misc")


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _is_of_container(pid: int) -> bool:
    return who_pays(find_owner(pid)) == CONTAINERS


def find_owner(pid: int) -> int:
    """The user that a process seems to be of, root where it has ended. It is soon told, for all processes of a host."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return 0


def find_charged(pid: int) -> int:
    """The user whom a process is charged to, root where it has ended. The status alone keeps nobody waiting.

    Its folder is the effective user's: a process that executes a set-user-id program would have root pay for it.
    """
    with contextlib.suppress(OSError):
        return max(0, number_in(_status_text(pid) or b"", b"Uid"))
    return 0


def _look_at_all(
    result: Survey, budget: Budget, nodes: Collection[int], deadline: float, pids: list[int], is_last: bool
) -> None:
    """Looks at processes in children, which nobody waits for where they hang. Nearly always one does for all.

    Any user can have a look at a process of theirs last for ever: by a descriptor on a FUSE mount that is closed while
    the process executes a program (the kernel holds exec_update_lock meanwhile, see begin_new_exec() in fs/exec.c), or
    that is put in the place of an iommufd.
    """
    # Where the child is, which it cannot tell any more once it hangs.
    position = mmap.mmap(-1, _POSITION.size)
    while pids:
        done, hangs = 0, False
        _POSITION.pack_into(position, 0, 0)
        work = partial(_batches, pids, budget, nodes, position, is_last)
        try:
            with contextlib.closing(ask_child(None, work, _PATIENCE)) as said:
                for answer in said:
                    done, seen, spent = answer
                    result.add(seen)
                    budget.load(spent)
                    if time.monotonic() > deadline:
                        break
        except HostLacks:
            # It is nobody's fault who is looked at.
            raise
        except IommufdError:
            hangs = True
        if time.monotonic() > deadline:
            for pid in pids[done:]:
                _leave_out(result, pid)
            return
        stop = max(done, _POSITION.unpack_from(position)[0])
        # One that has ended without a word would else be followed by others that do the same.
        if (hangs or not done) and stop < len(pids):
            _skip(result, pids[stop], budget)
            pids = pids[done:stop] + pids[stop + 1 :]
        else:
            pids = pids[done:]


def _skip(result: Survey, pid: int, budget: Budget) -> None:
    """Leaves a process out that has kept a child waiting, and has its user pay for it."""
    _leave_out(result, pid)
    budget.seconds[who_pays(find_charged(pid))] += _PENALTY


def _leave_out(result: Survey, pid: int) -> None:
    result.closed.setdefault(_KEEPS_WAITING, []).append(pid)
    result.unseen.add(find_charged(pid))


def _batches(
    pids: list[int], budget: Budget, nodes: Collection[int], position: mmap.mmap, is_last: bool
) -> Iterator[list[Any]]:
    """The life of a child: how many of the processes it has looked at, what was seen since, and who has spent what.

    It ends where something else than an iommufd was shared with it, which may take for ever to close.
    """
    look = _Look(budget, nodes, is_last)
    pulse = time.monotonic() + _PULSE
    for index, pid in enumerate(pids):
        _POSITION.pack_into(position, 0, index)
        look.at(pid)
        if look.swapped:
            yield [index + 1, look.taken(), look.spent()]
            return
        if look.is_full() or index % _BATCH == _BATCH - 1 or time.monotonic() > pulse:
            yield [index + 1, look.taken(), look.spent()]
            pulse = time.monotonic() + _PULSE
    yield [len(pids), look.taken(), look.spent()]


class _Look:
    """A look at one process after the other. `is_last`: large tables do not wait any more.

    `swapped`: a process has put something else in the place of its iommufd, and that is open here now.
    """

    def __init__(self, budget: Budget, nodes: Collection[int], is_last: bool) -> None:
        self._budget = budget
        self._nodes = nodes
        self._is_last = is_last
        misc = misc_rdev()
        self._iommufds = set() if misc is None else {misc}
        self._tables = Tables({*self._iommufds, VFIO_CONTAINER_RDEV, *nodes}, budget)
        self._container_asked = False
        self._seen = Survey()
        # Who has paid since the last time. Root in a container may be 65536 users, and an answer has an end.
        self._payers: set[int] = set()
        self.swapped = False

    def spent(self) -> list[Any]:
        """What those have spent so far who have paid since the last time, good for JSON."""
        payers, self._payers = self._payers, set()
        return self._budget.to_json(payers)

    def taken(self) -> list[Any]:
        """What was seen since the last time, good for JSON."""
        seen, self._seen = self._seen, Survey()
        return seen.to_json()

    def is_full(self) -> bool:
        """Whether that is as much as should be told at once: an answer has an end, and each iommufd may have a text."""
        holders = self._seen.holders
        iommufds = sum(len(each.iommufds or ()) for each in holders)
        return len(holders) >= _HOLDERS_AT_ONCE or iommufds >= IOMMUFDS_MAX

    def at(self, pid: int) -> None:
        """Looks at a process."""
        began = time.monotonic()
        try:
            text = _status_text(pid)
        except PermissionError as exc:
            self._seen.hidden.setdefault(_reason(exc), []).append(pid)
            return
        if text is None:
            return
        payer = who_pays(number_in(text, b"Uid"))
        self._payers.add(payer)
        size = number_in(text, b"FDSize")
        if size > LARGE and not self._is_last:
            self._seen.large.append((size, pid))
        elif self._budget.seconds[payer] >= _OF_USER:
            self._seen.closed.setdefault(_KEEPS_WAITING, []).append(pid)
            self._add_unseen(pid, text)
        else:
            self._look(pid, payer, size, text)
        self._budget.seconds[payer] += time.monotonic() - began

    def _look(self, pid: int, payer: int, size: int, text: bytes) -> None:
        seen = self._seen
        try:
            found = self._tables.look(pid, payer, size)
        except PermissionError as exc:
            if _add_closed(seen, pid, text, _reason(exc)):
                self._add(pid, payer, None, more=False)
            return
        except (FileNotFoundError, ProcessLookupError):
            return
        if found.more:
            seen.closed.setdefault(TOO_MANY, []).append(pid)
        if not found.devices:
            if found.more:
                seen.unseen.add(number_in(text, b"Uid"))
            _add_other(seen, pid, text)
        elif not self._budget.may_hold(payer):
            seen.refused.setdefault(TOO_MANY_HOLDERS, []).append(pid)
            self._add_unseen(pid, text)
        else:
            self._add(pid, payer, found, more=found.more)

    def _add_unseen(self, pid: int, text: bytes) -> None:
        self._seen.unseen.add(number_in(text, b"Uid"))
        _add_other(self._seen, pid, text)

    def _rdevs(self, devices: dict[int, int]) -> set[int]:
        """The numbers that an iommufd has. /dev/vfio/vfio is asked what it is only where somebody has it open.

        Else it is the legacy container.
        """
        if VFIO_CONTAINER_RDEV in devices.values() and not self._container_asked:
            self._container_asked = True
            self._iommufds |= iommufd_rdevs({VFIO_CONTAINER_RDEV})
        return self._iommufds

    def _add(self, pid: int, payer: int, found: Descriptors | None, more: bool) -> None:
        """Adds the process if it holds anything still, or does not let this caller look."""
        seen = self._seen
        try:
            with Process.hold(pid) as process:
                if found is None:
                    seen.holders.append(_holder(process, {}, None, more))
                    return
                rdevs = self._rdevs(found.devices)
                fds = [fd for fd, rdev in found.devices.items() if rdev in rdevs]
                held, refused, self.swapped = _held_iommufds(process, fds[:IOMMUFDS_MAX], rdevs)
                nodes = [fd for fd, rdev in found.devices.items() if rdev not in rdevs]
                devices = _open_nodes(process, found.devices, nodes[:_NODES_MAX])
                if held or devices:
                    told = _cut(held, self._budget.ioases_left(payer))
                    many = len(fds) > IOMMUFDS_MAX or len(nodes) > _NODES_MAX or told != held
                    refused = refused or (_TOO_MANY_IOMMUFDS if many else "")
                    seen.holders.append(_holder(process, devices, told, more or many or self.swapped))
                    self._budget.hold(payer, len(told) + len(devices), sum(len(each.ioases) for each in told))
                if VFIO_CONTAINER_RDEV in devices.values() and not os.access(VFIO_CONTAINER, os.R_OK | os.W_OK):
                    refused = refused or _UNKNOWN_CONTAINER
                if refused:
                    seen.refused.setdefault(refused, []).append(pid)
                if not (held or devices) and refused:
                    seen.unseen.add(process.uid)
                if not (held or devices):
                    _add_other(seen, pid)
        except ProcessGone:
            pass
        except IommufdError as exc:
            if _is_leaderless(pid):
                # Without its first thread it shows no iommufd either.
                _add_other(seen, pid)
            else:
                seen.hidden.setdefault(_reason(exc), []).append(pid)


def _is_leaderless(pid: int) -> bool:
    with contextlib.suppress(OSError, IommufdError):
        status = _status(pid)
        return status is not None and status.leaderless
    return False


def _open_nodes(process: Process, devices: dict[int, int], fds: list[int]) -> dict[int, int]:
    """Those of the descriptors that it has still: they were seen before it was held, and may have been another one's.

    What was opened with O_PATH has no driver behind it, and is left out.
    """
    found: dict[int, int] = {}
    for fd in fds:
        with contextlib.suppress(DescriptorGone):
            if process.character_device(fd) == devices[fd] and not process.is_path_only(fd):
                found[fd] = devices[fd]
    return found


def _held_iommufds(process: Process, fds: list[int], rdevs: set[int]) -> tuple[list[HeldIommufd], str, bool]:
    """Its iommufds, why one could not be shared, and whether it has put something else in the place of one."""
    found: list[HeldIommufd] = []
    refused = ""
    for fd in fds:
        try:
            with borrow_iommufd(process, fd, rdevs) as iommufd:
                held = _ask_iommufd(iommufd, fd, f"iommufd {fd} of {process}")
        except Swapped:
            return found, _SWAPS, True
        except (DescriptorGone, NotAnIommufd):
            continue
        except ProcessGone:
            raise
        except IommufdError as exc:
            held = HeldIommufd(fd, None, None, [], str(exc))
            refused = _reason(exc)
        found.append(held)
    return found, refused, False


def _cut(held: list[HeldIommufd], left: int) -> list[HeldIommufd]:
    """The iommufds with no more IOASes than may be told."""
    left = min(left, _IOASES_MAX)
    found = []
    for each in held:
        found.append(each._replace(ioases=each.ioases[:left], truncated=each.truncated or len(each.ioases) > left))
        left -= len(found[-1].ioases)
    return found


def _ask_iommufd(iommufd: IommuFd, fd: int, subject: str) -> HeldIommufd:
    result = change(iommufd, RLIMIT_MODE, None)
    # A kernel without the option charges the user.
    number = 0 if result.outcome == UNSUPPORTED else result.before
    mode = None if number is None else str(RLIMIT_MODE.value(number))
    settable = can_be_set(iommufd.probe(RLIMIT_MODE))
    # What can be set holds no object, and so no IOAS.
    ids, truncated, _errno = Ioases([], False) if settable else iommufd.ioases(_IOAS_GAP)
    pages = [iommufd.get(HUGE_PAGES, each) for each in ids]
    ioases = [(ioas_id, None if each.errno else bool(each.value)) for ioas_id, each in zip(ids, pages)]
    return HeldIommufd(fd, mode, settable, ioases, explain(result, subject, RLIMIT_MODE, None), truncated)


def _holder(process: Process, devices: dict[int, int], iommufds: list[HeldIommufd] | None, more: bool) -> Holder:
    # What the process may have changed at will, and to any length: it is not kept.
    program = read_program(process)
    arguments, whole = read_arguments(process)
    name = guest_name(arguments)
    guest = Guest()
    # What comes last may decide.
    if whole:
        guest = look_at_guest(program or b"".join(arguments[:1]), arguments, partial(_read_config, process))
    status, initial = _what_counts(process)
    return Holder(
        pid=process.pid,
        comm=process.comm,
        user=process.user,
        start_ticks=process.start_ticks,
        status=status,
        memlock=read_memlock(process),
        units=read_units(process),
        initial=initial,
        program=None if program is None else os.fsdecode(program),
        name=None if name is None else _shortened(os.fsdecode(name)),
        memory_bytes=guest.memory,
        memory_pluggable=guest.pluggable,
        of_devices=guest.of_devices,
        locks_memory=guest.locks,
        changes_user=guest.changes_user,
        session=is_session_domain(arguments),
        devices=devices,
        iommufds=iommufds,
        more=more,
        memory_max=read_memory_max(process),
        updatable=guest.updatable,
        viommu=guest.viommu,
        iommufd_objects=None if guest.iommufds is None else [(os.fsdecode(name), fd) for name, fd in guest.iommufds],
    )


def _what_counts(process: Process) -> tuple[Status, bool | None]:
    """Its status, without CAP_IPC_LOCK in effect where SELinux denies its use; and whether what it has counts.

    That is whether it is in the initial user namespace, None where this is not known, or what SELinux or AppArmor says
    is not.
    """
    status, initial = process.status, in_initial_user_namespace(process)
    others = status.effective & ~IPC_LOCK
    if others != status.effective:
        allowed = lets_use(CAP_IPC_LOCK, partial(context_of, process.pid)).allowed
        confined = _may_lack_by_apparmor(process.pid)
        # It may be another's pid by now.
        process.check_alive()
        if allowed is False:
            return status._replace(effective=others), initial
        if allowed is None or confined:
            return status, None
    return status, initial


def _may_lack_by_apparmor(pid: int) -> bool:
    """Whether a profile of AppArmor may deny a process the use of CAP_IPC_LOCK, which the kernel tells nobody."""
    try:
        with open(_PROFILE.format(pid), "rb") as stream:
            profile = stream.read().rstrip(b"\0\n")
    except OSError:
        # There is no AppArmor, or one before Linux 5.8, or the process has ended.
        return False
    return profile.endswith(_ENFORCED) and not _OF_LIBVIRT.fullmatch(profile)


def _read_config(process: Process, path: bytes) -> bytes | None:
    """A file that a process names, if the path means the same here, and nobody but root decides what is there.

    Anybody may name a file that root is not to open, or that never ends, or that others miss once it was read.
    """
    # Hardly anybody names one, and a module pays for each import on each host anew.
    from ._paths import is_made_up, reopen, walk

    with contextlib.suppress(OSError, IommufdError):
        there = [os.readlink(f"/proc/{process.pid}/{each}") for each in ("root", "ns/mnt")]
        if there == ["/", os.readlink("/proc/self/ns/mnt")] and os.readlink("/proc/self/root") == "/":
            with walk(os.fsdecode(path), follow=True, program=True) as place:
                if place.found is None or place.status is None or not stat.S_ISREG(place.status.st_mode):
                    return None
                if not is_made_up(place.found):
                    fd = reopen(place.found)
                    try:
                        text = os.read(fd, _CONFIG_MAX + 1)
                    finally:
                        os.close(fd)
                    return text if len(text) <= _CONFIG_MAX else None
    return None


def _shortened(name: str) -> str:
    """A name that is no longer than any that a file may have, as libvirt's domains have files."""
    return name if len(name) <= _NAME_MAX else f"{name[:_NAME_MAX]}..."


def _add_other(result: Survey, pid: int, text: bytes | None = None) -> None:
    """Counts what a process has pinned that holds nothing of this. `text` is what was said of it, if it was asked."""
    try:
        text = text or _status_text(pid)
        # So it is with nearly all processes of a host, and to take the whole text apart costs as much as to read it.
        status = None if text is None or _NOTHING_PINNED in text else parse_status(text)
    except (PermissionError, IommufdError) as exc:
        result.hidden.setdefault(_reason(exc), []).append(pid)
        return
    if status and status.leaderless:
        result.leaderless.append(pid)
    if status and status.pinned_bytes:
        result.others_pinned[status.uid] = result.others_pinned.get(status.uid, 0) + status.pinned_bytes


def _add_closed(result: Survey, pid: int, text: bytes, error: str) -> bool:
    """Counts a process whose descriptors this caller may not look at; True where it has pinned memory."""
    try:
        status = parse_status(text)
    except IommufdError as exc:
        result.hidden.setdefault(str(exc), []).append(pid)
        return False
    if status.leaderless:
        result.leaderless.append(pid)
    # Kernel threads, and what is about to end, have no descriptors.
    if not status.has_memory:
        return False
    result.closed.setdefault(error, []).append(pid)
    result.blind = True
    return bool(status.pinned_bytes)


def _add_leaderless(result: Survey) -> None:
    """Counts those whose first thread has ended while others run on. One that ends as a whole looks so for a moment."""
    if not result.leaderless:
        return
    time.sleep(_ENDING)
    pids = result.leaderless
    try:
        lingering = in_child(None, lambda: [(pid, *found) for pid in pids if (found := _lingers(pid))], _PATIENCE)
    except IommufdError as exc:
        # One that keeps us waiting is not known to end, and nothing is known of what the others have pinned.
        result.hidden.setdefault(str(exc), []).extend(pids)
        return
    for pid, uid, pinned in lingering:
        result.closed.setdefault(_LEADERLESS, []).append(pid)
        result.unseen.add(uid)
        if pinned:
            result.others_pinned[uid] = result.others_pinned.get(uid, 0) + pinned


def _lingers(pid: int) -> tuple[int, int] | None:
    """The user of a process, and what it has pinned, by a thread that is not about to end; None without one."""
    folder = f"/proc/{pid}/task"
    with contextlib.suppress(OSError):
        for thread in os.listdir(folder)[:_THREADS_MAX]:
            with contextlib.suppress(OSError):
                if not parse_stat(read_file(f"{folder}/{thread}/stat")).flags & _PF_EXITING:
                    status = parse_status(read_file(f"{folder}/{thread}/status"))
                    return status.uid, status.pinned_bytes
    return None


def _status(pid: int) -> Status | None:
    """What is said of a process that is not held; None where it has ended. Raises PermissionError."""
    text = _status_text(pid)
    return None if text is None else parse_status(text)


def _status_text(pid: int) -> bytes | None:
    try:
        return read_file(f"/proc/{pid}/status", in_one=True)
    except (FileNotFoundError, ProcessLookupError):
        return None


def _reason(exc: Exception) -> str:
    """The kernel's word where there is one, which is the same for many processes, and the way out."""
    cause = exc if isinstance(exc, OSError) else exc.__cause__
    return f"{error_text(cause.errno)}. {_CURE}" if isinstance(cause, OSError) else str(exc)
