"""The configuration of a training run: one flat, validated, frozen dataclass.

Command line, node tooltips and documentation are generated from the metadata of its fields: `help`, `group`, `choices`,
`min`, `max` (both inclusive), `path` (a local path, left out of published files) and `free` (may differ when a run is
resumed, because it does not change the numbers that are trained).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..guidance.files import FileProblem
from .atomic import write_text

GROUPS = ("what", "model", "data", "optimisation", "reporting")
FORMS = ("cached", "constant", "full")
TRAINS = ("all", "self_attention", "low_rank")
# A base that begins so is no file: the models of a graph, which only the program that holds them can give again.
CONNECTED_BASE = "connected:"
MIN_RESOLUTION, RESOLUTION_STEP = 64, 8
# Characters that some file system refuses in a name; the name becomes NAME.safetensors.
FORBIDDEN_IN_NAMES = set('<>:"/\\|?*') | {chr(code) for code in range(32)}
# Names of devices, with any ending, on Windows.
RESERVED_NAMES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789\u00b9\u00b2\u00b3"
}
# File systems take 255; the finished file's ending and temporary names of it need some.
LONGEST_NAME = 200


class ConfigProblem(ValueError):
    """A configuration that cannot be trained, in one sentence that names the field."""


def _option(default: Any, group: str, help: str, **more: Any) -> Any:
    metadata = {"help": help, "group": group, "free": False, "path": False, **more}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Raises ConfigProblem (a ValueError) for a field out of its range and for combinations that make no sense.
    """

    # what
    base: str = _option(dataclasses.MISSING, "what", "prior to start from: a checkpoint (.safetensors in LDM layout: "
                        "SD 1.x, 2.x, SDXL) or mini_world", path=True, free=True)
    data: tuple[str, ...] = _option((), "what", "folders of images (searched recursively) or .tar shards of them; "
                                    "shard-{0000..0003}.tar names several", path=True, free=True)
    name: str = _option("domain", "what", "name of the domain model; the finished file is NAME.safetensors", free=True)
    output: str = _option("", "what", "folder of the run (log, samples, checkpoints, finished file); empty: runs/NAME",
                          path=True, free=True)
    export_to: str = _option("", "what", "folder the finished file is also put in, for instance ComfyUI's "
                             "models/domain_unets; empty: only the run's folder", path=True, free=True)
    vae: str = _option("", "what", "file with another VAE than the checkpoint's own; empty: the checkpoint's",
                       path=True, free=True)
    tokenizer: str = _option("", "what", "folder with CLIP's vocab.json and merges.txt; only needed to draw samples "
                             "with prompts from published models", path=True, free=True)

    # model
    form: str = _option("cached", "model", "cached: text-free, starts equal to the prior on the empty prompt; "
                        "constant: text-free, the paper's, smaller and faster; full: keeps text (fine-tuning baseline)",
                        choices=FORMS)
    caption: str = _option("", "model", "form full only: the one caption all images are trained with; empty: the empty "
                           "prompt")
    train: str = _option("all", "model", "what learns: all weights, the self-attentions only, or low-rank additions to "
                         "the attention projections", choices=TRAINS)
    rank: int = _option(16, "model", "train low_rank only: rank of the additions, usually 4 to 64", min=1, max=1024)
    low_rank_alpha: float = _option(0.0, "model", "train low_rank only: additions are scaled by this over the rank; 0: "
                                    "the rank, a scale of 1", min=0.0, max=4096.0)
    gradient_checkpointing: bool = _option(False, "model", "compute activations twice instead of storing them: about a "
                                           "third slower, far less memory", free=True)
    prediction: str = _option("auto", "model", "what the prior predicts; auto: as the checkpoint says or, "
                              "where it says nothing, as measured",
                              choices=("auto", "epsilon", "v_prediction", "v_prediction_zero_snr"))

    # data
    resolution: int = _option(512, "data", "side of a square training image in pixels, a multiple of 8; other shapes "
                              "have the same area", min=MIN_RESOLUTION, max=8192)
    buckets: bool = _option(True, "data", "keep aspect ratios by sorting images into shapes of about the same area; "
                            "off: every image becomes a square")
    bucket_step: int = _option(64, "data", "sides of the shapes are multiples of this many pixels", min=8, max=1024)
    bucket_max_ratio: float = _option(2.0, "data", "the longest shape's long side over its short one", min=1.0, max=8.0)
    min_side: int = _option(0, "data", "leave out images whose short side has fewer pixels; 0: none, small images are "
                            "enlarged and counted", min=0, max=8192)
    flip: bool = _option(False, "data", "also learn every image mirrored; wrong for text and for faces' asymmetries")
    random_crops: int = _option(0, "data", "cached random crops per image, drawn among while training; 0: the centre",
                                min=0, max=64)
    posterior: str = _option("sample", "data", "sample: draw latents from the VAE's posterior; mean: its mean",
                             choices=("sample", "mean"))
    cache: str = _option("", "data", "folder of cached latents, shared between runs; empty: in the user's cache folder",
                         path=True, free=True)
    caching_batch: int = _option(8, "data", "images the VAE encodes at once while filling the cache, on a GPU; on the "
                                 "CPU always one, so that a latent depends on its image alone", min=1, max=256,
                                 free=True)

    # optimisation
    steps: int = _option(2000, "optimisation", "optimizer steps in all", min=1, max=10_000_000, free=True)
    batch_size: int = _option(4, "optimisation", "images in one forward pass, over all processes together", min=1,
                              max=65536)
    accumulation: int = _option(1, "optimisation", "forward passes per optimizer step; a step sees batch_size times "
                                "accumulation images", min=1, max=4096)
    learning_rate: float = _option(1e-5, "optimisation", "peak learning rate; about 1e-5 for all weights, 1e-4 for "
                                   "low_rank", min=0.0, max=1.0)
    optimizer: str = _option("adamw", "optimisation", "adamw, or adamw8bit (needs bitsandbytes): less memory",
                             choices=("adamw", "adamw8bit"))
    beta1: float = _option(0.9, "optimisation", "Adam's decay of the mean gradient", min=0.0, max=0.9999999)
    beta2: float = _option(0.999, "optimisation", "Adam's decay of the squared gradient", min=0.0, max=0.9999999)
    eps: float = _option(1e-8, "optimisation", "added to Adam's denominator", min=1e-16, max=1.0)
    weight_decay: float = _option(0.01, "optimisation", "decoupled weight decay; 0: none", min=0.0, max=10.0)
    schedule: str = _option("constant", "optimisation", "learning rate after the warm-up: constant, or falling to 0 at "
                            "the last step", choices=("constant", "cosine", "linear"))
    warmup: int = _option(100, "optimisation", "steps over which the learning rate rises from 0; 0: none", min=0,
                          max=1_000_000)
    clip: float = _option(1.0, "optimisation", "largest norm of the gradient; 0: no clipping", min=0.0, max=1e9)
    ema: float = _option(0.999, "optimisation", "decay of the average of the weights that is sampled and exported, "
                         "warmed up as (1+n)/(10+n); 0: no average", min=0.0, max=0.9999999)
    min_snr_gamma: float = _option(5.0, "optimisation", "min-SNR loss weights (arXiv 2303.09556), usually 5; 0: the "
                                   "plain loss", min=0.0, max=1e6)
    noisy_share: float = _option(0.0, "optimisation", "share of the samples whose timestep comes from the noisier half "
                                 "only, where the composition is decided; 0: all uniform", min=0.0, max=1.0)
    noise_offset: float = _option(0.0, "optimisation", "standard deviation of a constant per channel added to the "
                                  "noise, usually 0.05 to 0.1 for very dark or bright domains; 0: none", min=0.0,
                                  max=1.0)
    precision: str = _option("auto", "optimisation", "of the forward and backward pass (the weights stay fp32); auto: "
                             "bf16 on GPUs that have it, else fp32", choices=("auto", "fp32", "bf16", "fp16"))
    seed: int = _option(0, "optimisation", "of everything random", min=0, max=2**63 - 1)
    device: str = _option("auto", "optimisation", "auto, cpu, cuda, cuda:1, mps, xpu", free=True)

    # reporting
    checkpoint_every: int = _option(250, "reporting", "steps between checkpoints to resume from; 0: none by steps",
                                    min=0, max=10_000_000, free=True)
    keep_checkpoints: int = _option(3, "reporting", "how many of the latest checkpoints stay", min=1, max=10_000,
                                    free=True)
    sample_every: int = _option(250, "reporting", "steps between sample grids, drawn with multi-guidance against the "
                                "prior, the first at step 0; 0: none", min=0, max=10_000_000, free=True)
    sample_prompts: tuple[str, ...] = _option((), "reporting", "prompts of the sample grid, a row each; none: the "
                                              "domain model alone", free=True)
    sample_count: int = _option(4, "reporting", "images per row of the grid, each with its own fixed seed", min=1,
                                max=64, free=True)
    sample_steps: int = _option(20, "reporting", "sampling steps of the grid", min=1, max=1000, free=True)
    domain_weight: float = _option(2.5, "reporting", "weight of the domain model in the grid", min=-100.0, max=100.0,
                                   free=True)
    control_weight: float = _option(2.5, "reporting", "weight of the prompt in the grid", min=-100.0, max=100.0,
                                    free=True)
    validate_every: int = _option(250, "reporting", "steps between losses on held-out images; 0: none", min=0,
                                  max=10_000_000, free=True)
    held_out_share: float = _option(0.05, "reporting", "share of the images kept out of training (at most 256) for "
                                    "that loss; 0: none", min=0.0, max=0.5)
    log_every: int = _option(10, "reporting", "steps between lines of the log", min=1, max=1_000_000, free=True)
    tensorboard: bool = _option(False, "reporting", "also write events for TensorBoard (needs tensorboard)", free=True)
    file_dtype: str = _option("fp16", "reporting", "numbers of the finished file", choices=("fp16", "bf16", "fp32"),
                              free=True)
    licence: str = _option("", "reporting", "licence written into the finished file", free=True)
    # New fields come last: they are inputs of a published node in this order.
    checkpoint_minutes: float = _option(10.0, "reporting", "also save a checkpoint when the last one is this many "
                                        "minutes old, which is the most that a crash can cost; 0: by steps only",
                                        min=0.0, max=100_000.0, free=True)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))
        if not self.base:
            raise ConfigProblem("base: expected a checkpoint file or mini_world, found nothing; name the prior.")
        if not self.name.strip() or set(self.name) & FORBIDDEN_IN_NAMES or self.name.strip(". ") != self.name:
            raise ConfigProblem(
                f"name: expected a plain file name without folders or ending, found {self.name!r}; use letters, "
                "digits, - and _."
            )
        if self.name.partition(".")[0].strip().lower() in RESERVED_NAMES:
            raise ConfigProblem(
                f"name: expected a plain file name, found {self.name!r}, which is a device on Windows; choose another."
            )
        size = len(self.name.encode("utf-8", "surrogatepass"))
        if size > LONGEST_NAME:
            raise ConfigProblem(
                f"name: expected a plain file name of at most {LONGEST_NAME} bytes, found {size}; choose a shorter one."
            )
        if self.resolution % RESOLUTION_STEP:
            raise ConfigProblem(
                f"resolution: expected a multiple of {RESOLUTION_STEP} pixels, found {self.resolution}; the nearest is "
                f"{max(round(self.resolution / RESOLUTION_STEP) * RESOLUTION_STEP, MIN_RESOLUTION)}."
            )
        if self.bucket_step % RESOLUTION_STEP:
            raise ConfigProblem(
                f"bucket_step: expected a multiple of {RESOLUTION_STEP} pixels, found {self.bucket_step}; usual is 64."
            )
        if self.caption and self.form != "full":
            raise ConfigProblem(
                f"caption: expected none with form {self.form}, which takes no text, found {self.caption!r}; remove it "
                "or choose form full."
            )
        if not _plausible_device(self.device):
            raise ConfigProblem(f"device: expected auto, cpu, cuda, cuda:N, mps or xpu, found {self.device!r}.")

    @property
    def global_batch(self) -> int:
        """Images per optimizer step, over all processes and passes."""
        return self.batch_size * self.accumulation

    @property
    def held_out(self) -> float:
        """The share of the images that is really held out: none when nobody looks at their loss."""
        return self.held_out_share if self.validate_every else 0.0

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.output) if self.output else Path("runs") / self.name

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "configuration") -> TrainConfig:
        """From a mapping of field names to values; lists become tuples, a single string a tuple of one.

        `source` says in errors where the values come from. Raises ConfigProblem for unknown fields (with the nearest
        name), missing ones and values out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigProblem(f"{source}: expected fields with values, found {type(values).__name__}.")
        known = [one.name for one in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name).replace("-", "_").lower(), known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else "indomain train --help lists the fields."
                raise ConfigProblem(f"{source}: {name!r} is no field of the configuration; {hint}")
        if "base" not in values:
            raise ConfigProblem(f"{source}: expected a field base, the prior (a file or mini_world), found none.")
        try:
            return cls(**values)
        except ConfigProblem as problem:
            if source == "configuration":
                raise
            raise ConfigProblem(f"{source}: {problem}") from None

    @classmethod
    def read(cls, path: str | os.PathLike, **overrides: Any) -> TrainConfig:
        """From a .toml or .json file; `overrides` replace its fields. Raises FileProblem for an unreadable file."""
        return cls.from_mapping({**read_values(path), **overrides}, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, tuples as lists; `from_mapping` inverts it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def public_dict(self) -> dict[str, Any]:
        """`to_dict` for published files: of local paths only the last part stays."""
        values = self.to_dict()
        for one in dataclasses.fields(self):
            if one.metadata["path"]:
                value = values[one.name]
                values[one.name] = [_last(part) for part in value] if isinstance(value, list) else _last(value)
        return values

    def write_json(self, path: str | os.PathLike) -> None:
        """Write the fields as JSON, complete or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def with_changes(self, **changes: Any) -> TrainConfig:
        """A copy with some fields replaced, validated again; unknown fields are refused as in `from_mapping`."""
        return self.from_mapping({**vars(self), **changes})

    def binding(self) -> dict[str, Any]:
        """The fields that decide the trained numbers, which a resumed run must share."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if not one.metadata["free"]}
        return {**fields, "held_out_share": self.held_out}

    def binding_hash(self) -> str:
        """SHA-256 of `binding`."""
        return hashlib.sha256(json.dumps(self.binding(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """The binding fields in which two configurations differ: name -> (own value, the other's)."""
        theirs = other.binding()
        return {name: (value, theirs[name]) for name, value in self.binding().items() if theirs[name] != value}


def field_kinds() -> dict[str, type]:
    """Field name -> bool, int, float, str or tuple (of strings), for whoever builds an interface from the fields."""
    return {one.name: _kind(one) for one in dataclasses.fields(TrainConfig)}


def read_values(path: str | os.PathLike) -> dict[str, Any]:
    """The values in a .toml or .json file, unchecked.

    Raises FileProblem for a missing or malformed file, and for TOML on Python 3.10 without the package tomli.
    """
    path = Path(path)
    if path.suffix.lower() not in (".toml", ".json"):
        raise FileProblem(f"{path}: expected a configuration in .toml or .json, found another ending.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise FileProblem(
            f"{path}: cannot be read as a configuration ({reason}); check name, folder and permissions."
        ) from error
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else _toml(path).loads(text)
    except ValueError as error:
        raise FileProblem(f"{path}: expected {path.suffix[1:].upper()}, found a mistake: {error}.") from error
    if not isinstance(values, dict):
        raise FileProblem(f"{path}: expected fields with values, found {type(values).__name__}.")
    return values


def _toml(path: Path) -> Any:
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise FileProblem(
                f"{path}: Python 3.10 reads TOML only with the package tomli; install it, use Python 3.11, or write "
                "the configuration as .json."
            ) from error
    return tomllib


def _kind(one: dataclasses.Field) -> type:
    return {"str": str, "int": int, "float": float, "bool": bool}.get(one.type, tuple)


def _checked(one: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type, or ConfigProblem."""
    kind, limits = _kind(one), one.metadata
    if kind is tuple:
        value = (value,) if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(part, (str, os.PathLike)) for part in value):
            raise ConfigProblem(f"{one.name}: expected a list of strings, found {value!r}.")
        return tuple(os.fspath(part) for part in value)
    if kind is str:
        if not isinstance(value, (str, os.PathLike)):
            raise ConfigProblem(f"{one.name}: expected text, found {value!r}.")
        value = os.fspath(value)
        if "choices" in limits and value not in limits["choices"]:
            near = difflib.get_close_matches(value, limits["choices"], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigProblem(f"{one.name}: expected one of {', '.join(limits['choices'])}, found {value!r}{hint}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigProblem(f"{one.name}: expected true or false, found {value!r}.")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigProblem(f"{one.name}: expected a number, found {value!r}.")
    if kind is int and value != int(value):
        raise ConfigProblem(f"{one.name}: expected a whole number, found {value!r}.")
    value = kind(value)
    if not limits["min"] <= value <= limits["max"]:
        raise ConfigProblem(f"{one.name}: expected a number from {limits['min']} to {limits['max']}, found {value}.")
    return value


def _plausible_device(name: str) -> bool:
    kind, _, index = name.partition(":")
    return kind in ("auto", "cpu", "cuda", "mps", "xpu") and (":" not in name or (index.isdigit() and kind != "auto"))


def _last(path: str) -> str:
    """The last part of a path of any platform."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]
