# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What may be wanted, and what is seen of the host. What is refused there is in test_iommufd_host_apply.py."""

from __future__ import annotations

import errno
import grp
import os
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _capabilities, _wanted
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._record import BLOCK, CAPABILITY, FILE, NODE, UNIT, Item
from ansible_collections.virt.iommufd.plugins.module_utils._states import FileState, NodeState
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import UnitState
from ansible_collections.virt.iommufd.plugins.module_utils._wanted import (
    View,
    Wanted,
    WantedFile,
    check_path,
    look_at_host,
)

ANY_FILE = WantedFile(b"", 0o644)
UNIT_SAYS = "LoadState=loaded\nUnitFileState=enabled\nActiveState=active\nTriggers=u.service\n"


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ({"files": {"etc/x": ANY_FILE}}, "'etc/x' is no absolute path"),
        ({"nodes": ("/dev/../etc",)}, "in its shortest form"),
        ({"nodes": ("/dev/*/0",)}, "'/dev/\\*/0' may be a pattern in its last part only"),
        ({"blocks": {"/etc/": ()}}, "in its shortest form"),
        ({"capabilities": ("/etc/\0",)}, "in its shortest form"),
        (
            {"files": {"/b": ANY_FILE, "/a": ANY_FILE}, "blocks": {"/a": ()}},
            "^/a is listed as a whole file and for a block",
        ),
        ({"units": ("--now",)}, "'--now' is not the name of a systemd"),
        ({"units": ("a b.path",)}, "is not the name of a systemd"),
        ({"units": ("a.mount",)}, "is not the name of a systemd"),
        ({"modules": ("--remove",)}, "'--remove' is not the name of a kernel module"),
        ({"modules": ("../vfio",)}, "is not the name of a kernel module"),
        ({"modules": ("",)}, "'' is not the name of a kernel module"),
        ({"mode": "0668"}, "'0668' is not an octal mode such as 0660"),
        ({"mode": "4755"}, "is not an octal mode"),
        ({"mode": "u=rw"}, "is not an octal mode"),
    ],
)
def test_what_may_not_be_listed(lists: dict[str, Any], why: str) -> None:
    with pytest.raises(IommufdError, match=why):
        Wanted(**lists).check()


def test_what_may_be_listed() -> None:
    Wanted().check()
    Wanted(
        modules=("iommufd", "vfio-pci", "vfio_iommu_type1", "8021q"),
        files={"/a": ANY_FILE, "/b": ANY_FILE},
        nodes=("/dev/iommu", "/dev/vfio/devices/*"),
        mode="660",
        units=("a@b.service", "\\x2d.timer"),
    ).check()
    Wanted(mode="0660").check()


def test_paths() -> None:
    check_path("/etc/libvirt/qemu.conf")
    for path in ("", ".", "a", "//etc/a", "/etc//a", "/etc/./a", "/etc/../a", "/etc/a/", "/etc/a\0"):
        with pytest.raises(IommufdError, match="is no absolute path in its shortest form"):
            check_path(path)


@pytest.fixture
def kernel_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel with two modules loaded and two built in, one of them with parameters."""
    for name in ("vfio_pci", "iommufd", "printk"):
        (tmp_path / "module" / name).mkdir(parents=True)
    folder = tmp_path / "lib" / os.uname().release
    folder.mkdir(parents=True)
    (folder / "modules.builtin").write_text("kernel/drivers/vfio/vfio-core.ko\nkernel/printk.ko\n")
    monkeypatch.setattr(_wanted, "_LOADED", str(tmp_path / "module"))
    monkeypatch.setattr(_wanted, "_BUILT_IN", f"{tmp_path}/lib/{{}}/modules.builtin")
    return folder


def test_modules_that_are_there(kernel_modules: Path) -> None:
    names = ("iommufd", "vfio-pci", "vfio_pci", "vfio-core", "vfio_core", "printk", "vfio", "core")
    assert _wanted._find_modules(names) == {"iommufd", "vfio-pci", "vfio_pci", "vfio-core", "vfio_core", "printk"}
    assert _wanted._find_modules([]) == frozenset()
    # Where depmod has left no list, what is loaded is still known.
    (kernel_modules / "modules.builtin").unlink()
    assert _wanted._find_modules(names) == {"iommufd", "vfio-pci", "vfio_pci", "printk"}


def test_the_group() -> None:
    assert _wanted._find_gid("") is None
    some = grp.getgrgid(0)
    assert _wanted._find_gid(some.gr_name) == 0
    with pytest.raises(IommufdError, match="This host has no group no\\\\x1b: name in iommufd_host_device_group"):
        _wanted._find_gid("no\x1b")


def test_a_look(tmp_path: Path, kernel_modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is wanted or remembered, each once, and what is not there as such."""
    # Only root may set the real one; tests/kernel does.
    monkeypatch.setattr(_capabilities, "XATTR", "user.stands.in")
    monkeypatch.setattr(_wanted, "kernels_node", lambda _path: NodeState(0o640, 3, 4))
    asked = []

    def run(words: list[str]) -> tuple[int, str, str]:
        asked.append(words)
        return 0, "\n".join([UNIT_SAYS] * 2), ""

    def file(name: str, mode: int = 0o644) -> str:
        path = tmp_path / name
        path.write_bytes(name.encode())
        path.chmod(mode)
        return str(path)

    qemu, link, old = file("qemu", 0o755), f"{tmp_path}/kvm", file("old", 0o755)
    os.symlink("qemu", link)
    for path in (qemu, old):
        os.setxattr(path, "user.stands.in", path[-3:].encode())
    items = [
        Item(FILE, file("was"), None),
        Item(BLOCK, f"{tmp_path}/gone.conf", None),
        *(Item(CAPABILITY, path, {"xattr": None}) for path in (qemu, old, f"{tmp_path}/gone")),
        *(Item(NODE, path, None) for path in ("/dev/zero", "/dev/none")),
        *(Item(UNIT, name, None) for name in ("u.path", "v.path")),
    ]
    wanted = Wanted(
        modules=("iommufd", "nvme"),
        files={file("new"): ANY_FILE, f"{tmp_path}/a/b/none": ANY_FILE},
        capabilities=(link,),
        nodes=("/dev/nul?",),
        group=grp.getgrgid(0).gr_name,
        blocks={file("conf"): ()},
        units=("u.path",),
    )
    file("conf.iommufd_host-new")
    view = look_at_host(items, wanted, run)

    def state(name: str) -> FileState:
        return FileState(name.encode(), 0o644, os.getuid(), os.getgid())

    unit = UnitState(True, True, True, ("u.service",))
    null, zero = (os.stat(path) for path in ("/dev/null", "/dev/zero"))
    assert view == View(
        files={
            **{f"{tmp_path}/{name}": state(name) for name in ("new", "conf", "was")},
            **{f"{tmp_path}/{name}": None for name in ("a/b/none", "gone.conf")},
        },
        missing={
            **{f"{tmp_path}/{name}": [] for name in ("new", "conf", "was", "gone.conf")},
            f"{tmp_path}/a/b/none": [f"{tmp_path}/a", f"{tmp_path}/a/b"],
        },
        real={link: qemu},
        xattrs={qemu: b"emu", old: b"old"},
        nodes={
            "/dev/null": NodeState(null.st_mode & 0o7777, null.st_uid, null.st_gid),
            "/dev/zero": NodeState(zero.st_mode & 0o7777, zero.st_uid, zero.st_gid),
        },
        kernels_nodes=dict.fromkeys(("/dev/null", "/dev/zero"), NodeState(0o640, 3, 4)),
        devices={f"/dev/{name}": f"/sys/devices/virtual/mem/{name}" for name in ("null", "zero")},
        matches={"/dev/nul?": ["/dev/null"], "/dev/zero": ["/dev/zero"], "/dev/none": []},
        unfinished={f"{tmp_path}/conf"},
        units={"u.path": unit, "v.path": unit},
        modules=frozenset({"iommufd"}),
        gid=0,
    )
    assert [words[-3:] for words in asked] == [["--", "u.path", "v.path"]]


def test_nobody_is_asked_for_nothing() -> None:
    def run(words: list[str]) -> tuple[int, str, str]:
        return pytest.fail(f"asked {words}")

    assert look_at_host([], Wanted(), run) == View()


def test_the_policy_is_asked_where_its_file_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{tmp_path}/ours.cil"
    monkeypatch.setattr(_wanted, "POLICY_FILE", path)
    monkeypatch.setattr(_wanted, "is_loaded", lambda _run: True)

    def run(words: list[str]) -> tuple[int, str, str]:
        return pytest.fail(f"asked {words}")

    assert look_at_host([], Wanted(files={path: ANY_FILE}), run).loaded
    assert look_at_host([Item(FILE, path, None)], Wanted(), run).loaded
    assert not look_at_host([], Wanted(files={f"{tmp_path}/other": ANY_FILE}), run).loaded


def test_it_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may lead to a mount whose server is gone."""

    def hang(*_arguments: Any, **_options: Any) -> Any:
        time.monotonic()
        os.read(os.pipe()[0], 1)

    def run(words: list[str]) -> tuple[int, str, str]:
        return pytest.fail(f"asked {words}")

    monkeypatch.setattr(_wanted, "_PATIENCE", 0.2)
    monkeypatch.setattr(_wanted, "open_file", hang)
    for items in ([], [Item(CAPABILITY, f"{tmp_path}/qemu", None)]):
        wanted = Wanted() if items else Wanted(capabilities=(f"{tmp_path}/qemu",))
        with pytest.raises(IommufdError, match=f"^{tmp_path}/qemu was not found within 0.2 seconds"):
            look_at_host(items, wanted, run)
    monkeypatch.setattr(_wanted, "walk", hang)
    for wanted in (Wanted(files={f"{tmp_path}/f": ANY_FILE}), Wanted(nodes=(f"{tmp_path}/*",))):
        with pytest.raises(IommufdError, match=f"^Not all of these were found within 0.2 seconds: {tmp_path}\\."):
            look_at_host([], wanted, run)


def test_an_executable_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def run(words: list[str]) -> tuple[int, str, str]:
        return pytest.fail(f"asked {words}")

    monkeypatch.setattr(_wanted, "open_file", refuse)
    with pytest.raises(IommufdError, match=f"^{tmp_path}/qemu cannot be looked at \\(EACCES"):
        look_at_host([], Wanted(capabilities=(f"{tmp_path}/qemu",)), run)
