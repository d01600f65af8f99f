# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Has a guest's Python keep what it compiles from a ZIP file, as which Ansible sends a module with all that it imports.

Each run compiles the same source again, which under emulation is more than half of what a task takes. Python keeps what
it compiles from a folder, but not from a ZIP file. This does it for a guest whose tests judge what a module does, not
how long that takes: it is in effect where FOLDER is. What is kept is root's, and is found by the source itself.

It also mends what makes tests fail on a busy machine: Ansible loses what a command says. Its run_command looks for
output for a second, and asks then whether the command has ended. One that has written and ended in between is taken for
one that has said nothing.
"""

from __future__ import annotations

import _imp
import marshal
import os
import sys
import zipimport
from types import CodeType

FOLDER = "/run/lab-bytecode"

# In run_command of ansible/module_utils/basic.py: what had ended before nothing was found has nothing more to say.
RUN_COMMAND = (
    (
        b"                events = selector.select(1)\n",
        b"                ended = cmd.poll() is not None\n                events = selector.select(1)\n",
    ),
    (
        b"if (not events or not selector.get_map()) and cmd.poll() is not None:",
        b"if (ended and not events or not selector.get_map()) and cmd.poll() is not None:",
    ),
)


def mended(path: str, source: bytes) -> bytes:
    """The source of a module, which is another only of Ansible's own that runs commands."""
    if path.endswith("ansible/module_utils/basic.py"):
        for wrong, right in RUN_COMMAND:
            source = source.replace(wrong, right)
    return source


def _compile(path: str, source: bytes) -> CodeType:
    name = f"{_imp.source_hash(0, source).hex()}-{len(source)}.{sys.implementation.cache_tag}"
    kept = os.path.join(FOLDER, name)
    try:
        with open(kept, "rb") as stream:
            code: CodeType = marshal.load(stream)
            return code
    except OSError:
        pass
    code = compile(mended(path, source), path, "exec", dont_inherit=True)
    if os.access(FOLDER, os.W_OK):
        scratch = f"{kept}.{os.getpid()}"
        with open(scratch, "wb") as stream:
            marshal.dump(code, stream)
        os.rename(scratch, kept)
    return code


if os.path.isdir(FOLDER):
    zipimport._compile_source = _compile  # type: ignore[attr-defined]
