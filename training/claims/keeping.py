"""Measured rows, and the folder that keeps them: one small JSON file each, named by the hash of all that decides it.

Files appear complete or not at all, so a run may be killed at any time; a damaged one counts as not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...guidance.files.atomic import write_text
from ..engine.lock import locked
from .statistics import Measured

FILE_DIGITS = 5


@dataclass
class Row:
    """A measured point. numbers: plain values; draws: the bootstrap replicates of those measures that have them.

    point and sampling say what was measured and how, in the words of the paper's own sweep.
    """

    point: Any
    sampling: Any
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
    """The hash that names a row's file; facts: everything that decides its numbers, as plain JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


class Shelf:
    """The kept rows in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def find(self, key: str, point: Any, sampling: Any) -> Row | None:
        """The row of this key, as a row of the given point, or None."""
        try:
            kept = json.loads(self.path(key).read_text(encoding="utf-8"))
            draws = {name: torch.tensor(values, dtype=torch.float64) for name, values in kept["draws"].items()}
            intervals = {name: (low, high) for name, (low, high) in kept["intervals"].items()}
            return Row(point, sampling, kept["numbers"], intervals, draws)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Keeps other processes from making the same row within the block. Raises Busy where one is making it."""
        name = f"{key}.lock"
        with locked(self.folder, name):
            yield
        with suppress(OSError):  # whoever finds the lock gone finds the row
            (self.folder / name).unlink()

    def put(
        self, key: str, said: Mapping[str, Any], numbers: Mapping[str, float], measured: Mapping[str, Measured]
    ) -> None:
        """Keep a row; said: what a reader of the file should know beside its numbers."""
        content = {
            **said,
            "numbers": rounded(numbers),
            "intervals": rounded({name: one.interval() for name, one in measured.items()}),
            "draws": {name: rounded(one.draws.tolist()) for name, one in measured.items()},
        }
        write_text(self.path(key), json.dumps(content) + "\n")

    def numbers(self, name: str, facts: Mapping[str, Any], make: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Numbers that `make` returns, kept like a row under a name and a hash."""
        path = self.path(f"{name}-{key_of(facts)}")
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
