# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the audit's report as text: what is told of each host, and an end that fits a screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any

from ..module_utils._size import human_size
from . import _audit_words as words

__all__ = ("SCREEN", "WIDTH", "show_end", "show_host")

# Printed by Ansible as YAML, a line is set in by six columns, and may be quoted: that fits a terminal of 80.
WIDTH = 72
# Of 24 lines, Ansible takes two above the end of the report, and the shell its last.
SCREEN = 21
# So many of these tell what to do, and so many of those for one sentence.
REMEDIES = 8
REMEDY = 5
# And so many count the hosts that are not named.
REST = 2

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
    widths = [max(map(len, column)) for column in zip(*rows)]
    room = WIDTH - sum(widths[names:]) - len("  ") * (len(widths) - 1)
    if names == 2:
        widths[1] = min(widths[1], max(room - widths[0], room // 2))
    widths[0] = min(widths[0], room - sum(widths[1:names]))
    numbers = [title in words.NUMBERS for title in rows[0]]
    lines = [row_of(row, widths, numbers) for row in rows]
    return lines if names == 2 else [*lines, cut(words.of_user(users.pop()), WIDTH)]


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


def show_end(hosts: Mapping[str, Row]) -> list[str]:
    """The end of the report, which fits a screen: the verdicts counted, the worst hosts named, and what to do."""
    if not hosts:
        return []
    vms = words.counted(sum(len(host["vms"]) for host in hosts.values()), "VM")
    counts = wrap(f"{words.counted(len(hosts), 'host')} with {vms}: {count_verdicts(hosts.values())}", WIDTH)
    remedies = show_remedies(hosts.values())
    room = SCREEN - len(counts) - len(remedies)
    # sorted() leaves those that are alike in the order of the inventory.
    worst_first = sorted(hosts, key=lambda name: words.HOST_VERDICTS.index(hosts[name]["verdict"]))
    named = worst_first if len(hosts) <= room else worst_first[: room - REST]
    rest = [hosts[name] for name in worst_first[len(named) :]]
    more = f"... and {words.counted(len(rest), 'host')} more: {count_verdicts(rest)}" if rest else ""
    return [
        *counts,
        *(sum_up_host(name, hosts[name]) for name in named),
        *wrap(more, WIDTH, max_lines=REST, placeholder="..."),
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
