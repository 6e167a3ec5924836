"""The claims' logic on made-up points whose verdicts are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.training.claims.bake import claims
from indomain_guidance.training.claims.bake.recipes import EMPTY_PROMPTS, LATE, BakedSpec
from indomain_guidance.training.claims.bake.sweep import PLANS
from indomain_guidance.training.claims.deciding import Verdict, decide
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.points import ModelSpec, Point
from indomain_guidance.training.claims.questions import QUESTIONS

OWN, FOREIGN = "handwriting", "handwriting_foreign"
FLOORS = {
    name: {"floor_uncorrected": 1.5, "autoencoder_floor_uncorrected": 0.1, "ceiling": 300.0} for name in QUESTIONS
}
DOMAIN, TUNED = ModelSpec("domain", OWN, 1000), ModelSpec("full", OWN, 300, "a digit")
BAKED, EMPTY = (BakedSpec("baked", OWN, 500, recipe=name) for name in ("constant", EMPTY_PROMPTS))
LATER = BakedSpec("baked", OWN, 500, recipe=LATE)


def row(method: str, distance: float, share: float, model=None, question: str = OWN, spread=0.01, **settings) -> Row:
    numbers = {"distance": distance, "digit": share, "both_colours": share}
    steps = torch.linspace(-1, 1, 100, dtype=torch.float64)
    draws = {name: value * (1 + spread * steps * (name == "distance")) for name, value in numbers.items()}
    return Row(Point.of(question, method, model, **settings), numbers, draws)


def guided(distance, share, weight=1.5, scale=3.0, **more):
    return row("multi_guidance", distance, share, more.pop("model", DOMAIN), w_d=weight, w_c=scale, **more)


def baked(distance, share, scale=3.0, method="baked", model=BAKED, **more):
    return row(method, distance, share, model, scale=scale, **more)


def prior(distance, share, scale=3.0, **more):
    return row("prior", distance, share, scale=scale, **more)


def decided(name: str, *rows: Row, points=None, coarse: bool = False) -> Verdict:
    (claim,) = (claim for claim in claims.claims(FLOORS, rows) if claim.name == name)
    points = [row.point for row in rows] if points is None else points
    return decide(replace(claim, invalid=""), rows, points, coarse)


def test_a_compares_from_60_to_90_percent_alone():
    theirs = [guided(10, 0.5, scale=1.0), guided(40, 0.8, scale=2.0), guided(80, 0.95, scale=4.0)]
    ours = [baked(30, 0.55, 1.0), baked(35, 0.85, 2.0), baked(70, 0.92, 4.0)]
    verdict = decided("handwriting/a", *theirs, *ours)
    # Up to .8: 35 / 40; above, up to .85: 35 / 80; up to .9: 70 / 80. Below .6 theirs would be nearer.
    assert verdict.outcome == "confirmed" and verdict.value == pytest.approx(70 / 80)
    assert verdict.details["worst at an obedience of"].startswith("90.0%, 70.0 (baked [")


def test_a_is_refuted_where_the_lora_does_not_get_that_far():
    verdict = decided("handwriting/a", guided(40, 0.8), guided(80, 0.95, scale=4.0), baked(20, 0.85))
    assert verdict.outcome == "refuted" and "90.0%, no point against" in verdict.details["worst at an obedience of"]
    nobody = decided("handwriting/a", guided(40, 0.5), baked(20, 0.85))
    assert nobody.outcome == "undecided" and "no point with 60%" in nobody.details["reason"]


def test_a_counts_the_late_start_and_no_other_recipe_or_seed():
    theirs = [guided(40, 0.95)]
    late = baked(30, 0.95, method="baked_late", model=LATER)
    assert decided("handwriting/a", *theirs, baked(50, 0.95), late).outcome == "confirmed"
    others = [baked(1, 0.99, method="ablation", model=EMPTY), baked(1, 0.99, model=replace(BAKED, seed=1))]
    assert decided("handwriting/a", *theirs, baked(50, 0.95), *others).outcome == "refuted"


def test_b_asks_for_both_colours_and_for_every_fine_tune():
    def tune(distance, share, method="fine_tune"):
        return row(method, distance, share, TUNED, FOREIGN, scale=distance)

    rows = [
        prior(200, 0.99, question=FOREIGN),
        baked(120, 0.85, question=FOREIGN),
        baked(20, 0.5, 1.0, question=FOREIGN),
    ]
    found = decided("handwriting_foreign/b", *rows)
    assert found.outcome == "confirmed" and found.value == pytest.approx(0.6)
    assert decided("handwriting_foreign/b/fine-tunes", *rows, tune(130, 0.85)).outcome == "confirmed"
    nearer = tune(110, 0.7, "fine_tune_prior_u")
    assert decided("handwriting_foreign/b/fine-tunes", *rows, tune(130, 0.85), nearer).outcome == "refuted"


def test_c_compares_each_strength_with_its_share_of_the_weight():
    rows = [prior(200, 0.95), guided(40, 0.8), guided(100, 0.9, 0.75), guided(20, 0.6, 2.25)]
    dial = [baked(200, 0.95, strength=0.0), baked(41, 0.8), baked(95, 0.9, strength=0.5)]
    near = decided("handwriting/c", *rows, *dial)
    assert near.outcome == "confirmed" and near.value == pytest.approx(0.05)
    assert near.details["strength 0.5, CFG 3, distance"] == "-5%"
    # Another scale has no guidance to be compared with; less obedience counts as well as more distance.
    far = decided("handwriting/c", *rows, *dial, baked(1, 0.1, 5.0), baked(20, 0.45, strength=1.5))
    assert far.outcome == "refuted" and far.value == pytest.approx(0.25)


def test_d_compares_prompts_at_the_same_scales():
    rows = [baked(40, 0.9), baked(10, 0.99, 9.0), baked(60, 0.9, method="ablation", model=EMPTY)]
    found = decided("handwriting/d", *rows)
    assert found.outcome == "confirmed" and found.value == pytest.approx(0.9 * 20 / 300)
    other = baked(1, 1.0, method="ablation", model=replace(EMPTY, recipe="rank 4"))
    assert decided("handwriting/d", *rows, other).value == pytest.approx(found.value)


def looked_at(method: str, error: float, cosine: float = 1.0) -> Row:
    numbers = {"error": error, "cosine": cosine, "error_at_50": error}
    draws = {name: torch.full((100,), numbers[name], dtype=torch.float64) for name in ("error", "cosine")}
    return Row(Point.of(OWN, method, BAKED), numbers, draws)


def test_e_and_f_read_predictions_and_pictures():
    assert decided("handwriting/e/other_LoRA", looked_at("other_lora", 0.1)).outcome == "confirmed"
    text = looked_at("text_kept", 0.4, 0.97)
    assert decided("handwriting/f", text).outcome == "refuted"
    assert decided("handwriting/f", text).details == {"error_at_50": 0.4}
    assert decided("handwriting/f/cosine", text).outcome == "confirmed"
    pictures = [
        baked(50, 0.9, method="baked_img2img", denoise=0.6),
        guided(60, 0.95, denoise=0.6),
        row("guidance_img2img", 60, 0.95, DOMAIN, w_d=1.5, w_c=3.0, denoise=0.6),
    ]
    found = decided("handwriting/e/image_to_image", *pictures)
    assert found.outcome == "refuted" and found.value == pytest.approx(0.9 / 0.95)


def test_distances_that_mean_nothing_decide_nothing():
    floors = {name: {**values, "ceiling": 20.0} for name, values in FLOORS.items()}
    rows = [guided(40, 0.95), baked(20, 0.95), looked_at("text_kept", 0.1)]
    found = {claim.name: decide(claim, rows, [row.point for row in rows]) for claim in claims.claims(floors, rows)}
    assert found["handwriting/a"].outcome == "undecided" and "not valid" in str(
        found["handwriting/a"].details["reason"]
    )
    assert found["handwriting/f"].outcome == "confirmed"


def test_missing_points_keep_a_verdict_open():
    rows = [guided(40, 0.95), baked(20, 0.95)]
    found = decided("handwriting/a", *rows, points=PLANS["full"].points)
    assert found.outcome == "confirmed so far" and found.measured == 2 < found.planned
    assert decided("handwriting/a", *rows, coarse=True).outcome == "confirmed so far"


def test_every_claim_has_its_points_in_the_full_sweep():
    points = PLANS["full"].points
    for claim in claims.claims(FLOORS, []):
        for name, methods in claim.sides.items():
            assert any(claim.chooses(methods, point) for point in points), (claim.name, name)
