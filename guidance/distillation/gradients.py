"""From a gradient on latents to one on images: the way back through the encoder, and clamps on both sides of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inject(z: Tensor, gradient: Tensor, images: Tensor, *, retain_graph: bool = False) -> Tensor:
    """The vector-Jacobian product: a gradient on z [B, C, h, w] becomes one on images [B, 3, H, W], in float32.

    The customary (z - (z - gradient).detach())^2 loses gradients that are small against z in half precision; here
    they enter the graph as they are. Where z is float16, whose smallest numbers they may fall below on their way
    through the encoder, they are scaled up by a power of two first, and the scale is lowered where that overflows.
    """
    if z.dtype != torch.float16:
        return torch.autograd.grad(z, images, gradient.to(z.dtype), retain_graph=retain_graph)[0].float()
    largest = float(gradient.abs().max())
    exponent = math.floor(math.log2(256 / largest)) if 0 < largest < math.inf else 0
    while True:
        scale = 2.0**exponent
        result = torch.autograd.grad(z, images, (gradient * scale).to(z.dtype), retain_graph=True)[0].float() / scale
        if bool(result.isfinite().all()) or largest * scale < 2.0**-8 or not math.isfinite(largest):
            return result
        exponent -= 4


def clamp_latent_gradient(gradient: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """StyleGAN-Fusion's clamp of each gradient on z to +-limit, after its weight (arXiv 2212.04473, released code).

    limit: above 0, 1 as released; None is neutral. Returns the gradient and the share of values that were changed.
    """
    if limit is None:
        return gradient, gradient.new_zeros(())
    return gradient.clamp(-limit, limit), (gradient.abs() > limit).to(gradient.dtype).mean()


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of each row of values [B, N], between order statistics; torch.quantile takes few values only."""
    count = values.shape[1]
    position = q * (count - 1)
    low = math.floor(position)
    if values.device.type in ("cpu", "cuda"):  # selecting is several times faster than sorting; not all devices can
        below, above = (values.kthvalue(min(k, count), dim=1).values for k in (low + 1, low + 2))
    else:
        ordered = values.sort(dim=1).values
        below, above = ordered[:, low], ordered[:, min(low + 1, count - 1)]
    return torch.lerp(below, above, position - low)


def clamp_image_gradient(gradient: Tensor, q: float | None) -> tuple[Tensor, Tensor]:
    """StyleGAN-Fusion's clamp of the image gradient [B, 3, H, W] at the q-quantile of its absolute values, per sample.

    The gradient is that on the images as they are judged, before it goes back through their clamp and resize. q: above
    0, 0.95 as released; None (or 1) is neutral. Returns the gradient and the share of values that were changed.
    """
    if q is None or q == 1:
        return gradient, gradient.new_zeros(())
    size = gradient.flatten(1).abs()
    limit = quantile(size, q)
    wide = limit.reshape(-1, *[1] * (gradient.ndim - 1))
    # What is not finite stays so: a clamp must not hide that something overflowed.
    clamped = torch.where(gradient.isfinite(), gradient.clamp(-wide, wide), gradient)
    return clamped, (size > limit[:, None]).to(gradient.dtype).mean()


def lead_back(gradient: Tensor, images: Tensor, bound: float = 1.0, share: float = 1.0) -> Tensor:
    """The gradient on images that are shown clamped to +-bound: beyond it, only a share of what leads back is kept.

    gradient: that on the clamped images; inside the bound it stays, and what leads further out becomes 0. share: 1 is
    the projected gradient, 0 that of a clamp.
    """
    beyond = images.abs() > bound
    outward = images.sign() * gradient < 0  # descent goes against it
    return torch.where(beyond, torch.where(outward, 0.0, share * gradient), gradient)
