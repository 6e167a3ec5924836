"""The trained models that are compared, each made once by the production trainer and kept.

Training lengths of one model are stops of a single run: with a constant learning rate a longer run goes through exactly
the weights of the shorter one, so only the longest costs time.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ....guidance.diffusion import Denoiser
from ....guidance.errors import Problem
from ....guidance.files import FileProblem, read_domain_file, read_state_dict
from ....guidance.files.atomic import replacing
from ....guidance.networks.unet import UNet
from ...engine.lock import locked
from ...mini_world import assets, pictures
from ...mini_world.assets import MiniWorld
from ...mini_world.recipe.train_domain import FILE_NAMES

KINDS = ("shipped", "domain", "full", "low_rank")
# The caption that fits every image of the domain and that the prior understands.
FIXED_CAPTION = "a digit"
RATES = {"domain": 3e-4, "full": 3e-4, "low_rank": 1e-3}
BATCH = 64
WARMUP_STEPS = 50
EMA = 0.99
IMAGES = 8000


@dataclass(frozen=True, order=True)
class ModelSpec:
    """A model to compare. kind: "shipped" (the recipe's domain model), "domain" (text-free, trained here), "full" or
    "low_rank" (fine-tunes that keep the text). caption: of the fine-tunes, "" or one for all images. form: of kind
    "domain". Shipped models have no other steps and seeds than their own, written as 0."""

    kind: str
    domain: str
    steps: int = 0
    caption: str = ""
    seed: int = 0
    form: str = "cached"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Problem(f"expected a model of kind {', '.join(KINDS)}, found {self.kind!r}")
        if self.kind != "shipped" and self.steps < 1:
            raise Problem(f"expected at least 1 training step for a model of kind {self.kind}, found {self.steps}")

    @property
    def run_name(self) -> str:
        """The training run that this model is a stop of."""
        caption = "-caption" if self.caption else "-empty" if self.kind in ("full", "low_rank") else f"-{self.form}"
        return f"{self.domain}-{self.kind}{caption}-seed{self.seed}"

    def __str__(self) -> str:
        if self.kind == "shipped":
            return f"shipped {self.domain}"
        return f"{self.run_name}, {self.steps} steps"


class Models:
    """Finds, trains and loads models; everything it makes lies in `folder`.

    wanted: all models that will be asked for. Shorter stops of a run are then kept when a longer one passes them;
    without, a stop asked for after a longer one is trained from the start again.
    """

    def __init__(
        self, folder: Path, world: MiniWorld, images: int = IMAGES, batch: int = BATCH, wanted: Iterable[ModelSpec] = ()
    ) -> None:
        self.folder, self.world, self.images, self.batch = folder, world, images, batch
        self.wanted = sorted({spec for spec in wanted if spec.kind != "shipped"}, key=lambda spec: spec.steps)
        self._loaded: dict[ModelSpec, Denoiser] = {}

    @property
    def world_hash(self) -> str:
        """One hash over the shipped files that every number depends on: prior, autoencoder, text encoder, judges."""
        names = ("prior_unet", "text_encoder", "autoencoder", "classifier", "classifier_held_out")
        return hashlib.sha256(
            "".join(file_hash(assets.weights_dir() / f"{name}.safetensors") for name in names).encode()
        ).hexdigest()

    def path(self, spec: ModelSpec) -> Path:
        if spec.kind == "shipped":
            return assets.domain_unets_dir() / f"{FILE_NAMES[spec.domain]}.safetensors"
        return self.folder / f"{spec.run_name}-{spec.steps}-{self._setting_hash(spec)}.safetensors"

    def exists(self, spec: ModelSpec) -> bool:
        return self.path(spec).is_file()

    def file_hash(self, spec: ModelSpec) -> str:
        """SHA-256 of the model's file, which must exist."""
        return file_hash(self.path(spec))

    def settings(self, spec: ModelSpec) -> dict[str, object]:
        """The trainer's configuration without paths; the same for every length of a run."""
        form = spec.form if spec.kind == "domain" else "full"
        return {
            "base": "mini_world",
            "name": spec.run_name,
            "form": form,
            "caption": spec.caption,
            "train": "low_rank" if spec.kind == "low_rank" else "all",
            "resolution": 64,
            "buckets": False,
            "batch_size": self.batch,
            "learning_rate": RATES[spec.kind],
            "schedule": "constant",
            "warmup": WARMUP_STEPS,
            "ema": EMA,
            "noisy_share": 0.5,
            "precision": "fp32",
            "held_out_share": 0.0,
            "seed": spec.seed,
        }

    def _setting_hash(self, spec: ModelSpec) -> str:
        prior = file_hash(assets.weights_dir() / "prior_unet.safetensors")
        facts = f"{sorted(self.settings(spec).items())} {self.images} {prior}"
        return hashlib.sha256(facts.encode()).hexdigest()[:8]

    def train(self, spec: ModelSpec, should_stop: Callable[[], bool] = lambda: False) -> Path:
        """The model's file, trained now where it does not exist; a run that was cut off goes on from its checkpoint.

        Raises KeyboardInterrupt when `should_stop` ended the training, nothing is lost; Busy while another process
        trains this run.
        """
        path = self.path(spec)
        if path.is_file():
            return path
        for shorter in self.wanted:
            if shorter.steps < spec.steps and replace(shorter, steps=spec.steps) == spec:
                self.train(shorter, should_stop)
        # Which stops exist, and where the run stands, must not change between looking and going on.
        with locked(self.folder, f".{spec.run_name}-{self._setting_hash(spec)}.lock"):
            return path if path.is_file() else self._train(spec, path, should_stop)

    def _train(self, spec: ModelSpec, path: Path, should_stop: Callable[[], bool]) -> Path:
        from ...domain.config import TrainConfig
        from ...domain.train import train

        run = self.folder / "runs" / f"{spec.run_name}-{self._setting_hash(spec)}"
        if any(steps > spec.steps for steps in self._finished_steps(spec)):
            run = run.with_name(f"{run.name}-to-{spec.steps}")  # the run has gone past this stop; go there once more
        config = TrainConfig.from_mapping(
            {
                **self.settings(spec),
                "data": [str(self.image_folder(spec.domain))],
                "steps": spec.steps,
                "output": str(run),
                "cache": str(self.folder / "latents"),
                "caching_batch": 100,
                "sample_every": 0,
                "validate_every": 0,
                "checkpoint_every": 100,
                "keep_checkpoints": 1,
                "device": "cpu",
            }
        )
        print(f"training {spec}", file=sys.stderr, flush=True)
        result = train(config, resume="auto", listener=_say, should_stop=should_stop)
        if result.status != "finished":
            raise KeyboardInterrupt(f"training of {spec} stopped at step {result.step}; start again to go on")
        with replacing(path) as file, open(result.path, "rb") as source:
            shutil.copyfileobj(source, file)
        return path

    def _finished_steps(self, spec: ModelSpec) -> list[int]:
        """The lengths of this model's run that exist."""
        ending = f"-{self._setting_hash(spec)}.safetensors"
        names = [
            path.name[len(spec.run_name) + 1 : -len(ending)] for path in self.folder.glob(f"{spec.run_name}-*{ending}")
        ]
        return [int(name) for name in names if name.isdigit()]

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
            path = self.train(spec)
            if len(self._loaded) >= 4:
                self._loaded.pop(next(iter(self._loaded)))
            if spec.kind in ("shipped", "domain"):
                weights, metadata = read_domain_file(path)
                config = metadata.config
            else:
                weights, config = read_state_dict(path), self.world.prior.unet.config
                if spec.kind == "low_rank":
                    weights = with_additions(self.world.prior.unet.state_dict(), weights)
            unet = UNet(config)
            unet.load_state_dict({key: value.float() for key, value in weights.items()})
            self._loaded[spec] = Denoiser(unet.eval().requires_grad_(False), self.world.schedule)
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


def _say(event: object) -> None:
    """The trainer's events that matter here, as lines on standard error."""
    from ...engine.events import Saved, Warned

    if isinstance(event, (Saved, Warned)):
        print(f"  {event.to_dict()}", file=sys.stderr, flush=True)


@lru_cache(maxsize=256)
def _hash_of(path: Path, *stamp: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, read again only when the file has changed."""
    facts = path.stat()
    # As in git's index: a file of equal size and time that took its place is another one, or has changed since.
    return _hash_of(path, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
