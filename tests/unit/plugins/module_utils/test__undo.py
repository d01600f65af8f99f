# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is remembered, and what is done to put it back. What comes of it is in test_iommufd_host_apply.py."""

from __future__ import annotations

import struct

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._record import (
    BLOCK,
    CAPABILITY,
    FILE,
    NODE,
    UNIT,
    Item,
    Record,
)
from ansible_collections.virt.iommufd.plugins.module_utils._states import FileState, NodeState
from ansible_collections.virt.iommufd.plugins.module_utils._steps import (
    Effect,
    FollowRules,
    Reload,
    RemoveFile,
    RemoveUnfinished,
    SetCapability,
    SetNode,
    StartUnit,
    StopUnit,
    WriteFile,
)
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import UnitState
from ansible_collections.virt.iommufd.plugins.module_utils._undo import gives_ipc_lock, new_items, steps_back
from ansible_collections.virt.iommufd.plugins.module_utils._wanted import View, Wanted, WantedFile

IPC_LOCK, NET_RAW = 1 << 14, 1 << 13


def xattr(permitted: int, effective: bool = True) -> bytes:
    return struct.pack("<5I", 0x02000000 | effective, permitted, 0, 0, 0)


GRANTED = xattr(IPC_LOCK)
# What a user can give to his own file.
OF_A_USER = struct.pack("<6I", 0x03000001, IPC_LOCK, 0, 0, 0, 1000)
QEMU = "/usr/bin/qemu"
OLD = FileState(b"old", 0o640, 1, 2, {"user.a": b"\xff"})
NEW = FileState(b"new", 0o644, 0, 0)
CONF = FileState(b"a\n# BEGIN iommufd_host\nx\n# END iommufd_host\nb", 0o600, 3, 4)
ONLY_BLOCK = FileState(b"# BEGIN iommufd_host\nx\n# END iommufd_host\n", 0o600, 3, 4)
ANY_FILE = WantedFile(b"", 0o644)


def of_file(before: FileState | None, kind: str = FILE, folders: tuple[str, ...] = ()) -> Item:
    return Item(kind, "/f", None if before is None else before.to_json() if kind == FILE else {}, folders)


def of_qemu(before: bytes | None) -> Item:
    return Item(CAPABILITY, QEMU, {"xattr": None if before is None else before.hex()})


def of_unit(before: tuple[bool, bool] | None) -> Item:
    return Item(UNIT, "u.path", None if before is None else {"enabled": before[0], "active": before[1]})


def of_node(path: str, mode: str | None) -> Item:
    device = "/sys/devices/0000:01:00.0"
    return Item(NODE, path, None if mode is None else {"mode": mode, "uid": 0, "gid": 0, "device": device})


def effects(items: list[Item], view: View, wanted: Wanted | None = None) -> list[Effect]:
    """What is done. Every item that is not wanted is done with, once, whatever there was to do."""
    wanted = wanted or Wanted()
    steps = steps_back(Record("/r/r", items), wanted, view)
    done = [step.item for step in steps if step.item]
    assert len(done) == len(set(map(id, done)))
    if wanted == Wanted():
        assert {item.key for item in done} == {item.key for item in items}
    assert all(step.effect for step in steps if step.says)
    # A reader of what was put back knows each thing by its kind and path.
    assert all((step.kind, step.path) == step.item.key for step in steps if step.item)
    return [step.effect for step in steps if step.effect]


@pytest.mark.parametrize(
    ("attribute", "has"),
    [
        (None, False),
        (b"", False),
        (xattr(NET_RAW), False),
        (GRANTED, True),
        # It would be in force for whoever has it inheritable, and for a program that asks for it.
        (xattr(IPC_LOCK, False), True),
        (struct.pack("<5I", 0x02000000, 0, IPC_LOCK, 0, 0), True),
        (OF_A_USER, False),
    ],
)
def test_what_gives_it_in_any_way(attribute: bytes | None, has: bool) -> None:
    assert gives_ipc_lock(attribute) == has


def test_what_gives_nobody_knows_what() -> None:
    with pytest.raises(IommufdError, match="a form that is not known"):
        gives_ipc_lock(b"?")


@pytest.mark.parametrize(
    ("item", "now", "effect"),
    [
        (of_file(None), NEW, RemoveFile("/f", ())),
        (of_file(None, folders=("/a",)), None, RemoveFile("/f", ("/a",))),
        (of_file(OLD), NEW, WriteFile("/f", OLD)),
        (of_file(OLD), None, WriteFile("/f", OLD)),
        (of_file(OLD), OLD, RemoveUnfinished("/f")),
        (of_file(None, BLOCK), ONLY_BLOCK, RemoveFile("/f", ())),
        (of_file(OLD, BLOCK), ONLY_BLOCK, WriteFile("/f", FileState(b"", 0o600, 3, 4))),
        (of_file(OLD, BLOCK), CONF, WriteFile("/f", FileState(b"a\nb", 0o600, 3, 4))),
        (of_file(None, BLOCK), CONF, WriteFile("/f", FileState(b"a\nb", 0o600, 3, 4))),
        (of_file(None, BLOCK), NEW, RemoveUnfinished("/f")),
        (of_file(None, BLOCK), None, RemoveFile("/f", ())),
        (of_file(OLD, BLOCK), None, RemoveUnfinished("/f")),
    ],
)
def test_a_file_back(item: Item, now: FileState | None, effect: Effect | None) -> None:
    assert effects([item], View(files={"/f": now})) == ([effect] if effect else [])


def test_the_diff_does_not_show_the_bytes_of_a_program() -> None:
    program = FileState(b"#!/usr/bin/python3\nPK\0\xff", 0o755, 0, 0)
    (step,) = steps_back(Record("/r/r", [of_file(None)]), Wanted(), View(files={"/f": program}))
    assert step.before == "(23 bytes that are no text)\n"


def test_the_diff_shows_of_a_file_with_a_block_the_block_alone() -> None:
    """The rest of it may hold a password."""
    (step,) = steps_back(Record("/r/r", [of_file(None, BLOCK)]), Wanted(), View(files={"/f": CONF}))
    assert (step.before, step.after) == ("# BEGIN iommufd_host\nx\n# END iommufd_host\n", "")


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
        (OF_A_USER, GRANTED, None),
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
        (None, {QEMU: OF_A_USER}),
    ],
)
def test_no_capability_to_take(before: bytes | None, xattrs: dict[str, bytes | None]) -> None:
    assert effects([of_qemu(before)], View(xattrs=xattrs)) == []


def test_a_capability_of_a_form_that_is_not_known() -> None:
    with pytest.raises(IommufdError, match=f"^{QEMU}: .* a form that is not known"):
        effects([of_qemu(None)], View(xattrs={QEMU: b"?"}))


def test_the_diff_shows_what_capabilities_a_file_has() -> None:
    view = View(xattrs={QEMU: xattr(NET_RAW | IPC_LOCK)})
    (step,) = steps_back(Record("/r/r", [of_qemu(xattr(NET_RAW, False))]), Wanted(), view)
    assert step.before == "permitted: cap_net_raw, cap_ipc_lock\ninheritable: \neffective: true\n"
    assert step.after == "permitted: cap_net_raw\ninheritable: \neffective: true\n"


KERNELS = NodeState(0o600, 0, 0)
OURS = NodeState(0o660, 0, 36)


@pytest.mark.parametrize(
    ("items", "nodes", "after"),
    [
        ([of_node("/d/1", "0640")], {"/d/1": OURS}, [SetNode("/d/1", NodeState(0o640, 0, 0))]),
        ([of_node("/d/1", "0640")], {"/d/1": NodeState(0o640, 0, 0)}, []),
        ([of_node("/d/1", "0640")], {}, []),
        ([of_node("/d/1", None)], {"/d/1": OURS}, [SetNode("/d/1", KERNELS), FollowRules(("/d/1",))]),
        # A run may have been cut off before udev was told.
        ([of_node("/d/1", None)], {"/d/1": KERNELS}, [FollowRules(("/d/1",))]),
        ([of_node("/d/1", None)], {}, []),
        # The one that came later is nobody's but the pattern's.
        (
            [of_node("/d/*", None), of_node("/d/1", "0600")],
            {"/d/1": OURS, "/d/2": OURS},
            [SetNode("/d/1", KERNELS), SetNode("/d/2", KERNELS), FollowRules(("/d/2",))],
        ),
    ],
)
def test_nodes_back(items: list[Item], nodes: dict[str, NodeState], after: list[Effect]) -> None:
    matches = {item.path: [path for path in nodes if item.path in (path, "/d/*")] for item in items}
    view = View(
        nodes=nodes,
        kernels_nodes=dict.fromkeys(nodes, KERNELS),
        devices=dict.fromkeys(nodes, "/sys/devices/0000:01:00.0"),
        matches=matches,
    )
    assert effects(items, view) == after


def test_the_node_of_another_device() -> None:
    """The kernel gave it the number that was free. What was right for the one before is not for this one."""
    view = View(
        nodes={"/d/1": NodeState(0o600, 0, 36)},
        kernels_nodes={"/d/1": KERNELS},
        devices={"/d/1": "/sys/devices/0000:02:00.0"},
        matches={"/d/1": ["/d/1"]},
    )
    assert effects([of_node("/d/1", "0666")], view) == [SetNode("/d/1", KERNELS), FollowRules(("/d/1",))]


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
    assert [step.path for step in steps][1:3] == [unit, rule]


def test_who_has_yet_to_be_told_of_an_earlier_run() -> None:
    """One that was cut off after it had written a file, or removed it, and before it told anybody."""
    steps = steps_back(
        Record("/r/r", [], [("reload", "systemd"), ("reload", "udev"), ("restart", "v.path")]), Wanted(), View()
    )
    assert [(step.effect, step.says) for step in steps] == [(Reload(("systemd", "udev")), "")]
    rule = "/etc/udev/rules.d/1.rules"
    items = [Item(FILE, rule, None), of_unit(None)]
    steps = steps_back(
        Record("/r/r", items, [("reload", "udev")]), Wanted(), View(files={rule: NEW}, units={"u.path": USED})
    )
    # Each is told once.
    assert [step.effect for step in steps] == [STOP, RemoveFile(rule, ()), Reload(("systemd", "udev"))]


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
    wanted = Wanted(
        files={"/f": ANY_FILE},
        capabilities=("/usr/bin/kvm",),
        nodes=("/d/*",),
        blocks={"/b": ("/dev/iommu",)},
        units=("u.path",),
    )
    view = View(
        files={"/f": NEW, "/b": CONF}, real={"/usr/bin/kvm": QEMU}, xattrs={QEMU: GRANTED}, units={"u.path": USED}
    )
    view.missing.update({"/f": [], "/b": []})
    assert steps_back(Record("/r/r", items), wanted, view) == []
    assert new_items(Record("/r/r", items), wanted, view) == []


def test_what_is_recorded() -> None:
    wanted = Wanted(
        modules=("vfio-pci",),
        files=dict.fromkeys(("/f", "/new"), ANY_FILE),
        blocks=dict.fromkeys(("/b", "/a/b"), ()),
        units=("u.path", "none.path"),
    )
    view = View(
        files={"/f": OLD, "/new": None, "/b": CONF, "/a/b": None},
        missing={"/f": [], "/new": [], "/b": [], "/a/b": ["/a"]},
        units={"u.path": UnitState(True, True, False), "none.path": UNUSED},
    )
    assert new_items(Record("/r/r"), wanted, view) == [
        of_file(OLD),
        Item(FILE, "/new", None),
        # Nothing but the block is taken out of it again, so nothing else is kept of it.
        Item(BLOCK, "/b", {}),
        Item(BLOCK, "/a/b", None, ("/a",)),
        of_unit((True, False)),
        Item(UNIT, "none.path", None),
    ]


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


def test_nodes_that_are_recorded() -> None:
    wanted = Wanted(nodes=("/d/*", "/d/1"))
    view = View(
        nodes={"/d/1": KERNELS},
        devices={"/d/1": "/sys/devices/0000:01:00.0"},
        matches={"/d/*": ["/d/1"], "/d/1": ["/d/1"]},
    )
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
    (second, third) = new_items(
        Record("/r/r", [first]), Wanted(files=dict.fromkeys(("/a/b/2", "/ab/3"), ANY_FILE)), view
    )
    assert (second.folders, third.folders) == (("/a", "/a/b"), ("/ab",))
