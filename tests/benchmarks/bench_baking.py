"""What a baked LoRA costs and saves: ``python run.py bench baking [--quick]``, one JSON object a line.

    verify    plain CFG with the LoRA merged computes CFG of the merged weights, and guidance its three predictions
    sampling  a step of plain CFG with a merged LoRA over the prior's plain CFG and over in-domain guidance (three
              predictions, the `constant` domain model); SD 1.5, random weights, the library's UNet
    training  an optimizer step of baking (LoRA of rank 16 on all layers, three predictions of the guidance beside it)
              over a step of training a domain model of the same shape and batch (`training_models.SHAPES`)
    counts    floating point operations of a baking step of SD 1.5 at 512 px, counted without computing them

Times are interleaved in one process, ratios are medians over pairs, "interval" holds their median with 95 %
confidence.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from .reporting import Benchmark, Report, interleave

SCALE, DOMAIN_WEIGHT, RANK = 3.0, 1.5, 16


@dataclass(frozen=True)
class Plan:
    """How much to measure. Budgets are seconds after which a race stops, with at least three rounds."""

    shape: str
    side: int  # of the latents
    batch: int
    rounds: int
    budget: float
    tiny: bool = False


FULL = Plan("sd15", 32, 2, 24, math.inf)
QUICK = Plan("sd15", 32, 2, 12, 60.0)
# Shows that everything runs, in seconds. The numbers mean nothing, and their names say so.
TINY = Plan("tiny", 8, 2, 3, math.inf, tiny=True)


def part_verify(report: Report, plan: Plan) -> None:
    """Raises RuntimeError where a merged LoRA is not its module, or a contestant asks for other predictions."""
    from . import baking_models as made

    models = made.Sampling(plan.shape, report.seed)
    error = models.merged_error(plan.side)
    report.line("verify/merged_over_module", error, "relative", samples=1, target=1e-4)
    if not error < 1e-4:
        raise RuntimeError(f"expected a merged LoRA to compute what its module does, relative error {error:.2g}")
    for name, expected in {"plain": 2, "baked": 2, "guidance": 3}.items():
        found = models.samples(name, plan.side)
        report.line(f"verify/samples/{name}", found, "per step", samples=1)
        if found != expected:
            raise RuntimeError(f"expected {expected} predictions a step of {name}, found {found}")


def part_sampling(report: Report, plan: Plan) -> None:
    from . import baking_models as made

    models = made.Sampling(plan.shape, report.seed)
    what = f"sampling/{plan.shape}/{plan.side}x{plan.side}"
    steps = {name: models.step(name, plan.side) for name in ("plain", "baked", "guidance")}
    times = interleave(steps, plan.rounds, budget_s=plan.budget, what=what)
    for name, target in (("plain", 1.0), ("guidance", 0.70)):
        report.median(
            f"{what}/baked_over_{name}",
            times.ratios("baked", name),
            "ratio",
            target=target,
            baked_s=times.median("baked"),
            other_s=times.median(name),
        )


def part_training(report: Report, plan: Plan) -> None:
    from . import baking_models as made

    what = f"training/{plan.shape}/{plan.side}x{plan.side}"
    sides = made.trainers(plan.shape, plan.side, plan.batch, report.seed)
    times = interleave(sides, plan.rounds, budget_s=plan.budget, what=what)
    report.median(
        f"{what}/baking_over_training",
        times.ratios("baking", "training"),
        "ratio",
        target=2.2,
        baking_s=times.median("baking"),
        training_s=times.median("training"),
    )


def part_counts(report: Report, plan: Plan) -> None:
    from . import baking_models as made

    count = made.operations(plan.shape, 8 if plan.tiny else 64)
    report.line(f"counts/{plan.shape}/baking", count / 1e12, "TFLOP per picture", samples=1)


BENCHMARK = Benchmark(
    "baking",
    __doc__,
    Path(__file__).resolve(),
    {"full": FULL, "quick": QUICK, "tiny": TINY},
    {"verify": part_verify, "sampling": part_sampling, "training": part_training, "counts": part_counts},
    decisive=("verify",),
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(sys.argv[1:]))
