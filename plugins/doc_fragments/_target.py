# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    """How a task names the process that a module works on."""

    DOCUMENTATION = r"""
options:
  pid:
    description:
      - The id of the process.
      - Exactly one of O(pid), O(pidfile), O(domain), O(unit) and O(user_unit) is required. Without systemd,
        O(pid), O(pidfile) and O(domain) work.
    type: int
  pidfile:
    description:
      - A file that holds the id of the process, as an absolute path.
      - It must be a regular file, not a symbolic link, of 64 bytes at most, written after the process started. If the
        clock was set in between, the module may take a correct file for a stale one.
      - Where a user other than root owns the file, or any folder on the way to it, the process must belong to that
        user. The module refuses what a group or everybody can write, except for folders with the sticky bit, such as
        C(/tmp).
    type: path
  domain:
    description:
      - The name of a running domain of the system libvirt (C(qemu:///system)). The process is its emulator.
      - The module does not ask the libvirt daemon, and so does not wake it. It reads the daemon's record of the domain
        under C(/run/libvirt/qemu). The record must belong to root, and be written after the process started. Where
        systemd-machined made a control group for the domain, the process must be in it.
      - For a domain of a user's session, give O(pidfile) or O(pid).
    type: str
  unit:
    description:
      - The name of a systemd unit of the system, a service or a scope.
      - The process is the unit's main process, if that holds what the module works for. For
        M(virt.iommufd.iommufd_option) that is an iommufd. For M(virt.iommufd.memlock_limit), it may also be VFIO's
        legacy container or a vDPA device.
      - Otherwise, the process is the only one in the unit's control group, or in a group below it, that does. So a VMM
        that a shell, C(systemd-run --scope), C(conmon) or Proxmox has started is found.
      - If several processes do, or one could not be looked at, the module fails and names them. Then give O(pid).
        A process that only keeps a copy of what a VMM uses does not count once the VMM has pinned memory.
      - If no process does, M(virt.iommufd.memlock_limit) works on the main process, or on the only one.
      - The module refuses a slice, which groups units, and a template without an instance. Only where all control
        groups are of version 2, it looks at others than the main process.
    type: str
  user_unit:
    description:
      - The name of a service or a scope of a user's own service manager, and O(user) whose that is. The process is
        found as for O(unit), but no process is known to be the main one.
      - The module does not ask the user's manager, which may say anything. It goes by the control groups, as the
        kernel tells them. Whoever is the user can put any process of the user's manager into the unit, so only
        processes with the user's own real user id count.
    type: str
  user:
    description:
      - The user of O(user_unit), by name or by id.
    type: str
"""
