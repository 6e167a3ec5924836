"""The best settings of a sweep, drawn anew, from other noise and prompts: a number that was chosen for being the best
says too much of itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..comparing import COLOURS_RIGHT, DIGIT_TOLERANCE, nearest
from ..keeping import Row
from ..points import Point
from ..questions import QUESTIONS, Question
from ..study import Plan
from .claims import AFFORDABLE_SAMPLES
from .methods import BEYOND, FINE_TUNES, PAPER

SAMPLES, SEED = 2000, 1
# Shares of right digits, or of both colours right, at which the nearest points are chosen.
AT = (0.5, 0.7, 0.8, 0.9)
# A point that only just has so many falls short about every other time when it is drawn anew, so the nearest one with
# this much to spare is drawn too.
TO_SPARE = 0.02


def confirming(plan: Plan, rows: Sequence[Row]) -> Plan:
    """The plan that measures the nearest points of a sweep's rows again, with models of every training seed that the
    sweep has of them."""
    chosen = dict.fromkeys(point for question in QUESTIONS.values() for point in _nearest(question, rows))
    seeds = [point for point in plan.points if point.seed and point.with_seed(0) in chosen]
    chosen |= dict.fromkeys(point for question in QUESTIONS.values() for point in _nearest(question, rows, rivals=True))
    note = (
        f"These are {len(chosen)} of the {len(rows)} points that the sweep had measured (of {len(plan.points)}, "
        f"{plan.sampling.samples:,} samples each): all priors, and the nearest of each kind (confirming.py). They are "
        "drawn anew, from other noise and other prompts. The verdicts are those of these points alone."
    )
    sampling, options = replace(plan.sampling, samples=SAMPLES, seed=SEED), f" --confirm{plan.options}"
    return replace(plan, sampling=sampling, points=(*chosen, *seeds), options=options, note=note)


def _nearest(question: Question, rows: Sequence[Row], rivals: bool = False) -> Iterator[Point]:
    """Every prior, and the nearest of constant weights, of all of ours, of all fine-tunes and of schedules that cost no
    more than CFG; rivals: instead the constant weights of each model that has such schedules, where (e) asks."""
    rows = [row for row in rows if row.point.question == question.name and row.point.seed == 0]
    trained = [row for row in rows if row.point.model and row.point.model.kind == "domain"]
    priors, tuned = ([row for row in rows if row.point.method in some] for some in (("prior",), FINE_TUNES))
    constant, ours, cheap = (
        [row for row in trained if row.point.method in some] for some in (PAPER, BEYOND, ("scheduled",))
    )
    cheap = [row for row in cheap if row.numbers["samples_per_step"] <= AFFORDABLE_SAMPLES]
    digits = sorted(row.numbers["digit"] - DIGIT_TOLERANCE for row in priors)
    asked = digits[-1:] if question.own_colours else [COLOURS_RIGHT]
    if rivals:
        models, levels = dict.fromkeys(row.point.model for row in cheap), asked
        sets = [[row for row in constant if row.point.model == model] for model in models]
    else:
        sets, levels = [constant, ours, tuned, cheap], [*AT, *asked]
        yield from (row.point for row in priors)
    for some in sets:
        for level in (level + spare for level in levels for spare in (0, TO_SPARE)):
            row = nearest(some, question.share, level)
            if row:
                yield row.point
