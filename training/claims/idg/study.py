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
from ..deciding import Claim
from ..keeping import Row, kept_numbers, key_of
from ..report import Report
from ..statistics import Measured
from ..study import Plan, Study
from .claims import Floors, claims
from .confirming import confirming
from .methods import guidance
from .models import Models
from .questions import QUESTIONS, examine, floors
from .report import report
from .sweep import PLANS, Point


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
        study = cls(PLANS["full" if size == "confirm" else size].with_samples(samples), work)
        return cls(confirming(study.plan, study.gather(measuring=False)), work) if size == "confirm" else study

    def training(self, point: Point) -> dict[str, Any]:
        return self.models.facts(point.model) if point.model else {}

    def examine(self, point: Point) -> tuple[dict[str, Measured], dict[str, float]]:
        question, sampling = QUESTIONS[point.question], self.plan.sampling
        if question.name not in self._targets:
            self._targets[question.name] = judge(self.judges[0], question.answers(sampling))[0]
        models = {"prior": cast(self.world.prior, sampling.precision)}
        if point.model:
            models["trained"] = cast(self.models.denoiser(point.model), sampling.precision)
        prompts = question.prompts(sampling.samples, sampling.seed)
        pictures, cost = sample_prompts(
            self.world,
            lambda uncond, cond: guidance(point.method, point.values, models, {"uncond": uncond, "cond": cond}),
            prompts,
            steps=sampling.steps,
            seed=sampling.seed,
            batch=125,  # larger ones are slower on a processor; decides rounding alone
        )
        measured, numbers = examine(self.judges, self._targets[question.name], pictures, prompts, sampling)
        return measured, {**numbers, "samples_per_step": cost}

    def floors(self, rows: Sequence[Row]) -> Floors:
        """`questions.floors` of every question that rows are about, kept beside them."""
        sampling, found = self.plan.sampling, {}
        for name in dict.fromkeys(row.point.question for row in rows):
            facts = {"question": name, "seed": sampling.seed, "targets": sampling.targets, "world": self.world_hash}
            path, parts = self.points_folder / f"floors-{key_of(facts)}.json", (self.judges[0], self.world.autoencoder)
            found[name] = kept_numbers(path, lambda: floors(QUESTIONS[name], *parts, sampling))  # noqa: B023
        return found

    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        return claims(self.floors(rows), rows)

    def report(self, rows: Sequence[Row]) -> Report:
        return report(self.plan, rows, self.floors(rows))


def cast(denoiser: Denoiser, precision: str) -> Denoiser:
    """The same denoiser with a network in "fp32" or "bf16"."""
    if precision == "fp32":
        return denoiser
    unet = copy.deepcopy(denoiser.unet).to(torch.bfloat16)
    return Denoiser(unet, denoiser.schedule, denoiser.prediction_type, denoiser.quantize)
