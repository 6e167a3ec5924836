"""What is looked at in predictions instead of pictures: whether a LoRA's change of them leaves another change alone.

A change is the difference of two predictions of the same noisy latents. Held against each other are the text's,
c - u, without and with the baked LoRA, and another LoRA's, likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ....guidance.diffusion import Denoiser, NoiseSchedule
from ..statistics import Measured, resampling_counts

LEVELS = (50, 200, 400, 600, 800, 950)  # timesteps of 0..999
MOST = 200  # latents of a point
BATCH = 100
# A prediction of noisy latents at a noise level [B], at texts [B, T, D].
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


class Sums(NamedTuple):
    """Of each latent [N] at one noise level: |change|^2, |other change|^2, their product, |change - other change|^2."""

    ours: Tensor
    theirs: Tensor
    product: Tensor
    difference: Tensor


def of_text(model: Denoiser, empty: Tensor) -> Change:
    """c - u."""

    def change(x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return model(x, sigma, context=text) - model(x, sigma, context=empty.expand(len(x), -1, -1))

    return change


def of_weights(model: Denoiser, before: Denoiser) -> Change:
    """What other weights make of a prediction at the prompt."""

    def change(x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return model(x, sigma, context=text) - before(x, sigma, context=text)

    return change


@torch.no_grad()
def compare(
    ours: Change,
    theirs: Change,
    latents: Tensor,
    texts: Tensor,
    schedule: NoiseSchedule,
    digits: Tensor,
    replicates: int,
    seed: int,
) -> tuple[dict[str, Measured], dict[str, float]]:
    """How far a change is from another one, on scaled latents [N, C, h, w] noised to LEVELS, at texts [N, T, D].

    error: |ours - theirs| / |theirs|, the root of the mean of squares over latents and levels, each level relative to
    itself; cosine: of all latents at a level, the mean over levels. Both also at each level, as `error_at_50`. Latents
    are resampled within digits [N].
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    counts = resampling_counts(digits, replicates, seed)
    counts = torch.cat([torch.ones(1, len(digits), dtype=torch.float64), counts])
    errors, cosines, numbers = [], [], {}
    for level in LEVELS:
        sigma = float(schedule.sigma(level))
        sums = _sums(ours, theirs, latents + sigma * noise, sigma, texts)
        own, other, product, difference = (counts @ part for part in sums)
        errors.append(difference / other)
        cosines.append(product / (own * other).sqrt().clamp(min=1e-12))
        numbers |= {f"error_at_{level}": float(errors[-1][0].sqrt()), f"cosine_at_{level}": float(cosines[-1][0])}
    found = {"error": torch.stack(errors).mean(0).sqrt(), "cosine": torch.stack(cosines).mean(0)}
    measured = {name: Measured(float(values[0]), float(values[0]), values[1:]) for name, values in found.items()}
    return measured, {**{name: one.value for name, one in measured.items()}, **numbers}


def _sums(ours: Change, theirs: Change, noisy: Tensor, sigma: float, texts: Tensor) -> Sums:
    parts = []
    for x, text in zip(noisy.split(BATCH), texts.split(BATCH)):
        levels = torch.full((len(x),), sigma)
        a, b = (change(x, levels, text).double().flatten(1) for change in (ours, theirs))
        parts.append(Sums(a.square().sum(1), b.square().sum(1), (a * b).sum(1), (a - b).square().sum(1)))
    return Sums(*(torch.cat(some) for some in zip(*parts)))
