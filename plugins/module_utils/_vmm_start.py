# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: starts what a VMM would be, to see in /proc with which capabilities and limits it runs.

Whatever is started here has ended when the function that started it returns, and also if this process is killed in
between: by a guard, by libvirt once the connection is gone, or by systemd after two minutes.

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
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from typing import IO, Callable, NamedTuple, Union

from ._capabilities import with_ipc_lock, write_xattr
from ._child import (
    COMMAND_SECONDS,
    Interrupted,
    NoAnswer,
    Run,
    close_all_but,
    end,
    in_child,
    isolate,
    spawn,
    start_command,
)
from ._device import new_iommufd
from ._errors import HostLacks, IommufdError, error_text, printable
from ._iommufd import PROCESS, RLIMIT_MODE, IommuFd
from ._process import Limit, Process, Status, own_status, parse_status
from ._syscalls import PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, prctl
from ._systemd import CommandFailed, read_journal, run_service, show_units, tell_systemd
from ._target import DomainTarget, UnitTarget, escaped, hold_target
from ._user import User, forbid_core, impersonate
from ._vmm import (
    REPLICA,
    Conditions,
    Program,
    Unit,
    has_ipc_lock,
    is_qemu,
    unit_obstacles,
)

__all__ = (
    "LIBVIRT_SECONDS",
    "ProcessSeen",
    "open_session",
    "start_bare_domain",
    "start_emulator",
    "start_replica",
    "try_copy",
    "try_mode",
)

# In seconds: what one process gets to live, and half of it to come up; libvirt, which may have to find out what the
# emulators can first; and a process that only has to read a number.
_PATIENCE = 120
LIBVIRT_SECONDS = 300
_READING_SECONDS = 30

# What the kernel answers for what root has decided: the bounding set, and a file that only root can write, with its
# mode, its place and its interpreter. All else a user may bring about, by limits or by using up what there is.
_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOEXEC)

# What may be written by what is started, in bytes: it writes into a file of root's.
_OUTPUT_MAX = 2**20

# What the kernel and systemd answer in no time; a busy host gets so long.
_LOOK_SECONDS = 120

# A QEMU that has neither a machine nor anything to do, and waits.
_IDLE_QEMU = (
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

# As systemd names the bits of linux/securebits.h.
_SECURE_BITS = (
    "noroot",
    "noroot-locked",
    "no-setuid-fixup",
    "no-setuid-fixup-locked",
    "keep-caps",
    "keep-caps-locked",
)

# waitid(2): it ended by itself, or by a signal. systemd has that as ExecMainCode.
_EXITED = str(os.CLD_EXITED)
_KILLED = (str(os.CLD_KILLED), str(os.CLD_DUMPED))

# What a replica takes over from its unit as it is shown.
_REPLICATED = ("User", "Group", "SupplementaryGroups", "DynamicUser", "NoNewPrivileges", "PrivateUsers")

_LIBVIRT_LOGS = "/var/log/libvirt/qemu"
_LIBVIRT_PROFILES = "/etc/apparmor.d/libvirt"

# A file by its path, or one that is open.
Executable = Union[str, int]


class ProcessSeen(NamedTuple):
    """What /proc said of a process that was started. `initial`: whether it was in the initial user namespace."""

    user: str | None
    status: Status
    memlock: Limit
    initial: bool | None

    @property
    def lifts_memlock(self) -> bool:
        """Whether it has CAP_IPC_LOCK where that lifts the host's limits."""
        return has_ipc_lock(self.status.effective) and self.initial is not False


def _see(process: Process) -> ProcessSeen:
    return ProcessSeen(process.user, process.status, process.memlock(), process.in_initial_user_namespace())


def _see_in_child(hold: contextlib.AbstractContextManager[Process]) -> ProcessSeen:
    """What is seen of a process, held in a child: it is a user's, who may keep whoever looks waiting for ever."""

    def look() -> ProcessSeen:
        with hold as process:
            return _see(process)

    user, status, memlock, initial = in_child(None, look, _LOOK_SECONDS)
    return ProcessSeen(user, Status(*status), Limit(*memlock), initial)


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
    why = f"{what} was executed, but failed: {_line(text)}"
    if failed:
        # It may have said half of it.
        raise _ended_by_itself(user.uid == 0, why)
    try:
        return parse_status(b"\n" + text)
    except IommufdError as exc:
        raise _ended_by_itself(user.uid == 0, why) from exc


def _ended_by_itself(is_root: bool, message: str) -> IommufdError:
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
        arguments = [program.path, *_IDLE_QEMU, "-qmp", "stdio"]
        with _started(program.path, arguments, under, user, output, output) as pid:
            _await_greeting(program, pid, output, user)
            try:
                return _see_in_child(Process.hold(pid))
            except IommufdError as exc:
                _check_runs(program, pid, output, user)
                raise Interrupted(f"{program.path} could not be looked at: {exc}") from exc


def check_able(under: Conditions) -> None:
    """Raises IommufdError where this process itself runs under conditions that are worse than those to be tried."""
    own = own_status()
    if has_ipc_lock(under.bounding) and not has_ipc_lock(own.bounding):
        raise IommufdError(
            f"This caller runs with a bounding set without CAP_IPC_LOCK, so it cannot try what {under.of} would do. Run"
            " the task on the host itself, outside of any container."
        )
    if own.no_new_privs and not under.no_new_privs:
        raise IommufdError(
            f"This caller runs with NoNewPrivileges, so it cannot try what {under.of} would do. Run the task without."
        )


def _await_greeting(program: Program, pid: int, output: IO[bytes], user: User) -> None:
    """Waits until QEMU has greeted whom it would speak QMP with, which it does once it is up.

    A capability of the file has the dynamic loader leave out some of its folders (ld.so(8)), so one that was executed
    may yet not start. Raises as `_check_runs` does, and Interrupted where it says nothing.
    """
    deadline = time.monotonic() + _PATIENCE / 2
    while _GREETING not in _content(output):
        _check_runs(program, pid, output, user)
        if time.monotonic() > deadline:
            said = _line(_content(output))
            raise Interrupted(f"{program.path} runs, but is not up after {_PATIENCE // 2} seconds: {said}")
        time.sleep(0.01)


def _check_runs(program: Program, pid: int, output: IO[bytes], user: User) -> None:
    """Raises Interrupted where an emulator that we have started has ended, IommufdError where it is root's and failed.

    One that waits does not end with success by itself: that is how QEMU ends when it is asked to by a signal.
    """
    status = _exit_status(pid, program.path)
    if status is not None:
        raise _ended_by_itself(
            bool(status) and user.uid == 0, f"{program.path} ended at once: {_line(_content(output))}"
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
    deadline = time.monotonic() + _PATIENCE / 2
    while True:
        status = _exit_status(pid, what)
        if status is not None:
            return status
        if time.monotonic() > deadline:
            raise Interrupted(f"{what} has not ended after {_PATIENCE // 2} seconds.")
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


def _line(text: bytes) -> str:
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
    deadline = time.monotonic() + _PATIENCE / 2
    # Its end is closed by what is executed.
    while not select.select([reading], [], [], 0.05)[0]:
        _exit_status(pid, what)
        if time.monotonic() > deadline:
            raise Interrupted(f"{what} was not executed within {_PATIENCE // 2} seconds.")
    return os.read(reading, 4096)


def _not_executed(what: str, number: int, step: str, under: Conditions, user: User) -> str:
    text = f"{what} cannot be executed as {user.name}: to {step} failed ({error_text(number)})."
    if step == "execute it" and number == errno.EPERM and not has_ipc_lock(under.bounding):
        text += f" CAP_IPC_LOCK is not in the bounding set of {under.of}."
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
    select.select([0], [], [], _PATIENCE)
    os.kill(pid, signal.SIGKILL)


def start_bare_domain(run: Run, uri: str, program: Program) -> ProcessSeen:
    """Starts a transient domain without devices, paused, looks at its emulator, and has it destroyed.

    `uri` leads to the system libvirt of this host. libvirt destroys the domain too if the connection breaks off.
    Raises Interrupted where libvirt does not start it. Why not it says in words alone, and they are the same for an
    emulator that could not start and for one that was killed, which may be one that it only asks what it can.
    """
    name = f"{REPLICA}-{os.getpid()}-{os.urandom(4).hex()}"
    identity = str(uuid.uuid4())
    try:
        domain = domain_xml(_domain_capabilities(run, uri, program), name, identity, program.path)
        with _created(uri, name, domain) as said:
            try:
                return _see_in_child(hold_target(DomainTarget(name)))
            except IommufdError as exc:
                raise Interrupted(f"libvirt does not start a domain with {program.path}: {_errors(said)}") from exc
    except NoAnswer as exc:
        raise Interrupted(str(exc)) from exc
    except OSError as exc:
        raise Interrupted(f"virsh does not run: {error_text(exc.errno)}.") from exc
    finally:
        _remove_leftovers(name, identity)


@contextlib.contextmanager
def _created(uri: str, name: str, domain: str) -> Iterator[bytes]:
    """What virsh said when it was told to create the domain, which is destroyed when the context ends.

    virsh stays connected meanwhile: the domain ends with the connection (--autodestroy), and that with this process.
    """
    with contextlib.ExitStack() as stack:

        def pipe() -> tuple[IO[bytes], IO[bytes]]:
            reading, writing = os.pipe()
            return stack.enter_context(open(reading, "rb", 0)), stack.enter_context(open(writing, "wb", 0))

        memory = stack.enter_context(open(os.memfd_create("domain"), "wb", 0))
        memory.write(domain.encode())
        (stdin, told), (said, stdout) = pipe(), pipe()
        # run_command only waits for an end; with this one there is a conversation.
        virsh = start_command(
            ["virsh", f"--connect={uri}"],
            (stdin.fileno(), stdout.fileno(), stdout.fileno()),
            keep=[memory.fileno()],
        )
        stack.callback(end, virsh)
        stdin.close()
        stdout.close()
        try:
            # It echoes what it is told, but without the quotes only once it has done what comes before.
            _tell(told, f"create --paused --autodestroy /dev/fd/{memory.fileno()}\necho it'-'is'-'over\n")
            yield _until(said, b"it-is-over")
        finally:
            _tell(told, f"destroy {name}\n")
            told.close()
            _until(said, None)


def _tell(stream: IO[bytes], words: str) -> None:
    """Writes, also to a program that has ended already, whose output tells why."""
    with contextlib.suppress(BrokenPipeError):
        stream.write(words.encode())


def _until(stream: IO[bytes], mark: bytes | None) -> bytes:
    """What comes up to the mark, to the end, or before the time is over."""
    deadline = time.monotonic() + LIBVIRT_SECONDS
    said = b""
    while mark is None or mark not in said:
        if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            break
        more = os.read(stream.fileno(), 65536)
        if not more:
            break
        said += more
    return said


def _errors(said: bytes) -> str:
    """What virsh has said of errors, without its prompts."""
    lines = [line for line in said.splitlines() if line.startswith(b"error:")]
    return _line(b" ".join(lines) or said)


def _remove_leftovers(name: str, identity: str) -> None:
    """Removes what libvirt keeps of a domain that was never defined: its log, and its AppArmor profile."""
    profile = f"{_LIBVIRT_PROFILES}/libvirt-{identity}"
    for path in (f"{_LIBVIRT_LOGS}/{name}.log", profile, f"{profile}.files"):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _domain_capabilities(run: Run, uri: str, program: Program) -> ET.Element:
    code, output, errors = run(["virsh", f"--connect={uri}", "domcapabilities", f"--emulatorbin={program.path}"])
    with contextlib.suppress(ET.ParseError):
        if not code:
            return ET.fromstring(output)
    raise Interrupted(f"libvirt does not tell what {program.path} can: {_line(os.fsencode(errors or output))}")


def domain_xml(capabilities: ET.Element, name: str, identity: str, emulator: str) -> str:
    """The smallest domain of an emulator, of the type, architecture and machine that libvirt gives it by default."""
    values = {key: escaped(capabilities.findtext(key, "")) for key in ("domain", "arch", "machine")}
    return (
        f"<domain type='{values['domain']}'><name>{name}</name><uuid>{identity}</uuid><memory unit='MiB'>64</memory>"
        f"<os><type arch='{values['arch']}' machine='{values['machine']}'>hvm</type></os><devices>"
        f"<emulator>{escaped(emulator)}</emulator><controller type='usb' model='none'/><memballoon model='none'/>"
        "</devices></domain>"
    )


def start_replica(run: Run, unit: Unit) -> ProcessSeen:
    """Starts a transient service that runs as the unit would, and looks at its process.

    An emulator of QEMU is started as such, without a machine. Of any other program it is not known how to start it
    without consequences, so sleep(1) takes its place. Raises Interrupted where its process has ended, or was changed,
    or systemd does not start it, and IommufdError where it is root's and has failed by itself.
    """
    if unit.program is None:
        raise IommufdError(f"{unit.name} starts no program.")
    name = f"{REPLICA}-{os.getpid()}-{os.urandom(4).hex()}.service"
    command = [unit.program.path, *_IDLE_QEMU] if is_qemu(unit.program) else ["sleep", str(2 * _PATIENCE)]
    try:
        try:
            run_service(run, name, command, replica_properties(unit), "--no-ask-password", "--service-type=exec")
        except IommufdError as exc:
            said = exc.said if isinstance(exc, CommandFailed) else str(exc)
            raise _ended(run, name, unit, f"systemd does not start a service like {unit.name}", said) from exc
        try:
            seen = _see_in_child(hold_target(UnitTarget(name, run)))
        except IommufdError as exc:
            raise _ended(run, name, unit, f"A service like {unit.name} ended at once", "") from exc
    finally:
        # One that has failed stays until it is forgotten, so that it can be asked for.
        for verb in ("stop", "reset-failed"):
            with contextlib.suppress(IommufdError):
                tell_systemd(run, verb, name)
    if seen.memlock != unit.memlock:
        raise Interrupted(
            f"A service like {unit.name} has not the limit of locked memory that systemd gave it. Its user has changed"
            " that, perhaps."
        )
    if not seen.lifts_memlock and unit.user != "root" and _gives_ipc_lock(unit):
        # A process of that user with the same capability may have traced it. What root has decided that would take the
        # capability away is in unit_obstacles().
        raise Interrupted(
            f"A service like {unit.name} has not got CAP_IPC_LOCK that systemd gave it. Its user has changed that,"
            " perhaps."
        )
    return seen


def _gives_ipc_lock(unit: Unit) -> bool:
    """Whether systemd starts the unit with CAP_IPC_LOCK, which its program keeps unless something voids it."""
    return has_ipc_lock(unit.ambient) and not unit_obstacles(unit)


def _ended(run: Run, name: str, unit: Unit, what: str, errors: str) -> IommufdError:
    """How it is to be told that a service does not run: IommufdError where its process is root's and has failed.

    What waits does not end with success by itself, but may when a signal asks it to.
    """
    shown: dict[str, str] = {}
    with contextlib.suppress(IommufdError):
        shown = show_units(run, [name], ("ExecMainCode", "ExecMainStatus"))[0]
    code, status = shown.get("ExecMainCode"), shown.get("ExecMainStatus", "0")
    if code in _KILLED:
        return Interrupted(f"{what}: signal {status} has ended its process, so nothing is known of it.")
    failed = code == _EXITED and status != "0"
    return _ended_by_itself(failed and unit.user == "root", f"{what}: {_why(run, name, errors)}")


def replica_properties(unit: Unit) -> list[str]:
    """The properties that make a transient service run with the same capabilities and limits as the unit."""
    shown = unit.settings
    found = [f"{key}={shown[key]}" for key in _REPLICATED if shown.get(key)]
    for key in ("CapabilityBoundingSet", "AmbientCapabilities"):
        # An empty one is none at all.
        found.append(f"{key}={shown.get(key, '')}")
    bits = int(shown.get("SecureBits") or 0)
    words = [word for number, word in enumerate(_SECURE_BITS) if bits >> number & 1]
    found.append(f"SecureBits={' '.join(words)}")
    soft, hard = ("infinity" if each is None else str(each) for each in (unit.memlock.soft, unit.memlock.hard))
    # The processes of its user are counted, who might see to it that this one is too many.
    found += [f"LimitMEMLOCK={soft}:{hard}", "LimitNPROC=infinity"]
    # It may be stopped, or ignore what asks it to end.
    found += [f"TimeoutStartSec={_PATIENCE // 2}", "KillSignal=SIGKILL"]
    # If nobody is left to stop it.
    return [*found, f"RuntimeMaxSec={_PATIENCE}"]


def _why(run: Run, name: str, errors: str) -> str:
    """What the journal says of a service that did not start, or else systemd-run."""
    lines: list[str] = []
    with contextlib.suppress(IommufdError):
        lines = read_journal(run, name)
    failed = [line for line in lines if line.startswith("Failed at step")]
    return _line(os.fsencode(" ".join(failed or lines) or errors))


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
            why = _line(_content(said)) if _content(said).strip() else f"exit code {code}."
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
