# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter iommufd_host_kept: what of a plan of the role iommufd_host stays where its verification did not pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: iommufd_host_kept
short_description: Tell what the role iommufd_host leaves in force where its verification does not pass
version_added: 0.1.0
author:
  - The virt.iommufd contributors (@virt-iommufd)
description:
  - Tells what the role C(virt.iommufd.iommufd_host) lists for M(virt.iommufd.iommufd_host_record) a second time, so
    that all else is put back, where the host did not pass its verification. It touches nothing.
  - Where something is not as it should be, all grants go. Where that is only not known, those go that the same run has
    made, and what was in force before stays, because a user of the host can see to it that nothing is known.
options:
  _input:
    description: The plan, as P(virt.iommufd.iommufd_host_plan#filter) returned it.
    type: dict
    required: true
  record:
    description: What M(virt.iommufd.iommufd_host_record) returned for the plan, before anything was changed.
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
- name: Ensure that what this run has granted is taken back, and nothing else
  virt.iommufd.iommufd_host_record:
    files: "{{ kept.files }}"
    capabilities: "{{ kept.capabilities }}"
    nodes: "{{ kept.nodes }}"
    blocks: "{{ kept.blocks }}"
    units: "{{ kept.units }}"
  vars:
    kept: "{{ plan | virt.iommufd.iommufd_host_kept(record=record, failed=false) }}"
"""

RETURN = r"""
_value:
  description: What stays. The first five are options of M(virt.iommufd.iommufd_host_record).
  type: dict
  contains:
    files:
      description: Files that stay.
      type: list
      elements: str
    capabilities:
      description: Emulators that keep their file capability.
      type: list
      elements: str
    nodes:
      description: As in the plan; the device nodes are no grant.
      type: list
      elements: str
    blocks:
      description: As in the plan.
      type: list
      elements: str
    units:
      description: The units that give the capability of RV(ignore:capabilities) back after an upgrade.
      type: list
      elements: str
    rewritten:
      description:
        - Those of the files of grants that name emulators, as in the plan, with C(emulators) being
          RV(ignore:capabilities).
      type: list
      elements: dict
    restored:
      description: The other files of grants, with the keys C(path) and C(content), as they were before this run.
      type: list
      elements: dict
"""

Row = dict[str, Any]


def kept(plan: Mapping[str, Any], record: Mapping[str, Any], failed: bool) -> Row:
    """What stays, as RETURN describes it."""
    new = {(each["kind"], each["path"]) for each in record["recorded"]}
    there = record["capabilities"]
    capabilities = [
        path
        for path in plan["capabilities"]
        # What others have granted is not ours to keep or to take.
        if not failed and there[path]["ours"] and ("capability", there[path]["real_path"]) not in new
    ]

    def stays(row: Row) -> bool:
        if not row["grants"]:
            return True
        if _is_of_emulators(row):
            return bool(capabilities)
        return not failed and ("file", row["path"]) not in new

    files = [row for row in plan["files"] if stays(row)]
    grants = [row for row in files if row["grants"]]
    before = {row["path"]: record["files"][row["path"]]["content"] for row in grants if not _is_of_emulators(row)}
    return {
        "files": [row["path"] for row in files],
        "capabilities": capabilities,
        "nodes": plan["nodes"],
        "blocks": plan["blocks"],
        "units": plan["units"] if capabilities else [],
        "rewritten": [{**row, "emulators": capabilities} for row in grants if "emulators" in row],
        "restored": [{"path": path, "content": content} for path, content in before.items() if content is not None],
    }


def _is_of_emulators(row: Row) -> bool:
    """Whether a file is there to give emulators their capability back: all such files stay and go together."""
    return bool(row["grants"]) and "grant" not in row and "raised" not in row


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> Mapping[str, Callable[..., Row]]:
        return {"iommufd_host_kept": iommufd_host_kept}


def iommufd_host_kept(plan: Any, record: Any, failed: Any) -> Row:
    """The filter. Raises AnsibleFilterError where it is not given what it takes."""
    if not isinstance(plan, Mapping) or not isinstance(record, Mapping) or not isinstance(failed, bool):
        raise AnsibleFilterError(
            "iommufd_host_kept takes a plan of iommufd_host_plan, what iommufd_host_record returned for it, and failed."
        )
    try:
        return kept(plan, record, failed)
    except KeyError as exc:
        raise AnsibleFilterError(f"iommufd_host_kept: there is no {exc} in its input.") from exc
