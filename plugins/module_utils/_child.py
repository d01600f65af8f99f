# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: children, and the only place where somebody is waited for.

What may hang or be hostile is done in a child: to speak for another user, to close a borrowed descriptor, to run a
command. Nobody is waited for beyond a deadline. A child in uninterruptible sleep, as on a dead mount, does not even end
when it is killed; it is left behind, to whoever inherits it.

What a child answers is JSON of a limited size. That of one that has become a user is not to be believed further than
the user is, and whoever reads it checks what it holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Collection, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Callable

from ._errors import HostLacks, IommufdError, error_text
from ._syscalls import PR_SET_PDEATHSIG, leave_keyring, prctl

if TYPE_CHECKING:
    from ._user import User

__all__ = (
    "Interrupted",
    "NoAnswer",
    "ask_child",
    "close_all_but",
    "end",
    "end_with",
    "environment",
    "in_child",
    "insist",
    "is_child",
    "isolate",
    "spawn",
)

# How long one answer may be.
_ANSWER_MAX = 2**20

# What a process takes at most to end after it was killed, in seconds, unless it cannot.
_ENDING = 2.0

# How often something that was only interrupted is tried.
_ATTEMPTS = 3

# What a child that is another user's may take of memory: libvirt's library needs a tenth of it.
_MEMORY_MAX = 2**31

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Whether this process is one of those that answer.
_is_child = False


class NoAnswer(IommufdError):
    """The child took too long. What it has asked others to do may still be done."""


class Interrupted(IommufdError):
    """Nothing is known: the user that the child had become may have ended it, or have had it fail."""


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


def is_child() -> bool:
    """Whether this process is a child that answers."""
    return _is_child


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, until it becomes another user. Raises OSError."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It has ended already.
        os.kill(os.getpid(), signal.SIGKILL)


def isolate() -> None:
    """Takes this process out of its caller's session: no terminal, no keys. Raises OSError.

    With the caller's terminal, another user could type into it (TIOCSTI); with the session keyring, use root's keys.
    """
    os.setsid()
    leave_keyring()


def spawn(live: Callable[[], object]) -> int:
    """Makes a child whose whole life `live` is, and gives its id. It is to be buried.

    Nothing that is ours is cleaned up, flushed or run in it.
    """
    pid = os.fork()
    if not pid:
        code = 1
        try:
            live()
            code = 0
        finally:
            # What is open is closed only now, which may take for ever. Nobody waits for that.
            os._exit(code)
    return pid


def bury(pid: int, seconds: float) -> int | None:
    """The exit status of a child as waitpid(2) has it, once it has ended; None where it has not after so long."""
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def end(pid: int) -> int | None:
    """Kills a child and all that is in its session, and buries it; None where it cannot even be killed."""
    for kill in (os.killpg, os.kill):
        # It may not have got as far as to a session of its own.
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    return bury(pid, _ENDING)


def insist(act: Callable[[], Any]) -> Any:
    """What `act` returns; it is done again where it was only interrupted. Raises Interrupted where it always is."""
    for _attempt in range(_ATTEMPTS - 1):
        with contextlib.suppress(Interrupted):
            return act()
    return act()


def in_child(user: User | None, work: Callable[[], Any], seconds: float, keep: Collection[int] = ()) -> Any:
    """What `work` returns in a child that has become the user; None: in one that stays who we are.

    `keep` are descriptors of ours that it may use; it has no other. What it returns must be good for JSON. An
    IommufdError that it raises is raised here; so is one where the child fails otherwise or ends without an answer,
    Interrupted where a signal ended it or it was not root's, NoAnswer where it takes longer than `seconds`, and
    HostLacks where there can be no more processes. Nothing that it has started in its session goes on; the child itself
    only if nothing can end it.
    """

    def once() -> Iterator[Any]:
        yield work()

    with contextlib.closing(ask_child(user, once, seconds, keep)) as said:
        for each in said:
            return each
    raise _unheard(user, "has ended without an answer.")


def ask_child(
    user: User | None, work: Callable[[], Iterator[Any]], seconds: float, keep: Collection[int] = ()
) -> Generator[Any, None, None]:
    """What `work` yields in a child, one after the other, as `in_child` does it; `seconds` is for each of them."""
    reader, writer = os.pipe()
    # This is the process that looks at what is another user's, or speaks for that user. It is root's as we are, or has
    # become that user, so that what it meets can do to it what the user can do anyway, and nothing to us. It lives
    # until it has answered, or until we have waited long enough.
    try:
        pid = spawn(partial(_serve, os.getpid(), user, work, writer, keep))
    except OSError as exc:
        os.close(reader)
        raise HostLacks(
            f"No process can be started here ({error_text(exc.errno)}): see who has so many (ps -eo user= | sort | uniq"
            " -c), and what the limits are."
        ) from exc
    finally:
        os.close(writer)
    status: int | None = None
    try:
        for text in _lines(user, reader, seconds):
            yield _judge(user, text)
        # It is about to end by itself, and how it does tells whether it was ended.
        status = bury(pid, _ENDING)
        if status is not None and os.WIFSIGNALED(status):
            raise Interrupted(f"{_who(user)} was ended by signal {os.WTERMSIG(status)}, before it could answer.")
    finally:
        os.close(reader)
        if status is None:
            # It has said all that it will say, or all that we wait for.
            end(pid)


def _who(user: User | None) -> str:
    return f"The process that does this as {'root' if user is None else f'user {user.name}'}"


def _unheard(user: User | None, what: str) -> IommufdError:
    """How it is to be told that a child has not done its work. Its user may have lowered its limits, or ended it."""
    return (IommufdError if user is None or user.uid == 0 else Interrupted)(f"{_who(user)} {what}")


def _lines(user: User | None, reader: int, seconds: float) -> Iterator[bytes]:
    """The lines that come out of a pipe, until its other end is closed. Raises NoAnswer for one that takes too long."""
    deadline = time.monotonic() + seconds
    text = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            raise NoAnswer(f"{_who(user)} got no answer within {seconds:.0f} seconds, and has given up waiting.")
        more = os.read(reader, 65536)
        if not more:
            return
        *lines, text = (text + more).split(b"\n")
        for line in lines:
            yield line
            deadline = time.monotonic() + seconds
        if len(text) > _ANSWER_MAX:
            raise _unheard(user, "has ended without an answer: what it says has no end.")


def _judge(user: User | None, text: bytes) -> Any:
    """The value in an answer. Raises the error that is in it, or IommufdError where it is no answer."""
    try:
        answer = json.loads(text) if user is None else _parse_foreign(text)
        if "value" in answer:
            return answer["value"]
        kind, message = (str(each) for each in answer["error"])
    except (IommufdError, ValueError, TypeError, KeyError) as exc:
        raise _unheard(user, "has ended without an answer.") from exc
    # Those that take more than a text do not come from a child.
    errors = {each.__name__: each for each in IommufdError.__subclasses__() if "__init__" not in vars(each)}
    from ._foreign import shown_text

    raise errors.get(kind, IommufdError)(shown_text(message))


def _parse_foreign(text: bytes) -> Any:
    """What a child says that has become a user. It is not to be believed to be JSON of ours."""
    # A query has no such child, and to import this costs each of them.
    from ._foreign import parse_answer

    return parse_answer(text)


def _serve(
    parent: int, user: User | None, work: Callable[[], Iterator[Any]], writer: int, keep: Collection[int]
) -> None:
    """The whole life of a child that answers."""
    for answer in _answers(parent, user, work, {writer, *keep}):
        left = memoryview(json.dumps(answer).encode("ascii") + b"\n")
        while left:
            left = left[os.write(writer, left) :]


def _answers(
    parent: int, user: User | None, work: Callable[[], Iterator[Any]], keep: Collection[int]
) -> Iterator[dict[str, Any]]:
    global _is_child
    _is_child = True
    try:
        # The next run shall not find anything that this one still changes.
        end_with(parent)
        isolate()
        close_all_but(keep)
        _enter(user)
        for each in work():
            yield {"value": each}
    except IommufdError as exc:
        yield {"error": [type(exc).__name__, str(exc)]}
    except Exception as exc:
        error = _unheard(user, f"failed with {type(exc).__name__}: {exc}")
        yield {"error": [type(error).__name__, str(error)]}


def close_all_but(keep: Collection[int]) -> None:
    """Leaves these descriptors open, and puts /dev/null in the place of the standard ones."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            # The one that the folder was read by is closed already.
            with contextlib.suppress(OSError):
                os.close(fd)


def _enter(user: User | None) -> None:
    """Becomes the user, in an environment of the user's. Raises IommufdError."""
    os.environ.clear()
    os.environ.update(environment(user))
    if user is not None:
        from ._user import impersonate

        try:
            # What the user answers may make it grow.
            impersonate(user, _MEMORY_MAX)
        except OSError as exc:
            raise IommufdError(
                f"This caller (uid {os.geteuid()}) cannot become user {user.name} ({error_text(exc.errno)}): run the"
                " task as root (become: true)."
            ) from exc
    os.chdir("/")
    os.umask(0o077)
