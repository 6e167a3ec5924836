"""Which points of a sweep are drawn anew, on made-up rows."""

from __future__ import annotations

from dataclasses import replace

from indomain_guidance.training.claims.idg.confirming import confirming
from indomain_guidance.training.claims.idg.study import IdgStudy
from indomain_guidance.training.claims.idg.sweep import PLANS
from indomain_guidance.training.claims.keeping import Row
from indomain_guidance.training.claims.points import ModelSpec, Point

DOMAIN, SHORTER = (ModelSpec("domain", "handwriting", steps) for steps in (1000, 100))
TUNED = ModelSpec("full", "handwriting", 300, "a digit")


def row(method: str, distance: float, share: float, model=None, question="handwriting", cost=3.0, **settings) -> Row:
    point = Point.of(question, method, model, **(settings or {"scale": distance}))
    numbers = {"distance": distance, "digit": share, "both_colours": share, "samples_per_step": cost}
    return Row(point, numbers, {})


def test_the_nearest_are_drawn_anew_with_every_training_seed():
    near, worse, few, exact = (
        row("multi_guidance", distance, share, DOMAIN, w_d=distance, w_c=1.0)
        for distance, share in ((20, 0.6), (30, 0.5), (5, 0.2), (90, 0.95))
    )
    nearer = row("multi_guidance", 80, 0.96, SHORTER, w_d=1.0, w_c=2.0)  # but not of the schedules' model
    cheap, dear = (row("scheduled", 15 + cost, 0.7, DOMAIN, cost=cost, w_d=cost, w_c=2.0) for cost in (2.0, 1.5))
    costly = row("scheduled", 10, 0.8, DOMAIN, cost=2.5, w_d=9.0, w_c=2.0)
    prior = [row("prior", 200.0, 0.98), row("prior", 250.0, 0.9)]
    shipped = row("multi_guidance", 1, 1.0, ModelSpec("shipped", "handwriting"), w_d=1.0, w_c=1.0)
    tuned, beaten = row("fine_tune", 40, 0.7, TUNED, scale=1.5), row("fine_tune_prior_u", 50, 0.6, TUNED, scale=1.5)
    other_seed = near.point.with_seed(1)
    rows = [near, worse, few, exact, nearer, cheap, dear, costly, *prior, shipped, tuned, beaten]
    plan = replace(PLANS["full"], points=(*(one.point for one in rows), other_seed, worse.point.with_seed(1)))
    found = confirming(plan, rows)
    # What is nearest at no accuracy and the shipped model's are left; all priors are what others are held against, and
    # schedules are held against constant weights of their own model.
    expected = {row.point for row in (*prior, near, nearer, costly, tuned, dear, exact)}
    assert set(found.points[:-1]) == expected and len(found.points) == 9 and found.points[-1] == other_seed
    assert (found.sampling.samples, found.sampling.seed) == (2000, 1) and found.sampling.precision == "bf16"
    assert (
        found.options == " --confirm"
        and "These are 8 of the 13 points that the sweep had measured (of 15, 2,000" in found.note
    )


def test_the_study_takes_the_sweep_as_far_as_it_is_measured(tmp_path):
    found = IdgStudy.open("confirm", tmp_path, 500)
    assert found.plan.points == () and found.plan.options == " --confirm --samples 500"
