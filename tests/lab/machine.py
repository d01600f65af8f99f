# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Running guests: starting one under QEMU, telling what became of it, and ending it.

A guest's folder is runs/CHECKOUT/GUEST in the cache, so that two checkouts do not disturb one another; nor do two runs
of one checkout, where each has a name of its own in LAB_INSTANCE (a run within another: that one's, a dot and more). It
holds state.json from the moment that QEMU runs until `down`; with it there and its process gone, the guest has died.

A guest is booted once, and saved as it is then: disk, memory and devices. `up` restores that, which takes seconds. A
reboot ends QEMU, so `reboot` starts it again with the guest's disk, at the same port.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import store
from build_kernel import make_kernel
from build_root import HOST_ALIAS, make_key, make_root
from guests import GUESTS, Guest
from progress import LabError, Progress, end_group, environment, tail

# A loaded machine emulates slowly; a guest that is broken mostly ends by itself, since a panic ends QEMU.
BOOT_TIMEOUT = 600.0
_QMP_TIMEOUT = 30.0
# A restored guest has nothing left to do but to answer.
_RESTORE_TIMEOUT = 60.0
_SAVE_TIMEOUT = 120.0
# systemd gives each unit 90 s.
_SHUTDOWN_TIMEOUT = 240.0
# To be raised with every change below that saves something else from the same inputs.
_RECIPE = 1
# The name of the state in the disk's image
_TAG = "booted"
# What is waited for before a guest is saved: all that begins at boot has ended, and what was written is on the disk.
_SETTLE = "systemctl is-system-running --wait || { systemctl list-units --failed --no-legend; exit 1; }; sync"
# The tests' own programs, and where a guest has them.
_PROGRAMS = Path(__file__).parent / "guest"
_PROGRAMS_IN_GUEST = "/usr/local/bin"
# Where there is no vmgenid, the kernel is given random numbers of this start, and told to use them (random(4)).
_RESEED = (
    "head -c 512 /dev/hwrng > /dev/random && perl -e 'open F, q(>), q(/dev/random) and ioctl F, 0x5207, 0 or die $!'"
)
_PORT_ATTEMPTS = 5
# unix(7): sun_path has 108 bytes, one of them for the end.
_SOCKET_PATH_MAX = 107
# Three devices with a driver of their own to take from: 1234:11e8, which nothing in the kernel claims.
_PASSTHROUGH_DEVICES = 3
_PARAMETERS = (
    "loglevel=5",
    # It reboots at once, which -no-reboot turns into the end of QEMU.
    "panic=-1",
    "systemd.show_status=auto",
    # The log takes ten lines in five seconds otherwise, and the start of a domain under AppArmor has more: what was
    # denied was missing whenever the machine was quick.
    "sysctl.kernel.printk_ratelimit=0",
    # QEMU 7.2 keeps what it makes of code by the address that the code runs at. Where a program is elsewhere at
    # each start, the emulator makes all of it again each time, which takes a quarter of all that it does.
    "norandmaps",
    # A dumb terminal is not asked for its size, whose answer would be waited for.
    "TERM=dumb",
)


class _Died(LabError):
    """The guest has ended by itself while it booted."""


@dataclass(frozen=True)
class State:
    """What is known of a started guest. start_time: of its process, in ticks since boot `boot_id`: pids come again."""

    pid: int
    start_time: int
    boot_id: str
    port: int
    kernel: str
    kernel_release: str
    root: str


class Machine:
    """One guest of this checkout."""

    def __init__(self, guest: Guest, runs: Path | None = None, prefix: Sequence[str] = ()) -> None:
        self.guest = guest
        self._prefix = prefix
        self.name = guest.name
        self.folder = (runs or _runs()) / guest.name
        self.ssh_config = self.folder / "ssh_config"
        self.console = self.folder / "console.log"
        self.private_key = self.folder / "id_ed25519"
        self._state_file = self.folder / "state.json"
        self._qemu_log = self.folder / "qemu.log"

    @property
    def state(self) -> State | None:
        """What was written down when it was started; None if it was not, or was taken down."""
        try:
            return State(**json.loads(self._state_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    @property
    def condition(self) -> str:
        """`running`, `died` or `down`."""
        state = self.state
        if state is None:
            return "down"
        return "running" if _is_alive(state) else "died"

    def running(self) -> State:
        """The state of a guest that must be running. Raises LabError, with the end of its console log if it died."""
        state = self.state
        if state is None:
            raise LabError(f"guest {self.name} is not up: bring it up with `up {self.name}`")
        if not _is_alive(state):
            raise LabError(f"guest {self.name} has died{self._last_words()}")
        return state

    def build(self) -> None:
        """Makes what it is started from, if it is missing."""
        self._make_saved(*self._make())

    def up(self) -> bool:
        """Restores it as it was once booted, or boots it with LAB_FRESH=1, and waits until SSH answers.

        False if it was up already. Raises LabError if it dies or does not answer in time. Unless the wait ends well,
        the guest is ended too.
        """
        kernel, root = self._make()
        fresh = os.environ.get("LAB_FRESH", "") not in ("", "0")
        saved = None if fresh else self._make_saved(kernel, root)
        with self._lock():
            state = self.state
            if state is not None and _is_alive(state):
                # Perhaps whoever booted it was killed before it was done.
                self._wait_for_ssh(state, Progress(f"guest {self.name}: runs already"), BOOT_TIMEOUT)
                return False
            if saved is None:
                self._boot(kernel, root)
                return True
            try:
                self._restore(kernel, root, saved)
            except LabError as error:
                # It may be damaged, and whatever it is, booting is the way out.
                print(
                    f"lab: guest {self.name}: its saved state is thrown away and made again: {error}", file=sys.stderr
                )
                store.discard(self._saved(kernel, root))
                self._restore(kernel, root, self._make_saved(kernel, root))
            return True

    def reboot(self) -> None:
        """Has it shut down and boot from its disk, and waits until SSH answers.

        Raises LabError if it is not running, does not shut down, or does not come back, and ends it then.
        """
        kernel, root = self._make()
        with self._lock():
            state = self.running()
            progress = Progress(f"guest {self.name}: shutting down")
            with contextlib.suppress(subprocess.TimeoutExpired):
                # It may be gone before it has answered.
                self._run(self.ssh_command(["systemctl reboot"]), 60)
            while _is_alive(state):
                if progress.seconds > _SHUTDOWN_TIMEOUT:
                    self._end(state)
                    raise LabError(f"guest {self.name} did not shut down within {_SHUTDOWN_TIMEOUT:.0f} s")
                progress.show("waiting for its end")
                time.sleep(0.2)
            progress.done()
            self._boot(kernel, root, state.port)

    def down(self) -> bool:
        """Ends it and removes all that belongs to this run. False if it was down already."""
        with self._lock():
            state = self.state
            if state is not None and _is_alive(state):
                self._end(state)
            shutil.rmtree(self.folder, ignore_errors=True)
            return state is not None

    def ssh_command(self, words: Sequence[str] = ()) -> list[str]:
        """The ssh command that logs in, or runs a command line: one word is the shell's to read, several are quoted."""
        remote = list(words) if len(words) < 2 else [shlex.join(words)]
        return ["ssh", "-F", str(self.ssh_config), self.name, *(["--", *remote] if remote else [])]

    def inventory(self) -> dict[str, str | int]:
        """The variables that Ansible reaches a running guest with."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.running().port,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.private_key),
            "ansible_ssh_common_args": f"-F {shlex.quote(str(self.ssh_config))}",
            # What a command leaves running must not end with a terminal.
            "ansible_ssh_use_tty": False,
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        name = f"run-{self.folder.parent.name}-{self.name}"
        with store.lock(name, f"guest {self.name} is being brought up or down by another run"):
            yield

    def _make(self) -> tuple[Path, Path]:
        """The folders of its kernel and of its root file system."""
        return make_kernel(self.guest.kernel), make_root(self.guest.root)

    def _saved(self, kernel: Path, root: Path) -> store.Artifact:
        """Its disk once it has booted, with the state of the whole machine: disk.qcow2."""
        inputs = {
            "kernel": kernel.name,
            "root": root.name,
            # Made once more from the same inputs, a disk has other bytes at other places than the saved memory knows.
            "made": [store.manifest(each).get("made") for each in (kernel, root)],
            "qemu": _version(self.guest.architecture.emulator),
            "command": [word.replace(str(kernel), kernel.name) for word in self._qemu(kernel, 0)],
            "settle": _SETTLE,
            "recipe": _RECIPE,
        }
        return store.Artifact("booted", self.name, inputs)

    def _make_saved(self, kernel: Path, root: Path) -> Path:
        return store.make(self._saved(kernel, root), partial(self._save, kernel, root))

    def _save(self, kernel: Path, root: Path, work: Path) -> dict[str, str]:
        """Boots the guest in a folder of its own, waits until it is quiet, and saves it."""
        # Nobody would look for it once this process has been killed.
        once = Machine(self.guest, work / "run", ("setpriv", "--pdeathsig", "KILL"))
        state = once._boot(kernel, root)
        try:
            progress = Progress(f"guest {self.name}: saving it as it is")
            # Over no connection that lasts: a restored guest would have the ends of it.
            settled = once._run_alone(_SETTLE, BOOT_TIMEOUT)
            if settled.returncode != 0:
                raise LabError(f"guest {self.name} does not come to rest: {(settled.stdout + settled.stderr).strip()}")
            said = once._qmp("human-monitor-command", {"command-line": f"savevm {_TAG}"}, _SAVE_TIMEOUT)
            if said:
                raise LabError(f"guest {self.name} cannot be saved: {said.strip()}")
            progress.done()
        finally:
            once._end(state)
        (once.folder / "disk.qcow2").rename(work / "disk.qcow2")
        shutil.rmtree(work / "run")
        return {"kernel": kernel.name, "root": root.name}

    def _boot(self, kernel: Path, root: Path, port: int | None = None) -> State:
        """Boots it; with the port that it had, from the disk that it has."""
        try:
            return self._boot_once(kernel, root, port)
        except _Died as error:
            # Seen with QEMU 7.2 on a busy machine: a panic in the first second, of a kernel that boots at other times.
            print(f"lab: guest {self.name} is booted once more: {error}", file=sys.stderr)
            return self._boot_once(kernel, root, port)

    def _boot_once(self, kernel: Path, root: Path, port: int | None = None) -> State:
        if port is None:
            self._make_disk(root)
        started = self._start(kernel, root, port=port)
        return self._await(started, Progress(f"guest {self.name}: booting"), BOOT_TIMEOUT)

    def _make_disk(self, root: Path) -> None:
        self._prepare(root)
        image = root / "root.img"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image)]
        command.append(str(self.folder / "disk.qcow2"))
        made = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
        if made.returncode != 0:
            raise LabError(f"cannot make the disk of guest {self.name}: {made.stderr.strip()}")

    def _restore(self, kernel: Path, root: Path, saved: Path) -> State:
        progress = Progress(f"guest {self.name}: restoring")
        self._prepare(root)
        shutil.copyfile(saved / "disk.qcow2", self.folder / "disk.qcow2")
        return self._await(self._start(kernel, root, "-loadvm", _TAG), progress, _RESTORE_TIMEOUT)

    def _await(self, state: State, progress: Progress, seconds: float) -> State:
        """Waits until SSH answers; ends the guest where it does not."""
        try:
            self._wait_for_ssh(state, progress, seconds)
        except BaseException:
            self._end(state)
            self._state_file.unlink()
            raise
        return state

    def _prepare(self, root: Path) -> None:
        """Makes the run's folder, with what SSH needs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, mode=0o700)
        # Copies: what a run needs must outlast a rebuild of the cache.
        shutil.copy(root / "known_hosts", self.folder)
        shutil.copy(make_key(), self.private_key)

    def _start(self, kernel: Path, root: Path, *more: str, port: int | None = None) -> State:
        """Starts QEMU on that port, or on a free one, and writes down its state."""
        for _attempt in range(_PORT_ATTEMPTS):
            at = port or _free_port()
            self._write_ssh_config(at)
            with self._qemu_log.open("wb") as log:
                process = subprocess.Popen(
                    [*self._prefix, *self._qemu(kernel, at), *more],
                    # The monitor's socket is named relative to this folder, as its path may be too long for a socket.
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment(),
                    # It outlives this process, and an interrupt from the terminal.
                    start_new_session=True,
                )
            try:
                # QMP answers only once QEMU has the port.
                if self._wait_for_qmp(process):
                    return self._write_state(process.pid, at, kernel, root)
            except BaseException:
                end_group(process)
                raise
            # Somebody else may have taken the port between our looking and QEMU's binding.
            if "host forwarding" not in self._qemu_log.read_text(errors="replace"):
                break
        raise LabError(f"QEMU did not start guest {self.name}:\n{tail(self._qemu_log)}")

    def _qemu(self, kernel: Path, port: int) -> list[str]:
        # Software emulation unless told otherwise: a /dev/kvm that exists need not be able to boot this.
        accel = "tcg" if self.guest.architecture.triplet else os.environ.get("LAB_ACCEL", "tcg")
        architecture = self.guest.architecture
        devices = [*architecture.devices, "virtio-rng-pci"]
        devices += ["virtio-blk-pci,drive=root", "virtio-blk-pci,drive=modules"]
        devices += ["virtio-net-pci,netdev=net,romfile="]
        devices += ["edu"] * _PASSTHROUGH_DEVICES
        command = [
            architecture.emulator,
            *("-name", f"lab-{self.name}"),
            *("-machine", architecture.machine),
            *("-accel", accel),
            *("-cpu", architecture.cpu if accel == "tcg" else "host"),
            # One processor: QEMU before 8.1 may go on with what it made of code that the kernel, on another processor,
            # has since patched, such as the breakpoint that Linux puts there meanwhile. Then the guest panics.
            *("-smp", "1", "-m", f"{self.guest.memory_mib}M"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", "file:console.log"),
            *("-qmp", "unix:qmp,server=on,wait=off"),
            *("-kernel", str(kernel / "vmlinuz")),
            *("-initrd", str(kernel / "initrd.img")),
            *("-append", " ".join((*architecture.parameters, *_PARAMETERS, *self.guest.parameters))),
            *("-drive", "if=none,id=root,file=disk.qcow2,format=qcow2,cache=unsafe"),
            *("-drive", f"if=none,id=modules,file={_comma(kernel / self.guest.modules)}.img,format=raw,readonly=on"),
            *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22"),
        ]
        for device in devices:
            command += ["-device", device]
        return command

    def _wait_for_qmp(self, process: subprocess.Popen[bytes]) -> bool:
        """Waits until QEMU's monitor answers; False if QEMU ends instead."""
        deadline = time.monotonic() + _QMP_TIMEOUT
        while process.poll() is None:
            if time.monotonic() > deadline:
                end_group(process)
                raise LabError(f"QEMU did not answer within {_QMP_TIMEOUT:.0f} s:\n{tail(self._qemu_log)}")
            with contextlib.suppress(OSError):
                self._qmp("query-status")
                return True
            time.sleep(0.1)
        return False

    def _qmp(self, command: str, arguments: dict[str, str] | None = None, seconds: float = 5) -> Any:
        """What QEMU's monitor answers to one command. Raises OSError if there is none, and LabError if it refuses."""
        folder = os.open(self.folder, os.O_PATH | os.O_DIRECTORY)
        try:
            with socket.socket(socket.AF_UNIX) as monitor:
                monitor.settimeout(seconds)
                # The short name of a path that may be too long for a socket's address
                monitor.connect(f"/proc/self/fd/{folder}/qmp")
                with monitor.makefile("rw", encoding="utf-8") as stream:
                    stream.readline()
                    answer: dict[str, Any] = {}
                    for request in (
                        {"execute": "qmp_capabilities"},
                        {"execute": command, "arguments": arguments or {}},
                    ):
                        stream.write(json.dumps(request) + "\n")
                        stream.flush()
                        answer = {}
                        # Between request and answer it tells what happens.
                        while not answer.keys() & {"return", "error"}:
                            line = stream.readline()
                            if not line:
                                raise ConnectionError("QEMU's monitor closed the connection")
                            answer = json.loads(line)
        finally:
            os.close(folder)
        if "error" in answer:
            raise LabError(f"QEMU of guest {self.name} refuses {command}: {answer['error'].get('desc')}")
        return answer["return"]

    def _wait_for_ssh(self, state: State, progress: Progress, seconds: float) -> None:
        answer = "waiting for SSH"
        while True:
            if not _is_alive(state):
                raise _Died(f"guest {self.name} died while it booted{self._last_words()}")
            if progress.seconds > seconds:
                raise LabError(f"guest {self.name} did not answer by SSH within {seconds:.0f} s{self._last_words()}")
            progress.show(answer)
            if _greets(state.port):
                refusal = self._try_ssh()
                if refusal is None:
                    progress.done("SSH answers")
                    return
                answer = refusal
            time.sleep(0.2)

    def _try_ssh(self) -> str | None:
        """Logs in once, sets the clock, which a restored guest has from its past, and brings the tests' own programs.

        Gives what ssh says if that fails.
        """
        awaken = f"date --set=@{time.time():.2f} && tar --extract --directory={_PROGRAMS_IN_GUEST}"
        if not any(device.startswith("vmgenid") for device in self.guest.architecture.devices):
            awaken = f"{_RESEED} && {awaken}"
        try:
            tried = self._run(self.ssh_command([awaken]), 60, _programs())
        except subprocess.TimeoutExpired:
            return "ssh does not come back"
        return None if tried.returncode == 0 else tried.stderr.strip().replace("\n", "; ")

    def _run_alone(self, command: str, seconds: float) -> subprocess.CompletedProcess[str]:
        """Runs a command over a connection of its own, once those that are kept have been closed."""
        ssh, *words = self.ssh_command([command])
        self._run([ssh, "-O", "exit", *self.ssh_command()[1:]], 60)
        try:
            return self._run([ssh, "-o", "ControlPath=none", *words], seconds)
        except subprocess.TimeoutExpired:
            raise LabError(f"guest {self.name} did not come to rest within {seconds:.0f} s") from None

    @staticmethod
    def _run(command: Sequence[str], seconds: float, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=seconds, env=environment(), check=False
        )
        said, complaints = (each.decode(errors="replace") for each in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(done.args, done.returncode, said, complaints)

    def _write_ssh_config(self, port: int) -> None:
        """For `ssh -F`: everything about this one guest, and nothing of the user's own configuration."""
        options = {
            "HostName": "127.0.0.1",
            "Port": str(port),
            "User": "root",
            "IdentityFile": _quoted(self.private_key),
            "IdentitiesOnly": "yes",
            "HostKeyAlias": HOST_ALIAS,
            "UserKnownHostsFile": _quoted(self.folder / "known_hosts"),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
            # A guest that hangs is noticed.
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "8",
        }
        control = str(self.folder / "ssh")
        # A login takes a second or more under emulation. ssh adds 17 bytes to the name while it makes the socket.
        if len(os.fsencode(control)) + 17 <= _SOCKET_PATH_MAX:
            options |= {"ControlMaster": "auto", "ControlPersist": "60", "ControlPath": _quoted(Path(control))}
        text = "Host *\n" + "".join(f"    {name} {value}\n" for name, value in options.items())
        self.ssh_config.write_text(text, encoding="utf-8")

    def _write_state(self, pid: int, port: int, kernel: Path, root: Path) -> State:
        start_time = _start_time(pid)
        if start_time is None:
            raise LabError(f"QEMU of guest {self.name} ended{self._last_words()}")
        release = store.manifest(kernel).get("kernel_release", "unknown")
        state = State(pid, start_time, _boot_id(), port, kernel.name, release, root.name)
        new = self._state_file.with_suffix(".new")
        new.write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        new.replace(self._state_file)
        return state

    def _end(self, state: State) -> None:
        """Ends QEMU: its disk is thrown away, so the guest is not asked."""
        with contextlib.suppress(OSError):
            self._qmp("quit")
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                if not _is_alive(state):
                    return
                time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, number)

    def _last_words(self) -> str:
        end = tail(self.console)
        # Why it panicked may have been pushed out of the end by what the kernel tells of its state then.
        panic = [line for line in tail(self.console, 200).splitlines() if "Kernel panic" in line and line not in end]
        words = "".join(f"\n{text}" for text in (tail(self._qemu_log, 5), *panic[-1:], end) if text)
        return f", the end of {self.console}:{words}" if words else f" without a word in {self.console}"


def machines() -> list[Machine]:
    """Every guest of this run, up or not."""
    return [Machine(guest) for guest in GUESTS.values()]


def machines_within() -> list[Machine]:
    """Those, and every guest of the runs within this one, whose LAB_INSTANCE is this one's, a dot and more."""
    runs = _runs()
    within = sorted(runs.parent.glob(f"{glob.escape(runs.name)}.*"))
    return [*machines(), *(Machine(guest, folder) for folder in within for guest in GUESTS.values())]


def running_anywhere() -> list[str]:
    """The folders of the guests that run, whatever checkout they belong to."""
    found = []
    for file in (store.root() / "runs").glob("*/*/state.json"):
        if _is_alive(State(**json.loads(file.read_text(encoding="utf-8")))):
            found.append(str(file.parent))
    return found


def _runs() -> Path:
    checkout = hashlib.sha256(str(Path(__file__).resolve().parents[2]).encode()).hexdigest()[:8]
    return store.root() / "runs" / (checkout + os.environ.get("LAB_INSTANCE", ""))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _greets(port: int) -> bool:
    """Whether an SSH server greets on that port. QEMU itself accepts any connection, long before the guest does."""
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as connection:
            connection.settimeout(5)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _version(emulator: str) -> str:
    """Which QEMU this is: no other need be able to read what it saves."""
    command = [emulator, "--version"]
    told = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    return told.stdout.partition("\n")[0]


def _comma(path: Path) -> str:
    """A path as QEMU's option parser wants it."""
    return str(path).replace(",", ",,")


def _programs() -> bytes:
    """The tests' programs for guests, as an archive. The one that Python is to import itself is none."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(_PROGRAMS.glob("*.py")):
            content = b"#!/usr/bin/python3\n" + path.read_bytes()
            entry = tarfile.TarInfo(path.stem)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _quoted(path: Path) -> str:
    """A path as ssh_config wants it."""
    return '"' + str(path).replace("%", "%%") + '"'


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _start_time(pid: int) -> int | None:
    """When the process began, in clock ticks since boot (proc(5), stat, field 22); None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name before it may hold anything, also parentheses.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _is_alive(state: State) -> bool:
    return state.boot_id == _boot_id() and _start_time(state.pid) == state.start_time
