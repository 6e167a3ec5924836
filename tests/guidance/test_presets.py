"""Presets against their published formulas, written out by hand, and the predictions each costs."""

from __future__ import annotations

import math

import pytest
import torch
from indomain_guidance.guidance import presets
from indomain_guidance.guidance.combination import Guidance
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.multi_guidance import MultiGuidance
from indomain_guidance.guidance.schedules import Interval
from indomain_guidance.guidance.terms import Source, Term

U, M, C = ({"shift": torch.full((1, 1), value, dtype=torch.float64)} for value in (0.3, -1.1, 2.0))


class Model:
    """A denoiser with its own weight; remembers the images of each call."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.calls: list[int] = []

    def __call__(self, x, sigma, shift):
        self.calls.append(len(x))
        return torch.tanh(self.gain * x + shift) / (1 + sigma)


PRIOR, DOMAIN, THIRD = Model(0.5), Model(1.7), Model(-0.4)
X, SIGMA = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1.3


def p(model: Model, cond: dict) -> torch.Tensor:
    return model(X, SIGMA, **cond)


def results(s: float, t: float) -> dict[str, tuple[Guidance, torch.Tensor]]:
    """Each preset at scales s (and t), with its published formula."""
    u, m, c = (p(PRIOR, cond) for cond in (U, M, C))
    d_u, d_c = p(DOMAIN, U), p(DOMAIN, C)
    w_u, w_c = p(THIRD, U), p(THIRD, C)
    return {
        "cfg": (presets.cfg(PRIOR, U, C, s), u + s * (c - u)),
        "in_domain": (presets.in_domain(PRIOR, DOMAIN, U, C, s, t), u + s * (d_u - u) + t * (c - u)),
        "domain_guidance": (presets.domain_guidance(PRIOR, DOMAIN, U, scale=s), u + s * (d_u - u)),
        "domain_guidance with text": (presets.domain_guidance(PRIOR, DOMAIN, U, C, s), u + s * (d_c - u)),
        "unconditional_prior": (presets.unconditional_prior(PRIOR, DOMAIN, U, C, s), u + s * (d_c - u)),
        "autoguidance": (presets.autoguidance(DOMAIN, THIRD, C, s), w_c + s * (d_c - w_c)),
        "autoguidance, own cond": (presets.autoguidance(DOMAIN, THIRD, C, s, bad_cond=U), w_u + s * (d_c - w_u)),
        "personalization": (presets.personalization(THIRD, DOMAIN, U, C, s), w_u + s * (d_c - w_u)),
        "dual_cfg": (presets.dual_cfg(PRIOR, U, M, C, s, t), u + s * (m - u) + t * (c - m)),
    }


NAMES = tuple(results(1.0, 1.0))


def test_every_preset_is_tested_here():
    assert {name.partition(",")[0].partition(" ")[0] for name in NAMES} == set(presets.PRESETS)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_says_where_it_comes_from(name):
    about = presets.PRESETS[name].__doc__ or ""
    assert "arXiv" in about or "no paper" in about, f"{name}: expected 'arXiv NUMBER' or 'no paper' in its docstring"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "scales", [(2.5, 1.5), (1.0, 1.0), (0.0, 0.0), (-1.5, 4.0), (7.5, 7.5), (0.0, 2.0), (2.0, 0.0)], ids=str
)
def test_preset_equals_its_formula(name, scales):
    guidance, expected = results(*scales)[name]
    torch.testing.assert_close(MultiGuidance(guidance)(X, SIGMA), expected, rtol=1e-12, atol=1e-12)


# (predictions an image, model calls a step): at scales above 1; at 1 and 1; at 0 and 0; at equal scales of 7.5.
COSTS = {
    "cfg": ((2, 1), (1, 1), (1, 1), (2, 1)),
    "in_domain": ((3, 2), (3, 2), (1, 1), (3, 2)),
    "domain_guidance": ((2, 2), (1, 1), (1, 1), (2, 2)),
    "domain_guidance with text": ((2, 2), (1, 1), (1, 1), (2, 2)),
    "unconditional_prior": ((2, 2), (1, 1), (1, 1), (2, 2)),
    "autoguidance": ((2, 2), (1, 1), (1, 1), (2, 2)),
    "autoguidance, own cond": ((2, 2), (1, 1), (1, 1), (2, 2)),
    "personalization": ((2, 2), (1, 1), (1, 1), (2, 2)),
    "dual_cfg": ((3, 1), (1, 1), (1, 1), (2, 1)),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_preset_costs(name):
    for scales, (samples, calls) in zip([(2.5, 1.5), (1.0, 1.0), (0.0, 0.0), (7.5, 7.5)], COSTS[name]):
        guidance, _ = results(*scales)[name]
        models = {id(source.model): source.model for source in guidance.sources}.values()
        for model in models:
            model.calls.clear()
        denoise = MultiGuidance(guidance)
        denoise(X, SIGMA)
        assert denoise.samples_per_step == [samples] and denoise.calls_per_step == [calls], scales
        assert sum(sum(model.calls) for model in models) == samples * len(X)
        assert sum(len(model.calls) for model in models) == calls


def test_released_defaults_of_in_domain_generation():
    guidance = presets.in_domain(PRIOR, DOMAIN, U, C)
    assert guidance.at(1.0).weights == {"domain": 2.5, "control": 2.5}
    assert guidance.base == Source(PRIOR, U)
    # The domain model shares the base's conditioning object: all but the text of it acts on both.
    assert guidance.term("domain").source == Source(DOMAIN, U)
    assert guidance.at(1.0).coefficients[guidance.base] == -4.0


def test_in_domain_falls_back_to_its_relatives():
    def run(guidance):
        return MultiGuidance(guidance)(X, SIGMA)

    no_domain = presets.in_domain(PRIOR, DOMAIN, U, C, domain_weight=0.0, control_weight=4.0)
    assert torch.equal(run(no_domain), run(presets.cfg(PRIOR, U, C, 4.0)))
    no_control = presets.in_domain(PRIOR, DOMAIN, U, C, domain_weight=3.0, control_weight=0.0)
    assert torch.equal(run(no_control), run(presets.domain_guidance(PRIOR, DOMAIN, U, scale=3.0)))


@pytest.mark.parametrize("w_d, w_c", [(2.5, 2.5), (1.0, 2.0), (-0.5, 4.0)])
def test_one_model_for_both_terms_is_dual_cfg(w_d, w_c):
    """ComfyUI's regular form u + cfg2 (m - u) + cfg1 (c - m) at cfg2 = w_d + w_c, cfg1 = w_c."""
    terms = [Term("domain", PRIOR, M, w_d), Term("control", PRIOR, C, w_c)]
    two_terms = MultiGuidance(Guidance(Source(PRIOR, U), terms))
    dual = MultiGuidance(presets.dual_cfg(PRIOR, U, M, C, middle_scale=w_d + w_c, cond_scale=w_c))
    torch.testing.assert_close(two_terms(X, SIGMA), dual(X, SIGMA), rtol=1e-12, atol=1e-12)


def test_cfg_limited_to_an_interval_is_the_conditional_outside():
    """arXiv 2404.07724: outside the interval the scale is 1 and the unconditional is not evaluated."""
    guidance = presets.cfg(PRIOR, U, C, Interval(16.0, 5.42, 0.28, "sigma", outside=1.0))
    denoise = MultiGuidance(guidance)
    for sigma, scale in ((9.0, 1.0), (5.42, 16.0), (0.28, 1.0)):
        u, c = PRIOR(X, sigma, **U), PRIOR(X, sigma, **C)
        torch.testing.assert_close(denoise(X, sigma), u + scale * (c - u))
    assert denoise.samples_per_step == [1, 2, 1]


def test_personalization_interpolates_weights_not_predictions():
    torch.manual_seed(0)
    pretrained, finetuned, weak = (torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(3))
    weak.load_state_dict(presets.interpolate_weights(pretrained.state_dict(), finetuned.state_dict(), 0.25))
    expected = 0.75 * pretrained[0].weight + 0.25 * finetuned[0].weight
    torch.testing.assert_close(weak[0].weight, expected)
    x = X.float()

    def as_denoiser(net):
        return lambda x, sigma, shift: net(x + shift.float())

    pre, fine, third = map(as_denoiser, (pretrained, finetuned, weak))
    result = MultiGuidance(presets.personalization(third, fine, U, C, 3.0))(x, SIGMA)
    base = third(x, SIGMA, **U)
    torch.testing.assert_close(result, base + 3.0 * (fine(x, SIGMA, **C) - base))
    assert (base - (0.75 * pre(x, SIGMA, **U) + 0.25 * fine(x, SIGMA, **U))).abs().max() > 1e-3


def test_interpolated_weights_keep_ends_types_and_integers():
    start = {"a": torch.randn(3).half(), "n": torch.tensor(3)}
    end = {"a": torch.randn(3).half(), "n": torch.tensor(5)}
    for omega, wanted in ((0.0, start), (1.0, end)):
        result = presets.interpolate_weights(start, end, omega)
        assert torch.equal(result["a"], wanted["a"]) and result["a"].dtype == torch.float16
        assert result["n"] == 5


def test_fp8_weights_interpolate_in_float32():
    start, end = (torch.tensor(values).to(torch.float8_e4m3fn) for values in ([1.0, -2.0], [2.0, 6.0]))
    result = presets.interpolate_weights({"a": start}, {"a": end}, 0.25)["a"]
    assert result.dtype == torch.float8_e4m3fn and result.float().tolist() == [1.25, 0.0]


@pytest.mark.parametrize(
    "left, right, omega, message",
    [
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, 0.5, "2 keys in only one of them, such as 'a'"),
        ({"a": torch.ones(1)}, {"a": torch.ones(2)}, 0.5, r"'a' as \[1\] and \[2\]"),
        ({"a": torch.ones(1)}, {"a": torch.ones(1)}, math.nan, "omega"),
    ],
)
def test_weights_of_different_models_are_refused(left, right, omega, message):
    with pytest.raises(GuidanceError, match=message):
        presets.interpolate_weights(left, right, omega)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_presets_refuse_scales_that_are_not_finite(bad):
    with pytest.raises(GuidanceError, match="'domain'"):
        presets.in_domain(PRIOR, DOMAIN, U, C, domain_weight=bad)
    with pytest.raises(GuidanceError, match="'control'"):
        presets.cfg(PRIOR, U, C, bad)
