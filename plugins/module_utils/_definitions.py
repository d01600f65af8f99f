# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the domains that are defined, by libvirt's own files. No daemon is asked.

The files of the system's libvirt are read as who we are, those of a user's own as that user, each in a child with a
deadline: a path may lead to a mount whose server does not answer. What is read is parsed here, so what a user can do by
a file is to have it refused. A link is not followed, and nothing but a regular file of that very mount is opened.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import stat
import time
from collections.abc import Collection, Generator, Iterator
from functools import partial
from itertools import islice
from typing import Any, Callable, NamedTuple

from ._child import ask_child
from ._defined_rows import Definition, domain_row
from ._errors import IommufdError, ProcessGone, error_text
from ._foreign import parse_xml, shown_text
from ._module import Row
from ._paths import mount_id, reopen, walk
from ._process import Process
from ._process_facts import read_units, started_at
from ._running import DomainRecord, parse_domain_record, read_record_file
from ._user import User

__all__ = ("find_domains",)

_FOLDER = "/etc/libvirt/qemu"
_NETWORKS = "/etc/libvirt/qemu/networks"
_RECORDS = "/run/libvirt/qemu"
# Below a user's home, and in the user's runtime folder. See qemuStateInitialize() in src/qemu/qemu_driver.c.
_OWN_FOLDER = ".config/libvirt/qemu"
_OWN_RECORDS = "libvirt/qemu/run"
_SUFFIX = ".xml"
# Where libvirt keeps what `virsh managedsave` saves: see qemuDomainManagedSavePath() in src/qemu/qemu_driver.c.
_SAVES = "/var/lib/libvirt/qemu/save"
_OWN_SAVES = f"{_OWN_FOLDER}/save"

# A definition has some kilobytes, and what a child says at once has a limit.
DEFINITION_MAX = 2**19
DEFINITIONS_MAX = 4096
_ENTRIES_MAX = 2**17
_TOTAL_MAX = 2**25
# Seconds for each answer, and for all of one libvirt's, read and parsed.
_PATIENCE = 10
_SECONDS = 60

_DEFINITION = "definition"
_RECORD = "record"
_NETWORK = "network"
_MORE = "more"


class _File(NamedTuple):
    """What a child tells of a file. `problem`: why it could not be read. `written`: in seconds since the epoch.

    `saved`: whether its domain has a managed save, or may have one.
    """

    kind: str
    name: str
    path: str
    text: bytes
    problem: str
    autostart: bool
    written: float
    saved: bool = False


def find_domains(users: Collection[User]) -> tuple[list[Row], list[str]]:
    """The domains of the system's libvirt and of these users' own, and what was not seen, as sentences."""
    msgs: list[str] = []
    rows = _rows_of(None, _read_system, msgs)
    for user in users:
        rows += _rows_of(user, partial(_read_own, user), msgs)
    return rows, msgs


def _rows_of(owner: User | None, work: Callable[[], Iterator[Any]], msgs: list[str]) -> list[Row]:
    files, whole = _collect(owner, work, msgs)
    passing = _passing([each for each in files if each.kind == _NETWORK]) if whole else None
    records = {each.name: each for each in files if each.kind == _RECORD}
    definitions = [each for each in files if each.kind == _DEFINITION]
    running: dict[str, int] = {}
    for name, each in records.items():
        pid = _pid_of(owner, each)
        if pid is not None:
            running[name] = pid
    found = [
        Definition(
            name=each.name,
            path=each.path,
            text=each.text,
            problem=each.problem,
            autostart=each.autostart,
            pid=running.get(each.name),
            owner=owner,
            saved=each.saved,
        )
        for each in definitions
    ]
    known = {each.name for each in definitions}
    found += [
        Definition(name, records[name].path, records[name].text, "", False, True, pid, owner)
        for name, pid in running.items()
        if name not in known
    ]
    rows: list[Row] = []
    deadline = time.monotonic() + _SECONDS
    for definition in sorted(found, key=lambda each: each.name):
        if time.monotonic() > deadline:
            msgs.append(f"Only {len(rows)} of {len(found)} domains{_of(owner)} were looked at in {_SECONDS} seconds.")
            break
        rows.append(domain_row(definition, passing))
    return rows


def _of(owner: User | None) -> str:
    return "" if owner is None else f" of user {owner.name}"


def _passing(networks: list[_File]) -> set[str]:
    """The names of the networks that pass a device through, or may."""
    found = set()
    for each in networks:
        try:
            root = parse_xml(each.text)
        except IommufdError:
            found.add(each.name)
            continue
        forward = root.find("forward")
        if forward is not None and forward.get("mode") == "hostdev":
            found.add(each.name)
    return found


def _pid_of(owner: User | None, file: _File) -> int | None:
    """The process of a domain that libvirt has recorded to run; None where the record does not hold, as a stale one."""
    with contextlib.suppress(IommufdError):
        return _check(owner, file.name, parse_domain_record(file.text, file.written))
    return None


def _check(owner: User | None, name: str, record: DomainRecord) -> int | None:
    """Raises IommufdError where there is no such process, or none that may be looked at."""
    with Process.hold(record.pid) as process:
        uid = process.status.uid
        if owner is not None and uid != owner.uid:
            raise ProcessGone(f"{process} is another user's.")
        unit = read_units(process)[0] if owner is None else None
        contradiction = record.contradiction(name, record.pid, uid, started_at(process.start_ticks), unit)
        process.check_alive()
    return None if contradiction else record.pid


def _collect(owner: User | None, work: Callable[[], Iterator[Any]], msgs: list[str]) -> tuple[list[_File], bool]:
    """What a child reads, as far as it gets, and whether that is all."""
    found: list[_File] = []
    whole = False
    whose = "the system's libvirt" if owner is None else f"user {owner.name}'s own libvirt"
    deadline, total = time.monotonic() + _SECONDS, 0
    try:
        with contextlib.closing(ask_child(owner, work, _PATIENCE)) as said:
            for each in said:
                file = _from_json(each)
                if file.kind == _MORE:
                    msgs.append(f"Of {whose}, {file.problem}")
                    continue
                found.append(file)
                total += len(file.text)
                if total > _TOTAL_MAX or time.monotonic() > deadline or len(found) > 3 * DEFINITIONS_MAX:
                    msgs.append(
                        f"Of the files of {whose}, only {len(found)} were read: there are more than"
                        f" {_TOTAL_MAX} bytes, or it took longer than {_SECONDS} seconds."
                    )
                    break
            else:
                whole = True
    except IommufdError as exc:
        msgs.append(f"The definitions of {whose} cannot be read: {exc}")
    return found, whole


def _from_json(given: Any) -> _File:
    """What `_say` has made, in a child that may have said something else. Raises IommufdError."""
    try:
        kind, name, path, text, problem, autostart, written, saved = given
        words, flags = (kind, name, path, text, problem), (autostart, saved)
        if not all(isinstance(each, str) for each in words) or not all(isinstance(each, bool) for each in flags):
            raise ValueError("of another type")
        content = base64.b64decode(text, validate=True)
        return _File(kind, name, path, content, shown_text(problem), autostart, float(written), saved)
    except (TypeError, ValueError, OverflowError, binascii.Error) as exc:
        raise IommufdError("the child that reads them has said something else.") from exc


def _say(
    kind: str,
    name: str,
    path: str,
    text: bytes = b"",
    problem: str = "",
    autostart: bool = False,
    written: float = 0.0,
    saved: bool = False,
) -> list[Any]:
    return [kind, name, path, base64.b64encode(text).decode("ascii"), problem, autostart, written, saved]


def _read_system() -> Iterator[list[Any]]:
    yield from _read_folder(_DEFINITION, _FOLDER, saves=_SAVES)
    # That folder may be the emulators' user's. Each file is judged by itself.
    yield from _read_records()
    yield from _read_folder(_NETWORK, _NETWORKS)


def _read_own(user: User) -> Iterator[list[Any]]:
    yield from _read_folder(_DEFINITION, f"{user.home}/{_OWN_FOLDER}", own=True, saves=f"{user.home}/{_OWN_SAVES}")
    yield from _read_folder(_RECORD, f"{user.runtime_folder}/{_OWN_RECORDS}", own=True)


def _read_records() -> Iterator[list[Any]]:
    try:
        folder = os.open(_RECORDS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise _unreadable(_RECORDS, exc) from exc
    try:
        names = yield from _names_in(folder, _RECORDS)
        for name in names:
            path = f"{_RECORDS}/{name}{_SUFFIX}"
            with contextlib.suppress(IommufdError):
                # What is none of libvirt's is no domain.
                text, written = read_record_file(name)
                if len(text) <= DEFINITION_MAX:
                    yield _say(_RECORD, name, path, text, written=written)
                else:
                    yield _say(_MORE, name, path, problem=f"{shown_text(path)} is too large.")
    finally:
        os.close(folder)


def _read_folder(kind: str, path: str, own: bool = False, saves: str = "") -> Iterator[list[Any]]:
    """The files of one folder. `own`: as the user whose they are, who may have anything there.

    `saves`: the folder with managed saves of such domains, if they have any.
    """
    with contextlib.ExitStack() as stack:
        try:
            if own:
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                found = stack.enter_context(walk(path, follow=True)).found
                if found is None:
                    return
                folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=found)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as exc:
            raise _unreadable(path, exc) from exc
        stack.callback(os.close, folder)
        for name in (yield from _names_in(folder, path)):
            yield _read_one(kind, folder, path, name, saves)


def _unreadable(path: str, exc: OSError) -> IommufdError:
    remedy = "" if os.geteuid() == 0 else " Run the task as root (become: true)."
    return IommufdError(f"{path} cannot be read ({error_text(exc.errno)}).{remedy}")


def _names_in(folder: int, path: str) -> Generator[list[Any], None, list[str]]:
    """The names of the files there, without their suffix; yields what is left out."""
    with os.scandir(folder) as entries:
        names = [each.name for each in islice(entries, _ENTRIES_MAX)]
        more = next(entries, None) is not None
    names = sorted(name[: -len(_SUFFIX)] for name in names if name.endswith(_SUFFIX) and name != _SUFFIX)
    if more or len(names) > DEFINITIONS_MAX:
        count = f"more than {_ENTRIES_MAX} files" if more else f"{len(names)} definitions"
        problem = f"only {min(len(names), DEFINITIONS_MAX)} definitions in {path} were read: it has {count}."
        yield _say(_MORE, "", path, problem=problem)
    return names[:DEFINITIONS_MAX]


def _read_one(kind: str, folder: int, path: str, name: str, saves: str) -> list[Any]:
    place = f"{path}/{name}{_SUFFIX}"
    try:
        text, status = _read_file(folder, f"{name}{_SUFFIX}")
    except IommufdError as exc:
        return _say(kind, name, place, problem=str(exc))
    except OSError as exc:
        return _say(kind, name, place, problem=error_text(exc.errno))
    saved = bool(saves) and _may_be_saved(saves, name)
    return _say(kind, name, place, text, "", _is_linked(folder, name, status), status.st_mtime, saved)


def _may_be_saved(saves: str, name: str) -> bool:
    """Whether it has a managed save, or may have one that cannot be seen."""
    try:
        os.lstat(f"{saves}/{name}.save")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _read_file(folder: int, name: str) -> tuple[bytes, os.stat_result]:
    """What is in a regular file. Nobody is waited for. Raises OSError and IommufdError."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if mount_id(found) != mount_id(folder):
            raise IommufdError("something is mounted there, which is not looked at")
        status = os.fstat(found)
        if stat.S_ISLNK(status.st_mode):
            raise IommufdError("it is a symbolic link, which is not followed")
        if not stat.S_ISREG(status.st_mode):
            raise IommufdError("it is no regular file")
        text = b""
        if status.st_size <= DEFINITION_MAX:
            with open(reopen(found), "rb") as stream:
                text = stream.read(DEFINITION_MAX + 1)
        if not status.st_size <= DEFINITION_MAX >= len(text):
            raise IommufdError(f"it is too large: {DEFINITION_MAX} bytes at most are read")
        return text, status
    finally:
        os.close(found)


def _is_linked(folder: int, name: str, status: os.stat_result) -> bool:
    """Whether libvirt starts it by itself: see virFileLinkPointsTo() in src/util/virfile.c."""
    with contextlib.suppress(OSError):
        linked = os.stat(f"autostart/{name}{_SUFFIX}", dir_fd=folder)
        return (linked.st_dev, linked.st_ino) == (status.st_dev, status.st_ino)
    return False
