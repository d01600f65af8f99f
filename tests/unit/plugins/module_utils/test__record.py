# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The record's file, and who may act on it. What comes of it is in test_iommufd_host_apply.py."""

from __future__ import annotations

import errno
import json
import os
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
    Item,
    Record,
    RecordUnusable,
    check_caller,
    lock_record,
)
from ansible_collections.virt.iommufd.plugins.module_utils._states import FileState, NodeState
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import UnitState

OLD = FileState(b"old", 0o640, 1, 2, {"user.a": b"\xff"})
NODES = {"mode": "0600", "uid": 0, "gid": 36}
# One of each kind that was there, and of each that was not; in this order.
ITEMS = [
    Item(FILE, "/f", OLD.to_json(), ("/a", "/a/b")),
    Item(FILE, "/g", None),
    Item(BLOCK, "/b", {}),
    Item(BLOCK, "/c", None),
    Item(CAPABILITY, "/usr/bin/qemu", {"xattr": ""}),
    Item(CAPABILITY, "/usr/bin/kvm", {"xattr": None}),
    Item(UNIT, "u.path", {"enabled": True, "active": False}),
    Item(UNIT, "u.timer", None),
    Item(NODE, "/d/*", None),
    Item(NODE, "/d/1", NODES),
]


def test_what_an_item_stands_for() -> None:
    states = [item.state for item in ITEMS]
    assert states == [
        *(OLD, None, None, None, b"", None),
        *(UnitState(True, True, False), None, None, NodeState(0o600, 0, 36)),
    ]


def test_items_of_the_same_thing() -> None:
    """There is one of each, and the newest counts."""
    record = Record("/r/r", ITEMS[:2])
    newer = Item(FILE, "/f", None)
    record.add([newer, ITEMS[2]])
    assert record.items == [ITEMS[1], newer, ITEMS[2]]
    record.drop(ITEMS[0])
    assert record.items == [ITEMS[1], ITEMS[2]]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for the record of the user who runs the tests."""
    monkeypatch.setattr(_record, "_ROOT", os.geteuid())
    monkeypatch.setattr(_record, "_LOCK", f"{tmp_path}.lock")
    return str(tmp_path / "of_ours" / "record.json")


def test_the_record_on_disk(path: str) -> None:
    assert Record.load(path) == Record(path)
    record = Record(path, ITEMS, [("reload", "systemd"), ("relabel", "/a")])
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
        (b'{"version": 1, "due": [], "items": [{}]}', "is damaged"),
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
        # A module stays loaded, so none is ever recorded.
        (FILE, {"kind": "module"}),
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
    with pytest.raises(RecordUnusable, match=f"^{above} is not believed"), lock_record(path):
        pass
    os.chmod(above, 0o755)
    monkeypatch.setattr(_paths, "_TRUSTED", ())
    with pytest.raises(RecordUnusable, match=r"^/ is not believed, which user root \(uid 0\) can write"):
        Record.load(path)
    monkeypatch.setattr(_record, "_ROOT", os.geteuid() + 1)
    with pytest.raises(AccessRefused, match="takes root to change a host and to put it back"):
        check_caller()


def test_one_at_a_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "_LOCK_PATIENCE", 0.2)
    with lock_record(path), pytest.raises(IommufdError, match="Another run works with the record"), lock_record(path):
        pass
    with lock_record(path):
        pass
    with (
        pytest.raises(IommufdError, match=r"cannot be kept: .* is no folder that is there \(ENOENT"),
        lock_record(f"{path}/a/b"),
    ):
        pass


def test_what_the_system_refuses(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    Record(path).save()
    with monkeypatch.context() as refusing:
        refusing.setattr(_record, "reopen", refuse)
        with pytest.raises(RecordUnusable, match=f"^The record {path} cannot be read \\(EIO: "):
            Record.load(path)
    # A file is in the place of a folder.
    with (
        pytest.raises(IommufdError, match=r"cannot be kept: .* is no folder that is there \(ENOTDIR"),
        lock_record(f"{path}/a/b"),
    ):
        pass
    monkeypatch.setattr(_record, "_LOCK", f"{tmp_path}/none/lock")
    with pytest.raises(IommufdError, match=f"^{tmp_path}/none/lock cannot be opened \\(ENOENT"), lock_record(path):
        pass
