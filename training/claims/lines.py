"""Results as JSON lines in the benchmarks' format, and what every report says of the time it took."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from .deciding import Decision
from .keeping import Row


def json_line(
    paper: str,
    name: str,
    value: float | None,
    unit: str,
    samples: int,
    seed: int,
    target: float | None = None,
    better: str = "lower",
    **more: Any,
) -> str:
    """One result of a paper's claims; a number that is not finite becomes null."""
    record = {
        "name": f"claims/{paper}/{name}",
        "value": value,
        "unit": unit,
        "target": target,
        "better": better,
        "samples": samples,
        "seed": seed,
        **more,
    }
    return json.dumps(_plain(record), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def decision_line(paper: str, name: str, decision: Decision, samples: int, seed: int) -> str:
    """A decided claim as a line; all of its fields are in it."""
    more = {
        key: value
        for key, value in asdict(decision).items()
        if key not in ("claim", "value", "unit", "target", "better", "low", "high")
    }
    return json_line(
        paper,
        f"claim/{name}",
        decision.value,
        decision.unit,
        samples,
        seed,
        decision.target,
        decision.better,
        interval=[decision.low, decision.high],
        **more,
    )


def say_lines(lines: Iterable[str]) -> None:
    """Results go to standard output, a line each."""
    for line in lines:
        print(line, flush=True)


def hours(rows: Sequence[Row], planned: int, what: str) -> str:
    """What measuring took, and what the rest would take at that rate. what: "Drawing them took" and the like."""
    seconds = [row.numbers["seconds"] for row in rows if "seconds" in row.numbers]
    if not seconds:
        return ""
    left = (planned - len(rows)) * sum(seconds) / len(seconds)
    rest = f"; the rest would take {left / 3600:.1f} hours at that rate" if left else ""
    return f"{what} took {sum(seconds) / 3600:.1f} hours{rest}."
