"""Low-rank additions by themselves; files against ComfyUI are in tests/comfyui/test_training_low_rank.py."""

from __future__ import annotations

import copy

import torch
from indomain_guidance.guidance.files import lora
from indomain_guidance.guidance.networks import low_rank
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig

CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    transformer_depth=(1, 1),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 1),
    context_dim=24,
    num_heads=4,
)


def test_equals_its_formula_and_merges_exactly():
    linear = torch.nn.Linear(6, 4)
    network = torch.nn.ModuleDict({"one": copy.deepcopy(linear)})
    assert low_rank.add_low_rank(network, 2, layers="linear") == ["one"]
    (layer,) = low_rank.low_rank_layers(network).values()
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), linear(x))  # nothing before the first step
    assert float(layer.lora_down.detach().abs().max()) <= 6**-0.5
    with torch.no_grad():
        layer.lora_up.normal_()
    expected = x @ (linear.weight + layer.lora_up @ layer.lora_down).T + linear.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)
    merged = low_rank.merged_weights(network)
    assert list(merged) == ["one.weight", "one.bias"]
    assert torch.allclose(x @ merged["one.weight"].T + merged["one.bias"], expected, atol=1e-6)


def test_every_attention_projection_and_nothing_else():
    unet = UNet(CONFIG)
    names = set(dict(unet.named_modules()))
    layers = low_rank.add_low_rank(unet, 4)
    assert len(layers) == 7 * 8  # 7 transformers, two attentions of four projections each
    assert all(".attn1.to_" in name or ".attn2.to_" in name for name in layers)
    assert set(low_rank.low_rank_layers(unet)) == set(layers) and set(dict(unet.named_modules())) == names


def test_gradients_reach_the_additions_only():
    unet = UNet(CONFIG)
    torch.nn.init.normal_(unet.out[2].weight)
    unet.requires_grad_(False)
    low_rank.add_low_rank(unet, 4)
    unet(torch.randn(1, 4, 8, 8), torch.tensor([3.0]), context=torch.randn(1, 5, 24)).sum().backward()
    got = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert got == {name for name, _ in unet.named_parameters() if ".lora_" in name}


def test_names_of_stable_diffusion_1_are_those_of_its_published_loras():
    """Rows of the table that every LoRA of Stable Diffusion 1.x follows."""
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
    assert lora.diffusers_name("input_blocks.1.1.proj_in", config) == "down_blocks.0.attentions.0.proj_in"
    assert lora.diffusers_name("input_blocks.5.1.proj_in", config) == "down_blocks.1.attentions.1.proj_in"
    assert lora.diffusers_name("middle_block.1.proj_in", config) == "mid_block.attentions.0.proj_in"
    assert lora.diffusers_name("output_blocks.3.1.proj_in", config) == "up_blocks.1.attentions.0.proj_in"
    assert lora.diffusers_name("output_blocks.11.1.proj_in", config) == "up_blocks.3.attentions.2.proj_in"
