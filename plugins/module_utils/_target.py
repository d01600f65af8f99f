# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the process that a task names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Protocol

from ._child import NoAnswer, in_child
from ._errors import IommufdError, ProcessGone
from ._process import Process

if TYPE_CHECKING:
    from ._running import DomainRecord
    from ._systemd import Run

__all__ = (
    "DomainTarget",
    "PidTarget",
    "Target",
    "UnitTarget",
    "escaped",
    "hold_target",
    "look_patiently",
)

# A local file is there in no time, in seconds.
_PATIENCE = 10

# xml.sax.saxutils would do, but imports what speaks HTTP, which costs as much as all of this collection.
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"})


class PidTarget(NamedTuple):
    """A process by its id."""

    pid: int

    def __str__(self) -> str:
        return f"Process {self.pid}"

    def resolve(self) -> int:
        """The id."""
        return self.pid

    def check(self, process: Process) -> None:
        """Any process will do."""


def look_patiently(what: str, look: Callable[[], Any], keep: Collection[int] = ()) -> Any:
    """What a look at something of another user's comes to, in a child, since it may last for ever. Raises IommufdError.

    `what` names it; `keep` is as for in_child.
    """
    try:
        return in_child(None, look, _PATIENCE, keep)
    except NoAnswer as exc:
        raise IommufdError(
            f"{what} could not be looked at within {_PATIENCE} seconds. Is it on a mount whose server does not answer?"
        ) from exc


class DomainTarget(NamedTuple):
    """The emulator of a running domain of the system libvirt, by what cannot be renamed or rewritten: see _running."""

    name: str

    def __str__(self) -> str:
        return f"Domain {self.name}"

    def _record(self) -> DomainRecord:
        """What libvirt has recorded of it. Raises IommufdError."""
        # Most tasks name no domain, and to import this costs each of them.
        from ._running import read_domain_record

        return read_domain_record(self.name)

    def resolve(self) -> int:
        """The id in libvirt's record. Raises IommufdError where there is no such domain, or it is shut off."""
        try:
            return self._record().pid
        except IommufdError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                raise IommufdError(
                    f"No domain {self.name} is running under the system libvirt, which has no record of it. It is shut"
                    " off, or not defined, or belongs to a user's session (`virsh list --all` tells; for a session give"
                    " pid or pidfile)."
                ) from exc
            raise

    def check(self, process: Process) -> None:
        """Raises IommufdError where the process is not the emulator that libvirt started for the domain."""
        record = self._record()
        unit = process.units()[0]
        against = record.contradiction(self.name, process.pid, process.uid, process.started(), unit)
        if against:
            raise IommufdError(f"{process} is not the emulator of domain {self.name}: {against}")


class UnitTarget(NamedTuple):
    """The main process of a systemd unit of the system. `run` is as _systemd has it."""

    name: str
    run: Run

    def __str__(self) -> str:
        return f"Unit {self.name}"

    def resolve(self) -> int:
        """The main process's id. Raises IommufdError where systemd knows none."""
        # Nor do they name a unit.
        from ._systemd import is_unit_name, show_units

        name = self.name
        if not is_unit_name(name):
            raise IommufdError(f"{name!r} is not the name of a systemd unit.")
        if re.search(r"@(\.\w+)?$", name):
            raise IommufdError(f"{self} is a template and has no process: name an instance, such as vm@1.service.")
        shown = show_units(self.run, [name], ("LoadState", "ActiveState", "SubState", "MainPID"))[0]
        if shown.get("LoadState") == "not-found":
            raise IommufdError(
                f"systemd knows no unit {name}: `systemctl list-units --all` tells those that there are."
            )
        state = f"{shown.get('ActiveState')} ({shown.get('SubState')})"
        main_pid = shown.get("MainPID", "")
        if not re.fullmatch(r"[0-9]{1,10}", main_pid):
            raise IommufdError(f"{self} is of a kind that has no main process; it is {state}. Name a service.")
        if main_pid == "0":
            raise IommufdError(f"{self} has no main process now: it is {state}.")
        return int(main_pid)

    def check(self, process: Process) -> None:
        """Systemd answers for it."""


def escaped(text: str) -> str:
    """A text as it stands in XML. libvirt writes a domain's name so into the name of its pidfile (seen with 12.8)."""
    return text.translate(_ENTITIES)


class Target(Protocol):
    """What names a process: those here, and those of _pidfile and _domain_start."""

    def resolve(self) -> int:
        """The process's id, as it is now. Raises IommufdError where there is none."""

    def check(self, process: Process) -> None:
        """Raises IommufdError where that process, which has the id, is not the one that is named."""


@contextlib.contextmanager
def hold_target(target: Target) -> Iterator[Process]:
    """Holds the process that the target names, while the context lasts.

    A process that ends between the answer and the pidfd leaves its id to another one. So the question is asked again
    once the pidfd is there: while that stands for a process that lives, its id means nobody else.
    Raises what Process.hold and the target's methods do, ProcessGone where the second answer differs from the first.
    """
    pid = target.resolve()
    with Process.hold(pid) as process:
        again = target.resolve()
        if again != pid:
            raise ProcessGone(f"{target} named process {pid}, and a moment later {again}. Run the task again.")
        target.check(process)
        # What check learned by the process's id was about this process only if it still lives.
        process.check_alive()
        yield process
