# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the collection believes of the kernel's interface, against what a C compiler sees in the kernel's own header.

KERNEL_HEADERS names the folders that hold linux/iommufd.h, separated by colons: `python3 tests/lab headers` prints one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils import _syscalls, _uapi

# Our name, and the C expression that must have the same value.
NUMBERS = {name: getattr(_uapi, name) for name in _uapi.__all__ if name.isupper()}
STRUCTS: list[tuple[type[ctypes.Structure], str]] = [
    (_uapi.IommuOption, "struct iommu_option"),
    (_syscalls.Statx, "struct statx"),
]


def as_we_see_it() -> dict[str, int]:
    """C expressions and the values that they must have."""
    seen = dict(NUMBERS)
    for struct, name in STRUCTS:
        seen[f"sizeof({name})"] = ctypes.sizeof(struct)
        for field, _type in ((entry[0], entry[1]) for entry in struct._fields_):
            if not field.startswith("_to_"):
                # Two underscores would make a name of Python's that is private to its class.
                member = "__reserved" if field == "reserved" else field
                seen[f"offsetof({name}, {member})"] = getattr(struct, field).offset
                seen[f"sizeof((({name} *)0)->{member})"] = getattr(struct, field).size
    return seen


@pytest.fixture(params=os.environ["KERNEL_HEADERS"].split(":"), ids=lambda path: Path(path).parent.name)
def as_compiled(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, int]:
    """The same expressions with their values in a program compiled against the header."""
    lines = "\n".join(f'  printf("%lld %s\\n", (long long)({each}), "{each}");' for each in as_we_see_it())
    (tmp_path / "uapi.c").write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/stat.h>\n#include <linux/iommufd.h>\n"
        f"int main(void) {{\n{lines}\n  return 0;\n}}\n"
    )
    include = Path(request.param)
    assert (include / "linux" / "iommufd.h").is_file()
    subprocess.run(["cc", "-Wall", "-Werror", f"-I{include}", "-o", "uapi", "uapi.c"], cwd=tmp_path, check=True)
    output = subprocess.run([tmp_path / "uapi"], check=True, capture_output=True, text=True).stdout
    return {
        expression: int(value) for value, _space, expression in (line.partition(" ") for line in output.splitlines())
    }


def test_numbers_and_layouts_are_those_of_the_header(as_compiled: dict[str, int]) -> None:
    assert len(as_compiled) > 15
    assert as_we_see_it() == as_compiled
