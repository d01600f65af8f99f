# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what a host is to have, and a look at all that is wanted or remembered."""

from __future__ import annotations

import contextlib
import grp
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Callable, NamedTuple

from ._child import NoAnswer, in_child
from ._errors import IommufdError, error_text, shown_path
from ._paths import walk
from ._policy import POLICY_FILE, is_loaded
from ._record import BLOCK, CAPABILITY, FILE, KINDS, NODE, UNIT, Item
from ._states import (
    FileState,
    NodeState,
    capability_in,
    device_of,
    is_unfinished,
    kernels_node,
    matching_nodes,
    missing_folders,
    node_state,
    open_file,
    read_file_state,
    split_block,
)
from ._systemd import Run, UnitState, ask_states, is_unit_name

__all__ = (
    "View",
    "Wanted",
    "WantedFile",
    "about",
    "check_path",
    "look_at_host",
)

# What makes a shell pattern.
_MAGIC = re.compile(r"[*?[]")

# All paths are looked at within so many seconds, each emulator within so many more. Local ones are there in no time.
_PATIENCE = 30

_UNIT_KINDS = ("service", "path", "timer", "socket")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
# libvirt's configuration has no way to write a quote in a string.
_DEVICE = re.compile(r"[^\s\"']+")
_MODE = re.compile("0?[0-7]{3}")

# Where the kernel tells which of its modules are loaded, and depmod which are built in.
_LOADED = "/sys/module"
_BUILT_IN = "/lib/modules/{}/modules.builtin"


# Nobody can write into what is everybody's default.
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class WantedFile(NamedTuple):
    """What a file is to be: root's, with this content and mode. `program`: it is one, and has to start on the host."""

    content: bytes
    mode: int
    program: bool = False


class Wanted(NamedTuple):
    """What a host is to have.

    `modules` are those of the kernel that are to be loaded. `nodes`, paths or shell patterns, are those that the rule
    of udev is about, which is one of the `files`; `group` and `mode` are what it gives them, empty where it leaves
    that. `blocks` has, for each file in which we keep a block, the device nodes that the list in it is to have.
    `reload`: systemd has to read its files again, whether or not one of ours is changed.
    """

    modules: tuple[str, ...] = ()
    files: Mapping[str, WantedFile] = _NOTHING
    capabilities: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    group: str = ""
    mode: str = ""
    blocks: Mapping[str, tuple[str, ...]] = _NOTHING
    units: tuple[str, ...] = ()
    reload: bool = False

    def check(self) -> None:
        """Raises IommufdError where something is no clean absolute path, no unit or no module.

        A pattern of nodes may be one only in its last part: its folder is one that can be judged.
        """
        devices = [node for nodes in self.blocks.values() for node in nodes]
        for path in (*self.files, *self.capabilities, *self.nodes, *self.blocks, *devices):
            check_path(path)
        for node in devices:
            if not _DEVICE.fullmatch(node):
                raise IommufdError(f"{node!r} is no device node that libvirt's configuration can name.")
        for path in self.nodes:
            if _MAGIC.search(os.path.dirname(path)):
                raise IommufdError(f"{path!r} may be a pattern in its last part only, such as /dev/vfio/devices/*.")
        both = set(self.files) & set(self.blocks)
        if both:
            raise IommufdError(f"{shown_path(min(both))} is listed as a whole file and for a block in it: choose one.")
        for name in self.units:
            if not is_unit_name(name, *_UNIT_KINDS):
                raise IommufdError(f"{name!r} is not the name of a systemd service, path, timer or socket.")
        for name in self.modules:
            if not _MODULE_NAME.fullmatch(name):
                raise IommufdError(f"{name!r} is not the name of a kernel module.")
        if self.mode and not _MODE.fullmatch(self.mode):
            raise IommufdError(f"{self.mode!r} is not an octal mode such as 0660.")


def check_path(path: str) -> None:
    """Raises IommufdError where it is no absolute path in its shortest form."""
    # Normalising away a ".." would go by another way than the kernel, where a folder is a link. Two slashes at the
    # beginning stay two, since POSIX lets a system have a meaning for them.
    if not path.startswith("/") or path.startswith("//") or "\0" in path or os.path.normpath(path) != path:
        raise IommufdError(f"{path!r} is no absolute path in its shortest form, such as /etc/libvirt/qemu.conf.")


@dataclass
class View:
    """What is on the host, of all that is wanted or remembered.

    `files` holds those of blocks too. `real` leads from a listed executable to the file behind it, and `xattrs` from
    there to its extended attribute, with no entry where it is gone. `nodes` are those that are there, `kernels_nodes`
    what the kernel makes of them, and `devices` what they lead to. `matches` are the nodes that a listed path or
    pattern stands for now. `missing` are the folders on the way to a file that are not there, `unfinished` the files of
    which a run that was cut off has left a new one. `modules` are those of the kernel that are there, loaded or built
    in. `gid` is that of the listed group. `loaded`: whether SELinux's policy has our module, where that matters.
    """

    files: dict[str, FileState | None] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)
    real: dict[str, str] = field(default_factory=dict)
    xattrs: dict[str, bytes | None] = field(default_factory=dict)
    nodes: dict[str, NodeState] = field(default_factory=dict)
    kernels_nodes: dict[str, NodeState] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    matches: dict[str, list[str]] = field(default_factory=dict)
    units: dict[str, UnitState] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    gid: int | None = None
    loaded: bool = False


def look_at_host(items: list[Item], wanted: Wanted, run: Run) -> View:
    """Looks at all that is wanted or remembered.

    Raises IommufdError where something is not what it has to be; Untrusted where somebody else than root can write a
    folder on the way, or something whose content is taken.
    """
    view = View(modules=_find_modules(wanted.modules), gid=_find_gid(wanted.group))
    remembered = {kind: [item.path for item in items if item.kind == kind] for kind in KINDS}
    blocks = {*wanted.blocks, *remembered[BLOCK]}
    # The content of what is written as a whole is taken only once, before it is.
    own = {*wanted.files, *blocks} - set(remembered[FILE])
    files = list(dict.fromkeys((*wanted.files, *wanted.blocks, *remembered[FILE], *remembered[BLOCK])))
    _check_reachable([*files, *wanted.nodes, *remembered[NODE]])
    for path in files:
        _view_file(view, path, path in own)
        state = view.files[path]
        if state is not None and path in blocks:
            # Where the block ends must be known before anything is changed.
            with about(path):
                split_block(state.content)
    _view_executables(view, wanted.capabilities, remembered[CAPABILITY])
    for path in (*wanted.nodes, *remembered[NODE]):
        _view_nodes(view, path)
    view.loaded = POLICY_FILE in files and is_loaded(run)
    view.units.update(ask_states(run, list(dict.fromkeys([*wanted.units, *remembered[UNIT]]))))
    return view


def _view_file(view: View, path: str, own: bool) -> None:
    view.files[path] = read_file_state(path, own=own)
    view.missing[path] = missing_folders(path)
    if is_unfinished(path):
        view.unfinished.add(path)


def _view_executables(view: View, wanted: Iterable[str], remembered: Iterable[str]) -> None:
    for path in wanted:
        found = _patiently(partial(_look_at_executable, path, True), path)
        if found is None:
            raise IommufdError(f"{shown_path(path)} is no executable file, so it cannot get CAP_IPC_LOCK.")
        view.real[path], xattr = found
        view.xattrs[view.real[path]] = xattr
    for path in remembered:
        found = None if path in view.xattrs else _patiently(partial(_look_at_executable, path, False), path)
        if found is not None:
            view.xattrs[path] = found[1]


def _view_nodes(view: View, path: str) -> None:
    """Looks at the nodes that a path or a pattern stands for."""
    view.matches[path] = matching_nodes(path)
    for each in view.matches[path]:
        node = node_state(each)
        if node is not None:
            view.nodes[each] = node
            view.kernels_nodes[each] = kernels_node(each)
            view.devices[each] = device_of(each)


def _check_reachable(paths: list[str]) -> None:
    """Goes along all paths, in a child with a time limit: each may be on a mount that does not answer.

    Raises IommufdError where somebody else than root can write on the way. What is not there is told of later.
    """

    def go() -> None:
        for path in paths:
            with contextlib.suppress(OSError), walk(path, judge_last=False):
                pass

    try:
        in_child(None, go, _PATIENCE)
    except NoAnswer as exc:
        places = ", ".join(sorted({shown_path(os.path.dirname(path)) for path in paths}))
        raise IommufdError(
            f"Not all of these were found within {_PATIENCE} seconds: {places}. Is there a mount whose server is gone?"
        ) from exc


def _patiently(act: Callable[[], Any], path: str) -> tuple[str, bytes | None] | None:
    """What `_look_at_executable` gives, from a child with a time limit."""
    try:
        found = in_child(None, act, _PATIENCE)
    except NoAnswer as exc:
        raise IommufdError(
            f"{shown_path(path)} was not found within {_PATIENCE} seconds. Is it on a mount whose server is gone?"
        ) from exc
    return None if found is None else (found[0], None if found[1] is None else bytes.fromhex(found[1]))


def _look_at_executable(path: str, executable: bool) -> tuple[str, str | None] | None:
    """The path without links, and the extended attribute in hexadecimal; None where there is no file.

    `executable`: and where it is none. Raises IommufdError where it cannot be read, or can be written by others.
    """
    try:
        with open_file(path) as file:
            if executable and not file.mode & 0o111:
                return None
            xattr = capability_in(file.fd, path)
            return file.real_path, None if xattr is None else xattr.hex()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise IommufdError(f"{shown_path(path)} cannot be looked at ({error_text(exc.errno)}).") from exc


def _find_modules(names: Iterable[str]) -> frozenset[str]:
    """Those of the kernel's modules that are loaded or built in."""
    built_in = ""
    with contextlib.suppress(OSError), open(_BUILT_IN.format(os.uname().release), encoding="ascii") as stream:
        built_in = stream.read()
    # A module's file may be named with hyphens; the kernel has underscores for them.
    inside = {os.path.basename(line)[: -len(".ko")].replace("-", "_") for line in built_in.splitlines()}
    kernels = {name: name.replace("-", "_") for name in names}
    return frozenset(
        name for name, each in kernels.items() if each in inside or os.path.exists(os.path.join(_LOADED, each))
    )


def _find_gid(group: str) -> int | None:
    """The id of a group, None where none is asked for. Raises IommufdError where the host has no such group."""
    try:
        return grp.getgrnam(group).gr_gid if group else None
    except KeyError as exc:
        raise IommufdError(
            f"This host has no group {shown_path(group)}: name in iommufd_host_device_group the one that the device"
            " nodes are to have."
        ) from exc


@contextlib.contextmanager
def about(path: str) -> Iterator[None]:
    """Has an error say which file it is about."""
    try:
        yield
    except IommufdError as exc:
        raise IommufdError(f"{shown_path(path)}: {exc}") from exc
