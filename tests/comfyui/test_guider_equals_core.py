"""Where multi-guidance reduces to something core can do, it must be core, most of it to the last bit."""

from __future__ import annotations

import pytest
import torch

SAMPLERS = ["euler", "dpmpp_2m", "euler_cfg_pp", "dpmpp_2m_sde"]


def k_sampler(comfyui, model, positive, negative, latent, cfg, sampler, denoise):
    (out,) = comfyui.nodes.common_ksampler(model, 7, 4, cfg, sampler, "karras", positive, negative, latent, denoise=denoise)
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
        node = guiders.InDomainSampler.execute(
            prior, domain, positive, negative, latent, 7, 4, sampler, "karras", 0.0, control_weight, denoise
        )
        (result,) = node.result
        assert torch.equal(result["samples"], expected["samples"])
        assert expected["samples"].abs().max() > 0.1
        assert {key for key in result} == {key for key in expected}
