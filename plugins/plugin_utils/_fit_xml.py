# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the XML of a libvirt domain as memlock_fit is given it. Pure functions."""

from __future__ import annotations

from typing import Any

from ..module_utils import _domain_xml
from ..module_utils._domain_xml import CONTAINER, LIBVIRTS, Defined
from ..module_utils._errors import IommufdError

__all__ = ("CONTAINER", "DEVICES_MAX", "IOMMUFDS_MAX", "LIBVIRTS", "Defined", "parse_domain")

# More devices and iommufds than any VM has. What may be is counted out, so there has to be an end.
DEVICES_MAX = 256
IOMMUFDS_MAX = 4


def parse_domain(description: Any) -> Defined:
    """Reads a domain's XML, unless that was read. Raises IommufdError where it is none, or has too many devices."""
    if isinstance(description, Defined):
        return _bounded(description)
    if not isinstance(description, str):
        raise IommufdError(f"domain_xml: a {type(description).__name__} is no XML: give the text of virsh dumpxml.")
    try:
        found = _domain_xml.parse_domain(description)
    except IommufdError as exc:
        told = str(exc)
        raise IommufdError(f"domain_xml: {told[0].upper()}{told[1:]}.") from exc
    return _bounded(found)


def _bounded(found: Defined) -> Defined:
    if len(found.devices) > DEVICES_MAX:
        raise IommufdError(f"domain_xml: It has more than {DEVICES_MAX} devices that pin memory.")
    return found
