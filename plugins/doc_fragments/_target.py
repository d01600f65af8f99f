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
      - Exactly one of O(pid), O(pidfile), O(domain) and O(unit) is required.
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
      - The name of a systemd unit of the system. The process is its main process.
      - The module refuses a unit without a main process, such as a scope or a slice, and a template without an
        instance.
    type: str
"""
