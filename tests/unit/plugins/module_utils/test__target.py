# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _target
from ansible_collections.virt.iommufd.plugins.module_utils._errors import DescriptorGone, NotAnIommufd
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import RLIMIT_MODE, Answer
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._target import borrow_iommufd, find_iommufds
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
    with pytest.raises(NotAnIommufd, match="/ten"), borrow_iommufd(held, 53):
        pass
    assert null_is_iommufd.calls == []


def test_a_device_that_is_no_iommufd_is_not_even_borrowed(held: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_target, "iommufd_rdevs", lambda _seen: set())
    monkeypatch.setattr(Process, "borrow", lambda *_args: pytest.fail("borrowed"))
    with pytest.raises(NotAnIommufd), borrow_iommufd(held, 50):
        pass
