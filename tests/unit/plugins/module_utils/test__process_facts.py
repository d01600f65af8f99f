# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What /proc tells of a process that is held. What parses it is tried in test_parsers.py."""

from __future__ import annotations

import errno
import os

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import read_program


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
