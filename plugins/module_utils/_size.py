# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: sizes as people write them, and as people read them."""

from __future__ import annotations

import re
from fractions import Fraction
from math import isfinite

from ._errors import IommufdError

__all__ = (
    "SIZE_MAX",
    "human_size",
    "parse_size",
    "whole",
)

# The largest number of bytes that anything here is given or has: an off_t.
SIZE_MAX = 2**63 - 1

_PREFIXES = "KMGTPE"
_COUNTED_OUT = 9999 * 2**60

# As libvirt reads them. QEMU and systemd know the first form, also of 1024, and nothing of the last.
_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{prefix.lower(): 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix.lower()}ib": 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix.lower()}b": 1000**power for power, prefix in enumerate(_PREFIXES, 1)},
}

# More digits than any size has are refused here, before they cost anything.
_SIZE = re.compile(r"([0-9]{1,40}(?:\.[0-9]{1,40})?) *([A-Za-z]{0,3})")

_RIGHT = "give bytes (67371008), or a number with K, M, G, T, P or E, which count in 1024s (64G, 64GiB, 1.5G)"


def parse_size(value: object, minimum: int = 0) -> int:
    """The bytes of a size as people write it: 67371008, "64G", "64 GiB", "1.5g", or in 1000s "64GB".

    Raises IommufdError for anything else, for less than `minimum` and for more than SIZE_MAX.
    """
    size = _exact(value)
    # Python refuses to write a number of some thousand digits.
    text = "The number" if isinstance(value, int) and abs(value) > SIZE_MAX * 2 else f"{value!r:.60}"
    if size is None:
        raise IommufdError(f"{text} is not a size: {_RIGHT}.")
    if size.denominator != 1:
        raise IommufdError(f"{text} is not a whole number of bytes: {_RIGHT}.")
    if size < minimum:
        raise IommufdError(f"{text} is too small: give {minimum} or more.")
    if size > SIZE_MAX:
        raise IommufdError(f"{text} is too large: give at most {SIZE_MAX} bytes, which is just below 8E.")
    return int(size)


def _exact(value: object) -> Fraction | None:
    """The size as a number that nothing was rounded off, None where the value is none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # What a template has calculated may be a float, which need not be a number.
        return Fraction(value) if isfinite(value) else None
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found or found.group(2).lower() not in _UNITS:
        return None
    return Fraction(found.group(1)) * _UNITS[found.group(2).lower()]


def whole(size: int, unit: int) -> int:
    """The size, rounded up to a multiple of a unit."""
    return -(-size // unit) * unit


def human_size(count: int) -> str:
    """Bytes in at most four digits: "65.8 KiB", "512 MiB", "-1.5 GiB". What no host can have is not counted out."""
    if abs(count) > _COUNTED_OUT:
        return "more than 9999 EiB" if count > 0 else "less than -9999 EiB"
    size, unit = float(count), "bytes"
    for prefix in _PREFIXES:
        if round(abs(size)) < 1024:
            break
        size, unit = size / 1024, f"{prefix}iB"
    digits = 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {unit}".replace(".0 ", " ")
