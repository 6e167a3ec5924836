"""Aspect-ratio buckets: a few shapes of about the same area, so that cropping to one of them removes little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

Size = tuple[int, int]  # (height, width) in pixels


@lru_cache(maxsize=8)
def bucket_sizes(resolution: int, step: int = 64, max_ratio: float = 2.0) -> list[Size]:
    """Shapes (height, width) of at most resolution^2 pixels, sorted by height.

    The square of `resolution` is always one of them; the others have sides that are multiples of `step` and long sides
    at most `max_ratio` times the short ones (1: the square alone). No shape fits into another.
    """
    area = resolution * resolution
    wide = set()
    for height in range(step, resolution, step):
        width = min(area // height, math.floor(max_ratio * height + 1e-9)) // step * step
        if width > height:
            wide.add((height, width))
    wide = {
        (h, w) for h, w in wide if w > resolution and not any(h <= H and w <= W and (h, w) != (H, W) for H, W in wide)
    }
    return sorted({(resolution, resolution)} | wide | {(w, h) for h, w in wide})


def assign(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The shape whose aspect ratio is nearest to the picture's (in its logarithm); of equally near ones the larger."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: (round(abs(math.log(size[1] / size[0]) - wanted), 12), -size[0] * size[1], size))


def cover(original: Size, size: Size) -> Size:
    """(height, width) of a picture scaled, aspect ratio kept, until it just covers `size`."""
    scale = max(size[0] / original[0], size[1] / original[1])
    return max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))


def removed(height: int, width: int, size: Size) -> float:
    """Share of a picture, 0..1, that is cut away when it is scaled to cover a shape."""
    ratio = width * size[0] / (height * size[1])
    return 1.0 - min(ratio, 1.0 / ratio)
