"""Weights over noise level: how strong a guidance term is at each sigma of a sampling run.

A weight answers one question, `weight.at(sigma, percent_to_sigma)`. Positions are written in one of two units:

* `"percent"`, ComfyUI's sampling percent: 0 is the start of sampling (highest noise), 1 its end. It counts the model's
  training timesteps, not the steps of one run; the model's `percent_to_sigma` translates it.
* `"sigma"`, the noise level itself in the k-diffusion scale, x = x0 + sigma * noise. Larger comes first.

A position takes effect when sampling *reaches* it, that is from sigma <= position on, so neighbouring intervals that
share an edge never overlap and never leave a gap. Percent 0 is reached by every sigma, percent 1 by none.

All weights are frozen, hashable values with a JSON form (`to_json`, `weight_from_json`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .errors import Problem

__all__ = [
    "Constant",
    "GuidanceError",
    "Interval",
    "Keyframes",
    "Weight",
    "WeightLike",
    "as_weight",
    "sigma_to_percent",
    "weight_from_json",
]

UNITS = ("percent", "sigma")
RAMPS = ("linear", "cosine", "step")

PercentToSigma = Callable[[float], float]


class GuidanceError(Problem):
    """A guidance that cannot work: the message says in one sentence what was expected and what was found."""


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


def _translate(percent: float, percent_to_sigma: PercentToSigma | None) -> float:
    if percent_to_sigma is None:
        raise GuidanceError(
            f"A weight that changes at {100 * percent:g} % of sampling needs the model's percent_to_sigma, and none "
            "was given; "
            "pass one, or write the position as a sigma."
        )
    return float(percent_to_sigma(percent))


def _reached(position: float, unit: str, sigma: float, percent_to_sigma: PercentToSigma | None) -> bool:
    """Whether sampling at `sigma` has come to `position`; the ends of the percent scale need no model."""
    if unit == "percent":
        if position <= 0.0:
            return True
        if position >= 1.0:
            return False
        position = _translate(position, percent_to_sigma)
    return sigma <= position


# Models jump to huge and zero sigmas at exactly 0 and 1 percent; the scale is looked up just inside.
_PERCENT_EDGE = 1e-6


def sigma_to_percent(sigma: float, percent_to_sigma: PercentToSigma) -> float:
    """The sampling percent, 0 to 1, at which `percent_to_sigma` gives `sigma`.

    Inverts the falling function by regula falsi (Illinois variant) on log sigma, in about ten evaluations. Sigmas
    above or below the model's range give 0 and 1.
    """
    low, high = _PERCENT_EDGE, 1.0 - _PERCENT_EDGE
    sigma_low, sigma_high = _translate(low, percent_to_sigma), _translate(high, percent_to_sigma)
    if sigma >= sigma_low:
        return 0.0
    if sigma <= max(sigma_high, 0.0):
        return 1.0
    target = math.log(sigma)
    f_low, f_high = math.log(sigma_low) - target, math.log(max(sigma_high, 1e-30)) - target
    side = 0
    for _ in range(100):
        middle = (low * f_high - high * f_low) / (f_high - f_low)
        f_middle = math.log(max(_translate(middle, percent_to_sigma), 1e-30)) - target
        if abs(f_middle) < 1e-9 or high - low < 1e-9:
            return middle
        if f_middle > 0.0:
            low, f_low = middle, f_middle
            f_high = f_high / 2 if side == 1 else f_high
            side = 1
        else:
            high, f_high = middle, f_middle
            f_low = f_low / 2 if side == -1 else f_low
            side = -1
    return 0.5 * (low + high)


class Weight(ABC):
    """A guidance weight as a function of noise level. Negative values are legitimate, 0 is neutral."""

    @abstractmethod
    def at(self, sigma: float, percent_to_sigma: PercentToSigma | None = None) -> float:
        """The weight at noise level `sigma` (k-diffusion scale, at least 0).

        `percent_to_sigma` maps a sampling percent to the model's sigma, falling from percent 0 to 1; only weights with
        positions in percent need it (`needs_percent`). Raises GuidanceError where it is needed and missing.
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
    """Guidance in a limited interval of noise levels (Kynkäänniemi et al., arXiv 2404.07724): `value` inside,
    `outside` elsewhere.

    The interval runs in sampling order, from `start` to `end`: 0 <= start <= end <= 1 in percent, start >= end >= 0 in
    sigma. It contains its start and not its end, the paper's (sigma_lo, sigma_hi]. An empty interval is `outside`
    everywhere.

    `value` is a number, or another weight that then acts inside the interval only. `outside` is 0 (no guidance from
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
        inside = _reached(self.start, self.unit, sigma, percent_to_sigma) and not _reached(
            self.end, self.unit, sigma, percent_to_sigma
        )
        if not inside:
            return self.outside
        return self.value.at(sigma, percent_to_sigma) if isinstance(self.value, Weight) else self.value

    def to_json(self) -> Any:
        value = self.value.to_json() if isinstance(self.value, Weight) else self.value
        return {
            "type": "interval",
            "value": value,
            "start": self.start,
            "end": self.end,
            "unit": self.unit,
            "outside": self.outside,
        }

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
        points = []
        for point in self.points:
            try:
                position, value = point
            except (TypeError, ValueError):
                raise GuidanceError(f"Expected keyframes as (position, value) pairs, got {point!r}.") from None
            position = _position(position, self.unit, "the position of a keyframe")
            if self.unit == "sigma" and position == 0.0:
                raise GuidanceError("Expected the position of a keyframe in sigma to be above 0, got 0.")
            points.append((position, _finite(value, "the weight of a keyframe")))
        if not points:
            raise GuidanceError("Expected at least one keyframe, got none.")
        points.sort(reverse=self.unit == "sigma")
        for (earlier, _), (later, _) in zip(points, points[1:]):
            if earlier == later:
                raise GuidanceError(f"Expected keyframes at different positions, got {earlier:g} twice.")
        object.__setattr__(self, "points", tuple(points))

    def at(self, sigma: float, percent_to_sigma: PercentToSigma | None = None) -> float:
        sigma = _level(sigma)
        if len(self.points) == 1:
            return self.points[0][1]
        if self.ramp == "step":
            current = self.points[0][1]
            for position, value in self.points[1:]:
                if not _reached(position, self.unit, sigma, percent_to_sigma):
                    break
                current = value
            return current
        if self.unit == "percent":
            if percent_to_sigma is None:
                _translate(self.points[0][0], None)
            progress = sigma_to_percent(sigma, percent_to_sigma)
            positions = [position for position, _ in self.points]
        else:
            progress = -math.log(sigma) if sigma > 0.0 else math.inf
            positions = [-math.log(position) for position, _ in self.points]
        values = [value for _, value in self.points]
        if progress <= positions[0]:
            return values[0]
        for (left, right), (before, after) in zip(zip(positions, positions[1:]), zip(values, values[1:])):
            if progress < right:
                fraction = (progress - left) / (right - left)
                if self.ramp == "cosine":
                    fraction = 0.5 - 0.5 * math.cos(math.pi * fraction)
                return before * (1.0 - fraction) + after * fraction
        return values[-1]

    def to_json(self) -> Any:
        points = [list(point) for point in self.points]
        return {"type": "keyframes", "points": points, "unit": self.unit, "ramp": self.ramp}

    @property
    def needs_percent(self) -> bool:
        return self.unit == "percent" and len(self.points) > 1


def as_weight(value: WeightLike) -> Weight:
    """`value` itself when it is a weight, a Constant when it is a finite number. Raises GuidanceError otherwise."""
    return value if isinstance(value, Weight) else Constant(value)


def weight_from_json(data: Any) -> Weight:
    """The weight that `Weight.to_json` described. Raises GuidanceError, naming what was found, for anything else."""
    if isinstance(data, Weight):
        return data
    if not isinstance(data, Mapping):
        return Constant(data)
    fields = dict(data)
    kinds = {"interval": Interval, "keyframes": Keyframes}
    kind = kinds.get(_choice(fields.pop("type", None), tuple(kinds), "the type of a weight"))
    if kind is Interval and isinstance(fields.get("value"), Mapping):
        fields["value"] = weight_from_json(fields["value"])
    if kind is Keyframes and isinstance(fields.get("points"), Sequence):
        fields["points"] = tuple(fields["points"])
    try:
        return kind(**fields)
    except TypeError:
        raise GuidanceError(
            f"Expected a weight of type {data['type']} with the fields of {kind.__name__}, "
            f"got {', '.join(sorted(map(str, fields)))}."
        ) from None
