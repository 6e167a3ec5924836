"""Stage 2 of the recipe: the judge on the trained fonts and rows, the second judge on the held-out ones alone.

So what the second judge says of samples cannot come from shapes that generative models and judge have both memorised.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import render
from ..classifier import HEADS, Classifier
from .loop import LoopConfig, run_loop
from .train_autoencoder import both_worlds

LOOP = LoopConfig(name="classifier", steps=2000, rate=3e-3, ema=0.998)
HELD_OUT_LOOP = replace(LOOP, name="classifier_held_out", steps=1000)  # fewer pictures to learn
BATCH = 96


def draw_batch(count: int, generator: Generator, held_out: bool = False) -> render.Pictures:
    """Pictures of `both_worlds`, lightly blurred and noised to hide traces of codecs."""
    pictures = both_worlds(count, generator, held_out=held_out)
    pictures.images = _degrade(pictures.images, generator)
    return pictures


def _degrade(images: Tensor, generator: Generator) -> Tensor:
    batch = len(images)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(batch, 1, 1, 1, generator=generator)
    images = torch.lerp(images, soft, share * (torch.rand(batch, 1, 1, 1, generator=generator) < 0.7))
    tint = 0.06 * torch.randn(batch, 3, 1, 1, generator=generator)
    grain = 0.08 * torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(images + tint + grain, shift, dims=(2, 3))


def classification_loss(
    model: Classifier, generator: Generator, step: int, held_out: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the four cross-entropies of one batch."""
    pictures = draw_batch(BATCH, generator, held_out)
    features, logits = model(pictures.images)
    labels = pictures.labels()
    losses = [F.cross_entropy(logits[name].float(), labels[name], label_smoothing=0.02) for name in HEADS]
    right = {name: float((logits[name].argmax(1) == labels[name]).float().mean()) for name in HEADS}
    # A slight pull to the origin keeps the feature scale, and with it distances, from drifting with training length.
    return sum(losses[1:], losses[0]) + 1e-3 * features.float().square().mean(), right


def train(work: Path, seed: int = 0, held_out: bool = False) -> Classifier:
    """Train (or finish) a judge in folder ``work``: on the trained fonts and rows, or on the held-out ones alone."""
    loop, seed = (HELD_OUT_LOOP, seed + 8) if held_out else (LOOP, seed + 4)
    torch.manual_seed(seed)
    return run_loop(replace(loop, seed=seed), Classifier(), partial(classification_loss, held_out=held_out), work)
