"""Changes of predictions whose difference is known."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.training.claims.bake.predictions import LEVELS, compare

SCHEDULE = NoiseSchedule.scaled_linear()
LATENTS = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXTS, DIGITS = torch.zeros(20, 2, 3), torch.arange(20) % 10


def compared(ours, theirs):
    return compare(ours, theirs, LATENTS, TEXTS, SCHEDULE, DIGITS, 30, 0)


def whole(x, sigma, text):
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt()


@pytest.mark.parametrize("share", [1.0, 0.9, 1.3])
def test_a_change_that_is_only_weaker_or_stronger_keeps_its_direction(share):
    measured, numbers = compared(lambda *noisy: share * whole(*noisy), whole)
    assert numbers["error"] == pytest.approx(abs(share - 1), abs=1e-6)
    assert numbers["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert all(numbers[f"error_at_{level}"] == pytest.approx(abs(share - 1), abs=1e-6) for level in LEVELS)
    assert measured["error"].draws.shape == (30,)


def test_levels_count_alike_and_errors_as_squares():
    """Half of the levels wrong by everything: the root of the mean of 1 and 0."""
    middle = float(SCHEDULE.sigma(500))

    def half(x, sigma, text):
        return whole(x, sigma, text) * (sigma.reshape(-1, 1, 1, 1) < middle)

    _, numbers = compared(half, whole)
    assert numbers["error"] == pytest.approx(0.5**0.5, abs=1e-6)
    assert numbers["error_at_50"] == 0.0 and numbers["error_at_950"] == pytest.approx(1.0)
    assert numbers["cosine"] == pytest.approx(0.5, abs=1e-6)


def test_another_direction_is_an_error_and_has_an_interval():
    def other(x, sigma, text):
        return whole(x, sigma, text).roll(1, dims=0)

    measured, numbers = compared(other, whole)
    assert numbers["error"] == pytest.approx(2**0.5, rel=0.05) and abs(numbers["cosine"]) < 0.1
    assert float(measured["error"].draws.std()) > 0.0
