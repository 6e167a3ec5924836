"""Which points are measured, in which order: headline rows first, so that a full run is worth something early on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ....guidance.schedules import Keyframes
from .models import FIXED_CAPTION, ModelSpec
from .points import Point, Sampling
from .questions import QUESTIONS

# One sweep of scales for everything of the form u + w (c - u); the prior has 2 as well, where its digits are best.
SCALES = (1.5, 3.0, 5.0)
PRIOR_SCALES = (2.0, *SCALES)
HEADLINE_STEPS, SHORT_STEPS = 300, 100
# Training lengths of the fine-tunes, most telling first; stopping early is fine-tuning's best defence.
LENGTHS = (HEADLINE_STEPS, SHORT_STEPS, 1000, 30)
DOMAIN_STEPS = 1000
SEEDS = (0, 1, 2)
CAPTIONS = ("", FIXED_CAPTION)
# (w_d, w_c): the released defaults, and a grid of strengths and ratios.
HEADLINE_WEIGHTS = ((1.5, 3.0), (1.0, 3.0), (2.5, 2.5), (1.5, 5.0), (1.0, 5.0), (0.5, 2.0), (2.0, 6.0))
MORE_WEIGHTS = ((0.5, 5.0), (1.0, 7.0), (1.0, 4.0), (0.5, 3.0), (2.0, 4.0), (1.0, 2.0))
# Nearer, at digits that only fine-tunes had been asked for.
LITTLE_CONTROL = ((1.0, 1.0), (1.5, 1.5), (1.5, 2.0), (2.0, 2.0))
# What early-stopped domain models are asked in their own colours, and in colours they never had; the last two of these
# with all training seeds.
OWN_WEIGHTS = (*HEADLINE_WEIGHTS[:4], (2.0, 6.0), (2.0, 4.0), (1.0, 5.0))
FOREIGN_WEIGHTS = ((1.5, 5.0), (1.0, 3.0), (1.0, 5.0), (1.5, 3.0), (2.0, 4.0), (2.0, 3.0))
# (a, b, w_d, w_c): the control alone to percent a, both terms to b, the domain model alone (w_d 1, w_c 0: one sample)
# from there. 1 + 2 b - a samples a step on average, so b = (1 + a) / 2 costs two.
SCHEDULES = (
    (0.2, 0.6, 2.0, 4.0),
    (0.2, 0.6, 1.5, 3.0),
    (0.0, 0.5, 1.5, 5.0),
    (0.3, 0.65, 2.0, 4.0),
    (0.1, 0.55, 1.5, 4.0),
    (0.5, 0.75, 3.0, 4.0),
)
# The same with a late turn, which keeps more of what the prompt says.
LATE_TURNS = ((0.7, 0.85, 1.5, 3.0), (0.8, 0.9, 2.0, 4.0))
# (a, w_d, w_c): the control alone to percent a, then both terms to the end. What an image shows is settled early, how
# it is drawn late.
LATE = ((0.3, 1.2, 5.0), (0.3, 2.0, 4.0), (0.2, 1.5, 3.0), (0.45, 2.0, 3.0))
LATER = ((0.6, 1.5, 4.0), (0.5, 0.7, 3.0))


@dataclass(frozen=True)
class Plan:
    """A sweep: how its points are drawn, how its models are trained, and the points themselves in order.

    coarse: too few models and settings for a claim about all of them to be settled, even when every point is measured.
    options: what is said to `run.py claims idg` for it; note: what its report says first.
    """

    name: str
    sampling: Sampling
    points: tuple[Point, ...]
    images: int = 8000
    batch: int = 64
    coarse: bool = False
    options: str = ""
    note: str = ""


def cheap_schedule(a: float, b: float, w_d: float, w_c: float) -> dict[str, object]:
    """w_d and w_c of multi-guidance as step schedules: (0, w_c) to percent a, (w_d, w_c) to b, (1, 0) to the end."""
    domain, control = [(a, w_d), (b, 1.0)], [(0.0, w_c), (b, 0.0)]
    if a > 0:
        domain.insert(0, (0.0, 0.0))
    return {
        "w_d": Keyframes(tuple(domain), ramp="step").to_json(),
        "w_c": Keyframes(tuple(control), ramp="step").to_json(),
    }


def late_start(a: float, w_d: float, w_c: float) -> dict[str, object]:
    """w_d of multi-guidance as a step schedule, 0 to percent a; w_c is constant."""
    return {"w_d": Keyframes(((0.0, 0.0), (a, w_d)), ramp="step").to_json(), "w_c": w_c}


def shipped(question: str) -> ModelSpec:
    """The recipe's own model: another trainer and other images than the fine-tunes', so never compared with them."""
    return ModelSpec("shipped", QUESTIONS[question].domain)


def trained_domain(question: str, steps: int = DOMAIN_STEPS, seed: int = 0) -> ModelSpec:
    """A text-free model of the fine-tunes' trainer, images, batch, loss and rate: what the claims are decided on."""
    return ModelSpec("domain", QUESTIONS[question].domain, steps, seed=seed)


def fine_tune(question: str, kind: str, steps: int, caption: str, seed: int = 0) -> ModelSpec:
    return ModelSpec(kind, QUESTIONS[question].domain, steps, caption, seed)


def priors(question: str, scales: tuple[float, ...] = PRIOR_SCALES) -> list[Point]:
    return [Point.of(question, "prior", scale=scale) for scale in scales]


def multi(question: str, weights: tuple[tuple[float, float], ...], model: ModelSpec | None = None) -> list[Point]:
    return [
        Point.of(question, "multi_guidance", model or trained_domain(question), w_d=w_d, w_c=w_c)
        for w_d, w_c in weights
    ]


def scheduled(question: str, schedules: tuple[tuple[float, ...], ...], model: ModelSpec | None = None) -> list[Point]:
    return [
        Point.of(question, "scheduled", model or trained_domain(question), **cheap_schedule(*one)) for one in schedules
    ]


def late(question: str, starts: tuple[tuple[float, float, float], ...] = LATE) -> list[Point]:
    return [Point.of(question, "scheduled", trained_domain(question), **late_start(*one)) for one in starts]


def fine_tunes(question: str, model: ModelSpec, scales: tuple[float, ...] = SCALES) -> list[Point]:
    """Both unconditionals at every scale; at scale 1 there is none, and the point is the same."""
    own = [Point.of(question, "fine_tune", model, scale=scale) for scale in scales]
    return own + [Point.of(question, "fine_tune_prior_u", model, scale=scale) for scale in scales if scale != 1.0]


def all_fine_tunes(question: str, steps: int, captions: tuple[str, ...] = CAPTIONS) -> Iterator[Point]:
    """Full and low-rank, of some captions, both unconditionals, at every scale."""
    for kind in ("full", "low_rank"):
        for caption in reversed(captions):
            yield from fine_tunes(question, fine_tune(question, kind, steps, caption))


def shaped(question: str, model: ModelSpec | None = None) -> list[Point]:
    """Domain terms orthogonal to the control, or split by frequency."""
    model = model or trained_domain(question)
    return [
        Point.of(question, method, model, w_c=3.0, **settings)
        for method, settings in (
            ("orthogonal", {"w_d": 1.5, "per": "image"}),
            ("bands", {"w_low": 0.0, "w_high": 1.5, "width": "inf"}),
            ("orthogonal", {"w_d": 1.5, "per": "position"}),
            ("bands", {"w_low": 0.3, "w_high": 1.5, "width": 1.0}),
        )
    ]


def more_shaped(question: str) -> list[Point]:
    """The same stronger, or with a late start: for the domain whose colours are lost most."""
    model, late = trained_domain(question), Keyframes(((0.0, 0.0), (0.3, 2.0)), ramp="step").to_json()
    return [
        Point.of(question, "orthogonal", model, w_d=2.5, w_c=4.0, per="position"),
        Point.of(question, "bands", model, w_low=0.0, w_high=2.5, w_c=4.0, width="inf"),
        Point.of(question, "orthogonal", model, w_d=late, w_c=4.0, per="position"),
        Point.of(question, "bands", model, w_low=0.0, w_high=late, w_c=4.0, width=1.0),
        Point.of(question, "orthogonal", model, w_d=1.5, w_c=3.0, per="position", only_opposing=True),
    ]


def gently_shaped(question: str) -> list[Point]:
    """The same weaker, near the share of right colours that claim (d) asks for."""
    model = trained_domain(question)
    return [
        Point.of(question, "bands", model, w_low=0.15, w_high=0.7, w_c=3.0, width=1.0),
        Point.of(question, "bands", model, w_low=0.0, w_high=1.0, w_c=5.0, width="inf"),
        Point.of(question, "bands", model, w_low=0.3, w_high=1.0, w_c=5.0, width=1.0),
        Point.of(question, "orthogonal", model, w_d=0.7, w_c=3.0, per="position"),
        Point.of(question, "orthogonal", model, w_d=1.0, w_c=5.0, per="position"),
    ]


def of_shipped(question: str) -> Iterator[Point]:
    """The shipped model's rows, kept apart from the others by reports and verdicts."""
    model = shipped(question)
    yield from multi(question, HEADLINE_WEIGHTS[:4], model)
    yield from scheduled(question, SCHEDULES[:2], model)


def training_seeds(question: str) -> Iterator[Point]:
    """The same few points with every model trained from three seeds, those of seed 0 included."""
    own = QUESTIONS[question].own_colours
    for seed in SEEDS:
        weights = HEADLINE_WEIGHTS[:6] if own else HEADLINE_WEIGHTS[2:6]
        yield from multi(question, weights, trained_domain(question, seed=seed))
        if not own:
            yield from multi(question, FOREIGN_WEIGHTS[-2:], trained_domain(question, SHORT_STEPS, seed))
        else:
            tuned = fine_tune(question, "full", HEADLINE_STEPS, FIXED_CAPTION, seed)
            yield from fine_tunes(question, tuned, (1.5, 3.0))


def full_points() -> Iterator[Point]:
    """Everything, most telling first."""
    main, foreign, narrow, narrow_foreign = QUESTIONS
    # 1. The handwriting's own colours, domain model and fine-tunes of one trainer: the prior, the paper's method, the
    #    usual fine-tune, and the same fine-tune after as many steps as the domain model.
    yield from priors(main, (2.0, 1.5, 3.0))
    yield from multi(main, HEADLINE_WEIGHTS[:4])
    yield from fine_tunes(main, fine_tune(main, "full", HEADLINE_STEPS, FIXED_CAPTION), (*SCALES, 1.0))
    yield from fine_tunes(main, fine_tune(main, "full", DOMAIN_STEPS, FIXED_CAPTION), (1.5, 3.0))
    yield from multi(main, HEADLINE_WEIGHTS)
    yield Point.of(main, "domain", trained_domain(main), scale=1.0)
    # 2. Colours it never had, and schedules, most of them at plain CFG's cost.
    yield from priors(foreign, (2.0, 1.5, 3.0))
    yield from multi(foreign, HEADLINE_WEIGHTS)
    for question in (main, foreign):
        yield from late(question)
        yield from scheduled(question, SCHEDULES[:4])
    # 3. The same on narrow handwriting, whose colours are the extreme case, and what could keep them.
    for question in (narrow, narrow_foreign):
        yield from priors(question)
        yield from multi(question, HEADLINE_WEIGHTS)
    yield from shaped(narrow_foreign)
    yield from more_shaped(narrow_foreign)
    yield from late(narrow_foreign)
    yield from scheduled(narrow_foreign, SCHEDULES[:4])
    # 4. What a first look at these left open: domain models stopped as early as fine-tunes are, and settings near the
    #    accuracies that the claims ask for.
    for question in QUESTIONS:
        own = QUESTIONS[question].own_colours
        for steps in (SHORT_STEPS, HEADLINE_STEPS):
            yield from multi(question, OWN_WEIGHTS if own else FOREIGN_WEIGHTS, trained_domain(question, steps))
        if not own:
            yield from gently_shaped(question)
    for question in (narrow, narrow_foreign):
        yield from multi(question, MORE_WEIGHTS)
    for question in (main, narrow):
        yield from multi(question, LITTLE_CONTROL)
    for question in QUESTIONS:
        yield from scheduled(question, LATE_TURNS)
        yield from late(question, LATER)
    # 5. Fine-tuning's best defences: other captions, adapters, and stopping early; one caption on narrow handwriting,
    #    since "a digit" is not less true of it. Three training seeds of the headline rows on the way.
    for steps in LENGTHS:
        yield from all_fine_tunes(main, steps)
        yield from all_fine_tunes(narrow, steps, (FIXED_CAPTION,))
        if steps == HEADLINE_STEPS:
            for question in (main, foreign):
                yield from training_seeds(question)
    # 6. The models that the project ships.
    for question in QUESTIONS:
        yield from of_shipped(question)
    # 7. The rest of the grids.
    for question in QUESTIONS:
        yield from priors(question)
        yield Point.of(question, "domain", trained_domain(question), scale=1.0)
        yield from scheduled(question, SCHEDULES[:4])
        yield from late(question)
        yield from shaped(question)
    for question in (main, foreign):
        yield from multi(question, MORE_WEIGHTS)
        yield from scheduled(question, SCHEDULES)
    # Beside the claims: what fine-tunes make of foreign colours, one caption, stopped as early as our models too.
    for steps in (HEADLINE_STEPS, SHORT_STEPS):
        for kind in ("full", "low_rank"):
            yield from fine_tunes(foreign, fine_tune(foreign, kind, steps, FIXED_CAPTION))


def quick_points() -> Iterator[Point]:
    """A coarse look at every claim: one domain model and one fine-tune are trained, narrow handwriting uses the shipped
    model, so (a) is not asked there."""
    main, foreign, narrow, narrow_foreign = QUESTIONS
    model = trained_domain(main, HEADLINE_STEPS)
    yield from priors(main, (2.0, 1.5))
    yield from multi(main, ((1.5, 3.0), (1.0, 3.0), (1.5, 5.0)), model)
    for steps in (100, HEADLINE_STEPS):
        yield from fine_tunes(main, fine_tune(main, "full", steps, FIXED_CAPTION), (1.5, 3.0))
    yield from scheduled(main, SCHEDULES[:2], model)
    yield from priors(foreign, (2.0,))
    yield from multi(foreign, ((1.0, 3.0), (1.5, 5.0)), model)
    yield from scheduled(foreign, SCHEDULES[:1], model)
    yield from multi(main, ((1.5, 3.0), (1.5, 5.0)), shipped(main))
    yield from multi(foreign, ((1.5, 5.0),), shipped(foreign))
    yield from priors(narrow, (2.0,))
    yield from multi(narrow, ((1.5, 3.0), (1.0, 3.0)), shipped(narrow))
    yield from priors(narrow_foreign, (2.0,))
    yield from multi(narrow_foreign, ((1.0, 3.0),), shipped(narrow_foreign))
    yield from scheduled(narrow_foreign, SCHEDULES[:1], shipped(narrow_foreign))
    yield from shaped(narrow_foreign, shipped(narrow_foreign))[2:]


def tiny_points() -> Iterator[Point]:
    """Shows that everything runs, in seconds; the numbers mean nothing."""
    main, foreign, _, narrow_foreign = QUESTIONS
    model = trained_domain(main, 1)
    yield from priors(main, (2.0,))
    yield from multi(main, ((1.5, 3.0),), model)
    yield from fine_tunes(main, fine_tune(main, "full", 1, FIXED_CAPTION), (1.5,))
    yield from fine_tunes(main, fine_tune(main, "low_rank", 2, ""), (1.5,))
    yield from multi(main, ((1.5, 3.0),), shipped(main))
    yield from scheduled(main, SCHEDULES[:1], model)
    yield from priors(foreign, (2.0,))
    yield from multi(foreign, ((1.5, 3.0),), shipped(foreign))
    yield from shaped(narrow_foreign, shipped(narrow_foreign))[2:]


PLANS = {
    "full": lambda: Plan("full", Sampling(2000, steps=15, precision="bf16"), _once(full_points())),
    "quick": lambda: Plan(
        "quick",
        Sampling(200, steps=15, replicates=200),
        _once(quick_points()),
        images=2000,
        coarse=True,
        options=" --quick",
    ),
    "tiny": lambda: Plan(
        "tiny",
        Sampling(20, steps=2, replicates=20, targets=40),
        _once(tiny_points()),
        16,
        batch=4,
        coarse=True,
        options=" --tiny",
    ),
}


def _once(points: Iterator[Point]) -> tuple[Point, ...]:
    """The points in order, repetitions left out."""
    return tuple(dict.fromkeys(points))
