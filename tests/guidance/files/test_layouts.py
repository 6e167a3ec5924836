"""Checkpoint layouts, against ComfyUI's own splitting of the same keys."""

from __future__ import annotations

import re

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, check_unet, strip_unet_prefix, unet_layout
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    transformer_depth=(1, 1),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 1),
    context_dim=48,
    num_heads=4,
)
VAE = {"encoder.conv_in.weight": torch.zeros(1), "decoder.conv_in.weight": torch.ones(1)}


def unet():
    torch.manual_seed(0)
    return UNet(SMALL).state_dict()


def under(prefix, tensors):
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_splits_what_core_splits(core):
    """ComfyUI's detection of the prefix agrees for checkpoints and for bare UNets."""
    prefix_of = core("comfy.model_detection").unet_prefix_from_state_dict
    own = unet()
    for prefix in ("model.diffusion_model.", ""):
        checkpoint = {**under(prefix, own), **under("first_stage_model.", VAE)}
        if prefix:
            assert prefix_of(checkpoint) == prefix
        assert equal(strip_unet_prefix(checkpoint), own)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_layouts_of_unets(prefix):
    keys = list(unet())
    renamed = {"attn2.to_k.weight": "attn2.null_k", "attn2.to_v.weight": "attn2.null_v"}
    cached = [re.sub(r"attn2\.to_[kv]\.weight", lambda match: renamed[match[0]], key) for key in keys]
    constant = [key for key in keys if "attn2" not in key and "norm2" not in key]
    for expected, layout in (("full", keys), ("cached", cached), ("constant", constant)):
        assert unet_layout([prefix + key for key in layout], "x") == expected
    assert unet_layout(under(prefix, unet()) | under("first_stage_model.", VAE), "x") == "full"


@pytest.mark.parametrize(
    "keys, found",
    [
        (["lora_unet_input_blocks_1_1_proj_in.lora_up.weight"], "a LoRA"),
        (["double_blocks.0.img_attn.qkv.weight"], "a Flux model"),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], "a Stable Diffusion 3 model"),
        (["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", "conv_in.weight"], "diffusers' layout"),
        (["input_blocks.0.0.weight", "input_hint_block.0.weight", "middle_block.0.in_layers.0.weight"], "a ControlNet"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder"),
        (["encoder.down.0.block.0.conv1.weight"], "an autoencoder"),
        (["head.weight"], "tensors such as head.weight"),
        ([], "no tensors"),
    ],
)
def test_other_families_are_named(keys, found):
    with pytest.raises(FileProblem, match=f"file.pt: expected a Stable Diffusion UNet.*found .*{found}"):
        unet_layout(keys, "file.pt")


def test_video_unets_are_refused():
    with pytest.raises(FileProblem, match="found a video UNet"):
        unet_layout([*unet(), "input_blocks.1.1.time_stack.0.attn1.to_q.weight"], "x")


def test_check_unet():
    state_dict = unet()
    check_unet(state_dict, SMALL, "x")
    total = len(state_dict)
    message = f"expected the {total} tensors of its architecture, found missing out.2.bias"
    with pytest.raises(FileProblem, match=message):
        check_unet({key: tensor for key, tensor in state_dict.items() if key != "out.2.bias"}, SMALL, "x")
    with pytest.raises(FileProblem, match="found unexpected extra"):
        check_unet({**state_dict, "extra": torch.zeros(1)}, SMALL, "x")
    with pytest.raises(FileProblem, match=r"expected out.2.bias of the shape \[4\], found \[3\]"):
        check_unet({**state_dict, "out.2.bias": torch.zeros(3)}, SMALL, "x")
