"""Randomness keyed by (seed, epoch, sample), and the order of batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from indomain_guidance.training.engine.randomness import BatchPlan, sample_generator


def first(*key, **more):
    return float(torch.rand((), generator=sample_generator(*key, **more)))


def indices_of(plan, step):
    return [draw.index for draw in plan.batch_for(step)]


def test_generators_depend_on_every_part_of_their_key_and_on_nothing_else():
    keys = [(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(4)]
    values = [first(*key) for key in keys] + [first(*key, stream="data") for key in keys]
    assert len(set(values)) == len(values)
    assert values[:64] == [first(*key) for key in keys]


def test_neighbouring_keys_draw_unrelated_noise():
    draws = torch.stack([torch.randn(4096, generator=sample_generator(0, 0, index)) for index in range(40)])
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.08  # 5 standard deviations of independent draws


def indices(passes):
    return [[draw.index for draw in one] for one in passes]


def test_an_epoch_has_every_image_once_in_passes_of_one_shape():
    groups = [list(range(12)), [12, 13, 14, 15]]
    passes = indices(BatchPlan(0, groups, 4).passes(0))
    assert sorted(sum(passes, [])) == list(range(16))
    assert len(passes) == 4 and all(any(set(one) <= set(group) for group in groups) for one in passes)


@pytest.mark.parametrize("batch, accumulation", [(1, 1), (4, 1), (4, 4), (5, 2), (16, 1)])
def test_no_image_is_drawn_more_often_than_others_however_rare_its_shape(batch, accumulation):
    groups = [list(range(100)), [100], [101], [102, 103, 104], []]
    plan, counts = BatchPlan(0, groups, batch, accumulation), Counter()
    for epoch in range(40):
        for one in indices(plan.passes(epoch)):
            assert len(one) == batch and any(set(one) <= set(group) for group in groups)
            counts.update(one)
        for group in groups:
            drawn = [counts[index] for index in group]
            assert all(count <= epoch + 1 for count in drawn)
            assert (epoch + 1) * len(group) - sum(drawn) < batch
            assert not drawn or max(drawn) - min(drawn) <= 1


def test_a_step_joins_passes_of_any_shape_and_steps_take_all_of_them():
    groups = [list(range(9)), [9, 10], [11]]
    plan = BatchPlan(1, groups, 3, 4)
    steps = [indices_of(plan, step) for step in range(30)]
    passes = [step[at : at + 3] for step in steps for at in range(0, 12, 3)]
    assert passes == sum((indices(plan.passes(epoch)) for epoch in range(40)), [])[: len(passes)]
    assert any(len({next(n for n, group in enumerate(groups) if i in group) for i in step}) > 1 for step in steps)
    counts = Counter(sum(steps, []))
    assert set(counts.values()) <= {29, 30, 31}  # 360 draws of 12 images


def test_order_is_new_each_epoch_and_the_same_for_the_same_key():
    groups = [list(range(50))]
    orders = [sum(indices(BatchPlan(seed, groups, 5).passes(epoch)), []) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == groups[0] for order in orders)
    assert sum(indices(BatchPlan(0, groups, 5).passes(0)), []) == orders[0]


def test_a_plan_is_a_function_of_the_step():
    groups = [list(range(7)), [7, 8, 9]]
    plan = BatchPlan(3, groups, 2, 3)
    straight = [plan.batch_for(step) for step in range(20)]
    assert [BatchPlan(3, groups, 2, 3).batch_for(step) for step in range(20)] == straight
    jumping = BatchPlan(3, groups, 2, 3)
    assert [jumping.batch_for(step) for step in reversed(range(20))] == straight[::-1]
    # 3 + 1 passes in the first epoch, 4 + 2 in the second: 7 and 3 images, of which one each was left over.
    assert [len(plan.passes(epoch)) for epoch in range(4)] == [4, 6, 4, 6]
    assert [plan.place(3 * step) for step in range(5)] == [(0, 0), (0, 3), (1, 2), (1, 5), (2, 2)]
    assert len(plan.batch_for(10**9)) == len(plan.batch_for(0))


def test_every_draw_of_a_run_has_its_own_randomness():
    plan = BatchPlan(0, [[5], [6, 7, 8]], 4)
    draws = [draw for step in range(30) for draw in plan.batch_for(step)]
    assert len(set(draws)) == len(draws) == 120
    (batch,) = {batch for batch in map(plan.batch_for, range(4)) if 5 in [draw.index for draw in batch]}
    noise = [float(torch.rand((), generator=draw.generator(0, "noise"))) for draw in batch]
    assert len(set(noise)) == 4 and noise[0] == first(0, 0, 5)


def test_nothing_to_order_is_an_error():
    for groups, batch in (([[]], 2), ([[1]], 0)):
        with pytest.raises(ValueError, match="Expected images"):
            BatchPlan(0, groups, batch)


def test_accumulation_sees_as_many_images_a_step_and_each_as_often_but_in_another_order():
    """What the guide promises of batch 1 x accumulation 4 in place of batch 4."""
    groups = [list(range(12)), list(range(12, 20))]
    wide, narrow = BatchPlan(7, groups, 4), BatchPlan(7, groups, 1, 4)
    for epochs in (1, 2, 3):
        for plan in (wide, narrow):
            steps = [indices_of(plan, step) for step in range(5 * epochs)]
            assert {len(step) for step in steps} == {4}
            assert Counter(index for step in steps for index in step) == Counter(list(range(20)) * epochs)
    assert [indices_of(wide, step) for step in range(5)] != [indices_of(narrow, step) for step in range(5)]
