# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: of all VMs that are defined on a host, which would start. Pure functions.

Each is judged as memlock_fit would judge it. What is reckoned here is what the others of its user have charged by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from ..module_utils._accounting import NOTHING, UNLIMITED, USER, Span, demand
from ..module_utils._errors import IommufdError
from ..module_utils._foreign import first_of, harmless
from ._fit import BROKEN, answer_of, beside
from ._fit_case import Case, kernels, may_charge_user, new_vm, user_of
from ._fit_defined import Definition, definitions, moved, told_of
from ._fit_host import OTHER, SYSTEM, knows_iommufd, own_charge
from ._fit_input import Asked, Info, Owner, asked_of, checked
from ._fit_running import held_to_their_users, running_vm
from ._order import at_least_fail, at_most_fail, before_each

__all__ = ("KINDS", "memlock_forecast")

Row = dict[str, Any]
NOW = "now"
REBOOT = "reboot"
MOVED = "moved"
GROWN = "grown"
LIVE_UPDATE = "live_update"
KINDS = (NOW, REBOOT, MOVED, GROWN, LIVE_UPDATE)

# What is long and not read here, of the host.
_NOT_READ = ("iommu_groups", "iommus")

# Which VMs are certain to start tells of others. Whenever this ends, what was found is so.
_ROUNDS = 8
# Beyond anything that adds up to a number of bytes, so that it can be taken off a sum again.
_ANYTHING = 2**80

# What is told of each kind: of how many, and what they would not do.
_WORDS = {
    NOW: "would not start now",
    REBOOT: "would not come back after a reboot",
    MOVED: "would not start once all are had by iommufd",
    GROWN: "could not grow by that",
    LIVE_UPDATE: "would not survive a live update",
}
_NONE = {
    NOW: "No VM is defined",
    REBOOT: "No VM starts at boot",
    MOVED: "No VM runs or starts at boot",
    GROWN: "No VM runs",
    LIVE_UPDATE: "No VM runs",
}

_OF_THIS_BOOT = (
    "What only this boot has is not known: see that its devices and the module iommufd are there after a reboot, too"
    " (/etc/modules-load.d, driverctl)."
)
_BY_DAEMON = (
    "libvirt starts it once its daemon runs: see that {} itself starts at boot (systemctl is-enabled), and not its"
    " socket alone, which waits until somebody asks."
)
_BY_LEGACY = (
    "This host's libvirt is not known to know iommufd='yes' in a <driver>. One that does not has the devices by the"
    " legacy container as before: have libvirt 12.1 or later, or name the iommufd in <qemu:commandline>."
)


class _Vm(NamedTuple):
    """A VM of those that are reckoned together. `case` is None, with a `reason`, where nothing can be said of it.

    `charges`: what it adds to its user's sum once it runs. `comes`: whether it is certain to be started.
    """

    its: Definition
    asked: Asked | None
    case: Case | None
    reason: str
    charges: Span
    comes: bool

    @property
    def uid(self) -> int | None:
        """Its user. One that is not known may be any."""
        return None if self.case is None else self.case.owner.uid


def memlock_forecast(
    info: Any, move_to: Any = None, grow: Any = None, live_update: Any = False, known: Any = None
) -> Row:
    """The answer, as the filter of that name returns it. Raises IommufdError where it is not given what it takes."""
    try:
        # The module gives printable texts. A host that is not to be trusted gives what it likes.
        return dict(harmless(_forecast(_copied(checked(info)), move_to, grow, live_update, known)))
    except BROKEN as exc:
        raise IommufdError(
            "The input is not what this version of virt.iommufd.iommufd_info returns: give what the task"
            f" registered. {type(exc).__name__}: {exc}"
        ) from exc


def _copied(value: Any) -> Any:
    """A copy in dictionaries and lists of Python's own. Those of Ansible template a value whenever it is read."""
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items() if name not in _NOT_READ}
    return [_copied(each) for each in value] if isinstance(value, (list, tuple)) else value


def _forecast(info: Info, move_to: Any, grow: Any, live_update: Any, known: Any) -> Row:
    if move_to not in (None, "iommufd"):
        raise IommufdError(f"move_to: {move_to!r:.60} is unknown: give iommufd.")
    growth = _grows(grow)
    update = _asked_of(grow={"vm": ""}, live_update=live_update)
    its = _with_known(definitions(info), {} if known is None else known)
    info = _with_names(info, its)
    host = _Host(info)
    answers: dict[str, list[Row | None] | None] = dict.fromkeys(KINDS)
    counts: dict[str, Row | None] = dict.fromkeys(KINDS)
    answers[NOW] = now = _now(host, its)
    counts[NOW] = _counted(NOW, now)
    at_boot = [each.autostart is not False for each in its]
    answers[REBOOT], counts[REBOOT] = _together(REBOOT, _rebooted(host), list(map(_at_boot, its)), at_boot)
    if move_to is not None:
        there = [each.pid is not None or boots for each, boots in zip(its, at_boot)]
        answers[MOVED], counts[MOVED] = _together(MOVED, host, its, there)
    for kind, asked in ((GROWN, growth), (LIVE_UPDATE, update if update.live_update else None)):
        if asked is not None:
            answers[kind] = found = _running(host, its, asked)
            counts[kind] = _counted(kind, found)
    unseen = any(each["what"] in ("processes", "defined") for each in info["host"]["limits_of_view"])
    vms = [
        {
            "vm": each.name,
            "kind": each.kind,
            "manager": each.manager,
            "user": _user(info, each),
            "running": True if each.pid is not None else None if unseen or each.unread else False,
            "autostart": each.autostart,
            **{kind: found[index] if found else None for kind, found in answers.items()},
        }
        for index, each in enumerate(its)
    ]
    return {"vms": vms, **counts}


def _with_known(its: list[Definition], known: Any) -> list[Definition]:
    """The VMs with what the task tells of some of them."""
    if not isinstance(known, Mapping):
        raise IommufdError(f"known: {known!r:.60} is no dictionary: give what is known of a VM by its name.")
    names = [each.name for each in its]
    for name in known:
        if names.count(name) != 1:
            raise IommufdError(f"known: {names.count(name)} VMs are defined as {name!r:.60}: give the name of one.")
    return [_told_of(each, known[each.name]) if each.name in known else each for each in its]


def _told_of(its: Definition, given: Any) -> Definition:
    try:
        return told_of(its, given)
    except IommufdError as exc:
        raise IommufdError(f"known: {its.name}: {exc}") from exc


def _at_boot(its: Definition) -> Definition:
    """The same after a reboot, with what is not known of it then."""
    # One that is another one by then may have another user.
    asked = its.asked._replace(user=None) if its.changed and its.asked else its.asked
    return its._replace(unread=(*its.unread, *its.unread_at_boot), asked=asked)


def _asked_of(**given: Any) -> Asked:
    """What memlock_fit is asked of a VM that runs."""
    names = ("memory", "user", "viommu", "overhead", "locked", "devices", "domain_xml", "cap_ipc_lock")
    fixed: Row = {"memlock": "libvirt", "vfio_devices": 1, "accounting": "auto", "live_update": False}
    return asked_of(**{**dict.fromkeys(names), **fixed, **given})


def _grows(grow: Any) -> Asked | None:
    """What each VM that runs is to get."""
    if grow is None:
        return None
    if not isinstance(grow, Mapping) or not grow or not grow.keys() <= {"memory", "devices"}:
        raise IommufdError(f"grow: {grow!r:.60} is nothing to get: give memory or devices or both.")
    asked = _asked_of(grow={**grow, "vm": ""})
    if asked.grow is None or not (asked.grow.memory or asked.grow.devices):
        raise IommufdError("grow: what is each VM to get? Give memory or devices.")
    return asked


def _with_names(info: Info, its: Iterable[Definition]) -> Info:
    """The input, which knows the users of definitions, too."""
    narrowed = info["narrowed"]
    names = {(each.uid, each.user) for each in its if each.uid is not None and each.user is not None}
    users = [*(narrowed.get("users") or ()), *({"uid": uid, "user": name} for uid, name in sorted(names))]
    return {**info, "narrowed": {**narrowed, "users": users}}


def _user(info: Info, definition: Definition) -> str | None:
    """Who it is to run as, as far as that is known."""
    libvirt = info["host"].get("libvirt") or {}
    given = definition.user if definition.user is not None else definition.uid
    by_libvirt = definition.kind == "domain" and definition.manager == "system" and given is None
    given = (libvirt.get("user") or libvirt.get("uid")) if by_libvirt and not definition.unread else given
    return None if given is None else str(given)


class _Host:
    """A host, which judges VMs. Those that are alike are judged once."""

    def __init__(self, info: Info) -> None:
        self.info = info
        self.rows = {row["pid"]: row for row in info["processes"]}
        unseen = {each["what"] for each in info["host"]["limits_of_view"]}
        # Who holds nothing of what pins is not in there.
        self.all_seen = info["narrowed"]["pids"] is None and not unseen & {"processes", "descriptors"}
        self.held = held_to_their_users(info)
        self.judge = lru_cache(maxsize=None)(self._judge)
        self._owners: dict[Any, Owner] = {}

    def _judge(self, asked: Asked, owner: Owner) -> Case:
        """A VM with so much charged to its user by others."""
        return new_vm(self.info, asked, owner)

    def case(self, asked: Asked | None, charged: Callable[[Owner], Owner]) -> tuple[Case | None, str]:
        """The VM judged with what is charged to its user then; or why it cannot be."""
        if asked is None:
            return None, ""
        try:
            user = (asked.user, asked.starter)
            self._owners[user] = self._owners.get(user) or user_of(self.info, asked)
            return self.judge(asked, charged(self._owners[user])), ""
        except IommufdError as exc:
            return None, str(exc)

    def strays(self, its: Iterable[Definition]) -> dict[int | None, list[Row]]:
        """By user, the processes that are charged to it, and that are in no definition. They may be started at boot."""
        defined = {each.pid for each in its}
        found: dict[int | None, list[Row]] = {}
        for pid, row in self.rows.items():
            if pid not in defined and _at_most_charged(row):
                found.setdefault(row["uid"], []).append(row)
        return found

    def without(self, owner: Owner, pid: int | None) -> Owner:
        """The user without what is charged to it for a process."""
        row = None if pid is None else self.rows.get(pid)
        if row is None:
            if pid is None or self.all_seen:
                return owner
            # It may be in the sum, and nobody knows with how much.
            return owner._replace(charged=0, unsure=owner.charged + owner.unsure, partly=True)
        if row["uid"] != owner.uid:
            return owner
        charged, unsure = own_charge(row)
        return owner._replace(charged=max(owner.charged - charged, 0), unsure=max(owner.unsure - unsure, 0))


def _rebooted(host: _Host) -> _Host:
    """The host with a libvirt whose daemon has started anew."""
    libvirt = host.info["host"].get("libvirt") or {}
    then = libvirt.get("at_boot")
    # Why it is so is told in other words.
    if not then or all(libvirt[name] == then[name] for name in then if name != "reason"):
        return host
    return _Host({**host.info, "host": {**host.info["host"], "libvirt": {**libvirt, **then}}})


def _at_most_charged(row: Mapping[str, Any]) -> int:
    """What its user is charged for a process, at most."""
    return sum(own_charge(row))


def _of_strays(user: str | None, rows: list[Row]) -> str:
    """What is to be asked about processes that run, and that nothing is known to start."""
    names = ", ".join(f"{row['name']} ({row['pid']})" for row in rows[:3]) + (", ..." if rows[3:] else "")
    return f"Does {names} of user {user} start at boot, too? It runs, and is in no definition that was read."


def _told(case: Case | None, its: Definition, reason: str = "") -> Row:
    """What is told of a VM in one kind."""
    if case is None:
        return _unknown(reason or first_of(its.unread), f"What is its definition? {reason}".strip())
    answer = answer_of(case)
    told = {
        "starts": _starts(case, its),
        "reason": answer["reason"],
        "remedy": answer["remedy"],
        "question": answer["question"],
        "counter": answer["counter"],
        "accounting": answer["accounting"],
        "charged_bytes": answer["charged"],
        "needed_bytes": answer["needed"],
        "limit_bytes": answer["limit"],
        "limit_unlimited": case.limit.span.least >= UNLIMITED,
        "prerequisites": answer["prerequisites"],
    }
    if its.unread and told["starts"] is None and case.running is None:
        # Without a device that is known, there is nothing to be said of what it pins.
        known = answer["reason"] if case.steps[0].devices else ""
        told.update(
            reason=f"Not all of its definition was understood: {first_of(its.unread)} {known}".strip(),
            question=_question(its),
        )
    return told


def _question(its: Definition) -> str:
    """What is to be asked of what was not read."""
    if its.unread[0] in its.unread_at_boot:
        return f"What will count after a reboot? {its.unread[0]}"
    return f"What does its definition say there? {its.unread[0]} Give it in known, as memlock_fit takes it."


def _unknown(reason: str, question: str) -> Row:
    """What is told of a VM of which nothing can be said."""
    nothing = dict.fromkeys(("remedy", "counter", "accounting", "charged_bytes", "needed_bytes", "limit_bytes"))
    return {
        "starts": None,
        "reason": reason,
        **nothing,
        "question": question,
        "limit_unlimited": False,
        "prerequisites": [],
    }


def _starts(case: Case | None, its: Definition) -> bool | None:
    """Whether it would. What was not understood may be anything, which helps nothing where a libvirt refuses it."""
    if case is None:
        return None
    if its.unread and case.running is None:
        return False if case.refused not in ("", case.clash.ends) else None
    return False if case.refused else case.told.fits


def _now(host: _Host, its: list[Definition]) -> list[Row | None]:
    """Whether each would start, beside those that run; of one that runs, whether it would start again."""
    cases = ((each, *host.case(each.asked, partial(host.without, pid=each.pid))) for each in its)
    return [_told(case and beside(case, host.held, each.pid), each, reason) for each, case, reason in cases]


def _running(host: _Host, its: list[Definition], asked: Asked) -> list[Row | None]:
    """What becomes of each that runs, as it gets something or is taken over."""
    found: list[Row | None] = []
    for each in its:
        row = None if each.pid is None else host.rows.get(each.pid)
        if each.pid is None or asked.grow is None:
            found.append(None)
        elif row is None:
            reason = f"Its process {each.pid} is not among those that pin memory for devices."
            found.append(_unknown(reason, "What has its process pinned? Run virt.iommufd.iommufd_info as root."))
        else:
            try:
                case = running_vm(host.info, asked, asked.grow, row)
                found.append(_told(beside(case, host.held), each))
            except IommufdError as exc:
                found.append(_unknown(str(exc), "What would tell? See the reason."))
    return found


def _together(kind: str, host: _Host, its: list[Definition], chosen: list[bool]) -> tuple[list[Row | None], Row]:
    """Which of those that are chosen would start, all of them, and what that comes to."""
    pids = {each.pid for each, is_ in zip(its, chosen) if is_ and each.pid is not None}

    def others(owner: Owner) -> Owner:
        """The user without what is charged for any of them."""
        if kind == REBOOT:
            unsure = sum(_at_most_charged(row) for row in strays.get(owner.uid, ()))
            return owner._replace(charged=0, unsure=unsure, hidden=owner.name is None, partly=False, left_behind=False)
        for pid in sorted(pids):
            owner = host.without(owner, pid)
        return owner

    others = lru_cache(maxsize=None)(others)
    strays = host.strays(its)
    there = [each for each, is_ in zip(its, chosen) if is_]
    vms = [_alone(host, each, kind, others) for each in there]
    order = before_each([(each.its.name, each.its.after if kind == REBOOT else ()) for each in vms])
    cases, outcomes = _settle(vms, order, host)
    told = [_told(case, vm.its, vm.reason) for vm, case in zip(vms, cases)]
    for each, vm, case in zip(told, vms, cases):
        if case is not None and _by_others(vm, case):
            each["question"] = f"Which VMs of user {case.owner.name} start first? That is not known."
            each["reason"] += " It depends on which of them start first."
        elif kind == REBOOT and case is not None and case.told.question == "held_user" and case.owner.uid in strays:
            each["question"] = _of_strays(case.owner.name, strays[case.owner.uid])
        if case is not None:
            each["prerequisites"] = [*each["prerequisites"], *_needs_too(kind, vm, case)]
    summary = _counted(kind, told, *_failing(vms, outcomes))
    by_index = iter(told)
    return [next(by_index) if is_ else None for is_ in chosen], summary


def _needs_too(kind: str, vm: _Vm, case: Case) -> list[str]:
    """What a VM must have beside what one must that starts now."""
    if kind == REBOOT:
        daemon = (case.info["host"].get("libvirt") or {}).get("unit") or "libvirtd.service"
        by_daemon = [_BY_DAEMON.format(daemon)] if (vm.its.kind, vm.its.manager) == ("domain", SYSTEM) else []
        return [*by_daemon, *([_OF_THIS_BOOT] if case.steps[0].devices else [])]
    by_libvirt = vm.asked is not None and vm.asked.starter != OTHER and vm.asked != vm.its.asked
    return [_BY_LEGACY] if by_libvirt and knows_iommufd(case.info) is not True else []


def _alone(host: _Host, its: Definition, kind: str, others: Callable[[Owner], Owner]) -> _Vm:
    """A VM by itself, with what it would charge to its user."""
    asked = moved(its.asked) if kind == MOVED and its.asked is not None else its.asked
    case, reason = host.case(asked, others)
    charges = Span(0, _ANYTHING) if case is None or its.unread else _charges(case)
    # A user's own libvirt starts its domains once somebody starts that.
    comes = (its.autostart is True and its.manager == SYSTEM) or (kind == MOVED and its.pid is not None)
    return _Vm(its, asked, case, reason, charges, comes)


def _charges(case: Case) -> Span:
    """What a VM adds to the sum of its user, if it starts."""
    if case.refused or not may_charge_user(case):
        return NOTHING
    spans = [demand(case.steps[0], kernel)[USER] for kernel in kernels(case.info)]
    most = max(each.most for each in spans)
    return Span(min(each.least for each in spans), most if most < UNLIMITED else _ANYTHING)


def _settle(
    vms: list[_Vm], order: list[tuple[set[int], set[int]]], host: _Host
) -> tuple[list[Case | None], list[bool | None]]:
    """Each judged with what the others have charged at least and at most by the time that it starts.

    `order`: which are certain to come before each, if they come, and which after it. One that is certain to fail
    charges nobody. One that is certain to come and to start has charged its user when the next one starts.
    """
    cases: list[Case | None] = [each.case for each in vms]
    outcomes = [_starts(case, vm.its) for vm, case in zip(vms, cases)]
    for _round in range(_ROUNDS):
        at_most: dict[int | None, int] = {}
        for vm, starts in zip(vms, outcomes):
            if starts is not False:
                at_most[vm.uid] = at_most.get(vm.uid, 0) + vm.charges.most
        all_of_them = sum(at_most.values())
        before = list(outcomes)
        for index, vm in enumerate(vms):
            if vm.case is None or vm.asked is None or vm.case.refused or not may_charge_user(vm.case):
                continue
            earlier, later = order[index]
            most = all_of_them if vm.uid is None else at_most.get(vm.uid, 0) + at_most.get(None, 0)
            most -= sum(
                vms[each].charges.most
                for each in {index, *later}
                if before[each] is not False and (vm.uid is None or vms[each].uid in (vm.uid, None))
            )
            least = sum(
                vms[each].charges.least
                for each in earlier
                if before[each] and vms[each].comes and vm.uid is not None and vms[each].uid == vm.uid
            )
            case = host.judge(vm.asked, _beside(vm.case.owner, Span(least, most)))
            cases[index], outcomes[index] = case, _starts(case, vm.its)
        if outcomes == before:
            break
    return cases, outcomes


def _beside(owner: Owner, others: Span) -> Owner:
    """A user, to whom others have charged so much."""
    hidden = owner.hidden or others.most >= UNLIMITED
    unsure = 0 if others.most >= UNLIMITED else others.most - others.least
    return owner._replace(charged=owner.charged + others.least, unsure=owner.unsure + unsure, hidden=hidden)


def _by_others(vm: _Vm, case: Case) -> bool:
    """Whether it depends on the others alone whether it starts."""
    return _starts(vm.case, vm.its) is True and _starts(case, vm.its) is None


def _failing(vms: list[_Vm], outcomes: list[bool | None]) -> tuple[int, int]:
    """How many would not start, at least and at most, where it is not known which."""
    least = most = outcomes.count(False)
    by_user: dict[int | None, list[int]] = {}
    for index, vm in enumerate(vms):
        if outcomes[index] is not False:
            by_user.setdefault(vm.uid, []).append(index)
    for uid, group in by_user.items():
        open_ = [index for index in group if outcomes[index] is None]
        if not open_:
            continue
        sure = [index for index in group if vms[index].comes and uid is not None and not vms[index].its.unread]
        least += at_least_fail([_job(vms[index], best=True) for index in sure])
        # libvirt starts one after the other; units start side by side, and may then all fail.
        one_by_one = all(vms[index].its.kind == "domain" for index in group)
        known = len(sure) == len(group) and one_by_one and uid is not None
        known = known and all(_starts(vms[index].case, vms[index].its) is True for index in group)
        bound = at_most_fail([_job(vms[index], best=False) for index in group]) if known else len(open_)
        most += min(len(open_), bound)
    return least, max(least, most)


def _job(vm: _Vm, best: bool) -> tuple[int, int]:
    """What a VM charges to its user, and what may be charged to that in all as it starts."""
    case = vm.case
    if case is None:
        return 0, _ANYTHING
    owner, limit = case.owner, case.steps[0].limit
    charges = vm.charges.least if best else vm.charges.most
    # One that charges nobody is not held back by others.
    if not charges:
        return 0, _ANYTHING
    if best:
        return charges, (limit.most if limit.most < UNLIMITED else _ANYTHING) - owner.charged
    return charges, (limit.least if limit.least < UNLIMITED else _ANYTHING) - owner.charged - owner.unsure


def _counted(kind: str, answers: Sequence[Row | None], least: int | None = None, most: int | None = None) -> Row:
    """What the answers of one kind come to. `least` and `most`: how many would not start, where that is told apart."""
    found = [each["starts"] for each in answers if each is not None]
    least = found.count(False) if least is None else least
    most = found.count(False) + found.count(None) if most is None else most
    return {
        "of": len(found),
        "true": found.count(True),
        "false": found.count(False),
        "unknown": found.count(None),
        "at_least": least,
        "at_most": most,
        "summary": _summary(kind, len(found), found.count(False), least, most),
    }


def _summary(kind: str, of: int, certain: int, least: int, most: int) -> str:
    if not of:
        return _NONE[kind]
    how_many = str(least) if least == most else f"{least} to {most}"
    order = "; which depends on the order" if certain < least else ""
    return f"{how_many} of {of} VM{'' if of == 1 else 's'} {_WORDS[kind]}{order}"
