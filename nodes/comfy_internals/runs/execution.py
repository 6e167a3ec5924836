"""One run from its start to its end: memory is freed around it, and a cancel ends the node as ComfyUI expects."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import comfy.model_management

from ....guidance.errors import Problem
from .progress import RunProgress

if TYPE_CHECKING:
    from ....training.engine.run import Result
    from ....training.engine.run_settings import RunSettings


def free_memory() -> None:
    """Move ComfyUI's models out of the accelerator and give its memory back."""
    # Models without references leave core's list when they are collected; while core walks along the list, that would
    # end the prompt with an error.
    gc.collect()
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def finish_run(
    node: str, config: RunSettings, progress: RunProgress, learn: Callable[[], Result]
) -> tuple[Result, list[str]]:
    """(result, warnings) of `learn`, with memory freed before and after it.

    A cancelled run is saved, and then ends as ComfyUI's other nodes end when they are cancelled; one that was in its
    last step finishes, and what follows it in the graph is cancelled. Raises ValueError in one sentence for memory that
    does not suffice, and for a run that something other than ComfyUI's cancel stopped.
    """
    from ....training.engine.memory import memory_problem

    free_memory()
    try:
        result = learn()
    except (RuntimeError, MemoryError) as problem:
        message = memory_problem(problem, config)
        if message is None:
            raise
        # The traceback holds the tensors of the step that did not fit.
        raise Problem(message) from problem.with_traceback(None)
    finally:
        free_memory()
    if result.status == "stopped":
        progress.raise_if_cancelled()
        # The system stopped it; a file of that name, from an older run, is not its result.
        where = f"at step {result.step} and saved in {result.run}" if result.step else "before its first step"
        raise Problem(f"{node}: was stopped {where}; run again to continue.")
    progress.pass_on()
    return result, progress.warnings
