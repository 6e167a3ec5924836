"""A low-rank addition that is worn and taken off: the second critic of variational score distillation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedules import GuidanceError

__all__ = ["ATTENTION_PROJECTION", "LowRankAddition"]

ATTENTION_PROJECTION = r"(.*\.)?attn[12]\.(to_q|to_k|to_v|to_out\.0)"


class LowRankAddition:
    """W + (alpha / r) B A (arXiv 2106.09685, section 4.1) on some linear layers of a network, only while `attached`.

    The network itself is never changed: hooks add B A x to its layers' outputs. layers: a regular expression that a
    layer's whole name must match. A is uniform within 1 / sqrt(in) from `seed`, B zero, both float32 whatever the
    network's precision. Raises GuidanceError for a rank below 1 and where no linear layer matches.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int = 4,
        alpha: float | None = None,
        layers: str = ATTENTION_PROJECTION,
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise GuidanceError(f"Expected a low-rank critic of rank 1 or more, got {rank}.")
        wanted = re.compile(layers)
        self._layers = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and wanted.fullmatch(name)
        }
        if not self._layers:
            raise GuidanceError("Expected linear layers for the low-rank critic, found none in the network by name.")
        self.scale = (rank if alpha is None else alpha) / rank
        generator = torch.Generator().manual_seed(seed)
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        for name, module in self._layers.items():
            bound = 1 / math.sqrt(module.in_features)
            down = torch.rand(rank, module.in_features, generator=generator) * (2 * bound) - bound
            device = module.weight.device
            self.down[name] = down.to(device).requires_grad_()
            self.up[name] = torch.zeros(module.out_features, rank, device=device).requires_grad_()

    def tensors(self) -> dict[str, Tensor]:
        """All trainable tensors by name."""
        return {
            **{f"{name}.lora_down": tensor for name, tensor in self.down.items()},
            **{f"{name}.lora_up": tensor for name, tensor in self.up.items()},
        }

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The network with the addition, inside this block."""
        handles = []
        try:
            for name, module in self._layers.items():
                handles.append(module.register_forward_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):
        def add(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            down, up = (tensor.to(output.device) for tensor in (self.down[name], self.up[name]))
            added = F.linear(F.linear(inputs[0].to(down.dtype), down), up)
            return output + (added * self.scale).to(output.dtype)

        return add
