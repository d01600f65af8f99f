# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
from decimal import Decimal

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._size import SIZE_MAX, human_size, parse_size
from hypothesis import example, given
from hypothesis import strategies as st

KIB, MIB, GIB, TIB, PIB, EIB = (1024**power for power in range(1, 7))
RIGHT = "give bytes (67371008), or a number with K, M, G, T, P or E, which count in 1024s (64G, 64GiB, 1.5G)."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (67371008, 67371008),
        ("67371008", 67371008),
        ("67371008b", 67371008),
        ("64K", 64 * KIB),
        ("65536M", 64 * GIB),
        ("64G", 64 * GIB),
        ("2T", 2 * TIB),
        ("3P", 3 * PIB),
        ("7E", 7 * EIB),
        ("64g", 64 * GIB),
        ("64KiB", 64 * KIB),
        ("64MiB", 64 * MIB),
        ("64GiB", 64 * GIB),
        ("64gib", 64 * GIB),
        ("64 GiB", 64 * GIB),
        (" 64 G ", 64 * GIB),
        ("64kB", 64000),
        ("64KB", 64000),
        ("64MB", 64 * 1000**2),
        ("64GB", 64 * 1000**3),
        ("1.5G", 1536 * MIB),
        ("0.5K", 512),
        ("1.001kB", 1001),
        ("64.0", 64),
        (64.0, 64),
        ("0", 0),
        (0, 0),
        ("8191P", 8191 * PIB),
        (SIZE_MAX, SIZE_MAX),
        (str(SIZE_MAX), SIZE_MAX),
    ],
)
def test_parse_size(value: object, expected: int) -> None:
    found = parse_size(value)
    assert found == expected
    assert isinstance(found, int)


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, None, [], ["64G"], {}, b"64G", Decimal(64), float("nan"), float("inf"), float("-inf")),
        *("", " ", "G", "12Q", "64GG", "64 G B", "64iB", "64KiBB", "6 4G", "+64G", "-64G", "0x40", "1e9", "1_000"),
        *("64,5G", ".5G", "5.G", "1.2.3G", "unlimited", "infinity", "64G\n64G", "\u0664G", "\u212a", "nan"),
        "1" * 41,
    ],
)
def test_what_is_not_a_size(value: object) -> None:
    with pytest.raises(IommufdError) as raised:
        parse_size(value)
    assert str(raised.value) == f"{value!r} is not a size: {RIGHT}"


@pytest.mark.parametrize(
    ("value", "minimum", "message"),
    [
        pytest.param("1.5", 0, f"'1.5' is not a whole number of bytes: {RIGHT}", id="half a byte"),
        pytest.param("0.3K", 0, f"'0.3K' is not a whole number of bytes: {RIGHT}", id="part of a byte"),
        pytest.param(0.5, 0, f"0.5 is not a whole number of bytes: {RIGHT}", id="half a byte as a float"),
        pytest.param(-1, 0, "-1 is too small: give 0 or more.", id="negative"),
        pytest.param("0G", 1, "'0G' is too small: give 1 or more.", id="nothing"),
        pytest.param(
            "8E", 0, f"'8E' is too large: give at most {SIZE_MAX} bytes, which is just below 8E.", id="one too many"
        ),
        pytest.param(
            SIZE_MAX + 1,
            0,
            f"9223372036854775808 is too large: give at most {SIZE_MAX} bytes, which is just below 8E.",
            id="one too many as a number",
        ),
        pytest.param("x" * 1000, 0, f"'{'x' * 59} is not a size: {RIGHT}", id="a long text"),
    ],
)
def test_why_a_size_is_refused(value: object, minimum: int, message: str) -> None:
    with pytest.raises(IommufdError) as raised:
        parse_size(value, minimum)
    assert str(raised.value) == message


@given(st.one_of(st.integers(), st.floats(), st.text(), st.text("0123456789.kKmMgGiIbB "), st.none(), st.booleans()))
@example("1" * 40 + "." + "1" * 40 + "EiB")
def test_anything_gives_a_size_or_our_own_exception(value: object) -> None:
    with contextlib.suppress(IommufdError):
        assert 0 <= parse_size(value) <= SIZE_MAX


@given(st.integers(0, SIZE_MAX))
def test_numbers_and_their_texts_are_the_same(count: int) -> None:
    assert parse_size(count) == parse_size(str(count)) == count


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (4096, "4 KiB"),
        (67371008, "64.2 MiB"),
        (100 * MIB, "100 MiB"),
        (1023 * MIB, "1023 MiB"),
        (GIB - 1, "1 GiB"),
        (GIB, "1 GiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (66 * GIB, "66 GiB"),
        (9996 * GIB // 100, "100 GiB"),
        (2 * TIB, "2 TiB"),
        (SIZE_MAX, "8 EiB"),
        (2000 * EIB, "2000 EiB"),
        (9999 * EIB, "9999 EiB"),
        (10**400, "more than 9999 EiB"),
        (-(10**400), "less than -9999 EiB"),
        (-4096, "-4 KiB"),
        (-3 * GIB // 2, "-1.5 GiB"),
    ],
)
def test_human_size(count: int, expected: str) -> None:
    assert human_size(count) == expected


@given(st.integers(-SIZE_MAX, SIZE_MAX))
def test_human_size_is_short_and_near(count: int) -> None:
    text = human_size(count)
    number, unit = text.lstrip("-").split()
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    assert len(number) <= 4
    assert text.startswith("-") == (count < 0)
    assert float(number) * 1024 ** units.index(unit) == pytest.approx(abs(count), rel=0.06)
