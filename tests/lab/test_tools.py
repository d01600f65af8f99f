# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a guest needs of this machine: asked for by those alone who use the guest, and plainly said where it lacks."""

from __future__ import annotations

from pathlib import Path

import cli
import pytest
import tools
from guests import AMD64, ARM64, GUESTS
from progress import LabError


def test_a_guest_of_another_architecture_costs_nothing_to_whoever_does_not_use_it() -> None:
    own = [guest for guest in GUESTS.values() if guest.architecture == AMD64]
    assert {tool.architecture for tool in tools.needed(own)} == {""}
    more = {tool.package for tool in tools.needed([*own, GUESTS["arm64"]])} - {
        tool.package for tool in tools.needed(own)
    }
    assert more == {"qemu-system-arm", "qemu-user-static", "arch-test"}


@pytest.fixture
def without_emulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernel has no interpreter for other architectures' programs."""
    program = tmp_path / "arch-test"
    program.write_text('#!/bin/sh\necho "$1: not supported on this machine/kernel"\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("without_emulation")
def test_a_machine_that_does_not_run_its_programs_says_so_and_what_to_do() -> None:
    with pytest.raises(LabError, match=r"does not run programs of arm64.* binfmt_misc\. As root: .*qemu-aarch64\.conf"):
        tools.require_programs(ARM64)
    # Its own it runs.
    tools.require_programs(AMD64)


@pytest.mark.usefixtures("without_emulation")
def test_the_list_of_tools_says_so_for_that_guest_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tools", "arm64"]) == 1
    assert "does not run programs of arm64" in capsys.readouterr().out
    cli.main(["tools"])
    told = capsys.readouterr().out
    assert "arm64" not in told
    assert "qemu-system-x86_64" in told


@pytest.mark.usefixtures("without_emulation")
def test_who_may_not_register_it_is_told_so_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sudo = tmp_path / "sudo"
    sudo.write_text("#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n")
    sudo.chmod(0o755)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(tools, "missing", lambda guests: [])
    with pytest.raises(LabError, match=r"does not run programs of arm64.* As root: "):
        tools.install([GUESTS["arm64-16k"]])
    # Who asks for others is not troubled.
    tools.install([GUESTS["fallback"]])
