# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A live update of QEMU (cpr-transfer): a new process takes over an iommufd, and what an old one has pinned by it.

QEMU does that with KVM alone, which the processor that the lab emulates has.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.plugin_utils._fit import memlock_fit
from ansible_collections.virt.iommufd.tests.kernel import charges
from ansible_collections.virt.iommufd.tests.kernel.conftest import LIVE_UPDATES
from ansible_collections.virt.iommufd.tests.kernel.harness import DEVICES, MIB, PATIENCE, VM, Answer
from ansible_collections.virt.iommufd.tests.kernel.info import limits, look, process, user
from ansible_collections.virt.iommufd.tests.kernel.test_qemu import ENOUGH, MEMORY, TCG, Vm, address, mode

pytestmark = pytest.mark.host

FIRMWARE = MIB // 4
PINNED = MEMORY + FIRMWARE
NEEDED = {"user": 2 * PINNED, "process": PINNED}
SHARED = ["-m", "64", "-object", "memory-backend-memfd,id=memory,size=64M,share=on"]
SHARED += ["-machine", "memory-backend=memory,aux-ram-share=on"]
UNKNOWN = "Unknown section or instance 'iommufd'"
LOST = f"load of migration failed: Invalid argument: {UNKNOWN} 0."
REFUSED = "some memory regions do not support IOMMU_IOAS_CHANGE_PROCESS\n"


class Qemu(Vm):
    """One with a monitor and a device, whose iommufd charges as it is told."""

    def __init__(
        self,
        name: str,
        folder: Path,
        accounting: str,
        *words: str,
        limit: int,
        no_mmap: str = "off",
        accel: str = "kvm",
    ) -> None:
        self.monitor = folder / f"{name}.qmp"
        # As a launcher does, a new one for each QEMU
        fds = (charges.open_iommufd("process"),) if accounting == "process" else ()
        iommufd = f"iommufd,id=iommufd0{',fd=' if fds else ''}{''.join(map(str, fds))}"
        device = f"vfio-pci,host={address(DEVICES[0])},iommufd=iommufd0,x-no-mmap={no_mmap}"
        words = (*SHARED, "-object", iommufd, "-device", device, *words, "-trace", "iommufd_backend_map_file_dma")
        words += ("-qmp", f"unix:{self.monitor},server=on,wait=off")
        super().__init__(folder / f"{name}.log", *words, limit=f"--memlock={limit}", accel=accel, fds=fds)
        for fd in fds:
            os.close(fd)

    def tell(self, command: str, **arguments: Any) -> Any:
        """What it returns to a command."""
        asked = json.dumps([{"execute": command, "arguments": arguments}])
        done = subprocess.run(
            ["qmp", self.monitor], input=asked, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, (done.stderr, self.said)
        [answered] = json.loads(done.stdout)
        return answered["return"]

    def status(self) -> str:
        return str(self.tell("query-status")["status"])

    def wait_until(self, status: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.status() != status:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)

    def limit(self, limit: int) -> None:
        resource.prlimit(self.process.pid, resource.RLIMIT_MEMLOCK, (limit, limit))


@pytest.fixture(autouse=True)
def kvm() -> Iterator[None]:
    with mode("/dev/kvm", 0o666):
        yield


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that the VMs' user may write."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, VM, VM)
        yield Path(name)


@contextlib.contextmanager
def runs(folder: Path, accounting: str, *words: str, **how: str) -> Iterator[Qemu]:
    """A VM that has pinned what it does."""
    old = Qemu("old", folder, accounting, *words, limit=ENOUGH, **how)
    with old:
        old.wait_until_counted("VmPin", PINNED)
        yield old


@contextlib.contextmanager
def takes_over(folder: Path, accounting: str, old: Qemu, *words: str, limit: int, **how: str) -> Iterator[Qemu]:
    """The process that is to take over the VM, which the old one was told to pass on."""
    where = {kind: {"transport": "socket", "type": "unix", "path": f"{folder}/{kind}"} for kind in ("main", "cpr")}
    channels = [{"channel-type": kind, "addr": addr} for kind, addr in where.items()]
    incoming = ("-incoming", f"unix:{folder}/main", "-incoming", json.dumps(channels[1]))
    new = Qemu("new", folder, accounting, *words, *incoming, limit=limit, **how)
    with new:
        deadline = time.monotonic() + PATIENCE
        while not (folder / "cpr").exists():
            assert new.runs, new.said
            assert time.monotonic() < deadline, new.said
            time.sleep(0.2)
        old.tell("migrate-set-parameters", mode="cpr-transfer")
        old.tell("migrate", channels=channels)
        yield new


def outcome(old: Qemu) -> Answer:
    """What the old one says of it in the end."""
    deadline = time.monotonic() + PATIENCE
    while True:
        told: Answer = old.tell("query-migrate")
        if told["status"] in ("completed", "failed"):
            return told
        assert time.monotonic() < deadline, old.said
        time.sleep(0.2)


def foretold(answered: Answer, old: Qemu, **given: Any) -> Answer:
    """What memlock_fit says of it."""
    answer: Answer = memlock_fit(answered, grow={"vm": str(old.process.pid)}, live_update=True, **given)
    return answer


@pytest.mark.live
@pytest.mark.parametrize("accounting", ["user", "process"])
def test_with_enough_for_both(accounting: str, folder: Path) -> None:
    """All is charged to the new one while the old one is still there, which then counts for nothing. The mode stays."""
    needed = NEEDED[accounting]
    new_vm = {"memory": "64M", "overhead": "256K", "user": VM, "locked": 0, "accounting": accounting}
    before = memlock_fit(look(users=["vm"]), **new_vm, memlock=needed, live_update=True)
    assert (before["fits"], before["charged"] + before["needed"]) == (True, needed)
    with runs(folder, accounting, "-S") as old:
        assert old.counted("VmPin") == PINNED
        old.limit(needed)
        assert foretold(look(), old)["fits"] is True
        with takes_over(folder, accounting, old, "-S", limit=needed) as new:
            assert outcome(old)["status"] == "completed"
            new.wait_until_counted("VmPin", PINNED)
            new.wait_until("prelaunch")
            assert (old.status(), old.counted("VmPin"), old.counted("VmLck")) == ("postmigrate", 0, 0)
            answered = look()
            kept, real = (process(answered, each.process.pid) for each in (old, new))
            assert (kept["holder"], kept["charged_bytes"], kept["counters"]) == (True, 0, [])
            assert (real["holder"], real["accounting"], real["charged_bytes"]) == (False, accounting, PINNED)
            assert (real["pinned_bytes"], real["headroom_bytes"]) == (PINNED, needed - PINNED)
            [iommufd] = [each for each in real["iommufds"] if each["ioases"]]
            assert (iommufd["rlimit_mode"], iommufd["shared_with"]) == (accounting, [old.process.pid])
            assert "charges" not in limits(answered)
            if accounting == "user":
                sums = user(answered, VM)
                assert (sums["pids"], sums["charged_bytes"], sums["at_risk"]) == ([new.process.pid], PINNED, False)
            old.tell("quit")
            assert old.process.wait(PATIENCE) == 0
            new.tell("cont")
            assert new.status() == "running"


@pytest.mark.live
@pytest.mark.parametrize("accounting", ["user", "process"])
def test_with_less_for_the_new_one(accounting: str, folder: Path) -> None:
    """It ends, and names neither memory nor a limit. Where the old one had told it all by then, that cannot go on."""
    short = NEEDED[accounting] - 1
    with runs(folder, accounting, "-S") as old:
        answer = foretold(look(), old, memlock=short)
        assert (answer["fits"], answer["charged"] + answer["needed"]) == (False, short + 1)
        assert UNKNOWN in answer["reason"]
        with takes_over(folder, accounting, old, "-S", limit=short) as new:
            assert new.process.wait(PATIENCE) == 1
            assert LOST in new.said
            assert "memory" not in new.said.replace("backend-memfd", "")
            lost = outcome(old)["status"] == "completed"
            assert old.status() == ("postmigrate" if lost else "prelaunch")
            assert old.counted("VmPin") == PINNED
            row = process(look(), old.process.pid)
            assert (row["holder"], row["charged_bytes"]) == (False, PINNED)
            with contextlib.suppress(AssertionError) if lost else contextlib.nullcontext():
                old.tell("cont")
            if lost:
                assert old.process.wait(PATIENCE) == -signal.SIGSEGV
            else:
                assert old.status() == "running"


@pytest.mark.live
def test_with_less_for_the_old_one(folder: Path) -> None:
    """It is charged again once the new one was. It says what is not so, and goes on. Its charge is then unknown."""
    needed = NEEDED["user"]
    with runs(folder, "user", "-S") as old:
        old.limit(needed - 1)
        answered = look()
        assert foretold(answered, old)["fits"] is False
        answer = foretold(answered, old, memlock=needed)
        assert answer["fits"] is True
        assert f"prlimit --pid {old.process.pid} --memlock={needed}:{needed}" in " ".join(answer["prerequisites"])
        with takes_over(folder, "user", old, "-S", limit=needed) as new:
            assert new.process.wait(PATIENCE) == 1
            assert REFUSED in old.said
            assert outcome(old)["error-desc"] == "pre-save failed: iommufd"
            assert (old.status(), old.counted("VmPin")) == ("prelaunch", 0)
            answered = look()
            assert process(answered, old.process.pid)["charged_bytes"] is None
            assert f"({old.process.pid}) holds" in limits(answered)["charges"]
            assert user(answered, VM)["at_risk"] is None


@pytest.mark.live
@pytest.mark.parametrize("no_mmap", ["on", "off"])
def test_a_vm_that_has_turned_its_device_on(no_mmap: str, folder: Path) -> None:
    """What its processor may reach of the device is mapped for other devices, too, and cannot be taken over."""
    with runs(folder, "process", no_mmap=no_mmap) as old:
        if no_mmap == "off":
            old.wait_until_said(rf"^iommufd_backend_map_file_dma .* size={MIB:#x} .*\(0\)$")
        with takes_over(folder, "process", old, limit=ENOUGH, no_mmap=no_mmap) as new:
            works = no_mmap == "on"
            assert outcome(old)["status"] == ("completed" if works else "failed")
            if works:
                assert old.status() == "postmigrate"
                new.wait_until("running")
            else:
                assert new.process.wait(PATIENCE) == 1
                assert REFUSED in old.said
                assert old.status() == "running"


def test_without_what_it_takes(folder: Path) -> None:
    """Without KVM, QEMU 11 breaks down. QEMU 10.0 opens the device anew, which the kernel does not give to two."""
    with (
        runs(folder, "user", "-S", accel=TCG) as old,
        takes_over(folder, "user", old, "-S", limit=ENOUGH, accel=TCG) as new,
    ):
        assert new.process.wait(PATIENCE) == 1
        if LIVE_UPDATES:
            assert old.process.wait(PATIENCE) == -signal.SIGSEGV
        else:
            assert re.search("error bind device fd=.*: Invalid argument\n", new.said)
            assert (outcome(old)["status"], old.status()) == ("failed", "prelaunch")
