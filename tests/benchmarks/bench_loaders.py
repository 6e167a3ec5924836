"""How reading files of strangers holds out: ``python run.py bench loaders [--quick]``, one JSON object a line.

    attacks  every hostile stream of pickle_streams.py: how many are not refused for their reason, or run anything
    READER   hostile and damaged inputs of one kind: generators, domain_files, loras, bases, run_checkpoints, shards,
             pictures, settings, content_indices, cached_latents, logs. Of each: how many ran anything; how many ended
             without a sentence that names the file (a crash, another error than the project's own, a word that cannot
             be shown, or silence where something was lost); how many took more than 10 s, or 500 MB over the file's
             size
    total    the same of all readers together
    speed    seconds to read a pickle of a network of 256 pixels, over those to read the same weights as safetensors

Inputs are read in processes of their own, so that a crash of the interpreter or an endless loop is a result as well;
what runs is watched through Python's audit events. Each input follows from the seed and its number (but for addresses
and paths that torch and runs write into their files); those that fail are kept in output/hostile_inputs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .reporting import Benchmark, Report, interleave, say

HERE = Path(__file__).resolve()
KEEP = HERE.parents[2] / "output" / "hostile_inputs"
GENERATORS = {
    "tiny": {"resolution": 8, "channels": (6, 4), "z_dim": 5, "w_dim": 7, "mapping_layers": 2},
    "256": {"resolution": 256, "channels": (512, 512, 512, 512, 512, 256, 128)},  # the published widths
}
FAULTS = {"ran": "ran anything", "said": "no sentence that names the file", "slow": "over 10 s", "large": "over 500 MB"}
SHARES = {
    "generators": 24_000,
    "domain_files": 9_000,
    "loras": 4_000,
    "bases": 3_000,
    "run_checkpoints": 4_000,
    "shards": 14_000,
    "pictures": 14_000,
    "settings": 14_000,
    "content_indices": 9_000,
    "cached_latents": 4_000,
    "logs": 5_000,
}
MOST_WALL_S = 120.0  # for one input, of a process that sleeps instead of working
MOST_RESTARTS = 40  # of one reader's processes; beyond them it has failed altogether
SHOWN = 12  # failures of one reader that are told of


@dataclass(frozen=True)
class Plan:
    inputs: dict[str, int]
    rounds: int
    budget_s: float
    generator: str = "256"
    every_attack: int = 1  # every how manyth is tried


FULL = Plan(SHARES, rounds=15, budget_s=300)
QUICK = Plan({name: max(count // 10, 500) for name, count in SHARES.items()}, rounds=7, budget_s=60)
TINY = Plan(dict.fromkeys(SHARES, 8), rounds=3, budget_s=10, generator="tiny", every_attack=8)


# -------------------------------------------------------------------------------------------------------------- attacks


def part_attacks(report: Report, plan: Plan) -> None:
    (result,) = BENCHMARK.child(report, plan, "attacks")
    for text in result["wrong"]:
        say(f"  {text}")
    report.line(
        "attacks/not_refused_for_their_reason", len(result["wrong"]), "attacks", samples=result["attacks"], target=0
    )
    report.line("attacks/events_of_running_code", result["ran"], "events", samples=result["attacks"], target=0)
    report.line("attacks/slowest", result["slowest"], "s", samples=result["attacks"], which=result["which"])


def child_attacks(report: Report, plan: Plan, arguments: Sequence[str]) -> None:
    from indomain_guidance.guidance.files import FileProblem, read_generator

    from . import pickle_streams as streams
    from .hostile_inputs.models import Generators
    from .hostile_inputs.worker import Watch

    attacks = dict(list(streams.attacks().items())[:: plan.every_attack])
    wrong, ran, slowest = [], 0, (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pkl"
        watch = Watch(Path(folder))
        Generators(Path(folder)).warm()
        for name, (data, reason) in attacks.items():
            path.write_bytes(data)
            begin = time.process_time()
            with watch.watching() as seen:
                try:
                    read_generator(path)
                    text = ""
                except FileProblem as problem:
                    text = str(problem)
            ran += len(seen)
            slowest = max(slowest, (time.process_time() - begin, name))
            if not re.search(reason, text):
                wrong.append(f"{name}: expected {reason}, found {text or 'nothing refused'}")
    result = {"attacks": len(attacks), "wrong": wrong, "ran": ran, "slowest": slowest[0], "which": slowest[1]}
    print(json.dumps(result), file=report.stream, flush=True)


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass
class Tally:
    """What became of one reader's inputs."""

    outcomes: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[float, str] = (0.0, "")
    told: int = 0

    @property
    def inputs(self) -> int:
        return sum(self.outcomes.values())

    def add(self, other: Tally) -> None:
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.slowest, self.largest = max(self.slowest, other.slowest), max(self.largest, other.largest)

    def case(self, reader: str, result: dict, kind: str) -> None:
        """One input's result, as the worker prints it."""
        name = f"{reader} {result['case']} ({kind})"
        self.outcomes[result["outcome"]] += 1
        self.slowest = max(self.slowest, (result["seconds"], name))
        self.largest = max(self.largest, (result["over"], name))
        for fault, text in result.get("faults", {}).items():
            self.fault(name, fault, text)

    def fault(self, name: str, fault: str, text: str) -> None:
        self.faults[fault] += 1
        self.told += 1
        if self.told <= SHOWN:
            say(f"  {name}: {FAULTS[fault]}: {text}")
        elif self.told == SHOWN + 1:
            say("  and more of them, which are not told")

    def report(self, report: Report, name: str, planned: int) -> None:
        count = self.inputs
        report.line(f"{name}/inputs", count, "inputs", samples=count, target=planned, better="higher")
        for fault, line in (
            ("ran", "ran_anything"),
            ("said", "without_a_sentence"),
            ("slow", "over_10_s"),
            ("large", "over_500_MB"),
        ):
            report.line(f"{name}/{line}", self.faults[fault], "inputs", samples=count, target=0)
        report.line(
            f"{name}/refused", self.outcomes["refused"] / max(count, 1), "share", samples=count, better="higher"
        )
        report.line(f"{name}/slowest", self.slowest[0], "s", samples=count, which=self.slowest[1][:120])
        report.line(f"{name}/largest", self.largest[0] / 1e6, "MB", samples=count, which=self.largest[1][:120])


TOTAL = Tally()


def reader_part(name: str):
    """The part of one reader."""

    def part(report: Report, plan: Plan) -> None:
        tally, count = read_all(report, plan, name), plan.inputs[name]
        tally.report(report, name, count)
        TOTAL.add(tally)

    return part


def part_total(report: Report, plan: Plan) -> None:
    """All readers that were measured in this process."""
    if TOTAL.inputs:
        TOTAL.report(report, "total", sum(plan.inputs.values()))


def read_all(report: Report, plan: Plan, reader: str) -> Tally:
    """Have a process read all inputs of a reader; where it dies or hangs, another goes on behind that input."""
    tally, next_, count = Tally(), 0, plan.inputs[reader]
    for _ in range(MOST_RESTARTS):
        worker = Worker(BENCHMARK.child_command(report, plan, "inputs", reader, str(next_), str(count)), reader, tally)
        problem = worker.follow()
        if problem is None:
            return tally
        fault, text = problem
        at = worker.begun
        if at is None:
            raise RuntimeError(f"the process that reads {reader} did not come to its first input: {text}")
        name = f"{reader} {at} ({worker.kind})"
        tally.outcomes["ended"] += 1
        tally.fault(name, fault, text)
        next_ = at + 1
    raise RuntimeError(f"{reader}: gave up after {MOST_RESTARTS} processes had died, at input {next_} of {count}")


class Worker:
    """A process that reads inputs, and the one that it is at."""

    def __init__(self, command: list[str], reader: str, tally: Tally) -> None:
        self.reader, self.tally = reader, tally
        self.begun: int | None = None
        self.kind, self.ready, self.done = "", False, False
        self.since, self.cpu = time.monotonic(), 0.0
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
        self.listener = threading.Thread(target=self._listen, daemon=True)

    def follow(self) -> tuple[str, str] | None:
        """None when all inputs were read; (fault, what happened) when the process died or had to be ended."""
        self.listener.start()
        said = time.monotonic()
        try:
            while self.process.poll() is None:
                self.listener.join(0.25)
                overdue = self._overdue()
                if overdue:
                    return "slow", overdue
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    say(f"  {self.tally.inputs} inputs")
            self.listener.join()
            return (
                None
                if self.done and self.process.returncode == 0
                else ("said", f"the process ended with {self.process.returncode}")
            )
        finally:
            self.process.kill()
            self.process.communicate()

    def _overdue(self) -> str:
        from .hostile_inputs.worker import MOST_SECONDS

        begun, wall = self.begun, time.monotonic() - self.since
        if not self.ready or wall < MOST_SECONDS:
            return "" if self.ready or wall < 10 * MOST_WALL_S else "it was not ready in time"
        used = self._cpu() - self.cpu
        if self.begun != begun or self.done or (used < MOST_SECONDS + 2 and wall < MOST_WALL_S):
            return ""
        return f"did not end within {used:.0f} s of the processor, {wall:.0f} s in all"

    def _cpu(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    def _listen(self) -> None:
        for line in self.process.stdout:
            values = json.loads(line)
            if "begun" in values:
                self.cpu, self.since = self._cpu(), time.monotonic()
                self.begun, self.kind = values["begun"], values["kind"]
            elif "case" in values:
                self.tally.case(self.reader, values, self.kind)
            self.ready, self.done = True, "done" in values


def child_inputs(report: Report, plan: Plan, arguments: Sequence[str]) -> None:
    """`READER FIRST END`: the inputs from number FIRST to below END."""
    from .hostile_inputs import worker
    from .hostile_inputs.checkpoints import RunCheckpoints
    from .hostile_inputs.indices import CachedLatents, ContentIndices, Logs
    from .hostile_inputs.models import Bases, DomainFiles, Generators, Loras
    from .hostile_inputs.pictures import Pictures
    from .hostile_inputs.settings import Settings
    from .hostile_inputs.shards import Shards

    kinds = (
        Generators,
        DomainFiles,
        Loras,
        Bases,
        RunCheckpoints,
        Shards,
        Pictures,
        Settings,
        ContentIndices,
        CachedLatents,
        Logs,
    )
    (kind,) = (kind for kind in kinds if kind.name == arguments[0])
    with worker.private_folder(kind.name) as folder:
        reader = kind(folder)
        with worker.limited_memory():
            worker.run(reader, report.seed, range(*map(int, arguments[1:])), KEEP, report.stream)
    print(json.dumps({"done": True}), file=report.stream, flush=True)


# ---------------------------------------------------------------------------------------------------------------- speed


def part_speed(report: Report, plan: Plan) -> None:
    from indomain_guidance.guidance.files import read_generator, write_generator
    from indomain_guidance.guidance.networks.stylegan2 import random_generator
    from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig

    from . import pickle_streams as streams

    generator = random_generator(GeneratorConfig(**GENERATORS[plan.generator]), report.seed).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        pickled = Path(folder) / "network.pkl"
        pickled.write_bytes(streams.dump(streams.snapshot(generator)))
        plain = write_generator(Path(folder) / "plain.safetensors", generator)
        size = pickled.stat().st_size
        times = interleave(
            {"pickle": lambda: read_generator(pickled), "safetensors": lambda: read_generator(plain)},
            plan.rounds,
            budget_s=plan.budget_s,
            what="reading",
        )
    report.median("speed/pickle", times.seconds["pickle"], "s", megabytes=size / 1e6)
    report.median("speed/safetensors", times.seconds["safetensors"], "s")
    report.median("speed/pickle_over_safetensors", times.ratios("pickle", "safetensors"), "ratio")


BENCHMARK = Benchmark(
    "loaders",
    __doc__,
    HERE,
    {"full": FULL, "quick": QUICK, "tiny": TINY},
    {"attacks": part_attacks, **{name: reader_part(name) for name in SHARES}, "total": part_total, "speed": part_speed},
    {"attacks": child_attacks, "inputs": child_inputs},
    quick="about ten minutes",
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(sys.argv[1:]))
