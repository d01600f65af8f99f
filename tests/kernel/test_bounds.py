# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One user who has as much of everything as a host lets him. Whoever looks ends, in little memory, and tells the rest.

The look runs as a program of its own, whose greatest size is known then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._tables import TOO_MANY, TOO_MANY_HOLDERS
from ansible_collections.virt.iommufd.tests.kernel.conftest import Start
from ansible_collections.virt.iommufd.tests.kernel.harness import ALICE, RUN_MODULE, TREE, VM, Answer
from ansible_collections.virt.iommufd.tests.kernel.info import limits

pytestmark = pytest.mark.once

UNIT = "crowd-of-one.service"
CROWD = Path(__file__).with_name("crowd_of_one.py")

# What a host of 2,000 processes may cost, in bytes; and what is sent to the controller.
MEMORY = 64 * 2**20
ANSWER = 8 * 2**20
# In seconds, under emulation, on a busy machine. Without bounds it is the better part of an hour.
PATIENCE = 400


@contextmanager
def crowd(descriptors: int, shared: int, copies: int) -> Iterator[None]:
    """A user's processes, who all show a guest's name of 128 kB, while the context lasts."""
    # The longest argument that the kernel takes.
    name = "guest=" + "x" * (2**17 - 32)
    command = f"{sys.executable} -I -S {CROWD} {descriptors} {shared} {copies} -name {name}"
    output = Path("/run/crowd-of-one")
    output.unlink(missing_ok=True)
    limits = ["TasksMax=infinity", "LimitNPROC=infinity", f"LimitNOFILE={descriptors + 64}"]
    script = Path("/run/crowd-of-one.sh")
    # systemd takes no argument of this length.
    script.write_text(f"exec {command} > {output}\n")
    properties = [f"--property={each}" for each in limits]
    subprocess.run(["systemd-run", "--quiet", "--collect", f"--unit={UNIT}", *properties, "sh", script], check=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (output.exists() and output.read_text()):
            assert time.monotonic() < deadline, "The crowd is not there."
            time.sleep(0.2)
        assert int(output.read_text()) == shared + copies
        yield
    finally:
        subprocess.run(["systemctl", "stop", UNIT], check=False)


def look() -> tuple[Answer, int, int, float]:
    """The module's answer to root, its length, the greatest size of the program in bytes, and how long it took."""
    options = json.dumps({"gather_subset": ["processes", "users"]})
    environment = {**os.environ, "PYTHONPATH": str(TREE), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["timeout", str(PATIENCE), sys.executable, str(RUN_MODULE), options, "iommufd_info"]
    began = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as program:
        assert program.stdout
        text = program.stdout.read()
        _pid, status, usage = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
    assert program.returncode == 0, "It has failed, or took too long."
    return json.loads(text), len(text), usage.ru_maxrss * 1024, time.monotonic() - began


def test_one_user_with_processes_and_descriptors_without_end(
    start: Start, record_property: Callable[[str, object], None]
) -> None:
    honest = start(ALICE)
    honest.open()
    with crowd(descriptors=280_000, shared=3000, copies=4):
        answered, length, memory, took = look()
    record_property("figures", f"{memory / 2**20:.1f} MiB, {length} bytes, {took:.1f} s")
    assert memory < MEMORY
    assert length < ANSWER
    rows = {each["pid"]: each for each in answered["processes"]}
    # Nobody else is hidden by that.
    assert rows[honest.pid]["accounting"] == "user"
    assert len(rows) > 1
    assert all(len(each["iommufds"]) <= 256 for each in rows.values())
    theirs = [each for each in rows.values() if each["uid"] == VM]
    # Of what was not looked at nobody knows how it is accounted.
    assert {each["accounting"] for each in theirs} == {None}
    assert all(len(each["name"]) < 300 for each in theirs)
    said = limits(answered)
    assert TOO_MANY in said["descriptors"]
    assert TOO_MANY_HOLDERS in said["iommufds"]
