# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a command says, where it says it and ends between a look for output and the question whether it has ended."""

from __future__ import annotations

import importlib.util
import json
import selectors
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bytecode import RUN_COMMAND, mended


def basic(mend: bool) -> ModuleType:
    """Ansible's module of that name, as it is sent to hosts, mended or not."""
    spec = importlib.util.find_spec("ansible.module_utils.basic")
    assert spec
    assert spec.origin
    source = Path(spec.origin).read_bytes()
    assert all(source.count(wrong) == 1 for wrong, _right in RUN_COMMAND)
    module = importlib.util.module_from_spec(spec)
    exec(compile(mended(spec.origin, source) if mend else source, spec.origin, "exec", dont_inherit=True), vars(module))
    return module


@pytest.mark.parametrize("mend", [False, True])
def test_what_a_command_says(mend: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = basic(mend)
    go = tmp_path / "go"
    looks: list[float] = []

    class Late(selectors.PollSelector):
        """Finds nothing at first. Before it is asked again, the command writes and ends."""

        def select(self, timeout: float | None = None) -> Any:
            looks.append(time.monotonic())
            if len(looks) > 1:
                return super().select(timeout)
            go.touch()
            time.sleep(1)
            return []

    monkeypatch.setattr(selectors, "PollSelector", Late)
    monkeypatch.setattr(module, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": {}}).encode())
    monkeypatch.setattr(module, "_ANSIBLE_PROFILE", "legacy", raising=False)
    asked = module.AnsibleModule(argument_spec={})
    code, said, _errors = asked.run_command(["sh", "-c", f"until [ -e {go} ]; do sleep 0.05; done; echo here"])
    assert (code, said) == (0, "here\n" if mend else "")
