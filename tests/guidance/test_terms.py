"""Sources compare by identity; terms refuse what cannot work."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from indomain_guidance.guidance.combination import Guidance
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.schedules import Constant, Interval
from indomain_guidance.guidance.terms import Source, Term


def test_sources_are_equal_exactly_when_model_and_conditioning_are_the_same_objects():
    model, other = object(), object()
    cond = {"context": torch.ones(1, 2, 3)}
    assert Source(model, cond) == Source(model, cond)
    assert hash(Source(model, cond)) == hash(Source(model, cond))
    assert Source(model, cond) != Source(model, copy.copy(cond))
    assert Source(model, cond) != Source(other, cond)
    assert Source(model, None) == Source(model) != Source(model, cond)
    assert len({Source(model, cond), Source(model, cond), Source(other, cond), Source(model)}) == 3
    assert Source(model, cond) != (model, cond)


def test_a_source_can_hold_what_has_no_hash_and_no_truth_value():
    left, right = [torch.ones(2)], [torch.ones(2)]
    assert Source(left, torch.ones(3)) != Source(right, torch.ones(3))
    assert {Source(left, left): 1}[Source(left, left)] == 1


def test_a_term_knows_its_source_and_makes_numbers_weights():
    model, cond = object(), {}
    term = Term("control", model, cond, 2)
    assert term.source == Source(model, cond)
    assert term.weight == Constant(2.0) and term.reference is None
    weight = Interval(2.0, 0.1, 0.5)
    assert Term("control", model, cond, weight).weight is weight


def test_terms_compare_and_hash_whatever_they_hold():
    cond = {"context": torch.ones(2)}
    one, other = Term("control", [], cond, 1), Term("control", [], {"context": torch.ones(2)}, 1)
    assert one == one and one != other and len({one, other, one}) == 2


def test_a_term_without_model_or_conditioning_takes_the_bases():
    prior, domain, uncond, cond = object(), object(), {}, {"context": 1}
    base = Source(prior, uncond)
    whole = Term("control", prior, cond, 2.0)
    guidance = Guidance(
        base, [Term("domain", domain, None, 1.0), Term("control", None, cond, 2.0), Term("off", None, None, 0.0)]
    )
    assert [term.source for term in guidance.terms] == [Source(domain, uncond), Source(prior, cond), base]
    assert whole.on(base) is whole and Term("control", None, cond, 2.0).source == Source(None, cond)


def test_base_as_a_reference_is_the_default():
    assert Term("control", None, None, 1, reference="base").reference is None
    assert Term("control", None, None, 1, reference="middle").reference == "middle"


@pytest.mark.parametrize("weight", [math.nan, math.inf, "strong", None])
def test_a_weight_that_is_not_finite_is_refused_and_the_term_named(weight):
    with pytest.raises(GuidanceError, match="'style'.*Expected a weight"):
        Term("style", None, None, weight)


@pytest.mark.parametrize("name", ["", None, 3, "base"])
def test_a_name_is_needed(name):
    with pytest.raises(GuidanceError, match="name"):
        Term(name, None, None, 1.0)


def test_terms_are_frozen_and_print_without_their_tensors():
    term = Term("style", torch.nn.Linear(3, 3), {"context": torch.ones(5)}, -0.5, reference="control")
    with pytest.raises(dataclasses.FrozenInstanceError):
        term.weight = 3.0
    assert repr(term) == "Term('style', weight=-0.5, reference='control')"
