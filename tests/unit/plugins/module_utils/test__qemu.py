# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._qemu import guest_memory, guest_name, is_session_domain


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([b"qemu", b"-name", b"guest=vm1,debug-threads=on"], b"vm1"),
        ([b"qemu", b"--name", b"debug-threads=on,guest=vm1"], b"vm1"),
        ([b"qemu", b"-name", b"guest=a,,b,debug-threads=on"], b"a,b"),
        ([b"qemu", b"-name", b"a,,b,debug-threads=on"], b"a,b"),
        ([b"qemu", b"-name", b"vm1"], b"vm1"),
        ([b"qemu", b"-name", b"debug-threads=on,vm1"], None),
        ([b"qemu", b"-name", b"vm1", b"-name", b"guest=vm2"], b"vm2"),
        ([b"qemu", b"-S", b"-name"], None),
        ([], None),
    ],
)
def test_the_guests_name(arguments: list[bytes], name: bytes | None) -> None:
    assert guest_name(arguments) == name


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        (b"64", 64 * 2**20),
        (b"size=65536k", 64 * 2**20),
        (b"size=1G,slots=2,maxmem=4G", 2**30),
        (b"maxmem=4G,size=1g", 2**30),
        (b"2T", 2**41),
        (b"4096b", 4096),
        (b"http.server", None),
        (b"slots=2", None),
        (b"64Q", None),
        (b"8388607T", 8388607 * 2**40),
        # More than any size has.
        (b"8388608T", None),
        (b"9" * 18 + b"T", None),
        (b"9" * 400, None),
    ],
)
def test_the_guests_memory(text: bytes, memory: int | None) -> None:
    assert guest_memory([b"qemu", b"-m", text]) == memory


def test_no_memory_is_given() -> None:
    assert guest_memory([b"qemu", b"-m"]) is None


def test_a_domain_of_a_users_session_is_known_by_its_folder() -> None:
    key = b'{"qom-type":"secret","file":"%s/domain-1-vm1/master-key.aes"}'
    assert is_session_domain([b"qemu", b"-object", key % b"/home/alice/.config/libvirt/qemu/lib"])
    assert not is_session_domain([b"qemu", b"-object", key % b"/var/lib/libvirt/qemu"])
