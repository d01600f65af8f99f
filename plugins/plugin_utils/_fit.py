# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: from what iommufd_info returned, whether one more VM would start.

The functions are pure, and raise IommufdError with the text that a user reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import basename
from typing import Any, NamedTuple

from ansible.module_utils.parsing.convert_bool import boolean

from ..module_utils._errors import IommufdError
from ..module_utils._foreign import harmless
from ..module_utils._iommufd import NONE, PROCESS, USER
from ..module_utils._size import human_size, parse_size
from ._host_info import UNSEEN, own_emulators, qemu_for

__all__ = ("memlock_fit",)

GIB = 2**30
# The smallest and the largest page that a Linux host with iommufd has.
PAGES = (2**12, 2**16)

# Users that distributions run the domains of the system libvirt as.
LIBVIRT_USERS = ("libvirt-qemu", "qemu")

# The strictest first.
ACCOUNTINGS = (USER, PROCESS, NONE)

# What the result of a task says where it has nothing to say of the host.
TROUBLES = ("unreachable", "failed", "skipped")

UNKNOWN_LIMIT = (
    "libvirt raises the limit for a <hostdev> only: a domain that names iommufd in <qemu:commandline> has the limit of"
    " libvirt's daemon, unless it has a <memtune><hard_limit>."
)

Info = Mapping[str, Any]


class Owner(NamedTuple):
    """The user that the VMM will run as, and what is charged to it under per-user accounting.

    `uid` is None for a name that the input does not know. `unsure` may be charged too. `hidden`: there may be more,
    since there may be processes that were not seen. `partly`: it may have VMs that were not seen, or not whole.
    """

    name: str
    uid: int | None
    charged: int
    unsure: int
    hidden: bool
    partly: bool


class NewVm(NamedTuple):
    """The VM that is asked about: what it pins at least and at most, its limit (None without), and these in words.

    Where the limit is not `known`, it is the one that libvirt would give for a <hostdev>.
    """

    least: int
    most: int
    pins: str
    limit: int | None
    limited: str
    known: bool = True


class Forecast(NamedTuple):
    """Whether the VM fits under one accounting, None where that cannot be told, and why."""

    accounting: str
    fits: bool | None
    charged: int
    reason: str


def checked(info: Any) -> Info:
    """The input, if it is what iommufd_info returned."""
    trouble = next(filter(info.get, TROUBLES), None) if isinstance(info, Mapping) else None
    if trouble:
        # Whatever it is, it is told on one line.
        msg = ascii(str(info.get("msg", "no message")))[1:-1]
        raise IommufdError(
            f"The input is the result of a task that was {trouble} ({msg:.1000}), which tells nothing of the host:"
            " leave such hosts out."
        )
    if not isinstance(info, Mapping) or not {"host", "narrowed"} <= info.keys():
        raise IommufdError("The input is not what virt.iommufd.iommufd_info returned: give what the task registered.")
    missing = [subset for subset in ("processes", "users") if subset not in info]
    if missing:
        raise IommufdError(
            f"The input lacks {' and '.join(missing)}: run virt.iommufd.iommufd_info with {' and '.join(missing)} in"
            " gather_subset."
        )
    return info


def size(name: str, value: Any, minimum: int = 0) -> int:
    """The bytes of a parameter."""
    try:
        return parse_size(value, minimum)
    except IommufdError as exc:
        raise IommufdError(f"{name}: {exc}") from exc


def owner_of(info: Info, user: Any) -> Owner:
    """The user that is asked about, as the input knows it."""
    text = str(user).strip()
    known = isinstance(user, (int, str)) and not isinstance(user, bool)
    # No id has more digits, and no name is made of digits alone.
    if not known or not text.isprintable() or not text or text.startswith("-") or (text.isdigit() and len(text) > 10):
        raise IommufdError(f"user: {user!r:.60} is not a user: give a name or an id.")
    rows = (*info["users"], *info["processes"])
    uid = int(text) if text.isdecimal() else next((row["uid"] for row in rows if row["user"] == text), None)
    name = next((row["user"] for row in rows if row["uid"] == uid and row["user"] is not None), text)
    narrowed = info["narrowed"]["uids"]
    if narrowed is not None and uid not in narrowed:
        raise IommufdError(
            f"user: the input tells of other users than {text}: run virt.iommufd.iommufd_info without users, or with"
            " this one among them."
        )
    charges = [row for row in info["users"] if row["uid"] == uid]
    unsure = sum(row["uncertain_bytes"] for row in charges)
    unseen = {each["what"] for each in info["host"]["limits_of_view"]}.intersection(UNSEEN)
    return Owner(
        name=name,
        uid=uid,
        charged=sum(row["charged_bytes"] for row in charges),
        unsure=unsure,
        # What processes have pinned whose descriptors or iommufds were not seen is in uncertain_bytes.
        hidden="processes" in unseen,
        partly="processes" in unseen or bool(unsure and unseen),
    )


def address_spaces(vfio_devices: Any, viommu: Any) -> int:
    """How many times the VM pins its memory."""
    text = str(vfio_devices).strip()
    if isinstance(vfio_devices, bool) or not re.fullmatch("0{0,9}[1-9][0-9]{0,3}", text):
        raise IommufdError(f"vfio_devices: {vfio_devices!r:.60} is not a number of devices: give 1 to 9999.")
    try:
        return int(text) if boolean(viommu) else 1
    except TypeError:
        raise IommufdError(f"viommu: {viommu!r:.60} is not a boolean: give true or false.") from None


def measured_overhead(info: Info) -> int | None:
    """The most that a running VM pins beyond its memory; None where no VM shows it."""
    found = [
        process["pinned_bytes"] - process["memory_bytes"]
        for process in info["processes"]
        if process["pinned_bytes"]
        and process["memory_bytes"] is not None
        # With a second address space, it may have pinned its memory a second time.
        and sum(len(iommufd["ioases"]) for iommufd in process["iommufds"] or []) == 1
    ]
    return max((overhead for overhead in found if 0 <= overhead <= GIB), default=None)


def describe(info: Info, memory: int, times: int, memlock: Any, overhead: Any) -> NewVm:
    """The VM that is asked about, which pins its memory so many times, in whole pages."""
    pins = human_size(memory * times) + (f" ({human_size(memory)} for each of {times} devices)" if times > 1 else "")
    shown = measured_overhead(info)
    if overhead is not None:
        least = most = size("overhead", overhead)
        pins += f" and {human_size(most)} beyond that" if most else ""
    elif shown is not None:
        least, most = 0, shown * times
        pins += f" and up to {human_size(most)} beyond that, as running VMs do"
    else:
        least, most = 0, GIB
        pins += f" and up to {human_size(most)} beyond that, which is what libvirt allows for"
    page = info["host"].get("page_bytes")
    smallest, largest = (page, page) if page else PAGES
    least = whole_pages(memory * times + least, smallest)
    most = whole_pages(memory * times + most, largest)
    return NewVm(least, most, f"The VM pins {pins}.", *describe_limit(memory * times, memlock))


def whole_pages(size_: int, page: int) -> int:
    """The size, rounded up to pages."""
    return -(-size_ // page) * page


def describe_limit(pinned: int, memlock: Any) -> tuple[int | None, str]:
    """The VMM's limit, None without, and the same in words."""
    if memlock in ("unlimited", "infinity"):
        return None, "no limit"
    if memlock == "libvirt":
        return pinned + GIB, f"the limit of {human_size(pinned + GIB)} that libvirt gives it"
    limit = size("memlock", memlock)
    return limit, f"its limit of {human_size(limit)}"


def knows_limit(info: Info, user: Owner, memlock: Any) -> bool:
    """Whether the VM's limit is known: the one of libvirt's for a <hostdev> is not had by a VM that uses none."""
    libvirt = info["host"].get("libvirt")
    for_hostdev = memlock == "libvirt" and user.name in LIBVIRT_USERS
    return not for_hostdev or libvirt is None or libvirt["sets_rlimit_mode"] is not False


def candidates(info: Info) -> list[Mapping[str, Any]]:
    """The host's emulators that a VM would run in: those for its own architecture, or all where none is known to be."""
    host = info["host"]
    present = [each for each in host.get("qemu", []) if each["present"]]
    own = own_emulators(present, host["machine"]) if "machine" in host else []
    return [each for each in present if each["path"] in own] or present


def possible(info: Info, user: Owner, accounting: Any) -> tuple[list[str], str]:
    """How the VM may be accounted, the strictest first, and why."""
    if accounting not in ("auto", *ACCOUNTINGS):
        raise IommufdError(f"accounting: {accounting!r:.60} is unknown: give auto, {', '.join(ACCOUNTINGS)}.")
    if accounting != "auto":
        return [accounting], ""
    host = info["host"]
    if "qemu" not in host:
        accountings, why = from_processes(info, user)
        return accountings, f"The input lacks the subset host, which may tell more of the accounting. {why}"
    capable = {each["cap_ipc_lock"] for each in candidates(info)}
    if capable == {True}:
        return [NONE], "The host's emulators have CAP_IPC_LOCK."
    accountings, why = from_libvirt(host["libvirt"], user) or from_processes(info, user)
    if capable - {False} and NONE not in accountings:
        accountings.append(NONE)
        why = f"Some of the host's emulators have CAP_IPC_LOCK, or may have it, so the VM may too. {why}"
    return accountings, why


def from_libvirt(libvirt: Info, user: Owner) -> tuple[list[str], str] | None:
    """How the system libvirt has its VMs accounted; None where the VM is none of them, or libvirt leaves it alone."""
    if user.name not in LIBVIRT_USERS or libvirt["sets_rlimit_mode"] is False:
        return None
    if libvirt["sets_rlimit_mode"]:
        return [PROCESS], libvirt["reason"]
    return [USER, PROCESS], f"It is not known whether libvirt sets per-process accounting: {libvirt['reason']}"


def from_processes(info: Info, user: Owner) -> tuple[list[str], str]:
    """How the user's running VMs are accounted, else what the kernel does by itself."""
    theirs = [process for process in info["processes"] if process["uid"] == user.uid and process["iommufds"] != []]
    shown = {process["accounting"] for process in theirs}
    partly = user.partly or None in shown
    shown.discard(None)
    if shown and partly and shown != {USER}:
        accountings = [each for each in ACCOUNTINGS if each in {*shown, USER}]
        return (
            accountings,
            f"{user.name} may have other VMs than were seen whole, and the kernel's default is per user.",
        )
    if len(shown) == 1:
        (accounting,) = shown
        how = {USER: "are accounted per user", PROCESS: "are accounted per process", NONE: "have CAP_IPC_LOCK"}
        return [accounting], f"The running VMs of {user.name} {how[accounting]}."
    if shown:
        accountings = [each for each in ACCOUNTINGS if each in {*shown, USER}]
        return (
            accountings,
            f"The running VMs of {user.name} differ in accounting, and the kernel's default is per user.",
        )
    if user.uid == 0 or user.name == "root":
        return [USER, NONE], "What root starts has CAP_IPC_LOCK, unless it is taken away, which libvirt does."
    return [USER], f"No running VM of {user.name} shows its accounting, and the kernel's default is per user."


def forecast(vm: NewVm, user: Owner, accounting: str) -> Forecast:
    """Whether the VM fits under one accounting."""
    if accounting == NONE:
        return Forecast(accounting, True, 0, "With CAP_IPC_LOCK nothing is charged and no limit is checked.")
    if accounting == PROCESS:
        fits, how = compare(vm, 0, 0, False)
        return Forecast(accounting, fits, 0, f"Charged for itself alone, {how}.")
    fits, how = compare(vm, user.charged, user.unsure, user.hidden)
    already = human_size(user.charged) if user.charged or user.unsure else "nothing"
    already += f" to {human_size(user.charged + user.unsure)}" if user.unsure else ""
    return Forecast(accounting, fits, user.charged, f"Charged to {user.name} on top of {already}, {how}.")


def compare(vm: NewVm, charged: int, unsure: int, hidden: bool) -> tuple[bool | None, str]:
    """Whether the VM's limit allows for it on top of what is charged already, and the same in words.

    Whatever is charged is whole pages, so bytes compare just as in the kernel, which rounds the limit down to pages.
    """
    if not vm.known:
        return None, "it is held against a limit that is not known"
    if vm.limit is None:
        return True, "it has no limit to reach"
    best = vm.limit - charged - vm.least
    worst = vm.limit - charged - unsure - vm.most
    if best < 0:
        over = human_size(-best) if best == worst else f"at least {human_size(-best)}"
        return False, f"it is {over} over {vm.limited} and ends with -12 (Cannot allocate memory)"
    if worst < 0:
        return None, f"it may be anything from {human_size(best)} below to {human_size(-worst)} over {vm.limited}"
    if hidden:
        return None, f"it is within {vm.limited}, but processes that were not seen may be charged too"
    return True, f"it is within {vm.limited}"


def cure_by_mode(user: Owner, vm: NewVm) -> str:
    if user.name in LIBVIRT_USERS:
        how = (
            "which libvirt 12.1 or later does for devices with <driver name='vfio' iommufd='yes'/> if its daemon has"
            " CAP_SYS_RESOURCE"
        )
    else:
        how = "by setting rlimit_mode=process on its iommufd before its first device (virt.iommufd.iommufd_option)"
    short = vm.limit is not None and vm.limit < vm.most
    return f"have it charged for itself alone, {how}" + (f", with a limit of {vm.most} bytes or more" if short else "")


def cure_by_capability(path: str) -> str:
    return (
        f"give the VMM CAP_IPC_LOCK (setcap cap_ipc_lock+ep {path}), and with it the right to pin all memory to whoever"
        " may execute that"
    )


def cure_by_limit(limit: int, by_libvirt: bool, per_user: bool) -> str:
    how = f"LimitMEMLOCK={limit} in its unit"
    if by_libvirt:
        # With it libvirt caps all that the emulator uses, not only what is pinned.
        how = (
            f"<memtune><hard_limit unit='KiB'>{(limit + GIB) // 1024}</hard_limit></memtune> in the domain, 1 GiB of it"
            " for the emulator's own memory"
        )
    return f"raise its limit ({how})" + (", for this VM only, since the next one takes still more" if per_user else "")


def remedy(info: Info, user: Owner, vm: NewVm, strictest: Forecast, by_libvirt: bool) -> str:
    """What to change so that the VM fits whatever of the possible accountings it gets."""
    per_user = strictest.accounting == USER
    enough = vm.most + strictest.charged + (user.unsure if per_user else 0)
    cures = [cure_by_mode(user, vm)] if per_user else []
    cures.append(cure_by_capability(emulator(info, user)))
    # It may suffice already, but for processes that were not seen.
    if not vm.known or (vm.limit is not None and vm.limit < enough):
        cures.append(cure_by_limit(enough, by_libvirt, per_user))
    return f"To make it fit: {'; or '.join(cures)}."


def emulator(info: Info, user: Owner) -> str:
    """The path of the emulator that the VM is most likely to run in: the user's running ones, then x86-64.

    One that has CAP_IPC_LOCK already comes last. Without any, it is the one that the host would have.
    """
    running = {process["comm"] for process in info["processes"] if process["uid"] == user.uid}

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, bool, str]:
        path = row["path"]
        # The kernel keeps 15 characters of a name.
        return bool(row["cap_ipc_lock"]), basename(path)[:15] not in running, not path.endswith("x86_64"), path

    likely = min(candidates(info), key=rank, default=None)
    return f"/usr/bin/{qemu_for(info['host'].get('machine', 'x86_64'))}" if likely is None else str(likely["path"])


def what_would_tell(info: Info, user: Owner, vm: NewVm, forecasts: list[Forecast]) -> str:
    """What would make an uncertain answer certain; "" where nothing would."""
    ways = []
    if not vm.known:
        ways.append("give memlock: the domain's <hard_limit>, or LimitMEMLOCK of libvirt's daemon")
    if forecasts[0].accounting == USER and user.partly:
        ways.append("run virt.iommufd.iommufd_info as root (become: true) on the host itself, where it sees everything")
    exact, seen = vm._replace(most=vm.least), user._replace(hidden=False)
    told = [each.accounting for each in forecasts]
    if any(forecast(exact, seen, each).fits is not forecast(vm, seen, each).fits for each in told):
        ways.append("give the overhead, if it is known")
    if len(forecasts) > 1:
        ways.append("give the accounting of the VM")
    return f"To know for certain: {'; '.join(ways)}." if ways else ""


def answer(
    info: Any, memory: Any, user: Any, memlock: Any, vfio_devices: Any, viommu: Any, accounting: Any, overhead: Any
) -> dict[str, Any]:
    """What the filter returns."""
    info = checked(info)
    who = owner_of(info, user)
    vm = describe(info, size("memory", memory, 1), address_spaces(vfio_devices, viommu), memlock, overhead)
    accountings, why = possible(info, who, accounting)
    # With CAP_IPC_LOCK it does not matter.
    vm = vm._replace(known=accountings == [NONE] or knows_limit(info, who, memlock))
    forecasts = [forecast(vm, who, each) for each in accountings]
    strictest = forecasts[0]
    fits = strictest.fits if len({each.fits for each in forecasts}) == 1 else None
    reasons = [why, vm.pins, *(each.reason for each in forecasts)]
    if not vm.known:
        reasons.append(UNKNOWN_LIMIT)
    if info["host"].get("module") == "absent":
        reasons.append("Besides, this host's kernel has no iommufd.")
    limit = vm.limit if vm.known else None
    by_libvirt = memlock == "libvirt" or who.name in LIBVIRT_USERS
    advice = [] if fits else [remedy(info, who, vm, strictest, by_libvirt)]
    if fits is None:
        advice.insert(0, what_would_tell(info, who, vm, forecasts))
    return {
        "fits": fits,
        "accounting": strictest.accounting if len(forecasts) == 1 else None,
        "needed": vm.most,
        "charged": strictest.charged,
        "limit": limit,
        "headroom": None if limit is None or strictest.accounting == NONE else limit - strictest.charged,
        "reason": " ".join(filter(None, reasons)),
        "remedy": " ".join(filter(None, advice)) or None,
    }


def memlock_fit(
    info: Any,
    memory: Any,
    user: Any,
    memlock: Any = "libvirt",
    vfio_devices: Any = 1,
    viommu: Any = False,
    accounting: Any = "auto",
    overhead: Any = None,
) -> dict[str, Any]:
    """The answer, as the filter of that name returns it. Raises IommufdError where it is not given what it takes."""
    try:
        # The module gives printable texts. A host that is not to be trusted gives what it likes.
        return dict(harmless(answer(info, memory, user, memlock, vfio_devices, viommu, accounting, overhead)))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as exc:
        # After the checks above, only a return value that was put together by hand, or by another version.
        raise IommufdError(
            "The input is not what this version of virt.iommufd.iommufd_info returns: give what the task"
            f" registered. {type(exc).__name__}: {exc}"
        ) from exc
