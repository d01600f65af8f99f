# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A run passes only if everything ran and nothing failed or was left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report

SKIP = "<testcase name='a'/><testcase name='b'><skipped>{}</skipped></testcase>"


def write(results: Path, cases: str, ran: dict[str, str]) -> None:
    """Leave in results what Nox and the sessions leave there."""
    counted = [name for name in report.REQUIRED if name.startswith(report.COUNTED) and name != "units"]
    for name in counted:
        (results / f"{name}.xml").write_text("<testsuites><testcase name='a'/></testsuites>")
    (results / "units-3.11.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    sessions = [{"name": name, "signatures": [name], "result": result} for name, result in ran.items()]
    sessions.append({"name": "units", "signatures": ["units-3.11"], "result": ran.get("units", "success")})
    (results / "ran.json").write_text(json.dumps({"sessions": sessions}))
    (results / "planned.json").write_text(json.dumps([{"name": "units", "session": "units-3.11"}]))


ALL = dict.fromkeys(sorted(set(report.REQUIRED) - {"units"}), "success")
# Each session counts for one test, and the unit test for another; the one that only calls others for none.
OTHERS = len(ALL) - 1


@pytest.mark.parametrize(
    ("cases", "ran", "status", "code", "last"),
    [
        ("<testcase name='a'/>", ALL, 0, 0, f"{OTHERS + 1} passed, 0 failed"),
        ("<testcase name='a'><failure/></testcase>", ALL, 0, 1, f"{OTHERS} passed, 1 failed"),
        ("<testcase name='a'><error/></testcase>", ALL, 0, 1, f"{OTHERS} passed, 1 failed"),
        ("<testcase name='a'/>", {**ALL, "types": "failed"}, 1, 1, f"{OTHERS} passed, 1 failed"),
        ("<testcase name='a'/>", {**ALL, "types": "skipped"}, 0, 1, f"{OTHERS} passed, 1 failed"),
        # Nox does so with what stands on a session that failed.
        ("<testcase name='a'/>", {**ALL, "molecule-fit": "aborted"}, 1, 1, f"{OTHERS} passed, 1 failed"),
        ("<testcase name='a'/>", {k: v for k, v in ALL.items() if k != "types"}, 0, 1, f"{OTHERS} passed, 1 failed"),
        ("<testcase name='a'/>", {}, 0, 1, f"1 passed, {len(ALL)} failed"),
        ("<testcase name='a'/>", ALL, 2, 1, f"{OTHERS + 1} passed, 1 failed"),
        (SKIP.format("for no good reason"), ALL, 0, 1, f"{OTHERS + 1} passed, 1 failed"),
        (SKIP.format("No tests applicable."), ALL, 0, 0, f"{OTHERS + 1} passed, 0 failed"),
        (SKIP.format('"x" on Python 3.99 because it could not be found.'), ALL, 0, 0, f"{OTHERS + 1} passed, 0 failed"),
        (SKIP.format('"x" on Python 3.11 because it could not be found.'), ALL, 0, 1, f"{OTHERS + 1} passed, 1 failed"),
    ],
)
def test_verdict(
    cases: str,
    ran: dict[str, str],
    status: int,
    code: int,
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report, "find_pythons", lambda: {"3.11": "/usr/bin/python3.11"})
    write(tmp_path, cases, ran)
    assert report.main(tmp_path, status) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_session_that_left_no_results_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "<testcase name='a'/>", ALL)
    (tmp_path / "sanity-oldest.xml").unlink()
    assert report.main(tmp_path, 0) == 1
    assert "sanity-oldest: skipped it left no results" in capsys.readouterr().out


def test_it_says_with_what_a_session_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "<testcase name='a'/>", ALL)
    (tmp_path / "units-3.11.note").write_text("Python 3.11, ansible-core 2.19.14")
    assert report.main(tmp_path, 0) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("units-3.11 "))
    assert "Python 3.11, ansible-core 2.19.14" in line


def test_what_this_machine_cannot_run_is_listed_and_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As Nox tells it of a session that has ended itself, and of one that stands on it.
    write(tmp_path, "<testcase name='a'/>", {**ALL, "lab-arm64": "aborted", "molecule-elsewhere": "aborted"})
    (tmp_path / "molecule-elsewhere.xml").unlink()
    (tmp_path / "lab-arm64.impossible").write_text("guest arm64: no binfmt_misc")
    assert report.main(tmp_path, 1) == 1
    _ran, _heading, rest = capsys.readouterr().out.partition("What could not run on this machine\n")
    impossible, _heading, wrong = rest.partition("What is wrong\n")
    assert "lab-arm64: guest arm64: no binfmt_misc" in impossible
    assert "molecule-elsewhere: aborted" in wrong


def test_a_run_that_left_nothing_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(tmp_path, 0) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"0 passed, {len(report.REQUIRED)} failed"


PLAY = """
TASK [Something before] ****
ok: [fallback]

TASK [{task}] ****
fatal: [fallback]: FAILED! => {{"msg": "{message}"}}

PLAY RECAP *****
localhost : ok=1 changed=0 unreachable=0 failed=0
fallback  : ok=7 changed=0 unreachable=0 failed={failed}

"""


def test_it_shows_the_task_at_which_a_scenario_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "<testcase name='a'/>", {**ALL, "molecule-fit": "failed"})
    plays = (("Fails, as it should", "ignored", 0), ("Fails", "the cause", 1), ("Destroy", "afterwards", 0))
    text = "".join(PLAY.format(task=task, message=message, failed=failed) for task, message, failed in plays)
    (tmp_path / "molecule-fit.log").write_text(text)
    assert report.main(tmp_path, 1) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in ("TASK [Fails] ****", "the cause"))
    assert not any(text in out for text in ("ignored", "afterwards"))


def test_a_log_without_a_failed_task_shows_its_end() -> None:
    lines = [f"line {number}" for number in range(100)]
    assert report.failed_task("\n".join(lines)) == lines[-report.TASK_LINES :]
