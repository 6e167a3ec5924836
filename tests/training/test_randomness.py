"""Randomness keyed by (seed, epoch, sample), and the order of batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from indomain_guidance.training.randomness import BatchPlan, epoch_order, sample_generator


def first(*key, **more):
    return float(torch.rand((), generator=sample_generator(*key, **more)))


def test_generators_depend_on_every_part_of_their_key_and_on_nothing_else():
    keys = [(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(4)]
    values = [first(*key) for key in keys] + [first(*key, stream="data") for key in keys]
    assert len(set(values)) == len(values)
    assert values[:64] == [first(*key) for key in keys]


def test_neighbouring_keys_draw_unrelated_noise():
    draws = torch.stack([torch.randn(4096, generator=sample_generator(0, 0, index)) for index in range(40)])
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.08  # 5 standard deviations of independent draws


def test_every_image_comes_once_an_epoch_and_short_buckets_are_filled_from_their_start():
    groups = [list(range(10)), [10, 11], [12]]
    batches = epoch_order(0, 0, groups, 4)
    assert len(batches) == 3 + 1 + 1 and all(len(batch) == 4 for batch in batches)
    assert all(any(set(batch) <= set(group) for group in groups) for batch in batches)
    counts = Counter(index for batch in batches for index in batch)
    assert sorted(counts.values()) == [1] * 8 + [2] * 4 + [4]
    assert counts[12] == 4 and counts[10] == counts[11] == 2
    assert sorted(counts) == list(range(13))


def test_order_is_new_each_epoch_and_the_same_for_the_same_key():
    groups = [list(range(50))]
    orders = [sum(epoch_order(seed, epoch, groups, 5), []) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == groups[0] for order in orders)
    assert sum(epoch_order(0, 0, groups, 5), []) == orders[0]


def test_a_plan_is_a_function_of_the_step():
    groups = [list(range(7)), [7, 8, 9]]
    plan = BatchPlan(3, groups, 2)
    assert plan.per_epoch == 4 + 2
    straight = [plan.batch_for(step) for step in range(20)]
    jumping = BatchPlan(3, groups, 2)
    assert [jumping.batch_for(step) for step in reversed(range(20))] == straight[::-1]
    assert straight[0].indices == epoch_order(3, 0, groups, 2)[0]
    assert straight[7].indices == epoch_order(3, 1, groups, 2)[1]
    assert {draw.epoch for draw in straight[7].draws} == {1}


def test_repetitions_of_an_image_draw_anew():
    batch = BatchPlan(0, [[5]], 3).batch_for(0)
    assert batch.indices == [5, 5, 5]
    noise = [float(torch.rand((), generator=draw.generator(0, "noise"))) for draw in batch.draws]
    assert len(set(noise)) == 3 and noise[0] == first(0, 0, 5)


def test_nothing_to_order_is_an_error():
    with pytest.raises(ValueError, match="Expected images"):
        epoch_order(0, 0, [[]], 2)
