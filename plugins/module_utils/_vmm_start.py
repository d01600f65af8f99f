# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: starts what a VMM would be, to see in /proc with which capabilities and limits it runs.

Whatever is started here has ended when the function that started it returns, and also if this process is killed in
between: by a guard, by libvirt once the connection is gone, or by systemd after two minutes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import IO, Callable, NamedTuple, NoReturn, Union, cast

from . import _host
from ._capabilities import with_ipc_lock
from ._errors import HostLacks, IommufdError, error_text
from ._iommufd import RLIMIT_MODE, IommuFd, misc_rdev
from ._process import Limit, Process, Status, own_status, parse_memlock, parse_status, printable
from ._target import DomainTarget, PidTarget, escaped, hold_target
from ._user import User, become, has_ids
from ._vmm import (
    PATIENCE,
    REPLICA,
    XATTR,
    Conditions,
    Program,
    Run,
    Unit,
    has_ipc_lock,
    is_qemu,
)

__all__ = (
    "Seen",
    "scratch_mode",
    "session_memlock",
    "start_domain",
    "start_emulator",
    "start_replica",
    "try_copy",
)

# In seconds: what one process gets, and libvirt, which may have to find out what the emulators can first.
_PATIENCE = 120
_LIBVIRT_PATIENCE = 300

# linux/prctl.h
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38

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

# What a replica takes over from its unit as it is shown.
_REPLICATED = ("User", "Group", "SupplementaryGroups", "DynamicUser", "NoNewPrivileges", "PrivateUsers")

_LIBVIRT_LOGS = "/var/log/libvirt/qemu"
_LIBVIRT_PROFILES = "/etc/apparmor.d/libvirt"

_libc = ctypes.CDLL(None, use_errno=True)

# A file by its path, or one that is open.
Executable = Union[str, int]


class Seen(NamedTuple):
    """What /proc said of a process that was started. `initial`: whether it was in the initial user namespace."""

    user: str | None
    status: Status
    memlock: Limit
    initial: bool | None

    @property
    def lifts_memlock(self) -> bool:
        """Whether it has CAP_IPC_LOCK where that lifts the host's limits."""
        return has_ipc_lock(self.status.effective) and self.initial is not False


def _see(process: Process) -> Seen:
    return Seen(process.user, process.status, process.memlock(), process.in_initial_user_namespace())


def try_copy(program: Program, under: Conditions, user: User) -> Status:
    """Executes a copy of cat(1) that has what the program would have with CAP_IPC_LOCK, and gives what it is then.

    The copy lies where the program does, but has no name there, so nothing can stay behind.
    Raises IommufdError where it cannot be made or executed.
    """
    check_able(under)
    what = f"A copy of cat with CAP_IPC_LOCK next to {program.real_path}"
    with _copy_of_cat(program, what) as copy, tempfile.TemporaryFile() as output:
        arguments = ["cat", "/proc/self/status"]
        with _started(copy, arguments, under, user, output, output) as pid:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        text = _content(output)
    try:
        return parse_status(b"\n" + text)
    except IommufdError as exc:
        raise IommufdError(f"{what} was executed, but failed: {_line(text)}") from exc


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
            os.setxattr(copy.fileno(), XATTR, xattr)
            # What is open for writing cannot be executed.
            fd = os.open(f"/proc/self/fd/{copy.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise IommufdError(f"{what} cannot be made ({error_text(exc.errno)}).") from exc
    try:
        yield fd
    finally:
        os.close(fd)


def start_emulator(program: Program, under: Conditions, user: User) -> Seen:
    """Starts an emulator of QEMU without a machine under these conditions, and looks at it.

    Raises IommufdError where it cannot be executed, or does not come up.
    """
    check_able(under)
    with tempfile.TemporaryFile() as output:
        arguments = [program.path, *_IDLE_QEMU, "-qmp", "stdio"]
        with _started(program.path, arguments, under, user, output, output) as pid:
            _await_greeting(program, pid, output)
            with Process.hold(pid) as process:
                return _see(process)


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


def _await_greeting(program: Program, pid: int, output: IO[bytes]) -> None:
    """Waits until QEMU has greeted whom it would speak QMP with, which it does once it is up.

    A capability of the file has the dynamic loader leave out some of its folders (ld.so(8)), so one that was executed
    may yet not start. Raises IommufdError where it ends, or says nothing.
    """
    deadline = time.monotonic() + _PATIENCE / 2
    while _GREETING not in _content(output):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            raise IommufdError(f"{program.path} ended at once: {_line(_content(output))}")
        if time.monotonic() > deadline:
            said = _line(_content(output))
            raise IommufdError(f"{program.path} runs, but is not up after {_PATIENCE // 2} seconds: {said}")
        time.sleep(0.01)


def _content(output: IO[bytes]) -> bytes:
    """What was written so far, also while others write where they are in the file."""
    return os.pread(output.fileno(), 65536, 0)


def _line(text: bytes) -> str:
    """What a program has said, on one line."""
    return printable(b" ".join(text.split())[:400]) or "it said nothing."


@contextlib.contextmanager
def _started(
    program: Executable, arguments: list[str], under: Conditions, user: User, output: IO[bytes], errors: IO[bytes]
) -> Iterator[int]:
    """A child that executes the program as the user under these conditions, for as long as the context lasts.

    It is killed two minutes later all the same. Raises IommufdError where it cannot come so far, and says why.
    """
    dropped = [number for number in range(64) if own_status().bounding & ~under.bounding & 1 << number]
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _become(program, arguments, dropped, under.no_new_privs, user, (output.fileno(), errors.fileno()), writing)
    os.close(writing)
    try:
        with _guard(pid):
            with open(reading, "rb") as report:
                # Its end is closed by what is executed.
                failure = report.read()
            if failure:
                number, _space, step = failure.decode().partition(" ")
                raise IommufdError(_not_executed(program, int(number), step, under, user))
            yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _not_executed(program: Executable, number: int, step: str, under: Conditions, user: User) -> str:
    what = program if isinstance(program, str) else "The copy"
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
) -> NoReturn:
    """Never returns: the process becomes the program, or writes into the pipe which step failed, and ends."""

    def redirect() -> None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
        os.chdir("/")
        os.setsid()

    def give_up() -> None:
        for number in dropped:
            _prctl(_PR_CAPBSET_DROP, number)
        if no_new_privs:
            _prctl(_PR_SET_NO_NEW_PRIVS, 1)

    def change_user() -> None:
        if not has_ids(user):
            become(user)

    steps: tuple[tuple[str, Callable[[], object]], ...] = (
        ("leave the caller's session", redirect),
        ("give up capabilities", give_up),
        ("become that user", change_user),
        ("execute it", lambda: os.execve(program, arguments, _ENVIRONMENT)),
    )
    try:
        for step, act in steps:
            try:
                act()
            except OSError as exc:
                os.write(report, f"{exc.errno} {step}".encode())
                break
    finally:
        os._exit(127)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def _guard(pid: int) -> Iterator[None]:
    """Has another process kill the child when the context ends, when this process does, or after two minutes.

    Nothing weaker does: the kernel forgets PR_SET_PDEATHSIG when a program gives capabilities.
    """
    reading, writing = os.pipe()
    guard = os.fork()
    if not guard:
        _keep_guard(pid, reading)
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        os.waitpid(guard, 0)


def _keep_guard(pid: int, reading: int) -> NoReturn:
    """Never returns. Until the child is killed its id is nobody else's: its parent buries it only afterwards."""
    try:
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.dup2(reading, 0)
        os.closerange(1, 65536)
        select.select([0], [], [], _PATIENCE)
        os.kill(pid, signal.SIGKILL)
    finally:
        os._exit(0)


def start_domain(run: Run, uri: str, program: Program) -> Seen:
    """Starts a transient domain without devices, paused, looks at its emulator, and has it destroyed.

    `uri` leads to the system libvirt of this host. libvirt destroys the domain too if the connection breaks off.
    Raises IommufdError where libvirt does not start it.
    """
    name = f"{REPLICA}-{os.getpid()}-{os.urandom(4).hex()}"
    identity = str(uuid.uuid4())
    domain = domain_xml(_domain_capabilities(run, uri, program), name, identity, program.path)
    try:
        with _created(uri, name, domain) as said:
            try:
                with hold_target(DomainTarget(name)) as process:
                    return _see(process)
            except IommufdError as exc:
                raise IommufdError(f"libvirt does not start a domain with {program.path}: {_errors(said)}") from exc
    except OSError as exc:
        raise IommufdError(f"virsh does not run: {error_text(exc.errno)}.") from exc
    finally:
        _remove_leftovers(name, identity)


@contextlib.contextmanager
def _created(uri: str, name: str, domain: str) -> Iterator[bytes]:
    """What virsh said when it was told to create the domain, which is destroyed when the context ends.

    virsh stays connected meanwhile: the domain ends with the connection (--autodestroy), and that with this process.
    """
    memory = os.memfd_create("domain")
    try:
        os.write(memory, domain.encode())
        # run_command only waits for an end; with this one there is a conversation.
        with subprocess.Popen(  # pylint: disable=ansible-bad-function
            ["timeout", "-k", "5", str(_LIBVIRT_PATIENCE), "virsh", f"--connect={uri}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            pass_fds=(memory,),
        ) as virsh:
            stdin, stdout = cast("IO[bytes]", virsh.stdin), cast("IO[bytes]", virsh.stdout)
            # It echoes what it is told, but without the quotes only once it has done what comes before.
            _tell(stdin, f"create --paused --autodestroy /dev/fd/{memory}\necho it'-'is'-'over\n")
            try:
                yield _until(stdout, b"it-is-over")
            finally:
                _tell(stdin, f"destroy {name}\n")
                with contextlib.suppress(BrokenPipeError):
                    stdin.close()
                stdout.read()
    finally:
        os.close(memory)


def _tell(stream: IO[bytes], words: str) -> None:
    """Writes, also to a program that has ended already, whose output tells why."""
    with contextlib.suppress(BrokenPipeError):
        stream.write(words.encode())
        stream.flush()


def _until(stream: IO[bytes], mark: bytes) -> bytes:
    """What comes up to the mark, or to the end."""
    said = b""
    while mark not in said:
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
    command = ["timeout", "-k", "5", str(_LIBVIRT_PATIENCE), "virsh", f"--connect={uri}", "domcapabilities"]
    try:
        code, output, errors = run([*command, f"--emulatorbin={program.path}"])
    except OSError as exc:
        raise IommufdError(f"virsh does not run: {error_text(exc.errno)}.") from exc
    try:
        if not code:
            return ET.fromstring(output)
    except ET.ParseError:
        pass
    raise IommufdError(f"libvirt does not tell what {program.path} can: {_line(os.fsencode(errors or output))}")


def domain_xml(capabilities: ET.Element, name: str, identity: str, emulator: str) -> str:
    """The smallest domain of an emulator, of the type, architecture and machine that libvirt gives it by default."""
    values = {key: escaped(capabilities.findtext(key, "")) for key in ("domain", "arch", "machine")}
    return (
        f"<domain type='{values['domain']}'><name>{name}</name><uuid>{identity}</uuid><memory unit='MiB'>64</memory>"
        f"<os><type arch='{values['arch']}' machine='{values['machine']}'>hvm</type></os><devices>"
        f"<emulator>{escaped(emulator)}</emulator><controller type='usb' model='none'/><memballoon model='none'/>"
        "</devices></domain>"
    )


def start_replica(run: Run, unit: Unit) -> Seen:
    """Starts a transient service that runs as the unit would, and looks at its process.

    An emulator of QEMU is started as such, without a machine. Of any other program it is not known how to start it
    without consequences, so sleep(1) takes its place. Raises IommufdError where systemd does not start it.
    """
    if unit.program is None:
        raise IommufdError(f"{unit.name} starts no program.")
    name = f"{REPLICA}-{os.getpid()}-{os.urandom(4).hex()}.service"
    command = [unit.program.path, *_IDLE_QEMU] if is_qemu(unit.program) else ["sleep", str(2 * _PATIENCE)]
    code, _output, errors = _run(
        run,
        *("systemd-run", "--quiet", "--collect", "--no-ask-password", f"--unit={name}", "--service-type=exec"),
        *(f"--property={each}" for each in replica_properties(unit)),
        *("--", *command),
    )
    try:
        if code:
            raise IommufdError(f"systemd does not start a service like {unit.name}: {_why(run, name, errors)}")
        code, output, errors = _run(run, "systemctl", "show", "--value", "--property=MainPID", "--", name)
        try:
            with hold_target(PidTarget(int(output))) as process:
                return _see(process)
        except (IommufdError, ValueError) as exc:
            raise IommufdError(f"A service like {unit.name} ended at once: {_why(run, name, errors)}") from exc
    finally:
        _run(run, "systemctl", "stop", "--", name)


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
    # If nobody is left to stop it.
    return [*found, f"LimitMEMLOCK={soft}:{hard}", f"RuntimeMaxSec={_PATIENCE}"]


def _why(run: Run, name: str, errors: str) -> str:
    """What the journal says of a service that did not start, or else systemd-run."""
    _run(run, "journalctl", "--sync")
    _code, output, _errors = _run(run, "journalctl", "--no-pager", "--output=cat", "--lines=20", f"--unit={name}")
    lines = [line.replace(f"{name}: ", "") for line in output.splitlines()]
    failed = [line for line in lines if line.startswith("Failed at step")]
    return _line(os.fsencode(" ".join(failed or lines) or errors))


def _run(run: Run, *command: str) -> tuple[int, str, str]:
    try:
        return run([*PATIENCE, *command])
    except OSError as exc:
        return 127, "", error_text(exc.errno)


def session_memlock(run: Run, user: User) -> Limit:
    """RLIMIT_MEMLOCK in a session that PAM opens for the user. Raises IommufdError where it opens none."""
    code, output, errors = _run(run, "runuser", "-u", user.name, "--", "cat", "/proc/self/limits")
    if code:
        why = _line(os.fsencode(errors)) if errors.strip() else f"exit code {code}."
        raise IommufdError(f"PAM does not open a session of {user.name}: {why}")
    return parse_memlock(output.encode())


def scratch_mode(user: User) -> str:
    """Opens an iommufd, sets it to per-process accounting, and gives the mode that it has in a child of that user.

    Raises IommufdError where it cannot be opened or set.
    """
    rdev = misc_rdev()
    there = _host.node(_host.DEVICE)
    if rdev is None or there is None or there.rdev != rdev:
        raise HostLacks(f"{_host.DEVICE} is not there: this kernel has no iommufd, or its module is not loaded.")
    try:
        fd = os.open(_host.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise IommufdError(f"{_host.DEVICE} cannot be opened ({error_text(exc.errno)}).") from exc
    try:
        refused = IommuFd(fd).set(RLIMIT_MODE, RLIMIT_MODE.number("process")).errno
        if refused:
            raise IommufdError(f"An iommufd cannot be set to per-process accounting ({error_text(refused)}).")
        return str(RLIMIT_MODE.value(_mode_as(fd, user)))
    finally:
        os.close(fd)


def _mode_as(fd: int, user: User) -> int:
    """The number of the mode that an iommufd of ours has for a child that has become the user."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if not has_ids(user):
                become(user)
            answer = IommuFd(fd).get(RLIMIT_MODE)
            os.write(writing, f"{answer.errno} {answer.value}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as report:
        said = report.read().split()
    os.waitpid(child, 0)
    if len(said) != 2:
        raise IommufdError(f"A child of this process could not become {user.name}.")
    if int(said[0]):
        raise IommufdError(f"{user.name} cannot read the mode of an iommufd ({error_text(int(said[0]))}).")
    return int(said[1])
