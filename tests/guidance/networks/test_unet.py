"""The UNet against ComfyUI's on the same weights, and what is read from a state dict."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig, unet_config_from_state_dict
from indomain_guidance.guidance.networks.unet_layers import timestep_embedding

# The published topologies at reduced width (and SDXL's transformers at reduced depth).
SD15 = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=(2, 2, 2, 2),
    transformer_depth=(1, 1, 1, 1, 1, 1, 0, 0),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0),
    context_dim=768,
    num_heads=8,
)
SD21 = replace(
    SD15, model_channels=64, context_dim=1024, num_heads=-1, num_head_channels=64, use_linear_in_transformer=True
)
SDXL = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2, 4),
    num_res_blocks=(2, 2, 2),
    transformer_depth=(0, 0, 1, 1, 3, 3),
    transformer_depth_middle=3,
    transformer_depth_output=(0, 0, 0, 1, 1, 1, 3, 3, 3),
    context_dim=2048,
    num_head_channels=64,
    use_linear_in_transformer=True,
    adm_in_channels=192,
)
DISTILLED = replace(
    SDXL,
    transformer_depth=(0, 0, 1, 1, 2, 1),
    transformer_depth_middle=-1,
    transformer_depth_output=(0, 0, 0, 1, 1, 1, 1, 2, 3),
)
INPAINT = replace(SD15, in_channels=9)
TOPOLOGIES = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "distilled": DISTILLED, "inpaint": INPAINT}
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
FULL_SD15 = replace(SD15, model_channels=320)


def core_unet(core, state_dict, config):
    """ComfyUI's UNet with its own detection of the same keys; only the heads are told to it."""
    detected = core("comfy.model_detection").detect_unet_config(state_dict, "")
    operations = core("comfy.ops").disable_weight_init
    heads = {"num_heads": config.num_heads, "num_head_channels": config.num_head_channels}
    with torch.device("meta"):
        unet = core("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
            **detected, **heads, dtype=torch.float32, operations=operations
        )
    unet.load_state_dict(state_dict, strict=True, assign=True)
    return unet.eval(), detected


def inputs(config, size=(8, 8), batch=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, *size, generator=generator)
    timesteps = torch.tensor([3.0, 981.5])[:batch]
    context = torch.randn(batch, 11, config.context_dim, generator=generator)
    y = None
    if config.adm_in_channels is not None:
        y = torch.randn(batch, config.adm_in_channels, generator=generator)
    return x, timesteps, context, y


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_equals_core(name, core, randomise, relative_error):
    config = TOPOLOGIES[name]
    unet = randomise(UNet(config))
    oracle, _ = core_unet(core, unet.state_dict(), config)
    with torch.no_grad():
        for size in ((8, 8), (11, 6)):
            x, timesteps, context, y = inputs(config, size)
            expected = oracle(x, timesteps, context, y)
            assert relative_error(unet(x, timesteps, context, y), expected) < 1e-4, size
        # and the oracle reacts to every input, so that agreement says something
        assert relative_error(oracle(x, timesteps, context + 1, y), expected) > 1e-3
        assert relative_error(oracle(x, timesteps + 5, context, y), expected) > 1e-3


def overlapping_weights(unet):
    """Random weights cut from a few shared buffers, each at a place of its own: full size at a tenth of the memory."""
    generator, step = torch.Generator().manual_seed(0), 16
    shapes = {key: parameter.shape for key, parameter in unet.state_dict().items()}
    kinds = {key: shape[1:].numel() if len(shape) > 1 else f"1-d {key[-6:]}" for key, shape in shapes.items()}
    buffers, weights = {}, {}
    for kind in dict.fromkeys(kinds.values()):  # in order, so that the seed decides
        size = max(shapes[key].numel() for key in shapes if kinds[key] == kind) + step * len(shapes)
        scale = kind**-0.5 if isinstance(kind, int) else 0.1
        buffers[kind] = torch.empty(size).uniform_(-1.7 * scale, 1.7 * scale, generator=generator)
        buffers[kind] += 1 if kind == "1-d weight" else 0
    for index, (key, shape) in enumerate(shapes.items()):
        weights[key] = buffers[kinds[key]][step * index :][: shape.numel()].view(shape)
    return weights


def test_full_sd15_equals_core(core, relative_error):
    with torch.device("meta"):
        unet = UNet(FULL_SD15)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    weights = overlapping_weights(unet)
    unet.load_state_dict(weights, assign=True)  # one set of numbers for both
    oracle, detected = core_unet(core, weights, FULL_SD15)
    assert core("comfy.supported_models").SD15.matches(detected, weights)
    assert unet_config_from_state_dict(weights) == FULL_SD15
    x, timesteps, context, _ = inputs(FULL_SD15, batch=1)
    with torch.no_grad():
        error = relative_error(unet(x, timesteps, context), oracle(x, timesteps, context))
    del weights, unet, oracle
    gc.collect()
    assert error < 1e-4


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_config_is_read_from_weights(name, core):
    config = TOPOLOGIES[name]
    with torch.device("meta"):
        state_dict = UNet(config).state_dict()
    found = unet_config_from_state_dict(state_dict, num_heads=config.num_heads if config.num_heads > 0 else None)
    assert found == config
    detected = core("comfy.model_detection").detect_unet_config(state_dict, "")
    for field, value in found.to_dict().items():
        if field in detected:
            assert detected[field] == value, field


@pytest.mark.parametrize("null_text", ["constant", "cached"])
@pytest.mark.parametrize(
    "config",
    [FULL_SD15, replace(SD21, model_channels=320), replace(SDXL, model_channels=320, adm_in_channels=2816)],
    ids=["sd15", "sd21", "sdxl"],
)
def test_config_of_text_free_weights(config, null_text):
    config = replace(config, null_text=null_text)
    with torch.device("meta"):
        state_dict = UNet(config).state_dict()
    assert unet_config_from_state_dict(state_dict) == config


def test_config_json_round_trip():
    assert UNetConfig.from_json(SDXL.to_json()) == SDXL
    with pytest.raises(ValueError, match="unknown fields depth"):
        UNetConfig.from_dict({**SDXL.to_dict(), "depth": 1})
    with pytest.raises(ValueError, match="incomplete"):
        UNetConfig.from_dict({"model_channels": 64})


@pytest.mark.parametrize("config", [FULL_SD15], ids=["sd15"])
def test_text_parameters_of_sd15(config):
    """44.0 M of 859.5 M parameters belong to cross-attention and its norm; `constant` saves them all."""
    counts = {}
    for form in ("none", "constant", "cached"):
        with torch.device("meta"):
            unet = UNet(replace(config, null_text=form))
        counts[form] = sum(parameter.numel() for parameter in unet.parameters())
    assert round((counts["none"] - counts["constant"]) / 1e6, 1) == 44.0
    assert round(counts["none"] / 1e6, 1) == 859.5
    assert round(1 - counts["constant"] / counts["none"], 3) == 0.051
    assert round(1 - counts["cached"] / counts["none"], 3) == 0.020


def test_text_parameters_of_sdxl():
    """545.8 M, 21 % of SDXL, in 70 blocks."""
    config = replace(
        SDXL,
        model_channels=320,
        transformer_depth=(0, 0, 2, 2, 10, 10),
        transformer_depth_middle=10,
        transformer_depth_output=(0, 0, 0, 2, 2, 2, 10, 10, 10),
        adm_in_channels=2816,
    )
    with torch.device("meta"):
        full, constant = UNet(config), UNet(replace(config, null_text="constant"))
    count, kept = (sum(parameter.numel() for parameter in unet.parameters()) for unet in (full, constant))
    assert sum(name.endswith("attn2") for name, _ in full.named_modules()) == 70
    assert round((count - kept) / 1e6, 1) == 545.8
    assert round(1 - kept / count, 2) == 0.21


@pytest.mark.parametrize("null_text", ["constant", "cached"])
def test_text_free_ignores_context(null_text, randomise):
    unet = randomise(UNet(replace(SMALL, null_text=null_text)))
    x, timesteps, context, _ = inputs(SMALL)
    with torch.no_grad():
        assert torch.equal(unet(x, timesteps), unet(x, timesteps, context))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_conditionings_in_single(dtype, randomise, relative_error):
    config = replace(SMALL, adm_in_channels=24)
    unet = randomise(UNet(config))
    x, timesteps, context, y = inputs(config)
    with torch.no_grad():
        expected = unet(x, timesteps, context[:1].expand(2, -1, -1), y)
        half = unet.to(dtype)(x.to(dtype), timesteps, context[:1], y)
    assert half.dtype == dtype and relative_error(half, expected) < 10 * torch.finfo(dtype).eps


def test_born_silent_and_trains():
    """Every residual branch and the output start at zero (as in LDM), and every parameter then receives a gradient."""
    torch.manual_seed(0)
    unet = UNet(SMALL)
    x, timesteps, context, _ = inputs(SMALL)
    assert torch.equal(unet(x, timesteps, context), torch.zeros_like(x))
    optimiser = torch.optim.SGD(unet.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (unet(x, timesteps, context) - x).square().mean().backward()
        optimiser.step()
    silent = [name for name, parameter in unet.named_parameters() if not parameter.grad.any()]
    assert not silent


@pytest.mark.parametrize("null_text", ["none", "constant", "cached"])
def test_gradient_checkpointing_changes_nothing(null_text, randomise):
    unet = randomise(UNet(replace(SMALL, null_text=null_text)))
    x, timesteps, context, _ = inputs(SMALL)
    gradients = []
    for unet.gradient_checkpointing in (False, True):
        unet.zero_grad()
        unet(x, timesteps, context).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients))


def test_channels_last_changes_nothing(randomise, relative_error):
    unet = randomise(UNet(SMALL))
    x, timesteps, context, _ = inputs(SMALL)
    with torch.no_grad():
        expected = unet(x, timesteps, context)
        unet = unet.to(memory_format=torch.channels_last)
        assert relative_error(unet(x.to(memory_format=torch.channels_last), timesteps, context), expected) < 1e-5


def test_timestep_embedding_equals_core(core):
    timesteps = torch.tensor([0.0, 1.0, 500.25, 999.0])
    oracle = core("comfy.ldm.modules.diffusionmodules.util").timestep_embedding
    for dim in (32, 33):
        assert torch.allclose(timestep_embedding(timesteps, dim), oracle(timesteps, dim, repeat_only=False), atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, r"expected a latent \[B, 4, H, W\], got \[2, 3, 8, 8\]"),
        ({"timesteps": torch.zeros(3)}, "expected 2 timesteps"),
        ({"context": None}, r"expected encoded text \[2, T, 48\], got none"),
        ({"context": torch.zeros(3, 5, 48)}, r"expected encoded text \[2, T, 48\], got \[3, 5, 48\]"),
        ({"context": torch.zeros(2, 5, 32)}, r"got \[2, 5, 32\]"),
        ({"y": torch.zeros(2, 7)}, "vector conditioning y of none"),
    ],
)
def test_refuses_wrong_inputs(change, message):
    x, timesteps, context, _ = inputs(SMALL)
    arguments = {"x": x, "timesteps": timesteps, "context": context} | change
    with pytest.raises(ValueError, match=message):
        UNet(SMALL)(**arguments)


def test_refuses_state_dicts_it_cannot_read():
    state_dict = UNet(SMALL).state_dict()
    with pytest.raises(ValueError, match="input_blocks.0.0.weight is missing"):
        unet_config_from_state_dict({})
    with pytest.raises(ValueError, match="give its attention heads"):
        unet_config_from_state_dict(state_dict)
    reads_text = dict(state_dict)
    for key in state_dict:
        if "attn1.to_k" in key:
            reads_text[key] = torch.zeros(len(state_dict[key]), 48)
    with pytest.raises(ValueError, match="disable_self_attentions"):
        unet_config_from_state_dict(reads_text, num_heads=4)
    lost = "middle_block.1.transformer_blocks.0.attn2"
    mixed = {key: value for key, value in state_dict.items() if not key.startswith(lost)}
    with pytest.raises(ValueError, match="some do not"):
        unet_config_from_state_dict(mixed, num_heads=4)


def test_refuses_impossible_configurations():
    for change, message in (
        ({"num_head_channels": 8}, "exactly one of"),
        ({"num_res_blocks": (1,)}, "levels"),
        ({"transformer_depth": (1,)}, "transformer depths"),
        ({"null_text": "frozen"}, "null_text must be one of"),
        ({"context_dim": 0}, "context_dim must be a whole number from 1 or none, got 0"),
        ({"model_channels": -320}, "model_channels must be a whole number from 1, got -320"),
        ({"channel_mult": (1, 0)}, r"channel_mult must be a list of whole numbers from 1, got \(1, 0\)"),
        ({"context_dim": None}, "needs context_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **change)
    with pytest.raises(ValueError, match="cannot be split into heads"):
        UNet(replace(SMALL, num_heads=5))
