# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a process that a task names by its domain or its unit."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import NamedTuple

from ._control_group import Sought, choose_among, find_members, find_process, group_texts, is_below
from ._errors import HostLacks, IommufdError
from ._names import owner_name, uid_of
from ._process import Process
from ._process_facts import parse_cgroup, read_units, started_at
from ._running import DomainRecord, read_domain_record
from ._systemd import Run, is_unit_name, show_units

__all__ = (
    "DomainTarget",
    "UnitTarget",
    "UserUnitTarget",
    "escaped",
)

# Where systemd is the first process: see sd_booted(3).
_SYSTEMD = "/run/systemd/system"
_PROPERTIES = ("Id", "LoadState", "ActiveState", "SubState", "MainPID", "ControlGroup")
_OTHER_KINDS = r"\.(slice|socket|target|timer|path|mount|automount|swap|device)$"
_KIND = "Name a service or a scope: a slice groups units, which may be many VMs, and other kinds start none."
_NO_MANAGER = (
    "That user's service manager runs no units: it is there while the user is logged in, or lingers (loginctl"
    " enable-linger)."
)
_TOLD_MAX = 10

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
    """A process of a systemd unit of the system. `run` is as _systemd has it.

    `sought` is what it holds, as _control_group has it; without it, the process is the main one whatever it holds.
    """

    name: str
    run: Run
    sought: Sought | None = None

    def __str__(self) -> str:
        return f"Unit {self.name}"

    def resolve(self) -> int:
        """The process's id. Raises IommufdError where there is none, or it cannot be told which is meant."""
        name = self.name
        _check_name(self, name)
        shown = show_units(self.run, [name], _PROPERTIES)[0]
        if shown.get("LoadState") == "not-found":
            raise IommufdError(
                f"systemd knows no unit {name}: `systemctl list-units --all` tells those that there are."
            )
        state = f"{shown.get('ActiveState')} ({shown.get('SubState')})"
        is_scope = shown.get("Id", name).endswith(".scope")
        main_pid = "0" if is_scope else shown.get("MainPID", "")
        if not re.fullmatch(r"[0-9]{1,10}", main_pid):
            raise IommufdError(f"{self} is of a kind that has no main process; it is {state}. {_KIND}")
        found: int | None = int(main_pid)
        group = os.fsencode(shown.get("ControlGroup", "")).rstrip(b"/")
        if self.sought is not None and group:
            found = find_process(str(self), int(main_pid), partial(is_below, group), self.sought)
        if not found:
            raise IommufdError(f"{self} has no {'' if is_scope else 'main '}process now: it is {state}.")
        return found

    def check(self, process: Process) -> None:
        """Systemd answers for it, or the kernel, which was asked again while the process was held."""


class UserUnitTarget(NamedTuple):
    """A process of a unit of a user's service manager, by the control groups alone.

    The manager is the user's, and so may say anything, or nothing for ever: it is not asked. Whoever is the user may
    also put any process into the unit that is below the manager, be it one of root's. So only the user's own count.
    """

    name: str
    user: str
    sought: Sought

    def __str__(self) -> str:
        return f"Unit {self.name} of user {self.user}"

    def resolve(self) -> int:
        """The process's id. Raises as that of UnitTarget does."""
        uid = uid_of(self.user)
        _check_name(self, self.name)
        if re.search(_OTHER_KINDS, self.name):
            raise IommufdError(f"{self} is of a kind that has no main process. {_KIND}")
        name = self.name if is_unit_name(self.name, "service", "scope") else f"{self.name}.service"
        unit = (f"user@{uid}.service", name)
        members = find_members(str(self), lambda text: parse_cgroup(text) == unit, self.sought)
        mine = [each for each in members if each.uid in (uid, None)]
        if mine:
            return choose_among(str(self), mine, self.sought)
        if members:
            whose = ", ".join(f"{each} is of {owner_name(each.uid or 0)}" for each in members[:_TOLD_MAX])
            raise IommufdError(
                f"{self} has no process of that user's: {whose}. Whoever is the user may have put it there. Give the"
                " one that is meant by pid."
            )
        found = {parse_cgroup(text) for _pid, text in group_texts()}
        names = sorted(each[1] for each in found if each[0] == unit[0] and each[1])
        raise IommufdError(
            f"{self} has no process now. "
            + (f"Of that user's units, these have some: {', '.join(names[:_TOLD_MAX])}." if names else _NO_MANAGER)
        )

    def check(self, process: Process) -> None:
        """The kernel answers for it, which was asked again while the process was held."""


def _check_name(target: object, name: str) -> None:
    """Raises IommufdError where a unit of that name can have no process here."""
    if not is_unit_name(name):
        raise IommufdError(f"{name!r} is not the name of a systemd unit.")
    if re.search(r"@(\.\w+)?$", name):
        raise IommufdError(f"{target} is a template and has no process: name an instance, such as vm@1.service.")
    if not os.path.isdir(_SYSTEMD):
        raise HostLacks(
            f"{target} cannot be looked up: this host does not run systemd, so it has no units ({_SYSTEMD} is missing)."
            " Give the process by pid or pidfile."
        )


def escaped(text: str) -> str:
    """A text as it stands in XML. libvirt writes a domain's name so into the name of its pidfile (seen with 12.8)."""
    return text.translate(_ENTITIES)
