"""The combination against brute force, and the runner on plain callables against evaluating every source by itself."""

from __future__ import annotations

import math
import random

import pytest
import torch
from indomain_guidance.guidance.combination import Guidance, combine
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.schedules import Interval, Keyframes
from indomain_guidance.guidance.terms import Source, Term


def brute_force(guidance: Guidance, weights: dict, predictions: dict) -> torch.Tensor:
    """D = D_u + sum_i w_i (D_i - R_i), term by term as it is written, in float64."""
    terms = {term.name: term for term in guidance.terms}
    result = predictions[guidance.base].double()
    for name, term in terms.items():
        reference = guidance.base if term.reference is None else terms[term.reference].source
        result = result + weights[name] * (predictions[term.source].double() - predictions[reference].double())
    return result


def random_guidance(rng: random.Random) -> Guidance:
    """Terms over few models and conditionings, so that sources coincide, with references that form trees."""
    models = [object() for _ in range(rng.randint(1, 3))]
    conds = [{} for _ in range(rng.randint(1, 3))]
    names = [f"t{i}" for i in range(rng.randint(1, 7))]
    terms = []
    for i, name in enumerate(names):
        reference = rng.choice([None, *names[:i]])
        weight = rng.choice([0.0, 1.0, 1.0, -1.0, 0.3, 0.7, 2.5, rng.uniform(-5, 5)])
        terms.append(Term(name, rng.choice(models), rng.choice(conds), weight, reference))
    rng.shuffle(terms)
    return Guidance(Source(rng.choice(models), rng.choice(conds)), terms)


@pytest.mark.parametrize("seed", range(200))
def test_random_term_graphs_equal_brute_force(seed):
    rng = random.Random(seed)
    guidance = random_guidance(rng)
    weights = {term.name: term.weight.at(1.0) for term in guidance.terms}
    # One-hot predictions read the coefficient of every source off the brute-force result.
    identity = torch.eye(len(guidance.sources), dtype=torch.float64)
    exact = brute_force(guidance, weights, dict(zip(guidance.sources, identity)))
    step = guidance.at(1.0)
    for source, coefficient in zip(guidance.sources, exact.tolist()):
        assert step.coefficients.get(source, 0.0) == pytest.approx(coefficient, abs=1e-12)
        assert (source in step.needed) == (abs(coefficient) > 1e-12)
    assert step.samples == len(step.needed) == len(set(step.needed))
    assert math.fsum(step.coefficients.values()) == pytest.approx(1.0, abs=1e-12)
    assert step.weights == weights and step.total_weight == pytest.approx(sum(weights.values()))

    generator = torch.Generator().manual_seed(seed)
    everything = {s: torch.randn(2, 3, generator=generator, dtype=torch.float64) for s in guidance.sources}
    expected = brute_force(guidance, weights, everything)
    only_needed = {source: everything[source] for source in step.needed}
    torch.testing.assert_close(step.combine(only_needed), expected, rtol=1e-12, atol=1e-12)

    kept = guidance.at(1.0, keep_base=True)
    assert guidance.base in kept.needed and kept.samples - step.samples in (0, 1)
    only_needed = {source: everything[source] for source in kept.needed}
    torch.testing.assert_close(kept.combine(only_needed), expected, rtol=1e-12, atol=1e-12)
    condition, base, scale = kept.effective(only_needed)
    assert base is everything[guidance.base]
    torch.testing.assert_close(base + scale * (condition - base), expected, rtol=1e-9, atol=1e-9)


def one_term(weight, **more) -> Guidance:
    return Guidance(Source("prior", "u"), [Term("control", "prior", "c", weight, **more)])


def test_only_what_is_needed_is_needed():
    u, c = Source("prior", "u"), Source("prior", "c")
    assert one_term(7.5).at(1.0).needed == (u, c)
    assert one_term(1.0).at(1.0).needed == (c,)
    assert one_term(0.0).at(1.0).needed == (u,)
    assert one_term(1.0).at(1.0, keep_base=True).needed == (u, c)
    assert one_term(1.0).at(1.0, keep_base=True).coefficients[u] == 0.0
    outside = Interval(7.5, 5.0, 1.0, "sigma")
    assert one_term(outside).at(6.0).needed == (u,)
    assert one_term(outside).at(5.0).needed == (u, c)


def test_decimal_weights_that_sum_to_one_drop_the_base():
    guidance = Guidance(Source("p", "u"), [Term("a", "p", "a", 0.3), Term("b", "q", "b", 0.7)])
    assert math.fsum([1.0, -0.3, -0.7]) != 0.0
    assert guidance.at(1.0).needed == (Source("p", "a"), Source("q", "b"))


def test_a_small_weight_is_not_rounding():
    assert one_term(1e-12).at(1.0).samples == 2


def test_a_reference_of_weight_zero_is_still_evaluated():
    guidance = Guidance(
        Source("prior", "u"), [Term("plain", "plain prior", "u", 0.0), Term("domain", "d", "u", 2.5, reference="plain")]
    )
    step = guidance.at(1.0)
    assert set(step.needed) == {Source("prior", "u"), Source("plain prior", "u"), Source("d", "u")}
    assert step.coefficients == {Source("prior", "u"): 1.0, Source("d", "u"): 2.5, Source("plain prior", "u"): -2.5}


def test_identical_pairs_count_once():
    terms = [Term("a", "p", "c", 2.0), Term("b", "p", "c", 3.0), Term("n", "p", "u", 9.0)]
    guidance = Guidance(Source("p", "u"), terms)
    step = guidance.at(1.0)
    assert step.coefficients == {Source("p", "u"): -4.0, Source("p", "c"): 5.0}
    assert guidance.names(Source("p", "u")) == ("base", "n") and guidance.names(Source("p", "c")) == ("a", "b")


def test_effective_condition_of_one_term_is_its_prediction_bit_for_bit():
    predictions = {Source("prior", "u"): torch.randn(3, 4), Source("prior", "c"): torch.randn(3, 4)}
    for weight in (0.1, 1.0, 7.3, -2.2):
        condition, base, scale = one_term(weight).at(1.0, keep_base=True).effective(predictions)
        assert torch.equal(condition, predictions[Source("prior", "c")])
        assert torch.equal(base, predictions[Source("prior", "u")])
        assert scale == weight


def test_gcfg_is_cfg_of_the_total_weight_on_the_effective_condition():
    sources = [Source("p", "u"), Source("d", "u"), Source("p", "c")]
    u, d, c = (torch.randn(2, 5, dtype=torch.float64) for _ in range(3))
    guidance = Guidance(sources[0], [Term("domain", "d", "u", 2.5), Term("control", "p", "c", 1.5)])
    condition, base, scale = guidance.at(1.0, keep_base=True).effective(dict(zip(sources, (u, d, c))))
    assert scale == 4.0
    torch.testing.assert_close(condition, u + (2.5 * (d - u) + 1.5 * (c - u)) / 4.0, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(base + scale * (condition - base), u + 2.5 * (d - u) + 1.5 * (c - u))


@pytest.mark.parametrize("weights", [(2.0, -2.0), (2.0, -1.999), (0.0, 0.0)])
def test_cancelling_weights_hand_over_the_result_itself(weights):
    sources = [Source("p", "u"), Source("d", "u"), Source("p", "c")]
    predictions = {source: torch.randn(2, 5, dtype=torch.float64) for source in sources}
    guidance = Guidance(sources[0], [Term("a", "d", "u", weights[0]), Term("b", "p", "c", weights[1])])
    step = guidance.at(1.0, keep_base=True)
    condition, base, scale = step.effective(predictions)
    assert scale == 1.0 and torch.equal(condition, step.combine(predictions))


@pytest.mark.parametrize("seed", range(20))
def test_a_total_scales_all_weights_alike(seed):
    rng = random.Random(seed)
    guidance = random_guidance(rng)
    own, total = guidance.at(1.0), rng.uniform(-6.0, 6.0)
    scaled = guidance.at(1.0, keep_base=True, total=total)
    identity = torch.eye(len(guidance.sources), dtype=torch.float64)
    predictions = dict(zip(guidance.sources, identity))
    size = sum(map(abs, own.weights.values()))
    if abs(own.total_weight) <= 1e-3 * size:
        assert scaled.weights == own.weights, "weights that cancel stay as they are"
        return
    assert scaled.total_weight == pytest.approx(total)
    effective, base, _ = guidance.at(1.0, keep_base=True).effective(predictions)
    assert torch.allclose(scaled.combine(predictions), base + total * (effective - base), atol=1e-6)


def test_a_weight_that_is_the_whole_sum_becomes_the_total_exactly():
    for weight, total in ((7.0, 3.0), (0.1, 0.3), (3.3, 1.0), (2.5, -1e-3)):
        step = one_term(weight).at(1.0, total=total)
        assert step.total_weight == total and list(step.weights.values()) == [total]
    assert one_term(0.0).at(1.0, total=3.0).total_weight == 0.0


def test_the_largest_total_is_looked_up_over_the_whole_of_sampling():
    def percent_to_sigma(percent):
        return 10.0 * (1.0 - percent)

    u = Source(object(), {})
    for weights, expected in (
        ([2.0, 6.0], 8.0),
        ([Interval(2.0, 0.5, 1.0), 6.0], 8.0),
        ([Interval(2.0, 0.0, 0.4), Interval(6.0, 0.5, 1.0)], 6.0),
        ([Interval(-9.0, 0.25, 0.5), 2.0], -7.0),
        ([Keyframes(((0.0, 1.0), (0.5, 4.0), (1.0, 0.0)))], 4.0),
        ([0.0], 0.0),
    ):
        terms = [Term(f"t{i}", object(), {}, weight) for i, weight in enumerate(weights)]
        assert Guidance(u, terms).largest_total(percent_to_sigma) == pytest.approx(expected, abs=1e-6)


def test_effective_needs_the_base():
    step = one_term(1.0).at(1.0)
    with pytest.raises(GuidanceError, match="keep_base"):
        step.effective({Source("prior", "c"): torch.ones(1)})


def test_combining_denoised_equals_combining_eps_as_the_released_code_does():
    """eps = (1 - sum w) eps_u + sum w_i eps_i, at several noise levels, in float64."""
    weights, x = {"domain": 2.5, "control": 2.5, "style": -1.25}, torch.randn(2, 4, dtype=torch.float64)
    sources = {name: Source(name, None) for name in ("u", *weights)}
    guidance = Guidance(sources["u"], [Term(name, name, None, weight) for name, weight in weights.items()])
    for sigma in (0.03, 1.0, 14.6):
        eps = {name: torch.randn(2, 4, dtype=torch.float64) for name in sources}
        combined = (1 - sum(weights.values())) * eps["u"] + sum(w * eps[name] for name, w in weights.items())
        denoised = guidance.at(sigma).combine({sources[name]: x - sigma * e for name, e in eps.items()})
        torch.testing.assert_close(denoised, x - sigma * combined, rtol=1e-11, atol=1e-11)


def test_eps_and_v_models_mix():
    """A v-model's output becomes eps at the same (x, sigma); combining the eps by hand gives the same."""
    x, sigma = torch.randn(2, 4, dtype=torch.float64), 3.7
    eps_u, v_c = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    alpha, noise_share = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    eps_c = alpha * v_c + noise_share * (alpha * x)
    eps = eps_u + 4.0 * (eps_c - eps_u)
    v_denoised = alpha * (alpha * x) - noise_share * v_c
    predictions = {Source("prior", "u"): x - sigma * eps_u, Source("prior", "c"): v_denoised}
    torch.testing.assert_close(one_term(4.0).at(sigma).combine(predictions), x - sigma * eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rounds_once(dtype):
    base = torch.randn(1000)
    predictions = {"u": base.to(dtype), "c": (base + 0.01 * torch.randn(1000)).to(dtype), "d": (base + 0.01).to(dtype)}
    coefficients = {"u": -4.0, "c": 2.5, "d": 2.5}
    result = combine(predictions, coefficients, pivot="u")
    exact = sum(c * predictions[key].double() for key, c in coefficients.items())
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


def test_mixed_precision_keeps_the_finer():
    predictions = {"u": torch.full((2,), 1.5).half(), "c": torch.tensor([1.2345678, 2.0])}
    for pivot in ("u", "c"):
        result = combine(predictions, {"u": 0.5, "c": 0.5}, pivot)
        torch.testing.assert_close(result, torch.tensor([1.3672839, 1.75]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("coefficients", [{}, {"u": 0.0}, {"u": 2.0}, {"u": 0.5, "c": 0.4}, {"u": math.nan, "c": 1.0}])
def test_coefficients_of_another_sum_are_refused(coefficients):
    with pytest.raises(GuidanceError, match="coefficients that sum to 1"):
        combine({"u": torch.ones(1), "c": torch.ones(1)}, coefficients)


@pytest.mark.parametrize(
    "terms, message",
    [
        ([], "at least one guidance term"),
        ([Term("a", 1, 1, 1), Term("a", 2, 2, 2)], "'a' twice"),
        ([Term("a", 1, 1, 1, "b")], "'b', which is none of: base, a"),
        ([Term("a", 1, 1, 1, "a")], "refers to itself"),
        ([Term("a", 1, 1, 1, "b"), Term("b", 1, 1, 1, "a")], "cycle: a -> b -> a"),
        (
            [Term("a", 1, 1, 0, "b"), Term("b", 1, 1, 0, "c"), Term("c", 1, 1, 0, "d"), Term("d", 1, 1, 0, "b")],
            "cycle: .*b -> c -> d -> b",
        ),
    ],
)
def test_impossible_guidance_is_refused(terms, message):
    with pytest.raises(GuidanceError, match=message):
        Guidance(Source(0, 0), terms)


def test_terms_may_be_given_one_by_one():
    assert [term.name for term in Guidance(Source(0, 0), (Term(name, 1, 1, 1) for name in "ab")).terms] == ["a", "b"]


def test_missing_and_misshapen_predictions_are_refused():
    step = one_term(3.0).at(1.0)
    with pytest.raises(GuidanceError, match="found none"):
        step.combine({Source("prior", "u"): torch.ones(1)})
    with pytest.raises(GuidanceError, match="predictions of one shape"):
        step.combine({Source("prior", "u"): torch.ones(1, 4, 8, 8), Source("prior", "c"): torch.ones(1, 16, 8, 8)})
