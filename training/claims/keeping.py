"""What is kept between calls: measured rows as small JSON files, and weights after some steps of a training run.

Files appear complete or not at all, so a process may be killed at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...guidance.files.atomic import replacing, write_text
from .statistics import Measured, interval

FILE_DIGITS = 5


@dataclass
class Row:
    """A measured point. numbers: plain values; draws: the bootstrap replicates [R] of those that have some."""

    point: Any
    numbers: dict[str, float]
    draws: dict[str, Tensor] = field(repr=False)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return {name: interval(draws) for name, draws in self.draws.items()}

    def column(self, name: str) -> Tensor:
        """Value and replicates of one measure, [1 + R] in float64."""
        return torch.cat([torch.tensor([self.numbers[name]], dtype=torch.float64), self.draws[name].double()])


def columns(rows: Sequence[Row], name: str) -> Tensor:
    """[P, 1 + R] of one measure, value first."""
    return torch.stack([row.column(name) for row in rows])


def key_of(facts: Mapping[str, Any]) -> str:
    """A hash of everything that decides a row or a training run, given as plain JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def read_row(path: Path, point: Any) -> Row | None:
    """The row in a file, as a row of the given point; None where there is none or the file is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        draws = {name: torch.tensor(values, dtype=torch.float64) for name, values in kept["draws"].items()}
        return Row(point, kept["numbers"], draws)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_row(path: Path, point: Any, numbers: Mapping[str, float], measured: Mapping[str, Measured]) -> None:
    """Keep a row; its file also names the point, for people who read it."""
    draws = {name: measure.draws.tolist() for name, measure in measured.items()}
    write_text(path, json.dumps(rounded({"point": str(point), "numbers": numbers, "draws": draws})) + "\n")


def kept_numbers(path: Path, make: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """The numbers that `make` returns, made once and kept in a file."""
    if not path.is_file():
        write_text(path, json.dumps(rounded(make())) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(value: Any) -> Any:
    """Plain data with every number as files hold it; one that is not finite becomes None."""
    if isinstance(value, float):
        return round(value, FILE_DIGITS) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def trained_weights(
    folder: Path, run: str, step: int, train: Callable[[Path, int], Any], stops: Iterable[int] = ()
) -> Path:
    """The weights after some steps of a training run, `run-step.safetensors`; trained now where they are missing.

    With a constant learning rate a longer run goes through the weights of a shorter one, so all stops belong to one run
    that goes on from its checkpoint. train(place, step) trains in a folder up to a step and returns the engine's
    Result. stops: further steps that will be asked for; those on the way are kept in passing. Raises KeyboardInterrupt
    when the training was stopped; nothing is lost.
    """

    def path(length: int) -> Path:
        return folder / f"{run}-{length}.safetensors"

    if path(step).is_file():
        return path(step)
    for length in sorted({step, *(stop for stop in stops if stop < step)}):
        if path(length).is_file():
            continue
        place = folder / "runs" / run
        finished = [file.stem.removeprefix(f"{run}-") for file in folder.glob(f"{run}-*.safetensors")]
        if any(int(name) > length for name in finished):
            place = place.with_name(f"{run}-to-{length}")  # the run has gone past this stop; go there once more
        result = train(place, length)
        if result.status != "finished":
            raise KeyboardInterrupt(f"{run} stopped at step {result.step}; start again to go on")
        with replacing(path(length)) as file, open(result.path, "rb") as source:
            shutil.copyfileobj(source, file)
    return path(step)


@lru_cache(maxsize=256)
def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, read once."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
