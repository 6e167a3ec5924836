"""Weights over noise level: how strong a guidance term is at each sigma of a sampling run.

A weight answers one question, `weight.at(sigma, percent_to_sigma)`. Its positions are in percent of sampling or in
sigma (`positions`). All weights are frozen, hashable values with a JSON form (`to_json`, `weight_from_json`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .errors import GuidanceError
from .positions import UNITS, PercentToSigma, needed, reached, sigma_to_percent

RAMPS = ("linear", "cosine", "step")


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise GuidanceError(f"Expected {what} to be a number, got {value!r}.")
    value = float(value)
    if not math.isfinite(value):
        raise GuidanceError(f"Expected {what} to be finite, got {value}.")
    return value


def _position(value: Any, unit: str, what: str) -> float:
    value = _finite(value, what)
    if unit == "percent" and not 0.0 <= value <= 1.0:
        raise GuidanceError(f"Expected {what} to be a sampling percent between 0 and 1, got {value}.")
    if unit == "sigma" and value < 0.0:
        raise GuidanceError(f"Expected {what} to be a sigma of at least 0, got {value}.")
    return value


def _choice(value: Any, options: Sequence[str], what: str) -> str:
    if value not in options:
        raise GuidanceError(f"Expected {what} to be one of {', '.join(options)}, got {value!r}.")
    return value


def _level(sigma: Any) -> float:
    sigma = float(sigma)
    if math.isnan(sigma) or sigma < 0.0:
        raise GuidanceError(f"Expected a sigma of at least 0 to look up a weight, got {sigma}.")
    return sigma


class Weight(ABC):
    """A guidance weight as a function of noise level. Negative values are legitimate, 0 is neutral."""

    @abstractmethod
    def at(self, sigma: float, percent_to_sigma: PercentToSigma | None = None) -> float:
        """The weight at noise level `sigma` (k-diffusion scale, at least 0).

        percent_to_sigma: the model's, which only weights with positions in percent need (`needs_percent`). Raises
        GuidanceError where it is needed and missing.
        """

    @abstractmethod
    def to_json(self) -> Any:
        """A JSON value (a number or an object) from which `weight_from_json` rebuilds an equal weight."""

    @property
    def needs_percent(self) -> bool:
        """Whether `at` needs a `percent_to_sigma`."""
        return False


WeightLike = Weight | float | int


@dataclass(frozen=True)
class Constant(Weight):
    """The same weight at every noise level."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _finite(self.value, "a weight"))

    def at(self, sigma: float, percent_to_sigma: PercentToSigma | None = None) -> float:
        _level(sigma)
        return self.value

    def to_json(self) -> Any:
        return self.value


@dataclass(frozen=True)
class Interval(Weight):
    """Guidance in a limited interval of noise levels (arXiv 2404.07724): `value` inside, `outside` elsewhere.

    The interval runs in sampling order, from `start` to `end`: 0 <= start <= end <= 1 in percent, start >= end >= 0 in
    sigma. It contains its start and not its end, the paper's (sigma_lo, sigma_hi]. An empty interval is `outside`
    everywhere. value: a number, or another weight that then acts inside the interval only. outside: 0 (no guidance from
    this term) by default; for the scale of a plain CFG the paper's neutral value is 1. Raises GuidanceError for
    anything else.
    """

    value: WeightLike
    start: float
    end: float
    unit: str = "percent"
    outside: float = 0.0

    def __post_init__(self) -> None:
        _choice(self.unit, UNITS, "the unit of an interval")
        if not isinstance(self.value, Weight):
            object.__setattr__(self, "value", _finite(self.value, "the weight of an interval"))
        object.__setattr__(self, "start", _position(self.start, self.unit, "the start of an interval"))
        object.__setattr__(self, "end", _position(self.end, self.unit, "the end of an interval"))
        object.__setattr__(self, "outside", _finite(self.outside, "the weight outside an interval"))
        backwards = self.start > self.end if self.unit == "percent" else self.start < self.end
        if backwards:
            order = "start <= end in percent" if self.unit == "percent" else "start >= end in sigma, which falls"
            raise GuidanceError(
                f"Expected an interval in the order of sampling ({order}), got start {self.start:g} and "
                f"end {self.end:g}; exchange them."
            )

    def at(self, sigma: float, percent_to_sigma: PercentToSigma | None = None) -> float:
        sigma = _level(sigma)
        started = reached(self.start, self.unit, sigma, percent_to_sigma)
        if not started or reached(self.end, self.unit, sigma, percent_to_sigma):
            return self.outside
        return self.value.at(sigma, percent_to_sigma) if isinstance(self.value, Weight) else self.value

    def to_json(self) -> Any:
        return {"type": "interval", **vars(self), "value": as_weight(self.value).to_json()}

    @property
    def needs_percent(self) -> bool:
        own = self.unit == "percent" and (0.0 < self.start < 1.0 or 0.0 < self.end < 1.0)
        return own or (isinstance(self.value, Weight) and self.value.needs_percent)


@dataclass(frozen=True)
class Keyframes(Weight):
    """A weight schedule (Wang et al., arXiv 2404.13040) through (position, value) points.

    Before the first point, in sampling order, the first value holds, after the last point the last value. Between two
    points the `ramp` decides:

    * `"linear"`: straight, in percent or, with unit `"sigma"`, in **log sigma**, where a sampler's steps are spread;
    * `"cosine"`: half a cosine over the same axis, flat at both points;
    * `"step"`: the earlier value holds until the later position is reached.

    Points may come in any order, positions must differ; in sigma they must be above 0, since a logarithm is taken.
    Raises GuidanceError for anything else.
    """

    points: tuple[tuple[float, float], ...]
    unit: str = "percent"
    ramp: str = "linear"

    def __post_init__(self) -> None:
        _choice(self.unit, UNITS, "the unit of keyframes")
        _choice(self.ramp, RAMPS, "the ramp of keyframes")
        points = sorted(map(self._checked, self.points), reverse=self.unit == "sigma")
        if not points:
            raise GuidanceError("Expected at least one keyframe, got none.")
        for (earlier, _), (later, _) in zip(points, points[1:]):
            if earlier == later:
                raise GuidanceError(f"Expected keyframes at different positions, got {earlier:g} twice.")
        object.__setattr__(self, "points", tuple(points))

    def _checked(self, point: Any) -> tuple[float, float]:
        try:
            position, value = point
        except (TypeError, ValueError):
            raise GuidanceError(f"Expected keyframes as (position, value) pairs, got {point!r}.") from None
        position = _position(position, self.unit, "the position of a keyframe")
        if self.unit == "sigma" and position == 0.0:
            raise GuidanceError("Expected the position of a keyframe in sigma to be above 0, got 0.")
        return position, _finite(value, "the weight of a keyframe")

    def at(self, sigma: float, percent_to_sigma: PercentToSigma | None = None) -> float:
        sigma = _level(sigma)
        positions, values = zip(*self.points)
        if len(values) == 1:
            return values[0]
        if self.ramp == "step":
            passed = [value for at, value in self.points[1:] if reached(at, self.unit, sigma, percent_to_sigma)]
            return passed[-1] if passed else values[0]
        if self.unit == "percent":
            progress = sigma_to_percent(sigma, needed(percent_to_sigma, positions[0]))
        else:
            progress = -math.log(sigma) if sigma > 0.0 else math.inf
            positions = [-math.log(position) for position in positions]
        if progress <= positions[0]:
            return values[0]
        for left, right, before, after in zip(positions, positions[1:], values, values[1:]):
            if progress < right:
                fraction = (progress - left) / (right - left)
                if self.ramp == "cosine":
                    fraction = 0.5 - 0.5 * math.cos(math.pi * fraction)
                return before * (1.0 - fraction) + after * fraction
        return values[-1]

    def to_json(self) -> Any:
        return {"type": "keyframes", **vars(self), "points": [list(point) for point in self.points]}

    @property
    def needs_percent(self) -> bool:
        return self.unit == "percent" and len(self.points) > 1


KINDS: dict[str, type[Interval] | type[Keyframes]] = {"interval": Interval, "keyframes": Keyframes}
"""The weights that JSON names by a type; numbers are constants."""


def as_weight(value: WeightLike) -> Weight:
    """`value` itself when it is a weight, a Constant when it is a finite number. Raises GuidanceError otherwise."""
    return value if isinstance(value, Weight) else Constant(value)


def weight_from_json(data: Any) -> Weight:
    """The weight that `Weight.to_json` described. Raises GuidanceError, naming what was found, for anything else."""
    if not isinstance(data, Mapping):
        return as_weight(data)
    fields = dict(data)
    kind = KINDS[_choice(fields.pop("type", None), tuple(KINDS), "the type of a weight")]
    if kind is Interval and isinstance(fields.get("value"), Mapping):
        fields["value"] = weight_from_json(fields["value"])
    if kind is Keyframes and isinstance(fields.get("points"), Sequence):
        fields["points"] = tuple(fields["points"])
    try:
        return kind(**fields)
    except TypeError:
        raise GuidanceError(f"Expected the fields of {kind.__name__}, got {sorted(map(str, fields))}.") from None
