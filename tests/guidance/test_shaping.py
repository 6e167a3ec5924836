"""Shaped terms against their formulas written out, and in the sum."""

from __future__ import annotations

import math

import pytest
import torch
from indomain_guidance.guidance.combination import Guidance
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.frequency import Bands, Mean, blur
from indomain_guidance.guidance.multi_guidance import MultiGuidance
from indomain_guidance.guidance.options import options_of
from indomain_guidance.guidance.orthogonal import Orthogonal
from indomain_guidance.guidance.schedules import Interval
from indomain_guidance.guidance.shaping import InOrder, Shaping
from indomain_guidance.guidance.shapings import SHAPINGS, make_shaping
from indomain_guidance.guidance.terms import Source, Term

SHAPE = (3, 4, 8, 8)


def draws(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


class Counted:
    """A model that returns one tensor and counts its calls."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value, self.calls = value, 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.value[: x.shape[0]]


def three_models(
    domain_weight=2.5, control_weight=2.0, shaping: Shaping | None = None
) -> tuple[Guidance, list[Counted]]:
    models = [Counted(value) for value in draws(3)]
    u, d, c = models
    terms = [Term("domain", d, None, domain_weight, shaping=shaping), Term("control", c, None, control_weight)]
    return Guidance(Source(u), terms), models


# ---------------------------------------------------------------------------------------------------------- orthogonal


def test_the_result_is_orthogonal_to_every_other_direction_and_the_rest_stays():
    d, a, b = draws(3)
    shaped = Orthogonal(("a", "b"), per="image")(d, [a, b])
    flat = [value.flatten(1) for value in (shaped, a, b, d - shaped)]
    for other in flat[1:3]:
        assert float((flat[0] * other).sum(1).abs().max()) < 1e-9
    # What was removed lies in the span: least squares leaves nothing of it.
    for image in range(SHAPE[0]):
        span = torch.stack([flat[1][image], flat[2][image]], 1)
        removed = flat[3][image][:, None]
        assert float((span @ torch.linalg.lstsq(span, removed).solution - removed).abs().max()) < 1e-9


def test_one_direction_is_the_textbook_projection_and_share_scales_it():
    d, g = draws(2)
    along = (d * g).sum((1, 2, 3), keepdim=True) / (g * g).sum((1, 2, 3), keepdim=True) * g
    torch.testing.assert_close(Orthogonal("control", per="image")(d, [g]), d - along)
    torch.testing.assert_close(Orthogonal("control", share=0.25, per="image")(d, [g]), d - 0.25 * along)
    assert torch.equal(Orthogonal("control", share=0.0, per="image")(d, [g]), d)


def test_per_position_the_channels_are_orthogonal_everywhere():
    d, g = draws(2)
    shaped = Orthogonal("control", per="position")(d, [g])
    assert float((shaped * g).sum(1).abs().max()) < 1e-12
    assert not torch.allclose(shaped, Orthogonal("control", per="image")(d, [g]))


def test_only_opposing_leaves_images_that_agree():
    d, g = draws(2)
    sign = (d * g).sum((1, 2, 3), keepdim=True).sign()
    agreeing, opposing = g * sign, -g * sign
    shaping = Orthogonal("control", only_opposing=True, per="image")
    assert torch.equal(shaping(d, [agreeing]), d)
    torch.testing.assert_close(shaping(d, [opposing]), Orthogonal("control", per="image")(d, [opposing]))


def test_only_opposing_asks_each_named_direction_whatever_their_order():
    """A direction that agrees stays out even where its remainder beside the opposing one points the other way."""
    d, opposing, agreeing = (torch.tensor(value, dtype=torch.float64)[None] for value in ([-2, 1], [1, 0], [-1, -1]))
    both = Orthogonal(("a", "b"), only_opposing=True, per="image")
    for others in ([opposing, agreeing], [agreeing, opposing]):
        torch.testing.assert_close(both(d, others), torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    d, *others = draws(3)
    signs = [(d * other).sum((1, 2, 3), keepdim=True).sign() for other in others]
    against = [-other * sign for other, sign in zip(others, signs)]
    torch.testing.assert_close(both(d, against), Orthogonal(("a", "b"), per="image")(d, against))
    torch.testing.assert_close(both(d, against[::-1]), both(d, against))


def test_a_direction_of_zero_or_given_twice_removes_nothing_more():
    d, g = draws(2)
    assert torch.equal(Orthogonal("control", per="image")(d, [torch.zeros_like(g)]), d)
    torch.testing.assert_close(Orthogonal(("a", "b"), per="image")(d, [g, 2 * g]), Orthogonal("a", per="image")(d, [g]))
    assert Orthogonal("control", per="image")(d, []) is d


# ----------------------------------------------------------------------------------------------------------- frequency


@pytest.mark.parametrize("width", [0.3, 1.0, 5.0, math.inf])
def test_the_two_bands_add_up_and_a_constant_is_all_low(width):
    (d,) = draws(1)
    torch.testing.assert_close(Bands(width, 1.0, 0.0)(d, []), blur(d, width))
    torch.testing.assert_close(blur(d, width) + Bands(width, 0.0, 1.0)(d, []), d)
    flat = torch.full(SHAPE, 3.0, dtype=torch.float64)
    torch.testing.assert_close(Bands(width, 1.0, 0.0)(flat, []), flat)


@pytest.mark.parametrize("width", [0.3, 1.0, math.inf])
def test_both_bands_in_one_term_are_their_weighted_sum(width):
    (d,) = draws(1)
    expected = 0.3 * blur(d, width) + 1.2 * (d - blur(d, width))
    torch.testing.assert_close(Bands(width, 0.3, 1.2)(d, []), expected)
    torch.testing.assert_close(Bands(width, 1.0, 1.0)(d, []), d)


def test_two_shapings_in_order_and_only_one_that_looks_at_others():
    d, c = draws(2)
    both = InOrder(Bands(1.0, 0.0, 1.0), Orthogonal("control", per="position"))
    assert both.others == ("control",)
    torch.testing.assert_close(both(d, [c]), Orthogonal("control", per="position")(Bands(1.0, 0.0, 1.0)(d, []), [c]))
    with pytest.raises(GuidanceError, match="got a and then b"):
        InOrder(Orthogonal("a", per="image"), Orthogonal("b", per="image"))


def test_the_low_band_is_the_gaussian_of_its_width():
    impulse = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    impulse[..., 16, 16] = 1.0
    low = Bands(2.0, 1.0, 0.0)(impulse, [])[0, 0]
    axis = torch.arange(33).double() - 16
    assert float(low.sum()) == pytest.approx(1.0)
    assert float((low.sum(0) * axis.square()).sum()) == pytest.approx(4.0, rel=0.03)
    assert float(low[16, 18] / low[16, 16]) == pytest.approx(math.exp(-0.5))
    torch.testing.assert_close(low, low.T)


def test_an_infinite_width_is_the_mean_of_each_channel():
    (d,) = draws(1)
    torch.testing.assert_close(blur(d, math.inf), d.mean((2, 3), keepdim=True).expand(SHAPE))
    assert torch.equal(Mean(0.3, 1.2)(d, []), Bands(math.inf, 0.3, 1.2)(d, []))


# ---------------------------------------------------------------------------------------------------------- in the sum


def test_the_sum_with_an_orthogonal_domain_term_written_out():
    guidance, (u, d, c) = three_models(shaping=Orthogonal("control", per="image"))
    step = guidance.at(1.0)
    found = step.combine({Source(model): model.value for model in (u, d, c)})
    g = c.value - u.value
    expected = u.value + 2.5 * Orthogonal("control", per="image")(d.value - u.value, [g]) + 2.0 * g
    torch.testing.assert_close(found, expected)
    assert step.samples == 3 and step.needed[0] == guidance.base


def test_bands_of_equal_weight_are_the_plain_term_at_the_price_of_one_model():
    models = [Counted(value) for value in draws(3)]
    u, d, c = models
    split = Guidance(
        Source(u),
        [
            Term("low", d, None, 1.5, shaping=Bands(1.0, 1.0, 0.0)),
            Term("control", c, None, 2.0),
            Term("high", d, None, 1.5, shaping=Bands(1.0, 0.0, 1.0)),
        ],
    )
    plain = Guidance(Source(u), [Term("domain", d, None, 1.5), Term("control", c, None, 2.0)])
    predictions = {Source(model): model.value for model in models}
    torch.testing.assert_close(split.at(1.0).combine(predictions), plain.at(1.0).combine(predictions))
    assert split.at(1.0).samples == 3


def test_a_neutral_shaping_equals_the_linear_sum_also_as_one_cfg():
    shaped, models = three_models(shaping=Orthogonal("control", share=0.0, per="image"))
    plain = Guidance(shaped.base, [Term(t.name, t.model, t.cond, t.weight) for t in shaped.terms])
    predictions = {Source(model): model.value for model in models}
    torch.testing.assert_close(shaped.at(1.0).combine(predictions), plain.at(1.0).combine(predictions))
    ours, theirs = (g.at(1.0, keep_base=True).effective(predictions) for g in (shaped, plain))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[2] == theirs[2] == 4.5


@pytest.mark.parametrize("weights", [(2.5, 2.0), (1.5, -1.5)])
def test_one_cfg_of_a_shaped_guidance_gives_the_same_sum(weights):
    guidance, models = three_models(*weights, shaping=Orthogonal("control", per="image"))
    predictions = {Source(model): model.value for model in models}
    step = guidance.at(1.0, keep_base=True)
    condition, base, scale = step.effective(predictions)
    torch.testing.assert_close(base + scale * (condition - base), step.combine(predictions))


def test_a_shaped_term_that_is_off_costs_nothing_and_an_absent_control_leaves_the_direction_whole():
    off, (u, d, c) = three_models(domain_weight=0.0, control_weight=1.0, shaping=Orthogonal("control", per="image"))
    assert off.at(1.0).needed == (Source(c),)
    alone, (u, d, c) = three_models(
        domain_weight=1.0, control_weight=Interval(2.0, 5.0, 2.0, "sigma"), shaping=Orthogonal("control", per="image")
    )
    assert alone.at(1.0).needed == (Source(u), Source(d)) and alone.at(3.0).samples == 3
    torch.testing.assert_close(alone.at(1.0).combine({Source(m): m.value for m in (u, d)}), d.value)


def test_a_denoiser_of_shaped_terms_keeps_half_precision_and_mixed_noise_levels_apart():
    values = [value.half() for value in draws(3)]
    u, d, c = (Counted(value) for value in values)
    domain = Term("domain", d, None, Interval(1.0, 5.0, 2.0, "sigma"), shaping=Bands(1.0, 1.0, 0.0))
    denoise = MultiGuidance(Guidance(Source(u), [domain, Term("control", c, None, 1.0)]))
    result = denoise(torch.zeros(SHAPE, dtype=torch.float16), torch.tensor([1.0, 3.0, 1.0]))
    assert result.dtype == torch.float16
    assert torch.equal(result[0], values[2][0])
    # Counted returns its first images whatever is asked, so the image at sigma 3 is compared with image 0.
    expected = values[2][0].float() + Bands(1.0, 1.0, 0.0)(values[1][:1].float() - values[0][:1].float(), [])[0]
    torch.testing.assert_close(result[1].float(), expected, rtol=2e-3, atol=2e-3)
    assert denoise.samples_per_step == [pytest.approx((1 + 3 + 1) / 3)]


# ------------------------------------------------------------------------------------------------------------ the list


def test_shapings_by_name():
    assert make_shaping("frequencies", width=2.0, low_strength=0.0) == Bands(2.0, 0.0, 1.0)
    assert make_shaping("mean", high_strength=0.5) == Mean(0.2, 0.5)
    assert make_shaping("orthogonal", orthogonal_to=" control, style ,") == Orthogonal(("control", "style"))
    assert make_shaping("orthogonal") == Orthogonal("control")
    assert make_shaping("orthogonal", share=0.0) is None
    assert make_shaping("mean", low_strength=1.0) is None and make_shaping("frequencies", low_strength=1.0) is None
    with pytest.raises(GuidanceError, match="frequencies, mean, orthogonal.*, got 'low'"):
        make_shaping("low")
    with pytest.raises(GuidanceError, match="options of the shaping mean, got others: .*width"):
        make_shaping("mean", width=1.0)
    with pytest.raises(GuidanceError, match="'a' twice"):
        make_shaping("orthogonal", orthogonal_to="a, b, a")


@pytest.mark.parametrize("shaping", SHAPINGS.values(), ids=SHAPINGS)
def test_a_listed_shaping_describes_itself_for_a_node(shaping):
    assert shaping.summary and options_of(shaping)
    for one in options_of(shaping):
        about = one.metadata
        assert not about["help"].endswith(".")
        if isinstance(one.default, float):
            assert about["min"] <= one.default <= about["max"] and about["step"] > 0
        assert "choices" not in about or one.default in about["choices"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda: Orthogonal((), per="image"),
        lambda: Orthogonal("a", share=math.nan, per="image"),
        lambda: Orthogonal("a", per="row"),
        lambda: Bands(0, 1.0, 0.0),
        lambda: Bands(-1.0, 0.0, 1.0),
        lambda: Bands(math.nan, 1.0, 0.0),
        lambda: Bands(True, 1.0, 0.0),
        lambda: Bands(0.0, 1.0, 1.0),
        lambda: Bands(1.0, math.nan, 1.0),
        lambda: Bands(1.0, 1.0, math.inf),
        lambda: Bands("1", 1.0, 1.0),
        lambda: Orthogonal("a", only_opposing="no"),
        lambda: Orthogonal(7),
    ],
)
def test_values_that_cannot_work_are_refused(make):
    with pytest.raises(GuidanceError, match="Expected"):
        make()


def test_a_shaping_by_an_unknown_term_or_by_itself_is_refused():
    for name in ("style", "domain"):
        with pytest.raises(GuidanceError, match="'domain' is shaped by"):
            three_models(shaping=Orthogonal(name, per="image"))
    with pytest.raises(GuidanceError, match="Expected a Shaping"):
        Term("domain", None, None, 1.0, shaping="low")


def test_missing_or_misfitting_predictions_are_named():
    guidance, (u, d, c) = three_models(shaping=Orthogonal("control", per="image"))
    step = guidance.at(1.0)
    with pytest.raises(GuidanceError, match="found none for Source"):
        step.combine({Source(u): u.value, Source(c): c.value})
    with pytest.raises(GuidanceError, match="one shape"):
        step.combine({Source(u): u.value, Source(c): c.value, Source(d): d.value[:, :, :4]})
