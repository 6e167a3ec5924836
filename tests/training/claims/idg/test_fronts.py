"""What families reach at fixed shares, on made-up points whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from indomain_guidance.training.claims.idg import fronts
from indomain_guidance.training.claims.idg.points import Point, Row, Sampling

REPLICATES = 100


def row(distance: float, share: float, spread: float = 0.1) -> Row:
    """Replicates spread evenly over +-spread of the distance; shares are exact."""
    steps = torch.linspace(-1, 1, REPLICATES, dtype=torch.float64)
    draws = {"distance": distance * (1 + spread * steps), "digit": torch.full_like(steps, share)}
    point = Point.of("handwriting", "prior", scale=distance)
    return Row(point, Sampling(500), {"distance": distance, "digit": share}, {}, draws)


def test_the_lowest_distance_at_every_level_with_its_interval():
    found = fronts.front("ours", [row(20, 0.55), row(60, 0.92)], "digit", 100.0)
    assert [found.at[level][0] for level in (0.3, 0.5, 0.6, 0.9)] == [20, 20, 60, 60] and found.points == 2
    value, low, high = found.at[0.9]
    assert low == pytest.approx(60 * 0.905, abs=0.2) and high == pytest.approx(60 * 1.095, abs=0.2)
    assert math.isinf(found.at[0.95][0])
    # The rectangle up to 100 and 1: 20 to 60 at .55, from there .92.
    assert found.hypervolume[0] == pytest.approx(0.4 * 0.55 + 0.4 * 0.92)
    line = fronts.facts(found)
    assert line["0.3"][0] == 20 and set(line) == {f"{level:g}" for level in fronts.LEVELS}


def test_ratios_pair_the_replicates():
    """Both spread alike, so that their ratio does not spread at all."""
    found = fronts.ratios("ours / theirs", [row(20, 0.6)], [row(40, 0.82)], "digit")
    assert found.at[0.5] == pytest.approx((0.5, 0.5, 0.5)) and found.hypervolume is None and found.points == 2
    assert found.at[0.8] == (math.inf,) * 3
    assert all(math.isnan(number) for number in found.at[0.9])


def test_the_table_is_empty_where_nobody_is():
    ours, theirs = [row(20, 0.6), row(120, 0.92)], [row(40, 0.82)]
    lines = fronts.table(
        [
            fronts.front("ours", ours, "digit", 200.0),
            fronts.ratios("ours / theirs", ours, theirs, "digit"),
            fronts.ratios("theirs / ours", theirs, ours, "digit"),
        ],
        "digit",
    )
    assert lines[0].startswith("| digit at least | points | 30% | 50% |")
    assert len({line.count("|") for line in lines}) == 1
    assert "| ours | 2 | 20.0 (18.1 to 21.9) |" in lines[2] and "| 120 (108 to 132) |  | " in lines[2]
    assert "| 0.50 (0.50 to 0.50) |" in lines[3] and "| 3.00 (3.00 to 3.00) | no rival | no rival |" in lines[3]
    assert "| not reached | not reached | neither |" in lines[4]
