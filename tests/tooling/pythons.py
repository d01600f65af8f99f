# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which Pythons this machine really has, and which ansible-core goes with each."""

from __future__ import annotations

import glob
import os
import subprocess

# The Pythons of managed hosts, each with the ansible-core whose controller code its unit tests import.
# Python 3.9 has none that we support as a controller; 2.15, its last, has the same module_utils.basic.
UNIT_CORES: dict[str, str] = {
    "3.9": "2.15.13",
    "3.10": "2.16.19",
    "3.11": "2.19.14",
    "3.12": "2.21.5",
    "3.13": "2.21.5",
    "3.14": "2.21.5",
}

# For 'ansible-test sanity': versions of ansible-core with the Pythons that can run them, in order of preference.
OLDEST_CORE: tuple[tuple[str, str], ...] = (("3.11", "2.16.19"), ("3.12", "2.16.19"), ("3.10", "2.16.19"))
NEWEST_CORE: tuple[tuple[str, str], ...] = (
    ("3.13", "2.21.5"),
    ("3.12", "2.21.5"),
    ("3.14", "2.21.5"),
    ("3.11", "2.19.14"),
)

# Each ansible-core that the collection supports on the controller, with the Pythons that run it, the preferred first:
# what it takes for a template differs from one to the next.
CONTROLLER_CORES: dict[str, tuple[str, ...]] = {
    "2.16.19": ("3.11", "3.12", "3.10"),
    "2.17.14": ("3.11", "3.12", "3.10"),
    "2.18.19": ("3.11", "3.12", "3.13"),
    "2.19.14": ("3.11", "3.12", "3.13"),
    "2.20.10": ("3.12", "3.13", "3.14"),
    "2.21.5": ("3.12", "3.13", "3.14"),
}

_ASK = "import os, sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2], os.path.realpath(sys.executable))"


def _ask(candidate: str, version: str) -> str | None:
    """Return the real path of the interpreter behind candidate, if it is a whole Python of that version."""
    try:
        run = subprocess.run([candidate, "-I", "-c", _ASK], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found, _sep, path = run.stdout.strip().partition(" ")
    # A shim of pyenv exists for every version and fails, or answers with another one, unless that version is active.
    return path if run.returncode == 0 and found == version else None


def _candidates(version: str) -> list[str]:
    """Return where a Python of that version may be: all of PATH, then pyenv's own folders."""
    name = f"python{version}"
    paths = [os.path.join(folder, name) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    return [path for path in paths if os.access(path, os.X_OK)] + sorted(
        glob.glob(f"{pyenv}/versions/{version}.*/bin/{name}"), reverse=True
    )


def find_pythons() -> dict[str, str]:
    """Return the path of a working interpreter for each version of UNIT_CORES that this machine has."""
    found = {}
    for version in UNIT_CORES:
        path = next(filter(None, (_ask(candidate, version) for candidate in _candidates(version))), None)
        if path:
            found[version] = path
    return found


def first(choices: tuple[tuple[str, str], ...], pythons: dict[str, str]) -> tuple[str, str] | None:
    """Return the first of choices whose Python is there."""
    return next((choice for choice in choices if choice[0] in pythons), None)
