"""The best settings of a sweep, drawn anew: a number that was chosen for being the best says too much of itself.

Which points are best was decided on the sweep's samples. Other noise, other prompts and more samples ask them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .keeping import Row
from .points import Point
from .questions import QUESTIONS
from .statistics import reaches
from .sweep import Plan
from .verdicts import AFFORDABLE_SAMPLES, BEYOND, DIGIT_TOLERANCE, FINE_TUNES, PAPER, TRAINED

SAMPLES, SEED = 2000, 1
# Shares of right digits, or of both colours right, at which the nearest points are chosen.
AT = (0.5, 0.7, 0.8, 0.9)
# A point that only just has so many falls short about every other time when it is drawn anew, so the nearest one with
# this much to spare is drawn too.
TO_SPARE = 0.02


def confirming(plan: Plan, rows: Sequence[Row]) -> Plan:
    """The plan that measures the nearest points of a sweep's rows again, with models of every training seed that the
    sweep has of them."""
    chosen = dict.fromkeys(point for question in QUESTIONS for point in _nearest(question, rows))
    seeds = [point for point in plan.points if point.model and point.model.seed and point.with_seed(0) in chosen]
    note = (
        f"These are {len(chosen)} of the {len(rows)} points that the sweep had measured (of {len(plan.points)}, "
        f"{plan.sampling.samples:,} samples each): all priors, and the nearest of each kind at "
        f"{', '.join(f'{level:.0%}' for level in AT)} of right answers and at the accuracy of (b), each also with "
        f"{TO_SPARE:.0%} to spare, with what the sweep has of other training seeds. They are drawn anew, from other noise "
        "and other prompts, so that none is flattered by having been chosen. The verdicts are those of these points alone."
    )
    sampling = replace(plan.sampling, samples=SAMPLES, seed=SEED)
    return replace(
        plan, name="confirm", sampling=sampling, points=(*chosen, *seeds), options=f" --confirm{plan.options}", note=note
    )


def _nearest(question: str, rows: Sequence[Row]) -> Iterator[Point]:
    """What the claims can rest on: every prior, and the nearest points, at the accuracies in `AT` and at (b)'s, of
    constant weights, of all of ours, of schedules that cost no more than CFG, and of all fine-tunes."""
    own = QUESTIONS[question].own_colours
    share = "digit" if own else "both_colours"
    rows = [row for row in rows if row.point.question == question and _is_first(row.point)]
    priors = [row for row in rows if row.point.method == "prior"]
    trained = [row for row in rows if row.point.model is not None and row.point.model.kind == TRAINED]
    levels = list(AT)
    if own and priors:
        levels.append(max(row.numbers[share] for row in priors) - DIGIT_TOLERANCE)

    def nearest(some: list[Row]) -> Iterator[Point]:
        for level in levels:
            for asked in (level, level + TO_SPARE):
                good = [row for row in some if reaches(row.numbers[share], asked)]
                if good:
                    yield min(good, key=lambda row: row.numbers["distance"]).point

    yield from (row.point for row in priors)
    yield from nearest([row for row in trained if row.point.method in PAPER])
    yield from nearest([row for row in trained if row.point.method in BEYOND])
    yield from nearest([row for row in rows if row.point.method in FINE_TUNES])
    cheap = [row for row in trained if row.numbers["samples_per_step"] <= AFFORDABLE_SAMPLES]
    yield from nearest([row for row in cheap if row.point.method == "scheduled"])


def _is_first(point: Point) -> bool:
    return point.model is None or point.model.seed == 0
