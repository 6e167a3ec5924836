"""What a StyleGAN2 configuration accepts, and how it is read from weights with their filters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from indomain_guidance.guidance.networks.stylegan2 import StyleGAN2, random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig, generator_config_from_state_dict
from indomain_guidance.guidance.networks.stylegan2_formulas import fir_kernel
from indomain_guidance.tests.guidance.networks.stylegan2_cases import CASES, TINY, Largest, error, loaded, weights


@pytest.mark.parametrize("case", ["nvidia skip 32", "nvidia resnet 64", "nvidia orig 256", "nvidia skip 32 labels"])
def test_config_is_read_from_weights(case):
    config = CASES[case][0]
    with torch.device("meta"):
        state = StyleGAN2(config).state_dict()
    assert generator_config_from_state_dict(state, conv_clamp=config.conv_clamp) == config
    assert generator_config_from_state_dict(state, **config.to_dict()) == config
    assert GeneratorConfig.from_json(config.to_json()) == config


def test_unusual_widths_are_read_from_weights():
    config = replace(TINY, mapping_dim=9, embed_dim=4, c_dim=3, z_dim=11, mapping_layers=3, use_noise=False)
    assert generator_config_from_state_dict(StyleGAN2(config).state_dict()) == config
    smallest = GeneratorConfig(4, (3,), z_dim=5, w_dim=7, mapping_layers=1)
    generator = random_generator(smallest, 0)
    assert generator_config_from_state_dict(generator.state_dict()) == smallest
    assert generator(torch.zeros(1, 5)).shape == (1, 3, 4, 4) and generator.num_ws == 2


def test_filters_in_files_are_read_and_checked():
    def with_filter(kernel):
        layers = [name for name, module in StyleGAN2(TINY).named_modules() if hasattr(module, "initialise")]
        return weights(TINY) | {f"{layer}.resample_filter": kernel for layer in layers if "synthesis" in layer}

    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    state = with_filter(torch.outer(row, row))
    assert generator_config_from_state_dict(state) == TINY
    generator = StyleGAN2(TINY)
    generator.load_state_dict(state)
    assert all("resample_filter" not in key for key in generator.state_dict())
    narrow = with_filter(torch.full((2, 2), 0.25))
    assert generator_config_from_state_dict(narrow).resample_filter == (1.0, 1.0)
    with pytest.raises(ValueError, match="filter synthesis.* is not the configuration's"):
        generator.load_state_dict(narrow)
    with pytest.raises(ValueError, match="not separable"):
        generator_config_from_state_dict(with_filter(torch.eye(4) / 4))
    for long in (torch.ones(3000), torch.ones(1, 3000), torch.ones(3000, 1), torch.ones(1, 4, 1)):
        with Largest() as seen:
            with pytest.raises(ValueError, match="is no resampling filter"):
                generator_config_from_state_dict(with_filter(long))
            with pytest.raises(ValueError, match="filter synthesis.* is not the configuration's"):
                generator.load_state_dict(with_filter(long))
        assert seen.most <= 3000
    generator.load_state_dict(with_filter(row))


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("size", [(4, 2), (3, 5), (1, 4)])
def test_images_that_are_not_square(size, architecture):
    """Height and width have the same part in every formula: a network with both exchanged makes the image so."""
    config = replace(TINY, first_size=size, architecture=architecture, resample_filter=(1, 2, 4, 3, 1))
    generator, flipped = loaded(config), StyleGAN2(replace(config, first_size=size[::-1])).eval()
    state = {
        key: value.mT if value.ndim in (3, 4) or "noise_const" in key else value
        for key, value in generator.state_dict().items()
    }
    flipped.load_state_dict(state)
    assert generator_config_from_state_dict(generator.state_dict(), resample_filter=(1, 2, 4, 3, 1)) == config
    z = torch.randn(2, TINY.z_dim, generator=torch.Generator().manual_seed(5))
    images = generator(z)
    assert images.shape == (2, 3, 4 * size[0], 4 * size[1]) == (2, 3, config.height, config.width)
    assert error(flipped(z), images.mT) < 1e-5
    random = generator.synthesize(generator.map(z), "random", torch.Generator().manual_seed(1))
    assert random.shape == images.shape and error(random, images) > 1e-3


def test_each_kind_of_filter_is_read_where_it_is_used():
    """conv1 keeps the default in NVIDIA's files; rosinality's image layers keep it, too."""

    def outer(*taps):
        row = torch.tensor(taps, dtype=torch.float32)
        return torch.outer(row, row) / row.sum() ** 2

    def stored(features, images, unused=outer(1, 3, 3, 1)):  # noqa: B008
        return weights(TINY) | {
            f"synthesis.b{size}.{layer}resample_filter": kernel
            for size in (8, 16)
            for layer, kernel in (("", images), ("conv0.", features), ("conv1.", unused))
        }

    for taps in ((1, 4, 6, 4, 1), (1, 2, 3), (3, 1), (1,), (0, 1, 1), (-1, 5, 5, -1), (1, 2, 3, 4, 5, 4, 3, 2, 9)):
        kernel = outer(*taps)
        config = generator_config_from_state_dict(stored(kernel, kernel))
        assert config.image_filter is None and torch.allclose(
            fir_kernel(config.resample_filter, dtype=torch.float32), 4 * kernel[None, None], atol=1e-6
        )
        StyleGAN2(config).load_state_dict(stored(kernel.half(), kernel))
    two = generator_config_from_state_dict(stored(outer(1, 2, 3), outer(1, 3, 3, 1)))
    assert (two.resample_filter, two.image_filter) == ((1.0, 2.0, 3.0), (1.0, 3.0, 3.0, 1.0))
    z, state = torch.randn(2, TINY.z_dim), weights(TINY)
    drawn = {}
    for config in (two, replace(two, image_filter=None), replace(two, resample_filter=(1, 3, 3, 1))):
        generator = StyleGAN2(config).eval()
        generator.load_state_dict(state)
        drawn[config] = generator(z)
        assert GeneratorConfig.from_json(config.to_json()) == config
    for config in list(drawn)[1:]:
        assert error(drawn[config], drawn[two]) > 1e-3
    alone = generator_config_from_state_dict(state | {"synthesis.b8.resample_filter": outer(1, 2)})
    assert alone.resample_filter == (1, 2) and alone.image_filter is None
    near = outer(*[1.0] * 64)
    near[5, 5] *= 3  # a filter of many taps has small ones
    with pytest.raises(ValueError, match="not separable"):
        generator_config_from_state_dict(stored(near, near))


def test_filters_are_dropped_without_the_hook_that_torch_2_4_lacks(monkeypatch):
    monkeypatch.delattr(torch.nn.Module, "register_load_state_dict_pre_hook", raising=False)
    filters = {"synthesis.b8.conv1.resample_filter": torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8}
    holder = torch.nn.ModuleDict({"ema": StyleGAN2(TINY)})  # a part of something larger has a prefix
    state = {f"ema.{key}": value for key, value in (weights(TINY) | filters).items()}
    holder.load_state_dict(state)
    assert len(state) > len(holder.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in holder.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"synthesis.b4.const": None}, "synthesis.b4.const is missing"),
        ({"mapping.fc0.weight": None}, "mapping.fc0.weight is missing"),
        ({"synthesis.b16.torgb.weight": None}, "synthesis.b16.torgb.weight is missing"),
        ({"synthesis.b4.const": torch.zeros(3)}, "should have 3 dimensions"),
        ({"synthesis.input.freqs": torch.zeros(3, 2)}, "StyleGAN3"),
    ],
)
def test_foreign_weights_are_refused(change, message):
    state = {key: value for key, value in {**weights(TINY), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        generator_config_from_state_dict(state)


def test_hints_that_contradict_the_weights_are_refused():
    with pytest.raises(ValueError, match="resolution was said to be 32, but the weights show 16"):
        generator_config_from_state_dict(weights(TINY), resolution=32)
    with pytest.raises(ValueError, match="unknown fields truncation"):
        generator_config_from_state_dict(weights(TINY), truncation=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resolution": 48}, "power of two"),
        ({"resolution": 32}, "channels lists 3"),
        ({"channels": (4, 0, 4)}, "channels"),
        ({"resample_filter": (1, -1)}, "resample_filter"),
        ({"resample_filter": [1.0] * 65}, "resample_filter must be at most 64 numbers"),
        ({"z_dim": 0}, "z_dim"),
        ({"c_dim": -1}, "c_dim"),
        ({"mapping_layers": 0}, "mapping_layers"),
        ({"mapping_dim": 0}, "mapping_dim"),
        ({"architecture": "progressive"}, "architecture"),
        ({"conv_clamp": 0}, "conv_clamp"),
        ({"mapping_lr_multiplier": float("nan")}, "mapping_lr_multiplier"),
        ({"use_noise": 1}, "use_noise"),
        ({"depth": 3}, "unknown fields"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GeneratorConfig.from_dict({**TINY.to_dict(), **change})


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_unreadable_configurations_are_refused(text):
    with pytest.raises(ValueError, match="Generator configuration"):
        GeneratorConfig.from_json(text)
