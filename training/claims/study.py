"""A paper's sweep, whatever the paper: a plan of points, each measured once and kept, in a loop that can be stopped."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..mini_world.assets import load_classifier, load_mini_world, weights_dir
from .deciding import Claim, Verdict, decide
from .keeping import Row, file_hash, key_of, read_row, write_row
from .report import Report
from .statistics import Measured

# Part of every key: raise it when the meaning of a stored number changes.
VERSION = 3
# The shipped files that every number depends on: prior, autoencoder, text encoder, judges.
WORLD_FILES = ("prior_unet", "text_encoder", "autoencoder", "classifier", "classifier_held_out")


@dataclass(frozen=True)
class Sampling:
    """How a point's pictures are drawn and measured; all of it is part of its key.

    samples: pictures of a point. steps: of the sampler. targets: pictures that right answers are taken from.
    replicates: of the bootstrap. precision: of the UNets, "fp32" or "bf16". rendered: the prior's pictures of a prompt.
    """

    samples: int
    steps: int = 15
    targets: int = 2000
    replicates: int = 400
    seed: int = 0
    precision: str = "fp32"
    rendered: int = 500


@dataclass(frozen=True)
class Plan:
    """A sweep: how points are drawn, the points in order, and how what they compare is trained.

    images, batch: of trained diffusion models. stops: steps at which adaptations are looked at. fine_tune: steps of the
    fine-tuned critic. coarse: too few settings for a claim about all of them to be settled, even when every point is
    measured. options: of the command that measures it. note: what its page says first.
    """

    sampling: Sampling
    points: tuple[Any, ...]
    images: int = 8000
    batch: int = 64
    stops: tuple[int, ...] = ()
    fine_tune: int = 300
    coarse: bool = False
    options: str = ""
    note: str = ""

    def with_samples(self, samples: int | None) -> Plan:
        """The same sweep with another number of samples a point; None keeps it."""
        if samples in (None, self.sampling.samples):
            return self
        sampling = replace(self.sampling, samples=samples)
        return replace(self, sampling=sampling, options=f"{self.options} --samples {samples}")


class Study(ABC):
    """A paper's sweep in a work folder. Points are frozen dataclasses of the paper's own fields.

    Beside them a point has `name`, of its JSON line, and `facts`, the further fields of that line.
    """

    paper = ""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder, self.points_folder = plan, folder, folder / "points"
        self.world = load_mini_world()
        self.judges = load_classifier(), load_classifier(held_out=True)

    @abstractmethod
    def training(self, point: Any) -> dict[str, Any]:
        """Everything that decides the weights that a point uses besides the mini world's, as plain JSON."""

    @abstractmethod
    def examine(self, point: Any) -> tuple[dict[str, Measured], dict[str, float]]:
        """(measures with bootstrap replicates, all numbers) of a point; trains its weights where they are missing."""

    @abstractmethod
    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        """The paper's claims, to be decided from these rows."""

    @abstractmethod
    def report(self, rows: Sequence[Row]) -> Report:
        """What the paper's page shows."""

    @cached_property
    def world_hash(self) -> str:
        hashes = [file_hash(weights_dir() / f"{name}.safetensors") for name in WORLD_FILES]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def key(self, point: Any) -> str:
        """The hash that names a point's file."""
        facts = {"version": VERSION, "paper": self.paper, "point": asdict(point), "training": self.training(point)}
        return key_of({**facts, "sampling": asdict(self.plan.sampling), "world": self.world_hash})

    def find(self, point: Any) -> Row | None:
        """The point as measured before, or None."""
        return read_row(self.points_folder / f"{self.key(point)}.json", point)

    def measure(self, point: Any) -> Row:
        """The point as measured before, or else measured now and kept."""
        row = self.find(point)
        if row is None:
            measured, numbers = self.examine(point)
            write_row(self.points_folder / f"{self.key(point)}.json", point, numbers, measured)
            row = self.find(point)  # what a continued run will read, to the last digit
        assert row is not None
        return row

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """All claims, decided."""
        return [decide(claim, rows, self.plan.points, self.plan.coarse) for claim in self.claims(rows)]

    def gather(self, measuring: bool = True) -> list[Row]:
        """The rows in the plan's order, measured now where they are missing, until Ctrl+C."""
        rows = []
        for number, point in enumerate(self.plan.points, 1):
            row = self.find(point)
            if row is None and measuring:
                print(f"{number}/{len(self.plan.points)}: {point}", file=sys.stderr, flush=True)
                try:
                    row = self.measure(point)
                except KeyboardInterrupt:
                    measuring = False
                    print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
            if row is not None:
                rows.append(row)
        return rows
