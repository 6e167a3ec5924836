"""Sources and terms: what a guidance is made of, before any arithmetic.

Models and conditionings are opaque here. The library hands in callables and dicts, a ComfyUI node hands in its own
objects; both share this vocabulary and the arithmetic of `combination`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .schedules import GuidanceError, Weight, WeightLike, as_weight
from .shaping import Shaping

__all__ = ["BASE", "GuidanceError", "Source", "Term"]

BASE = "base"
"""The name by which a term may refer to the base; no term may carry it."""


@dataclass(frozen=True, eq=False)
class Source:
    """One prediction: a model evaluated on a conditioning.

    Two sources are equal when model and conditioning are the *same objects*; equal-looking copies are not compared,
    because comparing tensors would cost more than it saves. Reuse one object where one evaluation is meant.
    """

    model: Any
    cond: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and self.model is other.model and self.cond is other.cond

    def __hash__(self) -> int:
        return hash((id(self.model), id(self.cond)))


@dataclass(frozen=True, eq=False)
class Term:
    """One guidance w(sigma) * (D_i - R_i) of generalized classifier-free guidance (arXiv 2312.08195).

    `name` identifies the term in references, errors and reports. `model` and `cond` make D_i. `weight` is a number or
    a Weight; 0 is neutral and costs nothing, negative pushes away. `reference` names the term whose prediction is R_i;
    None (or "base") means the base. `shaping` changes the direction D_i - R_i before it is weighted (`orthogonal`,
    `frequency`); None leaves it. Like sources, terms are compared by identity. Raises GuidanceError for an empty or
    reserved name, for weights that are not finite and for a shaping that is none.
    """

    name: str
    model: Any
    cond: Any
    weight: WeightLike
    reference: str | None = None
    shaping: Shaping | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise GuidanceError(f"Expected a term to have a name, got {self.name!r}.")
        if self.name == BASE:
            raise GuidanceError(f"Expected a term to have a name other than {BASE!r}, which stands for the base.")
        if self.reference == BASE:
            object.__setattr__(self, "reference", None)
        try:
            object.__setattr__(self, "weight", as_weight(self.weight))
        except GuidanceError as problem:
            raise GuidanceError(f"Term {self.name!r}: {problem}") from None
        if self.shaping is not None and not isinstance(self.shaping, Shaping):
            raise GuidanceError(f"Term {self.name!r}: Expected a Shaping or None, got {type(self.shaping).__name__}.")

    @property
    def source(self) -> Source:
        """The pair (model, cond) that makes this term's prediction."""
        return Source(self.model, self.cond)

    def __repr__(self) -> str:
        weight = self.weight.to_json() if isinstance(self.weight, Weight) else self.weight
        shaping = f", shaping={self.shaping}" if self.shaping else ""
        return f"Term({self.name!r}, weight={weight}, reference={self.reference or BASE!r}{shaping})"
