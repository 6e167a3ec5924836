"""The plain resumable training loop of the mini world's recipe: AdamW, one-cycle rate, EMA, atomic checkpoints.

The production trainer is a different thing; this one exists so that every shipped weight can be made again from a seed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Generator, Tensor, nn

from ....guidance.errors import Problem
from ....guidance.files import FileProblem
from ....guidance.files.atomic import replacing
from ....guidance.files.tensors import load_checkpoint

SECONDS_BETWEEN_LINES = 20.0  # of progress, where there is no terminal to overwrite one in


@dataclass(frozen=True)
class LoopConfig:
    """What one stage trains with; ``rate`` is the peak of a one-cycle schedule, ``ema`` 0 keeps no average."""

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


def step_generator(seed: int, step: int) -> Generator:
    """Randomness of one step, a function of (seed, step) alone: a resumed run draws what the first would have."""
    return Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)


def one_cycle(progress: float, warmup: float) -> float:
    """Share of the peak rate at a progress in 0..1: linear rise over ``warmup``, then half a cosine down to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.04)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1.0 - warmup))


def save_atomically(state: object, path: Path) -> None:
    """torch.save to a temporary name in the same folder, flushed, then renamed."""
    with replacing(path) as file:
        torch.save(state, file)


def load_saved(path: Path) -> dict:
    """What :func:`save_atomically` wrote. Raises FileProblem for a damaged or a foreign file."""
    try:
        state = load_checkpoint(Path(path), "delete it to make it again")
        if not isinstance(state, dict):
            raise Problem(f"holds a {type(state).__name__}")
        return state
    except Problem as error:
        raise FileProblem(
            f"{path}: expected a file of this recipe, found something unreadable ({error}); delete it to make it again."
        ) from error


def made_once(path: Path, source: str, make: Callable[[], object]) -> Any:
    """What ``make`` returns, kept in the file ``path`` with ``source``, which says what it is made of.

    A result of another source is made again. A continued run gets the same bits, which measuring would not promise.
    """
    if path.exists():
        kept = load_saved(path)
        if kept.get("source") == source:
            return kept["result"]
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically({"result": result, "source": source}, path)
    return result


def weights_hash(*modules: nn.Module) -> str:
    """SHA-256 (hex) over names, shapes and fp32 bytes of the modules' tensors."""
    digest = hashlib.sha256()
    for module in modules:
        for key, value in module.state_dict().items():
            digest.update(f"{key} {list(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Progress:
    """One status line on standard error: name, bar, step, loss, time left; ``first`` were done before it started."""

    def __init__(self, name: str, total: int, stream: TextIO = sys.stderr, first: int = 0) -> None:
        self.name, self.total, self.stream, self.started, self.first = name, total, stream, time.monotonic(), first
        self.live, self.said = stream.isatty(), self.started

    def update(self, done: int, note: str) -> None:
        now = time.monotonic()
        if not self.live and done != self.total and now - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said = now
        left = (now - self.started) / max(1, done - self.first) * (self.total - done)
        bar = "#" * (24 * done // self.total)
        self.stream.write(
            f"{self.name} [{bar:<24}] {done}/{self.total} {note} {left / 60:.1f} min left"
            + ("\r" if self.live and done < self.total else "\n")
        )
        self.stream.flush()


def run_loop(
    config: LoopConfig,
    model: nn.Module,
    loss_of: Callable[[nn.Module, Generator, int], tuple[Tensor, dict[str, float]]],
    folder: Path,
) -> nn.Module:
    """Train ``model`` in place, resuming from ``folder/NAME.ckpt``; returns the EMA copy if there is one, else it.

    loss_of(model, generator, step) -> (scalar loss, numbers to log). Raises RuntimeError at a non-finite loss and
    FileProblem for a checkpoint that is damaged or of a run with another seed, length or rate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{config.name}.ckpt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    start = 0
    if checkpoint.exists():
        state = load_saved(checkpoint)
        check_same_run(checkpoint, state.get("settings"), config)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        start = state["step"]
    progress = Progress(config.name, config.steps, first=start)
    model.train()
    with open(folder / f"{config.name}.jsonl", "a", encoding="utf-8") as log:
        for step in range(start, config.steps):
            generator = step_generator(config.seed, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                loss, numbers = loss_of(model, generator, step)
            if not torch.isfinite(loss):
                raise Problem(
                    f"the loss of {config.name} became {loss.item()} at step {step}; "
                    f"the last checkpoint is {checkpoint}, lower the learning rate and run again"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.clip)
            for group in optimizer.param_groups:
                group["lr"] = config.rate * one_cycle(step / config.steps, config.warmup)
            optimizer.step()
            if average is not None:
                decay = min(config.ema, (step + 1) / (step + 10))  # warm-up: a young average forgets faster
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
            done = step + 1
            if done % 25 == 0:
                log.write(json.dumps({"step": done, "loss": loss.item(), **numbers}) + "\n")
                log.flush()
            progress.update(done, f"loss {loss.item():.4f}")
            if done % config.save_every == 0 or done == config.steps:
                save_atomically(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "average": average.state_dict() if average is not None else None,
                        "step": done,
                        "settings": settings_of(config),
                    },
                    checkpoint,
                )
    return (average if average is not None else model).eval()


def settings_of(config: LoopConfig) -> dict[str, int | float | bool]:
    """What decides a run's numbers; how often it saves does not."""
    return {key: value for key, value in asdict(config).items() if key not in ("name", "save_every")}


def check_same_run(checkpoint: Path, found: dict | None, config: LoopConfig) -> None:
    """Raise FileProblem unless the settings ``found`` in a checkpoint are those of ``config``."""
    expected = settings_of(config)
    if found == expected:
        return
    wrong = next((key for key in expected if (found or {}).get(key) != expected[key]), "settings")
    raise FileProblem(
        f"{checkpoint}: expected a run with {wrong} {expected.get(wrong)}, found "
        f"{(found or {}).get(wrong, 'none recorded')}; use another working folder or delete the file"
    )
