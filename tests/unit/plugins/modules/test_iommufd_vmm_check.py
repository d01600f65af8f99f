# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml
from ansible_collections.virt.iommufd.plugins.module_utils import _vmm_domain, _vmm_look, _vmm_replica, _vmm_trial
from ansible_collections.virt.iommufd.plugins.module_utils._child import Interrupted
from ansible_collections.virt.iommufd.plugins.module_utils._errors import HostLacks, IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._policy import VmPolicy
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit, own_status
from ansible_collections.virt.iommufd.plugins.module_utils._selinux import Verdict
from ansible_collections.virt.iommufd.plugins.module_utils._vmm_trial import ProcessSeen
from ansible_collections.virt.iommufd.plugins.modules import iommufd_vmm_check
from ansible_collections.virt.iommufd.tests.kernel.run_module import run as run_module
from ansible_collections.virt.iommufd.tests.unit.returned import check_returned

Run = Callable[..., "dict[str, Any]"]

# A program that is root's alone wherever the tests run.
SHELL = "/bin/sh"
IPC_LOCK = 1 << 14
MYSELF = pwd.getpwuid(os.getuid()).pw_name
# What starts something, and where it is.
STARTS = {
    **dict.fromkeys(("try_copy", "start_emulator", "open_session", "try_mode"), _vmm_trial),
    "start_bare_domain": _vmm_domain,
    "start_replica": _vmm_replica,
}
RETURN = yaml.safe_load(iommufd_vmm_check.RETURN)

UNIT = {
    "LoadState": "loaded",
    "User": "vm",
    "ExecStart": f"{{ path={SHELL} ; argv[]=x ; }}",
    "CapabilityBoundingSet": "cap_ipc_lock",
    "AmbientCapabilities": "cap_ipc_lock",
    "LimitMEMLOCK": "4096",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the module as root, on a host whose systemd knows one service."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    text = "".join(f"{key}={value}\n" for key, value in UNIT.items())
    monkeypatch.setattr(iommufd_vmm_check, "run_command", lambda _command: (0, text, ""))

    def run_as_root(**options: Any) -> dict[str, Any]:
        answer = run_module(iommufd_vmm_check, **options)
        if not answer.get("failed"):
            assert answer["changed"] is False
            for name, documented in RETURN.items():
                check_returned(documented, answer[name], name)
        return answer

    return run_as_root


def seen(
    effective: int = IPC_LOCK, initial: bool = True, limit: int | None = 4096, policy: Verdict | None = None
) -> ProcessSeen:
    status = own_status()._replace(effective=effective)
    return ProcessSeen("vm", status, Limit(limit, limit), initial, policy or Verdict(True))


ASKED = ("cap_ipc_lock", "system_u:system_r:svirt_t:s0")
OPENED = ("/dev/iommu", "system_u:system_r:svirt_t:s0")
DENIED = Verdict(False, "SELinux's policy denies ipc_lock to svirt_t")
UNKNOWN = Verdict(None, "SELinux is in force, and its policy cannot be asked")


def test_nothing_is_asked_for(run: Run) -> None:
    answer = run()
    assert (answer["emulators"], answer["units"], answer["users"]) == ([], [], [])
    untried = {"attempted": False, "ok": None, "inconclusive": False, "mode": None, "msg": "It was not asked for."}
    assert answer["try_iommufd"] == untried


def test_what_is_only_looked_at(run: Run, tmp_path: Path) -> None:
    answer = run(emulators=[SHELL, str(tmp_path / "none"), str(tmp_path)], units=["vm@.service"])
    first, second, third = answer["emulators"]
    assert (first["present"], first["is_emulator"], first["real_path"]) == (
        True,
        True,
        os.path.realpath(SHELL),
    )
    assert (second["present"], second["is_emulator"]) == (False, False)
    assert (third["present"], third["is_emulator"]) == (True, False)
    assert not first["trial"]["attempted"]
    (unit,) = answer["units"]
    assert (unit["name"], unit["present"], unit["user"]) == ("vm@.service", True, "vm")
    assert (unit["ambient_ipc_lock"], unit["outdated"], unit["obstacles"]) == (True, False, [])
    assert unit["replica"]["msg"] == "It was not asked for."


def test_a_template_that_nobody_knows_the_user_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither a failure nor unproven: it was not tried."""
    text = "LoadState=loaded\nUser=iommufd-host-check\n"
    found = _vmm_look.look_at_unit(lambda _words: (0, text, ""), "vm@.service")
    found = found._replace(program=_vmm_look.look_at_program(SHELL))
    monkeypatch.setattr(_vmm_look, "look_at_unit", lambda _run, _name: found)
    (unit,) = run(units=["vm@.service"], start=True)["units"]
    assert (unit["user"], unit["replica"]["attempted"], unit["replica"]["ok"]) == (None, False, None)
    assert unit["replica"]["msg"].startswith("What vm@.service runs, or as whom, is named after its instance")


def test_check_mode_starts_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_words: object) -> None:
        raise AssertionError("this starts something")

    for name in ("try_copy", "start_emulator", "start_bare_domain", "start_replica", "open_session", "try_mode"):
        monkeypatch.setattr(STARTS[name], name, start)
    asked = {"trial": True, "start": True, "try_iommufd": True, "users": [MYSELF], "user": MYSELF}
    for domain in (True, False):
        answer = run(emulators=[SHELL], units=["vm.service"], domain=domain, **asked, _ansible_check_mode=True)
        (emulator,), (unit,), (user,) = answer["emulators"], answer["units"], answer["users"]
        for row in (emulator["trial"], emulator["started"], unit["replica"], user, answer["try_iommufd"]):
            assert (row["attempted"], row["ok"], row["msg"]) == (False, None, "Not run in check mode.")
            assert row["inconclusive"] is False
        assert emulator["started"]["how"] == ("domain" if domain else "bare")
        assert user["present"]


@pytest.mark.parametrize(
    ("was", "row"),
    [
        (seen(), {"ok": True, "effective": "0000000000004000", "memlock_bytes": 4096, "memlock_unlimited": False}),
        (seen(0, limit=None), {"ok": False, "effective": "0" * 16, "memlock_bytes": None, "memlock_unlimited": True}),
        (seen(initial=False), {"ok": False, "effective": "0000000000004000"}),
        (seen(policy=DENIED), {"ok": False, "effective": "0000000000004000", "msg": f"{DENIED.why}."}),
        # It has nothing that the policy could deny.
        (seen(0, policy=DENIED), {"ok": False, "effective": "0" * 16, "msg": ""}),
    ],
)
def test_what_was_started(run: Run, monkeypatch: pytest.MonkeyPatch, was: ProcessSeen, row: dict[str, Any]) -> None:
    for name in ("start_emulator", "start_bare_domain", "start_replica"):
        monkeypatch.setattr(STARTS[name], name, lambda *_words: was)
    how = {"start": True, "user": MYSELF, "emulators": [SHELL], "units": ["vm.service"]}
    bare, domain = run(**how), run(**how, domain=True)
    for started in (bare["emulators"][0]["started"], domain["emulators"][0]["started"], bare["units"][0]["replica"]):
        assert {key: started[key] for key in row} == row
        assert started["attempted"]
        assert started["user"] == "vm"
        assert bool(started["msg"]) == (was.initial is False or bool(row.get("msg")))


def test_a_policy_that_does_not_tell(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vmm_trial, "start_emulator", lambda *_words: seen(policy=UNKNOWN))
    (emulator,) = run(start=True, user=MYSELF, emulators=[SHELL])["emulators"]
    started = emulator["started"]
    assert (started["ok"], started["inconclusive"], started["msg"]) == (None, True, f"{UNKNOWN.why}.")


@pytest.mark.parametrize(
    ("verdict", "row"),
    [
        (Verdict(True), {"attempted": True, "ok": True, "inconclusive": False, "msg": ""}),
        (DENIED, {"attempted": True, "ok": False, "inconclusive": False, "msg": f"{DENIED.why}."}),
        (UNKNOWN, {"attempted": True, "ok": None, "inconclusive": True, "msg": f"{UNKNOWN.why}."}),
    ],
)
def test_what_selinux_allows(run: Run, monkeypatch: pytest.MonkeyPatch, verdict: Verdict, row: dict[str, Any]) -> None:
    context = "system_u:system_r:svirt_t:s0"
    policy = VmPolicy([context], {"/dev/iommu": "system_u:object_r:device_t:s0"}, "system_u:object_r:sysfs_t:s0")
    monkeypatch.setattr(iommufd_vmm_check, "look_at_policy", lambda _run: policy)
    monkeypatch.setattr(iommufd_vmm_check, "lets_use", lambda name, of: verdict if (name, of()) == ASKED else None)
    monkeypatch.setattr(iommufd_vmm_check, "lets_open", lambda *asked: verdict if asked == OPENED else None)
    told = run(start=True)["selinux"]
    assert told["domains"] == [{"context": context, "ipc_lock": row, "opens": row}]
    assert (told["labels"], told["sysfs"], told["msg"]) == (policy.labels, policy.sysfs, "")
    # Without a start nothing is asked, and in check mode neither.
    for options, msg in (({}, "It was not asked for."), ({"_ansible_check_mode": True, "start": True}, "Not run in")):
        (domain,) = run(**options)["selinux"]["domains"]
        assert domain["opens"]["msg"].startswith(msg)
        assert (domain["ipc_lock"]["attempted"], domain["ipc_lock"]["ok"]) == (False, None)


@pytest.mark.parametrize(
    ("kind", "ok", "times"),
    [(IommufdError, False, 1), (HostLacks, False, 1), (Interrupted, None, 3)],
)
def test_what_could_not_be_started(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[IommufdError], ok: bool | None, times: int
) -> None:
    def fail(*_words: object) -> None:
        tried.append(0)
        raise kind("It is broken.")

    tried: list[int] = []
    for name in ("try_copy", "start_emulator", "start_replica", "open_session", "try_mode"):
        monkeypatch.setattr(STARTS[name], name, fail)
    how: dict[str, Any] = {"trial": True, "start": True, "try_iommufd": True}
    how |= {"user": MYSELF, "users": [MYSELF], "units": ["vm.service"]}
    answer = run(**how, emulators=[SHELL, str(tmp_path)])
    rows = [*(answer["emulators"][0][name] for name in ("trial", "started")), answer["units"][0]["replica"]]
    for row in [*rows, answer["users"][0], answer["try_iommufd"]]:
        assert (row["attempted"], row["ok"], row["inconclusive"], row["msg"]) == (True, ok, ok is None, "It is broken.")
    assert len(tried) == 5 * times
    for name in ("trial", "started"):
        assert "is no executable program" in answer["emulators"][1][name]["msg"]


def test_the_trial(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for status, ok in ((seen().status, True), (seen(0).status, False)):
        monkeypatch.setattr(_vmm_trial, "try_copy", lambda *_words, status=status: status)
        trial = run(emulators=[SHELL], user=MYSELF, trial=True)["emulators"][0]["trial"]
        assert (trial["attempted"], trial["ok"], bool(trial["msg"])) == (True, ok, not ok)


def test_users(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vmm_trial, "open_session", lambda *_words: Limit(None, None))
    one, none = run(users=[MYSELF, "nobody-of-this-name"])["users"]
    assert (one["present"], one["attempted"], one["ok"], one["memlock_unlimited"]) == (True, True, True, True)
    assert (none["present"], none["attempted"], none["ok"], none["memlock_unlimited"]) == (False, False, None, False)
    assert "This host has no user 'nobody-of-this-name'" in none["msg"]


@pytest.mark.parametrize(("mode", "ok"), [("process", True), ("user", False)])
def test_try_iommufd(run: Run, monkeypatch: pytest.MonkeyPatch, mode: str, ok: bool) -> None:
    monkeypatch.setattr(_vmm_trial, "try_mode", lambda _user: mode)
    told = {"attempted": True, "ok": ok, "inconclusive": False, "mode": mode, "msg": ""}
    assert run(try_iommufd=True, user=MYSELF)["try_iommufd"] == told


def test_a_service_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iommufd_vmm_check, "run_command", lambda _command: (0, "LoadState=not-found\n", ""))
    (unit,) = run(units=["vm.service"], start=True)["units"]
    assert (unit["present"], unit["user"]) == (False, None)
    assert unit["obstacles"] == ["systemd has no unit vm.service."]
    assert unit["replica"]["msg"] == unit["obstacles"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trial": True}, "trial takes user"),
        ({"try_iommufd": True}, "try_iommufd takes user"),
        ({"start": True, "emulators": ["/q"]}, "start takes user"),
        ({"try_iommufd": True, "user": "nobody-of-this-name"}, "This host has no user 'nobody-of-this-name'"),
        ({"emulators": ["q"]}, "'q' is not an absolute path"),
        ({"units": ["vm1"]}, "'vm1' is not the name of a systemd service"),
    ],
)
def test_what_cannot_be_asked_for(run: Run, options: dict[str, Any], words: str) -> None:
    answer = run(**options)
    assert answer["failed"]
    assert words in answer["msg"]


def test_a_user_is_only_needed_to_become_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vmm_domain, "start_bare_domain", lambda *_words: seen())
    assert run(start=True, domain=True, emulators=[SHELL])["emulators"][0]["started"]["ok"]


@pytest.mark.parametrize("asked", [{"trial": True}, {"start": True}, {"try_iommufd": True}, {"users": ["root"]}])
def test_it_takes_root(run: Run, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    answer = run(user=MYSELF, **asked)
    assert answer["failed"]
    assert f"uid 1000 cannot be asked for {next(iter(asked))}, which takes root" in answer["msg"]
    assert not run(user=MYSELF, **asked, _ansible_check_mode=True).get("failed")


def test_whom_conditions_are_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    under = _vmm_look.Conditions("libvirtd.service (pid 7)", 0, no_new_privs=True, initial=None)
    monkeypatch.setattr(_vmm_look, "look_at_conditions", lambda _run: under)
    (emulator,) = run(emulators=[SHELL])["emulators"]
    assert emulator["conditions_of"] == "libvirtd.service (pid 7)"
    assert len(emulator["obstacles"]) == 2


def test_what_others_can_write_is_not_started(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = tmp_path / "emulator"
    emulator.write_bytes(Path(SHELL).read_bytes())
    emulator.chmod(0o777)
    unit = {**UNIT, "ExecStart": f"{{ path={emulator} ; argv[]=x ; }}"}
    text = "".join(f"{key}={value}\n" for key, value in unit.items())
    monkeypatch.setattr(iommufd_vmm_check, "run_command", lambda _command: (0, text, ""))
    for name in ("try_copy", "start_emulator", "start_replica", "start_bare_domain"):
        monkeypatch.setattr(STARTS[name], name, lambda *_arguments, name=name: pytest.fail(name))
    for domain in (False, True):
        answer = run(
            emulators=[str(emulator)], units=["vm.service"], user=MYSELF, trial=True, start=True, domain=domain
        )
        (row,), (of_unit,) = answer["emulators"], answer["units"]
        why = f"{emulator} can be written by everybody, who would get with it whatever is granted."
        assert (row["present"], row["is_emulator"]) == (True, False)
        assert row["writer"] == {"place": str(emulator), "who": "everybody"}
        for message in (*row["obstacles"], row["trial"]["msg"], row["started"]["msg"]):
            assert message.startswith(f"{emulator} cannot be trusted: {why}")
        assert (row["trial"]["ok"], row["started"]["ok"], of_unit["replica"]["ok"]) == (False, False, False)
        assert of_unit["obstacles"] == [of_unit["replica"]["msg"]]
        assert of_unit["replica"]["msg"].startswith(f"vm.service starts {emulator}, which cannot be trusted: {why}")
