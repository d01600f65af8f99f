# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import json
import random
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import IOMMUFD, NO_VIOMMU, PROCESS, Device
from ansible_collections.virt.iommufd.plugins.module_utils._daemon import unit_from_json
from ansible_collections.virt.iommufd.plugins.module_utils._domain_start import (
    DomainSeen,
    Started,
)
from ansible_collections.virt.iommufd.plugins.module_utils._domain_xml import Defined
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._foreign import (
    COUNT_MAX,
    XML_MAX,
    boolean,
    first_of,
    member,
    number,
    or_none,
    parse_answer,
    parse_xml,
    shown_text,
    text,
    texts,
)


def kind(given: object) -> str:
    """What a case is called: some of the values are too long for that."""
    return type(given).__name__


# 10 to that is a number, and has more digits than Python writes.
MANY = 5000


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (0, 0),
        (COUNT_MAX, COUNT_MAX),
        ("42", 42),
        (" 42\n", 42),
        (b"42\n", 42),
        (str(COUNT_MAX), COUNT_MAX),
        ("0" * 100 + "1", 1),
        ("000", 0),
    ],
)
def test_a_number(given: object, found: int) -> None:
    assert number(given) == found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (COUNT_MAX + 1, "is not from 0 to 9223372036854775807 but a number of many digits"),
        (str(COUNT_MAX + 1), "but '9223372036854775808'"),
        ("9" * 400, r"is not from 0 to .* but '9{80}\.\.\.'"),
        ("9" * MANY, r"is no number but '9{80}\.\.\.'"),
        (10**MANY, "but a number of many digits"),
        (-(10**MANY), "but a number of many digits"),
        (-1, "but -1"),
        ("-1", "is no number but '-1'"),
        ("+1", "is no number"),
        ("1_0", "is no number"),
        ("0x10", "is no number"),
        ("\u0661\u0662", "is no number"),
        ("\u00b2", "is no number"),
        ("", "is no number but ''"),
        (None, "is no number but <NoneType>"),
        (True, "is no number but True"),
        (1.0, "is no number but <float>"),
        (float("inf"), "is no number but <float>"),
        ("1\0", "is no number"),
        (b"\xff", r"is no number but <bytes>|\\xff"),
        ("\ud800\x1b[2J", r"is no number but '.*ud800.*x1b\[2J'"),
        ([1], "is no number but <list>"),
    ],
    ids=kind,
)
def test_what_is_no_number(given: object, words: str) -> None:
    with pytest.raises(IommufdError, match=words) as caught:
        number(given)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_a_number_up_to_a_bound() -> None:
    assert number("8", 8) == 8
    with pytest.raises(IommufdError, match="is not from 0 to 8 but '9'"):
        number("9", 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [("a\x1b[2J\u202e\n", r"a\x1b[2J\u202e\n"), ("\udcff", r"\xff"), ("\ud800", r"\ud800"), (3, "<int>")],
)
def test_what_is_shown(given: object, words: str) -> None:
    assert shown_text(given) == words


def test_what_is_shown_is_cut() -> None:
    assert shown_text("a" * 2**20) == "a" * 4096 + "..."


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, ""),
        (1, "No."),
        (10, "No. " * 9 + "No."),
        (11, "No. " * 10 + "There is 1 more like these."),
        (5000, "No. " * 10 + "There are 4990 more like these."),
    ],
)
def test_the_first_of_some_sentences(count: int, told: str) -> None:
    assert first_of(["No."] * count) == told


def test_the_first_of_some_sentences_is_cut() -> None:
    told = first_of(["\x1b[2J" + "a" * 4096] * 5000)
    assert told.isprintable()
    assert len(told) < 4200
    assert told.endswith("... There are 4990 more like these.")


@pytest.mark.parametrize(
    ("read", "given", "words"),
    [
        (text, 3, "is no text but 3"),
        (text, None, "is no text but <NoneType>"),
        (boolean, 1, "is neither true nor false but 1"),
        (boolean, "true", "is neither true nor false but 'true'"),
        (texts(3), "abc", "is no list but 'abc'"),
        (texts(3), {}, "is no list but <dict>"),
        (texts(3), ["a", None], "is no text but <NoneType>"),
        (texts(3), ["a"] * 4, "has more than 3 texts"),
        (texts(0), ["a"], "has more than 0 texts"),
    ],
)
def test_what_is_of_another_kind(read: Callable[[object], object], given: object, words: str) -> None:
    with pytest.raises(IommufdError, match=words):
        read(given)
    with pytest.raises(IommufdError, match=f"^it {words}"):
        member({"it": given}, "it", read)


def test_members() -> None:
    assert member({"a": "b"}, "a", text) == "b"
    assert member({"a": None}, "a", or_none(number)) is None
    with pytest.raises(IommufdError, match=r"^a is missing"):
        member({}, "a", text)
    with pytest.raises(IommufdError, match=r"^a is looked for in what is no object but <list>"):
        member([], "a", text)


def test_an_answer() -> None:
    given = {"value": {"a": [1, -1.5, None, True, "\ud800", str(COUNT_MAX)], "b": 2**64 - 1}}
    assert parse_answer(json.dumps(given).encode()) == given


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"\xff",
        b"{",
        b"[" * 2**20,
        b'{"a":' * 2**17,
        b"[" * 10**5 + b"]" * 10**5,
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"-1e999",
        b"1" * 21,
        b"-" + b"1" * 21,
        b"9" * 2**20,
    ],
    ids=kind,
)
def test_what_is_no_answer(given: bytes) -> None:
    with pytest.raises(IommufdError, match="is no JSON that is to be believed") as caught:
        parse_answer(given)
    assert len(str(caught.value)) < 250


def test_xml() -> None:
    for given in ("<a><b c='d'>\u00e9</b></a>", "<a><b c='d'>\u00e9</b></a>".encode()):
        assert parse_xml(given).findtext("b") == "\u00e9"
    # Whatever it claims, it is read as what it is.
    assert parse_xml(b"<?xml version='1.0' encoding='utf-16'?><a>\xc3\xa9</a>").text == "\u00e9"


LOL = "<!DOCTYPE a [<!ENTITY b 'bbbbbbbbbb'><!ENTITY c '&b;&b;&b;&b;&b;&b;&b;&b;'>]><a>&c;</a>"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (LOL, "has a DOCTYPE"),
        (LOL.encode(), "has a DOCTYPE"),
        (LOL.encode("utf-16"), "is no XML"),
        (b"<?xml version='1.0' encoding='cp037'?>" + LOL.encode("cp037"), "is no XML"),
        ("<!DOCTYPE a SYSTEM 'file:///etc/shadow'><a/>", "has a DOCTYPE"),
        ("<a>&b;</a>", "is no XML"),
        ("", "is no XML"),
        ("<a>", "is no XML"),
        ("<a/>\ud800", "is no XML"),
        ("<a>\0</a>", "is no XML"),
        ("<a>" + " " * XML_MAX + "</a>", "is too large: it has 16777223 bytes, and 16777216 at most"),
        (b"<a>" + b" " * XML_MAX + b"</a>", "is too large"),
        ("<a>" + "<b/>" * 2**18 + "</a>", "has more than 262144 elements and attributes"),
        ("<a " + " ".join(f"b{each}=''" for each in range(2**18)) + "/>", "has more than 262144"),
        ("<a>" * 2**18 + "</a>" * 2**18, "has more than 262144"),
    ],
    ids=kind,
)
def test_what_is_no_xml_to_be_read(given: str | bytes, words: str) -> None:
    with pytest.raises(IommufdError, match=words):
        parse_xml(given)


def test_xml_of_many_levels_is_read_and_let_go() -> None:
    root = parse_xml("<a>" * 10**5 + "</a>" * 10**5)
    assert root.findtext("a/a/b") is None
    del root


DEVICES = (Device(IOMMUFD, "a", PROCESS),)
DEFINED = Defined("vm1", 2**31, DEVICES, NO_VIOMMU, 1, None, False, False, None, "g", None, 0, ("0000:00:05.1",))
SEEN = DomainSeen(12_008_000, "u-u-i-d", False, "shut off", DEFINED, ("No way.",))
READERS: list[tuple[Callable[[Any], Any], Any]] = [
    (DomainSeen.from_json, SEEN.to_json()),
    (Started.from_json, {"state": "running", "started": True}),
    (unit_from_json, "libvirtd.service"),
    (lambda given: member(given, "a", or_none(number)), {"a": 3}),
]
NASTY: list[Any] = [
    *(None, True, False, 0, -1, COUNT_MAX, COUNT_MAX + 1, 10**400, 10**MANY, 1.5, float("nan"), float("inf")),
    *("", "1", "9" * 400, "\u0661", "\ud800", "\x1b[2J\u202e", "{{ 7 * 7 }}", "a" * 10**5),
    *([], {}, [[]], {"a": None}, [None] * 3, {"fdgroup": 1}, {"devices": [{}]}),
]


def spoil(given: Any, chance: random.Random) -> Any:
    """The same with one thing in it that is something else, or missing, or there in addition."""
    if not isinstance(given, dict) or chance.random() < 0.1:
        return chance.choice(NASTY)
    name = chance.choice(list(given))
    changed = {**given, name: spoil(given[name], chance)}
    if chance.random() < 0.1:
        del changed[name]
    if chance.random() < 0.1:
        changed["\ud800"] = chance.choice(NASTY)
    return changed


@pytest.mark.parametrize(("read", "good"), READERS, ids=kind)
def test_whatever_another_process_answers(read: Callable[[Any], Any], good: Any) -> None:
    chance = random.Random(20)
    read(good)
    taken = refused = 0
    for _attempt in range(2000):
        try:
            found = repr(read(spoil(good, chance)))
            taken += 1
        except IommufdError as exc:
            found = str(exc)
            refused += 1
        assert found.isprintable()
    # Both ways were gone.
    assert taken
    assert refused


PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"a"',
    b":",
    b",",
    b"1",
    b"-",
    b"1e999",
    b"NaN",
    b'"\\ud800"',
    b"\xff",
    b"null",
    b"9",
]


def test_whatever_bytes_are_an_answer() -> None:
    chance = random.Random(20)
    for _attempt in range(20000):
        given = b"".join(chance.choices(PIECES, k=chance.randrange(12)))
        # Nothing else is raised.
        with contextlib.suppress(IommufdError):
            parse_answer(given)
