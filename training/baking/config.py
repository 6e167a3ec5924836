"""The configuration of a baking: which guidance, matched on which noised pictures and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..domain.picture_settings import PictureSettings
from ..engine.settings import CONNECTED_PREFIX, ConfigProblem, changed, group
from ..prior.settings import PriorSettings

TARGETS = ("domain", "guided")
STATES = ("pictures", "own", "trajectories")
TRAINS = ("low_rank", "all")
what, baked, matching, model, stepping, reporting = map(
    group, ("what", "target", "matching", "model", "optimisation", "reporting")
)
inherited = partial(changed, PriorSettings)


@dataclass(frozen=True, kw_only=True)
class BakeConfig(PictureSettings):
    """Everything that decides a baking.

    Raises ConfigProblem (a ValueError) for a field out of its range and for combinations that make no sense.
    """

    kind: ClassVar[str] = "baking"
    command: ClassVar[str] = "indomain bake"
    groups: ClassVar[tuple[str, ...]] = (
        *("what", "target", "matching", "model", "low_rank", "data", "optimisation", "reporting"),
    )
    required: ClassVar[dict[str, tuple[str, str]]] = {"base": ("a checkpoint file or mini_world", "the prior")}

    # what
    name: str = inherited("name", "domain_lora", help="name of the LoRA; the finished file is NAME.safetensors")
    domain: str = what(
        "",
        "the domain model whose guidance is baked in: its file, or mini-handwriting, which ships",
        path=True,
        model=True,
        free=True,
        names=("mini-handwriting", "mini-narrow-handwriting", CONNECTED_PREFIX),
    )
    export_to: str = inherited(
        "export_to",
        "",
        help="folder the finished file is also put in, for instance ComfyUI's models/loras; empty: only the run's "
        "folder",
    )

    # target
    domain_weight: float = baked(
        1.5, "weight of the domain model at LoRA strength 1; half of it at strength 0.5", min=-100.0, max=100.0
    )
    domain_start: float = baked(
        0.0, "share of sampling at which the domain model begins; later keeps more of the prompt", min=0.0, max=1.0
    )
    domain_end: float = baked(1.0, "share of sampling at which it ends", min=0.0, max=1.0)
    terms: str = baked(
        "",
        "file of further guidance terms (.json or .toml) in a list terms: name, weight (a number or a schedule), and "
        "as needed model (a domain model's file; none: the prior), prompt, reference, shaping",
        path=True,
        model=True,
        free=True,
    )
    target: str = baked(
        "domain",
        "domain: the guidance of domain model and terms alone, for plain CFG of any scale; guided: the whole guided "
        "prediction at control_weight, for CFG 1, one prediction a step",
        choices=TARGETS,
    )
    control_weight: float = baked(
        3.0,
        "target guided: weight of the prompt that is baked in; target domain: CFG of sample grids and trajectories",
        min=-100.0,
        max=100.0,
    )

    # matching
    states: tuple[str, ...] = matching(
        ("pictures", "own"),
        "what the guidance is matched on, in equal parts: pictures (of data, noised), own (the prior's own samples at "
        "the prompts, noised), trajectories (what guided sampling at control_weight passes through)",
        max=3,
    )
    own_count: int = matching(
        64, "the prior's own samples, or guided trajectories, that are drawn before the first step", min=1, max=100_000
    )
    own_steps: int = matching(20, "sampling steps of those", min=2, max=1000)
    prompt_list: tuple[str, ...] = matching((), "prompts to match the guidance at", max=10_000)
    prompt_file: str = matching("", "text file of such prompts, one a line", path=True, model=True, free=True)
    random_prompts: int = matching(
        256, "prompts of a few random words out of the prior's vocabulary beside those; 0: none", min=0, max=10_000
    )
    empty_share: float = matching(
        0.15, "share of the pictures that are matched at the empty prompt; without prompts all are", min=0.0, max=1.0
    )

    # model
    train: str = model(
        "low_rank", "what learns: low-rank additions, for a LoRA, or all weights, for a whole UNet", choices=TRAINS
    )

    # optimisation
    steps: int = inherited("steps", 1000)
    learning_rate: float = inherited(
        "learning_rate", 1e-3, help="peak learning rate; about 1e-3 for low_rank, 1e-5 for all weights"
    )
    schedule: str = inherited("schedule", "cosine")
    warmup: int = inherited("warmup", 50)
    clip: float = inherited("clip", 1.0)
    ema: float = inherited("ema", 0.99)
    weight_decay: float = stepping(0.0, "decoupled weight decay; 0: none", min=0.0, max=10.0)
    min_snr_gamma: float = stepping(
        0.0,
        "min-SNR loss weights (arXiv 2303.09556); 0: the plain difference of the networks' outputs",
        min=0.0,
        max=1e6,
    )
    noisy_share: float = stepping(
        0.0, "share of the pictures whose timestep comes from the noisier half only; 0: all uniform", min=0.0, max=1.0
    )

    # reporting
    sample_prompts: tuple[str, ...] = reporting(
        (),
        "prompts of the sample grid, at most 64: each with the LoRA beside guidance; none: the empty prompt",
        free=True,
        max=64,
    )
    sample_steps: int = reporting(20, "sampling steps of the grid", min=1, max=1000, free=True)
    validate_every: int = reporting(
        250,
        "steps between looks at the mismatch on held-out pictures, the share of the guidance that is still missing (1: "
        "all, 0: none); 0: never",
        min=0,
        max=10_000_000,
        free=True,
    )
    held_out_share: float = reporting(
        0.05,
        "share of the pictures kept out of training (at most 64) for that; 0, or validate_every 0 when a run begins: "
        "none",
        min=0.0,
        max=0.5,
    )
    file_dtype: str = inherited("file_dtype", "fp16")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [state for state in self.states if state not in STATES]
        if unknown or not self.states:
            raise ConfigProblem(
                f"states: expected some of {', '.join(STATES)}, found {repr(unknown[0]) if unknown else 'none'}."
            )
        if len(set(self.states)) < len(self.states):
            raise ConfigProblem(f"states: expected each kind once, found {', '.join(self.states)}.")
        if self.batch_size < len(self.states):
            raise ConfigProblem(
                f"batch_size: expected at least {len(self.states)}, one for each of {', '.join(self.states)}, found "
                f"{self.batch_size}; raise it or choose fewer states."
            )
        if self.domain_start >= self.domain_end:
            raise ConfigProblem(
                f"domain_start: expected less than domain_end, {self.domain_end}, found {self.domain_start}."
            )
        if not self.domain and not self.terms and self.target == "domain":
            raise ConfigProblem(
                "domain: expected a domain model or a file of terms, found neither; name one, or choose target guided."
            )

    @property
    def prompts(self) -> tuple[str, ...]:
        return (*self.prompt_list, *self.sample_prompts)

    @property
    def needs_tokenizer(self) -> bool:
        # Terms may have prompts of their own.
        return super().needs_tokenizer or bool(self.prompt_file or self.random_prompts or self.terms)

    @property
    def memory_advice(self) -> str:
        return (
            f"Baking ran out of memory with batch size {self.batch_size} at {self.resolution} px; use gradient "
            "checkpointing, with which this run can go on, or in a run of another name a smaller batch size or a lower "
            "resolution."
        )
