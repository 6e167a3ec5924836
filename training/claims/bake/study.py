"""In-domain guidance baked into a LoRA as a study: its plans, models, methods, claims and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....guidance.diffusion import Denoiser
from ....guidance.null_text import load_unet
from ..deciding import Claim
from ..keeping import Row
from ..points import ModelSpec, Point
from ..prompted import PromptedStudy
from ..questions import QUESTIONS
from ..report import Report
from ..statistics import Measured
from ..study import Plan
from .claims import claims
from .methods import METHODS, OTHER_LORA
from .models import BakeModels
from .predictions import MOST, Change, compare, of_text, of_weights
from .recipes import BakedSpec
from .report import report
from .sweep import PLANS, other_lora


class BakeStudy(PromptedStudy):
    """`study.Study` of baked LoRAs."""

    paper, title = "bake", "in-domain guidance baked into a LoRA"
    methods = METHODS

    def __init__(self, plan: Plan, work: Path) -> None:
        super().__init__(plan, work / "bake", work / "models")

    @classmethod
    def open(cls, size: str, work: Path, samples: int | None) -> BakeStudy:
        """size: a plan's name; samples: a point, None for the plan's own number."""
        return cls(PLANS[size].with_samples(samples), work)

    def open_models(self, folder: Path) -> BakeModels:
        return BakeModels(folder, self.world, self.plan.images, self.plan.batch, self.wanted)

    @property
    def wanted(self) -> list[ModelSpec]:
        models = super().wanted
        models += [model.of_domain for model in models if isinstance(model, BakedSpec)]
        return models + [other for point in self.plan.points if (other := self._other(point))]

    def training(self, point: Point) -> dict[str, Any]:
        other = self._other(point)
        return {**super().training(point), **({"other": self.models.facts(other)} if other else {})}

    def examine(self, point: Point) -> tuple[dict[str, Measured], dict[str, float]]:
        if point.method in METHODS:
            return super().examine(point)
        sampling, question = self.plan.sampling, QUESTIONS[point.question]
        count = min(MOST, sampling.samples)
        prompts = question.prompts(sampling.targets, sampling.seed)
        latents = self.encode(question.answers(sampling)[:count])
        texts, digits = self.world.encode_text(prompts.captions[:count]), prompts.digits[:count]
        changes = self._changes(point)
        return compare(*changes, latents, texts, self.world.schedule, digits, sampling.replicates, sampling.seed)

    def _changes(self, point: Point) -> tuple[Change, Change]:
        """The change of predictions with the baked LoRA, and without."""
        assert point.model is not None
        models, prior, baked = self.models, self.world.prior, self.models.denoiser(point.model)
        other = self._other(point)
        if other is None:
            empty = self.world.encode_text([""])
            return of_text(baked, empty), of_text(prior, empty)
        weights = models.prior_with(point.model, weights=models.prior_with(other))
        both = Denoiser(load_unet(weights, models.prior_config), self.world.schedule)
        return of_weights(both, baked), of_weights(models.denoiser(other), prior)

    def _other(self, point: Point) -> ModelSpec | None:
        """The other LoRA of a point that has one."""
        if point.method != OTHER_LORA:
            return None
        return other_lora(QUESTIONS[point.question].domain, point.values["other_steps"])

    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        return claims(self.floors(rows), rows)

    def report(self, rows: Sequence[Row]) -> Report:
        return report(self.plan, rows, self.floors(rows))
