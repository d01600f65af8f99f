# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Texts that others choose, such as the names of VMs, on their way through playbook and role to the terminal.

The modules are stubs that answer with such texts in each field; everything on the controller is real. It runs with
each ansible-core that the collection supports, since each has its own rules for what is a template.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answers import ARITHMETIC, DROP_IN, HARMLESS, UNIT, Texts, answers

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 300

# What the role would ask this machine for, with Ansible's own module.
FACTS = {"architecture": "x86_64", "os_family": "Debian", "apparmor": {"status": "enabled"}}

# What changes the host beside the collection's own. The others do nothing in check mode, but for what they do on the
# controller.
OF_ANSIBLE = ("systemd_service",)


class Controller:
    """A place where Ansible finds the collection with stubs in the place of its modules, and runs."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.mark = place / "mark"
        self.texts = Texts(self.mark)
        self.given: dict[str, Any] = {}
        self._answers = place / "answers.json"
        self._asked = place / "answers.json.asked"
        collection = place / "ansible_collections" / "virt" / "iommufd"
        for folder in ("meta", "plugins", "roles", "playbooks"):
            shutil.copytree(ROOT / folder, collection / folder, ignore=shutil.ignore_patterns("__pycache__"))
        modules = collection / "plugins" / "modules"
        for path in modules.glob("iommufd_*.py"):
            self._stub(path)
        for name in OF_ANSIBLE:
            self._stub(modules / f"{name}.py")
        for path in (collection / "roles").glob("*/tasks/*.yml"):
            text = path.read_text(encoding="utf-8")
            stubbed = re.sub(rf"\bansible\.builtin\.({'|'.join(OF_ANSIBLE)}):", r"virt.iommufd.\1:", text)
            path.write_text(stubbed, encoding="utf-8")

    def _stub(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "#!/usr/bin/python\n" + (Path(__file__).parent / "stub.py").read_text(encoding="utf-8")
        path.write_text(text.replace("@NAME@", path.stem).replace("@ANSWERS@", str(self._answers)), encoding="utf-8")

    def run(self, playbook: str, variables: dict[str, Any], *more: str, yaml: bool = False, **given: Any) -> str:
        """What Ansible prints, with an exit code 0 unless the playbook is to fail; `given` is for the answers."""
        fails = given.pop("fails", False)
        self.given = answers(self.texts, **given)
        self._answers.write_text(json.dumps(self.given), encoding="utf-8")
        self._asked.unlink(missing_ok=True)
        extra = self.place / "variables.json"
        extra.write_text(json.dumps(variables), encoding="utf-8")
        environment = {
            **{key: os.environ[key] for key in ("PATH", "LANG", "TMPDIR") if key in os.environ},
            "HOME": str(self.place),
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self.place),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_NOCOLOR": "true",
            "ANSIBLE_PIPELINING": "true",
            **({"ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml"} if yaml else {}),
        }
        ansible = str(Path(sys.executable).parent / "ansible-playbook")
        inventory = f"localhost ansible_connection=local ansible_python_interpreter={sys.executable}\n"
        (self.place / "inventory").write_text(inventory, encoding="utf-8")
        done = subprocess.run(
            [ansible, "-i", str(self.place / "inventory"), "-e", f"@{extra}", *more, playbook],
            env=environment,
            cwd=self.place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            check=False,
        )
        printed = done.stdout.decode("utf-8", "surrogateescape")
        assert bool(done.returncode) == fails, printed
        return printed

    def role(self, *variables: dict[str, Any], **given: Any) -> str:
        """The same of a playbook with the role, in check mode, once for each set of variables."""
        playbook = self.place / "role.yml"
        task = {"ansible.builtin.set_fact": {**FACTS, "cacheable": True}}
        role = {"ansible.builtin.include_role": {"name": "virt.iommufd.iommufd_host"}}
        play = {"hosts": "localhost", "gather_facts": False, "tasks": [task, role]}
        playbook.write_text(json.dumps([{**play, "vars": each} for each in variables]), encoding="utf-8")
        return self.run(str(playbook), {}, "--check", "--diff", **given)

    def asked(self, module: str) -> list[dict[str, Any]]:
        """The options of each run of a module, the last playbook's."""
        runs = [json.loads(line) for line in self._asked.read_text(encoding="utf-8").splitlines()]
        return [options for name, options in runs if name == module]

    def check(self, printed: str) -> None:
        """Nothing was run; what would have run is told as it is; and nothing reaches the terminal but what it shows."""
        assert not self.mark.exists(), printed
        assert ARITHMETIC not in printed
        assert HARMLESS in printed or "lookup('" in printed
        raw = sorted({char for char in printed if not char.isprintable() and char != "\n"})
        assert not raw, [line for line in printed.splitlines() if any(each in line for each in raw)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    return Controller(tmp_path_factory.mktemp("u"))


@pytest.fixture
def controller(place: Controller) -> Iterator[Controller]:
    yield place
    place.mark.unlink(missing_ok=True)


def test_the_text_is_run_where_it_is_a_template(controller: Controller) -> None:
    """A control: that it does run there shows that the other tests can fail."""
    path = controller.place / "text.j2"
    path.write_text(controller.texts.expression, encoding="utf-8")
    # A variable of the operator's is a template, and so is a file that is named as one.
    ways = ["{{ text }}", "{{ lookup('ansible.builtin.template', file) }}"]
    marked = {"ansible.builtin.stat": {"path": str(controller.mark)}, "register": "found"}
    proof = {"ansible.builtin.assert": {"that": "found.stat.exists"}}
    again = {"ansible.builtin.file": {"path": str(controller.mark), "state": "absent"}}
    tasks = [task for way in ways for task in ({"ansible.builtin.debug": {"msg": way}}, marked, proof, again)]
    playbook = controller.place / "control.yml"
    playbook.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]), encoding="utf-8")
    printed = controller.run(str(playbook), {"text": controller.texts.expression, "file": str(path)})
    assert printed.count("changed: ") == len(ways)


def test_the_audit(controller: Controller) -> None:
    dest = controller.place / "audit.json"
    variables = {"audit_become": False, "audit_dest": str(dest)}
    controller.check(controller.run("virt.iommufd.audit", variables, yaml=True))
    report = json.loads(dest.read_text(encoding="utf-8"))
    assert controller.texts.expression in [vm["vm"] for vm in report["localhost"]["vms"]]
    assert f"{controller.texts.expression} (4242)" in [holder["name"] for holder in report["localhost"]["holders"]]
    text = controller.place / "audit.txt"
    controller.check(controller.run("virt.iommufd.audit", {**variables, "audit_dest": str(text)}, yaml=True))
    written = text.read_text(encoding="utf-8")
    assert HARMLESS in written
    assert all(char == "\n" or " " <= char <= "~" for char in written)


# As in the README.
FIT = """
- hosts: localhost
  gather_facts: false
  tasks:
    - virt.iommufd.iommufd_info:
      register: info
    - ansible.builtin.assert:
        that: fit.fits is true
        fail_msg: "{{ fit.reason }} {{ fit.remedy }}"
        success_msg: "{{ fit.reason }}"
      vars:
        fit: "{{ info | virt.iommufd.memlock_fit(memory='64M', user=64055, memlock='8G', locked=0) }}"
"""


def test_whether_a_vm_fits(controller: Controller) -> None:
    playbook = controller.place / "fit.yml"
    playbook.write_text(FIT, encoding="utf-8")
    controller.check(controller.run(str(playbook), {}))


PRESENT: dict[str, Any] = {"iommufd_host_units": [UNIT], "iommufd_host_emulators": ["/usr/bin/qemu-system-x86_64"]}
ACCESS = {
    "iommufd_host_qemu_access": True,
    "iommufd_host_device_group": "root",
    "iommufd_host_launcher": True,
    "iommufd_host_restart": True,
}


def test_the_role(controller: Controller) -> None:
    printed = controller.role({**PRESENT, **ACCESS}, yaml=True)
    assert "Restart running units that have new settings" in printed
    assert "/etc/apparmor.d/abstractions/libvirt-qemu.d/iommufd_host" in printed
    assert "iommufd_host_result:" in printed
    controller.check(printed)


def test_a_verification_that_fails(controller: Controller) -> None:
    printed = controller.role(PRESENT, ok=False, fails=True)
    assert "The host did not pass its verification" in printed
    controller.check(printed)


def test_a_verification_that_is_not_known(controller: Controller) -> None:
    """What was in force before stays, as the host says that it was."""
    printed = controller.role(PRESENT, ok=None, fails=True)
    assert "It could not be proven that the host is as it should be" in printed
    controller.check(printed)
    (first, second) = controller.asked("iommufd_host_apply")
    (before,) = [row["before"] for row in controller.given["iommufd_host_apply"]["made"] if row["path"] == DROP_IN]
    assert re.search("{[{%]", before)
    contents = [{row["path"]: row.get("content") for row in options["files"]} for options in (first, second)]
    assert contents[0][DROP_IN].endswith("\n[Service]\nAmbientCapabilities=CAP_IPC_LOCK\n")
    assert contents[1][DROP_IN] == before


def test_a_host_without_iommufd_and_one_that_is_put_back(controller: Controller) -> None:
    without = {**PRESENT, "iommufd_host_required": False}
    printed = controller.role(without, {"iommufd_host_state": "absent"}, module="absent")
    assert "has no iommufd" in printed
    assert "iommufd_host_state is absent" in printed
    controller.check(printed)


def test_obstacles(controller: Controller) -> None:
    controller.check(controller.role(PRESENT, obstacles=True, fails=True))
