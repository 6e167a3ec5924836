"""Before/after grids: the source above the generator as it is, the same pictures for the same seeds."""

from __future__ import annotations

import numpy as np
import torch
from indomain_guidance.training.adaptation import previews
from indomain_guidance.training.adaptation.previews import BeforeAfter


def test_rows_are_the_source_and_the_generator_now(tiny_adaptation, tmp_path):
    source, other = tiny_adaptation.tiny_generator(), tiny_adaptation.tiny_generator(1)
    config = tiny_adaptation.tiny_config(tmp_path, sample_count=2, seed=7)
    grids = BeforeAfter(config, source)
    first, last = grids.draw(source, 0), grids.draw(other, 6)
    assert first.height < last.height
    # Another process that goes on draws the same grid, and the seeds' own pictures.
    assert np.array_equal(np.asarray(BeforeAfter(config, source).draw(other, 6)), np.asarray(last))
    for number in range(2):
        z = torch.from_numpy(np.random.RandomState(7 + number).randn(1, 8)).float()
        with torch.no_grad():
            assert torch.equal(grids.before[number], source(z, truncation=0.7)[0])


def test_large_images_are_reduced(tiny_adaptation, tmp_path, monkeypatch):
    monkeypatch.setattr(previews, "LARGEST_TILE", 8)
    config = tiny_adaptation.tiny_config(tmp_path, sample_count=2)
    assert BeforeAfter(config, tiny_adaptation.tiny_generator()).before.shape == (2, 3, 8, 8)
