"""Numbers that claims about the mini world's questions ask for, and whether a question's distances mean anything.

Points of a question lie at a distance and a share of right answers: digits in a domain's own colours, both colours in
foreign ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .deciding import Claim, Details, Number, Sides
from .keeping import Row, columns
from .questions import QUESTIONS
from .statistics import lowest, reaches, worst_ratio

Floors = Mapping[str, Mapping[str, float]]  # by question, as `questions.floors`
DIGIT_TOLERANCE, COLOURS_RIGHT = 0.03, 0.8
LEAST_CEILING = 20.0  # of the ceiling over the floor
MOST_AUTOENCODER = 0.05  # of the autoencoder's floor over the prior's lowest distance


def points_of(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Distances and shares of right answers of one question's rows, each [P, 1 + R]."""
    return columns(rows, "distance"), columns(rows, share_of(rows))


def share_of(rows: Sequence[Row]) -> str:
    return QUESTIONS[rows[0].point.question].share


def asked_share(sides: Sides) -> Tensor:
    """The share that (b), (d) and (e) ask for: both colours, or nearly the digits of the prior's best scale."""
    if share_of(sides["ours"]) == "digit":
        return columns(sides["prior"], "digit").amax(0) - DIGIT_TOLERANCE
    return torch.tensor([COLOURS_RIGHT], dtype=torch.float64)


def nearest(rows: Sequence[Row], share: str, at_least: float) -> Row | None:
    """The row of the lowest distance among those whose share is at least so high."""
    good = [row for row in rows if reaches(row.numbers[share], at_least)]
    return min(good, key=lambda row: row.numbers["distance"], default=None)


def best_point(rows: Sequence[Row], asked: Tensor) -> Details:
    """The nearest point at the share asked for."""
    share, at_least = share_of(rows), float(asked[0])
    row = nearest(rows, share, at_least)
    if row is None:
        return {"accuracy asked for": at_least, "best point": "none qualifies"}
    return {"accuracy asked for": at_least, "best point": str(row.point), "its distance": row.numbers["distance"]}


def worst_over_theirs(claim: Claim, sides: Sides) -> Number:
    """The largest ratio of our lowest distance to theirs, over every share that both reach."""
    ours, theirs = sides["ours"], sides["theirs"]
    values, at = worst_ratio(*points_of(ours), *points_of(theirs))
    where = [nearest(rows, share_of(rows), float(at[0])) for rows in (ours, theirs)]
    words = [f"{row.numbers['distance']:.1f} ({str(row.point).partition(': ')[2]})" for row in where if row]
    return Number(values, {"worst at an accuracy of": f"{float(at[0]):.1%}, {' against '.join(words)}"})


def nearest_over_prior(claim: Claim, sides: Sides) -> Number:
    """Our lowest distance at the share asked for, over the prior's lowest at any."""
    asked, best = asked_share(sides), columns(sides["prior"], "distance").amin(0)
    details = {"prior's best distance": float(best[0]), **best_point(sides["ours"], asked)}
    return Number(lowest(*points_of(sides["ours"]), asked) / best, details)


class Validity(NamedTuple):
    """Whether distances of a question mean anything. ceiling: the ceiling over the floor; autoencoder: the
    autoencoder's floor over the prior's lowest distance, NaN while no prior is measured. Floors are the uncorrected
    ones, which are too high if anything."""

    ceiling: float
    autoencoder: float

    @property
    def holds(self) -> bool:
        return self.ceiling >= LEAST_CEILING and self.autoencoder <= MOST_AUTOENCODER

    def __str__(self) -> str:
        return (
            f"ceiling / floor {self.ceiling:.0f} (at least {LEAST_CEILING:.0f}), autoencoder floor / prior "
            f"{self.autoencoder:.2%} (at most {MOST_AUTOENCODER:.0%}): {'valid' if self.holds else 'not valid'}"
        )


def validity(question: str, floors: Floors, rows: Sequence[Row]) -> Validity:
    values = floors[question]
    best = min((row.numbers["distance"] for row in rows if row.point.name == f"{question}/prior"), default=math.nan)
    share = values["autoencoder_floor_uncorrected"] / max(best, 1e-9)
    return Validity(values["ceiling"] / max(values["floor_uncorrected"], 1e-9), share)
