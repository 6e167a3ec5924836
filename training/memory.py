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
            f"Adapting ran out of memory with batch size {config.batch_size}{side}; use a smaller batch size, gradient "
            "checkpointing, or a lower resolution."
        )
    return (
        f"Training ran out of memory with batch size {config.batch_size} at {config.resolution} px; use a smaller batch "
        "size with more accumulation, gradient checkpointing, the form constant, train low_rank, or a lower resolution."
    )
