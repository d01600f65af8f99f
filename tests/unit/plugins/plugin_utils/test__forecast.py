# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What memlock_forecast answers. That a VM alone is judged as memlock_fit judges it is what the last tests hold."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.plugin_utils import _forecast
from ansible_collections.virt.iommufd.plugins.plugin_utils._fit import memlock_fit
from ansible_collections.virt.iommufd.plugins.plugin_utils._fit_case import new_vm
from ansible_collections.virt.iommufd.plugins.plugin_utils._forecast import KINDS, memlock_forecast
from ansible_collections.virt.iommufd.plugins.plugin_utils._order import at_least_fail, at_most_fail, before_each
from ansible_collections.virt.iommufd.tests.unit.filter_docs import documented_fields
from ansible_collections.virt.iommufd.tests.unit.fit_rows import (
    GIB,
    MIB,
    PINNED,
    Row,
    by_container,
    by_qemu,
    defined,
    defined_unit,
    device,
    emulator,
    host,
    idle,
    info,
    iommufds,
    libvirt,
    native,
    of_vm,
    older,
    process,
    session,
    unit,
    unseen,
    user,
)


def of(*rows: Row, **fields: Any) -> Row:
    """What the module returned on a host where nothing runs, with these VMs defined."""
    return idle(**{"host": native(), "defined": list(rows), **fields})


def starts(data: Row, kind: str = "reboot", **given: Any) -> list[Any]:
    """Whether each would start, "-" where that is not asked."""
    return ["-" if each[kind] is None else each[kind]["starts"] for each in memlock_forecast(data, **given)["vms"]]


def units(*sizes: int, limit: int = 66, **fields: Any) -> list[Row]:
    """Units of user vm with so many GiB each, u0.service and so on."""
    return [
        defined_unit(name=f"u{n}.service", memory_bytes=size * GIB, memlock_bytes=limit * GIB, **fields)
        for n, size in enumerate(sizes)
    ]


def by_commandline(limit: int | None, **fields: Any) -> Row:
    """A domain whose iommufd libvirt does not see."""
    hard = None if limit is None else limit * GIB
    return defined(**{"devices": [by_qemu()], "libvirt_counts": 0, "hard_limit_bytes": hard, **fields})


OLDER: Row = {"host": host()}
BARRED: Row = {"host": native(cap_sys_resource=False, starts_iommufd_domains=False)}
BARS: Row = libvirt(cap_sys_resource=False, sets_rlimit_mode=False, starts_iommufd_domains=False)
MAY: Row = libvirt(cap_sys_resource=None, sets_rlimit_mode=None, starts_iommufd_domains=None)
GRANTED: Row = {"host": host(qemu=[emulator(True)])}
HIDDEN: Row = {"host": native()}
HIDDEN["host"]["limits_of_view"] = unseen("processes")
LEFT: Row = {"host": native()}
LEFT["host"]["limits_of_view"] = unseen("charges")
SCRIPT = ["vm1.service starts /usr/local/bin/vm, a script that is not read."]
EXEC = [by_qemu("process")]
OF_USER: Row = {"manager": "session", "user": "vm", "uid": 1001}
BOTH = [by_container(), by_qemu("process")]
QEMU_11: Row = {"host": native()}
QEMU_11["host"]["qemu"] = [emulator(False, version="11.1.0")]

# What is defined, what else is told of the host, whether each would start now, and after a reboot.
CASES: list[tuple[str, list[Row], Row, list[Any], list[Any]]] = [
    ("a domain that libvirt has charged for itself", [defined()], {}, [True], [True]),
    ("many of them", [defined(name=str(n)) for n in range(9)], {}, [True] * 9, [True] * 9),
    ("one that does not start at boot", [defined(autostart=False)], {}, [True], ["-"]),
    ("two of a user, with room for one", units(60, 60), {}, [True] * 2, [None] * 2),
    ("two of a user, with room for two", units(60, 60, limit=122), {}, [True] * 2, [True] * 2),
    ("another one of two users", [*units(60), defined_unit(user="x", uid=1002)], {}, [True] * 2, [True] * 2),
    ("what fails anyway charges nobody", units(70, 60), {}, [False, True], [False, True]),
    ("a small one beside a large one", units(60, 1, limit=63), {}, [True] * 2, [True] * 2),
    (
        "the second starts after the first",
        [units(60)[0], defined_unit(order=["u0.service"])],
        {},
        [True] * 2,
        [True, False],
    ),
    (
        "in their order, and the first may not come",
        [*units(60, autostart=None), defined_unit(order=["u0.service"])],
        {},
        [True] * 2,
        [True, None],
    ),
    (
        "in a circle there is no order",
        [*units(60, order=["vm1.service"]), defined_unit(order=["u0.service"])],
        {},
        [True] * 2,
        [None] * 2,
    ),
    (
        "after one that fails",
        [*units(70), defined_unit(order=["u0.service"])],
        {},
        [False, True],
        [False, True],
    ),
    ("it may not come at boot", [*units(60), *units(60, autostart=None)], {}, [True] * 2, [None] * 2),
    ("a <hard_limit> that is enough", [by_commandline(70)], {}, [True], [True]),
    ("one for two, by the same user", [by_commandline(70), by_commandline(70)], {}, [True] * 2, [None] * 2),
    ("one that is too small", [by_commandline(60)], {}, [False], [False]),
    ("the limit of libvirt's daemon", [by_commandline(None)], {}, [False], [False]),
    ("<locked/>", [defined(libvirt_locks=True)], {}, [True], [True]),
    ("it locks memory, which libvirt does not know", [defined(locks_memory=True)], {}, [False], [False]),
    ("it is not known whether it locks memory", [defined(locks_memory=None)], {}, [None], [None]),
    ("a session, whose hard limit is systemd's", [defined(**OF_USER)], {}, [False], [False]),
    (
        "a session with a larger limit",
        [defined(**OF_USER)],
        {"host": native(sessions=[session(70 * GIB)])},
        [True],
        [True],
    ),
    (
        "two of that session",
        [defined(**OF_USER), defined(**OF_USER)],
        {"host": native(sessions=[session(70 * GIB)])},
        [True] * 2,
        [None] * 2,
    ),
    ("a session with a <hard_limit>", [defined(hard_limit_bytes=GIB, **OF_USER)], {}, [False], [False]),
    (
        "a session that is given an iommufd",
        [defined(fdgroup="iommu", **OF_USER)],
        {"host": native(sessions=[session(64 * GIB + 512 * MIB)])},
        [False],
        [False],
    ),
    ("both backends, in a domain", [defined(devices=[device(), by_container()])], {}, [False], [False]),
    ("both, with the QEMU that ends that", [defined_unit(devices=BOTH)], QEMU_11, [False], [False]),
    ("both, and a limit for both", [defined_unit(devices=BOTH, memlock_bytes=133 * GIB)], {}, [True], [True]),
    ("the legacy container alone", [defined(devices=[by_container()])], OLDER, [True], [True]),
    (
        "a vIOMMU, for which libvirt counts each device",
        [defined(devices=[device()] * 2, viommu="each", libvirt_counts=2)],
        {},
        [True],
        [True],
    ),
    ("one that libvirt does not see", [defined(devices=[device()] * 2, viommu="each")], {}, [False], [False]),
    ("it is not known whether it has one", [defined(devices=[device()] * 2, viommu=None)], {}, [None], [None]),
    ("vDPA alone", [defined(devices=[device("vdpa", "")])], {}, [True], [True]),
    ("vDPA, whatever the capability", [defined_unit(devices=[*EXEC, device("vdpa", "")])], {}, [False], [False]),
    ("vDPA, whose order is not known", [defined(devices=[device(), device("vdpa", "")])], {}, [None], [None]),
    ("an mdev pins as it runs", [defined_unit(devices=[by_qemu("process", as_it_runs=True)])], {}, [True], [True]),
    (
        "and may fail later",
        [defined_unit(devices=[by_qemu("process", as_it_runs=True)], memlock_bytes=GIB)],
        {},
        [None],
        [None],
    ),
    ("a daemon that may not", [defined()], BARRED, [False], [False]),
    # It was started before its unit was hardened, or mended.
    ("a daemon that will not", [defined()], {"host": native(at_boot=BARS)}, [True], [False]),
    ("a daemon that may then", [defined()], {"host": host(libvirt={**BARS, "at_boot": MAY})}, [False], [None]),
    ("it may start others", [defined(devices=[by_container()], libvirt_counts=0)], BARRED, [False], [False]),
    ("a libvirt that is older", [defined()], OLDER, [True], [True]),
    ("a QEMU with the capability", [by_commandline(1), by_commandline(1)], GRANTED, [None] * 2, [None] * 2),
    ("iommufd-exec in front", units(60, 60, devices=EXEC), {}, [True] * 2, [True] * 2),
    ("and too small a limit", units(66, devices=EXEC), {}, [None], [None]),
    ("root", [defined_unit(user="root", uid=0, cap_ipc_lock=True, memlock_bytes=1)], {}, [True], [True]),
    ("root without", [defined_unit(user="root", uid=0, cap_ipc_lock=False, memlock_bytes=1)], {}, [False], [False]),
    (
        "root, and nobody knows",
        [defined_unit(user="root", uid=0, cap_ipc_lock=None, memlock_bytes=1)],
        {},
        [None],
        [None],
    ),
    ("an ambient capability", units(90, 90, cap_ipc_lock=True), {}, [True] * 2, [True] * 2),
    ("as the emulator's file says", units(90, 90, cap_ipc_lock=None), GRANTED, [True] * 2, [True] * 2),
    ("it is not known", units(90, cap_ipc_lock=None, emulator="/opt/vmm"), {}, [None], [None]),
    ("a unit without a limit", units(90, 90, memlock_unlimited=True), {}, [True] * 2, [True] * 2),
    ("one whose limit is not known", [defined_unit(memlock_bytes=None)], {}, [None], [None]),
    ("a script that is not read", [defined_unit(unread=SCRIPT)], {}, [None], [None]),
    ("what systemd has not read", [defined_unit(unread_at_boot=SCRIPT)], {}, [True], [None]),
    ("what others may have", [*units(60), defined_unit(unread_at_boot=SCRIPT)], {}, [True, True], [None, None]),
    ("its user is known", [*units(60), defined(unread_at_boot=SCRIPT)], {}, [True, True], [True, None]),
    (
        "whose user may be another one by then",
        [*units(60), defined_unit(user="x", uid=7, unread_at_boot=SCRIPT, changed=True)],
        {},
        [True, True],
        [None, None],
    ),
    ("which others may depend on", [*units(60), defined_unit(unread=SCRIPT)], {}, [True, None], [None, None]),
    ("others of another user do not", [*units(60), defined(unread=SCRIPT)], {}, [True, None], [True, None]),
    (
        "unless nobody knows whose it is",
        [*units(60), defined_unit(user=None, uid=None, unread=SCRIPT)],
        {},
        [True, None],
        [None, None],
    ),
    ("not all of it read, and refused anyway", [defined(unread=["This is why."])], BARRED, [False], [False]),
    ("a memory that was not read", [defined(memory_bytes=None)], {}, [None], [None]),
    ("which does not matter", [defined_unit(memory_bytes=None, memlock_unlimited=True)], {}, [True], [True]),
    ("which does", [defined_unit(memory_bytes=None, memlock_bytes=0)], {}, [None], [None]),
    ("nor does it without a device", [defined(memory_bytes=None, devices=[], libvirt_counts=0)], {}, [True], [True]),
    ("no device at all", [defined(devices=[], libvirt_counts=0)], {}, [True], [True]),
    ("memory that QEMU maps later or never", [by_commandline(60, elastic_bytes=32 * GIB)], {}, [None], [None]),
    ("a kernel without iommufd", [defined()], {"host": native() | {"module": "absent"}}, [False], [False]),
    ("hidden processes", units(60), HIDDEN, [None], [True]),
    ("hidden ones do not matter to others", [defined()], HIDDEN, [True], [True]),
    ("charges of VMs that have ended", units(60), LEFT, [None], [True]),
    (
        "uncertain charges",
        units(60),
        {"users": [of_vm(charged=0, unsure=10 * GIB)]},
        [None],
        [True],
    ),
    (
        "others of its user that run and are not defined",
        units(60),
        {"processes": [unit(pid=7)], "users": [of_vm(charged=10 * GIB)]},
        [False],
        [True],
    ),
    (
        "more iommufds than are counted",
        [defined_unit(devices=[device("iommufd", str(n)) for n in range(9)])],
        {},
        [None],
        [None],
    ),
]


@pytest.mark.parametrize(("rows", "fields", "now", "reboot"), [pytest.param(*each[1:], id=each[0]) for each in CASES])
def test_which_would_start(rows: list[Row], fields: Row, now: list[Any], reboot: list[Any]) -> None:
    data = of(*rows, **fields)
    assert (starts(data, "now"), starts(data)) == (now, reboot)
    answer = memlock_forecast(data)
    for told in (each[kind] for each in answer["vms"] for kind in ("now", "reboot") if each[kind]):
        assert told["starts"] is None or told["question"] is None
        assert told["starts"] is not None or told["question"]
        assert told["reason"] or not rows[0]["devices"]


def test_a_unit_whose_memory_is_limited() -> None:
    """All of a VM counts there, and the emulator's own memory, as in a domain's <hard_limit>."""
    for most, expected in ((66 * GIB, True), (66 * GIB - 1, None), (40 * MIB, None), (None, True)):
        for row in (defined_unit(memlock_unlimited=True), defined_unit(), *units(64, devices=EXEC)):
            data = of(row | {"hard_limit_bytes": most})
            assert (starts(data, "now"), starts(data)) == ([expected], [expected])
    [told] = [each["now"] for each in memlock_forecast(of(defined_unit(hard_limit_bytes=GIB)))["vms"]]
    assert "MemoryMax= is the limit of its control group, too" in told["reason"]
    assert "into what MemoryMax= leaves beside the guest's?" in told["question"]
    kib = 66 * MIB
    how = f"let its control group use {kib} KiB (MemoryMax= of its unit or of its slices, whichever is less)"
    assert told["question"].endswith(f"Raise it to {kib} KiB.")
    assert told["remedy"] == f"To make it fit: {how}."
    # Where its limit on locked memory is too small, too, that is false, and both are to be raised.
    small = defined_unit(hard_limit_bytes=GIB, memlock_bytes=GIB)
    [told] = [each["now"] for each in memlock_forecast(of(small))["vms"]]
    assert told["starts"] is False
    assert told["remedy"].startswith(f"To make it fit: {how}, and raise its limit (LimitMEMLOCK={65 * GIB} in its unit")


def test_a_unit_in_a_slice_whose_memory_is_limited() -> None:
    """Whoever is ended there, nothing that is told of the unit itself settles it, but its limit may be too small."""
    [told] = [each["now"] for each in memlock_forecast(of(defined_unit(memory_max_shared=True)))["vms"]]
    assert "It is in a slice with MemoryMax=, and what the others in it use is not looked at." in told["reason"]
    assert told["question"].startswith("Is there room for it in the slices that it is in")
    for limit, expected in ({"memlock_unlimited": True}, None), ({"memlock_bytes": GIB}, False), ({}, None):
        data = of(defined_unit(**{**limit, "memory_max_shared": True}))
        assert (starts(data, "now"), starts(data)) == ([expected], [expected])
        assert starts(data, known={"vm1.service": {"overhead": "256K", "locked": 0}}) == [expected]
        assert starts(of(defined_unit(**limit))) == [expected is None]


def test_a_launcher_that_its_unit_keeps_from_something() -> None:
    """Without the capability it leaves the mode as it is, which counts beside others, or it ends."""
    lacks: Row = {"launcher_lacks": ["cap_sys_resource"]}
    data = of(defined_unit(**lacks), users=[of_vm(charged=10 * GIB)])
    [told] = [each["now"] for each in memlock_forecast(data)["vms"]]
    assert (told["starts"], told["counter"]) == (False, "user")
    assert (
        "iommufd-exec has no CAP_SYS_RESOURCE from its unit, and leaves its iommufd in the mode user." in told["reason"]
    )
    assert "give iommufd-exec CAP_SYS_RESOURCE (AmbientCapabilities=CAP_SYS_RESOURCE in its unit" in told["remedy"]
    why = "iommufd-exec ends without starting it."
    for row in (defined_unit(launcher_ends=why, **lacks), defined_unit(launcher_ends=why, unread=SCRIPT, **lacks)):
        [told] = [each["reboot"] for each in memlock_forecast(of(row))["vms"]]
        assert told["starts"] is False
        assert told["reason"].startswith(why)
        assert told["remedy"].startswith("To have it started: give iommufd-exec CAP_SYS_RESOURCE (Ambient")
    # Where it is for another reason, no capability helps.
    [told] = [each["now"] for each in memlock_forecast(of(defined_unit(launcher_lacks=[], launcher_ends=why)))["vms"]]
    assert (told["starts"], told["remedy"]) == (False, None)
    # What it does not start charges nobody.
    assert starts(of(defined_unit(launcher_ends=why, **lacks), *units(60))) == [False, True]


def summary(*rows: Row, kind: str = "reboot", **fields: Any) -> Row:
    """What one kind comes to."""
    counts: Row = memlock_forecast(of(*rows, **fields))[kind]
    return counts


def test_five_alike_with_room_for_two() -> None:
    """libvirt starts one after the other, units start side by side, and may all fail then."""
    domains = [by_commandline(140, name=str(n)) for n in range(5)]
    assert summary(*domains) == {
        "of": 5,
        "true": 0,
        "false": 0,
        "unknown": 5,
        "at_least": 3,
        "at_most": 3,
        "summary": "3 of 5 VMs would not come back after a reboot; which depends on the order",
    }
    told = summary(*units(64, 64, 64, 64, 64, limit=140))
    assert (told["at_least"], told["at_most"]) == (3, 5)
    assert told["summary"] == "3 to 5 of 5 VMs would not come back after a reboot; which depends on the order"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "No VM starts at boot"),
        ([defined(autostart=False)], "No VM starts at boot"),
        ([defined()], "0 of 1 VM would not come back after a reboot"),
        (units(70, 60), "1 of 2 VMs would not come back after a reboot"),
        # A user's own libvirt need not be started at boot.
        ([by_commandline(70, **OF_USER)] * 2, "2 of 2 VMs would not come back after a reboot"),
        # What may not come at boot fails for nobody.
        ([*units(60), *units(60, autostart=None)], "0 to 2 of 2 VMs would not come back after a reboot"),
        ([defined_unit(unread=SCRIPT)], "0 to 1 of 1 VM would not come back after a reboot"),
    ],
)
def test_the_summary(rows: list[Row], expected: str) -> None:
    assert summary(*rows)["summary"] == expected


JOBS = [
    [(2, 4)] * 5,
    [(1, 9), (4, 5), (3, 4), (2, 8)],
    [(3, 3), (3, 6), (3, 9)],
    [(5, 5), (1, 5), (1, 5), (1, 5)],
    [(0, 99), (4, 4), (4, 4)],
    [(1, 1)],
    [],
]


@pytest.mark.parametrize("jobs", JOBS)
def test_how_many_fail_in_the_best_and_the_worst_order(jobs: list[tuple[int, int]]) -> None:
    def fail(order: tuple[tuple[int, int], ...]) -> int:
        sum_ = failed = 0
        for amount, takes in order:
            fits = sum_ + amount <= takes
            sum_ += amount if fits else 0
            failed += not fits
        return failed

    outcomes = [fail(each) for each in permutations(jobs)]
    assert at_least_fail(jobs) == min(outcomes)
    assert at_most_fail(jobs) >= max(outcomes)
    if len(set(jobs)) <= 1:
        assert at_most_fail(jobs) == max(outcomes)


def test_what_starts_after_what() -> None:
    chain = before_each([("c", ["b"]), ("b", ["a", "elsewhere"]), ("a", []), ("x", ["y"]), ("y", ["x"]), ("z", ["z"])])
    assert [sorted(before) for before, _after in chain] == [[1, 2], [2], [], [], [], []]
    assert [sorted(after) for _before, after in chain] == [[], [0], [0, 1], [], [], []]


def running(name: str, pid: int, **fields: Any) -> tuple[Row, Row]:
    """A unit of 60 GiB that runs, as it is defined and as a process."""
    its: Row = {"memory_bytes": 60 * GIB, "pinned_bytes": 60 * GIB, "memlock_bytes": 66 * GIB}
    row = unit(**{"pid": pid, "unit": f"{name}.service", **its, **fields})
    return defined_unit(name=f"{name}.service", memory_bytes=60 * GIB, pid=pid), row


def test_what_a_vm_that_runs_has_charged_is_not_in_its_own_way() -> None:
    (one, row), (other, _none) = running("a", 7), running("b", 8)
    other["pid"] = None
    data = of(one, other, processes=[row], users=[of_vm(charged=60 * GIB)])
    assert starts(data, "now") == [True, False]
    assert [each["running"] for each in memlock_forecast(data)["vms"]] == [True, False]


def test_what_a_start_or_growth_does_to_others_of_the_user() -> None:
    (one, row), (two, second) = running("a", 7), running("b", 8)
    third = defined_unit(name="c.service", memory_bytes=GIB, memlock_bytes=200 * GIB)
    row["memlock_bytes"], second["memlock_bytes"] = 120 * GIB, 150 * GIB
    data = of(one, two, third, processes=[row, second], users=[of_vm(charged=120 * GIB)])
    vms = memlock_forecast(data, grow={"memory": "8G"}, move_to="iommufd")["vms"]
    told = {
        kind: ["(7)" in " ".join(each[kind]["prerequisites"]) if each[kind] else None for each in vms]
        for kind in ("now", "grown", "reboot", "moved")
    }
    # What runs now is started anew by then.
    nobody = [False, False, False]
    assert told == {"now": [False, False, True], "grown": [False, True, None], "reboot": nobody, "moved": nobody}


@pytest.mark.parametrize(
    ("fields", "unsure"),
    [
        pytest.param({"accounting": None}, 60, id="it is not known whether it is charged"),
        pytest.param({"backends": ["legacy"]}, 60, id="what it has pinned is something else"),
        pytest.param({"accounting": "user", "backends": ["iommufd", "vdpa"]}, 60, id="some of it is"),
        pytest.param({"holder": True}, 0, id="it is no VM"),
        pytest.param({"accounting": "none"}, 0, id="it is not charged"),
    ],
)
def test_nor_is_what_it_may_have_charged(fields: Row, unsure: int) -> None:
    one, row = running("a", 7, **{"accounting": "process", **fields})
    data = of(one, processes=[row], users=[of_vm(charged=0, unsure=unsure * GIB)])
    assert starts(data, "now") == [True]
    # What others may have charged is.
    data["users"] = [of_vm(charged=0, unsure=(unsure + 60) * GIB)]
    assert starts(data, "now") == [None]


def test_of_one_with_iommufds_of_both_modes_it_is_what_it_has_not_locked() -> None:
    mixed = [*iommufds(1), *iommufds(1, mode="process")]
    one, row = running("a", 7, accounting=None, iommufds=mixed, locked_bytes=20 * GIB)
    data = of(one, processes=[row], users=[of_vm(charged=40 * GIB)])
    assert starts(data, "now") == [True]


@pytest.mark.parametrize(
    ("limits", "pids", "now"),
    [([], None, False), (unseen("descriptors"), None, None), ([], [4], None)],
)
def test_a_vm_that_is_not_among_the_processes(limits: list[Row], pids: Any, now: Any) -> None:
    """It holds nothing that pins, where all were seen."""
    one, _row = running("a", 7)
    data = of(one, users=[of_vm(charged=60 * GIB)], narrowed={"pids": pids, "uids": None})
    data["host"]["limits_of_view"] = limits
    assert starts(data, "now") == [now]


def test_what_somebody_has_set_of_a_vm_that_runs_does_not_outlast_it() -> None:
    pairs = [
        running(name, pid, accounting="process", iommufds=iommufds(1, mode="process"))
        for name, pid in (("a", 7), ("b", 8))
    ]
    data = of(*(each for each, _row in pairs), processes=[row for _each, row in pairs])
    assert starts(data, "now") == [True, True]
    assert starts(data) == [None, None]
    told = memlock_forecast(data)
    assert told["reboot"]["summary"].startswith("1 to 2 of 2 VMs would not come back after a reboot")
    assert told["vms"][0]["reboot"]["question"] == "Which VMs of user vm start first? That is not known."
    # Where nobody knows who opens it, those that run show nothing.
    of_others = [{**each, "devices": [by_qemu(None)], "memlock_bytes": 61 * GIB} for each, _row in pairs]
    data["defined"] = of_others
    assert {each["reboot"]["accounting"] for each in memlock_forecast(data)["vms"]} == {None}
    assert starts(data) == [None, None]


@pytest.mark.parametrize(("short", "fits"), [(0, True), (1, False)])
def test_the_memory_of_a_unit_is_what_its_command_line_makes_of_it(short: int, fits: bool) -> None:
    """A memory backend is not rounded up as -m is, and of it whole pages are pinned."""
    size = 70000000
    data = of(defined_unit(memory_bytes=size, memlock_bytes=size // 4096 * 4096 + 2**18 - short))
    assert starts(data, known={"vm1.service": {"overhead": "256K"}}) == [fits]


def test_a_session_is_given_an_iommufd_whose_mode_is_not_known() -> None:
    row = process(uid=1001, user="vm", domain_uri="qemu:///session", accounting="process")
    given = defined(fdgroup="iommu", **OF_USER)
    data = of(given, given, processes=[row], host=native(sessions=[session(70 * GIB)]))
    assert starts(data) == [None, None]
    assert memlock_forecast(data)["vms"][0]["reboot"]["accounting"] is None


def test_after_a_move() -> None:
    """Those that run or start at boot start together. Of domains, libvirt sets the mode where it can."""
    by_legacy = defined(devices=[by_container()], autostart=False, pid=9)
    of_unit = units(60, 60, devices=[by_container()])
    idle_one = defined(devices=[by_container()], autostart=False)
    data = of(by_legacy, *of_unit, idle_one)
    assert starts(data, "reboot") == ["-", True, True, "-"]
    assert starts(data, "moved", move_to="iommufd") == [True, None, None, "-"]
    told = memlock_forecast(data, move_to="iommufd")
    assert told["moved"]["summary"].startswith("1 to 2 of 3 VMs would not start once all are had by iommufd")
    remedy = told["vms"][1]["moved"]["remedy"]
    assert "raise its limit (LimitMEMLOCK=" in remedy
    assert "rlimit_mode=process" in remedy
    assert told["vms"][0]["moved"]["accounting"] == "process"
    assert memlock_forecast(data)["moved"] is None


def test_what_runs_has_moved_too() -> None:
    pairs = [running(name, pid) for name, pid in (("a", 7), ("b", 8))]
    rows = [{**each, "autostart": False, "memlock_bytes": 122 * GIB} for each, _row in pairs]
    data = of(*rows, processes=[row for _each, row in pairs], users=[of_vm(charged=120 * GIB)])
    assert starts(data, "moved", move_to="iommufd") == [True, True]
    # What others have charged stays.
    data["users"] = [of_vm(charged=150 * GIB)]
    assert starts(data, "moved", move_to="iommufd") == [None, None]


@pytest.mark.parametrize(("exec_", "accounting"), [(True, "process"), (False, "user")])
def test_a_unit_joins_the_iommufd_that_it_has(exec_: bool, accounting: str) -> None:
    devices = [by_container(), *(EXEC if exec_ else [])]
    told = memlock_forecast(of(defined_unit(devices=devices)), move_to="iommufd")["vms"][0]["moved"]
    assert (told["starts"], told["accounting"]) == (True, accounting)


def test_a_disk_keeps_its_container() -> None:
    disk = device("legacy", "nvme 0")
    told = memlock_forecast(of(defined_unit(devices=[by_container(), disk])), move_to="iommufd")["vms"][0]
    assert told["moved"]["starts"] is True
    assert told["moved"]["counter"] in ("user", "mm_locked")


@pytest.mark.parametrize(("its", "there"), [(native(), False), (host(), True), (host(libvirt=None), True)])
def test_a_libvirt_that_ignores_the_move(its: Row, there: bool) -> None:
    told = memlock_forecast(of(defined(devices=[by_container()]), host=its), move_to="iommufd")["vms"][0]["moved"]
    assert any("libvirt 12.1 or later" in each for each in told["prerequisites"]) is there
    # Of a domain that has nothing to move, nothing is said.
    other = memlock_forecast(of(defined(), host=its), move_to="iommufd")["vms"][0]["moved"]
    assert not any("libvirt 12.1 or later" in each for each in other["prerequisites"])


GROWS: Row = {"grow": {"memory": "64M"}}


def test_what_each_vm_that_runs_can_get() -> None:
    rows = [
        defined(pid=4242),
        defined(name="vm2", pid=None),
        defined(name="vm3", pid=5),
    ]
    data = of(*rows, processes=[process(memlock_bytes=PINNED + 64 * MIB, accounting="process")])
    data["processes"][0]["iommufds"] = iommufds(1, mode="process")
    data["processes"][0]["locked_bytes"] = PINNED
    told = memlock_forecast(data, **GROWS)
    assert [each["grown"] and each["grown"]["starts"] for each in told["vms"]] == [True, None, None]
    assert told["vms"][1]["grown"] is None
    assert told["vms"][2]["grown"]["reason"].startswith("Its process 5 is not among those")
    assert told["grown"]["summary"] == "0 to 1 of 2 VMs could not grow by that"
    alone = memlock_fit(data, grow={"vm": "4242", "memory": "64M"})
    assert told["vms"][0]["grown"]["reason"] == alone["reason"]
    device_ = memlock_forecast(data, grow={"devices": [{"backend": "legacy"}]})["vms"][0]["grown"]
    assert device_["starts"] == memlock_fit(data, grow={"vm": "4242", "devices": [{"backend": "legacy"}]})["fits"]


def test_a_name_leads_to_no_other_process() -> None:
    data = of(defined(name="vm1", pid=7), processes=[process(pid=8, domain="7"), process(pid=7, domain="vm1")])
    assert "as process 7." in memlock_forecast(data, **GROWS)["vms"][0]["grown"]["reason"]


def test_which_would_survive_a_live_update() -> None:
    one, row = running("a", 7, pinned_bytes=60 * GIB)
    data = of(one, processes=[row], users=[of_vm(charged=60 * GIB)])
    told = memlock_forecast(data, live_update=True)
    answer = told["vms"][0]["live_update"]
    assert (answer["starts"], answer["charged_bytes"], answer["needed_bytes"]) == (False, 60 * GIB, 60 * GIB)
    assert "the new process ends" in answer["reason"]
    assert f"a limit of {120 * GIB} bytes, and the one that runs, too (prlimit --pid 7" in answer["remedy"]
    assert told["live_update"]["summary"] == "1 of 1 VM would not survive a live update"
    assert memlock_forecast(data, live_update="no")["live_update"] is None
    for enough, survives in ((120 * GIB - 1, False), (120 * GIB, True)):
        data = of(one, processes=[{**row, "memlock_bytes": enough}], users=[of_vm(charged=60 * GIB)])
        assert memlock_forecast(data, live_update=True)["vms"][0]["live_update"]["starts"] is survives


def test_what_only_this_boot_has() -> None:
    told = memlock_forecast(of(defined(), defined(devices=[], libvirt_counts=0), defined_unit()))["vms"]
    assert told[0]["now"]["prerequisites"] == []
    # Whether the daemon starts at boot is not looked at.
    by_daemon, *_others = told[0]["reboot"]["prerequisites"]
    assert by_daemon.startswith("libvirt starts it once its daemon runs: see that virtqemud.service itself starts")
    assert "What only this boot has is not known" in told[0]["reboot"]["prerequisites"][1]
    assert told[1]["reboot"]["prerequisites"] == [by_daemon]
    assert by_daemon not in told[2]["reboot"]["prerequisites"]


def test_what_runs_and_is_in_no_definition_may_be_there_after_a_reboot() -> None:
    """As a unit of the user's own service manager."""
    stray = process(pid=7, name="au.service", user="vm", uid=1001, accounting="user")
    sums = [user(user="vm", uid=1001, charged_bytes=PINNED)]
    wide, tight = units(64, limit=66), units(64, limit=65)
    alone, short = (memlock_forecast(of(*rows, processes=[stray], users=sums)) for rows in (wide, tight))
    assert short["vms"][0]["reboot"]["starts"] is None
    assert short["vms"][0]["reboot"]["question"] == (
        "Does au.service (7) of user vm start at boot, too? It runs, and is in no definition that was read."
    )
    assert alone["vms"][0]["reboot"]["starts"] is True
    assert memlock_forecast(of(*tight))["vms"][0]["reboot"]["starts"] is True
    # What is defined is reckoned by its definition.
    known = of(*tight, defined_unit(name="au.service", pid=7, autostart=False), processes=[stray], users=sums)
    assert memlock_forecast(known)["vms"][0]["reboot"]["starts"] is True


def test_what_was_not_understood_is_told_and_asked() -> None:
    told = memlock_forecast(of(defined_unit(unread=SCRIPT)))["vms"][0]
    assert told["now"]["reason"].startswith(f"Not all of its definition was understood: {SCRIPT[0]} The VM pins ")
    assert told["now"]["question"] == (
        f"What does its definition say there? {SCRIPT[0]} Give it in known, as memlock_fit takes it."
    )
    told = memlock_forecast(of(defined_unit(unread_at_boot=SCRIPT)))["vms"][0]
    assert told["reboot"]["question"] == f"What will count after a reboot? {SCRIPT[0]}"
    kept = ("kind", "name", "path", "unread", "unread_at_boot")
    nothing = {name: None for name in defined() if name not in kept}
    told = memlock_forecast(of(defined(**nothing, unread=["/etc/libvirt/qemu/x.xml is no XML."])))["vms"][0]
    assert (told["now"]["starts"], told["running"], told["user"]) == (None, None, None)
    assert "/etc/libvirt/qemu/x.xml is no XML." in told["now"]["question"]
    # What it has is not known, so nothing is said of what it pins.
    assert told["now"]["reason"] == "Not all of its definition was understood: /etc/libvirt/qemu/x.xml is no XML."


@pytest.mark.parametrize(
    ("then", "reboot"),
    [
        ({}, [True, True]),
        # Its domains are charged to the unit's user by then.
        ({"user": "vm", "uid": 1001}, [None, None]),
        ({"user": "other", "uid": 7}, [True, True]),
        # They may be anybody's.
        ({"user": None, "uid": None}, [None, None]),
        ({"user": "no-such", "uid": None}, [None, None]),
    ],
)
def test_a_daemon_of_libvirt_that_has_started_anew_runs_domains_as_another_user(then: Row, reboot: list[Any]) -> None:
    data = of(*units(60), by_commandline(70, autostart=True))
    data["host"]["libvirt"]["at_boot"] = {**libvirt(**then)}
    assert starts(data, "now") == [True, True]
    assert starts(data) == reboot


def test_a_daemon_of_libvirt_that_has_started_anew_may_do_otherwise() -> None:
    """It may be another version, or may have other rights."""
    domains = [defined(name="a"), defined(name="b", hard_limit_bytes=66 * GIB)]
    data = of(*domains, host=host(libvirt=older(supports_iommufd=True, at_boot=libvirt(reason="It is newer."))))
    assert (starts(data, "now"), starts(data)) == ([True, True], [True, True])
    told = memlock_forecast(data)["vms"][0]
    assert (told["now"]["accounting"], told["reboot"]["accounting"]) == ("user", "process")
    assert "It is newer." in told["reboot"]["reason"]
    data = of(*domains, host=native(at_boot=libvirt(cap_sys_resource=False)))
    assert (starts(data, "now"), starts(data)) == ([True, True], [False, False])
    data = of(*domains, host=native(at_boot=libvirt(cap_sys_resource=None, sets_rlimit_mode=None)))
    assert (starts(data, "now"), starts(data)) == ([True, True], [None, None])


NOT_READ: Row = {
    "unread": SCRIPT,
    **dict.fromkeys(("memory_bytes", "devices", "viommu", "user", "uid", "memlock_bytes", "memlock_unlimited")),
    **dict.fromkeys(("of_devices_bytes", "locks_memory", "cap_ipc_lock", "emulator")),
}
ALL: Row = {
    "memory": "64G",
    "user": "vm",
    "memlock": "66G",
    "overhead": "1G",
    "locked": 0,
    "vfio_devices": 1,
    "viommu": "none",
    "accounting": "user",
    "cap_ipc_lock": False,
}


def told(row: Row, given: Row, kind: str = "now", **fields: Any) -> Row:
    """What is told of a VM of which this is known."""
    fields = {"users": [user(uid=1001, user="vm", charged_bytes=0)], **fields}
    answer: Row = memlock_forecast(of(row, **fields), known={row["name"]: given})["vms"][0]
    return {**answer[kind], "of": answer["user"]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"memlock": "64G"}, False),
        ({"memlock": "unlimited"}, True),
        ({"vfio_devices": 2, "viommu": "each"}, False),
        ({"accounting": "none", "cap_ipc_lock": None}, True),
        ({"accounting": "none", "memlock": "1G", "cap_ipc_lock": None}, True),
        ({"vfio_devices": None, "devices": [{"backend": "iommufd", "mode": "process"}], "accounting": None}, True),
        ({"vfio_devices": None, "devices": [{"backend": "legacy"}], "accounting": None}, True),
        ({"locked": "3G", "memlock": "140G"}, True),
        ({"locked": "70G"}, False),
    ],
)
def test_what_is_known_of_a_unit_settles_what_its_definition_does_not_tell(given: Row, expected: bool) -> None:
    """As it does for memlock_fit."""
    all_ = {name: value for name, value in {**ALL, **given}.items() if value is not None}
    row = defined_unit(**NOT_READ)
    for kind in ("now", "reboot"):
        answer = told(row, all_, kind)
        assert (answer["starts"], answer["question"], answer["of"]) == (expected, None, "vm")
    fit = memlock_fit(of(users=[user(uid=1001, user="vm", charged_bytes=0)]), **all_)
    assert fit["fits"] is expected
    assert (answer["needed_bytes"], answer["limit_bytes"]) == (fit["needed"], fit["limit"])


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("memory", "How much memory has the VM?"),
        ("user", "Which user will the VMM run as? Give user."),
        ("memlock", "Which RLIMIT_MEMLOCK will the VMM have?"),
        ("overhead", "How much does the VM pin beyond its memory?"),
        ("locked", "How much memory does the VMM lock itself"),
        ("viommu", "Has the VM an IOMMU of its own"),
        ("accounting", "Which mode has its iommufd?"),
        ("cap_ipc_lock", "Has the VMM CAP_IPC_LOCK?"),
    ],
)
def test_what_is_left_out_is_asked_for(name: str, question: str) -> None:
    """Nothing that neither the definition nor the task tells is taken for granted."""
    charged = user(uid=1001, user="vm", charged_bytes=4 * GIB if name in ("user", "accounting", "cap_ipc_lock") else 0)
    more = {"vfio_devices": 2} if name == "viommu" else {}
    known = {key: value for key, value in {**ALL, **more}.items() if key != name}
    answer = told(defined_unit(**NOT_READ), known, users=[charged])
    assert answer["starts"] is None
    assert answer["question"].startswith(question)
    without = {key: value for key, value in known.items() if key != "vfio_devices"}
    with pytest.raises(IommufdError, match=r"known: vm1\.service: give devices, too, or vfio_devices: "):
        told(defined_unit(**NOT_READ), without)


def test_what_is_known_of_a_domain() -> None:
    """Its devices are libvirt's, unless they have a name, and its limit is what it was."""
    unread = {"unread": ["An interface may pass a device through."], "devices": None, "libvirt_counts": None}
    answer = told(defined(**unread), {"vfio_devices": 1})
    assert (answer["starts"], answer["accounting"]) == (True, "process")
    named = {"devices": [{"backend": "iommufd", "iommufd": "i0"}]}
    assert told(defined(**unread), named)["question"].startswith("Which RLIMIT_MEMLOCK will the VMM have?")
    answer = told(defined(**unread), {**named, "memlock": "60G"})
    assert (answer["starts"], answer["accounting"]) == (False, "user")
    # Its control group has no room.
    tight = defined(**unread, hard_limit_bytes=64 * GIB + 2 * MIB)
    assert told(tight, {"vfio_devices": 1, "overhead": "1M"})["starts"] is None
    passed = defined(**unread, fdgroup="vm")
    assert "Who gives libvirt the iommufd" in told(passed, {"vfio_devices": 1})["reason"]
    # Several are counted by what they are behind.
    behind = defined(**unread, viommu=None)
    assert told(behind, {"vfio_devices": 2, "locked": 0})["starts"] is None
    assert told(behind, {"vfio_devices": 2, "viommu": "none"})["starts"] is True


def test_what_is_known_of_a_limit_after_a_reboot() -> None:
    row = defined_unit(unread_at_boot=SCRIPT)
    assert told(row, {"memlock": "66G"}, "reboot")["starts"] is True
    assert told(row, {"memlock": "60G"}, "reboot")["starts"] is False
    assert told(row, {"overhead": 0}, "reboot")["starts"] is None
    # All of it may be otherwise then.
    assert told({**row, "changed": True}, {"memlock": "66G"}, "reboot")["starts"] is None


def test_who_each_runs_as() -> None:
    rows = [defined(), defined(user="x", uid=7), defined(uid=7), defined_unit(), defined_unit(user=None, uid=None)]
    assert [each["user"] for each in memlock_forecast(of(*rows))["vms"]] == ["libvirt-qemu", "x", "7", "vm", None]


def test_who_libvirt_runs_as_is_not_known() -> None:
    data = of(by_commandline(70), host=native(user=None, uid=None))
    assert starts(data) == [None]
    assert memlock_forecast(data)["vms"][0]["user"] is None


def test_other_users_than_were_asked_for() -> None:
    data = of(defined_unit(), narrowed={"pids": None, "uids": [1002]})
    told = memlock_forecast(data)["vms"][0]["now"]
    assert told["starts"] is None
    assert "tells of other users than 1001" in told["reason"]


@pytest.mark.parametrize(
    "row",
    [
        defined(),
        by_commandline(70),
        by_commandline(None),
        defined(devices=[by_container()]),
        defined(devices=[device(), by_container()]),
        defined(libvirt_locks=True),
        defined(locks_memory=True),
    ],
)
@pytest.mark.parametrize("its", [native(), host(), host(qemu=[emulator(True)]), host(libvirt=None)])
def test_a_domain_by_itself_is_judged_as_memlock_fit_does(row: Row, its: Row) -> None:
    devices = {
        "iommufd": "<hostdev mode='subsystem' type='pci'><driver name='vfio' iommufd='yes'/></hostdev>",
        "legacy": "<hostdev mode='subsystem' type='pci'/>",
    }
    hard = row["hard_limit_bytes"]
    by_qemu_ = row["devices"][0]["space"] == "i"
    lines = "" if by_qemu_ else "".join(devices[each["backend"]] for each in row["devices"])
    arguments = ["-object", "iommufd,id=i", "-device", "vfio-pci,iommufd=i"] if by_qemu_ else []
    arguments += ["-overcommit", "mem-lock=on"] if row["locks_memory"] else []
    tune = f"<memtune><hard_limit unit='bytes'>{hard}</hard_limit></memtune>" if hard else ""
    words = "".join(f"<qemu:arg value='{each}'/>" for each in arguments)
    xml = (
        "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><memory unit='GiB'>64</memory>"
        f"{tune}{'<memoryBacking><locked/></memoryBacking>' if row['libvirt_locks'] else ''}<devices>{lines}"
        f"<emulator>{row['emulator']}</emulator></devices><qemu:commandline>"
        f"{words}</qemu:commandline></domain>"
    )
    fit = memlock_fit(idle(host=its), domain_xml=xml)
    told = memlock_forecast(of(row, host=its))["vms"][0]["now"]
    assert told["starts"] is fit["fits"]
    # Only what those that run show is not taken for what a definition says.
    if its["libvirt"] is not None:
        assert (told["reason"], told["remedy"]) == (fit["reason"], fit["remedy"])


def test_the_documented_answer() -> None:
    documented = documented_fields("memlock_forecast")
    first = by_commandline(65, hard_limit_bytes=65 * GIB)
    data = of(
        first,
        host=host(libvirt=older(reason="libvirt is older.")),
        processes=[process(pinned_bytes=64 * GIB, memory_bytes=64 * GIB)],
        users=[user(charged_bytes=64 * GIB)],
    )
    answer = memlock_forecast(data)
    fields = documented["vms"]["contains"]
    sample = {name: entry["sample"] for name, entry in fields.items() if "sample" in entry}
    assert sample.items() <= answer["vms"][0].items()
    assert answer["vms"][0].keys() == fields.keys()
    assert answer["vms"][0]["now"] == {name: each["sample"] for name, each in fields["now"]["contains"].items()}
    assert answer["now"] == {name: each["sample"] for name, each in documented["now"]["contains"].items()}
    assert answer.keys() == documented.keys() == {"vms", *KINDS}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"move_to": "legacy"}, "move_to: 'legacy' is unknown: give iommufd."),
        ({"grow": "64M"}, "grow: '64M' is nothing to get: give memory or devices or both."),
        ({"grow": {"vm": "x", "memory": 1}}, "grow: {'vm': 'x', 'memory': 1} is nothing to get"),
        ({"grow": {"memory": 0}}, "grow: what is each VM to get? Give memory or devices."),
        ({"grow": {"memory": "much"}}, "grow.memory: "),
        ({"grow": {"devices": "x"}}, "grow.devices: give a list"),
        ({"live_update": "perhaps"}, "live_update: 'perhaps' is not a boolean: give true or false."),
        ({"known": 1}, "known: 1 is no dictionary: give what is known of a VM by its name."),
        ({"known": {"vm2": {"memory": 1}}}, "known: 0 VMs are defined as 'vm2': give the name of one."),
        ({"known": {"vm1": {"grow": 1}}}, "known: vm1: {'grow': 1} is nothing to be told of a VM: give one or more of"),
        ({"known": {"vm1": {}}}, "known: vm1: {} is nothing to be told of a VM: give one or more of memory, user"),
        ({"known": {"vm1": [1]}}, "known: vm1: [1] is nothing to be told of a VM: give one or more of memory, user"),
        ({"known": {"vm1": {"memory": "x"}}}, "known: vm1: memory: 'x' is not a size"),
    ],
)
def test_a_wrong_parameter_is_named(given: Row, expected: str) -> None:
    with pytest.raises(IommufdError) as raised:
        memlock_forecast(of(defined()), **given)
    assert str(raised.value).startswith(expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"failed": True, "msg": "no"}, "The input is the result of a task that was failed (no)"),
        (info(), "The input lacks defined: run virt.iommufd.iommufd_info with defined, host, processes and users in"),
        (idle(defined={}), "defined: a dict is no list of VMs: give what virt.iommufd.iommufd_info of this version"),
        (idle(defined="vm1"), "defined: a str is no list of VMs: "),
        (idle(defined=[{}] * 70000), "defined: it has more than 65536 VMs: "),
        (idle(defined=[defined(), "vm1"]), "defined[1]: a str is no VM: "),
        (idle(defined=[{}]), "defined[0]: kind is missing: give what "),
        (idle(defined=[defined(kind="pod")]), "defined[0]: kind is none of domain, unit but 'pod': "),
        (idle(defined=[defined(name=None)]), "defined[0]: name is no text but <NoneType>: "),
        (idle(defined=[defined(memory_bytes="64 GiB")]), "defined[0]: memory_bytes is no number but '64 GiB': "),
        (idle(defined=[defined(memory_bytes=-1)]), "defined[0]: memory_bytes is not from 0 to "),
        (idle(defined=[defined(memory_bytes=2**70)]), "defined[0]: memory_bytes is not from 0 to "),
        (idle(defined=[defined(devices="all")]), "defined[0]: devices is no list but a str: "),
        (idle(defined=[defined(devices=["x"])]), "defined[0]: devices backend is looked for in what is no object"),
        (idle(defined=[defined(devices=[device("nvme")])]), "defined[0]: devices backend is none of iommufd, legacy"),
        (
            idle(defined=[defined(devices=[device(accounting="none")])]),
            "defined[0]: devices accounting is none of ",
        ),
        (idle(defined=[defined(autostart="yes")]), "defined[0]: autostart is neither true nor false but 'yes': "),
        (idle(defined=[defined(pid="4242x")]), "defined[0]: pid is no number but '4242x': "),
        (idle(defined=[defined(uid=2**32)]), "defined[0]: uid is not from 0 to 4294967295 but "),
        (idle(defined=[defined(viommu="maybe")]), "defined[0]: viommu is none of none, each, nested but 'maybe': "),
        (idle(defined=[defined(order="x")]), "defined[0]: order is no list but 'x': "),
        (idle(defined=[defined(unread=None)]), "defined[0]: unread is no list but <NoneType>: "),
        (idle(defined=[defined(memlock_unlimited=1)]), "defined[0]: memlock_unlimited is neither true nor false but 1"),
        (idle(defined=[defined()], users=[3]), "The input is not what this version of virt.iommufd.iommufd_info"),
    ],
)
def test_a_wrong_input(data: Any, expected: str) -> None:
    with pytest.raises(IommufdError) as raised:
        memlock_forecast(data)
    assert str(raised.value).startswith(expected)


@pytest.mark.parametrize("name", sorted(set(defined()) - {"path", "transient", "memory_max_bytes", "hugepages"}))
def test_a_field_that_is_missing_is_named(name: str) -> None:
    row = defined()
    del row[name]
    with pytest.raises(IommufdError, match=f"^defined.0.: {name} is missing: give what "):
        memlock_forecast(of(row))


def test_a_name_moves_no_cursor() -> None:
    told = memlock_forecast(of(defined(name="\033[2Jvm", unread=["\033[2J"])))
    assert told["vms"][0]["vm"] == "\\x1b[2Jvm"
    assert "\033" not in str(told)


def judged(number: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often VMs are judged for so many of each kind, with all questions at once."""
    calls: list[Any] = []

    def count(*given: Any) -> Any:
        calls.append(given)
        return new_vm(*given)

    monkeypatch.setattr(_forecast, "new_vm", count)
    rows = [
        *(by_commandline(5000, name=f"d{n}", memory_bytes=(n + 1) * MIB, pid=n + 10) for n in range(number)),
        *(defined(name=f"n{n}", memory_bytes=(n + 1) * GIB) for n in range(number)),
        *units(*range(1, number + 1), limit=900),
    ]
    for each in range(1, number):
        rows[2 * number + each]["order"] = [f"u{each - 1}.service"]
    there = [process(pid=n + 10, domain=f"d{n}") for n in range(number)]
    data = of(*rows, processes=there, users=[user(charged_bytes=number * PINNED)])
    told = memlock_forecast(data, move_to="iommufd", live_update=True, **GROWS)
    assert told["reboot"]["of"] == 3 * number
    return len(calls)


def test_twice_as_many_vms_take_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(40, monkeypatch) <= 2.5 * judged(20, monkeypatch)
