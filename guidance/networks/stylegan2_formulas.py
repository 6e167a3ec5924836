"""The formulas of StyleGAN2: resampling, modulated convolution, activation, and what precision they are computed in."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

LEAK = 0.2
ACTIVATION_GAIN = math.sqrt(2.0)  # keeps the second moment through a leaky ReLU, as He's initialisation does
EPSILON = 1e-8


def fir_kernel(taps: tuple[float, ...], *, device: torch.device | str = "cpu", dtype: torch.dtype) -> Tensor:
    """The separable low-pass filter of 2x upsampling [1, 1, K, K] with sum 4, which makes up for the inserted zeros."""
    row = torch.tensor(taps, dtype=torch.float64)
    kernel = torch.outer(row, row) * (4.0 / row.sum() ** 2)
    return kernel.to(dtype).to(device)[None, None]  # in this order: not every device has float64


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """2x upsampling: zeros between the pixels, then `fir_kernel`'s filter. [B, C, H, W] -> [B, C, 2H, 2W]."""
    taps = kernel.shape[-1]
    channels = x.shape[1]
    before = taps - 1 - (taps + 1) // 2  # what to take off a full convolution so that pixel i comes to lie at 2i, 2i+1
    after = taps - 2 - before
    weight = kernel.expand(channels, 1, taps, taps)
    if before == after >= 0:
        return F.conv_transpose2d(x, weight, stride=2, padding=before, groups=channels)
    return F.pad(F.conv_transpose2d(x, weight, stride=2, groups=channels), (-before, -after, -before, -after))


def _blur_after_transposed(x: Tensor, kernel: Tensor) -> Tensor:
    """The filter of an upsampling 3x3 convolution after its transposed half: [.., 2H+1, 2W+1] -> [.., 2H, 2W]."""
    taps = kernel.shape[-1]
    channels = x.shape[1]
    before = (taps + 1) // 2 - 1
    after = taps - 2 - before
    weight = kernel.flip(-1, -2).expand(channels, 1, taps, taps)
    if before == after >= 0:
        return F.conv2d(x, weight, padding=before, groups=channels)
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, groups=channels)


def modulated_convolution(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, up_kernel: Tensor | None = None
) -> Tensor:
    """Convolution with modulated, demodulated weights, eqs. 1 and 3 of arXiv 1912.04958.

    x [B, I, H, W], weight [O, I, k, k], style [B, I] -> [B, O, H, W]: w'_{oik} = s_i w_{oik}, divided (`demodulate`) by
    sqrt(sum_ik w'^2 + 1e-8). With `up_kernel` (of `fir_kernel`) the result is [B, O, 2H, 2W]: x upsampled, then
    convolved (the weight not flipped, unlike torch's conv2d, so that one transposed convolution does both).
    Scales are computed in `style`'s dtype (at least float32), the convolution in x's. In half precision styles and
    weights enter it normalised (arXiv 2006.06676, appendix D), their norms joining the demodulation factor.
    """
    factor = None
    scaled_style, scaled_weight = style, weight
    if demodulate:
        energy = weight.to(style.dtype).square().sum(dim=(2, 3))  # [O, I]
        factor = (style.square() @ energy.t() + EPSILON).rsqrt()  # [B, O]
        if x.dtype in (torch.float16, torch.bfloat16):
            # Both norms cancel, so that no gradient has to pass through them.
            style_norm = style.detach().abs().amax(dim=1, keepdim=True).clamp_min(EPSILON)  # [B, 1]
            weight_norm = energy.detach().sum(dim=1).sqrt().clamp_min(EPSILON)  # [O]
            scaled_style = style / style_norm
            scaled_weight = weight.to(style.dtype) / weight_norm[:, None, None, None]
            factor = factor * (style_norm * weight_norm)
    x = x * scaled_style.to(x.dtype)[:, :, None, None]
    scaled_weight = scaled_weight.to(x.dtype)
    if up_kernel is None:
        x = F.conv2d(x, scaled_weight, padding=weight.shape[-1] // 2)
    else:
        x = _blur_after_transposed(F.conv_transpose2d(x, scaled_weight.transpose(0, 1), stride=2), up_kernel)
    return x if factor is None else x * factor.to(x.dtype)[:, :, None, None]


def activate(x: Tensor, bias: Tensor, gain: float = 1.0, clamp: float | None = None) -> Tensor:
    """sqrt(2) * leaky ReLU(x + bias), times gain, bounded to +- clamp * gain. x [B, C, ...], bias [C]."""
    bias = bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
    x = F.leaky_relu(x + bias, LEAK) * (ACTIVATION_GAIN * gain)
    return x if clamp is None else x.clamp(-clamp * gain, clamp * gain)


def unit_second_moment(x: Tensor) -> Tensor:
    """x [B, C] with a mean square of 1 over C."""
    return x * (x.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


def scale_dtype(weight: Tensor) -> torch.dtype:
    """What scales and styles are computed in: the weights' number format, at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def feature_dtype(weight: Tensor) -> torch.dtype:
    """What features are computed in: the weights' number format; for float32 weights that of `torch.autocast`."""
    kind = weight.device.type
    if weight.dtype == torch.float32 and is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    available = is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()
