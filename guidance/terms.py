"""Sources and terms: what a guidance is made of, before any arithmetic.

Models and conditionings are opaque here: callables and dicts for the library's `MultiGuidance`, MODELs and
CONDITIONINGs for ComfyUI's nodes. Both describe a guidance by these terms and share the arithmetic of `combination`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import GuidanceError
from .schedules import Weight, WeightLike, as_weight
from .shaping import Shaping

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

    def check_callable(self, whose: str) -> None:
        """Raise GuidanceError where `model(x, sigma, **cond)` cannot be called."""
        if not callable(self.model):
            raise GuidanceError(f"Expected the model of {whose} to be a callable, got {type(self.model).__name__}.")
        if self.cond is not None and not isinstance(self.cond, Mapping):
            raise GuidanceError(f"Expected the conditioning of {whose} to be a dict or None.")


@dataclass(frozen=True, eq=False, init=False)
class Term:
    """One guidance w(sigma) * (D_i - R_i) of generalized classifier-free guidance (arXiv 2312.08195).

    name: identifies the term in references, errors and reports. model, cond: what makes D_i; None is the base's own
    (`Guidance` puts it in). weight: a number or a Weight; 0 is neutral and costs nothing, negative pushes away.
    reference: the name of the term whose prediction is R_i; None (or "base") is the base. shaping: changes the
    direction D_i - R_i before it is weighted (`shapings`); None leaves it. Like sources, terms are compared by
    identity. Raises GuidanceError for an empty or reserved name, for weights that are not finite and for a shaping that
    is none.
    """

    name: str
    model: Any
    cond: Any
    weight: Weight
    reference: str | None
    shaping: Shaping | None

    def __init__(
        self,
        name: str,
        model: Any,
        cond: Any,
        weight: WeightLike,
        reference: str | None = None,
        shaping: Shaping | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise GuidanceError(f"Expected a term to have a name, got {name!r}.")
        if name == BASE:
            raise GuidanceError(f"Expected a term to have a name other than {BASE!r}, which stands for the base.")
        try:
            weight = as_weight(weight)
        except GuidanceError as problem:
            raise GuidanceError(f"Term {name!r}: {problem}") from None
        if shaping is not None and not isinstance(shaping, Shaping):
            raise GuidanceError(f"Term {name!r}: Expected a Shaping or None, got {type(shaping).__name__}.")
        reference = None if reference == BASE else reference
        vars(self).update(name=name, model=model, cond=cond, weight=weight, reference=reference, shaping=shaping)

    @property
    def source(self) -> Source:
        """The pair (model, cond) that makes this term's prediction."""
        return Source(self.model, self.cond)

    def on(self, base: Source) -> Term:
        """The term with the model and conditioning of `base` where it has none of its own."""
        if self.model is not None and self.cond is not None:
            return self
        return replace(
            self,
            model=base.model if self.model is None else self.model,
            cond=base.cond if self.cond is None else self.cond,
        )

    def __repr__(self) -> str:
        shaping = f", shaping={self.shaping}" if self.shaping else ""
        return f"Term({self.name!r}, weight={self.weight.to_json()}, reference={self.reference or BASE!r}{shaping})"
