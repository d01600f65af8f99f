# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Several iommufds and IOASes on a real kernel, and what many runs leave behind."""

from __future__ import annotations

import os

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _process
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import RLIMIT_MODE
from ansible_collections.virt.iommufd.plugins.module_utils._target import PidTarget, hold_target
from ansible_collections.virt.iommufd.plugins.modules.iommufd_option import Job, work_on
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start, Told
from ansible_collections.virt.iommufd.tests.kernel.harness import CONTAINER, Vmm, kernel_config
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

DEVICE = "/dev/vfio/devices/vfio0"


def test_huge_pages(vmm: Vmm, told: Told) -> None:
    first, second = vmm.do("alloc")["ioas_id"], vmm.do("alloc")["ioas_id"]
    answered = run(pid=vmm.pid, option="huge_pages")
    assert [(each["ioas_id"], each["after"]) for each in answered["iommufds"]] == [(first, True), (second, True)]
    assert answered["value"] is True
    assert answered["truncated"] is False
    foretold = run(pid=vmm.pid, option="huge_pages", value=False, _ansible_check_mode=True)
    assert foretold["changed"]
    assert vmm.do("get", "huge_pages", str(second))["value"] == 1
    assert run(pid=vmm.pid, option="huge_pages", value=False, ioas_id=second)["changed"]
    assert vmm.do("get", "huge_pages", str(first))["value"] == 1
    assert vmm.do("get", "huge_pages", str(second))["value"] == 0
    assert run(pid=vmm.pid, option="huge_pages")["value"] is None
    answered = run(pid=vmm.pid, option="huge_pages", value=False)
    assert [each["outcome"] for each in answered["iommufds"]] == ["changed", "unchanged"]
    assert vmm.do("get", "huge_pages", str(first))["value"] == 0
    missing = run(pid=vmm.pid, option="huge_pages", ioas_id=second + 1, value=False)
    assert "It has no IOAS of this id" in told(missing)


def test_huge_pages_with_memory_mapped(start: Start, told: Told) -> None:
    vmm = start(0)
    vmm.open()
    mapped = vmm.do("attach", DEVICE)["ioas_id"]
    vmm.do("map", "1")
    free = vmm.do("alloc")["ioas_id"]
    answered = run(pid=vmm.pid, option="huge_pages", value=False)
    message = told(answered)
    assert "The kernel turns huge pages off only while no memory is mapped" in message
    assert message.startswith(f"IOAS {mapped} of iommufd ")
    assert f"Changed all the same: IOAS {free} of iommufd " in message
    assert answered["changed"]
    assert vmm.do("get", "huge_pages", str(mapped))["value"] == 1
    assert vmm.do("get", "huge_pages", str(free))["value"] == 0


def test_huge_pages_without_an_ioas(vmm: Vmm, told: Told) -> None:
    assert "hold no IOAS" in told(run(pid=vmm.pid, option="huge_pages"))


@pytest.mark.parametrize("tolerate", [["busy"], []])
def test_one_iommufd_busy_and_one_free(vmm: Vmm, told: Told, tolerate: list[str]) -> None:
    vmm.do("alloc")
    busy = run(pid=vmm.pid)["iommufds"][0]["fd"]
    free = vmm.open()
    answered = run(pid=vmm.pid, value="process", tolerate=tolerate)
    message = told(answered)
    assert answered["changed"]
    assert answered["value"] is None
    assert {each["fd"]: each["outcome"] for each in answered["iommufds"]} == {busy: "busy", free: "changed"}
    assert message.startswith(f"iommufd {busy} of ")
    assert "holds objects already" in message
    assert answered.get("failed", False) == (not tolerate)
    assert message.endswith(f"Changed all the same: iommufd {free}.") == (not tolerate)
    assert vmm.mode == "process"


def test_a_query_and_a_check_change_nothing(vmm: Vmm) -> None:
    assert run(pid=vmm.pid)["value"] == "user"
    assert run(pid=vmm.pid, value="process", _ansible_check_mode=True)["changed"]
    assert vmm.mode == "user"


def open_descriptors() -> dict[str, str]:
    names = os.listdir("/proc/self/fd")
    # The one that lists them is gone by now.
    return {name: os.readlink(f"/proc/self/fd/{name}") for name in names if os.path.lexists(f"/proc/self/fd/{name}")}


@pytest.mark.once
def test_a_thousand_runs_leave_no_descriptor_behind(vmm: Vmm, start: Start) -> None:
    iommufd = vmm.open()
    other = vmm.do("open", os.devnull, "r")["fd"]
    without = start()
    theirs, ours = vmm.do("look")["fds"], open_descriptors()
    failed = 0
    for turn in range(1000):
        target, fd = [(vmm, iommufd), (vmm, other), (vmm, None), (without, None), (vmm, 999)][turn % 5]
        try:
            with hold_target(PidTarget(target.pid)) as process:
                work_on(fd, Job(RLIMIT_MODE, None, turn // 5 % 2, turn % 3 == 0), process)
        except IommufdError:
            failed += 1
            continue
        # A failure with a descriptor that was asked for is told in its row.
    assert failed == 200
    assert open_descriptors() == ours
    assert vmm.do("look")["fds"] == theirs


def test_the_process_itself_tells_a_shared_descriptor_from_a_new_one(vmm: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that these tests would notice: the mistake is reported as a success, and changes nothing."""
    with monkeypatch.context() as mistake:
        mistake.setattr(_process, "pidfd_getfd", lambda _pidfd, fd: os.open(f"/proc/{vmm.pid}/fd/{fd}", os.O_RDWR))
        answered = run(pid=vmm.pid, value="process")
    assert answered["changed"]
    assert answered["value"] == "process"
    assert vmm.mode == "user"
    assert run(pid=vmm.pid, value="process")["changed"]
    assert vmm.mode == "process"


def test_a_vfio_container_counts_where_iommufd_provides_it(start: Start, told: Told) -> None:
    # That is for the kernel's configuration to say; the module has nothing but what its own open of it answers.
    provided = "CONFIG_IOMMUFD_VFIO_CONTAINER=y" in kernel_config()
    vmm = start(0)
    fd = vmm.open(CONTAINER)
    if provided:
        assert run(pid=vmm.pid)["value"] == vmm.mode == "process"
        assert run(pid=vmm.pid, fd=fd, value="user")["changed"]
        assert vmm.mode == "user"
    else:
        assert f"Descriptor {fd} of " in told(run(pid=vmm.pid, fd=fd, value="process"))
        assert "holds no iommufd" in run(pid=vmm.pid, value="process")["msg"]
