"""Model files of unknown origin: safetensors and pickles behind one reader, with every fault named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FileProblem, first_line
from .file_check import existing_file
from .inert_pickle import Refused, shown
from .nested import all_names
from .safetensors_file import read_header, read_safetensors
from .torch_pickle import names_part, read_torch_pickle

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class ModelFile:
    """A `.safetensors` file, or a pickle (`.pt`, `.pth`, `.bin`, `.ckpt`) read as plain data.

    Its header, or the pickle's content, is read once and kept. metadata: the string metadata, empty for pickles. keys:
    the tensors' names; for a pickle without tensors at its top the names nested deeper, which say what it is. Raises
    FileProblem when the file is missing, truncated or of another format.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = existing_file(path)
        self._pickled: dict[str, Tensor] | None = None
        self.metadata: dict[str, str] = {}
        nested: list[str] = []
        if _looks_pickled(self.path):
            self._pickled, nested = _read_pickle(self.path)
            self._shapes = {key: (tuple(value.shape), str(value.dtype)[6:]) for key, value in self._pickled.items()}
        else:
            self.metadata, self._shapes = read_header(self.path)
        self.keys: list[str] = list(self._shapes or nested)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and number format (as the file calls it) of every tensor; for `.safetensors` from the header alone."""
        return self._shapes

    def tensors(self, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
        """The tensors whose keys start with `prefix`, without it ("" keeps all). Raises FileProblem for none."""
        if self._pickled is None:
            tensors = read_safetensors(self.path, prefix, device)
        else:
            found = self._pickled.items()
            tensors = {key.removeprefix(prefix): value.to(device) for key, value in found if key.startswith(prefix)}
        if not tensors:
            under = f" under '{prefix}'" if prefix else ""
            raise FileProblem(f"{self.path}: expected weights{under}, found none; use another file.")
        return tensors


def read_state_dict(path: str | os.PathLike, *, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file whose keys start with `prefix`, without it; see `ModelFile`."""
    return ModelFile(path).tensors(prefix, device)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The string metadata of a `.safetensors` file, without reading its tensors; empty for pickles."""
    path = existing_file(path)
    return {} if _looks_pickled(path) else read_header(path)[0]


def read_keys(path: str | os.PathLike) -> list[str]:
    """The tensor names in a file; for `.safetensors` without reading the tensors."""
    return ModelFile(path).keys


def load_checkpoint(path: Path, advice: str) -> Any:
    """What a torch checkpoint (both formats of `torch.save`) holds, read as plain data. Raises FileProblem.

    advice: what to do where it cannot be read safely, a clause without its full stop.
    """
    try:
        return read_torch_pickle(path)
    except Refused as problem:
        names = names_part(path)
        if b"_modules" in names and b"_parameters" in names:
            raise FileProblem(
                f"{path}: expected a checkpoint of plain tensors, found a whole module, which only the code that saved "
                f"it can read ({problem}); save its state_dict() there."
            ) from None
        raise FileProblem(
            f"{path}: expected a checkpoint of plain tensors, found one that cannot be read safely ({problem}); "
            f"{advice}."
        ) from None
    except (MemoryError, OSError) as error:
        raise FileProblem(
            f"{path}: the file could not be read ({shown(first_line(error))}); it is damaged or too large for this "
            "computer."
        ) from error


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # many a .safetensors file was renamed; its own header is the safer way to read it
        return False
    pickled = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
    return path.suffix.lower() in PICKLE_SUFFIXES or start.startswith(pickled)


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors at the top or in `state_dict`; where there are none, the names of those nested deeper."""
    loaded = load_checkpoint(path, "get the model as .safetensors from a source you trust")
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise FileProblem(f"{path}: expected a pickled dictionary of tensors, found {type(loaded).__name__}.")
    # Tuples as keys may hold one long text a thousand times.
    named = {str(key): value for key, value in loaded.items() if isinstance(key, (str, int))}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    return tensors, [] if tensors else all_names(loaded)
