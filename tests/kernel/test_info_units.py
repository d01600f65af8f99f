# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where processes with an iommufd belong: units, namespaces, control groups. systemd's own library is asked too."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, DEVICES, MIB, PATIENCE, Answer, as_user, pinner
from ansible_collections.virt.iommufd.tests.kernel.info import check_process, look, look_at

NAME = "kernel-test-info"
HOLD = ["python3", "-I", "-S", "-c", "import os, time; os.open('/dev/iommu', os.O_RDWR); time.sleep(600)"]
USER = [*as_user(ALICE), "env", f"XDG_RUNTIME_DIR=/run/user/{ALICE}"]


def shown(columns: str, pid: int) -> str:
    """What ps shows of a process."""
    return subprocess.run(["ps", "-o", columns, "-p", str(pid)], check=True, capture_output=True, text=True).stdout


def units_by_systemd(pid: int) -> tuple[str | None, str | None]:
    unit, user_unit = (None if each == "-" else each for each in shown("unit=,uunit=", pid).split())
    return unit, user_unit


def units(row: Answer) -> tuple[str | None, str | None]:
    assert (row["unit"], row["user_unit"]) == units_by_systemd(row["pid"])
    return row["unit"], row["user_unit"]


def only_process() -> Answer:
    """The row of the one process with an iommufd, once there is one."""
    deadline = time.monotonic() + PATIENCE
    while not (rows := look()["processes"]):
        assert time.monotonic() < deadline
    assert len(rows) == 1
    row: Answer = rows[0]
    check_process(row, row["pid"])
    return row


def seconds(time: str) -> int:
    """A time in seconds since the epoch."""
    return int(subprocess.run(["date", f"--date={time}", "+%s"], check=True, capture_output=True).stdout)


def test_by_hand(start: Start) -> None:
    vmm = start()
    vmm.open()
    unit, user_unit = units(look_at(vmm))
    assert unit
    assert unit.endswith((".scope", ".service"))
    assert user_unit is None


@pytest.mark.parametrize("apart", [[], ["--apart"]])
def test_a_service(apart: list[str]) -> None:
    try:
        steps = f"open + attach {DEVICES[0]} + map 2 + look"
        itself = pinner("start", NAME, "--limit", "10M", *apart, steps)
        row = only_process()
        assert units(row) == (f"pinner-{NAME}.service", None)
        assert (row["pid"], row["user"], row["comm"]) == (itself["pid"], "vm", "pinner")
        assert (row["pinned_bytes"], row["locked_bytes"]) == (itself["vm_pin_kb"] * 1024, itself["vm_lck_kb"] * 1024)
        assert (row["accounting"], row["charged_bytes"], row["headroom_bytes"]) == ("user", 2 * MIB, 8 * MIB)
        apart_by_kernel = os.readlink(f"/proc/{row['pid']}/ns/pid") != os.readlink("/proc/self/ns/pid")
        assert apart_by_kernel == bool(apart)
        assert abs(seconds(row["started"]) - seconds(shown("lstart=", row["pid"]))) <= 2
    finally:
        # The first process of a pid namespace is deaf to a polite end.
        subprocess.run(["systemctl", "kill", "--signal=KILL", f"pinner-{NAME}.service"], check=False)
        pinner("stop", NAME)


def test_a_scope() -> None:
    scope = ["systemd-run", "--quiet", "--scope", "--collect", f"--unit={NAME}.scope", "--slice=machine.slice"]
    holding = subprocess.Popen([*scope, *HOLD])
    try:
        assert units(only_process()) == (f"{NAME}.scope", None)
    finally:
        holding.kill()
        holding.wait()


# Names that systemd has to escape, as control groups: its own escape with an underscore, and those of libvirt's scopes.
@pytest.mark.parametrize("unit", ["_kernel-test.service", "cpu.kernel-test.service", r"machine-qemu\x2d1\x2dvm1.scope"])
def test_a_unit_with_a_name_that_is_escaped(unit: str) -> None:
    kind = ["--scope"] if unit.endswith(".scope") else []
    holding = subprocess.Popen(["systemd-run", "--quiet", "--collect", *kind, f"--unit={unit}", *HOLD])
    try:
        row = only_process()
        assert units(row) == (unit, None)
    finally:
        subprocess.run(["systemctl", "stop", unit], check=True)
        holding.wait()


@pytest.mark.usefixtures("lingering")
@pytest.mark.parametrize("kind", ["service", "scope"])
def test_a_unit_of_a_users_manager(kind: str) -> None:
    unit = f"{NAME}.{kind}"
    how = ["--scope"] if kind == "scope" else []
    holding = subprocess.Popen([*USER, "systemd-run", "--user", "--quiet", "--collect", *how, f"--unit={unit}", *HOLD])
    try:
        row = only_process()
        assert units(row) == (f"user@{ALICE}.service", unit)
        assert row["user"] == "alice"
    finally:
        subprocess.run([*USER, "systemctl", "--user", "stop", unit], check=True)
        holding.wait()


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where a control group can be made by hand."""
    top = Path("/sys/fs/cgroup", request.param)
    top.mkdir()
    yield top
    for path in sorted(top.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
    top.rmdir()


@pytest.mark.parametrize(
    ("group", "name", "shown"),
    [
        # Whoever was given a group names those below it as he likes.
        ("kernel-test", b"no-unit", None),
        ("kernel-test", b"user@1002.service", None),
        ("kernel-test", b"a.scope", None),
        # systemd names a unit's after it, and puts it below those of slices.
        ("kerneltest.slice", b"user@1002.service", "user@1002.service"),
        ("kerneltest.slice", b"a:b.scope", "a:b.scope"),
        # These are no names of units.
        ("kerneltest.slice", b"no-unit", None),
        ("kerneltest.slice", b"a\x1b[31mb\xe2\x80\xae\xff.service", None),
        ("kerneltest.slice", b"a:b c\t.scope", None),
    ],
    indirect=["group"],
)
def test_a_control_group_names_a_unit_where_systemd_made_it(
    start: Start, group: Path, name: bytes, shown: str | None
) -> None:
    vmm = start()
    vmm.open()
    path = os.path.join(os.fsencode(group), name)
    os.mkdir(path)
    with open(os.path.join(path, b"cgroup.procs"), "w") as procs:
        procs.write(str(vmm.pid))
    row = look_at(vmm)
    vmm.end()
    assert (row["unit"], row["user_unit"]) == (shown, None)
