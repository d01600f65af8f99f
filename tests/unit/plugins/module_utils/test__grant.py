# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _capabilities, _grant
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._grant import (
    attribute_for_grant,
    grant,
    grant_patiently,
    main,
)

# Only root may set the real one; tests/kernel does.
XATTR = "user.stands.in"
IPC_LOCK, NET_RAW = 1 << 14, 1 << 13


def plain(permitted: int, effective: bool = True) -> bytes:
    return struct.pack("<5I", 0x02000000 | effective, permitted, 0, 0, 0)


# What the owner of a file writes with `unshare -Ur setcap cap_setuid,cap_sys_admin=ep FILE`.
OF_A_USER = struct.pack("<6I", 0x03000001, 1 << 7 | 1 << 21, 0, 0, 0, 1002)


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_capabilities, "XATTR", XATTR)
    monkeypatch.setattr(_grant, "_PAUSE", 0.01)
    path = tmp_path / "emulator"
    path.write_bytes(b"")
    path.chmod(0o755)
    return path


def xattr(path: Path) -> bytes | None:
    return os.getxattr(path, XATTR) if XATTR in os.listxattr(path) else None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, plain(IPC_LOCK)),
        (b"", plain(IPC_LOCK)),
        (plain(NET_RAW), plain(NET_RAW | IPC_LOCK)),
        (plain(0, effective=False), plain(IPC_LOCK)),
        (struct.pack("<6I", 0x03000001, NET_RAW, 0, 0, 0, 0), plain(NET_RAW | IPC_LOCK)),
        (plain(IPC_LOCK), None),
        (plain(IPC_LOCK | NET_RAW), None),
    ],
)
def test_what_is_granted(emulator: Path, before: bytes | None, after: bytes | None) -> None:
    assert attribute_for_grant(before) == after
    if before is not None:
        os.setxattr(emulator, XATTR, before)
    link = emulator.with_name("link")
    link.symlink_to(emulator)
    assert grant(str(link)) == (after is not None)
    assert xattr(emulator) == (after or before)
    assert not grant(str(link))


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (OF_A_USER, "cap_setuid, cap_sys_admin\\) are for the user namespace of uid 1002 only"),
        (struct.pack("<6I", 0x03000001, IPC_LOCK, 0, 0, 0, 1002), "for the user namespace of uid 1002 only"),
        (plain(NET_RAW, effective=False), "cap_net_raw that are not effective"),
        (b"of tomorrow", "has a form that is not known"),
    ],
)
def test_what_is_left_as_it_is(emulator: Path, before: bytes, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.setxattr(emulator, XATTR, before)
    with pytest.raises(IommufdError, match=f"^{emulator}: .*{why}.* It is left as it is"):
        grant(str(emulator))
    assert main([str(emulator)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"iommufd-host-grant: {emulator}: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert xattr(emulator) == before


@pytest.mark.parametrize("what", ["file", "folder", "above"])
def test_what_others_can_write(emulator: Path, what: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    emulator = emulator.rename(folder / "emulator")
    place = {"file": emulator, "folder": folder, "above": folder.parent}[what]
    place.chmod(0o777)
    with pytest.raises(IommufdError, match=f"^{emulator} cannot be trusted: {place} can be written by everybody"):
        grant(str(emulator))
    assert xattr(emulator) is None


def test_what_is_no_executable(emulator: Path, tmp_path: Path) -> None:
    emulator.chmod(0o644)
    with pytest.raises(IommufdError, match="is no executable file"):
        grant(str(emulator))
    os.mkfifo(tmp_path / "fifo", 0o755)
    # One that is gone needs nothing, and these are none.
    for path in ("none", "none/at/all", "fifo", "."):
        assert not grant(f"{tmp_path}/{path}")
    with pytest.raises(IommufdError, match="ENOTDIR"):
        grant(f"{emulator}/below")
    with pytest.raises(IommufdError, match="is not an absolute path"):
        grant("emulator")


def test_what_the_system_refuses(emulator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(IommufdError, match=f"^{emulator} cannot be given CAP_IPC_LOCK .EROFS"):
        grant_patiently(str(emulator))


def test_it_does_not_wait_for_ever(emulator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_path: str) -> Any:
        time.monotonic()
        os.read(os.pipe()[0], 1)

    monkeypatch.setattr(_grant, "_PATIENCE", 0.2)
    monkeypatch.setattr(_grant, "grant", hang)
    with pytest.raises(IommufdError, match=f"^{emulator} did not get CAP_IPC_LOCK within 0.2 seconds"):
        grant_patiently(str(emulator))


def test_the_program(emulator: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks until the file is left alone: systemd forgets what happens to it meanwhile."""
    looks = []

    def look(paths: list[str]) -> tuple[list[str], float]:
        looks.append(time.monotonic())
        # As a package manager does: it makes a link first, and puts the new file in place later.
        if len(looks) == 1:
            os.link(emulator, f"{emulator}.dpkg-tmp")
        if len(looks) == 3:
            replacement = emulator.with_name("emulator.dpkg-new")
            replacement.write_bytes(b"")
            replacement.chmod(0o755)
            replacement.rename(emulator)
        return look_once(paths)

    look_once = _grant._grant_each
    monkeypatch.setattr(_grant, "_grant_each", look)
    assert main(["--until-quiet=0.3", str(emulator), f"{emulator}.gone"]) == 0
    assert len(looks) > 3
    assert looks[-1] - looks[2] > 0.2
    said = f"iommufd-host-grant: {emulator} has got CAP_IPC_LOCK.\n"
    assert capsys.readouterr() == (said * 2, "")
    assert xattr(emulator) == plain(IPC_LOCK)


def test_it_looks_once_where_nobody_waits(emulator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_grant, "_PAUSE", 60)
    assert main([str(emulator)]) == 0
    # Nor where there is nothing, or nothing has happened for longer.
    assert main(["--until-quiet=30", f"{emulator}.gone"]) == 0
    monkeypatch.setattr(time, "time", lambda: emulator.stat().st_ctime + 31)
    assert main(["--until-quiet=30", str(emulator)]) == 0


def test_it_does_not_look_for_ever(emulator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_grant, "_LONGEST", 0.1)
    assert main(["--until-quiet=1e9", str(emulator)]) == 0


def test_one_that_is_refused_does_not_keep_the_others_from_it(emulator: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    (tmp_path / "theirs").chmod(0o777)
    assert main([f"{tmp_path}/theirs", str(emulator)]) == 1
    assert xattr(emulator) == plain(IPC_LOCK)
