"""Distances between image sets, against closed forms and SciPy."""

import numpy as np
import pytest
import torch
from indomain_guidance.training.mini_world.distances import (
    frechet_distance,
    kernel_distance,
    share_inside,
    within_class_diversity,
)


def test_frechet_distance_equals_the_formula_computed_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1.5
    b = torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    x, y = a.double().numpy(), b.double().numpy()
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_shifted_copies_is_the_squared_shift():
    features = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(features + 3.0, features) == pytest.approx(36.0, rel=1e-5)


def test_frechet_distance_of_scaled_gaussians_is_the_closed_form():
    features = torch.randn(500, 3, generator=torch.Generator().manual_seed(2))
    features = features - features.mean(0)
    expected = float(features.double().T.cov().trace())  # covariances C and 4 C: tr(C + 4C - 2 * 2C) = tr(C)
    assert frechet_distance(2 * features, features) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_the_unbiased_estimate_and_about_zero_for_one_distribution():
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(60, 5, generator=generator), torch.randn(60, 5, generator=generator) + 1.0
    x, y = a.double(), b.double()
    kernel = lambda p, q: float((p @ q / 5 + 1) ** 3)  # noqa: E731
    within = sum(kernel(p, q) for s in (x, y) for i, p in enumerate(s) for j, q in enumerate(s) if i != j) / (60 * 59)
    across = sum(kernel(p, q) for p in x for q in y) / 3600
    assert kernel_distance(a, b, subsets=1, size=60) == pytest.approx(within - 2 * across, rel=1e-9)
    assert (
        abs(kernel_distance(torch.randn(2000, 5, generator=generator), torch.randn(2000, 5, generator=generator)))
        < 0.02
    )


def test_diversity_is_the_mean_distance_to_the_class_mean():
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [5.0, 11.0], [9.0, 9.0]])
    assert within_class_diversity(features, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx((1.0 + 3.0) / 2)


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.zeros(4)])
def test_too_few_features_are_refused_in_a_sentence(features):
    with pytest.raises(ValueError, match="at least two images"):
        frechet_distance(features, torch.zeros(5, 4))


def test_features_that_are_not_finite_are_refused_rather_than_called_perfect():
    good = torch.randn(20, 4, generator=torch.Generator().manual_seed(4))
    for bad in (float("nan"), float("inf")):
        broken = good.clone()
        broken[3, 1] = bad
        for distance in (frechet_distance, kernel_distance):
            for pair in ((broken, good), (good, broken)):
                with pytest.raises(ValueError, match="finite"):
                    distance(*pair)


def test_share_inside_counts_points_within_a_ball_of_the_reference():
    # On a line, k = 1: balls of radius 1, 1, 2 around 0, 1 and 3, that is -1..2 and 1..5.
    reference = torch.tensor([[0.0], [1.0], [3.0]])
    features = torch.tensor([[-1.5], [-0.5], [1.9], [4.5], [5.5]])
    assert share_inside(features, reference, k=1) == pytest.approx(3 / 5)
    assert share_inside(reference, reference, k=2) == 1.0


def test_recall_falls_and_precision_stays_where_a_mode_is_lost():
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(200, 4, generator=generator), torch.randn(200, 4, generator=generator) + 50])
    made = torch.randn(400, 4, generator=generator)
    assert share_inside(made, real) > 0.8 and 0.3 < share_inside(real, made) <= 0.5
