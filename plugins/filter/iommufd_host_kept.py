# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter iommufd_host_kept: what of a plan of the role iommufd_host stays where its verification did not pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.virt.iommufd.plugins.plugin_utils._host_files import grant_files

DOCUMENTATION = r"""
name: iommufd_host_kept
short_description: Tell what the role iommufd_host leaves in force where its verification does not pass
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Tells what the role C(virt.iommufd.iommufd_host) wants a second time, so that all else is put back, where the host
    did not pass its verification. It touches nothing.
  - Where something is not as it should be, all grants go. Where that is only not known, those go that the same run has
    made, and what was in force before stays, because a user of the host can see to it that nothing is known.
options:
  _input:
    description: The plan, as P(virt.iommufd.iommufd_host_plan#filter) returned it.
    type: dict
    required: true
  applied:
    description: What M(virt.iommufd.iommufd_host_apply) returned for the plan.
    type: dict
    required: true
  failed:
    description: Whether something is known not to be as it should be.
    type: bool
    required: true
seealso:
  - plugin: virt.iommufd.iommufd_host_result
    plugin_type: filter
    description: Tells what has failed, and what is not known.
"""

EXAMPLES = r"""
- name: Report which files stay
  ansible.builtin.debug:
    msg: "{{ (plan | virt.iommufd.iommufd_host_kept(applied=applied, failed=false)).files | map(attribute='path') }}"
"""

RETURN = r"""
_value:
  description:
    - What stays, in the form of RV(virt.iommufd.iommufd_host_plan#filter:_value.wanted).
    - Files of grants that stay hold what they held before the run.
  type: dict
"""

Row = dict[str, Any]


def kept(plan: Mapping[str, Any], applied: Mapping[str, Any], failed: bool) -> Row:
    """What stays, as RETURN describes it."""
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


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> Mapping[str, Callable[..., Row]]:
        return {"iommufd_host_kept": iommufd_host_kept}


def iommufd_host_kept(plan: Any, applied: Any, failed: Any) -> Row:
    """The filter. Raises AnsibleFilterError where it is not given what it takes."""
    if not isinstance(plan, Mapping) or not isinstance(applied, Mapping) or not isinstance(failed, bool):
        raise AnsibleFilterError(
            "iommufd_host_kept takes a plan of iommufd_host_plan, what iommufd_host_apply returned for it, and failed."
        )
    try:
        return kept(plan, applied, failed)
    except KeyError as exc:
        raise AnsibleFilterError(f"iommufd_host_kept: there is no {exc} in its input.") from exc
