# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: starts the libvirt daemon of a user, for whom nobody has done that yet.

It runs in a child that has become the user, and returns what JSON can hold.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from typing import Any

from ._command import run_command
from ._domain_start import DAEMONS, NoDaemon, connected
from ._errors import IommufdError
from ._foreign import or_none, text
from ._systemd import run_service, show_units, tell_systemd

__all__ = (
    "start_daemon",
    "unit_from_json",
)

_FOLDERS = "/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin"
# As libvirt's library starts one itself: it ends two minutes after the last client and the last domain.
_IDLE = "--timeout=120"
_PATIENCE = 30
_ATTEMPTS = 4
_PAUSE = 2.0


def start_daemon(uri: str, user: str) -> str | None:
    """Has the service manager of the user, who we are here, start libvirt's daemon; the name of its unit.

    A unit that the user has is taken: virtqemud's or libvirtd's, the socket before the service. Otherwise the daemon
    becomes a transient service. None: meanwhile it was started by somebody else. Raises NoDaemon.
    """
    if not os.path.exists(f"{os.environ['XDG_RUNTIME_DIR']}/systemd/private"):
        raise NoDaemon(
            f"User {user} has no service manager running that could start libvirt: let it run at all times (`loginctl"
            f" enable-linger {user}`), or have the user logged in."
        )
    unit = None
    for attempt in range(_ATTEMPTS):
        try:
            unit = _start_unit(user)
            break
        except NoDaemon:
            raise
        except IommufdError as exc:
            # What was there of a transient service when it was looked for may be gone, and the other way round.
            if attempt == _ATTEMPTS - 1:
                raise NoDaemon(f"libvirt's daemon could not be had started: {exc}") from exc
        time.sleep(_PAUSE)
        with contextlib.suppress(NoDaemon), connected(uri):
            return None
    # A unit that is no socket may say that it is started before it listens.
    deadline = time.monotonic() + _PATIENCE
    said = ""
    while True:
        try:
            with connected(uri):
                return unit
        except NoDaemon as exc:
            said = str(exc)
        if time.monotonic() > deadline:
            raise NoDaemon(f"The service manager of user {user} has started {unit}, but {said}")
        time.sleep(0.2)


def _start_unit(user: str) -> str:
    """Has the service manager start libvirt's daemon; the name of the unit. Raises IommufdError."""
    units = [f"{daemon}.{kind}" for daemon in DAEMONS for kind in ("socket", "service")]
    for each in show_units(_run_as_user, units, ("Id", "LoadState"), user=True):
        # It may be a transient service that we made. The service manager keeps it, and its name is not free, while
        # there are processes in its control group: emulators and virtlogd outlive the daemon.
        if each.get("LoadState") == "loaded":
            tell_systemd(_run_as_user, "start", each["Id"], user=True)
            return each["Id"]
    return _run_daemon(user)


def _run_daemon(user: str) -> str:
    """Has the service manager run the daemon as a transient service; the service's name. Raises IommufdError."""
    for daemon in DAEMONS:
        program = shutil.which(daemon, path=_FOLDERS)
        if program is not None:
            unit = f"{daemon}.service"
            # The emulators and virtlogd are in its control group, and have to outlive it.
            properties = ["KillMode=process", f"Description=libvirt of user {user}"]
            options = ["--collect", "--service-type=notify"]
            run_service(_run_as_user, unit, [program, _IDLE], properties, *options, user=True)
            return unit
    raise NoDaemon(f"This host has no libvirt daemon that drives QEMU: there is no {' and no '.join(DAEMONS)}.")


def _run_as_user(words: list[str]) -> tuple[int, str, str]:
    """Runs a command that speaks to the user's service manager."""
    return run_command(words, variables=dict(os.environ))


def unit_from_json(given: Any) -> str | None:
    """What `start_daemon` has returned, in a child that may have returned something else. Raises IommufdError."""
    try:
        return or_none(text)(given)
    except IommufdError as exc:
        raise IommufdError(f"Which unit was started cannot be read: it {exc}.") from exc
