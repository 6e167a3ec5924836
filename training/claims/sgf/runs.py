"""Adaptations of the shipped generator, each made once by the production command and kept at its stops.

With a constant learning rate a longer run goes through exactly the weights of a shorter one, so all stops of a run are
one adaptation that goes on.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ....guidance.diffusion import Denoiser
from ....guidance.distillation.critic import Critic
from ....guidance.files.atomic import replacing
from ....guidance.files.generator import read_generator
from ....guidance.networks.stylegan2 import StyleGAN2
from ...adaptation.adapt import adapt
from ...adaptation.adapter import Adapter, Encode
from ...adaptation.config import AdaptConfig
from ...adaptation.critic import latent_encoder, make_objective, open_critic
from ...engine.lock import locked
from ...mini_world import assets
from ...prior.opening import open_mini_world
from ...prior.prior import Prior
from ..idg.models import FIXED_CAPTION, Models, ModelSpec, file_hash
from ..keeping import Shelf, key_of
from .recipes import RECIPES
from .tasks import TASKS

FINE_TUNE_STEPS = 300
DOMAIN_FILE = "mini-handwriting"
SIDE_PX = 64
# Raised when the released update is computed otherwise. 2: the image gradient is clamped on the images as they are
# judged, instead of after it went back through their clamp to -1..1.
RELEASED_UPDATE = 2


@dataclass(frozen=True, order=True)
class Run:
    """One adaptation: a recipe on a task from a training seed."""

    task: str
    recipe: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.task}-{self.recipe}-seed{self.seed}"


class Runs:
    """Finds, makes and loads adapted generators; everything it makes lies in `folder`.

    source: the generator to adapt. models: where the fine-tuned critic comes from. fine_tune: its length in steps.
    stops: steps that will be asked for; a run keeps them in passing.
    """

    def __init__(
        self,
        folder: Path,
        source: StyleGAN2,
        source_path: Path,
        models: Models,
        fine_tune: int = FINE_TUNE_STEPS,
        stops: Sequence[int] = (),
    ) -> None:
        self.folder, self.source, self.source_path, self.models = folder, source, source_path, models
        self.stops = tuple(stops)
        self.fine_tune = ModelSpec("full", "handwriting", fine_tune, FIXED_CAPTION)
        self.costs = Shelf(folder / "costs")

    @cached_property
    def world_hash(self) -> str:
        """One hash over the shipped files that every number depends on: the mini world's and the generator's."""
        return hashlib.sha256((self.models.world_hash + file_hash(self.source_path)).encode()).hexdigest()

    @cached_property
    def base(self) -> Prior:
        return open_mini_world()

    def settings(self, run: Run) -> dict[str, Any]:
        """The adaptation's configuration without paths and length."""
        return {**RECIPES[run.recipe].settings(TASKS[run.task]), "seed": run.seed}

    def facts(self, run: Run, step: int = 0) -> dict[str, Any]:
        """Everything that decides the weights after some steps, as plain JSON; the world's files apart."""
        critic: Any = RECIPES[run.recipe].critic
        if critic == "domain":
            critic = ["domain", file_hash(assets.domain_unets_dir() / f"{DOMAIN_FILE}.safetensors")]
        elif critic == "fine_tune":
            critic = ["fine_tune", self.models.path(self.fine_tune).name]
        facts = {"settings": self.settings(run), "critic": critic, "step": step}
        return {**facts, "update": RELEASED_UPDATE} if RECIPES[run.recipe].released else facts

    def hash_of(self, run: Run) -> str:
        return key_of({**self.facts(run), "world": self.world_hash})[:10]

    def path(self, run: Run, step: int) -> Path:
        return self.folder / f"{run.name}-{step}-{self.hash_of(run)}.safetensors"

    def finished_steps(self, run: Run) -> list[int]:
        """The stops of a run that exist."""
        ending = f"-{self.hash_of(run)}.safetensors"
        names = [path.name[len(run.name) + 1 : -len(ending)] for path in self.folder.glob(f"{run.name}-*{ending}")]
        return sorted(int(name) for name in names if name.isdigit())

    def generator(self, run: Run, step: int) -> StyleGAN2:
        """The generator after some steps, adapted now where it does not exist."""
        return read_generator(self.adapted(run, step)).generator

    def adapted(self, run: Run, step: int) -> Path:
        """The generator's file. A run that was cut off goes on from its checkpoint. Raises Busy while another process
        works on the run: which stops exist, and where the run stands, must not change between looking and going on."""
        path = self.path(run, step)
        if path.is_file():
            return path
        with locked(self.folder, f".{run.name}-{self.hash_of(run)}.lock"):
            for stop in sorted({step, *(one for one in self.stops if one < step)}):
                if not self.path(run, stop).is_file():
                    self._adapt(run, stop)
        return path

    def _adapt(self, run: Run, step: int) -> None:
        place = self.folder / "runs" / f"{run.name}-{self.hash_of(run)}"
        if any(finished > step for finished in self.finished_steps(run)):
            place = place.with_name(f"{place.name}-to-{step}")  # the run has gone past this stop; go there once more
        config = AdaptConfig.from_mapping(
            {
                **self.settings(run),
                **self._places(run),
                "name": run.name,
                "output": str(place),
                "steps": step,
                "sample_every": 0,
                "checkpoint_every": 100,
                "keep_checkpoints": 1,
                "file_dtype": "fp32",
            }
        )
        print(f"adapting {run.name} to step {step}", file=sys.stderr, flush=True)
        critic, encode = self.critic(run)
        result = adapt(config, resume="auto", generator=self.source, critic=critic, encode=encode)
        if result.status != "finished":
            raise KeyboardInterrupt(f"{run.name} stopped at step {result.step}; start again to go on")
        with replacing(self.path(run, step)) as file, open(result.path, "rb") as made:
            file.write(made.read())

    def _places(self, run: Run) -> dict[str, str]:
        if RECIPES[run.recipe].critic != "domain":
            return {}
        return {"domain": str(assets.domain_unets_dir() / f"{DOMAIN_FILE}.safetensors")}

    def critic(self, run: Run) -> tuple[Critic, Encode]:
        """Who judges a run, and how pictures become what is judged."""
        config = AdaptConfig.from_mapping({**self.settings(run), **self._places(run)})
        if RECIPES[run.recipe].critic == "fine_tune":
            critic = self._fine_tuned(config)
        else:
            critic = open_critic(config, self.base, SIDE_PX, "cpu")
        return critic, latent_encoder(self.base, SIDE_PX)

    def _fine_tuned(self, config: AdaptConfig) -> Critic:
        """Classifier-free guidance of the prior fine-tuned on coloured handwriting under one caption."""
        model: Denoiser = self.models.denoiser(self.fine_tune)
        world = self.models.world
        uncond, cond = ({"context": world.encode_text([text])} for text in (config.negative, config.prompt))
        return Critic.cfg(model, uncond, cond, config.scale)

    def cost(self, run: Run) -> dict[str, float]:
        """Billions of floating point operations that a step takes, forward and backward, counted once."""
        facts = {key: value for key, value in self.facts(run).items() if key != "step"}
        facts["settings"] = {key: value for key, value in facts["settings"].items() if key not in ("seed", "prompt")}
        return self.costs.numbers("cost", {**facts, "world": self.world_hash}, lambda: {"gflops": self._count(run)})

    def _count(self, run: Run) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        config = AdaptConfig.from_mapping({**self.settings(run), **self._places(run)})
        critic, encode = self.critic(run)
        adapter = Adapter(config, self.source, make_objective(config, critic, encode, "cpu"), encode)
        with FlopCounterMode(display=False) as counter:
            adapter.take_step()
        return counter.get_total_flops() / 1e9
