# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what QEMU's command line says of its guest. Whoever started it chose that text."""

from __future__ import annotations

import re

from ._size import SIZE_MAX

__all__ = ("guest_memory", "guest_name", "is_session_domain")

_SESSION_FOLDER = re.compile(rb"/libvirt/qemu/lib/domain-[0-9]+-")

_UNITS = {b"b": 1, b"k": 2**10, b"m": 2**20, b"g": 2**30, b"t": 2**40}


def _properties(arguments: list[bytes], option: bytes, implied: bytes) -> dict[bytes, bytes]:
    """The properties that were given with an option, however often: `-option implied,key=value,...`.

    A comma in a value is written twice; the first property may be given without its key. Later ones win.
    """
    found = {}
    spelled = (b"-" + option, b"--" + option)
    for each, value in zip(arguments, arguments[1:]):
        if each in spelled:
            for position, part in enumerate(value.replace(b",,", b"\0").split(b",")):
                key, equals, text = part.partition(b"=")
                if not equals and position == 0:
                    key, text = implied, part
                found[key] = text.replace(b"\0", b",")
    return found


def guest_name(arguments: list[bytes]) -> bytes | None:
    """The guest's name in `-name guest=NAME,...`; None where there is none."""
    return _properties(arguments, b"name", b"guest").get(b"guest")


def guest_memory(arguments: list[bytes]) -> int | None:
    """The guest's memory in bytes, from `-m size=SIZE,...`, which counts MiB without a suffix.

    None without, and where it says more than any size has.
    """
    size = _properties(arguments, b"m", b"size").get(b"size", b"")
    found = re.fullmatch(rb"([0-9]{1,18})([bkmgt]?)", size.lower())
    memory = int(found.group(1)) * _UNITS[found.group(2) or b"m"] if found else None
    return None if memory is None or memory > SIZE_MAX else memory


def is_session_domain(arguments: list[bytes]) -> bool:
    """Whether a user's own libvirt seems to have started it: the folder it keeps for the guest is in a home."""
    return bool(_SESSION_FOLDER.search(b"\0".join(arguments)))
