# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from subprocess import PIPE
from typing import Any, NamedTuple

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _control_group, _iommufd, _named_target
from ansible_collections.virt.iommufd.plugins.module_utils._control_group import (
    IOMMUFD,
    PINNING,
    Member,
    Sought,
    choose,
    choose_among,
    find_members,
    find_process,
    is_below,
)
from ansible_collections.virt.iommufd.plugins.module_utils._errors import AccessRefused, HostLacks, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import VFIO_CONTAINER_RDEV
from ansible_collections.virt.iommufd.plugins.module_utils._named_target import UnitTarget, UserUnitTarget
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._target import hold_target
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel

GROUP = b"/system.slice/vm.service"
in_unit = partial(is_below, GROUP)
NULL = os.stat(os.devnull).st_rdev
SHOWN = "Id=vm.service\nLoadState=loaded\nActiveState=active\nSubState=running\n"


@pytest.mark.parametrize(
    ("text", "below"),
    [
        (b"0::/system.slice/vm.service\n", True),
        (b"0::/system.slice/vm.service/libpod-payload-1/init.scope\n", True),
        (b"1:name=systemd:/a\n0::/system.slice/vm.service\n", True),
        (b"0::/system.slice/vm.service2\n", False),
        (b"0::/system.slice\n", False),
        (b"0::/\n", False),
        (b"0::/user.slice/user-1.slice/user@1.service/system.slice/vm.service\n", False),
        (b"1:name=systemd:/system.slice/vm.service\n", False),
        (b"", False),
    ],
)
def test_a_group_and_those_below_it(text: bytes, below: bool) -> None:
    assert is_below(GROUP, text) is below


def member(pid: int, *fds: int, pins: bool = False, why: str = "") -> Member:
    return Member(pid, f"name (pid {pid})", 0, None if why else dict.fromkeys(fds, NULL), pins, why=why)


HOLDER, OTHER, NONE, UNSEEN = member(1, 9), member(2, 9), member(3), member(4, why="It hides.")


@pytest.mark.parametrize("sought", [IOMMUFD, PINNING])
@pytest.mark.parametrize(
    ("main", "members", "copies", "pid"),
    [
        (1, [HOLDER, NONE], {}, 1),
        (3, [HOLDER, NONE], {}, 1),
        (0, [HOLDER, NONE], {}, 1),
        # The main process, beside another VM.
        (1, [HOLDER, OTHER, UNSEEN], {1: False, 2: False}, 1),
        # A shell that has kept a copy of what it gave to a VM that has pinned memory by now.
        (1, [HOLDER, OTHER], {1: True, 2: False}, 2),
        (0, [NONE], {}, 3),
        (3, [NONE], {}, 3),
    ],
)
def test_the_one_that_is_meant(
    main: int, members: list[Member], copies: dict[int, bool | None], pid: int, sought: Sought
) -> None:
    assert choose("Unit vm", main, members, copies, sought) == pid


def test_where_none_holds_anything_a_limit_is_that_of_the_main_process() -> None:
    assert choose("Unit vm", 3, [NONE, member(5)], {}, PINNING) == 3
    with pytest.raises(IommufdError, match=r"None of the 2 processes of Unit vm holds an iommufd: name"):
        choose("Unit vm", 3, [NONE, member(5)], {}, IOMMUFD)


def test_a_copy_is_the_same_iommufd_but_has_another_limit() -> None:
    copies = {1: None, 2: None}
    assert choose("Unit vm", 1, [HOLDER, OTHER], copies, IOMMUFD) == 1
    with pytest.raises(IommufdError, match=r"name \(pid 1\), name \(pid 2\) hold an iommufd, VFIO's"):
        choose("Unit vm", 1, [HOLDER, OTHER], copies, PINNING)


@pytest.mark.parametrize(
    ("main", "members", "words"),
    [
        (3, [HOLDER, OTHER, NONE], r"name \(pid 1\), name \(pid 2\) hold an iommufd"),
        (3, [HOLDER, UNSEEN], r"name \(pid 1\) holds an iommufd.* name \(pid 4\) could not be looked at: It hides"),
        (0, [UNSEEN, NONE], "none that could be looked at holds an iommufd"),
        (
            0,
            [NONE, member(5)],
            r"None of the 2 processes of Unit vm holds an.*: name \(pid 3\), name \(pid 5\)",
        ),
        (0, [member(pid, 9) for pid in range(1, 31)], r"name \(pid 10\) and 20 more hold"),
    ],
)
def test_what_cannot_be_told_is_told(main: int, members: list[Member], words: str) -> None:
    for sought in (IOMMUFD, PINNING):
        with pytest.raises(IommufdError, match=words) as caught:
            choose("Unit vm", main, members, {}, sought)
        assert "by pid" in str(caught.value)


Texts = dict[int, bytes]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    """What the kernel says of the control groups of the processes that there are."""
    found: Texts = {1: b"0::/init.scope\n"}
    monkeypatch.setattr(_control_group, "_UNIFIED", "/")
    monkeypatch.setattr(_control_group, "_pids", lambda: sorted(found))
    monkeypatch.setattr(_control_group, "_group_of", found.get)
    return found


@pytest.fixture
def wrapper() -> Iterator[int]:
    """A process that holds nothing."""
    with subprocess.Popen(["cat"], stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        yield process.pid


def unit(main: int, sought: Sought = IOMMUFD) -> UnitTarget:
    shown = f"{SHOWN}MainPID={main}\nControlGroup={GROUP.decode()}\n"
    return UnitTarget("vm.service", lambda _command: (0, shown, ""), sought)


def meant(target: Any) -> int:
    with hold_target(target) as process:
        return process.pid


class Host(NamedTuple):
    """The main process of the unit, which holds nothing, and one below it that holds what passes for an iommufd."""

    main: int
    vmm: int
    texts: Texts


@pytest.fixture
def host(texts: Texts, wrapper: int, child: subprocess.Popen[bytes], null_is_iommufd: FakeKernel) -> Host:
    """One whose processes are in the unit, and this one in another."""
    texts[wrapper] = b"0::%s\n" % GROUP
    texts[child.pid] = b"0::%s/payload\n" % GROUP
    texts[os.getpid()] = b"0::/system.slice/other.service\n"
    return Host(wrapper, child.pid, texts)


@pytest.mark.parametrize("sought", [IOMMUFD, PINNING])
def test_a_unit_of_a_wrapper(host: Host, sought: Sought) -> None:
    assert meant(unit(host.main, sought)) == host.vmm
    assert meant(unit(host.vmm, sought)) == host.vmm
    # Of itself it is the main process, whatever that holds.
    assert UnitTarget("vm.service", unit(host.main).run).resolve() == host.main


def test_a_unit_without_a_main_process(host: Host) -> None:
    assert meant(unit(0)) == host.vmm
    scope = SHOWN.replace("vm.service", "100.scope") + f"ControlGroup={GROUP.decode()}\n"
    assert meant(UnitTarget("100.scope", lambda _command: (0, scope, ""), IOMMUFD)) == host.vmm
    host.texts.clear()
    host.texts[1] = b"0::/\n"
    with pytest.raises(IommufdError, match=r"100\.scope has no process now: it is active \(running\)"):
        meant(UnitTarget("100.scope", lambda _command: (0, scope, ""), IOMMUFD))
    with pytest.raises(IommufdError, match=r"has no main process now: it is active \(running\)"):
        meant(unit(0))


def test_a_unit_with_two_holders(host: Host) -> None:
    with subprocess.Popen(["cat"], stdin=PIPE, stdout=subprocess.DEVNULL, stderr=PIPE) as second:
        host.texts[second.pid] = b"0::%s/other\n" % GROUP
        with pytest.raises(IommufdError, match="hold an iommufd") as caught:
            meant(unit(host.main))
        assert f"cat (pid {second.pid})" in str(caught.value)
        assert f"(pid {host.vmm})" in str(caught.value)
        host.texts[second.pid] = b"0::%s2\n" % GROUP
        assert meant(unit(host.main)) == host.vmm


def test_a_unit_that_moves_out_meanwhile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def later(pid: int) -> bytes | None:
        asked.append(pid)
        return b"0::/elsewhere\n" if asked.count(pid) > 1 else host.texts.get(pid)

    monkeypatch.setattr(_control_group, "_group_of", later)
    assert find_members("Unit vm", in_unit, IOMMUFD) == []


def test_a_unit_whose_processes_end_meanwhile(host: Host) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    host.texts[gone.pid] = b"0::%s\n" % GROUP
    assert meant(unit(host.main)) == host.vmm
    assert find_process("Unit vm", gone.pid, in_unit, IOMMUFD) == gone.pid


def test_a_unit_of_which_one_may_not_be_looked_at(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_process: object) -> Any:
        raise AccessRefused("It does not let this caller look.")

    monkeypatch.setattr(Process, "character_devices", refuse)
    # Whoever works on it tells why.
    assert meant(unit(host.main)) == host.main
    with pytest.raises(IommufdError, match="could not be looked at: It does not let this caller look"):
        meant(unit(0))


def test_a_unit_on_a_host_where_that_cannot_be_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    del host.texts[1]
    with pytest.raises(HostLacks, match="/proc hides processes"):
        meant(unit(host.main))
    monkeypatch.setattr(_control_group, "_UNIFIED", "/no/such")
    with pytest.raises(HostLacks, match="control groups of the first version, or of both"):
        meant(unit(host.main))
    # It has what is sought, so nobody else is asked for.
    assert meant(unit(host.vmm)) == host.vmm


def test_a_unit_that_takes_too_long(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_control_group, "_SECONDS", -1)
    with pytest.raises(IommufdError, match="could not be looked through within -1 seconds"):
        meant(unit(host.main))


def test_a_unit_on_a_kernel_without_iommufd(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_control_group, _iommufd):
        monkeypatch.setattr(module, "misc_rdev", lambda: None)
    assert meant(unit(host.main)) == host.main


def test_of_a_user(host: Host) -> None:
    uid = os.getuid()
    manager = b"0::/user.slice/user-%d.slice/user@%d.service" % (uid, uid)
    host.texts[host.main] = manager + b"/app.slice/vm.service\n"
    host.texts[host.vmm] = manager + b"/app.slice/vm.service/payload\n"
    host.texts[os.getpid()] = manager + b"/app.slice/other.service/vm.service\n"
    for user in (str(uid), "root") if uid == 0 else (str(uid),):
        for name in ("vm.service", "vm"):
            assert meant(UserUnitTarget(name, user, IOMMUFD)) == host.vmm
    with pytest.raises(IommufdError, match=r"no.service of user \d+ has no process now. Of .* other.s.*, vm.s"):
        meant(UserUnitTarget("no.service", str(uid), IOMMUFD))
    with pytest.raises(IommufdError, match=r"service manager runs no units: .*enable-linger"):
        meant(UserUnitTarget("vm.service", "4711", IOMMUFD))
    with pytest.raises(IommufdError, match="a slice groups units"):
        meant(UserUnitTarget("app.slice", str(uid), IOMMUFD))


def test_of_a_user_who_has_put_somebody_elses_process_there(host: Host) -> None:
    host.texts[host.vmm] = b"0::/user.slice/user-4711.slice/user@4711.service/app.slice/vm.service\n"
    with pytest.raises(IommufdError, match=r"no process of that user's: .* \(pid \d+\) is of .*may have put it"):
        meant(UserUnitTarget("vm.service", "4711", IOMMUFD))


def test_a_unit_of_a_host_without_systemd(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_named_target, "_SYSTEMD", "/no/such")
    for target in (unit(host.main), UserUnitTarget("vm.service", "4711", IOMMUFD)):
        with pytest.raises(HostLacks, match=r"this host does not run systemd.* by pid or pidfile"):
            meant(target)


def test_a_unit_of_which_several_have_one_iommufd(host: Host) -> None:
    with open(os.devnull) as shared:
        command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        given: Any = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, "pass_fds": [shared.fileno()]}
        with subprocess.Popen(command, **given) as one, subprocess.Popen(command, **given) as other:
            host.texts.update({each.pid: b"0::%s/pair\n" % GROUP for each in (one, other)})
            members = find_members("Unit vm", partial(is_below, GROUP + b"/pair"), PINNING)
            # Which of them will be the VMM is not to be told until it has pinned memory.
            assert [each.pid for each in members] == [one.pid, other.pid]
            with pytest.raises(IommufdError, match="hold an iommufd"):
                choose_among("Unit vm", members, PINNING, one.pid)
            assert choose_among("Unit vm", members, IOMMUFD, one.pid) == one.pid
            pinning = [members[0], members[1]._replace(pins=True)]
            assert choose_among("Unit vm", pinning, PINNING, one.pid) == other.pid


def test_what_is_held(held: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_control_group, "iommufd_rdevs", lambda _seen: set())
    monkeypatch.setattr(_control_group, "find_vdpa_nodes", lambda: {NULL: "vhost-vdpa-0"})
    assert _control_group._held(held, IOMMUFD) == {}
    assert _control_group._held(held, PINNING)[50] == NULL
    monkeypatch.setattr(_control_group, "find_vdpa_nodes", dict)
    devices = Process.character_devices(held)._replace(devices={50: VFIO_CONTAINER_RDEV, 51: VFIO_CONTAINER_RDEV})
    monkeypatch.setattr(Process, "character_devices", lambda _self: devices)
    # That with O_PATH has nothing behind it.
    assert _control_group._held(held, PINNING) == {50: VFIO_CONTAINER_RDEV}
    assert _control_group._held(held, IOMMUFD) == {}
    monkeypatch.setattr(Process, "character_devices", lambda _self: devices._replace(more=True))
    with pytest.raises(IommufdError, match="more than the 262144 descriptors"):
        _control_group._held(held, IOMMUFD)
