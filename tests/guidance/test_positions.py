"""Positions in percent of sampling and in sigma, and the way from one to the other."""

from __future__ import annotations

import pytest
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.positions import needed, reached, sigma_to_percent

SCHEDULES = {
    "scaled linear": NoiseSchedule.scaled_linear(),
    "zero terminal SNR": NoiseSchedule.scaled_linear(zero_snr=True),
}


def flow_percent_to_sigma(percent: float) -> float:
    """A rectified-flow model with shift 3: sigmas between 0 and 1."""
    if percent <= 0.0:
        return 1.0
    t = max(0.0, 1.0 - percent)
    return 3.0 * t / (1.0 + 2.0 * t)


def test_a_position_is_reached_from_its_sigma_on():
    assert reached(2.0, "sigma", 2.0, None) and not reached(2.0, "sigma", 2.1, None)
    assert reached(0.5, "percent", 5.0, lambda percent: 10.0 * (1.0 - percent))
    assert reached(0.0, "percent", 1e9, None) and not reached(1.0, "percent", 0.0, None)


def test_a_missing_translation_is_told_in_percent():
    with pytest.raises(GuidanceError, match="changes at 30 % of sampling"):
        needed(None, 0.3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_percent_of_a_sigma_is_its_timestep_counted_from_the_end(name):
    schedule = SCHEDULES[name]
    evaluations = 0

    def counted(percent: float) -> float:
        nonlocal evaluations
        evaluations += 1
        return schedule.percent_to_sigma(percent)

    last = len(schedule) - 1
    for timestep in (0, 1, 17, 250.5, 500, 773.25, 997.5, last):
        percent = sigma_to_percent(schedule.sigma(timestep), counted)
        assert percent == pytest.approx(1 - timestep / last, abs=2e-6)
    assert evaluations < 8 * 40
    assert sigma_to_percent(schedule.sigma_max * 3, schedule.percent_to_sigma) == 0.0
    assert sigma_to_percent(0.0, schedule.percent_to_sigma) == 1.0


def test_percent_of_a_flow_model():
    for percent in (0.001, 0.1, 0.5, 0.9, 0.999):
        found = sigma_to_percent(flow_percent_to_sigma(percent), flow_percent_to_sigma)
        assert found == pytest.approx(percent, abs=1e-6)
    assert sigma_to_percent(1.0, flow_percent_to_sigma) == 0.0
    assert sigma_to_percent(0.0, flow_percent_to_sigma) == 1.0
