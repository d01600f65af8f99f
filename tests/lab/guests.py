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
class Architecture:
    """A processor and the machine around it. name: Debian's. triplet: GNU's, where programs for it need emulation here.

    emulator: the program that is such a machine; devices: those of it that no other has; parameters: those of its
    kernel.
    """

    name: str
    emulator: str
    machine: str
    cpu: str
    devices: tuple[str, ...]
    parameters: tuple[str, ...]
    triplet: str = ""


@dataclass(frozen=True)
class Kernel:
    """Debian's kernel of a suite, and what the lab builds for it.

    packages: the kernel, its headers and its source. container: whose /dev/vfio/vfio is, `legacy` (VFIO's own) or
    `iommufd`. flavour: Debian's name of it, where the architecture has several.
    """

    name: str
    suite: Suite
    packages: tuple[str, ...]
    container: str
    architecture: Architecture
    flavour: str = ""


@dataclass(frozen=True)
class Root:
    """A root file system: what is installed from which suite, and the size of its (sparse) disk.

    selinux: whether its files are labelled, and SELinux is in force.
    """

    name: str
    suite: Suite
    packages: tuple[str, ...]
    architecture: Architecture
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

    @property
    def architecture(self) -> Architecture:
        """That of its kernel, and so of its root file system."""
        return self.kernel.architecture


# A new identity at each start: a restored guest's random numbers must not be those of its twins. A processor that says
# it is fast at that (ERMS) is given memory to copy and to clear byte by byte, and the emulator does it byte by byte.
AMD64 = Architecture(
    "amd64",
    "qemu-system-x86_64",
    "q35,kernel-irqchip=split",
    "max,erms=off",
    ("intel-iommu,intremap=on,device-iotlb=on", "vmgenid,guid=auto"),
    # A busy machine's emulator may be late with the first ticks of the timer, which Linux would take for a broken timer
    # and panic. Under KVM it leaves that check out by itself (kvm_guest_init()).
    # What defends the kernel against programs costs the emulator a tenth of all that it does, and defends nothing here.
    ("console=ttyS0", "no_timer_check", "mitigations=off", "init_on_alloc=0", "randomize_kstack_offset=off"),
)
# QEMU has no vmgenid for it. No pointers are signed: each function of Debian's programs does so twice, which takes a
# quarter of the emulator's time.
ARM64 = Architecture(
    "arm64",
    "qemu-system-aarch64",
    "virt,gic-version=3,iommu=smmuv3",
    "max,pauth=off",
    (),
    ("console=ttyAMA0",),
    "aarch64-linux-gnu",
)

TRIXIE = Suite("trixie")
SID = Suite("sid", may_be_expired=True)

_SYSTEM = (
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
)
_PACKAGES = (
    *_SYSTEM,
    # the virtualization host
    "apparmor",
    "qemu-system-x86",
    "libvirt-daemon-system",
    "libvirt-clients",
    "python3-libvirt",
)

_AMD64 = ("linux-image-amd64", "linux-headers-amd64")
KERNEL_TRIXIE = Kernel("trixie", TRIXIE, (*_AMD64, "linux-source-6.12"), "legacy", AMD64)
KERNEL_SID = Kernel("sid", SID, (*_AMD64, "linux-source"), "iommufd", AMD64)
# Their images and headers are those of the flavour.
_ARM64 = ("linux-source-6.12", "gcc-14-aarch64-linux-gnu")
KERNEL_ARM64 = Kernel("arm64", TRIXIE, _ARM64, "legacy", ARM64, "arm64")
KERNEL_ARM64_16K = Kernel("arm64-16k", TRIXIE, _ARM64, "legacy", ARM64, "arm64-16k")

# VMs in containers, also those of users.
ROOT_TRIXIE = Root("trixie", TRIXIE, (*_PACKAGES, "podman", "uidmap"), AMD64)
ROOT_SID = Root("sid", SID, _PACKAGES, AMD64)
# What programs of its own do while they are installed is emulated, so it is kept small.
ROOT_ARM64 = Root("arm64", TRIXIE, _SYSTEM, ARM64)
ROOT_SELINUX = Root(
    "selinux",
    TRIXIE,
    (*(name for name in _PACKAGES if name != "apparmor"), "selinux-policy-default", "policycoreutils"),
    AMD64,
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
        Guest("arm64", KERNEL_ARM64, ROOT_ARM64, memory_mib=1536, purpose="another processor, and another IOMMU"),
        Guest("arm64-16k", KERNEL_ARM64_16K, ROOT_ARM64, memory_mib=1536, purpose="the same, with pages of 16 KiB"),
        Guest("stock", KERNEL_TRIXIE, ROOT_TRIXIE, "packaged", purpose="Debian's own modules, without iommufd"),
    )
}


def guest_named(name: str) -> Guest:
    """The guest of that name. Raises LabError, naming those that exist, if there is none."""
    try:
        return GUESTS[name]
    except KeyError:
        raise LabError(f"no guest is called {name!r}: there are {', '.join(GUESTS)}") from None
