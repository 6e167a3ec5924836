"""Score distillation as a bridge between image distributions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .context import Context
from .method import Method


@dataclass
class SDSBridge(Method):
    """SDS-Bridge (arXiv 2406.09417, second stage): s (e_c(z_t, target) - e_c(z_t, source)).

    The source prompt describes what the generator makes now, with its faults (the paper appends ", oversaturated,
    smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed" to the target prompt). s is the
    sum of the guidance weights, e_c its effective condition: 30 in the released code.
    """

    name = "bridge"
    needs = frozenset({"e_c", "e_source_c"})

    def gradient(self, context: Context) -> Tensor:
        """s (e_c(z_t, target) - e_c(z_t, source))."""
        own = context.prediction
        return own.scale * (own.e_c - own.e_source_c)
