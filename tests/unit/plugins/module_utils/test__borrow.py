# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import os

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _borrow
from ansible_collections.virt.iommufd.plugins.module_utils._borrow import (
    Swapped,
    borrow_iommufd,
    find_iommufds,
)
from ansible_collections.virt.iommufd.plugins.module_utils._errors import (
    DescriptorGone,
    IommufdError,
    NotAnIommufd,
)
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import RLIMIT_MODE, Answer
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel


def test_iommufds_are_found_by_what_is_behind_them(held: Process, null_is_iommufd: FakeKernel) -> None:
    assert set(find_iommufds(held)) == {50, 51}
    assert null_is_iommufd.calls == []


def test_an_iommufd_is_borrowed(held: Process, null_is_iommufd: FakeKernel) -> None:
    null_is_iommufd.mode = 1
    with borrow_iommufd(held, 50) as iommufd:
        assert iommufd.get(RLIMIT_MODE) == Answer(value=1)


@pytest.mark.parametrize(
    ("fd", "exception", "words"),
    [
        (51, NotAnIommufd, "O_PATH"),
        (52, NotAnIommufd, r"not an iommufd. It is pipe:\["),
        (53, NotAnIommufd, "not an iommufd. It is /.*/ten"),
        (60, DescriptorGone, "no descriptor 60"),
        (-1, DescriptorGone, "-1"),
    ],
)
def test_anything_else_is_refused_and_sent_nothing(
    held: Process, null_is_iommufd: FakeKernel, fd: int, exception: type[Exception], words: str
) -> None:
    with pytest.raises(exception, match=words), borrow_iommufd(held, fd):
        pass
    assert null_is_iommufd.calls == []


def test_a_descriptor_that_is_swapped_before_it_is_borrowed_is_sent_nothing(
    held: Process, null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the first look, 53 is what it will never be again.
    monkeypatch.setattr(Process, "character_device", lambda *_args: os.stat(os.devnull).st_rdev)
    with pytest.raises(Swapped, match="/ten"), borrow_iommufd(held, 53):
        pass
    assert null_is_iommufd.calls == []
    # To close it could take for ever.
    left = [name for name in os.listdir("/proc/self/fd") if own_link(name) == own_link("53", held.pid)]
    assert len(left) == 1
    os.close(int(left[0]))


def own_link(name: str, pid: int | str = "self") -> str:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/{pid}/fd/{name}")
    return ""


def test_a_borrowed_iommufd_is_closed_on_every_path(held: Process, null_is_iommufd: FakeKernel) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with borrow_iommufd(held, 50):
        assert len(os.listdir("/proc/self/fd")) == before + 1
    with pytest.raises(ZeroDivisionError), borrow_iommufd(held, 50):
        raise ZeroDivisionError
    with pytest.raises(NotAnIommufd), borrow_iommufd(held, 51):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_iommufds_than_are_worked_on(
    held: Process, null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_borrow, "IOMMUFDS_MAX", 2)
    assert set(find_iommufds(held)) == {50, 51}
    monkeypatch.setattr(_borrow, "IOMMUFDS_MAX", 1)
    with pytest.raises(IommufdError, match=r"has more descriptors than are looked through .*1 may be iommufds"):
        find_iommufds(held)
    some = held.character_devices()._replace(more=True)
    monkeypatch.setattr(Process, "character_devices", lambda _process: some)
    with pytest.raises(IommufdError, match=r"has more descriptors than are looked through \(262144, of which 1 "):
        find_iommufds(held)


def test_a_descriptor_that_is_closed_while_it_is_shared_was_set_for_nobody(
    held: Process, null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert null_is_iommufd
    with pytest.raises(NotAnIommufd), borrow_iommufd(held, 50):
        monkeypatch.setattr(Process, "character_device", lambda *_args: None)


def test_a_device_that_is_no_iommufd_is_not_even_borrowed(held: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_borrow, "iommufd_rdevs", lambda _seen: set())
    monkeypatch.setattr(Process, "borrow", lambda *_args: pytest.fail("borrowed"))
    with pytest.raises(NotAnIommufd), borrow_iommufd(held, 50):
        pass
