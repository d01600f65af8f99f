# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _capabilities, _states
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._names import owner_name
from ansible_collections.virt.iommufd.plugins.module_utils._paths import Untrusted
from ansible_collections.virt.iommufd.plugins.module_utils._states import (
    FileState,
    NodeState,
    capability_in,
    kernels_node,
    make_folder,
    matching_nodes,
    missing_folders,
    node_state,
    open_file,
    read_file_state,
    remove_file,
    set_capability,
    set_node,
    setting_of,
    split_block,
    write_file_state,
)


def capability_of(path: str) -> bytes | None:
    """What the file at path has."""
    with open_file(path) as file:
        return capability_in(file.fd, path)


def refuse(number: int) -> Any:
    """A function that fails with an errno."""

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\0\xff\nno newline")
    path.chmod(0o4751)
    os.setxattr(path, "user.of.the.file", b"\0value")
    state = read_file_state(str(path))
    assert state
    assert (state.content, state.mode, state.uid) == (b"\0\xff\nno newline", 0o4751, os.getuid())
    assert state.xattrs == {"user.of.the.file": b"\0value"}
    path.write_bytes(b"other")
    path.chmod(0o600)
    os.removexattr(path, "user.of.the.file")
    (tmp_path / "file.iommufd_host-new").write_bytes(b"left by a run that was cut off")
    write_file_state(str(path), FileState.from_json(state.to_json()))
    assert read_file_state(str(path)) == state
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_comes_back_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    assert missing_folders(str(path)) == [str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    state = FileState(b"x", 0o640, os.getuid(), os.getgid())
    write_file_state(str(path), state)
    assert read_file_state(str(path)) == state
    assert missing_folders(str(path)) == []


def test_no_file(tmp_path: Path) -> None:
    assert read_file_state(str(tmp_path / "none")) is None
    assert read_file_state(str(tmp_path / "none" / "none")) is None


def test_what_is_no_file_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(bytes(2**20 + 1))
    for name, why in (
        ("link", "is a symbolic link"),
        ("fifo", "is no regular file"),
        (".", "is no regular file"),
        ("large", "has 1048577 bytes"),
        ("target/file", "cannot be read \\(ENOTDIR: Not a directory\\)"),
    ):
        with pytest.raises(IommufdError, match=f"^{tmp_path}/{name} {why}"):
            read_file_state(f"{tmp_path}/{name}")
    monkeypatch.setattr(os, "listxattr", refuse(errno.EIO))
    with pytest.raises(IommufdError, match="EIO"):
        read_file_state(str(tmp_path / "target"))
    monkeypatch.setattr(os, "listxattr", refuse(errno.EOPNOTSUPP))
    state = read_file_state(str(tmp_path / "target"))
    assert state
    assert state.xattrs == {}


def test_removed_with_the_folders_that_are_empty(tmp_path: Path) -> None:
    folders = [str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    path = tmp_path / "a" / "b" / "file"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    (tmp_path / "a" / "other").write_bytes(b"")
    remove_file(str(path), folders)
    assert os.listdir(tmp_path / "a") == ["other"]
    # The inner folder is gone already, as after a run that was cut off.
    (tmp_path / "a" / "other").unlink()
    remove_file(str(path), folders)
    assert os.listdir(tmp_path) == []
    # Somebody has put a file in the place of a folder.
    (tmp_path / "a").write_bytes(b"")
    for count in (1, 2):
        remove_file(str(path), folders[:count])
        assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rmdir", refuse(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        remove_file(str(tmp_path / "file"), [str(tmp_path)])


def test_a_node(terminal: str) -> None:
    before = node_state(terminal)
    assert before
    after = before._replace(mode=0o604)
    set_node(terminal, after)
    assert os.stat(terminal).st_mode & 0o7777 == 0o604
    assert node_state(terminal) == after
    assert str(after).startswith(f"mode 0604, {owner_name(os.getuid())}:")


def test_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert node_state(str(tmp_path / "none")) is None
    assert node_state("/dev/null/none") is None
    set_node(str(tmp_path / "none"), NodeState(0o666, 0, 0))
    assert not (tmp_path / "none").exists()
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("", "null"):
        with pytest.raises(IommufdError, match="is no device node"):
            node_state(str(tmp_path / name))
    assert matching_nodes("/dev/null/none*") == []
    monkeypatch.setattr(_states, "walk", refuse(errno.EACCES))
    with pytest.raises(IommufdError, match="/dev cannot be looked at \\(EACCES"):
        matching_nodes("/dev/nul*")
    with pytest.raises(IommufdError, match="cannot be looked at"):
        node_state("/dev/null")


def test_nodes_by_a_pattern(tmp_path: Path) -> None:
    assert matching_nodes("/dev/nul?") == ["/dev/null"]
    assert matching_nodes("/dev/null") == ["/dev/null"]
    assert matching_nodes(f"{tmp_path}/none/*") == []
    for name in ("b1", "b2", ".b3", "c", "x[1]", "x1"):
        (tmp_path / name).touch()
    assert matching_nodes(f"{tmp_path}/b*") == [f"{tmp_path}/b1", f"{tmp_path}/b2"]
    assert matching_nodes(f"{tmp_path}/*3") == []
    assert matching_nodes(f"{tmp_path}/.b*") == [f"{tmp_path}/.b3"]
    assert matching_nodes(f"{tmp_path}/x[1]") == [f"{tmp_path}/x1", f"{tmp_path}/x[1]"]
    tmp_path.chmod(0o777)
    with pytest.raises(Untrusted, match="can be written by everybody"):
        matching_nodes(f"{tmp_path}/b*")
    tmp_path.chmod(0o755)


# What everything does for which somebody else's folder would be enough to be led elsewhere.
@pytest.mark.parametrize(
    "act",
    [
        read_file_state,
        missing_folders,
        lambda path: make_folder(path, 0o700),
        lambda path: write_file_state(path, FileState(b"root's", 0o600, os.getuid(), os.getgid())),
        lambda path: remove_file(path, []),
        lambda path: remove_file(f"{path}.not", [os.path.dirname(path)]),
        node_state,
        lambda path: set_node(path, NodeState(0o666, 0, 0)),
        kernels_node,
        capability_of,
        lambda path: set_capability(path, b"x"),
    ],
)
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_nothing_is_done_in_a_folder_of_others(tmp_path: Path, act: Callable[[str], Any], mode: int) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_bytes(b"of root")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "folder").symlink_to(tmp_path / "victim")
    (tmp_path / "theirs").chmod(mode)
    with pytest.raises(Untrusted, match=f"{tmp_path}/theirs can be written by (everybody|group)"):
        act(f"{tmp_path}/theirs/folder/file")
    assert (tmp_path / "victim" / "file").read_bytes() == b"of root"
    assert os.listdir(tmp_path / "victim") == ["file"]


def test_a_file_that_others_can_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o666)
    with pytest.raises(Untrusted, match=f"{path} can be written by everybody"):
        read_file_state(str(path))
    assert read_file_state(str(path), own=False)
    # It is replaced, not written to.
    write_file_state(str(path), FileState(b"", 0o600, os.getuid(), os.getgid()))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("none")
    for act in (read_file_state, missing_folders):
        with pytest.raises(IommufdError, match=f"is behind a symbolic link that leads to {tmp_path}/none/file"):
            act(f"{tmp_path}/link/file")
    with pytest.raises(FileNotFoundError):
        make_folder(f"{tmp_path}/none/folder", 0o700)


def test_what_the_kernel_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # drivers/char/mem.c gives it 0666, and nothing is said of its owner.
    assert kernels_node("/dev/null") == NodeState(0o666, 0, 0)
    monkeypatch.setattr(_states, "_SYS_CHAR", str(tmp_path))
    assert kernels_node("/dev/null") == NodeState(0o600, 0, 0)
    (tmp_path / "1:3").mkdir()
    (tmp_path / "1:3" / "uevent").write_text("MAJOR=1\nDEVNAME=null\nDEVMODE=0640\nDEVUID=3\nDEVGID=4\n")
    assert kernels_node("/dev/null") == NodeState(0o640, 3, 4)


def test_an_executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only root may set the real one; tests/kernel does.
    monkeypatch.setattr(_capabilities, "XATTR", "user.stands.in")
    path = str(tmp_path / "program")
    Path(path).write_bytes(b"")
    assert capability_of(path) is None
    for xattr in (b"\1\2", b"", None, None):
        set_capability(path, xattr)
        assert capability_of(path) == xattr
    with pytest.raises(FileNotFoundError):
        capability_of(f"{path}.not")
    monkeypatch.setattr(os, "getxattr", refuse(errno.EIO))
    with pytest.raises(IommufdError, match="cannot be read \\(EIO"):
        capability_of(path)
    # So the kernel answers for an attribute of no bytes.
    monkeypatch.setattr(os, "getxattr", refuse(errno.EINVAL))
    with pytest.raises(IommufdError, match=f"Take them away \\(setcap -r {path}\\)"):
        capability_of(path)
    monkeypatch.setattr(os, "getxattr", refuse(errno.EOPNOTSUPP))
    assert capability_of(path) is None


@pytest.mark.parametrize(
    ("content", "block", "rest"),
    [
        (b"", None, b""),
        (b"a\n#BEGIN iommufd_host\n", None, b"a\n#BEGIN iommufd_host\n"),
        (b"# BEGIN iommufd_host\n# END iommufd_host\na", b"", b"a"),
        (b"a\r\n# BEGIN iommufd_host\r\nx\n# END iommufd_host\nb", b"x\n", b"a\r\nb"),
        # Twice, as when a run was cut off.
        (b"# BEGIN iommufd_host\nx\n# END iommufd_host\n" * 2 + b"\n", b"x\nx\n", b"\n"),
        (
            b"# BEGIN iommufd_host\n# BEGIN other\nx\n# END other\n# END iommufd_host\n",
            b"# BEGIN other\nx\n# END other\n",
            b"",
        ),
    ],
)
def test_a_block(content: bytes, block: bytes | None, rest: bytes) -> None:
    assert split_block(content) == (block, rest)


@pytest.mark.parametrize(
    "content",
    [
        b"# BEGIN iommufd_host\nx\n",
        b"x\n# END iommufd_host\n",
        b"# BEGIN iommufd_host\n# BEGIN iommufd_host\n# END iommufd_host\n",
    ],
)
def test_half_a_block(content: bytes) -> None:
    with pytest.raises(IommufdError, match="without the other"):
        split_block(content)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", None),
        ('#acl = [\n#    "/dev/null"\n#]\n', None),
        ("acl = 1\n", None),
        ("other_acl = ['/dev/null']\n", None),
        ('acl = [ "/dev/null" ', None),
        ("acl=[]", []),
        (
            '  acl = [\n    "/dev/null", \'/dev/full\',\n    # "/dev/zero", ]\n "/dev/a]b" # "]"\n]\nx = ["y"]\n',
            ["/dev/null", "/dev/full", "/dev/a]b"],
        ),
        ("acl = ['1']\nacl = ['2']\n", ["1"]),
    ],
)
def test_a_setting(text: str, values: list[str] | None) -> None:
    assert setting_of(text, "acl") == values
