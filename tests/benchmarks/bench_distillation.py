"""What a step of distillation costs: ``python run.py bench distillation [--quick]``, JSON lines on standard output.

    verify   the released order of operations and this project's step compute the same gradients on the same draws, in
             the mode that reproduces the release (judged at the generator's size and at others, with few and with most
             pixels beyond -1..1), and in the default mode without clamps on one noise (tiny models)
    step     seconds of an optimizer step with the directional regularizer over those of the step organised as
             StyleGAN-Fusion was released (4 encodings, 6 UNet samples in 3 calls): StyleGAN2 at 256 px, SD 1.5's
             topology with random weights, latents 32x32, batch 1, fp32; and what each step asks of the models
    memory   peak main memory of a step above the resident weights, gradients and optimizer, in processes of their own

Times are interleaved, ratios are medians over pairs, "interval" holds their median with 95 % confidence.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .reporting import Benchmark, Report, interleave, peak_memory, resident_memory, restart_peak

DEFAULT, REPRODUCED, RELEASED = "default mode", "sgf mode", "as released"
SIDES = {DEFAULT: "default", REPRODUCED: "sgf", RELEASED: "released"}
MEMORY_STEPS = 2
SIDES_PX = (32, 64, 96)  # at which a generator of 64 px is judged
SPREADS = (0.2, 0.5, 100.0)  # of the images: few, half and nearly all values beyond -1..1
SAME = 1e-4


@dataclass(frozen=True)
class Plan:
    """How much to measure. budget: seconds after which the race stops, with at least three rounds."""

    shape: str
    rounds: int
    budget: float


FULL = Plan("sd15_256px", rounds=24, budget=math.inf)
QUICK = Plan("sd15_256px", rounds=8, budget=300.0)
TINY = Plan("tiny", rounds=3, budget=math.inf)


def contestant(name: str, models: object, seed: int) -> object:
    from . import distillation_models as made

    if name == RELEASED:
        return made.Released(models, seed=seed)
    return made.Ours(models, "shared" if name == DEFAULT else "sgf", seed=seed)


def part_verify(report: Report, plan: Plan) -> None:
    """Both sides' gradients on the same latents, timesteps and noise."""
    import torch

    from . import distillation_models as made

    shape = made.SHAPES["tiny"]
    z = torch.randn(1, shape.generator.z_dim, generator=torch.Generator().manual_seed(report.seed))
    for name, mode, clamps, side_px, spread in (
        *(("sgf_mode", "sgf", True, side_px, spread) for side_px in SIDES_PX for spread in SPREADS),
        ("default_mode_without_clamps", "shared", False, shape.generator.resolution, 1.0),
    ):
        models = made.Models(shape, report.seed, side_px, spread)
        draws = drawn(side_px // 8, report.seed, one_noise=not clamps)
        ours, theirs = (
            side.gradients(z, draws)
            for side in (made.Ours(models, mode, clamps, report.seed), made.Released(models, clamps, report.seed))
        )
        error, beyond = difference(ours, theirs), float((models.generator(z).abs() > 1).float().mean())
        what = f"{name}/{side_px}px/spread_{spread:g}" if clamps else name
        if not error < SAME:
            raise RuntimeError(f"{what}: expected the same gradients of both sides, they differ by {error:.2g}")
        report.line(
            f"verify/{what}/gradient_difference", error, "relative", samples=len(ours), target=SAME, beyond=beyond
        )


def drawn(side: int, seed: int, one_noise: bool = False) -> object:
    """A timestep and the terms' noise for latents of a side."""
    import torch
    from indomain_guidance.guidance.distillation.objective import Draws

    generator = torch.Generator().manual_seed(seed + 1)
    one, other = (torch.randn(1, 4, side, side, generator=generator) for _ in range(2))
    return Draws(torch.tensor([300]), {"sds": one, "directional": one if one_noise else other})


def difference(found: dict, expected: dict) -> float:
    """Norm of the difference of all tensors together, over that of the expected."""
    if found.keys() != expected.keys():
        raise RuntimeError("expected both sides to train the same tensors, they do not")
    off = sum(float((found[key] - expected[key]).square().sum()) for key in found)
    return math.sqrt(off / sum(float(one.square().sum()) for one in expected.values()))


def part_step(report: Report, plan: Plan) -> None:
    from . import distillation_models as made

    models = made.Models(made.SHAPES[plan.shape], report.seed)
    sides = {name: contestant(name, models, report.seed) for name in SIDES}
    for name, side in sides.items():
        for what, count in asked(models, side.step).items():
            report.line(f"asked/{SIDES[name]}/{what}", count, "per step", samples=1)
    what = f"step/{plan.shape}"
    times = interleave({name: side.step for name, side in sides.items()}, plan.rounds, budget_s=plan.budget, what=what)
    for name, target in ((DEFAULT, 0.65), (REPRODUCED, None)):
        report.median(
            f"{what}/{SIDES[name]}_over_released",
            times.ratios(name, RELEASED),
            "ratio",
            target=target,
            ours_s=times.median(name),
            released_s=times.median(RELEASED),
        )


def asked(models: object, step: Callable[[], float]) -> dict[str, int]:
    """How often a step runs the models: encodings, those that are differentiated, UNet calls and samples in them."""
    counts = dict.fromkeys(("encodings", "encodings_differentiated", "unet_calls", "unet_samples"), 0)
    encoder = models.autoencoder.encoder

    def encoded(module: object, inputs: tuple) -> None:
        counts["encodings"] += 1
        counts["encodings_differentiated"] += bool(inputs[0].requires_grad)

    def predicted(module: object, inputs: tuple) -> None:
        counts["unet_calls"] += 1
        counts["unet_samples"] += len(inputs[0])

    hooks = [encoder.register_forward_pre_hook(encoded), models.unet.register_forward_pre_hook(predicted)]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def part_memory(report: Report, plan: Plan) -> None:
    found = {}
    for name in SIDES:
        (result,) = BENCHMARK.child(report, plan, "memory", name)
        found[name] = result["bytes"]
    for name, target in ((DEFAULT, 0.75), (REPRODUCED, None)):
        report.line(
            f"memory/{plan.shape}/{SIDES[name]}_over_released",
            found[name] / found[RELEASED],
            "ratio",
            samples=1,
            target=target,
            ours_gb=found[name] / 1e9,
            released_gb=found[RELEASED] / 1e9,
        )


def child_memory(report: Report, plan: Plan, arguments: Sequence[str]) -> None:
    """Peak memory of one side's steps above what lies there between steps: weights and the optimizer's state."""
    from . import distillation_models as made

    models = made.Models(made.SHAPES[plan.shape], report.seed)
    side = contestant(arguments[0], models, report.seed)
    side.step()  # makes the optimizer's state
    for one in side.parameters.values():
        one.grad = None
    before = resident_memory()
    restart_peak()
    for _ in range(MEMORY_STEPS):
        side.step()
    print(json.dumps({"bytes": peak_memory() - before}), file=report.stream, flush=True)


BENCHMARK = Benchmark(
    "distillation",
    __doc__,
    Path(__file__).resolve(),
    {"full": FULL, "quick": QUICK, "tiny": TINY},
    {"verify": part_verify, "step": part_step, "memory": part_memory},
    {"memory": child_memory},
    # Sides that do different work are not worth timing.
    decisive=("verify",),
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(sys.argv[1:]))
