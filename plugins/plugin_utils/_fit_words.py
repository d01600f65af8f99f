# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: why memlock_fit answers what it answers, and what to ask, for people. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..module_utils._accounting import (
    IOMMUFD,
    MLOCK,
    MM_LOCKED,
    MM_PINNED,
    NOTHING,
    PROCESS,
    UNLIMITED,
    USER,
    VDPA,
    demand,
)
from ..module_utils._size import human_size
from ._fit_case import GROUP, PAGE, ROOM, SHARED, SIGHT, STARTS, WHICH, Case, at_best, judge, kernels, may_charge_user
from ._fit_host import OTHER, SYSTEM, capability_of, own_charge
from ._fit_qemu import QEMU
from ._host_info import kib_with_room

__all__ = ("question_of", "reason_of")

_AS_ROOT = "Run virt.iommufd.iommufd_info as root (become: true) on the host itself, with host in gather_subset."

# Linux 6.6 and later have that option, which systemd 259 gives.
_HUGE = " Its huge pages count there only where cgroup2 is mounted with memory_hugetlb_accounting (see /proc/mounts)."
_ENDS = "ends with -12 (Cannot allocate memory)"
# What QEMU says of a vDPA device, for which the kernel refuses to pin (EFAULT), and goes on.
_FAIL = "(vhost vdpa map fail!)"
# QEMU tells neither error nor memory then.
_NOT_TAKEN_OVER = (
    "cannot be taken over: the new process ends (QEMU 11: Unknown section or instance 'iommufd'), and the VM may be"
    " lost"
)

# Where all was seen, and no file tells.
_BY_WHAT = "By io_uring they are, by vDPA or RDMA they are not."
_SINCE = "What it pinned before it became that user (-run-with user=) is not, and what it has pinned since may be."
_BY_MODES = " By an iommufd in the mode user they are, by one in the mode process they are not."

# The same of a VM that runs, whose capability and iommufds are read, and not given.
_QUESTIONS_OF_RUNNING = {
    "capable": f"Is the process in the initial user namespace, where its CAP_IPC_LOCK counts? {_AS_ROOT}",
    "mode": f"Which mode has its iommufd? {_AS_ROOT}",
    "new mode": "Which mode has its iommufd? Give the mode of each in devices.",
    "viommu": (
        "Is what it gets behind an IOMMU of the VM's, in an address space of its own? Give viommu: each if so, nested"
        " if that is nested, or none for a device that shares the space of others."
    ),
    "memory": "How much memory has the VM now? Give memory: all of it, with what was plugged.",
}

# What settles an answer, by the model's name for it, or by that of _fit_case.
_QUESTIONS = {
    "capable": (
        "Has the VMM CAP_IPC_LOCK? Give accounting: none if it has, in the initial user namespace. If not, give user or"
        " process, and cap_ipc_lock: false."
    ),
    "mode": "Which mode has its iommufd? Give accounting: user or process, or the mode of each in devices.",
    "legacy_by_iommufd": f"Does iommufd provide /dev/vfio/vfio on this host? {_AS_ROOT}",
    "viommu": (
        "Has the VM an IOMMU of its own, and is that a nested one? Give viommu: none, each or nested. Devices behind"
        " one bridge of conventional PCI share an address space; so if all are, give none."
    ),
    "limit": "Which RLIMIT_MEMLOCK will the VMM have? Give memlock.",
    "held_mm_locked": f"How much has the process locked already? {_AS_ROOT}",
    "held_mm_pinned": f"How much has the process pinned already? {_AS_ROOT}",
    "locked": (
        "How much memory does the VMM lock itself (QEMU's mem-lock=on)? Give locked: 0 if none, or VmLck of such a VM"
        " without a device."
    ),
    "memory": "How much memory has the VM? Give memory.",
    "beyond": "How much does the VM pin beyond its memory? Give overhead.",
    PAGE: f"How large are the host's pages? {_AS_ROOT}",
    STARTS: f"May libvirt's daemon use CAP_SYS_RESOURCE, without which it starts no domain with iommufd? {_AS_ROOT}",
    QEMU: (
        "Which release of QEMU is it? 10.0 and older run such a VM, 11 does not. Run virt.iommufd.iommufd_info with"
        " emulators in gather_subset; releases in between have to be tried."
    ),
    SHARED: (
        "Is there room for it in the slices that it is in, one of which has MemoryMax=? Compare MemoryMax and"
        " MemoryCurrent there (systemctl show), as others use it, too."
    ),
    GROUP: f"Has its control group a limit, as a domain has one by <hard_limit> (virsh memtune)? {_AS_ROOT}",
    WHICH: (
        "Which iommufd does the device get? Give iommufd in devices: the fd of one in processes[].iommufds, or new,"
        " with its mode, for one that had no device so far."
    ),
    SIGHT: f"Which iommufds, containers and vDPA devices has the process? {_AS_ROOT}",
}


def question_of(case: Case) -> str | None:
    """The one question that would settle it; None where the answer is certain."""
    told = case.told
    if case.refused or told.fits is not None or told.question is None:
        return None
    enough = f" A limit of {told.enough} bytes suffices whatever it is." if told.enough < UNLIMITED else ""
    if told.question == "held_user":
        return _of_user(case, enough)
    if told.question == ROOM:
        return _has_room(case)
    if told.question == "later" and told.way == VDPA:
        return f"Will its guest turn on its vDPA device? Nothing tells that beforehand.{enough}"
    if told.question == "later":
        return f"How much will its mdev pin as it runs? Nothing tells that beforehand.{enough}"
    if told.question == "locked" and _is_known_to_lock(case):
        return f"How much does QEMU lock for a moment, beside what it keeps? Nothing tells that beforehand.{enough}"
    if told.question == "order":
        return f"Does its vDPA device pin after the others? If so, give devices, with that as the last.{enough}"
    if case.running is not None:
        return _of_running(told.question, case.running)
    if told.question == "limit" and case.asked.domain is None:
        return "Which RLIMIT_MEMLOCK will the VMM have? Give memlock, or domain_xml for a domain of libvirt's."
    return _QUESTIONS[told.question]


def _of_user(case: Case, enough: str) -> str:
    """What is to be asked of what a user is charged."""
    if case.owner.name is None and case.starter == OTHER:
        return "Which user will the VMM run as? Give user."
    if case.owner.name is None:
        return "Which user does libvirt run its VMs as? Give user."
    if case.owner.hidden:
        return f"How much do processes that were not seen have charged to {case.owner.name}? {_AS_ROOT}"
    if case.owner.left_behind:
        return (
            f"Is {case.owner.name} charged for VMs that have ended? Have closed what host.limits_of_view of"
            " iommufd_info names (charges), and look again."
        )
    if case.owner.uid is None:
        return f"Which uid has {case.owner.name}? Give user as a number, or users of iommufd_info with that name."
    how = _AS_ROOT if case.owner.partly else _BY_WHAT + _of_both_modes(case)
    own = own_charge(case.running)[1] if case.running is not None else 0
    whose = "processes of it" if own else "other processes of it"
    if case.running is not None and own >= case.owner.unsure:
        whose = f"{case.running['comm']} ({case.running['pid']}) itself"
        how = _SINCE if _has_changed_user(case.running) else how
    return (
        f"Are the {human_size(case.owner.unsure)} charged to {case.owner.name} that {whose}"
        f" {'has' if whose.endswith('self') else 'have'} pinned? {how}{enough}"
    )


def _has_changed_user(row: Mapping[str, Any]) -> bool:
    """Whether a process has become its user after it was started, which alone makes it unknown who is charged then."""
    modes = {each["rlimit_mode"] for each in row.get("iommufds") or ()}
    return row["accounting"] is None and modes in ({USER}, {PROCESS}) and capability_of(row) is False


def _has_room(case: Case) -> str:
    """What is to be asked of its control group."""
    # libvirt sets both limits as the VM starts.
    both = case.running is None and case.told.enough < UNLIMITED and not _is_a_unit(case)
    least = max(case.once, case.told.enough if both else 0)
    name = "MemoryMax=" if _is_a_unit(case) else "<hard_limit>"
    huge = _HUGE if case.asked.domain is not None and case.asked.domain.hugepages else ""
    return (
        f"Does the emulator's own memory fit into what {name} leaves beside the guest's? Nothing tells that"
        " beforehand, and if not, its control group, which has that limit, too, ends the VM. Raise it to"
        f" {kib_with_room(least)} KiB.{huge}"
    )


def _is_a_unit(case: Case) -> bool:
    """Whether it is no domain that libvirt gives its limits."""
    return case.asked.starter == OTHER or (case.running is not None and case.starter != SYSTEM)


def _of_running(question: str, row: Mapping[str, Any]) -> str:
    """What is to be asked of a VM that runs."""
    if question == "limit":
        return _which_limit(row)
    seen = all(each["rlimit_mode"] for each in row["iommufds"] or ())
    name = "new mode" if question == "mode" and seen else question
    return _QUESTIONS_OF_RUNNING.get(name) or _QUESTIONS[name]


def _which_limit(row: Mapping[str, Any]) -> str:
    """What is to be asked of a domain whose limit libvirt may raise as it plugs something.

    Read in qemuDomainAdjustMaxMemLock() and qemuDomainGetMemLockLimitBytes() in libvirt's src/qemu/qemu_domain.c.
    """
    hard = "" if row.get("memory_max_unlimited") else "its <hard_limit>, if it has one; else "
    return (
        f"Which RLIMIT_MEMLOCK will the VMM have? Give memlock: {hard}{row['memlock_bytes']}, its limit of now, if all"
        " devices that it has and gets are in <qemu:commandline>, for which libvirt reckons nothing; else what libvirt"
        " reckons: all memory that it then has, as often as libvirt counts that, and 1 GiB, if that is more."
    )


def _of_both_modes(case: Case) -> str:
    """What is to be said of a user's VMs whose iommufds differ in their mode."""
    rows = [row.get("iommufds") or () for row in case.info["processes"] if row["uid"] == case.owner.uid]
    return _BY_MODES if any({USER, PROCESS} <= {each["rlimit_mode"] for each in its} for its in rows) else ""


def _is_known_to_lock(case: Case) -> bool:
    """Whether the VMM locks memory, and how much of it in the end is known."""
    if case.asked.locked.most < UNLIMITED:
        return case.asked.locked != NOTHING
    return case.running is not None and case.running.get("locks_memory") is True


def reason_of(case: Case) -> str:
    """Why, in sentences."""
    may_end = "It may be ended, whatever its limit, for having both an iommufd and a legacy container."
    clash = may_end if case.clash.question else ""
    words = [case.refused, clash, case.accounting.why, case.pins, *([] if case.refused else _outcome(case))]
    runs = any(each.as_it_runs and each.backend != VDPA for vm in case.steps for each in vm.devices)
    if runs and case.told.fits is None and case.told.question != "later":
        words.append("Its mdev pins as it runs, so what fits now may fail later.")
    if case.told.question == "held_user" and case.owner.left_behind:
        words += [str(each["why"]) for each in case.info["host"]["limits_of_view"] if each["what"] == "charges"]
    if case.asked.libvirt_locks:
        words.append("It has <locked/>, for which libvirt gives no limit at all.")
    if case.asked.live_update:
        words.append("In a live update the new process is charged before the old one is not any more.")
    words += [each for each in case.needs if each != case.refused]
    return " ".join(filter(None, words))


def _outcome(case: Case) -> list[str]:
    """What the kernel does, by the counter that decides."""
    told = case.told
    if told.held is None and told.fits is not None:
        vm = case.steps[0]
        why = "With CAP_IPC_LOCK no limit is checked." if vm.capable else "Nothing is checked."
        return [why] if vm.devices else []
    if told.fits is None:
        return _unsure(case)
    limit = case.limit.words
    if told.fits is False:
        best = at_best(case)
        least = "" if best.enough == told.enough and best.limit == told.limit else "at least "
        over = human_size(best.enough - (best.limit or 0))
        comma = "," if "," in limit else ""
        outcome = _NOT_TAKEN_OVER if _fails_in_live_update(case) else _ENDS
        if told.error != "ENOMEM":
            without = f"runs on without its vDPA device {_FAIL}"
            outcome = without if told.error else f"{_ENDS} or {without}"
        if told.counter == MM_LOCKED and any(vm.locked.least for vm in case.steps):
            # At its start it locks more once it has pinned.
            either = "ends" if told.way == MLOCK else f"{_ENDS}, or"
            outcome = f"{either} since it cannot lock its memory"
        if told.way == MLOCK and case.asked.grow and not case.asked.live_update:
            outcome = "runs on without that (cannot set up guest memory: Resource temporarily unavailable)"
        return [f"{_charged(case)}, it is {least}{over} over {limit}{comma} and {outcome}."]
    if told.limit is None or case.limit.span.least >= UNLIMITED:
        return [f"{_charged(case)}, it has no limit to reach."]
    words = [f"{_charged(case)}, it is within {limit}."]
    if not case.asked.told_of_locks and case.running is None:
        words.append("It is taken to lock no memory itself (mem-lock=on), of which locked or domain_xml would tell.")
    return [*words, _margin(case, case.limit.span.least)] if may_charge_user(case) else words


def _fails_in_live_update(case: Case) -> bool:
    """Whether that is what fails, and not what comes before or after it. It was tried with iommufd alone."""
    first = case.steps[0]
    if not case.asked.live_update or any(each.backend != IOMMUFD for each in first.devices):
        return False
    # It is all that a new VM does after its start, and the first that one does that runs.
    return judge(case.info, (first,)).fits is (case.running is None)


def _margin(case: Case, limit: int) -> str:
    """What is left of the user's, which may be less than what no file shows."""
    most = max(vm.held_user.most + demand(vm, kernel)[USER].most for vm in case.steps for kernel in kernels(case.info))
    left = limit - most
    return (
        f"{human_size(left)} are then left to user {case.owner.name}. What its other programs register by io_uring or"
        " AF_XDP counts, too, and no file shows all of it: with more than that, the VM fails."
    )


def _unsure(case: Case) -> list[str]:
    told = case.told
    if told.question == "later" and told.way == VDPA:
        return [
            f"It fits now. For its vDPA device {case.limit.words} is too small, and it runs on without that {_FAIL}."
        ]
    if told.question == "later":
        return [
            f"It fits now, and may fail later: its mdev pins as it runs, up to all memory, for which {case.limit.words}"
            " is too small."
        ]
    if told.question == ROOM:
        name = "MemoryMax= is the limit" if _is_a_unit(case) else "Its <hard_limit> is the limit"
        return [f"{name} of its control group, too, in which the emulator's own memory counts."]
    if told.question == SHARED:
        return ["It is in a slice with MemoryMax=, and what the others in it use is not looked at."]
    if told.question == case.doubt or told.question in (STARTS, SIGHT, QEMU, WHICH):
        return []
    best = at_best(case)
    below, over = (best.limit or 0) - best.enough, told.enough - (told.limit or 0)
    if told.enough >= UNLIMITED or case.limit.span.least != case.limit.span.most or best.fits is not True:
        worst = f": at worst it needs {human_size(told.enough)}" if told.enough < UNLIMITED else ""
        return [f"{_charged(case)}, it may or may not be within {case.limit.words}{worst}."]
    return [
        f"{_charged(case)}, it may be anything from {human_size(below)} below to {human_size(over)} over"
        f" {case.limit.words}."
    ]


def _charged(case: Case) -> str:
    """To whom it is charged, beside what."""
    counter = case.told.counter
    own = "this VM's process" if case.running else "itself"
    if counter == USER:
        owner = case.owner
        already = human_size(owner.charged) if owner.charged or owner.unsure else "nothing"
        already += f" to {human_size(owner.charged + owner.unsure)}" if owner.unsure else ""
        return f"Charged to {owner.name or 'a user that is not known'} on top of {already}"
    if counter == MM_LOCKED:
        # Where that is not the iommufd alone, it is told what is in there, too.
        backends = {each.backend for vm in case.steps for each in vm.devices}
        locks = any(vm.locked.most for vm in case.steps)
        several = len(backends) > 1 or locks
        both = " (VmLck, in which an iommufd per process, the legacy container and locked memory all count)"
        return f"Charged for {own} alone{both if several else ''}"
    if counter == MM_PINNED:
        return f"Charged for {own} alone (VmPin, which vDPA checks whatever the capabilities, and each iommufd fills)"
    return "Whichever counter decides"
