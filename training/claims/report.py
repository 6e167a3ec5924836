"""A study's report: JSON lines, plots and a page in Markdown, from a description of its tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...guidance.files.atomic import replacing, write_text
from .deciding import Verdict
from .keeping import Row, rounded

if TYPE_CHECKING:
    from .study import Plan, Sampling, Study

Column = tuple[str, Callable[[Any], str]]  # of a table: its head, and a row's cell


@dataclass(frozen=True)
class Report:
    """What a paper's page shows. about: heads of the cells that a claim is about. drawn: how points are drawn. more:
    lines of Markdown after the verdicts. lines: JSON lines beside those of rows and verdicts. before: what is said
    before the verdicts."""

    title: str
    about: tuple[str, ...]
    drawn: str
    pictures: Sequence[Picture] = ()
    more: Sequence[str] = ()
    lines: Sequence[str] = ()
    before: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture of the page in the file `name`, with the words that stand for it; None: nothing to draw yet."""

    name: str
    words: str
    image: Image.Image | None = field(repr=False)

    @property
    def markdown(self) -> list[str]:
        return [] if self.image is None else [f"![{self.words}]({self.name})", ""]


def table(columns: Sequence[Column], items: Iterable[Any]) -> list[str]:
    """A table in Markdown, a line for each item, and an empty line."""
    heads = [head for head, _ in columns]
    lines = [[cell(item) for _, cell in columns] for item in items]
    parts = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(cells)} |" for cells in lines)]
    return [*parts, ""]


def number(head: str, form: str, name: str = "", plain: bool = False) -> Column:
    """A column of a number of rows that differ in their training seed: the mean, with the lowest and highest of
    several rows or the interval of one; `plain`: the mean alone. Empty where a row has no such number."""
    name = name or head.replace(" ", "_")

    def cell(rows: list[Row]) -> str:
        values = [row.numbers[name] for row in rows if name in row.numbers]
        if not values:
            return ""
        ends = (min(values), max(values)) if len(values) > 1 else rows[0].intervals.get(name)
        span = f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends and not plain else ""
        return f"{fmean(values):{form}}{span}"

    return head, cell


def json_line(
    paper: str,
    name: str,
    value: float | None,
    unit: str,
    sampling: Sampling,
    target: float | None = None,
    better: str = "lower",
    **more: Any,
) -> str:
    """One result as a JSON line in the benchmarks' format; a number that is not finite becomes null."""
    record = {"name": f"claims/{paper}/{name}", "value": value, "unit": unit, "target": target, "better": better}
    record |= {"samples": sampling.samples, "seed": sampling.seed, **more}
    return json.dumps(_finite(rounded(record)), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict_line(paper: str, verdict: Verdict, sampling: Sampling) -> str:
    """A verdict as a JSON line."""
    claim = verdict.claim
    more = {"interval": [verdict.low, verdict.high], "statement": claim.statement, "outcome": verdict.outcome}
    more |= {"details": verdict.details, "measured": verdict.measured, "planned": verdict.planned}
    more |= {"words": verdict.words, "about": list(claim.about)}
    name = f"claim/{claim.name}"
    return json_line(paper, name, verdict.value, claim.unit, sampling, claim.target, claim.better, **more)


def print_lines(lines: Iterable[str]) -> None:
    """Results go to standard output, a line each."""
    for line in lines:
        print(line, flush=True)


def write_report(folder: Path, study: Study, rows: Sequence[Row]) -> tuple[list[str], list[Path]]:
    """Decide the claims and write PAPER.jsonl, the pictures and PAPER.md into a folder.

    Returns the lines beside the rows', verdicts first, and the files' paths.
    """
    verdicts = study.verdicts(rows)
    report = study.report(rows, verdicts)
    lines = [verdict_line(study.paper, verdict, study.plan.sampling) for verdict in verdicts]
    lines += report.lines
    paths = [folder / f"{study.paper}.jsonl"]
    write_text(paths[0], "\n".join([*lines, *map(study.line, rows)]) + "\n")
    for picture in report.pictures:
        if picture.image is not None:
            paths.append(folder / picture.name)
            with replacing(paths[-1]) as file:
                # A palette takes a third of the bytes.
                picture.image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    paths.append(folder / f"{study.paper}.md")
    write_text(paths[-1], "\n".join(page(study.paper, study.plan, rows, verdicts, report)))
    return lines, paths


def page(paper: str, plan: Plan, rows: Sequence[Row], verdicts: Sequence[Verdict], report: Report) -> list[str]:
    """The whole result as lines of Markdown."""
    coarse = ", or, as in all of this coarse sweep, that few settings are asked" if plan.coarse else ""
    parts = [
        f"# {report.title}",
        "",
        f"Made by `python run.py claims {paper}{plan.options}`; do not edit. {len(rows)} of {len(plan.points)} points "
        f"of the sweep are measured, {plan.sampling.samples:,} samples each, {report.drawn}. {_hours(rows, plan)}"
        f"Settings and every number: {paper}.jsonl.",
        "",
        *([plan.note, ""] if plan.note else []),
        *(line for picture in report.pictures for line in picture.markdown),
        "## Verdicts",
        "",
        f'{report.before}"So far" means that points are missing that could still turn the outcome{coarse}.',
        "",
    ]
    columns: list[Column] = [("claim", lambda verdict: f"({verdict.claim.letter})")]
    columns += [
        (head, lambda verdict, index=index: verdict.claim.about[index]) for index, head in enumerate(report.about)
    ]
    columns += [
        ("number", lambda verdict: verdict.claim.statement),
        ("value (95 % interval)", lambda verdict: verdict.shown),
        ("target", lambda verdict: verdict.shown_target),
        ("points", lambda verdict: f"{verdict.measured} of {verdict.planned}" if verdict.planned else "-"),
        ("verdict", lambda verdict: f"**{verdict.outcome}**"),
    ]
    parts += [*table(columns, verdicts), "What stands behind them:", ""]
    parts += [f"* {verdict.claim.name}: {verdict.shown_details}." for verdict in verdicts]
    return [*parts, "", *report.more, f"How it is measured: docs/claims/{paper}/README.md.", ""]


def _hours(rows: Sequence[Row], plan: Plan) -> str:
    """What measuring took, and what the rest would take at that rate."""
    seconds = [row.numbers["seconds"] for row in rows if "seconds" in row.numbers]
    if not seconds:
        return ""
    left = (len(plan.points) - len(rows)) * sum(seconds) / len(seconds)
    rest = f"; the rest would take {left / 3600:.1f} hours at that rate" if left else ""
    return f"Measuring them took {sum(seconds) / 3600:.1f} hours{rest}. "
