"""The exponential moving average of the trained weights, which is what gets sampled and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def ema_decay(limit: float, updates: int) -> float:
    """The decay of update number `updates` (0 is the first): min(limit, (1 + n) / (10 + n)).

    The warm-up makes a young average forget the starting weights; after (10 limit - 1) / (1 - limit) updates it is
    `limit` (8,990 for 0.999).
    """
    return min(limit, (1 + updates) / (10 + updates))


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the parameters have these values, by name; then their own again, exactly."""
    before = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(parameters[name])
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value


class WeightAverage:
    """fp32 average of named parameters; parameters that do not train are not averaged."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], limit: float) -> None:
        self.limit, self.updates = limit, 0
        self._parameters = dict(parameters)
        self.average = {name: weight.detach().float().clone() for name, weight in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay average + (1 - decay) weights."""
        decay = ema_decay(self.limit, self.updates)
        current = [weight.detach().float() for weight in self._parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self.updates += 1

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates, **{f"average.{name}": mean for name, mean in self.average.items()}}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        for name, mean in self.average.items():
            mean.copy_(state[f"average.{name}"])
