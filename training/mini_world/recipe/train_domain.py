"""Stage 4 of the recipe: text-free domain models (arXiv 2312.08195, section 3.2) on handwriting, without any labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from ....guidance.diffusion import NoiseSchedule
from ....guidance.networks.autoencoder import Autoencoder
from ....guidance.networks.unet import UNet
from ....guidance.networks.unet_config import UNetConfig
from ....guidance.null_text import NullContext, build_cached
from .. import render
from .loop import LoopConfig, run_loop
from .train_prior import NOISY_SHARE, cached_latents, loss_weight, noised

DOMAINS = ("handwriting", "narrow")
FILE_NAMES = {"handwriting": "mini-handwriting", "narrow": "mini-narrow-handwriting"}
LOOP = LoopConfig(name="domain", steps=700, rate=8e-4, ema=0.995, bf16=False)
BATCH = 64
BLOCKS = 100  # in which the training images are encoded
COLOURINGS = 2  # colour pairs drawn for each handwritten image of the coloured domain


def handwriting_latents(work: Path, domain: str, autoencoder: Autoencoder, seed: int) -> Tensor:
    """Latents of the 8,000 training images in the domain's colours: [N, 4, 8, 8], unscaled."""
    pairs = render.domain_pairs(domain)
    copies = COLOURINGS if len(pairs) > 1 else 1
    rows = render.TRAIN_ROWS.stop // BLOCKS

    def draw(block: int) -> Tensor:
        generator, part = render.step_generator(seed + 5, block), slice(block * rows, (block + 1) * rows)
        return torch.cat([render.handwritten(part, pairs, generator).images for _ in range(copies)])

    drawn = f"{copies} x {rows} a block, seed {seed}"
    return cached_latents(work, domain, autoencoder, BLOCKS, draw, drawn).flatten(0, 1)


def train(
    work: Path,
    domain: str,
    prior: dict[str, Tensor],
    config: UNetConfig,
    null_context: NullContext,
    autoencoder: Autoencoder,
    scale: float,
    seed: int = 0,
) -> UNet:
    """Train (or finish) the ``cached`` text-free copy of the prior on one domain in folder ``work``."""
    weights, text_free = build_cached(prior, config, null_context)
    model = UNet(text_free)
    model.load_state_dict(weights)
    latents, schedule = handwriting_latents(work, domain, autoencoder, seed) * scale, NoiseSchedule.scaled_linear()

    def loss_of(model: UNet, generator: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        noisy, timesteps, noise = noised(latents[chosen], schedule, generator, NOISY_SHARE)
        error = (model(noisy, timesteps).float() - noise).square().mean(dim=(1, 2, 3))
        return (error * loss_weight(schedule, timesteps)).mean(), {}

    seed += 6 + DOMAINS.index(domain)
    loop = replace(LOOP, name=f"domain-{domain}", seed=seed)
    return run_loop(loop, model, loss_of, work)
