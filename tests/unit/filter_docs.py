# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What filters document, for tests that must not import the controller's part of Ansible, as a filter does."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import yaml

FILTERS = Path(__file__).resolve().parents[2] / "plugins" / "filter"


def documented_fields(name: str) -> dict[str, Any]:
    """The fields of what a filter returns, from its RETURN."""
    tree = ast.parse((FILTERS / f"{name}.py").read_text("utf-8"))
    (text,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RETURN"
    ]
    fields: dict[str, Any] = yaml.safe_load(text)["_value"]["contains"]
    return fields
