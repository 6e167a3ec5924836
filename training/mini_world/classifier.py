"""The judges of the mini world: a small network that names digit, ink, ground and world; its features measure distance.

The judge is trained on the fonts and rows that the generative models saw, and measured on the held-out ones; the second
judge the other way round, so that what it says of samples cannot come from shapes that both have learned by heart.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from . import render
from .recipe.loop import LoopConfig, run_loop

HEADS = {"digit": 10, "ink": 8, "ground": 8, "world": 2}
FEATURES = 64
LOOP = LoopConfig(name="classifier", steps=2000, rate=3e-3, ema=0.998)
HELD_OUT_LOOP = replace(LOOP, name="classifier_held_out", steps=1000)  # fewer pictures to learn
BATCH = 96


class Classifier(nn.Module):
    """Images [B, 3, 64, 64] in -1..1 -> features [B, 64]; :meth:`forward` adds the logits of the four heads."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip(widths, widths[1:])):
            layers += [
                nn.Conv2d(before, after, 5 if index == 0 else 3, stride=2, padding=2 if index == 0 else 1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
            if index:
                layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.feature = nn.Linear(widths[-1] * 16, FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, count) for name, count in HEADS.items()})

    def features(self, images: Tensor) -> Tensor:
        return self.feature(self.trunk(images).flatten(1))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(images)
        return features, {name: head(F.silu(features)) for name, head in self.heads.items()}


def draw_batch(count: int, generator: Generator, held_out: bool = False) -> render.Pictures:
    """Half rendered, half handwritten, all 56 colour pairs, lightly blurred and noised to hide codec traces.

    held_out: from the fonts and rows that no generative model trained on, instead of those they did.
    """
    printed = render.rendered(count // 2, generator, held_out=held_out)
    rows = render.HELD_OUT_ROWS if held_out else render.TRAIN_ROWS
    written = render.handwritten(rows, render.colour_pairs(), generator, count=count - count // 2)
    both = render.Pictures(
        *(
            torch.cat([getattr(printed, name), getattr(written, name)])
            for name in ("images", "digit", "ink", "ground", "world")
        )
    )
    both.images = _degrade(both.images, generator)
    return both


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
    model: nn.Module, generator: Generator, step: int, held_out: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the four cross-entropies of one batch."""
    pictures = draw_batch(BATCH, generator, held_out)
    features, logits = model(pictures.images)
    labels = pictures.labels()
    losses = {name: F.cross_entropy(logits[name].float(), labels[name], label_smoothing=0.02) for name in HEADS}
    right = {name: float((logits[name].argmax(1) == labels[name]).float().mean()) for name in HEADS}
    # A slight pull to the origin keeps the feature scale, and with it distances, from drifting with training length.
    return sum(losses.values()) + 1e-3 * features.float().square().mean(), right


@torch.no_grad()
def judge(model: Classifier, images: Tensor, batch: int = 200) -> tuple[Tensor, dict[str, Tensor]]:
    """Features [N, 64] and the named class of every head, long [N], of images [N, 3, 64, 64]."""
    features, named = [], {name: [] for name in HEADS}
    for part in images.split(batch):
        feature, logits = model(part)
        features.append(feature)
        for name in HEADS:
            named[name].append(logits[name].argmax(1))
    return torch.cat(features), {name: torch.cat(parts) for name, parts in named.items()}


def train(work: Path, seed: int = 0, steps: int | None = None, held_out: bool = False) -> Classifier:
    """Train (or finish) a judge in folder ``work``: on the trained fonts and rows, or on the held-out ones alone."""
    loop, seed = (HELD_OUT_LOOP, seed + 8) if held_out else (LOOP, seed + 4)
    torch.manual_seed(seed)
    loop = replace(loop, seed=seed, steps=steps or loop.steps)
    return run_loop(loop, Classifier(), partial(classification_loss, held_out=held_out), work)
