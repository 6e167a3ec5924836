"""How well a baked model matches its guidance on held-out pictures, at fixed noise levels with fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..domain.held_out import TIMESTEPS
from ..domain.losses import abar_at, add_noise
from ..engine.randomness import sample_generator
from ..prior.prior import ImageSize
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
    *,
    seed: int = 0,
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[float, dict[int, float]]:
    """(mean over noise levels, {timestep: share}): the share of the baked change that a network lacks.

    |output - target|^2 / |prior's output - target|^2, summed over the latents: 1 is the prior as it was, 0 the guidance
    itself. latents: scaled, [C, h, w]; keys: what stands for each. Noise and prompt of a latent depend on (seed, key,
    timestep) alone. NaN and nothing when should_stop() asks to stop. Where nothing is baked in at a level it has none.
    """
    schedule, device = teacher.prior.schedule, teacher.device
    shares = {}
    for t in TIMESTEPS:
        level = round(t * (len(schedule) - 1) / 999)
        missing = whole = 0.0
        for some in _batches(latents, keys, texts, schedule, teacher.prior.factor, seed, t, level, batch):
            if should_stop():
                return float("nan"), {}
            noisy, timesteps = some.noisy.to(device), some.timesteps.to(device)
            empty = texts.conditioning(some.sizes, torch.zeros_like(some.places), device)
            prompted = texts.conditioning(some.sizes, some.places, device) if bool(some.places.any()) else empty
            target = teacher.target(noisy, timesteps, empty, prompted, some.sizes)
            before = teacher.output(noisy, timesteps, teacher.before, **prompted)
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                output = unet(noisy, timesteps, **prompted)
            missing += float((output.float() - target).double().square().sum())
            whole += float((before - target).double().square().sum())
        if whole > 0:
            shares[t] = missing / whole
    return sum(shares.values()) / len(shares) if shares else 0.0, shares


def _batches(latents, keys, texts, schedule, factor, seed, t, level, size):
    """The latents noised to one level, in batches of one shape each."""
    parts = []
    for latent, key in zip(latents, keys):
        generator = sample_generator(seed, 0, key, f"held out/{t}")
        noise = torch.randn(latent.shape, generator=generator)
        place = int(torch.randint(len(texts) + 1, (), generator=generator))
        timesteps = torch.tensor([level])
        noisy = add_noise(latent[None].float(), noise[None], abar_at(schedule, timesteps))
        pixels = ImageSize((factor * latent.shape[-2], factor * latent.shape[-1]))
        parts.append(Batch(noisy, timesteps, torch.tensor([place]), (pixels,)))
    for whole in Batch.joined(parts):
        yield from whole.split(size)
