# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Yama at 3, which stays until the next reboot and would fail every other test: it runs by itself, after them."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.virt.iommufd.tests.kernel.conftest import Told
from ansible_collections.virt.iommufd.tests.kernel.harness import Vmm
from ansible_collections.virt.iommufd.tests.kernel.info import limits, look, process
from ansible_collections.virt.iommufd.tests.kernel.run_module import run


def test_root_under_yama_3(vmm: Vmm, told: Told) -> None:
    Path("/proc/sys/kernel/yama/ptrace_scope").write_text("3")
    message = told(run(pid=vmm.pid, value="process"))
    assert "does not let this caller (uid 0) share its descriptor" in message
    assert "Yama below 3 (kernel.yama.ptrace_scope is 3)" in message
    assert vmm.mode == "user"


def test_what_iommufd_info_tells_under_yama_3(vmm: Vmm) -> None:
    Path("/proc/sys/kernel/yama/ptrace_scope").write_text("3")
    answered = look("host processes users")
    assert answered["host"]["yama_ptrace_scope"] == 3
    row = process(answered, vmm.pid)
    assert (row["accounting"], row["iommufds"][0]["rlimit_mode"]) == (None, None)
    assert "kernel.yama.ptrace_scope is 3" in row["iommufds"][0]["msg"]
    assert "kernel.yama.ptrace_scope below 3" in limits(answered)["iommufds"]
