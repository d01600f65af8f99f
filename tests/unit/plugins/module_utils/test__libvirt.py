# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _libvirt
from ansible_collections.virt.iommufd.plugins.module_utils._errors import AccessRefused, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._libvirt import (
    Libvirt,
    daemon_unit_of,
    library_version,
    look_at_libvirt,
    offers_iommufd,
    sets_rlimit_mode,
)
from ansible_collections.virt.iommufd.plugins.module_utils._process import Process
from ansible_collections.virt.iommufd.plugins.module_utils._selinux import Verdict
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import Run, parse_units

HOSTDEV = "<devices><hostdev><enum name='iommufd'>%s</enum></hostdev></devices>"
ALL = "cap_chown cap_sys_resource cap_ipc_lock"


def unit(name: str, **properties: str) -> str:
    shown = {"LoadState": "loaded", "ActiveState": "inactive", "MainPID": "0", "User": "", "PrivateUsers": "no"}
    shown |= {"CapabilityBoundingSet": ALL, "AmbientCapabilities": "", **properties}
    return "".join(f"{key}={value}\n" for key, value in {"Id": name, **shown}.items())


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (b"/usr/lib/x86_64-linux-gnu/libvirt.so.0.11003.0", (11, 3, 0)),
        (b"7f00-7f01 r--p 0 fe:00 1 /usr/lib64/libvirt.so.0.12008.1 (deleted)\n", (12, 8, 1)),
        (b"/usr/lib/libvirt.so.0.12000.0\n/usr/lib/libvirt.so.0.12010.0\n", (12, 10, 0)),
        (b"/usr/lib/libvirt.so.0\n/usr/lib/libvirt-qemu.so.0.12008.0\n", None),
        (b"", None),
    ],
)
def test_the_version_is_in_the_librarys_name(text: bytes, version: tuple[int, int, int] | None) -> None:
    assert library_version(text) == version


@pytest.mark.parametrize(
    ("properties", "may"),
    [
        ({}, True),
        ({"User": "root"}, True),
        ({"CapabilityBoundingSet": "cap_chown"}, False),
        ({"User": "libvirt"}, False),
        ({"User": "libvirt", "AmbientCapabilities": "cap_sys_resource"}, True),
        ({"PrivateUsers": "yes"}, False),
    ],
)
def test_what_a_unit_would_run_with(properties: dict[str, str], may: bool) -> None:
    (shown,) = parse_units(unit("virtqemud.service", **properties))
    assert daemon_unit_of(shown).may is may


def test_the_context_that_a_unit_sets() -> None:
    (shown,) = parse_units(unit("virtqemud.service", SELinuxContext="-a:b:c"))
    assert daemon_unit_of(shown).context == "a:b:c"


def answer(*units: str) -> Run:
    return lambda _command: (0, "\n".join(units), "")


@pytest.mark.parametrize(
    ("units", "chosen"),
    [
        ([unit("virtqemud.service"), unit("libvirtd.service")], "virtqemud.service"),
        (
            [unit("virtqemud.service"), unit("libvirtd.service"), unit("libvirtd.socket", ActiveState="active")],
            "libvirtd.service",
        ),
        ([unit("virtqemud.service", LoadState="not-found"), unit("libvirtd.service")], "libvirtd.service"),
        ([unit("libvirtd.socket", ActiveState="active")], None),
        ([], None),
    ],
)
def test_which_daemon_drives_qemu(units: list[str], chosen: str | None) -> None:
    assert look_at_libvirt(answer(*units)).unit == chosen


def test_a_running_daemon_is_looked_at_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "read", lambda _self, name: b"/lib/libvirt.so.0.12008.0" if name == "maps" else b"")
    running = unit("virtqemud.service", MainPID=str(os.getpid()), CapabilityBoundingSet="")
    found = look_at_libvirt(answer(unit("libvirtd.service"), running))
    assert (found.unit, found.pid, found.version) == ("virtqemud.service", os.getpid(), (12, 8, 0))
    assert found.may is not None


@pytest.mark.parametrize("error", [AccessRefused, IommufdError])
def test_its_memory_map_cannot_be_read(monkeypatch: pytest.MonkeyPatch, error: type[IommufdError]) -> None:
    def refuse(_self: Process, _name: str) -> bytes:
        raise error("It is hidden.")

    monkeypatch.setattr(Process, "read", refuse)
    found = look_at_libvirt(answer(unit("virtqemud.service", MainPID=str(os.getpid()))))
    assert found.version == found.installed
    assert found.pid == os.getpid()
    assert found.msg == "The version that the running daemon has mapped: It is hidden."


def test_it_has_just_ended() -> None:
    found = look_at_libvirt(answer(unit("virtqemud.service", MainPID="2147483647")))
    assert found.pid is None
    assert found.may is True


@pytest.mark.parametrize("daemon", ["not running", "running", "just ended"])
@pytest.mark.parametrize(("allowed", "may"), [(True, True), (False, False), (None, None)])
def test_what_selinux_leaves(
    monkeypatch: pytest.MonkeyPatch, daemon: str, allowed: bool | None, may: bool | None
) -> None:
    pid = {"not running": 0, "running": os.getpid(), "just ended": 2147483647}[daemon]
    monkeypatch.setattr(_libvirt, "capability_names", lambda _mask: ("cap_sys_resource",))
    monkeypatch.setattr(_libvirt, "lets_use", lambda _capability, _context: Verdict(allowed, "so it is"))
    monkeypatch.setattr(_libvirt, "in_initial_user_namespace", lambda _process: True)
    found = look_at_libvirt(answer(unit("virtqemud.service", MainPID=str(pid))))
    assert (found.may, found.why) == (may, "so it is")


@pytest.mark.parametrize(
    ("started", "context"),
    [
        ("ExecStart={ path=/usr/sbin/virtqemud ; argv[]=/usr/sbin/virtqemud -a\n\n-b ; }\n", "/usr/sbin/virtqemud"),
        ("", "IommufdError"),
    ],
)
def test_what_a_unit_starts_is_asked_for_alone(monkeypatch: pytest.MonkeyPatch, started: str, context: str) -> None:
    def run(words: list[str]) -> tuple[int, str, str]:
        return 0, started if "--property=ExecStart" in words else unit("virtqemud.service"), ""

    def lets_use(_capability: str, context: Callable[[], str]) -> Verdict:
        try:
            return Verdict(None, context())
        except IommufdError as exc:
            return Verdict(None, type(exc).__name__)

    monkeypatch.setattr(_libvirt, "lets_use", lets_use)
    monkeypatch.setattr(_libvirt, "context_of_service", lambda program: program)
    assert look_at_libvirt(run).why == context


def test_what_a_daemon_has_not_selinux_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_libvirt, "lets_use", pytest.fail)
    found = look_at_libvirt(answer(unit("virtqemud.service", CapabilityBoundingSet="")))
    assert (found.may, found.why) == (False, "")


@pytest.mark.parametrize("fails", [True, False])
def test_systemd_may_not_answer(fails: bool) -> None:
    def run(_command: list[str]) -> tuple[int, str, str]:
        if fails:
            raise FileNotFoundError(2, "no")
        return 1, "", "Failed to connect\n"

    assert "systemd cannot be asked" in look_at_libvirt(run).msg


def libvirt(version: Any = (12, 8, 0), **other: Any) -> Libvirt:
    return Libvirt(
        **{"installed": version, "unit": "virtqemud.service", "pid": 7, "may": True, **other, "version": version}
    )


@pytest.mark.parametrize(
    ("found", "offers", "sets", "reason"),
    [
        (
            libvirt(),
            None,
            True,
            "libvirt 12.8.0 sets per-process accounting, as all since 12.1.0, and its daemon runs with"
            " CAP_SYS_RESOURCE.",
        ),
        (libvirt((12, 1, 0)), True, True, "12.1.0 sets per-process accounting"),
        (
            libvirt((12, 0, 9)),
            None,
            False,
            "libvirt 12.0.9 does not set per-process accounting: 12.1.0 is the first that does.",
        ),
        (
            libvirt((12, 0, 9)),
            True,
            None,
            "libvirt 12.0.9 offers iommufd for a device, though 12.1.0 is the first that sets per-process accounting.",
        ),
        (
            libvirt((11, 3, 0), installed=(12, 8, 0)),
            None,
            False,
            "12.8.0 is installed, but its daemon was not",
        ),
        (libvirt(pid=None), None, True, "virtqemud.service, which does not run now, would run with CAP_SYS_RESOURCE"),
        (
            libvirt(may=False),
            None,
            False,
            "libvirt 12.8.0 cannot set per-process accounting: its daemon runs without CAP_SYS_RESOURCE",
        ),
        (libvirt(may=False, pid=None), None, False, "would run without CAP_SYS_RESOURCE"),
        (
            libvirt(may=None),
            None,
            None,
            "libvirt 12.8.0 sets per-process accounting if its daemon has CAP_SYS_RESOURCE",
        ),
        (
            libvirt(may=False, why="SELinux's policy denies sys_resource to a:b:c"),
            None,
            False,
            "its daemon runs with CAP_SYS_RESOURCE, but SELinux's policy denies sys_resource to a:b:c. Allow it",
        ),
        (libvirt(may=None, why="SELinux is silent"), None, None, "which cannot be told. SELinux is silent."),
        (libvirt(), False, False, "libvirt 12.8.0 could set per-process accounting, but does not offer iommufd"),
        (libvirt(None), None, None, "The version of libvirt cannot be told"),
        (libvirt(unit=None), None, False, "There is no system libvirt"),
        (libvirt(unit=None, msg="systemd is not here."), None, None, "systemd is not here."),
    ],
)
def test_whether_it_sets_the_mode(found: Libvirt, offers: bool | None, sets: bool | None, reason: str) -> None:
    said, why = sets_rlimit_mode(found, offers)
    assert said is sets
    assert reason in why


@pytest.mark.parametrize(
    ("text", "offers"),
    [
        (f"<domainCapabilities>{HOSTDEV % '<value>yes</value>'}</domainCapabilities>", True),
        (f"<domainCapabilities>{HOSTDEV % ''}</domainCapabilities>", False),
        ("<domainCapabilities/>", False),
        ("error: no", None),
    ],
)
def test_what_it_offers(text: str, offers: bool | None) -> None:
    assert offers_iommufd(text) is offers
