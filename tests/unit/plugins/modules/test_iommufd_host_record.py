# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import hashlib
import json
import os
import pty
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import basic
from ansible_collections.virt.iommufd.plugins.module_utils import _grant, _record, _states
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._states import NodeState
from ansible_collections.virt.iommufd.plugins.modules import iommufd_host_record

Answer = dict[str, Any]

GRANTED = struct.pack("<5I", 0x02000001, 1 << 14, 0, 0, 0)
NET_RAW_TOO = struct.pack("<5I", 0x02000001, 3 << 13, 0, 0, 0)
BLOCK = b"# BEGIN iommufd_host\ncgroup_device_acl = [ '/dev/iommu' ]\n# END iommufd_host\n"


class FakeSystemd:
    """Knows units, and does to them what systemctl is told. tests/kernel has the real one."""

    def __init__(self) -> None:
        self.units: dict[str, dict[str, str]] = {}
        self.told: list[str] = []
        self.broken = ""

    def add(self, name: str, enabled: str, active: str, triggers: str = "") -> None:
        self.units[name] = {
            "LoadState": "loaded",
            "UnitFileState": enabled,
            "ActiveState": active,
            "Triggers": triggers,
        }

    def run(self, words: list[str]) -> tuple[int, str, str]:
        """Answers a command."""
        program, verb, *rest = words
        if self.broken and verb == self.broken:
            return 1, "", "Broken\n"
        names = rest[rest.index("--") + 1 :] if "--" in rest else []
        if verb == "show":
            none = {"LoadState": "not-found", "UnitFileState": "", "ActiveState": "inactive"}
            shown = [self.units.get(name, none) for name in names]
            return 0, "\n".join("".join(f"{key}={unit[key]}\n" for key in unit) for unit in shown), ""
        for name in names:
            if name not in self.units:
                return 5, "", f"Unit {name} not loaded."
            wanted = {"disable": ("UnitFileState", "disabled"), "enable": ("UnitFileState", "enabled")}
            wanted.update({"stop": ("ActiveState", "inactive"), "start": ("ActiveState", "active")})
            if verb in wanted:
                self.units[name].update([wanted[verb]])
        if not names:
            self.told.append(" ".join([program, verb, *rest]))
        return 0, "", ""


class Host:
    """A few folders that stand for a host, and the module that works on them."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.record = root, root / "lib" / "record.json"
        self.systemd = FakeSystemd()
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def run(self, **options: Any) -> Answer:
        """The module's answer."""
        options = {"record": str(self.record), **options}
        self._monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": options}).encode())
        self._monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
        with pytest.raises(SystemExit):
            iommufd_host_record.main()
        answer: Answer = json.loads(self._capsys.readouterr().out)
        return answer

    def file(self, name: str, content: bytes = b"", mode: int = 0o644) -> str:
        """Writes a file, as somebody else or as the role."""
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
            found[str(path)] = (path.stat().st_mode, content, xattrs)
        return found


@pytest.fixture
def host(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path, capsys, monkeypatch)
    monkeypatch.setattr(_record, "_ROOT", os.geteuid())
    monkeypatch.setattr(_record, "_LOCK", f"{tmp_path}.lock")
    # Only root may set the real one; tests/kernel does.
    monkeypatch.setattr(_states, "_CAPABILITY", "user.stands.in")
    monkeypatch.setattr(_record, "_TOLD", {f"{tmp_path}/systemd/": "systemd", f"{tmp_path}/udev/": "udev"})
    for name in ("_SYSTEMD_RUNS", "_UDEV_RUNS"):
        monkeypatch.setattr(_record, name, str(tmp_path))
    monkeypatch.setattr(iommufd_host_record, "run_command", host.systemd.run)
    return host


def grant(path: str, xattr: bytes = GRANTED) -> None:
    os.setxattr(path, "user.stands.in", xattr)


@pytest.fixture
def terminal() -> Iterator[str]:
    ours, theirs = pty.openpty()
    yield os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


def test_there_and_back(host: Host, terminal: str) -> None:
    """The life of a role's grants: record, change, again, put back."""
    old = host.file("etc/old.conf", b"old", 0o640)
    qemu, conf = host.file("bin/qemu", b"\x7fELF", 0o755), host.file("etc/qemu.conf", b"a = 1\nb = 2", 0o600)
    os.symlink(qemu, host.root / "bin" / "kvm")
    os.chmod(terminal, 0o620)
    before = host.tree()
    new, rule, unit = (str(host.root / name) for name in ("etc/new.d/x/new.conf", "udev/1.rules", "systemd/u.path"))
    wanted = {
        "files": [old, new, rule, unit],
        "capabilities": [str(host.root / "bin" / "kvm")],
        "nodes": [terminal, f"{terminal}?"],
        "blocks": [conf],
        "units": ["u.path"],
    }
    foretold = host.run(_ansible_check_mode=True, **wanted)
    assert host.tree() == before
    assert (foretold["changed"], foretold["granted"]) == (True, [qemu])
    assert foretold["capabilities"][str(host.root / "bin" / "kvm")]["ipc_lock"] is False
    first = host.run(_ansible_diff=True, **wanted)
    assert (first["changed"], first["granted"], first["put_back"]) == (True, [qemu], [])
    assert first["diff"] == [
        {
            "before_header": qemu,
            "after_header": qemu,
            "before": "",
            "after": "permitted: cap_ipc_lock\ninheritable: \neffective: true\n",
        }
    ]
    assert os.getxattr(qemu, "user.stands.in") == GRANTED
    assert (first["recorded"], first["remembered"]) == (foretold["recorded"], foretold["remembered"])
    assert [each["path"] for each in first["recorded"]] == [
        old,
        new,
        rule,
        unit,
        conf,
        terminal,
        f"{terminal}?",
        "u.path",
        qemu,
    ]
    assert first["capabilities"][str(host.root / "bin" / "kvm")] == {
        "real_path": qemu,
        "ipc_lock": True,
        "ours": True,
        "other": [],
    }
    assert first["files"][old]["content"] == "old"
    assert first["files"][old]["sha256"] == hashlib.sha256(b"old").hexdigest()
    missing = [f"{host.root}/etc/new.d", f"{host.root}/etc/new.d/x"]
    nothing = {"exists": False, "content": None, "sha256": None, "mode": None, "owner": None, "group": None}
    assert first["files"][new] == {**nothing, "missing": missing}
    assert first["nodes"][terminal]["mode"] == "0620"
    assert first["nodes"][f"{terminal}?"]["exists"] is False
    assert first["units"] == {"u.path": {"exists": False, "enabled": False, "active": False}}
    # The role.
    for name in (old, new, rule, unit):
        host.file(os.path.relpath(name, host.root), b"of the role")
    host.file("etc/qemu.conf", BLOCK + b"a = 1\nb = 2", 0o600)
    os.chmod(terminal, 0o666)
    host.systemd.add("u.path", "enabled", "active", "u.service")
    host.systemd.add("u.service", "static", "failed")
    changed = host.tree()
    # Once more.
    second = host.run(**wanted)
    assert (second["changed"], second["recorded"], second["remembered"]) == (False, [], first["remembered"])
    assert second["capabilities"][str(host.root / "bin" / "kvm")]["ipc_lock"] is True
    assert second["blocks"][conf]["content"] == "cgroup_device_acl = [ '/dev/iommu' ]\n"
    assert second["blocks"][conf]["cgroup_device_acl"] is None
    assert second["units"]["u.path"]["enabled"] is True
    assert host.tree() == changed
    # Back.
    foretold = host.run(_ansible_check_mode=True, _ansible_diff=True)
    assert host.tree() == changed
    assert foretold["remembered"] == []
    assert [each["before_header"] for each in foretold["diff"]] == [
        *("u.path", unit, rule, new, old, conf, qemu, terminal)
    ]
    assert foretold["diff"][3:5] == [
        {"before_header": new, "after_header": new, "before": "of the role", "after": ""},
        {"before_header": old, "after_header": old, "before": "of the role", "after": "old"},
    ]
    back = host.run()
    assert back["changed"]
    assert back["put_back"] == foretold["put_back"]
    assert back["put_back"][0] == "u.path is disabled and stopped."
    assert host.systemd.units["u.path"]["UnitFileState"] == "disabled"
    assert host.systemd.units["u.service"]["ActiveState"] == "inactive"
    assert host.systemd.told == ["systemctl daemon-reload", "udevadm control --reload"]
    assert os.stat(terminal).st_mode & 0o777 == 0o620
    assert host.tree() == before
    again = host.run()
    assert (again["changed"], again["put_back"], again["remembered"]) == (False, [], [])


def test_all_that_is_returned_is_documented(host: Host) -> None:
    documented = yaml.safe_load(iommufd_host_record.RETURN)
    wanted = {"files": [host.file("f")], "capabilities": [host.file("q", b"", 0o755)], "nodes": ["/dev/null"]}
    wanted.update({"blocks": [host.file("b")], "units": ["u.path"]})
    answer = host.run(**wanted)
    assert set(answer) - {"changed", "invocation"} == set(documented)
    for name in ("recorded", "remembered"):
        assert all(set(each) == set(documented[name]["contains"]) for each in answer[name])
        assert {each["kind"] for each in answer[name]} == {"file", "capability", "node", "block", "unit"}
    for name in wanted:
        ((_path, sample),) = documented[name]["sample"].items()
        ((_path, row),) = answer[name].items()
        assert set(row) == set(sample)
    # No content of a file is shown where nobody asked for it.
    assert "content" not in json.dumps(answer["remembered"])


def test_what_somebody_else_granted(host: Host) -> None:
    qemu = host.file("qemu", b"", 0o755)
    grant(qemu, NET_RAW_TOO)
    answer = host.run(capabilities=[qemu])
    assert answer["capabilities"][qemu] == {
        "real_path": qemu,
        "ipc_lock": True,
        "ours": False,
        "other": ["cap_net_raw"],
    }
    assert answer["recorded"] == []
    # Nothing was to be remembered.
    assert not host.record.exists()
    assert not host.run()["changed"]
    assert os.getxattr(qemu, "user.stands.in") == NET_RAW_TOO


def test_a_second_strategy_takes_the_first_ones_grants_back(host: Host) -> None:
    qemu, other = host.file("qemu", b"", 0o755), str(host.root / "a" / "limits.conf")
    host.run(capabilities=[qemu], units=["u.path"])
    grant(qemu)
    host.systemd.add("u.path", "enabled", "active", "u.service")
    host.systemd.add("u.service", "static", "active")
    answer = host.run(files=[other], units=["u.path"])
    assert answer["put_back"] == [
        "u.path is stopped until it is started with what it has to do now.",
        f"CAP_IPC_LOCK is taken from {qemu}.",
    ]
    assert "user.stands.in" not in os.listxattr(qemu)
    assert answer["units"]["u.path"] == {"exists": True, "enabled": True, "active": False}
    assert host.systemd.units["u.service"]["ActiveState"] == "inactive"
    assert [each["path"] for each in answer["remembered"]] == ["u.path", other]


def test_a_unit_that_was_in_use_is_again(host: Host) -> None:
    host.systemd.add("u.timer", "enabled", "active")
    host.run(units=["u.timer"])
    assert host.run()["put_back"] == ["u.timer is disabled and stopped.", "u.timer is enabled, active again."]
    assert host.systemd.units["u.timer"]["ActiveState"] == "active"


def test_nodes_that_came_later(host: Host, terminal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run(nodes=[f"{terminal}*", "/dev/none"])
    record = json.loads(host.record.read_text())
    record["items"] = [item for item in record["items"] if item["path"] != terminal]
    host.record.write_text(json.dumps(record))
    os.chmod(terminal, 0o666)
    answer = host.run(nodes=[f"{terminal}*"])
    assert answer["recorded"] == []
    # Only root could give it to root.
    kernels = NodeState(0o600, os.getuid(), os.getgid())
    monkeypatch.setattr(_record, "kernels_node", lambda _path: kernels)
    answer = host.run()
    assert answer["put_back"] == [
        f"{terminal} is as the kernel and the rules of udev make it: {kernels}, if there is no other rule."
    ]
    assert os.stat(terminal).st_mode & 0o777 == 0o600
    assert host.systemd.told == [f"udevadm trigger --settle --action=change {terminal}"]


@pytest.mark.parametrize("running", [True, False])
def test_nobody_is_told_who_is_not_there(host: Host, running: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SYSTEMD_RUNS", "_UDEV_RUNS"):
        monkeypatch.setattr(_record, name, str(host.root / ("" if running else "none")))
    paths = [str(host.root / name) for name in ("systemd/u.service", "udev/1.rules")]
    host.run(files=paths)
    for path in paths:
        host.file(os.path.relpath(path, host.root))
    assert host.run()["changed"]
    assert bool(host.systemd.told) == running
    assert not host.record.parent.exists()


def test_what_fails_half_way(host: Host) -> None:
    unit, qemu = str(host.root / "systemd" / "u.service"), host.file("qemu", b"", 0o755)
    host.run(files=[unit], capabilities=[qemu])
    host.file("systemd/u.service")
    grant(qemu)
    host.systemd.broken = "daemon-reload"
    answer = host.run(_ansible_diff=True)
    assert answer["failed"]
    assert answer["changed"]
    assert answer["put_back"] == [f"{unit} is removed.", f"CAP_IPC_LOCK is taken from {qemu}."]
    assert answer["msg"] == (
        "systemd and udev could not be put back: 'systemctl daemon-reload' failed: Broken."
        f" {unit} is removed. CAP_IPC_LOCK is taken from {qemu}. The record {host.record} still names what is not back:"
        " remove the cause, and run this again."
    )
    host.systemd.broken = ""
    answer = host.run(files=[qemu])
    assert host.systemd.told == ["systemctl daemon-reload"]
    assert not answer["changed"]
    assert json.loads(host.record.read_text())["reloads"] == []


def test_what_the_system_refuses(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path = host.file("old", b"old")
    host.run(files=[path])
    host.file("old", b"new")
    rename = os.rename

    def refuse(source: str, target: str, **folders: int) -> None:
        if target == "old":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", refuse)
    answer = host.run()
    assert answer["failed"]
    assert not answer["changed"]
    assert answer["msg"].startswith(
        f"{path} could not be put back: EROFS: Read-only file system. Nothing was put back before that. The record"
    )
    assert [each["path"] for each in answer["remembered"]] == [path]
    monkeypatch.setattr(os, "rename", rename)
    host.run()
    assert Path(path).read_bytes() == b"old"


def test_a_record_that_cannot_be_written(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: str, _mode: int, **_folder: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", refuse)
    answer = host.run(files=[str(host.root / "f")])
    assert answer["failed"]
    assert answer["msg"] == f"The record {host.record} cannot be written (ENOSPC: No space left on device)."


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"files": ["{root}/link"]}, "is a symbolic link, which is left alone"),
        ({"files": ["relative"]}, "'relative' is no absolute path"),
        ({"record": "relative"}, "'relative' is no absolute path"),
        ({"record": "{root}/none/none/record.json"}, "cannot be kept"),
        ({"capabilities": ["{root}/none"]}, "is no executable file, so it cannot get CAP_IPC_LOCK"),
        ({"capabilities": ["{root}/old"]}, "is no executable file"),
        ({"capabilities": ["{root}/odd"]}, "a form that is not known"),
        ({"blocks": ["{root}/half"]}, "without the other"),
        ({"nodes": ["{root}/old"]}, "is no device node"),
        ({"capabilities": ["{root}/a_users"]}, "are for the user namespace of uid 1000 only"),
        ({"capabilities": ["{root}/writable"]}, "{root}/writable can be written by everybody"),
        ({"capabilities": ["{root}/theirs/qemu"]}, "{root}/theirs can be written by group"),
        ({"files": ["{root}/theirs/new"]}, "{root}/theirs can be written by group"),
        ({"files": ["{root}/writable"]}, "{root}/writable can be written by everybody"),
        ({"blocks": ["{root}/writable"]}, "{root}/writable can be written by everybody"),
        ({"nodes": ["{root}/theirs/*"]}, "{root}/theirs can be written by group"),
        ({"nodes": ["/dev/*/1"]}, "in its last part only"),
        ({"units": ["u.mount"]}, "is not the name of a systemd"),
    ],
)
def test_what_is_refused_changes_nothing(host: Host, options: dict[str, Any], why: str) -> None:
    path = host.file("old", b"old")
    host.run(files=[path])
    host.file("old", b"new")
    host.file("half", b"# BEGIN iommufd_host\n")
    grant(host.file("odd", b"", 0o755), b"?")
    grant(host.file("a_users", b"", 0o755), struct.pack("<6I", 0x03000001, 1 << 14, 0, 0, 0, 1000))
    host.file("writable", b"", 0o777)
    host.file("theirs/qemu", b"", 0o755)
    (host.root / "theirs").chmod(0o775)
    os.symlink("old", host.root / "link")
    before = host.tree()
    given = {
        name: value.format(root=host.root)
        if isinstance(value, str)
        else [each.format(root=host.root) for each in value]
        for name, value in options.items()
    }
    for check_mode in (True, False):
        answer = host.run(_ansible_check_mode=check_mode, **given)
        assert answer["failed"]
        assert why.format(root=host.root) in answer["msg"]
        assert (answer["changed"], answer["put_back"], answer["granted"]) == (False, [], [])
        assert host.tree() == before


def test_a_folder_that_others_got_since(host: Host) -> None:
    """What was recorded is put back by no other way than by folders that are root's alone."""
    path, qemu = host.file("a/conf", b"of root"), host.file("bin/qemu", b"", 0o755)
    host.run(files=[path], capabilities=[qemu])
    host.file("a/conf", b"of the role")
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


def test_a_folder_that_is_swapped_at_the_last_moment(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path = host.file("a/conf", b"of root")
    host.run(files=[path])
    host.file("a/conf", b"of the role")
    victim = host.file("victim/conf", b"somebody else's")

    def swap(*arguments: Any) -> Any:
        (host.root / "a").rename(host.root / "b")
        (host.root / "a").symlink_to("victim")
        (host.root).chmod(0o777)
        return put_back(*arguments)

    put_back = _record.put_back
    monkeypatch.setattr(iommufd_host_record, "put_back", swap)
    answer = host.run()
    host.root.chmod(0o755)
    assert answer["failed"]
    assert f"{path} could not be put back" in answer["msg"]
    assert f"{host.root} can be written by everybody" in answer["msg"]
    assert Path(victim).read_bytes() == b"somebody else's"


def test_what_others_write_after_it_was_recorded(host: Host) -> None:
    """A file that a role writes as a whole goes back, whoever can write it by now."""
    path = host.file("f", b"of root")
    host.run(files=[path])
    host.file("f", b"of anybody", 0o666)
    assert host.run(files=[path])["files"][path]["mode"] == "0666"
    assert host.run()["changed"]
    assert (Path(path).read_bytes(), Path(path).stat().st_mode & 0o777) == (b"of root", 0o644)


def test_a_grant_that_fails(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [host.file(name, b"", 0o755) for name in ("q1", "q2")]

    def fail(path: str) -> bool:
        if path == paths[1]:
            raise IommufdError("no")
        return _grant.grant_patiently(path)

    monkeypatch.setattr(iommufd_host_record, "grant_patiently", fail)
    answer = host.run(capabilities=paths)
    assert (answer["failed"], answer["msg"], answer["changed"], answer["granted"]) == (True, "no", True, paths[:1])
    # It will be taken back all the same.
    assert [each["path"] for each in answer["remembered"]] == paths
    assert host.run()["put_back"] == [f"CAP_IPC_LOCK is taken from {paths[0]}."]


def test_a_grant_that_fails_after_something_was_put_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path, qemu = host.file("f", b"old"), host.file("qemu", b"", 0o755)
    host.run(files=[path])
    host.file("f", b"new")

    def fail(_path: str) -> bool:
        raise IommufdError("no")

    monkeypatch.setattr(iommufd_host_record, "grant_patiently", fail)
    answer = host.run(capabilities=[qemu])
    assert (answer["failed"], answer["changed"], answer["granted"]) == (True, True, [])
    assert answer["put_back"] == [f"{path} is what it was."]


def test_a_grant_that_was_cut_off(host: Host) -> None:
    qemu = host.file("qemu", b"", 0o755)
    host.run(capabilities=[qemu])
    # Recorded, but not granted yet.
    os.removexattr(qemu, "user.stands.in")
    answer = host.run(capabilities=[qemu])
    assert (answer["recorded"], answer["granted"], answer["changed"]) == ([], [qemu], True)
    assert host.run(capabilities=[qemu])["changed"] is False


def test_a_file_of_ours_that_has_become_a_link(host: Host) -> None:
    path = str(host.root / "u.service")
    host.run(files=[path])
    os.symlink("/dev/null", path)
    answer = host.run()
    assert answer["failed"]
    assert f"{path} is a symbolic link" in answer["msg"]
    os.unlink(path)
    assert not host.run().get("failed")


@pytest.mark.parametrize(("content", "text"), [(b"\xff", None), (bytes(65537), None), (b"\xc3\xa9", "\u00e9")])
def test_content_that_is_shown(host: Host, content: bytes, text: str | None) -> None:
    path = host.file("f", content)
    assert host.run(files=[path])["files"][path]["content"] == text


def test_only_root(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "_ROOT", os.geteuid() + 1)
    assert "takes root" in host.run()["msg"]
