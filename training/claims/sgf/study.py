"""StyleGAN-Fusion as a study: adaptations of the shipped generator, each made once by the production command and kept
at its stops; how points are drawn from them; the paper's claims and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ....guidance.distillation.critic import Critic
from ....guidance.files.generator import read_generator
from ....guidance.networks.stylegan2 import StyleGAN2
from ...adaptation.adapt import adapt
from ...adaptation.adapter import Adapter, Encode
from ...adaptation.config import AdaptConfig
from ...adaptation.critic import latent_encoder, make_objective, open_critic
from ...mini_world.assets import domain_unets_dir, generators_dir
from ...mini_world.prompts import Prompts, cfg_of, sample_prompts
from ...mini_world.recipe.kept_files import made_once
from ...prior.opening import open_mini_world
from ...prior.prior import Prior
from ..deciding import Claim
from ..keeping import Row, file_hash, key_of, trained_weights
from ..models import Models
from ..points import FIXED_CAPTION, ModelSpec
from ..report import Report
from ..statistics import Measured
from ..study import Plan, Study
from .claims import claims
from .measures import Answers, answers_of, changes, examine
from .recipes import RECIPES
from .report import report
from .sweep import PLANS, Point
from .tasks import TASKS, Task

SOURCE = generators_dir() / "mini-handwriting.safetensors"
DOMAIN_FILE = domain_unets_dir() / "mini-handwriting.safetensors"
SIDE_PX = 64
LATENT_SEED = 1_000_003
BATCH = 100
PRIOR_SCALE = 2.0  # of the prior's own pictures


class SgfStudy(Study):
    """`study.Study` of arXiv 2212.04473. Its fine-tuned critic is one of `claims idg`'s models."""

    paper, title = "sgf", "StyleGAN-Fusion, diffusion guided adaptation of generators (arXiv 2212.04473)"

    def __init__(self, plan: Plan, work: Path, source: Path = SOURCE) -> None:
        """source: the generator's file."""
        super().__init__(plan, work / "sgf")
        self.models = Models(work / "models", self.world, plan.images, plan.batch)
        self.fine_tune = ModelSpec("full", "handwriting", plan.fine_tune, FIXED_CAPTION)
        self.source_path, self.source = source, read_generator(source).generator.eval().requires_grad_(False)
        self._answers: dict[str, Answers] = {}

    @classmethod
    def open(cls, size: str, work: Path, samples: int | None) -> SgfStudy:
        """size: a plan's name; samples: a point, None for the plan's own number."""
        return cls(PLANS[size].with_samples(samples), work)

    @cached_property
    def prior(self) -> Prior:
        return open_mini_world()

    def settings(self, point: Point) -> dict[str, Any]:
        """The adaptation's configuration without paths of its own and length."""
        return {**RECIPES[point.method].settings(TASKS[point.question]), "seed": point.seed}

    def training(self, point: Point) -> dict[str, Any]:
        if not point.is_trained:
            return {}
        critic: Any = RECIPES[point.method].critic
        if critic == "domain":
            critic = file_hash(DOMAIN_FILE)
        elif critic == "fine_tune":
            critic = [self.models.facts(self.fine_tune), self.fine_tune.steps]
        return {"settings": self.settings(point), "critic": critic, "source": file_hash(self.source_path)}

    def generator(self, point: Point) -> StyleGAN2:
        """The generator of a point, adapted now where it does not exist; the source where nothing is trained."""
        if not point.is_trained:
            return self.source

        def train(place: Path, step: int) -> Any:
            print(f"adapting {point.run} to step {step}", file=sys.stderr, flush=True)
            saving = {"sample_every": 0, "checkpoint_every": 100, "keep_checkpoints": 1, "file_dtype": "fp32"}
            places = {"name": point.run, "output": str(place), "steps": step, **saving}
            config, critic, encode = self._critic(point, places)
            return adapt(config, generator=self.source, critic=critic, encode=encode)

        run = f"{point.run}-{key_of(self.training(point))[:10]}"
        path = trained_weights(self.folder / "generators", run, point.step, train, self.plan.stops)
        return read_generator(path).generator

    def _critic(self, point: Point, places: dict[str, Any]) -> tuple[AdaptConfig, Critic, Encode]:
        """(the configuration, who judges, how pictures become what is judged) of a run."""
        kind = RECIPES[point.method].critic
        domain = {"domain": str(DOMAIN_FILE)} if kind == "domain" else {}
        config = AdaptConfig.from_mapping({**self.settings(point), **domain, **places})
        encode = latent_encoder(self.prior, SIDE_PX)
        if kind != "fine_tune":
            return config, open_critic(config, self.prior, SIDE_PX, "cpu"), encode
        texts = [self.world.encode_text([text]) for text in (config.negative, config.prompt)]
        uncond, cond = ({"context": text} for text in texts)
        return config, Critic.cfg(self.models.denoiser(self.fine_tune), uncond, cond, config.scale), encode

    def gflops(self, point: Point) -> float:
        """Billions of floating point operations that a step takes, forward and backward."""
        config, critic, encode = self._critic(point, {})
        adapter = Adapter(config, self.source, make_objective(config, critic, encode, "cpu"), encode)
        with FlopCounterMode(display=False) as counter:
            adapter.take_step()
        return counter.get_total_flops() / 1e9

    def examine(self, point: Point) -> tuple[dict[str, Measured], dict[str, float]]:
        task, samples = TASKS[point.question], self.plan.sampling.samples
        if task.name not in self._answers:
            answers = answers_of(task, self.judges[0], self.source_pictures, samples, self.rendered(task))
            self._answers[task.name] = answers
        answers, generator = self._answers[task.name], self.generator(point)
        if point.method == "prior":
            pictures = self.rendered(task)
        elif point.method == "exact":
            pictures = task.answers(self.source_pictures, answers.source["digit"])[0]
        else:
            pictures = pictures_of(generator, samples)
        measured, numbers = examine(task, answers, self.judges, pictures[:samples], self.plan.sampling)
        if point.is_trained:
            numbers |= changes(self.source.state_dict(), generator.state_dict())
            numbers["gflops"] = self.gflops(point)
        return measured, numbers

    @cached_property
    def source_pictures(self) -> Tensor:
        """The source's pictures that right answers are taken from; the first are those of the measured latents."""
        return pictures_of(self.source, max(self.plan.sampling.targets, self.plan.sampling.samples))

    def rendered(self, task: Task) -> Tensor:
        """The prior's own pictures of the prompt, kept."""
        count, steps, seed = self.plan.sampling.rendered, self.plan.sampling.steps, self.plan.sampling.seed
        nothing = torch.zeros(count, dtype=torch.long)  # prompts say neither digit nor colours
        prompts = Prompts(nothing, torch.stack([nothing, nothing], 1), (task.prompt,) * count)
        source = f"{task.prompt}, {count} at {steps} steps, seed {seed}, scale {PRIOR_SCALE}, world {self.world_hash}"

        def draw() -> Tensor:
            return sample_prompts(self.world, cfg_of(self.world, PRIOR_SCALE), prompts, steps=steps, seed=seed)[0]

        return made_once(self.folder / "rendered" / f"{task.name}.pictures", source, draw)

    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        return claims(rows, self.plan.points)

    def report(self, rows: Sequence[Row]) -> Report:
        return report(self.plan, rows)


@torch.no_grad()
def pictures_of(generator: StyleGAN2, count: int) -> Tensor:
    """What a generator makes of the measured latents, [count, 3, 64, 64] in -1..1; more begin with the same ones."""
    z = torch.randn(count, generator.config.z_dim, generator=torch.Generator().manual_seed(LATENT_SEED))
    return torch.cat([generator(part).clamp(-1, 1) for part in z.split(BATCH)])
