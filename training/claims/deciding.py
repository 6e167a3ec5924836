"""From measured rows to verdicts: a claim is a number with a target, confirmed, refuted or undecided.

A claim is confirmed when the whole 95 % bootstrap interval of its number reaches the target, refuted when none of it
does, else undecided. While points are missing that could turn the outcome, and in coarse sweeps always, it is only
"confirmed so far" or "refuted so far". Refuted means refuted by the points of this sweep: settings that nobody tried
could still do it. Choosing the best of a sweep on the same samples makes every method look a little better than it is,
the more so the more settings it has; the interval repeats the choice in every replicate, which does not undo it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .keeping import Row
from .statistics import interval

Details = dict[str, float | str]
Sides = dict[str, list[Row]]
EITHER = ("confirmed", "refuted")


@dataclass(frozen=True)
class Number:
    """What a claim asks for. values [1 + R]: the number, then its bootstrap replicates; None where there is none, for
    the `reason`. details: what stands behind it. words: what to say in its place, where it decides but is infinite."""

    values: Tensor | None = None
    details: Details = field(default_factory=dict)
    words: str = ""
    reason: str = "points not measured yet"


@dataclass(frozen=True)
class Claim:
    """A claim: a row in a paper's table, bound to some of its questions by `replace`.

    letter: in the paper's list. part: what tells claims of one letter apart. better: "lower" or "higher" than the
    target. number(claim, sides) computes it from the rows of each side; it is not asked while a side has none. sides:
    the methods that it compares. awaits: by side, the outcomes that its missing points could still turn; a side that is
    left out can turn both. questions: those whose points count; fits: which of them. frames: further methods whose
    points could make any outcome invalid. invalid: why nothing can be decided, if so. name: of its JSON line; about:
    the cells between letter and statement in the page's table. facts: what else the number needs.
    """

    letter: str
    statement: str
    target: float
    number: Callable[[Claim, Sides], Number]
    sides: Mapping[str, tuple[str, ...]]
    part: str = ""
    better: str = "lower"
    unit: str = "ratio"
    awaits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    questions: tuple[str, ...] = ()
    fits: Callable[[Any], bool] = lambda point: True
    frames: tuple[str, ...] = ()
    invalid: str = ""
    name: str = ""
    about: tuple[str, ...] = ()
    facts: Any = None

    def chooses(self, methods: Sequence[str], point: Any) -> bool:
        """Whether a point counts as one of these methods."""
        return point.question in self.questions and point.method in methods and self.fits(point)


@dataclass(frozen=True)
class Verdict:
    """A decided claim. value: None where there is no number, infinity where no point qualifies. measured of planned:
    the points that it compares."""

    claim: Claim
    outcome: str
    details: Details
    value: float | None = None
    low: float | None = None
    high: float | None = None
    measured: int = 0
    planned: int = 0
    words: str = ""

    @property
    def shown(self) -> str:
        """The value with its interval, or what is said in its place."""
        if self.words or self.value is None:
            return self.words or "not measured"
        if math.isinf(self.value) and math.isinf(self.low or 0.0):
            return shown(self.value)
        low, high = ("none" if end is None or math.isinf(end) else shown(end) for end in (self.low, self.high))
        return f"{shown(self.value)} ({low} to {high})"


def decide(claim: Claim, rows: Sequence[Row], points: Iterable[Any] = (), coarse: bool = False) -> Verdict:
    """Decide a claim from measured rows. points: all that the sweep plans; coarse: as in `study.Plan`."""
    sides = {name: [row for row in rows if claim.chooses(side, row.point)] for name, side in claim.sides.items()}
    found = claim.number(claim, sides) if all(sides.values()) else Number(reason=claim.invalid or Number.reason)
    if found.values is None:
        return Verdict(claim, "undecided", {"reason": found.reason})
    value, (low, high) = float(found.values[0]), interval(found.values[1:])
    outcome, details = outcome_of(value, low, high, claim.target, claim.better), found.details
    known = {row.point for row in rows}
    missing = [point for point in dict.fromkeys(points) if point not in known]
    turning = [side for name, side in claim.sides.items() if outcome in claim.awaits.get(name, EITHER)]
    open_still = any(claim.chooses(side, point) for side in (*turning, claim.frames) for point in missing)
    if outcome != "undecided" and (coarse or open_still):
        outcome += " so far"
    if claim.invalid and outcome != "undecided":
        outcome, details = "undecided", {"reason": claim.invalid, **details}
    measured = len({row.point for side in sides.values() for row in side})
    planned = measured + sum(any(claim.chooses(side, point) for side in claim.sides.values()) for point in missing)
    if found.words:
        return Verdict(claim, outcome, details, measured=measured, planned=planned, words=found.words)
    return Verdict(claim, outcome, details, value, low, high, measured, planned)


def outcome_of(value: float, low: float, high: float, target: float, better: str) -> str:
    """confirmed, refuted or undecided.

    An interval that ends exactly at the target, as that of a method compared with itself, leaves it undecided, and so
    does one that lies wholly on the other side of the target than its value, as that of a maximum can, which replicates
    overstate.
    """
    below, above = max(value, high) < target, min(value, low) > target
    if better == "higher":
        below, above = above, below
    return "confirmed" if below else "refuted" if above else "undecided"


def shown(value: float | str) -> str:
    """A number for people: three digits. Words stay as they are."""
    if isinstance(value, str):
        return value
    return "no point qualifies" if math.isinf(value) else f"{value:.3g}"
