"""The text-free forms against the full UNet on the empty prompt, and against the unfolded computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig, unet_config_from_state_dict
from indomain_guidance.guidance.null_text import NullContext, build_cached, build_constant, fold_constants, load_unet
from indomain_guidance.guidance.probes import Probes, measure_cross_attention, unconditional_error

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    transformer_depth=(1, 2),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 1),
    context_dim=48,
    num_heads=4,
)
SDXL = replace(SMALL, use_linear_in_transformer=True, adm_in_channels=40)


@pytest.fixture
def prior(randomise):
    return randomise(UNet(SMALL))


def null_context(tokens=7, pooled=None, seed=3):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(1, tokens, SMALL.context_dim, generator=generator)
    pooled = None if pooled is None else torch.randn(1, pooled, generator=generator)
    return NullContext(tensor, {"text_encoder": "test", "layer": "-1"}, pooled)


def random_probes(count=5, seed=0, adm=None):
    generator = torch.Generator().manual_seed(seed)
    y = None if adm is None else torch.randn(count, adm, generator=generator)
    timesteps = torch.randint(0, 1000, (count,), generator=generator).float()
    return Probes(torch.randn(count, 4, 8, 8, generator=generator), timesteps, y)


# ---- cached -----------------------------------------------------------------------------------------------------


def test_cached_equals_the_prior_on_the_empty_prompt(prior, relative_error):
    context, probes = null_context(), random_probes()
    state_dict, config = build_cached(prior.state_dict(), SMALL, context)
    text_free = load_unet(state_dict, config)
    assert config == replace(SMALL, null_text="cached", null_tokens=7)
    assert unet_config_from_state_dict(state_dict, num_heads=4) == replace(config, context_dim=None)
    with torch.no_grad():
        expected = prior(probes.x, probes.timesteps, context.tensor.expand(5, -1, -1))
        other = prior(probes.x, probes.timesteps, context.tensor.expand(5, -1, -1) + 1)
        actual = text_free(probes.x, probes.timesteps)
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(other, expected) > 1e-2
    assert unconditional_error(prior, text_free, context.tensor, probes) < 1e-5


def test_cached_keeps_precision_and_shares_what_does_not_change(prior):
    half = {key: tensor.half() for key, tensor in prior.state_dict().items()}
    state_dict, _ = build_cached(half, SMALL, null_context())
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float16}
    assert all(state_dict[key] is half[key] for key in state_dict if "null" not in key)
    gone = {key for key in half if key not in state_dict}
    assert gone and all(".attn2.to_k." in key or ".attn2.to_v." in key for key in gone)


def test_fp8_is_upcast_exactly(prior):
    fp8 = {k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in prior.state_dict().items()}
    state_dict, config = build_cached(fp8, SMALL, null_context())
    assert torch.float8_e4m3fn not in {tensor.dtype for tensor in state_dict.values()}
    key = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(state_dict[key].float(), fp8[key].float())
    wide = load_unet({key: tensor.float() for key, tensor in fp8.items()}, SMALL)
    assert unconditional_error(wide, load_unet(state_dict, config), null_context().tensor, random_probes()) < 1e-3


def test_cached_null_tokens_train(prior):
    text_free = load_unet(*build_cached(prior.state_dict(), SMALL, null_context())).requires_grad_(True)
    text_free(torch.randn(1, 4, 8, 8), torch.tensor([500.0])).square().mean().backward()
    null = {name: parameter for name, parameter in text_free.named_parameters() if ".null_" in name}
    assert len(null) == 2 * 8 and all(bool(parameter.grad.any()) for parameter in null.values())


# ---- constant ---------------------------------------------------------------------------------------------------


def unfolded(prior, context, probes, constants):
    """The prior with every cross-attention's output replaced by its block's constant, nothing folded."""
    handles = []
    for name, module in prior.named_modules():
        if name.endswith(".attn2"):
            constant = constants[name.removesuffix(".attn2")].float()
            handles.append(module.register_forward_hook(lambda *args, c=constant: c.expand_as(args[-1])))
    with torch.no_grad():
        result = prior(probes.x, probes.timesteps, context.tensor.expand(len(probes), -1, -1))
    for handle in handles:
        handle.remove()
    return result


def test_folding_is_exact(prior, relative_error):
    context, probes = null_context(), random_probes()
    constants = {name: stats.mean for name, stats in measure_cross_attention(prior, context.tensor, probes).items()}
    state_dict, config = fold_constants(prior.state_dict(), SMALL, context, constants)
    expected = unfolded(prior, context, probes, constants)
    with torch.no_grad():
        actual = load_unet(state_dict, config)(probes.x, probes.timesteps)
        full = prior(probes.x, probes.timesteps, context.tensor.expand(5, -1, -1))
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(full, expected) > 1e-2  # the constant is an approximation; folding is not
    assert config == replace(SMALL, null_text="constant")
    assert not [key for key in state_dict if "attn2" in key or "norm2" in key]


def test_constant_is_exact_for_one_token(prior):
    """Attention over one token does not depend on the query."""
    context, probes = null_context(tokens=1), random_probes()
    held_out = random_probes(seed=9)
    state_dict, config, report = build_constant(prior.state_dict(), SMALL, context, probes, held_out=held_out)
    assert len(report) == 8 and max(report.values()) < 1e-5
    assert unconditional_error(prior, load_unet(state_dict, config), context.tensor, random_probes(seed=8)) < 1e-5


def test_report_is_the_error_on_held_out_probes(prior):
    """Against outputs collected by hand."""
    context, probes, held_out = null_context(), random_probes(), random_probes(count=3, seed=5)
    _, _, report = build_constant(prior.state_dict(), SMALL, context, probes, held_out=held_out)
    outputs = {}
    for name, module in prior.named_modules():
        if name.endswith(".attn2"):
            block = name.removesuffix(".attn2")
            module.register_forward_hook(
                lambda module, args, output, b=block: outputs.setdefault(b, []).append(output.flatten(0, 1))
            )
    with torch.no_grad():
        for part in (probes, held_out):
            prior(part.x, part.timesteps, context.tensor.expand(len(part), -1, -1))
    assert set(outputs) == set(report) and len(report) == 8
    for block, (fitted, measured) in outputs.items():
        constant = fitted.mean(dim=0)
        expected = (measured - constant).square().mean().sqrt() / measured.square().mean().sqrt()
        assert report[block] == pytest.approx(float(expected), rel=1e-4)
        assert report[block] > 0.01


def test_constant_beats_dropping_the_attention(prior):
    context, probes = null_context(), random_probes(count=8)
    statistics = measure_cross_attention(prior, context.tensor, probes)
    zero = {block: torch.zeros_like(stats.mean) for block, stats in statistics.items()}
    dropped = load_unet(*fold_constants(prior.state_dict(), SMALL, context, zero))
    state_dict, config, _ = build_constant(prior.state_dict(), SMALL, context, probes)
    others = random_probes(seed=77)
    error = unconditional_error(prior, load_unet(state_dict, config), context.tensor, others)
    assert error < 0.8 * unconditional_error(prior, dropped, context.tensor, others)


def test_statistics_of_cores_unet_are_the_same(prior, core, relative_error):
    """ComfyUI's own module can be measured in place of ours."""
    detected = core("comfy.model_detection").detect_unet_config(prior.state_dict(), "")
    oracle = core("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
        **detected, num_heads=4, num_head_channels=-1, operations=core("comfy.ops").disable_weight_init
    )
    oracle.load_state_dict(prior.state_dict())
    context, probes = null_context(), random_probes()
    ours, theirs = (measure_cross_attention(unet, context.tensor, probes, batch=2) for unet in (prior, oracle.eval()))
    assert ours.keys() == theirs.keys()
    for block in ours:
        assert relative_error(theirs[block].mean, ours[block].mean) < 1e-4
        assert theirs[block].count == ours[block].count
    by_core, _, report = build_constant(prior.state_dict(), SMALL, context, probes, unet=oracle)
    own, _, own_report = build_constant(prior.state_dict(), SMALL, context, probes)
    assert all(torch.allclose(by_core[key], own[key], atol=1e-4) for key in own)
    assert report == pytest.approx(own_report, rel=1e-3)


# ---- SDXL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cached", "constant"])
def test_pooled_text_is_frozen_and_sizes_stay_live(form, randomise, relative_error):
    prior = randomise(UNet(SDXL))
    context = null_context(tokens=1, pooled=16)
    probes = random_probes(adm=40)
    if form == "cached":
        state_dict, config = build_cached(prior.state_dict(), SDXL, context)
    else:
        state_dict, config, _ = build_constant(prior.state_dict(), SDXL, context, probes)
    text_free = load_unet(state_dict, config)
    empty = torch.cat([context.pooled.expand(5, -1), probes.y[:, 16:]], dim=1)
    with torch.no_grad():
        expected = prior(probes.x, probes.timesteps, context.tensor.expand(5, -1, -1), empty)
        actual = text_free(probes.x, probes.timesteps, None, probes.y)  # any pooled text at all
        sizes = torch.cat([probes.y[:, :16], probes.y[:, 16:] + 1], dim=1)
        resized = text_free(probes.x, probes.timesteps, None, sizes)
        prompted = prior(probes.x, probes.timesteps, context.tensor.expand(5, -1, -1), probes.y)
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(resized, expected) > 1e-3 and relative_error(prompted, expected) > 1e-3


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_refuses_what_it_cannot_make_text_free(prior):
    state_dict, context = prior.state_dict(), null_context()
    cached, cached_config = build_cached(state_dict, SMALL, context)
    with pytest.raises(ValueError, match="got text-free form 'cached'"):
        build_cached(cached, cached_config, context)
    with pytest.raises(ValueError, match="null context of width 48, found 32"):
        build_cached(state_dict, SMALL, NullContext(torch.zeros(1, 7, 32)))
    reads_text = dict(state_dict)
    key = "middle_block.1.transformer_blocks.0.attn1.to_k.weight"
    reads_text[key] = torch.zeros(64, 48)
    with pytest.raises(ValueError, match="middle_block.1.*disable_self_attentions"):
        build_constant(reads_text, SMALL, context, random_probes())
    del reads_text[key]
    with pytest.raises(ValueError, match="attn1.to_k.weight is missing"):
        build_cached(reads_text, SMALL, context)
    with pytest.raises(ValueError, match="expected one constant per transformer block"):
        fold_constants(state_dict, SMALL, context, {})
    with pytest.raises(ValueError, match="found none"):
        measure_cross_attention(UNet(replace(SMALL, null_text="constant")), context.tensor, random_probes())
    with pytest.raises(ValueError, match="no pooled vector of width 16"):
        build_cached(state_dict, SMALL, null_context(pooled=16))
    with pytest.raises(ValueError, match="SDXL"):
        build_cached(state_dict, replace(SMALL, adm_in_channels=2816), context)


def test_refuses_a_prior_that_overflows(prior):
    """fp16 attention of some priors does (2.1 is known for it); a NaN must not pass as an error of 0."""
    with torch.no_grad():
        prior.middle_block[1].transformer_blocks[0].attn2.to_out[0].bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in middle_block.1.*; run"):
        build_constant(prior.state_dict(), SMALL, null_context(), random_probes(count=1), unet=prior)


def test_refuses_broken_contexts_and_probes():
    with pytest.raises(ValueError, match=r"expected encoded text \[1, T, D\], got \[2, 7, 48\]"):
        NullContext(torch.zeros(2, 7, 48))
    with pytest.raises(ValueError, match="NaN"):
        NullContext(torch.full((1, 7, 48), float("nan")))
    with pytest.raises(ValueError, match="pooled"):
        NullContext(torch.zeros(1, 7, 48), pooled=torch.zeros(16))
    with pytest.raises(ValueError, match="as many latents"):
        Probes(torch.zeros(2, 4, 8, 8), torch.zeros(3))


def test_context_description_identifies_the_context():
    context = null_context(pooled=16)
    described = context.to_dict()
    assert described["tokens"] == 7 and described["width"] == 48 and described["layer"] == "-1"
    assert described == null_context(pooled=16).to_dict()
    changed = replace(context, tensor=context.tensor + 1e-3).to_dict()
    assert changed["sha256"] != described["sha256"] and changed["pooled_sha256"] == described["pooled_sha256"]
