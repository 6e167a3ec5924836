"""How LoRAs are baked: the settings of all in one place, and what each kind changes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...mini_world import render
from ..points import ModelSpec


def vocabulary_captions(count: int, seed: int = 0) -> tuple[str, ...]:
    """Captions of random digits and colours, as the prior was trained on; no picture is looked at."""
    generator = torch.Generator().manual_seed(seed)
    pairs = render.colour_pairs()
    digits = torch.randint(10, (count,), generator=generator).tolist()
    chosen = pairs[torch.randint(len(pairs), (count,), generator=generator)].tolist()
    return tuple(render.caption(digit, *pair) for digit, pair in zip(digits, chosen))


BATCH, STEPS = 48, 500
BAKING: dict[str, Any] = {
    "base": "mini_world",
    "resolution": 64,
    "buckets": False,
    "precision": "fp32",
    "held_out_share": 0.0,
    "train": "low_rank",
    "layers": "all",
    "rank": 16,
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "warmup": 50,
    "ema": 0.99,
    "states": ("pictures", "own"),
    "own_count": 256,
    "own_steps": 20,
    "prompt_list": vocabulary_captions(256),
    "random_prompts": 0,
    "empty_share": 0.15,
    "domain_weight": 1.5,
}
CONSTANT, LATE, GUIDED = "constant", "late", "guided"
# The late start is that of `sweep.LATE_START`.
LATE_FROM, LATE_WEIGHT, GUIDED_SCALE = 0.3, 2.0, 3.0
RECIPES: dict[str, dict[str, Any]] = {
    CONSTANT: {},
    LATE: {"domain_start": LATE_FROM, "domain_weight": LATE_WEIGHT},
    GUIDED: {"target": "guided", "control_weight": GUIDED_SCALE},
}
# Of the constant recipe, one thing changed each.
ABLATIONS: dict[str, dict[str, Any]] = {
    "states: pictures": {"states": ("pictures",)},
    "states: own samples": {"states": ("own",)},
    "states: trajectories": {"states": ("trajectories",)},
    "states: all three": {"states": ("pictures", "own", "trajectories")},
    "prompts: empty": {"prompt_list": (), "empty_share": 1.0},
    "prompts: random words": {"prompt_list": (), "random_prompts": 256},
    "rank 4": {"rank": 4},
    "rank 64": {"rank": 64},
    "attention alone": {"layers": "attention"},
    "all weights": {"train": "all", "learning_rate": 3e-4},
}
EMPTY_PROMPTS = "prompts: empty"


@dataclass(frozen=True)
class BakedSpec(ModelSpec):
    """A baked model. steps, batch: of the baking, whose rate falls, so that each length is a run of its own. recipe: of
    RECIPES or ABLATIONS. domain_steps: training steps of the domain model, of the same seed."""

    recipe: str = CONSTANT
    batch: int = BATCH
    domain_steps: int = 1000

    @property
    def run_name(self) -> str:
        recipe = self.recipe.replace(":", "").replace(" ", "_")
        return f"{self.domain}-{recipe}-{self.steps}x{self.batch}-seed{self.seed}"

    @property
    def of_domain(self) -> ModelSpec:
        """The domain model whose guidance is baked in."""
        return ModelSpec("domain", self.domain, self.domain_steps, seed=self.seed)

    @property
    def changes(self) -> dict[str, Any]:
        return {**RECIPES, **ABLATIONS}[self.recipe]

    @property
    def is_lora(self) -> bool:
        return self.changes.get("train", "low_rank") == "low_rank"

    def __str__(self) -> str:
        return f"{self.domain}, baked {self.recipe}, {self.steps} steps of {self.batch}, seed {self.seed}"
