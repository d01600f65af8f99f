# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Yama at 3, which stays until the next reboot and would fail every other test: it runs by itself, after them."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.virt.iommufd.tests.kernel.conftest import Told
from ansible_collections.virt.iommufd.tests.kernel.harness import Vmm
from ansible_collections.virt.iommufd.tests.kernel.run_module import run


def test_root_under_yama_3(vmm: Vmm, told: Told) -> None:
    Path("/proc/sys/kernel/yama/ptrace_scope").write_text("3")
    message = told(run(pid=vmm.pid, value="process"))
    assert "does not let this caller (uid 0) share its descriptor" in message
    assert "Yama below 3 (kernel.yama.ptrace_scope is 3)" in message
    assert vmm.mode == "user"
