# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what all filters do around the function that each is made of.

Nothing else here imports the controller's part of Ansible, so that the rest is tested without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ansible.errors import AnsibleFilterError

from ..module_utils._errors import IommufdError

__all__ = ("reporting",)


def reporting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a filter of that name: what is wrong becomes what Ansible reports."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except IommufdError as exc:
            # The text says all. Ansible would add that of each cause.
            raise AnsibleFilterError(f"{name}: {exc}") from None

    return run
