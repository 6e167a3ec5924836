"""Points are measured once on the real parts: trained, baked, kept, found again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from indomain_guidance.training.claims import prompted
from indomain_guidance.training.claims.bake import models as bake_models
from indomain_guidance.training.claims.bake import recipes
from indomain_guidance.training.claims.bake.methods import METHODS
from indomain_guidance.training.claims.bake.recipes import BakedSpec
from indomain_guidance.training.claims.bake.study import BakeStudy
from indomain_guidance.training.claims.points import ModelSpec, Point
from indomain_guidance.training.claims.study import Plan, Sampling

pytestmark = pytest.mark.slow

TINY = Sampling(20, steps=2, replicates=20, targets=40)
SPEC = BakedSpec("baked", "handwriting", 2, batch=4, domain_steps=1)
of = partial(Point.of, "handwriting")
POINTS = (
    of("prior", scale=3.0),
    of("multi_guidance", ModelSpec("domain", "handwriting", 1), w_d=1.5, w_c=3.0),
    of("baked", SPEC, scale=3.0),
    of("baked", SPEC, scale=3.0, strength=0.0),
    of("baked_guided", replace(SPEC, recipe="guided"), scale=1.0),
    of("baked_img2img", SPEC, scale=3.0, denoise=0.6),
    of("text_kept", SPEC),
    of("other_lora", SPEC, other_steps=1),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A study of all points, and their rows."""
    with pytest.MonkeyPatch.context() as patch:
        small = {"own_count": 2, "own_steps": 2, "prompt_list": recipes.vocabulary_captions(2)}
        patch.setattr(bake_models, "BAKING", {**recipes.BAKING, **small})
        study = BakeStudy(Plan(TINY, POINTS, images=8, batch=2), tmp_path_factory.mktemp("claims"))
        yield study, {point: study.measure(point) for point in POINTS}


def test_every_kind_of_point_is_measured_and_read_back(measured, monkeypatch):
    study, rows = measured
    cost = [row.numbers["samples_per_step"] for row in rows.values() if row.point.method in METHODS]
    assert cost == [2.0, 3.0, 2.0, 2.0, 1.0, 2.0]
    assert rows[POINTS[6]].numbers.keys() == rows[POINTS[7]].numbers.keys() >= {"error", "cosine", "error_at_50"}

    def sample(*arguments, **options):
        raise AssertionError("sampled again")

    monkeypatch.setattr(prompted, "sample_prompts", sample)
    assert [row.numbers for row in study.gather()] == [row.numbers for row in rows.values()]


def test_strength_0_is_the_prior_and_two_steps_are_near_it(measured):
    _, rows = measured
    prior, dialled = rows[POINTS[0]].numbers, rows[POINTS[3]].numbers
    assert dialled["kernel"] == prior["kernel"] and dialled["distance"] == prior["distance"]
    assert rows[POINTS[2]].numbers["kernel"] != prior["kernel"]
    assert 0 < rows[POINTS[6]].numbers["error"] < 0.2 and 0 < rows[POINTS[7]].numbers["error"] < 0.5


def test_image_to_image_keeps_what_was_printed(measured):
    _, rows = measured
    numbers = rows[POINTS[5]].numbers
    assert numbers["both_colours"] > 0.7 and numbers["digit"] > 0.6  # in two steps


def test_whatever_decides_the_numbers_is_in_the_key(measured):
    study, _ = measured
    points = [
        *POINTS,
        of("baked", replace(SPEC, steps=3), scale=3.0),
        of("baked", replace(SPEC, batch=5), scale=3.0),
        of("baked", replace(SPEC, seed=1), scale=3.0),
        of("baked", replace(SPEC, domain_steps=2), scale=3.0),
        of("baked", replace(SPEC, recipe="rank 4"), scale=3.0),
        of("other_lora", SPEC, other_steps=2),
        of("fine_tune", ModelSpec("full", "handwriting", 1, "automatic"), scale=3.0),
        of("fine_tune", ModelSpec("full", "handwriting", 1), scale=3.0),
    ]
    assert len({study.key(point) for point in points}) == len(points)


def test_a_lora_put_on_another_adds_its_own_change(measured):
    """Weights with both LoRAs are those with one and the difference that the other makes of the prior."""
    study, _ = measured
    models, other = study.models, ModelSpec("low_rank", "narrow", 1, "a digit")
    prior = study.world.prior.unet.state_dict()
    both = models.prior_with(SPEC, weights=models.prior_with(other))
    one, two = models.prior_with(SPEC), models.prior_with(other)
    for key, weight in prior.items():
        torch.testing.assert_close(both[key], one[key] + two[key] - weight, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(both[key], one[key]) for key in prior)
