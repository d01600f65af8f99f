# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reinstalls a Debian package again and again, and watches the file capability of one of its programs.

    reinstall pack PACKAGE FILE            packs what is installed into FILE, as it came, since the guest has no network
    reinstall times NUMBER FILE PROGRAM    has dpkg install FILE so many times

Printed by the second is a JSON list with an object for each time: `seconds` that dpkg took, `back`, after how many
seconds the program that dpkg had put in place had the capability that its predecessor had, or null if it did not within
a minute, `replaced`, whether dpkg did put another file there, and `bare`, whether it was seen without a capability.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ATTRIBUTE = "security.capability"
PATIENCE = 60.0
PAUSE = 0.02


def query(*words: str) -> str:
    """What dpkg-query answers."""
    return subprocess.run(["dpkg-query", *words], stdout=subprocess.PIPE, text=True, check=True).stdout


def pack(package: str, file: Path) -> None:
    """Builds a package file from what is installed. It is not compressed: that would take minutes here."""
    tree = file.parent / package
    control = tree / "DEBIAN"
    control.mkdir(parents=True)
    for path in map(Path, query("--listfiles", package).split()):
        copy = tree / path.relative_to("/")
        if path.is_symlink() or path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            # Without extended attributes: no package brings a capability in its archive.
            shutil.copyfile(path, copy, follow_symlinks=False)
            if not path.is_symlink():
                shutil.copymode(path, copy)
    for name in query("--control-list", package).split():
        shutil.copy(query("--control-path", package, name).strip(), control / name)
    status = query("--status", package).splitlines(keepends=True)
    (control / "control").write_text("".join(line for line in status if not line.startswith("Status:")))
    build = ["dpkg-deb", "-Znone", "--root-owner-group", "--build", str(tree), str(file)]
    subprocess.run(build, stdout=subprocess.DEVNULL, check=True)
    shutil.rmtree(tree)


def capability(path: str) -> tuple[int, bytes | None]:
    """Which file a path leads to, by its inode, and what capability that one file has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        inode = os.fstat(descriptor).st_ino
        return inode, os.getxattr(descriptor, ATTRIBUTE)
    except OSError:
        return inode, None
    finally:
        os.close(descriptor)


def reinstall(file: str, program: str) -> dict[str, Any]:
    """Installs the package once, and waits until the program has its capability again."""
    old, granted = capability(program)
    began = time.monotonic()
    # Its disk is thrown away with the guest, so nothing has to be on it.
    dpkg = subprocess.Popen(["dpkg", "--force-unsafe-io", "--install", file], stdout=subprocess.DEVNULL)
    replaced = seconds = back = None
    bare = False
    while seconds is None or (back is None and time.monotonic() - began < seconds + PATIENCE):
        moment = time.monotonic()
        inode, now = capability(program)
        if inode != old and replaced is None:
            replaced = moment
        if replaced is not None and back is None:
            bare = bare or now != granted
            back = moment - replaced if now == granted else None
        if seconds is None and dpkg.poll() is not None:
            seconds = moment - began
        time.sleep(PAUSE)
    if dpkg.returncode:
        raise SystemExit(f"dpkg failed with {dpkg.returncode}")
    return {
        "seconds": round(seconds, 1),
        "replaced": replaced is not None,
        "bare": bare,
        "back": None if back is None else round(back, 2),
    }


def main() -> None:
    command, *words = sys.argv[1:]
    if command == "pack":
        pack(words[0], Path(words[1]))
    else:
        print(json.dumps([reinstall(*words[1:]) for _round in range(int(words[0]))]))


if __name__ == "__main__":
    main()
