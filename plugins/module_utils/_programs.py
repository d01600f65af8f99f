# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: programs for hosts as one file each, made of the modules that they consist of."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import zipfile
from functools import partial
from types import ModuleType
from typing import Any

__all__ = (
    "EXEC",
    "GRANT",
    "INTERPRETER",
    "LAUNCHER",
    "PROGRAMS",
    "find_services_with",
    "zipapp",
)

EXEC = "iommufd-exec"
GRANT = "iommufd-host-grant"
PROGRAMS = (EXEC, GRANT)

# Where the role puts the first of them.
LAUNCHER = f"/usr/local/bin/{EXEC}"

# See systemd.unit(5).
_UNIT_FILES = ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")
_UNIT_FILE_MAX = 2**18
_PATIENCE = 10

# Isolated from the environment and from whatever is in the folder, and without what is installed beside Python itself.
INTERPRETER = "/usr/bin/python3 -IS"

_MAIN = """\
import sys

from {package}.{main} import main

sys.exit(main())
"""
# The first that a zip file can name. With it, and without compression, which differs between builds of zlib, the same
# modules give the same bytes on every machine.
_TIME = (1980, 1, 1, 0, 0, 0)
_REGULAR_FILE = 0o100644 << 16
_UNIX = 3


def zipapp(name: str) -> bytes:
    """The file of a program. Its modules import one another relatively, so a package of any name will do."""
    main, modules = _exec_modules() if name == EXEC else _grant_modules()
    package = name.replace("-", "_")
    files = {"__main__.py": _MAIN.format(package=package, main=main).encode(), f"{package}/__init__.py": b""}
    files.update({f"{package}/{_file_name(module)}": _source(module) for module in modules})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for each in sorted(files):
            entry = zipfile.ZipInfo(each, _TIME)
            entry.create_system = _UNIX
            entry.external_attr = _REGULAR_FILE
            archive.writestr(entry, files[each])
    return f"#!{INTERPRETER}\n".encode() + packed.getvalue()


# Ansible sends a host those modules that some other imports, so these name what the programs consist of by importing
# it; and only then, as the one program is made on few hosts.


def _exec_modules() -> tuple[str, tuple[ModuleType, ...]]:
    from . import _capabilities, _change, _device, _errors, _iommufd, _iommufd_exec, _size, _syscalls, _uapi, _user

    return "_iommufd_exec", (
        _capabilities,
        _change,
        _device,
        _errors,
        _iommufd,
        _iommufd_exec,
        _size,
        _syscalls,
        _uapi,
        _user,
    )


def _grant_modules() -> tuple[str, tuple[ModuleType, ...]]:
    from . import _capabilities, _child, _errors, _foreign, _grant, _names, _paths, _states, _syscalls, _user

    return "_grant", (_capabilities, _child, _errors, _foreign, _grant, _names, _paths, _states, _syscalls, _user)


def _file_name(module: ModuleType) -> str:
    return os.path.basename(str(module.__file__))


def _source(module: ModuleType) -> bytes:
    """The source of a module, also from the zip file in which Ansible sends it."""
    loader: Any = module.__spec__ and module.__spec__.loader
    source: bytes = loader.get_data(module.__file__)
    return source


def find_services_with(program: str) -> list[str]:
    """The services whose files start that program, by their names; none where these were not read in time."""
    # The controller has these names, too, and need not be Linux.
    from ._child import NoAnswer, in_child

    try:
        found: list[str] = in_child(None, partial(_services_with, program), _PATIENCE)
    except NoAnswer:
        return []
    return found


def _services_with(program: str) -> list[str]:
    # See systemd.service(5) for what may be in front.
    command = re.compile(rb"^Exec[A-Za-z]+ *= *[-@:+!|]*%s(?:\s|$)" % re.escape(os.fsencode(program)), re.MULTILINE)
    found = set()
    for folder in _UNIT_FILES:
        for path in (*glob.glob(f"{folder}/*.service"), *glob.glob(f"{folder}/*.service.d/*.conf")):
            with contextlib.suppress(OSError), open(path, "rb") as stream:
                if command.search(stream.read(_UNIT_FILE_MAX)):
                    found.add(re.sub(r"^.*/([^/]+\.service)(?:\.d/[^/]+)?$", r"\1", path))
    return sorted(found)
