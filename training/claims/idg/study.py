"""The claims of in-domain guidance as a study: its plan, its points and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...mini_world.assets import load_autoencoder, load_classifier, load_mini_world
from ..keeping import Row
from .confirming import confirming
from .models import Models
from .points import Bench
from .report import floor_lines, row_line, verdict_line, write_report
from .sweep import PLANS, Plan
from .verdicts import all_verdicts

CONFIRM = "confirm"


class IdgStudy:
    """`command_line.Study` of arXiv 2312.08195."""

    def __init__(self, plan: Plan, work: Path) -> None:
        world = load_mini_world()
        self.plan, self.points = plan, plan.points
        self.folder = work / plan.name if plan.name == "tiny" else work
        wanted = [point.model for point in plan.points if point.model]
        models = Models(self.folder / "models", world, plan.images, plan.batch, wanted)
        self.bench = Bench(
            self.folder / "points", models, world, load_classifier(), plan.sampling, load_classifier(held_out=True)
        )
        self.find, self.measure, self.line = self.bench.find, self.bench.measure, row_line

    def conclude(self, rows: Sequence[Row]) -> tuple[list[str], Callable[[Path], list[Path]]]:
        autoencoder, _ = load_autoencoder()
        asked = dict.fromkeys(row.point.question for row in rows)
        floors = {name: self.bench.floors(name, autoencoder) for name in asked}
        verdicts = all_verdicts(rows, floors, self.plan)
        said = [*floor_lines(rows, floors, self.plan), *(verdict_line(verdict, self.plan) for verdict in verdicts)]
        return said, lambda folder: write_report(folder, self.plan, rows, floors, verdicts)


def open_study(size: str, work: Path, samples: int | None) -> IdgStudy:
    """size: "full", "quick", "tiny", or "confirm" for the best of the full one, measured so far, drawn anew; samples: a
    point, None for the plan's own number (with "confirm": of the full sweep)."""
    plan = PLANS["full" if size == CONFIRM else size]()
    if samples and samples != plan.sampling.samples:
        sampling = replace(plan.sampling, samples=samples)
        plan = replace(plan, sampling=sampling, options=f"{plan.options} --samples {samples}")
    study = IdgStudy(plan, work)
    if size != CONFIRM:
        return study
    rows = [row for row in map(study.find, plan.points) if row is not None]
    return IdgStudy(confirming(plan, rows), work)
