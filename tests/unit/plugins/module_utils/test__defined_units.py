# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Units that start VMs, by what systemd answers. A real one is asked in tests/kernel."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _defined_units
from ansible_collections.virt.iommufd.plugins.module_utils._defined_units import (
    find_defined_units,
    find_started_at_boot,
    note_limits_at_boot,
)

QEMU = "/usr/bin/qemu-system-x86_64"
WORDS = [QEMU, "-m", "1G", "-device", "vfio-pci,host=01:00.0"]
Answer = tuple[int, str, str]


class Systemd:
    """Answers for a host with these services, each with its words and its other properties."""

    def __init__(self, **services: dict[str, Any]) -> None:
        self.services = {f"{name}.service": shown for name, shown in services.items()}
        self.asked: list[list[str]] = []
        self.refused: dict[str, Answer] = {}
        self.missing = ""

    def __call__(self, words: list[str]) -> Answer:
        self.asked.append(words)
        if words[0] == self.missing:
            raise FileNotFoundError(errno.ENOENT, "no")
        refused = next((answer for word, answer in self.refused.items() if word in words), None)
        if refused:
            return refused
        if words[0] == "busctl":
            assert words[1:4] == ["--json=short", "call", "org.freedesktop.systemd1"]
            unit = words[4].rpartition("/")[2].replace("_2e", ".").replace("_40", "@")
            shown = self.services[unit]
            values = {"Id": unit, "After": shown.get("After", []), "FragmentPath": f"/etc/systemd/system/{unit}"}
            values.update({key: shown[key] for key in ("FragmentPath", "Slice") if key in shown})
            values["Type"] = shown.get("Type", "simple")
            if "words" in shown:
                values["ExecStartEx"] = [[shown["words"][0], shown["words"], [], 0]]
            return 0, json.dumps({"type": "a{sv}", "data": [{key: {"data": v} for key, v in values.items()}]}), ""
        if words[1] == "list-unit-files":
            # One that was made of a template is not among them.
            files = [each for each in self.services if "@" not in each]
            return 0, "".join(f"{name} enabled enabled\n" for name in [*files, "vm@.service"]), ""
        names = words[words.index("--") + 1 :]
        if "--property=Id,ExecStart" in words:
            assert names[0] == "*.service"
            # What does not run matches a pattern with --all alone.
            names += [each for each in self.services if "@" in each and "--all" in words]
            return (
                0,
                "\n".join(
                    f"ExecStart={{ argv[]={' '.join(self.services[n].get('words', []))} }}\nId={n}\n" for n in names[1:]
                ),
                "",
            )
        known = {"default.target": {"Id": "graphical.target"}, "multi-user.target": {"RequiredBy": "graphical.target"}}
        lines = []
        for name in names:
            shown = {"Id": name, **known.get(name, {}), **self.services.get(name, {})}
            lines.append("".join(f"{key}={v}\n" for key, v in shown.items() if isinstance(v, str)))
        return 0, "\n".join(lines), ""


def test_units_that_start_vms() -> None:
    systemd = Systemd(
        b={"words": WORDS, "WantedBy": "multi-user.target", "After": ["a.service", "ready.service", "sysinit.target"]},
        a={"words": WORDS, "Type": "forking"},
        # It may still pin as the next one starts.
        ready={"words": WORDS, "Type": "notify"},
        plain={"words": [QEMU, "-m", "1G"], "WantedBy": "multi-user.target"},
        sshd={"words": ["/usr/sbin/sshd", "-D"]},
    )
    rows, msgs = find_defined_units(systemd, {})
    assert msgs == []
    assert [(row["name"], row["autostart"], row["order"]) for row in rows] == [
        ("a.service", False, []),
        ("b.service", True, ["a.service"]),
        ("ready.service", False, []),
    ]
    # The words of one that is none are not asked for. A template starts nothing.
    assert not [words for words in systemd.asked if "sshd" in str(words[4:]) and words[0] == "busctl"]
    assert not [words for words in systemd.asked if "vm@.service" in words]


def test_what_was_made_of_a_template_and_does_not_run() -> None:
    rows, msgs = find_defined_units(Systemd(**{"vm@a": {"words": WORDS, "WantedBy": "multi-user.target"}}), {})
    assert msgs == []
    assert [(row["name"], row["autostart"]) for row in rows] == [("vm@a.service", True)]


def test_a_unit_whose_process_has_devices() -> None:
    systemd = Systemd(script={"words": ["/usr/local/bin/start"]}, masked={})
    rows, msgs = find_defined_units(systemd, {"script.service": [7], "masked.service": [8]})
    assert msgs == []
    assert [(row["name"], row["pid"], row["devices"]) for row in rows] == [
        ("masked.service", 8, None),
        ("script.service", 7, None),
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({}, False),
        ({"WantedBy": "multi-user.target"}, True),
        ({"RequiredBy": "default.target"}, True),
        ({"WantedBy": "rescue.target"}, False),
        ({"WantedBy": "other.service"}, True),
        ({"WantedBy": "dev-vfio.device"}, None),
        ({"TriggeredBy": "vm.timer"}, False),
        ({"TriggeredBy": "at-boot.service"}, None),
        ({"TriggeredBy": "at-boot.service", "WantedBy": "multi-user.target"}, True),
        ({"WantedBy": "vm.service"}, False),
    ],
)
def test_what_starts_at_boot(shown: dict[str, Any], expected: bool | None) -> None:
    at_boot = {"WantedBy": "multi-user.target"}
    systemd = Systemd(vm=shown, other=at_boot, **{"at-boot": at_boot})
    assert find_started_at_boot(systemd, ["vm.service"]) == {"vm.service": expected}


def test_a_chain_without_end_is_not_followed() -> None:
    chain = {f"vm{number}": {"WantedBy": f"vm{number + 1}.service"} for number in range(40)}
    assert find_started_at_boot(Systemd(**chain), ["vm0.service"]) == {"vm0.service": None}


def test_more_units_than_any_host_has() -> None:
    rows, msgs = find_defined_units(Systemd(**{f"vm{number}": {"words": WORDS} for number in range(1030)}), {})
    assert len(rows) == 1024
    assert msgs == ["Of 1030 units that may start a VM, only 1024 were looked at."]


def test_systemd_that_does_not_answer() -> None:
    systemd = Systemd(vm={"words": WORDS})
    for missing, words in (
        ("systemctl", "The units that start VMs cannot be told: systemctl cannot be run (ENOENT: No such file"),
        ("busctl", "What vm.service starts cannot be told: busctl cannot be run (ENOENT: No such file"),
    ):
        systemd.missing = missing
        rows, [msg] = find_defined_units(systemd, {})
        assert rows == []
        assert msg.startswith(words)
    systemd.missing = ""
    for answer in ("[1]", '{"data": [[]]}', '{"data": []}', '{"data": [{"Id": 1}]}', "no"):
        systemd.refused = {"busctl": (0, answer, "")}
        rows, [msg] = find_defined_units(systemd, {})
        assert rows == []
        assert msg.startswith("What vm.service starts cannot be told: ")
    systemd.refused = {"default.target": (1, "", "no")}
    [row], [msg] = find_defined_units(systemd, {})
    assert row["autostart"] is None
    assert msg == "Which units start at boot cannot be told: systemd cannot be asked for default.target: no."
    systemd.refused = {"show": (0, "", ""), "list-unit-files": (0, "", "")}
    assert find_defined_units(systemd, {}) == ([], ["systemd tells nothing of its units."])


def test_a_slice_whose_memory_is_limited() -> None:
    """Others in it use it, too."""
    slices: dict[str, dict[str, str]] = {
        "a-b.slice": {"MemoryMax": "infinity"},
        "a.slice": {"MemoryMax": "1073741824"},
        "system.slice": {"MemoryMax": "infinity"},
    }
    systemd = Systemd(
        inner={"words": WORDS, "Slice": "a-b.slice"},
        outer={"words": WORDS, "Slice": "a.slice"},
        other={"words": WORDS, "Slice": "system.slice"},
        root={"words": WORDS, "Slice": "-.slice"},
    )
    systemd.services.update(slices)
    rows, msgs = find_defined_units(systemd, {})
    assert msgs == []
    assert {row["name"]: row["memory_max_shared"] for row in rows} == {
        "inner.service": True,
        "other.service": False,
        "outer.service": True,
        "root.service": False,
    }
    systemd.refused = {"a-b.slice": (1, "", "no")}
    rows, [msg] = find_defined_units(systemd, {})
    assert [(row["autostart"], row["memory_max_shared"]) for row in rows] == [(None, None)] * 4
    assert msg.startswith("Which units start at boot cannot be told: systemd cannot be asked for a-b.slice, a.slice")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder of units that a reboot leaves, and one that it empties."""
    lasting, run = tmp_path / "etc", tmp_path / "run"
    lasting.mkdir()
    run.mkdir()
    monkeypatch.setattr(_defined_units, "_LASTING", (str(lasting),))
    monkeypatch.setattr(_defined_units, "_OF_THIS_BOOT", (str(run),))
    return lasting, run


def link(folder: Path, by: str, name: str) -> None:
    (folder / by).mkdir(exist_ok=True)
    (folder / by / name).symlink_to("/x")


AT_BOOT = {"WantedBy": "multi-user.target"}


@pytest.mark.parametrize(
    ("shown", "lasting", "of_this_boot", "expected"),
    [
        (AT_BOOT, [], ["multi-user.target.wants/vm.service"], False),
        ({"RequiredBy": "multi-user.target"}, [], ["multi-user.target.requires/vm.service"], False),
        (AT_BOOT, ["multi-user.target.wants/vm.service"], ["multi-user.target.wants/vm.service"], True),
        # Another one is enough.
        ({"WantedBy": "multi-user.target other.service"}, [], ["multi-user.target.wants/vm.service"], True),
        ({"WantedBy": "rescue.target multi-user.target"}, [], ["rescue.target.wants/vm.service"], True),
        ({"WantedBy": "other.service"}, [], ["multi-user.target.wants/other.service"], False),
        ({**AT_BOOT, "Names": "vm.service alias.service"}, [], ["multi-user.target.wants/alias.service"], False),
        (AT_BOOT, [], ["multi-user.target.wants/another.service"], True),
        # By the name of an alias, it cannot be told which it is.
        ({"WantedBy": "graphical.target"}, [], ["default.target.wants/vm.service"], None),
        (AT_BOOT, ["multi-user.target.wants/vm.service"], ["default.target.wants/vm.service"], True),
        ({**AT_BOOT, "TriggeredBy": "other.service"}, [], ["multi-user.target.wants/vm.service"], None),
    ],
)
def test_what_is_enabled_until_the_next_reboot(
    places: tuple[Path, Path], shown: dict[str, str], lasting: list[str], of_this_boot: list[str], expected: bool | None
) -> None:
    for folder, links in zip(places, (lasting, of_this_boot)):
        for each in links:
            link(folder, *each.split("/"))
    systemd = Systemd(vm=shown, other=AT_BOOT)
    assert find_started_at_boot(systemd, ["vm.service"]) == {"vm.service": expected}


def test_units_that_are_masked_until_the_next_reboot(places: tuple[Path, Path]) -> None:
    lasting, run = places
    text = f"[Service]\nExecStart={' '.join(WORDS)}\n"
    for name in ("a", "b", "known", "vm@"):
        (lasting / f"{name}.service").write_text(text)
    (lasting / "other.service").write_text("[Service]\nExecStart=/usr/bin/true\n")
    (lasting / "gone.service").symlink_to("/dev/null")
    for name in ("a", "known", "vm@1", "other", "gone", "nothing"):
        (run / f"{name}.service").symlink_to("/dev/null")
    # One that is another file is none that is masked.
    (run / "b.service").write_text(text)
    masked: dict[str, Any] = {"a": AT_BOOT, "vm@1": {}, "other": {}, "gone": {}, "nothing": {}}
    rows, msgs = find_defined_units(Systemd(known={"words": WORDS}, **masked), {})
    assert msgs == []
    assert [(row["name"], row["autostart"], bool(row["unread"])) for row in rows] == [
        ("known.service", False, False),
        ("a.service", True, True),
        ("vm@1.service", False, True),
    ]
    assert rows[1]["path"] == str(lasting / "a.service")
    # Of a template, nobody knows what is made of it. What is no name is none of a unit.
    (run / "vm@.service").symlink_to("/dev/null")
    (run / "a b.service").symlink_to("/dev/null")
    systemd = Systemd(**masked)
    rows, msgs = find_defined_units(systemd, {})
    assert msgs == []
    assert [(row["name"], row["autostart"]) for row in rows if "@" in row["name"]] == [
        ("vm@.service", None),
        ("vm@1.service", False),
    ]
    assert not [words for words in systemd.asked if "vm@.service" in words]


def test_a_drop_in_that_hides_another_one_until_the_next_reboot(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = places[1] / "vm.service.d"
    folder.mkdir()
    (folder / "limit.conf").symlink_to("/dev/null")
    (folder / "other.conf").write_text("")
    assert _defined_units._hiding("vm.service") == [f"{folder}/limit.conf"]
    hiding = "/run/systemd/system/vm.service.d/limit.conf"
    monkeypatch.setattr(_defined_units, "_hiding", lambda name: [hiding] if name == "vm.service" else [])
    [row], msgs = find_defined_units(Systemd(vm={"words": WORDS}), {})
    assert msgs == []
    assert row["changed"] is True
    assert hiding in row["unread_at_boot"][0]


def test_a_unit_whose_file_a_reboot_takes_away() -> None:
    for path, expected in (("/run/systemd/system/vm.service", None), ("/etc/systemd/system/vm.service", True)):
        systemd = Systemd(vm={"words": WORDS, "FragmentPath": path, **AT_BOOT})
        [row], msgs = find_defined_units(systemd, {})
        assert (row["autostart"], bool(row["unread_at_boot"]), msgs) == (expected, expected is None, [])


class Manager:
    """A service manager that has read one limit, and its files as they are now."""

    def __init__(self, hard: str, system: str = "", soft: str = "", user: str = "") -> None:
        self.shown = f"DefaultLimitMEMLOCKSoft={soft or hard}\nDefaultLimitMEMLOCK={hard}\n"
        self.files = {"systemd/system.conf": system, "systemd/user.conf": user}
        self.asked: list[str] = []

    def __call__(self, words: list[str]) -> Answer:
        self.asked.append(words[-1])
        if words[0] == "systemctl":
            return 0, self.shown, ""
        assert words[:3] == ["systemd-analyze", "--no-pager", "cat-config"]
        text = self.files[words[3]]
        return (1, "", "no such file") if text == "broken" else (0, text, "")


def at_boot(manager: Manager, limit: int | None = 2**23, kind: str = "unit", of: str = "system") -> list[str]:
    """What is not known after a reboot of a VM with this limit."""
    row: dict[str, Any] = {"kind": kind, "name": "vm.service", "manager": of, "user": "vm", "unread_at_boot": []}
    row.update(uid=1001)
    row.update(memlock_bytes=limit, memlock_unlimited=limit is None)
    note_limits_at_boot(manager, [row])
    found: list[str] = row["unread_at_boot"]
    return found


GIB_2 = "# /etc/systemd/system.conf\n[Manager]\n#DefaultLimitMEMLOCK=\nDefaultLimitMEMLOCK=2G\n"
OTHER = "another one after a reboot: systemd has not read DefaultLimitMEMLOCK= as its files have it now"


@pytest.mark.parametrize(
    ("manager", "limit", "why"),
    [
        (Manager("8388608"), 2**23, ""),
        (Manager("8388608", "[Manager]\n#DefaultLimitMEMLOCK=1G\n"), 2**23, ""),
        # It was changed, or taken away.
        (Manager("8388608", GIB_2), 2**23, OTHER),
        (Manager("2147483648"), 2**31, OTHER),
        (Manager("2147483648", GIB_2), 2**31, ""),
        # One with a limit of its own has that then, too.
        (Manager("8388608", GIB_2), 2**24, ""),
        (Manager("8388608", GIB_2), None, ""),
        (Manager("infinity", GIB_2), None, OTHER),
        # The last one counts, and an empty one is none.
        (Manager("8388608", GIB_2 + "\n DefaultLimitMEMLOCK = 8M"), 2**23, ""),
        (Manager("8388608", GIB_2 + "DefaultLimitMEMLOCK=\n"), 2**23, ""),
        (Manager("infinity", GIB_2 + "DefaultLimitMEMLOCK=infinity\n"), None, ""),
        (Manager("2147483648", "DefaultLimitMEMLOCK=8388608:2G\n", soft="8388608"), 2**23, ""),
        (Manager("4294967296", "DefaultLimitMEMLOCK=8M:2G\n", soft="8388608"), 2**23, OTHER),
        # What is not understood, or not told, may be anything.
        (Manager("8388608", "DefaultLimitMEMLOCK=8 M\n"), 2**23, "'8 M' is no limit that is understood"),
        (Manager("8388608", "DefaultLimitMEMLOCK=\\\n8M\n"), 2**23, "is no limit that is understood"),
        (Manager("8388608", "broken"), 2**23, "'systemd-analyze --no-pager cat-config systemd/system.conf' failed"),
        (Manager("8388608", "broken"), 2**24, ""),
        (Manager("what"), 2**24, "'what' is no limit that is understood"),
    ],
)
def test_a_default_limit_that_systemd_has_not_read(manager: Manager, limit: int | None, why: str) -> None:
    found = at_boot(manager, limit)
    assert bool(found) == bool(why)
    assert why in "".join(found)
    assert all(each.startswith("vm.service has systemd's default limit") for each in found)
    assert all(each.endswith(". Set LimitMEMLOCK= in it.") for each in found)


@pytest.mark.parametrize(
    ("manager", "why"),
    [
        (Manager("8388608"), ""),
        (Manager("8388608", GIB_2), OTHER),
        (Manager("8388608", user=GIB_2), "DefaultLimitMEMLOCK= in systemd's user.conf counts then"),
        (Manager("8388608", user="broken"), "systemd/user.conf' failed: no such file"),
    ],
)
def test_the_default_limit_of_a_users_libvirt(manager: Manager, why: str) -> None:
    found = at_boot(manager, kind="domain", of="session")
    assert bool(found) == bool(why)
    assert why in "".join(found)


@pytest.mark.parametrize("name", ["user@1001.service.d", "user@.service.d", "user@1002.service.d"])
def test_the_limit_of_a_users_libvirt_that_a_reboot_takes_away(places: tuple[Path, Path], name: str) -> None:
    (places[1] / name).mkdir()
    (places[1] / name / "limit.conf").write_text("[Service]\nLimitMEMLOCK=2G\n")
    found = at_boot(Manager("8388608"), kind="domain", of="session")
    assert bool(found) == (name != "user@1002.service.d")
    assert all(f"{name}/limit.conf is gone then." in each for each in found)
    assert at_boot(Manager("8388608")) == []


@pytest.mark.parametrize("name", ["libvirtd.service", "virtqemud.service"])
def test_what_a_reboot_takes_away_from_libvirts_daemon(places: tuple[Path, Path], name: str) -> None:
    (places[1] / f"{name}.d").mkdir()
    (places[1] / f"{name}.d/a.conf").write_text("[Service]\nCapabilityBoundingSet=~CAP_SYS_RESOURCE\n")
    assert at_boot(Manager("8388608")) == at_boot(Manager("8388608"), kind="domain", of="session") == []
    [found] = at_boot(Manager("8388608"), kind="domain")
    assert found.startswith("libvirt's daemon may be given something else after a reboot: /")
    assert found.endswith(f"{name}.d/a.conf is gone then.")


def test_systemd_is_asked_for_its_defaults_only_where_they_may_count() -> None:
    manager = Manager("8388608")
    assert at_boot(manager, kind="domain") == []
    assert manager.asked == []
    assert at_boot(manager) == []
    assert manager.asked[1:] == ["systemd/system.conf"]
