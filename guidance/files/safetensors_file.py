"""Safetensors files: opened with the format's own library, every fault named, and written atomically.

The library checks the header against the size of the file. The format guards against code and overlapping tensors, not
against NaN, hence `check_finite` in weights.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileProblem, Problem, first_line
from .atomic import temporary_path

HEADER_LIMIT = 2**25  # bytes; the format allows 100 million, models have thousands, and notes in them a few million
MOST_TENSORS = 50_000  # of one file; SDXL has 2,500, the largest language models have as many as this
MOST_DIMENSIONS = 64  # of a tensor, for torch; the library, which counts its numbers alone, takes more


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file, open. Raises FileProblem for another format and a file that is damaged or cut off."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as start:
        length, bracket = int.from_bytes(start.read(8), "little"), start.read(1)
    if bracket != b"{":
        raise FileProblem(f"{path}: expected a safetensors file, found something else; use a .safetensors file.")
    if HEADER_LIMIT < length <= path.stat().st_size:
        raise FileProblem(
            f"{path}: expected a header of at most {HEADER_LIMIT >> 20} MiB, found one of {length >> 20} MiB; write "
            "the file with fewer notes."
        )
    try:
        str(path).encode()
        with safe_open(str(path), framework="pt", device=device) as file:
            if len(file.keys()) > MOST_TENSORS:
                raise FileProblem(
                    f"{path}: expected at most {MOST_TENSORS} tensors, found {len(file.keys())}; use another file."
                )
            for key in file.keys():  # noqa: SIM118
                _check_shape(file.get_slice(key).get_shape())
            yield file
    except (torch.cuda.OutOfMemoryError, FileProblem):
        raise
    except UnicodeEncodeError:  # bytes of a name that Python could only keep as halves of characters
        raise FileProblem(
            f"{path}: expected a file whose path is UTF-8, which safetensors needs, found another; rename it."
        ) from None
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, AttributeError, KeyError) as error:
        raise FileProblem(
            f"{path}: expected a safetensors file, found a damaged or truncated one ({first_line(error)}); download or "
            "copy it again."
        ) from error


def _check_shape(shape: Sequence[int]) -> None:
    """Raise Problem for a shape that torch does not take; a tensor without numbers may claim any."""
    if len(shape) > MOST_DIMENSIONS:
        raise Problem(f"a tensor of {len(shape)} dimensions, more than torch takes")
    if math.prod(max(size, 1) for size in shape) >= 2**60:
        raise Problem("a tensor of more numbers than its bytes hold")


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[tuple[int, ...], str]]]:
    """The string metadata, and the shape and number format of every tensor by its name, without reading tensors."""
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        entries = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        return dict(file.metadata() or {}), entries


def read_safetensors(path: Path, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """The tensors whose keys start with `prefix`, without it."""
    with _opened(path, device) as file:
        return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a `.safetensors` file atomically: at any moment the old file or the complete new one is there.

    Tensors of any device, stride or sharing are accepted. Returns the path. Raises Problem for metadata that are not
    strings, and FileProblem when the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise Problem(f"{path}: metadata must be strings; {key!r} is not.")
    plain, seen = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        plain[key] = tensor if whole and place not in seen else tensor.clone()
        seen.add(place)
    with temporary_path(path) as temporary:
        try:
            save_file(plain, str(temporary), metadata=dict(metadata or {}))
        except SafetensorError as error:  # safetensors' word for a full disk
            raise OSError(first_line(error)) from error
    return path
