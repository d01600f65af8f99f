# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Report what 'make test' ran, where, and what it could not run; fail where anything failed or was left out.

Usage: report.py RESULTS STATUS, with the folder that noxfile.py writes its results to and Nox's own exit status.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pythons import CONTROLLER_CORES, UNIT_CORES, find_pythons

# Sessions without which the run is not the whole test, whatever Nox planned.
REQUIRED = (
    "ansible-lint",
    "build-import-check",
    "docs-check",
    "extra-checks",
    "license-check",
    "lint",
    "machine",
    "molecule-apparmor",
    "molecule-audit",
    "molecule-default",
    "molecule-default-2.16",
    "molecule-domain",
    "molecule-drift",
    "molecule-elsewhere",
    "molecule-examples",
    "molecule-exec",
    "molecule-fallback",
    "molecule-fallback-2.16",
    "molecule-fit",
    "molecule-forecast",
    "molecule-kernel",
    "molecule-native",
    "molecule-selinux",
    "molecule-stock",
    "molecule-units",
    "molecule-unprivileged",
    "sanity-newest",
    "sanity-oldest",
    "syntax-oldest",
    "tooling",
    "types",
    "uapi",
    "units",
    "untrusted-2.16",
    "untrusted-2.19",
)


# How much of a failed task the report shows: who has only the end of a run's output still learns what went wrong.
LINE, TASK_LINES = 600, 12

# Sessions that leave the results of single tests; one that leaves none has tested nothing.
COUNTED = (
    *("machine", "molecule-elsewhere", "molecule-kernel", "molecule-selinux"),
    *("sanity-", "tooling", "uapi", "units-", "untrusted-"),
)


@dataclass
class Count:
    """The tests of one session: how many passed and failed, and which were skipped, each with its reason."""

    passed: int = 0
    failed: int = 0
    idle: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def count_junit(paths: list[Path], pythons: set[str]) -> Count:
    """Count the test cases of JUnit files; pythons are the versions that this machine has."""
    count = Count()
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                count.failed += 1
            elif skip is None:
                count.passed += 1
            else:
                _sort_skip(count, str(case.get("name")), skip.text or skip.get("message") or "no reason given", pythons)
    return count


def _sort_skip(count: Count, name: str, reason: str, pythons: set[str]) -> None:
    """Put a skipped test where it belongs: nothing to look at, impossible on this machine, or left out."""
    missing = re.search(r"on Python (\S+) because it could not be found", reason)
    if reason == "No tests applicable.":
        count.idle.append(name)
    elif (missing and missing[1] not in pythons) or "because it is unsupported" in reason:
        count.impossible.append(f"{name}: {reason}")
    else:
        count.skipped.append(f"{name}: {reason}")


def count_session(results: Path, session: str, ok: bool, pythons: set[str]) -> Count:
    """Count the tests of a session from what it left in results; one that tells nothing counts as one test."""
    folder, single = results / session, results / f"{session}.xml"
    files = sorted(folder.glob("*.xml")) if folder.is_dir() else [single] if single.is_file() else []
    count = count_junit(files, pythons) if files else Count(passed=int(ok))
    if ok and not files and session.startswith(COUNTED):
        count.skipped.append("it left no results")
    if not ok and not count.failed:
        count.failed = 1
    return count


def failed_task(log: str) -> list[str]:
    """Return the task at which a play of this log of a scenario failed, with what it said, cut to fit the report."""
    before, failed = "", False
    for part in re.split(r"^PLAY RECAP.*\n", log, flags=re.MULTILINE):
        if failed := bool(re.match(r"(?:.+\n)*?.+(?:failed|unreachable)=[1-9]", part)):
            break
        before = part
    task = before[max(before.rfind("\nTASK ["), 0) :] if failed else log
    # Without Ansible's excerpt of the playbook, which has a number before each line.
    lines = [line[:LINE] for line in task.splitlines() if re.match(r"(?!\d+( |$))\s*[\w-]|\[", line)]
    return lines[:TASK_LINES] if failed else lines[-TASK_LINES:]


def load(path: Path) -> Any:
    """Return the JSON of path, or nothing if Nox did not get so far as to write it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def title(entry: dict[str, Any]) -> str:
    """Return the name that a session that ran gives its results: units, alone, runs on several Pythons."""
    name = str(entry["name"])
    return str(entry["signatures"][-1]) if name == "units" and entry.get("signatures") else name


def where(session: str, notes: dict[str, str]) -> str:
    """Return with what a session ran: its Python and its ansible-core, from the note that it left."""
    return notes.get(session, "Python {}.{}".format(*sys.version_info[:2]))


def main(results: Path, status: int) -> int:
    """Print the report; return 1 if anything failed, was skipped or is missing."""
    ran = (load(results / "ran.json") or {}).get("sessions", [])
    # This one does nothing but call others.
    ran_alone = [entry for entry in ran if entry["name"] != "lint"]
    planned = [session["session"] for session in load(results / "planned.json") or []]
    notes = {path.stem: path.read_text(encoding="utf-8") for path in results.glob("*.note")}
    pythons = set(find_pythons())
    problems: list[str] = []
    impossible: list[str] = []
    idle: list[str] = []
    passed = failed = 0

    print("\nWhat ran\n")
    print(f"{'session':24} {'with':36} {'result':8} {'passed':>6} {'failed':>6} {'seconds':>8}")
    for entry in ran_alone:
        name, ok = title(entry), entry["result"] == "success"
        count = count_session(results, name, ok, pythons)
        passed, failed = passed + count.passed, failed + count.failed
        seconds = f"{entry.get('duration', 0):8.1f}"
        print(
            f"{name:24} {where(name, notes):36} {entry['result']:8} {count.passed:6} {count.failed:6} {seconds}",
        )
        problems += [f"{name}: {entry['result']}"] * (not ok or count.failed > 0)
        if (reason := results / f"{name}.impossible").is_file():
            impossible.append(f"{name}: {reason.read_text(encoding='utf-8')}")
        if not ok and (log := results / f"{name}.log").is_file():
            problems += [f"    {line}" for line in failed_task(log.read_text(encoding="utf-8", errors="replace"))]
        problems += [f"{name}: skipped {what}" for what in count.skipped]
        impossible += [f"{name}: {what}" for what in count.impossible]
        idle += [f"{name}: {', '.join(count.idle)}"] * bool(count.idle)

    names = {title(entry) for entry in ran} | {entry["name"] for entry in ran}
    missing = sorted((set(planned) | set(REQUIRED)) - names)
    problems += [f"{name}: did not run" for name in missing]
    if status and not problems:
        problems.append(f"nox ended with status {status}")
    impossible += [f"unit tests on Python {v}: this machine has none" for v in UNIT_CORES if v not in pythons]
    impossible += [
        f"untrusted text with ansible-core {core}: this machine has none of Python {', '.join(versions)}"
        for core, versions in CONTROLLER_CORES.items()
        if pythons.isdisjoint(versions)
    ]

    for heading, lines in (
        ("What could not run on this machine", impossible),
        ("What found nothing to look at", idle),
        ("What is wrong", problems),
    ):
        if lines:
            print(f"\n{heading}\n", *lines, sep="\n  ")
    print(f"\n{passed} passed, {failed + len(missing) or int(bool(problems))} failed", flush=True)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
