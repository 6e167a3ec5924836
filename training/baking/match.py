"""How well a baked model matches its guidance on held-out pictures, at fixed noise levels with fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..domain.held_out import TIMESTEPS
from ..domain.losses import abar_at, add_noise
from ..engine.randomness import sample_generator
from ..prior.prior import ImageSize, Prior
from .prompts import EncodedTexts
from .states import Batch
from .teacher import Teacher


@torch.no_grad()
def unmatched(
    unet: nn.Module,
    teacher: Teacher,
    texts: EncodedTexts,
    latents: Sequence[Tensor],
    keys: Sequence[str],
    sizes: Sequence[ImageSize] | None = None,
    *,
    seed: int = 0,
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[float, dict[int, float]]:
    """(mean over noise levels, {timestep: share}): the share of the baked change that a network lacks.

    |output - target|^2 / |prior's output - target|^2, summed over the latents: 1 is the prior as it was, 0 the guidance
    itself. latents: scaled, [C, h, w]; keys: what stands for each; sizes: what SDXL is told of each, None for their
    own. Noise and prompt of a latent depend on (seed, key, timestep) alone. NaN and nothing when should_stop() asks to
    stop. Where nothing is baked in at a level it has none.
    """
    prior, device = teacher.prior, teacher.device
    if sizes is None:
        sizes = [ImageSize((prior.factor * one.shape[-2], prior.factor * one.shape[-1])) for one in latents]
    shares = {}
    for t in TIMESTEPS:
        parts = [
            _noised(latent, key, size, t, prior, len(texts), seed) for latent, key, size in zip(latents, keys, sizes)
        ]
        missing = whole = 0.0
        for some in [piece for joined in Batch.joined(parts) for piece in joined.split(batch)]:
            if should_stop():
                return float("nan"), {}
            noisy, timesteps = some.noisy.to(device), some.timesteps.to(device)
            empty, prompted = texts.pair(some.sizes, some.places, device)
            target = teacher.target(noisy, timesteps, empty, prompted, some.sizes)
            before = teacher.output(noisy, timesteps, teacher.before, **prompted)
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                output = unet(noisy, timesteps, **prompted)
            missing += float((output.float() - target).double().square().sum())
            whole += float((before - target).double().square().sum())
        if whole > 0:
            shares[t] = missing / whole
    return sum(shares.values()) / len(shares) if shares else 0.0, shares


def _noised(latent: Tensor, key: str, size: ImageSize, t: int, prior: Prior, prompts: int, seed: int) -> Batch:
    """One latent at the noise level of timestep t of 1000, with a prompt of its own."""
    generator = sample_generator(seed, 0, key, f"held out/{t}")
    noise = torch.randn(latent.shape, generator=generator)
    place = torch.randint(prompts + 1, (1,), generator=generator)
    timesteps = torch.tensor([round(t * (len(prior.schedule) - 1) / 999)])
    noisy = add_noise(latent[None].float(), noise[None], abar_at(prior.schedule, timesteps))
    return Batch(noisy, timesteps, place, (size,))
