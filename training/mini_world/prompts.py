"""Prompts of the mini world: drawn, sampled with any guidance, and the exact pictures that answer them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...guidance import presets
from ...guidance.combination import Guidance
from ...guidance.multi_guidance import MultiGuidance
from ...guidance.sampling import sample, sigmas_uniform
from . import render
from .assets import MiniWorld


@dataclass(frozen=True)
class Prompts:
    """What is asked for: digits [N], colour pairs [N, 2] and the captions that say so."""

    digits: Tensor
    pairs: Tensor
    captions: tuple[str, ...]


def draw_prompts(count: int, pairs: Tensor, seed: int = 0) -> Prompts:
    """``count`` prompts, digits in equal shares, colour pairs drawn from ``pairs`` [options, 2]."""
    generator = Generator().manual_seed(seed)
    digits = torch.arange(count) % 10
    chosen = pairs[torch.randint(len(pairs), (count,), generator=generator)]
    texts = tuple(render.caption(int(d), int(i), int(g)) for d, (i, g) in zip(digits, chosen.tolist()))
    return Prompts(digits, chosen, texts)


def target_pictures(
    digits: Tensor, pairs: Tensor, rows: slice = render.HELD_OUT_ROWS, seed: int = 0
) -> render.Pictures:
    """The exact answers to prompts: handwriting of the same digits, digit by digit, in the prompted colours.

    digits [N] and pairs [N, 2]; every handwritten image of a digit is used before one is used twice.
    """
    images, labels = render.load_handwriting(rows)
    generator, chosen = Generator().manual_seed(seed), torch.empty(len(digits), dtype=torch.long)
    for digit in digits.unique():
        wanted = (digits == digit).nonzero()[:, 0]
        have = (labels == digit).nonzero()[:, 0]
        rounds = -(-len(wanted) // len(have))
        order = torch.cat([have[torch.randperm(len(have), generator=generator)] for _ in range(rounds)])
        chosen[wanted] = order[: len(wanted)]
    painted = render.paint(render.handwriting_masks(images[chosen]), pairs)
    return render.Pictures(painted, digits, pairs[:, 0], pairs[:, 1], torch.ones(len(digits), dtype=torch.long))


@torch.no_grad()
def sample_prompts(
    world: MiniWorld,
    guidance_of: Callable[[dict, dict], Guidance],
    prompts: Prompts,
    *,
    steps: int = 25,
    seed: int = 0,
    batch: int = 250,
    method: str = "dpmpp_2m",
    start: Tensor | None = None,
    denoise: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, float]:
    """Pictures [N, 3, 64, 64] of the prompts and the mean number of samples evaluated a step.

    guidance_of(uncond, cond) gets the two conditionings as dictionaries and returns the guidance to sample with.
    Noise depends on the seed alone, so that methods are compared on the same noise. start: scaled latents
    [N, 4, 8, 8] of pictures to begin from, noised as the last `denoise` (0..1) of sampling needs, which takes all
    steps, as in ComfyUI. progress(done, total) is called after each batch.
    """
    noise = torch.randn(len(prompts.captions), 4, 8, 8, generator=Generator().manual_seed(seed))
    empty, pictures, counts = world.encode_text([""]), [], []
    sigmas = sigmas_uniform(world.schedule, round(steps / denoise))[-(steps + 1) :]
    if start is not None:
        noise = noise + start / sigmas[0].float()  # the sampler multiplies by the first noise level
    for first in range(0, len(noise), batch):
        part = slice(first, first + batch)
        guidance = guidance_of({"context": empty}, {"context": world.encode_text(prompts.captions[part])})
        guided = MultiGuidance(guidance, percent_to_sigma=world.schedule.percent_to_sigma)
        pictures.append(world.decode(sample(guided, noise[part], sigmas, method)))
        counts += guided.samples_per_step
        progress(min(first + batch, len(noise)), len(noise))
    return torch.cat(pictures), sum(counts) / len(counts)


def cfg_of(world: MiniWorld, scale: float) -> Callable[[dict, dict], Guidance]:
    """For `sample_prompts`: the prior alone with classifier-free guidance."""
    return lambda uncond, cond: presets.cfg(world.prior, uncond, cond, scale)
