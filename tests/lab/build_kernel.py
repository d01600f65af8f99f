# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Debian's own kernels, with the modules that Debian leaves out: kernel/make.sh, in a throw-away chroot."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import store
from guests import Kernel, Suite
from progress import Progress, run

_MAKE = Path(__file__).parent / "kernel" / "make.sh"
_INIT = Path(__file__).parent / "kernel" / "init"
# To be raised with every change below that makes something else from the same inputs.
_RECIPE = 1
# The architecture of the machines that the lab is built on
HERE = "amd64"
# What kernel/make.sh runs, beside what every Debian system has
_TOOLS = ("make", "kmod", "cpio", "busybox-static", "xz-utils", "zstd")
# Room in the modules' disk for the file system's own records, in KiB
_SLACK = 4096


def suite_options(suite: Suite) -> list[str]:
    """What mmdebstrap needs to be told about a suite."""
    return ['--aptopt=Acquire::Check-Valid-Until "false"'] if suite.may_be_expired else []


def kernel_artifact(kernel: Kernel) -> store.Artifact:
    """The kernel: vmlinuz, initrd.img, include/linux (its headers), and two disks with its modules (ext4).

    lab.img: with iommufd and VFIO as the lab builds them; packaged.img: as Debian ships them.
    """
    inputs = {
        "suite": kernel.suite.name,
        "packages": kernel.packages,
        "container": kernel.container,
        "for": [kernel.architecture.name, kernel.flavour],
        "scripts": [path.read_text(encoding="utf-8") for path in (_MAKE, _INIT)],
        "tools": _TOOLS,
        "recipe": _RECIPE,
    }
    return store.Artifact("kernel", kernel.name, inputs)


def make_kernel(kernel: Kernel) -> Path:
    """The folder of the kernel."""
    return store.make(kernel_artifact(kernel), partial(_build, kernel))


def _build(kernel: Kernel, work: Path) -> Mapping[str, Any]:
    log = work / "build.log"
    progress = Progress(f"kernel {kernel.name}: installing it, and building modules for it")
    archive = work / "out.tar"
    # Whatever a kernel is for, what builds for it runs here.
    foreign = kernel.architecture if kernel.architecture.triplet else None
    words = " ".join((kernel.container, *((foreign.name, foreign.triplet, kernel.flavour) if foreign else ())))
    tools = [name for name in _TOOLS if not (foreign and name == "busybox-static")]
    command = [
        "mmdebstrap",
        "--variant=apt",
        f"--architectures={','.join((HERE, foreign.name)) if foreign else HERE}",
        f"--include={','.join((*kernel.packages, *tools))}",
        *suite_options(kernel.suite),
        *(f'--customize-hook=upload "{path}" "/{path.name}"' for path in (_MAKE, _INIT)),
        f'--customize-hook=chroot "$1" sh /{_MAKE.name} {words}',
        f'--customize-hook=tar-out /out "{archive}"',
        "--format=null",
        kernel.suite.name,
        "/dev/null",
    ]
    run(command, log, progress, last_step)
    progress.done()

    progress = Progress(f"kernel {kernel.name}: making the disks of its modules")
    out = work / "out"
    run(["tar", "-xf", str(archive), "-C", str(work)], log, progress)
    for disk in ("lab", "packaged"):
        modules = out / disk
        size = sum(path.lstat().st_size // 1024 + 4 for path in modules.rglob("*")) * 21 // 20 + _SLACK
        # Under fakeroot everything belongs to root, whoever builds.
        mke2fs = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(modules)]
        run(["fakeroot", *mke2fs, str(work / f"{disk}.img"), f"{size}k"], log, progress)
    for name in ("vmlinuz", "initrd.img", "include"):
        (out / name).rename(work / name)
    release, version = ((out / name).read_text(encoding="utf-8").strip() for name in ("release", "version"))
    archive.unlink()
    shutil.rmtree(out)
    progress.done(release)
    return {"package_version": version, "kernel_release": release}


def last_step(line: str) -> str:
    """What a program that installs or builds says it does, cut to the width of a progress line."""
    return line.strip()[:60] or "working"
