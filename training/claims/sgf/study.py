"""StyleGAN-Fusion as a study: how its points are drawn, its claims and its report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....guidance.files.generator import read_generator
from ....guidance.networks.stylegan2 import StyleGAN2
from ...mini_world.assets import generators_dir
from ...mini_world.prompts import Prompts, cfg_of, sample_prompts
from ...mini_world.recipe.kept_files import load_saved, made_once, save_atomically
from ...mini_world.recipe.status_line import StatusLine
from ..deciding import Claim, Verdict
from ..idg.models import Models
from ..keeping import Row
from ..report import Report
from ..statistics import Measured
from ..study import Plan, Study
from .claims import claims
from .generators import Generators
from .measures import Answers, answers_of, changes, examine
from .points import Point
from .report import report
from .sweep import PLANS
from .tasks import TASKS, Task

SOURCE = generators_dir() / "mini-handwriting.safetensors"
LATENT_SEED = 1_000_003
BATCH = 100
PRIOR_SCALE = 2.0  # of the prior's own pictures
SHOWN = 8  # pictures of each point that are kept


class SgfStudy(Study):
    """`study.Study` of arXiv 2212.04473. Its fine-tuned critic is one of `claims idg`'s models."""

    paper, title = "sgf", "StyleGAN-Fusion, diffusion guided adaptation of generators (arXiv 2212.04473)"

    def __init__(self, plan: Plan, work: Path, source: Path = SOURCE) -> None:
        """source: the generator's file."""
        super().__init__(plan, work / "sgf")
        self.source = read_generator(source).generator.eval().requires_grad_(False)
        models = Models(work / "models", self.world, plan.images, plan.batch)
        folder = self.folder / "generators"
        self.generators = Generators(folder, self.source, source, models, plan.fine_tune, plan.stops)
        self._answers: dict[str, Answers] = {}

    @classmethod
    def open(cls, size: str, work: Path, samples: int | None) -> SgfStudy:
        """size: a plan's name; samples: a point, None for the plan's own number."""
        return cls(PLANS[size].with_samples(samples), work / size if size == "tiny" else work)

    def training(self, point: Point) -> dict[str, Any]:
        return self.generators.facts(point) if point.is_trained else {}

    def examine(self, point: Point) -> tuple[dict[str, Measured], dict[str, float]]:
        task, judges = TASKS[point.question], (self.judge, self.second_judge)
        samples = self.plan.sampling.samples
        if task.name not in self._answers:
            self._answers[task.name] = answers_of(task, self.judge, self.source_pictures, samples, self.rendered(task))
        answers, generator = self._answers[task.name], self.generators.generator(point)
        if point.method == "prior":
            pictures = self.rendered(task)
        elif point.method == "exact":
            pictures = task.answers(self.source_pictures, answers.source["digit"])[0]
        else:
            pictures = self.pictures(generator, samples)
        pictures = pictures[:samples]
        measured, numbers = examine(task, answers, judges, pictures, self.plan.sampling)
        if point.is_trained:
            numbers |= changes(self.source.state_dict(), generator.state_dict())
            numbers["gflops"] = self.generators.gflops(point)
        save_atomically({"pictures": pictures[:SHOWN].half()}, self._shown(point))
        return measured, numbers

    def _shown(self, point: Point) -> Path:
        return self.shelf.folder / f"{self.key(point)}.pictures"

    def shown(self, point: Point) -> Tensor | None:
        """The kept pictures [SHOWN, 3, 64, 64] of a point, of the first latents."""
        try:
            return load_saved(self._shown(point))["pictures"].float()
        except (OSError, ValueError, KeyError):
            return None

    @torch.no_grad()
    def pictures(self, generator: StyleGAN2, count: int) -> Tensor:
        """What a generator makes of the first latents, [count, 3, 64, 64] in -1..1."""
        z = latents(generator.config.z_dim, count)
        return torch.cat([generator(part).clamp(-1, 1) for part in z.split(BATCH)])

    @cached_property
    def source_pictures(self) -> Tensor:
        """The source's pictures that right answers are taken from; the first are those of the measured latents."""
        return self.pictures(self.source, max(self.plan.sampling.targets, self.plan.sampling.samples))

    def rendered(self, task: Task) -> Tensor:
        """The prior's own pictures of the prompt, kept."""
        count, steps, seed = self.plan.sampling.rendered, self.plan.sampling.steps, self.plan.sampling.seed
        nothing = torch.zeros(count, dtype=torch.long)  # prompts say neither digit nor colours
        prompts = Prompts(nothing, torch.stack([nothing, nothing], 1), (task.prompt,) * count)
        source = f"{task.prompt}, {count} at {steps} steps, seed {seed}, scale {PRIOR_SCALE}, world {self.world_hash}"

        def draw() -> Tensor:
            progress = StatusLine(f"the prior's {task.name}").update
            guidance = cfg_of(self.world, PRIOR_SCALE)
            return sample_prompts(self.world, guidance, prompts, steps=steps, seed=seed, progress=progress)[0]

        return made_once(self.folder / "rendered" / f"{task.name}.pictures", source, draw)

    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        return claims(rows, self.plan.points)

    def report(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Report:
        return report(self.plan, rows, self.shown)


@lru_cache(maxsize=2)
def latents(width: int, count: int) -> Tensor:
    """The latents [count, width] that every generator is measured on; more begin with the same ones."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(LATENT_SEED))
