"""What becomes of a term's direction before it is weighted: D = D_u + sum_i w_i S_i(D_i - R_i).

Without a shaping S_i is the identity, and the sum is that of arXiv 2312.08195. Each technique has its own module
(`orthogonal`, `frequency`); this one says what a shaping is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .schedules import GuidanceError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["InOrder", "Shaping"]


class Shaping(ABC):
    """A map of a term's direction D_i - R_i, given the directions of other terms of the same guidance.

    Shapings are frozen values. `others` names the terms whose (unshaped, unweighted) directions are looked at; a term
    whose weight is 0 at a noise level is not evaluated for it and left out there.
    """

    others: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """The shaped direction [B, C, ...], from it and the other terms' directions, in float32 at least."""


@dataclass(frozen=True)
class InOrder(Shaping):
    """S(d) = then(first(d)), for two shapings of which at most one looks at other terms.

    With two, it could not be told whose directions are left out where the weight of another term is 0. Raises
    GuidanceError for them.
    """

    first: Shaping
    then: Shaping

    def __post_init__(self) -> None:
        if self.first.others and self.then.others:
            raise GuidanceError(
                f"Expected one list of terms to be orthogonal to, got {', '.join(self.first.others)} and then "
                f"{', '.join(self.then.others)}; name them all in one Shape Guidance Term."
            )

    @property
    def others(self) -> tuple[str, ...]:
        """The terms that one of the two looks at."""
        return self.first.others or self.then.others

    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """direction [B, C, ...] and the others' directions of the same shape -> [B, C, ...]."""
        for shaping in (self.first, self.then):
            direction = shaping(direction, others if shaping.others else ())
        return direction
