# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs a module: in this process by `run`, as a program of its own where the caller must be special.

    python3 run_module.py '{"pid": 4242, "value": "process"}'
    python3 run_module.py '{"gather_subset": ["processes"]}' iommufd_info

prints the answer. It takes no Ansible but its module_utils. Without a name the module is iommufd_option.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from types import ModuleType
from typing import Any

from ansible.module_utils import basic
from ansible.module_utils.common import warnings
from ansible_collections.virt.iommufd.plugins.modules import iommufd_option

Answer = dict[str, Any]
MODULES = "ansible_collections.virt.iommufd.plugins.modules"


def run(module: ModuleType = iommufd_option, /, **options: Any) -> Answer:
    """The module's answer to these options. Whatever it raises beside SystemExit comes through."""
    # Ansible runs one module in a process, and so keeps these for ever.
    warnings._global_warnings.clear()
    basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": options}).encode()
    basic._ANSIBLE_PROFILE = "legacy"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main()
    answer: Answer = json.loads(printed.getvalue())
    # Newer releases of ansible-core tell where a warning comes from, too.
    said = answer.get("warnings", [])
    answer["warnings"] = [each if isinstance(each, str) else each["event"]["msg"] for each in said]
    return answer


if __name__ == "__main__":
    options, *name = sys.argv[1:]
    module = importlib.import_module(f"{MODULES}.{name[0]}") if name else iommufd_option
    print(json.dumps(run(module, **json.loads(options))))
