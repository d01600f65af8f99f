# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.plugin_utils._fit_xml import parse_domain
from ansible_collections.virt.iommufd.tests.unit.plugins.module_utils.test__domain_xml import HOSTDEV, domain

ENTITY = "<!DOCTYPE d [<!ENTITY a 'aaaa'>]><domain><name>&a;</name></domain>"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "domain_xml: a NoneType is no XML: give the text of virsh dumpxml."),
        (["<domain/>"], "domain_xml: a list is no XML"),
        ("", "domain_xml: It is no XML: "),
        ("<domain>", "domain_xml: It is no XML: "),
        (ENTITY, "domain_xml: It has a DOCTYPE, which libvirt does not write."),
        ("<network/>", "domain_xml: It is no domain: give what virsh dumpxml prints."),
        ("<domain/>", "domain_xml: Its <memory> is no number but ''."),
        ("<domain><memory>-1</memory></domain>", "domain_xml: Its <memory> is no number but '-1'."),
        (
            "<domain><memory unit='parsecs'>1</memory></domain>",
            "domain_xml: Its <memory> is in no unit of size but in parsecs.",
        ),
        ("<domain><memory unit='0'>1</memory></domain>", "domain_xml: Its <memory> is in no unit of size but in 0."),
        (f"<domain><memory>{'9' * 5000}</memory></domain>", "domain_xml: Its <memory> is no number but '999"),
        (domain(HOSTDEV * 257), "domain_xml: It has more than 256 devices that pin memory."),
        (domain(arguments="-x " * 4097), "domain_xml: It has more than 4096 arguments for QEMU."),
        ("<" * 2**19, "domain_xml: It has more than 262144 elements and attributes."),
    ],
)
def test_what_is_no_domain(given: Any, words: str) -> None:
    with pytest.raises(IommufdError) as raised:
        parse_domain(given)
    assert str(raised.value).startswith(words)
