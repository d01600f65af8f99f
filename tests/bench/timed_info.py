# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module iommufd_info as Ansible does, for its processes and users, and takes the time of all that it does.

Prints the module's answer, and the seconds, without those for Python's imports and the answer's text, as errors.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from ansible.module_utils import basic
from ansible_collections.virt.iommufd.plugins.modules import iommufd_info


def main() -> None:
    run = iommufd_info.run

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        run(*arguments)
        print(time.perf_counter() - began, file=sys.stderr)

    vars(iommufd_info)["run"] = timed
    options = {"gather_subset": ["processes", "users"]}
    basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": options}).encode()
    basic._ANSIBLE_PROFILE = "legacy"
    iommufd_info.main()


if __name__ == "__main__":
    main()
