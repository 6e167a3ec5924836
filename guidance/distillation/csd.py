"""Classifier score distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..schedules import GuidanceError
from .method import Context, Method

__all__ = ["CSD"]


@dataclass
class CSD(Method):
    """Classifier score distillation (CSD, arXiv 2310.19415): (e_c - e_u) + w_n (e_u - e_negative).

    The guidance alone, whatever its scale. negative_weight: w_n at the run's start, falling linearly to
    negative_weight_end at its end (the paper's annealed negatives); 0 and 0 need no negative prompt. Raises
    GuidanceError for weights that are not finite.
    """

    negative_weight: float = 0.0
    negative_weight_end: float = 0.0

    name = "csd"

    def __post_init__(self) -> None:
        for value in (self.negative_weight, self.negative_weight_end):
            if not math.isfinite(value):
                raise GuidanceError(f"Expected the negative weights of CSD to be finite, got {value}.")

    @property
    def needs(self) -> frozenset[str]:
        repels = self.negative_weight != 0 or self.negative_weight_end != 0
        return frozenset({"e_u", "e_c"} | ({"e_negative"} if repels else set()))

    def gradient(self, context: Context) -> Tensor:
        """(e_c - e_u) + w_n (e_u - e_negative)."""
        own = context.prediction
        result = own.e_c - own.e_u
        if own.e_negative is not None and "e_negative" in self.needs:
            start, end = self.negative_weight, self.negative_weight_end
            result = result + (start + (end - start) * context.progress) * (own.e_u - own.e_negative)
        return result
