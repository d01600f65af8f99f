# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever bytes the kernel, libvirt, systemd or a stranger hand us: a value, or an exception of our own."""

from __future__ import annotations

import os
import resource
from functools import partial
from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._capabilities import parse_file_capabilities
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError, printable
from ansible_collections.virt.iommufd.plugins.module_utils._foreign import number, parse_answer, parse_xml
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import parse_dev, parse_misc
from ansible_collections.virt.iommufd.plugins.module_utils._libvirt import (
    daemon_unit_of,
    library_version,
    offers_iommufd,
)
from ansible_collections.virt.iommufd.plugins.module_utils._named_target import UnitTarget
from ansible_collections.virt.iommufd.plugins.module_utils._pidfile import parse_pid
from ansible_collections.virt.iommufd.plugins.module_utils._process import (
    Stat,
    parse_flags,
    parse_pidfd,
    parse_stat,
    parse_status,
)
from ansible_collections.virt.iommufd.plugins.module_utils._process_facts import Limit, parse_cgroup, parse_memlock
from ansible_collections.virt.iommufd.plugins.module_utils._qemu import guest_name, look_at_guest
from ansible_collections.virt.iommufd.plugins.module_utils._running import parse_domain_record
from ansible_collections.virt.iommufd.plugins.module_utils._systemd import parse_units
from hypothesis import example, given
from hypothesis import strategies as st

PARSERS: list[Callable[[bytes], Any]] = [
    parse_pid,
    parse_status,
    parse_stat,
    parse_pidfd,
    parse_flags,
    parse_dev,
    parse_misc,
    lambda text: parse_domain_record(text, 0),
    number,
    parse_answer,
    parse_xml,
    printable,
    parse_memlock,
    parse_cgroup,
    parse_file_capabilities,
    library_version,
    lambda text: guest_name(text.split(b"\0")),
    lambda text: look_at_guest(b"qemu", text.split(b"\0"), lambda path: path),
    lambda text: look_at_guest(b"cloud-hypervisor", text.split(b"\0"), lambda path: path),
    lambda text: [daemon_unit_of(each) for each in parse_units(text.decode("utf-8", "backslashreplace"))],
    lambda text: offers_iommufd(text.decode("utf-8", "surrogateescape")),
]

LIMITS = resource.getrlimit(resource.RLIMIT_MEMLOCK)

# Bytes at random hardly ever come near what a parser expects, so some are made of pieces of that.
PIECES = [
    *(b"Uid:\t", b"State:\t", b"Z (zombie)\n", b"VmSize:", b"1000\t1000\n", b"42", b":", b"\n", b" ", b"\0", b"\xff"),
    *(b"42 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", b" iommu", b"10:123", b"9999999999999999999"),
    *(b"<domstatus pid='1'>", b"<domain id='1'>", b"<name>a</name>", b"</domstatus>"),
    *(b"<domain>", b"<seclabel model='dac'><label>", b"+1:+1", b"</label></seclabel>", b"</domain>"),
    *(
        b"Pid:\t",
        b"<?xml version='1.0' encoding='",
        b"utf-16",
        b"no-such",
        b"'?>",
        b"-name\0",
        b"guest=",
        b",,",
        b"&lol;",
        b"-m\0",
        b"-object\0{",
        b'-readconfig\0[memory]\nsize="',
        b"--memory\0size=",
        b"CapEff:\t0\nCapPrm:\t0\nCapBnd:\t1ff\n",
        b"VmPin:\t 8 kB\n",
        b"flags:\t0",
        b"Max locked memory         8388608              unlimited            bytes\n",
        b"0::/a/b.service",
        b"/libvirt.so.0.12008.0",
        b"Id=a\n",
        b"MainPID=7\n",
    ),
]
TEXTS = st.one_of(st.binary(), st.lists(st.sampled_from(PIECES)).map(b"".join))


def outcome(call: Callable[[], object]) -> str:
    """What came of it, as text; any exception but our own goes through."""
    try:
        return repr(call())
    except IommufdError as exc:
        return str(exc)


@pytest.mark.parametrize("parse", PARSERS)
@given(text=TEXTS)
@example(text=b"<?xml version='1.0' encoding='no-such'?><a/>")
@example(text=b"<?xml version='1.0' encoding='utf-16'?><a/>")
def test_any_bytes_give_a_value_or_our_own_exception(parse: Callable[[bytes], Any], text: bytes) -> None:
    assert outcome(lambda: parse(text)).isprintable()


@given(output=TEXTS, errors=TEXTS, code=st.integers(0, 3))
def test_any_answer_of_systemctl(output: bytes, errors: bytes, code: int) -> None:
    # Text as AnsibleModule.run_command makes it of bytes.
    answer = code, output.decode(errors="surrogateescape"), errors.decode(errors="surrogateescape")
    assert outcome(UnitTarget("vm.service", lambda _command: answer).resolve).isprintable()


def test_status_of_a_real_process() -> None:
    with open("/proc/self/status", "rb") as stream:
        status = parse_status(stream.read())
    assert status.has_memory


def test_stat_of_a_real_process_and_of_a_hostile_name() -> None:
    with open("/proc/self/stat", "rb") as stream:
        assert parse_stat(stream.read()).state == "R"
    assert parse_stat(b"42 (a) S 1) R " + b" ".join(b"%d" % n for n in range(4, 30))) == Stat(b"a) S 1", "R", 9, 22)


def test_the_process_behind_a_pidfd() -> None:
    assert parse_pidfd(b"pos:\t0\nmnt_id:\t15\nPid:\t42\nNSpid:\t42\n") == 42
    assert parse_pidfd(b"Pid:\t-1\n") == -1


def test_the_flags_of_a_descriptor() -> None:
    assert parse_flags(b"pos:\t0\nflags:\t012100002\nmnt_id:\t15\n") == os.O_PATH | 0o2100002
    for text in (b"pos:\t0\n", b"flags:\t9\n"):
        assert outcome(partial(parse_flags, text)).startswith("/proc/PID/fdinfo cannot be read")


def test_device_numbers() -> None:
    assert parse_dev(b"10:123\n") == parse_misc(b"229 fuse\n123 iommu\n 60 iommufoo\n")
    assert parse_misc(b"229 fuse\n") is None


def test_the_limit_on_locked_memory() -> None:
    with open("/proc/self/limits", "rb") as stream:
        assert parse_memlock(stream.read()) == Limit(*(None if each < 0 else each for each in LIMITS))
    line = b"Max locked memory         unlimited            8388608              bytes     \n"
    assert parse_memlock(line) == Limit(None, 8388608)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        (b"0::/system.slice/vm1.service\n", ("vm1.service", None)),
        (
            rb"0::/machine.slice/machine-qemu\x2d1\x2dvm1.scope/libvirt/emulator",
            (r"machine-qemu\x2d1\x2dvm1.scope", None),
        ),
        (b"0::/user.slice/user-1001.slice/session-3.scope\n", ("session-3.scope", None)),
        (
            b"0::/user.slice/user-1001.slice/user@1001.service/app.slice/vm.service\n",
            ("user@1001.service", "vm.service"),
        ),
        (b"0::/user.slice/user-1001.slice/user@1001.service\n", ("user@1001.service", None)),
        (b"12:memory:/x.service\n1:name=systemd:/system.slice/vm1.service\n", ("vm1.service", None)),
        (b"0::/system.slice/_memory.max.service\n", ("memory.max.service", None)),
        (b"0::/system.slice/system-vm.slice/vm@fd:1.service\n", ("vm@fd:1.service", None)),
        (b"0::/vm1.service\n", ("vm1.service", None)),
        (b"0::/user.slice/user-1001.slice/user@1001.service/init.scope\n", ("user@1001.service", "init.scope")),
        # A service of a user's that has a group of its own, too.
        (
            b"0::/user.slice/user-1001.slice/user@1001.service/app.slice/vmm.service/vm.service\n",
            ("user@1001.service", "vmm.service"),
        ),
        (b"0::/user.slice/user-1001.slice/user@1001.service/app.slice/vm1/vm.service\n", ("user@1001.service", None)),
        # What is below a container's group was named in there.
        (b"0::/lxc.payload.c1/system.slice/vm1.service\n", (None, None)),
        (b"0::/lxc.payload.c1/system.slice/vm@*.service\n", (None, None)),
        (b"0::/docker/abc/machine.slice/machine-qemu\\x2d5\\x2dvm.scope\n", (None, None)),
        (b"0::/docker/abc/user.slice/user-0.slice/user@0.service/vm.service\n", (None, None)),
        (b"0::/system.slice/docker-abc.scope/system.slice/vm1.service\n", ("docker-abc.scope", None)),
        (b"0::/../../system.slice/vm1.service\n", (None, None)),
        # No names of units, though systemctl would take some for patterns.
        (b"0::/system.slice/vm@*.service\n", (None, None)),
        (b"0::/system.slice/vm@.service\n", (None, None)),
        (b"0::/system.slice/[a-z]?.service\n", (None, None)),
        (b"0::/system.slice/a b.service\n", (None, None)),
        (b"0::/system.slice/a\x1b[1m.service\n", (None, None)),
        (b"0::/system.slice/\xc3\xa4.service\n", (None, None)),
        (b"0::/system.slice/.service\n", (None, None)),
        (b"0::/system.slice/vm1.service (deleted)\n", (None, None)),
        (b"0::/system.slice/" + b"a" * 248 + b".service\n", (None, None)),
        (b"0::/system.slice/vm1.mount\n", (None, None)),
        (b"0::/system.slice\n", (None, None)),
        (b"0::/\n", (None, None)),
        (b"", (None, None)),
    ],
)
def test_the_units_of_a_process(text: bytes, units: tuple[str | None, str | None]) -> None:
    assert parse_cgroup(text) == units
