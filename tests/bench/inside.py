# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measures the module iommufd_info against lsof, with many processes: `python3 inside.py ROUNDS COUNT:VMMS...`.

It runs in the guest. Printed is JSON: for each COUNT of processes, of which VMMS hold an iommufd, the seconds and bytes
of each round. Module and lsof take turns, and both have to tell the very processes that hold one: else this fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TREE = HERE.parents[4]
DEVICE = "/dev/iommu"
# As libvirt writes them, though shorter.
ARGUMENTS = (
    "-name guest=vm,debug-threads=on -S -object secret,id=masterKey0,format=raw,file=/run/secret -machine q35,accel=kvm"
    " -cpu host -m size=4194304k -smp 4,sockets=4,cores=1,threads=1 -nodefaults -object iommufd,id=iommufd0"
    " -device vfio-pci,host=0000:00:03.0,iommufd=iommufd0"
)
# Its defaults, and without what costs it time: warnings, and the names of hosts and ports.
LSOF = {"lsof": ["lsof", DEVICE], "lsof -w -n -P": ["lsof", "-w", "-n", "-P", DEVICE]}


@contextlib.contextmanager
def crowd(count: int, vmms: int) -> Iterator[set[int]]:
    """So many processes, while the context lasts: the ids of those that hold an iommufd."""
    command = [sys.executable, "-I", "-S", str(HERE / "crowd.py"), str(count), str(vmms), *ARGUMENTS.split()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        pids = {int(word) for word in process.stdout.readline().split()}
        assert len(pids) == vmms, f"{len(pids)} of {vmms} VMMs are there"
        try:
            yield pids
        finally:
            process.stdin.close()
            # It says nothing more, but ends.
            process.stdout.read()


def run(command: list[str]) -> tuple[str, str, float, int]:
    """What a program prints, its errors, how many seconds it takes, and its peak memory in bytes."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        pid = os.posix_spawnp(
            command[0],
            command,
            {**os.environ, "PYTHONPATH": str(TREE), "LC_ALL": "C.UTF-8"},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, errors.fileno(), 2),
            ],
        )
        _pid, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        errors.seek(0)
        said, complaints = output.read(), errors.read()
    assert not status, f"{command} failed: {complaints or said}"
    return said, complaints, seconds, usage.ru_maxrss * 1024


def ask_module(pids: set[int]) -> dict[str, float]:
    said, complaints, seconds, memory = run([sys.executable, str(HERE / "timed_info.py")])
    answer: dict[str, Any] = json.loads(said)
    told = {row["pid"] for row in answer["processes"]}
    assert told == pids, f"the module tells {len(told)} processes, and {len(pids)} were made"
    wrong = [row for row in answer["processes"] if not (row["iommufds"] or [{}])[0].get("ioases")]
    assert not wrong, f"the module has not found the IOAS of {wrong[0]}"
    return {"gather": float(complaints), "program": seconds, "memory": memory}


def ask_lsof(name: str, pids: set[int]) -> dict[str, float]:
    said, _complaints, seconds, memory = run(LSOF[name])
    told = {int(line.split()[1]) for line in said.splitlines()[1:]}
    assert told == pids, f"lsof tells {len(told)} processes, and {len(pids)} were made"
    return {name: seconds, f"memory of {name}": memory}


def main() -> None:
    rounds = int(sys.argv[1])
    measured: dict[str, list[dict[str, float]]] = {}
    # One that is named again is measured again.
    for each in sys.argv[2:]:
        rows = measured.setdefault(each, [])
        count, vmms = map(int, each.split(":"))
        with crowd(count, vmms) as pids:
            # What is looked at for the first time has to be made by the kernel; that is nobody's merit.
            ask_module(pids)
            for _round in range(rounds):
                row = ask_module(pids)
                for name in LSOF:
                    row.update(ask_lsof(name, pids))
                rows.append(row)
                print(each, json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
