# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import json
import os
import pwd
import re
import resource
import subprocess
import sys
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _daemon, _device, _domain_start
from ansible_collections.virt.iommufd.plugins.module_utils._child import NoAnswer
from ansible_collections.virt.iommufd.plugins.module_utils._domain_start import Endpoint
from ansible_collections.virt.iommufd.plugins.module_utils._target import PidTarget
from ansible_collections.virt.iommufd.plugins.module_utils._user import User
from ansible_collections.virt.iommufd.plugins.modules import iommufd_domain
from ansible_collections.virt.iommufd.tests.kernel.run_module import run as run_module
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel
from ansible_collections.virt.iommufd.tests.unit.fake_libvirt import PAUSED, RUNNING, FakeDomain, FakeLibvirt

XML = """
<domain type='qemu'>
  <name>vm1</name>
  <memory unit='KiB'>4</memory>
  <iommufd enabled='yes' fdgroup='g'/>
  <devices>
    <hostdev mode='subsystem' type='pci'>
      <source><address domain='0x0000' bus='0x00' slot='0x05' function='0x0'/></source>
    </hostdev>
  </devices>
</domain>
"""
ME = pwd.getpwuid(os.getuid()).pw_name
# Of 4 KiB, libvirt makes 1 MiB.
NEED = 2**30 + 2**20
UNKNOWN = {"memlock_bytes": None, "memlock_unlimited": None}

Run = Callable[..., "dict[str, Any]"]


@pytest.fixture
def libvirt(
    monkeypatch: pytest.MonkeyPatch, null_is_iommufd: FakeKernel, child: subprocess.Popen[bytes]
) -> FakeLibvirt:
    """A libvirt with the domain vm1, shut off. Its emulator is the process `child`, its daemon this one."""
    fake = FakeLibvirt({"vm1": FakeDomain(XML)})
    monkeypatch.setitem(sys.modules, "libvirt", fake)
    monkeypatch.setattr(_device, "DEVICE", os.devnull)
    monkeypatch.setattr(_domain_start, "device_obstacles", lambda _devices: [])
    monkeypatch.setattr(Endpoint, "emulator_of", lambda _self, _name: PidTarget(child.pid))
    monkeypatch.setattr(Endpoint, "daemon", lambda self: self.session and PidTarget(os.getpid()))
    return fake


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, libvirt: FakeLibvirt) -> Run:
    """Runs the module. What its child does is done in this process."""

    def in_child(user: User | None, work: Callable[[], Any], seconds: float, keep: tuple[int, ...]) -> Any:
        assert (user is None) == (libvirt_user is None)
        assert seconds == 600
        for fd in keep:
            os.fstat(fd)
        return json.loads(json.dumps(work()))

    libvirt_user: str | None = None

    def run_as_user(**options: Any) -> dict[str, Any]:
        nonlocal libvirt_user
        given = {key: value for key, value in {"name": "vm1", "user": ME, **options}.items() if value is not None}
        libvirt_user = given.get("user")
        return run_module(iommufd_domain, **given)

    monkeypatch.setattr(iommufd_domain, "in_child", in_child)
    return run_as_user


@pytest.mark.parametrize("state", ["running", "paused"])
def test_start(run: Run, libvirt: FakeLibvirt, null_is_iommufd: FakeKernel, state: str) -> None:
    pid = os.getpid()
    answer = run(state=state, _ansible_diff=True)
    assert answer["changed"]
    assert answer["domain"] == {
        "name": "vm1",
        "uuid": "8e3ae1bb-0f0e-4a0f-8f55-1a8f0b2a1c51",
        "state": state,
        "memlock_bytes": NEED,
        "memlock_unlimited": False,
    }
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    unlimited = hard == resource.RLIM_INFINITY
    assert answer["libvirt"] == {
        "uri": "qemu:///session",
        "version": "12.8.0",
        "pid": pid,
        "memlock_bytes": None if unlimited else hard,
        "memlock_unlimited": unlimited,
        "started": None,
    }
    assert answer["process"]["comm"].startswith("python")
    assert answer["rlimit_mode"] == "process"
    assert answer["diff"] == {
        "before": {"state": "shut off", "rlimit_mode": None},
        "after": {"state": state, "rlimit_mode": "process"},
    }
    assert list(libvirt.domains["vm1"].associated) == ["g"]
    assert null_is_iommufd.mode == 1
    # The descriptor was closed.
    (fd,) = libvirt.domains["vm1"].associated["g"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.fixture(autouse=True)
def enough(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Whatever limit this process has is enough, but where a test is about that."""
    if "limit" not in request.fixturenames:
        monkeypatch.setattr(iommufd_domain, "check_limit", lambda *_given: None)


def test_check_mode(run: Run, libvirt: FakeLibvirt, null_is_iommufd: FakeKernel) -> None:
    answer = run(state="paused", _ansible_check_mode=True, _ansible_diff=True)
    assert answer["changed"]
    assert answer["domain"]["state"] == "paused"
    assert answer["rlimit_mode"] == "process"
    assert answer["diff"]["after"] == {"state": "paused", "rlimit_mode": "process"}
    assert "process" not in answer
    assert not libvirt.domains["vm1"].isActive()
    assert null_is_iommufd.mode == 0


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("number", [RUNNING, PAUSED])
def test_one_that_runs_already(
    run: Run,
    libvirt: FakeLibvirt,
    null_is_iommufd: FakeKernel,
    child: subprocess.Popen[bytes],
    number: int,
    check: bool,
) -> None:
    libvirt.domains["vm1"].number = number
    # Nothing that is asked of a domain before it starts matters any more.
    libvirt.domains["vm1"].xml = XML.replace("iommufd", "x")
    libvirt.version = 11_000_000
    null_is_iommufd.mode = 1
    null_is_iommufd.ioases = {1: 1}
    answer = run(_ansible_check_mode=check)
    assert not answer["changed"]
    assert "failed" not in answer
    assert answer["rlimit_mode"] == "process"
    assert answer["process"]["pid"] == child.pid
    assert answer["domain"]["state"] == {RUNNING: "running", PAUSED: "paused"}[number]
    assert answer["libvirt"]["pid"] is None
    assert "diff" not in answer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"ioases": {1: 1}},
            r"^Domain vm1 runs already\. iommufd 50 of .* holds objects already.* Shut it off, and run",
        ),
        ({"privileged": False}, r"^Domain vm1 runs already\. iommufd 50 of .* takes CAP_SYS_RESOURCE"),
        ({}, r"^Domain vm1: iommufd 50 of .* virt\.iommufd\.iommufd_option can still set it"),
    ],
)
def test_one_that_runs_with_another_accounting(
    run: Run, libvirt: FakeLibvirt, null_is_iommufd: FakeKernel, change: dict[str, Any], words: str
) -> None:
    libvirt.domains["vm1"].number = RUNNING
    for name, value in change.items():
        setattr(null_is_iommufd, name, value)
    answer = run()
    assert answer["failed"]
    assert not answer["changed"]
    assert answer["rlimit_mode"] == "user"
    assert re.search(words, answer["msg"])
    assert run(rlimit_mode="user").get("failed") is None


@pytest.mark.parametrize(("number", "words"), [(RUNNING, "runs already, but"), (None, "was started, but")])
def test_an_emulator_without_an_iommufd(
    run: Run, libvirt: FakeLibvirt, monkeypatch: pytest.MonkeyPatch, number: int | None, words: str
) -> None:
    libvirt.domains["vm1"].number = number or libvirt.domains["vm1"].number
    monkeypatch.setattr(_domain_start, "find_iommufds", lambda _process: {})
    answer = run()
    assert answer["failed"]
    assert answer["changed"] is (number is None)
    assert answer["rlimit_mode"] is None
    assert f"Domain vm1 {words} its emulator holds no iommufd" in answer["msg"]


def test_a_start_after_which_it_is_not_as_asked(run: Run, libvirt: FakeLibvirt, null_is_iommufd: FakeKernel) -> None:
    real = libvirt.domains["vm1"].createWithFlags

    def start(flags: int) -> int:
        null_is_iommufd.mode, null_is_iommufd.ioases = 0, {1: 1}
        return real(flags)

    libvirt.domains["vm1"].createWithFlags = start  # type: ignore[method-assign]
    answer = run()
    assert answer["failed"]
    assert answer["changed"]
    assert answer["msg"].startswith("Domain vm1 was started. iommufd 50 of ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privileged": False}, r"^A new iommufd: rlimit_mode=process takes CAP_SYS_RESOURCE"),
        ({"without": errno.EOPNOTSUPP}, r"^A new iommufd: this kernel does not have the option rlimit_mode"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_a_mode_that_cannot_be_set(
    run: Run, libvirt: FakeLibvirt, null_is_iommufd: FakeKernel, change: dict[str, Any], words: str, check: bool
) -> None:
    for name, value in change.items():
        setattr(null_is_iommufd, name, value)
    answer = run(_ansible_check_mode=check)
    assert answer["failed"]
    assert not answer["changed"]
    assert re.search(words + r".* Domain vm1 was not started\.$", answer["msg"])
    assert not libvirt.domains["vm1"].isActive()


def test_a_start_that_fails(run: Run, libvirt: FakeLibvirt) -> None:
    libvirt.failing["createWithFlags"] = libvirt.libvirtError(1, "no such machine")
    answer = run()
    assert answer["failed"]
    assert not answer["changed"]
    assert answer["msg"] == "Domain vm1 did not start. libvirt says: no such machine."


@pytest.mark.parametrize("mode", [0, 1])
def test_a_start_for_which_somebody_was_quicker(
    run: Run, libvirt: FakeLibvirt, null_is_iommufd: FakeKernel, mode: int
) -> None:
    def be_quicker() -> None:
        libvirt.domains["vm1"].number = RUNNING
        null_is_iommufd.mode, null_is_iommufd.ioases = mode, {1: 1}

    libvirt.failing["createWithFlags"] = libvirt.libvirtError(55, "domain is already running")
    libvirt.before_failure = be_quicker
    answer = run(_ansible_diff=True)
    assert not answer["changed"]
    assert "diff" not in answer
    assert answer["domain"]["state"] == "running"
    # It is looked at as any other that runs already.
    assert answer.get("msg", "").startswith("Domain vm1 runs already. " if mode == 0 else "")


@pytest.mark.parametrize(
    ("step", "ends"),
    [
        (
            "start_domain",
            "libvirt may still start domain vm1: look again (virsh --connect qemu:///session domstate vm1), or run this"
            " task again.",
        ),
        ("look_at_domain", "No answer."),
    ],
)
def test_no_answer_in_time(run: Run, monkeypatch: pytest.MonkeyPatch, step: str, ends: str) -> None:
    def wait(*_given: Any) -> None:
        raise NoAnswer("No answer.")

    monkeypatch.setattr(iommufd_domain, step, wait)
    answer = run()
    assert answer["failed"]
    assert not answer["changed"]
    assert answer["msg"].startswith("No answer.")
    assert answer["msg"].endswith(ends)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has no privilege and the least limit."""
    monkeypatch.setattr(_domain_start, "capability_names", lambda _mask: [])
    monkeypatch.setattr(resource, "prlimit", lambda *_given: (0, 0))


@pytest.mark.parametrize("check", [False, True])
def test_a_limit_that_is_too_low(run: Run, limit: None, libvirt: FakeLibvirt, check: bool) -> None:
    answer = run(_ansible_check_mode=check)
    assert answer["failed"]
    assert re.search(r"^RLIMIT_MEMLOCK of .* LimitMEMLOCK=1074790400 in", answer["msg"])
    assert (answer["libvirt"]["memlock_bytes"], answer["libvirt"]["memlock_unlimited"]) == (0, False)
    assert not libvirt.domains["vm1"].isActive()


def test_the_system_libvirt(run: Run, limit: None, libvirt: FakeLibvirt) -> None:
    answer = run(user=None)
    assert answer["changed"]
    assert libvirt.opened == ["qemu:///system"] * 2
    assert answer["libvirt"]["pid"] is None
    assert run(user=None)["changed"] is False


MORE = {
    "": (NEED, False),
    "<memtune><hard_limit unit='KiB'>64</hard_limit></memtune>": (65536, False),
    "<memoryBacking><locked/></memoryBacking>": (None, True),
    "<os><type arch='ppc64'>hvm</type></os>": (None, None),
}


@pytest.mark.parametrize(("more", "expected"), MORE.items())
def test_the_limit_that_libvirt_reckons(
    run: Run, libvirt: FakeLibvirt, more: str, expected: tuple[int | None, bool | None]
) -> None:
    text = XML.replace("<devices>", f"{more}<devices>")
    libvirt.domains["vm1"].xml = text.replace("'qemu'", "'kvm'")
    found = run(user=None)["domain"]
    assert (found["memlock_bytes"], found["memlock_unlimited"]) == expected


DEVICES = """
    <hostdev mode='subsystem' type='pci'><driver iommufd='no'/></hostdev>
    <emulator>{}</emulator>
"""


@pytest.mark.parametrize("check", [False, True])
def test_a_domain_that_would_not_fit(
    run: Run, libvirt: FakeLibvirt, null_is_iommufd: FakeKernel, monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    monkeypatch.setattr(_domain_start, "vms_are_no_roots", lambda: True)
    text = XML.replace("<devices>", f"<devices>{DEVICES.format(sys.executable)}").replace(">4<", ">2097152<")
    libvirt.domains["vm1"].xml = text
    answer = run(user=None, _ansible_check_mode=check)
    assert answer["failed"]
    assert not answer["changed"]
    assert answer["msg"].startswith("Domain vm1 was not started: its memory of 2 GiB counts twice in VmLck, for ")
    assert answer["domain"]["memlock_bytes"] == 3 * 2**30
    assert not libvirt.domains["vm1"].isActive()
    assert null_is_iommufd.calls == []
    assert "failed" not in run(user=None, rlimit_mode="user", _ansible_check_mode=check)


def asleep(libvirt: FakeLibvirt, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nobody answers before the daemon is started. The users who had it started."""
    libvirt.failing["open"] = libvirt.libvirtError(38, "no socket")
    started = []

    def wake(uri: str, user: str) -> str:
        libvirt.failing.clear()
        started.append(user)
        return "libvirtd.service"

    monkeypatch.setattr(_daemon, "start_daemon", wake)
    return started


def test_a_daemon_that_does_not_run(run: Run, libvirt: FakeLibvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    started = asleep(libvirt, monkeypatch)
    answer = run()
    assert answer["changed"]
    assert answer["libvirt"]["started"] == "libvirtd.service"
    assert started == [ME]


def test_a_daemon_that_does_not_run_in_check_mode(
    run: Run, libvirt: FakeLibvirt, monkeypatch: pytest.MonkeyPatch, null_is_iommufd: FakeKernel
) -> None:
    started = asleep(libvirt, monkeypatch)
    answer = run(_ansible_check_mode=True, _ansible_diff=True)
    assert answer["changed"]
    assert answer["domain"] == {"name": "vm1", "uuid": None, "state": "running", **UNKNOWN}
    assert "no more can be told" in str(answer["warnings"])
    assert answer["diff"]["before"]["state"] == "shut off"
    assert "libvirt" not in answer
    assert started == []
    null_is_iommufd.privileged = False
    assert "CAP_SYS_RESOURCE" in run(_ansible_check_mode=True)["msg"]


def test_a_system_daemon_that_does_not_run(run: Run, libvirt: FakeLibvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    started = asleep(libvirt, monkeypatch)
    answer = run(user=None)
    assert answer["failed"]
    assert answer["msg"] == "libvirt does not answer at qemu:///system: no socket"
    assert started == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": ""}, "is not the name of a domain"),
        ({"name": "../vm1"}, r"^'\.\./vm1' is not the name of a domain: it is a name, not a path"),
        ({"name": "vm2"}, "^There is no domain vm2 at qemu:///session"),
        ({"user": "no-such-user"}, "^This host has no user 'no-such-user'"),
        ({"uri": "qemu+ssh://host/system"}, r"^uri qemu\+ssh://host/system is not qemu:///session or qemu:///system"),
        ({"user": None, "uri": "qemu:///session"}, "^qemu:///session is a user's own libvirt: give user, too"),
        ({"state": "gone"}, "state must be one of"),
        ({"timeout": 10**10}, "^timeout 10000000000 is out of range: give 1 to 86400 seconds"),
        ({"timeout": 86401}, "^timeout 86401 is out of range"),
        ({"timeout": 0}, "^timeout 0 is out of range"),
        ({"timeout": -1}, "^timeout -1 is out of range"),
    ],
)
def test_bad_input(run: Run, null_is_iommufd: FakeKernel, options: dict[str, Any], words: str) -> None:
    answer = run(**options)
    assert answer["failed"]
    assert not answer.get("changed")
    assert re.search(words, answer["msg"])
    assert null_is_iommufd.calls == []


def test_what_libvirt_could_not_start(run: Run, libvirt: FakeLibvirt, null_is_iommufd: FakeKernel) -> None:
    libvirt.domains["vm1"].xml = XML.replace(" fdgroup='g'", "")
    answer = run()
    assert answer["failed"]
    assert "<iommufd enabled='yes' fdgroup='iommufd'/>" in answer["msg"]
    assert answer["domain"]["state"] == "shut off"
    assert null_is_iommufd.calls == []


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ("9" * 400, "its <memory> is not from 0 to"),
        ("9" * 5000, "its <memory> is no number"),
        ("-9", "its <memory> is no number"),
        ("4</memory><a>&lt;</a><!DOCTYPE b><memory>", "has a DOCTYPE"),
    ],
)
def test_a_libvirt_that_says_what_cannot_be(run: Run, libvirt: FakeLibvirt, memory: str, words: str) -> None:
    libvirt.domains["vm1"].xml = XML.replace("<memory unit='KiB'>4<", f"<memory unit='KiB'>{memory}<")
    answer = run()
    assert answer["failed"]
    assert answer["msg"].startswith("libvirt's description of the domain cannot be read: ")
    assert words in answer["msg"]
    assert len(answer["msg"]) < 300


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([], "What was learned of the domain cannot be read: version is looked for in what is no object"),
        (None, "What was learned of the domain cannot be read: version is looked for"),
        ({"version": 10**400}, "What was learned of the domain cannot be read: version is not from 0 to"),
    ],
)
def test_a_child_that_answers_something_else(
    run: Run, monkeypatch: pytest.MonkeyPatch, said: object, words: str
) -> None:
    monkeypatch.setattr(iommufd_domain, "in_child", lambda *_given: said)
    assert words in run()["msg"]


@pytest.mark.parametrize("said", [[], None, {"state": 3, "started": True}, {"state": "running", "started": "yes"}])
def test_a_child_that_answers_something_else_of_the_start(
    run: Run, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    asked = vars(iommufd_domain)["in_child"]
    monkeypatch.setattr(
        iommufd_domain,
        "in_child",
        lambda user, work, seconds, keep: said if keep else asked(user, work, seconds, keep),
    )
    answer = run()
    assert answer["failed"]
    assert answer["msg"].startswith("What became of the start cannot be read: ")
