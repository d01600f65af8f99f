# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a step does, and that whatever cuts steps off can be made good. Files are real, commands are not."""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _capabilities, _record, _steps
from ansible_collections.virt.iommufd.plugins.module_utils._command import run_command
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._programs import GRANT, zipapp
from ansible_collections.virt.iommufd.plugins.module_utils._record import FILE, UNIT, Item, Record
from ansible_collections.virt.iommufd.plugins.module_utils._states import FileState, NodeState
from ansible_collections.virt.iommufd.plugins.module_utils._steps import (
    Effect,
    EnableUnit,
    FollowRules,
    Grant,
    LoadModule,
    Relabel,
    Reload,
    RemoveFile,
    RunUnit,
    SetCapability,
    SetNode,
    StartUnit,
    Step,
    StepFailed,
    StopUnit,
    WriteFile,
    make_steps,
    reload_for,
    shown_capabilities,
    shown_content,
)
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import UnitState

# Only root may set the real one; tests/kernel does.
XATTR = "user.stands.in"
GRANTED = struct.pack("<5I", 0x02000001, 1 << 14, 0, 0, 0)
TWICE = "u.path", "u.service"


class Told:
    """Keeps what it is told to run; what starts with one of `failing` fails."""

    def __init__(self, *failing: str) -> None:
        self.said: list[str] = []
        self.failing = failing

    def __call__(self, words: list[str]) -> tuple[int, str, str]:
        self.said.append(" ".join(words))
        return (1, "", "Broken\n") if self.said[-1].startswith(self.failing or "\0") else (0, "", "")


@pytest.fixture(autouse=True)
def a_host_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With systemd, udev and SELinux in force, which has its tool."""
    for name in ("_SYSTEMD_RUNS", "_UDEV_RUNS", "_SELINUX_RUNS"):
        monkeypatch.setattr(_steps, name, str(tmp_path))
    monkeypatch.setattr(_steps, "_RESTORECON", sys.executable)
    monkeypatch.setattr(_capabilities, "XATTR", XATTR)


def own(content: bytes, mode: int = 0o644) -> FileState:
    """A file of whoever runs the tests."""
    return FileState(content, mode, os.getuid(), os.getgid())


@pytest.mark.parametrize(
    ("effect", "said"),
    [
        (LoadModule("vfio-pci"), ["modprobe -- vfio-pci"]),
        (Relabel(("/a", "/a/f")), [f"{sys.executable} /a /a/f"]),
        (FollowRules(("/dev/nul?", "/dev/zero")), ["udevadm trigger --settle --action=change /dev/null /dev/zero"]),
        (
            StopUnit("u.path", ("u.service",), disable=True),
            [
                "systemctl disable --no-reload -- u.path",
                *(f"systemctl {verb} -- {name}" for name in TWICE for verb in ("stop", "reset-failed")),
            ],
        ),
        (
            StopUnit("u.path", (), disable=False),
            [f"systemctl {verb} -- u.path" for verb in ("stop", "reset-failed")],
        ),
        (
            StartUnit("u.path", UnitState(True, True, True)),
            ["systemctl enable -- u.path", "systemctl start -- u.path"],
        ),
        (StartUnit("u.path", UnitState(True, True, False)), ["systemctl enable -- u.path"]),
        (StartUnit("u.path", UnitState(True, False, True)), ["systemctl start -- u.path"]),
        # systemd is told once, when all files are there.
        (EnableUnit("u.path"), ["systemctl enable --no-reload -- u.path"]),
        (RunUnit("u.path", anew=False), ["systemctl start -- u.path"]),
        (RunUnit("u.path", anew=True), ["systemctl restart -- u.path"]),
        (Reload(("systemd",)), ["systemctl daemon-reload"]),
        (Reload(("udev",)), ["udevadm control --reload"]),
        (Reload(("systemd", "udev")), ["systemctl daemon-reload", "udevadm control --reload"]),
    ],
)
def test_what_is_told(effect: Effect, said: list[str]) -> None:
    told = Told()
    effect.make(told)
    assert told.said == said
    refused = Told(*said[:1])
    with pytest.raises(IommufdError, match=f"^'{said[0]}' failed: Broken$"):
        effect.make(refused)
    # Nothing is done after it.
    assert refused.said == said[:1]


def test_nobody_is_told_of_nodes_that_are_not_there() -> None:
    told = Told()
    FollowRules(("/dev/nosuch*",)).make(told)
    assert told.said == []


@pytest.mark.parametrize("effect", [Relabel(("/a",)), Reload(("systemd", "udev")), FollowRules(("/dev/none",))])
def test_nobody_is_told_who_is_not_there(effect: Effect, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SYSTEMD_RUNS", "_UDEV_RUNS", "_SELINUX_RUNS"):
        monkeypatch.setattr(_steps, name, "/none")
    told = Told()
    effect.make(told)
    assert told.said == []


def test_selinux_without_its_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_steps, "_RESTORECON", "/none/restorecon")
    told = Told()
    Relabel(("/a",)).make(told)
    assert told.said == []


def test_a_unit_that_has_not_failed() -> None:
    """One that is not loaded has no failure to forget, and systemd says so."""
    told = Told("systemctl reset-failed")
    StopUnit("u.path", ("u.service",), disable=False).make(told)
    assert told.said[-1] == "systemctl reset-failed -- u.service"


def test_files(tmp_path: Path) -> None:
    path, told = str(tmp_path / "a" / "f"), Told()
    for content, mode in ((b"one", 0o640), (b"two", 0o644)):
        WriteFile(path, own(content, mode)).make(told)
        assert (Path(path).read_bytes(), os.stat(path).st_mode & 0o777) == (content, mode)
    for _again in range(2):
        RemoveFile(path, (str(tmp_path / "a"),)).make(told)
        assert os.listdir(tmp_path) == []
    assert told.said == []


def test_a_program_has_to_start_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_steps, "INTERPRETER", f"{sys.executable} -IS")
    path = tmp_path / "program"
    effect = WriteFile(str(path), own(zipapp(GRANT), 0o755), program=True)

    def run(words: list[str]) -> tuple[int, str, str]:
        said.append(words)
        assert not path.exists()
        return run_command(words)

    said: list[list[str]] = []
    effect.make(run)
    assert said == [[sys.executable, "-IS", f"{path}.iommufd_host-new", "--help"]]
    assert os.listdir(tmp_path) == ["program"]
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (zipapp(GRANT), 0o755)
    # What is no program is written as it is.
    path.unlink()
    WriteFile(str(path), own(b"raise SystemExit(7)")).make(run)
    assert len(said) == 1


@pytest.mark.parametrize("before", [None, b"#!/usr/bin/python3\n"], ids=["new", "another"])
@pytest.mark.parametrize(
    ("content", "interpreter", "kind", "why"),
    [
        (b"raise SystemExit(7)\n", sys.executable, IommufdError, "--help' failed: exit code 7$"),
        (b"import none_of_ours\n", sys.executable, IommufdError, "--help' failed: .*No module named"),
        (b"", "/none/python3", HostLacks, "^/none/python3 cannot be run \\(ENOENT"),
    ],
    ids=["it fails", "it lacks a module", "there is no Python"],
)
def test_a_program_that_does_not_start_stays_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: bytes | None,
    content: bytes,
    interpreter: str,
    kind: type[IommufdError],
    why: str,
) -> None:
    monkeypatch.setattr(_steps, "INTERPRETER", f"{interpreter} -IS")
    path = tmp_path / "program"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(kind, match=why):
        WriteFile(str(path), own(content, 0o755), program=True).make(run_command)
    # The one that was there is left, and nothing of the new one.
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == (
        [] if before is None else [("program", before)]
    )


def test_capabilities(tmp_path: Path) -> None:
    path, told = tmp_path / "qemu", Told()
    path.touch(0o755)
    for _again in range(2):
        Grant(str(path)).make(told)
        assert os.getxattr(path, XATTR) == GRANTED
    for xattr in (b"", None, None):
        SetCapability(str(path), xattr).make(told)
        assert (XATTR in os.listxattr(path)) == (xattr is not None)
    # One that is gone by now, as while a package is upgraded, needs nothing.
    for name in ("gone", "qemu/gone"):
        SetCapability(str(tmp_path / name), None).make(told)
    Grant(str(tmp_path / "gone")).make(told)
    assert os.listdir(tmp_path) == ["qemu"]
    path.chmod(0o777)
    for effect in (Grant(str(path)), SetCapability(str(path), GRANTED)):
        with pytest.raises(IommufdError, match="can be written by everybody"):
            effect.make(told)
    assert XATTR not in os.listxattr(path)
    assert told.said == []


def test_a_node(terminal: str) -> None:
    told = Told()
    status = os.stat(terminal)
    SetNode(terminal, NodeState(0o604, status.st_uid, status.st_gid)).make(told)
    assert os.stat(terminal).st_mode & 0o7777 == 0o604
    assert told.said == []


def step(path: str, effect: Effect | None = None, says: str = "It is.", item: Item | None = None) -> Step:
    return Step(FILE, path, effect, says, item=item)


@pytest.mark.parametrize(
    ("steps", "more", "whom"),
    [
        ([], (), ()),
        ([step("/etc/systemd/system/a.service")], (), ("systemd",)),
        ([step("/etc/systemd/system/a.service.d/b.conf")], (), ("systemd",)),
        ([step("/etc/udev/rules.d/a.rules")], (), ("udev",)),
        ([step("/etc/udev/rules.d/a.rules"), step("/etc/systemd/system/a.path")], (), ("systemd", "udev")),
        ([step("/etc/libvirt/qemu.conf"), step("/usr/local/etc/udev/rules.d/a.rules")], (), ()),
        # Where nothing is changed, there is nothing to tell.
        ([step("/etc/udev/rules.d/a.rules", says="")], (), ()),
        ([], ("udev", "udev", "systemd"), ("systemd", "udev")),
        ([step("/etc/udev/rules.d/a.rules")], ("systemd",), ("systemd", "udev")),
    ],
)
def test_who_is_to_be_told_of_files(steps: list[Step], more: tuple[str, ...], whom: tuple[str, ...]) -> None:
    assert reload_for(steps, *more) == ([Step("", "systemd and udev", Reload(whom))] if whom else [])


def test_the_policy_of_selinux_is_told_last() -> None:
    steps = [step("/usr/local/share/iommufd_host.cil"), step("/etc/udev/rules.d/a.rules")]
    told = [Step("", "systemd and udev", Reload(("udev",))), Step("", "SELinux's policy", Reload(("selinux",)))]
    assert reload_for(steps) == told
    assert reload_for([], "selinux") == told[1:]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """One that remembers three files, in its file."""
    monkeypatch.setattr(_record, "_ROOT", os.geteuid())
    record = Record(str(tmp_path / "lib" / "record.json"), [Item(FILE, f"/{name}", None) for name in "abc"])
    record.save()
    return record


class Act:
    """An effect that looks at the record as it is on the disk at this moment, or fails."""

    def __init__(self, record: Record, error: BaseException | None = None) -> None:
        self.seen: list[Record] = []
        self._path, self._error = record.path, error

    def make(self, run: Callable[..., Any]) -> None:
        if self._error is not None:
            raise self._error
        self.seen.append(Record.load(self._path))


def names(record: Record) -> str:
    return "".join(item.path[1:] for item in record.items)


def test_each_thing_is_forgotten_once_it_is_back(record: Record) -> None:
    a, b, _c = record.items
    first, second, third, told = Act(record), Act(record), Act(record), Told()
    steps = [
        step("/a", first, item=a),
        # Nothing to do, or to say.
        step("/b", None, "", b),
        step("/x", second, ""),
        Step("", "systemd and udev", Reload(("systemd",))),
        step("/y", third),
    ]
    assert make_steps(record, steps, told) == [steps[0], steps[4]]
    assert [names(each) for act in (first, second, third) for each in act.seen] == ["abc", "c", "c"]
    # Who has to be told is known before anything is done, and until it is done.
    assert [each.due_for("reload") for act in (first, second, third) for each in act.seen] == [
        ["systemd"],
        ["systemd"],
        [],
    ]
    assert told.said == ["systemctl daemon-reload"]
    assert Record.load(record.path) == record
    assert (names(record), record.due) == ("c", [])


def test_nothing_is_written_where_there_is_nothing_to_do(record: Record) -> None:
    before = os.stat(record.path)
    assert make_steps(record, [], Told()) == []
    assert make_steps(record, [step("/x", Act(record))], Told()) != []
    assert os.stat(record.path).st_ino == before.st_ino


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "EROFS: Read-only file system"),
        (IommufdError("It is somebody else's."), "It is somebody else's"),
    ],
)
def test_a_step_that_fails(record: Record, error: Exception, why: str) -> None:
    a, b, c = record.items
    steps = [
        step("/a", Act(record), item=a),
        step("/b\x1b", Act(record, error), item=b),
        step("/c", Act(record), item=c),
        Step("", "systemd and udev", Reload(("udev",))),
    ]
    told = Told()
    with pytest.raises(StepFailed, match=f"^/b\\\\x1b: {why}\\.$") as caught:
        make_steps(record, steps, told)
    assert (caught.value.path, caught.value.why, caught.value.done) == ("/b\\x1b", why, steps[:1])
    assert told.said == []
    # Whoever runs this again knows what is left.
    left = Record.load(record.path)
    assert (names(left), left.due_for("reload")) == ("bc", ["udev"])


def test_a_signal_that_cuts_it_off(record: Record) -> None:
    a, b, _c = record.items
    steps = [
        step("/a", Act(record), item=a),
        step("/b", Act(record, KeyboardInterrupt()), item=b),
        Step("", "systemd and udev", Reload(("systemd",))),
    ]
    with pytest.raises(KeyboardInterrupt):
        make_steps(record, steps, Told())
    left = Record.load(record.path)
    assert (names(left), left.due_for("reload")) == ("bc", ["systemd"])


def test_somebody_who_cannot_be_told_stays_to_be_told(record: Record) -> None:
    steps = [step("/a", item=record.items[0]), Step("", "systemd and udev", Reload(("systemd", "udev")))]
    with pytest.raises(StepFailed, match=r"^systemd and udev: 'udevadm control --reload' failed: Broken\.$"):
        make_steps(record, steps, Told("udevadm"))
    left = Record.load(record.path)
    assert (names(left), left.due_for("reload")) == ("bc", ["systemd", "udev"])


def test_a_record_that_cannot_be_written(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is done that only the record would tell of."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", refuse)
    act = Act(record)
    steps = [step("/x", act), Step("", "systemd and udev", Reload(("systemd",)))]
    with pytest.raises(StepFailed, match=f"^{record.path}: ENOSPC: No space left on device") as caught:
        make_steps(record, steps, Told())
    assert (act.seen, caught.value.done) == ([], [])


def test_a_file_for_the_diff() -> None:
    assert shown_content(b"a\n\xc3\xa9\xff") == "a\n\u00e9\\xff"
    assert shown_content(b"#!/usr/bin/python3\nPK\0\xff") == "(23 bytes that are no text)\n"


def test_capabilities_for_the_diff() -> None:
    assert shown_capabilities(None) == ""
    assert shown_capabilities(GRANTED) == "permitted: cap_ipc_lock\ninheritable: \neffective: true\n"
    assert shown_capabilities(b"") == "permitted: \ninheritable: \neffective: false\n"


def test_a_step_about_a_unit() -> None:
    """Its name is no path, and is in no folder that anybody is told of."""
    assert reload_for([Step(UNIT, "u.path", RunUnit("u.path", False), "u.path is started.")]) == []
