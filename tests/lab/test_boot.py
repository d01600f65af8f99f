# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A guest that dies while it boots is booted once more, which is said; with a real guest: see with_a_guest.py."""

from __future__ import annotations

from pathlib import Path

import machine
import pytest
from guests import guest_named
from progress import LabError

STATE = machine.State(1, 1, "", 22, "kernel", "6.12", "root")


@pytest.mark.parametrize("panics", [0, 1, 2])
def test_a_boot_that_ends_in_a_panic(
    panics: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boots: list[Path] = []

    def boot(kernel: Path, _root: Path, _port: int | None) -> machine.State:
        boots.append(kernel)
        if len(boots) <= panics:
            raise machine._Died(f"panic {len(boots)}")
        return STATE

    guest = machine.Machine(guest_named("fallback"))
    monkeypatch.setattr(guest, "_boot_once", boot)
    if panics < 2:
        assert guest._boot(Path("kernel"), Path("root")) == STATE
    else:
        with pytest.raises(LabError, match="panic 2"):
            guest._boot(Path("kernel"), Path("root"))
    assert len(boots) == min(panics, 1) + 1
    assert ("booted once more: panic 1" in capsys.readouterr().err) == (panics > 0)
