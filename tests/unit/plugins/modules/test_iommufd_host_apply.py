# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.virt.iommufd.plugins.module_utils import (
    _apply,
    _capabilities,
    _grant,
    _record,
    _steps,
    _wanted,
)
from ansible_collections.virt.iommufd.plugins.module_utils._command import run_command
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._programs import EXEC, GRANT, INTERPRETER, zipapp
from ansible_collections.virt.iommufd.plugins.module_utils._states import NodeState
from ansible_collections.virt.iommufd.plugins.modules import iommufd_host_apply
from ansible_collections.virt.iommufd.tests.kernel.run_module import run as run_module

Answer = dict[str, Any]

XATTR = "user.stands.in"
GRANTED = struct.pack("<5I", 0x02000001, 1 << 14, 0, 0, 0)
NET_RAW_TOO = struct.pack("<5I", 0x02000001, 3 << 13, 0, 0, 0)
RESTORECON = "restorecon-stands-in"


class FakeSystemd:
    """Knows the units of a folder, and does to them what systemctl is told; does udev's and modprobe's work, too.

    As the real one it knows of a file what it has read when it was told to. tests/kernel has the real ones. A command
    that begins with `broken` fails, and one that begins with `cut` is what the run comes to and no further.
    """

    def __init__(self, root: Path, modules: Path) -> None:
        self.units: dict[str, dict[str, str]] = {}
        # What a unit runs with, by what systemd had read of it when it was started.
        self.runs_with: dict[str, bytes] = {}
        self.told: list[str] = []
        self.broken, self.cut = "\0", "\0"
        # The device nodes that a rule is about.
        self._folder, self._rules, self._modules = root / "systemd", root / "udev", modules
        self._read: dict[str, bytes] = {}
        self._rule = ""

    def add(self, name: str, enabled: str, active: str, triggers: str = "") -> None:
        self.units[name] = {
            "LoadState": "loaded",
            "UnitFileState": enabled,
            "ActiveState": active,
            "Triggers": triggers,
        }

    def run(self, words: list[str]) -> tuple[int, str, str]:
        """Answers a command."""
        text = " ".join(words)
        if words[1] != "show":
            self.told.append(text)
        if text.startswith(self.cut):
            raise KeyboardInterrupt
        if text.startswith(self.broken):
            return 1, "", "Broken\n"
        if words[:2] == INTERPRETER.split():
            return run_command([sys.executable, *words[1:]])
        names = words[words.index("--") + 1 :] if "--" in words else words[2:]
        if words[0] == "systemctl":
            return self._systemctl(words[1], names)
        if words[0] == "modprobe":
            (self._modules / names[0].replace("-", "_")).mkdir()
        elif words[0] == "udevadm":
            self._udevadm(words)
        else:
            assert words[0] == RESTORECON
        return 0, "", ""

    def _systemctl(self, verb: str, names: list[str]) -> tuple[int, str, str]:
        if verb == "daemon-reload":
            self._reload()
        found = [self._find(name) for name in names]
        if verb == "show":
            none = {"LoadState": "not-found", "UnitFileState": "", "ActiveState": "inactive"}
            return (
                0,
                "\n".join("".join(f"{key}={unit[key]}\n" for key in unit) for unit in (a or none for a in found)),
                "",
            )
        wanted = {"disable": ("UnitFileState", "disabled"), "enable": ("UnitFileState", "enabled")}
        wanted.update({"stop": ("ActiveState", "inactive"), "start": ("ActiveState", "active")})
        wanted["restart"] = wanted["start"]
        for name, unit in zip(names, found):
            if unit is None:
                return 5, "", f"Unit {name} not loaded."
            if verb == "restart" or (verb == "start" and unit["ActiveState"] != "active"):
                self.runs_with[name] = self._read.get(name, b"")
            if verb in wanted:
                unit.update([wanted[verb]])
        return 0, "", ""

    def _find(self, name: str) -> dict[str, str] | None:
        """A unit that is known, or that has a file that nobody has read yet."""
        file = self._folder / name
        if name not in self.units and file.exists():
            service = file.with_suffix(".service").name
            self.add(name, "disabled", "inactive", service if file.suffix in (".path", ".timer") else "")
            self._read[name] = file.read_bytes()
        return self.units.get(name)

    def _reload(self) -> None:
        for name in list(self._read):
            file = self._folder / name
            if file.exists():
                self._read[name] = file.read_bytes()
            elif self.units[name]["ActiveState"] != "active":
                del self._read[name], self.units[name]

    def _udevadm(self, words: list[str]) -> None:
        if words[1] == "control":
            self._rule = "".join(file.read_text() for file in self._rules.glob("*.rules"))
        else:
            for mode in re.findall('MODE="([0-7]+)"', self._rule):
                for node in words[4:]:
                    os.chmod(node, int(mode, 8))


class Host:
    """A few folders that stand for a host, and the module that works on them."""

    def __init__(self, root: Path) -> None:
        self.root, self.record = root, root / "lib" / "record.json"
        self.modules = root.with_name(f"{root.name}.modules")
        self.modules.mkdir()
        self.systemd = FakeSystemd(root, self.modules)

    def run(self, **options: Any) -> Answer:
        """The module's answer."""
        return run_module(iommufd_host_apply, **{"record": str(self.record), **options})

    def cut(self, command: str, **options: Any) -> None:
        """Has a run be killed at a command."""
        self.systemd.cut = command
        with pytest.raises(KeyboardInterrupt):
            self.run(**options)
        self.systemd.cut = "\0"

    def file(self, name: str, content: bytes = b"", mode: int = 0o644) -> str:
        """Writes a file, as somebody else."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
        return str(path)

    def tree(self) -> dict[str, Any]:
        """All that is below the root, with everything that is put back."""
        found: dict[str, Any] = {}
        for path in sorted(self.root.rglob("*")):
            xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            content = path.read_bytes() if path.is_file() else None
            status = path.stat()
            found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, content, xattrs)
        return found

    def loaded(self) -> list[str]:
        """The modules of the kernel that are."""
        return sorted(os.listdir(self.modules))

    def told(self) -> list[str]:
        """What was told to anybody since this was asked last. That a unit has no failure any more is no news."""
        told = [each for each in self.systemd.told if not each.startswith("systemctl reset-failed")]
        self.systemd.told.clear()
        return told

    def kept(self) -> list[str]:
        """What the record names."""
        return [item["path"] for item in json.loads(self.record.read_text())["items"]]

    def to_tell(self) -> list[str]:
        """Who has yet to be told, by the record."""
        due: list[list[str]] = json.loads(self.record.read_text())["due"]
        return [thing for what, thing in due if what == "reload"]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path)
    uid, gid = os.geteuid(), os.getegid()
    monkeypatch.setattr(_record, "_ROOT", uid)
    monkeypatch.setattr(_record, "_LOCK", f"{tmp_path}.lock")
    # Only root may set the real one; tests/kernel does.
    monkeypatch.setattr(_capabilities, "XATTR", XATTR)
    monkeypatch.setattr(_apply, "_ROOT", uid)
    monkeypatch.setattr(_apply, "_ROOTS_GROUP", gid)
    monkeypatch.setattr(_apply, "_NEW", _apply._NEW._replace(uid=uid, gid=gid))
    monkeypatch.setattr(_apply, "_UNIT_FILES", f"{tmp_path}/systemd")
    monkeypatch.setattr(_steps, "_TOLD", {f"{tmp_path}/systemd/": "systemd", f"{tmp_path}/udev/": "udev"})
    monkeypatch.setattr(_wanted, "_LOADED", str(host.modules))
    monkeypatch.setattr(_wanted, "_BUILT_IN", f"{tmp_path}.none/{{}}")
    for name in ("_SYSTEMD_RUNS", "_UDEV_RUNS"):
        monkeypatch.setattr(_steps, name, str(tmp_path))
    monkeypatch.setattr(_steps, "_SELINUX_RUNS", f"{tmp_path}.none")
    monkeypatch.setattr(iommufd_host_apply, "run_command", host.systemd.run)
    return host


def grant(path: str, xattr: bytes = GRANTED) -> None:
    os.setxattr(path, XATTR, xattr)


def file(path: object, content: str = "of the role\n") -> dict[str, str]:
    """A file as the module takes it."""
    return {"path": str(path), "content": content}


def block(path: object) -> dict[str, Any]:
    """A file with a block as the module takes it."""
    return {"path": str(path), "devices": ["/dev/iommu"]}


def texts(rows: list[Answer]) -> list[str]:
    return [each["text"] for each in rows]


def paths(rows: list[Answer]) -> list[str]:
    return [each["path"] for each in rows]


# All that is told where everything is new, and where it is all put back.
TOLD_ON = [
    "modprobe -- vfio-pci",
    "/usr/bin/python3 -IS {root}/bin/new/grant.iommufd_host-new --help",
    "systemctl enable --no-reload -- u.path",
    "systemctl daemon-reload",
    "udevadm control --reload",
    "udevadm trigger --settle --action=change {terminal}",
    "systemctl start -- u.path",
]
TOLD_BACK = [
    "systemctl disable --no-reload -- u.path",
    "systemctl stop -- u.path",
    "systemctl stop -- u.service",
    "systemctl daemon-reload",
    "udevadm control --reload",
]


def everything(host: Host, terminal: str) -> dict[str, Any]:
    """One or more of each kind, on a host that has some of it already."""
    host.file("etc/old.conf", b"old", 0o640)
    qemu = host.file("bin/qemu", b"\x7fELF", 0o755)
    host.file("etc/qemu.conf", b"a = 1\nb = 2", 0o600)
    os.symlink(qemu, host.root / "bin" / "kvm")
    (host.modules / "iommufd").mkdir()
    os.chmod(terminal, 0o620)
    root = host.root
    return {
        "modules": ["iommufd", "vfio-pci"],
        "files": [
            file(root / "etc/old.conf"),
            file(root / "etc/new.d/x/new.conf"),
            file(root / "udev/1.rules", 'MODE="0666"\n'),
            file(root / "systemd/u.path", "[Path]\n"),
            file(root / "systemd/u.service", "[Service]\n"),
            {"path": f"{root}/bin/new/grant", "program": GRANT},
        ],
        "capabilities": [f"{root}/bin/kvm"],
        "nodes": [terminal, f"{terminal}?"],
        "mode": "0666",
        "blocks": [block(root / "etc/qemu.conf")],
        "units": ["u.path"],
    }


def test_there_and_back(host: Host, terminal: str) -> None:
    """The life of a role's grants: foretold, made, again, put back."""
    wanted = everything(host, terminal)
    kvm, qemu, conf = (str(host.root / name) for name in ("bin/kvm", "bin/qemu", "etc/qemu.conf"))
    old, new, rule, unit, service, program = paths(wanted["files"])
    before = host.tree()
    foretold = host.run(_ansible_check_mode=True, _ansible_diff=True, **wanted)
    assert host.tree() == before
    assert (host.told(), host.loaded(), os.stat(terminal).st_mode & 0o777) == ([], ["iommufd"], 0o620)
    assert (foretold["changed"], foretold["put_back"]) == (True, [])
    first = host.run(_ansible_diff=True, **wanted)
    # What is foretold is what is done, to the word. Not every ansible-core adds the parameters of the call.
    for answer in (foretold, first):
        answer.pop("invocation", None)
    assert first == foretold
    assert [(each["kind"], each["path"], each["text"]) for each in first["made"]] == [
        ("module", "vfio-pci", "The kernel module vfio-pci is loaded."),
        ("capability", qemu, f"{qemu} has got CAP_IPC_LOCK."),
        ("file", old, f"{old} is written."),
        *(("file", path, f"{path} is made.") for path in (new, rule, unit, service, program)),
        ("block", conf, f"{conf} has the block of iommufd_host."),
        ("unit", "u.path", "u.path is enabled."),
        ("unit", "u.path", "u.path is started."),
    ]
    assert [(each["content"], each["before"]) for each in first["made"] if each["kind"] == "file"] == [
        (True, "old"),
        *([(True, None)] * 5),
    ]
    assert [each["before_header"] for each in first["diff"]] == [
        *("vfio-pci", qemu, old, new, rule, unit, service, program, conf, "u.path", "u.path")
    ]
    assert first["diff"][1] == {
        "before_header": qemu,
        "after_header": qemu,
        "before": "",
        "after": "permitted: cap_ipc_lock\ninheritable: \neffective: true\n",
    }
    in_order = [old, new, rule, unit, service, program, conf, terminal, f"{terminal}?", "u.path", qemu]
    assert paths(first["recorded"]) == paths(first["remembered"]) == host.kept() == in_order
    assert first["capabilities"] == {kvm: {"real_path": qemu, "ipc_lock": True, "ours": True}}
    remembered = {each["path"]: each["before"] for each in first["remembered"]}
    assert (remembered[old]["mode"], remembered[terminal]["mode"]) == ("0640", "0620")
    assert [path for path in in_order if remembered[path] is None] == [
        *(new, rule, unit, service, program, f"{terminal}?", "u.path")
    ]
    # The host is as wanted.
    for each in wanted["files"]:
        content = zipapp(GRANT) if "program" in each else each["content"].encode()
        mode = 0o755 if "program" in each else 0o644
        assert host.tree()[each["path"]][:4] == (0o100000 | mode, os.geteuid(), os.getegid(), content)
    for name in ("etc/new.d", "etc/new.d/x", "bin/new"):
        assert (host.root / name).stat().st_mode & 0o777 == 0o755
    text = Path(conf).read_text()
    assert re.fullmatch(
        r"# BEGIN iommufd_host\n# [^\n]*\ncgroup_device_acl = \[\n(  \"/dev/[a-z]+\",\n)+\]\n# END iommufd_host\n"
        "a = 1\nb = 2",
        text,
    )
    assert '  "/dev/null",\n' in text
    assert '  "/dev/iommu",\n' in text
    assert Path(conf).stat().st_mode & 0o777 == 0o600
    assert os.getxattr(qemu, XATTR) == GRANTED
    assert os.stat(terminal).st_mode & 0o777 == 0o666
    assert host.loaded() == ["iommufd", "vfio_pci"]
    assert {key: host.systemd.units["u.path"][key] for key in ("UnitFileState", "ActiveState")} == {
        "UnitFileState": "enabled",
        "ActiveState": "active",
    }
    assert host.systemd.runs_with == {"u.path": b"[Path]\n"}
    assert host.told() == [each.format(root=host.root, terminal=terminal) for each in TOLD_ON]
    assert not list(host.root.rglob("*.iommufd_host-new"))
    # Once more.
    changed = host.tree()
    for check_mode in (True, False):
        second = host.run(_ansible_check_mode=check_mode, **wanted)
        assert (second["changed"], second["recorded"], second["remembered"]) == (False, [], first["remembered"])
        assert (second["made"], second["put_back"], second["capabilities"]) == ([], [], first["capabilities"])
        assert (host.tree(), host.told(), host.to_tell()) == (changed, [], [])
    # Back, while the path has its service at work.
    host.systemd.add("u.service", "static", "active")
    foretold = host.run(_ansible_check_mode=True, _ansible_diff=True)
    assert (host.tree(), host.told()) == (changed, [])
    assert (foretold["remembered"], foretold["recorded"], foretold["made"]) == ([], [], [])
    assert [each["before_header"] for each in foretold["diff"]] == [
        *("u.path", program, service, unit, rule, new, old, conf, qemu, terminal)
    ]
    assert foretold["diff"][5:7] == [
        {"before_header": new, "after_header": new, "before": "of the role\n", "after": ""},
        {"before_header": old, "after_header": old, "before": "of the role\n", "after": "old"},
    ]
    back = host.run()
    assert back["changed"]
    assert back["made"] == []
    assert back["put_back"] == foretold["put_back"]
    assert back["put_back"][:2] == [
        {"kind": "unit", "path": "u.path", "text": "u.path is disabled and stopped.", "gone": False},
        {"kind": "file", "path": program, "text": f"{program} is removed.", "gone": True},
    ]
    assert [each["path"] for each in back["put_back"] if each["gone"]] == [program, service, unit, rule, new]
    assert [(each["kind"], each["path"]) for each in back["put_back"][5:]] == [
        *(("file", new), ("file", old), ("block", conf), ("capability", qemu), ("node", terminal))
    ]
    assert host.told() == TOLD_BACK
    assert "u.path" not in host.systemd.units
    assert host.systemd.units["u.service"]["ActiveState"] == "inactive"
    assert os.stat(terminal).st_mode & 0o777 == 0o620
    assert host.tree() == before
    # Nobody knows who else needs them by now.
    assert host.loaded() == ["iommufd", "vfio_pci"]
    again = host.run()
    assert (again["changed"], again["put_back"], again["made"], again["remembered"]) == (False, [], [], [])
    assert host.told() == []


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("at", range(len(TOLD_ON)))
def test_a_run_that_comes_to_nothing_anywhere(host: Host, terminal: str, at: int, cut: bool) -> None:
    """Each command fails once, or is where the run is killed. The next run makes it good, and it all can go back."""
    wanted = everything(host, terminal)
    before = host.tree()
    command = TOLD_ON[at].format(root=host.root, terminal=terminal)
    if cut:
        host.cut(command, **wanted)
    else:
        host.systemd.broken = command
        answer = host.run(**wanted)
        assert answer["failed"]
        assert f"could not be made what it is to be: '{command}' failed: Broken. " in answer["msg"]
        assert answer["msg"].endswith(
            f"The record {host.record} names how all of it was: remove the cause and run this again, or have it put"
            " back (iommufd_host_state: absent)."
        )
        # What is told was done, and is what has changed.
        assert all(text in answer["msg"] for text in texts(answer["made"]))
        assert answer["changed"] == bool(answer["made"]) == (at > 0)
        assert paths(answer["remembered"]) == host.kept()
        host.systemd.broken = "\0"
    # How all of it was is known, whatever was done of it.
    assert len(host.kept()) == 11
    half_way = host.tree()
    host.told()
    foretold = host.run(_ansible_check_mode=True, **wanted)
    assert (host.tree(), host.told()) == (half_way, [])
    made_good = host.run(**wanted)
    assert not made_good.get("failed")
    assert (made_good["made"], made_good["recorded"]) == (foretold["made"], [])
    assert made_good["put_back"] == []
    assert os.getxattr(host.root / "bin" / "qemu", XATTR) == GRANTED
    assert (host.root / "bin" / "new" / "grant").read_bytes() == zipapp(GRANT)
    assert os.stat(terminal).st_mode & 0o777 == 0o666
    assert host.loaded() == ["iommufd", "vfio_pci"]
    assert host.systemd.units["u.path"]["UnitFileState"] == "enabled"
    assert host.systemd.units["u.path"]["ActiveState"] == "active"
    assert host.systemd.runs_with == {"u.path": b"[Path]\n"}
    # What it had come to is done once more, and all that comes after it.
    assert {each.format(root=host.root, terminal=terminal) for each in TOLD_ON[at:]} <= set(host.told())
    assert host.to_tell() == []
    third = host.run(**wanted)
    assert (third["changed"], host.told()) == (False, [])
    assert host.run()["changed"]
    assert host.tree() == before
    assert os.stat(terminal).st_mode & 0o777 == 0o620


@pytest.mark.parametrize("at", range(len(TOLD_BACK)))
def test_an_undo_that_is_cut_off_anywhere(host: Host, terminal: str, at: int) -> None:
    wanted = everything(host, terminal)
    before = host.tree()
    host.run(**wanted)
    host.cut(TOLD_BACK[at])
    host.told()
    assert not host.run().get("failed")
    assert set(TOLD_BACK[-2:]) <= set(host.told())
    assert host.tree() == before
    assert os.stat(terminal).st_mode & 0o777 == 0o620
    assert "u.path" not in host.systemd.units


def test_cut_off_between_a_file_and_those_who_are_to_be_told(host: Host) -> None:
    """The next run tells them, whatever it wants by then."""
    unit, other = file(host.root / "systemd" / "u.service"), file(host.root / "etc" / "other")
    host.cut("systemctl daemon-reload", files=[unit])
    assert Path(unit["path"]).read_text() == unit["content"]
    assert host.to_tell() == ["systemd"]
    host.told()
    # To tell somebody is no change.
    foretold = host.run(_ansible_check_mode=True, files=[unit])
    assert (foretold["changed"], host.told(), host.to_tell()) == (False, [], ["systemd"])
    answer = host.run(files=[unit])
    assert (answer["changed"], host.told(), host.to_tell()) == (False, ["systemctl daemon-reload"], [])
    assert (host.run(files=[unit])["changed"], host.told()) == (False, [])
    # As wanted already, and told to nobody; then something else is wanted.
    host.cut("systemctl daemon-reload", files=[{**unit, "content": "[Service]\n"}])
    host.told()
    assert texts(host.run(files=[other])["put_back"]) == [f"{unit['path']} is removed."]
    assert (host.told(), host.to_tell()) == (["systemctl daemon-reload"], [])
    host.cut("systemctl daemon-reload", files=[unit])
    host.run()
    assert not host.record.exists()


def test_all_that_is_returned_is_documented(host: Host, terminal: str) -> None:
    documented = yaml.safe_load(iommufd_host_apply.RETURN)
    wanted = everything(host, terminal)
    answer = host.run(**wanted)
    assert set(answer) - {"changed", "invocation", "warnings"} == set(documented)
    assert answer["warnings"] == []
    kinds = {"file", "capability", "node", "block", "unit"}
    for name in ("recorded", "remembered"):
        assert all(set(each) == set(documented[name]["contains"]) for each in answer[name])
        assert {each["kind"] for each in answer[name]} == kinds
    of_files = {"content", "before"}
    for each in answer["made"]:
        assert set(each) == set(documented["made"]["contains"]) - (of_files if each["kind"] != "file" else set())
    # The nodes are made by the rule, which is a file.
    assert {each["kind"] for each in answer["made"]} == {*kinds, "module"} - {"node"}
    ((_path, sample),) = documented["capabilities"]["sample"].items()
    ((_path, row),) = answer["capabilities"].items()
    assert set(row) == set(sample)
    # No content of a file is shown where nobody asked for it.
    assert "content" not in json.dumps(answer["remembered"])
    back = host.run()["put_back"]
    assert all(set(each) == set(documented["put_back"]["contains"]) for each in back)
    assert {each["kind"] for each in back} == kinds
    # What fails returns what it can.
    host.systemd.broken = "modprobe"
    failed = host.run(modules=["nvme"])
    always = {name for name in documented if documented[name]["returned"] != "on success"}
    assert set(failed) - {"changed", "invocation", "warnings", "failed", "msg"} == always


def test_no_more_is_shown_of_a_file_with_a_block_than_the_block(host: Host) -> None:
    conf = host.file("qemu.conf", b'vnc_password = "secret"\n', 0o600)
    for options in ({"blocks": [block(conf)]}, {"blocks": [block(conf)]}, {}):
        assert "secret" not in json.dumps(host.run(_ansible_diff=True, **options))
    assert Path(conf).read_bytes() == b'vnc_password = "secret"\n'


def test_who_has_lost_the_launcher(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told for as long as they start it and it is not there, whichever run has removed it."""
    path = str(host.root / "bin/exec")
    monkeypatch.setattr(iommufd_host_apply, "LAUNCHER", path)
    monkeypatch.setattr(iommufd_host_apply, "find_services_with", {path: ["vm@.service"]}.__getitem__)
    wanted = {"files": [{"path": path, "program": EXEC}]}
    lost = ["vm@.service"]
    for options, check_mode, stranded in (
        ({}, False, lost),
        (wanted, True, []),
        (wanted, False, []),
        ({}, True, lost),
        ({}, False, lost),
        ({}, False, lost),
    ):
        assert host.run(_ansible_check_mode=check_mode, **options)["stranded"] == stranded
    # Somebody else's is as good.
    host.file("bin/exec", b"", 0o755)
    assert host.run()["stranded"] == []


def test_what_is_listed_twice(host: Host) -> None:
    path, qemu = str(host.root / "f"), host.file("qemu", b"", 0o755)
    host.systemd.add("u.timer", "disabled", "inactive")
    answer = host.run(
        modules=["nvme", "nvme"],
        files=[file(path, "first"), file(path, "second")],
        capabilities=[qemu, qemu],
        nodes=["/dev/null", "/dev/null"],
        units=["u.timer", "u.timer"],
    )
    assert Path(path).read_text() == "second"
    assert [each["path"] for each in answer["recorded"]] == [path, "/dev/null", "u.timer", qemu]
    assert [each["path"] for each in answer["made"]] == ["nvme", qemu, path, "u.timer", "u.timer"]


def test_programs(host: Host) -> None:
    programs = [{"path": str(host.root / name), "program": name} for name in (EXEC, GRANT)]
    assert texts(host.run(files=programs)["made"]) == [f"{each['path']} is made." for each in programs]
    for each in programs:
        assert Path(each["path"]).read_bytes() == zipapp(each["program"])
        assert os.access(each["path"], os.X_OK)
        code, output, errors = run_command([sys.executable, "-IS", each["path"], "--help"])
        assert (code, errors) == (0, "")
        assert output.startswith(f"usage: {each['program']} ")
    assert not host.run(files=programs)["changed"]
    # One that is there and has lost a right of its own is made anew.
    os.chmod(programs[0]["path"], 0o644)
    answer = host.run(files=programs)
    assert texts(answer["made"]) == [f"{programs[0]['path']} is written."]
    assert answer["made"][0]["content"] is False


@pytest.mark.parametrize("before", [b"#!/bin/sh\n", None], ids=["another", "new"])
def test_a_program_that_does_not_start(host: Host, monkeypatch: pytest.MonkeyPatch, before: bytes | None) -> None:
    path = str(host.root / "bin" / "program")
    if before is not None:
        host.file("bin/program", before, 0o755)
    options = {"files": [file(host.root / "f"), {"path": path, "program": GRANT}]}
    with monkeypatch.context() as broken:
        broken.setattr(iommufd_host_apply, "zipapp", lambda _name: b"raise SystemExit(7)\n")
        # Whether it starts is not tried where nothing is changed.
        assert not host.run(_ansible_check_mode=True, **options).get("failed")
        answer = host.run(**options)
    assert answer["failed"]
    assert answer["msg"].startswith(
        f"{path} could not be made what it is to be: '/usr/bin/python3 -IS {path}.iommufd_host-new --help' failed: exit"
        f" code 7. {host.root}/f is made. The record"
    )
    assert texts(answer["made"]) == [f"{host.root}/f is made."]
    # Nothing of it is left, and the record knows the folder that was made for it.
    assert os.listdir(host.root / "bin") == ([] if before is None else ["program"])
    assert host.kept() == [f"{host.root}/f", path]
    assert texts(host.run(**options)["made"]) == [f"{path} is {'made' if before is None else 'written'}."]
    assert Path(path).read_bytes() == zipapp(GRANT)
    host.run()
    assert (Path(path).read_bytes() if before else os.listdir(host.root)) == (before or [])


def test_what_somebody_else_granted(host: Host) -> None:
    qemu = host.file("qemu", b"", 0o755)
    grant(qemu, NET_RAW_TOO)
    answer = host.run(capabilities=[qemu])
    assert answer["capabilities"][qemu] == {"real_path": qemu, "ipc_lock": True, "ours": False}
    assert (answer["recorded"], answer["made"], answer["changed"]) == ([], [], False)
    # Nothing was to be remembered.
    assert not host.record.exists()
    assert not host.run()["changed"]
    assert os.getxattr(qemu, XATTR) == NET_RAW_TOO


def test_a_second_strategy_takes_the_first_ones_grants_back(host: Host) -> None:
    qemu, other = host.file("qemu", b"", 0o755), file(host.root / "a" / "limits.conf")
    unit, service = (file(host.root / "systemd" / name, "first\n") for name in ("u.path", "u.service"))
    host.run(capabilities=[qemu], units=["u.path"], files=[unit, service])
    host.systemd.add("u.service", "static", "active")
    host.told()
    wanted = {"files": [{**unit, "content": "second\n"}, service, other], "units": ["u.path"]}
    foretold = host.run(_ansible_check_mode=True, **wanted)
    answer = host.run(**wanted)
    assert texts(answer["put_back"]) == [
        "u.path is stopped until it is started with what it has to do now.",
        f"CAP_IPC_LOCK is taken from {qemu}.",
    ]
    assert texts(answer["made"]) == [
        f"{unit['path']} is written.",
        f"{other['path']} is made.",
        "u.path is started.",
    ]
    for name in ("put_back", "made", "recorded", "remembered", "capabilities"):
        assert answer[name] == foretold[name]
    assert XATTR not in os.listxattr(qemu)
    # It was stopped before the capability was taken, and started with what it has to do now.
    assert host.told() == [
        "systemctl stop -- u.path",
        "systemctl stop -- u.service",
        "systemctl daemon-reload",
        "systemctl start -- u.path",
    ]
    assert host.systemd.units["u.path"]["UnitFileState"] == "enabled"
    assert host.systemd.units["u.service"]["ActiveState"] == "inactive"
    assert host.systemd.runs_with == {"u.path": b"second\n"}
    assert [each["path"] for each in answer["remembered"]] == [unit["path"], service["path"], "u.path", other["path"]]


def test_a_unit_whose_file_is_written_is_started_anew(host: Host) -> None:
    unit, other = (file(host.root / "systemd" / name, "first\n") for name in ("u.timer", "v.timer"))
    host.run(files=[unit, other], units=["u.timer", "v.timer"])
    host.told()
    answer = host.run(files=[{**unit, "content": "second\n"}, other], units=["u.timer", "v.timer"])
    assert texts(answer["made"]) == [f"{unit['path']} is written.", "u.timer is started anew."]
    assert host.told() == ["systemctl daemon-reload", "systemctl restart -- u.timer"]
    assert host.systemd.runs_with == {"u.timer": b"second\n", "v.timer": b"first\n"}


def test_what_somebody_has_undone_is_made_again(host: Host, terminal: str) -> None:
    wanted = everything(host, terminal)
    before = host.tree()
    host.run(**wanted)
    os.removexattr(host.root / "bin" / "qemu", XATTR)
    host.file("etc/old.conf", b"of somebody else", 0o600)
    (host.root / "etc" / "new.d" / "x" / "new.conf").unlink()
    host.file("etc/qemu.conf", b"a = 3\n", 0o600)
    os.chmod(terminal, 0o600)
    host.systemd.units["u.path"].update(UnitFileState="disabled", ActiveState="inactive")
    answer = host.run(**wanted)
    assert [(each["kind"], Path(each["path"]).name) for each in answer["made"]] == [
        *(("capability", "qemu"), ("file", "old.conf"), ("file", "new.conf"), ("block", "qemu.conf")),
        *(("unit", "u.path"), ("unit", "u.path")),
    ]
    assert answer["recorded"] == []
    assert (host.root / "etc" / "qemu.conf").read_bytes().endswith(b"# END iommufd_host\na = 3\n")
    assert os.stat(terminal).st_mode & 0o777 == 0o666
    assert not host.run(**wanted)["changed"]
    host.run()
    # Of the file with the block, what somebody has made of the rest stays.
    host.file("etc/qemu.conf", b"a = 1\nb = 2", 0o600)
    assert host.tree() == before
    assert os.stat(terminal).st_mode & 0o777 == 0o620


@pytest.mark.parametrize("active", ["active", "inactive"])
def test_a_unit_that_was_in_use_is_again(host: Host, active: str) -> None:
    host.systemd.add("u.timer", "enabled", active)
    assert texts(host.run(units=["u.timer"])["made"]) == ([] if active == "active" else ["u.timer is started."])
    assert texts(host.run()["put_back"]) == [
        "u.timer is disabled and stopped.",
        f"u.timer is enabled, {active} again.",
    ]
    assert host.systemd.units["u.timer"]["UnitFileState"] == "enabled"
    assert host.systemd.units["u.timer"]["ActiveState"] == active


def test_nodes_that_came_later(host: Host, terminal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run(nodes=[f"{terminal}*", "/dev/none"])
    record = json.loads(host.record.read_text())
    record["items"] = [item for item in record["items"] if item["path"] != terminal]
    host.record.write_text(json.dumps(record))
    os.chmod(terminal, 0o666)
    answer = host.run(nodes=[f"{terminal}*"])
    assert (answer["recorded"], host.told()) == ([], [])
    # Only root could give it to root.
    kernels = NodeState(0o600, os.getuid(), os.getgid())
    monkeypatch.setattr(_wanted, "kernels_node", lambda _path: kernels)
    answer = host.run()
    assert texts(answer["put_back"]) == [
        f"{terminal} is as the kernel and the rules of udev make it: {kernels}, if there is no other rule."
    ]
    assert os.stat(terminal).st_mode & 0o777 == 0o600
    assert host.told() == [f"udevadm trigger --settle --action=change {terminal}"]


@pytest.mark.parametrize("running", [True, False])
def test_nobody_is_told_who_is_not_there(host: Host, running: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SYSTEMD_RUNS", "_UDEV_RUNS"):
        monkeypatch.setattr(_steps, name, str(host.root / ("" if running else "none")))
    for options in ({"files": [file(host.root / name) for name in ("systemd/u.service", "udev/1.rules")]}, {}):
        assert host.run(**options)["changed"]
        assert host.told() == (["systemctl daemon-reload", "udevadm control --reload"] if running else [])
    assert not host.record.parent.exists()


def test_systemd_is_to_read_its_files_in_any_case(host: Host) -> None:
    """As where somebody else has written one. It is no change, and nothing to remember."""
    assert not host.run(_ansible_check_mode=True, reload=True)["changed"]
    assert host.told() == []
    assert not host.run(reload=True)["changed"]
    assert host.told() == ["systemctl daemon-reload"]
    assert not host.record.parent.exists()


def test_new_files_get_their_label(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_steps, "_SELINUX_RUNS", str(host.root))
    monkeypatch.setattr(_steps, "_RESTORECON", RESTORECON)
    path = host.root / "a" / "b" / "f"
    host.run(files=[file(path)])
    # The tool is not there.
    assert host.told() == []
    host.run()
    monkeypatch.setattr(shutil, "which", lambda name: name)
    host.run(files=[file(path)])
    assert host.told() == [f"{RESTORECON} {host.root}/a {host.root}/a/b {path}"]


def test_what_fails_half_way_back(host: Host) -> None:
    unit, qemu = file(host.root / "systemd" / "u.service"), host.file("qemu", b"", 0o755)
    host.run(files=[unit], capabilities=[qemu])
    host.told()
    host.systemd.broken = "systemctl daemon-reload"
    answer = host.run(_ansible_diff=True)
    assert answer["failed"]
    assert answer["changed"]
    assert "diff" not in answer
    assert texts(answer["put_back"]) == [f"{unit['path']} is removed.", f"CAP_IPC_LOCK is taken from {qemu}."]
    assert answer["msg"] == (
        "systemd and udev could not be put back: 'systemctl daemon-reload' failed: Broken."
        f" {unit['path']} is removed. CAP_IPC_LOCK is taken from {qemu}. The record {host.record} still names what is"
        " not back: remove the cause, and run this again."
    )
    host.systemd.broken = "\0"
    host.told()
    other = file(host.root / "f")
    host.file("f", other["content"].encode())
    answer = host.run(files=[other])
    assert host.told() == ["systemctl daemon-reload"]
    assert not answer["changed"]
    assert host.to_tell() == []


def test_what_fails_half_way_on(host: Host) -> None:
    """The message tells what was done, and the record names everything, also what was not come to."""
    unit, qemu = file(host.root / "systemd" / "u.path"), host.file("qemu", b"", 0o755)
    later = file(host.root / "systemd" / "v.path")
    wanted = {"files": [unit, later], "capabilities": [qemu], "units": ["u.path", "v.path"]}
    host.systemd.broken = "systemctl enable --no-reload -- v.path"
    answer = host.run(_ansible_diff=True, **wanted)
    assert (answer["failed"], answer["changed"], answer["put_back"]) == (True, True, [])
    assert "diff" not in answer
    done = [
        f"{qemu} has got CAP_IPC_LOCK.",
        *(f"{each['path']} is made." for each in (unit, later)),
        "u.path is enabled.",
    ]
    assert texts(answer["made"]) == done
    assert answer["msg"] == (
        "v.path could not be made what it is to be: 'systemctl enable --no-reload -- v.path' failed: Broken."
        f" {' '.join(done)} The record {host.record} names how all of it was: remove the cause and run this again, or"
        " have it put back (iommufd_host_state: absent)."
    )
    everything_wanted = [unit["path"], later["path"], "u.path", "v.path", qemu]
    assert host.kept() == paths(answer["remembered"]) == everything_wanted
    assert host.to_tell() == ["systemd"]
    host.systemd.broken = "\0"
    answer = host.run(**wanted)
    assert texts(answer["made"]) == ["v.path is enabled.", "u.path is started.", "v.path is started."]
    assert (answer["recorded"], host.kept(), host.to_tell()) == ([], everything_wanted, [])
    assert not host.run(**wanted)["changed"]


def test_nothing_is_changed_where_the_first_step_fails(host: Host) -> None:
    path = host.root / "f"
    host.systemd.broken = "modprobe"
    answer = host.run(modules=["nvme"], files=[file(path)])
    assert (answer["failed"], answer["changed"], answer["made"], path.exists()) == (True, False, [], False)
    assert answer["msg"].startswith(
        "nvme could not be made what it is to be: 'modprobe -- nvme' failed: Broken. Nothing was changed before that."
    )


def refuse(name: str, monkeypatch: pytest.MonkeyPatch, number: int = errno.EROFS) -> None:
    """Has the system refuse that a new file gets this name."""
    rename = os.rename

    def act(source: str, target: str, **folders: int) -> None:
        if target == name:
            raise OSError(number, os.strerror(number))
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", act)


def test_what_the_system_refuses(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path = host.file("old", b"old")
    with monkeypatch.context() as refusing:
        refuse("old", refusing)
        answer = host.run(files=[file(path)])
        assert (answer["failed"], answer["changed"], answer["made"]) == (True, False, [])
        assert answer["msg"].startswith(
            f"{path} could not be made what it is to be: EROFS: Read-only file system. Nothing was changed before that."
        )
        assert Path(path).read_bytes() == b"old"
    assert host.run(files=[file(path)])["changed"]
    with monkeypatch.context() as refusing:
        refuse("old", refusing)
        answer = host.run()
    assert answer["failed"]
    assert not answer["changed"]
    assert answer["msg"].startswith(
        f"{path} could not be put back: EROFS: Read-only file system. Nothing was put back before that. The record"
    )
    assert [each["path"] for each in answer["remembered"]] == [path]
    host.run()
    assert Path(path).read_bytes() == b"old"


def test_a_record_that_cannot_be_written(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: str, _mode: int, **_folder: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", refuse)
    answer = host.run(modules=["nvme"], files=[file(host.root / "f")])
    assert answer["failed"]
    assert answer["msg"] == f"The record {host.record} cannot be written (ENOSPC: No space left on device)."
    # What cannot be remembered is not done.
    assert (answer["changed"], host.tree(), host.told()) == (False, {}, [])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"files": [file("{root}/link")]}, "is a symbolic link, which is left alone"),
        ({"files": [file("relative")]}, "'relative' is no absolute path"),
        ({"record": "relative"}, "'relative' is no absolute path"),
        ({"record": "{root}/none/none/record.json"}, "cannot be kept"),
        ({"capabilities": ["{root}/none"]}, "is no executable file, so it cannot get CAP_IPC_LOCK"),
        ({"capabilities": ["{root}/old"]}, "is no executable file"),
        ({"capabilities": ["{root}/odd"]}, "a form that is not known"),
        ({"blocks": [block("{root}/half")]}, "without the other"),
        ({"nodes": ["{root}/old"]}, "is no device node"),
        ({"capabilities": ["{root}/a_users"]}, "are for the user namespace of uid 1000 only"),
        ({"capabilities": ["{root}/writable"]}, "{root}/writable can be written by everybody"),
        ({"capabilities": ["{root}/theirs/qemu"]}, "{root}/theirs can be written by group"),
        ({"files": [file("{root}/theirs/new")]}, "{root}/theirs can be written by group"),
        ({"files": [file("{root}/writable")]}, "{root}/writable can be written by everybody"),
        ({"blocks": [block("{root}/writable")]}, "{root}/writable can be written by everybody"),
        ({"nodes": ["{root}/theirs/*"]}, "{root}/theirs can be written by group"),
        ({"nodes": ["/dev/*/1"]}, "in its last part only"),
        ({"units": ["u.mount"]}, "is not the name of a systemd"),
        ({"modules": ["-r"]}, "'-r' is not the name of a kernel module"),
        ({"group": "no such group"}, "This host has no group no such group"),
        ({"mode": "rw"}, "'rw' is not an octal mode"),
        ({"files": [{"path": "/f"}]}, "one of the following is required: content, program"),
        ({"files": [{"path": "/f", "content": "", "program": EXEC}]}, "mutually exclusive: content|program"),
        ({"files": [{"path": "/f", "program": "bash"}]}, "must be one of: iommufd-exec, iommufd-host-grant"),
        # With what is fine beside it.
        ({"modules": ["nvme"], "files": [file("{root}/new"), file("{root}/link")]}, "is a symbolic link"),
    ],
)
def test_what_is_refused_changes_nothing(host: Host, options: dict[str, Any], why: str) -> None:
    path = host.file("old", b"old")
    host.run(files=[file(path)])
    host.file("half", b"# BEGIN iommufd_host\n")
    grant(host.file("odd", b"", 0o755), b"?")
    grant(host.file("a_users", b"", 0o755), struct.pack("<6I", 0x03000001, 1 << 14, 0, 0, 0, 1000))
    host.file("writable", b"", 0o777)
    host.file("theirs/qemu", b"", 0o755)
    (host.root / "theirs").chmod(0o775)
    os.symlink("old", host.root / "link")
    before = host.tree()
    given = json.loads(json.dumps(options).replace("{root}", str(host.root)))
    for check_mode in (True, False):
        answer = host.run(_ansible_check_mode=check_mode, **given)
        assert answer["failed"]
        assert why.format(root=host.root) in answer["msg"]
        assert not answer.get("changed")
        assert not [*answer.get("put_back", []), *answer.get("made", [])]
        assert host.tree() == before
        assert host.told() == []
        assert host.loaded() == []


def test_a_folder_that_others_got_since(host: Host) -> None:
    """What was recorded is put back by no other way than by folders that are root's alone."""
    path, qemu = host.file("a/conf", b"of root"), host.file("bin/qemu", b"", 0o755)
    host.run(files=[file(path)], capabilities=[qemu])
    host.file("victim/conf", b"somebody else's")
    host.file("victim/qemu", b"", 0o755)
    for folder, place in (("a", path), ("bin", qemu)):
        (host.root / folder).chmod(0o777)
        before = host.tree()
        for check_mode in (True, False):
            answer = host.run(_ansible_check_mode=check_mode)
            assert answer["failed"]
            assert f"{place} cannot be trusted: {host.root}/{folder} can be written by everybody." in answer["msg"]
            assert (answer["changed"], answer["put_back"]) == (False, [])
            assert host.tree() == before
        (host.root / folder).chmod(0o755)
    assert host.run()["changed"]
    assert Path(path).read_bytes() == b"of root"


@pytest.mark.parametrize("way", ["make", "put_back"])
def test_a_folder_that_is_swapped_at_the_last_moment(host: Host, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    path = host.file("a/conf", b"of root")
    if way == "put_back":
        host.run(files=[file(path)])
    victim = host.file("victim/conf", b"somebody else's")

    def swap(*arguments: Any) -> Any:
        (host.root / "a").rename(host.root / "b")
        (host.root / "a").symlink_to("victim")
        (host.root).chmod(0o777)
        return act(*arguments)

    act = getattr(iommufd_host_apply, way)
    monkeypatch.setattr(iommufd_host_apply, way, swap)
    answer = host.run(files=[file(path)] if way == "make" else [])
    host.root.chmod(0o755)
    assert answer["failed"]
    assert f"{path} could not be {'made what it is to be' if way == 'make' else 'put back'}" in answer["msg"]
    assert f"{host.root} can be written by everybody" in answer["msg"]
    assert (answer["changed"], answer["made"], answer["put_back"]) == (False, [], [])
    assert Path(victim).read_bytes() == b"somebody else's"


def test_what_others_write_after_it_was_recorded(host: Host) -> None:
    """A file that a role writes as a whole is made, and goes back, whoever can write it by now."""
    path = host.file("f", b"of root")
    host.run(files=[file(path)])
    host.file("f", b"of anybody", 0o666)
    assert host.run(files=[file(path)])["made"] == [
        {"kind": "file", "path": path, "text": f"{path} is written.", "content": True, "before": "of anybody"}
    ]
    assert (Path(path).read_text(), Path(path).stat().st_mode & 0o777) == ("of the role\n", 0o644)
    os.chmod(path, 0o666)
    # It holds what it is to hold, so whoever reads it need not be started anew.
    assert host.run(files=[file(path)])["made"] == [
        {"kind": "file", "path": path, "text": f"{path} is written.", "content": False, "before": "of the role\n"}
    ]
    host.file("f", b"of anybody", 0o666)
    assert host.run()["changed"]
    assert (Path(path).read_bytes(), Path(path).stat().st_mode & 0o777) == (b"of root", 0o644)


def test_a_grant_that_fails(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    qemus = [host.file(name, b"", 0o755) for name in ("q1", "q2")]

    def fail(path: str) -> bool:
        if path == qemus[1]:
            raise IommufdError("no")
        return _grant.grant_patiently(path)

    monkeypatch.setattr(_steps, "grant_patiently", fail)
    answer = host.run(capabilities=qemus)
    assert (answer["failed"], answer["changed"], paths(answer["made"])) == (True, True, qemus[:1])
    assert answer["msg"].startswith(
        f"{qemus[1]} could not be made what it is to be: no. {qemus[0]} has got CAP_IPC_LOCK. The record {host.record}"
    )
    # It will be taken back all the same.
    assert [each["path"] for each in answer["remembered"]] == qemus
    assert texts(host.run()["put_back"]) == [f"CAP_IPC_LOCK is taken from {qemus[0]}."]


def test_a_grant_that_fails_after_something_was_put_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path, qemu = host.file("f", b"old"), host.file("qemu", b"", 0o755)
    host.run(files=[file(path)])

    def fail(_path: str) -> bool:
        raise IommufdError("no")

    monkeypatch.setattr(_steps, "grant_patiently", fail)
    answer = host.run(capabilities=[qemu])
    assert (answer["failed"], answer["changed"], answer["made"]) == (True, True, [])
    assert texts(answer["put_back"]) == [f"{path} is what it was."]
    assert Path(path).read_bytes() == b"old"


def test_a_grant_that_was_cut_off(host: Host) -> None:
    qemu = host.file("qemu", b"", 0o755)
    host.run(capabilities=[qemu])
    # Recorded, but not granted yet.
    os.removexattr(qemu, XATTR)
    answer = host.run(capabilities=[qemu])
    assert (answer["recorded"], paths(answer["made"]), answer["changed"]) == ([], [qemu], True)
    assert host.run(capabilities=[qemu])["changed"] is False


def test_a_file_of_ours_that_has_become_a_link(host: Host) -> None:
    path = str(host.root / "u.service")
    host.run(files=[file(path)])
    os.unlink(path)
    os.symlink("/dev/null", path)
    for options in ({"files": [file(path)]}, {}):
        answer = host.run(**options)
        assert answer["failed"]
        assert f"{path} is a symbolic link" in answer["msg"]
    os.unlink(path)
    assert not host.run().get("failed")


@pytest.mark.parametrize(("content", "text"), [(b"\xff", None), (bytes(65537), None), (b"\xc3\xa9", "\u00e9")])
def test_content_that_is_shown(host: Host, content: bytes, text: str | None) -> None:
    path = host.file("f", content)
    (made,) = host.run(files=[file(path)])["made"]
    assert (made["content"], made["before"]) == (True, text)


def test_content_that_is_no_text_to_python(host: Host) -> None:
    """Ansible gives bytes that are none as lone surrogates."""
    path = host.root / "f"
    host.run(files=[file(path, "a\udcff\u00e9\n")])
    assert path.read_bytes() == b"a\xff\xc3\xa9\n"


def test_only_root(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "_ROOT", os.geteuid() + 1)
    for check_mode in (True, False):
        answer = host.run(_ansible_check_mode=check_mode, modules=["nvme"], files=[file(host.root / "f")])
        assert "takes root" in answer["msg"]
        assert "remembered" not in answer
        assert (answer["changed"], host.tree(), host.told()) == (False, {}, [])


def test_what_a_cut_leaves_of_a_new_file_goes(host: Host) -> None:
    """A run that is cut off before it puts the new file in the place of the old one leaves both."""
    old, conf = host.file("etc/old.conf", b"old"), host.file("etc/qemu.conf", b"a = 1\n")
    before = host.tree()
    host.run(files=[{"path": old, "content": "new"}], blocks=[{"path": conf, "devices": ["/dev/iommu"]}])
    host.file("etc/old.conf", b"old")
    host.file("etc/qemu.conf", b"a = 1\n")
    for path in (old, conf):
        Path(f"{path}.iommufd_host-new").write_bytes(b"new")
    host.run()
    assert host.tree() == before
