"""AdamW, its 8-bit variant, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .run_settings import RunSettings
from .settings import ConfigProblem

EPS = 1e-8  # added to Adam's denominator


def check_optimizer(name: str) -> None:
    """Raise ConfigProblem for an optimizer whose package is missing or broken."""
    if name == "adamw8bit":
        _adamw8bit()


def _adamw8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigProblem(
            "optimizer: adamw8bit needs the package bitsandbytes, which is not installed; pip install bitsandbytes, or "
            "choose adamw."
        ) from error
    return AdamW8bit


def build_optimizer(
    config: RunSettings, parameters: Iterable[nn.Parameter], name: str = "adamw", weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over the parameters; weight decay spares vectors (biases and norms).

    "adamw8bit" keeps its state in 8 bits (arXiv 2110.02861) and needs the optional package bitsandbytes. Raises
    ConfigProblem where that is missing.
    """
    parameters = list(parameters)
    groups = [
        {"params": [weight for weight in parameters if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in parameters if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": EPS}
    if name == "adamw8bit":
        return _adamw8bit()(groups, **options)
    # One pass over the weights instead of a dozen; every backend this runs on has it for fp32.
    fused = all(weight.device.type in ("cpu", "cuda", "mps", "xpu") for weight in parameters)
    try:
        return torch.optim.AdamW(groups, fused=fused, **options)
    except RuntimeError:  # an older torch without it for this device
        return torch.optim.AdamW(groups, **options)


def rate_at(config: RunSettings, step: int) -> float:
    """The learning rate of optimizer step `step` (0 is the first).

    It rises linearly over `warmup` steps to the peak at step `warmup` - 1, then stays ("constant") or falls as half a
    cosine or a straight line that reaches 0 after the last step. It follows from the settings alone: a run that goes on
    with other `steps` has the rate of a run of so many steps, higher than before where they were raised.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate


def restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state from a checkpoint, whose tensors it would otherwise adopt as they lie in the file."""
    own = {
        key: {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
        for key, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})
