# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Root file systems, made by mmdebstrap, and the SSH key that opens them."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import store
import tools
from build_kernel import LABEL, last_step, suite_options
from guests import Root
from progress import LabError, Progress, environment, run

_HERE = Path(__file__).parent
_OVERLAY = _HERE / "root" / "overlay"
_CUSTOMIZE = (_HERE / "root" / "customize.sh",)
# Where Podman is.
_PODMAN = (_HERE / "root" / "podman.sh",)
# Where SELinux is to be in force: these after it, and the labels that the policy in the new file system has for paths.
_SELINUX = (_HERE / "root" / "selinux.sh", _HERE / "root" / "selinux.cil")
_CONTEXTS = "etc/selinux/default/contexts/files/file_contexts"
# To be raised with every change below that makes something else from the same inputs.
_RECIPE = 1
# The guests' name in their known_hosts, whatever the port.
HOST_ALIAS = "virt-iommufd-lab"
# Versions that are worth a place in the manifest
_NOTED = ("libvirt-daemon-system", "qemu-system-x86", "systemd", "openssh-server", "python3")

# What udev's database of hardware is made of, and what nobody reads there
_SLOW = ("/usr/lib/udev/hwdb.d/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*")

_key_artifact = store.Artifact("key", "ssh", {"type": "ed25519"})


def make_key() -> Path:
    """The private key that logs in to every guest; the public one is beside it, with .pub."""
    return store.make(_key_artifact, _generate_key) / "id_ed25519"


def root_artifact(root: Root) -> store.Artifact:
    """The root file system: root.img (ext4, sparse) and known_hosts.

    Makes the SSH key if there is none.
    """
    inputs = {
        "suite": root.suite.name,
        "packages": root.packages,
        "architecture": root.architecture.name,
        "left_out": _left_out(root),
        "size_mib": root.size_mib,
        "overlay": {name: hashlib.sha256(content).hexdigest() for name, content in _overlay().items()},
        "scripts": [path.read_text(encoding="utf-8") for path in (*_scripts(root), *([LABEL] if root.selinux else []))],
        "recipe": _RECIPE,
    }
    return store.Artifact("root", root.name, inputs)


def make_root(root: Root) -> Path:
    """The folder of the built root file system."""
    return store.make(root_artifact(root), partial(_build, root))


def _generate_key(work: Path) -> Mapping[str, Any]:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", HOST_ALIAS, "-f", str(work / "id_ed25519")]
    made = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(), check=False
    )
    if made.returncode != 0:
        raise LabError(f"ssh-keygen failed: {made.stderr.strip()}")
    return {}


def _left_out(root: Root) -> tuple[str, ...]:
    """The files that are not unpacked: where programs are emulated, those that it takes long to make something of."""
    return _SLOW if root.architecture.triplet else ()


def _overlay() -> dict[str, bytes]:
    """The files that are put over the packages' own, by path."""
    files = {
        str(path.relative_to(_OVERLAY)): path.read_bytes() for path in sorted(_OVERLAY.rglob("*")) if path.is_file()
    }
    files["root/.ssh/authorized_keys"] = make_key().with_suffix(".pub").read_bytes()
    return files


def _scripts(root: Root) -> tuple[Path, ...]:
    return (*_CUSTOMIZE, *(_PODMAN if "podman" in root.packages else ()), *(_SELINUX if root.selinux else ()))


def _write_overlay(root: Root, archive: Path) -> None:
    """Writes the overlay and the customizing scripts as a tar file in which everything belongs to root."""
    with tarfile.open(archive, "w") as tar:
        folder = tarfile.TarInfo("root/.ssh")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o700
        tar.addfile(folder)
        scripts = {path.name: path.read_bytes() for path in _scripts(root)}
        for name, content in {**_overlay(), **scripts}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o600 if ".ssh" in name else 0o644
            tar.addfile(entry, io.BytesIO(content))


def _build(root: Root, work: Path) -> Mapping[str, Any]:
    tools.require_programs(root.architecture)
    log = work / "build.log"
    progress = Progress(f"root {root.name}: installing {len(root.packages)} packages and what they need")
    overlay = work / "overlay.tar"
    _write_overlay(root, overlay)
    archive = work / "root.tar"
    command = [
        "mmdebstrap",
        "--variant=minbase",
        f"--architectures={root.architecture.name}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _left_out(root)),
        f"--include={','.join(root.packages)}",
        *suite_options(root.suite),
        f'--customize-hook=tar-in "{overlay}" /',
        *(
            f'--customize-hook=chroot "$1" sh /{path.name} && rm "$1/{path.name}"'
            for path in _scripts(root)
            if path.suffix == ".sh"
        ),
        root.suite.name,
        str(archive),
    ]
    run(command, log, progress, last_step)
    progress.done()

    facts = _look_into(archive, work)

    # fakeroot keeps owners and modes that an ordinary user cannot give; both steps must share it.
    progress = Progress(f"root {root.name}: making the disk")
    tree = work / "tree"
    script = (
        "archive=$1 tree=$2 image=$3 size=$4 && shift 4 && "
        # What devtmpfs will hold is left out.
        'mkdir "$tree" && '
        'tar -xf "$archive" -C "$tree" --numeric-owner --exclude="./dev/*" --xattrs --xattrs-include="*" '
        # semodule labels its own files, where the build is root's. Under fakeroot tar makes files of no type of them.
        "--pax-option=delete=SCHILY.xattr.security.selinux && "
        '"$@" && '
        # No tables are left for the guest to fill in while it boots.
        'mke2fs -q -t ext4 -L root -m 0 -N 131072 -E lazy_itable_init=0,lazy_journal_init=0 -d "$tree" "$image" "$size"'
    )
    image = ["sh", "-c", script, "sh", str(archive), str(tree), str(work / "root.img"), f"{root.size_mib}M"]
    label = [sys.executable, str(LABEL), str(tree), str(tree / _CONTEXTS)] if root.selinux else ["true"]
    run(["fakeroot", *image, *label], log, progress)
    archive.unlink()
    overlay.unlink()
    shutil.rmtree(tree)
    progress.done()
    return facts


def _look_into(archive: Path, work: Path) -> dict[str, Any]:
    """Reads the host key, for known_hosts, and the installed versions from the new file system."""
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar}

        def text(name: str) -> str:
            content = tar.extractfile(members[name])
            assert content is not None, f"{name} is a regular file"
            return content.read().decode()

        kind, key = text("./etc/ssh/ssh_host_ed25519_key.pub").split()[:2]
        status = text("./var/lib/dpkg/status")
    (work / "known_hosts").write_text(f"{HOST_ALIAS} {kind} {key}\n", encoding="utf-8")
    versions = dict(re.findall(r"^Package: (\S+)\n(?:.+\n)*?Version: (\S+)$", status, re.MULTILINE))
    return {"versions": {name: versions[name] for name in _NOTED if name in versions}}
