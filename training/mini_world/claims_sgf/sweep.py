"""Which points are measured, in which order: headline rows first, so that a run is worth something early on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .points import Point, Sampling
from .recipes import BEYOND, NOISIER, RECIPES, WEAK
from .tasks import COLOURS, DOMAIN, LONG, SEVEN, Task

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Plan:
    """A sweep: how its points are drawn, at which steps runs are looked at, the points themselves in order, and how the
    fine-tuned critic is trained. coarse: too few settings for a claim about all of them to be settled, even when every
    point is measured."""

    name: str
    sampling: Sampling
    stops: tuple[int, ...]
    points: tuple[Point, ...]
    images: int = 8000
    batch: int = 64
    fine_tune: int = 300
    coarse: bool = False


def runs(
    stops: tuple[int, ...], task: Task, recipes: tuple[str, ...], seeds: tuple[int, ...] = (0,)
) -> Iterator[Point]:
    """Every stop of every run: what frames them first, then seed by seed, recipe by recipe."""
    yield Point(task.name, "source")
    yield Point(task.name, "exact")
    for seed in seeds:
        for recipe in recipes:
            for step in stops:
                yield Point(task.name, recipe, step, seed)


def full_points(stops: tuple[int, ...]) -> Iterator[Point]:
    """Everything, most telling first."""
    first, *others = COLOURS
    # 1. One colour prompt: SDS alone, its two regularizers weak and strong, layer selection, and the rivals.
    yield Point(first.name, "prior")
    telling = (
        "sds", *WEAK, "sds_directional", "sds_reconstruction", *NOISIER, "csd_directional_noisy", "sds_layers_3", "csd",
    )  # fmt: skip
    yield from runs(stops, first, (*telling, "shared_directional_weak", "sds_100"))
    # 2. The shape change, and the domain that no prompt describes.
    yield Point(SEVEN.name, "prior")
    yield from runs(stops, SEVEN, telling)
    yield from runs(stops, DOMAIN, ("sds", "domain", "fine_tune"))
    # 3. The other colours and the long prompt, then three seeds of all of that.
    for task in (*others, LONG):
        yield Point(task.name, "prior")
        yield from runs(stops, task, telling)
    for task in (*COLOURS, LONG, SEVEN):
        yield from runs(stops, task, telling, SEEDS)
    yield from runs(stops, DOMAIN, ("sds", "domain", "fine_tune"), SEEDS)
    # 4. Every recipe on every task.
    everything = tuple(name for name, recipe in RECIPES.items() if recipe.critic == "prompt")
    for task in (first, SEVEN, *others, LONG):
        yield from runs(stops, task, BEYOND)
        yield from runs(stops, task, everything)
    yield from runs(stops, DOMAIN, ("sds", "sds_directional", "domain_directional"), SEEDS)
    for task in (*COLOURS, LONG, SEVEN):
        yield from runs(stops, task, everything, SEEDS)


def quick_points(stops: tuple[int, ...]) -> Iterator[Point]:
    """A coarse look at every claim."""
    first, second, third, _ = COLOURS
    usual, noisy = ("sds", *WEAK), (*NOISIER, "csd_directional_noisy")
    yield Point(first.name, "prior")
    yield from runs(stops, first, ("sds", *WEAK, "sds_directional", "sds_reconstruction", "sds_layers_3", *noisy))
    yield from runs(stops, DOMAIN, ("sds", "domain"))
    yield Point(SEVEN.name, "prior")
    yield from runs(stops, SEVEN, usual)
    for task in (second, LONG):
        yield Point(task.name, "prior")
        yield from runs(stops, task, usual)
    yield from runs(stops, first, ("shared_directional_weak", "bridge", "csd", "csd_directional", "sds_100"))
    yield from runs(stops, SEVEN, ("csd", *noisy))
    yield from runs(stops, DOMAIN, ("fine_tune",))
    for task in (second, LONG):
        yield from runs(stops, task, noisy)
    yield from runs(stops, first, usual, SEEDS[1:])
    yield Point(third.name, "prior")
    yield from runs(stops, third, usual)


def tiny_points(stops: tuple[int, ...]) -> Iterator[Point]:
    """Shows that everything runs, in seconds; the numbers mean nothing."""
    first = COLOURS[0]
    yield from runs(stops, first, ("sds", "sds_directional", "sds_reconstruction", "csd", "sds_layers_3"))
    yield Point(first.name, "prior")
    yield from runs(stops, SEVEN, ("nfsd", "bridge"))
    yield from runs(stops, DOMAIN, ("sds", "domain"))


def _once(points: Iterator[Point]) -> tuple[Point, ...]:
    """The points in order, repetitions left out."""
    return tuple(dict.fromkeys(points))


FULL_STOPS, QUICK_STOPS, TINY_STOPS = (75, 150, 300, 600, 1000), (75, 150, 300), (1, 2)
PLANS = {
    "full": lambda: Plan("full", Sampling(1000), FULL_STOPS, _once(full_points(FULL_STOPS))),
    "quick": lambda: Plan(
        "quick", Sampling(300, answers=1500, rendered=200, rendered_steps=12, replicates=200), QUICK_STOPS,
        _once(quick_points(QUICK_STOPS)), images=2000, coarse=True,
    ),
    "tiny": lambda: Plan(
        "tiny", Sampling(30, answers=120, rendered=8, rendered_steps=2, replicates=20), TINY_STOPS,
        _once(tiny_points(TINY_STOPS)), images=16, batch=4, fine_tune=1, coarse=True,
    ),
}  # fmt: skip
