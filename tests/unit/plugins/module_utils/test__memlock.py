# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._memlock import (
    Asked,
    is_less,
    limit_after,
    lost_at,
    parse_limit,
)
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "limit"),
    [("8388608", 8 * MIB), ("8M", 8 * MIB), ("0", 0), (" Unlimited ", None), ("unlimited", None), ("1.5k", 1536)],
)
def test_parse_limit(text: str, limit: int | None) -> None:
    assert parse_limit("value", text) == limit


@pytest.mark.parametrize("text", ["", "infinity", "-1", "8 MBytes", "9E", "0.5"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(IommufdError, match=r"^hard: .*, or unlimited\.$"):
        parse_limit("hard", text)


@pytest.mark.parametrize(
    ("one", "other", "less"), [(1, 2, True), (2, 2, False), (2, None, True), (None, 2, False), (None, None, False)]
)
def test_is_less(one: int | None, other: int | None, less: bool) -> None:
    assert is_less(one, other) is less


@pytest.mark.parametrize(
    ("now", "asked", "after"),
    [
        (Limit(1, 2), Asked(None, None), Limit(1, 2)),
        (Limit(1, 2), Asked("2", None), Limit(2, 2)),
        (Limit(1, 2), Asked("3", None), Limit(3, 3)),
        (Limit(1, 2), Asked("0", None), Limit(0, 2)),
        (Limit(1, 2), Asked("unlimited", None), Limit(None, None)),
        (Limit(1, None), Asked("3", None), Limit(3, None)),
        (Limit(1, 2), Asked(None, "1"), Limit(1, 1)),
        (Limit(1, 2), Asked("5", "6"), Limit(5, 6)),
        (Limit(None, None), Asked("5", "unlimited"), Limit(5, None)),
    ],
)
def test_limit_after(now: Limit, asked: Asked, after: Limit) -> None:
    assert limit_after(now, asked) == after


@pytest.mark.parametrize(
    ("now", "asked", "words"),
    [
        (Limit(1, 2), Asked("3", "2"), "hard, 2 bytes, is less than value, 3 bytes."),
        (Limit(1, 2), Asked("unlimited", "2"), "hard, 2 bytes, is less than value, unlimited."),
        (
            Limit(1, 2),
            Asked(None, "0"),
            "hard, 0 bytes, is less than the soft limit, which stays without value, 1 bytes.",
        ),
    ],
)
def test_a_soft_limit_beyond_the_hard_one(now: Limit, asked: Asked, words: str) -> None:
    with pytest.raises(IommufdError) as raised:
        limit_after(now, asked)
    assert str(raised.value) == words


@pytest.mark.parametrize(
    ("unit", "user_unit", "is_domain", "words"),
    [
        ("vm1.service", None, False, "LimitMEMLOCK= in a drop-in of vm1.service gives it at the next start."),
        (
            "machine-qemu\\x2d1\\x2dvm.scope",
            None,
            False,
            "<memtune><hard_limit> in the domain's XML says how much, and limits",
        ),
        (None, None, True, "<memtune><hard_limit> in the domain's XML says how much, and limits"),
        (
            "user@7.service",
            "vm.service",
            False,
            "drop-in of vm.service gives it at the next start, within that of user@",
        ),
        ("session-3.scope", None, False, "whatever starts it gives the limit"),
        (None, None, False, "whatever starts it gives the limit"),
    ],
)
def test_what_a_limit_does_not_survive(unit: str | None, user_unit: str | None, is_domain: bool, words: str) -> None:
    told = lost_at((unit, user_unit), is_domain)
    assert told.startswith("The limit ends with the process. For the next one, ")
    assert words in told
