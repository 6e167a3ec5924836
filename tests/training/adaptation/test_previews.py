"""Before/after grids: stages spread over a run, the same pictures for the same seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from indomain_guidance.training.adaptation import previews
from indomain_guidance.training.adaptation.previews import BeforeAfter, evenly
from PIL import Image


@pytest.mark.parametrize(
    "steps, count, expected",
    [
        ([], 3, []),
        ([2], 3, [2]),
        ([2, 4, 6], 3, [2, 4, 6]),
        ([2, 4, 6, 8], 1, [8]),
        (list(range(10, 110, 10)), 4, [20, 50, 80, 100]),
        (list(range(1, 6)), 4, [1, 3, 4, 5]),
    ],
)
def test_stages_are_spread_and_end_with_the_last(steps, count, expected):
    assert evenly(steps, count) == expected


def test_rows_are_the_source_and_the_stages(tiny_adaptation, tmp_path, monkeypatch):
    monkeypatch.setattr(previews, "ROWS_SHOWN", 2)
    source, other = tiny_adaptation.tiny_generator(), tiny_adaptation.tiny_generator(1)
    config = tiny_adaptation.tiny_config(tmp_path, sample_count=2, seed=7)
    grids = BeforeAfter(config, source, tmp_path)
    first = np.asarray(grids.draw(source, 0))
    for step in (2, 4, 6):
        last = grids.draw(other, step)
    assert first.shape[0] < last.height and sorted(path.name for path in (tmp_path / "rows").iterdir()) == [
        "step-000002.png",
        "step-000004.png",
        "step-000006.png",
    ]
    # Another process that goes on draws the same grid, and the seeds' own pictures.
    assert np.array_equal(np.asarray(BeforeAfter(config, source, tmp_path).draw(other, 6)), np.asarray(last))
    with Image.open(tmp_path / "rows" / "step-000006.png") as image:
        strip = np.asarray(image)
    for number in range(2):
        z = torch.from_numpy(np.random.RandomState(7 + number).randn(1, 8)).float()
        with torch.no_grad():
            pixels = ((other(z, truncation=0.7)[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(strip[:, 16 * number : 16 * (number + 1)], pixels)


def test_damaged_and_other_rows_are_left_out(tiny_adaptation, tmp_path):
    source = tiny_adaptation.tiny_generator()
    config = tiny_adaptation.tiny_config(tmp_path, sample_count=2)
    grids = BeforeAfter(config, source, tmp_path)
    whole = grids.draw(source, 2)
    (tmp_path / "rows" / "step-000001.png").write_bytes(b"cut off")
    Image.new("RGB", (3, 3)).save(tmp_path / "rows" / "step-000000.png")
    assert grids.draw(source, 2).size == whole.size


def test_a_run_begun_anew_shows_nothing_of_an_earlier_try(tiny_adaptation, tmp_path):
    source, other = tiny_adaptation.tiny_generator(), tiny_adaptation.tiny_generator(1)
    config = tiny_adaptation.tiny_config(tmp_path, sample_count=2)
    BeforeAfter(config, source, tmp_path).draw(other, 2)
    (tmp_path / "rows" / "notes.txt").write_text("somebody else's")
    goes_on = BeforeAfter(config, source, tmp_path).draw(other, 4)
    anew = BeforeAfter(config, source, tmp_path, anew=True).draw(other, 4)
    assert anew.height < goes_on.height
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {"step-000004.png", "notes.txt"}
