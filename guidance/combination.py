"""Generalized classifier-free guidance (arXiv 2312.08195): any number of terms from any number of models.

    D = D_u + sum_i  w_i(sigma) * (D_i - R_i)

D_u is the base, D_i a term's prediction, R_i its reference (the base, or another term). A term may shape its direction
D_i - R_i first (`shaping`); all else is linear. All predictions are *denoised* latents. Collected per source, the
coefficients sum to 1; therefore combining denoised latents equals combining eps (or v) at the same (x, sigma), and
models of different prediction types mix. `multi_guidance` runs a guidance on plain callables.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from .errors import GuidanceError
from .schedules import Constant, PercentToSigma
from .shaping import Shaping
from .terms import BASE, Source, Term

# A coefficient this small against the weights it was summed from is their decimal rounding (1 - 0.3 - 0.7 is 5.6e-17),
# and its share is below the resolution of float32.
_NEGLIGIBLE = 1e-9

# How far from 1 the sum of coefficients may be through rounding, as a share of their sizes.
_SUM_TOLERANCE = 1e-6

# Weights that cancel up to this share have no useful common scale for hooks.
_CANCELLED = 1e-3

Key = TypeVar("Key", bound=Hashable)


def combine(predictions: Mapping[Key, Tensor], coefficients: Mapping[Key, float], pivot: Key | None = None) -> Tensor:
    """The affine combination sum_k coefficient_k * prediction_k, for coefficients that sum to 1.

    predictions: tensors of one shape, e.g. [B, C, H, W]; only those with a non-zero coefficient are read. Computed as
    D_p + sum_k c_k (D_k - D_p) around the pivot p (or the first source where its coefficient is 0), which is accurate
    where predictions are nearly equal, and in float32 at least; the result has the predictions' dtype. A single
    coefficient of 1 returns the prediction itself. Raises GuidanceError for coefficients of another sum, for a missing
    prediction and for shapes that differ.
    """
    active = [key for key, coefficient in coefficients.items() if coefficient != 0.0]
    total = math.fsum(coefficients[key] for key in active)
    if not abs(total - 1.0) <= _SUM_TOLERANCE * math.fsum(abs(coefficients[key]) for key in active):
        raise GuidanceError(f"Expected coefficients that sum to 1, got a sum of {total:g} over {len(active)} sources.")
    _check_predictions(predictions, active)
    if pivot is None or coefficients.get(pivot, 0.0) == 0.0:
        pivot = active[0]
    center = predictions[pivot]
    if len(active) == 1:
        return center
    dtype = reduce(torch.promote_types, (predictions[key].dtype for key in active))
    wide = torch.promote_types(dtype, torch.float32)
    center = center.to(wide)
    result = center
    for key in active:
        if key != pivot:
            result = result + coefficients[key] * (predictions[key].to(wide) - center)
    return result.to(dtype)


def _check_predictions(predictions: Mapping[Key, Tensor], keys: Sequence[Key]) -> None:
    """Raise GuidanceError where a prediction is missing, or has another shape than the first."""
    for key in keys:
        if key not in predictions:
            raise GuidanceError(f"Expected a prediction for each of {len(keys)} sources, found none for {key!r}.")
        first, shape = predictions[keys[0]].shape, predictions[key].shape
        if shape != first:
            raise GuidanceError(f"Expected predictions of one shape, got {tuple(first)} and {tuple(shape)}.")


def _collect(contributions: Iterable[tuple[Source, float]]) -> dict[Source, float]:
    """Sum the contributions of each source exactly; rounding left-overs become 0."""
    parts: dict[Source, list[float]] = {}
    for source, value in contributions:
        parts.setdefault(source, []).append(value)
    sums = {}
    for source, values in parts.items():
        total = math.fsum(values)
        sums[source] = 0.0 if abs(total) <= _NEGLIGIBLE * math.fsum(map(abs, values)) else total
    return sums


def _cancel(weights: Mapping[str, float]) -> bool:
    """Whether weights sum to 0, or to next to 0 beside their sizes."""
    return abs(math.fsum(weights.values())) <= _CANCELLED * math.fsum(map(abs, weights.values()))


def _scaled_to(total: float, weights: Mapping[str, float]) -> Mapping[str, float]:
    """`weights` in the same proportions, with that sum; a weight that is the whole sum becomes it exactly."""
    if _cancel(weights):
        return weights
    own = math.fsum(weights.values())
    return {name: total if weight == own else weight * total / own for name, weight in weights.items()}


@dataclass(frozen=True)
class ShapedDirection:
    """weight * shaping(D_source - D_reference): a term whose direction is changed before it is added.

    others: (source, reference) of the directions that the shaping reads.
    """

    source: Source
    reference: Source
    weight: float
    shaping: Shaping
    others: tuple[tuple[Source, Source], ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source that must have been evaluated."""
        return (self.reference, self.source, *(source for pair in self.others for source in reversed(pair)))

    def apply(self, predictions: Mapping[Source, Tensor]) -> Tensor:
        """weight * S(d), in float32 at least."""
        _check_predictions(predictions, self.sources)
        wide = reduce(torch.promote_types, (predictions[source].dtype for source in self.sources), torch.float32)

        def direction(source: Source, reference: Source) -> Tensor:
            return predictions[source].to(wide) - predictions[reference].to(wide)

        others = [direction(*pair) for pair in self.others]
        return self.weight * self.shaping(direction(self.source, self.reference), others)


@dataclass(frozen=True)
class Step:
    """A guidance at one noise level: which predictions it needs and how they combine.

    weights: every term's weight here, 0 included. coefficients: the non-zero coefficient of each source in the linear
    part (they sum to 1), and the base's, even if 0, when it is kept. needed: the sources to evaluate, each once, base
    first. differences: (source, reference, weight) of the terms in the linear part. shaped: what is added to it.
    """

    base: Source
    weights: Mapping[str, float]
    coefficients: Mapping[Source, float]
    needed: tuple[Source, ...]
    differences: tuple[tuple[Source, Source, float], ...]
    shaped: tuple[ShapedDirection, ...] = ()

    @property
    def recipe(self) -> tuple:
        """What decides the arithmetic: steps with equal recipes combine alike."""
        return (tuple(self.coefficients.items()), self.shaped)

    @property
    def samples(self) -> int:
        """How many predictions per image this step costs."""
        return len(self.needed)

    @property
    def total_weight(self) -> float:
        """W, the sum of all weights: the scale of the plain CFG that this step equals on its effective condition."""
        return math.fsum(self.weights.values())

    def combine(self, predictions: Mapping[Source, Tensor]) -> Tensor:
        """D = D_u + sum_i w_i (D_i - R_i) of arXiv 2312.08195, from the predictions of the `needed` sources."""
        return self._add_shaped(combine(predictions, self.coefficients, pivot=self.base), predictions, 1.0)

    def _add_shaped(self, linear: Tensor, predictions: Mapping[Source, Tensor], scale: float) -> Tensor:
        if not self.shaped:
            return linear
        total = reduce(torch.add, (direction.apply(predictions) for direction in self.shaped))
        wide = torch.promote_types(linear.dtype, total.dtype)
        return (linear.to(wide) + scale * total.to(wide)).to(linear.dtype)

    @property
    def scale(self) -> float:
        """The scale of the plain CFG that this step is expressed as: W, or 1 where the weights cancel."""
        return 1.0 if _cancel(self.weights) else self.total_weight

    def effective_condition(self, predictions: Mapping[Source, Tensor]) -> Tensor:
        """c_eff = D_u + sum_i w_i (D_i - R_i) / W, with which this step is a plain CFG, D = D_u + scale (c_eff - D_u).

        Where the weights cancel, |W| < 1e-3 sum_i |w_i|, or all are 0, it is D itself, and `scale` is 1. With a single
        term against the base it is that term's prediction, bit for bit. Needs the base's prediction: make the step with
        keep_base=True. Raises GuidanceError without it.
        """
        if self.base not in predictions:
            raise GuidanceError("Expected the base's prediction, found none; ask for the step with keep_base=True.")
        if _cancel(self.weights):
            return self.combine(predictions)
        shares, scale = [(self.base, 1.0)], self.total_weight
        for source, reference, weight in self.differences:
            shares += [(source, weight / scale), (reference, -weight / scale)]
        linear = combine(predictions, _collect(shares), pivot=self.base)
        return self._add_shaped(linear, predictions, 1.0 / scale)

    def effective(self, predictions: Mapping[Source, Tensor]) -> tuple[Tensor, Tensor, float]:
        """(c_eff, D_u, scale): this step as a plain CFG, for methods that know only those (`effective_condition`)."""
        condition = self.effective_condition(predictions)
        return condition, predictions[self.base], self.scale


class Guidance:
    """A base and its terms, checked (generalized classifier-free guidance, arXiv 2312.08195).

    Raises GuidanceError at construction when there is no term, two terms share a name, or a reference names an unknown
    term, the term itself or a cycle.
    """

    def __init__(self, base: Source, terms: Sequence[Term]) -> None:
        if not terms:
            raise GuidanceError("Expected at least one guidance term, got none.")
        self.base = base
        self.terms = tuple(term.on(base) for term in terms)
        self._by_name: dict[str, Term] = {}
        for term in self.terms:
            if term.name in self._by_name:
                raise GuidanceError(f"Expected terms with different names, got {term.name!r} twice; rename one.")
            self._by_name[term.name] = term
        for term in self.terms:
            self._check_references(term)
            for other in term.shaping.others if term.shaping else ():
                if other not in self._by_name or other == term.name:
                    known = ", ".join(name for name in self._by_name if name != term.name) or "none"
                    raise GuidanceError(f"Term {term.name!r} is shaped by {other!r}, which is no other term: {known}.")

    def _check_references(self, term: Term) -> None:
        path = [term.name]
        while term.reference is not None:
            if term.reference not in self._by_name:
                known = ", ".join([BASE, *self._by_name])
                raise GuidanceError(f"Term {term.name!r} refers to {term.reference!r}, which is none of: {known}.")
            if term.reference in path:
                if term.reference == term.name:
                    raise GuidanceError(f"Term {term.name!r} refers to itself; name another term, or none.")
                raise GuidanceError(f"The references of terms form a cycle: {' -> '.join([*path, term.reference])}.")
            path.append(term.reference)
            term = self._by_name[term.reference]

    def __repr__(self) -> str:
        return f"Guidance({', '.join(map(repr, self.terms))})"

    def term(self, name: str) -> Term:
        """The term of that name; KeyError when there is none."""
        return self._by_name[name]

    def reference(self, term: Term) -> Source:
        """The source of R_i: the base, or the term that `term` refers to."""
        return self.base if term.reference is None else self._by_name[term.reference].source

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every distinct source, base first, whatever the weights."""
        return tuple(dict.fromkeys([self.base, *(term.source for term in self.terms)]))

    @property
    def needs_percent(self) -> bool:
        """Whether a weight has positions in percent, so that `at` needs a percent_to_sigma."""
        return any(term.weight.needs_percent for term in self.terms)

    def names(self, source: Source) -> tuple[str, ...]:
        """The names under which a source takes part ("base" for the base), for messages and reports."""
        own = [BASE] if source == self.base else []
        return tuple(own + [term.name for term in self.terms if term.source == source])

    def largest_total(self, percent_to_sigma: PercentToSigma) -> float:
        """The total weight where its size is largest, sampled at each percent of sampling."""
        constant = all(isinstance(term.weight, Constant) for term in self.terms)
        sigmas = [percent_to_sigma(i / 100) for i in range(1 if constant else 101)]
        return max((self.at(sigma, percent_to_sigma).total_weight for sigma in sigmas), key=abs)

    def at(
        self,
        sigma: float,
        percent_to_sigma: PercentToSigma | None = None,
        keep_base: bool = False,
        total: float | None = None,
    ) -> Step:
        """The guidance at noise level `sigma` (k-diffusion scale), with only the sources that count there.

        Coefficients are summed per source. A source whose sum is 0 is not evaluated: a term outside its interval, the
        base at a total weight of 1, a reference that nothing uses here. keep_base: evaluate the base all the same, for
        hooks and CFG++ samplers. total: scale all weights alike so that they sum to it, D = D_u + total (c_eff - D_u);
        None leaves them, and so it is with weights that cancel (`Step.effective`). Raises GuidanceError where a weight
        needs `percent_to_sigma` and none is given.
        """
        sigma = float(sigma)  # one copy from the device, whatever the number of terms
        weights = {term.name: term.weight.at(sigma, percent_to_sigma) for term in self.terms}
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise GuidanceError(f"Expected a finite weight of term {name!r} at sigma {sigma:g}, got {weight}.")
        if total is not None:
            weights = _scaled_to(total, weights)
        active = [term for term in self.terms if weights[term.name] != 0.0]
        differences = tuple(
            (term.source, self.reference(term), weights[term.name]) for term in active if term.shaping is None
        )
        shaped = tuple(self._shaped(term, term.shaping, weights) for term in active if term.shaping is not None)
        contributions = [(self.base, 1.0)]
        for source, reference, weight in differences:
            contributions += [(source, weight), (reference, -weight)]
        coefficients = {
            source: value
            for source, value in _collect(contributions).items()
            if value != 0.0 or (keep_base and source == self.base)
        }
        needed = dict.fromkeys([*coefficients, *(source for direction in shaped for source in direction.sources)])
        if self.base in needed:
            needed = {self.base: None, **needed}
        return Step(self.base, weights, coefficients, tuple(needed), differences, shaped)

    def _shaped(self, term: Term, shaping: Shaping, weights: Mapping[str, float]) -> ShapedDirection:
        others = [self._by_name[name] for name in shaping.others if weights[name] != 0.0]
        pairs = tuple((other.source, self.reference(other)) for other in others)
        return ShapedDirection(term.source, self.reference(term), weights[term.name], shaping, pairs)
