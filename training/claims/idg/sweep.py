"""What a measured point is, and which are measured in which order: headline rows first, so that a full run is worth
something early on.

A sweep is a table. Each row asks some questions of some methods with every one of some models and settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ....guidance.schedules import Keyframes
from ..study import Plan, Sampling
from .methods import FINE_TUNES
from .questions import QUESTIONS

FIXED_CAPTION = "a digit"  # it fits every image of the domain, and the prior understands it


@dataclass(frozen=True)
class ModelSpec:
    """A model to compare.

    kind: "shipped" (a domain model made by the mini world's recipe), "domain" (text-free, trained here), "full" or
    "low_rank" (fine-tunes that keep the text). caption: of the fine-tunes, "" or one for all images. Shipped models
    have no other steps and seeds than their own, written as 0.
    """

    kind: str
    domain: str
    steps: int = 0
    caption: str = ""
    seed: int = 0

    @property
    def run_name(self) -> str:
        """The training run that this model is a stop of."""
        caption = "cached" if self.kind == "domain" else "caption" if self.caption else "empty"
        return f"{self.domain}-{self.kind}-{caption}-seed{self.seed}"

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
# Questions, methods, models (fields of ModelSpec but for the domain; None: the prior alone), settings.
Asked = tuple[Sequence[str], Sequence[str], Sequence[Settings | None], Sequence[Settings]]


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


def cheap_schedule(a: float, b: float, w_d: float, w_c: float) -> Settings:
    """The control alone to percent a, both terms to b, the domain model alone (w_d 1, w_c 0: one sample) to the end.

    1 + 2 b - a samples a step on average, so b = (1 + a) / 2 costs two, as plain CFG does.
    """
    start = [(0.0, 0.0)] if a > 0 else []
    return {"w_d": steps(*start, (a, w_d), (b, 1.0)), "w_c": steps((0.0, w_c), (b, 0.0))}


def late_start(a: float, w_d: float, w_c: float) -> Settings:
    """The control alone to percent a, then both terms: what an image shows is settled early, how it is drawn late."""
    return {"w_d": steps((0.0, 0.0), (a, w_d)), "w_c": w_c}


def domain(length: int, *seeds: int) -> list[Settings]:
    """Text-free models of the fine-tunes' trainer, images, batch, loss and rate: what the claims are decided on."""
    return [{"kind": "domain", "steps": length, "seed": seed} for seed in seeds or (0,)]


def tuned(kinds: Iterable[str], lengths: Iterable[int], captions: Iterable[str], *seeds: int) -> list[Settings]:
    return [
        {"kind": kind, "steps": length, "caption": caption, "seed": seed}
        for length, kind, caption, seed in product(lengths, kinds, captions, seeds or (0,))
    ]


MAIN, FOREIGN, NARROW, NARROW_FOREIGN = QUESTIONS
EVERY, OWN, FOREIGN_TOO = tuple(QUESTIONS), (MAIN, NARROW), (FOREIGN, NARROW_FOREIGN)
PRIOR, SHIPPED = (None,), ({"kind": "shipped"},)
MULTI, SCHEDULED, ORTHOGONAL, BANDS = ("multi_guidance",), ("scheduled",), ("orthogonal",), ("bands",)
KINDS, CAPTIONS = ("full", "low_rank"), (FIXED_CAPTION, "")
# One sweep of scales for everything of the form u + w (c - u); the prior has 2 as well, where its digits are best.
SCALES = (1.5, 3.0, 5.0)
PRIOR_SCALES = (2.0, *SCALES)
# Training lengths of the fine-tunes, most telling first; stopping early is fine-tuning's best defence.
LENGTHS = (300, 100, 1000, 30)
# The released defaults, and a grid of strengths and ratios.
HEADLINE = weights((1.5, 3.0), (1.0, 3.0), (2.5, 2.5), (1.5, 5.0), (1.0, 5.0), (0.5, 2.0), (2.0, 6.0))
MORE = weights((0.5, 5.0), (1.0, 7.0), (1.0, 4.0), (0.5, 3.0), (2.0, 4.0), (1.0, 2.0))
LITTLE_CONTROL = weights((1.0, 1.0), (1.5, 1.5), (1.5, 2.0), (2.0, 2.0))
# Of domain models that were stopped early.
EARLY = weights((1.5, 5.0), (1.0, 3.0), (1.0, 5.0), (1.5, 3.0), (2.0, 4.0))
CHEAP = [cheap_schedule(0.2, 0.6, 2.0, 4.0), cheap_schedule(0.2, 0.6, 1.5, 3.0), cheap_schedule(0.0, 0.5, 1.5, 5.0)]
CHEAP += [cheap_schedule(0.3, 0.65, 2.0, 4.0), cheap_schedule(0.7, 0.85, 1.5, 3.0), cheap_schedule(0.8, 0.9, 2.0, 4.0)]
MORE_CHEAP = [cheap_schedule(0.1, 0.55, 1.5, 4.0), cheap_schedule(0.5, 0.75, 3.0, 4.0)]
LATE = [late_start(0.3, 1.2, 5.0), late_start(0.3, 2.0, 4.0), late_start(0.2, 1.5, 3.0), late_start(0.45, 2.0, 3.0)]
LATE += [late_start(0.6, 1.5, 4.0), late_start(0.5, 0.7, 3.0)]
_LATE_START = steps((0.0, 0.0), (0.3, 2.0))
ORTHOGONAL_SETTINGS, BAND_SETTINGS = "w_d w_c per", "w_low w_high w_c width"
PLAIN_ORTHOGONAL = each(ORTHOGONAL_SETTINGS, (1.5, 3.0, "position"))
SPLIT = each(BAND_SETTINGS, (0.0, 1.5, 3.0, "inf"), (0.3, 1.5, 3.0, 1.0))
# In colours the domain never had: weaker, near the share that claim (d) asks for, and stronger or with a late start
# where colours are lost most.
WEAKER = each(ORTHOGONAL_SETTINGS, (0.7, 3.0, "position"), (1.0, 5.0, "position"))
WEAKER_SPLIT = each(BAND_SETTINGS, (0.15, 0.7, 3.0, 1.0), (0.0, 1.0, 5.0, "inf"), (0.3, 1.0, 5.0, 1.0))
STRONGER = each(ORTHOGONAL_SETTINGS, (2.5, 4.0, "position"), (_LATE_START, 4.0, "position"))
STRONGER += [{**PLAIN_ORTHOGONAL[0], "only_opposing": True}]
STRONGER_SPLIT = each(BAND_SETTINGS, (0.0, 2.5, 4.0, "inf"), (0.0, _LATE_START, 4.0, 1.0))
FULL: tuple[Asked, ...] = (
    # The handwriting's own colours, domain model and fine-tunes of one trainer: the prior, the paper's method, the
    # usual fine-tune, and the same fine-tune after as many steps as the domain model.
    ((MAIN,), ("prior",), PRIOR, scales(*PRIOR_SCALES)),
    ((MAIN,), MULTI, domain(1000), HEADLINE),
    ((MAIN,), FINE_TUNES, tuned(["full"], [300], [FIXED_CAPTION]), scales(*SCALES)),
    ((MAIN,), FINE_TUNES, tuned(["full"], [1000], [FIXED_CAPTION]), scales(1.5, 3.0)),
    (EVERY, ("domain",), domain(1000), scales(1.0)),
    # Colours it never had, narrow handwriting, whose colours are the extreme case, and schedules.
    (EVERY, ("prior",), PRIOR, scales(*PRIOR_SCALES)),
    (EVERY, MULTI, domain(1000), HEADLINE),
    (EVERY, SCHEDULED, domain(1000), LATE + CHEAP),
    # Domain terms orthogonal to the control, or split by frequency.
    (EVERY, ORTHOGONAL, domain(1000), [*each(ORTHOGONAL_SETTINGS, (1.5, 3.0, "image")), *PLAIN_ORTHOGONAL]),
    (EVERY, BANDS, domain(1000), SPLIT),
    (FOREIGN_TOO, ORTHOGONAL, domain(1000), WEAKER),
    (FOREIGN_TOO, BANDS, domain(1000), WEAKER_SPLIT),
    ((NARROW_FOREIGN,), ORTHOGONAL, domain(1000), STRONGER),
    ((NARROW_FOREIGN,), BANDS, domain(1000), STRONGER_SPLIT),
    # Domain models stopped as early as fine-tunes are, and more weights.
    (EVERY, MULTI, domain(100) + domain(300), EARLY),
    (OWN, MULTI, domain(100) + domain(300), weights((2.5, 2.5), (2.0, 6.0))),
    (FOREIGN_TOO, MULTI, domain(100) + domain(300), weights((2.0, 3.0))),
    (EVERY, MULTI, domain(1000), MORE),
    (OWN, MULTI, domain(1000), LITTLE_CONTROL),
    ((MAIN, FOREIGN), SCHEDULED, domain(1000), MORE_CHEAP),
    # Fine-tuning's best defences: other captions, adapters, and stopping early; one caption on narrow handwriting,
    # since "a digit" is not less true of it. Beside the claims: what fine-tunes make of foreign colours.
    ((MAIN,), FINE_TUNES, tuned(KINDS, LENGTHS, CAPTIONS), scales(*SCALES)),
    ((NARROW,), FINE_TUNES, tuned(KINDS, LENGTHS, [FIXED_CAPTION]), scales(*SCALES)),
    ((FOREIGN,), FINE_TUNES, tuned(KINDS, [300, 100], [FIXED_CAPTION]), scales(*SCALES)),
    ((MAIN,), ("fine_tune",), tuned(["full"], [300], [FIXED_CAPTION]), scales(1.0)),
    # Further training seeds of the headline rows.
    ((MAIN,), MULTI, domain(1000, 1, 2), HEADLINE[:6]),
    ((MAIN,), FINE_TUNES, tuned(["full"], [300], [FIXED_CAPTION], 1, 2), scales(1.5, 3.0)),
    ((FOREIGN,), MULTI, domain(1000, 1, 2), HEADLINE[2:6]),
    ((FOREIGN,), MULTI, domain(100, 1, 2), weights((2.0, 4.0), (2.0, 3.0))),
    # The models that the project ships: another trainer and other images, so never compared with fine-tunes.
    (EVERY, MULTI, SHIPPED, HEADLINE[:4]),
    (EVERY, SCHEDULED, SHIPPED, CHEAP[:2]),
)
# A coarse look at every claim: one domain model and one fine-tune are trained; narrow handwriting uses the shipped
# model, so (a) is not asked there.
QUICK: tuple[Asked, ...] = (
    ((MAIN,), ("prior",), PRIOR, scales(2.0, 1.5)),
    ((MAIN,), MULTI, domain(300), weights((1.5, 3.0), (1.0, 3.0), (1.5, 5.0))),
    ((MAIN,), FINE_TUNES, tuned(["full"], [100, 300], [FIXED_CAPTION]), scales(1.5, 3.0)),
    ((MAIN,), SCHEDULED, domain(300), CHEAP[:2]),
    ((FOREIGN, NARROW, NARROW_FOREIGN), ("prior",), PRIOR, scales(2.0)),
    ((FOREIGN,), MULTI, domain(300), weights((1.0, 3.0), (1.5, 5.0))),
    ((FOREIGN,), SCHEDULED, domain(300), CHEAP[:1]),
    ((MAIN, FOREIGN), MULTI, SHIPPED, weights((1.5, 5.0))),
    ((MAIN, NARROW), MULTI, SHIPPED, weights((1.5, 3.0))),
    ((NARROW, NARROW_FOREIGN), MULTI, SHIPPED, weights((1.0, 3.0))),
    ((NARROW_FOREIGN,), SCHEDULED, SHIPPED, CHEAP[:1]),
    ((NARROW_FOREIGN,), ORTHOGONAL, SHIPPED, PLAIN_ORTHOGONAL),
    ((NARROW_FOREIGN,), BANDS, SHIPPED, SPLIT[1:]),
)


def points_of(table: Iterable[Asked]) -> tuple[Point, ...]:
    """The points of a table, row by row, each once."""
    points = {}
    for questions, methods, models, settings in table:
        for question, model, method, values in product(questions, models, methods, settings):
            spec = ModelSpec(domain=QUESTIONS[question].domain, **model) if model else None
            points[Point.of(question, method, spec, **values)] = None
    return tuple(points)


QUICK_SAMPLING = Sampling(200, replicates=200)
PLANS = {
    "full": Plan(Sampling(2000, precision="bf16"), points_of(FULL)),
    "quick": Plan(QUICK_SAMPLING, points_of(QUICK), 2000, coarse=True, options=" --quick"),
}
