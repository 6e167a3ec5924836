"""Samplers against the exact solution for Gaussian data, the papers' formulas, and ComfyUI's k-diffusion loops."""

from __future__ import annotations

import math

import pytest
import torch
from indomain_guidance.guidance import presets
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.multi_guidance import MultiGuidance
from indomain_guidance.guidance.sampling import SAMPLERS, sample, sigmas_karras, sigmas_sgm_uniform, sigmas_uniform
from indomain_guidance.guidance.schedules import Interval, Keyframes

SPREAD = 0.7
SCHEDULE = NoiseSchedule.scaled_linear()
GRIDS = (sigmas_karras, sigmas_uniform, sigmas_sgm_uniform)


def gaussian(x: torch.Tensor, sigma, mean=0.0) -> torch.Tensor:
    """The exact denoiser of data N(mean, SPREAD^2) in each dimension."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return mean + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - mean)


def exact_flow(x: torch.Tensor, start: float, end: float, mean=0.0) -> torch.Tensor:
    """Where the probability-flow ODE carries x from noise level start to end, for the same data."""
    return mean + (x - mean) * math.sqrt((SPREAD**2 + end**2) / (SPREAD**2 + start**2))


def curved(x: torch.Tensor, sigma, context=None) -> torch.Tensor:
    """A denoiser that is neither linear nor the same for every image."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    shift = 0.0 if context is None else context
    return torch.tanh(x / (1 + sigma) + shift) + 0.1 * torch.sin(x)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method, order", [("euler", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_convergence_to_the_exact_solution_has_the_order_of_the_method(method, order):
    x, errors = noise(4, 3), []
    for steps in (32, 64, 128):
        sigmas = torch.logspace(1, -2, steps + 1, dtype=torch.float64)
        result = sample(gaussian, x, sigmas, method, mean=0.5)
        errors.append((result - exact_flow(x * 10.0, 10.0, 0.01, 0.5)).abs().max().item())
    assert errors[-1] < (0.03 if order == 1 else 0.002)
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method, tolerance", [("euler", 0.08), ("ddim", 0.08), ("dpmpp_2m", 0.02)])
def test_sampling_to_zero_follows_the_exact_flow(method, tolerance):
    x = noise(50, 4)
    result = sample(gaussian, x, sigmas_karras(SCHEDULE, 60), method, mean=2.0)
    exact = exact_flow(x * SCHEDULE.sigma_max, SCHEDULE.sigma_max, 0.0, 2.0)
    torch.testing.assert_close(result, exact, rtol=0, atol=tolerance)


def test_ddim_is_equation_12_in_the_variance_preserving_scale():
    """x_prev = sqrt(a_prev) x0 + sqrt(1 - a_prev) eps, arXiv 2010.02502, eq. 12 with sigma 0."""
    x = noise(3, 5)
    sigmas = [14.6, 6.0, 2.0, 0.5, 0.1]
    state = x * sigmas[0]
    for sigma, following in zip(sigmas, sigmas[1:]):
        a, a_prev = 1 / (1 + sigma**2), 1 / (1 + following**2)
        x0 = curved(state, sigma)
        eps = (state * math.sqrt(a) - math.sqrt(a) * x0) / math.sqrt(1 - a)
        state = (math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * eps) / math.sqrt(a_prev)
    torch.testing.assert_close(sample(curved, x, sigmas, "ddim"), state, rtol=1e-10, atol=1e-10)


def test_dpmpp_2m_is_algorithm_2_in_the_variance_preserving_scale():
    """x_t = (s_t / s_s) x_s - a_t (e^-h - 1) D with D extrapolated by r = h_last / h, arXiv 2211.01095."""
    x = noise(3, 5)
    sigmas = [14.6, 6.0, 2.0, 0.5, 0.1]
    alpha = [1 / math.sqrt(1 + s**2) for s in sigmas]
    lam = [-math.log(s) for s in sigmas]
    state, previous = x * sigmas[0] * alpha[0], None
    for i in range(4):
        x0 = curved(state / alpha[i], sigmas[i])
        h = lam[i + 1] - lam[i]
        estimate = x0
        if previous is not None:
            r = (lam[i] - lam[i - 1]) / h
            estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        ratio = (sigmas[i + 1] * alpha[i + 1]) / (sigmas[i] * alpha[i])
        state = ratio * state - alpha[i + 1] * math.expm1(-h) * estimate
        previous = x0
    torch.testing.assert_close(sample(curved, x, sigmas, "dpmpp_2m"), state / alpha[-1], rtol=1e-10, atol=1e-10)


def test_euler_and_deterministic_ddim_are_one():
    x, sigmas = noise(2, 4, 8, 8), sigmas_uniform(SCHEDULE, 12)
    torch.testing.assert_close(sample(curved, x, sigmas, "euler"), sample(curved, x, sigmas, "ddim"))


def test_callback_sees_each_step_and_the_last_estimate_is_the_result():
    seen: list[dict] = []
    result = sample(curved, noise(2, 3), sigmas_karras(SCHEDULE, 5), "dpmpp_2m", seen.append)
    assert [state["i"] for state in seen] == list(range(5))
    assert [state["sigma"] for state in seen] == sigmas_karras(SCHEDULE, 5)[:-1].tolist()
    assert torch.equal(seen[-1]["denoised"], result)
    torch.testing.assert_close(seen[0]["x"], noise(2, 3) * SCHEDULE.sigma_max)


def test_dtype_is_kept_and_gradients_pass():
    x = noise(2, 3).float().requires_grad_()
    result = sample(curved, x, sigmas_uniform(SCHEDULE, 4), "dpmpp_2m")
    assert result.dtype == torch.float32
    result.sum().backward()
    assert x.grad.abs().min() > 0


def test_sigma_schedules_have_the_stated_ends_and_spacing():
    for steps in (1, 2, 7, 25):
        for sigmas in (make(SCHEDULE, steps) for make in GRIDS):
            assert len(sigmas) == steps + 1 and sigmas[-1] == 0.0 and (sigmas.diff() < 0).all()
            assert sigmas[0].item() == pytest.approx(SCHEDULE.sigma_max, rel=1e-6)
    assert sigmas_karras(SCHEDULE, 9)[-2].item() == pytest.approx(SCHEDULE.sigma_min, rel=1e-6)
    roots = sigmas_karras(SCHEDULE, 9)[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(8))
    timesteps = SCHEDULE.timestep(sigmas_uniform(SCHEDULE, 10)[:-1])
    torch.testing.assert_close(timesteps, torch.linspace(999, 0, 10), rtol=0, atol=0.01)
    timesteps = SCHEDULE.timestep(sigmas_sgm_uniform(SCHEDULE, 10)[:-1])
    torch.testing.assert_close(timesteps, torch.linspace(999, 99.9, 10), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([1.0], "at least two"),
        ([1.0, 2.0], "fall"),
        ([2.0, 1.0, 1.0], "fall"),
        ([2.0, -1.0], "fall"),
        ([math.nan, 1.0], "fall"),
        ([1.0, math.nan], "fall"),
        ([math.inf, 1.0], "fall"),
    ],
)
def test_sigmas_that_lead_nowhere_are_refused(sigmas, message):
    with pytest.raises(GuidanceError, match=message):
        sample(curved, noise(1, 3), sigmas)


def test_impossible_settings_are_refused():
    with pytest.raises(GuidanceError, match="euler, ddim, dpmpp_2m, got 'heun'"):
        sample(curved, noise(1, 3), [1.0, 0.0], "heun")
    for make in GRIDS:
        with pytest.raises(GuidanceError, match="at least 1"):
            make(SCHEDULE, 0)


# ---------------------------------------------------------------------------------------------------------------------
# With multi-guidance


def guided_gaussians(**weights) -> MultiGuidance:
    """Prior, domain and control as Gaussians of one spread whose means differ; guidance then moves the mean only."""

    def prior(x, sigma, mean):
        return gaussian(x, sigma, mean)

    def domain(x, sigma, mean):  # text-free: its conditioning does not matter
        return gaussian(x, sigma, 3.0)

    empty, prompt = ({"mean": torch.full((1, 1), value, dtype=torch.float64)} for value in (1.0, 2.0))
    return MultiGuidance(presets.in_domain(prior, domain, empty, prompt, **weights), SCHEDULE.percent_to_sigma)


@pytest.mark.parametrize("method", SAMPLERS)
def test_guided_gaussians_arrive_at_the_guided_mean(method):
    """D_u + w_d (D_d - D_u) + w_c (D_c - D_u) is the denoiser of mean 1 + 2 w_d + 1 w_c, exactly."""
    x, sigmas = noise(3, 4), sigmas_uniform(SCHEDULE, 25)
    denoise = guided_gaussians(domain_weight=2.5, control_weight=1.5)
    result = sample(denoise, x, sigmas, method)
    mean = 1.0 + 2.5 * 2.0 + 1.5 * 1.0
    torch.testing.assert_close(result, sample(lambda x, s: gaussian(x, s, mean), x, sigmas, method))
    assert denoise.samples_per_step == [3] * 25 and denoise.calls_per_step == [2] * 25


def test_an_interval_on_the_domain_term_saves_its_predictions():
    rising = Keyframes([(0.0, 1.0), (1.0, 3.0)])
    denoise = guided_gaussians(domain_weight=Interval(2.5, 0.4, 1.0), control_weight=rising)
    sample(denoise, noise(2, 4), sigmas_uniform(SCHEDULE, 20), "dpmpp_2m")
    # Even timesteps: step i is at percent i / 19; the first 8 come before 0.4. At percent 0 the control weight is 1, so
    # that the first step needs the control prediction alone.
    assert denoise.samples_per_step == [1] + [2] * 7 + [3] * 12


@pytest.fixture(scope="module")
def k_diffusion(core):
    """ComfyUI's sampling loops: a foreign library that knows nothing of this one."""
    return core("comfy.k_diffusion.sampling")


@pytest.mark.comfy
@pytest.mark.parametrize("method", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", GRIDS)
def test_loops_equal_k_diffusions(k_diffusion, method, schedule):
    x, sigmas = noise(3, 4, 8, 8), schedule(SCHEDULE, 9)
    foreign = getattr(k_diffusion, f"sample_{method}")(curved, x * sigmas[0], sigmas, disable=True)
    torch.testing.assert_close(sample(curved, x, sigmas, method), foreign, rtol=1e-10, atol=1e-10)


@pytest.mark.comfy
@pytest.mark.parametrize("method", ["euler", "dpmpp_2m"])
def test_multi_guidance_runs_in_a_foreign_loop(k_diffusion, method):
    x, sigmas = noise(3, 4), sigmas_uniform(SCHEDULE, 15)
    weights = dict(domain_weight=Interval(2.5, 0.3, 1.0), control_weight=1.5)
    ours, theirs = guided_gaussians(**weights), guided_gaussians(**weights)
    foreign = getattr(k_diffusion, f"sample_{method}")(theirs, x * sigmas[0], sigmas, disable=True)
    torch.testing.assert_close(sample(ours, x, sigmas, method), foreign, rtol=1e-10, atol=1e-10)
    assert theirs.samples_per_step == ours.samples_per_step == [2] * 5 + [3] * 10


@pytest.mark.comfy
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_sigma_schedules_equal_comfyuis(k_diffusion, steps, zero_snr):
    import comfy.model_sampling
    import comfy.samplers

    own = NoiseSchedule.scaled_linear(zero_snr=zero_snr)
    # ComfyUI's object carries float32 of the same noise levels.
    model_sampling = comfy.model_sampling.ModelSamplingDiscrete(zsnr=zero_snr)
    for grid, name in ((sigmas_uniform, "normal"), (sigmas_sgm_uniform, "sgm_uniform")):
        expected = comfy.samplers.calculate_sigmas(model_sampling, name, steps)
        torch.testing.assert_close(grid(own, steps), expected.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        sigmas_karras(own, steps).float(),
        k_diffusion.get_sigmas_karras(steps, float(model_sampling.sigma_min), float(model_sampling.sigma_max)).float(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.comfy
def test_percent_weights_agree_with_comfyuis_percent(k_diffusion):
    import comfy.model_sampling

    theirs, weight = comfy.model_sampling.ModelSamplingDiscrete(), Keyframes([(0.0, 0.0), (1.0, 1.0)])
    for percent in (0.05, 0.3, 0.62, 0.95):
        sigma = theirs.percent_to_sigma(percent)
        assert weight.at(sigma, theirs.percent_to_sigma) == pytest.approx(percent, abs=1e-5)
        assert weight.at(sigma, SCHEDULE.percent_to_sigma) == pytest.approx(percent, abs=1e-5)
