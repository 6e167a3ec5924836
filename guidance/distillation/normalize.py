"""n(e): a prediction brought to unit root mean square, per sample."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(e: Tensor) -> Tensor:
    """n(e) = e sqrt(CHW) / ||e||_2 of StyleGAN-Fusion (arXiv 2212.04473), for each sample of e [B, C, h, w].

    The released code takes one norm over the batch and is right for batch 1 only. Zero stays zero.
    """
    over = tuple(range(1, e.ndim))
    size = e.square().mean(over, keepdim=True).sqrt()
    return e / size.clamp(min=torch.finfo(e.dtype).tiny)
