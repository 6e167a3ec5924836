"""From a number with its bootstrap replicates to a verdict in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from .statistics import interval


@dataclass(frozen=True)
class Decision:
    """One decided statement. value: None where there are no points, infinity where no point qualifies; words: what to
    say in its place. measured of planned: the points that it is about. details: further numbers by name."""

    statement: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    target: float
    better: str
    outcome: str
    details: dict[str, float | str] = field(default_factory=dict)
    measured: int = 0
    planned: int = 0
    words: str = ""


def decide(values: Tensor, target: float, better: str) -> tuple[float, float, float, str]:
    """(value, low, high, outcome) of one number with its replicates [1 + R], the value first.

    An interval that ends exactly at the target, as that of a method compared with itself, leaves it undecided, and so
    does one that lies wholly on the other side than its value, as that of a maximum can, which replicates overstate.
    """
    value, (low, high) = float(values[0]), interval(values[1:])
    below, above = max(value, high) < target, min(value, low) > target
    if better == "higher":
        below, above = above, below
    return value, low, high, "confirmed" if below else "refuted" if above else "undecided"


def shown(value: float | None) -> str:
    """A number for people: three digits, and words where there is none."""
    if value is None:
        return "not measured"
    return "no point qualifies" if math.isinf(value) else f"{value:.3g}"


def shown_interval(decision: Decision) -> str:
    """The value of a decision with its interval, or what is said in its place."""
    if decision.words:
        return decision.words
    if decision.value is None or (math.isinf(decision.value) and math.isinf(decision.low)):
        return shown(decision.value)
    return f"{shown(decision.value)} ({_end(decision.low)} to {_end(decision.high)})"


def shown_target(decision: Decision) -> str:
    return f"{'at most' if decision.better == 'lower' else 'at least'} {decision.target:g}"


def shown_details(decision: Decision) -> str:
    return "; ".join(
        f"{name} {shown(value) if isinstance(value, (int, float)) else value}"
        for name, value in decision.details.items()
    )


def _end(value: float | None) -> str:
    return "none" if value is None or math.isinf(value) else f"{value:.3g}"
