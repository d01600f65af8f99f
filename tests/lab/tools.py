# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The programs that the lab needs, and the Debian packages that bring them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from progress import LabError, environment


@dataclass(frozen=True)
class Tool:
    """What is looked for (a program, or a file by its absolute path), the package that has it, and what it is for."""

    probe: str
    package: str
    purpose: str
    only_unprivileged: bool = False

    @property
    def present(self) -> bool:
        """Whether this machine has it, or can do without."""
        if self.only_unprivileged and os.geteuid() == 0:
            return True
        if self.probe.startswith("/"):
            return Path(self.probe).exists()
        return shutil.which(self.probe, path=environment()["PATH"]) is not None


TOOLS = (
    Tool("mmdebstrap", "mmdebstrap", "fetches and verifies Debian packages, makes root file systems"),
    Tool("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring", "the keys they are verified with"),
    Tool("newuidmap", "uidmap", "lets mmdebstrap work without root", only_unprivileged=True),
    Tool("fakeroot", "fakeroot", "keeps the owners of files without root"),
    Tool("mke2fs", "e2fsprogs", "makes disks from folders"),
    Tool("qemu-system-x86_64", "qemu-system-x86", "runs the guests"),
    Tool("qemu-img", "qemu-utils", "makes throw-away disks"),
    Tool("ssh", "openssh-client", "logs in to the guests"),
)


def missing() -> list[Tool]:
    """The tools that this machine lacks. Raises LabError where no tool would help."""
    if platform.machine() != "x86_64":
        raise LabError(f"the lab is built on x86-64 machines; this one is {platform.machine()}")
    return [tool for tool in TOOLS if not tool.present]


def install_command(tools: Iterable[Tool]) -> str:
    """The one command that installs them."""
    packages = sorted({tool.package for tool in tools})
    return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install --no-install-recommends --yes {' '.join(packages)}"


def require() -> None:
    """Raises LabError, naming each missing tool and the one command, if any is missing."""
    lacking = missing()
    if lacking:
        names = ", ".join(tool.probe for tool in lacking)
        raise LabError(f"this machine lacks {names}. Install with: {install_command(lacking)}")


def install() -> None:
    """Installs what is missing, as root or with sudo without a password. Raises LabError if it may not or cannot."""
    lacking = missing()
    if not lacking:
        return
    prefix: list[str] = []
    if os.geteuid() != 0:
        prefix = ["sudo", "-n"]
        try:
            subprocess.run([*prefix, "true"], capture_output=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            raise LabError(f"no right to install packages: run {install_command(lacking)}") from None
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    packages = sorted({tool.package for tool in lacking})
    command = [*apt, "install", "--no-install-recommends", "--yes", *packages]
    # The package lists of a fresh machine may be missing or old, which the first try tells.
    if subprocess.run(command, check=False).returncode != 0:
        subprocess.run([*apt, "update"], check=False)
        if subprocess.run(command, check=False).returncode != 0:
            raise LabError(f"apt-get failed (see above): {install_command(lacking)}")
    require()
