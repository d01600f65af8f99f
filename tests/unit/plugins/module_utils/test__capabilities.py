# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import struct

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._capabilities import (
    FileCapabilities,
    names,
    parse_file_capabilities,
)
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError

IPC_LOCK = 1 << 14


def test_names() -> None:
    assert names(0) == ()
    assert names(1 | IPC_LOCK | 1 << 24) == ("cap_chown", "cap_ipc_lock", "cap_sys_resource")
    assert names(1 << 40 | 1 << 41) == ("cap_checkpoint_restore", "cap_41")


@pytest.mark.parametrize(
    ("xattr", "given", "lifts"),
    [
        # What setcap cap_ipc_lock+ep writes.
        (struct.pack("<5I", 0x02000001, IPC_LOCK, 0, 0, 0), (["cap_ipc_lock"], [], True, 0), True),
        (struct.pack("<5I", 0x02000000, IPC_LOCK, 0, 0, 0), (["cap_ipc_lock"], [], False, 0), False),
        (struct.pack("<5I", 0x02000001, 0, IPC_LOCK, 0, 0), ([], ["cap_ipc_lock"], True, 0), False),
        (struct.pack("<5I", 0x02000001, 0, 0, 1 << 8, 0), (["cap_checkpoint_restore"], [], True, 0), False),
        # For root of a user namespace.
        (struct.pack("<6I", 0x03000001, IPC_LOCK, 0, 0, 0, 1000), (["cap_ipc_lock"], [], True, 1000), False),
        (struct.pack("<3I", 0x01000001, IPC_LOCK, 0), (["cap_ipc_lock"], [], True, 0), True),
        (b"", ([], [], False, 0), False),
    ],
)
def test_what_a_file_gives(xattr: bytes, given: tuple[list[str], list[str], bool, int], lifts: bool) -> None:
    assert parse_file_capabilities(xattr) == FileCapabilities(*given)
    assert parse_file_capabilities(xattr).lifts_memlock is lifts


@pytest.mark.parametrize("xattr", [b"\0", struct.pack("<5I", 0x04000000, 0, 0, 0, 0), struct.pack("<I", 0x02000000)])
def test_a_form_that_is_not_known(xattr: bytes) -> None:
    with pytest.raises(IommufdError, match=r"has a form that is not known: [0-9a-f]+\."):
        parse_file_capabilities(xattr)
