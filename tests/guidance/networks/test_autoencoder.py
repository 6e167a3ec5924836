"""The autoencoder against ComfyUI's on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.networks.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    autoencoder_config_from_state_dict,
    kl_divergence,
)

# Stable Diffusion's topology at a quarter of the width, and others a user or the mini world may have.
CONFIGS = {
    "sd": AutoencoderConfig(ch=32),
    "shallow": AutoencoderConfig(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1),
    "no_attention": AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attention=False),
    "wide_embedding": AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, embed_dim=4),
}


def core_autoencoder(core, autoencoder):
    oracle = core("comfy.ldm.models.autoencoder").AutoencoderKL(**autoencoder.config.to_ldm_params())
    state_dict = autoencoder.state_dict()
    if not autoencoder.config.attention:
        # Core always builds the attention; with an output projection of zero it adds nothing.
        absent = {key: torch.zeros_like(value) for key, value in oracle.state_dict().items() if ".attn_1." in key}
        assert absent and not set(absent) & set(state_dict)
        state_dict |= absent
    oracle.load_state_dict(state_dict, strict=True)
    return oracle.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_core(name, core, randomise, relative_error):
    config = CONFIGS[name]
    autoencoder = randomise(Autoencoder(config))
    oracle = core_autoencoder(core, autoencoder)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 4 * config.factor, 2 * config.factor, generator=generator) * 2 - 1
    latents = torch.randn(2, config.embed_dim, 4, 2, generator=generator)
    with torch.no_grad():
        mean, logvar = autoencoder.encode(images)
        expected_mean, expected_logvar = oracle.quant_conv(oracle.encoder(images)).chunk(2, dim=1)
        assert relative_error(mean, expected_mean) < 1e-4
        assert relative_error(logvar, expected_logvar) < 1e-4
        assert relative_error(mean, oracle.encode(images)) < 1e-4
        assert relative_error(autoencoder.decode(latents), oracle.decode(latents)) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_read_from_weights(name):
    with torch.device("meta"):
        state_dict = Autoencoder(CONFIGS[name]).state_dict()
    assert autoencoder_config_from_state_dict(state_dict) == CONFIGS[name]
    assert AutoencoderConfig.from_dict(CONFIGS[name].to_dict()) == CONFIGS[name]
    with pytest.raises(ValueError, match="LDM autoencoder"):
        autoencoder_config_from_state_dict({key: value for key, value in state_dict.items() if "conv_in" not in key})


def test_full_size_has_the_published_parameters():
    """Stable Diffusion's autoencoder has 83.65 M parameters."""
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig())
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_653_863


def test_kl_divergence_equals_torch():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=generator)
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(kl_divergence(mean, logvar), oracle.flatten(1).sum(1), rtol=1e-5)


@pytest.mark.parametrize("text", ["{", "[1]", '{"ch": 0}', '{"ch_mult": [1], "width": 3}', '{"ch_mult": 4}'], ids=str)
def test_refuses_other_configurations(text):
    with pytest.raises(ValueError, match="Autoencoder configuration"):
        AutoencoderConfig.from_json(text)


@pytest.mark.parametrize("tensors", [{}, {"encoder.conv_in.weight": torch.zeros(3)}], ids=["none", "flat"])
def test_refuses_weights_it_cannot_read(tensors):
    with pytest.raises(ValueError, match="expected the keys of an LDM autoencoder"):
        autoencoder_config_from_state_dict(tensors)


def test_refuses_images_that_do_not_divide():
    autoencoder = Autoencoder(replace(CONFIGS["shallow"]))
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.encode(torch.zeros(1, 3, 64, 60))
