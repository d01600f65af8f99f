# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the lab can be: the guests, and the kernels and root file systems that they are put together from.

Nothing here acts. To add a guest, add an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from progress import LabError


@dataclass(frozen=True)
class Suite:
    """A suite of the Debian archive. may_be_expired: its Release file may be past Valid-Until, but must be signed."""

    name: str
    may_be_expired: bool = False


@dataclass(frozen=True)
class Kernel:
    """Debian's kernel of a suite, and what the lab builds for it.

    packages: the kernel, its headers and its source. container: whose /dev/vfio/vfio is, `legacy` (VFIO's own) or
    `iommufd`.
    """

    name: str
    suite: Suite
    packages: tuple[str, ...]
    container: str


@dataclass(frozen=True)
class Root:
    """A root file system: what is installed from which suite, and the size of its (sparse) disk.

    selinux: whether its files are labelled, and SELinux is in force.
    """

    name: str
    suite: Suite
    packages: tuple[str, ...]
    size_mib: int = 4096
    selinux: bool = False


@dataclass(frozen=True)
class Guest:
    """A machine: a kernel, a root file system, and memory.

    modules: the kernel's, `lab` (with iommufd) or `packaged` (as Debian ships them). parameters: more of them on the
    kernel's command line.
    """

    name: str
    kernel: Kernel
    root: Root
    modules: str = "lab"
    memory_mib: int = 2048
    parameters: tuple[str, ...] = ()
    purpose: str = ""


TRIXIE = Suite("trixie")
SID = Suite("sid", may_be_expired=True)

_PACKAGES = (
    # the system
    "systemd-sysv",
    "udev",
    "dbus",
    "libpam-systemd",
    "kmod",
    "iproute2",
    "openssh-server",
    # python3-minimal has no ctypes
    "python3",
    "sudo",
    # tests change users, capabilities, namespaces and ACLs, and look at processes
    "libcap2-bin",
    "acl",
    "attr",
    "procps",
    "lsof",
    "strace",
    "fuse3",
    "python3-pytest",
    # the virtualization host
    "apparmor",
    "qemu-system-x86",
    "libvirt-daemon-system",
    "libvirt-clients",
    "python3-libvirt",
)

KERNEL_TRIXIE = Kernel("trixie", TRIXIE, ("linux-image-amd64", "linux-headers-amd64", "linux-source-6.12"), "legacy")
KERNEL_SID = Kernel("sid", SID, ("linux-image-amd64", "linux-headers-amd64", "linux-source"), "iommufd")

ROOT_TRIXIE = Root("trixie", TRIXIE, _PACKAGES)
ROOT_SID = Root("sid", SID, _PACKAGES)
ROOT_SELINUX = Root(
    "selinux",
    TRIXIE,
    (*(name for name in _PACKAGES if name != "apparmor"), "selinux-policy-default", "policycoreutils"),
    selinux=True,
)

DEFAULT_GUEST = "fallback"

GUESTS: dict[str, Guest] = {
    guest.name: guest
    for guest in (
        Guest(
            "fallback", KERNEL_TRIXIE, ROOT_TRIXIE, purpose="libvirt leaves the mode alone: the failure and its cures"
        ),
        # Room for two domains of more than 1 GiB each.
        Guest("native", KERNEL_SID, ROOT_SID, memory_mib=3584, purpose="libvirt sets the mode itself"),
        Guest(
            "selinux",
            KERNEL_TRIXIE,
            ROOT_SELINUX,
            parameters=("security=selinux",),
            purpose="confined by SELinux, and laid out as Red Hat's family is",
        ),
        Guest("stock", KERNEL_TRIXIE, ROOT_TRIXIE, "packaged", purpose="Debian's own modules, without iommufd"),
    )
}


def guest_named(name: str) -> Guest:
    """The guest of that name. Raises LabError, naming those that exist, if there is none."""
    try:
        return GUESTS[name]
    except KeyError:
        raise LabError(f"no guest is called {name!r}: there are {', '.join(GUESTS)}") from None
