"""One measured point: a method at one setting, answering one question; measured once and kept as a small JSON file."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....guidance.diffusion import Denoiser
from ....guidance.errors import Problem
from ....guidance.networks.autoencoder import Autoencoder
from ...mini_world.assets import MiniWorld
from ...mini_world.classifier import Classifier, judge
from ...mini_world.distances import kernel_distance, within_class_diversity
from ...mini_world.prompts import Prompts, sample_prompts
from ...mini_world.recipe.status_line import StatusLine
from ..keeping import Row, Shelf, key_of
from ..statistics import Measured, measure_distance, measure_share, resampling_counts
from .methods import METHODS
from .models import Models, ModelSpec
from .questions import QUESTIONS, Examiner

# Part of every key: raise it when the meaning of a stored number changes.
VERSION = 2
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Point:
    """What to measure: a question, a method, its settings (plain JSON) and the model it uses besides the prior.

    `settings` is kept as JSON text so that points can be compared and hashed.
    """

    question: str
    method: str
    settings: str
    model: ModelSpec | None = None

    @classmethod
    def of(cls, question: str, method: str, model: ModelSpec | None = None, **settings: Any) -> Point:
        if question not in QUESTIONS:
            raise Problem(f"expected one of the questions {', '.join(QUESTIONS)}, found {question!r}")
        if method not in METHODS:
            raise Problem(f"expected one of the methods {', '.join(METHODS)}, found {method!r}")
        return cls(question, method, json.dumps(settings, sort_keys=True), model)

    @property
    def values(self) -> dict[str, Any]:
        return json.loads(self.settings)

    def with_seed(self, seed: int) -> Point:
        """The same point with its model trained from another seed."""
        return replace(self, model=replace(self.model, seed=seed)) if self.model else self

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {_short(value)}" for name, value in self.values.items())
        return f"{self.question}: {self.method}{f' [{self.model}]' if self.model else ''} {settings}"


def _short(value: Any) -> str:
    """A setting in few characters: numbers as they are, schedules as value@start-end or as their points."""
    if isinstance(value, Mapping) and value.get("type") == "interval":
        outside = f" else {value['outside']:g}" if value.get("outside") else ""
        return f"{_short(value['value'])}@{value['start']:g}-{value['end']:g}{outside}"
    if isinstance(value, Mapping) and value.get("type") == "keyframes":
        return "/".join(f"{weight:g}@{position:g}" for position, weight in value["points"])
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Sampling:
    """How points are drawn and measured: part of their keys. targets: pictures in the target set; precision: of the
    UNets, everything around them is float32."""

    samples: int
    steps: int = 25
    seed: int = 0
    sampler: str = "dpmpp_2m"
    replicates: int = 400
    targets: int = 2000
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise Problem(f"expected a precision of {', '.join(PRECISIONS)}, found {self.precision!r}")

    @property
    def facts(self) -> dict[str, Any]:
        """What decides numbers; fp32 goes without saying, as in points from before there was another."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("precision", "fp32")}


class Bench:
    """Measures points and keeps them: `measure` computes, `find` only looks into the folder.

    A point's file is named by the hash of everything that decides its numbers: method, settings, sampling and the
    content of all weight files used.
    """

    def __init__(
        self,
        folder: Path,
        models: Models,
        world: MiniWorld,
        judge_model: Classifier,
        sampling: Sampling,
        second_judge: Classifier | None = None,
    ) -> None:
        self.folder, self.shelf = folder, Shelf(folder)
        self.models, self.world, self.judge_model = models, world, judge_model
        self.sampling, self.second_judge = sampling, second_judge
        self._examiners: dict[str, Examiner] = {}

    def examiner(self, question: str) -> Examiner:
        if question not in self._examiners:
            self._examiners[question] = Examiner(
                QUESTIONS[question], self.judge_model, self.sampling.seed, self.sampling.targets
            )
        return self._examiners[question]

    def key(self, point: Point) -> str:
        """The hash that names the point's file. Needs the point's model to exist."""
        facts = {
            "version": VERSION,
            "question": point.question,
            "method": point.method,
            "settings": point.values,
            "sampling": self.sampling.facts,
            "world": self.models.world_hash,
            "model": self.models.file_hash(point.model) if point.model else None,
        }
        return key_of(facts)

    def find(self, point: Point) -> Row | None:
        """The point as measured before, or None; a damaged file counts as not there."""
        if point.model is not None and not self.models.exists(point.model):
            return None
        return self.shelf.find(self.key(point), point, self.sampling)

    def floors(self, question: str, autoencoder: Autoencoder) -> dict[str, float]:
        """`Examiner.floors` of a question, kept like a point."""
        facts = {
            "version": VERSION,
            "floors": question,
            "seed": self.sampling.seed,
            "targets": self.sampling.targets,
            "world": self.models.world_hash,
        }
        return self.shelf.numbers("floors", facts, lambda: self.examiner(question).floors(autoencoder))

    def measure(self, point: Point) -> Row:
        """The point from the folder, or else measured now and put there.

        Raises Busy while another process measures it or trains its model.
        """
        found = self.find(point)
        if found is not None:
            return found
        if point.model:
            self.models.train(point.model)  # the key needs its file
        with self.shelf.making(self.key(point)):
            return self.find(point) or self._measure(point)

    def _measure(self, point: Point) -> Row:
        started = time.monotonic()
        precision = PRECISIONS[self.sampling.precision]
        prior = cast(self.world.prior, precision)
        model = cast(self.models.denoiser(point.model), precision) if point.model else None
        guidance_of, settings = METHODS[point.method], point.values
        examiner = self.examiner(point.question)
        prompts = examiner.question.prompts(self.sampling.samples, self.sampling.seed)
        pictures, cost = sample_prompts(
            self.world,
            lambda uncond, cond: guidance_of(prior, model, settings, uncond, cond),
            prompts,
            steps=self.sampling.steps,
            seed=self.sampling.seed,
            batch=125,  # larger ones are slower on a processor; decides rounding alone
            method=self.sampling.sampler,
            progress=StatusLine(str(point)).update,
        )
        measured, numbers = examine(examiner, pictures, prompts, self.sampling)
        if self.second_judge is not None:
            numbers |= second_opinion(self.second_judge, pictures, prompts)
        numbers |= {"samples_per_step": cost, "seconds": time.monotonic() - started}
        said = {
            "question": point.question,
            "method": point.method,
            "settings": point.values,
            "model": str(point.model) if point.model else None,
            "sampling": asdict(self.sampling),
        }
        self.shelf.put(self.key(point), said, numbers, measured)
        return self.find(point)  # what a continued run will read, to the last digit


def cast(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The same denoiser with a network of another dtype; itself where it has that one."""
    if next(denoiser.unet.parameters()).dtype == dtype:
        return denoiser
    unet = copy.deepcopy(denoiser.unet).to(dtype)
    return Denoiser(unet, denoiser.schedule, denoiser.prediction_type, denoiser.quantize)


def examine(
    examiner: Examiner, pictures: Tensor, prompts: Prompts, sampling: Sampling
) -> tuple[dict[str, Measured], dict[str, float]]:
    """(measures with bootstrap replicates, all numbers) of pictures [N, 3, 64, 64] that answer the prompts."""
    features, named = judge(examiner.judge_model, pictures)
    counts = resampling_counts(prompts.digits, sampling.replicates, sampling.seed)
    ink, ground = named["ink"] == prompts.pairs[:, 0], named["ground"] == prompts.pairs[:, 1]
    measured = {
        "distance": measure_distance(features, examiner.target, counts),
        "digit": measure_share(named["digit"] == prompts.digits, counts),
        "both_colours": measure_share(ink & ground, counts),
        "in_domain": measure_share(named["world"] == 1, counts),
    }
    numbers = {name: one.value for name, one in measured.items()}
    numbers |= {
        "distance_uncorrected": measured["distance"].uncorrected,
        "kernel": kernel_distance(features, examiner.features),
        "ink": float(ink.double().mean()),
        "ground": float(ground.double().mean()),
        "diversity": within_class_diversity(features, named["digit"]),
    }
    return measured, numbers


def second_opinion(judge_model: Classifier, pictures: Tensor, prompts: Prompts) -> dict[str, float]:
    """What a judge that never saw the generative models' training images says: shares only, its features are others."""
    named = judge(judge_model, pictures)[1]
    colours = (named["ink"] == prompts.pairs[:, 0]) & (named["ground"] == prompts.pairs[:, 1])
    right = {"digit": named["digit"] == prompts.digits, "both_colours": colours, "in_domain": named["world"] == 1}
    return {f"{name}_second_judge": float(value.double().mean()) for name, value in right.items()}
