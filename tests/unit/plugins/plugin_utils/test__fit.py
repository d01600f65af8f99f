# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What memlock_fit answers. That the kernel does so, too, is shown by the scenario fit, and test_charges.py."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import QUESTIONS
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.plugin_utils import _fit_host, _fit_words
from ansible_collections.virt.iommufd.plugins.plugin_utils._fit import memlock_fit
from ansible_collections.virt.iommufd.plugins.plugin_utils._host_info import capability_for
from ansible_collections.virt.iommufd.tests.unit.filter_docs import documented_fields
from ansible_collections.virt.iommufd.tests.unit.fit_rows import (
    GIB,
    KIB,
    MIB,
    PAGE,
    PINNED,
    QEMU,
    UNIT,
    Row,
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

# What is known of a VM, unless a test says otherwise
EXACT: Row = {"overhead": 0, "locked": 0}
OF_VM: Row = {"user": "vm", **EXACT}

BY_IOMMUFD: Row = {"backend": "iommufd"}
LEGACY: Row = {"backend": "legacy"}
VDPA: Row = {"backend": "vdpa"}
NVME: Row = {"backend": "nvme"}
MDEV: Row = {"backend": "mdev"}
ANOTHER: Row = {"backend": "iommufd", "iommufd": "other"}
OF_FIRST: Row = {"backend": "iommufd", "iommufd": "first"}

# A memory backend that ends within a page
ODD = 70000000

# A VM that nothing puts over its limit
NO_LIMIT: Row = {"memlock_bytes": None, "memlock_unlimited": True}

# A host of which nothing was looked at
BARE: Row = {"limits_of_view": []}


def fit(data: Any, memory: Any = "64M", who: Any = "libvirt-qemu", **parameters: Any) -> Row:
    """The answer, with memory and user as far as they matter, for a VM that locks no memory unless that is said."""
    return memlock_fit(data, **{"memory": memory, "user": who, "locked": 0, **parameters})


def grown(data: Any, name: str = "vm1", **parameters: Any) -> Row:
    """The answer for a VM that runs; what grows is told apart from the rest."""
    grow = {key: parameters.pop(key) for key in ("memory", "devices") if key in parameters}
    return memlock_fit(data, grow={"vm": name, **grow}, **parameters)


def message(data: Any, **parameters: Any) -> str:
    """What is told of an error."""
    with pytest.raises(IommufdError) as raised:
        fit(data, **parameters)
    return str(raised.value)


def domain(devices: str = "", top: str = "", arguments: str = "") -> str:
    """The XML of a domain with 1 GiB."""
    words = "".join(f"<qemu:arg value='{each}'/>" for each in arguments.split())
    return (
        "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><memory unit='GiB'>1</memory>"
        f"{top}<devices>{devices}</devices><qemu:commandline>{words}</qemu:commandline></domain>"
    )


HOSTDEV = "<hostdev mode='subsystem' type='pci'><driver name='vfio' iommufd='yes'/></hostdev>"
PLACED = HOSTDEV.replace("</hostdev>", "<address type='pci' bus='1'/></hostdev>")
OLD_HOSTDEV = "<hostdev mode='subsystem' type='pci'/>"
COMMANDLINE = "-object iommufd,id=i -device vfio-pci,iommufd=i"
HARD_LIMIT = "<memtune><hard_limit unit='GiB'>3</hard_limit></memtune>"
LOCKED = "<memoryBacking><locked/></memoryBacking>"


def test_the_documented_answer() -> None:
    documented = documented_fields("memlock_fit")
    answer = fit(
        info(processes=[unit()], users=[of_vm()]), memory="64G", who="vm", memlock="65G", overhead="1G", locked=0
    )
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
    limit = charged + PINNED + spare
    answer = fit(info(processes=[process(**NO_LIMIT)]), memory=PINNED, memlock=limit, accounting=accounting, **EXACT)
    assert answer["fits"] is fits
    assert answer["counter"] == {"user": "user", "process": "mm_locked"}[accounting]
    assert answer["accounting"] == accounting
    assert answer["needed"] == PINNED
    assert answer["charged"] == charged
    assert answer["limit"] == limit
    assert answer["headroom"] == PINNED + spare
    assert (answer["remedy"] is None) == fits
    assert answer["question"] is None
    assert answer["prerequisites"] == []


def test_a_vm_pins_whole_pages() -> None:
    assert fit(info(), memory=2 * PAGE, overhead=0)["needed"] == 2 * PAGE
    assert fit(info(), memory=2 * PAGE, overhead=1)["needed"] == 3 * PAGE
    assert fit(info(), memory=2 * PAGE, overhead=1, memlock=PINNED + 3 * PAGE - 1)["fits"] is False


@pytest.mark.parametrize(("memory", "needed"), [(1, 8), ("65537K", 65544), ("65544K", 65544)])
def test_qemu_rounds_the_memory_up(memory: Any, needed: int) -> None:
    given: Row = {"accounting": "process", "locked": 0}
    answer = fit(idle(), memory=memory, overhead=0, memlock=needed * KIB, **given)
    assert (answer["needed"], answer["fits"]) == (needed * KIB, True)
    assert fit(idle(), memory=memory, overhead=0, memlock=needed * KIB - PAGE, **given)["fits"] is False


@pytest.mark.parametrize("page", [PAGE, 4 * PAGE, 16 * PAGE])
def test_pages_are_those_of_the_host(page: int) -> None:
    data = info(host=host(page_bytes=page))
    given = {"memory": MIB, "overhead": 1, "locked": 0, "accounting": "process"}
    answer = fit(data, memlock=MIB + page, **given)
    assert (answer["needed"], answer["fits"]) == (MIB + page, True)
    # The kernel rounds the limit down, the memory up.
    assert fit(data, memlock=MIB + page - 1, **given)["fits"] is False


@pytest.mark.parametrize(("limit", "fits"), [(MIB, False), (MIB + PAGE, None), (MIB + 16 * PAGE, True)])
def test_pages_of_a_host_that_was_not_looked_at(limit: int, fits: bool | None) -> None:
    data = info(host=host(page_bytes=None))
    answer = fit(data, memory=MIB, overhead=1, locked=0, memlock=limit, accounting="process")
    assert answer["fits"] is fits
    assert (answer["question"] or "").startswith("How large are the host's pages? " if fits is None else "")


ON_TOP_OF = (
    "The VM pins 64 MiB and up to 1 GiB beyond that, which is what libvirt allows for. Charged to libvirt-qemu on top"
    " of"
)
ENDS = "and ends with -12 (Cannot allocate memory)."


def left(size: str, who: str = "libvirt-qemu") -> str:
    return (
        f" {size} are then left to user {who}. What its other programs register by io_uring or AF_XDP counts, too, and"
        " no file shows all of it: with more than that, the VM fails."
    )


@pytest.mark.parametrize(
    ("data", "memlock", "fits", "reason"),
    [
        pytest.param(
            info(),
            "2G",
            True,
            f"{ON_TOP_OF} 64.2 MiB, it is within its limit of 2 GiB.{left('896 MiB')}",
            id="fits",
        ),
        pytest.param(
            info(),
            PINNED + 64 * MIB,
            None,
            f"{ON_TOP_OF} 64.2 MiB, it may be anything from 0 bytes below to 1 GiB over its limit of 128 MiB.",
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
            PINNED + 64 * MIB + GIB - PAGE,
            None,
            f"{ON_TOP_OF} 64.2 MiB, it may be anything from 1 GiB below to 4 KiB over its limit of 1.1 GiB.",
            id="not at most",
        ),
        pytest.param(
            info(users=[user(uncertain_bytes=PINNED)]),
            "2G",
            True,
            f"{ON_TOP_OF} 64.2 MiB to 128 MiB, it is within its limit of 2 GiB.{left('832 MiB')}",
            id="uncertain",
        ),
        pytest.param(
            info(users=[user(charged_bytes=0, uncertain_bytes=PINNED)]),
            "100M",
            None,
            f"{ON_TOP_OF} 0 bytes to 64.2 MiB, it may be anything from 36 MiB below to 1 GiB over its limit of"
            " 100 MiB.",
            id="all is uncertain",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("descriptors", "iommufds", "libvirt"))),
            "2G",
            True,
            f"{ON_TOP_OF} 64.2 MiB, it is within its limit of 2 GiB.{left('896 MiB')}",
            id="what was not seen is counted",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("processes"))),
            "200M",
            None,
            f"{ON_TOP_OF} 64.2 MiB, it may or may not be within its limit of 200 MiB.",
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
            info(host=host(limits_of_view=unseen("charges"))),
            "2G",
            None,
            f"{ON_TOP_OF} 64.2 MiB, it may or may not be within its limit of 2 GiB. This is why.",
            id="VMs that have ended",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("charges"))),
            "100M",
            False,
            f"{ON_TOP_OF} 64.2 MiB, it is at least 28.2 MiB over its limit of 100 MiB {ENDS}",
            id="VMs that have ended make it no better",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("processes"))),
            "infinity",
            True,
            f"{ON_TOP_OF} 64.2 MiB, it has no limit to reach.",
            id="unlimited",
        ),
    ],
)
def test_per_user(data: Row, memlock: Any, fits: bool | None, reason: str) -> None:
    rows = [{**each, **NO_LIMIT} for each in data["processes"]]
    answer = fit({**data, "processes": rows}, memlock=memlock, accounting="user", locked=0)
    assert (answer["fits"], answer["accounting"], answer["counter"]) == (fits, "user", "user")
    assert answer["reason"] == reason
    assert (answer["question"] is None) is (fits is not None)


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
    answer = fit(data, memlock=memlock, overhead=overhead, locked=0, accounting="process")
    assert (answer["fits"], answer["accounting"], answer["charged"]) == (fits, "process", 0)
    assert answer["headroom"] == answer["limit"]
    assert reason in (answer["reason"], None)


def test_with_cap_ipc_lock() -> None:
    answer = fit(info(), memory="64G", memlock="64K", accounting="none", overhead=0)
    assert answer == {
        "fits": True,
        "counter": None,
        "accounting": "none",
        "charged": 0,
        "needed": 64 * GIB,
        "limit": 64 * KIB,
        "headroom": None,
        "reason": "The VM pins 64 GiB. With CAP_IPC_LOCK no limit is checked.",
        "remedy": None,
        "prerequisites": [],
        "question": None,
    }


@pytest.mark.parametrize("memlock", ["unlimited", "infinity"])
def test_without_a_limit(memlock: str) -> None:
    answer = fit(info(), memlock=memlock)
    assert (answer["fits"], answer["limit"], answer["headroom"], answer["charged"]) == (True, None, None, PINNED)


# Devices and a vIOMMU, with 64 MiB and a limit of 100 MiB: who is charged, whether it fits, by which counter, and what
# it needs, in MiB
SPACES: list[tuple[Row, str, bool | None, str | None, int]] = [
    ({}, "user", True, "user", 64),
    ({"vfio_devices": 2}, "user", True, "user", 64),
    ({"vfio_devices": "2", "viommu": "no"}, "user", True, "user", 64),
    ({"vfio_devices": 1, "viommu": True}, "user", True, "user", 64),
    ({"vfio_devices": 2, "viommu": True}, "user", False, "user", 128),
    ({"vfio_devices": 2, "viommu": "each"}, "process", False, "mm_locked", 128),
    ({"vfio_devices": 8, "viommu": "nested"}, "process", True, "mm_locked", 64),
    ({"devices": []}, "process", True, None, 0),
    # One by iommufd and one by the legacy container: the mode process breaks what runs in the mode user.
    ({"devices": [BY_IOMMUFD, LEGACY]}, "user", True, "user", 64),
    ({"devices": [BY_IOMMUFD, LEGACY]}, "process", False, "mm_locked", 128),
    ({"devices": [LEGACY, BY_IOMMUFD]}, "process", False, "mm_locked", 128),
    ({"devices": [BY_IOMMUFD, LEGACY]}, "none", True, None, 64),
    ({"devices": [LEGACY]}, "user", True, "mm_locked", 64),
    ({"devices": [LEGACY, LEGACY]}, "user", True, "mm_locked", 64),
    ({"devices": [LEGACY, NVME]}, "user", False, "mm_locked", 128),
    ({"devices": [NVME, NVME]}, "user", False, "mm_locked", 128),
    # Two iommufds
    ({"devices": [BY_IOMMUFD, ANOTHER]}, "user", False, "user", 128),
    ({"devices": [BY_IOMMUFD, ANOTHER]}, "process", False, "mm_locked", 128),
    ({"devices": [{**BY_IOMMUFD, "mode": "process"}, ANOTHER]}, "user", True, "mm_locked", 64),
    # vDPA is checked whatever the mode and the capability, against what each iommufd has filled.
    ({"devices": [BY_IOMMUFD, VDPA]}, "user", False, "mm_pinned", 128),
    ({"devices": [BY_IOMMUFD, VDPA]}, "process", False, "mm_pinned", 128),
    ({"devices": [BY_IOMMUFD, VDPA]}, "none", False, "mm_pinned", 128),
    ({"devices": [VDPA]}, "none", True, "mm_pinned", 64),
    ({"devices": [VDPA, VDPA]}, "none", False, "mm_pinned", 128),
    ({"devices": [LEGACY, VDPA]}, "process", True, "mm_locked", 64),
    # In another order, or one that is not known, it may be refused later.
    ({"devices": [VDPA, BY_IOMMUFD]}, "process", None, "mm_pinned", 128),
    # What the VMM locks itself, and 128 MiB more for a moment
    ({"locked": "64M"}, "user", None, "mm_locked", 192),
    ({"locked": "64M"}, "process", False, "mm_locked", 256),
    ({"locked": "64M", "devices": [LEGACY]}, "user", False, "mm_locked", 256),
    ({"locked": "64M"}, "none", True, None, 192),
    ({"locked": "101M"}, "user", False, "mm_locked", 229),
    # An mdev pins as it runs.
    ({"devices": [MDEV], "memory": "99M"}, "user", True, "mm_locked", 99),
    ({"devices": [MDEV, NVME]}, "user", None, "mm_locked", 128),
    ({"devices": [{**MDEV, "iommufd": "x"}], "memory": "101M"}, "process", None, "mm_locked", 101),
]


@pytest.mark.parametrize(("given", "accounting", "fits", "counter", "needed"), SPACES)
def test_address_spaces(given: Row, accounting: str, fits: bool | None, counter: str | None, needed: int) -> None:
    answer = fit(idle(), **{"who": "vm", "memlock": "100M", "accounting": accounting, **EXACT, **given})
    assert (answer["fits"], answer["counter"], answer["needed"]) == (fits, counter, needed * MIB)
    assert (answer["question"] is None) is (fits is not None)


def test_what_vdpa_says() -> None:
    answer = fit(idle(), who="vm", memlock="100M", accounting="none", devices=[BY_IOMMUFD, VDPA], **EXACT)
    assert answer["reason"].endswith(
        "it is 28 MiB over its limit of 100 MiB and runs on without its vDPA device (vhost vdpa map fail!)."
    )
    # Neither the mode nor the capability would help.
    assert answer["remedy"] == f"To make it fit: {in_unit(128 * MIB)}."


def test_an_mdev_may_fail_later() -> None:
    answer = fit(idle(), who="vm", memlock="50M", accounting="process", devices=[MDEV], **EXACT)
    assert (answer["fits"], answer["needed"]) == (None, 64 * MIB)
    assert "It fits now, and may fail later: its mdev pins as it runs, up to all memory" in answer["reason"]
    assert answer["question"].startswith("How much will its mdev pin as it runs? Nothing tells that beforehand.")
    assert f"A limit of {64 * MIB} bytes suffices" in answer["question"]
    unlocked = fit(idle(), who="vm", memlock="50M", accounting="process", devices=[MDEV], overhead=0, locked=None)
    assert "Its mdev pins as it runs, so what fits now may fail later." in unlocked["reason"]


def test_several_address_spaces_multiply_what_was_measured() -> None:
    answer = fit(info(), memory="64G", viommu=True, vfio_devices=2, accounting="process")
    assert answer["needed"] == 129 * GIB
    assert answer["reason"].startswith(
        "The VM pins 128 GiB (64 GiB in each of 2 address spaces) and up to 1 GiB beyond that, which is what libvirt"
    )
    data = info(processes=[process(pinned_bytes=64 * MIB + 600 * MIB)])
    answer = fit(data, memory="64G", viommu=True, vfio_devices=2, accounting="process")
    assert answer["needed"] == 128 * GIB + 1200 * MIB
    assert "and up to 1.2 GiB beyond that, as running VMs do." in answer["reason"]


def by_legacy(**fields: Any) -> Row:
    """A VM with a device by the legacy container."""
    held: Row = {"fd": 50, "same_as": None, "shared_with": []}
    return process(
        backends=["legacy"],
        iommufds=[],
        legacy_containers=[held],
        pinned_bytes=0,
        accounting="process",
        **{"locked_bytes": PINNED, "vfio_devices": [{"fd": 40, "backend": "legacy", "as_it_runs": False}], **fields},
    )


# A VM that pins 3 GiB beyond its memory
LARGE = process(pinned_bytes=64 * MIB + 3 * GIB)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        pytest.param([LARGE], 3 * GIB, id="measured"),
        pytest.param([process(), LARGE, process(pinned_bytes=2 * GIB)], 3 * GIB, id="the largest counts"),
        pytest.param([{**LARGE, "uid": 0, "accounting": "none"}], 3 * GIB, id="whoever and however"),
        # It may be another kind of VM, with a display or more devices.
        pytest.param([process()], GIB, id="little"),
        pytest.param([process(pinned_bytes=64 * MIB)], GIB, id="nothing"),
        pytest.param([by_legacy(locked_bytes=64 * MIB + 3 * GIB)], 3 * GIB, id="by the legacy container"),
        pytest.param([by_legacy(locked_bytes=4 * GIB, locks_memory=None)], GIB, id="which may be mlock"),
        pytest.param([process(pinned_bytes=0)], GIB, id="nothing pinned"),
        pytest.param([process(pinned_bytes=63 * MIB)], GIB, id="not all pinned"),
        pytest.param([{**LARGE, "memory_bytes": None}], GIB, id="unknown memory"),
        pytest.param([{**LARGE, "address_spaces": None}], GIB, id="unknown address spaces"),
        pytest.param([{**LARGE, "address_spaces": 2}], GIB, id="two address spaces"),
        pytest.param([{**LARGE, "backends": ["iommufd", "vdpa"]}], GIB, id="vDPA, too"),
        pytest.param([{**LARGE, "backends": None}], GIB, id="unknown backends"),
        pytest.param([{**LARGE, "holder": True}], GIB, id="a copy"),
        pytest.param([], GIB, id="no VM"),
    ],
)
def test_overhead_is_no_less_than_what_libvirt_allows_for_and_than_what_is_measured(
    processes: list[Row], expected: int
) -> None:
    assert fit(info(processes=processes), memory="64G", memlock="1T")["needed"] == 64 * GIB + expected


def test_a_running_vm_of_another_kind_is_no_proof() -> None:
    """With a display, 16 MiB more are pinned once the guest runs, and then QEMU ends."""
    given = {"who": "vm", "memlock": "66M", "accounting": "process", "locked": 0}
    answer = fit(info(processes=[unit()]), **given)
    assert (answer["fits"], answer["question"]) == (None, "How much does the VM pin beyond its memory? Give overhead.")
    assert fit(info(processes=[unit()]), **given, overhead="256K")["fits"] is True
    assert fit(info(processes=[unit()]), **given, overhead="16M")["fits"] is False


CAPABLE: Row = {"capabilities": {"effective": ["cap_ipc_lock"], "ambient": ["cap_ipc_lock"]}}
OF_A_FILE: Row = {"capabilities": {"effective": ["cap_ipc_lock"], "ambient": []}}
SHOWS_NOTHING = "No running VM of vm shows its accounting, which is per user unless somebody sets it."
SOME, NOT_KNOWN, WITHHELD = _fit_host.SOME, _fit_host.NOT_KNOWN, _fit_host.WITHHELD


@pytest.mark.parametrize(
    ("data", "accounting", "reason"),
    [
        pytest.param(
            idle(host=host(qemu=[emulator(True), emulator(None, present=False)])),
            None,
            f"{WITHHELD} {SHOWS_NOTHING}",
            id="all emulators",
        ),
        pytest.param(
            info(host=host(qemu=[emulator(True)]), processes=[unit(accounting="none", **CAPABLE)]),
            "none",
            "The running VMs of vm have CAP_IPC_LOCK.",
            id="all emulators, and the running VMs",
        ),
        pytest.param(
            info(processes=[unit(accounting="process"), unit(pinned_bytes=0, memory_bytes=None)]),
            "process",
            "The running VMs of vm are accounted per process.",
            id="who has pinned nothing and has no guest is no VM",
        ),
        pytest.param(
            info(processes=[unit()]), "user", "The running VMs of vm are accounted per user.", id="running VMs"
        ),
        pytest.param(
            info(processes=[unit(accounting="process"), process(), process(accounting=None)]),
            "process",
            "The running VMs of vm are accounted per process.",
            id="running VMs per process",
        ),
        pytest.param(
            info(processes=[unit(accounting="process"), unit(holder=True)]),
            "process",
            "The running VMs of vm are accounted per process.",
            id="a launcher's copy is no VM",
        ),
        pytest.param(
            info(processes=[unit(accounting="process"), unit(backends=["legacy"], accounting="process")]),
            "process",
            "The running VMs of vm are accounted per process.",
            id="the legacy container shows nothing",
        ),
        pytest.param(
            info(processes=[unit(backends=["legacy"], accounting="process")]),
            None,
            SHOWS_NOTHING,
            id="nor does it alone",
        ),
        pytest.param(
            info(processes=[unit(accounting="process"), unit(accounting=None)]),
            None,
            "vm may have other VMs than were seen whole.",
            id="one is unknown",
        ),
        pytest.param(
            info(
                processes=[unit(accounting="process")],
                users=[of_vm(unsure=PINNED)],
                host=host(limits_of_view=unseen("iommufds")),
            ),
            None,
            "vm may have other VMs than were seen whole.",
            id="the iommufds of some are hidden",
        ),
        pytest.param(
            info(processes=[unit(accounting="process")], host=host(limits_of_view=unseen("iommufds"))),
            "process",
            "The running VMs of vm are accounted per process.",
            id="the iommufds of others are hidden",
        ),
        pytest.param(
            info(processes=[unit(accounting="none")]),
            "none",
            "The running VMs of vm have CAP_IPC_LOCK.",
            id="capability",
        ),
        pytest.param(
            info(host=host(qemu=[emulator(None)]), processes=[unit(accounting="none")]),
            "none",
            "The running VMs of vm have CAP_IPC_LOCK.",
            id="and the emulator may have it",
        ),
        pytest.param(
            info(processes=[unit(accounting="none"), unit(accounting="process")]),
            None,
            "vm has VMs that differ in accounting.",
            id="running VMs differ",
        ),
        pytest.param(info(processes=[unit(accounting=None)]), None, SHOWS_NOTHING, id="running VMs are unknown"),
        pytest.param(info(), None, SHOWS_NOTHING, id="running VMs of others"),
        pytest.param(idle(), None, SHOWS_NOTHING, id="no VMs"),
        pytest.param(idle(host=host(qemu=[])), None, f"{NOT_KNOWN} {SHOWS_NOTHING}", id="no emulators"),
        pytest.param(
            idle(host=host(qemu=[emulator(True, "/usr/bin/a"), emulator(False, "/usr/bin/b")])),
            None,
            f"{SOME} {SHOWS_NOTHING}",
            id="an emulator has it",
        ),
        pytest.param(idle(host=BARE), None, f"{NOT_KNOWN} {SHOWS_NOTHING}", id="no host"),
    ],
)
def test_auto(data: Row, accounting: str | None, reason: str) -> None:
    answer = fit(data, who="vm", memlock="1T")
    assert answer["accounting"] == accounting
    assert answer["reason"].startswith(f"{reason} The VM pins 64 MiB and up to ")
    assert answer["fits"]


BY_FILE = "The host's emulators have CAP_IPC_LOCK."


@pytest.mark.parametrize(
    ("its_libvirt", "running", "accounting"),
    [
        pytest.param({}, [], "none", id="known"),
        pytest.param({}, [process(**CAPABLE, accounting="none")], "none", id="and so it is"),
        pytest.param({}, [unit()], "none", id="another user's has not"),
        pytest.param({}, [process(emulator="/opt/qemu")], "none", id="another emulator has not"),
        pytest.param({}, [process(holder=True)], "none", id="a copy has not"),
        pytest.param({}, [process(no_new_privs=True)], None, id="a running one has not"),
        pytest.param({"passes_cap_ipc_lock": False}, [], None, id="withheld"),
        pytest.param({"passes_cap_ipc_lock": None}, [], None, id="not known"),
    ],
)
def test_what_a_file_gives_may_be_withheld(its_libvirt: Row, running: list[Row], accounting: str | None) -> None:
    """By NoNewPrivileges= and the like, of libvirt's daemon. That of a unit which is asked about is not known."""
    on = host(qemu=[emulator(True)], libvirt=older(**its_libvirt))
    given: Row = {"memlock": "8M", **EXACT}
    answer = fit(info(host=on, processes=running, users=[]), **given)
    assert (answer["accounting"], answer["fits"]) == (accounting, True if accounting else None)
    assert answer["reason"].startswith(BY_FILE if accounting else WITHHELD)
    assert (answer["question"] or "").startswith("" if accounting else "Has the VMM CAP_IPC_LOCK?")
    # The file has it already.
    assert "setcap" not in (answer["remedy"] or "")
    for who in ("vm", "root"):
        assert fit(idle(host=on), who=who, **given)["fits"] is None


def test_auto_is_not_sure_where_vms_are_hidden() -> None:
    data = info(processes=[unit(accounting="none")], host=host(limits_of_view=unseen("processes")))
    answer = fit(data, who="vm", memlock="1T")
    assert (answer["accounting"], answer["fits"]) == (None, None)
    assert answer["reason"].startswith("vm may have other VMs than were seen whole.")


@pytest.mark.parametrize(
    ("who", "given"),
    [
        ("libvirt-qemu", {}),
        (64055, {}),
        ("64055", {}),
        (None, {}),
        ("vm", {"user": "vm", "uid": 1001}),
        (1001, {"user": "vm", "uid": 1001}),
        ("nobody", {"user": "nobody", "uid": None}),
    ],
)
def test_auto_knows_the_users_of_libvirt(who: Any, given: Row) -> None:
    answer = fit(info(host=native(**given)), who=who)
    assert (answer["accounting"], answer["fits"], answer["limit"]) == ("process", True, GIB + 64 * MIB)
    assert answer["reason"].startswith("libvirt sets it. The VM pins")


@pytest.mark.parametrize("who", ["alice", 1000, "root", 0, "qemu"])
def test_auto_does_not_take_others_for_them(who: Any) -> None:
    assert fit(info(host=native()), who=who, memlock="1G")["accounting"] is None


@pytest.mark.parametrize("who", ["root", "0", 0])
def test_auto_is_not_sure_of_root(who: Any) -> None:
    answer = fit(idle(), who=who, memlock="64K", **EXACT)
    assert (answer["fits"], answer["accounting"], answer["headroom"]) == (None, None, 64 * KIB)
    assert answer["reason"].startswith(
        "What root starts has CAP_IPC_LOCK, unless it is taken away, which libvirt does."
    )
    assert answer["question"].startswith("Has the VMM CAP_IPC_LOCK? Give accounting")


@pytest.mark.parametrize("accounting", ["user", "process"])
@pytest.mark.parametrize("who", ["root", "0", 0])
def test_nor_does_the_mode_tell_whether_root_has_the_capability(who: Any, accounting: str) -> None:
    given = {"who": who, "memlock": "1M", "accounting": accounting, **EXACT}
    answer = fit(idle(), **given)
    assert (answer["fits"], answer["accounting"]) == (None, None)
    assert answer["reason"].startswith("What root starts has CAP_IPC_LOCK, unless it is taken away")
    assert answer["question"] == _fit_words._QUESTIONS["capable"]
    assert "cap_ipc_lock: false" in answer["question"]
    # Each answer settles it.
    without = fit(idle(), **given, cap_ipc_lock=False)
    assert (without["fits"], without["accounting"]) == (False, accounting)
    # In the unit of a root without it, AmbientCapabilities= alone would give it nothing.
    assert "(no CapabilityBoundingSet= or PrivateUsers= in its unit that takes it away)" in without["remedy"]
    assert fit(idle(), **given, cap_ipc_lock="yes")["fits"] is True
    assert fit(idle(), **{**given, "accounting": "none"})["fits"] is True
    assert fit(idle(), **{**given, "memlock": "64M"})["fits"] is True
    # vDPA is checked all the same.
    assert fit(idle(), **given, devices=[VDPA])["fits"] is False


@pytest.mark.parametrize("running", [["cap_ipc_lock"], []])
@pytest.mark.parametrize("fields", [{}, {"initial_user_namespace": False}, {"iommufds": iommufds(1, mode="process")}])
@pytest.mark.parametrize("accounting", ["process", "auto"])
def test_running_vms_of_root_do_not_show_what_the_next_one_lacks(
    running: list[str], fields: Row, accounting: str
) -> None:
    """As with podman: a VM of root in a container had no CAP_IPC_LOCK, and the next one in a unit had it."""
    has = bool(running) and fields.get("initial_user_namespace") is not False
    row = unit(uid=0, user="root", capabilities={"effective": running}, accounting="none" if has else "process")
    answer = fit(
        info(processes=[{**row, **fields}], users=[]), who="root", memlock="1M", accounting=accounting, **EXACT
    )
    if has and accounting == "auto":
        assert (answer["fits"], answer["accounting"]) == (True, "none")
    else:
        assert (answer["fits"], answer["accounting"]) == (None, None)
        assert answer["question"].startswith("Has the VMM CAP_IPC_LOCK? Give accounting")
    data = info(processes=[{**row, **fields}], users=[])
    told = fit(data, who="root", memlock="1M", accounting=accounting, cap_ipc_lock=False, **EXACT)
    assert told["fits"] is False


def test_what_libvirt_runs_as_root_has_no_capability() -> None:
    data = idle(host=native(user="root", uid=0))
    assert fit(data, who=None, memlock="1M", accounting="user", **EXACT)["fits"] is False


def test_who_has_not_what_others_have_is_not_accounted_as_they_are() -> None:
    data = info(processes=[unit(**CAPABLE, accounting="none")], users=[])
    given = {"who": "vm", "memlock": "100M", "cap_ipc_lock": False, **EXACT}
    assert fit(data, **given)["accounting"] is None
    assert fit(data, **{**given, "memlock": "1M"})["fits"] is False
    assert fit(idle(host=host(qemu=[emulator(True)])), **{**given, "memlock": "1M"})["fits"] is False


OF_LEGACY: Row = {
    "iommufds": [],
    "backends": ["legacy"],
    "vfio_devices": [{"fd": 40, "backend": "legacy", "as_it_runs": False}],
}


@pytest.mark.parametrize(
    ("running", "who", "devices", "fits", "accounting"),
    [
        pytest.param([unit(**OF_LEGACY, **CAPABLE)], "vm", [LEGACY], True, "none", id="it has the capability"),
        pytest.param([unit(**CAPABLE, accounting="none")], "vm", [LEGACY], True, "none", id="of another backend"),
        pytest.param([unit(**OF_LEGACY)], "vm", [LEGACY], False, "process", id="it has not"),
        pytest.param([unit(**OF_LEGACY), unit(**CAPABLE)], "vm", [LEGACY], None, None, id="one of two has"),
        pytest.param(
            [unit(**OF_LEGACY, **CAPABLE, initial_user_namespace=None)],
            "vm",
            [LEGACY],
            None,
            None,
            id="it may not count",
        ),
        pytest.param(
            [unit(**OF_LEGACY, **CAPABLE, initial_user_namespace=False)],
            "vm",
            [LEGACY],
            False,
            "process",
            id="it does not count",
        ),
        pytest.param([], "vm", [LEGACY], False, "process", id="nobody runs"),
        pytest.param([], "root", [LEGACY], None, None, id="root runs nothing"),
        pytest.param(
            [unit(uid=0, user="root", **OF_LEGACY, **CAPABLE)], "root", [LEGACY], True, "none", id="root has it"
        ),
        pytest.param([unit(uid=0, user="root", **OF_LEGACY)], "root", [LEGACY], None, None, id="root has not"),
        # With a vDPA device, one that has the capability is accounted per process.
        pytest.param(
            [unit(**CAPABLE, vdpa_devices=[{"fd": 50}], backends=["iommufd", "vdpa"], accounting="process")],
            "vm",
            [BY_IOMMUFD],
            True,
            "none",
            id="it has a vDPA device, too",
        ),
    ],
)
def test_auto_sees_the_capability_of_running_vms(
    running: list[Row], who: str, devices: list[Row], fits: bool | None, accounting: str | None
) -> None:
    answer = fit(info(processes=running, users=[]), who=who, memlock="8M", devices=devices, **EXACT)
    assert (answer["fits"], answer["accounting"]) == (fits, accounting)
    assert (answer["question"] or "").startswith("Has the VMM CAP_IPC_LOCK?" if fits is None else "")


@pytest.mark.parametrize("devices", [[LEGACY], [BY_IOMMUFD]])
@pytest.mark.parametrize("others", [[], [unit(**CAPABLE, accounting="none", pid=9)]])
def test_a_vm_that_runs_may_have_a_capability_that_its_file_has_lost(devices: list[Row], others: list[Row]) -> None:
    """As after an upgrade of the emulator: the next one gets no capability. That of a unit is another one."""
    data = info(processes=[unit(**OF_A_FILE, accounting="none"), *others], users=[])
    answer = fit(data, who="vm", memlock="8M", devices=devices, **EXACT)
    assert (answer["fits"], answer["accounting"]) == (None, None)
    assert answer["question"].startswith("Has the VMM CAP_IPC_LOCK?")
    assert "The host's emulators do not have it any more." in answer["reason"]
    granted = {**data, "host": host(qemu=[emulator(True)])}
    assert fit(granted, who="vm", memlock="8M", devices=devices, **EXACT)["fits"]


@pytest.mark.parametrize("devices", [[LEGACY], [BY_IOMMUFD]])
def test_a_running_domain_may_have_a_capability_that_its_file_has_lost(devices: list[Row]) -> None:
    runs = unit(**CAPABLE, accounting="none", domain_uri="qemu:///session")
    data = info(processes=[runs], users=[], host=native(sessions=[session(80 * MIB)]))
    answer = fit(data, who="vm", memory="128M", memlock="libvirt", devices=devices)
    assert answer["fits"] is False
    roomy = info(processes=[runs], users=[of_vm()], host=native(sessions=[session(2 * GIB)]))
    answer = fit(roomy, who="vm", memory="1G", devices=devices, **EXACT)
    assert answer["accounting"] is None
    assert "The host's emulators do not have it any more." in answer["reason"]


UNSET = libvirt(sets_rlimit_mode=None, cap_sys_resource=True, reason="It cannot be told.")


@pytest.mark.parametrize(
    ("memlock", "fits"), [pytest.param("1G", True), pytest.param("100M", None), pytest.param("32M", False)]
)
def test_several_possibilities(memlock: str, fits: bool | None) -> None:
    answer = fit(info(host=host(libvirt=UNSET)), memlock=memlock, **EXACT)
    assert (answer["fits"], answer["accounting"]) == (fits, None)
    assert answer["reason"].startswith(
        "It is not known whether libvirt sets per-process accounting. It cannot be told."
    )
    assert (answer["question"] or "Which mode has its iommufd?").startswith("Which mode has its iommufd?")


@pytest.mark.parametrize(
    ("who", "charged"),
    [("libvirt-qemu", PINNED), (64055, PINNED), (" 64055 ", PINNED), (1000, MIB), (2000, 0), ("alice", 0), ("bob", 0)],
)
def test_the_charge_is_that_of_the_user(who: Any, charged: int) -> None:
    alice = process(uid=2000, user="alice", accounting="process")
    data = info(users=[user(), user(uid=1000, user=None, charged_bytes=MIB)], processes=[process(), alice])
    assert fit(data, who=who, accounting="user", memlock="2G", locked=0)["charged"] == charged


# Who gives the limit, and which: what is known of libvirt, what is asked, and the answer
LIMITS = [
    # A session libvirt cannot raise it above its own hard limit.
    (libvirt(), {"who": "vm"}, False, 8 * MIB),
    (libvirt(sessions=[session(2 * GIB)]), {"who": "vm"}, True, GIB + 64 * MIB),
    (libvirt(sessions=[session(GIB + 64 * MIB)]), {"who": 1001}, True, GIB + 64 * MIB),
    (libvirt(sessions=[session(None)]), {"who": "vm"}, True, GIB + 64 * MIB),
    (libvirt(sessions=[session(2 * GIB)]), {"who": "vm", "locked": True}, False, 2 * GIB),
    (libvirt(sessions=[session(None)]), {"who": "vm", "locked": True}, True, None),
    # The daemon that runs has its own, and where there are several, it is not known which.
    (libvirt(sessions=[{**session(8 * MIB), "pid": 77}]), {"who": "vm"}, False, 8 * MIB),
    (libvirt(sessions=[{**session(2 * GIB), "pid": 77}]), {"who": "vm"}, True, GIB + 64 * MIB),
    (libvirt(sessions=[{**session(None), "pid": 77, "memlock_hard_unlimited": None}]), {"who": "vm"}, None, None),
    (libvirt(sessions=[]), {"who": "vm"}, None, None),
    (libvirt(sessions=None), {"who": "vm"}, None, None),
    # A system libvirt gives what it reckons, be its daemon's own higher or lower.
    (libvirt(), {}, True, GIB + 64 * MIB),
    (libvirt(memlock_bytes=None, memlock_unlimited=True), {}, True, GIB + 64 * MIB),
    (libvirt(memlock_bytes=8 * GIB, memlock_hard_bytes=8 * GIB), {}, True, GIB + 64 * MIB),
    (libvirt(locked=True), {}, True, GIB + 64 * MIB),
    (libvirt(), {"locked": True}, True, None),
    (libvirt(), {"memlock": "1G", **EXACT}, True, GIB),
    # The one that knows no iommufd sees no device, and the VM has the daemon's own.
    (older(), {"memory": "65M"}, False, 64 * MIB),
    (older(), EXACT, True, 64 * MIB),
    (older(memlock_bytes=None), {}, None, None),
    (older(memlock_bytes=None, memlock_unlimited=True), {}, True, None),
    (older(), {"devices": [LEGACY]}, True, GIB + 64 * MIB),
    # One that may know it
    (older(supports_iommufd=None), {}, None, None),
    # A daemon that may not raise it
    (libvirt(cap_sys_resource=False), {"devices": [LEGACY]}, False, 64 * MIB),
    (libvirt(cap_sys_resource=False, memlock_hard_bytes=None), {"devices": [LEGACY]}, None, None),
    (libvirt(cap_sys_resource=None, sets_rlimit_mode=None), {"devices": [LEGACY]}, None, None),
    (libvirt(cap_sys_resource=False, memlock_hard_bytes=2 * GIB), {"devices": [LEGACY]}, True, GIB + 64 * MIB),
    # Nobody knows who its VMs run as.
    (libvirt(user=None, uid=None), {"who": "vm"}, None, None),
    (libvirt(user=None, uid=None), {"who": "vm", "memlock": "1G", **EXACT}, True, GIB),
    (libvirt(user=None, uid=None), {"who": None}, True, GIB + 64 * MIB),
    (older(user=None, uid=None), {"who": None, "memlock": "1G"}, None, GIB),
]


@pytest.mark.parametrize(("its_libvirt", "given", "fits", "limit"), LIMITS)
def test_the_limit_that_libvirt_gives(its_libvirt: Row, given: Row, fits: bool | None, limit: int | None) -> None:
    answer = fit(idle(host=host(libvirt=its_libvirt)), **given)
    assert (answer["fits"], answer["limit"]) == (fits, limit)
    assert (answer["question"] is None) is (fits is not None)


@pytest.mark.parametrize(("pid", "end"), [(77, " Its daemon, process 77, keeps that limit until it ends."), (None, "")])
def test_the_limit_of_a_session_is_its_daemons(pid: int | None, end: str) -> None:
    """Where one runs, another limit of the service manager's helps only once it has ended."""
    sessions = [{**session(8 * MIB), "pid": pid}]
    answer = fit(idle(host=host(libvirt=libvirt(sessions=sessions))), who="vm")
    assert f"cannot raise it beyond its own hard limit of 8 MiB.{end}" in answer["reason"]
    assert ("Its daemon" in answer["reason"]) is bool(end)
    assert ("end libvirt's daemon, process 77, if it still runs then)" in answer["remedy"]) is bool(end)
    # Else whoever starts one gives it the limit.
    own = [each for each in answer["prerequisites"] if each.startswith("The libvirt of user vm does not run.")]
    assert len(own) == (0 if end else 1)
    assert fit(idle(host=host(libvirt=libvirt(sessions=sessions))), who="vm", memlock="8M")["prerequisites"] == []


def test_a_daemon_that_cannot_raise_the_limit_starts_no_domain_by_the_legacy_container() -> None:
    answer = fit(idle(host=host(libvirt=libvirt(cap_sys_resource=False))), devices=[LEGACY])
    assert answer["fits"] is False
    assert "libvirt would not start it: it reckons with 1.1 GiB for the VM" in answer["reason"]
    assert answer["remedy"].startswith("To make it fit: let libvirt's daemon use CAP_SYS_RESOURCE")


def test_a_limit_that_is_not_known() -> None:
    answer = fit(idle(host=host(libvirt=older(memlock_bytes=None))))
    assert (answer["fits"], answer["limit"], answer["headroom"]) == (None, None, None)
    assert answer["question"] == (
        "Which RLIMIT_MEMLOCK will the VMM have? Give memlock, or domain_xml for a domain of libvirt's."
    )


@pytest.mark.parametrize(
    ("data", "parameters"),
    [
        pytest.param(idle(host=host(qemu=[emulator(True)], libvirt=older(memlock_bytes=None))), {}, id="capability"),
        pytest.param(info(), {"accounting": "none"}, id="the VM has it"),
        pytest.param(info(host=native(memlock_bytes=None)), {}, id="it is enough anyway"),
        pytest.param(info(), {"memlock": "2G"}, id="it is given"),
    ],
)
def test_a_limit_that_does_not_matter_or_is_known(data: Row, parameters: Row) -> None:
    assert fit(data, **parameters)["fits"] is True


def test_who_runs_the_vms_of_libvirt_is_not_known() -> None:
    answer = fit(idle(host=host(libvirt=older(user=None, uid=None))), who=None, memlock="1G", **EXACT)
    assert answer["question"] == "Which user does libvirt run its VMs as? Give user."
    assert "Charged to a user that is not known" in answer["reason"]


def test_a_session_with_the_limit_of_the_distribution() -> None:
    answer = fit(idle(host=native()), memory="1G", who="vm")
    assert (answer["fits"], answer["counter"]) == (False, None)
    assert answer["reason"].startswith(
        "The libvirt of user vm would not start it: it reckons with 2 GiB for the VM, and cannot raise it beyond its"
        " own hard limit of 8 MiB."
    )
    need, by_manager = answer["prerequisites"]
    assert answer["reason"].startswith(need)
    assert by_manager.endswith("one that is started from a login has the limit of the login.")
    assert answer["remedy"].startswith(
        "To make it fit: raise the limit of vm's service manager (LimitMEMLOCK=2147483648 in a drop-in of"
        " user@1001.service, and restart that)"
    )
    assert "hard_limit" not in answer["remedy"]


BOUNDED = "CapabilityBoundingSet=CAP_SYS_RESOURCE"
HARDENED = libvirt(
    cap_sys_resource=False, sets_rlimit_mode=False, reason="Its unit takes that away.", drop_in=[BOUNDED]
)


@pytest.mark.parametrize("accounting", ["auto", "none", "process", "user"])
def test_a_daemon_without_the_capability_starts_no_domain(accounting: str) -> None:
    data = info(host=host(libvirt=HARDENED, qemu=[emulator(True)]))
    answer = fit(data, accounting=accounting)
    assert answer["fits"] is False
    (need,) = answer["prerequisites"]
    assert need.startswith("libvirt's daemon may not use CAP_SYS_RESOURCE")
    assert answer["reason"].startswith(need)
    assert answer["remedy"] == f"To make it fit: give {capability_for(UNIT, [BOUNDED])}."
    assert "setcap" not in answer["remedy"]


def test_a_daemon_whose_capability_is_not_known() -> None:
    """As where SELinux may deny it."""
    data = idle(host=native(cap_sys_resource=None, sets_rlimit_mode=None))
    answer = fit(data, memlock="1G", locked=0)
    assert answer["fits"] is None
    assert answer["question"].startswith("May libvirt's daemon use CAP_SYS_RESOURCE")
    # What libvirt does not give an iommufd needs it not.
    assert fit(data, memlock="1G", **EXACT, devices=[LEGACY])["fits"] is True


# A domain's XML, with 1 GiB: on which host, and the answer
DOMAINS = [
    (native(), HOSTDEV, {}, True, "process", 2 * GIB),
    (native(), HOSTDEV * 2 + "<iommu model='intel'/>", {}, True, "process", 3 * GIB),
    # libvirt does not see the vIOMMU, and gives a limit for one address space.
    (native(), PLACED * 3, {"arguments": "-device intel-iommu"}, False, "process", 2 * GIB),
    (native(), HOSTDEV * 3, {"arguments": "-device intel-iommu", "viommu": "nested"}, True, "process", 2 * GIB),
    # Nor does it count twice what counts twice.
    (native(), HOSTDEV + OLD_HOSTDEV, {"overhead": "8K"}, False, "process", 2 * GIB),
    (host(), HOSTDEV + OLD_HOSTDEV, {"overhead": "8K"}, True, "process", 2 * GIB),
    (native(), HOSTDEV, {"arguments": "-overcommit mem-lock=on"}, None, "process", 2 * GIB),
    (native(), HOSTDEV, {"arguments": "-overcommit mem-lock=on", "locked": "1200M"}, False, "process", 2 * GIB),
    (native(), HOSTDEV, {"top": LOCKED}, True, "process", None),
    (native(), HOSTDEV, {"top": LOCKED + HARD_LIMIT}, None, "process", 3 * GIB),
    (native(), HOSTDEV, {"top": HARD_LIMIT}, True, "process", 3 * GIB),
    (native(), HOSTDEV, {"top": HARD_LIMIT, "memlock": "1000M"}, False, "process", 1000 * MIB),
    (native(), "<disk type='nvme'/><interface type='vdpa'/>" + HOSTDEV, {}, True, "process", 4 * GIB),
    # An older libvirt ignores iommufd='yes'.
    (host(), HOSTDEV, {}, True, "process", 2 * GIB),
    (host(), "", {"arguments": COMMANDLINE}, False, "user", 64 * MIB),
    (host(), "", {"arguments": COMMANDLINE, "top": HARD_LIMIT}, True, "user", 3 * GIB),
    (native(), "", {"arguments": COMMANDLINE}, False, "user", 64 * MIB),
    (host(libvirt=HARDENED), "", {"arguments": COMMANDLINE, "top": HARD_LIMIT}, False, "user", 64 * MIB),
    (host(libvirt=HARDENED), HOSTDEV, {"top": HARD_LIMIT}, False, "process", 64 * MIB),
    # Another user's than the others'
    (native(), HOSTDEV, {"top": "<seclabel model='dac'><label>vm:vm</label></seclabel>"}, True, "process", 2 * GIB),
    # A session sets no mode, refuses <memtune>, and cannot go beyond its own limit.
    (native(sessions=[session(2 * GIB)]), HOSTDEV, {"user": "vm"}, True, "user", 2 * GIB),
    (native(sessions=[session(2 * GIB)]), HOSTDEV, {"user": "vm", "top": HARD_LIMIT}, False, "user", None),
    (native(), HOSTDEV, {"user": "vm"}, False, "user", 8 * MIB),
    (native(sessions=[session(2 * GIB)]), HOSTDEV, {"user": "vm", "top": LOCKED}, False, "user", 2 * GIB),
]


@pytest.mark.parametrize(("on", "devices", "given", "fits", "accounting", "limit"), DOMAINS)
def test_a_domain_by_its_xml(
    on: Row, devices: str, given: Row, fits: bool | None, accounting: str, limit: int | None
) -> None:
    xml = domain(devices, given.get("top", ""), given.get("arguments", ""))
    rest = {name: value for name, value in given.items() if name not in ("top", "arguments")}
    answer = memlock_fit(info(host=on), domain_xml=xml, **rest)
    assert (answer["fits"], answer["accounting"], answer["limit"]) == (fits, accounting, limit)
    assert (answer["question"] is None) is (fits is not None)


ROOMY = 2 * GIB + 256 * KIB


@pytest.mark.parametrize(
    ("hard", "given", "fits"),
    [
        # Just what is pinned is enough for RLIMIT_MEMLOCK. The control group ends QEMU, which has memory of its own.
        (GIB + 256 * KIB, {}, None),
        (GIB + 256 * KIB - PAGE, {}, False),
        (ROOMY - KIB, {}, None),
        (ROOMY, {}, True),
        # What no limit on locked memory keeps from it, the control group does.
        (ROOMY - KIB, {"memlock": "unlimited"}, None),
        (ROOMY - KIB, {"accounting": "none"}, None),
        (512 * MIB, {"accounting": "none"}, None),
        (ROOMY, {"accounting": "none"}, True),
        # What it pins beyond its memory may be up to 1 GiB.
        (3 * GIB - KIB, {"overhead": None}, None),
        (3 * GIB, {"overhead": None}, True),
        # Locked memory is all that it has. With CAP_IPC_LOCK no limit on that tells how much it may be.
        (4 * GIB, {"accounting": "none", "locked": "3G"}, None),
        (4 * GIB + 128 * MIB, {"accounting": "none", "locked": "3G"}, True),
        (64 * GIB, {"accounting": "none", "locked": True}, None),
    ],
)
def test_a_hard_limit_leaves_room_for_the_emulator(hard: int, given: Row, fits: bool | None) -> None:
    def ask(limit: int) -> Row:
        xml = domain(HOSTDEV, f"<memtune><hard_limit unit='KiB'>{limit // KIB}</hard_limit></memtune>")
        return memlock_fit(idle(host=native()), domain_xml=xml, **{"overhead": "256K", **given})

    answer = ask(hard)
    assert answer["fits"] is fits
    assert (answer["question"] is None) is (fits is not None)
    if fits is None and given.get("locked") is not True:
        assert answer["question"].startswith("Does the emulator's own memory fit into what <hard_limit> leaves")
        enough = int(re.findall(r"Raise it to (\d+) KiB", answer["question"])[0])
        assert f"<hard_limit unit='KiB'>{enough}</hard_limit>" in answer["remedy"]
        assert "the limit of its control group, too" in answer["reason"]
        assert (ask(enough * KIB)["fits"], ask(enough * KIB - KIB)["fits"]) == (True, None)


@pytest.mark.parametrize(("top", "said"), [("<memoryBacking><hugepages/></memoryBacking>", True), ("", False)])
def test_huge_pages_may_not_count_in_the_control_group(top: str, said: bool) -> None:
    """They did not on Debian 13. systemd 259 mounts cgroup2 so that they do."""
    xml = domain(HOSTDEV, f"{top}<memtune><hard_limit unit='KiB'>{(ROOMY - KIB) // KIB}</hard_limit></memtune>")
    answer = memlock_fit(idle(host=native()), domain_xml=xml, overhead="256K")
    assert answer["fits"] is None
    assert ("cgroup2 is mounted with memory_hugetlb_accounting" in answer["question"]) is said


def test_a_hard_limit_needs_room_whoever_libvirt_runs_its_vms_as() -> None:
    data = idle(host=native(user=None, uid=None))
    xml = domain(HOSTDEV, "<memtune><hard_limit unit='MiB'>1100</hard_limit></memtune>")
    asked: Row = {"user": "vm", "memlock": "4G", "accounting": "process", "overhead": 0}
    answer = memlock_fit(data, domain_xml=xml, **asked)
    assert answer["fits"] is None
    assert answer["question"].startswith("Does the emulator's own memory fit into what <hard_limit> leaves")
    assert "<hard_limit unit='KiB'>2097152</hard_limit>" in answer["remedy"]
    assert "LimitMEMLOCK" not in answer["remedy"]


def test_what_a_viommu_and_libvirts_limit_have_to_do_with_each_other() -> None:
    """What the VM has and what libvirt counts are two things: only the XML tells of the second."""
    answer = fit(info(host=native()), memory="1G", viommu=True, vfio_devices=2)
    assert (answer["fits"], answer["limit"]) == (None, None)
    assert answer["question"].startswith("Which RLIMIT_MEMLOCK will the VMM have? Give memlock, or domain_xml")
    nested = fit(info(host=native()), memory="480G", viommu="nested", vfio_devices=8)
    assert (nested["fits"], nested["needed"]) == (True, 481 * GIB)


def test_two_of_a_kind_in_process_mode() -> None:
    """The mode that cures other VMs breaks this one, which is told, also where the mode is not known."""
    given = {"who": "vm", "memlock": "100M", "devices": [BY_IOMMUFD, LEGACY], **EXACT}
    answer = fit(idle(), **given)
    assert (answer["fits"], answer["question"]) == (None, _fit_words._QUESTIONS["mode"])
    answer = fit(idle(), accounting="process", **given)
    assert (
        "VmLck, in which an iommufd per process, the legacy container and locked memory all count" in answer["reason"]
    )


def test_locked_memory_is_asked_for() -> None:
    given = {"who": "vm", "memlock": "100M", "accounting": "process", "overhead": 0, "locked": None}
    answer = fit(idle(), **given)
    assert (answer["fits"], answer["question"]) == (None, _fit_words._QUESTIONS["locked"])
    assert fit(idle(), **{**given, "locked": 0})["fits"] is True
    assert fit(idle(), **{**given, "locked": "64M"})["fits"] is False
    # It locks more than it pins, so no limit that holds both is enough, in any mode.
    for accounting in ("user", "process"):
        answer = fit(idle(), **{**given, "accounting": accounting, "memlock": "1T"})
        assert (answer["fits"], answer["question"]) == (None, _fit_words._QUESTIONS["locked"])
        assert answer["remedy"] is None
    assert fit(idle(), **{**given, "memlock": "unlimited"})["fits"] is True
    assert fit(idle(), **{**given, "accounting": "none"})["fits"] is True
    # What is too little for what it pins is too little whatever it locks.
    answer = fit(idle(), **{**given, "memlock": "63M"})
    assert answer["fits"] is False
    assert answer["remedy"].startswith(f"To make it fit: {in_unit(64 * MIB)}; or ")
    assert answer["remedy"].endswith(" That is for a VM that locks no memory itself.")


def test_a_domain_is_taken_to_lock_no_memory_and_that_is_told() -> None:
    words = "It is taken to lock no memory itself (mem-lock=on), of which locked or domain_xml would tell."
    answer = fit(idle(host=native()), locked=None)
    assert answer["fits"] is True
    assert words in answer["reason"]
    assert words not in fit(idle(host=native()))["reason"]
    assert words not in memlock_fit(idle(host=native()), domain_xml=domain(HOSTDEV))["reason"]


@pytest.mark.parametrize("accounting", ["user", "process"])
@pytest.mark.parametrize(
    ("spare", "fits"), [(-PAGE, False), (0, None), (4 * MIB, None), (128 * MIB - PAGE, None), (128 * MIB, True)]
)
def test_what_is_locked_for_a_moment(accounting: str, spare: int, fits: bool | None) -> None:
    """QEMU was seen to take 3 MiB more than it keeps locked, and 60 MiB with a display of 64 MiB."""
    locked = 318 * MIB
    pins = PINNED if accounting == "process" else 0
    given = {"memory": PINNED, "who": "vm", "accounting": accounting, **EXACT, "locked": locked}
    answer = fit(idle(), **given, memlock=locked + pins + spare)
    assert (answer["fits"], answer["counter"]) == (fits, "mm_locked")
    if fits is False:
        either = f" {ENDS.removeprefix('and ends ').rstrip('.')}, or" if accounting == "process" else ""
        assert answer["reason"].endswith(f" MiB and ends{either} since it cannot lock its memory.")
    enough = locked + pins + 128 * MIB
    assert answer["needed"] == enough
    assert fits is True or f"LimitMEMLOCK={enough} " in answer["remedy"]
    assert answer["question"] == (
        None
        if fits is not None
        else "How much does QEMU lock for a moment, beside what it keeps? Nothing tells that beforehand. A limit of"
        f" {enough} bytes suffices whatever it is."
    )


@pytest.mark.parametrize(
    ("overhead", "spaces", "most"),
    [("272M", 1, 274 * MIB), ("126M", 1, 128 * MIB), ("127M", 1, 129 * MIB), ("544M", 2, 274 * MIB)],
)
def test_all_beside_the_guests_memory_may_be_one_block(overhead: str, spaces: int, most: int) -> None:
    """A display of 256 MiB was refused with 200 MiB more than what QEMU keeps locked, and not with 257 MiB."""
    locked = 680443904
    asked: Row = {"viommu": "each", "vfio_devices": spaces, "overhead": overhead, "locked": locked}
    for accounting, pins in (("user", 0), ("process", spaces * 64 * MIB + int(overhead[:-1]) * MIB)):
        enough = locked + pins + most
        given = {"who": "vm", "accounting": accounting, **asked}
        assert fit(idle(), **given, memlock=enough)["fits"] is True
        answer = fit(idle(), **given, memlock=enough - PAGE)
        assert answer["fits"] is None
        assert f"A limit of {enough} bytes suffices" in answer["question"]
        assert f"LimitMEMLOCK={enough} " in answer["remedy"]


def test_a_block_that_is_not_known_may_be_as_large_as_all_that_is_allowed_for() -> None:
    given: Row = {"who": "vm", "accounting": "user", "locked": "320M", "devices": []}
    assert fit(idle(), **given, memlock=f"{320 + 1024 + 2}M")["fits"] is True
    assert fit(idle(), **given, memlock=f"{320 + 1024 + 1}M")["fits"] is None


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-PAGE, None)])
def test_so_it_is_in_a_live_update(spare: int, fits: bool | None) -> None:
    row = unit(**{**LOCKS, "pinned_bytes": 320 * MIB, "locked_bytes": 640 * MIB})
    data = info(processes=[row], users=[of_vm(0)])
    assert grown(data, live_update=True, memlock=(640 + 258) * MIB + spare)["fits"] is fits


@pytest.mark.parametrize(
    ("limit", "fits"), [("639M", False), ("1G", None), (f"{1664 * MIB + 128 * MIB}", True), ("1791M", None)]
)
def test_huge_pages_are_locked_and_are_not_in_vmlck(limit: str, fits: bool | None) -> None:
    given = {"memory": "1G", "who": "vm", "accounting": "user", "overhead": 0, "devices": []}
    assert fit(idle(), **given, locked="640M", memlock=limit)["fits"] is fits


def test_what_another_program_has_registered() -> None:
    """48 MiB of io_uring's, which is in VmPin of a process without an iommufd, or nowhere at all."""
    given = {"who": "vm", "memlock": "100M", "accounting": "user", **EXACT}
    seen = fit(idle(users=[of_vm(0, 48 * MIB)]), **given)
    assert seen["fits"] is None
    assert seen["question"].startswith("Are the 48 MiB charged to vm that other processes of it have pinned?")
    hidden = fit(idle(), **given)
    assert hidden["fits"] is True
    assert hidden["reason"].endswith(left("36 MiB", "vm"))


# A VM of 64 MiB that runs, with a limit of 100 MiB, and gets something: what is known of it, and whether it fits.
PER_PROCESS: Row = {"iommufds": iommufds(1, mode="process"), "locked_bytes": PINNED, "accounting": "process"}
LOCKS: Row = {"locks_memory": True, "locked_bytes": 400 * MIB}
SPARE = 100 * MIB - PINNED
HAS_MDEV: list[Row] = [{"backend": "iommufd", "as_it_runs": True}]
# After 32 MiB were plugged, or 64
GROWN = PINNED + 32 * MIB
PLUGGED: Row = {"pinned_bytes": GROWN}
UNPLUGGED: Row = {"memory_bytes": 96 * MIB}
# With an iommufd, and no device so far, or any more
BEFORE: Row = {"memory_pluggable": True, "iommufds": iommufds(0), "pinned_bytes": 0, "vfio_devices": []}
FIRST: Row = {"devices": [BY_IOMMUFD], "overhead": "256K"}
BY_VDPA: Row = {"backends": ["vdpa"], "vdpa_devices": [{"fd": 9, "node": "/dev/vhost-vdpa-0"}], "iommufds": []}
TWICE: Row = {"pinned_bytes": 2 * PINNED, "address_spaces": None}
OF_USER: Row = {**ANOTHER, "mode": "user"}
LOCKS_GROWN: Row = {
    **OF_LEGACY,
    "legacy_containers": [{"fd": 31, "same_as": None, "shared_with": []}],
    "pinned_bytes": 0,
    "locked_bytes": GROWN,
    "accounting": "process",
}
GROWTH = [
    ({}, {"memory": SPARE}, True),
    ({}, {"memory": SPARE + PAGE}, False),
    (PER_PROCESS, {"memory": SPARE}, True),
    (PER_PROCESS, {"memory": SPARE + PAGE}, False),
    (PER_PROCESS, {"memory": "64M", "memlock": "200M"}, True),
    ({**PER_PROCESS, "memlock_unlimited": True, "memlock_bytes": None}, {"memory": "64M"}, True),
    ({"capabilities": {"effective": ["cap_ipc_lock"]}}, {"memory": "64M"}, True),
    ({"capabilities": {"effective": ["cap_ipc_lock"]}, "initial_user_namespace": None}, {"memory": "64M"}, None),
    ({"capabilities": {"effective": ["cap_ipc_lock"]}, "initial_user_namespace": False}, {"memory": "64M"}, False),
    # It locks what it gets, too, and that twice for a moment, and up to the size of a page more.
    ({**PER_PROCESS, "locks_memory": True}, {"memory": "20M"}, False),
    ({**PER_PROCESS, "locks_memory": True}, {"memory": "17M"}, None),
    ({**LOCKS, "memlock_bytes": 500 * MIB}, {"memory": "51M"}, False),
    ({**LOCKS, "memlock_bytes": 500 * MIB}, {"memory": "49M"}, None),
    ({**LOCKS, "memlock_bytes": 500 * MIB + GIB - PAGE}, {"memory": "50M"}, None),
    ({**LOCKS, "memlock_bytes": 500 * MIB + GIB}, {"memory": "50M"}, True),
    ({**LOCKS, "memlock_bytes": 500 * MIB, "locks_memory": None}, {"memory": "51M"}, None),
    ({**LOCKS, "memlock_bytes": 500 * MIB}, {"memory": "51M", "locked": 0}, True),
    ({**LOCKS, "memlock_bytes": None, "memlock_unlimited": True}, {"memory": "1T"}, True),
    # What is pinned beside it may be the more.
    ({**LOCKS, "iommufds": iommufds(2, mode="process"), "memlock_bytes": 1600 * MIB}, {"memory": "401M"}, False),
    ({**LOCKS, "memlock_bytes": 3 * GIB}, {"devices": [LEGACY], "overhead": 0}, True),
    ({**LOCKS, "memlock_bytes": 500 * MIB}, {"devices": [LEGACY], "overhead": 0}, None),
    ({**LOCKS, "memlock_bytes": 463 * MIB}, {"devices": [LEGACY], "overhead": 0}, False),
    ({**LOCKS, "memlock_bytes": 400 * MIB}, {"live_update": True}, None),
    ({**PER_PROCESS, "locks_memory": None}, {"memory": "20M"}, None),
    # Who locks memory has some locked, so that this one need not be asked about.
    ({"locks_memory": None, "locked_bytes": 0}, {"memory": "20M"}, True),
    ({"locks_memory": None, "locked_bytes": PAGE}, {"memory": "20M"}, None),
    ({"locks_memory": None, "locked_bytes": 0}, {"live_update": True, "memlock": 2 * PINNED}, True),
    # Two address spaces, of one iommufd or of two, and one that is held twice
    ({"iommufds": iommufds(2)}, {"memory": "20M"}, False),
    ({"iommufds": iommufds(1, 1)}, {"memory": "20M"}, False),
    ({"iommufds": [*iommufds(1), {**iommufds(1, 1)[1], "same_as": 30}]}, {"memory": "20M"}, True),
    ({"iommufds": [*iommufds(1), {**iommufds(1, 1)[1], "shared_with": None}]}, {"memory": "1M"}, None),
    # Another VM has the same one, and which spaces are whose is not known.
    ({"iommufds": [{**iommufds(1)[0], "shared_with": [9]}]}, {"memory": "1M"}, None),
    ({"iommufds": iommufds(0)}, {"memory": "64M"}, True),
    ({"iommufds": None}, {"memory": "1M"}, None),
    # There may be more than was found.
    ({"iommufds": [{**iommufds(1)[0], "truncated": True}]}, {"memory": "1M"}, None),
    # An mdev pins what it gets as it runs, if at all.
    ({"vfio_devices": HAS_MDEV}, {"memory": SPARE}, True),
    ({"vfio_devices": HAS_MDEV}, {"memory": SPARE + PAGE}, None),
    ({"vfio_devices": [{**HAS_MDEV[0], "as_it_runs": None}]}, {"memory": SPARE + PAGE}, None),
    ({"legacy_containers": None}, {"memory": "1M"}, None),
    # A device that joins an address space pins nothing, and another one all.
    ({"vfio_devices": [{"backend": "iommufd", "as_it_runs": False}] * 2}, {"devices": [BY_IOMMUFD]}, True),
    ({}, {"devices": [BY_IOMMUFD], "viommu": "none"}, True),
    ({}, {"devices": [BY_IOMMUFD], "viommu": "each"}, False),
    ({}, {"devices": [BY_IOMMUFD]}, True),
    ({"iommufds": iommufds(2)}, {"devices": [BY_IOMMUFD]}, False),
    # Its command line may tell of an IOMMU, and some machines have one without that.
    ({"viommu": None}, {"devices": [BY_IOMMUFD]}, None),
    ({"viommu": "each"}, {"devices": [BY_IOMMUFD]}, None),
    ({"emulator": "/usr/libexec/qemu-kvm"}, {"devices": [BY_IOMMUFD]}, True),
    ({"emulator": "/usr/bin/qemu-system-aarch64"}, {"devices": [BY_IOMMUFD]}, True),
    ({"emulator": "/usr/bin/qemu-system-s390x"}, {"devices": [BY_IOMMUFD]}, None),
    ({"emulator": "/usr/bin/qemu-system-ppc64"}, {"devices": [BY_IOMMUFD]}, None),
    ({"iommufds": iommufds(0), "pinned_bytes": 0, "vfio_devices": []}, {"devices": [BY_IOMMUFD]}, False),
    ({}, {"devices": [{**ANOTHER, "mode": "user"}], "overhead": 0}, False),
    ({}, {"devices": [{**ANOTHER, "mode": "process"}], "overhead": 0}, True),
    ({}, {"devices": [LEGACY], "overhead": 0}, True),
    (PER_PROCESS, {"devices": [LEGACY], "overhead": 0}, False),
    ({}, {"devices": [VDPA], "overhead": 0}, False),
    ({"memory_bytes": None}, {"devices": [VDPA]}, None),
    ({"memory_bytes": None}, {"devices": [VDPA], "memlock": "64M"}, False),
    ({"memory_bytes": None}, {"devices": [VDPA], "memlock": "unlimited"}, True),
    ({"memory_bytes": None}, {"devices": [LEGACY]}, None),
    # What was plugged is in no command line, and is pinned in each address space.
    (PLUGGED, {"devices": [OF_USER], "overhead": "256K", "memlock": 2 * GROWN}, True),
    (PLUGGED, {"devices": [OF_USER], "overhead": "256K", "memlock": 2 * GROWN - 1}, False),
    (PLUGGED, {"devices": [OF_USER], "memlock": 2 * GROWN}, True),
    (PLUGGED, {"devices": [OF_USER], "memory": "8M", "overhead": 0, "memlock": 2 * GROWN + 16 * MIB}, True),
    (PLUGGED, {"devices": [OF_USER], "memory": "8M", "overhead": 0, "memlock": 2 * GROWN + 16 * MIB - 1}, False),
    (PLUGGED, {"devices": [VDPA], "overhead": 0, "memlock": 2 * GROWN - 1}, False),
    ({**PLUGGED, "memory_bytes": None}, {"devices": [OF_USER], "overhead": 0, "memlock": 2 * GROWN - 1}, None),
    (LOCKS_GROWN, {"devices": [VDPA], "overhead": 0, "memlock": GROWN}, True),
    (LOCKS_GROWN, {"devices": [VDPA], "overhead": 0, "memlock": GROWN - 1}, False),
    ({**PLUGGED, "memory_pluggable": True}, {"devices": [OF_USER], "overhead": 0, "memlock": 2 * GROWN}, True),
    ({**PLUGGED, "memory_pluggable": True}, {"devices": [OF_USER], "overhead": 0, "memlock": 2 * GROWN - 1}, False),
    # Where no address space shows it, nothing does.
    ({**BEFORE, "memory_pluggable": False}, {**FIRST, "memlock": 2 * PINNED}, True),
    ({**BEFORE, "memory_pluggable": False}, {**FIRST, "memlock": 2 * PINNED - 1}, False),
    (BEFORE, {**FIRST, "memlock": "1G"}, None),
    (BEFORE, {**FIRST, "memlock": 2 * PINNED - 1}, None),
    ({**BEFORE, "memory_pluggable": None}, {**FIRST, "memlock": "1G"}, None),
    ({**BEFORE, "iommufds": []}, {"devices": [LEGACY], "overhead": "256K", "memlock": "1G"}, None),
    ({**BEFORE, "iommufds": iommufds(1)}, {**FIRST, "viommu": "each", "memlock": "1G"}, None),
    ({**BEFORE, **BY_VDPA}, {"devices": [LEGACY], "overhead": "256K", "memlock": "1G"}, None),
    ({**BEFORE, "vfio_devices": HAS_MDEV, "iommufds": iommufds(1)}, {"devices": [LEGACY], "memlock": "4G"}, None),
    (BEFORE, {**FIRST, "memlock": "unlimited"}, True),
    (BEFORE, {"memory": "64M", "memlock": "1M"}, True),
    ({**BEFORE, **LOCKS}, {"live_update": True, "memlock": "4G"}, None),
    # What it was started with, and is gone
    (UNPLUGGED, {"devices": [OF_USER], "overhead": 0, "memlock": 2 * PINNED - 1}, False),
    (UNPLUGGED, {"devices": [OF_USER], "overhead": 0, "memlock": 2 * PINNED}, None),
    (UNPLUGGED, {"devices": [OF_USER], "overhead": 0, "memlock": PINNED + 96 * MIB}, True),
    ({**UNPLUGGED, "vfio_devices": HAS_MDEV}, {"devices": [OF_USER], "overhead": 0, "memlock": 2 * PINNED}, False),
    # Or it is a second address space that was not found. Who knows its memory, knows.
    (TWICE, {"devices": [OF_USER], "overhead": 0, "memlock": 3 * PINNED}, None),
    (TWICE, {"devices": [OF_USER], "overhead": 0, "memlock": 4 * PINNED}, True),
    (TWICE, {"devices": [OF_USER], "overhead": 0, "memlock": 3 * PINNED - 1024**2}, False),
    (TWICE, {"memory": "1M", "memlock": 3 * PINNED}, None),
    (TWICE, {"memory": "1M", "memlock": "unlimited"}, True),
    ({**TWICE, **CAPABLE}, {"memory": "1M"}, True),
    (TWICE, {"live_update": True, "memlock": 4 * PINNED}, True),
    # Both: the first decides, or the second.
    (PER_PROCESS, {"memory": "20M", "devices": [VDPA], "overhead": 0}, False),
    # In a live update, the user needs its memory twice, and each process once.
    ({}, {"live_update": True}, False),
    (PER_PROCESS, {"live_update": True}, True),
    ({}, {"live_update": True, "memlock": 2 * PINNED}, True),
    ({"vfio_devices": HAS_MDEV, "pinned_bytes": 0}, {"live_update": True, "memlock": "32M"}, None),
]


@pytest.mark.parametrize(("fields", "given", "fits"), GROWTH)
def test_a_vm_that_runs(fields: Row, given: Row, fits: bool | None) -> None:
    charged = 0 if fields.get("accounting") == "process" else max(PINNED, fields.get("pinned_bytes", 0))
    answer = grown(info(processes=[unit(**fields)], users=[of_vm(charged)]), **given)
    assert answer["fits"] is fits
    assert (answer["question"] is None) is (fits is not None)
    if answer["remedy"] and not given.get("live_update"):
        assert re.search(r"\(prlimit --pid 4242 --memlock=(\d+):\1\)", answer["remedy"])


@pytest.mark.parametrize(("machine", "fits"), [("x86_64", True), ("s390x", None), ("ppc64le", None), (None, None)])
def test_whether_a_machine_has_an_iommu_of_its_own_accord(machine: str | None, fits: bool | None) -> None:
    data = info(processes=[unit(emulator="/usr/libexec/qemu-kvm")], users=[of_vm()], host=host(machine=machine))
    answer = grown(data, devices=[BY_IOMMUFD])
    assert answer["fits"] is fits
    assert answer["question"] == (None if fits else _fit_words._QUESTIONS_OF_RUNNING["viommu"])


TWO_DEVICES: Row = {"vfio_devices": [{"backend": "iommufd", "as_it_runs": False}] * 2}
JOINS: Row = {"devices": [BY_IOMMUFD], "overhead": "256K"}


@pytest.mark.parametrize(
    ("viommu", "given", "fits", "question"),
    [
        ("none", {}, True, None),
        # They share an address space, and the next one may be behind the IOMMU.
        (None, {}, None, "viommu"),
        ("each", {}, None, "viommu"),
        (None, {"memlock": 2 * PINNED}, True, None),
        (None, {"memlock": 2 * PINNED - 1}, None, "viommu"),
        (None, {"viommu": "none"}, True, None),
        (None, {"viommu": "each"}, False, None),
        # With a space for each so far, too, one may join one of them.
        ("each", {"iommufds": 2}, False, None),
        (None, {"iommufds": 2}, None, "viommu"),
        # Whether QEMU 11 ends it for both backends depends on that, too.
        ("none", {"devices": [LEGACY], "memlock": "1G"}, False, None),
        (None, {"devices": [LEGACY], "memlock": "1G"}, None, "viommu"),
    ],
)
def test_a_device_may_be_behind_an_iommu_that_others_bypass(
    viommu: str | None, given: Row, fits: bool | None, question: str | None
) -> None:
    given = dict(given)
    row = unit(**TWO_DEVICES, viommu=viommu, iommufds=iommufds(given.pop("iommufds", 1)))
    data = info(processes=[row], users=[of_vm()], host=host(qemu=[emulator(False, version="11.0.0")]))
    answer = grown(data, **{**JOINS, "memlock": 2 * PINNED - 1, **given})
    assert answer["fits"] is fits
    assert answer["question"] == (question and _fit_words._QUESTIONS_OF_RUNNING[question])


def objects(**fds: int | None) -> list[Row]:
    return [{"id": name, "fd": fd} for name, fd in fds.items()]


# One that another program opened, set to process, with a device; and one in the mode user.
I0, I1 = ({**iommufds(1)[0], "fd": fd, "rlimit_mode": mode} for fd, mode in ((3, "process"), (17, "user")))
WHICH = _fit_words._QUESTIONS["which"]


@pytest.mark.parametrize(
    ("its", "commanded", "device", "fits", "question"),
    [
        ([I0], objects(i0=3, i1=None), {"iommufd": "i0"}, True, None),
        ([I0], objects(i0=3, i1=None), {"iommufd": "i0", "mode": "process"}, True, None),
        ([I0], objects(i0=3, i1=None), {"iommufd": 3}, True, None),
        # QEMU opens this one with its first device.
        ([I0], objects(i0=3, i1=None), {"iommufd": "i1", "mode": "user"}, False, None),
        ([I0], objects(i0=3, i1=None), {"iommufd": "i1"}, False, None),
        ([I0], objects(i0=3, i1=None), {"iommufd": "new", "mode": "user"}, False, None),
        ([I0], objects(i0=3, i1=None), {}, None, WHICH),
        ([I0], objects(i0=3), {}, True, None),
        ([I0], objects(i0=3), {"iommufd": "other", "mode": "user"}, False, None),
        # It joins what is there, whichever it gets.
        ([I0, I1], objects(i0=3, i1=None), {}, True, None),
        ([I0, {**I1, "ioases": []}], objects(i0=3, i1=None), {}, None, WHICH),
        ([I0, I1], objects(i0=3, i1=None), {"mode": "process"}, True, None),
        ([I0, I1], objects(i0=3, i1=None), {"iommufd": "i1"}, True, None),
        ([I0, {**I1, "ioases": []}], objects(i0=3, i1=None), {"iommufd": "i1"}, False, None),
        ([I0, {**I1, "ioases": []}], objects(i0=3, i1=None), {"iommufd": 17}, False, None),
        # It may have been added since.
        ([I0, I1], objects(i0=3), {"iommufd": "i1"}, None, WHICH),
        ([I0, I1], objects(i0=3), {"iommufd": "17"}, True, None),
        ([I1], objects(i0=None, i1=None), {"iommufd": "i0"}, None, WHICH),
        # The command line could not be read.
        ([I0], None, {"iommufd": "i0"}, None, WHICH),
        ([I0], None, {}, None, WHICH),
        ([I0], None, {"iommufd": "3"}, True, None),
        ([I0, {**I0, "fd": 9, "same_as": 3}], objects(i0=3, i1=None), {"iommufd": "9"}, True, None),
        ([I0], None, {"iommufd": "new", "mode": "user"}, False, None),
    ],
)
def test_which_of_its_iommufds_a_device_gets(
    its: list[Row], commanded: list[Row] | None, device: Row, fits: bool | None, question: str | None
) -> None:
    row = unit(iommufds=its, iommufd_objects=commanded, accounting=None, locked_bytes=PINNED, memlock_bytes=PINNED)
    data = info(processes=[row], users=[of_vm(MIB)])
    answer = grown(data, devices=[{**BY_IOMMUFD, **device}], overhead="256K", viommu="none")
    assert (answer["fits"], answer["question"]) == (fits, question)


@pytest.mark.parametrize(
    ("fields", "given", "charged", "needed"),
    [
        (PER_PROCESS, {"live_update": True, "memory": "8M"}, 0, PINNED + 8 * MIB),
        (PER_PROCESS, {"live_update": True, "memory": "80M"}, 0, PINNED + 80 * MIB),
        # The old one is charged no more when it gets that.
        ({}, {"live_update": True, "memory": "8M"}, PINNED, PINNED),
        ({}, {"live_update": True, "memory": "80M"}, PINNED, 80 * MIB),
        ({}, {"memory": "8M", "devices": [OF_USER]}, PINNED, PINNED + 16 * MIB),
        (PER_PROCESS, {"memory": "8M", "devices": [LEGACY], "overhead": 0}, PINNED, PINNED + 16 * MIB),
    ],
)
@pytest.mark.parametrize("short", [False, True])
def test_what_is_needed_is_what_the_verdict_reckons_with(
    fields: Row, given: Row, charged: int, needed: int, short: bool
) -> None:
    data = info(processes=[unit(**fields)], users=[of_vm(0 if fields else PINNED)])
    answer = grown(data, **given, memlock=charged + needed - short)
    assert (answer["fits"], answer["charged"], answer["needed"]) == (not short, charged, needed)


@pytest.mark.parametrize("given", [{"overhead": "256K"}, {"overhead": "256K", "memory": ODD}, {"overhead": 258688}])
@pytest.mark.parametrize("gets", [{"devices": [OF_USER]}, {"devices": [LEGACY]}, {"devices": [VDPA]}])
def test_the_part_of_a_page_at_the_end_of_its_memory_is_not_pinned(given: Row, gets: Row) -> None:
    """As was tried with a memory backend of 70000000 bytes, beside which it pins 256 KiB."""
    pinned = ODD // PAGE * PAGE + 256 * KIB
    has = pinned if gets["devices"] == [VDPA] else 0
    row = unit(memory_bytes=ODD, pinned_bytes=pinned, iommufds=iommufds(1, mode="process"), locked_bytes=0)
    data = info(processes=[row], users=[of_vm(0)])
    answer = memlock_fit(data, grow={"vm": "vm1", **gets}, memlock=has + pinned, **given)
    assert (answer["fits"], answer["needed"]) == (True, pinned)
    assert memlock_fit(data, grow={"vm": "vm1", **gets}, memlock=has + pinned - 1, **given)["fits"] is False


# What another VM of the user is like that runs beside one that starts, and what is told of it.
BESIDE: list[tuple[Row, str]] = [
    ({}, "Over limit then"),
    ({"memlock_bytes": 2 * PINNED - 1}, "Over limit then"),
    ({"memlock_bytes": 2 * PINNED}, ""),
    (NO_LIMIT, ""),
    # It was so before.
    ({"memlock_bytes": PINNED - 1}, ""),
    ({"uid": 1002, "user": "alice"}, ""),
    ({"accounting": "process"}, ""),
    ({"accounting": "none", "capabilities": {"effective": ["cap_ipc_lock"], "ambient": []}}, ""),
    ({"holder": True}, ""),
    ({"backends": ["legacy"]}, ""),
    ({"accounting": None, "backends": ["legacy"]}, ""),
    ({"accounting": None}, "Perhaps over limit then"),
    ({"accounting": None, "backends": None}, "Perhaps over limit then"),
    ({"backends": ["iommufd", "vdpa"]}, "Perhaps over limit then"),
]


@pytest.mark.parametrize(("fields", "said"), BESIDE)
def test_what_a_vm_does_to_others_of_its_user(fields: Row, said: str) -> None:
    row = unit(**fields)
    data = info(processes=[row], users=[of_vm()])
    given: Row = {"who": "vm", "memory": PINNED, "memlock": GIB, "cap_ipc_lock": False, **EXACT}
    how = (
        ""
        if not said
        else (
            f"{said}, by the sum of the same user: vm1 (4242). Such a VM ends when its guest reboots, or turns"
            " on a device with memory of its own, as QEMU maps memory then: first give it a limit of"
            f" {2 * PINNED} bytes (prlimit --pid 4242 --memlock={2 * PINNED}:{2 * PINNED})."
        )
    )
    answer = fit(data, accounting="user", **given)
    assert (answer["fits"], answer["prerequisites"]) == (True, [how] if how else [])
    assert answer["reason"].endswith(how)
    # One that is charged to nobody else, or does not start, does nothing to them.
    for other in ({"accounting": "process"}, {"accounting": "none", "cap_ipc_lock": None}):
        assert fit(data, **{**given, **other})["prerequisites"] == []
    assert fit(data, accounting="user", **{**given, "memlock": PINNED})["prerequisites"] == []


@pytest.mark.parametrize(
    ("given", "adds"),
    [
        ({"memory": "8M"}, 8 * MIB),
        ({"memory": "8M", "devices": [OF_USER]}, PINNED + 16 * MIB),
        # For a moment only
        ({"live_update": True}, 0),
        ({"live_update": True, "memory": "8M"}, 8 * MIB),
    ],
)
def test_what_one_that_grows_does_to_others_of_its_user(given: Row, adds: int) -> None:
    rows = [unit(pid=n, name=f"vm{n}", memlock_bytes=8 * PINNED + max(adds - n, 0)) for n in range(8)]
    data = info(processes=rows, users=[of_vm(8 * PINNED)])
    told = [each for each in grown(data, "vm7", memlock="1G", **given)["prerequisites"] if "limit then" in each]
    names = "vm1 (1), vm2 (2), vm3 (3), vm4 (4), vm5 (5) and 1 more" if adds else ""
    assert [each.partition(". ")[0] for each in told] == (
        [f"Over limit then, by the sum of the same user: {names}"] if adds else []
    )
    assert not adds or f" {8 * PINNED + adds} bytes (prlimit --pid 1 " in told[0]


@pytest.mark.parametrize(
    ("fields", "others", "enough"),
    [
        pytest.param({"memlock_bytes": 100 * MIB}, [], 151388160, id="over limit as soon as the other starts"),
        pytest.param({"memlock_bytes": 134610944 + 8 * MIB}, [], 151388160, id="once it is continued"),
        pytest.param({"memlock_bytes": 151388159}, [], 151388160, id="a byte short"),
        pytest.param({"memlock_bytes": 151388160}, [], None, id="enough"),
        pytest.param({"pinned_bytes": 82048 * KIB, "memory_pluggable": False}, [], None, id="it has turned all on"),
        pytest.param({"memlock_bytes": 151388160}, [{}], 151388160 + 82048 * KIB, id="another has some to turn on"),
        pytest.param({"memlock_bytes": 151388160}, [NO_LIMIT], 151388160 + 82048 * KIB, id="which has no limit"),
    ],
)
def test_what_others_of_its_user_turn_on_later_counts_for_them(
    fields: Row, others: list[Row], enough: int | None
) -> None:
    """As QEMU 10 did: f, paused with -vga std, ended with any less once the guest had turned the display on."""
    pinned = 65664 * KIB
    paused: Row = {"memory_bytes": 64 * MIB, "memory_pluggable": True, "of_devices_bytes": 16 * MIB}
    paused.update(pinned_bytes=pinned, memlock_bytes=GIB)
    f = unit(**{**paused, "memlock_bytes": 134610944 + 32 * MIB, "name": "f", **fields})
    rest = [unit(**{**paused, "pid": 7, "name": "h", **each}) for each in others]
    data = info(processes=[f, *rest], users=[of_vm(pinned * (1 + len(rest)))])
    given: Row = {"who": "vm", "memlock": GIB, "accounting": "user", "cap_ipc_lock": False, "overhead": "256K"}
    told = fit(data, **given)["prerequisites"]
    assert len(told) == (enough is not None)
    for each in told:
        how = f"first give it a limit of {enough} bytes (prlimit --pid 4242 --memlock={enough}:{enough})."
        assert "ver limit then, by the sum of the same user: f (4242)." in each
        assert each.endswith(how)


# A VM with an iommufd and a vDPA device, which its guest may have turned on or not.
WITH_VDPA: Row = {
    "backends": ["iommufd", "vdpa"],
    "vdpa_devices": [{"fd": 9, "node": "/dev/vhost-vdpa-0"}],
    "accounting": "process",
    "iommufds": iommufds(1, mode="process"),
    "locks_memory": False,
    "locked_bytes": PINNED,
    "memory_pluggable": True,
    "of_devices_bytes": 0,
}
TURNED_ON: Row = {"pinned_bytes": 2 * PINNED}
OF_MODE_USER: Row = {"iommufds": iommufds(1), "accounting": "user", "locked_bytes": 0}
FIXED: Row = {"memory_pluggable": False}
CAP: Row = {"capabilities": {"effective": ["cap_ipc_lock"], "ambient": []}, "locked_bytes": 0}
VDPA_ALONE: Row = {"backends": ["vdpa"], "iommufds": [], "locked_bytes": 0}


@pytest.mark.parametrize(
    ("fields", "given", "limit", "fits", "short"),
    [
        # As QEMU 10 did: the DIMM is plugged, and vhost vdpa map fail! comes once the guest turns the device on.
        pytest.param({}, {}, 2 * PINNED + 16 * MIB, True, None, id="it pins nothing so far"),
        pytest.param(TURNED_ON, {}, 2 * PINNED + 16 * MIB, True, False, id="it has pinned"),
        pytest.param(FIXED, {}, 2 * PINNED + 16 * MIB, True, None, id="no memory was plugged"),
        pytest.param({**FIXED, **CAP}, {}, 2 * PINNED + 16 * MIB, True, None, id="with CAP_IPC_LOCK"),
        pytest.param({**FIXED, **CAP, **TURNED_ON}, {}, 2 * PINNED + 16 * MIB, True, False, id="with that, it has"),
        pytest.param({**FIXED, **OF_MODE_USER}, {}, 2 * PINNED + 16 * MIB, True, None, id="mode user"),
        pytest.param(
            {**FIXED, **OF_MODE_USER, **TURNED_ON}, {}, 2 * PINNED + 16 * MIB, True, False, id="mode user, on"
        ),
        pytest.param(
            {**FIXED, **VDPA_ALONE, "pinned_bytes": 0}, {"overhead": "256K"}, PINNED + 8 * MIB, True, None, id="alone"
        ),
        pytest.param({**FIXED, **VDPA_ALONE}, {"overhead": "256K"}, PINNED + 8 * MIB, True, False, id="alone, on"),
        pytest.param(
            {"vdpa_devices": [{"fd": 9}, {"fd": 10}], **TURNED_ON},
            {"overhead": "256K"},
            3 * PINNED + 24 * MIB,
            True,
            None,
            id="one of two",
        ),
        # Whether memory was plugged or the device is on, nothing tells.
        pytest.param({**OF_MODE_USER, **TURNED_ON}, {}, 4 * PINNED + 16 * MIB, None, None, id="memory, or on"),
        pytest.param(
            {**OF_MODE_USER, **TURNED_ON}, {"memory": "64M"}, 2 * PINNED + 16 * MIB, True, False, id="memory is told"
        ),
    ],
)
def test_a_vdpa_device_pins_once_its_guest_turns_it_on(
    fields: Row, given: Row, limit: int, fits: bool | None, short: bool | None
) -> None:
    data = info(processes=[process(**{**WITH_VDPA, "pinned_bytes": PINNED, **fields})], users=[])
    ask: Row = {"vm": "vm1", "memory": "8M"}
    held, under = (memlock_fit(data, grow=ask, memlock=each, **given) for each in (limit, limit - 1))
    assert (held["fits"], under["fits"]) == (fits, short)
    assert short is None or "runs on without its vDPA device (vhost vdpa map fail!)" in under["reason"]
    if fits and short is None:
        assert under["question"] == (
            "Will its guest turn on its vDPA device? Nothing tells that beforehand."
            f" A limit of {limit} bytes suffices whatever it is."
        )
    if fits:
        assert f" --memlock={limit}:" in under["remedy"]


def test_a_device_that_pins_nothing_does_not_depend_on_vdpa() -> None:
    data = info(processes=[process(**WITH_VDPA, pinned_bytes=PINNED)], users=[])
    assert grown(data, devices=[BY_IOMMUFD], memlock=PINNED)["fits"] is True


@pytest.mark.parametrize(("own", "spare", "told"), [(MIB, 0, False), (MIB, -1, True), (0, -MIB, False)])
def test_what_others_turn_on_later_may_end_the_vm_itself(own: int, spare: int, told: bool) -> None:
    row = unit(of_devices_bytes=own, memlock_bytes=GIB)
    limit = 2 * PINNED + MIB + spare
    answer = fit(
        info(processes=[row], users=[of_vm()]),
        who="vm",
        memlock=limit,
        accounting="user",
        overhead="256K",
        cap_ipc_lock=False,
    )
    ends = f"ends when its guest reboots, unless it has a limit of {2 * PINNED + MIB} bytes."
    assert answer["fits"] is True
    assert [each.endswith(ends) for each in answer["prerequisites"]] == ([True] if told else [])


def test_where_little_is_known_others_are_told_of_if_it_is_certain() -> None:
    data = info(processes=[unit()], users=[of_vm()], host=host(limits_of_view=unseen("processes")))
    given: Row = {"accounting": "user", "who": "vm", "memlock": "2G"}
    assert fit(data, **given)["prerequisites"][0].startswith(
        "Over limit then, by the sum of the same user: vm1 (4242)."
    )
    data["processes"][0]["memlock_bytes"] = 3 * PINNED
    assert fit(data, **given)["prerequisites"] == []
    # Without what it pins beside its memory, it may or may not be.
    told = fit({**data, "host": host()}, **given)["prerequisites"]
    assert [each.partition(",")[0] for each in told] == ["Perhaps over limit then"]


def test_a_new_vm_that_is_to_be_updated_needs_its_memory_twice() -> None:
    answer = fit(idle(), who="vm", memlock="200M", accounting="user", live_update=True, **EXACT)
    assert (answer["fits"], answer["needed"]) == (True, 128 * MIB)
    assert fit(idle(), who="vm", memlock="128M", accounting="user", live_update=True, **EXACT)["fits"] is True
    assert fit(idle(), who="vm", memlock=128 * MIB - 1, accounting="user", live_update=True, **EXACT)["fits"] is False


def test_who_knows_the_memory_of_a_vm_that_runs_settles_what_may_be_hidden() -> None:
    data = info(processes=[unit(**TWICE)], users=[of_vm(2 * PINNED)])
    grow: Row = {"grow": {"vm": "vm1", "devices": [OF_USER]}, "overhead": 0, "memlock": 4 * PINNED - 1}
    assert (
        memlock_fit(data, **grow)["question"]
        == "How much memory has the VM now? Give memory: all of it, with what was plugged."
    )
    assert memlock_fit(data, **grow, memory="128M")["fits"] is False
    grow["grow"] = {"vm": "vm1", "memory": "1M"}
    assert (
        memlock_fit(data, **grow)["question"]
        == "How much memory has the VM now? Give memory: all of it, with what was plugged."
    )
    assert memlock_fit(data, **grow, memory="128M")["fits"] is True


def test_the_memory_that_is_asked_for_settles_it_or_is_refused() -> None:
    """What its command line says is no answer, where more was plugged."""
    grow: Row = {"grow": {"vm": "vm1", "memory": "8M"}, "memlock": 2 * PINNED + 8 * MIB}
    data = info(processes=[unit(**TWICE)], users=[of_vm(2 * PINNED)])
    answer = memlock_fit(data, **grow)
    assert answer["fits"] is None
    assert "below" not in answer["reason"]
    assert memlock_fit(data, **grow, memory="128M")["fits"] is True
    assert memlock_fit(data, **{**grow, "memlock": 2 * PINNED + 8 * MIB - 1}, memory="128M")["fits"] is False
    with pytest.raises(IommufdError, match=r"^memory: vm1 has more pinned than 64 MiB explain, in the address spaces"):
        memlock_fit(data, **grow, memory="64M")
    assert memlock_fit(data, **{**grow, "memlock": "100M"}, memory="64M")["fits"] is False
    # It may as well be what it pins beside.
    assert memlock_fit(data, **grow, memory="64M", overhead=2 * PINNED - 64 * MIB)["fits"] is True
    assert memlock_fit(data, **{**grow, "memlock": "unlimited"}, memory="64M")["fits"] is True


def test_what_becomes_of_a_vm_that_cannot_lock_what_it_gets() -> None:
    answer = grown(info(processes=[unit(**LOCKS, memlock_bytes=500 * MIB)], users=[of_vm()]), memory="64M")
    assert (answer["fits"], answer["counter"], answer["charged"]) == (False, "mm_locked", 400 * MIB)
    assert answer["reason"] == (
        "vm1 runs as vm, as process 4242. vm1 gets 64 MiB, in its address space. It locks its memory, and for a moment"
        " twice what it gets. Charged for this VM's process alone (VmLck, in which an iommufd per process, the legacy"
        " container and locked memory all count), it is at least 28 MiB over its limit of 500 MiB and runs on without"
        " that (cannot set up guest memory: Resource temporarily unavailable)."
    )
    enough = 528 * MIB + GIB
    assert answer["remedy"] == (
        f"To make it fit: raise its limit as it runs, until it ends (prlimit --pid 4242 --memlock={enough}:{enough}),"
        " for this VM only, since the next one takes still more."
    )
    assert grown(info(processes=[unit(**LOCKS, memlock_bytes=enough)], users=[of_vm()]), memory="64M", memlock=enough)[
        "fits"
    ]


def test_libvirt_raises_the_limit_of_a_domain_that_grows() -> None:
    answer = grown(info(), memory="64M")
    assert (answer["fits"], answer["limit"]) == (None, None)
    assert answer["question"].startswith("Which RLIMIT_MEMLOCK will the VMM have? Give memlock: 104857600, its limit")
    assert "its limit of 100 MiB, which libvirt may raise" in answer["reason"]
    assert grown(info(), memory="64M", memlock="100M")["fits"] is False


def limited(size: int | None, **fields: Any) -> Row:
    """What is known of a VM whose control group has a limit; None is one that was not seen."""
    return {"memory_max_bytes": size, "memory_max_unlimited": None if size is None else False, **fields}


ROOMY_30 = PINNED + 30 * MIB + GIB
DEVICE: Row = {"devices": [OF_USER], "overhead": 0}
NO_DEVICE: Row = {"iommufds": iommufds(0), "pinned_bytes": 0, "vfio_devices": [], "memlock_bytes": 3 * GIB}


@pytest.mark.parametrize(
    ("fields", "given", "least"),
    [
        ({"memlock_bytes": 200 * MIB}, {"memory": "30M"}, ROOMY_30),
        ({"memlock_bytes": None, "memlock_unlimited": True}, {"memory": "30M"}, ROOMY_30),
        (CAPABLE, {"memory": "30M"}, ROOMY_30),
        # What another device pins once more takes no more memory, but all that the VM has.
        ({"memlock_bytes": 200 * MIB}, DEVICE, PINNED + GIB),
        (NO_DEVICE, {"devices": [OF_USER], "overhead": "256K"}, PINNED + GIB),
        (NO_DEVICE, {"devices": [OF_USER]}, 64 * MIB + 2 * GIB),
    ],
)
@pytest.mark.parametrize("of", [process, unit])
def test_a_vm_that_grows_must_have_room_in_its_control_group(of: Any, fields: Row, given: Row, least: int) -> None:
    """That ends a VM which takes more: <hard_limit> is both limits, so what raises one alone is no cure."""

    def ask(**group: Any) -> Row:
        return grown(info(processes=[of(**{**fields, **group})], users=[user(), of_vm()]), **given)

    assert ask()["fits"] is True
    assert ask(**limited(least))["fits"] is True
    answer = ask(**limited(least - KIB))
    assert answer["fits"] is None
    assert answer["question"].endswith(f" Raise it to {least // KIB} KiB.")
    cure = "(virsh memtune vm1 --hard-limit {} --live)" if of is process else "group use {} KiB (MemoryMax= of its unit"
    assert cure.format(least // KIB) in answer["remedy"]
    assert "prlimit" not in answer["remedy"]
    # Where it was not seen, a domain may well have one.
    unseen_ = ask(**limited(None))
    assert unseen_["fits"] is (None if of is process else True)
    assert (unseen_["question"] or "Has its control group").startswith("Has its control group")
    rows = [{key: value for key, value in of(**fields).items() if not key.startswith("memory_max")}]
    assert grown(info(processes=rows, users=[user(), of_vm()]), **given)["fits"] is unseen_["fits"]


@pytest.mark.parametrize("of", [process, unit])
def test_a_vm_that_grows_in_a_slice_with_others(of: Any) -> None:
    """What they use of its memory is not known."""

    def ask(limit: int, **group: Any) -> Row:
        row = of(memlock_bytes=limit, **{**limited(4 * GIB), **group})
        return grown(info(processes=[row], users=[user(), of_vm()]), memory="30M")

    assert ask(200 * MIB)["fits"] is True
    answer = ask(200 * MIB, memory_max_shared=True)
    assert answer["fits"] is None
    assert "what the others in it use is not looked at" in answer["reason"]
    assert answer["question"].startswith("Is there room for it in the slices that it is in")
    # Where its limit is too small, or its own group, it is that.
    assert ask(PINNED, memory_max_shared=True)["fits"] is (None if of is process else False)
    assert "Raise it to" in ask(200 * MIB, **limited(MIB), memory_max_shared=True)["question"]


@pytest.mark.parametrize(
    ("fields", "who", "fits"),
    [
        ({"memory_max_shared": True}, "libvirt-qemu", None),
        ({"memory_max_shared": True, "holder": True}, "libvirt-qemu", True),
        ({"memory_max_shared": True, "domain_uri": "qemu:///session"}, "libvirt-qemu", True),
        ({"memory_max_shared": None}, "libvirt-qemu", True),
        # It is started by something else.
        ({"memory_max_shared": True}, "vm", True),
    ],
)
def test_a_domain_that_starts_is_in_the_slice_of_the_others(fields: Row, who: str, fits: bool | None) -> None:
    data = info(processes=[process(**{**limited(4 * GIB), **fields})])
    answer = fit(data, who=who, memlock="3G", accounting="process")
    assert answer["fits"] is fits
    assert (answer["question"] or "Is there room for it in the slices").startswith("Is there room for it in the slices")
    assert fit(data, who=who, memlock="1M", accounting="process")["fits"] is False


def test_a_device_that_pins_nothing_takes_no_room() -> None:
    its = [{"backend": "iommufd", "as_it_runs": False}] * 2
    assert grown(info(processes=[process(**limited(MIB, vfio_devices=its))]), devices=[BY_IOMMUFD])["fits"] is True


@pytest.mark.parametrize(
    ("group", "first"),
    [
        (limited(100 * MIB), "raise its <hard_limit> (virsh memtune vm1 --hard-limit 1179904 --live), and then "),
        (
            limited(None),
            "raise its <hard_limit>, if it has one (virsh memtune vm1 --hard-limit 1179904 --live), and th",
        ),
        ({}, "raise its limit as it runs"),
        (limited(1179904 * KIB), "raise its limit as it runs"),
    ],
)
def test_the_limit_of_a_domain_that_runs_is_not_raised_above_its_hard_limit(group: Row, first: str) -> None:
    answer = grown(info(processes=[process(**group)]), memory="64M", memlock="100M")
    assert answer["fits"] is False
    assert answer["remedy"].startswith(f"To make it fit: {first}")
    assert f"(prlimit --pid 4242 --memlock={PINNED + 64 * MIB}:{PINNED + 64 * MIB})" in answer["remedy"]


def test_a_domain_that_grows_within_its_limit_has_one() -> None:
    """Though libvirt may raise it."""
    answer = grown(info(), memory="1M")
    assert answer["fits"] is True
    assert "it is within its limit of 100 MiB, which libvirt may raise. " in answer["reason"]
    # An address space that was not found matters, too.
    assert grown(info(processes=[process(**TWICE)]), memory="1M", memlock="1G")["fits"] is None
    assert grown(info(processes=[process(**{**TWICE, "memlock_bytes": GIB})]), memory="1M")["fits"] is None


@pytest.mark.parametrize("name", ["vm1", "vm1.service", "4242"])
def test_a_vm_that_runs_goes_by_its_names(name: str) -> None:
    answer = grown(
        info(processes=[unit(), process(pid=1, name="x", domain="x"), unit(holder=True, pid=2)]), name, memory=1
    )
    assert answer["reason"].startswith("vm1 runs as vm, as process 4242.")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"grow": {"vm": "x", "memory": 1}},
            "grow: no VM that runs is called 'x': give its domain, its unit, its name or its pid. A VM without",
        ),
        ({"grow": {"vm": "twin", "memory": 1}}, "grow: 2 VMs are called 'twin' (pids 7, 8): give the pid of one."),
        ({"grow": {"vm": "vm1"}}, "grow: what is it to get? Give memory or devices, or live_update."),
        ({"grow": "vm1"}, "grow: 'vm1' is no VM that grows: give vm, and memory or devices or both."),
        ({"grow": {"vm": "vm1", "cpus": 1}}, "grow: {'vm': 'vm1', 'cpus': 1} is no VM that grows"),
        ({"grow": {"vm": "vm1", "memory": "x"}}, "grow.memory: 'x' is not a size"),
        ({"grow": {"vm": "vm1", "devices": [{}]}}, "grow.devices[0]: backend None is unknown"),
        ({}, "memory: give the memory of the VM, or domain_xml, or grow."),
        ({"domain_xml": domain(), "grow": {"vm": "vm1"}}, "domain_xml and grow: "),
        ({"domain_xml": domain(), "devices": [VDPA]}, "domain_xml and devices: "),
        ({"domain_xml": "<domain>"}, "domain_xml: It is no XML"),
        ({"memory": 1, "devices": {}}, "devices: give a list of up to 256 dictionaries"),
        ({"memory": 1, "devices": [VDPA] * 257}, "devices: give a list of up to 256 dictionaries"),
        ({"memory": 1, "devices": ["vdpa"]}, "devices[0]: 'vdpa' is no device: give backend"),
        (
            {"memory": 1, "devices": [BY_IOMMUFD, {"backend": "x"}]},
            "devices[1]: backend 'x' is unknown: give iommufd, ",
        ),
        (
            {"memory": 1, "devices": [{**BY_IOMMUFD, "mode": "none"}]},
            "devices[0]: mode 'none' is unknown: give user or",
        ),
        ({"memory": 1, "devices": [{**VDPA, "mode": "user"}]}, "devices[0]: a device by vdpa is in no iommufd"),
        (
            {"memory": 1, "devices": [{**BY_IOMMUFD, "mode": "user"}, {**BY_IOMMUFD, "mode": "process"}]},
            "devices: the VM's iommufd has two modes: give it one",
        ),
        (
            {"memory": 1, "devices": [{**BY_IOMMUFD, "iommufd": each} for each in range(5)]},
            "The VM has 5 iommufds, and memlock_fit counts 4 at most.",
        ),
        (
            {
                "memory": 1,
                "user": "vm",
                "viommu": "each",
                "devices": [{**BY_IOMMUFD, "iommufd": i % 4} for i in range(256)],
            },
            "",
        ),
    ],
)
def test_what_is_no_vm(given: Row, words: str) -> None:
    twins = [process(pid=pid, name="twin", domain="twin") for pid in (7, 8)]
    unknown = host(legacy_by_iommufd=None, qemu=[])
    if not words:
        assert memlock_fit(info(host=unknown), **given)["fits"] is not None
        given["devices"] += []
        return
    with pytest.raises(IommufdError) as raised:
        memlock_fit(info(processes=[process(), *twins]), **given)
    assert str(raised.value).startswith(words)


def test_so_much_that_is_not_known_is_not_counted_out() -> None:
    devices = [{**BY_IOMMUFD, "iommufd": index % 4} for index in range(250)] + [MDEV, NVME, VDPA, BY_IOMMUFD][:3]
    data = idle(host=host(legacy_by_iommufd=None, qemu=[]))
    assert message(data, who="vm", memlock="1G", viommu="each", devices=devices) == (
        "Too little is known of so many devices: give accounting, or devices with the mode of each."
    )
    assert fit(data, who="vm", memlock="1G", viommu="each", devices=devices, accounting="process")["fits"] is False


CAPABILITY = (
    f"give the VMM CAP_IPC_LOCK (setcap cap_ipc_lock+ep {QEMU}), and with it the right to pin all memory to whoever may"
    " execute that"
)
AMBIENT = (
    "give the VMM CAP_IPC_LOCK (AmbientCapabilities=CAP_IPC_LOCK in its system unit, and no CapabilityBoundingSet= or"
    " PrivateUsers= in its unit that takes it away), and with it the right to pin all memory"
)
BY_LIBVIRT = (
    "have it charged for itself alone, which this host's libvirt does for devices with <driver name='vfio'"
    " iommufd='yes'/>"
)
BY_OPTION = (
    "have it charged for itself alone, by setting rlimit_mode=process on its iommufd before its first device"
    " (iommufd-exec, or virt.iommufd.iommufd_option if another program than QEMU opens it)"
)
BY_DOMAIN = "have it charged for itself alone (virt.iommufd.iommufd_domain, which needs libvirt 12.2 or later)"
NEXT = ", for this VM only, since the next one takes still more"
BY_USER = "leave its iommufd in the mode user, in which its memory counts for another counter"
ONE = "pass all devices through by one iommufd"


def hard_limit(enough: int) -> str:
    return (
        f"raise its limit (<memtune><hard_limit unit='KiB'>{(enough + GIB) // KIB}</hard_limit></memtune> in the domain"
        ", 1 GiB of it for the emulator's own memory, since it limits all memory of the VM, too)"
    )


def in_unit(enough: int) -> str:
    return (
        f"raise its limit (LimitMEMLOCK={enough} in its unit; for one that vm's own service manager starts, also in a"
        " drop-in of user@1001.service, which is restarted then)"
    )


@pytest.mark.parametrize(
    ("who", "data", "end"),
    [
        ("vm", {"host": native(sessions=[session(GIB)])}, "in its unit)"),
        ("vm", {"host": native(sessions=[session(None)])}, "in its unit)"),
        ("vm", {"host": native(sessions=[session(64 * MIB - 1)])}, "in a drop-in of user@1001.service, which is"),
        ("vm", {"host": native(sessions=None)}, "in its unit; for one that vm's own service manager starts, also in a"),
        (
            "vm",
            {"processes": [unit(user_unit="a1.service")]},
            "in its unit; for one, such as a1.service, that vm's own service manager starts, also in a drop-in of",
        ),
        ("nobody", {"users": []}, "in a drop-in of user@UID.service, which is"),
        # Its manager is the system's.
        ("root", {}, "in its unit)"),
    ],
)
def test_a_limit_holds_whoever_starts_the_unit(who: str, data: Row, end: str) -> None:
    """A user's service manager gives no more than its own hard limit, and says nothing."""
    data = {"users": [of_vm()], **data}
    answer = fit(idle(**data), who=who, memlock="1M", accounting="process", cap_ipc_lock=False, **EXACT)
    assert f"(LimitMEMLOCK={64 * MIB} " in answer["remedy"]
    assert end in answer["remedy"].partition(" or give")[0]


def of_manager(enough: int) -> str:
    return (
        f"raise the limit of vm's service manager (LimitMEMLOCK={enough} in a drop-in of user@1001.service, and restart"
        " that)"
    )


@pytest.mark.parametrize(
    ("data", "parameters", "cures"),
    [
        pytest.param(
            info(), {"memlock": "100M"}, [hard_limit(PINNED + 64 * MIB + GIB) + NEXT, CAPABILITY], id="an older libvirt"
        ),
        pytest.param(
            info(host=native()),
            {"memlock": "100M", "accounting": "user", "locked": 0, "overhead": "256K"},
            [hard_limit(2 * PINNED) + NEXT, BY_LIBVIRT, CAPABILITY],
            id="a libvirt that sets the mode",
        ),
        pytest.param(
            info(host=native()),
            {"memlock": "32M", "overhead": 0, "locked": 0},
            [hard_limit(64 * MIB), CAPABILITY],
            id="a low limit",
        ),
        pytest.param(
            idle(users=[of_vm()]),
            {"memlock": "100M", "who": 1001, "locked": 0, "accounting": "user", "overhead": "256K"},
            [in_unit(2 * PINNED) + NEXT, BY_OPTION, AMBIENT],
            id="a unit",
        ),
        pytest.param(
            idle(host=native(sessions=[session(GIB + 64 * MIB)]), users=[of_vm(GIB)]),
            {"who": "vm", "accounting": "user", "overhead": "256K"},
            # Its libvirt gives no more than it reckons, whatever it may.
            [BY_DOMAIN, CAPABILITY],
            id="a session",
        ),
        pytest.param(
            idle(host=native()),
            {"who": "vm", "accounting": "process"},
            [of_manager(GIB + 64 * MIB)],
            id="a session with too little",
        ),
        pytest.param(
            idle(),
            {"memlock": "100M", "who": "vm", "accounting": "process", "devices": [BY_IOMMUFD, LEGACY], **EXACT},
            [in_unit(128 * MIB), ONE, BY_USER, AMBIENT],
            id="both backends",
        ),
        pytest.param(
            idle(),
            {"memlock": "100M", "who": "vm", "accounting": "process", "devices": [BY_IOMMUFD, ANOTHER], **EXACT},
            [in_unit(128 * MIB), ONE, AMBIENT],
            id="two iommufds",
        ),
        # Under user, the sum is full already.
        pytest.param(
            idle(users=[of_vm()]),
            {"memlock": "100M", "who": "vm", "accounting": "process", "devices": [BY_IOMMUFD, LEGACY], **EXACT},
            [in_unit(128 * MIB), f"{ONE}, in the mode process", AMBIENT],
            id="both backends beside another VM",
        ),
        pytest.param(
            idle(users=[of_vm()]),
            {"memlock": "100M", "who": "vm", "accounting": "user", "devices": [OF_FIRST, ANOTHER], **EXACT},
            [in_unit(PINNED + 128 * MIB) + NEXT, f"{ONE} (one -object iommufd), in the mode process", AMBIENT],
            id="two iommufds beside another VM",
        ),
        pytest.param(
            idle(users=[of_vm()], host=host(options={"rlimit_mode": {"readable": False}})),
            {"memlock": "100M", "who": "vm", "accounting": "user", "devices": [OF_FIRST, ANOTHER], **EXACT},
            [in_unit(PINNED + 128 * MIB) + NEXT, AMBIENT],
            id="and a kernel without the mode",
        ),
        pytest.param(
            idle(),
            {"memlock": "100M", "who": "vm", "accounting": "process", "devices": [BY_IOMMUFD, LEGACY, VDPA], **EXACT},
            [in_unit(128 * MIB)],
            id="vDPA",
        ),
        pytest.param(
            info(host=host(limits_of_view=unseen("processes"))), {"memlock": "200M"}, [CAPABILITY], id="no end in sight"
        ),
        pytest.param(
            idle(host=host(options={"rlimit_mode": {"readable": False}}), users=[of_vm()]),
            {"memlock": "100M", "who": "vm", "accounting": "user", **EXACT},
            [in_unit(PINNED + 64 * MIB) + NEXT, AMBIENT],
            id="a kernel without the mode",
        ),
    ],
)
def test_the_remedy(data: Row, parameters: Row, cures: list[str]) -> None:
    assert fit(data, **parameters)["remedy"] == f"To make it fit: {'; or '.join(cures)}."


@pytest.mark.parametrize("accounting", ["user", "process"])
@pytest.mark.parametrize("charged", [0, PINNED])
@pytest.mark.parametrize("given", [given for given, *_rest in SPACES])
def test_asked_again_with_any_of_the_remedies_it_fits(given: Row, charged: int, accounting: str) -> None:
    data = idle(users=[of_vm(charged)])
    asked = {"who": "vm", "memlock": "100M", "accounting": accounting, **EXACT, **given}
    remedy = (fit(data, **asked)["remedy"] or "").removeprefix("To make it fit: ")
    devices = asked.get("devices", [])
    others = [each for each in devices if each["backend"] not in ("iommufd", "legacy")]
    for cure in filter(None, remedy.split("; or ")):
        changes: list[Row] = []
        if "LimitMEMLOCK=" in cure:
            changes = [{"memlock": re.findall(r"LimitMEMLOCK=(\d+)", cure)[0]}]
        elif cure.startswith(ONE):
            modes = re.findall("in the mode (user|process)", cure) or ["user", "process"]
            changes = [{"devices": [BY_IOMMUFD, *others], "accounting": mode} for mode in modes]
        elif cure.startswith("have it lock no memory"):
            changes = [{"locked": 0}]
        elif "CAP_IPC_LOCK" in cure:
            changes = [{"accounting": "none"}]
        elif cure.startswith((BY_OPTION, BY_USER)):
            without_mode = [{key: each[key] for key in each if key != "mode"} for each in devices]
            mode = "process" if cure.startswith(BY_OPTION) else "user"
            changes = [{"accounting": mode, **({"devices": without_mode} if devices else {})}]
        assert changes
        for change in changes:
            assert fit(data, **{**asked, **change})["fits"] is True, cure


@pytest.mark.parametrize(
    ("on", "given"),
    [
        # Whether libvirt starts it at all is not known.
        (native(cap_sys_resource=None, sets_rlimit_mode=None), {"memlock": "32M"}),
        # A release of QEMU before 11 would run it with more.
        (host(qemu=[emulator(False, version=None)]), {"who": "vm", "memlock": "32M", "devices": [BY_IOMMUFD, LEGACY]}),
        (host(qemu=[]), {"who": "vm", "memlock": "32M", "devices": [BY_IOMMUFD, LEGACY], "accounting": "process"}),
    ],
)
def test_where_a_remedy_depends_on_what_is_not_known_it_says_so(on: Row, given: Row) -> None:
    answer = fit(idle(host=on), **EXACT, **given)
    assert (answer["fits"], answer["question"]) == (False, None)
    depends = "What would make it fit depends on this: "
    asks = "Which release of QEMU is it?" if "devices" in given else "May libvirt's daemon use CAP_SYS_RESOURCE"
    assert answer["remedy"].startswith(f"{depends}{asks}")
    assert ("with emulators in gather_subset" in answer["remedy"]) is ("devices" in given)


def test_no_remedy_for_a_kernel_without_iommufd() -> None:
    assert fit(info(host=host(module="absent")), memlock="1M", who="vm", accounting="process")["remedy"] is None


@pytest.mark.parametrize(("hard", "helps"), [(GIB + 64 * MIB, True), (GIB + 64 * MIB - 1, False)])
@pytest.mark.parametrize("may", [False, None])
def test_a_hard_limit_is_a_remedy_where_the_daemon_may_give_so_much(hard: int, helps: bool, may: bool | None) -> None:
    on = native(cap_sys_resource=may, sets_rlimit_mode=None, memlock_hard_bytes=hard)
    answer = fit(idle(host=on), memlock="32M", devices=[LEGACY], accounting="user", **EXACT)
    assert answer["fits"] is False
    assert ("<hard_limit" in answer["remedy"]) is helps


def test_a_session_refuses_a_hard_limit_and_without_it_starts_the_domain() -> None:
    xml = domain(HOSTDEV, HARD_LIMIT)
    answer = memlock_fit(idle(host=native(sessions=[session(2 * GIB)])), domain_xml=xml, user="vm")
    assert (answer["fits"], answer["remedy"]) == (False, "To make it fit: leave out its <hard_limit>.")
    # It would not do alone.
    assert memlock_fit(idle(host=native()), domain_xml=xml, user="vm")["remedy"] is None


@pytest.mark.parametrize(
    ("hard", "limits"),
    [
        ({"memlock_hard_bytes": 200 * MIB, "memlock_hard_unlimited": False}, "{}:"),
        ({"memlock_hard_bytes": PINNED + 64 * MIB, "memlock_hard_unlimited": False}, "{}:"),
        ({"memlock_hard_bytes": None, "memlock_hard_unlimited": True}, "{}:"),
        ({"memlock_hard_bytes": PINNED + 64 * MIB - 1, "memlock_hard_unlimited": False}, "{0}:{0}"),
        ({}, "{0}:{0}"),
    ],
)
def test_a_hard_limit_that_is_high_enough_stays(hard: Row, limits: str) -> None:
    remedy = grown(info(processes=[unit(**hard)], users=[of_vm()]), memory="64M")["remedy"]
    assert f"(prlimit --pid 4242 --memlock={limits.format(PINNED + 64 * MIB)})" in remedy


@pytest.mark.parametrize("accounting", ["user", "process"])
@pytest.mark.parametrize("given", [given for given, *_rest in SPACES])
def test_the_limit_of_the_remedy_is_enough_and_not_too_much(given: Row, accounting: str) -> None:
    asked = {"who": "vm", "memlock": "40M", "accounting": accounting, **EXACT, **given}
    answer = fit(idle(users=[of_vm()]), **asked)
    if answer["fits"] is not True:
        enough = int(re.findall(r"LimitMEMLOCK=(\d+)", answer["remedy"])[0])
        assert fit(idle(users=[of_vm()]), **{**asked, "memlock": enough})["fits"] is True
        assert fit(idle(users=[of_vm()]), **{**asked, "memlock": enough - 1})["fits"] is not True


@pytest.mark.parametrize(
    ("emulators", "running", "expected"),
    [
        pytest.param([], None, QEMU, id="none"),
        pytest.param([emulator(False, "/opt/qemu")], None, "/opt/qemu", id="one"),
        pytest.param(
            [emulator(False, "/usr/bin/a"), emulator(False, "/usr/bin/b")], "/usr/bin/b", "/usr/bin/b", id="runs"
        ),
        pytest.param([emulator(False, "/opt/b"), emulator(False, "/opt/a")], None, "/opt/a", id="or the first"),
        pytest.param([emulator(False, "/opt/a", present=False)], None, QEMU, id="not there"),
        pytest.param([emulator(True, "/opt/a"), emulator(None, "/opt/b")], None, "/opt/b", id="without the capability"),
        pytest.param(
            [emulator(False, "/usr/bin/qemu-system-i386"), emulator(False)], "/usr/bin/qemu-system-i386", QEMU, id="own"
        ),
    ],
)
def test_the_emulator_that_the_remedy_names(emulators: list[Row], running: str | None, expected: str) -> None:
    data = info(host=host(qemu=emulators), processes=[process(emulator=running)])
    answer = fit(data, memlock="64K", accounting="user")
    assert f"setcap cap_ipc_lock+ep {expected})" in answer["remedy"]


@pytest.mark.parametrize(
    ("machine", "own", "accounting"),
    [
        ("x86_64", "qemu-system-x86_64", "none"),
        ("ppc64le", "qemu-system-ppc64", "none"),
        ("aarch64", "qemu-system-x86_64", None),
        ("x86_64", "qemu-kvm", "none"),
    ],
)
def test_the_emulators_of_the_hosts_architecture(machine: str, own: str, accounting: str | None) -> None:
    rows = [emulator(True, f"/usr/bin/{own}"), emulator(False, "/usr/bin/qemu-system-i386")]
    assert fit(idle(host=host(machine=machine, qemu=rows)), memlock="1T")["accounting"] == accounting


def test_the_emulator_of_a_domain() -> None:
    rows = [emulator(False), emulator(True, "/opt/qemu")]
    xml = domain(HOSTDEV + "<emulator>/opt/qemu</emulator>")
    assert memlock_fit(info(host={**native(), "qemu": rows}), domain_xml=xml)["accounting"] == "none"
    assert memlock_fit(info(host={**native(), "qemu": rows}), domain_xml=domain(HOSTDEV))["accounting"] == "process"


def ready(**what: bool | None) -> list[Row]:
    return [
        {"what": name, "ready": state, "msg": "" if state else f"{name} is missing."} for name, state in what.items()
    ]


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([BY_IOMMUFD], ["module is missing.", "iommu is missing."]),
        ([LEGACY], ["iommu is missing."]),
        ([VDPA], []),
    ],
)
def test_prerequisites(devices: list[Row], expected: list[str]) -> None:
    rows = ready(module=False, device=None, cdev=True, iommu=False, kubevirt=False)
    answer = fit(info(host=host(readiness=rows)), who="vm", memlock="4G", devices=devices)
    assert answer["prerequisites"] == expected
    assert all(each in answer["reason"] for each in expected)
    assert answer["fits"] is True


def test_a_kernel_without_iommufd() -> None:
    answer = fit(info(host=host(module="absent")), memlock="unlimited")
    assert (answer["fits"], answer["prerequisites"]) == (False, ["This host's kernel has no iommufd."])
    assert answer["remedy"] is None or "module" not in answer["remedy"]
    assert fit(info(host=host(module="absent")), memlock="unlimited", devices=[LEGACY])["fits"] is True


def test_a_live_update_needs_a_file() -> None:
    answer = fit(idle(), who="vm", memlock="128M", accounting="user", live_update=True, **EXACT)
    assert answer["fits"] is True
    assert "The VM's memory must be that of a file" in answer["prerequisites"][0]
    assert fit(idle(), who="vm", memlock="127M", accounting="user", live_update="yes", **EXACT)["fits"] is False
    assert fit(idle(), who="vm", memlock="64M", accounting="process", live_update=True, **EXACT)["fits"] is True


@pytest.mark.parametrize(
    ("fields", "memlock", "old", "new"),
    [
        ({}, None, 2 * PINNED, 2 * PINNED),
        ({}, 2 * PINNED - 1, 2 * PINNED, 2 * PINNED),
        ({}, 2 * PINNED, 2 * PINNED, None),
        ({}, "unlimited", 2 * PINNED, None),
        # One of the two has it already.
        ({"memlock_bytes": 2 * PINNED}, 2 * PINNED - 1, None, 2 * PINNED),
        ({"memlock_bytes": 2 * PINNED}, None, None, None),
        ({"memlock_bytes": None, "memlock_unlimited": True}, PINNED, None, 2 * PINNED),
        (PER_PROCESS, None, None, None),
        (PER_PROCESS, PINNED, None, None),
        (PER_PROCESS, PINNED - 1, None, PINNED),
        # It was lowered since.
        ({**PER_PROCESS, "memlock_bytes": MIB}, PINNED, PINNED, None),
        ({**CAPABLE, "memlock_bytes": MIB}, None, None, None),
    ],
)
def test_both_processes_of_a_live_update_need_the_limit(
    fields: Row, memlock: int | str | None, old: int | None, new: int | None
) -> None:
    """QEMU has the one that runs charged again, after the new one."""
    charged = 0 if "iommufds" in fields else PINNED
    given: Row = {} if memlock is None else {"memlock": memlock}
    answer = grown(info(processes=[unit(**fields)], users=[of_vm(charged)]), live_update=True, **given)
    assert answer["fits"] is (new is None)
    said = answer["remedy"] or " ".join(answer["prerequisites"])
    assert re.findall(r"prlimit --pid 4242 --memlock=(\d+)", said) == ([str(old)] if old else [])
    assert re.findall(r"give the process that takes it over a limit of (\d+) bytes", said) == (
        [str(new)] if new else []
    )


@pytest.mark.parametrize(
    ("memlock", "given", "starts"),
    [("127M", {}, True), ("63M", {}, False), ("127M", {"devices": [LEGACY]}, None)],
)
def test_a_new_vm_that_would_start_cannot_be_taken_over(memlock: str, given: Row, starts: bool | None) -> None:
    """Its start has other words than its update. With VFIO's own container none was tried."""
    answer = fit(idle(), who="vm", memlock=memlock, accounting="user", live_update=True, **{**EXACT, **given})
    assert ("cannot be taken over" in answer["reason"]) is (starts is True)
    assert ("ends with -12" in answer["reason"]) is (starts is False)


@pytest.mark.parametrize(
    ("grow", "memlock", "taken_over"),
    [
        ({}, 2 * PINNED - 1, False),
        ({"memory": "1G"}, 2 * PINNED - 1, False),
        # It is taken over, and then cannot get more.
        ({"memory": "1G"}, 2 * PINNED, True),
    ],
)
def test_what_is_said_of_a_live_update_that_fails(grow: Row, memlock: int, taken_over: bool) -> None:
    """QEMU says nothing of memory then."""
    answer = grown(info(processes=[unit()], users=[of_vm(PINNED)]), live_update=True, memlock=memlock, **grow)
    assert answer["fits"] is False
    assert ("Unknown section or instance 'iommufd'" in answer["reason"]) is not taken_over
    assert ("ends with -12" in answer["reason"]) is taken_over


def test_what_other_versions_do_not_tell_is_not_known() -> None:
    """Rows of today, with nothing but what each version has told."""
    row = {
        name: process()[name] for name in ("pid", "comm", "uid", "user", "memory_bytes", "pinned_bytes", "accounting")
    }
    data = info(host=BARE, processes=[row])
    answer = fit(data, memlock="1G", locked=0)
    assert (answer["fits"], answer["needed"]) == (None, 64 * MIB + GIB)
    assert fit(data, memlock="2G", locked=0)["fits"] is True
    assert fit(data)["fits"] is None


def without(data: Row, *path: str) -> Row:
    """The same input, in which one thing is not known."""
    first, *rest = path
    return {**data, first: without(data[first], *rest) if rest else None}


# What iommufd_info may not know
UNTOLD = [
    *(("host", name) for name in ("page_bytes", "legacy_by_iommufd", "readiness", "options", "qemu", "libvirt")),
    *(("host", "libvirt", name) for name in libvirt()),
]
ASKED: list[Row] = [
    *({"memory": "64M", "user": "vm", "memlock": "100M", **EXACT, **given} for given, *_rest in SPACES),
    *({"memory": "64M", **given} for given in ({}, {"user": "vm"}, {"memlock": "1G"}, {"memlock": "100M"})),
    *(
        {"domain_xml": domain(devices, given.get("top", ""), given.get("arguments", ""))}
        for _on, devices, given, *_rest in DOMAINS
    ),
    *({"grow": {"vm": "vm1", "memory": size}} for size in ("1M", "64M", "1T")),
]


@pytest.mark.parametrize("path", UNTOLD, ids=".".join)
@pytest.mark.parametrize("on", [host(), native(), host(libvirt=HARDENED), native(sessions=[session(2 * GIB)])])
def test_what_is_not_known_never_makes_it_sure_of_something_else(on: Row, path: tuple[str, ...]) -> None:
    data = info(host=on)
    for asked in ASKED:
        sure = memlock_fit(data, **asked)["fits"]
        unsure = memlock_fit(without(data, *path), **asked)["fits"]
        # What is sure may become unsure. Who libvirt's VMs run as decides what is asked about.
        assert unsure in (sure, None) or sure is None, asked


@pytest.mark.parametrize("field", ["accounting", "backends", "address_spaces", "locks_memory", "memory_bytes"])
def test_nor_does_what_is_not_known_of_a_vm(field: str) -> None:
    data = info(processes=[process(), unit()], users=[user(), of_vm()])
    unknown = info(processes=[process(**{field: None}), unit(**{field: None})], users=[user(), of_vm()])
    for asked in [*ASKED[:-3], {"grow": {"vm": "vm1.service", "memory": "1M"}}]:
        sure, unsure = (memlock_fit(each, **asked)["fits"] for each in (data, unknown))
        assert unsure in (sure, None) or sure is None, asked


@pytest.mark.parametrize("running", [[], [unit()]])
def test_who_is_charged_for_vms_that_have_ended_is_asked(running: list[Row]) -> None:
    """It may be anybody: whom iommufd_info knows nothing of, too."""
    data = idle(processes=running, host=host(limits_of_view=unseen("charges")))
    answer = fit(data, who="vm", memlock="1G", accounting="user", **EXACT)
    assert (answer["fits"], answer["counter"]) == (None, "user")
    assert answer["question"].startswith("Is vm charged for VMs that have ended? Have closed what host.limits_of_view")
    assert answer["reason"].endswith(" This is why.")
    for sure in ({"accounting": "process"}, {"accounting": "none"}, {"accounting": "user", "devices": [LEGACY]}):
        assert fit(data, who="vm", memlock="1G", **EXACT, **sure)["fits"] is True
    assert fit(data, who="vm", memlock="1M", accounting="user", **EXACT)["fits"] is False


def test_each_question_has_words() -> None:
    """Those of the model, of which three depend on more."""
    assert set(QUESTIONS) - set(_fit_words._QUESTIONS) == {"held_user", "later", "order"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("memory", value) for value in (0, True, "12Q", [1], float("nan"))),
        *(("memlock", value) for value in ("12Q", -1, None, ["libvirt"], "Libvirt")),
        *(("overhead", value) for value in ("12Q", -1, False, "8E")),
        *(("locked", value) for value in ("12Q", -1, [1], "8E")),
    ],
)
def test_a_wrong_size_is_named(name: str, value: Any) -> None:
    assert message(info(), **{name: value}).startswith(f"{name}: {value!r} is ")


WRONG: dict[str, tuple[str, tuple[Any, ...]]] = {
    "who": (
        "user: {} is not a user: give a name or an id.",
        (True, "", " ", -1, "-1", "-x", 1.5, [], {}, "v\x1b[31mm", "9" * 11, 10**11),
    ),
    "vfio_devices": (
        "vfio_devices: {} is not a number of devices: give 1 to 9999.",
        (None, True, 0, -1, "0", "x", 1.5, [1], 10000, "9" * 20, "\u0664"),
    ),
    "viommu": ("viommu: {} is unknown: give none, each or nested.", ("x", 2, "")),
    "live_update": ("live_update: {} is not a boolean: give true or false.", (None, "x", 2, "")),
    "cap_ipc_lock": ("cap_ipc_lock: {} is not a boolean: give true or false.", ("x", 2, "")),
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
            " AttributeError: 'NoneType' object has no attribute 'get'",
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
    assert fit(info(failed=False, changed=False), memlock="2G")["fits"]


@pytest.mark.parametrize("who", ["libvirt-qemu", 64055])
def test_the_input_may_be_narrowed_to_the_user(who: Any) -> None:
    assert fit(info(narrowed={"pids": [1], "uids": [64055]}), who=who, memlock="2G")["fits"]


@pytest.mark.parametrize("who", ["alice", 1000])
def test_the_input_must_not_be_narrowed_to_others(who: Any) -> None:
    data = info(narrowed={"pids": None, "uids": [64055]})
    assert message(data, who=who) == (
        f"user: the input tells of other users than {who}: run virt.iommufd.iommufd_info without users, or"
        " with this one among them."
    )


@pytest.mark.parametrize("name", ["dyn", "vmalias", "+1001"])
@pytest.mark.parametrize("row", [of_vm(), of_vm(0, PINNED), user(uid=62264, user=None)])
def test_a_name_that_the_input_does_not_know_may_be_that_of_anybody_who_is_charged(name: str, row: Row) -> None:
    data = info(users=[row, user(uid=5, user="five", charged_bytes=4 * PAGE)])
    given: Row = {"memory": PINNED, "who": name, "accounting": "user", "overhead": 0}
    assert fit(data, memlock=2 * PINNED, **given)["fits"] is True
    assert fit(data, memlock=PINNED - PAGE, **given)["fits"] is False
    answer = fit(data, memlock=2 * PINNED - PAGE, **given)
    assert answer["fits"] is None
    assert answer["question"] == (
        f"Which uid has {name}? Give user as a number, or users of iommufd_info with that name."
    )
    assert fit(data, memlock=PINNED, **{**given, "who": 62265})["fits"] is True
    assert fit(data, memlock=PINNED, **{**given, "who": "root", "cap_ipc_lock": False})["fits"] is True
    # Where nobody is charged, it is nobody.
    assert fit(info(users=[of_vm(0)]), memlock=PINNED, **given)["fits"] is True


@pytest.mark.parametrize(("charged", "fits"), [(PINNED, False), (0, True)])
def test_the_module_tells_which_uid_has_a_name(charged: int, fits: bool) -> None:
    narrowed: Row = {"pids": None, "uids": [1001], "users": [{"uid": 1001, "user": "vmalias"}]}
    data = info(users=[of_vm(charged)], narrowed=narrowed)
    answer = fit(data, memory=PINNED, who="vmalias", memlock=PINNED, accounting="user", overhead=0)
    assert answer["fits"] is fits
    assert ("left to user vm" in answer["reason"]) is fits


def test_what_runs_with_the_capability_may_be_the_same_users() -> None:
    data = info(processes=[unit(**CAPABLE)], users=[of_vm(0)])
    for name, capable in (("vmalias", None), (1002, False)):
        answer = fit(data, who=name, memlock="1M", **EXACT)
        assert answer["fits"] is capable
        assert ("Has the VMM CAP_IPC_LOCK?" in (answer["question"] or "")) is (capable is None)


@pytest.mark.parametrize(("initial", "helps"), [(True, True), (None, True), (False, False)])
def test_the_capability_is_no_remedy_in_another_user_namespace(initial: bool | None, helps: bool) -> None:
    data = info(processes=[unit(initial_user_namespace=initial)], users=[of_vm()])
    answer = fit(data, memlock="100M", **OF_VM)
    assert answer["fits"] is False
    assert ("CAP_IPC_LOCK" in answer["remedy"]) is helps


RUNS_PER_PROCESS: Row = {"accounting": "process", "locked_bytes": PINNED, "iommufds": iommufds(1, mode="process")}


@pytest.mark.parametrize(
    ("fields", "grows", "question"),
    [
        pytest.param(
            {**CAPABLE, "initial_user_namespace": None, "accounting": None},
            {"memory": "64M"},
            "Is the process in the initial user namespace, where its CAP_IPC_LOCK counts? Run virt.iommufd.",
            id="capability",
        ),
        pytest.param(
            {"iommufds": iommufds(1, mode=None), "accounting": None},
            {"memory": "70M"},
            "Which mode has its iommufd? Run virt.iommufd.",
            id="mode of its own",
        ),
        pytest.param(
            {"iommufds": [], "backends": ["legacy"], "legacy_containers": [{"fd": 31, "same_as": None}]},
            {"devices": [{**BY_IOMMUFD}]},
            "Which mode has its iommufd? Give the mode of each in devices.",
            id="mode of a new one",
        ),
        pytest.param(
            {**RUNS_PER_PROCESS, "locks_memory": None},
            {"memory": "30M"},
            "How much memory does the VMM lock itself (QEMU's mem-lock=on)? Give locked: ",
            id="locked",
        ),
    ],
)
def test_the_question_about_a_vm_that_runs_is_one_that_can_be_answered(fields: Row, grows: Row, question: str) -> None:
    data = info(processes=[unit(**fields)], users=[of_vm(charged=40 * MIB)])
    answer = grown(data, **grows, overhead=0)
    assert answer["fits"] is None
    assert answer["question"].startswith(question)


def test_what_was_plugged_before_the_first_device_is_asked_for() -> None:
    data = info(processes=[unit(**BEFORE)], users=[of_vm(0)])
    answer = grown(data, **FIRST, memlock=GROWN)
    assert (answer["fits"], answer["question"]) == (
        None,
        "How much memory has the VM now? Give memory: all of it, with what was plugged.",
    )
    # 32 MiB were: QEMU was refused with 72 MiB, and a page below this.
    for memlock, fits in ((GROWN, True), (GROWN - 1, False), ("72M", False)):
        told = memlock_fit(
            data, grow={"vm": "vm1", "devices": [BY_IOMMUFD]}, memory="96M", overhead="256K", memlock=memlock
        )
        assert told["fits"] is fits


@pytest.mark.parametrize(("locked", "fits"), [(None, None), (0, True), ("64M", False), (True, False)])
def test_what_a_vm_that_runs_locks_itself_may_be_given(locked: Any, fits: bool | None) -> None:
    data = info(processes=[unit(**RUNS_PER_PROCESS, locks_memory=None)], users=[])
    assert grown(data, memory="30M", locked=locked)["fits"] is fits


def test_the_limit_of_a_domain_that_grows_is_asked_for_by_what_decides() -> None:
    answer = grown(info(processes=[process(**RUNS_PER_PROCESS)], host=native()), memory="64M")
    assert answer["question"] == (
        "Which RLIMIT_MEMLOCK will the VMM have? Give memlock: 104857600, its limit of now, if all devices that it has"
        " and gets are in <qemu:commandline>, for which libvirt reckons nothing; else what libvirt reckons: all memory"
        " that it then has, as often as libvirt counts that, and 1 GiB, if that is more."
    )
    for size in (200 * MIB, None):
        asked = grown(info(processes=[process(**RUNS_PER_PROCESS, **limited(size))], host=native()), memory="64M")
        assert "Give memlock: its <hard_limit>, if it has one; else 104857600, its limit of now" in asked["question"]


@pytest.mark.parametrize(("view", "by_root"), [([], False), (unseen("descriptors"), True), (unseen("options"), False)])
def test_root_is_sent_to_look_only_where_something_was_not_seen(view: list[Row], by_root: bool) -> None:
    data = idle(users=[of_vm(0, 48 * MIB)], host=host(limits_of_view=view))
    question = fit(data, who="vm", memlock="100M", accounting="user", **EXACT)["question"]
    assert question.startswith("Are the 48 MiB charged to vm that other processes of it have pinned? ")
    assert ("Run virt.iommufd.iommufd_info as root" in question) is by_root
    assert ("By io_uring they are, by vDPA or RDMA they are not." in question) is not by_root
    assert question.endswith(" A limit of 117440512 bytes suffices whatever it is.")


def test_what_a_vm_that_became_its_user_has_pinned_itself_is_not_that_of_others() -> None:
    """With -run-with user=, nobody knows by its files what it has pinned since."""
    row = unit(accounting=None)
    question = grown(info(processes=[row], users=[of_vm(0, PINNED)]), memory="80M", overhead=0)["question"]
    assert question.startswith("Are the 64.2 MiB charged to vm that qemu-system-x86 (4242) itself has pinned? ")
    assert "before it became that user (-run-with user=) is not, and what it has pinned since may be. A" in question
    # Others have pinned, too.
    question = grown(info(processes=[row], users=[of_vm(0, PINNED + MIB)]), memory="80M", overhead=0)["question"]
    assert question.startswith("Are the 65.2 MiB charged to vm that processes of it have pinned? ")
    # One by the legacy container has pinned it by something else.
    row = unit(accounting="process", iommufds=[], backends=["legacy"], vfio_devices=[], legacy_containers=[{"fd": 3}])
    question = grown(info(processes=[row], users=[of_vm(0, PINNED)]), memory="80M", overhead=0)["question"]
    assert "-run-with" not in (question or "")


def test_a_vm_with_iommufds_of_both_modes_is_told_of_where_it_decides() -> None:
    both = [*iommufds(1), {**iommufds(1, 1, mode="process")[1]}]
    given = {"who": "vm", "memlock": "100M", "accounting": "user", **EXACT}
    for its, told in ((both, True), (iommufds(1, 1), False), (None, False)):
        data = info(processes=[unit(iommufds=its, accounting=None)], users=[of_vm(0, 48 * MIB)])
        question = fit(data, **given)["question"]
        assert ("By an iommufd in the mode user they are, by one in the mode process they are not." in question) is told


MEM_LOCK = "-overcommit mem-lock=on"


def test_two_ways_that_fill_one_counter_are_that_counter() -> None:
    """Locked memory alone may be too much, or what is pinned beside it. Both are VmLck."""
    xml = domain(HOSTDEV, arguments=MEM_LOCK).replace("<memory unit='GiB'>1<", "<memory unit='GiB'>4<")
    answer = memlock_fit(idle(host=native()), domain_xml=xml)
    assert (answer["fits"], answer["counter"]) == (False, "mm_locked")
    assert "Charged for itself alone (VmLck, " in answer["reason"]
    assert "-12 (Cannot allocate memory)" in answer["reason"]


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"domain_xml": domain(HOSTDEV, arguments=MEM_LOCK)}, True),
        # Without it, it would fail all the same.
        ({"domain_xml": domain(HOSTDEV, HARD_LIMIT.replace("3", "1").replace("GiB", "MiB"), MEM_LOCK)}, False),
        ({"memory": "64M", "user": "vm", "memlock": "100M", "locked": "64M", "accounting": "process"}, True),
        ({"memory": "64M", "user": "vm", "memlock": "80M", "locked": True, "accounting": "process"}, True),
        # It may lock none.
        ({"memory": "64M", "user": "vm", "memlock": "100M", "accounting": "process"}, False),
        ({"memory": "64M", "user": "vm", "memlock": "60M", "locked": "64M", "accounting": "process"}, False),
    ],
)
def test_not_to_lock_memory_is_a_remedy(given: Row, remedy: bool) -> None:
    answer = memlock_fit(idle(host=native()), **{"overhead": 0, **given})
    assert answer["fits"] is not True
    assert ("have it lock no memory itself (no mem-lock=on, no <locked/>)" in (answer["remedy"] or "")) is remedy


SMMU = "<iommu model='smmuv3'><driver accel='{}'/></iommu>"


@pytest.mark.parametrize(("accel", "fits"), [("on", None), ("off", False)])
def test_a_viommu_that_says_that_it_is_not_nested_is_none_that_may_be(accel: str, fits: bool | None) -> None:
    answer = memlock_fit(idle(host=native()), domain_xml=domain(PLACED * 4 + SMMU.format(accel), HARD_LIMIT))
    assert answer["fits"] is fits
    # What is not known is not told as if it were.
    assert f"The VM pins {'up to ' if fits is None else ''}4 GiB (1 GiB in each of " in answer["reason"]


@pytest.mark.parametrize("device", [MDEV, {**MDEV, "iommufd": "i"}])
def test_an_mdev_pins_up_to_all_memory(device: Row) -> None:
    reason = fit(idle(), who="vm", memlock="100M", devices=[device], **EXACT)["reason"]
    assert "The VM pins up to 64 MiB." in reason
    assert "The VM pins 64 MiB." in fit(idle(), who="vm", memlock="100M", devices=[LEGACY], **EXACT)["reason"]


def test_what_is_left_is_left_for_the_user_whatever_counter_decides() -> None:
    given = {"who": "vm", "memlock": "130M", "accounting": "user", "devices": [BY_IOMMUFD, VDPA]}
    answer = fit(idle(), **given, **EXACT)
    assert (answer["fits"], answer["counter"]) == (True, "mm_pinned")
    assert answer["reason"].endswith(left("66 MiB", "vm"))


@pytest.mark.parametrize("device", [BY_IOMMUFD, LEGACY])
def test_with_the_capability_no_limit_is_checked(device: Row) -> None:
    """A legacy container adds to VmLck all the same."""
    answer = fit(idle(), who="vm", memlock="1M", accounting="none", devices=[device], **EXACT)
    assert answer["reason"] == "The VM pins 64 MiB. With CAP_IPC_LOCK no limit is checked."


@pytest.mark.parametrize("devices", [[LEGACY], [BY_IOMMUFD]])
@pytest.mark.parametrize(("initial", "fits"), [(True, True), (False, False)])
def test_the_file_of_the_hosts_emulator_gives_nothing_in_another_user_namespace(
    devices: list[Row], initial: bool, fits: bool
) -> None:
    runs = unit(**CAPABLE, initial_user_namespace=initial)
    data = info(host=host(qemu=[emulator(True)]), processes=[runs], users=[of_vm()])
    answer = fit(data, who="vm", memlock="32M", devices=devices, **EXACT)
    assert answer["fits"] is fits


@pytest.mark.parametrize(
    ("devices", "arguments", "least"),
    [
        # libvirt's own limit is 2 GiB, 1 GiB of which is for what is beyond the memory.
        ("<shmem name='s'><size unit='M'>1024</size></shmem>", "", 2 * GIB),
        ("<shmem name='s'><model type='ivshmem-plain'/><size unit='G'>2</size></shmem>", "", 3 * GIB),
        ("<shmem name='s'><size unit='M'>512</size></shmem>" * 2, "", 2 * GIB),
        ("<video><model type='qxl' ram='1048576' vram='1048576' vgamem='16384'/></video>", "", 3 * GIB),
        ("<video><model type='vga' vram='1048576'/></video>", "", 2 * GIB),
        ("", "-object memory-backend-ram,id=m,size=1G -device ivshmem-plain,memdev=m", 2 * GIB),
        ("", "-device qxl,ram_size_mb=1024", 2 * GIB),
    ],
)
def test_what_emulated_devices_have_may_be_more_than_what_libvirt_allows_for(
    devices: str, arguments: str, least: int
) -> None:
    xml = domain(HOSTDEV + devices, arguments=arguments)
    answer = memlock_fit(idle(host=native()), domain_xml=xml)
    # libvirt does not count it.
    assert (answer["fits"], answer["limit"]) == (None, 2 * GIB)
    assert answer["question"].startswith("How much does the VM pin beyond its memory? Give overhead.")
    assert "with what its emulated devices have" in answer["reason"]
    assert memlock_fit(idle(host=native()), domain_xml=xml, memlock=least)["fits"] is None
    assert memlock_fit(idle(host=native()), domain_xml=xml, memlock=least + 2 * GIB)["fits"] is True
    assert memlock_fit(idle(host=native()), domain_xml=xml, overhead=least - GIB + 256 * 1024)["fits"] is False


def test_little_of_emulated_devices_is_within_what_libvirt_allows_for() -> None:
    devices = "<shmem name='s'><size unit='M'>512</size></shmem><video><model type='vga' vram='16384'/></video>"
    assert memlock_fit(idle(host=native()), domain_xml=domain(HOSTDEV + devices))["fits"] is True


def test_memory_whose_size_a_server_tells_is_asked_for() -> None:
    xml = domain(HOSTDEV + "<shmem name='s'><model type='ivshmem-doorbell'/><server path='/s'/></shmem>")
    answer = memlock_fit(idle(host=native()), domain_xml=xml)
    assert answer["fits"] is None
    assert answer["question"] == "How much does the VM pin beyond its memory? Give overhead."
    assert "which is not known" in answer["reason"]
    assert memlock_fit(idle(host=native()), domain_xml=xml, overhead="256M")["fits"] is True
    # Where nothing is locked for it, it does not matter.
    assert memlock_fit(idle(host=native()), domain_xml=xml, memlock="unlimited")["fits"] is True


def test_devices_that_libvirt_has_still_to_place_may_share_an_address_space() -> None:
    """It puts devices of conventional PCI behind one bridge, and other ones at ports of their own."""
    limit = "<memtune><hard_limit unit='GiB'>1.9</hard_limit></memtune>".replace("GiB'>1.9", "MiB'>2047")
    for device, fits in ((HOSTDEV, None), (PLACED, False)):
        xml = domain(device * 2 + "<iommu model='intel'/>", limit)
        assert memlock_fit(idle(host=native()), domain_xml=xml, overhead="256K")["fits"] is fits
    # One has its own, wherever it is.
    xml = domain(HOSTDEV + "<iommu model='intel'/>", HARD_LIMIT)
    assert memlock_fit(idle(host=native()), domain_xml=xml, overhead="256K")["fits"] is True


# A VM that has pinned its memory and its firmware, and has a device with memory that its guest has not turned on.
SHARES = {"of_devices_bytes": 256 * MIB, "memlock_bytes": 2 * PINNED}
SECOND = {"devices": [{"backend": "iommufd", "iommufd": "second", "mode": "process"}]}


@pytest.mark.parametrize(
    ("running", "given", "fits"),
    [
        ({}, {"memlock": 2 * PINNED}, None),
        ({}, {"memlock": 2 * (PINNED + 256 * MIB)}, True),
        ({}, {"memlock": 2 * (PINNED + 256 * MIB) - 4096}, None),
        ({}, {"memlock": 2 * PINNED - 4096}, False),
        ({}, {"memlock": 2 * (PINNED + 256 * MIB), "overhead": PINNED + 192 * MIB}, True),
        ({}, {"memlock": 2 * (PINNED + 256 * MIB) - 4096, "overhead": PINNED + 192 * MIB}, False),
        # Firmware may have as much as a small device.
        ({"of_devices_bytes": MIB, "pinned_bytes": 65 * MIB}, {"memlock": 130 * MIB}, None),
        ({"of_devices_bytes": MIB, "pinned_bytes": 65 * MIB}, {"memlock": 132 * MIB}, True),
        ({"of_devices_bytes": 0}, {"memlock": 2 * PINNED}, True),
        ({"of_devices_bytes": None}, {"memlock": "100G"}, None),
        ({"of_devices_bytes": None}, {"memlock": 2 * PINNED, "overhead": PINNED - 64 * MIB}, True),
        # It is turned on.
        ({"pinned_bytes": PINNED + 16 * MIB, "of_devices_bytes": 16 * MIB}, {"memlock": 2 * PINNED + 32 * MIB}, True),
    ],
)
def test_what_a_running_vm_may_still_have_pinned(running: Row, given: Row, fits: bool | None) -> None:
    its = process(domain=None, domain_uri=None, iommufds=iommufds(1, mode="process"), **{**SHARES, **running})
    its["locked_bytes"] = its["pinned_bytes"]
    answer = memlock_fit(
        info(processes=[its]), grow={"vm": "vm1", **SECOND}, **{"viommu": "none", "locked": 0, **given}
    )
    assert answer["fits"] is fits
    if fits is None:
        assert answer["question"].startswith("How much does the VM pin beyond its memory? Give overhead.")


def test_memory_that_a_guest_shares_explains_what_is_pinned() -> None:
    """Once it is said how much memory the VM has: it may have been plugged as well."""
    its = process(memory_pluggable=True, of_devices_bytes=128 * MIB, pinned_bytes=PINNED + 128 * MIB)
    data = info(processes=[its], users=[user(charged_bytes=PINNED + 128 * MIB)])
    given = {"grow": {"vm": "vm1", "memory": "32M"}, "locked": 0}
    limit = PINNED + (128 + 32) * MIB
    asked = memlock_fit(data, **given, memlock=limit)
    assert (asked["fits"], asked["question"].split("?")[0]) == (None, "How much memory has the VM now")
    assert memlock_fit(data, **given, memlock=limit, memory="64M")["fits"] is True
    assert memlock_fit(data, **given, memlock=limit - 4096, memory="64M")["fits"] is False
    # If it was plugged, what the guest shares may still come.
    assert memlock_fit(data, **given, memlock=limit, memory="192M")["fits"] is None
    assert memlock_fit(data, **given, memlock=limit + 128 * MIB, memory="192M")["fits"] is True
    # What is served by another process has any size.
    its["of_devices_bytes"] = None
    asked = memlock_fit(data, **given, memlock=limit)
    assert asked["question"] == "How much does the VM pin beyond its memory? Give overhead."
    settled = memlock_fit(data, **given, memlock=limit, memory="64M", overhead=128 * MIB + 256 * 1024)
    assert settled["fits"] is True
