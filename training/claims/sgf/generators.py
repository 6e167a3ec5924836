"""Adaptations of the shipped generator, each made once by the production command and kept at its stops."""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from ....guidance.diffusion import Denoiser
from ....guidance.distillation.critic import Critic
from ....guidance.files.generator import read_generator
from ....guidance.networks.stylegan2 import StyleGAN2
from ...adaptation.adapt import adapt
from ...adaptation.adapter import Adapter, Encode
from ...adaptation.config import AdaptConfig
from ...adaptation.critic import latent_encoder, make_objective, open_critic
from ...mini_world import assets
from ...prior.opening import open_mini_world
from ...prior.prior import Prior
from ..idg.models import FIXED_CAPTION, Models, ModelSpec
from ..keeping import Shelf, file_hash, key_of, trained_weights
from .points import Point
from .recipes import RECIPES
from .tasks import TASKS

SIDE_PX = 64


class Generators:
    """Finds, makes and loads adapted generators; everything it makes lies in `folder`.

    source: the generator to adapt, in the file `source_path`. models: where the fine-tuned critic comes from;
    fine_tune: its length in steps. stops: steps that will be asked for, kept in passing.
    """

    def __init__(
        self,
        folder: Path,
        source: StyleGAN2,
        source_path: Path,
        models: Models,
        fine_tune: int = 300,
        stops: tuple[int, ...] = (),
    ) -> None:
        self.folder, self.source, self.source_path, self.stops = folder, source, source_path, stops
        self.models, self.fine_tune = models, ModelSpec("full", "handwriting", fine_tune, FIXED_CAPTION)
        self.costs = Shelf(folder / "costs")

    @cached_property
    def prior(self) -> Prior:
        return open_mini_world()

    def settings(self, point: Point) -> dict[str, Any]:
        """The adaptation's configuration without paths of its own and length."""
        return {**RECIPES[point.method].settings(TASKS[point.question]), "seed": point.seed}

    def facts(self, point: Point) -> dict[str, Any]:
        """Everything that decides a run's weights but for its length and the mini world's files, as plain JSON."""
        critic: Any = RECIPES[point.method].critic
        if critic == "domain":
            critic = file_hash(self._domain_file)
        elif critic == "fine_tune":
            critic = [self.models.facts(self.fine_tune), self.fine_tune.steps]
        return {"settings": self.settings(point), "critic": critic, "source": file_hash(self.source_path)}

    def file(self, point: Point) -> Path:
        """The adapted generator's file, made now where it does not exist. Raises as `keeping.trained_weights`."""
        run = f"{point.run}-{key_of(self.facts(point))[:10]}"
        return trained_weights(
            self.folder, run, point.step, lambda place, step: self._adapt(point, place, step), self.stops
        )

    def generator(self, point: Point) -> StyleGAN2:
        """The generator of a point; the source where nothing is trained."""
        return read_generator(self.file(point)).generator if point.is_trained else self.source

    def _adapt(self, point: Point, place: Path, step: int) -> Any:
        places = {
            "name": point.run,
            "output": str(place),
            "steps": step,
            "sample_every": 0,
            "checkpoint_every": 100,
            "keep_checkpoints": 1,
            "file_dtype": "fp32",
        }
        print(f"adapting {point.run} to step {step}", file=sys.stderr, flush=True)
        config, critic, encode = self._critic(point, places)
        return adapt(config, generator=self.source, critic=critic, encode=encode)

    @property
    def _domain_file(self) -> Path:
        return assets.domain_unets_dir() / "mini-handwriting.safetensors"

    def _critic(self, point: Point, places: dict[str, Any]) -> tuple[AdaptConfig, Critic, Encode]:
        """(the configuration, who judges, how pictures become what is judged) of a run."""
        kind = RECIPES[point.method].critic
        domain = {"domain": str(self._domain_file)} if kind == "domain" else {}
        config = AdaptConfig.from_mapping({**self.settings(point), **domain, **places})
        encode = latent_encoder(self.prior, SIDE_PX)
        if kind != "fine_tune":
            return config, open_critic(config, self.prior, SIDE_PX, "cpu"), encode
        model: Denoiser = self.models.denoiser(self.fine_tune)
        texts = [self.models.world.encode_text([text]) for text in (config.negative, config.prompt)]
        uncond, cond = ({"context": text} for text in texts)
        return config, Critic.cfg(model, uncond, cond, config.scale), encode

    def gflops(self, point: Point) -> float:
        """Billions of floating point operations that a step takes, forward and backward, counted once and kept."""
        facts = self.facts(point)
        facts["settings"] = {key: value for key, value in facts["settings"].items() if key not in ("seed", "prompt")}
        return self.costs.numbers("cost", facts, lambda: {"gflops": self._count(point)})["gflops"]

    def _count(self, point: Point) -> float:
        config, critic, encode = self._critic(point, {})
        adapter = Adapter(config, self.source, make_objective(config, critic, encode, "cpu"), encode)
        with FlopCounterMode(display=False) as counter:
            adapter.take_step()
        return counter.get_total_flops() / 1e9
