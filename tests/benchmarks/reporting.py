"""What every benchmark shares: its command line, one JSON object a line, interleaved timing, medians with intervals,
peak memory.

Standard output carries results only; progress and whatever libraries print go to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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
        self,
        name: str,
        value: float,
        unit: str,
        *,
        samples: int,
        target: float | None = None,
        better: str = "lower",
        **more: Any,
    ) -> None:
        """One result. target: the value to reach, None where none is set. samples: how many measurements it stands on.

        Raises ValueError for a value that is not finite, which JSON could not say.
        """
        if better not in ("lower", "higher"):
            raise ValueError(f"Expected better to be 'lower' or 'higher', got {better!r}.")
        if not math.isfinite(value):
            raise ValueError(f"Expected a finite measurement for {name}, got {value}.")
        record = {
            "name": self.prefix + name,
            "value": _rounded(value),
            "unit": unit,
            "target": target,
            "better": better,
            "samples": samples,
            "seed": self.seed,
            **{key: _rounded(item) for key, item in more.items()},
        }
        print(json.dumps(record, allow_nan=False), file=self.stream, flush=True)
        self.written += 1
        verdict = ""
        if target is not None:
            reached = value <= target if better == "lower" else value >= target
            verdict = f" (target {target:g}: {'reached' if reached else 'missed'})"
        say(f"  {record['name']}: {record['value']:g} {unit}{verdict}")

    def median(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        target: float | None = None,
        better: str = "lower",
        **more: Any,
    ) -> None:
        """The median of `values`, with the 95 % interval of the median in an extra field "interval"."""
        self.line(
            name,
            statistics.median(values),
            unit,
            samples=len(values),
            target=target,
            better=better,
            interval=list(median_interval(values)),
            **more,
        )


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
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    budget_s: float = math.inf,
    least: int = 3,
    finish: Callable[[], None] = lambda: None,
    what: str = "",
    warm_up: int = 1,
) -> Times:
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


def resident_memory() -> int:
    """The main memory this process holds now, in bytes, after giving back what its allocator has no use for."""
    import ctypes
    import gc

    import psutil

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone keeps freed memory and has this
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def restart_peak() -> None:
    """Let `peak_memory` forget what was before, where the system can (Linux); elsewhere building may be the peak."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


# ------------------------------------------------------------------------------------------------------ a command line


@dataclass(frozen=True)
class Benchmark:
    """The command line of one benchmark file: which parts to measure, how much of them, and its processes.

    sizes: what "full", "quick" and "tiny" measure, objects of the benchmark's own. parts: by name, called with the
    report and the size; one that raises leaves the others their say, but for those in `decisive`, without which nothing
    else is worth measuring. children: what a process of its own may be told to do, called with the report, the size and
    the further arguments. unable: why some of the named parts cannot be measured here, None when all can.
    """

    name: str
    description: str
    file: Path
    sizes: Mapping[str, Any]
    parts: Mapping[str, Callable[[Report, Any], None]]
    children: Mapping[str, Callable[[Report, Any, Sequence[str]], None]] = field(default_factory=dict)
    decisive: Collection[str] = ()
    unable: Callable[[Collection[str]], str | None] = lambda parts: None
    quick: str = "about ten minutes"

    def parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=f"run.py bench {self.name}",
            description=self.description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--quick", action="store_true", help=f"a smaller sample, in {self.quick} on two cores")
        parser.add_argument("--tiny", action="store_true", help="tiny inputs: shows that it runs, measures nothing")
        parser.add_argument(
            "--part", choices=self.parts, action="append", help="only this part; may be given several times"
        )
        parser.add_argument("--seed", type=int, default=0, help="of random weights and inputs (default 0)")
        parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
        return parser

    def main(self, arguments: Sequence[str]) -> int:
        """Measure what the command line asks for; 0 when every part could be measured."""
        options = self.parser().parse_args(arguments)
        size = "tiny" if options.tiny else "quick" if options.quick else "full"
        plan = self.sizes[size]
        report = Report(reserve_stdout(), options.seed, prefix="tiny/" if size == "tiny" else "")
        if options.child:
            self.children[options.child[0]](report, plan, options.child[1:])
            return 0
        names = options.part or list(self.parts)
        reason = self.unable(names)
        if reason:
            say(reason)
            return 1

        import torch

        say(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
        status, started = 0, time.monotonic()
        for name in names:
            begin = time.monotonic()
            say(name)
            try:
                self.parts[name](report, plan)
            except Exception as problem:
                # The exit status tells.
                say(f"  {name} could not be measured: {type(problem).__name__}: {problem}")
                status = 1
                if name in self.decisive:
                    break
            say(f"  ({time.monotonic() - begin:.0f} s)")
        say(f"{report.written} results in {time.monotonic() - started:.0f} s")
        return status

    def child_command(self, report: Report, plan: Any, *what: str) -> list[str]:
        """The command line of a process of its own, of the same size and seed."""
        (size,) = (name for name, one in self.sizes.items() if one is plan)
        option = [] if size == "full" else [f"--{size}"]
        start = [sys.executable, str(BOOTSTRAP), str(self.file)]
        return [*start, "--seed", str(report.seed), *option, "--child", *what]

    def child(self, report: Report, plan: Any, *what: str) -> list[dict]:
        """Run a process of its own; the JSON objects it printed. Raises RuntimeError when it failed."""
        command = self.child_command(report, plan, *what)
        result = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
        if result.returncode:
            raise RuntimeError(f"{self.file.name} {' '.join(what)} failed with exit status {result.returncode}")
        return [json.loads(line) for line in result.stdout.splitlines()]

    def forward(self, report: Report, plan: Any, *what: str) -> None:
        """Report the lines of a process of its own as if this one had measured them."""
        for line in self.child(report, plan, *what):
            del line["seed"]  # the report says it again
            line["name"] = line["name"].removeprefix(report.prefix)
            report.line(**line)
