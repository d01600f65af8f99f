# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _uapi
from ansible_collections.virt.iommufd.plugins.module_utils._change import Result, change, decide, explain, judge
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import (
    BUSY,
    CHANGED,
    DENIED,
    FAILED,
    HUGE_PAGES,
    RACED,
    RLIMIT_MODE,
    UNCHANGED,
    UNSUPPORTED,
    Answer,
    IommuFd,
)
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel

USER, PROCESS = 0, 1


def valid_sets(kernel: FakeKernel) -> list[int]:
    return [value for op, value in kernel.calls if op == _uapi.IOMMU_OPTION_OP_SET and value in (0, 1)]


@pytest.mark.parametrize(
    ("before", "wanted", "probe", "expected"),
    [
        pytest.param(Answer(value=0), None, Answer(), Result(UNCHANGED, 0, 0), id="query"),
        pytest.param(Answer(value=1), 1, Answer(), Result(UNCHANGED, 1, 1), id="in force"),
        pytest.param(Answer(value=0), 1, Answer(errno.EINVAL), Result(CHANGED, 0, 1), id="settable"),
        pytest.param(Answer(value=0), 1, Answer(), Result(CHANGED, 0, 1), id="cannot be probed"),
        pytest.param(Answer(value=0), 1, Answer(errno.EPERM), Result(DENIED, 0, 0, errno.EPERM), id="denied"),
        pytest.param(Answer(value=0), 1, Answer(errno.EBUSY), Result(BUSY, 0, 0, errno.EBUSY), id="busy"),
        pytest.param(Answer(value=0), 1, Answer(errno.EIO), Result(FAILED, 0, 0, errno.EIO), id="unheard-of"),
        pytest.param(
            Answer(errno.ENOTTY), 1, Answer(), Result(UNSUPPORTED, None, None, errno.ENOTTY), id="no such ioctl"
        ),
        pytest.param(
            Answer(errno.EOPNOTSUPP), None, Answer(), Result(UNSUPPORTED, None, None, errno.EOPNOTSUPP), id="no option"
        ),
        pytest.param(Answer(errno.ENOENT), 1, Answer(), Result(FAILED, None, None, errno.ENOENT), id="no such IOAS"),
        pytest.param(Answer(errno.EPERM), 1, Answer(), Result(FAILED, None, None, errno.EPERM), id="GET is filtered"),
    ],
)
def test_decide(before: Answer, wanted: int | None, probe: Answer, expected: Result) -> None:
    assert decide(before, wanted, probe) == expected


@pytest.mark.parametrize(
    ("refusal", "after", "expected"),
    [
        pytest.param(0, Answer(value=1), Result(CHANGED, 0, 1), id="done"),
        pytest.param(0, Answer(value=0), Result(RACED, 0, 0), id="undone by somebody else"),
        pytest.param(errno.EBUSY, Answer(value=1), Result(UNCHANGED, 0, 1), id="done by somebody else"),
        pytest.param(errno.EBUSY, Answer(value=0), Result(BUSY, 0, 0, errno.EBUSY), id="busy"),
        pytest.param(errno.EPERM, Answer(value=0), Result(DENIED, 0, 0, errno.EPERM), id="denied"),
        pytest.param(errno.EINVAL, Answer(value=0), Result(FAILED, 0, 0, errno.EINVAL), id="value rejected"),
        pytest.param(0, Answer(errno.EIO), Result(FAILED, 0, None, errno.EIO), id="cannot be read back"),
    ],
)
def test_judge(refusal: int, after: Answer, expected: Result) -> None:
    assert judge(Answer(value=0), 1, refusal, after) == expected


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("state", "wanted", "expected"),
    [
        pytest.param({}, PROCESS, Result(CHANGED, USER, PROCESS), id="set"),
        pytest.param({"mode": PROCESS}, USER, Result(CHANGED, PROCESS, USER), id="set back"),
        pytest.param({"mode": PROCESS}, PROCESS, Result(UNCHANGED, PROCESS, PROCESS), id="in force"),
        pytest.param({"mode": PROCESS}, None, Result(UNCHANGED, PROCESS, PROCESS), id="query"),
        pytest.param({"ioases": {1: 1}}, PROCESS, Result(BUSY, USER, USER, errno.EBUSY), id="busy"),
        pytest.param({"ioases": {1: 1}}, USER, Result(UNCHANGED, USER, USER), id="busy, in force"),
        pytest.param({"privileged": False}, PROCESS, Result(DENIED, USER, USER, errno.EPERM), id="denied"),
        pytest.param({"privileged": False}, USER, Result(UNCHANGED, USER, USER), id="denied, in force"),
        pytest.param(
            {"without": errno.ENOTTY}, PROCESS, Result(UNSUPPORTED, None, None, errno.ENOTTY), id="no such ioctl"
        ),
        pytest.param(
            {"without": errno.EOPNOTSUPP}, None, Result(UNSUPPORTED, None, None, errno.EOPNOTSUPP), id="no such option"
        ),
    ],
)
def test_change(
    kernel: FakeKernel, state: dict[str, object], wanted: int | None, expected: Result, dry_run: bool
) -> None:
    for name, value in state.items():
        setattr(kernel, name, value)
    mode = kernel.mode
    assert change(IommuFd(0), RLIMIT_MODE, wanted, dry_run=dry_run) == expected
    assert kernel.mode == (wanted if expected.outcome == CHANGED and not dry_run else mode)
    assert valid_sets(kernel) == ([wanted] if expected.outcome == CHANGED and not dry_run else [])


def test_change_tells_when_somebody_else_was_quicker(kernel: FakeKernel) -> None:
    kernel.after_set = lambda fake: setattr(fake, "mode", USER)
    assert change(IommuFd(0), RLIMIT_MODE, PROCESS) == Result(RACED, USER, USER)


def test_change_sees_that_somebody_else_did_the_same(kernel: FakeKernel) -> None:
    def libvirt_sets_and_attaches(fake: FakeKernel) -> None:
        fake.mode, fake.ioases = PROCESS, {1: 1}

    kernel.before_set = libvirt_sets_and_attaches
    assert change(IommuFd(0), RLIMIT_MODE, PROCESS) == Result(UNCHANGED, USER, PROCESS)


@pytest.mark.parametrize(
    ("state", "object_id", "wanted", "expected"),
    [
        pytest.param({}, 1, 0, Result(CHANGED, 1, 0), id="off"),
        pytest.param({"privileged": False}, 1, 0, Result(CHANGED, 1, 0), id="takes no privilege"),
        pytest.param({"mapped": {1}}, 1, 0, Result(FAILED, 1, 1, errno.EINVAL), id="memory is mapped"),
        pytest.param({}, 2, 0, Result(FAILED, None, None, errno.ENOENT), id="no such IOAS"),
        pytest.param({}, 1, None, Result(UNCHANGED, 1, 1), id="query"),
    ],
)
def test_change_of_one_ioas(
    kernel: FakeKernel, state: dict[str, object], object_id: int, wanted: int | None, expected: Result
) -> None:
    kernel.ioases = {1: 1}
    for name, value in state.items():
        setattr(kernel, name, value)
    assert change(IommuFd(0), HUGE_PAGES, wanted, object_id) == expected


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Result(UNSUPPORTED, None, None, errno.ENOTTY), ["IOMMU_OPTION", "ENOTTY", "accounted per user"]),
        (Result(UNSUPPORTED, None, None, errno.EOPNOTSUPP), ["the option rlimit_mode", "EOPNOTSUPP"]),
        (Result(DENIED, 0, 0, errno.EPERM), ["CAP_SYS_RESOURCE", "CAP_IPC_LOCK", "stays with rlimit_mode=user"]),
        (Result(BUSY, 0, 0, errno.EBUSY), ["holds objects already", "restart the VM", "stays with rlimit_mode=user"]),
        (Result(RACED, 0, 0), ["rlimit_mode=process was set", "rlimit_mode=user is in force"]),
        (Result(FAILED, 0, 0, errno.EINVAL), ["rlimit_mode=process failed", "EINVAL", "Invalid argument"]),
        (Result(FAILED, 0, None, errno.EIO), ["EIO"]),
    ],
)
def test_explain_names_the_thing_and_the_way_out(result: Result, words: list[str]) -> None:
    text = explain(result, "iommufd 9 of qemu (pid 42)", RLIMIT_MODE, PROCESS)
    assert text.startswith("iommufd 9 of qemu (pid 42)")
    for word in words:
        assert word in text


def test_explain_has_nothing_to_say_of_success() -> None:
    assert explain(Result(CHANGED, 0, 1), "iommufd 9", RLIMIT_MODE, PROCESS) == ""
    assert explain(Result(UNCHANGED, 1, 1), "iommufd 9", RLIMIT_MODE, None) == ""
