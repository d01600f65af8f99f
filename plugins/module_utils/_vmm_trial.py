# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: starts what a VMM would be, to see in /proc with which capabilities and limits it runs.

Whatever is started here has ended when the function that started it returns, and also if this process is killed in
between: by a guard, or, where it is started as in _vmm_domain and _vmm_replica, by libvirt once the connection is gone,
or by systemd after two minutes.

What is started runs as a user who may not be well disposed, and who can stop and end it, or lower its limits, of which
it then fails by itself. So only what was seen is a verdict: a process with what it has, one of root's that has ended by
itself and failed, or one that the kernel has refused to execute for a reason that only root can give. All else raises
Interrupted, which says nothing of the host, and nobody is waited for without a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import IO, Callable, NamedTuple, Union

from ._capabilities import CAP_IPC_LOCK, with_ipc_lock, write_xattr
from ._child import Interrupted, NoAnswer, close_all_but, end, in_child, isolate, spawn
from ._command import COMMAND_SECONDS, start_command
from ._device import new_iommufd
from ._errors import HostLacks, IommufdError, error_text, printable
from ._iommufd import PROCESS, RLIMIT_MODE, IommuFd
from ._process import Process, Status, parse_status
from ._process_facts import Limit, in_initial_user_namespace, own_status, read_memlock
from ._selinux import Verdict, context_of, lets_use
from ._syscalls import PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, prctl
from ._user import User, forbid_core, impersonate
from ._vmm_look import (
    Conditions,
    Program,
    has_ipc_lock,
)

__all__ = (
    "IDLE_QEMU",
    "PATIENCE",
    "ProcessSeen",
    "ended_by_itself",
    "one_line",
    "open_session",
    "see_in_child",
    "start_emulator",
    "try_copy",
    "try_mode",
)

# In seconds: what one process gets to live, and half of it to come up; and a process that only has to read a number.
PATIENCE = 120
_READING_SECONDS = 30

# What the kernel answers for what root has decided: the bounding set, and a file that only root can write, with its
# mode, its place and its interpreter. All else a user may bring about, by limits or by using up what there is.
_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOEXEC)

# What may be written by what is started, in bytes: it writes into a file of root's.
_OUTPUT_MAX = 2**20

# What the kernel and systemd answer in no time; a busy host gets so long.
_LOOK_SECONDS = 120

# A QEMU that has neither a machine nor anything to do, and waits.
IDLE_QEMU = (
    "-no-user-config",
    "-nodefaults",
    "-machine",
    "none",
    "-S",
    "-display",
    "none",
    "-monitor",
    "none",
    "-serial",
    "none",
)

# What QEMU says first to whom it speaks QMP with.
_GREETING = b'{"QMP"'

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}

# A file by its path, or one that is open.
Executable = Union[str, int]


class ProcessSeen(NamedTuple):
    """What /proc said of a process that was started. `initial`: whether it was in the initial user namespace.

    `policy`: whether SELinux lets it use CAP_IPC_LOCK.
    """

    user: str | None
    status: Status
    memlock: Limit
    initial: bool | None
    policy: Verdict = Verdict(True)

    @property
    def lifts_memlock(self) -> bool:
        """Whether it has CAP_IPC_LOCK where that lifts the host's limits."""
        usable = self.initial is not False and self.policy.allowed is not False
        return has_ipc_lock(self.status.effective) and usable


def _see(process: Process) -> ProcessSeen:
    policy = lets_use(CAP_IPC_LOCK, partial(context_of, process.pid))
    initial = in_initial_user_namespace(process)
    return ProcessSeen(process.user, process.status, read_memlock(process), initial, policy)


def see_in_child(hold: contextlib.AbstractContextManager[Process]) -> ProcessSeen:
    """What is seen of a process, held in a child: it is a user's, who may keep whoever looks waiting for ever."""

    def look() -> ProcessSeen:
        with hold as process:
            return _see(process)

    user, status, memlock, initial, policy = in_child(None, look, _LOOK_SECONDS)
    return ProcessSeen(user, Status(*status), Limit(*memlock), initial, Verdict(*policy))


def try_copy(program: Program, under: Conditions, user: User) -> Status:
    """Executes a copy of cat(1) that has what the program would have with CAP_IPC_LOCK, and gives what it is then.

    The copy lies where the program does, but has no name there, so nothing can stay behind.
    Raises IommufdError where it cannot be made, or the kernel refuses to execute it; Interrupted where nothing is seen.
    """
    check_able(under)
    what = f"A copy of cat with CAP_IPC_LOCK next to {program.real_path}"
    with _copy_of_cat(program, what) as copy, _output() as output:
        arguments = ["cat", "/proc/self/status"]
        with _started(copy, arguments, under, user, output, output) as pid:
            failed = _await_end(pid, what)
        text = _content(output)
    why = f"{what} was executed, but failed: {one_line(text)}"
    if failed:
        # It may have said half of it.
        raise ended_by_itself(user.uid == 0, why)
    try:
        return parse_status(b"\n" + text)
    except IommufdError as exc:
        raise ended_by_itself(user.uid == 0, why) from exc


def ended_by_itself(is_root: bool, message: str) -> IommufdError:
    """How it is to be told that a process has failed: IommufdError of root's, Interrupted of any other user's.

    Such a one can have it fail, by prlimit(2) for one.
    """
    return (IommufdError if is_root else Interrupted)(message)


@contextlib.contextmanager
def _copy_of_cat(program: Program, what: str) -> Iterator[int]:
    cat = shutil.which("cat", path=_ENVIRONMENT["PATH"])
    if cat is None:
        raise HostLacks(f"There is no cat in {_ENVIRONMENT['PATH']} to make a copy of.")
    xattr = with_ipc_lock(program.xattr)
    try:
        with open(cat, "rb") as original, tempfile.TemporaryFile(dir=os.path.dirname(program.real_path)) as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fchmod(copy.fileno(), 0o755)
            # The last: what is written to a file takes its capabilities away.
            write_xattr(copy.fileno(), xattr)
            # What is open for writing cannot be executed.
            fd = os.open(f"/proc/self/fd/{copy.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise IommufdError(f"{what} cannot be made ({error_text(exc.errno)}).") from exc
    try:
        yield fd
    finally:
        os.close(fd)


def start_emulator(program: Program, under: Conditions, user: User) -> ProcessSeen:
    """Starts an emulator of QEMU without a machine under these conditions, and looks at it.

    Raises IommufdError where the kernel refuses to execute it, or root's fails before it is up; Interrupted where
    nothing is seen.
    """
    check_able(under)
    with _output() as output:
        arguments = [program.path, *IDLE_QEMU, "-qmp", "stdio"]
        with _started(program.path, arguments, under, user, output, output) as pid:
            _await_greeting(program, pid, output, user)
            try:
                return see_in_child(Process.hold(pid))
            except IommufdError as exc:
                _check_runs(program, pid, output, user)
                raise Interrupted(f"{program.path} could not be looked at: {exc}") from exc


def check_able(under: Conditions) -> None:
    """Raises Interrupted where this process itself runs under conditions that are worse than those to be tried."""
    own = own_status()
    if has_ipc_lock(under.bounding) and not has_ipc_lock(own.bounding):
        raise Interrupted(
            f"This caller runs with a bounding set without CAP_IPC_LOCK, so it cannot try what {under.read_from} would"
            " do. Run the task on the host itself, outside of any container."
        )
    if own.no_new_privs and not under.no_new_privs:
        raise Interrupted(
            f"This caller runs with NoNewPrivileges, so it cannot try what {under.read_from} would do. Run the task"
            " without."
        )


def _await_greeting(program: Program, pid: int, output: IO[bytes], user: User) -> None:
    """Waits until QEMU has greeted whom it would speak QMP with, which it does once it is up.

    A capability of the file has the dynamic loader leave out some of its folders (ld.so(8)), so one that was executed
    may yet not start. Raises as `_check_runs` does, and Interrupted where it says nothing.
    """
    deadline = time.monotonic() + PATIENCE / 2
    while _GREETING not in _content(output):
        _check_runs(program, pid, output, user)
        if time.monotonic() > deadline:
            said = one_line(_content(output))
            raise Interrupted(f"{program.path} runs, but is not up after {PATIENCE // 2} seconds: {said}")
        time.sleep(0.01)


def _check_runs(program: Program, pid: int, output: IO[bytes], user: User) -> None:
    """Raises Interrupted where an emulator that we have started has ended, IommufdError where it is root's and failed.

    One that waits does not end with success by itself: that is how QEMU ends when it is asked to by a signal.
    """
    status = _exit_status(pid, program.path)
    if status is not None:
        raise ended_by_itself(
            bool(status) and user.uid == 0, f"{program.path} ended at once: {one_line(_content(output))}"
        )


def _exit_status(pid: int, what: str) -> int | None:
    """The exit status of a child that has ended by itself, None while it runs. It stays to be buried.

    Raises Interrupted where a signal has ended or stopped it.
    """
    now = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG)
    if now is None:
        return None
    if now.si_code != os.CLD_EXITED:
        done = "stopped" if now.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED) else "ended"
        raise Interrupted(f"{what} was {done} by signal {now.si_status}, so nothing is known of it.")
    return now.si_status


def _await_end(pid: int, what: str) -> int:
    """Waits until a child has ended by itself, and gives its exit status. Raises Interrupted where it does not."""
    deadline = time.monotonic() + PATIENCE / 2
    while True:
        status = _exit_status(pid, what)
        if status is not None:
            return status
        if time.monotonic() > deadline:
            raise Interrupted(f"{what} has not ended after {PATIENCE // 2} seconds.")
        time.sleep(0.01)


def _output() -> IO[bytes]:
    """A file of a fixed size for what a program says. A user who takes it from the program can make no more of it."""
    fd = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, _OUTPUT_MAX)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return open(fd, "r+b", buffering=0)


def _content(output: IO[bytes]) -> bytes:
    """What was written so far, also while others write where they are in the file."""
    return os.pread(output.fileno(), 65536, 0).rstrip(b"\0")


def one_line(text: bytes) -> str:
    """What a program has said, on one line."""
    return printable(b" ".join(text.split())[:400]) or "it said nothing."


@contextlib.contextmanager
def _started(
    program: Executable, arguments: list[str], under: Conditions, user: User, output: IO[bytes], errors: IO[bytes]
) -> Iterator[int]:
    """A child that executes the program as the user under these conditions, for as long as the context lasts.

    It is killed two minutes later all the same. Raises IommufdError where it cannot come so far, and says why, and
    Interrupted where somebody may have kept it from that.
    """
    dropped = [number for number in range(64) if own_status().bounding & ~under.bounding & 1 << number]
    reading, writing = os.pipe()
    outputs = (output.fileno(), errors.fileno())
    # This is the process that becomes what a VMM would be, as the user and under the conditions that VMMs have, so that
    # the kernel tells what such a one gets. The user can do to it whatever there is to do. It lives until it was looked
    # at, and no longer than its guard lets it.
    pid = spawn(partial(_become, program, arguments, dropped, under.no_new_privs, user, outputs, writing))
    os.close(writing)
    what = program if isinstance(program, str) else "The copy"
    try:
        with _guard(pid):
            failure = _failure(reading, pid, what)
            if failure:
                number, _space, step = failure.decode().partition(" ")
                error = IommufdError if int(number) in _REFUSALS else Interrupted
                raise error(_not_executed(what, int(number), step, under, user))
            yield pid
    finally:
        os.close(reading)
        end(pid)


def _failure(reading: int, pid: int, what: str) -> bytes:
    """What the child says of the step that failed; nothing where it was executed, or has ended before.

    Raises Interrupted where it does neither.
    """
    deadline = time.monotonic() + PATIENCE / 2
    # Its end is closed by what is executed.
    while not select.select([reading], [], [], 0.05)[0]:
        _exit_status(pid, what)
        if time.monotonic() > deadline:
            raise Interrupted(f"{what} was not executed within {PATIENCE // 2} seconds.")
    return os.read(reading, 4096)


def _not_executed(what: str, number: int, step: str, under: Conditions, user: User) -> str:
    text = f"{what} cannot be executed as {user.name}: to {step} failed ({error_text(number)})."
    if step == "execute it" and number == errno.EPERM and not has_ipc_lock(under.bounding):
        text += f" CAP_IPC_LOCK is not in the bounding set of {under.read_from}."
    return text


def _become(
    program: Executable,
    arguments: list[str],
    dropped: list[int],
    no_new_privs: bool,
    user: User,
    outputs: tuple[int, int],
    report: int,
) -> None:
    """The process becomes the program, or writes into the pipe which step failed."""

    def redirect() -> None:
        close_all_but({report, *outputs, *([program] if isinstance(program, int) else [])})
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
        os.chdir("/")
        isolate()
        forbid_core()
        _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        most = _OUTPUT_MAX if hard == resource.RLIM_INFINITY else min(hard, _OUTPUT_MAX)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    def give_up() -> None:
        for number in dropped:
            prctl(PR_CAPBSET_DROP, number)
        if no_new_privs:
            prctl(PR_SET_NO_NEW_PRIVS, 1)

    steps: tuple[tuple[str, Callable[[], object]], ...] = (
        ("leave the caller's session", redirect),
        ("give up capabilities", give_up),
        ("become that user", lambda: impersonate(user)),
        ("execute it", lambda: os.execve(program, arguments, _ENVIRONMENT)),
    )
    for step, act in steps:
        try:
            act()
        except OSError as exc:
            os.write(report, f"{exc.errno} {step}".encode())
            break


@contextlib.contextmanager
def _guard(pid: int) -> Iterator[None]:
    """Has another process kill the child when the context ends, when this process does, or after two minutes.

    Nothing weaker does: the kernel forgets PR_SET_PDEATHSIG when a program gives capabilities.
    """
    reading, writing = os.pipe()
    # This is the guard. It is root's as we are, and in a session of its own, so that neither the user nor what ends us
    # ends it, too. It lives as long as the child is of use, or two minutes.
    guard = spawn(partial(_keep_guard, pid, reading))
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        # Before the child is buried, whose id may then be somebody else's.
        end(guard)


def _keep_guard(pid: int, reading: int) -> None:
    """The guard's whole life. Until the child is killed its id is nobody else's: its parent buries it afterwards."""
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(reading, 0)
    os.closerange(1, 65536)
    select.select([0], [], [], PATIENCE)
    os.kill(pid, signal.SIGKILL)


def open_session(user: User) -> Limit:
    """RLIMIT_MEMLOCK in a session that PAM opens for the user.

    PAM sets it in the process that opens the session, before it starts another that becomes the user. It is root's, so
    that the user can neither end it nor change its limits, and keeps them until it is buried. Raises Interrupted where
    no session was opened; a user who has too many of them can see to that.
    """
    with _output() as said:
        try:
            session = start_command(["runuser", "-u", user.name, "--", "true"], (None, said.fileno(), said.fileno()))
        except NoAnswer as exc:
            raise Interrupted(str(exc)) from exc
        try:
            code = _session_ends(session)
            limits = resource.prlimit(session, resource.RLIMIT_MEMLOCK)
        finally:
            end(session)
        if code:
            why = one_line(_content(said)) if _content(said).strip() else f"exit code {code}."
            raise Interrupted(f"PAM does not open a session of {user.name}: {why}")
    return Limit(*(None if each == resource.RLIM_INFINITY else each for each in limits))


def _session_ends(pid: int) -> int:
    """The exit status of runuser(1); 0 also where what it has started as the user was ended or stopped."""
    deadline = time.monotonic() + COMMAND_SECONDS
    while True:
        now = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG)
        if now is not None:
            # It stops itself when its child is stopped, and ends with 128 and the signal that has ended that.
            return now.si_status if now.si_code == os.CLD_EXITED and now.si_status <= 128 else 0
        if time.monotonic() > deadline:
            raise Interrupted(f"PAM does not open a session within {COMMAND_SECONDS} seconds.")
        time.sleep(0.01)


def try_mode(user: User) -> str:
    """Opens an iommufd, sets it to per-process accounting, and gives the mode that it has in a child of that user.

    Raises IommufdError where it cannot be opened, set or read, Interrupted where the child was kept from that.
    """
    try:
        with new_iommufd(follow=True) as fd:
            refused = IommuFd(fd).set(RLIMIT_MODE, RLIMIT_MODE.number(PROCESS)).errno
            if refused:
                raise IommufdError(f"An iommufd cannot be set to per-process accounting ({error_text(refused)}).")
            number = in_child(user, lambda: _mode(fd, user), _READING_SECONDS, [fd])
    except NoAnswer as exc:
        raise Interrupted(str(exc)) from exc
    return str(RLIMIT_MODE.value(number))


def _mode(fd: int, user: User) -> int:
    """The number of the mode of an iommufd. Raises IommufdError."""
    answer = IommuFd(fd).get(RLIMIT_MODE)
    if answer.errno:
        raise IommufdError(f"{user.name} cannot read the mode of an iommufd ({error_text(answer.errno)}).")
    return answer.value
