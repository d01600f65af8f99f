# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pwd
import time
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _libvirt_files, _paths
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._libvirt_files import (
    NOTHING_READ,
    Abilities,
    LibvirtFiles,
    VmUser,
    parse_emulator,
    parse_setting,
    parse_user,
    read_libvirt_files,
    takes_iommufd,
)

OFFERS = b"\0 iommufd='yes'\0"
SETS = b"\0failed to set memory accounting for iommufd\0"
MACHINE = os.uname().machine


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the root of a file system that has a libvirt."""
    # The folder of the test belongs to whoever runs it.
    monkeypatch.setattr(_paths, "_TRUSTED", (0, os.getuid()))
    for name in ("_CONF", "_FOLDER", "_DEFINITIONS", "_RECORDS"):
        monkeypatch.setattr(_libvirt_files, name, f"{tmp_path}{getattr(_libvirt_files, name)}")
    (tmp_path / "etc/libvirt/qemu").mkdir(parents=True)
    (tmp_path / "var/lib/libvirt/qemu").mkdir(parents=True)
    return tmp_path


def library(path: Path, *texts: bytes, before: int = 0) -> str:
    path.write_bytes(b"\x7fELF" + b"x" * before + b"".join(texts) + b"x" * 100)
    return str(path)


@pytest.mark.parametrize(
    ("texts", "abilities"),
    [
        ((), Abilities(False, False)),
        ((OFFERS,), Abilities(True, False)),
        ((b" iommufd='no'\0", b"Set iommufd rlimit mode to %s-based accounting"), Abilities(True, True)),
        ((OFFERS, SETS), Abilities(True, True)),
        # What names it and does nothing with it.
        ((b"\0iommufd\0/dev/iommufd\0",), Abilities(False, False)),
    ],
)
@pytest.mark.parametrize("before", [0, *range(2**20 - 60, 2**20 + 10, 7), 2**21])
def test_what_a_library_can_do(host: Path, texts: tuple[bytes, ...], abilities: Abilities, before: int) -> None:
    """Wherever in the file it says so."""
    msgs: list[str] = []
    assert _libvirt_files._abilities_of([library(host / "libvirt.so", *texts, before=before)], msgs) == abilities
    assert msgs == []


def test_libraries_that_differ_or_cannot_be_read(host: Path) -> None:
    new, old = library(host / "a", OFFERS, SETS), library(host / "b")
    for libraries, abilities, words in (
        ([new, new], Abilities(True, True), ""),
        ([new, old], Abilities(), f"is not known, and they differ: {host}/a, {host}/b."),
        ([f"{host}/c"], Abilities(), f"What libvirt can do stands in {host}/c, and cannot be read (ENOENT"),
        ([], Abilities(), ""),
    ):
        msgs: list[str] = []
        assert _libvirt_files._abilities_of(libraries, msgs) == abilities
        assert words in "".join(msgs)
        assert bool(msgs) == bool(words)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('user = "vm"', "vm"),
        ("user='vm' # not \"root\"\n", "vm"),
        ('\tuser\t=\t"+64055"\n', "+64055"),
        ('user="""vm"""', "vm"),
        ('user = ""', ""),
        # The first one counts, as it does to libvirt.
        ('user = "first"\nuser = "second"\n', "first"),
        ('#user = "vm"\n   # user = "vm"\ngroup = "kvm"\n', None),
        ('swtpm_user = "tss"\nuser_x = "a"\n', None),
        ('cgroup_device_acl = [\n  "/dev/null",\n  "user", # user = "x"\n]\nuser = "vm"\n', "vm"),
        ('a = "user = \'x\'"\nuser = "vm"', "vm"),
        ("a = 1\nuser = 'vm'\nb = [ 'x' ]", "vm"),
        ('a = """\nuser = "x"\n"""\nuser = "vm"', "vm"),
        ('a = "#"\nuser = "vm"', "vm"),
        ('a = \'it"s\'\nuser = "vm"', "vm"),
        ("", None),
    ],
)
def test_a_setting_of_qemu_conf(text: str, value: str | None) -> None:
    assert parse_setting(text.encode(), b"user") == value


@pytest.mark.parametrize("text", ["user = 64055", "user = vm", "user =", "user = [ 'vm' ]"])
def test_a_setting_that_libvirt_refuses(text: str) -> None:
    with pytest.raises(IommufdError, match="user is not followed by a text in quotes"):
        parse_setting(text.encode(), b"user")


@pytest.mark.parametrize(
    ("setting", "user"),
    [
        ("root", VmUser("root", 0)),
        ("+0", VmUser("root", 0)),
        ("0", VmUser("root", 0)),
        ("+4000000001", VmUser(None, 4000000001)),
        ("4294967295", VmUser("4294967295", None)),
        ("no-such\x1b", VmUser("no-such\\x1b", None)),
        ("+root", VmUser("+root", None)),
        ("a\0b", VmUser("a\\x00b", None)),
        ("", VmUser("", None)),
    ],
)
def test_a_user_by_name_or_number(setting: str, user: VmUser) -> None:
    assert parse_user(setting) == user


def test_a_name_goes_before_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    root = pwd.getpwnam("root")
    monkeypatch.setattr(pwd, "getpwnam", {"100": root}.__getitem__)
    assert parse_user("100") == VmUser("root", 0)
    assert parse_user("101").uid == 101


ME = VmUser(pwd.getpwuid(os.getuid()).pw_name, os.getuid())
NOBODY = VmUser()


@pytest.mark.parametrize(
    ("conf", "owner", "runs", "user", "words"),
    [
        ("", 64055, True, VmUser(None, 64055), ""),
        ("", 64055, False, VmUser(None, 64055), ""),
        # It may have been made by a package; a daemon that runs has given it to root, though.
        ("", 0, False, NOBODY, ""),
        ("", 0, True, VmUser("root", 0), ""),
        ("", None, True, NOBODY, ""),
        ("user = '+7'", 64055, False, VmUser(pwd.getpwuid(7).pw_name, 7), ""),
        ("user = '+64055'", 64055, True, VmUser(None, 64055), ""),
        # The daemon that runs has not read that.
        ("user = '+7'", 64055, True, VmUser(None, 64055), "has user +7, and the daemon took 64055 when it started"),
        ("user = 'no-such'", None, False, VmUser("no-such", None), "has user no-such, whom this host does not know."),
        ("user = 7", None, False, NOBODY, "cannot be read (user is not followed by a text in quotes)"),
        ("user = 7", 64055, True, VmUser(None, 64055), ""),
    ],
)
def test_who_vms_run_as(
    host: Path, monkeypatch: pytest.MonkeyPatch, conf: str, owner: int | None, runs: bool, user: VmUser, words: str
) -> None:
    (host / "etc/libvirt/qemu.conf").write_text(conf)
    monkeypatch.setattr(_libvirt_files, "_owner", lambda _since: owner)
    msgs: list[str] = []
    assert _libvirt_files._find_users(7.5 if runs else None, msgs)[0] == user
    assert words in "".join(msgs)
    assert bool(msgs) == bool(words)


def test_what_the_daemon_has_not_seen_since(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a user in qemu.conf, it is the one of the last run, unless qemu.conf had another one then."""
    msgs: list[str] = []
    conf = host / "etc/libvirt/qemu.conf"
    conf.write_text("")
    os.utime(conf, (0, 0))
    status = (host / "var/lib/libvirt/qemu").stat()
    last = ME if ME.uid else NOBODY
    assert _libvirt_files._find_users(None, msgs)[0] == last
    os.utime(conf, (0, status.st_ctime + 1))
    assert _libvirt_files._find_users(None, msgs)[0] == NOBODY
    # Nobody has to name one whom distributions give their VMs to.
    with monkeypatch.context() as built:
        built.setattr(_libvirt_files, "_USUAL_USERS", (ME.name,))
        assert _libvirt_files._find_users(None, msgs) == (ME, ME)
    # One that runs gives it to its user as soon as it has started.
    assert _libvirt_files._find_users(status.st_ctime - 60, msgs)[0] == ME
    assert _libvirt_files._find_users(status.st_ctime + 60, msgs)[0] == NOBODY
    conf.unlink()
    assert _libvirt_files._find_users(None, msgs)[0] == last
    monkeypatch.setattr(_libvirt_files, "_FOLDER", "/nowhere")
    assert _libvirt_files._find_users(status.st_ctime, msgs)[0] == NOBODY
    assert msgs == []


DAEMON = VmUser(None, 64055)
SEVEN = VmUser(pwd.getpwuid(7).pw_name, 7)


@pytest.mark.parametrize(
    ("conf", "owner", "has_read", "now", "then"),
    [
        ("", 64055, True, DAEMON, DAEMON),
        # Another one may have stood there.
        ("", 64055, False, DAEMON, NOBODY),
        (None, 64055, True, DAEMON, DAEMON),
        (None, 64055, False, DAEMON, NOBODY),
        ("user = '+7'", 64055, True, DAEMON, SEVEN),
        ("user = '+7'", 64055, False, DAEMON, SEVEN),
        ("user = '+64055'", 64055, False, DAEMON, DAEMON),
        ("user = 'no-such'", 64055, False, DAEMON, VmUser("no-such", None)),
        ("user = 7", 64055, True, DAEMON, NOBODY),
        ("#" * 2**20 + "\nuser = '+7'", 64055, True, DAEMON, NOBODY),
        # What it has read is not known, unless it stood there before.
        ("user = '+7'", None, True, SEVEN, SEVEN),
        ("user = '+7'", None, False, NOBODY, SEVEN),
        ("", None, True, NOBODY, NOBODY),
    ],
)
def test_who_vms_run_as_once_the_daemon_has_started_anew(
    host: Path,
    monkeypatch: pytest.MonkeyPatch,
    conf: str | None,
    owner: int | None,
    has_read: bool,
    now: VmUser,
    then: VmUser,
) -> None:
    if conf is not None:
        (host / "etc/libvirt/qemu.conf").write_text(conf)
    monkeypatch.setattr(_libvirt_files, "_owner", lambda _since: owner)
    assert _libvirt_files._find_users(time.time() + (60 if has_read else 0), []) == (now, then)


def test_a_file_that_was_put_in_its_place_has_not_been_read(host: Path) -> None:
    """Its content is older than the daemon. So is a link that leads elsewhere since."""
    conf, other = host / "etc/libvirt/qemu.conf", host / "etc/libvirt/other"
    started = (host / "var/lib/libvirt/qemu").stat().st_ctime
    for name in ("moved", "linked"):
        other.write_text("")
        os.utime(other, (0, 0))
        if name == "moved":
            other.rename(conf)
        else:
            conf.unlink()
            conf.symlink_to(other)
        assert _libvirt_files._find_users(started, []) == (ME, NOBODY)


def test_a_qemu_conf_that_is_too_long_is_not_cut(host: Path) -> None:
    (host / "etc/libvirt/qemu.conf").write_text("user = '+7'\n" + "#" * 2**20)
    msgs: list[str] = []
    assert _libvirt_files._find_users(None, msgs) == (NOBODY, NOBODY)
    assert msgs[0].endswith("which cannot be read (it is too large: 1048576 bytes at most are read).")


def test_a_qemu_conf_of_somebody_else_is_not_believed(host: Path) -> None:
    conf = host / "etc/libvirt/qemu.conf"
    conf.write_text('user = "root"')
    conf.chmod(0o666)
    msgs: list[str] = []
    assert _libvirt_files._find_users(None, msgs)[0] == NOBODY
    assert f"{conf} can be written by everybody" in msgs[0]


DOMAIN = """\
<domain type='kvm'>
  <os><type arch='{}' machine='q35'>hvm</type></os>
  <devices>
    <emulator>{}</emulator>
  </devices>
</domain>
"""


@pytest.mark.parametrize(
    ("text", "emulator"),
    [
        (DOMAIN.format("x86_64", "/opt/qemu/bin/qemu"), "/opt/qemu/bin/qemu"),
        (DOMAIN.format("s390x", "/opt/qemu/bin/qemu"), None),
        (DOMAIN.format("x86_64", "relative"), None),
        (DOMAIN.format("x86_64", "/a&amp;b"), None),
        # What a power failure has left of a file.
        (DOMAIN.format("x86_64", "/a\0"), None),
        ("<domain/>", None),
        ("", None),
    ],
)
def test_the_emulator_of_a_definition(text: str, emulator: str | None) -> None:
    assert parse_emulator(text.encode(), "x86_64") == emulator


def test_all_that_is_read(host: Path) -> None:
    """In a child, as the module has it."""
    for name, path in (("a", "/opt/q"), ("b", "/usr/local/sbin/qemu"), ("c", "/opt/q")):
        (host / f"etc/libvirt/qemu/{name}.xml").write_text(DOMAIN.format(MACHINE, path))
    (host / "etc/libvirt/qemu.conf").write_text('user = "+4000000001"')
    found = read_libvirt_files([library(host / "l", OFFERS, SETS)], None)
    emulators = ("/opt/q", "/usr/local/sbin/qemu")
    its = VmUser(None, 4000000001)
    assert found == LibvirtFiles(Abilities(True, True), its, its, emulators, ())
    # A domain that runs may be defined nowhere, and may have ended since.
    (host / "run/libvirt/qemu").mkdir(parents=True)
    record = "<domstatus>\n" + "".join(f"  {line}\n" for line in DOMAIN.format(MACHINE, "/opt/r").splitlines())
    (host / "run/libvirt/qemu/e.xml").write_text(record)
    (host / "run/libvirt/qemu/f.xml").symlink_to("nowhere")
    found = read_libvirt_files([], None)
    assert (found.emulators, found.running, found.msgs) == (emulators, ("/opt/r",), ())
    (host / "etc/libvirt/qemu/d.xml").symlink_to("nowhere")
    assert "definitions of libvirt's domains cannot be read (ENOENT" in read_libvirt_files([], None).msgs[0]


def test_whether_the_daemon_has_read_its_configuration(host: Path) -> None:
    conf = host / "etc/libvirt/qemu.conf"
    assert read_libvirt_files([], 0).outdated is None
    conf.write_text("")
    # A copy may have the time of what it is a copy of.
    os.utime(conf, (0, 0))
    changed = conf.stat().st_ctime
    times = (changed - 60, changed + 0.5, changed + 60, None)
    assert [read_libvirt_files([], started).outdated for started in times] == [True, False, False, None]


def test_a_change_yet_to_come(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock was wrong, and nothing is known of the order."""
    conf = host / "etc/libvirt/qemu.conf"
    conf.write_text("")
    monkeypatch.setattr("time.time", lambda: conf.stat().st_ctime - 5)
    assert _libvirt_files._is_outdated(conf.stat().st_ctime - 60) is False


def test_files_that_nobody_answers_for(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It waits for somebody who writes.
    os.mkfifo(host / "fifo")
    monkeypatch.setattr(_libvirt_files, "_PATIENCE", 0.3)
    found = read_libvirt_files([f"{host}/fifo"], None)
    assert found._replace(msgs=()) == NOTHING_READ
    assert found.msgs[0].startswith("libvirt's files were not read within 0.3 seconds.")


TAKES = b"\0Setting 'fdgroup' when 'iommufd' is disabled is not supported.\0"
# As libvirt 12.8 has it, and as 11.3 has it: there a disk alone may be a descriptor.
DISK = b"""<attribute name="file"/><optional><attribute name="fdgroup"/></optional>"""
SCHEMA = (
    b"""<define name="iommufd"><element name="iommufd"><attribute name="enabled"><ref name="virYesNo"/></attribute>
<optional><attribute name="fdgroup"/></optional></element></define>"""
    + DISK
)
WITHOUT = b"""<element name="iommufd"><attribute name="enabled"/></element>""" + DISK


@pytest.mark.parametrize(
    ("texts", "schema", "takes"),
    [
        ((TAKES,), SCHEMA, True),
        # One of the two suffices: a distribution may have worded the other one differently.
        ((TAKES,), DISK, True),
        ((OFFERS, SETS), SCHEMA, True),
        ((TAKES,), None, True),
        (None, SCHEMA, True),
        ((OFFERS, SETS), DISK, False),
        ((OFFERS, SETS, b"\0fdgroup\0"), WITHOUT, False),
        ((), None, False),
        (None, DISK, False),
        (None, None, None),
    ],
)
def test_whether_libvirt_takes_an_iommufd(
    host: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: tuple[bytes, ...] | None,
    schema: bytes | None,
    takes: bool | None,
) -> None:
    path = host / "domaincommon.rng"
    monkeypatch.setattr(_libvirt_files, "_SCHEMAS", ("/nonexistent", str(path)))
    if schema is not None:
        path.write_bytes(schema)
    libraries = [str(host / "none.so")] if texts is None else [library(host / "libvirt.so", *texts)]
    assert takes_iommufd(libraries) is takes


def test_a_library_that_nobody_answers_for(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_libvirt_files, "_PATIENCE", 0.2)
    monkeypatch.setattr(_libvirt_files, "_SCHEMAS", ())
    os.mkfifo(host / "libvirt.so")
    assert takes_iommufd([str(host / "libvirt.so")]) is None
