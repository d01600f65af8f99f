# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measures the modules against their budgets, in the lab's guest `fallback`, which must be up: `make bench`.

Emulation makes every absolute time meaningless, and so does whatever else the machine does. So a budget is a ratio of
two medians, and what is compared takes turns. Two have a budget of processor time, and are measured on this machine
itself: the launcher, and the audit's report of many hosts, which has one of memory, too. Exits with 1 if a budget is
missed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from statistics import median
from typing import Any

import ansible

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = Path(ansible.__file__).parent
GUEST = "fallback"
LAB = [sys.executable, str(ROOT / "tests" / "lab")]
TREE = "/opt/bench"
BENCH = f"{TREE}/ansible_collections/virt/iommufd/tests/bench"

# What a module in the guest imports, of this collection and of this Ansible.
PACKED = (
    (ROOT, "plugins/module_utils", "ansible_collections/virt/iommufd/plugins/module_utils"),
    (ROOT, "plugins/modules", "ansible_collections/virt/iommufd/plugins/modules"),
    (ROOT, "tests/bench", "ansible_collections/virt/iommufd/tests/bench"),
    *((ANSIBLE, name, f"ansible/{name}") for name in ("__init__.py", "_vendor", "module_utils", "release.py")),
)

# Where Ansible itself runs in the guest, for the local connection, and what it imports. The guest has another Python
# than this machine, so what these have in C is not used.
CONTROLLER = "/opt/controller"
LIBRARIES = ("ansible-core", "jinja2", "markupsafe", "packaging", "pyyaml", "resolvelib")

# How many processes, and how many of them hold an iommufd: hosts that are full of VMs, and one of nothing else, which
# does not exist and is told for what it shows.
FEW, MANY, ALL = "200:10", "2000:100", "2000:2000"
HOSTS = 100
# A host on which nothing is to be seen would be no measure; this many VMs it has.
VMS = 10
# A fleet, and the VMs of each of its hosts.
FLEET, ITS_VMS, ITS_DEFINITIONS = 1000, 8, 20
MIB = 2**20

# A query against ping, by the connection.
BUDGETS = {"SSH": 1.15, "local": 1.15}

Tasks = list[dict[str, Any]]
PING: dict[str, Any] = {"ansible.builtin.ping": {}}


@dataclass(frozen=True)
class Finding:
    """What was measured. With `at_least`, the budget is the least that the ratio must be, else the most it may be."""

    what: str
    against: str
    ratio: float
    budget: float
    unit: str = "x"
    at_least: bool = False
    detail: str = ""

    @property
    def met(self) -> bool:
        return self.ratio >= self.budget if self.at_least else self.ratio <= self.budget


def guest(command: str, stdin: bytes = b"") -> str:
    """What a command prints in the guest; its errors go where ours go."""
    done = subprocess.run([*LAB, "ssh", "--guest", GUEST, command], input=stdin, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def prepare() -> None:
    """Brings the collection and these programs into the guest, compiled, as Python would leave them there."""
    send(TREE, PACKED)
    guest(f"python3 -m compileall -q {TREE} && modprobe iommufd")


def prepare_controller() -> None:
    """Brings Ansible and the collection into the guest. The first round compiles it."""
    plugins = "ansible_collections/virt/iommufd/plugins"
    send(CONTROLLER, [(ROOT, "plugins", plugins), *(row for name in LIBRARIES for row in installed(name))])


def installed(name: str) -> Iterator[tuple[Path, str, str]]:
    """What a library consists of, its metadata too, which Ansible asks for; without its commands."""
    library = distribution(name)
    for top in sorted({each.parts[0] for each in library.files or ()} - {".."}):
        yield Path(str(library.locate_file(""))), top, top


def send(target: str, what: Iterable[tuple[Path, str, str]]) -> None:
    """Puts files and folders of this machine into a new folder of the guest: where they are, their name, and there."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for folder, name, there in what:
            archive.add(folder / name, there, filter=lambda each: None if each.name.endswith("__pycache__") else each)
    guest(f"rm -rf {target} && mkdir {target} && tar -xmzf - --no-same-owner -C {target}", packed.getvalue())


@contextmanager
def vms() -> Iterator[list[int]]:
    """A handful of processes in the guest that hold what VMMs do, while the context lasts: their ids."""
    crowd = f"{BENCH}/crowd.py {VMS} {VMS}"
    started = f"systemd-run --quiet --collect --unit=bench sh -c 'sleep infinity | python3 -I -S {crowd}"
    guest(f"systemctl stop bench 2>/dev/null; rm -f /run/bench; {started} > /run/bench'")
    try:
        # One that cannot become a VMM ends, and what it says stands in the unit's journal.
        there = "timeout 120 sh -c 'until test -s /run/bench; do sleep 0.2; done' || journalctl --no-pager -u bench >&2"
        yield [int(pid) for pid in guest(f"{there}; cat /run/bench").split()]
    finally:
        guest("systemctl stop bench")


# Ansible's own callback takes the times.
SETTINGS = {
    "ANSIBLE_PIPELINING": "true",
    "ANSIBLE_CALLBACKS_ENABLED": "ansible.builtin.junit",
    "ANSIBLE_DISPLAY_OK_HOSTS": "false",
    "JUNIT_HIDE_TASK_ARGUMENTS": "true",
}


def play(hosts: int, tasks: Tasks) -> dict[str, float]:
    """Runs tasks on so many hosts, all of which are the guest: the seconds from each task's start to its last result.

    All share one connection, as the login is the same.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [f"host{number:03}" for number in range(hosts)]
        # JSON is YAML.
        found = {"bench": {"hosts": dict.fromkeys(names), "vars": guest_variables()}}
        (folder / "inventory.yml").write_text(json.dumps(found), encoding="utf-8")
        (folder / "play.yml").write_text(book("bench", tasks), encoding="utf-8")
        environment = {**os.environ, **SETTINGS, "JUNIT_OUTPUT_DIR": str(folder / "times")}
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "inventory.yml", "play.yml"]
        subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=True)
        (report,) = (folder / "times").glob("*.xml")
        return seconds_of(report.read_text("utf-8"))


def play_inside(tasks: Tasks) -> dict[str, float]:
    """The same by an Ansible in the guest, with a local connection."""
    guest(f"cat > {CONTROLLER}/play.yml", book("localhost", tasks).encode())
    settings = {
        **SETTINGS,
        "ANSIBLE_COLLECTIONS_PATH": CONTROLLER,
        "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3",
        "JUNIT_OUTPUT_DIR": "times",
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": CONTROLLER,
    }
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    command = (
        "python3 -m ansible.cli.playbook -i localhost, -c local -e ansible_python_interpreter=/usr/bin/python3 play.yml"
    )
    return seconds_of(guest(f"cd {CONTROLLER} && rm -rf times && {words} {command} >&2 && cat times/*.xml"))


def book(hosts: str, tasks: Tasks) -> str:
    """A playbook."""
    return json.dumps([{"name": "bench", "hosts": hosts, "gather_facts": False, "tasks": tasks}])


def seconds_of(report: str) -> dict[str, float]:
    """How long each task has taken, by the callback's report: until the last host had its result."""
    seconds: dict[str, float] = {}
    for case in ET.fromstring(report).iter("testcase"):
        task = case.attrib["name"].partition(" bench: ")[2]
        seconds[task] = max(seconds.get(task, 0.0), float(case.attrib["time"]))
    return seconds


def guest_variables() -> dict[str, Any]:
    """The variables by which Ansible reaches the guest."""
    printed = subprocess.run([*LAB, "inventory", GUEST], stdout=subprocess.PIPE, text=True, check=True).stdout
    # What follows the host's name is one variable a line, with a value in JSON.
    lines = printed.partition(f"{GUEST}:\n")[2].splitlines()
    pairs = (line.strip().split(": ", 1) for line in lines)
    return {name: json.loads(value) for name, value in pairs}


def compare(
    run: Callable[[Tasks], dict[str, float]], rounds: int, task: dict[str, Any], check: str
) -> tuple[float, float]:
    """The median seconds of a task and of ping, which take turns. `check`: what must be true of the task's answer.

    The first round is left out: it packs the modules, and connects.
    """
    tasks: Tasks = []
    for number in range(rounds + 1):
        tasks.append({"name": f"ping {number}", **PING})
        tasks.append({"name": f"task {number}", "register": "answer", **task})
        tasks.append({"name": f"check {number}", "ansible.builtin.assert": {"that": check, "quiet": True}})
    seconds = run(tasks)
    taken, of_ping = (
        median(seconds[f"{name} {number}"] for number in range(1, rounds + 1)) for name in ("task", "ping")
    )
    return taken, of_ping


def bench_task(rounds: int) -> Iterator[Finding]:
    """A query of one iommufd, as a whole task."""
    prepare_controller()
    with vms() as pids:
        query = {"virt.iommufd.iommufd_option": {"pid": pids[0]}}
        for connection, run in (("SSH", partial(play, 1)), ("local", play_inside)):
            taken, of_ping = compare(run, 2 * rounds, query, "answer.value == 'user'")
            what = f"iommufd_option, query, {connection}"
            yield Finding(what, "ping", taken / of_ping, BUDGETS[connection], detail=times(taken, of_ping))


def bench_hosts(rounds: int) -> Iterator[Finding]:
    """A look at many hosts. Ansible works on five of them at a time, as it does by default."""
    with vms():
        look = {"virt.iommufd.iommufd_info": {"gather_subset": ["processes", "users"]}}
        taken, of_ping = compare(partial(play, HOSTS), rounds, look, f"answer.processes | length == {VMS}")
    yield Finding(f"iommufd_info, {HOSTS} hosts", "ping", taken / of_ping, 1.3, detail=times(taken, of_ping))


def bench_processes(rounds: int) -> Iterator[Finding]:
    """A host with many VMs."""
    # Few before and after many, since the machine may be busier by then.
    printed = guest(f"PYTHONPATH={TREE} python3 {BENCH}/inside.py {rounds} {FEW} {MANY} {FEW} {ALL}")
    measured: dict[str, list[dict[str, float]]] = json.loads(printed)

    def middle(crowd: str, name: str) -> float:
        return median(row[name] for row in measured[crowd])

    few, many = middle(FEW, "gather"), middle(MANY, "gather")
    # Whichever way of calling it is the faster one.
    lsof, name = min((middle(MANY, each), each) for each in measured[MANY][0] if each.startswith("lsof"))
    what = "iommufd_info, 2,000 processes, 100 of them VMMs"
    yield Finding(what, name, lsof / many, 5, "x faster", at_least=True, detail=times(many, lsof))
    yield Finding("iommufd_info, from 200 processes to 2,000", "linear", many / few / 10, 1.2, detail=times(many, few))
    memory = max(row["memory"] for crowd in (MANY, ALL) for row in measured[crowd]) / MIB
    yield Finding("iommufd_info, 2,000 processes", "peak memory", memory, 64, "MiB")
    taken, of_lsof = middle(ALL, "gather"), middle(ALL, name)
    # No host is such, so nothing is asked of it but to be faster.
    what = "iommufd_info, 2,000 VMMs"
    yield Finding(what, name, of_lsof / taken, 1, "x faster", at_least=True, detail=times(taken, of_lsof))


def times(taken: float, other: float) -> str:
    return f"{taken:.2f} s, {other:.2f} s"


# The launcher as it is on a host, and all that it does on the way to its command, but for the ioctl: /dev/null refuses
# that one, which is warned of.
LAUNCH = """
import os, sys
sys.path.insert(0, sys.argv[1])
from iommufd_exec import _device, _iommufd_exec
_device.DEVICE = "/dev/null"
_device.misc_rdev = lambda: os.stat("/dev/null").st_rdev
sys.argv[1:] = ["--", "/bin/true", "{iommufd}"]
sys.exit(_iommufd_exec.main())
"""


def bench_launcher(rounds: int) -> Iterator[Finding]:
    """What iommufd-exec adds to the start of a VMM."""
    # The tree that the Makefile puts beside the tools.
    sys.path.insert(0, str(Path(sys.prefix) / "tree"))
    from ansible_collections.virt.iommufd.plugins.module_utils._programs import EXEC, INTERPRETER, zipapp

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "iommufd-exec")
        program.write_bytes(zipapp(EXEC))
        words = [*INTERPRETER.split(), "-c", LAUNCH, str(program)]
        spent, passed = [], []
        for _each in range(4 * rounds + 1):
            began = time.monotonic()
            process = subprocess.Popen(words, stderr=subprocess.PIPE)
            with process:
                assert process.stderr
                said = process.stderr.read().decode()
                _pid, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            passed.append(1000 * (time.monotonic() - began))
            spent.append(1000 * (usage.ru_utime + usage.ru_stime))
            if process.returncode or "/bin/true is started all the same" not in said:
                raise RuntimeError(f"the launcher did not get to its command: {said}")
    detail = f"{median(passed[1:]):.0f} ms passed meanwhile"
    yield Finding("iommufd-exec, start-up", "processor time", median(spent[1:]), 150, "ms", detail=detail)


def bench_audit(rounds: int) -> Iterator[Finding]:
    """What it costs the controller to make the audit's report of a fleet, twice: to print it, and to write it.

    Only the module is a stand-in, so that the results come in the way that they always do.
    """
    names = ("audit.json", "audit.txt")
    for definitions, seconds, room in ((0, 10, 500), (ITS_DEFINITIONS, 50, 800)):
        measured = [audit_fleet(name, definitions) for _each in range(max(1, rounds // 4)) for name in names]
        spent, passed, memory = (max(row[column] for row in measured) for column in range(3))
        forecast = f", and a forecast of {definitions}" if definitions else ""
        what = f"the audit's report of {FLEET:,} hosts with {ITS_VMS} VMs each{forecast}"
        yield Finding(what, "processor time", spent, seconds, "s", detail=f"{passed:.1f} s passed meanwhile")
        yield Finding(what, "peak memory", memory / MIB, room, "MiB")


def audit_fleet(name: str, definitions: int) -> tuple[float, float, float]:
    """Runs the audit of a fleet with a file of that name, and with a forecast where it has definitions.

    Returns the processor time and the time that passed from the last answer on, in seconds, and the most memory that
    one of its processes had, in bytes.
    """
    sys.path.insert(0, str(Path(sys.prefix) / "tree"))
    from ansible_collections.virt.iommufd.tests.bench.fleet import fleet

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        collection = folder / "ansible_collections" / "virt" / "iommufd"
        for part in ("meta", "playbooks", "plugins"):
            shutil.copytree(ROOT / part, collection / part, ignore=shutil.ignore_patterns("__pycache__"))
        (collection / "plugins" / "action").mkdir()
        shutil.copy(ROOT / "tests" / "bench" / "answer.py", collection / "plugins" / "action" / "iommufd_info.py")
        results, log, report = folder / "results", folder / "log", folder / name
        results.mkdir()
        log.touch()
        hosts = fleet(FLEET, ITS_VMS, definitions)
        for host, result in hosts.items():
            (results / host).write_text(json.dumps(result), encoding="utf-8")
        variables = {"results": str(results), "ansible_connection": "local"}
        inventory = {"all": {"hosts": dict.fromkeys(hosts), "vars": variables}}
        (folder / "inventory.yml").write_text(json.dumps(inventory), encoding="utf-8")
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(folder),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml",
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_LOG_PATH": str(log),
        }
        ansible = str(Path(sys.executable).with_name("ansible-playbook"))
        options = [
            "-e",
            f"audit_dest={report}",
            "-e",
            "audit_become=false",
            "-e",
            f"audit_forecast={bool(definitions)}",
        ]
        words = [ansible, "-i", "inventory.yml", "virt.iommufd.audit", *options]
        with subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as process:
            until_logged(log, "TASK [Report how the VMs are accounted]", process.pid)
            began, before = time.monotonic(), spent_by(process.pid)
            _pid, status, usage = os.wait4(process.pid, 0)
            passed, spent = time.monotonic() - began, usage.ru_utime + usage.ru_stime - before
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not report.stat().st_size:
            raise RuntimeError(f"the audit failed: {log.read_text('utf-8')[-2000:]}")
    return spent, passed, usage.ru_maxrss * 1024


def until_logged(log: Path, words: str, pid: int) -> None:
    """Waits until Ansible logs these words, or ends."""
    seen = ""
    with log.open(encoding="utf-8") as stream:
        while words not in seen and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.02)
            seen = seen[-len(words) :] + stream.read()


def spent_by(pid: int) -> float:
    """The processor time of a process and of those of its children that have ended, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


BENCHES: dict[str, Callable[[int], Iterator[Finding]]] = {
    "task": bench_task,
    "processes": bench_processes,
    "hosts": bench_hosts,
    "launcher": bench_launcher,
    "audit": bench_audit,
}
# What needs no guest.
HERE = {"launcher", "audit"}


def table(findings: list[Finding]) -> str:
    rows = [("what", "measured against", "ratio", "budget", "met", "medians here")]
    for each in findings:
        bound = "at least" if each.at_least else "at most"
        rows.append(
            (
                each.what,
                each.against,
                f"{each.ratio:.2f} {each.unit}",
                f"{bound} {each.budget:g} {each.unit}",
                "yes" if each.met else "NO",
                each.detail,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=BENCHES, help="which to run; may be given again")
    parser.add_argument("--rounds", type=int, default=5, help="how often each takes its turn (%(default)s)")
    options = parser.parse_args()
    findings: list[Finding] = []
    chosen = options.only or list(BENCHES)
    if not HERE.issuperset(chosen):
        prepare()
    for name in chosen:
        print(f"bench: {name}", file=sys.stderr)
        findings += BENCHES[name](options.rounds)
    print(table(findings))
    return 0 if all(each.met for each in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
