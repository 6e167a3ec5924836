"""The claims as a table, and the numbers that they alone ask for.

All is decided on models of training seed 0, domain models and fine-tunes of one trainer and the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..comparing import COLOURS_RIGHT, Floors, nearest, nearest_over_prior, points_of, share_of, validity
from ..deciding import Claim, Details, Number, Sides
from ..keeping import Row
from ..points import Point
from ..questions import QUESTIONS
from ..statistics import hypervolume, worst_ratio_between
from .methods import BAKED, FINE_TUNES, OTHER_LORA, TEXT_KEPT
from .recipes import CONSTANT, EMPTY_PROMPTS, BakedSpec
from .sweep import WEIGHT

LEAST, MOST = 0.6, 0.9  # the obedience between which methods are compared
WITHIN = 0.1  # how near the dial is to guidance at that share of the weight
STATED_ERROR, STATED_COSINE = 0.25, 0.95  # of what a LoRA leaves of another change of the predictions
LEAST_KEPT = 0.95  # digits that image to image keeps, over those that guidance keeps


def worst_between(claim: Claim, sides: Sides) -> Number:
    """The largest ratio of our lowest distance to theirs, over the obedience from 60 to 90 % that they reach."""
    ours, theirs = sides["ours"], sides["theirs"]
    values, at = worst_ratio_between(*points_of(ours), *points_of(theirs), LEAST, MOST)
    if not float(values[0]):
        return Number(reason=f"the other side has no point with {LEAST:.0%} right")
    where = [nearest(rows, share_of(rows), float(at[0])) for rows in (ours, theirs)]
    words = [
        f"{row.numbers['distance']:.1f} ({str(row.point).partition(': ')[2]})" if row else "no point" for row in where
    ]
    return Number(values, {"worst at an obedience of": f"{float(at[0]):.1%}, {' against '.join(words)}"})


def furthest_from_guidance(claim: Claim, sides: Sides) -> Number:
    """The largest relative difference, in distance or obedience, of the LoRA at a strength from guidance at that share
    of the weight that is baked in (at strength 0 from the prior), at the same scale."""
    known = {(row.point.values["w_d"], row.point.values["w_c"]): row for row in sides["theirs"]}
    known |= {(0.0, row.point.values["scale"]): row for row in sides["prior"]}
    apart: dict[str, Tensor] = {}
    for row in sides["ours"]:
        strength, scale = row.point.values.get("strength", 1.0), row.point.values["scale"]
        other = known.get((WEIGHT * strength, scale))
        for name in ("distance", share_of(sides["ours"])) if other else ():
            assert other is not None
            ratio = row.column(name) / other.column(name).clamp(min=1e-9)
            apart[f"strength {strength:g}, CFG {scale:g}, {name.replace('_', ' ')}"] = ratio - 1
    if not apart:
        return Number()
    details: Details = {name: f"{float(values[0]):+.0%}" for name, values in apart.items()}
    return Number(torch.stack(list(apart.values())).abs().amax(0), details)


def gain_over_same_scales(claim: Claim, sides: Sides) -> Number:
    """Our hypervolume less theirs, at the settings that both have."""
    ours, theirs = ({row.point.settings: row for row in sides[side]} for side in ("ours", "theirs"))
    both = [settings for settings in theirs if settings in ours]
    if not both:
        return Number()
    points = [points_of([rows[settings] for settings in both]) for rows in (ours, theirs)]
    volumes = [hypervolume(*some, claim.facts["ceiling"]) for some in points]
    details: Details = {"varied": float(volumes[0][0]), "empty alone": float(volumes[1][0]), "scales": len(both)}
    return Number(volumes[0] - volumes[1], details)


def kept_over(claim: Claim, sides: Sides) -> Number:
    """Our share of right digits over theirs, both of image to image."""
    (ours, *_), (theirs, *_) = sides["ours"], sides["theirs"]
    shares = [row.column("digit") for row in (ours, theirs)]
    details: Details = {"digits kept": float(shares[0][0]), "by guidance": float(shares[1][0])}
    return Number(shares[0] / shares[1].clamp(min=1e-9), details)


def measured(name: str, claim: Claim, sides: Sides) -> Number:
    """A number of the one point."""
    row = sides["ours"][0]
    details: Details = {key: value for key, value in row.numbers.items() if key.startswith(f"{name}_at_")}
    return Number(row.column(name), details)


def is_plain(point: Point) -> bool:
    """Whether its model, if it has one, is of training seed 0."""
    return point.seed == 0


def is_compared_prompts(point: Point) -> bool:
    """Whether a point is of the recipe whose prompts are changed, or of the one that changes them."""
    model = point.model
    return is_plain(point) and isinstance(model, BakedSpec) and model.recipe in (CONSTANT, EMPTY_PROMPTS)


def row(letter: str, statement: str, target: float, number: Any, *questions: str, part: str = "", **more: Any) -> Claim:
    """A row of the table, asked of each of these questions. more: further fields of the claim; its sides otherwise."""
    fields = {name: more.pop(name) for name in ("better", "unit", "fits", "awaits") if name in more}
    return Claim(letter, statement, target, number, more, part, questions=questions, **{"fits": is_plain, **fields})


EVERY = tuple(QUESTIONS)
FOREIGN = tuple(name for name, question in QUESTIONS.items() if not question.own_colours)
HANDWRITING = tuple(name for name, question in QUESTIONS.items() if question.domain == "handwriting")
OWN = tuple(name for name, question in QUESTIONS.items() if question.own_colours)
OBEDIENCE = f"at every obedience from {LEAST:.0%} to {MOST:.0%} that {{}} reach, its distance over that of the nearest"
CHEAP = OBEDIENCE.format("constant weights") + " guidance of constant weights (3.0 predictions a step), is at most 1"
TUNES = OBEDIENCE.format("fine-tunes") + " fine-tune is at most 1"
KEEPS = (
    f"its best distance with both colours right in at least {COLOURS_RIGHT:.0%}, over the prior's best distance, is at "
    "most 0.7"
)
DIAL = (
    "at strength 0, 0.5, 1 and 1.5 distance and obedience are those of guidance at that share of the weight: largest "
    "relative difference at most 10 %"
)
PROMPTS = "hypervolume of baking at varied prompts minus that at the empty prompt alone, same scales, is above 0"
OTHER = "the change by another LoRA is the same beside the baked one: relative error at most 0.25"
IMG2IMG = "image to image (denoise 0.6): digits kept, over those that guidance keeps, are at least 0.95"
SAME = "c'' - u'' with the LoRA equals c - u: relative error at most 0.25"
COS = "c'' - u'' with the LoRA equals c - u: cosine at least 0.95"
OURS: dict[str, Any] = {"ours": BAKED}
GUIDANCE: dict[str, Any] = {"theirs": ("multi_guidance",), "awaits": {"theirs": ("confirmed",)}}
PRIOR: dict[str, Any] = {"prior": ("prior",), "awaits": {"ours": ("refuted",), "prior": ("confirmed",)}}
DIALS: dict[str, Any] = {"ours": ("baked",), "theirs": ("multi_guidance",), "prior": ("prior",)}
VARIED: dict[str, Any] = {"ours": ("baked",), "theirs": ("ablation",), "fits": is_compared_prompts}
PICTURES: dict[str, Any] = {"ours": ("baked_img2img",), "theirs": ("guidance_img2img",)}
TEXT: dict[str, Any] = {"ours": (TEXT_KEPT,)}
ERROR, COSINE = partial(measured, "error"), partial(measured, "cosine")
CLAIMS = (
    row("a", CHEAP, 1.0, worst_between, *EVERY, **OURS, **GUIDANCE),
    row("b", KEEPS, 0.7, nearest_over_prior, *FOREIGN, **OURS, **PRIOR),
    row("b", TUNES, 1.0, worst_between, *FOREIGN, part="/fine-tunes", **OURS, theirs=FINE_TUNES),
    row("c", DIAL, WITHIN, furthest_from_guidance, *EVERY, **DIALS),
    row("d", PROMPTS, 0.0, gain_over_same_scales, *HANDWRITING, better="higher", unit="share", **VARIED),
    row("e", OTHER, STATED_ERROR, ERROR, OWN[0], part="/other LoRA", ours=(OTHER_LORA,)),
    row("e", IMG2IMG, LEAST_KEPT, kept_over, *HANDWRITING, part="/image to image", better="higher", **PICTURES),
    row("f", SAME, STATED_ERROR, ERROR, *OWN, **TEXT),
    row("f", COS, STATED_COSINE, COSINE, *OWN, part="/cosine", better="higher", **TEXT),
)
OF_DISTANCES = (worst_between, nearest_over_prior, furthest_from_guidance, gain_over_same_scales)


def claims(floors: Floors, rows: Sequence[Row]) -> list[Claim]:
    """Every claim of the table, of each of its questions."""
    return [bound(claim, question, floors, rows) for claim in CLAIMS for question in claim.questions]


def bound(claim: Claim, question: str, floors: Floors, rows: Sequence[Row] = ()) -> Claim:
    """A row of the table, asked of one question."""
    valid = validity(question, floors, rows) if claim.number in OF_DISTANCES and question in floors else None
    return replace(
        claim,
        name=f"{question}/{claim.letter}{claim.part}".replace(" ", "_"),
        about=(QUESTIONS[question].title,),
        questions=(question,),
        facts=floors.get(question),
        invalid="" if valid is None or valid.holds else str(valid),
    )
