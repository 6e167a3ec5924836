"""What the trainer makes of a checkpoint against ComfyUI's own modules on the same weights."""

from __future__ import annotations

import importlib

import pytest
import torch
from indomain_guidance.training.prior.opening import open_checkpoint
from indomain_guidance.training.prior.prior import ImageSize

pytestmark = pytest.mark.slow

PROMPTS = ["", "a photo of a cat", "porcelain, 18th century; a very long description, longer than most " * 3]


def core_text(comfyui, family, encoders, prompt):
    """Context and pooled vector of one prompt by core's tokenizers and text models at reduced depth."""
    shrunk = {"num_hidden_layers": 3, "intermediate_size": 64}
    if family == "sdxl":
        module = importlib.import_module("comfy.sdxl_clip")
        model = module.SDXLClipModel(
            dtype=torch.float32, model_options={"clip_l_model_config": shrunk, "clip_g_model_config": shrunk}
        )
        parts, tokenizer = {"clip_l": model.clip_l, "clip_g": model.clip_g}, module.SDXLTokenizer()
    elif family == "sd2":
        module = importlib.import_module("comfy.text_encoders.sd2_clip")
        model = module.SD2ClipModel(dtype=torch.float32, model_options={"clip_h_model_config": shrunk})
        parts, tokenizer = {"clip_h": model.clip_h}, module.SD2Tokenizer()
    else:
        module = importlib.import_module("comfy.sd1_clip")
        model = module.SD1ClipModel(dtype=torch.float32, model_options={"clip_l_model_config": shrunk})
        parts, tokenizer = {"clip_l": model.clip_l}, module.SD1Tokenizer()
    for name, encoder in encoders.items():
        weights = encoder.state_dict()
        width = encoder.config.width
        weights.setdefault("text_projection.weight", torch.eye(width))
        parts[name].transformer.load_state_dict(weights)
    with torch.no_grad():
        return model.encode_token_weights(tokenizer.tokenize_with_weights(prompt))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_encodes_text_as_core_does(family, comfyui, tiny_checkpoint):
    made = tiny_checkpoint(family)
    base = open_checkpoint(made.path, tokenizer=str(comfyui.root / "comfy" / "sd1_tokenizer"), prediction="epsilon")
    encoded = base.encode_text(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        context, pooled = core_text(comfyui, family, made.text_encoders, prompt)[:2]
        assert context.shape == encoded.context[index : index + 1].shape
        assert float((context - encoded.context[index : index + 1]).norm() / context.norm()) < 1e-4
        if family == "sdxl":
            assert float((pooled - encoded.pooled[index : index + 1]).norm() / pooled.norm()) < 1e-4
        if not prompt:
            assert torch.allclose(base.null_context.tensor, context, atol=1e-4)
    assert not torch.allclose(encoded.context[0], encoded.context[1], atol=1e-2)
    assert (encoded.pooled is None) == (family != "sdxl") == (base.null_context.pooled is None)


@pytest.mark.parametrize("family, latent_format", [("sd1", "SD15"), ("sdxl", "SDXL")])
def test_latents_are_cores(family, latent_format, comfyui, tiny_checkpoint):
    """Posterior moments, scaled as core scales them, and the way back."""
    made = tiny_checkpoint(family)
    base = open_checkpoint(made.path)
    images = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = base.encode(images)
    weights = {
        key.removeprefix("first_stage_model."): value.float()
        for key, value in made.tensors.items()
        if key.startswith("first_stage_model.")
    }
    vae = comfyui.sd.VAE(sd=weights, config={"params": base.autoencoder.config.to_ldm_params()}, dtype=torch.float32)
    network, scaling = vae.first_stage_model, getattr(comfyui.latent_formats, latent_format)()
    with torch.no_grad():
        expected, logvar = network.quant_conv(network.encoder(images)).chunk(2, dim=1)
        assert torch.allclose(mean, scaling.process_in(expected), rtol=1e-3, atol=1e-5)
        assert torch.allclose(std, (logvar / 2).exp() * scaling.scale_factor, rtol=1e-3, atol=1e-5)
        decoded = network.decode(scaling.process_out(mean)).clamp(-1, 1)
        assert torch.allclose(base.decode(mean), decoded, atol=1e-4)
    assert mean.shape == (2, 4, 8, 4)


def test_size_vector_is_cores(comfyui, tiny, tiny_checkpoint):
    base = open_checkpoint(tiny_checkpoint("sdxl").path)
    core = tiny.prior(family="SDXL", adm_in_channels=2816, use_linear_in_transformer=True).model
    pooled = torch.randn(1, 1280, generator=torch.Generator().manual_seed(0))
    expected = core.encode_adm(
        pooled_output=pooled, height=700, width=900, crop_h=12, crop_w=34, target_height=512, target_width=640
    )
    found = base.vector([ImageSize((700, 900), (12, 34), (512, 640))], pooled)
    assert torch.allclose(found, expected.float(), atol=1e-5) and found.shape == (1, 2816)
    assert torch.equal(base.vector([ImageSize((700, 900))])[:, :1280], torch.zeros(1, 1280))
