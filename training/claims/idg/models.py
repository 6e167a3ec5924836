"""The trained models that are compared, each made once by the production trainer and kept.

Training lengths of one model are stops of a single run, so only the longest costs time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ....guidance.diffusion import Denoiser
from ....guidance.files import FileProblem, read_domain_file, read_state_dict
from ....guidance.networks.unet_config import UNetConfig
from ....guidance.null_text import load_unet
from ...domain.config import TrainConfig
from ...domain.train import train
from ...engine.events import Saved, Warned
from ...engine.lock import locked
from ...mini_world import assets, pictures
from ...mini_world.assets import MiniWorld
from ...mini_world.recipe.train_domain import FILE_NAMES
from ..keeping import file_hash, key_of, trained_weights

# The caption that fits every image of the domain and that the prior understands.
FIXED_CAPTION = "a digit"
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


@dataclass(frozen=True)
class ModelSpec:
    """A model to compare.

    kind: "shipped" (a domain model made by the mini world's recipe), "domain" (text-free, trained here), "full" or
    "low_rank" (fine-tunes that keep the text). caption: of the fine-tunes, "" or one for all images. Shipped models
    have no other steps and seeds than their own, written as 0.
    """

    kind: str
    domain: str
    steps: int = 0
    caption: str = ""
    seed: int = 0

    @property
    def run_name(self) -> str:
        """The training run that this model is a stop of."""
        caption = "cached" if self.kind == "domain" else "caption" if self.caption else "empty"
        return f"{self.domain}-{self.kind}-{caption}-seed{self.seed}"

    def __str__(self) -> str:
        return f"shipped {self.domain}" if self.kind == "shipped" else f"{self.run_name}, {self.steps} steps"


class Models:
    """Finds, trains and loads models; everything it makes lies in `folder`.

    images, batch: of their training. wanted: all models that will be asked for, whose stops are kept in passing.
    """

    def __init__(
        self, folder: Path, world: MiniWorld, images: int = 8000, batch: int = 64, wanted: Iterable[ModelSpec] = ()
    ) -> None:
        self.folder, self.world, self.images, self.batch, self.wanted = folder, world, images, batch, tuple(wanted)
        self._loaded: dict[ModelSpec, Denoiser] = {}

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
            return {"file": file_hash(self._shipped(spec))}
        prior = file_hash(assets.weights_dir() / "prior_unet.safetensors")
        return {"settings": self.settings(spec), "images": self.images, "prior": prior}

    def file(self, spec: ModelSpec) -> Path:
        """The model's file, trained now where it does not exist. Raises as `keeping.trained_weights`."""
        if spec.kind == "shipped":
            return self._shipped(spec)
        stops = [other.steps for other in self.wanted if other.run_name == spec.run_name]
        run = f"{spec.run_name}-{key_of(self.facts(spec))[:8]}"
        return trained_weights(self.folder, run, spec.steps, lambda place, step: self._train(spec, place, step), stops)

    def _shipped(self, spec: ModelSpec) -> Path:
        return assets.domain_unets_dir() / f"{FILE_NAMES[spec.domain]}.safetensors"

    def _train(self, spec: ModelSpec, place: Path, step: int) -> Any:
        places = {
            "data": [str(self.image_folder(spec.domain))],
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
        print(f"training {spec.run_name} to step {step}", file=sys.stderr, flush=True)
        return train(TrainConfig.from_mapping({**self.settings(spec), **places}), listener=_print_event)

    def image_folder(self, domain: str) -> Path:
        """The training images of a domain as PNG files, written where they are missing.

        Raises Busy while another process writes them.
        """
        folder = self.folder / f"{domain}-{self.images}-images"
        with locked(self.folder, f".{folder.name}.lock"):
            if len(list(folder.glob("*.png"))) != self.images:
                pictures.export_pictures(folder, domain, self.images)
        return folder

    def denoiser(self, spec: ModelSpec) -> Denoiser:
        """The model as a denoiser, trained first where it is missing; text-free ones take no text."""
        if spec not in self._loaded:
            path = self.file(spec)
            if len(self._loaded) >= 4:
                self._loaded.pop(next(iter(self._loaded)))
            if spec.kind in ("shipped", "domain"):
                weights, metadata = read_domain_file(path)
                config = metadata.config
            else:
                weights, config = read_state_dict(path), self.world.prior.unet.config
                assert isinstance(config, UNetConfig)
                if spec.kind == "low_rank":
                    weights = with_additions(self.world.prior.unet.state_dict(), weights)
            self._loaded[spec] = Denoiser(load_unet(weights, config), self.world.schedule)
        return self._loaded[spec]


def with_additions(weights: Mapping[str, Tensor], additions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W + (alpha / rank) B A (arXiv 2106.09685) for the layers of a LoRA file in kohya's layout with LDM names.

    Raises FileProblem for additions to layers that the weights lack.
    """
    merged, left = {key: value.float() for key, value in weights.items()}, set(additions)
    for key in weights:
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        if f"{name}.lora_down.weight" in additions:
            down, up = additions[f"{name}.lora_down.weight"].float(), additions[f"{name}.lora_up.weight"].float()
            merged[key] = merged[key] + (float(additions[f"{name}.alpha"]) / len(down)) * (up @ down)
            left -= {f"{name}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    if left:
        raise FileProblem(f"expected additions to the prior's own layers, found {min(left)}; train the adapter again")
    return merged


def _print_event(event: object) -> None:
    """The trainer's events that matter here, as lines on standard error."""
    if isinstance(event, (Saved, Warned)):
        print(f"  {event.to_dict()}", file=sys.stderr, flush=True)
