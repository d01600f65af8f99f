# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import resource
import signal
import sys
import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _child, _syscalls, _user
from ansible_collections.virt.iommufd.plugins.module_utils._child import (
    Interrupted,
    NoAnswer,
    ask_child,
    environment,
    in_child,
    insist,
    spawn,
)
from ansible_collections.virt.iommufd.plugins.module_utils._command import start_command
from ansible_collections.virt.iommufd.plugins.module_utils._domain_start import NoDaemon
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._user import User, find_user

VM = User("vm", 1001, 1002, "/home/vm")
WHO = "The process that does this as root"


def me() -> User:
    found = pwd.getpwuid(os.getuid())
    return User(found.pw_name, os.getuid(), os.getgid(), found.pw_dir)


def test_what_the_work_returns_comes_back() -> None:
    assert in_child(None, lambda: {"pid": os.getpid(), "text": "ä"}, 30)["pid"] != os.getpid()


def test_much_comes_back() -> None:
    assert in_child(None, lambda: "x" * 500_000, 30) == "x" * 500_000


def test_the_child_has_nothing_of_ours_but_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    ours, kept = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)

    def look() -> dict[str, Any]:
        # The folder itself is open while it is read.
        names = [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]
        fds = {name: os.readlink(f"/proc/self/fd/{name}") for name in names}
        return {"fds": fds, "environment": dict(os.environ), "folder": os.getcwd(), "mask": os.umask(0)}

    try:
        found = in_child(None, look, 30, [kept])
    finally:
        os.close(ours)
        os.close(kept)
    fds = found["fds"]
    assert {fds.pop(str(fd)) for fd in (0, 1, 2, kept)} == {os.devnull}
    # The pipe to us is the only other one.
    assert [each.partition(":")[0] for each in fds.values()] == ["pipe"]
    assert found["environment"] == environment(None)
    assert (found["folder"], found["mask"]) == ("/", 0o077)
    assert os.environ["SECRET"] == "1"


def test_who_is_that_user_already_need_not_become_it() -> None:
    assert in_child(me(), lambda: os.environ["HOME"], 30) == me().home


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_root_becomes_the_user_for_good() -> None:
    nobody = find_user("nobody")

    def look() -> list[Any]:
        with pytest.raises(PermissionError):
            os.setuid(0)
        return [os.getresuid(), os.getresgid(), os.getgroups()]

    assert in_child(nobody, look, 30) == [[nobody.uid] * 3, [nobody.gid] * 3, [nobody.gid]]
    assert os.getuid() == 0


@pytest.mark.parametrize("error", [NoDaemon, HostLacks, IommufdError])
def test_an_error_comes_back_as_what_it_was(error: type[IommufdError]) -> None:
    def fail() -> None:
        raise error("No \x1b[31mway.")

    with pytest.raises(error, match=r"^No \\x1b\[31mway\.$") as raised:
        in_child(None, fail, 30)
    assert raised.type is error


def test_any_other_error_is_told() -> None:
    with pytest.raises(IommufdError, match=f"^{WHO} failed with IndexError: list index out of range$"):
        in_child(None, lambda: itemgetter(1)([]), 30)


def test_a_child_that_ends() -> None:
    with pytest.raises(IommufdError, match=f"^{WHO} has ended without an answer") as raised:
        in_child(None, lambda: os._exit(0), 30)
    assert raised.type is IommufdError


@pytest.mark.parametrize(
    "work", [lambda: os._exit(0), lambda: os._exit(3), lambda: itemgetter(1)([]), lambda: "x" * 2**21]
)
@pytest.mark.parametrize(("uid", "kind"), [(0, IommufdError), (1001, Interrupted)])
def test_a_child_that_its_user_may_have_had_fail(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], uid: int, kind: type[IommufdError]
) -> None:
    """By its limits, for one."""
    monkeypatch.setattr(_user, "has_ids", lambda _user: True)
    with pytest.raises(IommufdError, match=r"^The process that does this as user vm ") as raised:
        in_child(User("vm", uid, uid, "/"), work, 30)
    assert raised.type is kind


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_is_ended(number: int) -> None:
    with pytest.raises(Interrupted, match=f"^{WHO} was ended by signal {number:d}, before it could answer"):
        in_child(None, lambda: os.kill(os.getpid(), number), 30)


def test_what_is_interrupted_is_tried_again() -> None:
    def act(last: int) -> object:
        tried.append(0)
        if len(tried) < last:
            raise Interrupted("once more")
        return len(tried)

    tried: list[int] = []
    assert insist(lambda: act(3)) == 3
    tried = []
    with pytest.raises(Interrupted, match="once more"):
        insist(lambda: act(4))
    assert len(tried) == 3


def test_several_answers_and_an_error() -> None:
    def work() -> Iterator[int]:
        yield 1
        yield 2
        raise HostLacks("three")

    said = ask_child(None, work, 30)
    assert [next(said), next(said)] == [1, 2]
    with pytest.raises(HostLacks, match=r"^three$"):
        next(said)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_each_answer_has_a_time_of_its_own() -> None:
    def work() -> Iterator[int]:
        for number in range(4):
            time.sleep(0.3)
            yield number
        time.sleep(60)

    said = ask_child(None, work, 1)
    assert [next(said) for _number in range(4)] == [0, 1, 2, 3]
    with pytest.raises(NoAnswer):
        next(said)


def test_no_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One user may have taken all ids that there are."""
    before = os.listdir("/proc/self/fd")

    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "no more")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(HostLacks, match=r"No process can be started here \(EAGAIN"):
        in_child(None, list, 10)
    assert os.listdir("/proc/self/fd") == before


def test_a_child_that_is_stopped_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(NoAnswer):
        in_child(None, lambda: os.kill(os.getpid(), signal.SIGSTOP), 0.2)
    assert time.monotonic() - began < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_one_that_cannot_be_ended_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_child, "_ENDING", 0.1)
    monkeypatch.setattr(os, "killpg", lambda *_given: None)
    monkeypatch.setattr(os, "kill", lambda *_given: None)
    began = time.monotonic()
    with pytest.raises(NoAnswer):
        in_child(None, lambda: time.sleep(5), 0.1)
    assert time.monotonic() - began < 4
    # It is still ours, and runs.
    assert os.waitpid(-1, os.WNOHANG) == (0, 0)
    os.waitpid(-1, 0)


def test_what_a_child_has_started_ends_with_it(tmp_path: Path) -> None:
    def work() -> None:
        pid = os.fork()
        if not pid:
            time.sleep(60)
        (tmp_path / "pid").write_text(str(pid))
        time.sleep(60)

    with pytest.raises(NoAnswer):
        in_child(None, work, 1)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    # Whoever inherits it buries it.
    for _attempt in range(100):
        if not status.exists() or ") Z " in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("It goes on.")


def test_nothing_goes_on_without_us(tmp_path: Path) -> None:
    """Neither a child nor a command: the next run would not know what they change later."""
    pids = tmp_path / "pids"
    pids.touch()

    def note(pid: int) -> None:
        with pids.open("a") as stream:
            stream.write(f"{pid}\n")

    def work() -> None:
        note(os.getpid())
        note(start_command(["sleep", "600"], (None, None, None)))
        time.sleep(600)

    ours = os.fork()
    if not ours:
        with contextlib.suppress(BaseException):
            note(start_command(["sleep", "600"], (None, None, None)))
            in_child(None, work, 600)
        os._exit(1)
    deadline = time.monotonic() + 60
    while pids.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ours, signal.SIGKILL)
    os.waitpid(ours, 0)
    for pid in pids.read_text().split():
        while running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def running(pid: str) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def test_a_child_has_a_session_and_keys_of_its_own() -> None:
    def look() -> list[Any]:
        return [os.getsid(0) == os.getpid(), _syscalls._syscall(number, 0, -3, 0)]

    # KEYCTL_GET_KEYRING_ID of KEY_SPEC_SESSION_KEYRING
    number = _syscalls._KEYCTL.get(os.uname().machine, _syscalls._KEYCTL_GENERIC)
    mine = _syscalls._syscall(number, 0, -3, 0)
    alone, theirs = in_child(None, look, 30)
    assert alone
    assert -1 not in (mine, theirs)
    assert theirs != mine


@pytest.mark.parametrize(("live", "code"), [(os.getpid, 0), (lambda: itemgetter(1)([]), 1), (sys.exit, 1)])
def test_a_child_does_nothing_but_live(live: Callable[[], object], code: int) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: os.write(writer, b"."))
        reader, writer = os.pipe()
        status = _child.bury(spawn(live), 30)
        assert status is not None
        assert os.waitstatus_to_exitcode(status) == code
    # The stack is ours alone to unwind.
    assert os.read(reader, 9) == b"."
    os.close(reader)
    os.close(writer)


def test_a_child_that_hangs_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=f"^{WHO} got no answer within 0 seconds"):
        in_child(None, lambda: time.sleep(60), 0.1)
    assert time.monotonic() - began < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_time_that_has_run_out_before_anything_was_said() -> None:
    with pytest.raises(NoAnswer, match="no answer"):
        in_child(None, lambda: None, -1)


def test_an_answer_without_end_is_none() -> None:
    with pytest.raises(IommufdError, match="without an answer"):
        in_child(None, lambda: "x" * 2**21, 30)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"3", b"{}", b'{"error": 3}', b'{"error": ["a"]}', b"\xff", b"[" * 100_000]
)
def test_what_is_no_answer(text: bytes) -> None:
    with pytest.raises(IommufdError, match=r"^The process that does this as user vm has ended without an answer"):
        _child._judge(VM, text)


def test_an_error_that_there_is_not() -> None:
    with pytest.raises(IommufdError, match=r"^What$"):
        _child._judge(VM, b'{"error": ["SystemExit", "What"]}')


def test_environment() -> None:
    assert environment(VM) == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C",
        "LIBVIRT_AUTOSTART": "0",
        "HOME": "/home/vm",
        "USER": "vm",
        "LOGNAME": "vm",
        "XDG_RUNTIME_DIR": "/run/user/1001",
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/1001/bus",
    }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module os that only notes down in `calls` what would change this process."""
    made: list[Any] = []
    fake = SimpleNamespace(**vars(os))
    for name in ("chdir", "umask", "dup2", "close"):
        setattr(fake, name, lambda *given, name=name: made.append((name, *given)))
    fake.environ = {"SECRET": "1"}
    fake.open = lambda *_given: 9
    fake.listdir = lambda _folder: ["0", "1", "2", "3", "7", "9"]
    fake.calls = made
    monkeypatch.setattr(_child, "os", fake)
    return fake


def test_the_steps_to_another_user(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_user, "become", lambda user: fake.calls.append(("become", user)))
    monkeypatch.setattr(_user, "be_private", lambda: fake.calls.append("private"))
    monkeypatch.setattr(resource, "setrlimit", lambda *given: fake.calls.append(given))
    _child._enter(VM)
    limit = (resource.RLIMIT_AS, (2**31, 2**31))
    assert fake.calls == [limit, ("become", VM), "private", ("chdir", "/"), ("umask", 0o077)]
    assert fake.environ == environment(VM)


def test_who_may_not_become_another_user(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: Any) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(_user, "become", refuse)
    monkeypatch.setattr(resource, "setrlimit", lambda *_given: None)
    with pytest.raises(IommufdError, match=r"cannot become user vm \(EPERM: .*become: true"):
        _child._enter(VM)
    assert fake.calls == []


def test_the_descriptors_that_are_closed(fake: SimpleNamespace) -> None:
    _child.close_all_but({7})
    assert fake.calls == [("dup2", 9, 0), ("dup2", 9, 1), ("dup2", 9, 2), ("close", 3), ("close", 9)]


def fail() -> None:
    raise NoDaemon("gone")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: 7, {"value": 7}),
        (fail, {"error": ["NoDaemon", "gone"]}),
        (
            lambda: itemgetter(1)([]),
            {"error": ["IommufdError", f"{WHO} failed with IndexError: list index out of range"]},
        ),
    ],
)
def test_the_childs_life(work: Callable[[], Any], said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("end_with", "isolate", "close_all_but", "_enter"):
        monkeypatch.setattr(_child, name, lambda *_given: None)
    monkeypatch.setattr(_child, "_is_child", False)
    reader, writer = os.pipe()
    _child._serve(1, None, lambda: (work() for _once in "1"), writer, [])
    os.close(writer)
    with open(reader, "rb") as stream:
        assert json.loads(stream.read()) == said
