# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import json
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _child, _iommufd, _survey, _tables
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import IOMMUFD_USER, LEGACY, VDPA
from ansible_collections.virt.iommufd.plugins.module_utils._borrow import IOMMUFDS_MAX, Swapped
from ansible_collections.virt.iommufd.plugins.module_utils._capabilities import IPC_LOCK
from ansible_collections.virt.iommufd.plugins.module_utils._child import Interrupted, NoAnswer
from ansible_collections.virt.iommufd.plugins.module_utils._errors import (
    AccessRefused,
    DescriptorGone,
    HostLacks,
    IommufdError,
    ProcessGone,
)
from ansible_collections.virt.iommufd.plugins.module_utils._process import Descriptors, Process, parse_stat, read_file
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Arguments
from ansible_collections.virt.iommufd.plugins.module_utils._selinux import Verdict
from ansible_collections.virt.iommufd.plugins.module_utils._sharing import Descriptor, Owner, Sharing
from ansible_collections.virt.iommufd.plugins.module_utils._survey import HeldIommufd, Holder, survey
from ansible_collections.virt.iommufd.plugins.module_utils._tables import LARGE, TOO_MANY_HOLDERS, Budget, Tables
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel

STATUS = b"Name:\tvm\nUid:\t7\t7\t7\t7\nVmSize:\t9 kB\nVmPin:\t%d kB\nCapPrm:\t0\nCapEff:\t4000\nCapBnd:\t0\n"

LEADERLESS = STATUS.replace(b"\nUid", b"\nState:\tZ (zombie)\nThreads:\t2\nUid") % 0


def refuse(exception: Exception) -> Callable[..., Any]:
    def call(*_arguments: object) -> Any:
        raise exception

    return call


def test_a_process_with_an_iommufd(alone: FakeKernel, child: subprocess.Popen[bytes]) -> None:
    alone.ioases = {2: 1, 3: 0}
    (holder,) = survey().holders
    assert holder.pid == child.pid
    # 51 is the same device, opened with O_PATH.
    assert holder.iommufds == [HeldIommufd(50, "user", False, [(2, True), (3, False)])]
    assert holder.devices == {}
    account = holder.account(())
    assert (account.pid, account.uid, account.ways) == (child.pid, os.getuid(), frozenset({IOMMUFD_USER}))
    assert alone.mode == 0


ZERO = os.stat("/dev/zero").st_rdev


def test_a_process_with_other_devices(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the two on /dev/zero, 55 was opened with O_PATH.
    (holder,) = survey({ZERO}).holders
    assert holder.devices == {54: ZERO}
    assert holder.account(()).ways == frozenset({IOMMUFD_USER})
    assert holder.account({ZERO}).ways == frozenset({IOMMUFD_USER, VDPA})
    assert holder.containers() == []
    monkeypatch.setattr(_survey, "misc_rdev", lambda: None)
    (holder,) = survey({ZERO}).holders
    assert (holder.iommufds, holder.devices) == ([], {54: ZERO})
    assert holder.account(()).ways == frozenset()
    assert holder.account({ZERO}).ways == frozenset({VDPA})


@pytest.mark.parametrize("may_open", [True, False])
def test_a_process_with_a_legacy_container_alone(
    alone: FakeKernel, monkeypatch: pytest.MonkeyPatch, may_open: bool
) -> None:
    for module in (_survey, _iommufd):
        monkeypatch.setattr(module, "VFIO_CONTAINER_RDEV", ZERO)
        # It answers as the legacy container does.
        monkeypatch.setattr(module, "VFIO_CONTAINER", "/dev/zero" if may_open else "/nowhere")
    monkeypatch.setattr(_survey, "misc_rdev", lambda: None)
    monkeypatch.setattr(_survey, "_may_have_containers", lambda: True)
    alone.without = errno.EINVAL
    result = survey()
    (holder,) = result.holders
    assert (holder.iommufds, holder.containers()) == ([], [54])
    assert holder.account(()).ways == frozenset({LEGACY})
    assert list(result.refused) == ([] if may_open else [_survey._UNKNOWN_CONTAINER])


def test_what_may_be_shared(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Descriptor] = []

    def compare(descriptors: Iterator[Descriptor]) -> Sharing:
        seen.extend(descriptors)
        return Sharing([], [seen[0].pid])

    monkeypatch.setattr(_survey, "compare", compare)
    result = survey({ZERO})
    (holder,) = result.holders
    assert [(each.pid, each.fd, each.kind) for each in seen] == [(holder.pid, 50, -1), (holder.pid, 54, ZERO)]
    assert {each.start_ticks for each in seen} == {holder.start_ticks}
    assert result.only_holders() == {holder.pid: None}


PINNED = {"pinned_bytes": 4096, "locked_bytes": 0}
LOCKED = {"pinned_bytes": 0, "locked_bytes": 4096}
CONTAINER = _iommufd.VFIO_CONTAINER_RDEV


@pytest.mark.parametrize(
    ("status", "fields", "fds", "pins"),
    [
        ({}, {}, [50], False),
        (PINNED, {}, [50], True),
        # It may have locked memory by other means.
        (LOCKED, {}, [50], False),
        (LOCKED, {"devices": {7: CONTAINER, 8: 1}}, [50, 7, 8], True),
        ({}, {"more": True}, None, False),
        (PINNED, {"iommufds": None}, None, True),
    ],
)
def test_who_may_only_hold_what_others_have(
    alone: FakeKernel, status: dict[str, Any], fields: dict[str, Any], fds: list[int] | None, pins: bool
) -> None:
    (holder,) = survey().holders
    changed = holder._replace(status=holder.status._replace(**status), **fields)
    assert changed.owner() == Owner(holder.pid, fds, pins)


@pytest.mark.parametrize(
    ("fields", "only"),
    [
        ({}, False),
        ({"unseen": {os.getuid()}}, None),
        ({"unseen": {0}}, None),
        ({"unseen": {4711}}, False),
        ({"hidden": {"It is hidden.": [1]}}, None),
        ({"blind": True}, None),
    ],
)
def test_who_is_doubtful(alone: FakeKernel, fields: dict[str, Any], only: bool | None) -> None:
    result = survey()
    vars(result).update(fields)
    assert list(result.only_holders().values()) == [only]


def test_more_devices_than_are_looked_at(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "_NODES_MAX", 0)
    result = survey({ZERO})
    assert (result.holders[0].devices, result.holders[0].more) == ({}, True)
    assert list(result.refused) == [_survey._TOO_MANY_IOMMUFDS]


def test_one_without_objects_can_be_set(alone: FakeKernel) -> None:
    (holder,) = survey().holders
    assert holder.iommufds == [HeldIommufd(50, "user", True, [])]
    alone.privileged = False
    (holder,) = survey().holders
    assert holder.iommufds == [HeldIommufd(50, "user", None, [])]


@pytest.mark.parametrize(
    ("ids", "found", "truncated"),
    [
        # Of 50, all but the first and the last were destroyed.
        ([1, 50], 2, False),
        ([1, 129], 2, False),
        # More than 127 objects, all at the same time, that are gone.
        ([1, 130], 1, False),
        ([300], 1, False),
        ([*range(100, 600, 100)], 5, False),
        ([*range(100, 601, 100)], 6, True),
        ([1, 120, 240, 360, 480, 513], 6, True),
    ],
)
def test_ioases_with_ids_far_apart(alone: FakeKernel, ids: list[int], found: int, truncated: bool) -> None:
    alone.ioases = dict.fromkeys(ids, 1)
    (holder,) = survey().holders
    assert holder.iommufds == [HeldIommufd(50, "user", False, [(each, True) for each in ids[:found]], "", truncated)]


def test_how_many_ids_are_tried(alone: FakeKernel) -> None:
    """Each is a system call, for each VMM of a host."""
    alone.ioases = {2: 1}
    survey()
    assert len(alone.calls) < 256 + 10
    alone.calls.clear()
    alone.ioases = {}
    survey()
    # It could be set, so it holds no object.
    assert len(alone.calls) < 10


def test_a_kernel_without_the_option_charges_the_user(alone: FakeKernel) -> None:
    alone.without = errno.EOPNOTSUPP
    (holder,) = survey().holders
    assert holder.iommufds is not None
    assert holder.iommufds[0].rlimit_mode == "user"
    assert "this kernel does not have the option rlimit_mode" in holder.iommufds[0].msg


def test_an_iommufd_that_does_not_answer(alone: FakeKernel) -> None:
    alone.without = errno.EIO
    (holder,) = survey().holders
    assert holder.iommufds is not None
    assert holder.iommufds[0].rlimit_mode is None
    assert "EIO" in holder.iommufds[0].msg
    assert holder.account(()).ways == frozenset({None})


def test_an_iommufd_with_an_ioas_decides(alone: FakeKernel) -> None:
    (holder,) = survey().holders
    empty, used = HeldIommufd(3, "process", True, []), HeldIommufd(4, "user", False, [(2, True)])
    both = holder._replace(iommufds=[empty, used])
    assert both.account(()).ways == frozenset({IOMMUFD_USER})
    neither = holder._replace(iommufds=None)
    assert neither.account(()).ways is None


KEPT, PER_PROCESS = HeldIommufd(4, "user", False, [(2, True)]), HeldIommufd(4, "process", False, [(2, True)])
EMPTY = HeldIommufd(4, "user", True, [])
TWO_SPACES: dict[str, Any] = {"iommufds": [KEPT._replace(ioases=[(2, True), (3, True)])], "viommu": "none"}
VFIO, OTHER = 4712, 4713
# A VM of 64 MiB, which has pinned that
RUNS: dict[str, Any] = {"pinned_bytes": 2**26, "memory_bytes": 2**26}


def holders_of(holder: Holder, *rows: dict[str, Any]) -> list[Holder]:
    """Processes by what is other than in one that keeps an iommufd and a device; each has the next id."""
    found = []
    for pid, row in enumerate(rows, 1):
        fields = {"pinned_bytes": 0, "memory_bytes": None, "iommufds": [KEPT], "devices": {7: VFIO}, **row}
        status = holder.status._replace(pinned_bytes=fields.pop("pinned_bytes"))
        found.append(holder._replace(pid=pid, status=status, **fields))
    return found


@pytest.mark.parametrize(
    ("rows", "shared", "keepers"),
    [
        pytest.param([{}], [], {1}, id="an iommufd and a device"),
        pytest.param([{"devices": {}}], [], {1}, id="an iommufd"),
        pytest.param([{"iommufds": []}], [], {1}, id="a device"),
        pytest.param([{"iommufds": [], "devices": {7: OTHER}}], [], set(), id="another device"),
        pytest.param([{"iommufds": [], "devices": {7: VFIO, 8: CONTAINER}}], [], set(), id="the legacy container"),
        pytest.param([{"iommufds": [PER_PROCESS]}], [], set(), id="per process"),
        pytest.param([{"iommufds": [EMPTY]}], [], set(), id="nothing in it"),
        pytest.param([{"iommufds": [EMPTY._replace(settable=None)]}], [], set(), id="nothing was found in it"),
        pytest.param([{"iommufds": [KEPT._replace(rlimit_mode=None, ioases=[])]}], [], {1}, id="not read"),
        pytest.param([{"iommufds": None, "devices": {}}], [], set(), id="not looked at"),
        pytest.param([{"pinned_bytes": 4096}], [], set(), id="it has pinned something itself"),
        pytest.param([{"memory_bytes": 2**26}], [], set(), id="a VM that starts"),
        # After a live update that has failed, all may be charged for a process that has ended.
        pytest.param([{"memory_bytes": 2**26, "updatable": True}], [], {1}, id="a VM that was to be taken over"),
        pytest.param([{**RUNS, "updatable": True, "pinned_bytes": 2**20}], [], {1}, id="and has pinned a little since"),
        pytest.param([{**RUNS, "updatable": True}], [], set(), id="a VM that could be taken over"),
        pytest.param([{}, RUNS], [[(1, 4), (2, 4)]], set(), id="a VM that runs has it, too"),
        # Two VMs had one iommufd, and one of them has ended.
        pytest.param([{**RUNS, **TWO_SPACES}], [], {1}, id="an address space that is not its own"),
        pytest.param([{**RUNS, **TWO_SPACES, "viommu": None}], [], set(), id="or that its guest uses"),
        pytest.param([{**RUNS, **TWO_SPACES, "pinned_bytes": 2**27}], [], set(), id="two that are its own"),
        pytest.param([{}, RUNS], [], {1}, id="a VM that runs has another"),
        pytest.param([{}, {"memory_bytes": 2**26}], [[(1, 4), (2, 4)]], {1, 2}, id="a VM that starts has it"),
        # A VM that was given it beside its own, with what its launcher had open
        pytest.param(
            [{}, {**RUNS, "iommufds": [KEPT, KEPT._replace(fd=5)]}], [[(1, 4), (2, 4)]], {1, 2}, id="handed down"
        ),
        pytest.param([{**RUNS, "iommufds": [KEPT, KEPT._replace(fd=5)]}], [], {1}, id="and its launcher is gone"),
        pytest.param(
            [{}, {**RUNS, "pinned_bytes": 2**27, "iommufds": [KEPT, KEPT._replace(fd=5)]}],
            [[(1, 4), (2, 4)]],
            set(),
            id="a VM that pins by both",
        ),
        pytest.param(
            [{}, {**RUNS, "iommufds": [KEPT, KEPT._replace(fd=5)]}], [[(1, 4), (2, 4), (2, 5)]], set(), id="one twice"
        ),
    ],
)
def test_who_may_keep_what_a_vm_that_has_ended_had_pinned(
    alone: FakeKernel, rows: list[dict[str, Any]], shared: list[list[tuple[int, int]]], keepers: set[int]
) -> None:
    result = survey()
    result.holders = holders_of(result.holders[0], *rows)
    result.sharing = Sharing(shared)
    nobody = dict.fromkeys(range(1, len(rows) + 1), False)
    assert result.keepers({VFIO}, nobody) == keepers
    # What a mere holder has, another process has, too.
    assert result.keepers({VFIO}, {**nobody, 1: True}) == keepers - {1}


@pytest.mark.parametrize(
    ("row", "idle"),
    [
        ({"iommufds": [EMPTY], "devices": {}}, True),
        ({"iommufds": [EMPTY]}, False),
        ({"devices": {}}, False),
        ({"iommufds": [EMPTY, KEPT], "devices": {}}, False),
        ({"iommufds": [EMPTY], "devices": {}, "pinned_bytes": 4096}, False),
        ({"iommufds": [EMPTY], "devices": {}, "more": True}, False),
        ({"iommufds": [], "devices": {}}, False),
        ({"iommufds": None, "devices": {}}, False),
    ],
)
def test_who_holds_nothing(alone: FakeKernel, row: dict[str, Any], idle: bool) -> None:
    (holder,) = holders_of(survey().holders[0], row)
    assert holder.account(()).idle is idle


def test_how_many_iommufds_were_seen(alone: FakeKernel) -> None:
    result = survey()
    devices = {"devices": {7: VFIO, 8: CONTAINER}}
    rows = ({**devices, "iommufds": [EMPTY, KEPT._replace(fd=5)]}, devices, {"iommufds": None})
    result.holders = holders_of(result.holders[0], *rows)
    result.sharing = Sharing()
    assert result.count_iommufds() == 3
    result.sharing = Sharing([[(1, 5), (2, 4)]])
    assert result.count_iommufds() == 2


def test_how_many_queues_they_have(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    (holder,) = survey().holders
    ours = holder._replace(pid=os.getpid(), start_ticks=parse_stat(read_file("/proc/self/stat")).start_ticks)
    queues = [select.epoll() for _each in range(2)]
    copy = os.dup(queues[0].fileno())
    assert _survey.count_queues([holder, ours]) == 0
    monkeypatch.setattr(_survey, "_NAME_OF_QUEUES", "anon_inode:[eventpoll]")
    assert _survey.count_queues([holder, ours]) == 2
    # Another one by that id
    assert _survey.count_queues([holder, ours._replace(start_ticks=1)]) == 0
    monkeypatch.setattr(_survey, "_PATIENCE", -1)
    assert _survey.count_queues([holder, ours]) == 0
    os.close(copy)
    for each in queues:
        each.close()


MDEV, PCI, OF_VDPA = 4711, 4712, 4713
USED, UNUSED = HeldIommufd(4, "user", False, [(2, True)]), HeldIommufd(5, "user", True, [])


@pytest.mark.parametrize(
    ("fields", "as_it_runs"),
    [
        ({}, False),
        ({"devices": {7: PCI}}, False),
        ({"devices": {7: MDEV}}, True),
        ({"devices": {7: MDEV, 8: OF_VDPA}}, True),
        # Both are in the one address space, all of which is pinned.
        ({"devices": {7: MDEV, 8: PCI}}, False),
        ({"devices": {7: MDEV, 8: PCI}, "iommufds": [USED, UNUSED]}, False),
        ({"devices": {7: MDEV, 8: PCI, 9: CONTAINER}, "iommufds": []}, False),
        # Each may be in one of its own.
        ({"devices": {7: MDEV, 8: PCI, 9: CONTAINER}}, True),
        ({"devices": {7: MDEV, 8: PCI}, "iommufds": [USED, USED]}, True),
        ({"devices": {7: MDEV, 8: PCI}, "iommufds": [UNUSED]}, True),
        ({"devices": {7: MDEV, 8: PCI}, "more": True}, True),
        ({"iommufds": None}, False),
    ],
)
def test_who_pins_as_it_runs(alone: FakeKernel, fields: dict[str, Any], as_it_runs: bool) -> None:
    (holder,) = survey().holders
    changed = holder._replace(**{"iommufds": [USED], "devices": {}, **fields})
    assert changed.account({OF_VDPA}, {MDEV}).as_it_runs is as_it_runs


def test_no_iommufd_in_the_kernel(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "misc_rdev", lambda: None)
    monkeypatch.setattr(_survey, "_may_have_containers", lambda: False)
    monkeypatch.setattr(_survey, "_pids", refuse(AssertionError()))
    assert survey().holders == []


def test_an_iommufd_that_may_not_be_shared(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "borrow", refuse(AccessRefused("refused by somebody")))
    result = survey()
    (holder,) = result.holders
    assert holder.iommufds == [HeldIommufd(fd, None, None, [], "refused by somebody") for fd in (50, 51)]
    assert list(result.refused) == ["refused by somebody"]


def test_a_process_that_ends(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "borrow", refuse(ProcessGone("It has ended.")))
    assert survey().holders == []
    monkeypatch.setattr(Tables, "look", refuse(FileNotFoundError(errno.ENOENT, "gone")))
    assert survey().holders == []


def test_a_process_that_closes_it(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "character_device", refuse(DescriptorGone("It is closed.")))
    monkeypatch.setattr(_survey, "_status_text", lambda _pid: STATUS % 8)
    result = survey()
    assert result.holders == []
    assert result.others_pinned == {7: 8192}


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        (None, []),
        (STATUS % 0, []),
        # As the kernel lines it up.
        (STATUS.replace(b"%d kB", b"       0 kB"), []),
        (LEADERLESS, [_survey._LEADERLESS]),
    ],
)
def test_others_that_have_pinned_nothing(
    alone: FakeKernel, monkeypatch: pytest.MonkeyPatch, text: bytes | None, closed: list[str]
) -> None:
    monkeypatch.setattr(Process, "character_device", refuse(DescriptorGone("It is closed.")))
    monkeypatch.setattr(_survey, "_status_text", lambda _pid: text)
    result = survey()
    assert (result.others_pinned, list(result.closed)) == ({}, closed)


def stat(name: str, flags: int) -> bytes:
    return f"1 ({name}) R 0 0 0 0 0 {flags} 0 0 0 0 0 0 0 0 0 0 0 0 9\n".encode()


@pytest.mark.parametrize(
    ("threads", "lingers"),
    [([4, 4], False), ([4, 0x400044], False), ([4, 0x400040], True), ([4, None], False), ([None, 0x400040], True)],
)
def test_threads_that_end(
    alone: FakeKernel, monkeypatch: pytest.MonkeyPatch, threads: list[int | None], lingers: bool
) -> None:
    def read_file(path: str) -> bytes:
        flags = threads[int(path.split("/")[4])]
        if flags is None:
            raise ProcessLookupError(errno.ESRCH, "gone")
        return STATUS % 8 if path.endswith("/status") else stat("vm", flags)

    monkeypatch.setattr(Process, "hold", refuse(IommufdError("The first thread has ended.")))
    monkeypatch.setattr(_survey, "_status_text", lambda _pid: LEADERLESS)
    monkeypatch.setattr(_survey, "read_file", read_file)
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: ["0", "1"] if str(path).endswith("/task") else listed(path))
    result = survey()
    assert (list(result.closed), result.hidden) == ([_survey._LEADERLESS] * lingers, {})
    # The first thread has no memory any more; the others tell what the process has pinned.
    assert (result.others_pinned, result.unseen) == (({7: 8192}, {7}) if lingers else ({}, set()))


def test_threads_that_keep_us_waiting(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "hold", refuse(IommufdError("The first thread has ended.")))
    monkeypatch.setattr(_survey, "_status_text", lambda _pid: LEADERLESS)
    monkeypatch.setattr(_survey, "in_child", refuse(NoAnswer("It hangs.")))
    result = survey()
    assert (result.closed, list(result.hidden)) == ({}, ["It hangs."])


def test_another_that_is_hidden(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "character_device", refuse(DescriptorGone("It is closed.")))
    monkeypatch.setattr(_survey, "_status_text", refuse(PermissionError(errno.EACCES, "no")))
    assert list(survey().hidden) == [f"EACCES: Permission denied. {_survey._CURE}"]


def test_a_process_that_cannot_be_held(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    exc = IommufdError("It is hidden.")
    exc.__cause__ = PermissionError(errno.EPERM, "no")
    monkeypatch.setattr(Process, "hold", refuse(exc))
    assert list(survey().hidden) == [f"EPERM: Operation not permitted. {_survey._CURE}"]


@pytest.fixture
def closed(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose descriptors this caller may not look at."""
    monkeypatch.setattr(Tables, "look", refuse(PermissionError(errno.EACCES, "no")))


@pytest.mark.parametrize(("pinned", "count"), [(0, 0), (8, 1)])
def test_closed(
    closed: None, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, pinned: int, count: int
) -> None:
    monkeypatch.setattr(_survey, "_status_text", lambda _pid: STATUS % pinned)
    result = survey()
    assert result.closed == {f"EACCES: Permission denied. {_survey._CURE}": [child.pid]}
    assert result.blind
    assert [holder.iommufds for holder in result.holders] == [None] * count


def test_a_kernel_thread_has_no_descriptors(closed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "_status_text", lambda _pid: STATUS.replace(b"VmSize", b"VmNone") % 0)
    assert survey().closed == {}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (lambda _pid: None, []),
        (refuse(PermissionError(errno.EACCES, "no")), [f"EACCES: Permission denied. {_survey._CURE}"]),
        (lambda _pid: b"It is no status.", ["/proc/PID/status cannot be read: 'It is no status.'."]),
    ],
)
def test_hidden(closed: None, monkeypatch: pytest.MonkeyPatch, text: Callable[..., Any], hidden: list[str]) -> None:
    monkeypatch.setattr(_survey, "_status_text", text)
    assert list(survey().hidden) == hidden


def test_what_comes_out_of_a_child_is_what_went_in(alone: FakeKernel) -> None:
    alone.ioases = {2: 1}
    (holder,) = survey({ZERO}).holders
    assert Holder.from_json(json.loads(json.dumps(holder.to_json()))) == holder
    assert holder.devices
    assert holder.iommufds
    bare = holder._replace(iommufds=None, devices={}, units=(None, None))
    assert Holder.from_json(json.loads(json.dumps(bare.to_json()))) == bare


@pytest.mark.parametrize(
    ("allowed", "ipc_lock", "capable"), [(True, True, True), (False, False, False), (None, True, None)]
)
def test_a_capability_counts_where_selinux_lets_it(
    held: Process, monkeypatch: pytest.MonkeyPatch, allowed: bool | None, ipc_lock: bool, capable: bool | None
) -> None:
    both = IPC_LOCK | 1
    asked: list[str] = []

    def ask(name: str, _context: object) -> Verdict:
        asked.append(name)
        return Verdict(allowed)

    monkeypatch.setattr(_survey, "in_initial_user_namespace", lambda _process: True)
    monkeypatch.setattr(_survey, "lets_use", ask)
    holder = _survey._holder(held._replace(status=held.status._replace(effective=both)), {}, [], more=False)
    account = holder.account(())
    assert (account.ipc_lock, account.capable) == (ipc_lock, capable)
    assert holder.status.effective == (both if ipc_lock else 1)
    # What it has not is asked of nobody.
    bare = held._replace(status=held.status._replace(effective=1))
    assert _survey._holder(bare, {}, [], more=False).initial is True
    assert asked == ["cap_ipc_lock"]


@pytest.mark.parametrize(
    ("profile", "initial"),
    [
        (None, True),
        ("unconfined", True),
        ("vm (complain)", True),
        ("libvirt-1b4e28ba-2fa1-11d2-883f-0016d3cca427 (enforce)", True),
        # Whether it has `capability ipc_lock` cannot be asked.
        ("vm (enforce)", None),
        ("libvirt-vm (enforce)", None),
        ("libvirt-1b4e28ba-2fa1-11d2-883f-0016d3cca427//&vm (enforce)", None),
        ("vm (kill)", None),
        ("a//&b (mixed)", None),
    ],
)
def test_a_capability_may_be_void_by_a_profile_of_apparmor(
    held: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: str | None, initial: bool | None
) -> None:
    text = tmp_path / "current"
    if profile is not None:
        text.write_text(f"{profile}\n")
    monkeypatch.setattr(_survey, "_PROFILE", str(text))
    monkeypatch.setattr(_survey, "in_initial_user_namespace", lambda _process: True)
    monkeypatch.setattr(_survey, "lets_use", lambda *_given: Verdict(True))
    holder = _survey._holder(held._replace(status=held.status._replace(effective=IPC_LOCK)), {}, [], more=False)
    assert (holder.initial, holder.account(()).capable) == (initial, initial)
    bare = held._replace(status=held.status._replace(effective=1))
    assert _survey._holder(bare, {}, [], more=False).initial is True


def test_one_that_swaps_is_told_and_counts_as_unknown(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def look(process: Process, fds: list[int], _rdevs: set[int]) -> tuple[list[HeldIommufd], str, bool]:
        looked.extend(fds)
        return [HeldIommufd(50, "user", None, [])], _survey._SWAPS, True

    monkeypatch.setattr(_survey, "_held_iommufds", look)
    result = survey()
    assert looked == [50, 51]
    assert list(result.refused) == [_survey._SWAPS]
    assert result.holders[0].account(()).ways == frozenset({IOMMUFD_USER, None})


def test_it_is_the_borrowing_that_tells(held: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "borrow_iommufd", refuse(Swapped("It is a pipe.")))
    assert _survey._held_iommufds(held, [50, 51], set()) == ([], _survey._SWAPS, True)


class Crowd:
    """A host of seven processes, 1, 2, 4, 5 and 6 of user 7, 3 and 7 of user 8. `trouble` tells what one makes."""

    PIDS = (1, 2, 3, 4, 5, 6, 7)

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.looked: list[int] = []
        self.started: list[list[int]] = []
        self.trouble: dict[int, Callable[[Any], object]] = {}
        self.seconds = 0.0
        self.size = 64

    @staticmethod
    def uid(pid: int) -> int:
        return 8 if pid in (3, 7) else 7

    def status(self, pid: int) -> bytes:
        return (STATUS.replace(b"\t7\t7\t7\t7", b"\t%d" % self.uid(pid)) + b"FDSize:\t%d\n" % self.size) % 8

    def add(self, look: Any, pid: int, payer: int) -> None:
        self.looked.append(pid)
        if pid in self.trouble:
            self.trouble[pid](look)
        look._seen.holders.append(self.holder._replace(pid=pid))
        look._budget.hold(payer, 1, 0)
        look._budget.seconds[payer] += self.seconds

    def children(self, _user: object, work: Any, _seconds: float) -> Any:
        self.started.append(list(work.args[0]))
        # Each child has a copy of what was spent.
        spent = Budget()
        spent.load(work.args[1].to_json(range(_tables._ALL)))
        yield from json.loads(
            json.dumps(list(self.until_it_ends(partial(work.func, work.args[0], spent, *work.args[2:]))))
        )
        if self.failure:
            raise self.failure

    failure: Exception | None = None

    def until_it_ends(self, work: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        self.failure = None
        try:
            yield from work()
        except IommufdError as exc:
            self.failure = exc


@pytest.fixture
def crowd(alone: FakeKernel, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> Crowd:
    """All of them seem to hold an iommufd. Each look at one is told at once."""
    crowd = Crowd(survey().holders[0])

    def add(look: Any, pid: int, payer: int, _found: object, *, more: bool) -> None:
        assert not more
        crowd.add(look, pid, payer)

    monkeypatch.setattr(_survey, "_pids", lambda: iter(crowd.PIDS))
    monkeypatch.setattr(_survey, "_is_of_container", lambda _pid: False)
    monkeypatch.setattr(_survey, "_status_text", crowd.status)
    monkeypatch.setattr(Tables, "look", lambda *_given: Descriptors({50: _iommufd.misc_rdev() or 0}, 1, False))
    monkeypatch.setattr(_survey._Look, "_add", add)
    monkeypatch.setattr(_survey, "ask_child", crowd.children)
    monkeypatch.setattr(_survey, "_BATCH", 1)
    # These processes are not there.
    monkeypatch.setattr(_survey, "compare", lambda _descriptors: Sharing())
    return crowd


def test_too_many_of_a_user_or_of_all_are_counted(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tables, "_HOLDERS_OF_USER", 3)
    result = survey()
    assert [holder.pid for holder in result.holders] == crowd.looked == [1, 2, 3, 4, 7]
    assert result.refused == {TOO_MANY_HOLDERS: [5, 6]}
    # What they have pinned is not lost.
    assert (result.others_pinned, result.unseen) == ({7: 2 * 8192}, {7})
    monkeypatch.setattr(_tables, "_HELD_OF_USER", 1)
    assert survey().refused == {TOO_MANY_HOLDERS: [2, 4, 5, 6, 7]}
    monkeypatch.setattr(_tables, "_HOLDERS", 1)
    assert survey().refused == {TOO_MANY_HOLDERS: [2, 3, 4, 5, 6, 7]}


@pytest.mark.parametrize("trouble", [NoAnswer("It hangs."), Interrupted("It was killed.")])
def test_whose_processes_keep_us_waiting_is_not_looked_at_any_more(crowd: Crowd, trouble: Exception) -> None:
    def fail(_look: object) -> None:
        raise trouble

    crowd.trouble = dict.fromkeys((2, 4, 5), fail)
    result = survey()
    assert [holder.pid for holder in result.holders] == [1, 3, 7]
    # After the third time, the sixth of that user is not even looked at.
    assert crowd.looked == [1, 2, 3, 4, 5, 7]
    assert result.closed == {_survey._KEEPS_WAITING: [2, 4, 5, 6]}
    assert result.unseen == {7}
    # Each time another child goes on after the one that it hung at.
    assert crowd.started == [[1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7], [5, 6, 7], [6, 7]]


def test_what_was_not_told_is_looked_at_again(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_look: object) -> None:
        raise NoAnswer("It hangs.")

    monkeypatch.setattr(_survey, "_BATCH", 99)
    crowd.trouble = {4: fail}
    result = survey()
    assert crowd.started == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 5, 6, 7]]
    assert [holder.pid for holder in result.holders] == [1, 2, 3, 5, 6, 7]


def test_a_child_that_ends_without_a_word(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "ask_child", lambda *_given: (each for each in ""))
    result = survey()
    assert result.holders == []
    assert result.closed == {_survey._KEEPS_WAITING: [1, 2, 3, 4, 5, 6, 7]}


def test_a_child_with_what_may_never_close_looks_at_nobody_else(crowd: Crowd) -> None:
    def swap(look: Any) -> None:
        look.swapped = True

    crowd.trouble = {3: swap}
    result = survey()
    assert crowd.started == [[1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]]
    assert [holder.pid for holder in result.holders] == [1, 2, 3, 4, 5, 6, 7]


def test_a_users_time_has_an_end(crowd: Crowd) -> None:
    crowd.seconds = _survey._OF_USER / 2 + 1
    result = survey()
    assert [holder.pid for holder in result.holders] == [1, 2, 3, 7]
    assert result.closed == {_survey._KEEPS_WAITING: [4, 5, 6]}
    assert (result.others_pinned, result.unseen) == ({7: 3 * 8192}, {7})


def test_an_end_to_all_looks(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "_SECONDS", -1)
    result = survey()
    assert [holder.pid for holder in result.holders] == [1]
    assert result.closed == {_survey._KEEPS_WAITING: [2, 3, 4, 5, 6, 7]}
    assert result.unseen == {7, 8}


def test_an_answer_tells_of_those_alone_who_have_paid_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root in a container is any user that it likes. An answer with all of them has no end."""
    users = range(1000, 1010)
    monkeypatch.setattr(_survey, "_BATCH", 2)
    monkeypatch.setattr(_survey, "_status_text", lambda pid: STATUS.replace(b"\t7\t", b"\t%d\t" % pid, 1) % 0)
    monkeypatch.setattr(Tables, "look", lambda *_given: Descriptors({}, 3, False))
    budget = Budget()
    position = mmap.mmap(-1, _survey._POSITION.size)
    answers = [spent for _done, _seen, spent in _survey._batches(list(users), budget, (), position, False)]
    told = [[payer for payer, _seconds in spent[-1]] for spent in answers]
    assert [sorted(each) for each in told if each] == [[pid, pid + 1] for pid in users[::2]]
    assert sorted(budget.seconds) == list(users)


def test_containers_and_large_tables_come_last(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "_is_of_container", lambda pid: pid in (1, 2))
    survey()
    assert crowd.looked == [3, 4, 5, 6, 7, 1, 2]
    crowd.looked.clear()
    crowd.size = LARGE + 1
    survey()
    assert crowd.looked == [3, 4, 5, 6, 7, 1, 2]
    assert len(crowd.started) == 3


def test_what_the_host_lacks_is_nobodys_fault(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "ask_child", refuse(HostLacks("No process can be started here.")))
    with pytest.raises(HostLacks):
        survey()


def test_who_pays_for_a_set_user_id_program(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder in /proc is root's. Root's own processes are looked at all the same."""
    monkeypatch.setattr(_survey, "find_owner", lambda _pid: 0)
    crowd.trouble = {1: refuse(NoAnswer("It hangs."))}
    assert survey().unseen == {7}
    monkeypatch.setattr(_survey, "_status_text", refuse(PermissionError()))
    assert _survey.find_charged(1) == 0
    monkeypatch.setattr(_survey, "_status_text", lambda _pid: None)
    assert _survey.find_charged(1) == 0


def test_whose_process_is_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _survey._is_of_container(os.getpid())
    assert not _survey._is_of_container(2**31 - 1)
    monkeypatch.setattr(_survey, "find_owner", lambda _pid: 100_000)
    assert _survey._is_of_container(1)


def test_more_than_is_told_of_one(alone: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    alone.ioases = dict.fromkeys(range(1, 9), 1)
    monkeypatch.setattr(_survey, "_IOASES_MAX", 5)
    monkeypatch.setattr(_survey, "_NAME_MAX", 4)
    monkeypatch.setattr(_survey, "read_arguments", lambda _process: Arguments([b"qemu", b"-name", b"x" * 9], True))
    result = survey()
    (holder,) = result.holders
    assert holder.iommufds is not None
    assert [ioas for ioas, _pages in holder.iommufds[0].ioases] == [1, 2, 3, 4, 5]
    assert (holder.name, holder.more, holder.iommufds[0].truncated) == ("xxxx...", True, True)
    assert list(result.refused) == [_survey._TOO_MANY_IOMMUFDS]
    monkeypatch.setattr(_tables, "_IOASES_OF_USER", 2)
    assert survey().holders[0].iommufds == [holder.iommufds[0]._replace(ioases=[(1, True), (2, True)])]
    monkeypatch.setattr(_survey, "IOMMUFDS_MAX", 1)
    alone.ioases = {}
    assert survey().holders[0].more


@pytest.mark.parametrize("counts", [[IOMMUFDS_MAX] * 16, [17] * 15 + [IOMMUFDS_MAX] * 16])
def test_all_that_is_told_at_once_is_an_answer(alone: FakeKernel, held: Process, counts: list[int]) -> None:
    """Else whoever was looked at last, be it a victim, would be left out in the place of who says too much."""
    (holder,) = survey().holders
    # As with kernel.yama.ptrace_scope=3, which lets root look at descriptors, and share none.
    msg = held._replace(comm="\\x01" * 15)._refused("share its descriptor 1000000", OSError(errno.EPERM, ""))
    large = holder._replace(
        program="\udcff" * 1024,
        name="\udcff" * 255,
        devices=dict.fromkeys(range(10**6, 10**6 + IOMMUFDS_MAX), 2**20),
        iommufd_objects=[("\udcff" * 63, 10**8)] * 16,
    )
    look = _survey._Look(Budget(), (), is_last=False)
    for count in counts:
        iommufds = [HeldIommufd(10**6, None, None, [(1000, False)] * 4, msg)] * count
        look._seen.holders.append(large._replace(iommufds=iommufds))
        if look.is_full():
            break
    assert look.is_full()
    assert len(json.dumps(look.taken())) < _child._ANSWER_MAX * 3 // 4


@pytest.mark.parametrize(("whole", "locks"), [(True, False), (False, None)])
def test_the_end_of_a_command_line_may_decide(
    alone: FakeKernel, monkeypatch: pytest.MonkeyPatch, whole: bool, locks: bool | None
) -> None:
    monkeypatch.setattr(_survey, "read_program", lambda _process: b"/usr/bin/qemu-kvm")
    words = [b"qemu-kvm", b"-name", b"vm", b"-m", b"1G", b"-object", b"iommufd,id=i0,fd=3"]
    monkeypatch.setattr(_survey, "read_arguments", lambda _process: Arguments(words, whole))
    (holder,) = survey().holders
    assert (holder.viommu, holder.iommufd_objects) == (("none", [("i0", 3)]) if whole else (None, None))
    assert (holder.name, holder.memory_bytes, holder.locks_memory) == ("vm", 2**30 if whole else None, locks)


def test_what_the_program_is(alone: FakeKernel) -> None:
    (holder,) = survey().holders
    assert holder.program == os.path.realpath(sys.executable)
    # It is no VMM that anything is known of.
    assert (holder.memory_bytes, holder.locks_memory) == (None, None)


@pytest.mark.parametrize(
    ("name", "mode", "text", "read"),
    [
        ("vm.cfg", 0o644, b"[memory]", b"[memory]"),
        ("vm.cfg", 0o644, b"", b""),
        ("vm.cfg", 0o666, b"[memory]", None),
        ("vm.cfg", 0o644, b"x" * (_survey._CONFIG_MAX + 1), None),
        ("none.cfg", 0o644, b"[memory]", None),
        (".", 0o644, b"", None),
    ],
)
def test_a_file_that_it_names(
    held: Process, tmp_path: Path, name: str, mode: int, text: bytes, read: bytes | None
) -> None:
    (tmp_path / "vm.cfg").write_bytes(text)
    (tmp_path / "vm.cfg").chmod(mode)
    assert _survey._read_config(held, os.fsencode(tmp_path / name)) == read
    # Relative to what?
    assert _survey._read_config(held, name.encode()) is None


def test_a_file_that_never_ends(held: Process, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vm.cfg")
    assert _survey._read_config(held, os.fsencode(tmp_path / "vm.cfg")) is None


@pytest.mark.parametrize("path", ["/proc/version", "/proc/sys/kernel/ostype", "/sys/kernel/uevent_seqnum"])
def test_what_the_kernel_makes_up_is_no_file(held: Process, path: str) -> None:
    """To read /proc/kmsg, which is root's as these are, takes its messages away from whoever logs them."""
    assert os.path.isfile(path)
    assert _survey._read_config(held, path.encode()) is None


def test_a_process_that_has_other_files(held: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vm.cfg").write_bytes(b"[memory]")
    readlink = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: "mnt:[1]" if str(path) == "/proc/self/ns/mnt" else readlink(path))
    assert _survey._read_config(held, os.fsencode(tmp_path / "vm.cfg")) is None


def test_a_status_of_nobody() -> None:
    assert _survey._status(2**31 - 1) is None
