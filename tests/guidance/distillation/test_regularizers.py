"""Regularizers against autograd and against what they are for."""

from __future__ import annotations

import sys

import pytest
import torch
from indomain_guidance.guidance.distillation.context import Context
from indomain_guidance.guidance.distillation.critic import Critic, Prediction
from indomain_guidance.guidance.distillation.directional import Directional
from indomain_guidance.guidance.distillation.normalize import normalize
from indomain_guidance.guidance.distillation.perceptual import FeatureDistance, Perceptual, lpips_distance
from indomain_guidance.guidance.distillation.reconstruction import Reconstruction
from indomain_guidance.guidance.errors import GuidanceError


def context(schedule, gaussian, mean, seed: int = 0) -> Context:
    critic = Critic.cfg(gaussian, mean(0, 0, 0, 0), mean(1, -1, 2, 0), 7.5, schedule=schedule)
    z, frozen, noise = torch.randn(3, 4, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor([3, 100, 500, 990])
    z_t, frozen_t = critic.noisy(z, noise, t), critic.noisy(frozen, noise, t)
    return Context(
        critic,
        z,
        t,
        critic.alphas_cumprod(t, z),
        noise,
        z_t,
        critic.predict(z_t, t, ("e",)),
        frozen,
        critic.predict(frozen_t, t, ("e",)),
    )


def test_reconstruction_equals_the_derivative_of_the_reconstruction_error(schedule, gaussian, mean):
    """The published form, by autograd in float64: n(e) - n(d MSE(x0(e), z_frozen) / d e)."""
    given = context(schedule, gaussian, mean)
    abar = given.abar.double()
    e = given.prediction.e.double().requires_grad_()
    x0 = (given.z_t.double() - (1 - abar).sqrt() * e) / abar.sqrt()
    (slope,) = torch.autograd.grad(torch.nn.functional.mse_loss(x0, given.frozen.double()), e)
    expected = (normalize(e) - normalize(slope)).detach()
    torch.testing.assert_close(Reconstruction().gradient(given).double(), expected, rtol=1e-4, atol=1e-4)


def test_reconstruction_leads_a_neutral_critic_back_to_the_frozen_image(schedule, gaussian, mean):
    """Where the critic sees the exact noise, the regularizer says n(noise) - n(noise - e_f), with
    noise - e_f = sqrt(abar / (1 - abar)) (z_frozen - z): it points from the frozen image's side."""
    given = context(schedule, gaussian, mean)
    knows = Context(
        given.critic, given.z, given.t, given.abar, given.noise, given.z_t, Prediction(e=given.noise), given.frozen
    )
    expected = normalize(given.noise) - normalize(given.frozen - given.z)
    torch.testing.assert_close(Reconstruction().gradient(knows), expected, rtol=1e-3, atol=1e-3)


def test_directional_is_the_known_difference_on_gaussian_scores(schedule, gaussian, mean):
    given = context(schedule, gaussian, mean)
    sigma = schedule.sigmas[given.t].reshape(-1, 1, 1, 1)
    # Prompt, scale and noise all cancel: a pull towards the frozen latents.
    expected = gaussian.factor(sigma) * (given.z - given.frozen)
    torch.testing.assert_close(Directional().gradient(given), expected, rtol=1e-4, atol=1e-4)
    normalized = Directional(normalize=True).gradient(given)
    expected = normalize(given.prediction.e) - normalize(given.frozen_prediction.e)
    torch.testing.assert_close(normalized, expected)


def test_normalize_is_per_sample():
    sizes = torch.tensor([1e-8, 1.0, 1e6]).reshape(3, 1, 1, 1)
    e = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * sizes
    result = normalize(e)
    torch.testing.assert_close(result.square().mean((1, 2, 3)), torch.ones(3))
    for row in range(3):
        one = e[row].double()
        torch.testing.assert_close(result[row].double(), one * (4 * 5 * 6) ** 0.5 / one.norm(), rtol=1e-5, atol=1e-5)
    assert torch.equal(normalize(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 2, 2, 2))


def features(images):
    return [images, torch.cat([images, images.square()], 1)[:, :, ::2, ::2]]


def test_the_feature_distance_is_lpips_formula():
    a, b = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros(2, dtype=torch.float64)
    for own, other in zip(features(a), features(b)):
        for image in range(2):
            for y in range(own.shape[2]):
                for x in range(own.shape[3]):
                    p, q = own[image, :, y, x], other[image, :, y, x]
                    difference = (p / p.norm() - q / q.norm()).square()
                    expected[image] += difference.sum() / (own.shape[2] * own.shape[3])
    torch.testing.assert_close(FeatureDistance(features)(a, b).double(), expected, rtol=1e-4, atol=1e-6)
    assert float(FeatureDistance(features)(a, a).abs().max()) == 0


def test_the_perceptual_gradient_is_finite_where_features_vanish():
    perceptual = Perceptual(FeatureDistance(lambda x: torch.relu(x)), weight=0.5)
    loss, gradient = perceptual.gradient(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    assert float(loss) == pytest.approx(0.5 * 2000) and bool(gradient.isfinite().all())


def test_vectors_are_features():
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pooled = FeatureDistance(lambda x: x.mean((2, 3)))
    assert pooled(images, images.flip(0)).shape == (2,)


def test_lpips_is_an_optional_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(GuidanceError, match="pip install lpips"):
        lpips_distance()
