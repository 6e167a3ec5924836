"""In-domain guidance as a study: its models, each made once by the production trainer and kept; how points are drawn
with them; the paper's claims and report.

Training lengths of one model are stops of a single run, so only the longest costs time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....guidance.diffusion import Denoiser
from ....guidance.files import add_lora, read_domain_file, read_lora, read_state_dict
from ....guidance.networks.unet_config import UNetConfig
from ....guidance.null_text import load_unet
from ...domain.config import TrainConfig
from ...domain.train import train
from ...mini_world import assets, pictures
from ...mini_world.assets import MiniWorld
from ...mini_world.classifier import judge
from ...mini_world.prompts import sample_prompts
from ...mini_world.recipe.train_domain import FILE_NAMES
from ..deciding import Claim
from ..keeping import Row, file_hash, kept_numbers, key_of, trained_weights
from ..report import Report
from ..statistics import Measured
from ..study import Plan, Study
from .claims import Floors, claims
from .confirming import confirming
from .methods import guidance
from .questions import QUESTIONS, examine, floors
from .report import report
from .sweep import PLANS, ModelSpec, Point

RATES = {"domain": 3e-4, "full": 3e-4, "low_rank": 1e-3}
SETTINGS: dict[str, Any] = {
    "base": "mini_world",
    "resolution": 64,
    "buckets": False,
    "schedule": "constant",
    "warmup": 50,
    "ema": 0.99,
    "noisy_share": 0.5,
    "precision": "fp32",
    "held_out_share": 0.0,
}


class Models:
    """Finds, trains and loads models; everything it makes lies in `folder`.

    images, batch: of their training. wanted: all models that will be asked for, whose stops are kept in passing.
    """

    def __init__(
        self, folder: Path, world: MiniWorld, images: int = 8000, batch: int = 64, wanted: Iterable[ModelSpec] = ()
    ) -> None:
        self.folder, self.world, self.images, self.batch, self.wanted = folder, world, images, batch, tuple(wanted)

    def settings(self, spec: ModelSpec) -> dict[str, Any]:
        """The trainer's configuration without paths; the same for every length of a run."""
        own = {
            "name": spec.run_name,
            "form": "cached" if spec.kind == "domain" else "full",
            "caption": spec.caption,
            "train": "low_rank" if spec.kind == "low_rank" else "all",
            "batch_size": self.batch,
            "learning_rate": RATES[spec.kind],
            "seed": spec.seed,
        }
        return {**SETTINGS, **own}

    def facts(self, spec: ModelSpec) -> dict[str, Any]:
        """Everything that decides a model's weights but for its length, as plain JSON."""
        if spec.kind == "shipped":
            return {"file": file_hash(self.file(spec))}
        prior = file_hash(assets.weights_dir() / "prior_unet.safetensors")
        return {"settings": self.settings(spec), "images": self.images, "prior": prior}

    def file(self, spec: ModelSpec) -> Path:
        """The model's file, trained now where it does not exist. Raises as `keeping.trained_weights`."""
        if spec.kind == "shipped":
            return assets.domain_unets_dir() / f"{FILE_NAMES[spec.domain]}.safetensors"
        stops = [other.steps for other in self.wanted if other.run_name == spec.run_name]
        run = f"{spec.run_name}-{key_of(self.facts(spec))[:8]}"
        return trained_weights(self.folder, run, spec.steps, lambda place, step: self._train(spec, place, step), stops)

    def _train(self, spec: ModelSpec, place: Path, step: int) -> Any:
        print(f"training {spec.run_name} to step {step}", file=sys.stderr, flush=True)
        images = self.folder / f"{spec.domain}-{self.images}-images"
        if len(list(images.glob("*.png"))) != self.images:
            pictures.export_pictures(images, spec.domain, self.images)
        places = {
            "data": [str(images)],
            "steps": step,
            "output": str(place),
            "cache": str(self.folder / "latents"),
            "caching_batch": 100,
            "sample_every": 0,
            "validate_every": 0,
            "checkpoint_every": 100,
            "keep_checkpoints": 1,
            "device": "cpu",
        }
        return train(TrainConfig.from_mapping({**self.settings(spec), **places}))

    def denoiser(self, spec: ModelSpec) -> Denoiser:
        """The model as a denoiser, trained first where it is missing; text-free ones take no text."""
        path = self.file(spec)
        if spec.kind in ("shipped", "domain"):
            weights, metadata = read_domain_file(path)
            config = metadata.config
        else:
            config = self.world.prior.unet.config
            assert isinstance(config, UNetConfig)
            if spec.kind == "low_rank":
                weights = add_lora(self.world.prior.unet.state_dict(), read_lora(path)[0], config, source=path)
            else:
                weights = read_state_dict(path)
        return Denoiser(load_unet(weights, config), self.world.schedule)


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
        drawn, cost = sample_prompts(
            self.world,
            lambda uncond, cond: guidance(point.method, point.values, models, {"uncond": uncond, "cond": cond}),
            prompts,
            steps=sampling.steps,
            seed=sampling.seed,
            batch=125,  # larger ones are slower on a processor; decides rounding alone
        )
        measured, numbers = examine(self.judges, self._targets[question.name], drawn, prompts, sampling)
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
