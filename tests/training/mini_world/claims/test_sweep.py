"""The sweeps: what they hold, their order, and what their schedules cost."""

from __future__ import annotations

import pytest
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.presets import in_domain
from indomain_guidance.guidance.sampling import sigmas_uniform
from indomain_guidance.guidance.schedules import weight_from_json
from indomain_guidance.training.mini_world.claims import sweep
from indomain_guidance.training.mini_world.claims.methods import METHODS
from indomain_guidance.training.mini_world.claims.points import Point
from indomain_guidance.training.mini_world.claims.questions import QUESTIONS

PLANS = {name: make() for name, make in sweep.PLANS.items()}


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
        assert {("prior", ""), ("domain", "shipped"), ("multi_guidance", "shipped"), ("scheduled", "shipped")} <= asked
        assert {
            (method, kind) for method in ("fine_tune", "fine_tune_prior_u") for kind in ("full", "low_rank")
        } <= asked
        scales = {p.values["scale"] for p in points if p.question == question and p.method == "prior"}
        assert scales == set(sweep.SCALES)
    tuned = [p for p in points if p.question == "handwriting" and p.method == "fine_tune" and p.model.seed == 0]
    assert {(p.model.kind, p.model.caption, p.model.steps, p.values["scale"]) for p in tuned} == {
        (kind, caption, steps, scale)
        for kind in ("full", "low_rank")
        for caption in sweep.CAPTIONS
        for steps in sweep.LENGTHS
        for scale in sweep.SCALES
    }
    seen = {
        (p.model, p.values["scale"]) for p in points if p.question == "handwriting" and p.method == "fine_tune_prior_u"
    }
    assert seen == {
        (p.model, p.values["scale"])
        for p in points
        if p.question == "handwriting" and p.method == "fine_tune" and p.values["scale"] != 1.0
    }


def test_headline_rows_come_first_and_have_three_training_seeds():
    points = PLANS["full"].points
    first = points[:20]
    assert {point.question for point in first} == {"handwriting"}
    assert {"prior", "domain", "multi_guidance", "fine_tune", "fine_tune_prior_u"} <= {point.method for point in first}
    seeds = {}
    for point in points:
        if point.model is not None and point.model.kind != "shipped":
            seeds.setdefault(point.with_seed(0), set()).add(point.model.seed)
    assert sum(found == {0, 1, 2} for found in seeds.values()) >= 10
    assert {point.method for point, found in seeds.items() if found == {0, 1, 2}} >= {"multi_guidance", "fine_tune"}


@pytest.mark.parametrize("schedule", sweep.SCHEDULES)
def test_every_schedule_costs_at_most_two_samples_a_step(schedule):
    noise = NoiseSchedule.scaled_linear()
    weights = {name: weight_from_json(value) for name, value in sweep.cheap_schedule(*schedule).items()}
    guidance = in_domain(lambda: 0, lambda: 0, {}, {"c": 1}, weights["w_d"], weights["w_c"])
    costs = [guidance.at(float(sigma), noise.percent_to_sigma).samples for sigma in sigmas_uniform(noise, 25)[:-1]]
    assert sum(costs) / len(costs) <= 2.0
    assert costs[-1] == 1 and max(costs) == 3


def test_the_settings_are_parts_of_the_point_and_readable():
    point = sweep.scheduled("handwriting", sweep.SCHEDULES[:1])[0]
    assert str(point) == "handwriting: scheduled [shipped handwriting] w_c 4@0/0@0.6, w_d 0@0/2@0.2/1@0.6"
    assert (
        Point.of("narrow", "prior", scale=2.0)
        == Point.of("narrow", "prior", scale=2.0)
        != Point.of("narrow", "prior", scale=3.0)
    )
    for make in (lambda: Point.of("digits", "prior"), lambda: Point.of("narrow", "magic")):
        with pytest.raises(ValueError, match="expected one of the"):
            make()
