"""A seed's latents are NVIDIA's, whatever the batch."""

from __future__ import annotations

import numpy as np
import torch
from indomain_guidance.guidance.networks.seeds import LARGEST_SEED, latents_of_seeds


def test_each_seed_has_its_own_latent():
    z = latents_of_seeds([7, 0, LARGEST_SEED, LARGEST_SEED + 8], 8)
    assert z.shape == (4, 8) and z.dtype == torch.float32
    assert np.array_equal(z[0].numpy(), np.random.RandomState(7).randn(1, 8)[0].astype(np.float32))
    assert torch.equal(z[3], z[0]) and torch.equal(z[1:2], latents_of_seeds([0], 8))  # 32 bits count
    assert latents_of_seeds([], 8).shape == (0, 8)
