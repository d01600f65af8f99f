# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: programs for hosts as one file each, made of the modules that they consist of."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from ansible_collections.virt.iommufd.plugins.module_utils import _errors

__all__ = (
    "EXEC",
    "GRANT",
    "INTERPRETER",
    "Program",
    "packed",
    "zipapp",
)

# Isolated from the environment and from whatever is in the folder, and without what is installed beside Python itself.
INTERPRETER = "/usr/bin/python3 -IS"

_MAIN = """\
import sys

from {package}.{main} import main

sys.exit(main())
"""
# The first that a zip file can name. With it, and without compression, which differs between builds of zlib, the same
# modules give the same bytes on every controller.
_TIME = (1980, 1, 1, 0, 0, 0)
_REGULAR_FILE = 0o100644 << 16
_UNIX = 3


class Program(NamedTuple):
    """A program: its name, the module whose `main` it is, and all modules that it consists of."""

    name: str
    main: str
    modules: tuple[str, ...]


EXEC = Program(
    "iommufd-exec", "_launch", ("_capabilities", "_errors", "_iommufd", "_launch", "_size", "_uapi", "_user")
)
GRANT = Program(
    "iommufd-host-grant",
    "_grant",
    ("_capabilities", "_child", "_errors", "_foreign", "_grant", "_paths", "_process", "_states", "_user"),
)


def zipapp(program: Program) -> bytes:
    """The program's file. The modules import one another relatively, so a package of any name will do."""
    package = program.name.replace("-", "_")
    folder = Path(_errors.__file__).parent
    main = _MAIN.format(package=package, main=program.main)
    files = {"__main__.py": main.encode(), f"{package}/__init__.py": b""}
    files.update({f"{package}/{name}.py": (folder / f"{name}.py").read_bytes() for name in program.modules})
    packed_files = io.BytesIO()
    with zipfile.ZipFile(packed_files, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system = _UNIX
            entry.external_attr = _REGULAR_FILE
            archive.writestr(entry, files[name])
    return f"#!{INTERPRETER}\n".encode() + packed_files.getvalue()


def packed(program: Program, folder: str) -> str:
    """Puts the program's file into a folder, unless it is there already, and gives the path of it."""
    content = zipapp(program)
    path = Path(folder, f"{program.name}-{hashlib.sha256(content).hexdigest()[:16]}")
    if not path.exists():
        # Others may look it up at the same time.
        descriptor, scratch = tempfile.mkstemp(dir=path.parent)
        with open(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(scratch, 0o700)
        os.replace(scratch, path)
    return str(path)
