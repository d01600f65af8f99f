# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _paths
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._paths import (
    Mount,
    Untrusted,
    Writer,
    check_writers,
    entries,
    mount_id,
    parse_mount,
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
    for folder in ("mine", "groups", "sticky", "everybodys"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder).chmod(0o755)
        (tmp_path / folder / "file").write_bytes(b"content")
        (tmp_path / folder / "file").chmod(0o644)
    (tmp_path / "groups").chmod(0o775)
    (tmp_path / "sticky").chmod(0o1777)
    (tmp_path / "everybodys").chmod(0o777)
    (tmp_path / "mine" / "writable").touch()
    (tmp_path / "mine" / "writable").chmod(0o1666)
    (tmp_path / "mine" / "link").symlink_to("file")
    (tmp_path / "mine" / "astray").symlink_to("../groups/file")
    (tmp_path / "way").symlink_to("groups")
    (tmp_path / "absolute").symlink_to(tmp_path / "groups")
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
        ("groups/file", "groups", f"group {GROUP}"),
        ("way/file", "groups", f"group {GROUP}"),
        ("absolute/file", "groups", f"group {GROUP}"),
        ("groups/../mine/file", "groups", f"group {GROUP}"),
        ("way/../mine/./file", "groups", f"group {GROUP}"),
        ("mine/astray", "groups", f"group {GROUP}"),
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
        (place / "mine").symlink_to("groups")
        os.stat("astray", dir_fd=found.folder, follow_symlinks=False)


LINE = "99 27 0:50 / /mnt rw,{0} shared:5 master:1 - {1} {2} {3}\n"
FUSE = "rw,user_id={},group_id=1,default_permissions,allow_other"


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        (LINE.format("relatime", "ext4", "/dev/sda1", "rw,discard"), Mount("ext4", nosuid=False)),
        (LINE.format("nosuid,nodev", "vfat", "/dev/sdb1", "rw,uid=7"), Mount("vfat", nosuid=True)),
        # Without optional fields.
        ("99 27 0:50 / /mnt ro,nosuid - tmpfs tmpfs rw\n", Mount("tmpfs", nosuid=True)),
        (LINE.format("nosuid", "fuse", "x", FUSE.format(7)), Mount("fuse", nosuid=True, uid=7)),
        (LINE.format("nodev", "fuse.sshfs", "x", FUSE.format(7)), Mount("fuse.sshfs", nosuid=False, uid=7)),
        (LINE.format("nodev", "fuseblk", "/dev/sdb1", FUSE.format(0)), Mount("fuseblk", nosuid=False, uid=0)),
        # Root's of a guest, whose host serves it.
        (LINE.format("relatime", "virtiofs", "tag", "rw"), Mount("virtiofs", nosuid=False)),
        # The source is the user's choice, and so is what comes behind "fuse.".
        (LINE.format("nodev", "fuse.a\\040-\\040ext4", "-", FUSE.format(7)), Mount("fuse.a\\040-\\040ext4", False, 7)),
        (LINE.format("nodev", "fuse", "user_id=0,\\040\\012", FUSE.format(7)), Mount("fuse", False, 7)),
        # Nothing that is understood.
        (LINE.format("nodev", "fuse", "x", "rw"), None),
        (LINE.format("nodev", "fuse", "x", FUSE.format(-1)), None),
        (LINE.format("nodev", "fuse", "x", FUSE.format("7,user_id=0")), None),
        (LINE.format("nodev", "\xe4", "x", "rw"), None),
        ("99 27 0:50 / /mnt rw,nosuid - fuse x\n", None),
        ("99 27 0:50 / /mnt rw,nosuid\n", None),
        ("99\n", None),
        ("199 99 0:50 / /mnt rw - ext4 x rw\n9 99 0:50 / /mnt rw - ext4 x rw\n", None),
        ("", None),
    ],
)
def test_what_the_kernel_has_of_a_mount(text: str, mount: Mount | None) -> None:
    others = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
    assert parse_mount(f"{others}{text}{others}".encode(), b"99") == mount


@pytest.mark.parametrize("end", ["\r", "\v", "\f", "\x1c", "\x85"])
def test_a_mount_that_is_named_as_the_beginning_of_a_line(end: str) -> None:
    """Its user may rename it. The kernel writes a line feed in a name as digits, and these as they are."""
    theirs = f"98 1 0:9 / /home/alice/x{end}99 rw,nosuid - fuse.hers hers rw,user_id=1001,group_id=1001\n"
    text = f"{theirs}99 1 0:10 / /opt rw - tmpfs none rw\n".encode("latin-1")
    assert parse_mount(text, b"99") == Mount("tmpfs", False)
    assert parse_mount(text, b"98") == Mount("fuse.hers", True, 1001)


def test_the_mounts_of_this_machine() -> None:
    with open("/proc/self/mountinfo", "rb") as stream:
        text = stream.read()
    found = [parse_mount(text, line.split()[0]) for line in text.splitlines()]
    assert found
    assert None not in found


@pytest.fixture
def mounted(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Has the folder `mine` and all in it pass for a mount; nothing but the kernel may be asked of that."""
    mountinfo = tmp_path_factory.mktemp("proc") / "mountinfo"
    real = _paths.mount_id

    def mount_id(fd: int) -> bytes:
        where = os.readlink(f"/proc/self/fd/{fd}")
        return b"99" if f"{where}/".startswith(f"{place}/mine/") else real(fd)

    def put(line: str) -> str:
        with open("/proc/self/mountinfo", encoding="utf-8") as stream:
            mountinfo.write_text(stream.read() + line)
        return f"{place}/mine"

    monkeypatch.setattr(_paths, "mount_id", mount_id)
    monkeypatch.setattr(_paths, "_MOUNTINFO", str(mountinfo))
    return put


def never_asked(where: str) -> Callable[[int], os.stat_result]:
    """An fstat that nothing on a mount is asked by."""
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        assert not os.readlink(f"/proc/self/fd/{fd}").startswith(where)
        return real(fd)

    return fstat


@pytest.mark.parametrize(
    ("line", "who"),
    [
        (LINE.format("nosuid,nodev", "fuse.x", "x", FUSE.format(4711)), "uid 4711, whose FUSE mount it is"),
        (LINE.format("nosuid,nodev", "fuseblk", "x", FUSE.format(4711)), "uid 4711, whose FUSE mount it is"),
        (LINE.format("nodev", "fuse", "x", "rw"), "whoever has mounted it, which the kernel does not tell"),
        ("", "whoever has mounted it, which the kernel does not tell"),
    ],
)
@pytest.mark.parametrize("program", [True, False])
def test_a_mount_of_somebody_else(
    place: Path, mounted: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, line: str, who: str, program: bool
) -> None:
    """Whatever owners its server gives the files: it is not asked, and so cannot keep us waiting either."""
    where = mounted(line)
    monkeypatch.setattr(os, "fstat", never_asked(where))
    (place / "to").symlink_to("mine/file")
    for path in ("mine", "mine/file", "mine/none/at/all", "to", "mine/../sticky"):
        with pytest.raises(Untrusted) as raised, walk(f"{place}/{path}", follow=True, program=program):
            pass
        assert raised.value.writer == Writer(where, who)
        assert str(raised.value).endswith("If that is not meant to be, name another path.")


def test_a_mount_of_somebody_who_is_trusted(place: Path, mounted: Callable[[str], str]) -> None:
    mounted(LINE.format("nosuid,nodev", "fuse", "x", FUSE.format(4711)))
    with walk(f"{place}/mine/file", (0, ME, 4711)) as found:
        assert found.found is not None
    mounted(LINE.format("relatime", "fuse", "x", FUSE.format(0)))
    with walk(f"{place}/mine/file", program=True) as found:
        assert found.found is not None


@pytest.mark.parametrize(
    ("line", "who"),
    [
        (LINE.format("relatime", "ext4", "/dev/sdb1", "rw"), ""),
        (LINE.format("nosuid,nodev", "tmpfs", "tmpfs", "rw"), ""),
        (LINE.format("nosuid,nodev", "ext4", "/dev/sdb1", "rw"), "ext4"),
        (LINE.format("nosuid,nodev", "fuseblk", "/dev/sdb1", FUSE.format(0)), "fuseblk"),
        (LINE.format("nosuid,nodev", "cifs", "//host/share", "rw"), "cifs"),
    ],
)
def test_a_program_that_somebody_may_have_brought_along(
    place: Path, mounted: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, line: str, who: str
) -> None:
    """What users may mount is nosuid, always. It may say that all is root's."""
    where = mounted(line)
    # Of a file that is no program, its owner is believed.
    with walk(f"{place}/mine/file") as found:
        assert found.found is not None
    if who:
        monkeypatch.setattr(os, "fstat", never_asked(where))
        expected = Writer(where, f"whoever has brought the {who} that is mounted there nosuid")
        assert writer_of(f"{place}/mine/file") == expected
    else:
        assert writer_of(f"{place}/mine/file") is None


def test_mounts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    (proc, root) = (os.open(path, os.O_PATH) for path in ("/proc", "/"))
    try:
        assert mount_id(proc) != mount_id(root)
        assert mount_id(proc).isdigit()
        monkeypatch.setattr(_paths, "_read", lambda _path: b"pos:\t0\nflags:\t0\n")
        with pytest.raises(IommufdError, match="does not tell which mount"):
            mount_id(proc)
    finally:
        os.close(proc)
        os.close(root)
