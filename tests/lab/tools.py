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

from guests import Architecture, Guest
from progress import LabError, environment


@dataclass(frozen=True)
class Tool:
    """What is looked for (a program, or a file by its absolute path), the package that has it, and what it is for.

    architecture: the one whose guests alone need it.
    """

    probe: str
    package: str
    purpose: str
    only_unprivileged: bool = False
    architecture: str = ""

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
    Tool("qemu-system-aarch64", "qemu-system-arm", "runs the guests of arm64", architecture="arm64"),
    Tool("arch-test", "arch-test", "tells whether programs of arm64 run here", architecture="arm64"),
    Tool("/usr/lib/binfmt.d/qemu-aarch64.conf", "qemu-user-static", "runs programs of arm64", architecture="arm64"),
)

# binfmt_misc: which program the kernel starts for programs that are none of its own. All of it is root's.
_BINFMT = "/proc/sys/fs/binfmt_misc"
_REGISTRATION = "/usr/lib/binfmt.d/qemu-{}.conf"
_REGISTER = (
    "[ -e {folder}/register ] || mount -t binfmt_misc binfmt_misc {folder}; cat {registration} > {folder}/register"
)


def needed(guests: Iterable[Guest]) -> list[Tool]:
    """The tools without which none of these guests can be made or run."""
    architectures = {guest.architecture.name for guest in guests}
    return [tool for tool in TOOLS if not tool.architecture or tool.architecture in architectures]


def missing(guests: Iterable[Guest]) -> list[Tool]:
    """The tools for these guests that this machine lacks. Raises LabError where no tool would help."""
    if platform.machine() != "x86_64":
        raise LabError(f"the lab is built on x86-64 machines; this one is {platform.machine()}")
    return [tool for tool in needed(guests) if not tool.present]


def unregistered(architectures: Iterable[Architecture]) -> list[Architecture]:
    """Those whose programs this machine does not run: they are not its own, and its kernel knows no interpreter."""
    return [each for each in dict.fromkeys(architectures) if each.triplet and not _runs(each)]


def _runs(architecture: Architecture) -> bool:
    command = ["arch-test", architecture.name]
    try:
        return subprocess.run(command, capture_output=True, env=environment(), check=False).returncode == 0
    except FileNotFoundError:
        return False


def install_command(tools: Iterable[Tool]) -> str:
    """The one command that installs them."""
    packages = sorted({tool.package for tool in tools})
    return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install --no-install-recommends --yes {' '.join(packages)}"


def register_command(architecture: Architecture) -> str:
    """The one command, for a root's shell, that has the kernel run the programs of an architecture by QEMU."""
    qemu = architecture.triplet.partition("-")[0]
    return _REGISTER.format(folder=_BINFMT, registration=_REGISTRATION.format(qemu))


def require(guests: Iterable[Guest]) -> None:
    """Raises LabError, naming each missing tool and the one command, if any is missing."""
    lacking = missing(guests)
    if lacking:
        names = ", ".join(tool.probe for tool in lacking)
        raise LabError(f"this machine lacks {names}. Install with: {install_command(lacking)}")


def require_programs(architecture: Architecture) -> None:
    """Raises LabError, with the cure, where this machine does not run programs of the architecture."""
    if architecture in unregistered([architecture]):
        raise LabError(
            f"this machine does not run programs of {architecture.name}, as it takes to make a root file system of"
            f" them: its kernel has no interpreter for them in binfmt_misc. As root: {register_command(architecture)}"
        )


def install(guests: Iterable[Guest]) -> None:
    """Installs what is missing for these guests, and registers what runs the programs of other architectures.

    As root or with sudo without a password. Raises LabError if it may not or cannot.
    """
    guests = list(guests)
    lacking = missing(guests)
    if lacking:
        _install(lacking)
    for architecture in unregistered(guest.architecture for guest in guests):
        prefix = _prefix()
        if prefix is not None:
            subprocess.run([*prefix, "sh", "-c", register_command(architecture)], check=False)
        # Without the right, or where the kernel refuses, this says what is missing.
        require_programs(architecture)
    require(guests)


def _prefix() -> list[str] | None:
    """The words before a command that is root's; None where there is no such right."""
    if os.geteuid() == 0:
        return []
    try:
        subprocess.run(["sudo", "-n", "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ["sudo", "-n"]


def _install(lacking: list[Tool]) -> None:
    prefix = _prefix()
    if prefix is None:
        raise LabError(f"no right to install packages: run {install_command(lacking)}")
    # Two runs at once wait for one another.
    options = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=600"]
    apt = [*prefix, *options]
    packages = sorted({tool.package for tool in lacking})
    command = [*apt, "install", "--no-install-recommends", "--yes", *packages]
    # The package lists of a fresh machine may be missing or old, which the first try tells.
    if subprocess.run(command, check=False).returncode != 0:
        subprocess.run([*apt, "update"], check=False)
        if subprocess.run(command, check=False).returncode != 0:
            raise LabError(f"apt-get failed (see above): {install_command(lacking)}")
