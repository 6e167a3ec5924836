"""The help pages: one for every node, and narrow enough for the editor's panel of 300 pixels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "nodes" / "web" / "docs").glob("*.md"))


def test_every_node_has_a_help_page():
    ids = set()
    for path in (ROOT / "nodes").glob("*.py"):
        ids |= set(re.findall(r'node_id="(\w+)"', path.read_text(encoding="utf-8")))
    assert len(ids) >= 7
    assert ids == {path.stem for path in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_fits_a_narrow_panel(page):
    text = page.read_text(encoding="utf-8")
    # Tables and blocks of code do not wrap.
    assert not re.search(r"^\s*\||^```|^    \S", text, re.M)
    assert not [word for code in re.findall(r"`([^`]+)`", text) for word in code.split() if len(word) > 32]
    for paragraph in re.split(r"\n\n|\n- ", text):
        assert len(paragraph) <= 420, paragraph
