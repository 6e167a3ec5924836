"""StyleGAN2 against NVIDIA's and rosinality's code (golden arrays), closed forms, and what is read from weights."""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from indomain_guidance.guidance.networks import stylegan2
from indomain_guidance.guidance.networks.stylegan2 import (
    GeneratorConfig,
    StyleGAN2,
    fir_kernel,
    generator_config_from_state_dict,
    modulated_convolution,
    random_generator,
    standard_channels,
    upsample,
)
from torch.utils._python_dispatch import TorchDispatchMode

GOLDENS = Path(__file__).parent / "goldens" / "stylegan2.npz"
WIDTHS = {32: (24, 20, 16, 12), 64: (24, 24, 20, 16, 12), 256: (24, 24, 20, 20, 16, 12, 8)}
# What goldens/make_stylegan2.py ran in the original code, and how: case -> (configuration, noise, truncation, cutoff).
CASES = {
    f"nvidia {architecture} {size}": (
        GeneratorConfig(
            size,
            WIDTHS[size],
            z_dim=16,
            w_dim=24,
            mapping_layers=4,
            architecture=architecture,
            conv_clamp=None if size == 64 else 256,
        ),
        "const",
        1.0,
        None,
    )
    for size in WIDTHS
    for architecture in ("skip", "resnet", "orig")
}
CASES |= {
    f"nvidia {architecture} 32 labels": (
        replace(CASES[f"nvidia {architecture} 32"][0], c_dim=5, img_channels=4, mapping_layers=2, conv_clamp=0.5),
        "none",
        0.6,
        3,
    )
    for architecture in ("skip", "resnet", "orig")
}
CASES |= {
    f"rosinality {size}": (
        GeneratorConfig(size, WIDTHS[size], z_dim=24, w_dim=24, mapping_layers=4),
        "const",
        0.7,
        None,
    )
    for size in WIDTHS
}


def weights(config: GeneratorConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by name, from numpy's frozen generator: every tensor counts, activations stay near 1."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in StyleGAN2(config).state_dict().items()}
    filled = {}
    for key, shape in shapes.items():
        random = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
        values = random.standard_normal(tuple(shape))
        if key.startswith("mapping.fc"):
            values = values * (100.0 if key.endswith("weight") else 20.0)
        elif key.endswith("affine.bias"):
            values = 1 + 0.2 * values
        elif key.endswith((".bias", "noise_strength", "w_avg")):
            values = 0.3 * values
        filled[key] = torch.tensor(np.asarray(values, dtype=np.float32))
    return filled


def inputs(config: GeneratorConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch = 1 if config.resolution > 64 else 2
    random = np.random.RandomState(7)
    z = torch.tensor(random.standard_normal((batch, config.z_dim)).astype(np.float32))
    c = torch.tensor(random.standard_normal((batch, config.c_dim)).astype(np.float32)) if config.c_dim else None
    return z, c


def digest(images: torch.Tensor) -> dict[str, np.ndarray]:
    """A grid of pixels and the means of rows and columns: small, and no pixel escapes it."""
    images = images.detach().double()
    at = torch.linspace(0, images.shape[-1] - 1, 9).round().long()
    parts = {"grid": images[:, :, at][:, :, :, at], "rows": images.mean(dim=3), "columns": images.mean(dim=(1, 2))}
    return {name: value.float().numpy() for name, value in parts.items()}


def probe(shape: torch.Size) -> torch.Tensor:
    """What images are multiplied by to get one number whose gradients are compared."""
    return torch.tensor(np.random.RandomState(3).standard_normal(tuple(shape)).astype(np.float32))


def loaded(config: GeneratorConfig, seed: int = 0) -> StyleGAN2:
    generator = StyleGAN2(config)
    generator.load_state_dict(weights(config, seed))
    return generator.eval()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(actual - expected) / RMS(expected)."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


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


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms

FILTERS = [(1, 3, 3, 1), (1, 2, 3, 4), (1, 1), (1, 2, 1), (1, 4, 6, 4, 1), (1, 5, 10, 10, 5, 1), (2,)]


def zero_inserted(x: torch.Tensor, taps: tuple[float, ...]) -> torch.Tensor:
    """Zeros between the pixels, then the sum that a convolution is, pixel i centred on 2i and 2i + 1 for even taps."""
    k = torch.tensor(taps, dtype=x.dtype)
    k = 2 * k / k.sum()
    for dim in (2, 3):
        x = x.movedim(dim, -1)
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        out = torch.zeros_like(wide)
        for n in range(wide.shape[-1]):
            for tap, value in enumerate(k):
                source = n - (len(taps) + 1) // 2 + len(taps) - 1 - tap
                if 0 <= source < wide.shape[-1]:
                    out[..., n] += value * wide[..., source]
        x = out.movedim(-1, dim)
    return x


@pytest.mark.parametrize("taps", FILTERS)
def test_upsampling_is_zero_insertion_and_a_filter(taps):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = fir_kernel(taps, dtype=x.dtype)
    assert float(kernel.sum()) == pytest.approx(4)
    torch.testing.assert_close(upsample(x, kernel), zero_inserted(x, taps))


def test_upsampling_keeps_ramps():
    # Bilinear: pixel i sits between 2i and 2i + 1, a quarter of a pixel to either side.
    ramp = torch.arange(6.0, dtype=torch.float64).expand(1, 1, 6, 6)
    up = upsample(ramp, fir_kernel((1, 3, 3, 1), dtype=torch.float64))
    expected = (torch.arange(12, dtype=torch.float64) - 0.5) / 2
    torch.testing.assert_close(up[0, 0, 1:-1, 1:-1], expected[1:-1].expand(10, 10))


def modulated_by_hand(x, weight, style, demodulate=True, taps=None):
    """Eqs. 1 and 3 as they are written: a weight per sample."""
    images = []
    for sample in range(len(x)):
        own = weight * style[sample][None, :, None, None]
        if demodulate:
            own = own / (own.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        features = x[sample : sample + 1]
        if taps is None:
            images.append(F.conv2d(features, own, padding=weight.shape[-1] // 2))
        else:
            # Up first (with room at the borders for the 3x3 kernel), then a convolution in the mathematical sense.
            wide = zero_inserted(F.pad(features, (8, 8, 8, 8)), taps)
            images.append(F.conv2d(wide, own.flip(-1, -2), padding=1)[:, :, 16:-16, 16:-16])
    return torch.cat(images)


@pytest.mark.parametrize("taps", [None, *FILTERS])
@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_is_the_papers(taps, demodulate):
    random = torch.Generator().manual_seed(0)
    x, weight, style = (
        torch.randn(shape, dtype=torch.float64, generator=random) for shape in ((2, 4, 6, 6), (5, 4, 3, 3), (2, 4))
    )
    kernel = None if taps is None else fir_kernel(taps, dtype=x.dtype)
    found = modulated_convolution(x, weight, style, demodulate=demodulate, up_kernel=kernel)
    torch.testing.assert_close(found, modulated_by_hand(x, weight, style, demodulate, taps))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_demodulated_weights_have_norm_one(dtype):
    # Impulses, one per input channel, read the effective weights out.
    random = torch.Generator().manual_seed(0)
    scale = torch.promote_types(dtype, torch.float32)
    weight = 7 * torch.randn(5, 4, 3, 3, dtype=scale, generator=random)
    style = 0.1 + torch.rand(1, 4, dtype=scale, generator=random)
    impulses = torch.zeros(4, 4, 5, 5, dtype=dtype)
    impulses[range(4), range(4), 2, 2] = 1
    responses = modulated_convolution(impulses, weight, style.expand(4, -1))
    norms = responses.double().square().sum(dim=(0, 2, 3)).sqrt()
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-10)  # the formula's 1e-8 beside a sum of squares of some thousand
    torch.testing.assert_close(norms, torch.ones(5, dtype=torch.float64), atol=tolerance, rtol=0)


def test_demodulation_leaves_nothing_of_the_styles_scale():
    random = torch.Generator().manual_seed(0)
    x, weight, style = (torch.randn(shape, generator=random) for shape in ((2, 4, 6, 6), (5, 4, 3, 3), (2, 4)))
    once = modulated_convolution(x, weight, style)
    assert error(modulated_convolution(x, weight * 50, style * 300), once) < 1e-6
    assert (
        error(
            modulated_convolution(x, weight, style, demodulate=False) * 3,
            modulated_convolution(x, weight, style * 3, demodulate=False),
        )
        < 1e-6
    )


TINY = GeneratorConfig(16, (6, 5, 4), z_dim=5, w_dim=7, mapping_layers=2)


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


def test_float16_survives_weights_and_styles_beyond_its_range():
    random = torch.Generator().manual_seed(0)
    x, weight, style = (torch.randn(shape, generator=random) for shape in ((2, 16, 6, 6), (5, 16, 3, 3), (2, 16)))
    expected = modulated_convolution(x, weight * 1e4, style * 1e5)
    assert not (style * 1e5).half().isfinite().all()
    found = modulated_convolution(x.half(), weight * 1e4, style * 1e5)
    assert found.dtype == torch.float16 and error(found, expected) < 2e-3


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
    generator.mapping.track_mean(w, momentum=0.0)
    torch.testing.assert_close(generator.mapping.w_avg, w.mean(dim=0))
    generator.mapping.track_mean(w + 1, momentum=0.75)
    torch.testing.assert_close(generator.mapping.w_avg, w.mean(dim=0) + 0.25)
    labelled = loaded(replace(TINY, c_dim=3))
    one_hot, first = labelled.mean_style(3000), labelled.mean_style(3000, c=torch.eye(3)[:1])
    assert not torch.allclose(one_hot, first, atol=1e-3)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any operation within gives."""

    most = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        if isinstance(made, torch.Tensor):
            self.most = max(self.most, made.numel())
        return made


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
        ({"resample_filter": [1.0] * 65}, "at most 64 taps, got 65"),
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
    with pytest.raises(ValueError, match=r"styles \[B, 6, 7\] or \[B, 7\]"):
        generator.synthesize(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match="noise must be one of"):
        generator.synthesize(torch.zeros(2, 7), "constant")
