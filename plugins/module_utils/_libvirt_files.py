# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what the files of the system libvirt tell of it: library, qemu.conf, definitions.

They are root's. All are read in one child, since a path may lead to a mount whose server does not answer for ever.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from ._child import NoAnswer, in_child
from ._errors import IommufdError, error_text, printable
from ._names import user_name
from ._paths import reopen, walk

__all__ = ("NOTHING_READ", "Abilities", "LibvirtFiles", "VmUser", "read_libvirt_files", "takes_iommufd")

# Texts in libvirt.so.0, whatever its version says: a distribution may have taken the feature into an older one, or left
# it out of a newer. virDomainHostdevDefFormat() in src/conf/domain_conf.c:
_OFFERS = b" iommufd='"
# What src/util/viriommufd.c logs, and how it fails; the one or the other may be worded differently.
_SETS = (b"Set iommufd rlimit mode to ", b"failed to set memory accounting for iommufd")
# virDomainDefValidateIommufd() in src/conf/domain_validate.c, where a domain may get its iommufd from somebody else.
_TAKES = b"Setting 'fdgroup' when 'iommufd' is disabled"
# What all of them have in them.
_COMMON = b"iommufd"

# The library has 5 MB, a mistaken file may have any size.
_LIBRARY_MAX = 2**26
_AT_ONCE = 2**20
# MAX_CONFIG_FILE_SIZE in libvirt's src/util/virconf.c is ten times as much.
_CONF_MAX = 2**20
_DEFINITION_MAX = 2**18
_DEFINITIONS_MAX = 4096
_PATIENCE = 10
# Seconds: for the clock's slewing, and a tick's length.
_SLACK = 1

# The same as libvirt describes it to programs that check a domain's XML.
_SCHEMAS = ("/usr/share/libvirt/schemas/domaincommon.rng", "/usr/local/share/libvirt/schemas/domaincommon.rng")
_SCHEMA_MAX = 2**22
_ELEMENT = re.compile(rb"<element name=[\"']iommufd[\"']>(.*?)</element>", re.DOTALL)

_CONF = "/etc/libvirt/qemu.conf"
# qemuStateInitialize() in src/qemu/qemu_driver.c gives it to the user that its VMs run as, each time the daemon starts.
_FOLDER = "/var/lib/libvirt/qemu"
# What is in /var/cache/libvirt names emulators, too, but the emulators' user can put anything there.
_DEFINITIONS = "/etc/libvirt/qemu/*.xml"
# What libvirt has recorded of the domains that run, which may be defined nowhere. It is root's, too.
_RECORDS = "/run/libvirt/qemu/*.xml"
# Whom distributions give libvirt's VMs to, unless qemu.conf names another one: QEMU_USER, with which libvirt is built.
_USUAL_USERS = ("libvirt-qemu", "qemu")

_TOKEN = re.compile(
    rb"#[^\r\n]*"
    rb'|"""(?P<long>.*?)"""'
    rb'|"(?P<double>[^"\r\n]*)"'
    rb"|'(?P<single>[^'\r\n]*)'"
    rb"|(?P<word>[^\s#\"'=\[\],;]+|[=\[\],;\"'])",
    re.DOTALL,
)


class Abilities(NamedTuple):
    """Whether a libvirt offers iommufd for a domain's devices, and sets the rlimit mode then; None is not known."""

    offers: bool | None = None
    sets: bool | None = None


class VmUser(NamedTuple):
    """The user that VMs of the system libvirt run as. None is what is not known, or a user without a name here."""

    name: str | None = None
    uid: int | None = None


class LibvirtFiles(NamedTuple):
    """What was read. `emulators` are those of the defined domains for this host's architecture; `msgs` tell why not.

    `user` is who VMs run as that are started now, and `next_user` who those do once the daemon has started anew.
    `running` are the emulators of domains that run, which may be defined nowhere. `outdated`: qemu.conf has changed
    since the daemon was started, which reads it only then; None where none runs.
    """

    abilities: Abilities = Abilities()
    user: VmUser = VmUser()
    next_user: VmUser = VmUser()
    emulators: tuple[str, ...] = ()
    msgs: tuple[str, ...] = ()
    outdated: bool | None = None
    running: tuple[str, ...] = ()


NOTHING_READ = LibvirtFiles()


def read_libvirt_files(libraries: Sequence[str], started: float | None) -> LibvirtFiles:
    """Reads libvirt's files. `libraries` are those that its daemon may use.

    `started`: when the daemon that runs was started, in seconds since the epoch; None where none runs.
    """
    try:
        given = in_child(None, partial(_read, libraries, started), _PATIENCE)
    except NoAnswer:
        msg = f"libvirt's files were not read within {_PATIENCE} seconds. Are they on a mount whose server is gone?"
        return NOTHING_READ._replace(msgs=(msg,))
    except IommufdError as exc:
        return NOTHING_READ._replace(msgs=(f"libvirt's files could not be read: {exc}",))
    abilities, user, next_user, emulators, msgs, outdated, running = given
    users = VmUser(*user), VmUser(*next_user)
    return LibvirtFiles(Abilities(*abilities), *users, tuple(emulators), tuple(msgs), outdated, tuple(running))


def takes_iommufd(libraries: Sequence[str]) -> bool | None:
    """Whether libvirt takes an iommufd from somebody else for a domain, by its libraries and schemas; None if unknown.

    What a distribution has taken from another version may be worded differently in the library, so the one or the other
    suffices.
    """
    try:
        given: bool | None = in_child(None, partial(_takes, libraries), _PATIENCE)
    except IommufdError:
        return None
    return given


def _takes(libraries: Sequence[str]) -> bool | None:
    found = []
    for look, paths in ((_library_takes, libraries), (_schema_takes, _SCHEMAS)):
        for path in paths:
            with contextlib.suppress(OSError):
                found.append(look(path))
    return any(found) if found else None


def _library_takes(path: str) -> bool:
    return _holds(path, (_TAKES,))[0]


def _schema_takes(path: str) -> bool:
    with open(path, "rb") as stream:
        element = _ELEMENT.search(stream.read(_SCHEMA_MAX))
    return element is not None and re.search(rb"<attribute name=[\"']fdgroup[\"']", element[1]) is not None


def _read(libraries: Sequence[str], started: float | None) -> list[Any]:
    msgs: list[str] = []
    abilities = _abilities_of(libraries, msgs)
    users = _find_users(started, msgs)
    machine = os.uname().machine
    defined = _defined_emulators(machine, msgs)
    return [abilities, *users, defined, msgs, _is_outdated(started), _running_emulators(machine, msgs)]


def _is_outdated(started: float | None) -> bool | None:
    """Whether qemu.conf has changed since the daemon was started; None where none runs, or there is no such file."""
    if started is not None:
        with contextlib.suppress(OSError):
            # Not the time that a copy or an archive gives it. What is yet to come is by a clock that was wrong.
            return started + _SLACK < os.stat(_CONF).st_ctime <= time.time()
    return None


def _abilities_of(libraries: Sequence[str], msgs: list[str]) -> Abilities:
    """What the libraries can do, where all can do the same."""
    found = set()
    for path in libraries:
        try:
            offers, *sets = _holds(path, (_OFFERS, *_SETS))
        except OSError as exc:
            msgs.append(
                f"What libvirt can do stands in {printable(os.fsencode(path))}, and cannot be read"
                f" ({error_text(exc.errno)})."
            )
            return Abilities()
        found.add(Abilities(offers, any(sets)))
    if len(found) > 1:
        msgs.append(f"Which of these libvirt's daemon uses is not known, and they differ: {', '.join(libraries)}.")
    return found.pop() if len(found) == 1 else Abilities()


def _holds(path: str, texts: Sequence[bytes]) -> list[bool]:
    """Which of the texts a file holds, each of which has _COMMON in it. Raises OSError.

    It is not mapped into memory: whoever has mapped a file that is cut meanwhile is ended.
    """
    reach = max(map(len, texts))
    around: set[bytes] = set()
    before = b""
    with open(path, "rb", buffering=0) as stream:
        for _number in range(_LIBRARY_MAX // _AT_ONCE):
            more = stream.read(_AT_ONCE)
            if not more:
                break
            text = before + more
            # To look for each text takes several times as long as all the rest.
            at = text.find(_COMMON)
            while at >= 0:
                around.add(text[max(0, at - reach) : at + reach])
                at = text.find(_COMMON, at + 1)
            before = text[-2 * reach :]
    return [any(text in each for each in around) for text in texts]


def _find_users(started: float | None, msgs: list[str]) -> tuple[VmUser, VmUser]:
    """Who VMs run as that are started now, and once the daemon has started anew.

    What a daemon that runs has read is seen in what it has made its user's.
    """
    setting = None
    changed = touched = 0.0
    try:
        setting, changed, touched = _read_setting()
    except (IommufdError, OSError) as exc:
        why = error_text(exc.errno) if isinstance(exc, OSError) else str(exc).rstrip(".")
        owner = None if started is None else _owner(started - _SLACK)
        if owner is None:
            msgs.append(f"The user of libvirt's VMs may stand in {_CONF}, which cannot be read ({why}).")
        return _of_owner(owner), VmUser()
    if started is None:
        # As root's, the folder may just have been made by a package.
        last = _owner(changed)
        user = _configured(setting, msgs) if setting is not None else _of_owner(last) if last else _usual_owner()
        return user, user
    has_read = touched < started - _SLACK
    owner = _owner(started - _SLACK)
    if owner is None:
        user = _usual_owner() if setting is None else _configured(setting, msgs)
        return user if has_read else VmUser(), user
    user = _of_owner(owner)
    if setting is None:
        return user, user if has_read else VmUser()
    next_user = parse_user(setting)
    if next_user.uid == owner:
        return user, user
    msgs.append(
        f"{_CONF} has user {printable(os.fsencode(setting))}, and the daemon took {user.name or user.uid}"
        " when it started: it has to be restarted to read that file again."
    )
    return user, next_user


def _of_owner(owner: int | None) -> VmUser:
    return VmUser() if owner is None else VmUser(user_name(owner), owner)


def _configured(setting: str, msgs: list[str]) -> VmUser:
    user = parse_user(setting)
    if user.uid is None:
        msgs.append(f"{_CONF} has user {user.name}, whom this host does not know.")
    return user


def _usual_owner() -> VmUser:
    """Whom libvirt's folder belongs to since the daemon's last run, if it is one whom nobody has to name."""
    with contextlib.suppress(OSError):
        uid = os.stat(_FOLDER).st_uid
        name = user_name(uid)
        if name in _USUAL_USERS:
            return VmUser(name, uid)
    return VmUser()


def _owner(since: float) -> int | None:
    """Whom libvirt's folder belongs to; None where the daemon cannot have given it to anybody since that time."""
    with contextlib.suppress(OSError):
        status = os.stat(_FOLDER)
        # To give it to whom it belongs already changes that time, too.
        if status.st_ctime >= since:
            return status.st_uid
    return None


def _read_setting() -> tuple[str | None, float, float]:
    """The user that qemu.conf names, None without, when it was written, and when it may have become what it is.

    Raises OSError and IommufdError.
    """
    with walk(_CONF, follow=True) as place:
        if place.found is None:
            return None, 0.0, os.fstat(place.folder).st_mtime
        with open(reopen(place.found), "rb") as stream:
            text, status = stream.read(_CONF_MAX + 1), os.fstat(stream.fileno())
        if len(text) > _CONF_MAX:
            raise IommufdError(f"it is too large: {_CONF_MAX} bytes at most are read")
        # A link may lead elsewhere since.
        touched = max(status.st_mtime, status.st_ctime, os.lstat(_CONF).st_ctime)
        return parse_setting(text, b"user"), status.st_mtime, touched


def parse_setting(text: bytes, name: bytes) -> str | None:
    """The text that a setting of qemu.conf has, None without it. Of several, libvirt takes the first.

    See virConfParse() and virConfGetValue() in src/util/virconf.c. Raises IommufdError where the value is no text.
    """
    # What tells a setting from an element of a list is that it begins a statement.
    tokens = [found for found in _TOKEN.finditer(text) if found.lastgroup]
    depth = 0
    for position, token in enumerate(tokens):
        word = token["word"]
        depth += (word == b"[") - (word == b"]")
        following = [each["word"] for each in tokens[position + 1 : position + 2]]
        if word == name and not depth and following == [b"="]:
            values = [each for each in tokens[position + 2 : position + 3] if each.lastgroup != "word"]
            if not values:
                raise IommufdError(f"{name.decode()} is not followed by a text in quotes")
            return os.fsdecode(values[0][values[0].lastgroup or 0])
    return None


def parse_user(setting: str) -> VmUser:
    """The user that is meant: a name, else a number, which may have a plus sign. See virGetUserID() in virutil.c."""
    with contextlib.suppress(KeyError, ValueError):
        found = pwd.getpwnam(setting)
        return VmUser(printable(os.fsencode(found.pw_name)), found.pw_uid)
    if re.fullmatch(r"\+?[0-9]{1,10}", setting) and int(setting) < 2**32 - 1:
        return VmUser(user_name(int(setting)), int(setting))
    return VmUser(printable(os.fsencode(setting)), None)


def _defined_emulators(machine: str, msgs: list[str]) -> list[str]:
    """The emulators of the domains that are defined, for guests of this architecture."""
    found: dict[str, None] = {}
    try:
        # Where the folder may not be read, there seem to be no files.
        if os.path.isdir(os.path.dirname(_DEFINITIONS)):
            os.scandir(os.path.dirname(_DEFINITIONS)).close()
        for path in sorted(glob.glob(_DEFINITIONS))[:_DEFINITIONS_MAX]:
            found.update(_emulator_in(path, machine))
    except OSError as exc:
        msgs.append(f"The definitions of libvirt's domains cannot be read ({error_text(exc.errno)}).")
    return list(found)


def _running_emulators(machine: str, msgs: list[str]) -> list[str]:
    """The same of the domains that run."""
    found: dict[str, None] = {}
    for path in sorted(glob.glob(_RECORDS))[:_DEFINITIONS_MAX]:
        try:
            found.update(_emulator_in(path, machine))
        except FileNotFoundError:
            # The domain has ended since.
            continue
        except OSError as exc:
            msgs.append(f"What libvirt has recorded of running domains cannot be read ({error_text(exc.errno)}).")
            break
    return list(found)


def _emulator_in(path: str, machine: str) -> dict[str, None]:
    with open(path, "rb") as stream:
        emulator = parse_emulator(stream.read(_DEFINITION_MAX), machine)
    return {} if emulator is None else {emulator: None}


def parse_emulator(definition: bytes, machine: str) -> str | None:
    """The emulator of a domain, None where it is not for that architecture, or is not named as a plain path."""
    arch = re.search(rb"<type arch=['\"]([\w]+)['\"]", definition)
    emulator = re.search(rb"^ *<emulator>(/[^<&\0]+)</emulator>", definition, re.MULTILINE)
    return os.fsdecode(emulator[1]) if arch and emulator and arch[1] == machine.encode() else None
