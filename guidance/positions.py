"""Positions in sampling, in one of two units, and whether a noise level has come to them.

* `"percent"`, ComfyUI's sampling percent: 0 is the start of sampling (highest noise), 1 its end. It counts the model's
  training timesteps, not the steps of one run; the model's `percent_to_sigma` translates it.
* `"sigma"`, the noise level itself in the k-diffusion scale, x = x0 + sigma * noise. Larger comes first.

A position takes effect when sampling *reaches* it, that is from sigma <= position on, so neighbouring intervals that
share an edge never overlap and never leave a gap. Percent 0 is reached by every sigma, percent 1 by none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .errors import GuidanceError

UNITS = ("percent", "sigma")

PercentToSigma = Callable[[float], float]
"""A model's sigma at a sampling percent, falling from percent 0 to 1."""

# Models jump to huge and zero sigmas at exactly 0 and 1 percent; the scale is looked up just inside.
_EDGE = 1e-6


def needed(percent_to_sigma: PercentToSigma | None, percent: float) -> PercentToSigma:
    """The translation that a position needs. Raises GuidanceError where none was given."""
    if percent_to_sigma is None:
        raise GuidanceError(f"A weight that changes at {100 * percent:g} % of sampling needs percent_to_sigma.")
    return percent_to_sigma


def reached(position: float, unit: str, sigma: float, percent_to_sigma: PercentToSigma | None) -> bool:
    """Whether sampling at `sigma` has come to `position`; the ends of the percent scale need no model."""
    if unit == "percent":
        if position <= 0.0 or position >= 1.0:
            return position <= 0.0
        position = float(needed(percent_to_sigma, position)(position))
    return sigma <= position


def sigma_to_percent(sigma: float, percent_to_sigma: PercentToSigma) -> float:
    """The sampling percent, 0 to 1, at which `percent_to_sigma` gives `sigma`.

    Inverts the falling function by regula falsi (Illinois variant) on log sigma, in about ten evaluations. Sigmas
    above or below the model's range give 0 and 1.
    """
    low, high = _EDGE, 1.0 - _EDGE
    sigma_low, sigma_high = float(percent_to_sigma(low)), float(percent_to_sigma(high))
    if sigma >= sigma_low:
        return 0.0
    if sigma <= max(sigma_high, 0.0):
        return 1.0
    target = math.log(sigma)
    f_low, f_high = math.log(sigma_low) - target, math.log(max(sigma_high, 1e-30)) - target
    side = 0
    for _ in range(100):
        middle = (low * f_high - high * f_low) / (f_high - f_low)
        f_middle = math.log(max(float(percent_to_sigma(middle)), 1e-30)) - target
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
