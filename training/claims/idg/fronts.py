"""What every family of points reaches at fixed shares of right answers: its lowest distance there, with intervals.

Claims ask at one share, or for the worst over all shares, which hangs on where two fronts happen to cross. These rows
say what lies between, for every method by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..keeping import Row, columns
from ..statistics import hypervolume, interval, lowest, ratio_of_lowest

# Shares of right digits (own colours) or of both colours right (foreign ones).
LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
Ranged = tuple[float, float, float]  # value, low, high; infinite where no point qualifies
NEITHER: Ranged = (math.nan,) * 3  # a ratio of two families of which neither has a point there


@dataclass(frozen=True)
class Front:
    """A family's lowest distances at `LEVELS`, or the ratios of two families' ones; hypervolume: none of ratios."""

    name: str
    points: int
    at: dict[float, Ranged]
    hypervolume: Ranged | None = None


def front(name: str, rows: Sequence[Row], share: str, ceiling: float) -> Front:
    """The lowest distance of a family among its points with at least so large a share."""
    distances, shares = columns(rows, "distance"), columns(rows, share)
    at = {level: _ranged(lowest(distances, shares, level)) for level in LEVELS}
    return Front(name, len(rows), at, _ranged(hypervolume(distances, shares, ceiling)))


def ratios(name: str, ours: Sequence[Row], theirs: Sequence[Row], share: str) -> Front:
    """Lowest distance over lowest distance; 0 or infinite where only one of the two has a point, NaN where neither."""
    pairs = (columns(rows, column) for rows in (ours, theirs) for column in ("distance", share))
    own, own_share, other, other_share = pairs
    at = {}
    for level in LEVELS:
        lows = lowest(own, own_share, level), lowest(other, other_share, level)
        found = ratio_of_lowest(own, own_share, other, other_share, level)
        at[level] = NEITHER if all(math.isinf(low[0]) for low in lows) else _ranged(found)
    return Front(name, len(ours) + len(theirs), at)


def table(fronts: Sequence[Front], share: str) -> list[str]:
    """Fronts as lines of Markdown."""
    heads = [f"{level:.0%}" for level in LEVELS]
    parts = [
        f"| {share} at least | points | {' | '.join(heads)} | hypervolume |",
        f"|---|---|{'---|' * len(heads)}---|",
    ]
    for one in fronts:
        cells = [_cell(*one.at[level], whole=one.hypervolume is not None) for level in LEVELS]
        volume = "" if one.hypervolume is None else "{:.2f} ({:.2f} to {:.2f})".format(*one.hypervolume)
        parts.append(f"| {one.name} | {one.points} | {' | '.join(cells)} | {volume} |")
    return parts


def facts(one: Front) -> Mapping[str, list[float]]:
    """A front's numbers for a JSON line: share -> [value, low, high]."""
    return {f"{level:g}": list(found) for level, found in one.at.items()}


def _cell(value: float, low: float, high: float, whole: bool) -> str:
    """`whole`: a distance and no ratio."""
    if math.isnan(value):
        return "neither"
    if math.isinf(value) or (not whole and value == 0):
        return "" if whole else "no rival" if value == 0 else "not reached"
    form = ".0f" if whole and value >= 100 else ".1f" if whole else ".2f"
    return f"{value:{form}} ({low:{form}} to {'none' if math.isinf(high) else f'{high:{form}}'})"


def _ranged(values: Tensor) -> Ranged:
    """(value, low, high) of a number with its replicates [1 + R], the value first."""
    return (float(values[0]), *interval(values[1:]))
