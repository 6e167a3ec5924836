"""What pages show of the mini world's questions: floors, training seeds, and of each question the fronts and points of
the families of methods that answered it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .comparing import LEAST_CEILING, MOST_AUTOENCODER, Floors, points_of, validity
from .keeping import Row
from .questions import QUESTIONS, Question
from .report import Column, capitalized, json_line, number, table
from .statistics import hypervolume, interval, is_on_front, lowest, ratio_of_lowest
from .study import Sampling

# Shares of right digits (own colours) or of both colours right (foreign ones).
LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
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
Families = Mapping[str, Sequence[Row]]  # rows by what tables call them


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


def families_of(rows: Sequence[Row], methods: Mapping[str, Any], family: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by what `family` calls them, in the order of the methods."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: list(methods).index(row.point.method)):
        found.setdefault(family(row), []).append(row)
    return found


def drawn(sampling: Sampling) -> str:
    """How points are drawn, for the page's head."""
    return (
        f"{sampling.steps} steps of dpmpp_2m, networks in {sampling.precision}, sampling seed {sampling.seed}, the "
        "same noise and prompts for every method"
    )


def fronts_of(families: Families, ours: Families, theirs: Families, ceiling: float) -> Iterator[Front]:
    """What groups and families of a question's rows reach at fixed shares, and there each group of ours over each of
    theirs. Groups without rows are left out."""
    ours, theirs = ({name: own for name, own in group.items() if own} for group in (ours, theirs))
    for name, own in {**ours, **theirs, **families}.items():
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


def floor_lines(paper: str, sampling: Sampling, floors: Floors, rows: Sequence[Row]) -> Iterator[str]:
    for question, values in floors.items():
        valid = validity(question, floors, rows)
        for name, value in values.items():
            yield json_line(paper, f"{question}/{name}", value, "frechet", sampling)
        for name, value, target, better in (
            ("ceiling_over_floor", valid.ceiling, LEAST_CEILING, "higher"),
            ("autoencoder_over_prior", valid.autoencoder, MOST_AUTOENCODER, "lower"),
        ):
            more = {"target": target, "better": better, "valid": valid.holds}
            yield json_line(paper, f"{question}/valid/{name}", value, "ratio", sampling, **more)


def front_line(paper: str, sampling: Sampling, question: Question, front: Front) -> str:
    """A line's value is the hypervolume; of ratios there is none."""
    value, *ends = front.volume or (None,)
    at = {f"{level:g}": list(numbers) for level, numbers in zip(LEVELS, front.at)}
    more = {"interval": ends or None, "points": front.points, "over": question.share, "at": at}
    name = f"{question.name}/nearest/{front.name}"
    return json_line(paper, name, value, "share", sampling, better="higher", **more)


def validity_lines(floors: Floors, rows: Sequence[Row]) -> list[str]:
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


def seed_lines(rows: Sequence[Row]) -> list[str]:
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


def question_lines(question: Question, families: Families, fronts: Sequence[Front], valid: str) -> list[str]:
    """What a question's families reach at fixed shares, and the points that are on their family's front."""
    names = {id(row): name for name, own in families.items() for row in own}
    share, volume = question.share.replace("_", " "), "{:.2f} ({:.2f} to {:.2f})"
    heads: list[Column] = [(f"{share} at least", lambda front: front.name), ("points", lambda front: str(front.points))]
    heads += [(f"{level:.0%}", lambda front, index=index: front.cell(index)) for index, level in enumerate(LEVELS)]
    heads.append(("hypervolume", lambda front: volume.format(*front.volume) if front.volume else ""))
    columns: list[Column] = [
        ("method", lambda group: names[id(group[0])]),
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
    for own in families.values():
        on_front = is_on_front([(row.numbers["distance"], row.numbers[question.share]) for row in own])
        best += sorted((row for row, on in zip(own, on_front) if on), key=lambda row: row.numbers["distance"])
    about = (
        f"Points on the front of their own family (distance against {share}), nearest first. Distances here: {valid}."
    )
    title = f"## {capitalized(question.title)}"
    return [title, "", ABOUT_FRONTS, "", *table(heads, fronts), about, "", *table(columns, [[row] for row in best])]
