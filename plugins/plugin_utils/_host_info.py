# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what is made of what iommufd_info tells of a host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os.path import basename
from typing import Any

from ..module_utils._errors import IommufdError
from ..module_utils._size import human_size
from ..module_utils._unit_files import missing_settings

__all__ = (
    "NONSENSE",
    "OF_EMULATOR",
    "UNSEEN",
    "as_it_runs",
    "capability_for",
    "daemon_cure",
    "daemon_is_barred",
    "daemon_takers",
    "given_back",
    "has_iommufd",
    "has_libvirt",
    "is_elsewhere",
    "its_hard_limit",
    "kib_with_room",
    "nonsense",
    "own_emulators",
    "qemu_for",
)

# What stands in limits_of_view where there may be VMs that were not seen: processes as a whole, their descriptors, or
# their iommufds.
UNSEEN = ("processes", "descriptors", "iommufds")

# Whatever a host may have sent raises one of these.
NONSENSE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

# What is left to the emulator itself where all memory of a VM is limited.
OF_EMULATOR = 2**30

# uname -m, where the name of QEMU's emulator is another one.
_EMULATOR_OF = {"ppc64le": "ppc64", "i686": "i386", "armv7l": "arm"}


def nonsense(exc: Exception) -> IommufdError:
    """What a filter of the role tells of an input that is not what the collection's modules return."""
    if isinstance(exc, KeyError):
        return IommufdError(f"There is no {exc} in its input.")
    return IommufdError(f"Its input is not what this version's modules return ({exc!r:.100}).")


def own_emulators(qemu: Sequence[Mapping[str, Any]], architecture: str) -> list[str]:
    """Those of a host's emulators that run guests of its own architecture.

    They are those of the usual names at the usual places, and among those that were named; else those that libvirt's
    domains are defined with. What is merely executed does not count: whoever executes it has chosen it.
    """
    own = {"qemu-kvm", qemu_for(architecture)}
    present = [each for each in qemu if each["present"]]
    named = [each["path"] for each in present if {"place", "option"} & set(each["known_by"])]
    usual = [path for path in named if basename(path) in own]
    return usual or [each["path"] for each in present if "definition" in each["known_by"]]


def has_iommufd(host: Mapping[str, Any]) -> bool:
    """Whether the running kernel has iommufd, if need be once its module is loaded."""
    return bool(host["module"] != "absent" or host["device"]["present"])


def has_libvirt(libvirt: Mapping[str, Any]) -> bool:
    """Whether there is, or may be, a system libvirt. Without one, it is known that none sets the mode."""
    return libvirt.get("unit") is not None or libvirt.get("sets_rlimit_mode") is not False


def is_elsewhere(libvirt: Mapping[str, Any]) -> bool:
    """Whether there may be a libvirt of which this host has neither a unit nor a library, as in a container."""
    untold = libvirt["version"] is None and libvirt["supports_iommufd"] is None
    return libvirt["sets_rlimit_mode"] is None and (libvirt["unit"] is None or untold)


def as_it_runs(vfio_devices: Iterable[Mapping[str, Any]]) -> list[bool]:
    """Of each device of a process, whether it pins as that runs, or may: what sysfs does not tell of one may be so."""
    return [each["as_it_runs"] is not False for each in vfio_devices]


def daemon_is_barred(libvirt: Mapping[str, Any]) -> bool:
    """Whether libvirt sets the rlimit mode by itself and may not: then it starts no domain with iommufd at all."""
    may_not = libvirt.get("cap_sys_resource") is False and libvirt.get("starts_iommufd_domains") is False
    return bool(libvirt.get("supports_iommufd") and may_not)


def daemon_cure(libvirt: Mapping[str, Any]) -> str:
    """What such a libvirt is to be given, as sentences. Where its unit lacks nothing, the reason tells."""
    if not libvirt["drop_in"]:
        return str(libvirt["reason"])
    return f"{libvirt['reason']} Give {capability_for(libvirt['unit'], libvirt['drop_in'])}."


def given_back(libvirt: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings of a drop-in that make up for what others of the files of the daemon's unit take away."""
    keys = {each["text"].partition("=")[0] for each in libvirt["taken_by"] or ()}
    bounding, private = "CapabilityBoundingSet" in keys, "PrivateUsers" in keys
    return missing_settings(bounding, bool(keys - {"CapabilityBoundingSet", "PrivateUsers"}), private)


def daemon_takers(libvirt: Mapping[str, Any]) -> str:
    """What takes CAP_SYS_RESOURCE from the daemon."""
    lines = [f"'{each['path']}:{each['line']}: {each['text']}'" for each in libvirt["taken_by"] or ()]
    return " and ".join(lines) or f"a file of {libvirt['unit']}"


def capability_for(unit: str, settings: Sequence[str]) -> str:
    """How the daemon's unit is given the capability, in the words that follow "give". `settings` are of its drop-in."""
    lines = ", ".join(f"'{line}'" for line in ("[Service]", *settings))
    return (
        f"{unit} CAP_SYS_RESOURCE: put the lines {lines} into /etc/systemd/system/{unit}.d/zz-sys-resource.conf, whose"
        f" name has it read last; then run systemctl daemon-reload, and restart {unit}, while VMs go on running"
    )


def its_hard_limit(least: int) -> str:
    """The <hard_limit> of a domain by which it gets an RLIMIT_MEMLOCK of so many bytes or more."""
    return (
        f"<memtune><hard_limit unit='KiB'>{kib_with_room(least)}</hard_limit></memtune> in the domain,"
        f" {human_size(OF_EMULATOR)} of it for the emulator's own memory, since it limits all memory of the VM, too"
    )


def kib_with_room(least: int) -> int:
    """The KiB of a <hard_limit> for a VM that takes so many bytes beside the emulator's own memory.

    With it libvirt caps all that the VM uses, by its control group, and not only what is pinned.
    """
    return -(-(least + OF_EMULATOR) // 1024)


def qemu_for(architecture: str) -> str:
    """The name of QEMU's program for an architecture, as uname -m tells it."""
    return f"qemu-system-{_EMULATOR_OF.get(architecture, architecture)}"
