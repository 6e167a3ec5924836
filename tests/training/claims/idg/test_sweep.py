"""The sweeps: what they hold, their order, and what their schedules cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.presets import in_domain
from indomain_guidance.guidance.sampling import sigmas_uniform
from indomain_guidance.guidance.schedules import weight_from_json
from indomain_guidance.training.claims.idg import sweep
from indomain_guidance.training.claims.idg.methods import METHODS
from indomain_guidance.training.claims.models import Models
from indomain_guidance.training.claims.points import FIXED_CAPTION, ModelSpec, Point
from indomain_guidance.training.claims.questions import QUESTIONS

ROOT = Path(__file__).resolve().parents[4]

PLANS = sweep.PLANS


@pytest.mark.parametrize("name", PLANS)
def test_no_point_is_measured_twice(name):
    assert len(set(PLANS[name].points)) == len(PLANS[name].points) > 5


def test_the_full_sweep_asks_everything_of_everyone():
    points = PLANS["full"].points
    assert PLANS["full"].sampling.samples == 2000
    assert {point.method for point in points} == set(METHODS)
    assert {point.question for point in points} == set(QUESTIONS)
    for question in QUESTIONS:
        asked = {(p.method, p.model.kind if p.model else "") for p in points if p.question == question}
        ours = {(method, "domain") for method in ("domain", "multi_guidance", "scheduled", "orthogonal", "bands")}
        assert {("prior", ""), *ours} <= asked
        assert {("multi_guidance", "shipped"), ("scheduled", "shipped")} <= asked
        tuned = {(method, kind) for method in ("fine_tune", "fine_tune_prior_u") for kind in ("full", "low_rank")}
        assert question == "narrow_foreign" or tuned <= asked
        scales = {p.values["scale"] for p in points if p.question == question and p.method == "prior"}
        assert scales == set(sweep.PRIOR_SCALES)


@pytest.mark.parametrize("question", ["handwriting", "narrow"])
def test_fine_tunes_have_every_kind_caption_length_and_scale_in_both_domains(question):
    points = [p for p in PLANS["full"].points if p.question == question and p.values.get("scale") != 1.0]
    tuned = [p for p in points if p.method == "fine_tune"]
    captions = sweep.CAPTIONS if question == "handwriting" else (FIXED_CAPTION,)
    assert {(p.model.kind, p.model.caption, p.model.steps, p.values["scale"]) for p in tuned if not p.model.seed} == {
        (kind, caption, steps, scale)
        for kind in ("full", "low_rank")
        for caption in captions
        for steps in sweep.LENGTHS
        for scale in sweep.SCALES
    }
    assert {(p.model, p.values["scale"]) for p in points if p.method == "fine_tune_prior_u"} == {
        (p.model, p.values["scale"]) for p in tuned
    }


@pytest.mark.parametrize("question", QUESTIONS)
def test_domain_models_are_stopped_early_too(question):
    points = [p for p in PLANS["full"].points if p.question == question and p.method == "multi_guidance"]
    assert {p.model.steps for p in points if p.model.kind == "domain"} == {100, 300, 1000}


def test_domain_models_and_fine_tunes_are_trained_alike():
    """Everything that the trainer is told, but for the caption, and for a LoRA's kind and rate."""
    models = Models(Path("unused"), world=None)
    names = {"name", "form", "caption"}
    domain, full, low_rank = (
        models.settings(ModelSpec(kind, "handwriting", 1000, "" if kind == "domain" else "a digit"))
        for kind in ("domain", "full", "low_rank")
    )
    assert {key for key in domain if domain[key] != full[key]} == names
    of_adapters = {"train", "learning_rate", "layers", "rank"}
    assert {key for key in low_rank if domain.get(key) != low_rank[key]} == names | of_adapters


def test_comparable_rows_come_first():
    first = PLANS["full"].points[:22]
    assert {point.question for point in first} == {"handwriting"}
    assert {"prior", "domain", "multi_guidance", "fine_tune", "fine_tune_prior_u"} <= {point.method for point in first}
    models = {point.model for point in first if point.model}
    assert all(model.kind != "shipped" for model in models)
    # The domain model and a fine-tune of as many steps, and the length at which fine-tunes are usually stopped.
    assert {(model.kind, model.steps) for model in models} == {("domain", 1000), ("full", 300), ("full", 1000)}


@pytest.mark.parametrize("question", ["handwriting", "handwriting_foreign"])
def test_the_headline_has_points_of_three_training_seeds(question):
    seeds = {}
    for point in PLANS["full"].points:
        if point.question == question and point.model is not None and point.model.kind != "shipped":
            seeds.setdefault(point.with_seed(0), set()).add(point.model.seed)
    assert {frozenset(found) for found in seeds.values()} == {frozenset({0}), frozenset({0, 1, 2})}
    three = [point.method for point, found in seeds.items() if len(found) == 3]
    assert three.count("multi_guidance") == 6
    if QUESTIONS[question].own_colours:
        assert three.count("fine_tune") == three.count("fine_tune_prior_u") == 2


def test_the_readme_states_what_the_sweeps_cost():
    text = " ".join((ROOT / "docs" / "claims" / "idg" / "README.md").read_text(encoding="utf-8").split())
    full, quick = PLANS["full"], PLANS["quick"]
    assert f"{len(full.points)} points of {full.sampling.samples:,} samples" in text
    assert f"{len(quick.points)} points of {quick.sampling.samples} samples" in text
    longest = {}
    for model in {point.model for point in full.points if point.model and point.model.kind != "shipped"}:
        longest[model.run_name] = max(longest.get(model.run_name, 0), model.steps)
    assert f"makes {len(longest)} training runs, {sum(longest.values()):,} steps of {full.batch} images" in text


def costs(settings: dict, steps: int) -> list[int]:
    noise = NoiseSchedule.scaled_linear()
    weights = {name: weight_from_json(value) for name, value in settings.items()}
    guidance = in_domain(lambda: 0, lambda: 0, {}, {"c": 1}, weights["w_d"], weights["w_c"])
    sigmas = sigmas_uniform(noise, steps)[:-1]
    return [guidance.at(float(sigma), noise.percent_to_sigma).samples for sigma in sigmas]


@pytest.mark.parametrize("steps", [15, 25])
@pytest.mark.parametrize("schedule", sweep.CHEAP + sweep.MORE_CHEAP)
def test_every_schedule_costs_at_most_two_samples_a_step(schedule, steps):
    found = costs(schedule, steps)
    assert sum(found) / len(found) <= 2.0
    assert found[-1] == 1 and max(found) == 3


@pytest.mark.parametrize("start", sweep.LATE)
def test_a_late_start_asks_the_control_alone_until_then(start):
    found, begins = costs(start, 100), start["w_d"]["points"][1][0]
    early = round(begins * 100)
    assert set(found[: early - 2]) == {2} and set(found[early + 2 :]) == {3}


def test_the_settings_are_parts_of_the_point_and_readable():
    point = Point.of("handwriting", "scheduled", ModelSpec("shipped", "handwriting"), **sweep.CHEAP[0])
    assert str(point) == "handwriting: scheduled [shipped handwriting] w_c 4@0/0@0.6, w_d 0@0/2@0.2/1@0.6"
    assert (
        Point.of("narrow", "prior", scale=2.0)
        == Point.of("narrow", "prior", scale=2.0)
        != Point.of("narrow", "prior", scale=3.0)
    )
