"""What a measured point is, and which are measured in which order: headline rows first, so that a run is worth
something early on.

A sweep is a table. Each row adapts by every one of some recipes on some tasks from some training seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..study import Plan, Sampling
from .recipes import FAINT, GUIDED, GUIDED_BACK, NOISIER, RECIPES, SGF, WAY_BACK, WEAK
from .tasks import COLOURS, DARK, DOMAIN, LONG, SEVEN, TASKS, Task


@dataclass(frozen=True)
class Point:
    """What to measure: a recipe on a task after some steps from one training seed.

    question: one of TASKS; method: one of RECIPES, or what frames them, without steps and seeds: "source" (the
    generator as it is, where every run starts), "exact" (the exact answers) or "prior" (its pictures of the prompt).
    """

    question: str
    method: str
    step: int = 0
    seed: int = 0

    @property
    def is_trained(self) -> bool:
        return self.method in RECIPES

    @property
    def run(self) -> str:
        """The training run that this point is a stop of."""
        return f"{self.question}-{self.method}-seed{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.question}/{self.method}"

    @property
    def facts(self) -> dict[str, Any]:
        return {"step": self.step, "training_seed": self.seed, "prompt": TASKS[self.question].prompt}

    def __str__(self) -> str:
        return f"{self.question}: {self.method}" + (f", step {self.step}, seed {self.seed}" if self.is_trained else "")


SEEDS, STOPS = (0, 1, 2), (75, 150, 300)
RELEASED = (*SGF, *WEAK)
USUAL = (*RELEASED, *FAINT, "first")
TELLING = (*USUAL, "shared_directional_weak", "sds_layers_3", "csd")
PROMPTED = tuple(name for name, recipe in RECIPES.items() if recipe.critic == "prompt")
FIRST, SECOND, THIRD, _ = COLOURS
Asked = tuple[Iterable[Task], Iterable[int], Iterable[str]]  # tasks, seeds, recipes
FULL: tuple[Asked, ...] = (
    # Two colour prompts and the shape change: SDS alone, its two regularizers from strong to faint, layer selection,
    # and the rivals. Then the domain that no prompt describes, the long prompt and another colour.
    ((FIRST, SEVEN, SECOND), (0,), TELLING),
    ((DOMAIN,), (0,), ("sds", *GUIDED)),
    ((LONG, THIRD), (0,), USUAL),
    # Three seeds of what the claims are about.
    ((FIRST, SEVEN, SECOND), SEEDS, RELEASED),
    # Every recipe on the first colour, and dark ink on a light ground.
    ((FIRST,), (0,), PROMPTED),
    ((DARK,), (0,), ("sds", *WEAK, "first")),
    # The colour that is reached, asked as much as the first; the other tasks' seeds.
    ((THIRD,), (0,), TELLING),
    ((THIRD,), SEEDS, RELEASED),
    ((DOMAIN,), SEEDS, ("sds", *GUIDED)),
    ((LONG,), SEEDS, SGF),
    ((SEVEN,), SEEDS, FAINT),
    # The way back for pixels beyond white and black, without which a black image learns nothing more.
    ((DOMAIN,), SEEDS, ("sds_back", *GUIDED_BACK)),
    ((SEVEN,), SEEDS, WAY_BACK),
    ((FIRST, SECOND, THIRD), (0,), WAY_BACK),
)
# A coarse look at every claim.
QUICK: tuple[Asked, ...] = (
    ((FIRST,), (0,), (*RELEASED, "sds_layers_3", *FAINT, *NOISIER, "csd_directional_noisy")),
    ((DOMAIN,), (0,), ("sds", "domain", "sds_back", "domain_back", "fine_tune")),
    ((SEVEN,), (0,), ("sds", *WEAK, "csd", *FAINT)),
    ((SECOND, LONG, THIRD), (0,), ("sds", *WEAK)),
    ((FIRST,), (0,), ("shared_directional_weak", "bridge", "csd", "csd_directional", "sds_100")),
    ((FIRST,), SEEDS, ("sds", *WEAK)),
)


def points_of(table: Iterable[Asked]) -> tuple[Point, ...]:
    """Every stop of every run of a table, each once: what frames them first, task by task, seed by seed."""
    points = []
    for tasks, seeds, recipes in table:
        for task in tasks:
            # "a digit" says nothing of the domain, so the prior's pictures of it frame nothing.
            frames = ("prior", "source", "exact") if task != DOMAIN else ("source", "exact")
            points += [Point(task.name, frame) for frame in frames]
            points += [Point(task.name, recipe, step, seed) for seed, recipe, step in product(seeds, recipes, STOPS)]
    return tuple(dict.fromkeys(points))


COARSE = Sampling(300, steps=12, targets=1500, rendered=200, replicates=200)
PLANS = {
    "full": Plan(Sampling(1000), points_of(FULL), stops=STOPS),
    "quick": Plan(COARSE, points_of(QUICK), 2000, stops=STOPS, coarse=True, options=" --quick"),
}
