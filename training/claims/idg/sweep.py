"""Which points of in-domain guidance are measured in which order: headline rows first, so that a full run is worth
something early on."""

from __future__ import annotations

from functools import partial

from ..points import (
    FIXED_CAPTION,
    Asked,
    ModelSpec,
    Settings,
    domain,
    each,
    late_start,
    points_of,
    scales,
    steps,
    tuned,
    weights,
)
from ..questions import QUESTIONS
from ..study import Plan, Sampling
from .methods import FINE_TUNES


def cheap_schedule(a: float, b: float, w_d: float, w_c: float) -> Settings:
    """The control alone to percent a, both terms to b, the domain model alone (w_d 1, w_c 0: one sample) to the end.

    1 + 2 b - a samples a step on average, so b = (1 + a) / 2 costs two, as plain CFG does.
    """
    start = [(0.0, 0.0)] if a > 0 else []
    return {"w_d": steps(*start, (a, w_d), (b, 1.0)), "w_c": steps((0.0, w_c), (b, 0.0))}


MAIN, FOREIGN, NARROW, NARROW_FOREIGN = QUESTIONS
EVERY, OWN, FOREIGN_TOO = tuple(QUESTIONS), (MAIN, NARROW), (FOREIGN, NARROW_FOREIGN)
PRIOR, SHIPPED = (None,), (partial(ModelSpec, "shipped"),)
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

QUICK_SAMPLING = Sampling(200, replicates=200)
PLANS = {
    "full": Plan(Sampling(2000, precision="bf16"), points_of(FULL)),
    "quick": Plan(QUICK_SAMPLING, points_of(QUICK), 2000, coarse=True, options=" --quick"),
}
