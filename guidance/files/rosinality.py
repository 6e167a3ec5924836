"""StyleGAN2 checkpoints of rosinality/stylegan2-pytorch and of what is built on it, such as StyleGAN-NADA.

The same network under other names: (rosinality, NVIDIA) differ in names and in leading dimensions of 1; both store the
convolutions of TensorFlow's original flipped alike. Architecture "skip", three channels, no labels, no clamp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import Problem

MARK = "conv1.conv.modulation.weight"


def find_generator(content: Any) -> tuple[Mapping[str, Any], list[str]] | None:
    """(the generator's tensors, remarks) in what a file holds: `g_ema`, else `g`, else the file itself; or None."""
    if not isinstance(content, Mapping):
        return None
    for key, note in (("g_ema", None), ("g", "The file has no averaged generator (g_ema); its g is used, whose images "
                                             "are rougher.")):  # fmt: skip
        inner = content.get(key)
        if isinstance(inner, Mapping) and MARK in inner:
            return inner, [note] if note else []
    return (content, []) if MARK in content else None


def to_nvidia(state_dict: Mapping[str, Any], mean_style: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors [shapes as NVIDIA's] under NVIDIA's names. mean_style [w_dim] or [1, w_dim]: the file's latent_avg.

    Filters are left out: they are constants here. Raises ValueError naming a tensor that has no place or another shape.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise Problem(f"the entry {str(key)[:80]!r} is no tensor")
        if key.endswith((".blur.kernel", ".upsample.kernel")):
            _check_filter(key, value)
            continue
        name = _name(key)
        if name is None:
            raise Problem(f"the tensor {key[:80]!r} has no place in a StyleGAN2 generator")
        if name in tensors:
            raise Problem(f"the tensor {key[:80]!r} has the place of another, {name}")
        tensors[name] = _shaped(key, name, value)
    if mean_style is not None:
        if mean_style.ndim not in (1, 2) or mean_style.numel() != mean_style.shape[-1]:
            raise Problem(f"the mean style latent_avg has the shape {list(mean_style.shape)}")
        tensors["mapping.w_avg"] = mean_style.reshape(-1)
    return tensors


def noise_without_constants(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The constant noise that converted tensors lack, name -> side, where they have strengths of noise and no constant.

    Early versions of the network drew noise anew for every image; files of theirs have `noise.weight` alone.
    """
    if any(name.endswith(".noise_const") for name in tensors):
        return {}
    strengths = (re.fullmatch(r"synthesis\.b(\d+)\.conv[01]\.noise_strength", name) for name in tensors)
    return {match[0].replace("strength", "const"): int(match[1]) for match in strengths if match}


_CONVOLUTION = {
    "conv.weight": "weight", "conv.modulation.weight": "affine.weight", "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength", "activate.bias": "bias",
}  # fmt: skip
_TO_RGB = {
    "conv.weight": "weight", "conv.modulation.weight": "affine.weight", "conv.modulation.bias": "affine.bias",
    "bias": "bias",
}  # fmt: skip


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
    if group == "noises":
        layer = "b4.conv1" if number == 0 else f"b{8 << (number - 1) // 2}.conv{(number - 1) % 2}"
        return f"synthesis.{layer}.noise_const"
    return None


def _shaped(key: str, name: str, value: Tensor) -> Tensor:
    """`value` without rosinality's leading (for a bias of RGB: surrounding) dimensions of 1."""
    wanted = {"noise_strength": 0, "noise_const": 2, "const": 3, "bias": 1}.get(name.rpartition(".")[2])
    if wanted is None:
        wanted = 4 if re.search(r"(conv\d|torgb)\.weight$", name) else 2
    shape = [size for size in value.shape]
    while len(shape) > wanted and shape[0] == 1:
        shape.pop(0)
    while len(shape) > wanted and shape[-1] == 1:
        shape.pop()
    if len(shape) != wanted:
        raise Problem(f"the tensor {key} has the shape {list(value.shape)}, where {wanted} dimensions are expected")
    return value.reshape(shape)


def _check_filter(key: str, kernel: Tensor) -> None:
    """The filter has to be [1, 3, 3, 1]'s, times 4 for doubling: there is no other in such files."""
    row = kernel.new_tensor([1.0, 3.0, 3.0, 1.0]).double() / 8
    if kernel.shape != (4, 4) or not bool(((kernel.double() - 4 * row[:, None] * row).abs() < 1e-3).all()):
        raise Problem(f"the filter {key} is another one than rosinality's [1, 3, 3, 1]")
