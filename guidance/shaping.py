"""What becomes of a term's direction before it is weighted: D = D_u + sum_i w_i S_i(D_i - R_i).

Without a shaping S_i is the identity, and the sum is that of arXiv 2312.08195. Each technique has its own module
(`orthogonal`, `frequency`), and `shapings` lists those that users choose by name; this module says what a shaping is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import GuidanceError

if TYPE_CHECKING:
    from torch import Tensor


class Shaping(ABC):
    """A map of a term's direction D_i - R_i, given the directions of other terms of the same guidance.

    Shapings are frozen dataclasses; fields made with `options.option` are what users set. name, summary: of a shaping
    in the list `shapings.SHAPINGS`, what it is called and does, in a few words.
    """

    name: str = ""
    summary: str = ""

    @property
    def others(self) -> tuple[str, ...]:
        """The terms whose directions it reads, before their own shaping and weight.

        A term whose weight is 0 at a noise level is not evaluated for it and left out there.
        """
        return ()

    @property
    def is_neutral(self) -> bool:
        """Whether it changes nothing, so that it can be left out."""
        return False

    @classmethod
    def of(cls, **options: Any) -> Shaping:
        """The shaping with these values of its options, as a node or a file gives them."""
        return cls(**options)

    @abstractmethod
    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """The shaped direction [B, C, ...], from it and the other terms' directions, in float32 at least."""


@dataclass(frozen=True)
class InOrder(Shaping):
    """S(d) = then(first(d)), for two shapings of which at most one reads other terms.

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
        return self.first.others or self.then.others

    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """direction [B, C, ...] and the others' directions of the same shape -> [B, C, ...]."""
        for shaping in (self.first, self.then):
            direction = shaping(direction, others if shaping.others else ())
        return direction
