"""The claims as a table, and the few numbers that they ask for.

All is decided on domain models of the fine-tunes' own trainer and images. The shipped domain models come from another
recipe (more coloured pictures, another rate); they have verdicts of their own, which say nothing about fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..comparing import Floors, asked_share, best_point, nearest_over_prior, points_of, validity, worst_over_theirs
from ..deciding import Claim, Details, Number, Sides
from ..keeping import Row
from ..points import Point
from ..questions import QUESTIONS
from ..statistics import hypervolume, interval, lowest, ratio_of_lowest
from .methods import BEYOND, FINE_TUNES, PAPER

AFFORDABLE_SAMPLES = 2.0


def cheap_over_constant(claim: Claim, sides: Sides) -> Number:
    """The lowest distance of schedules at plain CFG's cost, over that of constant weights of the same models, at the
    share asked for. Where only one of the two reaches it, the ratio is 0 or infinite and is said in words."""
    cheap = [row for row in sides["ours"] if row.numbers["samples_per_step"] <= AFFORDABLE_SAMPLES]
    models = {row.point.model for row in cheap}  # other training lengths have no schedules
    constant = [row for row in sides["theirs"] if row.point.model in models]
    if not cheap or not constant:
        return Number()
    asked, ours, theirs = asked_share(sides), points_of(cheap), points_of(constant)
    best = [float(lowest(*points, asked)[0]) for points in (ours, theirs)]
    if all(map(math.isinf, best)):
        return Number(reason="neither reaches the accuracy asked for")
    words = "only constant weights reach it" if math.isinf(best[0]) else ""
    words = "only the schedules reach it" if math.isinf(best[1]) else words
    details = {"best distance of constant weights": best[1], **best_point(cheap, asked)}
    return Number(ratio_of_lowest(*ours, *theirs, asked), details, words)


def gain_in_hypervolume(claim: Claim, sides: Sides) -> Number:
    """Our hypervolume less theirs at the settings that both have of a model, mean over the models."""
    gains = {}
    for model in dict.fromkeys(row.point.model for row in sides["theirs"]):
        ours, theirs = (
            {row.point.settings: row for row in sides[side] if row.point.model == model} for side in ("ours", "theirs")
        )
        both = [settings for settings in theirs if settings in ours]
        if both:
            points = [points_of([rows[settings] for settings in both]) for rows in (ours, theirs)]
            volumes = [hypervolume(*some, claim.facts["ceiling"]) for some in points]
            gains[model] = volumes[0] - volumes[1]
    if not gains:
        return Number()
    form = "{:.2f} ({:.2f} to {:.2f})"
    details: Details = {str(model): form.format(float(gain[0]), *interval(gain[1:])) for model, gain in gains.items()}
    return Number(torch.stack(list(gains.values())).mean(0), details)


# Which outcomes missing points could still turn: more of ours can only lower (b), say. Where nothing stands, any.
AWAITS: dict[Any, dict[str, tuple[str, ...]]] = {
    worst_over_theirs: {"theirs": ("confirmed",)},
    nearest_over_prior: {"ours": ("refuted",), "prior": ("confirmed",)},
    cheap_over_constant: {"ours": ("refuted",), "theirs": ("confirmed",)},
}
LEADS = "at every digit accuracy that both reach, its distance over that of the best fine-tune is below 1"
HALVES = "its best distance with digits within 3 points of the prior's, over the prior's best distance, is at most 0.5"
KEEPS = "its best distance with both colours right in at least 80 %, over the prior's best distance, is at most 0.7"
GAINS = "hypervolume with the prior's u minus hypervolume with the fine-tune's u, mean over {}, is above 0"
CHEAP = (
    "{} colours: the best distance of schedules at an average of at most 2 samples a step, over the best of constant "
    "weights, at the accuracy that ({}) asks for, is at most 1"
)
PRIOR, CONSTANT = ("prior",), "constant weights"


def row(
    letter: str, about: str, statement: str, target: float, number: Any, *, own: bool = True, **sides: Any
) -> Claim:
    """A row of the table. about: what the page calls ours. own: whether the domain's own colours are asked."""
    awaits = AWAITS.get(number, {})
    return Claim(letter, statement, target, number, sides, about=(about,), awaits=awaits, facts=own)


def of_tunes(kind: str, title: str) -> Claim:
    """(c) of one kind of fine-tunes."""
    sides: dict[str, Any] = {"ours": ("fine_tune_prior_u",), "theirs": ("fine_tune",)}
    claim = row("c", title, GAINS.format(title), 0.0, gain_in_hypervolume, **sides)
    fits = partial(is_of_kind, kind)
    return replace(claim, part=f", {title}", better="higher", unit="share", fits=fits)


def is_of_kind(kind: str, point: Point) -> bool:
    return point.model is not None and point.model.kind == kind


A = row("a", CONSTANT, LEADS, 1.0, worst_over_theirs, ours=PAPER, theirs=FINE_TUNES)
B = row("b", CONSTANT, HALVES, 0.5, nearest_over_prior, ours=PAPER, prior=PRIOR)
C = [of_tunes("full", "full fine-tunes"), of_tunes("low_rank", "LoRA fine-tunes")]
D = row("d", CONSTANT, KEEPS, 0.7, nearest_over_prior, own=False, ours=PAPER, prior=PRIOR)
SCHEDULES = {"ours": ("scheduled",), "theirs": PAPER, "prior": PRIOR}
E = row("e", "schedules", CHEAP.format("own", "b"), 1.0, cheap_over_constant, **SCHEDULES)
E_FOREIGN = replace(E, part=", foreign colours", statement=CHEAP.format("foreign", "d"), facts=False)


def with_beyond(claim: Claim) -> list[Claim]:
    """A claim of the paper's method, and the same of everything that this project adds to it, too."""
    return [claim, replace(claim, sides={**claim.sides, "ours": BEYOND}, part="/beyond", about=("all of ours",))]


# By the kind of the domain models that are decided on.
CLAIMS = {
    "domain": [*with_beyond(A), *with_beyond(B), *C, *with_beyond(D), E, E_FOREIGN],
    "shipped": [A, B, D, E, E_FOREIGN],
}


def claims(floors: Floors, rows: Sequence[Row]) -> list[Claim]:
    """Every claim of the table, of each domain."""
    domains = dict.fromkeys(question.domain for question in QUESTIONS.values())
    every = [(domain, models, claim) for domain in domains for models, table in CLAIMS.items() for claim in table]
    return [bound(claim, domain, models, floors, rows) for domain, models, claim in every]


def bound(claim: Claim, domain: str, models: str, floors: Floors, rows: Sequence[Row] = ()) -> Claim:
    """A row of the table, asked of one domain and one kind of domain models."""
    asked = (domain, claim.facts)
    (question,) = (name for name, found in QUESTIONS.items() if (found.domain, found.own_colours) == asked)

    def fits(point: Point) -> bool:
        kinds = (models, "full", "low_rank")
        return claim.fits(point) and (point.model is None or (point.model.kind in kinds and point.model.seed == 0))

    valid = validity(question, floors, rows) if question in floors else None
    shipped = models == "shipped"
    return replace(
        claim,
        name=f"{domain}/{claim.letter}{claim.part}{'/shipped' * shipped}",
        about=(domain, claim.about[0] + ", shipped model" * shipped),
        questions=(question,),
        fits=fits,
        facts=floors.get(question),
        invalid="" if valid is None or valid.holds else str(valid),
    )
