# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a VMM's command line says of its guest. Whoever started it chose that text.

How QEMU reads it is in its system/vl.c and util/cutils.c, qemu_strtosz().
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Callable, NamedTuple, Optional

from ._errors import IommufdError
from ._foreign import parse_answer
from ._size import SIZE_MAX, whole

__all__ = (
    "RAM_UNIT",
    "Guest",
    "added_memory",
    "guest_name",
    "is_session_domain",
    "look_at_guest",
    "memory_of_device",
)

# QEMU rounds -m up to a multiple of so many bytes: see machine_set_mem() in its hw/core/machine.c.
RAM_UNIT = 8192

_SESSION_FOLDER = re.compile(rb"/libvirt/qemu/lib/domain-[0-9]+-")

_UNITS = {b"b": 1, b"k": 2**10, b"m": 2**20, b"g": 2**30, b"t": 2**40, b"p": 2**50, b"e": 2**60}
_SIZE = re.compile(rb"([0-9]{1,18})(?:\.([0-9]{1,18}))?([bkmgtpe]?)")
_BOOLEANS = {**dict.fromkeys((b"on", b"yes", b"true", b"y"), True), **dict.fromkeys((b"off", b"no", b"false"), False)}
_BOOLEANS |= {b"n": False, b"on-fault": True}

# Options that take properties, with the group that they belong to in a file for -readconfig, and their first property.
_GROUPS = {
    b"m": (b"memory", b"size"),
    b"M": (b"machine", b"type"),
    b"machine": (b"machine", b"type"),
    b"device": (b"device", b"driver"),
    b"object": (b"object", b"qom-type"),
    b"overcommit": (b"overcommit", b""),
    b"realtime": (b"realtime", b""),
    b"vga": (b"device", b"driver"),
}
# By what a device may share an address space in spite of an IOMMU: one that it bypasses, of another bus, or nested.
_SHARING = re.compile(rb"bypass.iommu|flts|primary.bus|^accel$")
# How many iommufds QEMU is given are told of, and the longest name of one.
_IOMMUFDS_MAX, _ID_MAX = 16, 63
_LOCKING = (b"overcommit", b"realtime")
# Devices whose memory changes as the guest runs, or is not all that their backend has.
_OTHER_MEMORY = (b"nvdimm", b"virtio-mem", b"virtio-pmem")
# What -vga stands for, and displays with the MiB of memory that each has by itself.
_VGA = {b"std": b"VGA", b"cirrus": b"cirrus-vga", b"vmware": b"vmware-svga", b"virtio": b"virtio-vga", b"qxl": b"qxl"}
_DISPLAYS = {
    **dict.fromkeys((b"VGA", b"secondary-vga", b"isa-vga", b"bochs-display", b"vmware-svga", b"ati-vga"), 16),
    **dict.fromkeys((b"virtio-vga", b"virtio-vga-gl", b"virtio-vga-rutabaga", b"vhost-user-vga"), 8),
    **dict.fromkeys((b"cirrus-vga", b"isa-cirrus-vga"), 4),
}
_OF_QXL = 64
# Properties of other devices with memory that the guest may turn on.
_OWN = (b"hostmem", b"cache-size", b"membar")
# How many files for -readconfig are looked at. One is what there is.
_FILES_MAX = 8
# [group] or [group "id"], and key = "value"
_HEADER = re.compile(rb'\[([^\]" ]{1,63})(?: "([^"]{1,63})")?\]')
_SETTING = re.compile(rb'([^ =]{1,63}) *= *"([^"]{0,1023})"')

Properties = dict[bytes, bytes]
# The text of a file that is named on a command line; None where it is not to be read.
Read = Callable[[bytes], Optional[bytes]]


class Guest(NamedTuple):
    """What is said of a guest: its memory in bytes, and whether the VMM locks it itself; None where that is unknown.

    `changes_user`: whether the VMM becomes another user once it has its devices. `pluggable`: whether memory can be
    plugged, or unplugged, as the guest runs. `memory_max`: the most that it may have then, where that is said.
    `updatable`: whether another process could take it over (cpr-transfer).
    `of_devices`: what emulated devices have of their own, which the guest may turn on; None where that is unknown.
    `viommu`: "none" for a guest without an IOMMU, "each" for one whose IOMMU has a space for each device; None where
    that is unknown or may differ. `iommufds`: those that it is given, each with its name, and its descriptor if it has
    that from another program; None where they are unknown.
    """

    memory: int | None = None
    locks: bool | None = None
    changes_user: bool = False
    pluggable: bool | None = None
    memory_max: int | None = None
    updatable: bool = False
    of_devices: int | None = None
    viommu: str | None = None
    iommufds: list[tuple[bytes, int | None]] | None = None


def _split(text: bytes, implied: bytes) -> Properties:
    """The properties in `implied,key=value,...`. A comma in a value is written twice, and a key alone is set to on."""
    found = {}
    for position, part in enumerate(text.replace(b",,", b"\0").split(b",")):
        key, equals, value = part.partition(b"=")
        if not equals:
            key, value = (implied, part) if implied and position == 0 else (part, b"on")
        found[key] = value.replace(b"\0", b",")
    return found


def _options(arguments: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Options with what follows them. QEMU takes one dash as well as two."""
    for option, value in zip(arguments, arguments[1:]):
        if option[:1] == b"-":
            yield option[2:] if option[:2] == b"--" else option[1:], value


def guest_name(arguments: list[bytes]) -> bytes | None:
    """The guest's name in `-name guest=NAME,...`; None where there is none."""
    found: Properties = {}
    for option, value in _options(arguments):
        if option == b"name":
            found.update(_split(value, b"guest"))
    return found.get(b"guest")


def is_session_domain(arguments: list[bytes]) -> bool:
    """Whether a user's own libvirt seems to have started it: the folder it keeps for the guest is in a home."""
    return bool(_SESSION_FOLDER.search(b"\0".join(arguments)))


def look_at_guest(program: bytes, arguments: list[bytes], read: Read) -> Guest:
    """What is said of the guest of a VMM, by the path of its program. Others may mean something else by an option."""
    name = program.rpartition(b"/")[2]
    if b"qemu" in name or name == b"kvm":
        return _of_qemu(arguments, read) if arguments else Guest()
    if name.startswith(b"cloud-hypervisor"):
        memory = _memory_of_cloud_hypervisor(arguments)
        pluggable = None if memory is None else b"hotplug_" in b" ".join(arguments)
        viommu = None if memory is None or b"iommu" in b" ".join(arguments) else "none"
        # How much of these it maps was not looked at.
        others = any(each.startswith((b"--pmem", b"--ivshmem", b"--fs")) for each in arguments)
        return Guest(memory, pluggable=pluggable, viommu=viommu, of_devices=None if others else 0)
    return Guest()


def _of_qemu(arguments: list[bytes], read: Read) -> Guest:
    settings: defaultdict[bytes, list[Properties]] = defaultdict(list)
    # Whether a file was not read, in which there may be anything, and whether one may have memory locked.
    lacks = lacks_locks = changes_user = set_for_all = False
    files = 0
    for option, value in _options(arguments):
        # See os_setup_post() in os-posix.c, which comes after the devices.
        changes_user = changes_user or option == b"runas" or (option == b"run-with" and b"user" in _split(value, b""))
        set_for_all = set_for_all or (option == b"global" and bool(re.search(rb"iommu|smmu|pxb", value)))
        if option in _GROUPS:
            group, implied = _GROUPS[option]
            found = _from_json(value) if value[:1] == b"{" else _split(value, implied)
            settings[group].append(found)
        elif option == b"readconfig":
            files += 1
            text = read(value) if files <= _FILES_MAX else None
            lacks = lacks or text is None
            for group, found in _sections(text or b""):
                # It depends on the version whether such a section has any effect.
                lacks_locks = lacks_locks or group in _LOCKING
                settings[group if group not in _LOCKING else b""].append(found)
    memory = None if lacks else _memory(settings)
    pluggable = None if memory is None else _is_pluggable(settings)
    words = {each.lstrip(b"-") for each in arguments if each[:1] == b"-"}
    # It has one of its own accord.
    if not words & {b"nodefaults", b"vga"}:
        settings[b"device"].append({b"driver": b"VGA"})
    of_devices = None if lacks or b"set" in words else _of_devices(settings, arguments, (b"pc-dimm", *_OTHER_MEMORY))
    updatable = any(_BOOLEANS.get(each.get(b"aux-ram-share", b"")) for each in settings.get(b"machine", []))
    locks = _locks(settings, lacks or lacks_locks)
    return Guest(
        memory=memory,
        locks=locks,
        changes_user=changes_user,
        pluggable=pluggable,
        memory_max=_memory_max(settings),
        updatable=updatable,
        of_devices=of_devices,
        viommu=None if lacks or set_for_all else _viommu(settings),
        iommufds=None if lacks else _iommufds(settings),
    )


def added_memory(arguments: list[bytes]) -> int | None:
    """What devices have of memory, be it the guest's or their own, that are added by arguments of QEMU's."""
    settings: defaultdict[bytes, list[Properties]] = defaultdict(list)
    for option, value in _options(arguments):
        if option in _GROUPS:
            group, implied = _GROUPS[option]
            settings[group].append(_from_json(value) if value[:1] == b"{" else _split(value, implied))
    unread = {b"-set", b"--set", b"-readconfig", b"--readconfig"}.intersection(arguments)
    return None if unread else _of_devices(settings, arguments, ())


def _of_devices(
    settings: dict[bytes, list[Properties]], arguments: list[bytes], apart: tuple[bytes, ...]
) -> int | None:
    """What devices have of memory, but for those `apart`."""
    backends = {each[b"id"]: each.get(b"size", b"") for each in settings.get(b"object", []) if _is_memory(each)}
    # driver.property=value
    of_all: defaultdict[bytes, Properties] = defaultdict(dict)
    for option, value in _options(arguments):
        driver, dot, setting = value.partition(b".")
        if option == b"global" and dot:
            of_all[driver].update(_split(setting, b""))
    sizes = []
    for each in settings.get(b"device", []):
        driver = _VGA.get(each.get(b"driver", b""), each.get(b"driver", b""))
        if not driver.startswith(apart):
            sizes.append(memory_of_device({**of_all[driver], **each, b"driver": driver}, backends))
    known = [each for each in sizes if each is not None]
    return sum(known) if len(known) == len(sizes) and sum(known) <= SIZE_MAX else None


def _is_memory(found: Properties) -> bool:
    return found.get(b"qom-type", b"").startswith(b"memory-backend-") and b"id" in found


def memory_of_device(found: Properties, backends: Mapping[bytes, bytes]) -> int | None:
    """What an emulated device has of memory that the guest may turn on, at most. `backends`: sizes, by their names.

    VFIO maps that as it maps the guest's memory. See hw/display, hw/misc/ivshmem-pci.c and hw/nvme in QEMU's source.
    """
    driver = found[b"driver"]
    named = [value for key, value in found.items() if key != b"id" and (key.endswith(b"memdev") or value in backends)]
    # Of another one, who serves it says how much there is.
    if driver.startswith(b"ivshmem") and not named:
        return None
    sizes = [_size(backends.get(each, b""), b"b") for each in named]
    sizes += [_of_property(found, each, b"b", 0) for each in _OWN]
    if driver.startswith(b"qxl"):
        ram, vram = (_of_display(found, each, _OF_QXL) for each in (b"ram_size", b"vram_size"))
        vram64, screen = (_of_display(found, each, 0) for each in (b"vram64_size", b"vgamem"))
        if ram is None or vram is None or vram64 is None or screen is None:
            return None
        # The larger one has both addresses.
        sizes += [max(ram, 2 * screen), vram, vram64 if vram64 > vram else 0]
    elif driver in _DISPLAYS:
        sizes.append(_of_display(found, b"vgamem", _DISPLAYS[driver]))
    known = [each for each in sizes if each is not None]
    return sum(known) if len(known) == len(sizes) else None


def _of_display(found: Properties, name: bytes, default: int) -> int | None:
    """A size of a display's, in MiB by `default`, which QEMU rounds up to a power of two."""
    size = _of_property(found, name, b"b", default * 2**20)
    size = _of_property(found, name + b"_mb", b"m", size)
    return None if size is None else 1 << (size - 1).bit_length() if size else 0


def _of_property(found: Properties, name: bytes, unit: bytes, default: int | None) -> int | None:
    if name not in found:
        return default
    return 0 if found[name] == b"0" else _size(found[name], unit)


def _from_json(text: bytes) -> Properties:
    """The properties of an object that is given as JSON. What is no text or number is of no interest."""
    try:
        given = parse_answer(text)
    except IommufdError:
        return {}
    found = given.items() if isinstance(given, dict) else ()
    return {
        key.encode("utf-8", "replace"): str(value).encode("utf-8", "replace")
        for key, value in found
        if isinstance(value, (int, str))
    }


def _sections(text: bytes) -> Iterator[tuple[bytes, Properties]]:
    """The sections of a file for -readconfig, by their groups."""
    found: Properties = {}
    for line in text.split(b"\n"):
        header, setting = _HEADER.match(line.strip()), _SETTING.match(line.strip())
        if header:
            found = {b"id": header.group(2)} if header.group(2) else {}
            yield header.group(1), found
        elif setting:
            found[setting.group(1)] = setting.group(2)


def _memory(settings: dict[bytes, list[Properties]]) -> int | None:
    """The memory of QEMU's guest, with the DIMMs that it starts with. -m comes before the machine's own properties."""
    # What a generator has yielded may have grown since.
    together = {group: {key: value for each in some for key, value in each.items()} for group, some in settings.items()}
    given, machine = together.get(b"memory", {}), together.get(b"machine", {})
    backends = {each.get(b"id"): each.get(b"size", b"") for each in settings.get(b"object", [])}
    if b"size" in given or b"memory.size" in machine:
        size = _size(given[b"size"], b"m") if b"size" in given else _size(machine[b"memory.size"], b"b")
        sizes = [None if size is None else whole(size, RAM_UNIT)]
    else:
        sizes = [_size(backends.get(machine.get(b"memory-backend", b""), b""), b"b")]
    for each in settings.get(b"device", []):
        if each.get(b"driver") == b"pc-dimm":
            sizes.append(_size(backends.get(each.get(b"memdev", b""), b""), b"b"))
        elif each.get(b"driver", b"").startswith(_OTHER_MEMORY):
            sizes.append(None)
    known = [each for each in sizes if each is not None]
    return sum(known) if len(known) == len(sizes) and sum(known) <= SIZE_MAX else None


def _is_pluggable(settings: dict[bytes, list[Properties]]) -> bool:
    """Whether there is room for more memory, which takes no slot where that is virtio-mem."""
    memory, machine = (settings.get(group, []) for group in (b"memory", b"machine"))
    return any(b"maxmem" in each for each in memory) or any(b"memory.max-size" in each for each in machine)


def _memory_max(settings: dict[bytes, list[Properties]]) -> int | None:
    """The most memory that there is room for, by the last of those that say so; None where it is not said."""
    said = [_size(each[b"maxmem"], b"m") for each in settings.get(b"memory", []) if b"maxmem" in each]
    said = said or [
        _size(each[b"memory.max-size"], b"b") for each in settings.get(b"machine", []) if b"memory.max-size" in each
    ]
    return said[-1] if said else None


def _viommu(settings: dict[bytes, list[Properties]]) -> str | None:
    """What kind of IOMMU the guest has: "none" or "each"; None where its devices need not be alike in that.

    See pci_device_iommu_address_space() in hw/pci/pci.c.
    """
    devices, machine = settings.get(b"device", []), settings.get(b"machine", [])
    drivers = [each.get(b"driver", b"") for each in devices]
    of_machine = {key: value for each in machine for key, value in each.items() if key.startswith(b"iommu")}
    has = any(re.search(b"iommu|smmu", driver) for driver in drivers)
    if not has and {_BOOLEANS.get(each.lower(), each != b"none") for each in of_machine.values()} <= {False}:
        return "none"
    shares = any(re.search(b"bridge", driver) for driver in drivers)
    shares |= any(
        _SHARING.search(key) and _BOOLEANS.get(value.lower()) is not False
        # The machine's accel is another thing.
        for each in (*devices, *({key: each[key] for key in each if key != b"accel"} for each in machine))
        for key, value in each.items()
    )
    return None if shares else "each"


def _iommufds(settings: dict[bytes, list[Properties]]) -> list[tuple[bytes, int | None]] | None:
    """The iommufds that QEMU is given, by their names, each with its descriptor if it does not open that itself."""
    found: list[tuple[bytes, int | None]] = []
    for each in settings.get(b"object", []):
        if each.get(b"qom-type") == b"iommufd":
            fd, name = each.get(b"fd"), each.get(b"id", b"")
            if len(name) > _ID_MAX or (fd is not None and not re.fullmatch(rb"[0-9]{1,9}", fd)):
                return None
            found.append((name, None if fd is None else int(fd)))
    return found if len(found) <= _IOMMUFDS_MAX else None


def _locks(settings: dict[bytes, list[Properties]], lacks: bool) -> bool | None:
    """Whether QEMU locks its memory; `lacks`: not all that decides is known."""
    said = [each[b"mem-lock"] for each in settings.get(b"overcommit", []) if b"mem-lock" in each]
    # Of this one, which older versions have, it is the default.
    said += [each.get(b"mlock", b"on") for each in settings.get(b"realtime", [])]
    found = {_BOOLEANS.get(each) for each in said}
    if found - {False}:
        # Where they differ, it depends on the version which of them counts.
        return True if found == {True} else None
    return None if lacks else False


def _size(text: bytes, unit: bytes) -> int | None:
    """A size as QEMU reads it, in this unit without a suffix. None for what is no size, or more than any has."""
    found = _SIZE.fullmatch(text.lower())
    if not found:
        return None
    whole, part, suffix = found.groups(b"")
    digits = 10 ** len(part)
    size = (2 * int(whole + part) * _UNITS[suffix or unit] + digits) // (2 * digits)
    # Without any, it has what its version takes for the default.
    return size if 0 < size <= SIZE_MAX else None


def _memory_of_cloud_hypervisor(arguments: list[bytes]) -> int | None:
    """The memory of a guest of cloud-hypervisor. With zones, it is theirs. See vmm/src/config.rs."""
    words = [word for each in arguments for word in (each.split(b"=", 1) if each.startswith(b"--memory") else [each])]
    if b"--memory-zone" in words or words.count(b"--memory") != 1 or words[-1] == b"--memory":
        return None
    size = _split(words[words.index(b"--memory") + 1], b"").get(b"size", b"")
    return _size(size, b"b") if re.fullmatch(rb"[0-9]{1,18}[KMG]?", size) else None
