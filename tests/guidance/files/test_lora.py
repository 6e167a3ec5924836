"""LoRA files: what is written is what was trained, and what does not fit is refused in one sentence."""

from __future__ import annotations

import json
import re

import pytest
import torch
from indomain_guidance.guidance.files import (
    FileProblem,
    add_lora,
    lora_tensors,
    read_lora,
    read_metadata,
    read_state_dict,
    write_safetensors,
)
from indomain_guidance.guidance.files.lora import diffusers_name, holds_lora, lora_name
from indomain_guidance.guidance.networks.low_rank import merged_weights
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.tests.guidance.files.lora_cases import CONFIGS, GOLDEN, inputs, trained, write_lora

DORA = pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
LAYER = "middle_block.1.transformer_blocks.0.attn1.to_q"
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_mid_block_resnets_0_conv1"  # [64, 64, 3, 3]


@pytest.fixture(scope="module")
def weights():
    return trained(CONFIGS["sd1"])[1]


def parts(name: str = NAME, rank: int = 2, out: int = 64, into: tuple[int, ...] = (64,)) -> dict[str, torch.Tensor]:
    """The tensors of one layer in a LoRA file."""
    generator = torch.Generator().manual_seed(5)
    tail = (1,) * len(into[1:])
    return {
        f"{name}.lora_down.weight": torch.randn(rank, *into, generator=generator),
        f"{name}.lora_up.weight": torch.randn(out, rank, *tail, generator=generator),
        f"{name}.alpha": torch.tensor(1.0),
    }


def merged(weights, lora, strength: float = 1.0):
    return add_lora(weights, lora, CONFIGS["sd1"], strength, "some.safetensors")


@FAMILIES
@DORA
def test_a_file_with_the_weights_is_the_trained_network(family, dora, tmp_path):
    config = CONFIGS[family]
    unet, before = trained(config, dora=dora)
    path = write_safetensors(tmp_path / "lora.safetensors", lora_tensors(unet, config), {"note": "x"})
    lora, metadata = read_lora(path)
    assert holds_lora(path) and metadata == {"note": "x"} and set(lora) == set(read_state_dict(path))
    plain = UNet(config).eval()
    plain.load_state_dict(add_lora(before, lora, config))
    with torch.no_grad():
        expected, got = unet(**inputs(config)), plain(**inputs(config))
        plain.load_state_dict(before)
        assert torch.allclose(got, expected, atol=1e-5)
        assert not torch.allclose(plain(**inputs(config)), expected, atol=0.02)


@DORA
@pytest.mark.parametrize("strength", [0, 0.5, 1, -1])
def test_strength_scales_the_difference(dora, strength):
    config = CONFIGS["sd1"]
    unet, before = trained(config, dora=dora)
    copies = {key: value.clone() for key, value in before.items()}
    own = add_lora(before, lora_tensors(unet, config), config, strength)
    full = merged_weights(unet)
    assert list(own) == list(before) and all(torch.equal(before[key], copies[key]) for key in before)
    for key, weight in before.items():
        assert torch.allclose(own[key], weight + strength * (full[key] - weight), atol=1e-6), key
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        narrow = {key: value.to(dtype) for key, value in before.items()}
        assert {value.dtype for value in add_lora(narrow, lora_tensors(unet, config), config).values()} == {dtype}


def test_averages_are_written_in_place_of_the_last_values():
    config = CONFIGS["sd1"]
    unet, before = trained(config, dora=True)
    values = {name: value * 0.9 for name, value in unet.named_parameters() if "lora_" in name or "dora" in name}
    own, expected = add_lora(before, lora_tensors(unet, config, values), config), merged_weights(unet, values)
    assert all(torch.allclose(own[key], expected[key], atol=1e-6) for key in expected)


def test_alpha_over_rank_is_the_scale_and_none_is_one(weights):
    for alpha, scale in ((4.0, 2.0), (1, 0.5), (None, 1.0), (torch.tensor([3]), 1.5)):
        lora = parts()
        del lora[f"{NAME}.alpha"]
        if alpha is not None:
            lora[f"{NAME}.alpha"] = torch.as_tensor(alpha)
        difference = merged(weights, lora)[f"{LAYER}.weight"] - weights[f"{LAYER}.weight"]
        product = lora[f"{NAME}.lora_up.weight"] @ lora[f"{NAME}.lora_down.weight"]
        assert torch.allclose(difference, scale * product, atol=1e-5)


@pytest.mark.parametrize("layer, name, into", [(LAYER, NAME, (64,)), ("", CONVOLUTION, (64, 3, 3))])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_input_and_of_output_channels(weights, layer, name, into, axis):
    """Squares of 64 channels, where nothing but the shape of dora_scale tells which of them it means."""
    key = f"{layer or 'middle_block.0.in_layers.2'}.weight"
    lora = parts(name, into=into)
    expected = merged(weights, lora)[key].double()
    sizes = torch.rand(64) + 0.5
    shape = [1] * expected.ndim
    shape[axis] = 64
    lora[f"{name}.dora_scale"] = sizes.reshape(shape)
    got = merged(weights, lora)[key]
    for channel, size in enumerate(sizes):
        before = expected.select(axis, channel)
        assert torch.allclose(got.select(axis, channel).double(), size * before / before.norm(), atol=1e-6)


def test_both_ways_to_name_a_layer_are_read(weights):
    as_ldm = {key.replace(NAME, "lora_unet_" + LAYER.replace(".", "_")): value for key, value in parts().items()}
    own, other = merged(weights, parts()), merged(weights, as_ldm)
    assert all(torch.equal(own[key], other[key]) for key in own)
    with pytest.raises(FileProblem, match=r"^some.safetensors: expected one addition a layer, found lora_unet_mid"):
        merged(weights, {**parts(), **as_ldm})


def test_text_encoders_are_left_out(weights, tmp_path):
    text = parts("lora_te_text_model_encoder_layers_0_self_attn_q_proj")
    path = write_safetensors(tmp_path / "both.safetensors", {**text, **parts()})
    assert set(read_lora(path)[0]) == set(parts())
    path = write_safetensors(tmp_path / "text.safetensors", text)
    with pytest.raises(FileProblem, match=r"text.safetensors: expected a LoRA for a UNet, found one for text encoders"):
        read_lora(path)


def without(part: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in parts().items() if not key.endswith(part)}


def changed(part: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**parts(), f"{NAME}.{part}": value}


UNFIT = {
    "up missing": (without("up.weight"), "lora_up.weight and lora_down.weight for .*, found one of them"),
    "down missing": (without("down.weight"), "found one of them"),
    "alpha alone": (
        {**parts(), f"{CONVOLUTION}.alpha": torch.tensor(1.0)},
        "for lora_unet_mid_block_resnets.*found neither",
    ),
    "other width": (parts(out=32), r"of the shape \[64, 64\], found \[32, 2\] times \[2, 64\] for"),
    "other input": (parts(into=(768,)), r"found \[64, 2\] times \[2, 768\]"),
    "other ranks": (changed("lora_down.weight", torch.ones(3, 64)), r"found \[64, 2\] times \[3, 64\]"),
    "no rank": (parts(rank=0), r"found \[64, 0\] times \[0, 64\]"),
    "0-d": (changed("lora_up.weight", torch.tensor(1.0)), r"found \[\] times \[2, 64\]"),
    "1-d": (changed("lora_down.weight", torch.ones(128)), r"found \[64, 2\] times \[128\]"),
    "kernel": (parts(into=(64, 3, 3)), r"times \[2, 64, 3, 3\]"),
    "up of a kernel": (
        {**parts(CONVOLUTION, into=(64, 3, 3)), f"{CONVOLUTION}.lora_up.weight": torch.ones(64, 2, 3, 3)},
        r"of the shape \[64, 64, 3, 3\], found \[64, 2, 3, 3\] times",
    ),
    "alpha of two": (changed("alpha", torch.ones(2)), r"one number for .*alpha, found \[2\]"),
    "alpha of none": (changed("alpha", torch.ones(0)), r"one number for .*alpha, found \[0\]"),
    "dora_scale of a number": (changed("dora_scale", torch.ones(())), r"\[1, 64\] or \[64, 1\] for .*, found \[\]"),
    "dora_scale without its axis": (changed("dora_scale", torch.ones(64)), r"dora_scale, found \[64\]"),
    "dora_scale of another width": (changed("dora_scale", torch.ones(1, 32)), r"dora_scale, found \[1, 32\]"),
    "too large": (changed("alpha", torch.tensor(3e38)), "finite weights with .* at strength 1, found NaN or infinity"),
    "a layer of another UNet": (parts("lora_unet_double_blocks_0_img_attn_qkv"), "found 1 for others, such as"),
    "a norm": (parts("lora_unet_mid_block_resnets_0_norm1", out=1), "found 1 for others"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_in_one_sentence(case, weights, tmp_path):
    lora, sentence = UNFIT[case]
    path = write_safetensors(tmp_path / "some.safetensors", lora)
    with pytest.raises(FileProblem, match=r"^some.safetensors: expected .*" + sentence) as raised:
        merged(weights, read_lora(path)[0])
    text = str(raised.value)
    assert text.endswith(".") and "; " in text and len(text) < 500 and text.isprintable()


HADA = {f"{NAME}.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
FOREIGN = {
    "LoHa": (HADA, f"for a UNet in kohya's layout .* found {NAME}.hada"),
    "LoKr": ({f"{NAME}.lokr_w1": torch.ones(2, 2), f"{NAME}.lokr_w2": torch.ones(2, 2)}, "found .*lokr"),
    "CP": ({**parts(), f"{NAME}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "found .*lora_mid"),
    "biases": ({**parts(), f"{NAME}.diff_b": torch.ones(64)}, "found .*diff_b"),
    "PEFT": ({"unet.mid_block.attentions.0.to_q.lora_A.weight": torch.ones(2, 64)}, "found .*lora_A"),
    "LoHa beside LoRA": ({**HADA, **parts(CONVOLUTION, into=(64, 3, 3))}, "found .*hada"),
    "a VAE": ({"decoder.conv_in.weight": torch.ones(1)}, "a LoRA, found an autoencoder"),
    "bytes": (changed("lora_up.weight", torch.ones(64, 2, dtype=torch.int8)), "floating-point numbers, found int8"),
    "complex": (changed("alpha", torch.tensor(1j)), "floating-point numbers, found complex64"),
    "NaN": (changed("lora_up.weight", torch.full((64, 2), float("nan"))), "found NaN or infinity in 128 of the 128"),
    "infinite alpha": (changed("alpha", torch.tensor(float("inf"))), "found NaN or infinity in 1 of the 1 numbers"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_kinds_and_numbers_are_refused_in_one_sentence(case, tmp_path):
    tensors, sentence = FOREIGN[case]
    path = write_safetensors(tmp_path / "some.safetensors", tensors)
    with pytest.raises(FileProblem, match=r"some.safetensors: expected .*" + sentence) as raised:
        read_lora(path)
    assert str(raised.value).count("expected") == 1


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_every_number_format_and_pickles_are_read(dtype, weights, tmp_path):
    lora = {key: value.clamp(-2, 2).to(getattr(torch, dtype)) for key, value in parts().items()}
    path = write_safetensors(tmp_path / "a.safetensors", lora)
    own = merged(weights, read_lora(path)[0])[f"{LAYER}.weight"]
    wide = merged(weights, {key: value.float() for key, value in lora.items()})[f"{LAYER}.weight"]
    assert torch.equal(own, wide)
    if not dtype.startswith("float8"):
        torch.save(lora, tmp_path / "a.pt")
        assert torch.equal(merged(weights, read_lora(tmp_path / "a.pt")[0])[f"{LAYER}.weight"], own)


def test_a_rank_beyond_the_layers_own_is_read(weights):
    lora = parts(rank=5000)
    difference = merged(weights, lora)[f"{LAYER}.weight"] - weights[f"{LAYER}.weight"]
    product = lora[f"{NAME}.lora_up.weight"].double() @ lora[f"{NAME}.lora_down.weight"].double() / 5000
    assert torch.allclose(difference.double(), product, atol=1e-5)


@FAMILIES
def test_names_and_output_are_those_that_diffusers_made_of_our_file(family, tmp_path):
    """A golden of diffusers 0.42.1 (golden/README.md), where tests run without it."""
    config, (unet, before) = CONFIGS[family], trained(CONFIGS[family])
    names = json.loads(read_metadata(GOLDEN)[family])
    layers = [name.removesuffix(".lora_down") for name in unet.state_dict() if name.endswith(".lora_down")]
    assert sorted(diffusers_name(layer, config) for layer in layers) == names and len(names) > 100
    lora, _ = read_lora(write_lora(tmp_path / "lora.safetensors", family))
    plain = UNet(config).eval()
    plain.load_state_dict(add_lora(before, lora, config))
    with torch.no_grad():
        assert torch.allclose(plain(**inputs(config)), read_state_dict(GOLDEN)[family], atol=1e-5)


def test_names_of_the_families_are_those_of_their_published_loras():
    """Rows of the table that every LoRA of Stable Diffusion 1.x follows; SDXL's keep the LDM names."""
    config = UNetConfig(
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=(2, 2, 2, 2),
        transformer_depth=(1, 1, 1, 1, 1, 1, 0, 0),
        transformer_depth_middle=1,
        transformer_depth_output=(1,) * 9 + (0,) * 3,
        context_dim=768,
        num_heads=8,
    )
    rows = {
        "input_blocks.1.1.proj_in": "down_blocks_0_attentions_0_proj_in",
        "input_blocks.5.1.proj_in": "down_blocks_1_attentions_1_proj_in",
        "input_blocks.6.0.op": "down_blocks_1_downsamplers_0_conv",
        "input_blocks.7.0.skip_connection": "down_blocks_2_resnets_0_conv_shortcut",
        "middle_block.1.proj_in": "mid_block_attentions_0_proj_in",
        "middle_block.2.emb_layers.1": "mid_block_resnets_1_time_emb_proj",
        "output_blocks.2.1.conv": "up_blocks_0_upsamplers_0_conv",
        "output_blocks.3.1.proj_in": "up_blocks_1_attentions_0_proj_in",
        "output_blocks.5.2.conv": "up_blocks_1_upsamplers_0_conv",
        "output_blocks.11.1.proj_in": "up_blocks_3_attentions_2_proj_in",
        "input_blocks.0.0": "conv_in",
    }
    assert {layer: lora_name(layer, config) for layer in rows} == {a: f"lora_unet_{b}" for a, b in rows.items()}
    layer = "output_blocks.0.1.transformer_blocks.9.attn2.to_out.0"
    assert lora_name(layer, CONFIGS["sdxl"]) == "lora_unet_" + re.sub(r"\.", "_", layer)
