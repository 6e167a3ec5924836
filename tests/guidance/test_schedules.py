"""Weights over noise level against closed forms, and against the noise schedule's own timesteps."""

from __future__ import annotations

import json
import math

import pytest
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.schedules import Constant, Interval, Keyframes, as_weight, weight_from_json

SCHEDULES = {
    "scaled linear": NoiseSchedule.scaled_linear(),
    "zero terminal SNR": NoiseSchedule.scaled_linear(zero_snr=True),
}


def straight(percent: float) -> float:
    """Ten sigmas of noise, falling by one each tenth of the sampling."""
    return 10.0 * (1.0 - percent)


def test_constant_is_the_same_everywhere():
    assert [Constant(-2.5).at(sigma) for sigma in (0.0, 0.03, 14.6, 4500.0)] == [-2.5] * 4


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: Constant(bad),
        lambda bad: as_weight(bad),
        lambda bad: Interval(bad, 0.0, 1.0),
        lambda bad: Interval(1.0, 0.0, 1.0, outside=bad),
        lambda bad: Interval(1.0, bad, 1.0),
        lambda bad: Interval(1.0, 5.0, bad, "sigma"),
        lambda bad: Keyframes([(0.0, 1.0), (0.5, bad)]),
        lambda bad: Keyframes([(bad, 1.0), (0.5, 2.0)]),
        lambda bad: weight_from_json(bad),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "2", None, True])
def test_what_is_not_a_finite_number_is_refused(make, bad):
    with pytest.raises(GuidanceError, match="Expected"):
        make(bad)


@pytest.mark.parametrize("sigma", [math.nan, -1.0])
@pytest.mark.parametrize("weight", [Constant(1), Interval(1, 9, 1, "sigma"), Keyframes([(9, 1), (1, 2)], "sigma")])
def test_a_sigma_that_cannot_be_is_refused(weight, sigma):
    with pytest.raises(GuidanceError, match="sigma of at least 0"):
        weight.at(sigma)


def test_sigma_interval_contains_its_start_and_not_its_end():
    weight = Interval(16.0, 5.42, 0.28, "sigma", outside=1.0)  # the interval of arXiv 2404.07724 for SDXL
    assert [weight.at(s) for s in (14.6, 5.4201, 5.42, 1.0, 0.2801, 0.28, 0.0)] == [1, 1, 16, 16, 16, 1, 1]


def test_percent_interval_follows_percent_to_sigma():
    weight = Interval(3.0, 0.2, 0.7)
    assert [weight.at(s, straight) for s in (10.0, 8.01, straight(0.2), 5.0, 3.01, straight(0.7), 0.0)] == [
        0,
        0,
        3,
        3,
        3,
        0,
        0,
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_neighbouring_intervals_neither_overlap_nor_leave_a_gap(name):
    schedule = SCHEDULES[name]
    edges = [0.0, 0.1, 0.25, 0.5, 0.9, 1.0]
    parts = [Interval(1.0, start, end) for start, end in zip(edges, edges[1:])]
    sigmas = [*schedule.sigmas.tolist()[::7], schedule.sigma_max * 2, *map(schedule.percent_to_sigma, edges)]
    for sigma in sigmas:
        assert sum(part.at(sigma, schedule.percent_to_sigma) for part in parts) == 1.0


def test_the_ends_of_the_percent_scale_need_no_model():
    assert Interval(2.0, 0.0, 1.0).at(1e9) == Interval(2.0, 0.0, 1.0).at(0.0) == 2.0
    assert not Interval(2.0, 0.0, 1.0).needs_percent
    assert Interval(2.0, 0.0, 0.5).needs_percent
    assert Interval(Interval(2.0, 0.1, 0.5), 9.0, 1.0, "sigma").needs_percent
    assert not Interval(2.0, 9.0, 1.0, "sigma").needs_percent


@pytest.mark.parametrize(
    "weight", [Interval(2.0, 0.1, 1.0), Keyframes([(0.1, 1), (0.4, 2)]), Keyframes([(0.1, 1), (0.4, 2)], ramp="step")]
)
def test_percent_positions_without_a_model_are_refused(weight):
    assert weight.needs_percent
    with pytest.raises(GuidanceError, match="changes at (10|40) % of sampling needs percent_to_sigma"):
        weight.at(5.0)


def test_an_empty_interval_is_outside_everywhere():
    weight = Interval(2.0, 0.5, 0.5, outside=-1.0)
    assert {weight.at(s / 10, straight) for s in range(101)} == {-1.0}


@pytest.mark.parametrize("start, end, unit", [(0.7, 0.2, "percent"), (1.0, 5.0, "sigma")])
def test_a_backward_interval_is_refused(start, end, unit):
    with pytest.raises(GuidanceError, match="order of sampling"):
        Interval(1.0, start, end, unit)


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda: Interval(1.0, -0.1, 1.0), "-0.1"),
        (lambda: Interval(1.0, 0.0, 50.0), "50"),
        (lambda: Interval(1.0, 5.0, -1.0, "sigma"), "-1"),
        (lambda: Interval(1.0, 0.0, 1.0, "steps"), "steps"),
        (lambda: Keyframes([]), "none"),
        (lambda: Keyframes([3.0]), "3.0"),
        (lambda: Keyframes([(0.5, 1.0), (0.5, 2.0)]), "twice"),
        (lambda: Keyframes([(0.0, 1.0), (5.0, 2.0)], "sigma"), "above 0"),
        (lambda: Keyframes([(0.0, 1.0)], ramp="spline"), "spline"),
        (lambda: Keyframes([(0.0, 1.0)], unit="step"), "step"),
    ],
)
def test_impossible_positions_are_refused(make, found):
    with pytest.raises(GuidanceError, match=found):
        make()


def test_linear_keyframes_in_percent():
    weight = Keyframes([(0.2, 1.0), (0.6, 3.0), (0.8, -1.0)])
    # (percent, value by hand); the first and last values hold outside.
    for percent, expected in [(0.01, 1), (0.2, 1), (0.3, 1.5), (0.4, 2), (0.6, 3), (0.7, 1), (0.8, -1), (0.99, -1)]:
        assert weight.at(straight(percent), straight) == pytest.approx(expected, abs=1e-6)


def test_cosine_keyframes_ease_in_and_out():
    weight = Keyframes([(0.0, 0.0), (1.0, 4.0)], ramp="cosine")
    for percent in (0.1, 0.25, 0.5, 0.75, 0.9):
        expected = 4.0 * math.sin(math.pi * percent / 2) ** 2
        assert weight.at(straight(percent), straight) == pytest.approx(expected, abs=1e-6)


def test_step_keyframes_change_when_the_position_is_reached():
    weight = Keyframes([(0.25, 1.0), (0.5, 2.0), (0.75, 3.0)], ramp="step")
    levels = [9.0, straight(0.25), 5.01, straight(0.5), 4.99, 2.51, straight(0.75), 0.0]
    assert [weight.at(sigma, straight) for sigma in levels] == [1, 1, 1, 2, 2, 2, 3, 3]
    in_sigma = Keyframes([(7.5, 1.0), (5.0, 2.0), (2.5, 3.0)], "sigma", "step")
    assert [in_sigma.at(sigma) for sigma in levels] == [1, 1, 1, 2, 2, 2, 3, 3]


def test_keyframes_in_sigma_run_in_log_sigma():
    weight = Keyframes([(10.0, 1.0), (0.1, 5.0)], "sigma")
    for fraction in (0.0, 0.2, 0.5, 0.9, 1.0):
        sigma = 10.0 ** (1.0 - 2.0 * fraction)
        assert weight.at(sigma) == pytest.approx(1.0 + 4.0 * fraction, abs=1e-12)
    assert weight.at(50.0) == 1.0 and weight.at(0.01) == 5.0 and weight.at(0.0) == 5.0
    cosine = Keyframes([(10.0, 1.0), (0.1, 5.0)], "sigma", "cosine")
    assert cosine.at(10.0**0.5) == pytest.approx(1.0 + 4.0 * (0.5 - 0.5 * math.cos(math.pi / 4)), abs=1e-12)


def test_a_ramp_down_to_zero_ends_in_exactly_zero():
    for ramp in ("linear", "cosine", "step"):
        assert Keyframes([(10.0, 0.7), (1.0, 0.0)], "sigma", ramp).at(1.0) == 0.0
        assert Keyframes([(0.2, 0.7), (0.6, 0.0)], "percent", ramp).at(straight(0.61), straight) == 0.0


def test_keyframes_are_sorted_into_sampling_order():
    assert Keyframes([(0.8, 1), (0.1, 2)]) == Keyframes([(0.1, 2), (0.8, 1)])
    assert Keyframes([(1.0, 1), (9.0, 2)], "sigma").points == ((9.0, 2.0), (1.0, 1.0))


def test_a_single_keyframe_is_a_constant():
    weight = Keyframes([(0.5, 2.0)])
    assert not weight.needs_percent and weight.at(3.0) == 2.0


def test_a_schedule_inside_an_interval():
    weight = Interval(Keyframes([(0.0, 0.0), (1.0, 10.0)]), 0.3, 0.6)
    assert weight.at(straight(0.2), straight) == 0.0
    assert weight.at(straight(0.5), straight) == pytest.approx(5.0, abs=1e-6)
    assert weight.at(straight(0.7), straight) == 0.0


WEIGHTS = [
    Constant(2.5),
    Constant(-1),
    Interval(2.5, 0.1, 0.6),
    Interval(16, 5.42, 0.28, "sigma", outside=1),
    Interval(Keyframes([(0.0, 0.0), (1.0, 10.0)], ramp="cosine"), 0.3, 0.6, outside=-2),
    Keyframes([(0.2, 1.0), (0.6, 3.0)]),
    Keyframes([(14.6, 1.0), (0.3, 3.0), (0.1, 0.0)], "sigma", "step"),
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_weights_survive_json(weight):
    again = weight_from_json(json.loads(json.dumps(weight.to_json(), allow_nan=False)))
    assert again == weight and hash(again) == hash(weight) and type(again) is type(weight)
    for sigma in (12.0, 6.5, 4.5, 0.2):
        assert again.at(sigma, straight) == weight.at(sigma, straight)


def test_different_weights_differ():
    assert len({*WEIGHTS}) == len(WEIGHTS)


@pytest.mark.parametrize(
    "data",
    [
        {"type": "spline", "value": 1},
        {"value": 1, "start": 0, "end": 1},
        {"type": "interval", "value": 1, "start": 0},
        {"type": "interval", "value": 1, "start": 0, "end": 1, "power": 2},
        {"type": "keyframes"},
        {"type": "keyframes", "points": 3},
        {"type": "keyframes", "points": [[0, 1, 2]]},
        [1, 2],
        "1",
    ],
    ids=repr,
)
def test_json_of_no_weight_is_refused(data):
    with pytest.raises(GuidanceError, match="Expected"):
        weight_from_json(data)
