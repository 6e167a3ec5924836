"""One run from its start to its end: its folder, its finished file, the memory around it, and ComfyUI's cancel."""

from __future__ import annotations

import gc
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management

from ....guidance.errors import Problem
from ....guidance.files import FileProblem
from ..progress import RunProgress, uncancelled

if TYPE_CHECKING:
    from ....training.engine.run import Result
    from ....training.engine.run_settings import RunSettings


def finished_file(config: RunSettings) -> Path:
    """Where the finished file of a run is put for ComfyUI."""
    return Path(config.export_to) / f"{config.name}.safetensors"


def check_claim(config: RunSettings, replaceable: Callable[[Path], bool] = lambda path: False) -> None:
    """Refuse to replace a finished file that another run made; `replaceable`: one that may be, whoever made it.

    A file is the run's own once the run has checkpoints, or when the weights are those it finished with.
    """
    from ....training.engine.checkpoints import find_checkpoints

    path, own = finished_file(config), config.run_folder / f"{config.name}.safetensors"
    if not path.exists() or find_checkpoints(config.run_folder):
        return
    if own.is_file() and own.stat().st_size == path.stat().st_size and _weights_digest(own) == _weights_digest(path):
        return
    if not replaceable(path):
        raise FileProblem(
            f"{path}: expected no file under this name, found one that this run did not make; choose another name "
            "or move the file away."
        )


def _weights_digest(path: Path) -> bytes:
    """SHA-256 of a .safetensors file without its header, which holds the time of writing."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for chunk in uncancelled(iter(lambda: file.read(1 << 22), b"")):
            digest.update(chunk)
    return digest.digest()


@contextmanager
def run_folder(folder: Path, name: str) -> Iterator[None]:
    """Around a run and what is written into its folder: a run that is refused leaves no new folder behind."""
    from ....training.engine.folder import has_saved
    from ....training.engine.lock import locked

    new = not folder.exists()
    try:
        yield
    except Problem:
        with suppress(Problem):  # another run has locked it by now
            if new and folder.is_dir() and not has_saved(folder, name):
                with locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        raise


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
    last step finishes, and what follows it in the graph is cancelled. Raises Problem for memory that does not suffice,
    and for a run that something else stopped.
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
