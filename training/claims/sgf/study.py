"""StyleGAN-Fusion's claims as a study: its plan, its points and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...mini_world.assets import generators_dir, load_classifier, load_generator, load_mini_world
from ..idg.models import Models
from ..keeping import Row
from .points import Bench
from .report import row_line, verdict_line, write_report
from .runs import Runs
from .sweep import PLANS, Plan
from .verdicts import all_verdicts

GENERATOR = "mini-handwriting"


class SgfStudy:
    """`claims.command_line.Study` of arXiv 2212.04473. Its fine-tuned critic is one of `claims idg`'s models."""

    def __init__(self, plan: Plan, work: Path) -> None:
        world, source = load_mini_world(), load_generator(GENERATOR)
        work = work / plan.name if plan.name == "tiny" else work
        self.plan, self.points, self.folder = plan, plan.points, work / "sgf"
        models = Models(work / "models", world, plan.images, plan.batch)
        path = generators_dir() / f"{GENERATOR}.safetensors"
        runs = Runs(self.folder / "generators", source, path, models, plan.fine_tune, plan.stops)
        self.bench = Bench(
            self.folder / "points",
            runs,
            world,
            source,
            load_classifier(),
            plan.sampling,
            load_classifier(held_out=True),
        )
        self.find, self.measure, self.line = self.bench.find, self.bench.measure, row_line

    def conclude(self, rows: Sequence[Row]) -> tuple[list[str], Callable[[Path], list[Path]]]:
        verdicts = all_verdicts(rows, self.plan)
        said = [verdict_line(verdict, self.plan) for verdict in verdicts]
        return said, lambda folder: write_report(folder, self.plan, rows, verdicts, self.bench.shown)


def open_study(size: str, work: Path, samples: int | None) -> SgfStudy:
    """size: "full", "quick" or "tiny"; samples: a point, None for the plan's own number."""
    plan = PLANS[size]()
    if samples:
        plan = replace(plan, sampling=replace(plan.sampling, samples=samples))
    return SgfStudy(plan, work)
