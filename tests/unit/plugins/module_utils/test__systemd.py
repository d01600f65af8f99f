# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""systemd, asked and told. Real ones are in tests/kernel, and in the scenarios of extensions/molecule."""

from __future__ import annotations

import errno

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import (
    UnitState,
    ask_states,
    is_unit_name,
    must_run,
    parse_services,
    parse_units,
    read_all_of,
    read_journal,
    show_units,
)

PATH = "LoadState=loaded\nUnitFileState=enabled\nActiveState=active\nTriggers=a.service b.service\n"
NONE = "LoadState=not-found\nUnitFileState=\nActiveState=inactive\n"
FAILED = "Triggers=\nLoadState=loaded\nActiveState=failed\nUnitFileState=static\n"


def missing(_command: list[str]) -> tuple[int, str, str]:
    raise FileNotFoundError(errno.ENOENT, "no")


@pytest.mark.parametrize(
    ("name", "kinds", "is_one"),
    [
        ("vm@1.service", (), True),
        ("dev-sda.device", ("service",), False),
        (r"machine-qemu\x2d1.scope", ("service", "scope"), True),
        ("--now", (), False),
        ("-.mount", (), False),
        ("a b.service", (), False),
        ("a/b.service", (), False),
        ("", (), False),
        ("vm.service\n", ("service",), False),
    ],
)
def test_the_names_of_units(name: str, kinds: tuple[str, ...], is_one: bool) -> None:
    assert is_unit_name(name, *kinds) is is_one


def test_what_is_shown() -> None:
    """Several units, several commands of one, and a value with an equals sign; nothing in a chroot."""
    assert parse_units("Id=a\nExecStart=x=1\nExecStart=y\n\nId=b\nno property\n") == [
        {"Id": "a", "ExecStart": "x=1\ny"},
        {"Id": "b"},
    ]
    assert parse_units("") == [{}]


def test_services_whose_commands_look_like_several() -> None:
    text = "ExecStart={ argv[]=sh -c set -e\n\nexec qemu ; }\nId=a.service\n\nId=b.service\nExecStart=x\n\nno unit\n"
    assert parse_services("Id=c.service\n\n" + text) == {
        "c.service": "Id=c.service\nExecStart={ argv[]=sh -c set -e",
        "a.service": "ExecStart={ argv[]=sh -c set -e\nexec qemu ; }\nId=a.service\n",
        "b.service": "Id=b.service\nExecStart=x\nno unit",
    }
    assert parse_services("") == {}


def test_all_of_a_unit_is_asked_for_by_the_name_that_the_bus_has_for_it() -> None:
    asked = []

    def run(words: list[str]) -> tuple[int, str, str]:
        asked.append(words)
        return 0, '{"type":"a{sv}","data":[{"Id":{"type":"s","data":"1vm@a-b.service"}}]}', ""

    assert read_all_of(run, "1vm@a-b.service") == {"Id": "1vm@a-b.service"}
    assert asked[0][4] == "/org/freedesktop/systemd1/unit/_31vm_40a_2db_2eservice"


def test_of_one_unit_everything_is_its_own() -> None:
    """Its command is `sh -c "set -e\\n\\nexec qemu"`."""
    output = "ExecStart={ path=/bin/sh ; argv[]=/bin/sh -c set -e\n\nexec qemu ; }\nUser=vm\n"
    (shown,) = show_units(lambda _words: (0, output, ""), ["a.service"], ["ExecStart", "User"])
    assert shown == {"ExecStart": "{ path=/bin/sh ; argv[]=/bin/sh -c set -e", "User": "vm"}


def test_systemd_may_not_answer() -> None:
    with pytest.raises(HostLacks, match=r"^systemd cannot be asked for a\.service: systemctl cannot be run .ENOENT"):
        show_units(missing, ["a.service"], ["Id"])
    with pytest.raises(IommufdError, match=r"^systemd cannot be asked for a.service, b.service: No bus\.$"):
        show_units(lambda _words: (1, "", "No\n bus.\n"), ["a.service", "b.service"], ["Id"])


def test_units() -> None:
    asked = []

    def run(words: list[str]) -> tuple[int, str, str]:
        asked.append(words)
        return 0, "\n".join([PATH, NONE, FAILED]), ""

    states = ask_states(run, ["p.path", "n.path", "f.service"])
    assert states == {
        "p.path": UnitState(True, True, True, ("a.service", "b.service")),
        "n.path": UnitState(False, False, False),
        "f.service": UnitState(True, False, False),
    }
    assert str(states["p.path"]) == "enabled, active"
    with pytest.raises(IommufdError, match=r"tells of 3 units where it was asked for p\.path, n\.path\."):
        ask_states(run, ["p.path", "n.path"])
    assert len(asked) == 2
    assert ask_states(run, []) == {}
    assert len(asked) == 2


def test_the_journal() -> None:
    """What it tells counts, also where journalctl fails."""
    assert read_journal(lambda _words: (1, "a.service: Failed at step USER\n", "Damaged."), "a.service") == [
        "Failed at step USER"
    ]
    assert read_journal(missing, "a.service") == []


def test_a_command_that_must_succeed() -> None:
    assert must_run(lambda _words: (0, "out", "err"), "true") == "out"
    with pytest.raises(IommufdError, match=r"'systemctl stop' failed: no\\x1b$"):
        must_run(lambda _words: (1, "out", "no\x1b\n"), "systemctl", "stop")
    with pytest.raises(IommufdError, match="failed: exit code 124"):
        must_run(lambda _words: (124, "", ""), "systemctl")
    with pytest.raises(HostLacks, match="systemctl cannot be run \\(ENOENT"):
        must_run(missing, "systemctl")
