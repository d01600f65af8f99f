# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _running
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.module_utils._running import (
    DomainRecord,
    parse_domain_record,
    read_domain_record,
)

# As libvirt 11.3 writes it, and shorter.
REAL = """\
<!--
WARNING: THIS IS AN AUTO-GENERATED FILE.
-->

<domstatus state='paused' reason='user' pid='362'>
  <monitor path='/var/lib/libvirt/qemu/domain-3-a b&apos;&amp;&lt;é/monitor.sock' type='unix'/>
  <qemuCaps>
    <flag name='sdl'/>
  </qemuCaps>
  <domain type='qemu' id='3'>
    <name>a b&apos;&amp;&lt;é</name>
    <metadata>
      <x:y xmlns:x="urn:x"><domain id='9'><name>other</name></domain></x:y>
    </metadata>
    {}
  </domain>
</domstatus>
"""
LABEL = "<seclabel type='dynamic' model='{}' relabel='yes'><label>{}</label></seclabel>"


@pytest.mark.parametrize(
    ("labels", "uid"),
    [
        (LABEL.format("apparmor", "libvirt-1") + LABEL.format("dac", "+64055:+64055"), 64055),
        (LABEL.format("dac", "107:107"), 107),
        (LABEL.format("dac", "qemu:qemu"), None),
        (LABEL.format("dac", "١:1"), None),
        (LABEL.format("dac", "9" * 400), None),
        ("", None),
    ],
)
def test_what_a_record_says(labels: str, uid: int | None) -> None:
    assert parse_domain_record(REAL.format(labels).encode(), 7.5) == DomainRecord(362, 3, "a b'&<é", uid, 7.5)


DOMAIN = "<domstatus pid='{}'><domain id='{}'><name>{}</name></domain></domstatus>"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no XML"),
        ("<domstatus/>", "holds no domain that runs"),
        ("<domain id='1'><name>a</name></domain>", "holds no domain that runs"),
        (DOMAIN.format(1, 1, ""), "holds no domain that runs"),
        (DOMAIN.format("", 1, "a"), "has a pid that is no number but ''"),
        (DOMAIN.format("9" * 400, 1, "a"), "has a pid that is not from 0 to 2147483647"),
        (DOMAIN.format(2**31, 1, "a"), "has a pid that is not from 0 to 2147483647"),
        (DOMAIN.format(1, "١", "a"), "has a id that is no number"),
        ("<domstatus pid='1'><domain><name>a</name></domain></domstatus>", "has a id that is no number"),
        ("<!DOCTYPE a>" + DOMAIN.format(1, 1, "a"), "has a DOCTYPE"),
    ],
)
def test_what_is_no_record(text: str, words: str) -> None:
    with pytest.raises(IommufdError, match=words):
        parse_domain_record(text.encode(), 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Libvirt's folder, whose files count as root's."""
    monkeypatch.setattr(_running, "_FOLDER", str(tmp_path))
    monkeypatch.setattr(_running, "_LIBVIRT_UID", os.getuid())
    return tmp_path


def test_a_record_is_read(folder: Path) -> None:
    (folder / "vm 1'.xml").write_text(DOMAIN.format(42, 1, "vm"))
    os.utime(folder / "vm 1'.xml", (0, 1000))
    assert read_domain_record("vm 1'") == DomainRecord(42, 1, "vm", None, 1000.0)


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc/passwd", "a/b", "/run/vm1", "vm\0"])
def test_a_domain_is_a_name_and_not_a_path(name: str) -> None:
    with pytest.raises(IommufdError, match="a name, not a path"):
        read_domain_record(name)


def test_what_is_not_libvirts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = DOMAIN.format(42, 1, "vm")
    (folder / "theirs.xml").write_text(good)
    (folder / "link.xml").symlink_to("theirs.xml")
    (folder / "folder.xml").mkdir()
    os.mkfifo(folder / "fifo.xml")
    with open(folder / "huge.xml", "wb") as stream:
        stream.truncate(2**40)
    for name, words in {
        "none": "cannot be read .ENOENT",
        "link": "is not a regular file",
        "folder": "is not a regular file",
        "fifo": "is not a regular file",
        "huge": "is too large: it has 16777217 bytes",
        "n" * 1000: "cannot be read .ENAMETOOLONG",
        "\ud800": "cannot be read .it is no path",
    }.items():
        with pytest.raises(IommufdError, match=words) as caught:
            read_domain_record(name)
        assert str(caught.value).isprintable()
    monkeypatch.setattr(_running, "_LIBVIRT_UID", os.getuid() + 1)
    with pytest.raises(
        IommufdError, match=f"theirs.xml is not libvirt's: it belongs to uid {os.getuid()}, not to root"
    ):
        read_domain_record("theirs")


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_mount_in_the_place_of_what_is_libvirts(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A user may mount on what is his, with a server of his that never answers: nothing is asked of that."""
    (folder / "vm.xml").write_text(DOMAIN.format(42, 1, "vm"))
    there = folder / "vm.xml" if place == "file" else folder

    def mount_id(fd: int) -> bytes:
        return b"99" if Path(os.readlink(f"/proc/self/fd/{fd}")) == there else b"1"

    monkeypatch.setattr(_running, "mount_id", mount_id)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: pytest.fail("asked") if mount_id(fd) == b"99" else real(fd))
    with pytest.raises(IommufdError, match="is not libvirt's: something is mounted there"):
        read_domain_record("vm")
