# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What /proc tells of a process that is held. What parses it is tried in test_parsers.py."""

from __future__ import annotations

import errno
import os

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import read_arguments, read_program


@pytest.mark.parametrize(
    ("there", "told"),
    [
        (b"/usr/bin/qemu", b"/usr/bin/qemu"),
        (b"/usr/bin/qemu (deleted)", b"/usr/bin/qemu"),
        (b"/" + b"x" * 1023, b"/" + b"x" * 1023),
        (b"/" + b"x" * 1024, None),
        (PermissionError(errno.EACCES, "no"), None),
    ],
)
def test_the_path_of_its_program(
    held: Process, monkeypatch: pytest.MonkeyPatch, there: bytes | OSError, told: bytes | None
) -> None:
    def readlink(path: bytes) -> bytes:
        assert path == b"/proc/%d/exe" % held.pid
        if isinstance(there, OSError):
            raise there
        return there

    monkeypatch.setattr(os, "readlink", readlink)
    assert read_program(held) == told


@pytest.mark.parametrize(
    ("text", "count", "whole"),
    [
        (b"", 0, True),
        (b"qemu\0-m\x001G\0", 3, True),
        (b"x\0" * 8192, 8192, True),
        (b"x\0" * 8193, 8192, False),
        (b"qemu\0" + b"x" * 2**18, 1, False),
    ],
)
def test_a_command_line_or_its_beginning(
    held: Process, monkeypatch: pytest.MonkeyPatch, text: bytes, count: int, whole: bool
) -> None:
    monkeypatch.setattr(Process, "read", lambda _self, _name, most: text[:most])
    found = read_arguments(held)
    assert (len(found.words), found.whole) == (count, whole)
