"""Blends of two generators against the weights' closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.networks.blending import blend_generators, blend_parts, resolution_split
from indomain_guidance.guidance.networks.stylegan2 import random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig

CONFIG = GeneratorConfig(16, (6, 5, 4), z_dim=5, w_dim=7, mapping_layers=2, architecture="resnet", c_dim=2)


@pytest.fixture
def pair():
    return random_generator(CONFIG, 0), random_generator(CONFIG, 1)


def copies(generator):
    return {key: value.clone() for key, value in generator.state_dict().items()}


def test_the_ends_are_the_generators(pair):
    a, b = pair
    before = copies(a), copies(b)
    for amount, end in ((0.0, a), (1.0, b)):
        blend = blend_generators(a, b, amount)
        assert all(torch.equal(value, end.state_dict()[key]) for key, value in blend.state_dict().items())
        z, c = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.eye(2)
        with torch.no_grad():
            assert torch.equal(blend(z, c), end(z, c))
        assert not blend.training and not any(parameter.requires_grad for parameter in blend.parameters())
        with torch.no_grad():
            blend.synthesis.b4.const.add_(1)  # its weights are its own
    for generator, state in zip(pair, before):
        assert all(torch.equal(value, state[key]) for key, value in generator.state_dict().items())


@pytest.mark.parametrize("amount", [0.3, 1.5, -0.5])
def test_between_lies_the_mixture_of_weights(pair, amount):
    a, b = pair
    blend = blend_generators(a, b, amount).state_dict()
    for key, own in a.state_dict().items():
        if not key.endswith("noise_const"):
            expected = own.double() + amount * (b.state_dict()[key].double() - own.double())
            torch.testing.assert_close(blend[key].double(), expected, rtol=1e-5, atol=1e-4)


def test_constant_noise_keeps_its_spread(pair):
    a, b = pair
    blend = blend_generators(a, b, 0.5)
    plain, kept = 0.0, 0.0
    for name in ("b8.conv0", "b16.conv0", "b16.conv1"):
        own, other, mixed = (g.get_submodule(f"synthesis.{name}").noise_const for g in (a, b, blend))
        expected = (own.square().mean().sqrt() + other.square().mean().sqrt()) / 2
        torch.testing.assert_close(mixed.square().mean().sqrt(), expected)
        kept, plain = kept + float(expected), plain + float(((own + other) / 2).square().mean().sqrt())
    assert plain < 0.8 * kept  # what a mean of different noises loses
    adapted = random_generator(CONFIG, 1)
    adapted.load_state_dict({**b.state_dict(), **{k: v for k, v in a.state_dict().items() if "noise_const" in k}})
    same = blend_generators(a, adapted, 0.5).synthesis.b16.conv1.noise_const
    torch.testing.assert_close(same, a.synthesis.b16.conv1.noise_const)


def test_parts_cover_every_tensor_once(pair):
    a, b = pair
    changed = {}
    for part in blend_parts(a):
        state = blend_generators(a, b, {part: 1.0}).state_dict()
        for key, value in state.items():
            if not torch.equal(value, a.state_dict()[key]):
                assert key not in changed
                changed[key] = part
    differing = {key for key, value in a.state_dict().items() if not torch.equal(value, b.state_dict()[key])}
    assert set(changed) == differing
    assert changed["mapping.embed.weight"] == "mapping" and changed["synthesis.b8.skip.weight"] == "b8.skip"
    assert changed["synthesis.b16.conv0.weight"] == "b16.conv0" and changed["synthesis.b4.const"] == "b4.const"


def test_resolution_split_takes_coarse_from_one_and_fine_from_the_other(pair):
    a, b = pair
    amounts = resolution_split(a, 8, below=1.0, above=0.0)
    assert set(amounts) == set(blend_parts(a)) and amounts["mapping"] == 1.0
    blend = blend_generators(a, b, amounts)
    assert torch.equal(blend.synthesis.b4.const, b.synthesis.b4.const)
    assert torch.equal(blend.synthesis.b8.conv1.weight, b.synthesis.b8.conv1.weight)
    assert torch.equal(blend.synthesis.b16.conv0.weight, a.synthesis.b16.conv0.weight)
    assert resolution_split(a, 4)["mapping"] == 0.0
    with pytest.raises(ValueError, match=r"\[4, 8, 16\], got 32"):
        resolution_split(a, 32)


def test_half_precision_generators_blend(pair):
    a, b = (generator.bfloat16() for generator in pair)
    blend = blend_generators(a, b, 0.5)
    assert {value.dtype for value in blend.state_dict().values()} == {torch.bfloat16}
    expected = (a.synthesis.b4.const.float() + b.synthesis.b4.const.float()) / 2
    torch.testing.assert_close(blend.synthesis.b4.const, expected.bfloat16())


def test_clamps_take_the_wider_between_the_ends(pair):
    tight, loose = (random_generator(replace(CONFIG, conv_clamp=clamp), 0) for clamp in (10, 256))
    assert blend_generators(tight, loose, 0.5).config.conv_clamp == 256
    assert blend_generators(tight, pair[0], 0.5).config.conv_clamp is None
    assert blend_generators(tight, loose, {"mapping": 1.0}).config.conv_clamp == 256


def test_the_ends_keep_their_own_clamp():
    tight, loose = (random_generator(replace(CONFIG, conv_clamp=clamp), seed) for seed, clamp in enumerate((0.1, 256)))
    z, c = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.eye(2)
    every = dict.fromkeys(blend_parts(tight), 1.0)
    for a, b, amount, end in (
        (tight, loose, 0.0, tight),
        (loose, tight, 1, tight),
        (tight, loose, 1.0, loose),
        (loose, tight, {}, loose),
        (loose, tight, every, tight),
    ):
        blend = blend_generators(a, b, amount)
        assert blend.config.conv_clamp == end.config.conv_clamp
        with torch.no_grad():
            assert torch.equal(blend(z, c), end(z, c))
    with torch.no_grad():  # the clamp matters to these images
        assert not torch.equal(tight(z, c), blend_generators(tight, loose, 1e-9)(z, c))


def test_what_cannot_be_blended_is_refused(pair):
    a, b = pair
    with pytest.raises(ValueError, match="architecture is resnet and skip"):
        blend_generators(a, random_generator(replace(CONFIG, architecture="skip"), 0), 0.5)
    with pytest.raises(ValueError, match="no part b32.conv0; it has mapping, b4.const"):
        blend_generators(a, b, {"b32.conv0": 0.5})
    for amount, shown in ((float("nan"), "nan"), ("half", "'half'"), (None, "None"), ({"mapping": "0.5"}, "'0.5'")):
        with pytest.raises(ValueError, match=f"amount of mapping must be a finite number, got {shown}"):
            blend_generators(a, b, amount)
