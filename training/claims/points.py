"""What a measured point of the mini world's questions is, and the tables that sweeps are written in.

A sweep is a table. Each row asks some questions of some methods with every one of some models and settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from ...guidance.schedules import Keyframes
from .questions import QUESTIONS

FIXED_CAPTION = "a digit"  # it fits every image of the domain, and the prior understands it
AUTOMATIC = "automatic"  # each image's own caption, as the judge reads it


@dataclass(frozen=True)
class ModelSpec:
    """A model to compare.

    kind: "shipped" (a domain model made by the mini world's recipe), "domain" (text-free, trained here), "full" or
    "low_rank" (fine-tunes that keep the text). caption: of the fine-tunes, "" or one for all images, or AUTOMATIC.
    Shipped models have no other steps and seeds than their own, written as 0.
    """

    kind: str
    domain: str
    steps: int = 0
    caption: str = ""
    seed: int = 0

    @property
    def run_name(self) -> str:
        """The training run that this model is a stop of."""
        caption = {"": "empty", AUTOMATIC: AUTOMATIC}.get(self.caption, "caption")
        caption = "cached" if self.kind == "domain" else caption
        return f"{self.domain}-{self.kind}-{caption}-seed{self.seed}"

    @property
    def is_text_free(self) -> bool:
        return self.kind in ("shipped", "domain")

    @property
    def is_lora(self) -> bool:
        """Whether its file is a LoRA for the prior."""
        return self.kind == "low_rank"

    def __str__(self) -> str:
        return f"shipped {self.domain}" if self.kind == "shipped" else f"{self.run_name}, {self.steps} steps"


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


Settings = dict[str, Any]
Make = Callable[..., ModelSpec]  # a model of the domain that is given as `domain`
# Questions, methods, models (None: the prior alone), settings.
Asked = tuple[Sequence[str], Sequence[str], Sequence[Make | None], Sequence[Settings]]


def steps(*points: tuple[float, float]) -> Settings:
    """A weight that jumps: (percent, weight) from there on."""
    return Keyframes(points, ramp="step").to_json()


def each(names: str, *rows: tuple[Any, ...]) -> list[Settings]:
    """Settings of these names, from a row of values each."""
    return [dict(zip(names.split(), row)) for row in rows]


def scales(*values: float) -> list[Settings]:
    return each("scale", *((value,) for value in values))


def weights(*pairs: tuple[float, float]) -> list[Settings]:
    """Settings of multi-guidance."""
    return each("w_d w_c", *pairs)


def late_start(a: float, w_d: float, w_c: float) -> Settings:
    """The control alone to percent a, then both terms: what an image shows is settled early, how it is drawn late."""
    return {"w_d": steps((0.0, 0.0), (a, w_d)), "w_c": w_c}


def domain(length: int, *seeds: int) -> list[Make]:
    """Text-free models of the fine-tunes' trainer, images, batch, loss and rate: what the claims are decided on."""
    return [partial(ModelSpec, "domain", steps=length, seed=seed) for seed in seeds or (0,)]


def tuned(kinds: Iterable[str], lengths: Iterable[int], captions: Iterable[str], *seeds: int) -> list[Make]:
    return [
        partial(ModelSpec, kind, steps=length, caption=caption, seed=seed)
        for length, kind, caption, seed in product(lengths, kinds, captions, seeds or (0,))
    ]


def points_of(table: Iterable[Asked]) -> tuple[Point, ...]:
    """The points of a table, row by row, each once."""
    points = {}
    for questions, methods, models, settings in table:
        for question, model, method, values in product(questions, models, methods, settings):
            spec = model(domain=QUESTIONS[question].domain) if model else None
            points[Point.of(question, method, spec, **values)] = None
    return tuple(points)
