"""The sweeps: what they hold and in which order."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from indomain_guidance.guidance.distillation.objective import WAY_BACK
from indomain_guidance.training.adaptation.config import AdaptConfig
from indomain_guidance.training.claims.sgf import recipes, sweep, tasks
from indomain_guidance.training.claims.sgf.sweep import Point
from indomain_guidance.training.mini_world.first_runs import FIRST_ADAPTATION

ROOT = Path(__file__).resolve().parents[4]

PLANS = sweep.PLANS
TRAINED = {name: [point for point in plan.points if point.is_trained] for name, plan in PLANS.items()}


@pytest.mark.parametrize("name", PLANS)
def test_no_point_is_measured_twice_and_runs_are_whole(name):
    points = PLANS[name].points
    assert len(set(points)) == len(points) > 5
    stops = {}
    for point in TRAINED[name]:
        stops.setdefault(point.run, []).append(point.step)
    # One after the other, so that every stop goes on from the one before.
    assert all(tuple(found) == PLANS[name].stops for found in stops.values())
    runs = [point.run for point in TRAINED[name]]
    assert all(
        len({runs[i] for i in range(start, start + len(PLANS[name].stops))}) == 1
        for start in range(0, len(runs), len(PLANS[name].stops))
    )


def test_the_full_sweep_asks_the_claims_of_every_task():
    points, (first, second, third, dark) = TRAINED["full"], tasks.COLOURS
    released = {*recipes.SGF, *recipes.WEAK}
    for task in tasks.TASKS.values():
        found = {(point.method, point.seed) for point in points if point.question == task.name}
        if task.kind == "domain":
            critics = ("sds", *recipes.GUIDED, "sds_back", *recipes.GUIDED_BACK)
            assert {(name, seed) for name in critics for seed in sweep.SEEDS} == found
        elif task == dark:  # out of this source's reach: a look only
            assert {("sds", 0), ("first", 0)} <= found
        else:
            assert {(name, 0) for name in (*released, *recipes.FAINT, "first")} <= found
            assert {(name, seed) for name in recipes.SGF for seed in sweep.SEEDS} <= found
        if task in (first, second, third, tasks.SEVEN):
            assert {(name, seed) for name in released for seed in sweep.SEEDS} <= found
            assert {(name, 0) for name in ("sds_layers_3", "csd", "shared_directional_weak")} <= found
    assert {point.method for point in points} == set(recipes.RECIPES)


@pytest.mark.parametrize("name", ["full", "quick"])
def test_the_telling_rows_come_first(name):
    first = [point for point in TRAINED[name] if point.step == PLANS[name].stops[-1]][:5]
    assert {point.question for point in first} == {tasks.COLOURS[0].name}
    assert {point.method for point in first} == {*recipes.SGF, *recipes.WEAK}


def test_the_quick_sweep_has_something_of_every_claim():
    points = TRAINED["quick"]
    assert {point.question for point in points} >= {tasks.LONG.name, tasks.SEVEN.name, tasks.DOMAIN.name}
    assert len({point.question for point in points if point.question in {one.name for one in tasks.COLOURS}}) >= 3
    for recipe in ("sds", *recipes.WEAK):
        assert {point.seed for point in points if point.method == recipe} == {0, 1, 2}
    assert {point.method for point in points} >= {*recipes.SGF, "sds_layers_3", "domain", "fine_tune", "csd"}
    assert PLANS["quick"].coarse and not PLANS["full"].coarse


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_configuration_that_fits_every_task(name):
    recipe = recipes.RECIPES[name]
    for task in tasks.TASKS.values():
        config = AdaptConfig.from_mapping(recipe.settings(task))
        config.check_prompts()
        high = name == "first" or name.endswith("_noisy")
        noisy = {"t_min": 300, "t_max": 900} if high else {"t_min": 10, "t_max": task.t_max}
        assert config.prompt == task.prompt and {"t_min": config.t_min, "t_max": config.t_max} == noisy
        assert recipe.released == (config.mode == "sgf" and config.way_back <= 0)
        # All the same but for the objective: nothing else may decide a comparison.
        common = {"learning_rate", "batch_size", "train", "freeze_bias", "ema", "truncation", "schedule"}
        own = {"learning_rate": FIRST_ADAPTATION["learning_rate"]} if name == "first" else {}
        assert {key: getattr(config, key) for key in common} == {key: recipes.COMMON[key] for key in common} | own


def test_what_the_command_line_ships_is_a_row():
    shipped = {**FIRST_ADAPTATION, "prompt": "p"}
    mine = AdaptConfig.from_mapping(recipes.RECIPES["first"].settings(replace(tasks.COLOURS[0], prompt="p")))
    different = {
        field.name
        for field in fields(AdaptConfig)
        if getattr(AdaptConfig.from_mapping(shipped), field.name) != getattr(mine, field.name)
    }
    assert different <= {"name", "steps", "sample_every", "device", "precision", "truncation", "way_back"}
    # What the command line leaves to the mode, the row says itself.
    assert (AdaptConfig.from_mapping(shipped).way_back, mine.mode, mine.way_back) == (-1.0, "shared", WAY_BACK)


def test_points_name_what_they_are():
    assert str(Point("seven", "csd", 100, 2)) == "seven: csd, step 100, seed 2"
    assert str(Point("seven", "source")) == "seven: source" and not Point("seven", "exact").is_trained


def test_every_set_of_recipes_is_made_of_recipes():
    strengths = (*recipes.DIRECTIONAL, *recipes.RECONSTRUCTION, *recipes.LAYERS, *recipes.GUIDED, *recipes.GUIDED_BACK)
    assert {*recipes.SGF, *recipes.BEYOND, *strengths} <= set(recipes.RECIPES)
    assert all(recipes.RECIPES[name].released for name in recipes.SGF)
    assert not any(recipes.RECIPES[name].released for name in recipes.BEYOND)


def test_the_readme_names_the_long_prompt_and_the_scale():
    text = " ".join((ROOT / "docs" / "claims" / "sgf" / "README.md").read_text(encoding="utf-8").split())
    assert tasks.LONG.prompt in text
    assert f"guidance scale: {recipes.SCALE:g}, since at the released {recipes.RELEASED_SCALE:g}" in text
    scales = {recipe.settings(tasks.COLOURS[0])["scale"] for recipe in recipes.RECIPES.values()}
    assert scales == {recipes.SCALE, recipes.RELEASED_SCALE, recipes.FIRST["scale"]}
