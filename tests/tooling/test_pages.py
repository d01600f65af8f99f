# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The pages for people: each link within the project leads somewhere, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sandbox

ROOT = Path(__file__).resolve().parents[2]
PAGES = [name for name in sandbox.project_files(ROOT) if name.endswith(".md")]
# What is in a code block is no link.
CODE = re.compile(r"(?ms)^```.*?^```$|`[^`\n]*`")


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    text = path.read_text("utf-8")
    if path.suffix == ".rst":
        titles = re.findall(r"(?m)^(\S.*)\n[=^-]{3,}$", text)
        return {re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles}
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    """The links of a page to files or headings that the project does not have."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text)):
        name, _mark, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            found.append(link)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_each_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    assert dead_links(page, page.read_text("utf-8")) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1300


@pytest.mark.parametrize("link", ["NOTHING.md", "docs/docsite/rst/which_way.rst#nowhere", "#nowhere"])
def test_a_dead_link_is_told(link: str) -> None:
    """A control: that these are told shows that the other tests can fail."""
    live = "docs/docsite/rst/which_way.rst#what-cap-ipc-lock-risks"
    assert dead_links(ROOT / "README.md", f"[a]({live}) and [b]({link})") == [link]
