# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Processes to try the module on, ended with the test, a vDPA device, and the list of what users get to read."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _task_target
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, VM, Answer, Vmm, kernel_config, vdpa_device

Start = Callable[..., Vmm]
Told = Callable[[Answer], str]

# The kernel moves what is pinned to another process since 6.14, and the guests with such a one have a QEMU that asks.
LIVE_UPDATES = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 14)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", default="1/1", help="N/M: of the files with tests that run once, each M-th from the N-th on"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that run once, in another guest, and those of what this one cannot."""
    number, guests = map(int, config.getoption("share").split("/"))
    once = [item for item in items if item.get_closest_marker("once")]
    mine = sorted({item.path for item in once})[number - 1 :: guests]
    elsewhere = [item for item in once if item.path not in mine]
    elsewhere += [item for item in items if item.get_closest_marker("live") and not LIVE_UPDATES]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes, each of an ordinary user unless told otherwise."""
    started: list[Vmm] = []

    def start_one(user: int = VM) -> Vmm:
        started.append(Vmm(user))
        return started[-1]

    yield start_one
    for vmm in started:
        vmm.end()


@pytest.fixture
def vmm(start: Start) -> Vmm:
    """A process with a fresh iommufd."""
    started = start()
    started.open()
    return started


def descriptors() -> set[int]:
    """Those of this process, but for the one by which they are listed."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def in_this_process(_user: object, work: Callable[[], Any], _seconds: float) -> Any:
    """Does here what the module does in a child."""
    before = descriptors()
    try:
        return work()
    finally:
        # A child ends with what it leaves open.
        for fd in descriptors() - before:
            os.close(fd)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the module do here what it does in a child, so that a test can come in between its steps."""
    monkeypatch.setattr(_task_target, "in_child", in_this_process)


@pytest.fixture(scope="module")
def lingering() -> Iterator[None]:
    """A service manager of alice, who is not logged in."""
    subprocess.run(["loginctl", "enable-linger", "alice"], check=True)
    try:
        subprocess.run(["systemctl", "start", f"user@{ALICE}.service"], check=True)
        yield
    finally:
        subprocess.run(["loginctl", "disable-linger", "alice"], check=True)
        subprocess.run(["systemctl", "stop", f"user@{ALICE}.service"], check=True)


@pytest.fixture(scope="session")
def container_is_iommufd() -> bool:
    """Whether /dev/vfio/vfio is an iommufd, by the kernel's configuration."""
    return "CONFIG_IOMMUFD_VFIO_CONTAINER=y" in kernel_config()


@pytest.fixture(scope="module")
def vdpa() -> Iterator[str]:
    """The node of a simulated vDPA device that has memory pinned, as hardware has."""
    with vdpa_device(use_va=False) as node:
        yield node


@pytest.fixture
def told(record_property: Callable[[str, object], None]) -> Told:
    """What a user reads of an answer: the failure, or else the warnings. It goes into the report."""

    def message(answered: Answer) -> str:
        text = str(answered["msg"] if answered.get("failed") else " ".join(answered["warnings"]))
        record_property("message", text)
        return text

    return message
