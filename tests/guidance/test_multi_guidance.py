"""A guidance on plain callables: what it computes, and in how few calls."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.combination import Guidance
from indomain_guidance.guidance.diffusion import Denoiser, NoiseSchedule
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.multi_guidance import MultiGuidance
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.guidance.schedules import Interval, Keyframes
from indomain_guidance.guidance.terms import Source, Term


class Affine:
    """A denoiser that uses every argument per image, so that no mix-up of rows, sigmas or conditions stays unseen."""

    def __init__(self, seed: int, width: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
        self.calls: list[int] = []

    def __call__(self, x, sigma, context=None, y=None, strength=1.0):
        self.calls.append(x.shape[0])
        sigma = torch.as_tensor(sigma, dtype=x.dtype)
        sigma = sigma.reshape(-1, 1) if sigma.ndim else sigma
        result = x @ self.mix.to(x.dtype) / (1 + sigma)
        if context is not None:
            assert context.shape[0] == x.shape[0]
            result = result + strength * context.mean(1)
        if y is not None:
            result = result * y
        return result


def text(seed: int, batch: int = 1, tokens: int = 4) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"context": torch.randn(batch, tokens, 3, generator=generator, dtype=torch.float64)}


def separately(guidance: Guidance, x, sigmas, percent_to_sigma=None, **kwargs):
    """Every source of every image in a call of its own, combined as D_u + sum_i w_i (D_i - R_i)."""
    rows = []
    for i, sigma in enumerate(sigmas):
        predictions = {}
        for source in guidance.sources:
            cond = {**kwargs, **(source.cond or {})}
            cond = {
                key: value[i : i + 1] if isinstance(value, torch.Tensor) and value.shape[0] == len(x) else value
                for key, value in cond.items()
            }
            predictions[source] = source.model(x[i : i + 1], sigma, **cond)
        row = predictions[guidance.base].double()
        for term in guidance.terms:
            weight, reference = term.weight.at(sigma, percent_to_sigma), guidance.reference(term)
            row = row + weight * (predictions[term.source].double() - predictions[reference].double())
        rows.append(row)
    return torch.cat(rows)


def in_domain(prior, domain, u, c, w_d=2.5, w_c=2.5) -> Guidance:
    return Guidance(Source(prior, u), [Term("domain", domain, u, w_d), Term("control", prior, c, w_c)])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cond_batch", ["one", "all"])
def test_conditionings_of_one_model_run_in_one_call(batch, cond_batch):
    prior, domain = Affine(0), Affine(1)
    rows = batch if cond_batch == "all" else 1
    guidance = in_domain(prior, domain, text(2, rows), text(3, rows))
    denoise = MultiGuidance(guidance)
    x = torch.randn(batch, 3, dtype=torch.float64)
    result = denoise(x, 2.0)
    assert prior.calls == [2 * batch] and domain.calls == [batch]
    assert denoise.samples_per_step == [3] and denoise.calls_per_step == [2]
    torch.testing.assert_close(result, separately(guidance, x, [2.0] * batch), rtol=1e-12, atol=1e-12)


def test_conditionings_that_do_not_fit_together_run_one_by_one():
    x = torch.randn(2, 3, dtype=torch.float64)
    unlike = [
        text(3, tokens=8),
        {**text(3), "y": torch.full((1, 1), 2.0, dtype=torch.float64)},
        {**text(3), "strength": 0.5},
        {"context": text(3)["context"].float()},
        {},
    ]
    for cond in unlike:
        prior = Affine(0)
        guidance = Guidance(Source(prior, text(2)), [Term("a", prior, cond, 2.0), Term("b", prior, text(4), 3.0)])
        result = MultiGuidance(guidance)(x, 2.0)
        assert sorted(prior.calls) == [2, 4]
        torch.testing.assert_close(result, separately(guidance, x, [2.0] * 2), rtol=1e-6, atol=1e-6)


def test_equal_values_that_carry_no_batch_are_passed_along():
    prior = Affine(0)
    conds = [{**text(i), "strength": 0.5, "y": torch.tensor(3.0, dtype=torch.float64)} for i in (1, 2)]
    guidance = Guidance(Source(prior, conds[0]), [Term("a", prior, conds[1], 2.0)])
    x = torch.randn(2, 3, dtype=torch.float64)
    prediction = MultiGuidance(guidance)(x, 1.0)
    assert prior.calls == [4]
    by_hand = [prior(x, 1.0, **{**cond, "context": cond["context"].expand(2, 4, 3)}) for cond in conds]
    torch.testing.assert_close(prediction, by_hand[0] + 2.0 * (by_hand[1] - by_hand[0]))


@pytest.mark.parametrize("wrap", [lambda rows: {"y": rows}, lambda rows: [rows]], ids=["dict", "list"])
def test_arguments_that_may_hold_an_entry_per_image_are_never_joined(wrap):
    class Nested(Affine):
        def __call__(self, x, sigma, context=None, extra=None):
            rows = extra["y"] if isinstance(extra, dict) else extra[0]
            assert len(rows) == len(x)
            return super().__call__(x, sigma, context, rows)

    prior, plain = Nested(0), Affine(0)
    rows = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    result = MultiGuidance(Guidance(Source(prior, text(2)), [Term("a", prior, text(4), 3.0)]))(x, 2.0, extra=wrap(rows))
    expected = Guidance(Source(plain, text(2)), [Term("a", plain, text(4), 3.0)])
    torch.testing.assert_close(result, separately(expected, x, [2.0] * 2, y=rows))
    assert prior.calls == [2, 2]


def test_keyword_arguments_reach_every_model_and_conditionings_come_first():
    prior, domain = Affine(0), Affine(1)
    guidance = in_domain(prior, domain, text(2), {**text(3), "strength": 2.0})
    x = torch.randn(2, 3, dtype=torch.float64)
    y = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    result = MultiGuidance(guidance)(x, 1.0, y=y, strength=0.5)
    torch.testing.assert_close(result, separately(guidance, x, [1.0] * 2, y=y, strength=0.5))


@pytest.mark.parametrize("sigma", [2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.full((3,), 2.0)], ids=str)
def test_every_form_of_one_sigma(sigma):
    guidance = in_domain(Affine(0), Affine(1), text(2), text(3))
    x = torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(MultiGuidance(guidance)(x, sigma), separately(guidance, x, [2.0] * 3))


def test_images_of_one_batch_may_differ_in_sigma():
    prior, domain = Affine(0), Affine(1)
    sigmas = torch.tensor([9.0, 1.0, 6.0, 0.5, 9.0], dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    guidance = in_domain(prior, domain, text(2, 5), text(3, 5), w_d=Interval(2.5, 5.0, 0.9, "sigma"))
    denoise = MultiGuidance(guidance)
    result = denoise(x, sigmas)
    # Only the image at sigma 1 is inside the interval: the four others run together, without the domain model.
    assert domain.calls == [1] and sorted(prior.calls) == [2, 8]
    assert denoise.samples_per_step == [(4 * 2 + 1 * 3) / 5]
    torch.testing.assert_close(result, separately(guidance, x, sigmas.tolist()), rtol=1e-12, atol=1e-12)

    prior.calls.clear()
    constant = in_domain(prior, domain, text(2, 5), text(3, 5))
    result = MultiGuidance(constant)(x, sigmas)
    assert prior.calls == [10]
    torch.testing.assert_close(result, separately(constant, x, sigmas.tolist()), rtol=1e-12, atol=1e-12)


def test_a_ramp_gives_every_image_its_own_weight():
    guidance = in_domain(Affine(0), Affine(1), text(2), text(3), w_d=Keyframes([(10.0, 0.0), (0.1, 5.0)], "sigma"))
    sigmas = torch.tensor([20.0, 3.0, 1.0, 0.01], dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(MultiGuidance(guidance)(x, sigmas), separately(guidance, x, sigmas.tolist()))


def test_counts_follow_the_interval_and_reset():
    prior, domain = Affine(0), Affine(1)
    guidance = in_domain(prior, domain, text(2), text(3), w_d=Interval(2.5, 0.5, 1.0), w_c=Interval(2.5, 0.0, 0.75))
    denoise = MultiGuidance(guidance, NoiseSchedule.scaled_linear().percent_to_sigma)
    x = torch.randn(1, 3, dtype=torch.float64)
    schedule = NoiseSchedule.scaled_linear()
    for percent in (0.1, 0.4, 0.6, 0.9):
        denoise(x, schedule.percent_to_sigma(percent))
    assert denoise.samples_per_step == [2, 2, 3, 2] and denoise.calls_per_step == [1, 1, 2, 2]
    denoise.reset()
    assert denoise.samples_per_step == [] and denoise.calls_per_step == []


def test_a_guidance_can_be_a_model_of_another():
    prior, domain, style = Affine(0), Affine(1), Affine(2)
    inner = MultiGuidance(in_domain(prior, domain, text(2), text(3)))
    outer = Guidance(Source(inner, None), [Term("style", style, text(4), 0.5)])
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = inner(x, 1.0) + 0.5 * (style(x, 1.0, context=text(4)["context"].expand(2, 4, 3)) - inner(x, 1.0))
    torch.testing.assert_close(MultiGuidance(outer)(x, 1.0), expected)


def test_gradients_flow_through():
    guidance = in_domain(Affine(0), Affine(1), text(2), text(3))
    denoise = MultiGuidance(guidance)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: denoise(x, torch.tensor([1.0, 2.0])), (x,))


def test_the_runner_refuses_what_it_cannot_run():
    prior = Affine(0)
    with pytest.raises(GuidanceError, match="percent_to_sigma.*control"):
        MultiGuidance(Guidance(Source(prior), [Term("control", prior, {}, Interval(1.0, 0.1, 0.5))]))
    with pytest.raises(GuidanceError, match="model of control to be a callable, got str"):
        MultiGuidance(Guidance(Source(prior), [Term("control", "prior", {}, 2.0)]))
    with pytest.raises(GuidanceError, match="conditioning of control to be a dict or None"):
        MultiGuidance(Guidance(Source(prior), [Term("control", prior, torch.ones(1), 2.0)]))
    guidance = Guidance(Source(prior), [Term("control", prior, {}, 2.0)])
    x = torch.randn(3, 3, dtype=torch.float64)
    for shape in ((2,), (3, 1)):
        with pytest.raises(GuidanceError, match="sigma as a number or"):
            MultiGuidance(guidance)(x, torch.ones(shape))
    shrinking = Guidance(Source(lambda x, sigma: x[:1]), [Term("control", prior, {}, 2.0)])
    with pytest.raises(GuidanceError, match=r"the shape \[3, 3\], got \[1, 3\]"):
        MultiGuidance(shrinking)(x, 1.0)
    packed = Guidance(Source(lambda x, sigma: (x,)), [Term("control", prior, {}, 2.0)])
    with pytest.raises(GuidanceError, match="return a tensor, the denoised x, got tuple"):
        MultiGuidance(packed)(x, 1.0)


def test_the_library_networks_as_models():
    """A prior with text and a text-free domain model, batched, against the three separate predictions (fp32)."""
    torch.manual_seed(0)
    shape = dict(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=(1, 1),
        transformer_depth=(0, 1),
        transformer_depth_middle=1,
        transformer_depth_output=(0, 0, 1, 1),
        context_dim=16,
        num_heads=2,
        use_linear_in_transformer=False,
        adm_in_channels=None,
    )
    unets = [UNet(UNetConfig(**shape, null_text=form)).eval() for form in ("none", "constant")]
    for unet in unets:
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.05)  # the zero-initialised outputs too
    schedule = NoiseSchedule.scaled_linear()
    prior, domain = (Denoiser(unet, schedule) for unet in unets)
    u, c = {"context": torch.randn(1, 7, 16)}, {"context": torch.randn(1, 7, 16)}
    x, sigma = 5 * torch.randn(2, 4, 8, 8), torch.tensor([5.0, 0.7])
    with torch.no_grad():
        result = MultiGuidance(in_domain(prior, domain, u, c))(x, sigma)
        d_u, d_c = (prior(x, sigma, context=cond["context"].expand(2, 7, 16)) for cond in (u, c))
        d_d = domain(x, sigma)
    assert (d_u - d_c).abs().max() > 1e-3
    torch.testing.assert_close(result, d_u + 2.5 * (d_d - d_u) + 2.5 * (d_c - d_u), rtol=1e-4, atol=1e-4)
