"""What is kept between calls: measured rows as small JSON files, and weights after some steps of a training run.

Files appear complete or not at all, so a process may be killed at any time. A damaged row counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...guidance.files.atomic import replacing, write_text
from ..engine.lock import locked
from .statistics import Measured, interval

FILE_DIGITS = 5


@dataclass
class Row:
    """A measured point. numbers: plain values; intervals and draws: those of the measures with bootstrap replicates."""

    point: Any
    numbers: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    draws: dict[str, Tensor] = field(repr=False)

    def column(self, name: str) -> Tensor:
        """Value and replicates of one measure, [1 + R] in float64."""
        return torch.cat([torch.tensor([self.numbers[name]], dtype=torch.float64), self.draws[name].double()])


def columns(rows: Sequence[Row], name: str) -> Tensor:
    """[P, 1 + R] of one measure, value first."""
    return torch.stack([row.column(name) for row in rows])


def key_of(facts: Mapping[str, Any]) -> str:
    """A hash of everything that decides a row or a training run, given as plain JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


class Shelf:
    """The kept rows in `folder`, each in a file named by its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str, point: Any) -> Row | None:
        """The row of this key, as a row of the given point, or None."""
        try:
            kept = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            draws = {name: torch.tensor(values, dtype=torch.float64) for name, values in kept["draws"].items()}
            intervals = {name: (low, high) for name, (low, high) in kept["intervals"].items()}
            return Row(point, kept["numbers"], intervals, draws)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Keeps other processes from making the same row within the block. Raises Busy where one is making it."""
        name = f"{key}.lock"
        with locked(self.folder, name):
            yield
        with suppress(OSError):  # another process that finds no lock finds the row
            (self.folder / name).unlink()

    def put(self, key: str, point: Any, numbers: Mapping[str, float], measured: Mapping[str, Measured]) -> None:
        """Keep a row; its file also names the point, for people who read it."""
        content = {
            "point": str(point),
            "numbers": rounded(numbers),
            "intervals": {name: rounded(interval(measure.draws)) for name, measure in measured.items()},
            "draws": {name: rounded(measure.draws.tolist()) for name, measure in measured.items()},
        }
        write_text(self.folder / f"{key}.json", json.dumps(content) + "\n")

    def numbers(self, name: str, facts: Mapping[str, Any], make: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """The numbers that `make` returns, made once and kept under a name and a hash of the facts."""
        path = self.folder / f"{name}-{key_of(facts)}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = rounded(make())
            write_text(path, json.dumps(found) + "\n")
            return found


def rounded(value: Any) -> Any:
    """Plain data with every number as files hold it."""
    if isinstance(value, float):
        return round(value, FILE_DIGITS)
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
    when the training was stopped (nothing is lost), and Busy while another process works on this run.
    """

    def path(length: int) -> Path:
        return folder / f"{run}-{length}.safetensors"

    if path(step).is_file():
        return path(step)
    # Which stops exist, and where the run stands, must not change between looking and going on.
    with locked(folder, f".{run}.lock"):
        for length in sorted({step, *(stop for stop in stops if stop < step)}):
            if path(length).is_file():
                continue
            place = folder / "runs" / run
            finished = [file.stem[len(run) + 1 :] for file in folder.glob(f"{run}-*.safetensors")]
            if any(int(name) > length for name in finished if name.isdigit()):
                place = place.with_name(f"{run}-to-{length}")  # the run has gone past this stop; go there once more
            result = train(place, length)
            if result.status != "finished":
                raise KeyboardInterrupt(f"{run} stopped at step {result.step}; start again to go on")
            with replacing(path(length)) as file, open(result.path, "rb") as source:
                shutil.copyfileobj(source, file)
    return path(step)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, read again only when the file has changed."""
    facts = path.stat()
    # As in git's index: a file of equal size and time that took its place is another one, or has changed since.
    return _hash_of(path, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@lru_cache(maxsize=256)
def _hash_of(path: Path, *stamp: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
