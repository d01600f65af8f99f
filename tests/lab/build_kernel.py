# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Kernels, built from Debian's source packages."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import store
from guests import Kernel, Suite
from progress import LabError, Progress, run

_HERE = Path(__file__).parent
# To be raised with every change below that makes something else from the same inputs.
_RECIPE = 1
# The headers that tests hold the collection's own tables against.
_HEADERS = ("iommufd.h", "vfio.h")
# Lines that make prints for such a kernel: what its progress is measured against.
_MAKE_LINES = 2140
# Room in the modules' disk for the file system's own records, in KiB.
_MODULES_SLACK = 2048


def archive_options(suite: Suite) -> list[str]:
    """What mmdebstrap needs to be told about a suite."""
    return ['--aptopt=Acquire::Check-Valid-Until "false"'] if suite.may_be_expired else []


def source_artifact(kernel: Kernel) -> store.Artifact:
    """The source package's tarball, source.tar.xz. No option takes part in its key, so that none downloads it again."""
    return store.Artifact("source", kernel.package, {"suite": kernel.suite.name, "package": kernel.package})


def headers_artifact(kernel: Kernel) -> store.Artifact:
    """The kernel's own headers (include/linux/iommufd.h and vfio.h), there without building a kernel."""
    return store.Artifact("headers", kernel.name, {"source": source_artifact(kernel).key, "headers": _HEADERS})


def kernel_artifact(kernel: Kernel) -> store.Artifact:
    """The kernel: bzImage, modules.img (an ext4 labelled `modules`), config."""
    inputs = {
        "source": source_artifact(kernel).key,
        "options": _fragments(kernel),
        "recipe": _RECIPE,
    }
    return store.Artifact("kernel", kernel.name, inputs)


def make_kernel(kernel: Kernel) -> Path:
    """The folder of the built kernel."""
    return store.make(kernel_artifact(kernel), partial(_build, kernel))


def make_headers(kernel: Kernel) -> Path:
    """The include folder that holds the kernel's linux/iommufd.h and linux/vfio.h."""
    return store.make(headers_artifact(kernel), partial(_copy_headers, kernel)) / "include"


def missing_options(asked: str, built: str) -> list[str]:
    """The lines of the fragment `asked` that the configuration `built` does not follow, in order.

    Kconfig drops in silence what depends on something that is off, so it has to be looked for.
    """
    have = set(built.splitlines())
    on = {line.split("=")[0] for line in have if line.startswith("CONFIG_")}
    missing = []
    for line in asked.splitlines():
        off = re.fullmatch(r"# (CONFIG_\w+) is not set", line)
        if (off and off[1] in on) or (line.startswith("CONFIG_") and line not in have):
            missing.append(line)
    return missing


def _fragments(kernel: Kernel) -> str:
    return "".join((_HERE / "kernel" / f"{name}.config").read_text(encoding="utf-8") for name in kernel.fragments)


def _make_source(kernel: Kernel) -> Path:
    return store.make(source_artifact(kernel), partial(_download, kernel))


def _download(kernel: Kernel, work: Path) -> Mapping[str, Any]:
    progress = Progress(f"source of kernel {kernel.name}: downloading {kernel.package}, suite {kernel.suite.name}")
    archive = work / "packages.tar"
    command = ["mmdebstrap", "--variant=extract", f"--include={kernel.package}", *archive_options(kernel.suite)]
    run([*command, kernel.suite.name, str(archive)], work / "build.log", progress)
    version = "unknown"
    found = False
    with tarfile.open(archive) as packages:
        for member in packages:
            if re.fullmatch(r"\./usr/src/linux-source-[\d.]+\.tar\.xz", member.name):
                with (work / "source.tar.xz").open("wb") as target:
                    shutil.copyfileobj(_content(packages, member), target)
                found = True
            elif member.isfile() and re.fullmatch(
                r"\./usr/share/doc/linux-source-[^/]+/changelog\.Debian\.gz", member.name
            ):
                # "linux (6.12.1-1) trixie; ...": the only place of the version in an unpacked package
                with gzip.open(_content(packages, member)) as changelog:
                    entry = re.match(rb"\S+ \(([^)]+)\)", changelog.readline())
                version = entry[1].decode() if entry else version
    if not found:
        raise LabError(f"package {kernel.package} of suite {kernel.suite.name} holds no kernel source")
    archive.unlink()
    progress.done(version)
    return {"package_version": version}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    content = archive.extractfile(member)
    assert content is not None, "a regular file has content"
    return content


def _unpack(kernel: Kernel, work: Path, progress: Progress, *patterns: str) -> Path:
    """Unpacks the source, or what matches the patterns, to a folder of `work`."""
    tree = work / "tree"
    tree.mkdir()
    command = ["tar", "-xf", str(_make_source(kernel) / "source.tar.xz"), "-C", str(tree), "--strip-components=1"]
    run([*command, "--wildcards", *patterns] if patterns else command, work / "build.log", progress)
    return tree


def _copy_headers(kernel: Kernel, work: Path) -> Mapping[str, Any]:
    source = _make_source(kernel)
    progress = Progress(f"headers of kernel {kernel.name}: unpacking")
    tree = _unpack(kernel, work, progress, *(f"*/include/uapi/linux/{name}" for name in _HEADERS))
    target = work / "include" / "linux"
    target.mkdir(parents=True)
    for name in _HEADERS:
        shutil.copy(tree / "include" / "uapi" / "linux" / name, target)
    shutil.rmtree(tree)
    progress.done()
    return {"package_version": store.manifest(source)["package_version"]}


def _build(kernel: Kernel, work: Path) -> Mapping[str, Any]:
    log = work / "build.log"
    source = _make_source(kernel)
    progress = Progress(f"kernel {kernel.name}: unpacking")
    tree = _unpack(kernel, work, progress)
    progress.done()

    # One configuration from all fragments: what they do not name is off, where the kernel lets it be.
    asked = _fragments(kernel)
    fragment = work / "asked.config"
    fragment.write_text(asked, encoding="utf-8")
    progress = Progress(f"kernel {kernel.name}: configuring")
    _make(tree, log, progress, "allnoconfig", KCONFIG_ALLCONFIG=str(fragment))
    built = (tree / ".config").read_text(encoding="utf-8")
    missing = missing_options(asked, built)
    if missing:
        raise LabError(f"kernel {kernel.name} does not take these options: {'; '.join(missing)}")
    progress.done()

    progress = Progress(f"kernel {kernel.name}: building")
    _make(tree, log, progress, f"-j{os.cpu_count()}", "bzImage", "modules", how_far=_lines_of(_MAKE_LINES))
    progress.done()

    progress = Progress(f"kernel {kernel.name}: installing modules")
    staging = work / "staging"
    _make(tree, log, progress, "modules_install", f"INSTALL_MOD_PATH={staging}", "INSTALL_MOD_STRIP=1")
    modules = staging / "lib" / "modules"
    (release,) = (path.name for path in modules.iterdir())
    # Links into the tree, which will be gone.
    for link in ("build", "source"):
        (modules / release / link).unlink(missing_ok=True)
    size = sum(path.stat().st_size // 1024 + 4 for path in modules.rglob("*")) + _MODULES_SLACK
    # Under fakeroot everything belongs to root, whoever builds.
    mke2fs = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "modules"]
    run(["fakeroot", *mke2fs, "-d", str(modules), str(work / "modules.img"), f"{size}k"], log, progress)
    shutil.copy(tree / "arch" / "x86" / "boot" / "bzImage", work)
    shutil.copy(tree / ".config", work / "config")
    for folder in (tree, staging):
        shutil.rmtree(folder)
    progress.done(release)
    return {"package_version": store.manifest(source)["package_version"], "kernel_release": release}


def _make(
    tree: Path, log: Path, progress: Progress, *arguments: str, how_far: Callable[[str], str] | None = None, **env: str
) -> None:
    command = ["make", "ARCH=x86_64", *arguments]
    # Fixed names: the builder's own would end up in the kernel.
    run(command, log, progress, how_far, cwd=tree, KBUILD_BUILD_USER="lab", KBUILD_BUILD_HOST="lab", **env)


def _lines_of(expected: int) -> Callable[[str], str]:
    """Progress by counting lines; the estimate never reaches 100 %."""
    count = 0

    def how_far(line: str) -> str:
        nonlocal count
        count += 1
        return f"{min(99, 100 * count // expected)} %, {line.split()[-1]}" if line.split() else f"{count} lines"

    return how_far
