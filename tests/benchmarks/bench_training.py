"""What training costs: ``python run.py bench training [--quick]``, one JSON object a line on standard output.

    verify   both sides do the same work: parameter counts, and outputs and gradients on the same weights and batch
    step     seconds of an optimizer step over those of diffusers' UNet2DConditionModel in the loop of diffusers' own
             text-to-image example: same topology, batch, precision (fp32), min-SNR weights, cached latents and text
    memory   peak main memory of each, above what its process holds before the model is built (measured with step)
    extras   what EMA, aspect-ratio buckets and checkpoints cost

SD 1.5 and SDXL, random weights, narrowed so that training fits (`training_models.SHAPES`). Every contestant lives in a
process of its own, two at a time, and they step in turns; ratios are medians over pairs of neighbouring steps,
"interval" holds their median with 95 % confidence. A contestant whose loss on a fixed batch does not fall is refused.

diffusers is needed by this benchmark alone: run.py keeps it in a folder of its own; `--part extras` runs without it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .reporting import Benchmark, Report, Times, interleave, peak_memory

TARGETS = {("sd15", "constant"): 0.95, ("sdxl", "constant"): 0.90}
# The command line's default distance between checkpoints.
CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class Plan:
    """How much to measure. Budgets are seconds after which a race stops, with at least three rounds."""

    sides: dict[str, tuple[tuple[int, int, float], ...]]  # shape -> (side of the latents, batch, budget)
    rounds: int
    extra_rounds: int
    extra_budget: float
    saves: int
    extra_shapes: tuple[str, ...] = ("sd15", "sdxl")
    tiny: bool = False


FULL = Plan(
    sides={"sd15": ((32, 2, math.inf), (64, 1, math.inf)), "sdxl": ((64, 1, math.inf), (128, 1, 3600.0))},
    rounds=24,
    extra_rounds=24,
    extra_budget=math.inf,
    saves=5,
)
# Below ten minutes on two cores, processes included: with about twice these budgets it took 18 on busy ones.
QUICK = Plan(
    sides={"sd15": ((32, 2, 35.0),), "sdxl": ((64, 1, 40.0),)}, rounds=12, extra_rounds=8, extra_budget=20.0, saves=2
)
# Shows that everything runs, in seconds. The numbers mean nothing, and their names say so.
TINY = Plan(
    sides={"sd15": ((8, 2, math.inf),), "sdxl": ((8, 2, math.inf),)},
    rounds=4,
    extra_rounds=3,
    extra_budget=math.inf,
    extra_shapes=("sd15",),
    saves=1,
    tiny=True,
)


def shapes(plan: Plan) -> dict:
    from . import training_models

    return training_models.TINY_SHAPES if plan.tiny else training_models.SHAPES


# ------------------------------------------------------------------------------------------------------------- a race


class Racer:
    """A contestant in a process of its own, told when to step."""

    def __init__(self, process: subprocess.Popen, name: str) -> None:
        self._process, self.name = process, name

    @cached_property
    def facts(self) -> dict:
        """Once it is ready: its parameters, and its loss before the first step."""
        return self._answer()

    def __call__(self) -> float:
        """One optimizer step; its loss."""
        return self._ask("step")["loss"]

    def finish(self, saves: int = 0) -> dict:
        """Its loss at the end, its peak memory, and what `saves` checkpoints took; raises when it has not learnt."""
        result = self._ask(f"end {saves}")
        before, after = self.facts["loss"], result["loss"]
        if not after < before:
            raise RuntimeError(f"expected '{self.name}' to learn, its loss went from {before:.4f} to {after:.4f}")
        return result

    def _ask(self, request: str) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"'{self.name}' ended by itself (exit status {self._process.wait()}); see above.")
        return json.loads(line)


@contextmanager
def racer(report: Report, plan: Plan, shape: str, name: str, side: int, batch: int) -> Iterator[Racer]:
    command = BENCHMARK.child_command(report, plan, "race", shape, name, str(side), str(batch))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        yield Racer(process, name)
    finally:
        process.kill()
        process.communicate()


def child_race(report: Report, plan: Plan, arguments: Sequence[str]) -> None:
    """Build a contestant, then do what standard input says."""
    import torch

    from . import training_models

    shape, name, side, batch = arguments[0], arguments[1], int(arguments[2]), int(arguments[3])
    if name.startswith("diffusers"):
        import diffusers  # noqa: F401 - code is not part of what training holds in memory
    torch.manual_seed(report.seed)
    before = peak_memory()
    contestant = training_models.CONTESTANTS[name](shapes(plan)[shape], side, batch, report.seed)

    def tell(**facts: Any) -> None:
        print(json.dumps(facts), file=report.stream, flush=True)

    tell(parameters=contestant.parameters, loss=contestant.loss())
    for request in sys.stdin:
        word, *rest = request.split()
        if word == "step":
            tell(loss=contestant.step())
        else:
            peak = peak_memory() - before
            tell(loss=contestant.loss(), peak=peak, **_checkpoints(contestant, int(rest[0])))
            return


def _checkpoints(contestant: Any, count: int) -> dict[str, Any]:
    """Seconds of each of `count` checkpoints, and the size of one in bytes."""
    from indomain_guidance.training.engine.checkpoints import save_checkpoint

    seconds, size = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            begin = time.perf_counter()
            path = save_checkpoint(Path(folder) / "step.ckpt", contestant.learner.state())
            seconds.append(time.perf_counter() - begin)
            size = path.stat().st_size
    return {"save_seconds": seconds, "save_bytes": size}


def race(
    report: Report,
    plan: Plan,
    shape: str,
    names: Sequence[str],
    side: int,
    batch: int,
    rounds: int,
    budget: float,
    saves: int = 0,
) -> tuple[Times, dict[str, dict]]:
    """Let contestants step in turns: their times, and what each said at the end, its parameters among it."""
    with ExitStack() as stack:
        racers = {name: stack.enter_context(racer(report, plan, shape, name, side, batch)) for name in names}
        started = {name: one.facts for name, one in racers.items()}  # both get ready at the same time
        times = interleave(racers, rounds, budget_s=budget, what=f"{shape} {side}x{side} {' / '.join(names)}")
        ends = {
            name: {**started[name], **one.finish(saves if name == names[-1] else 0)} for name, one in racers.items()
        }
    return times, ends


# -------------------------------------------------------------------------------------------------------------- verify


def part_verify(report: Report, plan: Plan) -> None:
    for shape in plan.sides:
        BENCHMARK.forward(report, plan, "verify", shape)


def child_verify(report: Report, plan: Plan, arguments: Sequence[str]) -> None:
    """Compare the full UNet with diffusers' on the same weights, and count the parameters of every form."""
    import torch

    from . import training_models as models

    (name,) = arguments
    shape, side = shapes(plan)[name], min(16, plan.sides[name][0][0])
    ours, theirs = models.Ours(shape, "full", side, 2, report.seed), models.Diffusers(shape, side, 2, report.seed)
    clean, noise, timesteps = ours._fixed
    noisy = clean + noise
    outputs = [one.predict(noisy, timesteps) for one in (ours, theirs)]
    errors = {"output": relative(outputs[1].detach(), outputs[0].detach())}
    key = "input_blocks.0.0.weight"
    for _one, output in zip((ours, theirs), outputs):
        (output - noise).square().mean().backward()
    errors["gradient"] = relative(theirs.unet.conv_in.weight.grad, dict(ours.learner.unet.named_parameters())[key].grad)
    for what, error in errors.items():
        if not error < 1e-3:
            raise RuntimeError(f"{name}: expected both UNets to compute the same, their {what} differs by {error:.2g}")
        report.line(f"verify/{name}/{what}_difference", error, "relative", samples=1, target=1e-3)
    del ours, theirs, outputs
    torch.manual_seed(report.seed)
    for form in ("full", "constant", "cached"):
        found = sum(one.numel() for one in models.unet_of(shape, form, report.seed).parameters())
        check_parameters(name, form, found, models.expected_parameters(shape, form))


def relative(found: Any, expected: Any) -> float:
    """Largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_parameters(shape: str, form: str, found: int, expected: int) -> None:
    """Raise RuntimeError unless a form trains exactly the parameters that it should."""
    if found != expected:
        raise RuntimeError(f"{shape} {form}: expected {expected} parameters to train, found {found}")


# ------------------------------------------------------------------------------------------------------ step and memory


def part_step(report: Report, plan: Plan) -> None:
    """Each form against diffusers, and `constant` also against diffusers with our way of running AdamW."""
    from . import training_models as models

    for shape, sides in plan.sides.items():
        forms = ("full", "constant", "cached")
        counts = {form: models.expected_parameters(shapes(plan)[shape], form) for form in forms}
        for number, (side, batch, budget) in enumerate(sides):
            memory: dict[str, int] = {}
            pairs = [("constant", "diffusers"), ("cached", "diffusers")]
            pairs += [("full", "diffusers"), ("constant", "diffusers, fused optimizer")] if number == 0 else []
            for form, rival in pairs:
                times, ends = race(report, plan, shape, (rival, form), side, batch, plan.rounds, budget)
                check_parameters(shape, rival, ends[rival]["parameters"], counts["full"])
                check_parameters(shape, form, ends[form]["parameters"], counts[form])
                target = TARGETS.get((shape, form)) if rival == "diffusers" else None
                suffix = "" if rival == "diffusers" else "_over_fused_optimizer"
                report.median(
                    f"step/{shape}/{side}x{side}/{form}{suffix}",
                    times.ratios(form, rival),
                    "ratio",
                    target=target,
                    ours_s=times.median(form),
                    diffusers_s=times.median(rival),
                    batch=batch,
                    parameters_share=counts[form] / counts["full"],
                )
                memory = {name: max(memory.get(name, 0), ends[name]["peak"]) for name in ends} | {
                    name: peak for name, peak in memory.items() if name not in ends
                }
            for name, peak in memory.items():
                report.line(
                    f"memory/{shape}/{side}x{side}/{name.replace(', ', '_').replace(' ', '_')}",
                    peak / 1e9,
                    "GB",
                    samples=1,
                    over_diffusers=peak / memory["diffusers"],
                    batch=batch,
                )


# -------------------------------------------------------------------------------------------------------------- extras


def part_extras(report: Report, plan: Plan) -> None:
    """What EMA and buckets add to a step of `constant`, and what a checkpoint costs."""
    from . import training_models as models

    for shape in plan.extra_shapes:
        (side, batch, _), *_ = plan.sides[shape]
        plain, average, buckets = "constant", "constant with EMA", "constant in buckets"
        sizes = (side, batch, plan.extra_rounds, plan.extra_budget)
        times, ends = race(report, plan, shape, (plain, average), *sizes, saves=plan.saves)
        report.median(
            f"extras/{shape}/ema",
            times.ratios(average, plain),
            "ratio",
            plain_s=times.median(plain),
            memory_gb=(ends[average]["peak"] - ends[plain]["peak"]) / 1e9,
        )
        seconds = statistics.median(ends[average]["save_seconds"])
        report.line(
            f"extras/{shape}/checkpoint",
            seconds,
            "s",
            samples=plan.saves,
            size_gb=ends[average]["save_bytes"] / 1e9,
            share_of_training=seconds / (CHECKPOINT_EVERY * times.median(average)),
            every_steps=CHECKPOINT_EVERY,
        )
        times, _ = race(report, plan, shape, (plain, buckets), *sizes)
        shapes_ = models.bucket_sides(side)
        area = statistics.mean(height * width for height, width in shapes_) / side**2
        report.median(
            f"extras/{shape}/buckets",
            [ratio / area for ratio in times.ratios(buckets, plain)],
            "ratio per pixel",
            shapes=len(shapes_),
            mean_area=area,
        )


# ----------------------------------------------------------------------------------------------------------------- main


def without_diffusers(parts: Collection[str]) -> str | None:
    if set(parts) == {"extras"} or importlib.util.find_spec("diffusers") is not None:
        return None
    return (
        "This benchmark compares with diffusers, which is not installed here: pip install diffusers (--part extras "
        "runs without it)."
    )


BENCHMARK = Benchmark(
    "training",
    __doc__,
    Path(__file__).resolve(),
    {"full": FULL, "quick": QUICK, "tiny": TINY},
    {"verify": part_verify, "step": part_step, "extras": part_extras},
    {"verify": child_verify, "race": child_race},
    # Contestants that do different work are not worth timing.
    decisive=("verify",),
    unable=without_diffusers,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(sys.argv[1:]))
