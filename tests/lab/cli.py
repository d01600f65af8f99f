# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lab's command line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import machine
import store
import tools
from build_kernel import make_kernel
from guests import DEFAULT_GUEST, GUESTS, guest_named
from machine import Machine
from progress import LabError, environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    # Being told to stop is an interrupt like any other: what was begun is undone.
    signal.signal(signal.SIGTERM, _interrupt)
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output has seen enough. Nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A full disk, a cache that cannot be written: the system's own words say it.
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlab: interrupted; nothing half-done is left", file=sys.stderr)
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    names = "; ".join(f"{guest.name}: {guest.purpose}" for guest in GUESTS.values())
    parser = argparse.ArgumentParser(
        prog="lab", description="Disposable virtualization hosts with a real iommufd.", epilog=f"Guests: {names}."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    up = commands.add_parser("up", help="boot a guest, making what is missing, and wait until SSH answers")
    up.add_argument("guest", nargs="?", default=DEFAULT_GUEST)
    up.set_defaults(run=_up)

    down = commands.add_parser("down", help="end a guest and throw its disk away")
    down.add_argument("guest", nargs="?", default=DEFAULT_GUEST)
    down.add_argument("--all", action="store_true", help="every guest of this run, and of the runs within it")
    down.set_defaults(run=_down)

    reboot = commands.add_parser("reboot", help="have a guest shut down and boot from its disk, and wait for SSH")
    reboot.add_argument("guest", nargs="?", default=DEFAULT_GUEST)
    reboot.set_defaults(run=_reboot)

    status = commands.add_parser("status", help="what the guests do")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=_status)

    ssh = commands.add_parser("ssh", help="log in to a guest, or run a command there")
    ssh.add_argument("--guest", default=DEFAULT_GUEST)
    ssh.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        help="one word: a command line for the guest's shell; several: a program and its arguments, kept as they are",
    )
    ssh.set_defaults(run=_ssh)

    build = commands.add_parser("build", help="make what guests are booted from, without booting them")
    build.add_argument("guests", nargs="*", metavar="GUEST", default=[DEFAULT_GUEST])
    build.set_defaults(run=_build)

    inventory = commands.add_parser("inventory", help="print an Ansible inventory of running guests")
    inventory.add_argument("guests", nargs="+", metavar="GUEST")
    inventory.set_defaults(run=_inventory)

    headers = commands.add_parser(
        "headers", help="print the include folder of a guest's kernel (linux/iommufd.h, linux/vfio.h)"
    )
    headers.add_argument("guest", nargs="?", default=DEFAULT_GUEST)
    headers.set_defaults(run=_headers)

    tool = commands.add_parser("tools", help="list the programs that guests need; exit code 1 if one is missing")
    tool.add_argument("guests", nargs="*", metavar="GUEST", default=[DEFAULT_GUEST])
    tool.add_argument(
        "--install", action="store_true", help="install what is missing (root, or sudo without a password)"
    )
    tool.set_defaults(run=_tools)

    clean = commands.add_parser("clean", help="remove the cache")
    clean.set_defaults(run=_clean)
    return parser


def _up(options: argparse.Namespace) -> int:
    tools.require([guest_named(options.guest)])
    guest = Machine(guest_named(options.guest))
    if not guest.up():
        print(f"guest {guest.name} is up already")
    variables = " ".join(f"{name}={_ini(value)}" for name, value in guest.inventory().items())
    print(f"{guest.name} {variables}")
    lab = os.path.relpath(Path(__file__).parent)
    print(f"log in: python3 {lab} ssh --guest {guest.name}, or: {' '.join(guest.ssh_command())}")
    return 0


def _reboot(options: argparse.Namespace) -> int:
    Machine(guest_named(options.guest)).reboot()
    return 0


def _down(options: argparse.Namespace) -> int:
    for guest in machine.machines_within() if options.all else [Machine(guest_named(options.guest))]:
        if guest.down():
            print(f"guest {guest.name} is down")
        elif not options.all:
            print(f"guest {guest.name} was down already")
    return 0


def _status(options: argparse.Namespace) -> int:
    rows = [_row(guest) for guest in machine.machines()]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        detail = ""
        if row["state"] != "down":
            detail = (
                f"pid {row['pid']}, port {row['port']}, kernel {row['kernel_release']}, console {row['console_log']}"
            )
        print(f"{row['name']:10} {row['state']:8} {detail}".rstrip())
    return 0


def _row(guest: Machine) -> dict[str, object]:
    state = guest.state
    return {
        "name": guest.name,
        "state": guest.condition,
        "pid": state and state.pid,
        "port": state and state.port,
        "ssh_config": state and str(guest.ssh_config),
        "console_log": state and str(guest.console),
        "kernel_release": state and state.kernel_release,
    }


def _ssh(options: argparse.Namespace) -> int:
    guest = Machine(guest_named(options.guest))
    guest.running()
    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    code = subprocess.run(guest.ssh_command(words), env=environment(), check=False).returncode
    if code == 255:
        # ssh's own failure: if the guest has died meanwhile, say so.
        guest.running()
    return code


def _build(options: argparse.Namespace) -> int:
    guests = [guest_named(name) for name in options.guests]
    tools.require(guests)
    for guest in guests:
        Machine(guest).build()
    return 0


def _inventory(options: argparse.Namespace) -> int:
    hosts = {name: Machine(guest_named(name)).inventory() for name in options.guests}
    print("lab:\n  hosts:")
    for name, variables in hosts.items():
        print(f"    {name}:")
        for variable, value in variables.items():
            # JSON's strings and numbers are YAML's.
            print(f"      {variable}: {json.dumps(value)}")
    return 0


def _headers(options: argparse.Namespace) -> int:
    # A kernel alone is built, and nothing emulated.
    tools.require([])
    print(make_kernel(guest_named(options.guest).kernel) / "include")
    return 0


def _tools(options: argparse.Namespace) -> int:
    guests = [guest_named(name) for name in options.guests]
    if options.install:
        tools.install(guests)
    lacking = tools.missing(guests)
    for tool in tools.needed(guests):
        print(f"{'missing' if tool in lacking else 'ok':8} {tool.package:24} {tool.probe:50} {tool.purpose}")
    if lacking:
        print(f"Install with: {tools.install_command(lacking)}")
    unregistered = tools.unregistered(guest.architecture for guest in guests)
    for architecture in unregistered:
        print(f"This kernel does not run programs of {architecture.name}: {tools.register_command(architecture)}")
    return 1 if lacking or unregistered else 0


def _clean(_options: argparse.Namespace) -> int:
    folder = store.root()
    if not folder.exists():
        print(f"{folder} is not there")
        return 0
    running = machine.running_anywhere()
    if running:
        raise LabError(f"guests are running, take them down first: {', '.join(running)}")
    if store.busy():
        raise LabError("another run is making something: wait for it, or end it")
    size = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    shutil.rmtree(folder)
    print(f"removed {folder}, {size / 2**30:.1f} GiB")
    return 0


def _ini(value: str | int) -> str:
    """A value as an INI inventory line takes it."""
    text = str(value)
    return f'"{text}"' if " " in text else text
