"""From a number with its replicates to a verdict, and how numbers are written."""

from __future__ import annotations

import math
from dataclasses import replace

from indomain_guidance.training.claims.deciding import Claim, Number, Verdict, outcome_of, shown

CLAIM = Claim("a", "s", 0.5, lambda claim, sides: Number(), {})


def test_numbers_in_words():
    assert [shown(value) for value in (math.inf, 0.12345, "none")] == ["no point qualifies", "0.123", "none"]
    verdict = Verdict(CLAIM, "undecided", {"reason": "none", "a": 0.51234}, math.inf, 0.4871, math.inf)
    assert verdict.shown == "no point qualifies (0.487 to none)"
    assert replace(verdict, low=math.inf).shown == "no point qualifies"
    assert replace(verdict, value=None).shown == "not measured"
    assert replace(verdict, words="only one reaches it").shown == "only one reaches it"


def test_an_interval_on_the_other_side_than_its_value_decides_nothing():
    """Replicates of a maximum overstate it."""
    assert outcome_of(0.99, 1.01, 1.3, 1.0, "lower") == "undecided"
    assert outcome_of(1.02, 1.01, 1.3, 1.0, "lower") == "refuted"
    assert outcome_of(1.02, 1.01, 1.3, 1.0, "higher") == "confirmed"
    assert outcome_of(1.0, 1.0, 1.0, 1.0, "lower") == "undecided"  # a method compared with itself
