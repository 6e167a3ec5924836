"""What interruptions cost: ``python run.py bench faults [--quick]``, one JSON object a line.

    kills       trainings and adaptations of the mini world from the command line, killed (SIGKILL) at drawn moments,
                while they start, learn and write files, and gone on with: how many do not end with the bits of a run
                that was never disturbed (weights, average, optimizer, plan, finished file, losses, pictures), and
                whether anything half-written stays
    interrupts  prompts of every kind on one ComfyUI server (sampling, guidance terms, generators, training, adapting,
                mistakes) with interrupts and deletions at drawn moments: how many are lost, how many end otherwise than
                they should, and how much main memory the server holds at the end over that after its warm-up

Every drawn moment follows from the seed; what the moment hits depends on the machine.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .reporting import Benchmark, Report, say

HERE = Path(__file__).resolve()


@dataclass(frozen=True)
class Plan:
    """kinds: of runs that are killed. kills: of each, at most `per_run` of one run. prompts: readings of memory every
    `every` of them; those after `warm` prompts and before as many from the end as are compared with it count as the
    beginning."""

    kinds: tuple[str, ...]
    kills: int
    per_run: int
    prompts: int
    warm: int
    every: int


KINDS = ("train", "adapt")
FULL = Plan(KINDS, kills=50, per_run=5, prompts=1000, warm=150, every=25)
QUICK = Plan(KINDS, kills=5, per_run=5, prompts=100, warm=40, every=10)
TINY = Plan(("adapt",), kills=1, per_run=1, prompts=12, warm=4, every=4)
COMPARED = 6  # readings at the beginning and at the end, of whose medians the growth is


def part_kills(report: Report, plan: Plan) -> None:
    from . import killed_runs as runs

    with tempfile.TemporaryDirectory(prefix="indomain-faults-") as name:
        folder = Path(name)
        runs.draw_digits(folder)
        for kind in plan.kinds:
            kill_runs(report, plan, folder, kind)


def kill_runs(report: Report, plan: Plan, folder: Path, kind: str) -> None:
    from . import killed_runs as runs

    (folder / f"{kind}-whole").mkdir()
    start_s, step_s = runs.undisturbed(folder / f"{kind}-whole", kind)
    whole = runs.bits(folder / f"{kind}-whole" / "runs" / kind)
    kills, different, moments, number = 0, 0, Counter(), 0
    while kills < plan.kills and number < 3 * plan.kills:
        dice = random.Random(f"{report.seed} {kind} {number}")
        place = folder / f"{kind}-{number}"
        place.mkdir()
        outcome = runs.killed(place, kind, min(plan.per_run, plan.kills - kills), dice, start_s, step_s)
        differences = runs.compare(whole, runs.bits(place / "runs" / kind))
        kills += outcome.kills
        moments.update(moment.partition(",")[0] for moment in outcome.moments)
        if differences:
            different += 1
            say(f"  {kind} {number}, killed {'; '.join(outcome.moments)}: differs in {', '.join(differences)}")
        number += 1
        say(f"  {kind}: {kills} kills")
    report.line(f"kills/{kind}/kills", kills, "kills", samples=number, target=plan.kills, better="higher")
    report.line(f"kills/{kind}/while_a_file_was_written", moments["writing"], "kills", samples=kills, better="higher")
    report.line(f"kills/{kind}/not_the_same_bits", different, "runs", samples=number, target=0)


def part_interrupts(report: Report, plan: Plan) -> None:
    from indomain_guidance.nodes.host.server import ComfyServer

    from .interrupted_prompts import Disturber

    with ComfyServer(Path(os.environ["INDOMAIN_COMFYUI_PATH"]), flags=["--preview-method", "auto"]) as server:
        disturber = Disturber(server, random.Random(f"{report.seed} prompts"))
        memory: list[tuple[int, int]] = []
        for count in range(plan.every, plan.prompts + 1, plan.every):
            disturber.run(count)
            memory.append((count, disturber.memory()))
            say(f"  {count} prompts, {memory[-1][1] / 1e6:.0f} MB: {disturber.told()}")
        alive = disturber.answers()
    settled = [size for count, size in memory if count >= plan.warm]
    compared = max(1, min(COMPARED, len(settled) // 2))
    before, after = (statistics.median(part) for part in (settled[:compared], settled[-compared:]))
    ends, count = disturber.ends, plan.prompts
    for text in disturber.wrong[:20]:
        say(f"  {text}")
    report.line("interrupts/prompts", sum(ends.values()), "prompts", samples=count, target=count, better="higher")
    report.line("interrupts/lost", ends["lost"], "prompts", samples=count, target=0)
    report.line("interrupts/ended_otherwise_than_they_should", len(disturber.wrong), "prompts", samples=count, target=0)
    report.line("interrupts/interrupts", disturber.interrupts, "interrupts", samples=count, better="higher")
    for end in ("success", "interrupted", "deleted", "error", "refused"):
        report.line(f"interrupts/{end}", ends[end], "prompts", samples=count)
    report.line("interrupts/answers_at_the_end", float(alive), "server", samples=1, target=1, better="higher")
    report.line("interrupts/memory_after_warm_up", before / 1e6, "MB", samples=compared)
    report.line("interrupts/memory_growth", after / before - 1.0, "share", samples=compared, target=0.01)


def unable(parts: Collection[str]) -> str | None:
    if "interrupts" in parts and not os.environ.get("INDOMAIN_COMFYUI_PATH"):
        return "The part interrupts needs a ComfyUI: start it with `python run.py bench faults`."
    return None


BENCHMARK = Benchmark(
    "faults",
    __doc__,
    HERE,
    {"full": FULL, "quick": QUICK, "tiny": TINY},
    {"kills": part_kills, "interrupts": part_interrupts},
    unable=unable,
    quick="about five minutes",
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(sys.argv[1:]))
