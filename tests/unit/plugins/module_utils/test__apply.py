# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is done to make a host what it is to be. What comes of it is in test_iommufd_host_apply.py."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._apply import after, steps_on
from ansible_collections.virt.iommufd.plugins.module_utils._capabilities import with_ipc_lock
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._record import UNIT, Item, Record
from ansible_collections.virt.iommufd.plugins.module_utils._states import FileState, NodeState, split_block
from ansible_collections.virt.iommufd.plugins.module_utils._steps import (
    Effect,
    EnableUnit,
    FollowRules,
    Grant,
    LoadModule,
    Relabel,
    Reload,
    RemoveFile,
    RemoveUnfinished,
    RunUnit,
    StartUnit,
    Step,
    StopUnit,
    WriteFile,
)
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import UnitState
from ansible_collections.virt.iommufd.plugins.module_utils._undo import steps_back
from ansible_collections.virt.iommufd.plugins.module_utils._wanted import View, Wanted, WantedFile

IPC_LOCK, NET_RAW = 1 << 14, 1 << 13
QEMU = "/usr/bin/qemu"
RULE, UNIT_FILE = "/etc/udev/rules.d/1.rules", "/etc/systemd/system/u.path"
LABEL = {"security.selinux": b"system_u:object_r:etc_t:s0\0"}
FILE = WantedFile(b"new\n", 0o644)
MADE = FileState(b"new\n", 0o644, 0, 0)
# As it is once all of it was done, where SELinux has given it a label.
LABELLED = MADE._replace(xattrs=LABEL)
UNUSED, USED = UnitState(False, False, False), UnitState(True, True, True, ("u.service",))


def xattr(permitted: int, effective: bool = True) -> bytes:
    return struct.pack("<5I", 0x02000000 | effective, permitted, 0, 0, 0)


GRANTED = xattr(IPC_LOCK)


def effects(wanted: Wanted, view: View) -> list[Effect]:
    """What is done. Nothing of it is in the record's way, and what is said belongs to something."""
    steps = steps_on(wanted, view)
    assert not any(step.item for step in steps)
    assert all(step.effect for step in steps)
    return [step.effect for step in steps if step.effect]


def said(wanted: Wanted, view: View) -> list[str]:
    """What the user reads."""
    return [step.says for step in steps_on(wanted, view) if step.says]


def test_nothing_wanted() -> None:
    assert steps_on(Wanted(), View()) == []


def test_modules() -> None:
    wanted = Wanted(modules=("iommufd", "vfio-pci"))
    assert effects(wanted, View()) == [LoadModule("iommufd"), LoadModule("vfio-pci")]
    assert said(wanted, View()) == ["The kernel module iommufd is loaded.", "The kernel module vfio-pci is loaded."]
    (step,) = steps_on(wanted, View(modules=frozenset({"iommufd"})))
    assert (step.kind, step.path, step.before, step.after) == ("module", "vfio-pci", "", "vfio-pci\n")
    assert steps_on(wanted, View(modules=frozenset({"iommufd", "vfio-pci"}))) == []


def test_grants() -> None:
    view = View(
        real={"/usr/bin/kvm": QEMU, "/b": "/b", "/c": "/c"}, xattrs={QEMU: None, "/b": xattr(NET_RAW), "/c": GRANTED}
    )
    wanted = Wanted(capabilities=("/usr/bin/kvm", "/b", "/c"))
    assert effects(wanted, view) == [Grant(QEMU), Grant("/b")]
    first, second = steps_on(wanted, view)
    assert (first.kind, first.path, first.says) == ("capability", QEMU, f"{QEMU} has got CAP_IPC_LOCK.")
    assert (first.before, first.after) == ("", "permitted: cap_ipc_lock\ninheritable: \neffective: true\n")
    assert second.before == "permitted: cap_net_raw\ninheritable: \neffective: true\n"
    assert second.after == "permitted: cap_net_raw, cap_ipc_lock\ninheritable: \neffective: true\n"
    for path, attribute in ((QEMU, None), ("/b", xattr(NET_RAW))):
        view.xattrs[path] = with_ipc_lock(attribute)
    assert steps_on(wanted, view) == []
    view.xattrs["/c"] = struct.pack("<6I", 0x03000001, IPC_LOCK, 0, 0, 0, 1000)
    with pytest.raises(IommufdError, match=r"^/c: .* are for the user namespace of uid 1000 only"):
        steps_on(wanted, view)
    view.xattrs["/c"] = xattr(NET_RAW, False)
    with pytest.raises(IommufdError, match=r"^/c: It has cap_net_raw that are not effective"):
        steps_on(wanted, view)


OTHER = FileState(b"old\n", 0o600, 1, 2, {**LABEL, "user.a": b"x"})


@pytest.mark.parametrize(
    ("now", "state", "says", "before", "shown"),
    [
        (None, MADE, "/f is made.", "", "new\n"),
        (FileState(b"old\n", 0o644, 0, 0), MADE, "/f is written.", "old\n", "new\n"),
        # What else a file has is its own.
        (
            OTHER,
            MADE._replace(xattrs=OTHER.xattrs),
            "/f is written.",
            f"{NodeState(0o600, 1, 2)}\nold\n",
            "mode 0644, root:root\nnew\n",
        ),
        # Only who may write it is different.
        (
            MADE._replace(mode=0o664),
            MADE,
            "/f is written.",
            "mode 0664, root:root\nnew\n",
            "mode 0644, root:root\nnew\n",
        ),
        (
            MADE._replace(uid=1),
            MADE,
            "/f is written.",
            f"{NodeState(0o644, 1, 0)}\nnew\n",
            "mode 0644, root:root\nnew\n",
        ),
        (FileState(b"PK\0", 0o644, 0, 0), MADE, "/f is written.", "(3 bytes that are no text)\n", "new\n"),
    ],
)
def test_files(now: FileState | None, state: FileState, says: str, before: str, shown: str) -> None:
    step = steps_on(Wanted(files={"/f": FILE}), View(files={"/f": now}, missing={"/f": []}))[0]
    assert step == Step("file", "/f", WriteFile("/f", state), says, before, shown)


def test_files_that_are_as_wanted() -> None:
    for state in (MADE, LABELLED):
        assert steps_on(Wanted(files={"/f": FILE}), View(files={"/f": state})) == []


def test_a_program() -> None:
    wanted = Wanted(files={"/p": WantedFile(b"PK\0", 0o755, program=True)})
    state = FileState(b"PK\0", 0o755, 0, 0)
    view = View(files={"/p": None}, missing={"/p": []})
    assert effects(wanted, view)[0] == WriteFile("/p", state, program=True)
    assert steps_on(wanted, view)[0].after == "(3 bytes that are no text)\n"
    assert steps_on(wanted, View(files={"/p": state})) == []


def test_new_files_get_the_label_of_their_place() -> None:
    """With the folders that are made for them, the outermost first. Those that were there keep theirs."""
    wanted = Wanted(files=dict.fromkeys(("/a/b/1", "/a/2", "/3", "/4"), FILE), blocks={"/c": ("/dev/iommu",)})
    view = View(
        files={"/a/b/1": None, "/a/2": None, "/3": OTHER, "/4": LABELLED, "/c": OTHER._replace(content=b"")},
        missing={"/a/b/1": ["/a", "/a/b"], "/a/2": ["/a"], "/3": [], "/4": [], "/c": []},
    )
    steps = steps_on(wanted, view)
    assert steps[-1] == Step("file", "/a/2", Relabel(("/a", "/a/b", "/a/b/1", "/a/2")))
    assert [step.path for step in steps[:-1]] == ["/a/b/1", "/a/2", "/3", "/c"]
    # A file for a block may be new, too.
    view = View(files={"/c": None}, missing={"/c": []})
    assert effects(Wanted(blocks={"/c": ()}), view)[-1] == Relabel(("/c",))


LIBVIRTS = [f"/dev/{name}" for name in ("null", "full", "zero", "random", "urandom", "ptmx", "kvm", "userfaultfd")]


def block(*nodes: str) -> bytes:
    """The block as it is to be."""
    note = "# libvirt takes the first setting of a name, which is this one. It holds what the next one does, too.\n"
    lines = "".join(f'  "{node}",\n' for node in nodes)
    return f"# BEGIN iommufd_host\n{note}cgroup_device_acl = [\n{lines}]\n# END iommufd_host\n".encode()


@pytest.mark.parametrize(
    ("now", "nodes", "rest"),
    [
        (None, [*LIBVIRTS, "/dev/iommu", "/dev/vfio/devices/vfio0"], b""),
        (b"a = 1\nb = 2", [*LIBVIRTS, "/dev/iommu", "/dev/vfio/devices/vfio0"], b"a = 1\nb = 2"),
        (b"#cgroup_device_acl = [ 'x' ]\n", [*LIBVIRTS, "/dev/iommu", "/dev/vfio/devices/vfio0"], None),
        # The list that the rest of the file has counts, with whatever else is in it.
        (
            b"cgroup_device_acl = [ '/dev/iommu', '/dev/x' ]\n\xff",
            ["/dev/iommu", "/dev/x", "/dev/vfio/devices/vfio0"],
            None,
        ),
        # An earlier block does not.
        (block("/dev/y") + b"a\n", [*LIBVIRTS, "/dev/iommu", "/dev/vfio/devices/vfio0"], b"a\n"),
        # Wherever somebody has moved it, and however often it is there.
        (
            b"a\r\n" + block("/dev/y") + b"b\n" + block("/dev/z") + b"c",
            [*LIBVIRTS, "/dev/iommu", "/dev/vfio/devices/vfio0"],
            b"a\r\nb\nc",
        ),
    ],
)
def test_blocks(now: bytes | None, nodes: list[str], rest: bytes | None) -> None:
    before = None if now is None else FileState(now, 0o640, 3, 4, LABEL)
    wanted = Wanted(blocks={"/c": ("/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/iommu")})
    view = View(files={"/c": before}, missing={"/c": []})
    step = steps_on(wanted, view)[0]
    rest = (now or b"") if rest is None else rest
    state = (before or FileState(b"", 0o600, 0, 0))._replace(content=block(*nodes) + rest)
    assert step.effect == WriteFile("/c", state)
    assert (step.kind, step.path, step.says) == ("block", "/c", "/c has the block of iommufd_host.")
    assert split_block(state.content)[1] == rest
    # Once it is there nothing is to be done.
    assert steps_on(wanted, View(files={"/c": state})) == []


def test_the_diff_of_a_block_shows_no_more_of_the_file() -> None:
    """The rest of it may hold a password."""
    now = FileState(b"vnc_password = 'secret'\n" + block("/dev/x"), 0o600, 0, 0)
    step = steps_on(Wanted(blocks={"/c": ("/dev/iommu",)}), View(files={"/c": now}, missing={"/c": []}))[0]
    assert '"/dev/x"' in step.before
    assert '"/dev/iommu"' in step.after
    assert "secret" not in step.before + step.after + step.says


def test_half_a_block() -> None:
    view = View(files={"/c": FileState(b"# END iommufd_host\n", 0o600, 0, 0)})
    with pytest.raises(IommufdError, match=r"^/c: It has one of the lines"):
        steps_on(Wanted(blocks={"/c": ()}), view)


FOLLOWS = NodeState(0o660, 0, 36)


@pytest.mark.parametrize(
    ("node", "group", "mode", "other"),
    [
        (FOLLOWS, "vm", "0660", False),
        (FOLLOWS, "vm", "660", False),
        # Whose it is the rule does not say.
        (FOLLOWS._replace(uid=1), "vm", "0660", False),
        (FOLLOWS._replace(mode=0o600), "vm", "0660", True),
        (FOLLOWS._replace(gid=0), "vm", "0660", True),
        # Nothing is said of one of them, or of both.
        (FOLLOWS._replace(mode=0o600), "vm", "", False),
        (FOLLOWS._replace(gid=0), "vm", "", True),
        (FOLLOWS._replace(gid=0), "", "0660", False),
        (FOLLOWS._replace(mode=0o600), "", "0660", True),
        (NodeState(0o600, 1, 0), "", "", False),
    ],
)
def test_nodes_that_the_rule_is_not_in_force_for(node: NodeState, group: str, mode: str, other: bool) -> None:
    """A run that was cut off after it had written the rule has told nobody. To tell udev again changes nothing."""
    wanted = Wanted(files={RULE: FILE}, nodes=("/dev/iommu", "/d/*"), group=group, mode=mode)
    view = View(
        files={RULE: LABELLED},
        nodes={"/dev/iommu": FOLLOWS, "/d/1": node},
        matches={"/dev/iommu": ["/dev/iommu"], "/d/*": ["/d/1", "/d/gone"]},
        gid=36 if group else None,
    )
    assert effects(wanted, view) == ([Reload(("udev",)), FollowRules(wanted.nodes)] if other else [])
    assert said(wanted, view) == []
    # Those that are only remembered are not asked for.
    assert steps_on(wanted._replace(nodes=("/dev/iommu",)), view) == []


def test_nodes_follow_a_rule_that_is_new() -> None:
    wanted = Wanted(files={RULE: FILE, "/etc/other": FILE}, nodes=("/dev/iommu", "/d/*"), mode="0660")
    view = View(
        files={RULE: None, "/etc/other": LABELLED},
        missing={RULE: []},
        nodes={"/dev/iommu": FOLLOWS},
        matches={"/dev/iommu": ["/dev/iommu"], "/d/*": []},
    )
    assert effects(wanted, view)[1:] == [Relabel((RULE,)), Reload(("udev",)), FollowRules(wanted.nodes)]
    # Where there is no node that could follow, udev has the rule for those to come.
    assert effects(wanted._replace(nodes=()), view)[1:] == [Relabel((RULE,)), Reload(("udev",))]
    # And of a file that is not udev's it need not know.
    view = replace(view, files={RULE: LABELLED, "/etc/other": OTHER})
    assert [type(effect) for effect in effects(wanted, view)] == [WriteFile]


RESTARTED, STARTED = RunUnit("u.path", anew=True), RunUnit("u.path", anew=False)
ENABLED, RELOAD = EnableUnit("u.path"), Reload(("systemd",))


@pytest.mark.parametrize(
    ("unit", "file", "done", "says"),
    [
        (USED, LABELLED, [], []),
        (USED, LABELLED._replace(content=b"old"), [RELOAD, RESTARTED], ["u.path is started anew."]),
        # Only its mode is another, which is enough.
        (USED, LABELLED._replace(mode=0o600), [RELOAD, RESTARTED], ["u.path is started anew."]),
        (UNUSED, None, [ENABLED, RELOAD, STARTED], ["u.path is enabled.", "u.path is started."]),
        # Cut off before systemd was told, or before it was started; or stopped or disabled by somebody.
        (UNUSED, LABELLED, [ENABLED, RELOAD, STARTED], ["u.path is enabled.", "u.path is started."]),
        (UnitState(True, True, False), LABELLED, [STARTED], ["u.path is started."]),
        (UnitState(True, False, True), LABELLED, [ENABLED, RELOAD], ["u.path is enabled."]),
        (UnitState(True, True, False), LABELLED._replace(uid=1), [RELOAD, STARTED], ["u.path is started."]),
        (
            UnitState(True, False, True),
            LABELLED._replace(gid=1),
            [ENABLED, RELOAD, RESTARTED],
            ["u.path is enabled.", "u.path is started anew."],
        ),
    ],
)
def test_units(unit: UnitState, file: FileState | None, done: list[Effect], says: list[str]) -> None:
    wanted = Wanted(files={UNIT_FILE: FILE}, units=("u.path",))
    view = View(files={UNIT_FILE: file}, missing={UNIT_FILE: []}, units={"u.path": unit})
    # The file comes first, and is in no test of its own.
    files = (WriteFile, Relabel)
    assert [effect for effect in effects(wanted, view) if not isinstance(effect, files)] == done
    assert [each for each in said(wanted, view) if each.startswith("u.path")] == says
    assert all(isinstance(effect, files) for effect in effects(wanted, view)[: -len(done) or None])


def test_a_unit_whose_file_stays_is_left_alone() -> None:
    """Only its own file has it started anew, not another's."""
    other = "/etc/systemd/system/other.service"
    wanted = Wanted(files={UNIT_FILE: FILE, other: FILE, "/etc/u.path": FILE}, units=("u.path",))
    view = View(
        files={UNIT_FILE: LABELLED, other: LABELLED._replace(content=b""), "/etc/u.path": LABELLED._replace(mode=0)},
        units={"u.path": USED},
    )
    assert effects(wanted, view)[2:] == [RELOAD]


def test_what_a_run_that_was_cut_off_has_left() -> None:
    """It had written the files, and not yet done what follows. What nobody wants any more is left out."""
    wanted = Wanted(files={UNIT_FILE: FILE, RULE: FILE}, units=("u.path",))
    view = View(files={UNIT_FILE: MADE, RULE: LABELLED, "/gone": None}, units={"u.path": USED}, unfinished={RULE})
    assert effects(wanted, view) == [RemoveUnfinished(RULE)]
    due = [("restart", "u.path"), ("restart", "v.path"), ("relabel", UNIT_FILE), ("relabel", "/gone")]
    assert [step.effect for step in steps_on(wanted, view, due)] == [
        RemoveUnfinished(RULE),
        Relabel((UNIT_FILE,)),
        RunUnit("u.path", anew=True),
    ]


def test_the_diff_of_a_unit() -> None:
    view = View(files={UNIT_FILE: None}, missing={UNIT_FILE: []}, units={"u.path": UNUSED})
    wanted = Wanted(files={UNIT_FILE: FILE}, units=("u.path",))
    enabled, started = (step for step in steps_on(wanted, view) if step.kind == UNIT and step.says)
    assert (enabled.path, enabled.before, enabled.after) == ("u.path", "disabled, inactive\n", "enabled, inactive\n")
    assert (started.path, started.before, started.after) == ("u.path", "disabled, inactive\n", "disabled, active\n")
    # One that runs before and afterwards has no other state to show.
    (anew,) = (step for step in steps_on(wanted, replace(view, units={"u.path": USED})) if step.kind == UNIT)
    assert (anew.before, anew.after) == ("", "")


@pytest.mark.parametrize(("loaded", "written"), [(True, True), (False, True), (False, False), (True, False)])
def test_the_policy_has_what_its_file_says(loaded: bool, written: bool) -> None:
    """Also where somebody has removed the module."""
    path = "/usr/local/share/iommufd_host.cil"
    view = View(
        files={path: None if written else FileState(FILE.content, FILE.mode, 0, 0)}, missing={path: []}, loaded=loaded
    )
    told = [each for each in effects(Wanted(files={path: FILE}), view) if isinstance(each, Reload)]
    assert told == ([] if loaded and not written else [Reload(("selinux",))])


@pytest.mark.parametrize("reload", [True, False])
def test_systemd_reads_its_files_again_where_it_is_asked_to(reload: bool) -> None:
    """To read them changes nothing."""
    assert steps_on(Wanted(reload=reload), View()) == ([Step("", "systemd and udev", RELOAD)] if reload else [])
    wanted = Wanted(files={RULE: FILE}, reload=reload)
    view = View(files={RULE: None}, missing={RULE: []})
    assert effects(wanted, view)[-1] == Reload(("systemd", "udev") if reload else ("udev",))


def test_the_order() -> None:
    """What grants anything by itself comes after all that it reads."""
    wanted = Wanted(
        modules=("iommufd",),
        files={UNIT_FILE: FILE, RULE: FILE, "/a/p": WantedFile(b"PK", 0o755, program=True)},
        capabilities=("/usr/bin/kvm",),
        nodes=("/dev/iommu",),
        mode="0660",
        blocks={"/c": ("/dev/iommu",)},
        units=("u.path", "u.timer"),
    )
    view = View(
        files=dict.fromkeys((UNIT_FILE, RULE, "/a/p", "/c")),
        missing={UNIT_FILE: [], RULE: [], "/a/p": ["/a"], "/c": []},
        real={"/usr/bin/kvm": QEMU},
        xattrs={QEMU: None},
        nodes={"/dev/iommu": NodeState(0o600, 0, 0)},
        matches={"/dev/iommu": ["/dev/iommu"]},
        units={"u.path": UNUSED, "u.timer": UNUSED},
    )
    done = effects(wanted, view)
    written = [effect.path for effect in done if isinstance(effect, WriteFile)]
    assert written == [UNIT_FILE, RULE, "/a/p", "/c"]
    assert [effect for effect in done if not isinstance(effect, WriteFile)] == [
        LoadModule("iommufd"),
        Grant(QEMU),
        Relabel(("/a", UNIT_FILE, RULE, "/a/p", "/c")),
        EnableUnit("u.path"),
        EnableUnit("u.timer"),
        Reload(("systemd", "udev")),
        FollowRules(("/dev/iommu",)),
        RunUnit("u.path", anew=False),
        RunUnit("u.timer", anew=False),
    ]
    assert [type(effect) for effect in done[2:7]] == [WriteFile] * 4 + [Relabel]
    assert all(
        step.says for step in steps_on(wanted, view) if not isinstance(step.effect, (Relabel, Reload, FollowRules))
    )


def test_after() -> None:
    """What check mode tells of the second half, once the first would have been made."""
    units = {"u.path": USED, "v.path": USED, "w.path": USED}
    view = View(files={"/f": MADE}, units=units)
    steps = [
        Step(UNIT, "u.path", StopUnit("u.path", ("u.service",), disable=False), "u.path is stopped."),
        Step(UNIT, "v.path", StopUnit("v.path", (), disable=True), "v.path is disabled and stopped."),
        Step("file", "/f", RemoveFile("/f", ()), "/f is removed."),
        Step("", "systemd and udev", RELOAD),
        Step(UNIT, "x.path"),
        Step(UNIT, "y.path", StartUnit("y.path", USED)),
    ]
    found = after(steps, view)
    assert found == replace(
        view,
        units={
            "u.path": UnitState(True, True, False, ("u.service",)),
            "v.path": UnitState(True, False, False, ("u.service",)),
            "w.path": USED,
        },
    )
    # What was seen stays what was seen.
    assert view.units is units
    assert units["u.path"] == USED
    assert after([], view) == view


def test_a_unit_that_is_stopped_for_what_is_taken_is_started_again() -> None:
    items = [Item(UNIT, "u.path", None), Item("capability", QEMU, {"xattr": None})]
    wanted = Wanted(files={UNIT_FILE: FILE}, units=("u.path",))
    view = View(files={UNIT_FILE: LABELLED}, xattrs={QEMU: GRANTED}, units={"u.path": USED})
    assert effects(wanted, view) == []
    back = steps_back(Record("/r/r", items), wanted, view)
    assert effects(wanted, after(back, view)) == [STARTED]
