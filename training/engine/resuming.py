"""Which checkpoint a run goes on from, and what is odd about going on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .checkpoints import DamagedCheckpoint, find_checkpoints, latest_checkpoint, load_checkpoint
from .run_settings import RunSettings
from .settings import ConfigProblem

RESUME = (True, False, "auto")
Found = tuple[Path, dict[str, Any]]  # a checkpoint: its file and its state
Pace = Callable[[Any, int], Mapping[str, float]]  # (settings, step) -> what depends on how many steps there are


def checkpoint_to_resume(
    config: RunSettings, folder: Path, resume: bool | str, warn: Callable[[str], None]
) -> Found | None:
    """The checkpoint to go on from, as (file, state), or None to begin anew.

    resume: "auto", True (there must be one) or False (there must be none). Raises ConfigProblem.
    """
    if resume not in RESUME:
        raise ConfigProblem(f"resume: expected True, False or 'auto', found {resume!r}.")
    any_there = find_checkpoints(folder)
    if resume is False and any_there:
        raise ConfigProblem(
            f"{folder}: expected a folder without a run, found its checkpoints (the last of step {any_there[-1][0]}); "
            "resume that run, or choose another name or output."
        )
    found = latest_checkpoint(folder, warn)
    if found is None and any_there:
        raise ConfigProblem(
            f"{folder}: expected a run to resume, found damaged checkpoints only; to start anew, move them away or "
            "choose another name or output."
        )
    if found is None and resume is True:
        raise ConfigProblem(
            f"{folder}: expected a checkpoint to go on from, found none; to begin anew set resume auto (in a terminal: "
            f"`{config.command}` without --resume), or give another run's name or output."
        )
    if found is not None and int(found[1]["step"]) > config.steps:
        return _earlier_checkpoint(config.steps, folder, found, dict(any_there), warn)
    return found


def _earlier_checkpoint(
    steps: int, folder: Path, last: Found, there: dict[int, Path], warn: Callable[[str], None]
) -> Found:
    """The checkpoint of exactly `steps`, of a run that has done more: any stage that was kept can be finished."""
    done = int(last[1]["step"])
    kept = [step for step in there if step <= done]
    if steps in there:
        try:
            found = there[steps], load_checkpoint(there[steps])
        except DamagedCheckpoint as problem:
            kept.remove(steps)
            warn(str(problem))
        else:
            warn(
                f"{folder}: this run has done {done} steps; the finished file is that of step {steps}, and the later "
                "checkpoints stay."
            )
            return found
    raise ConfigProblem(
        f"{last[0]}: expected a run of at most {steps} steps, found one that has done {done}; set steps to a stage "
        f"that was kept ({', '.join(map(str, kept))}), raise it, or choose another name for a shorter run."
    )


def forewarnings(config: RunSettings, before: RunSettings | None, start: int, pace: Pace) -> list[str]:
    """What is odd about the run to come: a rate that only rises, or jumps to another.

    before: the settings of the checkpoint to go on from at step `start`. pace: what optimizer step `step` takes from
    how many steps the run has, by name.
    """
    if start >= config.steps:
        return []
    warnings = []
    if config.warmup >= config.steps:
        warnings.append(
            f"the learning rate rises over {config.warmup} steps, and this run has {config.steps}: it ends at "
            f"{config.steps / config.warmup:.0%} of the rate; lower warmup or raise steps."
        )
    if before is not None and start > 0 and before.steps != config.steps:
        was, planned, now = pace(before, start - 1), pace(before, start), pace(config, start)
        moved = [f"{what} was {was[what]:.3g} and is {now[what]:.3g}" for what in now if now[what] != planned[what]]
        if moved:
            warnings.append(
                f"steps was {before.steps} and is {config.steps}: the run goes on as one of {config.steps} steps does "
                f"there, so that from step {start} to step {start + 1} {' and '.join(moved)}."
            )
    return warnings
