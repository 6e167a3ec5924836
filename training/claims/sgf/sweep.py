"""Which points are measured, in which order: headline rows first, so that a run is worth something early on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .points import Point, Sampling
from .recipes import FAINT, GUIDED, GUIDED_BACK, NOISIER, RECIPES, SGF, WAY_BACK, WEAK
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
    first, second, third, dark = COLOURS
    released = ("sds", *WEAK, "sds_directional", "sds_reconstruction")
    usual = (*released, *FAINT, "first")
    telling = (*usual, "shared_directional_weak", "sds_layers_3", "csd")
    # 1. Two colour prompts and the shape change: SDS alone, its two regularizers from strong to faint, layer selection,
    #    and the rivals. Then the domain that no prompt describes.
    for task in (first, SEVEN, second):
        yield Point(task.name, "prior")
        yield from runs(stops, task, telling)
    yield from runs(stops, DOMAIN, ("sds", "domain", "fine_tune", "domain_mild", "domain_directional"))
    # 2. The long prompt and another colour.
    for task in (LONG, third):
        yield Point(task.name, "prior")
        yield from runs(stops, task, usual)
    # 3. Three seeds of what the claims are about.
    for task in (first, SEVEN, second):
        yield from runs(stops, task, released, SEEDS[1:])
    # 4. Every recipe on the first colour, and dark ink on a light ground.
    yield from runs(stops, first, tuple(name for name, recipe in RECIPES.items() if recipe.critic == "prompt"))
    yield Point(dark.name, "prior")
    yield from runs(stops, dark, ("sds", *WEAK, "first"))
    # 5. The colour that is reached, asked as much as the first; the other tasks' seeds.
    yield from runs(stops, third, telling)
    for task, recipes in ((third, released), (DOMAIN, ("sds", *GUIDED)), (LONG, SGF), (SEVEN, FAINT)):
        yield from runs(stops, task, recipes, SEEDS[1:])
    # 6. The way back for pixels beyond white and black, without which a black image learns nothing more.
    yield from runs(stops, DOMAIN, ("sds_back", *GUIDED_BACK), SEEDS)
    yield from runs(stops, SEVEN, WAY_BACK, SEEDS)
    for task in (first, second, third):
        yield from runs(stops, task, WAY_BACK)


def quick_points(stops: tuple[int, ...]) -> Iterator[Point]:
    """A coarse look at every claim."""
    first, second, third, _ = COLOURS
    usual, noisy = ("sds", *WEAK), (*FAINT, *NOISIER, "csd_directional_noisy")
    yield Point(first.name, "prior")
    yield from runs(stops, first, ("sds", *WEAK, "sds_directional", "sds_reconstruction", "sds_layers_3", *noisy))
    yield from runs(stops, DOMAIN, ("sds", "domain", "sds_back", "domain_back"))
    yield Point(SEVEN.name, "prior")
    yield from runs(stops, SEVEN, usual)
    for task in (second, LONG):
        yield Point(task.name, "prior")
        yield from runs(stops, task, usual)
    yield from runs(stops, first, ("shared_directional_weak", "bridge", "csd", "csd_directional", "sds_100"))
    yield from runs(stops, SEVEN, ("csd", *FAINT))
    yield from runs(stops, DOMAIN, ("fine_tune",))
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


STOPS, TINY_STOPS = (75, 150, 300), (1, 2)
PLANS = {
    "full": lambda: Plan("full", Sampling(1000), STOPS, _once(full_points(STOPS))),
    "quick": lambda: Plan(
        "quick",
        Sampling(300, answers=1500, rendered=200, rendered_steps=12, replicates=200),
        STOPS,
        _once(quick_points(STOPS)),
        images=2000,
        coarse=True,
    ),
    "tiny": lambda: Plan(
        "tiny",
        Sampling(30, answers=120, rendered=8, rendered_steps=2, replicates=20),
        TINY_STOPS,
        _once(tiny_points(TINY_STOPS)),
        images=16,
        batch=4,
        fine_tune=1,
        coarse=True,
    ),
}
