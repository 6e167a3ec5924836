"""Models that are compared: found, trained once by the production trainer, kept, and loaded as denoisers.

Training lengths of one model are stops of a single run, so only the longest costs time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...guidance.diffusion import Denoiser
from ...guidance.files import add_lora, read_domain_file, read_lora, read_state_dict
from ...guidance.networks.unet_config import UNetConfig
from ...guidance.null_text import load_unet
from ..domain.config import TrainConfig
from ..domain.train import train
from ..mini_world import assets, pictures
from ..mini_world.assets import MiniWorld
from ..mini_world.recipe.train_domain import FILE_NAMES
from .captions import train_with_captions
from .keeping import file_hash, key_of, trained_weights
from .points import AUTOMATIC, ModelSpec

RATES = {"domain": 3e-4, "full": 3e-4, "low_rank": 5e-3}
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
            "caption": "" if spec.caption == AUTOMATIC else spec.caption,
            "train": "low_rank" if spec.kind == "low_rank" else "all",
            "batch_size": self.batch,
            "learning_rate": RATES[spec.kind],
            "seed": spec.seed,
        }
        if spec.kind == "low_rank":
            own |= {"layers": "all", "rank": 16}  # a held-out loss of 1.01 of the full one's
        return {**SETTINGS, **own}

    def facts(self, spec: ModelSpec) -> dict[str, Any]:
        """Everything that decides a model's weights but for its length, as plain JSON."""
        if spec.kind == "shipped":
            return {"file": file_hash(self.file(spec))}
        prior = file_hash(assets.weights_dir() / "prior_unet.safetensors")
        facts = {"settings": self.settings(spec), "images": self.images, "prior": prior}
        if spec.caption == AUTOMATIC:
            facts["captions"] = file_hash(assets.weights_dir() / "classifier.safetensors")
        return facts

    def file(self, spec: ModelSpec) -> Path:
        """The model's file, trained now where it does not exist. Raises as `keeping.trained_weights`."""
        if spec.kind == "shipped":
            return assets.domain_unets_dir() / f"{FILE_NAMES[spec.domain]}.safetensors"
        stops = [other.steps for other in self.wanted if other.run_name == spec.run_name]
        run = f"{spec.run_name}-{key_of(self.facts(spec))[:8]}"
        return trained_weights(self.folder, run, spec.steps, lambda place, step: self.train(spec, place, step), stops)

    def train(self, spec: ModelSpec, place: Path, step: int) -> Any:
        print(f"training {spec.run_name} to step {step}", file=sys.stderr, flush=True)
        config = TrainConfig.from_mapping({**self.settings(spec), **self.places(spec, place, step)})
        if spec.caption == AUTOMATIC:
            return train_with_captions(config, assets.load_classifier())
        return train(config)

    def places(self, spec: ModelSpec, place: Path, step: int) -> dict[str, Any]:
        """What of a run's configuration does not decide its weights."""
        return {
            "data": [str(self.pictures(spec.domain))],
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

    def pictures(self, domain: str) -> Path:
        """The folder of a domain's images, made now where it does not exist."""
        images = self.folder / f"{domain}-{self.images}-images"
        if len(list(images.glob("*.png"))) != self.images:
            pictures.export_pictures(images, domain, self.images)
        return images

    def denoiser(self, spec: ModelSpec, strength: float = 1.0) -> Denoiser:
        """The model as a denoiser, trained first where it is missing; text-free ones take no text.

        strength: of what training changed, W + strength (W' - W); not of text-free models.
        """
        path = self.file(spec)
        if spec.is_text_free:
            weights, metadata = read_domain_file(path)
            config = metadata.config
        else:
            weights, config = self.prior_with(spec, strength), self.prior_config
        return Denoiser(load_unet(weights, config), self.world.schedule)

    @property
    def prior_config(self) -> UNetConfig:
        config = self.world.prior.unet.config
        assert isinstance(config, UNetConfig)
        return config

    def prior_with(
        self, spec: ModelSpec, strength: float = 1.0, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The prior's weights, or other ones of its family, with what training a model that keeps the text changed."""
        path, prior = self.file(spec), self.world.prior.unet.state_dict()
        weights = prior if weights is None else weights
        if spec.is_lora:
            return add_lora(weights, read_lora(path)[0], self.prior_config, strength, path)
        trained = read_state_dict(path)
        return {key: weight + strength * (trained[key].float() - prior[key]) for key, weight in weights.items()}


def cast(denoiser: Denoiser, precision: str) -> Denoiser:
    """The same denoiser with a network in "fp32" or "bf16"."""
    if precision == "fp32":
        return denoiser
    unet = copy.deepcopy(denoiser.unet).to(torch.bfloat16)
    return Denoiser(unet, denoiser.schedule, denoiser.prediction_type, denoiser.quantize)
