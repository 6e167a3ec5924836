"""What the page of in-domain guidance shows: validity, training seeds, and of each question its fronts and points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ..keeping import Row
from ..report import Column, Report, capitalized, json_line, number, table
from ..statistics import hypervolume, interval, is_on_front, lowest, ratio_of_lowest
from ..study import Plan, Sampling
from .claims import LEAST_CEILING, MOST_AUTOENCODER, Floors, points_of, validity
from .methods import BEYOND, FINE_TUNES, METHODS, PAPER
from .questions import QUESTIONS, Question

# Shares of right digits (own colours) or of both colours right (foreign ones).
LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
FINE_TUNE_TITLES = {"full": "full fine-tune", "low_rank": "LoRA fine-tune"}
ABOUT_MODELS = (
    "The models are of one trainer and see the same images, except in rows that say `shipped model`: that one was made "
    "by another recipe (another rate, each image in two colourings), which is no fair rival of these fine-tunes. "
)
ABOUT_FRONTS = (
    "The lowest distance (95 %) among a method's points with at least so many right, and ratios of two methods' lowest "
    "ones; empty where no point has so many. Hypervolume: the share of the rectangle up to the ceiling's distance and "
    "100 % that the points dominate."
)
ABOUT_FLOORS = (
    "Floors are given before their bias is removed, since a bootstrap says nothing near 0: they are too high if "
    f"anything. Valid is ceiling / floor of at least {LEAST_CEILING:.0f} and an autoencoder floor of at most "
    f"{MOST_AUTOENCODER:.0%} of the prior's lowest distance; claims of a question that is not stay undecided."
)
Range = tuple[float, float, float]  # value, low, high


def family(row: Row) -> str:
    """What a row is called in tables: its method, and of fine-tunes also their kind."""
    kind, title = row.point.model.kind if row.point.model else "", METHODS[row.point.method].title
    return FINE_TUNE_TITLES.get(kind, "") + title + ", shipped model" * (kind == "shipped")


def families_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by family, in the order of METHODS."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: list(METHODS).index(row.point.method)):
        found.setdefault(family(row), []).append(row)
    return found


class Front(NamedTuple):
    """A family's lowest distances at LEVELS with their intervals, or the ratios of two families' ones (no hypervolume);
    infinite where no point has so many right, NaN where neither of two families has one."""

    name: str
    points: int
    at: list[Range]
    volume: Range | None = None

    def cell(self, index: int) -> str:
        value, low, high = self.at[index]
        ratio = self.volume is None
        if math.isnan(value):
            return "neither"
        if math.isinf(value) or (ratio and value == 0):
            return "" if not ratio else "no rival" if value == 0 else "not reached"
        form = ".2f" if ratio else ".0f" if value >= 100 else ".1f"
        return f"{value:{form}} ({low:{form}} to {'none' if math.isinf(high) else f'{high:{form}}'})"


def fronts_of(rows: Sequence[Row], ceiling: float) -> Iterator[Front]:
    """What every family of a question reaches at fixed shares, and ours over the fine-tunes and the prior there.

    rows: of models of training seed 0.
    """
    trained = [row for row in rows if row.point.model and row.point.model.kind != "shipped"]
    ours, theirs = (
        {name: own for name, methods in sets.items() if (own := [row for row in some if row.point.method in methods])}
        for some, sets in (
            (trained, {"multi-guidance": PAPER, "all of ours": BEYOND}),
            (rows, {"all fine-tunes": FINE_TUNES, "prior": ("prior",)}),
        )
    )
    for name, own in {**ours, **theirs, **families_of(rows)}.items():
        points = points_of(own)
        at = [_ranged(lowest(*points, level)) for level in LEVELS]
        yield Front(name, len(own), at, _ranged(hypervolume(*points, ceiling)))
    for other, rivals in theirs.items():
        for name, own in ours.items():
            yield Front(f"{name} / {other}", len(own) + len(rivals), [_ratio(own, rivals, level) for level in LEVELS])


def _ratio(own: Sequence[Row], rivals: Sequence[Row], level: float) -> Range:
    """The ratio of two families' lowest distances at a share; NaN where neither has a point."""
    if all(math.isinf(float(lowest(*points_of(rows), level)[0])) for rows in (own, rivals)):
        return math.nan, math.nan, math.nan
    return _ranged(ratio_of_lowest(*points_of(own), *points_of(rivals), level))


def _ranged(values: Tensor) -> Range:
    """(value, low, high) of a number with its replicates [1 + R], the value first."""
    return (float(values[0]), *interval(values[1:]))


def report(plan: Plan, rows: Sequence[Row], floors: Floors) -> Report:
    """The description of the page."""
    more = ["## Validity", "", *_validity_table(floors, rows), ABOUT_FLOORS, "", *_seeds(rows)]
    lines = list(_floor_lines(plan.sampling, floors, rows))
    for name, question in QUESTIONS.items():
        own = [row for row in rows if row.point.seed == 0 and row.point.question == name]
        if own:
            fronts = list(fronts_of(own, floors[name]["ceiling"]))
            lines += [_front_line(plan.sampling, question, front) for front in fronts]
            more += _section(question, own, fronts, str(validity(name, floors, rows)))
    drawn = (
        f"{plan.sampling.steps} steps of dpmpp_2m, networks in {plan.sampling.precision}, sampling seed "
        f"{plan.sampling.seed}, the same noise and prompts for every method"
    )
    return Report("The claims of in-domain guidance, measured", ("domain", "methods"), drawn, more, lines, ABOUT_MODELS)


def _floor_lines(sampling: Sampling, floors: Floors, rows: Sequence[Row]) -> Iterator[str]:
    for question, values in floors.items():
        valid = validity(question, floors, rows)
        for name, value in values.items():
            yield json_line("idg", f"{question}/{name}", value, "frechet", sampling)
        for name, value, target, better in (
            ("ceiling_over_floor", valid.ceiling, LEAST_CEILING, "higher"),
            ("autoencoder_over_prior", valid.autoencoder, MOST_AUTOENCODER, "lower"),
        ):
            more = {"target": target, "better": better, "valid": valid.holds}
            yield json_line("idg", f"{question}/valid/{name}", value, "ratio", sampling, **more)


def _front_line(sampling: Sampling, question: Question, front: Front) -> str:
    """A line's value is the hypervolume; of ratios there is none."""
    value, *ends = front.volume or (None,)
    at = {f"{level:g}": list(numbers) for level, numbers in zip(LEVELS, front.at)}
    more = {"interval": ends or None, "points": front.points, "over": question.share, "at": at}
    name = f"{question.name}/nearest/{front.name}"
    return json_line("idg", name, value, "share", sampling, better="higher", **more)


def _validity_table(floors: Floors, rows: Sequence[Row]) -> list[str]:
    valid = {question: validity(question, floors, rows) for question in floors}
    columns: list[Column] = [
        ("question", lambda question: QUESTIONS[question].title),
        ("floor (training handwriting)", lambda question: f"{floors[question]['floor_uncorrected']:.2f}"),
        ("autoencoder floor", lambda question: f"{floors[question]['autoencoder_floor_uncorrected']:.2f}"),
        ("ceiling (held-out fonts)", lambda question: f"{floors[question]['ceiling']:.0f}"),
        ("ceiling / floor", lambda question: f"{valid[question].ceiling:.0f}"),
        ("autoencoder floor / prior", lambda question: f"{valid[question].autoencoder:.2%}"),
        ("valid", lambda question: "yes" if valid[question].holds else "no"),
    ]
    return table(columns, floors)


def _seeds(rows: Sequence[Row]) -> list[str]:
    """Points whose model was trained from several seeds."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.point.with_seed(0)), []).append(row)
    several = [group for group in groups.values() if len(group) > 1]
    columns: list[Column] = [
        ("point", lambda group: str(group[0].point.with_seed(0))),
        ("seeds", lambda group: str(len(group))),
    ]
    columns += [number("distance", ".1f"), number("digit", ".1%"), number("both colours", ".1%")]
    about = "Mean (lowest to highest) over models trained from different seeds."
    return ["## Training seeds", "", about, "", *table(columns, several)] if several else []


def _section(question: Question, rows: Sequence[Row], fronts: Sequence[Front], valid: str) -> list[str]:
    """What a question's families reach at fixed shares, and the points that are on their family's front."""
    share, volume = question.share.replace("_", " "), "{:.2f} ({:.2f} to {:.2f})"
    heads: list[Column] = [(f"{share} at least", lambda front: front.name), ("points", lambda front: str(front.points))]
    heads += [(f"{level:.0%}", lambda front, index=index: front.cell(index)) for index, level in enumerate(LEVELS)]
    heads.append(("hypervolume", lambda front: volume.format(*front.volume) if front.volume else ""))
    columns: list[Column] = [
        ("method", lambda group: family(group[0])),
        ("model", lambda group: str(group[0].point.model or "")),
        ("settings", lambda group: group[0].point.words),
        number("distance (95 %)", ".1f", "distance"),
        number("KID", ".3g", "kernel"),
        number("digit", ".1%"),
        number("digit, second judge", ".1%", "digit_second_judge"),
        number("both colours", ".1%"),
        number("judged handwritten", ".1%", "in_domain"),
        number("diversity", ".2f"),
        number("samples / step", ".2f", "samples_per_step"),
    ]
    best = []
    for own in families_of(rows).values():
        on_front = is_on_front([(row.numbers["distance"], row.numbers[question.share]) for row in own])
        best += sorted((row for row, on in zip(own, on_front) if on), key=lambda row: row.numbers["distance"])
    about = (
        f"Points on the front of their own family (distance against {share}), nearest first. Distances here: {valid}."
    )
    title = f"## {capitalized(question.title)}"
    return [title, "", ABOUT_FRONTS, "", *table(heads, fronts), about, "", *table(columns, [[row] for row in best])]
