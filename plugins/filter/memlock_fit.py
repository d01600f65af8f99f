# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter memlock_fit: from what iommufd_info returned, whether one more VM would start.

The functions are pure, and raise IommufdError with the text that a user reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os.path import basename
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.virt.iommufd.plugins.filter.iommufd_host_plan import own_emulators, qemu_for
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._foreign import harmless
from ansible_collections.virt.iommufd.plugins.module_utils._size import human_size, parse_size
from ansible_collections.virt.iommufd.plugins.plugin_utils._views import UNSEEN

DOCUMENTATION = r"""
name: memlock_fit
short_description: Tell whether one more VM would fit into its limit on pinned memory
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Tells from the return value of M(virt.iommufd.iommufd_info) alone whether one more VM with a passed-through device
    would start on that host as far as its limit on pinned memory goes, and why. If not, it tells what to change.
  - Sizes are numbers of bytes, or texts such as V(64G), V(64GiB), V(65536M) and V(1.5G). K, M, G, T, P and E count in
    1024s, as do KiB, MiB and so on; kB, MB and so on count in 1000s, as in libvirt. Case does not matter.
options:
  _input:
    description:
      - What M(virt.iommufd.iommufd_info) returned, with at least V(processes) and V(users) in its
        O(virt.iommufd.iommufd_info#module:gather_subset). With V(host), as by default, O(strategy=auto) knows more.
      - If its O(virt.iommufd.iommufd_info#module:users) was given, O(user) must be among them.
      - Best gathered as root. What the module could not see makes the answer uncertain.
    type: dict
    required: true
  memory:
    description: The memory of the VM, as a size.
    type: raw
    required: true
  user:
    description:
      - The user that the VMM will run as, by name or by id.
      - One that the input does not know is taken for a user to whom nothing is charged.
    type: raw
    required: true
  memlock:
    description:
      - The soft limit RLIMIT_MEMLOCK that the VMM will have, as a size.
      - V(unlimited) or V(infinity) for none.
      - V(libvirt) for what libvirt gives to a domain without C(<hard_limit>). That is O(memory), with O(viommu) times
        O(vfio_devices), and 1 GiB.
      - If O(user) is libvirt's, C(libvirt-qemu) or C(qemu), and libvirt is known not to set per-process accounting,
        V(libvirt) is a limit that is not known. libvirt raises it for a C(<hostdev>) only, and a domain that names
        iommufd in C(<qemu:commandline>) has that of libvirt's daemon. So give the C(<hard_limit>) of the domain, or
        C(LimitMEMLOCK) of the daemon. Only a VM with CAP_IPC_LOCK needs neither.
    type: raw
    default: libvirt
  vfio_devices:
    description: How many devices are passed through to the VM. The number matters only with O(viommu).
    type: int
    default: 1
  viommu:
    description:
      - Whether the VM has an IOMMU of its own. Each device then has an address space of its own, and the VM pins its
        memory once for each.
    type: bool
    default: false
  strategy:
    description:
      - How the VM will be accounted.
      - V(user) is what the kernel does if nobody sets anything.
      - V(process) is a VM whose iommufd is set so before its first device, as libvirt does since 12.1.
      - V(cap_ipc_lock) is a VMM that has CAP_IPC_LOCK.
      - V(auto) finds out. If all emulators for the host's own architecture have CAP_IPC_LOCK, so has the VM. If O(user)
        is libvirt's, C(libvirt-qemu) or C(qemu), and libvirt sets per-process accounting, the VM gets that. Otherwise
        it will be as all running VMs of O(user) are, or per user if there are none. If they differ, or not all of them
        were seen, it may be as any of them is, or per user.
      - Where the host has no emulator for its own architecture, or the input does not tell that, all of its emulators
        count.
      - Where that leaves several possibilities open, all are looked at, and the answer is definite if they agree.
    type: str
    choices:
      - auto
      - user
      - process
      - cap_ipc_lock
    default: auto
  overhead:
    description:
      - What the VM pins beyond its memory, such as firmware and video memory, in all of its address spaces, as a size.
      - If given, it is taken as exact. The sum with O(memory) is rounded up to whole pages. How large they are is in
        the input where V(host) was gathered; without it, pages may be of 4 to 64 KiB.
      - If not given, it may be anything up to the most that a running VM of the input pins beyond its memory, with
        O(viommu) times O(vfio_devices). VMs with more than one IOAS are left out, since they may have pinned their
        memory more than once, and so are those that pin over 1 GiB beyond it, which have rather got more memory since.
      - If no VM is left, it may be anything up to 1 GiB, which is what libvirt allows for.
    type: raw
notes:
  - The kernel does not publish what it has charged to a user. For per-user accounting this relies on the estimate
    RV(virt.iommufd.iommufd_info#module:users[].charged_bytes).
  - This is about the limit alone, not about whether the host has the memory and the devices.
seealso:
  - module: virt.iommufd.iommufd_info
    description: Returns what this filter takes.
  - plugin: virt.iommufd.audit_report
    plugin_type: filter
    description: Tells how the running VMs of many hosts are accounted.
"""

EXAMPLES = r"""
- name: Look at the host
  virt.iommufd.iommufd_info:
  register: info

- name: Fail unless another libvirt domain of 64 GiB is sure to start
  ansible.builtin.assert:
    that: fit.fits is true
    fail_msg: "{{ fit.reason }} {{ fit.remedy }}"
  vars:
    fit: "{{ info | virt.iommufd.memlock_fit(memory='64G', user='libvirt-qemu') }}"

- name: Report whether a VM in a unit with User=vmm and LimitMEMLOCK=66G would start
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(memory='64G', user='vmm', memlock='66G') }}"

- name: Report whether two devices and an IOMMU of its own would be too much for a VM that is charged for itself
  ansible.builtin.debug:
    msg: "{{ info | virt.iommufd.memlock_fit(memory='64G', user=64055, memlock='100G', **devices) }}"
  vars:
    devices:
      vfio_devices: 2
      viommu: true
      strategy: process
"""

RETURN = r"""
_value:
  description: The answer.
  type: dict
  contains:
    fits:
      description: Whether the VM would start. V(null) where that cannot be told.
      type: bool
      sample: false
    accounting:
      description:
        - How the VM would be accounted, V(user), V(process) or V(none), which is what CAP_IPC_LOCK leads to.
        - V(null) where several of them are possible. The numbers below are then those of the first that is.
      type: str
      sample: user
    needed:
      description: What the VM pins at most, in bytes.
      type: int
      sample: 69793218560
    charged:
      description: What is charged against the limit already, in bytes. For V(process) and V(none) that is 0.
      type: int
      sample: 67371008
    limit:
      description: The limit in bytes. V(null) where it is unlimited or not known.
      type: int
      sample: 69793218560
    headroom:
      description: What is left of the limit, in bytes. V(null) where it is unlimited, not known or not checked.
      type: int
      sample: 69725847552
    reason:
      description: Why, in sentences.
      type: str
      sample: >-
        The running VMs of libvirt-qemu are accounted per user. The VM pins 64 GiB and 1 GiB beyond that. Charged to
        libvirt-qemu on top of 64.2 MiB, it is 64.2 MiB over its limit of 65 GiB and ends with -12 (Cannot allocate
        memory).
    remedy:
      description: What would tell for certain, and what to change so that the VM fits. V(null) where it does.
      type: str
      sample: >-
        To make it fit: have it charged for itself alone, which libvirt 12.1 or later does for devices with <driver
        name='vfio' iommufd='yes'/> if its daemon has CAP_SYS_RESOURCE; or give the VMM CAP_IPC_LOCK (setcap
        cap_ipc_lock+ep /usr/bin/qemu-system-x86_64), and with it the right to pin all memory to whoever may execute
        that; or raise its limit (<memtune><hard_limit unit='KiB'>69271808</hard_limit></memtune> in the domain, 1 GiB
        of it for the emulator's own memory), for this VM only, since the next one takes still more.
"""

GIB = 2**30
# The smallest and the largest page that a Linux host with iommufd has.
PAGES = (2**12, 2**16)

# Users that distributions run the domains of the system libvirt as.
LIBVIRT_USERS = ("libvirt-qemu", "qemu")

# The accounting that each strategy leads to, the strictest first.
STRATEGIES = {"user": "user", "process": "process", "cap_ipc_lock": "none"}

# What the result of a task says where it has nothing to say of the host.
TROUBLES = ("unreachable", "failed", "skipped")

UNKNOWN_LIMIT = (
    "libvirt raises the limit for a <hostdev> only: a domain that names iommufd in <qemu:commandline> has the limit of"
    " libvirt's daemon, unless it has a <memtune><hard_limit>."
)

Info = Mapping[str, Any]


@dataclass(frozen=True)
class User:
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


@dataclass(frozen=True)
class Vm:
    """The VM that is asked about: what it pins at least and at most, its limit (None without), and these in words.

    Where the limit is not `known`, it is the one that libvirt would give for a <hostdev>.
    """

    least: int
    most: int
    pins: str
    limit: int | None
    limited: str
    known: bool = True


@dataclass(frozen=True)
class Verdict:
    """Whether the VM fits under one accounting, None where that cannot be told, and why."""

    accounting: str
    fits: bool | None
    charged: int
    reason: str


def check(info: Any) -> Info:
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


def find_user(info: Info, user: Any) -> User:
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
    return User(
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


def describe(info: Info, memory: int, times: int, memlock: Any, overhead: Any) -> Vm:
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
    return Vm(least, most, f"The VM pins {pins}.", *describe_limit(memory * times, memlock))


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


def knows_limit(info: Info, user: User, memlock: Any) -> bool:
    """Whether the VM's limit is known: the one of libvirt's for a <hostdev> is not had by a VM that uses none."""
    libvirt = info["host"].get("libvirt")
    for_hostdev = memlock == "libvirt" and user.name in LIBVIRT_USERS
    return not for_hostdev or libvirt is None or libvirt["sets_rlimit_mode"] is not False


def emulators(info: Info) -> list[Mapping[str, Any]]:
    """The host's emulators that a VM would run in: those for its own architecture, or all where none is known to be."""
    host = info["host"]
    present = [each for each in host.get("qemu", []) if each["present"]]
    own = own_emulators(host, [], host["machine"]) if present and "machine" in host else []
    return [each for each in present if each["path"] in own] or present


def possible(info: Info, user: User, strategy: Any) -> tuple[list[str], str]:
    """How the VM may be accounted, the strictest first, and why."""
    if strategy not in ("auto", *STRATEGIES):
        raise IommufdError(f"strategy: {strategy!r:.60} is unknown: give auto, {', '.join(STRATEGIES)}.")
    if strategy != "auto":
        return [STRATEGIES[strategy]], ""
    host = info["host"]
    if "qemu" not in host:
        accountings, why = from_processes(info, user)
        return accountings, f"The input lacks the subset host, which may tell more of the accounting. {why}"
    capable = {each["cap_ipc_lock"] for each in emulators(info)}
    if capable == {True}:
        return ["none"], "The host's emulators have CAP_IPC_LOCK."
    accountings, why = from_libvirt(host["libvirt"], user) or from_processes(info, user)
    if capable - {False} and "none" not in accountings:
        accountings.append("none")
        why = f"Some of the host's emulators have CAP_IPC_LOCK, or may have it, so the VM may too. {why}"
    return accountings, why


def from_libvirt(libvirt: Info, user: User) -> tuple[list[str], str] | None:
    """How the system libvirt has its VMs accounted; None where the VM is none of them, or libvirt leaves it alone."""
    if user.name not in LIBVIRT_USERS or libvirt["sets_rlimit_mode"] is False:
        return None
    if libvirt["sets_rlimit_mode"]:
        return ["process"], libvirt["reason"]
    return ["user", "process"], f"It is not known whether libvirt sets per-process accounting: {libvirt['reason']}"


def from_processes(info: Info, user: User) -> tuple[list[str], str]:
    """How the user's running VMs are accounted, else what the kernel does by itself."""
    shown = {process["accounting"] for process in info["processes"] if process["uid"] == user.uid}
    partly = user.partly or None in shown
    shown.discard(None)
    if shown and partly and shown != {"user"}:
        accountings = [each for each in STRATEGIES.values() if each in {*shown, "user"}]
        return (
            accountings,
            f"{user.name} may have other VMs than were seen whole, and the kernel's default is per user.",
        )
    if len(shown) == 1:
        (accounting,) = shown
        how = {"user": "are accounted per user", "process": "are accounted per process", "none": "have CAP_IPC_LOCK"}
        return [accounting], f"The running VMs of {user.name} {how[accounting]}."
    if shown:
        accountings = [each for each in STRATEGIES.values() if each in {*shown, "user"}]
        return (
            accountings,
            f"The running VMs of {user.name} differ in accounting, and the kernel's default is per user.",
        )
    if user.uid == 0 or user.name == "root":
        return ["user", "none"], "What root starts has CAP_IPC_LOCK, unless it is taken away, which libvirt does."
    return ["user"], f"No running VM of {user.name} shows its accounting, and the kernel's default is per user."


def judge(vm: Vm, user: User, accounting: str) -> Verdict:
    """Whether the VM fits under one accounting."""
    if accounting == "none":
        return Verdict(accounting, True, 0, "With CAP_IPC_LOCK nothing is charged and no limit is checked.")
    if accounting == "process":
        fits, how = compare(vm, 0, 0, False)
        return Verdict(accounting, fits, 0, f"Charged for itself alone, {how}.")
    fits, how = compare(vm, user.charged, user.unsure, user.hidden)
    already = human_size(user.charged) if user.charged or user.unsure else "nothing"
    already += f" to {human_size(user.charged + user.unsure)}" if user.unsure else ""
    return Verdict(accounting, fits, user.charged, f"Charged to {user.name} on top of {already}, {how}.")


def compare(vm: Vm, charged: int, unsure: int, hidden: bool) -> tuple[bool | None, str]:
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


def cure_by_mode(user: User, vm: Vm) -> str:
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


def remedy(info: Info, user: User, vm: Vm, strictest: Verdict, by_libvirt: bool) -> str:
    """What to change so that the VM fits whatever of the possible accountings it gets."""
    per_user = strictest.accounting == "user"
    enough = vm.most + strictest.charged + (user.unsure if per_user else 0)
    cures = [cure_by_mode(user, vm)] if per_user else []
    cures.append(cure_by_capability(emulator(info, user)))
    # It may suffice already, but for processes that were not seen.
    if not vm.known or (vm.limit is not None and vm.limit < enough):
        cures.append(cure_by_limit(enough, by_libvirt, per_user))
    return f"To make it fit: {'; or '.join(cures)}."


def emulator(info: Info, user: User) -> str:
    """The path of the emulator that the VM is most likely to run in: the user's running ones, then x86-64.

    One that has CAP_IPC_LOCK already comes last. Without any, it is the one that the host would have.
    """
    running = {process["comm"] for process in info["processes"] if process["uid"] == user.uid}

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, bool, str]:
        path = row["path"]
        # The kernel keeps 15 characters of a name.
        return bool(row["cap_ipc_lock"]), basename(path)[:15] not in running, not path.endswith("x86_64"), path

    likely = min(emulators(info), key=rank, default=None)
    return f"/usr/bin/{qemu_for(info['host'].get('machine', 'x86_64'))}" if likely is None else str(likely["path"])


def what_would_tell(info: Info, user: User, vm: Vm, verdicts: list[Verdict]) -> str:
    """What would make an uncertain answer certain; "" where nothing would."""
    ways = []
    if not vm.known:
        ways.append("give memlock: the domain's <hard_limit>, or LimitMEMLOCK of libvirt's daemon")
    if verdicts[0].accounting == "user" and user.partly:
        ways.append("run virt.iommufd.iommufd_info as root (become: true) on the host itself, where it sees everything")
    exact, seen = replace(vm, most=vm.least), replace(user, hidden=False)
    if any(judge(exact, seen, each.accounting).fits is not judge(vm, seen, each.accounting).fits for each in verdicts):
        ways.append("give the overhead, if it is known")
    if len(verdicts) > 1:
        ways.append("give the strategy by which the VM is accounted")
    return f"To know for certain: {'; '.join(ways)}." if ways else ""


def answer(
    info: Any, memory: Any, user: Any, memlock: Any, vfio_devices: Any, viommu: Any, strategy: Any, overhead: Any
) -> dict[str, Any]:
    """What the filter returns."""
    info = check(info)
    who = find_user(info, user)
    vm = describe(info, size("memory", memory, 1), address_spaces(vfio_devices, viommu), memlock, overhead)
    accountings, why = possible(info, who, strategy)
    # With CAP_IPC_LOCK it does not matter.
    vm = replace(vm, known=accountings == ["none"] or knows_limit(info, who, memlock))
    verdicts = [judge(vm, who, accounting) for accounting in accountings]
    strictest = verdicts[0]
    fits = strictest.fits if len({verdict.fits for verdict in verdicts}) == 1 else None
    reasons = [why, vm.pins, *(verdict.reason for verdict in verdicts)]
    if not vm.known:
        reasons.append(UNKNOWN_LIMIT)
    if info["host"].get("module") == "absent":
        reasons.append("Besides, this host's kernel has no iommufd.")
    limit = vm.limit if vm.known else None
    by_libvirt = memlock == "libvirt" or who.name in LIBVIRT_USERS
    advice = [] if fits else [remedy(info, who, vm, strictest, by_libvirt)]
    if fits is None:
        advice.insert(0, what_would_tell(info, who, vm, verdicts))
    return {
        "fits": fits,
        "accounting": strictest.accounting if len(verdicts) == 1 else None,
        "needed": vm.most,
        "charged": strictest.charged,
        "limit": limit,
        "headroom": None if limit is None or strictest.accounting == "none" else limit - strictest.charged,
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
    strategy: Any = "auto",
    overhead: Any = None,
) -> dict[str, Any]:
    """The filter: hands over, and turns what is wrong into what Ansible reports."""
    try:
        # The module gives printable texts. A host that is not to be trusted gives what it likes.
        return dict(harmless(answer(info, memory, user, memlock, vfio_devices, viommu, strategy, overhead)))
    except IommufdError as exc:
        raise AnsibleFilterError(f"memlock_fit: {exc}") from exc
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as exc:
        # After the checks above, only a return value that was put together by hand, or by another version.
        raise AnsibleFilterError(
            "memlock_fit: The input is not what this version of virt.iommufd.iommufd_info returns: give what the task"
            f" registered. {type(exc).__name__}: {exc}"
        ) from exc


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"memlock_fit": memlock_fit}
