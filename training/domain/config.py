"""The configuration of a training run: one flat, validated, frozen dataclass (`settings` says what its fields tell)."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import ClassVar

from ..engine.settings import CONNECTED_PREFIX, ConfigProblem, Settings, kinds_of, option, read_values

__all__ = ["ConfigProblem", "TrainConfig", "field_kinds", "read_values"]

GROUPS = ("what", "model", "data", "optimisation", "reporting")
FORMS = ("cached", "constant", "full")
TRAINS = ("all", "self_attention", "low_rank")
MIN_RESOLUTION, RESOLUTION_STEP = 64, 8


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Everything that decides a training run.

    Raises ConfigProblem (a ValueError) for a field out of its range and for combinations that make no sense.
    """

    command: ClassVar[str] = "indomain train"
    required: ClassVar[dict[str, tuple[str, str]]] = {"base": ("a checkpoint file or mini_world", "the prior")}

    # what
    base: str = option(
        MISSING,
        "what",
        "prior to start from: a checkpoint (.safetensors in LDM layout: SD 1.x, 2.x, SDXL) or mini_world",
        path=True,
        free=True,
        names=("mini_world", CONNECTED_PREFIX),
    )
    data: tuple[str, ...] = option(
        (),
        "what",
        "folders of images (searched recursively) or .tar shards of them; shard-{0000..0003}.tar names several",
        path=True,
        free=True,
    )
    name: str = option("domain", "what", "name of the domain model; the finished file is NAME.safetensors", free=True)
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
        "models/domain_unets; empty: only the run's folder",
        path=True,
        free=True,
    )
    vae: str = option(
        "", "what", "file with another VAE than the checkpoint's own; empty: the checkpoint's", path=True, free=True
    )
    tokenizer: str = option(
        "",
        "what",
        "folder with CLIP's vocab.json and merges.txt; only needed to draw samples with prompts from published models",
        path=True,
        free=True,
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
    low_rank_alpha: float = option(
        0.0,
        "model",
        "train low_rank only: additions are scaled by this over the rank; 0: the rank, a scale of 1",
        min=0.0,
        max=4096.0,
    )
    gradient_checkpointing: bool = option(
        False,
        "model",
        "compute activations twice instead of storing them: about a third slower, far less memory",
        free=True,
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
        "images the VAE encodes at once while filling the cache, on a GPU; of more "
        "than 512 x 512 pixels fewer, as their area says; on the CPU always one, so that a "
        "latent depends on its image alone",
        min=1,
        max=256,
        free=True,
    )

    # optimisation
    steps: int = option(2000, "optimisation", "optimizer steps in all", min=1, max=10_000_000, free=True)
    batch_size: int = option(
        4, "optimisation", "images in one forward pass, over all processes together", min=1, max=65536
    )
    accumulation: int = option(
        1,
        "optimisation",
        "forward passes per optimizer step; a step sees batch_size times accumulation images",
        min=1,
        max=4096,
    )
    learning_rate: float = option(
        1e-5, "optimisation", "peak learning rate; about 1e-5 for all weights, 1e-4 for low_rank", min=0.0, max=1.0
    )
    optimizer: str = option(
        "adamw", "optimisation", "adamw, or adamw8bit (needs bitsandbytes): less memory", choices=("adamw", "adamw8bit")
    )
    beta1: float = option(0.9, "optimisation", "Adam's decay of the mean gradient", min=0.0, max=0.9999999)
    beta2: float = option(0.999, "optimisation", "Adam's decay of the squared gradient", min=0.0, max=0.9999999)
    eps: float = option(1e-8, "optimisation", "added to Adam's denominator", min=1e-16, max=1.0)
    weight_decay: float = option(0.01, "optimisation", "decoupled weight decay; 0: none", min=0.0, max=10.0)
    schedule: str = option(
        "constant",
        "optimisation",
        "learning rate after the warm-up: constant, or falling to 0 at the last step",
        choices=("constant", "cosine", "linear"),
    )
    warmup: int = option(
        100, "optimisation", "steps over which the learning rate rises from 0; 0: none", min=0, max=1_000_000
    )
    clip: float = option(1.0, "optimisation", "largest norm of the gradient; 0: no clipping", min=0.0, max=1e9)
    ema: float = option(
        0.999,
        "optimisation",
        "decay of the average of the weights that is sampled and exported, warmed up as (1+n)/(10+n); 0: no average",
        min=0.0,
        max=0.9999999,
    )
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
    precision: str = option(
        "auto",
        "optimisation",
        "of the forward and backward pass (the weights stay fp32); auto: bf16 on GPUs that have it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    seed: int = option(0, "optimisation", "of everything random", min=0, max=2**63 - 1)
    device: str = option("auto", "optimisation", "auto, cpu, cuda, cuda:1, mps, xpu", free=True)

    # reporting
    checkpoint_every: int = option(
        250, "reporting", "steps between checkpoints to resume from; 0: none by steps", min=0, max=10_000_000, free=True
    )
    keep_checkpoints: int = option(
        3, "reporting", "how many of the latest checkpoints stay", min=1, max=10_000, free=True
    )
    sample_every: int = option(
        250,
        "reporting",
        "steps between sample grids, drawn with multi-guidance against the prior, the first at step 0; 0: none",
        min=0,
        max=10_000_000,
        free=True,
    )
    sample_prompts: tuple[str, ...] = option(
        (),
        "reporting",
        "prompts of the sample grid, a row each, at most 64; none: the domain model alone",
        free=True,
        max=64,
    )
    sample_count: int = option(
        4, "reporting", "images per row of the grid, each with its own fixed seed", min=1, max=64, free=True
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
    log_every: int = option(10, "reporting", "steps between lines of the log", min=1, max=1_000_000, free=True)
    tensorboard: bool = option(False, "reporting", "also write events for TensorBoard (needs tensorboard)", free=True)
    file_dtype: str = option(
        "fp16", "reporting", "numbers of the finished file", choices=("fp16", "bf16", "fp32"), free=True
    )
    licence: str = option("", "reporting", "licence written into the finished file", free=True)
    # New fields come last: they are inputs of a published node in this order.
    checkpoint_minutes: float = option(
        10.0,
        "reporting",
        "also save a checkpoint when the last one is this many "
        "minutes old, which is the most that a crash can cost; 0: by steps only",
        min=0.0,
        max=100_000.0,
        free=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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

    @property
    def global_batch(self) -> int:
        """Images per optimizer step, over all processes and passes."""
        return self.batch_size * self.accumulation


def field_kinds() -> dict[str, type]:
    """The kinds of `TrainConfig`'s fields; see `kinds_of`."""
    return kinds_of(TrainConfig)
