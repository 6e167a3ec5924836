"""Timesteps, weightings and clamps."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.distillation.gradients import (
    clamp_image_gradient,
    clamp_latent_gradient,
    lead_back,
    quantile,
)
from indomain_guidance.guidance.distillation.timesteps import Timesteps
from indomain_guidance.guidance.distillation.weighting import WEIGHTINGS
from indomain_guidance.guidance.errors import GuidanceError


def test_uniform_timesteps_include_both_ends():
    drawn = Timesteps(10, 14).draw(4000, 7, 10, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=15)[10:]
    assert int(counts.sum()) == 4000 and int(counts.min()) > 680
    assert Timesteps(5, 5).draw(3, 0, 1).tolist() == [5, 5, 5]


def test_the_annealed_range_falls_and_the_falling_schedule_is_monotone():
    annealed, falling = Timesteps(10, 500, "annealed"), Timesteps(10, 500, "falling")
    assert [annealed.upper(step, 5) for step in range(5)] == [500, 378, 255, 132, 10]
    generator = torch.Generator().manual_seed(0)
    assert int(annealed.draw(1000, 3, 5, generator).max()) in range(120, 133)
    assert [falling.draw(2, step, 5).tolist() for step in range(5)] == [[t] * 2 for t in (500, 378, 255, 132, 10)]
    assert falling.draw(1, 0, 1).tolist() == [500] and falling.draw(1, 9, 5).tolist() == [10]


def test_ranges_that_cannot_be_drawn_from_are_refused():
    for wrong, message in (
        (dict(t_min=20, t_max=10), "t_min 20 and t_max 10"),
        (dict(t_min=-1), "t_min -1"),
        (dict(schedule="random"), "got 'random'"),
    ):
        with pytest.raises(GuidanceError, match=message):
            Timesteps(**wrong)


def test_weightings(schedule):
    abar = schedule.alphas_cumprod[[20, 700]]
    sigma = schedule.sigmas[[20, 700]]
    for name, expected in (
        ("1-abar", sigma**2 / (1 + sigma**2)),
        ("uniform", torch.ones(2)),
        ("sigma", sigma),
        ("sigma2", sigma**2),
        ("sqrt_abar", abar.sqrt() * (1 - abar)),
    ):
        torch.testing.assert_close(WEIGHTINGS[name](abar), expected, rtol=1e-4, atol=1e-6)


def test_nothing_leads_further_out():
    images = torch.tensor([-2.0, -2.0, -1.0, -1.0, 0.0, 1.0, 1.0, 2.0, 2.0])
    gradient = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    assert lead_back(gradient, images).tolist() == [-1, 0, -1, 1, 1, -1, 1, 0, 1]
    assert lead_back(gradient, images, share=0.25).tolist() == [-0.25, 0, -1, 1, 1, -1, 1, 0, 0.25]
    assert torch.equal(lead_back(gradient, images, 2.0, 0.0), gradient)


def test_the_latent_clamp_says_what_it_changed():
    gradient = torch.tensor([-3.0, -1.0, 0.5, 1.0, 1.1])
    clamped, share = clamp_latent_gradient(gradient, 1.0)
    assert clamped.tolist() == [-1.0, -1.0, 0.5, 1.0, 1.0] and float(share) == pytest.approx(0.4)
    same, none = clamp_latent_gradient(gradient, None)
    assert same is gradient and float(none) == 0


def test_the_image_clamp_is_per_sample_at_its_quantile():
    scale = torch.tensor([1.0, 100.0]).reshape(2, 1, 1, 1)
    gradient = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale
    clamped, share = clamp_image_gradient(gradient, 0.95)
    for row in range(2):
        limit = torch.quantile(gradient[row].abs().flatten(), 0.95)
        torch.testing.assert_close(clamped[row], gradient[row].clamp(-limit, limit))
    assert float(share) == pytest.approx(0.05, abs=0.005)
    gradient[0, 0, 0, 0] = float("inf")
    assert not bool(clamp_image_gradient(gradient, 0.95)[0].isfinite().all())  # hidden overflow would train on
    for neutral in (None, 1, 1.0):
        assert clamp_image_gradient(gradient, neutral)[0] is gradient


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("q", [0.01, 0.5, 0.95, 0.999])
def test_the_quantile_is_torchs(count, q):
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    torch.testing.assert_close(quantile(values, q), torch.quantile(values, q, dim=1))
