"""The mini world's images as files: the right ones, the same every time, and never among others."""

from __future__ import annotations

import numpy as np
import pytest
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.mini_world import render
from indomain_guidance.training.mini_world.pictures import export_pictures
from PIL import Image


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.format == "PNG"
        return np.asarray(image).astype(float)


def test_narrow_pictures_are_the_training_rows_enlarged(tmp_path):
    paths = export_pictures(tmp_path / "new" / "narrow", "narrow", 5)
    assert [path.name for path in paths] == [f"narrow-{i:04d}.png" for i in range(5)]
    digits, _ = render.load_handwriting(slice(0, 5))
    for path, digit in zip(paths, digits):
        # Oracle: Pillow's bicubic enlargement of the same strokes, within rounding and filter differences.
        wanted = np.asarray(Image.fromarray(digit.numpy()).resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
        found = read(path)
        assert found.shape == (64, 64, 3) and np.ptp(found, axis=2).max() == 0
        assert np.abs(found[:, :, 0] - wanted).mean() < 6


def test_handwriting_has_the_domains_colours_and_repeats(tmp_path):
    one, two, other = (
        export_pictures(tmp_path / name, count=40, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert [path.read_bytes() for path in one] != [path.read_bytes() for path in other]
    grounds = {tuple(read(path)[0, 0]) for path in one}
    allowed = {render.COLOURS[name] for name in render.DOMAIN_GROUNDS}
    assert len(grounds) > 2
    assert all(min(max(abs(a - b) for a, b in zip(ground, colour)) for colour in allowed) <= 1 for ground in grounds)


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(FileProblem, match="holiday.jpg"):
        export_pictures(tmp_path, count=2)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(FileProblem, match="found a file"):
        export_pictures(tmp_path / "holiday.jpg", count=2)


def test_again_into_the_same_folder_is_fine_and_counts_are_checked(tmp_path):
    export_pictures(tmp_path, count=3)
    assert len(export_pictures(tmp_path, count=4)) == len(list(tmp_path.iterdir())) == 4
    for count in (0, 8001):
        with pytest.raises(ValueError, match="8000"):
            export_pictures(tmp_path, count=count)
