"""What the page of in-domain guidance shows: validity, training seeds, and of each question its fronts and points."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparing import Floors, validity
from ..fronts import (
    ABOUT_FLOORS,
    Front,
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
from ..questions import QUESTIONS
from ..report import Report
from ..study import Plan
from .methods import BEYOND, FINE_TUNES, METHODS, PAPER

FINE_TUNE_TITLES = {"full": "full fine-tune", "low_rank": "LoRA fine-tune"}
ABOUT_MODELS = (
    "The models are of one trainer and see the same images, except in rows that say `shipped model`: that one was made "
    "by another recipe (another rate, each image in two colourings), which is no fair rival of these fine-tunes. "
)


def family(row: Row) -> str:
    """What a row is called in tables: its method, and of fine-tunes also their kind."""
    kind, title = row.point.model.kind if row.point.model else "", METHODS[row.point.method].title
    return FINE_TUNE_TITLES.get(kind, "") + title + ", shipped model" * (kind == "shipped")


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return families_of(rows, METHODS, family)


def fronts_of_question(rows: Sequence[Row], ceiling: float) -> list[Front]:
    """What every family of a question reaches at fixed shares, and ours over the fine-tunes and the prior there.

    rows: of models of training seed 0.
    """
    trained = [row for row in rows if row.point.model and row.point.model.kind != "shipped"]
    ours, theirs = (
        {name: [row for row in some if row.point.method in methods] for name, methods in sets.items()}
        for some, sets in (
            (trained, {"multi-guidance": PAPER, "all of ours": BEYOND}),
            (rows, {"all fine-tunes": FINE_TUNES, "prior": ("prior",)}),
        )
    )
    return list(fronts_of(families(rows), ours, theirs, ceiling))


def report(plan: Plan, rows: Sequence[Row], floors: Floors) -> Report:
    """The description of the page."""
    more = ["## Validity", "", *validity_lines(floors, rows), ABOUT_FLOORS, "", *seed_lines(rows)]
    lines = list(floor_lines("idg", plan.sampling, floors, rows))
    for name, question in QUESTIONS.items():
        own = [row for row in rows if row.point.seed == 0 and row.point.question == name]
        if own:
            fronts = fronts_of_question(own, floors[name]["ceiling"])
            lines += [front_line("idg", plan.sampling, question, front) for front in fronts]
            more += question_lines(question, families(own), fronts, str(validity(name, floors, rows)))
    return Report(
        "The claims of in-domain guidance, measured",
        ("domain", "methods"),
        drawn(plan.sampling),
        more,
        lines,
        ABOUT_MODELS,
    )
