"""Stage 5 of the recipe: a StyleGAN2 generator of handwritten digits, white on black, without any labels.

It grows once: a step at 32 px costs two thirds of one at 64 px, and 28 px scans hold hardly more detail. The blocks of
64 px are then added, which changes nothing at first, and learn to sharpen the picture. The networks see one grey
channel; as every picture is grey, the shipped generator's three channels are that one, so that recolouring its samples
is exact.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ....guidance.networks.stylegan2 import StyleGAN2, random_generator
from ....guidance.networks.stylegan2_config import GeneratorConfig
from .. import render
from .adversarial import AdversarialConfig, Pair, pair_of, run_adversarial
from .discriminator import Discriminator

CONFIG = GeneratorConfig(  # no noise inputs: handwriting has no grain, and so the latent alone decides the picture
    resolution=render.SIDE_PX, channels=(128, 128, 64, 32, 16), z_dim=128, w_dim=128, mapping_layers=2, use_noise=False
)
FILE_NAME = "mini-handwriting"
CRITIC_CHANNELS = (128, 128, 64, 32, 16)
# At half the side, then at the full one, where the rate falls.
SMALL_LOOP = AdversarialConfig(name="generator-32", steps=3700, rate=2.5e-3, warmup=0.01, ema=0.998)
LOOP = replace(SMALL_LOOP, name="generator-64", steps=2000, fall=0.6)


def real_pictures(count: int, generator: Generator, side: int = render.SIDE_PX) -> Tensor:
    """Random training handwriting, white on black: [count, 1, side, side] in -1..1."""
    images, _ = render.load_handwriting(render.TRAIN_ROWS)
    masks = render.handwriting_masks(images[torch.randint(len(images), (count,), generator=generator)])[:, None]
    return F.avg_pool2d(masks, render.SIDE_PX // side) * 2.0 - 1.0


def latents(count: int, generator: Generator) -> Tensor:
    return torch.randn(count, CONFIG.z_dim, generator=generator)


def fresh_pair(side: int, seed: int) -> Pair:
    """Untrained networks for pictures of ``side`` pixels."""
    blocks = side.bit_length() - 2
    config = replace(CONFIG, resolution=side, channels=CONFIG.channels[:blocks], img_channels=1)
    torch.manual_seed(seed)
    return pair_of(random_generator(config, seed), Discriminator(CRITIC_CHANNELS[:blocks]))


@torch.no_grad()
def grown(generator: StyleGAN2, smaller: StyleGAN2) -> StyleGAN2:
    """``generator`` with the weights of one of half the side, whose picture, enlarged, it makes at first.

    Skip architecture (arXiv 1912.04958, section 4.1): the picture is a sum over resolutions, and the newest part of the
    sum starts at zero.
    """
    found = generator.load_state_dict(smaller.state_dict(), strict=False)
    assert not found.unexpected_keys
    last = generator.config.resolution
    for key, parameter in generator.named_parameters():
        if f"b{last}.torgb" in key and "affine" not in key:
            parameter.zero_()
    return generator


@torch.no_grad()
def shipped_form(grey: StyleGAN2, seed: int) -> StyleGAN2:
    """The three-channel generator whose every channel is ``grey``'s one, its mean style measured."""
    weights = dict(grey.state_dict())
    for key, value in weights.items():
        if key.endswith((".torgb.weight", ".torgb.bias")):
            weights[key] = value.repeat_interleave(CONFIG.img_channels, 0)
    model = StyleGAN2(CONFIG)
    model.load_state_dict(weights)
    cast(Tensor, model.mapping.w_avg).copy_(model.mean_style(seed=seed))
    return model.eval().requires_grad_(False)


def train(work: Path, seed: int = 0) -> StyleGAN2:
    """Train (or finish) the generator in folder ``work``, first at 32 px, then at 64 px; the average, in fp32."""
    seed, side = seed + 10, render.SIDE_PX
    small = run_adversarial(
        replace(SMALL_LOOP, seed=seed),
        fresh_pair(side // 2, seed),
        lambda count, generator: real_pictures(count, generator, side // 2),
        latents,
        work,
    )
    pair = fresh_pair(side, seed + 1)
    pair.discriminator.grown_from(small.discriminator)
    for name in ("generator", "average"):
        grown(getattr(pair, name), getattr(small, name))
    loop = replace(LOOP, seed=seed + 1)
    return shipped_form(run_adversarial(loop, pair, real_pictures, latents, work).average, seed)
