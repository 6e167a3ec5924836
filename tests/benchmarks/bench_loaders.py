"""How reading generators holds out: ``python run.py bench loaders [--quick]``, one JSON object a line.

    attacks  every hostile stream of pickle_streams.py: how many are not refused for their reason, or run anything
    fuzz     damaged pickles (flipped and changed bytes, truncations, other, swapped, repeated, missing and spliced
             instructions): crashes, errors that are no refusal, code that ran, memory, time of the slowest
    others   the same of damaged rosinality checkpoints (both formats of torch) and safetensors
    speed    seconds to read a pickle of a network of 256 pixels, over those to read the same weights as safetensors

Attacks and fuzzing run in processes of their own, so that a crash of the interpreter is a result as well; what runs is
watched through Python's audit events. A failing case can be made again from the seed and its number, which are said.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .reporting import Benchmark, Report, interleave, peak_memory, say

HERE = Path(__file__).resolve()
# What only code that runs does; the rest of a read, opening its file included, raises other events.
ACTS = ("exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.remove",
        "os.rename", "os.mkdir", "os.chmod", "os.putenv", "os.startfile", "subprocess.", "socket.", "ctypes.",
        "marshal.", "pickle.", "shutil.", "webbrowser.", "urllib.")  # fmt: skip
GENERATORS = {
    "tiny": {"resolution": 8, "channels": (6, 4), "z_dim": 5, "w_dim": 7, "mapping_layers": 2},
    "256": {"resolution": 256, "channels": (512, 512, 512, 512, 512, 256, 128)},  # the published widths
}


@dataclass(frozen=True)
class Plan:
    cases: int
    others: int
    processes: int
    rounds: int
    budget_s: float
    generator: str = "256"


FULL = Plan(cases=24_000, others=4_000, processes=4, rounds=15, budget_s=300)
QUICK = Plan(cases=4_000, others=1_000, processes=2, rounds=7, budget_s=60)
TINY = Plan(cases=60, others=40, processes=2, rounds=3, budget_s=10, generator="tiny")


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """What ran within, from now on: (event, arguments)."""
    seen: list[tuple[str, str]] = []
    on = [True]

    def hook(event: str, arguments: tuple) -> None:
        if on[0] and event.startswith(ACTS):
            seen.append((event, str(arguments)[:120]))

    sys.addaudithook(hook)
    try:
        yield seen
    finally:
        on[0] = False


def _warm(path: Path) -> None:
    """What reading and refusing import late is imported now, the code page of zip's names included."""
    from indomain_guidance.guidance.files import FileProblem, read_generator

    from . import pickle_streams as streams

    "".encode("cp437")
    # None of them large: the peak of memory until here is what the growth counts from.
    for data in (streams.dump(streams.snapshot()), streams.dump(streams.Raw(b"NN0")), b"PK\x03\x04broken"):
        path.write_bytes(data)
        try:
            read_generator(path)
        except FileProblem:
            continue


# -------------------------------------------------------------------------------------------------------------- attacks


def part_attacks(report: Report, plan: Plan) -> None:
    (result,) = BENCHMARK.child(report, plan, "attacks")
    for text in result["wrong"]:
        say(f"  {text}")
    report.line("attacks/not_refused_for_their_reason", len(result["wrong"]), "attacks", samples=result["attacks"],
                target=0)  # fmt: skip
    report.line("attacks/events_of_running_code", result["ran"], "events", samples=result["attacks"], target=0)
    report.line("attacks/slowest", result["slowest"], "s", samples=result["attacks"], which=result["which"])


def child_attacks(report: Report, plan: Plan, arguments: Sequence[str]) -> None:
    from indomain_guidance.guidance.files import FileProblem, read_generator

    from . import pickle_streams as streams

    attacks, wrong, slowest = streams.attacks(), [], (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pkl"
        _warm(path)
        with watched() as seen:
            for name, (data, reason) in attacks.items():
                path.write_bytes(data)
                begin = time.process_time()
                try:
                    read_generator(path)
                    text = ""
                except FileProblem as problem:
                    text = str(problem)
                slowest = max(slowest, (time.process_time() - begin, name))
                if not re.search(reason, text):
                    wrong.append(f"{name}: expected {reason}, found {text or 'nothing refused'}")
    result = {"attacks": len(attacks), "wrong": wrong, "ran": len(seen), "slowest": slowest[0], "which": slowest[1]}
    print(json.dumps(result), file=report.stream, flush=True)


# ----------------------------------------------------------------------------------------------------------------- fuzz


def part_fuzz(report: Report, plan: Plan) -> None:
    _fuzz(report, plan, "fuzz", plan.cases)


def part_others(report: Report, plan: Plan) -> None:
    _fuzz(report, plan, "others", plan.others)


def _fuzz(report: Report, plan: Plan, what: str, cases: int) -> None:
    """Several processes one after the other, each with its share of the cases; a process that dies is a crash."""
    share, crashes, total = cases // plan.processes, 0, Counter()
    slowest, growth = 0.0, 0.0
    for index in range(plan.processes):
        command = BENCHMARK.child_command(report, plan, what, str(index), str(share))
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode or not lines or "done" not in lines[-1]:
            crashes += 1
            say(f"  process {index} of seed {report.seed} ended with {done.returncode}")
            continue
        result = lines[-1]
        for text in result["problems"]:
            say(f"  {text}")
        total.update(result["counts"])
        slowest, growth = max(slowest, result["slowest"]), max(growth, result["growth"])
        say(f"  {(index + 1) * share} of {cases} cases")
    done = sum(total[key] for key in ("refused", "read", "error"))
    report.line(f"{what}/crashes", crashes, "processes", samples=plan.processes, target=0)
    report.line(f"{what}/errors_that_are_no_refusal", total["error"], "cases", samples=done, target=0)
    report.line(f"{what}/events_of_running_code", total["ran"], "events", samples=done, target=0)
    report.line(f"{what}/cases", done, "cases", samples=done, target=share * plan.processes, better="higher")
    report.line(f"{what}/refused", total["refused"] / max(done, 1), "share", samples=done, better="higher")
    report.line(f"{what}/memory_growth", growth / 1e6, "MB", samples=plan.processes, target=64)
    report.line(f"{what}/slowest", slowest, "s", samples=done, target=2)


def child_fuzz(report: Report, plan: Plan, arguments: Sequence[str]) -> None:
    """`INDEX COUNT`: that many damaged network pickles."""
    from . import pickle_streams as streams

    generator = streams.filled()
    originals = [streams.dump(streams.snapshot(generator), protocol) for protocol in (2, 3, 4, 5)]
    index, count = map(int, arguments)
    _read_damaged(report, index, count, originals, streams.damaged(originals, seed=report.seed * 1000 + index))


def child_others(report: Report, plan: Plan, arguments: Sequence[str]) -> None:
    """`INDEX COUNT`: that many damaged checkpoints and safetensors."""
    import io

    import torch
    from indomain_guidance.guidance.files import write_generator
    from safetensors.torch import load_file

    from . import pickle_streams as streams

    golden = load_file(HERE.parents[1] / "guidance" / "files" / "golden" / "rosinality.safetensors")
    weights = {key.removeprefix("g_ema."): value for key, value in golden.items() if key.startswith("g_ema.")}
    originals = []
    for zipped in (True, False):
        out = io.BytesIO()
        torch.save({"g_ema": weights, "latent_avg": golden["latent_avg"]}, out, _use_new_zipfile_serialization=zipped)
        originals.append(out.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        originals.append(write_generator(Path(folder) / "own.safetensors", streams.filled()).read_bytes())
    index, count = map(int, arguments)
    _read_damaged(report, index, count, originals, streams.damaged_bytes(originals, seed=report.seed * 1000 + index))


def _read_damaged(
    report: Report, index: int, count: int, originals: Sequence[bytes], damage: Iterator[tuple[str, bytes]]
) -> None:
    """Print the counts; growth is of this process's peak memory while the damaged files are read."""
    from indomain_guidance.guidance.files import FileProblem, read_generator

    counts, problems, slowest = Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pkl"
        _warm(path)
        for data in originals:
            path.write_bytes(data)
            read_generator(path)
        before = peak_memory()
        with watched() as seen:
            for case in range(count):
                kind, data = next(damage)
                path.write_bytes(data)
                begin = time.process_time()
                try:
                    read_generator(path)
                    counts["read"] += 1
                except FileProblem:
                    counts["refused"] += 1
                except Exception as problem:
                    counts["error"] += 1
                    problems.append(f"process {index}, case {case} ({kind}): {type(problem).__name__}: {problem}")
                slowest = max(slowest, time.process_time() - begin)
                if seen:
                    counts["ran"] += len(seen)
                    problems.append(f"process {index}, case {case} ({kind}) ran {seen[0]}")
                    seen.clear()
    result = {"done": True, "counts": counts, "problems": problems[:20], "slowest": slowest,
              "growth": peak_memory() - before}  # fmt: skip
    print(json.dumps(result), file=report.stream, flush=True)


# ---------------------------------------------------------------------------------------------------------------- speed


def part_speed(report: Report, plan: Plan) -> None:
    from indomain_guidance.guidance.files import read_generator, write_generator
    from indomain_guidance.guidance.networks.stylegan2 import GeneratorConfig, random_generator

    from . import pickle_streams as streams

    generator = random_generator(GeneratorConfig(**GENERATORS[plan.generator]), report.seed).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        pickled = Path(folder) / "network.pkl"
        pickled.write_bytes(streams.dump(streams.snapshot(generator)))
        plain = write_generator(Path(folder) / "plain.safetensors", generator)
        size = pickled.stat().st_size
        times = interleave(
            {"pickle": lambda: read_generator(pickled), "safetensors": lambda: read_generator(plain)}, plan.rounds,
            budget_s=plan.budget_s, what="reading",
        )  # fmt: skip
    report.median("speed/pickle", times.seconds["pickle"], "s", megabytes=size / 1e6)
    report.median("speed/safetensors", times.seconds["safetensors"], "s")
    report.median("speed/pickle_over_safetensors", times.ratios("pickle", "safetensors"), "ratio")


BENCHMARK = Benchmark(
    "loaders", __doc__, HERE, {"full": FULL, "quick": QUICK, "tiny": TINY},
    {"attacks": part_attacks, "fuzz": part_fuzz, "others": part_others, "speed": part_speed},
    {"attacks": child_attacks, "fuzz": child_fuzz, "others": child_others}, quick="about two minutes",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(sys.argv[1:]))
