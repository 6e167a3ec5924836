"""What a critic sees of a generator's images, and the latents of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ImageEncoder:
    """Images [B, 3, H, W], about -1..1 -> latents [B, C, h, w] of a critic, differentiable.

    As in StyleGAN-Fusion (arXiv 2212.04473): resized to side x side px (bilinear; None: as they are), clamped to -1..1,
    and then encoded. encode: images [B, 3, side, side] in -1..1 -> latents, scaled as the critic's models expect.
    `Objective` resizes and clamps by itself, since some of what it does happens between clamp and encode.
    """

    encode: Callable[[Tensor], Tensor]
    side: int | None = None

    def resize(self, images: Tensor) -> Tensor:
        """Images at the size at which they are judged; the same tensor where they have it."""
        if self.side is None or images.shape[-2:] == (self.side, self.side):
            return images
        return F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)

    def __call__(self, images: Tensor) -> Tensor:
        return self.encode(self.resize(images).clamp(-1.0, 1.0))
