# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The Python binding of libvirt for tests that run without one, as far as the collection uses it.

The Molecule scenario `domain` runs the same code with the real one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable

NO_DOMAIN = 42
RUNNING, PAUSED, SHUT_OFF = 1, 3, 5


class LibvirtError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    def get_error_code(self) -> int:
        return self.code

    def get_error_message(self) -> str:
        return str(self)


@dataclass
class FakeDomain:
    """A domain. `number` is its state, as libvirt counts; `associated` has descriptors by the names of groups."""

    xml: str
    number: int = SHUT_OFF
    associated: dict[str, list[int]] = field(default_factory=dict)
    libvirt: Any = None

    def XMLDesc(self, flags: int) -> str:
        assert flags == FakeLibvirt.VIR_DOMAIN_XML_INACTIVE
        return self.xml

    def UUIDString(self) -> str:
        return "8e3ae1bb-0f0e-4a0f-8f55-1a8f0b2a1c51"

    def isActive(self) -> int:
        return int(self.number != SHUT_OFF)

    def state(self) -> list[int]:
        return [self.number, 0]

    def FDAssociate(self, name: str, files: list[int], flags: int) -> int:
        self.libvirt.fail_if_asked("FDAssociate")
        assert flags == 0
        self.associated[name] = files
        return 0

    def createWithFlags(self, flags: int) -> int:
        self.libvirt.fail_if_asked("createWithFlags")
        if self.number != SHUT_OFF:
            raise LibvirtError(55, "Requested operation is not valid: domain is already running")
        self.number = PAUSED if flags & FakeLibvirt.VIR_DOMAIN_START_PAUSED else RUNNING
        return 0


@dataclass
class FakeLibvirt:
    """The module, and the connection. `failing` has errors to be raised by the function of that name."""

    VIR_DOMAIN_XML_INACTIVE = 2
    VIR_DOMAIN_START_PAUSED = 1
    libvirtError = LibvirtError

    domains: dict[str, FakeDomain]
    version: int = 12_008_000
    failing: dict[str, LibvirtError] = field(default_factory=dict)
    before_failure: Callable[[], object] | None = None
    handler: Callable[[Any, Any], None] | None = None
    opened: list[str] = field(default_factory=list)
    closed: int = 0

    def fail_if_asked(self, name: str) -> None:
        error = self.failing.get(name)
        if error:
            if self.before_failure:
                self.before_failure()
            raise error

    def registerErrorHandler(self, handler: Callable[[Any, Any], None], context: object) -> None:
        assert context is None
        self.handler = handler

    def open(self, uri: str) -> FakeLibvirt:
        self.fail_if_asked("open")
        self.opened.append(uri)
        return self

    def close(self) -> int:
        self.closed += 1
        return 0

    def getLibVersion(self) -> int:
        return self.version

    def lookupByName(self, name: str) -> FakeDomain:
        self.fail_if_asked("lookupByName")
        if name not in self.domains:
            raise LibvirtError(NO_DOMAIN, f"Domain not found: no domain with matching name '{name}'")
        self.domains[name].libvirt = self
        return self.domains[name]
