"""The configuration of a training run: how a domain model learns a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..engine.run_settings import RunSettings
from ..engine.settings import ConfigProblem, changed, check_multiple, option
from ..prior.settings import PriorSettings

FORMS = ("cached", "constant", "full")
TRAINS = ("all", "self_attention", "low_rank")
MIN_RESOLUTION, RESOLUTION_STEP = 64, 8


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PriorSettings):
    """Everything that decides a training run.

    Raises ConfigProblem (a ValueError) for a field out of its range and for combinations that make no sense.
    """

    kind: ClassVar[str] = "training"
    command: ClassVar[str] = "indomain train"
    groups: ClassVar[tuple[str, ...]] = ("what", "model", "data", "optimisation", "reporting")
    required: ClassVar[dict[str, tuple[str, str]]] = {"base": ("a checkpoint file or mini_world", "the prior")}

    # what
    data: tuple[str, ...] = option(
        (),
        "what",
        "folders of images (searched recursively) or .tar shards of them; shard-{0000..0003}.tar names several",
        path=True,
        free=True,
    )
    name: str = changed(
        RunSettings, "name", "domain", help="name of the domain model; the finished file is NAME.safetensors"
    )
    export_to: str = changed(
        RunSettings,
        "export_to",
        "",
        help="folder the finished file is also put in, for instance ComfyUI's models/domain_unets; empty: only the "
        "run's folder",
    )

    # model
    form: str = option(
        "cached",
        "model",
        "cached: text-free, starts equal to the prior on the empty prompt; "
        "constant: text-free, the paper's, smaller and faster; full: keeps text (fine-tuning baseline)",
        choices=FORMS,
    )
    caption: str = option(
        "", "model", "form full only: the one caption all images are trained with; empty: the empty prompt"
    )
    train: str = option(
        "all",
        "model",
        "what learns: all weights, the self-attentions only, or low-rank additions to the attention projections",
        choices=TRAINS,
    )
    rank: int = option(16, "model", "train low_rank only: rank of the additions, usually 4 to 64", min=1, max=1024)
    gradient_checkpointing: bool = changed(
        RunSettings,
        "gradient_checkpointing",
        False,
        group="model",
        help="compute activations twice instead of storing them: about a third slower, far less memory",
    )
    prediction: str = option(
        "auto",
        "model",
        "what the prior predicts; auto: as the checkpoint says; "
        "where it says nothing, an SD 2.x one is measured and all others count as epsilon",
        choices=("auto", "epsilon", "v_prediction", "v_prediction_zero_snr"),
    )

    # data
    resolution: int = option(
        512,
        "data",
        "side of a square training image in pixels, a multiple of 8; other shapes "
        "have the same area. Use what the prior was made for: 512 for SD 1.5, 1024 for SDXL",
        min=MIN_RESOLUTION,
        max=8192,
    )
    buckets: bool = option(
        True,
        "data",
        "keep aspect ratios by sorting images into shapes of about the same area; off: every image becomes a square",
    )
    bucket_step: int = option(64, "data", "sides of the shapes are multiples of this many pixels", min=8, max=1024)
    bucket_max_ratio: float = option(2.0, "data", "the longest shape's long side over its short one", min=1.0, max=8.0)
    min_side: int = option(
        0,
        "data",
        "leave out images whose short side has fewer pixels; 0: none, small images are enlarged and counted",
        min=0,
        max=8192,
    )
    flip: bool = option(False, "data", "also learn every image mirrored; wrong for text and for faces' asymmetries")
    random_crops: int = option(
        0, "data", "cached random crops per image, drawn among while training; 0: the centre", min=0, max=64
    )
    posterior: str = option(
        "sample", "data", "sample: draw latents from the VAE's posterior; mean: its mean", choices=("sample", "mean")
    )
    cache: str = option(
        "",
        "data",
        "folder of cached latents, shared between runs; empty: in the user's cache folder",
        path=True,
        free=True,
    )
    within: tuple[str, ...] = option(
        (),
        "data",
        "folders outside of which no image is read, wherever links and patterns lead; none: no bounds",
        path=True,
        free=True,
    )
    caching_batch: int = option(
        8,
        "data",
        "images the VAE encodes at once while filling the cache, on a GPU; of more than 512 x 512 pixels fewer, as "
        "their area says; on the CPU always one, so that a latent depends on its image alone",
        min=1,
        max=256,
        free=True,
    )

    # optimisation
    steps: int = changed(RunSettings, "steps", 2000)
    accumulation: int = option(
        1,
        "optimisation",
        "forward passes per optimizer step; a step sees batch_size times accumulation images",
        min=1,
        max=4096,
    )
    learning_rate: float = changed(
        RunSettings, "learning_rate", 1e-5, help="peak learning rate; about 1e-5 for all weights, 1e-4 for low_rank"
    )
    optimizer: str = option(
        "adamw", "optimisation", "adamw, or adamw8bit (needs bitsandbytes): less memory", choices=("adamw", "adamw8bit")
    )
    weight_decay: float = option(0.01, "optimisation", "decoupled weight decay; 0: none", min=0.0, max=10.0)
    warmup: int = changed(RunSettings, "warmup", 100)
    clip: float = changed(RunSettings, "clip", 1.0)
    min_snr_gamma: float = option(
        5.0, "optimisation", "min-SNR loss weights (arXiv 2303.09556), usually 5; 0: the plain loss", min=0.0, max=1e6
    )
    noisy_share: float = option(
        0.0,
        "optimisation",
        "share of the samples whose timestep comes from the noisier half "
        "only, where the composition is decided; 0: all uniform",
        min=0.0,
        max=1.0,
    )
    noise_offset: float = option(
        0.0,
        "optimisation",
        "standard deviation of a constant per channel added to the "
        "noise, usually 0.05 to 0.1 for very dark or bright domains; 0: none",
        min=0.0,
        max=1.0,
    )

    # reporting
    sample_every: int = changed(
        RunSettings,
        "sample_every",
        250,
        help="steps between sample grids, drawn with multi-guidance against the prior, the first at step 0; 0: none",
    )
    sample_prompts: tuple[str, ...] = option(
        (),
        "reporting",
        "prompts of the sample grid, a row each, at most 64; none: the domain model alone",
        free=True,
        max=64,
    )
    sample_steps: int = option(20, "reporting", "sampling steps of the grid", min=1, max=1000, free=True)
    domain_weight: float = option(
        2.5, "reporting", "weight of the domain model in the grid", min=-100.0, max=100.0, free=True
    )
    control_weight: float = option(
        2.5, "reporting", "weight of the prompt in the grid", min=-100.0, max=100.0, free=True
    )
    validate_every: int = option(
        250, "reporting", "steps between losses on held-out images; 0: none", min=0, max=10_000_000, free=True
    )
    held_out_share: float = option(
        0.05,
        "reporting",
        "share of the images kept out of training (at most 256) for "
        "that loss; 0, or validate_every 0 when a run begins: none",
        min=0.0,
        max=0.5,
    )
    file_dtype: str = changed(RunSettings, "file_dtype", "fp16")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("resolution", self.resolution, RESOLUTION_STEP, MIN_RESOLUTION)
        check_multiple("bucket_step", self.bucket_step, RESOLUTION_STEP, RESOLUTION_STEP)
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
