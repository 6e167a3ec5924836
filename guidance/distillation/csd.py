"""Classifier score distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import GuidanceError
from .context import Context
from .method import Method


@dataclass
class CSD(Method):
    """Classifier score distillation (CSD, arXiv 2310.19415): (e_c - e_u) + w_n (e_u - e_unwanted).

    The guidance alone, whatever its scale. unwanted_weight: w_n at the run's start, falling linearly to
    unwanted_weight_end at its end (the paper's annealed negatives); 0 and 0 need no unwanted prompt. Raises
    GuidanceError for weights that are not finite.
    """

    # Not made with `option`: set in Python only; settings, command line and nodes leave the unwanted prompt out.
    unwanted_weight: float = 0.0
    unwanted_weight_end: float = 0.0

    name = "csd"
    needs = frozenset({"e_u", "e_c"})

    def __post_init__(self) -> None:
        for value in (self.unwanted_weight, self.unwanted_weight_end):
            if not math.isfinite(value):
                raise GuidanceError(f"Expected the unwanted weights of CSD to be finite, got {value}.")
        if self.unwanted_weight != 0 or self.unwanted_weight_end != 0:
            self.needs = self.needs | {"e_unwanted"}

    def gradient(self, context: Context) -> Tensor:
        """(e_c - e_u) + w_n (e_u - e_unwanted)."""
        own = context.prediction
        result = own.e_c - own.e_u
        if "e_unwanted" in self.needs:
            start, end = self.unwanted_weight, self.unwanted_weight_end
            result = result + (start + (end - start) * context.progress) * (own.e_u - own.e_unwanted)
        return result
