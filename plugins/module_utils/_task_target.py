# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a module does at the process that a task names, by one of several options."""

from __future__ import annotations

from functools import partial
from typing import Callable

from ._child import NoAnswer, in_child
from ._errors import IommufdError
from ._module import Row
from ._process import Process
from ._target import PidTarget, Target, hold_target

__all__ = (
    "TARGETS",
    "TARGET_OPTIONS",
    "target_of",
    "work_at_target",
)

# The options of a module by which a task names a process, of which it gives one.
TARGETS = {
    "pid": {"type": "int"},
    "pidfile": {"type": "path"},
    "domain": {"type": "str"},
    "unit": {"type": "str"},
    "user_unit": {"type": "str"},
}
# These, and what goes with one of them: the user with the user's unit.
TARGET_OPTIONS = {**TARGETS, "user": {"type": "str"}}

# What the kernel answers in no time; a busy host gets so long.
_SECONDS = 60
# Of this, systemd may take its own time, and the look at a unit's processes, before the kernel is asked.
_UNIT_SECONDS = 120


def target_of(params: Row, limit: bool) -> Target:
    """The target that the task names, by the one of TARGETS that it gave. `limit` is as for work_at_target."""
    if params["pid"] is not None:
        return PidTarget(params["pid"])
    # What a query by pid does not need is imported by what needs it: each file costs each task on each host anew.
    if params["pidfile"] is not None:
        from ._pidfile import PidfileTarget

        return PidfileTarget(params["pidfile"])
    from ._command import run_command
    from ._control_group import IOMMUFD, PINNING
    from ._named_target import DomainTarget, UnitTarget, UserUnitTarget

    if params["domain"] is not None:
        return DomainTarget(params["domain"])
    sought = PINNING if limit else IOMMUFD
    if params["unit"] is not None:
        return UnitTarget(params["unit"], run_command, sought)
    return UserUnitTarget(params["user_unit"], params["user"], sought)


def work_at_target(params: Row, work: Callable[[Process], Row], result: Row, limit: bool = False) -> Row:
    """What the work on the process that a task names comes to. `process` in the result says which it was.

    `limit`: it is done at the process's own limit, and not at its iommufds, which others may have, too.

    A process may keep whoever looks at it, and may put something in the place of its iommufd that takes for ever to
    close. So all of it is done in a child. Raises IommufdError.
    """
    target = target_of(params, limit)
    seconds = _SECONDS if params["unit"] is None and params["user_unit"] is None else _UNIT_SECONDS
    try:
        answer: Row = in_child(None, partial(_attempt, target, work), seconds)
    except NoAnswer as exc:
        raise IommufdError(
            f"{target} keeps whoever looks at it waiting, for more than {seconds} seconds: it is stuck, as in executing"
            " a program while the server of a mount does not answer. It may have been set, or not: look again."
        ) from exc
    if "process" in answer:
        result["process"] = answer.pop("process")
    if "msg" in answer:
        raise IommufdError(answer["msg"])
    return answer


def _attempt(target: Target, work: Callable[[Process], Row]) -> Row:
    """What came of the work, for a child: `process`, once it is known, with what the work gave, or `msg`."""
    answer: Row = {}
    try:
        with hold_target(target) as process:
            answer["process"] = process.describe()
            answer.update(work(process))
    except IommufdError as exc:
        answer["msg"] = str(exc)
    return answer
