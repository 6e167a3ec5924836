"""Sample grids: sizes, labels, files."""

from __future__ import annotations

import numpy as np
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


def test_words_that_the_font_lacks_end_no_run(monkeypatch):
    """Pillow before 10.1, or without FreeType, has one small font of Western letters."""
    from PIL import ImageFont

    if not hasattr(ImageFont, "load_default_imagefont"):
        pytest.skip("this Pillow cannot be asked for its small font")

    def one_size(size=None):
        if size is not None:
            raise TypeError("load_default() takes 0 positional arguments but 1 was given")
        return ImageFont.load_default_imagefont()

    pictures = [torch.zeros(1, 3, 64, 64)]
    wanted = grids.grid(pictures, ["a cat"], ["seed 0"], "caf\u00e9")
    monkeypatch.setattr(ImageFont, "load_default", one_size)
    sheet = grids.grid(pictures, ["\u65e5\u672c\u306e\u732b"], ["seed 0"], "\u9676\u5668, step 0")
    assert sheet.size == wanted.size
    labels = np.array(sheet)[:, : grids.LABEL_WIDTH]
    assert (labels.min(-1) < 100).sum() > 10
