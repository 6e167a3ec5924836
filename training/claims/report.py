"""A study's report: JSON lines and a page in Markdown, from a description of its tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...guidance.files.atomic import write_text
from .deciding import Verdict, shown
from .keeping import Row, rounded

if TYPE_CHECKING:
    from .study import Sampling, Study

Column = tuple[str, Callable[[Any], str]]  # of a table: its head, and a row's cell


@dataclass(frozen=True)
class Report:
    """What a paper's page shows. about: heads of the cells that a claim is about. drawn: how points are drawn. more:
    lines of Markdown after the verdicts. lines: JSON lines beside those of rows and verdicts. before: what is said
    before the verdicts."""

    title: str
    about: tuple[str, ...]
    drawn: str
    more: Sequence[str]
    lines: Sequence[str] = ()
    before: str = ""


def table(columns: Sequence[Column], items: Iterable[Any]) -> list[str]:
    """A table in Markdown, a line for each item, and an empty line."""
    lines = [[head for head, _ in columns], *([cell(item) for _, cell in columns] for item in items)]
    head, *rest = [f"| {' | '.join(cells)} |" for cells in lines]
    return [head, "|" + "---|" * len(columns), *rest, ""]


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


def capitalized(title: str) -> str:
    return title[0].upper() + title[1:]


def json_line(paper: str, name: str, value: float | None, unit: str, sampling: Sampling, **more: Any) -> str:
    """One result as a JSON line in the benchmarks' format; a number that is not finite becomes null."""
    record = {"name": f"claims/{paper}/{name}", "value": value, "unit": unit, "target": None, "better": "lower"}
    record |= {"samples": sampling.samples, "seed": sampling.seed, **more}
    return json.dumps(rounded(record), allow_nan=False)


def row_line(paper: str, row: Row, sampling: Sampling) -> str:
    """A measured row as a JSON line; its value is null where a point has no distance."""
    numbers = {key: value for key, value in row.numbers.items() if key != "distance"}
    more = {**row.point.facts, **numbers, "intervals": row.intervals}
    return json_line(paper, row.point.name, row.numbers.get("distance"), "frechet", sampling, **more)


def verdict_line(paper: str, verdict: Verdict, sampling: Sampling) -> str:
    """A verdict as a JSON line."""
    claim = verdict.claim
    more = {"target": claim.target, "better": claim.better, "interval": [verdict.low, verdict.high]}
    more |= {"statement": claim.statement, "outcome": verdict.outcome, "details": verdict.details}
    more |= {"measured": verdict.measured, "planned": verdict.planned, "words": verdict.words}
    return json_line(paper, f"claim/{claim.name}", verdict.value, claim.unit, sampling, **more, about=list(claim.about))


def write_report(folder: Path, study: Study, rows: Sequence[Row]) -> list[Path]:
    """Decide the claims and write PAPER.jsonl and PAPER.md into a folder. Returns the files' paths."""
    paper, sampling, verdicts, report = study.paper, study.plan.sampling, study.verdicts(rows), study.report(rows)
    lines = [verdict_line(paper, verdict, sampling) for verdict in verdicts]
    lines += [*report.lines, *(row_line(paper, row, sampling) for row in rows)]
    texts = {"jsonl": lines, "md": page(study, rows, verdicts, report)}
    for ending, text in texts.items():
        write_text(folder / f"{paper}.{ending}", "\n".join(text) + "\n")
    return [folder / f"{paper}.{ending}" for ending in texts]


def page(study: Study, rows: Sequence[Row], verdicts: Sequence[Verdict], report: Report) -> list[str]:
    """The whole result as lines of Markdown."""
    plan, paper = study.plan, study.paper
    coarse = ", or, as in all of this coarse sweep, that few settings are asked" if plan.coarse else ""
    columns: list[Column] = [("claim", lambda verdict: f"({verdict.claim.letter})")]
    columns += [
        (head, lambda verdict, index=index: verdict.claim.about[index]) for index, head in enumerate(report.about)
    ]
    side = {"lower": "at most", "higher": "at least"}
    columns += [
        ("number", lambda verdict: verdict.claim.statement),
        ("value (95 % interval)", lambda verdict: verdict.shown),
        ("target", lambda verdict: f"{side[verdict.claim.better]} {verdict.claim.target:g}"),
        ("points", lambda verdict: f"{verdict.measured} of {verdict.planned}" if verdict.planned else "-"),
        ("verdict", lambda verdict: f"**{verdict.outcome}**"),
    ]
    behind = []
    for verdict in verdicts:
        details = "; ".join(f"{name} {shown(value)}" for name, value in verdict.details.items())
        behind.append(f"* {verdict.claim.name}: {details}.")
    return [
        f"# {report.title}",
        "",
        f"Made by `python run.py claims {paper}{plan.options}`; do not edit. {len(rows)} of {len(plan.points)} points "
        f"of the sweep are measured, {plan.sampling.samples:,} samples each, {report.drawn}. "
        f"Settings and every number: {paper}.jsonl.",
        "",
        *([plan.note, ""] if plan.note else []),
        "## Verdicts",
        "",
        f'{report.before}"So far" means that points are missing that could still turn the outcome{coarse}.',
        "",
        *table(columns, verdicts),
        "What stands behind them:",
        "",
        *behind,
        "",
        *report.more,
        f"How it is measured: docs/claims/{paper}/README.md.",
    ]
