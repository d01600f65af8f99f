# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a host makes of a VM that is asked about. Pure functions.

That is who would start it, with which limit, how it would be accounted, and what keeps it from being started at all.
None is what iommufd_info did not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..module_utils._accounting import (
    IOMMUFD,
    LEGACY,
    PROCESS,
    UNKNOWN,
    UNLIMITED,
    USER,
    VDPA,
    Device,
    Span,
    exactly,
)
from ..module_utils._domain_xml import counted_limit
from ..module_utils._size import human_size
from ._fit_input import AUTO, NONE, Asked, Owner
from ._fit_xml import LIBVIRTS
from ._host_info import has_libvirt, own_emulators, qemu_for

__all__ = (
    "GIB",
    "OTHER",
    "SESSION",
    "SYSTEM",
    "Accounting",
    "Limit",
    "accounting_of",
    "by_definition",
    "by_hostdev",
    "candidates",
    "capability_of",
    "emulator",
    "has_contained",
    "is_root",
    "knows_iommufd",
    "limit_of",
    "own_charge",
    "prerequisites",
    "raised",
    "reckoning",
    "refusal",
    "session_of",
    "starter_of",
    "system_user",
)

Info = Mapping[str, Any]

# What libvirt adds to a domain's memory.
GIB = 2**30

# Who starts a VM: the system libvirt, a user's own, or something else, which libvirt has nothing to do with.
SYSTEM = "system"
SESSION = "session"
OTHER = "other"

# What is known of the capabilities that the emulators' files give.
SOME = "Some of the host's emulators have CAP_IPC_LOCK, or may have it, so the VM may too."
NOT_KNOWN = "It is not known whether the VM's emulator has CAP_IPC_LOCK."
WITHHELD = (
    "The host's emulators have CAP_IPC_LOCK, and whoever starts the VM may withhold that from it: by NoNewPrivileges=,"
    " its bounding set or a user namespace."
)

BY_ROOT = "What root starts has CAP_IPC_LOCK, unless it is taken away, which libvirt does."

UNSEEN_DEVICES = "that libvirt gives it, or has itself: it is not known whether it sees the VM's devices"

# What readiness tells of, by the backends that need it.
_FOR_IOMMUFD = ("module", "device", "cdev")
_FOR_VFIO = ("iommu", "vfio", "bound")


class Limit(NamedTuple):
    """The RLIMIT_MEMLOCK that the VM would have, and the same in words. `refused`: why libvirt would not give it."""

    span: Span
    words: str
    refused: str = ""


class Accounting(NamedTuple):
    """How the VM would be accounted: the mode of its iommufd and whether it has CAP_IPC_LOCK; and why."""

    mode: str | None
    capable: bool | None
    why: str


def _libvirt(info: Info) -> Mapping[str, Any]:
    return info["host"].get("libvirt") or {}


def system_user(info: Info) -> Any:
    """Who the system libvirt runs its VMs as, None where that is not known."""
    libvirt = _libvirt(info)
    return libvirt.get("user") if libvirt.get("user") is not None else libvirt.get("uid")


def starter_of(info: Info, asked: Asked, owner: Owner) -> str | None:
    """Who would start it: SYSTEM, SESSION or OTHER; None where that is not known."""
    if asked.starter is not None:
        return asked.starter
    libvirt = _libvirt(info)
    if asked.user is None:
        return SYSTEM
    if asked.domain is not None and asked.domain.user is not None and asked.user == asked.domain.user:
        return SYSTEM
    if owner.name == libvirt.get("user") or (owner.uid is not None and owner.uid == libvirt.get("uid")):
        return SYSTEM
    if asked.limit is not None and asked.domain is None:
        return OTHER
    return None if system_user(info) is None and has_libvirt(libvirt) else SESSION


def _may(libvirt: Mapping[str, Any]) -> bool:
    """Whether libvirt's daemon may use CAP_SYS_RESOURCE, as far as that is known."""
    may = libvirt.get("cap_sys_resource")
    return may is True or (may is None and libvirt.get("sets_rlimit_mode") is True)


def knows_iommufd(info: Info) -> bool | None:
    """Whether the system libvirt knows iommufd for a <hostdev>."""
    libvirt = _libvirt(info)
    supports: bool | None = libvirt.get("supports_iommufd")
    return True if supports is None and libvirt.get("sets_rlimit_mode") is True else supports


def by_hostdev(info: Info, asked: Asked) -> bool | None:
    """Whether it is libvirt that gives the VM an iommufd, and not QEMU, by <qemu:commandline>."""
    if asked.domain is not None:
        return any(each.holder == LIBVIRTS for each in asked.devices)
    if all(each.backend != IOMMUFD for each in asked.devices):
        return False
    return knows_iommufd(info)


def session_of(info: Info, owner: Owner) -> Mapping[str, Any] | None:
    """What is known of the user's own libvirt, by its daemon if that runs, else by the user's service manager."""
    rows = _libvirt(info).get("sessions") or ()
    return next((row for row in rows if row["uid"] == owner.uid or row["user"] == owner.name), None)


def reckoning(asked: Asked, memory: int, seen: bool | None) -> Span | None:
    """The limit that libvirt reckons for that memory; None where it sets none, since it sees no device.

    `seen`: whether it sees those that have an iommufd.
    """
    if asked.counted is None:
        return UNKNOWN
    counted = asked.counted
    if asked.domain is None and seen is not True:
        others = [each for each in asked.devices if each.backend != IOMMUFD]
        passed = any(each.backend == LEGACY and not each.holder.startswith("nvme ") for each in others)
        alone = sum(each.backend != LEGACY or each.holder.startswith("nvme ") for each in others) + passed
        counted = Span(alone, alone if seen is False else counted.most)
    if not counted.most:
        return None
    return Span(counted_limit(memory, counted.least), counted_limit(memory, counted.most))


def limit_of(info: Info, asked: Asked, owner: Owner, starter: str | None, memory: int) -> Limit:
    """The limit that the VM would have."""
    if starter == SESSION and asked.domain is not None and asked.domain.hard_limit is not None:
        why = "A session libvirt refuses <memtune>, so it would not start this domain: leave out its <hard_limit>."
        return Limit(UNKNOWN, "a limit that is not known", why)
    if asked.limit is not None:
        words = "no limit" if asked.limit == UNLIMITED else f"its limit of {human_size(asked.limit)}"
        return Limit(exactly(asked.limit), words)
    if starter == OTHER:
        return Limit(UNKNOWN, "a limit that is not known")
    reckoned = reckoning(asked, memory, by_hostdev(info, asked) if starter == SYSTEM else True)
    if asked.domain is not None and asked.domain.hard_limit is not None:
        reckoned = exactly(asked.domain.hard_limit)
    elif asked.libvirt_locks:
        reckoned = exactly(UNLIMITED)
    if starter == SYSTEM:
        return _system_limit(_libvirt(info), reckoned)
    if starter == SESSION:
        return _session_limit(session_of(info, owner), owner, reckoned)
    most = UNLIMITED if reckoned is None else reckoned.most
    return Limit(Span(0, most), "a limit that is not known, since it is not known who libvirt's VMs run as")


def raised(info: Info, asked: Asked, owner: Owner, starter: str | None, enough: int) -> Limit:
    """The limit that the VM would have, were it raised to so much where it gets that from."""
    if starter == SYSTEM:
        return _system_limit(_libvirt(info), exactly(enough))
    if starter != SESSION:
        return Limit(exactly(enough), "")
    hard = {"memlock_hard_bytes": enough, "memlock_hard_unlimited": enough >= UNLIMITED}
    libvirt = {**_libvirt(info), "sessions": [{"uid": owner.uid, "user": owner.name, **hard}]}
    its_own = {**info, "host": {**info["host"], "libvirt": libvirt}}
    return limit_of(its_own, asked._replace(limit=None), owner, starter, asked.memory or 0)


def _known(limits: Mapping[str, Any], name: str) -> int | None:
    """A limit of a row, None where that does not tell it."""
    return UNLIMITED if limits.get(f"{name}_unlimited") is True else limits.get(f"{name}_bytes")


def _words(span: Span) -> str:
    if span.least >= UNLIMITED:
        return "no limit"
    if span.most >= UNLIMITED:
        return f"a limit of {human_size(span.least)} or more" if span.least else "a limit that is not known"
    if span.least == span.most:
        return f"the limit of {human_size(span.least)}"
    return f"a limit of {human_size(span.least)} to {human_size(span.most)}"


def _too_little(who: str, cannot: str, reckoned: Span, hard: int) -> str:
    """Why a libvirt would not start a VM for which it reckons with more than its daemon may have."""
    wants = "no limit at all" if reckoned.least >= UNLIMITED else human_size(reckoned.least)
    return (
        f"{who} would not start it: it reckons with {wants} for the VM, and {cannot} raise it beyond its own hard limit"
        f" of {human_size(hard)}."
    )


def _system_limit(libvirt: Mapping[str, Any], reckoned: Span | None) -> Limit:
    """The limit of a domain of the system libvirt: what it reckons, be its daemon's own lower or higher.

    Source: qemuProcessLaunch() in libvirt's src/qemu/qemu_process.c; where that is nothing, the daemon's is inherited.
    """
    if reckoned is None or not reckoned.least:
        soft = _known(libvirt, "memlock")
        most = UNLIMITED if soft is None else max(soft, reckoned.most if reckoned else 0)
        # What it reckons is more than 1 GiB.
        span = Span(min(soft or 0, GIB) if reckoned else soft or 0, most)
        daemon = "of libvirt's daemon (a VM whose devices libvirt does not see has that one)"
        return Limit(span, f"{_words(span)} {daemon if reckoned is None else UNSEEN_DEVICES}")
    hard = _known(libvirt, "memlock_hard")
    if _may(libvirt) or (hard is not None and reckoned.most <= hard):
        return Limit(reckoned, f"{_words(reckoned)} that libvirt gives it")
    if libvirt.get("cap_sys_resource") is False and hard is not None and reckoned.least > hard:
        why = _too_little("libvirt", "its daemon, which may not use CAP_SYS_RESOURCE, cannot", reckoned, hard)
        return Limit(exactly(hard), f"the hard limit of {human_size(hard)} of libvirt's daemon", why)
    # Beyond the daemon's own it takes the capability to give more.
    span = Span(min(reckoned.least, hard or 0), reckoned.most)
    return Limit(span, f"{_words(span)} that libvirt gives it, if its daemon may, which takes CAP_SYS_RESOURCE")


def _session_limit(session: Mapping[str, Any] | None, owner: Owner, reckoned: Span | None) -> Limit:
    """The limit of a domain of a user's own libvirt, which cannot go beyond its own hard limit."""
    who = f"the libvirt of user {owner.name}"
    hard = None if session is None else _known(session, "memlock_hard")
    if hard is None:
        most = UNLIMITED if reckoned is None else reckoned.most
        return Limit(Span(0, most), f"a limit that {who} cannot raise beyond its own, which is not known")
    if reckoned is None:
        return Limit(Span(0, hard), f"a limit of up to {human_size(hard)}, the hard limit of {who}")
    if reckoned.least > hard:
        why = _too_little(who, "cannot", reckoned, hard)
        pid = None if session is None else session.get("pid")
        if pid is not None:
            # What the service manager has now, it has not.
            why += f" Its daemon, process {pid}, keeps that limit until it ends."
        return Limit(exactly(hard), f"the hard limit of {human_size(hard)} of {who}", why[0].upper() + why[1:])
    # It takes that from a daemon that has more, too.
    span = reckoned if reckoned.most <= hard else Span(0, hard)
    return Limit(span, f"{_words(span)} that {who} gives it")


def refusal(info: Info, asked: Asked, starter: str | None) -> str | None:
    """Why libvirt starts no such domain: "" where nothing is known against it, None where that cannot be told."""
    if starter != SYSTEM:
        return ""
    libvirt = _libvirt(info)
    hostdev = by_hostdev(info, asked)
    if hostdev is False or (asked.domain is not None and asked.domain.fdgroup):
        return ""
    if hostdev is None or knows_iommufd(info) is None:
        # It may have nothing to do with iommufd.
        return None if libvirt.get("cap_sys_resource") is False else ""
    if libvirt.get("cap_sys_resource") is False:
        reason = f" {libvirt['reason']}" if libvirt.get("reason") else ""
        return (
            "libvirt's daemon may not use CAP_SYS_RESOURCE, without which it can set no accounting, and starts no"
            f" domain with iommufd at all, whatever the emulator has.{reason}"
        )
    return "" if _may(libvirt) else None


def prerequisites(info: Info, devices: tuple[Device, ...]) -> list[str]:
    """What is not there on the host, of what VMs with such devices need."""
    host = info["host"]
    backends = {each.backend for each in devices}
    wanted = [*(_FOR_IOMMUFD if IOMMUFD in backends else ()), *(_FOR_VFIO if {IOMMUFD, LEGACY} & backends else ())]
    found = [str(row["msg"]) for row in host.get("readiness") or () if row["what"] in wanted and row["ready"] is False]
    if "module" in wanted and host.get("module") == "absent" and not found:
        found = ["This host's kernel has no iommufd."]
    return found


def candidates(info: Info, asked: Asked) -> list[Mapping[str, Any]]:
    """The host's emulators that the VM would run in: its own, or those for the host's architecture, or all."""
    host = info["host"]
    present = [each for each in host.get("qemu") or () if each["present"]]
    if asked.starter == OTHER:
        return [each for each in present if each["path"] == asked.emulator]
    named = [each for each in present if asked.domain is not None and each["path"] == asked.domain.emulator]
    own = own_emulators(present, host["machine"]) if "machine" in host else []
    return named or [each for each in present if each["path"] in own] or present


def emulator(info: Info, asked: Asked, owner: Owner) -> str | None:
    """The path of the emulator that the VM is most likely to run in. One that has CAP_IPC_LOCK already comes last.

    None where the host's architecture is not known.
    """
    running = {row.get("emulator") for row in info["processes"] if row["uid"] == owner.uid}

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, str]:
        return bool(row["cap_ipc_lock"]), row["path"] not in running, row["path"]

    likely = min(candidates(info, asked), key=rank, default=None)
    if likely is not None:
        return str(likely["path"])
    machine = info["host"].get("machine")
    return None if machine is None else f"/usr/bin/{qemu_for(machine)}"


def accounting_of(info: Info, asked: Asked, owner: Owner, starter: str | None) -> Accounting:
    """How the VM would be accounted, as the task says or as the host shows."""
    if asked.starter == OTHER:
        return by_definition(asked, asked.capable)
    if asked.accounting == NONE:
        return Accounting(USER, True, "")
    if asked.accounting != AUTO:
        # libvirt takes it away.
        by_root = asked.capable is None and is_root(owner) and starter != SYSTEM
        return Accounting(asked.accounting, None if by_root else bool(asked.capable), BY_ROOT if by_root else "")
    found = _found(info, asked, owner, starter)
    if asked.capable is None:
        return found
    # The VMs that have it show nothing of the mode of one that has not.
    return Accounting(found.mode if asked.capable or not found.capable else None, asked.capable, "")


def by_definition(asked: Asked, capable: bool | None) -> Accounting:
    """How a VM is accounted that is defined, whatever somebody has set of one that runs: that does not outlast it."""
    why = "" if capable is not None else "It is not known whether it gets CAP_IPC_LOCK."
    if "cap_sys_resource" in asked.lacks and not asked.ends:
        barred = "iommufd-exec has no CAP_SYS_RESOURCE from its unit, and leaves its iommufd in the mode user."
        why = f"{barred} {why}".strip()
    if any(each.backend == IOMMUFD and each.mode is None for each in asked.devices):
        why = f"Its definition does not tell the mode of its iommufd. {why}".strip()
    return Accounting(None, capable, why)


def is_root(owner: Owner) -> bool:
    """Whether it is root, whose programs have all capabilities that are not taken away."""
    return owner.uid == 0 or owner.name == "root"


def _found(info: Info, asked: Asked, owner: Owner, starter: str | None) -> Accounting:
    """How the VM would be accounted, as the host shows."""
    # What a file gives in another user namespace does not count.
    by_file = {False} if has_contained(info, owner) else {each["cap_ipc_lock"] for each in candidates(info, asked)}
    if by_file == {True} and starter == SYSTEM and _passes(info, asked, owner):
        return Accounting(USER, True, "The host's emulators have CAP_IPC_LOCK.")
    found = _by_libvirt(info, asked, starter) if starter == SYSTEM else None
    if asked.starter is not None and found is None and not _is_set_by_session(asked, starter, info):
        # libvirt gives no capability but what the emulator's file gives.
        found = by_definition(asked, False)
    found = found or _by_running(info, asked, owner, starter)
    if by_file != {False} and found.capable is False:
        said = {frozenset(): NOT_KNOWN, frozenset({True}): WITHHELD}.get(frozenset(by_file), SOME)
        found = found._replace(capable=None, why=f"{said} {found.why}".strip())
    if by_file == {False} and found.capable and (starter == SESSION or _have_it_of_files(info, owner)):
        # Only its file gives it to a domain. An upgrade may have taken it from the file since.
        found = found._replace(capable=None, why=f"{found.why} The host's emulators do not have it any more.")
    if owner.uid is None and starter != SYSTEM and any(capability_of(row) is not False for row in info["processes"]):
        # One of these may be the user's.
        found = found._replace(capable=None)
    return found


def _have_it_of_files(info: Info, owner: Owner) -> bool:
    """Whether a running VM of the user's has CAP_IPC_LOCK of its file: a unit's is ambient, and root has all."""
    rows = (row for row in info["processes"] if row["uid"] == owner.uid and row.get("holder") is not True)
    return not is_root(owner) and any(
        capability_of(row) and "cap_ipc_lock" not in row["capabilities"]["ambient"] for row in rows
    )


def _passes(info: Info, asked: Asked, owner: Owner) -> bool:
    """Whether what the system libvirt starts is known to get what its file gives.

    One that runs and has not got it was started before the file had that, or was kept from it.
    """
    paths = {each["path"] for each in candidates(info, asked)}
    running = [row for row in info["processes"] if row["uid"] == owner.uid and row.get("emulator") in paths]
    lacks = any(capability_of(row) is False for row in running if row.get("holder") is not True)
    return _libvirt(info).get("passes_cap_ipc_lock") is True and not lacks


def _by_libvirt(info: Info, asked: Asked, starter: str | None) -> Accounting | None:
    """How the system libvirt has its VMs accounted; None where nothing is known of it."""
    libvirt = _libvirt(info)
    if not any(each.backend == IOMMUFD for each in asked.devices):
        return Accounting(None, False, "")
    if not libvirt:
        return None
    hostdev, sets = by_hostdev(info, asked), libvirt.get("sets_rlimit_mode")
    if hostdev is False:
        why = "QEMU opens the iommufd itself (<qemu:commandline>), and the kernel's default is per user."
        return Accounting(USER, False, f"{libvirt.get('reason') or ''} {why}".strip())
    if asked.domain is not None and asked.domain.fdgroup:
        return Accounting(None, False, "Who gives libvirt the iommufd decides about its mode.")
    if hostdev and knows_iommufd(info) and (sets is True or libvirt.get("cap_sys_resource") is not True):
        # It sets the mode, or starts no such domain.
        return Accounting(PROCESS, False, str(libvirt.get("reason") or "libvirt sets per-process accounting."))
    if sets is False and knows_iommufd(info) and libvirt.get("cap_sys_resource") is not False:
        return Accounting(USER, False, str(libvirt.get("reason") or "libvirt does not set the accounting."))
    return Accounting(
        None,
        False,
        f"It is not known whether libvirt sets per-process accounting. {libvirt.get('reason') or ''}".strip(),
    )


def capability_of(row: Mapping[str, Any]) -> bool | None:
    """Whether a process has CAP_IPC_LOCK where it counts."""
    effective = (row.get("capabilities") or {}).get("effective")
    if effective is not None and "cap_ipc_lock" not in effective:
        return False
    initial: bool | None = None if effective is None else row["initial_user_namespace"]
    return initial


def own_charge(row: Mapping[str, Any]) -> tuple[int, int]:
    """What of its user's charged_bytes and uncertain_bytes is a process's own, as _charges.total() adds them up."""
    if row.get("holder") is True:
        return 0, 0
    pinned, locked, backends = row["pinned_bytes"], row["locked_bytes"], row.get("backends") or ()
    modes = {each["rlimit_mode"] for each in row.get("iommufds") or ()}
    if row["accounting"] == USER and VDPA not in backends:
        return pinned, 0
    split = modes == {USER, PROCESS} and list(backends) == ["iommufd"] and row.get("locks_memory") is False
    if split and capability_of(row) is False and locked <= pinned:
        return pinned - locked, 0
    uncertain = row["accounting"] in (None, USER) or list(backends) == [LEGACY]
    return 0, pinned if uncertain else 0


def has_contained(info: Info, owner: Owner) -> bool:
    """Whether a VM of the user is in another user namespace, as in a container. Then the next one may be, too."""
    rows = (row for row in info["processes"] if row.get("initial_user_namespace") is False)
    return any(row["uid"] == owner.uid for row in rows)


def _by_running(info: Info, asked: Asked, owner: Owner, starter: str | None) -> Accounting:
    """How the user's running VMs are accounted."""
    name = owner.name or "libvirt's user"
    rows = [row for row in info["processes"] if row["uid"] == owner.uid and row.get("holder") is not True]
    # One that has pinned nothing, and no guest, is no VM so far.
    rows = [row for row in rows if row["pinned_bytes"] or row["memory_bytes"]]
    if starter == SESSION:
        rows = [row for row in rows if row.get("domain_uri") == "qemu:///session"]
    if not any(each.backend == IOMMUFD for each in asked.devices):
        return _capability_by_running(rows, owner, name, starter)
    if _is_set_by_session(asked, starter, info):
        return Accounting(USER, False, "A user's own libvirt does not set the accounting, which then is per user.")
    rows = [row for row in rows if "iommufd" in (row.get("backends") or ("iommufd",))]
    # With a vDPA device, one that has CAP_IPC_LOCK is accounted per process all the same.
    shown = {NONE if capability_of(row) else row["accounting"] for row in rows}
    partly = (owner.partly or None in shown) and shown != {None}
    shown.discard(None)
    if len(shown) == 1 and (not partly or shown == {USER}):
        (accounting,) = shown
        how = {USER: "are accounted per user", PROCESS: "are accounted per process", NONE: "have CAP_IPC_LOCK"}
        mode, why = USER if accounting == NONE else accounting, f"The running VMs of {name} {how[accounting]}."
        if accounting != NONE and _may_have_all(owner, starter):
            return Accounting(mode, None, f"{why} {BY_ROOT}")
        return Accounting(mode, accounting == NONE, why)
    capable = None if NONE in shown or _may_have_all(owner, starter) else False
    if shown:
        differ = "may have other VMs than were seen whole" if partly else "has VMs that differ in accounting"
        return Accounting(None, capable, f"{name} {differ}.")
    if is_root(owner):
        return Accounting(None, None, BY_ROOT)
    return Accounting(
        None, False, f"No running VM of {name} shows its accounting, which is per user unless somebody sets it."
    )


def _is_set_by_session(asked: Asked, starter: str | None, info: Info) -> bool:
    """Whether a user's own libvirt gives the VM an iommufd, and nobody gives it that."""
    domain = asked.domain if starter == SESSION else None
    return domain is not None and not domain.fdgroup and bool(by_hostdev(info, asked))


def _may_have_all(owner: Owner, starter: str | None) -> bool:
    """Whether the next VM of root may have CAP_IPC_LOCK, whatever container or unit took it from those that run."""
    return is_root(owner) and starter not in (SYSTEM, SESSION)


def _capability_by_running(rows: list[Mapping[str, Any]], owner: Owner, name: str, starter: str | None) -> Accounting:
    """Whether a VM without an iommufd has CAP_IPC_LOCK, as the user's running VMs have it or not."""
    shown = {capability_of(row) for row in rows}
    if not shown and is_root(owner):
        return Accounting(None, None, BY_ROOT)
    if shown <= {False}:
        may = _may_have_all(owner, starter)
        return Accounting(None, None, BY_ROOT) if may else Accounting(None, False, "")
    if shown == {True} and not owner.partly:
        return Accounting(None, True, f"The running VMs of {name} have CAP_IPC_LOCK.")
    return Accounting(None, None, f"Some running VMs of {name} have CAP_IPC_LOCK, or may have it, and not all.")
