"""Load Mini World: files in the mini world's format as MODEL, CLIP and VAE that equal the library's networks.

The weights are random, in the shipped files' format; what the shipped ones draw is measured by the benchmarks.
"""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

# Rows of the shrunken token embedding: CLIP ids of some words, start and end; one more row stands for all others.
TOKEN_IDS = [320, 736, 5757, 525, 4481, 5994, 49406, 49407]
SCALE = 1.375


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


def randomised(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise = noise / parameter[0].numel() ** 0.5
            else:
                noise = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            parameter.copy_(noise.half())  # as the fp16 files hold it
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["with attention in the autoencoder", "without"])
def world(comfyui, request):
    """Random components in the format of training/mini_world/weights, and library networks of the same weights."""
    unet, text, auto = (module(f"guidance.networks.{name}") for name in ("unet", "text_encoder", "autoencoder"))
    unet_config = unet.UNetConfig(
        model_channels=32,
        channel_mult=(2, 3),
        num_res_blocks=(1, 1),
        transformer_depth=(1, 0),
        transformer_depth_middle=1,
        transformer_depth_output=(1, 1, 0, 0),
        context_dim=48,
        num_heads=4,
    )
    text_config = text.TextEncoderConfig(width=48, layers=2, heads=4, mlp_width=96)
    auto_config = auto.AutoencoderConfig(ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1, attention=request.param)
    prior, encoder = randomised(unet.UNet(unet_config), 0), randomised(text.TextEncoder(text_config), 1)
    autoencoder = randomised(auto.Autoencoder(auto_config), 2)
    table = "text_model.embeddings.token_embedding.weight"
    text_weights = encoder.state_dict()
    rows = torch.randn(len(TOKEN_IDS) + 1, 48, generator=torch.Generator().manual_seed(3)).half().float()
    # The same table written out by hand.
    full = rows[-1].expand(49408, -1).clone()
    for row, token in enumerate(TOKEN_IDS):
        full[token] = rows[row]
    encoder.load_state_dict({**text_weights, table: full})
    components = {
        "prior_unet": (prior.state_dict(), {"config": unet_config.to_json()}),
        "text_encoder": (
            {**text_weights, table: rows},
            {"config": json.dumps(text_config.to_dict()), "token_ids": json.dumps(TOKEN_IDS)},
        ),
        "autoencoder": (
            autoencoder.state_dict(),
            {
                "config": json.dumps(auto_config.to_dict()),
                "scale_factor": str(SCALE),
                "latent_rgb_factors": json.dumps([[0.1, 0.2, 0.3], [0.0, -0.1, 0.2], [0.3, 0.0, 0.0], [0.1, 0.1, 0.1]]),
                "latent_rgb_bias": json.dumps([0.05, 0.0, -0.05]),
            },
        ),
    }
    return SimpleNamespace(
        components=components, prior=prior, encoder=encoder, autoencoder=autoencoder, unet_config=unet_config
    )


@pytest.fixture
def loaded(comfyui, world, monkeypatch):
    """The three outputs of the node, made under inference mode as ComfyUI runs it."""
    loading = module("nodes.comfy_internals.models.loading")
    monkeypatch.setattr(loading, "_mini_world_component", lambda name: world.components[name])
    with torch.inference_mode():
        model, clip, vae = module("nodes.loaders").LoadMiniWorld.execute().result
    return SimpleNamespace(model=model, clip=clip, vae=vae, loading=loading)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def encode(clip, text: str):
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


@torch.inference_mode()
@pytest.mark.parametrize("text", ["", "a red seven", "a red seven on a yellow background, xylophone"])
def test_clip_equals_the_librarys_text_encoder(world, loaded, text):
    (pairs,) = loaded.clip.tokenize(text)["l"]
    tokens = torch.tensor([[int(token) for token, _ in pairs]])
    assert tokens.shape == (1, 77) and tokens[0, 0] == 49406
    hidden, pooled = world.encoder(tokens)
    context, core_pooled = encode(loaded.clip, text)
    assert error(context, hidden) < 1e-4 and error(core_pooled, pooled) < 1e-4


def test_cores_tokenizer_gives_the_ids_that_the_mini_world_was_trained_with(loaded):
    tokens = module("training.mini_world.tokens")
    for text in ("", "a digit", *(f"an {word} on a {word} background" for word in tokens.TOKEN_IDS)):
        (pairs,) = loaded.clip.tokenize(text)["l"]
        assert [int(token) for token, _ in pairs] == tokens.tokenize(text).tolist()


@torch.inference_mode()
def test_unknown_words_are_one_word_and_known_ones_are_not(loaded):
    dog, cat, red = (encode(loaded.clip, text)[0] for text in ("dog", "cat", "red"))
    assert torch.equal(dog, cat)
    seven, _ = encode(loaded.clip, "seven")
    assert not torch.allclose(red, dog, atol=1e-3) and not torch.allclose(red, seven, atol=1e-3)


@torch.inference_mode()
def test_vae_equals_the_librarys_autoencoder(world, loaded):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = loaded.vae.decode(z)
    assert image.shape == (2, 64, 64, 3)
    assert error(image, ((world.autoencoder.decode(z) + 1) / 2).clamp(0, 1).movedim(1, -1)) < 1e-4
    mean, logvar = world.autoencoder.encode(image.movedim(-1, 1) * 2 - 1)
    # Core samples the latent: compare its distribution's mean, which is all that the two can agree on.
    distance = (loaded.vae.encode(image) - mean).abs() / (0.5 * logvar).exp()
    assert float(distance.max()) < 6


@torch.inference_mode()
def test_model_equals_the_librarys_unet(comfyui, world, loaded):
    comfyui.model_management.load_models_gpu([loaded.model])
    x, sigma, context = torch.randn(2, 4, 8, 8) * 3, torch.tensor([3.0, 0.5]), torch.randn(2, 77, 48)
    x0 = loaded.model.model.apply_model(x, sigma, c_crossattn=context)
    schedule = module("guidance.diffusion").NoiseSchedule.scaled_linear()
    expected = module("guidance.diffusion").Denoiser(world.prior, schedule)(x, sigma, context=context)
    assert error(x0, expected) < 1e-4


def test_weights_are_ordinary_tensors(loaded):
    for network in (loaded.model.model, loaded.clip.cond_stage_model, loaded.vae.first_stage_model):
        assert not any(parameter.is_inference() for parameter in network.parameters())


def test_latent_space_is_its_own(comfyui, loaded):
    found = loaded.model.model.latent_format
    assert type(found) not in (comfyui.latent_formats.SD15, comfyui.latent_formats.SDXL)
    assert found.scale_factor == SCALE and found.process_in(torch.ones(1)).item() == SCALE
    assert found.process_out(found.process_in(torch.tensor([0.7]))).item() == pytest.approx(0.7)


@torch.inference_mode()
def test_live_preview_draws_the_latent(comfyui, loaded, monkeypatch):
    preview = comfyui.latent_preview
    monkeypatch.setattr(preview.args, "preview_method", preview.LatentPreviewMethod.Latent2RGB)
    previewer = preview.get_previewer(torch.device("cpu"), loaded.model.model.latent_format)
    z = torch.randn(1, 4, 8, 8)
    picture = previewer.decode_latent_to_preview(z)
    factors = torch.tensor(loaded.model.model.latent_format.latent_rgb_factors)
    expected = torch.einsum("chw,cr->hwr", z[0], factors) + torch.tensor([0.05, 0.0, -0.05])
    expected = (((expected + 1) / 2).clamp(0, 1) * 255).byte()
    shown = torch.from_numpy(np.array(picture)).int()
    assert int((shown - expected).abs().max()) <= 1


@torch.inference_mode()
def test_a_prompt_becomes_an_image(comfyui, world, loaded):
    """The whole way through core's own nodes, twice the same."""
    positive, negative = ([[encode(loaded.clip, text)[0], {}]] for text in ("a red seven", ""))
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    images = []
    for _ in range(2):
        (out,) = comfyui.nodes.common_ksampler(loaded.model, 3, 3, 1.5, "euler", "normal", positive, negative, latent)
        images.append(loaded.vae.decode(out["samples"]))
    assert images[0].shape == (2, 64, 64, 3) and bool(images[0].isfinite().all())
    assert torch.equal(images[0], images[1])


@torch.inference_mode()
def test_its_domain_models_share_its_latent_space(comfyui, world, loaded, tmp_path):
    files, null_text = module("guidance.files"), module("guidance.null_text")
    context = null_text.NullContext(torch.randn(1, 77, 48))
    weights, config = null_text.build_cached(world.prior.state_dict(), world.unet_config, context)
    path = tmp_path / "domain.safetensors"
    files.write_domain_file(path, weights, files.DomainMetadata(config, "mini_world", "epsilon"))
    domain = loaded.loading.load_domain_unet(str(path))
    mine, other = domain.model.latent_format, loaded.model.model.latent_format
    assert type(mine) is type(other) and vars(mine) == vars(other)


def test_damaged_components_are_named(world, loaded, monkeypatch):
    weights, metadata = world.components["text_encoder"]
    short = {key: value for key, value in weights.items() if "layers.1.mlp.fc1.bias" not in key}
    broken = {**world.components, "text_encoder": (short, metadata)}
    monkeypatch.setattr(loaded.loading, "_mini_world_component", lambda name: broken[name])
    with pytest.raises(ValueError, match=r"text encoder.*1 weights are missing.*fc1\.bias"):
        loaded.loading.load_mini_world()
