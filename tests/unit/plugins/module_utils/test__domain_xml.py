# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is read in a domain's XML, which somebody else has written."""

from __future__ import annotations

import time

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._accounting import (
    EACH,
    IOMMUFD,
    LEGACY,
    NO_VIOMMU,
    UNLIMITED,
    USER,
    VDPA,
    Device,
)
from ansible_collections.virt.iommufd.plugins.module_utils._domain_xml import (
    CONTAINER,
    LIBVIRTS,
    Defined,
    parse_domain,
    properties,
    reckoned_limit,
)
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError

MIB, GIB = 2**20, 2**30

HOSTDEV = "<hostdev mode='subsystem' type='pci'><source/></hostdev>"
BY_IOMMUFD = "<hostdev mode='subsystem' type='pci'><driver name='vfio' iommufd='yes'/><source/></hostdev>"
MDEV = "<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source/></hostdev>"
USB = "<hostdev mode='subsystem' type='usb'/>"
VF = "<interface type='hostdev'/>"
VDPA_NET = "<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>"
VDPA_DISK = "<disk type='vhostvdpa'/>"
NVME = "<disk type='nvme'><source type='pci'/></disk>"
BACKED = "<disk type='file'><backingStore type='nvme'><source type='pci'/></backingStore></disk>"

CHAIN = "<disk type='nvme'><source type='pci'/><backingStore type='nvme'><source type='pci'/></backingStore></disk>"
VDPA_CHAIN = "<disk type='vhostvdpa'><backingStore type='vhostvdpa'/></disk>"

SHARED = Device(LEGACY, CONTAINER)
GIVEN = Device(IOMMUFD, LIBVIRTS)


def domain(devices: str = "", top: str = "", arguments: str = "", memory: str = "<memory unit='GiB'>1</memory>") -> str:
    """A domain's XML; the arguments for QEMU, apart by blanks."""
    words = "".join(f"<qemu:arg value='{each}'/>" for each in arguments.split())
    return (
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>vm1</name>"
        f"{memory}{top}<os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"<devices>{devices}</devices><qemu:commandline>{words}</qemu:commandline></domain>"
    )


def read(*given: str, **other: str) -> Defined:
    return parse_domain(domain(*given, **other))


def test_all_that_is_read() -> None:
    top = (
        "<memtune><hard_limit unit='MiB'>3072</hard_limit></memtune><memoryBacking><locked/></memoryBacking>"
        "<iommufd enabled='yes' fdgroup='vm1'/>"
        "<seclabel type='static' model='dac'><label>+64055:+64055</label></seclabel>"
    )
    found = read(f"<emulator>/usr/libexec/qemu-kvm</emulator>{HOSTDEV}<iommu model='intel'/>", top)
    program = "/usr/libexec/qemu-kvm"
    assert found == Defined("vm1", GIB, (GIVEN,), EACH, 1, 3 * GIB, True, False, "64055", "vm1", program)
    assert read() == Defined("vm1", GIB, (), NO_VIOMMU, 0, None, False, False, None, None, None)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("<memory>1048576</memory>", GIB),
        ("<memory unit='KiB'>1048576</memory>", GIB),
        ("<memory unit='bytes'>1048576</memory>", MIB),
        ("<memory unit='b'>1048576</memory>", MIB),
        # libvirt rounds it up.
        ("<memory unit='MB'>1</memory>", MIB),
        ("<memory unit='KiB'>65537</memory>", 65 * MIB),
        ("<memory unit='M'> 64 </memory>", 64 * MIB),
    ],
)
def test_memory(memory: str, expected: int) -> None:
    assert read(memory=memory).memory == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("<hard_limit unit='GiB'>2</hard_limit>", 2 * GIB),
        ("<hard_limit>1024</hard_limit>", MIB),
        ("<hard_limit unit='KiB'>9007199254740991</hard_limit>", None),
        ("<hard_limit>-1</hard_limit>", None),
        ("<soft_limit>1024</soft_limit>", None),
    ],
)
def test_hard_limit(limit: str, expected: int | None) -> None:
    assert read(top=f"<memtune>{limit}</memtune>").hard_limit == expected


# Devices, those that pin, and how many times libvirt counts the memory for them
DEVICES = [
    (HOSTDEV, [SHARED], 1),
    (HOSTDEV * 3, [SHARED] * 3, 1),
    (HOSTDEV * 3 + "<iommu model='intel'/>", [SHARED] * 3, 3),
    (BY_IOMMUFD, [GIVEN], 1),
    (BY_IOMMUFD + HOSTDEV, [GIVEN, SHARED], 1),
    (VF, [SHARED], 1),
    (MDEV, [SHARED._replace(as_it_runs=True)], 1),
    (USB + "<interface type='network'/>", [], 0),
    (VDPA_NET, [Device(VDPA)], 1),
    (VDPA_NET * 3, [Device(VDPA)] * 3, 3),
    (VDPA_DISK, [Device(VDPA)], 1),
    (NVME, [Device(LEGACY, "nvme 0")], 1),
    (BACKED + NVME, [Device(LEGACY, "nvme 0"), Device(LEGACY, "nvme 1")], 2),
    # libvirt's own test has 3 GiB for this and 1 GiB of memory (tests/qemumemlockdata in its source).
    (HOSTDEV + NVME, [SHARED, Device(LEGACY, "nvme 0")], 2),
    (HOSTDEV + NVME + VDPA_NET, [SHARED, Device(VDPA), Device(LEGACY, "nvme 0")], 3),
    # A chain with several counts as one, but each disk for vDPA counts.
    (CHAIN, [Device(LEGACY, "nvme 0"), Device(LEGACY, "nvme 1")], 1),
    (VDPA_CHAIN, [Device(VDPA)] * 2, 2),
    (HOSTDEV * 2 + NVME + "<iommu model='intel'/>", [SHARED] * 2 + [Device(LEGACY, "nvme 0")], 3),
]


@pytest.mark.parametrize(("devices", "expected", "counted"), DEVICES)
def test_devices(devices: str, expected: list[Device], counted: int) -> None:
    found = read(devices)
    assert (list(found.devices), found.counted) == (expected, counted)
    assert reckoned_limit(found) == (GIB * counted + GIB if counted else 0)


def test_iommufd_for_the_whole_domain() -> None:
    top = "<iommufd enabled='yes'/>"
    assert read(HOSTDEV, top).devices == (GIVEN,)
    assert read(HOSTDEV.replace("<source/>", "<driver iommufd='no'/>"), top).devices == (SHARED,)
    assert read(HOSTDEV, top).fdgroup is None
    assert read(HOSTDEV, "<iommufd enabled='no' fdgroup='x'/>").devices == (SHARED,)


OBJECT = "-object iommufd,id=iommufd0"
JSON = '-object {"qom-type":"iommufd","id":"a","fd":"9"} -device {"driver":"vfio-pci","host":"0","iommufd":"a"}'

# What QEMU is told beside libvirt, and the devices that pin for it
ARGUMENTS = [
    (f"{OBJECT} -device vfio-pci,host=0,iommufd=iommufd0", [Device(IOMMUFD, "iommufd0", USER)]),
    (f"{OBJECT},fd=9 -device vfio-pci,host=0,iommufd=iommufd0", [Device(IOMMUFD, "iommufd0", None)]),
    (f"-device vfio-pci,iommufd=iommufd0 {OBJECT}", [Device(IOMMUFD, "iommufd0", USER)]),
    ("-device vfio-pci,host=0", [SHARED]),
    ("-device vfio-pci,sysfsdev=/sys/bus/mdev/devices/x", [SHARED._replace(as_it_runs=True)]),
    (JSON.replace('"', "&quot;"), [Device(IOMMUFD, "a", None)]),
    ("-netdev vhost-vdpa,vhostdev=/dev/vhost-vdpa-0,id=n", [Device(VDPA)]),
    ("-netdev type=vhost-vdpa,id=n", [Device(VDPA)]),
    ("-netdev user,id=n -device virtio-net-pci,netdev=n", []),
    ("-device vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0", [Device(VDPA)]),
    ("-drive file=nvme://0000:01:00.0/1,if=none", [Device(LEGACY, "drive 0")]),
    ("-blockdev driver=nvme,device=0000:01:00.0,namespace=1,node-name=n", [Device(LEGACY, "blockdev 0")]),
    ("-drive file=/a,,driver=nvme,if=none", []),
    ("-device {broken", []),
    ("-device", []),
]


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS)
def test_arguments_for_qemu(arguments: str, expected: list[Device]) -> None:
    found = read(arguments=arguments)
    # libvirt sees none of these.
    assert (list(found.devices), found.counted) == (expected, 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"devices": "<iommu model='virtio'/>"}, EACH),
        ({"devices": "<iommu model='smmuv3'><driver accel='on'/></iommu>"}, None),
        ({"arguments": "-device intel-iommu,caching-mode=on"}, EACH),
        ({"arguments": "-device virtio-iommu-pci"}, EACH),
        ({"arguments": "-device arm-smmuv3,accel=on"}, None),
        ({"arguments": "-device intel-iommu,x-flts=on"}, None),
        ({"arguments": "-machine virt,iommu=smmuv3"}, EACH),
        ({"arguments": "-M virt,iommu=none"}, NO_VIOMMU),
        ({"arguments": "-readconfig /etc/qemu.cfg"}, None),
        ({"arguments": "-global intel-iommu.x-flts=on"}, None),
        ({"arguments": "-global ICH9-LPC.disable_s3=1"}, NO_VIOMMU),
    ],
)
def test_viommu(given: dict[str, str], expected: str | None) -> None:
    assert read(**given).viommu == expected


@pytest.mark.parametrize(
    ("model", "buses", "expected"),
    [
        ("pcie-to-pci-bridge", ("0x0a", "0x0a"), None),
        ("pcie-to-pci-bridge", ("0x0a", "0x0b"), EACH),
        ("pcie-root-port", ("0x0a", "0x0a"), EACH),
        ("pci-bridge", ("0x0a",), EACH),
        ("pci-bridge", ("x", "x"), EACH),
    ],
)
def test_devices_behind_one_bridge(model: str, buses: tuple[str, ...], expected: str | None) -> None:
    """They share an address space, though there is a vIOMMU."""
    controller = f"<controller type='pci' index='10' model='{model}'/>"
    devices = [HOSTDEV.replace("<source/>", f"<source/><address type='pci' bus='{bus}'/>") for bus in buses]
    assert read("".join(devices) + controller + "<iommu model='intel'/>").viommu == expected
    assert read("".join(devices) + controller).viommu == NO_VIOMMU


def test_another_reckoning() -> None:
    found = parse_domain(domain(HOSTDEV).replace("x86_64", "ppc64le"))
    assert (found.counted, found.viommu, reckoned_limit(found)) == (None, None, None)
    # It is for KVM alone.
    found = parse_domain(domain(HOSTDEV).replace("x86_64", "ppc64le").replace("'kvm'", "'qemu'"))
    assert (found.counted, found.viommu, reckoned_limit(found)) == (1, None, 2 * GIB)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", False),
        ("-overcommit mem-lock=on", True),
        ("-overcommit mem-lock=off", False),
        ("-overcommit cpu-pm=on,mem-lock=on-fault", True),
        ("-overcommit mem-lock", True),
        ("--overcommit mem-lock=y,cpu-pm=on", True),
        ("-overcommit cpu-pm=on", False),
        ("-overcommit cpu-pm=mem-lock", False),
        # Which of them counts depends on the version.
        ("-overcommit mem-lock=on -overcommit mem-lock=off", None),
        ("-realtime mlock=on", True),
        ("-set device.x.y=z", None),
        ("-global ICH9-LPC.disable_s3=1", False),
    ],
)
def test_memory_that_qemu_locks(arguments: str, expected: bool | None) -> None:
    found = read(arguments=arguments)
    assert (found.mem_lock, found.locked) == (expected, False)


def test_an_mdev_has_no_pci_address() -> None:
    source = "<source><address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source>"
    assert read(MDEV.replace("<source/>", f"<driver iommufd='yes'/>{source}")).addresses == ()


def test_properties() -> None:
    assert properties("a,b=1,,2,c", "first") == {"first": "a", "b": "1,2", "c": "on"}
    assert properties("x=1,y=2", "first") == {"x": "1", "y": "2"}
    assert properties('["a"]', "first") == {"first": '["a"]'}
    assert properties("{1}", "first") == {}


def test_it_takes_no_time() -> None:
    began = time.monotonic()
    with pytest.raises(IommufdError):
        parse_domain("<domain>" * 100_000)
    parse_domain(domain("<x>" * 50_000 + "</x>" * 50_000))
    assert time.monotonic() - began < 20


HARD = "<memtune><hard_limit unit='GiB'>3</hard_limit></memtune>"
LOCKED = "<memoryBacking><locked/></memoryBacking>"


@pytest.mark.parametrize(
    ("top", "expected"), [(HARD, 3 * GIB), (LOCKED, UNLIMITED), (HARD + LOCKED, 3 * GIB), ("", 2 * GIB)]
)
@pytest.mark.parametrize("devices", [HOSTDEV, BY_IOMMUFD + HOSTDEV])
def test_what_goes_before_the_count(top: str, expected: int, devices: str) -> None:
    assert reckoned_limit(read(devices, top)) == expected


def test_a_limit_is_a_size() -> None:
    assert reckoned_limit(read(HOSTDEV * 3 + "<iommu/>", memory=f"<memory>{2**53 - 1}</memory>")) == 2**63 - 1


MEMORY = "<memory model='{}'><target><size unit='MiB'>{}</size></target></memory>"


@pytest.mark.parametrize(
    ("given", "elastic"),
    [
        ({}, 0),
        ({"devices": MEMORY.format("dimm", 512)}, 0),
        ({"devices": MEMORY.format("virtio-mem", 256) * 2}, 512 * MIB),
        # More than all
        ({"devices": MEMORY.format("virtio-mem", 4096)}, 4 * GIB),
        ({"devices": "<memory model='virtio-mem'/>"}, 0),
        ({"top": "<launchSecurity type='sev-snp'/>"}, GIB),
    ],
)
def test_memory_that_may_not_be_mapped(given: dict[str, str], elastic: int) -> None:
    assert read(**given).elastic == elastic


CELLS = "<cpu><numa><cell memory='513' unit='KiB'/><cell memory='{}'/></numa></cpu>"


@pytest.mark.parametrize(
    ("given", "memory"),
    [
        ({"devices": MEMORY.format("dimm", 512)}, GIB),
        ({"devices": MEMORY.format("dimm", 511)}, GIB + MIB),
        ({"devices": MEMORY.format("dimm", 511) * 2}, GIB + 2 * MIB),
        ({"top": CELLS.format(1024)}, 2 * MIB),
        ({"top": CELLS.format(1025), "devices": MEMORY.format("dimm", 1)}, 5 * MIB),
    ],
)
def test_each_part_of_the_memory_is_rounded_up(given: dict[str, str], memory: int) -> None:
    assert read(**given).memory == memory


def test_more_of_it_on_power() -> None:
    text = domain(MEMORY.format("dimm", 255)).replace("x86_64", "ppc64le")
    assert parse_domain(text).memory == 1280 * MIB


def test_the_nodes_of_vdpa_devices() -> None:
    assert read(VDPA_NET + HOSTDEV + VDPA_DISK).vdpa_nodes == ("/dev/vhost-vdpa-0",)


@pytest.mark.parametrize(
    ("devices", "arguments", "expected"),
    [
        ("", "", 0),
        ("<shmem name='s'><size>1048576</size></shmem>", "", MIB),
        ("<shmem name='s'/>", "", 4 * MIB),
        ("<shmem name='s'><server path='/s'/></shmem>", "", None),
        ("<video><model type='vga' vram='16384'/></video><video><model type='bochs'/></video>", "", 32 * MIB),
        ("<video><model type='none'/></video>", "", 0),
        ("<video><model type='qxl' ram='65536' vram='65536' vgamem='16384'/></video>", "", 128 * MIB),
        ("<video><model type='qxl' ram='65536' vram='65536' vram64='262144' heads='4'/></video>", "", 384 * MIB),
        ("<video><model type='vga' vram='much'/></video>", "", None),
        ("<shmem name='s'/>", "-device VGA", 20 * MIB),
        ("", "-object memory-backend-ram,id=m,size=1G -device pc-dimm,memdev=m", GIB),
        ("", "-device ivshmem-doorbell,chardev=c", None),
    ],
)
def test_memory_of_emulated_devices(devices: str, arguments: str, expected: int | None) -> None:
    found = read(devices + HOSTDEV, arguments=arguments)
    assert found.of_devices == expected
    # libvirt does not count it.
    assert reckoned_limit(found) == 2 * GIB


def test_a_property_that_is_overridden() -> None:
    its = "<qemu:property name='vgamem_mb' type='unsigned' value='1024'/>"
    text = domain("<video><model type='vga'/></video>").replace(
        "</domain>",
        f"<qemu:override><qemu:device alias='video0'><qemu:frontend>{its}</qemu:frontend></qemu:device></qemu:override>"
        "</domain>",
    )
    assert (parse_domain(text).of_devices or 0) >= GIB


@pytest.mark.parametrize("placed", [0, 1, 2])
def test_where_libvirt_has_still_to_place_devices(placed: int) -> None:
    address = "<source/><address type='pci' bus='0x0a'/>"
    devices = HOSTDEV.replace("<source/>", address) * placed + HOSTDEV * (2 - placed)
    assert read(devices + "<iommu model='intel'/>").viommu == (EACH if placed == 2 else None)
    assert read(devices).viommu == NO_VIOMMU
    assert read(HOSTDEV + "<iommu model='intel'/>").viommu == EACH
