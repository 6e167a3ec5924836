"""What every benchmark shares: one JSON object a line, interleaved timing, medians with intervals, peak memory.

Standard output carries results only; progress and whatever libraries print go to standard error.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

BOOTSTRAP = Path(__file__).resolve().parents[2] / "training" / "bootstrap.py"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def reserve_stdout() -> TextIO:
    """Standard output for results alone: everything else that prints to it, C libraries included, goes to stderr."""
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return results


@dataclass
class Report:
    """Writes results, one JSON object a line."""

    stream: TextIO
    seed: int = 0
    prefix: str = ""
    written: int = 0

    def line(
        self, name: str, value: float, unit: str, *, samples: int, target: float | None = None, better: str = "lower",
        **more: Any,
    ) -> None:  # fmt: skip
        """One result. target: the value to reach, None where none is set. samples: how many measurements it stands on.

        Raises ValueError for a value that is not finite, which JSON could not say.
        """
        if better not in ("lower", "higher"):
            raise ValueError(f"Expected better to be 'lower' or 'higher', got {better!r}.")
        if not math.isfinite(value):
            raise ValueError(f"Expected a finite measurement for {name}, got {value}.")
        record = {
            "name": self.prefix + name, "value": _rounded(value), "unit": unit, "target": target, "better": better,
            "samples": samples, "seed": self.seed,
            **{key: _rounded(item) for key, item in more.items()},
        }  # fmt: skip
        print(json.dumps(record, allow_nan=False), file=self.stream, flush=True)
        self.written += 1
        verdict = ""
        if target is not None:
            reached = value <= target if better == "lower" else value >= target
            verdict = f" (target {target:g}: {'reached' if reached else 'missed'})"
        say(f"  {record['name']}: {record['value']:g} {unit}{verdict}")

    def median(
        self, name: str, values: Sequence[float], unit: str, *, target: float | None = None, better: str = "lower",
        **more: Any,
    ) -> None:  # fmt: skip
        """The median of `values`, with the 95 % interval of the median in an extra field "interval"."""
        self.line(
            name, statistics.median(values), unit, samples=len(values), target=target, better=better,
            interval=list(median_interval(values)), **more,
        )  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    return float(f"{value:.5g}")


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics that hold the median of the population with at least `confidence`, whatever its distribution.

    The number of values below the median is binomial (n, 1/2). Below 6 values no pair reaches 95 %: then the extremes.
    """
    ordered, n = sorted(values), len(values)
    if n == 0:
        raise ValueError("Expected at least one value, got none.")
    below, rank = 0.0, 0
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n
        if 2 * below > 1 - confidence:
            break
        rank = k
    return ordered[rank], ordered[n - 1 - rank]


@dataclass
class Times:
    """Seconds of each contestant, one entry a round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Round by round, so that what slows the whole machine for a while cancels."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[baseline])]

    def differences(self, name: str, baseline: str) -> list[float]:
        return [a - b for a, b in zip(self.seconds[name], self.seconds[baseline])]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def interleave(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, *, budget_s: float = math.inf, least: int = 3,
    finish: Callable[[], None] = lambda: None, what: str = "", warm_up: int = 1,
) -> Times:  # fmt: skip
    """Time all `contestants` in turns, `rounds` times, each round starting with another one.

    After `budget_s` seconds it stops early, with at least `least` rounds. `finish` waits for a device to end its work
    and is part of the time. The first `warm_up` rounds do not count.
    """
    names = list(contestants)
    times = Times({name: [] for name in names})
    started = said = time.monotonic()
    for round_ in range(-warm_up, rounds):
        if round_ >= least and time.monotonic() - started > budget_s:
            break
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            finish()
            begin = time.perf_counter()
            contestants[name]()
            finish()
            if round_ >= 0:
                times.seconds[name].append(time.perf_counter() - begin)
        if time.monotonic() - said > 15:
            said = time.monotonic()
            say(f"  {what}: round {max(round_ + 1, 0)} of at most {rounds}")
    return times


def peak_memory() -> int:
    """The most main memory this process has held, in bytes."""
    try:
        # Not getrusage: on Linux a child starts with its parent's peak.
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return info.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(module: Path, *arguments: str) -> list[dict]:
    """Run a benchmark file in a process of its own; the JSON objects it printed. Raises RuntimeError when it failed."""
    command = [sys.executable, str(BOOTSTRAP), str(module), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if result.returncode:
        raise RuntimeError(f"{module.name} {' '.join(arguments)} failed with exit status {result.returncode}")
    return [json.loads(line) for line in result.stdout.splitlines()]
