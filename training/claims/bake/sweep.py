"""Which points are measured in which order: headline rows first, so that a full run is worth something early on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import product

from ..points import (
    AUTOMATIC,
    FIXED_CAPTION,
    Asked,
    Make,
    ModelSpec,
    Settings,
    domain,
    late_start,
    points_of,
    scales,
    tuned,
    weights,
)
from ..questions import QUESTIONS
from ..study import Plan, Sampling
from .methods import FINE_TUNES, OTHER_LORA, TEXT_KEPT
from .recipes import ABLATIONS, CONSTANT, EMPTY_PROMPTS, GUIDED, LATE, LATE_FROM, LATE_WEIGHT, STEPS, BakedSpec

MAIN, FOREIGN, NARROW, NARROW_FOREIGN = QUESTIONS
EVERY, HANDWRITING, BOTH_NARROW = tuple(QUESTIONS), (MAIN, FOREIGN), (NARROW, NARROW_FOREIGN)
MULTI, LATE_START, BAKED = ("multi_guidance",), ("late_start",), ("baked",)
PRIOR: tuple[Make | None] = (None,)
WEIGHT = 1.5  # of the domain model, baked in at strength 1
# One sweep of scales for everything of the form u + w (c - u), the most telling first.
CFG, MORE_CFG = (3.0, 4.0, 2.0, 5.0), (1.5, 7.0)
DIAL, DIAL_CFG = (0.5, 1.5, 0.0), (3.0, 5.0)
STRENGTHS = (1.0, 0.5, 0.75, 0.25)
KINDS, CAPTIONS = ("full", "low_rank"), (FIXED_CAPTION, "", AUTOMATIC)
IMG2IMG = 0.6
SEEDS = (1, 2)


def baked(recipe: str = CONSTANT, *seeds: int, steps: int = STEPS) -> list[Make]:
    return [partial(BakedSpec, "baked", steps=steps, seed=seed, recipe=recipe) for seed in seeds or (0,)]


def briefly(recipe: str = CONSTANT) -> list[Make]:
    """As a quick sweep bakes, from a domain model of 300 steps."""
    return [partial(BakedSpec, "baked", steps=200, recipe=recipe, batch=32, domain_steps=300)]


def dial(strengths: Iterable[float], scales: Iterable[float]) -> list[Settings]:
    """Settings of a model whose change of the prior is turned up and down; strength 1 is left unsaid."""
    return [
        {"scale": scale} if strength == 1.0 else {"scale": scale, "strength": strength}
        for strength, scale in product(strengths, scales)
    ]


def constant(shares: Iterable[float], scales: Iterable[float]) -> list[Settings]:
    """Guidance at shares of the weight that is baked in."""
    return weights(*((WEIGHT * share, scale) for share, scale in product(shares, scales)))


def late(scales: Iterable[float]) -> list[Settings]:
    return [late_start(LATE_FROM, LATE_WEIGHT, scale) for scale in scales]


def img2img(settings: Iterable[Settings]) -> list[Settings]:
    return [{**some, "denoise": IMG2IMG} for some in settings]


def beside(length: int) -> list[Settings]:
    """The other LoRA, a fine-tune on the other handwriting after so many steps."""
    return [{"other_steps": length}]


def other_lora(domain: str, length: int) -> ModelSpec:
    """The LoRA that is put beside a baked one of a domain: of the other handwriting."""
    other = {"handwriting": "narrow", "narrow": "handwriting"}[domain]
    return ModelSpec("low_rank", other, length, FIXED_CAPTION)


ABLATED = [partial(BakedSpec, "baked", steps=STEPS, recipe=name) for name in ABLATIONS]
SHORT, LONG = (baked(steps=steps) for steps in (100, 1000))
FULL: tuple[Asked, ...] = (
    # Coloured handwriting in its own and in foreign colours: the prior, constant guidance, and what is baked of it.
    (HANDWRITING, ("prior",), PRIOR, scales(2.0, 3.0, 1.5, 5.0)),
    (HANDWRITING, MULTI, domain(1000), constant([1.0], CFG)),
    (HANDWRITING, BAKED, baked(), scales(*CFG)),
    (HANDWRITING, LATE_START, domain(1000), late((3.0, 4.0, 5.0))),
    (HANDWRITING, ("baked_late",), baked(LATE), scales(3.0, 4.0, 5.0)),
    # The dial.
    (HANDWRITING, BAKED, baked(), dial(DIAL, DIAL_CFG)),
    (HANDWRITING, MULTI, domain(1000), constant((0.5, 1.5), DIAL_CFG)),
    # The rivals as they are usually trained and used.
    (HANDWRITING, FINE_TUNES, tuned(KINDS, [300], CAPTIONS), dial([1.0], (3.0,))),
    # Narrow handwriting, whose colours are the extreme case.
    (BOTH_NARROW, ("prior",), PRIOR, scales(2.0, 3.0, 1.5, 5.0)),
    (BOTH_NARROW, MULTI, domain(1000), constant([1.0], CFG)),
    (BOTH_NARROW, BAKED, baked(), scales(*CFG)),
    (BOTH_NARROW, LATE_START, domain(1000), late((3.0, 4.0, 5.0))),
    (BOTH_NARROW, ("baked_late",), baked(LATE), scales(3.0, 4.0, 5.0)),
    # The text, other LoRAs, image to image, and one prediction a step.
    ((MAIN, NARROW), (TEXT_KEPT,), baked(), [{}]),
    ((MAIN,), (OTHER_LORA,), baked(), beside(300)),
    (HANDWRITING, ("prior_img2img",), PRIOR, img2img(scales(3.0))),
    (HANDWRITING, ("guidance_img2img",), domain(1000), img2img(constant([1.0], (3.0,)))),
    (HANDWRITING, ("baked_img2img",), baked(), img2img(scales(3.0))),
    (HANDWRITING, ("baked_guided",), baked(GUIDED), scales(1.0)),
    # Why: guidance by what the LoRA learned instead of the domain model, and one thing changed at a time.
    (HANDWRITING, ("student",), baked(), weights((1.0, 3.0), (1.0, 4.0))),
    (HANDWRITING, ("ablation",), ABLATED, scales(3.0, 4.0)),
    (HANDWRITING, ("ablation",), SHORT + baked(steps=300) + LONG, scales(3.0, 4.0)),
    # Fine-tunes at every strength of their dial, and as long as the domain model.
    (HANDWRITING, FINE_TUNES, tuned(KINDS, [300], CAPTIONS), dial(STRENGTHS, (3.0,))),
    (HANDWRITING, FINE_TUNES, tuned(KINDS, [300], CAPTIONS), dial(STRENGTHS, (5.0,))),
    (HANDWRITING, FINE_TUNES, tuned(KINDS, [1000], (FIXED_CAPTION, AUTOMATIC)), dial((1.0, 0.5), (3.0,))),
    # More weights and scales.
    (HANDWRITING, ("prior",), PRIOR, scales(7.0)),
    (HANDWRITING, MULTI, domain(1000), constant([1.0], MORE_CFG) + constant((0.5, 1.5), (2.0, 7.0))),
    (HANDWRITING, BAKED, baked(), dial([1.0], MORE_CFG) + dial((0.5, 1.5), (2.0, 7.0))),
    (HANDWRITING, LATE_START, domain(1000), late((2.0, 7.0))),
    (HANDWRITING, ("baked_late",), baked(LATE), dial([1.0], (2.0, 7.0)) + dial((0.5, 1.5), (3.0, 5.0))),
    # Further training seeds, of domain model and LoRA, of the headline rows.
    (HANDWRITING, BAKED, baked(CONSTANT, *SEEDS), scales(3.0, 4.0)),
    (HANDWRITING, MULTI, domain(1000, *SEEDS), constant([1.0], (3.0, 4.0))),
    # The same of narrow handwriting, fewer.
    (BOTH_NARROW, BAKED, baked(), dial(DIAL, DIAL_CFG)),
    (BOTH_NARROW, MULTI, domain(1000), constant((0.5, 1.5), DIAL_CFG)),
    (BOTH_NARROW, ("baked_guided",), baked(GUIDED), scales(1.0)),
    (BOTH_NARROW, FINE_TUNES, tuned(KINDS, [300], (FIXED_CAPTION, AUTOMATIC)), dial((1.0, 0.5), (3.0,))),
    (EVERY, ("domain",), domain(1000), scales(1.0)),
)
# A coarse look at every claim in half an hour, of coloured handwriting: short trainings, one fine-tune of each kind.
QUICK: tuple[Asked, ...] = (
    (HANDWRITING, ("prior",), PRIOR, scales(2.0, 3.0)),
    (HANDWRITING, MULTI, domain(300), constant([1.0], (3.0, 4.0))),
    (HANDWRITING, BAKED, briefly(), scales(3.0, 4.0)),
    ((MAIN,), (TEXT_KEPT,), briefly(), [{}]),
    (HANDWRITING, BAKED, briefly(), dial((0.5, 1.5, 0.0), (3.0,))),
    (HANDWRITING, MULTI, domain(300), constant((0.5, 1.5), (3.0,))),
    (HANDWRITING, FINE_TUNES, tuned(["low_rank"], [100], [FIXED_CAPTION]), dial([1.0], (3.0,))),
    (HANDWRITING, ("fine_tune",), tuned(["low_rank"], [100], [FIXED_CAPTION]), dial([0.5], (3.0,))),
    ((MAIN,), ("guidance_img2img",), domain(300), img2img(constant([1.0], (3.0,)))),
    ((MAIN,), ("baked_img2img",), briefly(), img2img(scales(3.0))),
    (HANDWRITING, ("ablation",), briefly(EMPTY_PROMPTS), scales(3.0, 4.0)),
    ((MAIN,), (OTHER_LORA,), briefly(), beside(30)),
)
PLANS = {
    "full": Plan(Sampling(2000, precision="bf16"), points_of(FULL)),
    "quick": Plan(Sampling(200, replicates=200), points_of(QUICK), 2000, coarse=True, options=" --quick"),
}
