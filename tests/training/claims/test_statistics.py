"""The bootstrap and the comparison of points, against Gaussians of known distance and areas worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from indomain_guidance.training.claims import statistics as stats
from indomain_guidance.training.mini_world.distances import frechet_distance

WIDTH = 16


def spread_target() -> stats.TargetSet:
    """A target set whose mean is exactly 0 and whose covariance is exactly the identity."""
    corners = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]).double()
    return stats.TargetSet(corners * math.sqrt((2 * WIDTH - 1) / 2))


def columns(rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def test_the_weighted_distance_is_the_plain_one_on_repeated_samples():
    generator = torch.Generator().manual_seed(0)
    features, reference = torch.randn(200, 8, generator=generator) + 3, torch.randn(300, 8, generator=generator)
    counts = stats.resampling_counts(torch.arange(200) % 10, 3)
    found = stats.TargetSet(reference).distances(features, counts)
    for row, value in zip(counts, found):
        repeated = features.repeat_interleave(row.long(), 0)
        assert float(value) == pytest.approx(frechet_distance(repeated, reference), rel=1e-9)


def test_resampling_keeps_the_size_of_every_group_and_repeats():
    groups = torch.arange(90) % 9
    counts = stats.resampling_counts(groups, 50, seed=3)
    for group in range(9):
        assert bool((counts[:, groups == group].sum(1) == 10).all())
    assert torch.equal(counts, stats.resampling_counts(groups, 50, seed=3))
    # With replacement: a sample is left out of a replicate with probability (1 - 1/10)^10.
    assert float((counts == 0).double().mean()) == pytest.approx(0.9**10, abs=0.03)


@pytest.mark.parametrize("count", [120, 1000])
def test_intervals_of_the_distance_cover_the_truth_where_plain_percentiles_miss_it(count):
    generator, target = torch.Generator().manual_seed(1), spread_target()
    scales, mean = torch.linspace(0.3, 1.5, WIDTH).double(), 0.4
    truth = WIDTH * mean**2 + float((scales - 1).square().sum())
    covered = plain_covered = 0
    values, plain = [], []
    trials = 80
    for trial in range(trials):
        features = mean + torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) * scales
        counts = stats.resampling_counts(torch.zeros(count, dtype=torch.long), 100, seed=trial)
        measured = stats.measure_distance(features, target, counts)
        low, high = stats.interval(measured.draws)
        covered += low <= truth <= high
        low, high = stats.interval(target.distances(features, counts))
        plain_covered += low <= truth <= high
        values.append(measured.value)
        plain.append(measured.uncorrected)
    assert covered / trials >= 0.86
    assert plain_covered < covered
    error, plain_error = (sum(found) / trials - truth for found in (values, plain))
    assert plain_error > 0 and abs(error) < 0.35 * plain_error


def test_the_interval_of_a_share_is_the_binomial_one():
    right = torch.arange(400) % 4 == 0
    counts = stats.resampling_counts(torch.zeros(400, dtype=torch.long), 2000)
    measured = stats.measure_share(right, counts)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert measured.value == measured.uncorrected == 0.25
    assert stats.interval(measured.draws) == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)


def test_an_interval_may_end_at_infinity_and_holds_all_but_five_percent():
    draws = torch.arange(1001).double()
    assert stats.interval(draws) == (25.0, 975.0)
    assert stats.interval(torch.cat([draws[:900], torch.full((101,), torch.inf)]))[1] == math.inf


def test_hypervolume_by_hand():
    # Of the square 100 by 1: (20, .5) dominates 80 * .5, (60, .8) adds 40 * .3, (70, .6) nothing.
    assert float(stats.hypervolume(columns([60, 20, 70]), columns([0.8, 0.5, 0.6]), 100.0)) == pytest.approx(0.52)
    assert float(stats.hypervolume(columns([150.0]), columns([1.0]), 100.0)) == 0.0
    assert float(stats.hypervolume(columns([0.0]), columns([1.0]), 100.0)) == 1.0


def test_hypervolume_agrees_with_counting_a_grid():
    generator = torch.Generator().manual_seed(5)
    distances, shares = (
        torch.rand(7, 1, generator=generator).double() * 12,
        torch.rand(7, 1, generator=generator).double(),
    )
    x, y = torch.meshgrid((torch.arange(500) + 0.5) / 50, (torch.arange(500) + 0.5) / 500, indexing="ij")
    dominated = ((distances[:, 0, None, None] <= x) & (shares[:, 0, None, None] >= y)).any(0)
    assert float(stats.hypervolume(distances, shares, 10.0)) == pytest.approx(
        float(dominated.double().mean()), abs=2e-3
    )


def test_lowest_distance_at_a_share():
    distances, shares = columns([10, 20, 30]), columns([0.2, 0.6, 0.9])
    assert [float(stats.lowest(distances, shares, level)) for level in (0, 0.2, 0.5, 0.9, 0.95)] == [
        10,
        10,
        20,
        30,
        math.inf,
    ]


def test_a_share_that_single_precision_rounds_is_still_reached():
    shares = columns([0.7, 0.8]).float().double()  # a little below 0.7, a little above 0.8
    for level, lowest in ((0.7, 10), (0.8, 20), (torch.tensor([0.8]).double(), 20), (0.8001, math.inf)):
        assert float(stats.lowest(columns([10, 20]), shares, level)) == lowest
    assert stats.reaches(0.996 - 0.03, 0.966) and stats.reaches(0.8, 0.8) and not stats.reaches(0.7998, 0.8)


def test_worst_ratio_looks_at_every_share_that_both_reach():
    mine = columns([10, 30]), columns([0.5, 0.9])
    # Up to .4: 10/25. Up to .5: 10/40. Above, up to .7: 30/40; beyond .7 only the first set has points.
    assert float(stats.worst_ratio(*mine, columns([25, 40]), columns([0.4, 0.7]))[0]) == pytest.approx(0.75)
    # A fine-tune that is nearer at one share only is found.
    assert float(stats.worst_ratio(*mine, columns([25, 40]), columns([0.6, 0.7]))[0]) == pytest.approx(30 / 25)


def worst_share(*points) -> float:
    return float(stats.worst_ratio(*points)[1])


def test_the_worst_share_is_where_the_worst_ratio_is():
    mine = columns([10, 30]), columns([0.5, 0.9])
    assert worst_share(*mine, columns([25, 40]), columns([0.4, 0.7])) == pytest.approx(0.7)  # 30 / 40
    assert worst_share(*mine, columns([25, 40]), columns([0.6, 0.7])) == pytest.approx(0.6)  # 30 / 25
    assert worst_share(*mine, columns([5, 20]), columns([0.4, 0.95])) == pytest.approx(0.4)  # 10 / 5


def test_the_worst_ratio_between_two_shares_counts_what_is_not_reached():
    mine, theirs = (columns([10, 30]), columns([0.5, 0.85])), (columns([5, 25, 40]), columns([0.5, 0.7, 0.9]))

    def worst(least, most):
        return tuple(float(found) for found in stats.worst_ratio_between(*mine, *theirs, least, most))

    # Up to .5: 10 / 5, which is not asked; up to .7: 30 / 25; up to .85: 30 / 40; beyond, only the other set has one.
    assert worst(0.6, 0.85) == pytest.approx((30 / 25, 0.7)) and worst(0.75, 0.85) == pytest.approx((30 / 40, 0.85))
    assert worst(0.6, 0.9) == (math.inf, pytest.approx(0.9)) and worst(0.95, 1.0)[0] == 0.0


def test_ratios_where_only_one_set_has_a_point():
    near, far = (columns([10]), columns([0.5])), (columns([40]), columns([0.9]))
    found = [float(stats.ratio_of_lowest(*near, *far, level)) for level in (0.5, 0.8, 0.95)]
    assert found == [0.25, math.inf, 1.0] and float(stats.ratio_of_lowest(*far, *near, 0.8)) == 0.0


def test_columns_are_compared_with_themselves_only():
    distances = torch.tensor([[10.0, 1.0], [20.0, 2.0]]).double()
    shares = torch.tensor([[0.5, 0.9], [0.9, 0.5]]).double()
    assert stats.lowest(distances, shares, 0.8).tolist() == [20.0, 1.0]
    assert stats.worst_ratio(distances, shares, distances, shares)[0].tolist() == [1.0, 1.0]


def test_the_front_is_what_nothing_dominates():
    assert stats.is_on_front([(10, 0.5), (20, 0.7), (25, 0.6), (30, 0.9)]) == [True, True, False, True]
