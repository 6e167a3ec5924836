"""Noising, targets and weights against their closed forms and each other."""

from __future__ import annotations

import math

import pytest
import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule, denoised_from_output
from indomain_guidance.training.domain.losses import (
    abar_at,
    add_noise,
    draw_noise,
    draw_timestep,
    min_snr_weight,
    sample_losses,
    target_of,
)

KINDS = ("epsilon", "v_prediction", "sample")
SCHEDULES = {"plain": NoiseSchedule.scaled_linear(), "zero_snr": NoiseSchedule.scaled_linear(zero_snr=True)}


@pytest.mark.parametrize(
    "name, kind",
    [
        *(("plain", kind) for kind in KINDS),
        *(("zero_snr", kind) for kind in KINDS if kind != "epsilon"),  # whose last step holds no trace of the image
    ],
)
def test_a_perfect_network_denoises_exactly(name, kind):
    """Noised and targeted here, undone by the sampler's `denoised_from_output` on the sigma scale."""
    schedule, generator = SCHEDULES[name], torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 10, 300, 600, 900, 999])
    abar = abar_at(schedule, timesteps)
    noisy = add_noise(x0, noise, abar)
    sigma = schedule.sigma(timesteps.float()).reshape(-1, 1, 1, 1)
    denoised = denoised_from_output(target_of(kind, x0, noise, abar), noisy * (1 + sigma**2).sqrt(), sigma, kind)
    torch.testing.assert_close(denoised, x0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_closed_forms(name, gamma):
    abar = SCHEDULES[name].alphas_cumprod
    snr = abar.double() / (1 - abar.double())
    capped = snr.clamp(max=gamma)
    for kind, expected in zip(KINDS, (capped / snr, capped / (snr + 1), capped)):
        torch.testing.assert_close(min_snr_weight(kind, abar, gamma).double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_weights_are_one_loss_on_x0(kind):
    """Weighted error in any parameterisation equals min(SNR, gamma) times the error of the denoised estimate."""
    generator = torch.Generator().manual_seed(1)
    x0, noise, error = torch.randn(3, 5, 4, 8, 8, generator=generator, dtype=torch.float64)
    abar = SCHEDULES["plain"].alphas_cumprod[[20, 200, 500, 800, 990]].double()
    snr, wide = abar / (1 - abar), abar.reshape(-1, 1, 1, 1)
    target = target_of(kind, x0, noise, abar)
    sigma = ((1 - wide) / wide).sqrt()
    scaled = add_noise(x0, noise, abar) * (1 + sigma**2).sqrt()
    off = denoised_from_output(target + error, scaled, sigma, kind) - x0
    expected = snr.clamp(max=5.0) * off.square().mean(dim=(1, 2, 3))
    found = min_snr_weight(kind, abar, 5.0) * error.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_at_the_ends_and_neutral_at_zero(kind):
    ends = torch.tensor([0.0, 1e-30, 4.9e-8, 0.5, 1.0])
    assert bool(min_snr_weight(kind, ends, 5.0).isfinite().all())
    assert min_snr_weight(kind, ends, 0.0).tolist() == [1.0] * 5
    if kind == "epsilon":
        assert min_snr_weight(kind, ends, 5.0)[:3].tolist() == [1.0] * 3
    if kind == "sample":
        assert float(min_snr_weight(kind, ends, 5.0)[-1]) == 5.0


def test_other_prediction_types_are_refused():
    with pytest.raises(ValueError, match="got 'flow'"):
        target_of("flow", torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([0.5]))


def test_losses_are_weighted_means_in_float32():
    output, target = torch.full((2, 4, 2, 2), 300.0).half(), torch.zeros(2, 4, 2, 2)
    losses = sample_losses(output, target, torch.tensor([1.0, 0.5]))
    assert losses.dtype == torch.float32 and losses.tolist() == [90000.0, 45000.0]  # 300 squared overflows fp16


def test_timesteps_are_uniform_or_from_the_noisier_half():
    generator = torch.Generator().manual_seed(0)
    plain = torch.tensor([draw_timestep(generator, 1000) for _ in range(8000)])
    mixed = torch.tensor([draw_timestep(generator, 1000, 0.5) for _ in range(8000)])
    assert int(plain.min()) < 5 and int(plain.max()) > 994
    assert abs(float((plain >= 500).float().mean()) - 0.5) < 0.02
    assert abs(float((mixed >= 500).float().mean()) - 0.75) < 0.02
    assert {draw_timestep(generator, 2, 1.0) for _ in range(20)} == {1}


def test_noise_offset_adds_one_constant_a_channel():
    plain = draw_noise(torch.Generator().manual_seed(3), (4, 8, 8))
    shifted = draw_noise(torch.Generator().manual_seed(3), (4, 8, 8), 0.3)
    difference = shifted - plain
    torch.testing.assert_close(difference, difference[:, :1, :1].expand_as(difference), atol=1e-6, rtol=0)

    def constant(seed):
        with_offset, without = (draw_noise(torch.Generator().manual_seed(seed), (4, 2, 2), s) for s in (0.5, 0.0))
        return (with_offset - without)[:, 0, 0]

    many = torch.cat([constant(seed) for seed in range(600)])
    assert float(many.std()) == pytest.approx(0.5, abs=0.03) and abs(float(many.mean())) < 0.04
    assert math.isclose(float(plain.std()), 1.0, abs_tol=0.15)
