# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a libvirt domain that is started with an iommufd of ours.

What speaks to libvirt (`look_at_domain`, `start_domain`) runs in a child that has become the user whose libvirt it is,
and returns what JSON can hold. What looks at processes runs as the caller.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
import re
import stat
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from ._accounting import IOMMUFD, LEGACY, PROCESS, UNLIMITED, USER, VDPA, Device
from ._borrow import borrow_iommufd, find_iommufds
from ._capabilities import CAP_IPC_LOCK, CAP_SYS_RESOURCE, capability_names, read_xattr
from ._change import Result, change
from ._child import in_child
from ._domain_fit import Start, refusal
from ._domain_xml import Defined, parse_domain, reckoned_limit
from ._errors import DescriptorGone, IommufdError, NotAnIommufd, error_text, printable
from ._foreign import boolean, first_of, member, number, one_of, or_none, shown_text, text, texts
from ._iommufd import RLIMIT_MODE, IommuFd
from ._named_target import DomainTarget, escaped
from ._names import user_name
from ._pidfile import look_patiently, read_pidfile
from ._process import Process
from ._process_facts import read_arguments, read_memlock
from ._qemu import guest_name
from ._size import human_size
from ._target import Target, hold_target
from ._user import User

__all__ = (
    "DAEMONS",
    "SINCE",
    "Daemon",
    "DomainSeen",
    "Endpoint",
    "NoDaemon",
    "SessionDaemon",
    "SessionDomain",
    "Started",
    "check_fit",
    "check_limit",
    "check_startable",
    "connected",
    "dotted_version",
    "foretell_changes",
    "is_session",
    "look_at_daemon",
    "look_at_domain",
    "parse_definition",
    "set_mode",
    "start_domain",
)

# libvirt's NEWS: <iommufd enabled='yes' fdgroup='NAME'/> and a descriptor for it. As virConnectGetLibVersion counts.
# A distribution may have taken it into an older one, or left it out of a newer.
SINCE = 12_002_000

# enum virDomainState
_STATES = ("unknown", "running", "blocked", "paused", "shutting down", "shut off", "crashed", "suspended")
# enum virErrorNumber
_NO_DOMAIN = 42

# The daemon that drives QEMU, in the new arrangement and in the old one.
DAEMONS = ("virtqemud", "libvirtd")

# Of the system libvirt.
_SYSTEM_FOLDER = "/var/lib/libvirt/qemu"

_ELF = b"\x7fELF"
_CHARACTER_DEVICES = "/sys/dev/char"
_SIMULATOR = "/sys/module/vdpa_sim/parameters/use_va"
_PCI_DEVICES = "/sys/bus/pci/devices"
_VFIO_NODES = "/dev/vfio/devices"
# No domain has so many devices.
_DEVICES_MAX = 256
# A device may have several nodes, and each may be one.
_OBSTACLES_MAX = 2 * _DEVICES_MAX
_LOG_MAX = 65536
_LOG_LINES = 5
# What the kernel answers in no time; a busy host gets so long.
_SECONDS = 30


class NoDaemon(IommufdError):
    """No libvirt daemon answers, or none could be had started."""


def dotted_version(number: int) -> str:
    """A version of libvirt's, which counts 12002000 for 12.2.0, as libvirt writes it."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def parse_definition(description: str) -> Defined:
    """Reads a domain's XML as libvirt has it. Raises IommufdError for anything else."""
    try:
        found = parse_domain(description)
    except IommufdError as exc:
        raise IommufdError(f"libvirt's description of the domain cannot be read: {exc}.") from exc
    return found._replace(
        devices=found.devices[:_DEVICES_MAX],
        addresses=found.addresses[:_DEVICES_MAX],
        vdpa_nodes=found.vdpa_nodes[:_DEVICES_MAX],
    )


class DomainSeen(NamedTuple):
    """What libvirt says of a domain, by way of the user's child. `version` is the daemon's, as libvirt counts.

    `obstacles` are sentences: what keeps the user from its devices. `pinning_vdpa`: how many of its vDPA devices are
    known to pin its memory. `plain`: whether its emulator is known to give no capability to whoever executes it.
    """

    version: int
    uuid: str
    active: bool
    state: str
    definition: Defined
    obstacles: tuple[str, ...]
    pinning_vdpa: int = 0
    plain: bool = False

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        devices = [each._asdict() for each in self.definition.devices]
        return {**self._asdict(), "definition": {**self.definition._asdict(), "devices": devices}}

    @classmethod
    def from_json(cls, given: Any) -> DomainSeen:
        """What `to_json` has made, in another process that may have made something else. Raises IommufdError."""
        try:
            return cls(
                member(given, "version", number),
                member(given, "uuid", text),
                member(given, "active", boolean),
                member(given, "state", text),
                member(given, "definition", _definition_from_json),
                member(given, "obstacles", texts(_OBSTACLES_MAX)),
                member(given, "pinning_vdpa", partial(number, most=_DEVICES_MAX)),
                member(given, "plain", boolean),
            )
        except IommufdError as exc:
            raise IommufdError(f"What was learned of the domain cannot be read: {exc}.") from exc


def _definition_from_json(given: object) -> Defined:
    return Defined(
        name=member(given, "name", text),
        memory=member(given, "memory", number),
        devices=member(given, "devices", _devices_from_json),
        viommu=member(given, "viommu", or_none(text)),
        counted=member(given, "counted", or_none(number)),
        hard_limit=member(given, "hard_limit", or_none(number)),
        locked=member(given, "locked", boolean),
        mem_lock=member(given, "mem_lock", or_none(boolean)),
        user=member(given, "user", or_none(text)),
        fdgroup=member(given, "fdgroup", or_none(text)),
        emulator=member(given, "emulator", or_none(text)),
        elastic=member(given, "elastic", number),
        addresses=member(given, "addresses", texts(_DEVICES_MAX)),
        vdpa_nodes=member(given, "vdpa_nodes", texts(_DEVICES_MAX)),
    )


def _devices_from_json(given: object) -> tuple[Device, ...]:
    if not isinstance(given, list):
        raise IommufdError("is no list")
    if len(given) > _DEVICES_MAX:
        raise IommufdError(f"has more than {_DEVICES_MAX} devices")
    return tuple(
        Device(
            member(each, "backend", one_of(IOMMUFD, LEGACY, VDPA)),
            member(each, "holder", text),
            member(each, "mode", or_none(one_of(USER, PROCESS))),
            member(each, "as_it_runs", boolean),
        )
        for each in given
    )


class Started(NamedTuple):
    """What became of a start: the domain's state in libvirt's words, and whether it was us who started it."""

    state: str
    started: bool

    @classmethod
    def from_json(cls, given: Any) -> Started:
        """What `start_domain` has returned, in a child that may have returned something else. Raises IommufdError."""
        try:
            return cls(member(given, "state", text), member(given, "started", boolean))
        except IommufdError as exc:
            raise IommufdError(f"What became of the start cannot be read: {exc}.") from exc


def _binding() -> Any:
    """The Python binding of libvirt. Raises IommufdError."""
    try:
        return importlib.import_module("libvirt")
    except ImportError as exc:
        raise IommufdError(
            f"libvirt's Python binding is missing on this host ({exc}): install the package python3-libvirt (Debian,"
            " Ubuntu, Fedora, Red Hat), python3-libvirt-python (SUSE) or libvirt-python (Arch), for the Python that"
            " Ansible uses there."
        ) from exc


def _said(error: Any) -> str:
    """What libvirt itself says of an error."""
    return shown_text(str(error.get_error_message() or error).strip())


@contextlib.contextmanager
def connected(uri: str) -> Iterator[tuple[Any, Any]]:
    """The binding, and a connection to a daemon that runs or waits behind its socket, closed when the context ends.

    Raises NoDaemon where there is none, and IommufdError for any of libvirt's errors in the context.
    """
    libvirt = _binding()
    # Otherwise every error is printed, too.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as exc:
        raise NoDaemon(f"libvirt does not answer at {uri}: {_said(exc)}") from exc
    try:
        yield libvirt, connection
    except libvirt.libvirtError as exc:
        raise IommufdError(f"libvirt ({uri}) says: {_said(exc)}") from exc
    finally:
        connection.close()


def _find(libvirt: Any, connection: Any, uri: str, name: str) -> Any:
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != _NO_DOMAIN:
            raise
        raise IommufdError(
            f"There is no domain {name} at {uri}: define it first; `virsh --connect {uri} list --all`, run as that"
            " user, lists those that there are."
        ) from exc


def look_at_domain(uri: str, name: str, unprivileged: bool) -> dict[str, Any]:
    """What libvirt says of a domain, for `DomainSeen.from_json`. Raises NoDaemon and IommufdError.

    `unprivileged`: its libvirt may do no more than we here.
    """
    with connected(uri) as (libvirt, connection):
        domain = _find(libvirt, connection, uri, name)
        definition = parse_definition(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        seen = DomainSeen(
            connection.getLibVersion(), domain.UUIDString(), bool(domain.isActive()), _state(domain), definition, ()
        )
        if not seen.active:
            obstacles = device_obstacles(definition.addresses) if unprivileged else iter(())
            seen = seen._replace(
                obstacles=tuple(islice(obstacles, _OBSTACLES_MAX)),
                pinning_vdpa=sum(map(pins_for_vdpa, definition.vdpa_nodes)),
                plain=definition.emulator is not None and gives_nothing(definition.emulator),
            )
        return seen.to_json()


def _state(domain: Any) -> str:
    number = domain.state()[0]
    return _STATES[number] if 0 <= number < len(_STATES) else str(number)


def device_obstacles(devices: tuple[str, ...]) -> Iterator[str]:
    """What keeps this process from passing these PCI devices through: a sentence for each that is out of reach."""
    for address in devices:
        folder = f"{_PCI_DEVICES}/{address}"
        nodes = [f"{_VFIO_NODES}/{os.path.basename(each)}" for each in glob.glob(f"{folder}/vfio-dev/vfio*")]
        if not os.path.isdir(folder):
            yield f"This host has no PCI device {address}."
        elif not nodes:
            driver = os.path.basename(os.path.realpath(f"{folder}/driver"))
            held = f"driven by {driver}" if os.path.exists(f"{folder}/driver") else "without a driver"
            yield (
                f"PCI device {address} is {held}: root has to bind it to vfio-pci beforehand, with"
                f" `driverctl set-override {address} vfio-pci`, for one. (With vfio-pci it has no {folder}/vfio-dev if"
                " the kernel was built without CONFIG_VFIO_DEVICE_CDEV.)"
            )
        else:
            yield from (_closed(address, each) for each in nodes if not os.access(each, os.R_OK | os.W_OK))


def _closed(address: str, node: str) -> str:
    try:
        found = os.stat(node)
        owner = f"mode {stat.S_IMODE(found.st_mode):04o}, owner {user_name(found.st_uid) or found.st_uid}"
    except OSError as exc:
        owner = error_text(exc.errno)
    return (
        f"PCI device {address} is {node} ({owner}), which uid {os.geteuid()} may not open for reading and writing: give"
        " it to that user by a udev rule for the subsystem vfio-dev."
    )


def pins_for_vdpa(node: str) -> bool:
    """Whether a vDPA device is known to pin memory. One that works with virtual addresses does not: see vhost/vdpa.c.

    Of Linux's drivers those are that of VDUSE and, as its parameter says, that of the simulator.
    """
    try:
        found = os.stat(node)
        link = f"{_CHARACTER_DEVICES}/{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        os.stat(link)
        place = os.path.realpath(link).split("/")
        if any(part.startswith("vdpasim") for part in place):
            with open(_SIMULATOR) as stream:
                return stream.read(1) == "N"
    except (OSError, ValueError):
        return False
    is_vdpa = stat.S_ISCHR(found.st_mode) and place[-1].startswith("vhost-vdpa")
    return is_vdpa and "vduse" not in place


def gives_nothing(path: str) -> bool:
    """Whether an executable is known to give no capability and no other user to whoever executes it.

    Of a script it is not, since that executes something else.
    """
    try:
        # It may be a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return False
    try:
        mode = os.fstat(fd).st_mode
        plain = stat.S_ISREG(mode) and not mode & (stat.S_ISUID | stat.S_ISGID)
        return plain and os.read(fd, len(_ELF)) == _ELF and read_xattr(fd) is None
    except OSError:
        return False
    finally:
        os.close(fd)


def start_domain(uri: str, name: str, fdgroup: str, fd: int, paused: bool) -> dict[str, Any]:
    """Starts a domain with the iommufd behind descriptor `fd` of this process; what `Started.from_json` takes.

    libvirt's daemon holds the descriptor no longer than the connection lasts (virDomainFDAssociate), the emulator for
    as long as it runs. Raises NoDaemon and IommufdError.
    """
    with connected(uri) as (libvirt, connection):
        domain = _find(libvirt, connection, uri, name)
        log = log_file(uri, name)
        began = _size(log)
        try:
            domain.FDAssociate(fdgroup, [fd], 0)
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
        except libvirt.libvirtError as exc:
            if domain.isActive():
                # Somebody was quicker, such as the daemon itself, which tries once more what ran when it last ended.
                return {"state": _state(domain), "started": False}
            said = _said(exc)
            end = log_end(log, began, said)
            raise IommufdError(f"Domain {name} did not start. libvirt says: {said.rstrip('.')}.{end}") from exc
        return {"state": _state(domain), "started": True}


def log_file(uri: str, name: str) -> str:
    """Where libvirt keeps what a domain's emulator says, unless it was told otherwise."""
    if is_session(uri):
        return f"{os.environ.get('HOME', '')}/.cache/libvirt/qemu/log/{name}.log"
    return f"/var/log/libvirt/qemu/{name}.log"


def is_session(uri: str) -> bool:
    """Whether a URI leads to a user's own libvirt, and not to the system's."""
    return uri.partition("?")[0] == "qemu:///session"


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def log_end(path: str, began: int, said: str) -> str:
    """What a domain's log says beyond the byte `began` and beyond libvirt's words, as a sentence to add; "" if nothing.

    The log begins with the emulator's command line, whose lines end in a backslash, but for the last.
    """
    try:
        with open(path, "rb") as stream:
            stream.seek(max(began, _size(path) - _LOG_MAX))
            lines = stream.read(_LOG_MAX).splitlines()
    except OSError:
        return ""
    told = [
        printable(each.strip()) for each in lines if each.strip() and not re.search(rb"\\$|^-|: starting up ", each)
    ]
    new = [each for each in told[-_LOG_LINES:] if each not in said]
    return f" The end of {path}: {' | '.join(new)}" if new else ""


class SessionDaemon(NamedTuple):
    """The daemon of a user's own libvirt, by the pidfile of its QEMU driver in the user's runtime folder.

    The folder is closed to everybody else, so that others' right to write below it means nothing. The user may have
    written the file; so what it names has to be the user's, and nobody but the user is the worse for it.
    """

    path: str
    uid: int

    def __str__(self) -> str:
        return f"Pidfile {self.path}"

    def resolve(self) -> int:
        """The id in the file. Raises IommufdError for any file that is not a pidfile."""
        return read_pidfile(self.path).pid

    @classmethod
    def of(cls, user: User) -> SessionDaemon:
        """The daemon of that user."""
        return cls(f"{_state_folder(user)}/driver.pid", user.uid)

    def check(self, process: Process) -> None:
        """Raises IommufdError where the process is not the user's daemon."""
        if process.uid != self.uid or process.comm not in DAEMONS:
            raise IommufdError(f"{process} is not libvirt's daemon of uid {self.uid}: {self.path} is stale.")


class SessionDomain(NamedTuple):
    """The emulator of a running domain of a user's own libvirt, by a pidfile that is to be trusted as the daemon's."""

    path: str
    uid: int
    name: str

    def __str__(self) -> str:
        return f"Pidfile {self.path}"

    def resolve(self) -> int:
        """The id in the file. Raises IommufdError for any file that is not a pidfile."""
        return read_pidfile(self.path).pid

    @classmethod
    def of(cls, user: User, name: str) -> SessionDomain:
        """The domain of that name."""
        path = f"{_state_folder(user)}/{name}.pid"
        # It is in a folder of the user's.
        if not look_patiently(f"Pidfile {path}", partial(os.path.lexists, path)):
            path = f"{_state_folder(user)}/{escaped(name)}.pid"
        return cls(path, user.uid, name)

    def check(self, process: Process) -> None:
        """Raises IommufdError where the process is not the domain's emulator."""
        look = partial(_guest_of, process)
        # Its memory is the user's, too.
        guest = look_patiently(f"The command line of {process}", look, [process.pidfd])
        if process.uid != self.uid or guest != self.name:
            raise IommufdError(
                f"{process} is not the emulator of domain {self.name} of uid {self.uid}: {self.path} is stale."
            )


def _guest_of(process: Process) -> str | None:
    guest = guest_name(read_arguments(process).words)
    return None if guest is None else os.fsdecode(guest)


def _state_folder(user: User) -> str:
    return f"{user.runtime_folder}/libvirt/qemu/run"


class Endpoint(NamedTuple):
    """A libvirt to speak to: `user` is who speaks to it, None for the caller."""

    uri: str
    user: User | None

    @property
    def session(self) -> User | None:
        """The user whose own libvirt it is; None for the system's."""
        return self.user if is_session(self.uri) else None

    def emulator_of(self, name: str) -> Target:
        """The emulator of a running domain."""
        return DomainTarget(name) if self.session is None else SessionDomain.of(self.session, name)

    def daemon(self) -> Target | None:
        """The daemon of a user's own libvirt; None for the system's."""
        return None if self.session is None else SessionDaemon.of(self.session)


def check_startable(name: str, libvirt: Endpoint, seen: DomainSeen) -> str:
    """The domain's fdgroup. Raises IommufdError where libvirt could not start it with an iommufd of ours."""
    definition = seen.definition
    if not definition.fdgroup:
        _check_takes(seen)
        itself = ""
        if libvirt.session is None:
            itself = " Or start it as any other: the system libvirt opens an iommufd and sets it itself."
        raise IommufdError(
            f"Domain {name} does not say that it gets its iommufd from somebody else. Add this line below <domain>"
            f" (virsh --connect {libvirt.uri} edit {name}): <iommufd enabled='yes' fdgroup='iommufd'/>{itself}"
        )
    if not definition.addresses:
        raise IommufdError(
            f"Domain {name} has no PCI device that is passed through by iommufd, so it needs no iommufd: give it a"
            " <hostdev> without <driver iommufd='no'/>, or start it as any other."
        )
    if libvirt.session is not None and definition.hard_limit is not None:
        raise IommufdError(
            f"Domain {name} has a <memtune><hard_limit>, which a user's own libvirt refuses: take it out of its XML"
            f" (virsh --connect {libvirt.uri} edit {name})."
        )
    if seen.obstacles:
        raise IommufdError(f"Domain {name} cannot be started. {first_of(seen.obstacles)}")
    return definition.fdgroup


def _check_takes(seen: DomainSeen) -> None:
    """Raises IommufdError where libvirt knows no iommufd of somebody else's.

    A domain that has said that it gets one has shown that libvirt knows it: libvirt leaves out of its description what
    it does not know. For others, libvirt's files tell.
    """
    # Nearly always the domain says so, and to import this costs each task.
    from ._libvirt import installed_libraries
    from ._libvirt_files import takes_iommufd

    takes = takes_iommufd(installed_libraries())
    if takes is True or (takes is None and seen.version >= SINCE):
        return
    first = f"{dotted_version(SINCE)} is the first that does"
    how = f"its files have nothing that does, and {first}"
    if takes is None:
        how = f"{first}. That is told by its version, since neither its library nor its schemas could be read"
    raise IommufdError(
        f"libvirt {dotted_version(seen.version)} takes no iommufd from others: {how}. Upgrade libvirt and restart its"
        " daemon, or grant CAP_IPC_LOCK to the emulator instead."
    )


class Daemon(NamedTuple):
    """A user's libvirt daemon that runs, and its hard limit on locked memory in bytes, None for unlimited.

    `may`: whether it has CAP_SYS_RESOURCE, and may raise that. `gives`: whether it may hand CAP_IPC_LOCK on.
    """

    pid: int
    title: str
    hard: int | None
    may: bool
    gives: bool


def look_at_daemon(target: Target) -> Daemon:
    """Looks at a user's daemon. Raises as hold_target does."""

    def look() -> Daemon:
        with hold_target(target) as daemon:
            hard = read_memlock(daemon).hard
            may = CAP_SYS_RESOURCE in capability_names(daemon.status.effective)
            return Daemon(daemon.pid, str(daemon), hard, may, CAP_IPC_LOCK in capability_names(daemon.status.permitted))

    return Daemon(*in_child(None, look, _SECONDS))


def vms_are_no_roots() -> bool:
    """Whether the VMs of the system libvirt are known not to be root's."""
    # libvirt gives it to the user that its VMs run as, each time the daemon starts.
    try:
        return os.stat(_SYSTEM_FOLDER).st_uid != 0
    except OSError:
        return False


def check_limit(name: str, user: User, daemon: Daemon, defined: Defined) -> None:
    """Raises IommufdError where the daemon may not give the emulator the limit on locked memory that libvirt will ask.

    libvirt sets it on the emulator and fails if it may not, once everything else is done.
    """
    need = reckoned_limit(defined)
    if need is None or daemon.may or daemon.hard is None or need <= daemon.hard:
        return
    needs, value = "none at all, because of <locked/>", "infinity"
    if need < UNLIMITED:
        often = "its memory" if defined.counted == 1 else f"{defined.counted} times its memory"
        needs, value = f"{human_size(need)} by libvirt's reckoning, which is {often} and 1 GiB", str(need)
    raise IommufdError(
        f"RLIMIT_MEMLOCK of {daemon.title}, the libvirt of user {user.name}, is {human_size(daemon.hard)}, but domain"
        f" {name} takes {needs}. Give the user's service manager, from which the daemon has it, a higher one:"
        f" LimitMEMLOCK={value} in a drop-in of user@{user.uid}.service; then restart that, which ends all that the"
        " user runs."
    )


def check_fit(name: str, libvirt: Endpoint, seen: DomainSeen, daemon: Daemon | None, mode: str) -> None:
    """Raises IommufdError where the emulator is certain not to get all that it pins, in this mode.

    `daemon` is that of a user's own libvirt.
    """
    session = libvirt.session
    # What the emulator's file does not give it, it has only from root, or from a daemon of its own user's.
    if session is None:
        capable = None if seen.definition.user is not None or not seen.plain or not vms_are_no_roots() else False
    else:
        capable = None if session.uid == 0 or not seen.plain or daemon is None or daemon.gives else False
    found = refusal(seen.definition, Start(mode, capable, seen.pinning_vdpa, os.sysconf("SC_PAGE_SIZE")))
    if found is None:
        return
    cures = list(found.cures)
    if session is None:
        limit = "no limit, by <memoryBacking><locked/></memoryBacking> without <hard_limit>"
        if found.enough is not None:
            limit = f"<memtune><hard_limit unit='KiB'>{-(-found.enough // 1024)}</hard_limit></memtune>"
            limit += ", which is the limit of its control group, too"
        cures.append(f"give it {limit}")
    elif not cures:
        # libvirt refuses <hard_limit> there, and sets what it reckons, however much its daemon has.
        limit = f"<memoryBacking><locked/></memoryBacking>, and user@{session.uid}.service LimitMEMLOCK=infinity"
        cures.append(f"give it no limit, by {limit}")
    told = ", or ".join(cures)
    raise IommufdError(f"Domain {name} was not started: {found.reason} {told[0].upper()}{told[1:]}.")


def foretell_changes(target: Target, wanted: int) -> tuple[dict[str, Any], list[tuple[str, Result]]]:
    """An emulator, described, and for each of its iommufds its name and what a change of the rlimit mode would come to.

    Nothing is changed. Raises what hold_target, in_child and borrow_iommufd do.
    """
    # The emulator may keep whoever looks at it, and put something in the place of its iommufd that is never closed.
    process, found = in_child(None, partial(_dry_runs, target, wanted), _SECONDS)
    return process, [(subject, Result(*given)) for subject, given in found]


def _dry_runs(target: Target, wanted: int) -> tuple[dict[str, Any], list[tuple[str, Result]]]:
    found = []
    with hold_target(target) as process:
        held = find_iommufds(process)
        rdevs = set(held.values())
        for fd in held:
            # One that is closed meanwhile, or only names the device, charges nobody.
            with contextlib.suppress(DescriptorGone, NotAnIommufd), borrow_iommufd(process, fd, rdevs) as iommufd:
                found.append((f"iommufd {fd} of {process}", change(iommufd, RLIMIT_MODE, wanted, dry_run=True)))
        return process.describe(), found


def set_mode(fd: int, wanted: int, dry_run: bool) -> Result:
    """Gives a new iommufd its rlimit mode; a dry run foretells that."""
    return change(IommuFd(fd), RLIMIT_MODE, wanted, dry_run=dry_run)
