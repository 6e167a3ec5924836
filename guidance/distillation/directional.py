"""The directional regularizer: the critic should see no difference between adapted and frozen image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .context import Context
from .method import Regularizer
from .normalize import normalize


@dataclass
class Directional(Regularizer):
    """StyleGAN-Fusion's directional regularizer (arXiv 2212.04473): e(z_t) - e(z_frozen_t), one noise for both.

    weight: lambda, 0.5 to 1 as published, 0 is off. normalize: n() of both predictions first, so that the guidance
    scale does not set its strength.
    """

    weight: float = 1.0
    normalize: bool = False

    name = "directional"
    needs = frozenset({"e"})
    needs_frozen = frozenset({"e"})

    def gradient(self, context: Context) -> Tensor:
        """e(z_t) - e(z_frozen_t), before weight and w(t)."""
        own, frozen = context.prediction.e, context.frozen_prediction.e
        return normalize(own) - normalize(frozen) if self.normalize else own - frozen
