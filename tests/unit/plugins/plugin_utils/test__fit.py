# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.plugin_utils._fit import memlock_fit
from ansible_collections.virt.iommufd.tests.unit.filter_docs import documented_fields

KIB, MIB, GIB = (1024**power for power in range(1, 4))
PAGE = 4096

# What a VM of 64 MiB was seen to pin.
PINNED = 65792 * KIB
QEMU = "/usr/bin/qemu-system-x86_64"

Row = dict[str, Any]


def process(**fields: Any) -> Row:
    """A running VM of 64 MiB, as the module returns it; of its fields, those that matter here."""
    return {
        "pid": 4242,
        "comm": "qemu-system-x86",
        "uid": 64055,
        "user": "libvirt-qemu",
        "memory_bytes": 64 * MIB,
        "pinned_bytes": PINNED,
        "iommufds": iommufds(1),
        "accounting": "user",
        **fields,
    }


def iommufds(*ioases: int) -> list[Row]:
    """Iommufds with so many IOASes."""
    return [{"fd": 30, "ioases": [{"ioas_id": each, "huge_pages": True} for each in range(count)]} for count in ioases]


def user(**fields: Any) -> Row:
    return {"uid": 64055, "user": "libvirt-qemu", "charged_bytes": PINNED, "uncertain_bytes": 0, **fields}


def emulator(cap_ipc_lock: bool | None, path: str = QEMU, present: bool = True) -> Row:
    return {"path": path, "present": present, "known_by": ["place"], "cap_ipc_lock": cap_ipc_lock}


def libvirt(sets_rlimit_mode: bool | None) -> Row:
    return {"sets_rlimit_mode": sets_rlimit_mode, "reason": "This is why."}


def host(**fields: Any) -> Row:
    """A host whose libvirt does not set the mode and whose emulator has no capability."""
    told = {"limits_of_view": [], "module": "loaded", "qemu": [emulator(False)], "libvirt": libvirt(False)}
    return {**told, "page_bytes": PAGE, **fields}


def unseen(*what: str) -> list[Row]:
    return [{"what": each, "why": "This is why."} for each in what]


def info(**fields: Any) -> Row:
    """What the module returned on a host with one running VM."""
    narrowed: Row = {"pids": None, "uids": None}
    return {"host": host(), "processes": [process()], "users": [user()], "narrowed": narrowed, **fields}


def idle(**fields: Any) -> Row:
    """What the module returned on a host without VMs."""
    return info(processes=[], users=[], **fields)


def fit(data: Any, memory: Any = "64M", who: Any = "libvirt-qemu", **parameters: Any) -> Row:
    """The answer, with memory and user as far as they matter."""
    return memlock_fit(data, memory, who, **parameters)


def message(data: Any, **parameters: Any) -> str:
    """What is told of an error."""
    with pytest.raises(IommufdError) as raised:
        fit(data, **parameters)
    return str(raised.value)


def test_the_documented_answer() -> None:
    documented = documented_fields("memlock_fit")
    answer = fit(info(), memory="64G", memlock="65G", overhead="1G")
    assert answer == {name: entry["sample"] for name, entry in documented.items()}


@pytest.mark.parametrize("accounting", ["user", "process"])
@pytest.mark.parametrize(
    ("spare", "fits"),
    [
        pytest.param(2 * PAGE, True, id="more than enough"),
        pytest.param(0, True, id="exactly enough"),
        pytest.param(PAGE - 1, True, id="not a whole page more"),
        pytest.param(-1, False, id="a byte short"),
        pytest.param(-PAGE, False, id="a page short"),
    ],
)
def test_the_boundary(accounting: str, spare: int, fits: bool) -> None:
    charged = PINNED if accounting == "user" else 0
    answer = fit(info(), memory=PINNED, overhead=0, memlock=charged + PINNED + spare, accounting=accounting)
    assert answer["fits"] is fits
    assert answer["accounting"] == accounting
    assert answer["needed"] == PINNED
    assert answer["charged"] == charged
    assert answer["limit"] == charged + PINNED + spare
    assert answer["headroom"] == PINNED + spare
    assert (answer["remedy"] is None) == fits


def test_a_vm_pins_whole_pages() -> None:
    assert fit(info(), memory=1, overhead=0)["needed"] == PAGE
    assert fit(info(), memory=PAGE, overhead=1)["needed"] == 2 * PAGE
    assert fit(info(), memory=PAGE, overhead=1, memlock=PINNED + 2 * PAGE - 1)["fits"] is False


@pytest.mark.parametrize("page", [PAGE, 4 * PAGE, 16 * PAGE])
def test_pages_are_those_of_the_host(page: int) -> None:
    data = info(host=host(page_bytes=page))
    answer = fit(data, memory=MIB, overhead=1, memlock=MIB + page, accounting="process")
    assert (answer["needed"], answer["fits"]) == (MIB + page, True)
    # The kernel rounds the limit down, the memory up.
    assert fit(data, memory=MIB, overhead=1, memlock=MIB + page - 1, accounting="process")["fits"] is False


@pytest.mark.parametrize(("limit", "fits"), [(MIB, False), (MIB + PAGE, None), (MIB + 16 * PAGE, True)])
def test_pages_of_a_host_that_was_not_looked_at(limit: int, fits: bool | None) -> None:
    data = info(host={name: value for name, value in host().items() if name != "page_bytes"})
    assert fit(data, memory=MIB, overhead=1, memlock=limit, accounting="process")["fits"] is fits


ON_TOP_OF = "The VM pins 64 MiB and up to 256 KiB beyond that, as running VMs do. Charged to libvirt-qemu on top of"
ENDS = "and ends with -12 (Cannot allocate memory)."


@pytest.mark.parametrize(
    ("data", "memlock", "fits", "reason"),
    [
        pytest.param(
            info(),
            "200M",
            True,
            f"{ON_TOP_OF} 64.2 MiB, it is within its limit of 200 MiB.",
            id="fits",
        ),
        pytest.param(
            info(),
            PINNED + 64 * MIB,
            None,
            f"{ON_TOP_OF} 64.2 MiB, it may be anything from 0 bytes below to 256 KiB over its limit of 128 MiB.",
            id="at least",
        ),
        pytest.param(
            info(),
            PINNED + 64 * MIB - PAGE,
            False,
            f"{ON_TOP_OF} 64.2 MiB, it is at least 4 KiB over its limit of 128 MiB {ENDS}",
            id="not even",
        ),
        pytest.param(
            info(),
            2 * PINNED - PAGE,
            None,
            f"{ON_TOP_OF} 64.2 MiB, it may be anything from 252 KiB below to 4 KiB over its limit of 128 MiB.",
            id="not at most",
        ),
        pytest.param(
            idle(host=host(libvirt=libvirt(None))),
            "libvirt",
            True,
            "The VM pins 64 MiB and up to 1 GiB beyond that, which is what libvirt allows for."
            " Charged to libvirt-qemu on top of nothing, it is within the limit of 1.1 GiB that libvirt gives it.",
            id="nothing measured",
        ),
        pytest.param(
            info(users=[user(uncertain_bytes=PINNED)]),
            "200M",
            True,
            f"{ON_TOP_OF} 64.2 MiB to 128 MiB, it is within its limit of 200 MiB.",
            id="uncertain",
        ),
        pytest.param(
            info(users=[user(charged_bytes=0, uncertain_bytes=PINNED)]),
            "100M",
            None,
            f"{ON_TOP_OF} 0 bytes to 64.2 MiB, it may be anything from 36 MiB below to 28.5 MiB over its limit of"
            " 100 MiB.",
            id="all is uncertain",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("descriptors", "iommufds", "libvirt"))),
            "200M",
            True,
            f"{ON_TOP_OF} 64.2 MiB, it is within its limit of 200 MiB.",
            id="what was not seen is counted",
        ),
        *(
            pytest.param(
                info(host=host(limits_of_view=unseen(what)), users=[user(uncertain_bytes=2 * PINNED)]),
                "200M",
                None,
                f"{ON_TOP_OF} 64.2 MiB to 193 MiB, it may be anything from 71.8 MiB below to 57 MiB over its limit of"
                " 200 MiB.",
                id=f"{what} of the user",
            )
            for what in ("descriptors", "iommufds")
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("processes"))),
            "200M",
            None,
            f"{ON_TOP_OF} 64.2 MiB, it is within its limit of 200 MiB, but processes that were not seen may be charged"
            " too.",
            id="hidden processes",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("processes"))),
            "100M",
            False,
            f"{ON_TOP_OF} 64.2 MiB, it is at least 28.2 MiB over its limit of 100 MiB {ENDS}",
            id="hidden processes make it no better",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("processes"), module="absent")),
            "infinity",
            True,
            f"{ON_TOP_OF} 64.2 MiB, it has no limit to reach. Besides, this host's kernel has no iommufd.",
            id="unlimited",
        ),
    ],
)
def test_per_user(data: Row, memlock: Any, fits: bool | None, reason: str) -> None:
    answer = fit(data, memlock=memlock, accounting="user")
    assert (answer["fits"], answer["accounting"]) == (fits, "user")
    assert answer["reason"] == reason


@pytest.mark.parametrize(
    ("memlock", "overhead", "fits", "reason"),
    [
        ("65M", 0, True, "The VM pins 64 MiB. Charged for itself alone, it is within its limit of 65 MiB."),
        (
            "64M",
            MIB,
            False,
            f"The VM pins 64 MiB and 1 MiB beyond that. Charged for itself alone, it is 1 MiB over its limit of 64 MiB"
            f" {ENDS}",
        ),
        (0, 0, False, None),
        ("unlimited", 0, True, "The VM pins 64 MiB. Charged for itself alone, it has no limit to reach."),
    ],
)
def test_per_process(memlock: Any, overhead: int, fits: bool, reason: str | None) -> None:
    data = info(users=[user(uncertain_bytes=PINNED)], host=host(limits_of_view=unseen("processes")))
    answer = fit(data, memlock=memlock, overhead=overhead, accounting="process")
    assert (answer["fits"], answer["accounting"], answer["charged"]) == (fits, "process", 0)
    assert answer["headroom"] == answer["limit"]
    assert reason in (answer["reason"], None)


def test_with_cap_ipc_lock() -> None:
    answer = fit(info(), memory="64G", memlock="64K", accounting="none", overhead=0)
    assert answer == {
        "fits": True,
        "accounting": "none",
        "needed": 64 * GIB,
        "charged": 0,
        "limit": 64 * KIB,
        "headroom": None,
        "reason": "The VM pins 64 GiB. With CAP_IPC_LOCK nothing is charged and no limit is checked.",
        "remedy": None,
    }


@pytest.mark.parametrize("memlock", ["unlimited", "infinity"])
def test_without_a_limit(memlock: str) -> None:
    answer = fit(info(), memlock=memlock)
    assert (answer["fits"], answer["limit"], answer["headroom"], answer["charged"]) == (True, None, None, PINNED)


@pytest.mark.parametrize(
    ("parameters", "needed", "limit"),
    [
        pytest.param({}, 65 * GIB, 65 * GIB, id="one device"),
        pytest.param({"vfio_devices": 2}, 65 * GIB, 65 * GIB, id="two devices share an address space"),
        pytest.param({"viommu": True}, 65 * GIB, 65 * GIB, id="one device with a vIOMMU"),
        pytest.param({"viommu": True, "vfio_devices": 2}, 129 * GIB, 129 * GIB, id="two devices with a vIOMMU"),
        pytest.param({"viommu": "yes", "vfio_devices": "2"}, 129 * GIB, 129 * GIB, id="as texts"),
        pytest.param({"viommu": True, "vfio_devices": 2, "overhead": "1M"}, 128 * GIB + MIB, 129 * GIB, id="overhead"),
        pytest.param({"viommu": True, "vfio_devices": 2, "memlock": "1T"}, 129 * GIB, 1024 * GIB, id="memlock"),
    ],
)
def test_address_spaces(parameters: Row, needed: int, limit: int) -> None:
    answer = fit(idle(), memory="64G", who="alice", **parameters)
    assert (answer["needed"], answer["limit"]) == (needed, limit)
    assert answer["fits"]


def test_several_address_spaces_multiply_what_was_measured() -> None:
    answer = fit(info(), memory="64G", viommu=True, vfio_devices=2, accounting="process")
    assert answer["needed"] == 128 * GIB + 2 * 256 * KIB
    assert answer["reason"].startswith(
        "The VM pins 128 GiB (64 GiB for each of 2 devices) and up to 512 KiB beyond that, as running VMs do."
    )


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        pytest.param([process()], 256 * KIB, id="measured"),
        pytest.param([process(), process(pinned_bytes=66 * MIB), process()], 2 * MIB, id="the largest counts"),
        pytest.param([process(uid=0, accounting="none")], 256 * KIB, id="whoever and however"),
        pytest.param([process(pinned_bytes=64 * MIB)], 0, id="nothing"),
        pytest.param([process(pinned_bytes=64 * MIB + GIB)], GIB, id="1 GiB"),
        pytest.param([process(pinned_bytes=64 * MIB + GIB + PAGE)], GIB, id="more than 1 GiB is no overhead"),
        pytest.param([process(pinned_bytes=66 * GIB), process()], 256 * KIB, id="nor is it among others"),
        pytest.param([process(pinned_bytes=0)], GIB, id="nothing pinned"),
        pytest.param([process(pinned_bytes=63 * MIB)], GIB, id="not all pinned"),
        pytest.param([process(memory_bytes=None)], GIB, id="unknown memory"),
        pytest.param([process(iommufds=None)], GIB, id="unknown iommufds"),
        pytest.param([process(iommufds=[])], GIB, id="no iommufd"),
        pytest.param([process(iommufds=iommufds(0))], GIB, id="no IOAS"),
        pytest.param([process(iommufds=iommufds(2))], GIB, id="two IOASes"),
        pytest.param([process(iommufds=iommufds(1, 1))], GIB, id="two iommufds"),
        pytest.param([process(iommufds=iommufds(0, 1))], 256 * KIB, id="two iommufds, one IOAS"),
        pytest.param([], GIB, id="no VM"),
    ],
)
def test_overhead_is_measured(processes: list[Row], expected: int) -> None:
    assert fit(info(processes=processes), memory="64G")["needed"] == 64 * GIB + expected


SHOWS_NOTHING = "No running VM of libvirt-qemu shows its accounting, and the kernel's default is per user."
NO_HOST = "The input lacks the subset host, which may tell more of the accounting."
SOME = "Some of the host's emulators have CAP_IPC_LOCK, or may have it, so the VM may too."
OTHER_VMS = "libvirt-qemu may have other VMs than were seen whole, and the kernel's default is per user."
BARE: Row = {"limits_of_view": []}


@pytest.mark.parametrize(
    ("data", "accounting", "reason"),
    [
        pytest.param(
            idle(host=host(qemu=[emulator(True), emulator(None, present=False)], libvirt=libvirt(True))),
            "none",
            "The host's emulators have CAP_IPC_LOCK.",
            id="all emulators",
        ),
        pytest.param(
            info(host=host(libvirt=libvirt(True))),
            "process",
            "This is why.",
            id="libvirt",
        ),
        pytest.param(info(), "user", "The running VMs of libvirt-qemu are accounted per user.", id="running VMs"),
        pytest.param(
            info(processes=[process(accounting="process"), process(uid=1000), process(uid=1000, accounting=None)]),
            "process",
            "The running VMs of libvirt-qemu are accounted per process.",
            id="running VMs per process",
        ),
        pytest.param(
            info(processes=[process(accounting="process"), process(accounting=None)]),
            None,
            OTHER_VMS,
            id="one is unknown",
        ),
        pytest.param(
            info(
                processes=[process(accounting="process")],
                users=[user(uncertain_bytes=PINNED)],
                host=host(limits_of_view=unseen("iommufds")),
            ),
            None,
            OTHER_VMS,
            id="the iommufds of some are hidden",
        ),
        pytest.param(
            info(processes=[process(accounting="process")], host=host(limits_of_view=unseen("iommufds"))),
            "process",
            "The running VMs of libvirt-qemu are accounted per process.",
            id="the iommufds of others are hidden",
        ),
        pytest.param(
            info(processes=[process(), process(accounting=None)]),
            "user",
            "The running VMs of libvirt-qemu are accounted per user.",
            id="the default is the strictest anyway",
        ),
        pytest.param(
            info(processes=[process(accounting="none")]),
            "none",
            "The running VMs of libvirt-qemu have CAP_IPC_LOCK.",
            id="running VMs with the capability",
        ),
        pytest.param(
            info(host=host(qemu=[emulator(None)]), processes=[process(accounting="none")]),
            "none",
            "The running VMs of libvirt-qemu have CAP_IPC_LOCK.",
            id="and the emulator may have it",
        ),
        pytest.param(
            info(processes=[process(accounting="none"), process(accounting="process")]),
            None,
            "The running VMs of libvirt-qemu differ in accounting, and the kernel's default is per user.",
            id="running VMs differ",
        ),
        pytest.param(info(processes=[process(accounting=None)]), "user", SHOWS_NOTHING, id="running VMs are unknown"),
        pytest.param(info(processes=[process(uid=1000)]), "user", SHOWS_NOTHING, id="running VMs of others"),
        pytest.param(idle(), "user", SHOWS_NOTHING, id="no VMs"),
        pytest.param(idle(host=host(qemu=[])), "user", SHOWS_NOTHING, id="no emulators"),
        pytest.param(idle(host=BARE), "user", f"{NO_HOST} {SHOWS_NOTHING}", id="no host"),
        pytest.param(
            info(host=BARE, processes=[process(accounting="process")]),
            "process",
            f"{NO_HOST} The running VMs of libvirt-qemu are accounted per process.",
            id="no host, running VMs",
        ),
    ],
)
def test_auto(data: Row, accounting: str | None, reason: str) -> None:
    answer = fit(data, memlock="1T")
    assert answer["accounting"] == accounting
    assert answer["reason"].startswith(f"{reason} The VM pins 64 MiB and up to ")
    assert answer["fits"]


def test_auto_is_not_sure_where_vms_are_hidden() -> None:
    data = info(processes=[process(accounting="none")], host=host(limits_of_view=unseen("processes")))
    answer = fit(data, memlock="1T")
    assert (answer["accounting"], answer["fits"]) == (None, None)
    assert answer["reason"].startswith(OTHER_VMS)


@pytest.mark.parametrize("who", ["libvirt-qemu", "qemu", 64055, "64055"])
def test_auto_knows_the_users_of_libvirt(who: Any) -> None:
    name = who if who == "qemu" else "libvirt-qemu"
    data = info(host=host(libvirt=libvirt(True)), users=[user(user=name)], processes=[process(user=name)])
    assert fit(data, who=who)["accounting"] == "process"


@pytest.mark.parametrize("who", ["alice", 1000, "root", 0])
def test_auto_does_not_take_others_for_them(who: Any) -> None:
    answer = fit(info(host=host(libvirt=libvirt(True))), who=who)
    assert answer["accounting"] in ("user", None)


@pytest.mark.parametrize("who", ["root", "0", 0])
def test_auto_is_not_sure_of_root(who: Any) -> None:
    answer = fit(idle(), who=who, memlock="64K")
    assert (answer["fits"], answer["accounting"], answer["headroom"]) == (None, None, 64 * KIB)
    assert answer["reason"].startswith(
        "What root starts has CAP_IPC_LOCK, unless it is taken away, which libvirt does."
    )
    assert answer["remedy"].startswith("To know for certain: give the accounting of the VM. To make")


@pytest.mark.parametrize(
    ("data", "memlock", "fits", "reason"),
    [
        pytest.param(
            info(host=host(libvirt=libvirt(None))),
            "1G",
            True,
            "It is not known whether libvirt sets per-process accounting: This is why. The VM pins 64 MiB. Charged to"
            " libvirt-qemu on top of 64.2 MiB, it is within its limit of 1 GiB. Charged for itself alone, it is within"
            " its limit of 1 GiB.",
            id="either way",
        ),
        pytest.param(
            info(host=host(libvirt=libvirt(None))),
            "100M",
            None,
            "It is not known whether libvirt sets per-process accounting: This is why. The VM pins 64 MiB. Charged to"
            f" libvirt-qemu on top of 64.2 MiB, it is 28.2 MiB over its limit of 100 MiB {ENDS} Charged for itself"
            " alone, it is within its limit of 100 MiB.",
            id="only per process",
        ),
        pytest.param(
            info(host=host(libvirt=libvirt(None))),
            "32M",
            False,
            "It is not known whether libvirt sets per-process accounting: This is why. The VM pins 64 MiB. Charged to"
            f" libvirt-qemu on top of 64.2 MiB, it is 96.2 MiB over its limit of 32 MiB {ENDS} Charged for itself"
            f" alone, it is 32 MiB over its limit of 32 MiB {ENDS}",
            id="neither way",
        ),
        pytest.param(
            info(host=host(qemu=[emulator(True, "/usr/bin/a"), emulator(False, "/usr/bin/b")])),
            "100M",
            None,
            f"{SOME} The running VMs of libvirt-qemu are accounted per user. The VM pins 64 MiB. Charged to"
            f" libvirt-qemu on top of 64.2 MiB, it is 28.2 MiB over its limit of 100 MiB {ENDS}"
            " With CAP_IPC_LOCK nothing is charged and no limit is checked.",
            id="an emulator",
        ),
        pytest.param(
            info(host=host(qemu=[emulator(None)], libvirt=libvirt(True))),
            "100M",
            True,
            f"{SOME} This is why. The VM pins 64 MiB. Charged for itself alone, it is within its limit of 100 MiB. With"
            " CAP_IPC_LOCK nothing is charged and no limit is checked.",
            id="an emulator that cannot be looked at",
        ),
    ],
)
def test_several_possibilities(data: Row, memlock: str, fits: bool | None, reason: str) -> None:
    answer = fit(data, memlock=memlock, overhead=0)
    assert (answer["fits"], answer["accounting"]) == (fits, None)
    assert answer["reason"] == reason


@pytest.mark.parametrize(
    ("who", "charged"),
    [("libvirt-qemu", PINNED), (64055, PINNED), (" 64055 ", PINNED), (1000, MIB), (2000, 0), ("alice", 0), ("bob", 0)],
)
def test_the_charge_is_that_of_the_user(who: Any, charged: int) -> None:
    alice = process(uid=2000, user="alice", accounting="process")
    data = info(users=[user(), user(uid=1000, user=None, charged_bytes=MIB)], processes=[process(), alice])
    assert fit(data, who=who, accounting="user")["charged"] == charged


MODE = (
    "have it charged for itself alone, which libvirt 12.1 or later does for devices with <driver name='vfio'"
    " iommufd='yes'/> if its daemon has CAP_SYS_RESOURCE"
)
MODE_ELSEWHERE = (
    "have it charged for itself alone, by setting rlimit_mode=process on its iommufd before its first device"
    " (virt.iommufd.iommufd_option)"
)
CAPABILITY = (
    "give the VMM CAP_IPC_LOCK (setcap cap_ipc_lock+ep /usr/bin/qemu-system-x86_64), and with it the right to pin all"
    " memory to whoever may execute that"
)
NEXT = ", for this VM only, since the next one takes still more"
GIVE_MEMLOCK = "give memlock: the domain's <hard_limit>, or LimitMEMLOCK of libvirt's daemon"
AS_ROOT = "run virt.iommufd.iommufd_info as root (become: true) on the host itself, where it sees everything"


def hard_limit(kib: int) -> str:
    return (
        f"raise its limit (<memtune><hard_limit unit='KiB'>{kib}</hard_limit></memtune> in the domain, 1 GiB of it for"
        " the emulator's own memory)"
    )


@pytest.mark.parametrize(
    ("data", "parameters", "to_know", "cures"),
    [
        pytest.param(
            info(),
            {"memlock": "100M"},
            [],
            [MODE, CAPABILITY, hard_limit(2 * 65792 + MIB) + NEXT],
            id="libvirt",
        ),
        pytest.param(
            info(),
            {},
            [GIVE_MEMLOCK],
            [MODE, CAPABILITY, hard_limit(2 * 65792 + MIB) + NEXT],
            id="libvirt with a limit that is not known",
        ),
        pytest.param(
            info(host=host(qemu=[emulator(None)])),
            {"accounting": "auto"},
            [GIVE_MEMLOCK, "give the accounting of the VM"],
            [MODE, CAPABILITY, hard_limit(2 * 65792 + MIB) + NEXT],
            id="nor is the accounting",
        ),
        pytest.param(
            info(),
            {"memlock": "32M"},
            [],
            [f"{MODE}, with a limit of {PINNED} bytes or more", CAPABILITY, hard_limit(2 * 65792 + MIB) + NEXT],
            id="libvirt with a low limit",
        ),
        pytest.param(
            info(),
            {"memlock": "32M", "accounting": "process", "overhead": 0},
            [],
            [CAPABILITY, hard_limit(64 * KIB + MIB)],
            id="libvirt per process",
        ),
        pytest.param(
            info(users=[user(uid=1000, user="vmm")]),
            {"memlock": "100M", "who": 1000},
            [],
            [MODE_ELSEWHERE, CAPABILITY, f"raise its limit (LimitMEMLOCK={2 * PINNED} in its unit){NEXT}"],
            id="a unit",
        ),
        pytest.param(
            info(users=[user(uid=1000, user="alice", charged_bytes=2 * GIB)]),
            {"who": 1000},
            [],
            [MODE_ELSEWHERE, CAPABILITY, hard_limit(2 * MIB + 65792 + MIB) + NEXT],
            id="libvirt of a user's session",
        ),
        pytest.param(
            info(),
            {"memlock": 2 * PINNED - PAGE},
            ["give the overhead, if it is known"],
            [MODE, CAPABILITY, hard_limit(2 * 65792 + MIB) + NEXT],
            id="unknown overhead",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("processes"))),
            {"memlock": "200M"},
            [AS_ROOT],
            [MODE, CAPABILITY],
            id="hidden processes",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("descriptors")), users=[user(uncertain_bytes=PINNED)]),
            {"memlock": "150M"},
            [AS_ROOT],
            [MODE, CAPABILITY, hard_limit(3 * 65792 + MIB) + NEXT],
            id="hidden descriptors",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("libvirt")), users=[user(uncertain_bytes=PINNED)]),
            {"memlock": "150M"},
            [],
            [MODE, CAPABILITY, hard_limit(3 * 65792 + MIB) + NEXT],
            id="nothing would tell",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("processes"), libvirt=libvirt(None))),
            {"memlock": 2 * PINNED - PAGE},
            [AS_ROOT, "give the overhead, if it is known", "give the accounting of the VM"],
            [MODE, CAPABILITY, hard_limit(2 * 65792 + MIB) + NEXT],
            id="everything is unknown",
        ),
    ],
)
def test_the_remedy(data: Row, parameters: Row, to_know: list[str], cures: list[str]) -> None:
    expected = f"To know for certain: {'; '.join(to_know)}. " if to_know else ""
    assert fit(data, **parameters)["remedy"] == f"{expected}To make it fit: {'; or '.join(cures)}."


UNKNOWN = (
    "it is held against a limit that is not known. libvirt raises the limit for a <hostdev> only: a domain that names"
    " iommufd in <qemu:commandline> has the limit of libvirt's daemon, unless it has a <memtune><hard_limit>."
)


@pytest.mark.parametrize(
    ("data", "parameters", "how"),
    [
        pytest.param(info(), {}, "Charged to libvirt-qemu on top of 64.2 MiB,", id="user"),
        pytest.param(info(), {"memory": "64T"}, "Charged to libvirt-qemu on top of 64.2 MiB,", id="however much"),
        pytest.param(info(), {"accounting": "process"}, "Charged for itself alone,", id="process"),
    ],
)
def test_a_limit_that_is_not_known(data: Row, parameters: Row, how: str) -> None:
    answer = fit(data, **parameters)
    assert (answer["fits"], answer["limit"], answer["headroom"]) == (None, None, None)
    assert answer["reason"].endswith(f"{how} {UNKNOWN}")


@pytest.mark.parametrize(
    ("data", "parameters"),
    [
        pytest.param(info(host=host(qemu=[emulator(True)])), {}, id="the emulator has the capability"),
        pytest.param(info(), {"accounting": "none"}, id="the VM has it"),
        pytest.param(info(host=host(libvirt=libvirt(True))), {}, id="libvirt sets the mode"),
        pytest.param(info(host=host(libvirt=libvirt(None))), {}, id="libvirt may set it"),
        pytest.param(info(host=BARE), {}, id="nothing is known of libvirt"),
        pytest.param(info(), {"memlock": "1G"}, id="it is given"),
        pytest.param(info(), {"who": "vm"}, id="another user"),
    ],
)
def test_a_limit_that_does_not_matter_or_is_known(data: Row, parameters: Row) -> None:
    answer = fit(data, **parameters)
    assert answer["fits"] is True
    assert answer["limit"] >= GIB
    assert "qemu:commandline" not in answer["reason"]


def test_the_emulator_of_a_host_that_has_none() -> None:
    answer = fit(info(host=host(qemu=[], machine="aarch64")), memlock="64K", accounting="user")
    assert "setcap cap_ipc_lock+ep /usr/bin/qemu-system-aarch64)" in answer["remedy"]


def machine(name: str, *capable: str, without: tuple[str, ...] = ()) -> Row:
    """A host of that architecture with emulators, some of which have CAP_IPC_LOCK."""
    rows = [emulator(True, f"/usr/bin/{each}") for each in capable]
    return host(machine=name, qemu=[*rows, *(emulator(False, f"/usr/bin/{each}") for each in without)])


@pytest.mark.parametrize(
    ("on", "accounting", "proposed"),
    [
        pytest.param(
            machine("x86_64", "qemu-system-x86_64", without=("qemu-system-i386", "qemu-system-x86_64-microvm")),
            "none",
            "qemu-system-x86_64",
            id="those of others do not count",
        ),
        pytest.param(
            machine("x86_64", "qemu-system-i386", without=("qemu-system-x86_64",)),
            "user",
            "qemu-system-x86_64",
            id="nor do they where they have it",
        ),
        pytest.param(
            machine("aarch64", "qemu-kvm", without=("qemu-system-aarch64", "qemu-system-x86_64")),
            None,
            "qemu-system-aarch64",
            id="two of its own",
        ),
        pytest.param(
            machine("ppc64le", "qemu-system-ppc64", without=("qemu-system-ppc",)),
            "none",
            "qemu-system-ppc64",
            id="another name",
        ),
        pytest.param(
            machine("riscv64", "qemu-system-x86_64", without=("qemu-system-i386",)),
            None,
            "qemu-system-i386",
            id="none of its own",
        ),
    ],
)
def test_the_emulators_of_the_hosts_architecture(on: Row, accounting: str | None, proposed: str) -> None:
    data = info(host=on, processes=[process(comm="qemu")])
    assert fit(data, memlock="64K")["accounting"] == accounting
    assert f"setcap cap_ipc_lock+ep /usr/bin/{proposed})" in fit(data, memlock="64K", accounting="user")["remedy"]


@pytest.mark.parametrize(
    ("emulators", "expected"),
    [
        pytest.param([], QEMU, id="none"),
        pytest.param([emulator(False, "/opt/qemu")], "/opt/qemu", id="one"),
        pytest.param(
            [emulator(False, "/usr/bin/qemu-system-aarch64"), emulator(False, QEMU)], QEMU, id="the one that runs"
        ),
        pytest.param(
            [emulator(False, "/opt/qemu"), emulator(False, "/opt/qemu-system-x86_64")],
            "/opt/qemu-system-x86_64",
            id="or x86-64",
        ),
        pytest.param([emulator(False, "/opt/b"), emulator(False, "/opt/a")], "/opt/a", id="or the first"),
        pytest.param([emulator(False, "/opt/a", present=False)], QEMU, id="not there"),
        pytest.param([emulator(True, "/opt/a"), emulator(None, "/opt/b")], "/opt/b", id="without the capability"),
    ],
)
def test_the_emulator_that_the_remedy_names(emulators: list[Row], expected: str) -> None:
    answer = fit(info(host=host(qemu=emulators)), memlock="64K", accounting="user")
    assert f"setcap cap_ipc_lock+ep {expected})" in answer["remedy"]


def test_the_remedy_without_the_subset_host() -> None:
    assert CAPABILITY in fit(info(host=BARE), memlock="64K")["remedy"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("memory", value) for value in (0, None, True, "12Q", [1], float("nan"))),
        *(("memlock", value) for value in ("12Q", -1, None, ["libvirt"], "Libvirt")),
        *(("overhead", value) for value in ("12Q", -1, False, "8E")),
    ],
)
def test_a_wrong_size_is_named(name: str, value: Any) -> None:
    assert message(info(), **{name: value}).startswith(f"{name}: {value!r} is ")


WRONG: dict[str, tuple[str, tuple[Any, ...]]] = {
    "who": (
        "user: {} is not a user: give a name or an id.",
        (None, True, "", " ", -1, "-1", "-x", 1.5, [], {}, "v\x1b[31mm", "9" * 11, 10**11),
    ),
    "vfio_devices": (
        "vfio_devices: {} is not a number of devices: give 1 to 9999.",
        (None, True, 0, -1, "0", "x", 1.5, [1], 10000, "9" * 20, "\u0664"),
    ),
    "viommu": ("viommu: {} is not a boolean: give true or false.", (None, "x", 2, "")),
    "accounting": (
        "accounting: {} is unknown: give auto, user, process, none.",
        ("cap_ipc_lock", None, "", ["user"], {}, True),
    ),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_text, values) in WRONG.items() for value in values]
)
def test_a_wrong_parameter_is_named(name: str, value: Any) -> None:
    assert message(info(), **{name: value}) == WRONG[name][0].format(repr(value))


NOT_THE_RETURN = "The input is not what virt.iommufd.iommufd_info returned: give what the task registered."


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, NOT_THE_RETURN),
        ("text", NOT_THE_RETURN),
        ([], NOT_THE_RETURN),
        ({}, NOT_THE_RETURN),
        pytest.param({"results": [info()]}, NOT_THE_RETURN, id="a loop"),
        pytest.param({"changed": False, "ping": "pong"}, NOT_THE_RETURN, id="another module"),
        pytest.param(
            {"host": host(), "narrowed": {"pids": None, "uids": None}},
            "The input lacks processes and users: run virt.iommufd.iommufd_info with processes and users in"
            " gather_subset.",
            id="host only",
        ),
        pytest.param(
            {name: value for name, value in info().items() if name != "users"},
            "The input lacks users: run virt.iommufd.iommufd_info with users in gather_subset.",
            id="without users",
        ),
        pytest.param(
            {name: value for name, value in info().items() if name != "processes"},
            "The input lacks processes: run virt.iommufd.iommufd_info with processes in gather_subset.",
            id="without processes",
        ),
        *(
            pytest.param(
                {outcome: True, "msg": "That is why"},
                f"The input is the result of a task that was {outcome} (That is why), which tells nothing of the host:"
                " leave such hosts out.",
                id=outcome,
            )
            for outcome in ("unreachable", "failed", "skipped")
        ),
        pytest.param(
            {"failed": True, "msg": "It\n says \x1b[31m\u202e"},
            r"The input is the result of a task that was failed (It\n says \x1b[31m\u202e), which tells nothing of the"
            " host: leave such hosts out.",
            id="a hostile message",
        ),
        pytest.param(
            {"skipped": True},
            "The input is the result of a task that was skipped (no message), which tells nothing of the host: leave"
            " such hosts out.",
            id="without a message",
        ),
        pytest.param(
            info(users=[{"uid": 64055}]),
            "The input is not what this version of virt.iommufd.iommufd_info returns: give what the task registered."
            " KeyError: 'user'",
            id="a field is missing",
        ),
        pytest.param(
            info(processes=[None]),
            "The input is not what this version of virt.iommufd.iommufd_info returns: give what the task registered."
            " TypeError: 'NoneType' object is not subscriptable",
            id="a process is none",
        ),
        pytest.param(
            info(users=[{"uid": 64055, "user": "libvirt-qemu", "charged_bytes": float("nan"), "uncertain_bytes": 0}]),
            "The input is not what this version of virt.iommufd.iommufd_info returns: give what the task registered."
            " ValueError: cannot convert float NaN to integer",
            id="a size is no number",
        ),
    ],
)
def test_a_wrong_input(data: Any, expected: str) -> None:
    assert message(data) == expected


def test_a_result_that_did_not_fail() -> None:
    assert fit(info(failed=False, changed=False), memlock="1G")["fits"]


@pytest.mark.parametrize("who", ["libvirt-qemu", 64055])
def test_the_input_may_be_narrowed_to_the_user(who: Any) -> None:
    assert fit(info(narrowed={"pids": [1], "uids": [64055]}), who=who, memlock="1G")["fits"]


@pytest.mark.parametrize("who", ["alice", 1000])
def test_the_input_must_not_be_narrowed_to_others(who: Any) -> None:
    data = info(narrowed={"pids": None, "uids": [64055]})
    assert message(data, who=who) == (
        f"user: the input tells of other users than {who}: run virt.iommufd.iommufd_info without users, or"
        " with this one among them."
    )
