"""Shapes of equal area: everything a bucket may be, by exhaustive search."""

from __future__ import annotations

import math

import pytest
from indomain_guidance.training.data.buckets import assign, bucket_sizes


@pytest.mark.parametrize(
    "resolution, step, ratio", [(512, 64, 2.0), (1024, 64, 2.0), (256, 32, 3.0), (64, 8, 2.0), (500, 64, 1.5)]
)
def test_shapes_are_the_largest_allowed_ones(resolution, step, ratio):
    sizes = bucket_sizes(resolution, step, ratio)
    assert (resolution, resolution) in sizes and sizes == sorted(set(sizes))
    assert {(w, h) for h, w in sizes} == set(sizes)
    grid = range(step, int(resolution * math.sqrt(ratio)) + step, step)
    allowed = {(h, w) for h in grid for w in grid if h * w <= resolution**2 and max(h, w) <= ratio * min(h, w)}
    allowed.add((resolution, resolution))
    oracle = {a for a in allowed if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in allowed)}
    assert set(sizes) == oracle


def test_known_lists():
    assert bucket_sizes(512) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert bucket_sizes(64) == [(64, 64)]
    assert bucket_sizes(512, 64, 1.0) == [(512, 512)]
    sdxl = {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344)}
    assert sdxl <= set(bucket_sizes(1024))  # the shapes SDXL was published with


def test_images_go_where_least_is_cut_off():
    sizes = bucket_sizes(512)
    assert assign(3000, 4000, sizes) == (448, 576)
    assert assign(4000, 3000, sizes) == (576, 448)
    assert assign(100, 100, sizes) == (512, 512)
    assert assign(10, 1000, sizes) == (384, 640) and assign(1000, 10, sizes) == (640, 384)
    for height in range(100, 1000, 37):
        for width in range(100, 1000, 41):

            def kept(size):
                return min(height / width, size[0] / size[1]) / max(height / width, size[0] / size[1])

            assert kept(assign(height, width, sizes)) == pytest.approx(max(map(kept, sizes)))
