"""What a seed means: the one rule by which previews, commands and nodes draw a generator's latents."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

LARGEST_SEED = 2**32 - 1
"""Seeds are numbers of 32 bits, as in NVIDIA's tools; of larger ones only these bits count."""


def latents_of_seeds(seeds: Iterable[int], z_dim: int) -> Tensor:
    """Latents z [B, z_dim] in float32 on the CPU, one for each seed, as NVIDIA's StyleGAN tools draw them.

    There seed 7 of a published network is a known picture; NumPy's old generator gives it in every version.
    """
    rows = [np.random.RandomState(seed & LARGEST_SEED).randn(z_dim) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).float() if rows else torch.empty(0, z_dim)
