# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _device, _host_facts
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._host_facts import Emulator, Node, Running, Vfio, VfioNode
from ansible_collections.virt.iommufd.plugins.module_utils._paths import Writer
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel

NULL = os.stat(os.devnull).st_rdev


@pytest.fixture
def sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for /sys, and beside it `modules` for /lib/modules."""
    monkeypatch.setattr(_host_facts, "_SYS", str(tmp_path / "sys"))
    monkeypatch.setattr(_host_facts, "_MODULES", str(tmp_path / "modules"))
    return tmp_path / "sys"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "rdev", "state"),
    [
        ({"sys/module/iommufd/initstate": "live"}, NULL, "loaded"),
        ({"sys/module/iommufd/parameters/x": ""}, NULL, "builtin"),
        ({"modules/6/modules.builtin": "kernel/drivers/iommu/iommufd/iommufd.ko\n"}, None, "builtin"),
        ({"modules/6/modules.dep": "kernel/drivers/iommu/iommufd/iommufd.ko.xz: a.ko\n"}, None, "loadable"),
        ({"modules/6/modules.dep": "kernel/drivers/iommu/iommufd/iommufd.ko:\n"}, None, "loadable"),
        ({"modules/6/modules.dep": "kernel/a/my-iommufd.ko:\nb.ko: kernel/iommufd.ko\n"}, None, "absent"),
        ({"modules/7/modules.dep": "iommufd.ko:\n"}, None, None),
    ],
)
def test_where_iommufd_is(
    sys: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], rdev: int | None, state: str | None
) -> None:
    monkeypatch.setattr(_host_facts, "misc_rdev", lambda: rdev)
    for name, text in files.items():
        write(sys.parent / name, text)
    assert _host_facts.find_module("6") == state


def test_a_node() -> None:
    status = os.stat(os.devnull)
    assert _host_facts.look_at_node(os.devnull) == Node(NULL, f"{status.st_mode & 0o7777:04o}", "root", "root")
    assert _host_facts.look_at_node("/") is None
    assert _host_facts.look_at_node("/nowhere") is None


def test_what_an_iommufd_of_our_own_answers(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "DEVICE", os.devnull)
    monkeypatch.setattr(_device, "misc_rdev", lambda: NULL)
    assert (_host_facts.try_iommufd().readable, _host_facts.try_iommufd().settable) == (True, True)
    kernel.privileged = False
    assert (_host_facts.try_iommufd().readable, _host_facts.try_iommufd().settable) == (True, False)
    kernel.without = errno.EOPNOTSUPP
    assert (_host_facts.try_iommufd().readable, _host_facts.try_iommufd().settable) == (False, False)
    assert kernel.mode == 0


@pytest.mark.parametrize(
    ("device", "rdev", "words"),
    [
        (os.devnull, None, "This kernel has no iommufd: load the module"),
        ("/dev/zero", NULL, "/dev/zero is not the kernel's iommufd but something else"),
        ("/nowhere", NULL, "There is no /nowhere: load the module"),
    ],
)
def test_nothing_else_is_opened(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, device: str, rdev: int | None, words: str
) -> None:
    monkeypatch.setattr(_device, "DEVICE", device)
    monkeypatch.setattr(_device, "misc_rdev", lambda: rdev)
    scratch = _host_facts.try_iommufd()
    assert (scratch.readable, scratch.settable) == (None, None)
    assert words in scratch.msg
    assert kernel.calls == []


@pytest.mark.parametrize(("text", "holders", "count"), [("3", ["vfio"], 2), ("0", [], 0), (None, ["vfio"], 0)])
def test_how_many_iommufds_are_open(sys: Path, text: str | None, holders: list[str], count: int) -> None:
    if text is not None:
        write(sys / "module/iommufd/refcnt", f"{text}\n")
    for each in holders:
        write(sys / "module/iommufd/holders" / each)
    assert _host_facts.count_iommufds() == count


def test_a_link_to_the_node_will_do(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "iommu").symlink_to(os.devnull)
    monkeypatch.setattr(_device, "DEVICE", str(tmp_path / "iommu"))
    monkeypatch.setattr(_device, "misc_rdev", lambda: NULL)
    assert _host_facts.try_iommufd().readable


def test_it_may_not_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(_device, "DEVICE", os.devnull)
    monkeypatch.setattr(_device, "misc_rdev", lambda: NULL)
    monkeypatch.setattr(os, "open", refuse)
    assert "cannot be opened by uid" in _host_facts.try_iommufd().msg


@pytest.mark.parametrize(("text", "scope"), [("2\n", 2), ("two", None), (None, None)])
def test_yama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, scope: int | None) -> None:
    if text is not None:
        write(tmp_path / "ptrace_scope", text)
    monkeypatch.setattr(_host_facts, "_YAMA", str(tmp_path / "ptrace_scope"))
    assert _host_facts.read_yama_scope() == scope


@pytest.mark.parametrize(
    ("options", "hides"),
    [
        ("rw", None),
        ("rw,hidepid=0", None),
        ("rw,hidepid=off", None),
        ("rw,gid=4,hidepid=invisible", "hidepid=invisible"),
        ("rw,hidepid=2", "hidepid=2"),
    ],
)
def test_proc_may_hide_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, hides: str | None
) -> None:
    line = "22 28 0:21 / {} rw,nosuid shared:5 - {} proc {}\n"
    lines = line.format("/sys", "sysfs", "hidepid=2") + line.format("/proc", "proc", options)
    write(tmp_path / "mountinfo", lines)
    monkeypatch.setattr(_host_facts, "_MOUNTINFO", str(tmp_path / "mountinfo"))
    assert _host_facts.read_hidepid() == hides
    monkeypatch.setattr(_host_facts, "_MOUNTINFO", str(tmp_path / "nowhere"))
    assert _host_facts.read_hidepid() is None


def test_the_nodes_of_vfio(sys: Path) -> None:
    (sys / "kernel/iommu_groups/5/devices").mkdir(parents=True)
    (sys / "kernel/iommu_groups/12/devices/0000:00:1f.0").mkdir(parents=True)
    for name, rdev in (("vfio-dev/vfio0", "511:0\n"), ("vfio/5", "242:0\n"), ("vfio/noiommu-0", "242:1\n")):
        write(sys / "class" / name / "dev", rdev)
    write(sys / "class/vfio-dev/vfio1/dev", "gone")
    write(sys / "class/vfio/vfio/dev", "10:196\n")
    device = on_bus(sys, "pci", "0000:00:05.0")
    (sys / "kernel/iommu_groups/5/devices/0000:00:05.0").symlink_to(device)
    (sys / "class/vfio-dev/vfio0/device").symlink_to(device)
    assert _host_facts.find_iommu_groups() == {5: ["0000:00:05.0"], 12: ["0000:00:1f.0"]}
    assert _host_facts.find_vfio_nodes() == {
        os.makedev(511, 0): VfioNode("/dev/vfio/devices/vfio0", ["0000:00:05.0"], 5, of_group=False, as_it_runs=False),
        os.makedev(242, 0): VfioNode("/dev/vfio/5", ["0000:00:05.0"], 5, of_group=True, as_it_runs=False),
        # Its device is gone.
        os.makedev(242, 1): VfioNode("/dev/vfio/noiommu-0", [], 0, of_group=True, as_it_runs=None),
    }
    assert _host_facts.find_iommus() == []


def on_bus(sys: Path, bus: str | None, name: str) -> Path:
    """A device as sysfs has it, on a bus; None without one."""
    device = sys / "devices" / name
    device.mkdir(parents=True)
    if bus is not None:
        (sys / "bus" / bus).mkdir(parents=True, exist_ok=True)
        (device / "subsystem").symlink_to(sys / "bus" / bus)
    return device


@pytest.mark.parametrize(
    ("buses", "as_it_runs"),
    [
        (["mdev"], True),
        (["pci"], False),
        (["platform"], False),
        ([None], None),
        (["pci", "pci"], False),
        (["pci", "mdev", None], True),
        (["pci", None], None),
    ],
)
def test_a_node_of_a_device_that_pins_as_it_runs(sys: Path, buses: list[str | None], as_it_runs: bool | None) -> None:
    """Whether it is had by its own node, or by that of its group."""
    for number, bus in enumerate(buses):
        device = on_bus(sys, bus, f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{number}")
        group = sys / "kernel/iommu_groups/7/devices"
        group.mkdir(parents=True, exist_ok=True)
        (group / device.name).symlink_to(device)
        write(sys / f"class/vfio-dev/vfio{number}/dev", f"511:{number}\n")
        (sys / f"class/vfio-dev/vfio{number}/device").symlink_to(device)
    write(sys / "class/vfio/7/dev", "242:0\n")
    found = _host_facts.find_vfio_nodes()
    assert found[os.makedev(242, 0)].as_it_runs is as_it_runs
    own = [found[os.makedev(511, number)].as_it_runs for number in range(len(buses))]
    assert own == [None if bus is None else bus == "mdev" for bus in buses]


def test_nodes_of_vdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host_facts, "_SYS", str(tmp_path))
    assert _host_facts.find_vdpa_nodes() == {}
    for name, text in (("vdpa0/vhost-vdpa-3/dev", "511:3\n"), ("vdpa1/virtio1/dev", "511:4\n"), ("vdpa2/x", "")):
        write(tmp_path / "bus/vdpa/devices" / name, text)
    assert _host_facts.find_vdpa_nodes() == {os.makedev(511, 3): "/dev/vhost-vdpa-3"}


@pytest.mark.parametrize(
    ("names", "iommu"), [([], False), (["vfio-noiommu"], False), (["vfio-noiommu", None], True), (["dmar"], True)]
)
def test_an_iommu_that_the_kernel_drives(sys: Path, names: list[str | None], iommu: bool) -> None:
    assert _host_facts.has_iommu() is None
    (sys / "kernel").mkdir(parents=True)
    for number, name in enumerate(names):
        (sys / f"kernel/iommu_groups/{number}/devices").mkdir(parents=True)
        if name is not None:
            write(sys / f"kernel/iommu_groups/{number}/name", f"{name}\n")
    assert _host_facts.has_iommu() is iommu


def test_what_vfio_has(sys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host_facts, "_NODES", str(sys.parent / "nodes"))
    assert _host_facts.look_at_vfio("6") == Vfio(False, [], [], None)
    for name, config in (("6", "CONFIG_VFIO_DEVICE_CDEV=y"), ("7", "# CONFIG_VFIO_DEVICE_CDEV is not set")):
        write(sys.parent / f"modules/{name}/config", f"CONFIG_A=y\n{config}\n")
    driver = sys / "bus/pci/drivers/vfio-pci"
    write(driver / "bind")
    assert _host_facts.look_at_vfio("6") == Vfio(True, [], [], True)
    assert _host_facts.look_at_vfio("7").offers_nodes is False
    # One that another driver has, one without a node, and one of a kernel that makes none.
    for name, address, node in (("vfio0", "0000:00:05.0", True), ("vfio1", "0000:00:04.0", False)):
        (sys / "devices" / address).mkdir(parents=True)
        (sys / "class/vfio-dev" / name).mkdir(parents=True)
        (sys / "class/vfio-dev" / name / "device").symlink_to(sys / "devices" / address)
        if node:
            write(sys.parent / "nodes" / name)
    for address in ("0000:00:04.0", "0000:00:06.0"):
        write(sys / "devices" / address / "vendor")
        (driver / address).symlink_to(sys / "devices" / address)
    bound = ["0000:00:04.0", "0000:00:05.0", "0000:00:06.0"]
    assert _host_facts.look_at_vfio("6") == Vfio(True, bound, ["0000:00:04.0", "0000:00:06.0"], True)


@pytest.mark.parametrize("answer", [True, False, None])
def test_the_container_is_opened_where_the_kernel_has_it(
    sys: Path, monkeypatch: pytest.MonkeyPatch, answer: bool | None
) -> None:
    """Elsewhere, to open the node would have it load a module."""
    monkeypatch.setattr(_host_facts, "vfio_container_is_iommufd", pytest.fail)
    assert _host_facts.ask_vfio_container() is None
    write(sys / "class/misc/vfio/dev", "10:196\n")
    monkeypatch.setattr(_host_facts, "vfio_container_is_iommufd", lambda: answer)
    assert _host_facts.ask_vfio_container() is answer


def test_a_node_of_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host_facts, "_KUBELET", str(tmp_path / "kubelet"))
    assert not _host_facts.is_kubernetes_node()
    (tmp_path / "kubelet").mkdir()
    assert _host_facts.is_kubernetes_node()


def test_emulators_are_named_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tmp_path / "qemu-system-a"
    write(usual)
    usual.chmod(0o755)
    (tmp_path / "qemu-system-b").symlink_to(usual)
    monkeypatch.setattr(_host_facts, "_EMULATORS", (f"{tmp_path}/qemu-system-*",))
    assert _host_facts.find_emulators([f"{tmp_path}/mine", str(usual)], [f"{tmp_path}/mine", f"{tmp_path}/other"]) == [
        Emulator(str(usual), present=True, known_by=("place", "option")),
        Emulator(f"{tmp_path}/mine", present=False, known_by=("option", "definition")),
        Emulator(f"{tmp_path}/other", present=False, known_by=("definition",)),
    ]


def test_emulators_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a container has another file at that path, or it was replaced since, it is left out."""
    monkeypatch.setattr(_host_facts, "_EMULATORS", ())
    path = f"{tmp_path}/qemu"
    shutil.copy("/bin/sleep", path)
    write(tmp_path / "my-qemu")
    (tmp_path / "my-qemu").chmod(0o755)
    with subprocess.Popen([path, "60"]) as runs:
        try:
            executed = {runs.pid: path, os.getpid(): "/usr/bin/python3"}
            assert _host_facts.find_running(executed) == Running({path: (runs.pid,)})
            found = _host_facts.find_emulators([], [path], {path: [1, runs.pid]}, [path])
            assert found == [Emulator(path, True, known_by=("definition", "record", "process"))]
            for name, pid in (("my-qemu", runs.pid), ("no-qemu", runs.pid), ("qemu", os.getpid()), ("qemu", 2**31 - 1)):
                assert _host_facts.find_emulators([], [], {f"{tmp_path}/{name}": [pid]}) == []
            os.unlink(path)
            write(tmp_path / "qemu")
            assert _host_facts.find_emulators([], [], {path: [runs.pid]}) == []
        finally:
            runs.kill()


def test_what_runs_is_looked_at_within_bounds() -> None:
    """A user may execute any number of programs, under any names."""

    def executed(*pids: int) -> dict[int, str]:
        return {pid: f"/home/vm/qemu{pid % 1000}" for pid in pids}

    assert len(_host_facts.find_running(executed(*range(32))).programs) == 32
    found = _host_facts.find_running(executed(*range(2000), 3000, 4000))
    assert (len(found.programs), found.programs["/home/vm/qemu0"], found.more) == (32, (0, 1000, 3000), True)
    assert not _host_facts.find_running(executed(1, 1001)).more


def test_what_runs_and_keeps_us_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(path: str) -> Emulator:
        time.sleep(60)
        return Emulator(path, True)

    monkeypatch.setattr(_host_facts, "_look_at_emulator", wait)
    monkeypatch.setattr(_host_facts, "_PATIENCE", 0.3)
    monkeypatch.setattr(_host_facts, "_EMULATORS", ())
    (found,) = _host_facts.find_emulators([], [], {f"{tmp_path}/qemu{number}": [1] for number in range(5)})
    assert found.msg.endswith("Nothing else that runs was looked at after that.")


def test_an_emulator_that_nobody_answers_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It waits for somebody who writes.
    os.mkfifo(tmp_path / "fifo")
    look_at = _host_facts._look_at_emulator

    def look(path: str) -> Emulator:
        if path.endswith("fifo"):
            os.open(path, os.O_RDONLY)
        return look_at(path)

    monkeypatch.setattr(_host_facts, "_look_at_emulator", look)
    monkeypatch.setattr(_host_facts, "_PATIENCE", 0.3)
    monkeypatch.setattr(_host_facts, "_EMULATORS", ())
    # The others are looked at all the same.
    first, found, last = _host_facts.find_emulators([f"{tmp_path}/{name}" for name in ("a", "fifo", "b")])
    assert (found.path, found.present, found.capabilities) == (f"{tmp_path}/fifo", False, None)
    assert found.msg.startswith(f"{tmp_path}/fifo was not found within 0.3 seconds.")
    assert [first, last] == [Emulator(f"{tmp_path}/{name}", False, known_by=("option",)) for name in ("a", "b")]


def test_what_is_no_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo", 0o755)
    write(tmp_path / "text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    paths = [f"{tmp_path}/{name}" for name in ("fifo", "text", "folder", "loop", "text/below")]
    monkeypatch.setattr(_host_facts, "_EMULATORS", ())
    assert _host_facts.find_emulators(paths) == [Emulator(path, present=False, known_by=("option",)) for path in paths]


def test_an_emulator_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("theirs", "shared/qemu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "theirs").chmod(0o777)
    (tmp_path / "shared").chmod(0o777)
    monkeypatch.setattr(_host_facts, "_EMULATORS", (f"{tmp_path}/their*",))
    first, second = _host_facts.find_emulators([f"{tmp_path}/shared/qemu"])
    assert (first.path, first.present) == (f"{tmp_path}/theirs", True)
    assert first.writer == Writer(f"{tmp_path}/theirs", "everybody")
    assert second.writer == Writer(f"{tmp_path}/shared", "everybody")
    assert second.msg.startswith(f"{tmp_path}/shared/qemu cannot be trusted: {tmp_path}/shared can be written by")
    with pytest.raises(IommufdError, match="shared can be written by everybody"):
        _host_facts.check_may_be_run(second)
    # To an ordinary user, his own are good enough.
    mine = Emulator(f"{tmp_path}/shared/qemu", True, writer=Writer(str(tmp_path), "uid 1002"))
    (tmp_path / "shared").chmod(0o755)
    _host_facts.check_may_be_run(mine)
    _host_facts.check_may_be_run(Emulator(f"{tmp_path}/none", True))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (PermissionError(errno.EACCES, "no"), "The capabilities of {} cannot be read (EACCES"),
        (OSError(errno.ENODATA, "no"), ""),
        (b"junk", "{}: security.capability has a form that is not known"),
    ],
)
def test_capabilities_that_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | OSError, words: str
) -> None:
    write(tmp_path / "qemu")
    (tmp_path / "qemu").chmod(0o755)

    def getxattr(_path: str, _name: str) -> bytes:
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(os, "getxattr", getxattr)
    monkeypatch.setattr(_host_facts, "_EMULATORS", ())
    (found,) = _host_facts.find_emulators([str(tmp_path / "qemu")])
    assert (found.path, found.present, found.capabilities) == (str(tmp_path / "qemu"), True, None)
    assert words.format(tmp_path / "qemu") in found.msg
    assert bool(found.msg) == bool(words)
