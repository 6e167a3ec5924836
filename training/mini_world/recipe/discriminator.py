"""A small StyleGAN2 discriminator; it only trains the mini world's generator and does not ship."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE, GAIN = 0.2, math.sqrt(2.0)  # of the leaky ReLU, and what restores the variance that it takes
SMALLEST = 4  # side of the last feature map in pixels


class ScaledConv(nn.Module):
    """Convolution whose unit-variance weights are scaled at run time by 1 / sqrt(fan in) (arXiv 1710.10196, 4.1)."""

    def __init__(self, before: int, after: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, side, side))
        self.bias = nn.Parameter(torch.zeros(after))
        self.scale = 1.0 / math.sqrt(before * side * side)

    def forward(self, x: Tensor) -> Tensor:
        side = self.weight.shape[-1]
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=side // 2)


def activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE) * GAIN


def batch_deviation(x: Tensor, group: int) -> Tensor:
    """Minibatch standard deviation (arXiv 1710.10196, section 3) as one more channel: [B, C, H, W] -> [B, C + 1, H, W].

    One number for each group of ``group`` images (or as many as there are, if fewer): how unlike each other they are.
    Members of a group stand B / group apart.
    """
    batch, _, height, width = x.shape
    group = min(group, batch)
    y = x.reshape(group, batch // group, *x.shape[1:])
    deviation = (y - y.mean(0)).square().mean(0).add(1e-8).sqrt().mean(dim=(1, 2, 3))
    return torch.cat([x, deviation.repeat(group)[:, None, None, None].expand(batch, 1, height, width)], dim=1)


class Discriminator(nn.Module):
    """Grey pictures [B, 1, R, R] in -1..1 -> logits [B], above 0 for what looks real (arXiv 1912.04958, section 4.1).

    channels: of the feature maps of side 4, 8, .., R. The picture enters at every resolution (input skips), so that a
    discriminator of half the side is a part of this one: see :meth:`grown_from`.
    """

    def __init__(self, channels: tuple[int, ...], group: int = 4) -> None:
        super().__init__()
        self.channels, self.group = tuple(channels), group
        self.sides = tuple(SMALLEST << level for level in range(len(channels)))
        for side, width in zip(self.sides, channels):
            setattr(self, f"from_grey{side}", ScaledConv(1, width, 1))
        for side, below, width in zip(self.sides[1:], channels, channels[1:]):
            setattr(self, f"keep{side}", ScaledConv(width, width, 3))
            setattr(self, f"down{side}", ScaledConv(width, below, 3))
        self.last = ScaledConv(channels[0] + 1, channels[0], 3)
        self.hidden = ScaledConv(channels[0], channels[0], SMALLEST)
        self.logit = ScaledConv(channels[0], 1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        x, seen = pictures, pictures
        for side in reversed(self.sides):
            enters = activate(getattr(self, f"from_grey{side}")(seen))
            x = enters if side == self.sides[-1] else (x + enters) / GAIN
            if side > SMALLEST:
                x = activate(getattr(self, f"keep{side}")(x))
                # Average before the convolution rather than blur after it: the same response at a quarter of the cost.
                x, seen = activate(getattr(self, f"down{side}")(F.avg_pool2d(x, 2))), F.avg_pool2d(seen, 2)
        with torch.autocast(x.device.type, enabled=False):  # small differences decide from here on
            x = activate(self.last(batch_deviation(x.float(), self.group)))
            x = activate(F.conv2d(x, self.hidden.weight * self.hidden.scale, self.hidden.bias))
            return self.logit(x).flatten()

    @torch.no_grad()
    def grown_from(self, smaller: Discriminator) -> Discriminator:
        """Take over a discriminator of half the side; this one answers nearly as it did, then learns to see more.

        Only nearly: features of the new resolution start at zero, and where they join, the sum is divided by sqrt(2).
        """
        self.load_state_dict(smaller.state_dict(), strict=False)
        join = self.sides[-2]
        getattr(self, f"down{self.sides[-1]}").weight.zero_()
        # activate(GAIN * v) = GAIN * activate(v): the sum is then what the smaller one started with.
        for parameter in getattr(self, f"from_grey{join}").parameters():
            parameter.mul_(GAIN)
        return self
