"""A paper's sweep, whatever the paper: a plan of points, each measured once and kept, in a loop that can be stopped."""

from __future__ import annotations

import hashlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..engine.lock import Busy
from ..mini_world.assets import load_classifier, load_mini_world, weights_dir
from .deciding import Claim, Verdict, decide
from .keeping import Row, Shelf, file_hash, key_of
from .report import Report, json_line, print_lines
from .statistics import Measured

# Part of every key: raise it when the meaning of a stored number changes.
VERSION = 3
WAIT_S = 10  # before looking again at what other processes measure
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

    name: str
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


def each_once(points: Iterable[Any]) -> tuple[Any, ...]:
    """The points in order, repetitions left out."""
    return tuple(dict.fromkeys(points))


class Study(ABC):
    """A paper's sweep in a work folder. Points are frozen dataclasses of the paper's own fields.

    Beside them a point has `name`, of its JSON line, and `facts`, the further fields of that line.
    """

    paper = ""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder, self.shelf = plan, folder, Shelf(folder / "points")
        self.world, self.judge = load_mini_world(), load_classifier()
        self.second_judge = load_classifier(held_out=True)

    @cached_property
    def world_hash(self) -> str:
        """One hash over the shipped files that every number depends on."""
        hashes = [file_hash(weights_dir() / f"{name}.safetensors") for name in WORLD_FILES]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @abstractmethod
    def training(self, point: Any) -> dict[str, Any]:
        """Everything that decides the weights that a point uses besides the mini world's, as plain JSON."""

    @abstractmethod
    def examine(self, point: Any) -> tuple[dict[str, Measured], dict[str, float]]:
        """(measures with bootstrap replicates, all numbers) of a point, whose weights are trained where they are
        missing. Raises Busy while another process trains them."""

    @abstractmethod
    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        """The paper's claims, to be decided from these rows."""

    @abstractmethod
    def report(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Report:
        """What the paper's page shows."""

    def key(self, point: Any) -> str:
        """The hash that names a point's file."""
        facts = {"version": VERSION, "paper": self.paper, "point": asdict(point), "training": self.training(point)}
        return key_of({**facts, "sampling": asdict(self.plan.sampling), "world": self.world_hash})

    def find(self, point: Any) -> Row | None:
        """The point as measured before, or None; a damaged file counts as not there."""
        return self.shelf.find(self.key(point), point)

    def measure(self, point: Any) -> Row:
        """The point as measured before, or else measured now and kept. Raises Busy while another process is at it."""
        key = self.key(point)
        row = self.find(point)
        if row is None:
            with self.shelf.making(key):
                row = self.find(point)
                if row is None:
                    started = time.monotonic()
                    measured, numbers = self.examine(point)
                    self.shelf.put(key, point, {**numbers, "seconds": time.monotonic() - started}, measured)
                    row = self.find(point)  # what a continued run will read, to the last digit
        assert row is not None
        return row

    def line(self, row: Row) -> str:
        """A measured row as a JSON line."""
        numbers = {key: value for key, value in row.numbers.items() if key != "distance"}
        facts = {**row.point.facts, **numbers, "intervals": row.intervals}
        return json_line(self.paper, row.point.name, row.numbers["distance"], "frechet", self.plan.sampling, **facts)

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """All claims, decided."""
        return [decide(claim, rows, self.plan.points, self.plan.coarse) for claim in self.claims(rows)]


def gather(
    study: Study, *, minutes: float | None = None, limit: int | None = None, measuring: bool = True
) -> tuple[list[Row], bool]:
    """(the rows in the plan's order, measured now where they are missing; whether Ctrl+C ended that).

    minutes, limit: start no further point after so long, or after so many new ones. What another process is at is left
    to it, and looked at again until it is there; should that process end without it, it is measured here.
    """
    points = study.plan.points
    rows: dict[int, Row] = {}
    left, measured, stopped, started = list(enumerate(points, 1)), 0, False, time.monotonic()

    def done() -> bool:
        late = minutes is not None and time.monotonic() - started >= 60 * minutes
        return not measuring or stopped or late or measured == limit

    while left:
        busy, before = [], measured
        for number, point in left:
            row = study.find(point)
            if row is None and not done():
                passed = (time.monotonic() - started) / 60
                print(f"{number}/{len(points)} after {passed:.1f} min: {point}", file=sys.stderr, flush=True)
                try:
                    row = study.measure(point)
                    measured += 1
                    print_lines([study.line(row)])
                except Busy:
                    print("  another process is at it", file=sys.stderr, flush=True)
                    busy.append((number, point))
                except KeyboardInterrupt:
                    stopped = True
                    print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
            if row is not None:
                rows[number] = row
        left = busy
        if left and measured == before:
            if done():
                break
            try:
                time.sleep(WAIT_S)
            except KeyboardInterrupt:
                stopped = True
    return [rows[number] for number in sorted(rows)], stopped
