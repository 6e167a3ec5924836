"""Sample grids: sizes, labels, files."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.training.engine import grids
from PIL import Image


def test_a_picture_is_written_whole(tmp_path):
    sheet = grids.grid([torch.zeros(2, 3, 64, 64)], ["a"], ["seed 0", "seed 1"], "step 10")
    path = grids.save_png(sheet, tmp_path / "samples" / "step-000010.png")
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width == grids.LABEL_WIDTH + 2 * (128 + grids.MARGIN)
    assert [file.name for file in path.parent.iterdir()] == ["step-000010.png"]


@pytest.mark.parametrize("side, shown", [(16, 128), (64, 128), (200, 200), (1024, 512)])
def test_tiles_have_a_readable_size(side, shown):
    sheet = grids.grid([torch.zeros(3, 3, side, side)] * 2, ["a very long prompt " * 9, "b"], list("abc"), "title")
    assert sheet.width == grids.LABEL_WIDTH + 3 * (shown + grids.MARGIN)
