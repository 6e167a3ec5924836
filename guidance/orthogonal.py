"""A term without the part of its direction that other terms already decide."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import GuidanceError
from .options import check_options, option
from .shaping import Shaping

PER = ("image", "position")


@dataclass(frozen=True)
class Orthogonal(Shaping):
    """S(d) = d - share * sum_k <d, q_k> q_k, where the q_k are an orthonormal basis of the other terms' directions.

    Where domain and control pull against each other (a domain of one colour pair, a prompt for another), the domain
    term keeps what the control does not decide. With `only_opposing` the q_k span only those other directions o that it
    points against, <d, o> < 0: for one other, gradient surgery (arXiv 2001.06782, algorithm 1). Several are removed at
    once, so their order does not matter; a component that one of them shares with a term that agrees goes as well.

    orthogonal_to: a name or a tuple of names of other terms, at least one. share: 1 removes the components, 0 is
    neutral. per: "image" takes inner products over all values of an image, "position" over the channels at each
    position. Raises GuidanceError for other values.
    """

    orthogonal_to: str | tuple[str, ...] = option(
        "control",
        "the names of the terms to be orthogonal to, separated by commas; the default is control. Where such a term "
        "has weight 0, it removes nothing",
    )
    share: float = option(
        1.0,
        "how much of what the term has in common with those terms is removed. 0 is neutral, 1 (the default) removes "
        "all of it",
        min=0.0,
        max=1.0,
        step=0.05,
        advanced=True,
    )
    only_opposing: bool = option(
        False,
        "remove only what works against those terms. Off (the default) also removes what points their way",
        advanced=True,
    )
    per: str = option(
        "position",
        "compare the terms at each position by itself (the default), or over the whole image, which removes less",
        choices=PER,
        advanced=True,
    )

    name = "orthogonal"
    summary = "takes out what the terms in orthogonal_to decide already"

    @classmethod
    def of(cls, *, orthogonal_to: str = "control", **options: Any) -> Orthogonal:
        """orthogonal_to: names separated by commas. Raises GuidanceError for a name that stands there twice."""
        names = [name.strip() for name in orthogonal_to.split(",") if name.strip()]
        for name, times in Counter(names).items():
            if times > 1:
                raise GuidanceError(f"Expected terms to be orthogonal to once each, got {name!r} twice.")
        return cls(tuple(names), **options)

    def __post_init__(self) -> None:
        if not isinstance(self.orthogonal_to, (str, Sequence)):
            raise GuidanceError(f"Expected names of terms to be orthogonal to, got {self.orthogonal_to!r}.")
        names = (self.orthogonal_to,) if isinstance(self.orthogonal_to, str) else tuple(self.orthogonal_to)
        if not names:
            raise GuidanceError("Expected the name of at least one term to be orthogonal to, got none.")
        object.__setattr__(self, "orthogonal_to", names)
        check_options(self)
        if math.isinf(self.share):
            raise GuidanceError(f"Expected the share to remove to be finite, got {self.share}.")

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(self.orthogonal_to)

    @property
    def is_neutral(self) -> bool:
        return self.share == 0.0

    def __call__(self, direction: Tensor, others: Sequence[Tensor]) -> Tensor:
        """direction [B, C, ...] and the others' directions of the same shape -> [B, C, ...]."""
        over = tuple(range(1, direction.ndim)) if self.per == "image" else (1,)

        def inner(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(over, keepdim=True)

        result = direction
        basis: list[Tensor] = []
        for other in others:
            if self.only_opposing:
                other = torch.where(inner(direction, other) < 0, other, 0.0)
            remainder = other
            for unit in basis:
                remainder = remainder - inner(remainder, unit) * unit
            # A direction that vanishes, or lies in the span of those before it, removes nothing more.
            size, whole = inner(remainder, remainder).sqrt(), inner(other, other).sqrt()
            unit = torch.where(size > 1e-5 * whole, remainder / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
            basis.append(unit)
            result = result - self.share * inner(direction, unit) * unit
        return result
