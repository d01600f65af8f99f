# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what of a plan of the role iommufd_host stays where its verification did not pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..module_utils._errors import IommufdError
from ._host_files import grant_files, unit_with_drop_in
from ._host_info import NONSENSE, nonsense

__all__ = ("host_kept",)

Row = dict[str, Any]


def kept(plan: Mapping[str, Any], applied: Mapping[str, Any], check: Mapping[str, Any]) -> Row:
    """What stays, as the filter's RETURN describes it."""
    wanted = plan["wanted"]
    new = {(each["kind"], each["path"]) for each in applied["recorded"]}
    broken = _not_started(check)
    there = applied["capabilities"]
    capabilities = [
        path
        for path in wanted["capabilities"]
        # What others have granted is not ours to keep or to take.
        if path not in broken and there[path]["ours"] and ("capability", there[path]["real_path"]) not in new
    ]
    of_grants = plan["files_of_grants"]
    gone = {path for path in of_grants if ("file", path) in new or unit_with_drop_in(path) in broken}
    gone.update(row["path"] for row in grant_files({}))
    before = {each["path"]: each["before"] for each in applied["made"] if each["path"] in of_grants}
    files = [_as_before(row, before.get(row["path"])) for row in wanted["files"] if row["path"] not in gone]
    if capabilities:
        files += grant_files({path: there[path]["real_path"] for path in capabilities})
    return {**wanted, "files": files, "capabilities": capabilities, "units": wanted["units"] if capabilities else []}


def _not_started(check: Mapping[str, Any]) -> set[str]:
    """The emulators and units that are there and cannot be started: their grant may be why, so it does harm.

    One that runs without its grant is none: what was proven before may be in force again once the cause is gone.
    """
    # A module that has failed may have come to none.
    tried = [(each["path"], each["present"], each["started"]) for each in check.get("emulators", [])]
    tried += [(each["name"], each["present"], each["replica"]) for each in check.get("units", [])]
    return {name for name, present, each in tried if present and each["ok"] is False and each["effective"] is None}


def _as_before(row: Row, content: str | None) -> Row:
    """A file as it was before the run. One that the run did not write, or that held no text, stays as it is."""
    return row if content is None else {**row, "content": content}


def host_kept(plan: Any, applied: Any, check: Any) -> Row:
    """What stays, as the filter _host_kept returns it. Raises IommufdError where it is not given what it takes."""
    if not all(isinstance(each, Mapping) for each in (plan, applied, check)):
        raise IommufdError("It takes a plan of _host_plan, and what the two modules of its options returned.")
    try:
        return kept(plan, applied, check)
    except NONSENSE as exc:
        raise nonsense(exc) from exc
