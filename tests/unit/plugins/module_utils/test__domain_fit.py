# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import time

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import (
    EACH,
    IOMMUFD,
    LEGACY,
    NO_VIOMMU,
    PROCESS,
    USER,
    VDPA,
    Device,
)
from ansible_collections.virt.iommufd.plugins.module_utils._domain_fit import Start, refusal
from ansible_collections.virt.iommufd.plugins.module_utils._domain_xml import CONTAINER, LIBVIRTS, Defined

GIB = 2**30

GIVEN = Device(IOMMUFD, LIBVIRTS)
LEG = Device(LEGACY, CONTAINER)
NVME = Device(LEGACY, "nvme 0")
MDEV = LEG._replace(as_it_runs=True)
V = Device(VDPA)


def vm(*devices: Device, memory: int = 4 * GIB, **changes: object) -> Defined:
    """A domain of whose memory libvirt counts what it counts for these devices."""
    passed = min(sum(each in (GIVEN, LEG, MDEV) for each in devices), 1)
    others = sum(each in (NVME, V) for each in devices)
    found = Defined("vm1", memory, devices, NO_VIOMMU, passed + others, None, False, False, None, "g", None)
    return found._replace(**changes)  # type: ignore[arg-type]


PROC, PER_USER = Start(PROCESS, False, 0, 4096), Start(USER, False, 0, 4096)
CAPABLE, PERHAPS = PROC._replace(capable=True), PROC._replace(capable=None)

# A domain with 4 GiB, how it is started, and what is said: how often its memory counts where, and the cures
IOMMUFD_CURE = "pass all of its PCI devices through by iommufd (without <driver iommufd='no'/>)"
USER_CURE = "start it with rlimit_mode=user"
LOCK_CURE = "have QEMU lock no memory itself (no mem-lock=on, no <locked/>)"
BOTH = "counts twice in VmLck, for an iommufd that charges per process and VFIO's legacy container."
CASES = [
    (vm(GIVEN), PROC, None, ()),
    (vm(GIVEN), PER_USER, None, ()),
    (vm(GIVEN, GIVEN), PROC, None, ()),
    # By iommufd and by the legacy container: twice, in the mode process alone
    (vm(GIVEN, LEG), PROC, BOTH, (IOMMUFD_CURE, USER_CURE)),
    (vm(GIVEN, LEG), PER_USER, None, ()),
    (vm(GIVEN, LEG), CAPABLE, None, ()),
    (vm(GIVEN, LEG), PERHAPS, None, ()),
    # 1 GiB fits twice into its 2 GiB, if nothing but that is pinned
    (vm(GIVEN, LEG, memory=GIB), PROC, None, ()),
    (vm(GIVEN, LEG, memory=GIB + 4096), PROC, BOTH, (IOMMUFD_CURE, USER_CURE)),
    # What libvirt counts fits: vDPA once for each device, and each disk
    (vm(GIVEN, V), PROC._replace(pinning_vdpa=1), None, ()),
    (vm(GIVEN, V, V), PER_USER._replace(pinning_vdpa=2), None, ()),
    (vm(GIVEN, NVME), PROC, None, ()),
    # libvirt counts the container with the iommufd, and the two others beside
    (
        vm(GIVEN, LEG, NVME),
        PROC,
        "counts 3 times in VmLck, for an iommufd that charges per process, VFIO's legacy container and a disk by nvme",
        (IOMMUFD_CURE, USER_CURE),
    ),
    (vm(GIVEN, LEG, V), PROC._replace(pinning_vdpa=1), None, ()),
    # <locked/> is no limit, and a hard limit goes before that
    (vm(GIVEN, LEG, locked=True), PROC, None, ()),
    (
        vm(GIVEN, locked=True, hard_limit=5 * GIB),
        PROC,
        "counts twice in VmLck, for memory that QEMU locks itself and an iommufd that charges per process.",
        (LOCK_CURE, USER_CURE),
    ),
    # Without it, it would not fit all the same.
    (vm(GIVEN, locked=True, hard_limit=3 * GIB), PROC, "counts twice in VmLck, for memory that QEMU locks itself", ()),
    # Memory that QEMU locks for a reason that libvirt does not know
    (
        vm(GIVEN, mem_lock=True),
        PROC,
        "counts twice in VmLck, for memory that QEMU locks itself and",
        (LOCK_CURE, USER_CURE),
    ),
    (vm(GIVEN, mem_lock=True), PER_USER, None, ()),
    (vm(GIVEN, mem_lock=None), PROC, None, ()),
    # A hard limit that is too small for once
    (vm(GIVEN, hard_limit=4 * GIB - 4096), PROC, "counts once in VmLck, for an iommufd that charges per process.", ()),
    (
        vm(GIVEN, hard_limit=4 * GIB - 4096),
        PER_USER,
        "counts once in what its user is charged, for an iommufd that charges per user.",
        (),
    ),
    (vm(GIVEN, hard_limit=4 * GIB), PER_USER, None, ()),
    # vDPA and the iommufd share VmPin, in each mode and with each capability, which lifts what else is checked
    *(
        (
            vm(GIVEN, V, hard_limit=3 * GIB),
            start._replace(pinning_vdpa=1),
            f"counts twice in VmPin, for an iommufd that charges per {start.mode} and a vDPA device.",
            (),
        )
        for start in (CAPABLE, PER_USER._replace(capable=True))
    ),
    *(
        (vm(GIVEN, V, hard_limit=3 * GIB), start._replace(pinning_vdpa=1), "counts twice in what the kernel checks", ())
        for start in (PROC, PER_USER, PERHAPS)
    ),
    *(
        (
            vm(GIVEN, V, V, hard_limit=7 * GIB),
            start._replace(pinning_vdpa=2),
            "counts 3 times in VmPin, for an iomm",
            (),
        )
        for start in (PROC, PER_USER, CAPABLE, PERHAPS)
    ),
    (vm(GIVEN, V, hard_limit=8 * GIB), PROC._replace(pinning_vdpa=1), None, ()),
    # If it is the first to pin, what comes next is compared with another counter. If it is the last, it fails.
    (vm(GIVEN, V, hard_limit=6 * GIB), PROC._replace(pinning_vdpa=1), None, ()),
    # One that may work with virtual addresses
    (vm(GIVEN, V, V, hard_limit=7 * GIB), PROC, None, ()),
    # Behind a vIOMMU each device has its own
    (vm(GIVEN, GIVEN, viommu=EACH, counted=2), PROC, None, ()),
    (
        vm(GIVEN, GIVEN, GIVEN, viommu=EACH, hard_limit=9 * GIB),
        PROC,
        "counts 3 times in VmLck, for an iommufd that charges per process (3 times).",
        (),
    ),
    # It is not known whether it has one, or a nested one
    (vm(GIVEN, GIVEN, GIVEN, viommu=None, hard_limit=9 * GIB), PROC, None, ()),
    # What pins later does not keep it from starting
    (vm(GIVEN, MDEV), PROC, None, ()),
    # What may not be plugged, or mapped
    (vm(GIVEN, LEG, elastic=3 * GIB), PROC, None, ()),
    (vm(GIVEN, LEG, elastic=4 * GIB), PROC, None, ()),
    (vm(GIVEN, LEG, memory=8 * GIB, elastic=GIB), PROC, BOTH, (IOMMUFD_CURE, USER_CURE)),
    # An iommufd of QEMU's own: with a known mode, and with one that somebody else may set
    (vm(GIVEN, Device(IOMMUFD, "a", PROCESS)), PROC, "counts twice in VmLck, for an iommufd that ch", (USER_CURE,)),
    (vm(GIVEN, Device(IOMMUFD, "a", None)), PROC, None, ()),
    (vm(GIVEN, Device(IOMMUFD, "a", USER)), PROC, None, ()),
    # Nothing is known of what libvirt reckons, or it sets no limit
    (vm(GIVEN, LEG, counted=None), PROC, None, ()),
    (vm(GIVEN, LEG, counted=0), PROC, None, ()),
]


@pytest.mark.parametrize(("defined", "start", "words", "cures"), CASES)
def test_what_is_refused(defined: Defined, start: Start, words: str | None, cures: tuple[str, ...]) -> None:
    found = refusal(defined, start)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert words in found.reason
        assert found.cures == cures


@pytest.mark.parametrize(("defined", "start", "words", "cures"), [case for case in CASES if case[2]])
def test_the_limit_that_is_named_would_do(
    defined: Defined, start: Start, words: str | None, cures: tuple[str, ...]
) -> None:
    found = refusal(defined, start)
    assert found is not None
    if found.enough is None:
        # What QEMU locks beside the memory is not known, so no limit is sure to do but none.
        assert defined.locked or defined.mem_lock
        assert refusal(defined._replace(hard_limit=None, locked=True), start) is None
        return
    assert refusal(defined._replace(hard_limit=found.enough), start) is None
    assert refusal(defined._replace(hard_limit=found.enough - GIB), start) is None
    if V not in defined.devices:
        assert refusal(defined._replace(hard_limit=found.enough - GIB - 4096), start) is not None


def test_all_that_it_says() -> None:
    found = refusal(vm(GIVEN, V, hard_limit=3 * GIB), CAPABLE._replace(pinning_vdpa=1))
    assert found is not None
    assert found.reason == (
        "its memory of 4 GiB counts twice in VmPin, for an iommufd that charges per process and a vDPA device. That"
        " takes up to 8 GiB, and its limit on locked memory is 3 GiB. For a vDPA device that is checked in every mode"
        " and with every capability."
    )
    assert found.enough == 9 * GIB


def test_it_takes_no_time() -> None:
    began = time.monotonic()
    devices = (GIVEN, *(Device(IOMMUFD, str(each), PROCESS) for each in range(120)), *[NVME] * 60, *[V] * 75)
    refusal(vm(*devices, viommu=EACH), PERHAPS._replace(pinning_vdpa=75))
    assert time.monotonic() - began < 20
