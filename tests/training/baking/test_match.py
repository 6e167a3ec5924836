"""The share of the guidance that a network lacks: 1 for the prior, 0 for the guidance itself."""

from __future__ import annotations

import math

import pytest
import torch
from indomain_guidance.guidance.schedules import Constant, Interval
from indomain_guidance.training.baking.match import unmatched
from indomain_guidance.training.baking.prompts import EncodedTexts
from indomain_guidance.training.baking.teacher import Teacher
from indomain_guidance.training.baking.terms import BakedTerm
from torch import nn

from .conftest import PROMPTS, unet_of


class Perfect(nn.Module):
    """A network that outputs what the teacher asks for, or a part of the way there."""

    def __init__(self, teacher, prior, share=1.0):
        super().__init__()
        self.teacher, self.prior, self.share = teacher, prior, share

    def forward(self, noisy, timesteps, context):
        empty = {"context": self.prior.null_context.tensor.expand(len(noisy), -1, -1)}
        target = self.teacher.target(noisy, timesteps, empty, {"context": context}, [])
        before = self.teacher.output(noisy, timesteps, self.teacher.before, context=context)
        return before + self.share * (target - before)


@pytest.fixture
def parts(base, domain):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, *shape, generator=generator) for shape in ((8, 8), (8, 8), (4, 16))]
    return (
        Teacher(base, unet_of(base), [BakedTerm("domain", Constant(1.5), domain)]),
        EncodedTexts.of(base, PROMPTS),
        latents,
    )


def test_the_prior_lacks_all_and_the_guidance_nothing(base, parts):
    teacher, texts, latents = parts
    of = lambda unet, **more: unmatched(unet, teacher, texts, latents, "abc", batch=2, **more)  # noqa: E731
    whole, levels = of(unet_of(base))
    assert whole == pytest.approx(1.0, abs=1e-3) and list(levels) == [50, 200, 400, 600, 800, 950]
    assert of(Perfect(teacher, base))[0] < 1e-6
    assert of(Perfect(teacher, base, 0.5))[0] == pytest.approx(0.25, abs=1e-3)  # half the way: a quarter of the square
    assert math.isnan(of(unet_of(base), should_stop=lambda: True)[0])


def test_levels_where_nothing_is_baked_in_do_not_count(base, domain, parts):
    _, texts, latents = parts
    late = Teacher(base, unet_of(base), [BakedTerm("domain", Interval(1.5, 0.5, 1.0), domain)])
    assert list(unmatched(unet_of(base), late, texts, latents, "abc")[1]) == [50, 200, 400]
