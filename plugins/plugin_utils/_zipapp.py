# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the program `iommufd-exec` as one file, made of the modules that it consists of."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from ansible_collections.virt.iommufd.plugins.module_utils import _launch

__all__ = ("INTERPRETER", "zipapp")

# Isolated from the environment and from whatever is in the folder, and without what is installed beside Python itself.
INTERPRETER = "/usr/bin/python3 -IS"

_PACKAGE = "iommufd_exec"
_MODULES = ("_capabilities", "_errors", "_iommufd", "_launch", "_size", "_uapi", "_user")
_MAIN = f"""\
import sys

from {_PACKAGE}._launch import main

sys.exit(main())
"""
# The first that a zip file can name. With it, and without compression, which differs between builds of zlib, the same
# modules give the same bytes on every controller.
_TIME = (1980, 1, 1, 0, 0, 0)
_REGULAR_FILE = 0o100644 << 16
_UNIX = 3


def zipapp() -> bytes:
    """The program. The modules import one another relatively, so a package of any name will do."""
    folder = Path(_launch.__file__).parent
    files = {"__main__.py": _MAIN.encode(), f"{_PACKAGE}/__init__.py": b""}
    files.update({f"{_PACKAGE}/{name}.py": (folder / f"{name}.py").read_bytes() for name in _MODULES})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system = _UNIX
            entry.external_attr = _REGULAR_FILE
            archive.writestr(entry, files[name])
    return f"#!{INTERPRETER}\n".encode() + packed.getvalue()
