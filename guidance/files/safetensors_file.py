"""Safetensors files: the header read and checked, the tensors read, and files written atomically.

The layout: 8 bytes of header length, a JSON header of shapes, offsets and string metadata, then the numbers. The format
guards against code and overlapping tensors, not against NaN, hence `check_finite` in weights.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FileProblem, Problem, first_line
from ..plain_json import parse_json
from .atomic import temporary_path

HEADER_LIMIT = 2**25  # bytes; the format allows 100 million, models have thousands, and notes in them a few million
MOST_TENSORS = 50_000  # of one file; SDXL has 2,500, the largest language models have as many as this
MOST_DIMENSIONS = 64  # of a tensor, torch's own limit


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file with its "__metadata__", checked against the size of the file.

    Raises FileProblem for another format, a damaged header and a file that is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        plausible = len(start) == 8 and 2 <= length <= HEADER_LIMIT
        text = file.read(min(length, size)) if plausible else start + file.read(192)
    if not plausible and text[8:9] == b"{" and length <= size:
        raise FileProblem(
            f"{path}: expected a header of at most {HEADER_LIMIT >> 20} MiB, found one of {length >> 20} MiB; write "
            "the file with fewer notes."
        )
    if not plausible or text[:1] != b"{":
        raise FileProblem(f"{path}: expected a safetensors file, found something else; use a .safetensors file.")
    if len(text) < length:
        raise FileProblem(
            f"{path}: the file is truncated: expected a header of {length} bytes, found {len(text)}; download or copy "
            "it again."
        )
    described = text.count(b'"data_offsets"')
    if described > MOST_TENSORS:
        raise FileProblem(
            f"{path}: expected a header of at most {MOST_TENSORS} tensors, found {described}; use another file."
        )
    try:
        header = parse_json(text, HEADER_LIMIT)
        if len(header) - ("__metadata__" in header) > MOST_TENSORS:  # escaped names are not counted above
            raise Problem(f"more than {MOST_TENSORS} tensors")
        ends = [_end_of(entry) for key, entry in header.items() if key != "__metadata__"]
        notes = header.setdefault("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise Problem("metadata that is no text")
    except ValueError as error:
        raise FileProblem(
            f"{path}: expected a safetensors file, found a damaged header ({first_line(error)}); download or copy it "
            "again."
        ) from None
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise FileProblem(
            f"{path}: the file is truncated: expected {expected} bytes, found {size}; download or copy it again."
        )
    return header


def _end_of(entry: Any) -> int:
    """Where a tensor's numbers end, counted from the header. Raises Problem for an entry that describes no tensor."""
    described = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
    shape, offsets = (_sizes(entry.get(name)) if described else None for name in ("shape", "data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise Problem("a tensor that is not described by dtype, shape and data_offsets")
    if len(shape) > MOST_DIMENSIONS:
        raise Problem(f"a tensor of {len(shape)} dimensions, more than torch takes")
    bits = 8 * max(offsets[1] - offsets[0], 0)  # no format has numbers of less than one bit
    if math.prod(shape) > bits or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise Problem("a tensor of more numbers than its bytes hold")
    return offsets[1]


def _sizes(value: Any) -> list[int] | None:
    whole = isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
    return value if whole else None


def read_safetensors(path: Path, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """The tensors whose keys start with `prefix`, without it. Raises FileProblem for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        str(path).encode()
        with safe_open(str(path), framework="pt", device=device) as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    except UnicodeEncodeError:  # bytes of a name that Python could only keep as halves of characters
        raise FileProblem(
            f"{path}: expected a file whose path is UTF-8, which safetensors needs, found another; rename it."
        ) from None
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError) as error:
        raise FileProblem(
            f"{path}: expected a safetensors file, found a damaged one ({first_line(error)}); download it again."
        ) from error


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
