"""Noise-free score distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GuidanceError
from .context import Context
from .method import Method


@dataclass
class NFSD(Method):
    """Noise-free score distillation (NFSD, arXiv 2310.17590): delta_D + s (e_c - e_u).

    The noise is left out of SDS: delta_D is e_u below timestep `threshold`, where e_u is mostly the domain's direction,
    and e_u - e_unwanted from there on, since both predict the same noise. s (e_c - e_u) is e - e_u of the critic's
    guidance, at a nominal scale (7.5 in the paper). threshold: 200 of 1000 as published, below which the unwanted
    prompt is not evaluated; 0 evaluates it at every timestep. That prompt says what images should not be ("unrealistic,
    blurry, low quality, ..."). Raises GuidanceError for a threshold below 0.
    """

    # Not made with `option`: set in Python only; settings, command line and nodes use the published value.
    threshold: int = 200

    name = "nfsd"
    needs = frozenset({"e", "e_u", "e_unwanted"})

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise GuidanceError(f"Expected the threshold of NFSD to be a timestep of at least 0, got {self.threshold}.")
        self.unwanted_from = self.threshold

    def gradient(self, context: Context) -> Tensor:
        """delta_D + (e - e_u)."""
        own = context.prediction
        early = (context.t < self.threshold).reshape(-1, *[1] * (own.e.ndim - 1))
        return torch.where(early, own.e_u, own.e_u - own.e_unwanted) + (own.e - own.e_u)
