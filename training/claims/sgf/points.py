"""What a measured point is: a recipe on a task after some steps from one training seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .recipes import RECIPES
from .tasks import TASKS

# What frames the recipes, without steps and seeds: the generator as it is, where every run starts, the exact answers,
# and the prior's own pictures of the prompt.
FIXED = {"source": "source, not adapted", "exact": "exact answers", "prior": "the prior's own pictures"}
TITLES = {**FIXED, **{name: recipe.title for name, recipe in RECIPES.items()}}


@dataclass(frozen=True)
class Point:
    """What to measure. question: one of TASKS; method: one of RECIPES or of FIXED."""

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
