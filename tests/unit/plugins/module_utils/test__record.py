# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is decided, and the record's file. What comes of it is in test_iommufd_host_record.py."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _paths, _record
from ansible_collections.virt.iommufd.plugins.module_utils._errors import AccessRefused, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._record import (
    BLOCK,
    CAPABILITY,
    FILE,
    NODE,
    UNIT,
    Effect,
    Item,
    Record,
    RecordUnusable,
    Reload,
    RemoveFile,
    SetCapability,
    SetNode,
    StartUnit,
    StopUnit,
    View,
    Wanted,
    WriteFile,
    check_caller,
    locked,
    new_items,
    steps_back,
    to_grant,
)
from ansible_collections.virt.iommufd.plugins.module_utils._states import FileState, NodeState, UnitState

IPC_LOCK, NET_RAW = 1 << 14, 1 << 13


def xattr(permitted: int, effective: bool = True) -> bytes:
    return struct.pack("<5I", 0x02000000 | effective, permitted, 0, 0, 0)


GRANTED = xattr(IPC_LOCK)
QEMU = "/usr/bin/qemu"
OLD = FileState(b"old", 0o640, 1, 2, {"user.a": b"\xff"})
NEW = FileState(b"new", 0o644, 0, 0)
CONF = FileState(b"a\n# BEGIN iommufd_host\nx\n# END iommufd_host\nb", 0o600, 3, 4)
ONLY_BLOCK = FileState(b"# BEGIN iommufd_host\nx\n# END iommufd_host\n", 0o600, 3, 4)


def of_file(before: FileState | None, kind: str = FILE, folders: tuple[str, ...] = ()) -> Item:
    return Item(kind, "/f", None if before is None else before.to_json() if kind == FILE else {}, folders)


def of_qemu(before: bytes | None) -> Item:
    return Item(CAPABILITY, QEMU, {"xattr": None if before is None else before.hex()})


def of_unit(before: tuple[bool, bool] | None) -> Item:
    return Item(UNIT, "u.path", None if before is None else {"enabled": before[0], "active": before[1]})


def of_node(path: str, mode: str | None) -> Item:
    return Item(NODE, path, None if mode is None else {"mode": mode, "uid": 0, "gid": 0})


def effects(items: list[Item], view: View, wanted: Wanted | None = None) -> list[Effect]:
    """What is done. Every item that is not wanted is done with, once, whatever there was to do."""
    wanted = wanted or Wanted()
    steps = steps_back(Record("/r/r", items), wanted, view)
    done = [step.item for step in steps if step.item]
    assert len(done) == len(set(map(id, done)))
    if wanted == Wanted():
        assert {item.key for item in done} == {item.key for item in items}
    assert all(step.effect for step in steps if step.says)
    return [step.effect for step in steps if step.effect]


@pytest.mark.parametrize(
    ("item", "now", "effect"),
    [
        (of_file(None), NEW, RemoveFile("/f", ())),
        (of_file(None, folders=("/a",)), None, RemoveFile("/f", ("/a",))),
        (of_file(OLD), NEW, WriteFile("/f", OLD)),
        (of_file(OLD), None, WriteFile("/f", OLD)),
        (of_file(OLD), OLD, None),
        (of_file(None, BLOCK), ONLY_BLOCK, RemoveFile("/f", ())),
        (of_file(OLD, BLOCK), ONLY_BLOCK, WriteFile("/f", FileState(b"", 0o600, 3, 4))),
        (of_file(OLD, BLOCK), CONF, WriteFile("/f", FileState(b"a\nb", 0o600, 3, 4))),
        (of_file(None, BLOCK), CONF, WriteFile("/f", FileState(b"a\nb", 0o600, 3, 4))),
        (of_file(None, BLOCK), NEW, None),
        (of_file(None, BLOCK), None, RemoveFile("/f", ())),
        (of_file(OLD, BLOCK), None, None),
    ],
)
def test_a_file_back(item: Item, now: FileState | None, effect: Effect | None) -> None:
    assert effects([item], View(files={"/f": now})) == ([effect] if effect else [])


def test_the_diff_does_not_show_the_bytes_of_a_program() -> None:
    program = FileState(b"#!/usr/bin/python3\nPK\0\xff", 0o755, 0, 0)
    (step,) = steps_back(Record("/r/r", [of_file(None)]), Wanted(), View(files={"/f": program}))
    assert step.before == "(23 bytes that are no text)\n"


@pytest.mark.parametrize(
    ("before", "now", "after"),
    [
        (None, GRANTED, None),
        # Empty is not the same as none.
        (b"", GRANTED, b""),
        (xattr(NET_RAW), xattr(NET_RAW | IPC_LOCK), xattr(NET_RAW)),
        # It had it, but not effective.
        (xattr(IPC_LOCK, False), GRANTED, xattr(IPC_LOCK, False)),
        # Somebody has changed it since: only the one bit goes.
        (None, xattr(NET_RAW | IPC_LOCK), xattr(NET_RAW)),
        (xattr(NET_RAW), GRANTED, None),
        # By an earlier release, which knew no better.
        (struct.pack("<6I", 0x03000001, IPC_LOCK, 0, 0, 0, 1000), GRANTED, None),
        (None, xattr(IPC_LOCK, False), None),
        (
            b"",
            struct.pack("<5I", 0x02000001, IPC_LOCK, NET_RAW, 0, 0),
            struct.pack("<5I", 0x02000001, 0, NET_RAW, 0, 0),
        ),
    ],
)
def test_a_capability_back(before: bytes | None, now: bytes, after: bytes | None) -> None:
    assert effects([of_qemu(before)], View(xattrs={QEMU: now})) == [SetCapability(QEMU, after)]


@pytest.mark.parametrize(
    ("before", "xattrs"),
    [
        # The file is gone, was never granted to, or was replaced by a package.
        (None, {}),
        (None, {QEMU: None}),
        (xattr(NET_RAW), {QEMU: None}),
        (None, {QEMU: b""}),
        (None, {QEMU: xattr(NET_RAW)}),
        (xattr(IPC_LOCK, False), {QEMU: xattr(IPC_LOCK, False)}),
        # It is for another user namespace, and was never granted here.
        (None, {QEMU: struct.pack("<6I", 0x03000001, IPC_LOCK, 0, 0, 0, 1000)}),
    ],
)
def test_no_capability_to_take(before: bytes | None, xattrs: dict[str, bytes | None]) -> None:
    assert effects([of_qemu(before)], View(xattrs=xattrs)) == []


def test_a_capability_of_a_form_that_is_not_known() -> None:
    with pytest.raises(IommufdError, match=f"^{QEMU}: .* a form that is not known"):
        effects([of_qemu(None)], View(xattrs={QEMU: b"?"}))


KERNELS = NodeState(0o600, 0, 0)
OURS = NodeState(0o660, 0, 36)


@pytest.mark.parametrize(
    ("items", "nodes", "after"),
    [
        ([of_node("/d/1", "0640")], {"/d/1": OURS}, [SetNode("/d/1", NodeState(0o640, 0, 0), by_rules=False)]),
        ([of_node("/d/1", "0640")], {"/d/1": NodeState(0o640, 0, 0)}, []),
        ([of_node("/d/1", "0640")], {}, []),
        ([of_node("/d/1", None)], {"/d/1": OURS}, [SetNode("/d/1", KERNELS, by_rules=True)]),
        ([of_node("/d/1", None)], {"/d/1": KERNELS}, []),
        ([of_node("/d/1", None)], {}, []),
        # The one that came later is nobody's but the pattern's.
        (
            [of_node("/d/*", None), of_node("/d/1", "0600")],
            {"/d/1": OURS, "/d/2": OURS},
            [SetNode("/d/1", KERNELS, by_rules=False), SetNode("/d/2", KERNELS, by_rules=True)],
        ),
    ],
)
def test_nodes_back(items: list[Item], nodes: dict[str, NodeState], after: list[Effect]) -> None:
    matches = {item.path: [path for path in nodes if item.path in (path, "/d/*")] for item in items}
    view = View(nodes=nodes, kernels_nodes=dict.fromkeys(nodes, KERNELS), matches=matches)
    assert effects(items, view) == after


UNUSED, USED = UnitState(False, False, False), UnitState(True, True, True, ("u.service",))
STOP = StopUnit("u.path", ("u.service",), disable=True)
RELOAD = Reload(("systemd",))


@pytest.mark.parametrize(
    ("before", "now", "after"),
    [
        (None, USED, [STOP, RELOAD]),
        (None, UNUSED, []),
        # Cut off before it was stopped, or started by hand.
        (None, UnitState(True, False, True), [StopUnit("u.path", (), disable=True), RELOAD]),
        ((False, False), USED, [STOP, RELOAD]),
        ((False, True), USED, [STOP, RELOAD, StartUnit("u.path", UnitState(True, False, True))]),
        # Cut off in between.
        ((True, False), UNUSED, [StartUnit("u.path", UnitState(True, True, False))]),
    ],
)
def test_a_unit_back(before: tuple[bool, bool] | None, now: UnitState, after: list[Effect]) -> None:
    assert effects([of_unit(before)], View(units={"u.path": now})) == after


def test_the_order() -> None:
    rule, unit = "/etc/udev/rules.d/1.rules", "/etc/systemd/system/u.path"
    items = [
        *(of_node("/d/1", "0600"), of_unit((True, True)), of_qemu(None)),
        *(Item(FILE, path, None) for path in (rule, unit)),
        of_file(OLD, BLOCK),
    ]
    view = View(
        files={rule: NEW, unit: NEW, "/f": CONF},
        xattrs={QEMU: GRANTED},
        units={"u.path": USED},
        nodes={"/d/1": OURS},
        matches={"/d/1": ["/d/1"]},
    )
    kinds = [type(effect).__name__ for effect in effects(items, view)]
    assert kinds == [
        *("StopUnit", "RemoveFile", "RemoveFile", "WriteFile", "SetCapability"),
        *("Reload", "SetNode", "StartUnit"),
    ]
    steps = steps_back(Record("/r/r", items), Wanted(), view)
    # The newest first.
    assert [step.about for step in steps][1:3] == [unit, rule]


@pytest.mark.parametrize("active", [True, False])
def test_units_that_stay_must_not_grant_it_again(active: bool) -> None:
    view = View(xattrs={QEMU: GRANTED}, units={"u.path": UnitState(True, True, active, ("u.service",))})
    pause = StopUnit("u.path", ("u.service",), disable=False)
    done = effects([of_unit(None), of_qemu(None)], view, Wanted(units=("u.path",)))
    assert done == [*([pause] if active else []), SetCapability(QEMU, None)]
    # With nothing to take they need not be stopped.
    assert (
        effects([of_unit(None), of_qemu(xattr(NET_RAW))], View(xattrs={}, units=view.units), Wanted(units=("u.path",)))
        == []
    )


def test_what_is_wanted_stays() -> None:
    items = [of_file(None), of_qemu(None), of_unit(None), of_node("/d/*", None), of_node("/d/gone", "0600")]
    items.append(Item(BLOCK, "/b", {}))
    wanted = Wanted(("/f",), ("/usr/bin/kvm",), ("/d/*",), ("/b",), ("u.path",))
    view = View(
        files={"/f": NEW, "/b": CONF}, real={"/usr/bin/kvm": QEMU}, xattrs={QEMU: GRANTED}, units={"u.path": USED}
    )
    view.missing.update({"/f": [], "/b": []})
    assert steps_back(Record("/r/r", items), wanted, view) == []
    assert new_items(Record("/r/r", items), wanted, view) == []


def record_qemu(known: list[Item], now: bytes | None) -> list[Item]:
    view = View(real={QEMU: QEMU}, xattrs={QEMU: now})
    return new_items(Record("/r/r", known), Wanted(capabilities=(QEMU,)), view)


def test_capabilities_that_are_recorded() -> None:
    for now in (None, b"", xattr(NET_RAW), xattr(IPC_LOCK, False)):
        assert record_qemu([], now) == [of_qemu(now)]
        # Granted, or about to be.
        assert record_qemu([of_qemu(now)], now) == []
        assert record_qemu([of_qemu(now)], GRANTED) == []
    # It was granted by somebody else.
    assert record_qemu([], GRANTED) == []
    # A new version of the package brings other ones.
    assert record_qemu([of_qemu(None)], xattr(NET_RAW)) == [of_qemu(xattr(NET_RAW))]
    assert record_qemu([of_qemu(b"")], None) == [of_qemu(None)]
    with pytest.raises(IommufdError, match=f"^{QEMU}: It has cap_net_raw that are not effective"):
        record_qemu([], xattr(NET_RAW, False))


def test_capabilities_that_are_granted() -> None:
    view = View(
        real={"/usr/bin/kvm": QEMU, "/b": "/b", "/c": "/c"}, xattrs={QEMU: None, "/b": xattr(NET_RAW), "/c": GRANTED}
    )
    assert to_grant(view) == {QEMU: GRANTED, "/b": xattr(NET_RAW | IPC_LOCK)}
    view.xattrs["/c"] = struct.pack("<6I", 0x03000001, IPC_LOCK, 0, 0, 0, 1000)
    with pytest.raises(IommufdError, match=r"^/c: .* are for the user namespace of uid 1000 only"):
        to_grant(view)


def test_nodes_that_are_recorded() -> None:
    wanted = Wanted(nodes=("/d/*", "/d/1"))
    view = View(nodes={"/d/1": KERNELS}, matches={"/d/*": ["/d/1"], "/d/1": ["/d/1"]})
    items = [of_node("/d/*", None), of_node("/d/1", "0600")]
    assert new_items(Record("/r/r"), wanted, view) == items
    # What has come since has come under the caller's rule.
    view.matches["/d/*"].append("/d/2")
    assert (
        new_items(Record("/r/r", items), wanted, View(nodes={"/d/1": OURS, "/d/2": OURS}, matches=view.matches)) == []
    )


def test_a_folder_goes_with_the_last_of_its_files() -> None:
    first = Item(FILE, "/a/b/1", None, ("/a", "/a/b"))
    view = View(files={"/a/b/2": None, "/ab/3": None}, missing={"/a/b/2": [], "/ab/3": ["/ab"]})
    (second, third) = new_items(Record("/r/r", [first]), Wanted(files=("/a/b/2", "/ab/3")), view)
    assert (second.folders, third.folders) == (("/a", "/a/b"), ("/ab",))


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ({"files": ["etc/x"]}, "'etc/x' is no absolute path"),
        ({"nodes": ["/dev/../etc"]}, "in its shortest form"),
        ({"nodes": ["/dev/*/0"]}, "'/dev/\\*/0' may be a pattern in its last part only"),
        ({"blocks": ["/etc/"]}, "in its shortest form"),
        ({"capabilities": ["/etc/\0"]}, "in its shortest form"),
        ({"files": ["/b", "/a"], "blocks": ["/a"]}, "^/a is listed as a whole file and for a block"),
        ({"units": ["--now"]}, "'--now' is not the name of a systemd"),
        ({"units": ["a b.path"]}, "is not the name of a systemd"),
        ({"units": ["a.mount"]}, "is not the name of a systemd"),
    ],
)
def test_what_may_not_be_listed(lists: dict[str, list[str]], why: str) -> None:
    with pytest.raises(IommufdError, match=why):
        Wanted.of(lists)


def test_what_may_be_listed() -> None:
    lists = {"files": ["/a", "/b", "/a"], "units": ["a@b.service", "\\x2d.timer"]}
    assert Wanted.of(lists) == Wanted(files=("/a", "/b"), units=("a@b.service", "\\x2d.timer"))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for the record of the user who runs the tests."""
    monkeypatch.setattr(_record, "_ROOT", os.geteuid())
    monkeypatch.setattr(_record, "_LOCK", f"{tmp_path}.lock")
    return str(tmp_path / "of_ours" / "record.json")


ITEMS = [
    of_file(OLD, folders=("/a", "/a/b")),
    of_file(None, BLOCK),
    of_qemu(b""),
    of_qemu(None),
    of_unit((True, False)),
]
ITEMS += [of_node("/d/*", None), of_node("/d/1", "0600")]


def test_the_record_on_disk(path: str) -> None:
    assert Record.load(path) == Record(path)
    record = Record(path, ITEMS, ["systemd"])
    record.save()
    assert Record.load(path) == record
    assert [os.stat(each).st_mode & 0o777 for each in (path, record.folder)] == [0o600, 0o700]
    record.save()
    assert os.listdir(record.folder) == ["record.json"]
    # What a run has left that was cut off.
    Path(f"{path}.iommufd_host-new").write_bytes(b"{")
    record.remove()
    assert not os.path.lexists(record.folder)
    record.remove()


def test_the_folder_stays_with_what_else_is_in_it(path: str) -> None:
    record = Record(path)
    record.save()
    other = Path(record.folder) / "other"
    other.write_bytes(b"")
    record.remove()
    assert os.listdir(record.folder) == ["other"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is damaged \\(JSONDecodeError: .* Bring it back from a backup"),
        (b"\xff\xfe", "is damaged"),
        (b"[]", "is damaged"),
        (b"{}", "is damaged \\(KeyError: 'version'"),
        (b'{"version": 1, "reloads": [], "items": [{}]}', "is damaged"),
        (b'{"version": 2}', "is of version 2, and this release knows version 1 only"),
    ],
)
def test_a_record_that_cannot_be_read(path: str, content: bytes, why: str) -> None:
    os.mkdir(os.path.dirname(path), 0o700)
    Path(path).write_bytes(content)
    with pytest.raises(RecordUnusable, match=f"^The record {path} {why}"):
        Record.load(path)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (FILE, {"kind": "other"}),
        (FILE, {"path": "f"}),
        (FILE, {"path": 1}),
        (FILE, {"folders": ["a"]}),
        (FILE, {"before": {"content": "?", "mode": "0644", "uid": 0, "gid": 0, "xattrs": {}}}),
        (FILE, {"before": {"content": "", "mode": "0689", "uid": 0, "gid": 0, "xattrs": {}}}),
        (FILE, {"before": []}),
        (CAPABILITY, {"before": {"xattr": "0"}}),
        (CAPABILITY, {"before": {}}),
        (NODE, {"before": {"mode": None, "uid": 0, "gid": 0}}),
        (UNIT, {"before": {"enabled": True}}),
    ],
)
def test_an_entry_that_cannot_be_read(path: str, kind: str, change: dict[str, Any]) -> None:
    record = Record(path, ITEMS)
    record.save()
    given = json.loads(Path(path).read_text())
    next(item for item in given["items"] if item["kind"] == kind).update(change)
    Path(path).write_text(json.dumps(given))
    with pytest.raises(RecordUnusable, match="is damaged"):
        Record.load(path)


def test_whose_record_is_believed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(path)
    record.save()
    for each in (path, record.folder):
        before = os.stat(each).st_mode
        os.chmod(each, before | 0o020)
        with pytest.raises(RecordUnusable, match=f"^{each} is not believed"):
            Record.load(path)
        os.chmod(each, before)
    assert Record.load(path) == record
    os.rename(path, f"{path}.moved")
    os.symlink(f"{path}.moved", path)
    with pytest.raises(RecordUnusable, match=f"^{path} is not believed: the record is a regular file"):
        Record.load(path)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(RecordUnusable, match=f"^{path} is not believed: the record is a regular file"):
        Record.load(path)
    above = os.path.dirname(record.folder)
    os.chmod(above, 0o777)
    for act in (record.save, record.remove):
        with pytest.raises(IommufdError, match=f"{above} can be written by everybody"):
            act()
    with pytest.raises(RecordUnusable, match=f"^{above} is not believed, which everybody can write"):
        Record.load(path)
    with pytest.raises(RecordUnusable, match=f"^{above} is not believed"), locked(path):
        pass
    os.chmod(above, 0o755)
    monkeypatch.setattr(_paths, "_TRUSTED", ())
    with pytest.raises(RecordUnusable, match=r"^/ is not believed, which user root \(uid 0\) can write"):
        Record.load(path)
    monkeypatch.setattr(_record, "_ROOT", os.geteuid() + 1)
    with pytest.raises(AccessRefused, match="takes root to put a host back"):
        check_caller()


def test_one_at_a_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "_LOCK_PATIENCE", 0.2)
    with locked(path), pytest.raises(IommufdError, match="Another run works with the record"), locked(path):
        pass
    with locked(path):
        pass
    with (
        pytest.raises(IommufdError, match=r"cannot be kept: .* is no folder that is there \(ENOENT"),
        locked(f"{path}/a/b"),
    ):
        pass
