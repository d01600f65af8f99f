# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the RLIMIT_MEMLOCK of a process that runs, decided and set."""

from __future__ import annotations

import errno
import resource
from collections.abc import Sequence
from typing import NamedTuple

from ._capabilities import CAP_SYS_RESOURCE, capability_names
from ._errors import AccessRefused, IommufdError, ProcessGone, error_text
from ._process import Process
from ._process_facts import Limit, in_initial_namespace, own_status
from ._size import parse_size

__all__ = (
    "Asked",
    "check_settable",
    "is_less",
    "limit_after",
    "lost_at",
    "parse_limit",
    "set_memlock",
    "shown_limit",
)

_UNLIMITED = "unlimited"


class Asked(NamedTuple):
    """What a task asks for, as it was written: a size or "unlimited", soft and hard; None for a limit that stays."""

    soft: str | None
    hard: str | None


def parse_limit(name: str, text: str) -> int | None:
    """The bytes of a limit as people write it, None for unlimited. `name` is what gave it. Raises IommufdError."""
    if text.strip().lower() == _UNLIMITED:
        return None
    try:
        return parse_size(text)
    except IommufdError as exc:
        raise IommufdError(f"{name}: {str(exc)[:-1]}, or {_UNLIMITED}.") from exc


def is_less(one: int | None, other: int | None) -> bool:
    """Whether one limit, None for unlimited, is less than another."""
    return one is not None and (other is None or one < other)


def shown_limit(limit: int | None) -> str:
    """A limit as a person reads it."""
    return _UNLIMITED if limit is None else f"{limit} bytes"


def limit_after(now: Limit, asked: Asked) -> Limit:
    """What the limit is to be. The hard one is raised where the soft one would be more. Raises IommufdError."""
    soft = now.soft if asked.soft is None else parse_limit("value", asked.soft)
    if asked.hard is None:
        return Limit(soft, soft if is_less(now.hard, soft) else now.hard)
    hard = parse_limit("hard", asked.hard)
    if is_less(hard, soft):
        which = "value" if asked.soft is not None else "the soft limit, which stays without value"
        raise IommufdError(f"hard, {shown_limit(hard)}, is less than {which}, {shown_limit(soft)}.")
    return Limit(soft, hard)


def check_settable(process: Process, now: Limit, after: Limit) -> None:
    """Raises AccessRefused where this caller may not make the limit of a process so, as far as that shows beforehand.

    See do_prlimit() and check_prlimit_permission() in kernel/sys.c.
    """
    if is_less(now.hard, after.hard):
        able = CAP_SYS_RESOURCE in capability_names(own_status().effective)
        if not able or in_initial_namespace("user") is False:
            raise _refused(process, errno.EPERM)
    try:
        resource.prlimit(process.pid, resource.RLIMIT_MEMLOCK)
    except OSError as exc:
        raise _error(process, exc) from exc
    process.check_alive()


def set_memlock(process: Process, after: Limit) -> None:
    """Makes the limit of a process so. Raises AccessRefused, ProcessGone, or IommufdError for what is neither.

    The system call takes the id of a process. That is its own while it lives, so it is asked before and after.
    """
    process.check_alive()
    try:
        before = resource.prlimit(process.pid, resource.RLIMIT_MEMLOCK, (_number(after.soft), _number(after.hard)))
    except OSError as exc:
        raise _error(process, exc) from exc
    try:
        process.check_alive()
    except ProcessGone:
        # Should the id be another one's by now, that one gets back what it had.
        try:
            resource.prlimit(process.pid, resource.RLIMIT_MEMLOCK, before)
        except OSError as exc:
            raise ProcessGone(f"{process} has ended, and its id with it ({error_text(exc.errno)}).") from exc
        raise


def _number(limit: int | None) -> int:
    return resource.RLIM_INFINITY if limit is None else limit


def _error(process: Process, exc: OSError) -> IommufdError:
    if exc.errno == errno.EPERM:
        return _refused(process, exc.errno)
    if exc.errno == errno.ESRCH:
        return ProcessGone(f"{process} has ended.")
    return IommufdError(f"The limit of {process} could not be set ({error_text(exc.errno)}).")


def _refused(process: Process, number: int) -> AccessRefused:
    return AccessRefused(
        f"This caller may not set the limit of {process} ({error_text(number)}). That takes root with CAP_SYS_RESOURCE"
        " (become: true), in the initial user namespace where the hard limit is raised, and an LSM such as SELinux may"
        " forbid it. Run the task on the host itself, outside of any container."
    )


def lost_at(units: Sequence[str | None], is_domain: bool) -> str:
    """When the limit of a process is lost, and what gives the next one its own, by its units as read_units has them."""
    unit, user_unit = units
    if is_domain or (unit and unit.startswith("machine-qemu") and unit.endswith(".scope")):
        how = (
            "libvirt gives the limit at each start: <memtune><hard_limit> in the domain's XML says how much, and limits"
            " all memory of the VM and its emulator to that, too"
        )
    elif user_unit:
        how = f"LimitMEMLOCK= in a drop-in of {user_unit} gives it at the next start, within that of {unit}"
    elif unit and unit.endswith(".service"):
        how = f"LimitMEMLOCK= in a drop-in of {unit} gives it at the next start"
    else:
        how = "whatever starts it gives the limit, in a login session /etc/security/limits.conf"
    return f"The limit ends with the process. For the next one, {how}."
