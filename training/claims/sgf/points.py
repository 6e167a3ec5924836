"""One measured point: a recipe on a task after some steps from one seed; measured once and kept as a JSON file."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ....guidance.errors import Problem
from ....guidance.networks.stylegan2 import StyleGAN2
from ...mini_world.assets import MiniWorld
from ...mini_world.classifier import Classifier, judge
from ...mini_world.prompts import Prompts, cfg_of, sample_prompts
from ...mini_world.recipe.kept_files import load_saved, made_once, save_atomically
from ...mini_world.recipe.status_line import StatusLine
from ..keeping import Row, Shelf, key_of
from .measures import Answers, answers_of, changes, examine, second_opinion
from .recipes import RECIPES
from .runs import Run, Runs
from .tasks import TASKS, Task

# Part of every key: raise it when the meaning of a stored number changes.
VERSION = 1
LATENT_SEED = 1_000_003
BATCH = 100
SHOWN = 8  # pictures of each point that are kept
FIXED = ("source", "exact", "prior")


@dataclass(frozen=True)
class Point:
    """What to measure. recipe: one of RECIPES, or one of FIXED, which have neither steps nor seeds: "source" (the
    generator as it is, where every run starts), "exact" (the exact answers) and "prior" (the prior's own pictures of
    the prompt)."""

    task: str
    recipe: str
    step: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise Problem(f"expected one of the tasks {', '.join(TASKS)}, found {self.task!r}")
        if self.recipe not in (*RECIPES, *FIXED):
            raise Problem(f"expected one of the recipes {', '.join(RECIPES)}, found {self.recipe!r}")

    @property
    def run(self) -> Run | None:
        return None if self.recipe in FIXED else Run(self.task, self.recipe, self.seed)

    def __str__(self) -> str:
        return f"{self.task}: {self.recipe}" + (f", step {self.step}, seed {self.seed}" if self.run else "")


@dataclass(frozen=True)
class Sampling:
    """How points are drawn and measured: part of their keys. samples: latents; answers: the source's pictures that
    right answers are taken from; rendered: the prior's pictures, drawn in so many steps at this scale."""

    samples: int
    answers: int = 2000
    rendered: int = 500
    rendered_steps: int = 15
    rendered_scale: float = 2.0
    replicates: int = 400
    seed: int = 0


class Bench:
    """Measures points and keeps them: `measure` computes, `find` only looks into the folder.

    A point's file is named by the hash of everything that decides its numbers: task, recipe, training, sampling and the
    content of all weight files used.
    """

    def __init__(
        self,
        folder: Path,
        runs: Runs,
        world: MiniWorld,
        source: StyleGAN2,
        judge_model: Classifier,
        sampling: Sampling,
        second_judge: Classifier,
    ) -> None:
        self.folder, self.shelf, self.runs, self.world, self.source = folder, Shelf(folder), runs, world, source
        self.judge_model, self.second_judge, self.sampling = judge_model, second_judge, sampling
        self._answers: dict[str, Answers] = {}
        self._source_pictures: Tensor | None = None

    def key(self, point: Point) -> str:
        """The hash that names the point's file."""
        task = TASKS[point.task]
        facts = {
            "version": VERSION,
            "task": {key: value for key, value in asdict(task).items() if key != "title"},
            "recipe": point.recipe,
            "run": self.runs.facts(point.run, point.step) if point.run else None,
            "sampling": asdict(self.sampling),
            "world": self.runs.world_hash,
        }
        return key_of(facts)

    def find(self, point: Point) -> Row | None:
        """The point as measured before, or None; a damaged file counts as not there."""
        return self.shelf.find(self.key(point), point, self.sampling)

    def measure(self, point: Point) -> Row:
        """The point from the folder, or else measured now and put there.

        Raises Busy while another process measures it or trains what it needs.
        """
        found = self.find(point)
        if found is not None:
            return found
        with self.shelf.making(self.key(point)):
            return self.find(point) or self._measure(point)

    def _measure(self, point: Point) -> Row:
        started = time.monotonic()
        task = TASKS[point.task]
        answers = self.answers(task)
        generator = self.runs.generator(point.run, point.step) if point.run else self.source
        pictures = self.fixed(task, point.recipe) if point.recipe in ("exact", "prior") else self.pictures(generator)
        measured, numbers = examine(
            task, answers, self.judge_model, pictures, self.sampling.replicates, self.sampling.seed
        )
        numbers |= second_opinion(task, self.second_judge, pictures)
        if point.run:
            numbers |= changes(self.source.state_dict(), generator.state_dict())
            numbers |= self.runs.cost(point.run)
        numbers["seconds"] = time.monotonic() - started
        save_atomically({"pictures": pictures[:SHOWN].half()}, self.pictures_path(point))
        self.shelf.put(self.key(point), {"point": str(point), "sampling": asdict(self.sampling)}, numbers, measured)
        return self.find(point)  # what a continued run will read, to the last digit

    def pictures_path(self, point: Point) -> Path:
        return self.folder / f"{self.key(point)}.pictures"

    def shown(self, point: Point) -> Tensor | None:
        """The kept pictures [SHOWN, 3, 64, 64] of a point, of the first latents."""
        try:
            return load_saved(self.pictures_path(point))["pictures"].float()
        except (OSError, ValueError, KeyError):
            return None

    @torch.no_grad()
    def pictures(self, generator: StyleGAN2, count: int | None = None) -> Tensor:
        """What a generator makes of the first `count` latents (the measured ones), [N, 3, 64, 64] in -1..1."""
        z = latents(generator.config.z_dim, count or self.sampling.samples)
        return torch.cat([generator(part).clamp(-1, 1) for part in z.split(BATCH)])

    def source_pictures(self) -> Tensor:
        if self._source_pictures is None:
            self._source_pictures = self.pictures(self.source, max(self.sampling.answers, self.sampling.samples))
        return self._source_pictures

    def fixed(self, task: Task, recipe: str) -> Tensor:
        """The exact answers or the prior's pictures, at most as many as latents are measured."""
        if recipe == "prior":
            return self.rendered(task)[: self.sampling.samples]
        pictures = self.source_pictures()
        return task.answers(pictures, judge(self.judge_model, pictures)[1]["digit"])[0][: self.sampling.samples]

    def rendered(self, task: Task) -> Tensor:
        """The prior's own pictures of the prompt."""
        count, sampling = self.sampling.rendered, self.sampling
        unsaid = torch.zeros(count, dtype=torch.long)
        prompts = Prompts(unsaid, torch.stack([unsaid, unsaid], 1), (task.prompt,) * count)
        name = f"the prior's {task.name}, scale {sampling.rendered_scale:g}"
        drawn = f"{task.prompt}, {count} at {sampling.rendered_steps} steps, seed {sampling.seed}"
        source = f"{drawn}, world {self.runs.world_hash}"

        def draw() -> Tensor:
            return sample_prompts(
                self.world,
                cfg_of(self.world, sampling.rendered_scale),
                prompts,
                steps=sampling.rendered_steps,
                seed=sampling.seed,
                progress=StatusLine(name).update,
            )[0]

        return made_once(self.folder / "rendered" / f"{task.name}-{sampling.rendered_scale:g}.pictures", source, draw)

    def answers(self, task: Task) -> Answers:
        if task.name not in self._answers:
            self._answers[task.name] = answers_of(
                task, self.judge_model, self.source_pictures(), self.sampling.samples, self.rendered(task)
            )
        return self._answers[task.name]


@lru_cache(maxsize=2)
def latents(width: int, count: int) -> Tensor:
    """The latents [count, width] that every generator is measured on; more begin with the same ones."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(LATENT_SEED))
