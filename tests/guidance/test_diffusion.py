"""Noise schedules and denoisers against ComfyUI's model sampling."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.diffusion import Denoiser, NoiseSchedule, denoised_from_output


def core_sampling(core, prediction="EPS", zero_snr=False):
    sampling = core("comfy.model_sampling")
    return type("Sampling", (sampling.ModelSamplingDiscrete, getattr(sampling, prediction)), {})(zsnr=zero_snr)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_sigmas_equal_core(zero_snr, core):
    schedule, oracle = NoiseSchedule.scaled_linear(zero_snr=zero_snr), core_sampling(core, zero_snr=zero_snr)
    assert torch.allclose(schedule.sigmas, oracle.sigmas, rtol=2e-5)
    assert schedule.sigma_min == pytest.approx(float(oracle.sigma_min), rel=1e-5)
    assert schedule.sigma_max == pytest.approx(float(oracle.sigma_max), rel=1e-5)
    assert torch.allclose(schedule.alphas_cumprod, 1 / (schedule.sigmas.double() ** 2 + 1).float(), rtol=1e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_equal_core(zero_snr, core):
    schedule, oracle = NoiseSchedule.scaled_linear(zero_snr=zero_snr), core_sampling(core, zero_snr=zero_snr)
    sigmas = torch.cat([torch.logspace(-2.5, 4, 77), oracle.sigmas[[0, 5, 499, 998, 999]]])
    assert torch.equal(schedule.timestep(sigmas, nearest=True).long(), oracle.timestep(sigmas))
    assert schedule.timestep(float(oracle.sigmas[500]), nearest=True) == 500.0
    timesteps = torch.cat([torch.linspace(-3, 1003, 57), torch.tensor([0.0, 999.0, 12.25])])
    assert torch.allclose(schedule.sigma(timesteps), oracle.sigma(timesteps), rtol=5e-5)


def test_timestep_inverts_sigma():
    schedule = NoiseSchedule.scaled_linear()
    timesteps = torch.tensor([0.0, 0.25, 17.5, 500.0, 998.75, 999.0])
    assert torch.allclose(schedule.timestep(schedule.sigma(timesteps)), timesteps, atol=2e-2)
    assert schedule.timestep(0.0) == 0.0 and schedule.timestep(1e9) == 999.0
    assert isinstance(schedule.timestep(1.0), float) and isinstance(schedule.sigma(3.5), float)
    assert schedule.timestep(torch.full((2, 1), 2.0)).shape == (2, 1)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_percent_to_sigma_equals_core(zero_snr, core):
    schedule, oracle = NoiseSchedule.scaled_linear(zero_snr=zero_snr), core_sampling(core, zero_snr=zero_snr)
    for percent in (-1.0, 0.0, 1e-6, 0.123, 0.5, 0.9, 0.999999, 1.0, 2.0):
        assert schedule.percent_to_sigma(percent) == pytest.approx(oracle.percent_to_sigma(percent), rel=5e-5), percent
    with pytest.raises(ValueError, match="finite"):
        schedule.percent_to_sigma(float("nan"))


class Remembers:
    """A stand-in for a network: a fixed function of its input and timestep that remembers what it was shown."""

    def __call__(self, x, timesteps, context=None):
        self.x, self.timesteps, self.context = x, timesteps, context
        return torch.sin(x * 3) + timesteps[:, None, None, None] / 1000


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "prediction_type, name", [("epsilon", "EPS"), ("v_prediction", "V_PREDICTION"), ("sample", "X0")]
)
def test_denoised_equals_core(prediction_type, name, zero_snr, core, relative_error):
    oracle = core_sampling(core, name, zero_snr)
    schedule, network = NoiseSchedule.scaled_linear(zero_snr=zero_snr), Remembers()
    denoiser = Denoiser(network, schedule, prediction_type)
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([float(oracle.sigma_max), 3.3, 0.05])
    x = torch.randn(3, 4, 5, 6, generator=generator) * (1 + sigma[:, None, None, None])
    denoised = denoiser(x, sigma, context="text")

    shown = oracle.calculate_input(sigma, x)
    timesteps = oracle.timestep(sigma).float()
    expected = oracle.calculate_denoised(sigma, Remembers()(shown, timesteps), x)
    assert network.context == "text"
    assert relative_error(network.x, shown) < 1e-5
    assert torch.equal(network.timesteps, timesteps)
    for one, other in zip(denoised, expected):
        # eps at high noise is a small difference of large numbers, so the scale of the error is x
        assert float((one - other).norm() / max(other.norm(), x.norm())) < 1e-5


def test_prediction_types_agree_about_one_truth():
    """eps, v and x0 computed from a known x0 and noise all give back x0."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=generator).double()
    sigma = torch.tensor(1.7, dtype=torch.float64)
    root = (1 / (1 + sigma**2)).sqrt()  # sqrt(abar)
    x = x0 + sigma * noise
    outputs = {"epsilon": noise, "v_prediction": root * noise - (1 - root**2).sqrt() * x0, "sample": x0}
    for prediction_type, output in outputs.items():
        assert torch.allclose(denoised_from_output(output, x, sigma, prediction_type), x0), prediction_type


def test_fractional_timesteps_and_scalar_sigma():
    schedule, network = NoiseSchedule.scaled_linear(), Remembers()
    x = torch.randn(2, 4, 3, 3)
    sigma = schedule.sigma(400.5)
    Denoiser(network, schedule, quantize=False)(x, sigma)
    assert network.timesteps.tolist() == pytest.approx([400.5, 400.5], abs=1e-2)
    Denoiser(network, schedule)(x, sigma)
    assert network.timesteps[0] in (400.0, 401.0)


def test_half_precision_stays():
    x = torch.randn(2, 4, 3, 3).half()
    assert Denoiser(Remembers(), NoiseSchedule.scaled_linear())(x, 2.0).dtype == torch.float16


@pytest.mark.parametrize("weights, latents", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_network_and_latents_may_differ_in_precision(weights, latents, relative_error):
    class Network(torch.nn.Conv2d):
        def forward(self, x, timesteps):
            return super().forward(x)

    network = Network(4, 4, 3, padding=1)
    x, schedule = 3 * torch.randn(2, 4, 8, 8), NoiseSchedule.scaled_linear()
    with torch.no_grad():
        expected = Denoiser(network, schedule)(x, 2.0)
        actual = Denoiser(network.to(weights), schedule)(x.to(latents), 2.0)
    assert actual.dtype == latents and relative_error(actual, expected) < 2 * torch.finfo(torch.bfloat16).eps


def test_refuses_impossible_schedules_and_sigmas():
    with pytest.raises(ValueError, match="between 0 and 1"):
        NoiseSchedule(torch.tensor([0.9, 0.0]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        NoiseSchedule(torch.tensor([0.9, float("nan")]))
    with pytest.raises(ValueError, match="must fall"):
        NoiseSchedule(torch.tensor([0.5, 0.9]))
    with pytest.raises(ValueError, match="Prediction type"):
        Denoiser(Remembers(), NoiseSchedule.scaled_linear(), "flow")
    with pytest.raises(ValueError, match="one sigma or 2"):
        Denoiser(Remembers(), NoiseSchedule.scaled_linear())(torch.zeros(2, 4, 3, 3), torch.ones(3))
