"""Noising, targets and loss weights of the variance-preserving process z_t = sqrt(abar) z + sqrt(1 - abar) noise.

Timesteps are drawn, noise is added and the loss is weighed per sample, in float32 whatever the network computes in.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ...guidance.diffusion import PREDICTION_TYPES, NoiseSchedule
from ...guidance.errors import Problem


def draw_timestep(generator: Generator, count: int, noisy_share: float = 0.0) -> int:
    """A timestep of 0..count-1, uniform; with probability `noisy_share` (0: never) from the noisier half only."""
    share, position = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    first = count // 2 if share < noisy_share else 0
    return first + int(position * (count - first))


def draw_noise(generator: Generator, shape: tuple[int, ...], offset: float = 0.0) -> Tensor:
    """Normal noise [C, h, w]; `offset` (0: none) adds a normal constant per channel of that standard deviation.

    The offset lets a model learn very dark and very bright pictures (crosslabs.org, "Diffusion with Offset Noise").
    """
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn((shape[0], 1, 1), generator=generator)
    return noise


def add_noise(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """arXiv 2006.11239, eq. 4: sqrt(abar) x0 + sqrt(1 - abar) noise. x0, noise [B, C, h, w]; abar [B]."""
    abar = _wide(abar, x0)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def target_of(prediction_type: str, x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """What the network should output: noise, v = sqrt(abar) noise - sqrt(1 - abar) x0 (arXiv 2202.00512), or x0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        abar = _wide(abar, x0)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0
    if prediction_type == "sample":
        return x0
    raise Problem(f"Prediction type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")


def min_snr_weight(prediction_type: str, abar: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weights (arXiv 2303.09556, section 3.4): the loss on x0 weighed by min(SNR, gamma).

    SNR = abar / (1 - abar). On the prior's own parameterisation that is min(SNR, gamma) / SNR for epsilon,
    min(SNR, gamma) / (SNR + 1) for v and min(SNR, gamma) for sample. gamma 0 is the plain loss, weight 1. Finite for
    every abar in 0..1 (a zero-SNR schedule ends near 0: epsilon's weight is 1 there, v's and sample's near 0).
    abar [B] -> [B].
    """
    if gamma <= 0:
        return torch.ones_like(abar)
    # With abar and 1 - abar instead of their quotient nothing is divided by zero.
    clear = (gamma * (1 - abar)).minimum(abar)  # min(SNR, gamma) (1 - abar); SNR + 1 = 1 / (1 - abar)
    if prediction_type == "v_prediction":
        return clear
    if prediction_type == "epsilon":
        return torch.where(abar > 0, clear / abar.clamp(min=torch.finfo(abar.dtype).tiny), 1.0)
    return torch.where(abar < 1, clear / (1 - abar).clamp(min=torch.finfo(abar.dtype).tiny), gamma)


def sample_losses(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared error of each sample in float32: [B, C, h, w] twice and [B] -> [B]."""
    return weight * (output.float() - target.float()).square().mean(dim=(1, 2, 3))


def abar_at(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """abar [B] of whole timesteps [B] long."""
    return schedule.alphas_cumprod.to(timesteps.device)[timesteps]


def _wide(abar: Tensor, like: Tensor) -> Tensor:
    return abar.reshape(-1, *[1] * (like.ndim - 1))
