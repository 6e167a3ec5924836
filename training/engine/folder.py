"""A run's folder: what lies in it under which name, and what goes when a run was refused."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from .checkpoints import FOLDER, find_checkpoints
from .events import Saved
from .log import read_log

CONFIG, LOG, PLOT = WRITTEN = ("config.json", "log.jsonl", "loss.png")
SAMPLES, BOARD = "samples", "tensorboard"
GRID_NAME = re.compile(r"step-(\d{6,})\.png")


def samples_path(folder: Path, step: int) -> Path:
    """Where the sample grid of a step is: RUN/samples/step-000250.png."""
    return folder / SAMPLES / f"step-{step:06d}.png"


def last_samples(folder: Path, step: int) -> Path | None:
    """The last sample grid up to a step; None without any. An earlier run may have left some of later steps."""
    names = (GRID_NAME.fullmatch(path.name) for path in (folder / SAMPLES).glob("step-*.png"))
    last = max((int(name[1]) for name in names if name and int(name[1]) <= step), default=None)
    return None if last is None else samples_path(folder, last)


def has_saved(folder: Path, name: str) -> bool:
    """Whether the run of that name in a folder ever saved something, by its checkpoints, finished file and log."""
    if find_checkpoints(folder) or (folder / f"{name}.safetensors").exists():
        return True
    return any(isinstance(event, Saved) for event in read_log(folder / LOG))


def clear_refused(folder: Path) -> None:
    """Delete what a run wrote into its folder before it was refused; what others put there stays."""
    for name in WRITTEN:
        with suppress(OSError):
            (folder / name).unlink()
    for name in (SAMPLES, FOLDER, BOARD):
        shutil.rmtree(folder / name, ignore_errors=True)
