# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: whether SELinux lets a process use what it has: a capability, or a device node.

The policy that is in force is asked, by selinuxfs (security/selinux/selinuxfs.c). Nothing is tried.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial
from typing import Callable, NamedTuple

from ._child import in_child
from ._errors import IommufdError, error_text, shown_path
from ._paths import walk

__all__ = ("Verdict", "context_of", "context_of_service", "is_enabled", "lets_open", "lets_use")

_SELINUXFS = "/sys/fs/selinux"
_XATTR = "security.selinux"
# security/selinux/include/security.h: AVD_FLAGS_PERMISSIVE
_PERMISSIVE = 1
# SIMPLE_TRANSACTION_LIMIT is less than a page.
_ANSWER = 4096
# A local file is there in no time.
_PATIENCE = 10


class Verdict(NamedTuple):
    """Whether it is allowed, None where that cannot be told; and what forbids it, or why it cannot be told."""

    allowed: bool | None
    why: str = ""


def lets_use(capability: str, context: Callable[[], str]) -> Verdict:
    """Whether a process may use a capability that it has in the initial user namespace, as far as SELinux goes.

    `capability` is one of the first 32, such as `cap_sys_resource`. `context` gives the process's context, and is
    called where SELinux is in force; it may raise OSError and IommufdError. See cred_has_capability() in
    security/selinux/hooks.c.
    """
    return _lets((capability[len("cap_") :],), "capability", context)


def lets_open(node: str, context: str) -> Verdict:
    """Whether a process of that context may open a character device, and use it as a VMM does, as far as SELinux goes.

    Only root can write the node's folder.
    """
    return _lets(("open", "read", "write", "ioctl", "map"), "chr_file", lambda: context, node)


def _lets(permissions: Sequence[str], kind: str, context: Callable[[], str], node: str | None = None) -> Verdict:
    """Whether a process has these permissions for itself, or for a node."""
    try:
        if not _enforces():
            return Verdict(True)
    except OSError as exc:
        return Verdict(None, f"Whether SELinux is in force cannot be read ({error_text(exc.errno)})")
    what = ", ".join(permissions)
    try:
        who = context()
        target = who if node is None else _text(os.getxattr(node, _XATTR))
        allowed, *_others, flags = _ask("access", who, target, _number(f"{kind}/index")).split()
        denied = [each for each in permissions if not int(allowed, 16) >> (_number(f"{kind}/perms/{each}") - 1) & 1]
        if not denied or int(flags, 16) & _PERMISSIVE:
            return Verdict(True)
    except OSError as exc:
        return Verdict(
            None, f"SELinux is in force, and its policy cannot be asked for {what} ({error_text(exc.errno)})"
        )
    except IommufdError as exc:
        return Verdict(None, f"SELinux is in force, and the context is not known: {str(exc).rstrip('.')}")
    except ValueError:
        return Verdict(None, f"SELinux is in force, and its answer for {what} is of a form that is not known here")
    where = "" if node is None else f" on {node}, which is {target}"
    return Verdict(False, f"SELinux's policy denies {', '.join(denied)} to {who}{where}")


def is_enabled() -> bool:
    """Whether SELinux is there, in force or not."""
    return os.path.exists(f"{_SELINUXFS}/enforce")


def context_of(pid: int) -> str:
    """The context of a process. Raises OSError."""
    with open(f"/proc/{pid}/attr/current", "rb") as stream:
        return _text(stream.read())


def context_of_service(program: str) -> str:
    """The context in which systemd runs a program, unless the unit sets one. Raises OSError and IommufdError."""
    # A path may lead to a mount whose server does not answer for ever.
    label = in_child(None, partial(_label_of, program), _PATIENCE)
    return _text(_ask("create", context_of(1), label, _number("process/index")))


def _label_of(program: str) -> str:
    """The context of the file that is executed. Raises IommufdError."""
    try:
        with walk(program, follow=True, program=True) as place:
            if place.found is None:
                raise IommufdError(f"There is no {shown_path(program)}.")
            return _text(os.getxattr(f"/proc/self/fd/{place.found}", _XATTR))
    except OSError as exc:
        raise IommufdError(f"{shown_path(program)} cannot be looked at ({error_text(exc.errno)}).") from exc


def _enforces() -> bool:
    # A kernel without SELinux has neither the file nor a place for it.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(f"{_SELINUXFS}/enforce", "rb") as stream:
        return stream.read().strip() == b"1"
    return False


def _number(name: str) -> int:
    with open(f"{_SELINUXFS}/class/{name}", "rb") as stream:
        return int(stream.read())


def _ask(what: str, source: str, target: str, kind: int) -> bytes:
    """One question: the answer is read from where the question was written."""
    fd = os.open(f"{_SELINUXFS}/{what}", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, f"{source} {target} {kind}".encode())
        return os.pread(fd, _ANSWER, 0)
    finally:
        os.close(fd)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0\n").decode("ascii", "backslashreplace")
