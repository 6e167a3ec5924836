"""What the page of baked LoRAs shows: validity, training seeds, what predictions keep, and of each question its fronts
and points."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparing import Floors, validity
from ..fronts import (
    ABOUT_FLOORS,
    drawn,
    families_of,
    floor_lines,
    front_line,
    fronts_of,
    question_lines,
    seed_lines,
    validity_lines,
)
from ..keeping import Row
from ..points import Point
from ..questions import QUESTIONS
from ..report import Column, Report, number, table
from ..study import Plan
from .methods import BAKED, FINE_TUNES, METHODS
from .predictions import LEVELS
from .recipes import BakedSpec

TUNED = {"full": "full fine-tune", "low_rank": "LoRA fine-tune"}
ABOUT = (
    "Obedience: digits right in a domain's own colours, both colours right in foreign ones. Domain models, fine-tunes "
    "and LoRAs are of one trainer and see the same images. "
)
ABOUT_PREDICTIONS = (
    "A change of predictions, without and with the baked LoRA: of the text (c - u), or of another LoRA, a fine-tune of "
    "the other handwriting. Relative error and cosine over noise levels, then the relative error at single timesteps."
)


def family(row: Row) -> str:
    """What a row is called in tables: its method; of fine-tunes their kind, of ablations what they change."""
    model, title = row.point.model, METHODS[row.point.method].title
    if METHODS[row.point.method].role == "ablation" and isinstance(model, BakedSpec):
        return title + (model.recipe if model.changes else f"{model.steps} steps")
    return TUNED.get(model.kind, "") + title if model else title


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return families_of(rows, METHODS, family)


def report(plan: Plan, rows: Sequence[Row], floors: Floors) -> Report:
    """The description of the page."""
    sampled, predicted = ([row for row in rows if (row.point.method in METHODS) == some] for some in (True, False))
    more = ["## Validity", "", *validity_lines(floors, sampled), ABOUT_FLOORS, "", *seed_lines(sampled)]
    more += _prediction_lines(predicted)
    lines = list(floor_lines("bake", plan.sampling, floors, sampled))
    for name, question in QUESTIONS.items():
        own = [row for row in sampled if row.point.seed == 0 and row.point.question == name]
        if not own:
            continue
        ours, theirs = (
            {title: [row for row in own if row.point.method in methods] for title, methods in sides.items()}
            for sides in (
                {"all baked LoRAs": BAKED},
                {"guidance": ("multi_guidance",), "all fine-tunes": FINE_TUNES, "prior": ("prior",)},
            )
        )
        fronts = list(fronts_of(families(own), ours, theirs, floors[name]["ceiling"]))
        lines += [front_line("bake", plan.sampling, question, front) for front in fronts]
        more += question_lines(question, families(own), fronts, str(validity(name, floors, sampled)))
    title = "In-domain guidance baked into a LoRA, measured"
    return Report(title, ("question",), drawn(plan.sampling), more, lines, ABOUT)


def _prediction_lines(rows: Sequence[Row]) -> list[str]:
    titles = {"text_kept": "of the text", "other_lora": "of another LoRA"}

    def title(group: list[Row]) -> str:
        point: Point = group[0].point
        return f"{titles[point.method]}, {QUESTIONS[point.question].title}"

    columns: list[Column] = [("change", title), ("LoRA", lambda group: str(group[0].point.model))]
    columns += [number("error", ".3f"), number("cosine", ".4f")]
    columns += [number(f"at {level}", ".3f", f"error_at_{level}") for level in LEVELS]
    if not rows:
        return []
    return ["## What predictions keep", "", ABOUT_PREDICTIONS, "", *table(columns, [[row] for row in rows])]
