# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: gives CAP_IPC_LOCK to an executable as a file capability, or tells why not.

It is also the program `iommufd-host-grant`, which a unit runs when a package upgrade has replaced an emulator.
"""

from __future__ import annotations

import math
import os
import sys
import time
from functools import partial

from ._capabilities import parse_file_capabilities, with_ipc_lock
from ._child import NoAnswer, in_child
from ._errors import IommufdError, error_text, shown_path
from ._states import capability_in, open_file, set_capability_in

__all__ = (
    "attribute_for_grant",
    "grant",
    "grant_patiently",
)

_PROGRAM = "iommufd-host-grant"

# A local file is there in no time.
_PATIENCE = 30
# How often it looks, and for how long at most: its unit's timer comes back to what goes on for longer.
_PAUSE = 1
_LONGEST = 300


def attribute_for_grant(xattr: bytes | None) -> bytes | None:
    """The extended attribute that gives a file CAP_IPC_LOCK, by the one that it has; None where it needs nothing.

    `xattr` None is a file without one. The capability is added to nothing, or to the host's own, if those are
    effective. Raises IommufdError where the file has others, which are left as they are.
    """
    if parse_file_capabilities(xattr or b"").lifts_memlock:
        return None
    return with_ipc_lock(xattr)


def grant(path: str) -> bool:
    """Gives CAP_IPC_LOCK to the executable at path. Whether there was anything to do; to a missing file there is not.

    Raises IommufdError where it may not have it: it is no executable, has capabilities that are left alone, or can be
    written by somebody else than root, who could make anything of it.
    """
    try:
        with open_file(path) as file:
            if not file.mode & 0o111:
                raise IommufdError(f"{shown_path(path)} is no executable file, so it cannot get CAP_IPC_LOCK.")
            try:
                xattr = attribute_for_grant(capability_in(file.fd, path))
            except IommufdError as exc:
                raise IommufdError(f"{shown_path(path)}: {exc} It is left as it is.") from exc
            if xattr is not None:
                set_capability_in(file.fd, xattr)
            return xattr is not None
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise IommufdError(f"{shown_path(path)} cannot be given CAP_IPC_LOCK ({error_text(exc.errno)}).") from exc


def grant_patiently(path: str) -> bool:
    """As `grant`, from a child with a time limit: a path may lead to a mount whose server does not answer for ever."""
    try:
        return bool(in_child(None, partial(grant, path), _PATIENCE))
    except NoAnswer as exc:
        raise IommufdError(
            f"{shown_path(path)} did not get CAP_IPC_LOCK within {_PATIENCE} seconds. Is it on a mount whose server is"
            " gone?"
        ) from exc


def main(arguments: list[str] | None = None) -> int:
    """The program. 0: each path has it, or is not there; 1: some were refused; 2: it was called wrongly."""
    # A module pays for each import on each host anew, and needs it not.
    import argparse

    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Gives CAP_IPC_LOCK as a file capability to executables that only root can write.",
        allow_abbrev=False,
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", help="an executable; symbolic links are followed")
    parser.add_argument(
        "--until-quiet",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="look again until nothing has happened to the executables for so long, but for five minutes at most",
    )
    asked = parser.parse_args(arguments)
    # systemd forgets what happens to a path while it runs what the path has started. A package manager touches a file
    # when it prepares for another, and again when it puts that in place: the first must not hide the second.
    end = time.monotonic() + _LONGEST
    failures, age = _grant_each(asked.paths)
    while age < asked.until_quiet and time.monotonic() < end:
        time.sleep(_PAUSE)
        failures, age = _grant_each(asked.paths)
    for each in failures:
        # It is a program of its own, and no module.
        sys.stderr.write(f"{_PROGRAM}: {each}\n")
    return 1 if failures else 0


def _grant_each(paths: list[str]) -> tuple[list[str], float]:
    """Gives it to each path; what was refused, and for how many seconds nothing has happened to any of the files."""
    failures, ages = [], [math.inf]
    for path in paths:
        try:
            if grant_patiently(path):
                sys.stdout.write(f"{_PROGRAM}: {shown_path(path)} has got CAP_IPC_LOCK.\n")
                sys.stdout.flush()
            ages.append(in_child(None, partial(_age, path), _PATIENCE))
        except IommufdError as exc:
            failures.append(str(exc))
    return failures, min(ages)


def _age(path: str) -> float:
    """For how many seconds nothing has happened to a file: not to its links, nor its attributes. Endless without."""
    try:
        # A clock that was set back must not make it wait for the time that a file was changed at.
        return abs(time.time() - os.stat(path).st_ctime)
    except OSError:
        return math.inf
