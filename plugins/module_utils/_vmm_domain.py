# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: has libvirt start a domain, to see with which capabilities and limits its emulator runs.

See _vmm_trial for what is a verdict, and for what ends whatever is started.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import IO

from ._child import Interrupted, NoAnswer, end
from ._command import start_command
from ._errors import IommufdError, error_text
from ._named_target import DomainTarget, escaped
from ._systemd import Run
from ._target import hold_target
from ._vmm_look import REPLICA, Program
from ._vmm_trial import ProcessSeen, one_line, see_in_child

__all__ = (
    "LIBVIRT_SECONDS",
    "start_bare_domain",
)

# In seconds: libvirt may have to find out what the emulators can first.
LIBVIRT_SECONDS = 300

_LIBVIRT_LOGS = "/var/log/libvirt/qemu"
_LIBVIRT_PROFILES = "/etc/apparmor.d/libvirt"


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
                return see_in_child(hold_target(DomainTarget(name)))
            except IommufdError as exc:
                raise Interrupted(f"libvirt does not start a domain with {program.path}: {_complaints(said)}") from exc
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


def _complaints(said: bytes) -> str:
    """What virsh has said of errors, without its prompts."""
    lines = [line for line in said.splitlines() if line.startswith(b"error:")]
    return one_line(b" ".join(lines) or said)


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
    raise Interrupted(f"libvirt does not tell what {program.path} can: {one_line(os.fsencode(errors or output))}")


def domain_xml(capabilities: ET.Element, name: str, identity: str, emulator: str) -> str:
    """The smallest domain of an emulator, of the type, architecture and machine that libvirt gives it by default."""
    values = {key: escaped(capabilities.findtext(key, "")) for key in ("domain", "arch", "machine")}
    return (
        f"<domain type='{values['domain']}'><name>{name}</name><uuid>{identity}</uuid><memory unit='MiB'>64</memory>"
        f"<os><type arch='{values['arch']}' machine='{values['machine']}'>hvm</type></os><devices>"
        f"<emulator>{escaped(emulator)}</emulator><controller type='usb' model='none'/><memballoon model='none'/>"
        "</devices></domain>"
    )
