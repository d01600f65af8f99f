# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a user can do to whatever is started as that user for a look, and what it gets to see of root's."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NoReturn

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _vmm_look, _vmm_replica, _vmm_trial
from ansible_collections.virt.iommufd.plugins.module_utils._user import find_user
from ansible_collections.virt.iommufd.plugins.modules import iommufd_vmm_check
from ansible_collections.virt.iommufd.tests.kernel.harness import PATIENCE, RUN_MODULE, TREE, VM, Answer, change_user
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

pytestmark = pytest.mark.once

# Where Debian has it, or Red Hat's family.
QEMU = next(filter(os.path.exists, ["/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"]), "")
SERVICE = Path("/run/systemd/system/kernel-test-children.service")

# linux/ptrace.h and linux/elf.h
PTRACE_PEEKTEXT, PTRACE_POKETEXT, PTRACE_SINGLESTEP, PTRACE_GETREGSET, PTRACE_SETREGSET = 1, 4, 9, 0x4204, 0x4205
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
NT_PRSTATUS = 1
CAPABILITY_VERSION_3 = 0x20080522

# Of x86-64, and of arm64: the places of registers in what is told of NT_PRSTATUS, among them those of a system call's
# number and its first two arguments; the instruction for one; and the numbers of three.
X86 = os.uname().machine == "x86_64"
PC, SP, NUMBER, FIRST, SECOND, REGISTERS = (16, 19, 10, 14, 13, 27) if X86 else (32, 31, 8, 0, 1, 34)
SYSCALL = 0x050F if X86 else 0xD4000001
SYS_CAPSET, SYS_ADD_KEY, SYS_KEYCTL = (126, 248, 250) if X86 else (91, 217, 219)

# linux/keyctl.h
KEYCTL_JOIN_SESSION_KEYRING = 1
SESSION_KEYRING = -3

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    """Ends all of it, should the module hang."""
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)


def ptrace(request: int, pid: int, address: int = 0, data: Any = 0) -> int:
    _libc.ptrace.restype = ctypes.c_long
    ctypes.set_errno(0)
    given = ctypes.c_void_p(data) if isinstance(data, int) else data
    result: int = _libc.ptrace(request, pid, ctypes.c_void_p(address), given)
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def strip(pid: int) -> None:
    """Has another process of this user give up all capabilities. Raises OSError."""
    # One that is attached to while it executes a program gets a signal for that, too, which would count as the step.
    ptrace(PTRACE_SEIZE, pid)
    try:
        ptrace(PTRACE_INTERRUPT, pid)
        os.waitpid(pid, 0)
        registers = (ctypes.c_ulong * REGISTERS)()
        vector = (ctypes.c_ulong * 2)(ctypes.addressof(registers), ctypes.sizeof(registers))
        ptrace(PTRACE_GETREGSET, pid, NT_PRSTATUS, vector)
        before = list(registers)
        # Not where it is: arm64 would take that for the call that was interrupted, and begin that anew.
        place = before[PC] + 4
        text = ptrace(PTRACE_PEEKTEXT, pid, place)
        header = (before[SP] & ~15) - 1024
        for word, value in enumerate((CAPABILITY_VERSION_3, 0, 0, 0)):
            ptrace(PTRACE_POKETEXT, pid, header + 8 * word, value)
        ptrace(PTRACE_POKETEXT, pid, place, SYSCALL)
        registers[PC], registers[NUMBER] = place, SYS_CAPSET
        registers[FIRST], registers[SECOND] = header, header + 8
        ptrace(PTRACE_SETREGSET, pid, NT_PRSTATUS, vector)
        ptrace(PTRACE_SINGLESTEP, pid)
        os.waitpid(pid, 0)
        ptrace(PTRACE_POKETEXT, pid, place, text)
        registers[:] = before
        ptrace(PTRACE_SETREGSET, pid, NT_PRSTATUS, vector)
    finally:
        ptrace(PTRACE_DETACH, pid)


def strip_all(writing: int) -> NoReturn:
    """As a VMM of a unit that has CAP_IPC_LOCK: takes it from whatever comes to be its user's; tells of each."""
    done: set[int] = set()
    while True:
        for pid in own_processes():
            with contextlib.suppress(OSError):
                # What has just been started is systemd's, up to the moment when it executes its program.
                if pid not in done and os.readlink(f"/proc/{pid}/exe") == os.path.realpath("/usr/bin/sleep"):
                    strip(pid)
                    if "\nCapEff:\t0000000000000000\n" in Path(f"/proc/{pid}/status").read_text():
                        done.add(pid)
                        os.write(writing, f"{pid}\n".encode())


@contextlib.contextmanager
def user_who(acts: Callable[[int], NoReturn], *capabilities: str) -> Iterator[int]:
    """A process of the user vm that does something for ever; gives what it writes to its descriptor."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            os.setsid()
            change_user(VM, *capabilities)
            acts(writing)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        yield reading
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has ended"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


def all_get(number: int) -> Callable[[int], NoReturn]:
    """Sends a signal to all processes of its user but itself."""

    def act(_writing: int) -> NoReturn:
        while True:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, number)

    return act


def own_processes() -> Iterator[int]:
    """The other processes of this user that came after this one."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) > os.getpid():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    yield int(name)


def lower_limits(_writing: int) -> NoReturn:
    """Takes all processes of its user the right to lock memory."""
    while True:
        for pid in own_processes():
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (4096, 4096))


def take_memory(_writing: int) -> NoReturn:
    """Takes whatever comes to be its user's nearly all memory, so that it fails by itself."""
    while True:
        last = int(Path("/proc/loadavg").read_text().split()[-1])
        # What has just become its user's does not look like it in /proc.
        for pid in range(max(os.getpid() + 1, last - 20), last + 4):
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_AS, (2**16, 2**16))


def spy(writing: int) -> NoReturn:
    """Tells of each process of its user: its name, its terminal, and whether root's secret is in its environment."""
    while True:
        for pid in own_processes():
            with contextlib.suppress(OSError):
                name, _end, stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
                secret = "S3CRET" in Path(f"/proc/{pid}/environ").read_text(errors="replace")
                told = {"name": name.partition("(")[2], "terminal": int(stat.split()[4]), "secret": secret}
                os.write(writing, json.dumps(told).encode() + b"\n")


def checked(**options: Any) -> Answer:
    answered = run(iommufd_vmm_check, **options)
    assert not answered.get("failed"), answered
    return answered


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """A service of the user vm."""
    SERVICE.write_text("[Service]\nUser=vm\nExecStart=/usr/bin/sleep 600\nLimitMEMLOCK=123M\n")
    assert not os.system("systemctl daemon-reload")
    yield SERVICE.name
    SERVICE.unlink()
    assert not os.system("systemctl daemon-reload")


@pytest.mark.host
def test_a_user_who_ends_all_that_is_started(service: str) -> None:
    with user_who(all_get(signal.SIGKILL)):
        answered = checked(
            emulators=[QEMU],
            units=[service],
            users=["vm"],
            user="vm",
            trial=True,
            start=True,
            try_iommufd=True,
        )
    [emulator], [unit], [user] = answered["emulators"], answered["units"], answered["users"]
    rows = [emulator["started"], unit["replica"], emulator["trial"], answered["try_iommufd"], user]
    assert [row for row in rows if row["ok"] is False] == []
    # These take long enough to be hit each time. The session's limit is seen in a process of root's.
    assert [row["inconclusive"] for row in rows[:2]] == [True, True]
    assert "was ended by signal 9, so nothing is known of it" in emulator["started"]["msg"]
    assert (user["ok"], user["inconclusive"]) == (True, False)


@pytest.mark.host
def test_a_user_who_stops_all_that_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vmm_trial, "_READING_SECONDS", 3, raising=False)
    began = time.monotonic()
    with user_who(all_get(signal.SIGSTOP)):
        answered = checked(emulators=[QEMU], users=["vm"], user="vm", trial=True, start=True, try_iommufd=True)
    assert time.monotonic() - began < PATIENCE / 4
    [emulator], [user] = answered["emulators"], answered["users"]
    rows = [emulator["started"], emulator["trial"], answered["try_iommufd"], user]
    assert [row for row in rows if row["ok"] is False] == []
    assert emulator["started"]["inconclusive"]
    assert "was stopped by signal 19, so nothing is known of it" in emulator["started"]["msg"]
    assert (user["ok"], user["inconclusive"]) == (True, False)


@pytest.mark.host
def test_a_user_who_asks_the_emulator_to_end() -> None:
    """QEMU ends with success then."""
    with user_who(all_get(signal.SIGTERM)):
        started = checked(emulators=[QEMU], user="vm", start=True)["emulators"][0]["started"]
    assert (started["ok"], started["inconclusive"]) == (None, True)


def test_a_user_who_lowers_limits(service: str) -> None:
    [before] = checked(users=["vm"])["users"]
    with user_who(lower_limits):
        answered = checked(units=[service], users=["vm"] * 3, start=True)
    assert [row["memlock_bytes"] for row in answered["users"]] == [before["memlock_bytes"]] * 3
    replica = answered["units"][0]["replica"]
    assert replica["ok"] is None
    assert "has not the limit of locked memory that systemd gave it" in replica["msg"]


def test_a_user_who_takes_the_capability(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a process that has it itself may trace one that has it."""
    look = _vmm_trial.see_in_child
    folder = SERVICE.with_name(f"{service}.d")
    folder.mkdir()
    (folder / "grant.conf").write_text("[Service]\nAmbientCapabilities=CAP_IPC_LOCK\n")
    try:
        assert not os.system("systemctl daemon-reload")
        [unit] = checked(units=[service], start=True)["units"]
        assert unit["replica"]["ok"]
        with user_who(strip_all) as told:
            [unit] = checked(units=[service], start=True)["units"]
            assert unit["replica"]["ok"]
            assert not select.select([told], [], [], 0)[0]
        with user_who(strip_all, "ipc_lock") as told:

            def look_late(hold: Any) -> Any:
                """The user needs luck to be quicker than root is. Here it is given."""
                assert select.select([told], [], [], PATIENCE / 4)[0]
                return look(hold)

            monkeypatch.setattr(_vmm_replica, "see_in_child", look_late)
            [unit] = checked(units=[service], start=True)["units"]
        assert (unit["replica"]["ok"], unit["replica"]["inconclusive"]) == (None, True)
        assert "has not got CAP_IPC_LOCK that systemd gave it" in unit["replica"]["msg"]
    finally:
        (folder / "grant.conf").unlink()
        folder.rmdir()
        assert not os.system("systemctl daemon-reload")


@pytest.mark.host
def test_a_user_who_has_all_that_is_started_fail(service: str) -> None:
    """It ends by itself then, as if it could not start."""
    with user_who(take_memory):
        answered = checked(emulators=[QEMU], units=[service], user="vm", trial=True, start=True, try_iommufd=True)
    [emulator], [unit] = answered["emulators"], answered["units"]
    # The emulator and the unit have no capability: that may have been seen, before.
    for row in (emulator["trial"], answered["try_iommufd"]):
        assert row["ok"] is not False, row
    for row in (emulator["started"], unit["replica"]):
        assert row["inconclusive"] or row["effective"] is not None, row
    assert emulator["started"]["inconclusive"]


def test_a_user_sees_neither_the_environment_nor_the_terminal_of_root() -> None:
    program = ["python3", str(RUN_MODULE), json.dumps({"users": ["vm"] * 8}), "iommufd_vmm_check"]
    environment = {**os.environ, "PASSWORD": "S3CRET", "PYTHONPATH": str(TREE), "PYTHONDONTWRITEBYTECODE": "1"}
    seen: list[Answer] = []
    with user_who(spy) as reading:
        # Each is there for a moment only.
        while not any(each["name"] in ("true", "cat") for each in seen):
            module, terminal = pty.fork()
            if not module:
                os.execvpe(program[0], program, environment)
            said = b""
            with contextlib.suppress(OSError):
                # EIO once the other side is closed.
                while more := os.read(terminal, 65536):
                    said += more
            os.close(terminal)
            assert os.waitpid(module, 0)[1] == 0, said
            while select.select([reading], [], [], 0)[0]:
                seen += [json.loads(line) for line in os.read(reading, 65536).splitlines() if line.endswith(b"}")]
    assert [each for each in seen if each["secret"] or each["terminal"]] == []


def test_a_user_gets_no_key_of_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started tells itself what it can find: its session's keys, its environment, its terminal."""
    assert _libc.syscall(SYS_KEYCTL, KEYCTL_JOIN_SESSION_KEYRING, None) > 0
    key = _libc.syscall(SYS_ADD_KEY, b"user", b"kernel-test", b"S3CRET", 6, SESSION_KEYRING)
    assert key > 0
    told = Path("/run/kernel-test-told")
    told.touch()
    os.chown(told, VM, VM)
    code = f"""
import ctypes, json, os, time
libc = ctypes.CDLL(None)
KEYCTL_SEARCH = 10
try:
    terminal = os.open('/dev/tty', os.O_RDWR)
except OSError:
    terminal = None
found = libc.syscall({SYS_KEYCTL}, KEYCTL_SEARCH, {SESSION_KEYRING}, b'user', b'kernel-test', 0)
with open('{told}', 'w') as stream:
    json.dump([os.getuid(), found, terminal, 'PASSWORD' in os.environ], stream)
print('{{"QMP"', flush=True)
time.sleep(600)
"""
    monkeypatch.setattr(_vmm_trial, "IDLE_QEMU", ("-c", code))
    monkeypatch.setenv("PASSWORD", "S3CRET")
    try:
        program = _vmm_look.look_at_program(os.path.realpath(sys.executable))
        _vmm_trial.start_emulator(program, _vmm_look.look_at_own_conditions(), find_user("vm"))
        uid, found, terminal, environment = json.loads(told.read_text())
    finally:
        told.unlink()
    assert (uid, found, terminal, environment) == (VM, -1, None, False)
    # It is there all the while.
    buffer = ctypes.create_string_buffer(6)
    assert _libc.syscall(SYS_KEYCTL, 11, key, buffer, 6) == 6
    assert buffer.raw == b"S3CRET"
