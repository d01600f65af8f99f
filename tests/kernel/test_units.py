# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Units of the guest's systemd."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.virt.iommufd.tests.kernel.conftest import Told
from ansible_collections.virt.iommufd.tests.kernel.harness import PATIENCE
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

NAME = "kernel-test"
EXITED = "kernel-test-exited.service"


def pinner(*words: str) -> Any:
    """What the lab's program answers to its last step."""
    done = subprocess.run(["pinner", *words], check=True, capture_output=True, timeout=PATIENCE)
    return json.loads(done.stdout or b"[null]")[-1]


@pytest.fixture
def service() -> Iterator[str]:
    """A service that holds an iommufd."""
    try:
        pinner("start", NAME, "open")
        yield f"pinner-{NAME}.service"
    finally:
        pinner("stop", NAME)


def test_a_service(service: str) -> None:
    answered = run(unit=service, value="process")
    assert answered["changed"]
    assert answered["process"]["user"] == "vm"
    assert pinner("ask", NAME, "get") == {"pid": answered["process"]["pid"], "errno": None, "value": 1}


@pytest.fixture
def exited() -> Iterator[str]:
    """A service whose process has done its work."""
    lasting = ["--property=Type=oneshot", "--property=RemainAfterExit=yes"]
    subprocess.run(["systemd-run", "--quiet", f"--unit={EXITED}", *lasting, "true"], check=True)
    yield EXITED
    subprocess.run(["systemctl", "stop", EXITED], check=True)


def test_a_service_whose_process_has_ended(exited: str, told: Told) -> None:
    assert f"Unit {exited} has no main process now: it is active (exited)" in told(run(unit=exited))


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        ("emergency.service", "has no main process now: it is inactive (dead)"),
        ("vm@.service", "is a template and has no process: name an instance"),
        ("kernel-test-none.service", "systemd knows no unit kernel-test-none.service"),
        ("system.slice", "is of a kind that has no main process; it is active (active)"),
        ("init.scope", "is of a kind that has no main process; it is active (running)"),
        ("-H", "'-H' is not the name of a systemd unit"),
    ],
)
def test_units_without_a_process(told: Told, unit: str, words: str) -> None:
    assert words in told(run(unit=unit, value="process"))
