# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cache of what the lab makes: keyed by what it is made from, complete or absent, made once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progress import LabError, Progress

# Of each name, that many results stay: the one in use, and the one before for whoever goes back and forth.
_KEEP = 2
_MANIFEST = "manifest.json"
_BUILDING = ".building-"


def root() -> Path:
    """The cache's folder, which may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "virt-iommufd-lab"


@dataclass(frozen=True)
class Artifact:
    """Something that is made from inputs, which must be all that decides the result.

    kind: the folder in the cache. name: what it is called there. inputs: what JSON can hold.
    """

    kind: str
    name: str
    inputs: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Names the inputs: the same key, the same result."""
        text = json.dumps(self.inputs, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        return root() / self.kind / f"{self.name}-{self.key}"


def manifest(path: Path) -> dict[str, Any]:
    """What an artifact's maker wrote down about it; empty if it is not there."""
    try:
        loaded: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return loaded


def make(artifact: Artifact, build: Callable[[Path], Mapping[str, Any]]) -> Path:
    """The artifact's folder, made by `build` if it is missing.

    build: fills the empty folder that it gets, and returns what else is worth keeping in the manifest.
    Raises what `build` raises; then nothing is left but the log (build.log), moved to the cache's logs/.
    """
    if _use(artifact.path):
        return artifact.path
    with lock(f"{artifact.kind}-{artifact.path.name}", f"{artifact.kind} {artifact.name} is being made by another run"):
        if _use(artifact.path):
            return artifact.path
        _remove_leftovers(artifact.kind)
        work = artifact.path.parent / f"{_BUILDING}{artifact.path.name}"
        # Whoever held the lock before died; nobody else writes there while it is ours.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        start = time.monotonic()
        try:
            facts = build(work)
            record = {
                "kind": artifact.kind,
                "name": artifact.name,
                "key": artifact.key,
                **facts,
                "seconds": round(time.monotonic() - start, 1),
                "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "inputs": artifact.inputs,
            }
            (work / _MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            work.rename(artifact.path)
        except BaseException as error:
            kept = _keep_log(work, artifact)
            shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, LabError) and kept is not None:
                raise LabError(str(error).replace(str(work / "build.log"), str(kept))) from error
            raise
        _prune(artifact)
    return artifact.path


def discard(artifact: Artifact) -> None:
    """Throws an artifact away: it is of no use."""
    with lock(f"{artifact.kind}-{artifact.path.name}", f"{artifact.kind} {artifact.name} is being made by another run"):
        shutil.rmtree(artifact.path, ignore_errors=True)


@contextlib.contextmanager
def lock(name: str, while_waiting: str) -> Iterator[None]:
    """Holds the lock of that name, waiting for whoever holds it, and saying so.

    The programs that are run meanwhile inherit it: see progress.run.
    """
    descriptor = _open_lock(name)
    try:
        progress = None
        while not _try_lock(descriptor):
            progress = progress or Progress(while_waiting)
            progress.show("waiting")
            time.sleep(0.5)
        if progress is not None:
            progress.done("free")
        yield
    finally:
        os.close(descriptor)


def busy() -> bool:
    """Whether some run is making something at this moment."""
    for path in _folder("locks").iterdir():
        descriptor = _open_lock(path.name)
        try:
            if not _try_lock(descriptor):
                return True
        finally:
            os.close(descriptor)
    return False


def _open_lock(name: str) -> int:
    descriptor = os.open(_folder("locks") / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.set_inheritable(descriptor, True)
    return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _folder(name: str) -> Path:
    path = root() / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _use(path: Path) -> bool:
    """Whether it is there; if so, it counts as used now."""
    try:
        os.utime(path / _MANIFEST)
    except FileNotFoundError:
        return False
    return True


def _keep_log(work: Path, artifact: Artifact) -> Path | None:
    log = _folder("logs") / f"{artifact.kind}-{artifact.name}.log"
    try:
        (work / "build.log").replace(log)
    except OSError:
        return None
    return log


def _remove_leftovers(kind: str) -> None:
    """Removes what makers left that died: those whose lock can be had."""
    for path in _folder(kind).glob(f"{_BUILDING}*"):
        descriptor = _open_lock(f"{kind}-{path.name[len(_BUILDING) :]}")
        try:
            # The lock that this run holds is refused to it here as well.
            if _try_lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _prune(artifact: Artifact) -> None:
    """Removes all but the results of this name that were used last.

    A guest that runs keeps what it has open, so nothing is taken from under it.
    """
    key_length = len(artifact.key)
    found = [
        path
        for path in artifact.path.parent.glob(f"{artifact.name}-*")
        if len(path.name) == len(artifact.name) + 1 + key_length and (path / _MANIFEST).exists()
    ]
    found.sort(key=lambda path: (path / _MANIFEST).stat().st_mtime, reverse=True)
    for path in found[_KEEP:]:
        shutil.rmtree(path, ignore_errors=True)
