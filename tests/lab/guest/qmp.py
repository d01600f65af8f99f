# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tells a QEMU something by its monitor's socket: `qmp SOCKET < COMMANDS`, a JSON list of commands of QMP.

Printed is a JSON list with an answer to each, as QEMU gives it: {"return": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from typing import Any


def ask(connection: socket.socket, lines: Iterator[bytes], command: dict[str, Any]) -> dict[str, Any]:
    """The answer to a command; what QEMU tells of itself in between is passed over."""
    connection.sendall(json.dumps(command).encode() + b"\n")
    while True:
        told: dict[str, Any] = json.loads(next(lines))
        if "return" in told or "error" in told:
            return told


def main() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(sys.argv[1])
        lines = connection.makefile("rb")
        next(lines)  # QEMU's greeting
        ask(connection, lines, {"execute": "qmp_capabilities"})
        print(json.dumps([ask(connection, lines, command) for command in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
