# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What IOMMU_OPTION answers: one set of claims, for the kernel and for the fake that the unit tests run against.

A claim that the fake keeps and the kernel does not would make every unit test worthless.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Protocol

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _uapi

GET, SET = _uapi.IOMMU_OPTION_OP_GET, _uapi.IOMMU_OPTION_OP_SET
RLIMIT_MODE, HUGE_PAGES = _uapi.IOMMU_OPTION_RLIMIT_MODE, _uapi.IOMMU_OPTION_HUGE_PAGES
NO_VALUE = 2**64 - 1

Said = tuple[int, int]  # an errno, or 0 and what val64 holds then


class Subject(Protocol):
    """A kernel, and one iommufd of it."""

    legacy_container: bool

    def send(self, argument: _uapi.IommuOption) -> int:
        """The errno of the ioctl, 0 for success, sent with every privilege."""

    def send_unprivileged(self, argument: _uapi.IommuOption) -> int:
        """The same from an ordinary user."""

    def send_to(self, where: str, argument: _uapi.IommuOption) -> int:
        """The same to another file: "null", "container" (/dev/vfio/vfio), or "path" (the iommufd's node, O_PATH)."""

    def alloc(self) -> int:
        """The id of a new IOAS."""

    def destroy(self, ioas: int) -> None:
        """Destroys an IOAS."""

    def map(self) -> int:
        """The id of a new IOAS in which memory is mapped, but that no device is attached to."""

    def map_for_device(self) -> int:
        """The id of a new IOAS in which memory is mapped, and that a device is attached to."""


def argument(
    option: int, operation: int, value: int = 0, object_id: int = 0, size: int = 24, reserved: int = 0
) -> _uapi.IommuOption:
    assert ctypes.sizeof(_uapi.IommuOption) == 24
    return _uapi.IommuOption(
        size=size, option_id=option, op=operation, reserved=reserved, object_id=object_id, val64=value
    )


def ask(subject: Subject, option: int = RLIMIT_MODE, object_id: int = 0) -> Said:
    question = argument(option, GET, 77, object_id)
    error = subject.send(question)
    return error, 0 if error else question.val64


def put(subject: Subject, value: int, option: int = RLIMIT_MODE, object_id: int = 0) -> int:
    return subject.send(argument(option, SET, value, object_id))


class Contract:
    """The claims. Whoever inherits them gives a fixture `subject`."""

    def test_a_fresh_one_accounts_per_user(self, subject: Subject) -> None:
        assert ask(subject) == (0, 0)

    def test_the_mode_is_set_both_ways(self, subject: Subject) -> None:
        for value in (1, 1, 0, 0):
            assert put(subject, value) == 0
            assert ask(subject) == (0, value)

    @pytest.mark.parametrize("value", [2, 77, 2**32, NO_VALUE])
    def test_other_values_are_refused_and_change_nothing(self, subject: Subject, value: int) -> None:
        for mode in (1, 0):
            assert put(subject, mode) == 0
            assert put(subject, value) == errno.EINVAL
            assert ask(subject) == (0, mode)

    @pytest.mark.parametrize("operation", [GET, SET])
    @pytest.mark.parametrize("wrong", [{"object_id": 5}, {"option": 7}, {"reserved": 1}])
    def test_what_the_kernel_does_not_know(self, subject: Subject, operation: int, wrong: dict[str, int]) -> None:
        assert subject.send(argument(**{"option": RLIMIT_MODE, "operation": operation, **wrong})) == errno.EOPNOTSUPP

    def test_unknown_operations(self, subject: Subject) -> None:
        ioas = subject.alloc()
        assert subject.send(argument(RLIMIT_MODE, 9)) == errno.EOPNOTSUPP
        assert subject.send(argument(HUGE_PAGES, 9, object_id=ioas)) == errno.EOPNOTSUPP

    def test_too_small(self, subject: Subject) -> None:
        assert subject.send(argument(RLIMIT_MODE, GET, size=8)) == errno.EINVAL

    @pytest.mark.parametrize("value", [0, 1, 2, NO_VALUE])
    def test_without_privilege(self, subject: Subject, value: int) -> None:
        assert put(subject, 1) == 0
        assert subject.send_unprivileged(argument(RLIMIT_MODE, SET, value)) == errno.EPERM
        assert subject.send_unprivileged(argument(RLIMIT_MODE, GET)) == 0
        assert ask(subject) == (0, 1)

    def test_without_privilege_and_with_objects(self, subject: Subject) -> None:
        subject.alloc()
        assert subject.send_unprivileged(argument(RLIMIT_MODE, SET, NO_VALUE)) == errno.EPERM

    def test_huge_pages_take_no_privilege(self, subject: Subject) -> None:
        ioas = subject.alloc()
        assert subject.send_unprivileged(argument(HUGE_PAGES, SET, 0, ioas)) == 0
        assert ask(subject, HUGE_PAGES, ioas) == (0, 0)

    @pytest.mark.parametrize("mode", [0, 1])
    def test_busy_with_an_ioas_also_for_the_value_in_force(self, subject: Subject, mode: int) -> None:
        assert put(subject, mode) == 0
        ioas = subject.alloc()
        for value in (0, 1, 2, NO_VALUE):
            assert put(subject, value) == errno.EBUSY
        assert ask(subject) == (0, mode)
        subject.destroy(ioas)
        assert put(subject, NO_VALUE) == errno.EINVAL
        assert put(subject, 1 - mode) == 0
        assert ask(subject) == (0, 1 - mode)

    def test_busy_until_the_last_ioas_is_gone(self, subject: Subject) -> None:
        first, second = subject.alloc(), subject.alloc()
        assert first != second
        subject.destroy(first)
        assert put(subject, 1) == errno.EBUSY
        subject.destroy(second)
        assert put(subject, 1) == 0

    @pytest.mark.parametrize("operation", [GET, SET])
    def test_no_such_ioas(self, subject: Subject, operation: int) -> None:
        ioas = subject.alloc()
        for object_id in (0, ioas + 1, 2**32 - 1):
            assert subject.send(argument(HUGE_PAGES, operation, 1, object_id)) == errno.ENOENT

    def test_ids_of_ioases_are_small(self, subject: Subject) -> None:
        assert [subject.alloc(), subject.alloc()] == [1, 2]

    def test_huge_pages_are_on_and_each_ioas_has_its_own(self, subject: Subject) -> None:
        first, second = subject.alloc(), subject.alloc()
        assert put(subject, 0, HUGE_PAGES, first) == 0
        assert ask(subject, HUGE_PAGES, first) == (0, 0)
        assert ask(subject, HUGE_PAGES, second) == (0, 1)
        for value in (5, NO_VALUE):
            assert put(subject, value, HUGE_PAGES, first) == errno.EINVAL
        assert ask(subject, HUGE_PAGES, first) == (0, 0)
        assert put(subject, 1, HUGE_PAGES, first) == 0
        assert ask(subject, HUGE_PAGES, first) == (0, 1)

    def test_mapped_memory_without_a_device_leaves_huge_pages_free(self, subject: Subject) -> None:
        ioas = subject.map()
        assert put(subject, 0, HUGE_PAGES, ioas) == 0
        assert ask(subject, HUGE_PAGES, ioas) == (0, 0)

    def test_huge_pages_stay_on_once_memory_is_mapped_for_a_device(self, subject: Subject) -> None:
        ioas = subject.map_for_device()
        assert put(subject, 0, HUGE_PAGES, ioas) == errno.EINVAL
        assert ask(subject, HUGE_PAGES, ioas) == (0, 1)
        assert put(subject, 1, HUGE_PAGES, ioas) == 0
        assert put(subject, 1) == errno.EBUSY

    @pytest.mark.parametrize("operation", [GET, SET])
    def test_a_driver_without_the_ioctl(self, subject: Subject, operation: int) -> None:
        assert subject.send_to("null", argument(RLIMIT_MODE, operation, NO_VALUE)) == errno.ENOTTY

    @pytest.mark.parametrize("operation", [GET, SET])
    def test_a_descriptor_that_only_names_the_node(self, subject: Subject, operation: int) -> None:
        assert subject.send_to("path", argument(RLIMIT_MODE, operation, NO_VALUE)) == errno.EBADF

    def test_the_container_of_vfio(self, subject: Subject) -> None:
        question = argument(RLIMIT_MODE, GET, 77)
        error = subject.send_to("container", question)
        assert (error, question.val64) == ((errno.EINVAL, 77) if subject.legacy_container else (0, 1))
