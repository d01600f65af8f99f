# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _paths
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._paths import (
    Untrusted,
    Writer,
    check_writers,
    entries,
    reopen,
    sync,
    walk,
    writer_of,
)

ME = os.geteuid()
GROUP = grp.getgrgid(os.getegid()).gr_name


def open_descriptors() -> list[str]:
    return [each for each in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{each}")]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Some folders with a file each, and links."""
    for folder in ("mine", "shared", "sticky", "everybodys"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder).chmod(0o755)
        (tmp_path / folder / "file").write_bytes(b"content")
        (tmp_path / folder / "file").chmod(0o644)
    (tmp_path / "shared").chmod(0o775)
    (tmp_path / "sticky").chmod(0o1777)
    (tmp_path / "everybodys").chmod(0o777)
    (tmp_path / "mine" / "writable").touch()
    (tmp_path / "mine" / "writable").chmod(0o1666)
    (tmp_path / "mine" / "link").symlink_to("file")
    (tmp_path / "mine" / "astray").symlink_to("../shared/file")
    (tmp_path / "way").symlink_to("shared")
    (tmp_path / "absolute").symlink_to(tmp_path / "shared")
    (tmp_path / "round").symlink_to(f"{tmp_path}/mine/../mine/.")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("none/below")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("mine/file", "mine/file"),
        ("round/file", "mine/file"),
        ("mine/./../mine//link", "mine/file"),
        ("sticky/file", "sticky/file"),
        ("mine/none", "mine/none"),
        ("mine/a/b/c", "mine/a/b/c"),
        ("round/..", ""),
    ],
)
def test_a_way_that_can_be_trusted(place: Path, path: str, real: str) -> None:
    before = open_descriptors()
    with walk(f"{place}/{path}", follow=True) as found:
        assert found.real_path == f"{place}/{real}".rstrip("/")
        assert (found.found is None) == (found.status is None) == ("none" in path or "/a/" in path)
        assert found.missing == (("a", "b") if "/a/" in path else ())
        assert not found.dangling
        if found.status is not None and stat.S_ISREG(found.status.st_mode):
            assert os.path.samestat(os.stat(found.name, dir_fd=found.folder), found.status)
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("path", "where", "who"),
    [
        ("shared/file", "shared", f"group {GROUP}"),
        ("way/file", "shared", f"group {GROUP}"),
        ("absolute/file", "shared", f"group {GROUP}"),
        ("shared/../mine/file", "shared", f"group {GROUP}"),
        ("way/../mine/./file", "shared", f"group {GROUP}"),
        ("mine/astray", "shared", f"group {GROUP}"),
        ("everybodys/file", "everybodys", "everybody"),
        # Nothing behind it is looked at.
        ("everybodys/none/at/all", "everybodys", "everybody"),
        ("mine/writable", "mine/writable", "everybody"),
        # Who can make it decides what it will be.
        ("sticky/none", "sticky", "everybody"),
        ("sticky/a/none", "sticky", "everybody"),
    ],
)
def test_a_way_that_cannot(place: Path, path: str, where: str, who: str) -> None:
    before = open_descriptors()
    with pytest.raises(Untrusted) as raised:
        check_writers(f"{place}/{path}")
    assert raised.value.writer == writer_of(f"{place}/{path}") == Writer(f"{place}/{where}", who)
    message = str(raised.value)
    assert message.startswith(f"{place}/{path} cannot be trusted: {place}/{where} can be written by {who}.")
    assert message.endswith("name another path.")
    assert (f"chmod go-w {place}/{where}" in message) == (where != "sticky")
    assert open_descriptors() == before


def test_what_is_changed_in_a_sticky_folder(place: Path) -> None:
    with walk(f"{place}/sticky/file"):
        pass
    with (
        pytest.raises(Untrusted, match="/sticky can be written by everybody"),
        walk(f"{place}/sticky/file", changes=True),
    ):
        pass
    with walk(f"{place}/sticky/../mine/file", changes=True):
        pass


def test_whose_files_are_trusted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Above the folders of this test are those of root, and of whoever runs it.
    name = _paths._user(ME)
    if ME:
        monkeypatch.setattr(_paths, "_TRUSTED", (0,))
        found = writer_of(f"{place}/mine/file")
        assert found
        assert found.who == name
        assert writer_of(f"{place}/mine/file", (0, ME)) is None
    found = writer_of("/usr/bin/env", ())
    assert found == Writer("/", "user root (uid 0)")
    assert _paths._user(2**31 - 7) == "uid 2147483641"


def test_the_owner_of_a_link_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        status = real(fd)
        if not stat.S_ISLNK(status.st_mode):
            return status
        fields = list(status)
        fields[stat.ST_UID] = 4711
        return os.stat_result(fields)

    # Only root could give it away; tests/kernel does.
    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(Untrusted, match=rf"{place}/way can be written by uid 4711\. .* \(chown -h root {place}/way\)"):
        check_writers(f"{place}/way/file")
    with pytest.raises(Untrusted, match=f"{place}/mine/link can be written by uid 4711"), walk(f"{place}/mine/link"):
        pass


def test_a_file_may_be_of_no_interest(place: Path) -> None:
    with walk(f"{place}/mine/writable", judge_last=False) as found:
        assert found.found is not None
    with walk(f"{place}/mine/link") as found:
        assert found.status
        assert stat.S_ISLNK(found.status.st_mode)


def test_ways_that_end(place: Path) -> None:
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        check_writers(f"{place}/loop/file")
    with pytest.raises(NotADirectoryError):
        check_writers(f"{place}/mine/file/below")
    with pytest.raises(FileNotFoundError):
        check_writers(f"{place}/mine/none/../file")
    for path in ("relative", "", "/nul\0"):
        with pytest.raises(IommufdError, match="is not an absolute path"):
            check_writers(path)
    with walk(f"{place}/nowhere", follow=True) as found:
        assert (found.dangling, found.real_path) == (True, f"{place}/none/below")
    with walk(f"{place}/nowhere/x") as found:
        assert (found.dangling, found.missing) == (True, ("none", "below"))
    with walk("/") as found:
        assert (found.real_path, found.name) == ("/", ".")


def test_what_was_found_is_what_is_opened(place: Path) -> None:
    with walk(f"{place}/mine/file") as found:
        assert found.found is not None
        (place / "mine" / "file").unlink()
        (place / "mine" / "file").write_bytes(b"other")
        with open(reopen(found.found), "rb") as stream:
            assert stream.read() == b"content"
        assert sorted(entries(found.folder)) == ["astray", "file", "link", "writable"]
        sync(found.folder)
        # What comes into its place by another name is not where this leads to.
        (place / "mine").rename(place / "moved")
        (place / "mine").symlink_to("shared")
        os.stat("astray", dir_fd=found.folder, follow_symlinks=False)
