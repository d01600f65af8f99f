# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _sharing
from ansible_collections.virt.iommufd.plugins.module_utils._child import NoAnswer
from ansible_collections.virt.iommufd.plugins.module_utils._process import parse_stat, read_file
from ansible_collections.virt.iommufd.plugins.module_utils._sharing import Descriptor, Owner, Sharing, compare


def started(pid: int) -> int:
    return parse_stat(read_file(f"/proc/{pid}/stat")).start_ticks


@pytest.fixture
def opened() -> Iterator[list[int]]:
    """Descriptors of ours on /dev/null, each an open file of its own."""
    fds = [os.open(os.devnull, os.O_RDONLY) for _each in range(40)]
    yield fds
    for each in fds:
        os.close(each)


@pytest.fixture
def heir(opened: list[int]) -> Iterator[int]:
    """A process that has the same files."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=opened) as process:
        yield process.pid
        process.kill()


def descriptors(pid: int, fds: list[int], kind: int = 0) -> list[Descriptor]:
    return [Descriptor(pid, fd, kind, started(pid), 1000) for fd in fds]


@pytest.mark.parametrize("count", [1, 4, 5, 40])
def test_what_is_inherited_is_one_file(opened: list[int], heir: int, count: int) -> None:
    some = opened[:count]
    all_ = descriptors(os.getpid(), some) + descriptors(heir, some)
    random.shuffle(all_)
    sharing = compare(all_)
    assert sharing.unknown == set()
    expected = sorted(sorted([(os.getpid(), fd), (heir, fd)]) for fd in some)
    assert sorted(sharing.files) == expected


def test_descriptors_of_one_process(opened: list[int]) -> None:
    copy = os.dup(opened[0])
    try:
        sharing = compare(descriptors(os.getpid(), [*opened, copy]))
    finally:
        os.close(copy)
    assert sharing.files == [[(os.getpid(), opened[0]), (os.getpid(), copy)]]
    assert sharing.same_as(os.getpid(), copy) == opened[0]
    assert [sharing.same_as(os.getpid(), fd) for fd in opened[:2]] == [None, None]
    assert sharing.shared_with(os.getpid(), copy) == []


def test_how_many_files_there_are() -> None:
    """None is counted twice, nor one of which it is not known whether it is another one."""
    sharing = Sharing([[(1, 4), (1, 6), (2, 4)]], unknown=[3])
    all_ = [Descriptor(pid, fd, 0, 1, 1000) for pid, fd in ((1, 4), (1, 5), (1, 6), (2, 4), (2, 5), (3, 4))]
    assert [sharing.count(some) for some in (all_, all_[:1], all_[:2], all_[-1:], [])] == [3, 1, 2, 0, 0]


def test_different_kinds_are_not_compared(opened: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sharing, "ask_child", None)
    one, other = opened[:2]
    assert compare([*descriptors(os.getpid(), [one]), *descriptors(os.getpid(), [other], kind=1)]).files == []
    assert compare([]).unknown == set()


@pytest.mark.parametrize("count", [2, 40])
def test_who_has_ended_or_closed_it_is_unknown(opened: list[int], heir: int, count: int) -> None:
    ours = descriptors(os.getpid(), opened[:count])
    gone = Descriptor(2**22 - 1, 3, 0, 1, 1000)
    closed = Descriptor(heir, 1000, 0, started(heir), 1000)
    theirs = Descriptor(heir, opened[0], 0, started(heir) + 1, 1000)
    sharing = compare([gone, *ours, closed])
    assert (sharing.files, sharing.unknown) == ([], {gone.pid, heir})
    # Another process by the same id.
    sharing = compare([*ours, theirs])
    assert (sharing.files, sharing.unknown) == ([], {heir})


def test_a_kernel_that_does_not_tell(opened: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(_sharing, "compare_files", refuse)
    for count in (2, 40):
        sharing = compare(descriptors(os.getpid(), opened[:count]))
        assert (sharing.files, sharing.unknown) == ([], {os.getpid()})
        assert sharing.shared_with(os.getpid(), opened[0]) is None


class Hanging:
    """Children that hang at some processes. `asked`: of which processes each child was asked."""

    def __init__(self, hangs: set[int]) -> None:
        self.hangs = hangs
        self.asked: list[list[int]] = []

    def ask(self, _user: object, work: Any, _seconds: float) -> Iterator[Any]:
        some, position = work.args
        self.asked.append([each.pid for each in some])
        for index, each in enumerate(some):
            _sharing._POSITION.pack_into(position, 0, index, -1)
            if each.pid in self.hangs:
                raise NoAnswer("It hangs.")
        yield None
        yield [[[0, 1]], [2]]


def of(pid: int, payer: int = 7) -> Descriptor:
    return Descriptor(pid, 3, 0, 1, payer)


def test_whoever_keeps_us_waiting_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging({2})
    monkeypatch.setattr(_sharing, "ask_child", hanging.ask)
    sharing = compare(map(of, [1, 2, 3, 4]))
    assert hanging.asked == [[1, 2, 3, 4], [1, 3, 4]]
    assert (sharing.files, sharing.unknown) == ([[(1, 3), (3, 3)]], {2, 4})


def test_whose_processes_keep_us_waiting_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging({3, 4, 5, 6})
    monkeypatch.setattr(_sharing, "ask_child", hanging.ask)
    sharing = compare([*(of(pid, 8) for pid in (1, 2, 9)), *map(of, [3, 4, 5, 6, 7])])
    assert hanging.asked[-1] == [1, 2, 9]
    assert len(hanging.asked) == 4
    assert sharing.unknown == {3, 4, 5, 6, 7, 9}


@pytest.mark.parametrize("answers", [[], [None]])
def test_a_child_without_an_answer(monkeypatch: pytest.MonkeyPatch, answers: list[None]) -> None:
    monkeypatch.setattr(_sharing, "ask_child", lambda *_given: (each for each in answers))
    assert compare(map(of, [1, 2])).unknown == {1, 2}


def test_an_end_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging({2})
    monkeypatch.setattr(_sharing, "ask_child", hanging.ask)
    monkeypatch.setattr(_sharing, "_SECONDS", -1)
    assert compare(map(of, [1, 2, 3])).unknown == {1, 2, 3}
    assert len(hanging.asked) == 1


def test_both_may_be_the_one_that_hangs(opened: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def hang(_user: object, work: Callable[..., Any], _seconds: float) -> Iterator[Any]:
        some, position = work.args  # type: ignore[attr-defined]
        done.append(len(some))
        _sharing._POSITION.pack_into(position, 0, 0, 2)
        if len(done) == 1:
            raise NoAnswer("It hangs.")
        yield [[], []]

    monkeypatch.setattr(_sharing, "ask_child", hang)
    assert compare(map(of, [1, 2, 3, 4])).unknown == {1, 3}


@pytest.mark.parametrize(
    ("files", "owners", "found"),
    [
        # A VMM, and its launcher.
        ([[(1, 3), (2, 9)]], [Owner(1, [3], False), Owner(2, [9], True)], {1: True, 2: False}),
        # What it has not pinned yet, it may: by its own device, for one.
        ([[(1, 3), (2, 9)]], [Owner(1, [3], False), Owner(2, [8, 9], False)], {1: True, 2: False}),
        # Which of the two is it?
        ([[(1, 3), (2, 9)]], [Owner(1, [3], False), Owner(2, [9], False)], {1: None, 2: None}),
        # A launcher of two.
        (
            [[(1, 3), (2, 9)], [(1, 4), (3, 9)]],
            [Owner(1, [3, 4], False), Owner(2, [9], True), Owner(3, [9], True)],
            {1: True, 2: False, 3: False},
        ),
        (
            [[(1, 3), (2, 9)], [(1, 4), (3, 9)]],
            [Owner(1, [3, 4], False), Owner(2, [9], True), Owner(3, [9], False)],
            {1: None, 2: False, 3: None},
        ),
        # Several descriptors of one process are nobody else's.
        ([[(1, 3), (1, 4)]], [Owner(1, [3, 4], False)], {1: False}),
        ([], [Owner(1, [3], False), Owner(2, None, False), Owner(5, [3], False)], {1: False, 2: None, 5: None}),
        ([], [Owner(7, [3], False), Owner(8, [3], True), Owner(9, None, True)], {7: None, 8: False, 9: False}),
    ],
)
def test_who_only_holds_what_others_have(
    files: list[list[tuple[int, int]]], owners: list[Owner], found: dict[int, bool | None]
) -> None:
    # Of 5 not all was compared, and 7 may share with somebody who was not seen.
    assert Sharing(files, [5]).holders(owners, {7}) == found


def test_with_how_many_it_is_shared() -> None:
    sharing = Sharing([[(pid, 3) for pid in range(1000, 0, -1)]])
    assert sharing.shared_with(1, 3) == list(range(2, 18))
    assert sharing.shared_with(1000, 3) == list(range(1, 17))
    assert sharing.shared_with(1, 4) == []
