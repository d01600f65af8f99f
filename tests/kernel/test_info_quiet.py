# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""iommufd_info changes nothing, wakes nobody and leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, CONTAINER, DEVICES, MIB, Vmm
from ansible_collections.virt.iommufd.tests.kernel.info import look, look_apart, status_of
from ansible_collections.virt.iommufd.tests.kernel.run_module import run
from ansible_collections.virt.iommufd.tests.kernel.test_host import no_iommufd

__all__ = ("no_iommufd",)

ALL = "host processes users"


def active_units() -> list[str]:
    command = ["systemctl", "list-units", "--state=active,activating", "--plain", "--no-legend", "libvirt*", "virt*"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(line.split()[0] for line in shown.splitlines())


def modules() -> list[str]:
    return sorted(line.split()[0] for line in Path("/proc/modules").read_text().splitlines())


def traced(path: Path) -> str:
    """The files that a run opened, the programs that it became, and the sockets that it connected to."""
    look_apart(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=open,openat,openat2,execve,connect", "-o", str(path)], ALL
    )
    text = path.read_text()
    programs = re.findall(r'execve\("([^"]*)".* = 0$', text, re.MULTILINE)
    own = [os.path.basename(each) for each in programs if "python" not in each and "env" not in each]
    assert own == ["systemctl"]
    assert not re.search(r"connect\(.*libvirt", text)
    return text


def test_nothing_is_woken(no_iommufd: None, tmp_path: Path) -> None:
    sockets = [unit for unit in active_units() if unit.endswith(".socket")]
    assert sockets
    services = [each for each in active_units() if each.endswith(".service")]
    subprocess.run(["systemctl", "stop", *services, "libvirtd.service"], check=True)
    before = active_units(), modules()
    assert not [each for each in before[0] if each.endswith(".service")]
    opened = traced(tmp_path / "trace")
    assert (active_units(), modules()) == before
    assert '"/dev/iommu"' not in opened
    assert '"/dev/vfio' not in opened


def test_what_is_opened_with_a_vmm_at_work(start: Start, tmp_path: Path) -> None:
    vmm = start()
    vmm.open()
    vmm.do("attach", DEVICES[0])
    before = active_units(), modules()
    opened = traced(tmp_path / "trace")
    assert (active_units(), modules()) == before
    assert len(re.findall('"/dev/iommu"', opened)) == 1
    assert set(re.findall('"/dev/vfio[^"]*"', opened)) == {'"/dev/vfio/vfio"'}
    assert f'"/proc/{vmm.pid}/fd"' in opened
    assert not re.search(r'"/proc/\d+/fd/\d+"', opened)


def state(vmm: Vmm) -> tuple[str, str, str, dict[str, str]]:
    status = status_of(vmm.pid)
    return vmm.mode, status["VmPin"], status["VmLck"], vmm.do("look")["fds"]


def open_descriptors() -> dict[str, str]:
    names = os.listdir("/proc/self/fd")
    # The one that lists them is gone by now.
    return {name: os.readlink(f"/proc/self/fd/{name}") for name in names if os.path.lexists(f"/proc/self/fd/{name}")}


def test_nothing_is_changed_and_nothing_stays_open(start: Start) -> None:
    fresh, mine, busy, container = start(ALICE), start(), start(), start()
    fresh.open()
    fd = mine.open()
    assert run(pid=mine.pid, fd=fd, value="process")["changed"]
    mine.do("attach", DEVICES[0])
    busy.open()
    busy.do("attach", DEVICES[1])
    for each in (mine, busy):
        each.do("pin", str(MIB))
    container.open()
    container.do("open", CONTAINER, "r")
    before = [state(each) for each in (fresh, mine, busy, container)]
    assert [each[0] for each in before] == ["user", "process", "user", "user"]
    ours = open_descriptors()
    for subset in (ALL, "processes", "users", "host"):
        look(subset)
    look(ALL, _ansible_check_mode=True)
    assert open_descriptors() == ours
    assert [state(each) for each in (fresh, mine, busy, container)] == before
    # What could be set still can.
    fresh.do("attach", DEVICES[2])
