"""The plain resumable training loop of the mini world's recipe: atomic checkpoints, AdamW, one-cycle rate, an average.

The trainers of users change with their needs; this loop stays, so that every shipped weight can be made again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from ....guidance.errors import Problem
from ....guidance.files import FileProblem
from ...engine.average import ema_decay
from ..render import step_generator
from .kept_files import load_saved, save_atomically
from .status_line import StatusLine

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoopConfig:
    """Settings of one stage; ``rate`` is the peak of a one-cycle schedule, ``ema`` 0 keeps no average."""

    name: str
    steps: int
    rate: float
    seed: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    save_every: int = 100
    bf16: bool = True


def one_cycle(progress: float, warmup: float) -> float:
    """Share of the peak rate at a progress in 0..1: linear rise over ``warmup``, then half a cosine down to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.04)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1.0 - warmup))


def run_steps(
    config: LoopConfig,
    parts: Mapping[str, nn.Module | Optimizer],
    take_step: Callable[[Generator, int], dict[str, float]],
    folder: Path,
) -> None:
    """Take the steps of a run that are left; ``parts`` continue from ``folder/NAME.ckpt`` and are saved there.

    take_step(generator, step) changes the parts and returns its losses and other numbers, to be shown. Raises Problem
    at a number that is not finite, and FileProblem for a checkpoint that is damaged or of a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, start = folder / f"{config.name}.ckpt", 0
    # What decides a run's numbers; how often it saves does not.
    settings = {key: value for key, value in asdict(config).items() if key not in ("name", "save_every")}
    if checkpoint.exists():
        state = load_saved(checkpoint)
        found = state.get("settings") or {}
        wrong = next((key for key in settings if found.get(key) != settings[key]), None)
        if wrong is not None:
            raise FileProblem(
                f"{checkpoint}: expected a run with {wrong} {settings[wrong]}, found {found.get(wrong)}; use another "
                "working folder or delete the file"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start = state["step"]
    status = StatusLine(config.name, first=start)
    for step in range(start, config.steps):
        numbers, done = take_step(step_generator(config.seed, step), step), step + 1
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise Problem(f"{name} of {config.name} became {value} at step {step}; lower the learning rate")
        status.update(done, config.steps, ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
        if done % config.save_every == 0 or done == config.steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            save_atomically({**state, "step": done, "settings": settings}, checkpoint)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, ema: float, step: int) -> None:
    """Move the average of the weights towards the model's."""
    for kept, new in zip(average.parameters(), model.parameters()):
        kept.lerp_(new, 1.0 - ema_decay(ema, step))


def run_loop(
    config: LoopConfig,
    model: Model,
    loss_of: Callable[[Model, Generator, int], tuple[Tensor, dict[str, float]]],
    folder: Path,
) -> Model:
    """Train ``model`` in place, see `run_steps`; returns the average of its weights if there is one, else it.

    loss_of(model, generator, step) -> (scalar loss, further numbers to show).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    parts = {"model": model, "optimizer": optimizer, **({"average": average} if average is not None else {})}
    model.train()

    def take_step(generator: Generator, step: int) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss, numbers = loss_of(model, generator, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.rate * one_cycle(step / config.steps, config.warmup)
        optimizer.step()
        if average is not None:
            update_average(average, model, config.ema, step)
        return {"loss": loss.item(), **numbers}

    run_steps(config, parts, take_step, folder)
    return (model if average is None else average).eval()
