"""What a measured point is: a question, a method at one setting, and the trained model it uses."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from .models import ModelSpec


@dataclass(frozen=True)
class Point:
    """What to measure: a question, a method, its settings and the model it uses besides the prior.

    settings is JSON text, so that points can be compared and hashed.
    """

    question: str
    method: str
    settings: str
    model: ModelSpec | None = None

    @classmethod
    def of(cls, question: str, method: str, model: ModelSpec | None = None, **settings: Any) -> Point:
        return cls(question, method, json.dumps(settings, sort_keys=True), model)

    @property
    def values(self) -> dict[str, Any]:
        return json.loads(self.settings)

    @property
    def seed(self) -> int:
        """The training seed of the model; 0 where there is none."""
        return self.model.seed if self.model else 0

    def with_seed(self, seed: int) -> Point:
        """The same point with its model trained from another seed."""
        return replace(self, model=replace(self.model, seed=seed)) if self.model else self

    @property
    def name(self) -> str:
        return f"{self.question}/{self.method}"

    @property
    def facts(self) -> dict[str, Any]:
        model = {"model": str(self.model) if self.model else None, "training_seed": self.seed if self.model else None}
        return {**model, "settings": self.values}

    @property
    def words(self) -> str:
        """The settings in few characters: numbers as they are, schedules as value@start of each step."""
        return ", ".join(f"{name} {_short(value)}" for name, value in self.values.items())

    def __str__(self) -> str:
        return f"{self.question}: {self.method}{f' [{self.model}]' if self.model else ''} {self.words}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(f"{weight:g}@{position:g}" for position, weight in value["points"])
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
