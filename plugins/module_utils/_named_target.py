# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a process that a task names by its domain or its unit."""

from __future__ import annotations

import re
from typing import NamedTuple

from ._errors import IommufdError
from ._process import Process
from ._process_facts import read_units, started_at
from ._running import DomainRecord, read_domain_record
from ._systemd import Run, is_unit_name, show_units

__all__ = (
    "DomainTarget",
    "UnitTarget",
    "escaped",
)

# xml.sax.saxutils would do, but imports what speaks HTTP, which costs as much as all of this collection.
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"})


class DomainTarget(NamedTuple):
    """The emulator of a running domain of the system libvirt, by what cannot be renamed or rewritten: see _running."""

    name: str

    def __str__(self) -> str:
        return f"Domain {self.name}"

    def _record(self) -> DomainRecord:
        """What libvirt has recorded of it. Raises IommufdError."""
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
        unit = read_units(process)[0]
        against = record.contradiction(self.name, process.pid, process.uid, started_at(process.start_ticks), unit)
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
