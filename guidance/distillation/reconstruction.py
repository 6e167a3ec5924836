"""The reconstruction regularizer: the critic should lead back to the frozen image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .context import Context
from .method import Regularizer
from .normalize import normalize


@dataclass
class Reconstruction(Regularizer):
    """StyleGAN-Fusion's reconstruction regularizer (arXiv 2212.04473): n(e) - n(e - e_f).

    e_f = (z_t - sqrt(abar) z_frozen) / sqrt(1 - abar) is the noise that would lead from z_t to the frozen image. The
    published form takes n(d MSE(x0(e), z_frozen) / d e) in place of n(e - e_f); the derivative is a positive multiple
    of e - e_f, which n() removes, so the two are equal and no autograd is needed. weight: lambda, 0.5 to 1 as
    published, 0 is off.
    """

    weight: float = 1.0

    name = "reconstruction"
    needs = frozenset({"e"})

    def gradient(self, context: Context) -> Tensor:
        """n(e) - n(e - e_f), before weight and w(t)."""
        e = context.prediction.e
        assert context.frozen is not None  # since it uses_frozen
        towards = (context.z_t - context.abar.sqrt() * context.frozen) / (1 - context.abar).sqrt()
        return normalize(e) - normalize(e - towards)
