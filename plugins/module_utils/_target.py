# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the process that a task names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ._errors import ProcessGone
from ._process import Process

__all__ = (
    "PidTarget",
    "Target",
    "hold_target",
)


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


class Target(Protocol):
    """What names a process: that here, and those of _named_target, _pidfile and _domain_start."""

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
