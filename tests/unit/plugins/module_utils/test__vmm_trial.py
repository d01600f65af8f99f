# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import resource
import shutil
import signal
import stat
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NoReturn

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import (
    _child,
    _device,
    _user,
    _vmm_domain,
    _vmm_replica,
    _vmm_trial,
)
from ansible_collections.virt.iommufd.plugins.module_utils._child import Interrupted
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks, IommufdError, NotAnIommufd
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process, parse_status
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit, own_status
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import Run
from ansible_collections.virt.iommufd.plugins.module_utils._target import PidTarget, hold_target
from ansible_collections.virt.iommufd.plugins.module_utils._user import User
from ansible_collections.virt.iommufd.plugins.module_utils._vmm_domain import domain_xml, start_bare_domain
from ansible_collections.virt.iommufd.plugins.module_utils._vmm_look import (
    Conditions,
    Program,
    Unit,
    look_at_own_conditions,
    look_at_program,
)
from ansible_collections.virt.iommufd.plugins.module_utils._vmm_replica import replica_properties, start_replica
from ansible_collections.virt.iommufd.plugins.module_utils._vmm_trial import (
    ProcessSeen,
    check_able,
    open_session,
    start_emulator,
    try_copy,
    try_mode,
)
from ansible_collections.virt.iommufd.tests.unit.fake_kernel import FakeKernel

IPC_LOCK = 1 << 14
MYSELF = User(pwd.getpwuid(os.getuid()).pw_name, os.getuid(), os.getgid(), "/")
OWN = look_at_own_conditions()

# Of whoever is not root it is not known whether he has had it fail.
USERS = [(User("root", 0, 0, "/"), IommufdError), (User("vm", 1001, 1001, "/"), Interrupted)]


def changed(thing: Any, /, **other: Any) -> Any:
    return thing._replace(**other)


@pytest.fixture
def emulator(tmp_path: Path) -> Program:
    """A program that says that it is up, and waits, whatever it is told to do."""
    path = tmp_path / "qemu-system-of-the-test"
    path.write_text("#!/bin/sh\necho '{\"QMP\": {}}'\nexec sleep 600\n")
    path.chmod(0o755)
    return changed(look_at_program(str(path)), is_program=True)  # type: ignore[no-any-return]


@pytest.fixture
def anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this process pass for that of any user, as only root could be."""
    monkeypatch.setattr(_user, "has_ids", lambda _user: True)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The children that are made; all must have been buried."""
    made: list[int] = []
    fork = os.fork

    def note() -> int:
        pid = fork()
        if pid:
            made.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", note)
    yield made
    for pid in made:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_an_emulator_is_started_and_ended(emulator: Program, children: list[int]) -> None:
    seen = start_emulator(emulator, OWN, MYSELF)
    assert seen.user == MYSELF.name
    assert seen.status.bounding == own_status().bounding
    assert seen.memlock.soft == Limit(*_limits()).soft
    # It, its guard, and who looks at it.
    assert len(children) == 3


def _limits() -> list[int | None]:
    return [None if each == resource.RLIM_INFINITY else each for each in resource.getrlimit(resource.RLIMIT_MEMLOCK)]


def test_what_is_started_is_under_the_conditions(emulator: Program) -> None:
    under = changed(OWN, no_new_privs=True)
    assert start_emulator(emulator, under, MYSELF).status.no_new_privs


def test_an_emulator_that_cannot_be_executed(emulator: Program, children: list[int]) -> None:
    os.chmod(emulator.path, 0o644)
    with pytest.raises(IommufdError, match=r"cannot be executed as .*: to execute it failed \(EACCES: .*\)\.$"):
        start_emulator(emulator, OWN, MYSELF)


def test_outside_of_the_bounding_set(emulator: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_words: object) -> NoReturn:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "execve", refuse)
    # Nobody but root may give up anything of it.
    monkeypatch.setattr(_vmm_trial, "own_status", lambda: changed(own_status(), bounding=0))
    with pytest.raises(IommufdError, match=r"EPERM.*CAP_IPC_LOCK is not in the bounding set of libvirtd.service\.$"):
        start_emulator(emulator, Conditions("libvirtd.service", 0, OWN.no_new_privs, True), MYSELF)


@pytest.mark.usefixtures("anybody")
@pytest.mark.parametrize(("user", "kind"), USERS)
def test_an_emulator_that_ends_before_it_is_up(
    emulator: Program, children: list[int], user: User, kind: type[IommufdError]
) -> None:
    Path(emulator.path).write_text('#!/bin/sh\nsleep 0.5; echo "qemu: no\nsuch $1" >&2; exit 1\n')
    with pytest.raises(IommufdError, match=r"ended at once: qemu: no such -no-user-config$") as raised:
        start_emulator(emulator, OWN, user)
    assert raised.type is kind


@pytest.mark.usefixtures("anybody")
@pytest.mark.parametrize(("user", "kind"), USERS)
def test_an_emulator_whose_limits_are_lowered(
    emulator: Program,
    children: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    user: User,
    kind: type[IommufdError],
) -> None:
    """By its user, while it starts: it then fails by itself."""
    (tmp_path / "go").unlink(missing_ok=True)
    script = (
        f"echo $$ >{tmp_path}/pid; while ! test -e {tmp_path}/go; do sleep 0.02; done; echo x >{tmp_path}/x || exit 1"
    )
    Path(emulator.path).write_text(f"#!/bin/sh\n{script}\nsleep 600\n")
    look = _vmm_trial._check_runs

    def lower_and_look(program: Program, pid: int, output: Any, who: User) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
        (tmp_path / "go").touch()
        look(program, pid, output, who)

    monkeypatch.setattr(_vmm_trial, "_check_runs", lower_and_look)
    with pytest.raises(IommufdError) as raised:
        start_emulator(emulator, OWN, user)
    assert raised.type is kind


def test_what_an_emulator_is_given(emulator: Program, tmp_path: Path) -> None:
    """No descriptor that this process has inherited, no core dump, and little that it may write."""
    (tmp_path / "secret").touch()
    ours = os.open(tmp_path / "secret", os.O_RDONLY)
    os.set_inheritable(ours, True)
    found = tmp_path / "found"
    look = "for fd in /proc/$$/fd/*; do readlink $fd; done; ulimit -c; ulimit -f; ulimit -H -f"
    Path(emulator.path).write_text(f"#!/bin/bash\n{{ {look}; }} >{found}\necho '{{\"QMP\": {{}}}}'\nexec sleep 600\n")
    try:
        start_emulator(emulator, OWN, MYSELF)
    finally:
        os.close(ours)
    *descriptors, core, soft, hard = found.read_text().split()
    assert {os.devnull, str(found)} < set(descriptors)
    assert str(tmp_path / "secret") not in descriptors
    # bash counts in units of 1024 bytes.
    assert (core, soft, hard) == ("0", "1024", "1024")


def test_an_emulator_that_says_too_much(
    emulator: Program, children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes into a file of root's."""
    Path(emulator.path).write_text("#!/bin/sh\nexec dd if=/dev/zero bs=65536 count=4096 status=none\n")
    sizes: list[int] = []
    content = _vmm_trial._content

    def note(output: Any) -> bytes:
        sizes.append(os.fstat(output.fileno()).st_size)
        return content(output)

    monkeypatch.setattr(_vmm_trial, "_content", note)
    with pytest.raises(IommufdError):
        start_emulator(emulator, OWN, MYSELF)
    assert max(sizes) <= 2**20


def test_an_emulator_that_does_not_come_up(
    emulator: Program, monkeypatch: pytest.MonkeyPatch, children: list[int]
) -> None:
    Path(emulator.path).write_text("#!/bin/sh\necho 'I wait.'; exec sleep 600\n")
    monkeypatch.setattr(_vmm_trial, "PATIENCE", 4)
    with pytest.raises(Interrupted, match=r"runs, but is not up after 2 seconds: I wait\.$"):
        start_emulator(emulator, OWN, MYSELF)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -KILL $$", "was ended by signal 9, so nothing is known of it"),
        ("kill -STOP $$; sleep 600", "was stopped by signal 19, so nothing is known of it"),
        # As QEMU does when it is asked to by a signal.
        ("exit 0", "ended at once: it said nothing"),
    ],
)
def test_an_emulator_that_others_may_have_ended(emulator: Program, children: list[int], script: str, told: str) -> None:
    Path(emulator.path).write_text(f"#!/bin/sh\n{script}\n")
    began = time.monotonic()
    with pytest.raises(Interrupted, match=told):
        start_emulator(emulator, OWN, MYSELF)
    assert time.monotonic() - began < 30


def test_an_emulator_that_is_ended_while_it_is_looked_at(
    emulator: Program, children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    see = _vmm_trial._see

    def end_and_see(process: Process) -> ProcessSeen:
        os.kill(process.pid, number)
        _await(lambda: _has_ended(process))
        return see(process)

    monkeypatch.setattr(_vmm_trial, "_see", end_and_see)
    number = signal.SIGKILL
    with pytest.raises(Interrupted, match="was ended by signal 9"):
        start_emulator(emulator, OWN, MYSELF)


def test_an_emulator_that_cannot_be_looked_at(
    emulator: Program, children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_process: Process) -> NoReturn:
        raise IommufdError("no")

    monkeypatch.setattr(_vmm_trial, "_see", refuse)
    with pytest.raises(Interrupted, match=r"could not be looked at: no$"):
        start_emulator(emulator, OWN, MYSELF)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_child_that_is_kept_from_becoming_the_emulator(
    emulator: Program, children: list[int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(_vmm_trial, "isolate", lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"by signal {number:d}, so nothing is known of it"):
        start_emulator(emulator, OWN, MYSELF)


def test_a_child_that_never_becomes_the_emulator(
    emulator: Program, children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_vmm_trial, "isolate", lambda: time.sleep(600))
    monkeypatch.setattr(_vmm_trial, "PATIENCE", 1)
    with pytest.raises(Interrupted, match="was not executed within 0 seconds"):
        start_emulator(emulator, OWN, MYSELF)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EAGAIN, Interrupted),
        (errno.ENOMEM, Interrupted),
        (errno.EPERM, IommufdError),
        (errno.ENOENT, IommufdError),
        (errno.EACCES, IommufdError),
        (errno.ENOEXEC, IommufdError),
        # By a limit of the stack.
        (errno.E2BIG, Interrupted),
        (errno.EIO, Interrupted),
    ],
)
def test_what_a_user_can_bring_about(
    emulator: Program, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[IommufdError]
) -> None:
    def refuse(*_words: object) -> NoReturn:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "execve", refuse)
    with pytest.raises(IommufdError, match="to execute it failed") as raised:
        start_emulator(emulator, OWN, MYSELF)
    assert raised.type is kind


def test_a_user_that_one_cannot_become(emulator: Program, children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_groups: list[int]) -> NoReturn:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "setgroups", refuse)
    with pytest.raises(IommufdError, match=r"as other: to become that user failed \(EPERM"):
        start_emulator(emulator, OWN, User("other", os.getuid() + 1, 0, "/"))


@pytest.mark.parametrize("steps", [0, 1])
def test_the_step_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    def refuse(option: int, value: int) -> None:
        if not steps:
            raise OSError(errno.EPERM, f"{option} {value}")

    for name in ("dup2", "chdir"):
        monkeypatch.setattr(os, name, lambda *_words: None)
    for name in ("isolate", "forbid_core"):
        monkeypatch.setattr(_vmm_trial, name, lambda: None)
    monkeypatch.setattr(_vmm_trial, "close_all_but", lambda _keep: None)
    monkeypatch.setattr(resource, "setrlimit", lambda *_given: None)
    monkeypatch.setattr(_vmm_trial, "prctl", refuse)
    reading, writing = os.pipe()
    _vmm_trial._become("/nothing/there", ["x"], [14], True, MYSELF, (1, 2), writing)
    os.close(writing)
    with open(reading, "rb") as report:
        expected = b"2 execute it" if steps else b"1 give up capabilities"
        assert report.read() == expected


def test_what_was_started_ends_with_this_process(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    starter = os.fork()
    if not starter:
        output = (tmp_path / "output").open("wb")
        with output, _vmm_trial._started("/bin/sleep", ["sleep", "600"], OWN, MYSELF, output, output) as pid:
            noted.with_suffix(".new").write_text(str(pid))
            noted.with_suffix(".new").rename(noted)
            signal.pause()
        os._exit(0)
    _await(noted.exists)
    with Process.hold(int(noted.read_text())) as process:
        os.kill(starter, signal.SIGKILL)
        os.waitpid(starter, 0)
        _await(lambda: _has_ended(process))


def _has_ended(process: Process) -> bool:
    with contextlib.suppress(IommufdError):
        process.check_alive()
        return False
    return True


def _await(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def attributes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The attributes that files are given, which none but root may give."""
    given: list[bytes] = []

    def note(fd: int, name: str, value: bytes) -> None:
        assert name == "security.capability"
        assert os.fstat(fd).st_nlink == 0
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o755
        given.append(value)

    monkeypatch.setattr(os, "setxattr", note)
    return given


def test_a_copy_is_tried(emulator: Program, attributes: list[bytes], children: list[int]) -> None:
    before = sorted(os.listdir(os.path.dirname(emulator.path)))
    status = try_copy(emulator, OWN, MYSELF)
    assert status.uid == os.getuid()
    assert status.bounding == OWN.bounding
    assert [each[:8].hex() for each in attributes] == ["0100000200400000"]
    assert sorted(os.listdir(os.path.dirname(emulator.path))) == before


@pytest.mark.usefixtures("anybody")
@pytest.mark.parametrize(("user", "kind"), USERS)
def test_a_copy_that_says_something_else(
    emulator: Program, attributes: list[bytes], monkeypatch: pytest.MonkeyPatch, user: User, kind: type[IommufdError]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name, path: "/bin/echo")
    with pytest.raises(IommufdError, match=r"was executed, but failed: /proc/self/status$") as raised:
        try_copy(emulator, OWN, user)
    assert raised.type is kind


@pytest.mark.usefixtures("anybody")
@pytest.mark.parametrize(("user", "kind"), USERS)
def test_a_copy_that_says_half_of_it(
    emulator: Program, attributes: list[bytes], monkeypatch: pytest.MonkeyPatch, user: User, kind: type[IommufdError]
) -> None:
    """As with a limit of what it may write: what is missing then may be the capability."""
    monkeypatch.setattr(_vmm_trial, "_OUTPUT_MAX", 600)
    with pytest.raises(IommufdError, match=r"was executed, but failed: Name: ") as raised:
        try_copy(emulator, OWN, user)
    assert raised.type is kind


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -KILL $$", "was ended by signal 9"),
        ("kill -STOP $$; sleep 600", "was stopped by signal 19"),
        ("exec sleep 600", "has not ended after 1 seconds"),
    ],
)
def test_a_copy_that_others_may_have_ended(
    emulator: Program, children: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, told: str
) -> None:
    # A script cannot be executed by a descriptor that is closed by that.
    (tmp_path / "cat").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "cat").chmod(0o755)

    @contextlib.contextmanager
    def copy(_program: Program, _what: str) -> Iterator[str]:
        yield str(tmp_path / "cat")

    monkeypatch.setattr(_vmm_trial, "_copy_of_cat", copy)
    monkeypatch.setattr(_vmm_trial, "PATIENCE", 3)
    with pytest.raises(Interrupted, match=told):
        try_copy(emulator, OWN, MYSELF)


def test_a_copy_that_cannot_be_made(emulator: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = changed(emulator, real_path="/nothing/there/qemu")
    with pytest.raises(
        IommufdError, match=r"^A copy of cat with .* next to /nothing/there/qemu cannot be made .ENOENT"
    ):
        try_copy(gone, OWN, MYSELF)
    monkeypatch.setattr(shutil, "which", lambda _name, path: None)
    with pytest.raises(HostLacks, match="There is no cat"):
        try_copy(emulator, OWN, MYSELF)


def test_a_copy_whose_attribute_would_give_more(emulator: Program) -> None:
    odd = changed(emulator, xattr=bytes.fromhex("0000000200100000000000000000000000000000"))
    with pytest.raises(IommufdError, match="cap_net_admin"):
        try_copy(odd, OWN, MYSELF)


@pytest.mark.parametrize(
    ("own", "under", "able"),
    [
        ((IPC_LOCK, False), (IPC_LOCK, False), True),
        ((0, False), (0, False), True),
        ((0, False), (IPC_LOCK, False), False),
        ((IPC_LOCK, True), (IPC_LOCK, False), False),
        ((IPC_LOCK, True), (IPC_LOCK, True), True),
        ((IPC_LOCK, False), (IPC_LOCK, True), True),
    ],
)
def test_a_caller_who_is_worse_off(
    monkeypatch: pytest.MonkeyPatch, own: tuple[int, bool], under: tuple[int, bool], able: bool
) -> None:
    status = changed(own_status(), bounding=own[0], no_new_privs=own[1])
    monkeypatch.setattr(_vmm_trial, "own_status", lambda: status)
    expect: Any = contextlib.nullcontext() if able else pytest.raises(Interrupted, match=r"^This caller runs with")
    with expect:
        check_able(Conditions("libvirtd.service", *under, initial=True))


@pytest.mark.parametrize(
    ("effective", "initial", "lifts"),
    [(IPC_LOCK, True, True), (IPC_LOCK, None, True), (IPC_LOCK, False, False), (0, True, False)],
)
def test_whether_it_lifts_the_limit(effective: int, initial: bool | None, lifts: bool) -> None:
    seen = ProcessSeen("vm", changed(own_status(), effective=effective), Limit(1, 1), initial)
    assert seen.lifts_memlock is lifts


CAPABILITIES = (
    "<domainCapabilities><path>/q</path><domain>kvm</domain><machine>pc'1</machine><arch>x86_64</arch>"
    "</domainCapabilities>"
)


def test_the_domain() -> None:
    text = domain_xml(ET.fromstring(CAPABILITIES), "n", "u", "/a & b")
    domain = ET.fromstring(text)
    assert (domain.get("type"), domain.findtext("name"), domain.findtext("uuid")) == ("kvm", "n", "u")
    kind = domain.find("os/type")
    assert kind is not None
    assert (kind.get("arch"), kind.get("machine")) == ("x86_64", "pc'1")
    assert domain.findtext("devices/emulator") == "/a & b"


VIRSH = """#!/bin/sh
echo "$*" >{folder}/arguments
while read -r word rest; do
    echo "virsh # $word $rest"
    echo "$word $rest" >>{folder}/told
    case $word in
        create) cat "${{rest##* }}" >{folder}/domain; echo '{answer}' ;;
        echo) eval "echo $rest" ;;
    esac
done
"""


@pytest.fixture
def virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a virsh in the place of the real one that notes what it is told, and gives an answer."""
    monkeypatch.setattr(_child, "_PATH", f"{tmp_path}:{_child._PATH}")

    def put(answer: str) -> None:
        (tmp_path / "virsh").write_text(VIRSH.format(folder=tmp_path, answer=answer))
        (tmp_path / "virsh").chmod(0o755)

    return put


def tells(output: str, code: int = 0, errors: str = "") -> Run:
    return lambda _command: (code, output, errors)


def test_a_domain_is_created_and_destroyed(
    virsh: Callable[[str], None], emulator: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    virsh("Domain created")
    logs, profiles = tmp_path / "logs", tmp_path / "profiles"
    monkeypatch.setattr(_vmm_domain, "_LIBVIRT_LOGS", str(logs))
    monkeypatch.setattr(_vmm_domain, "_LIBVIRT_PROFILES", str(profiles))

    @contextlib.contextmanager
    def hold(target: Any) -> Iterator[Process]:
        domain = ET.parse(tmp_path / "domain").getroot()
        assert domain.findtext("name") == target.name
        for folder, name in ((logs, f"{target.name}.log"), (profiles, f"libvirt-{domain.findtext('uuid')}")):
            folder.mkdir()
            (folder / "of-another").touch()
            (folder / name).touch()
        with hold_target(PidTarget(os.getpid())) as process:
            yield process

    monkeypatch.setattr(_vmm_domain, "hold_target", hold)
    seen = start_bare_domain(tells(CAPABILITIES), "qemu:///test", emulator)
    assert seen.user == MYSELF.name
    told = (tmp_path / "told").read_text().splitlines()
    assert told[0].startswith("create --paused --autodestroy /dev/fd/")
    assert told[2:] == [f"destroy {ET.parse(tmp_path / 'domain').getroot().findtext('name')}"]
    assert (tmp_path / "arguments").read_text() == "--connect=qemu:///test\n"
    assert [sorted(each.name for each in folder.iterdir()) for folder in (logs, profiles)] == [["of-another"]] * 2


def test_a_domain_that_is_not_created(virsh: Callable[[str], None], emulator: Program, tmp_path: Path) -> None:
    virsh("error: Failed to create\nerror: no such thing")
    message = "libvirt does not start a domain with .*: error: Failed to create error: no such thing$"
    with pytest.raises(Interrupted, match=message):
        start_bare_domain(tells(CAPABILITIES), "qemu:///test", emulator)
    assert "destroy" in (tmp_path / "told").read_text()


def test_a_virsh_that_ends_at_once(virsh: Callable[[str], None], emulator: Program, tmp_path: Path) -> None:
    virsh("")
    (tmp_path / "virsh").write_text("#!/bin/sh\nexec <&-\necho 'error: failed to connect'; exit 1\n")
    with pytest.raises(Interrupted, match=r"libvirt does not start a domain with .*: error: failed to connect$"):
        start_bare_domain(tells(CAPABILITIES), "qemu:///test", emulator)


@pytest.mark.parametrize("script", ["echo so far; exec sleep 600", "echo so far; kill -STOP $$"])
def test_a_virsh_that_says_no_more(
    virsh: Callable[[str], None], emulator: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    virsh("")
    (tmp_path / "virsh").write_text(f"#!/bin/sh\n{script}\n")
    monkeypatch.setattr(_vmm_domain, "LIBVIRT_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(Interrupted, match=r"libvirt does not start a domain with .*: so far$"):
        start_bare_domain(tells(CAPABILITIES), "qemu:///test", emulator)
    assert time.monotonic() - began < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (tells("", 1, "error: invalid\n argument"), "error: invalid argument$"),
        (tells("no XML"), "no XML$"),
        (tells(""), "it said nothing.$"),
    ],
)
def test_libvirt_does_not_know_the_emulator(emulator: Program, run: Run, why: str) -> None:
    with pytest.raises(Interrupted, match=f"libvirt does not tell what .* can: {why}"):
        start_bare_domain(run, "qemu:///test", emulator)


def missing(_command: list[str]) -> tuple[int, str, str]:
    raise FileNotFoundError(errno.ENOENT, "no")


def test_there_is_no_virsh(emulator: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted, match="virsh does not run: ENOENT"):
        start_bare_domain(missing, "qemu:///test", emulator)
    monkeypatch.setattr(_child, "_PATH", "/nothing")
    with pytest.raises(Interrupted, match="virsh does not run: ENOENT"):
        start_bare_domain(tells(CAPABILITIES), "qemu:///test", emulator)


def unit(program: Program, **settings: str) -> Unit:
    limit = Limit(*_limits())
    return Unit(
        "vm.service",
        "loaded",
        user="vm",
        program=program,
        bounding=0,
        ambient=0,
        private_users=False,
        outdated=False,
        memlock=limit,
        settings=settings,
    )


def test_what_a_replica_takes_over(emulator: Program) -> None:
    usual = ["LimitMEMLOCK=1:infinity", "LimitNPROC=infinity", "TimeoutStartSec=60", "KillSignal=SIGKILL"]
    usual.append("RuntimeMaxSec=120")
    none = ["CapabilityBoundingSet=", "AmbientCapabilities=", "SecureBits="]
    limit = Limit(1, None)
    assert replica_properties(changed(unit(emulator), memlock=limit)) == [*none, *usual]
    settings = {
        "User": "vm",
        "Group": "",
        "SupplementaryGroups": "kvm disk",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "cap_ipc_lock cap_kill",
        "AmbientCapabilities": "cap_ipc_lock",
        "SecureBits": "17",
        "ExecStart": "not this",
    }
    assert replica_properties(changed(unit(emulator, **settings), memlock=limit)) == [
        "User=vm",
        "SupplementaryGroups=kvm disk",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=cap_ipc_lock cap_kill",
        "AmbientCapabilities=cap_ipc_lock",
        "SecureBits=noroot keep-caps",
        *usual,
    ]


class Systemd:
    """Starts nothing, and gives this process for what it was to start."""

    def __init__(self, code: int = 0, pid: str = str(os.getpid()), journal: str = "", ended: str = "0 0") -> None:
        self._code, self._pid, self._journal, self._ended = code, pid, journal, ended
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> tuple[int, str, str]:
        self.commands.append(command)
        if command[0] == "systemd-run":
            return self._code, "", "Job failed.\n" if self._code else ""
        if command[3:4] == ["--property=ExecMainCode,ExecMainStatus"]:
            return 0, "ExecMainCode={}\nExecMainStatus={}\n".format(*self._ended.split()), ""
        if command[:2] == ["systemctl", "show"]:
            return 0, f"MainPID={self._pid}\n", ""
        if command[0] == "journalctl":
            return 0, self._journal.format(self.name), ""
        return 0, "", ""

    @property
    def name(self) -> str:
        (name,) = [word[7:] for word in self.commands[0] if word.startswith("--unit=")]
        return name

    def check_ended(self) -> None:
        """It is forgotten only once it was asked for."""
        assert "--collect" not in self.commands[0]
        assert self.commands[-2:] == [["systemctl", verb, "--", self.name] for verb in ("stop", "reset-failed")]


@pytest.mark.parametrize("qemu", [True, False])
def test_a_replica_is_started_and_stopped(emulator: Program, qemu: bool) -> None:
    systemd = Systemd()
    seen = start_replica(systemd, unit(changed(emulator, is_program=qemu)))
    assert (seen.user, seen.status.uid) == (MYSELF.name, os.getuid())
    command = systemd.commands[0][systemd.commands[0].index("--") + 1 :]
    assert command[:2] == ([emulator.path, "-no-user-config"] if qemu else ["sleep", "240"])
    systemd.check_ended()


FAILED = "Starting\n{0}: Failed at step USER spawning x: No such process\n{0}: Failed.\n"


@pytest.mark.parametrize(
    ("systemd", "kind", "message"),
    [
        # CLD_EXITED with a status is a verdict of root's; CLD_KILLED, and what ends with success, is none.
        (
            Systemd(code=1, journal=FAILED, ended="1 217"),
            IommufdError,
            "vm.service: Failed at step USER spawning x: No such process$",
        ),
        (Systemd(pid="0", journal="x\n{0}: ended\n", ended="1 1"), IommufdError, "ended at once: x ended$"),
        (Systemd(pid="0", ended="2 9"), Interrupted, "A service like vm.service ended at once: signal 9 has ended its"),
        (Systemd(pid="0", ended="3 6"), Interrupted, "signal 6 has ended its process, so nothing is known of it"),
        (Systemd(pid="0", ended="1 0"), Interrupted, "ended at once"),
        (Systemd(pid=""), Interrupted, "ended at once"),
        (Systemd(code=1), Interrupted, "systemd does not start a service like vm.service: Job failed.$"),
        (Systemd(code=124, ended="2 15"), Interrupted, "systemd does not start a service"),
    ],
)
def test_a_replica_that_does_not_start(
    emulator: Program, systemd: Systemd, kind: type[IommufdError], message: str
) -> None:
    for user in ("root", "vm", None):
        with pytest.raises(IommufdError, match=message) as raised:
            start_replica(systemd, changed(unit(emulator), user=user))
        assert raised.type is (kind if user == "root" else Interrupted)
        systemd.check_ended()
        systemd.commands.clear()


def test_a_replica_whose_limit_somebody_has_changed(emulator: Program) -> None:
    """As its user may by prlimit(2)."""
    systemd = Systemd()
    with pytest.raises(Interrupted, match="has not the limit of locked memory that systemd gave it"):
        start_replica(systemd, changed(unit(emulator), memlock=Limit(123, 123)))
    systemd.check_ended()


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("user", ["root", "vm"])
def test_a_replica_whose_capability_somebody_has_taken(
    emulator: Program, user: str, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its user that has the same capability may trace it. Of what root has decided it is a verdict."""
    monkeypatch.setattr(_vmm_replica, "unit_obstacles", lambda _unit: ["PrivateUsers"] if static else [])
    monkeypatch.setattr(ProcessSeen, "lifts_memlock", False)
    systemd = Systemd()
    given = changed(unit(emulator), user=user, ambient=IPC_LOCK)
    if user == "root" or static:
        assert not start_replica(systemd, given).lifts_memlock
    else:
        with pytest.raises(Interrupted, match="has not got CAP_IPC_LOCK that systemd gave it"):
            start_replica(systemd, given)
    systemd.check_ended()
    # It was never given any.
    assert not start_replica(Systemd(), changed(given, ambient=0)).lifts_memlock


def test_what_is_said_has_a_bound() -> None:
    """Whoever takes the file from a program that runs as him can make no more of it, and not keep us from reading."""
    with _vmm_trial._output() as output:
        assert _vmm_trial._content(output) == b""
        other = os.open(f"/proc/self/fd/{output.fileno()}", os.O_RDWR)
        os.write(other, b"one\n")
        assert _vmm_trial._content(output) == b"one\n"
        for act in (lambda: os.ftruncate(other, 0), lambda: os.pwrite(other, b"x", 2**20)):
            with pytest.raises(PermissionError):
                act()
        assert os.fstat(other).st_size == 2**20
        os.close(other)


def test_there_is_no_systemd(emulator: Program) -> None:
    with pytest.raises(Interrupted, match=r"a service like vm.service: systemd-run cannot be run .ENOENT"):
        start_replica(missing, unit(emulator))


@pytest.fixture
def runuser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a runuser in the place of the real one."""
    monkeypatch.setattr(_child, "_PATH", f"{tmp_path}:{_child._PATH}")

    def put(script: str) -> None:
        (tmp_path / "runuser").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "runuser").chmod(0o755)

    return put


@pytest.mark.parametrize(
    "script", ['test "$*" = "-u {name} -- true"', "exit 137", "kill -STOP $$", "ulimit -S -l 8; kill -STOP $$"]
)
def test_the_limit_in_a_session(runuser: Callable[[str], None], script: str) -> None:
    runuser(script.format(name=MYSELF.name))
    soft, hard = _limits()
    expected = Limit(8192 if "ulimit" in script else soft, hard)
    assert open_session(MYSELF) == expected
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("script", "why"), [("echo 'runuser: no' >&2; exit 1", "runuser: no$"), ("exit 126", "exit code 126.$")]
)
def test_a_session_that_is_not_opened(runuser: Callable[[str], None], script: str, why: str) -> None:
    runuser(script)
    with pytest.raises(Interrupted, match=f"PAM does not open a session of {MYSELF.name}: {why}"):
        open_session(MYSELF)


def test_a_session_that_takes_too_long(runuser: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    runuser("sleep 600")
    monkeypatch.setattr(_vmm_trial, "COMMAND_SECONDS", 1)
    with pytest.raises(Interrupted, match="PAM does not open a session within 1 seconds"):
        open_session(MYSELF)


@pytest.fixture
def iommu(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """Makes /dev/null pass for /dev/iommu."""
    monkeypatch.setattr(_device, "misc_rdev", lambda: os.stat(os.devnull).st_rdev)
    monkeypatch.setattr(_device, "DEVICE", os.devnull)
    return kernel


def test_an_iommufd_is_set_and_read_by_the_user(iommu: FakeKernel, children: list[int]) -> None:
    assert try_mode(MYSELF) == "process"
    assert len(children) == 1


def test_an_iommufd_that_cannot_be_set(iommu: FakeKernel) -> None:
    iommu.privileged = False
    with pytest.raises(IommufdError, match=r"cannot be set to per-process accounting .EPERM"):
        try_mode(MYSELF)


def test_an_iommufd_that_the_user_cannot_read(iommu: FakeKernel, children: list[int]) -> None:
    iommu.after_set = lambda kernel: setattr(kernel, "without", errno.ENOTTY)
    with pytest.raises(IommufdError, match=f"{MYSELF.name} cannot read the mode of an iommufd .ENOTTY"):
        try_mode(MYSELF)


def test_an_iommufd_and_a_user_that_one_cannot_become(
    iommu: FakeKernel, children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_user: User) -> NoReturn:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(_user, "has_ids", lambda _user: False)
    monkeypatch.setattr(_user, "become", refuse)
    with pytest.raises(IommufdError, match=f"cannot become user {MYSELF.name} .EPERM") as raised:
        try_mode(MYSELF)
    assert raised.type is IommufdError


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_iommufd_and_a_child_that_is_kept_from_reading(
    iommu: FakeKernel, children: list[int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(_vmm_trial, "_READING_SECONDS", 1)
    monkeypatch.setattr(_vmm_trial, "_mode", lambda _fd, _user: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted):
        try_mode(MYSELF)


def test_an_iommufd_that_cannot_be_opened(iommu: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, _flags: int) -> NoReturn:
        raise PermissionError(errno.EPERM, path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(IommufdError, match=r"/dev/null cannot be opened by uid [0-9]+ .EPERM"):
        try_mode(MYSELF)


@pytest.mark.parametrize(
    ("rdev", "kind", "words"),
    [(None, HostLacks, "^This kernel has no iommufd"), (7, NotAnIommufd, "^/dev/null is not the kernel's iommufd")],
)
def test_there_is_no_iommufd(
    iommu: FakeKernel, monkeypatch: pytest.MonkeyPatch, rdev: int | None, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(_device, "misc_rdev", lambda: rdev)
    with pytest.raises(kind, match=words):
        try_mode(MYSELF)


def test_parse_status_takes_what_cat_prints() -> None:
    # The name comes first, and has no line before it.
    assert parse_status(b"\n" + Path("/proc/self/status").read_bytes()).uid == os.getuid()
