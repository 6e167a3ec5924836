"""Files that a stopped run of the recipe continues from: written whole or not at all, and refused when damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....guidance.errors import Problem
from ....guidance.files import FileProblem
from ....guidance.files.atomic import replacing
from ....guidance.files.model_file import load_checkpoint


def save_atomically(state: object, path: Path) -> None:
    """torch.save to a temporary name in the same folder, flushed, then renamed."""
    with replacing(path) as file:
        torch.save(state, file)


def load_saved(path: Path) -> dict:
    """What `save_atomically` wrote. Raises FileProblem for a damaged or a foreign file."""
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
    """What ``make`` returns, kept in the file ``path`` with ``source``, a text that says what it was made from.

    A result of another source is made again. A continued run gets the same bits, which making it anew need not give.
    """
    if path.exists():
        kept = load_saved(path)
        if kept.get("source") == source:
            return kept["result"]
    result = make()
    save_atomically({"result": result, "source": source}, path)
    return result


def weights_hash(*modules: nn.Module) -> str:
    """SHA-256 (hex) over the names, shapes and fp32 bytes of the modules' tensors."""
    digest = hashlib.sha256()
    for module in modules:
        for key, value in module.state_dict().items():
            digest.update(f"{key} {list(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
