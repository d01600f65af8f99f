# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what is made of what iommufd_info tells of a host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import basename
from typing import Any

__all__ = ("UNSEEN", "daemon_cure", "daemon_is_barred", "has_iommufd", "has_libvirt", "own_emulators", "qemu_for")

# What stands in limits_of_view where there may be VMs that were not seen: processes as a whole, their descriptors, or
# their iommufds.
UNSEEN = ("processes", "descriptors", "iommufds")

# uname -m, where the name of QEMU's emulator is another one.
_EMULATOR_OF = {"ppc64le": "ppc64", "i686": "i386", "armv7l": "arm"}


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
    """Whether there is, or may be, a system libvirt."""
    return libvirt["unit"] is not None or libvirt["sets_rlimit_mode"] is None


def daemon_is_barred(libvirt: Mapping[str, Any]) -> bool:
    """Whether libvirt sets the rlimit mode by itself and may not: then it starts no domain with iommufd at all."""
    may_not = libvirt["cap_sys_resource"] is False and libvirt["starts_iommufd_domains"] is False
    return bool(libvirt["supports_iommufd"] and may_not)


def daemon_cure(libvirt: Mapping[str, Any]) -> str:
    """What such a libvirt is to be given, as sentences. Where its unit lacks nothing, the reason tells."""
    unit, settings = libvirt["unit"], libvirt["drop_in"]
    if not settings:
        return str(libvirt["reason"])
    lines = ", ".join(f"'{line}'" for line in ("[Service]", *settings))
    return (
        f"{libvirt['reason']} Give {unit} the capability: put the lines {lines} into"
        f" /etc/systemd/system/{unit}.d/zz-sys-resource.conf, whose name has it read last; then run systemctl"
        f" daemon-reload, and restart {unit}, while VMs go on running."
    )


def qemu_for(architecture: str) -> str:
    """The name of QEMU's program for an architecture, as uname -m tells it."""
    return f"qemu-system-{_EMULATOR_OF.get(architecture, architecture)}"
