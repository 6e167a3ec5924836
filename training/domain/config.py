"""The configuration of a training run: how a domain model learns a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..data.settings import DataSettings
from ..engine.settings import ConfigProblem, changed, group
from ..prior.settings import PriorSettings
from .picture_settings import PictureSettings

FORMS = ("cached", "constant", "full")
TRAINS = ("all", "self_attention", "low_rank")
MIN_RESOLUTION = 64
model, stepping, reporting = map(group, ("model", "optimisation", "reporting"))
inherited = partial(changed, PriorSettings)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PictureSettings):
    """Everything that decides a training run.

    Raises ConfigProblem (a ValueError) for a field out of its range and for combinations that make no sense.
    """

    kind: ClassVar[str] = "training"
    command: ClassVar[str] = "indomain train"
    groups: ClassVar[tuple[str, ...]] = ("what", "model", "low_rank", "data", "optimisation", "reporting")
    required: ClassVar[dict[str, tuple[str, str]]] = {"base": ("a checkpoint file or mini_world", "the prior")}

    # what
    name: str = inherited("name", "domain", help="name of the domain model; the finished file is NAME.safetensors")
    export_to: str = inherited(
        "export_to",
        "",
        help="folder the finished file is also put in, for instance ComfyUI's models/domain_unets; empty: only the "
        "run's folder",
    )

    # model
    form: str = model(
        "cached",
        "cached: text-free, starts equal to the prior on the empty prompt; "
        "constant: text-free, the paper's, smaller and faster; full: keeps text (fine-tuning baseline)",
        choices=FORMS,
    )
    caption: str = model("", "form full only: the one caption all images are trained with; empty: the empty prompt")
    train: str = model(
        "all",
        "what learns: all weights, the self-attentions only, or low-rank additions to some layers",
        choices=TRAINS,
    )
    gradient_checkpointing: bool = inherited(
        "gradient_checkpointing",
        False,
        group="model",
        help="compute activations twice instead of storing them: about a third slower, far less memory",
    )
    prediction: str = model(
        "auto",
        "what the prior predicts; auto: as the checkpoint says; "
        "where it says nothing, an SD 2.x one is measured and all others count as epsilon",
        choices=("auto", "epsilon", "v_prediction", "v_prediction_zero_snr"),
    )

    # data
    resolution: int = changed(DataSettings, "resolution", 512, min=MIN_RESOLUTION)

    # optimisation
    steps: int = inherited("steps", 2000)
    accumulation: int = stepping(
        1, "forward passes per optimizer step; a step sees batch_size times accumulation images", min=1, max=4096
    )
    learning_rate: float = inherited(
        "learning_rate", 1e-5, help="peak learning rate; about 1e-5 for all weights, 1e-4 for low_rank"
    )
    optimizer: str = stepping(
        "adamw", "adamw, or adamw8bit (needs bitsandbytes): less memory", choices=("adamw", "adamw8bit")
    )
    weight_decay: float = stepping(0.01, "decoupled weight decay; 0: none", min=0.0, max=10.0)
    warmup: int = inherited("warmup", 100)
    clip: float = inherited("clip", 1.0)
    min_snr_gamma: float = stepping(
        5.0, "min-SNR loss weights (arXiv 2303.09556), usually 5; 0: the plain loss", min=0.0, max=1e6
    )
    noisy_share: float = stepping(
        0.0,
        "share of the samples whose timestep comes from the noisier half "
        "only, where the composition is decided; 0: all uniform",
        min=0.0,
        max=1.0,
    )
    noise_offset: float = stepping(
        0.0,
        "standard deviation of a constant per channel added to the "
        "noise, usually 0.05 to 0.1 for very dark or bright domains; 0: none",
        min=0.0,
        max=1.0,
    )

    # reporting
    sample_every: int = inherited(
        "sample_every",
        250,
        help="steps between sample grids, drawn with multi-guidance against the prior, the first at step 0; 0: none",
    )
    sample_prompts: tuple[str, ...] = reporting(
        (), "prompts of the sample grid, a row each, at most 64; none: the domain model alone", free=True, max=64
    )
    sample_steps: int = reporting(20, "sampling steps of the grid", min=1, max=1000, free=True)
    domain_weight: float = reporting(2.5, "weight of the domain model in the grid", min=-100.0, max=100.0, free=True)
    control_weight: float = reporting(2.5, "weight of the prompt in the grid", min=-100.0, max=100.0, free=True)
    validate_every: int = reporting(
        250, "steps between losses on held-out images; 0: none", min=0, max=10_000_000, free=True
    )
    held_out_share: float = reporting(
        0.05,
        "share of the images kept out of training (at most 256) for "
        "that loss; 0, or validate_every 0 when a run begins: none",
        min=0.0,
        max=0.5,
    )
    file_dtype: str = inherited("file_dtype", "fp16")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.caption and self.form != "full":
            raise ConfigProblem(
                f"caption: expected none with form {self.form}, which takes no text, found {self.caption!r}; remove it "
                "or choose form full."
            )

    @property
    def global_batch(self) -> int:
        """Images per optimizer step, over all processes and passes."""
        return self.batch_size * self.accumulation

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.caption, *self.sample_prompts)

    @property
    def memory_advice(self) -> str:
        return (
            f"Training ran out of memory with batch size {self.batch_size} at {self.resolution} px; use gradient "
            "checkpointing, with which this run can go on, or in a run of another name a smaller batch size with more "
            "accumulation, the form constant, train low_rank at learning_rate 1e-4, or a lower resolution."
        )
