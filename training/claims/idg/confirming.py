"""The best settings of a sweep, drawn anew: a number that was chosen for being the best says too much of itself.

Which points are best was decided on the sweep's samples. Other noise, other prompts and more samples ask them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..keeping import Row
from ..statistics import reaches
from .points import Point
from .questions import QUESTIONS
from .sweep import Plan
from .verdicts import AFFORDABLE_SAMPLES, BEYOND, COLOURS_RIGHT, DIGIT_TOLERANCE, FINE_TUNES, PAPER, TRAINED

SAMPLES, SEED = 2000, 1
# Shares of right digits, or of both colours right, at which the nearest points are chosen.
AT = (0.5, 0.7, 0.8, 0.9)
# A point that only just has so many falls short about every other time when it is drawn anew, so the nearest one with
# this much to spare is drawn too.
TO_SPARE = 0.02


def confirming(plan: Plan, rows: Sequence[Row]) -> Plan:
    """The plan that measures the nearest points of a sweep's rows again, with models of every training seed that the
    sweep has of them, and what (e) holds them against."""
    chosen = dict.fromkeys(point for question in QUESTIONS for point in _nearest(question, rows))
    seeds = [point for point in plan.points if point.model and point.model.seed and point.with_seed(0) in chosen]
    chosen |= dict.fromkeys(point for question in QUESTIONS for point in _rivals_of_schedules(question, rows))
    note = (
        f"These are {len(chosen)} of the {len(rows)} points that the sweep had measured (of {len(plan.points)}, "
        f"{plan.sampling.samples:,} samples each): all priors, and the nearest of each kind at "
        f"{', '.join(f'{level:.0%}' for level in AT)} of right answers and at the accuracy of (b), each also with "
        f"{TO_SPARE:.0%} to spare, with what the sweep has of other training seeds, and the constant weights that (e) "
        "holds schedules against. They are drawn anew, from other noise and other prompts, so that none is flattered "
        "by having been chosen. The verdicts are those of these points alone."
    )
    sampling = replace(plan.sampling, samples=SAMPLES, seed=SEED)
    return replace(
        plan,
        name="confirm",
        sampling=sampling,
        points=(*chosen, *seeds),
        options=f" --confirm{plan.options}",
        note=note,
    )


def _nearest(question: str, rows: Sequence[Row]) -> Iterator[Point]:
    """What the claims can rest on: every prior, and the nearest points, at the accuracies in `AT` and at (b)'s, of
    constant weights, of all of ours, of schedules that cost no more than CFG, and of all fine-tunes."""
    rows = _of(question, rows)
    trained, levels = _trained(rows), [*AT, *_asked_for(question, rows)]
    yield from (row.point for row in rows if row.point.method == "prior")
    for some in (
        [row for row in trained if row.point.method in PAPER],
        [row for row in trained if row.point.method in BEYOND],
        [row for row in rows if row.point.method in FINE_TUNES],
        _cheap(trained),
    ):
        yield from _nearest_at(question, some, levels)


def _rivals_of_schedules(question: str, rows: Sequence[Row]) -> Iterator[Point]:
    """The nearest constant weights, at the accuracy that (e) asks at, of every model that has cheap schedules."""
    rows = _of(question, rows)
    trained = _trained(rows)
    for model in dict.fromkeys(row.point.model for row in _cheap(trained)):
        own = [row for row in trained if row.point.method in PAPER and row.point.model == model]
        yield from _nearest_at(question, own, _asked_for(question, rows))


def _nearest_at(question: str, rows: Sequence[Row], levels: Sequence[float]) -> Iterator[Point]:
    share = "digit" if QUESTIONS[question].own_colours else "both_colours"
    for level in levels:
        for asked in (level, level + TO_SPARE):
            good = [row for row in rows if reaches(row.numbers[share], asked)]
            if good:
                yield min(good, key=lambda row: row.numbers["distance"]).point


def _asked_for(question: str, rows: Sequence[Row]) -> list[float]:
    """The share that (b) or (d), and (e), ask for."""
    if not QUESTIONS[question].own_colours:
        return [COLOURS_RIGHT]
    digits = [row.numbers["digit"] for row in rows if row.point.method == "prior"]
    return [max(digits) - DIGIT_TOLERANCE] if digits else []


def _of(question: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.point.question == question and _is_first(row.point)]


def _trained(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.point.model is not None and row.point.model.kind == TRAINED]


def _cheap(rows: Sequence[Row]) -> list[Row]:
    """Schedules that cost no more than CFG."""
    affordable = [row for row in rows if row.numbers["samples_per_step"] <= AFFORDABLE_SAMPLES]
    return [row for row in affordable if row.point.method == "scheduled"]


def _is_first(point: Point) -> bool:
    return point.model is None or point.model.seed == 0
