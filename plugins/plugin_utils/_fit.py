# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: from what iommufd_info returned, whether a VM would fit.

The functions are pure, and raise IommufdError with the text that a user reads. _fit_input checks what is given, and
_fit_xml reads a domain's XML. _fit_host tells what the host makes of the VM. _fit_case has the model judge it, and
_fit_running one that runs already. _fit_words and _fit_remedy tell people of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..module_utils._accounting import IOMMUFD, MM_LOCKED, MM_PINNED, PROCESS, UNLIMITED, USER, VDPA, Span, demand
from ..module_utils._errors import IommufdError
from ..module_utils._foreign import harmless
from ._fit_case import Case, kernels, may_charge_user, new_vm
from ._fit_input import NONE, asked_of, checked
from ._fit_remedy import remedy_of
from ._fit_running import Beside, held_to_their_users, over_limit_then, running_vm
from ._fit_words import question_of, reason_of

__all__ = ("BROKEN", "answer_of", "beside", "memlock_fit")

# After the checks, only a return value that was put together by hand, or by another version.
BROKEN = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)


def charged_to(case: Case) -> str | None:
    """Who is charged: the user, the process, or nobody, where no check is left; None where several are possible."""
    vm = case.steps[0]
    devices = [each for step in case.steps for each in step.devices]
    if vm.capable is None and devices:
        return None
    if vm.capable and not any(each.backend == VDPA for each in devices):
        return NONE
    # A legacy container and vDPA charge the process.
    iommufds = set() if vm.capable else {each.mode for each in devices if each.backend == IOMMUFD}
    modes = iommufds or {PROCESS for _each in devices}
    return next(iter(modes)) if len(modes) == 1 else None


def numbers(case: Case) -> dict[str, int | None]:
    """What is charged, needed and allowed, by the counter that decides."""
    counter = case.told.counter
    held = {name: getattr(case.steps[0], f"held_{name}") for name in (USER, MM_LOCKED, MM_PINNED)}
    needed = max(_needed(case, name) for name in ([counter] if counter else held))
    charged = held[counter].least if counter else held[USER].least if may_charge_user(case) else 0
    span = case.limit.span
    limit = span.least if span.least == span.most and span.least < UNLIMITED else None
    checked_ = case.told.held is not None
    return {
        "charged": charged,
        "needed": needed if needed < UNLIMITED else None,
        "limit": limit,
        "headroom": limit - charged if limit is not None and checked_ else None,
    }


def _needed(case: Case, counter: str) -> int:
    """What all that becomes of the VM adds to a counter, at most, beyond what that holds at first."""
    held: list[Span] = [getattr(vm, f"held_{counter}") for vm in case.steps]
    known = [span.least if span.most >= UNLIMITED else span.most for span in held]
    adds = [max(demand(vm, kernel)[counter].most for kernel in kernels(case.info)) for vm in case.steps]
    return max(before - known[0] + more for before, more in zip(known, adds))


def answer(info: Any, **parameters: Any) -> dict[str, Any]:
    """What the filter returns."""
    info, asked = checked(info), asked_of(**parameters)
    case = new_vm(info, asked) if asked.grow is None else running_vm(info, asked, asked.grow)
    return answer_of(beside(case, held_to_their_users(info)))


def beside(case: Case, running: Mapping[int | None, list[Beside]], pid: int | None = None) -> Case:
    """The VM with what others need that run beside it, by their user. `pid`: of the VM that is started anew."""
    others = over_limit_then(case, running.get(case.owner.uid, []), pid)
    return case._replace(needs=[*case.needs, *others]) if others else case


def answer_of(case: Case) -> dict[str, Any]:
    """What is told of a VM."""
    return {
        "fits": False if case.refused else case.told.fits,
        "counter": None if case.refused else case.told.counter,
        "accounting": charged_to(case),
        **numbers(case),
        "reason": reason_of(case),
        "remedy": remedy_of(case),
        "prerequisites": case.needs,
        "question": question_of(case),
    }


def memlock_fit(
    info: Any,
    memory: Any = None,
    user: Any = None,
    memlock: Any = "libvirt",
    vfio_devices: Any = 1,
    viommu: Any = None,
    accounting: Any = "auto",
    overhead: Any = None,
    locked: Any = None,
    devices: Any = None,
    domain_xml: Any = None,
    grow: Any = None,
    live_update: Any = False,
    cap_ipc_lock: Any = None,
) -> dict[str, Any]:
    """The answer, as the filter of that name returns it. Raises IommufdError where it is not given what it takes."""
    parameters = {name: value for name, value in locals().items() if name != "info"}
    try:
        # The module gives printable texts. A host that is not to be trusted gives what it likes.
        return dict(harmless(answer(info, **parameters)))
    except BROKEN as exc:
        raise IommufdError(
            "The input is not what this version of virt.iommufd.iommufd_info returns: give what the task"
            f" registered. {type(exc).__name__}: {exc}"
        ) from exc
