"""A term's direction split into low and high spatial frequencies, each with a strength of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GuidanceError
from .options import check_options, option
from .shaping import Shaping


def blur(values: Tensor, width: float) -> Tensor:
    """A Gaussian of standard deviation `width` pixels over the last two dimensions [..., H, W], edges repeated.

    An infinite width gives each channel's mean.
    """
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
class Bands(Shaping):
    """S(d) = low L(d) + high (d - L(d)): the two bands of a Laplacian pyramid (Burt and Adelson 1983), full size.

    L is a Gaussian blur of standard deviation `width` in latent pixels, above 0; inf takes each channel's mean. L(d) is
    the coarse part of a direction, such as its colours and where things are, d - L(d) the rest, such as strokes and
    texture. low_strength, high_strength: factors of the term's weight; 1 and 1 are neutral, 1 and 0 a low-pass, 0 and 1
    a high-pass filter. Raises GuidanceError for a width not above 0 and strengths that are not finite.
    """

    width: float = option(
        1.0,
        "the size in latent pixels (8 image pixels each in Stable Diffusion) above which detail is coarse. Typical 0.5 "
        "to 4, default 1; none is neutral",
        min=0.1,
        max=64.0,
        step=0.1,
        advanced=True,
    )
    low_strength: float = option(
        0.2,
        "what share of the term's weight its coarse part, or its mean, gets. 1 is neutral, 0 removes it and leaves "
        "colours to the other terms, negative values push away. Typical 0 to 0.5, default 0.2",
        min=-10.0,
        max=10.0,
        step=0.05,
    )
    high_strength: float = option(
        1.0,
        "what share of the term's weight its fine part (strokes, texture), or all but its mean, gets. 1 (the default) "
        "is neutral, 0 removes it",
        min=-10.0,
        max=10.0,
        step=0.05,
    )

    name = "frequencies"
    summary = "splits the term into coarse and fine detail, weighed by low_strength and high_strength"

    def __post_init__(self) -> None:
        check_options(self)
        if not self.width > 0:
            raise GuidanceError(f"Expected the width of a frequency split to be above 0, got {self.width}.")
        if math.isinf(self.low_strength) or math.isinf(self.high_strength):
            raise GuidanceError(f"Expected finite strengths, got {self.low_strength} and {self.high_strength}.")

    @property
    def is_neutral(self) -> bool:
        return self.low_strength == self.high_strength == 1.0

    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """direction [B, ..., H, W] -> the same shape."""
        return self.high_strength * direction + (self.low_strength - self.high_strength) * blur(direction, self.width)


@dataclass(frozen=True)
class Mean(Bands):
    """`Bands` of infinite width: S(d) = low mean(d) + high (d - mean(d)), with each channel's mean."""

    width: float = field(default=math.inf, init=False)

    name = "mean"
    summary = "splits it into the picture's overall colour and the rest, weighed by the same two"
