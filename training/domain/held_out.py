"""The loss on images that are not trained on, at fixed noise levels with fixed noise, so that steps can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...guidance.diffusion import NoiseSchedule
from ...guidance.errors import Problem
from ..engine.randomness import sample_generator
from ..prior.prior import ImageSize
from .losses import abar_at, add_noise, target_of

# Of 1000: from almost clean to almost noise. The high ones decide the composition, the low ones the texture.
TIMESTEPS: tuple[int, ...] = (50, 200, 400, 600, 800, 950)


@torch.no_grad()
def held_out_loss(
    unet: nn.Module,
    schedule: NoiseSchedule,
    prediction_type: str,
    latents: Sequence[Tensor],
    conditioning: Callable[[Sequence[ImageSize]], Mapping[str, Tensor]] | None = None,
    sizes: Sequence[ImageSize] | None = None,
    *,
    keys: Sequence[str] | None = None,
    seed: int = 0,
    batch: int = 4,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[float, dict[int, float]]:
    """(mean over noise levels, {timestep: loss}): mean squared error on the prior's own parameterisation, unweighted.

    latents: scaled, [C, h, w] each, of any shapes. The noise of an image at a level depends on (seed, key, timestep)
    alone, so that it stays the same when other images are held out, too. keys: for each latent what stands for its
    image (`LatentDataset.content_of`); None: its place. conditioning(sizes): what the UNet takes beside x and t
    (`Prior.conditioning`); sizes: of each image, needed where that depends on them. batch: images per forward pass, of
    one shape each. The UNet is used in evaluation mode and left as it was. NaN when should_stop() asks to stop. Raises
    ValueError without latents.
    """
    if len(latents) == 0:
        raise Problem("Held-out loss: expected at least one latent, found none; raise held_out_share.")
    levels = {t: round(t * (len(schedule) - 1) / 999) for t in TIMESTEPS}
    totals = dict.fromkeys(TIMESTEPS, 0.0)
    keys = [str(index) for index in range(len(latents))] if keys is None else keys
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, latent in enumerate(latents):
        groups.setdefault(tuple(latent.shape), []).append(index)
    training = unet.training
    unet.eval()
    try:
        for indices in groups.values():
            for start in range(0, len(indices), batch):
                part = indices[start : start + batch]
                clean = torch.stack([latents[index].float() for index in part])
                cond = {}
                if conditioning is not None:
                    shape = 8 * clean.shape[-2], 8 * clean.shape[-1]
                    told = [ImageSize(shape) if sizes is None else sizes[index] for index in part]
                    cond = {name: value.to(device) for name, value in conditioning(told).items()}
                for t, level in levels.items():
                    if should_stop():
                        return float("nan"), {}
                    generators = [sample_generator(seed, 0, keys[index], f"held out/{t}") for index in part]
                    noise = torch.stack([torch.randn(clean.shape[1:], generator=own) for own in generators])
                    steps = torch.full((len(part),), level, dtype=torch.long)
                    abar = abar_at(schedule, steps)
                    noisy = add_noise(clean, noise, abar)
                    with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32):
                        output = unet(noisy.to(device), steps.to(device), **cond)
                    error = output.float().cpu() - target_of(prediction_type, clean, noise, abar)
                    totals[t] += float(error.square().mean(dim=(1, 2, 3)).double().sum())
    finally:
        unet.train(training)
    per_level = {t: total / len(latents) for t, total in totals.items()}
    return sum(per_level.values()) / len(per_level), per_level
