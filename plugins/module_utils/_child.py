# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: a child process that has become an ordinary user, and does one thing for us as that user.

What it answers is data from that user, not to be believed further than the user is: it is JSON of a limited size, and
whoever reads it checks what it holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Collection
from typing import Any, Callable, NoReturn

from ._errors import IommufdError, error_text
from ._process import printable
from ._user import User, become, has_ids

__all__ = (
    "NoAnswer",
    "environment",
    "in_child",
)

_ANSWER_MAX = 2**20

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class NoAnswer(IommufdError):
    """The child took too long. What it has asked others to do may still be done."""


def environment(user: User | None) -> dict[str, str]:
    """The environment of a child: nothing of the caller's, and what leads to the user's own daemons, if there is one.

    libvirt's library starts a daemon by itself where none answers. Started from here it would inherit the limits and
    the control group of the caller; LIBVIRT_AUTOSTART=0 keeps it from that.
    """
    common = {"PATH": _PATH, "LC_ALL": "C", "LIBVIRT_AUTOSTART": "0"}
    if user is None:
        return common
    return {
        **common,
        "HOME": user.home,
        "USER": user.name,
        "LOGNAME": user.name,
        "XDG_RUNTIME_DIR": user.runtime_folder,
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={user.runtime_folder}/bus",
    }


def in_child(user: User | None, work: Callable[[], Any], seconds: float, keep: Collection[int] = ()) -> Any:
    """What `work` returns in a child that has become the user; None: in one that stays who we are.

    `keep` are descriptors of ours that it may use; it has no other. What it returns must be good for JSON. An
    IommufdError that it raises is raised here; so is one where the child ends without an answer, and NoAnswer where it
    takes longer than `seconds`. The child has ended when this returns or raises.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        _serve(user, work, writer, keep)
    os.close(writer)
    try:
        text = _read(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        # It has said all that it will say, or all that we wait for.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if text is None:
        raise NoAnswer(f"{_who(user)} got no answer within {seconds:.0f} seconds, and has given up waiting.")
    return _judge(user, text)


def _who(user: User | None) -> str:
    return f"The process that asks libvirt as {'root' if user is None else f'user {user.name}'}"


def _read(reader: int, deadline: float) -> bytes | None:
    """All that comes out of a pipe until its other end is closed; None once the time has run out."""
    text = b""
    while len(text) <= _ANSWER_MAX:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return None
        more = os.read(reader, 65536)
        if not more:
            break
        text += more
    return text


def _judge(user: User | None, text: bytes) -> Any:
    """The value in an answer. Raises the error that is in it, or IommufdError where it is no answer."""
    try:
        answer = json.loads(text)
        if "value" in answer:
            return answer["value"]
        kind, message = (str(each) for each in answer["error"])
    except (ValueError, TypeError, KeyError) as exc:
        raise IommufdError(f"{_who(user)} has ended without an answer.") from exc
    errors = {each.__name__: each for each in IommufdError.__subclasses__()}
    raise errors.get(kind, IommufdError)(printable(message.encode("utf-8", "surrogateescape")))


def _serve(user: User | None, work: Callable[[], Any], writer: int, keep: Collection[int]) -> NoReturn:
    """The child's whole life. Nothing that is the parent's is cleaned up, flushed or run here."""
    code = 1
    try:
        answer = memoryview(_answer(user, work, {writer, *keep}))
        while answer:
            answer = answer[os.write(writer, answer) :]
        code = 0
    finally:
        os._exit(code)


def _answer(user: User | None, work: Callable[[], Any], keep: Collection[int]) -> bytes:
    try:
        _close_all_but(keep)
        _become(user)
        said = {"value": work()}
    except IommufdError as exc:
        said = {"error": [type(exc).__name__, str(exc)]}
    except Exception as exc:
        said = {"error": ["IommufdError", f"{_who(user)} failed with {type(exc).__name__}: {exc}"]}
    return json.dumps(said).encode("ascii")


def _close_all_but(keep: Collection[int]) -> None:
    """Leaves these descriptors open, and puts /dev/null in the place of the standard ones."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            # The one that the folder was read by is closed already.
            with contextlib.suppress(OSError):
                os.close(fd)


def _become(user: User | None) -> None:
    """Becomes the user, in an environment of the user's. Raises IommufdError."""
    os.environ.clear()
    os.environ.update(environment(user))
    if user is not None and not has_ids(user):
        try:
            become(user)
        except OSError as exc:
            raise IommufdError(
                f"This caller (uid {os.geteuid()}) cannot become user {user.name} ({error_text(exc.errno)}): run the"
                " task as root (become: true)."
            ) from exc
    os.chdir("/")
    os.umask(0o077)
