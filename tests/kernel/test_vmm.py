# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a VMM would run with, held against what it does run with: file capabilities, mounts, units, domains."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _vmm_domain, _vmm_look, _vmm_trial
from ansible_collections.virt.iommufd.plugins.module_utils._command import run_command
from ansible_collections.virt.iommufd.plugins.module_utils._user import find_user
from ansible_collections.virt.iommufd.plugins.modules import iommufd_vmm_check
from ansible_collections.virt.iommufd.tests.kernel.harness import PATIENCE, Answer, change_user, run_apart, run_within
from ansible_collections.virt.iommufd.tests.kernel.run_module import run

QEMU = "/usr/bin/qemu-system-x86_64"
IPC_LOCK, IPC_LOCK_AND_NET_ADMIN, NOTHING = "0000000000004000", "0000000000005000", "0000000000000000"
USER = "libvirt-qemu"
UNITS = Path("/run/systemd/system")
DROP_IN = UNITS / "libvirtd.service.d" / "kernel-test.conf"
LIBVIRT = "libvirtd.service"


def check(**options: Any) -> Answer:
    """The module's answer, which says that nothing has changed."""
    answered = run(iommufd_vmm_check, **options)
    assert not answered.get("failed"), answered
    assert answered["changed"] is False
    return answered


def emulator(path: Path | str, **options: Any) -> Answer:
    """The one row of an emulator."""
    [row] = check(emulators=[str(path)], **options)["emulators"]
    assert isinstance(row, dict)
    return row


def trial(path: Path | str) -> Answer:
    row: Answer = emulator(path, trial=True, user=USER)["trial"]
    assert row["attempted"]
    return row


def bare(path: Path | str) -> Answer:
    row: Answer = emulator(path, start=True, user=USER)["started"]
    assert (row["attempted"], row["how"]) == (True, "bare")
    return row


def command(*words: str, succeeds: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert not succeeds or not done.returncode, (words, done.stdout, done.stderr)
    return done.stdout


def await_(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running() -> set[str]:
    """The processes that there are by the names of what is started here."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if re.search(rb"qemu-system|^cat$", words[0]):
                found.add(folder.name)
    return found


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Whatever was started has ended when the module has answered."""
    before = running()
    yield
    assert running() <= before


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder on the root file system, which anybody may look into; /tmp is mounted nosuid."""
    path = Path(tempfile.mkdtemp(prefix="kernel-test.", dir="/opt"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def copied(folder: Path) -> Path:
    """A QEMU of the tests' own."""
    return Path(shutil.copy(QEMU, folder))


@pytest.fixture
def qemu(copied: Path) -> Iterator[Path]:
    """The same, which has no capabilities before the test, nor after it."""
    yield copied
    command("setcap", "-r", str(copied), succeeds=False)


def test_without_a_capability(qemu: Path) -> None:
    row = emulator(qemu, start=True, trial=True, user=USER)
    assert row["obstacles"] == []
    assert _vmm_look.look_at_program(str(qemu)).file_system == _vmm_look.FileSystem("/", nosuid=False, read_only=False)
    under = _vmm_look.look_at_conditions(run_command)
    assert _vmm_look.has_ipc_lock(under.bounding)
    assert under.initial is True
    assert row["started"]["effective"] == NOTHING
    assert (row["started"]["attempted"], row["started"]["ok"], row["started"]["user"]) == (True, False, USER)
    # What was tried had it, and the emulator has not got it by that.
    assert row["trial"] == {"attempted": True, "ok": True, "inconclusive": False, "effective": IPC_LOCK, "msg": ""}
    assert command("getcap", str(qemu)) == ""
    assert os.listdir(qemu.parent) == [qemu.name]


# What a file is given, what a process that executes it has then, and what one would have had with CAP_IPC_LOCK.
GIVEN = (
    ("cap_ipc_lock,cap_net_admin+ep", IPC_LOCK_AND_NET_ADMIN, IPC_LOCK_AND_NET_ADMIN),
    ("cap_net_admin+ep", "0000000000001000", IPC_LOCK_AND_NET_ADMIN),
    # Permitted only: an emulator does not ask for it.
    ("cap_ipc_lock+p", NOTHING, IPC_LOCK),
    # What `setcap` leaves where capabilities were taken away one by one.
    ("=", NOTHING, IPC_LOCK),
)


@pytest.mark.once
def test_with_capabilities(folder: Path) -> None:
    (folder / "given").mkdir()
    paths = [Path(shutil.copy(QEMU, folder / "given" / f"qemu-system-{number}")) for number in range(len(GIVEN))]
    try:
        for path, (given, _effective, _tried) in zip(paths, GIVEN):
            command("setcap", given, str(path))
        before = [os.getxattr(path, "security.capability") for path in paths]
        rows = check(emulators=[str(path) for path in paths], start=True, trial=True, user=USER)["emulators"]
        assert [os.getxattr(path, "security.capability") for path in paths] == before
    finally:
        shutil.rmtree(folder / "given")
    started, trials = [row["started"] for row in rows], [row["trial"] for row in rows]
    assert [row["effective"] for row in started] == [effective for _given, effective, _tried in GIVEN]
    assert [row["ok"] for row in started] == [True, False, False, False]
    assert [row["effective"] for row in trials] == [tried for _given, _effective, tried in GIVEN]
    assert [row["ok"] for row in trials] == [True] * 4


@pytest.mark.once
def test_through_a_link(qemu: Path, folder: Path) -> None:
    command("setcap", "cap_ipc_lock+ep", str(qemu))
    link = folder / "link"
    link.symlink_to(qemu.name)
    try:
        row = emulator(link, start=True, user=USER)
    finally:
        link.unlink()
    assert (row["path"], row["real_path"], row["started"]["ok"]) == (str(link), str(qemu), True)


@pytest.mark.once
def test_what_has_the_capability_but_does_not_come_up(folder: Path) -> None:
    # Its user may have seen to that, by a signal or a limit.
    for name in ("false", "true"):
        path = Path(shutil.copy(f"/usr/bin/{name}", folder / f"qemu-system-{name}"))
        try:
            command("setcap", "cap_ipc_lock+ep", str(path))
            started = bare(path)
        finally:
            path.unlink()
        assert (started["attempted"], started["ok"], started["inconclusive"]) == (True, None, True)
        assert (started["effective"], started["msg"]) == (None, f"{path} ended at once: it said nothing.")


@pytest.mark.once
def test_what_is_no_emulator(folder: Path) -> None:
    script = folder / "qemu-system-script"
    script.write_text(f'#!/bin/sh\nexec {QEMU} "$@"\n')
    script.chmod(0o755)
    try:
        for path in (script, "/etc/passwd", "/usr/bin", "/dev/null", "/nothing/there"):
            row = emulator(path, start=True, trial=True, user=USER)
            assert row["is_emulator"] is False
            assert row["present"] == (path != "/nothing/there")
            for what in (row["started"], row["trial"]):
                assert (what["ok"], what["effective"], what["msg"]) == (False, None, row["obstacles"][0])
    finally:
        script.unlink()


@contextlib.contextmanager
def mounted(folder: Path, *words: str) -> Iterator[Path]:
    target = folder / "mounted"
    target.mkdir()
    try:
        command("mount", *words, str(target))
        try:
            yield target
        finally:
            command("umount", str(target))
    finally:
        target.rmdir()


@pytest.mark.once
def test_nosuid_is_an_obstacle_that_nothing_tells(folder: Path) -> None:
    with mounted(folder, "-t", "tmpfs", "-o", "nosuid,mode=755", "none") as target:
        path = Path(shutil.copy(QEMU, target))
        command("setcap", "cap_ipc_lock+ep", str(path))
        row = emulator(path, start=True, trial=True, user=USER)
        seen = _vmm_look.look_at_program(str(path)).file_system
        assert seen == _vmm_look.FileSystem(str(target), nosuid=True, read_only=False)
        assert row["obstacles"] == [f"{path} gives no capabilities: the file system at {target} is mounted nosuid."]
        assert (row["trial"]["ok"], row["trial"]["effective"]) == (False, NOTHING)
        assert (row["started"]["ok"], row["started"]["effective"]) == (False, NOTHING)


@pytest.mark.once
def test_a_read_only_mount(qemu: Path, folder: Path) -> None:
    with mounted(folder, "--bind", "-o", "ro", str(folder)) as target:
        row = emulator(target / qemu.name, trial=True, user=USER)
        seen = _vmm_look.look_at_program(str(target / qemu.name)).file_system
        assert seen == _vmm_look.FileSystem(str(target), nosuid=False, read_only=True)
        assert "is mounted read-only" in row["obstacles"][0]
        assert (row["trial"]["ok"], row["trial"]["effective"]) == (False, None)
        assert "cannot be made (EROFS: " in row["trial"]["msg"]


@pytest.mark.once
def test_a_mount_from_which_nothing_can_be_executed(folder: Path) -> None:
    """What is no obstacle to a capability shows in the trial all the same."""
    with mounted(folder, "-t", "tmpfs", "-o", "noexec,mode=755", "none") as target:
        path = Path(shutil.copy("/usr/bin/sleep", target))
        assert emulator(path)["obstacles"] == []
        assert "to execute it failed (EACCES: " in trial(path)["msg"]


@contextlib.contextmanager
def libvirt_with(settings: str) -> Iterator[None]:
    """Has libvirt's service run with other settings from its next start on."""
    command("systemctl", "stop", LIBVIRT)
    DROP_IN.parent.mkdir(exist_ok=True)
    DROP_IN.write_text(f"[Service]\n{settings}\n")
    command("systemctl", "daemon-reload")
    try:
        yield
    finally:
        DROP_IN.unlink()
        DROP_IN.parent.rmdir()
        command("systemctl", "daemon-reload")
        command("systemctl", "stop", LIBVIRT)


def test_a_bounding_set_without_it_makes_every_start_fail(qemu: Path) -> None:
    with libvirt_with("CapabilityBoundingSet=~CAP_IPC_LOCK"):
        command("systemctl", "start", LIBVIRT)
        of = f"{LIBVIRT} (pid {command('systemctl', 'show', '--value', '-p', 'MainPID', LIBVIRT).strip()})"
        row = emulator(qemu, trial=True, start=True, user=USER)
        assert row["conditions_of"] == of
        assert not _vmm_look.has_ipc_lock(_vmm_look.look_at_conditions(run_command).bounding)
        assert f"CAP_IPC_LOCK is not in the bounding set of {of}" in row["obstacles"][0]
        # As it is, it can be executed; with the capability nobody could.
        assert (row["started"]["ok"], row["started"]["effective"]) == (False, NOTHING)
        assert (row["trial"]["ok"], row["trial"]["effective"]) == (False, None)
        assert "to execute it failed (EPERM: " in row["trial"]["msg"]
        command("setcap", "cap_ipc_lock+ep", str(qemu))
        started = bare(qemu)
        assert (started["ok"], started["effective"], started["user"]) == (False, None, None)
        assert f"(EPERM: Operation not permitted). CAP_IPC_LOCK is not in the bounding set of {of}." in started["msg"]


@pytest.mark.once
def test_no_new_privileges_void_it_in_silence(qemu: Path) -> None:
    command("setcap", "cap_ipc_lock+ep", str(qemu))
    with libvirt_with("NoNewPrivileges=yes"):
        row = emulator(qemu, trial=True, start=True, user=USER)
        assert row["conditions_of"] == LIBVIRT
        under = _vmm_look.look_at_conditions(run_command)
        assert (under.read_from, under.no_new_privs, under.initial) == (LIBVIRT, True, True)
        assert _vmm_look.has_ipc_lock(under.bounding)
        assert "runs with NoNewPrivileges" in row["obstacles"][0]
        for what in (row["trial"], row["started"]):
            assert (what["ok"], what["effective"]) == (False, NOTHING)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (["--bounding-set=-ipc_lock"], "This caller runs with a bounding set without CAP_IPC_LOCK"),
        (["--no-new-privs"], "This caller runs with NoNewPrivileges"),
    ],
)
@pytest.mark.once
def test_a_caller_who_is_worse_off_than_libvirt(qemu: Path, how: list[str], words: str) -> None:
    options = {"emulators": [str(qemu)], "trial": True, "start": True, "user": USER}
    [row] = run_apart(["setpriv", *how], "iommufd_vmm_check", **options)["emulators"]
    assert row["conditions_of"].startswith(LIBVIRT)
    assert row["obstacles"] == []
    for what in (row["trial"], row["started"]):
        # It knows nothing of how it would be there.
        assert (what["ok"], what["inconclusive"]) == (None, True)
        assert words in what["msg"]


@pytest.mark.once
def test_an_ordinary_user_may_look_but_starts_nothing(qemu: Path) -> None:
    options: dict[str, Any] = {"emulators": [str(qemu)], "units": [LIBVIRT]}
    answered = run_within(partial(change_user, 1002), iommufd_vmm_check, **options)
    assert answered["emulators"][0]["is_emulator"]
    assert answered["emulators"][0]["conditions_of"].startswith(LIBVIRT)
    assert [(each["present"], each["user"]) for each in answered["units"]] == [(True, "root")]
    refused = run_within(partial(change_user, 1002), iommufd_vmm_check, **options, trial=True, user=USER)
    assert refused["failed"]
    assert "uid 1002 cannot be asked for trial, which takes root: run the task with become: true" in refused["msg"]


@pytest.mark.once
def test_check_mode_starts_nothing(qemu: Path) -> None:
    asked = {"trial": True, "start": True, "try_iommufd": True, "user": USER, "users": ["vm"]}
    for domain in (False, True):
        answered = check(emulators=[str(qemu)], units=[LIBVIRT], domain=domain, **asked, _ansible_check_mode=True)
        [row], [unit] = answered["emulators"], answered["units"]
        for what in (row["trial"], row["started"], unit["replica"], answered["users"][0], answered["try_iommufd"]):
            assert (what["attempted"], what["ok"], what["msg"]) == (False, None, "Not run in check mode.")


@pytest.mark.once
def test_what_was_started_ends_with_the_module() -> None:
    reading, writing = os.pipe()
    module = os.fork()
    if not module:
        under, user = _vmm_look.look_at_own_conditions(), find_user(USER)
        arguments = [QEMU, *_vmm_trial.IDLE_QEMU]
        with open("/dev/null", "wb") as null, _vmm_trial._started(QEMU, arguments, under, user, null, null) as pid:
            os.write(writing, f"{pid}\n".encode())
            signal.pause()
        os._exit(0)
    os.close(writing)
    with open(reading) as stream:
        pid = int(stream.readline())
    assert Path(f"/proc/{pid}/exe").resolve() == Path(QEMU)
    os.kill(module, signal.SIGKILL)
    os.waitpid(module, 0)
    await_(lambda: not Path(f"/proc/{pid}").exists())


class Services:
    """Services of the guest, made together, since systemd takes seconds to read its units again."""

    def __init__(self, **settings: str) -> None:
        for name, text in settings.items():
            self.path(name).write_text(f"[Service]\n{text}\n")
        self._names = list(settings)
        command("systemctl", "daemon-reload")

    @staticmethod
    def path(name: str) -> Path:
        return UNITS / f"kernel-test-{name}.service"

    def remove(self) -> None:
        for name in self._names:
            # Of a template, or where systemd refuses the file, there is nothing to stop.
            command("systemctl", "stop", self.path(name).name, succeeds=False)
        for name in self._names:
            self.path(name).unlink()
        command("systemctl", "daemon-reload")


def main_pid(unit: str) -> str:
    """The main process of a unit."""
    return command("systemctl", "show", "--value", "--property=MainPID", unit).strip()


def executes(pid: str, program: Path) -> bool:
    """Whether the process is the program by now."""
    return Path("/proc", pid, "exe").resolve() == program


def status_of(pid: int) -> tuple[str, int, int]:
    """A process's effective capabilities, user and soft limit of locked memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    limits = Path(f"/proc/{pid}/limits").read_text()
    effective = re.search(r"^CapEff:\t(\w+)$", status, re.MULTILINE)
    uid = re.search(r"^Uid:\t([0-9]+)", status, re.MULTILINE)
    limit = re.search(r"^Max locked memory +(\w+)", limits, re.MULTILINE)
    assert effective
    assert uid
    assert limit
    return effective[1], int(uid[1]), -1 if limit[1] == "unlimited" else int(limit[1])


AMBIENT = "User=vm\nAmbientCapabilities=CAP_IPC_LOCK\n"
SLEEP = "ExecStart=/usr/bin/sleep 600\n"
IDLE = f"ExecStart={QEMU} -S -nodefaults -machine none -display none -monitor none -serial none\n"

# The settings of services, whether they have CAP_IPC_LOCK in effect, and what keeps it from them.
REPLICATED: dict[str, tuple[str, bool, str | None]] = {
    "qemu": (AMBIENT + IDLE + "LimitMEMLOCK=123M:1G\nSupplementaryGroups=kvm\nGroup=kvm\n", True, None),
    "others": (AMBIENT + SLEEP + "NoNewPrivileges=yes\nLimitMEMLOCK=infinity\nSecureBits=keep-caps\n", True, None),
    "nothing": ("User=vm\n" + SLEEP, False, None),
    "dynamic": ("DynamicUser=yes\nAmbientCapabilities=CAP_IPC_LOCK\n" + SLEEP, True, None),
    "root": (SLEEP, True, None),
    "bounded": (AMBIENT + IDLE + "CapabilityBoundingSet=CAP_KILL\n", False, "CapabilityBoundingSet without"),
    "namespace": (AMBIENT + SLEEP + "PrivateUsers=yes\n", False, "has PrivateUsers"),
}


@pytest.fixture(scope="module")
def replicas() -> Iterator[dict[str, Answer]]:
    """What the module says of each service before it was started. The services run meanwhile."""
    names = [Services.path(name).name for name in REPLICATED]
    services = Services(**{name: settings for name, (settings, _ok, _obstacle) in REPLICATED.items()})
    try:
        before = check(units=names, start=True)["units"]
        assert command("systemctl", "list-units", "--all", "--plain", "--no-legend", f"{_vmm_look.REPLICA}*") == ""
        command("systemctl", "start", *names)
        for name, (settings, _ok, _obstacle) in REPLICATED.items():
            # systemd counts a service as started before that is the program.
            program = Path(re.findall(r"^ExecStart=(\S+)", settings, re.MULTILINE)[0]).resolve()
            await_(partial(executes, main_pid(Services.path(name).name), program))
        yield dict(zip(REPLICATED, before))
    finally:
        services.remove()


@pytest.mark.parametrize("name", REPLICATED)
def test_a_replica_is_what_the_unit_is(replicas: dict[str, Answer], name: str) -> None:
    _settings, ok, obstacle = REPLICATED[name]
    row = replicas[name]
    assert row["present"] is True
    assert [obstacle in sentence for sentence in row["obstacles"] if obstacle] == [True] * len(row["obstacles"])
    assert bool(row["obstacles"]) == bool(obstacle)
    assert (row["replica"]["attempted"], row["replica"]["ok"]) == (True, ok), row
    unit = Services.path(name).name
    effective, uid, limit = status_of(int(main_pid(unit)))
    assert row["replica"]["effective"] == effective
    expected = (None, True) if limit == -1 else (limit, False)
    assert (row["replica"]["memlock_bytes"], row["replica"]["memlock_unlimited"]) == expected
    assert _vmm_look.look_at_unit(run_command, unit).memlock.soft == expected[0]
    if name == "dynamic":
        assert row["user"] is None
    else:
        assert row["user"] == row["replica"]["user"] == {0: "root", 1001: "vm"}[uid]


def has_attribute(path: Path) -> bool:
    """Whether it has file capabilities, be it empty ones."""
    return "security.capability" in os.listxattr(path)


def test_a_units_program_with_an_empty_attribute(folder: Path) -> None:
    (folder / "attributes").mkdir()
    zeros, nothing = (Path(shutil.copy(QEMU, folder / "attributes" / f"qemu-system-{name}")) for name in "ab")
    services = Services(**{path.name: AMBIENT + IDLE.replace(QEMU, str(path)) for path in (zeros, nothing)})
    names = [services.path(path.name).name for path in (zeros, nothing)]
    try:
        # What setcap and some modules leave that take the last capability away.
        command("setcap", "=", str(zeros))
        os.setxattr(nothing, "security.capability", b"")
        assert has_attribute(zeros)
        assert has_attribute(nothing)
        of_zeros, of_nothing = check(units=names, start=True)["units"]
        for row in (of_zeros, of_nothing):
            # As it tells the operator to do.
            [advice] = re.findall("`(.*)`", row["obstacles"][0])
            command(*advice.split())
        assert not has_attribute(zeros)
        assert not has_attribute(nothing)
        after = check(units=names[:1], start=True)["units"] + check(units=names[1:])["units"]
    finally:
        services.remove()
        shutil.rmtree(folder / "attributes")
    # What its user cannot have brought about is seen, or told as an obstacle.
    for row, ok in ((of_zeros, False), (of_nothing, None)):
        assert (row["ambient_ipc_lock"], row["replica"]["ok"]) == (True, ok)
    assert "takes ambient capabilities from it" in of_zeros["obstacles"][0]
    assert of_zeros["replica"]["effective"] == NOTHING
    assert "it cannot be executed" in of_nothing["obstacles"][0]
    assert of_nothing["replica"]["effective"] is None
    assert re.search(r"Failed at step EXEC spawning \S+: Invalid argument", of_nothing["replica"]["msg"])
    assert [row["obstacles"] for row in after] == [[], []]
    assert after[0]["replica"]["ok"]


def test_units_that_do_not_start() -> None:
    settings = {
        "nobody": "User=nobody-of-this-name\n" + SLEEP,
        "no-program": "User=vm\nExecStart=/nothing/there\n",
        "no-start": "Type=oneshot\nRemainAfterExit=yes\nExecStop=/bin/true\n",
        "bad": "Type=none-of-this-name\nExecStop=/bin/true\n",
        "template@": AMBIENT + "ExecStart=/usr/bin/sleep %i\n",
    }
    services = Services(**settings)
    names = [services.path(name).name for name in (*settings, "none")]
    try:
        nobody, no_program, no_start, bad, template, none = check(units=names, start=True)["units"]
    finally:
        services.remove()
    for row, ok, words in (
        (nobody, None, "Failed at step USER spawning"),
        (no_start, False, "starts no program"),
        (none, False, "systemd has no unit kernel-test-none.service."),
        (bad, False, "systemd cannot start kernel-test-bad.service: its unit is bad-setting."),
    ):
        assert (row["replica"]["attempted"], row["replica"]["ok"], row["replica"]["effective"]) == (True, ok, None)
        assert words in row["replica"]["msg"]
    assert [row["present"] for row in (nobody, no_start, bad, none)] == [True, True, False, False]
    assert "/nothing/there, which is not there" in no_program["obstacles"][0]
    # What the unit gives to a program is seen by another one.
    assert no_program["replica"]["effective"] == NOTHING
    assert _vmm_look.instance_of(template["name"]) == template["name"].replace("@", "@iommufd-host-check")
    assert template["replica"]["ok"]


def test_a_template_whose_user_is_its_instance() -> None:
    """One that runs tells, and nobody else can."""
    services = Services(**{"own@": AMBIENT.replace("vm", "%i") + SLEEP})
    name = services.path("own@").name
    instance = name.replace("@", "@vm")
    try:
        (before,) = check(units=[name], start=True)["units"]
        command("systemctl", "start", instance)
        (after,) = check(units=[name], start=True)["units"]
    finally:
        command("systemctl", "stop", instance)
        services.remove()
    assert (before["user"], before["obstacles"], before["replica"]["attempted"]) == (None, [], False)
    assert (
        f"none of its instances runs now. Name instances in iommufd_host_units, such as {name.replace('@', '@1')}"
        in (before["replica"]["msg"])
    )
    assert (after["user"], after["replica"]["user"], after["replica"]["ok"]) == ("vm", "vm", True)


def test_a_unit_by_its_alias() -> None:
    services = Services(**{"main": AMBIENT + SLEEP, "main@": AMBIENT + SLEEP})
    links = [services.path(name) for name in ("alias", "alias@")]
    try:
        for link in links:
            link.symlink_to(link.with_name(link.name.replace("alias", "main")))
        command("systemctl", "daemon-reload")
        rows = check(units=[link.name for link in links], start=True)["units"]
    finally:
        for link in links:
            link.unlink()
        services.remove()
    assert [row["main"] for row in rows] == [services.path(name).name for name in ("main", "main@")]
    assert [row["replica"]["ok"] for row in rows] == [True, True]


@pytest.mark.once
def test_the_limit_of_a_session() -> None:
    limits = Path("/etc/security/limits.d/90-kernel-test.conf")
    limits.write_text("vm - memlock 123456\nalice - memlock unlimited\n")
    try:
        vm, alice, none = check(users=["vm", "alice", "nobody-of-this-name"])["users"]
    finally:
        limits.unlink()
    assert (vm["ok"], vm["memlock_bytes"], vm["memlock_unlimited"]) == (True, 123456 * 1024, False)
    assert (alice["ok"], alice["memlock_bytes"], alice["memlock_unlimited"]) == (True, None, True)
    assert (none["present"], none["attempted"]) == (False, False)
    [vm] = check(users=["vm"])["users"]
    assert vm["memlock_bytes"] not in (None, 123456 * 1024)


@pytest.mark.parametrize("user", [USER, "alice", "root"])
def test_an_iommufd_that_is_set_for_somebody_else(user: str) -> None:
    told = {"attempted": True, "ok": True, "inconclusive": False, "mode": "process", "msg": ""}
    assert check(try_iommufd=True, user=user)["try_iommufd"] == told


@pytest.mark.once
def test_an_iommufd_that_is_none() -> None:
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/iommu && exec "$@"', "sh"]
    try_iommufd = run_apart(hide, "iommufd_vmm_check", try_iommufd=True, user=USER)["try_iommufd"]
    assert (try_iommufd["attempted"], try_iommufd["ok"], try_iommufd["mode"]) == (True, False, None)
    assert "/dev/iommu is not the kernel's iommufd but something else" in try_iommufd["msg"]


@pytest.mark.once
def test_an_iommufd_that_cannot_be_set() -> None:
    less = ["setpriv", "--bounding-set=-sys_resource"]
    try_iommufd = run_apart(less, "iommufd_vmm_check", try_iommufd=True, user=USER)["try_iommufd"]
    assert (try_iommufd["ok"], try_iommufd["mode"]) == (False, None)
    assert "cannot be set to per-process accounting (EPERM: " in try_iommufd["msg"]


def leftovers() -> set[str]:
    """The domains, and the files that libvirt keeps of them."""
    # First, because libvirt's daemon, which this starts, has a file there while it runs.
    domains = command("virsh", "list", "--all", "--name").split()
    places = ("/var/log/libvirt/qemu", "/etc/apparmor.d/libvirt", "/run/libvirt/qemu", "/var/lib/libvirt/qemu")
    return {*domains, *(str(path) for place in places for path in Path(place).iterdir())}


@pytest.mark.parametrize("granted", [False, True])
def test_a_domain(granted: bool) -> None:
    before = leftovers()
    if granted:
        command("setcap", "cap_ipc_lock+ep", QEMU)
    try:
        row = emulator(QEMU, start=True, domain=True)
    finally:
        if granted:
            command("setcap", "-r", QEMU)
    assert re.fullmatch(rf"{LIBVIRT} \(pid [0-9]+\)", row["conditions_of"])
    started = row["started"]
    assert started["msg"] == ""
    assert (started["attempted"], started["how"], started["user"]) == (True, "domain", USER)
    assert (started["ok"], started["effective"]) == (granted, IPC_LOCK if granted else NOTHING)
    assert leftovers() <= before


def test_a_domain_that_libvirt_cannot_start() -> None:
    before = leftovers()
    started = emulator("/usr/bin/sleep", start=True, domain=True)["started"]
    assert (started["attempted"], started["ok"], started["inconclusive"], started["effective"]) == (
        True,
        None,
        True,
        None,
    )
    assert "libvirt does not tell what /usr/bin/sleep can: error: " in started["msg"]
    no_libvirt = emulator(QEMU, start=True, domain=True, uri="qemu+unix:///system?socket=/nothing")["started"]
    assert (no_libvirt["ok"], no_libvirt["inconclusive"]) == (None, True)
    assert "error: failed to connect to the hypervisor" in no_libvirt["msg"]
    assert leftovers() <= before


def test_a_domain_ends_with_the_module() -> None:
    program = _vmm_look.look_at_program(QEMU)
    name = "iommufd-host-check-kernel-test"
    reading, writing = os.pipe()
    module = os.fork()
    if not module:

        def run_(words: list[str]) -> tuple[int, str, str]:
            return 0, command(*words), ""

        uri = "qemu:///system"
        domain = _vmm_domain.domain_xml(
            _vmm_domain._domain_capabilities(run_, uri, program), name, "5f0b7d8e-3f0c-4a52-9c19-6f1d1f5a6c11", QEMU
        )
        with _vmm_domain._created(uri, name, domain):
            os.write(writing, b"x")
            signal.pause()
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        assert stream.read(1) == b"x"
    try:
        assert name in command("virsh", "list", "--name")
    finally:
        os.kill(module, signal.SIGKILL)
        os.waitpid(module, 0)
    await_(lambda: name not in command("virsh", "list", "--all", "--name"))
    _vmm_domain._remove_leftovers(name, "5f0b7d8e-3f0c-4a52-9c19-6f1d1f5a6c11")
