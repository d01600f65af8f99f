# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.plugin_utils._remedy import remedy_of, verdict_of

MIB = 2**20
SYSTEM, SESSION = "qemu:///system", "qemu:///session"

Row = dict[str, Any]


def vm(*modes: str | None, settable: bool = False, **fields: Any) -> Row:
    """A VM of 64 MiB within 100 MiB, whose iommufds have these modes."""
    return {
        "uid": 1001,
        "user": "vm",
        "domain_uri": None,
        "unit": "vm1.service",
        "user_unit": None,
        "initial_user_namespace": True,
        "memory_bytes": 64 * MIB,
        "memory_pluggable": False,
        "of_devices_bytes": 0,
        "locks_memory": False,
        "backends": ["iommufd"],
        "iommufds": [{"rlimit_mode": mode, "settable": settable} for mode in modes or ("user",)],
        "vfio_devices": [{"as_it_runs": False}],
        "address_spaces": 1,
        "pinned_bytes": 64 * MIB,
        "locked_bytes": 0,
        "memlock_bytes": 100 * MIB,
        "memlock_unlimited": False,
        "accounting": "user",
        "counter": "user",
        "counters": [{"counter": "user"}],
        "headroom_bytes": 36 * MIB,
        **fields,
    }


def locked(**fields: Any) -> Row:
    """One whose own counter VmLck holds more than its limit."""
    given = {"accounting": "process", "counter": "mm_locked", "counters": [{"counter": "mm_locked"}]}
    return vm("process", **{**given, "headroom_bytes": -MIB, **fields})


def user(at_risk: bool | None = True, uncertain: int = 0) -> Row:
    return {"uid": 1001, "at_risk": at_risk, "uncertain_bytes": uncertain}


def remedy(process: Row, of_user: Row | None = None, grows: bool = False, **libvirt: Any) -> str:
    return remedy_of(verdict_of(process, of_user, grows), process, of_user, libvirt)


# A libvirt that knows iommufd and sets the mode, and whose daemon may not.
BARRED: Row = {
    "unit": "libvirtd.service",
    "supports_iommufd": True,
    "sets_rlimit_mode": False,
    "starts_iommufd_domains": False,
    "cap_sys_resource": False,
    "drop_in": ["CapabilityBoundingSet=CAP_SYS_RESOURCE"],
}
GIVE = (
    "Give libvirtd.service CAP_SYS_RESOURCE: put the lines '[Service]', 'CapabilityBoundingSet=CAP_SYS_RESOURCE' into"
    " /etc/systemd/system/libvirtd.service.d/zz-sys-resource.conf, whose name has it read last; then run systemctl"
    " daemon-reload, and restart libvirtd.service, while VMs go on running; then "
)
LET = (
    "Let libvirt's daemon use CAP_SYS_RESOURCE: restart it if it is older than what its unit says now, and allow that"
    " where SELinux denies it; then "
)


@pytest.mark.parametrize(
    ("process", "of_user", "verdict"),
    [
        pytest.param(vm(), user(), "at risk", id="the user"),
        pytest.param(
            vm(counter="mm_pinned", counters=[{"counter": "user"}, {"counter": "mm_pinned"}], accounting="process"),
            user(),
            "at risk",
            id="the user, though another counter is full first",
        ),
        pytest.param(vm(), None, "ok", id="without users"),
        pytest.param(locked(headroom_bytes=MIB), user(), "ok", id="another user's"),
        pytest.param(vm(headroom_bytes=-1), user(), "over limit", id="over the user's"),
        pytest.param(vm(headroom_bytes=-1, pinned_bytes=0), user(False), "ok", id="who has pinned nothing"),
        pytest.param(vm(headroom_bytes=-1, pinned_bytes=0), user(None), "unknown", id="who may keep something"),
        pytest.param(vm(accounting=None, counter=None, counters=[], headroom_bytes=-1), None, "over limit", id="over"),
        pytest.param(locked(counter=None, headroom_bytes=None), None, "unknown", id="a counter that is not known"),
        pytest.param(locked(headroom_bytes=None, memlock_unlimited=True), None, "not limited", id="unlimited"),
        pytest.param(locked(headroom_bytes=None, accounting="none"), None, "not limited", id="the capability"),
    ],
)
def test_the_verdict(process: Row, of_user: Row | None, verdict: str) -> None:
    assert verdict_of(process, of_user) == verdict


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        pytest.param({}, 128 * MIB, id="it pins nothing so far"),
        pytest.param({"pinned_bytes": 128 * MIB, "memlock_bytes": 130 * MIB}, None, id="it has pinned"),
        pytest.param({"memlock_bytes": 128 * MIB}, None, id="there is room for it"),
        pytest.param({"memlock_bytes": 128 * MIB - 1}, 128 * MIB, id="a byte short"),
        pytest.param({"backends": ["iommufd"]}, None, id="no vDPA"),
        pytest.param({"backends": ["legacy", "vdpa"], "legacy_containers": [{}], "pinned_bytes": 0}, None, id="VmLck"),
        pytest.param({"memory_bytes": None}, None, id="memory that is not known"),
    ],
)
@pytest.mark.parametrize("mode", ["user", "process"])
def test_a_vdpa_device_that_its_guest_has_not_turned_on(mode: str, fields: Row, needs: int | None) -> None:
    """As with QEMU 10, which says vhost vdpa map fail! by then, and goes on."""
    row = vm(mode, **{"accounting": mode, "backends": ["iommufd", "vdpa"], "address_spaces": 2, **fields})
    row["counters"] = [{"counter": "user" if mode == "user" else "mm_locked"}, {"counter": "mm_pinned"}]
    assert verdict_of(row, user(False)) == ("may fail later" if needs else "ok")
    told = remedy(row, user(False))
    assert told.startswith("It fits now, and its vDPA device may fail once its guest turns" if needs else "")
    assert (f": raise its RLIMIT_MEMLOCK to {needs} bytes" in told) == bool(told) == bool(needs)


@pytest.mark.parametrize(
    ("process", "libvirt", "expected"),
    [
        pytest.param(vm(), {}, "At its next start put iommufd-exec in front of its VMM, which must", id="unit"),
        pytest.param(vm(settable=True), {}, "Set the rlimit mode process by the module iommufd_option", id="now"),
        pytest.param(vm("user", "process", settable=True), {}, "Set the rlimit mode process by the", id="one of two"),
        pytest.param(vm(iommufds=None), {}, "At its next start put iommufd-exec in", id="iommufds not seen"),
        pytest.param(
            vm(initial_user_namespace=False),
            {},
            "At its next start give it an iommufd on which a process of the host with CAP_SYS_RESOURCE",
            id="container",
        ),
        pytest.param(
            vm(domain_uri=SYSTEM),
            {"sets_rlimit_mode": True, "cap_sys_resource": True},
            "At its next start have libvirt set the rlimit mode: name iommufd by <driver name='vfio' iommufd='yes'/>",
            id="libvirt",
        ),
        *(
            pytest.param(
                vm(domain_uri=SYSTEM),
                {"sets_rlimit_mode": sets, "cap_sys_resource": may},
                "Have a libvirt of 12.1 or later whose daemon has CAP_SYS_RESOURCE set the rlimit mode, or the role",
                id=f"libvirt, {sets}, {may}",
            )
            # With a capability or without one: this libvirt knows nothing of iommufd, and starts what QEMU opens.
            for sets, may in ((False, True), (False, None), (False, False))
        ),
        *(
            pytest.param(
                vm(domain_uri=SYSTEM),
                libvirt,
                "Have libvirt set the rlimit mode; whether it can here is unknown, and host.libvirt.reason of",
                id=f"libvirt, {libvirt}",
            )
            for libvirt in (
                {},
                {"sets_rlimit_mode": True},
                {"sets_rlimit_mode": None, "cap_sys_resource": True},
                # It may be one that sets the mode and may not, of which the capability of QEMU is no cure.
                {"sets_rlimit_mode": None, "cap_sys_resource": False, "supports_iommufd": None},
            )
        ),
        pytest.param(
            vm(domain_uri=SESSION), {}, "At its next start use the module iommufd_domain, which", id="session"
        ),
    ],
)
def test_how_a_vm_is_charged_for_itself(process: Row, libvirt: Row, expected: str) -> None:
    told = remedy(process, user(), **libvirt)
    assert told.startswith(expected)
    assert told.endswith(".")
    assert "prlimit" not in told
    over = remedy({**process, "headroom_bytes": -1}, user(), **libvirt)
    assert over == f"{told[:-1]}; until then, prlimit raises its limit at once."


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        pytest.param(36 * MIB, "At its next start put iommufd-exec", id="just enough"),
        pytest.param(
            36 * MIB + 4096,
            "Raise its RLIMIT_MEMLOCK to 104861696 bytes or more, by LimitMEMLOCK= of vm1.service, unless what runs"
            " there sets it, as iommufd-exec --memlock does; then at its next start put iommufd-exec",
            id="a page more",
        ),
    ],
)
def test_its_limit_must_hold_what_it_locks_too(amount: int, expected: str) -> None:
    """Charged for itself, it has all of that in VmLck: what it locks by mlock, or has in the legacy container."""
    assert remedy(vm(locked_bytes=amount), user()).startswith(expected)
    unlimited = vm(locked_bytes=amount, memlock_bytes=None, memlock_unlimited=True)
    assert remedy(unlimited, user()).startswith("At its next start put iommufd-exec")


def test_its_limit_must_hold_what_qemu_locks_for_a_moment_as_it_starts() -> None:
    locks = vm(locked_bytes=8 * MIB, locks_memory=True)
    least = locks["pinned_bytes"] + 136 * MIB
    assert remedy(locks, user()).startswith(f"Raise its RLIMIT_MEMLOCK to {least} bytes or more, by ")
    enough = {**locks, "memlock_bytes": least, "headroom_bytes": least}
    assert remedy(enough, user()).startswith("At its next start put iommufd-exec")
    # A display of 256 MiB
    large = {**locks, "pinned_bytes": 320 * MIB}
    assert remedy(large, user()).startswith(f"Raise its RLIMIT_MEMLOCK to {(320 + 8 + 256 + 2) * MIB} bytes or more")


RAISE = "Raise its RLIMIT_MEMLOCK to 105906176 bytes or more, "


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        pytest.param(
            {"domain_uri": SYSTEM},
            # 1 GiB more than is charged: that is what is left to the emulator.
            "by <memtune><hard_limit unit='KiB'>1152000</hard_limit></memtune> in the domain, 1 GiB of it for the"
            " emulator's own memory, since it limits all memory of the VM, too",
            id="system",
        ),
        pytest.param(
            {"domain_uri": SYSTEM, "memory_bytes": 512 * MIB},
            "by <memtune><hard_limit unit='KiB'>1572864</hard_limit></memtune> in the domain, 1 GiB of it for the"
            " emulator's own memory, since it limits all memory of the VM, too",
            id="system, and not all of the guest's memory is charged",
        ),
        pytest.param(
            {"domain_uri": SYSTEM, "memory_bytes": None},
            "by <memtune><hard_limit unit='KiB'>1152000</hard_limit></memtune> in the domain, 1 GiB of it for the"
            " emulator's own memory, since it limits all memory of the VM, too",
            id="system, memory that is not known",
        ),
        pytest.param({"domain_uri": SESSION}, "by LimitMEMLOCK= of user@1001.service", id="session"),
        pytest.param(
            {"user_unit": "vm.service", "unit": "user@1001.service"},
            "by LimitMEMLOCK= of vm.service and, where that has less, of user@1001.service",
            id="unit of a user",
        ),
        pytest.param(
            {},
            "by LimitMEMLOCK= of vm1.service, unless what runs there sets it, as iommufd-exec --memlock does",
            id="unit",
        ),
        pytest.param({"unit": "100.scope"}, "where it is started", id="scope, which has no limits"),
        pytest.param(
            {"user_unit": "a.scope", "unit": "user@1001.service"}, "where it is started", id="scope of a user"
        ),
        pytest.param({"unit": None}, "where it is started", id="nothing"),
    ],
)
def test_where_the_limit_is_raised(fields: Row, where: str) -> None:
    assert remedy(locked(**fields)) == f"{RAISE}{where}; prlimit does that at once."


@pytest.mark.parametrize("drop_in", [BARRED["drop_in"], []])
def test_a_daemon_that_may_not(drop_in: list[str]) -> None:
    """It starts no domain with iommufd and raises no limit, whatever its QEMU has, before it has CAP_SYS_RESOURCE."""
    libvirt = {**BARRED, "drop_in": drop_in}
    first = GIVE if drop_in else LET
    domain = vm(domain_uri=SYSTEM)
    assert remedy(domain, user(), **libvirt).startswith(f"{first}at its next start have libvirt set the rlimit mode")
    limited = remedy(locked(domain_uri=SYSTEM), **libvirt)
    assert limited.startswith(f"{first}raise its RLIMIT_MEMLOCK to 105906176 bytes or more, by <memtune><hard_limit")
    both = remedy(vm(domain_uri=SYSTEM, locked_bytes=64 * MIB), user(), **libvirt)
    assert both.startswith(f"{first}raise its RLIMIT_MEMLOCK to 134217728 bytes or more, by <memtune><hard_limit")
    assert both.count("CAP_SYS_RESOURCE: ") == 1
    assert "; then at its next start have libvirt set the rlimit mode: " in both
    for told in (remedy(domain, user(), **libvirt), limited, both):
        assert "CAP_IPC_LOCK" not in told
    # Any version of libvirt raises limits by it, and none does for what is no domain of it.
    older = {**libvirt, "supports_iommufd": False}
    assert remedy(locked(domain_uri=SYSTEM), **older) == limited
    assert remedy(domain, user(), **older).startswith("Have a libvirt of 12.1 or later")
    for uri in (None, SESSION):
        assert remedy(locked(domain_uri=uri), **libvirt) == remedy(locked(domain_uri=uri))
        assert remedy(vm(domain_uri=uri), user(), **libvirt) == remedy(vm(domain_uri=uri), user())
    settable = vm(domain_uri=SYSTEM, settable=True)
    assert remedy(settable, user(), **libvirt).startswith("Set the rlimit mode process by the module iommufd_option")


def mdev(*runs: bool | None, **fields: Any) -> Row:
    """One that is charged for itself, with devices of which some pin as it runs, and nearly nothing pinned yet."""
    devices = [{"as_it_runs": each} for each in runs]
    return locked(**{"vfio_devices": devices, "memory_bytes": 128 * MIB, "headroom_bytes": 99 * MIB, **fields})


@pytest.mark.parametrize(
    ("process", "verdict"),
    [
        pytest.param(mdev(True), "may fail later", id="an mdev"),
        pytest.param(mdev(None), "may fail later", id="it may be one"),
        pytest.param(mdev(False), "ok", id="a device"),
        pytest.param(mdev(True, False), "ok", id="a device has all memory pinned"),
        pytest.param(mdev(True, False, address_spaces=2), "may fail later", id="in another address space"),
        pytest.param(mdev(True, False, address_spaces=None), "may fail later", id="in how many is not known"),
        pytest.param(mdev(True, memory_bytes=100 * MIB), "ok", id="the limit holds all of it"),
        pytest.param(mdev(True, memory_bytes=None), "may fail later", id="how much is not known"),
        pytest.param(
            mdev(True, memory_bytes=100 * MIB, memory_pluggable=True), "may fail later", id="it may have more by now"
        ),
        pytest.param(mdev(True, memory_bytes=50 * MIB, locks_memory=True), "ok", id="and what it locks"),
        pytest.param(mdev(True, memory_bytes=51 * MIB, locks_memory=None), "may fail later", id="it may lock it"),
        pytest.param(mdev(True, headroom_bytes=-1), "over limit", id="over limit"),
        pytest.param(mdev(True, headroom_bytes=None, memlock_unlimited=True), "not limited", id="unlimited"),
        pytest.param(mdev(True, headroom_bytes=None, accounting="none"), "not limited", id="the capability"),
        pytest.param(mdev(True, headroom_bytes=None, accounting=None), "unknown", id="unknown"),
        pytest.param(mdev(True, vfio_devices=None), "ok", id="not seen, which limits_of_view tells"),
    ],
)
def test_what_may_fail_later(process: Row, verdict: str) -> None:
    assert verdict_of(process, None) == verdict


@pytest.mark.parametrize(
    ("of_user", "grows", "verdict"),
    [
        pytest.param(user(None), True, "may fail later", id="one of the user pins as it runs"),
        pytest.param(user(None, uncertain=4096), True, "unknown", id="and something is uncertain"),
        pytest.param(user(None), False, "unknown", id="none does"),
        pytest.param(user(True), True, "at risk", id="no other fits even now"),
        pytest.param(user(False), True, "ok", id="which the user's row knows to be no risk"),
        pytest.param(None, True, "may fail later", id="without users"),
    ],
)
def test_what_may_fail_later_for_a_user(of_user: Row | None, grows: bool, verdict: str) -> None:
    assert verdict_of(vm(), of_user, grows) == verdict


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        pytest.param(
            mdev(True, unit=None),
            "it may pin more as it runs, as with an mdev: raise its RLIMIT_MEMLOCK to 134217728 bytes or more, where it"
            " is started; prlimit does that at once.",
            id="its own",
        ),
        pytest.param(
            mdev(True, memory_bytes=None),
            "it may pin more as it runs, as with an mdev: raise its RLIMIT_MEMLOCK to all memory of its guest, once for"
            " each address space; prlimit does that at once.",
            id="not known",
        ),
        pytest.param(
            vm(),
            "a VM of its user may pin more as it runs, as with an mdev: at its next start put iommufd-exec in front of"
            " its VMM, which must take a descriptor, and is then charged for itself.",
            id="the user's",
        ),
        pytest.param(
            vm(vfio_devices=[{"as_it_runs": True}], memory_bytes=128 * MIB, unit=None),
            "a VM of its user may pin more as it runs, as with an mdev: raise its RLIMIT_MEMLOCK to 134217728 bytes or"
            " more, where it is started; then at its next start put iommufd-exec in front of its VMM, which must take a"
            " descriptor, and is then charged for itself.",
            id="the user's, and it is the one",
        ),
    ],
)
def test_what_to_do_before_it_fails(process: Row, expected: str) -> None:
    assert remedy(process, user(None), grows=True) == f"It fits now, and may fail later, since {expected}"


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        pytest.param({"backends": ["legacy"]}, ".", id="legacy"),
        pytest.param({"backends": None}, ".", id="not seen"),
        pytest.param(
            {"backends": ["iommufd", "legacy"]},
            ", or give all its devices one iommufd, which pins the memory once unless the VM has an IOMMU of its own.",
            id="both",
        ),
        pytest.param({"backends": ["legacy", "vdpa"]}, ".", id="vDPA, which no iommufd has"),
        pytest.param(
            {"backends": ["iommufd", "legacy", "vdpa"], "counter": "mm_pinned"},
            ": for vDPA, neither the rlimit mode nor CAP_IPC_LOCK helps.",
            id="vDPA",
        ),
    ],
)
def test_what_helps_beside_the_limit(fields: Row, more: str) -> None:
    assert remedy(locked(unit=None, **fields)) == f"{RAISE}where it is started; prlimit does that at once{more}"


ROOT = "To know, audit as root on the host itself, "


@pytest.mark.parametrize(
    ("process", "of_user", "expected"),
    [
        pytest.param(
            vm(),
            user(None, uncertain=24 * MIB),
            "To know, find out whether user vm is charged for 24 MiB that its other processes have pinned.",
            id="pinned by others",
        ),
        pytest.param(vm(user=None), user(None, uncertain=1), "To know, find out whether user 1001 is", id="no name"),
        pytest.param(vm(), user(None), ROOT, id="others not seen"),
        pytest.param(vm(accounting=None, headroom_bytes=None, iommufds=None), None, ROOT, id="descriptors"),
        pytest.param(vm(accounting=None, headroom_bytes=None, initial_user_namespace=None), None, ROOT, id="namespace"),
        pytest.param(
            vm("user", "process", accounting=None, headroom_bytes=None),
            None,
            "To know, give all its devices one iommufd: ",
            id="two modes",
        ),
        pytest.param(vm(None, accounting=None, headroom_bytes=None), None, "To know, see the notes on it", id="a mode"),
    ],
)
def test_what_settles_the_unknown(process: Row, of_user: Row | None, expected: str) -> None:
    told = remedy(process, of_user)
    assert told.startswith(expected)
    assert told.endswith(".")


@pytest.mark.parametrize("process", [vm(), locked(headroom_bytes=0), vm(accounting="none", headroom_bytes=None)])
def test_nothing_to_do(process: Row) -> None:
    assert remedy(process, user(False)) == ""
