# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import json
import os
import pwd
import signal
import time
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _child
from ansible_collections.virt.iommufd.plugins.module_utils._child import NoAnswer, environment, in_child
from ansible_collections.virt.iommufd.plugins.module_utils._domain import NoDaemon
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._user import User, find_user

VM = User("vm", 1001, 1002, "/home/vm")
WHO = "The process that asks libvirt as root"


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


@pytest.mark.parametrize("end", [lambda: os._exit(0), lambda: os.kill(os.getpid(), signal.SIGSEGV)])
def test_a_child_that_dies(end: Callable[[], None]) -> None:
    with pytest.raises(IommufdError, match=f"^{WHO} has ended without an answer"):
        in_child(None, end, 30)


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


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{}", b'{"error": 3}', b'{"error": ["a"]}', b"\xff"])
def test_what_is_no_answer(text: bytes) -> None:
    with pytest.raises(IommufdError, match=r"^The process that asks libvirt as user vm has ended without an answer"):
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
    monkeypatch.setattr(_child, "become", lambda user: fake.calls.append(("become", user)))
    _child._become(VM)
    assert fake.calls == [("become", VM), ("chdir", "/"), ("umask", 0o077)]
    assert fake.environ == environment(VM)


def test_who_may_not_become_another_user(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: Any) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(_child, "become", refuse)
    with pytest.raises(IommufdError, match=r"cannot become user vm \(EPERM: .*become: true"):
        _child._become(VM)
    assert fake.calls == []


def test_the_descriptors_that_are_closed(fake: SimpleNamespace) -> None:
    _child._close_all_but({7})
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
    def end(code: int) -> None:
        raise SystemExit(code)

    for name in ("_close_all_but", "_become"):
        monkeypatch.setattr(_child, name, lambda _given: None)
    monkeypatch.setattr(os, "_exit", end)
    reader, writer = os.pipe()
    with pytest.raises(SystemExit, match=r"^0$"):
        _child._serve(None, work, writer, [])
    os.close(writer)
    with open(reader, "rb") as stream:
        assert json.loads(stream.read()) == said
