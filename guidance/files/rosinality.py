"""StyleGAN2 weights of rosinality/stylegan2-pytorch and its descendants (StyleGAN-NADA, BasicSR) under NVIDIA's names.

The networks are equal; the weights differ in names and in leading dimensions of 1. Both store the convolutions of
TensorFlow's original flipped. Architecture "skip", three channels, no labels, no clamp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import Problem

# BasicSR's names for the same network (GFPGAN's among its descendants), as pieces to replace from the start of a name.
_BASICSR = (
    (r"style_mlp\.", "style."),
    (r"constant_input\.weight$", "input.input"),
    (r"style_conv1\.weight$", "conv1.noise.weight"),
    (r"style_convs\.(\d+)\.weight$", r"convs.\1.noise.weight"),
    (r"style_conv1\.", "conv1."),
    (r"style_convs\.", "convs."),
    (r"noises\.noise(\d+)$", r"noises.noise_\1"),
)


def from_basicsr(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors under rosinality's names, others left as they are. Raises Problem for two of one place."""
    renamed = {_without_basicsr(key) if isinstance(key, str) else key: value for key, value in state_dict.items()}
    if len(renamed) != len(state_dict):
        raise Problem("two of its tensors have one place")
    return renamed


def _without_basicsr(key: str) -> str:
    for pattern, name in _BASICSR:
        key, count = re.subn(f"^{pattern}", name, key)
        if count:
            break
    return re.sub(r"^((?:conv1|convs\.\d+|to_rgb1|to_rgbs\.\d+)\.)modulated_conv\.", r"\1conv.", key)


def to_nvidia(state_dict: Mapping[str, Any], mean_style: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors [shapes as NVIDIA's] under NVIDIA's names. mean_style [w_dim] or [N, w_dim]: the file's latent_avg.

    mean_style may repeat one style for every layer, as encoders keep it; where its rows differ it is left out, because
    a generator has one mean. Raises Problem naming a tensor that has no place or another shape.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise Problem(f"the entry {str(key)[:80]!r} is no tensor")
        name = _name(key)
        if name is None:
            raise Problem(f"the tensor {key[:80]!r} has no place in a StyleGAN2 generator")
        if name in tensors:
            raise Problem(f"the tensor {key[:80]!r} has the place of another, {name}")
        tensors[name] = _shaped(key, name, value)
    if mean_style is not None:
        rows = mean_style if mean_style.ndim == 2 else mean_style[None]
        if rows.ndim != 2 or not len(rows):
            raise Problem(f"the mean style latent_avg has the shape {list(mean_style.shape)}")
        if bool((rows == rows[:1]).all()):
            tensors["mapping.w_avg"] = rows[0]
    return tensors


def noise_without_constants(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The constant noise that converted tensors lack, name -> size, where they have strengths of noise and no constant.

    Early versions of the network drew noise anew for every image; files of theirs have `noise.weight` alone.
    """
    if any(name.endswith(".noise_const") for name in tensors):
        return {}
    const = tensors.get("synthesis.b4.const")
    height, width = (4, 4) if const is None else const.shape[1:]
    strengths = (re.fullmatch(r"synthesis\.b(\d+)\.conv[01]\.noise_strength", name) for name in tensors)
    return {
        match[0].replace("strength", "const"): (height * int(match[1]) // 4, width * int(match[1]) // 4)
        for match in strengths
        if match
    }


_CONVOLUTION = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength",
    "activate.bias": "bias",
    "conv.blur.kernel": "resample_filter",
}
_TO_RGB = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "bias": "bias",
}


def _name(key: str) -> str | None:
    if key == "input.input":
        return "synthesis.b4.const"
    first, _, rest = key.partition(".")
    if first == "conv1" and rest in _CONVOLUTION:
        return f"synthesis.b4.conv1.{_CONVOLUTION[rest]}"
    if first == "to_rgb1" and rest in _TO_RGB:
        return f"synthesis.b4.torgb.{_TO_RGB[rest]}"
    # One spelling for each place: two names of one would overwrite each other.
    match = re.fullmatch(r"(style|convs|to_rgbs)\.(0|[1-9]\d?)\.(.+)", key, re.ASCII) or re.fullmatch(
        r"(noises)\.noise_(0|[1-9]\d?)()", key, re.ASCII
    )
    if not match:
        return None
    group, number, rest = match[1], int(match[2]), match[3]
    if group == "style" and number >= 1 and rest in ("weight", "bias"):  # layer 0 normalises, without weights
        return f"mapping.fc{number - 1}.{rest}"
    if group == "convs" and rest in _CONVOLUTION:
        return f"synthesis.b{8 << number // 2}.conv{number % 2}.{_CONVOLUTION[rest]}"
    if group == "to_rgbs" and rest in _TO_RGB:
        return f"synthesis.b{8 << number}.torgb.{_TO_RGB[rest]}"
    if group == "to_rgbs" and rest == "upsample.kernel":
        return f"synthesis.b{8 << number}.resample_filter"
    if group == "noises":
        layer = "b4.conv1" if number == 0 else f"b{8 << (number - 1) // 2}.conv{(number - 1) % 2}"
        return f"synthesis.{layer}.noise_const"
    return None


def _shaped(key: str, name: str, value: Tensor) -> Tensor:
    """`value` without rosinality's leading (for a bias of RGB: surrounding) dimensions of 1; filters with the sum 1."""
    if name.endswith(".resample_filter"):
        if value.ndim != 2 or not abs(float(value.sum()) - 4) < 0.01:
            raise Problem(
                f"the filter {key} has the shape {list(value.shape)} and the sum {float(value.sum()):g}, "
                "where a square and 4 are expected"
            )
        return value / 4
    wanted = {"noise_strength": 0, "noise_const": 2, "const": 3, "bias": 1}.get(name.rpartition(".")[2])
    if wanted is None:
        wanted = 4 if re.search(r"(conv\d|torgb)\.weight$", name) else 2
    shape = list(value.shape)
    while len(shape) > wanted and shape[0] == 1:
        shape.pop(0)
    while len(shape) > wanted and shape[-1] == 1:
        shape.pop()
    if len(shape) != wanted:
        raise Problem(f"the tensor {key} has the shape {list(value.shape)}, where {wanted} dimensions are expected")
    return value.reshape(shape)
