"""The configuration of an adaptation: everything that decides how a generator moves into a prompt's domain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from ...guidance.distillation.critic import PROMPTS
from ...guidance.distillation.method import prompts_of
from ...guidance.distillation.methods import METHODS, methods_with
from ...guidance.distillation.objective import MODES
from ...guidance.distillation.timesteps import T_SCHEDULES
from ...guidance.distillation.weighting import WEIGHTINGS
from ...guidance.options import options_of
from ..engine.settings import CONNECTED_PREFIX, ConfigProblem, changed, check_multiple, group
from ..prior.settings import PriorSettings

TRAINS = ("convolutions", "released", "synthesis", "all")
FEATURES = ("vgg", "alex", "squeeze", "latents")
RESOLUTION_STEP = 8
# The settings that hold what methods need beside the prompt.
FIELD_OF_PROMPT = {"source": "source_prompt", "unwanted": "negative"}
Kind = TypeVar("Kind")


OPTIONS_OF_METHODS = {
    f"{method.name}_{own.name}": (method.name, own) for method in METHODS.values() for own in options_of(method)
}
"""Setting -> (method, the option of its class): METHOD_OPTION for each option of each method, in METHODS' order."""


def _with_options_of_methods(config: type[Kind]) -> type[Kind]:
    """Give a class of settings the fields of OPTIONS_OF_METHODS."""
    for name, (method, own) in OPTIONS_OF_METHODS.items():
        about = {**own.metadata, "help": f"method {method} only: {own.metadata['help']}"}
        config.__annotations__[name] = own.type
        setattr(config, name, distilling(own.default, **about))
    return config


what, distilling, generating = map(group, ("what", "distillation", "generator"))
inherited = partial(changed, PriorSettings)


@dataclass(frozen=True, kw_only=True)
@_with_options_of_methods
class AdaptConfig(PriorSettings):
    """Everything that decides an adaptation. Raises ConfigProblem for values that make no sense, alone or together.

    The prompts are for people, and for critics that are opened from files: a critic that is given brings its own, and
    what a run began with is known by the critic's opinion of a fixed picture (`Adapter.load`).
    """

    kind: ClassVar[str] = "adaptation"
    command: ClassVar[str] = "indomain adapt"
    betas: ClassVar[tuple[float, float]] = (0.0, 0.99**0.8)
    groups: ClassVar[tuple[str, ...]] = ("what", "distillation", "generator", "optimisation", "reporting")
    required: ClassVar[dict[str, tuple[str, str]]] = {
        "generator": ("a generator file or mini_world", "the generator to adapt"),
        "base": ("a checkpoint file or mini_world", "the diffusion model that judges"),
    }

    # what
    generator: str = what(
        "",
        "StyleGAN2 generator to adapt: .safetensors, NVIDIA's .pkl, rosinality's .pt, or mini_world",
        path=True,
        model=True,
        free=True,
        names=("mini_world",),
    )
    base: str = inherited(
        "base",
        "",
        help="diffusion model that judges the images: a checkpoint (.safetensors in LDM layout: SD 1.x, 2.x, SDXL) or "
        "mini_world",
    )
    prompt: str = what("", "describes the domain to reach, for instance 'a 3d render of a face, Pixar'", free=True)
    negative: str = what(
        "",
        "prompt of the prediction that guidance leads away from; with the method "
        f"{methods_with('unwanted')}, what images should not be",
        free=True,
    )
    source_prompt: str = what(
        "", f"methods {methods_with('source')} only: describes what the generator makes now", free=True
    )
    domain: str = what(
        "",
        "domain model file that judges too; empty: the prompt alone",
        path=True,
        model=True,
        free=True,
        names=(CONNECTED_PREFIX,),
    )
    name: str = inherited(
        "name", "adapted", help="name of the adapted generator; the finished file is NAME.safetensors"
    )
    export_to: str = inherited(
        "export_to",
        "",
        help="folder the finished file is also put in, for instance ComfyUI's models/generators; empty: only the run's "
        "folder",
    )

    # distillation
    method: str = distilling(
        "sds",
        "how predictions become gradients: sds is the paper's, at a scale of about 100; "
        "nfsd, dds, bridge, ism and vsd are usual at 5 to 30; csd, which compares directions alone, takes any",
        choices=tuple(METHODS),
    )
    scale: float = distilling(
        100.0,
        "weight of the prompt against the empty one (guidance scale); 100 "
        "is the paper's for sds; nfsd, dds, bridge, ism and vsd are usual at 5 to 30; csd takes any",
        min=0.0,
        max=1000.0,
    )
    domain_weight: float = distilling(2.5, "weight of the domain model, where there is one", min=-1000.0, max=1000.0)
    mode: str = distilling(
        "shared",
        "shared: one noise, one encoding and one call of the model for all "
        "terms; sgf: a noise for each term, as StyleGAN-Fusion was released",
        choices=MODES,
    )
    t_min: int = distilling(10, "smallest timestep that is asked about, of 1000", min=0, max=999)
    t_max: int = distilling(
        500,
        "largest timestep; the paper's is 500 for faces, 300 for animals; larger changes shapes more",
        min=0,
        max=999,
    )
    t_schedule: str = distilling(
        "uniform",
        "timesteps over the run: uniform; annealed, from a range "
        "whose upper end falls; falling, straight from t_max to t_min",
        choices=T_SCHEDULES,
    )
    weighting: str = distilling(
        "1-abar", "weight of a timestep's gradient; 1-abar is the paper's", choices=tuple(WEIGHTINGS)
    )
    directional: float = distilling(
        0.0,
        "weight of the directional regularizer, which keeps the change alike for all images; usually 0.5 to 1, 0: off",
        min=0.0,
        max=1000.0,
    )
    reconstruction: float = distilling(
        0.0,
        "weight of the reconstruction regularizer, which leads back to the source image; usually 0.5 to 1, 0: off",
        min=0.0,
        max=1000.0,
    )
    perceptual: float = distilling(
        0.0,
        "weight of the perceptual regularizer, which keeps features of the source image; usually 0.3 to 1, 0: off",
        min=0.0,
        max=1000.0,
    )
    features: str = distilling(
        "vgg",
        "features of the perceptual regularizer: LPIPS' network vgg, alex "
        "or squeeze (needs the package lpips), or latents, the VAE's own",
        choices=FEATURES,
    )
    normalize_directional: bool = distilling(
        False,
        "bring the directional regularizer's predictions to unit spread first, so that the scale does not set its "
        "strength; released with layer selection and for EG3D",
    )
    latent_clamp: float = distilling(
        1.0, "largest value of each term's gradient on latents; 0: no limit", min=0.0, max=1e6
    )
    image_quantile: float = distilling(
        0.95, "quantile at which each image's gradient is clamped; 0: not", min=0.0, max=1.0
    )
    way_back: float = distilling(
        -1.0,
        "how much of the gradient that leads back pixels beyond white and black keep, 0 to 1; 0: none, as "
        "StyleGAN-Fusion was released, so that an image that is all black stays so; -1: 0.01, or 0 with the mode sgf",
        min=-1.0,
        max=1.0,
    )

    # generator
    train: str = generating(
        "convolutions",
        "what learns: the learned constant and all 3x3 convolutions; released: the convolutions from 8 px on, as the "
        "paper's code does; synthesis: colour layers too; all: the mapping too",
        choices=TRAINS,
    )
    layers: int = generating(
        0,
        "train only this many layers, those whose styles matter most, chosen anew at every step; 0: all. Fewer need "
        "more steps: as released 12: 1201, 6: 3001, 3: 5001, 1: 10001, where a layer that is chosen seldom takes 1.4 "
        "to 4 times larger steps than here, and where the layer before the one that matters is trained",
        min=0,
        max=64,
    )
    freeze_bias: bool = generating(True, "leave all biases as they are")
    truncation: float = generating(
        1.0, "of the latents that are trained on; 1: none, 0: the mean image only", min=0.0, max=2.0
    )
    noise: str = generating(
        "const", "noise inputs while training: const, as stored; random; none", choices=("const", "random", "none")
    )
    label: int = generating(
        -1, "conditional generators only: the one class to train on; -1: all alike", min=-1, max=1_000_000
    )
    resolution: int = generating(
        0,
        "side in pixels at which images are judged, a multiple of 8; 0: what the diffusion model was made for",
        min=0,
        max=4096,
    )
    gradient_checkpointing: bool = inherited(
        "gradient_checkpointing",
        False,
        group="generator",
        help="compute the generator's activations twice instead of storing them: slower, less memory",
    )

    # optimisation
    batch_size: int = inherited(
        "batch_size", 2, max=4096, help="images per step, over all processes together; the paper's is 1"
    )
    learning_rate: float = inherited("learning_rate", 0.0008, help="peak learning rate; the paper's is 0.0008")
    ema: float = inherited(
        "ema",
        0.99,
        help="decay of the average of the weights that is sampled and exported, warmed up as (1+n)/(10+n); 0: no "
        "average, as released",
    )
    precision: str = inherited(
        "precision",
        "auto",
        help="of the diffusion model and its VAE (the generator stays fp32); auto: bf16 on GPUs that have "
        "it, else fp32",
    )

    # reporting
    checkpoint_every: int = inherited("checkpoint_every", 100)
    sample_every: int = inherited(
        "sample_every", 50, help="steps between before/after grids, the first at step 0; 0: none"
    )
    sample_count: int = inherited("sample_count", 6)
    licence: str = inherited(
        "licence", "", help="licence written into the finished file; empty: the source generator's"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min > self.t_max:
            raise ConfigProblem(f"t_min: expected at most t_max, found {self.t_min} and {self.t_max}; exchange them.")
        check_multiple("resolution", self.resolution, RESOLUTION_STEP, RESOLUTION_STEP)

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt, self.negative, self.source_prompt)

    @property
    def memory_advice(self) -> str:
        side = f" at {self.resolution} px" if self.resolution else ""
        return (
            f"Adapting ran out of memory with batch size {self.batch_size}{side}; use a smaller batch size or a lower "
            "resolution in a run of another name, or gradient checkpointing, with which this one can go on."
        )

    def needs(self, prompt: str) -> bool:
        """Whether the method needs a prompt ("source" or "unwanted") beside the one to reach."""
        return prompt in prompts_of(METHODS[self.method])

    def method_options(self) -> dict[str, Any]:
        """The method's own options, by their names in its class."""
        names = [own.name for own in options_of(METHODS[self.method])]
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
