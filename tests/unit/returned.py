# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Holds what a module returned against its RETURN."""

from __future__ import annotations

from typing import Any

_KINDS: dict[str, type] = {"dict": dict, "list": list, "str": str, "int": int, "bool": bool}


def check_returned(documented: dict[str, Any], value: Any, path: str, *, null_is_told: bool = True) -> None:
    """Fails where a value is not as RETURN says: its keys, all of them and no others, types, and where it is null."""
    rows: list[dict[str, Any]] = value if isinstance(value, list) else [value]
    if value is None:
        text = documented["description"]
        assert not null_is_told or "V(null)" in (text if isinstance(text, str) else " ".join(text)), path
        return
    # A boolean is an integer, to Python.
    assert isinstance(value, _KINDS[documented["type"]]), path
    assert isinstance(value, bool) == (documented["type"] == "bool"), path
    if "contains" not in documented:
        return
    for each in rows:
        assert set(each) == set(documented["contains"]), path
        for key, inner in documented["contains"].items():
            check_returned(inner, each[key], f"{path}.{key}", null_is_told=null_is_told)
