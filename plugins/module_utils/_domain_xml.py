# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a libvirt domain's XML says of the memory that its devices pin. Pure functions.

The XML is somebody else's. What it says of memory, of devices and of the limit is read, and nothing else. What libvirt
makes of it as a limit is reckoned here, too, and nowhere else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ._accounting import EACH, IOMMUFD, LEGACY, NO_VIOMMU, UNLIMITED, USER, VDPA, Device
from ._errors import IommufdError
from ._foreign import number, parse_answer, parse_xml, shown_text
from ._qemu import added_memory, memory_of_device
from ._size import SIZE_MAX, parse_size, whole

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = (
    "CONTAINER",
    "LIBVIRTS",
    "Commandline",
    "Defined",
    "Described",
    "counted_limit",
    "parse_domain",
    "properties",
    "read_domain",
    "reckoned_limit",
)

_ARGUMENTS_MAX = 4096

# VIR_DOMAIN_MEMORY_PARAM_UNLIMITED, in KiB.
_NO_LIMIT = ("9007199254740991", "-1")
# What libvirt adds to a domain's memory.
_GIB = 2**30
_MIB = 2**20

# libvirt opens one iommufd for all <hostdev> of a domain; QEMU has one legacy container for all without a vIOMMU.
LIBVIRTS = "the domain's iommufd"
CONTAINER = "the legacy container"

_HEXADECIMAL = re.compile(r"(?:0[xX])?[0-9A-Fa-f]{1,8}")
_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
# A vIOMMU that the IOMMU of the host may walk itself, which depends on more than these.
_MAY_NEST = frozenset({"accel", "x-flts", "x-scalable-mode"})
_BRIDGES = frozenset({"pci-bridge", "dmi-to-pci-bridge", "pcie-to-pci-bridge"})
_OFF = frozenset({"off", "no", "false"})
# An argument that has QEMU lock its memory, or not. A name alone is "on".
_LOCKS = re.compile(r"(?:^|,)(?:mem-lock|mlock)(?:=(?P<value>[^,]*))?(?=,|$)")
_LOCKING = frozenset({None, "on", "yes", "true", "y", "on-fault"})
_PCI = re.compile(r"(?:([0-9A-Fa-f]{1,8}):)?([0-9A-Fa-f]{1,2}):([0-9A-Fa-f]{1,2})\.([0-7])")
# In -global, which sets properties of all devices of one kind.
_MATTERS = re.compile("vfio|vdpa|iommu|smmu")
# Where hugetlbfs is by default. What is at other paths cannot be told from the path.
_HUGE_PAGES = "/dev/hugepages"


class Defined(NamedTuple):
    """What a domain's XML says.

    `memory` in bytes, and `elastic`, what of that QEMU may map later or never. `devices`: those that pin, a mode as far
    as QEMU's command line tells it. `viommu`: as in Vm. `counted`: how many times libvirt counts the memory for its
    limit, 0 where it sets none, None where that is another reckoning. `hard_limit` in bytes, None where it is not
    there. `locked`: <locked/>. `mem_lock`: whether QEMU locks its memory for a reason that libvirt does not know, None
    where that cannot be told. `user`: who it is to run as, None where it does not say so. `fdgroup`: the name under
    which libvirt expects the iommufd, None where it is given none. `emulator`: the path of its program, None where
    libvirt chooses. `addresses`: those of the PCI devices that are had by iommufd. `vdpa_nodes`: the paths of the
    vDPA devices, "" where libvirt chooses. `of_devices`: what emulated devices have of memory of their own, which the
    guest may turn on, at most; None where that is not known. `hugepages`: whether the memory is in huge pages.
    """

    name: str
    memory: int
    devices: tuple[Device, ...]
    viommu: str | None
    counted: int | None
    hard_limit: int | None
    locked: bool
    mem_lock: bool | None
    user: str | None
    fdgroup: str | None
    emulator: str | None
    elastic: int = 0
    addresses: tuple[str, ...] = ()
    vdpa_nodes: tuple[str, ...] = ()
    of_devices: int | None = 0
    hugepages: bool | None = False


class Described(NamedTuple):
    """What else a domain's XML says.

    `places`: the PCI address of each of its devices, None where it has none. `memory_max`: <maxMemory> in bytes, None
    without. `networks`: those that it has an interface in, which may pass a device through. `unread`: what of it was
    not understood, as nouns. `whole`: whether all that may add to its devices was.
    """

    defined: Defined
    places: tuple[str | None, ...]
    memory_max: int | None
    networks: tuple[str, ...]
    unread: tuple[str, ...]
    whole: bool


def parse_domain(description: str) -> Defined:
    """Reads a domain's XML. Raises IommufdError where it is none, whose text continues a sentence about that."""
    try:
        root = parse_xml(description)
    except IommufdError as exc:
        raise IommufdError(f"it {exc}") from exc
    return read_domain(root).defined


def read_domain(root: Element) -> Described:
    """All of it, of XML that was parsed."""
    if root.tag != "domain":
        raise IommufdError("it is no domain: give what virsh dumpxml prints")
    commandline = _commandline(root)
    passed = _passed(root)
    # A disk may be a chain of several, of which each pins. libvirt counts a chain with an NVMe disk once.
    chains = [[disk, *disk.iter("backingStore")] for disk in root.iterfind("devices/disk")]
    vdpa = [
        *root.iterfind("devices/interface[@type='vdpa']"),
        *(each for chain in chains for each in chain if each.get("type") == "vhostvdpa"),
    ]
    in_chains = [sum(each.get("type") == "nvme" for each in chain) for chain in chains]
    nvme = sum(in_chains)
    of_libvirt = [*map(_passed_device, passed), *(Device(VDPA) for _each in vdpa)]
    of_libvirt += [Device(LEGACY, f"nvme {each}") for each in range(nvme)]
    of_disks = [each for chain in chains for each in chain if each.get("type") == "nvme"]
    places = [*(_address(each) for each, *_others in passed), *(None for _each in vdpa), *map(_address, of_disks)]
    viommu = _viommu(root, commandline, [element for element, *_others in passed])
    counted = _counted(root, len(passed), len(vdpa) + sum(map(bool, in_chains)))
    memory = _memory(root)
    defined = Defined(
        name=shown_text(root.findtext("name") or ""),
        memory=memory,
        devices=(*of_libvirt, *commandline.devices),
        viommu=viommu,
        counted=counted,
        hard_limit=_hard_limit(root),
        locked=root.find("memoryBacking/locked") is not None,
        mem_lock=commandline.mem_lock,
        user=_user(root),
        fdgroup=_whole(root, "fdgroup"),
        emulator=root.findtext("devices/emulator"),
        elastic=_elastic(root, memory),
        addresses=tuple(filter(None, (_address(each) for each, _mdev, by in passed if by == "yes"))),
        vdpa_nodes=tuple(source.get("dev", "") for each in vdpa for source in each.iterfind("source")),
        of_devices=_of_devices(root),
        hugepages=root.find("memoryBacking/hugepages") is not None or commandline.hugepages,
    )
    return Described(
        defined,
        places=(*places, *commandline.places),
        memory_max=_memory_max(root),
        networks=tuple(each.get("network", "") for each in root.iterfind("devices/interface[@type='network']/source")),
        unread=(*commandline.unread, *_not_told(viommu, counted, commandline)),
        whole=not commandline.unread,
    )


def _not_told(viommu: str | None, counted: int | None, commandline: Commandline) -> Iterator[str]:
    """What is unknown for another reason than that some argument was not read."""
    if viommu is None and not commandline.unread:
        yield "whether each device behind its vIOMMU has an address space of its own"
    if counted is None:
        yield "which limit libvirt gives it, of which it has a reckoning of its own for KVM on POWER"


def reckoned_limit(defined: Defined) -> int | None:
    """The RLIMIT_MEMLOCK that libvirt starts the emulator with, soft and hard, whatever its daemon has.

    UNLIMITED is no limit, 0 that it leaves the limit alone, and None that it is not known. Read in the code of libvirt
    12.8, qemuDomainGetMemLockLimitBytes() and qemuProcessLaunch(), and seen for one device.
    """
    if defined.hard_limit is not None:
        return defined.hard_limit
    if defined.locked:
        return UNLIMITED
    return None if defined.counted is None else counted_limit(defined.memory, defined.counted)


def counted_limit(memory: int, counted: int) -> int:
    """The limit that libvirt reckons for memory that it counts so many times; 0 where it sets none."""
    return min(memory * counted + _GIB, SIZE_MAX) if counted else 0


def _bytes(element: Element | None, path: str) -> int:
    """A size, which libvirt counts in KiB where it has no unit."""
    text = "" if element is None else element.text or ""
    return _size(text, "KiB" if element is None else element.get("unit", "KiB"), path)


def _size(text: str, unit: str, path: str) -> int:
    try:
        if not unit.isalpha():
            raise IommufdError("It has no letters alone.")
        factor = 1 if unit == "bytes" else parse_size(f"1{unit}")
    except IommufdError as exc:
        raise IommufdError(f"its <{path}> is in no unit of size but in {shown_text(unit):.40}") from exc
    try:
        return number(text, SIZE_MAX // factor) * factor
    except IommufdError as exc:
        raise IommufdError(f"its <{path}> {exc}") from exc


def _memory(root: Element) -> int:
    """All memory that the domain starts with: see qemuDomainAlignMemorySizes() in libvirt's src/qemu/qemu_domain.c."""
    said = _bytes(root.find("memory"), "memory")
    aligned, of_module = (256 * _MIB, 256 * _MIB) if _is_of_power(root) else (_MIB, 2 * _MIB)
    modules = _modules(root.iterfind("devices/memory"))
    cells = [each for each in root.iterfind("cpu/numa/cell") if "memory" in each.attrib]
    initial = [_size(each.get("memory", ""), each.get("unit", "KiB"), "cpu/numa/cell") for each in cells]
    # libvirt makes the sum of the cells the domain's memory, whatever that was.
    initial = initial or [max(said - sum(modules), 0)]
    parts = (*(whole(each, aligned) for each in initial), *(whole(each, of_module) for each in modules))
    return min(sum(parts), SIZE_MAX)


def _modules(modules: Iterable[Element]) -> list[int]:
    return [_bytes(size, "devices/memory/target/size") for each in modules for size in each.iterfind("target/size")]


def _is_of_power(root: Element) -> bool:
    kind = root.find("os/type")
    return kind is not None and kind.get("arch", "").startswith("ppc64")


def _memory_max(root: Element) -> int | None:
    found = root.find("maxMemory")
    return None if found is None else _bytes(found, "maxMemory")


def _hard_limit(root: Element) -> int | None:
    found = root.find("memtune/hard_limit")
    # That is to libvirt as if there were none: see virMemoryLimitIsSet() in its src/util/virutil.c.
    if found is None or ((found.text or "").strip() in _NO_LIMIT and found.get("unit", "KiB") == "KiB"):
        return None
    return _bytes(found, "memtune/hard_limit")


def _elastic(root: Element, memory: int) -> int:
    """How much of the memory QEMU may map later or never.

    Of virtio-mem it maps what is plugged, and of a guest that is closed to the host what that shares. What it does with
    other devices that hold memory, but for a dimm, was not looked at.
    """
    if root.find("launchSecurity") is not None:
        return memory
    others = (each for each in root.iterfind("devices/memory") if each.get("model") != "dimm")
    return min(sum(whole(size, 256 * _MIB) for size in _modules(others)), memory)


def _of_devices(root: Element) -> int | None:
    """What emulated devices have of memory of their own, which libvirt does not count."""
    displays = [each.attrib for each in root.iterfind("devices/video/model")]
    sizes = [_shared(each) for each in root.iterfind("devices/shmem")]
    sizes += [memory_of_device(_display(each), {}) for each in displays if each.get("type") not in ("none", "ramfb")]
    sizes.append(added_memory([_bytes_of(each) for each in _arguments(root)]))
    # What is changed of a device is taken for one more.
    changed = {
        _bytes_of(each.get("name", "")): _bytes_of(each.get("value", ""))
        for each in root.iterfind("/".join(_QEMU + each for each in ("override", "device", "frontend", "property")))
    }
    sizes += [memory_of_device({**changed, b"driver": each}, {}) for each in (b"VGA", b"qxl") if changed]
    known = [each for each in sizes if each is not None]
    return min(sum(known), SIZE_MAX) if len(known) == len(sizes) else None


def _shared(shmem: Element) -> int | None:
    """The size of memory that is shared with others. A server has its own idea of it."""
    if shmem.find("server") is not None:
        return None
    size = shmem.find("size")
    return 4 * _MIB if size is None else _size(size.text or "", size.get("unit", "bytes"), "devices/shmem/size")


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _display(model: Mapping[str, str]) -> dict[bytes, bytes]:
    """A display in QEMU's words."""
    qxl = model.get("type") == "qxl"
    names = {"ram": b"ram_size", "vram": b"vram_size", "vram64": b"vram64_size", "vgamem": b"vgamem"}
    names = names if qxl else {"vram": b"vgamem"}
    sizes = {key: _bytes_of(f"{model[name]}k") for name, key in names.items() if model.get(name, "0") != "0"}
    return {b"driver": b"qxl" if qxl else b"VGA", **sizes}


def _address(device: Element) -> str | None:
    found = device.find("source/address")
    # That of an mdev is a UUID.
    if found is None or "uuid" in found.attrib:
        return None
    parts = [found.get(name, "0") for name in ("domain", "bus", "slot", "function")]
    if not all(_HEXADECIMAL.fullmatch(each) for each in parts):
        return None
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*(int(each, 16) for each in parts))


def _whole(root: Element, name: str) -> str | None:
    """What <iommufd> of the whole domain says, where that is enabled."""
    found = root.find("iommufd")
    return found.get(name) if found is not None and found.get("enabled") == "yes" else None


def _passed(root: Element) -> list[tuple[Element, bool, str]]:
    """What libvirt counts as devices of VFIO: each, whether it is an mdev, and whether it is had by iommufd."""
    default = "yes" if _whole(root, "enabled") else "no"
    found = [
        *(each for each in root.iterfind("devices/hostdev[@mode='subsystem']") if each.get("type") in ("pci", "mdev")),
        *root.iterfind("devices/interface[@type='hostdev']"),
    ]
    drivers = [(each, each.find("driver")) for each in found]
    return [
        (each, each.get("type") == "mdev", default if driver is None else driver.get("iommufd", default))
        for each, driver in drivers
    ]


def _passed_device(passed: tuple[Element, bool, str]) -> Device:
    _element, mdev, by_iommufd = passed
    return Device(IOMMUFD, LIBVIRTS, None, mdev) if by_iommufd == "yes" else Device(LEGACY, CONTAINER, None, mdev)


def _counted(root: Element, passed: int, others: int) -> int | None:
    """How often libvirt counts the memory. POWER with KVM has a reckoning of its own.

    Behind a vIOMMU each device has an address space of its own, into which all of the memory may be mapped.
    """
    if root.get("type") == "kvm" and _is_of_power(root):
        return None
    return (passed if root.find("devices/iommu") is not None else min(passed, 1)) + others


def _viommu(root: Element, commandline: Commandline, passed: list[Element]) -> str | None:
    if commandline.unread or _is_of_power(root):
        return None
    found = root.findall("devices/iommu")
    if commandline.may_nest or any(_may_nest(part.attrib) for each in found for part in each.iter()):
        return None
    if not (found or commandline.viommu):
        return NO_VIOMMU
    return None if _may_share(passed) or _share_a_bridge(root, passed) else EACH


def _may_share(passed: list[Element]) -> bool:
    """Whether libvirt has still to choose where some of several are: it may put them behind one bridge."""
    return len(passed) > 1 and any(each.find("address[@type='pci']") is None for each in passed)


def _share_a_bridge(root: Element, passed: list[Element]) -> bool:
    """Whether some devices are behind one bridge of conventional PCI, so that a vIOMMU cannot tell them apart."""
    controllers = root.iterfind("devices/controller[@type='pci']")
    bridges = {each.get("index") for each in controllers if each.get("model") in _BRIDGES}
    addresses = [each.find("address[@type='pci']") for each in passed]
    buses = Counter(_hexadecimal(each.get("bus", "")) for each in addresses if each is not None)
    return any(str(bus) in bridges and count > 1 for bus, count in buses.items())


def _hexadecimal(text: str) -> int | None:
    return int(text, 16) if _HEXADECIMAL.fullmatch(text) else None


def _may_nest(properties_: Mapping[str, Any]) -> bool:
    """Whether a vIOMMU with these may be a nested one."""
    return any(str(properties_.get(name, "off")).lower() not in _OFF for name in _MAY_NEST)


def _user(root: Element) -> str | None:
    """The user in <seclabel model='dac'>, which counts more than what qemu.conf says."""
    for each in root.iterfind("seclabel[@model='dac']"):
        found = re.match(r"\+?([^:+]+):", (each.findtext("label") or "").strip())
        if found:
            return shown_text(found[1])
    return None


def properties(text: str, implied: str) -> dict[str, Any]:
    """The properties in an argument of QEMU's: `implied,key=value,...`, with a comma in a value twice, or JSON."""
    if text.startswith("{"):
        try:
            found = parse_answer(text.encode("utf-8", "backslashreplace"))
        except IommufdError:
            return {}
        return found if isinstance(found, dict) else {}
    parts = (part.replace("\0", ",").partition("=") for part in text.replace(",,", "\0").split(","))
    first, *rest = parts
    pairs = [first if first[1] else (implied, "=", first[0]), *rest]
    return {key: value if equals else "on" for key, equals, value in pairs}


def _arguments(root: Element) -> list[str]:
    return [each.get("value", "") for each in root.iterfind(f"{_QEMU}commandline/{_QEMU}arg")]


def _commandline(root: Element) -> Commandline:
    """What the arguments say that the XML has for QEMU, of which libvirt knows nothing."""
    arguments = _arguments(root)
    if len(arguments) > _ARGUMENTS_MAX:
        raise IommufdError(f"it has more than {_ARGUMENTS_MAX} arguments for QEMU")
    overridden = root.find(f"{_QEMU}override") is not None
    return Commandline(arguments, unread=["what <qemu:override> changes"] if overridden else ())


class Commandline:
    """What arguments of QEMU's say of devices. `unread`: what may say more. `places`: as in Defined, of its devices.

    `given`: the modes of the iommufds and the addresses of the devices that it is given, by what stands for their
    descriptors.
    """

    def __init__(
        self, arguments: list[str], given: Mapping[str, str] = MappingProxyType({}), unread: Sequence[str] = ()
    ) -> None:
        self.devices: list[Device] = []
        self.places: list[str | None] = []
        self.unread = list(unread)
        self.hugepages: bool | None = False
        self.viommu = self.may_nest = False
        self._locks: set[bool] = set()
        self._given = given
        self.iommufds: dict[str, str | None] = {}
        for option, value in self._options(arguments):
            if option == "object":
                self._object(properties(value, "qom-type"))
        for option, value in self._options(arguments):
            self._take(option, value)

    @property
    def mem_lock(self) -> bool | None:
        """Whether QEMU locks its memory. Which of several counts depends on the version."""
        return None if self.unread or len(self._locks) > 1 else True in self._locks

    @staticmethod
    def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
        for each, value in zip(arguments, chain(arguments[1:], [""])):
            if each.startswith("-"):
                yield each.lstrip("-"), value

    def _object(self, found: dict[str, Any]) -> None:
        kind = str(found.get("qom-type"))
        if kind == "iommufd":
            # Without a descriptor QEMU opens it, with the first device, and nobody has the time to set its mode.
            self.iommufds[str(found.get("id"))] = self._given.get(str(found["fd"])) if "fd" in found else USER
        elif kind.startswith("memory-backend-"):
            huge = str(found.get("hugetlb", "off")).lower() not in _OFF
            self._in_huge_pages(True if huge else str(found["mem-path"]) if "mem-path" in found else False)

    def _in_huge_pages(self, found: bool | str) -> None:
        """Takes in where some memory is: whether in huge pages, or at which path."""
        if isinstance(found, str):
            found = True if found.startswith(_HUGE_PAGES) else found
        if found is not False and self.hugepages is not True:
            self.hugepages = True if found is True else None

    def _take(self, option: str, value: str) -> None:
        if option == "device":
            self._device(properties(value, "driver"))
        elif option in ("machine", "M"):
            self._add_viommu(str(properties(value, "type").get("iommu", "none")) != "none", {})
        elif option in ("overcommit", "realtime"):
            self._locks.update(found["value"] in _LOCKING for found in _LOCKS.finditer(value))
        elif option == "mem-path":
            self._in_huge_pages(value)
        elif option == "netdev":
            found = properties(value, "type")
            self._add(Device(VDPA), found.get("type") == "vhost-vdpa")
        elif option in ("drive", "blockdev"):
            found = properties(value, "")
            by_url = str(found.get("file", "")).startswith("nvme://")
            nvme = Device(LEGACY, f"{option} {len(self.devices)}")
            self._add(nvme, by_url or "nvme" in (found.get("driver"), found.get("file.driver")))
        elif option in ("readconfig", "set") or (option == "global" and _MATTERS.search(value)):
            self.unread.append(f"what -{option} has QEMU do")

    def _device(self, found: dict[str, Any]) -> None:
        driver = str(found.get("driver", ""))
        if driver.startswith("vfio-"):
            named = found.get("iommufd")
            # An mdev has no other name, and its path may lead through any folder of sysfs that a PCI device's does.
            mdev = "sysfsdev" in found
            if named is None:
                device = Device(LEGACY, CONTAINER, None, mdev)
            else:
                device = Device(IOMMUFD, shown_text(str(named)), self.iommufds.get(str(named)), mdev)
            host = self._given.get(str(found["fd"])) if "fd" in found else found.get("host")
            self._add(device, place=_pci_address(str(host or "")))
        self._add(Device(VDPA), driver.startswith("vhost-vdpa-device"))
        self._add_viommu("iommu" in driver or "smmu" in driver, found)

    def _add(self, device: Device, there: bool = True, place: str | None = None) -> None:
        if there:
            self.devices.append(device)
            self.places.append(place)

    def _add_viommu(self, there: bool, found: dict[str, Any]) -> None:
        self.viommu |= there
        self.may_nest |= there and _may_nest(found)


def _pci_address(text: str) -> str | None:
    """A PCI address in QEMU's words, with its domain; None where it is none."""
    found = _PCI.fullmatch(text)
    return found and "{:04x}:{:02x}:{:02x}.{}".format(*(int(each or "0", 16) for each in found.groups()))
