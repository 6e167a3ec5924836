"""Blending two generators by their weights: the dial from a source to its adapted generator.

Interpolation of weights as in "Deep Network Interpolation" (arXiv 1811.10515), eq. 1, and per resolution as in
"Resolution Dependent GAN Interpolation" (arXiv 2010.05334), which works between generators of common descent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from numbers import Real

import torch
from torch import Tensor

from ..errors import Problem
from .stylegan2 import StyleGAN2
from .stylegan2_config import GeneratorConfig

MAPPING = "mapping"
CONSTANT = "b4.const"


def blend_parts(generator: StyleGAN2) -> tuple[str, ...]:
    """The parts that take an amount of their own: "mapping", "b4.const", the style layers, the residual shortcuts."""
    blocks = generator.synthesis.named_children()
    skips = tuple(f"{name}.skip" for name, block in blocks if "skip" in dict(block.named_children()))
    return (MAPPING, CONSTANT, *generator.style_layers, *skips)


def resolution_split(generator: StyleGAN2, resolution: int, below: float = 0.0, above: float = 1.0) -> dict[str, float]:
    """Amounts for `blend_generators` that change with resolution, eq. 2 of arXiv 2010.05334.

    Parts up to `resolution` pixels (inclusive) and the mapping network get `below`, the others `above`. 4 pixels is the
    coarsest block (pose, shape), the generator's own resolution the finest (colour).
    """
    resolutions = generator.config.block_resolutions
    if resolution not in resolutions:
        raise Problem(f"Blending: the split must be one of {list(resolutions)}, got {resolution}.")
    return {
        part: below if part == MAPPING or int(part.split(".")[0][1:]) <= resolution else above
        for part in blend_parts(generator)
    }


@torch.no_grad()
def blend_generators(a: StyleGAN2, b: StyleGAN2, amount: float | Mapping[str, float]) -> StyleGAN2:
    """A new generator with weights a + amount * (b - a), eq. 1 of arXiv 1811.10515; 0 is a and 1 is b, bit for bit.

    `amount`: one number (outside 0..1 extrapolates), or one per part of `blend_parts` (`resolution_split` makes such;
    parts left out stay a's). Constant noise keeps the spread it has in a and b, which a plain mean of different noises
    would lose. Where a and b clamp their convolutions at different values, the ends keep their own and what lies
    between takes the wider. a and b stay as they are; the result is on a's device in a's dtype, in evaluation mode, and
    needs no gradients. Raises Problem for generators of different architecture, unknown parts and amounts that are no
    finite number.
    """
    for field in fields(GeneratorConfig):
        mine, others = getattr(a.config, field.name), getattr(b.config, field.name)
        if mine != others and field.name != "conv_clamp":
            raise Problem(
                f"Blending: both generators must have one architecture, but {field.name} is {mine} and {others}; "
                "blend a generator with one adapted from it."
            )
    parts = blend_parts(a)
    amounts = dict(amount) if isinstance(amount, Mapping) else dict.fromkeys(parts, amount)
    unknown = sorted(set(amounts) - set(parts))
    if unknown:
        raise Problem(f"Blending: this generator has no part {', '.join(unknown)}; it has {', '.join(parts)}.")
    for part, value in amounts.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise Problem(f"Blending: the amount of {part} must be a finite number, got {value!r}.")

    others = b.state_dict()
    blended = {}
    for key, own in a.state_dict().items():
        other = others[key].to(own.device)
        blended[key] = _blend(key, own, other, float(amounts.get(_part_of(key), 0.0)))
    used = {float(amounts.get(part, 0.0)) for part in parts}
    clamps = (a.config.conv_clamp, b.config.conv_clamp)
    if used == {0.0} or used == {1.0}:
        clamp = clamps[int(used.pop())]
    else:
        clamp = None if None in clamps else max(clamps)  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        result = StyleGAN2(replace(a.config, conv_clamp=clamp))
    result.load_state_dict(blended, assign=True)
    return result.eval().requires_grad_(False)


def _part_of(key: str) -> str:
    root, _, rest = key.partition(".")
    return MAPPING if root == "mapping" else ".".join(rest.split(".")[:2])


def _blend(key: str, own: Tensor, other: Tensor, amount: float) -> Tensor:
    if amount == 0:
        return own.detach().clone()
    if amount == 1:
        return other.to(own.dtype).clone()
    wide = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
    own_wide, other_wide = own.to(wide), other.to(wide)
    mixed = torch.lerp(own_wide, other_wide, amount)
    if key.endswith(".noise_const"):
        spread = torch.lerp(own_wide.square().mean().sqrt(), other_wide.square().mean().sqrt(), amount).abs()
        mixed = mixed * (spread / mixed.square().mean().sqrt().clamp_min(1e-12))
    return mixed.to(own.dtype)
