"""Delta denoising score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .context import Context
from .method import Method


@dataclass
class DDS(Method):
    """Delta denoising score (DDS, arXiv 2304.07090): e(z_t, target) - e(z_frozen_t, source), same t and noise.

    The frozen generator's image with the prompt that describes it stands for what SDS would do to an image that is
    right already, and is taken off. Needs the critic's source; nominal scales (7.5 in the paper). Its gradient is
    zero at the start if both prompts are the same.
    """

    name = "dds"
    needs = frozenset({"e"})
    needs_frozen = frozenset({"e_source"})

    def gradient(self, context: Context) -> Tensor:
        """e(z_t, target) - e(z_frozen_t, source)."""
        return context.prediction.e - context.frozen_prediction.e_source
