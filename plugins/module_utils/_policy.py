# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: SELinux's policy for libvirt's VMs, and the role's own module of that policy.

The module is what its file says: where there is none, there is to be no module.
"""

from __future__ import annotations

import os
import re
import shutil
from typing import NamedTuple

from ._device import DEVICE
from ._errors import HostLacks, IommufdError, error_text
from ._selinux import is_enabled
from ._states import matching_nodes
from ._systemd import Run, must_run

__all__ = (
    "CONTAINER",
    "NO_NODE",
    "POLICY_FILE",
    "SEMODULE",
    "VFIO_DEVICE",
    "VmPolicy",
    "follow_policy_file",
    "is_loaded",
    "look_at_policy",
)

# semodule names a module as its file, and may read this one: the policy confines it, too.
POLICY_FILE = "/usr/local/share/iommufd_host.cil"
_MODULE = "iommufd_host"
# That of what an administrator adds.
_PRIORITY = "400"

SEMODULE = "semodule"

# What comes before it in a context: user, role and type.
_LEVEL = 3

VFIO_DEVICE = "/dev/vfio/devices/vfio0"
CONTAINER = "/dev/vfio/vfio"
# What no policy has a rule of its own for.
NO_NODE = "/dev/iommufd_host-no-such-node"
_NODES = (DEVICE, "/dev/vfio/devices/*")

_CONFIG = "/etc/selinux/config"
_CONTEXTS = "/etc/selinux/{}/contexts/virtual_domain_context"


class VmPolicy(NamedTuple):
    """What SELinux's policy has for the VMs of the system libvirt.

    `contexts` are those that libvirt may run them in, none where it knows none. `labels` are those that the policy
    wants for the nodes above; `sysfs` is that of sysfs. `msg`: why there are none of these.
    """

    contexts: list[str]
    labels: dict[str, str]
    sysfs: str
    msg: str = ""


def look_at_policy(run: Run) -> VmPolicy | None:
    """None where there is no SELinux. Nothing is changed."""
    if not is_enabled():
        return None
    contexts: list[str] = []
    try:
        contexts += _contexts()
        if contexts and not shutil.which(SEMODULE):
            raise HostLacks(f"There is no {SEMODULE}, which adds to SELinux's policy.")
        labels = {path: _label(run, path) for path in (DEVICE, VFIO_DEVICE, CONTAINER, NO_NODE)} if contexts else {}
        return VmPolicy(contexts, labels, os.getxattr("/sys", "security.selinux").rstrip(b"\0").decode("ascii"))
    except IommufdError as exc:
        return VmPolicy(contexts, {}, "", str(exc))
    except (OSError, UnicodeDecodeError) as exc:
        why = error_text(exc.errno) if isinstance(exc, OSError) else str(exc)
        return VmPolicy(contexts, {}, "", f"SELinux's policy for libvirt's VMs cannot be read ({why}).")


def _contexts() -> list[str]:
    """Where libvirt itself finds them. Raises OSError."""
    with open(_CONFIG, encoding="ascii") as stream:
        kind = re.search(r"^SELINUXTYPE=([A-Za-z0-9_-]+)\s*$", stream.read(), re.MULTILINE)
    if kind is None:
        return []
    try:
        with open(_CONTEXTS.format(kind[1]), encoding="ascii") as stream:
            return re.findall(r"^\w+:\w+:\w+(?::\S+)?$", stream.read(), re.MULTILINE | re.ASCII)
    except FileNotFoundError:
        return []


def _label(run: Run, path: str) -> str:
    """What the policy wants for a character device of that path, whether it is there or not. Raises IommufdError."""
    return must_run(run, "matchpathcon", "-n", "-m", "chr_file", path).strip()


def is_loaded(run: Run) -> bool:
    """Whether the policy has our module. Raises IommufdError."""
    if not shutil.which(SEMODULE):
        return False
    lines = must_run(run, SEMODULE, "--list-modules=full").splitlines()
    return any(line.split()[:2] == [_PRIORITY, _MODULE] for line in lines)


def follow_policy_file(run: Run) -> None:
    """Adds the module to the policy, or removes it, as its file is there or not. Raises IommufdError."""
    if os.path.exists(POLICY_FILE):
        must_run(run, SEMODULE, f"--priority={_PRIORITY}", f"--install={POLICY_FILE}")
    elif is_loaded(run):
        must_run(run, SEMODULE, f"--priority={_PRIORITY}", f"--remove={_MODULE}")
    nodes = [path for each in _NODES for path in matching_nodes(each) if _is_nobodys(path)] if is_enabled() else []
    if nodes:
        must_run(run, "restorecon", *nodes)


def _is_nobodys(node: str) -> bool:
    """Whether its label is for all: what libvirt has labelled for a VM that runs has the VM's categories."""
    try:
        return os.getxattr(node, "security.selinux").count(b":") <= _LEVEL
    except OSError:
        return False
