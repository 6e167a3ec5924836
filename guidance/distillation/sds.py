"""Score distillation sampling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..options import option
from .context import Context
from .method import Method
from .normalize import normalize


@dataclass
class SDS(Method):
    """Score distillation sampling (DreamFusion, arXiv 2209.14988, eq. 3): e(z_t) - noise, e guided.

    Needs a large guidance scale (100 in DreamFusion and StyleGAN-Fusion), at which it over-saturates and seeks modes.
    normalize: n() of prediction and noise first, as StyleGAN-Fusion does for EG3D; False leaves them.
    """

    normalize: bool = option(
        False,
        "bring prediction and noise to unit spread first, so that the scale does not set its strength; released for "
        "EG3D only",
    )

    name = "sds"
    needs = frozenset({"e"})

    def gradient(self, context: Context) -> Tensor:
        """e - noise, or n(e) - n(noise)."""
        e, noise = context.prediction.e, context.noise
        return normalize(e) - normalize(noise) if self.normalize else e - noise
