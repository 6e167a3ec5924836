"""Which images are trained on, and how they are cut and encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..engine.settings import Settings, check_multiple, group
from .buckets import Size, bucket_sizes

STEP = 8  # pixels that all sides are multiples of
what, images = map(group, ("what", "data"))


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """The settings about images, of runs that learn from some. Raises ConfigProblem."""

    groups: ClassVar[tuple[str, ...]] = ("what", "data")

    data: tuple[str, ...] = what(
        (),
        "folders of images (searched recursively) or .tar shards of them; shard-{0000..0003}.tar names several",
        path=True,
        free=True,
    )
    resolution: int = images(
        512,
        "side of a square training image in pixels, a multiple of 8; other shapes "
        "have the same area. Use what the prior was made for: 512 for SD 1.5, 1024 for SDXL",
        min=STEP,
        max=8192,
    )
    buckets: bool = images(
        True,
        "keep aspect ratios by sorting images into shapes of about the same area; off: every image becomes a square",
    )
    bucket_step: int = images(64, "sides of the shapes are multiples of this many pixels", min=STEP, max=1024)
    bucket_max_ratio: float = images(2.0, "the longest shape's long side over its short one", min=1.0, max=8.0)
    min_side: int = images(
        0,
        "leave out images whose short side has fewer pixels; 0: none, small images are enlarged and counted",
        min=0,
        max=8192,
    )
    flip: bool = images(False, "also learn every image mirrored; wrong for text and for faces' asymmetries")
    random_crops: int = images(
        0, "cached random crops per image, drawn among while training; 0: the centre", min=0, max=64
    )
    posterior: str = images(
        "sample", "sample: draw latents from the VAE's posterior; mean: its mean", choices=("sample", "mean")
    )
    cache: str = images(
        "", "folder of cached latents, which runs share; empty: the user's cache folder", path=True, free=True
    )
    within: tuple[str, ...] = images(
        (),
        "folders outside of which no image is read, wherever links and patterns lead; none: no bounds",
        path=True,
        free=True,
    )
    caching_batch: int = images(
        8,
        "images the VAE encodes at once while filling the cache, on a GPU; of more than 512 x 512 pixels fewer, as "
        "their area says; on the CPU always one, so that a latent depends on its image alone",
        min=1,
        max=256,
        free=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("resolution", self.resolution, STEP, STEP)
        check_multiple("bucket_step", self.bucket_step, STEP, STEP)

    @property
    def sizes(self) -> list[Size]:
        """The shapes (height, width) that images are cut to."""
        return bucket_sizes(self.resolution, self.bucket_step, self.bucket_max_ratio if self.buckets else 1.0)
