"""StyleGAN2's resampling and modulated convolution against their closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from indomain_guidance.guidance.networks.stylegan2_formulas import fir_kernel, modulated_convolution, upsample
from indomain_guidance.tests.guidance.networks.stylegan2_cases import error

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


def test_float16_survives_weights_and_styles_beyond_its_range():
    random = torch.Generator().manual_seed(0)
    x, weight, style = (torch.randn(shape, generator=random) for shape in ((2, 16, 6, 6), (5, 16, 3, 3), (2, 16)))
    expected = modulated_convolution(x, weight * 1e4, style * 1e5)
    assert not (style * 1e5).half().isfinite().all()
    found = modulated_convolution(x.half(), weight * 1e4, style * 1e5)
    assert found.dtype == torch.float16 and error(found, expected) < 2e-3
