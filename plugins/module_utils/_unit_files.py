# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: which lines of a unit's files take CAP_SYS_RESOURCE from what the unit starts.

See config_parse_capability_set() in systemd's src/core/load-fragment.c.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from ._capabilities import CAP_SYS_RESOURCE, capability_mask
from ._errors import IommufdError, error_text, printable

__all__ = (
    "DROP_IN",
    "Lack",
    "Line",
    "find_lack",
    "missing_settings",
    "parse_lines",
    "read_lines",
)

# What the role iommufd_host puts beside a unit's other drop-ins, of which systemd reads it after most.
DROP_IN = "zz-iommufd_host.conf"

_BOUNDING, _AMBIENT = "CapabilityBoundingSet", "AmbientCapabilities"
_KEYS = (_BOUNDING, _AMBIENT, "User", "DynamicUser", "SecureBits", "PrivateUsers")
_ROOT = ("", "root", "0")
_NO = ("", "0", "no", "n", "false", "f", "off")
_ALL = 2**63 - 1
_IT = capability_mask([CAP_SYS_RESOURCE])

# Where an administrator puts what systemd does not know of yet.
_FOLDERS = ("/etc/systemd/system", "/run/systemd/system")
# LONG_LINE_MAX in systemd's src/basic/def.h is as much for one line.
_FILE_MAX = 2**20
_FILES_MAX = 64
_PATIENCE = 10


class Line(NamedTuple):
    """A setting in the section [Service] of a file, and the number of the line that it begins on."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Lack(NamedTuple):
    """The lines that take the capability away, and the settings by which a drop-in gives it back."""

    lines: tuple[Line, ...] = ()
    settings: tuple[str, ...] = ()


def missing_settings(bounding: bool, ambient: bool, private: bool) -> tuple[str, ...]:
    """What a drop-in has to hold, by what there is to be mended: either set, or a user namespace of its own."""
    settings = {
        # The second line alone would take all others away, once nothing is taken by another file any more.
        f"{_BOUNDING}=~CAP_SYS_RESOURCE": bounding,
        f"{_BOUNDING}=CAP_SYS_RESOURCE": bounding,
        f"{_AMBIENT}=CAP_SYS_RESOURCE": ambient,
        "PrivateUsers=no": private,
    }
    return tuple(setting for setting, lacking in settings.items() if lacking)


def find_lack(lines: Iterable[Line]) -> Lack:
    """What these lines, in the order in which systemd reads them, take away and do not give back."""
    bounding, ambient = _ALL, 0
    # Those that take it from one of the sets, and those that have a set or a namespace decide.
    taking: dict[str, list[Line]] = {_BOUNDING: [], _AMBIENT: []}
    last: dict[str, Line] = {}
    for line in lines:
        key, _equals, value = line.text.partition("=")
        if key == _BOUNDING:
            bounding = _merged(bounding, value, _ALL)
            _note(taking[key], line, has=bounding & _IT, alone=_merged(_ALL, value, _ALL) & _IT)
        elif key == _AMBIENT:
            had, ambient = ambient & _IT, _merged(ambient, value, 0)
            _note(taking[key], line, has=ambient & _IT, alone=not had)
        else:
            # Also of SecureBits=, whatever systemd.exec(5) says: seen with systemd 257 and 262.
            last[key] = line
    values = {key: line.text.partition("=")[2] for key, line in last.items()}
    # To root, the kernel gives the bounding set.
    no_root = {
        "User": values.get("User", "") not in _ROOT,
        "DynamicUser": values.get("DynamicUser", "").lower() not in _NO,
        "SecureBits": "noroot" in values.get("SecureBits", "").split(),
    }
    by_ambient = any(no_root.values()) and not ambient & _IT
    private = values.get("PrivateUsers", "").lower() not in _NO
    found = list(taking[_BOUNDING])
    if by_ambient:
        found += [*(last[key] for key, decides in no_root.items() if decides), *taking[_AMBIENT]]
    found += [last["PrivateUsers"]] if private else []
    return Lack(tuple(found), missing_settings(not bounding & _IT, by_ambient, private))


def _note(taking: list[Line], line: Line, has: int, alone: int) -> None:
    """Keeps the lines that take the capability away since it was there. `alone`: whether there it would be by this."""
    if has:
        taking.clear()
    elif not alone:
        taking.append(line)


def _merged(now: int, value: str, initial: int) -> int:
    """A set of capabilities once a line with that value was read."""
    inverted = value.startswith("~")
    mask = capability_mask(word.strip("\"'").lower() for word in value[inverted:].split())
    # That a set is again what it was at first counts up to systemd 257, and not in 262, which merges then.
    if not mask or now == initial:
        return _ALL & ~mask if inverted else mask
    return now & ~mask if inverted else now | mask


def parse_lines(path: str, text: bytes) -> list[Line]:
    """The lines of a unit's file that may have to do with the capability."""
    found = []
    section, begun, whole = b"", 0, b""
    # The last line may end in a backslash, too.
    for number, line in enumerate([*text.splitlines(), b""], 1):
        line = line.lstrip()
        if line[:1] in (b"#", b";") or not (line or begun):
            continue
        begun = begun or number
        whole += line
        if re.search(rb"(?<!\\)(\\\\)*\\$", whole):
            whole = whole[:-1] + b" "
            continue
        if whole.startswith(b"["):
            section = whole.rstrip()
        key, equals, value = whole.partition(b"=")
        name = key.strip().decode("ascii", "replace")
        if section == b"[Service]" and equals and name in _KEYS:
            found.append(Line(path, begun, f"{name}={printable(b' '.join(value.split()))}"))
        begun, whole = 0, b""
    return found


def read_lines(shown: Mapping[str, str]) -> tuple[Line, ...]:
    """The lines of a unit's files that may have to do with the capability, in the order in which systemd reads them.

    `shown` is what it shows of the unit. Of drop-ins that are new to it, only an administrator's are found. Raises
    IommufdError.
    """
    # Few hosts need it, and filters only the rest of this file.
    from ._child import NoAnswer, in_child

    unit = shown.get("Id", "")
    try:
        drop_ins = shlex.split(shown.get("DropInPaths", ""))
    except ValueError as exc:
        raise IommufdError(f"systemd names the drop-ins of {unit} in words that are not understood.") from exc
    folders = [f"{folder}/{unit}.d" for folder in _FOLDERS] if shown.get("NeedDaemonReload") == "yes" else []
    try:
        given = in_child(None, partial(_read, shown.get("FragmentPath", ""), drop_ins, folders), _PATIENCE)
    except NoAnswer as exc:
        raise IommufdError(f"The files of {unit} were not read within {_PATIENCE} seconds.") from exc
    return tuple(Line(*each) for each in given)


def _read(unit: str, drop_ins: Sequence[str], folders: Sequence[str]) -> list[Line]:
    paths = list(drop_ins)
    if folders:
        new = [path for folder in folders for path in glob.glob(f"{glob.escape(folder)}/*.conf")]
        # Of one name, that of /etc counts, or else that of /run.
        ranked = sorted({*drop_ins, *new}, key=lambda path: (path.startswith("/etc/"), path.startswith("/run/")))
        paths = [path for _name, path in sorted({os.path.basename(path): path for path in ranked}.items())]
    if len(paths) > _FILES_MAX:
        raise IommufdError(f"There are {len(paths)} of them, which are more than are read.")
    return [line for path in (unit, *paths) if path for line in parse_lines(path, _content(path))]


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            text = stream.read(_FILE_MAX + 1)
    except FileNotFoundError:
        # It was removed since systemd read it.
        return b""
    except OSError as exc:
        raise IommufdError(f"{path} cannot be read ({error_text(exc.errno)}).") from exc
    if len(text) > _FILE_MAX:
        raise IommufdError(f"{path} is larger than {_FILE_MAX} bytes.")
    return text
