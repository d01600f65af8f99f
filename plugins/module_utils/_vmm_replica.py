# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: starts a service like a unit, to see with which capabilities and limits it runs.

See _vmm_trial for what is a verdict, and for what ends whatever is started.
"""

from __future__ import annotations

import contextlib
import os

from ._child import Interrupted
from ._errors import CommandFailed, IommufdError
from ._named_target import UnitTarget
from ._systemd import Run, read_journal, run_service, show_units, tell_systemd
from ._target import hold_target
from ._vmm_look import REPLICA, Unit, has_ipc_lock, is_qemu, unit_obstacles
from ._vmm_trial import IDLE_QEMU, PATIENCE, ProcessSeen, ended_by_itself, one_line, see_in_child

__all__ = ("start_replica",)

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


def start_replica(run: Run, unit: Unit) -> ProcessSeen:
    """Starts a transient service that runs as the unit would, and looks at its process.

    An emulator of QEMU is started as such, without a machine. Of any other program it is not known how to start it
    without consequences, so sleep(1) takes its place. Raises Interrupted where its process has ended, or was changed,
    or systemd does not start it, and IommufdError where it is root's and has failed by itself.
    """
    if unit.program is None:
        raise IommufdError(f"{unit.name} starts no program.")
    name = f"{REPLICA}-{os.getpid()}-{os.urandom(4).hex()}.service"
    command = [unit.program.path, *IDLE_QEMU] if is_qemu(unit.program) else ["sleep", str(2 * PATIENCE)]
    try:
        try:
            run_service(run, name, command, replica_properties(unit), "--no-ask-password", "--service-type=exec")
        except IommufdError as exc:
            said = exc.said if isinstance(exc, CommandFailed) else str(exc)
            raise _ended(run, name, unit, f"systemd does not start a service like {unit.name}", said) from exc
        try:
            seen = see_in_child(hold_target(UnitTarget(name, run)))
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
    return ended_by_itself(failed and unit.user == "root", f"{what}: {_why(run, name, errors)}")


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
    found += [f"TimeoutStartSec={PATIENCE // 2}", "KillSignal=SIGKILL"]
    # If nobody is left to stop it.
    return [*found, f"RuntimeMaxSec={PATIENCE}"]


def _why(run: Run, name: str, errors: str) -> str:
    """What the journal says of a service that did not start, or else systemd-run."""
    lines = read_journal(run, name)
    failed = [line for line in lines if line.startswith("Failed at step")]
    return one_line(os.fsencode(" ".join(failed or lines) or errors))
