"""A term's direction split into low and high spatial frequencies, each with a weight of its own.

Two terms of one source, `Term(..., w_low, shaping=LowPass(width))` and `Term(..., w_high, shaping=HighPass(width))`,
make w_low L(d) + w_high (d - L(d)): the two bands of a Laplacian pyramid (Burt and Adelson 1983) without its smaller
grids. The source is evaluated once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedules import GuidanceError
from .shaping import Shaping

__all__ = ["Bands", "HighPass", "LowPass"]


def _check_width(width: float) -> None:
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not width > 0:
        raise GuidanceError(f"Expected the width of a frequency split to be above 0 latent pixels, got {width!r}.")


def blur(values: Tensor, width: float) -> Tensor:
    """A Gaussian of standard deviation `width` pixels over the last two dimensions, edges repeated; inf is the mean."""
    if math.isinf(width):
        return values.mean((-2, -1), keepdim=True).expand_as(values)
    planes = values.reshape(-1, 1, *values.shape[-2:])
    radius = math.ceil(3 * width)
    offsets = torch.arange(-radius, radius + 1, dtype=planes.dtype, device=planes.device)
    kernel = (-0.5 * (offsets / width).square()).exp()
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1, 1)
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), mode="replicate"), kernel)
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode="replicate"), kernel.transpose(2, 3))
    return planes.reshape(values.shape)


@dataclass(frozen=True)
class LowPass(Shaping):
    """S(d) = L(d): the coarse part of a direction, such as its colours and where things are.

    width: standard deviation of the Gaussian in latent pixels, above 0 (there is no neutral value; very small ones
    change next to nothing); math.inf keeps each channel's mean alone. Raises GuidanceError for other values.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        _check_width(self.width)

    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """direction [B, ..., H, W] -> the same shape."""
        return blur(direction, self.width)


@dataclass(frozen=True)
class HighPass(Shaping):
    """S(d) = d - L(d): what `LowPass` of the same width leaves, such as strokes and texture."""

    width: float = 1.0

    def __post_init__(self) -> None:
        _check_width(self.width)

    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """direction [B, ..., H, W] -> the same shape."""
        return direction - blur(direction, self.width)


@dataclass(frozen=True)
class Bands(Shaping):
    """S(d) = low L(d) + high (d - L(d)), L the Gaussian of `LowPass`: both bands of a direction in one term.

    Two terms of one source, `LowPass` and `HighPass`, have the same sum, but count the weight twice in the W that
    methods made for CFG see, and have two names where other terms refer to one. width: of L in latent pixels, inf for
    each channel's mean. low, high: factors of the term's weight; 1 and 1 are neutral. Raises GuidanceError for a width
    not above 0 and factors that are not finite.
    """

    width: float
    low: float
    high: float

    def __post_init__(self) -> None:
        LowPass(self.width)
        for band, strength in (("low", self.low), ("high", self.high)):
            if not math.isfinite(strength):
                raise GuidanceError(f"Expected the strength of the {band} band to be finite, got {strength}.")

    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """direction [B, ..., H, W] -> the same shape."""
        return self.high * direction + (self.low - self.high) * LowPass(self.width)(direction, ())
