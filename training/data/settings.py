"""Which images are trained on, and how they are cut and encoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...guidance.errors import Problem
from .buckets import Size, bucket_sizes

POSTERIORS = ("sample", "mean")


@dataclass(frozen=True)
class DataSettings:
    """data: folders, files, .tar shards and patterns of them; within: folders that must not be left (none: no bounds).

    cache: folder of the encoded images ("": the default one). resolution, buckets, bucket_step, bucket_max_ratio: the
    shapes, see `bucket_sizes`. flip: draw every image mirrored half of the time. random_crops: 0 the centre; k: k cuts
    per image whose places follow from its content. posterior: "sample" or "mean" of the VAE's. caching_batch: images of
    up to 512 x 512 pixels that the encoder gets at once; of larger ones fewer. min_side: images with a shorter side in
    pixels are skipped (0: none). Raises Problem.
    """

    data: Sequence[str | os.PathLike] = ()
    within: Sequence[str | os.PathLike] = ()
    cache: str | os.PathLike = ""
    resolution: int = 512
    buckets: bool = True
    bucket_step: int = 64
    bucket_max_ratio: float = 2.0
    flip: bool = False
    random_crops: int = 0
    posterior: str = "sample"
    caching_batch: int = 8
    min_side: int = 0

    def __post_init__(self) -> None:
        if self.posterior not in POSTERIORS:
            raise Problem(f"posterior: expected one of {', '.join(POSTERIORS)}, found {self.posterior!r}.")

    @cached_property
    def sizes(self) -> list[Size]:
        """The shapes (height, width) that images are cut to."""
        return bucket_sizes(self.resolution, self.bucket_step, self.bucket_max_ratio if self.buckets else 1.0)
