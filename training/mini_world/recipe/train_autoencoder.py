"""Stage 1 of the recipe: the autoencoder, on both worlds in all 56 colour pairs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from ....guidance.networks.autoencoder import Autoencoder, AutoencoderConfig, kl_divergence
from .. import render
from .loop import LoopConfig, run_loop

CONFIG = AutoencoderConfig(ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1)
LOOP = LoopConfig(name="autoencoder", steps=3000, rate=2e-3, weight_decay=0.0)
BATCH = 24
KL_WEIGHT = 1e-4  # per latent number; keeps the latents near a Gaussian without costing sharpness
SQUARED_WEIGHT = 4.0  # beside the absolute error: PSNR counts squares


def both_worlds(count: int, generator: Generator, *, held_out: bool = False) -> render.Pictures:
    """Half rendered, half handwritten pictures in all 56 colour pairs.

    held_out: from the fonts and rows that no generative model trained on, instead of those they did.
    """
    rows = render.HELD_OUT_ROWS if held_out else render.TRAIN_ROWS
    printed = render.rendered(count // 2, generator, held_out=held_out)
    written = render.handwritten(rows, render.colour_pairs(), generator, count=count - count // 2)
    return render.Pictures(*(torch.cat([getattr(printed, f.name), getattr(written, f.name)]) for f in fields(printed)))


def reconstruction_loss(model: Autoencoder, generator: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
    """Absolute + squared error + KL of one batch."""
    images = both_worlds(BATCH, generator).images
    mean, logvar = model.encode(images)
    mean, logvar = mean.float(), logvar.float()
    latent = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
    error = model.decode(latent).float() - images
    kl = kl_divergence(mean, logvar).mean() / mean[0].numel()
    squared = error.square().mean()
    loss = error.abs().mean() + SQUARED_WEIGHT * squared + KL_WEIGHT * kl
    psnr = float(10 * torch.log10(4 / squared.detach()))
    return loss, {"psnr": psnr, "kl": float(kl.detach()), "std": float(mean.detach().std())}


def train(work: Path, seed: int = 0) -> Autoencoder:
    """Train (or finish) the autoencoder in folder ``work``."""
    torch.manual_seed(seed)
    return run_loop(replace(LOOP, seed=seed), Autoencoder(CONFIG), reconstruction_loss, work)
