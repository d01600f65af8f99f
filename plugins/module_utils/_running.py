# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what the system libvirt has recorded of the domains that run.

The folder of the records belongs to the emulators' user on some distributions, Debian's for one. Whoever is that user,
by way of an emulator for one, can rename or remove root's files there and put others beside them, and can change the
command line of any process of that user. What holds nevertheless, and is all that is believed here:

- What a record says, and when it was written: it is root's, and closed to everybody else. A record that says another
  name than the file's was renamed. One that was written before the process started means an earlier process with the
  same id: libvirt removes a record when a domain ends, but not if it was renamed meanwhile.
- The control group of a process, which it cannot leave without privilege. systemd-machined makes one for each domain
  and has libvirt's number for the domain in its name.

What does not hold: that a domain is found. That user can hide one by renaming its record.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import NamedTuple

from ._errors import IommufdError, error_text
from ._foreign import XML_MAX, number, parse_xml, shown_text
from ._paths import mount_id

__all__ = (
    "DomainRecord",
    "check_domain_name",
    "parse_domain_record",
    "read_domain_record",
    "read_record_file",
)

_FOLDER = "/run/libvirt/qemu"
_LIBVIRT_UID = 0

_PID_MAX = 2**31 - 1
# Seconds: for the clock's slewing, and a tick's length.
_SLACK = 1

# As systemd writes the name of machine `qemu-NUMBER-NAME` into that of a unit.
_SCOPE = re.compile(r"machine-qemu\\x2d([0-9]+)\\x2d")


class DomainRecord(NamedTuple):
    """A running domain, as libvirt has recorded it: its emulator, its number for the domain, and the domain's name.

    `uid` is who the emulator runs as, None where libvirt did not choose that. `written` is in seconds since the epoch.
    """

    pid: int
    number: int
    name: str
    uid: int | None
    written: float

    def contradiction(self, name: str, pid: int, uid: int, started: float, unit: str | None) -> str:
        """What shows that a process is not the emulator of the domain of that name, as a sentence; empty if nothing.

        `uid`, `started` and `unit` are the process's: its user, when it started, in seconds since the epoch, and the
        unit of the system's service manager that it is in.
        """
        scope = _SCOPE.match(unit or "")
        if self.name != name:
            return f"libvirt's record of the domain is that of domain {shown_text(self.name)}, so it was renamed."
        if self.pid != pid:
            return f"libvirt's record of the domain says that it is process {self.pid}."
        if self.written < started - _SLACK:
            return (
                "libvirt's record of the domain was written before that process started, so it is stale, unless the"
                " clock was set in between."
            )
        if scope and int(scope.group(1)) != self.number:
            return f"it is in {unit}, but libvirt has recorded number {self.number} for the domain."
        if self.uid is not None and self.uid != uid:
            return f"libvirt runs that as uid {self.uid}, and this is uid {uid}."
        return ""


def check_domain_name(name: str) -> None:
    """Raises IommufdError where no domain can have that name: libvirt makes files of it."""
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise IommufdError(f"{name!r} is not the name of a domain: it is a name, not a path.")


def read_domain_record(name: str) -> DomainRecord:
    """The record of the running domain of that name, or of another one where the file was renamed.

    Raises as `read_record_file` does, and where it is no record.
    """
    text, written = read_record_file(name)
    try:
        return parse_domain_record(text, written)
    except IommufdError as exc:
        raise IommufdError(f"{shown_text(f'{_FOLDER}/{name}.xml')} is no record of libvirt's: it {exc}.") from exc


def read_record_file(name: str) -> tuple[bytes, float]:
    """What is in the record of a domain, and when it was written, in seconds since the epoch.

    Raises IommufdError, with the OSError as its cause where there is no such file, or this caller may not read it.
    Nobody is waited for: a FIFO, a link, and a mount in place of file or folder are refused before they are opened.
    """
    check_domain_name(name)
    path = f"{_FOLDER}/{name}.xml"
    place = shown_text(path)
    with contextlib.ExitStack() as stack:
        try:
            above = _open_path(stack, os.path.dirname(_FOLDER), os.O_DIRECTORY)
            folder = _open_path(stack, _FOLDER, os.O_DIRECTORY | os.O_NOFOLLOW)
            _check_not_mounted(_FOLDER, folder, above)
            found = _open_path(stack, f"{name}.xml", os.O_NOFOLLOW, folder)
            _check_not_mounted(place, found, folder)
            status = os.fstat(found)
            if not stat.S_ISREG(status.st_mode):
                raise IommufdError(f"{place} is not libvirt's: it is not a regular file.")
            if status.st_uid != _LIBVIRT_UID:
                raise IommufdError(f"{place} is not libvirt's: it belongs to uid {status.st_uid}, not to root.")
            # The very file that was looked at, whatever lies at its path by now.
            with open(f"/proc/self/fd/{found}", "rb") as stream:
                status = os.fstat(stream.fileno())
                text = stream.read(XML_MAX + 1)
        except (OSError, ValueError) as exc:
            why = error_text(exc.errno) if isinstance(exc, OSError) else "it is no path"
            raise IommufdError(f"{place}, libvirt's record of the domain, cannot be read ({why}).") from exc
    return text, status.st_mtime


def _open_path(stack: contextlib.ExitStack, path: str, flags: int, folder: int | None = None) -> int:
    """A descriptor of what is at a path, which is not opened for that. Raises OSError and ValueError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags, dir_fd=folder)
    stack.callback(os.close, fd)
    return fd


def _check_not_mounted(place: str, fd: int, folder: int) -> None:
    """Raises IommufdError where something is mounted there: users may mount on what is theirs."""
    if mount_id(fd) != mount_id(folder):
        raise IommufdError(f"{place} is not libvirt's: something is mounted there.")


def parse_domain_record(text: bytes, written: float) -> DomainRecord:
    """Reads libvirt's status XML: see virDomainObjFormat() in its src/conf/domain_conf.c.

    The user is in the label of the security model `dac`, such as `+64055:+64055`. Raises IommufdError, whose text
    continues a sentence about the file.
    """
    root = parse_xml(text)
    name = root.findtext("domain/name")
    domain = root.find("domain")
    if root.tag != "domstatus" or domain is None or not name:
        raise IommufdError("holds no domain that runs")
    label = re.match(r"\+?([0-9]{1,10}):", root.findtext("domain/seclabel[@model='dac']/label") or "")
    values = []
    for what, value in (("pid", root.get("pid")), ("id", domain.get("id"))):
        try:
            values.append(number(value, _PID_MAX))
        except IommufdError as exc:
            raise IommufdError(f"has a {what} that {exc}") from exc
    return DomainRecord(values[0], values[1], name, int(label.group(1)) if label else None, written)
