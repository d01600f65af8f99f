# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what is done to a host, step by step, so that it can be done again after a cut."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from ._capabilities import parse_file_capabilities
from ._errors import IommufdError, error_text, shown_path
from ._grant import grant_patiently
from ._policy import POLICY_FILE, follow_policy_file
from ._programs import INTERPRETER
from ._record import RELABEL, RELOAD, RESTART, SELINUX, SYSTEMD, UDEV, Item, Record
from ._states import (
    FileState,
    NodeState,
    matching_nodes,
    remove_file,
    remove_unfinished,
    set_capability,
    set_node,
    write_file_state,
)
from ._systemd import Run, UnitState, must_run, reload_units, tell_systemd

__all__ = (
    "Effect",
    "EnableUnit",
    "FollowRules",
    "Grant",
    "LoadModule",
    "Relabel",
    "Reload",
    "RemoveFile",
    "RemoveUnfinished",
    "RunUnit",
    "SetCapability",
    "SetNode",
    "StartUnit",
    "Step",
    "StepFailed",
    "StopUnit",
    "WriteFile",
    "make_steps",
    "note_due",
    "reload_for",
    "shown_capabilities",
    "shown_content",
)

# Where a changed file has to be told to somebody, and to whom.
_TOLD = {"/etc/systemd/system/": SYSTEMD, "/etc/udev/rules.d/": UDEV, POLICY_FILE: SELINUX}

# Where these have a socket, a folder or a file while they run.
_SYSTEMD_RUNS = "/run/systemd/system"
_UDEV_RUNS = "/run/udev/control"
_SELINUX_RUNS = "/sys/fs/selinux/enforce"

_RESTORECON = "restorecon"


class Effect(Protocol):
    """A change of the host, which can be made again without harm.

    Some have `due`: what the record has to remember until it is made, as nothing on the host shows that it is missing.
    """

    def make(self, run: Run) -> None:
        """Raises OSError or IommufdError."""


# Each is a class of its own, and no named tuple: to remove a path is not to grant one, though both have but a path.


@dataclass(frozen=True)
class WriteFile:
    """Makes a file what it was, or what it is to be. `program`: one that is to start on this host, or it stays out."""

    path: str
    state: FileState
    program: bool = False

    def make(self, run: Run) -> None:
        write_file_state(self.path, self.state, partial(_try_program, run) if self.program else None)


def _try_program(run: Run, path: str) -> None:
    """Raises IommufdError where a program does not start here."""
    must_run(run, *INTERPRETER.split(), path, "--help")


@dataclass(frozen=True)
class Relabel:
    """Gives new files and folders what SELinux's policy has for their paths, where it is in force."""

    paths: tuple[str, ...]

    @property
    def due(self) -> list[tuple[str, str]]:
        return [(RELABEL, path) for path in self.paths]

    def make(self, run: Run) -> None:
        if os.path.exists(_SELINUX_RUNS) and shutil.which(_RESTORECON):
            must_run(run, _RESTORECON, *self.paths)


@dataclass(frozen=True)
class LoadModule:
    """Loads a module of the kernel, with what it depends on."""

    name: str

    def make(self, run: Run) -> None:
        must_run(run, "modprobe", "--", self.name)


@dataclass(frozen=True)
class RemoveFile:
    """Removes a file, and the folders that were made for it."""

    path: str
    folders: tuple[str, ...]

    def make(self, run: Run) -> None:
        remove_file(self.path, self.folders)


@dataclass(frozen=True)
class RemoveUnfinished:
    """Removes what a run that was cut off has left of a new file, where the old one is still there."""

    path: str

    def make(self, run: Run) -> None:
        remove_unfinished(self.path)


@dataclass(frozen=True)
class SetCapability:
    """Gives an executable the extended attribute that it had."""

    path: str
    xattr: bytes | None

    def make(self, run: Run) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            set_capability(self.path, self.xattr)


@dataclass(frozen=True)
class Grant:
    """Gives an executable CAP_IPC_LOCK, unless it has it by now."""

    path: str

    def make(self, run: Run) -> None:
        grant_patiently(self.path)


@dataclass(frozen=True)
class SetNode:
    """Lets the same ones open a node as before."""

    path: str
    state: NodeState

    def make(self, run: Run) -> None:
        set_node(self.path, self.state)


@dataclass(frozen=True)
class FollowRules:
    """Has udev make of device nodes what its rules say now. Those that are there by then: a module may bring some."""

    nodes: tuple[str, ...]

    def make(self, run: Run) -> None:
        nodes = [path for each in self.nodes for path in matching_nodes(each)]
        # Where it does not run, it reads its rules when it starts.
        if nodes and os.path.exists(_UDEV_RUNS):
            must_run(run, "udevadm", "trigger", "--settle", "--action=change", *nodes)


@dataclass(frozen=True)
class StopUnit:
    """Stops a unit and the units that it starts, so that nothing is done again that is put back."""

    name: str
    triggers: tuple[str, ...]
    disable: bool

    def make(self, run: Run) -> None:
        if self.disable:
            # systemd is told once, when all files are back.
            tell_systemd(run, "disable", self.name, "--no-reload")
        for each in (self.name, *self.triggers):
            tell_systemd(run, "stop", each)
            # So that no failure of a unit that is no more stays in the list. A unit that is not loaded has none.
            with contextlib.suppress(IommufdError):
                tell_systemd(run, "reset-failed", each)


@dataclass(frozen=True)
class StartUnit:
    """Enables and starts a unit that was enabled and active before."""

    name: str
    before: UnitState

    def make(self, run: Run) -> None:
        if self.before.enabled:
            tell_systemd(run, "enable", self.name)
        if self.before.active:
            tell_systemd(run, "start", self.name)


@dataclass(frozen=True)
class EnableUnit:
    """Has a unit started at boot. systemd is told once, when all files are there."""

    name: str

    def make(self, run: Run) -> None:
        tell_systemd(run, "enable", self.name, "--no-reload")


@dataclass(frozen=True)
class RunUnit:
    """Starts a unit. `anew`: one that runs, too."""

    name: str
    anew: bool

    @property
    def due(self) -> list[tuple[str, str]]:
        return [(RESTART, self.name)] if self.anew else []

    def make(self, run: Run) -> None:
        tell_systemd(run, "restart" if self.anew else "start", self.name)


@dataclass(frozen=True)
class Reload:
    """Has systemd, udev and SELinux's policy read their files again. One that does not run needs no telling."""

    whom: tuple[str, ...]

    @property
    def due(self) -> list[tuple[str, str]]:
        return [(RELOAD, each) for each in self.whom]

    def make(self, run: Run) -> None:
        if SYSTEMD in self.whom and os.path.exists(_SYSTEMD_RUNS):
            reload_units(run)
        if UDEV in self.whom and os.path.exists(_UDEV_RUNS):
            must_run(run, "udevadm", "control", "--reload")
        if SELINUX in self.whom:
            follow_policy_file(run)


class Step(NamedTuple):
    """One step towards a host as it was, or as it is to be: about a thing of this kind and path, or unit's name.

    `effect` None is nothing to do. `says` is what the user reads, nothing where nothing changes; `before` and `after`
    are for the diff. `item` is done with, once the step is made.
    """

    kind: str
    path: str
    effect: Effect | None = None
    says: str = ""
    before: str = ""
    after: str = ""
    item: Item | None = None


class StepFailed(IommufdError):
    """A step could not be made. `done` are those that were, before it."""

    def __init__(self, step: Step, cause: OSError | IommufdError, done: list[Step]) -> None:
        self.path = shown_path(step.path)
        self.why = error_text(cause.errno) if isinstance(cause, OSError) else str(cause).rstrip(".")
        self.done = done
        super().__init__(f"{self.path}: {self.why}.")


def reload_for(steps: list[Step], *more: str) -> list[Step]:
    """The steps that tell those who read the files that the steps change, and those that are due for another reason.

    None, where nobody has to be told.
    """
    told = {whom for step in steps if step.says for place, whom in _TOLD.items() if step.path.startswith(place)}
    whom = {*told, *more}
    of = {"systemd and udev": whom - {SELINUX}, "SELinux's policy": whom & {SELINUX}}
    return [Step("", name, Reload(tuple(sorted(each)))) for name, each in of.items() if each]


def note_due(record: Record, steps: list[Step]) -> bool:
    """Has the record remember what will be due once a part of the steps is made. Whether it is new to it."""
    new = [each for step in steps for each in _due(step) if each not in record.due]
    record.due += new
    return bool(new)


def make_steps(record: Record, steps: list[Step], run: Run) -> list[Step]:
    """Makes the steps, and has the record forget each thing once it is back. Gives those that have changed something.

    Whenever this is cut off, the record still names all that is not back, and what is still due. Raises StepFailed.
    """
    done: list[Step] = []
    step = Step("", record.path)
    try:
        if note_due(record, steps):
            record.save()
        for step in steps:
            if step.effect is not None:
                step.effect.make(run)
            if step.item is not None:
                record.drop(step.item)
            record.due = [each for each in record.due if each not in _due(step)]
            if step.item is not None or _due(step):
                record.save()
            done += [step] if step.says else []
    except (OSError, IommufdError) as exc:
        raise StepFailed(step, exc, done) from exc
    return done


def _due(step: Step) -> list[tuple[str, str]]:
    return getattr(step.effect, "due", [])


def shown_content(content: bytes) -> str:
    """A file for the diff, where the bytes of a program would only be in the way."""
    if b"\0" in content:
        return f"({len(content)} bytes that are no text)\n"
    return content.decode("utf-8", "backslashreplace")


def shown_capabilities(xattr: bytes | None) -> str:
    """What a file gives, for the diff."""
    if xattr is None:
        return ""
    given = parse_file_capabilities(xattr)
    return (
        f"permitted: {', '.join(given.permitted)}\ninheritable: {', '.join(given.inheritable)}\n"
        f"effective: {str(given.effective).lower()}\n"
    )
