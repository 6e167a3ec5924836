"""The judges of the mini world: a small network that names digit, ink, ground and world; its features measure distance.

The judge was trained on the fonts and rows that the generative models saw, the second judge on the held-out ones alone.
Each is measured on what the other was trained on (`recipe.train_classifier`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = {"digit": 10, "ink": 8, "ground": 8, "world": 2}
FEATURES = 64


class Classifier(nn.Module):
    """Images [B, 3, 64, 64] in -1..1 -> features [B, 64] and the logits of the four heads."""

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

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.feature(self.trunk(images).flatten(1))
        return features, {name: head(F.silu(features)) for name, head in self.heads.items()}


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
