# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the audit's report as text: what is told of each host, and an end that fits a screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from ..module_utils._size import human_size
from . import _audit_words as words

__all__ = ("SCREEN", "WIDTH", "show_end", "show_forecast", "show_forecasts", "show_host")

# Printed by Ansible as YAML, a line is set in by six columns, and may be quoted: that fits a terminal of 80.
WIDTH = 72
# Of 24 lines, Ansible takes two above the end of the report, and the shell its last.
SCREEN = 21
# So many of these tell what to do, and so many of those for one sentence.
REMEDIES = 8
REMEDY = 5
# And so many count the hosts that are not named.
REST = 2
# And so many are of the forecast.
FORECASTS = 6

Row = dict[str, Any]


def plain(text: Any) -> str:
    """A text as one line that moves no cursor: space is a blank, and the rest is printable ASCII or escaped."""
    one_line = " ".join(str(text).split())
    return "".join(char if " " <= char <= "~" else char.encode("unicode_escape").decode("ascii") for char in one_line)


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def short_size(count: int) -> str:
    """A size as in a unit's LimitMEMLOCK=, such as "64.2M"."""
    number, unit = human_size(count).split()
    return number + unit[0].rstrip("b")


def show_host(name: str, host: Row) -> list[str]:
    """The table of a host, or what is told in its place, and below it what to do, and what is uncertain or missing."""
    lines = show_vms(host["vms"]) if host["vms"] else wrap(plain(host["summary"]), WIDTH)
    return [cut(plain(name), WIDTH), *lines, *(line for text in below(host) for line in wrap(plain(text), WIDTH)), ""]


def below(host: Row) -> list[str]:
    """What stands below the table: each sentence once, after the VMs that it is true of."""
    of_sentence: dict[str, list[str]] = {}
    for vm in host["vms"]:
        for sentence in (vm["remedy"], *vm["notes"]):
            if sentence:
                of_sentence.setdefault(sentence, []).append(vm["vm"])
    return [
        *(f"{', '.join(names)}: {sentence}" for sentence, names in of_sentence.items()),
        *(words.holder(each["name"], each["user"]) for each in host["holders"]),
        *(f"{words.readiness(each['ready'])} ({each['what']}): {each['msg']}" for each in host["not_ready"]),
        *(f"Not all seen ({limit['what']}): {limit['why']}" for limit in host["limits_of_view"]),
    ]


def show_vms(vms: list[Row]) -> list[str]:
    """A table, in which the names of VMs and users make room for the other columns.

    A user that all are of is told once, in the place of a column.
    """
    rows = [words.HEADER, *(show_vm(vm) for vm in vms)]
    users = {row[1] for row in rows[1:]}
    names = 2
    if len(users) == 1:
        rows, names = [(row[0], *row[2:]) for row in rows], 1
    lines = table(rows, names, words.NUMBERS)
    return lines if names == 2 else [*lines, cut(words.of_user(users.pop()), WIDTH)]


def table(rows: list[tuple[str, ...]], names: int, numbers: Sequence[str]) -> list[str]:
    """The lines of a table, whose first one or two columns, the names, make room for the others."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    room = WIDTH - sum(widths[names:]) - len("  ") * (len(widths) - 1)
    if names == 2:
        widths[1] = min(widths[1], max(room - widths[0], room // 2))
    widths[0] = min(widths[0], room - sum(widths[1:names]))
    return [row_of(row, widths, [title in numbers for title in rows[0]]) for row in rows]


def row_of(row: tuple[str, ...], widths: list[int], numbers: list[bool]) -> str:
    """A line of a table, whose numbers stand on the right."""
    cells = (
        cut(cell, width).rjust(width) if number else cut(cell, width).ljust(width)
        for cell, width, number in zip(row, widths, numbers)
    )
    return cut("  ".join(cells).rstrip(), WIDTH)


def show_vm(vm: Row) -> tuple[str, ...]:
    return (
        plain(vm["vm"]),
        plain(vm["user"]),
        show_backends(vm["backends"]),
        words.COUNTERS.get(vm["counter"], "none" if vm["verdict"] == words.NOT_LIMITED else "?"),
        short_size(vm["pinned_bytes"]),
        "none" if vm["limit_unlimited"] else short_size(vm["limit_bytes"]),
        "-" if vm["headroom_bytes"] is None else short_size(vm["headroom_bytes"]),
        vm["verdict"],
    )


def show_backends(backends: list[Any] | None) -> str:
    """The backends of a VM in the width of one: of several, the first letters."""
    if not backends:
        return "?"
    return plain(backends[0]) if len(backends) == 1 else "+".join(plain(each)[:4] for each in backends)


def show_forecast(host: Row) -> list[str]:
    """The table of what would start on a host, or what is told in its place, and below it what to do or to ask."""
    forecast = host["forecast"]
    if forecast["msg"]:
        # Of a host that gave no answer, that is told already.
        return [] if gave_none(host) else wrap(plain(forecast["summary"]), WIDTH)
    of_sentence: dict[str, dict[str, None]] = {}
    for vm in forecast["vms"]:
        # What helps it after a reboot comes first, and is told alone.
        open_ = [each for each in (vm["reboot"], vm["now"]) if each is not None and each["starts"] is not True]
        for answer in open_[:1]:
            of_sentence.setdefault(what_to_do(answer), {})[vm["vm"]] = None
    rows = [words.FORECAST_HEADER, *(show_defined(vm) for vm in forecast["vms"])]
    lines = [words.FORECAST_TITLE, *table(rows, 1, words.FORECAST_NUMBERS)] if forecast["vms"] else []
    below = (f"{', '.join(names)}: {sentence}" for sentence, names in of_sentence.items())
    return [*lines, *(line for text in (*below, forecast["summary"]) for line in wrap(plain(text), WIDTH))]


def gave_none(host: Row) -> bool:
    """Whether a host gave no answer that could be read."""
    return host["status"] in (words.FAILED, words.UNREACHABLE)


def what_to_do(answer: Row) -> str:
    """Of one that would not start, or need not, what would help, or what would tell, or why."""
    return str((answer["question"] if answer["starts"] is None else answer["remedy"]) or answer["reason"])


def show_defined(vm: Row) -> tuple[str, ...]:
    """A VM that is defined. The numbers are those after a reboot, where it starts then."""
    starts = {None: "?", True: "yes", False: "no"}
    answer = vm["now"] if vm["reboot"] is None else vm["reboot"]
    sizes = ("?" if size is None else short_size(size) for size in (answer["charged_bytes"], answer["needed_bytes"]))
    limit = answer["limit_bytes"]
    return (
        plain(vm["vm"]),
        starts[vm["now"]["starts"]],
        "-" if vm["reboot"] is None else starts[vm["reboot"]["starts"]],
        words.COUNTERS.get(answer["counter"], "none" if answer["accounting"] == "none" else "?"),
        *sizes,
        "none" if answer["limit_unlimited"] else "?" if limit is None else short_size(limit),
    )


def show_forecasts(hosts: Mapping[str, Row]) -> list[str]:
    """What the forecasts of all hosts come to, and a line on each of the worst that has something to tell."""
    told = {name: host["forecast"] for name, host in hosts.items()}
    counts = [each["reboot"] for each in told.values() if each["reboot"] is not None]
    of, least, most = (sum(each[field] for each in counts) for field in ("of", "at_least", "at_most"))
    lines = wrap(words.fleet_forecast(of, least, most, len(told) - len(counts)), WIDTH)
    # A host that gave no answer has a line for that.
    telling = [name for name, host in hosts.items() if told[name]["trouble"] and not gave_none(host)]
    worst_first = sorted(telling, key=lambda name: how_bad(told[name]))
    room = FORECASTS - len(lines)
    named = worst_first if len(worst_first) <= room else worst_first[: room - 1]
    rest = len(worst_first) - len(named)
    more = [f"... and {words.counted(rest, 'host')} more"] if rest else []
    return [*lines, *(sum_up_host(name, told[name]) for name in named), *more] if told else []


def how_bad(forecast: Row) -> tuple[int, ...]:
    """What sorts a forecast, the worst first: those that are certain to fail, those that may, and what is not known."""
    counts = [forecast[kind] or {"at_least": 0, "at_most": 0} for kind in ("reboot", "now")]
    return tuple(-each[field] for each in counts for field in ("at_least", "at_most"))


def show_end(hosts: Mapping[str, Row], forecasts: list[str]) -> list[str]:
    """The end of the report, which fits a screen: the verdicts counted, the worst hosts named, and what to do.

    `forecasts`: the lines of the forecast in it.
    """
    if not hosts:
        return []
    vms = words.counted(sum(len(host["vms"]) for host in hosts.values()), "VM")
    counts = wrap(f"{words.counted(len(hosts), 'host')} with {vms}: {count_verdicts(hosts.values())}", WIDTH)
    remedies = show_remedies(hosts.values())
    room = SCREEN - len(counts) - len(remedies) - len(forecasts)
    # sorted() leaves those that are alike in the order of the inventory.
    worst_first = sorted(hosts, key=lambda name: words.HOST_VERDICTS.index(hosts[name]["verdict"]))
    named = worst_first if len(hosts) <= room else worst_first[: room - REST]
    rest = [hosts[name] for name in worst_first[len(named) :]]
    more = f"... and {words.counted(len(rest), 'host')} more: {count_verdicts(rest)}" if rest else ""
    return [
        *counts,
        *(sum_up_host(name, hosts[name]) for name in named),
        *wrap(more, WIDTH, max_lines=REST, placeholder="..."),
        *forecasts,
        *remedies,
    ]


def count_verdicts(hosts: Iterable[Row]) -> str:
    """How many of the hosts have which verdict, the worst first."""
    count = Counter(host["verdict"] for host in hosts)
    return ", ".join(f"{count[verdict]} {verdict}" for verdict in words.HOST_VERDICTS if count[verdict])


def show_remedies(hosts: Iterable[Row]) -> list[str]:
    """What to do, each sentence once, that for most VMs first, as far as there is room."""
    count = Counter(vm["remedy"] for host in hosts for vm in host["vms"] if vm["remedy"])
    lines: list[str] = []
    for sentence, vms in count.most_common():
        # A name in it may be of any length.
        told = plain(f"{words.counted(vms, 'VM')}: {sentence}")
        more = wrap(told, WIDTH, max_lines=REMEDY, placeholder="...")
        if len(lines) + len(more) > REMEDIES:
            break
        lines += more
    return lines


def sum_up_host(name: str, host: Row) -> str:
    """A line on a host, in which a long name leaves room for what is told."""
    summary = plain(host["summary"])
    return cut(f"{cut(plain(name), max(WIDTH // 2, WIDTH - len(summary) - len(': ')))}: {summary}", WIDTH)
