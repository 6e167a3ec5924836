"""What becomes of a term's direction before it is weighted: D = D_u + sum_i w_i S_i(D_i - R_i).

Without a shaping S_i is the identity, and the sum is that of arXiv 2312.08195. Each technique has its own module
(`orthogonal`, `frequency`); this one says what a shaping is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Shaping"]


class Shaping(ABC):
    """A map of a term's direction D_i - R_i, given the directions of other terms of the same guidance.

    Shapings are frozen values. `others` names the terms whose (unshaped, unweighted) directions are looked at; a term
    whose weight is 0 at a noise level is not evaluated for it and left out there.
    """

    others: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """The shaped direction [B, C, ...], from it and the other terms' directions, in float32 at least."""
