# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: how a module does its work and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, NoReturn

from ._errors import IommufdError

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

__all__ = (
    "Row",
    "finish",
    "memlock_row",
)

# A part of what a module is given or returns.
Row = dict[str, Any]


def finish(module: AnsibleModule, run: Callable[[Row, bool, Row], None]) -> NoReturn:
    """Has `run` do a module's work, and ends the module.

    It is given the options, whether this is check mode, and the return value, which it fills in as it goes: what is in
    there when it fails is told, too. `msg` in there is a failure, as is an IommufdError; `warnings` are shown.
    """
    result: Row = {"changed": False}
    try:
        run(module.params, module.check_mode, result)
    except IommufdError as exc:
        result["msg"] = str(exc)
    for warning in result.pop("warnings", []):
        module.warn(warning)
    if not module._diff:
        result.pop("diff", None)
    if "msg" in result:
        module.fail_json(**result)
    module.exit_json(**result)


def memlock_row(limit: int | None, name: str = "memlock") -> Row:
    """A limit on locked memory in bytes, None for unlimited."""
    return {f"{name}_bytes": limit, f"{name}_unlimited": limit is None}
