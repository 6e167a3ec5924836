"""A low-rank addition that can be attached and removed: the second critic of variational score distillation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GuidanceError
from ..networks.low_rank import ATTENTION_PROJECTION


class LowRankAddition:
    """W + B A (arXiv 2106.09685, section 4.1, with alpha = r) on some linear layers of a network, while `attached`.

    The network itself is never changed: hooks add B A x to its layers' outputs. layers: a regular expression that a
    layer's whole name must match. A is uniform within 1 / sqrt(in) from `seed`, B zero, both float32 whatever the
    network's precision. Raises GuidanceError for a rank below 1 and where no linear layer matches.
    """

    def __init__(
        self, network: nn.Module, rank: int = 4, layers: str = ATTENTION_PROJECTION.pattern, seed: int = 0
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
        generator = torch.Generator().manual_seed(seed)
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            bound, device = 1 / math.sqrt(layer.in_features), layer.weight.device
            down = torch.rand(rank, layer.in_features, generator=generator) * (2 * bound) - bound
            self.down[name] = down.to(device).requires_grad_()
            self.up[name] = torch.zeros(layer.out_features, rank, device=device).requires_grad_()

    def tensors(self) -> dict[str, Tensor]:
        """All trainable tensors by name."""
        return {
            **{f"{name}.lora_down": tensor for name, tensor in self.down.items()},
            **{f"{name}.lora_up": tensor for name, tensor in self.up.items()},
        }

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The network with the addition, inside this block."""
        with ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.callback(layer.register_forward_hook(self._hook(name)).remove)
            yield

    def _hook(self, name: str):
        def add(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            down, up = (tensor.to(output.device) for tensor in (self.down[name], self.up[name]))
            return output + F.linear(F.linear(inputs[0].to(down.dtype), down), up).to(output.dtype)

        return add
