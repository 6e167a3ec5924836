"""The configuration of an adaptation: everything that decides how a generator moves into a prompt's domain."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar

from ...guidance.distillation.critic import PROMPTS
from ...guidance.distillation.method import prompts_of
from ...guidance.distillation.methods import METHODS, methods_with
from ...guidance.distillation.objective import MODES
from ...guidance.distillation.timesteps import T_SCHEDULES
from ...guidance.distillation.weighting import WEIGHTINGS
from ...guidance.options import options_of
from ..domain.config import TrainConfig
from ..engine.settings import CONNECTED_PREFIX, ConfigProblem, Settings, option

GROUPS = ("what", "distillation", "generator", "optimisation", "reporting")
TRAINS = ("convolutions", "released", "synthesis", "all")
FEATURES = ("vgg", "alex", "squeeze", "latents")
RESOLUTION_STEP = 8
PROMPT_FIELDS = ("prompt", "negative", "source_prompt")
# The settings that hold what methods need beside the prompt.
FIELD_OF_PROMPT = {"source": "source_prompt", "unwanted": "negative"}
# A conditioning that was connected in ComfyUI stands in a prompt as its signature: what it consists of, exactly, and 16
# bits of each of 8 numbers that say where it lies.
SIGNATURE = re.compile(r"\[([0-9a-f]{6})-([0-9a-f]{32})\]")
# In half precision, or by another version of torch, a text is encoded a thousandth of its norm away; a word changes it
# by a tenth and more.
SAME_PROMPT = 0.01


def _with_options_of_methods(config: type) -> type:
    """Give a class of settings a field METHOD_OPTION for each option of each distillation method."""
    for method in METHODS.values():
        for one in options_of(method):
            about = {**one.metadata, "help": f"method {method.name} only: {one.metadata['help']}"}
            config.__annotations__[f"{method.name}_{one.name}"] = one.type
            setattr(config, f"{method.name}_{one.name}", option(one.default, "distillation", **about))
    return config


@dataclass(frozen=True)
@_with_options_of_methods
class AdaptConfig(Settings):
    """Everything that decides an adaptation. Raises ConfigProblem for values that make no sense, alone or together."""

    command: ClassVar[str] = "indomain adapt"
    required: ClassVar[dict[str, tuple[str, str]]] = {
        "generator": ("a generator file or mini_world", "the generator to adapt"),
        "base": ("a checkpoint file or mini_world", "the diffusion model that judges"),
    }

    # what
    generator: str = option(
        MISSING,
        "what",
        "StyleGAN2 generator to adapt: .safetensors, NVIDIA's .pkl, rosinality's .pt, or mini_world",
        path=True,
        free=True,
        names=("mini_world",),
    )
    base: str = option(
        MISSING,
        "what",
        "diffusion model that judges the images: a checkpoint (.safetensors in LDM "
        "layout: SD 1.x, 2.x, SDXL) or mini_world",
        path=True,
        free=True,
        names=("mini_world", CONNECTED_PREFIX),
    )
    prompt: str = option("", "what", "describes the domain to reach, for instance 'a 3d render of a face, Pixar'")
    negative: str = option(
        "",
        "what",
        "prompt of the prediction that guidance leads away from; with the method "
        f"{methods_with('unwanted')}, what images should not be",
    )
    source_prompt: str = option(
        "", "what", f"methods {methods_with('source')} only: describes what the generator makes now"
    )
    domain: str = option(
        "",
        "what",
        "domain model file that judges too; empty: the prompt alone",
        path=True,
        free=True,
        names=(CONNECTED_PREFIX,),
    )
    name: str = option(
        "adapted", "what", "name of the adapted generator; the finished file is NAME.safetensors", free=True
    )
    output: str = option(
        "",
        "what",
        "folder of the run (log, samples, checkpoints, finished file); empty: runs/NAME",
        path=True,
        free=True,
    )
    export_to: str = option(
        "",
        "what",
        "folder the finished file is also put in, for instance ComfyUI's "
        "models/generators; empty: only the run's folder",
        path=True,
        free=True,
    )
    vae: str = option(
        "", "what", "file with another VAE than the checkpoint's own; empty: the checkpoint's", path=True, free=True
    )
    tokenizer: str = option(
        "",
        "what",
        "folder with CLIP's vocab.json and merges.txt, which prompts of published models need",
        path=True,
        free=True,
    )

    # distillation
    method: str = option(
        "sds",
        "distillation",
        "how predictions become gradients: sds is the paper's, at a scale of about 100; "
        f"{', '.join(name for name in METHODS if name != 'sds')} take scales of 5 to 30",
        choices=tuple(METHODS),
    )
    scale: float = option(
        100.0,
        "distillation",
        "weight of the prompt against the empty one (guidance scale); 100 "
        "is the paper's for sds, the other methods take 5 to 30",
        min=0.0,
        max=1000.0,
    )
    domain_weight: float = option(
        2.5, "distillation", "weight of the domain model, where there is one", min=-1000.0, max=1000.0
    )
    mode: str = option(
        "shared",
        "distillation",
        "shared: one noise, one encoding and one call of the model for all "
        "terms; sgf: a noise for each term, as StyleGAN-Fusion was released",
        choices=MODES,
    )
    t_min: int = option(10, "distillation", "smallest timestep that is asked about, of 1000", min=0, max=999)
    t_max: int = option(
        500,
        "distillation",
        "largest timestep; the paper's is 500 for faces, 300 for animals; larger changes shapes more",
        min=0,
        max=999,
    )
    t_schedule: str = option(
        "uniform",
        "distillation",
        "timesteps over the run: uniform; annealed, from a range "
        "whose upper end falls; falling, straight from t_max to t_min",
        choices=T_SCHEDULES,
    )
    weighting: str = option(
        "1-abar", "distillation", "weight of a timestep's gradient; 1-abar is the paper's", choices=tuple(WEIGHTINGS)
    )
    directional: float = option(
        0.0,
        "distillation",
        "weight of the directional regularizer, which keeps the change alike for all images; usually 0.5 to 1, 0: off",
        min=0.0,
        max=1000.0,
    )
    reconstruction: float = option(
        0.0,
        "distillation",
        "weight of the reconstruction regularizer, which leads back to the source image; usually 0.5 to 1, 0: off",
        min=0.0,
        max=1000.0,
    )
    perceptual: float = option(
        0.0,
        "distillation",
        "weight of the perceptual regularizer, which keeps features of the source image; usually 0.3 to 1, 0: off",
        min=0.0,
        max=1000.0,
    )
    features: str = option(
        "vgg",
        "distillation",
        "features of the perceptual regularizer: LPIPS' network vgg, alex "
        "or squeeze (needs the package lpips), or latents, the VAE's own",
        choices=FEATURES,
    )
    normalize_directional: bool = option(
        False,
        "distillation",
        "bring the directional regularizer's predictions to "
        "unit spread first, so that the scale does not set its strength; released "
        "with layer selection and for EG3D",
    )
    latent_clamp: float = option(
        1.0, "distillation", "largest value of each term's gradient on latents; 0: no limit", min=0.0, max=1e6
    )
    image_quantile: float = option(
        0.95, "distillation", "quantile at which each image's gradient is clamped; 0: not", min=0.0, max=1.0
    )

    # generator
    train: str = option(
        "convolutions",
        "generator",
        "what learns: the learned constant and all 3x3 convolutions; "
        "released: the convolutions from 8 px on, as the paper's code does; synthesis: colour layers "
        "too; all: the mapping too",
        choices=TRAINS,
    )
    layers: int = option(
        0,
        "generator",
        "train only this many layers, those whose styles matter most, chosen anew at "
        "every step; 0: all. Fewer need more steps: as released 12: 1201, 6: 3001, 3: 5001, 1: 10001, "
        "where a layer that is chosen seldom takes 1.4 to 4 times larger steps than here, and where "
        "the layer before the one that matters is trained",
        min=0,
        max=64,
    )
    freeze_bias: bool = option(True, "generator", "leave all biases as they are")
    truncation: float = option(
        1.0, "generator", "of the latents that are trained on; 1: none, 0: the mean image only", min=0.0, max=2.0
    )
    noise: str = option(
        "const",
        "generator",
        "noise inputs while training: const, as stored; random; none",
        choices=("const", "random", "none"),
    )
    label: int = option(
        -1, "generator", "conditional generators only: the one class to train on; -1: all alike", min=-1, max=1_000_000
    )
    resolution: int = option(
        0,
        "generator",
        "side in pixels at which images are judged, a multiple of 8; 0: what the diffusion model was made for",
        min=0,
        max=4096,
    )
    gradient_checkpointing: bool = option(
        False,
        "generator",
        "compute the generator's activations twice instead of storing them: slower, less memory",
        free=True,
    )

    # optimisation
    steps: int = option(1000, "optimisation", "optimizer steps in all", min=1, max=10_000_000, free=True)
    batch_size: int = option(
        2, "optimisation", "images per step, over all processes together; the paper's is 1", min=1, max=4096
    )
    learning_rate: float = option(0.0008, "optimisation", "peak learning rate; the paper's is 0.0008", min=0.0, max=1.0)
    beta1: float = option(0.0, "optimisation", "Adam's decay of the mean gradient", min=0.0, max=0.9999999)
    beta2: float = option(0.99**0.8, "optimisation", "Adam's decay of the squared gradient", min=0.0, max=0.9999999)
    eps: float = option(1e-8, "optimisation", "added to Adam's denominator", min=1e-16, max=1.0)
    schedule: str = option(
        "constant",
        "optimisation",
        "learning rate after the warm-up: constant, or falling to 0 at the last step",
        choices=("constant", "cosine", "linear"),
    )
    warmup: int = option(
        0, "optimisation", "steps over which the learning rate rises from 0; 0: none", min=0, max=1_000_000
    )
    clip: float = option(0.0, "optimisation", "largest norm of the gradient; 0: no clipping", min=0.0, max=1e9)
    ema: float = option(
        0.99,
        "optimisation",
        "decay of the average of the weights that is sampled and exported, "
        "warmed up as (1+n)/(10+n); 0: no average, as released",
        min=0.0,
        max=0.9999999,
    )
    precision: str = option(
        "auto",
        "optimisation",
        "of the diffusion model and its VAE (the generator stays fp32); auto: bf16 on GPUs that have it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    seed: int = option(0, "optimisation", "of everything random", min=0, max=2**63 - 1)
    device: str = option("auto", "optimisation", "auto, cpu, cuda, cuda:1, mps, xpu", free=True)

    # reporting
    checkpoint_every: int = option(
        100, "reporting", "steps between checkpoints to resume from; 0: none by steps", min=0, max=10_000_000, free=True
    )
    keep_checkpoints: int = option(
        3, "reporting", "how many of the latest checkpoints stay", min=1, max=10_000, free=True
    )
    checkpoint_minutes: float = option(
        10.0,
        "reporting",
        "also save a checkpoint when the last one is this many "
        "minutes old, which is the most that a crash can cost; 0: by steps only",
        min=0.0,
        max=100_000.0,
        free=True,
    )
    sample_every: int = option(
        50,
        "reporting",
        "steps between before/after grids, the first at step 0; 0: none",
        min=0,
        max=10_000_000,
        free=True,
    )
    sample_count: int = option(
        6, "reporting", "images per row of the grid, each with its own fixed seed", min=1, max=64, free=True
    )
    sample_rows: int = option(
        4, "reporting", "at most so many stages of the run in the grid, the newest last", min=1, max=32, free=True
    )
    sample_truncation: float = option(
        0.7, "reporting", "truncation of the grid's latents; 1: none", min=0.0, max=2.0, free=True
    )
    log_every: int = option(10, "reporting", "steps between lines of the log", min=1, max=1_000_000, free=True)
    tensorboard: bool = option(False, "reporting", "also write events for TensorBoard (needs tensorboard)", free=True)
    file_dtype: str = option(
        "fp32", "reporting", "numbers of the finished file", choices=("fp32", "fp16", "bf16"), free=True
    )
    licence: str = option(
        "", "reporting", "licence written into the finished file; empty: the source generator's", free=True
    )
    # New fields come last: they are inputs of a published node in this order.
    way_back: float = option(
        -1.0,
        "distillation",
        "how much of the gradient that leads back pixels beyond white and "
        "black keep, 0 to 1; 0: none, as StyleGAN-Fusion was released, so that an image that is "
        "all black stays so; -1: 0.01, or 0 with the mode sgf",
        min=-1.0,
        max=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min > self.t_max:
            raise ConfigProblem(f"t_min: expected at most t_max, found {self.t_min} and {self.t_max}; exchange them.")
        if self.resolution % RESOLUTION_STEP:
            raise ConfigProblem(
                f"resolution: expected a multiple of {RESOLUTION_STEP} pixels, found {self.resolution}; the nearest is "
                f"{max(1, round(self.resolution / RESOLUTION_STEP)) * RESOLUTION_STEP}."
            )

    def differences(self, other: AdaptConfig) -> dict[str, tuple[Any, Any]]:
        """The binding fields in which two configurations differ; prompts as `same_prompt` compares them."""
        found = super().differences(other)
        if not self.needs("source"):
            found.pop("source_prompt", None)
        return {name: pair for name, pair in found.items() if name not in PROMPT_FIELDS or not same_prompt(*pair)}

    def needs(self, prompt: str) -> bool:
        """Whether the method needs a prompt ("source" or "unwanted") beside the one to reach."""
        return prompt in prompts_of(METHODS[self.method])

    def method_options(self) -> dict[str, Any]:
        """The method's own options, by their names in its class."""
        names = [one.name for one in options_of(METHODS[self.method])]
        return {name: getattr(self, f"{self.method}_{name}") for name in names}

    def check_prompts(self) -> None:
        """Raise ConfigProblem where a method lacks a prompt; not for critics that are given, which bring their own."""
        if not self.prompt and not (self.domain and self.domain_weight):
            raise ConfigProblem("prompt: expected a description of the domain to reach, found none; give one.")
        for prompt, field in FIELD_OF_PROMPT.items():
            if self.needs(prompt) and not getattr(self, field):
                raise ConfigProblem(
                    f"{field}: expected {PROMPTS[prompt]}, which the method {self.method} compares with, found none; "
                    "give one."
                )


def same_prompt(one: str, other: str) -> bool:
    """Whether two prompts are one: texts exactly, connected conditionings by their signatures up to last bits.

    What a graph shows of a conditioning's text does not count beside them.
    """
    mine, theirs = SIGNATURE.findall(one), SIGNATURE.findall(other)
    if mine and theirs:
        return len(mine) == len(theirs) and all(map(_same_conditioning, mine, theirs))
    return one == other


def prompt_text(prompt: str) -> str:
    """A prompt without what a connected conditioning is known again by, for people."""
    return " ".join(SIGNATURE.sub("", prompt).split()).replace(" ,", ",")


def _same_conditioning(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two signatures agree: in what they consist of, and nearly in where they lie."""
    here, there = (struct.unpack("<8e", bytes.fromhex(numbers)) for _, numbers in (one, other))
    return one[0] == other[0] and math.dist(here, there) <= SAME_PROMPT * math.hypot(*there)


def configuration_kind(values: Mapping[str, Any]) -> type[Settings]:
    """The kind of configuration that the fields of a config.json, a checkpoint or a start belong to."""
    return AdaptConfig if "generator" in values else TrainConfig
