"""Low-rank additions against their formulas written out; LoRA files are in tests/guidance/files/test_lora.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from indomain_guidance.guidance.errors import Problem
from indomain_guidance.guidance.networks import low_rank
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from torch import nn

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
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (2, 6, 5, 7)),
    "3x3": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 7)),
    "strided": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 8, 7)),
    "reflected and dilated": (lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (2, 6, 8, 7)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)
DORA = pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])


def changed(network: nn.Module, spread: float = 0.3) -> nn.Module:
    """The network with additions as after some steps."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in low_rank.low_rank_layers(network).values():
            layer.lora_up.normal_(generator=generator).mul_(spread)
            if layer.dora_scale is not None:
                layer.dora_scale.mul_(1 + spread * torch.rand(layer.dora_scale.shape, generator=generator))
    return network


def one_layer(kind: str, dora: bool, rank: int = 2, scale: float = 0.5):
    """(a layer with an addition, the same layer without, an input)."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    plain = make()
    network = nn.ModuleDict({"one": copy.deepcopy(plain)})
    assert low_rank.add_low_rank(network, rank, layers="all", scale=scale, dora=dora) == ["one"]
    return network["one"], plain, torch.randn(shape)


def weight_by_hand(layer, detached: bool = True) -> torch.Tensor:
    """V = W + scale B A, and with DoRA each input channel's m V / ||V||. detached: the norm has no gradient."""
    weight = layer.weight + layer.scale * torch.einsum(
        "or,r...->o...", layer.lora_up.flatten(1), layer.lora_down
    ).reshape(layer.weight.shape)
    if layer.dora_scale is None:
        return weight
    channels = []
    for channel, m in zip(weight.unbind(1), layer.dora_scale.flatten()):
        norm = channel.square().sum().sqrt()
        channels.append(m * channel / (norm.detach() if detached else norm))
    return torch.stack(channels, 1)


def applied(plain: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(plain, {"weight": weight}, (x,))


@KINDS
@DORA
def test_layers_follow_the_formula(kind, dora):
    layer, plain, x = one_layer(kind, dora)
    assert torch.equal(layer(x), plain(x))  # nothing before the first step
    assert 0 < float(layer.lora_down.detach().abs().max()) <= plain.weight[0].numel() ** -0.5
    changed(layer)
    expected = applied(plain, weight_by_hand(layer), x)
    assert torch.allclose(layer(x), expected, atol=2e-6)
    assert not torch.allclose(plain(x), expected, atol=0.05)
    if dora:
        assert torch.allclose(weight_by_hand(layer).transpose(0, 1).flatten(1).norm(dim=1), layer.dora_scale.flatten())


@KINDS
@DORA
def test_merged_weights_are_the_layer(kind, dora):
    layer, plain, x = one_layer(kind, dora)
    network = nn.ModuleDict({"one": changed(layer)})
    merged = low_rank.merged_weights(network)
    assert list(merged) == [f"one.{key}" for key in plain.state_dict()]
    plain.load_state_dict({key.removeprefix("one."): value for key, value in merged.items()})
    assert torch.allclose(plain(x), layer(x), atol=2e-6)
    values = {f"one.{name}": value * 0.5 for name, value in layer.named_parameters() if "lora_" in name}
    half = low_rank.merged_weights(network, values)["one.weight"]
    with torch.no_grad():
        layer.lora_up *= 0.5
        layer.lora_down *= 0.5
    assert torch.allclose(half, weight_by_hand(layer), atol=1e-6) and not torch.allclose(half, merged["one.weight"])


@KINDS
def test_gradients_of_dora_take_the_norm_as_constant(kind):
    layer, plain, x = one_layer(kind, True)
    changed(layer)
    parameters = (layer.lora_up, layer.lora_down, layer.dora_scale)
    direction = torch.randn_like(plain(x))
    own = torch.autograd.grad((layer(x) * direction).sum(), parameters)
    by_hand = (applied(plain, weight_by_hand(layer, detached), x) for detached in (True, False))
    expected, with_norm = (torch.autograd.grad((y * direction).sum(), parameters) for y in by_hand)
    for mine, theirs in zip(own, expected):
        assert torch.allclose(mine, theirs, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(own[0], with_norm[0], atol=1e-3)  # the comparison can fail


def test_dora_is_exact_under_autocast_before_the_first_step():
    layer, plain, x = one_layer("linear", True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    changed(layer)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x).float()
    expected = applied(plain, weight_by_hand(layer), x)
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


def test_formats_and_ranks_are_those_of_the_layer():
    network = nn.ModuleDict({"one": nn.Linear(6, 4).half(), "two": nn.Conv2d(2, 40, 3), "channel": nn.Linear(3, 5)})
    with torch.no_grad():
        network["channel"].weight[:, 1] = 0  # a channel without a direction
    low_rank.add_low_rank(network, 100, layers="all", dora=True)
    assert [layer.rank for layer in low_rank.low_rank_layers(network).values()] == [4, 18, 3]
    assert network["one"].lora_up.dtype is torch.float32
    merged = low_rank.merged_weights(network)
    assert merged["one.weight"].dtype is torch.float16
    assert all(bool(value.isfinite().all()) for value in merged.values())
    assert torch.equal(merged["channel.weight"][:, 1], torch.zeros(5))


@pytest.mark.parametrize(
    "layers, count",
    [
        ("attention", 7 * 8),  # 7 transformers, two attentions of four projections each
        ("linear", 7 * 10 + 8 + 2),  # and feed-forward layers, 8 blocks' timesteps, the embedding of timesteps
        ("convolution", 7 * 2 + 8 * 2 + 5 + 2 + 2),  # around transformers, in blocks, shortcuts, sizes, in and out
        ("blocks", 7 * 12 + 8 * 3 + 5 + 2),
        ("all", 7 * 12 + 8 * 3 + 5 + 2 + 4),
        ("*.attn1.*", 7 * 4),
        (" *.attn1.to_q , *.attn1.to_k\n", 7 * 2),
        ("attention attention *.attn2.*", 7 * 8),
        ("input_blocks.0.*,out.2", 2),
        ("middle_block.1.transformer_blocks.0.ff.net.[02]*", 2),
    ],
)
def test_layers_by_word_and_pattern(layers, count):
    unet = UNet(CONFIG)
    names, order = set(dict(unet.named_modules())), list(dict(unet.named_modules()))
    chosen = low_rank.add_low_rank(unet, 4, layers=layers)
    assert len(chosen) == count and chosen == sorted(chosen, key=order.index)
    assert list(low_rank.low_rank_layers(unet)) == chosen and set(dict(unet.named_modules())) == names


def test_blocks_are_all_but_the_ends_and_the_embeddings():
    unet = UNet(CONFIG)
    everything, blocks = (set(low_rank.matching_layers(unet, word)) for word in ("all", "blocks"))
    assert everything - blocks == {"input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2"}


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"layers": "input_blocks.1.1.norm"}, "'input_blocks.1.1.norm' to name linear layers .*, which takes none"),
        ({"layers": "attention *.attn3.*"}, r"expected '\*.attn3.\*' to name .* found none; use attention, linear"),
        ({"layers": ""}, "expected '' to name linear layers"),
        ({"layers": "Attention"}, "expected 'Attention' to name"),
        ({"rank": 0}, "rank of at least 1, got 0"),
        ({"rank": -3}, "rank of at least 1, got -3"),
        ({"scale": 0.0}, "scale other than 0"),
        ({"scale": float("nan")}, "scale other than 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(wrong, sentence):
    unet = UNet(CONFIG)
    with pytest.raises(Problem, match=sentence):
        low_rank.add_low_rank(unet, **{"rank": 2, **wrong})
    assert not low_rank.low_rank_layers(unet)


def test_a_layer_gets_one_addition_and_grouped_convolutions_none():
    unet = UNet(CONFIG)
    low_rank.add_low_rank(unet, 2)
    with pytest.raises(Problem, match=r"layers without an addition, found one on input_blocks.1.1.transformer"):
        low_rank.add_low_rank(unet, 2, layers="linear")
    low_rank.add_low_rank(unet, 2, layers="convolution")
    assert len(low_rank.low_rank_layers(unet)) == 7 * 8 + 39
    with pytest.raises(Problem, match="found 0, which takes none"):
        low_rank.add_low_rank(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), 1, layers="0")


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    return {"x": x, "timesteps": torch.tensor([3.0, 700.0]), "context": context}


@DORA
def test_a_whole_unet_is_its_merged_weights(randomise, dora):
    unet, plain = randomise(UNet(CONFIG)), UNet(CONFIG).eval()
    before = unet(**inputs())
    low_rank.add_low_rank(unet, 4, layers="all", dora=dora)
    assert torch.equal(unet(**inputs()), before)
    changed(unet)
    plain.load_state_dict(low_rank.merged_weights(unet))
    with torch.no_grad():
        assert torch.allclose(unet(**inputs()), plain(**inputs()), atol=1e-5)
        assert not torch.allclose(unet(**inputs()), before, atol=0.1)


def test_without_additions_is_the_network_before_also_nested_and_after_an_error(randomise):
    unet = randomise(UNet(CONFIG))
    before = unet(**inputs())
    low_rank.add_low_rank(unet, 4, layers="all", dora=True)
    after = changed(unet)(**inputs())
    with low_rank.without_additions(unet):
        assert torch.equal(unet(**inputs()), before)
        with low_rank.without_additions(unet):
            assert torch.equal(unet(**inputs()), before)
        assert torch.equal(unet(**inputs()), before)
    assert torch.equal(unet(**inputs()), after)
    with pytest.raises(KeyError), low_rank.without_additions(unet):
        raise KeyError
    assert torch.equal(unet(**inputs()), after) and not torch.allclose(after, before, atol=0.1)


@DORA
def test_gradients_reach_the_additions_alone_whatever_the_checkpointing(randomise, dora):
    """A step of baking: the target is what the network says without its additions."""
    unet = randomise(UNet(CONFIG)).train().requires_grad_(False)
    low_rank.add_low_rank(unet, 4, layers="all", dora=dora)
    added = {name for name, _ in unet.named_parameters() if low_rank.ADDED.fullmatch(name)}
    changed(unet)
    seen = {}
    for checkpointing in (False, True):
        unet.gradient_checkpointing = checkpointing
        unet.zero_grad()
        output = unet(**inputs())
        with torch.no_grad(), low_rank.without_additions(unet):
            target = 2 * unet(**inputs())
        F.mse_loss(output, target).backward()
        seen[checkpointing] = {name: one.grad for name, one in unet.named_parameters() if one.grad is not None}
    assert set(seen[False]) == set(seen[True]) == added and len(added) == (3 if dora else 2) * 119
    for name, gradient in seen[False].items():
        assert torch.allclose(gradient, seen[True][name], atol=1e-7) and bool(gradient.any()), name
