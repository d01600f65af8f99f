# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lookup iommufd_exec: where on the controller the launcher iommufd-exec is, to be copied to a host."""

from __future__ import annotations

DOCUMENTATION = r"""
name: iommufd_exec
short_description: Make the launcher iommufd-exec, and return its path
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - C(iommufd-exec) opens an iommufd and sets it, so that the kernel charges what is pinned through it to the process
    alone. With C(--device) it opens VFIO devices, too. Then it gives up root, and becomes the VMM of its command line,
    which gets the descriptors. It is for hosts where a systemd unit starts a VMM without libvirt.
  - The lookup packs it into a file on the controller, and returns the path of the file. Ansible removes the file when
    it ends. The content depends only on the version of this collection, so a copy of it changes a host only once.
  - The role C(virt.iommufd.iommufd_host) installs it with C(iommufd_host_launcher).
options:
  _terms:
    description: It takes none.
seealso:
  - module: virt.iommufd.iommufd_option
    description: Sets the mode of an iommufd that a running process has.
"""

EXAMPLES = r"""
- name: Install iommufd-exec
  ansible.builtin.copy:
    src: "{{ lookup('virt.iommufd.iommufd_exec') }}"
    dest: /usr/local/bin/iommufd-exec
    owner: root
    group: root
    mode: "0755"
    # Make sure that it runs on this host.
    validate: /usr/bin/python3 -IS %s --help
"""

RETURN = r"""
_raw:
  description: The path of the file on the controller.
  type: list
  elements: path
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

from ..module_utils._programs import EXEC, zipapp


class LookupModule(LookupBase):
    """What Ansible looks for."""

    def run(self, terms: Sequence[object], variables: object = None, **kwargs: Any) -> list[str]:
        if terms or kwargs:
            raise AnsibleLookupError("The lookup virt.iommufd.iommufd_exec takes no terms and no options.")
        # Ansible makes the folder when it starts and removes it when it ends. Types do not know what its configuration
        # holds.
        return [packed(EXEC, vars(constants)["DEFAULT_LOCAL_TMP"])]


def packed(name: str, folder: str) -> str:
    """Puts the program's file into a folder, unless it is there already, and gives the path of it."""
    content = zipapp(name)
    path = Path(folder, f"{name}-{hashlib.sha256(content).hexdigest()[:16]}")
    if not path.exists():
        # Others may look it up at the same time.
        descriptor, scratch = tempfile.mkstemp(dir=path.parent)
        with open(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(scratch, 0o700)
        os.replace(scratch, path)
    return str(path)
