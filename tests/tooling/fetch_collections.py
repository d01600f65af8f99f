# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fetch the collections that this one depends on, without Galaxy: the Python package `ansible` carries them.

Usage: fetch_collections.py TREE [REQUIREMENT...], with the folder in which they are put below ansible_collections, and
what pip is to be asked for, if not what tests/requirements/collections.txt pins.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

# As galaxy.yml names them.
COLLECTIONS = ("community.general",)
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements" / "collections.txt"


def download(place: Path, requirements: Sequence[str]) -> Path:
    """Have pip put the package's wheel into place, and return it. Raises CalledProcessError if pip cannot."""
    wanted = requirements or ("-r", str(REQUIREMENTS))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps")
    subprocess.run([*pip, "--only-binary=:all:", "-d", str(place), *wanted], check=True)
    (wheel,) = place.glob("*.whl")
    return wheel


def unpack(wheel: Path, collection: str, tree: Path) -> Path:
    """Unpack one collection of the wheel into tree and return its folder. Raises LookupError if it is not in there."""
    prefix = f"ansible_collections/{collection.replace('.', '/')}/"
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(prefix)]
        if not members:
            raise LookupError(f"{wheel.name} does not carry the collection {collection}")
        archive.extractall(tree, members)
    return tree / prefix


def main(tree: Path, requirements: Sequence[str]) -> None:
    """Put every collection into tree."""
    with tempfile.TemporaryDirectory() as place:
        wheel = download(Path(place), requirements)
        for collection in COLLECTIONS:
            unpack(wheel, collection, tree)
            print(f"{collection}: from {wheel.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
