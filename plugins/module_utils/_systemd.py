# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: systemd, asked and told. No other file runs its commands, such as systemctl.

`run` is what runs a command and gives its exit code, output and errors: `_command.run_command`, with its time limit, or
the same as another user. `user` is the service manager of whoever `run` runs it as, and not the system's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Callable, NamedTuple

from ._errors import CommandFailed, HostLacks, IommufdError, error_text, printable
from ._foreign import parse_answer

__all__ = (
    "Run",
    "UnitState",
    "ask_states",
    "find_services",
    "is_unit_name",
    "must_run",
    "parse_services",
    "parse_units",
    "read_all_of",
    "read_configuration",
    "read_journal",
    "read_manager",
    "reload_units",
    "run_service",
    "show_units",
    "tell_systemd",
)

# See above.
Run = Callable[[list[str]], "tuple[int, str, str]"]

_STATE = ("LoadState", "UnitFileState", "ActiveState", "Triggers")
_JOURNAL_LINES = 20
_SERVICES_MAX = 8192
_OBJECTS = "/org/freedesktop/systemd1/unit/"


def must_run(run: Run, *words: str) -> str:
    """The output of a command that must succeed. Raises CommandFailed, and HostLacks where it cannot be run."""
    try:
        code, output, errors = run(list(words))
    except OSError as exc:
        raise HostLacks(f"{words[0]} cannot be run ({error_text(exc.errno)}).") from exc
    if code:
        said = printable(" ".join(errors.split()).encode("utf-8", "surrogateescape")) or f"exit code {code}"
        raise CommandFailed(words, said)
    return output


def is_unit_name(name: str, *kinds: str) -> bool:
    """Whether that can be the name of a unit, of one of these kinds where any are given."""
    suffix = rf"\.({'|'.join(kinds)})" if kinds else ""
    return re.fullmatch(rf"(?!-)[A-Za-z0-9:_.@\\-]+{suffix}", name) is not None


def show_units(run: Run, names: Sequence[str], properties: Iterable[str], user: bool = False) -> list[dict[str, str]]:
    """What systemd shows of units, which it does not start for that, in their order; see `_properties`.

    Where there is no systemd, as in a chroot, it may be less than was asked for, or nothing. Raises IommufdError.
    """
    manager = ["--user"] if user else []
    words = ["systemctl", *manager, "show", "--no-pager", f"--property={','.join(properties)}", "--", *names]
    try:
        output = must_run(run, *words)
    except CommandFailed as exc:
        raise IommufdError(f"systemd cannot be asked for {', '.join(names)}: {exc.said.rstrip('.')}.") from exc
    except HostLacks as exc:
        raise HostLacks(f"systemd cannot be asked for {', '.join(names)}: {exc}") from exc
    # A command's words may have empty lines, as a script has. Of one unit, all of it is its own.
    return [_properties(output)] if len(names) == 1 else parse_units(output)


def parse_units(text: str) -> list[dict[str, str]]:
    """Reads the output of `systemctl show` of several units, of which no property may hold an empty line."""
    return [_properties(paragraph) for paragraph in re.split(r"\n{2,}", text.strip("\n"))]


def _properties(text: str) -> dict[str, str]:
    """The properties of one unit, without those that its kind does not have.

    Of what a unit has several times, such as commands, each is on a line of its own.
    """
    shown: dict[str, str] = {}
    for key, equals, value in (line.partition("=") for line in text.splitlines()):
        if equals:
            shown[key] = f"{shown[key]}\n{value}" if key in shown else value
    return shown


def find_services(run: Run) -> dict[str, str]:
    """What systemd shows of the commands of all services that have a file or are loaded, by their names.

    Words are not kept apart in that. It reads the files of those that are not loaded, and starts nothing. Raises
    IommufdError.
    """
    listed = must_run(run, "systemctl", "list-unit-files", "--no-pager", "--no-legend", "--type=service")
    names = (line.split()[0] for line in listed.splitlines() if line.strip())
    # A template is none. Those that were made of one are loaded, where they are enabled.
    plain = [name for name in names if is_unit_name(name, "service") and "@." not in name][:_SERVICES_MAX]
    # Those that do not run match a pattern with --all alone.
    words = ("systemctl", "show", "--no-pager", "--all", "--property=Id,ExecStart", "--", "*.service")
    return parse_services(must_run(run, *words, *plain))


def parse_services(text: str) -> dict[str, str]:
    """Reads that of several units. Since commands may hold empty lines, a unit may have words of those beside it."""
    found: dict[str, str] = {}
    name = between = ""
    for paragraph in re.split(r"\n{2,}", text.strip("\n")):
        begins = re.search(r"^Id=(.+\.service)$", paragraph, re.MULTILINE)
        if begins:
            name, between, paragraph = begins[1], "", f"{between}{paragraph}\n"
        else:
            between += f"{paragraph}\n"
        found[name] = found.get(name, "") + paragraph
    found.pop("", None)
    return found


def read_all_of(run: Run, name: str) -> dict[str, Any]:
    """All properties of a unit, exactly as systemd has them: each word of a command by itself. Raises IommufdError."""
    # See bus_path_escape() in systemd's src/libsystemd/sd-bus/bus-type.c.
    path = re.sub(r"[^A-Za-z0-9]|^[0-9]", lambda found: f"_{ord(found[0]):02x}", name)
    service, interface = "org.freedesktop.systemd1", "org.freedesktop.DBus.Properties"
    words = ("busctl", "--json=short", "call", service, _OBJECTS + path, interface, "GetAll", "s", "")
    answer = parse_answer(must_run(run, *words).encode("utf-8", "surrogateescape"))
    try:
        return {key: value["data"] for key, value in answer["data"][0].items()}
    except (AttributeError, IndexError, KeyError, TypeError) as exc:
        raise IommufdError(f"busctl tells of {name} in words that are not understood.") from exc


def read_manager(run: Run, *properties: str) -> dict[str, str]:
    """What systemd shows of itself, as it has read its files. Raises CommandFailed and HostLacks."""
    return _properties(must_run(run, "systemctl", "show", "--no-pager", f"--property={','.join(properties)}"))


def read_configuration(run: Run, name: str) -> str:
    """What stands in those files now, in /etc/systemd and elsewhere, in the order in which systemd would read them.

    `name` is that of the first, and of the folder of the others. Raises CommandFailed and HostLacks.
    """
    return must_run(run, "systemd-analyze", "--no-pager", "cat-config", f"systemd/{name}")


class UnitState(NamedTuple):
    """A systemd unit. `triggers` are the units that it starts, as those of type path and timer do."""

    exists: bool
    enabled: bool
    active: bool
    triggers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{'enabled' if self.enabled else 'disabled'}, {'active' if self.active else 'inactive'}"


def ask_states(run: Run, names: list[str]) -> dict[str, UnitState]:
    """What systemd says of units. Raises IommufdError where it does not answer."""
    if not names:
        return {}
    units = show_units(run, names, _STATE)
    if len(units) != len(names) or not all(units):
        told = sum(map(bool, units))
        raise IommufdError(f"systemd tells of {told} units where it was asked for {', '.join(names)}.")
    return {
        name: UnitState(
            shown["LoadState"] != "not-found",
            shown["UnitFileState"].startswith("enabled"),
            shown["ActiveState"] not in ("inactive", "failed"),
            tuple(shown.get("Triggers", "").split()),
        )
        for name, shown in zip(names, units)
    }


def tell_systemd(run: Run, verb: str, name: str, *options: str, user: bool = False) -> None:
    """Has systemd start, stop, enable ... a unit. Raises CommandFailed and HostLacks."""
    must_run(run, "systemctl", *(["--user"] if user else []), verb, *options, "--", name)


def reload_units(run: Run) -> None:
    """Has systemd read all of its files again. Raises CommandFailed and HostLacks."""
    must_run(run, "systemctl", "daemon-reload")


def run_service(
    run: Run, name: str, command: Sequence[str], properties: Iterable[str], *options: str, user: bool = False
) -> None:
    """Has systemd run a command as a transient service of that name. Raises CommandFailed and HostLacks."""
    manager = ["--user"] if user else []
    settings = [f"--property={each}" for each in properties]
    must_run(run, "systemd-run", *manager, "--quiet", *options, f"--unit={name}", *settings, "--", *command)


def read_journal(run: Run, name: str) -> list[str]:
    """The last lines that journalctl gives of a unit of the system's, without its name; none where it cannot be run."""
    words = ["journalctl", "--no-pager", "--output=cat", f"--lines={_JOURNAL_LINES}", f"--unit={name}"]
    try:
        # What is said of one that has ended just now may not be written yet.
        run(["journalctl", "--sync"])
        # It may fail, as at a damaged file, and have told something all the same.
        _code, output, _errors = run(words)
    except OSError:
        return []
    return [line.replace(f"{name}: ", "") for line in output.splitlines()]
