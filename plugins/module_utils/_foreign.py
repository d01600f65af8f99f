# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: values that somebody else has made, such as a user's libvirt or a child that is a user.

Whatever they are, there comes out a value of the type and size that was asked for, or an IommufdError.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Callable, TypeVar

from ._errors import IommufdError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from xml.etree.ElementTree import Element

Value = TypeVar("Value")

__all__ = (
    "XML_MAX",
    "boolean",
    "first_of",
    "harmless",
    "member",
    "number",
    "one_of",
    "or_none",
    "parse_answer",
    "parse_xml",
    "shown_text",
    "text",
    "texts",
)

# What fits into a C long, and so into anything that the kernel or libvirt counts.
COUNT_MAX = 2**63 - 1
_DIGITS_MAX = 19
# Bit masks and limits of the kernel's have 64 bits.
_JSON_DIGITS_MAX = 20

# A text for people, or a name.
_TEXT_MAX = 4096
_BRIEF_MAX = 80

# How many sentences of one kind are told at once.
_TOLD_MAX = 10

# libvirt sends no longer text. A domain's has some kilobytes, and some hundred of elements and attributes; each of
# these takes a hundred times the memory that it has in the text.
XML_MAX = 2**24
_XML_MARKS_MAX = 2**18


def shown_text(given: object) -> str:
    """A text of somebody else's as it may be shown: on one line, printable, and cut where it is long."""
    words = given if isinstance(given, str) else f"<{type(given).__name__}>"
    more = "..." if len(words) > _TEXT_MAX else ""
    try:
        raw = words[:_TEXT_MAX].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # JSON can hold halves of characters.
        raw = words[:_TEXT_MAX].encode("utf-8", "backslashreplace")
    return printable(raw) + more


def harmless(given: Any) -> Any:
    """The same data with each text in it as it may be shown, whole; what is printable anyway is the very same text."""
    if isinstance(given, str):
        return given if given.isprintable() else printable(given.encode("utf-8", "backslashreplace"))
    if isinstance(given, dict):
        return {harmless(key): harmless(value) for key, value in given.items()}
    return [harmless(each) for each in given] if isinstance(given, (list, tuple)) else given


def _brief(given: object) -> str:
    """The same in a message that has something else to say."""
    if isinstance(given, int):
        # Python refuses to write a number of some thousand digits.
        return str(given) if -COUNT_MAX <= given <= COUNT_MAX else "a number of many digits"
    if isinstance(given, bytes):
        given = given[:_TEXT_MAX].decode("utf-8", "backslashreplace")
    words = shown_text(given)
    return repr(words if len(words) <= _BRIEF_MAX else words[:_BRIEF_MAX] + "...") if isinstance(given, str) else words


def number(given: object, most: int = COUNT_MAX) -> int:
    """A whole number from 0 to `most`, given as such or in decimal digits with white space around them at most.

    Raises IommufdError for anything else, whose text continues a sentence about the value's place.
    """
    found: int | None = None
    if isinstance(given, int) and not isinstance(given, bool):
        found = given
    elif isinstance(given, (str, bytes)) and len(given) <= _TEXT_MAX:
        digits = given.strip()
        # Python takes the digits of all scripts, underscores, and as many as there are.
        pattern: Any = rb"[0-9]+" if isinstance(digits, bytes) else r"[0-9]+"
        if re.fullmatch(pattern, digits):
            stripped = digits.lstrip(b"0" if isinstance(digits, bytes) else "0")  # type: ignore[arg-type]
            if len(stripped) > _DIGITS_MAX:
                raise IommufdError(f"is not from 0 to {most} but {_brief(given)}")
            found = int(stripped or "0")
    if found is None:
        raise IommufdError(f"is no number but {_brief(given)}")
    if not 0 <= found <= most:
        raise IommufdError(f"is not from 0 to {most} but {_brief(given)}")
    return found


def text(given: object) -> str:
    """A text, as it may be shown. Raises IommufdError where it is something else."""
    if not isinstance(given, str):
        raise IommufdError(f"is no text but {_brief(given)}")
    return shown_text(given)


def boolean(given: object) -> bool:
    """True or false. Raises IommufdError where it is something else."""
    if not isinstance(given, bool):
        raise IommufdError(f"is neither true nor false but {_brief(given)}")
    return given


def one_of(*words: str) -> Callable[[object], str]:
    """What reads one of these texts, and raises IommufdError for anything else."""

    def read(given: object) -> str:
        if given not in words:
            raise IommufdError(f"is none of {', '.join(words)} but {_brief(given)}")
        return str(given)

    return read


def texts(most: int) -> Callable[[object], tuple[str, ...]]:
    """What reads a list of so many texts at most, as they may be shown; it raises IommufdError for anything else."""

    def read(given: object) -> tuple[str, ...]:
        if not isinstance(given, (list, tuple)):
            raise IommufdError(f"is no list but {_brief(given)}")
        if len(given) > most:
            raise IommufdError(f"has more than {most} texts")
        return tuple(map(text, given))

    return read


def first_of(sentences: Sequence[str]) -> str:
    """The first ten sentences as one text, cut where it is long all the same, and how many more there are."""
    more = len(sentences) - _TOLD_MAX
    rest = f" There {'are' if more > 1 else 'is'} {more} more like these." if more > 0 else ""
    return shown_text(" ".join(sentences[:_TOLD_MAX])) + rest


def member(given: object, name: str, read: Callable[[object], Value]) -> Value:
    """What `read` makes of what is under a name in a JSON object.

    Raises IommufdError, whose text names it, where it is no object, lacks the name, or `read` does.
    """
    if not isinstance(given, dict):
        raise IommufdError(f"{name} is looked for in what is no object but {_brief(given)}")
    if name not in given:
        raise IommufdError(f"{name} is missing")
    try:
        return read(given[name])
    except IommufdError as exc:
        raise IommufdError(f"{name} {exc}") from exc


def or_none(read: Callable[[object], Value]) -> Callable[[object], Value | None]:
    """The same, but None for JSON's null."""
    return lambda given: None if given is None else read(given)


def parse_answer(given: bytes) -> Any:
    """The value that JSON stands for. Raises IommufdError where it is none, or holds what no program of ours writes.

    That is a number that is too long or not finite, and more levels than Python reads. Whoever calls this bounds the
    length.
    """
    try:
        return json.loads(given, parse_int=_json_int, parse_float=_json_float, parse_constant=_json_float)
    # The one place where nesting counts. json's own code counts the levels, and leaves the interpreter whole.
    except (ValueError, RecursionError) as exc:
        raise IommufdError(f"is no JSON that is to be believed ({_brief(str(exc))})") from exc


def _json_int(digits: str) -> int:
    if len(digits.lstrip("-")) > _JSON_DIGITS_MAX:
        raise ValueError("a number has too many digits")
    return int(digits)


def _json_float(digits: str) -> float:
    # 1e999 is well-formed, and infinite to Python.
    found = float(digits)
    if not -COUNT_MAX <= found <= COUNT_MAX:
        raise ValueError(f"{digits[:20]} is no number to count with")
    return found


def parse_xml(given: str | bytes) -> Element:
    """The root of an XML document in UTF-8. Raises IommufdError, whose text continues a sentence about the document.

    One that declares its own entities is refused, since some lines of them can stand for gigabytes; libvirt writes
    none. So is one that would take too much memory.
    """
    # Few tasks need it, and a module pays for each import on each host anew.
    import xml.etree.ElementTree as ET

    if len(given) > XML_MAX:
        raise IommufdError(f"is too large: it has {len(given)} bytes, and {XML_MAX} at most are read")
    try:
        # The parser takes a text as it is, but bytes in whatever encoding they claim to be in, where a declaration
        # would look like something else.
        words = given.decode("utf-8") if isinstance(given, bytes) else given
        if "<!DOCTYPE" in words or "<!ENTITY" in words:
            raise IommufdError("has a DOCTYPE, which libvirt does not write")
        if words.count("<") + words.count("=") > _XML_MARKS_MAX:
            raise IommufdError(f"has more than {_XML_MARKS_MAX} elements and attributes")
        return ET.fromstring(words)
    except (ET.ParseError, ValueError, LookupError) as exc:
        raise IommufdError(f"is no XML: {_brief(str(exc))}") from exc
