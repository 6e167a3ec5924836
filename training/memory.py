"""Errors that mean that memory ran out, of every device's allocator, and what a user can do about them."""

from __future__ import annotations

import torch

from .adapt_config import AdaptConfig
from .config import TrainConfig


def is_memory_problem(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; the CPU's and some devices' allocators say so in words only."""
    words = str(error).lower()
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        sign in words for sign in ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate")
    )


def memory_problem(error: BaseException, config: TrainConfig | AdaptConfig) -> str | None:
    """One sentence when `error` says that memory ran out, else None."""
    if not is_memory_problem(error):
        return None
    if isinstance(config, AdaptConfig):
        side = f" at {config.resolution} px" if config.resolution else ""
        return (
            f"Adapting ran out of memory with batch size {config.batch_size}{side}; use a smaller batch size or a "
            "lower resolution in a run of another name, or gradient checkpointing, with which this one can go on."
        )
    return (
        f"Training ran out of memory with batch size {config.batch_size} at {config.resolution} px; use gradient "
        "checkpointing, with which this run can go on, or in a run of another name a smaller batch size with more "
        "accumulation, the form constant, train low_rank at learning_rate 1e-4, or a lower resolution."
    )
