"""The index of image files that were read before."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from indomain_guidance.training.data.content_index import ContentIndex, Known
from indomain_guidance.training.data.sources import find_images
from PIL import Image


def save(path: Path, seed: int, height: int = 40, width: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def test_index_survives_torn_lines(tmp_path):
    path = save(tmp_path / "a.png", 0)
    os.utime(path, (1e9, 1e9))
    (entry,) = find_images([str(path)])
    known = Known("0" * 64, 40, 60)
    index = ContentIndex(tmp_path / "index.jsonl")
    assert index.look_up(entry) is None
    index.add(entry.stamp(), known)
    index.close()
    with open(tmp_path / "index.jsonl", "ab") as file:
        file.write(b'["torn", 12, \xff\n[]\n{}\nnull\n["a"')
    index = ContentIndex(tmp_path / "index.jsonl")
    assert index.look_up(entry) == known
    for number in range(1500):
        index.add(("/gone", number, 5, 5), known)
    index.close()
    assert len(ContentIndex(tmp_path / "index.jsonl")._known) == 2
    os.utime(path)  # changed just now: neither trusted nor remembered
    assert index.look_up(entry) is None
    index.add(entry.stamp(), known)
    assert index.look_up(entry) is None
