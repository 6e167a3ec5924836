"""Points and verdicts as JSON lines, as Markdown with tables, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ....guidance.files.atomic import replacing, write_text
from .. import lines
from ..deciding import shown_details, shown_interval, shown_target
from ..keeping import Row
from ..plot import Panel, Series, draw_panels
from ..statistics import is_on_front
from . import fronts
from .questions import QUESTIONS
from .sweep import PLANS, Plan
from .verdicts import BEYOND, FINE_TUNES, LEAST_CEILING, MOST_AUTOENCODER, SHIPPED, Validity, Verdict, validities

TITLES = {
    "prior": "prior",
    "domain": "domain model alone",
    "multi_guidance": "multi-guidance",
    "scheduled": "scheduled terms",
    "orthogonal": "orthogonal domain term",
    "bands": "domain term by frequency",
}
FINE_TUNE_TITLES = {"full": "full fine-tune", "low_rank": "LoRA fine-tune"}
Floors = dict[str, dict[str, float]]
HOW_IT_IS_MEASURED = """\
Distances are Frechet distances on the judge's 64 features to the whole of held-out handwriting, recoloured to the
prompts' colours and with the prompts' mix of digits; the target set is fixed. Intervals are 95 % bootstrap intervals
over samples ({replicates} replicates, resampled within digits, the same draws for every method, so that ratios and
fronts are compared pair by pair). A Frechet distance of N samples is too large by about C / N, and resampling repeats
that error: replicates exceed the estimate by about as much as the estimate exceeds the truth. Reported is the
estimate less that excess, and replicates are moved down by twice of it (statistics.py; its tests show the coverage on
Gaussians of known distance). The second judge was trained on the held-out fonts and rows alone, so its opinion cannot
come from shapes that it and the generative models have both learned by heart. A claim is confirmed when its whole
interval reaches the target, refuted when none of it does. The digit accuracy of (b) is held against the prior's most
accurate scale. Fine-tunes stop at several lengths of one run with a constant learning rate.

Every number that is a method's best is chosen from all of its settings on the samples it is reported on, which flatters
whoever has more of them: the tables name how many. In (a) these are the fine-tunes; in (b) and (d) they are ours, held
against the few scales of the prior. The ratio of (a) is a maximum over accuracies, which noise can only raise and which
jumps where two points swap places: an undecided (a) may well be a lead nearly everywhere, and the ratios at fixed
accuracies in the tables say where. Training seeds are not in the intervals."""


def family(row: Row) -> str:
    """What a row is called in legends and tables: its method, and of fine-tunes also their kind."""
    point = row.point
    if point.method in TITLES:
        return TITLES[point.method] + (", shipped model" if point.model and point.model.kind == SHIPPED else "")
    return FINE_TUNE_TITLES[point.model.kind] + (", prior's u" if point.method == "fine_tune_prior_u" else "")


json_line = partial(lines.json_line, "idg")


def row_line(row: Row) -> str:
    numbers = {key: value for key, value in row.numbers.items() if key != "distance"}
    return json_line(
        f"{row.point.question}/{row.point.method}",
        row.numbers["distance"],
        "frechet",
        row.sampling.samples,
        row.sampling.seed,
        steps=row.sampling.steps,
        model=str(row.point.model) if row.point.model else None,
        training_seed=row.point.model.seed if row.point.model else None,
        settings=row.point.values,
        **numbers,
        intervals=row.intervals,
    )


def floor_lines(rows: Sequence[Row], floors: Floors, plan: Plan) -> list[str]:
    """The floors of every question, and whether it is valid."""
    drawn = plan.sampling.targets, plan.sampling.seed
    found = [
        json_line(f"{question}/{name}", value, "frechet", *drawn)
        for question, values in floors.items()
        for name, value in values.items()
    ]
    for question, one in validities(rows, floors).items():
        for name, value, target, better in (
            ("ceiling_over_floor", one.ceiling, LEAST_CEILING, "higher"),
            ("autoencoder_over_prior", one.autoencoder, MOST_AUTOENCODER, "lower"),
        ):
            name = f"{question}/valid/{name}"
            found.append(json_line(name, value, "ratio", *drawn, target, better, valid=one.holds))
    return found


def verdict_line(verdict: Verdict, plan: Plan) -> str:
    return lines.decision_line("idg", verdict.name, verdict, plan.sampling.samples, plan.sampling.seed)


def write_report(
    folder: Path, plan: Plan, rows: Sequence[Row], floors: Floors, verdicts: Sequence[Verdict]
) -> list[Path]:
    """Write idg.jsonl, idg.png and idg.md into a folder; returns their paths."""
    said = [verdict_line(verdict, plan) for verdict in verdicts]
    said += [*floor_lines(rows, floors, plan), *front_lines(rows, floors, plan), *map(row_line, rows)]
    paths = [folder / f"idg.{ending}" for ending in ("jsonl", "png", "md")]
    write_text(paths[0], "\n".join(said) + "\n")
    with replacing(paths[1]) as file:
        draw_panels(panels(rows)).save(file, "PNG", optimize=True)
    write_text(paths[2], markdown(plan, rows, floors, verdicts))
    return paths


def panels(rows: Sequence[Row]) -> list[Panel]:
    """One panel a question: distance against what obeying means there; models of training seed 0."""
    found = []
    for question in QUESTIONS.values():
        share = share_of(question.name)
        label = "digits right" if question.own_colours else "both colours right"
        mine = _of(question.name, rows)
        names = dict.fromkeys(family(row) for row in rows if _first_seed(row))
        series = []
        for name in names:
            own = [row for row in mine if family(row) == name]
            series.append(
                Series(
                    name,
                    [(row.numbers["distance"], row.numbers[share]) for row in own],
                    [(row.intervals["distance"], row.intervals[share]) for row in own],
                )
            )
        found.append(
            Panel(
                question.title[0].upper() + question.title[1:], "Frechet distance to the exact targets", label, series
            )
        )
    return found


def _first_seed(row: Row) -> bool:
    return row.point.model is None or row.point.model.seed == 0


def markdown(plan: Plan, rows: Sequence[Row], floors: Floors, verdicts: Sequence[Verdict]) -> str:
    """The whole result as a page."""
    sampling = plan.sampling
    took = lines.hours(rows, len(plan.points), "Drawing and scoring them, training not counted,")
    parts = [
        "# The claims of in-domain guidance, measured",
        "",
        f"Made by `python run.py claims idg{plan.options}`; do not edit. "
        f"{len(rows)} of {len(plan.points)} points of the sweep are measured, {sampling.samples:,} samples each"
        f"{_fewer(plan)}, "
        f"{sampling.steps} steps of {sampling.sampler}, networks in {sampling.precision}, "
        f"sampling seed {sampling.seed}, "
        "the same noise and prompts for every method. "
        f"{took} Settings and every number: idg.jsonl.",
        "",
        *([plan.note, ""] if plan.note else []),
        "![Distance against obedience](idg.png)",
        "",
        "## Verdicts",
        "",
        "The models are of one trainer and see the same images, except in rows that say `shipped model`: that one was "
        "made by another recipe (another rate, each image in two colourings), which is no fair rival of these "
        'fine-tunes. "So far" means that points are missing that could still turn the outcome'
        + (", or, as in all of this coarse sweep, that few settings are asked." if plan.coarse else "."),
        "",
        "| claim | domain | methods | number | value (95 % interval) | target | points | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        methods = {"paper": "constant weights", "beyond": "all of ours"}[verdict.methods]
        methods = {"c": verdict.claim[3:], "e": "schedules"}.get(verdict.claim[0], methods)
        methods += ", shipped model" if verdict.models == SHIPPED else ""
        counted = f"{verdict.measured} of {verdict.planned}" if verdict.planned else "-"
        parts.append(
            f"| ({verdict.claim[0]}) | {verdict.domain} | {methods} | {verdict.statement} | "
            f"{shown_interval(verdict)} | {shown_target(verdict)} | {counted} | **{verdict.outcome}** |"
        )
    parts += ["", "What stands behind them:", ""]
    for verdict in verdicts:
        parts.append(f"* {verdict.name}: {shown_details(verdict)}.")
    parts += [
        "",
        "## Validity",
        "",
        "| question | floor (training handwriting) | autoencoder floor | ceiling (held-out fonts) | ceiling / floor | "
        "autoencoder floor / prior | valid |",
        "|---|---|---|---|---|---|---|",
    ]
    valid = validities(rows, floors)
    for name, values in floors.items():
        share = "-" if valid[name].autoencoder is None else f"{valid[name].autoencoder:.2%}"
        parts.append(
            f"| {QUESTIONS[name].title} | {values['floor_uncorrected']:.2f} | "
            f"{values['autoencoder_floor_uncorrected']:.2f} | {values['ceiling']:.0f} | "
            f"{valid[name].ceiling:.0f} | {share} | {'yes' if valid[name].holds else 'no'} |"
        )
    parts += [
        "",
        "Floors are given before their bias is removed, since a bootstrap says nothing near 0: they are too high "
        f"if anything. Valid is ceiling / floor of at least {LEAST_CEILING:.0f} and an autoencoder floor of at most "
        f"{MOST_AUTOENCODER:.0%} of the prior's lowest distance; claims of a question that is not stay undecided.",
        "",
    ]
    parts += _seeds(rows)
    for question in QUESTIONS.values():
        mine = _of(question.name, rows)
        parts += _table(question.name, mine, valid.get(question.name), floors)
    parts += ["## How it is measured", "", HOW_IT_IS_MEASURED.format(replicates=sampling.replicates), ""]
    return "\n".join(parts)


def _fewer(plan: Plan) -> str:
    own = PLANS[plan.name]().sampling.samples if plan.name in PLANS else plan.sampling.samples
    return "" if plan.sampling.samples == own else f" (the sweep's own number is {own:,})"


def share_of(question: str) -> str:
    """The measure of obedience in a question."""
    return "digit" if QUESTIONS[question].own_colours else "both_colours"


def fronts_of(question: str, rows: Sequence[Row], ceiling: float) -> list[fronts.Front]:
    """What every family of a question reaches at fixed shares, and ours over the fine-tunes and the prior there.

    rows: of models of training seed 0.
    """
    share, families = share_of(question), {}
    for row in sorted(rows, key=lambda row: [*TITLES, *FINE_TUNES].index(row.point.method)):
        families.setdefault(family(row), []).append(row)
    found = [fronts.front(name, own, share, ceiling) for name, own in families.items()]
    trained = [row for row in rows if row.point.model and row.point.model.kind != SHIPPED]
    ours = {
        "multi-guidance": [row for row in trained if row.point.method == "multi_guidance"],
        "all of ours": [row for row in trained if row.point.method in BEYOND],
    }
    theirs = {
        "all fine-tunes": [row for row in rows if row.point.method in FINE_TUNES],
        "prior": [row for row in rows if row.point.method == "prior"],
    }
    found += [
        fronts.front(name, own, share, ceiling)
        for name, own in (*ours.items(), *theirs.items())
        if own and name not in families
    ]
    return found + [
        fronts.ratios(f"{name} / {other}", own, rivals, share)
        for other, rivals in theirs.items()
        for name, own in ours.items()
        if own and rivals
    ]


def front_lines(rows: Sequence[Row], floors: Floors, plan: Plan) -> list[str]:
    """`fronts_of` every question; a line's value is the hypervolume, of ratios there is none."""
    return [
        json_line(
            f"{question}/nearest/{one.name}",
            one.hypervolume[0] if one.hypervolume else None,
            "share",
            plan.sampling.samples,
            plan.sampling.seed,
            better="higher",
            interval=one.hypervolume[1:] if one.hypervolume else None,
            points=one.points,
            over=share_of(question),
            at=fronts.facts(one),
        )
        for question, values in floors.items()
        for one in fronts_of(question, _of(question, rows), values["ceiling"])
    ]


def _of(question: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.point.question == question and _first_seed(row)]


def _table(question: str, rows: Sequence[Row], validity: Validity | None, floors: Floors) -> list[str]:
    """What a question's families reach at fixed shares, and the points that are on their family's front."""
    if not rows:
        return []
    share = share_of(question)
    parts = [f"## {QUESTIONS[question].title[0].upper()}{QUESTIONS[question].title[1:]}", ""]
    if question in floors:
        parts += [
            "The lowest distance (95 %) among a method's points with at least so many right, and ratios of two "
            "methods' lowest ones; empty where no point has so many. Hypervolume: the share of the rectangle up to the "
            "ceiling's distance and 100 % that the points dominate.",
            "",
            *fronts.table(fronts_of(question, rows, floors[question]["ceiling"]), share.replace("_", " ")),
            "",
        ]
    parts += [
        f"Points on the front of their own family (distance against {share.replace('_', ' ')}), nearest first. "
        f"Distances here: {validity or 'no floors measured'}.",
        "",
        "| method | model | settings | distance (95 %) | KID | digit | digit, second judge | both colours | "
        "judged handwritten | diversity | samples / step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(map(family, rows)):
        own = [row for row in rows if family(row) == name]
        front = is_on_front([row.numbers["distance"] for row in own], [row.numbers[share] for row in own])
        for row in sorted((row for row, on in zip(own, front) if on), key=lambda row: row.numbers["distance"]):
            settings = str(row.point).split("] ")[-1] if row.point.model else str(row.point).split(": prior ")[-1]
            low, high = row.intervals["distance"]
            second = f"{row.numbers['digit_second_judge']:.1%}" if "digit_second_judge" in row.numbers else ""
            parts.append(
                f"| {name} | {row.point.model or ''} | {settings} | {row.numbers['distance']:.1f} ({low:.1f} to "
                f"{high:.1f}) | {row.numbers['kernel']:.3g} | {_share(row, 'digit')} | {second} | "
                f"{_share(row, 'both_colours')} | {_share(row, 'in_domain')} | {row.numbers['diversity']:.2f} | "
                f"{row.numbers['samples_per_step']:.2f} |"
            )
    return [*parts, ""]


def _share(row: Row, name: str) -> str:
    low, high = row.intervals[name]
    return f"{row.numbers[name]:.1%} ({low:.1%} to {high:.1%})"


def _seeds(rows: Sequence[Row]) -> list[str]:
    """Rows whose model was trained from several seeds: the mean and the range over training seeds."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.point.model is not None and row.point.model.kind != "shipped":
            groups.setdefault(row.point.with_seed(0), []).append(row)
    several = {point: group for point, group in groups.items() if len(group) > 1}
    if not several:
        return []
    parts = [
        "## Training seeds",
        "",
        "Mean (lowest to highest) over models trained from different seeds.",
        "",
        "| point | seeds | distance | digit | both colours |",
        "|---|---|---|---|---|",
    ]
    for point, group in several.items():
        cells = []
        for name, form in (("distance", ".1f"), ("digit", ".1%"), ("both_colours", ".1%")):
            values = [row.numbers[name] for row in group]
            cells.append(f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})")
        parts.append(f"| {point} | {len(group)} | {' | '.join(cells)} |")
    return [*parts, ""]
