# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Trees in which Ansible finds the collection, and a home folder for ansible-test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# What ansible-test wants of get-pip.py, which it would fetch from a host that many networks do not reach:
# pip in a fresh virtual environment, at the versions it names. The first call runs apart from the second, because
# ensurepip makes pip blind to the user's configuration.
_GET_PIP = """
import subprocess, sys
subprocess.check_call([sys.executable, "-m", "ensurepip"], stdout=subprocess.DEVNULL)
wanted = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *wanted]))
"""


def in_tree(tree: Path) -> Path:
    """Return where in a tree the collection is."""
    return tree / "ansible_collections" / "virt" / "iommufd"


def project_files(root: Path) -> list[str]:
    """Return the project's files, those that are not committed yet too, as paths from root."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\0")
    return sorted({name for name in names if name and os.path.lexists(root / name)})


def python_files(root: Path, *folders: str) -> list[str]:
    """Return the Python files of the project below folders."""
    prefixes = tuple(f"{folder}/" for folder in folders)
    return [name for name in project_files(root) if name.startswith(prefixes) and name.endswith(".py")]


def link_tree(root: Path, place: Path) -> Path:
    """Make a tree below place that leads to the checkout, whatever folder that is in, and return it."""
    tree = place / "tree"
    link = in_tree(tree)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or link.resolve() != root:
        link.unlink(missing_ok=True)
        link.symlink_to(root)
    return tree


def copy_tree(root: Path, place: Path) -> Path:
    """Copy the project's files into a tree below place and return the copy: ansible-test follows links to their end."""
    tree = place / "copy"
    copy = in_tree(tree)
    shutil.rmtree(tree, ignore_errors=True)
    for name in project_files(root):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, copy / name, follow_symlinks=False)
    # Without a repository of its own ansible-test would take the one around it, which ignores this folder.
    subprocess.run(["git", "init", "--quiet", str(copy)], check=True)
    return copy


def home(place: Path) -> Path:
    """Make a home folder for ansible-test, which keeps its environments there, with the user's own set-up of pip."""
    for name in (".config/pip", ".pip", ".cache/pip"):
        link = place / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path.home() / name)
    return place


def stand_in_for_get_pip(place: Path, internal: Path) -> None:
    """Put a stand-in for get-pip.py where the ansible-test whose code is in internal caches it, below its home."""
    source = (internal / "python_requirements.py").read_text(encoding="utf-8")
    versions = re.findall(r"\bpip='([0-9.]+)'", source)
    if not versions:
        sys.exit(f"{internal}: cannot tell which get-pip.py this ansible-test wants")
    cache = place / ".ansible" / "test" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for version in versions:
        (cache / f"get_pip_{version.replace('.', '_')}.py").write_text(_GET_PIP, encoding="utf-8")
