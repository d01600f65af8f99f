# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import printable


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"qemu-system-x86", "qemu-system-x86"),
        ("vm-æøå".encode(), "vm-æøå"),
        (b"two\nlines", "two\\nlines"),
        (b"\x1b[2J", "\\x1b[2J"),
        (b"\xff)", "\\xff)"),
        ("\u202etxt".encode(), "\\u202etxt"),
    ],
)
def test_printable(raw: bytes, text: str) -> None:
    assert printable(raw) == text
