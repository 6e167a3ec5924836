"""The CLIP text encoder against ComfyUI's on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.networks.text_encoder import (
    END_TOKEN,
    START_TOKEN,
    TextEncoder,
    TextEncoderConfig,
    empty_prompt_tokens,
    text_encoder_config_from_state_dict,
    text_encoder_from_openclip,
)

CLIP = TextEncoderConfig(width=128, layers=3, heads=2, mlp_width=256, projection_dim=128)
OPENCLIP = replace(CLIP, activation="gelu")
# The architectures of Stable Diffusion's encoders at full size, for parameter counts.
CLIP_L = TextEncoderConfig(width=768, layers=12, heads=12, mlp_width=3072)
CLIP_H = TextEncoderConfig(width=1024, layers=24, heads=16, mlp_width=4096, activation="gelu", projection_dim=1024)
CLIP_G = TextEncoderConfig(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection_dim=1280)


def core_encoder(core, encoder):
    config = encoder.config
    oracle = core("comfy.clip_model").CLIPTextModel(
        {
            "num_hidden_layers": config.layers,
            "hidden_size": config.width,
            "num_attention_heads": config.heads,
            "intermediate_size": config.mlp_width,
            "hidden_act": config.activation,
            "max_position_embeddings": config.max_length,
            "eos_token_id": END_TOKEN,
        },
        torch.float32,
        "cpu",
        core("comfy.ops").disable_weight_init,
    )
    oracle.load_state_dict(encoder.state_dict(), strict=True)
    return oracle.eval()


def prompts(config):
    tokens = torch.cat([empty_prompt_tokens(config), empty_prompt_tokens(config)])
    tokens[1, 1:6] = torch.tensor([320, 736, 1929, 2368, END_TOKEN])
    return tokens


@pytest.mark.parametrize("config", [CLIP, OPENCLIP], ids=["clip", "openclip"])
@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("final_norm", [True, False])
def test_equals_core(config, layer, final_norm, core, randomise, relative_error):
    encoder = randomise(TextEncoder(config))
    oracle = core_encoder(core, encoder)
    tokens = prompts(config)
    with torch.no_grad():
        hidden, pooled = encoder(tokens, layer=layer, final_norm=final_norm)
        last, intermediate, projected, raw = oracle(
            tokens, intermediate_output=layer, final_layer_norm_intermediate=final_norm
        )
        assert relative_error(hidden, intermediate) < 1e-4
        assert relative_error(pooled, projected) < 1e-4
        if layer == -1 and final_norm:
            assert relative_error(hidden, last) < 1e-4
        unprojected = TextEncoder(replace(config, projection_dim=None))
        unprojected.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "text_projection.weight"})
        assert relative_error(unprojected(tokens)[1], raw) < 1e-4


def test_openclip_layout_equals_core(core, randomise, relative_error):
    """An OpenCLIP tower (fused projections, transposed text projection) converted here and by ComfyUI."""
    encoder = randomise(TextEncoder(OPENCLIP))
    own = encoder.state_dict()
    tower = {
        "positional_embedding": own["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": own["text_model.embeddings.token_embedding.weight"],
        "text_projection": own["text_projection.weight"].t().contiguous(),
        "ln_final.weight": own["text_model.final_layer_norm.weight"],
        "ln_final.bias": own["text_model.final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(OPENCLIP.layers):
        source, target = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [own[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tower[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
            tower[f"{target}.attn.out_proj.{kind}"] = own[f"{source}.self_attn.out_proj.{kind}"]
            tower[f"{target}.ln_1.{kind}"] = own[f"{source}.layer_norm1.{kind}"]
            tower[f"{target}.ln_2.{kind}"] = own[f"{source}.layer_norm2.{kind}"]
            tower[f"{target}.mlp.c_fc.{kind}"] = own[f"{source}.mlp.fc1.{kind}"]
            tower[f"{target}.mlp.c_proj.{kind}"] = own[f"{source}.mlp.fc2.{kind}"]
    converted = text_encoder_from_openclip(tower)
    by_core = core("comfy.utils").clip_text_transformers_convert(dict(tower), "", "")
    assert set(converted) == set(by_core) - {"logit_scale"} == set(own)
    assert all(torch.equal(converted[key], by_core[key]) and torch.equal(converted[key], own[key]) for key in converted)
    with pytest.raises(ValueError, match="visual.conv1.weight is unknown"):
        text_encoder_from_openclip({**tower, "visual.conv1.weight": torch.zeros(1)})


def test_empty_prompt_tokens_equal_cores_tokenizers(core):
    pytest.importorskip("transformers")
    for config, tokenizer in (
        (CLIP_L, core("comfy.sd1_clip").SDTokenizer()),
        (CLIP_H, core("comfy.text_encoders.sd2_clip").SD2ClipHTokenizer()),
        (CLIP_G, core("comfy.sdxl_clip").SDXLClipGTokenizer()),
    ):
        expected = [token for token, _ in tokenizer.tokenize_with_weights("")[0]]
        assert empty_prompt_tokens(config)[0].tolist() == expected
    assert empty_prompt_tokens(CLIP, pad=5)[0, :4].tolist() == [START_TOKEN, END_TOKEN, 5, 5]


@pytest.mark.parametrize(
    "config, parameters", [(CLIP_L, 123_060_480), (CLIP_H, 354_032_640), (CLIP_G, 694_659_840)], ids=["l", "h", "g"]
)
def test_config_is_read_from_weights(config, parameters):
    """Parameter counts are those of the published encoders (ViT-H and bigG: OpenCLIP's text towers)."""
    with torch.device("meta"):
        encoder = TextEncoder(config)
    assert text_encoder_config_from_state_dict(encoder.state_dict()) == config
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
    assert TextEncoderConfig.from_dict(config.to_dict()) == config


def test_trains():
    torch.manual_seed(0)
    encoder = TextEncoder(replace(CLIP, vocab_size=50, end_token=9, max_length=12))
    hidden, pooled = encoder(torch.tensor([[1, 2, 9, 9], [3, 9, 9, 9]]))
    assert hidden.shape == (2, 4, 128) and pooled.shape == (2, 128)
    (hidden.square().mean() + pooled.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_the_future_is_masked(randomise):
    encoder = randomise(TextEncoder(replace(CLIP, vocab_size=50)))
    with torch.no_grad():
        one, other = encoder(torch.tensor([[1, 2, 3, 4], [1, 2, 7, 8]]))[0]
    assert torch.allclose(one[:2], other[:2], atol=1e-6) and not torch.allclose(one[2], other[2], atol=1e-3)


def test_refuses_wrong_inputs():
    encoder = TextEncoder(replace(CLIP, vocab_size=50, max_length=12))
    with pytest.raises(ValueError, match="T <= 12"):
        encoder(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        encoder(torch.zeros(1, 12, dtype=torch.long), layer=3)
    with pytest.raises(ValueError, match="token_embedding.weight is missing"):
        text_encoder_config_from_state_dict({})
    with pytest.raises(ValueError, match="cannot be split into 3 heads"):
        replace(CLIP, heads=3)
    with pytest.raises(ValueError, match="activation must be one of"):
        replace(CLIP, activation="relu")
