"""The sweeps of baked LoRAs: what they hold, their order, and that each rival has what is needed to compare it."""

from __future__ import annotations

from pathlib import Path

import pytest
from indomain_guidance.training.baking.config import BakeConfig
from indomain_guidance.training.claims.bake import sweep
from indomain_guidance.training.claims.bake.methods import METHODS, OTHER_LORA, TEXT_KEPT
from indomain_guidance.training.claims.bake.models import BakeModels
from indomain_guidance.training.claims.bake.recipes import ABLATIONS, LATE, RECIPES, BakedSpec, vocabulary_captions
from indomain_guidance.training.claims.points import AUTOMATIC, FIXED_CAPTION, Point
from indomain_guidance.training.claims.questions import QUESTIONS
from indomain_guidance.training.mini_world.tokens import tokenize

PLANS = sweep.PLANS
FULL = PLANS["full"].points


@pytest.mark.parametrize("name", PLANS)
def test_no_point_is_measured_twice_and_all_belong_to_a_method(name):
    points = PLANS[name].points
    assert len(set(points)) == len(points) > 5
    assert {point.method for point in points} <= {*METHODS, TEXT_KEPT, OTHER_LORA}


def test_the_full_sweep_asks_everything_of_coloured_handwriting():
    assert PLANS["full"].sampling.samples == 2000 and {point.question for point in FULL} == set(QUESTIONS)
    assert {p.method for p in FULL if p.question == "handwriting"} == {*METHODS, TEXT_KEPT, OTHER_LORA}
    for question in ("handwriting", "handwriting_foreign"):
        recipes = {p.model.recipe for p in FULL if p.question == question and isinstance(p.model, BakedSpec)}
        assert recipes == {*RECIPES, *ABLATIONS}


@pytest.mark.parametrize("question", ["handwriting", "handwriting_foreign"])
def test_fine_tunes_have_every_kind_caption_strength_and_unconditional(question):
    found = {
        (p.method, p.model.kind, p.model.caption, p.values.get("strength", 1.0), p.values["scale"])
        for p in FULL
        if p.question == question and p.method.startswith("fine_tune") and p.model.steps == 300
    }
    assert found == {
        (method, kind, caption, strength, scale)
        for method in ("fine_tune", "fine_tune_prior_u")
        for kind in ("full", "low_rank")
        for caption in ("", FIXED_CAPTION, AUTOMATIC)
        for strength in (0.25, 0.5, 0.75, 1.0)
        for scale in (3.0, 5.0)
    }


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_strength_of_the_dial_has_its_guidance(question):
    own = [p for p in FULL if p.question == question and p.seed == 0]
    guided = {(p.values["w_d"], p.values["w_c"]) for p in own if p.method == "multi_guidance"}
    prior = {(0.0, p.values["scale"]) for p in own if p.method == "prior"}
    dialled = {(sweep.WEIGHT * p.values.get("strength", 1.0), p.values["scale"]) for p in own if p.method == "baked"}
    assert dialled <= guided | prior and {weight / sweep.WEIGHT for weight, _ in dialled} == {0.0, 0.5, 1.0, 1.5}


def test_the_headline_comes_first_and_has_three_training_seeds():
    first = FULL[:24]
    assert {point.method for point in first} == {"prior", "multi_guidance", "baked"}
    assert {point.question for point in first} == {"handwriting", "handwriting_foreign"}
    seeds: dict[Point, set[int]] = {}
    for point in FULL:
        if point.method in ("baked", "multi_guidance"):
            seeds.setdefault(point.with_seed(0), set()).add(point.seed)
    three = [point for point, found in seeds.items() if found == {0, 1, 2}]
    assert len(three) == 8 and {point.method for point in three} == {"baked", "multi_guidance"}


def test_a_baked_model_and_its_guidance_share_domain_model_seed_and_late_start(tmp_path):
    models = BakeModels(tmp_path, world=None)
    spec = BakedSpec("baked", "handwriting", 500, seed=2, recipe=LATE)
    assert spec.of_domain in {p.model for p in FULL if p.method == "multi_guidance"}
    settings = models.settings(spec)
    (late,) = sweep.late((3.0,))
    assert late["w_d"]["points"] == [[0.0, 0.0], [settings["domain_start"], settings["domain_weight"]]]
    assert models.settings(BakedSpec("baked", "handwriting", 500))["domain_weight"] == sweep.WEIGHT


@pytest.mark.parametrize("recipe", [*RECIPES, *ABLATIONS])
def test_every_recipe_is_a_configuration_of_the_baker_and_a_run_of_its_own(recipe, tmp_path):
    models = BakeModels(tmp_path, world=None)
    spec, plain = (BakedSpec("baked", "handwriting", 500, recipe=name) for name in (recipe, "constant"))
    config = BakeConfig.from_mapping({**models.settings(spec), "domain": "mini-handwriting", "steps": 500})
    assert (config.train == "low_rank") == spec.is_lora and ":" not in spec.run_name
    assert (spec.run_name == plain.run_name) == (recipe == "constant")
    assert (models.facts(spec) == models.facts(plain)) == (recipe == "constant")
    longer = BakedSpec("baked", "handwriting", 1000, recipe=recipe)
    assert longer.run_name != spec.run_name  # its rate falls more slowly


def test_the_prompts_to_bake_at_are_captions_that_the_prior_knows():
    captions = vocabulary_captions(256)
    assert len(captions) == 256 and len(set(captions)) > 150
    assert not any(tokenize(caption).equal(tokenize("")) for caption in captions)
    assert all(" on a" in caption and caption.endswith("background") for caption in captions)


def test_the_readme_states_what_the_sweeps_hold():
    text = (Path(__file__).resolve().parents[4] / "docs" / "claims" / "bake" / "README.md").read_text(encoding="utf-8")
    for plan in PLANS.values():
        assert f"{len(plan.points)} points of {plan.sampling.samples:,} samples" in text
