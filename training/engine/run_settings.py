"""The settings that every kind of run has: where its files go, how it steps, what it reports.

A kind of run is a subclass that adds its own fields; `kind`, `required`, `betas` and `memory_advice` are its words.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .names import check_name
from .settings import ConfigProblem, Settings, group, shown

if TYPE_CHECKING:
    from typing_extensions import Self

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
what, stepping, reporting = map(group, ("what", "optimisation", "reporting"))


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings, ABC):
    """What decides a run, of whichever kind. Raises ConfigProblem for values that make no sense."""

    kind: ClassVar[str]  # what such a run is called in its config.json and log, such as "training"
    groups: ClassVar[tuple[str, ...]] = ("what", "optimisation", "reporting")
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # Adam's decay of the mean and the squared gradient

    name: str = what("run", "name of the run; the finished file is NAME.safetensors", free=True)
    output: str = what(
        "", "folder of the run (log, samples, checkpoints, finished file); empty: runs/NAME", path=True, free=True
    )
    export_to: str = what(
        "", "folder the finished file is also put in; empty: only the run's folder", path=True, free=True
    )
    steps: int = stepping(1000, "optimizer steps in all", min=1, max=10_000_000, free=True)
    batch_size: int = stepping(4, "images in one forward pass, over all processes together", min=1, max=65536)
    learning_rate: float = stepping(1e-4, "peak learning rate", min=0.0, max=1.0)
    schedule: str = stepping(
        "constant",
        "learning rate after the warm-up: constant, or falling to 0 at the last step",
        choices=("constant", "cosine", "linear"),
    )
    warmup: int = stepping(0, "steps over which the learning rate rises from 0; 0: none", min=0, max=1_000_000)
    clip: float = stepping(0.0, "largest norm of the gradient; 0: no clipping", min=0.0, max=1e9)
    ema: float = stepping(
        0.999,
        "decay of the average of the weights that is sampled and exported, warmed up as (1+n)/(10+n); 0: no average",
        min=0.0,
        max=0.9999999,
    )
    precision: str = stepping(
        "auto",
        "of the forward and backward pass (the weights stay fp32); auto: bf16 on GPUs that have it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = stepping(
        False, "compute activations twice instead of storing them: slower, far less memory", free=True
    )
    seed: int = stepping(0, "of everything random", min=0, max=2**63 - 1)
    device: str = stepping("auto", "auto, cpu, cuda, cuda:1, mps, xpu", free=True)
    checkpoint_every: int = reporting(
        250, "steps between checkpoints to resume from; 0: none by steps", min=0, max=10_000_000, free=True
    )
    checkpoint_minutes: float = reporting(
        10.0,
        "also save a checkpoint when the last one is this many minutes old, which is the most that a crash can cost; "
        "0: by steps only",
        min=0.0,
        max=100_000.0,
        free=True,
    )
    keep_checkpoints: int = reporting(3, "how many of the latest checkpoints stay", min=1, max=10_000, free=True)
    sample_every: int = reporting(
        250, "steps between sample grids, the first at step 0; 0: none", min=0, max=10_000_000, free=True
    )
    sample_count: int = reporting(
        4, "images per row of the grid, each with its own fixed seed", min=1, max=64, free=True
    )
    log_every: int = reporting(10, "steps between lines of the log", min=1, max=1_000_000, free=True)
    tensorboard: bool = reporting(False, "also write events for TensorBoard (needs tensorboard)", free=True)
    file_dtype: str = reporting("fp32", "numbers of the finished file", choices=("fp16", "bf16", "fp32"), free=True)
    licence: str = reporting("", "licence written into the finished file", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)
        kind, colon, index = self.device.partition(":")
        if kind not in DEVICES or (colon and (kind == "auto" or not index.isdigit())):
            raise ConfigProblem(f"device: expected auto, cpu, cuda, cuda:N, mps or xpu, found {self.device!r}.")

    @property
    @abstractmethod
    def memory_advice(self) -> str:
        """What to tell somebody whose run did not fit into memory: one sentence."""

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.output) if self.output else Path("runs") / self.name

    def absolute(self) -> Self:
        """As `Settings.absolute`; the run's folder is written out."""
        config = super().absolute()
        return config.with_changes(output=config.output or os.path.abspath(config.run_folder))

    def to_dict(self) -> dict[str, Any]:
        """The kind of run, and the fields as plain JSON values; `from_mapping` inverts it."""
        return {"kind": self.kind, **super().to_dict()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "configuration") -> Self:
        """As `Settings.from_mapping`; a "kind" among the values must be this one. Raises ConfigProblem."""
        if isinstance(values, Mapping) and "kind" in values:
            kind, values = values["kind"], {name: value for name, value in values.items() if name != "kind"}
            if kind != cls.kind:
                where = "" if source == "configuration" else f"{source}: "
                raise ConfigProblem(
                    f"{where}kind: expected {cls.kind}, settings of `{cls.command}`, found {shown(kind)}; use the "
                    "command of that kind of run, or choose another name or output."
                )
        return super().from_mapping(values, source)
