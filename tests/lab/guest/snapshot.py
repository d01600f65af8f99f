# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a host is configured, so that before and after can be compared.

    snapshot take FILE       writes it to FILE
    snapshot compare FILE    prints, as a JSON list of sentences, what is different now; an empty list if nothing is

Looked at are the trees of /etc, /usr/local and /var/lib (kind, mode, owner, group, extended attributes, content), the
file capabilities of all programs, which packages there are, the modes and owners of iommufd's and VFIO's device nodes,
which units are enabled, which failed, and which units, of those that are loaded, have a name with `iommufd`. Times are
not compared: to restore a file is to write it. What the host itself changes while it runs is left out, by name and for
a reason, in OWN_WILL.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TREES = ("/etc", "/usr/local", "/var/lib")
PROGRAMS = ("/usr/bin", "/usr/sbin", "/usr/libexec")
NODES = ("/dev/iommu", "/dev/vfio", "/dev/vfio/devices")

# What changes of its own will, or by what the tests do; everything below such a path is left out, too.
OWN_WILL = (
    # libvirt keeps the profiles and the states of domains there
    "/etc/apparmor.d/libvirt/libvirt-*",
    "/var/lib/libvirt/qemu/*",
    # virt-aa-helper and the daemon make it when they first run
    "/var/lib/libvirt/qemu",
    "/var/lib/libvirt/network",
    "/var/lib/libvirt/dnsmasq/*",
    # what semodule makes the policy from: it counts what was done, and keeps what it compiles. What comes of that, in
    # /etc/selinux, is compared
    "/var/lib/selinux",
    # systemd's own: a seed, the clock. No timer but ours leaves a stamp in a guest
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/timesync",
    # dpkg's notes, which it writes anew whatever it does
    "/var/lib/dpkg/status",
    "/var/lib/dpkg/status-old",
    "/var/lib/dpkg/lock*",
    "/var/lib/dpkg/triggers/*",
    "/var/lib/dpkg/available",
    # and what it keeps of each package, which are most of the files there are: which packages there are is looked at
    "/var/lib/dpkg/info",
)


def walk(top: str) -> Iterator[str]:
    """Every path below a folder, and the folder itself, without what has a will of its own."""
    if any(fnmatch.fnmatch(top, pattern) for pattern in OWN_WILL) or not os.path.lexists(top):
        return
    yield top
    if os.path.isdir(top) and not os.path.islink(top):
        for name in sorted(os.listdir(top)):
            yield from walk(os.path.join(top, name))


def attributes(path: str) -> dict[str, str]:
    """The extended attributes, in hexadecimal digits; ACLs and file capabilities are such attributes."""
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in sorted(names)}


def describe(path: str) -> dict[str, Any]:
    """All that a file is, but for its times and its place on the disk."""
    found = os.lstat(path)
    entry: dict[str, Any] = {
        "mode": stat.filemode(found.st_mode),
        "owner": found.st_uid,
        "group": found.st_gid,
        "attributes": attributes(path),
    }
    if stat.S_ISREG(found.st_mode):
        entry["content"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    elif stat.S_ISLNK(found.st_mode):
        entry["content"] = os.readlink(path)
    return entry


def programs() -> dict[str, Any]:
    """The extended attributes of the programs that have any: their capabilities."""
    paths = (path for top in PROGRAMS for path in walk(top))
    return {path: found for path in paths if (found := attributes(path))}


def nodes() -> dict[str, Any]:
    """The device nodes: whose they are, and who may open them."""
    paths = [path for each in NODES if os.path.exists(each) for path in [each, *map(str, sorted(Path(each).glob("*")))]]
    return {path: describe(path) for path in paths}


def systemctl(*words: str) -> list[list[str]]:
    """The lines of a list that systemctl prints, in words."""
    command = ["systemctl", "--no-pager", "--no-legend", "--plain", *words]
    # On a busy machine it takes longer than the 25 seconds that systemctl waits.
    patient = {**os.environ, "SYSTEMD_BUS_TIMEOUT": "300"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=patient)
    return [line.split() for line in done.stdout.splitlines()]


def take() -> dict[str, dict[str, Any]]:
    """The whole host: for each thing looked at, by its name, what it is."""
    return {
        "file": {path: describe(path) for top in TREES for path in walk(top)},
        "program": programs(),
        "package": {path.stem: True for path in Path("/var/lib/dpkg/info").glob("*.list")},
        "node": nodes(),
        # Units that systemd made for this run alone, such as those of mounts, come and go.
        "unit file": {words[0]: words[1] for words in systemctl("list-unit-files") if words[1] != "transient"},
        "failed unit": {words[0]: True for words in systemctl("list-units", "--state=failed")},
        "loaded unit": {words[0]: words[1:4] for words in systemctl("list-units", "--all", "*iommufd*")},
    }


def differences(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A sentence on each thing that is there only before or only after, or is not the same."""
    for kind in before:
        for name in sorted({*before[kind], *after[kind]}):
            old, new = before[kind].get(name), after[kind].get(name)
            if old is None:
                yield f"The {kind} {name} is new: {json.dumps(new)}."
            elif new is None:
                yield f"The {kind} {name} is gone."
            elif old != new:
                yield f"The {kind} {name} was {json.dumps(old)} and is {json.dumps(new)}."


def main() -> None:
    command, file = sys.argv[1], Path(sys.argv[2])
    now = take()
    if command == "take":
        file.write_text(json.dumps(now))
        print(json.dumps({kind: len(things) for kind, things in now.items()}))
    else:
        print(json.dumps(list(differences(json.loads(file.read_text()), now))))


if __name__ == "__main__":
    main()
