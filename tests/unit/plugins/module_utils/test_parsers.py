# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever bytes the kernel, libvirt, systemd or a stranger hand us: a value, or an exception of our own."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._iommufd import parse_dev, parse_misc
from ansible_collections.virt.iommufd.plugins.module_utils._process import (
    Stat,
    parse_pidfd,
    parse_stat,
    parse_status,
    printable,
)
from ansible_collections.virt.iommufd.plugins.module_utils._target import (
    UnitTarget,
    emulator_uid,
    guest_name,
    parse_pid,
)
from hypothesis import example, given
from hypothesis import strategies as st

PARSERS: list[Callable[[bytes], Any]] = [
    parse_pid,
    parse_status,
    parse_stat,
    parse_pidfd,
    parse_dev,
    parse_misc,
    emulator_uid,
    printable,
    lambda text: guest_name(text.split(b"\0")),
]

# Bytes at random hardly ever come near what a parser expects, so some are made of pieces of that.
PIECES = [
    *(b"Uid:\t", b"State:\t", b"Z (zombie)\n", b"VmSize:", b"1000\t1000\n", b"42", b":", b"\n", b" ", b"\0", b"\xff"),
    *(b"42 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", b" iommu", b"10:123", b"9999999999999999999"),
    *(b"<domstatus>", b"<domain>", b"<seclabel model='dac'><label>", b"+1:+1", b"</label></seclabel>", b"</domain>"),
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
    assert parse_stat(b"42 (a) S 1) R " + b" ".join(b"%d" % n for n in range(4, 30))) == Stat("R", 9, 22)


def test_the_process_behind_a_pidfd() -> None:
    assert parse_pidfd(b"pos:\t0\nmnt_id:\t15\nPid:\t42\nNSpid:\t42\n") == 42
    assert parse_pidfd(b"Pid:\t-1\n") == -1


def test_device_numbers() -> None:
    assert parse_dev(b"10:123\n") == parse_misc(b"229 fuse\n123 iommu\n 60 iommufoo\n")
    assert parse_misc(b"229 fuse\n") is None
