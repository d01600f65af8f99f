# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import struct

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._capabilities import (
    FileCapabilities,
    capability_names,
    parse_file_capabilities,
    with_ipc_lock,
    without_ipc_lock,
)
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError

IPC_LOCK = 1 << 14


def test_names() -> None:
    assert capability_names(0) == ()
    assert capability_names(1 | IPC_LOCK | 1 << 24) == ("cap_chown", "cap_ipc_lock", "cap_sys_resource")
    assert capability_names(1 << 40 | 1 << 41) == ("cap_checkpoint_restore", "cap_41")


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


@pytest.mark.parametrize(
    "xattr",
    [
        b"\0",
        struct.pack("<5I", 0x04000000, 0, 0, 0, 0),
        struct.pack("<I", 0x02000000),
        # Of another length than the kernel's, or with a flag that has no meaning yet.
        struct.pack("<6I", 0x02000001, 0, 0, 0, 0, 0),
        struct.pack("<5I", 0x03000001, 0, 0, 0, 0),
        struct.pack("<5I", 0x02000003, 0, 0, 0, 0),
    ],
)
def test_a_form_that_is_not_known(xattr: bytes) -> None:
    with pytest.raises(IommufdError, match=r"has a form that is not known: [0-9a-f]+\."):
        parse_file_capabilities(xattr)


NET_RAW = 1 << 13
GRANTED = struct.pack("<5I", 0x02000001, IPC_LOCK, 0, 0, 0)
BESIDE_NET_RAW = struct.pack("<5I", 0x02000001, IPC_LOCK | NET_RAW, 0, 0, 0)
NET_RAW_ALONE = struct.pack("<5I", 0x02000001, NET_RAW, 0, 0, 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, GRANTED),
        (b"", GRANTED),
        (GRANTED, GRANTED),
        (NET_RAW_ALONE, BESIDE_NET_RAW),
        # Revision 1 has no second word. What setcap writes is always of revision 2.
        (struct.pack("<3I", 0x01000001, NET_RAW, 0), BESIDE_NET_RAW),
        # A capability beyond the first 32, and an inheritable one.
        (
            struct.pack("<5I", 0x02000001, 0, NET_RAW, 1 << 8, 0),
            struct.pack("<5I", 0x02000001, IPC_LOCK, NET_RAW, 1 << 8, 0),
        ),
        # Its own, though not effective, and the newer form for the initial user namespace.
        (struct.pack("<5I", 0x02000000, IPC_LOCK, 0, 0, 0), GRANTED),
        (struct.pack("<6I", 0x03000001, NET_RAW, 0, 0, 0, 0), BESIDE_NET_RAW),
    ],
)
def test_given_too(before: bytes | None, after: bytes) -> None:
    assert with_ipc_lock(before) == after
    assert parse_file_capabilities(after).lifts_memlock


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (struct.pack("<5I", 0x02000000, NET_RAW, 0, 0, 0), "cap_net_raw that are not effective"),
        (
            struct.pack("<6I", 0x03000001, NET_RAW, 0, 0, 0, 7),
            r"\(cap_net_raw\) are for the user namespace of uid 7 only",
        ),
        # However little it is: a user has made it, and only for himself.
        (struct.pack("<6I", 0x03000001, IPC_LOCK, 0, 0, 0, 7), r"\(cap_ipc_lock\) are for the user namespace of uid 7"),
        (struct.pack("<6I", 0x03000000, 0, 0, 0, 0, 7), r"\(nothing\) are for the user namespace of uid 7"),
        (b"xx", "a form that is not known"),
    ],
)
def test_what_would_give_more(before: bytes, why: str) -> None:
    with pytest.raises(IommufdError, match=why):
        with_ipc_lock(before)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (GRANTED, None),
        (b"", None),
        (BESIDE_NET_RAW, NET_RAW_ALONE),
        (struct.pack("<5I", 0x02000000, 0, IPC_LOCK | NET_RAW, 0, 0), struct.pack("<5I", 0x02000000, 0, NET_RAW, 0, 0)),
        (struct.pack("<5I", 0x02000001, IPC_LOCK, 0, 1, 0), struct.pack("<5I", 0x02000001, 0, 0, 1, 0)),
        (
            struct.pack("<6I", 0x03000001, IPC_LOCK | NET_RAW, 0, 0, 0, 1000),
            struct.pack("<6I", 0x03000001, NET_RAW, 0, 0, 0, 1000),
        ),
    ],
)
def test_taken_away(before: bytes, after: bytes | None) -> None:
    assert without_ipc_lock(before) == after
