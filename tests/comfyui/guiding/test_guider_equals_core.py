"""Where multi-guidance reduces to something core can do, it must be core, most of it to the last bit."""

from __future__ import annotations

import importlib

import pytest
import torch

from ..conftest import CONTEXT, execute

SDXL_VECTOR = {"adm_in_channels": 2816, "num_classes": "sequential", "model_channels": 64}
SAMPLERS = ["euler", "dpmpp_2m", "euler_cfg_pp", "dpmpp_2m_sde"]


def k_sampler(comfyui, model, positive, negative, latent, cfg, sampler, denoise):
    (out,) = comfyui.nodes.common_ksampler(
        model, 7, 4, cfg, sampler, "karras", positive, negative, latent, denoise=denoise
    )
    return out


@pytest.mark.parametrize("control_weight", [1.0, 2.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_domain_weight_zero_is_core_bit_for_bit(comfyui, tiny, guiders, sampler, control_weight):
    prior, positive, negative = tiny.prior(), tiny.conditioning(1), tiny.conditioning(2)
    domain = tiny.prior(seed=5)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1.0
    for latent, denoise in (
        (tiny.latent(batch=2), 1.0),
        (tiny.latent(3, batch=2, noise_mask=mask), 0.6),
        (tiny.latent(4, batch=2, batch_index=[3, 1]), 1.0),
    ):
        expected = k_sampler(comfyui, prior, positive, negative, latent, control_weight, sampler, denoise)
        node = execute(
            guiders.InDomainSampler,
            prior,
            domain,
            positive,
            negative,
            latent,
            7,
            4,
            sampler,
            "karras",
            0.0,
            control_weight,
            denoise,
        )
        (result,) = node.result
        assert torch.equal(result["samples"], expected["samples"])
        assert expected["samples"].abs().max() > 0.1
        assert set(result) == set(expected)


def noisy(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * 3.0


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def dual_cfg(comfyui, model, positive, middle, negative, domain_weight, control_weight):
    guider = comfyui.nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(control_weight, domain_weight + control_weight, nested=False)
    return guider


@pytest.mark.parametrize("weights", [(2.5, 2.5), (0.7, 4.0), (-1.5, 2.0), (1.0, -1.0), (0.5, 0.5)])
@pytest.mark.parametrize("sigma", [14.0, 3.0, 0.2])
def test_one_model_equals_dual_cfg(comfyui, tiny, internals, weights, sigma):
    # DualCFG: u + cfg2 (middle - u) + cfg1 (positive - middle); one model for all terms makes the two the same formula.
    prior = tiny.prior()
    positive, middle, negative = (tiny.conditioning(i) for i in (1, 2, 3))
    domain_weight, control_weight = weights
    guider = internals.TermGuider(
        prior,
        negative,
        [
            internals.Term("domain", None, middle, domain_weight),
            internals.Term("control", None, positive, control_weight),
        ],
    )
    x = noisy(11)
    expected = tiny.predict(dual_cfg(comfyui, prior, positive, middle, negative, *weights), x, sigma)
    result = tiny.predict(guider, x, sigma)
    assert relative(result, expected) < 1e-5
    alone = tiny.denoised(prior, positive, x, sigma)
    assert relative(result, alone) > 1e-3, "the guidance must do something for the comparison to mean anything"


def test_domain_weight_zero_leaves_the_domain_model_alone(tiny, internals, guiders):
    prior, domain = tiny.prior(), tiny.prior(seed=5)
    guider = internals.in_domain_guider(prior, domain, tiny.conditioning(1), tiny.conditioning(2), 0.0, 2.5)
    assert guider.model_patcher.get_additional_models() == []
    tiny.sample(guider)
    assert guider.evaluations == {"base": 3, "control": 3}


def test_untrained_cached_domain_model_with_control_nets_is_core(comfyui, tiny, internals):
    # The cached form equals the prior on the empty prompt, so the domain term vanishes where it sees what the base
    # sees.
    prior, positive, negative = tiny.prior(), tiny.conditioning(1), tiny.conditioning(2)
    domain = tiny.cached_domain(prior, negative[0][0])
    control = tiny.control_net()
    x = noisy(12)
    plain = comfyui.samplers.CFGGuider(prior)
    plain.set_conds(positive, negative)
    plain.set_cfg(3.0)
    without = tiny.predict(plain, x, 2.0)
    assert (
        relative(tiny.predict(internals.in_domain_guider(prior, domain, positive, negative, 2.5, 3.0), x, 2.0), without)
        < 1e-4
    )

    controlled = [tiny.with_options(c, control=control, control_apply_to_uncond=False) for c in (positive, negative)]
    plain.set_conds(*controlled)
    expected = tiny.predict(plain, x, 2.0)
    result = tiny.predict(internals.in_domain_guider(prior, domain, *controlled, 2.5, 3.0), x, 2.0)
    assert relative(result, expected) < 1e-4
    assert relative(expected, without) > 1e-2, "the ControlNet must change the prediction"

    # The older Apply ControlNet marks the positive conditioning only, and core spreads it to the negative one.
    spread = tiny.with_options(positive, control=control, control_apply_to_uncond=True)
    plain.set_conds(spread, negative)
    expected = tiny.predict(plain, x, 2.0)
    result = tiny.predict(internals.in_domain_guider(prior, domain, spread, negative, 2.5, 3.0), x, 2.0)
    assert relative(result, expected) < 1e-4


@pytest.fixture
def sdxl(comfyui, tiny, monkeypatch):
    """(prior, its `cached` form for a text [1, T, D] and pooled text [1, 1280]) of SDXL's classes in a tiny size."""
    null_text, unet, loading = (
        importlib.import_module(f"indomain_guidance.{name}")
        for name in ("guidance.null_text", "guidance.networks.unet_config", "nodes.comfy_internals.models.loading")
    )

    class TinySDXL(comfyui.supported_models.SDXL):
        unet_config = {
            **comfyui.supported_models.SDXL.unet_config,
            "model_channels": 64,
            "context_dim": CONTEXT,
            "use_linear_in_transformer": False,
            "transformer_depth": [1, 1],
        }

    monkeypatch.setattr(comfyui.supported_models, "models", [TinySDXL, *comfyui.supported_models.models])
    prior = tiny.prior(family="SDXL", **SDXL_VECTOR)

    def cached(text, pooled):
        weights = {key: value.clone() for key, value in prior.model.diffusion_model.state_dict().items()}
        config = unet.unet_config_from_state_dict(weights, num_head_channels=64)
        weights, config = null_text.build_cached(weights, config, null_text.NullContext(text, {}, pooled))
        info = loading.DomainInfo("tiny", "tiny.safetensors", "cached", None)
        return loading.build_unet_model(weights, config, info=info, latent_format="sdxl", source="tiny")

    return prior, cached


def test_control_nets_of_sdxl_see_the_same_vector_on_both_models(comfyui, tiny, internals, sdxl):
    # A ControlNet of SDXL takes the pooled text too, which the text-free UNet has folded away.
    pooled = torch.randn(2, 1, 1280, generator=torch.Generator().manual_seed(0))
    control = tiny.control_net(**SDXL_VECTOR)
    positive, negative = (
        tiny.conditioning(i, pooled_output=pooled[i], width=512, crop_h=64, control=control) for i in range(2)
    )
    prior, cached = sdxl
    domain = cached(negative[0][0], pooled[1])
    x = noisy(13)
    plain = comfyui.samplers.CFGGuider(prior)
    plain.set_conds(positive, negative)
    plain.set_cfg(3.0)
    expected = tiny.predict(plain, x, 2.0)
    result = tiny.predict(internals.in_domain_guider(prior, domain, positive, negative, 2.5, 3.0), x, 2.0)
    assert relative(result, expected) < 1e-4
    other = [[text, {**options, "pooled_output": pooled[0]}] for text, options in negative]
    assert relative(tiny.denoised(domain, other, x, 2.0), tiny.denoised(domain, negative, x, 2.0)) > 1e-4


def test_pooled_text_never_reaches_a_text_free_unet(tiny, sdxl):
    pooled = torch.randn(2, 1, 1280, generator=torch.Generator().manual_seed(0))
    text = tiny.conditioning(1)
    # A LoRA fills the columns that making the model text-free has emptied; a file of another origin may have its own.
    domain = tiny.lora(sdxl[1](text[0][0], pooled[0]), 1, contains="label_emb.0.0")
    x = noisy(14)
    foreign = torch.randn(1, 768)
    without, *given = (
        tiny.denoised(domain, tiny.with_options(text, **options), x, 2.0)
        for options in ({}, {"pooled_output": pooled[0]}, {"pooled_output": pooled[1]}, {"pooled_output": foreign})
    )
    assert all(torch.equal(one, without) for one in given)
    assert not torch.equal(tiny.denoised(domain, tiny.with_options(text, width=128), x, 2.0), without)


def test_core_itself_predicts_where_only_the_control_guides(comfyui, tiny, internals, monkeypatch):
    scales, sampling_function = [], comfyui.samplers.sampling_function

    def spy(model, x, timestep, uncond, cond, cond_scale, **kwargs):
        scales.append(cond_scale)
        return sampling_function(model, x, timestep, uncond, cond, cond_scale, **kwargs)

    monkeypatch.setattr(comfyui.samplers, "sampling_function", spy)
    # The domain term acts in the second half; the first is core's, with the control weight as its scale.
    guider = internals.in_domain_guider(
        tiny.prior(0), tiny.prior(1), tiny.conditioning(1), tiny.conditioning(2), 1.0, 2.5, domain_start_percent=0.5
    )
    tiny.sample(guider, steps=4, scheduler="sgm_uniform")
    assert scales == [2.5, 2.5] and guider.evaluations == {"base": 4, "control": 4, "domain": 2}
