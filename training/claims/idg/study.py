"""In-domain guidance as a study: how its points are drawn, its claims and its report."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....guidance.diffusion import Denoiser
from ...mini_world.classifier import judge
from ...mini_world.prompts import sample_prompts
from ...mini_world.recipe.status_line import StatusLine
from ..deciding import Claim, Verdict
from ..keeping import Row
from ..report import Report
from ..statistics import Measured
from ..study import Plan, Study
from .claims import Floors, claims
from .confirming import confirming
from .methods import METHODS, Given
from .models import Models
from .points import Point
from .questions import QUESTIONS, examine, floors
from .report import report
from .sweep import PLANS


class IdgStudy(Study):
    """`study.Study` of arXiv 2312.08195."""

    paper, title = "idg", "in-domain guidance (arXiv 2312.08195)"

    def __init__(self, plan: Plan, work: Path) -> None:
        super().__init__(plan, work)
        wanted = [point.model for point in plan.points if point.model]
        self.models = Models(work / "models", self.world, plan.images, plan.batch, wanted)
        self._targets: dict[str, Tensor] = {}

    @classmethod
    def open(cls, size: str, work: Path, samples: int | None) -> IdgStudy:
        """size: a plan's name, or "confirm" for the best of the full one, measured so far, drawn anew; samples: a
        point, None for the plan's own number (with "confirm": of the full sweep)."""
        plan = PLANS["full" if size == "confirm" else size].with_samples(samples)
        study = cls(plan, work / size if size == "tiny" else work)
        if size != "confirm":
            return study
        return cls(confirming(plan, [row for row in map(study.find, plan.points) if row is not None]), work)

    def training(self, point: Point) -> dict[str, Any]:
        return self.models.facts(point.model) if point.model else {}

    def examine(self, point: Point) -> tuple[dict[str, Measured], dict[str, float]]:
        question, sampling = QUESTIONS[point.question], self.plan.sampling
        if question.name not in self._targets:
            self._targets[question.name] = judge(self.judge, question.answers(sampling))[0]
        dtype = torch.bfloat16 if sampling.precision == "bf16" else torch.float32
        prior = cast(self.world.prior, dtype)
        model = cast(self.models.denoiser(point.model), dtype) if point.model else None
        prompts = question.prompts(sampling.samples, sampling.seed)
        pictures, cost = sample_prompts(
            self.world,
            lambda uncond, cond: METHODS[point.method].guidance(Given(prior, model, point.values, uncond, cond)),
            prompts,
            steps=sampling.steps,
            seed=sampling.seed,
            batch=125,  # larger ones are slower on a processor; decides rounding alone
            progress=StatusLine(str(point)).update,
        )
        judges = self.judge, self.second_judge
        measured, numbers = examine(judges, self._targets[question.name], pictures, prompts, sampling)
        return measured, {**numbers, "samples_per_step": cost}

    def floors(self, rows: Sequence[Row]) -> Floors:
        """`questions.floors` of every question that rows are about, kept like rows."""
        sampling, found = self.plan.sampling, {}
        for name in dict.fromkeys(row.point.question for row in rows):
            facts = {"question": name, "seed": sampling.seed, "targets": sampling.targets, "world": self.world_hash}
            question, parts = QUESTIONS[name], (self.judge, self.world.autoencoder, sampling)
            found[name] = self.shelf.numbers("floors", facts, lambda: floors(question, *parts))  # noqa: B023
        return found

    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        return claims(self.floors(rows), rows)

    def report(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Report:
        return report(self.plan, rows, self.floors(rows))


def cast(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The same denoiser with a network of another dtype; itself where it has that one."""
    if next(denoiser.unet.parameters()).dtype == dtype:
        return denoiser
    unet = copy.deepcopy(denoiser.unet).to(dtype)
    return Denoiser(unet, denoiser.schedule, denoiser.prediction_type, denoiser.quantize)
