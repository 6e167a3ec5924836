"""StyleGAN2 against NVIDIA's and rosinality's code (golden arrays), and what the network promises."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from indomain_guidance.guidance.networks import stylegan2
from indomain_guidance.guidance.networks.stylegan2 import (
    LARGEST_SEED,
    StyleGAN2,
    class_labels,
    latents_of_seeds,
    random_generator,
)
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig, standard_channels
from indomain_guidance.guidance.networks.stylegan2_formulas import fir_kernel
from indomain_guidance.tests.guidance.networks.stylegan2_cases import (
    CASES,
    TINY,
    Largest,
    digest,
    error,
    inputs,
    loaded,
    probe,
    weights,
)

GOLDENS = Path(__file__).parent / "goldens" / "stylegan2.npz"


# ---------------------------------------------------------------------------------------------------------------------
# The original code


@pytest.mark.parametrize("case", CASES)
def test_equals_the_original(case):
    config, noise, truncation, cutoff = CASES[case]
    generator = loaded(config)
    ws = generator.map(*inputs(config), truncation, cutoff).detach().requires_grad_()
    images = generator.synthesize(ws, noise)
    (gradient,) = torch.autograd.grad((images * probe(images.shape)).sum(), ws)
    found = {**digest(images), "ws": ws.detach()[:, ::3].numpy(), "gradient": gradient[:, ::3].numpy()}
    with np.load(GOLDENS) as goldens:
        for part, value in found.items():
            assert error(torch.tensor(value), torch.tensor(goldens[f"{case}/{part}"])) < 1e-4, part


def test_every_tensor_matters_to_the_comparison():
    config, noise, truncation, cutoff = CASES["rosinality 32"]
    state, (z, _) = weights(config), inputs(config)
    generator = loaded(config)
    with np.load(GOLDENS) as goldens, torch.no_grad():
        expected = torch.tensor(goldens["rosinality 32/grid"])
        for key, value in state.items():
            # Uneven, because demodulation takes out a common factor.
            factors = torch.where(torch.arange(value.numel()) % 2 == 0, 1.3, 0.9).view(value.shape)
            generator.load_state_dict({**state, key: value * factors})
            images = generator(z, None, truncation, noise, cutoff)
            assert error(torch.tensor(digest(images)["grid"]), expected) > 1e-4, key


def test_published_sizes():
    # Parameters without buffers, as counted in NVIDIA's own code: config F at 1024 pixels, config E at 256.
    for resolution, base, count in ((1024, 32768, 30370060), (256, 16384, 24767458)):
        with torch.device("meta"):
            generator = StyleGAN2(GeneratorConfig(resolution, standard_channels(resolution, base)))
        assert sum(parameter.numel() for parameter in generator.parameters()) == count
        assert generator.num_ws == 2 * int(math.log2(resolution)) - 2


def test_truncation_is_the_closed_form():
    generator = loaded(TINY)
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        w, mean = generator.mapping(z), generator.mapping.w_avg
        ws = w[:, None].repeat(1, generator.num_ws, 1)
        assert torch.equal(generator.map(z), ws) and torch.equal(generator.map(z, truncation=1.0), ws)
        assert torch.equal(generator.map(z, truncation=0.0), mean.expand_as(ws))
        for truncation in (0.7, -0.5, 1.4):
            expected = mean.double() + truncation * (ws.double() - mean.double())
            assert error(generator.map(z, truncation=truncation), expected) < 1e-6
            cut = generator.map(z, truncation=truncation, truncation_cutoff=2)
            assert error(cut[:, :2], expected[:, :2]) < 1e-6 and torch.equal(cut[:, 2:], ws[:, 2:])
        assert torch.equal(generator.map(z, truncation=0.5, truncation_cutoff=0), ws)
        edited = generator.map(z)
        edited[:, 2] += 1  # one style alone, as W+ edits do
        assert torch.equal(edited[:, 1], w) and torch.equal(edited[:, 2], w + 1)


def test_one_style_equals_the_same_style_everywhere():
    generator = loaded(TINY)
    w = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        once = generator.synthesize(w)
        assert error(generator.synthesize(w[:, None].repeat(1, generator.num_ws, 1)), once) < 1e-6
        z = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
        assert torch.equal(generator(z, truncation=0.7), generator.synthesize(generator.map(z, truncation=0.7)))


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_each_layer_reads_the_style_that_ws_index_names(architecture):
    generator = loaded(replace(TINY, architecture=architecture))
    ws = torch.randn(2, generator.num_ws, 7, generator=torch.Generator().manual_seed(0))
    order, read = [], {}
    for name in generator.style_layers:

        def note(module, args, output, name=name):
            order.append(name)
            read[name] = args[0]

        generator.get_submodule(f"synthesis.{name}.affine").register_forward_hook(note)
    with torch.no_grad():
        generator.synthesize(ws)
    assert tuple(order) == generator.style_layers == tuple(generator.ws_index)
    assert sum(name.endswith("torgb") for name in order) == (3 if architecture == "skip" else 1)
    for name, index in generator.ws_index.items():
        assert torch.equal(read[name], ws[:, index]), name
    assert set(generator.ws_index.values()) == set(range(generator.num_ws))


def test_noise_is_added_before_the_activation_times_its_strength():
    generator = loaded(TINY)
    layer = generator.synthesis.b8.conv1
    random = torch.Generator().manual_seed(0)
    x, w, noise = (torch.randn(shape, generator=random) for shape in ((2, 5, 8, 8), (2, 7), (2, 1, 8, 8)))
    kernel = fir_kernel((1, 3, 3, 1), dtype=x.dtype)

    def before_activation(y):
        return torch.where(y > 0, y, y / 0.2) / 2**0.5

    with torch.no_grad():
        plain, noisy = (before_activation(layer(x, w, values, kernel)) for values in (None, noise))
        assert error(noisy - plain, (layer.noise_strength * noise).expand_as(plain)) < 1e-5
        layer.noise_strength.zero_()
        assert torch.equal(layer(x, w, noise, kernel), layer(x, w, None, kernel))


def test_noise_modes():
    generator = loaded(TINY)
    w = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).expand(2, -1)

    def images(mode, seed=None):
        random = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return generator.synthesize(w, mode, random)

    const, none, first = images("const"), images("none"), images("random", 0)
    assert error(const[0], const[1]) < 1e-6 and error(none[0], none[1]) < 1e-6
    assert torch.equal(const, images("const")) and torch.equal(first, images("random", 0))
    assert error(first[0], first[1]) > 1e-2 and error(first, images("random", 1)) > 1e-2
    assert error(const, none) > 1e-2 and error(images("random"), images("random")) > 1e-2
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.zero_()
    assert torch.equal(images("const"), images("none")) and torch.equal(images("random"), images("none"))
    silent = StyleGAN2(replace(TINY, use_noise=False))
    assert not [key for key in silent.state_dict() if "noise" in key]
    with torch.no_grad():
        assert torch.equal(silent.synthesize(w, "const"), silent.synthesize(w, "random"))


def test_clamp_bounds_every_convolution():
    config = replace(TINY, architecture="resnet", conv_clamp=0.25)
    generator, seen = loaded(config), {}
    for name in generator.style_layers:
        generator.get_submodule(f"synthesis.{name}").register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, float(output.abs().max()))
        )
    with torch.no_grad():
        generator(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    for name, largest in seen.items():
        # conv1 of a residual block is scaled by sqrt(1/2), and its bound with it.
        scaled = name.endswith("conv1") and name != "b4.conv1"
        assert largest == pytest.approx(0.25 * (0.5**0.5 if scaled else 1)), name


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_first_and_second_derivatives_are_those_of_finite_differences(architecture):
    config = GeneratorConfig(8, (3, 2), z_dim=2, w_dim=2, mapping_layers=1, img_channels=1, architecture=architecture)
    generator = loaded(config).double()
    names = [
        "synthesis.b4.const",
        "synthesis.b8.conv0.weight",
        "synthesis.b8.conv1.noise_strength",
        "synthesis.b8.torgb.affine.weight",
        "mapping.fc0.bias",
    ]
    names += ["synthesis.b8.skip.weight"] if architecture == "resnet" else []
    parameters = dict(generator.named_parameters())
    values = [parameters[name].detach().clone().requires_grad_() for name in names]
    z = torch.tensor([[0.3, -1.1]], dtype=torch.float64, requires_grad=True)

    def pooled(z, *values):
        images = torch.func.functional_call(generator, dict(zip(names, values)), (z,))
        return F.avg_pool2d(images, 4)

    assert torch.autograd.gradcheck(pooled, (z, *values))
    assert torch.autograd.gradgradcheck(pooled, (z, *values))


def test_path_length_gradient_passes_through_the_styles_gradient():
    # What training regularizes (eq. 4 of arXiv 1912.04958): a parameter's derivative of a gradient with respect to ws.
    generator = loaded(TINY).double()
    ws = torch.randn(1, generator.num_ws, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = generator.synthesis.b16.conv0.weight

    def length():
        own = ws.clone().requires_grad_()
        images = generator.synthesize(own)
        (gradient,) = torch.autograd.grad((images * probe(images.shape)).sum(), own, create_graph=True)
        return gradient.square().sum(dim=2).mean().sqrt()

    (derivative,) = torch.autograd.grad(length(), weight)
    at, step = (1, 2, 0, 1), 1e-6
    with torch.no_grad():
        weight[at] += step
    higher = length().item()
    with torch.no_grad():
        weight[at] -= 2 * step
    assert float(derivative[at]) == pytest.approx((higher - length().item()) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("noise", ["const", "random"])
def test_checkpointing_changes_no_number(noise):
    generator = loaded(TINY)
    w = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))

    def run():
        generator.zero_grad()
        images = generator.synthesize(w, noise, torch.Generator().manual_seed(1))
        (images * probe(images.shape)).sum().backward()
        return images.detach(), {name: parameter.grad for name, parameter in generator.synthesis.named_parameters()}

    images, gradients = run()
    generator.gradient_checkpointing = True
    again, gradients_again = run()
    assert torch.equal(images, again) and all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_half_precision_is_near_full(architecture, dtype, tolerance):
    config = CASES[f"nvidia {architecture} 32"][0]
    generator = loaded(config)
    z, _ = inputs(config)
    with torch.no_grad():
        expected = generator(z)
        with torch.autocast("cpu", dtype):
            automatic = generator(z)
        ws = generator.map(z)
        stored = generator.to(dtype).synthesize(ws)
    for images in (automatic, stored):
        assert images.dtype == torch.float32 and 1e-6 < error(images, expected) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_gradients_are_near_full(dtype, tolerance):
    generator = loaded(TINY)
    w = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    gradients = []
    for enabled in (False, True):
        generator.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            images = generator.synthesize(w)
        (images * probe(images.shape)).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in generator.synthesis.parameters()]))
    assert 1e-6 < error(gradients[1], gradients[0]) < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation, loading, configuration


def test_random_generators_have_the_published_initialisation():
    config = GeneratorConfig(16, (64, 64, 32), z_dim=32, w_dim=64, c_dim=4)
    before = torch.random.get_rng_state()
    generator, same, other = random_generator(config, 3), random_generator(config, 3), random_generator(config, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    state = generator.state_dict()
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in state.items())
    assert not torch.equal(state["synthesis.b4.const"], other.state_dict()["synthesis.b4.const"])
    for key, value in state.items():
        if key.endswith(("weight", "const")):
            spread = 100 if ".fc" in key else 1
            assert float(value.std()) == pytest.approx(spread, rel=0.2) and abs(float(value.mean())) < spread / 4, key
        else:
            assert bool((value == (1 if key.endswith("affine.bias") else 0)).all()), key
    # Equalised layers carry unit variance from z to the convolutions.
    z = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        w = generator.mapping(z, torch.eye(4).repeat(64, 1))
    assert 0.3 < float(w.square().mean()) < 3


def test_mean_style_is_the_mean():
    generator = loaded(TINY)
    with torch.no_grad():
        w = generator.mapping(torch.randn(20000, 5, generator=torch.Generator().manual_seed(9)))
    standard_error = w.std(dim=0) * (1 / 20000 + 1 / 5500) ** 0.5
    assert bool(((generator.mean_style(5500) - w.mean(dim=0)).abs() < 4.5 * standard_error).all())


@pytest.mark.parametrize("classes", [0, 3])
def test_mean_style_takes_its_latents_by_the_thousand(classes):
    generator = loaded(replace(TINY, c_dim=classes))
    random, total = torch.Generator().manual_seed(4), torch.zeros(7, dtype=torch.float64)
    with torch.no_grad():
        for start, count in ((0, 1000), (1000, 500)):
            z = torch.randn(count, 5, generator=random)
            c = torch.eye(classes)[(torch.arange(count) + start) % classes] if classes else None
            total += generator.map(z, c)[:, 0].double().sum(dim=0)
    assert torch.equal(generator.mean_style(1500, seed=4), (total / 1500).float())


def test_mean_style_of_wide_layers_takes_little_memory(monkeypatch):
    many = loaded(replace(TINY, c_dim=4000, embed_dim=1))
    with Largest() as seen:
        many.mean_style(10)
    assert seen.most == 10 * 4000
    generator = loaded(TINY)
    whole = generator.mean_style(160)
    monkeypatch.setattr(stylegan2, "MEAN_NUMBERS_AT_ONCE", 7 * 16)
    with Largest() as seen:
        parts = generator.mean_style(160)
    assert seen.most == 7 * 16
    torch.testing.assert_close(parts, whole)  # both draw in blocks of 16 numbers, so the same ones


def test_no_hidden_state_outside_the_state_dict():
    # Loaders build on the meta device and assign: nothing may be left there.
    with torch.device("meta"):
        generator = StyleGAN2(TINY)
    generator.load_state_dict(weights(TINY), assign=True)
    z = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(TINY)(z)
        assert torch.equal(generator(z), expected)
        twin = copy.deepcopy(generator)
        del generator
        twin.load_state_dict(weights(TINY, seed=1))
        assert not torch.equal(twin(z), expected)
        twin.load_state_dict(weights(TINY))
        assert torch.equal(twin(z), expected)


def test_inputs_that_do_not_fit_are_refused():
    generator, labelled = loaded(TINY), loaded(replace(TINY, c_dim=3))
    z = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"latents \[B, 5\], got \[2, 4\]"):
        generator.map(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"labels \[2, 3\], got none"):
        labelled.map(z)
    with pytest.raises(ValueError, match=r"labels \[2, 3\], got \[2, 4\]"):
        labelled.map(z, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no labels"):
        generator.map(z, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="finite"):
        generator.map(z, truncation=float("nan"))
    with pytest.raises(ValueError, match=r"0\.\.6"):
        generator.map(z, truncation=0.5, truncation_cutoff=7)
    with pytest.raises(ValueError, match=r"styles \[B, 6, 7\]"):
        generator.synthesize(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match="noise must be one of"):
        generator.synthesize(torch.zeros(2, 7), "constant")


def test_each_seed_has_its_own_latent():
    z = latents_of_seeds([7, 0, LARGEST_SEED, LARGEST_SEED + 8], 8)
    assert z.shape == (4, 8) and z.dtype == torch.float32
    assert np.array_equal(z[0].numpy(), np.random.RandomState(7).randn(1, 8)[0].astype(np.float32))
    assert torch.equal(z[3], z[0]) and torch.equal(z[1:2], latents_of_seeds([0], 8))  # 32 bits count
    assert latents_of_seeds([], 8).shape == (0, 8)


def test_labels_of_many_classes_take_no_more_than_they_are():
    labels = class_labels([7, 0, 199_999], 200_000)
    assert (
        labels.shape == (3, 200_000)
        and labels.sum(1).tolist() == [1.0] * 3
        and labels.argmax(1).tolist() == [7, 0, 199_999]
    )
