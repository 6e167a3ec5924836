"""Checkpoints to resume from: written completely or not at all, the last K kept, damaged ones noticed by name.

A checkpoint is a torch zip file followed by 40 bytes: a mark and the SHA-256 of everything before it. torch reads the
file as it is; the digest tells a torn or altered file from a whole one. Files are read as plain data, like other
torch files: anybody can compute a digest.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from ...guidance.errors import printable
from ...guidance.files import FileProblem
from ...guidance.files.atomic import replacing
from ...guidance.files.file_check import RUN_MARK as MARK
from ...guidance.files.file_check import RUN_TRAILER as TRAILER
from ...guidance.files.inert_pickle import Refused
from ...guidance.files.torch_pickle import read_torch_pickle
from .small_files import open_regular

FORMAT, VERSION = "indomain_guidance_checkpoint", 1
FOLDER, NAME = "checkpoints", re.compile(r"step-(\d+)\.ckpt")
# What a state must hold to be resumed from; see `Learner.state`.
FIELDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "config": (dict,),
    "facts": (dict,),
    "weights": (dict,),
    "average": (dict, type(None)),
    "optimizer": (dict,),
    "scaler": (dict, type(None)),
}


class CheckpointProblem(FileProblem):
    """A checkpoint that cannot be used, in one sentence that names the file."""


class DamagedCheckpoint(CheckpointProblem):
    """One that nothing can be read from: torn, altered, or no checkpoint at all. An earlier one may be used instead."""


class _Hashing:
    """A file opened for writing that hashes what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.problem = error
            raise

    def flush(self) -> None:
        self.file.flush()


def checkpoint_path(run: str | os.PathLike, step: int) -> Path:
    """Where the run's checkpoint of a step is: RUN/checkpoints/step-000250.ckpt."""
    return Path(run) / FOLDER / f"step-{step:06d}.ckpt"


def save_checkpoint(path: str | os.PathLike, state: Mapping[str, Any]) -> Path:
    """Write a state (nested dicts of tensors and plain values); what was at `path` stays until the new one is complete.

    Raises FileProblem when it cannot be written.
    """
    path = Path(path)
    with replacing(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, cast("IO[bytes]", hashing))
        except RuntimeError:  # torch wraps a full disk into its own error; others, of the device, stay what they are
            if hashing.problem is None:
                raise
            raise hashing.problem from None
        file.write(MARK + hashing.digest.digest())
    return path


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The state of a checkpoint on the CPU; its tensors lie in the file until they are read.

    Raises DamagedCheckpoint for a file that is torn, altered or of another program; CheckpointProblem for one that is
    missing, cannot be read now, or was written by another version.
    """
    path = Path(path)
    try:
        _check_digest(path)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointProblem(f"{path}: cannot be read ({reason}); move it away to go on.") from error
    try:
        state = read_torch_pickle(path, TRAILER, mapped=True)
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or repr(error)
        raise CheckpointProblem(f"{path}: cannot be read ({reason}).") from error
    except Refused as error:
        raise DamagedCheckpoint(f"{path}: cannot be read as a checkpoint ({error}).") from None
    if type(state) is not dict or state.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: expected a checkpoint of this trainer, found something else.")
    if type(state.get("version")) is not int or state["version"] != VERSION:
        raise CheckpointProblem(
            f"{path}: expected a checkpoint of version {VERSION}, found {state.get('version')}; resume with the "
            "program that wrote it."
        )
    for name, kinds in FIELDS.items():
        if type(state.get(name)) not in kinds:
            raise _other(path, name)
    for name, kind in (("weights", torch.Tensor), ("facts", str)):
        if not all(isinstance(value, kind) for value in state[name].values()):
            raise _other(path, name)
    if state["step"] < 0:
        raise _other(path, "step")
    return state


def _other(path: Path, name: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: expected a checkpoint of this trainer, found none or another {name} in it.")


def find_checkpoints(run: str | os.PathLike) -> list[tuple[int, Path]]:
    """(step, file) of the run's checkpoints, oldest step first; damaged ones included. No folder is none.

    Raises CheckpointProblem for a folder that cannot be listed: nobody knows then whether a run would be overwritten.
    """
    folder = Path(run) / FOLDER
    try:
        found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointProblem(
            f"{folder}: cannot be listed ({error.strerror or error}); check its permissions, or name another output."
        ) from error
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_checkpoint(
    run: str | os.PathLike, warn: Callable[[str], None] = lambda text: None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be used; each newer one that is damaged is named through `warn`. None without any.

    Raises CheckpointProblem for one that may be good and cannot be read here and now (permissions, a network drive,
    another version): going on from an earlier one would replace it.
    """
    for _, path in reversed(find_checkpoints(run)):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as problem:
            warn(f"{str(problem).rstrip('.')}; an earlier checkpoint is used, if there is one.")
    return None


def prune_checkpoints(run: str | os.PathLike, step: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to `step`.

    Later ones are left alone: they are not this run's (a damaged file, or one of a run that was set back).
    """
    past: list[Path] = []
    with suppress(CheckpointProblem):  # the next turn takes them
        past = [path for at, path in find_checkpoints(run) if at <= step]
    for path in past[:-keep]:
        with suppress(OSError):  # somebody reads it, on Windows; the next turn takes it
            path.unlink()


def machine_facts(device: torch.device | str = "cpu", processes: int = 1) -> dict[str, str]:
    """What the exact bits of a run depend on beside its configuration."""
    device = torch.device(device)
    facts = {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
        "device": device.type,
        "processes": str(processes),
    }
    if device.type == "cpu":
        facts["cpu"] = torch.backends.cpu.get_cpu_capability()
    elif device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    return facts


def different_facts(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The facts that changed, as text ("torch 2.5.0 -> 2.6.0, threads 4 -> 8"); empty when none did."""
    names = dict.fromkeys([*before, *now])
    changed = [name for name in names if before.get(name) != now.get(name)]
    return printable(
        ", ".join(f"{name} {before.get(name, 'unknown')} -> {now.get(name, 'unknown')}" for name in changed), 200
    )


def _check_digest(path: Path) -> None:
    """Raise DamagedCheckpoint unless the digest at the end is that of the rest."""
    size = path.stat().st_size - TRAILER
    digest = hashlib.sha256()
    with open_regular(path) as file:
        file.seek(max(0, size))
        trailer = file.read(TRAILER)
        if size < 0 or not trailer.startswith(MARK):
            raise DamagedCheckpoint(
                f"{path}: expected a checkpoint of this trainer, found another file or one cut off while it was "
                "written."
            )
        file.seek(0)
        while size > 0 and (chunk := file.read(min(size, 1 << 22))):
            digest.update(chunk)
            size -= len(chunk)
    if digest.digest() != trailer[len(MARK) :]:
        raise DamagedCheckpoint(f"{path}: expected the checkpoint that was written, found one damaged since.")
