"""A study of methods that answer prompts of the mini world: how its points are drawn, judged and framed by floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ..mini_world import render
from ..mini_world.classifier import judge
from ..mini_world.prompts import Prompts, sample_prompts
from .keeping import Row, kept_numbers, key_of
from .methods import Method, guidance
from .models import Models, cast
from .points import ModelSpec, Point
from .questions import QUESTIONS, examine, floors
from .statistics import Measured
from .study import Plan, Sampling, Study


class PromptedStudy(Study):
    """`study.Study` of points (`points.Point`) of the mini world's questions, sampled with the methods of a table.

    Settings that are no weights: "strength", of what training changed in a model, and "denoise", the share of sampling
    that is done on the noised pictures of printed digits in the prompted colours, as image to image does.
    """

    methods: ClassVar[Mapping[str, Method]]
    models: Models

    def __init__(self, plan: Plan, folder: Path, models: Path) -> None:
        """models: the folder of the trained ones."""
        super().__init__(plan, folder)
        self.models = self.open_models(models)
        self._targets: dict[str, Tensor] = {}

    def open_models(self, folder: Path) -> Models:
        return Models(folder, self.world, self.plan.images, self.plan.batch, self.wanted)

    @property
    def wanted(self) -> list[ModelSpec]:
        """All models that the plan asks for."""
        return [point.model for point in self.plan.points if point.model]

    def training(self, point: Point) -> dict[str, Any]:
        return self.models.facts(point.model) if point.model else {}

    def examine(self, point: Point) -> tuple[dict[str, Measured], dict[str, float]]:
        question, sampling, settings = QUESTIONS[point.question], self.plan.sampling, point.values
        if question.name not in self._targets:
            self._targets[question.name] = judge(self.judges[0], question.answers(sampling))[0]
        models = {"prior": cast(self.world.prior, sampling.precision)}
        if point.model:
            trained = self.models.denoiser(point.model, settings.get("strength", 1.0))
            models["trained"] = cast(trained, sampling.precision)
        prompts, method = question.prompts(sampling.samples, sampling.seed), self.methods[point.method]
        drawn, cost = sample_prompts(
            self.world,
            lambda uncond, cond: guidance(method, settings, models, {"uncond": uncond, "cond": cond}),
            prompts,
            steps=sampling.steps,
            seed=sampling.seed,
            batch=125,  # larger ones are slower on a processor; decides rounding alone
            start=self.printed(prompts, sampling) if "denoise" in settings else None,
            denoise=settings.get("denoise", 1.0),
        )
        measured, numbers = examine(self.judges, self._targets[question.name], drawn, prompts, sampling)
        return measured, {**numbers, "samples_per_step": cost}

    def printed(self, prompts: Prompts, sampling: Sampling) -> Tensor:
        """Scaled latents of printed digits as the prompts name them, one each."""
        generator = Generator().manual_seed(sampling.seed)
        pictures = render.rendered(len(prompts.digits), generator, digits=prompts.digits, pairs=prompts.pairs)
        return self.encode(pictures.images)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, 64, 64] as scaled latents [N, 4, 8, 8]: the posterior's mean."""
        parts = [self.world.autoencoder.encode(part)[0] for part in pictures.split(100)]
        return torch.cat(parts) * self.world.scale

    def floors(self, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """`questions.floors` of every question that rows are about, kept beside them."""
        sampling, found = self.plan.sampling, {}
        for name in dict.fromkeys(row.point.question for row in rows):
            facts = {"question": name, "seed": sampling.seed, "targets": sampling.targets, "world": self.world_hash}
            path, parts = self.points_folder / f"floors-{key_of(facts)}.json", (self.judges[0], self.world.autoencoder)
            found[name] = kept_numbers(path, lambda: floors(QUESTIONS[name], *parts, sampling))  # noqa: B023
        return found
