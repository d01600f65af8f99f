# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._qemu import (
    Guest,
    added_memory,
    guest_name,
    is_session_domain,
    look_at_guest,
)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([b"qemu", b"-name", b"guest=vm1,debug-threads=on"], b"vm1"),
        ([b"qemu", b"--name", b"debug-threads=on,guest=vm1"], b"vm1"),
        ([b"qemu", b"-name", b"guest=a,,b,debug-threads=on"], b"a,b"),
        ([b"qemu", b"-name", b"a,,b,debug-threads=on"], b"a,b"),
        ([b"qemu", b"-name", b"vm1"], b"vm1"),
        ([b"qemu", b"-name", b"debug-threads=on,vm1"], None),
        ([b"qemu", b"-name", b"vm1", b"-name", b"guest=vm2"], b"vm2"),
        ([b"qemu", b"-S", b"-name"], None),
        ([], None),
    ],
)
def test_the_guests_name(arguments: list[bytes], name: bytes | None) -> None:
    assert guest_name(arguments) == name


MIB, GIB = 2**20, 2**30
QEMU = b"/usr/bin/qemu-system-x86_64"


def nothing(_path: bytes) -> None:
    """No file can be read."""


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        (b"64", 64 * MIB),
        (b"size=65536k", 64 * MIB),
        (b"size=1G,slots=2,maxmem=4G", GIB),
        (b"maxmem=4G,size=1g", GIB),
        (b"1.5G", 3 * GIB // 2),
        (b"0.5", MIB // 2),
        (b"8.0000001K", 8192),
        (b"2T", 2**41),
        (b"8192b", 8192),
        # QEMU rounds it up.
        (b"65537K", 65544 * 1024),
        (b"1b", 8192),
        (b"0", None),
        (b"http.server", None),
        (b"slots=2", None),
        (b"64Q", None),
        (b"8388607T", 8388607 * 2**40),
        # More than any size has.
        (b"8388608T", None),
        (b"9" * 18 + b"T", None),
        (b"9" * 400, None),
        (b"1.", None),
        (b"size=", None),
    ],
)
def test_the_guests_memory(text: bytes, memory: int | None) -> None:
    assert look_at_guest(QEMU, [b"qemu", b"-m", text], nothing).memory == memory


DIMM = b'{"driver":"pc-dimm","node":0,"memdev":"pc.ram","id":"dimm0","slot":0,"addr":4294967296}'
JSON = b'{"qom-type":"memory-backend-memfd","id":"pc.ram","size":67108864,"x-use-canonical-path-for-ramblock-id":false}'


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        ("-m 1G -m 2G", 2 * GIB),
        ("-m 1G -m slots=2", GIB),
        ("--m 1G", GIB),
        ("-M q35,memory.size=2G", 2 * GIB),
        ("-machine q35,memory.size=4194304", 4 * MIB),
        ("-machine q35,memory.size=4097K", 4104 * 1024),
        # -m is the one that counts.
        ("-m 1G -M memory.size=2G", GIB),
        ("-machine memory-backend=a -object memory-backend-ram,id=a,size=3G", 3 * GIB),
        (
            "-object memory-backend-ram,id=b,size=1G -object memory-backend-ram,size=3G,id=a -M memory-backend=a",
            3 * GIB,
        ),
        (f"-machine q35,memory-backend=pc.ram -object {JSON.decode()}", 64 * MIB),
        # A backend's is rounded to pages only.
        ("-machine memory-backend=a -object memory-backend-ram,id=a,size=4100K", 4100 * 1024),
        # The DIMMs that it starts with, and what is in no DIMM
        ("-m 1G,slots=2,maxmem=8G -object memory-backend-ram,id=a,size=2G -device pc-dimm,memdev=a,id=d", 3 * GIB),
        ("-device pc-dimm,memdev=a -m 1G -object memory-backend-memfd,size=512M,id=a", 3 * GIB // 2),
        (f"-m 1G -object {JSON.decode()} -device {DIMM.decode()}", GIB + 64 * MIB),
        (f"-m 1G -object {JSON.decode()} -device {DIMM.decode()} -device pc-dimm,memdev=pc.ram", GIB + 128 * MIB),
        ("-m 1G -object memory-backend-ram,id=a,size=1G -numa node,memdev=a -device virtio-net-pci", GIB),
        ("-m 1G -object memory-backend-ram,id=a,size=1G -device ivshmem-plain,memdev=a", GIB),
        # Not told, or it changes as the guest runs
        ("-m 1G -device pc-dimm,memdev=a", None),
        ("-m 1G -device pc-dimm", None),
        ("-m 8388607T -object memory-backend-ram,id=a,size=8388607T -device pc-dimm,memdev=a", None),
        ("-m 1G -object memory-backend-ram,id=a,size=2G -device virtio-mem-pci,memdev=a,requested-size=1G", None),
        ("-m 1G -object memory-backend-file,id=a,size=2G -device nvdimm,memdev=a,label-size=128K", None),
        ("-m 1G -object memory-backend-file,id=a,size=2G -device virtio-pmem-pci,memdev=a", None),
        ("-machine memory-backend=a -object {nonsense", None),
        ("-machine memory-backend=a -object [1]", None),
        ("-object memory-backend-ram,id=a,size=3G", None),
        ("-m", None),
        ("", None),
    ],
)
def test_all_spellings_of_it(words: str, memory: int | None) -> None:
    assert look_at_guest(QEMU, [b"qemu", *words.encode().split()], nothing).memory == memory


@pytest.mark.parametrize(
    ("words", "updatable"),
    [
        ("-m 1G", False),
        ("-m 1G -machine q35,aux-ram-share=on", True),
        ("-M q35 -M aux-ram-share=yes", True),
        ("-machine q35,aux-ram-share=off", False),
        ("-machine q35 -object memory-backend-memfd,id=a,size=1G,share=on", False),
    ],
)
def test_whether_another_process_could_take_it_over(words: str, updatable: bool) -> None:
    assert look_at_guest(QEMU, [b"qemu", *words.encode().split()], nothing).updatable is updatable


@pytest.mark.parametrize(
    ("words", "pluggable"),
    [
        ("-m 1G", False),
        ("-m 1G,slots=0", False),
        ("-m 1G,slots=2,maxmem=4G", True),
        # For virtio-mem there is no need of a slot.
        ("-m 1G,maxmem=4G", True),
        ("-m 1G -m maxmem=4G,slots=1", True),
        ("-m 1G -M q35,memory.max-size=4G,memory.slots=1", True),
        ("-machine q35,memory.size=1G,memory.max-size=4G", True),
        ("-m 1G,slots=2,maxmem=4G -object memory-backend-ram,id=a,size=1G -device pc-dimm,memdev=a", True),
        # It is not known how much that is, to begin with.
        ("-m 1G,maxmem=4G -object memory-backend-ram,id=a,size=2G -device virtio-mem-pci,memdev=a", None),
        ("", None),
    ],
)
def test_whether_memory_can_be_plugged(words: str, pluggable: bool | None) -> None:
    assert look_at_guest(QEMU, [b"qemu", *words.encode().split()], nothing).pluggable is pluggable


@pytest.mark.parametrize(
    ("words", "most"),
    [
        ("-m 1G", None),
        ("-m 1G,maxmem=4G,slots=2", 4 * GIB),
        ("-m 1024,maxmem=4096", 4 * GIB),
        ("-m 1G,maxmem=4G -m maxmem=8G", 8 * GIB),
        ("-machine memory.size=1G,memory.max-size=4G", 4 * GIB),
        ("-m 1G,maxmem=much", None),
    ],
)
def test_the_most_memory_that_there_is_room_for(words: str, most: int | None) -> None:
    assert look_at_guest(QEMU, [b"qemu", *words.encode().split()], nothing).memory_max == most


@pytest.mark.parametrize(
    ("words", "pluggable"),
    [
        ("--memory size=1G", False),
        ("--memory size=1G,hotplug_size=2G", True),
        ("--memory=size=1G,hotplug_method=virtio-mem,hotplug_size=2G", True),
        ("--kernel k", None),
    ],
)
def test_whether_cloud_hypervisor_can_have_more(words: str, pluggable: bool | None) -> None:
    program = b"/usr/bin/cloud-hypervisor"
    assert look_at_guest(program, [program, *words.encode().split()], nothing).pluggable is pluggable


CONFIG = b"""# qemu config file

[memory]
  size = "1024"

[machine]
  type = "q35"
[object "ram"]
  size = "1G"
  qom-type = "memory-backend-ram"
nonsense
"""


@pytest.mark.parametrize(
    ("words", "text", "memory", "locks"),
    [
        ("-readconfig /etc/vm.cfg", CONFIG, GIB, False),
        ("-readconfig /etc/vm.cfg -m 2G", CONFIG, 2 * GIB, False),
        ("-m 2G -readconfig /etc/vm.cfg", CONFIG, GIB, False),
        ("-m 2G -readconfig /etc/vm.cfg", b"", 2 * GIB, False),
        # Who knows what is in there: a DIMM, too.
        ("-m 2G -readconfig /etc/vm.cfg", None, None, None),
        ("-readconfig /etc/vm.cfg -m 2G", None, None, None),
        (
            "-m 1G -readconfig /etc/vm.cfg",
            b'[object "a"]\nsize="1G"\n[device "d"]\ndriver="pc-dimm"\nmemdev="a"',
            2 * GIB,
            False,
        ),
        ("-readconfig /etc/vm.cfg -m slots=2", None, None, None),
        ("-readconfig /etc/vm.cfg -M memory-backend=ram", b'[object "ram"]\nsize="2G"', 2 * GIB, False),
        ("-readconfig /etc/vm.cfg", b'[machine]\nmemory.size = "4194304"', 4 * MIB, False),
        ("-readconfig /etc/vm.cfg", b'[overcommit]\nmem-lock = "on"', None, None),
        ("-readconfig /etc/vm.cfg -overcommit mem-lock=on", None, None, True),
        (" ".join(["-readconfig /etc/vm.cfg"] * 9), CONFIG, None, None),
    ],
)
def test_a_file_of_settings(words: str, text: bytes | None, memory: int | None, locks: bool | None) -> None:
    asked: list[bytes] = []

    def read(path: bytes) -> bytes | None:
        asked.append(path)
        return text

    guest = look_at_guest(QEMU, [b"qemu", *words.encode().split()], read)
    assert guest[:2] == (memory, locks)
    assert guest.pluggable is (None if memory is None else False)
    assert set(asked) == {b"/etc/vm.cfg"}
    assert len(asked) <= 8


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("-m 1G", False),
        ("-runas vm", True),
        ("-run-with user=vm", True),
        ("--run-with chroot=/srv,user=vm", True),
        ("-run-with chroot=/srv", False),
        ("-name runas", False),
    ],
)
def test_whether_it_becomes_another_user(words: str, changes: bool) -> None:
    assert look_at_guest(QEMU, [b"qemu", *words.encode().split()], lambda _path: None).changes_user is changes


@pytest.mark.parametrize(
    ("words", "locks"),
    [
        ("-m 1G", False),
        ("-overcommit mem-lock=on", True),
        ("-overcommit cpu-pm=on,mem-lock=on-fault", True),
        ("-overcommit mem-lock", True),
        ("-overcommit mem-lock=off", False),
        ("-overcommit cpu-pm=on", False),
        ("-realtime mlock=on", True),
        ("-realtime mlock=off", False),
        ("-realtime x=y", True),
        ("-overcommit mem-lock=off -overcommit mem-lock=on", None),
        ("-overcommit mem-lock=perhaps", None),
    ],
)
def test_whether_it_locks_its_memory(words: str, locks: bool | None) -> None:
    assert look_at_guest(QEMU, [b"qemu", *words.encode().split()], nothing).locks is locks


@pytest.mark.parametrize(
    ("program", "words", "memory"),
    [
        ("/usr/libexec/qemu-kvm", "-m 64", 64 * MIB),
        ("/nix/store/x/bin/.qemu-system-x86_64-wrapped", "-m 64", 64 * MIB),
        ("/usr/bin/kvm", "-m 64", 64 * MIB),
        # What it is for others: a mask of processors, for one.
        ("/usr/bin/spdk_tgt", "-m 64", None),
        ("/opt/qemu/bin/dpdk-testpmd", "-m 64", None),
        ("", "-m 64", None),
        ("/usr/bin/cloud-hypervisor", "--memory size=4G,shared=on", 4 * GIB),
        ("/usr/bin/cloud-hypervisor-static", "--memory=size=512M", 512 * MIB),
        ("/usr/bin/cloud-hypervisor", "--memory size=1073741824", GIB),
        ("/usr/bin/cloud-hypervisor", "--memory size=0 --memory-zone id=a,size=4G", None),
        ("/usr/bin/cloud-hypervisor", "--memory size=1.5G", None),
        ("/usr/bin/cloud-hypervisor", "--cpus boot=1 --memory", None),
        ("/usr/bin/cloud-hypervisor", "-m 64", None),
    ],
)
def test_each_program_means_something_else(program: str, words: str, memory: int | None) -> None:
    guest = look_at_guest(program.encode(), [b"qemu", *words.encode().split()], nothing)
    assert guest[:2] == (memory, False if "-m 64" in words and memory else None)
    assert guest.pluggable is (None if memory is None else False)


def test_a_file_may_have_room_for_more() -> None:
    text = b'[memory]\n size = "1G"\n maxmem = "4G"'
    guest = look_at_guest(QEMU, [b"qemu", b"-readconfig", b"/etc/vm.cfg"], lambda _path: text)
    assert (guest.memory, guest.pluggable) == (GIB, True)


def test_a_command_line_that_is_hidden() -> None:
    assert look_at_guest(QEMU, [], nothing) == Guest(None, None)


def test_a_domain_of_a_users_session_is_known_by_its_folder() -> None:
    key = b'{"qom-type":"secret","file":"%s/domain-1-vm1/master-key.aes"}'
    assert is_session_domain([b"qemu", b"-object", key % b"/home/alice/.config/libvirt/qemu/lib"])
    assert not is_session_domain([b"qemu", b"-object", key % b"/var/lib/libvirt/qemu"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", 0),
        ("-object memory-backend-file,id=s,size=256M -device ivshmem-plain,id=x,memdev=s", 256 * MIB),
        ('-object {"qom-type":"memory-backend-ram","id":"s","size":65536} -device {"driver":"x","memdev":"s"}', 65536),
        ("-object memory-backend-file,id=s,size=0x100 -device ivshmem-plain,memdev=s", None),
        ("-device ivshmem-plain,memdev=s", None),
        ("-device ivshmem-doorbell,chardev=c", None),
        # What is not used is not mapped, and what is the guest's own counts as that.
        ("-object memory-backend-ram,id=s,size=1G", 0),
        ("-object memory-backend-ram,id=s,size=1G -device pc-dimm,memdev=s", 0),
        ("-object memory-backend-file,id=s,size=1M -device nvme,pmrdev=s,serial=1", MIB),
        ("-device VGA", 16 * MIB),
        ("-vga std", 16 * MIB),
        ("-vga none", 0),
        ("-vga cirrus", 4 * MIB),
        ("-device VGA,vgamem_mb=64", 64 * MIB),
        ("-device VGA,vgamem_mb=65", 128 * MIB),
        ("-global VGA.vgamem_mb=256 -vga std", 256 * MIB),
        ("-global VGA.vgamem_mb=256", 0),
        ("-device bochs-display,vgamem=33554432", 32 * MIB),
        ("-device virtio-gpu-pci", 0),
        ("-device virtio-gpu-gl-pci,hostmem=8G,blob=on", 8 * GIB),
        ("-device vhost-user-fs-pci,chardev=c,tag=t", 0),
        ("-device vhost-user-fs-pci,chardev=c,tag=t,cache-size=2G", 2 * GIB),
        ("-device qxl-vga", 128 * MIB),
        ("-vga qxl", 128 * MIB),
        ("-device qxl-vga,ram_size=67108864,vram_size=33554432,vram64_size_mb=0,vgamem_mb=16", 96 * MIB),
        ("-device qxl,ram_size_mb=1024,vram_size_mb=64,vram64_size_mb=2048,vgamem_mb=16", (1024 + 64 + 2048) * MIB),
        ("-device qxl,vgamem_mb=256,vram_size_mb=64", (512 + 64) * MIB),
        ("-device qxl,vgamem_mb=much", None),
        ("-set device.video0.vgamem_mb=512", None),
        ("-readconfig /etc/vm.cfg", None),
    ],
)
def test_memory_of_emulated_devices(words: str, expected: int | None) -> None:
    arguments = [b"qemu", b"-m", b"64", b"-nodefaults", *words.encode().split()]
    assert look_at_guest(QEMU, arguments, nothing).of_devices == expected


def test_a_display_of_its_own_accord() -> None:
    assert look_at_guest(QEMU, [b"qemu", b"-m", b"64"], nothing).of_devices == 16 * MIB


def test_what_arguments_add_counts_whatever_it_is() -> None:
    """Those of a domain, whose memory is known by other means."""
    words = "-object memory-backend-ram,id=s,size=1G -device pc-dimm,memdev=s -device VGA"
    assert added_memory(words.encode().split()) == GIB + 16 * MIB
    assert added_memory([]) == 0
    assert added_memory([b"-readconfig", b"/etc/vm.cfg"]) is None


@pytest.mark.parametrize(("words", "expected"), [("", 0), ("--pmem file=/x", None), ("--fs tag=t,socket=s", None)])
def test_memory_of_devices_of_cloud_hypervisor(words: str, expected: int | None) -> None:
    arguments = [b"ch", *f"--memory size=1G {words}".encode().split()]
    assert look_at_guest(b"/usr/bin/cloud-hypervisor", arguments, nothing).of_devices == expected


@pytest.mark.parametrize(
    ("words", "viommu"),
    [
        ("-device vfio-pci,iommufd=i", "none"),
        ("-machine q35,default-bus-bypass-iommu=on", "none"),
        ("-M virt,iommu=none", "none"),
        ("-device intel-iommu,caching-mode=on,aw-bits=39", "each"),
        ('-device {"driver":"virtio-iommu-pci","boot-bypass":false}', "each"),
        ("-M virt,iommu=smmuv3", "each"),
        ("-device virtio-iommu-pci,boot-bypass=on -machine q35,accel=kvm", "each"),
        ("-device amd-iommu -device pxb-pcie,bus_nr=64,bypass_iommu=off -device pcie-root-port,bus=pcie.0", "each"),
        ("-device intel-iommu -machine q35,default_bus_bypass_iommu=off", "each"),
        # Some of its devices may share a space.
        ("-device intel-iommu -device pxb-pcie,id=px,bus_nr=64,bypass_iommu=on", None),
        ("-device intel-iommu -machine q35,default-bus-bypass-iommu=on", None),
        ("-device intel-iommu -device pcie-pci-bridge,id=p", None),
        ("-device intel-iommu,x-flts=on", None),
        ("-device arm-smmuv3,primary-bus=pcie.0", None),
        ("-device intel-iommu -global pxb-pcie.bypass_iommu=on", None),
        ("-device arm-smmuv3,accel=on", None),
        ("-readconfig file", None),
    ],
)
def test_whether_devices_are_alike_behind_an_iommu(words: str, viommu: str | None) -> None:
    assert look_at_guest(QEMU, [b"qemu", *words.encode().split()], nothing).viommu == viommu


@pytest.mark.parametrize(
    ("words", "viommu"), [("--memory size=1G", "none"), ("--memory size=1G --device iommu=on", None)]
)
def test_the_iommu_of_cloud_hypervisor_is_not_known(words: str, viommu: str | None) -> None:
    program = b"/usr/bin/cloud-hypervisor"
    assert look_at_guest(program, [program, *words.encode().split()], nothing).viommu == viommu


@pytest.mark.parametrize(
    ("words", "iommufds"),
    [
        ("-m 64", []),
        ("-object iommufd,id=i0,fd=3 -object iommufd,id=i1", [(b"i0", 3), (b"i1", None)]),
        ('-object {"qom-type":"iommufd","id":"iommufd0"}', [(b"iommufd0", None)]),
        ("-object iommufd,id=i0,fd=name", None),
        (f"-object iommufd,id={'i' * 64}", None),
        ("-object iommufd,id=i " * 17, None),
        ("-readconfig file", None),
    ],
)
def test_the_iommufds_that_it_is_given(words: str, iommufds: list[tuple[bytes, int | None]] | None) -> None:
    assert look_at_guest(QEMU, [b"qemu", *words.encode().split()], nothing).iommufds == iommufds
