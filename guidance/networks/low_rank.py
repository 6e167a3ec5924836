"""Low-rank additions to a network's layers: LoRA (arXiv 2106.09685, section 4.1) and DoRA (arXiv 2402.09353, eq. 5).

A layer's weight W [out, in, ...] becomes V = W + scale B A. With DoRA every input channel of V is then rescaled to a
norm of its own, m V / ||V||, and m is trained as well; ||V|| counts as a constant in the gradient (section 4.3).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Problem

DOWN, UP, MAGNITUDE = "lora_down", "lora_up", "dora_scale"
ADDED = re.compile(rf"(.*)\.({DOWN}|{UP}|{MAGNITUDE})")
Layer = nn.Linear | nn.Conv2d
ATTENTION_PROJECTION = re.compile(r"(.*\.)?attn[12]\.(to_q|to_k|to_v|to_out\.0)")
# All of a UNet but its first and last convolution and the layers that embed timestep and size: what kohya's scripts
# train and read. Older versions of diffusers refuse SDXL's other layers.
IN_BLOCKS = re.compile(r"(input_blocks\.[1-9]|middle_block\.|output_blocks\.).*")
# Words for layers, which may stand among patterns.
NAMED_LAYERS = {
    "attention": lambda name, module: ATTENTION_PROJECTION.fullmatch(name) is not None,
    "linear": lambda name, module: isinstance(module, nn.Linear),
    "convolution": lambda name, module: isinstance(module, nn.Conv2d),
    "blocks": lambda name, module: IN_BLOCKS.fullmatch(name) is not None,
    "all": lambda name, module: True,
}


class LowRank(nn.Module):
    """What a linear layer and a convolution with an addition share; `weight` and `bias` keep their names.

    lora_down (A) is [rank, in] or [rank, in, k, k] and starts uniform within 1 / sqrt(fan in), as a layer does; lora_up
    (B), [out, rank] or [out, rank, 1, 1], starts at zero and dora_scale (m), [1, in] or [1, in, 1, 1], at ||W||, so
    that nothing changes before the first step. active: False leaves the layer as it was.
    """

    weight: Tensor
    lora_down: nn.Parameter
    lora_up: nn.Parameter
    dora_scale: nn.Parameter | None

    def add(self, rank: int, scale: float, dora: bool, generator: torch.Generator) -> None:
        """Put the addition in. rank: that of the layer itself where it is larger."""
        weight = self.weight
        fan_in = weight[0].numel()
        rank, bound, tail = min(rank, len(weight), fan_in), 1 / math.sqrt(fan_in), weight.shape[2:]
        down = torch.rand(rank, *weight.shape[1:], generator=generator) * (2 * bound) - bound
        self.lora_down = nn.Parameter(down.to(weight.device))
        self.lora_up = nn.Parameter(torch.zeros(len(weight), rank, *(1 for _ in tail), device=weight.device))
        self.dora_scale = nn.Parameter(channel_norm(weight.detach())) if dora else None
        self.scale, self.active = scale, True

    @property
    def rank(self) -> int:
        return len(self.lora_down)

    def rescaled(self, x: Tensor, channels: int) -> Tensor:
        """The input times m / ||V||, which is what DoRA asks of the weight; channels: the dimension of its channels."""
        if self.dora_scale is None:
            return x
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norm = channel_norm(self.weight + self.scale * product(self.lora_up, self.lora_down))
        factor = (self.dora_scale / norm).flatten().to(x.dtype)
        return x * factor.reshape([-1 if d == channels % x.ndim else 1 for d in range(x.ndim)])


class LowRankLinear(LowRank, nn.Linear):
    """A frozen linear layer with a trainable addition."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return F.linear(input, self.weight, self.bias)
        x = self.rescaled(input, -1)
        added = F.linear(F.linear(x, self.lora_down), self.lora_up)
        return F.linear(x, self.weight, self.bias) + self.scale * added


class LowRankConv2d(LowRank, nn.Conv2d):
    """A frozen convolution with a trainable addition: the layer's own kernel to `rank` channels, then 1x1."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return self._conv_forward(input, self.weight, self.bias)
        x = self.rescaled(input, 1)
        added = F.conv2d(self._conv_forward(x, self.lora_down, None), self.lora_up)
        return self._conv_forward(x, self.weight, self.bias) + self.scale * added


def product(up: Tensor, down: Tensor) -> Tensor:
    """B A in the shape of the layer's weight: [out, r, ...] and [r, in, ...] -> [out, in, ...]."""
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def channel_norm(weight: Tensor, channels: int = 1) -> Tensor:
    """||W|| of each input channel (arXiv 2402.09353, section 3.2): [out, in, ...] -> [1, in, 1, ...].

    channels: 0 for the norm of each output channel, [out, 1, ...].
    """
    others = [dimension for dimension in range(weight.ndim) if dimension != channels]
    return torch.linalg.vector_norm(weight, dim=others, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def with_addition(weight: Tensor, addition: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """LoRA's W + scale B A (arXiv 2106.09685, eq. 3), or with a magnitude DoRA's (arXiv 2402.09353, eq. 5).

    addition: scale B A, of the weight's size. magnitude: [1, in, ...], or [out, 1, ...] for the variant that rescales
    output channels.
    """
    changed = weight + addition.reshape(weight.shape)
    if magnitude is None:
        return changed
    norm = channel_norm(changed, 0 if len(magnitude) > 1 else 1)
    return changed * (magnitude.reshape(norm.shape) / norm)


def add_low_rank(
    unet: nn.Module, rank: int, seed: int = 0, *, layers: str = "attention", scale: float = 1.0, dora: bool = False
) -> list[str]:
    """Give layers of a network a low-rank addition, in place; the names of those layers.

    rank: 1 and up, typically 4 to 64; a layer that is narrower gets as many as it has. layers: words of NAMED_LAYERS
    and patterns of names such as `input_blocks.*` or `*.attn1.*`, divided by spaces or commas. scale: of B A, LoRA's
    alpha / rank. seed: of A. The additions are fp32; run a network of half precision under autocast. Raises Problem for
    a rank below 1, a scale of 0, and for layers that are not there, take no addition or have one.
    """
    if rank < 1:
        raise Problem(f"Low rank: expected a rank of at least 1, got {rank}.")
    if not math.isfinite(scale) or scale == 0:
        raise Problem(f"Low rank: expected a scale other than 0, usually 1, got {scale}.")
    generator, chosen = torch.Generator().manual_seed(seed), matching_layers(unet, layers)
    for name, layer in chosen.items():
        if isinstance(layer, LowRank):
            raise Problem(f"Low rank: expected layers without an addition, found one on {name}; name others.")
    for layer in chosen.values():
        cast(Any, layer).__class__ = LowRankLinear if isinstance(layer, nn.Linear) else LowRankConv2d
        cast(LowRank, layer).add(rank, scale, dora, generator)
    return list(chosen)


def matching_layers(network: nn.Module, layers: str) -> dict[str, Layer]:
    """The linear layers and convolutions that `layers` of `add_low_rank` names, in the network's order."""
    words, chosen = re.split(r"[\s,]+", layers.strip(" \t\r\n,")), set()
    found = {name: module for name, module in network.named_modules() if _takes_addition(module)}
    for word in words:
        fits = NAMED_LAYERS.get(word)
        some = {name for name, module in found.items() if (fits or _pattern(word))(name, module)}
        if not some:
            others = [name for name, module in network.named_modules() if name and _pattern(word)(name, module)]
            kinds = f"{others[0]}, which takes none" if others else "none"
            raise Problem(
                f"Low rank: expected {word!r} to name linear layers or convolutions of the network, found {kinds}; "
                f"use {', '.join(NAMED_LAYERS)}, or patterns such as *.attn1.*."
            )
        chosen |= some
    return {name: module for name, module in found.items() if name in chosen}


def _takes_addition(module: nn.Module) -> TypeGuard[Layer]:
    """Whether it is a linear layer or a convolution over all its channels."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _pattern(word: str):
    return lambda name, module: fnmatch.fnmatchcase(name, word)


def low_rank_layers(network: nn.Module) -> dict[str, LowRank]:
    """The layers with an addition, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LowRank)}


@contextmanager
def without_additions(network: nn.Module) -> Iterator[None]:
    """The network as it was before its additions, inside this block."""
    layers = low_rank_layers(network).values()
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer, active in zip(layers, before):
            layer.active = active


@torch.no_grad()
def merged_weights(unet: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The complete weights under LDM keys, with the additions in them (computed in fp64; number formats stay).

    values: tensors to use instead of the module's own, by name, such as an average of the additions.
    """
    own = {**unet.state_dict(), **(values or {})}
    weights = {key: tensor for key, tensor in own.items() if not ADDED.fullmatch(key)}
    for name, layer in low_rank_layers(unet).items():
        weight = weights[f"{name}.weight"]
        # Some devices (MPS) have no fp64.
        parts = [own.get(f"{name}.{part}") for part in ("weight", UP, DOWN, MAGNITUDE)]
        wide, up, down, magnitude = (None if part is None else part.cpu().double() for part in parts)
        assert wide is not None and up is not None and down is not None
        weights[f"{name}.weight"] = with_addition(wide, layer.scale * product(up, down), magnitude).to(weight)
    return weights
