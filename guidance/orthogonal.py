"""A term without the part of its direction that other terms already decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import GuidanceError
from .shaping import Shaping

__all__ = ["Orthogonal"]

PER = ("image", "position")


@dataclass(frozen=True)
class Orthogonal(Shaping):
    """S(d) = d - share * sum_k <d, q_k> q_k, where the q_k are an orthonormal basis of the other terms' directions.

    Where domain and control pull against each other (a domain of one colour pair, a prompt for another), the domain
    term keeps what the control says nothing about. With `only_opposing` the q_k span only those other directions o that
    it points against, <d, o> < 0: for one other, gradient surgery (arXiv 2001.06782, algorithm 1). Several are removed
    at once, so their order does not matter; a component that one of them shares with a term that agrees goes as well.

    others: names of the terms to be orthogonal to, at least one. share: 1 removes the components, 0 is neutral. per:
    "image" takes inner products over all values of an image, "position" over the channels at each position. Raises
    GuidanceError for other values.
    """

    others: tuple[str, ...]
    share: float = 1.0
    only_opposing: bool = False
    per: str = "image"

    def __post_init__(self) -> None:
        names = (self.others,) if isinstance(self.others, str) else tuple(self.others)
        if not names:
            raise GuidanceError("Expected the name of at least one term to be orthogonal to, got none.")
        object.__setattr__(self, "others", names)
        if not math.isfinite(self.share):
            raise GuidanceError(f"Expected the share to remove to be finite, got {self.share}.")
        if self.per not in PER:
            raise GuidanceError(f"Expected inner products per {' or '.join(PER)}, got {self.per!r}.")

    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """direction [B, C, ...] and the others' directions of the same shape -> [B, C, ...]."""
        over = tuple(range(1, direction.ndim)) if self.per == "image" else (1,)

        def inner(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(over, keepdim=True)

        result, basis = direction, []
        for other in others:
            if self.only_opposing:
                other = torch.where(inner(direction, other) < 0, other, 0.0)
            remainder = other
            for unit in basis:
                remainder = remainder - inner(remainder, unit) * unit
            # A direction that vanishes, or lies in the span of those before it, has nothing to say.
            size, whole = inner(remainder, remainder).sqrt(), inner(other, other).sqrt()
            unit = torch.where(size > 1e-5 * whole, remainder / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
            basis.append(unit)
            result = result - self.share * inner(direction, unit) * unit
        return result
