# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Labels a tree of files for SELinux, as setfiles(8) does: `fakeroot ... label.py TREE CONTEXTS`.

Under fakeroot, no privilege is needed, and mke2fs takes the labels along. So the guest need not label itself as it
boots for the first time, which takes minutes. What is asked is libselinux, which every Debian system has.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_XATTR = "security.selinux"
# selinux/label.h
_SELABEL_CTX_FILE = 0
_SELABEL_OPT_PATH = 3


class _Option(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("value", ctypes.c_char_p))


class _Contexts:
    """What a file of contexts says, with those beside it for home folders and for other names of folders."""

    def __init__(self, path: str) -> None:
        self._libselinux = ctypes.CDLL("libselinux.so.1", use_errno=True)
        self._libselinux.selabel_open.restype = ctypes.c_void_p
        option = _Option(_SELABEL_OPT_PATH, os.fsencode(path))
        handle = self._libselinux.selabel_open(_SELABEL_CTX_FILE, ctypes.byref(option), 1)
        if handle is None:
            raise _last_error(path)
        self._handle = ctypes.c_void_p(handle)

    def of(self, path: str, mode: int) -> bytes | None:
        """The context of a file with that path and mode; None where it is to have none."""
        context = ctypes.c_char_p()
        place = ctypes.byref(context)
        if self._libselinux.selabel_lookup_raw(self._handle, place, os.fsencode(path), mode):
            error = _last_error(path)
            if error.errno == errno.ENOENT:
                return None
            raise error
        found = context.value
        self._libselinux.freecon(context)
        return found


def _last_error(path: str) -> OSError:
    return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def _files(tree: Path) -> Iterator[str]:
    yield str(tree)
    for folder, folders, files in os.walk(tree):
        yield from (os.path.join(folder, name) for name in folders + files)


def main(tree: Path, contexts: str) -> None:
    """Labels everything below the folder `tree`, and the folder, as the file `contexts` says of their paths there."""
    # mke2fs would make it, without a label.
    (tree / "lost+found").mkdir(0o700, exist_ok=True)
    wanted = _Contexts(contexts)
    for path in _files(tree):
        context = wanted.of(path[len(str(tree)) :] or "/", os.lstat(path).st_mode)
        if context is not None:
            # As the kernel keeps it, with the end of the text.
            os.setxattr(path, _XATTR, context + b"\0", follow_symlinks=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
