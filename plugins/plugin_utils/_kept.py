# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what of a plan of the role iommufd_host stays where its verification did not pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..module_utils._errors import IommufdError
from ._host_files import grant_files

__all__ = ("host_kept",)

Row = dict[str, Any]


def kept(plan: Mapping[str, Any], applied: Mapping[str, Any], failed: bool) -> Row:
    """What stays, as the filter's RETURN describes it."""
    wanted = plan["wanted"]
    new = {(each["kind"], each["path"]) for each in applied["recorded"]}
    there = applied["capabilities"]
    capabilities = [
        path
        for path in wanted["capabilities"]
        # What others have granted is not ours to keep or to take.
        if not failed and there[path]["ours"] and ("capability", there[path]["real_path"]) not in new
    ]
    of_grants = plan["files_of_grants"]
    of_emulators = {row["path"] for row in grant_files({})}
    before = {each["path"]: each["before"] for each in applied["made"] if each["path"] in of_grants}
    files = [
        _as_before(row, before.get(row["path"]))
        for row in wanted["files"]
        if row["path"] not in of_emulators and _stays(row["path"], of_grants, new, failed)
    ]
    if capabilities:
        files += grant_files({path: there[path]["real_path"] for path in capabilities})
    return {**wanted, "files": files, "capabilities": capabilities, "units": wanted["units"] if capabilities else []}


def _stays(path: str, of_grants: Sequence[str], new: set[tuple[str, str]], failed: bool) -> bool:
    """Whether a file stays: what is no grant does, and a grant that is no failure and was there before the run."""
    return path not in of_grants or not (failed or ("file", path) in new)


def _as_before(row: Row, content: str | None) -> Row:
    """A file as it was before the run. One that the run did not write, or that held no text, stays as it is."""
    return row if content is None else {**row, "content": content}


def host_kept(plan: Any, applied: Any, failed: Any) -> Row:
    """What stays, as the filter _host_kept returns it. Raises IommufdError where it is not given what it takes."""
    if not isinstance(plan, Mapping) or not isinstance(applied, Mapping) or not isinstance(failed, bool):
        raise IommufdError("It takes a plan of _host_plan, what iommufd_host_apply returned for it, and failed.")
    try:
        return kept(plan, applied, failed)
    except KeyError as exc:
        raise IommufdError(f"There is no {exc} in its input.") from exc
