# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the units of the system's service manager that start a VMM with devices.

systemd is asked, and starts nothing for that. All services are looked at in two questions, and those that may start a
VMM once more each, since only D-Bus keeps the words of a command apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from ._child import in_child
from ._defined_rows import masked_row, may_start_vmm, unit_row
from ._errors import IommufdError, error_text
from ._foreign import shown_text
from ._module import Row, memlock_row
from ._systemd import Run, find_services, is_unit_name, read_all_of, read_configuration, read_manager, show_units

__all__ = ("find_defined_units", "note_limits_at_boot")

_UNITS_MAX = 1024
# A chain of units that start each other at boot is short.
_LEVELS_MAX = 16
_BOOT = "default.target"
_STARTED_BY = ("WantedBy", "RequiredBy", "RequisiteOf", "BoundBy", "UpheldBy")
_MAY_BE_STARTED_BY = ("TriggeredBy", "OnSuccessOf", "OnFailureOf")
# Whom systemd waits for until it is in the background, which QEMU is once it has its devices. Of the other types, the
# next unit starts as it may still pin.
_WAITED_FOR = "forking"

# Where systemd looks for units, without what generators make: what a reboot leaves, and what it empties.
_LASTING = (
    *("/etc/systemd/system.control", "/etc/systemd/system"),
    *("/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"),
)
_OF_THIS_BOOT = ("/run/systemd/system.control", "/run/systemd/transient", "/run/systemd/system")
_DAEMONS = ("libvirtd.service", "virtqemud.service")
_NULL = "/dev/null"
_UNIT_MAX = 2**20
_PATIENCE = 10

# The soft and the hard limit that units have without one of their own.
_DEFAULTS = ("DefaultLimitMEMLOCKSoft", "DefaultLimitMEMLOCK")
# What that is where no file says anything: DEFAULT_RLIMIT_MEMLOCK in systemd's src/shared/rlimit-util.h, and the
# kernel's own.
_BUILT_IN = "8M"
_DEFAULT = re.compile(r"^[ \t]*DefaultLimitMEMLOCK[ \t]*=(.*)$", re.MULTILINE)


def find_defined_units(run: Run, running: Mapping[str, Sequence[int]]) -> tuple[list[Row], list[str]]:
    """The units, and what was not seen, as sentences. `running`: units with VMMs that hold devices, and their ids."""
    try:
        services = find_services(run)
    except IommufdError as exc:
        return [], [f"The units that start VMs cannot be told: {exc}"]
    if not services:
        return [], ["systemd tells nothing of its units."]
    names = sorted({*(name for name, commands in services.items() if may_start_vmm(commands)), *running})
    msgs = []
    if len(names) > _UNITS_MAX:
        msgs.append(f"Of {len(names)} units that may start a VM, only {_UNITS_MAX} were looked at.")
    rows = []
    slices = {}
    after = {}
    waited_for = set()
    for name in names[:_UNITS_MAX]:
        try:
            shown = read_all_of(run, name)
            shown["DropInPaths"] = [*(shown.get("DropInPaths") or []), *_hiding(name)]
            row = unit_row(name, shown, running.get(name, ()))
        except IommufdError as exc:
            msgs.append(f"What {name} starts cannot be told: {exc}")
            continue
        if row is not None:
            rows.append(row)
            slices[name] = list(_around(shown.get("Slice") or ""))
            after[name] = shown.get("After") or []
            waited_for |= {name} if shown.get("Type") == _WAITED_FOR else set()
    for row in rows:
        row["order"] = sorted(set(after[row["name"]]) & waited_for - {row["name"]})
    try:
        rows += list(_masked({row["name"] for row in rows}))
        _note_slices(run, rows, slices)
        _note_autostart(run, rows)
    except IommufdError as exc:
        msgs.append(f"Which units start at boot cannot be told: {exc}")
    return rows, msgs


def _around(name: str) -> Iterator[str]:
    """A slice, and those that it is in, without the one of all: see systemd.slice(5)."""
    stem = name.rpartition(".slice")[0]
    while stem.strip("-"):
        yield f"{stem}.slice"
        stem = stem.rpartition("-")[0]


def _note_slices(run: Run, rows: Iterable[Row], slices: Mapping[str, Sequence[str]]) -> None:
    """Adds to units whether they are in a slice whose memory is limited. Raises IommufdError."""
    names = sorted({each for some in slices.values() for each in some})
    shown = zip(names, show_units(run, names, ("Id", "MemoryMax"))) if names else ()
    limited = {name for name, each in shown if each.get("MemoryMax", "infinity") != "infinity"}
    for row in rows:
        if row["name"] in slices:
            row["memory_max_shared"] = not limited.isdisjoint(slices[row["name"]])


def _note_autostart(run: Run, rows: Sequence[Row]) -> None:
    """Adds to units whether they start at boot. Raises IommufdError."""
    # A template is none that systemd can tell of.
    names = [row["name"] for row in rows if "@." not in row["name"]]
    at_boot = find_started_at_boot(run, names) if names else {}
    for row in rows:
        found = at_boot.get(row["name"])
        # Where a reboot takes its file away, what wants it may find nothing.
        row["autostart"] = None if found and (row["path"] or "").startswith("/run/") else found


def find_started_at_boot(run: Run, names: Iterable[str]) -> dict[str, bool | None]:
    """Whether units start as the host boots, which is when what they are wanted by does. Raises IommufdError.

    None is what cannot be told: that of a unit which a timer, a path, a socket or a device may start.
    """
    [boot] = show_units(run, [_BOOT], ("Id",))
    of_this_boot, lasting = set(_links(_OF_THIS_BOOT)), set(_links(_LASTING))
    wanted: dict[str, set[str]] = {}
    triggered: dict[str, set[str]] = {}
    left = set(names)
    for _level in range(_LEVELS_MAX):
        if not left:
            break
        asked = sorted(left)
        properties = ("Id", "Names", *_STARTED_BY, *_MAY_BE_STARTED_BY)
        for name, shown in zip(asked, show_units(run, asked, properties)):
            wanted[name] = {each for key in _STARTED_BY for each in shown.get(key, "").split()}
            triggered[name] = {each for key in _MAY_BE_STARTED_BY for each in shown.get(key, "").split()}
            triggered[name] |= {each for each in wanted[name] if each.endswith(".device")}
            names_ = {name, *shown.get("Names", "").split()}
            kept = {by for by, each in lasting if each in names_}
            gone = {by for by, each in of_this_boot if each in names_} - kept
            # What has the link may go by another name.
            unsure = wanted[name] - kept if gone - wanted[name] else set()
            wanted[name] -= gone | unsure
            triggered[name] |= unsure - gone
        left = {each for some in (*wanted.values(), *triggered.values()) for each in some}
        left = {each for each in left - wanted.keys() if not each.endswith(".device")}
    certain = _reached(wanted, {_BOOT, boot.get("Id", _BOOT)})
    perhaps = _reached(
        {name: wanted[name] | triggered[name] for name in wanted},
        {*certain, *(each for some in triggered.values() for each in some if each.endswith(".device")), *left},
    )
    return {name: True if name in certain else None if name in perhaps else False for name in names}


def _links(folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The links by which units start others, each by the names of both."""
    for folder in folders:
        for each in _listed(folder):
            by, _dot, kind = each.rpartition(".")
            if kind in ("wants", "requires", "upholds"):
                yield from ((by, name) for name in _listed(f"{folder}/{each}"))


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        # Few hosts have all of them. All can be read by anybody.
        return []


def _is_masked(path: str) -> bool:
    try:
        return os.readlink(path) == _NULL
    except OSError:
        return False


def _hiding(name: str) -> list[str]:
    """The drop-ins of a unit that hide others until a reboot, which systemd does not name."""
    folders = [f"{folder}/{name}.d" for folder in _OF_THIS_BOOT]
    return [path for folder in folders for path in (f"{folder}/{each}" for each in _listed(folder)) if _is_masked(path)]


def _masked(known: Collection[str]) -> Iterator[Row]:
    """The units that are masked until the next reboot, without those that are known. Raises IommufdError."""
    for name in _listed(_OF_THIS_BOOT[-1]):
        if not is_unit_name(name, "service") or name in known or not _is_masked(f"{_OF_THIS_BOOT[-1]}/{name}"):
            continue
        # What was made of a template has no file of its own.
        template = re.sub(r"@.*(?=\.service$)", "@", name)
        paths = [f"{folder}/{each}" for each in (name, template) for folder in _LASTING]
        path = next(filter(os.path.isfile, paths), None)
        row = path and masked_row(name, path, in_child(None, partial(_text, path), _PATIENCE))
        if row:
            yield row


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(_UNIT_MAX)
    except OSError as exc:
        raise IommufdError(f"{path} cannot be read ({error_text(exc.errno)}).") from exc


def _reached(by: Mapping[str, set[str]], first: set[str]) -> set[str]:
    """All that is started by the first ones, or by what those start."""
    found = set(first)
    while more := {name for name, starters in by.items() if starters & found} - found:
        found |= more
    return found


def note_limits_at_boot(run: Run, rows: Sequence[Row]) -> None:
    """Adds to VMs that are defined why the limit that systemd gives them may be another one after a reboot."""
    units = [row for row in rows if row["kind"] == "unit"]
    sessions = [row for row in rows if row["manager"] == "session"]
    gone = _of_this_boot(*_DAEMONS)
    for row in rows if gone else ():
        if (row["kind"], row["manager"]) == ("domain", "system"):
            row["unread_at_boot"].append(f"libvirt's daemon may be given something else after a reboot: {gone}.")
    if not units and not sessions:
        return
    loaded, why = _changed_default(run)
    for row in units if why else ():
        of_row = {key: row[key] for key in ("memlock_bytes", "memlock_unlimited")}
        # What it has by its own words may be the same.
        if loaded in (None, of_row):
            row["unread_at_boot"].append(
                f"{row['name']} has systemd's default limit on locked memory, which may be another one after a reboot:"
                f" {why}. Set LimitMEMLOCK= in it."
            )
    why = why or (sessions and _set_for_users(run)) or ""
    for row in sessions:
        its = why or _of_this_boot(f"user@{row['uid']}.service", "user@.service")
        if its:
            row["unread_at_boot"].append(
                f"The limit on locked memory of user {row['user']}'s libvirt may be another one after a reboot: {its}."
            )


def _of_this_boot(*names: str) -> str:
    """Why units of these names may have other settings after a reboot, else ""."""
    folders = [f"{folder}/{name}.d" for folder in _OF_THIS_BOOT for name in names]
    found = [shown_text(f"{folder}/{each}") for folder in folders for each in _listed(folder)]
    return f"{', '.join(found)} is gone then" if found else ""


def _changed_default(run: Run) -> tuple[Row | None, str]:
    """The soft limit that systemd gives to units without one of their own, and why it may give another one, else ""."""
    loaded = None
    try:
        shown = read_manager(run, *_DEFAULTS)
        limits = [parse_limit(shown.get(name, "")) for name in _DEFAULTS]
        loaded = memlock_row(limits[0])
        soft, hard = parse_default(read_configuration(run, "system.conf"))
    except IommufdError as exc:
        return loaded, str(exc).rstrip(".")
    if limits == [soft, hard]:
        return loaded, ""
    return loaded, "systemd has not read DefaultLimitMEMLOCK= as its files have it now; systemctl daemon-reexec does"


def _set_for_users(run: Run) -> str:
    """Why the service manager of a user may give to what it starts another limit than its own, else ""."""
    try:
        limits = _DEFAULT.findall(read_configuration(run, "user.conf"))
    except IommufdError as exc:
        return str(exc).rstrip(".")
    return "DefaultLimitMEMLOCK= in systemd's user.conf counts then" if limits else ""


def parse_default(text: str) -> tuple[int | None, int | None]:
    """The soft and the hard DefaultLimitMEMLOCK= of systemd's files, the last of which counts; None is none.

    Raises IommufdError where it is not understood.
    """
    said = _DEFAULT.findall(text)[-1:]
    soft, colon, hard = ("".join(said).strip() or _BUILT_IN).partition(":")
    return parse_limit(soft), parse_limit(hard if colon else soft)


def parse_limit(text: str) -> int | None:
    """A limit as systemd takes and shows it, None for none. Raises IommufdError."""
    found = re.fullmatch(r"([0-9]{1,20})([KMGTPE]?)B?", text)
    if found is None and text != "infinity":
        raise IommufdError(f"{text!r:.60} is no limit that is understood")
    return None if found is None else int(found[1]) * 1024 ** " KMGTPE".index(found[2] or " ")
