# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The launcher, packed as on a host: what the command that it becomes is told by the kernel about itself."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import os
import pty
import pwd
import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._programs import EXEC, zipapp
from ansible_collections.virt.iommufd.tests.kernel.harness import CAPABILITIES, DEVICES, MIB, VM, as_user

pytestmark = pytest.mark.once

PROGRAM = Path("/run/iommufd-exec-test")
SEEN = Path("/run/iommufd-exec-seen")
NOTHING = "0000000000000000"
EVERY_SET = ("CapInh", "CapPrm", "CapEff", "CapAmb")

# It tells about itself in JSON, and asks the kernel for the mode of its iommufd. Its first word is the descriptor.
COMMAND = r"""
import errno, fcntl, json, os, resource, struct, sys

def tried(function, *arguments):
    try:
        function(*arguments)
    except OSError as exc:
        return errno.errorcode[exc.errno]
    return None

# GET of the rlimit mode, as linux/iommufd.h lays it out.
argument = bytearray(struct.pack("=IIHHIQ", 24, 0, 1, 0, 0, 9))
fcntl.ioctl(int(sys.argv[1]), 0x3B87, argument)
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines())
links = {}
for name in os.listdir("/proc/self/fd"):
    try:
        links[name] = os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        pass
told = {
    "fd": sys.argv[1],
    "words": sys.argv[2:],
    "mode": ["user", "process"][struct.unpack("=IIHHIQ", argument)[5]],
    "status": status,
    "links": links,
    "limit": resource.getrlimit(resource.RLIMIT_MEMLOCK),
    "environment": dict(os.environ),
    "pid": os.getpid(),
    "children": open(f"/proc/self/task/{os.getpid()}/children").read(),
    "root_again": [tried(os.setuid, 0), tried(os.setresuid, -1, 0, -1), tried(os.setgid, 0), tried(os.setgroups, [0])],
}
with open("/run/iommufd-exec-seen", "w") as stream:
    json.dump(told, stream)
"""


@pytest.fixture(autouse=True)
def program() -> Iterator[None]:
    """The program in the guest, for whoever may run it, and a file for what is seen."""
    PROGRAM.write_bytes(zipapp(EXEC))
    PROGRAM.chmod(0o755)
    SEEN.write_bytes(b"")
    SEEN.chmod(0o666)
    yield
    PROGRAM.unlink()
    SEEN.unlink()


def launch(*options: str, prefix: tuple[str, ...] = (), command: tuple[str, ...] | None = None, **settings: Any) -> Any:
    """How a run ended; with the words in front of it, as another caller."""
    words = command or ("/usr/bin/python3", "-I", "-c", COMMAND, "{iommufd}", "--", "$HOME {} '")
    whole = [*prefix, str(PROGRAM), *options, "--", *words]
    return subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False, **settings)


def seen(*options: str, prefix: tuple[str, ...] = (), **settings: Any) -> Any:
    """What the command saw, and what was said of it on standard error."""
    done = launch(*options, prefix=prefix, **settings)
    assert done.returncode == 0, done.stderr
    return {**json.loads(SEEN.read_text()), "said": done.stderr}


def refused(code: int, *options: str, prefix: tuple[str, ...] = (), **settings: Any) -> str:
    """What was said where the command was not started."""
    done = launch(*options, prefix=prefix, **settings)
    assert done.returncode == code, done.stderr
    assert SEEN.read_text() == ""
    assert str(done.stderr).splitlines()[-1].startswith("iommufd-exec: ")
    return str(done.stderr)


def without(capability: str) -> tuple[str, ...]:
    return ("setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}")


def test_a_user_has_nothing_but_the_descriptor() -> None:
    told = seen("--user", "vm", "--memlock", "100M", "--bounding", "none")
    assert told["mode"] == "process"
    assert told["limit"] == [100 * MIB, 100 * MIB]
    for name in ("Uid", "Gid"):
        assert told["status"][name].split() == [str(VM)] * 4
    assert told["status"]["Groups"].split() == [str(VM)]
    assert {name: told["status"][name] for name in (*EVERY_SET, "CapBnd")} == dict.fromkeys(
        (*EVERY_SET, "CapBnd"), NOTHING
    )
    assert set(told["root_again"]) == {"EPERM"}
    assert told["words"] == ["--", "$HOME {} '"]
    assert told["links"].pop(told["fd"]) == "/dev/iommu"
    assert int(told["fd"]) > 2
    # The three standard ones are left, none of which is an iommufd.
    assert set(told["links"]) == {"0", "1", "2"}
    assert told["children"] == ""
    assert "rlimit_mode=process" in told["said"]
    assert "100 MiB" in told["said"]


def test_it_becomes_the_command_itself() -> None:
    words = [str(PROGRAM), "--", "/usr/bin/python3", "-I", "-c", COMMAND, "{iommufd}"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        assert process.wait(120) == 0
        assert json.loads(SEEN.read_text())["pid"] == process.pid


@pytest.mark.host
def test_the_users_groups_are_all_there() -> None:
    # Debian's, which has the group kvm as well.
    user = pwd.getpwnam("libvirt-qemu")
    wanted = {user.pw_gid, *(each.gr_gid for each in grp.getgrall() if user.pw_name in each.gr_mem)}
    assert len(wanted) > 1
    told = seen("--user", "libvirt-qemu", prefix=("setpriv", "--groups=0,4,27"))
    assert {int(group) for group in told["status"]["Groups"].split()} == wanted


@pytest.mark.parametrize(
    "prefix",
    [
        ("setpriv", "--inh-caps=+ipc_lock,+sys_admin", "--ambient-caps=+ipc_lock"),
        # With this a change of user clears nothing by itself.
        ("setpriv", "--securebits=+no_setuid_fixup"),
        ("setpriv", "--securebits=+noroot,+no_setuid_fixup", "--inh-caps=+all", "--ambient-caps=+all"),
    ],
)
def test_no_capability_is_left_however_it_was_had(prefix: tuple[str, ...]) -> None:
    told = seen("--user", "vm", prefix=prefix)
    assert {told["status"][name] for name in EVERY_SET} == {NOTHING}
    assert set(told["root_again"]) == {"EPERM"}
    assert told["mode"] == "process"


def test_the_bounding_set_is_the_one_that_is_asked_for() -> None:
    before = Path("/proc/self/status").read_text().partition("CapBnd:\t")[2].split()[0]
    assert seen("--user", "vm")["status"]["CapBnd"] == before
    told = seen("--user", "vm", "--bounding", "ipc_lock,CAP_SYS_RESOURCE")
    assert int(told["status"]["CapBnd"], 16) == sum(1 << each for each in CAPABILITIES.values())


def test_root_stays_root_without_a_user() -> None:
    told = seen()
    assert told["status"]["Uid"].split() == ["0"] * 4
    assert told["mode"] == "process"
    assert "held against no limit, since it has CAP_IPC_LOCK" in told["said"]


def test_a_unit_of_that_user_with_the_one_capability_suffices() -> None:
    only = ("--inh-caps=+sys_resource", "--ambient-caps=+sys_resource")
    told = seen(
        *("--user", "vm", "--memlock", "100M", "--strict"),
        prefix=("setpriv", "--reuid=vm", "--regid=vm", "--init-groups", *only),
    )
    assert told["mode"] == "process"
    assert told["limit"] == [100 * MIB, 100 * MIB]
    assert {told["status"][name] for name in EVERY_SET} == {NOTHING}


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param(without("sys_resource"), id="without the capability"),
        pytest.param(("unshare", "--user", "--map-root-user"), id="in another user namespace"),
        pytest.param(tuple(as_user(VM)), id="an ordinary user"),
    ],
)
def test_who_may_not_set_it_is_warned(prefix: tuple[str, ...]) -> None:
    told = seen(prefix=prefix)
    assert told["mode"] == "user"
    assert "warning: rlimit_mode=process takes CAP_SYS_RESOURCE in the initial user namespace" in told["said"]
    assert "EPERM" in told["said"]
    assert "rlimit_mode=user" in told["said"].splitlines()[-1]


def test_who_may_not_set_it_is_strictly_refused() -> None:
    said = refused(123, "--strict", prefix=without("sys_resource"))
    assert "takes CAP_SYS_RESOURCE in the initial user namespace" in said
    assert "So /usr/bin/python3 is not started" in said


def test_nothing_has_to_be_set_for_the_kernels_default() -> None:
    told = seen("--rlimit-mode", "user", "--strict", prefix=without("sys_resource"))
    assert told["mode"] == "user"
    assert "warning" not in told["said"]


@pytest.mark.parametrize(
    ("options", "prefix", "words"),
    [
        (("--user", "vm"), without("setuid"), "cannot become user vm (EPERM"),
        (("--user", "vm"), without("setgid"), "cannot become user vm (EPERM"),
        (("--user", "alice"), tuple(as_user(VM)), "cannot become user alice (EPERM"),
        (("--bounding", "none"), without("setpcap"), "that takes CAP_SETPCAP"),
        (("--memlock", "infinity"), without("sys_resource"), "takes CAP_SYS_RESOURCE"),
    ],
)
def test_whatever_fails_starts_nothing(options: tuple[str, ...], prefix: tuple[str, ...], words: str) -> None:
    assert words in refused(125, *options, prefix=prefix)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("sh", "-c", "exit 42", "{iommufd}"), 42),
        (("sh", "-c", "kill -USR1 $$", "{iommufd}"), -signal.SIGUSR1),
        (("/etc/passwd", "{iommufd}"), 126),
        (("iommufd-exec-no-such-program", "{iommufd}"), 127),
    ],
)
def test_exit_codes(command: tuple[str, ...], code: int) -> None:
    assert launch(command=command).returncode == code


def shell(script: str) -> tuple[str, ...]:
    """What has a shell do something in a mount namespace of its own first."""
    return ("unshare", "--mount", "sh", "-c", f'{script} && exec "$0" "$@"')


def test_a_host_without_the_device() -> None:
    said = refused(122, prefix=shell("mount -t tmpfs none /dev"))
    assert "There is no /dev/iommu: load the module iommufd" in said


@pytest.mark.parametrize("node", ["/dev/null", "/dev/vfio/devices/vfio0"])
def test_what_is_no_iommufd_is_sent_nothing(node: str) -> None:
    said = refused(122, prefix=shell(f"mount --bind {node} /dev/iommu"))
    assert "is not the kernel's iommufd but something else" in said


def test_it_needs_no_standard_streams_and_takes_none_of_their_numbers() -> None:
    done = launch(prefix=("sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-'))
    assert done.returncode == 0
    told = json.loads(SEEN.read_text())
    assert int(told["fd"]) > 2
    assert told["links"][told["fd"]] == "/dev/iommu"
    assert list(told["links"].values()).count("/dev/iommu") == 1


def test_the_environment_and_other_descriptors_are_the_callers() -> None:
    read, write = os.pipe()
    try:
        told = seen(env={"PATH": os.defpath, "A": "b"}, pass_fds=[read], cwd="/")
    finally:
        os.close(read)
        os.close(write)
    # Python, which the command is, too, adds this one for itself.
    assert {name: value for name, value in told["environment"].items() if name != "LC_CTYPE"} == {
        "PATH": os.defpath,
        "A": "b",
    }
    assert told["links"][str(read)].startswith("pipe:")


def address(node: str) -> str:
    """Where a device of VFIO is on its bus."""
    return Path(f"/sys/class/vfio-dev/{Path(node).name}/device").resolve().name


@pytest.fixture
def closed() -> Iterator[None]:
    """Nodes that only root can open."""
    modes = {each: os.stat(each).st_mode & 0o777 for each in ("/dev/iommu", *DEVICES)}
    for each in modes:
        os.chmod(each, 0o600)
    yield
    for each, mode in modes.items():
        os.chmod(each, mode)


def test_a_user_has_the_devices_and_no_node(closed: None) -> None:
    first, second = (address(each) for each in DEVICES[:2])
    short = second.partition(":")[2]
    words = ("/usr/bin/python3", "-I", "-c", COMMAND, "{iommufd}", "{iommufd:b}", f"{{{first}}}", f"{{{short}}}")
    done = launch("--user", "vm", "--device", first, "--device", short, command=words)
    assert done.returncode == 0, done.stderr
    told = json.loads(SEEN.read_text())
    assert told["status"]["Uid"].split() == [str(VM)] * 4
    links = {name: link for name, link in told["links"].items() if name not in ("0", "1", "2")}
    fds = [told["fd"], *told["words"]]
    assert [links.pop(fd) for fd in fds] == ["/dev/iommu", "/dev/iommu", *DEVICES[:2]]
    assert links == {}


def test_a_device_that_is_in_use() -> None:
    first = address(DEVICES[0])
    words = ("true", "{iommufd}", f"{{{first}}}")
    with open(DEVICES[0], "rb+", buffering=0) as node, open("/dev/iommu", "rb+", buffering=0) as iommufd:
        process = subprocess.Popen(["sleep", "60"], stdin=node)
        try:
            # Open, and not yet bound.
            assert launch("--device", first, command=words).returncode == 0
            # VFIO_DEVICE_BIND_IOMMUFD
            fcntl.ioctl(node, 0x3B76, struct.pack("=IIiI", 16, 0, iommufd.fileno(), 0))
            node.close()
            done = launch("--device", first, command=words)
        finally:
            process.kill()
            process.wait()
    assert done.returncode == 122
    assert f"{first} ({DEVICES[0]}) is in use, probably by process {process.pid}, which has it" in done.stderr


def test_a_device_that_is_not_bound_to_vfio() -> None:
    other = next(each.name for each in Path("/sys/bus/pci/devices").iterdir() if not (each / "vfio-dev").exists())
    done = launch("--device", other, command=("true", "{iommufd}", f"{{{other}}}"))
    assert done.returncode == 122
    assert f"{other} is bound to " in done.stderr
    assert f"driverctl set-override {other} vfio-pci" in done.stderr


@pytest.fixture
def shared() -> Iterator[str]:
    """A device of VFIO in a group with devices of other drivers: one of the machine's own."""
    folder = Path("/sys/bus/pci/devices/0000:00:1f.3")
    assert len(list((folder / "iommu_group" / "devices").iterdir())) > 1
    driver = (folder / "driver").resolve().name

    def bind_to(override: str) -> None:
        (folder / "driver" / "unbind").write_text(folder.name)
        (folder / "driver_override").write_text(f"{override}\n")
        Path("/sys/bus/pci/drivers_probe").write_text(folder.name)
        subprocess.run(["udevadm", "settle"], check=True)

    bind_to("vfio-pci")
    yield folder.name
    bind_to("")
    assert (folder / "driver").resolve().name == driver


@pytest.mark.host
def test_a_device_whose_group_has_devices_of_other_drivers(shared: str) -> None:
    done = launch("--device", shared, command=("true", "{iommufd}", f"{{{shared}}}"))
    assert done.returncode == 122
    assert re.search(rf"{shared} .* is in IOMMU group \d+ with .*0000:00:1f\.2 \(driver ahci\)", done.stderr)
    assert "bind these to vfio-pci, too" in done.stderr


def test_a_device_below_a_folder_that_is_not_roots() -> None:
    first = address(DEVICES[0])
    prefix = shell("mount -t tmpfs -o mode=777 none /dev/vfio/devices")
    done = launch("--device", first, prefix=prefix, command=("true", "{iommufd}", f"{{{first}}}"))
    assert done.returncode == 122
    assert "/dev/vfio/devices is not root's alone" in done.stderr


def test_the_environment_is_the_users() -> None:
    given = {"PATH": os.defpath, "A": "b", "HOME": "/root", "XDG_RUNTIME_DIR": "/run/user/0"}
    given["DBUS_SESSION_BUS_ADDRESS"] = "unix:path=/run/user/0/bus"
    environment = seen("--user", "vm", env=given)["environment"]
    user = pwd.getpwnam("vm")
    folder = Path(f"/run/user/{VM}")
    expected = {"HOME": user.pw_dir, "USER": "vm", "LOGNAME": "vm", "SHELL": user.pw_shell or "/bin/sh"}
    expected.update({"XDG_RUNTIME_DIR": str(folder)} if folder.exists() else {})
    environment.pop("LC_CTYPE", None)
    assert environment == {"PATH": os.defpath, "A": "b", **expected}


# Whether it has a controlling terminal, and which session keyring (KEYCTL_GET_KEYRING_ID of KEY_SPEC_SESSION_KEYRING).
TIES = r"""
import ctypes, errno, json, os
keyctl = 250 if os.uname().machine == "x86_64" else 219
libc = ctypes.CDLL(None)
libc.syscall.restype = ctypes.c_long
try:
    terminal = os.open("/dev/tty", os.O_RDWR)
except OSError as exc:
    terminal = errno.errorcode[exc.errno]
with open("/run/iommufd-exec-seen", "w") as stream:
    json.dump({"terminal": terminal, "keyring": libc.syscall(ctypes.c_long(keyctl), ctypes.c_long(0), -3, 0)}, stream)
"""


def ties(*options: str) -> Any:
    """What ties the command to whoever has typed its command line at a terminal: as a child of a shell there."""
    words = [str(PROGRAM), *options, "--", "/usr/bin/python3", "-I", "-c", TIES, "{iommufd}"]
    pid, terminal = pty.fork()
    if not pid:
        os.execv("/bin/sh", ["sh", "-c", '"$@"; exit $?', "sh", *words])
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return json.loads(SEEN.read_text())


def test_a_user_has_neither_roots_terminal_nor_roots_keys() -> None:
    roots, users = ties(), ties("--user", "vm")
    assert isinstance(roots["terminal"], int)
    assert users["terminal"] == "ENXIO"
    assert -1 not in (roots["keyring"], users["keyring"])
    assert roots["keyring"] != users["keyring"]
