# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lookup iommufd_host_grant: where on the controller the program iommufd-host-grant is, to be copied to a host."""

from __future__ import annotations

DOCUMENTATION = r"""
name: iommufd_host_grant
short_description: Make the program iommufd-host-grant, and return where it is
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - C(iommufd-host-grant) gives CAP_IPC_LOCK as a file capability to executables, given by their paths, that have lost
    it to an upgrade of their package. A unit of the role C(virt.iommufd.iommufd_host) runs it, and that role installs
    it.
  - It adds the capability only to a file without any or with the host's own. One with capabilities for a user namespace
    is left and reported; so is one that somebody else than root can write, or a folder or link on the way to it.
  - The lookup packs it on the controller, into a file that is gone once Ansible ends, and returns the path of that. The
    file's content depends on nothing but the version of this collection, so a copy of it changes a host only once.
options:
  _terms:
    description: It takes none.
seealso:
  - module: virt.iommufd.iommufd_host_record
    description: Grants the capability at first, and takes it back.
"""

EXAMPLES = r"""
- name: Ensure that emulators can be given their capability again
  ansible.builtin.copy:
    src: "{{ lookup('virt.iommufd.iommufd_host_grant') }}"
    dest: /usr/local/libexec/iommufd-host-grant
    owner: root
    group: root
    mode: "0755"
    # That it runs on this host.
    validate: /usr/bin/python3 -IS %s --help
"""

RETURN = r"""
_raw:
  description: The path of the file on the controller.
  type: list
  elements: path
"""

from collections.abc import Sequence
from typing import Any

from ansible import constants
from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase
from ansible_collections.virt.iommufd.plugins.plugin_utils._zipapp import GRANT, packed


class LookupModule(LookupBase):
    """What Ansible looks for."""

    def run(self, terms: Sequence[object], variables: object = None, **kwargs: Any) -> list[str]:
        if terms or kwargs:
            raise AnsibleLookupError("The lookup virt.iommufd.iommufd_host_grant takes no terms and no options.")
        # Ansible makes the folder when it starts and removes it when it ends. Types do not know what its configuration
        # holds.
        return [packed(GRANT, vars(constants)["DEFAULT_LOCAL_TMP"])]
