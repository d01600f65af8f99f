# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is done in one place of the plugins is done there alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"


@pytest.mark.parametrize(
    ("act", "places"),
    [
        (r"^import ctypes", {"_syscalls", "_uapi"}),
        (r"ctypes\.CDLL", {"_syscalls"}),
        (r"os\.fork\(", {"_child"}),
        (r"os\.(set|get|remove)xattr\(\w+, XATTR|\"security\.capability\"", {"_capabilities"}),
        (r"os\.open\(DEVICE|= \"/dev/iommu\"", {"_device"}),
        (r"os\.setresuid\(user", {"_user"}),
        (r"\"(systemctl|systemd-run|journalctl|busctl)\"", {"_systemd"}),
        (r"\.(fail|exit)_json\(", {"_module"}),
        # A plugin's own files are imported relatively, so that it does not matter where they lie.
        (r"^(from|import) ansible_collections", set()),
    ],
)
def test_it_is_done_in_one_place(act: str, places: set[str]) -> None:
    files = [path for path in PLUGINS.rglob("*.py") if places or path.parent.name in ("module_utils", "modules")]
    assert len(files) > 20
    found = {path.stem for path in files if re.search(act, path.read_text("utf-8"), re.MULTILINE)}
    assert found == places
