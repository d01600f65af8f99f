# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The words in which QEMU says that it cannot have memory, and what it pins, as the guide has them."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.tests.kernel.harness import (
    CONTAINER,
    DEVICES,
    MIB,
    PAGE,
    PATIENCE,
    VM,
    as_user,
    execute,
    kernel_config,
)
from ansible_collections.virt.iommufd.tests.kernel.info import look, process

pytestmark = pytest.mark.host

MEMORY = 64 * MIB
BAR = MIB
ENOUGH = 4 * MEMORY
QEMU = ["qemu-system-x86_64", "-machine", "q35", "-display", "none", "-nodefaults"]
# What it keeps translated code in is memory that it may lock, too.
TCG = "tcg,tb-size=16"
NO_MEMORY = r"memory listener initialization failed: Region .*: vfio_container_dma_map\(.*\) = -12 \(Cannot allocate"
LOCKS = ["-m", "64", "-overcommit", "mem-lock=on"]
CAPABLE = ["--inh-caps=+ipc_lock", "--ambient-caps=+ipc_lock"]


class Vm:
    """QEMU of an ordinary user, or of root, with its limits and with what it said."""

    def __init__(
        self,
        log: Path,
        *words: str,
        limit: str = f"--memlock={ENOUGH}",
        capable: bool = False,
        root: bool = False,
        accel: str = TCG,
        fds: tuple[int, ...] = (),
    ) -> None:
        self._log = log
        user = [] if root else [*as_user(VM), *CAPABLE * capable]
        command = ["prlimit", limit, *user, *QEMU, "-accel", accel, *words]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, pass_fds=fds
            )

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def counted(self, name: str) -> int:
        """What it has pinned (VmPin) or locked (VmLck)."""
        [line] = re.findall(f"^{name}:.*", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        return int(line.split()[1]) * 1024

    def wait_until_counted(self, name: str, size: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.counted(name) < size:
            assert self.runs, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)

    def wait_until_said(self, pattern: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.said, re.MULTILINE):
            assert self.runs, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)


def refused(log: Path, *words: str, limit: str = f"--memlock={MEMORY}") -> str:
    """What QEMU says before it ends with an error. It is paused, so nothing but its start can fail."""
    with Vm(log, "-S", *words, limit=limit) as vm:
        assert vm.process.wait(PATIENCE) == 1
        return vm.said


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def address(node: str) -> str:
    """Where a device is on its bus."""
    return Path("/sys/class/vfio-dev", Path(node).name, "device").resolve().name


@pytest.fixture
def by_iommufd() -> list[str]:
    return ["-object", "iommufd,id=iommufd0", "-device", f"vfio-pci,host={address(DEVICES[0])},iommufd=iommufd0"]


@contextlib.contextmanager
def mode(path: str, bits: int) -> Iterator[None]:
    """Has a node's permissions changed."""
    before = os.stat(path).st_mode
    os.chmod(path, bits)
    try:
        yield
    finally:
        os.chmod(path, before)


@pytest.fixture
def by_container(container_is_iommufd: bool) -> Iterator[list[str]]:
    """The legacy container, which a user may open."""
    if not container_is_iommufd:
        execute("modprobe", "vfio_iommu_type1")
    device = address(DEVICES[1])
    group = Path("/sys/bus/pci/devices", device, "iommu_group").resolve().name
    with mode(CONTAINER, 0o666), mode(f"/dev/vfio/{group}", 0o666):
        yield ["-device", f"vfio-pci,host={device}"]


def test_an_iommufd_beyond_the_limit(log: Path, by_iommufd: list[str]) -> None:
    told = refused(log, "-m", "64", *by_iommufd)
    assert re.search(NO_MEMORY, told)
    assert "group" not in told


def test_one_that_becomes_a_user_after_it_has_pinned(tmp_path: Path, by_iommufd: list[str]) -> None:
    """It is charged to nobody, though it has all that one has that is charged to that user."""
    other = ["-object", "iommufd,id=iommufd0", "-device", f"vfio-pci,host={address(DEVICES[1])},iommufd=iommufd0"]
    once = f"--memlock={MEMORY + MEMORY // 2}"
    user = pwd.getpwuid(VM).pw_name
    with Vm(tmp_path / "one", "-S", "-m", "64", *by_iommufd, "-run-with", f"user={user}", limit=once, root=True) as one:
        one.wait_until_counted("VmPin", MEMORY)
        deadline = time.monotonic() + PATIENCE
        while os.stat(f"/proc/{one.process.pid}").st_uid != VM:
            assert time.monotonic() < deadline, one.said
            time.sleep(0.2)
        row = process(look(), one.process.pid)
        assert row["capabilities"]["effective"] == []
        assert [each["rlimit_mode"] for each in row["iommufds"]] == ["user"]
        assert row["accounting"] is None
        assert "become another user once it has its devices" in row["notes"][0]
        # The sum of both is more than the limit of either.
        with Vm(tmp_path / "two", "-S", "-m", "64", *other, limit=once) as two:
            two.wait_until_counted("VmPin", MEMORY)
            assert process(look(), two.process.pid)["accounting"] == "user"


def test_the_legacy_container_beyond_the_limit(log: Path, by_container: list[str], container_is_iommufd: bool) -> None:
    """Where iommufd provides the container, QEMU 11 has other words."""
    told = refused(log, "-m", "64", *by_container)
    if container_is_iommufd:
        assert re.search(r"error getting device from group \d+: Cannot allocate memory\n", told)
    else:
        assert re.search(rf"failed to setup container for group \d+: {NO_MEMORY}", told)
    with Vm(log, "-S", "-m", "64", *by_container) as vm:
        vm.wait_until_counted("VmLck", MEMORY)


def test_both_backends(log: Path, by_iommufd: list[str], by_container: list[str], container_is_iommufd: bool) -> None:
    """QEMU 11 with the container that iommufd provides breaks down, whatever the limit."""
    with Vm(log, "-S", "-m", "64", *by_iommufd, *by_container) as vm:
        if container_is_iommufd:
            assert vm.process.wait(PATIENCE) == -signal.SIGABRT
            assert "VFIO_IOMMU_LEGACY: Object" in vm.said
            assert "is not an instance of type vfio-iommu-legacy\n" in vm.said
        else:
            vm.wait_until_counted("VmPin", MEMORY)
            vm.wait_until_counted("VmLck", MEMORY)


def test_locked_memory_beyond_the_limit(log: Path) -> None:
    told = refused(log, *LOCKS, limit=f"--memlock={MEMORY // 2}")
    assert "mlockall: Cannot allocate memory\n" in told
    assert "locking memory failed\n" in told


def test_what_is_locked_is_more_than_the_memory(log: Path) -> None:
    with Vm(log, "-S", *LOCKS, limit="--memlock=unlimited") as vm:
        vm.wait_until_counted("VmLck", MEMORY + MIB)


def test_what_is_mapped_once_it_locks_counts_twice_for_a_moment(log: Path) -> None:
    """A limit that holds what is locked in the end is too small, and no lack of memory. With a little more, it runs."""
    with Vm(log, "-S", *LOCKS, limit="--memlock=unlimited") as vm:
        vm.wait_until_counted("VmLck", MEMORY + MIB)
        locked = 0
        while locked != vm.counted("VmLck"):
            locked = vm.counted("VmLck")
            time.sleep(2)
    told = refused(log, *LOCKS, limit=f"--memlock={locked}")
    assert re.search("cannot set up guest memory '.*': Resource temporarily unavailable\n", told)
    with Vm(log, "-S", *LOCKS, limit=f"--memlock={locked + 4 * MIB}") as vm:
        vm.wait_until_counted("VmLck", locked)


def test_an_iommufd_that_may_not_be_opened(log: Path, by_iommufd: list[str]) -> None:
    with mode("/dev/iommu", 0o600):
        told = refused(log, "-m", "64", *by_iommufd, limit=f"--memlock={ENOUGH}")
    assert "Could not open '/dev/iommu': Permission denied\n" in told


def test_a_host_without_memory(log: Path) -> None:
    told = refused(log, "-m", "8G", limit=f"--as={2**32}")
    assert "cannot set up guest memory 'pc.ram': Cannot allocate memory\n" in told


def test_a_host_without_huge_pages(log: Path) -> None:
    assert Path("/proc/sys/vm/nr_hugepages").read_text() == "0\n"
    huge = ["-object", "memory-backend-memfd,hugetlb=on,id=memory,size=64M", "-machine", "memory-backend=memory"]
    told = refused(log, "-m", "64", *huge)
    assert "unable to map backing store for guest RAM: Cannot allocate memory\n" in told


def test_memory_that_cannot_be_pinned(
    log: Path, by_iommufd: list[str], by_container: list[str], container_is_iommufd: bool
) -> None:
    """That of a device, in the place of the guest's. No limit is in force, and the error is none of a limit."""
    other = f"/sys/bus/pci/devices/{address(DEVICES[2])}/resource0"
    memory = ["-m", "1M", "-object", f"memory-backend-file,id=memory,size={BAR},mem-path={other},share=on"]
    memory += ["-machine", "memory-backend=memory"]
    with mode(other, 0o666):
        told = refused(log, *memory, *by_iommufd, limit="--memlock=unlimited")
        # QEMU 11 hands over the file, which the kernel does not take.
        error = r"-22 \(Invalid argument\)" if container_is_iommufd else r"-14 \(Bad address\)"
        assert re.search(rf"memory listener initialization failed: .*vfio_container_dma_map\(.*\) = {error}\n", told)
        if container_is_iommufd:
            told = refused(log, *memory, *by_container, limit="--memlock=unlimited")
            assert re.search(r"error getting device from group \d+: Bad address\n", told)
        else:
            # The legacy container takes it.
            with Vm(log, "-S", *memory, *by_container) as vm:
                vm.wait_until_said("Cannot reset device")


def test_a_devices_own_memory(log: Path, by_iommufd: list[str]) -> None:
    """The firmware has it mapped. A kernel that cannot do that makes QEMU warn and go on. It counts for nobody."""
    with Vm(log, "-m", "64", *by_iommufd, "-trace", "iommufd_backend_map*") as vm:
        # The device has one region of this size, and nothing else has it.
        vm.wait_until_said(rf"^iommufd_backend_map\w*dma .* size={BAR:#x} .*\(-?\d+\)$")
        if "CONFIG_VFIO_PCI_DMABUF=y" in kernel_config():
            assert re.search(rf"^iommufd_backend_map_file_dma .* size={BAR:#x} .*\(0\)$", vm.said, re.MULTILINE)
        else:
            vm.wait_until_said(r"warning: IOMMU_IOAS_MAP failed: Bad address, PCI BAR\?$")
            vm.wait_until_said(r"warning: vfio_container_dma_map\(.*\) = -14 \(Bad address\)$")
        vm.wait_until_counted("VmPin", MEMORY)
        assert vm.counted("VmPin") < MEMORY + BAR
        assert vm.runs
        assert ("Bad address" in vm.said) is ("CONFIG_VFIO_PCI_DMABUF=y" not in kernel_config())


def test_memory_of_an_emulated_device(log: Path, by_iommufd: list[str]) -> None:
    """It is pinned like the guest's, once the firmware has it mapped."""
    shared = 32 * MIB
    more = ["-object", f"memory-backend-memfd,id=shared,size={shared},share=on"]
    with Vm(log, "-m", "64", *by_iommufd, *more, "-device", "ivshmem-plain,memdev=shared") as vm:
        vm.wait_until_counted("VmPin", MEMORY + shared)
        [row] = look(pids=[vm.process.pid])["processes"]
        assert row["of_devices_bytes"] == shared


@pytest.mark.parametrize("times", [1, 2])
def test_memory_of_an_emulated_device_beyond_the_limit(times: int, log: Path, by_iommufd: list[str]) -> None:
    """It starts, and ends once the firmware has that mapped, which is done in each address space."""
    shared = 32 * MIB
    second = ["-object", "iommufd,id=second", "-device", f"vfio-pci,host={address(DEVICES[1])},iommufd=second"]
    words = ["-m", "64", "-machine", "smm=off", "-object", f"memory-backend-memfd,id=shared,size={shared},share=on"]
    words += [*by_iommufd, *second * (times - 1), "-device", "ivshmem-plain,memdev=shared"]
    size = times * (MEMORY + MIB // 4 + shared)
    with Vm(log, *words, limit=f"--memlock={size}") as vm:
        vm.wait_until_counted("VmPin", size)
        time.sleep(1)
        assert vm.runs
    with Vm(log, *words, limit=f"--memlock={size - PAGE}") as vm:
        assert vm.process.wait(PATIENCE) != 0
        assert re.search(r"DMA mapping failed, unable to continue", vm.said)


@pytest.mark.parametrize("capable", [False, True])
def test_vdpa_beyond_the_limit(capable: bool, log: Path, vdpa: str) -> None:
    """QEMU 11 tries it at once, and QEMU 10 only when the firmware starts the device. Both go on without it."""
    device = ["-netdev", f"vhost-vdpa,vhostdev={vdpa},id=net", "-device", "virtio-net-pci,netdev=net"]
    # Without memory for the processor's system management, which QEMU 11 maps at first
    device += ["-m", "64", "-machine", "smm=off"]
    firmware = MIB // 4
    size = MEMORY + firmware
    with Vm(log, *device, limit=f"--memlock={size}", capable=capable) as vm:
        vm.wait_until_counted("VmPin", size)
        assert "Bad address" not in vm.said
    with Vm(log, *device, limit=f"--memlock={size - PAGE}", capable=capable) as vm:
        vm.wait_until_said(r"failed to write, fd=\d+, errno=14 \(Bad address\)$")
        vm.wait_until_said("vhost vdpa map fail!$")
        vm.wait_until_said("vhost-vdpa: DMA mapping failed, unable to continue$")
        time.sleep(1)
        assert vm.runs
