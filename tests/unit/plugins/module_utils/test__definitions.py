# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Definitions of domains, in folders that stand for libvirt's. What a real libvirt writes is in tests/kernel."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _defined_rows, _definitions, _paths, _running
from ansible_collections.virt.iommufd.plugins.module_utils._definitions import find_domains
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._user import User

XML = "<domain type='kvm'{}><name>{}</name><memory unit='GiB'>1</memory><devices/></domain>"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the root of a file system with a libvirt's folders."""
    for name in ("_FOLDER", "_NETWORKS", "_RECORDS", "_SAVES"):
        monkeypatch.setattr(_definitions, name, f"{tmp_path}{getattr(_definitions, name)}")
        Path(getattr(_definitions, name)).mkdir(parents=True)
    monkeypatch.setattr(_running, "_FOLDER", _definitions._RECORDS)
    monkeypatch.setattr(_running, "_LIBVIRT_UID", os.getuid())
    (tmp_path / "etc/libvirt/qemu/autostart").mkdir()
    return tmp_path


def define(host: Path, name: str, text: str | None = None) -> Path:
    path = host / f"etc/libvirt/qemu/{name}.xml"
    path.write_text(XML.format("", name) if text is None else text)
    return path


def record(host: Path, name: str, pid: int, file: str | None = None) -> Path:
    path = host / f"run/libvirt/qemu/{file or name}.xml"
    inner = XML.format(" id='1'", name)
    path.write_text(f"<domstatus state='running' pid='{pid}'>{inner}</domstatus>")
    return path


def found() -> dict[str, Any]:
    rows, msgs = find_domains([])
    assert msgs == []
    return {row["name"]: row for row in rows}


def test_a_host_without_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FOLDER", "_NETWORKS", "_RECORDS"):
        monkeypatch.setattr(_definitions, name, f"{tmp_path}/none")
    assert find_domains([]) == ([], [])


def test_domains_that_are_defined(host: Path) -> None:
    for name in ("b", "a", "c"):
        define(host, name)
    autostart = host / "etc/libvirt/qemu/autostart"
    (autostart / "a.xml").symlink_to("../a.xml")
    # It leads to another one than that of its name, and to nothing.
    (autostart / "b.xml").symlink_to("../a.xml")
    (autostart / "c.xml").symlink_to("/nowhere")
    rows = found()
    assert list(rows) == ["a", "b", "c"]
    assert [each["autostart"] for each in rows.values()] == [True, False, False]
    assert {each["path"] for each in rows.values()} == {f"{host}/etc/libvirt/qemu/{name}.xml" for name in "abc"}
    assert [each["unread"] for each in rows.values()] == [[], [], []]


def test_domains_with_a_managed_save(host: Path) -> None:
    """What counts then is in the save, of another time."""
    for name in ("a", "b"):
        define(host, name)
    (host / "var/lib/libvirt/qemu/save/b.save").write_bytes(b"LibvirtQemudSave")
    (host / "var/lib/libvirt/qemu/save/c.save").write_bytes(b"LibvirtQemudSave")
    rows = found()
    assert [each["unread"] for each in rows.values()] == [[], [_defined_rows._SAVED.format("b")]]
    assert rows["b"]["memory_bytes"] == 2**30


def test_domains_whose_managed_saves_cannot_be_seen(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    define(host, "a")
    (host / "loop").symlink_to("loop")
    for folder, unread in (("loop", [_defined_rows._SAVED.format("a")]), ("none", []), ("etc/libvirt/qemu/a.xml", [])):
        monkeypatch.setattr(_definitions, "_SAVES", f"{host}/{folder}")
        assert found()["a"]["unread"] == unread


def test_domains_that_run(host: Path, child: subprocess.Popen[bytes]) -> None:
    define(host, "defined")
    record(host, "defined", child.pid)
    record(host, "transient", child.pid)
    # It has ended, or is another domain's.
    record(host, "ended", 2**22 + 1)
    record(host, "other", child.pid, "renamed")
    stale = record(host, "stale", child.pid)
    os.utime(stale, (1, 1))
    (host / "run/libvirt/qemu/none.xml").write_text("<a/>")
    os.mkfifo(host / "run/libvirt/qemu/fifo.xml")
    rows = found()
    assert {name: (each["pid"], each["transient"]) for name, each in rows.items()} == {
        "defined": (child.pid, False),
        "transient": (child.pid, True),
    }
    assert rows["transient"]["path"] == f"{host}/run/libvirt/qemu/transient.xml"
    assert rows["transient"]["memory_bytes"] == 2**30


def test_files_that_are_no_definitions(host: Path) -> None:
    """Nobody is waited for, and nothing outside is read."""
    folder = host / "etc/libvirt/qemu"
    (folder / "link.xml").symlink_to("/etc/shadow")
    (folder / "dangling.xml").symlink_to("/nowhere")
    os.mkfifo(folder / "fifo.xml")
    (folder / "folder.xml").mkdir()
    with (folder / "large.xml").open("w") as stream:
        stream.truncate(100 * 2**20)
    (folder / "broken.xml").write_bytes(b"<domain><name>\xff\xfe</name></domain>")
    (folder / os.fsdecode(b"\xff.xml")).write_text("")
    (folder / ".xml").write_text("")
    (folder / "note.txt").write_text("")
    define(host, "other", XML.format("", "vm1"))
    define(host, "good")
    rows = found()
    place = f"{folder}/{{}}.xml cannot be read: ".format
    assert {name: row["unread"] for name, row in rows.items() if "no XML" not in str(row["unread"])} == {
        "link": [place("link") + "it is a symbolic link, which is not followed."],
        "dangling": [place("dangling") + "it is a symbolic link, which is not followed."],
        "fifo": [place("fifo") + "it is no regular file."],
        "folder": [place("folder") + "it is no regular file."],
        "large": [place("large") + "it is too large: 524288 bytes at most are read."],
        "other": [place("other") + "it is that of domain vm1, so that libvirt does not load it."],
        "good": [],
    }
    assert {name for name, row in rows.items() if "no XML" in str(row["unread"])} == {"broken", "\\xff"}


def test_more_definitions_than_any_host_has(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host / "etc/libvirt/qemu"
    monkeypatch.setattr(_definitions, "DEFINITIONS_MAX", 5)
    for number in range(8):
        define(host, f"vm{number}")
    rows, msgs = find_domains([])
    assert [row["name"] for row in rows] == [f"vm{number}" for number in range(5)]
    words = f"Of the system's libvirt, only 5 definitions in {folder} were read: it has "
    assert msgs == [f"{words}8 definitions."]
    monkeypatch.setattr(_definitions, "_ENTRIES_MAX", 7)
    assert find_domains([])[1] == [f"{words}more than 7 files."]


def test_a_folder_with_files_without_end(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_definitions, "DEFINITIONS_MAX", 40)
    folder = host / "etc/libvirt/qemu"
    for number in range(1000):
        (folder / f"{number:06}.xml").touch()
    rows, msgs = find_domains([])
    assert len(rows) == 40
    assert msgs == [f"Of the system's libvirt, only 40 definitions in {folder} were read: it has 1000 definitions."]


def test_more_than_is_read_together(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_definitions, "_TOTAL_MAX", 150)
    for name in ("a", "b", "c"):
        define(host, name)
    rows, msgs = find_domains([])
    assert [row["name"] for row in rows] == ["a", "b"]
    assert len(msgs) == 1
    assert "Of the files of the system's libvirt, only 2 were read" in msgs[0]


def test_definitions_that_take_too_long(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        define(host, name)
    monkeypatch.setattr(_definitions, "_SECONDS", -1)
    rows, msgs = find_domains([])
    assert rows == []
    assert "Only 0 of 1 domains were looked at" in msgs[1]


@pytest.mark.parametrize("missing", ["_FOLDER", "_NETWORKS", "_RECORDS"])
def test_a_folder_that_may_not_be_read(host: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """What was read before it is told, and that there is more."""
    define(host, "a", XML.format("", "a").replace("<devices/>", f"<devices>{IN_NETWORK}</devices>"))
    folder = getattr(_definitions, missing)
    open_ = os.open

    def refuse(path: Any, *given: Any, **other: Any) -> int:
        if path == folder or (path == "." and os.readlink(f"/proc/self/fd/{other['dir_fd']}") == folder):
            raise PermissionError(errno.EACCES, "no", path)
        return open_(path, *given, **other)

    monkeypatch.setattr(os, "open", refuse)
    rows, msgs = find_domains([])
    words = (
        f"The definitions of the system's libvirt cannot be read: {folder} cannot be read (EACCES: Permission denied)."
    )
    [msg] = msgs
    assert msg.startswith(words)
    assert ("become: true" in msg) == (os.geteuid() != 0)
    assert [row["devices"] for row in rows] == ([] if missing == "_FOLDER" else [None])


IN_NETWORK = "<interface type='network'><source network='pool'/></interface>"


@pytest.mark.parametrize(
    ("network", "is_known"),
    [
        (None, True),
        ("<network><name>pool</name><forward mode='nat'/></network>", True),
        ("<network><name>pool</name><forward mode='hostdev'><pf dev='eth0'/></forward></network>", False),
        ("<network>", False),
    ],
)
def test_a_network_that_passes_devices_through(host: Path, network: str | None, is_known: bool) -> None:
    define(host, "a", XML.format("", "a").replace("<devices/>", f"<devices>{IN_NETWORK}</devices>"))
    if network is not None:
        (host / "etc/libvirt/qemu/networks/pool.xml").write_text(network)
    row = found()["a"]
    assert (row["devices"] == [], row["unread"] == []) == (is_known, is_known)


def test_what_others_can_write_is_not_read(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    define(host, "a")
    (host / "etc/libvirt").chmod(0o777)
    rows, msgs = find_domains([])
    assert rows == []
    assert f"{host}/etc/libvirt can be written by everybody" in msgs[0]
    monkeypatch.setattr(_paths, "_TRUSTED", ())
    assert "cannot be trusted" in find_domains([])[1][0]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    """Who runs the tests, with another home."""
    monkeypatch.setattr(User, "runtime_folder", f"{tmp_path}/run-user")
    me = pwd.getpwuid(os.getuid())
    return User(me.pw_name, me.pw_uid, me.pw_gid, str(tmp_path / "home"))


def test_domains_of_a_users_own(host: Path, user: User, child: subprocess.Popen[bytes]) -> None:
    define(host, "of-the-system")
    assert [row["name"] for row in find_domains([user])[0]] == ["of-the-system"]
    own = Path(user.home) / ".config/libvirt/qemu"
    (own / "autostart").mkdir(parents=True)
    (own / "mine.xml").write_text(XML.format("", "mine"))
    (own / "autostart/mine.xml").symlink_to(own / "mine.xml")
    (own / "link.xml").symlink_to("/etc/shadow")
    runs = Path(user.runtime_folder) / "libvirt/qemu/run"
    runs.mkdir(parents=True)
    record(host, "mine", child.pid).rename(runs / "mine.xml")
    rows, msgs = find_domains([user])
    assert msgs == []
    own_rows = {row["name"]: row for row in rows if row["manager"] == "session"}
    assert set(own_rows) == {"mine", "link"}
    mine = own_rows["mine"]
    assert (mine["user"], mine["uid"], mine["pid"], mine["autostart"]) == (user.name, user.uid, child.pid, True)
    assert "is not followed" in own_rows["link"]["unread"][0]
    assert mine["unread"] == []
    (own / "save").mkdir()
    (own / "save/mine.save").symlink_to("/nowhere")
    assert [row["unread"] for row in find_domains([user])[0] if row["name"] == "mine"] == [
        [_defined_rows._SAVED.format("mine")]
    ]


def test_a_users_record_names_none_but_the_users_processes(
    host: Path, user: User, child: subprocess.Popen[bytes]
) -> None:
    text = record(host, "mine", child.pid).read_bytes()
    file = _definitions._File("record", "mine", "", text, "", False, time.time())
    assert _definitions._pid_of(user, file) == child.pid
    assert _definitions._pid_of(user._replace(uid=user.uid + 1), file) is None


def test_a_user_that_one_cannot_become(host: Path, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(owner: User | None, work: Callable[[], Iterator[Any]], _seconds: float) -> Iterator[Any]:
        if owner:
            raise IommufdError("This caller cannot become user alice: run the task as root (become: true).")
        yield from work()

    monkeypatch.setattr(_definitions, "ask_child", ask)
    define(host, "a")
    rows, msgs = find_domains([user._replace(name="alice")])
    assert [row["name"] for row in rows] == ["a"]
    assert msgs == [
        "The definitions of user alice's own libvirt cannot be read: This caller cannot become user alice: run the task"
        " as root (become: true)."
    ]


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {"a": 1},
        ["definition"],
        ["definition", 1, "", "", "", False, 0, False],
        ["definition", "a", "", "!", "", False, 0, False],
        ["definition", "a", "", "", "", 0, 0, False],
        ["definition", "a", "", "", "", False, 0, 0],
        ["definition", "a", "", "", "", False, "x", False],
    ],
)
def test_a_child_that_says_something_else(monkeypatch: pytest.MonkeyPatch, user: User, said: object) -> None:
    monkeypatch.setattr(_definitions, "ask_child", lambda owner, _work, _seconds: (each for each in [said] if owner))
    rows, msgs = find_domains([user])
    assert rows == []
    assert msgs == [
        f"The definitions of user {user.name}'s own libvirt cannot be read: the child that reads them has said"
        " something else."
    ]
